"""Draws the curves of one or several training runs (needs `pip install matplotlib`).

    python tools/plot.py runs/shapes-001
    python tools/plot.py runs/ade20k-001 runs/ade20k-002 --output curves.png

They come from log.jsonl in each run's folder; a run may still be going on. A line has at most 200
points: in longer logs each point is the mean of neighboring rows.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import UserError

PANELS = {                                               # name in log.jsonl: title
    "loss": "loss: what is minimized",
    "loss_ce": "loss_ce: cross-entropy of classes",
    "loss_mask": "loss_mask: focal loss of masks",
    "loss_dice": "loss_dice: dice loss of masks",
    "matched_dice": "matched_dice: overlap of matched masks",
    "mIoU": "mIoU of held-out images (%)",
    "PQ": "PQ of held-out images (%)",
}
MAX_POINTS = 200                                         # of a line: more would only show noise


def read_log(folder):
    """-> the rows of a run's log.jsonl, dicts. UserError if there is nothing to draw."""
    path = Path(folder, "log.jsonl")
    if not path.is_file():
        raise UserError(f"{folder} has no log.jsonl: name the folder of a training run")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]    # the last may be cut off
    if not any(name in row for row in rows for name in PANELS):
        raise UserError(f"{path} has no row to draw yet: wait for the run's first logged step")
    return rows


def draw(logs):
    """logs: {label of a run: rows of its log} -> a matplotlib Figure, one panel for each value."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, LogLocator
    except ImportError as error:
        raise UserError("to draw curves, pip install matplotlib") from error

    names = [name for name in PANELS if any(name in row for rows in logs.values() for row in rows)]
    columns = min(len(names), 3 if len(names) <= 6 else 4)
    lines = math.ceil(len(names) / columns)
    last_step = max(row["step"] for rows in logs.values() for row in rows)

    figure = Figure(figsize=(4 * columns, 3 * lines + 0.4), dpi=120, layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        for label, rows in logs.items():
            steps, values = curve(rows, name)
            marker = "o" if name in ("mIoU", "PQ") else ""               # few points, maybe one
            axes.plot(steps, values, label=label, linewidth=1.4, marker=marker, markersize=4)

        axes.set_title(PANELS[name], fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_xlim(0, 1.03 * last_step)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))             # 40k
        if name.startswith("loss"):                                      # steep at first, then flat
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def curve(rows, name):
    """-> the steps of the rows that have this value, and the values: arrays of equal length."""
    points = np.array([(row["step"], row[name]) for row in rows if name in row]).reshape(-1, 2)
    if len(points) > MAX_POINTS:
        points = np.array([part.mean(0) for part in np.array_split(points, MAX_POINTS)])
    return points[:, 0], points[:, 1]


def labels_of(runs):
    """The names of the run folders; the paths as they are given where two have the same name."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else runs


def main(argv=None):
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--output", default="curves.png", metavar="FILE",
                        help="the picture; its ending decides the format (default: curves.png)")
    args = parser.parse_args(argv)

    figure = draw({label: read_log(run) for label, run in zip(labels_of(args.runs), args.runs)})
    try:
        figure.savefig(args.output)
    except ValueError as error:                                          # unknown ending
        raise UserError(f"--output {args.output}: {error}") from error
    print(f"saved {args.output}")


if __name__ == "__main__":
    from evaluate import run_command
    run_command(main)
