"""fedllm.adapters: names, order and bytes survive the way to numpy and back."""

import asyncio
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

import fedllm
from fedllm.adapters import (
    AdapterError,
    full_arrays,
    full_on_trial,
    load_full,
    load_lora,
    lora_arrays,
    save_lora,
)
from tests.tiny_models import adapted, assert_same, logits, lora, snapshot, tiny_gpt2

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

# LoRA


def test_lora_arrays_are_what_peft_saves_in_its_order():
    model = adapted()
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert_same(lora_arrays(model), {k: v.numpy() for k, v in expected.items()})
    assert len(expected) == 2 * 2 * 2  # layers, targets, factors
    assert not any("default" in name for name in expected)


def test_lora_arrays_are_views_that_follow_the_model():
    model = adapted()
    arrays = lora_arrays(model)
    before = snapshot(arrays)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for name in arrays:
        np.testing.assert_allclose(arrays[name], before[name] + 1, atol=1e-5)


def test_lora_goes_from_one_model_to_another():
    source, target = adapted(1), adapted(2)
    assert not torch.equal(logits(source), logits(target))
    load_lora(target, snapshot(lora_arrays(source)))
    assert torch.equal(logits(source), logits(target))
    assert_same(lora_arrays(source), lora_arrays(target))


def test_loading_copies_so_that_the_arrays_stay_the_callers():
    model = adapted()
    arrays = snapshot(lora_arrays(adapted(3)))
    load_lora(model, arrays)
    for array in arrays.values():
        array.fill(7)
    assert_same(lora_arrays(model), lora_arrays(adapted(3)))


def test_read_only_arrays_load_without_a_warning():
    arrays = snapshot(lora_arrays(adapted(4)))
    for array in arrays.values():
        array.flags.writeable = False
    model = adapted()
    load_lora(model, arrays)
    assert_same(lora_arrays(model), arrays)


def test_modules_to_save_belong_to_the_adapter():
    source, target = (adapted(seed, modules_to_save=["ln_f"]) for seed in (1, 2))
    with torch.no_grad():
        name = "base_model.model.transformer.ln_f.modules_to_save.default.weight"
        source.get_parameter(name).add_(1)
    assert any(name.endswith("ln_f.weight") for name in lora_arrays(source))
    load_lora(target, snapshot(lora_arrays(source)))
    assert torch.equal(logits(source), logits(target))


def test_embeddings_are_never_added_and_the_hub_is_never_asked(monkeypatch):
    def ask(*_: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    model = adapted(target_modules=["wte", "c_attn"])
    model.peft_config["default"].base_model_name_or_path = "someone/something"
    arrays = lora_arrays(model)
    assert max(array.size for array in arrays.values()) == 300 * 4  # factors, no 300 x 16 matrix
    assert any("lora_embedding_A" in name for name in arrays)


def test_of_two_adapters_only_the_one_asked_for():
    model = adapted()
    model.add_adapter("other", lora(r=2))
    assert {array.shape for array in lora_arrays(model).values()}.isdisjoint(
        {array.shape for array in lora_arrays(model, adapter="other").values()}
    )


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda arrays, name: arrays.pop(name), "is missing"),
        (lambda arrays, name: arrays.update(stray=arrays[name]), "stray is unknown here"),
        (
            lambda arrays, name: arrays.update({name: arrays[name][:-1]}),
            r"has shape \(3, 16\), not",
        ),
    ],
)
@pytest.mark.parametrize(
    ("make", "arrays_of", "load"),
    [(adapted, lora_arrays, load_lora), (tiny_gpt2, full_arrays, load_full)],
    ids=["lora", "full"],
)
def test_arrays_of_another_model_are_refused_and_change_nothing(make, arrays_of, load, spoil, text):
    model = make(1)
    before = snapshot(arrays_of(model))
    arrays = snapshot(arrays_of(make(2)))
    name = next(reversed(arrays))
    if arrays_of is full_arrays:
        text = text.replace(r"\(3, 16\)", r"\(15,\)")
    else:
        name = next(iter(arrays))
    spoil(arrays, name)
    with pytest.raises(AdapterError, match=text):
        load(model, arrays)
    assert_same(arrays_of(model), before)


@pytest.mark.parametrize(
    "dtype",
    [ml_dtypes.float8_e4m3fn, ">f4", np.complex64, np.int64, np.uint16, np.bool_],
    ids=str,
)
@pytest.mark.parametrize("load", [load_full, lambda *given: full_on_trial(*given).__enter__()])
def test_numbers_of_another_kind_are_refused_and_change_nothing(dtype, load):
    model = tiny_gpt2(1)
    before = snapshot(full_arrays(model))
    arrays = snapshot(full_arrays(tiny_gpt2(2)))
    name = next(reversed(arrays))
    arrays[name] = arrays[name].astype(dtype)
    text = rf"^these .*: {name} holds {np.dtype(dtype)}, which does not go into torch\.float32$"
    with pytest.raises(AdapterError, match=text):
        load(model, arrays)
    assert_same(full_arrays(model), before)


def test_buffers_of_modules_to_save_go_as_they_are():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    config = LoraConfig(target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(module, config)
    arrays = snapshot(lora_arrays(model))
    counted = next(name for name in arrays if name.endswith("num_batches_tracked"))
    arrays[counted] += 3
    load_lora(model, arrays)
    assert lora_arrays(model)[counted] == 3
    arrays[counted] = arrays[counted].astype(np.float32)
    with pytest.raises(AdapterError, match=r"holds float32, which does not go into torch\.int64"):
        load_lora(model, arrays)


def test_peft_loads_what_save_lora_writes(tmp_path: Path):
    model = adapted(5)
    save_lora(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    again = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path)).eval()
    assert torch.equal(logits(model), logits(again))


# Full weights


def test_tied_parameters_travel_once():
    model = tiny_gpt2()
    arrays = full_arrays(model)
    assert "transformer.wte.weight" in arrays
    assert "lm_head.weight" not in arrays
    assert "lm_head.weight" in model.state_dict()
    assert sum(array.size for array in arrays.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_full_weights_go_from_one_model_to_another_and_stay_tied():
    source, target = tiny_gpt2(1), tiny_gpt2(2)
    load_full(target, snapshot(full_arrays(source)))
    assert torch.equal(logits(source), logits(target))
    assert target.lm_head.weight is target.transformer.wte.weight


def test_full_arrays_are_views():
    model = tiny_gpt2()
    arrays = full_arrays(model)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(3)
    assert (arrays["transformer.wte.weight"] == 3).all()


def test_bfloat16_is_a_view_and_comes_back_bit_by_bit():
    model = tiny_gpt2().bfloat16()
    arrays = full_arrays(model)
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert not any(array.flags.owndata for array in arrays.values())
    other = tiny_gpt2(1).bfloat16()
    load_full(other, arrays)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert left.dtype is right.dtype is torch.bfloat16
        assert torch.equal(left, right)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(3)
    assert (arrays["transformer.wte.weight"] == 3).all()


def test_a_bfloat16_model_loads_global_weights_in_float32():
    model, other = tiny_gpt2().bfloat16(), tiny_gpt2(1).bfloat16()
    wide = {name: array.astype(np.float32) for name, array in full_arrays(model).items()}
    load_full(other, wide)
    assert_same(full_arrays(other), full_arrays(model))


async def test_bfloat16_weights_go_over_a_channel_and_are_averaged():
    first, second, model = (tiny_gpt2(seed).bfloat16() for seed in (1, 2, 3))
    expected = {
        name: ((left.float() + right.float()) / 2).bfloat16()
        for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True)
    }

    async def silo(address: tuple[str, int], name: str, trained: nn.Module) -> None:
        async with fedllm.join(*address, name=name, fingerprint={}) as member:
            async for task in member.rounds():
                await task.submit(full_arrays(trained), weight=1)

    settings = fedllm.RunConfig(min_silos=2, rounds=1)
    server = fedllm.Federation(full_arrays(model), settings, fingerprint={})
    async with server:
        address = await server.start()
        _, _, history = await asyncio.gather(
            silo(address, "a", first), silo(address, "b", second), server.run()
        )
    load_full(model, history.weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_what_numpy_cannot_hold_is_named():
    module = nn.Module()
    module.scale = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterError, match=r"scale is torch\.float8_e4m3fn"):
        full_arrays(module)


def test_a_model_without_values_is_told_so():
    model = nn.Linear(2, 2, device="meta")
    arrays = full_arrays(nn.Linear(2, 2))
    text = "^weight has no values yet, on the meta device: load the model first$"
    with pytest.raises(AdapterError, match=text):
        full_arrays(model)
    with pytest.raises(AdapterError, match=text):
        load_full(model, arrays)
    with pytest.raises(AdapterError, match=text), full_on_trial(model, arrays):
        pytest.fail("entered")


def test_of_what_is_not_contiguous_there_is_a_copy_that_can_be_sent():
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.randn(3, 2).t())
    own = model.weight.data_ptr(), model.weight.stride()
    array = full_arrays(model)["weight"]
    assert array.flags.c_contiguous
    load_full(model, {**snapshot(full_arrays(model)), "weight": array + 1})
    np.testing.assert_array_equal(full_arrays(model)["weight"], array + 1)
    with full_on_trial(model, snapshot(full_arrays(model))):
        assert model.weight.data_ptr() != own[0]
    assert (model.weight.data_ptr(), model.weight.stride()) == own


def test_an_adapter_that_peft_computes_anew_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(AdapterError, match=r"PROMPT_TUNING adapter is no parameter .*: use LoRA"):
        lora_arrays(get_peft_model(tiny_gpt2(), config))
