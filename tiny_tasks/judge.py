"""The verifier of code: does a program print what its unit tests expect?

Programs run in processes of their own: no environment, a temporary working folder, limits on time,
memory and output, and a hook that refuses what no solution needs. This contains the accidents of a
model that learns to write programs; against an attacker, put it all in a container.

A Python takes longer to start than such a program takes to run. So, where the platform can fork,
warm workers, one a core, stay between calls, and a fork of one runs each test. A worker is this
file as a script: one job a line on stdin, one verdict a line on stdout.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import lru_cache, partial

try:
    import resource
except ImportError:  # Windows
    resource = None
if __name__ != "__main__":  # a worker goes without: the less it has loaded, the faster it forks
    import subprocess
    import tempfile
    import threading
    from concurrent.futures import ThreadPoolExecutor

SECONDS = 4.0  # a program has for all of its tests
LIMITS = {"AS": 1 << 29, "FSIZE": 1 << 22, "NPROC": 0, "CORE": 0}  # bytes, bytes, threads, bytes
REFUSED = ("os.kill", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system",
           "os.startfile", "subprocess.", "pty.", "socket.", "ctypes.", "signal.pthread_kill")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "os.utime")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def cases(tests: str) -> list[tuple[str, str]]:
    """[(stdin, stdout)] of a ground truth, `{"inputs": [...], "outputs": [...]}`; a ValueError if
    it is none."""
    try:
        tests = json.loads(tests)
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"no unit tests: {error!r}") from error
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError("unit tests are one or more texts to read, and as many to print")
    return pairs


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


# ---- In the process of the program ---------------------------------------------------------------


def refuse(folder: str, event: str, arguments: tuple) -> None:
    """The audit hook: no other processes, no network, and no changes outside the folder."""
    paths = arguments if event in CHANGES else ()
    if event == "open" and arguments[2] & WRITES:
        paths = arguments[:1]
    paths = [os.path.realpath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes)]
    outside = [path for path in paths if not path.startswith(folder) and path != os.devnull]
    if outside or event.startswith(REFUSED):
        raise PermissionError(f"{event} {outside or ''}")


def execute(program: str, seconds: float) -> None:
    """Run the program under the limits and end the process: status 0, if it ended well."""
    status = 1
    try:
        os.environ.clear()
        if resource:
            for name, most in (LIMITS | {"CPU": int(seconds) + 1}).items():
                with suppress(ValueError, OSError, AttributeError):  # not on every platform
                    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its default is to end the process
        sys.addaudithook(partial(refuse, os.path.realpath(os.getcwd()) + os.sep))
        try:
            exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = int(end.code not in (None, 0))
        atexit._run_exitfuncs()  # some programs print in one
        for stream in (sys.stdout, sys.__stdout__):
            with suppress(ValueError):  # closed
                stream.flush()
    finally:
        os._exit(status)  # without a traceback


# ---- One test, and all of a program's ------------------------------------------------------------


def run_forked(stdin: int, stdout: int, program: str, given: str, seconds: float) -> str | None:
    """What the program prints, or None if it fails: in a fork of this process, a warm worker, that
    has two files open for all the tests."""
    for file, content in (stdin, given.encode("utf-8", "replace")), (stdout, b""):
        os.truncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, content)
    os.lseek(stdin, 0, os.SEEK_SET)
    os.mkdir("program")
    if (child := os.fork()) == 0:
        try:
            os.chdir("program")
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.closerange(3, 256)  # the worker's files
            atexit._clear()  # and its duties
            execute(program, seconds)
        finally:
            os._exit(1)
    failed = os.waitpid(child, 0)[1]
    try:
        os.rmdir("program")
    except OSError:  # the program left something there
        import shutil

        shutil.rmtree("program", ignore_errors=True)
    return None if failed else os.pread(stdout, LIMITS["FSIZE"], 0).decode("utf-8", "replace")


def run_fresh(program: str, given: str, seconds: float) -> str | None:
    """The same in a Python started for it: slower, but on every platform."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stdout:
        with open(os.path.join(folder, "program.py"), "wb") as file:
            file.write(program.encode("utf-8", "replace"))
        process = start("program.py", str(seconds), cwd=folder, stdin=subprocess.PIPE,
                        stdout=stdout)  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            process.communicate(given.encode("utf-8", "replace"), timeout=seconds + 1)
        kill(process)
        stdout.seek(0)
        return None if process.returncode else stdout.read().decode("utf-8", "replace")


def passes(run, program: str, pairs: list, seconds: float) -> bool:
    end = time.monotonic() + seconds
    for given, wanted in pairs:
        printed = run(program, given, max(0.01, end - time.monotonic()))
        if printed is None or lines(printed) != lines(wanted):
            return False
    return True


# ---- Workers -------------------------------------------------------------------------------------


def start(*arguments: str, **settings) -> subprocess.Popen:
    """This file as a script, isolated, in a session (so also a process group) of its own."""
    command = [sys.executable, "-I", "-B", "-X", "utf8", os.path.abspath(__file__), *arguments]
    needed = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows
    return subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=needed, start_new_session=True, **settings)


def kill(process: subprocess.Popen) -> None:
    """And all that it started."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def warm_worker() -> subprocess.Popen:
    """This thread's, a new one if it has none alive, in a folder that is removed at exit."""
    worker = getattr(THREAD, "worker", None)
    if worker is None or worker.poll() is not None:
        folder = THREAD.folder = tempfile.TemporaryDirectory()  # the last one's, if any, goes
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        worker = THREAD.worker = start(cwd=folder.name, **pipes)
        atexit.register(kill, worker)
    return worker


def judge_warm(program: str, pairs: list) -> bool:
    """False, too, if the worker dies over it; the next job gets a new one."""
    worker = warm_worker()
    limit = threading.Timer(SECONDS + 2, kill, [worker])  # only if the program stops its own alarm
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


@lru_cache(1 << 14)  # once trained, a policy writes the same right program again and again
def verdict(program: str, tests: str, warm: bool) -> bool:
    try:
        pairs = cases(tests)
    except ValueError:
        return False
    return judge_warm(program, pairs) if warm else passes(run_fresh, program, pairs, SECONDS)


def judge(programs: list[str], tests: list[str], warm: bool = hasattr(os, "fork")) -> list[bool]:
    """For each program, whether it prints what its tests expect, but for white space at the end."""
    jobs = list(zip(programs, tests, strict=True))
    distinct = list(dict.fromkeys(jobs))
    verdicts = POOL.map(lambda job: verdict(*job, warm), distinct)
    known = dict(zip(distinct, verdicts, strict=True))
    return [known[job] for job in jobs]


def serve() -> None:
    files = [os.open(name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("stdin", "stdout")]
    for line in iter(sys.stdin.readline, ""):
        passed = passes(partial(run_forked, *files), *json.loads(line))
        print(json.dumps(passed), flush=True)


if __name__ != "__main__":
    POOL, THREAD = ThreadPoolExecutor(os.cpu_count()), threading.local()
elif sys.argv[1:]:  # a program and its seconds
    with open(sys.argv[1], encoding="utf-8") as file:
        text = file.read()
    execute(text, float(sys.argv[2]))
else:
    serve()
