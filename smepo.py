"""SMEPO, Semantic Masked Expert Policy Optimization (arXiv 2605.25198), in one readable file.

The problem: reinforcement learning with verifiable rewards stalls where all rollouts of a group fail,
for then every advantage is 0. An expert's solution in the prompt helps, but it shows what the verifier
checks: the policy copies it, the reward rises to 1, and *without* the solution nothing was learned.

The idea: show the solution, but hide the spans that the reward depends on (in math, the numbers).

    question x   Compute 7 - 6 + 3 * 5
    trace t      Step 1: 3 * 5 = 15.                        Step 2: 7 - 6 = 1. ...
    shown        Step 1: [NUMBER] * [NUMBER] = [NUMBER].    Step 2: [NUMBER] - [NUMBER] = [NUMBER]. ...

The policy follows the plan but must reconstruct every value. Nothing else changes: it is on-policy
GRPO with another prompt c, and the evaluation shows no trace. Each line is a function below:

    context     c = x + mask(t)                               guide_trace, build_prompt
    rollouts    o_1..o_G ~ pi_old(. | c)                      rollout
    reward      r_i = verifier(o_i, a) in {0, 1}              reward
    advantage   A_i = (r_i - mean r) / (std r + eps)          group_advantages
    ratio       rho_t = pi(o_t | c, o_<t) / pi_old(o_t | c, o_<t)     token_logprobs
    loss        L = -1/(B G) sum_i 1/|o_i| sum_t min(rho_t A_i, clip(rho_t, 1-low, 1+high) A_i)
                                                              policy_loss
Usage:
    python smepo.py                  SMEPO on toy arithmetic, minutes on a laptop CPU
    python smepo.py --guide none     plain GRPO: the same, with nothing shown
    python smepo.py --help           every setting

Shapes: B problems, G rollouts of each, N rows (B*G or some of them), P prompt and T completion tokens.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging

# ---- Config: every field is a flag ---------------------------------------------------------------

class UserError(Exception):
    """Bad input, in one line: what is wrong and how to mend it. `main` exits with code 2."""

def flag(default, help: str):
    return field(default=default, metadata={"help": help})

@dataclass
class Config:
    name: str = flag("smepo", "the run is written to runs/<name>/")
    resume: bool = flag(False, "continue the run in runs/<name>/")
    model: str = flag("tiny_tasks/base", "the base model, a Hugging Face folder or hub id")
    data: str = flag("tiny_tasks/arithmetic_train.jsonl", "training problems, jsonl or parquet")
    test_data: str = flag("tiny_tasks/arithmetic_test.jsonl", "held-out problems, asked unguided")
    domain: Literal["math"] = flag("math", "what is masked, and how answers compare")
    guide: Literal["none", "full", "prefix", "random", "semantic"] = flag(
        "semantic", "what is shown of the trace: none is GRPO, semantic is SMEPO")
    guide_when: str = flag(
        "always", "always; on-failure: where a group without it all failed (GHPO); or a fraction (POPE)")
    prefix_ratio: float = flag(0.5, "the part of the trace that guide=prefix shows")
    steps: int = flag(60, "rollout batches to train on (paper: 400-500)")
    prompts_per_step: int = flag(16, "B, problems in a rollout batch (paper: 32)")
    group_size: int = flag(8, "G, rollouts of each problem (paper: 8)")
    mini_batches: int = flag(1, "optimizer steps a rollout batch (paper: 4); at 1 no ratio leaves 1")
    inner_epochs: int = flag(1, "how often a rollout batch is used")
    micro_batch: int = flag(128, "rows a forward; halve it when out of memory, the gradient stays")
    generate_batch: int = flag(512, "rows a call of generate; bounds its KV cache")
    learning_rate: float = flag(1e-4, "of AdamW (paper, 8B parameters: 1e-6)")
    grad_clip: float = flag(1.0, "largest gradient norm")
    clip_low: float = flag(0.2, "the ratio is clipped below at 1 - clip_low")
    clip_high: float = flag(0.28, "and above at 1 + clip_high; wider, so that rare tokens can grow")
    advantage_scale: Literal["std", "none"] = flag("std", "none: not divided by the std (Dr. GRPO)")
    aggregation: Literal["sequence", "token"] = flag(
        "sequence", "mean over tokens, then rollouts (paper); token: over all tokens at once (DAPO)")
    expert_coef: float = flag(0.0, "weight of masked_expert_loss; the paper has no such term")
    temperature: float = flag(1.0, "of sampling and scoring alike (paper: 0.8)")
    max_prompt_tokens: int = flag(256, "a longer prompt is refused, never cut")
    max_new_tokens: int = flag(64, "a rollout without an end by then earns 0")
    eval_every: int = flag(20, "steps between points of the accuracy curve")
    eval_samples: int = flag(4, "samples a test problem before and after; 1 in between")
    save_every: int = flag(10, "steps between checkpoints")
    seed: int = flag(0, "same seed, same machine, same result")
    device: str = flag("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = {"seed": 0, "group_size": 2}.get(name, 1)  # a group of 1 has nothing to compare
            if type(value) is int and value < least:
                raise UserError(f"--{name} {value}: it must be at least {least}")
        if self.prompts_per_step % self.mini_batches:
            raise UserError(f"--mini_batches {self.mini_batches}: it must divide --prompts_per_step")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature}: it must be above 0, rollouts must differ")
        if not re.fullmatch(r"always|on-failure|0?\.\d+|[01](\.0*)?", self.guide_when):
            raise UserError(f"--guide_when {self.guide_when}: use always, on-failure or 0 to 1")

# ---- Masking: the spans of a trace that the reward depends on -------------------------------------
# One pass from left to right whose first alternatives are what to keep: "Step 1:" is consumed before
# the number pattern can see its 1. So nothing needs a placeholder, and nothing is masked twice.

LABEL = r"\b(?i:step|case|part|lemma|theorem|equation)\s+\d+(?:\.\d+)*(?!\w)|^[ \t]*\d+[.)](?=\s)"
NUMBER = r"(?:(?<![\w)\]}])(?<![\w)\]}] )[-\u2212])?\d+(?:,\d{3})*(?:\.\d+)?%?"
MATH = re.compile(rf"(?P<keep>{LABEL}|[A-Za-z]+_\d+)|(?P<number>{NUMBER})", re.MULTILINE)
PIECE = re.compile(r"\w+|[^\w\s]")
Span = tuple[int, int, str]  # start, end, and the mask shown instead

def hidden_spans(trace: str, domain: str, answer: str = "") -> list[Span]:
    """The reward-relevant spans, left to right, without overlap."""
    return [(*m.span(), "[NUMBER]") for m in MATH.finditer(trace) if m.lastgroup == "number"]

def random_spans(trace: str, spans: list[Span], seed: str) -> list[Span]:
    """As many spans, as long in words and signs, anywhere: the control in which only *where* differs."""
    rng, pieces = random.Random(seed), [match.span() for match in PIECE.finditer(trace)]
    lengths = [len(PIECE.findall(trace[start:end])) for start, end, _ in spans]
    rng.shuffle(lengths)
    # a slot is one visible piece or one whole span, so every placement is equally likely
    slots = rng.sample(range(len(pieces) - sum(lengths) + len(spans)), len(spans))
    chosen, hidden = [], 0
    for i, (slot, length) in enumerate(zip(sorted(slots), lengths, strict=True)):
        first, hidden = slot - i + hidden, hidden + length
        chosen.append((pieces[first][0], pieces[first + length - 1][1], spans[i][2]))
    return chosen

def apply_mask(trace: str, spans: list[Span]) -> str:
    parts, at = [], 0
    for start, end, mask in spans:
        parts += [trace[at:start], mask]
        at = end
    return "".join(parts) + trace[at:]

def mask_trace(trace: str, domain: str, answer: str = "") -> str:
    """The trace with its reward-relevant spans hidden and its plan kept.

    >>> mask_trace("Step 1: 3 * 5 = 15.", "math")
    'Step 1: [NUMBER] * [NUMBER] = [NUMBER].'
    """
    return apply_mask(trace, hidden_spans(trace, domain, answer))

def leaks(masked: str, answer: str, domain: str) -> bool:
    """Can the verifier's target still be read off the masked text?"""
    visible = (masked[start:end] for start, end, _ in hidden_spans(masked, domain, answer))
    return any(same_answer(value, answer) for value in visible)

def guide_trace(trace: str, guide: str, domain: str, answer: str = "", prefix_ratio: float = 0.5,
                seed: str = "") -> str:
    """What the policy is shown: none (GRPO), full, prefix (whole lines), random or semantic (SMEPO)."""
    if guide == "none":
        return ""
    if guide == "full":
        return trace
    if guide == "prefix":
        return trace[: max(0, trace.rfind("\n", 0, int(len(trace) * prefix_ratio) + 1))]
    spans = hidden_spans(trace, domain, answer)
    return apply_mask(trace, random_spans(trace, spans, seed) if guide == "random" else spans)

# ---- Data and prompts -----------------------------------------------------------------------------

@dataclass
class Problem:
    question: str
    answer: str  # the ground truth
    trace: str  # the expert's solution
    difficulty: str
    guide: str  # what the policy is shown of the trace, "" for nothing
    leaky: bool  # whether the guide gives the answer away
    prompt_ids: list[int]  # the question alone
    guided_ids: list[int]  # the question and the guide

def build_prompt(tokenizer, question: str, guide_text: str = "") -> str:
    """The guide poses as a finished assistant turn before the one to be written."""
    messages = [{"role": "user", "content": question}]
    if guide_text:
        guide_text = "Here is an example solution:\n" + guide_text
        messages.append({"role": "assistant", "content": guide_text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

def load_rows(path: str) -> datasets.Dataset:
    kind = "parquet" if path.endswith(".parquet") else "json"
    try:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty: it needs at least one row")
        return datasets.load_dataset(kind, data_files=path, split="train")
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{path} cannot be read as {kind}: {reason}") from error

def load_problems(path: str, guide: str, tokenizer, config: Config) -> list[Problem]:
    """Rows in the schema of the official data, and what the policy will be shown of each."""
    def ids(text: str) -> list[int]:  # the template has written the special tokens already
        prompt = build_prompt(tokenizer, question, text)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]

    problems = []
    for line, row in enumerate(load_rows(path), start=1):
        question, trace = row.get("question"), row.get("teacher_ds") or ""
        answer = (row.get("reward_model") or {}).get("ground_truth")
        wanted = {"question": question, "reward_model.ground_truth": answer}
        if guide != "none" or config.expert_coef and path == config.data:
            wanted["teacher_ds, the expert trace"] = trace
        for name, value in wanted.items():
            if not str(value or "").strip():
                raise UserError(f"{path} line {line} has no {name}: add it or drop the row")
        shown = guide_trace(trace, guide, config.domain, answer, config.prefix_ratio,
                            seed=f"{config.seed} {question}")
        problem = Problem(question, answer, trace, str(row.get("difficulty", "all")), shown,
                          leaks(shown, answer, config.domain), ids(""), ids(shown))
        problems.append(problem)
        if len(problem.guided_ids) > config.max_prompt_tokens:
            raise UserError(f"{path} line {line}: the prompt has {len(problem.guided_ids)} tokens, "
                            f"raise --max_prompt_tokens {config.max_prompt_tokens} or drop the row")
    return problems

# ---- Reward: is the last stated answer the ground truth? ------------------------------------------

STATED = re.compile(r"\\boxed\{([^{}]*)\}|####\s*([^\n]+)|answer is:?\s*([^\n]+)", re.IGNORECASE)

def number_value(text: str) -> Fraction | None:
    """The exact value of 1,234 or 42.0 or 1/4; None for what is no number."""
    try:
        return Fraction(text.replace(",", "").replace("\u2212", "-"))
    except (ValueError, ZeroDivisionError):
        return None

def same_answer(given: str, truth: str) -> bool:
    """Numbers compare by value, everything else as text."""
    given, truth = (text.strip().rstrip(".").casefold() for text in (given, truth))
    value = number_value(given)
    return given == truth if value is None else value == number_value(truth)

def reward(completion: str, ground_truth: str, domain: str) -> float:
    """1.0 if the last stated answer is right, else 0.0.

    >>> reward("Step 1: 2 + 2 = 4. The answer is 4.", "4", "math")
    1.0
    """
    stated = STATED.findall(completion)
    return float(bool(stated) and same_answer("".join(stated[-1]), ground_truth))

# ---- Rollouts -------------------------------------------------------------------------------------

@dataclass
class Group:
    """G rollouts of one problem, and the very prompt they were sampled from: the ratio's context."""
    problem: Problem
    guided: bool
    prompt_ids: list[int]
    completions: list[list[int]]  # sampled ids up to and including the first EOS
    texts: list[str]
    truncated: list[bool]  # no EOS within max_new_tokens
    rewards: list[float]

def pad(rows: list[list[int]], pad_id: int, side: str, device) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, longest). The mask goes by position: the pad token may be the EOS as well."""
    ids = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
    return pad_sequence(ids, True, pad_id, side).to(device), mask.to(device)

def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (N, L) that count real tokens only: left padding must not shift a prompt."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)

def until_eos(ids: list[int], eos_ids: list[int]) -> list[int]:
    """[5, 6, 2, 2, 2] -> [5, 6, 2] for EOS 2: the first is sampled, generate pads what follows."""
    return next((ids[: t + 1] for t, token in enumerate(ids) if token in eos_ids), ids)

@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]], group_size: int, config: Config) -> list[list[int]]:
    """`group_size` completions of each prompt: B lists of ids in, B*G lists out."""
    ids, mask = pad(prompts, tokenizer.pad_token_id, "left", model.device)  # (B, P)
    # a group shares its prompt, so read it once and copy its keys and values; generate itself reads
    # the last prompt token, to have logits to start from
    cache = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions(mask[:, :-1]),
                  use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(group_size)
    eos_ids = model.generation_config.eos_token_id
    settings = GenerationConfig(  # all of it: what is unset is not neutral (top_k would be 50)
        do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=config.max_new_tokens, eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id)
    rows = model.generate(
        ids.repeat_interleave(group_size, 0), attention_mask=mask.repeat_interleave(group_size, 0),
        past_key_values=cache, generation_config=settings)[:, ids.shape[1] :]  # (B*G, T)
    return [until_eos(row, eos_ids) for row in rows.tolist()]

def rollout(model, tokenizer, problems: list[Problem], guided: list[bool], group_size: int,
            config: Config) -> list[Group]:
    """One group a problem, sampled and rewarded, at most `generate_batch` rows at a time."""
    groups, per_call = [], max(1, config.generate_batch // group_size)
    for start in range(0, len(problems), per_call):
        part = list(zip(problems, guided, strict=True))[start : start + per_call]
        prompts = [problem.guided_ids if shown else problem.prompt_ids for problem, shown in part]
        completions = sample(model, tokenizer, prompts, group_size, config)
        for i, (problem, shown) in enumerate(part):
            ids = completions[i * group_size : (i + 1) * group_size]
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            cut = [row[-1] not in model.generation_config.eos_token_id for row in ids]
            rewards = [reward(text, problem.answer, config.domain) for text in texts]
            rewards = [0.0 if unfinished else r for r, unfinished in zip(rewards, cut, strict=True)]
            groups.append(Group(problem, shown, prompts[i], ids, texts, cut, rewards))
    return groups

def collect_rollouts(model, tokenizer, problems: list[Problem], config: Config) -> tuple[list[Group], int]:
    """The groups to learn from, and how many rollouts it took to get them."""
    fraction = float({"always": 1, "on-failure": 0}.get(config.guide_when, config.guide_when))
    at_once = round(fraction * len(problems))  # problems come in random order
    guided = [i < at_once and bool(problem.guide) for i, problem in enumerate(problems)]
    groups = rollout(model, tokenizer, problems, guided, config.group_size, config)
    failed = []
    if config.guide_when == "on-failure":
        failed = [i for i, group in enumerate(groups) if max(group.rewards) == 0 and group.problem.guide]
    second = [problems[i] for i in failed]
    second = rollout(model, tokenizer, second, [True] * len(second), config.group_size, config)
    for i, group in zip(failed, second, strict=True):
        groups[i] = group
    return groups, (len(problems) + len(failed)) * config.group_size

# ---- Advantages, log-probs, loss: the equations as pure functions ---------------------------------

def group_advantages(rewards: Tensor, group_size: int, scale: str = "std", eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps) within each group; scale "none" is Dr. GRPO. (B*G,)

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, scale="none")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    r = torch.as_tensor(rewards, dtype=torch.float32).view(-1, group_size)  # (B, G)
    A = r - r.mean(1, keepdim=True)  # (B, G)
    if scale == "std":
        A = A / (r.std(1, keepdim=True) + eps)
    # equal rewards give exactly 0, however their mean was rounded
    return (A * (r.amax(1, keepdim=True) > r.amin(1, keepdim=True))).flatten()  # (B*G,)

def token_logprobs(model, input_ids: Tensor, attention_mask: Tensor, completion_length: int,
                   temperature: float) -> Tensor:
    """log pi(o_t | c, o_<t) of the last `completion_length` tokens of every row. (N, T)"""
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask),
                   use_cache=False, logits_to_keep=completion_length + 1).logits  # (N, T+1, V)
    # the logits at t predict the token at t + 1, and it was sampled at this temperature
    logits = logits[:, :-1].float() / temperature  # (N, T, V)
    chosen = logits.gather(-1, input_ids[:, -completion_length:, None]).squeeze(-1)  # (N, T)
    return chosen - logits.logsumexp(-1)

def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28, aggregation: str = "sequence"):
    """The clipped surrogate over (N, T) tokens, mask 1 where sampled, advantages (N,); loss, stats.

    With one update a batch every ratio is 1 and a group's advantages sum to 0: the *value* is about 0,
    its gradient, -A * grad log pi, is not. Clipping can act from the second update of a batch on.
    """
    mask, A = mask.bool(), advantages[:, None]  # (N, T), (N, 1)
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # (N, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    # min for either sign of A: nothing is gained by leaving the range, and the way back stays open
    token_loss = -torch.min(ratio * A, clipped) * mask  # (N, T)
    if aggregation == "sequence":
        loss = (token_loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    else:
        loss = token_loss.sum() / mask.sum().clamp(min=1)
    return loss, {"clip_fraction": ((clipped < ratio * A) & mask).sum() / mask.sum().clamp(min=1)}

def masked_expert_loss(model, tokenizer, problems: list[Problem], domain: str) -> Tensor:
    """Mean NLL of the trace's visible tokens after the bare question; hidden spans carry none.

    No part of SMEPO: it is there to show what happens when the plan also enters the loss.
    """
    traces = tokenizer([problem.trace + tokenizer.eos_token for problem in problems],
                       add_special_tokens=False, return_offsets_mapping=True)
    visible = []
    for problem, offsets in zip(problems, traces["offset_mapping"], strict=True):
        spans = hidden_spans(problem.trace, domain, problem.answer)
        visible.append([int(all(b <= start or end <= a for start, end, _ in spans)) for a, b in offsets])
    prompts = [problem.prompt_ids for problem in problems]
    ids, attention, _ = join(prompts, traces["input_ids"], tokenizer.pad_token_id, model.device)
    mask, _ = pad(visible, 0, "right", model.device)  # (N, T)
    logprobs = token_logprobs(model, ids, attention, mask.shape[1], temperature=1.0)
    return -((logprobs * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

# ---- Update: from groups to optimizer steps -------------------------------------------------------

def join(prompts: list[list[int]], completions: list[list[int]], pad_id: int, device):
    """Ids and attention mask (N, P+T), completion mask (N, T); every completion starts at column P."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left", device)  # (N, P)
    completion_ids, mask = pad(completions, pad_id, "right", device)  # (N, T)
    return torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask], 1), mask

def micro_batches(groups: list[Group], config: Config, pad_id: int, device) -> list[dict]:
    """The rows of a mini-batch that have a gradient, at most `micro_batch` at a time.

    A row of advantage 0, as all of an all-wrong or all-right group, has none and is not scored; it
    counts in the divisor though, of which each part carries its `share`.
    """
    rewards = torch.tensor([group.rewards for group in groups])  # (B, G)
    advantages = group_advantages(rewards, config.group_size, config.advantage_scale)  # (B*G,)
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.completions]
    tokens = sum(len(ids) for _, ids in rows)
    useful = advantages.nonzero().flatten().tolist()
    useful.sort(key=lambda i: len(rows[i][0]) + len(rows[i][1]))  # equal lengths need no padding
    parts = []
    for start in range(0, len(useful), config.micro_batch):
        part = useful[start : start + config.micro_batch]
        ids, attention, mask = join(*zip(*(rows[i] for i in part), strict=True), pad_id, device)
        share = len(part) / len(rows) if config.aggregation == "sequence" else mask.sum().item() / tokens
        parts.append({"ids": ids, "attention": attention, "mask": mask, "share": share,
                      "A": advantages[part].to(device)})
    return parts

def score(model, part: dict, config: Config) -> Tensor:
    length = part["mask"].shape[1]
    return token_logprobs(model, part["ids"], part["attention"], length, config.temperature)  # (N, T)

def backward(model, parts: list[dict], config: Config) -> Counter:
    """Add up the gradient of a mini-batch, part by part; sums of what is reported."""
    sums = Counter()
    for part in parts:
        logprobs = score(model, part, config)
        old = part.setdefault("old", logprobs.detach())  # not there yet: pi is still pi_old
        loss, stats = policy_loss(logprobs, old, part["A"], part["mask"], config.clip_low,
                                  config.clip_high, config.aggregation)
        (loss * part["share"]).backward()
        tokens = part["mask"].sum().item()
        sums.update(loss=loss.item() * part["share"], clipped=stats["clip_fraction"].item() * tokens,
                    surprise=-(old * part["mask"]).sum().item(), tokens=tokens)
    return sums

def update(model, tokenizer, optimizer, groups: list[Group], config: Config) -> dict:
    """`mini_batches` optimizer steps, `inner_epochs` times over; their average statistics."""
    size = len(groups) // config.mini_batches
    mini_batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    batches = [micro_batches(m, config, tokenizer.pad_token_id, model.device) for m in mini_batches]
    if len(batches) * config.inner_epochs > 1:  # pi_old scores all before anything moves
        with torch.no_grad():
            for part in sum(batches, []):
                part["old"] = score(model, part, config)
    sums = Counter()
    for parts, members in list(zip(batches, mini_batches, strict=True)) * config.inner_epochs:
        if not parts and not config.expert_coef:
            continue  # no group has both right and wrong rollouts: no signal, no step
        optimizer.zero_grad()
        sums.update(backward(model, parts, config))
        for group in members if config.expert_coef else []:  # one at a time bounds its memory
            loss = masked_expert_loss(model, tokenizer, [group.problem], config.domain)
            loss = loss * config.expert_coef / len(members)
            loss.backward()
            sums.update(loss=loss.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        if not math.isfinite(grad_norm + sums["loss"]):
            raise UserError("the loss is not finite: this step is refused, the last checkpoint stays; "
                            "try a lower --learning_rate under a new --name")
        optimizer.step()
        sums.update(steps=1, grad_norm=grad_norm)
    steps, tokens = max(sums["steps"], 1), max(sums["tokens"], 1)
    # -log pi_old over what pi_old sampled is an unbiased estimate of its entropy
    return {"loss": sums["loss"] / steps, "grad_norm": sums["grad_norm"] / steps,
            "clip_fraction": sums["clipped"] / tokens, "entropy": sums["surprise"] / tokens}

# ---- Evaluation: unguided by construction ---------------------------------------------------------

def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right (arXiv 2107.03374): pass_at_k(4, 1, 2) = 0.5"""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)

def evaluate(model, tokenizer, problems: list[Problem], samples: int, config: Config) -> dict:
    """{"pass@1": {difficulty: [mean, standard error], ..., "mean": [...]}, "pass@<samples>": ...}

    Errors are over problems, for samples of one problem are not independent. No guide is ever shown.
    """
    start = time.perf_counter()
    groups = rollout(model, tokenizer, problems, [False] * len(problems), samples, config)
    table = {}
    for k in sorted({1, samples}):
        row = table[f"pass@{k}"] = {}
        for level in sorted({problem.difficulty for problem in problems}):
            p = torch.tensor([pass_at_k(samples, round(sum(group.rewards)), k)
                              for group in groups if group.problem.difficulty == level])
            row[level] = [p.mean().item(), (p.std(correction=0) / len(p) ** 0.5).item()]
        mean, variance = (sum(pair[0] for pair in row.values()), sum(pair[1] ** 2 for pair in row.values()))
        row["mean"] = [mean / len(row), variance**0.5 / len(row)]  # every difficulty weighs the same
    return table | {"seconds_evaluation": time.perf_counter() - start}

# ---- The run folder: at whatever instant the process dies, --resume works -------------------------

LOGS = ("metrics.jsonl", "rollouts.jsonl")

def open_run(config: Config) -> Path:
    """Make runs/<name>/ or, with --resume, see that it belongs to these settings."""
    folder, settings = Path("runs") / config.name, dataclasses.asdict(config)
    path, new = folder / "config.json", folder / "config.json.new"
    if path.exists():
        if not config.resume:
            raise UserError(f"{folder} holds a run: --resume continues it, --name NEW starts another")
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [f"--{key} {before.get(key)}" for key in settings if settings[key] != before.get(key)
                 and key not in ("resume", "steps", "device")]  # it may go on for longer, or elsewhere
        if other:
            raise UserError(f"{folder} belongs to another config: resume it with {' '.join(other)}")
    folder.mkdir(parents=True, exist_ok=True)
    new.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)
    if (folder / "checkpoint.old").exists() and not (folder / "checkpoint").exists():
        os.replace(folder / "checkpoint.old", folder / "checkpoint")
    return folder

def save_checkpoint(folder: Path, model, tokenizer, optimizer, step: int) -> None:
    """Written aside and swapped in by two renames; a kill between them leaves the last one as .old."""
    new, current, old = (folder / f"checkpoint{suffix}" for suffix in (".new", "", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    # every step seeds its own sampling, so no RNG state is kept; resuming cuts the logs to `sizes`
    sizes = {name: (folder / name).stat().st_size for name in LOGS}
    torch.save({"step": step, "sizes": sizes, "optimizer": optimizer.state_dict()}, new / "training.pt")
    if current.exists():
        os.replace(current, old)
    os.replace(new, current)
    shutil.rmtree(old, ignore_errors=True)

def restore(folder: Path, optimizer) -> int:
    """Load the optimizer, cut the logs back to the checkpoint; the number of steps already done."""
    state = {"step": 0, "sizes": dict.fromkeys(LOGS, 0)}
    if (folder / "checkpoint").exists():
        state = torch.load(folder / "checkpoint" / "training.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    for name, size in state["sizes"].items():
        (folder / name).touch()
        os.truncate(folder / name, size)
    return state["step"]

def load_model(path: str | Path, device: str):
    """Model, in float32, and tokenizer, both fit for rollouts."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path} cannot be loaded: {str(error).splitlines()[0]}") from error
    for part in ("chat_template", "pad_token", "eos_token"):
        if getattr(tokenizer, part) is None:
            raise UserError(f"the tokenizer in {path} has no {part}: set one and save it there")
    # chat models have several EOS ids; whatever else the folder recommends would bend the rollouts
    eos_ids = model.generation_config.eos_token_id or []
    eos_ids = {tokenizer.eos_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])}
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids),
                                               pad_token_id=tokenizer.pad_token_id)
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    return model.to(device).eval(), tokenizer  # eval for good: dropout would bend the ratio

# ---- Training -------------------------------------------------------------------------------------

def draw(problems: list[Problem], step: int, config: Config) -> list[Problem]:
    """The problems of a step, a pure function of it: every epoch is one shuffle of all problems."""
    first, size = step * config.prompts_per_step, len(problems)
    order = {}
    for at in range(first, first + config.prompts_per_step):
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + at // size)
        order[at] = torch.randperm(size, generator=rng)[at % size].item()
    return [problems[i] for i in order.values()]

def train_step(model, tokenizer, optimizer, problems: list[Problem], step: int, config: Config):
    """Sample, reward, learn; the metrics (README: glossary) and the groups."""
    torch.manual_seed(config.seed * 1_000_003 + step)
    start = time.perf_counter()
    groups, sampled = collect_rollouts(model, tokenizer, draw(problems, step, config), config)
    seconds_rollout = time.perf_counter() - start
    stats = update(model, tokenizer, optimizer, groups, config)
    seconds = time.perf_counter() - start
    rewards = torch.tensor([group.rewards for group in groups])  # (B, G)
    equal = rewards.amax(1) == rewards.amin(1)  # (B,)
    lengths = [len(ids) for group in groups for ids in group.completions]
    guides = [group.problem.leaky for group in groups if group.guided]
    length = sum(lengths) / len(lengths)
    return groups, {
        "step": step + 1, "reward": rewards.mean().item(),
        "zero_variance_wrong": (equal & (rewards[:, 0] == 0)).float().mean().item(),
        "zero_variance_right": (equal & (rewards[:, 0] > 0)).float().mean().item(),
        "completion_length": length,
        "truncated": sum(sum(group.truncated) for group in groups) / len(lengths),
        "guided": len(guides) / len(groups), "leak_rate": sum(guides) / max(1, len(guides)), **stats,
        "rollouts": sampled, "rollouts_per_second": sampled / seconds,
        "tokens_per_second": sampled * length / seconds_rollout,
        "seconds_rollout": seconds_rollout, "seconds_update": seconds - seconds_rollout,
    }

STOP = threading.Event()  # set by Ctrl-C: the step is finished and saved before the process ends

def append(path: Path, records: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

def train(config: Config) -> Path:
    """From the base, or the last checkpoint, to config.steps; returns the run folder."""
    folder = open_run(config)
    saved = folder / "checkpoint"
    model, tokenizer = load_model(saved if saved.exists() else config.model, config.device)
    problems = load_problems(config.data, config.guide, tokenizer, config)
    tests = load_problems(config.test_data, "none", tokenizer, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    done, accuracy = restore(folder, optimizer), math.nan
    if done == 0:
        print_start(model, tokenizer, problems, tests, config)
        before = evaluate(model, tokenizer, tests, config.eval_samples, config)
        append(folder / "metrics.jsonl", [{"step": 0} | before])
    bar = tqdm(range(done, config.steps), initial=done, total=config.steps)
    for step in bar:
        groups, metrics = train_step(model, tokenizer, optimizer, problems, step, config)
        last = step + 1 == config.steps
        if last or (step + 1) % config.eval_every == 0:
            samples = config.eval_samples if last else 1
            metrics |= evaluate(model, tokenizer, tests, samples, config)
            accuracy = metrics["pass@1"]["mean"][0]
        append(folder / "metrics.jsonl", [metrics])
        append(folder / "rollouts.jsonl", [
            {"step": step + 1, "question": group.problem.question, "completions": group.texts,
             "guide": group.problem.guide if group.guided else "", "rewards": group.rewards}
            for group in groups])
        if last or STOP.is_set() or (step + 1) % config.save_every == 0:
            save_checkpoint(folder, model, tokenizer, optimizer, step + 1)
        bar.set_postfix_str("reward {reward:.2f}, all wrong {zero_variance_wrong:.2f}, all right "
                            "{zero_variance_right:.2f}".format(**metrics) + f", unguided {accuracy:.3f}")
        if STOP.is_set() and not last:
            raise KeyboardInterrupt
    return folder

# ---- What the reader sees, and main ---------------------------------------------------------------

def print_start(model, tokenizer, problems: list[Problem], tests: list[Problem], config: Config) -> None:
    size = sum(parameter.numel() for parameter in model.parameters())
    leaky = sum(problem.leaky for problem in problems) / len(problems)
    print(f"model  {config.model}: {size / 1e6:.2f} M parameters on {model.device}")
    print(f"data   {len(problems)} problems to train on, {len(tests)} held out and asked unguided")
    print(f"guide  {config.guide}, {config.guide_when}; {leaky:.1%} of the guides give the answer away")
    print(f"train  {config.steps} steps of {config.prompts_per_step} problems x {config.group_size} "
          f"rollouts, learning rate {config.learning_rate:g}, seed {config.seed}")
    torch.manual_seed(config.seed)
    group = rollout(model, tokenizer, problems[:1], [bool(problems[0].guide)], 2, config)[0]
    for name, text in {"question": problems[0].question, "expert trace": problems[0].trace,
                       "shown to the policy": problems[0].guide or "(nothing)",
                       "a completion": group.texts[0], "its reward": f"{group.rewards[0]:g}"}.items():
        print(f"\n{name}\n    " + text.replace("\n", "\n    "))
    print()

def report(folder: Path) -> None:
    """The table before -> after, and curve.png if matplotlib is there."""
    records = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    points = [record for record in records if "pass@1" in record]
    before, after = points[0]["pass@1"], points[-1]["pass@1"]
    print(f"\nunguided accuracy  step 0           step {points[-1]['step']:<11} change")
    for level, (mean, error) in before.items():
        then, then_error = after[level]
        print(f"difficulty {level:<6}  {mean:.3f} ± {error:.3f}    {then:.3f} ± {then_error:.3f}    "
              f"{then - mean:+.3f}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curve.png: it needs matplotlib")
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([r["step"] for r in records[1:]], [r["reward"] for r in records[1:]], color="0.7",
              label="training reward (guided)" )
    axes.errorbar([r["step"] for r in points], [r["pass@1"]["mean"][0] for r in points],
                  [r["pass@1"]["mean"][1] for r in points], marker="o", label="unguided accuracy")
    axes.set(xlabel="step", ylim=(0, 1), title=folder.name)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=150)

def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    parser = HfArgumentParser(Config, exit_on_error=False, usage="python smepo.py [--flag value ...]")
    try:
        config, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            raise UserError(f"unknown flag {unknown[0]}: --help lists them all")
        folder = train(config)
        report(folder)
        print(f"\n{folder} holds it all; {time.perf_counter() - start:.0f} s")
    except (UserError, argparse.ArgumentError) as error:
        print(f"smepo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0

def stop_after_step(*_):
    STOP.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop_after_step)
    sys.exit(main())
