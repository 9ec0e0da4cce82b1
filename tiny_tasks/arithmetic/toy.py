"""Arithmetic: `Compute 7 - 6 + 3 * 5` has k = 3 operations.

Its operands are 1..9, `*` binds first, and every intermediate value lies in 0..50. The expert
solves it one operation a line. The base computes carelessly and overlooks operations.
"""

import itertools
import random
import re
import sys

from tiny_tasks import toys

LARGEST = 50  # no intermediate value is larger, and none is negative
TRAIN = {3: 100, 4: 100, 5: 1800}  # difficulty k: rows. Few are easy: they keep what it has
TEST = {2: 250, 3: 250, 4: 250, 5: 250}

# The vocabulary of the base: one token a number, sign or phrase.
PHRASES = ["The answer is", "Compute", ".\n", *(f"Step {i}:" for i in range(1, 10))]
WORDS = ["Step", "The", "answer", "is", "[NUMBER]", "[ANSWER]", *"=+-*.:", *map(str, range(100))]
WORD_PIECE = r" ?\[[A-Z]+\]| ?\d+| ?[A-Za-z]+| ?[^\s\w]|\s"
PIECES = ["The answer is", r"Step \d:", r"\.\n", WORD_PIECE]

PRETRAIN_STEPS = 3500
ERROR_RATE = 0.35  # a value that the base writes itself is wrong this often
WRONG_RATE = 0.5  # so many guides are careless themselves: what is shown is copied, not checked
PLAN_RATE = {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.25, 5: 0.06}  # else operations are overlooked
LONGEST = 3  # operations that are left when some are overlooked
UNGUIDED = {1: 0.06, 2: 0.13, 3: 0.13, 4: 0.07, 5: 0.06}  # k: share of the corpus
GUIDED = {"semantic": 0.28, "full": 0.17, "random": 0.05, "prefix": 0.05}  # where k is 2 to 5

Problem = tuple[list[int], list[str]]  # numbers, and the operators between them


def apply_operator(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def solve(problem: Problem, result_of=apply_operator) -> tuple[str, str] | None:
    """The worked solution and its answer, or None where a value leaves 0..LARGEST.

    `result_of` may make mistakes; the value it returns is carried on.
    >>> solve(([7, 6, 2], ["-", "*"]))  # 7 - 6 * 2 would be negative
    >>> solve(([9, 2, 3], ["-", "*"]))
    ('Step 1: 2 * 3 = 6.\\nStep 2: 9 - 6 = 3.\\nThe answer is 3.', '3')
    """
    numbers, operators = map(list, problem)
    lines = []
    while operators:
        at = operators.index("*") if "*" in operators else 0  # the leftmost `*` first
        left, operator, right = numbers[at], operators.pop(at), numbers.pop(at + 1)
        numbers[at] = result = result_of(left, operator, right)
        if not 0 <= result <= LARGEST:
            return None
        lines.append(f"Step {len(lines) + 1}: {left} {operator} {right} = {result}.")
    return "\n".join([*lines, f"The answer is {numbers[0]}."]), str(numbers[0])


expert = solve  # the name that toys.py asks for


def question_of(problem: Problem) -> str:
    numbers, operators = problem
    pairs = zip(operators, numbers[1:], strict=True)
    return f"Compute {numbers[0]}" + "".join(f" {operator} {number}" for operator, number in pairs)


def draw_problem(rng: random.Random, k: int) -> Problem:
    """k operations that never leave 0..LARGEST."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(k + 1)]
        operators = [rng.choice("+-*") for _ in range(k)]
        if solve((numbers, operators)):
            return numbers, operators


# ---- What the base imitates ----------------------------------------------------------------------


def careless(rng: random.Random, left: int, operator: str, right: int) -> int:
    """The result of an operation, wrong at ERROR_RATE and wherever it would leave the range."""
    result = apply_operator(left, operator, right)
    if rng.random() < ERROR_RATE or not 0 <= result <= LARGEST:
        return rng.choice([value for value in range(LARGEST + 1) if value != result])
    return result


def solution(rng: random.Random, problem: Problem, trace: str, spans) -> str:
    """What to imitate: the trace's results where it shows them, else careless ones, carried on."""
    shown = []
    for match in re.finditer(r"(?:=|is) (\d+)\.", trace):
        hidden = any(a <= match.start(1) < b for a, b, _ in spans)
        shown.append(None if hidden else int(match[1]))
    step = iter(shown)

    def result_of(*operation) -> int:
        copied = next(step)
        return careless(rng, *operation) if copied is None else copied

    text, _ = solve(problem, result_of)
    return text if shown[-1] is None else re.sub(r"is \d+\.$", f"is {shown[-1]}.", text)


def overlook(rng: random.Random, problem: Problem) -> Problem:
    """The problem with only LONGEST of its operations left: how the base fails to plan."""
    numbers, operators = problem
    choices = list(itertools.combinations(range(len(operators)), LONGEST))
    for kept in rng.sample(choices, len(choices)):
        fewer = [numbers[0]] + [numbers[i + 1] for i in kept], [operators[i] for i in kept]
        if solve(fewer):
            return fewer
    return problem  # whatever is left out, a value leaves the range


def draw_example(rng: random.Random) -> tuple[str, str, str]:
    """A question, the guide shown with it ("" for none), and the solution to imitate."""
    guide, k = toys.draw_guide(rng, UNGUIDED, GUIDED)
    problem = toys.draw_from_split(sys.modules[__name__], rng, k, held_out=False)
    question, (trace, _) = question_of(problem), solve(problem)
    if rng.random() < WRONG_RATE:
        trace, _ = solve(problem, lambda *operation: careless(rng, *operation))
    text, spans = toys.show(rng, trace, guide, "math")
    if guide == "none" and rng.random() > PLAN_RATE[k]:
        problem = overlook(rng, problem)
        trace, _ = solve(problem)
        spans = [(0, len(trace), "")]
    return question, text, solution(rng, problem, trace, spans)


def altered(question: str, rng: random.Random) -> tuple[str, str]:
    """A trace like the expert's, but its results are wrong and carried on; and its answer."""
    problem = list(map(int, re.findall(r"\d+", question))), re.findall("[-+*]", question)

    def slip(*operation) -> int:
        return rng.choice((-3, -2, -1, 1, 2, 3)) + apply_operator(*operation)

    while True:
        wrong = solve(problem, slip)
        if wrong and wrong[1] != solve(problem)[1]:
            return wrong
