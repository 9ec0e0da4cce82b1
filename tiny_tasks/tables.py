"""Tables of what compare measured, in Markdown. Runs of one arm differ in the seed alone."""

from statistics import mean, median, stdev

EXPLAINED = """
Accuracy is that of held-out problems, asked without a guide, by difficulty (k); ± is one standard
error over seeds. `reward` is the training reward of the last 5 steps, with the guide where it is
shown. `seconds` are those of the processor, training alone. `leaks` is the share of shown guides
that give the answer away. `hint` is log π(o | guide) − log π(o) of right guided rollouts, in nats.
"""
EQUAL = """
At equal seconds: each arm's accuracy at the last evaluation before GRPO (same seed) has used all
of its seconds. `faster` is how many times fewer seconds than GRPO's it took to reach GRPO's own
final mean, seed by seed; `-` where it never did, which the median leaves out.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mean_error(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard error over seeds; one seed has none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    error = stdev(known) / len(known) ** 0.5
    return f"{mean(known):.{digits}f} ± {error:.{digits}f}"


def by_arm(results: list[dict]) -> dict[str, list[dict]]:
    names = dict.fromkeys(result["arm"] for result in results)
    return {name: [run for run in results if run["arm"] == name] for name in names}


def summary(results: list[dict]) -> str:
    arms, levels = by_arm(results), list(results[0]["final"])
    base = [mean_error([run["points"][0][level] for run in results]) for level in levels]
    reached, rows = [["the base", *base]], []
    for arm, runs in arms.items():
        reached.append([arm, *(mean_error([run["final"][k] for run in runs]) for k in levels)])
        row = [arm, str(len(runs)), mean_error([run["reward"] for run in runs])]
        row.append(mean_error([run["points"][-1]["seconds"] for run in runs], 0))
        row.append(mean_error([run["leak_rate"] for run in runs]))
        rows.append([*row, mean_error([run["hint_reliance"] for run in runs], 1)])
    names = [level if level == "mean" else f"k = {level}" for level in levels]
    text = table(["arm", *names], reached) + "\n"
    text += table(["arm", "seeds", "reward", "seconds", "leaks", "hint"], rows) + EXPLAINED
    if "grpo" in arms:
        text += "\n" + equal_seconds(arms, levels[-2])
    return text + "\n" + seed_by_seed(arms, levels[-2])


def equal_seconds(arms: dict[str, list[dict]], hardest: str) -> str:
    grpo = {run["seed"]: run for run in arms["grpo"]}
    rows = []
    for arm, runs in arms.items():
        pairs = [(run, grpo[run["seed"]]) for run in runs if run["seed"] in grpo]
        points = [when_grpo_ends(run, other) for run, other in pairs]
        factors = [times_faster(run, other) for run, other in pairs]
        reached = [factor for factor in factors if factor is not None]
        row = [arm]
        row += [mean_error([point[level] for point in points]) for level in (hardest, "mean")]
        row.append(f"{median(reached):.1f}" if reached else "-")
        shown = ["-" if factor is None else f"{factor:.1f}" for factor in factors]
        rows.append([*row, " ".join(shown)])
    return table(["arm", f"k = {hardest}", "mean", "faster, median", "faster"], rows) + EQUAL


def when_grpo_ends(run: dict, grpo: dict) -> dict:
    seconds = grpo["points"][-1]["seconds"]
    return [point for point in run["points"] if point["seconds"] <= seconds][-1]


def times_faster(run: dict, grpo: dict) -> float | None:
    end = grpo["points"][-1]
    reached = [point for point in run["points"][1:] if point["mean"] >= end["mean"]]
    return end["seconds"] / reached[0]["seconds"] if reached else None


def seed_by_seed(arms: dict[str, list[dict]], hardest: str) -> str:
    rows = []
    for arm, runs in arms.items():
        finals = [[f"{run['final'][level]:.2f}" for run in runs] for level in (hardest, "mean")]
        rows.append([arm, *(" ".join(final).replace("0.", ".") for final in finals)])
    return table(["arm, by seed", f"k = {hardest}", "mean"], rows)
