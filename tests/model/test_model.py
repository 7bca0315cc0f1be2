"""`MoAModel`: losses, padding, accumulation, precision, compilation, looking inside.

Run: pytest tests/model/test_model.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForQuestionAnswering

import moa
from moa.errors import ContextError, NumericsError
from moa.model.inputs import prompt_attention, prompt_mask
from moa.recipes import RECIPES
from tests import laws, models
from tests.laws import assert_close


def build(name: str = "topk", base: nn.Module | None = None, **options) -> moa.MoAModel:
    """Return a small decoder with random experts, in fp64 and training."""
    model = moa.build(base or models.llama(), laws.small_recipe(name, "default", **options))
    return models.randomise(model).double().train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert got.keys() == expected.keys() and got
    for name, grad in expected.items():
        assert_close(got[name], grad, tolerance, name)


# ------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_the_sum_of_its_parts():
    model, batch = build(balance=0.3, z_loss=0.2), models.lm_batch()
    with model.tracing():
        task = model.base(**batch).loss
    loss = model(**batch).loss
    parts = model.last_losses
    assert set(parts) == {"task", "balance", "z"} and not any(v.requires_grad for v in parts.values())
    assert_close(parts["task"], task)
    assert_close(loss, sum(parts.values()), 1e-6)
    model.eval()
    assert_close(model(**batch).loss, task)


@pytest.mark.parametrize("name", ["topk", "sigmoid", "noisy_topk"])
def test_auxiliary_losses_are_means_over_layers(name):
    """A coefficient means the same in a deep and in a shallow model."""
    values = []
    for targets in (r".*layers\.0\.self_attn\.q_proj", r".*layers\.0\.self_attn\.[qkv]_proj"):
        model = build(name, targets=targets)
        with torch.no_grad():
            for _, branch in model.branches():
                branch.router.weight.zero_()
        model(**models.lm_batch())
        values.append({k: v for k, v in model.last_losses.items() if k in ("balance", "z")})
    for key in values[0]:
        assert_close(values[0][key], values[1][key], 1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["topk", "dense", "sigmoid"])
def test_padding_changes_no_loss_and_no_gradient(name, side):
    model = build(name, **({"z_loss": 0.1} if name != "sigmoid" else {}))
    batch = models.lm_batch()
    pad = (0, 5) if side == "right" else (5, 0)
    values = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    wide = {key: F.pad(batch[key], pad, value=value) for key, value in values.items()}
    if side == "left":  # the rows themselves are shifted, so positions must be given
        position = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
        wide["position_ids"] = position
        batch["attention_mask"] = batch["attention_mask"].clone()
        wide["labels"][:, 5] = -100
    results = []
    for inputs in (batch, wide):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        results.append((loss.detach(), gradients(model), dict(model.last_losses)))
    assert_close(results[1][0], results[0][0], 1e-6)
    assert_same_gradients(results[1][1], results[0][1], 1e-5)
    for key, value in results[0][2].items():
        assert_close(results[1][2][key], value, 1e-6, key)


def test_padding_rows_of_an_encoder_decoder_do_not_count():
    model = build("topk", models.t5())
    batch = models.seq2seq_batch()
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 4), value=9),
        "attention_mask": F.pad(batch["attention_mask"], (0, 4)),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
    }
    model(**batch)
    before = dict(model.last_losses)
    model(**wide)
    for key, value in before.items():
        assert_close(model.last_losses[key], value, 1e-6, key)


@pytest.mark.parametrize("how", ["by name", "by position"])
def test_inputs_by_position_are_seen(how):
    model, batch = build(balance=0.3), models.lm_batch()
    model(**batch)
    expected = dict(model.last_losses)
    if how == "by name":
        loss = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    else:
        plain = build("topk", models.plain(), balance=0.3)
        x, labels = models.plain_batch()["x"].double(), models.plain_batch()["labels"]
        by_name = plain(x=x, labels=labels)[0]
        assert set(plain.last_losses) == {"task", "balance", "z"}
        assert_close(plain(x, labels)[0], by_name)
        return
    assert_close(loss, sum(expected.values()), 1e-6)
    for key, value in expected.items():
        assert_close(model.last_losses[key], value, what=key)


def test_a_loss_without_labels_gets_the_routers_losses_too():
    torch.manual_seed(1)
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    for name in ("topk", "remix"):
        model = moa.build(BertForQuestionAnswering(config), name, n_experts=4, targets="all-linear").train()
        assert model.modules_to_save == ["qa_outputs"]
        batch = {
            **models.token_batch(),
            "start_positions": torch.tensor([1, 0, 2, 1]),
            "end_positions": torch.ones(4).long(),
        }
        model(**batch).loss.backward()
        assert set(model.last_losses) == {"task"} | ({"policy"} if name == "remix" else {"balance", "z"})


def test_a_base_that_returns_its_loss_alone():
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, labels=None):
            y = self.layer(x)
            return y if labels is None else (y - labels).square().mean()

    model = moa.build(Alone(), "topk").train()
    assert model(torch.randn(3, 4), labels=torch.randn(3, 4)).shape == ()
    assert set(model.last_losses) == {"task", "balance", "z"}
    assert model(torch.randn(3, 4)).shape == (3, 4)


def test_routed_loss_equals_the_models_own():
    model, batch = build(balance=0.3), models.lm_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = model.routed_loss(lambda: model(**batch).loss)
    loss.backward()
    assert set(model.last_losses) == {"task", "balance", "z"}
    assert_same_gradients(gradients(model), expected)
    model.eval()
    assert_close(model.routed_loss(lambda: model(**batch).loss), model(**batch).loss)


# ------------------------------------------------------------------------------------------------ shares of a batch


def equal_rows(rows: int = 8) -> dict[str, Tensor]:
    """Return a batch without padding, every row with as many labels as tokens but the first."""
    ids = torch.randint(2, models.VOCAB, (rows, 6), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    """1 × 8 rows as 2 × 4 and as 4 × 2: task and z-loss exactly, with num_items_in_batch as Trainer passes it."""
    model, batch = build(balance=0.0, z_loss=0.5), equal_rows()
    n_items = (batch["labels"][:, 1:] != -100).sum()
    results = []
    for parts in (1, 2, 4):
        model.zero_grad()
        total = 0.0
        for part in range(parts):
            rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
            loss = model(**{k: v[rows] for k, v in batch.items()}, num_items_in_batch=n_items).loss
            loss.backward()
            total += loss.item()
        results.append((total, gradients(model)))
    for total, grads in results[1:]:
        assert abs(total - results[0][0]) < 1e-6
        assert_same_gradients(grads, results[0][1], 1e-6)


def test_accumulation_weighs_micro_batches_by_their_labels():
    model, batch = build("dense", z_loss=0.0), models.lm_batch(rows=4)
    batch["labels"][0] = -100
    batch["labels"][0, 7] = batch["input_ids"][0, 7]
    n_items = (batch["labels"][:, 1:] != -100).sum()
    model(**batch, num_items_in_batch=n_items).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(**{k: v[rows] for k, v in batch.items()}, num_items_in_batch=n_items).loss.backward()
    assert_same_gradients(gradients(model), whole, 1e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_auxiliary_losses_do_not_change_with_the_number_of_processes(world_size):
    """Trainer counts the items of all processes, multiplies each loss by their number, and DDP takes the mean."""
    model, batch = build(balance=0.4, z_loss=0.5), equal_rows()
    n_items = (batch["labels"][:, 1:] != -100).sum()
    alone = model(**batch, num_items_in_batch=n_items).loss
    parts = dict(model.last_losses)
    # the same rows on every process, so that the auxiliary losses are the same on all of them
    each = model(**batch, num_items_in_batch=n_items * world_size).loss * world_size
    assert_close(sum(each for _ in range(world_size)) / world_size, alone, 1e-6)
    assert all(torch.equal(model.last_losses[key], value) for key, value in parts.items())


def test_labels_of_encoders_and_seq2seq_are_not_shifted_in_the_count():
    for kind in ("bert", "t5", "vit"):
        make, make_batch = models.MODELS[kind]
        model = build("topk", make())
        batch = {k: v.double() if v.is_floating_point() else v for k, v in make_batch().items()}
        n_items = (batch["labels"] != -100).sum()
        loss = model(**batch, num_items_in_batch=n_items).loss
        assert_close(loss, sum(model.last_losses.values()), 1e-6)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_label_mask_that_leaves_no_token():
    for name in ("topk", "remix"):
        model, batch = build(name), models.lm_batch()
        batch["labels"][:] = -100
        with pytest.raises(ContextError, match=r"all of \(4, 8\) are -100"):
            model(**batch)
        batch["labels"][:, 0] = 3
        with pytest.raises(ContextError, match="never predicted"):
            model(**batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [n for n in RECIPES if n != "fixed" and not laws.needs_tasks(n)])
def test_a_router_that_is_not_finite_is_named(name, value):
    model = moa.build(models.llama(), laws.small_recipe(name, "default")).train()
    broken = list(model.branches())[3]
    trained = [p for p in broken[1].router.learned() if p.requires_grad]
    if not trained:  # a frozen router cannot be trained into this state
        return
    with torch.no_grad():
        trained[0].fill_(value)
    # layers that share a classifier break with it: the first of them is named
    first = next(n for n, b in model.branches() if any(p is trained[0] for p in b.router.learned()))
    with pytest.raises(NumericsError, match=f"in training step 1 .*the router of {first},"):
        model(**models.lm_batch())
    batch = {name: value for name, value in models.lm_batch().items() if name != "labels"}
    calls = [model.eval(), model.base, model.base.model]
    if all(branch.router.causal for _, branch in model.branches()):
        calls.append(lambda **prompt: model.generate(**prompt, max_new_tokens=2))
    for call in calls:
        with torch.no_grad(), pytest.raises(NumericsError, match=f"router of {first}: .* holds NaN or infinity"):
            call(**batch)
    with torch.no_grad(), model.disable_adapter():
        model(**batch)  # no router is asked
    with torch.no_grad():
        trained[0].fill_(0.1)
        model(**batch)


def test_diverged_experts_are_named_with_the_step():
    model = build("topk")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(2):
        model(**models.lm_batch()).loss.backward()
        optimizer.step()
    name, branch = list(model.branches())[1]
    with torch.no_grad():
        branch.bank.up.fill_(float("nan"))
    with pytest.raises(NumericsError, match=rf"in training step 3 .*the experts of {name}, bank.up, holds NaN"):
        model(**models.lm_batch())


# ------------------------------------------------------------------------------------------------ precision, compiling


@pytest.mark.parametrize("name", ["topk", "remix", "sigmoid"])
def test_bf16_autocast_and_a_bf16_base(name):
    """Router logits stay fp32, masters stay fp32, gradients are finite, and the loss is near the fp32 one."""
    batch = models.lm_batch()
    for dtype in (torch.float32, torch.bfloat16):
        model = models.randomise(moa.build(models.llama().to(dtype), laws.small_recipe(name, "default"))).train()
        seen = []
        model.observers.append(seen.extend)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert all(r.routing.logits.dtype == torch.float32 for trace in seen for r in trace)
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32 == parameter.grad.dtype
                assert bool(parameter.grad.isfinite().all()), parameter_name
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = model(**batch).loss.item()
        with torch.no_grad():
            full = model.float()(**batch).loss.item()
        assert abs(half - full) < 0.03 * full


# torch's own compiler does what these warn about
compiling = [
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]


def compiled_results(
    kind: str, name: str, change: Callable[[moa.MoAModel], nn.Module], tolerance: float = 1e-5
) -> None:
    """Fail unless a model trains the same after a change that compiles it, the routers' losses included."""
    torch._dynamo.reset()
    base = models.llama(num_hidden_layers=1) if kind == "llama" else models.plain()
    targets = "ffn" if kind == "llama" else "all-linear"
    model = models.randomise(moa.build(base, name, n_experts=4, targets=targets)).train()
    batch = models.MODELS[kind][1]()
    loss = model(**batch)[0]
    loss.backward()
    expected, parts = gradients(model), dict(model.last_losses)
    model.zero_grad()
    again = change(model)(**batch)[0]
    again.backward()
    assert_close(again, loss, tolerance)
    assert_same_gradients({k.replace("_orig_mod.", ""): v for k, v in gradients(model).items()}, expected, tolerance)
    assert parts.keys() == model.last_losses.keys()
    for key, value in parts.items():
        assert_close(model.last_losses[key], value, tolerance, key)


class TestCompiled:
    """The trace is a plain slot that the mixture reads: hooks added after compilation would be ignored."""

    pytestmark = compiling

    def test_a_whole_model(self) -> None:
        compiled_results("plain", "topk", lambda model: torch.compile(model, backend="aot_eager"))

    def test_a_block_in_one_graph_still_records_its_routing(self) -> None:
        def change(model: moa.MoAModel) -> nn.Module:
            for layer in model.base.model.layers:
                layer.mlp = torch.compile(layer.mlp, backend="aot_eager", fullgraph=True)
            return model

        compiled_results("llama", "topk", change)

    def test_a_block_by_inductor(self) -> None:
        def change(model: moa.MoAModel) -> nn.Module:
            (layer,) = model.base.model.layers
            layer.mlp = torch.compile(layer.mlp, fullgraph=True)
            return model

        compiled_results("llama", "dense", change)


# ------------------------------------------------------------------------------------------------ looking inside


def test_a_trace_under_checkpointing_is_recorded_once():
    model, batch = build(), models.lm_batch()
    seen = []
    model.observers.append(seen.extend)
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    (trace,) = seen
    assert [record.name for record in trace] == list(model.mixtures())
    assert model.context.trace is None


def test_tracing_and_scopes_end_where_they_end():
    model, batch = build().eval(), models.lm_batch()
    plain = models.outputs_of(model, batch)
    with model.tracing() as trace:
        model(**batch)
    assert len(trace) == 14 and model.context.trace is None
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert model.context.enabled
    with model.pin_expert(1):
        assert not torch.equal(models.outputs_of(model, batch), plain)
    assert torch.equal(models.outputs_of(model, batch), plain)


def test_task_ids_are_seen_inside_and_forgotten_afterwards():
    model, batch, seen = build(), models.lm_batch(), []
    ids = torch.tensor([0, 1, 2, 0])
    model.observers.append(lambda _: seen.append(model.context.task_ids))
    model.lm_head.register_forward_hook(lambda *_: seen.append(model.context.task_ids))
    model(**batch, task_ids=ids)
    assert len(seen) == 2 and all(value is ids for value in seen)
    assert model.context.task_ids is None


def test_two_models_share_nothing():
    one, two = build(), build()
    batch = models.lm_batch()
    one(**batch).loss.backward()
    two(**batch)
    assert one.context is not two.context
    assert all(p.grad is None for p in two.parameters())


def test_attributes_of_the_base_are_reachable():
    model = build()
    assert model.lm_head is model.base.lm_head
    assert model.config is model.base.config and model.get_base_model() is model.base
    assert model.get_input_embeddings() is model.base.model.embed_tokens
    assert model.get_output_embeddings() is model.base.lm_head
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_prompt_mask():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 4, -100, 5], [1, 2, 3, 4], [-100] * 4])
    assert prompt_mask(labels, None).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    attention = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    got = prompt_mask(labels, attention).int().tolist()
    assert got == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]


def test_prompt_attention_is_what_generate_infers():
    class Settings:
        pad_token_id, eos_token_id = 0, 2

    ids = torch.tensor([[0, 0, 5], [4, 5, 6]])
    assert prompt_attention(ids, Settings()).tolist() == [[0, 0, 1], [1, 1, 1]]
    Settings.eos_token_id = 0
    assert prompt_attention(ids, Settings()).tolist() == [[1, 1, 1], [1, 1, 1]]


# ------------------------------------------------------------------------------------------------ selection bias


def bias(model: moa.MoAModel) -> Tensor:
    return torch.stack([branch.router.selection_bias for _, branch in model.branches()]).clone()


def test_the_selection_bias_moves_once_per_optimizer_step():
    model, batch = (
        models.randomise(moa.build(models.llama(), "sigmoid", n_experts=4, bias_rate=0.01)).train(),
        models.lm_batch(),
    )
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    start = bias(model)
    for _ in range(3):  # micro-batches, each with a recompute
        model(**batch).loss.backward()
        assert torch.equal(bias(model), start)
    counts = torch.stack([b.router.counts for _, b in model.branches()])
    assert torch.equal(counts.sum(1), torch.full((14,), 3.0 * 2 * batch["attention_mask"].sum()))  # no padding, k = 2
    model.eval()
    model(**batch)
    torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).step()  # somebody else's optimizer
    assert torch.equal(bias(model), start)
    assert torch.equal(torch.stack([b.router.counts for _, b in model.branches()]), counts)
    optimizer.step()
    moved = bias(model) - start
    assert_close(moved, 0.01 * torch.sign(counts.mean(1, keepdim=True) - counts), 1e-5)
    optimizer.step()  # nothing was counted since
    assert torch.equal(bias(model), start + moved)


def test_a_copy_takes_its_own_steps():
    import copy

    model = moa.build(models.llama(), "sigmoid", n_experts=4, bias_rate=0.01).train()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.0)
    model(**models.lm_batch())
    twin(**models.lm_batch()).loss.backward()
    optimizer.step()
    assert bool(bias(twin).any()) and not bool(bias(model).any())
