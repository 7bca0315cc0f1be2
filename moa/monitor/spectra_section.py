"""The part of a run's page on the spectra of its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .expert_spectra import LayerSpectra
from .figures import rank_figure
from .page_parts import page_text, picture, wide

_NOTE = (
    "Effective rank exp(S) of each expert's weight change, S the entropy of its squared singular values: 1 is one "
    "direction. Overlap is the mean cos² of the angles between two experts' spaces, 0 for orthogonal ones, 1 where one "
    "lies within the other; mean and largest over pairs. The mixed change is that of a constant routing, or where the "
    "routing depends on the input, the experts' sum weighed by their load."
)


def spectra_section(layers: Mapping[str, LayerSpectra]) -> str:
    """Return a folded section: a figure and a table of the layers' spectra; layers that have none say why.

    Args:
        layers: name -> what `expert_spectra` found.
    """
    drawn = {name: own.ranks for name, own in layers.items() if not own.why_not}
    head = (
        "<tr><th class=name>layer</th><th>effective rank<br>mean</th><th>of experts</th><th>entropy<br>(nats)</th>"
        "<th>overlap of<br>outputs</th><th>overlap of<br>inputs</th><th>mixed<br>change</th></tr>"
    )
    rows = [_row(name, own) for name, own in layers.items() if not own.why_not]
    parts = [f"<p class=note>{_NOTE}</p>"]
    if drawn:
        parts += [picture(rank_figure(drawn), "effective rank of each layer and expert")]
        parts += [wide(f"<table>{head}\n" + "\n".join(rows) + "</table>")]
    reasons: dict[str, list[str]] = {}
    for name, own in layers.items():
        if own.why_not:
            reasons.setdefault(own.why_not, []).append(name)
    parts += [f"<p class=note>{_named(names)}: {page_text(why)}</p>" for why, names in reasons.items()]
    return "<details><summary>Spectra of the experts</summary>\n" + "\n".join(parts) + "</details>"


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
