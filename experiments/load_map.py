"""The picture of README.md: where the tokens of five tasks go. `python -m experiments.load_map`

Trains the demo's model with `topk` on the feed-forward layers and draws the load of the last log window, as
`moa report` does. It needs what `moa demo --prepare` fetches, and some three minutes of one core.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from moa.monitor.figures import RoutingHeatmap
from moa.monitor.runlog import read_log
from moa.runs import demo

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "load.png"
TITLE = "where the tokens of each task go: load of the experts in every adapted layer"
OVERRIDES = (
    "recipe={router: topk, n_experts: 8, k: 2, rank: 8, targets: ffn}",
    "training.num_train_epochs=6",
    "training.logging_steps=32",  # one epoch
    "compare=null",
)


def draw(folder: Path) -> bytes:
    """Return the load of a run's last log window as a PNG, one panel per task."""
    from PIL import Image

    last = read_log(folder / "routing.jsonl")[-1]
    tasks = list(last.by_task)
    heatmap = RoutingHeatmap(list(last.layers), 8, tasks, TITLE, dpi=110)
    pixels = heatmap.image([last.by_task[task] for task in tasks])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Train, unless a run's folder is given, and write docs/load.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run that is there already")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    folder = options.run or demo.run("minilm", ("output=runs/load_map", *OVERRIDES)).folder
    options.out.write_bytes(draw(folder))
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
