"""SMEPO, Semantic Masked Expert Policy Optimization (arXiv 2605.25198), in one readable file.

The problem: reinforcement learning with verifiable rewards stalls where all rollouts of a group
fail, for then every advantage is 0. An expert's solution in the prompt helps, but it shows what the
verifier checks: the policy copies it, the reward rises to 1, and without it nothing was learned.
The idea: show the solution, but hide the spans that the reward depends on (in math, the numbers).

    question x   Compute 7 - 6 + 3 * 5
    trace t      Step 1: 3 * 5 = 15.                      Step 2: 7 - 6 = 1. ...
    shown        Step 1: [NUMBER] * [NUMBER] = [NUMBER].  Step 2: [NUMBER] - [NUMBER] = ...

The policy follows the plan but must reconstruct every value. All else is on-policy GRPO, only with
another prompt c, and the evaluation shows no trace. Each line is a function below:

    context     c = x + mask(t)                                      guide_trace, build_prompt
    rollouts    o_1..o_G ~ pi_old(. | c)                             rollout
    reward      r_i = verifier(o_i, a) in {0, 1}                     reward
    advantage   A_i = (r_i - mean r) / (std r + eps)                 group_advantages
    ratio       rho_t = pi(o_t | c, o_<t) / pi_old(o_t | c, o_<t)    token_logprobs
    loss        -1/(BG) sum_i 1/|o_i| sum_t min(rho A, clip(rho, 1-low, 1+high) A)   policy_loss
Shapes: B problems, G rollouts of each, N rows (B*G or some of them), P prompt, T completion tokens.
Run `python smepo.py` to see it learn on a laptop, `--guide none` for GRPO, `--help` for the rest.
"""
import argparse
import ast
import math
import random
import re
import signal
import sys
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import GenerationConfig, HfArgumentParser

from tiny_tasks import files, judge  # nothing of the algorithm: the disk, the verifier of code
from tiny_tasks.files import UserError, assert_finite, load_model

# ---- Config: every field is a flag ---------------------------------------------------------------
def flag(default, help: str):
    return field(default=default, metadata={"help": help})

SYSTEM = {  # what the verifier reads
    "math": "Reason step by step, and put your final answer within \\boxed{}.",
    "code": "Plan first. Then write a program that reads standard input, in one ```python block.",
    "search": "Search with <search>relation of entity</search> and read <information>, as often as "
              "you need; then answer with <answer>...</answer>."}

@dataclass
class Config:
    name: str = flag("smepo", "the run is written to runs/<name>/")
    resume: bool = flag(False, "continue the run in runs/<name>/")
    task: Literal["arithmetic", "code", "search"] = flag(
        "arithmetic", "a toy: its model, data, test_data and domain, where these are not given")
    model: str | None = flag(None, "the base model, a Hugging Face folder or hub id")
    data: str | None = flag(None, "training problems, jsonl or parquet")
    test_data: str | None = flag(None, "held-out problems, asked unguided")
    domain: Literal["math", "code", "search"] | None = flag(
        None, "what is masked, and how answers compare")
    system: str | None = flag(None, "system prompt; by default that of --domain, if this is given")
    guide: Literal["none", "full", "prefix", "random", "semantic"] = flag(
        "semantic", "what is shown of the trace: none is GRPO, semantic is SMEPO")
    guide_when: str = flag("always", "always, on-failure (of the unguided group) or a fraction")
    prefix_ratio: float = flag(0.5, "the part of the trace that guide=prefix shows")
    steps: int = flag(60, "rollout batches to train on (paper: 400-500)")
    prompts_per_step: int = flag(16, "B, problems in a rollout batch (paper: 32)")
    group_size: int = flag(8, "G, rollouts of each problem (paper: 8)")
    mini_batches: int = flag(1, "optimizer steps a batch (paper: 4); at 1 no ratio leaves 1")
    inner_epochs: int = flag(1, "how often a rollout batch is used")
    micro_tokens: int = flag(2**15, "tokens a forward; out of memory? halve it, the gradient stays")
    generate_batch: int = flag(512, "rows a call of generate; bounds its KV cache")
    learning_rate: float = flag(2e-4, "of AdamW (paper, 8B parameters: 1e-6)")
    schedule: Literal["constant", "cosine"] = flag("constant", "the paper: cosine")
    warmup: float = flag(0.0, "part of the steps in which the learning rate rises (paper: 0.1)")
    weight_decay: float = flag(0.01, "of AdamW")
    grad_clip: float = flag(1.0, "largest gradient norm")
    clip_low: float = flag(0.2, "the ratio is clipped below at 1 - clip_low")
    clip_high: float = flag(0.28, "and above at 1 + clip_high; wider, so rare tokens can grow")
    advantage_scale: Literal["std", "none"] = flag("std", "none: not divided by std (Dr. GRPO)")
    aggregation: Literal["sequence", "token"] = flag("sequence", "mean per rollout, or per token")
    expert_coef: float = flag(0.0, "weight of masked_expert_loss; the paper has no such term")
    temperature: float = flag(1.0, "of sampling and scoring alike (paper: 0.8)")
    max_prompt_tokens: int = flag(256, "guides are shortened to it; longer questions are left out")
    max_new_tokens: int = flag(64, "sampled; a rollout without an end by then earns 0")
    max_turns: int = flag(8, "searches that a rollout may make")
    knowledge: str = flag("tiny_tasks/search_knowledge.jsonl", "what a search finds, as jsonl")
    eval_every: int = flag(20, "steps between points of the accuracy curve")
    eval_samples: int = flag(4, "samples a test problem")
    save_every: int = flag(10, "steps between checkpoints")
    seed: int = flag(0, "same seed, same machine, same result")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    gradient_checkpointing: bool = flag(False, "less memory, more time; for large models")
    threads: int = flag(1, "CPU threads; more help a model larger than the toy's")

    def __post_init__(self):
        self.system = SYSTEM.get(self.domain, "") if self.system is None else self.system
        self.domain = self.domain or {"arithmetic": "math"}.get(self.task, self.task)
        self.model = self.model or f"tiny_tasks/base_{self.task}".removesuffix("_arithmetic")
        self.data = self.data or f"tiny_tasks/{self.task}_train.jsonl"
        self.test_data = self.test_data or f"tiny_tasks/{self.task}_test.jsonl"
        m, fraction = self.mini_batches, r"always|on-failure|0?\.\d+|[01](\.0*)?"
        devices = "auto", "cpu", str(torch.accelerator.current_accelerator(check_available=True))
        rules = {"name": (re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name), "a plain folder name"),
            "device": (self.device in devices, "auto or a device that is there"),
            "group_size": (self.group_size > 1, "2 or more: an advantage compares rollouts"),
            "mini_batches": (m > 0 and self.prompts_per_step % m == 0, "a divisor of the prompts"),
            "temperature": (self.temperature > 0, "above 0"), "seed": (self.seed >= 0, "0 or more"),
            "guide_when": (re.fullmatch(fraction, self.guide_when), "always, on-failure or 0 to 1")}
        for name, value in asdict(self).items():
            least = {int: name != "seed", float: 0}.get(type(value))  # None: no number
            good, rule = rules.get(name, (True, f"a number of at least {least}"))
            if not good or least is not None and not least <= value < 2**31:
                raise UserError(f"--{name} {value}: it must be {rule}")
# ---- Answers: how the verifier reads and compares them -------------------------------------------
BRACED = ""  # balanced, five deep
for _ in range(5):
    BRACED = rf"(?:[^{{}}]|\{{{BRACED}\}})*"
STATED = re.compile(rf"(?i)\\f?boxed\s?\{{({BRACED})\}}|<answer>([^<]*)|(?:####|answer(?: is:?|:))"
                    r"[\s*]*((?:[^\n<.\\]|\.(?!\s|$)|\\(?!f?boxed))*)")
FENCED = re.compile(r"^ {0,3}```.*\n([\s\S]*?)^ {0,3}```", re.MULTILINE)
SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
         "eighty ninety").split()
SCALES = {"half": 0.5, "dozen": 12, "hundred": 100, "thousand": 1e3, "million": 1e6, "billion": 1e9}
VALUES = {w: i if i < 20 else 10 * i - 180 for i, w in enumerate(SMALL)} | SCALES
COMMA = r"(?<=\d)(?:,(?:\\!)?|\{,\}|\\,|['’\u00a0\u2009\u202f])(?=\d{3}(?!\d))"  # of thousands
TIMES_TEN_TO = r" ?(?:\\times|\\cdot|[×·*x]) ?10 ?\^ ?"

def stated(text: str) -> str:
    """The last answer in a text: \\boxed{...}, #### ..., <answer>... or "The answer is ..."."""
    said = [match[match.lastindex] for match in STATED.finditer(text)]
    return said[-1].strip(" *\n") if said else ""

def plain(text: str) -> str:
    """Without what only typesets: `$\\text{(B)}$.` is `(b)`."""
    text = re.sub(r"\\(?:text|math|mbox|operatorname)\w*\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle)|\\[,!;: ]|\\?\$|\^\{?\\circ\}?|°|\*\*", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text.replace("−", "-")).strip(" \t\r\n.").casefold()

def number_value(text: str) -> Fraction | None:
    """42.0, 1,234, \\frac14, 2 1/2, ½, 3 \\times 10^8, 50% (as 50), forty-two; None: no number."""
    text = plain(text) if len(text) < 100 else ""
    words, total, part = re.findall(r"[^\W\d_]+|\d", text.replace(" and ", " ")), 0, 0
    if words and all(word in VALUES for word in words):  # one hundred and five, three dozen
        for value in map(VALUES.get, words):
            part = (part or 1) * value if value in SCALES.values() else part + value
            total, part = (total + part, 0) if value >= 1000 else (total, part)
        return Fraction(total + part)
    text = re.sub(TIMES_TEN_TO, "e", re.sub(COMMA, "", text))
    text = re.sub(r"\\frac ?(\{[^{}]*\}|\d) ?(\{[^{}]*\}|\d)", r" \1/\2", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub(r"[\\{}]", "", text).replace("⁄", "/").strip()
    number = re.fullmatch(r"([-+]?) *(?:(\d+) +(?=\d+/))?([\d.]+(?:/\d+|e-?\d{1,3})?)%?", text)
    try:
        value = int(number[2] or 0) + Fraction(number[3])
    except (TypeError, ValueError, ZeroDivisionError):  # no match, 1.2.3, 1/0
        return None
    return -value if number[1] == "-" else value

def same_answer(given: str, truth: str, domain: str) -> bool:
    """Numbers compare by value (1,234 is 1234, \\frac14 is 0.25), all else as normalised text."""
    if (value := number_value(truth)) is not None:
        return number_value(given) == value
    if domain == "search":  # words, without articles and punctuation
        sides = [re.findall(r"\w+|^\W+$", text.casefold()) for text in (given, truth)]
        given, truth = ([w for w in side if w not in ("a", "an", "the")] or side for side in sides)
    else:  # x^{2} is x^2 and (B) is B
        sides = [re.sub(r"\s|\{(?=\w\})|(?<=\{\w)\}", "", plain(text)) for text in (given, truth)]
        given, truth = (re.sub(r"^\((\w)\)$", r"\1", side) for side in sides)
    return given == truth

def rewards(texts: list[str], truths: list[str], domain: str) -> list[float]:
    """1.0 where the last answer that a text states is right, else 0.0. In code it is the last
    fenced block, and right if it passes its tests; all are judged at once, as they run in parallel.
    """
    if domain == "code":
        programs = [(FENCED.findall(text) or [None])[-1] for text in texts]
        return [float(passed) for passed in judge.judge(programs, truths)]
    said = zip(map(stated, texts), truths, strict=True)
    return [float(text != "" and same_answer(text, truth, domain)) for text, truth in said]

def reward(completion: str, ground_truth: str, domain: str) -> float:
    return rewards([completion], [ground_truth], domain)[0]
# ---- Masking: the spans of a trace that the reward depends on ------------------------------------
# Math is one regex, read from left to right. Its first alternatives are what to keep: "Step 1" is
# consumed before the number pattern can see its 1. So no placeholder is needed, nothing is masked
# twice. Every repeat is bounded, or ends where the next begins: no text can make the search slow.
Span = tuple[int, int, str]  # start, end, and the mask shown instead
Ids = list[int]  # token ids
MASK = r"\[(?:NUMBER|ANSWER|CODE|ENTITY)\]"
LATIN, LOWER = "A-Za-zÀ-ÖØ-öø-ɏ", "a-zß-öø-ÿ"
START, END = rf"(?<![{LATIN}])", rf"(?![{LATIN}])"  # of a word; \b would see digits, too
HAN = "〇零一二两三四五六七八九十百千万亿"
LABEL = ("(?i:step|(?:sub)?case|part|stage|phase|lemma|theorem|thm|corollary|prop(?:osition|erty)?|"
         "claim|fact|remark|definition|condition|method|solution|problem|question|example|formula|"
         "chapter|section|table|fig(?:ure)?|eqn?|equation)")
NUMERAL = rf"\d{{1,3}}(?:\.\d{{1,3}})*(?:[a-d]|\([a-z]\))?|(?i:{'|'.join(SMALL[1:11])})"
ID = rf"\(?(?:(?:[A-Z]\.)?{NUMERAL}|[IVX]{{1,4}}|[A-Za-z])\)?(?![\w(]|[.,]\d| ?[=^+<>%×·/])"
NO_COUNT = r"(?=[A-Z]|[a-z]+\W{1,3}[\w.]{1,5}\b(?! (?!is|has|gives|shows|follows)[a-z]+s\b))"
KEEP = {  # an example of each; "case 17 draws" and "equation 2 = x" are none
    "1. Let": r"^[ \t>]*(?:[-*+] |#{1,3} )?[*_]{0,2}(?:\d{1,2}(?:\.\d{1,2})*[.):]|\(\d{1,2}\))"
              r"(?=[*_]{0,2}[ \t]+\S)|^#{1,3} \d[\d.]{0,4}(?= [A-Z])",
    "Cases 1, 2 and 3": rf"{START}{LABEL}s[ ~]{ID}(?:,? ?(?:and|or|to|[-–])? ?{ID}){{0,9}}",
    "Step 1": rf"{START}{NO_COUNT}{LABEL}\.?[ ~_-]?\#?[*_]{{0,2}}{ID}",
    "worst case": rf"{START}(?i:\w{{1,6}}st|base|th\w{{1,3}}|each|every) (?:case|step|part){END}",
    "from (1)": rf"{START}(?i:from|in|into|and|with|by|via|see|of|both|\w{{2,9}}ing) \(\d{{1,2}}\)",
    "the two roots": rf"{START}(?i:the|these|those|no) (?:two|three|four|five|six)(?= [a-z\[])",
    "one can": rf"{START}[Oo]ne(?= (?:can|could|may|might|must|should|would|has|by|of){END})",
    "x_1": r"(?:(?<![A-Za-z\\])(?!log|lim|max|min)[A-Za-zα-ωΑ-Ω]{1,3}|\}|"
           r"\\(?!int|sum|prod|log|lim)[A-Za-z]+)'{0,3}(?:_(?:\d+|\{[\w+*, -]{1,20}\})|[₀-₉]+)",
    "P2": r"(?<![\w\\])[A-Za-z]\d{1,2}(?!\w|[.,]\d)",
    "cm^2": r"(?<![\w\\])[kcdm]?m(?:[²³]|\^\{?[23]\}?)(?!\w|[.,]\d)",
    r"\tag{1}": r"\\(?:tag\*?|label|(?:eq|auto|c)?ref|cite)\{[^{}\n]{0,60}\}",
    "第三步": rf"第[\d{HAN}]{{1,3}}|(?:步骤|情况|情形|引理|定理|ステップ)[ (（]?[\d{HAN}]{{1,3}}"}

SIGN = r"(?:(?<![\w)\]}!'])(?<![\d)\]}] )(?<!\b\w )[-+−])?"  # else an operator: 7 - 6, n(n-3)
DIGITS = rf"(?:\d+(?:{COMMA}\d{{3}})*(?:\.\d+)?|(?<![\w.])\.\d+)"  # 42, 15{,}600, 3.25, .5
FRAC = r"\\[dtc]?frac ?(?:\{ ?[-−]?[\d.,]+ ?\}|\d) ?(?:\{ ?[-−]?[\d.,]+ ?\}|\d)|[¼-¾⅐-\u2188]"
POWER = rf"{TIMES_TEN_TO}\{{?[-−+]?\d+\}}?| ?[×x] ?10[⁺⁻⁰¹²³⁴-⁹]+|[eE][-+]?\d+(?!\w)"
FIGURES = (rf"(?:{SIGN}(?:(?:\d+[ -])?\d+/\d+(?![\d/]| ?=)|{DIGITS}(?:[ -]?{FRAC}|{POWER})?|{FRAC})"
           rf"(?: ?\\?%|(?:st|nd|rd|th){END}|[ -](?:{'|'.join(SCALES)}){END})?|[⁺⁻⁰¹²³⁴-⁹₀-₉⁄]+)")
WORD = (rf"(?:(?:{'|'.join(sorted(VALUES, key=len)[::-1])})(?:th|s|ths)?|first|second|thirds?|"
        r"(?:fif|eigh|nin|twelf)ths?|\w{3,5}tieth|halves|quarters?)")
SPELLED = rf"(?i:{WORD}(?:(?:[ -]|(?<=hundred) and |(?<=thousand) and | and a ){WORD})*{END})"
SELDOM = re.compile(r"(?i)ones?|half|quarter|first|second|third|[a-z]*[^neid]th")  # alone no value
ROMAN = rf"(?:[IVXL]{{2,9}}|[IVXLCDM]{{4,15}}){END}"
MATH = re.compile(rf"{'|'.join(KEEP.values())}|{MASK}|"
    rf"\\f?boxed\s?\{{(?!\s*\}}|[^}}]{{0,99}}{MASK})(?P<box>{BRACED})(?=\}})|"
    rf"(?P<number>{FIGURES}|{START}(?:{SPELLED}|{ROMAN})|[{HAN}]{{2,}})|[{LATIN}]+", re.MULTILINE)

# How else the signs of an answer may be written, and what may stand between them.
SPELLINGS = {"-": "[-−–]", "*": r"(?:\\cdot|\\times|\*)?", "/": r"(?:/|\}\s?\{)?",
             "^": r"(?:\^|\*\*)?", "\\pi": rf"(?:\\pi{END}|π|{START}pi{END})",
             "\\sqrt": r"(?:\\sqrt|√)", "\\infty": r"(?:\\infty|∞)"}
NOISE = r"(?:[\s{}()$]|\\[,;! \\]|\\left|\\right|\\[dt]?frac){0,4}"

def answer_spans(trace: str, answer: str) -> list[Span]:
    """Wherever the answer stands, if it is no number; but a letter, yes and no, which are also
    plain words, only where they are the conclusion."""
    text = re.sub(r"\}\s?\{|(?<=frac\d)(?=\d)", "/", plain(answer)).replace("\\frac", "")
    tokens = re.findall(r"\\?[^\W\d_]+|\d+|[^\s{}()\[\]\\]", text)
    if (not re.search(r"[^\W_]", text) or re.search(MASK, answer) or len(tokens) > 50
            or number_value(answer) is not None):
        return []
    pattern = NOISE.join(SPELLINGS.get(token, re.escape(token)) for token in tokens)
    left = r"(?<![\d.])" if pattern[0].isdigit() else START if pattern[0].isalpha() else ""
    right = r"(?!\d)" if pattern[-1].isdigit() else END if pattern[-1].isalpha() else ""
    find = rf"{left}((?i:{pattern}))s?{right}"
    if re.fullmatch("[a-z]|yes|no|true|false", pattern):
        pattern = "".join(re.findall(r"\b[A-Z]\b", answer)) or f"(?i:{pattern})"
        find = (rf"(?:####|<answer>|{START}(?i:answer|choice|option|is|so|thus|hence|therefore))"
                rf"(?: is)?[\s:,*$]{{0,6}}(?:\\text\w{{0,2}}\{{)?\(?({pattern})"
                rf"(?=[^\w\s'’\[-]|\s*$| because| since)|\(({pattern}{{1}})\)")
    return [(*match.span(match.lastindex), "[ANSWER]")
            for match in re.finditer(rf"(?m){MASK}|{find}", trace) if match.lastindex]

def math_spans(trace: str, answer: str) -> list[Span]:
    """Numbers, what is boxed, and the answer."""
    spans = answer_spans(trace, answer)
    for match in MATH.finditer(trace):
        number, box = match["number"], match["box"]
        if box or number and (not SELDOM.fullmatch(number) or same_answer(number, answer, "math")):
            mask = "[NUMBER]" if number or number_value(box) is not None else "[ANSWER]"
            spans.append((*match.span(match.lastgroup), mask))
    return spans

# Code: blocks, by how they open; elsewhere lines that are statements, inline code that computes.
BLOCK = re.compile(
    r"^(?P<quoted>[ \t]*>)?[ \t>]*(?:[-*+] |\d+[.)] )?(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*(?:\n|\Z)"
    r"([\s\S]*?)(?:^[ \t>]*(?P=fence)[`~]*[ \t]*\r?$|(?(quoted)^(?![ \t]*>)|\Z)|\Z)|"
    r"<(?P<tag>pre|code)\b[^>\n]{0,99}>([\s\S]*?)(?:</(?P=tag)>|\Z)|"
    r"\\begin\{(?P<tex>lstlisting|verbatim|minted)\}.{0,99}\n([\s\S]*?)(?:\\end\{(?P=tex)\}|\Z)|"
    r"(?P<quote>\\{0,3}\")(?:code|source|script|program|python|command|input|old|new)(?P=quote)"
    r"\s{0,3}:\s{0,3}(?P=quote)([\s\S]*?)(?:(?<!\\)(?P=quote)|\Z)", re.MULTILINE)
INLINE = re.compile(r"(?<!`)(`+)([^`\n](?:.{0,200}?[^`])??)\1(?!`)")
NO_CODE = re.compile(rf"{MASK}|^(?:[a-z]{{2,}}(?:-[a-z]{{2,}})+\Z|[A-Z]\w+ \(|"
                     r"(?:[OoΘΩT]|\\?Theta|\\?Omega) ?\(.*\)\W*\Z)")  # left-to-right, O(n)
warnings.filterwarnings("ignore", category=SyntaxWarning)  # a trace may well hold "\\d"
COMPUTES = ast.Call, ast.Slice, ast.Lambda, ast.comprehension, ast.operator, ast.cmpop, ast.boolop
NO_STATEMENT = ast.AnnAssign, ast.Pass, ast.Break, ast.Continue  # words, and `Time: quadratic`
OPERATOR = re.compile(r"\w[)\]]*\s*[-+*/%=<>&|^!]+\s*[(\[]*\w|\w[(\[]|\w(?:\+\+|--)")
PROSE = re.compile(  # "Time: ..." or three words, but not `long long gcd(`
    r"\*\*|[A-Z]\w+: |(?:[-*+] |#+ |\d+[.)] )?[A-Za-z][\w'’]*(?:,? [\w'’-]+){2}\b(?! ?[=(\[.:]\w)")

def is_code(text: str, inline: bool) -> bool:
    """Inline: does it compute, as `a[i] + 1` and `x = 2` do, but `x` and `O(n)` do not? A line
    outside of any block: is it a statement?"""
    if NO_CODE.search(text) or len(text) > 300:
        return False
    if text.startswith((">>>", "In [", "@", "#include")):
        return True
    try:
        lines = ast.parse(text.replace("\\", "") + " pass" * text.endswith(":")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # another language, or a part
        looks = inline or text.endswith(("(", "[", "{", ";")) and not PROSE.match(text)
        return looks and bool(OPERATOR.search(re.sub(r"<[\w ,:*]*>|C\+\+|\\[a-z]+", "", text)))
    if not lines or not isinstance(lines[0], ast.Expr):
        return bool(lines) and not isinstance(lines[0], NO_STATEMENT)
    nodes = ast.walk(lines[0]) if inline else [lines[0].value]
    return any(isinstance(node, COMPUTES) for node in nodes)

def code_spans(trace: str, answer: str) -> list[Span]:
    """What a block holds, without its fence; lines that are code; inline code."""
    found = [match.span(match.lastindex) for match in BLOCK.finditer(trace)]
    rest = BLOCK.sub(lambda match: re.sub(r"[^\n]", "\0", match[0]), trace)
    spans, run, blank = [], False, True
    for match in re.finditer(r"(?m)^\0*(.*)$", rest):
        line = match[1].strip("\0 \t\r")
        if not line:
            blank = True
            continue
        indented, prose = match[0].startswith(("    ", "\t")), PROSE.match(line)
        goes_on = indented and not prose if blank else run and (indented or not prose)
        run, blank = (goes_on or is_code(line, False)) and not re.search(MASK, line), False
        found += [match.span(1)] if run else [
            inline.span(2) for inline in INLINE.finditer(rest, *match.span())
            if is_code(inline[2].strip(), True)]
    for start, end in found:
        end = start + len(trace[start:end].rstrip())
        code = trace[start:end].lstrip("> \t\r\n")  # indentation and prompts stay
        if code and not re.fullmatch(MASK, code):
            spans.append((end - len(code), end, "[CODE]"))
    return spans

# Search: a name begins with a capital, or is in another script; but a sentence does, too.
ORDINARY = """a an the i we he she it they this that these there my our his her its their who which
what when where how is are was were do does did has if so no not yes and or but for in on at by to
of from with as than since because although while after before both also however therefore thus
hence finally first then next now later meanwhile find search identify compare title step""".split()
LETTER = r"(?:[^\W\d_¼-¾²³¹⁰-₉⅐-ↈ]|[\u0300-\u036f\u0591-\u1fff\u3040-\u9fff])"
CAP = (rf"(?!(?:{'|'.join(map(str.title, ORDINARY))}){END}(?!\.[ ]?[A-Z]))"
       rf"(?:{START}(?![{LOWER}])|(?![{LATIN}])){LETTER}+(?:['’-](?!s{END}){LETTER}+)*")  # O'Neil
NOBLE = r"(?:(?:van|von|de[lrn]?|della|d[aiou]s?|l[ae]|al|bin|ibn|ben|zu|y) ){1,3}"
NAME = rf"{CAP}(?:(?:[ \u00a0]|(?<=\b\w)\. ?|(?<=\b[DMS][rst])\. ?| {NOBLE}){CAP})*"
ENTITY = re.compile(rf"(?m)</?[a-zA-Z][^<>\n]{{0,99}}>|{MASK}|^[ \t]*\d{{1,2}}[.)](?=\s)|\[\d+\]|"
    rf"{START}(?i:step|hop|doc(?:ument)?|passage|source|result|thought|action|observation) ?\#?\d+|"
    rf"(?P<number>[$€£¥]?\d+(?:[.,:/–−-]\d+)*(?:(?:st|nd|rd|th|s){END})?%?"
    rf"(?: (?:{'|'.join(SCALES)}){END})?|{START}{SPELLED})|(?P<name>{NAME})|[{LATIN}]+")
QUERY = re.compile(r"<(?:search|query|tool_call)>([^<\n]+)|\"query\"\s?:\s?\"([^\"\n]+)")
OPENS = re.compile(r"(?:^|[\n>]|(?<!\b\w)(?<!\b[DMS][rst])[.!?][\"')\]”]?)[\s*\"'(“#-]*\Z")
WORDS = re.compile(f"{LETTER}+")
FEW = re.compile(f"{SELDOM.pattern}|{'|'.join(SMALL[:13])}")  # two films: seldom what is asked for
VERB = re.compile(rf"['’]s?{END}| (?:is|was|has|had|became|won|wrote|died|are|were){END}")

def search_spans(trace: str, answer: str) -> list[Span]:
    """The answer, names, dates and quantities; and the names again by an alias."""
    spans, names, unsure = answer_spans(trace, answer), [answer], []
    for match in ENTITY.finditer(trace):
        (start, end), number, name = match.span(), match["number"], match["name"]
        if name and name.isalpha() and not name[1:].isupper() and (
                OPENS.search(trace, max(0, start - 9), start) and not VERB.match(trace, end)):
            unsure.append(match)  # one word that opens a sentence: a name if it is known as one
        elif name or number and (not FEW.fullmatch(number) or same_answer(number, answer, "math")):
            spans.append((start, end, "[ENTITY]"))
            names.append(name or "")
    words = [WORDS.findall(name) for name in set(names)]
    known = {word.casefold() for name in words for word in name}
    known |= {"".join(word[0] for word in name).casefold() for name in words}  # UNESCO
    known -= {*ORDINARY, *re.findall(rf"{START}[{LOWER}]+{END}", QUERY.sub("", trace))}
    for query in QUERY.finditer(trace):  # in lower case, perhaps
        unsure += WORDS.finditer(trace, *query.span(query.lastindex))
    return spans + [(*m.span(), "[ENTITY]") for m in unsure if m[0].casefold() in known]

DOMAINS = {"math": math_spans, "code": code_spans, "search": search_spans}

def hidden_spans(trace: str, domain: str, answer: str = "") -> list[Span]:
    """The reward-relevant spans, left to right. Without the `answer`, what the trace states."""
    spans = []
    for start, end, mask in sorted(DOMAINS[domain](trace, answer or stated(trace))):
        gap = trace[spans[-1][1] : start] if spans else "-"
        if domain == "search" and gap == " " or domain == "code" and gap.isspace() or not gap:
            start, mask, end = spans[-1][0], spans[-1][2], max(end, spans.pop()[1])
        spans.append((start, end, mask))
    return spans

PIECE = re.compile(r"\d+|[^\W\d]+|[^\w\s]")

def random_spans(trace: str, spans: list[Span], seed: str) -> list[Span]:
    """As many spans, as long in words and signs, anywhere: only *where* differs."""
    pieces = [match.span() for match in PIECE.finditer(trace)]
    hidden = [(len(PIECE.findall(trace[start:end])), mask) for start, end, mask in spans]
    items = hidden + [(1, "")] * (len(pieces) - sum(length for length, _ in hidden))
    random.Random(seed).shuffle(items)  # spans among visible pieces: all orders are equally likely
    chosen, at = [], 0
    for length, mask in items:
        if mask:
            chosen.append((pieces[at][0], pieces[at + length - 1][1], mask))
        at += length
    return chosen

def mask_trace(trace: str, domain: str, answer: str = "", spans: list[Span] | None = None) -> str:
    """Hide what is rewarded, keep the plan: 'Step 1: [NUMBER] * [NUMBER] = [NUMBER].'"""
    parts, at = [], 0
    for start, end, mask in hidden_spans(trace, domain, answer) if spans is None else spans:
        parts += [trace[at:start], mask]
        at = end
    return "".join(parts) + trace[at:]

def leaks(masked: str, answer: str, domain: str) -> bool:
    """Can the verifier's target, for code the code, still be read off the masked text?"""
    visible = {(masked[start:end], mask) for start, end, mask in DOMAINS[domain](masked, answer)}
    return any(mask in ("[ANSWER]", "[CODE]") or same_answer(text, answer, domain)
               for text, mask in visible)

def guide_trace(trace: str, guide: str, domain: str, answer="", prefix_ratio=0.5, seed="") -> str:
    """What is shown: none (GRPO), full, prefix (whole lines), random or semantic (SMEPO)."""
    if guide in ("none", "full"):
        return trace if guide == "full" else ""
    if guide == "prefix":
        return trace[: max(0, f"{trace}\n".rfind("\n", 0, int(len(trace) * prefix_ratio) + 1))]
    spans = hidden_spans(trace, domain, answer)
    spans = random_spans(trace, spans, seed) if guide == "random" else spans
    return mask_trace(trace, domain, answer, spans)
# ---- Data and prompts ----------------------------------------------------------------------------
@dataclass
class Problem:
    question: str
    answer: str  # the ground truth
    trace: str  # the expert's solution
    difficulty: str
    guide: str  # what the policy is shown of the trace, "" for nothing
    leaky: bool  # whether the guide gives the answer away
    prompt_ids: Ids  # the question alone
    guided_ids: Ids  # the question and the guide
    shortened: bool = False  # the guide lost its last lines, to fit into max_prompt_tokens

def build_messages(question: str, guide_text: str = "", system: str = "") -> list[dict]:
    """The guide poses as a finished assistant turn before the one to be written."""
    guide_text = guide_text and "Here is an example solution:\n" + guide_text
    turns = ("system", system), ("user", question), ("assistant", guide_text)
    return [{"role": role, "content": content} for role, content in turns if content]

def build_prompt(tokenizer, question: str, guide_text: str = "", system: str = "") -> str:
    messages = build_messages(question, guide_text, system)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

def load_problems(path: str, guide: str, tokenizer, config: Config) -> list[Problem]:
    """The problems of a file, and what the policy will be shown of their traces."""
    wants_trace = guide != "none" or (config.expert_coef and path == config.data)
    rows, problems = list(files.read_rows(path, wants_trace, config.domain)), []
    def encode(question: str, shown: str) -> Ids:
        prompt = build_prompt(tokenizer, question, shown, config.system)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]  # the template has all

    for question, answer, trace, difficulty in rows:
        whole = guide_trace(trace, guide, config.domain, answer, config.prefix_ratio,
                            seed=f"{config.seed} {question}")
        asked, shown = encode(question, ""), whole
        if len(asked) > config.max_prompt_tokens:
            continue
        while len(guided := encode(question, shown)) > config.max_prompt_tokens:
            shown = shown.rpartition("\n")[0]
        problems.append(Problem(question, answer, trace, difficulty, shown,
                                leaks(shown, answer, config.domain), asked, guided, shown != whole))
    if too_long := len(rows) - len(problems):
        print(f"{path}: {too_long} questions exceed --max_prompt_tokens and are left out")
    if not problems:
        raise UserError(f"{path} has no question within --max_prompt_tokens: raise it")
    return problems
# ---- Rollouts ------------------------------------------------------------------------------------
@dataclass
class Group:
    """G rollouts of a problem, and the very prompt they were sampled from: the ratio's context."""
    problem: Problem
    guided: bool
    prompt_ids: Ids
    completions: list[Ids]  # up to and including the first EOS
    sampled: list[Ids]  # of each of their tokens: 1 if the policy chose it, 0 if it was told
    texts: list[str]
    ended: list[bool]  # with an EOS; the others were cut off at max_new_tokens or max_turns
    rewards: list[float]

def pad(rows: list[Ids], pad_id: int, side: str, device) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, longest); the mask goes by position, as the pad token may be the EOS."""
    ids = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
    return pad_sequence(ids, True, pad_id, side).to(device), mask.to(device)

def positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)  # left padding must not shift a prompt

TOLD = re.compile(r"\n?<information>[^<]*</information>\n?")  # the environment's part of a dialogue

def read_prompts(model, ids: Tensor, mask: Tensor):
    """Keys and values of N prompts, to be copied: a group shares its prompt, so read it once."""
    read = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True,
                 logits_to_keep=1)
    assert_finite(read.logits.sum().item())
    return read.past_key_values

def until_eos(ids: Ids, eos_ids: Ids) -> Ids:  # the first was sampled, generate pads what follows
    return next((ids[: t + 1] for t, token in enumerate(ids) if token in eos_ids), ids)

@torch.no_grad()
def sample(model, tokenizer, prompts: list[Ids], group_size: int, config: Config, stops=()):
    """`group_size` completions of each prompt: B lists of ids in, B*G lists out. `stops`: what
    else than an EOS ends one, as generate's stopping_criteria."""
    ids, mask = pad(prompts, tokenizer.pad_token_id, "left", model.device)  # (B, P)
    cache = read_prompts(model, ids[:, :-1], mask[:, :-1])  # generate reads the last token itself
    cache.batch_repeat_interleave(group_size)
    ids, mask = ids.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)
    settings = GenerationConfig(  # all of them: what is unset is not neutral (top_k would be 50)
        do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=config.max_new_tokens, eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    rows = model.generate(ids, attention_mask=mask, past_key_values=cache, stopping_criteria=stops,
                          generation_config=settings)[:, ids.shape[1] :]  # (B*G, T)
    return [until_eos(row, settings.eos_token_id) for row in rows.tolist()]

def rollout(model, tokenizer, problems, guided, group_size: int, config: Config) -> list[Group]:
    """One group a problem, `guided` or not each, at most `generate_batch` rows at a time."""
    groups, per_call = [], max(1, config.generate_batch // group_size)
    prompts = [p.guided_ids if g else p.prompt_ids for p, g in zip(problems, guided, strict=True)]
    for start in range(0, len(problems), per_call):
        part = slice(start, start + per_call)
        if config.domain == "search":  # of several turns; what the environment told is not marked
            converse = import_module("tiny_tasks.dialogue").converse
            ids, marks = converse(model, tokenizer, prompts[part], group_size, config)
        else:
            ids = sample(model, tokenizer, prompts[part], group_size, config)
            marks = [[1] * len(row) for row in ids]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = [row[-1] in model.generation_config.eos_token_id for row in ids]
        whole = [text if end else "" for text, end in zip(texts, ended, strict=True)]
        truths = [problem.answer for problem in problems[part] for _ in range(group_size)]
        columns = ids, marks, texts, ended, rewards(whole, truths, config.domain)
        for i, group in enumerate(zip(problems[part], guided[part], prompts[part], strict=True)):
            mine = slice(i * group_size, (i + 1) * group_size)
            groups.append(Group(*group, *(column[mine] for column in columns)))
    return groups

def collect_rollouts(model, tokenizer, problems: list[Problem], config: Config):
    """The groups to learn from, and how many rollouts were sampled to get them."""
    rate = float({"always": 1, "on-failure": 0}.get(config.guide_when, config.guide_when))
    guided = [int((i + 1) * rate) > int(i * rate) and p.guide != "" for i, p in enumerate(problems)]
    groups = rollout(model, tokenizer, problems, guided, config.group_size, config)
    failed = [i for i, group in enumerate(groups) if config.guide_when == "on-failure"
              and group.problem.guide and max(group.rewards) == 0]
    again = rollout(model, tokenizer, [problems[i] for i in failed], [True] * len(failed),
                    config.group_size, config)
    for i, group in zip(failed, again, strict=True):
        groups[i] = group
    return groups, (len(problems) + len(failed)) * config.group_size
# ---- Advantages, log-probs, loss as pure functions; the update -----------------------------------
def group_advantages(rewards, group_size: int, scale: str = "std", eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps) in each group: 1 0 0 0 -> 1.5 -.5 -.5 -.5. (B*G,)"""
    r = torch.as_tensor(rewards, dtype=torch.float32).view(-1, group_size)  # (B, G)
    A = r - r.mean(1, keepdim=True)  # (B, G)
    if scale == "std":
        A = A / (r.std(1, keepdim=True) + eps)
    # equal rewards give exactly 0, however their mean was rounded
    return (A * (r.amax(1, keepdim=True) > r.amin(1, keepdim=True))).flatten()  # (B*G,)

LOGITS = 2**23  # at a time: 32 MiB, and a few times that in the backward pass
def token_logprobs(model, input_ids: Tensor, attention_mask: Tensor, completion_length: int,
                   temperature: float) -> Tensor:
    """log pi(o_t | c, o_<t) of the last `completion_length` tokens of every row. (N, T)"""
    start = input_ids.shape[1] - completion_length - 1  # of the last prompt token
    read, keys, head = start, None, model.get_output_embeddings()
    if model.training:  # gradient checkpointing reads all again in the backward pass: no keys
        read = 0
    else:
        prompts = torch.cat([input_ids[:, :start], attention_mask[:, :start]], 1)  # beside its mask
        prompts, row = prompts.cpu().unique(dim=0, return_inverse=True)  # a group's is read once
        keys = read_prompts(model, *prompts.to(model.device).chunk(2, dim=1))
        keys.batch_select_indices(row.to(model.device))
    hidden = model.base_model(
        input_ids[:, read:-1], attention_mask=attention_mask[:, :-1], past_key_values=keys,
        position_ids=positions(attention_mask)[:, read:-1], use_cache=keys is not None,
    ).last_hidden_state[:, start - read :].flatten(0, 1)  # (N*T, D)
    # the state at t predicts the token at t + 1; few logits (., V) at a time, and none is kept
    tokens, size = input_ids[:, -completion_length:].flatten(), 1 + LOGITS // len(head.weight)
    parts = [checkpoint(score, head, *part, temperature, use_reentrant=False)
             for part in zip(hidden.split(size), tokens.split(size), strict=True)]
    return torch.cat(parts).view(-1, completion_length)

def score(head, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log pi of tokens (n,) that were sampled at this temperature, from states (n, D). (n,)"""
    logits = head(hidden).float() / temperature  # (n, V)
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)

def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28, aggregation: str = "sequence"):
    """Loss and stats of the clipped surrogate: (N, T) tokens, mask 1 if sampled, advantages (N,).
    At one update a batch every ratio is 1 and a group's advantages sum to 0: the *value* is about
    0, its gradient, -A * grad log pi, is not. Clipping can act from a batch's second update on."""
    mask, A = mask.bool(), advantages[:, None]  # (N, T), (N, 1)
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # (N, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    # min for either sign of A: leaving the range gains nothing, and the way back stays open
    token_loss = -torch.min(ratio * A, clipped) * mask  # (N, T)
    if aggregation == "sequence":
        loss = (token_loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    else:
        loss = token_loss.sum() / mask.sum().clamp(min=1)
    return loss, {"clip_fraction": ((clipped < ratio * A) & mask).sum() / mask.sum().clamp(min=1)}

def masked_expert_loss(model, tokenizer, problem: Problem, domain: str) -> Tensor:
    """Mean NLL of the trace's visible tokens, given the question alone: not of hidden spans, nor of
    what the environment told. No part of SMEPO: it shows what a plan in the loss does."""
    text, spans = problem.trace, hidden_spans(problem.trace, domain, problem.answer)
    spans += [(*told.span(), "") for told in TOLD.finditer(text)]
    trace = tokenizer(text + tokenizer.eos_token, add_special_tokens=False,
                      return_offsets_mapping=True)
    visible = [all(b <= i or j <= a for i, j, _ in spans) for a, b in trace["offset_mapping"]]
    ids = torch.tensor([problem.prompt_ids + trace["input_ids"]], device=model.device)  # (1, P+T)
    logprobs = token_logprobs(model, ids, torch.ones_like(ids), len(visible), temperature=1.0)
    return -logprobs[0, visible].mean()

def micro_batches(groups: list[Group], pad_id: int, device, config: Config) -> list[dict]:
    """The rows of a mini-batch that have a gradient, some `micro_tokens` at a time. Advantage 0,
    as in all-wrong and all-right groups, has none, so such rows are not scored; but they count in
    the divisor, of which each part carries its `share`."""
    A = group_advantages([g.rewards for g in groups], config.group_size, config.advantage_scale)
    rows = [(g.prompt_ids, *row) for g in groups
            for row in zip(g.completions, g.sampled, strict=True)]
    useful = [(*row, a) for row, a in zip(rows, A.tolist(), strict=True) if a]
    useful.sort(key=lambda row: len(row[0]) + len(row[1]))  # equal lengths need no padding
    parts, total = [], sum(sum(marks) for _, _, marks in rows)
    while useful:  # the longest first: if they fit into memory, all will
        count = max(1, config.micro_tokens // (len(useful[-1][0]) + len(useful[-1][1])))
        some, useful = useful[-count:], useful[:-count]
        prompts, completions, marks, a = zip(*some, strict=True)
        prompt_ids, prompt_mask = pad(prompts, pad_id, "left", device)  # (N, P)
        completion_ids, seen = pad(completions, pad_id, "right", device)  # (N, T)
        mask, _ = pad(marks, 0, "right", device)  # (N, T)
        inputs = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, seen], 1)
        share = len(a) / len(rows) if config.aggregation == "sequence" else mask.sum() / total
        parts.append({"inputs": (*inputs, mask.shape[1], config.temperature), "mask": mask,
                      "A": torch.tensor(a, device=device), "share": share})
    return parts

def update(model, tokenizer, optimizer, groups: list[Group], config: Config) -> dict:
    """`mini_batches` optimizer steps, `inner_epochs` times over; returns average statistics."""
    size, sums = len(groups) // config.mini_batches, Counter()
    model.train(config.gradient_checkpointing)
    minis = [groups[i : i + size] for i in range(0, len(groups), size)]
    batches = [micro_batches(m, tokenizer.pad_token_id, model.device, config) for m in minis]
    if len(batches) * config.inner_epochs > 1:  # pi_old scores all before anything moves
        with torch.no_grad():
            for part in sum(batches, []):
                part["old"] = token_logprobs(model, *part["inputs"])
    for parts, members in list(zip(batches, minis, strict=True)) * config.inner_epochs:
        if not parts and not config.expert_coef:
            continue  # no group has both right and wrong rollouts: no signal, no step
        optimizer.zero_grad()
        for part in parts:
            logprobs = token_logprobs(model, *part["inputs"])  # (N, T)
            old = part.get("old", logprobs.detach())  # none: the only update, pi still is pi_old
            loss, stats = policy_loss(logprobs, old, part["A"], part["mask"], config.clip_low,
                                      config.clip_high, config.aggregation)
            (loss * part["share"]).backward()
            tokens = part["mask"].sum().item()
            sums.update(loss=(loss * part["share"]).item(), tokens=tokens,
                        clipped=stats["clip_fraction"].item() * tokens,
                        surprise=-(old * part["mask"]).sum().item())
        for group in members if config.expert_coef else []:  # one at a time bounds the memory
            loss = masked_expert_loss(model, tokenizer, group.problem, config.domain)
            (loss * config.expert_coef / len(members)).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        assert_finite(grad_norm + sums["loss"])
        optimizer.step()
        sums.update(steps=1, grad_norm=grad_norm)
    model.eval()
    steps, tokens = max(sums["steps"], 1), max(sums["tokens"], 1)
    # -log pi_old, averaged over tokens that pi_old sampled, estimates its entropy
    return {"loss": sums["loss"] / steps, "grad_norm": sums["grad_norm"] / steps,
            "clip_fraction": sums["clipped"] / tokens, "entropy": sums["surprise"] / tokens}
# ---- Evaluation: unguided by construction --------------------------------------------------------
def pass_at_k(samples: int, correct: int, k: int) -> float:  # unbiased, arXiv 2107.03374
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)

def evaluate(model, tokenizer, problems: list[Problem], config: Config) -> dict:
    """{"pass@1": {difficulty: [mean, standard error over problems], "mean": ...}, "pass@4": ...}"""
    start, samples, table = time.perf_counter(), config.eval_samples, {}
    groups = rollout(model, tokenizer, problems, [False] * len(problems), samples, config)
    for k in sorted({1, samples}):
        row = table[f"pass@{k}"] = {}
        for level in sorted({problem.difficulty for problem in problems}):
            p = torch.tensor([pass_at_k(samples, round(sum(group.rewards)), k)
                              for group in groups if group.problem.difficulty == level])
            row[level] = [p.mean().item(), (p.std(correction=0) / len(p) ** 0.5).item()]
        m, e = torch.tensor(list(row.values())).T  # every difficulty weighs the same
        row["mean"] = [m.mean().item(), (e.square().sum().sqrt() / len(e)).item()]
    return table | {"seconds_evaluation": time.perf_counter() - start}
# ---- Training, and what the reader sees ----------------------------------------------------------
def train_step(model, tokenizer, optimizer, problems: list[Problem], step: int, config: Config):
    """Sample, reward, learn; returns the groups and the metrics (README: glossary)."""
    rate = config.learning_rate * min(1, step / max(1, config.warmup * config.steps))
    if config.schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * (step - 1) / config.steps)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    torch.manual_seed(config.seed * 1_000_003 + step)  # so that a resumed run samples the same
    batch = random.Random(f"{config.seed} {step}").choices(problems, k=config.prompts_per_step)
    start = time.perf_counter()
    groups, sampled = collect_rollouts(model, tokenizer, batch, config)
    middle = time.perf_counter()
    stats = update(model, tokenizer, optimizer, groups, config)
    end = time.perf_counter()
    rewards = torch.tensor([group.rewards for group in groups])  # (B, G)
    equal, first = rewards.amax(1) == rewards.amin(1), rewards[:, 0]  # (B,)
    lengths = [sum(marks) for group in groups for marks in group.sampled]
    length, shown = sum(lengths) / len(lengths), [g.problem for g in groups if g.guided]
    return groups, {"step": step, "reward": rewards.mean().item(), "completion_length": length,
        "zero_variance_wrong": (equal & (first == 0)).float().mean().item(),
        "zero_variance_right": (equal & (first > 0)).float().mean().item(),
        "truncated": 1 - sum(sum(group.ended) for group in groups) / len(lengths),
        "guided": len(shown) / len(groups), **stats, "learning_rate": rate,
        "leak_rate": sum(problem.leaky for problem in shown) / max(1, len(shown)),
        "shortened": sum(problem.shortened for problem in shown) / max(1, len(shown)),
        "rollouts": sampled, "rollouts_per_second": sampled / (end - start),
        "tokens_per_second": sampled * length / (middle - start),
        "seconds_rollout": middle - start, "seconds_update": end - middle}

STOP = []  # filled by Ctrl-C, which lets the step finish and be saved; a second one stops at once
def on_ctrl_c(*_):
    STOP.append(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)

def prepare(start: Path | str, config: Config):
    """Model, tokenizer, optimizer, the problems to train on and the held-out ones."""
    torch.set_num_threads(config.threads)
    if config.domain == "search":
        import_module("tiny_tasks.dialogue").load_knowledge(config.knowledge)  # or refuse it now
    model, tokenizer = load_model(start, config)
    problems = load_problems(config.data, config.guide, tokenizer, config)
    tests = load_problems(config.test_data, "none", tokenizer, config)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate,
                                  weight_decay=config.weight_decay)
    return model, tokenizer, optimizer, problems, tests

def train(config: Config) -> Path:
    """From the base, or the checkpoint, to config.steps; returns the run folder."""
    folder, start = files.open_run(config)
    model, tokenizer, optimizer, problems, tests = prepare(start, config)
    done = files.restore(folder, optimizer, config)
    if done == 0:
        torch.manual_seed(config.seed)
        group = rollout(model, tokenizer, problems[:1], [bool(problems[0].guide)], 1, config)[0]
        files.show_start(model, problems, tests, group, config)
        files.append(folder, "metrics", [{"step": 0} | evaluate(model, tokenizer, tests, config)])
    bar, shown = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps), {}
    for step in bar:
        groups, metrics = train_step(model, tokenizer, optimizer, problems, step, config)
        if step == config.steps or step % config.eval_every == 0:
            metrics |= evaluate(model, tokenizer, tests, config)
            shown["unguided"] = metrics["pass@1"]["mean"][0]
            if shown["unguided"] > files.best_accuracy(folder):
                files.save_checkpoint(folder, "best", model, tokenizer, optimizer, step)
        files.append(folder, "metrics", [metrics])
        files.append(folder, "rollouts", [
            {"step": step, "question": g.problem.question, "rewards": g.rewards,
             "guide": g.problem.guide if g.guided else "", "completions": g.texts} for g in groups])
        if STOP or step == config.steps or step % config.save_every == 0:
            files.save_checkpoint(folder, "checkpoint", model, tokenizer, optimizer, step)
        bar.set_postfix(shown | {k: metrics[k] for k in metrics if re.match("reward|zero", k)})
        if STOP:
            raise KeyboardInterrupt
    return folder

def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    files.quiet()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(Config, exit_on_error=False, allow_abbrev=False,
                              usage="smepo.py [--flag value ...], smepo.py mask, compare or export")
    try:
        if arguments[:1] in (["mask"], ["compare"], ["export"]):
            import_module(f"tiny_tasks.{arguments[0]}").main(arguments[1:])
            return 0
        config, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if rest:
            raise UserError(f"unknown flag {rest[0]}: --help lists them all")
        files.report(train(config), start)
        return 0
    except (UserError, argparse.ArgumentError, OSError) as error:
        print(f"smepo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: --resume continues from the last checkpoint", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.modules["smepo"] = sys.modules[__name__]  # what tiny_tasks imports: this very module
    sys.stdout.reconfigure(errors="replace")  # a Windows pipe may not know every sign
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
