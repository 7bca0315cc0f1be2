"""Many adapters in one process: `python -m experiments.serving.pool`

A thousand LoRA adapters of rank 4 to 64 lie on the host; a batch of 64 requests uses 32 of them. Measured against
peft's mixed batch (`adapter_names`, only those 32 loaded) and against one request at a time, in one run, in turn: a
decoding step, the time to bring an adapter onto the device, and a soak in which the device's cache never passes its
capacity.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from moa.serving.pool import AdapterPool

from ..bench.common import interleaved, write

COMMAND = "python -m experiments.serving.pool"
RANKS = (4, 8, 16, 32, 64)
REQUESTS, IN_USE = 64, 32


def base(width: int, layers: int) -> LlamaForCausalLM:
    """Return a frozen Llama, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def write_adapters(root: Path, n: int, width: int, layers: int) -> list[Path]:
    """Write n LoRA folders of mixed rank on every linear layer, as peft does."""
    folders = []
    for number in range(n):
        rank = RANKS[number % len(RANKS)]
        config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base(width, layers), config)
        folders.append(root / f"adapter-{number}")
        model.save_pretrained(folders[-1])
    return folders


def loading(pool: AdapterPool, reference: PeftModel, folders: list[Path]) -> dict[str, float]:
    """Return the median seconds to bring an adapter that is in no cache onto the device, ours and peft's."""
    ours, theirs = [], []
    for number, folder in enumerate(folders):
        pool.cache.drop(folder.name)
        start = time.perf_counter()
        with pool.lease(folder.name):
            ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        reference.load_adapter(folder, f"again-{number}")
        theirs.append(time.perf_counter() - start)
        reference.delete_adapter(f"again-{number}")
    return {"pool_s": statistics.median(ours), "peft_s": statistics.median(theirs)}


def soak(pool: AdapterPool, names: list[str], requests: int) -> dict[str, float]:
    """Serve requests in small mixed batches and watch the cache at every one."""
    draw, most, served = random.Random(0), 0, 0
    before = pool.cache.loads
    while served < requests:
        chosen: list[str | None] = [draw.choice(names) for _ in range(7)]
        chosen.append(None)
        pool(input_ids=torch.randint(512, (len(chosen), 1)), adapter_ids=chosen)
        most = max(most, pool.cache.used)
        assert pool.cache.used <= pool.cache.capacity_bytes
        served += len(chosen)
    return {
        "requests": served,
        "most_bytes": most,
        "capacity_bytes": pool.cache.capacity_bytes,
        "loads": pool.cache.loads - before,
    }


def main() -> None:
    """Measure and write experiments/results/pool.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000, help="of the soak")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(Path(scratch), options.adapters, options.width, options.layers)
        pool = AdapterPool(base(options.width, options.layers), capacity_bytes=64 * 2**20)
        for folder in folders:
            pool.add(folder.name, folder)
        names = [folder.name for folder in folders]
        used = folders[:: len(folders) // IN_USE][:IN_USE]
        reference = PeftModel.from_pretrained(base(options.width, options.layers), used[0], adapter_name=used[0].name)
        for folder in used[1:]:
            reference.load_adapter(folder, folder.name)
        reference.eval()
        asked = [used[number % IN_USE].name for number in range(REQUESTS)]
        ids = torch.randint(512, (REQUESTS, 1))

        def one_by_one() -> Any:
            return [pool(input_ids=ids[n : n + 1], adapter_ids=[asked[n]]) for n in range(REQUESTS)]

        def by_peft() -> Any:
            with torch.no_grad():
                return reference(input_ids=ids, adapter_names=asked)

        def by_pool() -> Any:
            return pool(input_ids=ids, adapter_ids=asked)

        torch.testing.assert_close(by_pool().logits, by_peft().logits, rtol=1e-4, atol=1e-4)

        def base_only() -> Any:
            return pool(input_ids=ids)

        steps = {"base": base_only, "pool": by_pool, "peft mixed batch": by_peft, "one by one": one_by_one}
        times = {name: row["median_s"] for name, row in interleaved(steps, options.rounds).items()}
        result = {
            "adapters": options.adapters,
            "shape": {"width": options.width, "layers": options.layers, "requests": REQUESTS, "in_use": IN_USE},
            "tokens_per_second": {name: REQUESTS / seconds for name, seconds in times.items()},
            "over_peft": times["peft mixed batch"] / times["pool"],
            "over_one_by_one": times["one by one"] / times["pool"],
            "loading": loading(pool, reference, folders[1 : 20 * 7 : 7]),
            "soak": soak(pool, names, options.requests),
        }
        pool.close()
    print(result)
    print(write("pool", result, COMMAND))


if __name__ == "__main__":
    main()
