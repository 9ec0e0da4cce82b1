"""The process that runs one program on all of its tests. judge.py starts this file as a script.

A list of what is allowed is held against the program's syntax tree before it runs: modules that
compute, names and attributes without a leading underscore, standard input and output. This contains
the accidents of a model that learns to write programs; against an attacker, use a container.
"""

import ast
import builtins
import io
import json
import os
import re
import sys
import threading
from contextlib import suppress
from importlib import import_module
from types import ModuleType

MODULES = """array bisect cmath collections collections.abc copy dataclasses datetime decimal enum
fractions functools heapq itertools json math operator random re statistics string sys typing"""
SYS = {"stdin", "stdout", "maxsize", "setrecursionlimit", "exit"}
# What of these modules evaluates texts or reads attributes by their names.
NOT_EVEN = {"attrgetter", "methodcaller", "singledispatch", "singledispatchmethod", "Formatter"}
NOT_EVEN |= {"get_type_hints", "ForwardRef", "make_dataclass", "evaluate_forward_ref"}
BUILTINS = {"eval", "exec", "compile", "getattr", "setattr", "delattr", "globals", "locals", "vars"}
BUILTINS |= {"dir", "breakpoint", "help", "memoryview", "open", "copyright", "credits", "license"}
UNDERSCORED = {"__name__", "__init__", "__slots__", "__str__", "__repr__", "__eq__", "__lt__"}
UNDERSCORED |= {"__len__", "__hash__", "_replace", "_asdict", "_fields", "_make"}
FRAMES = ("gi_", "f_", "tb_", "co_", "cr_", "ag_")
READS = re.compile(r"\{[^{}:!]*[.\[]")  # a format that looks into what it shows
MOST = 2**22  # characters of output


def public(module: str, name: str) -> bool:
    """May this name of a module be used? Not what it has imported itself."""
    if module == "sys":
        return name in SYS
    if name == "*":
        return module != "operator"
    value = getattr(import_module(module), name, None)
    return not name.startswith("_") and name not in NOT_EVEN and not isinstance(value, ModuleType)


def imported(tree: ast.AST) -> dict[str, str] | None:
    """{name in the program: module}; None if one is not allowed."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in MODULES.split() or (alias.asname or "").startswith("_"):
                    return None
                names[alias.asname or alias.name.partition(".")[0]] = alias.name
        if isinstance(node, ast.ImportFrom):
            allowed = not node.level and node.module in MODULES.split()
            if not allowed or not all(public(node.module, alias.name) for alias in node.names):
                return None
    return names


def is_allowed(tree: ast.AST) -> bool:
    modules = imported(tree)
    if modules is None:
        return False
    fine = set()  # nodes that are looked at with the one around them
    for node in ast.walk(tree):
        if node in fine:
            continue
        if isinstance(node, ast.Attribute):
            base = node.value
            if isinstance(base, ast.Name) and base.id in modules:
                if not public(modules[base.id], node.attr):
                    return False
                fine.add(base)
            own = isinstance(base, ast.Name) and base.id in ("self", "cls", "other")
            hidden = node.attr.startswith("_") and not (own and node.attr[1:2] != "_")
            if hidden and node.attr not in UNDERSCORED:
                return False
            constant = base.value if isinstance(base, ast.Constant) else ""
            formats = node.attr == "format" and READS.search(str(constant))
            if node.attr.startswith(FRAMES) or node.attr == "format_map" or formats:
                return False
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "open":
            if [getattr(argument, "value", None) for argument in node.args] != [0]:
                return False
            fine.add(node.func)
        elif isinstance(node, ast.Name):
            dunder = node.id.startswith("__") and node.id not in UNDERSCORED
            if dunder or node.id in BUILTINS or node.id in modules:  # a module only before a dot
                return False
        elif isinstance(node, ast.MatchClass) and any(k.startswith("_") for k in node.kwd_attrs):
            return False
    return True


def set_limits(seconds: float) -> None:
    """Of time, memory and files, where the system has them; and a deadline of its own."""
    with suppress(ImportError):  # Windows
        import resource

        limits = {"AS": 2**29, "CPU": int(seconds) + 1, "FSIZE": MOST, "CORE": 0, "NOFILE": 64}
        for name, most in limits.items():
            with suppress(ValueError, OSError, AttributeError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def run(code, given: str) -> str | None:
    """What the program prints, None if it fails."""
    main = ModuleType("__main__")
    allowed = {k: v for k, v in vars(builtins).items() if k not in BUILTINS}
    stdin = io.TextIOWrapper(io.BytesIO(given.encode("utf-8", "replace")), "utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n", write_through=True)
    main.__dict__["__builtins__"] = allowed | {"open": lambda file: stdin, "exit": sys.exit}
    sys.modules["__main__"], sys.stdin, sys.stdout = main, stdin, stdout
    failed = True
    with suppress(BaseException):
        try:
            exec(code, main.__dict__)
            failed = False
        except SystemExit as end:
            failed = end.code not in (None, 0)
        printed = stdout.buffer.getvalue().decode("utf-8", "replace")
    return None if failed or len(printed) > MOST else printed


def work() -> None:
    """A line of JSON says what to do; a line of JSON for each test says what was printed."""
    out = sys.__stdout__
    job = json.loads(sys.stdin.readline())
    set_limits(job["seconds"])
    print("ready", file=out, flush=True)  # from here on a failure is the program's own
    try:
        tree = ast.parse(job["program"])
        code = compile(tree, "program.py", "exec") if is_allowed(tree) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        code = None
    for given in job["inputs"]:
        printed = run(code, given) if code else None
        print(json.dumps(printed), file=out, flush=True)
        if printed is None:
            break
    os._exit(0)  # whatever it has started or registered


if __name__ == "__main__":
    threading.stack_size(2**26)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
