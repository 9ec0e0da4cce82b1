"""Pictures, where matplotlib is installed: the curve of a run, and what compare draws of many."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

import smepo
from tiny_tasks.tables import by_arm

# Okabe and Ito's colours, told apart by the colour-blind; the dashes tell them apart in print.
COLOURS = ["#000000", "#D55E00", "#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#009E73"]
DASHES = ["-", "--", ":", "-."]


def draw_run(folder: Path) -> None:
    """curve.png: training reward and unguided accuracy against steps."""
    steps = smepo.read_records(folder / "metrics.jsonl")
    points = [record for record in steps if "pass@1" in record]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    rewards = [record["reward"] for record in steps[1:]]
    axes.plot(range(1, len(steps)), rewards, "0.6", label="training reward, as guided")
    means, errors = zip(*(record["pass@1"]["mean"] for record in points), strict=True)
    at = [record["step"] for record in points]
    axes.errorbar(at, means, errors, marker="o", label="unguided accuracy")
    frame(axes, folder.name, "step")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=150)


def frame(axes, title: str, xlabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)


def draw_comparison(results: list[dict], path: Path) -> None:
    """Unguided accuracy against seconds: each seed thin, an arm's mean thick."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    hardest = list(results[0]["final"])[-2]
    titles = {hardest: f"the hardest problems, k = {hardest}", "mean": "mean of all difficulties"}
    for axes, level in zip(figure.subplots(1, 2), titles, strict=True):
        for i, (arm, runs) in enumerate(by_arm(results).items()):
            style = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4]}
            thin_and_thick(axes, arm, runs, level, style)
        frame(axes, titles[level], "seconds of the processor")
        axes.set_ylabel("accuracy without a guide")
    figure.axes[0].legend(loc="upper left")
    figure.savefig(path, dpi=150)


def thin_and_thick(axes, arm: str, runs: list[dict], level: str, style: dict) -> None:
    seconds = [[point["seconds"] for point in run["points"]] for run in runs]
    accuracy = [[point[level] for point in run["points"]] for run in runs]
    for x, y in zip(seconds, accuracy, strict=True):
        axes.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.4)
    axes.plot(means(seconds), means(accuracy), linewidth=2.4, label=arm, **style)


def means(rows: list[list[float]]) -> list[float]:
    return [mean(column) for column in zip(*rows, strict=True)]
