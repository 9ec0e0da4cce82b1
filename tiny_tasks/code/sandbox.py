"""The process that runs one program on all of its tests. judge.py starts this file as a script.

Three walls: what its syntax tree may hold; fewer builtins, of a module what is public; nothing of
the operating system. They contain a model's accidents; against an attacker, use a container.
"""

import _ast as ast  # the nodes alone: all of `ast` takes as long as a Python to start
import _thread
import builtins
import io
import marshal
import sys
import time
from os import _exit

MODULES = """array bisect cmath collections collections.abc copy dataclasses datetime decimal enum
fractions functools heapq itertools json math operator random re statistics string sys typing"""
SYS = {"stdin", "stdout", "maxsize", "setrecursionlimit", "exit"}
# What evaluates texts, uses attributes by their names, or makes classes of texts.
REFUSED = """attrgetter methodcaller singledispatch singledispatchmethod Formatter format_map wraps
get_type_hints ForwardRef get_args evaluate_forward_ref TypedDict make_dataclass update_wrapper
EnumMeta EnumType global_enum metaclass _evaluate"""
BUILTINS = "eval exec compile getattr setattr delattr globals locals vars dir breakpoint open"
METHODS = """init str repr eq ne lt le gt ge hash len iter next getitem setitem delitem contains
call add sub mul truediv floordiv mod pow matmul neg pos abs bool int float index round and or xor
enter exit post_init missing reversed lshift rshift invert name slots copy deepcopy"""
UNDERSCORED = {f"__{side}{name}__" for side in ("", "r", "i") for name in METHODS.split()}
MODULES, REFUSED, BUILTINS = set(MODULES.split()), set(REFUSED.split()), set(BUILTINS.split())
MOST = 2**22  # bytes of output


def need(allowed: bool) -> None:
    if not allowed:
        raise ValueError("not allowed")


def check(tree: ast.AST) -> None:
    """ValueError if it uses what is not allowed; else loads its modules, as later none can be."""
    nodes, names, modules = [tree], set(), {"heapq"}  # which Counter.most_common loads when called
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            need(not getattr(node, "level", 0))
            modules |= {getattr(node, "module", alias.name) for alias in node.names}
        elif getattr(getattr(node, "func", None), "id", "") == "open":
            node.func.id = "open()"  # what `run` gives in its place
        elif isinstance(node, ast.Attribute) and node.attr == "format":
            need("._" not in getattr(node.value, "value", "._"))  # only of a text; no {0.__class__}
        elif isinstance(node, ast.MatchClass):  # it reads attributes; by position, any
            need("format" not in node.kwd_attrs and not node.patterns)
        for value in vars(node).values():
            parts = value if isinstance(value, list) else [value]
            nodes += [part for part in parts if isinstance(part, ast.AST)]
            if not isinstance(node, ast.Constant):
                names |= {part for part in parts if isinstance(part, str)}
    need(modules <= MODULES and not names & REFUSED)
    need({name for name in names if name[0] == name[-1] == "_"} <= UNDERSCORED | {"_", "__"})
    for name in modules | ({"_strptime"} if "datetime" in modules else set()):
        __import__(name)
    if "dataclasses" in modules:
        sys.modules["dataclasses"].Field.__setattr__ = set_field


def set_field(field, name: str, value):  # dataclasses writes programs with the names of fields
    plain = type(value) is str and value.isidentifier() and value[:2] != "__" and value != "format"
    need(name != "name" or value is None or plain)
    object.__setattr__(field, name, value)


def public(name: str):
    """A module as the program sees it: without the modules that it has imported."""
    found = vars(sys.modules[name])
    names = set(found.get("__all__", found)) - REFUSED - {"Field", "Type", "get_origin"}
    names = SYS if name == "sys" else names
    names = {each for each in names & found.keys() if not isinstance(found[each], type(sys))}
    same = {"__setattr__": lambda _, each, value: need(value is found[each]), "__delattr__": None}
    module = type("Module", (), same)()
    vars(module).update((each, found[each]) for each in names if each[0] != "_")
    return module  # without a `__name__`, so that no import looks further


def fence(event: str, arguments: tuple) -> None:
    """Of what Python reports only what honest programs do: no file, no process, no frame."""
    if event.startswith("object.__"):
        event = event[9:12] + arguments[1]
    if f" {event} " not in (  # all constants: names can be changed by whoever reaches them
        " array.__new__ builtins.id builtins.input builtins.input/result compile exec get__code__"
        " get__defaults__ get__kwdefaults__ set__defaults__ set__doc__ set__module__ time.sleep "
        " set__bases__ set__name__ set__qualname__ sys._getframemodulename "
    ):
        raise ValueError(event)  # namedtuple takes it for a Python without frames


def run(code, given: str) -> bytes:
    main = type(sys)("__main__")
    output = type("Output", (io.BytesIO,), {"close": lambda self: None})()  # what is printed stays
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode("utf-8", "replace")), "utf-8")
    sys.stdout = io.TextIOWrapper(output, "utf-8", newline="\n", write_through=True)
    files = {(0, "r"): sys.stdin, (0, "rb"): sys.stdin.buffer}
    modules = {name: public(name) for name in MODULES & sys.modules.keys()}
    allowed = {k: v for k, v in vars(builtins).items() if k not in BUILTINS}
    allowed |= {"exit": sys.exit, "quit": sys.exit}
    allowed["open()"] = lambda file, mode="r", **_: files[file, mode]
    allowed["type"] = lambda x: (
        need(not isinstance(x, type) and type(x).__name__ != "Field") or type(x)
    )
    allowed["__import__"] = lambda name, *etc: modules.get(name if etc[2] else name.split(".")[0])
    main.__builtins__, sys.modules["__main__"] = allowed, main
    try:
        exec(code, vars(main))
    except SystemExit as end:
        need(end.code in (None, 0))
    need(len(io.BytesIO.getvalue(output)) <= MOST)  # not its own, which a program can replace
    return io.BytesIO.getvalue(output)


def work(program: str, inputs: list[str], seconds: float, out) -> None:
    """`ready`, then a line for each test: what was printed, in hexadecimal digits."""
    try:
        limits = {"CPU": int(seconds) + 1, "FSIZE": MOST, "CORE": 0, "NPROC": 0, "AS": 2**29}
        try:
            import resource

            for name, most in limits.items():
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        except (ImportError, AttributeError, ValueError, OSError):
            pass  # Windows has none, macOS not the last
        print("ready", file=out, flush=True)  # from here on a failure is the program's own
        tree = compile(program, "program.py", "exec", ast.PyCF_ONLY_AST)
        check(tree)
        code = compile(tree, "program.py", "exec")
        for name in {"os", "posix", "nt", "_imp", "_signal", "resource"} & sys.modules.keys():
            vars(sys.modules[name]).clear()
        sys.addaudithook(fence)
        for given in inputs:
            print(run(code, given).hex(), file=out, flush=True)
    finally:
        _exit(0)  # whatever it has started or registered


if __name__ == "__main__":
    program, inputs, seconds = marshal.load(sys.stdin.buffer)
    _thread.stack_size(2**26)  # for deep recursion
    _thread.start_new_thread(work, (program, inputs, seconds, sys.stdout))
    time.sleep(seconds)  # the deadline, on every system
    _exit(1)
