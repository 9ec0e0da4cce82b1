"""What the masks make of whole traces: those of masker_cases.jsonl, the lines of
tiny_tasks/README.md, texts that chance puts together, and texts that are hard on a pattern."""

import json
import random
import re
import subprocess
import sys

import pytest

import smepo
from tiny_tasks.fixtures import ROOT, TASKS, masker_cases

CASES = [case for domain in ("math", "code", "search") for case in masker_cases(domain)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_masker_case(case):
    text, domain, answer = case["text"], case["domain"], case["answer"]
    masked = smepo.mask_trace(text, domain, answer)
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert smepo.mask_trace(masked, domain, answer) == masked
    assert smepo.leaks(text, answer, domain) or answer == "-23, 16"  # it stands in two boxes
    assert not smepo.leaks(masked, answer, domain)


def test_the_lines_in_the_readme_are_what_the_masker_does():
    readme = (TASKS / "README.md").read_text(encoding="utf-8").replace("\\n", "\n")
    lines = re.findall(r"^(math|code|search) +(.*(?:\n(?! {6}->).*)*)\n {6}-> ", readme, re.M)
    shown = re.findall(r"^ {6}-> (.*(?:\n(?!math|code|search|~~~~$).*)*)", readme, re.M)
    assert len(lines) == len(shown) >= 12
    for (domain, trace), masked in zip(lines, shown, strict=True):
        assert smepo.mask_trace(trace, domain) == masked.rstrip("\n")


KEPT = r"""Step 3:|Case 2|Lemma 4.1|by Theorem 7|x_1|a_{n+1}|\alpha_2|Eq. (4)|one can see
    |\tag{3}|Cases 1, 2 and 3|Part (2)|the worst case""".replace("\n    ", "")
HIDDEN = r"17|-3|−3.5|12,480|15{,}600|½|forty-two|three dozen|50%|50\%|21st"


@pytest.mark.parametrize("link", [" we get ", ", so then ", "; hence\n", " (see below): "])
def test_math_hides_exactly_the_values(link):
    kept, hidden = KEPT.split("|"), HIDDEN.split("|")
    masks = ["[NUMBER]"] * len(hidden)
    masked = smepo.mask_trace(link.join(["Here", *hidden, *kept, *hidden]), "math", "none")
    assert masked == link.join(["Here", *masks, *kept, *masks])


PIECES = r"""Step 1 : (3) 2. - | { } $ \ \boxed{ \pi π x^2 #### <answer> yes </answer> Answer: no B
    (B) so is the because 北京 é [NUMBER] [ANSWER] [ ] \\ \sqrt{3} \rm \text{ ^ _ 1742
    \frac{3}{4} Thursday forty-two""".split()
PIECES += [*KEPT.split("|"), *HIDDEN.split("|"), "\n\n", "    ", "\r\n", "\t", "\x00", "\ud800"]
SEARCHED = r"""Step 1: (3) 2. - | yes no <search> </search> search[ ] finish[ (B) B Silver Harbor
    silver harbor of the The T. E. van Whitlock's 北京 twenty hundred and third 6th Mr. [ENTITY]
    [ANSWER] March 9 1742 $4.5 % O'Neil is x.org/Fern " “ ? ! * # \ """.split()
ANSWERS = [("math", answer) for answer in r"42|3|\pi|(B)|C|x^2|yes|[2,5)|Monday".split("|")]
ANSWERS += [("search", answer) for answer in "Silver Harbor|yes|B|9 March|3|harbor|!|".split("|")]


@pytest.mark.parametrize("domain, answer", ANSWERS)
def test_no_text_breaks_the_masker(domain, answer):
    rng, pieces = random.Random(answer), PIECES if domain == "math" else SEARCHED
    for _ in range(400):
        text = "".join(rng.choice(pieces) + rng.choice((" ", "\n")) for _ in range(20))
        masked = smepo.mask_trace(text, domain, answer)
        assert smepo.mask_trace(masked, domain, answer) == masked
        assert smepo.reward(text, answer, domain) in (0.0, 1.0)
        smepo.leaks(text, answer, domain)
        assert all(0 <= a < b <= len(text) for a, b, _ in smepo.hidden_spans(text, domain, answer))


HARD = r"""a |A |1 |1,|1,234|- |\boxed{|\boxed{a} |{|}|#### |x_|x_{1|> |<|one|<answer>|<answer>x |$
    |one and |twenty-|Step 1 and |Cases 1, 2, |from (|(1) |\frac{1|1/|12:34 |10^|½|. |A. |so B |\
    |the answer is |\text{|[|[NUMBER]|1. |\sqrt|(|X|X1.|1. X|-|X- |\tag{|\tag{1|{a}|1 1/| |so |is
    |B is |\pi|/|*|é"""
HARD_SEARCHED = """a|a |A |1,|a-|A'|a.|a./|<a|<answer>x |finish[|search[x |[|twenty-|one hundred
    |Step 1|(1) |silver |van |中|X| |.X"""


def test_any_text_takes_linear_time():
    """Quadratic work on any of these takes minutes or hours: a limit ends such a hang."""
    script = r"""if True:
        import json, sys, time, smepo
        for domain, answers, pieces in json.load(sys.stdin):
            for piece in pieces:
                for answer in answers:
                    text, start = (piece * 20_000)[:20_000], time.process_time()
                    smepo.leaks(smepo.mask_trace(text, domain, answer), answer, domain)
                    smepo.leaks(text, answer, domain)
                    smepo.reward(text, answer, domain)
                    assert time.process_time() - start < 3, (domain, piece, answer)"""
    texts = (text.replace("\n    ", "").replace("X", "\n") for text in (HARD, HARD_SEARCHED))
    hard, searched = (text.split("|") for text in texts)
    jobs = [("math", [r"\frac{\pi}{2}", "B", "7"], hard)]
    jobs += [("search", ["Silver Harbor", "no"], searched)]
    settings = {"input": json.dumps(jobs), "text": True, "cwd": ROOT, "timeout": 300}
    subprocess.run([sys.executable, "-c", script], check=True, **settings)


def test_a_variable_is_no_option():
    masked = smepo.mask_trace("it is b, not C", "math", "b")
    assert masked == "it is [ANSWER], not C" and not smepo.leaks(masked, "b", "math")
    assert smepo.reward("The answer is (b).", "b", "math") == 1.0
