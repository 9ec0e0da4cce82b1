"""`python smepo.py compare`: every arm from the same base, measured in the same way.

One job trains one arm with one seed and leaves one JSON file in the output folder; a job whose file
is there is not run again, so the command resumes wherever it was stopped. The summary and the
pictures are made from these files alone.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import statistics
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import smepo
from tiny_tasks import files, toys
from tiny_tasks.make_tasks import TOYS

ARMS = {
    "none": {"guide": "none"},  # GRPO
    "full": {"guide": "full"},
    "prefix": {"guide": "prefix"},
    "random": {"guide": "random"},
    "semantic": {},  # SMEPO
    "on-failure": {"guide_when": "on-failure"},
    "fraction": {"guide_when": "0.5"},
    "expert-loss": {"expert_coef": 0.1},
}
QUICK, SWEPT = ("none", "full", "random", "semantic"), ("none", "semantic", "fraction")
# Where an arm's best of --rates (results/rates.md, seeds that no report uses) is not the default.
RATES = {"arithmetic": dict.fromkeys(("prefix", "semantic", "on-failure", "fraction"), 4e-4)}
KEPT = ("reward", "zero_variance_wrong", "zero_variance_right", "leak_rate", "rollouts",
        "seconds_rollout", "seconds_update")  # what a job's file keeps of each step


# ---- One job -------------------------------------------------------------------------------------


def copy_rate(model, tokenizer, problems: list[smepo.Problem], config) -> float:
    """Shown an altered trace: how often does the answer follow the trace, not the truth? nan if
    the toy has no such traces."""
    toy = TOYS[config.task]
    if not hasattr(toy, "altered"):
        return float("nan")
    altered = [toy.altered(problem.question, random.Random(problem.question))
               for problem in problems]
    texts = [smepo.build_prompt(tokenizer, problem.question, trace)
             for problem, (trace, _) in zip(problems, altered, strict=True)]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    completions = smepo.sample(model, tokenizer, prompts, 1, config)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    said = [answer for _, answer in altered]
    return sum(smepo.rewards(texts, said, config.domain)) / len(problems)


@torch.no_grad()
def hint_reliance(model, tokenizer, problems: list[smepo.Problem], config) -> float:
    """Mean of log pi(o | x, guide) - log pi(o | x) in nats, over correct guided rollouts o."""
    groups = smepo.rollout(model, tokenizer, problems, [True] * len(problems), 1, config)
    right = [group for group in groups if group.rewards[0]]
    if not right:
        return float("nan")
    completions, seen = smepo.pad([group.completions[0] for group in right],
                                  tokenizer.pad_token_id, "right", model.device)  # (N, T)
    sampled, _ = smepo.pad([group.sampled[0] for group in right], 0, "right", model.device)
    sums = []
    for kind in ("guided_ids", "prompt_ids"):
        prompts = [getattr(group.problem, kind) for group in right]
        ids, prompt_mask = smepo.pad(prompts, tokenizer.pad_token_id, "left", model.device)
        logprobs = smepo.token_logprobs(
            model, torch.cat([ids, completions], 1), torch.cat([prompt_mask, seen], 1),
            seen.shape[1], config.temperature)
        sums.append((logprobs * sampled).sum(1))
    return (sums[0] - sums[1]).mean().item()


def run_job(job: dict, tick) -> dict:
    """Train one arm with one seed; `tick` is called after every step. Returns what is kept."""
    config = smepo.Config(**ARMS[job["arm"]], steps=job["steps"], seed=job["seed"],
                          learning_rate=job["learning_rate"], task=job["task"], data=job["data"])
    files.quiet()
    model, tokenizer, optimizer, problems, tests = smepo.prepare(config.model, config)
    once, often = replace(config, eval_samples=1), replace(config, eval_samples=8)
    torch.manual_seed(config.seed)  # each later step seeds its own sampling
    steps, points = [], [smepo.evaluate(model, tokenizer, tests, once)["pass@1"]]
    for step in range(1, config.steps + 1):
        _, metrics = smepo.train_step(model, tokenizer, optimizer, problems, step, config)
        steps.append([round(metrics[key], 4) for key in KEPT])
        if step % job["eval_every"] == 0:
            points.append(smepo.evaluate(model, tokenizer, tests, once)["pass@1"])
        tick()
    guided = smepo.load_problems(config.test_data, "semantic", tokenizer, config)
    level = max(problem.difficulty for problem in guided)
    hardest = [problem for problem in guided if problem.difficulty == level]
    final = smepo.evaluate(model, tokenizer, tests, often)
    return job | {
        "steps_kept": KEPT, "curve": steps, "device": str(model.device),
        "points": [{level: round(mean, 4) for level, (mean, _) in p.items()} for p in points],
        "final": {k: {level: round(mean, 4) for level, (mean, _) in final[k].items()}
                  for k in ("pass@1", "pass@8")},
        "copy_rate": copy_rate(model, tokenizer, hardest, config),
        "hint_reliance": hint_reliance(model, tokenizer, hardest, config)}


# ---- All jobs ------------------------------------------------------------------------------------


def file_of(job: dict, out: Path) -> Path:
    name = "{arm}_{learning_rate:g}_{steps}_{eval_every}_{seed}.json".format(**job)
    return out / "raw" / f"{Path(job['data']).stem}_{name}"


def run_job_to_file(job: dict, out: Path, ticks) -> None:
    files.write(file_of(job, out), json.dumps(run_job(job, lambda: ticks.put(1))))


def run_all(jobs: list[dict], out: Path, workers: int) -> list[dict]:
    """Run what has no file yet, `workers` at a time; the records of all jobs, in their order."""
    todo = [job for job in jobs if not file_of(job, out).exists()]
    (out / "raw").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    bar = tqdm(total=sum(job["steps"] for job in todo), unit="step", disable=not todo)
    with (context.Manager() as manager,
          concurrent.futures.ProcessPoolExecutor(workers, context) as pool):
        ticks = manager.Queue()
        futures = [pool.submit(run_job_to_file, job, out, ticks) for job in todo]
        try:
            while not (all(future.done() for future in futures) and ticks.empty()):
                with contextlib.suppress(queue.Empty):
                    bar.update(ticks.get(timeout=0.5))
                for future in futures:
                    if future.done():
                        future.result()  # raises what the job raised
        except BaseException:  # Ctrl-C, too: finished jobs have their files
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    bar.close()
    texts = [file_of(job, out).read_text(encoding="utf-8") for job in jobs]
    files.write(out / "runs.jsonl", "".join(text + "\n" for text in texts))
    return [json.loads(text) for text in texts]


# ---- What the jobs say ---------------------------------------------------------------------------


def column(record: dict, name: str) -> list[float]:
    return [step[record["steps_kept"].index(name)] for step in record["curve"]]


def spent(record: dict, name: str) -> list[float]:
    """Rollouts or training seconds (sampling, all passes, and update; no evaluation) until each
    point of the accuracy curve."""
    names = ["seconds_rollout", "seconds_update"] if name == "seconds" else [name]
    total = [0, *itertools.accumulate(map(sum, zip(*(column(record, n) for n in names),
                                                   strict=True)))]
    return total[:: record["eval_every"]]


def reaches(record: dict, target: float) -> dict | None:
    """Steps, rollouts and seconds until the unguided mean is first at the target; None: never."""
    for i, point in enumerate(record["points"]):
        if point["mean"] >= target:
            return {"steps": i * record["eval_every"]} | {
                name: spent(record, name)[i] for name in ("rollouts", "seconds")}
    return None


def speed_up(record: dict, grpo: dict) -> float:
    """GRPO's training seconds over the seconds to its final unguided mean; 0 for never. There from
    the start counts as there at the first evaluation on the way."""
    hit, seconds = reaches(record, grpo["final"]["pass@1"]["mean"]), spent(record, "seconds")
    return spent(grpo, "seconds")[-1] / max(hit["seconds"], seconds[1]) if hit else 0.0


def mean_error(values: list[float], digits: int = 3) -> str:
    """Mean ± standard error over seeds; one seed has none."""
    values = [value for value in values if value == value]  # without nan
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_arm(records: list[dict]) -> dict[str, list[dict]]:
    arms = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    return arms


def speed(records: list[dict], grpo: dict[int, dict]) -> list[str]:
    """Steps, rollouts and seconds to GRPO's final unguided mean, and GRPO's seconds over these;
    only seeds that get there count, and how many do is said. `grpo`: GRPO's records by seed."""
    pairs = [(record, grpo[record["seed"]]) for record in records if record["seed"] in grpo]
    hits = [reaches(record, other["final"]["pass@1"]["mean"]) for record, other in pairs]
    cells = [mean_error([float(hit[name]) for hit in hits if hit], digits)
             for name, digits in (("steps", 1), ("rollouts", 0), ("seconds", 1))]
    ratios = [ratio for ratio in itertools.starmap(speed_up, pairs) if ratio]
    return [*cells, mean_error(ratios, 2), f"{len(ratios)} of {len(pairs)}"]


def why(records: list[dict]) -> list[str]:
    """Groups without a signal, early and late; leaks; copying; reliance on the hint."""
    fifth = max(1, len(records[0]["curve"]) // 5)

    def over(name: str, part: slice) -> str:
        return mean_error([statistics.mean(column(record, name)[part]) for record in records])

    return [*(over(f"zero_variance_{kind}", part) for part in (slice(fifth), slice(-fifth, None))
              for kind in ("wrong", "right")), over("leak_rate", slice(None)),
            mean_error([record["copy_rate"] for record in records]),
            mean_error([record["hint_reliance"] for record in records], 2)]


def summarize(records: list[dict], out: Path) -> str:
    """summary.md: what every arm ends with, how fast it gets to GRPO's end, and why."""
    arms, levels = by_arm(records), list(records[0]["points"][0])
    grpo = {record["seed"]: record for record in arms.get("none", [])}
    start = [record["points"][0] for record in next(iter(arms.values()))]
    ends = [["the base", "", *(mean_error([p[k] for p in start]) for k in levels), ""]]
    for arm, group in arms.items():
        ends.append([
            arm, mean_error([statistics.mean(column(record, "reward")[-5:]) for record in group]),
            *(mean_error([record["final"]["pass@1"][k] for record in group]) for k in levels),
            mean_error([record["final"]["pass@8"]["mean"] for record in group])])
    text = "\n".join((
        table(("arm", "training reward, last 5 steps", *(f"unguided, k = {k}" for k in levels[:-1]),
               "mean", "pass@8, mean"), ends),
        table(("arm", "steps to GRPO's final mean", "rollouts", "training seconds",
               "GRPO's seconds / these", "seeds that get there"),
              [[arm, *speed(group, grpo)] for arm, group in arms.items()]),
        table(("arm", "groups all wrong, first fifth", "all right", "all wrong, last fifth",
               "all right", "leak rate", "copy rate", "hint reliance, nats"),
              [[arm, *why(group)] for arm, group in arms.items()])))
    files.write(out / "summary.md", text)
    return text


# Okabe and Ito's colours, told apart by the colour-blind; the dashes tell them apart in print.
STYLES = {"none": ("#000000", "-"), "full": ("#D55E00", "--"), "prefix": ("#CC79A7", ":"),
          "random": ("#E69F00", "-."), "semantic": ("#0072B2", "-"), "fraction": ("#009E73", "-."),
          "on-failure": ("#56B4E9", "--"), "expert-loss": ("#999999", ":")}
NAMES = {"none": "GRPO", "full": "full trace", "semantic": "SMEPO", "random": "random mask",
         "on-failure": "SMEPO on failure", "fraction": "SMEPO, half the prompts",
         "expert-loss": "SMEPO + expert loss"}


def band(axes, arm: str, x, rows: list[list[float]], label: str | None = None, dashes=None):
    """The mean over seeds, and a band of one standard error."""
    y = torch.tensor(rows)  # (seeds, points)
    error = y.std(0) / len(rows) ** 0.5 if len(rows) > 1 else torch.zeros_like(y[0])
    colour, style = STYLES[arm]
    axes.plot(x, y.mean(0), color=colour, linestyle=dashes or style, label=label, linewidth=1.6)
    axes.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=colour, alpha=0.15)


def smooth(values: list[float], width: int = 5) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw(records: list[dict], path: Path) -> None:
    """Training reward beside unguided accuracy, against training time; the share of groups without
    a signal, against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    reward, accuracy, wasted = figure.subplots(1, 3)
    for arm, group in by_arm(records).items():
        every = group[0]["eval_every"]
        time = torch.tensor([spent(record, "seconds") for record in group]).mean(0)
        band(accuracy, arm, time, [[p["mean"] for p in record["points"]] for record in group],
             NAMES.get(arm, arm))
        curves = [smooth(column(record, "reward"))[every - 1 :: every] for record in group]
        band(reward, arm, time[1:], curves)
        for kind, dashes in (("wrong", "-"), ("right", ":")):
            band(wasted, arm, range(1, len(group[0]["curve"]) + 1),
                 [smooth(column(record, f"zero_variance_{kind}"), 10) for record in group],
                 dashes=dashes)
    reward.set(title="training reward, as guided", xlabel="training seconds", ylim=(0, 1))
    accuracy.set(title="held-out accuracy, unguided", xlabel="training seconds", ylim=(0, 1))
    wasted.set(title="groups all wrong (—), all right (···)", xlabel="step", ylim=(0, 1))
    accuracy.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def sweep_table(records: list[dict], out: Path) -> str:
    """Speed-up over GRPO of each arm, by how often the base solves the training problems."""
    rows, kinds = [], {}
    for data, group in itertools.groupby(records, lambda record: record["data"]):
        arms, level = by_arm(list(group)), Path(data).stem[-1]
        level = level if level.isdigit() else max(records[0]["points"][0].keys() - {"mean"})
        grpo = {record["seed"]: record for record in arms["none"]}
        success = statistics.mean(record["points"][0][level] for record in arms["none"])
        ratios = {arm: [speed_up(run, grpo[run["seed"]]) for run in runs]
                  for arm, runs in arms.items()}
        kinds[f"k = {level}, base {success:.2f}"] = arms, ratios
        for arm, runs in arms.items():
            rows.append([f"k = {level}", f"{success:.3f}", arm,
                         mean_error([run["final"]["pass@1"]["mean"] for run in runs]),
                         mean_error(ratios[arm], 2),
                         f"{sum(map(bool, ratios[arm]))} of {len(ratios[arm])}"])
    text = table(("trained on", "base, unguided", "arm", "unguided mean",
                  "GRPO's seconds / seconds to its final mean, 0 for never", "get there"), rows)
    files.write(out / "sweep.md", text)
    if find_spec("matplotlib"):
        draw_sweep(kinds, out / "sweep.png")
    return text


def draw_sweep(kinds: dict, path: Path) -> None:
    """A panel for each kind of training problems: unguided mean against steps, so where the curves
    cross GRPO has caught up; last, every seed's speed-up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(kinds) + 4, 3.4), layout="constrained")
    *panels, speed = figure.subplots(1, len(kinds) + 1, width_ratios=[3] * len(kinds) + [4])
    for i, (axes, (title, (arms, ratios))) in enumerate(zip(panels, kinds.items(), strict=True)):
        for arm, group in arms.items():
            steps = range(0, group[0]["steps"] + 1, group[0]["eval_every"])
            band(axes, arm, steps, [[p["mean"] for p in record["points"]] for record in group],
                 NAMES.get(arm, arm))
            if arm != "none":
                speed.plot([i] * len(group), ratios[arm], "o", color=STYLES[arm][0], alpha=0.6)
        axes.set(title=title, xlabel="step", ylim=(0.2, 0.8))
    panels[0].set(ylabel="unguided mean")
    panels[0].legend(fontsize=8)
    speed.axhline(1, color="#000000", linewidth=1)
    speed.set_xticks(range(len(kinds)), [title.split(",")[0] for title in kinds])
    speed.set(title="speed-up over GRPO (0: never)", ylim=(-0.5, None))
    figure.savefig(path, dpi=120)


def rates_table(records: list[dict], out: Path) -> str:
    """Unguided mean of each arm at each learning rate."""
    rows = []
    for arm, group in by_arm(records).items():
        for rate in sorted({record["learning_rate"] for record in group}):
            finals = [record["final"]["pass@1"]["mean"] for record in group
                      if record["learning_rate"] == rate]
            rows.append([arm, f"{rate:g}", mean_error(finals)])
    text = table(("arm", "learning rate", "unguided mean"), rows)
    files.write(out / "rates.md", text)
    return text


# ---- The command ---------------------------------------------------------------------------------


def jobs_of(given, seeds, rates: dict[str, float], data) -> list[dict]:
    return [{"arm": arm, "seed": seed, "steps": given.steps,
             "learning_rate": rates.get(arm, smepo.Config.learning_rate),
             "eval_every": max(1, given.steps // given.points), "task": given.task,
             "data": str(data)}
            for seed in seeds for arm in given.arms]  # seed by seed: a stopped run is even


def training_file(task: str, k: int, out: Path) -> Path:
    """2,000 training problems of difficulty k."""
    path = out / f"{task}_{k}.jsonl"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        rows = toys.draw_rows(TOYS[task], k, {k: 2000}, held_out=False)
        files.write(path, toys.to_jsonl(rows).decode())
    return path


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="smepo.py compare", description=__doc__.splitlines()[0],
                                     exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--task", choices=list(TOYS), default="arithmetic")
    parser.add_argument("--arms", help=f"some of {','.join(ARMS)}; without it, all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to N")
    parser.add_argument("--steps", type=int, default=60, help="of every arm")
    parser.add_argument("--points", type=int, default=30, help="evaluations on the way")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time, a core each")
    parser.add_argument("--out", default="runs/compare", help="the folder to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)}")
    kind.add_argument("--sweep", action="store_true", help="train on each difficulty")
    kind.add_argument("--rates", help="learning rates to try, on other seeds: 1e-4,2e-4")
    given, rest = parser.parse_known_args(arguments)
    usual = QUICK if given.quick else SWEPT if given.sweep else tuple(ARMS)
    given.arms = given.arms.split(",") if given.arms else usual
    wrong = [arm for arm in given.arms if arm not in ARMS]
    if rest or wrong:
        raise smepo.UserError(f"unknown arm {wrong[0]}: take some of {', '.join(ARMS)}" if wrong
                              else f"unknown flag {rest[0]}: compare --help lists them all")
    if given.sweep and "none" not in given.arms:
        raise smepo.UserError("--sweep measures against GRPO: add none to --arms")
    for name in ("seeds", "steps", "points", "jobs"):
        if getattr(given, name) < 1:
            raise smepo.UserError(f"--{name} {getattr(given, name)}: it must be at least 1")
    return given


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    out, seeds = Path(given.out), range(1, 2 if given.quick else given.seeds + 1)
    data, rates = smepo.Config(task=given.task).data, RATES.get(given.task, {})
    if given.rates:
        try:
            tried = [float(rate) for rate in given.rates.split(",")]
        except ValueError as error:
            raise smepo.UserError(f"--rates {given.rates}: numbers like 1e-4,2e-4") from error
        given.points = 1
        jobs = [job for rate in tried for job in jobs_of(
            given, [100 + seed for seed in seeds], dict.fromkeys(ARMS, rate), data)]
        print(rates_table(run_all(jobs, out, given.jobs), out))
    elif given.sweep:
        toy = TOYS[given.task]
        paths = [data if k in toy.TRAIN else training_file(given.task, k, out) for k in toy.TEST]
        jobs = [job for path in paths for job in jobs_of(given, seeds, rates, path)]
        print(sweep_table(run_all(jobs, out, given.jobs), out))
    else:
        records = run_all(jobs_of(given, seeds, rates, data), out, given.jobs)
        print(summarize(records, out))
        if find_spec("matplotlib"):
            draw(records, out / "compare.png")
    print(f"{out} holds the tables, the pictures and runs.jsonl, what each run measured")
