"""The tables of results that stand in docs/families.md; `python -m experiments.tables` writes them there."""

from __future__ import annotations

from .table_text import HERE, made_by, number, result, table


def family_costs() -> str:
    """What each family costs on an encoder and a decoder, and beside peft's own."""
    if not (HERE / "results" / "families.json").exists():
        return "Not measured yet: `python -m experiments.family_figures` measures them."
    found = result("families")
    keys = ("step_over_base", "saved_over_x", "decode_over_base", "peft_step_over_moa", "loop_step_over_moa")
    texts = []
    for kind, families in found["rows"].items():
        rows = []
        for name, row in families.items():
            cells = [f"{row['parameters']:,}" if "parameters" in row else ""]
            cells += ["" if row.get(key) is None else number(row[key]) for key in keys]
            cells.append(f"{row['checkpoint_bytes'] / 1e3:,.0f}" if "checkpoint_bytes" in row else "")
            cells.append(number(row["forward_64_over_4"]) if "forward_64_over_4" in row else "")
            rows.append([f"`{name}`", *cells])
        header = [kind, "parameters", "step / base", "kept / x", "decode / base", "peft's step / ours"]
        header += ["loop over peft's / 8 routed", "checkpoint, kB", "forward, 64 experts / 4"]
        texts.append(table(header, rows))
        texts += [f"`{name}`: {row['error']}." for name, row in families.items() if "error" in row]
    line = made_by("families").replace("(results/", "(../experiments/results/")
    return "\n\n".join([*texts, line])


def family_learning() -> str:
    """What each family learns over a frozen probe, one expert and 8."""
    if not (HERE / "results" / "family_accuracy.json").exists():
        return "Not measured yet: `python -m experiments.family_accuracy` measures it."
    found = result("family_accuracy")
    lines, rows = [], found["rows"]
    for name in sorted({name.split()[0] for name in rows} - {"probe"}):
        cells = []
        for arm in (rows[f"{name} 1"], rows[f"{name} 8"]):
            gain = f"{100 * arm['over_probe']:+z.1f} ± {100 * arm['standard_error']:.1f}"
            cells += [gain + ("" if arm["learns"] else ", not clear"), f"{arm['rate']:g}"]
        lines.append([f"`{name}`", *cells])
    n_tasks, n_seeds = len(found["settings"]["tasks"]), found["settings"]["seeds"]
    header = ["points of accuracy over the frozen probe", "one expert", "rate", "8 experts", "rate"]
    base = 100 * rows["probe"]["mean"]
    line = made_by("family_accuracy").replace("(results/", "(../experiments/results/")
    return (
        f"{table(header, lines)}\n\nMean over {n_tasks} tasks and {n_seeds} seeds, ± a standard error; the "
        f"probe has {base:.1f} %. Rates are picked on other rows.\n\n{line}"
    )
