"""The judge of code: what a program may do, and that honest ones are judged as by plain Python."""

import json
import os
import subprocess
import time

import pytest

import smepo
from tiny_tasks.code import judge

HOSTILE = {
    "remove": "import shutil\nshutil.rmtree(FOLDER, ignore_errors=True)",
    "os": "import os\nos.remove(FOLDER + '/canary')",
    "alias": "import os.path as p\np.os.system('true')",
    "from": "from random import _os\n_os.system('true')",
    "module of module": "import typing\ntyping.sys.modules['os'].remove(FOLDER + '/canary')",
    "module as a value": "import typing\nt = typing\nt.sys.modules['os'].system('true')",
    "from a module": "from dataclasses import sys as s\ns.modules['os'].system('true')",
    "codecs": "import json\njson.codecs.open(FOLDER + '/new', 'w')",
    "star": "from operator import *\nattrgetter('x')",
    "__import__": "__import__('os').system('true')",
    "builtins": "__builtins__['__import__']('os')",
    "getattr": "getattr(print, '__self__')",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "globals": "def f(): pass\nf.__globals__",
    "frame": "g = (x for x in [1])\ng.gi_frame.f_back",
    "traceback": "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame",
    "match": "match 1:\n    case int(__class__=c):\n        c",
    "open": "open(FOLDER + '/new', 'w').write('x')",
    "open by name": "o = open\no(FOLDER + '/new', 'w')",
    "eval": "eval('1')",
    "exec": "exec('import os')",
    "compile": "compile('1', 'x', 'eval')",
    "annotation": "import functools\n@functools.singledispatch\ndef f(x): pass\nf.register(str)",
    "hints": "from typing import get_type_hints\nget_type_hints(print)",
    "format": "print('{0.__class__}'.format(1))",
    "format_map": "'{x.y}'.format_map({})",
    "formatter": "import string\nstring.Formatter().format('{0.real}', 1)",
    "attrgetter": "import operator\noperator.attrgetter('__class__')(1)",
    "modules": "import sys\nsys.modules['os']",
    "settrace": "import sys\nsys.settrace(print)",
    "thread": "import threading",
    "socket": "import socket",
    "ctypes": "import ctypes",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "signal": "import signal",
    "importlib": "import importlib",
    "breakpoint": "breakpoint()",
    "private": "class A: pass\na = A()\na._x = 1\na._A__y",
    "relative": "from . import judge",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_allowed_earns_nothing_and_does_nothing(tmp_path, kind):
    (tmp_path / "canary").write_text("alive", encoding="utf-8")
    program = f"FOLDER = {str(tmp_path)!r}\n{HOSTILE[kind]}\nprint(7)"
    right = "print(7)" if kind != "star" else "from math import *\nprint(floor(7.5))"
    tests = json.dumps({"inputs": [""], "outputs": ["7"]})
    assert judge.judge([program, right], [tests] * 2) == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]


ENDLESS = {
    "loop": "while True: pass",
    "C": "10 ** 10 ** 9",
    "memory": "x = 'x' * 10 ** 10",
    "bomb": "((((((((" * 2000,
    "output": "while True: print('x' * 10 ** 6)",
    "recursion": "def f(): return f()\nf()",
    "catches all": "while True:\n    try: 1 ** 1\n    except BaseException: pass",
}


def test_what_does_not_end_is_ended_and_nothing_is_left(monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 1.0)
    start, tests = time.monotonic(), '{"inputs": ["", ""], "outputs": ["x", "x"]}'
    assert not any(judge.judge(list(ENDLESS.values()), [tests] * len(ENDLESS)))
    assert time.monotonic() - start < 60  # no timing: else it hangs for good
    if os.name == "posix":
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert str(judge.SANDBOX) not in running


HONEST = {
    "sum": ("print(sum(map(int, input().split())))", "2 3", "5"),
    "stdin": ("import sys\nfor line in sys.stdin: print(line.strip())", "a\nb\n", "a\nb"),
    "buffer": ("import sys\nprint(len(sys.stdin.buffer.read()))", "abc", "3"),
    "reconfigure": (
        "import sys\nsys.stdin.reconfigure(encoding='utf-8')\nprint(input())",
        "é",
        "é",
    ),
    "open(0)": ("print(open(0).read().split()[1])", "a b", "b"),
    "exit": ("import sys\nprint(1)\nsys.exit()\nprint(2)", "", "1"),
    "exit()": ("print(1)\nexit()", "", "1"),
    "main": ("def main():\n    print(1)\nif __name__ == '__main__':\n    main()", "", "1"),
    "recursion": (
        "import sys\nsys.setrecursionlimit(20000)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(10000))",
        "",
        "10000",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n"
        "print(max(P(1), P(2)))",
        "",
        "P(x=2)",
    ),
    "class": (
        "class A:\n    def __init__(self, x):\n        self._x = x\n    def __lt__(self, other):\n"
        "        return self._x < other._x\nclass B(A):\n    def __init__(self):\n"
        "        super().__init__(3)\nprint(A(1) < B())",
        "",
        "True",
    ),
    "heap": ("import heapq as h\nq = [3, 1]\nh.heapify(q)\nprint(h.heappop(q))", "", "1"),
    "counter": ("from collections import Counter\nprint(Counter(input())['a'])", "aab", "2"),
    "names": (
        "import datetime, copy, random, bisect\nrandom.seed(1)\nrandom.random()\n"
        "print(datetime.date(2001, 3, 1), copy.copy([1]), bisect.bisect([1], 2))",
        "",
        "2001-03-01 [1] 1",
    ),
    "format": ("for _ in range(2): print('{:.2f}|{}'.format(1, 2), f'{1}')", "", "1.00|2 1\n" * 2),
    "namedtuple": (
        "from collections import namedtuple as n\nP = n('P', 'x y')\nprint(P(1, 2)._replace(x=3))",
        "",
        "P(x=3, y=2)",
    ),
    "cache": (
        "from functools import lru_cache\n@lru_cache(None)\ndef f(n):\n"
        "    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(80))",
        "",
        "23416728348467685",
    ),
    "re": ("import re\nprint(re.sub(r'[a-z]+', lambda m: m.group().upper(), input()))", "a1", "A1"),
    "no newline": ("import sys\nsys.stdout.write('x')", "", "x"),
    "blanks": ("print('x  ')\nprint()", "", "x"),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_programs_are_right(kind):
    program, given, wanted = HONEST[kind]
    tests = json.dumps({"inputs": [given, given], "outputs": [wanted, wanted]})
    other = json.dumps({"inputs": [given, given], "outputs": [wanted, wanted + "!"]})
    assert judge.judge([program] * 2, [tests, other]) == [True, False]


@pytest.mark.parametrize(
    "program", ["print(", "print(7)\n1 / 0", "1 / 0", "import sys\nprint(7)\nsys.exit(1)", ""]
)
def test_what_fails_or_is_no_python_is_wrong(program):
    assert judge.judge([program], ['{"inputs": [""], "outputs": ["7"]}']) == [False]


def test_a_breakdown_is_no_verdict_and_is_not_kept(monkeypatch):
    program, tests = "print(8)  # once", '{"inputs": [""], "outputs": ["8"]}'
    sandbox = judge.SANDBOX
    monkeypatch.setattr(judge, "SANDBOX", sandbox.with_name("none.py"))
    with pytest.raises(smepo.UserError, match="cannot start its sandbox"):
        judge.judge([program], [tests])
    monkeypatch.setattr(judge, "SANDBOX", sandbox)
    assert judge.judge([program], [tests]) == [True]


@pytest.mark.parametrize("tests", ["x", "[]", "{}", "null", '{"inputs": [1], "outputs": [1]}'])
def test_malformed_tests_are_no_tests(tests):
    with pytest.raises(ValueError):
        judge.cases(tests)
