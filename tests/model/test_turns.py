"""Whatever changes a model waits for the forwards of other threads. Run: pytest tests/model/test_turns.py"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError
from moa.model import turns
from moa.model.elastic import set_rank
from moa.model.moa_model import MoAModel
from tests import models

# what only reads, enters a forward, or sets something of its own thread
READS = {
    "adapted_summary",
    "adapter_state_dict",
    "adapter_tensors",
    "around",
    "base_model",
    "branches",
    "can_generate",
    "check_outside",
    "check_routers",
    "context",
    "continuous_batching_context_manager",
    "describe",
    "disable_adapter",  # and these wait inside where weights are swapped: see tests/recipes/test_threads.py
    "expert_names",
    "folded",
    "forward",
    "forward_begins",
    "forward_ends",
    "from_pretrained",
    "generate",
    "generate_batch",
    "generation_config",
    "get_base_model",
    "get_input_embeddings",
    "get_nb_trainable_parameters",
    "get_output_embeddings",
    "init_continuous_batching",
    "listen",
    "mixtures",
    "named_routers",
    "optimizer_groups",
    "pin_expert",
    "print_trainable_parameters",
    "reference",
    "routed_loss",
    "save_pretrained",
    "shared_of",
    "supports_gradient_checkpointing",
    "tracing",
}
# an optimizer has changed the weights just before, and waits for nobody
OPTIMIZERS = {"exchange_counts", "optimizer_step_done", "settle"}
REFUSES = {  # adapters of PEFT on a plain model
    "active_adapters",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "get_adapter_state_dict",
    "load_adapter",
    "set_adapter",
}


def other(model: Any) -> nn.Embedding:
    return nn.Embedding(*model.get_input_embeddings().weight.shape)


VALUES: dict[str, Callable[[Any], Any]] = {
    "_apply": lambda model: model.double(),
    "activation_checkpointing_disable": lambda model: model.activation_checkpointing_disable(),
    "activation_checkpointing_enable": lambda model: model.activation_checkpointing_enable(),
    "apply": lambda model: model.apply(lambda module: None),
    "enable_input_require_grads": lambda model: model.enable_input_require_grads(),
    "experts_changed": lambda model: model.experts_changed(),
    "gradient_checkpointing_disable": lambda model: model.gradient_checkpointing_disable(),
    "gradient_checkpointing_enable": lambda model: model.gradient_checkpointing_enable(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "routers_changed": lambda model: model.routers_changed(),
    "set_attn_implementation": lambda model: model.set_attn_implementation("eager"),
    "set_experts_implementation": lambda model: model.set_experts_implementation("eager"),
    "set_submodule": lambda model: model.set_submodule("base.lm_head", nn.Linear(16, 32)),
    "tie_weights": lambda model: model.tie_weights(),
    "train": lambda model: model.train(),
}
MODULES: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda model: model.adapt(),
    "add_expert": lambda model: model.add_expert(),
    "add_recipe": lambda model: model.add_recipe(moa.make_recipe("topk", targets=["lm_head"])),
    "merge_and_unload": lambda model: model.merge_and_unload(0),
    "remove_expert": lambda model: model.remove_expert(0),
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(80),
    "set_input_embeddings": lambda model: model.set_input_embeddings(other(model)),
    "set_output_embeddings": lambda model: model.set_output_embeddings(other(model)),
    "train_whole": lambda model: model.train_whole(["lm_head"]),
    "unload": lambda model: model.unload(),
}
WRITES = VALUES | MODULES


def fresh() -> Any:
    return models.randomise(moa.build(models.llama(), "poly", n_tasks=2, n_experts=3)).eval()


def undeclared(cls: type) -> set[str]:
    """Public names of moa's classes, and what of torch's changes a module, that none of the tables knows."""
    ours = {n for c in cls.__mro__ if c.__module__.startswith("moa.") for n, v in vars(c).items() if _acts(n, v)}
    return (ours | set(WRITES)) - READS - OPTIMIZERS - REFUSES - {n for n in WRITES if _waits(getattr(cls, n))}


def _acts(name: str, value: Any) -> bool:
    kinds = FunctionType | property | classmethod | staticmethod
    return not name.startswith("_") and isinstance(value, kinds)


def _waits(method: Any) -> bool:
    return bool(method.__code__.co_filename == turns.__file__)


def test_every_method_is_declared() -> None:
    assert not undeclared(MoAModel)

    class Careless(MoAModel):
        def forget_expert(self) -> None:
            """Change something, and tell nobody."""

        def unload(self) -> nn.Module:
            """Take the mixtures out, and wait for nobody."""
            return self.base

    Careless.__module__ = MoAModel.__module__
    assert undeclared(Careless) == {"forget_expert", "unload"}


class Watched(threading.Condition):
    """A condition that says when somebody begins to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.set()
        return super().wait(timeout)


def during_a_forward(model: Any, change: Callable[[Any], Any], batch: dict[str, Any]) -> bool:
    """Change a model in a second thread while a forward of this one runs; return whether the change waited for it."""
    watched = model.scope.turns._changed = Watched()
    running: list[Future[Any]] = []
    waited: list[bool] = []

    def begin(module: Any, args: Any) -> None:
        if running:
            return
        running.append(pool.submit(change, model))
        running[0].add_done_callback(lambda _: watched.waited.set())  # whatever comes first: it waits, or has ended
        assert watched.waited.wait(60)
        waited.append(not running[0].done())

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        handle = next(iter(model.mixtures().values())).register_forward_pre_hook(begin)
        model(**batch)
        handle.remove()
        running[0].result(60)
    return waited == [True]


@pytest.mark.parametrize("name", sorted(WRITES))
def test_writers_wait_for_other_threads_forwards(name: str) -> None:
    model = fresh()
    assert during_a_forward(model, WRITES[name], {**models.token_batch(), "task_ids": torch.zeros(4, dtype=torch.long)})


def test_a_rank_is_set_between_forwards() -> None:
    model = models.randomise(moa.build(models.llama(), "topk", expert="dylora", n_experts=2)).eval()
    assert during_a_forward(model, lambda model: set_rank(model, 2), models.token_batch())


def test_a_method_that_does_not_wait_is_seen() -> None:
    batch = {**models.token_batch(), "task_ids": torch.zeros(4, dtype=torch.long)}
    assert not during_a_forward(fresh(), lambda model: type(model).experts_changed.__wrapped__(model), batch)


def test_a_checkpoint_waits_for_another_threads_fold(tmp_path: Any) -> None:
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=3)).eval()
    base = copy.deepcopy(models.llama())
    watched = model.scope.turns._changed = Watched()
    with ThreadPoolExecutor(1) as pool:
        with model.folded():
            saving = pool.submit(model.save_pretrained, tmp_path)
            assert watched.waited.wait(60)
        saving.result(60)
    batch = models.token_batch()
    assert torch.equal(models.outputs_of(moa.load(tmp_path, base=base), batch), models.outputs_of(model, batch))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_are_changed_outside_of_blocks(name: str) -> None:
    model = fresh()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = {
        "a forward": None,
        "pin_expert": lambda: model.pin_expert(0),
        "disable_adapter": model.disable_adapter,
        "folded": lambda: model.folded(0),
    }
    for where, block in blocks.items():
        with pytest.raises(ConfigError, match=where):
            if block is not None:
                with block():
                    MODULES[name](model)
            else:
                handle = model.base.lm_head.register_forward_pre_hook(lambda *_: MODULES[name](model))
                try:
                    model(**models.token_batch(), task_ids=torch.zeros(4, dtype=torch.long))
                finally:
                    handle.remove()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with model.tracing():  # a block that only looks on
        MODULES[name](model)


def test_turns_of_two_models_are_their_own() -> None:
    one, two = fresh(), fresh()
    with one.scope.turns.alone():
        assert one.scope.turns.mine() and not two.scope.turns.mine()
