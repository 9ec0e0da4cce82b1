"""`python -m tiny_tasks.show`: one training step by hand, as text or as a page to project."""

import math
import random
import re
import statistics
import sys
import textwrap
from collections import namedtuple
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import torch

import smepo
from smepo import Config, Rollout
from tiny_tasks import mask, toys

TRIES = 20  # problems, until the rollouts of one are neither all wrong nor all right
STEP = 1  # the training of the same seed begins with the same problem
WIDTH = 100
HIDDEN, RIGHT, WRONG, END = "\ue000\ue001\ue002\ue003"  # around a marked word
PLAIN = {HIDDEN: "«", RIGHT: "«", WRONG: "«", END: "»"}  # on a pipe, too
COLOURS = {HIDDEN: "\033[7m", RIGHT: "\033[1;32m", WRONG: "\033[1;31m", END: "\033[0m"}
TAGS = {HIDDEN: "<b>", RIGHT: "<b class=right>", WRONG: "<b class=wrong>", END: "</b>"}
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>One training step</title><style>
body { font: 22px/1.4 sans-serif; margin: 1em 2em } pre { font: 20px/1.4 monospace }
b { background: #222; color: #fff } .right { background: #05652b } .wrong { background: #b00020 }
</style></head><body><h1>One training step</h1>"""
EQUATIONS = textwrap.dedent(re.search(r" +guide_trace .*?A_i\)\n", smepo.__doc__, re.DOTALL)[0])


@dataclass
class Step:
    config: Config
    tokenizer: object
    rollouts: list[Rollout]  # G, of one problem
    skipped: list[str]  # a line on each problem before it, which had nothing to teach
    before: list[list[float]]  # log pi_old of each rollout's tokens, 0 where one was told
    after: list[list[float]]  # log pi, once the optimizer has moved it
    bare: float  # log pi_old of rollout 1 under the question without a guide
    stats: dict  # what `update` returns


# notes: one thought each. table: rows of texts and numbers, the header first; a text is one cell.
Section = namedtuple("Section", "title notes table")


def find_group(model, tokenizer, config: Config) -> tuple[list[Rollout], list[str]]:
    """The rollouts of the first problem with something to teach, and why those before have not."""
    problems = smepo.load_problems(config.data, config.guide, tokenizer, config)
    skipped = []
    torch.manual_seed(config.seed * 1_000_003 + STEP)  # as smepo.train_step draws them
    for problem in random.Random(f"{config.seed} {STEP}").choices(problems, k=TRIES):
        (rollouts,) = smepo.collect_rollouts(model, tokenizer, [problem], STEP, config)
        question, reward = mark(problem.question), rollouts[0].reward
        if any(r.reward != reward for r in rollouts) or config.guide == "full":  # there all A are 0
            return rollouts, skipped
        skipped.append(f"Passed over: {question}: all rollouts earn {reward:g}, so all A are 0.")
    return rollouts, [f"{TRIES} problems in a row have nothing to teach; this is the last."]


@torch.no_grad()
def logprobs(model, rollouts: list[Rollout], config: Config) -> list[list[float]]:
    scored = [smepo.score(model, [r], config) for r in rollouts]
    return [(found * sampled)[0].tolist() for found, sampled in scored]


def take_step(config: Config) -> Step:
    config = replace(config, mini_batches=1, expert_coef=0.0)  # one step, of the policy loss alone
    torch.set_num_threads(config.threads)
    model, tokenizer = smepo.load_model(config.model, config)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    rollouts, skipped = find_group(model, tokenizer, config)
    before = logprobs(model, rollouts, config)
    unguided = replace(rollouts[0], prompt_ids=rollouts[0].problem.prompts[False])
    bare = sum(logprobs(model, [unguided], config)[0])
    stats = smepo.update(model, tokenizer, optimizer, rollouts, config)
    after = logprobs(model, rollouts, config)
    return Step(config, tokenizer, rollouts, skipped, before, after, bare, stats)


def mark(text: str, spans=None, sign: str = HIDDEN) -> str:
    """Each word of the spans, or else each mask, between signs; what is unprintable is a blank."""
    text, marked = mask.printable(text), []
    if spans is None:
        spans = [(*match.span(), "") for match in re.finditer(r"\[[A-Z]+\]", text)]
    for start, end, _ in mask.merged(spans):
        marked.append((start, end, re.sub(r"\S+", rf"{sign}\g<0>{END}", text[start:end])))
    return smepo.replace_spans(text, marked)


def mark_rewarded(r: Rollout, domain: str) -> str:
    """On one line, with what the verifier reads: the last program, or the stated answer."""
    if not r.ended:
        return mark(f"{r.text} ... (cut off)").replace("\n", "↵ ")
    answer = smepo.stated(r.text)
    start = r.text.rfind(answer)
    spans = [(start, start + len(answer), "")]
    if domain == "code":
        spans = smepo.hidden_spans(r.text, domain)[-1:]
    return mark(r.text, spans, RIGHT if r.solved else WRONG).replace("\n", "↵ ")


def explain_prompt(step: Step) -> list[Section]:
    config, r = step.config, step.rollouts[0]
    p = r.problem
    truth = f"Its ground truth a, for the verifier alone: {mark(p.answer)}"
    question = Section("Question x", [*step.skipped, truth], [[mark(p.question)]])
    prompt = mark(step.tokenizer.decode(r.prompt_ids))
    if not r.guided:
        return [question, Section("Prompt c", ["The question alone."], [[prompt]])]
    trace = mark(p.trace, smepo.hidden_spans(p.trace, config.domain, p.answer))
    leaky = smepo.leaks(p.guide, p.answer, config.domain)
    leak = f"The answer can{'' if leaky else 'not'} be read off it."
    c, x = sum(step.before[0]), step.bare
    reads = [
        "The rollouts are sampled from c, so π and π_old of the ratio are given c, guide and all.",
        f"Rollout 1 has log π_old(o|c) = {c:.3g}, but log π_old(o|x) = {x:.3g}: their ratio is "
        f"e^{x - c:.3g} before any weight has moved, and compares two prompts, not two policies.",
    ]
    return [
        question,
        Section("Trace", ["Marked is what the reward hangs on."], [[trace]]),
        Section(f"Guide {config.guide}: what is shown of it", [leak], [[mark(p.guide) or "-"]]),
        Section("Prompt c", reads, [[prompt]]),
    ]


def explain_group(step: Step) -> Section:
    rewards, n = [r.reward for r in step.rollouts], len(step.rollouts)
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    table = [["i", "reward", "reward - mean", "A", "tokens", "completion o"]]
    for i, r in enumerate(step.rollouts, start=1):
        completion = mark_rewarded(r, step.config.domain)
        table.append([i, r.reward, r.reward - mean, r.advantage, sum(r.sampled), completion])
    notes = [
        f"The mean of the {n} rewards is {mean:g}; their std is {std:.3g}, the root of the sum of "
        f"(reward - mean)² / {n - 1}: over n - 1, as a sample's.",
        "The advantage A = (reward - mean) / std. Both columns sum to 0.",
    ]
    if step.config.advantage_scale == "none":
        notes = [f"The mean of the rewards is {mean:g}.", "A = reward - mean. They sum to 0."]
    if std == 0:
        notes.append("All rewards are equal, so all A are 0: no gradient, and AdamW takes no step.")
    return Section(f"{n} rollouts, a group", notes, table)


def explain_tokens(step: Step, i: int) -> Section:
    config, r = step.config, step.rollouts[i]
    A, limits = r.advantage, (config.clip_low, config.clip_high)
    count = len(step.rollouts) * sum(r.sampled)  # a mean over the rollout, then over the group
    table = [["t", "token", "log π_old", "log π", "ratio", "clip", "share"]]
    for t, (old, new) in enumerate(zip(step.before[i], step.after[i], strict=True)):
        cells = ["told", *"----"]  # an environment wrote it: no loss
        if r.sampled[t]:
            tensors = torch.tensor([[new]]), torch.tensor([[old]]), torch.tensor([A])
            loss, stats = smepo.policy_loss(*tensors, torch.ones(1, 1), *limits)
            clip = "yes" if stats["clip_fraction"] else "no"
            cells = [old, new, math.exp(new - old), clip, loss.item() / count]
        table.append([t + 1, repr(step.tokenizer.decode(r.ids[t]))[:18], *cells])
    notes = [
        "In the step every ratio = π / π_old is exactly 1, as no weight has moved; the share of "
        f"the loss = -min(ratio A, clip(ratio) A) / {count} is {-A / count:.3g} of each token.",
        f"From log π on: after the step. The clip is to {1 - limits[0]:g} .. {1 + limits[1]:g}.",
    ]
    return Section(f"Rollout {i + 1}, token by token, A = {A:.3g}", notes, table)


def explain_update(step: Step, i: int) -> Section:
    table = [["i", "A", "log π_old(o|c)", "log π(o|c)", "π / π_old"]]
    for n, r in enumerate(step.rollouts):
        old, new = sum(step.before[n]), sum(step.after[n])
        table.append([n + 1, r.advantage, old, new, math.exp(new - old)])
    notes = [
        f"loss {step.stats['loss']:.1e}: about 0, as every ratio is 1 and the A sum to 0.",
        f"gradient norm {step.stats['grad_norm']:.3g}: that of the mean of -A log π is not 0.",
        f"AdamW takes one step. Rollout {i + 1} has A > 0: π / π_old should be above 1.",
    ]
    return Section("The loss, its gradient, and the step", notes, table)


def explain(step: Step) -> list[Section]:
    advantages = [r.advantage for r in step.rollouts]
    sections = [*explain_prompt(step), explain_group(step)]
    if any(advantages):
        best = advantages.index(max(advantages))
        sections += [explain_tokens(step, best), explain_update(step, best)]
    return sections


def as_text(section: Section) -> str:
    lines = [*(textwrap.fill(note, WIDTH) for note in section.notes), ""]
    table = [[c if isinstance(c, str) else f"{c:.3g}" for c in row] for row in section.table]
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    indent = " " * sum(widths[:-1])
    for *cells, last in table:
        lead = "".join(map(str.ljust, cells, widths))
        for line in last.split("\n"):
            full = textwrap.fill(line, WIDTH, initial_indent=lead, subsequent_indent=indent)
            lines.append(full or lead)
            lead = indent
    return "\n".join(lines)


def as_page(sections: list[Section], guide: str) -> str:
    """The sections below the equations, which without a guide have no line on the trace."""
    equations = EQUATIONS.partition("\n")[2] if guide == "none" else EQUATIONS
    parts = [HEAD, f"<pre>{escape(equations)}</pre>"]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>\n<pre>{escape(as_text(section))}</pre>")
    return "\n".join([*parts, "</body></html>", ""]).translate(str.maketrans(TAGS))


def main(arguments: list[str] | None = None) -> None:
    parser = toys.Parser("show", "One training step by hand. It takes the flags of smepo.py, too.")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, too")
    given, rest = parser.parse_known_args(arguments)
    config = smepo.parse(rest)
    sections = explain(take_step(config))
    codes = COLOURS if sys.stdout.isatty() else PLAIN
    for section in sections:
        title = f"── {section.title} ".ljust(WIDTH, "─")
        print(f"\n{title}\n{as_text(section)}".translate(str.maketrans(codes)))
    if given.html:
        given.html.write_text(as_page(sections, config.guide), encoding="utf-8")
        print(f"\nThe page is {given.html}")


if __name__ == "__main__":
    sys.exit(toys.command(main))
