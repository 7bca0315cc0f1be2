"""The part of a run's page on the spectra of its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .attention_spectra import Batches, attention_spectra, task_alignment
from .expert_spectra import LARGEST, LayerSpectra
from .figures import profile_figure, rank_figure
from .page_parts import page_text, picture, wide

_NOTE = (
    "Effective rank exp(S) of each expert's weight change, S the entropy of its squared singular values: 1 is one "
    "direction. Overlap is the mean cos² of the angles between two experts' spaces, 0 for orthogonal ones, 1 where one "
    "lies within the other; mean and largest over pairs. The mixed change is that of a constant routing, or where the "
    "routing depends on the input, the experts' sum weighed by their load."
)
_CUTS = (
    "Entanglement: the change as a tensor with an axis for each prime factor of its sizes, cut in two at each place, "
    "and the entropy of that cut, for an expert (their mean) and for the mixed change. A low rank shows as a valley at "
    "the cut between rows and columns."
)
_OUTPUTS = (
    "Attention outputs over the tokens of the first evaluation rows of all tasks, with the experts and without: their "
    "effective rank, and the entropy over cuts of a matrix of tokens × features."
)
_GRADIENTS = "Cosine between the gradients of the tasks' losses in the experts: below 0 the tasks pull them apart."


def spectra_section(layers: Mapping[str, LayerSpectra], shown_by_rows: str = "") -> str:
    """Return a folded section: figures and a table of the layers' spectra; layers that have none say why.

    Args:
        layers: name -> what `expert_spectra` found.
        shown_by_rows: more of the section, see `rows_part`.
    """
    drawn = {name: own for name, own in layers.items() if not own.why_not}
    head = (
        "<tr><th class=name>layer</th><th>effective rank<br>mean</th><th>of experts</th><th>entropy<br>(nats)</th>"
        "<th>overlap of<br>outputs</th><th>overlap of<br>inputs</th><th>mixed<br>change</th></tr>"
    )
    parts = [f"<p class=note>{_NOTE}</p>"]
    if drawn:
        ranks = {name: own.ranks for name, own in drawn.items()}
        rows = [_row(name, own) for name, own in drawn.items()]
        parts += [picture(rank_figure(ranks), "effective rank of each layer and expert")]
        parts += [wide(f"<table>{head}\n" + "\n".join(rows) + "</table>")]
        parts += _profiles(drawn)
    reasons: dict[str, list[str]] = {}
    for name, own in layers.items():
        if own.why_not:
            reasons.setdefault(own.why_not, []).append(name)
    parts += [f"<p class=note>{_named(names)}: {page_text(why)}</p>" for why, names in reasons.items()]
    parts += [shown_by_rows]
    return "<details><summary>Spectra of the experts</summary>\n" + "\n".join(parts) + "</details>"


def rows_part(model: MoAModel, batches: Batches) -> str:
    """Return the part of the section that takes rows: spectra of attention outputs, and the tasks' gradients.

    Args:
        model: of the run.
        batches: task -> inputs of the model, labels (B,) or (B, S) included.
    """
    parts = [f"<p class=note>{_OUTPUTS}</p>"]
    outputs = attention_spectra(model, batches)
    if outputs:
        head = "<tr><th class=name>attention</th><th>effective rank</th><th>of the base</th></tr>"
        rows = [
            f"<tr><td class=name>{page_text(name)}</td><td>{own.rank:.2f}</td><td>{own.base_rank:.2f}</td></tr>"
            for name, own in outputs.items()
        ]
        curves = {
            "with experts": {name: own.profile for name, own in outputs.items()},
            "base": {name: own.base_profile for name, own in outputs.items()},
        }
        shapes = {name: own.shape for name, own in outputs.items()}
        parts += [picture(profile_figure(shapes, curves), "entropy of attention outputs over cuts")]
        parts += [wide(f"<table>{head}\n" + "\n".join(rows) + "</table>")]
    else:
        parts += ["<p class=note>The model has no module whose class is an attention.</p>"]
    if len(batches) > 1:
        parts += [f"<p class=note>{_GRADIENTS}</p>", _alignment(model, batches)]
    return "\n".join(parts)


def _alignment(model: MoAModel, batches: Batches) -> str:
    try:
        tasks, cosines = task_alignment(model, batches)
    except ConfigError as error:  # e.g. experts that are not trained
        return f"<p class=note>{page_text(error)}</p>"
    head = "".join(f"<th>{page_text(task)}</th>" for task in tasks)
    rows = [
        f"<tr><td class=name>{page_text(task)}</td>{''.join(f'<td>{value:+.3f}</td>' for value in row)}</tr>"
        for task, row in zip(tasks, cosines.tolist(), strict=True)
    ]
    return wide(f"<table><tr><th class=name>task</th>{head}</tr>\n" + "\n".join(rows) + "</table>")


def _profiles(drawn: Mapping[str, LayerSpectra]) -> list[str]:
    """Return the figure of the layers' entropies over cuts, and which layers are left out of it."""
    curves = {
        "an expert": {name: own.profile for name, own in drawn.items()},
        "mixed change": {name: own.mixed_profile for name, own in drawn.items()},
    }
    parts = [f"<p class=note>{_CUTS}</p>"]
    if any(cuts for own in curves.values() for cuts in own.values()):
        shapes = {name: (own.shape[0], own.shape[1]) for name, own in drawn.items()}
        parts += [picture(profile_figure(shapes, curves), "entropy of changes over cuts")]
    left = [name for name, own in drawn.items() if any(own.ranks) and not own.profile]
    if left:
        parts += [f"<p class=note>{_named(left)}: not of low rank, and of more than {LARGEST:,} entries.</p>"]
    return parts


def _row(name: str, own: LayerSpectra) -> str:
    count = len(own.ranks)
    mixed = "" if own.mixed is None else f"{own.mixed:.2f} ({own.routing})"
    return (
        f"<tr><td class=name>{page_text(name)}</td><td>{sum(own.ranks) / count:.2f}</td>"
        f"<td>{min(own.ranks):.2f} to {max(own.ranks):.2f}</td><td>{sum(own.entropies) / count:.3f}</td>"
        f"<td>{_pairs(own.outputs)}</td><td>{_pairs(own.inputs)}</td><td>{mixed}</td></tr>"
    )


def _pairs(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}, {max(values):.3f}" if values else ""


def _named(names: Sequence[str]) -> str:
    """Return layers as words: the first ones, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return page_text(", ".join(names[:3])) + rest
