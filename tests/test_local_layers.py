"""fedllm.adapters: layers that never leave a silo, and models that are looked at before they are adopted."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from fedllm.adapters import (
    AdapterError,
    full_arrays,
    full_on_trial,
    load_full,
    load_local,
    load_lora,
    local_arrays,
    lora_arrays,
    lora_on_trial,
)
from tests.tiny_models import adapted, assert_same, logits, snapshot, tiny_gpt2

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def test_a_pattern_keeps_parameters_and_whole_modules():
    model = tiny_gpt2()
    everything = full_arrays(model)
    patterns = ["transformer.h.1", "*.ln_?.bias"]
    kept = local_arrays(model, patterns)
    assert all(name.startswith("transformer.h.1.") or name.endswith(".bias") for name in kept)
    assert "transformer.h.0.ln_2.bias" in kept
    assert "transformer.h.1.mlp.c_fc.weight" in kept
    shared = full_arrays(model, keep_local=patterns)
    assert set(shared) | set(kept) == set(everything)
    assert set(shared) & set(kept) == set()
    assert list(shared) == [name for name in everything if name in shared]


@pytest.mark.parametrize("pattern", ["lm_head", "transformer.wte.weight", "*head*"])
def test_a_tied_parameter_stays_by_any_of_its_names(pattern):
    model = tiny_gpt2()
    assert set(full_arrays(model)) - set(full_arrays(model, keep_local=[pattern])) == {
        "transformer.wte.weight"
    }


@pytest.mark.parametrize("keep_local", [["lm_haed"], "lm_head", ["lm_head", "h.1"]])
@pytest.mark.parametrize("of", [full_arrays, lora_arrays])
def test_a_pattern_that_means_nothing_is_an_error_before_a_layer_leaves(of, keep_local):
    model = tiny_gpt2() if of is full_arrays else adapted()
    with pytest.raises(AdapterError, match="means no parameter here"):
        of(model, keep_local=keep_local)


def tied_by_memory(size: int = 2, offset: int = 0) -> nn.Module:
    memory = torch.arange(6.0)
    model = nn.Module()
    model.a = nn.Parameter(memory[:2])
    model.b = nn.Parameter(memory[offset : offset + size])
    return model


def test_parameters_that_share_memory_stay_together_or_leave_together():
    assert set(full_arrays(tied_by_memory())) == {"a", "b"}
    assert set(local_arrays(tied_by_memory(), ["a", "b"])) == {"a", "b"}
    assert set(full_arrays(tied_by_memory(offset=2), keep_local=["b"])) == {"a"}
    for model in (tied_by_memory(), tied_by_memory(5, offset=1)):
        for mine, theirs in ("ab", "ba"):
            text = f"{mine} stays, and lies in the same memory as {theirs}, which leaves"
            with pytest.raises(AdapterError, match=text):
                full_arrays(model, keep_local=[mine])


def test_an_adapters_parameters_that_share_memory_stay_together_too():
    model = adapted()
    first, second = (
        model.get_parameter(f"base_model.model.transformer.h.{n}.mlp.c_fc.lora_A.default.weight")
        for n in (0, 1)
    )
    second.data = first.data
    with pytest.raises(AdapterError, match="stays, and lies in the same memory as"):
        lora_arrays(model, keep_local=["*.h.1"])
    assert lora_arrays(model, keep_local=["*.c_fc"])


def test_a_silo_loads_the_global_layers_and_keeps_its_own():
    mine, theirs = tiny_gpt2(1), tiny_gpt2(2)
    keep = ["transformer.h.1", "transformer.ln_f"]
    own = snapshot(local_arrays(mine, keep))
    load_full(mine, snapshot(full_arrays(theirs, keep_local=keep)), keep_local=keep)
    assert_same(local_arrays(mine, keep), own)
    assert_same(full_arrays(mine, keep_local=keep), full_arrays(theirs, keep_local=keep))
    with pytest.raises(AdapterError, match=r"transformer\.h\.1\.\S+ is unknown here"):
        load_full(mine, full_arrays(theirs), keep_local=keep)


def test_what_stayed_is_saved_and_loaded_by_itself():
    mine, again = tiny_gpt2(1), tiny_gpt2(1)
    keep = ["transformer.h.1"]
    nn.init.ones_(mine.get_parameter("transformer.h.1.ln_1.bias"))
    load_local(again, snapshot(local_arrays(mine, keep)), keep)
    assert torch.equal(logits(mine), logits(again))
    with pytest.raises(AdapterError, match="is unknown here"):
        load_local(again, full_arrays(mine), keep)


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["ln_f"]}], ids=str)
def test_an_adapters_layers_stay_as_well(changes):
    mine, theirs = adapted(1, **changes), adapted(2, **changes)
    keep = ["*.h.1", *(["*.ln_f.weight"] if changes else [])]
    before = snapshot(lora_arrays(mine))
    shared = snapshot(lora_arrays(theirs, keep_local=keep))
    assert not any(".h.1." in name or name.endswith("ln_f.weight") for name in shared)
    load_lora(mine, shared, keep_local=keep)
    assert_same(lora_arrays(mine), {name: shared.get(name, before[name]) for name in before})


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))


def test_the_running_statistics_of_layers_that_stay_are_saved_with_them():
    mine, again = normed(), normed()
    keep = ["1"]
    mine(torch.randn(9, 2))
    assert_same(snapshot(full_arrays(mine)), snapshot(full_arrays(again)))
    own = snapshot(local_arrays(mine, keep))
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(own) == [f"1.{name}" for name in names]
    load_local(again, own, keep)
    assert_same(local_arrays(again, keep), own)
    assert not again.get_buffer("2.running_mean").any()


# A look at a new model before it is adopted


@pytest.mark.parametrize(
    ("make", "arrays_of", "load", "on_trial"),
    [
        (tiny_gpt2, full_arrays, load_full, full_on_trial),
        (lambda seed: tiny_gpt2(seed).bfloat16(), full_arrays, load_full, full_on_trial),
        (adapted, lora_arrays, load_lora, lora_on_trial),
    ],
    ids=["full", "bf16", "lora"],
)
def test_on_trial_a_model_computes_with_other_weights_and_nothing_is_copied(
    make, arrays_of, load, on_trial
):
    model, other = make(1), make(2)
    mine, theirs = logits(model), logits(other)
    own, before = arrays_of(model), snapshot(arrays_of(model))
    candidate = snapshot(arrays_of(other))
    with suppress(ZeroDivisionError), on_trial(model, candidate):
        assert torch.equal(logits(model), theirs)
        assert all(np.shares_memory(a, candidate[name]) for name, a in arrays_of(model).items())
        raise ZeroDivisionError
    assert torch.equal(logits(model), mine)
    assert_same(own, before)
    assert all(np.shares_memory(array, own[name]) for name, array in arrays_of(model).items())
    with pytest.raises(AdapterError, match="is missing"), on_trial(model, {}):
        pytest.fail("entered")
    load(model, candidate)
    assert torch.equal(logits(model), theirs)


def test_on_trial_tied_weights_stay_tied_and_local_layers_stay():
    model, other = tiny_gpt2(1), tiny_gpt2(2)
    keep = ["transformer.h.1"]
    kept = local_arrays(model, keep)
    with full_on_trial(model, full_arrays(other, keep_local=keep), keep_local=keep):
        assert model.lm_head.weight.data_ptr() == other.transformer.wte.weight.data_ptr()
        assert all(np.shares_memory(a, kept[name]) for name, a in local_arrays(model, keep).items())
        trial = logits(model)
    load_full(model, full_arrays(other, keep_local=keep), keep_local=keep)
    assert torch.equal(logits(model), trial)


def test_a_look_in_training_mode_leaves_no_statistics_of_other_weights():
    model, other = normed(), normed()
    model(torch.randn(9, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with suppress(ZeroDivisionError), full_on_trial(model, full_arrays(other)):
        model(torch.randn(9, 2) + 5)
        raise ZeroDivisionError
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


class Averaging(nn.Module):
    """Buffers of several kinds: one that a forward assigns anew, one of two names, one that overlaps itself."""

    start: torch.Tensor
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("start", torch.zeros(2))
        self.register_buffer("mean", self.start)
        self.register_buffer("scale", torch.ones(1).expand(2))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x) * self.scale
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y


def test_a_look_gives_back_buffers_that_a_forward_assigns_anew():
    model = Averaging()
    own = dict(model.named_buffers(remove_duplicate=False))
    before = snapshot(full_arrays(model)), {name: b.clone() for name, b in own.items()}
    with full_on_trial(model, {name: a + 1 for name, a in full_arrays(model).items()}):
        model(torch.randn(9, 2) + 5)
        assert model.mean is not own["mean"]
    after = dict(model.named_buffers(remove_duplicate=False))
    assert_same(full_arrays(model), before[0])
    assert list(after) == list(own)
    for name, buffer in after.items():
        assert buffer is own[name], name
        assert torch.equal(buffer, before[1][name]), name
