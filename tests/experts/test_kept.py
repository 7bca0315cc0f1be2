"""HypeLoRA's factors are made once for all layers, and never used after what they are made of has changed.

The truth is the network run by each layer in each forward. Run: pytest tests/experts/test_kept.py
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError
from moa.experts.families import hypelora
from moa.model.hot_switch import hot_switch
from moa.recipes import RECIPES
from tests import laws, models
from tests.laws import assert_close

SMALL: dict[str, Any] = {"expert": "hypelora", "width": 8, "d_embedding": 5}
BATCH = models.lm_batch()


@contextlib.contextmanager
def each_by_itself() -> Iterator[None]:
    """Let every layer run the network, in every forward."""
    with mock.patch.object(hypelora, "may_keep", lambda tensor: False):
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Count for how many layers the network runs, each time that it does."""
    runs: list[int] = []
    emit = hypelora.emit

    def noted(embeddings: Any, *args: Any) -> Any:
        runs.append(len(embeddings))
        return emit(embeddings, *args)

    with mock.patch.object(hypelora, "emit", noted):
        yield runs


def built(router: str = "topk", blocks: int = 2, **options: Any) -> Any:
    """Return a model in fp64 at random values."""
    chosen = {"n_experts": 3, **({"k": 2} if router == "topk" else {}), "rank": 2, **SMALL, **options}
    return models.randomise(moa.build(models.llama(num_hidden_layers=blocks), router, **chosen), 0.2).double()


def network(model: Any) -> Any:
    return model.shared_of(0)["experts"]


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: Any, step: Callable[[Any], Any]) -> list[Tensor | None]:
    """Return the gradients that a step leaves."""
    model.train().zero_grad()
    torch.manual_seed(0)
    step(model)
    return [None if p.grad is None else p.grad.clone() for p in trained(model)]


def forward(model: Any) -> Tensor:
    return model(**BATCH).loss  # type: ignore[no-any-return]


def one(model: Any) -> None:
    forward(model).backward()


def agree(model: Any, step: Callable[[Any], Any] = one, tolerance: float = 1e-10) -> None:
    """Check the gradients of a step against those of layers by themselves."""
    got = gradients(model, step)
    with each_by_itself():
        expected = gradients(model, step)
    assert any(g is not None and bool(g.any()) for g in expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert_close(mine, theirs, tolerance, "gradients")


# ------------------------------------------------------------------------------------------------ values, gradients

OWN = ("arrow", "flylora", "hydra", "mhr", "poly")  # recipes whose experts are of a kind of their own


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(OWN)))
def test_values_and_gradients_are_those_of_layers_by_themselves(name: str) -> None:
    own = {key: value for key, value in SMALL.items() if (name, key) != ("xlora", "width")}  # its classifier's
    recipe = moa.make_recipe(name, **{**laws.recipe_options(name, "default"), **own})
    model: Any = models.randomise(moa.build(models.llama(num_hidden_layers=2), recipe)).double()
    batch = {**BATCH, **({"task_ids": torch.arange(4) % laws.N_TASKS} if laws.needs_tasks(name) else {})}
    agree(model, lambda m: m(**batch).loss.backward())
    model.eval()
    with torch.no_grad(), counted() as runs:
        got = model(**batch).logits
    assert len(runs) == 1 and runs[0] > 1
    with torch.no_grad(), each_by_itself():
        assert_close(got, model(**batch).logits, 1e-10)


@pytest.mark.parametrize("name", OWN)
def test_other_recipes_have_experts_of_their_own_kind(name: str) -> None:
    with pytest.raises(ConfigError, match="experts of its own kind"):
        moa.make_recipe(name, **{**laws.recipe_options(name, "default"), **SMALL})


@pytest.mark.parametrize("down", ["generated", "frozen"])
def test_places_modes_and_mixed_banks_agree(down: str) -> None:
    agree(built(down=down, place="output"))
    agree(built(down=down, depth=4))
    kinds = [{"family": "hypelora", "width": width, "d_embedding": 5, "down": down} for width in (8, 4)]
    model = moa.build(models.llama(), "topk", expert=[kinds[0], "lora", kinds[1]], n_experts=3, k=2, rank=2)
    agree(models.randomise(model, 0.2).double())


def test_a_step_runs_the_network_once_and_so_does_a_generation() -> None:
    model = built()
    n_layers = len(model.mixtures())
    with counted() as runs:
        model.train()
        one(model)
        model.eval()
        model.generate(BATCH["input_ids"][:, :3], max_new_tokens=5, do_sample=False)
        with torch.inference_mode():
            forward(model)
    assert runs == [n_layers] * 3, "a step, a generation of five tokens, a forward"


def backward_in_turn(model: Any) -> None:
    """Two forwards, then their backward passes one by one."""
    first, second = forward(model), model(**models.lm_batch(seed=1)).loss
    first.backward()
    second.backward()


def backward_twice(model: Any) -> None:
    loss = forward(model)
    loss.backward(retain_graph=True)
    loss.backward()


def without_then_with_a_gradient(model: Any) -> None:
    with torch.inference_mode():
        forward(model)
    with torch.no_grad():
        forward(model)
    one(model)


def only_the_first_block(model: Any) -> None:
    model(**BATCH, output_hidden_states=True).hidden_states[1].square().sum().backward()


def by_grad(model: Any) -> None:
    found = torch.autograd.grad(forward(model), trained(model), allow_unused=True)
    for parameter, gradient in zip(trained(model), found, strict=True):
        parameter.grad = gradient


def hooked(model: Any) -> None:
    """A hook on a parameter sees its gradient once."""
    handles = [p.register_hook(lambda g: 3 * g) for p in trained(model)]
    one(model)
    for handle in handles:
        handle.remove()


def partly_frozen(model: Any) -> None:
    frozen = [network(model).trunk, next(iter(network(model).last.values()))]
    for module in frozen:
        module.requires_grad_(False)
    one(model)
    for module in frozen:
        module.requires_grad_(True)


STEPS = [
    backward_in_turn,
    backward_twice,
    without_then_with_a_gradient,
    only_the_first_block,
    by_grad,
    hooked,
    partly_frozen,
]


@pytest.mark.parametrize("step", STEPS)
def test_ways_to_go_backward(step: Callable[[Any], None]) -> None:
    agree(built(), step)


@pytest.mark.parametrize("step", [one, backward_in_turn, backward_twice])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again(reentrant: bool, step: Callable[[Any], None]) -> None:
    if reentrant and step is backward_twice:
        pytest.skip("PyTorch's reentrant checkpoints go backward once")
    plain, again = built("dense"), built("dense")
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    agree(again, step)
    for mine, theirs in zip(gradients(again, step), gradients(plain, step), strict=True):
        assert mine is not None and theirs is not None
        assert_close(mine, theirs, 1e-10)


def test_autocast_makes_its_own() -> None:
    model = built().float()

    def step(model: Any) -> None:
        with torch.no_grad():
            forward(model)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                forward(model)
            loss = forward(model)
        loss.backward()

    agree(model, step, 0.05)
    model.eval()
    with torch.no_grad():
        whole = forward(model)
        with torch.autocast("cpu", torch.bfloat16):
            half = forward(model)
            assert network(model).factors(next(model.branches())[1].bank)[0].dtype == torch.bfloat16
        assert not torch.equal(whole, half) and torch.equal(forward(model), whole)


def test_a_parameter_written_before_backward_is_an_error() -> None:
    model = built().train()
    loss = forward(model)
    with torch.no_grad():
        network(model).trunk[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ nothing is stale


def by_an_optimizer(model: Any) -> None:
    model.train().zero_grad()
    one(model)
    torch.optim.SGD(trained(model), lr=0.5).step()
    model.eval()


def by_an_optimizer_in_evaluation(model: Any) -> None:
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1)


def past_the_counter(model: Any) -> None:
    """As optimizers of other libraries do, after a backward pass and without a change of mode."""
    one(model)
    for parameter in trained(model):
        parameter.data.add_(0.1)


def past_the_counter_in_evaluation(model: Any) -> None:
    """As averages of weights are swapped in, with neither a backward pass nor a change of mode."""
    for parameter in trained(model):
        parameter.data.add_(0.1)


def other_data(model: Any) -> None:
    for parameter in trained(model):
        parameter.data = parameter.data + 0.1


def other_parameters(model: Any) -> None:
    bank = next(model.branches())[1].bank
    bank.embedding = nn.Parameter(bank.embedding.detach() + 0.5)
    weight = network(model).trunk[0].weight
    network(model).trunk[0].weight = nn.Parameter(weight.detach() * 1.5)


def one_embedding(model: Any) -> None:
    with torch.no_grad():
        [*model.branches()][-1][1].bank.embedding.mul_(2)


def loaded(model: Any) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def rounded(model: Any) -> None:
    model.to(torch.bfloat16).double()


def rounded_below(model: Any) -> None:
    for _, branch in model.branches():
        branch.bank.to(torch.bfloat16).double()


def smaller(model: Any) -> None:
    model.remove_expert(0)


def larger(model: Any) -> None:
    model.add_expert()
    models.randomise(model, seed=4)


def drawn_again(model: Any) -> None:
    next(model.branches())[1].bank.reset_parameters()
    models.randomise(model, seed=5)


def frozen_and_back(model: Any) -> None:
    model.requires_grad_(False)
    forward(model)
    with torch.no_grad():
        network(model).trunk[0].weight.mul_(1.5)
    network(model).requires_grad_(True)


CHANGES = [
    by_an_optimizer,
    by_an_optimizer_in_evaluation,
    past_the_counter,
    past_the_counter_in_evaluation,
    other_data,
    other_parameters,
    one_embedding,
    loaded,
    rounded,
    rounded_below,
    smaller,
    larger,
    drawn_again,
    frozen_and_back,
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", CHANGES)
def test_values_follow_a_change(change: Callable[[Any], None]) -> None:
    model = built().eval()
    before = logits(model)
    change(model)
    after = logits(model)
    with each_by_itself():
        expected = logits(model)
    assert not torch.allclose(before, expected, atol=1e-6), "this change shows nothing"
    assert_close(after, expected, 1e-10)
    agree(model)


@pytest.mark.parametrize("change", CHANGES)
def test_a_bank_by_itself_follows_a_change(change: Callable[[Any], None]) -> None:
    """What folds and exports reads banks between forwards."""
    model = built().eval()
    logits(model)
    change(model)
    with torch.no_grad():
        found = [branch.bank.delta(0).dense() for _, branch in model.branches()]
        with each_by_itself():
            expected = [branch.bank.delta(0).dense() for _, branch in model.branches()]
    for one_, other in zip(found, expected, strict=True):
        assert_close(one_, other, 1e-10)


def test_a_network_that_is_trained_again_gets_its_gradient() -> None:
    model = built().eval()
    for _, branch in model.branches():
        branch.bank.requires_grad_(False)
    network(model).requires_grad_(False)
    forward(model).backward()  # the routers' only
    network(model).requires_grad_(True)
    forward(model).backward()
    assert all(p.grad is not None for p in network(model).parameters())


def test_copies_and_pickles_make_their_own() -> None:
    model = built().eval()
    before = logits(model)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), torch.load(whole, weights_only=False)):
        assert torch.equal(logits(other), before)
        by_an_optimizer_in_evaluation(other)
        with each_by_itself():
            expected = logits(other)
        assert_close(logits(other), expected, 1e-10)
        assert torch.equal(logits(model), before)
        agree(other)


def test_experts_that_are_switched_and_folded_follow() -> None:
    model = built("fixed").eval()
    for change in (lambda model: None, by_an_optimizer_in_evaluation):
        logits(model)
        change(model)
        with each_by_itself():
            with model.pin_expert(1):
                pinned = logits(model)
            mixed = logits(model)
        with hot_switch(model) as switch:
            switch.to(1)
            assert_close(logits(model), pinned, 1e-10, "switched")
        with model.folded():
            assert_close(logits(model), mixed, 1e-10, "folded")


def test_threads_beside_each_other() -> None:
    model = built().eval()
    with each_by_itself():
        expected = logits(model)
    wrong: list[str] = []

    def run(number: int) -> None:
        for _ in range(8):
            if number % 2:
                network(model).end()
            if not torch.allclose(logits(model), expected, atol=1e-10):
                wrong.append(f"thread {number}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_compiled_or_captured_reads_the_network_each_time() -> None:
    model = built("fixed", 1, targets=["q_proj", "k_proj"]).eval()
    run = torch.compile(model, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            got = run(**BATCH).logits
        with each_by_itself():
            assert_close(got, logits(model), 1e-10)
        by_an_optimizer_in_evaluation(model)
    torch.compiler.reset()
    logits(model)
    with mock.patch("moa.kernels.kept.is_captured", lambda tensor: True), counted() as runs:
        logits(model)
        logits(model)
    assert runs == [1] * 2 * len(model.mixtures())


def test_transforms_see_the_values_that_they_are_given() -> None:
    model = built().eval()
    logits(model)
    others = {name: p.detach() * 1.1 for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        got = torch.func.functional_call(model, others, kwargs=BATCH).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in others:
                parameter.copy_(others[name])
    with each_by_itself():
        assert_close(got, logits(model), 1e-10)
