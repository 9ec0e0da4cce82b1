"""`python smepo.py export`: guided prompts for the engines that scale out.

SMEPO changes the prompt alone, so any GRPO engine runs it on a file of masked prompts.
"""

import argparse
import os
from pathlib import Path

import datasets
from tqdm import tqdm

import smepo
from tiny_tasks import files

def to_trl(messages: list[dict], problem: tuple, domain: str, index: int) -> dict:
    """TRL: a conversational prompt; its other columns are handed to the reward function."""
    _, answer, _, difficulty = problem
    return {"prompt": messages, "ground_truth": answer, "domain": domain, "difficulty": difficulty}


def to_verl(messages: list[dict], problem: tuple, domain: str, index: int) -> dict:
    """verl: its five columns; extra_info carries what was not shown, and the row's number."""
    question, answer, trace, difficulty = problem
    extra = {"index": index, "question": question, "teacher_ds": trace, "difficulty": difficulty}
    return {"data_source": f"smepo/{domain}", "prompt": messages, "ability": domain,
            "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": extra}


FORMATS = {"trl": to_trl, "verl": to_verl}


def guided_rows(given: argparse.Namespace) -> tuple[list[dict], int, int]:
    """The rows to write, how many were read, and how many of their guides leak the answer."""
    rows, leaky = [], 0
    problems = list(files.read_rows(given.data, wants_trace=given.guide != "none"))
    for index, problem in enumerate(tqdm(problems)):
        question, answer, trace, _ = problem
        guide = smepo.guide_trace(trace, given.guide, given.domain, answer, given.prefix_ratio,
                                  seed=f"{given.seed} {question}")
        leak = smepo.leaks(guide, answer, given.domain)
        leaky += leak
        if given.leaks == "keep" or not leak:
            messages = smepo.build_messages(question, guide, given.system)
            rows.append(FORMATS[given.format](messages, problem, given.domain, index))
    return rows, len(problems), leaky


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="smepo.py export", description=__doc__.splitlines()[0],
                                     exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="problems with traces, jsonl or parquet")
    parser.add_argument("--domain", choices=smepo.DOMAINS, default="math")
    parser.add_argument("--guide", default="semantic",
                        choices=("none", "full", "prefix", "random", "semantic"))
    parser.add_argument("--prefix_ratio", type=float, default=0.5)
    parser.add_argument("--system", default="", help="a system prompt, if the model wants one")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--leaks", choices=("drop", "keep"), default="drop",
                        help="rows whose guide gives the answer away")
    parser.add_argument("--seed", type=int, default=0, help="of the random mask")
    parser.add_argument("--out", required=True, help="the file to write, .jsonl or .parquet")
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise smepo.UserError(f"unknown flag {rest[0]}: export --help lists them all")
    out = Path(given.out)
    if out.suffix not in (".jsonl", ".parquet"):
        raise smepo.UserError(f"--out {out}: it must end in .jsonl or .parquet")
    rows, count, leaky = guided_rows(given)
    if not rows:
        raise smepo.UserError(f"nothing to write: all {leaky} guides leak, see --leaks keep")
    table, aside = datasets.Dataset.from_list(rows), out.with_name(out.name + ".new")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".parquet":
        table.to_parquet(aside)
    else:
        table.to_json(aside, force_ascii=False)
    os.replace(aside, out)
    print(f"{out}: {len(rows)} of {count} rows; {leaky} guides leak the answer "
          f"(leak rate {leaky / count:.3f}), {'kept' if given.leaks == 'keep' else 'dropped'}")
