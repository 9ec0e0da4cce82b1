"""Every command and snippet of the exercises runs, shortened; so does the walk-through."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import smepo
from tiny_tasks.fixtures import ROOT, TASKS, rows, write_rows

README = (ROOT / "README.md").read_text("utf-8")
EXERCISES = (TASKS / "exercises.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(python)?\n(.*?)^```", EXERCISES, re.M | re.S)
FEW = "--steps 2 --prompts_per_step 2 --group_size 4 --eval_samples 1 --max_new_tokens 32".split()


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Flags that make a run short."""
    data = write_rows(tmp_path / "few.jsonl", rows("train", 8))
    return [*FEW, "--data", data, "--test_data", data]


def test_there_are_ten_exercises_each_with_an_answer():
    assert re.findall(r"^## (\d+)\. ", EXERCISES, re.M) == [str(i) for i in range(1, 11)]
    for part in EXERCISES.split("\n## ")[1:]:
        task, answer = part.split("<details>")
        assert "```" in task and re.search(r"\d.*</details>", answer, re.S)


def test_the_exercises_run_in_their_order(few, monkeypatch):
    main = smepo.main
    monkeypatch.setattr(smepo, "main", lambda flags: main([*flags, *few]))  # the last one holds
    for kind, block in BLOCKS:
        with monkeypatch.context() as patch:
            for name in "score", "backward", "shows_guide":  # what snippets replace
                patch.setattr(smepo, name, getattr(smepo, name))
            for code in [block] if kind else block.splitlines():
                (run_snippet if kind else run_command)(code, few, monkeypatch)
    folders = set(re.findall(r"runs/(e\d[\w-]*)", "".join(block for _, block in BLOCKS)))
    assert folders == {p.name for p in Path("runs").iterdir() if p.is_dir()} and len(folders) > 10
    for folder in folders:
        assert smepo.read_records(Path("runs", folder, "metrics.jsonl"))[-1]["step"] == 2
    bare, plain = (smepo.read_records(Path(f"runs/{e}/metrics.jsonl")) for e in ("e4", "e1"))
    assert bare[1]["reward"] == plain[1]["reward"] and bare[1]["loss"] != plain[1]["loss"]


def run_snippet(code: str, few: list[str], monkeypatch):
    if "\nDOMAIN = " in code:  # a module
        Path("parity.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(Path.cwd())
    exec(code.replace("smepo.Config()", f"smepo.Config(test_data={few[-1]!r})"), {})


def run_command(line: str, few: list[str], _):
    _, *words = shlex.split(line)
    if words[0] == "smepo.py":
        assert smepo.main(words[1:]) == 0, line
    else:
        flags = ["--data", few[-1]] if "--data" in words else words[2:]
        importlib.import_module(words[1]).main(flags)


def test_the_walk_through_runs(monkeypatch):
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    names = {}
    for cell in json.loads((TASKS / "walkthrough.ipynb").read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            assert cell["outputs"] or "import smepo" in source
            assert str(ROOT) not in json.dumps(cell["outputs"])
            source = source.replace("steps = 15", "steps = 1").replace("[::4]", "[::100]")
            source = source.replace('device="cpu")', 'device="cpu", prompts_per_step=2)')
            exec(source, names)
    assert names["metrics"]["step"] == 1


def test_the_line_of_data_in_the_readme_is_read(tmp_path):
    (line,) = re.findall(r"```json\n(.*)\n```", README)
    path = write_rows(tmp_path / "rows.jsonl", [json.loads(line)])
    (p,) = smepo.read_problems(path, "semantic", smepo.Config())
    assert (p.answer, p.difficulty) == ("16", "3")


def test_the_schedule_in_the_readme_runs(few, monkeypatch):
    monkeypatch.setattr(smepo, "shows_guide", smepo.shows_guide)
    (line,) = re.findall(r"`(smepo\.shows_guide = .*?)`", README)
    exec(line, {"smepo": smepo})
    assert smepo.main([*few, "--out", "mine"]) == 0
    records = smepo.read_records(Path("mine/metrics.jsonl"))
    assert [record["guided"] for record in records[1:]] == [0, 1]


def test_the_maps_of_smepo_name_its_lines():
    source = (ROOT / "smepo.py").read_text("utf-8").splitlines()
    begins = [i for i, line in enumerate(source, start=1) if line.startswith("# ----")]
    rows_of_map = re.findall(r"^\|(\d+) to (\d+)\|", README, re.M)
    for first, last in rows_of_map:
        assert int(first) in begins and int(last) + 1 in [*begins, len(source) + 1]
    assert len(rows_of_map) >= 6
    first, last = re.search(r"The algorithm is lines (\d+) to (\d+)", smepo.__doc__).groups()
    assert first == rows_of_map[0][0] and source[int(last)].startswith("# ---- Data")
