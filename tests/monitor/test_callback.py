"""RoutingMonitor in a bare loop and under the stock Trainer. Run: pytest tests/monitor/test_callback.py"""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import moa
from moa.errors import ConfigError
from moa.monitor.callback import RoutingMonitor
from moa.monitor.statistics import RoutingCollapseWarning, RoutingStatistics
from moa.routers import LinearRouter

# layers of a random model do collapse: where that is what is tested, pytest.warns sees it all the same
pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")

N_LAYERS = 13  # linears of the small BERT's body: 2 blocks of 6, and the pooler


def bert(**options: Any) -> moa.MoAModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    options = {"router": "topk", "n_experts": 4, "rank": 2, "targets": "all-linear", **options}
    if options["router"] == "topk":
        options.setdefault("k", 2)
    return moa.build(BertForSequenceClassification(config), **options).train()


def llama(**options: Any) -> moa.MoAModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    return moa.build(LlamaForCausalLM(config), **{"n_experts": 4, "k": 2, "rank": 2, **options}).train()


def batch(size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (size, 1), generator=gen)
    return {
        "input_ids": torch.randint(50, (size, 8), generator=gen),
        "attention_mask": (torch.arange(8) < lengths).long(),
        "labels": torch.arange(size) % 3,
        "task_ids": torch.arange(size) % 2,
    }


def real_tokens(*batches: dict[str, Tensor]) -> float:
    return float(sum(b["attention_mask"].sum() for b in batches))


def events(folder: Path) -> EventAccumulator:
    out = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    out.Reload()
    return out


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


def collapse(model: moa.MoAModel, name: str) -> LinearRouter:
    """Make one router of a model send every row to experts 0 and 1, whatever the row."""
    router = dict(model.branches())[name].router
    assert isinstance(router, LinearRouter)

    def fixed(x: Tensor, context: Any) -> moa.Routing:
        logits = (x.detach().sum(-1, keepdim=True) * 0) @ router.weight.sum(1)[None] + torch.tensor([9.0, 9, 0, 0])
        scores = logits.softmax(-1)
        return moa.Routing(scores[..., :2], scores.topk(2, -1).indices, 4, logits, scores)

    router.forward = fixed  # type: ignore[method-assign]
    return router


# ---------------------------------------------------------------- bare loop


def test_event_files_hold_what_was_measured(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path, every=1, tasks=["reviews", "news"], detailed=True)
    monitor.attach(model)
    data = batch()
    reference = RoutingStatistics()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in (1, 2):
        with model.tracing() as trace, torch.no_grad():
            model(**{k: v for k, v in data.items() if k != "labels"})
        reference.reset()
        reference.add(trace)
        model(**data).loss.backward()
        losses.append({name: float(value) for name, value in model.last_losses.items()})
        grads = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if ".router." in n])
        optimizer.step()
        monitor.step(step)
        optimizer.zero_grad()
    last = dict(monitor.last)
    monitor.close()

    found = events(tmp_path)
    assert len(last) == N_LAYERS
    for name, layer in reference.summary().items():
        torch.testing.assert_close(last[name].load, layer.load, rtol=0, atol=0)
        for what, value in layer.measures().items():
            if what != "max_violation":
                logged = found.Scalars(f"moa_layers/{what}/{name}")
                assert [e.step for e in logged] == [1, 2]
                assert logged[1].value == pytest.approx(value, rel=1e-6, abs=1e-6)
        for expert, share in enumerate(layer.load.tolist()):
            assert found.Scalars(f"moa_load/{name}/expert_{expert}")[1].value == pytest.approx(share, rel=1e-6)
    fractions = [layer.measures()["effective_fraction"] for layer in last.values()]
    assert found.Scalars("moa/mean/effective_fraction")[1].value == pytest.approx(sum(fractions) / len(fractions))
    assert found.Scalars("moa/worst/effective_fraction")[1].value == pytest.approx(min(fractions))
    assert found.Scalars("moa/router_grad_norm")[1].value == pytest.approx(float(grads.norm()), rel=1e-5)
    assert set(losses[0]) == {"task", "balance", "z"}
    for name in losses[0]:
        got = [e.value for e in found.Scalars(f"moa/objective/{name}")]
        assert got == pytest.approx([row[name] for row in losses], rel=1e-6)

    for tag in ("moa_load/all", "moa_load/by_task"):
        images = found.Images(tag)
        assert [image.step for image in images] == [1, 2]
        picture = Image.open(io.BytesIO(images[1].encoded_image_string)).convert("RGB")
        assert picture.size == (images[1].width, images[1].height)
        assert len(picture.getcolors(1 << 24) or []) > 20
    assert "custom_scalars__config__" in found.Tags()["tensors"]
    layout = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"moa_layers/effective_experts/.*" in layout and b"moa_load/bert.pooler.dense/expert_.*" in layout

    second = lines(tmp_path)[1]
    assert second["step"] == 2
    assert second["layers"]["bert.pooler.dense"]["load"] == last["bert.pooler.dense"].load.tolist()
    assert set(second["by_task"]) == {"reviews", "news"}
    assert second["losses"]["task"] == pytest.approx(losses[1]["task"])


def test_gradient_accumulation_counts_every_micro_batch(tmp_path: Path) -> None:
    model, parts = bert(), [batch(4, 0), batch(3, 1), batch(4, 2)]
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)
    for part in parts:
        model(**part).loss.backward()
    monitor.step(1)
    monitor.close()
    name = "bert.encoder.layer.0.attention.self.query"
    assert monitor.last[name].rows == real_tokens(*parts)
    assert len(lines(tmp_path)) == 1


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path)
    monitor.attach(model)
    with torch.no_grad():
        model(**batch())
    model.eval()
    model(**batch())
    assert monitor.log(1) == {}
    monitor.close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted_twice(tmp_path: Path, reentrant: bool) -> None:
    loads = []
    for checkpointing in (False, True):
        model = bert(balance=0.0, z_loss=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        monitor = RoutingMonitor(tmp_path / str(checkpointing), every=1, images=False)
        monitor.attach(model)
        model(**batch()).loss.backward()
        monitor.step(1)
        monitor.close()
        loads.append(monitor.last)
    for name, layer in loads[0].items():
        assert loads[1][name].rows == layer.rows
        torch.testing.assert_close(loads[1][name].load, layer.load, rtol=0, atol=0)


def test_every_selection_of_remix_is_counted(tmp_path: Path) -> None:
    model = bert(router="remix", samples=3, targets="ffn")
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)
    model(**batch()).loss.backward()
    monitor.step(1)
    monitor.close()
    assert {layer.rows for layer in monitor.last.values()} == {3 * real_tokens(batch())}
    assert "policy" in lines(tmp_path)[0]["losses"]


def test_per_task_use(tmp_path: Path) -> None:
    model, data = bert(), batch(6)
    monitor = RoutingMonitor(tmp_path, every=1, tasks=["reviews", "news"], images=False)
    monitor.attach(model)
    with model.tracing() as trace, torch.no_grad():
        model(**{k: v for k, v in data.items() if k != "labels"})
    model(**data).loss.backward()
    monitor.step(1)
    monitor.close()
    for record in trace:
        routing, mask = record.routing, record.mask
        for task, name in enumerate(("reviews", "news")):
            mine = data["task_ids"] == task
            use = routing.selected()[mine].double()
            if mask is not None:
                use = use * mask[mine].unsqueeze(-1)
            want = use.reshape(-1, 4).sum(0) / use.sum()
            got = lines(tmp_path)[0]["by_task"][name][record.name]
            torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-12, atol=0)


def test_tasks_are_found_without_being_named_and_strays_are_told_once(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path / "a", every=1, images=False)
    monitor.attach(model)
    model(**batch())
    monitor.step(1)
    monitor.close()
    assert set(lines(tmp_path / "a")[0]["by_task"]) == {"task 0", "task 1"}

    few = RoutingMonitor(tmp_path / "b", every=1, tasks=1, images=False)
    few.attach(model)
    model(**batch())
    with pytest.warns(UserWarning, match=r"belong to no task 0 … 0.*tasks=\[names\]"):
        few.step(1)
    model(**batch())
    few.step(2)
    few.close()
    assert [len(line["warnings"]) for line in lines(tmp_path / "b")] == [1, 0]


def test_no_tasks_no_task_images(tmp_path: Path) -> None:
    model, data = bert(), batch()
    del data["task_ids"]
    monitor = RoutingMonitor(tmp_path, every=1)
    monitor.attach(model)
    model(**data)
    monitor.step(1)
    monitor.close()
    assert events(tmp_path).Tags()["images"] == ["moa_load/all"]
    assert lines(tmp_path)[0]["by_task"] == {}
    assert lines(tmp_path)[0]["router_grad_norm"] is None


def test_images_can_be_left_out(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)
    model(**batch())
    monitor.step(1)
    monitor.close()
    assert events(tmp_path).Tags()["images"] == []


def test_close_logs_the_rest(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path, every=2, images=False)
    monitor.attach(model)
    for step in range(1, 4):
        model(**batch())
        monitor.step(step)
    monitor.close()
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 3]


def test_collapse_is_told_once_until_recovery(tmp_path: Path) -> None:
    model, data = bert(), batch(32)
    name = "bert.encoder.layer.1.intermediate.dense"
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)

    def step(number: int) -> list[str]:
        model(**data)
        monitor.step(number)
        return [word for word in lines(tmp_path)[-1]["warnings"] if name in word]

    assert step(1) == []
    router = collapse(model, name)
    with pytest.warns(RoutingCollapseWarning, match=rf"{name} has collapsed: experts 0, 1 took 100 %") as told:
        words = step(2)
    assert len(words) == 1 and "2 of 4 experts are dead" in words[0] and "balance= (now 0.01)" in words[0]
    assert [str(w.message) for w in told if name in str(w.message)] == words
    assert step(3) == []
    del router.forward
    assert step(4) == []
    collapse(model, name)
    with pytest.warns(RoutingCollapseWarning, match=name):
        assert len(step(5)) == 1
    monitor.close()
    assert [e.step for e in events(tmp_path).Tensors("moa/warnings/text_summary")][-2:] == [2, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "sigmoid"}, r"bias_rate= \(now 0.001\)"),
        ({"router": "topk", "balance": 0.0}, "router='topk' with balance=0.01"),
        ({"router": "noisy_topk"}, r"importance= \(now 0.01\)"),
    ],
)
def test_advice_names_what_the_router_has(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    model = bert(targets=["pooler.dense"], **options)
    collapse(model, "bert.pooler.dense")
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)
    with torch.no_grad():
        data = batch(64)
        del data["labels"]
    model(**data)
    with pytest.warns(RoutingCollapseWarning, match=words):
        monitor.step(1)
    monitor.close()


def test_a_balanced_or_fixed_routing_is_silent(tmp_path: Path) -> None:
    for place, options in enumerate(({"router": "fixed", "n_experts": 1}, {"n_experts": 2, "k": 2}, {"k": 4})):
        model = bert(**options)
        monitor = RoutingMonitor(tmp_path / str(place), every=1, images=False)
        monitor.attach(model)
        model(**batch(32))
        monitor.step(1)
        monitor.close()
        assert lines(tmp_path / str(place))[0]["warnings"] == []


def test_nothing_is_attached_when_off(tmp_path: Path) -> None:
    model = bert()
    RoutingMonitor(tmp_path)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    before = hooks()
    assert model.observers == []
    monitor = RoutingMonitor(tmp_path)
    monitor.attach(model)
    assert len(model.observers) == 1 and hooks() == before
    monitor.close()
    assert model.observers == [] and model.context.trace is None


def test_the_model_is_found_inside_a_wrapper(tmp_path: Path) -> None:
    model = bert()
    for place, wrapped in enumerate((nn.Sequential(model), torch.compile(model, backend="eager"))):
        monitor = RoutingMonitor(tmp_path / str(place))
        monitor.attach(wrapped)
        assert len(model.observers) == 1
        monitor.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, at any graph break
def test_a_compiled_plain_module_is_watched(tmp_path: Path) -> None:
    model = moa.build(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), n_experts=4, k=2, targets=["2"])
    model.train()
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    compiled = torch.compile(model, backend="eager")
    monitor.attach(compiled)
    for step in (1, 2):
        compiled(torch.randn(16, 6)).sum().backward()
        monitor.step(step)
        assert monitor.last["2"].rows == 16
    monitor.close()


def test_a_watched_model_can_be_copied_and_pickled(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path)
    monitor.attach(model)
    model(**batch())
    twin = copy.deepcopy(model)
    pickle.dumps(monitor._window.statistics if monitor._window else None)
    twin(**batch())
    assert monitor.log(1)["bert.encoder.layer.0.output.dense"].rows == real_tokens(batch())
    monitor.close()
    assert len(twin.observers) == 1 and model.observers == []


def test_bf16_autocast_counts_exactly(tmp_path: Path) -> None:
    model, data = bert(), batch(600)
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**data)
    monitor.step(1)
    monitor.close()
    assert monitor.last["bert.encoder.layer.0.output.dense"].rows == real_tokens(data)


def test_nonfinite_losses_are_null_in_the_log(tmp_path: Path) -> None:
    model = bert()
    monitor = RoutingMonitor(tmp_path, every=1, images=False)
    monitor.attach(model)
    model(**batch())
    model.last_losses = {"task": torch.tensor(float("nan"))}
    for observer in model.observers:
        observer([])
    monitor.step(1)
    monitor.close()
    assert lines(tmp_path)[0]["losses"]["task"] is None


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"dead_share": 0.0}, "must be in"),
        ({"collapse_below": 2.0}, "must be in"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": 0}, "at least one task"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RoutingMonitor("x", **options)


def test_wrong_use_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no MoAModel in Linear"):
        RoutingMonitor(tmp_path).attach(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="needs log_dir"):
        RoutingMonitor().attach(bert())
    with pytest.raises(ConfigError, match="step was called before attach"):
        RoutingMonitor(tmp_path).step(1)
    with pytest.raises(ConfigError, match="log was called before attach"):
        RoutingMonitor(tmp_path).log(1)
    monitor, model = RoutingMonitor(tmp_path), bert()
    monitor.attach(model)
    monitor.attach(model)
    assert len(model.observers) == 1
    with pytest.raises(ConfigError, match="attached to another model"):
        monitor.attach(bert())
    monitor.close()


# ---------------------------------------------------------------- Trainer


def rows(n: int, causal: bool) -> list[dict[str, Any]]:
    data = batch(n)
    labels = torch.where(data["attention_mask"].bool(), data["input_ids"], -100) if causal else data["labels"]
    return [
        {**{k: v[i] for k, v in data.items() if k != "labels"}, "labels": labels[i], "task_ids": int(i % 2)}
        for i in range(n)
    ]


def train(model: moa.MoAModel, folder: Path, monitor: RoutingMonitor, causal: bool, **options: Any) -> None:
    given = {"max_steps": 4, "logging_steps": 2, "save_steps": 2, "report_to": "none", **options}
    resume = given.pop("resume_from_checkpoint", None)
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **given)
    data = rows(32, causal)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=[monitor])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()


@pytest.mark.parametrize("make", [bert, llama])
def test_stock_trainer_end_to_end(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    model = make()
    monitor = RoutingMonitor(tasks=["reviews", "news"])
    train(
        model,
        tmp_path,
        monitor,
        make is llama,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to="tensorboard",
    )
    assert model.observers == []
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [2, 4]
    assert all(line["router_grad_norm"] > 0 and set(line["by_task"]) == {"reviews", "news"} for line in log)
    counted = max(layer["rows"] for line in log for layer in line["layers"].values())
    assert counted <= 16 * 8  # two steps of two batches of four, evaluation left out
    total = sum(max(layer["rows"] for layer in line["layers"].values()) for line in log)
    assert total == real_tokens(batch(32))  # one epoch
    found = events(tmp_path / "runs" / "moa")
    assert [e.step for e in found.Scalars("moa/mean/effective_experts")] == [2, 4]
    assert [e.step for e in found.Images("moa_load/by_task")] == [2, 4]
    others = [p for p in (tmp_path / "runs").iterdir() if p.name != "moa"]
    assert len(others) == 1 and "train/loss" in events(others[0]).Tags()["scalars"]


def test_trainer_resume_drops_what_will_be_done_again(tmp_path: Path) -> None:
    train(bert(), tmp_path, RoutingMonitor(images=False), False, max_steps=6)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    first = lines(tmp_path)
    train(
        bert(),
        tmp_path,
        RoutingMonitor(images=False),
        False,
        max_steps=6,
        resume_from_checkpoint=str(tmp_path / "checkpoint-4"),
    )
    second = lines(tmp_path)
    assert [line["step"] for line in second] == [2, 4, 6] and second[:2] == first[:2]
    assert second[2]["layers"] == first[2]["layers"]  # resumed bit for bit
    steps = [e.step for e in events(tmp_path / "runs" / "moa").Scalars("moa/mean/effective_experts")]
    assert steps == [2, 4, 6]


def test_a_run_shorter_than_the_logging_interval_is_logged_at_its_end(tmp_path: Path) -> None:
    train(bert(), tmp_path, RoutingMonitor(images=False), False, max_steps=3, logging_steps=500)
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_log_dir_and_environment_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "env"))
    train(bert(), tmp_path / "a", RoutingMonitor(images=False), False, max_steps=2)
    assert "moa/router_grad_norm" in events(tmp_path / "env").Tags()["scalars"]
    assert len(lines(tmp_path / "a")) == 1
    train(bert(), tmp_path / "b", RoutingMonitor(tmp_path / "own", images=False), False, max_steps=2)
    assert "moa/router_grad_norm" in events(tmp_path / "own").Tags()["scalars"]
    assert len(lines(tmp_path / "own")) == 1
