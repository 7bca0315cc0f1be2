"""What moa reads of files that others wrote: for each kind a good folder, how it is damaged, and how it is read."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import moa
from moa.formats.tensor_files import Checkpoint
from moa.merge import read_peft
from tests import models
from tests.formats.test_foreign import mixlora_folder, mixlora_tensors
from tests.fuzz.mutations import damaged_bytes, damaged_file, damaged_value, json_text


@dataclass(frozen=True)
class Surface:
    """One kind of file.

    Args:
        make: writes a good folder.
        damage: changes one file in it.
        read: reads the folder as a user does, and checks what came against an independent reading.
    """

    make: Callable[[Path], None]
    damage: Callable[[Path, random.Random], None]
    read: Callable[[Path], None]


def _json(name: str) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        file = folder / name
        data = file.read_bytes()
        if draw.random() < 0.2:
            file.write_bytes(damaged_bytes(data, draw))
        else:
            text = json_text(damaged_value(json.loads(data), draw), draw)
            file.write_bytes(text.encode("utf-8", "surrogatepass"))

    return damage


def _weights(name: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, draw: _write(folder / name, damaged_file((folder / name).read_bytes(), draw))


def _bytes(name: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, draw: _write(folder / name, damaged_bytes((folder / name).read_bytes(), draw))


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


# ------------------------------------------------------------------------------------------------ mixtures

BASE = models.llama()


def _own(folder: Path) -> None:
    models.randomise(moa.build(models.llama(), "topk", n_experts=3, rank=2)).save_pretrained(folder)


def _own_header(folder: Path, draw: random.Random) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = damaged_value(json.loads(header["__metadata__"]["moa"]), draw)
    header["__metadata__"]["moa"] = json_text(description, draw)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _load(folder: Path) -> None:
    model = moa.load(folder, base=copy.deepcopy(BASE))
    own = model.adapter_state_dict()
    assert all(bool(torch.isfinite(t).all()) for t in own.values() if t.is_floating_point()), "NaN was accepted"
    if (folder / "model.safetensors").is_file():
        stored = load_file(folder / "model.safetensors")
        assert stored.keys() == own.keys(), "other tensors"
        assert all(torch.equal(own[k], t.to(own[k].dtype)) for k, t in stored.items()), "other values"


def _mixlora(folder: Path) -> None:
    folder.rmdir()
    mixlora_folder(folder, mixlora_tensors(), ".safetensors")


def _damage_xlora(folder: Path, draw: random.Random) -> None:
    how = _json("0/adapter_config.json") if draw.random() < 0.5 else _weights("adapter_model.safetensors")
    how(folder, draw)


def _xlora(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for number in range(2):
        _peft(folder / str(number))
    tensors = {
        "internal_xlora_classifier.layers.0.weight": torch.randn(2, models.WIDTH, generator=g),
        "internal_xlora_classifier.layers.0.bias": torch.randn(2, generator=g),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "adapters": {str(n): str(folder / str(n)) for n in range(2)},
        "hidden_size": models.WIDTH,
        "xlora_depth": 1,
        "enable_softmax": True,
        "softmax_temperature": 1.0,
        "top_k_lora": None,
        "layerwise_scalings": False,
        "use_trainable_adapters": False,
        "xlora_dropout_p": 0.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------ merge inputs


def _peft(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, o in (("q_proj", 16), ("v_proj", 8)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, models.WIDTH, generator=g)
            tensors[f"{key}.lora_B.weight"] = torch.randn(o, 2, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "toy",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 6},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _peft_bin(folder: Path) -> None:
    _peft(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _read_peft(folder: Path) -> None:
    merged = moa.merge.merge([read_peft(folder)], method="average")
    for name in merged:
        assert bool(torch.isfinite(merged[name].dense()).all()), "NaN was accepted"


def _index(folder: Path) -> None:
    weight_map = {}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({f"{shard[0]}.{i}": torch.ones(3) for i in range(3)}, folder / shard)
        weight_map |= {f"{shard[0]}.{i}": shard for i in range(3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _read_index(folder: Path) -> None:
    read = Checkpoint(folder)
    stored = {name: tensor for file in read.shards for name, tensor in load_file(file).items()}
    assert all(folder.resolve() in file.resolve().parents for file in read.shards), "outside the folder"
    assert all(torch.equal(read[name], stored[name]) for name in read), "other values"


MERGE = {
    "adapters": [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 1.0}],
    "out": "c",
    "method": "ties",
    "options": {"density": 0.5},
    "rank": 4,
    "missing": "zero",
    "overwrite": False,
}
TRAIN = {
    "base": "x",
    "output": "y",
    "tasks": {"a": {"kind": "generation", "train": "t.jsonl", "prompt": "p", "answer": "q", "template": "{prompt}:"}},
    "max_length": 16,
    "seed": 3,
    "recipe": {"router": "topk", "n_experts": 4, "k": 2, "rank": 2, "targets": "all-linear"},
    "training": {"max_steps": 4, "learning_rate": 1e-3},
}


def _yaml(values: Any) -> tuple[Callable[[Path], None], Callable[[Path, random.Random], None]]:
    def make(folder: Path) -> None:
        (folder / "a.yaml").write_text(yaml.safe_dump(values))

    def damage(folder: Path, draw: random.Random) -> None:
        file = folder / "a.yaml"
        if draw.random() < 0.25:
            return _write(file, damaged_bytes(file.read_bytes(), draw))
        damaged = damaged_value(values, draw)
        text = yaml.safe_dump(damaged, allow_unicode=True)
        text = text.replace("1", "1" * 6000, 1) if draw.random() < 0.05 else text
        return _write(file, text.encode("utf-8", "surrogatepass"))

    return make, damage


def _read_merge(folder: Path) -> None:
    from moa.cli.merge_config import read_merge
    from moa.runs.yaml_values import read_values

    read_merge(read_values(folder / "a.yaml"), "a.yaml")


def _read_train(folder: Path) -> None:
    from moa.runs.config import parse, read_config

    config = read_config(folder / "a.yaml")
    assert parse(config.to_dict()) == config, "written and read again it is another one"


# ------------------------------------------------------------------------------------------------ tasks and runs


def _rows(folder: Path) -> None:
    rows = [{"text": f"the film {i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.json").write_text(json.dumps(rows))
    (folder / "t.csv").write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows))
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")


def _damage_rows(folder: Path, draw: random.Random) -> None:
    ending = draw.choice(("jsonl", "json", "csv", "parquet"))
    file = folder / f"t.{ending}"
    data = file.read_bytes()
    if ending == "json" and draw.random() < 0.7:
        data = json_text(damaged_value(json.loads(data), draw), draw).encode("utf-8", "surrogatepass")
    elif ending == "jsonl" and draw.random() < 0.7:
        lines = [json.loads(line) for line in data.splitlines()]
        data = "\n".join(json_text(row, draw) for row in [damaged_value(lines, draw)][0]).encode(
            "utf-8", "surrogatepass"
        )
    else:
        data = damaged_bytes(data, draw)
    (folder / f"only.{ending}").write_bytes(data)


def _read_rows(folder: Path) -> None:
    from moa.runs.task_rows import read_tasks
    from moa.runs.tasks import Task

    file = next(folder.glob("only.*"), folder / "t.csv")
    read_tasks({"a": Task(kind="classification", train=str(file), text="text", label="label")}, 0)


LINE = {
    "step": 10,
    "layers": {"q": {"load": [0.5, 0.5], "rows": 8.0, "k": 1, "dead_share": 0.1}},
    "by_task": {"a": {"q": [0.5, 0.5]}},
    "losses": {"task": 1.0, "balance": 0.1},
    "router_grad_norm": 0.1,
    "warnings": [],
}


def _run(folder: Path) -> None:
    (folder / "routing.jsonl").write_text(json.dumps(LINE) + "\n")
    state = {"global_step": 10, "log_history": [{"loss": 1.0, "step": 5}, {"eval_loss": 0.9, "step": 10}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "results.json").write_text(json.dumps({"scores": {"a": {"loss": 1.0}}}))


def _damage_log(folder: Path, draw: random.Random) -> None:
    if draw.random() < 0.2:
        return _bytes("routing.jsonl")(folder, draw)
    text = json_text(damaged_value(LINE, draw), draw)
    return _write(folder / "routing.jsonl", (text + "\n").encode("utf-8", "surrogatepass"))


def _report(folder: Path) -> None:
    from moa.monitor import report as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "picture", lambda figure, alt: "")  # drawing is not reading, and takes most of the time
        module.report(folder)


def _checkpoint(folder: Path) -> None:
    inner = folder / "checkpoint-4"
    inner.mkdir()
    (inner / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": []}))
    save_file({"a": torch.zeros(3)}, inner / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, inner / name)
    torch.save(TrainingArguments(str(folder), report_to="none", use_cpu=True), inner / "training_args.bin")


def _damage_checkpoint(folder: Path, draw: random.Random) -> None:
    name = draw.choice(("trainer_state.json", "model.safetensors", "optimizer.pt", "training_args.bin"))
    how = {"trainer_state.json": _json, "model.safetensors": _weights}.get(name, _bytes)
    how(name)(folder / "checkpoint-4", draw)


def _newest(folder: Path) -> None:
    from moa.training.checkpoints import newest_checkpoint

    if newest_checkpoint(folder) is None:
        raise moa.MoaError("passed over")


class Opened:
    """A pickle that would make a file."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/moa_was_here", "w"))


def _damage_bin(folder: Path, draw: random.Random) -> None:
    file = folder / "adapter_model.bin"
    if draw.random() < 0.2:
        return _write(file, pickle.dumps({"a": Opened()}, protocol=draw.choice((2, 4))))
    return _bytes("adapter_model.bin")(folder, draw)


SURFACES: dict[str, Surface] = {
    "own: header": Surface(_own, _own_header, _load),
    "own: weights": Surface(_own, _weights("model.safetensors"), _load),
    "PEFT: configuration": Surface(_peft, _json("adapter_config.json"), _read_peft),
    "PEFT: weights": Surface(_peft, _weights("adapter_model.safetensors"), _read_peft),
    "PEFT: pickle": Surface(_peft_bin, _damage_bin, _read_peft),
    "MixLoRA: configuration": Surface(_mixlora, _json("adapter_config.json"), _load),
    "MixLoRA: weights": Surface(_mixlora, _weights("adapter_model.safetensors"), _load),
    "X-LoRA: configuration": Surface(_xlora, _json("adapter_config.json"), _load),
    "X-LoRA: adapters": Surface(
        _xlora,
        lambda f, d: (_json("0/adapter_config.json") if d.random() < 0.5 else _weights("adapter_model.safetensors"))(
            f, d
        ),
        _load,
    ),
    "merge: index": Surface(_index, _json("model.safetensors.index.json"), _read_index),
    "merge: recipe": Surface(*_yaml(MERGE), _read_merge),
    "train: configuration": Surface(*_yaml(TRAIN), _read_train),
    "task files": Surface(_rows, _damage_rows, _read_rows),
    "run: log and state": Surface(
        _run, lambda f, d: (_damage_log if d.random() < 0.6 else _json("trainer_state.json"))(f, d), _report
    ),
    "run: checkpoints": Surface(_checkpoint, _damage_checkpoint, _newest),
}
