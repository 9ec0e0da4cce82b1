"""Code: `... prints 3 more than the square of 5 times x.` has k = 3 operations, outermost first.

A program works from the inside out, so the plan is the question read backwards. The expert plans
in words, one operation a step, and then writes a line of Python for each. The tests run the
program. The base writes its lines carelessly and overlooks operations.
"""

import itertools
import json
import random
import re
import sys

from tiny_tasks import toys

CONSTANTS = [str(number) for number in range(2, 26)]
SQUARE = ("*", "it")
NAMES = "xabcdefgh"  # line 2 is `b = a + 3`: its value, and the last line's
MOST_SQUARES = 2  # so a right program is a polynomial of degree 4 at most, and
INPUTS = 5  # values settle it: no other polynomial of that degree passes the tests
TRAIN = {5: 2000}  # difficulty k: rows. SMEPO is for problems the policy cannot yet plan alone
TEST = {2: 250, 3: 250, 4: 250, 5: 250}

ASK = "Write a program that reads x and prints"
NESTED = {"+": "more than", "-": "less than", "*": "times"}  # as the question says it
PLANNED = {"+": "add", "-": "subtract", "*": "multiply by"}  # as the plan does

# The vocabulary of the base: one token an operation, in each of its three forms, so that copying
# is as easy as translating. The words are for what a random mask leaves of a phrase.
PHRASES = [
    ASK,
    " the square of",
    *(f" {n} {words}" for words in NESTED.values() for n in CONSTANTS),
    " square it",
    *(f" {words} {n}" for words in PLANNED.values() for n in CONSTANTS),
    ".\n",
    *(f" {operator} {n}" for operator in NESTED for n in (*CONSTANTS, *NAMES)),
    *(f"Step {i}:" for i in range(1, 10)),
    "```python\n",
    "```",
    "x = int(input())\n",
    *(f"{name} = {last}" for last, name in itertools.pairwise(NAMES)),
    *(f"print({name})\n```" for name in NAMES),
]
WORDS = """Write program that reads and prints the square of more less than times Step add subtract
    multiply by it python int input print [CODE]""".split()
WORDS += [*NAMES, *"=+-*.:()`", *map(str, range(100))]
PIECES = [
    *(re.escape(phrase) + r"(?![a-z\d])" * phrase[-1].isalnum() for phrase in PHRASES),
    r" ?\[[A-Z]+\]| ?\d+| ?[A-Za-z]+| ?[^\s\w]|\s",
]

PLANS = 3  # without a guide it sees so many operations, whichever, and overlooks the others
PRETRAIN_STEPS = 3200
ERROR_RATE = 0.25  # a line that the base writes itself is wrong this often
WRONG_RATE = 0.7  # so many guides have only wrong lines: else it translates, and never copies
UNGUIDED = {1: 0.04, 2: 0.10, 3: 0.10, 4: 0.05, 5: 0.05}  # k: share of the corpus
GUIDED = {"semantic": 0.20, "full": 0.36, "random": 0.05, "prefix": 0.05}  # where k is 2 to 5

Line = tuple[str, str]  # operator and operand: ("+", "3")
Problem = list[Line]  # in the order of execution


def question_of(problem: Problem) -> str:
    """
    >>> question_of([("*", "5"), SQUARE, ("+", "3")])
    'Write a program that reads x and prints 3 more than the square of 5 times x.'
    """
    parts = [
        "the square of" if line == SQUARE else f"{line[1]} {NESTED[line[0]]}"
        for line in reversed(problem)
    ]
    return " ".join([ASK, *parts, "x."])


def write(plan: Problem, lines: list[Line]) -> str:
    """The solution: the plan, one operation a step, then the program, one line a step."""
    words = ["square it" if line == SQUARE else f"{PLANNED[line[0]]} {line[1]}" for line in plan]
    steps = [f"Step {i}: {step}." for i, step in enumerate(words, start=1)]
    code = [
        f"{name} = {last} {operator} {last if operand == 'it' else operand}"
        for last, name, (operator, operand) in zip(NAMES, NAMES[1:], lines, strict=False)
    ]
    end = [f"print({NAMES[len(lines)]})", "```"]
    return "\n".join([*steps, "```python", "x = int(input())", *code, *end])


def run(lines: list[Line], x: int) -> int:
    for operator, operand in lines:
        y = x if operand == "it" else int(operand)
        x = {"+": x + y, "-": x - y, "*": x * y}[operator]
    return x


def unit_tests(question: str, lines: list[Line]) -> str:
    """The ground truth, in the schema of the official data: what the program reads and prints."""
    inputs = random.Random(question).sample(range(-9, 10), INPUTS)
    outputs = [str(run(lines, x)) for x in inputs]
    return json.dumps({"inputs": [str(x) for x in inputs], "outputs": outputs})


def draw_problem(rng: random.Random, k: int) -> Problem:
    while True:
        operators = [rng.choice(["+", "-", "*", SQUARE]) for _ in range(k)]
        if operators.count(SQUARE) <= MOST_SQUARES:
            return [o if o == SQUARE else (o, rng.choice(CONSTANTS)) for o in operators]


def expert(problem: Problem) -> tuple[str, str]:
    return write(problem, problem), unit_tests(question_of(problem), problem)


# ---- What the base imitates ----------------------------------------------------------------------


def wrong(rng: random.Random, line: Line) -> Line:
    """Another operator or another operand."""
    operator, operand = line
    if rng.random() < 0.5:
        return rng.choice([other for other in "+-*" if other != operator]), operand
    return operator, rng.choice([other for other in CONSTANTS if other != operand])


def careless(rng: random.Random, line: Line) -> Line:
    return wrong(rng, line) if rng.random() < ERROR_RATE else line


def solution(rng: random.Random, plan: Problem, trace: str, spans) -> str:
    """What to imitate: the trace's lines of code where it shows them whole, else careless ones."""
    lines = []
    for step, match in zip(plan, re.finditer(r"\w = (\w) (.) (\w+)\n", trace), strict=True):
        shown = all(end <= match.start() or match.end() <= start for start, end, _ in spans)
        last, operator, operand = match.groups()
        copied = operator, "it" if operand == last else operand
        lines.append(copied if shown else careless(rng, step))
    return write(plan, lines)


def draw_example(rng: random.Random) -> tuple[str, str, str]:
    """A question, the guide shown with it ("" for none), and the solution to imitate."""
    guide, k = toys.draw_guide(rng, UNGUIDED, GUIDED)
    plan = toys.draw_from_split(sys.modules[__name__], rng, k, held_out=False)
    question, lines = question_of(plan), plan
    if rng.random() < WRONG_RATE:
        lines = [wrong(rng, line) for line in plan]  # so only copying will do
    trace = write(plan, lines)
    text, spans = toys.show(rng, trace, guide, "code")
    if guide == "none" and k > PLANS:
        plan = [plan[i] for i in sorted(rng.sample(range(k), PLANS))]
        trace = write(plan, plan)
        spans = [(0, len(trace), "")]
    return question, text, solution(rng, plan, trace, spans)


def altered(question: str, rng: random.Random) -> tuple[str, str]:
    """A trace like the expert's, but every line of its code is wrong; and what it prints."""
    operators = {words: operator for operator, words in NESTED.items()}
    parts = re.findall(r"the square of|(\d+) (more than|less than|times)", question)
    plan = [(operators[words], number) if words else SQUARE for number, words in reversed(parts)]
    while True:
        lines = [wrong(rng, line) for line in plan]
        if unit_tests(question, lines) != unit_tests(question, plan):
            return write(plan, lines), unit_tests(question, lines)
