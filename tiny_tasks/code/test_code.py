"""The domain code: its mask, its leak check, its reward. The judge has test_judge.py."""

import json
import re

import pytest
import torch

import smepo
from tiny_tasks.code import domain
from tiny_tasks.fixtures import masker_cases, rows, settings, write_rows


def mask(text: str) -> str:
    return smepo.mask_trace(text, "code", "{}")


@pytest.mark.parametrize("case", masker_cases("code"), ids=lambda case: case["id"])
def test_masker_case(case):
    masked = mask(case["text"])
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert mask(masked) == masked
    assert not smepo.leaks(masked, "{}", "code")


@pytest.mark.parametrize("rule", domain.RULES, ids=lambda rule: rule[2])
def test_every_rule_acts_on_its_example(rule):
    action, pattern, example = rule
    assert re.search(pattern, example, re.MULTILINE)
    assert (mask(example) == example) == (action == "keep")


@pytest.mark.parametrize(
    "text, masked",
    [
        ("Take `max(a)`, not `a`.", "Take `[CODE]`, not `a`."),
        ("`dp[i]` with `O(n*m)`", "`[CODE]` with `O(n*m)`"),
        ("~~~\nx\n~~~\nand\n```\ny", "~~~\n[CODE]\n~~~\nand\n```\n[CODE]"),
        ("> ```\n> x = 1\n> ```\n> So.", "> ```\n> [CODE]\n> ```\n> So."),
        ("- a\n  ```py\n  x\n  ```\n- b", "- a\n  ```py\n  [CODE]\n  ```\n- b"),
        ("def f(x):\n    return x", "[CODE]"),
        ("It is this:\nx = 1\nprint(x)\nx += 1\nThat is all.", "It is this:\n[CODE]\nThat is all."),
        ("The sum is\n$$\nf(n)=f(n-1)+n\n$$", "The sum is\n$$\nf(n)=f(n-1)+n\n$$"),
    ],
)
def test_mask(text, masked):
    assert mask(text) == masked == mask(masked)


@pytest.mark.parametrize(
    "text, leaky",
    [
        ("```\nx = 1\n```", True),
        ("~~~\nx\n[CODE]", True),
        ("so `a[i] + 1` it is", True),
        ("x = input()", True),
        ("for i in range(3):", True),
        ("```python\n[CODE]\n```", False),
        ("`[CODE]` in `O(n)`, by `str.join()`", False),
        ("So we are done (see above).", False),
        ("", False),
    ],
)
def test_leaks(text, leaky):
    assert smepo.leaks(text, "{}", "code") is leaky


def test_shipped_traces_pass_their_tests_and_mask_without_a_leak():
    for row in rows("train", 20, "code"):
        truth = row["reward_model"]["ground_truth"]
        assert smepo.reward(row["teacher_ds"], truth, "code") == 1.0
        masked = smepo.mask_trace(row["teacher_ds"], "code", truth)
        assert masked == re.sub(r"(?s)(```python\n).*(\n```)", r"\1[CODE]\2", row["teacher_ds"])
        assert smepo.reward(masked, truth, "code") == 0.0
        assert not smepo.leaks(masked, truth, "code")


def test_the_last_block_counts_also_in_a_list():
    truth = json.dumps({"inputs": ["2"], "outputs": ["4"]})
    right, wrong = "```python\nprint(int(input()) * 2)\n```", "```\nprint(5)\n```"
    texts = [right, f"{wrong}\n{right}", f"{right}\n{wrong}", "4"]
    listed = "- so:\n  ```python\n  if True:\n      print(int(input()) * 2)\n  ```"
    rewards = smepo.find_domain("code").rewards([*texts, listed], [truth] * 5)
    assert rewards == [1.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("truth", ["x", "{}", '{"inputs": ["1"]}', '{"inputs": [], "outputs": []}'])
def test_tests_that_cannot_be_read_are_refused(truth):
    with pytest.raises(smepo.UserError, match="ground truth of code"):
        smepo.reward("```\nprint(1)\n```", truth, "code")


def test_the_verdicts_reach_the_rollouts(tmp_path):
    config = settings(task="code")
    model, tokenizer = smepo.load_model(config.model, config)
    path = write_rows(tmp_path / "rows.jsonl", rows("test", 12, "code"))
    problems = smepo.load_problems(path, "semantic", tokenizer, config)
    torch.manual_seed(0)
    batch = [p for p in problems for _ in range(4)]
    rollouts = smepo.rollout(model, tokenizer, batch, [True] * 48, config)
    for r in rollouts:
        assert r.reward == (smepo.reward(r.text, r.problem.answer, "code") if r.ended else 0.0)
    assert 0 < sum(r.solved for r in rollouts) < 48
