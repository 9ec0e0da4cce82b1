"""Pictures, where matplotlib is installed: the curve of a run, and what compare draws of many."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

import smepo
from tiny_tasks.tables import by_arm

# Okabe and Ito's colours, told apart by the colour-blind; the dashes tell them apart in print.
STYLES = {
    "grpo": ("GRPO", "#000000", "-"),
    "full": ("full trace", "#D55E00", "--"),
    "prefix": ("prefix", "#CC79A7", ":"),
    "random": ("random mask", "#E69F00", "-."),
    "smepo": ("SMEPO", "#0072B2", "-"),
    "on-failure": ("SMEPO on failure", "#56B4E9", "-"),
    "fade": ("SMEPO, fading", "#009E73", "-"),
    "grpo+expert": ("GRPO + expert loss", "#999999", "-"),
    "fade+expert": ("fading + expert loss", "#999999", ":"),
}


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
    left, right = figure.subplots(1, 2)
    hardest = list(results[0]["final"])[-2]
    for arm, runs in by_arm(results).items():
        thin_and_thick(left, arm, runs, hardest)
        thin_and_thick(right, arm, runs, "mean")
    frame(left, f"the hardest problems, k = {hardest}", "seconds of the processor")
    frame(right, "mean of all difficulties", "seconds of the processor")
    left.set_ylabel("accuracy without a guide")
    left.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def thin_and_thick(axes, arm: str, runs: list[dict], level: str) -> None:
    label, colour, dashes = STYLES[arm]
    seconds = [[point["seconds"] for point in run["points"]] for run in runs]
    accuracy = [[point[level] for point in run["points"]] for run in runs]
    for x, y in zip(seconds, accuracy, strict=True):
        axes.plot(x, y, colour, linewidth=0.6, alpha=0.4)
    axes.plot(means(seconds), means(accuracy), colour, linestyle=dashes, linewidth=2.4, label=label)


def means(rows: list[list[float]]) -> list[float]:
    return [mean(column) for column in zip(*rows, strict=True)]
