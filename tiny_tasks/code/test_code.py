"""The domain code: its mask, its leak check, its reward. The judge has test_judge.py."""

import json
import re

import pytest
import torch

import smepo
from tiny_tasks.fixtures import rows, small


def mask(text: str) -> str:
    return smepo.mask_trace(text, "code", "{}")


MASKED = {
    "So `a[i] + 1` in `O(n)`.": "So `[CODE]` in `O(n)`.",
    "`return x`, `x:=3`, `x++`, `x in s`, `in place`": "`[CODE]`, " * 4 + "`in place`",
    "while a:\n  b\nelse:\n  c": "[CODE]",
    "```python\nx = 1\n```\nand\n~~~\nx = 2": "```python\n[CODE]\n```\nand\n~~~\n[CODE]",
    "- ```\n  x = 1\n  ```\nSo": "- ```\n  [CODE]\n  ```\nSo",
    "> ```\n> x = 2\n> ```": "> ```\n> [CODE]\n> ```",
    "def f(x):\n    return x": "[CODE]",
    "It is this:\nx = 1\nprint(x)\nx += 1\nThat is all.": "It is this:\n[CODE]\nThat is all.",
    "The sum is\n$$\nf(n)=f(n-1)+n\n$$": "The sum is\n$$\nf(n)=f(n-1)+n\n$$",
    "```x = 1``` is here\nto go on.": "```[CODE]``` is here\nto go on.",
    "So: ```c++\nx = 1\n```\nDone.": "So: ```c++\n[CODE]\n```\nDone.",
}
KEPT = "`O(n)`|`Θ(n)`|`Ω(n)`|`T(n)`|`two-pointer`|`str.join()`|``a``"
LINES = """def f(x):|class A:|for i in a:|from a import b|import a|return x|#!/bin/sh|#include <x>
// so|/* so|<p>|SELECT x|CREATE x|INSERT x|UPDATE x|x = 1|a[i] = 1|a, b = b, a|x += 1
print(x)|x.f(y);|while (x) {|}"""
LEAKS = "def f(x):|for i in x:|while x:|if x:|return x|return not x|x = 1|a[i] += 1|f(x);|int f() {"


@pytest.mark.parametrize(
    "text",
    [
        *KEPT.split("|"),
        "We are done (so: all).",
        "This:\nWe stop. Then x;\nDone.",
        "```\n\n```",
        "$$\nf[i] = f[i-1]\n$$",
        "For n. We see:",
        "if so. We see:",
    ],
)
def test_what_is_kept(text):
    assert mask(text) == text and not smepo.leaks(text, "{}", "code")


@pytest.mark.parametrize("line", LINES.replace("\n", "|").split("|"))
def test_a_program_of_one_line_is_hidden(line):
    assert mask(line) == "[CODE]"


@pytest.mark.parametrize("line", LEAKS.split("|"))
def test_a_line_of_code_leaks(line):
    assert smepo.leaks(f"So:\n{line}\nDone.", "{}", "code")


@pytest.mark.parametrize("text", MASKED)
def test_without_a_fence_a_program_is_hidden_and_a_formula_is_not(text):
    assert mask(text) == MASKED[text] == mask(MASKED[text])


def test_leaks():
    for text in "~~~\nx\n[CODE]", "`[CODE]`, `a[i] + 1`", "x = input()", "for i in range(3):":
        assert smepo.leaks(text, "{}", "code"), text
    for text in "`[CODE]` in `O(n)`, by `str.join()`", "So we are done (see above).":
        assert not smepo.leaks(text, "{}", "code"), text


def test_shipped_traces_pass_their_tests_and_mask_without_a_leak():
    for row in rows("train", 20, "code"):
        truth = row["reward_model"]["ground_truth"]
        assert smepo.reward(row["teacher_ds"], truth, "code") == 1.0
        masked = smepo.mask_trace(row["teacher_ds"], "code", truth)
        assert masked == re.sub(r"(?s)(```python\n).*(\n```)", r"\1[CODE]\2", row["teacher_ds"])
        assert not smepo.leaks(masked, truth, "code")


def test_the_last_block_counts_also_in_a_list():
    truth = json.dumps({"inputs": ["2"], "outputs": ["4"]})
    right, wrong = "```python\nprint(int(input()) * 2)\n```", "```\nprint(5)\n```"
    texts = [right, f"{wrong}\n{right}", f"{right}\n{wrong}", "4"]
    listed = "- so:\n  ```python\n  if True:\n      print(int(input()) * 2)\n  ```"
    rewards = smepo.find_domain("code").rewards([*texts, listed], [truth] * 5)
    assert rewards == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_tests_that_cannot_be_read_are_refused():
    truths = (
        """x|[]|{"inputs": ["1"]}|{"inputs": [], "outputs": []}|{"inputs": [1], "outputs": [1]}"""
    )
    for truth in truths.split("|"):
        with pytest.raises(smepo.UserError, match="ground truth of code"):
            smepo.reward("```\nprint(1)\n```", truth, "code")


def test_the_verdicts_reach_the_rollouts(tmp_path):
    config = small(tmp_path, task="code")
    model, tokenizer = smepo.load_model(config.model, config)
    problems = smepo.load_problems(config.data, "semantic", tokenizer, config)
    torch.manual_seed(0)
    asked = [(p, True) for p in problems]
    rollouts = sum(smepo.rollout(model, tokenizer, asked, config, 4), [])
    for r in rollouts:
        assert r.reward == (smepo.reward(r.text, r.problem.answer, "code") if r.ended else 0.0)
    assert 0 < sum(r.solved for r in rollouts) < 48
