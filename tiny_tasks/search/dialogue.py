"""Agentic search: the rollout of a dialogue, and the environment that answers its queries.

The policy writes <search>capital of Norland</search>, the environment appends
<information>Ostby</information>, and so on until the policy writes its <answer>...</answer>.
"""

import json
import re
from bisect import bisect_left
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from smepo import UserError, sample

MAX_TURNS = 8  # searches that a rollout may make
KNOWLEDGE = Path(__file__).parent / "knowledge.jsonl"  # what a search finds
TOLD = re.compile(r"\n?<information>[^<]*</information>\n?")  # the environment's part of a dialogue


@lru_cache
def load_knowledge(path: Path) -> dict[str, str]:
    """{"capital of norway": "Oslo"}"""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {f"{r['relation']} of {r['entity']}".casefold(): str(r["value"]) for r in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no jsonl of entity, relation, value: {error!r}") from error


def look_up(text: str) -> str:
    """What the environment says to <search>capital of Norway</search>: nothing, if it is unclear
    or unknown. This is the place for a real search engine."""
    query = re.search(r"<search>([^<]*)</search>", text)
    found = ""
    if query:
        asked = " ".join(query[1].split()).casefold()
        found = load_knowledge(KNOWLEDGE).get(asked, "")
    new_line = "" if text.endswith("\n") else "\n"
    return f"{new_line}<information>{found}</information>\n"


def has_asked(tokenizer, start: int, ids: Tensor, scores, **_) -> Tensor:
    """Which rows of generate now end in </search>: at most 9 tokens, one a letter. (N,)"""
    start = max(start, ids.shape[1] - 9)
    texts = tokenizer.batch_decode(ids[:, start:])
    return torch.tensor(["</search>" in text for text in texts], device=ids.device)


def until_asked(ids: list[int], tokenizer) -> list[int]:
    """Up to the end of the first </search>. The last token kept may hold more than that."""

    def asks(count: int) -> bool:
        return "</search>" in tokenizer.decode(ids[:count])

    return ids[: bisect_left(range(len(ids) + 1), True, key=asks)]


def speak(model, tokenizer, prompts: list[list[int]], config) -> list[list[int]]:
    """One turn of every row: `sample`, which also ends with the first </search>."""
    start = max(map(len, prompts), default=0)
    asked = partial(has_asked, tokenizer, start)
    rows = sample(model, prompts, config, [asked])
    return [until_asked(row, tokenizer) for row in rows]


def converse(model, tokenizer, prompts: list[list[int]], config):
    """A rollout of each prompt, as lists of ids, each query followed by what the environment told;
    and their marks, 1 for a sampled token, 0 for a told one: that is context, without loss."""
    rows = speak(model, tokenizer, prompts, config)
    marks = [[1] * len(row) for row in rows]
    said = dict(enumerate(rows))  # what each row said in its last turn
    for _ in range(MAX_TURNS):
        asked = {}
        for i, ids in said.items():
            text = tokenizer.decode(ids)
            if "</search>" in text and sum(marks[i]) < config.max_new_tokens:
                asked[i] = text
        if not asked:
            break
        told = [look_up(text) for text in asked.values()]
        told_ids = tokenizer(told, add_special_tokens=False)["input_ids"]
        for i, ids in zip(asked, told_ids, strict=True):
            rows[i] = rows[i] + ids  # the sampled ids stay as they were sampled
            marks[i] = marks[i] + [0] * len(ids)
        contexts = [prompts[i] + rows[i] for i in asked]
        turns = speak(model, tokenizer, contexts, config)
        said = dict(zip(asked, turns, strict=True))
        for i, ids in said.items():
            del ids[config.max_new_tokens - sum(marks[i]) :]  # the limit is on all turns together
            rows[i] = rows[i] + ids
            marks[i] = marks[i] + [1] * len(ids)
    return rows, marks
