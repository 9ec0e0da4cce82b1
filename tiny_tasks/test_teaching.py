"""Every command and snippet of the exercises runs, shortened; so does the walk-through."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import smepo
from tiny_tasks.fixtures import ROOT, TASKS, rows, write_rows

BLOCKS = re.findall(
    r"^```(python)?\n(.*?)^```", (TASKS / "exercises.md").read_text("utf-8"), re.M | re.S
)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
SNIPPETS = [block for kind, block in BLOCKS if kind]
FEW = "--prompts_per_step 2 --group_size 2 --eval_samples 1 --max_new_tokens 8".split()


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Flags that make a run short."""
    data = write_rows(tmp_path / "few.jsonl", rows("train", 8))
    return ["--steps", "2", *FEW, "--data", data, "--test_data", data]


def test_there_are_ten_exercises_each_with_an_answer():
    text = (TASKS / "exercises.md").read_text("utf-8")
    assert re.findall(r"^## (\d+)\. ", text, re.M) == [str(i) for i in range(1, 11)]
    assert text.count("<details>") == text.count("</details>") == 10
    assert len(COMMANDS) >= 9 and len(SNIPPETS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, few, tmp_path):
    _, *words = shlex.split(command)
    words = re.sub(r"--steps \d+|--group_size \d+|--prompts_per_step \d+", "", " ".join(words))
    if words.startswith("smepo.py"):
        assert smepo.main([*few, *words.split()[1:]]) == 0
        return
    _, module, *flags = words.split()
    if module.endswith("mask"):
        flags = ["--data", few[-1]]
    elif module.endswith("compare"):
        flags += few
    importlib.import_module(module).main(flags)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, few, monkeypatch):
    for name in "shows_guide", "find_domain":
        monkeypatch.setattr(smepo, name, getattr(smepo, name))
    exec(snippet.replace('"--steps", "20"', ", ".join(map(repr, few))), {})


def test_the_walk_through_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cells = json.loads((TASKS / "walkthrough.ipynb").read_text("utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] or "import sys" in cell["source"][0]
            source = "".join(cell["source"]).replace("range(1, 6)", "range(1, 2)")
            exec(source.replace("[:400]", "[:8]"), names)
    assert names["metrics"]["step"] == 1


README = (ROOT / "README.md").read_text("utf-8")


def test_the_line_of_data_in_the_readme_is_read(tmp_path):
    (line,) = re.findall(r"```json\n(.*)\n```", README)
    path = write_rows(tmp_path / "rows.jsonl", [json.loads(line)])
    (p,) = smepo.read_problems(path, "semantic", smepo.Config())
    assert (p.answer, p.difficulty, p.leaky) == ("16", "3", False)


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
