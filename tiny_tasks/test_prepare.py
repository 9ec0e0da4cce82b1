"""Other data sets become the one schema; and the two domains that stand beside math."""

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
TRL = {"prompt": [{"content": [{"text": "1 + 1?"}]}, {"role": "assistant", "content": "It is 2."}]}
TRL |= {"solution": "It is 2.", "ground_truth": "2"}
AIME = {"problem": "How many?", "answer": "204"}
OFFICIAL = {"prompt": "Not this.", "reward_model": {"ground_truth": "7"}}
OFFICIAL["extra_info"] = {"question": "Six and one?", "teacher_ds": "6 + 1 = 7"}
KNOWN = [  # and what becomes of them
    (GSM8K, ("Two and 70?", GSM8K["answer"], "72", None)),
    (MATH, ("Halve 1.", MATH["solution"], r"\frac{1}{2}", "3")),
    (OPENR1, ("Halve 1.", "So.", "0.5", None)),
    (TRL, ("1 + 1?", "It is 2.", "2", None)),
    (AIME, ("How many?", "", "204", None)),
    (OFFICIAL, ("Six and one?", "6 + 1 = 7", "7", None)),
]


def prepared(source, *flags: str) -> list[tuple]:
    """(question, trace, answer, difficulty) of each row that is written."""
    prepare.main([str(source), "--out", "out.jsonl", *flags])
    found = []
    for row in smepo.read_records(Path("out.jsonl")):
        truth = row["reward_model"]["ground_truth"]
        found.append((row["question"], row["teacher_ds"], truth, row.get("difficulty")))
    return found


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


@pytest.mark.parametrize("row, expected", KNOWN)
def test_known_data_sets_train_after_it(row, expected, capsys):
    source = write("rows.jsonl", json.dumps(row) + "\n\n" + json.dumps(row))
    assert prepared(source) == [expected] * 2
    assert "masked:" in capsys.readouterr().out
    guide = "semantic" if expected[1] else "none"
    (p, _) = smepo.read_problems("out.jsonl", guide, settings())
    assert (p.question, p.trace, p.answer) == expected[:3]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet"])
def test_every_kind_of_file_keeps_its_values_as_they_are(kind):
    answers = ["2001-03-01", "007", "9223372036854775808", "1.10"]
    rows = [{"question": "1?", "answer": answer} for answer in answers]
    lines = "\n".join(map(json.dumps, rows)).replace('"1.10"', "1.10")  # a number in JSON
    cells = "\n".join(["question,answer", *(f"1?,{answer}" for answer in answers)])
    write("rows.jsonl", "\ufeff" + lines)  # with a byte order mark
    write("rows.json", "[" + lines.replace("\n", ",") + "]")
    write("rows.csv", cells)
    write("rows.tsv", cells.replace(",", "\t"))
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    assert [row[2] for row in prepared(f"rows.{kind}")] == answers


def test_columns_may_be_named_and_nested():
    row = {"a": {"q": "1 + 1?"}, "why": "It is 2.", "n": 2, "hard": 5, "question": "No."}
    source = write("mine.jsonl", json.dumps(row))
    flags = ["--columns", "question=a.q", "trace=why", "answer=n", "difficulty=hard"]
    assert prepared(source, *flags) == [("1 + 1?", "It is 2.", "2", "5")]
    flat = write("flat.csv", "extra_info.question,answer\n1?,2")  # as a table writes nested ones
    rows = [{"question": "1?", "answer": [2, 3], "level": float("nan")}]
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    assert prepared(flat) == prepared("rows.parquet") == [("1?", "", "2", None)]


def test_drop_leaves_out_what_is_faulty_and_counts_it(capsys):
    changes = {"problem": ""}, {"solution": "So."}, {}, {}, {"problem": "x" * 9000}
    source = write("rows.jsonl", "\n".join(json.dumps(MATH | change) for change in changes))
    with pytest.raises(smepo.UserError, match="row 1 has no question"):
        prepared(source)
    assert not Path("out.jsonl").exists()
    assert len(prepared(source, "--drop")) == 2
    out = capsys.readouterr().out
    assert "no question: 1" in out and "no answer: 1" in out and "too long: 1" in out


REFUSED = [  # the content of a file, its name and the flags, and the message
    (None, "none.jsonl", "No such file"),
    ("", "empty.jsonl", "has no rows"),
    ('{"question": ', "torn.jsonl", "cannot be read"),
    ('{"question": "1?"}\n{"question": ', "torn.jsonl", "line 2 is no JSON"),
    (",question\n0,2 + 2?\n", "index.csv", "no answer"),
    ("[1]", "list.jsonl", "objects"),
    ('{"question": "x"}', "object.json", "objects"),
    ("question,answer\n1,2,3\n", "ragged.csv", "cells"),
    ("question,answer\n1\n", "short.csv", "cells"),
    ('{"question": null, "answer": "1"}', "null.jsonl", "no column holds the question"),
    ("x", "rows.txt", "must be .jsonl"),
    ('{"question": "é"}'.encode("latin-1"), "latin.jsonl", "cannot be read"),
    ("no gzip", "rows.jsonl.gz", "gzip"),
    (json.dumps(MATH), "good.jsonl --out out.txt", "must be a .jsonl file"),
    (json.dumps(MATH), "good.jsonl --out good.jsonl", "would be overwritten"),
    (json.dumps(MATH), "good.jsonl --columns colour=red", "--columns colour"),
    (json.dumps(MATH), "good.jsonl --columns answer=anser", "no such column"),
    (json.dumps(MATH), "good.jsonl --nonsense", "unrecognized arguments"),
    (json.dumps(MATH), "good.jsonl --max_chars 0", "max_chars"),
]


@pytest.mark.parametrize("content, command, message", REFUSED)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(content, command, message, capsys):
    path, *flags = command.split()
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        Path(path).write_bytes(content)
    assert toys.command(lambda: prepare.main([path, "--out", "out.jsonl", *flags])) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert [file.read_bytes() for file in Path.cwd().iterdir()] == [content] * Path(path).exists()


@pytest.mark.parametrize(
    "text, truth, expected",
    [
        (r"\boxed{5\text{ K}}", "5", 1.0),
        (r"\boxed{\{3, 2\}}", r"\{2,3\}", 1.0),
        (r"\boxed{[1, 3)}", "[1,3)", 1.0),
        (r"\boxed{x = 2 + 3 = 5}", "5", 1.0),
        (r"\boxed{2(x+1)}", "2x+2", 1.0),
        (r"\boxed{5 < x}", "5", 0.0),
        (r"\boxed{}", "", 0.0),
        (r"\boxed{9^{9^{9}}}", "5", 0.0),  # it has no end
        ("I tried 3 and 5.", "5", 0.0),
        ("<answer>5</answer>", "5", 1.0),
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
    Path("own/train").mkdir()
    for shard in ("own/train-0.jsonl", "own/data/train-1.jsonl", "own/train/2.jsonl"):
        write(shard, json.dumps(AIME | {"problem": shard}))
    assert len(prepared("own")) == 3
    with pytest.raises(smepo.UserError, match="would be overwritten"):
        prepare.main(["own", "--out", "own/train-0.jsonl"])


def test_an_answer_that_is_worked_out_is_read_and_a_named_column_is_taken_once():
    source = write("a.jsonl", json.dumps(AIME | {"answer": "We add, \\boxed{204}."}))
    assert prepared(source)[0][2] == "204"
    source = write("b.jsonl", json.dumps({"question": "1?", "solution": "2"}))
    assert prepared(source, "--columns", "answer=solution") == [("1?", "", "2", None)]
