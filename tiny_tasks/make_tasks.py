"""Write the toy datasets, byte for byte the same from the same seed.

    python tiny_tasks/make_tasks.py            # rewrite the jsonl files beside this script
    python tiny_tasks/make_tasks.py --check    # change nothing; exit 1 if a file differs

A problem with k operations reads `Compute 7 - 6 + 3 * 5`. Its operands are 1..9, `*` binds first,
and every intermediate value lies in 0..50. The expert solves it one operation a line.
"""

import argparse
import json
import os
import random
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
LARGEST = 50  # no intermediate value is larger, and none is negative
TRAIN = {5: 2000}  # difficulty k: rows. SMEPO is for problems the policy cannot yet plan alone
TEST = {2: 250, 3: 250, 4: 250, 5: 250}


def apply_operator(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def next_operation(operators: list[str]) -> int:
    """The index of the operation to do first: the leftmost `*`, else the leftmost of all."""
    return operators.index("*") if "*" in operators else 0


def solve(numbers: list[int], operators: list[str], result_of=apply_operator):
    """The worked solution and its answer, or None where a value leaves 0..LARGEST.

    `result_of` may make mistakes; the value it returns is carried on (pretrain.py uses that).
    >>> solve([7, 6, 2], ["-", "*"])  # 7 - 6 * 2 would be negative
    >>> solve([9, 2, 3], ["-", "*"])
    ('Step 1: 2 * 3 = 6.\\nStep 2: 9 - 6 = 3.\\nThe answer is 3.', 3)
    """
    numbers, operators, lines = list(numbers), list(operators), []
    while operators:
        at = next_operation(operators)
        left, operator, right = numbers[at], operators.pop(at), numbers.pop(at + 1)
        numbers[at] = result = result_of(left, operator, right)
        if not 0 <= result <= LARGEST:
            return None
        lines.append(f"Step {len(lines) + 1}: {left} {operator} {right} = {result}.")
    return "\n".join([*lines, f"The answer is {numbers[0]}."]), numbers[0]


def question_of(numbers: list[int], operators: list[str]) -> str:
    pairs = zip(operators, numbers[1:], strict=True)
    return f"Compute {numbers[0]}" + "".join(f" {operator} {number}" for operator, number in pairs)


def is_held_out(question: str) -> bool:
    """One problem in three is never trained on, by a checksum of its text: no list to keep."""
    return zlib.crc32(question.encode()) % 3 == 0


def draw_problem(rng: random.Random, k: int, held_out: bool) -> tuple[list[int], list[str]]:
    """A solvable problem with k operations from the held-out third or from the rest."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(k + 1)]
        operators = [rng.choice("+-*") for _ in range(k)]
        if is_held_out(question_of(numbers, operators)) == held_out and solve(numbers, operators):
            return numbers, operators


def draw_rows(seed: int, counts: dict[int, int], held_out: bool) -> list[dict]:
    """Distinct rows in the schema of the official SMEPO data, plus `difficulty`."""
    rng, rows = random.Random(seed), {}
    for k, count in counts.items():
        wanted = len(rows) + count
        while len(rows) < wanted:
            numbers, operators = draw_problem(rng, k, held_out)
            question = question_of(numbers, operators)
            trace, answer = solve(numbers, operators)
            rows[question] = {
                "question": question,
                "reward_model": {"style": "rule", "ground_truth": str(answer)},
                "teacher_ds": trace,
                "difficulty": k,
            }
    return list(rows.values())


def to_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = {
        "arithmetic_train.jsonl": draw_rows(arguments.seed, TRAIN, held_out=False),
        "arithmetic_test.jsonl": draw_rows(arguments.seed + 1, TEST, held_out=True),
    }
    stale = []
    for name, rows in files.items():
        path = HERE / name
        text = to_jsonl(rows)
        if path.exists() and path.read_bytes() == text:
            continue
        stale.append(name)
        if not arguments.check:
            path.with_suffix(".tmp").write_bytes(text)
            os.replace(path.with_suffix(".tmp"), path)
    if arguments.check:
        print(f"differ: {', '.join(stale)}" if stale else "all files are as the seed makes them")
        return 1 if stale else 0
    print(f"wrote {', '.join(stale)}" if stale else "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
