"""The judge of code: what a program may do, and that honest ones are judged as by plain Python."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import smepo
from tiny_tasks.code import judge

HOSTILE = {
    "remove": "import shutil\nshutil.rmtree(FOLDER, ignore_errors=True)",
    "from": "from random import _os\n_os.system('true')",
    "module of module": "import typing\ntyping.sys.modules['os'].remove(FOLDER + '/canary')",
    "module as a value": "import typing\nt = typing\nt.sys.modules['os'].system('true')",
    "from a module": "from dataclasses import sys as s\ns.modules['os'].system('true')",
    "star": "from operator import *\nattrgetter('x')",
    "frame": "g = (x for x in [1])\ng.gi_frame.f_back",
    "traceback": "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame",
    "match": "match 1:\n    case int(__class__=c):\n        c",
    "open": "open(FOLDER + '/new', 'w').write('x')",
    "annotation": "import functools\n@functools.singledispatch\ndef f(x): pass\nf.register(str)",
    "format": "print('{0.__class__}'.format(1))",
    "private": "class A: pass\na = A()\na._x = 1\na._A__y",
    "two modules": "if 1:\n    if 1:\n        import math as t\nimport typing as t\nt.sys.modules",
    "in a class": "class A:\n    import enum as e\nA.e.bltns.open(FOLDER + '/new', 'w')",
    "del": "import sys\ns = sys.stdout\ndel sys.stdout\nsys.stdout = s",
    "error": "import enum\ntry: enum.none\nexcept AttributeError as e: e.obj.bltns.eval('1')",
    "star hints": "from typing import *\ndef f(x: '1 / 0'): pass\nget_type_hints",
    "match frame": "match (x for x in [1]):\n    case object(gi_frame=f): f",
    "wraps": "import functools\ndef f(): pass\nfunctools.update_wrapper(f, f, ['__name__'])",
    "format of a name": "s = '{0.__class__}'\ns.format(1)",
    "convert": "from enum import Enum\ndef f(cls): cls._convert_('X', 'os', bool)",
    "annotations": "class A:\n    @id\n    def __annotations__(self): pass",
    "fence": "from dataclasses import dataclass as d, field\nx = field(default=1)\n@d\nclass A:\n"
    '    x: int = x\nx.name = \'x,__import__("os").remove(FOLDER + "/canary")\'\n'
    "@d(init=False, repr=False)\nclass B(A): pass\nB() == B()",
    "fields": "from dataclasses import field\nx = field()\nx.name = '__class__'",
    "type of type": "t = type(int)\nt('A', (), {})",
    "Type": "from typing import Type\nclass M(Type): pass\nM('A', (), {})",
    "positions": "from enum import Enum\nQ = Enum('Q', {'__match_args__': ('real',)}, type=int)\n"
    "match 1:\n    case Q(x): x",
    "forward": "class A:\n    def _evaluate(self): pass  # as typing.ForwardRef has",
    "Field": "from dataclasses import field\nF = type(field())\nF.name = property(id)",
    "type as a value": "t = type\nt('A', (), {})",
    "output": "import sys\nclass A:\n    def __len__(self): return 0\n"
    "    def hex(self): return '37'\n"
    "sys.stdout.buffer.getvalue = lambda: A()\nsys.stdout.write('8')",
    "reduce": "class A:\n    def __reduce_ex__(self, p): pass",
}
HOSTILE |= {
    program: program
    for program in """import os.path as p|from . import judge|import threading|breakpoint()|
eval('1')|exec('1')|__import__('os')|compile('1', '', 'eval')|getattr(print, '__self__')|
().__class__.__base__.__subclasses__()|o = open|import sys; sys.settrace(print)|
import sys; sys.modules|type('A', (), {})|class A(metaclass=type): pass|
import operator; operator.attrgetter('real')(1)|'{x}'.format_map({'x': 1})|__builtins__|
import json; json.codecs|import string; string.Formatter|print.__self__|(lambda: 1).__globals__|
from typing import get_type_hints""".split("|")
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


def test_what_does_not_end_is_ended_and_nothing_is_left(monkeypatch, tmp_path):
    sandbox = shutil.copy(judge.SANDBOX, tmp_path)  # other tests run the other one meanwhile
    monkeypatch.setattr(judge, "SANDBOX", sandbox)
    monkeypatch.setattr(judge, "SECONDS", 1.0)
    start, tests = time.monotonic(), '{"inputs": ["", ""], "outputs": ["x", "x"]}'
    assert not any(judge.judge(list(ENDLESS.values()), [tests] * len(ENDLESS)))
    assert time.monotonic() - start < 60  # no timing: else it hangs for good
    if os.name == "posix":
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert str(sandbox) not in running


HONEST = {
    "input": "from heapq import heapify\nq = list(map(int, input().split()))\nheapify(q)\nprint(q)",
    "readline": "import sys\ninput = sys.stdin.readline\nprint(input(), sys.stdin.readlines())",
    "buffer": "import sys\nprint(len(sys.stdin.buffer.read()))",
    "reconfigure": "import sys\nsys.stdin.reconfigure(encoding='utf-8')\nprint(open(0).read())",
    "exit": "import sys\nprint(1)\nsys.exit()\nprint(2)",
    "close": "import sys\nprint(1)\nsys.stdout.close()",
    "main": "def main():\n    print(1)\nif __name__ == '__main__':\n    main()",
    "recursion": "import sys\nsys.setrecursionlimit(20000)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(10000))",
    "dataclass": "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n"
    "print(max(P(1), P(2)))",
    "class": "class A:\n    def __init__(self, x): self._x, self.__y = x, x\n"
    "    def __lt__(self, other): return self._x < other._x\n"
    "class B(A):\n    def __init__(self): super().__init__(3)\nprint(A(1) < B(), type(B()))",
    "names": "import datetime, copy, random, bisect\nrandom.seed(1)\nq = [1].copy()\n"
    "print(datetime.date(2001, 3, 1), copy.copy(q), bisect.bisect(q, 2), random.random())",
    "star": "from math import *\nfrom typing import *\ndef f(x: List[int]) -> Any: pass\nprint(pi)",
    "abc": "from collections.abc import Iterable\nprint(isinstance([], Iterable))",
    "import a.b": "import collections\nimport collections.abc\nprint(collections.Counter('a'))",
    "operators": "class A:\n    def __matmul__(self, b): return b\n"
    "    def __rtruediv__(self, b): return b\nprint(A() @ 2, 3 / A())",
    "field": "from dataclasses import dataclass, field\n@dataclass\nclass P:\n"
    "    x: list = field(default_factory=list)\nprint(P())",
    "enum": "from enum import Enum, auto\nclass C(Enum):\n    R = auto()\nprint(C.R, C['R'].value)",
    "decimal": "from decimal import *\ngetcontext().prec = 5\nprint(Decimal(1) / 3)",
    "format": "for _ in range(2): print('{:.2f}|{}'.format(1, 2), f'{1}')",
    "namedtuple": "from collections import namedtuple as n\nprint(n('P', 'x')(2)._replace(x=3))",
    "cache": "from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n\nprint(f(80))",
    "re": "import re\nprint(re.compile('[a-z]+').sub(lambda m: m.group().upper(), 'a1'))",
    "blanks": "import sys\nsys.stdout.write('x  ')\nprint()\nprint()",
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_programs_are_judged_as_by_plain_python(kind):
    given, plain = "2 3\na1 é\n", [sys.executable, "-X", "utf8", "-c", HONEST[kind]]
    wanted = subprocess.run(plain, input=given.encode(), capture_output=True).stdout.decode()
    assert wanted
    tests = json.dumps({"inputs": [given, given], "outputs": [wanted, wanted]})
    other = json.dumps({"inputs": [given, given], "outputs": [wanted, wanted + "!"]})
    assert judge.judge([HONEST[kind]] * 2, [tests, other]) == [True, False]


@pytest.mark.parametrize("program", ["print(", "print(7)\n1 / 0", "print(7)\nexit(1)"])
def test_what_fails_or_is_no_python_is_wrong(program):
    assert judge.judge([program], ['{"inputs": [""], "outputs": ["7"]}']) == [False]


def test_a_breakdown_is_no_verdict_and_is_not_kept(monkeypatch):
    program, tests = "print(8)  # once", '{"inputs": [""], "outputs": ["8"]}'
    code = judge.CODE
    monkeypatch.setattr(judge, "CODE", code[:99])
    with pytest.raises(smepo.UserError, match="cannot start its sandbox"):
        judge.judge([program], [tests])
    monkeypatch.setattr(judge, "CODE", code)
    assert judge.judge([program], [tests]) == [True]
