"""fedllm.adapters.fingerprint: what must be the same at every silo shows, and nothing else does."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from fedllm.adapters import AdapterError, fingerprint
from fedllm.demo.model import train_tokenizer
from tests.tiny_models import TEXTS, adapted, lora, tiny_gpt2

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

FINGERPRINT_PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = {path!r}
from fedllm.adapters import fingerprint
from fedllm.demo.model import train_tokenizer
from tests.tiny_models import TEXTS, lora, tiny_gpt2
config = lora(target_modules=["c_attn", "c_fc", "c_proj", "wte", "wpe", "lm_head"])
print(json.dumps(fingerprint(tiny_gpt2(), train_tokenizer(TEXTS, 300), config)))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.slow
def test_fresh_processes_agree(tokenizer):
    program = FINGERPRINT_PROGRAM.format(path=[str(Path(__file__).parent.parent)])
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


def test_silos_whose_own_layers_differ_have_one_fingerprint(tokenizer):
    mine, theirs = tiny_gpt2(), tiny_gpt2()
    nn.init.ones_(mine.get_parameter("transformer.h.1.ln_1.bias"))
    keep = ["transformer.h.1"]
    prints = [fingerprint(model, tokenizer, None, keep_local=keep) for model in (mine, theirs)]
    assert prints[0] == prints[1]
    assert prints[0] != fingerprint(theirs, tokenizer, None)
    nn.init.ones_(mine.get_parameter("transformer.h.0.ln_1.bias"))
    assert fingerprint(mine, tokenizer, None, keep_local=keep) != prints[1]


def test_running_statistics_are_each_silos_own_where_their_layer_is(tokenizer):
    mine, theirs = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    mine(torch.randn(9, 2))
    prints = [fingerprint(model, tokenizer, None, keep_local=["1"]) for model in (mine, theirs)]
    assert prints[0] == prints[1]
    assert fingerprint(mine, tokenizer, None) != fingerprint(theirs, tokenizer, None)


def test_a_model_without_values_has_no_fingerprint(tokenizer):
    with pytest.raises(AdapterError, match="bias has no values yet, on the meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"), tokenizer, None)
