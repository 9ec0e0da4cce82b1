"""The verifier of code: does a program print what its unit tests expect?

A program runs in a process of its own, see sandbox.py, which is given what the program may read.
What it should print stays here, and is compared here. Where the platform can fork, warm workers,
one a core, stay between calls; else each test starts a Python.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path

from tiny_tasks.code import sandbox

SECONDS = 4.0  # a program has for all of its tests
POOL, THREAD = ThreadPoolExecutor(os.cpu_count()), threading.local()  # a worker each


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


def start(*arguments: str, **settings):
    """The sandbox, isolated, in a session (so also a process group) of its own."""
    command = [sys.executable, "-I", "-B", "-X", "utf8", os.path.abspath(sandbox.__file__)]
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH")  # without them some a Python does not start
    return subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in needed if name in os.environ},
        start_new_session=True,
        **settings,
    )


def kill(process) -> None:
    """And whatever it started."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def run_fresh(program: str, given: str, seconds: float) -> str | None:
    """What the program prints, None if it fails: in a Python started for it, on any platform."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stdout:
        Path(folder, "program.py").write_bytes(program.encode("utf-8", "replace"))
        process = start("program.py", str(seconds), cwd=folder, stdout=stdout)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(given.encode("utf-8", "replace"), timeout=seconds + 1)
        kill(process)
        if process.returncode != 0:
            return None
        stdout.seek(0)
        return stdout.read().decode("utf-8", "replace")


def worker_of_thread():
    """If it died over its last program, a new one; the folder of each is removed with it."""
    worker = getattr(THREAD, "worker", None)
    if worker is None or worker.poll() is not None:
        THREAD.folder = tempfile.TemporaryDirectory()
        worker = THREAD.worker = start(cwd=THREAD.folder.name, stdout=subprocess.PIPE)
    return worker


def run_warm(program: str, given: str, seconds: float) -> str | None:
    """The same in a fork of this thread's worker: faster."""
    worker = worker_of_thread()
    with suppress(OSError, ValueError):  # it died
        worker.stdin.write(json.dumps([program, given, seconds]).encode() + b"\n")
        worker.stdin.flush()
        if wait([worker.stdout], seconds + 2):  # else the program has stopped its own alarm
            return json.loads(worker.stdout.readline())
    kill(worker)
    return None


def lines(text: str) -> list[str]:  # white space at their ends, and at the end of all, is free
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache(2**14)  # once trained, a policy writes the same right program again and again
def verdict(program: str, tests: str, warm: bool) -> bool:
    try:
        pairs = cases(tests)
    except ValueError:
        return False
    run = run_warm if warm else run_fresh
    end = time.monotonic() + SECONDS
    for given, wanted in pairs:
        printed = run(program, given, max(0.01, end - time.monotonic()))
        if printed is None or lines(printed) != lines(wanted):
            return False
    return True


def judge(programs: list[str], tests: list[str], warm: bool = hasattr(os, "fork")) -> list[bool]:
    """Which programs pass all of their tests? Equal jobs are done once, all in parallel."""
    jobs = list(zip(programs, tests, strict=True))
    distinct = list(dict.fromkeys(jobs))
    verdicts = POOL.map(lambda job: verdict(*job, warm), distinct)
    passed = dict(zip(distinct, verdicts, strict=True))
    return [passed[job] for job in jobs]
