"""A domain that pays in parts: 0.2 for an answer that is a number, 1 for the right one.

`python smepo.py --domain tiny_tasks.arithmetic.parts`. What counts as solved is said apart: 1.
"""

import smepo


def rewards(texts: list[str], truths: list[str]) -> list[float]:
    paid = []
    for text, right in zip(texts, smepo.math_rewards(texts, truths), strict=True):
        states_a_number = smepo.number_value(smepo.stated(text)) is not None
        paid.append(max(right, 0.2 * states_a_number))
    return paid


DOMAIN = smepo.Domain(smepo.math_spans, smepo.math_leaks, rewards, solved_from=1.0)
