"""What the tasks share: a split that needs no list, rows in the official schema.

A task has a module `tiny_tasks/<task>/toy.py` with these names. A problem is whatever it likes.

    TRAIN, TEST                     {difficulty k: number of problems}
    draw_problem(rng, k)            a problem of difficulty k
    question_of(problem)            its text
    expert(problem)                 (expert trace, ground truth)
    draw_example(rng)               (question, guide shown or "", solution to imitate): pretraining
    FILES                           {name: rows} of other files, where the task needs any
    PRETRAIN_STEPS                  batches that its base is trained on
    altered(question, rng)          where there is one: a wrong trace, and its ground truth
    PHRASES, WORDS, PIECES          the vocabulary of the base: whole phrases, words, how to split
"""

import argparse
import json
import random
import sys
import zlib
from importlib import import_module

import smepo

TASKS = ("arithmetic", "code", "search")


def at_least_1(text: str) -> int:
    """The type of a flag."""
    if int(text) < 1:
        raise ValueError
    return int(text)


class Parser(argparse.ArgumentParser):
    """Flags by their full names; what is wrong with them is one line, as of all bad input."""

    def __init__(self, prog: str, about: str):
        super().__init__(prog, description=about, allow_abbrev=False)

    def error(self, message: str):
        raise smepo.UserError(f"{self.prog}: {message}")


def command(main) -> int:
    """The exit code of a script: bad input is said in one line."""
    sys.stdout.reconfigure(errors="replace")  # a Windows pipe may not know every sign
    try:
        main()
    except (smepo.UserError, argparse.ArgumentError, OSError) as error:
        print(str(error).partition("\n")[0], file=sys.stderr)
        return 2
    return 0


def find(task: str):
    """The toy.py of a task: arithmetic, code or search."""
    return import_module(f"tiny_tasks.{task}.toy")


def is_held_out(question: str) -> bool:
    """One problem in three is never trained on, by a checksum of its text: no list to keep."""
    return zlib.crc32(question.encode()) % 3 == 0


def draw_from_split(toy, rng: random.Random, k: int, held_out: bool):
    """A problem of difficulty k from the held-out third or from the rest."""
    while True:
        problem = toy.draw_problem(rng, k)
        if is_held_out(toy.question_of(problem)) == held_out:
            return problem


def draw_guide(rng: random.Random, unguided: dict, guided: dict) -> tuple[str, int]:
    """The guide of an example and its k, by {k: share} and {guide: share}."""
    (drawn,) = rng.choices([*unguided, *guided], [*unguided.values(), *guided.values()])
    if drawn in guided:
        return drawn, rng.randint(2, 5)
    return "none", drawn


def show(rng: random.Random, trace: str, guide: str, domain: str) -> tuple[str, list]:
    """What a guide shows of a trace, and the spans of the trace that it hides."""
    seed, ratio = str(rng.random()), rng.random()
    text = smepo.guide_trace(trace, guide, domain, prefix_ratio=ratio, seed=seed)
    if guide in ("none", "prefix", "full"):  # all that comes after it
        return text, [(len(text), len(trace), "")]
    spans = smepo.hidden_spans(trace, domain)
    return text, smepo.random_spans(trace, spans, seed) if guide == "random" else spans


def draw_rows(toy, seed: int, counts: dict[int, int], held_out: bool) -> list[dict]:
    """Distinct rows in the schema of the official SMEPO data, plus `difficulty`."""
    rng, rows = random.Random(seed), {}
    for k, count in counts.items():
        wanted = len(rows) + count
        while len(rows) < wanted:
            problem = draw_from_split(toy, rng, k, held_out)
            question = toy.question_of(problem)
            trace, truth = toy.expert(problem)
            rows[question] = {
                "question": question,
                "reward_model": {"style": "rule", "ground_truth": truth},
                "teacher_ds": trace,
                "difficulty": k,
            }
    return list(rows.values())


def to_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
