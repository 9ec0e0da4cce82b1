"""The math traces of masker_cases.jsonl (code and search have theirs in their rooms), and the lines
that the README shows."""

import re

import pytest

import smepo
from tiny_tasks.fixtures import ROOT, masker_cases

CASES = masker_cases("math")


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_masker_case(case):
    masked = smepo.mask_trace(case["text"], "math", case["answer"])
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert not smepo.leaks(masked, case["answer"], "math")


def test_the_lines_in_the_readme_are_what_the_masker_does():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\n", "\n")
    lines = re.findall(r"^(math|code|search) +(.*(?:\n(?! {6}->).*)*)\n {6}-> ", readme, re.M)
    shown = re.findall(r"^ {6}-> (.*(?:\n(?!math|code|search|~~~~$).*)*)", readme, re.M)
    assert len(lines) == len(shown) >= 12
    for (domain, trace), masked in zip(lines, shown, strict=True):
        assert smepo.mask_trace(trace, domain) == masked.rstrip("\n")
