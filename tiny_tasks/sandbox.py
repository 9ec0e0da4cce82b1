"""The process that runs a program: no environment, a temporary working folder, limits on time,
memory and output, and a hook that refuses what no solution needs. This contains the accidents of a
model that learns to write programs; against an attacker, put all of it in a container.

judge.py starts this file as a script, in one of two ways. Given a program, it runs that. Else it
is a worker: one job a line on stdin, one verdict a line on stdout, and each test runs in a fork of
it, as a Python takes longer to start than such a program takes to run.
"""
import atexit
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial

with suppress(ImportError):  # Windows has none
    import resource

LIMITS = {"AS": 2**29, "FSIZE": 2**22, "NPROC": 0, "CORE": 0}  # bytes, bytes, threads, bytes
REFUSED = ("os.exec os.fork os.kill os.posix_spawn os.spawn os.startfile os.system ctypes. pty. "
           "signal.pthread_kill socket. subprocess.").split()
CHANGES = ("os.chmod os.chown os.link os.mkdir os.remove os.rename os.rmdir os.symlink os.truncate "
           "os.utime").split()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

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
