"""fedllm.adapters: names, order and bytes survive the way to numpy and back; fingerprints."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedllm.adapters import (
    AdapterError,
    fingerprint,
    full_arrays,
    load_full,
    load_lora,
    lora_arrays,
    save_lora,
)
from fedllm.demo.model import train_tokenizer

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    model.eval()
    return model


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


def adapted(seed: int = 0, **changes: object) -> PeftModel:
    """A LoRA model whose every factor is non-zero, so that each of them shows in the logits."""
    model = get_peft_model(tiny_gpt2(), lora(**changes))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.arange(12).reshape(1, 12)).logits
    return result


def snapshot(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in arrays.items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


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


def test_bfloat16_is_widened_exactly_and_comes_back_bit_by_bit():
    model = tiny_gpt2().bfloat16()
    arrays = full_arrays(model)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    other = tiny_gpt2(1).bfloat16()
    load_full(other, arrays)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert left.dtype is right.dtype is torch.bfloat16
        assert torch.equal(left, right)


def test_what_numpy_cannot_hold_is_named():
    module = nn.Module()
    module.scale = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterError, match=r"scale is torch\.float8_e4m3fn"):
        full_arrays(module)


# Fingerprints

FINGERPRINT_PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = {path!r}
from test_adapters import TEXTS, fingerprint, lora, tiny_gpt2, train_tokenizer
config = lora(target_modules=["c_attn", "c_fc", "c_proj", "wte", "wpe", "lm_head"])
print(json.dumps(fingerprint(tiny_gpt2(), train_tokenizer(TEXTS, 300), config)))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.slow
def test_fresh_processes_agree(tokenizer):
    here = Path(__file__).parent
    program = FINGERPRINT_PROGRAM.format(path=[str(here), str(here.parent)])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    outputs = [child.communicate(timeout=50)[0] for child in children]
    assert outputs[0] == outputs[1]
    config = lora(target_modules=["lm_head", "wpe", "wte", "c_proj", "c_fc", "c_attn"])
    assert json.loads(outputs[0]) == fingerprint(tiny_gpt2(), tokenizer, config)


def test_an_attached_adapter_does_not_change_the_base(tokenizer):
    plain = fingerprint(tiny_gpt2(), tokenizer, lora())
    model = adapted(target_modules=["wte", "c_attn", "c_proj", "c_fc"])
    assert fingerprint(model, tokenizer, lora())["weights"] == plain["weights"]


def flip_one_bit(model: GPT2LMHeadModel) -> None:
    bias = model.get_parameter("transformer.h.1.mlp.c_proj.bias").detach().numpy()
    bias.view(np.uint32)[3] ^= 1


def swap_two_biases(model: GPT2LMHeadModel) -> None:
    first, second = (model.get_parameter(f"transformer.h.{n}.ln_1.bias") for n in (0, 1))
    second.data, first.data = first.data.clone(), second.data.clone()


@pytest.mark.parametrize(
    "change", [flip_one_bit, swap_two_biases, lambda model: model.half()], ids=str
)
def test_any_change_of_the_weights_shows(tokenizer, change):
    model = tiny_gpt2()
    nn.init.ones_(model.get_parameter("transformer.h.0.ln_1.bias"))
    before = fingerprint(model, tokenizer, None)
    change(model)
    after = fingerprint(model, tokenizer, None)
    assert after["weights"] != before["weights"]
    assert after["tokenizer"] == before["tokenizer"]
    assert after["adapter"] == before["adapter"]


def test_names_and_shapes_are_part_of_the_weights(tokenizer):
    def holder(**parameters: torch.Tensor) -> nn.Module:
        module = nn.Module()
        for name, value in parameters.items():
            module.register_parameter(name, nn.Parameter(value))
        return module

    digests = {
        fingerprint(module, tokenizer, None)["weights"]
        for module in (
            holder(a=torch.zeros(6), b=torch.ones(2)),
            holder(a=torch.zeros(2, 3), b=torch.ones(2)),
            holder(a=torch.zeros(6), c=torch.ones(2)),
            holder(a=torch.zeros(5), b=torch.ones(2)),
        )
    }
    assert len(digests) == 4


def test_order_of_definition_is_no_part_of_the_weights(tokenizer):
    def holder(*names: str) -> nn.Module:
        module = nn.Module()
        for name in names:
            module.register_parameter(name, nn.Parameter(torch.full((2,), float(ord(name)))))
        return module

    prints = [fingerprint(holder(*names), tokenizer, None) for names in ("ab", "ba")]
    assert prints[0] == prints[1]


def test_another_tokenizer_shows(tokenizer):
    model = tiny_gpt2()
    before = fingerprint(model, tokenizer, None)
    other = train_tokenizer([TEXTS[1]], 280)
    assert fingerprint(model, other, None)["tokenizer"] != before["tokenizer"]
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"pad_token": "<pad>"})
    assert fingerprint(model, special, None)["tokenizer"] != before["tokenizer"]


def test_what_a_tokenizer_did_last_does_not_show(tokenizer):
    model = tiny_gpt2()
    used = copy.deepcopy(tokenizer)
    before = fingerprint(model, used, None)
    used(TEXTS[0], truncation=True, max_length=4)
    assert fingerprint(model, used, None) == before


@pytest.mark.parametrize(
    "changes", [{"r": 8}, {"lora_alpha": 3}, {"target_modules": ["c_attn"]}, {"use_rslora": True}]
)
def test_any_setting_of_the_adapter_shows(tokenizer, changes):
    model = tiny_gpt2()
    digests = {
        fingerprint(model, tokenizer, config)["adapter"] for config in (lora(), lora(**changes))
    }
    assert len(digests) == 2


def test_paths_and_the_order_of_targets_do_not_show(tokenizer):
    model = tiny_gpt2()
    here = lora(target_modules=["c_fc", "c_attn"])
    here.base_model_name_or_path = "another/place"
    here.inference_mode = True
    assert fingerprint(model, tokenizer, here) == fingerprint(model, tokenizer, lora())


def test_no_adapter_is_not_some_adapter(tokenizer):
    model = tiny_gpt2()
    assert (
        fingerprint(model, tokenizer, None)["adapter"]
        != fingerprint(model, tokenizer, lora())["adapter"]
    )
