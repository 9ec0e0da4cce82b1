"""What the mask of math makes of whole traces: those of masker_cases.jsonl (code and search have
theirs in their rooms), the lines of tiny_tasks/README.md, and texts that chance puts together."""

import json
import random
import re
import subprocess
import sys

import pytest

import smepo
from tiny_tasks.fixtures import ROOT, TASKS, masker_cases

CASES = masker_cases("math")


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_masker_case(case):
    masked = smepo.mask_trace(case["text"], "math", case["answer"])
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert not smepo.leaks(masked, case["answer"], "math")


def test_the_lines_in_the_readme_are_what_the_masker_does():
    readme = (TASKS / "README.md").read_text(encoding="utf-8").replace("\\n", "\n")
    lines = re.findall(r"^(math|code|search) +(.*(?:\n(?! {6}->).*)*)\n {6}-> ", readme, re.M)
    shown = re.findall(r"^ {6}-> (.*(?:\n(?!math|code|search|~~~~$).*)*)", readme, re.M)
    assert len(lines) == len(shown) >= 12
    for (domain, trace), masked in zip(lines, shown, strict=True):
        assert smepo.mask_trace(trace, domain) == masked.rstrip("\n")


# ---- Any text -----------------------------------------------------------------------------------

KEPT = r"""Step 3:|Case 2|Lemma 4.1|by Theorem 7|x_1|a_{n+1}|\alpha_2|Eq. (4)|one can see
    |\tag{3}|Cases 1, 2 and 3|Part (2)|the worst case""".replace("\n    ", "")
HIDDEN = r"""17|-3|−3.5|12,480|15{,}600|½|forty-two|three dozen|50%|50\%|21st""".replace(
    "\n    ", ""
)


def test_generated_math_hides_exactly_the_values():
    rng = random.Random(0)
    for _ in range(2000):
        text = expected = "Here"
        for _ in range(rng.randint(0, 8)):
            link = rng.choice([" we get ", ", so then ", " equals ", "; hence\n", " (see below): "])
            if rng.random() < 0.5:
                text += link + rng.choice(HIDDEN.split("|"))
                expected += link + "[NUMBER]"
            else:
                piece = rng.choice(KEPT.split("|"))
                text += link + piece
                expected += link + piece
        assert smepo.mask_trace(text, "math", "none") == expected


PIECES = (
    *KEPT.split("|"),
    *HIDDEN.split("|"),
    *r"""Step 1 : (3) 2. - | { } $ \ \boxed{ \pi π x^2 #### <answer> yes </answer> Answer: no B
    (B) so is the because 北京 é [NUMBER] [ANSWER] [ ] \\ \sqrt{3} \rm \text{ ^ _ 1742
    \frac{3}{4} Thursday forty-two""".split(),
    *("\n", "\n\n", "    ", "\r\n", "\t", "\x00", "\ud800"),
)


@pytest.mark.parametrize("answer", ["42", "3", r"\pi", "(B)", "C", "x^2", "yes", "[2,5)", "Monday"])
def test_no_text_breaks_the_masker(answer):
    rng = random.Random(answer)
    for _ in range(400):
        text = "".join(rng.choice(PIECES) + rng.choice((" ", "\n")) for _ in range(20))
        masked = smepo.mask_trace(text, "math", answer)
        assert smepo.mask_trace(masked, "math", answer) == masked
        assert 0.0 <= smepo.reward(text, answer, "math") <= 1.0
        smepo.leaks(text, answer, "math")
        spans = smepo.hidden_spans(text, "math", answer)
        assert all(0 <= a < b <= len(text) for a, b, _ in spans)


HARD = (
    r"""a |A |1 |1,|1,234|- |\boxed{|\boxed{a} |{|}|#### |x_|x_{1|> |<|one|<answer>|<answer>x |$
    |one and |twenty-|Step 1 and |Cases 1, 2, |from (|(1) |\frac{1|1/|12:34 |10^|½|. |A. |so B |\
    |the answer is |\text{|[|[NUMBER]|1. |\sqrt|(|X|X1.|1. X|-|X- |\tag{|\tag{1|{a}|1 1/| |so |is
    |B is |\pi|/|*|é""".replace("\n    ", "")
    .replace("X", "\n")
    .split("|")
)


def test_math_takes_linear_time_whatever_the_text():
    """Quadratic work on any of these takes hours, so the limit only ends such a hang."""
    script = r"""if True:
        import json, sys, smepo
        for piece in json.load(sys.stdin):
            for answer in "\\frac{\\pi}{2}", "B", "7":
                text = (piece * 20_000)[:20_000]
                smepo.leaks(smepo.mask_trace(text, "math", answer), answer, "math")
                smepo.leaks(text, answer, "math")
                smepo.reward(text, answer, "math")"""
    settings = {"input": json.dumps(HARD), "text": True, "cwd": ROOT, "timeout": 300}
    subprocess.run([sys.executable, "-c", script], check=True, **settings)
