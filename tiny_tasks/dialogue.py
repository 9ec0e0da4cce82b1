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

import smepo
from tiny_tasks.files import UserError

@lru_cache
def load_knowledge(path: str) -> dict[str, str]:
    """{"capital of norway": "Oslo"}"""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return {f"{r['relation']} of {r['entity']}".casefold(): str(r["value"]) for r in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no jsonl of entity, relation, value: {error!r}") from error

def look_up(text: str, path: str) -> str:
    """What the environment says to <search>capital of Norway</search>: nothing, if it is unclear
    or unknown. This is the place for a real search engine."""
    query = re.search(r"<search>([^<]*)</search>", text)
    found = load_knowledge(path).get(" ".join(query[1].split()).casefold(), "") if query else ""
    return "\n" * (not text.endswith("\n")) + f"<information>{found}</information>\n"

def has_asked(tokenizer, start: int, ids: Tensor, scores, **_) -> Tensor:
    """Which rows of generate now end in </search>: at most 9 tokens, one a letter. (N,)"""
    texts = tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - 9) :])
    return torch.tensor(["</search>" in text for text in texts], device=ids.device)

def until_asked(ids: smepo.Ids, tokenizer) -> smepo.Ids:
    """The last token kept may hold more than the tag's end."""
    return ids[: bisect_left(range(len(ids) + 1), True,
                             key=lambda t: "</search>" in tokenizer.decode(ids[:t]))]

def speak(model, tokenizer, prompts: list[smepo.Ids], group_size: int, config) -> list[smepo.Ids]:
    """One turn of every row: `sample`, which also ends with the first </search>."""
    asked = partial(has_asked, tokenizer, max(map(len, prompts)))
    rows = smepo.sample(model, tokenizer, prompts, group_size, config, [asked])
    return [until_asked(row, tokenizer) for row in rows]

def converse(model, tokenizer, prompts: list[smepo.Ids], group_size: int, config):
    """The rollouts, B*G lists of ids, each query followed by what the environment told; and their
    marks, 1 for a sampled token, 0 for a told one: that is context, without loss or length."""
    rows = speak(model, tokenizer, prompts, group_size, config)
    marks = [[1] * len(row) for row in rows]
    turn = dict(enumerate(rows))  # what each row just said
    for _ in range(config.max_turns):
        texts = {i: tokenizer.decode(ids) for i, ids in turn.items()
                 if sum(marks[i]) < config.max_new_tokens}
        asked = {i: text for i, text in texts.items() if "</search>" in text}
        if not asked:
            break
        told = [look_up(text, config.knowledge) for text in asked.values()]
        told = tokenizer(told, add_special_tokens=False)["input_ids"]
        for i, ids in zip(asked, told, strict=True):  # the sampled ids stay as they were sampled
            rows[i], marks[i] = rows[i] + ids, marks[i] + [0] * len(ids)
        contexts = [prompts[i // group_size] + rows[i] for i in asked]
        turn = dict(zip(asked, speak(model, tokenizer, contexts, 1, config), strict=True))
        for i, ids in turn.items():
            del ids[config.max_new_tokens - sum(marks[i]) :]
            rows[i], marks[i] = rows[i] + ids, marks[i] + [1] * len(ids)
    return rows, marks
