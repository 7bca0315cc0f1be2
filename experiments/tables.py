"""The tables of experiments/README.md and of pages in docs/, made of results: `python -m experiments.tables`.

Every ratio of time or memory is the peer's over moa's: above 1, moa is faster or smaller.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence

from .family_tables import family_costs, family_learning
from .study_tables import calibrated, reasoning, smaller_base
from .table_text import HERE, made_by, number, result, table

PAGES = HERE / "README.md", *(HERE.parent / "docs" / f"{page}.md" for page in ("scaling", "families", "federated"))
OURS = "moa topk 8x8 k=2"


def whole_steps() -> str:
    """A whole training step of a model."""
    peers = {"peft LoRA r64": "LoRA r64", "peft Poly 8x8": "Poly", "peft X-LoRA 8x8": "X-LoRA"}
    loop = "MoLA-style loop 8x8 k=2"
    rows = []
    for shape, systems in result("step")["shapes"].items():
        tokens, _, threads = shape.partition(", threads ")
        cells = []
        for peer in peers:
            ratios = [1 / value for value in systems[peer]["moa_over_this_min_s"]]
            cells.append(f"{number(statistics.median(ratios))} ({number(min(ratios))}–{number(max(ratios))})")
        name = f"MiniLM's shape, {tokens.replace('x', '×')} tokens, {threads} thread{'s' * (threads != '1')}"
        rows.append([name, *cells, ""])
    whole = result("end_to_end")
    name = f"SmolLM2-135M, {whole['shape']['batch']} × {whole['shape']['length']} tokens, 1 thread"
    rows.append([name, *(number(whole["rows"][peer]["step_over_moa"]) for peer in [*peers, loop])])
    header = ["`topk` in a training step of", *peers.values(), "a loop over experts"]
    return f"{table(header, rows)}\n\n{made_by('step')}; {made_by('end_to_end')}"


KERNEL_PEERS = {
    "plain concat (autograd)": "one concatenation",
    "lean python loop": "a loop",
    "MoLA as coded": "MoLA",
    "X-LoRA loop": "X-LoRA",
    "Arrow einsum": "Arrow",
    "HF grouped_mm": "grouped_mm",
}


def one_layer() -> str:
    """Forward and backward of the adapters of one linear layer."""
    found = result("kernels_cpu")
    rows = []
    for key, name in (
        ("lora_path_fp32_r8", "8 × rank 8, fp32"),
        ("lora_path_fp32_r16", "8 × rank 16, fp32"),
        ("lora_path_bf16_r8", "8 × rank 8, bf16, which this CPU emulates and moa runs in fp32"),
    ):
        rows.append([name, *(number(found[key]["peer_over_moa"][peer]) for peer in KERNEL_PEERS)])
    blank = [""] * (len(KERNEL_PEERS) - 2)
    rows.append(["128 × rank 8, fp32", "", number(found["many_experts_fp32"]["loop_over_moa"]), *blank])
    text = table(["adapters of one linear", *KERNEL_PEERS.values()], rows)
    base = number(1 / found["whole_layer_fp32"]["moa_over_base"])
    return (
        f"{text}\n\nThe frozen linear without any adapter over the linear with moa's, 8 × rank 8, fp32: {base}. The "
        f"engine that moa chose over the best one, the worst of {len(found['regret_fp32']['shapes'])} shapes: "
        f"{number(found['regret_fp32']['worst'])}.\n\n{made_by('kernels_cpu')}"
    )


def generation() -> str:
    """Tokens that a whole model writes in a second."""
    rows = result("end_to_end")["rows"]
    lines = [
        [name, f"{row['tokens_per_second']:.1f}", number(row["moa_speed_over_this"])] for name, row in rows.items()
    ]
    header = ["SmolLM2-135M, 2 rows, writes with", "tokens / s", "speed of moa's `topk` over this"]
    return f"{table(header, lines)}\n\n{made_by('end_to_end')}"


def decoding() -> str:
    """Decoding through the adapters of one linear layer."""
    peers = {**KERNEL_PEERS, "HF batched_mm": "batched_mm"}
    found = result("kernels_cpu")
    rows = []
    for dtype in ("fp32", "bf16"):
        for count, seconds in found[f"decode_{dtype}_seconds"].items():
            name = f"one linear, {count} row{'s' * (count != '1')}, {dtype}"
            rows.append([name, *(number(seconds[peer] / seconds["moa"]) for peer in peers)])
    return f"{table(['decoding through', *peers.values()], rows)}\n\n{made_by('kernels_cpu')}"


def memory() -> str:
    """What a layer keeps for backward, and the peak of a step."""
    rows = []
    for layer, kept in result("memory")["rows"].items():
        d, dtype = layer.split()
        lora = kept["peft LoRA r64"]
        for name, own in kept.items():
            if name.startswith("moa"):
                kept_by = f"one linear of {d.replace('=', ' = ')}, {dtype}, `{name.removeprefix('moa ')}`"
                rows.append([kept_by, f"{own:.4f}", f"{lora:.4f}", number(lora / own)])
    header = ["kept for backward beyond x, in multiples of x", "moa", "peft's LoRA r64", "LoRA over moa"]
    whole = result("end_to_end")["rows"]
    peaks = [
        [
            f"SmolLM2-135M, one training step, {name}",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            number(row["peak_bytes"] / own),
        ]
        for own in [whole[OURS]["peak_bytes"]]
        for name, row in whole.items()
        if "peak_bytes" in row
    ]
    text = table(["highest memory of", "peak", "this over moa's `topk`"], peaks)
    return f"{table(header, rows)}\n\n{made_by('memory')}\n\n{text}\n\n{made_by('end_to_end')}"


def launching() -> str:
    """What a launch costs the host, as Triton launches and straight to a compiled kernel."""
    times = result("launching")["us"]
    rows = [
        [f"`{name}`", f"{way['triton']:.1f}", f"{way['direct']:.1f}", number(way["triton"] / way["direct"])]
        for name, way in times.items()
    ]
    header = ["a launch of", "as Triton launches, µs", "direct, µs", "Triton's over direct"]
    version = result("launching")["environment"]["triton"]
    return f"{table(header, rows)}\n\nTriton {version}. {made_by('launching')}"


def merging() -> str:
    """Merges of adapters into a checkpoint."""
    found = result("merge_bench")
    jobs = found["rows"]
    rows = []
    for pair, ratio in found["peer_over_ours"].items():
        peer, ours = pair.split(" / ")
        peaks = [jobs[name].get("peak_over_base") for name in (ours, peer)]
        shown = [f"{ours.removeprefix('moa ')}, as {peer}", f"{jobs[ours]['process_s']:.1f}", number(ratio)]
        rows.append(shown + ["" if peak is None else number(peak) for peak in peaks])
    setting = found["setting"]
    header = [
        f"{setting['adapters']} LoRAs of SmolLM2-135M into a checkpoint, {setting['threads']} threads",
        "moa, seconds",
        "peer's time over moa's",
        "moa's peak over the base's bytes",
        "peer's peak over the base's bytes",
    ]
    ours = {name: row for name, row in jobs.items() if name.startswith("moa")}
    slowest = max(ours, key=lambda name: ours[name]["wall_s"])
    highest = max(row["peak_over_base"] for row in ours.values())
    return (
        f"{table(header, rows)}\n\nSeconds are of whole processes, imports included. Of moa's {len(ours)} merges the "
        f"slowest is {slowest.removeprefix('moa ')} with {ours[slowest]['wall_s']:.1f} s without imports, the highest "
        f"peak {number(highest)} of the base's bytes.\n\n{made_by('merge_bench')}"
    )


def around() -> str:
    """What comes with a training run beside its layers."""
    monitor, imports = result("monitor"), result("imports")
    share = 100 * monitor["overhead"]["median"]
    rows = [
        [f"`RoutingMonitor` with images, logging every {monitor['every']} steps", f"{share:.1f} % of a training step"],
        ["`import moa` beyond torch", f"{1e3 * imports['seconds_beyond_torch']:.1f} ms"],
    ]
    return f"{table(['what', 'cost'], rows)}\n\n{made_by('monitor')}; {made_by('imports')}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def cross_domain() -> str:
    """A fourth domain from adapters of three."""
    rows = result("cross_domain")["rows"]
    names = {"xcross": "`xcross` over three domains' adapters", "lora": "LoRA on the target", "head": "pooler alone"}
    sizes = sorted({row["users"] for row in rows} - {0})
    lines = []
    for method, name in names.items():
        scores = [[r["ndcg@10"] for r in rows if r["method"] == method and r["users"] == users] for users in sizes]
        lines.append([name, *(_spread(values) for values in scores)])
    header = ["NDCG@10 on a fourth domain", *(f"{users} users" for users in sizes)]
    fixed = {row["method"]: row["ndcg@10"] for row in rows if row["users"] == 0}
    without = ", ".join(f"{name} {fixed[name]:.3f}" for name in ("popularity", "zero-shot", "xcross, untrained"))
    return f"{table(header, lines)}\n\nWithout training: {without}.\n\n{made_by('cross_domain')}"


def granularity() -> str:
    """ReMix's selections per token or per sequence."""
    summary = result("remix_granularity")["summary"]

    def shown(key: str) -> str:
        return f"{summary[key]['mean']:z.3f} ± {summary[key]['std']:.3f}"

    rows = [
        [
            f"one selection per {kind}",
            *(shown(f"opposed: {kind}, router {does}") for does in ("learns", "stays")),
            shown(f"opposed: {kind}: learns - stays"),
            shown(f"opposed: {kind}, router learns: signal to noise"),
        ]
        for kind in ("token", "sequence")
    ]
    header = ["ReMix", "router learns", "router stays", "difference", "signal to noise of a router's gradient"]
    seeds = summary["opposed: token, router learns"]["seeds"]
    return f"{table(header, rows)}\n\nMean accuracy, {seeds} seeds.\n\n{made_by('remix_granularity')}"


def merged_accuracy() -> str:
    """What merging one adapter per task loses."""
    found = result("merging")
    kinds = {name: row for name, row in found["summary"].items() if "merges" in row}
    merges = ("average", "task_arithmetic", "ties", "dare")
    rows = []
    for name, row in kinds.items():
        losses = [row["merges"][merge]["loss"] if merge in row["merges"] else None for merge in merges]
        shown = ["" if loss is None else f"{100 * loss['mean']:.1f} ± {100 * loss['std']:.1f}" for loss in losses]
        rows.append([name, f"{100 * row['before']['mean']['mean']:.1f} %", *shown])
    header = ["points of accuracy lost by", "own adapter", *(f"`{merge}`" for merge in merges)]
    alone = 100 * found["summary"]["head_alone"]["mean"]["mean"]
    seeds = len(found["settings"]["seeds"])
    return (
        f"{table(header, rows)}\n\nMean over {len(found['settings']['tasks'])} tasks, {seeds} seeds; a head without an "
        f"adapter reaches {alone:.1f} %.\n\n{made_by('merging')}; [figure](results/merging.png)"
    )


def expert_parallel() -> str:
    """What a layer's experts exchange in a training step, replicated, sharded or spread."""
    found = result("expert_parallel")
    settings = found["settings"]
    rows = []
    for bank, row in found["banks"].items():
        for devices, kinds in row["devices"].items():
            even, skewed = kinds["even"], kinds["skewed"]
            sent = [even[kind] / 2**20 for kind in ("replicated", "sharded", "expert parallel")]
            busiest = [f"{kind['busiest device over the mean']:.1f}" for kind in (even, skewed)]
            held = [f"{even[f'held, {kind}'] / 2**20:.0f}" for kind in ("replicated", "expert parallel")]
            cells = [*(f"{v:.0f}" for v in sent), " / ".join(busiest), " / ".join(held), f"{row['even_rows']:.0f}"]
            rows.append([f"{bank}, k = {row['k']}", devices, *cells])
    header = ["experts", "devices", "replicated", "sharded", "expert parallel"]
    header += ["busiest over mean, even / skewed", "MB held, replicated / spread", "rows at which both are equal"]
    line = made_by("expert_parallel").replace("(results/", "(../experiments/results/")
    return (
        f"{table(header, rows)}\n\nMB that a device sends for one layer of {settings['features']} × "
        f"{settings['features']}, {settings['rows_per_device']} rows on each device.\n\n{line}"
    )


def demo() -> str:
    """Mixtures beside LoRA on tasks that go together, and on tasks that contradict each other."""
    found = result("demo")
    rows = []
    for name in found["settings"]["A"]:
        cells = [f"`{name}`" if name.islower() else name]
        for setting in ("A", "B"):
            row = found["settings"][setting][name]
            cells.append(f"{100 * row['mean']:.1f}")
            for other in ("LoRA", "LoRA, told"):
                one = row["minus"].get(other)
                cells.append("" if one is None else f"{100 * one['mean']:+z.1f} ± {100 * one['half']:.1f}")
        rows.append(cells)
    header = ["accuracy, %"]
    for setting in ("together", "opposed"):
        header += [setting, f"{setting}: minus LoRA", f"{setting}: minus LoRA, told"]
    return f"{table(header, rows)}\n\n{made_by('demo')}; rates: {made_by('demo_tuning')}"


def federated() -> str:
    """What clients send and get in a round."""
    found = result("federated")
    study = found["simulation"]
    rows = []
    for arm, row in study["arms"].items():
        ranks = sorted({*row["ranks"]}, reverse=True)
        rows.append(
            [
                f"`{arm}`",
                ", ".join(map(str, ranks)),
                f"{row['expert_bytes_up_a_client']:,}",
                f"{row['bytes_up_a_round'][-1] / 1e6:.2f}",
                f"{row['bytes_down_a_round'][-1] / 1e6:.2f}",
            ]
        )
    header = ["method", "ranks of clients", "bytes of experts that a client sends", "MB up a round", "MB down a round"]
    settings = study["settings"]
    line = made_by("federated").replace("(results/", "(../experiments/results/")
    return (
        f"{table(header, rows)}\n\n{settings['clients']} clients, {study['arms']['fedsb']['layers']} layers of a small "
        "encoder, heads included in the MB; the client of the largest rank in the third column. All of it, with a "
        f"server and two clients as processes, took {found['seconds']:.0f} s.\n\n{line}"
    )


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        whole_steps,
        one_layer,
        generation,
        decoding,
        memory,
        launching,
        merging,
        around,
        cross_domain,
        granularity,
        merged_accuracy,
        expert_parallel,
        demo,
        federated,
        family_costs,
        family_learning,
        calibrated,
        reasoning,
        smaller_base,
    )
}


def filled(page: str) -> str:
    """Return a page with every table between its marks made anew.

    Raises:
        KeyError: a mark names no table.
    """

    def made(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
