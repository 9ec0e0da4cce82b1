"""`python -m tiny_tasks.export`: guided prompts for the engines that scale out.

SMEPO changes the prompt alone, so any GRPO engine runs it on a file of masked prompts. Its flags
are those of a run, as --data, --domain, --system, --guide and --seed, and these:
"""

import sys
from pathlib import Path

import datasets

import smepo
from tiny_tasks import toys


def to_trl(messages: list[dict], problem: smepo.Problem, domain: str, index: int) -> dict:
    """TRL: a conversational prompt; its other columns are handed to the reward function."""
    return {
        "prompt": messages,
        "ground_truth": problem.answer,
        "domain": domain,
        "difficulty": problem.difficulty,
    }


def to_verl(messages: list[dict], problem: smepo.Problem, domain: str, index: int) -> dict:
    """verl: its five columns; extra_info carries what was not shown, and the row's number."""
    extra = {"index": index, "question": problem.question, "teacher_ds": problem.trace}
    return {
        "data_source": f"smepo/{domain}",
        "prompt": messages,
        "ability": domain,
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": extra | {"difficulty": problem.difficulty},
    }


FORMATS = {"trl": to_trl, "verl": to_verl}


def write(rows: list[dict], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with smepo.replacing(out) as new:
        if out.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(new)
        else:
            new.write_bytes(toys.to_jsonl(rows))


def is_source(out: Path, data: str) -> bool:
    """Is it --data, or a file of that folder?"""
    files = [Path(data), *Path(data).glob("*")] if data else []
    return any(file.exists() and out.exists() and out.samefile(file) for file in files)


def main(arguments: list[str] | None = None) -> None:
    parser = toys.Parser("export", __doc__)
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    leaks = "rows whose guide gives the answer away"
    parser.add_argument("--leaks", choices=["drop", "keep"], default="drop", help=leaks)
    out = "the file to write, .jsonl or .parquet"
    parser.add_argument("--out", type=Path, required=True, help=out)
    given, rest = parser.parse_known_args(arguments)
    if given.out.suffix not in (".jsonl", ".parquet"):
        raise smepo.UserError(f"--out {given.out}: it must end in .jsonl or .parquet")
    config = smepo.parse([*rest, "--test_data", "none"])
    if is_source(given.out, config.data):
        raise smepo.UserError(f"--out {given.out} is of --data: it would be overwritten")
    problems = smepo.read_problems(config.data, config.guide, config)
    if not problems:
        raise smepo.UserError(f"{config.data} has no rows")
    rows = []
    for index, problem in enumerate(problems):
        if given.leaks == "keep" or not problem.leaky:
            messages = smepo.build_messages(problem.question, problem.guide, config.system)
            rows.append(FORMATS[given.format](messages, problem, config.domain, index))
    leaky = sum(problem.leaky for problem in problems)
    if not rows:
        raise smepo.UserError(f"nothing to write: all {leaky} guides leak, see --leaks keep")
    write(rows, given.out)
    print(
        f"{given.out}: {len(rows)} of {len(problems)} rows; {leaky} guides leak the answer "
        f"(leak rate {leaky / len(problems):.3f}), leaks: {given.leaks}"
    )


if __name__ == "__main__":
    sys.exit(toys.command(main))
