"""Draw the losses of several runs in one picture, over steps and over time.

    python dev/plot_runs.py out1 out2 --output runs.png

A run is the output folder of train_gpt2.py or train_gpt2_gpu.py, or the path of a log.csv; it may still be training. The faint
lines are the training loss of each step, the strong lines its running mean over 2 % of the longest run's steps. The points are
the validation loss. Time counts training steps only, without validation and sampling.
"""
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from cli import OneLineParser, UserError, run_program
from files import atomic_file, open_file

OUT_OF_MEMORY_HINT = "draw fewer runs"
WINDOW = 0.02             # of the running mean, as a fraction of the longest run
LONG_LABEL = 60           # characters; two labels this long do not fit side by side
MAX_NUMBER = 1e12         # larger numbers in a log are refused
COLUMNS = ("step", "train_loss", "val_loss", "milliseconds")
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}


class Run(NamedTuple):
    """One log.csv: n training steps and m validations, each with its step, the seconds of training so far and the loss."""
    name: str
    training: np.ndarray      # (n, 3) float64: step, seconds, loss
    validation: np.ndarray    # (m, 3)


def read_run(path):
    """Read the Run of a folder or a log.csv. Raises UserError if it is missing, or if any line but the last is malformed."""
    folder, path = (path, path / "log.csv") if path.is_dir() else (path.parent, path)
    try:
        with open_file(path, "name the output folder of a run, or its log.csv", stream=True) as file:
            text = file.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8, expected the log.csv of a run") from error
    header, *lines = text.split("\n")[:-1] or [""]      # a line without its newline is still being written
    columns = header.split(",")
    if not set(COLUMNS).issubset(columns):
        raise UserError(f"{path} begins with {header[:80]!r}, expected a log.csv with the columns {', '.join(COLUMNS)}")

    training, validation, seconds = [], [], 0.0
    for number, line in enumerate(lines, 2):
        fields = line.split(",")
        try:
            row = {name: float(field) for name, field in zip(columns, fields) if field and name in COLUMNS}
        except ValueError:
            row = {}
        if len(fields) != len(columns) or "step" not in row or not all(0 <= value <= MAX_NUMBER for value in row.values()):
            raise UserError(f"{path}, line {number:,}: found {line[:80]!r}, expected {len(columns)} numbers from 0 to "
                            f"{MAX_NUMBER:g}; fields may be empty, except the step")
        seconds += row.get("milliseconds", 0.0) / 1000
        for points, name in ((training, "train_loss"), (validation, "val_loss")):
            if name in row:
                points.append((row["step"], seconds, row[name]))
    if not training:
        raise UserError(f"{path} holds no training step yet; wait for the first, or leave it out")
    name = folder.resolve().name if path.name == "log.csv" else path.stem
    return Run(name, np.array(training), np.array(validation).reshape(-1, 3))


def running_mean(values, window):
    """The mean of each value and up to window - 1 values before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs, output):
    """Draw the runs and write the PNG. Raises UserError if it cannot be written."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, round(WINDOW * max(len(run.training) for run in runs)))
    smoothed = [running_mean(run.training[:, 2], window) for run in runs]
    labels = [f"{run.name}: training {smooth[-1]:.3f}" +
              (f", validation {run.validation[-1, 2]:.3f}" if len(run.validation) else "")
              for run, smooth in zip(runs, smoothed)]
    legend_columns = 2 if max(map(len, labels)) < LONG_LABEL else 1
    longest = max(run.training[-1, 1] for run in runs)
    unit = next((unit for unit, seconds in UNITS.items() if longest >= 2 * seconds), "seconds")
    height = 4 + 0.22 * math.ceil(len(runs) / legend_columns)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    lines = []
    for i, (run, smooth) in enumerate(zip(runs, smoothed)):
        color = f"C{i % 10}"
        for axes, column, scale in ((panels[0], 0, 1), (panels[1], 1, UNITS[unit])):
            axes.plot(run.training[:, column] / scale, run.training[:, 2], color=color, linewidth=0.5, alpha=0.2)
            line, = axes.plot(run.training[:, column] / scale, smooth, color=color, linewidth=1.5)
            axes.plot(run.validation[:, column] / scale, run.validation[:, 2], color=color, linestyle="none",
                      marker="o", markersize=5, markeredgecolor="black", zorder=3)
        lines.append(line)
    panels[0].set(xlabel="step", ylabel="loss (nats per token)", ylim=visible_losses(runs, smoothed))
    panels[1].set(xlabel=f"{unit} of training")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    mean = f"mean of {window:,} steps" if window > 1 else "each step"
    figure.suptitle(f"training loss (lines: {mean}) and validation loss (points)", fontsize=11)
    legend = figure.legend(lines, map(str, range(len(lines))), loc="outside lower center", ncols=legend_columns,
                           frameon=False)
    for text, label in zip(legend.get_texts(), labels):
        text.set(text=label, parse_math=False)      # a folder's name may contain _ or $
    with atomic_file(output) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    print(f"wrote {output}")


def visible_losses(runs, smoothed):
    """The range of losses to show. It leaves out the steep fall in a run's first tenth, which would flatten everything else."""
    lowest = min(points[:, 2].min() for run in runs for points in (run.training, run.validation) if len(points))
    later = []
    for run, smooth in zip(runs, smoothed):
        tenth = run.training[-1, 0] / 10
        later += [smooth[run.training[:, 0] >= tenth], run.validation[run.validation[:, 0] >= tenth, 2]]
    highest = np.concatenate(later).max()
    margin = 0.05 * (highest - lowest) or 0.5
    return lowest - margin, highest + margin


def main():
    parser = OneLineParser(description="Draw the losses of several runs in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output folder, or its log.csv")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the PNG to write")
    options = parser.parse_args()
    runs = [read_run(path) for path in options.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(path)) for run, path in zip(runs, options.runs)]
    draw(runs, options.output)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
