"""The process that runs one program on all of its tests. judge.py starts this file as a script.

A list of what is allowed is held against the program's syntax tree before it runs: modules that
compute, names and attributes without a leading underscore, standard input and output. This contains
the accidents of a model that learns to write programs; against an attacker, use a container.
"""

import _ast as ast  # the nodes alone: all of `ast` takes as long as a Python to start
import _thread
import builtins
import io
import marshal
import os
import sys

MODULES = """array bisect cmath collections collections.abc copy dataclasses datetime decimal enum
fractions functools heapq itertools json math operator random re statistics string sys typing"""
SYS = {"stdin", "stdout", "maxsize", "setrecursionlimit", "exit"}
# What evaluates texts, uses attributes by their names, or makes classes of texts.
REFUSED = """attrgetter methodcaller singledispatch singledispatchmethod Formatter format_map wraps
get_type_hints ForwardRef get_args evaluate_forward_ref TypedDict make_dataclass update_wrapper
EnumMeta EnumType global_enum metaclass"""
BUILTINS = """eval exec compile getattr setattr delattr globals locals vars dir breakpoint help
memoryview open"""
METHODS = """init str repr eq ne lt le gt ge hash len iter next getitem setitem delitem contains
call add sub mul truediv floordiv mod pow neg abs bool int float index radd rsub rmul iadd isub imul
and or xor enter exit post_init missing reversed lshift rshift invert name slots copy deepcopy"""
UNDERSCORED = {f"__{name}__" for name in METHODS.split()} | {"__", "_replace", "_asdict", "_fields"}
FRAMES = ("gi_", "f_", "tb_", "co_", "cr_", "ag_")
COMMON = """array bisect calendar cmd code copy datetime email errno html keyword math numbers
operator profile queue random re readline resource select signal stat statistics string struct
symbol time token trace uuid"""
MODULES, REFUSED, BUILTINS = set(MODULES.split()), set(REFUSED.split()), set(BUILTINS.split())
ELSEWHERE = REFUSED | sys.stdlib_module_names - set(COMMON.split())  # no ordinary attributes
READS = r"\{[^{}:!]*[.\[]"  # a format that looks into what it shows
FENCED = "os subprocess shutil socket ctypes pty signal sqlite3 mmap fcntl gc winreg _winapi"
MOST = 2**22  # characters of output


def need(allowed: bool) -> None:
    if not allowed:
        raise ValueError("not allowed")


def walk(tree: ast.AST) -> list[ast.AST]:
    """All nodes, each one before those within it."""
    nodes = [tree]
    for node in nodes:
        for value in [getattr(node, field, None) for field in node._fields]:
            children = value if isinstance(value, list) else [value]
            nodes += [child for child in children if isinstance(child, ast.AST)]
    return nodes


def looks_inside(text: str) -> bool:
    import re  # few programs need it

    return bool(re.search(READS, text))


def public(module: str, name: str) -> bool:
    """May this name of a module be used? Not what it has imported itself."""
    if module not in MODULES or module == "sys":
        return module == "sys" and name in SYS
    found = __import__(module, fromlist=["*"])
    names = [each for each in getattr(found, "__all__", dir(found)) if each[0] != "_"]
    if name == "*":
        return all(public(module, each) for each in names)
    return name in names and not isinstance(getattr(found, name, None), type(sys))


def imported(tree: ast.AST) -> dict[str, str]:
    """{name in the program: module}; none has two, and none is an attribute of a class."""
    modules = {}
    for node in walk(tree):
        if isinstance(node, ast.ImportFrom):
            need(not node.level and all(public(node.module, alias.name) for alias in node.names))
        if isinstance(node, ast.ClassDef):
            need(not any(isinstance(part, ast.Import) for part in walk(node)))
        for alias in node.names if isinstance(node, ast.Import) else []:
            name = alias.asname or alias.name
            need(alias.name in MODULES and "." not in name)
            need(modules.setdefault(name, alias.name) == alias.name)
    return modules


def check_name(node: ast.AST, name: str) -> None:
    need(name not in (BUILTINS | REFUSED if isinstance(node, ast.Name) else REFUSED))
    need(not (name.startswith("__") and name.endswith("__")) or name in UNDERSCORED)
    if isinstance(node, ast.Attribute | ast.MatchClass):  # whatever it is an attribute of
        own = getattr(getattr(node, "value", None), "id", "") in ("self", "cls", "other")
        need(name[0] != "_" or name in UNDERSCORED or own and name[-1] != "_")
        need(name not in ELSEWHERE and not name.startswith(FRAMES))


def check(tree: ast.AST) -> None:
    """ValueError: it uses what is not allowed."""
    modules, fine = imported(tree), set()  # nodes that were looked at with the one around them
    for node in (node for node in walk(tree) if node not in fine):
        base, function = getattr(node, "value", None), getattr(getattr(node, "func", 0), "id", "")
        if isinstance(node, ast.Attribute) and getattr(base, "id", None) in modules:
            fine.add(base)
            allowed = (ast.Load, ast.Store) if modules[base.id] == "sys" else ast.Load
            need(public(modules[base.id], node.attr) and isinstance(node.ctx, allowed))
        elif isinstance(node, ast.Attribute) and node.attr == "format":
            need(isinstance(base, ast.Constant) and not looks_inside(str(base.value)))
        elif function == "open":
            fine.add(node.func)
            need([getattr(argument, "value", None) for argument in node.args] == [0])
        need(function != "type" or len(node.args) == 1)
        need(not isinstance(node, ast.Name) or node.id not in modules)
        for _, value in [(f, getattr(node, f, None)) for f in node._fields]:
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str) and not isinstance(node, ast.Constant):
                    check_name(node, name)


def fence(event: str, arguments: tuple) -> None:
    """A second wall, where that list has a gap: nothing outside of this process changes."""
    fenced = event.split(".")[0] in FENCED.split() and event not in ("os.listdir", "os.scandir")
    if fenced or event == "open" and arguments[1] not in ("r", "rb"):
        raise PermissionError(event)


def set_limits(seconds: float) -> None:
    """Of time, memory and files, where the system has them: Windows leaves them to judge.py."""
    sys.addaudithook(fence)
    try:
        import resource
    except ImportError:
        return
    limits = {"AS": 2**29, "CPU": int(seconds) + 1, "FSIZE": MOST, "CORE": 0, "NPROC": 0}
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        except (ValueError, OSError, AttributeError):  # this system has no such limit
            pass


class Output(io.BytesIO):
    def close(self):  # what was printed stays
        pass


def run(code, given: str) -> bytes | None:
    """What the program prints, None if it fails."""
    main, output, failed = type(sys)("__main__"), Output(), True
    allowed = {k: v for k, v in vars(builtins).items() if k not in BUILTINS}
    sys.stdin = stdin = io.TextIOWrapper(io.BytesIO(given.encode("utf-8", "replace")), "utf-8")
    sys.stdout = io.TextIOWrapper(output, "utf-8", newline="\n", write_through=True)
    allowed |= {"open": lambda file: stdin, "exit": sys.exit, "quit": sys.exit}
    main.__dict__["__builtins__"], sys.modules["__main__"] = allowed, main
    try:
        exec(code, main.__dict__)
        failed = False
    except SystemExit as end:
        failed = end.code not in (None, 0)
    except BaseException:
        pass
    printed = output.getvalue()
    return None if failed or len(printed) > MOST else printed


def work(job: dict, out) -> None:
    """`ready`, then a line for each test: what was printed, in hexadecimal digits."""
    try:
        set_limits(job["seconds"])
        out.write(b"ready\n")  # from here on a failure is the program's own
        out.flush()
        tree = compile(job["program"], "program.py", "exec", ast.PyCF_ONLY_AST)
        check(tree)
        code = compile(tree, "program.py", "exec")
        for given in job["inputs"]:
            printed = run(code, given)
            if printed is None:
                break
            out.write(printed.hex().encode() + b"\n")
            out.flush()
    finally:
        os._exit(0)  # whatever it has started or registered


if __name__ == "__main__":
    job = marshal.load(sys.stdin.buffer)
    _thread.stack_size(2**26)  # for deep recursion
    _thread.start_new_thread(work, (job, sys.stdout.buffer))
    done = _thread.allocate_lock()
    done.acquire()
    done.acquire(timeout=job["seconds"])  # the deadline, on every system
    os._exit(1)
