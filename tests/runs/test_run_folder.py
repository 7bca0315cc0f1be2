"""What a run keeps, swaps in, and leaves when it fails. Run: pytest tests/runs/test_run_folder.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from moa.cli.main import main
from moa.errors import ConfigError
from moa.runs.config import parse
from moa.runs.train import train
from moa.training.checkpoints import is_whole, newest_checkpoint, processes_of
from tests.tiny_run import config_values, decoder_folder, encoder_folder, train_with

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
Values = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("bases") / "encoder")


@pytest.fixture
def values(tmp_path: Path, base: Path) -> Values:
    made = config_values(tmp_path, base)
    made["training"] |= {"max_steps": 4, "save_steps": 2, "learning_rate": 3e-2}
    return made


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stopping(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Let training end with an error after a step."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > step:
                raise error

    train_with(monkeypatch, Stop())


def test_an_old_run_stays_until_the_new_one_is_whole(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(parse(values))
    out = Path(values["output"])
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("old")
    before = everything(out)
    again = {**values, "overwrite": True, "seed": 1}
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.raises(KeyboardInterrupt, match=r"checkpoint-2 is saved: go on with moa train CONFIG --resume"):
            train(parse(again))
    assert everything(out) == before
    resumed = train(parse(again), resume=True)
    assert resumed.folder == out and (out / "notes.txt").read_text() == "mine"
    assert not (out / "report.html").exists() and sorted(p.name for p in tmp_path.glob(".*")) == []
    got = load_file(out / "model" / "model.safetensors")
    whole = train(parse({**again, "output": str(tmp_path / "whole")}))
    want = load_file(whole.folder / "model" / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_start_that_fails_leaves_no_trace(
    tmp_path: Path, values: Values, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["output"] = str(tmp_path / "a" / "b")
    with monkeypatch.context() as patch:
        stopping(patch, 0, error)
        patch.setattr("moa.monitor.callback.RoutingMonitor.log", lambda self, step: {})
        with pytest.raises(error):
            train(parse(values))
    assert not (tmp_path / "a").exists()
    train(parse(values))
    assert (tmp_path / "a" / "b" / "model").is_dir()


def test_what_is_somebody_elses_is_kept(tmp_path: Path, values: Values) -> None:
    out = Path(values["output"])
    out.mkdir()
    (out / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(ConfigError, match=r"config.yaml was written by no run, and would be lost"):
        train(parse(values))
    assert everything(out) == {"config.yaml": b"mine: 1\n"}


def test_ctrl_c_is_one_line(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    stopping(monkeypatch, 2)
    capsys.readouterr()
    assert main(["train", str(tmp_path / "a.yaml")]) == 130
    error = capsys.readouterr().err
    assert "moa train: stopped; checkpoint-2 is saved: go on with moa train CONFIG --resume." in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("recipe.n_experts", 3, r"recipe.n_experts was 4 and is now 3"),
        ("recipe.router", "sigmoid", r"recipe.router was topk and is now sigmoid"),
        ("seed", 5, r"seed was 0 and is now 5"),
        ("tasks.first.max_train_rows", 8, r"tasks.first.max_train_rows was None and is now 8"),
        ("training.learning_rate", 0.5, r"training.learning_rate was 0.03 and is now 0.5"),
    ],
)
def test_a_run_is_resumed_under_its_own_configuration(
    tmp_path: Path, base: Path, key: str, value: Any, named: str
) -> None:
    values = config_values(tmp_path, base)
    values["training"] |= {"max_steps": 4, "save_steps": 2, "learning_rate": 3e-2}
    out = Path(values["output"])
    (out / "checkpoint-2").mkdir(parents=True)
    write_whole(out / "checkpoint-2", 2)
    (out / "config.yaml").write_text(yaml.safe_dump(parse(values).to_dict()))
    before = everything(out)
    *parents, last = key.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(ConfigError, match=named):
        train(parse(values), resume=True)
    assert everything(out) == before


def write_whole(folder: Path, step: int) -> None:
    """Write what Trainer writes into a checkpoint, as far as its files are looked at."""
    from safetensors.torch import save_file

    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_whole(tmp_path / f"checkpoint-{step}", step)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    file = tmp_path / "checkpoint-10" / name
    file.write_bytes(file.read_bytes()[:-8])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    file.unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("n", [2, 3])
def test_a_checkpoint_of_several_processes_has_a_file_of_each(
    tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two the names say it, of three the arguments that Trainer saves do; what is left of others does not count."""
    inner = tmp_path / "checkpoint-2"
    inner.mkdir()
    write_whole(inner, 2)
    (inner / "rng_state.pth").rename(inner / "rng_state_0.pth")
    for rank in range(1, n):
        assert processes_of(inner) == max(2, rank) and not (rank == 1 and is_whole(inner))
        torch.save({}, inner / f"rng_state_{rank}.pth")
    assert is_whole(inner)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert arguments.world_size == 1
    for said in (n, n + 1):
        monkeypatch.setitem(vars(arguments.distributed_state), "num_processes", said)
        torch.save(arguments, inner / "training_args.bin")
        assert processes_of(inner) == said and is_whole(inner) == (said == n)
    arguments.save_on_each_node = True  # a machine has the files of its own processes
    torch.save(arguments, inner / "training_args.bin")
    assert is_whole(inner)
    file = inner / "training_args.bin"
    file.write_bytes(file.read_bytes()[:-8])
    assert not is_whole(inner)


def test_what_trainer_saved_of_its_arguments_is_not_run(tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    torch.save(Opened(), tmp_path / "training_args.bin")
    assert processes_of(tmp_path) == 2 and not (tmp_path / "opened").exists()
    torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (tmp_path / "opened").exists()


def test_a_checkpoint_of_deepspeed_has_every_part(tmp_path: Path) -> None:
    """Names as DeepSpeed's engine forms them; ZeRO-3 has the weights in parts, too."""
    inner = tmp_path / "checkpoint-2"
    inner.mkdir()
    write_whole(inner, 2)
    for name in ("optimizer.pt", "scheduler.pt"):
        (inner / name).unlink()
    (inner / "rng_state.pth").rename(inner / "rng_state_0.pth")
    torch.save({}, inner / "rng_state_1.pth")
    (inner / "latest").write_text("global_step2")
    own = inner / "global_step2"
    own.mkdir()
    assert not is_whole(inner)
    torch.save({}, own / "mp_rank_00_model_states.pt")
    assert is_whole(inner)  # without ZeRO
    for prefix, kind in (("bf16_", "optim"), ("", "model")):
        for rank in range(2):
            torch.save({}, own / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
            assert is_whole(inner) == (rank == 1)
    (own / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    assert not is_whole(inner)


def test_other_rows_under_the_same_name_are_not_resumed(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(parse(values))
    file = Path(values["tasks"]["second"]["train"])
    file.write_text(file.read_text().replace("good", "fine"))
    with pytest.raises(ConfigError, match=r"the training rows of task 'second' are not those"):
        train(parse(values), resume=True)


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"0 MB are free at .*run, and a checkpoint with its optimizer takes about"):
        train(parse(values))
    assert not Path(values["output"]).exists()


def test_evaluation_while_training_keeps_the_best_and_stops_early(tmp_path: Path, values: Values) -> None:
    """A learning rate far too high: the loss only rises, so the first evaluation is the best and training stops."""
    values["patience"] = 1
    values["training"] |= {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 30.0}
    del values["training"]["save_steps"]
    result = train(parse(values))
    state = json.loads((result.folder / "trainer_state.json").read_text())
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert state["global_step"] < 40 and len(losses) >= 2 and min(losses) < losses[-1]
    scores, sizes = (
        result.results["scores"]["mixture"],
        {t: r["evaluation_rows"] for t, r in result.results["tasks"].items()},
    )
    mean = sum(scores[t]["loss"] * sizes[t] for t in scores) / sum(sizes.values())
    assert mean == pytest.approx(min(losses), rel=1e-4)


def test_routing_is_in_the_history_and_names_are_text(tmp_path: Path, values: Values) -> None:
    """Trainer's log has the mean over layers of what the monitor's own log has; a dollar is a dollar."""
    values["tasks"] = {"$a_$": values["tasks"]["first"], "profit in $ and $^": values["tasks"]["second"]}
    folder = train(parse(values)).folder
    logged = [r for r in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in r]
    lines = {row["step"]: row for row in map(json.loads, (folder / "routing.jsonl").read_text().splitlines())}
    assert len(logged) == 2
    for row in logged:
        layers = lines[row["step"]]["layers"].values()
        want = sum(layer["effective_experts"] for layer in layers) / len(layers)
        assert row["moa/effective_experts"] == pytest.approx(want, rel=1e-6)
    assert set(lines[4]["by_task"]) == set(values["tasks"])


def test_chats_and_prompts_train_together(tmp_path: Path) -> None:
    base = decoder_folder(tmp_path / "base")
    from tests.tiny_run import tokenizer, write_jsonl

    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}label: {{ m.content }} [EOS] {% else %}review "
        "{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}label: {% endif %}"
    )
    tok.save_pretrained(base)
    values = config_values(tmp_path, base, "generation")
    chat = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}] * 12)
    values["tasks"]["talk"] = {"kind": "chat", "train": str(file)}
    values |= {"generate": {"rows": 1, "max_new_tokens": 2}}
    values["training"] |= {"num_train_epochs": 4, "learning_rate": 3e-2}
    results = train(parse(values)).results
    assert [row["prompt"] for row in results["answers"] if row["task"] == "talk"] == ["review the film label: "]
    before, after = (results["scores"][name]["talk"]["loss"] for name in ("before", "mixture"))
    assert after < 0.5 * before
