"""Pictures, where matplotlib is installed: the curve of a run, and what compare draws of many."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

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
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    points = [record for record in steps if "pass@1" in record]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    rewards = [record["reward"] for record in steps[1:]]
    axes.plot(range(1, len(steps)), rewards, "0.6", label="training reward, as guided")
    means, errors = zip(*(record["pass@1"]["mean"] for record in points), strict=True)
    at = [record["step"] for record in points]
    axes.errorbar(at, means, errors, marker="o", label="unguided accuracy")
    axes.set(xlabel="step", ylim=(0, 1), title=folder.name)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=150)


# ---- Many runs, as compare hands them over: an arm's runs differ in the seed alone ---------------


def column(runs: list, name: str) -> np.ndarray:
    """Step or seconds at the points of the accuracy curve, the mean over seeds."""
    return np.mean([[point[name] for point in run.points] for run in runs], axis=0)


def accuracy(runs: list, level: str) -> np.ndarray:
    return np.array([[point["accuracy"][level] for point in run.points] for run in runs])


def smooth(curves: list[list[float]], width: int) -> np.ndarray:
    """Each value becomes the mean of the last `width`."""
    sums = np.cumsum(np.pad(curves, ((0, 0), (width, 0))), axis=1)
    counts = np.minimum(np.arange(1, len(curves[0]) + 1), width)
    return (sums[:, width:] - sums[:, :-width]) / counts


def draw_learning(runs: list, path: Path) -> None:
    """Unguided accuracy of four arms against training seconds: each seed thin, their mean thick."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    arms, level = by_arm(runs), runs[0].level()
    titles = {level: f"on what it trains on, k = {level}", "mean": "mean of all difficulties"}
    for axes, (level, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for arm in FOUR:
            if arm in arms:
                thin_and_thick(axes, arm, arms[arm], level)
        axes.set(title=title, xlabel="training seconds", ylabel="unguided accuracy", ylim=(0, 1))
        axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def thin_and_thick(axes, arm: str, runs: list, level: str) -> None:
    label, colour, dashes = STYLES[arm]
    for run in runs:
        seconds = column([run], "seconds")
        axes.plot(seconds, accuracy([run], level)[0], colour, linewidth=0.6, alpha=0.4)
    seconds, mean = column(runs, "seconds"), accuracy(runs, level).mean(0)
    axes.plot(seconds, mean, colour, linestyle=dashes, linewidth=2.4, label=label)


def band(axes, arm: str, x, rows: np.ndarray, dashes: str | None = None) -> None:
    """The mean over seeds, and a band of one standard error."""
    label, colour, style = STYLES[arm]
    mean, error = rows.mean(0), np.zeros(len(rows[0]))
    if len(rows) > 1:
        error = rows.std(0, ddof=1) / len(rows) ** 0.5
    axes.plot(x, mean, color=colour, linestyle=dashes or style, label=label, linewidth=1.6)
    axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15)


def draw_compare(runs: list, path: Path) -> None:
    """Training reward and unguided accuracy of all arms; and the groups without a signal."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    reward, unguided, wasted = figure.subplots(1, 3)
    for arm, group in by_arm(runs).items():
        steps = range(1, group[0].steps + 1)
        band(reward, arm, steps, smooth([run.curve["reward"] for run in group], 5))
        band(unguided, arm, column(group, "seconds"), accuracy(group, "mean"))
        for kind, dashes in (("wrong", "-"), ("right", ":")):
            curves = [run.curve[f"zero_variance_{kind}"] for run in group]
            band(wasted, arm, steps, smooth(curves, 10), dashes)
    reward.set(title="training reward, as guided", xlabel="step", ylim=(0, 1))
    unguided.set(title="held-out accuracy, unguided", xlabel="training seconds", ylim=(0, 1))
    wasted.set(title="groups all wrong (—), all right (···)", xlabel="step", ylim=(0, 1))
    unguided.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def draw_sweep(kinds: dict[str, list], path: Path) -> None:
    """A panel for each kind of training problems: where the curves cross, GRPO has caught up."""
    figure = Figure(figsize=(3 * len(kinds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (title, group) in zip(panels, kinds.items(), strict=True):
        for arm, runs in by_arm(group).items():
            band(axes, arm, column(runs, "seconds"), accuracy(runs, "mean"))
        axes.set(title=title, xlabel="training seconds")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="unguided accuracy, mean")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
