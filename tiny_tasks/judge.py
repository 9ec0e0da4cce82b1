"""The verifier of code: does a program print what its unit tests expect?

Programs run in processes of their own, see sandbox.py. Where the platform can fork, warm workers,
one a core, stay between calls; else each test starts a Python.
"""
import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from tiny_tasks import sandbox

SECONDS = 4.0  # a program has for all of its tests
POOL, THREAD = ThreadPoolExecutor(os.cpu_count()), threading.local()  # a worker each

def cases(tests: str) -> list[tuple[str, str]]:
    """[(stdin, stdout)] of a ground truth `{"inputs": [...], "outputs": [...]}`, or ValueError."""
    try:
        tests = json.loads(tests)
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(repr(error)) from error
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError("there must be texts to read and as many to print")
    return pairs

def start(*arguments: str, **settings):
    """The sandbox, isolated, in a session (so also a process group) of its own."""
    command = [sys.executable, "-I", "-B", "-X", "utf8", os.path.abspath(sandbox.__file__)]
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH")  # without them some a Python does not start
    return subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, **settings,
        env={k: os.environ[k] for k in needed if k in os.environ}, start_new_session=True)

def kill(process) -> None:
    """And whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()

def run_fresh(program: str, given: str, seconds: float) -> str | None:
    """As sandbox.run_forked, in a Python started for it: slower, but on every platform."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stdout:
        Path(folder, "program.py").write_bytes(program.encode("utf-8", "replace"))
        process = start("program.py", str(seconds), cwd=folder, stdout=stdout)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(given.encode("utf-8", "replace"), timeout=seconds + 1)
        kill(process)
        stdout.seek(0)
        return None if process.returncode else stdout.read().decode("utf-8", "replace")

def judge_warm(program: str, pairs: list) -> bool:
    """Ask this thread's worker. If it dies over the job, that has failed, and the next job gets a
    new worker; the folder of each is removed with it."""
    worker = getattr(THREAD, "worker", None)
    if worker is None or worker.poll() is not None:
        THREAD.folder = tempfile.TemporaryDirectory()
        worker = THREAD.worker = start(cwd=THREAD.folder.name, stdout=subprocess.PIPE)
        atexit.register(kill, worker)
    limit = threading.Timer(SECONDS + 2, kill, [worker])  # for a program that stops its own alarm
    limit.start()
    try:
        worker.stdin.write(json.dumps([program, pairs, SECONDS]).encode() + b"\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())
    except (OSError, ValueError):
        kill(worker)
        return False
    finally:
        limit.cancel()

@lru_cache(2**14)  # once trained, a policy writes the same right program again and again
def verdict(program: str | None, tests: str, warm: bool) -> bool:
    try:
        pairs = cases(tests)
    except ValueError:
        return False
    return program is not None and (judge_warm(program, pairs) if warm else
                                    sandbox.passes(run_fresh, program, pairs, SECONDS))

def judge(programs: list[str], tests: list[str], warm: bool = hasattr(os, "fork")) -> list[bool]:
    """Which programs pass all of their tests? Equal jobs are done once, all in parallel."""
    jobs = list(zip(programs, tests, strict=True))
    distinct = list(dict.fromkeys(jobs))
    passed = dict(zip(distinct, POOL.map(lambda job: verdict(*job, warm), distinct), strict=True))
    return [passed[job] for job in jobs]
