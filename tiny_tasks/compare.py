"""Arms side by side: `python -m tiny_tasks.compare`.

An arm is a way to show the guide. All are trained from one base with the same seeds, and measured
at the end; the same command goes on where it was stopped. Flags of smepo.py go to all runs.
"""

import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean

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
    "fade": {"guide_when": "fade"},
    "grpo+expert": {"guide": "none", "expert_coef": 0.1},
    "fade+expert": {"guide_when": "fade", "expert_coef": 0.1},
}
# The best of four rates, on seeds that no report uses, where it is not the default.
RATES = {("arithmetic", arm): 4e-4 for arm in ("prefix", "smepo", "on-failure", "fade")}


def configs_of(given, flags: list[str]) -> dict[Path, tuple]:
    """{run folder: (arm, its settings)}, seed by seed, so that what is stopped early is even."""
    base = smepo.parse(flags)
    base = replace(base, eval_samples=1, eval_every=max(1, base.steps // given.points))
    configs = {}
    for seed, arm in product(given.seeds, given.arms):
        for rate in given.rates or [RATES.get((base.task, arm), base.learning_rate)]:
            folder = given.out / "runs" / f"{base.task}-{arm}-{rate:g}-{base.steps}-{seed}"
            configs[folder] = arm, replace(base, **ARMS[arm], learning_rate=rate, seed=seed)
    return configs


def run_one(folder: Path, arm: str, config: smepo.Config) -> None:
    """Train, measure, and write the result."""
    begun = (folder / "config.json").exists()
    place = {"resume": str(folder)} if begun else {"out": str(folder)}
    smepo.train(replace(config, **place))
    result = {"arm": arm}
    for name in "task", "seed", "steps", "learning_rate":
        result[name] = getattr(config, name)
    result |= curves(smepo.read_records(folder / "metrics.jsonl"))
    problems = smepo.read_problems(config.data, config.guide, config)
    result["leak_rate"] = fmean(smepo.leaks(p.guide, p.answer, config.domain) for p in problems)
    result |= measure(folder, replace(config, eval_samples=8))
    with smepo.replacing(folder / "result.json") as new:
        new.write_text(json.dumps(result), encoding="utf-8")


def curves(records: list[dict]) -> dict:
    """Accuracy by steps and by seconds of the processor, of training alone, and means of steps."""
    points, seconds = [], 0.0
    for record in records:
        seconds += record.get("seconds_processor", 0.0)
        if "pass@1" in record:
            point = {"step": record["step"], "seconds": round(seconds, 2)}
            points.append(point | rounded(record["pass@1"]))
    return {"points": points, "reward": fmean(record["reward"] for record in records[1:][-5:])}


def rounded(accuracy: dict[str, list[float]]) -> dict[str, float]:
    return {level: round(mean, 4) for level, (mean, _) in accuracy.items()}


def measure(folder: Path, config: smepo.Config) -> dict:
    """Unguided accuracy at the end, and how much a right guided rollout leans on its guide."""
    model, tokenizer = smepo.load_model(folder / "checkpoint", config)
    problems = smepo.load_problems(config.test_data, "semantic", tokenizer, config, "test")
    torch.manual_seed(config.seed)
    final = rounded(smepo.evaluate(model, tokenizer, problems, config))
    hardest = max(problem.difficulty for problem in problems)
    hard = [problem for problem in problems if problem.difficulty == hardest]
    return {"final": final, "hint_reliance": hint_reliance(model, tokenizer, hard, config)}


@torch.no_grad()
def hint_reliance(model, tokenizer, problems: list[smepo.Problem], config) -> float | None:
    """Mean of log pi(o | x, guide) - log pi(o | x) in nats, over right guided rollouts o."""
    groups = smepo.rollout(model, tokenizer, [(p, True) for p in problems], config)
    right = [rollout for group in groups for rollout in group if rollout.solved]
    if not right:
        return None
    alone = [replace(rollout, prompt_ids=rollout.problem.prompts[False]) for rollout in right]
    guided, sampled = smepo.score(model, right, config)
    unguided, _ = smepo.score(model, alone, config)
    return ((guided - unguided) * sampled).sum().item() / len(right)


def start_worker() -> None:
    """A process that says nothing, and dies with its parent."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """Else it would train on while a new command resumes the same run."""
    multiprocessing.parent_process().join()
    os._exit(1)


def steps_done(folders: list[Path]) -> int:
    logs = [folder / "metrics.jsonl" for folder in folders]
    return sum(len(smepo.read_records(log)[1:]) for log in logs if log.exists())


def run_all(configs: dict[Path, tuple], jobs: int) -> None:
    """Run what has no result yet, `jobs` at a time."""
    todo = [folder for folder in configs if not (folder / "result.json").exists()]
    steps = sum(configs[folder][1].steps for folder in todo)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    with ProcessPoolExecutor(jobs, context, start_worker) as pool, tqdm(total=steps) as bar:
        waiting = {pool.submit(run_one, folder, *configs[folder]) for folder in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1)
                bar.update(steps_done(todo) - bar.n)
                for run in done:
                    run.result()  # raises what the run raised
        except BaseException:  # Ctrl-C, too
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def list_of_seeds(text: str) -> list[int]:
    """3 is 1, 2 and 3; 5-6 is 5 and 6."""
    first, dash, last = text.rpartition("-")
    seeds = list(range(int(first if dash else 1), int(last) + 1))
    if not seeds:
        raise ValueError
    return seeds


def list_of_arms(text: str) -> list[str]:
    if not set(text.split(",")) <= ARMS.keys():
        raise ValueError
    return text.split(",")


def list_of_rates(text: str) -> list[float]:
    return list(map(float, text.split(",")))


def main(arguments: list[str] | None = None) -> None:
    parser = toys.Parser("compare", __doc__)
    add = parser.add_argument
    add("--arms", type=list_of_arms, default="grpo,full,smepo,fade", help=f"of {', '.join(ARMS)}")
    add("--seeds", type=list_of_seeds, default="5", help="5 is 1 to 5; 3-7 is 3 to 7")
    add("--quick", action="store_true", help="one seed, evaluated four times")
    add("--rates", type=list_of_rates, help="learning rates to try in every arm: 1e-4,2e-4")
    add("--points", type=toys.at_least_1, default=10, help="evaluations on the way")
    add("--jobs", type=toys.at_least_1, default=os.cpu_count(), help="runs at a time")
    add("--out", type=Path, default=Path("runs", "compare"), help="the folder to write")
    given, flags = parser.parse_known_args(arguments)
    if given.quick:
        given.seeds, given.points = [1], 4
    configs = configs_of(given, flags)
    for folder, (_, config) in configs.items():
        if (folder / "config.json").exists():
            before = smepo.parse(["--resume", str(folder)])
            if replace(config, out=before.out, resume=before.resume) != before:
                raise smepo.UserError(f"{folder} has other settings: name another --out")
    run_all(configs, given.jobs)
    results = [json.loads((folder / "result.json").read_text("utf-8")) for folder in configs]
    for result in results if given.rates else []:
        result["arm"] += f" {result['learning_rate']:g}"
    report = tables.summary(results)
    for name, data in ("runs.jsonl", toys.to_jsonl(results)), ("summary.md", report.encode()):
        with smepo.replacing(given.out / name) as new:
            new.write_bytes(data)
    print(report)
    if find_spec("matplotlib") and not given.rates:
        from tiny_tasks import plots

        plots.draw_comparison(results, given.out / "curves.png")


if __name__ == "__main__":
    sys.exit(toys.command(main))
