"""Arms side by side: `python -m tiny_tasks.compare`.

An arm is a way to show the guide. Every arm is trained from the same base with the same seeds by
`smepo.train`, in a folder of its own, and measured at its end; the same command goes on where it
was stopped. Flags of smepo.py that are not an arm's own, such as --task or --steps, go to all runs.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import smepo
from tiny_tasks import tables, toys

ARMS = {
    "grpo": {"guide": "none"},
    "full": {"guide": "full"},
    "prefix": {"guide": "prefix"},
    "random": {"guide": "random"},
    "smepo": {},
    "on-failure": {"guide_when": "on-failure"},
    "half": {"guide_when": "0.5"},
    "fade": {"guide_when": "fade"},
    "grpo+expert": {"guide": "none", "expert_coef": 0.1},
    "fade+expert": {"guide_when": "fade", "expert_coef": 0.1},
}
QUICK = "grpo,full,smepo,fade"
# Where an arm's best of four rates, on seeds that no report uses, is not the default.
RATES = {
    "arithmetic": dict.fromkeys(["prefix", "smepo", "on-failure", "half", "fade"], 4e-4),
    "code": {},
    "search": {},
}


def configs_of(given: argparse.Namespace, flags: list[str]) -> dict[str, smepo.Config]:
    """{run folder: its settings}, seed by seed, so that what is stopped early is even."""
    base = smepo.parse(flags)
    configs = {}
    for seed, arm in product(given.seeds, given.arms):
        for rate in given.rates or [RATES[base.task].get(arm, base.learning_rate)]:
            folder = given.out / "runs" / f"{base.task}-{arm}-{rate:g}-{base.steps}-{seed}"
            config = replace(base, **ARMS[arm], learning_rate=rate, seed=seed, eval_samples=1)
            configs[str(folder)] = replace(config, eval_every=max(1, base.steps // given.points))
    return configs


def run_one(folder: str, config: smepo.Config) -> None:
    """Train, measure, and write the result."""
    known = Path(folder, "config.json").exists()
    smepo.train(replace(config, resume=folder) if known else replace(config, out=folder))
    result = {"arm": Path(folder).name.removeprefix(f"{config.task}-").rsplit("-", 3)[0]}
    for name in "task", "seed", "steps", "learning_rate":
        result[name] = getattr(config, name)
    result |= curves(smepo.read_records(Path(folder, "metrics.jsonl")))
    result |= measure(Path(folder), replace(config, eval_samples=8))
    with smepo.replacing(Path(folder, "result.json")) as new:
        new.write_text(json.dumps(result), encoding="utf-8")


def curves(records: list[dict]) -> dict:
    """Accuracy by steps and by seconds of the processor, of training alone, and means of steps."""
    points, seconds = [], 0.0
    for record in records:
        seconds += record.get("seconds_processor", 0.0)
        if "pass@1" in record:
            accuracy = {level: round(value[0], 4) for level, value in record["pass@1"].items()}
            points.append({"step": record["step"], "seconds": round(seconds, 2)} | accuracy)
    steps = records[1:]
    return {
        "points": points,
        "reward": smepo.mean([record["reward"] for record in steps[-5:]]),
        "leak_rate": smepo.mean([record["leak_rate"] for record in steps]),
        "no_signal": smepo.mean([1 - has_signal(record) for record in steps[:10]]),
    }


def has_signal(record: dict) -> float:
    return 1 - record["zero_variance_wrong"] - record["zero_variance_right"]


def measure(folder: Path, config: smepo.Config) -> dict:
    """Unguided accuracy at the end, and how much a right guided rollout leans on its guide."""
    model, tokenizer = smepo.load_model(folder / "checkpoint", config)
    problems = smepo.load_problems(config.test_data, "semantic", tokenizer, config, "test")
    torch.manual_seed(config.seed)
    table = smepo.evaluate(model, tokenizer, problems, config)
    hardest = max(problem.difficulty for problem in problems)
    hard = [problem for problem in problems if problem.difficulty == hardest]
    reliance = hint_reliance(model, tokenizer, hard, config)
    final = {level: round(value[0], 4) for level, value in table.items()}
    return {"final": final, "hint_reliance": reliance}


@torch.no_grad()
def hint_reliance(model, tokenizer, problems: list[smepo.Problem], config) -> float | None:
    """Mean of log pi(o | x, guide) - log pi(o | x) in nats, over right guided rollouts o."""
    rollouts = smepo.rollout(model, tokenizer, problems, [True] * len(problems), config)
    right = [rollout for rollout in rollouts if rollout.solved]
    if not right:
        return None
    alone = [replace(rollout, prompt_ids=rollout.problem.prompts[False]) for rollout in right]
    guided, sampled = smepo.score(model, right, config)
    unguided, _ = smepo.score(model, alone, config)
    return ((guided - unguided) * sampled).sum().item() / len(right)


# ---- All runs --------------------------------------------------------------------------------


def start_worker() -> None:
    """A process that says nothing, and dies at Ctrl-C and with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """Else it would train on while a new command resumes the same run."""
    multiprocessing.parent_process().join()
    os._exit(1)


def steps_done(folders: list[str]) -> int:
    logs = [Path(folder, "metrics.jsonl") for folder in folders]
    return sum(len(log.read_bytes().splitlines()) - 1 for log in logs if log.exists())


def run_all(configs: dict[str, smepo.Config], jobs: int) -> None:
    """Run what has no result yet, `jobs` at a time."""
    todo = [folder for folder in configs if not Path(folder, "result.json").exists()]
    steps = sum(configs[folder].steps for folder in todo)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    with ProcessPoolExecutor(jobs, context, start_worker) as pool, tqdm(total=steps) as bar:
        waiting = {pool.submit(run_one, folder, configs[folder]) for folder in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1)
                bar.update(max(0, steps_done(todo) - bar.n))
                for future in done:
                    future.result()  # raises what the run raised
        except BaseException:  # Ctrl-C, too
            for process in multiprocessing.active_children():
                process.terminate()
            raise


# ---- The command -----------------------------------------------------------------------------


def list_of_seeds(text: str) -> list[int]:
    """3 is 1, 2 and 3; 5-6 is 5 and 6."""
    first, dash, last = text.rpartition("-")
    seeds = list(range(int(first if dash else 1), int(last) + 1))
    if not seeds:
        raise ValueError
    return seeds


def list_of_arms(text: str) -> list[str]:
    arms = list(dict.fromkeys(text.split(",")))
    if not set(arms) <= ARMS.keys():
        raise ValueError
    return arms


def list_of_rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "compare", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("--arms", type=list_of_arms, help=f"some of {','.join(ARMS)}; by default {QUICK}")
    add("--seeds", type=list_of_seeds, help="5 is 1 to 5; 3-7 is 3 to 7; by default 5")
    add("--rates", type=list_of_rates, help="learning rates to try in every arm: 1e-4,2e-4")
    add("--points", type=toys.at_least_1, default=10, help="evaluations on the way")
    add("--jobs", type=toys.at_least_1, default=os.cpu_count(), help="runs at a time")
    add("--out", type=Path, default=Path("runs", "compare"), help="the folder to write")
    add("--quick", action="store_true", help="one seed")
    given, flags = parser.parse_known_args(arguments)
    given.arms = given.arms or list_of_arms(QUICK)
    given.seeds = given.seeds or list_of_seeds("1" if given.quick else "5")
    return given, flags


def main(arguments: list[str] | None = None) -> None:
    given, flags = parse(arguments)
    configs = configs_of(given, flags)
    for folder, config in configs.items():
        if Path(folder, "config.json").exists():
            before = smepo.parse(["--resume", folder])
            if replace(config, out=before.out, resume=before.resume) != before:
                raise smepo.UserError(f"{folder} has other settings: name another --out")
    (given.out / "runs").mkdir(parents=True, exist_ok=True)
    run_all(configs, given.jobs)
    paths = [Path(folder, "result.json") for folder in configs]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = [json.dumps(result) + "\n" for result in results]
    report = tables.rates(results) if given.rates else tables.summary(results)
    for name, text in {"runs.jsonl": "".join(lines), "summary.md": report}.items():
        with smepo.replacing(given.out / name) as new:
            new.write_text(text, encoding="utf-8")
    print(report)
    if not given.rates:
        try:
            from tiny_tasks import plots
        except ModuleNotFoundError:  # no matplotlib: the tables will do
            return
        plots.draw_comparison(results, given.out / "curves.png")
        print(f"{given.out / 'curves.png'} draws the accuracy against steps and seconds")


if __name__ == "__main__":
    sys.exit(toys.command(main))
