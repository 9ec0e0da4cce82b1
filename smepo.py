"""SMEPO, Semantic Masked Expert Policy Optimization (arXiv 2605.25198), in one file.

The problem: reinforcement learning with verifiable rewards stalls where all rollouts of a
group fail, for then every advantage is 0. An expert's solution in the prompt helps, but it
shows what the verifier checks: the policy copies it, the reward rises to 1, and without it
nothing was learned. The idea: show the solution, but hide the spans that the reward depends
on (in math, the numbers).

    question x   Compute 7 - 6 + 3 * 5
    trace t      Step 1: 3 * 5 = 15.                      Step 2: 7 - 6 = 1.
    shown        Step 1: [NUMBER] * [NUMBER] = [NUMBER].  Step 2: [NUMBER] - ...

The policy follows the plan but must reconstruct every value. All else is on-policy GRPO, only
with another prompt c, and the evaluation shows no trace. Each line is a function below:

    context    c = x + mask(t)                                    guide_trace, build_prompt
    rollouts   o_1..o_G ~ pi_old(. | c)                           rollout
    reward     r_i = verifier(o_i, a) in {0, 1}                   reward
    advantage  A_i = (r_i - mean r) / (std r + eps)               group_advantages
    ratio      rho_t = pi(o_t | c, o_<t) / pi_old(o_t | c, o_<t)  token_logprobs
    loss       -1/(BG) sum_i 1/|o_i| sum_t min(rho A, clip(rho, 1-low, 1+high) A)
                                                                  policy_loss
Shapes: B problems, G rollouts of each, N rows (B*G or some of them), P prompt tokens,
T completion tokens, V words in the vocabulary.
Run `python smepo.py` to see it learn on a laptop, `--guide none` for GRPO, `--help` for more.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tqdm import tqdm

HELP_OR_MASK = __name__ == "__main__" and sys.argv[1:2] in (["--help"], ["mask"])
if not HELP_OR_MASK:  # these imports take seconds, and those two answer without
    import torch
    from torch import Tensor
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

Ids = list[int]  # token ids


class UserError(Exception):
    """Bad input, in one line: what is wrong and how to mend it. `main` exits with code 2."""


@contextmanager
def blaming(what: str):
    """Whatever a library raises in here is said in one line."""
    try:
        yield
    except Exception as error:
        # what `datasets` raises wraps the real reason
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UserError(f"{what}: {reason}".rstrip(": ")) from error


# ---- Config: every field is a flag, and the comment behind it is its help --------

HERE = Path(__file__).resolve().parent
# a task, which is also the name of its domain, except for arithmetic: its room in tiny_tasks/
TOYS = {"arithmetic": "arithmetic", "code": "coding", "search": "searching"}


@dataclass
class Config:
    guide: Literal["none", "full", "prefix", "random", "semantic"] = "semantic"  # what is shown
    task: Literal["arithmetic", "code", "search"] = "arithmetic"  # a toy with its model
    model: str | None = None  # the base model, a Hugging Face folder or hub id
    data: str | None = None  # training problems: jsonl, parquet, folder, hub/id:subset
    steps: int = 60  # rollout batches to train on (paper: 400-500)
    test_data: str | None = None  # held-out problems, asked unguided
    columns: list[str] = field(default_factory=list)  # question=A trace=B answer=C
    domain: str | None = None  # what is hidden: math, code, search or your module
    system: str | None = None  # system prompt; default: that of a given --domain
    name: str | None = None  # the run is written to runs/NAME/, by default what it is
    resume: bool = False  # continue the run in runs/NAME/, by default the latest
    guide_when: str = "always"  # always, on-failure or a fraction of the prompts
    prefix_ratio: float = 0.5  # the part of the trace that guide=prefix shows
    prompts_per_step: int = 16  # B, problems in a rollout batch (paper: 32)
    group_size: int = 8  # G, rollouts of each problem (paper: 8)
    mini_batches: int = 1  # optimizer steps in a batch (paper: 4); at 1 no ratio moves
    micro_batch: int = 128  # rollouts in a forward pass; out of memory? halve it
    generate_batch: int = 512  # rows in a call of generate; this bounds its memory
    learning_rate: float = 2e-4  # of AdamW (paper, 8B parameters: 1e-6)
    grad_clip: float = 1.0  # largest gradient norm
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: float = 0.28  # and above at 1 + clip_high, so that rare tokens can grow
    advantage_scale: Literal["std", "none"] = "std"  # none: Dr. GRPO
    aggregation: Literal["sequence", "token"] = "sequence"  # what the loss averages
    expert_coef: float = 0.0  # weight of masked_expert_loss; the paper has no such term
    temperature: float = 1.0  # of sampling and scoring alike (paper: 0.8)
    max_prompt_tokens: int = 256  # problems with a longer prompt are left out
    max_new_tokens: int = 64  # sampled; a rollout without an end by then earns 0
    eval_every: int = 20  # steps between points of the accuracy curve
    eval_samples: int = 4  # samples of each test problem
    save_every: int = 10  # steps between checkpoints
    seed: int = 0  # same seed, same machine, same result
    device: str = "auto"  # auto, cpu, cuda or mps
    threads: int = 1  # CPU threads; more help a model larger than the toy's

    def __post_init__(self):
        least = {"seed": 0, "group_size": 2, "temperature": 0.01}
        most = {"prefix_ratio": 1, "clip_low": 1}
        for name, value in asdict(self).items():
            if type(value) in (int, float):
                whole = type(getattr(Config, name)) is int  # counts start at 1, rates at 0
                low = least.get(name, 1 if whole else 0)
                high = most.get(name, 2**31)
                inside = low <= value <= high  # nan is not
                self.require(inside, name, f"from {low} to {high}")
        when = r"always|on-failure|0?\.\d+|[01](\.0*)?"
        rule = "always, on-failure or a fraction from 0 to 1"
        self.require(re.fullmatch(when, self.guide_when), "guide_when", rule)
        plain_name = re.fullmatch(r"[\w.-]*\w", self.name or "default")
        self.require(plain_name, "name", "a plain folder name")
        divides = self.prompts_per_step % self.mini_batches == 0
        self.require(divides, "mini_batches", "a divisor of --prompts_per_step")
        # what is not given comes from the toy, which has no system prompt
        if self.system is None:
            self.system = find_domain(self.domain).system if self.domain else ""
        if self.domain is None:
            self.domain = "math" if self.task == "arithmetic" else self.task
        room = HERE / "tiny_tasks" / TOYS[self.task]
        self.model = self.model or str(room / "base")
        self.data = self.data or str(room / "train.jsonl")
        self.test_data = self.test_data or str(room / "test.jsonl")

    def require(self, holds, name: str, rule: str):
        if not holds:
            raise UserError(f"--{name} {getattr(self, name)}: it must be {rule}")


# ---- The guide: what the policy is shown of the expert's trace -------------------

Span = tuple[int, int, str]  # start, end, and the mask shown instead


@dataclass
class Domain:
    """What the verifier reads is what the mask must hide: both stand in one file."""

    system: str  # the system prompt: it says how to state an answer
    spans: Callable  # (trace, answer) -> list[Span]: what the reward depends on
    leaks: Callable  # (masked, answer) -> bool: can the answer still be read off?
    rewards: Callable  # (completions, truths) -> list[float]: 1.0 if right, else 0.0
    check: Callable = str  # (truth): raises where it cannot be read; str reads anything
    converse: Callable | None = None  # rollouts of several turns, see searching/
    told: re.Pattern | None = None  # what the policy is told in between, and does not write


def find_domain(name: str) -> Domain:
    """Math is in this file. Any other is a module with a DOMAIN, imported when asked for."""
    if name not in DOMAINS:
        module = f"tiny_tasks.{TOYS[name]}.domain" if name in TOYS else name
        with blaming(f"--domain {name}: it must be math, code, search or a module with a DOMAIN"):
            DOMAINS[name] = import_module(module).DOMAIN
    return DOMAINS[name]


def hidden_spans(trace: str, domain: str, answer: str = "") -> list[Span]:
    """The reward-relevant spans, left to right. No `answer`: what the trace states."""
    spans: list[Span] = []
    for start, end, mask in sorted(find_domain(domain).spans(trace, answer)):
        if spans and start <= spans[-1][1]:  # they overlap or touch: one span, with the first mask
            start, last, mask = spans.pop()
            end = max(end, last)
        spans.append((start, end, mask))
    return spans


def random_spans(trace: str, spans: list[Span], seed: str) -> list[Span]:
    """As many spans, as long in words and signs, anywhere: only *where* differs."""
    piece = re.compile(r"\d+|[^\W\d]+|[^\w\s]")  # a number, a word or a sign
    pieces = [match.span() for match in piece.finditer(trace)]
    items = [(len(piece.findall(trace[start:end])), mask) for start, end, mask in spans]
    visible = len(pieces) - sum(length for length, _ in items)
    items += [(1, "")] * visible  # no mask: a piece that stays
    random.Random(seed).shuffle(items)
    chosen, rest = [], iter(pieces)
    for length, mask in items:
        taken = list(itertools.islice(rest, length))
        if mask and taken:
            chosen.append((taken[0][0], taken[-1][1], mask))
    return chosen


def replace_spans(trace: str, spans: list[Span]) -> str:
    for start, end, mask in reversed(spans):
        trace = trace[:start] + mask + trace[end:]
    return trace


def mask_trace(trace: str, domain: str, answer: str = "") -> str:
    """Hide what is rewarded, keep the plan: 'Step 1: [NUMBER] * [NUMBER] = [NUMBER].'"""
    return replace_spans(trace, hidden_spans(trace, domain, answer))


def leaks(masked: str, answer: str, domain: str) -> bool:
    """Can what the verifier checks still be read off the masked text?"""
    return find_domain(domain).leaks(masked, answer)


def guide_trace(
    trace: str, guide: str, domain: str, answer: str = "", prefix_ratio=0.5, seed=""
) -> str:
    """What is shown: none (GRPO), full, prefix (in whole lines), random, semantic (SMEPO)."""
    if guide == "none":
        return ""
    if guide == "full":
        return trace
    if guide == "prefix":
        # the last line end within that part, or -1
        line_end = f"{trace}\n".rfind("\n", 0, int(len(trace) * prefix_ratio) + 1)
        return trace[: max(0, line_end)]
    spans = hidden_spans(trace, domain, answer)
    if guide == "random":
        spans = random_spans(trace, spans, seed)
    return replace_spans(trace, spans)


def reward(completion: str, ground_truth: str, domain: str) -> float:
    return find_domain(domain).rewards([completion], [ground_truth])[0]


# ---- Problems and prompts --------------------------------------------------------


@dataclass
class Problem:
    question: str
    answer: str  # the ground truth
    trace: str  # the expert's solution, "" if there is none
    difficulty: str = "all"  # groups the evaluation
    guide: str = ""  # what the policy may be shown of the trace
    leaky: bool = False  # whether the guide gives the answer away
    question_ids: Ids | None = None  # the prompt without the guide
    guided_ids: Ids | None = None  # and with it


def build_messages(question: str, guide_text: str = "", system: str = "") -> list[dict]:
    """The guide poses as a finished assistant turn before the one to be written."""
    turns = {"system": system, "user": question}
    if guide_text:
        turns["assistant"] = "Here is an example solution:\n" + guide_text
    return [{"role": role, "content": text} for role, text in turns.items() if text]


def build_prompt(tokenizer, question: str, guide_text: str = "", system: str = "") -> str:
    messages = build_messages(question, guide_text, system)
    roles = ", ".join(message["role"] for message in messages)
    settings = {"tokenize": False, "add_generation_prompt": True}
    with blaming(f"the model's chat template refuses {roles}"):
        prompt = tokenizer.apply_chat_template(messages, **settings)
    if question.strip() not in prompt or guide_text.strip() not in prompt:
        raise UserError("the model's chat template drops a part of the question or of the guide")
    return prompt


def load_problems(path: str, guide: str, tokenizer, config: Config, split="train"):
    """The problems of a file that fit, with their prompts."""
    problems, prompts = read_problems(path, guide, config, split), []
    for p in problems:
        for text in "", p.guide:
            prompts.append(build_prompt(tokenizer, p.question, text, config.system))
    # the chat template has written the special tokens
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    for p, pair in zip(problems, chunks(ids, 2), strict=True):  # without and with the guide
        p.question_ids, p.guided_ids = pair
    fitting = [p for p in problems if len(p.guided_ids) <= config.max_prompt_tokens]
    left_out = len(problems) - len(fitting)
    if left_out:
        print(f"{path}: {left_out} prompts exceed --max_prompt_tokens and are left out")
    if not fitting:
        raise UserError(f"{path} has no prompt within --max_prompt_tokens: raise it")
    return fitting


# ---- Rollouts --------------------------------------------------------------------


@dataclass
class Rollout:
    problem: Problem
    guided: bool
    prompt_ids: Ids  # the very prompt it was sampled from: the context of the ratio
    ids: Ids  # the completion, up to and including the first EOS
    sampled: Ids  # of each of them: 1 if the policy chose it, 0 if it was told
    text: str
    ended: bool  # with an EOS; else it was cut off
    reward: float
    advantage: float = 0.0


def pad(rows: list[Ids], side: str, device) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, longest); by position, as the pad token may be the EOS, too."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    ids = pad_sequence(tensors, True, -1, side)  # -1 is no token
    return ids.clamp(min=0), (ids >= 0).long()


def until_eos(ids: Ids, eos_ids: Ids) -> Ids:
    """The first EOS was sampled and counts; generate pads what follows it."""
    for t, token in enumerate(ids):
        if token in eos_ids:
            return ids[: t + 1]
    return ids


def sample(model, tokenizer, prompts: list[Ids], config: Config, stops=None) -> list[Ids]:
    """A completion of each prompt. `stops`: stopping_criteria of generate, beside the EOS."""
    settings = GenerationConfig(  # all of them: top_k, left unset, would be 50
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = []
    for part in chunks(prompts, config.generate_batch):
        ids, mask = pad(part, "left", model.device)  # (N, P)
        inputs = {"input_ids": ids, "attention_mask": mask, "stopping_criteria": stops}
        try:
            rows = model.generate(**inputs, generation_config=settings)  # (N, P+T)
        except RuntimeError as error:  # any other is no fault of the user's
            if "probability tensor" not in str(error):  # what torch.multinomial says of nan
                raise
            message = "the model's outputs are not finite: lower --learning_rate"
            raise UserError(message) from error
        completions += rows[:, ids.shape[1] :].tolist()
    return [until_eos(row, settings.eos_token_id) for row in completions]


def rollout(model, tokenizer, problems, guided: list[bool], config: Config) -> list[Rollout]:
    """One rollout of each problem, `guided` or not. G of the same in a row are a group."""
    domain = find_domain(config.domain)
    prompts = [p.guided_ids if g else p.question_ids for p, g in zip(problems, guided, strict=True)]
    if domain.converse:
        ids, sampled = domain.converse(model, tokenizer, prompts, config)
    else:
        ids = sample(model, tokenizer, prompts, config)
        sampled = [[1] * len(row) for row in ids]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ended = [row[-1] in model.generation_config.eos_token_id for row in ids]
    # what was cut off has stated no answer
    finished = [text if end else "" for text, end in zip(texts, ended, strict=True)]
    rewards = domain.rewards(finished, [problem.answer for problem in problems])
    rows = zip(problems, guided, prompts, ids, sampled, texts, ended, rewards, strict=True)
    return [Rollout(*row) for row in rows]


def shows_guide(problem: Problem, step: int, config: Config, failed=False) -> bool:
    """When is a problem's guide shown? `failed`: all of its unguided group just did. This
    is the place for a schedule of your own: by the problem, the step or the config."""
    if config.guide_when == "always":
        return True
    if config.guide_when == "on-failure":
        return failed
    draw = random.Random(f"{config.seed} {step} {problem.question}").random()
    return draw < float(config.guide_when)


def collect_rollouts(model, tokenizer, problems: list[Problem], step: int, config: Config):
    """B*G rollouts to learn from, and how many were sampled to get them."""
    G = config.group_size
    rows = [problem for problem in problems for _ in range(G)]
    guided = [p.guide != "" and shows_guide(p, step, config) for p in rows]
    rollouts = rollout(model, tokenizer, rows, guided, config)
    again = []  # rows of the groups that get a second chance, with the guide
    for i, p in enumerate(problems):
        group = range(i * G, i * G + G)
        failed = not any(rollouts[row].reward or guided[row] for row in group)
        if failed and p.guide and shows_guide(p, step, config, failed=True):
            again += group
    second = rollout(model, tokenizer, [rows[i] for i in again], [True] * len(again), config)
    for row, r in zip(again, second, strict=True):
        rollouts[row] = r
    return rollouts, len(rows) + len(again)


# ---- Advantages, log-probs and loss, as pure functions ---------------------------


def group_advantages(rewards, group_size: int, scale="std", eps=1e-6) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps): rewards 1 0 0 0 -> 1.5 -.5 -.5 -.5. (B*G,)"""
    r = torch.as_tensor(rewards, dtype=torch.float32).view(-1, group_size)  # (B, G)
    A = r - r.mean(1, keepdim=True)  # (B, G)
    if scale == "std":
        A = A / (r.std(1, keepdim=True) + eps)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # (B, 1)
    return A.masked_fill(equal, 0.0).flatten()  # exactly 0, however the mean was rounded


def token_logprobs(
    model, input_ids: Tensor, attention_mask: Tensor, completion_length: int, temperature
) -> Tensor:
    """log pi(o_t | c, o_<t) of the last `completion_length` tokens of every row. (N, T)"""
    logits = completion_logits(model, input_ids, attention_mask, completion_length)
    logprobs = (logits.float() / temperature).log_softmax(-1)  # (N, T, V)
    tokens = input_ids[:, -completion_length:, None]  # (N, T, 1)
    return logprobs.gather(-1, tokens).squeeze(-1)  # (N, T)


def completion_logits(model, input_ids: Tensor, attention_mask: Tensor, T: int) -> Tensor:
    """model(input_ids, attention_mask, positions).logits[:, -T - 1 : -1], for those at t are
    of token t + 1. But a group's prompt is read once: that saves two fifths of an update."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # padding shifts no prompt
    inputs = torch.stack([input_ids, attention_mask, positions])[..., :-1]  # (3, N, P+T-1)
    # the last prompt token is read with the completion: its logits are of o_1
    (ids, mask, at), row = inputs[..., :-T].unique(dim=1, return_inverse=True)  # N rows to B
    settings = {"use_cache": True, "logits_to_keep": 1}
    cache = model(ids, attention_mask=mask, position_ids=at, **settings).cache
    if any("LinearAttention" in type(layer).__name__ for layer in cache.layers):
        ids, mask, at = inputs  # a recurrent state has no keys to share
        return model(ids, attention_mask=mask, position_ids=at, logits_to_keep=T).logits
    cache.batch_select_indices(row)  # each row gets the keys and values of its prompt
    ids, _, at = inputs[..., -T:]  # (N, T)
    return model(ids, attention_mask=inputs[1], position_ids=at, cache=cache).logits


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    aggregation: str = "sequence",
) -> tuple[Tensor, dict]:
    """Loss and stats of the clipped surrogate, (N, T) tokens, mask 1 if sampled, advantages
    (N,). At a batch's first update every ratio is 1 and a group's advantages sum to 0: the
    *value* is about 0, its gradient, -A * grad log pi, is not. Clipping can act from the
    second on."""
    mask, A = mask.bool(), advantages[:, None]  # (N, T), (N, 1)
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # (N, T)
    unclipped = ratio * A  # (N, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * A  # (N, T)
    # min for either sign of A: leaving the range gains nothing, the way back stays open
    token_loss = -torch.min(unclipped, clipped) * mask  # (N, T)
    tokens = mask.sum().clamp(min=1)
    loss = token_loss.sum() / tokens
    if aggregation == "sequence":
        loss = (token_loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return loss, {"clip_fraction": ((clipped < unclipped) & mask).sum() / tokens}


def masked_expert_loss(model, tokenizer, problem: Problem, domain: str) -> Tensor:
    """Mean NLL of the trace's visible tokens, given the question alone: not of hidden spans,
    nor of what was told. No part of SMEPO: it shows what a plan in the loss does."""
    unseen = [span[:2] for span in hidden_spans(problem.trace, domain, problem.answer)]
    if told := find_domain(domain).told:
        unseen += [match.span() for match in told.finditer(problem.trace)]
    text = problem.trace + tokenizer.eos_token
    trace = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = trace["offset_mapping"]
    visible = [all(end <= a or b <= start for a, b in unseen) for start, end in tokens]
    ids = problem.question_ids + trace["input_ids"]
    ids = torch.tensor([ids], device=model.device)  # (1, P+T)
    logprobs = token_logprobs(model, ids, torch.ones_like(ids), len(visible), 1.0)
    return -logprobs[0, visible].mean()


# ---- Update ----------------------------------------------------------------------


@dataclass
class MicroBatch:
    """N rollouts that fit into memory together."""

    input_ids: Tensor  # (N, P+T): prompts padded on the left, completions on the right
    attention_mask: Tensor  # (N, P+T)
    sampled: Tensor  # (N, T): 1 where the policy chose the token
    advantages: Tensor  # (N,)
    share: float  # of the mini-batch's loss
    old_logprobs: Tensor | None = None  # (N, T); None while pi still is pi_old


def micro_batches(rollouts: list[Rollout], device, config: Config):
    """Those that have a gradient, `micro_batch` at a time. Advantage 0, as in all-wrong and
    all-right groups, has none: such rollouts are not scored, but count in the mean."""
    useful = [r for r in rollouts if r.advantage != 0]
    useful.sort(key=lambda r: -len(r.prompt_ids + r.ids))  # like lengths: little padding
    batches = []
    for part in chunks(useful, config.micro_batch):
        prompts, prompt_mask = pad([r.prompt_ids for r in part], "left", device)
        ids, mask = pad([r.ids for r in part], "right", device)
        sampled, _ = pad([r.sampled for r in part], "right", device)
        share = len(part) / len(rollouts)
        if config.aggregation == "token":
            share = sampled.sum().item() / sum(sum(r.sampled) for r in rollouts)
        batch = MicroBatch(
            input_ids=torch.cat([prompts, ids], 1),
            attention_mask=torch.cat([prompt_mask, mask], 1),
            sampled=sampled,
            advantages=torch.tensor([r.advantage for r in part], device=device),
            share=share,
        )
        batches.append(batch)
    return batches


def score(model, batch: MicroBatch, config: Config) -> Tensor:
    T, temperature = batch.sampled.shape[1], config.temperature
    return token_logprobs(model, batch.input_ids, batch.attention_mask, T, temperature)


def backward(model, batch: MicroBatch, config: Config) -> dict:
    """Add the gradient of a micro-batch; returns what it was like."""
    logprobs = score(model, batch, config)  # (N, T)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    limits = config.clip_low, config.clip_high, config.aggregation
    loss, stats = policy_loss(logprobs, old, batch.advantages, batch.sampled, *limits)
    (loss * batch.share).backward()
    stats["loss"] = loss
    stats["entropy"] = -old[batch.sampled.bool()].mean()  # as its samples estimate it
    return {name: value.item() for name, value in stats.items()}


def optimizer_step(model, optimizer, config: Config) -> float:
    """Returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    if not math.isfinite(norm):
        raise UserError("the gradient is not finite, no step: lower --learning_rate")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def update(model, tokenizer, optimizer, rollouts: list[Rollout], config: Config) -> dict:
    """One optimizer step for each mini-batch; returns means over micro-batches."""
    rewards = [r.reward for r in rollouts]
    advantages = group_advantages(rewards, config.group_size, config.advantage_scale)
    for r, advantage in zip(rollouts, advantages.tolist(), strict=True):
        r.advantage = advantage
    size = len(rollouts) // config.mini_batches
    minis = chunks(rollouts, size)
    batches = [micro_batches(mini, model.device, config) for mini in minis]
    if config.mini_batches > 1:  # pi_old scores all before anything moves
        with torch.no_grad():
            for batch in itertools.chain(*batches):
                batch.old_logprobs = score(model, batch, config)
    stats, norms = [], []
    for mini, parts in zip(minis, batches, strict=True):
        stats += [backward(model, batch, config) for batch in parts]
        if config.expert_coef:
            for r in mini[:: config.group_size]:  # one problem at a time bounds the memory
                loss = masked_expert_loss(model, tokenizer, r.problem, config.domain)
                # the mean over the problems of the mini-batch
                (loss * config.expert_coef * config.group_size / size).backward()
        if parts or config.expert_coef:  # else no group has a signal
            norms.append(optimizer_step(model, optimizer, config))
    means = {"grad_norm": mean(norms)}
    for name in "loss", "entropy", "clip_fraction":
        means[name] = mean([one[name] for one in stats])
    return means


def chunks(rows: list, size: int) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


# ---- Evaluation: unguided by construction ----------------------------------------


def evaluate(model, tokenizer, problems: list[Problem], config: Config) -> dict:
    """{"pass@1": {difficulty: [mean, its standard error], "mean": ...}, "pass@4": ...}"""
    n = config.eval_samples
    rows = [problem for problem in problems for _ in range(n)]
    rollouts = rollout(model, tokenizer, rows, [False] * len(rows), config)
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, n)  # (problems, n)
    table, scores = {}, {"pass@1": rewards.mean(1), f"pass@{n}": rewards.amax(1)}
    for name, solved in scores.items():
        row = {}
        for level in sorted({problem.difficulty for problem in problems}):
            rate = solved[[problem.difficulty == level for problem in problems]]
            error = rate.std(correction=0).item() / len(rate) ** 0.5
            row[level] = [rate.mean().item(), error]
        # every difficulty weighs the same
        means, errors = torch.tensor(list(row.values())).T
        row["mean"] = [means.mean().item(), errors.norm().item() / len(errors)]
        table[name] = row
    return table


# ---- Training --------------------------------------------------------------------


def draw_problems(problems: list[Problem], count: int, step: int, config: Config):
    """Each step seeds its own draws, so a resumed run draws and samples the same."""
    torch.manual_seed(config.seed * 1_000_003 + step)
    return random.Random(f"{config.seed} {step}").choices(problems, k=count)


def train_step(model, tokenizer, optimizer, problems: list[Problem], step: int, config: Config):
    """Sample, reward, learn; returns the rollouts and the metrics, means over the rollouts."""
    batch = draw_problems(problems, config.prompts_per_step, step, config)
    start = time.perf_counter()
    rollouts, count = collect_rollouts(model, tokenizer, batch, step, config)
    middle = time.perf_counter()
    stats = update(model, tokenizer, optimizer, rollouts, config)
    end = time.perf_counter()
    rewards = [r.reward for r in rollouts]
    groups = chunks(rewards, config.group_size)
    metrics = {
        "step": step,
        "rollouts": count,
        "reward": mean(rewards),
        "zero_variance_wrong": mean([max(group) == 0 for group in groups]),
        "zero_variance_right": mean([min(group) == 1 for group in groups]),
        "completion_length": mean([sum(r.sampled) for r in rollouts]),
        "truncated": mean([not r.ended for r in rollouts]),
        "guided": mean([r.guided for r in rollouts]),
        "leak_rate": mean([r.problem.leaky for r in rollouts if r.guided]),
        "seconds_rollout": middle - start,
        "seconds_update": end - middle,
    }
    return rollouts, metrics | stats


def train(config: Config) -> Path:
    """From the base, or the checkpoint, to config.steps; returns the run folder."""
    torch.set_num_threads(config.threads)
    folder = open_run(config)
    model, tokenizer = load_model(config.model, config)
    problems = load_problems(config.data, config.guide, tokenizer, config)
    tests = load_problems(config.test_data, "none", tokenizer, config, split="test")
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    done = restore(folder, model, optimizer, config)
    if done == 0:
        show_start(model, problems, tests, config)
        torch.manual_seed(config.seed)
        before = {"step": 0} | evaluate(model, tokenizer, tests, config)
        append(folder / "metrics.jsonl", [before])
    bar = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps)
    for step in bar:
        rollouts, metrics = train_step(model, tokenizer, optimizer, problems, step, config)
        last = step == config.steps
        if last or step % config.eval_every == 0:
            metrics |= evaluate(model, tokenizer, tests, config)
        bar.set_postfix(reward=metrics["reward"])
        append(folder / "metrics.jsonl", [metrics])
        append(folder / "rollouts.jsonl", [loggable(r, step) for r in rollouts])
        if last or step % config.save_every == 0:
            save_checkpoint(folder, model, optimizer, step)
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder


def loggable(r: Rollout, step: int) -> dict:
    return {
        "step": step,
        "question": r.problem.question,
        "guide": r.problem.guide if r.guided else "",
        "completion": r.text,
        "reward": r.reward,
    }


# ---- Data and models -------------------------------------------------------------

COLUMNS = {  # as data sets call them: the first that is there and is not taken yet
    "question": "question extra_info.question problem prompt",
    "trace": "teacher_ds extra_info.teacher_ds trace solution answer",
    "answer": "reward_model.ground_truth ground_truth answer",
}


def choose_columns(names, config: Config) -> dict[str, str]:
    """{"question": its column, "trace": ..., "answer": ...} of those found."""
    columns = dict(pair.partition("=")[::2] for pair in config.columns)
    for part, column in columns.items():
        missing = column not in names and part != "trace"  # held-out problems need no trace
        if missing or part not in COLUMNS:
            rule = f"it must be question=, trace= or answer= one of {', '.join(names)}"
            raise UserError(f"--columns {part}={column}: {rule}")
    for part, usual in COLUMNS.items():
        found = [name for name in usual.split() if name in names]
        free = [name for name in found if name not in columns.values()]
        if free:
            columns.setdefault(part, free[0])
    return columns


def read_rows(path: str, split: str) -> list[dict]:
    """A file, a folder or hub/id:configuration; what is nested is called a.b then."""
    import datasets  # here, as this takes a second

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said below
    kind = "parquet" if path.endswith("parquet") else "json"
    with blaming(f"{path} has no rows to read"):
        if path.endswith((".parquet", ".json", ".jsonl")):
            splits = datasets.load_dataset(kind, data_files=path)
        else:
            name = [path] if Path(path).exists() else path.split(":")
            splits = datasets.load_dataset(*name)
        rows = splits.get(split, [*splits.values()][-1])  # without a test split, the last
        return [flatten(row) for row in rows]


def flatten(row: dict) -> dict:
    """{"a": {"b": 1}} becomes {"a": {"b": 1}, "a.b": 1}."""
    for name, value in list(row.items()):
        if isinstance(value, dict):
            row |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
    return row


def read_problems(path: str, guide: str, config: Config, split="train") -> list[Problem]:
    """The problems of a file, with what the policy will be shown of their traces."""
    rows = read_rows(path, split)
    columns = choose_columns(rows[0], config)
    found = {"question": "none", "trace": "none", "answer": "stated by the trace"} | columns
    print(f"{path}:", ", ".join(f"{part}: {found[part]}" for part in COLUMNS))
    domain = find_domain(config.domain)
    needed = ["question", "answer"]
    if guide != "none" or (config.expert_coef and split == "train"):
        needed.append("trace")
    problems = []
    for number, row in enumerate(rows, start=1):
        texts = {part: as_text(row.get(columns.get(part))) for part in COLUMNS}
        texts["answer"] = texts["answer"] or stated(texts["trace"])
        for part in needed:
            if not texts[part].strip():
                raise UserError(f"{path} row {number} has no {part}: add it, or see --columns")
        with blaming(f"{path} row {number}"):
            domain.check(texts["answer"])
        p = Problem(**texts, difficulty=as_text(row.get("difficulty", "all")))
        seed = f"{config.seed} {p.question}"
        p.guide = guide_trace(p.trace, guide, config.domain, p.answer, config.prefix_ratio, seed)
        p.leaky = leaks(p.guide, p.answer, config.domain)
        problems.append(p)
    return problems


def as_text(value) -> str:
    """Chat messages, or texts, become one text; a number, or unit tests, JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n\n".join(map(as_text, value))
    if isinstance(value, dict):
        for key in "content", "text":  # of a message, of a part of one
            if key in value:
                return as_text(value[key])
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def load_model(path: str | Path, config: Config):
    """The model, in float32, and its tokenizer."""
    device = config.device
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    logging.disable_progress_bar()
    with blaming(f"cannot load --model {path} on {device}"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer in {path} has no eos_token: save one there")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.chat_template is None:
        print(f"{path} has no chat template: a plain one is used")
        tokenizer.chat_template = PLAIN_TEMPLATE
    # several EOS ids are kept; what else the folder recommends would bend the rollouts
    eos_ids = model.generation_config.eos_token_id or []
    if isinstance(eos_ids, int):
        eos_ids = [eos_ids]
    eos_ids = sorted({tokenizer.eos_token_id, *eos_ids})
    model.generation_config = GenerationConfig(eos_token_id=eos_ids)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"--model {path} has weights that are not finite")
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if config.max_prompt_tokens + config.max_new_tokens > positions:
        rule = "--max_prompt_tokens and --max_new_tokens must fit into that"
        raise UserError(f"{path} has {positions} positions: {rule}")
    if model.device.type != "cpu":  # the weights stay float32
        model.forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
    return model.eval(), tokenizer  # no dropout: it would bend the ratio


PLAIN_TEMPLATE = (  # for base models
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


# ---- The run folder: at whatever instant the process dies, --resume works --------


def run_folder(config: Config) -> Path:
    """runs/NAME. No name: the latest to resume, or a new one that says what the run is."""
    runs = Path("runs")
    if config.name:
        return runs / config.name
    if config.resume:
        known = sorted(runs.glob("*/config.json"), key=os.path.getmtime)
        if not known:
            raise UserError("--resume: no run is in runs/ yet")
        return known[-1].parent
    data = Path(config.data).resolve()
    name = data.parent.name if data.stem == "train" else data.stem
    words = f"{name}-{config.guide}-{config.guide_when}".removesuffix("-always")
    label = re.sub(r"[^\w.]+", "-", words)
    folder, number = runs / label, 1
    while folder.exists():
        number += 1
        folder = runs / f"{label}-{number}"
    return folder


def saved_settings(folder: Path) -> dict:
    path = folder / "config.json"
    with blaming(f"cannot read {path}"):
        return asdict(Config(**json.loads(path.read_text(encoding="utf-8"))))


def open_run(config: Config) -> Path:
    """The run folder: new, or to be resumed with the settings that it has."""
    folder = run_folder(config)
    if (folder / "config.json").exists():
        before, now = saved_settings(folder), asdict(config)
        free = ("name", "resume", "steps", "device", "micro_batch")
        changed = [key for key in now if key not in free and before[key] != now[key]]
        if changed or not config.resume:
            flags = "".join(f" --{key} {before[key]}" for key in changed)
            rule = f"go on with --resume{flags}, or take another --name"
            raise UserError(f"{folder} holds a run: {rule}")
    return folder


@contextmanager
def replacing(path: Path):
    """All of a file or nothing: it is written aside, then swapped in."""
    new = path.with_name(path.name + ".new")
    yield new
    os.replace(new, path)


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    state = {
        "step": step,  # each seeds its own sampling: no other random state is kept
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "log_sizes": {path.name: path.stat().st_size for path in folder.glob("*.jsonl")},
    }
    with replacing(folder / "checkpoint" / "training.pt") as new:
        torch.save(state, new)


def restore(folder: Path, model, optimizer, config: Config) -> int:
    """Writes the settings, then goes back to the checkpoint, with the logs, and returns the
    steps that it has, or 0."""
    saved, state = folder / "checkpoint" / "training.pt", {"step": 0, "log_sizes": {}}
    saved.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.json") as new:
        new.write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    if saved.exists():
        with blaming(f"--resume cannot read {saved}"):
            state = torch.load(saved, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    for log in folder / "metrics.jsonl", folder / "rollouts.jsonl":
        log.touch()
        os.truncate(log, state["log_sizes"].get(log.name, 0))
    return state["step"]


def append(path: Path, records: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- What the reader sees --------------------------------------------------------


def show_start(model, problems: list[Problem], tests: list[Problem], config: Config):
    """What is trained on what."""
    print(
        f"model {config.model}, {model.num_parameters():,} parameters, {model.device}\n"
        f"data  {len(problems)} problems to train on, {len(tests)} to evaluate unguided\n"
        f"guide {config.guide} {config.guide_when}; {sum(p.leaky for p in problems)} leak\n\n"
        f"{problems[0].question}\n\n{problems[0].guide}\n"
    )


def report(folder: Path) -> None:
    """The table before -> after, and curve.png where matplotlib is there to draw it."""
    records = read_records(folder / "metrics.jsonl")
    points = [record for record in records if "pass@1" in record]
    first, last = points[0], points[-1]
    print(f"\nunguided accuracy  step 0           step {last['step']:<11} change")
    for level, (mean, error) in first["pass@1"].items():
        after, e = last["pass@1"][level]
        row = f"{mean:.3f} ± {error:.3f}    {after:.3f} ± {e:.3f}    {after - mean:+.3f}"
        print(f"difficulty {level:<6}  {row}")
    if find_spec("matplotlib") and find_spec("tiny_tasks"):
        import_module("tiny_tasks.plots").draw_run(folder)
    print(f"\n{folder} holds it all.", "`--guide none` trains GRPO, `compare --quick` draws both.")


# ---- Math: the verifier ----------------------------------------------------------
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
    fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety""".split()
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh
    twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth
    twentieth""".split()
SCALES = {"half": Fraction(1, 2), "dozen": 12, "hundred": 100, "thousand": 1000}
SCALES |= {"million": 10**6, "billion": 10**9}
VALUES = SCALES | dict(zip(NUMBERS, [*range(20), *range(20, 100, 10)], strict=True))
NUMERALS = VALUES | dict(zip(ORDINALS, range(1, 21), strict=True))

BRACED = r"[^{}]"  # what may stand between braces, themselves balanced, five deep
for _ in range(4):
    BRACED = rf"(?:[^{{}}]|\{{{BRACED}*\}})"
BOX = r"\\(?:boxed|fbox)"
INNERMOST = rf"(?!{BOX}|answer(?:[ ]is|:))"  # of <answer>\boxed{5}</answer> it is the box
STATED = re.compile(
    rf"""(?i) {BOX} \s? \{{ {INNERMOST} ({BRACED}*) \}}
    | <answer> ( (?: {INNERMOST} [^<] )* )
    | (?: \#\#\#\# | answer(?:[ ]is:?|:) (?!\W*(?:in)?correct) )  # "the answer is correct"
      [\s*]* ( (?: {INNERMOST} (?: [^\n<.] | \.(?!\s|$) ) )* )  # up to the full stop
    """,
    re.VERBOSE,
)
SYMBOLS = {"-": "−", r"\pi": "π", r"\sqrt": "√", r"\infty": "∞"}
TYPESETTING = [
    (r"(?<!\\)\\[,;: ](?=\\?[A-Za-z])", " "),  # 5\,\mathrm{cm}
    (r"\\(?:text|math|mbox|operatorname)\w*\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle)|(?<!\\)\\[,!;: ()]|\\?\$|\^\{?\\circ\}?|°|\*\*", ""),
    (r"\\[dtc]frac", r"\\frac"),
]
COMMA = r"(?:,(?:\\!)?|\{,\}|\\,)"  # 12,480, 12,\!480, 12{,}480, 12\,480
TIMES_TEN_TO = r"\s?(?:\\times|\\cdot|[×·*x])\s?10\s?\^\s?"
PARTS = rf"(?:{'|'.join(ORDINALS[2:])}|halve|\w+[dn]th)s?$"  # 3 tenths, but 3 sixth graders
NO_UNIT = rf"(?:(?:{'|'.join(VALUES)}|trillion|or|and|not|pi)s?\b|{PARTS})"
UNIT = rf"(?<=[\d}}])(?:\s+(?!{NO_UNIT})[a-z]{{2,}}){{1,3}}(?:\^?\{{?[23]\}}?)?$"  # 5 cm^2
NUMBER_FORMS = [
    (r"^[a-z]\w*\s*=|\\?%$", ""),  # x = 5; 50% is 50
    (UNIT, ""),
    (rf"(?<=\d){COMMA}(?=\d{{3}}(?!\d))", ""),
    (TIMES_TEN_TO, "e"),
    (r"\\frac\s?(\{[^{}]*\}|\d)\s?(\{[^{}]*\}|\d)", r" \1/\2"),
    (r"[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0])),
    (r"[\\{}]|(?<=[{/+-])\s+|\s+(?=[}/])", ""),  # \frac { 1 } { 2 }
    (r"^-(\d+)\s+(?=\d)", r"-\1 -"),  # -2 1/2 is -2 and -1/2
    ("⁄", "/"),
]


def replace_all(text: str, table: list[tuple]) -> str:
    for pattern, new in table:
        text = re.sub(pattern, new, text)
    return text.strip()


def stated(text: str) -> str:
    r"""The last answer in a text: \boxed{...}, #### ..., <answer>... or "The answer is ..."."""
    answer = ""
    for match in STATED.finditer(text):
        answer = match[match.lastindex].strip(" *\n") or answer
    return answer


def plain(text: str) -> str:
    r"""Without what only typesets: `$\text{(B)}$.` is `(B)`, and π is \pi."""
    for latex, symbol in SYMBOLS.items():
        text = text.replace(symbol, latex)
    return replace_all(text, TYPESETTING).rstrip(" .")


def spelled_value(words: list[str]) -> Fraction | None:
    """one hundred and five, three dozen, twenty-first; but "two three" is no number."""
    total = Fraction(0)
    for word in words:
        if word in SCALES:
            part = total % max(SCALES[word], 100)  # of "two thousand five hundred": five
            total += (part or 1) * SCALES[word] - part
        elif total % 10:  # there is a unit before it: two three
            return None
        else:
            total += NUMERALS[word]
    return total


def number_value(text: str) -> Fraction | None:
    r"""x = 42.0, 1,234, \frac14, 2 1/2, ½, 3 \times 10^8, 50% (as 50), 5 cm, forty-two; or None."""
    text = plain(text).casefold()
    if len(text) > 100:  # no number; some patterns below are slow on long texts
        return None
    words = re.split(r" and |-| +", text)
    if NUMERALS.keys() >= set(words):
        return spelled_value(words)
    text = replace_all(text, NUMBER_FORMS)
    if not re.fullmatch(r"(?:[-+]?\d+ +(?=-?\d+/))?[-+]?[\d.]+(?:/\d+|e[-+]?\d{1,3})?", text):
        return None
    try:
        return Fraction(sum(map(Fraction, text.split())))
    except (ValueError, ZeroDivisionError):  # 1.2.3, 1/0
        return None


def canonical(text: str) -> str:
    """How two texts compare: x^{2} is x^2, (B) is b."""
    text = re.sub(r"\s|\{(?=\w\})|(?<=\{\w)\}", "", plain(text).casefold())
    return re.sub(r"^\((\w)\)$", r"\1", text)


def same_answer(given: str, truth: str) -> bool:
    r"""Numbers compare by value (1,234 is 1234, \frac14 is 0.25), all else as text."""
    value = number_value(truth)
    if value is not None:
        return number_value(given) == value
    return given != "" and canonical(given) == canonical(truth)


def math_rewards(texts: list[str], truths: list[str]) -> list[float]:
    """1.0 where the last answer that a text states is right, else 0.0."""
    answers = map(stated, texts)
    return [float(same_answer(*pair)) for pair in zip(answers, truths, strict=True)]


# ---- Math: what is hidden --------------------------------------------------------
# One regex reads a trace from left to right, and the first rule that matches wins: "Step 1"
# is consumed before a number can begin at its 1. Every repeat is bounded, or ends where the
# next one begins: no text makes the search slow.
def any_of(words: list[str]) -> str:
    """One of these words, whole."""
    return f"(?:(?i:{'|'.join(words)})(?![A-Za-z]))"


MASK = r"\[(?:NUMBER|ANSWER)\]"
DOTTED = r"\d{1,3}(?:\.\d{1,3}){0,3}"  # 4.2
NINE = any_of(NUMBERS[1:10])
ID = rf"\(?(?:[A-Z]\.)?(?:{DOTTED}|{NINE})(?!\d|[.,]\d|\s?(?:[=^+<>%×·*/]|\\[ct]))"
IDS = rf"""(?:\.?[ ~_-]?\#?{ID}
    |s[ ~]{ID}(?:(?:,?\ (?:and|or|to)\ |,\ |[-–]){ID}){{0,9}})"""  # Case 1; Cases 1, 2 and 3
CARDINAL = any_of(list(VALUES))
ORDINAL = any_of(ORDINALS + [f"{word}s" for word in ORDINALS])
SIGN = r"(?:(?<![\w)\]}!'])(?<![\d)\]}]\ )(?<!\b\w\ )[-+−])?"  # else an operator: n-3, 7 - 6

# keep stays, number and answer are hidden, equal is hidden if it equals the answer. Behind each
# rule stands an example of it, and a test runs that.
RULES = re.compile(
    rf"""
    (?P<keep>
        {MASK}  # [NUMBER]
      | (?=[A-Z])(?i:step|(?:sub)?case|part|stage|lemma|theorem|thm|corollary|proposition|claim
          |remark|definition|method|solution|problem|question|example|section|table|figure|eq
          |equation){IDS}  # Theorem 4.2
      | (?<!this\ )(?<!that\ )(?<!which\ )(?<!each\ )(?:step|case|part|equation){IDS}
          (?!\ ?[-+]|\ (?:of|[ckm]?[mgl]|(?!is|has|gives)[a-z]+s)\b)  # by cases 1 and 2
      | (?:from|in|into|and|with|by|via|see|of|\w{{2,9}}ing)\ \(\d{{1,2}}\)  # from (1)
      | ^[\ \t>*_\#-]{{0,9}}(?:\(\d{{1,2}}\)|{DOTTED}[.):]|(?<=\#\ ){DOTTED})
          (?=\**[\ \t]+\S)  # 1. Let
      | (?:(?<!\\)[A-Za-zα-ω]\}}?|\\(?!log|int|sum|prod|lim)[A-Za-z]+)'{{0,3}}
          (?:_(?:\d+|\{{[\w+*,\ -]{{1,20}}\}})|[₀-₉]+)  # x_1
      | \\(?:tag|label|(?:eq)?ref|phantom|[hv]space)\*?\{{[^{{}}]{{0,60}}\}}  # \tag{{1}}
    ) | (?P<equal>
        (?:(?<=[Tt]he\ )|(?<=[Tt]hese\ )|(?<=[Tt]hose\ )){any_of(NUMBERS[2:7])}
          (?=\ [a-z])(?!\ {CARDINAL})  # the two roots
      | {ORDINAL}  # first
      | {any_of(["one", "half"])}(?![ -]{CARDINAL}|-{ORDINAL})  # one can
    ) | (?P<answer>
        (?:(?<=boxed\{{)|(?<=fbox\{{)){BRACED}+(?=\}})  # \boxed{{x+1}}
    ) | (?P<number>
        {CARDINAL}(?:[ -]{CARDINAL})*(?:-{ORDINAL})?  # forty-two
      | {SIGN}(?:\d+(?:{COMMA}\d{{3}}(?!\d))*(?:\.\d+)?|\.\d+)
          (?:\ ?\\?%|(?:st|nd|rd|th)\b)?  # -3.5%
      | [¼-¾⅐-⅞⁺⁻⁰¹²³⁴-⁹₀-₉]+  # 2⁵ or ½
    ) | [A-Za-z]+  # other words: no rule begins inside them
    """,
    re.VERBOSE | re.MULTILINE,
)

# What may stand between the signs of an answer: it only typesets, or is often left out.
NOISE = r"""(?:[\s{}()\[\]$*/]
    |\\(?:left|right|cdot|times|text|math[a-z]+|rm|[dt]?frac|[,;:!\ ]|(?![A-Za-z]))){0,6}"""
ANSWER_SIGN = rf"{NOISE}(\\[A-Za-z]+|[A-Za-z]{{3,}}|[^\\\s{{}}()\[\]$*/])"
SPELLINGS = {latex: f"(?:{re.escape(latex)}|{symbol})" for latex, symbol in SYMBOLS.items()}
# A letter, yes and no are plain words as well: they are hidden only where they conclude.
PLAIN_WORD = r"[a-z]|yes|no|true|false"
CONCLUDED = r"""
    (?= (?: (?<![A-Za-z])(?i:answer|ans|option|choice|choose|correct) [^\[\]]{0,40}? \[?
          | (?:[选案]|\#\#\#\#) [^\[\]]{0,40}?
          | (?<![A-Za-z])(?i:so|thus|hence|therefore)\b [\w\s$({\\:,"“*]{0,40}?
          | \bis\b [\w\s$({\\:,"“*]{0,9}?
          | \n\W{0,4} (?=\w{1,5}\W{0,4}\Z) )  # a line of its own, at the end
        (?<![A-Za-z\d\]]) (?P<end>(?i:WORD))
        (?! [A-Za-z\d'’-] | \[ | \ (?!and|or|because|since)[A-Za-z\[] ) )
    | \(\W{0,3} (?:\\[a-z]{2,6}\W{1,3})? (?P<option>WORD) \W{0,3}\)
    | (?<![A-Za-z\d\]])(?P<subject>WORD) (?=\ is\ (?:the\ )?(?:correct|right|answer))
"""


def answer_pattern(answer: str) -> str:
    if re.fullmatch(PLAIN_WORD, canonical(answer)):
        return CONCLUDED.replace("WORD", re.sub(r"\W", "", plain(answer)))
    signs = re.findall(ANSWER_SIGN, plain(answer), re.VERBOSE)[:100]
    text = NOISE.join(SPELLINGS.get(sign, re.escape(sign)) for sign in signs)
    # R] ends a mask
    return rf"(?<![A-Za-z\d])(?<!R\]) (?P<all>(?i:{text})) (?![A-Za-z\d]|{MASK})"


def answer_spans(trace: str, answer: str) -> list[Span]:
    """Wherever the answer stands, unless it is a number: RULES hide all of them."""
    is_text = re.search(r"[^\W_]", answer) and not re.search(MASK, answer)
    if not is_text or number_value(answer) is not None:
        return []
    spans = []
    for match in re.finditer(rf"{MASK} | {answer_pattern(answer)}", trace, re.VERBOSE):
        if match.lastgroup:
            start, end = match.span(match.lastgroup)
            braces = "}" * (trace.count("{", start, end) - trace.count("}", start, end))
            if trace.startswith(braces, end):  # that of \sqrt{3} is no sign of the answer
                end += len(braces)
            spans.append((start, end, "[ANSWER]"))
    return spans


def math_spans(trace: str, answer: str) -> list[Span]:
    """Numbers, boxes, and the answer: the given one, else what the trace states."""
    answer = answer or stated(trace)
    spans = answer_spans(trace, answer)
    for match in RULES.finditer(trace):
        action = match.lastgroup
        if action == "equal" and same_answer(match[0], answer):
            action = "number"
        if action in ("number", "answer"):
            spans.append((*match.span(), f"[{action.upper()}]"))
    return spans


# ---- Math: can the answer still be read off? -------------------------------------
# It shares nothing with the rules above, or it could not see what they miss.
LABELS = re.compile(
    r"""(?im)
    (?<![a-z])(?:step|(?:sub)?case|part|stage|lemma|theorem|thm|corollary|proposition|claim|remark
      |section|solution|method|problem|question|example|figure|table|eq|equation)
      (?:s\ (?:\(?\d+\)?(?:,|\ and|\ to|\ or|[-–])\ ?)*|[ .~_\#-]{0,3})
      \(?(?:[\d.]*\d|one|two|three|four|five)
    | ^[ \t>*\#_-]{0,9}(?:\(?\d{1,2}(?:\.\d+)*[.):]|(?<=\#\ )[\d.]+)[*_]*\s | \(\d{1,2}\)
    | _(?:\{[^{}]{0,20}\}|\d+|\w) | (?<=[a-z])[₀-₉]+
    | \\(?:tag|label|(?:eq)?ref|phantom|[hv]space)\*?\{[^{}]*\}
    """,
    re.VERBOSE,
)
DIGITS = rf"(?:\d+(?:{COMMA}\d{{3}})*(?:\.\d+)?|\.\d+)"
FRACTION = r"\d*\s?(?:\\[dtc]?frac(?:\s?(?:\{[^{}]*\}|\d)){2}|[¼-¾⅐-⅞])|(?:\d+\s)?\d+/\d+"
WORDS = rf"(?:{'|'.join(NUMERALS)})(?![a-z])"
VISIBLE = re.compile(
    rf"{FRACTION}|{DIGITS}(?:{TIMES_TEN_TO}\{{?-?\d+)?"
    rf"|(?i:(?<![a-z]){WORDS}(?:[ -](?:and )?{WORDS})*)"
)
SAID = r"""(?:(?i:answer|ans\b|option|choice|choose|correct|\#\#\#\#|[选案])[^#]{0,40}?
    | (?i:\b(?:so|is))[\s$({\\:,"“*]{0,4}) (?<![A-Za-z\d])(?i:WORD)(?![A-Za-z\d'’-])(?!\ [A-Za-z])
    | \(WORD\) | \n[^\w#]{0,4}WORD[^\w#]{0,4}\Z | WORD\ is\ (?:the\ )?(?:correct|right|answer)"""


def math_leaks(masked: str, answer: str) -> bool:
    """Is a number of the answer's value visible, or its text? If in doubt, yes."""
    text = LABELS.sub("#", re.sub(MASK, "#", masked))
    value = number_value(answer)
    if value is not None:
        # 3/4 is a number, and has two
        numbers = {*VISIBLE.findall(text), *re.findall(DIGITS, text)}
        # a sign may be an operator: [NUMBER] - 17
        return any(number_value(number) in (value, -value) for number in numbers)
    signs = re.sub(r"\\?[{}]", "", canonical(answer))
    pattern = "(?i:" + r"[\s{}\\]{0,6}".join(map(re.escape, signs)) + ")"
    if re.fullmatch(PLAIN_WORD, signs):
        pattern = SAID.replace("WORD", re.sub(r"\W", "", plain(answer)))
    pattern = rf"(?<![A-Za-z\d\#])(?:{pattern})(?![A-Za-z\d\#])"
    return bool(re.search(pattern, plain(text), re.VERBOSE))


DOMAINS = {
    "math": Domain(
        system="Reason step by step, and put your final answer within \\boxed{}.",
        spans=math_spans,
        leaks=math_leaks,
        rewards=math_rewards,
    )
}


# ---- Main ------------------------------------------------------------------------


def parse(arguments: list[str]) -> Config:
    """Flags to Config; with --resume the settings of that run are the defaults."""
    from transformers import HfArgumentParser  # here, as `mask` does without

    source = inspect.getsource(Config)
    helps = re.findall(r"^    \w+: .*?  # (.*)", source, re.MULTILINE)
    for setting, help in zip(fields(Config), helps, strict=True):
        setting.metadata = {"help": help}
    parser = HfArgumentParser(Config, exit_on_error=False, allow_abbrev=False)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise UserError(f"unknown flag {rest[0]}: --help lists them all")
    if given.resume:
        parser.set_defaults(**saved_settings(run_folder(given)))
        given = parser.parse_args(arguments)
    return Config(**vars(given))


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] in (["mask"], ["compare"], ["export"], ["show"]):
            import_module(f"tiny_tasks.{arguments[0]}").main(arguments[1:])
        else:
            report(train(parse(arguments)))
    except (UserError, argparse.ArgumentError, OSError) as error:
        print(f"smepo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.modules["smepo"] = sys.modules[__name__]  # what tiny_tasks imports: this very module
    sys.stdout.reconfigure(errors="replace")  # a Windows pipe may not know every sign
    sys.exit(main(sys.argv[1:]))
