"""Code as smepo.py loads and learns it: the tests of a program are its ground truth."""

import json

import pytest
import torch
from tiny_tasks.coding import judge

import smepo
from smepo import UserError
from tiny_tasks.fixtures import GOOD, rows, settings, write_rows

CUBE = {"inputs": ["2\n", "-3\n"], "outputs": ["8\n", "-27\n"]}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 9.0)  # a busy machine fails no test


def row_of(tests, trace: str = "Step 1: cube it.\n```python\nprint(int(input()) ** 3)\n```"):
    return GOOD | {"teacher_ds": trace, "reward_model": {"ground_truth": tests}}


@pytest.mark.parametrize(
    "tests",
    ["x", "{", "[]", "{}", "7", "null", '{"inputs": ["1"]}', '{"inputs": [], "outputs": []}']
    + ['{"inputs": ["1"], "outputs": []}', '{"inputs": [1], "outputs": [1]}'],
)
def test_malformed_unit_tests_are_refused_by_their_line(tmp_path, base, tests):
    path = write_rows(tmp_path / "bad.jsonl", [row_of(json.dumps(CUBE)), row_of(tests)])
    with pytest.raises(UserError, match="bad.jsonl row 2: "):
        smepo.load_problems(path, "semantic", base[1], settings(task="code", data=path))


@pytest.mark.parametrize("tests", [CUBE, json.dumps(CUBE)], ids=["nested", "text"])
def test_a_problem_of_code_comes_with_its_tests_and_a_plan(tmp_path, base, tests):
    path = write_rows(tmp_path / "rows.jsonl", [row_of(tests)] * 2)
    config = settings(domain="code", data=path)
    assert "python" in config.system
    for p in smepo.load_problems(path, "semantic", base[1], config):
        assert p.guide == "Step 1: cube it.\n```python\n[CODE]\n```" and not p.leaky
        texts = [p.trace, p.trace.replace("3", "2"), p.guide, ""]
        assert smepo.find_domain("code").rewards(texts, [p.answer] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert smepo.load_problems(path, "full", base[1], config)[0].leaky


def test_the_verdicts_of_the_tests_reach_the_rollouts():
    config = settings(task="code")
    model, tokenizer = smepo.load_model(config.model, config)
    problems = smepo.load_problems(config.test_data, "semantic", tokenizer, config)[:12]
    assert [p.question for p in problems] == [row["question"] for row in rows("test", 12, "coding")]
    batch = [p for p in problems for _ in range(4)]
    torch.manual_seed(0)
    rollouts = smepo.rollout(model, tokenizer, batch, [True] * 48, config)
    for r in rollouts:
        assert r.reward == (smepo.reward(r.text, r.problem.answer, "code") if r.ended else 0.0)
    assert 0 < sum(r.reward for r in rollouts) < 48
