"""Other data sets become the one schema; and the two domains that stand beside math."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest

import smepo
from tiny_tasks import prepare, toys
from tiny_tasks.fixtures import settings

GSM8K = {"question": "Two and 70?", "answer": "Add: 2 + 70 = <<2+70=72>>72.\n#### 72"}
MATH = {"problem": "Halve 1.", "level": "Level 3", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
OPENR1 = {"problem": "Halve 1.", "solution": "So.", "answer": "0.5", "generations": ["No."]}
TRL = {
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}],
    "solution": "It is 2.",
    "ground_truth": "2",
}
AIME = {"problem": "How many?", "answer": "204"}
OFFICIAL = {
    "prompt": [{"role": "user", "content": "Not this."}],
    "reward_model": {"style": "rule", "ground_truth": "7"},
    "extra_info": {"question": "Six and one?", "teacher_ds": "6 + 1 = 7", "index": 3},
}


def prepared(source, *flags: str) -> list[tuple]:
    """(question, trace, answer, difficulty) of each row that is written."""
    prepare.main([str(source), "--out", "out.jsonl", *flags])
    rows = smepo.read_records(Path("out.jsonl"))
    found = []
    for row in rows:
        truth = row["reward_model"]["ground_truth"]
        found.append((row["question"], row["teacher_ds"], truth, row.get("difficulty")))
    return found


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


@pytest.mark.parametrize(
    "row, expected",
    [
        (GSM8K, ("Two and 70?", GSM8K["answer"], "72", None)),
        (MATH, ("Halve 1.", MATH["solution"], r"\frac{1}{2}", "3")),
        (OPENR1, ("Halve 1.", "So.", "0.5", None)),
        (TRL, ("1 + 1?", "It is 2.", "2", None)),
        (AIME, ("How many?", "", "204", None)),
        (OFFICIAL, ("Six and one?", "6 + 1 = 7", "7", None)),
    ],
    ids="GSM8K MATH OpenR1 TRL AIME official".split(),
)
def test_known_data_sets_train_after_it(row, expected, capsys):
    source = write("rows.jsonl", json.dumps(row) + "\n\n" + json.dumps(row))
    assert prepared(source) == [expected] * 2
    assert "masked:" in capsys.readouterr().out
    guide = "semantic" if expected[1] else "none"
    (p, _) = smepo.read_problems("out.jsonl", guide, settings())
    assert (p.question, p.trace, p.answer) == expected[:3]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet", "folder"])
def test_every_kind_of_file_keeps_its_values_as_they_are(kind):
    answers = ["2001-03-01", "007", "9223372036854775808", "1.10"]
    rows = [{"question": f"{i}?", "solution": "So.", "answer": a} for i, a in enumerate(answers)]
    lines = "\n".join(map(json.dumps, rows)).replace('"1.10"', "1.10")  # a number in JSON
    name = f"rows.{kind}"
    if kind == "jsonl":
        write(name, "\ufeff" + lines)  # with a byte order mark
    elif kind == "json":
        write(name, f"[{lines.replace(chr(10), ',')}]")
    elif kind in ("csv", "tsv"):
        with open(name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl.gz":
        Path(name).write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(name)
    else:
        Path(name).mkdir()
        write(f"{name}/train.jsonl", lines)
    assert [row[2] for row in prepared(name)] == answers


def test_columns_may_be_named_and_nested():
    row = {"a": {"q": "1 + 1?"}, "why": "It is 2.", "n": 2, "hard": 5, "question": "No."}
    source = write("mine.jsonl", json.dumps(row))
    flags = ["--columns", "question=a.q", "trace=why", "answer=n", "difficulty=hard"]
    assert prepared(source, *flags) == [("1 + 1?", "It is 2.", "2", "5")]


def test_drop_leaves_out_what_is_faulty_and_counts_it(capsys):
    rows = [MATH | {"problem": ""}, MATH | {"solution": "So."}, MATH, MATH, MATH]
    rows[4] = MATH | {"problem": "x" * 9000}
    source = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(smepo.UserError, match="row 1 has no question"):
        prepared(source)
    assert not Path("out.jsonl").exists()
    assert len(prepared(source, "--drop")) == 2
    out = capsys.readouterr().out
    assert "no question: 1" in out and "no answer: 1" in out and "too long: 1" in out


BROKEN = {
    "none.jsonl": (None, "No such file"),
    "empty.jsonl": ("", "has no rows"),
    "torn.jsonl": ('{"question": ', "cannot be read"),
    "list.jsonl": ("[1]", "objects"),
    "object.json": ('{"question": "x"}', "objects"),
    "ragged.csv": ("question,answer\n1,2,3\n", "cells"),
    "short.csv": ("question,answer\n1\n", "cells"),
    "other.jsonl": ('{"text": "x"}', "no column holds the question"),
    "bare.jsonl": ('{"question": "x"}', "row 1 has no answer"),
    "null.jsonl": ('{"question": null, "answer": "1"}', "no column holds the question"),
    "rows.txt": ("x", "must be .jsonl"),
    "latin.jsonl": ('{"question": "é"}'.encode("latin-1"), "cannot be read"),
    "rows.jsonl.gz": ("no gzip", "gzip"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources_are_refused_in_one_line_and_nothing_is_written(name, capsys):
    content, message = BROKEN[name]
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert toys.command(lambda: prepare.main([name, "--out", "out.jsonl"])) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out out.txt", ".jsonl"),
        ("--out rows.jsonl", "would be overwritten"),
        ("--out out.jsonl --columns colour=red", "--columns colour"),
        ("--out out.jsonl --columns answer=anser", "no such column"),
        ("--out out.jsonl --nonsense", "unrecognized arguments: --nonsense"),
        ("--out out.jsonl --max_chars 0", "max_chars"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message, capsys):
    before = write("rows.jsonl", json.dumps(MATH))
    assert toys.command(lambda: prepare.main(["rows.jsonl", *flags.split()])) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and json.loads(Path(before).read_text("utf-8")) == MATH


@pytest.mark.parametrize(
    "text, truth, expected",
    [
        (r"\boxed{5\text{ K}}", "5", 1.0),
        (r"\boxed{\frac{1}{-2}}", "-1/2", 1.0),
        (r"\boxed{\{3, 2\}}", r"\{2,3\}", 1.0),
        (r"\boxed{x \le 5}", r"x \leq 5", 1.0),
        (r"\boxed{[1, 3)}", "[1,3)", 1.0),
        (r"\boxed{[1, 3]}", "[1,3)", 0.0),
        (r"\boxed{x = 2 + 3 = 5}", "5", 1.0),
        (r"\boxed{2(x+1)}", "2x+2", 1.0),
        (r"\boxed{5 < x}", "5", 0.0),
        (r"\boxed{}", "", 0.0),
    ],
)
def test_math_verify_knows_what_math_does_not(text, truth, expected):
    pytest.importorskip("math_verify")
    assert smepo.reward(text, truth, "tiny_tasks.math_verify") == expected


def test_a_domain_in_parts():
    domain = smepo.find_domain("tiny_tasks.arithmetic.parts")
    texts = ["The answer is 4.", "The answer is 5.", "The answer is blue.", ""]
    assert domain.rewards(texts, ["4"] * 4) == [1.0, 0.2, 0.0, 0.0]
    assert domain.solved_from == 1.0


def test_every_shard_of_a_folder_is_read_and_none_overwritten():
    Path("own/data").mkdir(parents=True)
    for shard in ("own/train-0.jsonl", "own/data/train-1.jsonl"):
        write(shard, json.dumps(AIME | {"problem": shard}))
    assert len(prepared("own")) == 2
    with pytest.raises(smepo.UserError, match="would be overwritten"):
        prepare.main(["own", "--out", "own/train-0.jsonl"])


def test_an_answer_that_is_worked_out_is_read_and_a_named_column_is_taken_once():
    source = write("a.jsonl", json.dumps(AIME | {"answer": "We add, \\boxed{204}."}))
    assert prepared(source)[0][2] == "204"
    source = write("b.jsonl", json.dumps({"question": "1?", "solution": "2"}))
    assert prepared(source, "--columns", "answer=solution") == [("1?", "", "2", None)]


def test_math_verify_ends_and_reads_the_stated_answer_alone():
    pytest.importorskip("math_verify")
    reward = smepo.find_domain("tiny_tasks.math_verify").rewards
    texts = [r"\boxed{9^{9^{9}}}", "I tried 3 and 5.", "<answer>5</answer>"]
    assert reward(texts, ["5"] * 3) == [0.0, 0.0, 1.0]
