"""Math with the verifier of the package math-verify: units, intervals, sets, 2(x+1) = 2x+2.

`python smepo.py --domain tiny_tasks.math_verify`. The model of "your reward": what is hidden stays
that of smepo.py, only what is paid changes.
"""

import logging

import math_verify  # pip install math-verify

import smepo

logging.getLogger("math_verify").setLevel(logging.ERROR)  # that there is no time limit, each time


def rewards(texts: list[str], truths: list[str]) -> list[float]:
    """Without time limits: these use signals, which only the main thread gets."""
    results = []
    for text, truth in zip(texts, truths, strict=True):
        gold = math_verify.parse(f"${truth}$", parsing_timeout=None)
        given = math_verify.parse(text, parsing_timeout=None)
        results.append(float(math_verify.verify(gold, given, timeout_seconds=None)))
    return results


DOMAIN = smepo.Domain(spans=smepo.math_spans, leaks=smepo.math_leaks, rewards=rewards)
