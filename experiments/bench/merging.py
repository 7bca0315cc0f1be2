"""Merging 8 adapters of SmolLM2-135M into a checkpoint: seconds and peak memory of every method, peft's and mergekit's.

Each job runs in a process of its own: it reads the base and 8 LoRA folders of rank 16 on all linears, merges, and
writes a whole checkpoint. `process_s` is the wall time of that process, imports and all: peers are compared by it, on
the same jobs (`SAME`). `wall_s` and `cpu_s` are of the job alone. Peak memory is the process's largest resident set
(Linux), less what it was after the imports, over the bytes of the base's weights; pages of mapped files count.
mergekit runs where --mergekit names a Python that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moa.runs.demo import cache_folder

from .common import write

COMMAND = "python -m experiments.bench.merging"
N_ADAPTERS, RANK = 8, 16
SQUEEZED = f", rank {RANK}"  # the merged changes are cut back to the adapters' rank
METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {},
    "stack": {},
    "magnitude": {"density": 0.2},
    "ties": {},
    "ties, per tensor": {"scope": "tensor"},
    "ties, mergekit": {"definition": "mergekit", "density": 0.2},
    f"ties{SQUEEZED}": {"definition": "peft", "density": 0.2},
    "dare": {"density": 0.5},
    f"dare{SQUEEZED}": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.5},
    "model_stock": {},
    "average_factors": {},
    "flylora_dense": {},
    "knots": {},
    "tsv": {},
    "isotropic": {},
}
# peft's modes without _svd but "cat" and "linear" merge A and B apart: other jobs than any of ours
_SVD: dict[str, Any] = {"svd_rank": RANK, "svd_full_matrices": False}
PEFT: dict[str, dict[str, Any]] = {
    "cat": {},
    "linear": {},
    "ties_svd": {"density": 0.2, **_SVD},
    "dare_linear_svd": {"density": 0.5, **_SVD},
}
MERGEKIT: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.5},
}
# A peer's job -> ours with the same definition.
SAME = {
    "peft cat": "moa stack",
    "peft linear": "moa average_factors",
    "peft ties_svd": f"moa ties{SQUEEZED}",
    "peft dare_linear_svd": f"moa dare{SQUEEZED}",
    "mergekit linear": "moa average",
    "mergekit task_arithmetic": "moa task_arithmetic",
    "mergekit ties": "moa ties, mergekit",
    "mergekit dare_linear": "moa dare",
}


def make_adapters(base: Path, folder: Path, dtype: str) -> Path:
    """Write the base in a type and 8 random LoRA folders for it, with peft, and return the folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "done").exists():
        return folder
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    for seed in range(N_ADAPTERS):
        plain = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(plain, config)
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / f"adapter{seed}")
    (folder / "done").touch()
    return folder


def moa_job(folder: Path, out: Path, method: str) -> Callable[[], None]:
    """Return the job of moa, its imports done."""
    from moa.merge import merge_lazily, read_peft, write_checkpoint

    def job() -> None:
        adapters = [read_peft(folder / f"adapter{n}") for n in range(N_ADAPTERS)]
        merged = merge_lazily(adapters, None, method.split(",")[0], **METHODS[method])
        if method.endswith(SQUEEZED):
            merged = squeezed(merged)
        write_checkpoint(folder / "base", merged, out)

    return job


def squeezed(whole: Any) -> Any:
    """Return deltas whose tensors are cut to the adapters' rank when they are read."""
    from moa.merge import Deltas, squeeze

    return Deltas(tuple(whole), lambda n: squeeze(whole[n], RANK).delta, whole.source, whole.base, whole.transposed)


def peft_job(folder: Path, out: Path, method: str) -> Callable[[], None]:
    """Return the job of peft: load, weigh, merge into the base, save."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def job() -> None:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "adapter0", adapter_name="0")
        for n in range(1, N_ADAPTERS):
            model.load_adapter(folder / f"adapter{n}", adapter_name=str(n))
        names = [str(n) for n in range(N_ADAPTERS)]
        model.add_weighted_adapter(names, [1 / N_ADAPTERS] * N_ADAPTERS, "merged", method, **PEFT[method])
        model.set_adapter("merged")
        model.merge_and_unload(adapter_names=["merged"]).save_pretrained(out)

    return job


def mergekit_recipe(folder: Path, method: str) -> str:
    """Return mergekit's configuration of a merge; it reads an adapter as base+adapter."""
    base = folder / "base"
    models = [
        {"model": f"{base}+{folder / f'adapter{n}'}", "parameters": {"weight": 1 / N_ADAPTERS, **MERGEKIT[method]}}
        for n in range(N_ADAPTERS)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    if method != "linear":
        recipe["base_model"] = str(base)
    return json.dumps(recipe)  # JSON is YAML


def run_job(library: str, method: str, threads: int, folder: Path, out: Path) -> None:
    """Run one job in this process and print its seconds and bytes as JSON."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    job = {"moa": moa_job, "peft": peft_job}[library](folder, out, method)
    before = resident("VmRSS")
    wall, cpu = time.monotonic(), time.process_time()
    job()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_bytes": resident("VmHWM") - before}))


def resident(field: str) -> int:
    """Return this process's resident bytes: VmRSS now, VmHWM at most so far (not a parent's, unlike ru_maxrss)."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) * 1024


def measured(library: str, method: str, folder: Path, threads: int) -> dict[str, Any]:
    """Return one job's figures, from a process of its own."""
    command = [sys.executable, "-m", "experiments.bench.merging", "--job", library, method]
    command += ["--work", str(folder), "--threads", str(threads)]
    wall = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.monotonic() - wall
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    return {"process_s": wall, **json.loads(done.stdout.strip().splitlines()[-1])}


def measured_mergekit(python: Path, method: str, folder: Path, threads: int) -> dict[str, Any]:
    """Return mergekit's figures: its command as a whole; its cache of merged adapters starts empty."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(mergekit_recipe(folder, method))
        command = [str(python.parent / "mergekit-yaml"), str(recipe), f"{scratch}/out", "--no-copy-tokenizer"]
        command += ["--lora-merge-cache", f"{scratch}/cache", "--quiet"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        wall = time.monotonic() - wall
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"process_s": wall, "process_cpu_s": cpu}


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the peers' time over ours on the same job, where both ran."""
    pairs = {f"{peer} / {ours}": (rows.get(peer, {}), rows.get(ours, {})) for peer, ours in SAME.items()}
    return {n: peer["process_s"] / our["process_s"] for n, (peer, our) in pairs.items() if "process_s" in peer and our}


def main() -> None:
    """Measure all of them and write experiments/results/merge_bench.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache_folder() / "SmolLM2-135M-Instruct-dequantised")
    parser.add_argument("--work", type=Path, default=Path("runs/merge_bench"), help="folder for adapters, kept")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of every job; one on a machine that others use")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--mergekit", type=Path, help="Python of an environment that has mergekit")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--peft", nargs="*", choices=list(PEFT), default=list(PEFT))
    parser.add_argument("--name", default="merge_bench", help="of the result file")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            run_job(*options.job, options.threads, options.work, Path(scratch) / "out")
        return
    folder = make_adapters(options.model, (options.work / options.dtype).resolve(), options.dtype)
    base_bytes = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        *(("moa", method, lambda m=method: measured("moa", m, folder, options.threads)) for method in options.methods),  # type: ignore
        *(("peft", method, lambda m=method: measured("peft", m, folder, options.threads)) for method in options.peft),  # type: ignore
    ]
    if options.mergekit:
        jobs += [
            ("mergekit", m, lambda m=m: measured_mergekit(options.mergekit, m, folder, options.threads))
            for m in MERGEKIT
        ]  # type: ignore
    rows: dict[str, dict[str, Any]] = {}
    setting = {"adapters": N_ADAPTERS, "rank": RANK, "dtype": options.dtype, "base_bytes": base_bytes}
    setting |= {"threads": options.threads, "cores": cores}
    for library, method, job in jobs:
        row = job()
        if "peak_bytes" in row:
            row["peak_over_base"] = row["peak_bytes"] / base_bytes
        rows[f"{library} {method}"] = row
        print(f"{library:9s} {method:18s}", {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        write(options.name, {"setting": setting, "peer_over_ours": compared(rows), "rows": rows}, COMMAND)
    for name, ratio in compared(rows).items():
        print(f"{name:50s} {ratio:6.2f}")


if __name__ == "__main__":
    main()
