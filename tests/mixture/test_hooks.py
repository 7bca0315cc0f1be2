"""What runs by hooks refuses a base that is compiled already. Run: pytest tests/mixture/test_hooks.py"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError
from moa.mixture.hooks import check_hooks_run
from tests import models


def recipe(name: str) -> moa.Recipe:
    return moa.make_recipe(name, n_experts=2, rank=2)


@pytest.mark.parametrize("where", ["", "model", "model.layers.1"])
def test_streams_refuse_a_compiled_body(where: str) -> None:
    base = models.llama()
    base.get_submodule(where).compile(backend="eager")
    with pytest.raises(ConfigError, match=rf"{where or 'LlamaForCausalLM'} is compiled already"):
        moa.build(base, recipe("xcross"))
    assert not any(isinstance(module, moa.Mixture) for module in base.modules()), "half built"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_what_is_compiled_inside_a_block_does_not_matter() -> None:
    base = models.llama()
    base.model.layers[0].mlp.compile(backend="eager")
    base.lm_head.compile(backend="eager")
    model = moa.build(base, recipe("xcross"))
    assert model.streams is not None


def test_a_first_pass_refuses_to_be_left_out_of_generation() -> None:
    model = moa.build(models.llama(), recipe("xlora")).eval()
    prompt = torch.ones(1, 3, dtype=torch.long)
    model.generate(prompt, max_new_tokens=2)
    model.base.compile(backend="eager")
    with pytest.raises(ConfigError, match="LlamaForCausalLM is compiled already"):
        model.generate(prompt, max_new_tokens=2)


def test_a_wrapper_of_torch_compile_is_seen() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_hooks_run(nn.Sequential(inner), [inner])
    wrapped = nn.Sequential(torch.compile(inner, backend="eager"))
    with pytest.raises(ConfigError, match="0 is compiled already"):
        check_hooks_run(wrapped, [inner[1]])
