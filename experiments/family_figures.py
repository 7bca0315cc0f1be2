"""What every family costs, on MiniLM (an encoder) and SmolLM2 (a decoder): `python -m experiments.family_figures`.

For one expert on every linear of the first blocks: its numbers, a training step and decoding over the frozen base, what
is kept for backward over the inputs of the layers, the checkpoint, and peft's step over ours. For 8 experts behind a
router: the step of a loop over peft's layers over ours. For a bank by itself: forward with 64, 16 and 4 experts, always
2 a row.

Times are process CPU seconds of one thread, what is compared in turn; every family is measured in a process of its own,
so that one that fails leaves its reason and the others go on. Finished ones are kept in --work, to go on from.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from experiments import family_models as models
from experiments.bench.common import interleaved, write
from experiments.bench.systems import saved_bytes, with_all_trained
from experiments.family_models import SHAPES, Shape
from moa.experts import FAMILIES
from moa.runs.demo import cache_folder
from moa.types import Routing

COMMAND = "python -m experiments.family_figures"
GROWTH = (4, 16, 64)  # experts of a bank by itself, 2 of them a row
BANK_ROWS, BANK_FEATURES = 512, 384
UNMEASURED = "not measured"
LIMIT_S = 240  # of one family on one model


def batch_of(model: Any, shape: Shape) -> dict[str, Tensor]:
    """Return a batch whose embedded tokens (B, S, d) want a gradient, so that the frozen base has a backward, too."""
    ids = torch.randint(5, 500, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0))
    return {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_()}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return a loss of what the last block gives, which costs next to nothing."""
    loss: Tensor = model(**batch).last_hidden_state.square().mean()
    return loss


def stepper(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return forward and backward in training mode."""

    def step() -> None:
        model.train()
        loss_of(model, batch).backward()
        model.zero_grad()

    return step


def decoder(model: Any, tokens: int) -> Callable[[], None]:
    """Return the forwards of decoding with a cache: a prompt of 8 tokens in 2 rows, then one token after another."""
    prompt, token = torch.arange(16).view(2, 8) + 5, torch.full((2, 1), 7)

    def decode() -> None:
        model.eval()
        with torch.no_grad():
            out = model(input_ids=prompt, use_cache=True)
            for _ in range(tokens):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    return decode


def one_expert(shape: Shape, name: str, make: Callable[[], Any], rounds: int, tokens: int) -> dict[str, Any]:
    """Return the figures of one expert of a family on every layer, beside the frozen base and peft's own."""
    base = make().requires_grad_(False)
    batch = batch_of(base, shape)
    steps: dict[str, Callable[[], Any]] = {"base": stepper(base, batch)}
    ours = with_all_trained(models.alone(make(), name, shape))
    steps["moa"] = stepper(ours, batch)
    row: dict[str, Any] = {"parameters": _numbers(ours)}
    if models.peft_config(name, shape) is not None:
        theirs = models.peft_alone(make(), name, shape)
        row["peft_parameters"] = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        steps["peft"] = stepper(theirs, batch)
    times = interleaved(steps, rounds, warmup=1)
    row["step_over_base"] = times["moa"]["min_s"] / times["base"]["min_s"]
    row["peft_step_over_moa"] = times["peft"]["min_s"] / times["moa"]["min_s"] if "peft" in times else None
    x_bytes = sum(b.bank.d_in for _, b in ours.branches()) * shape.batch * shape.length * 4
    row["saved_over_x"] = (saved_bytes(ours, batch, loss_of) - saved_bytes(base, batch, loss_of)) / x_bytes
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        row["checkpoint_bytes"] = (Path(folder) / "model.safetensors").stat().st_size
    row["decode_over_base"], row["no_decoding"] = _decoding(base, ours, shape, rounds, tokens)
    return {**row, "times": times}


def _decoding(base: Any, ours: Any, shape: Shape, rounds: int, tokens: int) -> tuple[float | None, str | None]:
    """Return the time of decoding over the base's, or why there is none."""
    if not shape.decodes:
        return None, "an encoder"
    if not all(branch.bank.rowwise for _, branch in ours.branches()):
        return None, "its experts look at the rows around each row"
    times = interleaved({"base": decoder(base, tokens), "moa": decoder(ours, tokens)}, rounds, warmup=1)
    return times["moa"]["min_s"] / times["base"]["min_s"], None


def behind_a_router(shape: Shape, name: str, make: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Return the step of 8 experts behind a router, and of a loop over peft's layers where peft has the family."""
    ours = with_all_trained(models.routed(make(), name, shape))
    batch: dict[str, Any] = batch_of(ours, shape)
    own = {**batch, "task_ids": torch.arange(shape.batch) % models.N_TASKS} if name in models.WHOLE else batch
    steps = {"moa": stepper(ours, own)}
    if models.peft_config(name, shape) is not None:
        steps["loop"] = stepper(models.peft_loop(make(), name, shape), batch)
    times = interleaved(steps, rounds, warmup=1)
    ratio = times["loop"]["min_s"] / times["moa"]["min_s"] if "loop" in times else None
    return {"routed_parameters": _numbers(ours), "loop_step_over_moa": ratio, "routed_times": times}


def growth(name: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of a bank's forward, E experts of which 2 act on a row, or on an example of whole weights."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, BANK_ROWS // 16, BANK_FEATURES, generator=draw)
    runs: dict[str, Callable[[], Any]] = {}
    for n_experts in GROWTH:
        bank = models.bank(name, n_experts, BANK_FEATURES).eval()
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.normal_(std=0.02)
        length = 1 if name in models.WHOLE else x.shape[1]
        indices = torch.rand(16, length, n_experts, generator=draw).topk(2).indices
        routing = Routing(torch.full(indices.shape, 0.5), indices, n_experts)
        runs[str(n_experts)] = _forward(bank, x, routing)
    times = interleaved(runs, rounds, warmup=1)
    least = {n: row["min_s"] for n, row in times.items()}
    return {"forward_s": least, "forward_64_over_4": least["64"] / least["4"]}


def _forward(bank: nn.Module, x: Tensor, routing: Routing) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            bank(x, routing)

    return run


def _numbers(model: Any) -> int:
    """Return how many numbers of experts are trained, those that all layers share counted once, without routers."""
    found = {id(p): p for _, branch in model.branches() for p in branch.bank.parameters() if p.requires_grad}
    return sum(p.numel() for p in found.values())


def measure(kind: str, name: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is known of a family on one kind of model, more each time."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    shape, folder = SHAPES[kind], settings["folders"].get(kind)

    def make() -> Any:
        return shape.make(folder, settings["blocks"])

    rounds, row = settings["rounds"], {}
    started = time.monotonic()
    for part in (
        lambda: growth(name, rounds),
        lambda: one_expert(shape, name, make, rounds, settings["tokens"]),
        lambda: behind_a_router(shape, name, make, rounds),
    ):
        row = {**row, **part(), "seconds": time.monotonic() - started}
        yield row


# ------------------------------------------------------------------------------------------------ running them


def into_file(path: Path, kind: str, name: str, settings: dict[str, Any]) -> None:
    """Measure one family in this process, and leave its figures, or those that it had and why there are no others."""
    sys.stderr = path.with_suffix(".err").open("w")
    for row in measure(kind, name, settings):
        path.write_text(json.dumps({**row, "settings": settings, "error": "it took too long"}))
    path.write_text(json.dumps({**row, "settings": settings}))


def say_why(path: Path, exitcode: int | None, settings: dict[str, Any]) -> None:
    """Write down why a family's process ended before its end."""
    known = json.loads(path.read_text()) if path.exists() else {"settings": settings}
    said = path.with_suffix(".err").read_text().strip().splitlines()
    why = "it took too long" if exitcode == -signal.SIGKILL or not said else said[-1]
    path.write_text(json.dumps({**known, "error": why}))


def run(work: Path, kinds: list[str], names: list[str], settings: dict[str, Any], workers: int, until: float) -> None:
    """Measure what `work` does not hold yet, each family in a process of its own, as long as there is time."""
    jobs = [(kind, name) for kind in kinds for name in names if "error" in read(work, kind, name, settings)]
    fork = multiprocessing.get_context("fork")  # the packages are imported once
    running: dict[Any, tuple[Path, str, str, float]] = {}
    while jobs or running:
        while jobs and len(running) < workers and time.monotonic() < until:
            kind, name = jobs.pop(0)
            path = place(work, kind, name)
            path.unlink(missing_ok=True)
            process = fork.Process(target=into_file, args=(path, kind, name, settings))
            process.start()
            running[process] = (path, kind, name, time.monotonic())
        for process, (path, kind, name, started) in list(running.items()):
            if process.is_alive() and time.monotonic() - started > LIMIT_S:
                process.kill()
            if not process.is_alive():
                process.join()
                if process.exitcode:
                    say_why(path, process.exitcode, settings)
                print(line(kind, name, read(work, kind, name, settings)), flush=True)
                del running[process]
        if jobs and not running and time.monotonic() >= until:
            break
        time.sleep(0.05)


def place(work: Path, kind: str, name: str) -> Path:
    """Return the file of one family on one kind of model."""
    return work / f"{kind}-{name}.json"


def read(work: Path, kind: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that a file holds, if they are of these settings, or an error."""
    path = place(work, kind, name)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.pop("settings", None) == settings else {"error": UNMEASURED}


def line(kind: str, name: str, row: dict[str, Any]) -> str:
    """Return one family in words."""
    if "error" in row:
        return f"{kind:8s} {name:11s} {row['error']}"
    ratios = ("step_over_base", "saved_over_x", "decode_over_base", "peft_step_over_moa", "loop_step_over_moa")
    cells = " ".join(f"{row[key]:6.2f}" if row[key] is not None else "     -" for key in ratios)
    return (
        f"{kind:8s} {name:11s} {row['parameters']:9,} {cells} {row['forward_64_over_4']:6.2f} {row['seconds']:5.0f} s"
    )


def main() -> None:
    """Measure all families on both models and write experiments/results/families.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2-135M; without it, its shape with random weights")
    parser.add_argument(
        "--encoder", default=str(cache_folder() / "all-MiniLM-L6-v2"), help="folder of MiniLM, likewise"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/family_figures"), help="finished ones, to go on from")
    parser.add_argument("--families", nargs="+", default=sorted(FAMILIES))
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=15.0, help="no family is begun after that")
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))))
    for option, default in (("rounds", 5), ("blocks", 3), ("tokens", 8)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = {"MiniLM": options.encoder, "SmolLM2": options.model}
    settings = {
        "blocks": options.blocks,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "folders": {kind: folder for kind, folder in folders.items() if folder and Path(folder).is_dir()},
    }
    options.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    run(options.work, options.only, options.families, settings, options.workers, until)
    rows = {k: {n: read(options.work, k, n, settings) for n in options.families} for k in options.only}
    left = [
        f"{kind} {name}" for kind, own in rows.items() for name, row in own.items() if row.get("error") == UNMEASURED
    ]
    if left:
        print(f"left for the next run: {', '.join(left)}")
        sys.exit(1)
    shown = {kind: "random weights" if kind not in settings["folders"] else "its weights" for kind in options.only}
    size = {**settings, "folders": shown, "experts": models.N_EXPERTS, "rank": models.RANK, "k": models.K}
    print(write("families", {"settings": size, "rows": rows}, command_of(options)))


def command_of(options: argparse.Namespace) -> str:
    """Return the command that makes this result again; folders, which are this machine's, by their kind."""
    words = [COMMAND]
    words += ["--model MODEL"] * bool(options.model)
    words += [f"--{name} {getattr(options, name)}" for name in ("rounds", "blocks", "tokens", "workers")]
    if sorted(options.families) != sorted(FAMILIES):
        words.append(f"--families {' '.join(options.families)}")
    return " ".join(words)


if __name__ == "__main__":
    main()
