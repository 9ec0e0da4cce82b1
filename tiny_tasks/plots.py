"""Pictures, where matplotlib is installed: the curve of a run, and what compare draws of many."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import smepo
from tiny_tasks.tables import by_arm

# Okabe and Ito's colours, told apart by the colour-blind; the dashes tell them apart in print.
STYLES = {
    "none": ("GRPO", "#000000", "-"),
    "full": ("full trace", "#D55E00", "--"),
    "prefix": ("prefix", "#CC79A7", ":"),
    "random": ("random mask", "#E69F00", "-."),
    "semantic": ("SMEPO", "#0072B2", "-"),
    "on-failure": ("SMEPO on failure", "#009E73", "-"),
    "fraction": ("SMEPO, half the prompts", "#56B4E9", "-."),
    "expert-loss": ("SMEPO + expert loss", "#999999", ":"),
}
FOUR = ("none", "full", "semantic", "on-failure")


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


# ---- Many runs, as compare hands them over: an arm's runs differ in the seed alone ---------------


def points(runs: list, unit: str) -> np.ndarray:
    """When accuracy was measured, a `step` or in `seconds`: the mean over the runs."""
    rows = []
    for run in runs:
        rows.append([point[unit] for point in run.points])
    return np.mean(rows, 0)


def accuracy(runs: list, level: str) -> np.ndarray:
    rows = []
    for run in runs:
        rows.append([point["accuracy"][level] for point in run.points])
    return np.array(rows)


def smooth(runs: list, name: str, width: int) -> np.ndarray:
    """Each value of a curve becomes the mean of the last `width`."""
    rows = []
    for run in runs:
        curve = run.curve[name]
        starts = [max(0, end - width) for end in range(1, len(curve) + 1)]
        rows.append([np.mean(curve[a : i + 1]) for i, a in enumerate(starts)])
    return np.array(rows)


def frame(axes, title: str, xlabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)


def draw_learning(runs: list, path: Path) -> None:
    """Unguided accuracy of four arms against seconds: each seed thin, their mean thick."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    level = runs[0].level()
    for arm, group in by_arm(runs).items():
        if arm in FOUR:
            thin_and_thick(left, arm, group, level)
            thin_and_thick(right, arm, group, "mean")
    frame(left, f"on what it trains on, k = {level}", "training seconds")
    frame(right, "mean of all difficulties", "training seconds")
    left.set_ylabel("unguided accuracy")
    left.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def thin_and_thick(axes, arm: str, runs: list, level: str) -> None:
    label, colour, dashes = STYLES[arm]
    for run in runs:
        seconds = points([run], "seconds")
        axes.plot(seconds, accuracy([run], level)[0], colour, linewidth=0.6, alpha=0.4)
    seconds, mean = points(runs, "seconds"), accuracy(runs, level).mean(0)
    axes.plot(seconds, mean, colour, linestyle=dashes, linewidth=2.4, label=label)


def band(axes, arm: str, x, rows: np.ndarray, dashes: str | None = None) -> None:
    """The mean over seeds, and a band of one standard error."""
    label, colour, style = STYLES[arm]
    mean = rows.mean(0)
    error = np.zeros(len(mean))
    if len(rows) > 1:
        error = rows.std(0, ddof=1) / len(rows) ** 0.5
    axes.plot(x, mean, colour, linestyle=dashes or style, label=label, linewidth=1.6)
    axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15)


def draw_compare(runs: list, path: Path) -> None:
    """Training reward and unguided accuracy of all arms; and the groups without a signal."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    reward, unguided, wasted = figure.subplots(1, 3)
    for arm, group in by_arm(runs).items():
        steps = range(1, group[0].steps + 1)
        band(reward, arm, steps, smooth(group, "reward", 5))
        band(unguided, arm, points(group, "step"), accuracy(group, "mean"))
        band(wasted, arm, steps, smooth(group, "zero_variance_wrong", 10), "-")
        band(wasted, arm, steps, smooth(group, "zero_variance_right", 10), ":")
    frame(reward, "training reward, as guided", "step")
    frame(unguided, "held-out accuracy, unguided", "step")
    frame(wasted, "groups all wrong (—), all right (···)", "step")
    unguided.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def draw_sweep(kinds: dict[str, list], path: Path) -> None:
    """A panel for each kind of training problems: where the curves cross, GRPO has caught up."""
    figure = Figure(figsize=(3 * len(kinds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for arm, group in by_arm(kinds[kind]).items():
            band(axes, arm, points(group, "step"), accuracy(group, "mean"))
        frame(axes, kind, "step")
    panels[0].set_ylabel("unguided accuracy, mean")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
