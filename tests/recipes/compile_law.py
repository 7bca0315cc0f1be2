"""A compiled model trains as the plain one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

import moa
from moa.mixture import Mixture
from tests import models
from tests.laws import assert_close

from .recipe_laws import Subject, step_gradients


def compiles(subject: Subject, change: Callable[[moa.MoAModel], nn.Module], tolerance: float = 1e-5) -> None:
    """A training step gives the same losses and gradients after a change that compiles the model or parts of it.

    Args:
        subject: a recipe; the model is a decoder of one layer, all of whose linears have the recipe's mixtures.
        change: compiles a model and returns what is called in its place.
        tolerance: relative.
    """
    torch._dynamo.reset()
    calm = {"jitter": 0.0} if hasattr(subject.recipe, "jitter") else {}  # compiled, uniform_ draws other numbers
    recipe = dataclasses.replace(subject.recipe, targets="all-linear", **calm)
    batch, losses, gradients = subject.batch(), [], []
    for compiled in (False, True):
        model = models.randomise(moa.build(models.llama(num_hidden_layers=1), recipe))
        run = change(model) if compiled else model
        gradients.append(step_gradients(run, batch))
        losses.append(dict(model.last_losses))
    _same(losses[1], losses[0], tolerance)
    _same({name.replace("_orig_mod.", ""): grad for name, grad in gradients[1].items()}, gradients[0], tolerance)


def _same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(got[name], value, tolerance, name)


def blocks_in_one_graph(model: moa.MoAModel) -> moa.MoAModel:
    """Compile each feed-forward block whole, without a break: its mixtures call each other as the recipe wants it."""
    for layer in model.base.model.layers:  # type: ignore[union-attr]
        assert any(isinstance(m, Mixture) for m in layer.mlp.modules())
        layer.mlp.compile(fullgraph=True, backend="aot_eager")
    return model


def whole_model(model: moa.MoAModel) -> nn.Module:
    """Compile the model as users and Trainer do it; breaks are allowed outside the mixtures."""
    return torch.compile(model, backend="eager")  # type: ignore[return-value]
