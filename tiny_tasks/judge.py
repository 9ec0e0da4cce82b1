"""The verifier of code: does a program print what its unit tests expect?

Programs run in processes of their own: no environment, a temporary working folder, limits on time,
memory and output, and a hook that refuses what no solution needs. This contains the accidents of a
model that learns to write programs; against an attacker, put all of it in a container.

A Python takes longer to start than such a program takes to run. So, where the platform can fork,
warm workers, one a core, stay between calls, and a fork of one runs each test. A worker is this
file as a script: one job a line on stdin, one verdict a line on stdout.
"""
import atexit
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import lru_cache, partial

if __name__ != "__main__":  # a worker goes without: the less it has loaded, the faster it forks
    import subprocess
    import tempfile
    import threading
    from concurrent.futures import ThreadPoolExecutor

    POOL, THREAD = ThreadPoolExecutor(os.cpu_count()), threading.local()  # a worker each
with suppress(ImportError):  # Windows has none
    import resource

SECONDS = 4.0  # a program has for all of its tests
LIMITS = {"AS": 2**29, "FSIZE": 2**22, "NPROC": 0, "CORE": 0}  # bytes, bytes, threads, bytes
REFUSED = ("os.exec os.fork os.kill os.posix_spawn os.spawn os.startfile os.system ctypes. pty. "
           "signal.pthread_kill socket. subprocess.").split()
CHANGES = ("os.chmod os.chown os.link os.mkdir os.remove os.rename os.rmdir os.symlink os.truncate "
           "os.utime").split()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

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

# ---- In the process of a program -----------------------------------------------------------------
def refuse(folder: str, event: str, arguments: tuple) -> None:
    """The audit hook: no other processes, no network, and no changes outside the folder."""
    paths = arguments if event in CHANGES else ()
    if event == "open" and arguments[2] & WRITES:
        paths = arguments[:1]
    paths = [os.path.realpath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes)]
    outside = any(not path.startswith(folder) and path != os.devnull for path in paths)
    if outside or event.startswith(tuple(REFUSED)):
        raise PermissionError(event)

def execute(program, seconds: float) -> None:
    """Run compiled code under the limits, and end the process: status 0 if all went well."""
    status = 1
    try:
        os.environ.clear()
        if "resource" in globals():
            for name, most in (LIMITS | {"CPU": int(seconds) + 1}).items():
                with suppress(ValueError, OSError, AttributeError):  # no such limit on this system
                    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            signal.setitimer(signal.ITIMER_REAL, seconds)  # an alarm ends the process
        sys.addaudithook(partial(refuse, os.path.realpath(os.getcwd()) + os.sep))
        try:
            exec(program, {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = int(end.code not in (None, 0))
        atexit._run_exitfuncs()  # some programs print in one
        for stream in (sys.stdout, sys.__stdout__):
            with suppress(Exception):  # closed, or no file at all
                stream.flush()
    finally:
        os._exit(status)  # without a traceback

def run_forked(stdin: int, stdout: int, program, given: str, seconds: float) -> str | None:
    """What the program prints, None if it fails: in a fork of this process, a worker. Its two
    files are used again for each test."""
    for file, content in (stdin, given.encode("utf-8", "replace")), (stdout, b""):
        os.truncate(file, 0)
        os.pwrite(file, content, 0)
        os.lseek(file, 0, os.SEEK_SET)
    os.mkdir("program")
    if (child := os.fork()) == 0:
        try:
            os.chdir("program")
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.closerange(3, 256)  # all that is the worker's
            atexit._clear()
            execute(program, seconds)
        finally:
            os._exit(1)
    failed = os.waitpid(child, 0)[1]
    try:
        os.rmdir("program")
    except OSError:  # the program left files there
        import shutil

        shutil.rmtree("program", ignore_errors=True)
    return None if failed else os.pread(stdout, LIMITS["FSIZE"], 0).decode("utf-8", "replace")

def lines(text: str) -> list[str]:  # white space at their ends, and at the end of all, is free
    return [line.rstrip() for line in text.rstrip().split("\n")]

def passes(run, program: str, pairs: list, seconds: float) -> bool:
    end = time.monotonic() + seconds
    for given, wanted in pairs:
        printed = run(program, given, max(0.01, end - time.monotonic()))
        if printed is None or lines(printed) != lines(wanted):
            return False
    return True

# ---- In the process that trains ------------------------------------------------------------------
def start(*arguments: str, **settings):
    """This file as a script, isolated, in a session (so also a process group) of its own."""
    command = [sys.executable, "-I", "-B", "-X", "utf8", os.path.abspath(__file__), *arguments]
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH")  # without them some a Python does not start
    needed = {name: os.environ[name] for name in needed if name in os.environ}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=needed,
                            start_new_session=True, **settings)

def kill(process) -> None:
    """And whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()

def run_fresh(program: str, given: str, seconds: float) -> str | None:
    """As run_forked, in a Python started for it: slower, but on every platform."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stdout:
        with open(os.path.join(folder, "program.py"), "wb") as file:
            file.write(program.encode("utf-8", "replace"))
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
    if program is None:  # a text without any
        return False
    try:
        pairs = cases(tests)
    except ValueError:
        return False
    return judge_warm(program, pairs) if warm else passes(run_fresh, program, pairs, SECONDS)

def judge(programs: list[str], tests: list[str], warm: bool = hasattr(os, "fork")) -> list[bool]:
    """Which programs pass all of their tests? Equal jobs are done once, all in parallel."""
    jobs = list(zip(programs, tests, strict=True))
    distinct = list(dict.fromkeys(jobs))
    verdicts = POOL.map(lambda job: verdict(*job, warm), distinct)
    passed = dict(zip(distinct, verdicts, strict=True))
    return [passed[job] for job in jobs]

if __name__ == "__main__":
    if sys.argv[1:]:  # run_fresh: a program and its seconds
        with open(sys.argv[1], encoding="utf-8") as source:
            text = source.read()
        execute(compile(text, "program.py", "exec"), float(sys.argv[2]))
    files = [os.open(name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("stdin", "stdout")]
    for line in sys.stdin:
        passed, (program, pairs, seconds) = False, json.loads(line)
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            code = compile(program, "program.py", "exec")  # once, not again in each fork
            passed = passes(partial(run_forked, *files), code, pairs, seconds)
        print(json.dumps(passed), flush=True)
