"""MoSA: masks partition, the mean of the copies is the adapter, and what a copy does not own keeps its bits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import moa
from moa.errors import ConfigError, ContextError
from moa.runs.config import parse
from moa.runs.train import train
from moa.training.mosa import MoSA
from moa.training.mosa_callback import MoSACallback
from tests import models
from tests.laws import assert_close
from tests.tiny_run import config_values, encoder_folder

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
ROWS = [{"input_ids": torch.arange(2, 8) + n % 3, "labels": torch.tensor(n % 3)} for n in range(8)]


def built(base: Any = None, **options: Any) -> moa.MoAModel:
    made = {"n_experts": 3, "k": 2, "rank": 4, "targets": r".*\.(query|value|q_proj|v_proj)", **options}
    base = models.bert().double() if base is None else base
    return models.randomise(moa.build(base, "topk", **made), scale=0.3).train()


def copies(mosa: MoSA, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the n copies of down and of up, (E, r, d) each."""
    n_experts = mosa.banks[name].n_experts
    each = [torch.full((n_experts,), i) for i in range(mosa.n)]
    return [mosa.copy_of(name, i, i)[0] for i in each], [mosa.copy_of(name, i, i)[1] for i in each]


@torch.no_grad()
def split(model: moa.MoAModel, **options: Any) -> MoSA:
    """Return MoSA on a model whose copies have moved."""
    mosa = MoSA(model, **options)
    for bank in mosa.banks.values():
        bank.up.mul_(3.0)
        bank.down.mul_(0.5)
    return mosa


def trained(model: moa.MoAModel, steps: int = 6, **options: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, **options)
    for _ in range(steps):
        model(**models.class_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("by", ["entries", "rows", "columns"])
@pytest.mark.parametrize("merge", ["average", "joint"])
def test_copies_move_apart_and_are_the_adapter_together(by: Any, merge: Any) -> None:
    """Under weight decay: what a copy does not own has its first bits, what it owns moves, and each entry has one."""
    model = built()
    starts = {name: [p.detach().clone() for p in branch.bank.factors()] for name, branch in model.branches()}
    mosa = MoSA(model, n=4, by=by, merge=merge)
    for name in mosa.banks:  # they start identical
        for found, start in zip(copies(mosa, name), starts[name], strict=True):
            assert all(torch.equal(one, start) for one in found)
    trained(model, weight_decay=0.5)
    for name, bank in mosa.banks.items():
        for found, start, merged in zip(copies(mosa, name), starts[name], (bank.down, bank.up), strict=True):
            moved = torch.stack([one != start for one in found])  # (n, E, r, d)
            assert moved.sum(0).max() == 1 and moved.any(0).double().mean() > 0.8
            assert all(part.any() for part in moved.flatten(2).unbind(1))
            stack = torch.stack(list(found))
            if merge == "average":
                assert_close(stack.mean(0), merged, 1e-12)
            else:
                assert torch.equal(torch.where(moved, stack, 0).sum(0)[moved.any(0)], merged[moved.any(0)])
            axis = {"rows": 0, "columns": 1}.get(by)
            if axis is not None:  # each row or column is dealt out as evenly as can be
                matrices = moved if start is starts[name][0] else moved.mT  # (o, r) of up
                counts = matrices.sum(3 - axis)  # (n, E, a)
                size = matrices.shape[3 - axis] / mosa.n
                assert counts.max() <= -(-size // 1)
    outside = model.eval()(**models.class_batch()).logits
    mosa.close()
    assert torch.equal(model(**models.class_batch()).logits, outside)
    with torch.no_grad():
        other = built()
        other.load_state_dict(model.state_dict())
    assert_close(other.eval()(**models.class_batch()).logits, outside, 1e-12)


def test_the_mean_over_draws_is_the_output_in_evaluation() -> None:
    """All n² draws of one layer's expert are tried; its up is linear, and so is down."""
    model = moa.build(models.plain().double(), "topk", n_experts=1, k=1, rank=4, targets=["up"])
    models.randomise(model).train()
    mosa, x = MoSA(model, n=3, consistency=0.0), torch.randn(5, models.WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (mosa.banks["up"].down, mosa.banks["up"].up):
            parameter.add_(torch.randn_like(parameter))
    layer, outputs = model.mixtures()["up"], []
    for down, up in itertools.product(range(3), repeat=2):
        mosa.drawn = lambda name, pair=(down, up): torch.tensor(pair).view(2, 1)  # type: ignore[method-assign,misc]
        outputs.append(layer(x))
    assert not torch.allclose(outputs[0], outputs[1])
    assert_close(torch.stack(outputs).mean(0), layer.eval()(x), 1e-12)


def test_draws_are_uniform_and_apart_for_layers_factors_experts_and_steps() -> None:
    model = built()
    mosa = MoSA(model, n=2)
    seen: list[tuple[int, ...]] = []
    for step in range(400):
        model.steps_done = step
        seen.append(tuple(int(c) for name in mosa.banks for c in mosa.drawn(name).flatten()))
        assert all(torch.equal(mosa.drawn(name), mosa.drawn(name)) for name in mosa.banks)
    draws = torch.tensor(seen, dtype=torch.float64)  # (400, layers · 2 · E)
    assert (draws.mean(0) - 0.5).abs().max() < 0.1  # four standard errors
    apart = torch.corrcoef(draws.T) - torch.eye(draws.shape[1])
    assert apart.abs().max() < 0.25
    again = MoSA(built(), n=2)
    again.model.steps_done = 399
    assert tuple(int(c) for name in again.banks for c in again.drawn(name).flatten()) == seen[-1]


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")  # it breaks there
def test_compiled_it_trains_as_it_does_otherwise() -> None:
    """Draws are made outside of the graphs, between which both forwards, their masks and steps are kept."""
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = built(targets=["layer.1.attention.self.query"], jitter=0.0)
        mosa = MoSA(model, n=3)
        if compiled:
            model.compile(backend="eager")
        trained(model, steps=2)
        mosa.close()
        ends.append({"loss": model.last_losses["task"], **model.adapter_state_dict()})
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, 1e-10, name)


def test_a_shared_down_is_not_split() -> None:
    model = built()
    mosa = MoSA(model, n=4, shared_down=True)
    trained(model)
    for name, bank in mosa.banks.items():
        downs, ups = copies(mosa, name)
        assert all(torch.equal(one, bank.down) for one in downs)
        assert not torch.equal(ups[0], ups[1])


def test_the_loss_holds_the_divergence_of_two_forwards() -> None:
    model, batch = built(), models.class_batch()
    mosa = split(model, n=4, consistency=0.7)
    losses, logits = [], []
    for forward in range(2):  # by hand, from the draws of both
        drawn = {name: mosa.drawn(name) if not forward else _drawn_of(mosa, name, 1) for name in mosa.banks}
        other = built()
        other.load_state_dict(model.state_dict())
        for name, branch in other.branches():
            down, up = mosa.copy_of(name, *drawn[name])
            with torch.no_grad():
                branch.bank.down.copy_(down)
                branch.bank.up.copy_(up)
        out = other(**batch)
        losses.append(out.loss)
        logits.append(out.logits.log_softmax(-1))
    p, q = logits
    both = F.kl_div(q, p, log_target=True, reduction="batchmean") + F.kl_div(
        p, q, log_target=True, reduction="batchmean"
    )
    assert both > 1e-4
    loss = model(**batch).loss
    assert_close(loss, sum(losses) / 2 + 0.7 * both / 2, 1e-10)
    assert_close(model.last_losses["consistency"], 0.7 * both / 2, 1e-10)
    loss.backward()
    assert all(bank.up.grad.any() for bank in mosa.banks.values())


def _drawn_of(mosa: MoSA, name: str, forward: int) -> Tensor:
    for number, selected in enumerate(mosa.model.selections.of(2)):
        with selected:
            if number == forward:
                return mosa.drawn(name)
    raise AssertionError


def test_one_copy_agrees_with_itself_and_is_plain_training() -> None:
    model, plain, batch = built(dropout=0.3), built(dropout=0.3), models.class_batch()
    split(model, n=1)
    split(plain, n=1).close()
    torch.manual_seed(0)
    loss = model(**batch).loss
    assert model.last_losses["consistency"] == 0
    torch.manual_seed(0)
    assert torch.equal(loss, plain(**batch).loss)
    loss.backward()
    plain(**batch).loss.backward()


def test_masked_positions_and_outputs_that_a_head_lacks_do_not_count() -> None:
    model, batch = built(models.llama().double()), models.lm_batch()
    split(model, n=2)
    model(**batch)
    apart = model.last_losses["consistency"]
    padded = {"input_ids": F.pad(batch["input_ids"], (0, 3)), "labels": F.pad(batch["labels"], (0, 3), value=-100)}
    padded["attention_mask"] = F.pad(batch["attention_mask"], (0, 3))
    model(**padded)
    assert apart > 0
    assert_close(model.last_losses["consistency"], apart, 1e-10)
    from moa.objective.agreement import disagreement

    one, other = torch.randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    less = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    found = disagreement([torch.cat([one, less], 1), torch.cat([other, less], 1)], model.context)
    assert_close(found, disagreement([one, other], model.context), 1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, [one, other]))


def test_recomputed_blocks_have_the_copies_of_their_forward() -> None:
    grads = []
    for checkpointing in (False, True):
        model = built(models.llama().double())
        split(model, n=4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**models.lm_batch()).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if ".bank." in n and p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 4
    assert all(any(g.any() for g in one.values()) for one in grads)
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, 1e-10)


def fitted(folder: Path, resume: str | None = None, seed: int = 0, steps: int = 4) -> moa.MoAModel:
    base = models.bert()
    torch.manual_seed(seed)
    model = moa.build(base, "topk", n_experts=3, k=2, rank=4, targets=["query", "value"])
    args = TrainingArguments(
        str(folder), max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01,
        save_steps=2, lr_scheduler_type="constant", weight_decay=0.5, per_device_train_batch_size=4,
    )  # fmt: skip
    Trainer(model, args, train_dataset=ROWS, callbacks=[MoSACallback(n=4)]).train(resume_from_checkpoint=resume)
    return model


def test_with_trainer_a_checkpoint_is_one_adapter_and_a_run_goes_on(tmp_path: Path) -> None:
    model = fitted(tmp_path / "a")
    assert "factors" not in vars(next(iter(model.branches()))[1].bank) and model.samples == 1
    own = model.adapter_state_dict()
    plain = moa.build(models.bert(), "topk", n_experts=3, k=2, rank=4, targets=["query", "value"])
    assert {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in plain.adapter_state_dict().items()}
    middle = str(tmp_path / "a" / "checkpoint-2")
    assert moa.load(middle, base=models.bert()).recipes == plain.recipes
    further = fitted(tmp_path / "b", middle)
    assert all(torch.equal(value, own[name]) for name, value in further.adapter_state_dict().items())
    with pytest.raises(ConfigError, match="build the model as at first, with the same seed"):
        fitted(tmp_path / "c", middle, seed=1)


def test_a_run_by_the_key_goes_on_where_it_stopped(tmp_path: Path) -> None:
    made = config_values(tmp_path, encoder_folder(tmp_path / "base"))
    made["training"] |= {"max_steps": 2, "num_train_epochs": 1, "save_steps": 2, "lr_scheduler_type": "constant"}
    made["recipe"] |= {"rank": 4, "targets": ["query"]}
    made |= {"strategy": {"name": "mosa", "n": 2, "shared_down": True}, "score_before": False}
    train(parse(made))
    again = {**made, "training": {**made["training"], "max_steps": 4}}
    further = train(parse(again), resume=True).results
    straight = train(parse({**again, "output": str(tmp_path / "straight")})).results
    assert further["scores"] == straight["scores"]


@pytest.mark.parametrize(
    ("options", "recipe", "says"),
    [
        ({"n": 0}, {}, "n must be from 1 to 255 copies, got 0"),
        ({"by": "row"}, {}, "Did you mean 'rows'"),
        ({"merge": "mean"}, {}, "unknown merge 'mean'"),
        ({"consistency": -1.0}, {}, "consistency must be a number, at least 0"),
        ({"n": 5, "by": "columns"}, {}, r"query down: by='columns' deals 4 entries out to n=5 copies"),
        ({"n": 5, "by": "rows"}, {}, r"query up: by='rows' deals 4 entries out to n=5 copies"),
        ({}, {"expert": "vera"}, "VeRABank experts hold no two factors .* MoSA splits such pairs"),
        ({}, {"train_experts": False}, "that are trained"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MoSA(built(**recipe), **options)


def test_outputs_that_cannot_agree_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives numbers.*consistency=0"):
        MoSA(built(models.bert(num_labels=1).double()))
    model = built()
    MoSA(model)
    outputs = model(**{k: v for k, v in models.class_batch().items() if k != "labels"})
    with pytest.raises(ContextError, match="or a consistency loss"):
        outputs.logits.sum().backward()
