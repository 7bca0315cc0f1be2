"""What a run's routing looked like: a static page (one file, no network), and a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigError, shown
from ..model.build import load
from ..model.moa_model import MoAModel
from .attention_spectra import Batches
from .expert_spectra import expert_spectra
from .figures import routing_figure, short_names
from .page_parts import page_text, picture, wide
from .runlog import FILE, LogStep, read_log
from .spectra_section import rows_part, spectra_section
from .statistics import LayerLoad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
CHECKPOINT = "model"  # in the folder of a run
_BARS = " ▁▂▃▄▅▆▇█"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .15rem .6rem; text-align: right; }
th { border-bottom: 1px solid #999; text-align: right; vertical-align: bottom; } td.name, th.name { text-align: left; }
td.name { font-family: ui-monospace, monospace; } tr:nth-child(even) { background: #f6f6f6; }
.bars { display: flex; align-items: flex-end; height: 26px; gap: 1px; position: relative; }
.bars i { flex: none; width: 9px; background: #31688e; min-height: 2px; }
.bars i.dead { background: #d1495b; }
.bars b { position: absolute; left: 0; right: 0; bottom: 50%; border-top: 1px dotted #666; }
.warning { border-left: 4px solid #d1495b; padding: .3rem .8rem; background: #fdf1f2; margin: .4rem 0; }
.note { color: #555; } img { max-width: 100%; } body { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .wide td, .wide th { overflow-wrap: normal; } .wide td.name { min-width: 8rem; }
.wide td.name { overflow-wrap: anywhere; max-width: 24rem; } summary { cursor: pointer; margin-top: 2rem; }
"""


def report(run_dir: str | Path, spectra: bool = False, batches: Callable[[MoAModel], Batches] | None = None) -> Path:
    """Write RUN_DIR/report.html and return its path.

    Reads `routing.jsonl` (from `RoutingMonitor`) and, where they are there, `trainer_state.json` (of the folder or
    its newest checkpoint) and `results.json`. The page needs no network and no scripts; loads are (E,) per layer.

    Args:
        run_dir: folder of a run.
        spectra: load its checkpoint, and show the singular values of its experts, too.
        batches: model -> inputs (B, S) of it by task, labels included; with spectra it adds those of attention outputs
            and the cosines between the tasks' gradients.

    Raises:
        ConfigError: no such folder, no run in it, or a file that cannot be read.
        CheckpointError: spectra are asked for, and there is no checkpoint, or its base is not there.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: give the output folder of a run.")
    if not (folder / FILE).is_file():
        nearby = sorted(str(p.parent) for p in folder.glob(f"*/{FILE}"))[:5]
        hint = f" Did you mean {' or '.join(nearby)}?" if nearby else ""
        raise ConfigError(
            f"{folder} holds no run: {FILE} is missing, which moa.RoutingMonitor writes while training.{hint}"
        )
    steps = read_log(folder / FILE)
    if not steps:
        raise ConfigError(f"{folder / FILE} has no log step yet: let the run reach its first one.")
    history = _history(folder)
    results = _read_json(folder / "results.json") if (folder / "results.json").is_file() else None
    section = ""
    if spectra:
        loads = {name: layer.load for name, layer in steps[-1].layers.items()}
        model = load(folder / CHECKPOINT)
        section = spectra_section(expert_spectra(model, loads), rows_part(model, batches(model)) if batches else "")
    page = folder / PAGE
    page.write_text(_page(folder.resolve().name, steps, history, results, section), encoding="utf-8")
    return page


def _history(folder: Path) -> list[dict[str, Any]]:
    """Return Trainer's log history, [] where there is none."""
    checkpoints = [p for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    checkpoints.sort(key=lambda p: int(p.parent.name[11:]), reverse=True)
    for path in (folder / "trainer_state.json", *checkpoints):
        if path.is_file():
            state = _read_json(path)
            if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
                raise ConfigError(f"{path} is not a trainer state: it has no log_history.")
            return [row for row in state["log_history"] if isinstance(row, dict) and _are_numbers(row, path)]
    return []


def _are_numbers(row: dict[str, Any], path: Path) -> bool:
    """Check what is drawn of a row of Trainer's history."""
    for key in ("step", "loss", "eval_loss"):
        value = row.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise ConfigError(f"{path}: {key} in log_history must be a number, got {shown(repr(value))}.")
    return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"{path} is not usable JSON: it is nested too deep.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): it may have been cut short.") from error


def _page(name: str, steps: list[LogStep], history: list[dict[str, Any]], results: Any, section: str) -> str:
    last = steps[-1]
    first = steps[-2].step if len(steps) > 1 else 0
    window = f"optimizer steps {first + 1} to {last.step}"
    parts = [
        f"<h1>Routing of {page_text(name)}</h1>",
        f"<p>{_inference(results)}{_summary(last)}</p>",
        _warnings(steps),
    ]
    parts += [_scores(results)]
    parts += [f"<h2>Load per layer and expert</h2><p class=note>{window}</p>"]
    parts += [picture(routing_figure({n: x.load for n, x in last.layers.items()}), "load of each layer and expert")]
    if last.by_task:
        parts += [f"<h2>Load per task</h2><p class=note>{window}</p>", _task_figure(last)]
    parts += ["<h2>Loss</h2>", _loss_figure(steps, history)]
    parts += ["<h2>Over time</h2>", _time_figure(steps)]
    parts += [f"<h2>Layers</h2><p class=note>{window}. Bars: load per expert; the dotted line is the even share, full "
              "height twice of it or more; red experts are dead.</p>", _layer_table(last.layers)]  # fmt: skip
    parts += [section]
    if results is not None:
        parts += [f"<details><summary>All of results.json</summary>\n{wide(_tree(results))}</details>"]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>Routing of {page_text(name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _inference(results: Any) -> str:
    """Return the routing used at inference in words, as `results.json` has it; nothing where it has none."""
    layers = results.get("routing") if isinstance(results, dict) else None
    rows = layers.values() if isinstance(layers, dict) else ()
    values = [row.get("effective_fraction") for row in rows if isinstance(row, dict)]
    numbers = [value for value in values if isinstance(value, float)]
    if not numbers:
        return ""
    return (
        f"Effective experts of the routing used at inference, exp(H)/E of the load on the evaluation rows: mean "
        f"{100 * sum(numbers) / len(numbers):.1f} %, least {100 * min(numbers):.1f} %.<br>"
    )


def _scores(results: Any) -> str:
    """Return the scores as a table, a line per task and measure, a column per model; nothing where there are none."""
    scores = results.get("scores") if isinstance(results, dict) else None
    if not isinstance(scores, dict):
        return ""
    cells = {
        (str(task), str(measure)): value
        for rows in scores.values()
        for task, row in (rows.items() if isinstance(rows, dict) else ())
        for measure, value in (row.items() if isinstance(row, dict) else ())
        if isinstance(value, int | float)
    }
    head = "".join(f"<th>{page_text(model)}</th>" for model in scores)
    lines = []
    for task, measure in cells:
        values = [_at(rows, task, measure) for rows in scores.values()]
        lines.append(
            f"<tr><td class=name>{page_text(task)}</td><td class=name>{page_text(measure)}</td>{''.join(values)}</tr>"
        )
    table = f"<table><tr><th class=name>task</th><th class=name>measure</th>{head}</tr>\n" + "\n".join(lines)
    return f"<h2>Scores</h2>{wide(table + '</table>')}" if lines else ""


def _at(rows: Any, task: str, measure: str) -> str:
    row = rows.get(task) if isinstance(rows, dict) else None
    value = row.get(measure) if isinstance(row, dict) else None
    return f"<td>{f'{value:.4g}' if isinstance(value, int | float) else ''}</td>"


def _summary(last: LogStep) -> str:
    layers = list(last.layers.values())
    measures = [layer.measures() for layer in layers]
    worst = min(last.layers, key=lambda name: last.layers[name].measures()["effective_fraction"])
    fraction = [m["effective_fraction"] for m in measures]
    dead = sum(round(m["dead_fraction"] * layer.n_experts) for m, layer in zip(measures, layers, strict=True))
    gradient = "" if last.router_grad_norm is None else f" Router gradient norm {last.router_grad_norm:.3g}."
    return (
        f"{len(measures)} layers after {last.step} optimizer steps. Effective experts of the training routing, "
        f"exp(H)/E of the load: mean "
        f"{100 * sum(fraction) / len(fraction):.1f} %, least {100 * min(fraction):.1f} % in "
        f"<code>{page_text(worst)}</code>. Dead experts: "
        f"{dead} of {sum(layer.n_experts for layer in layers)}.{gradient}"
    )


def _warnings(steps: Iterable[LogStep]) -> str:
    told = [(step.step, message) for step in steps for message in step.warnings]
    if not told:
        return "<p class=note>No layer collapsed.</p>"
    return "\n".join(f'<div class="warning">Step {step}: {page_text(message)}</div>' for step, message in told)


def _layer_table(layers: Mapping[str, LayerLoad]) -> str:
    head = (
        "<tr><th class=name>layer</th><th>effective<br>experts</th><th>of</th><th>entropy<br>(nats)</th>"
        "<th>largest<br>share</th><th>dead</th><th>MaxVio</th><th class=name>load</th></tr>"
    )
    rows = []
    for name, layer in layers.items():
        m = layer.measures()
        rows.append(
            f"<tr><td class=name>{page_text(name)}</td><td>{m['effective_experts']:.2f}</td>"
            f"<td>{layer.n_experts}</td><td>{m['load_entropy']:.3f}</td><td>{100 * m['largest_share']:.1f} %</td>"
            f"<td>{100 * m['dead_fraction']:.0f} %</td><td>{m['max_violation']:.2f}</td><td>{_bars(layer)}</td></tr>"
        )
    return wide(f"<table>{head}\n" + "\n".join(rows) + "</table>")


def _bars(layer: LayerLoad) -> str:
    bars = []
    for expert, share in enumerate(layer.load.tolist()):
        relative = share * layer.n_experts
        dead = ' class="dead"' if relative < layer.dead_share else ""
        height = 50 * min(relative, 2)
        bars.append(f'<i{dead} style="height:{height:.0f}%" title="expert {expert}: {100 * share:.1f} %"></i>')
    return f'<div class="bars">{"".join(bars)}<b></b></div>'


def _tree(value: Any) -> str:
    """Return plain JSON values as nested tables."""
    if isinstance(value, dict):
        rows = "".join(f"<tr><td class=name>{page_text(k)}</td><td>{_tree(v)}</td></tr>" for k, v in value.items())
        return f"<table>{rows}</table>"
    if isinstance(value, list):
        return ", ".join(_tree(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else page_text(value)


def load_bars(load: Tensor) -> str:
    """Return a load (E,) as one character per expert: half height is the even share, full height twice it or more."""
    relative = (load * load.shape[-1]).clamp(max=2)
    return "".join(_BARS[max(1, round(float(r) * 4))] if r > 0 else _BARS[0] for r in relative)


def routing_table(layers: Mapping[str, LayerLoad]) -> str:
    """Return a text table, a line per layer: effective experts, largest share, dead experts, loads (E,) as bars."""
    width = max([len("layer"), *(len(name) for name in layers)])
    lines = [f"{'layer':<{width}}  effective  largest   dead  load (half height = even share)"]
    for name, layer in layers.items():
        m = layer.measures()
        effective = f"{m['effective_experts']:.2f}/{layer.n_experts}"
        lines.append(
            f"{name:<{width}}  {effective:>9}  {100 * m['largest_share']:6.1f}%  {100 * m['dead_fraction']:4.0f}%"
            f"  |{load_bars(layer.load)}|"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- figures


def _task_figure(last: LogStep) -> str:
    figure = routing_figure({n: x.load for n, x in last.layers.items()}, per_task=last.by_task)
    return picture(figure, "load of each layer and expert, per task")


def _lines_figure(panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6 * panels, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.set_xlabel("optimizer step")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.grid(alpha=0.3)
    return figure, axes


def _loss_figure(steps: list[LogStep], history: list[dict[str, Any]]) -> str:
    """Return Trainer's loss curves, or the monitor's task loss where there are none; and the routers' own losses."""
    own = sorted({name for step in steps for name in step.losses} - {"task", "policy"})
    figure, axes = _lines_figure(2 if own else 1)
    curves = {
        label: [(row["step"], row[key]) for row in history if key in row and "step" in row]
        for key, label in (("loss", "training"), ("eval_loss", "evaluation"))
    }
    if not curves["training"]:
        curves["task loss"] = [(step.step, step.losses["task"]) for step in steps if "task" in step.losses]
    drawn = {label: points for label, points in curves.items() if points}
    if not drawn and not own:
        return "<p class=note>No loss was recorded.</p>"
    for label, points in drawn.items():
        axes[0].plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", label=label)
    axes[0].set_ylabel("loss")
    if drawn:
        axes[0].legend()
    for name in own:
        axes[-1].plot([s.step for s in steps], [s.losses.get(name, math.nan) for s in steps], label=name)
    if own:
        axes[-1].set_ylabel("routers' losses × coefficient")
        axes[-1].legend()
    return picture(figure, "losses over optimizer steps")


def _time_figure(steps: list[LogStep]) -> str:
    """Return entropy and effective experts, one thin line per layer, their mean and the lowest layer named."""
    figure, axes = _lines_figure(2)
    x = [step.step for step in steps]
    labels = {"effective_fraction": "effective experts exp(H)/E", "load_entropy": "entropy of the load (nats)"}
    names = list(steps[-1].layers)
    short = dict(zip(names, short_names(names), strict=True))
    marker = "." if len(steps) < 40 else ""
    for axis, (what, label) in zip(axes, labels.items(), strict=True):
        curves = {
            name: [s.layers[name].measures()[what] if name in s.layers else math.nan for s in steps] for name in names
        }
        for curve in curves.values():
            axis.plot(x, curve, color="0.75", linewidth=0.7)
        lowest = min(names, key=lambda name: curves[name][-1])
        axis.plot(x, curves[lowest], color="#d1495b", marker=marker, label=f"lowest: {shown(short[lowest], 60)}")
        means = [[m for m in column if not math.isnan(m)] for column in zip(*curves.values(), strict=True)]
        mean = [sum(m) / len(m) if m else math.nan for m in means]
        axis.plot(x, mean, color="#31688e", linewidth=2, marker=marker, label="mean of layers")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        for text in axis.legend(fontsize=7).get_texts():
            text.set_parse_math(False)  # a name is text, not markup
    axes[0].set_ylim(0, 1.03)
    return picture(figure, "effective experts and entropy over optimizer steps")
