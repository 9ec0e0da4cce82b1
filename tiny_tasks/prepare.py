"""Turn a data set into the one schema that smepo.py reads:

    python -m tiny_tasks.prepare SOURCE --out FILE.jsonl

SOURCE is a .jsonl, .json (an array), .csv, .tsv or .parquet file, each also .gz, a folder with one
of these for each split, or a hub id such as openai/gsm8k:main. The columns of GSM8K, MATH, OpenR1,
TRL, AIME and the official data are known; others are named by `--columns question=A trace=B
answer=C difficulty=D`, nested ones as a.b. Types are never guessed: 2001-03-01 and 007 stay.
"""

import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import datasets
from pyarrow import parquet

import smepo
from tiny_tasks import toys

KNOWN = {  # as data sets call them: the first that is there
    "question": "question extra_info.question problem prompt",
    "trace": "teacher_ds extra_info.teacher_ds trace solution generations",
    "answer": "reward_model.ground_truth ground_truth answer",
    "difficulty": "difficulty level",
}
csv.field_size_limit(2**31 - 1)  # what is too long is for --max_chars to say


def read_source(source: str, split: str) -> list[dict]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        files = [f for f in files if any(p.startswith(split) for p in f.relative_to(path).parts)]
        if not files:
            raise smepo.UserError(f"{source} has no file for the split {split}: see --split")
        return [row for file in files for row in read_source(str(file), split)]
    try:
        if path.exists() or path.suffix:
            return read_file(path)
        return list(datasets.load_dataset(*source.split(":"), split=split))
    except Exception as error:  # each of these libraries raises its own
        first_line = str(error).partition("\n")[0]
        raise smepo.UserError(f"{source} cannot be read: {first_line}") from error


def read_file(path: Path) -> list[dict]:
    data, name = path.read_bytes(), path.name
    if name.endswith(".gz"):
        data, name = gzip.decompress(data), name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return parquet.read_table(io.BytesIO(data)).to_pylist()
    text, exact = data.decode("utf-8-sig"), {"parse_int": str, "parse_float": str}
    if name.endswith(".jsonl"):
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line, **exact)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {line[:50]}") from error
    elif name.endswith(".json"):
        rows = json.loads(text, **exact)
    elif name.endswith((".csv", ".tsv")):
        delimiter = "\t" if name.endswith(".tsv") else ","
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a line has more or fewer cells than the header")
    else:
        raise ValueError("it must be .jsonl, .json, .csv, .tsv or .parquet")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold objects, one a line or in an array")
    return rows


def text_at(row: dict, column: str) -> str:
    """Of a.b, row["a"]["b"] as text; "" if it is not there."""
    for name in [column] if column in row else column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return as_text(row)


def as_text(value) -> str:
    """Chat messages and their parts become one text, of several solutions the first counts."""
    if isinstance(value, list):
        if value and all(isinstance(part, str | int | float) for part in value):
            return str(value[0])
        turns = [x for x in value if not (isinstance(x, dict) and x.get("role") == "assistant")]
        return "\n\n".join(map(as_text, turns or value))  # a question does not hold its answer
    if isinstance(value, dict):
        for key in "content", "text":
            if key in value:
                return as_text(value[key])
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None or value != value else str(value).strip()  # nan is not itself


def columns_of(rows: list[dict], named: dict[str, str]) -> dict[str, str]:
    """{"question": its column, ...}: those that are named, else the first known one."""

    def is_there(column: str) -> bool:
        return any(text_at(row, column) for row in rows)

    for part, column in named.items():
        if part not in KNOWN or not is_there(column):
            parts = ", ".join(KNOWN)
            raise smepo.UserError(f"--columns {part}={column}: no such column, or none of {parts}")
    columns = dict(named)
    for part, known in KNOWN.items():
        for column in known.split():
            if part not in columns and column not in named.values() and is_there(column):
                columns[part] = column
    if "question" not in columns:
        names = ", ".join(rows[0])
        raise smepo.UserError(f"no column holds the question: --columns question=, of {names}")
    if "trace" not in columns and "answer" in columns:
        if any("####" in text_at(row, columns["answer"]) for row in rows):  # as in GSM8K
            columns["trace"] = columns.pop("answer")
    return columns


def to_official(row: dict, columns: dict[str, str]) -> dict:
    texts = (text_at(row, columns[part]) if part in columns else "" for part in KNOWN)
    question, trace, answer, difficulty = texts
    if not answer or re.search(r"\\boxed|####", answer):  # it is worked out
        answer = smepo.stated(answer or trace)
    truth = {"style": "rule", "ground_truth": answer}
    official = {"question": question, "reward_model": truth, "teacher_ds": trace}
    if difficulty:
        official["difficulty"] = difficulty.removeprefix("Level ")
    return official


def fault(row: dict, domain: str, max_chars: int) -> str:
    """What is wrong with a row of the official schema, or ""."""
    question, trace = row["question"], row["teacher_ds"]
    answer = row["reward_model"]["ground_truth"]
    if not question:
        return "no question"
    if not answer:
        return "no answer"
    try:
        toys.to_jsonl([row])
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        return "no UTF-8 form"
    if len(question + trace) > max_chars:
        return "too long"
    masked = smepo.mask_trace(trace, domain, answer)
    return "leaks" if smepo.leaks(masked, answer, domain) else ""


def main(arguments: list[str] | None = None) -> None:
    parser = toys.Parser("prepare", __doc__.partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--split", default="train", help="of a folder or a hub id")
    parser.add_argument("--columns", nargs="+", default=[], help="question=A trace=B answer=C")
    parser.add_argument("--domain", default="math", help="whose mask is tried: math, code, search")
    parser.add_argument("--drop", action="store_true", help="leave out faulty rows")
    parser.add_argument("--max_chars", type=toys.at_least_1, default=8000, help="of a row")
    given = parser.parse_args(arguments)
    if given.out.suffix != ".jsonl" or given.out.is_dir():
        raise smepo.UserError(f"--out {given.out}: it must be a .jsonl file")
    if given.out.exists() and given.out.resolve().is_relative_to(Path(given.source).resolve()):
        raise smepo.UserError(f"--out {given.out} is the source: it would be overwritten")
    try:
        smepo.find_domain(given.domain)
    except (ImportError, AttributeError, TypeError) as error:
        raise smepo.UserError(f"--domain {given.domain}: {error}") from error
    raw = read_source(given.source, given.split)
    if not raw:
        raise smepo.UserError(f"{given.source} has no rows")
    columns = columns_of(raw, dict(name.partition("=")[::2] for name in given.columns))
    rows = [to_official(row, columns) for row in raw]
    faults = [fault(row, given.domain, given.max_chars) for row in rows]
    for number, found in enumerate(faults, start=1):
        if found.startswith("no ") and not given.drop:
            raise smepo.UserError(f"{given.source} row {number} has {found}: see --columns, --drop")
    kept = [row for row, found in zip(rows, faults) if not (found and given.drop)]
    if not kept:
        raise smepo.UserError(f"{given.source}: no row is left, all have a fault: {faults[0]}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with smepo.replacing(given.out) as new:
        new.write_bytes(toys.to_jsonl(kept))
    print("--columns", " ".join(map("=".join, columns.items())), "of", ", ".join(raw[0]))
    report(given, kept, rows, faults)


def report(given, kept: list[dict], rows: list[dict], faults: list[str]) -> None:
    trace, answer = kept[0]["teacher_ds"], kept[0]["reward_model"]["ground_truth"]
    masked = smepo.mask_trace(trace, given.domain, answer)
    print(f"\n{kept[0]['question']}\n\nanswer: {answer}\n\n{trace}\n\nmasked:\n{masked}\n")
    counts = Counter(filter(None, faults))
    counts["rows without a trace"] = sum(not row["teacher_ds"] for row in rows)
    print(", ".join(f"{found}: {count}" for found, count in counts.items()))
    print(f"{given.out}: {len(kept)} of {len(rows)} rows" + ", faulty ones dropped" * given.drop)


if __name__ == "__main__":
    sys.exit(toys.command(main))
