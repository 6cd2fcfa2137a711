"""Draw a run: loss and validation loss over tokens, from its metrics.jsonl.

pip install matplotlib
python docs/run_picture.py out/quickstart/run docs/images/quickstart.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def draw(run: Path, picture: Path) -> None:
    """Write `picture` (its ending says in which form) of the run in `run`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "val_loss" in row]
    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    axes.plot(*_over_tokens(steps, "loss"), color="#b9c4cf", linewidth=1, label="training")
    axes.plot(*_over_tokens(checks, "val_loss"), "o-", color="#b4561f", ms=4, label="validation")
    for row in (checks[0], checks[-1]):
        text = f"{row['val_loss']:.2f} ({row['val_bits_per_byte']:.2f} bits per byte)"
        place = (row["tokens"] / 1e6, row["val_loss"])
        last = row is checks[-1]
        offset = (-4, 12) if last else (8, -2)
        axes.annotate(
            text, place, offset, textcoords="offset points", ha="right" if last else "left"
        )
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)


def _over_tokens(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [row["tokens"] / 1e6 for row in rows], [row[key] for row in rows]


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
