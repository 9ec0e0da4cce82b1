"""`python -m tiny_tasks.show`: one training step by hand, as text or as a page to project.

`take_step` calls what the training calls, for one problem; `explain` makes sections of it, which
are printed or become a page.
"""

import argparse
import io
import math
import re
import statistics
import sys
import textwrap
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import torch

import smepo
from smepo import Config, Rollout, UserError
from tiny_tasks import toys

TRIES = 20  # problems, until the rollouts of one are neither all wrong nor all right
STEP = 1  # the training of the same seed begins with the same problem
WIDTH = 100
HIDDEN, RIGHT, WRONG, END = SIGNS = "\ue000\ue001\ue002\ue003"  # around a marked word
PLAIN = {HIDDEN: "«", RIGHT: "«", WRONG: "«", END: "»"}  # on a pipe, too
COLOURS = {HIDDEN: "\033[7m", RIGHT: "\033[1;32m", WRONG: "\033[1;31m", END: "\033[0m"}
TAGS = {HIDDEN: "<b>", RIGHT: "<b class=right>", WRONG: "<b class=wrong>", END: "</b>"}
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>One step of SMEPO</title><style>
body { font: 22px/1.4 sans-serif; max-width: 60em; margin: 1em auto; padding: 0 1em }
td { font-family: monospace; white-space: pre-wrap; vertical-align: top; padding: 0 .5em }
tr:first-child > :not(:only-child) { font-weight: bold; border-bottom: 2px solid }
b { background: #222; color: #fff } .right { background: #05652b } .wrong { background: #b00020 }
</style></head><body><h1>One step of SMEPO</h1>"""
EQUATIONS = "context    c" + smepo.__doc__.partition("context    c")[2].partition("Shapes")[0]


@dataclass
class Step:
    config: Config
    tokenizer: object
    rollouts: list[Rollout]  # G, of one problem
    skipped: list[str]  # a line on each problem before it, which had nothing to teach
    before: list[list[float]]  # log pi_old of each rollout's tokens, 0 where one was told
    after: list[list[float]]  # log pi, once the optimizer has moved it
    bare: list[float]  # log pi_old of each rollout under the question without a guide
    stats: dict  # what `update` returns


@dataclass
class Section:
    title: str
    notes: list[str]  # one thought each
    table: list[list]  # rows of texts and numbers, the header first; a text is a single cell


def find_group(model, tokenizer, config: Config) -> tuple[list[Rollout], list[str]]:
    """The rollouts of the first problem with something to teach, and why those before have not."""
    with redirect_stdout(io.StringIO()):  # without the line on columns
        problems = smepo.load_problems(config.data, config.guide, tokenizer, config)
    skipped = []
    for problem in smepo.draw_problems(problems, STEP, replace(config, prompts_per_step=TRIES)):
        rollouts, _ = smepo.collect_rollouts(model, tokenizer, [problem], STEP, config)
        rewards = [r.reward for r in rollouts]
        teaches = smepo.group_advantages(rewards, len(rewards)).any().item()
        if teaches or config.guide == "full":  # its usual slide: all right, all A 0
            return rollouts, skipped
        reason = f"all {len(rewards)} rollouts earn {rewards[0]:g}, so every advantage is 0"
        skipped.append(f"Passed over: {mark(problem.question)}: {reason}, and the gradient.")
    return rollouts, [f"{TRIES} problems in a row have nothing to teach; this is the last."]


@torch.no_grad()
def logprobs(model, rollouts: list[Rollout], config) -> list[list[float]]:
    scored = []
    for r in rollouts:
        found, sampled = smepo.score(model, [r], config)
        scored += (found * sampled).tolist()
    return scored


def take_step(config: Config) -> Step:
    config.mini_batches = 1  # one optimizer step
    torch.set_num_threads(config.threads)
    model, tokenizer = smepo.load_model(config.model, config)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    rollouts, skipped = find_group(model, tokenizer, config)
    before = logprobs(model, rollouts, config)
    unguided = [replace(r, prompt_ids=r.problem.prompts[False]) for r in rollouts]
    bare = [sum(tokens) for tokens in logprobs(model, unguided, config)]
    stats = smepo.update(model, tokenizer, optimizer, rollouts, config)
    after = logprobs(model, rollouts, config)
    return Step(config, tokenizer, rollouts, skipped, before, after, bare, stats)


def mark(text: str, spans=None, sign: str = HIDDEN) -> str:
    """Each word of the spans, or else each mask, between signs; what is unprintable is a blank."""
    text = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
    if spans is None:
        spans = [match.span() for match in re.finditer(r"\[[A-Z]+\]", text)]
    for start, end, *_ in reversed(spans):
        words = re.sub(r"\S+", rf"{sign}\g<0>{END}", text[start:end])
        text = text[:start] + words + text[end:]
    return text


def mark_rewarded(r: Rollout, domain: str) -> str:
    """On one line, with what the verifier reads: the last program, or the stated answer."""
    if not r.ended:
        return mark(f"{r.text} ... (cut off)").replace("\n", "↵ ")
    answer = smepo.stated(r.text)
    start = r.text.rfind(answer)
    spans = [(start, start + len(answer))]
    if domain == "code":
        spans = smepo.hidden_spans(r.text, domain)[-1:]
    return mark(r.text, spans, RIGHT if r.reward else WRONG).replace("\n", "↵ ")


def explain_prompt(step: Step) -> list[Section]:
    config, r = step.config, step.rollouts[0]
    p = r.problem
    truth = f"Its ground truth a, for the verifier alone: {mark(p.answer)}"
    trace = mark(p.trace, smepo.hidden_spans(p.trace, config.domain, p.answer))
    leak = f"The answer can{'' if p.leaky else 'not'} be read off it."
    prompt = mark(step.tokenizer.decode(r.prompt_ids))
    question = Section("Question x", [*step.skipped, truth], [[mark(p.question)]])
    if not r.guided:
        return [question, Section("Prompt c", ["The question alone."], [[prompt]])]
    reads = [
        "It samples from this, so π and π_old of the ratio are given this, guide and all.",
        f"Under the bare question rollout 1 has log π {step.bare[0]:.3g}, not "
        f"{sum(step.before[0]):.3g}: a ratio of the two would be far from 1 before any weight "
        "has moved, so it would compare two prompts, and the clip would act at once.",
    ]
    return [
        question,
        Section("Trace t", ["Marked is what the reward hangs on."], [[trace]]),
        Section(f"Guide {config.guide}: what is shown of t", [leak], [[mark(p.guide) or "-"]]),
        Section("Prompt c", reads, [[prompt]]),
    ]


def explain_group(step: Step) -> Section:
    table = [["i", "reward", "A", "tokens", "completion o"]]
    for i, r in enumerate(step.rollouts, start=1):
        completion = mark_rewarded(r, step.config.domain)
        table.append([i, r.reward, r.advantage, sum(r.sampled), completion])
    rewards, n = [r.reward for r in step.rollouts], len(step.rollouts)
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    total = sum(r.advantage for r in step.rollouts)
    notes = [
        f"The mean of the rewards is {mean:g}. Their std is {std:.3g}: the root of the sum of "
        f"(reward - mean)² / {n - 1}, which is n - 1.",
        f"The advantage A = (reward - mean) / std; the sum of the {n} of them is {total:.1g}.",
    ]
    if std == 0:
        notes.append("All rewards are equal, so all A are 0: nothing of this group is learned.")
    if step.config.advantage_scale == "none":
        notes[1] = f"The advantage A = reward - mean; the sum of the {n} of them is {total:.1g}."
    return Section(f"{n} rollouts, a group", notes, table)


def token_cells(new: float, old: float, count: int, r: Rollout, config) -> list:
    """Ratio, clipped or not, and the share of the loss: policy_loss of this token alone."""
    tensors = torch.tensor([[new]]), torch.tensor([[old]]), torch.tensor([r.advantage])
    limits = config.clip_low, config.clip_high
    loss, stats = smepo.policy_loss(*tensors, torch.ones(1, 1), *limits)
    return [math.exp(new - old), "yes" if stats["clip_fraction"] else "no", loss.item() / count]


def explain_tokens(step: Step, i: int) -> Section:
    config, r = step.config, step.rollouts[i]
    count = len(step.rollouts) * sum(r.sampled)  # the mean is over a rollout, then over the group
    update = ["log π", "ratio", "clip", "share"]
    table = [["t", "token", "log π_old", *update[1:], *update]]
    for t, (old, new) in enumerate(zip(step.before[i], step.after[i], strict=True)):
        row = [t + 1, repr(step.tokenizer.decode(r.ids[t]))[:18], "told", *"-------"]
        if r.sampled[t]:  # else an environment wrote it: no loss
            row[2:6] = [old, *token_cells(old, old, count, r, config)]
            row[6:] = [new, *token_cells(new, old, count, r, config)]
        table.append(row)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    total = sum(row[5] for row in table[1:] if row[2] != "told")
    notes = [
        "ratio = π / π_old: exactly 1, as no weight has moved since the token was sampled.",
        f"clip: whether to hold the ratio within {low:g} and {high:g} matters; at 1 it cannot.",
        f"share of the loss = -min(ratio A, clip(ratio) A) / {count}; their sum is {total:.3g}.",
        "The last four columns: after the step, what a second update on it would begin with.",
    ]
    return Section(f"Rollout {i + 1}, token by token, A = {r.advantage:.3g}", notes, table)


def explain_update(step: Step, i: int) -> Section:
    table = [["i", "A", "share of loss", "log π_old(o|c)", "log π(o|c)", "π_old(o|c)", "π / π_old"]]
    for n, r in enumerate(step.rollouts):
        old, new = sum(step.before[n]), sum(step.after[n])
        row = [n + 1, r.advantage, -r.advantage / len(step.rollouts), old, new]
        table.append([*row, math.exp(old), math.exp(new - old)])
    way = "rises" if sum(step.after[i]) > sum(step.before[i]) else "falls"
    loss, norm = step.stats["loss"], step.stats["grad_norm"]
    notes = [
        f"loss {loss:.1e}: about 0, as every ratio is 1 and the advantages of a group sum to 0.",
        f"gradient norm {norm:.3g}: not 0, as the gradient is that of the mean of -A log π.",
        f"AdamW takes one step. Rollout {i + 1} has A > 0, and its probability {way}.",
        "One that shares much with rollouts of the other sign may move against its own A.",
    ]
    return Section("The loss, its gradient, and the step", notes, table)


def explain(step: Step) -> list[Section]:
    advantages = [r.advantage for r in step.rollouts]
    best = advantages.index(max(advantages))
    sections = [*explain_prompt(step), explain_group(step)]
    if not any(advantages):
        notes = ["Every A is 0, so the gradient is 0, and AdamW takes no step."]
        return [*sections, Section("No gradient", notes, [])]
    return [*sections, explain_tokens(step, best), explain_update(step, best)]


def as_cells(row: list) -> list[str]:
    return [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row]


def as_text(section: Section) -> str:
    title = f"── {section.title} ".ljust(WIDTH, "─")
    lines = ["", title, *(textwrap.fill(note, WIDTH) for note in section.notes)]
    table = [as_cells(row) for row in section.table]
    columns = list(zip(*table, strict=True))[:-1] if table else []
    widths = [max(map(len, column)) + 2 for column in columns]
    for *cells, last in table:
        lead = "".join(map(str.ljust, cells, widths))
        for line in last.split("\n"):
            indent = " " * sum(widths)
            full = textwrap.fill(line, WIDTH, initial_indent=lead, subsequent_indent=indent)
            lines.append(full or lead)
            lead = indent
    return "\n".join(lines)


def as_page(sections: list[Section]) -> str:
    parts = [HEAD, f"<pre>{escape(EQUATIONS)}</pre>"]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(note)}</p>" for note in section.notes]
        parts.append("<table>")
        for row in section.table:
            cells = [f"<td>{escape(cell)}</td>" for cell in as_cells(row)]
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</table>")
    return "\n".join([*parts, "</body></html>", ""]).translate(str.maketrans(TAGS))


def main(arguments: list[str] | None = None) -> None:
    about = "One training step by hand. The flags of the training hold here, too: smepo.py --help"
    exact = {"exit_on_error": False, "allow_abbrev": False}
    parser = argparse.ArgumentParser("show", description=about, **exact)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, too")
    given, rest = parser.parse_known_args(arguments)
    if given.html and (given.html.is_dir() or not given.html.parent.is_dir()):
        raise UserError(f"--html {given.html}: name a file in a folder that is there")
    sections = explain(take_step(smepo.parse(rest)))
    codes = COLOURS if sys.stdout.isatty() else PLAIN
    print("\n".join(map(as_text, sections)).translate(str.maketrans(codes)))
    if given.html:
        with smepo.replacing(given.html) as new:
            new.write_text(as_page(sections), encoding="utf-8")
        print(f"\nThe page is {given.html}")


if __name__ == "__main__":
    sys.exit(toys.command(main))
