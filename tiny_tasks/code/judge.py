"""The verifier of code: does a program print what its unit tests expect?

It runs in a process of its own, see sandbox.py. What it should print stays and is compared here.
"""

import json
import marshal
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from smepo import UserError

SECONDS = 4.0  # a program has for all of its tests
SANDBOX = Path(__file__).resolve().with_name("sandbox.py")
CODE = marshal.dumps(compile(SANDBOX.read_bytes(), str(SANDBOX), "exec"))  # once: it takes a while
START = "import marshal, sys; exec(marshal.load(sys.stdin.buffer))"


def cases(tests: str) -> list[tuple[str, str]]:
    """[(stdin, stdout)] of a ground truth `{"inputs": [...], "outputs": [...]}`, or ValueError."""
    try:
        tests = json.loads(tests)
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError("the tests must be {inputs: [...], outputs: [...]}") from error
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError("there must be texts to read and as many to print")
    return pairs


def outputs(program: str, inputs: list[str]) -> list[str]:
    """What it prints for each, up to the first that fails or is cut; IndexError: none began."""
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH")  # without them some Pythons do not start
    try:
        written = subprocess.run(
            [sys.executable, *"-P -s -S -B -X utf8 -c".split(), START, str(SANDBOX)],
            input=CODE + marshal.dumps((program, inputs, SECONDS)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k in needed} | {"PYTHONHASHSEED": "0"},
            timeout=SECONDS + 5,
            start_new_session=True,  # Ctrl-Z stops the trainer, not a program whose clock runs
        ).stdout
    except subprocess.TimeoutExpired as stopped:  # with what it had printed by then
        written = stopped.stdout or b""
    begun = re.findall(rb"(?m)^((?:[\da-f]{2})*)\r?\n", written.split(b"ready")[1])[1:]
    return [bytes.fromhex(line.decode()).decode("utf-8", "replace") for line in begun]


def lines(text: str) -> list[str]:  # white space at their ends, and at the end of all, is free
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache(2**14)  # once trained, a policy writes the same right program again and again
def verdict(program: str, tests: str) -> bool:
    pairs = cases(tests)
    for _ in range(2):
        with suppress(OSError, IndexError):  # a breakdown: no verdict
            printed = outputs(program, [given for given, _ in pairs])
            return [lines(text) for text in printed] == [lines(text) for _, text in pairs]
    raise UserError("the judge of code cannot start its sandbox: is the machine out of memory?")


def judge(programs: list[str], tests: list[str]) -> list[bool]:
    """Which programs pass all of their tests? Equal jobs are done once, all in parallel."""
    jobs = list(zip(programs, tests, strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = {job: pool.submit(verdict, *job) for job in dict.fromkeys(jobs)}
    return [verdicts[job].result() for job in jobs]
