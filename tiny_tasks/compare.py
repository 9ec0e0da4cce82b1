"""`python smepo.py compare`: every arm from the same base, measured in the same way.

A run is one arm with one seed: `smepo.train` in a folder of its own, then what is measured at its
end, in result.json. A run with a result is not repeated, and one that was killed goes on from its
checkpoint: the same command resumes. Tables and pictures are made from the results alone.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import smepo
from tiny_tasks import tables, toys

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
QUICK = ["none", "full", "semantic", "on-failure"]
SWEPT = ["none", "semantic", "on-failure"]
RATES = {  # where an arm's best of --rates, on seeds that no report uses, is not the default
    "arithmetic": dict.fromkeys(
        ["prefix", "semantic", "on-failure", "fraction", "expert-loss"], 4e-4
    ),
    "code": {},
    "search": {},
}
# What of a run is a setting as it is, and what is kept of each of its steps.
GIVEN = ["task", "seed", "steps", "eval_every", "learning_rate"]
KEPT = ["reward", "zero_variance_wrong", "zero_variance_right", "leak_rate"]


# ---- One run -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run is, and once it has run, what was measured."""

    task: str
    arm: str
    seed: int
    steps: int
    eval_every: int
    learning_rate: float
    k: int | None = None  # trained on this difficulty alone; None: on the toy's own problems
    curve: dict[str, list[float]] = field(default_factory=dict)  # KEPT, of each step
    points: list[dict] = field(default_factory=list)  # {"step", "seconds", "accuracy"}, unguided
    final: dict[str, dict] = field(default_factory=dict)  # {"pass@1": {difficulty: mean}, ...}
    copy_rate: float | None = None
    hint_reliance: float | None = None

    def folder(self) -> Path:
        schedule = f"{self.learning_rate:g}-{self.steps}-{self.eval_every}"
        return Path("runs", f"{self.task}-{self.k or 'own'}-{self.arm}-{schedule}-{self.seed}")

    def level(self) -> str:
        """The difficulty that it trains on: of mixed problems the hardest."""
        return str(self.k or max(toys.find(self.task).TRAIN))


def run_one(run: Run) -> None:
    """Train, measure and write the result; in the output folder."""
    given = {name: getattr(run, name) for name in GIVEN}
    data = training_file(run.task, run.k) if run.k else None
    name = run.folder().name
    config = smepo.Config(**ARMS[run.arm], **given, data=data, name=name, resume=True)
    folder = smepo.train(replace(config, eval_samples=1))
    read_metrics(run, folder)
    measure(run, folder, replace(config, eval_samples=8))
    save(json.dumps(asdict(run)), folder / "result.json")


def training_file(task: str, k: int) -> str:
    return f"{task}-{k}.jsonl"  # in the output folder


def read_metrics(run: Run, folder: Path) -> None:
    """The curves. Seconds are those of training: sampling, all passes, and update; on a CPU those
    of the processor."""
    records = smepo.read_records(folder / "metrics.jsonl")
    run.curve = {name: [round(record[name], 4) for record in records[1:]] for name in KEPT}
    seconds = 0.0
    for record in records:
        seconds += record.get("seconds_rollout", 0) + record.get("seconds_update", 0)
        if "pass@1" in record:
            point = {"step": record["step"], "seconds": round(seconds, 2)}
            run.points.append(point | {"accuracy": means(record["pass@1"])})


def means(row: dict[str, list[float]]) -> dict[str, float]:
    return {level: round(mean, 4) for level, (mean, _) in row.items()}


def measure(run: Run, folder: Path, config: smepo.Config) -> None:
    """What the policy can do at the end, and how much it leans on the trace."""
    model, tokenizer = smepo.load_model(folder / "checkpoint", config)
    problems = smepo.load_problems(config.test_data, "semantic", tokenizer, config, "test")
    torch.manual_seed(config.seed)
    table = smepo.evaluate(model, tokenizer, problems, config)
    run.final = {name: means(table[name]) for name in ("pass@1", "pass@8")}
    level = max(problem.difficulty for problem in problems)
    hardest = [problem for problem in problems if problem.difficulty == level]
    run.copy_rate = toys.copy_rate(model, tokenizer, hardest, config)
    run.hint_reliance = hint_reliance(model, tokenizer, hardest, config)


def hint_reliance(model, tokenizer, problems: list[smepo.Problem], config) -> float | None:
    """Mean of log pi(o | x, guide) - log pi(o | x) in nats, over right guided rollouts o."""
    rollouts = smepo.rollout(model, tokenizer, problems, [True] * len(problems), config)
    # an advantage other than 0, or micro_batches would leave them out
    guided = [replace(rollout, advantage=1.0) for rollout in rollouts if rollout.reward]
    if not guided:
        return None
    alone = [replace(rollout, prompt_ids=rollout.problem.question_ids) for rollout in guided]
    sums = [total_logprob(model, part, config) for part in (guided, alone)]
    return (sums[0] - sums[1]) / len(guided)


@torch.no_grad()
def total_logprob(model, rollouts: list[smepo.Rollout], config) -> float:
    total = 0.0
    for batch in smepo.micro_batches(rollouts, model.device, config):
        total += (smepo.score(model, batch, config) * batch.sampled).sum().item()
    return total


# ---- All runs ------------------------------------------------------------------------------------


def start_worker(out: Path) -> None:
    """A process that works in the output folder, says nothing, and dies at Ctrl-C."""
    if not torch.accelerator.is_available():  # other work on the machine is not to count
        smepo.time = SimpleNamespace(perf_counter=time.process_time)
    os.chdir(out)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """Else it would train on while a new command resumes the same run."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_all(runs: list[Run], out: Path, workers: int) -> None:
    """Run what has no result yet, `workers` at a time."""
    todo = [run for run in runs if not result_of(run, out).exists()]
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    with ProcessPoolExecutor(workers, context, start_worker, (out,)) as pool:
        futures = [pool.submit(run_one, run) for run in todo]
        try:
            for future in tqdm(as_completed(futures), total=len(todo), unit="run"):
                future.result()  # raises what the run raised
        except BaseException:  # Ctrl-C, too
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def result_of(run: Run, out: Path) -> Path:
    return out / run.folder() / "result.json"


def read_result(path: Path) -> Run:
    return Run(**json.loads(path.read_text(encoding="utf-8")))


def all_like(run: Run, out: Path) -> list[Run]:
    """Whatever arms and seeds the folder holds, trained like this one and at their best rates."""
    found = []
    for path in out.glob("runs/*/result.json"):
        other = read_result(path)
        same = replace(other, arm=run.arm, seed=run.seed, learning_rate=run.learning_rate)
        if same.folder() == run.folder() and other.learning_rate == best_rate(
            other.task, other.arm
        ):
            found.append(other)
    order = list(ARMS)
    return sorted(found, key=lambda other: (order.index(other.arm), other.seed))


def save(text: str, path: Path) -> str:
    with smepo.replacing(path) as new:
        new.write_text(text, encoding="utf-8")
    return text


# ---- The command ---------------------------------------------------------------------------------


def list_of_seeds(text: str) -> list[int]:
    """3 is 1, 2 and 3; 5-6 is 5 and 6."""
    first, _, last = text.rpartition("-")
    seeds = list(range(int(first or 1), toys.at_least_1(last) + 1))
    if not seeds:
        raise ValueError
    return seeds


def distinct(values: list) -> list:
    """Two processes must not train in one folder."""
    return list(dict.fromkeys(values))


def list_of_rates(text: str) -> list[float]:
    return distinct([float(rate) for rate in text.split(",")])


def parse(arguments: list[str]) -> argparse.Namespace:
    settings = {"prog": "smepo.py compare", "exit_on_error": False, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], **settings)
    add = parser.add_argument
    add("--task", choices=list(smepo.TOYS), default="arithmetic")
    add("--arms", help=f"some of {','.join(ARMS)}; without it, all")
    add("--seeds", type=list_of_seeds, help="5, which is 1 to 5, or 3-7")
    add("--steps", type=toys.at_least_1, default=60, help="of every arm")
    add("--points", type=toys.at_least_1, default=20, help="evaluations on the way")
    add("--jobs", type=toys.at_least_1, help="at a time; without it, one a core")
    add("--out", type=Path, default="runs/compare", help="the folder to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)}")
    kind.add_argument("--sweep", action="store_true", help="train on each difficulty alone, too")
    rates = "learning rates to try, on other seeds: 1e-4,2e-4"
    kind.add_argument("--rates", type=list_of_rates, help=rates)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise smepo.UserError(f"unknown flag {rest[0]}: compare --help lists them all")
    usual = QUICK if given.quick else SWEPT if given.sweep else list(ARMS)
    given.arms = distinct(given.arms.split(",")) if given.arms else usual
    given.seeds = given.seeds or list(range(1, 2 if given.quick else 6))
    return given


def best_rate(task: str, arm: str) -> float:
    return RATES[task].get(arm, smepo.Config.learning_rate)


def plan(given: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that a comparison that is stopped early is even."""
    for arm in given.arms:
        if arm not in ARMS:
            raise smepo.UserError(f"unknown arm {arm}: take some of {', '.join(ARMS)}")
    kinds, runs = [None], []
    if given.sweep:
        if "none" not in given.arms:
            raise smepo.UserError("--sweep measures against GRPO: add none to --arms")
        kinds += toys.find(given.task).TEST
    for k, seed, arm in product(kinds, given.seeds, given.arms):
        for rate in given.rates or [best_rate(given.task, arm)]:
            run = Run(
                task=given.task,
                arm=arm,
                seed=seed + 100 if given.rates else seed,
                steps=given.steps,
                eval_every=max(1, given.steps // given.points),
                learning_rate=rate,
                k=k,
            )
            runs.append(run)
    return runs


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    runs = plan(given)
    # apart, as their seeds may enter no report
    out = (given.out / "rates" if given.rates else given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for k in {run.k for run in runs if run.k}:
        rows = toys.draw_rows(toys.find(given.task), k, {k: 2000}, held_out=False)
        save(toys.to_jsonl(rows).decode(), out / training_file(given.task, k))
    run_all(runs, out, given.jobs)
    if given.rates or given.sweep:
        runs = [read_result(result_of(run, out)) for run in runs]
    else:
        runs = all_like(runs[0], out)
    records = [json.dumps(asdict(run)) + "\n" for run in runs]
    save("".join(records), out / "runs.jsonl")
    if given.rates:
        print(save(tables.rates(runs), out / "rates.md"))
    elif given.sweep:
        kinds = {}
        for run in runs:
            kinds.setdefault(f"k = {run.k}" if run.k else "the mix", []).append(run)
        print(save(tables.sweep(kinds), out / "sweep.md"))
        draw("sweep", kinds, out)
    else:
        print(save(tables.summary(runs), out / "summary.md"))
        draw("learning", runs, out)
        draw("compare", runs, out)
    print(f"{out} holds the tables, the pictures and runs.jsonl, what each run measured")


def draw(name: str, runs, out: Path) -> None:
    if find_spec("matplotlib"):
        plots = import_module("tiny_tasks.plots")
        getattr(plots, f"draw_{name}")(runs, out / f"{name}.png")
