"""What the domain code promises: the mask, the leak check, the judge and the reward."""

import json
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_tasks.coding import domain
from tiny_tasks.coding import judge as judge_module

import smepo
from tiny_tasks.fixtures import masker_cases, rows

ROOM = Path(__file__).parent
CASES = masker_cases("code")


def mask(text: str) -> str:
    return smepo.mask_trace(text, "code", "{}")


def leaks(text: str) -> bool:
    return smepo.leaks(text, "{}", "code")


# ---- The mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_masker_case(case):
    masked = mask(case["text"])
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert mask(masked) == masked
    assert leaks(case["text"]) and not leaks(masked)


@pytest.mark.parametrize("example", domain.RULES)
def test_every_rule_is_the_first_that_fits_its_example(example):
    group = domain.CODE.search(example).lastgroup
    assert group is None or f"(?P<{group}>" in domain.RULES[example]
    assert (group is None) == (mask(example) == example)
    assert re.search(domain.RULES[example], example, re.MULTILINE | re.VERBOSE)


@pytest.mark.parametrize(
    "text, masked",
    [
        ("Take `max(a)`, not `a`.", "Take `[CODE]`, not `a`."),
        ("`dp[i]` with `O(n*m)`", "`[CODE]` with `O(n*m)`"),
        ("See [the `sum` docs](https://a.b/c?d=e).", "See [the `sum` docs](https://a.b/c?d=e)."),
        ("~~~\nx\n~~~\nand\n```\ny", "~~~\n[CODE]\n~~~\nand\n```\n[CODE]"),
        ("> ```\n> x = 1\n> ```\n> So.", "> ```\n> [CODE]\n> ```\n> So."),
        ("- a\n  ```py\n  x\n  ```\n- b", "- a\n  ```py\n  [CODE]\n  ```\n- b"),
        ("- ```py\n  x\n  ```\n- b", "- ```py\n  [CODE]\n  ```\n- b"),
        ("by `lambda t: t`", "by `[CODE]`"),
        ("x = 1\nprint(x)\ny = x + x\nz: label\nprint(y)", "[CODE]"),  # all of it, if most is code
        ("```\r\nx\r\n```\r\nSo.", "```\r\n[CODE]\r\n```\r\nSo."),
        ("a ``b`` c ``d['`']``", "a ``b`` c ``[CODE]``"),
        ("It is 3 ` 4.", "It is 3 ` 4."),
        ("x = 1 here, with\n```\ny\n```", "x = 1 here, with\n```\n[CODE]\n```"),  # it has a fence
        ("So: ```py\nx = 1\n```\nDone.", "So: ```py\n[CODE]\n```\nDone."),
        ("b) ```\nx = 1\n```\nDone.", "b) ```\n[CODE]\n```\nDone."),
        ("Let us go~~~\nFirst sort.", "Let us go~~~\nFirst sort."),
        ("Use ``` to open a fence.\nThen sum.", "Use ``` to open a fence.\nThen sum."),
        ("def f(x):\n    '''Words.'''\n\nprint(f(1))", "[CODE]"),
        ("So:\n\n    x = 1\n    y = 2\n\nDone.", "So:\n\n    [CODE]\n\nDone."),
        ("", ""),
    ],
)
def test_what_is_hidden_and_what_is_kept(text, masked):
    assert mask(text) == masked
    assert mask(masked) == masked


CODE_LINES = """#include <vector>|#!/bin/sh|// a comment|@cache|@lru_cache(None)|def f(x):|class A:
    |for v in a: print(v)|for a, (b, c) in d:|for (int i = 0; i < n; ++i)|while q:|if v > 3:
    |with open(0) as f:|return total|return a[i] + 1|else:|} else {|pass|import sys|import a.b as c
    |from a import b|x = 1|dp[i][j] += 2|a, b = b, a|int[] last = new int[128]|long long t = a % b;
    |return a;|int main() {|print(x)|q.push(x)|x: int = 3|SELECT a FROM b|>>> f(1)|In [3]: a
    |cin >> n;""".replace("\n    ", "").split("|")
PROSE_LINES = """For each island, if it is unvisited, start a flood; else go on.
    |while the thief walks on, import duties play no role|return to the start is not allowed
    |- The hyphen can only appear once in each of the given words;|1. If $i = 0$, then stop;
    |if so, we are done|with luck this is enough|from the left to the right|import duties are low
    |Time: O(n log n)|The answer is x = 3 for all of the given inputs here.|using two pointers
    |    - a point of a list|    - it ends here;
    |f[i] = \\min_{j < i} f[j]|\\begin{align*}|<Spoiler title="Hint 1">
    |a `x = 1`;|let dp be the table|function f is monotone""".replace("\n    |", "|").split("|")


@pytest.mark.parametrize("line", CODE_LINES)
def test_a_line_of_code_is_hidden_where_there_is_no_fence(line):
    masked = mask(f"We are done:\n\n{line}\n\nIt is fast.")
    assert masked.startswith("We are done:\n\n") and line not in masked


@pytest.mark.parametrize("line", PROSE_LINES)
def test_a_line_of_prose_is_kept_where_there_is_no_fence(line):
    assert re.sub("`.*`", "", mask(f"So:\n{line}\n")) == re.sub("`.*`", "", f"So:\n{line}\n")


def test_the_traces_of_the_toy_pass_their_tests_and_mask_without_a_leak():
    lines = rows("train", room="coding") + rows("test", room="coding")
    for row in lines:
        trace, truth = row["teacher_ds"], row["reward_model"]["ground_truth"]
        masked = smepo.mask_trace(trace, "code", truth)
        assert masked == trace.split("```python\n")[0] + "```python\n[CODE]\n```"
        assert leaks(trace) and not leaks(masked)
    sampled = random.Random(0).sample(lines, 60)
    texts = [row["teacher_ds"] for row in sampled]
    truths = [row["reward_model"]["ground_truth"] for row in sampled]
    assert domain.code_rewards(texts, truths) == [1.0] * 60
    assert domain.code_rewards(texts, truths[1:] + truths[:1]) == [0.0] * 60


PIECES = (
    *r"""Step 1: - | { } $ \ # : = ; > >>> ` `` ``` ~~~ ```python x=1 f(x): return if else: print( )
    "code":" \" <pre> </pre> \begin{verbatim} \end{verbatim} \min O(n) `a+b` `x` ``a[`]`` [CODE]
    [ANSWER] So 北京 é word import for in while 1.""".split(),
    *("\n", "\n\n", "    ", "\r\n", "\t", "\x00", "\ud800"),
)


def test_no_text_breaks_the_masker():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(PIECES) + rng.choice(("", " ", "\n")) for _ in range(20))
        masked = mask(text)
        assert mask(masked) == masked
        assert leaks(masked) in (True, False)
        spans = smepo.hidden_spans(text, "code")
        assert all(0 <= start < end <= len(text) for start, end, _ in spans)


HARD = r"""ab|`|``|`a|`a+|`a(|```X|~~~|> |>>> |- |<pre>|<pre|\begin{verbatim}|"code": "|\"code\": \"
    |O(|`O(|(((|;X|{X|X|    X| X|x = 1X|    x = 1X|a |a, |a.|a[|x: |if x:X|for a in |for a,
    |return|return a(|import a, |import a|SELECT |\\aa|@|'a |`-|[X|    XX|#!X|(a) = |a=
    |a =""".replace("\n    ", "")


@pytest.mark.parametrize("piece", [piece.replace("X", "\n") for piece in HARD.split("|")])
def test_masking_takes_linear_time(piece):
    def seconds(size: int) -> float:
        text = (piece * size)[:size]
        start = time.perf_counter()
        leaks(mask(text))
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(40_000) < 100 * max(0.01, seconds(4000))  # 10 times, if it is linear


# ---- The leak check: what it must not let pass ---------------------------------------------------

MISSES = {
    "a whole program": "Sum:\n```python\nprint(sum(map(int, input().split())))\n```",
    "the last line of a block": "```python\n[CODE]\nprint(a)\n```",
    "the second block": "```\n[CODE]\n```\nand\n```\nreturn x\n```",
    "a block that is not closed": "So:\n```python\nx = 1",
    "tildes": "~~~\nx\n~~~",
    "a longer fence": "````md\n```\n[CODE]\n```\n````",
    "a fence in a list": "1. So\n   ```python\n   x\n   ```",
    "a fence in a quote": "> So\n> ```\n> x\n> ```",
    "a fence after a word": "So: ```python\nx\n```",
    "a fence after a comparison": "a > b: ```\nx\n```",
    "a fence that ends a line": "```python\n[CODE]\nprint(sum(a))```\n",
    "a function beside a fence": "```\n[CODE]\n```\nand\n\ndef f(x):\n    return x",
    "line ends of Windows": "```\r\n[CODE]\r\nx\r\n```\r\n",
    "half a line": "```\n[CODE] + 1\n```",
    "a comment": "```python\n# count them\n[CODE]\n```",
    "an inline recurrence": "Use `dp[i-1] + dp[i-2]`.",
    "an inline assignment": "Set `x = 3` first.",
    "an inline call": "It is `max(a, b)`.",
    "an inline step": "Then `i++` follows.",
    "an inline comparison": "Go on while `lo < hi` holds.",
    "two back-ticks": "It is ``a['k'] + 1``.",
    "inline beside a mask": "`[CODE]` and `a + b`",
    "no fence, a function": "def f(x):\n    return x",
    "no fence, a heading": "So\nclass A:\n",
    "no fence, a result": "So\nreturn total",
    "no fence, an assignment": "So\n\ntotal = a + b\n\nis it.",
    "no fence, in C": "int main() {\n  return 0;\n}",
    "no fence, a call": "Finally\nprint(total)",
    "no fence, a session": ">>> 1 + 1\n2",
    "a tool call": '{"name": "python", "arguments": {"code": "x = 1\\nprint(x)"}}',
    "HTML": "<pre>x = input()</pre>",
    "LaTeX": "\\begin{verbatim}\nx = input()\n\\end{verbatim}",
}


@pytest.mark.parametrize("text", MISSES.values(), ids=MISSES)
def test_the_leak_check_finds_what_a_mask_could_miss(text):
    assert leaks(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sort them, then sweep. It costs O(n log n).",
        "```python\n[CODE]\n```",
        "> ```js\n> [CODE]\n\nThe quote ends here.",
        "- a\n  ~~~\n  [CODE]\n  ~~~",
        "`[CODE]` for each `x` in `O(n log n)`, left-to-right, `top-down`",
        '{"name": "python", "arguments": {"code": "[CODE]", "timeout": 5}}',
        "The formula is\n$$\nf[i] = \\min_{j < i} f[j]\n$$",
        "For each island, if it is unvisited, start a flood; else go on.",
    ],
)
def test_the_leak_check_keeps_quiet_about_a_plan(text):
    assert not leaks(text)


# ---- The reward and the judge --------------------------------------------------------------------

CUBE = json.dumps({"inputs": ["2\n", "-3\n"], "outputs": ["8\n", "-27\n"]})
RIGHT = "x = int(input())\nprint(x ** 3)\n"


def test_the_reward_is_that_of_the_last_fenced_block():
    block, wrong = f"```python\n{RIGHT}```", "```\nprint(8)\n```"
    rewards = {
        block: 1,
        f"So:\n{wrong}\n{block}\nDone.": 1,
        f"{block}\n{wrong}": 0,
        RIGHT: 0,
        f"```\n{RIGHT}": 0,
        "": 0,
        "```python\n```": 0,
    }
    assert domain.code_rewards([*rewards], [CUBE] * 7) == [*rewards.values()]
    assert [smepo.reward(text, CUBE, "code") for text in rewards] == [*rewards.values()]
    assert domain.code_rewards([], []) == []


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(judge_module, "SECONDS", 9.0)  # a busy machine fails no test
    judge_module.verdict.cache_clear()
    return judge_module


both_ways = pytest.mark.parametrize("warm", [True, False], ids=["warm workers", "one process each"])


PROGRAMS = {  # name: (program, whether it passes CUBE); {} is a path outside its folder
    "right": (RIGHT, True),
    "space at the end": (RIGHT + "print('  ')\n", True),
    "in a function": ("def main():\n    print(int(input()) ** 3)\nmain()\n", True),
    "reads all of stdin": ("import sys\nprint(int(sys.stdin.read()) ** 3)", True),
    "reads the file": ("print(int(open(0).read()) ** 3)", True),
    "ends well": (RIGHT + "raise SystemExit", True),
    "deep, but not too deep": (
        "import sys\nsys.setrecursionlimit(9000)\ndef f(n):\n    return n and 1 + f(n - 1)\n"
        "f(5000)\n" + RIGHT,
        True,
    ),
    "writes in its folder": ("open('a', 'w').write('b')\nprint(int(input()) ** 3)", True),
    "prints at its exit": (
        "import atexit\natexit.register(lambda: print(int(input()) ** 3))\n",
        True,
    ),
    "closes stdout when done": (RIGHT + "import sys\nsys.stdout.close()", True),
    "in a thread": (
        "import threading\ndef main():\n    print(int(input()) ** 3)\n"
        "threading.Thread(target=main).start()",
        True,
    ),
    "reads what is named": ("import fileinput\nprint(int(next(fileinput.input())) ** 3)", True),
    "wrong": ("print(int(input()) ** 2)", False),
    "only the first test": ("print(8)", False),
    "more than is asked": (RIGHT + "print('done')", False),
    "nothing": ("", False),
    "syntax error": ("print(", False),
    "null byte": ("print(8)\0", False),
    "a lone surrogate": ("print('\ud800')", False),
    "raises": (RIGHT + "1 / 0", False),
    "sys.exit": (RIGHT + "import sys\nsys.exit(1)", False),
    "deep recursion": ("f = lambda n: f(n + 1)\nf(0)", False),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)",
        False,
    ),
    "closes stdout": ("import sys\nsys.stdout.close()\n" + RIGHT, False),
    "replaces stdout": ("import io, sys\nsys.stdout = io.StringIO()\n" + RIGHT, False),
    "memory bomb": ("a = [0]\nwhile True:\n    a += a", False),
    "huge output": ("while True:\n    print('x' * 10**6)", False),
    "a database": ("import sqlite3\nsqlite3.connect({})\n" + RIGHT, False),
    "fork": ("import os\nos.fork()\n" + RIGHT, False),
    "fork unseen": (
        "import _posixsubprocess as p\np.fork_exec([b'true'], [b'/bin/true'], *[None] * 21)\n"
        + RIGHT,
        False,
    ),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", False),
    "other programs": ("import subprocess\nsubprocess.run(['true'])\n" + RIGHT, False),
    "shell": ("import os\nos.system('true')\n" + RIGHT, False),
    "network": ("import socket\nsocket.socket()\n" + RIGHT, False),
    "kills the parent": ("import os\nos.kill(os.getppid(), 9)\n" + RIGHT, False),
    "kills its group": ("import os\nos.killpg(0, 9)\n" + RIGHT, False),
    "writes outside": ("open({}, 'w')\n" + RIGHT, False),
    "removes outside": ("import os\nos.remove({})\n" + RIGHT, False),
    "makes a folder outside": ("import os\nos.mkdir('../more')\n" + RIGHT, False),
    "reads the environment": (
        "import os\n" + RIGHT + "print(os.environ.get('HOME', ''), *os.environ)",
        True,
    ),
}


@both_ways
def test_the_judge_contains_every_accident_and_both_ways_agree(judge, tmp_path, warm):
    kept = tmp_path / "kept"
    kept.write_text("precious", encoding="utf-8")
    programs = [program.replace("{}", repr(str(kept))) for program, _ in PROGRAMS.values()]
    before = set(tmp_path.iterdir())
    passed = judge.judge(programs, [CUBE] * len(programs), warm)
    assert dict(zip(PROGRAMS, passed, strict=True)) == {
        name: verdict for name, (_, verdict) in PROGRAMS.items()
    }
    assert kept.read_text(encoding="utf-8") == "precious" and set(tmp_path.iterdir()) == before


HANGS = {
    "endless loop": "while True: pass",
    "sleeps": "import time\ntime.sleep(99)",
    "waits for more": "while True:\n    try: input()\n    except EOFError: pass",
    "stops its alarm": "import signal, time\nsignal.alarm(0)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(99)",
}


@both_ways
def test_a_program_that_hangs_fails_and_the_jobs_after_it_are_judged(judge, monkeypatch, warm):
    monkeypatch.setattr(judge, "SECONDS", 0.5)
    programs = list(HANGS.values())
    start = time.perf_counter()
    assert judge.judge(programs, [CUBE] * 4, warm) == [False] * 4
    assert time.perf_counter() - start < 60  # only ends a hang
    monkeypatch.setattr(judge, "SECONDS", 9.0)
    programs = [RIGHT + "#" * i for i in range(8)]
    assert judge.judge(programs, [CUBE] * 8, warm) == [True] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")
def test_a_killed_worker_is_replaced(judge):
    def kill_the_worker_of_a_thread() -> int:
        judge.kill(judge.THREAD.worker)
        return judge.THREAD.worker.returncode

    programs = [RIGHT + "#" * i for i in range(16)]
    assert judge.judge(programs[:8], [CUBE] * 8) == [True] * 8
    assert judge.POOL.submit(kill_the_worker_of_a_thread).result() == -signal.SIGKILL
    assert judge.judge(programs[8:], [CUBE] * 8) == [True] * 8


@pytest.mark.parametrize(
    "tests",
    [
        "",
        "{",
        "[]",
        "{}",
        "7",
        "null",
        '{"inputs": ["1"]}',
        '{"inputs": [], "outputs": []}',
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": [1], "outputs": [1]}',
        '{"inputs": 1, "outputs": 1}',
    ],
)
def test_malformed_unit_tests_fail_and_are_refused(judge, tests):
    assert judge.judge([RIGHT], [tests]) == [False]
    assert domain.code_rewards([f"```\n{RIGHT}```"], [tests]) == [0.0]
    with pytest.raises(ValueError):
        domain.DOMAIN.check(tests)


SECRET = json.dumps({"inputs": ["1"], "outputs": ["zqx1"]})
HONEST = "print('zq' + 'x' + input())"
PRINT_FOUND = """
import re
print(re.search("zq" + "x" + given, str(found))[0])  # in two parts, as it would find itself
"""
CHEATS = {
    "frames": """
import sys
given, found, frame = input(), [], sys._getframe()
while frame:
    found += [frame.f_locals, frame.f_globals]
    frame = frame.f_back
found = [{name: value for name, value in names.items() if name != "found"} for names in found]
""",
    "memory": """
import gc
given = input()
found = [thing for thing in gc.get_objects() if isinstance(thing, (list, tuple, dict, set))]
found = [str(value) for thing in found for value in gc.get_referents(thing) if type(value) is str]
""",
    "files": """
import glob
given, found = input(), []
for path in glob.glob("*") + glob.glob("../std*") + glob.glob("/proc/self/fd/*"):
    try:
        found.append(open(path, errors="replace").read())
    except OSError:
        pass
""",
}


@both_ways
@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_expected_outputs_are_not_where_a_program_runs(judge, monkeypatch, cheat, warm):
    with ThreadPoolExecutor(1) as pool:  # one worker: what others printed there is gone, too
        monkeypatch.setattr(judge, "POOL", pool)
        programs = [HONEST, cheat + PRINT_FOUND, HONEST + "  # again", cheat + PRINT_FOUND + "#"]
        assert judge.judge(programs, [SECRET] * 4, warm) == [True, False, True, False]
