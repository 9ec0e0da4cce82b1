"""`python smepo.py mask`: what is hidden of one trace, or of a whole file of traces."""

import argparse
import re
import shutil
import sys
import textwrap
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import mean

from tqdm import tqdm

import smepo
from tiny_tasks import files

Cells = list[tuple[str, bool]]  # characters, and whether each is hidden or a mask


def paint(cells: Cells) -> str:
    """The text, with the marked runs in reverse video where the output is a terminal."""
    parts, colour = [], sys.stdout.isatty()
    for marked, run in groupby(cells, lambda cell: cell[1]):
        text = "".join(char for char, _ in run)
        parts.append(f"\033[7m{text}\033[0m" if marked and colour else text)
    return "".join(parts)


def wrap(cells: Cells, width: int) -> list[Cells]:
    text, at, lines = "".join(char for char, _ in cells), 0, []
    for line in textwrap.wrap(text, width, drop_whitespace=False, break_on_hyphens=False):
        lines.append(cells[at : at + len(line)])
        at += len(line)
    return lines or [[]]


def side_by_side(trace: str, spans: list[smepo.Span], width: int) -> list[str]:
    """Rows `trace | mask` of two columns, `width` each; a mask stands where its span begins."""
    hidden, masks, rows = [False] * len(trace), {start: mask for start, _, mask in spans}, []
    for start, end, _ in spans:
        hidden[start:end] = [True] * (end - start)
    for line in re.finditer(r"[^\r\n]+|(?<=\n)(?=\r?\n)", trace):
        left, right = [], []
        for at in range(*line.span()):
            left.append((trace[at] if trace[at].isprintable() else " ", hidden[at]))
            right += [(char, True) for char in masks.get(at, "")] + left[-1:] * (not hidden[at])
        for a, b in zip_longest(wrap(left, width), wrap(right, width), fillvalue=[]):
            rows.append(f"{paint(a)}{' ' * (width - len(a))} | {paint(b)}".rstrip())
    return rows


def show_trace(trace: str, domain: str, answer: str) -> None:
    """One trace beside its mask, and the verdict."""
    answer = answer or smepo.stated(trace)
    spans, width = smepo.hidden_spans(trace, domain, answer), shutil.get_terminal_size().columns
    print("\n".join(side_by_side(trace, spans, max(20, width // 2 - 2))))
    visible = len(trace) - sum(end - start for start, end, _ in spans)
    print(f"\n{len(spans)} span{'s' * (len(spans) != 1)} hidden, "
          f"{visible / len(trace):.0%} of the text kept")
    if domain != "code" and not answer:
        return print("no verdict on leaks: no --answer is given, and the trace states none")
    target = "the code" if domain == "code" else f"the answer {answer}"
    leaky = smepo.leaks(smepo.mask_trace(trace, domain, answer, spans), answer, domain)
    print(f"{'LEAKS' if leaky else 'no leak'}: {target} can{'' if leaky else 'not'} be read off")


def show_data(path: str, domain: str) -> None:
    """Leak rate, spans a trace and the share of text kept of each arm, over a whole file."""
    rows, arms = list(files.read_rows(path, wants_trace=True)), {}
    for question, answer, trace, _ in tqdm(rows):
        semantic = smepo.hidden_spans(trace, domain, answer)
        chosen = smepo.random_spans(trace, semantic, f"0 {question}")
        prefix = smepo.guide_trace(trace, "prefix", domain)
        for guide, text, spans in (("full", trace, []), ("prefix", prefix, []),
                                   ("random", trace, chosen), ("semantic", trace, semantic)):
            shown = smepo.mask_trace(text, domain, answer, spans)
            kept = len(text) - sum(end - start for start, end, _ in spans)
            arms.setdefault(guide, []).append((smepo.leaks(shown, answer, domain), len(spans),
                                               kept / len(trace)))
    print(f"{len(rows)} traces\nguide     leak rate  spans a trace  text kept")
    for guide, columns in arms.items():
        leaky, spans, kept = map(mean, zip(*columns, strict=True))
        print(f"{guide:<8}  {leaky:<9.3f}  {spans:<13.1f}  {kept:.3f}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="smepo.py mask", description=__doc__,
                                     exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--domain", choices=smepo.DOMAINS, default="math")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", help="a text file with one trace; without it, standard input")
    source.add_argument("--data", help="a jsonl or parquet file of problems with traces")
    parser.add_argument("--answer", default="", help="ground truth; else what the trace states")
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise smepo.UserError(f"unknown flag {rest[0]}: mask --help lists them all")
    if given.data:
        return show_data(given.data, given.domain)
    raw = Path(given.trace).read_bytes() if given.trace else sys.stdin.buffer.read()
    trace = raw.decode("utf-8-sig", errors="replace").strip("\r\n")
    if not trace.strip():
        raise smepo.UserError(f"{given.trace or 'standard input'} is empty: give a trace to mask")
    show_trace(trace, given.domain, given.answer)
