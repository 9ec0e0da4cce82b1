"""Turn a data set into the one schema that smepo.py reads:

    python -m tiny_tasks.prepare SOURCE --out FILE.jsonl

SOURCE is a .jsonl, .json (an array), .csv, .tsv or .parquet file, each also .gz, a folder with one
of these for each split, or a hub id such as openai/gsm8k:main. The columns of GSM8K, MATH, OpenR1,
TRL, AIME and the official data are known; others are named by `--columns question=A trace=B
answer=C difficulty=D`, nested ones as a.b. Types are never guessed: 2001-03-01 and 007 stay.
"""

import argparse
import csv
import gzip
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets

import smepo
from tiny_tasks import toys

KNOWN = {  # as data sets call them: the first that is there
    "question": "question extra_info.question problem prompt",
    "trace": "teacher_ds extra_info.teacher_ds trace solution generations",
    "answer": "reward_model.ground_truth ground_truth answer",
    "difficulty": "difficulty level",
}


@dataclass
class Row:
    question: str
    trace: str
    answer: str
    difficulty: str

    def fault(self, domain: str, max_chars: int) -> str:
        """What is wrong with it, or ""."""
        if not self.question:
            return "no question"
        if not self.answer:
            return "no answer"
        if len(self.question + self.trace) > max_chars:
            return "too long"
        masked = smepo.mask_trace(self.trace, domain, self.answer)
        return "leaks" if smepo.leaks(masked, self.answer, domain) else ""

    def official(self) -> dict:
        truth = {"style": "rule", "ground_truth": self.answer}
        row = {"question": self.question, "reward_model": truth, "teacher_ds": self.trace}
        return row | {"difficulty": self.difficulty} if self.difficulty else row


# ---- Reading -------------------------------------------------------------------------------------


def read_source(source: str, split: str) -> list[dict]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob(f"{split}*") if file.is_file())
        if not files:
            raise smepo.UserError(f"{source} has no file for the split {split}: see --split")
        return [row for file in files for row in read_source(str(file), split)]
    elif not path.exists():
        if path.suffix:
            raise smepo.UserError(f"{source}: there is no such file")
        return list(datasets.load_dataset(*source.split(":"), split=split))
    if path.suffix == ".parquet":
        return list(datasets.Dataset.from_parquet(str(path)))
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        return parse(text, path.name.removesuffix(".gz"))
    except (ValueError, EOFError, csv.Error) as error:  # no UTF-8, no JSON, a torn .gz
        raise smepo.UserError(f"{path} cannot be read: {error}") from error


def parse(text: str, name: str) -> list[dict]:
    exact = {"parse_int": str, "parse_float": str}
    if name.endswith(".jsonl"):
        rows = [json.loads(line, **exact) for line in text.split("\n") if line.strip()]
    elif name.endswith(".json"):
        rows = json.loads(text, **exact)
    elif name.endswith((".csv", ".tsv")):
        lines = csv.DictReader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ",")
        rows = list(lines)
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a line has more or fewer cells than the header")
    else:
        raise ValueError("it must be .jsonl, .json, .csv, .tsv or .parquet")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold objects, one a line or in an array")
    return rows


# ---- What is what --------------------------------------------------------------------------------


def value_at(row: dict, column: str):
    """Of a.b, row["a"]["b"]; None if it is not there."""
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def columns_of(rows: list[dict], named: dict[str, str]) -> dict[str, str]:
    """{"question": its column, ...}: those that are named, else the first known one."""
    columns = {}
    for part, known in KNOWN.items():
        names = [named[part]] if part in named else known.split()
        names = [name for name in names if part in named or name not in named.values()]
        found = [name for name in names if any(value_at(row, name) is not None for row in rows)]
        if part in named and not found:
            raise smepo.UserError(f"--columns {part}={named[part]}: there is no such column")
        columns |= {part: found[0]} if found else {}
    answer = columns.get("answer")
    if answer == "answer" and "trace" not in columns:
        if any("####" in as_text(value_at(row, answer)) for row in rows):  # as in GSM8K
            columns["trace"] = columns.pop("answer")
    if "question" not in columns:
        names = ", ".join(rows[0])
        raise smepo.UserError(f"no column holds the question: --columns question=, of {names}")
    return columns


def as_text(value) -> str:
    """Chat messages and their parts become one text, of several solutions the first counts."""
    if isinstance(value, list):
        if value and all(isinstance(part, str) for part in value):
            return value[0]
        return "\n\n".join(map(as_text, value))
    if isinstance(value, dict):
        for key in "content", "text":
            if key in value:
                return as_text(value[key])
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value).strip()


def to_row(row: dict, columns: dict[str, str]) -> Row:
    parts = {part: as_text(value_at(row, columns.get(part, ""))) for part in KNOWN}
    if not parts["answer"] or re.search(r"\\boxed|####", parts["answer"]):  # it is worked out
        parts["answer"] = smepo.stated(parts["answer"] or parts["trace"])
    parts["difficulty"] = re.sub(r"^Level ", "", parts["difficulty"])
    return Row(**parts)


# ---- The command ---------------------------------------------------------------------------------


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    exact = {"exit_on_error": False, "allow_abbrev": False}
    parser = argparse.ArgumentParser("prepare", description=__doc__.partition("\n")[0], **exact)
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--split", default="train", help="of a folder or a hub id")
    parser.add_argument("--columns", nargs="+", default=[], help="question=A trace=B answer=C")
    parser.add_argument("--domain", default="math", help="whose mask is tried: math, code, search")
    parser.add_argument("--drop", action="store_true", help="leave out faulty rows")
    parser.add_argument("--max_chars", type=toys.at_least_1, default=8000, help="of a row")
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise smepo.UserError(f"unknown flag {rest[0]}: prepare --help lists them all")
    pairs = [column.partition("=") for column in given.columns]
    for part, _, column in pairs:
        if part not in KNOWN or not column:
            raise smepo.UserError(f"--columns {part}: it must be one of {', '.join(KNOWN)}, and =")
    given.columns = {part: column for part, _, column in pairs}
    if given.out.suffix != ".jsonl" or given.out.is_dir():
        raise smepo.UserError(f"--out {given.out}: it must be a .jsonl file")
    source = Path(given.source)
    inside = source.exists() and source.resolve() in (
        given.out.resolve(),
        *given.out.resolve().parents,
    )
    if inside and given.out.exists():
        raise smepo.UserError(f"--out {given.out} is the source: it would be overwritten")
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse_flags(arguments)
    raw = read_source(given.source, given.split)
    if not raw:
        raise smepo.UserError(f"{given.source} has no rows")
    columns = columns_of(raw, given.columns)
    rows = [to_row(row, columns) for row in raw]
    faults = [row.fault(given.domain, given.max_chars) for row in rows]
    for number, fault in enumerate(faults, start=1):
        if fault.startswith("no ") and not given.drop:
            raise smepo.UserError(f"{given.source} row {number} has {fault}: see --columns, --drop")
    kept = [row for row, fault in zip(rows, faults, strict=True) if not (fault and given.drop)]
    if not kept:
        raise smepo.UserError(f"{given.source}: no row is left, all have a fault: {faults[0]}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with smepo.replacing(given.out) as new:
        new.write_bytes(toys.to_jsonl([row.official() for row in kept]))
    report(given, columns, kept, rows, faults)


def report(given, columns: dict, kept: list[Row], rows: list[Row], faults: list[str]) -> None:
    for part in KNOWN:
        missing = "what the trace states" if part == "answer" else "-"
        print(f"{part:<10} {columns.get(part, missing)}")
    row = kept[0]
    masked = smepo.mask_trace(row.trace, given.domain, row.answer)
    print(f"\n{row.question}\n\nanswer: {row.answer}\n\n{row.trace}\n\nmasked:\n{masked}\n")
    counts = {fault: faults.count(fault) for fault in sorted(set(faults) - {""})}
    counts["no trace"] = sum(not row.trace for row in rows)
    print(", ".join(f"{fault}: {count}" for fault, count in counts.items()))
    print(f"{given.out}: {len(kept)} of {len(rows)} rows" + ", faulty ones dropped" * given.drop)


if __name__ == "__main__":
    sys.exit(toys.command(main))
