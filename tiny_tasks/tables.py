"""Tables of what compare measured, in Markdown. Runs of the same arm differ in the seed alone."""

from statistics import mean, median, stdev


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


def by_arm(runs: list) -> dict[str, list]:
    return {run.arm: [other for other in runs if other.arm == run.arm] for run in runs}


def accuracy(runs: list, level: str, name: str = "pass@1") -> str:
    return mean_error([run.final[name][level] for run in runs])


def final_table(arms: dict[str, list]) -> str:
    """What every arm ends with, and how much it leans on the trace."""
    runs = next(iter(arms.values()))
    levels = list(runs[0].points[0]["accuracy"])  # "2", ..., "5", "mean"
    base = ["the base", ""]
    for level in levels:
        base.append(mean_error([run.points[0]["accuracy"][level] for run in runs]))
    rows = [base + [""] * 4]
    for arm, runs in arms.items():
        row = [arm]
        row.append(mean_error([mean(run.curve["reward"][-5:]) for run in runs]))
        row += [accuracy(runs, level) for level in levels]
        row.append(accuracy(runs, "mean", "pass@8"))
        row.append(mean_error([mean(run.curve["leak_rate"]) for run in runs]))
        row.append(mean_error([run.copy_rate for run in runs]))
        row.append(mean_error([run.hint_reliance for run in runs], 2))
        rows.append(row)
    header = ["arm", "training reward, last 5 steps"]
    header += [f"unguided, k = {level}" for level in levels[:-1]]
    header += ["mean", "pass@8, mean", "leak rate", "copy rate", "hint reliance, nats"]
    return table(header, rows)


def reaches(run, level: str, target: float) -> dict | None:
    """The first point of the curve at the target; who starts there is there at the next one."""
    for point in run.points[1:]:
        if point["accuracy"][level] >= target:
            return point
    return None


def speed(runs: list, grpo: list, level: str) -> list[str]:
    """Steps and seconds until a run is as good as GRPO with its seed is in the end, and how many
    times as fast as GRPO itself that is: 0 if it never is, or is no more at its own end."""
    rivals = {run.seed: run for run in grpo}
    steps, seconds, factors = [], [], []
    for run in runs:
        rival = rivals[run.seed]
        target = rival.final["pass@1"][level]
        own = reaches(rival, level, target) or rival.points[-1]
        hit = own if run is rival else reaches(run, level, target)
        if hit and run.final["pass@1"][level] >= target:
            steps.append(str(hit["step"]))
            seconds.append(f"{hit['seconds']:.0f}")
            factors.append(own["seconds"] / hit["seconds"])
        else:
            steps.append("–")
            seconds.append("–")
            factors.append(0.0)
    ahead = sum(factor > 1 for factor in factors)
    cells = [", ".join(steps), ", ".join(seconds)]
    return [*cells, f"{median(factors):.2f}", f"{ahead} of {len(factors)}"]


def when_grpo_ends(runs: list, grpo: list, level: str) -> list[str]:
    """Accuracy at the second at which GRPO with the same seed ends, and how often it is higher."""
    reached, ahead = [], 0
    for run in runs:
        (last,) = [rival.points[-1] for rival in grpo if rival.seed == run.seed]
        known = [point for point in run.points if point["seconds"] <= last["seconds"]]
        reached.append(known[-1]["accuracy"][level])
        ahead += reached[-1] > last["accuracy"][level]
    return [mean_error(reached), f"{ahead} of {len(runs)}"]


def speed_table(arms: dict[str, list], level: str) -> str:
    rows = []
    for arm, runs in arms.items():
        cells = speed(runs, arms["none"], level), when_grpo_ends(runs, arms["none"], level)
        rows.append([arm, *cells[0], *cells[1]])
    goal = level if level == "mean" else f"k = {level}"
    header = ["arm", f"steps to GRPO's final accuracy, {goal}, seed by seed", "training seconds"]
    header += ["times as fast as GRPO, median", "ahead of GRPO"]
    return table([*header, "accuracy at the second at which GRPO ends", "above GRPO"], rows)


def summary(runs: list) -> str:
    """Compared with GRPO, where it is among the arms."""
    arms = by_arm(runs)
    parts = [final_table(arms)]
    if "none" in arms:
        seeds = {run.seed for run in arms["none"]}
        paired = by_arm([run for run in runs if run.seed in seeds])
        parts += [speed_table(paired, level) for level in (runs[0].level(), "mean")]
    return "\n".join(parts)


def sweep(kinds: dict[str, list]) -> str:
    """How much faster than GRPO, by how often the base solves the training problems."""
    rows = []
    for kind, group in kinds.items():
        level = group[0].level()
        success = mean(run.points[0]["accuracy"][level] for run in group)
        arms = by_arm(group)
        for arm, runs in arms.items():
            row = [kind, f"{success:.3f}", arm]
            row.append(accuracy(runs, level))
            row.append(accuracy(runs, "mean"))
            row += speed(runs, arms["none"], "mean")[2:]
            rows.append(row)
    header = ["trained on", "of its hardest the base solves", "arm", "unguided, on these", "mean"]
    header += ["times as fast as GRPO to its mean, median", "ahead of GRPO"]
    return table(header, rows)


def rates(runs: list) -> str:
    """Unguided accuracy of each arm at each learning rate."""
    rows = []
    level = runs[0].level()
    for arm, group in by_arm(runs).items():
        for rate in sorted({run.learning_rate for run in group}):
            tried = [run for run in group if run.learning_rate == rate]
            ends = [accuracy(tried, level), accuracy(tried, "mean")]
            rows.append([arm, f"{rate:g}", *ends])
    return table(["arm", "learning rate", f"unguided, k = {level}", "mean"], rows)
