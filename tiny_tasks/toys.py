"""What the toys share: a split that needs no list, rows in the official schema, sloppiness.

A toy is a module with these names. A problem is whatever the module likes.

    TRAIN, TEST                     {difficulty k: number of problems}
    draw_problem(rng, k)            a problem of difficulty k
    question_of(problem)            its text
    expert(problem)                 (expert trace, ground truth)
    draw_example(rng)               (question, guide shown or "", solution to imitate): pretraining
    FILES                           {name: rows} of other files, where the toy needs any
    PRETRAIN_STEPS                  batches that its base is trained on
    altered(question, rng)          where there is one: a wrong trace, and its ground truth
    PHRASES, WORDS, PIECES          the vocabulary of the base: whole phrases, words, how to split
"""

import json
import random
import zlib

ERROR_RATE = 0.25  # a value that the base writes itself is wrong this often
WRONG_RATE = 0.5  # so many guides are careless themselves: what is shown is copied, not checked


def is_held_out(question: str) -> bool:
    """One problem in three is never trained on, by a checksum of its text: no list to keep."""
    return zlib.crc32(question.encode()) % 3 == 0


def draw_from_split(toy, rng: random.Random, k: int, held_out: bool):
    """A problem of difficulty k from the held-out third or from the rest."""
    while True:
        problem = toy.draw_problem(rng, k)
        if is_held_out(toy.question_of(problem)) == held_out:
            return problem


def draw_rows(toy, seed: int, counts: dict[int, int], held_out: bool) -> list[dict]:
    """Distinct rows in the schema of the official SMEPO data, plus `difficulty`."""
    rng, rows = random.Random(seed), {}
    for k, count in counts.items():
        wanted = len(rows) + count
        while len(rows) < wanted:
            problem = draw_from_split(toy, rng, k, held_out)
            trace, truth = toy.expert(problem)
            rows[toy.question_of(problem)] = {
                "question": toy.question_of(problem),
                "reward_model": {"style": "rule", "ground_truth": truth},
                "teacher_ds": trace,
                "difficulty": k,
            }
    return list(rows.values())


def to_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
