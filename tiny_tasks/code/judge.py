"""The verifier of code: does a program print what its unit tests expect?

A program runs in a process of its own, see sandbox.py, which is given what it may read. What it
should print stays here, and is compared here.
"""

import json
import marshal
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from smepo import UserError

SECONDS = 4.0  # a program has for all of its tests
SANDBOX = Path(__file__).resolve().with_name("sandbox.py")
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


@lru_cache
def compiled(source: Path) -> bytes:
    """Once, not in each process: that would take longer than most programs."""
    return marshal.dumps(compile(Path(source).read_bytes(), str(source), "exec"))


def kill(process) -> None:
    """And its whole group."""
    process.kill()
    with suppress(ProcessLookupError, PermissionError, AttributeError):  # Windows has no groups
        os.killpg(process.pid, signal.SIGKILL)


def outputs(program: str, inputs: list[str]) -> list[str]:
    """What it prints for each input, up to the first that fails. IndexError: it never began."""
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH")  # without them some a Python does not start
    environment = {name: os.environ[name] for name in needed if name in os.environ}
    job = {"program": program, "inputs": inputs, "seconds": SECONDS}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", START, str(SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONHASHSEED": "0"},
            cwd=folder,
            start_new_session=True,
        )
        try:
            written, _ = process.communicate(compiled(SANDBOX) + marshal.dumps(job), SECONDS + 5)
        except subprocess.TimeoutExpired:  # it was stopped, or this process was: no matter
            kill(process)
            written, _ = process.communicate()
        finally:
            kill(process)
    begun = written.split(b"ready\n")[1].split(b"\n")  # a line without an end was cut off
    return [bytes.fromhex(line.decode()).decode("utf-8", "replace") for line in begun[:-1]]


def lines(text: str) -> list[str]:  # white space at their ends, and at the end of all, is free
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache(2**14)  # once trained, a policy writes the same right program again and again
def verdict(program: str, tests: str) -> bool:
    try:
        pairs = cases(tests)
    except ValueError:
        return False
    for _ in range(2):
        with suppress(OSError, IndexError):  # a breakdown: no verdict
            printed = outputs(program, [given for given, _ in pairs])
            wanted = [lines(text) for _, text in pairs]
            return [lines(text) for text in printed] == wanted
    raise UserError("the judge of code cannot start its sandbox: is the machine out of memory?")


def judge(programs: list[str], tests: list[str]) -> list[bool]:
    """Which programs pass all of their tests? Equal jobs are done once, all in parallel."""
    jobs = list(zip(programs, tests, strict=True))
    distinct = list(dict.fromkeys(jobs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda job: verdict(*job), distinct)
        passed = dict(zip(distinct, verdicts, strict=True))
    return [passed[job] for job in jobs]
