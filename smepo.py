# SPDX-License-Identifier: MIT
"""SMEPO, Semantic Masked Expert Policy Optimization (arXiv 2605.25198), in one file.

Where all rollouts of a group fail, GRPO learns nothing. An expert's solution in the prompt helps,
but it shows what the verifier checks: the policy copies it. So show it without the spans that the
reward depends on (in math, the numbers):

    question x   Compute 7 - 6 + 3 * 5
    trace        Step 1: 3 * 5 = 15. Step 2: 7 - 6 = 1. ...
    shown        Step 1: [NUMBER] * [NUMBER] = [NUMBER]. Step 2: [NUMBER] - ...

The policy follows the plan but must reconstruct every value. All else is on-policy GRPO with
another prompt c, and the evaluation shows no trace. By function:

    guide_trace       c = x + mask(trace), as build_prompt writes it
    rollout           o_1..o_G ~ pi_old(. | c)
    math_rewards      r_i = verifier(o_i, a), 1 if right
    group_advantages  A_i = (r_i - mean r) / (std r + eps)
    token_logprobs    log pi(o_t | c, o_<t), for the ratio rho_t = pi / pi_old
    policy_loss       -1/(BG) sum_i 1/|o_i| sum_t min(rho_t A_i, clip(rho_t, 1-low, 1+high) A_i)

The ratio's context is c, guide included, in pi and in pi_old: the rollout was sampled there.
B problems, G rollouts of each, N rows (B*G or fewer), P prompt and T completion tokens, V words.

    python smepo.py                 it learns on a laptop, in a minute
    python smepo.py --guide none    GRPO; --help lists every setting

The algorithm is lines 116 to 680, half an hour to read; below it are data, disk and flags. Left
out: a KL term, as in the paper; for tiny_tasks/, other schemas of data (prepare), all of
mathematics (math_verify), code and search, arms side by side (compare), several GPUs (export).
"""

import argparse
import inspect
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

import datasets
import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging

TASKS = Path(__file__).resolve().parent / "tiny_tasks"


class UserError(Exception):
    """An expected mistake: what is wrong, and how to mend it."""


# ---- Config: every field is a flag ----
@dataclass
class Config:
    guide: Literal["none", "full", "prefix", "random", "semantic"] = "semantic"  # what is shown
    guide_when: str = "always"  # always, on-failure, fade or a fraction
    task: Literal["arithmetic", "code", "search"] = "arithmetic"  # a toy: model, data, domain
    model: str = ""  # a Hugging Face folder or hub id
    data: str = ""  # jsonl, parquet, a folder or a hub id
    test_data: str = ""  # held-out problems, asked unguided
    domain: str = ""  # what is hidden and rewarded: math, or your module
    system: str = ""  # the system prompt
    out: str = ""  # the run folder, else one in runs/
    resume: str = ""  # the run folder to go on in
    steps: int = 60  # rollout batches (paper: 400)
    prompts_per_step: int = 16  # B, problems of a batch (paper: 32)
    group_size: int = 8  # G, rollouts of each (paper: 8)
    mini_batches: int = 1  # optimizer steps of a batch (paper: 4)
    micro_batch: int = 128  # rows per forward pass, a quarter of generate's; no memory? halve
    learning_rate: float = 2e-4  # of AdamW (paper, 8B: 1e-6)
    grad_clip: float = 1.0  # largest gradient norm
    clip_low: float = 0.2  # the ratio's lower bound is 1 - clip_low
    clip_high: float = 0.28  # its upper bound 1 + clip_high: rare tokens can grow
    advantage_scale: Literal["std", "none"] = "std"  # none: as in Dr. GRPO
    expert_coef: float = 0.0  # of masked_expert_loss; not in the paper
    temperature: float = 1.0  # of sampling and scoring alike (paper: 0.8)
    max_prompt_tokens: int = 256  # a longer one is left out
    max_new_tokens: int = 64  # without an end by then it earns 0
    eval_every: int = 20  # steps between evaluations, with checkpoints
    eval_samples: int = 4  # samples of each test problem
    seed: int = 0  # same seed, same machine, same result
    device: str = ""  # cpu, cuda, mps; else the best there is
    threads: int = 1  # of the CPU; a larger model wants more

    def __post_init__(self):
        lowest = {"seed": 0, "group_size": 2, "temperature": 0.01}
        for name, value in asdict(self).items():
            low = lowest.get(name, int(isinstance(getattr(Config, name), int)))
            if isinstance(value, int | float) and not low <= value < 2**31:  # nan is not
                raise UserError(f"--{name} {value}: it must be from {low} to 2147483647")
        if not re.fullmatch(r"always|on-failure|fade|0?\.\d+|[01](\.0*)?", self.guide_when):
            raise UserError(f"--guide_when {self.guide_when}: always, on-failure, fade or 0 to 1")
        if self.prompts_per_step % self.mini_batches:
            raise UserError(f"--mini_batches {self.mini_batches} must divide --prompts_per_step")
        if self.data.endswith(("jsonl", "parquet")) and not self.test_data:
            raise UserError(f"--data {self.data} is one file: give --test_data, too")
        self.test_data = self.test_data or self.data
        self.domain = self.domain or self.task.replace("arithmetic", "math")


# ---- The guide: what is shown of a trace ----
@dataclass
class Domain:
    """What the verifier reads, the mask must hide: they stand together. A whole colors.py, beside
    smepo.py, for --domain colors:

        import re, smepo
        DOMAIN = smepo.Domain(
            spans=lambda trace, _: [(*m.span(), "[COLOR]") for m in re.finditer("red|blue", trace)],
            leaks=lambda masked, answer: answer in masked,
            rewards=lambda texts, truths: [float(b in a) for a, b in zip(texts, truths)])"""

    spans: Callable  # (trace, answer) -> [(start, end, mask), ...]: what the reward depends on
    leaks: Callable  # (masked, answer) -> bool: can the answer still be read off?
    rewards: Callable  # (completions, truths) -> floats, each from 0 to 1
    solved_from: float = 1.0  # the least reward that counts as solved
    converse: Callable = None  # in turns: (model, tokenizer, prompts, config) -> ids, sampled
    told: re.Pattern = None  # what the environment of such turns has written, in a trace


def find_domain(name):
    """Math is in this file; any other is a module with a DOMAIN."""
    if name == "math":
        return MATH
    return import_module(f"tiny_tasks.{name}.domain" if (TASKS / name).exists() else name).DOMAIN


def hidden_spans(trace, domain, answer=""):
    """Left to right; some overlap."""
    return sorted(find_domain(domain).spans(trace, answer))


def random_spans(trace, spans, seed):
    """As many words and signs as the spans hold, anywhere."""
    pieces = [match.span() for match in re.finditer(r"\w+|[^\w\s]", trace)]
    hidden = [piece for piece in pieces if any(a <= piece[0] < b for a, b, _ in spans)]
    chosen = random.Random(seed).sample(pieces, len(hidden))
    return sorted((*piece, spans[0][2]) for piece in chosen)


def replace_spans(trace, spans):
    text, end = "", 0
    for a, b, mask in spans:
        if a >= end:  # else they overlap: one mask
            text += trace[end:a] + mask
        end = max(end, b)
    return text + trace[end:]


def guide_trace(trace, guide, domain, answer="", prefix_ratio=0.5, seed="") -> str:
    """What is shown: none (GRPO), full, prefix (in whole lines), random, semantic (SMEPO)."""
    if guide == "none":
        return ""
    if guide == "full":
        return trace
    if guide == "prefix":
        lines = trace.split("\n")
        return "\n".join(lines[: max(1, int(len(lines) * prefix_ratio))])
    spans = hidden_spans(trace, domain, answer)
    if guide == "random":
        spans = random_spans(trace, spans, seed)
    return replace_spans(trace, spans)


def mask_trace(trace, domain, answer="") -> str:
    """Hide what is rewarded, keep the plan."""
    return guide_trace(trace, "semantic", domain, answer)


def leaks(masked, answer, domain) -> bool:
    return find_domain(domain).leaks(masked, answer)


def reward(completion, ground_truth, domain) -> float:
    """Of one completion."""
    return find_domain(domain).rewards([completion], [ground_truth])[0]


# ---- Math: what the verifier reads ----
BRACED = r"[^{}]"  # between braces, themselves balanced, four deep
for _ in range(3):
    BRACED = r"(?:[^{}]|\{" + BRACED + r"*\})"
LAST_BOX = re.compile(r"(?s:.*)\\(?:boxed|fbox)\s?(?:\{(" + BRACED + r"*)\}|(\w))")
LAST_STATED = re.compile(
    r"(?s:.*)(?:####|<answer>|(?i:answer is|answer\**:))[\s:*$`]*(?:\\\[\s*)?"
    r"(.*?)(?:[.](?=\s|$)|</|$)",  # up to the end of its sentence
    re.MULTILINE,
)
CHOICE = r"\(?[A-J]\)?"  # an answer that is the letter of an option
STATED_CHOICE = re.compile(r"^\(?([A-J])(?:[):.]\s*+|\s++(?=[a-z]))(?!and\b|or\b|,)(?s:.*)")
TYPESETTING = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf)\s?\{([^{}]*)\}|\\?[$%]|\\[!,;()\[\]]|(?<=\\)[dt](?=frac)"
)


def stated(text):
    r"""The last \boxed{...}; without one the last ####, <answer>, "answer is" or "answer:"."""
    match = LAST_BOX.match(text) or LAST_STATED.match(text)
    return match[match.lastindex].strip() if match else ""


def clean(text):
    r"""Without what only typesets: `$\text{(B)}$.` is `(B)`."""
    text = TYPESETTING.sub(r"\1", text.replace("−", "-"))
    return text.lstrip(" \n*`").rstrip(" \n*`.")


def plain(text):
    r"""What is compared: `$\text{(B)}$.` is `b`."""
    text = re.sub(r"\s", "", clean(text)).casefold()
    return re.sub(r"^\((\w)\)$", r"\1", text)


def number_value(text):
    r"""Of 1,234, -42.0, .5, 3/4, \frac{3}{4}, 50% (as 50); None of all else."""
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", clean(text))
    text = re.sub(r"(?<!\d)\\frac\s*\{?(-?\s*\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?", r"\1/\2", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    known = re.fullmatch(r"[-+]?(?=.{1,999}$)(?:\d+/0*[1-9]\d*|\d+\.?\d*|\.\d+)", text)
    return Fraction(text) if known else None


def same_answer(given, truth):
    """Numbers by value, an option by its letter (C, "(C) 5", "C: the third"), else as text."""
    value = number_value(truth)
    if value is not None:
        return number_value(given) == value
    if re.fullmatch(CHOICE, clean(truth)):
        given = STATED_CHOICE.sub(r"\1", clean(given))
    return plain(truth) != "" and plain(given) == plain(truth)


def math_rewards(texts, truths):
    """1.0 where the stated answer is right, else 0.0."""
    return [float(same_answer(stated(a), b)) for a, b in zip(texts, truths)]


# ---- Math: what is hidden ----
WORD = (
    r"(?:zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|million"
    r"|billion|dozen|(?:twen|thir|four|for|fif|six|seven|eigh|nine)(?:teen|ty))"
)
LABEL = (  # what a number may follow as its name
    r"\b(?:STEP|Step|Case|Subcase|Part|Stage|Lemma|Theorem|Corollary|Proposition|Claim|Remark"
    r"|Definition|Method|Solution|Problem|Question|Example|Section|Table|Figure|[Ee]quation|Eq)"
)
ID = r"\(?\d{1,3}(?:\.\d{1,3})*\)?(?!\d|[.,]\d|\s?(?:[=^+<>%*/×·]|\\[ct]))"
LIST = r"^[ \t>*_#-]*(?:\(\d{1,2}\)|\d{1,2}(?:\.\d+)*[.):]|(?<=# )\d[\d.]*)"
SIGN = r"(?:(?<![\w)\]}'!])(?<![\d)\]}] )(?<!\b\w )[-+−])?"  # no operator, as in n-3 and 7 - 6
DIGITS = r"(?:\d+(?:(?:,|\{,\})\d{3}(?!\d))*(?:\.\d+)?|\.\d+)"

# What matches first wins: "Step 1" is kept before its 1 can be a number. Each has its example.
KEEP = {
    r"\[(?:NUMBER|ANSWER)\]": "[NUMBER]",
    rf"{LABEL}[ ~.#]{{0,2}}{ID}": "Step 1",
    rf"{LABEL}s[ ~]{ID}(?:(?:,|,? and| to) {ID})*": "Cases 1, 2 and 3",
    LIST + r"(?=[*_]*[ \t]+\S)": "1. Let",
    r"(?<!log)(?<!int)(?<!sum)_(?:\d+|\{[\w+*, -]{1,20}\})|[₀-₉]+": "x_1",
    r"\\(?:tag|label|(?:eq)?ref)\*?\{[^{}]*\}": r"\tag{1}",
}
HIDE = {
    rf"(?<![A-Za-z])(?i:(?:one[ -])?{WORD}(?:[ -](?:one|{WORD}))*)\b": "forty-two",
    r"[¼-¾⅐-⅞⁺⁻⁰¹²³⁴-⁹]+": "½",
    SIGN + DIGITS + r"(?: ?\\?%|(?:st|nd|rd|th)\b)?": "-1,234.5%",
}
KEPT = re.compile("|".join(KEEP), re.MULTILINE)
# That letter in a trace: it is no article, no variable, no function.
OPTION = r"(?<![A-Za-z\\'’])(?![AI] (?!is|are|and|or)[a-z])[A-J](?![\w'’^(]|\s?=)"


def unkept(trace, pattern, mask):
    """The spans of a pattern, but for what is kept."""
    found = re.finditer(rf"{KEPT.pattern}|({pattern})", trace, re.MULTILINE)
    return [(*match.span(), mask) for match in found if match[1]]


def answer_spans(trace, answer):
    """An answer that is no number. Of options all letters are hidden: one gap would tell which."""
    answer = clean(answer)
    if not re.search(r"\w", answer) or number_value(answer) is not None:
        return []
    pattern = OPTION
    if not re.fullmatch(CHOICE, answer):
        pieces = map(re.escape, re.findall(r"\\?[A-Za-z]+|[^\s{}$]", answer))
        text = r"[\s{}$]*".join(pieces) + r"\}?" * answer.endswith("}")
        pattern = rf"(?<![A-Za-z\d\\])(?i:{text})(?![A-Za-z\d])"
    return unkept(trace, pattern, "[ANSWER]")


def math_spans(trace, answer):
    """Numbers, and the answer: given, or what the trace states."""
    answers = answer_spans(trace, answer or stated(trace))
    return answers + unkept(trace, "|".join(HIDE), "[NUMBER]")


def math_leaks(masked, answer):
    """Is the answer's value or text visible? If in doubt, yes. Its patterns for numbers are not the
    mask's, to see what that misses."""
    text = KEPT.sub(" ", masked)
    value = number_value(answer)
    if value is not None:  # a sign may be an operator: [NUMBER] - 17
        fraction = r"\\[dt]?frac\{\d+\}\{\d+\}|\d+/\d+"
        numbers = re.findall(rf"{fraction}|\d+(?:,\d{{3}})+(?:\.\d+)?|\d*\.?\d+", text)
        spelled = re.search(rf"(?i)\b{WORD}\b", text)
        return bool(spelled) or abs(value) in map(number_value, numbers)
    if re.fullmatch(CHOICE, clean(answer)):
        letter = clean(answer).strip("()")
        return bool(re.search(rf"(?<![A-Za-z]){letter}(?![\w^(]| [a-z=])", text))
    pieces = re.compile(r"[a-z]+|\d|[^\w\s{}$]")
    wanted, visible = (" ".join(pieces.findall(clean(t).casefold())) for t in (answer, text))
    return wanted != "" and f" {wanted} " in f" {visible} "


MATH = Domain(spans=math_spans, leaks=math_leaks, rewards=math_rewards)


# ---- Problems and prompts ----
@dataclass
class Problem:
    question: str
    answer: str  # the ground truth
    trace: str = ""  # the expert's solution, if there is one
    difficulty: str = "all"  # groups the evaluation
    guide: str = ""  # what the policy may be shown of the trace
    prompts: tuple = ()  # without the guide and with it: indexed by "is it guided?"


def build_messages(question, guide_text="", system=""):
    """The guide stands as a finished assistant turn before the one to be written."""
    turns = {"system": system, "user": question}
    if guide_text:
        turns["assistant"] = "Here is an example solution:\n" + guide_text
    return [{"role": role, "content": text} for role, text in turns.items() if text]


def build_prompt(tokenizer, question, guide_text="", system="") -> str:
    messages = build_messages(question, guide_text, system)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = all(text.strip() in prompt for text in (question, guide_text, system))
    if not whole or prompt.rstrip().endswith(tokenizer.eos_token):
        raise UserError("the chat template drops a part, or opens no turn after it")
    return prompt


def read_problems(path, guide, config, split="train"):
    """Rows as officially released, {"question": "...", "reward_model": {"ground_truth": "16"},
    "teacher_ds": "Step 1: ...", "difficulty": 2}; teacher_ds for a guide, difficulty if any."""
    path = path or str(TASKS / config.task / f"{split}.jsonl")
    needs_trace = guide != "none" or (config.expert_coef > 0 and split == "train")
    problems = []
    for number, row in enumerate(read_rows(path, split), start=1):
        truth = (row.get("reward_model") or {}).get("ground_truth")
        answer = "" if truth is None else str(truth).strip()
        trace = row.get("teacher_ds") or ""
        if not row.get("question") or not answer or (needs_trace and not trace):
            lacks = "has no question, ground_truth or teacher_ds: python -m tiny_tasks.prepare"
            raise UserError(f"{path} row {number} {lacks}")
        level = row.get("difficulty")
        p = Problem(row["question"], answer, trace, "all" if level is None else str(level))
        seed = f"{config.seed} {p.question}"
        p.guide = guide_trace(trace, guide, config.domain, answer, seed=seed)
        problems.append(p)
    return problems


def load_problems(path, guide, tokenizer, config, split="train"):
    """Those whose prompts are short enough, with these."""
    problems = read_problems(path, guide, config, split)
    for p in problems:
        texts = [build_prompt(tokenizer, p.question, g, config.system) for g in ("", p.guide)]
        # the chat template has written the special tokens
        p.prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = [len(p.prompts[True]) for p in problems]
    fitting = [p for p, n in zip(problems, lengths) if n <= config.max_prompt_tokens]
    leaky = sum(leaks(p.guide, p.answer, config.domain) for p in fitting)
    print(f"{split}: {len(fitting)} of {len(problems)} prompts fit, {leaky} leak the answer")
    if not fitting:
        raise UserError(f"--max_prompt_tokens: the shortest prompts have {sorted(lengths)[:3]}")
    return fitting


# ---- Rollouts ----
@dataclass
class Rollout:
    problem: Problem
    guided: bool
    prompt_ids: list[int]  # the very prompt it was sampled from: the context of the ratio
    ids: list[int]  # the completion, its EOS included
    sampled: list[int]  # 1 for each that the policy chose, 0 for an environment's
    text: str
    ended: bool  # with an EOS; else it was cut off
    reward: float
    solved: bool  # not the same where a domain pays in parts
    advantage: float = 0.0


def pad(rows, device):
    """Ids and attention mask, padded on the left, (N, longest)."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    ids = pad_sequence(tensors, True, -1, "left")  # -1 is no token, as EOS is
    return ids.clamp(min=0), (ids >= 0).long()


def until_eos(ids, eos_ids):
    """The first EOS counts; generate has padded what follows."""
    ends = [t + 1 for t, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0]] if ends else ids


def sample(model, prompts, config, stops=None):
    """A completion of each prompt; `stops` are generate's stopping_criteria."""
    eos_ids = model.generation_config.eos_token_id
    settings = GenerationConfig(  # top_k, left out, would be 50
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=eos_ids[0],
    )
    completions = []
    for part in chunks(prompts, 4 * config.micro_batch):
        ids, mask = pad(part, model.device)  # (N, P)
        rows = model.generate(ids, settings, attention_mask=mask, stopping_criteria=stops)
        completions += rows[:, ids.shape[1] :].tolist()  # of (N, P+T)
    return [until_eos(row, eos_ids) for row in completions]


def rollout(model, tokenizer, asked, config, n=1):
    """A group for each (problem, is it guided?): n rollouts of one prompt."""
    domain = find_domain(config.domain)
    rows = [pair for pair in asked for _ in range(n)]
    prompts = [p.prompts[g] for p, g in rows]
    if domain.converse:
        ids, sampled = domain.converse(model, tokenizer, prompts, config)
    else:
        ids = sample(model, prompts, config)
        sampled = [[1] * len(row) for row in ids]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ended = [row[-1] in model.generation_config.eos_token_id for row in ids]
    # what was cut off has stated no answer
    finished = [text if end else "" for text, end in zip(texts, ended)]
    rewards = domain.rewards(finished, [p.answer for p, _ in rows])
    solved = [r >= domain.solved_from for r in rewards]
    parts = zip(rows, prompts, ids, sampled, texts, ended, rewards, solved)
    return chunks([Rollout(p, g, *rest) for (p, g), *rest in parts], n)


def shows_guide(problem, step, config, failed=False) -> bool:
    """Asked before a group is sampled; again, with failed=True, if it was unguided and all wrong.
    Your schedule goes here."""
    if config.guide_when == "always":
        return True
    if config.guide_when == "on-failure":
        return failed
    if config.guide_when == "fade":
        chance = 1 - step / (0.6 * config.steps)  # none in the last 40 %
    else:
        chance = float(config.guide_when)
    return random.Random(f"{config.seed} {step} {problem.question}").random() < chance


def collect_rollouts(model, tokenizer, problems, step, config):
    """B groups of G to learn from."""
    G = config.group_size
    asked = [(p, bool(p.guide and shows_guide(p, step, config))) for p in problems]
    groups = rollout(model, tokenizer, asked, config, G)
    again = []  # a second chance, guided
    for i, p in enumerate(problems):
        failed = not any(r.guided or r.solved for r in groups[i])
        if failed and p.guide and shows_guide(p, step, config, failed=True):
            again.append(i)
    second = rollout(model, tokenizer, [(problems[i], True) for i in again], config, G)
    for i, group in zip(again, second):
        groups[i] = group
    return groups


# ---- Advantages, log-probs, loss ----
def group_advantages(rewards, group_size, scale="std", eps=1e-6):
    """A_i = (r_i - mean r) / (std r + eps): rewards 1 0 0 0 -> 1.5 -.5 -.5 -.5. (B*G,)"""
    r = torch.as_tensor(rewards, dtype=torch.float32).view(-1, group_size)  # (B, G)
    r = r - r[:, :1]  # equal rewards give A = 0, exactly
    A = r - r.mean(1, keepdim=True)  # (B, G)
    if scale == "std":
        A = A / (r.std(1, keepdim=True) + eps)  # over n - 1
    return A.flatten()


def token_logprobs(model, input_ids, attention_mask, completion_length, temperature):
    """log pi(o_t | c, o_<t) of the last `completion_length` tokens of every row. (N, T)"""
    T = completion_length
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # (N, P+T): padding shifts nothing
    inputs = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": False}
    logits = model(input_ids, **inputs, logits_to_keep=T + 1).logits  # (N, T+1, V)
    logits = logits[:, :-1].float() / temperature  # those at t are of token t + 1
    tokens = input_ids[:, -T:, None]  # (N, T, 1)
    return logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)  # (N, T)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.28):
    """Of (N, T) tokens, mask 1 if sampled, and (N,) advantages. At a batch's first update every
    ratio is 1 and advantages sum to 0: the *value* is 0, its gradient, -A * grad log pi, is not."""
    mask, A = mask.bool(), advantages[:, None]  # (N, T), (N, 1)
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # (N, T)
    unclipped = ratio * A
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    # min, whatever A's sign: to leave the range gains nothing, the way back is open
    token_loss = -torch.min(unclipped, clipped) * mask
    loss = (token_loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    stopped = (clipped < unclipped) & mask
    return loss, {"clip_fraction": stopped.sum() / mask.sum().clamp(min=1)}


def masked_expert_loss(model, tokenizer, problem, domain):
    """Mean NLL of the trace's visible tokens, given the question alone. No part of SMEPO."""
    unseen = [span[:2] for span in hidden_spans(problem.trace, domain, problem.answer)]
    if told := find_domain(domain).told:
        unseen += [match.span() for match in told.finditer(problem.trace)]
    text = problem.trace + tokenizer.eos_token
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    visible = [all(end <= a or b <= start for a, b in unseen) for start, end in offsets]
    ids = torch.tensor([problem.prompts[False] + tokens["input_ids"]], device=model.device)
    logprobs = token_logprobs(model, ids, torch.ones_like(ids), len(visible), 1.0)  # (1, T)
    return -logprobs[0, visible].mean()


# ---- Update ----
def score(model, rollouts, config):
    """log pi of the last T tokens of N rollouts, and 1 where the policy chose one. (N, T)"""
    ids, attention_mask = pad([r.prompt_ids + r.ids for r in rollouts], model.device)  # (N, P+T)
    sampled, _ = pad([r.sampled for r in rollouts], model.device)  # (N, T)
    T = sampled.shape[1]  # a shorter row begins in its prompt, where sampled is 0
    return token_logprobs(model, ids, attention_mask, T, config.temperature), sampled


def micro_batches(rollouts, config):
    """Advantage 0 has no gradient: such rollouts are not scored, but count in the mean."""
    return chunks([r for r in rollouts if r.advantage != 0], config.micro_batch)


def backward(model, batch, old_logprobs, share, config):
    """Add the gradient of this `share` of a mini-batch; returns loss and clip_fraction."""
    logprobs, sampled = score(model, batch, config)  # (N, T)
    if old_logprobs is None:  # one mini-batch: pi still is pi_old
        old_logprobs = logprobs.detach()
    A = torch.tensor([r.advantage for r in batch], device=model.device)  # (N,)
    loss, stats = policy_loss(logprobs, old_logprobs, A, sampled, config.clip_low, config.clip_high)
    (loss * share).backward()
    return loss.item() * share, stats["clip_fraction"].item()


def update(model, tokenizer, optimizer, rollouts, config):
    """One optimizer step for each mini-batch; returns means over them."""
    rewards = [r.reward for r in rollouts]
    advantages = group_advantages(rewards, config.group_size, config.advantage_scale)
    for r, advantage in zip(rollouts, advantages.tolist()):
        r.advantage = advantage
    minis = chunks(rollouts, len(rollouts) // config.mini_batches)
    batches = [micro_batches(mini, config) for mini in minis]
    old_logprobs = iter([])
    if config.mini_batches > 1:
        with torch.no_grad():
            old_logprobs = iter([score(model, batch, config)[0] for batch in sum(batches, [])])
    stats, norms = [], []
    for mini, useful in zip(minis, batches):
        for batch in useful:
            share = len(batch) / len(mini)
            stats.append(backward(model, batch, next(old_logprobs, None), share, config))
        if config.expert_coef:
            for r in mini[:: config.group_size]:  # their mean, one at a time
                loss = masked_expert_loss(model, tokenizer, r.problem, config.domain)
                (loss * config.expert_coef * config.group_size / len(mini)).backward()
        norm = clip_grad_norm_(model.parameters(), config.grad_clip, error_if_nonfinite=True)
        norms.append(norm.item())  # before clipping
        optimizer.step()  # parameters without a gradient stay
        optimizer.zero_grad()
    return {
        "loss": sum(loss for loss, _ in stats) / len(minis),
        "clip_fraction": fmean([clipped for _, clipped in stats] or [0]),
        "grad_norm": fmean(norms),
    }


def chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# ---- Evaluation and training ----
def evaluate(model, tokenizer, problems, config):
    """Accuracy without a guide, {difficulty: [mean, its standard error], ..., "mean": [...]}."""
    asked = [(p, False) for p in problems]
    solved = {}  # of each problem the share, by difficulty
    for group in rollout(model, tokenizer, asked, config, config.eval_samples):
        shares = solved.setdefault(group[0].problem.difficulty, [])
        shares.append(fmean([r.solved for r in group]))
    table = {}
    for level, shares in sorted(solved.items()):
        table[level] = [fmean(shares), pstdev(shares) / len(shares) ** 0.5]
    means, errors = zip(*table.values())
    # every difficulty weighs the same
    return table | {"mean": [fmean(means), math.hypot(*errors) / len(errors)]}


def train_step(model, tokenizer, optimizer, problems, step, config):
    """Sample, reward, learn; returns rollouts and metrics."""
    torch.manual_seed(config.seed * 1_000_003 + step)  # a resumed run samples the same
    batch = random.Random(f"{config.seed} {step}").choices(problems, k=config.prompts_per_step)
    start = time.process_time()
    groups = collect_rollouts(model, tokenizer, batch, step, config)
    rollouts = sum(groups, [])
    stats = update(model, tokenizer, optimizer, rollouts, config)
    equal = [group[0].solved for group in groups if not any(r.advantage for r in group)]
    metrics = {
        "step": step,
        "reward": fmean([r.reward for r in rollouts]),
        "zero_variance_wrong": equal.count(False) / len(groups),
        "zero_variance_right": equal.count(True) / len(groups),
        "completion_length": fmean([sum(r.sampled) for r in rollouts]),
        "truncated": fmean([not r.ended for r in rollouts]),
        "guided": fmean([r.guided for r in rollouts]),
        "seconds_processor": time.process_time() - start,
    }
    return rollouts, metrics | stats


def loggable(r, step):
    guide = r.problem.guide if r.guided else ""
    row = {"step": step, "question": r.problem.question, "guide": guide}
    return row | {"completion": r.text, "reward": r.reward}


def train(config):
    """From the base, or the checkpoint, to config.steps; returns the run folder."""
    torch.set_num_threads(config.threads)
    model, tokenizer = load_model(config.model, config)
    problems = load_problems(config.data, config.guide, tokenizer, config)
    tests = load_problems(config.test_data, "none", tokenizer, config, "test")
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    free = {"resume": "", "steps": 1, "device": "", "micro_batch": 1}  # what may change
    fingerprint = zlib.crc32(repr([replace(config, **free), problems, tests]).encode())
    folder = open_run(config)
    print(f"if it is stopped: python smepo.py --resume {folder} --steps {config.steps}")
    done = restore(folder, model, optimizer, fingerprint)
    print(f"\n{problems[0].question}\n\nguide:\n{problems[0].guide}\n")
    torch.manual_seed(config.seed)
    bar = tqdm(range(done + 1, config.steps + 1))
    for step in bar:
        rollouts, metrics = [], {"step": step}
        if step > 0:
            rollouts, metrics = train_step(model, tokenizer, optimizer, problems, step, config)
            bar.set_postfix(reward=metrics["reward"])
        point = step == config.steps or step % config.eval_every == 0
        if point:
            metrics["pass@1"] = evaluate(model, tokenizer, tests, config)
        write(folder / "metrics.jsonl", [metrics])
        write(folder / "rollouts.jsonl", [loggable(r, step) for r in rollouts])
        if point:
            save_checkpoint(folder, model, optimizer, step, fingerprint)
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder


# ---- Data and models ----
def read_rows(path, split):
    """Of a jsonl or parquet file, a folder with one for each split, or hub/id:configuration."""
    if Path(path).is_dir():
        files = [*Path(path).glob(f"{split}*.jsonl"), *Path(path).glob(f"{split}*.parquet")]
        if not files:
            raise UserError(f"{path} has no file {split}.jsonl or {split}.parquet")
        return [row for file in sorted(files) for row in read_rows(str(file), split)]
    if path.endswith("jsonl"):  # `datasets` would guess types
        lines = Path(path).read_bytes().splitlines()
        return [json.loads(line, parse_int=str, parse_float=str) for line in lines if line.strip()]
    if path.endswith("parquet"):
        return datasets.Dataset.from_parquet(path)
    return datasets.load_dataset(*path.split(":"), split=split)


def load_model(path, config):
    """In float32, with its tokenizer."""
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    path = path or TASKS / config.task / "base"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = len(model.get_input_embeddings().weight)
    if tokenizer.eos_token is None or len(tokenizer) > rows:
        raise UserError(f"--model {path}: no eos_token, or more tokens than its {rows} embeddings")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    # what else its folder says would bend the rollouts
    eos_ids = torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist()
    eos_ids = sorted({tokenizer.eos_token_id, *eos_ids})
    model.generation_config = GenerationConfig(eos_token_id=eos_ids)
    model.to(config.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return model.eval(), tokenizer  # no dropout: it would bend the ratio


PLAIN_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""  # for base models


# ---- The run folder, safe from kills ----
@contextmanager
def replacing(path):
    """All of a file or nothing."""
    new = path.with_name(path.name + ".new")
    yield new
    os.replace(new, path)


def open_run(config):
    """That of --resume, or a new one."""
    if config.resume:
        return Path(config.resume)
    name = f"runs/{config.domain}-{config.guide}-{config.guide_when}-seed{config.seed}"
    folder = Path(config.out or name)
    for number in range(2, 10_000):
        try:
            (folder / "checkpoint").mkdir(parents=True)
            break
        except FileExistsError:
            if config.out:
                raise
            folder = Path(f"{name}-{number}")
    Path(folder, "config.json").write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    return folder


def save_checkpoint(folder, model, optimizer, step, fingerprint):
    states = model.state_dict(), optimizer.state_dict()  # a step seeds its own sampling
    with replacing(folder / "checkpoint" / "training.pt") as new:
        torch.save([step, fingerprint, *states], new)


def restore(folder, model, optimizer, fingerprint):
    """Weights and logs as at the checkpoint; returns its step, -1 without one."""
    checkpoint, done = folder / "checkpoint" / "training.pt", -1
    if checkpoint.exists():
        done, saved, weights, state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved != fingerprint:
            raise UserError(f"--resume {folder}: its settings or data have changed")
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for log in folder / "metrics.jsonl", folder / "rollouts.jsonl":
        log.touch()
        kept = [record for record in read_records(log) if record["step"] <= done]
        with replacing(log) as new:  # what is later is run and written again
            write(new, kept, "w")
    return done


def write(path, records, mode="a"):
    with open(path, mode, encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path):
    """The lines of a log, but for a torn last one."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


# ---- Main ----
def report(folder):
    """The table, and curve.png if matplotlib is there."""
    points = [r for r in read_records(folder / "metrics.jsonl") if "pass@1" in r]
    first, last = points[0], points[-1]
    print(f"\nunguided accuracy  step 0           step {last['step']:<11} change")
    for level, (before, error) in first["pass@1"].items():
        after, e = last["pass@1"][level]
        row = f"{before:.3f} ± {error:.3f}    {after:.3f} ± {e:.3f}    {after - before:+.3f}"
        print(f"difficulty {level:<6}  {row}")
    print(f"\n{folder} holds it all")
    try:
        from tiny_tasks import plots
    except ModuleNotFoundError:
        return
    plots.draw_run(folder)


def parse(arguments):
    """With --resume the settings of that run are the defaults."""
    parser = HfArgumentParser(Config, exit_on_error=False, add_help=False)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        is_command = (TASKS / f"{rest[0]}.py").exists()
        command = f"python -m tiny_tasks.{rest[0]}" if is_command else "--help"
        raise UserError(f"{rest[0]} is no flag: see {command}")
    if given.resume:
        saved = json.loads(Path(given.resume, "config.json").read_text(encoding="utf-8"))
        given = parser.parse_args(arguments, argparse.Namespace(**saved))
    return Config(**vars(given))


NOT_LEARNED = """
It computes better now, but cannot plan five operations: the guide did that. One that fades
teaches both, in two minutes:
python smepo.py --guide_when fade --learning_rate 4e-4 --advantage_scale none --steps 100"""


def main(arguments):
    if "--help" in arguments:
        print(inspect.getsource(Config).partition("\n\n    def")[0])
        return 0
    try:
        config = parse(arguments)
        report(train(config))
        if replace(config, out="") == Config():
            print(NOT_LEARNED)
    except (UserError, argparse.ArgumentError, OSError) as error:
        print(f"smepo.py: {error}".partition("\n")[0], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    import smepo  # the module that domains import

    sys.stdout.reconfigure(errors="replace")  # a Windows pipe has few signs
    sys.exit(smepo.main(sys.argv[1:]))
