"""A build that fails changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..mixture import Mixture, take_out
from .entries import close_entries
from .host import Host


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was if building on it fails: its own layers, and what of them is trained."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    before = {id(m) for m in model.modules() if isinstance(m, Mixture)}
    lists = (list(model.recipes), list(model.modules_to_save)) if isinstance(model, Host) else None
    try:
        yield
    except BaseException:
        if not isinstance(model, Host):
            close_entries(model)
        take_out(model, {id(m) for m in model.modules() if isinstance(m, Mixture)} - before)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        if isinstance(model, Host) and lists is not None:
            for whole in reversed(model.whole[len(lists[1]) :]):
                whole.restore()
            del model.whole[len(lists[1]) :]
            model.recipes, model.modules_to_save = lists
            for number in [n for n in model.shared_by_layers if int(n) >= len(model.recipes)]:
                del model.shared_by_layers[number]
            model.routers_changed()
        raise
