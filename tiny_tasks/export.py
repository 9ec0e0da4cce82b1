"""`python -m tiny_tasks.export`: guided prompts for the engines that scale out.

SMEPO changes the prompt alone, so any GRPO engine runs it on a file of masked prompts. Its flags
are those of a run, as --data, --domain, --system, --guide and --seed, and these:
"""

import sys
from pathlib import Path

import datasets

import smepo
from tiny_tasks import toys


def to_trl(messages: list[dict], p: smepo.Problem, domain: str, index: int) -> dict:
    """TRL: a conversational prompt; its other columns are handed to the reward function."""
    columns = {"ground_truth": p.answer, "domain": domain, "difficulty": p.difficulty}
    return {"prompt": messages} | columns


def to_verl(messages: list[dict], p: smepo.Problem, domain: str, index: int) -> dict:
    """verl: its five columns; extra_info carries what was not shown, and the row's number."""
    extra = {"index": index, "question": p.question, "teacher_ds": p.trace}
    return {
        "data_source": f"smepo/{domain}",
        "prompt": messages,
        "ability": domain,
        "reward_model": {"style": "rule", "ground_truth": p.answer},
        "extra_info": extra | {"difficulty": p.difficulty},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = toys.Parser("export", __doc__)
    parser.add_argument("--format", choices=["trl", "verl"], required=True)
    about = "rows whose guide gives the answer away"
    parser.add_argument("--leaks", choices=["drop", "keep"], default="drop", help=about)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl or .parquet file")
    given, rest = parser.parse_known_args(arguments)
    if given.out.suffix not in (".jsonl", ".parquet"):
        raise smepo.UserError(f"--out {given.out}: it must end in .jsonl or .parquet")
    config = smepo.parse([*rest, "--test_data", "none"])
    source, out = Path(config.data or smepo.TASKS / config.task).resolve(), given.out.resolve()
    if out.exists() and source in (out, out.parent):
        raise smepo.UserError(f"--out {given.out} is of --data: it would be overwritten")
    problems = smepo.read_problems(config.data, config.guide, config)
    if not problems:
        raise smepo.UserError(f"{config.data} has no rows")
    to_row = to_trl if given.format == "trl" else to_verl
    leaky = [smepo.leaks(p.guide, p.answer, config.domain) for p in problems]
    rows = []
    for index, problem in enumerate(problems):
        if given.leaks == "keep" or not leaky[index]:
            messages = smepo.build_messages(problem.question, problem.guide, config.system)
            rows.append(to_row(messages, problem, config.domain, index))
    if not rows:
        raise smepo.UserError(f"nothing to write: all {len(leaky)} guides leak, see --leaks keep")
    out.parent.mkdir(parents=True, exist_ok=True)
    with smepo.replacing(out) as new:
        if out.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(new)
        else:
            new.write_bytes(toys.to_jsonl(rows))
    share = f"{sum(leaky)} guides leak the answer (leak rate {sum(leaky) / len(leaky):.3f})"
    print(f"{given.out}: {len(rows)} of {len(problems)} rows; {share}, leaks: {given.leaks}")


if __name__ == "__main__":
    sys.exit(toys.command(main))
