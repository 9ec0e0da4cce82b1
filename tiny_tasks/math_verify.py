"""Math with the verifier of the package math-verify: units, intervals, sets, 2(x+1) = 2x+2.

`python smepo.py --domain tiny_tasks.math_verify`. The model of "your reward": what is hidden stays
that of smepo.py, only what is paid changes.
"""

import logging
import threading

import math_verify  # pip install math-verify

import smepo

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # each time limit, each odd text


def rewards(texts: list[str], truths: list[str]) -> list[float]:
    """Of the last answer that a text states: the package would read any number in it."""
    seconds = 2  # for 9^{9^{9}} has no end; it is a signal, which only the main thread gets
    if threading.current_thread() is not threading.main_thread():
        seconds = None
    paid = []
    for text, truth in zip(texts, truths, strict=True):
        gold = math_verify.parse(f"${truth}$", parsing_timeout=seconds)
        given = math_verify.parse(f"${smepo.stated(text)}$", parsing_timeout=seconds)
        paid.append(float(math_verify.verify(gold, given, timeout_seconds=seconds)))
    return paid


DOMAIN = smepo.Domain(spans=smepo.math_spans, leaks=smepo.math_leaks, rewards=rewards)
