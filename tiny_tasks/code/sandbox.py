"""The process that runs a program: no environment, a temporary working folder, limits on time,
memory and output, and a hook that refuses what no solution in plain Python needs. This contains
the accidents of a model that learns to write programs; against an attacker, put all of it in a
container.

judge.py starts this file as a script, in one of two ways. Given a program, it runs that. Else it
is a worker: one run a line on stdin, what was printed a line on stdout, and each run is a fork of
it, as a Python takes longer to start than such a program takes to run. What a program should print
is never told to this process: the program would find it on the stack or in memory.
"""

import atexit
import json
import os
import signal
import sys
from contextlib import suppress
from functools import lru_cache, partial

with suppress(ImportError):  # Windows has none
    import _posixsubprocess
    import resource

LIMITS = {"AS": 2**29, "FSIZE": 2**22, "CORE": 0}  # bytes
REFUSED = (
    *("os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
    *("ctypes.", "pty.", "signal.pthread_kill", "socket.", "sqlite3.", "subprocess.", "_winapi."),
)
CHANGES = (
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.truncate", "os.utime"),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refuse(folder: str, event: str, arguments: tuple) -> None:
    """The audit hook: no other processes, no network, and no changes outside the folder."""
    paths = ()
    if event in CHANGES:
        paths = arguments
    elif event == "open" and arguments[2] & WRITES:
        paths = arguments[:1]
    for path in paths:
        if isinstance(path, str | bytes):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(folder) and real != os.devnull:
                raise PermissionError(event)
    if event.startswith(REFUSED):
        raise PermissionError(event)


def set_limits(seconds: float) -> None:
    for name, most in (LIMITS | {"CPU": int(seconds) + 1}).items():
        with suppress(ValueError, OSError, AttributeError):  # no such limit on this system
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # an alarm ends the process


def execute(code, seconds: float) -> None:
    """Run compiled code under the limits, and end the process: status 0 if all went well."""
    status = 1
    try:
        os.environ.clear()
        if "resource" in globals():
            set_limits(seconds)
            _posixsubprocess.fork_exec = None  # it raises no audit event
        sys.addaudithook(partial(refuse, os.path.realpath(os.getcwd()) + os.sep))
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = int(end.code not in (None, 0))
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # wait for what it has started
        atexit._run_exitfuncs()  # some programs print in one
        for stream in (sys.stdout, sys.__stdout__):
            with suppress(Exception):  # closed, or no file at all
                stream.flush()
    finally:
        os._exit(status)  # without a traceback


@lru_cache(1)  # once, not again for each of its tests
def compiled(program: str):
    """Its code, None if it is no Python."""
    try:
        return compile(program, "program.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def start_over(file: int, content: bytes) -> None:
    os.truncate(file, 0)
    os.pwrite(file, content, 0)
    os.lseek(file, 0, os.SEEK_SET)


def run_forked(stdin: int, stdout: int, program: str, given: str, seconds: float) -> str | None:
    """What the program prints, None if it fails: in a fork of this process, a worker. Its two
    files are used again for each run."""
    code = compiled(program)
    if code is None:
        return None
    start_over(stdin, given.encode("utf-8", "replace"))
    start_over(stdout, b"")
    os.mkdir("program")
    child = os.fork()
    if child == 0:
        try:
            os.chdir("program")
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.closerange(3, 256)  # all that is the worker's
            atexit._clear()
            execute(code, seconds)
        finally:
            os._exit(1)
    failed = os.waitpid(child, 0)[1]
    try:
        os.rmdir("program")
    except OSError:  # the program left files there
        import shutil

        shutil.rmtree("program", ignore_errors=True)
    if failed:
        return None
    return os.pread(stdout, LIMITS["FSIZE"], 0).decode("utf-8", "replace")


def work() -> None:
    """No name here may hold what a run printed: the next program would find the answers of one
    that was right."""
    stdin, stdout = (os.open(name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("stdin", "stdout"))
    for line in sys.stdin:
        print(json.dumps(run_forked(stdin, stdout, *json.loads(line))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:  # a program and its seconds
        with open(sys.argv[1], encoding="utf-8") as source:
            text = source.read()
        seconds = float(sys.argv[2])
        del sys.argv[1:]  # a program has no arguments
        execute(compile(text, "program.py", "exec"), seconds)
    work()
