"""What an engine with continuous batching can serve, and what it refuses. Run: pytest tests/serving/test_servable.py"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import moa
from moa.errors import ConfigError
from moa.serving.rebuild import Mixtures
from moa.serving.servable import check_servable
from moa.serving.vllm.vllm_folder import export_vllm
from moa.types import Context
from tests import models

SERVED = {
    "topk": {},
    "switch": {},
    "sigmoid": {},
    "dense": {},
    "noisy_topk": {},
    "adamole": {"rank": 4},
    "remix": {},
    "fixed": {},
    "flylora": {"rank": 8, "k": 4},
    "hydra": {},
    "hydralora": {},
    "loramoe": {},
    "mixlora": {},
}
REFUSED = {
    "remix": ({"granularity": "sequence"}, "whole sequence.*moa distill"),
    "poly": ({"n_tasks": 2}, "task of a request.*peft-tasks"),
    "moelora": ({"n_tasks": 2, "unknown_tasks": "uniform"}, "task of a request.*peft-tasks"),
    "topk": ({"place": "block"}, "after a whole block.*moa distill"),
}


def filled(model: moa.MoAModel) -> moa.MoAModel:
    generator = torch.Generator().manual_seed(5)
    for _, branch in model.branches():
        for parameter in branch.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("router", SERVED)
def test_a_served_router_is_a_function_of_the_row(router):
    """Each row by itself has the routing that it has among others, in any order."""
    model = filled(moa.build(models.llama(), router=router, **SERVED[router]))
    check_servable(model)
    for _, branch in model.branches():
        x = torch.randn(6, branch.bank.d_in)
        if type(branch.router).__name__ == "FollowRouter":
            continue  # gives what another has decided
        together = branch.router(x, Context()).dense()
        together = together.expand(6, *together.shape[-1:]) if together.ndim == 1 else together
        alone = torch.cat([branch.router(row[None], Context()).dense().reshape(1, -1) for row in x])
        torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)


def test_every_recipe_is_served_or_refused():
    """A new recipe has to be put among those that are tried here."""
    given, known = {"xlora", "xcross", "arrow"}, {"mhr", "expert_choice", "soft"}
    assert set(moa.RECIPES) == {*SERVED, *REFUSED, *given, *known}
    for router in known:
        with pytest.raises(ConfigError, match="cannot serve"):
            check_servable(moa.build(models.llama(), router=router))


@pytest.mark.parametrize("router", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_next_best_thing(router, tmp_path):
    options, says = REFUSED[router]
    model = moa.build(models.llama(), router=router, **options)
    with pytest.raises(ConfigError, match=says):
        export_vllm(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_first_pass_and_streams_are_refused(tmp_path):
    for number in range(2):
        base = moa.build(models.llama(), router="fixed", rank=2)
        moa.export_expert(base, 0, tmp_path / str(number))
    folders = [tmp_path / "0", tmp_path / "1"]
    for router, says in (("xlora", "first pass.*moa distill"), ("xcross", "streams.*moa distill")):
        with pytest.raises(ConfigError, match=says):
            export_vllm(moa.build(models.llama(), router=router, experts=folders), tmp_path / "out")


def test_only_a_causal_language_model_is_exported(tmp_path):
    with pytest.raises(ConfigError, match="causal language models"):
        export_vllm(moa.build(models.bert(), router="topk"), tmp_path)


@pytest.mark.parametrize("router", SERVED)
def test_an_exported_folder_rebuilds_the_mixtures_without_the_base(router, tmp_path):
    """The rebuilt mixtures take the file's tensors by name, and give what the model's give."""
    model = filled(moa.build(models.llama(), router=router, **SERVED[router]))
    tmp_path = export_vllm(model, tmp_path / "out")
    export_vllm(model, tmp_path, overwrite=True)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {name: (m.in_features, m.out_features) for name, m in model.mixtures().items()}
    rebuilt = Mixtures(config["moa"]["recipes"], sizes)
    stored, names = load_file(tmp_path / "moa.safetensors"), rebuilt.checkpoint_names()
    assert {f"moa.{name}" for name in names.values()} >= stored.keys()
    own = rebuilt.state_dict(keep_vars=True)
    for name, there in names.items():
        if f"moa.{there}" in stored:
            own[name].data.copy_(stored[f"moa.{there}"])
    if router == "mixlora":
        return  # a layer of a block does not run by itself
    for name, mixture in rebuilt.by_name.items():
        original = model.mixtures()[name]
        mixture.base = original.base
        x = torch.randn(3, original.in_features)
        torch.testing.assert_close(mixture(x), original(x), rtol=1e-6, atol=1e-6)
    assert {"base_config", "moa", "model_type"} <= config.keys()
