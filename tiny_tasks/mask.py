"""`python -m tiny_tasks.mask`: what is hidden of one trace, or of a whole file of traces."""

import re
import shutil
import sys
import textwrap
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import mean

from tqdm import tqdm

import smepo
from tiny_tasks import toys

Cells = list[tuple[str, bool]]  # characters, and whether each is hidden or a mask


def paint(cells: Cells) -> str:
    """The text, with the marked runs in reverse video where the output is a terminal."""
    parts, colour = [], sys.stdout.isatty()
    for marked, run in groupby(cells, lambda cell: cell[1]):
        text = "".join(char for char, _ in run)
        parts.append(f"\033[7m{text}\033[0m" if marked and colour else text)
    return "".join(parts)


def merged(spans: list[tuple]) -> list[tuple]:
    """As replace_spans shows them: those that overlap are one, with the first one's mask."""
    parts: list[tuple] = []
    for start, end, mask in spans:
        if parts and start < parts[-1][1]:
            start, last, mask = parts.pop()
            end = max(end, last)
        parts.append((start, end, mask))
    return parts


def wrap(cells: Cells, width: int) -> list[Cells]:
    text, at, lines = "".join(char for char, _ in cells), 0, []
    for line in textwrap.wrap(text, width, drop_whitespace=False, break_on_hyphens=False):
        lines.append(cells[at : at + len(line)])
        at += len(line)
    return lines or [[]]


def columns_of(trace: str, around: dict[int, tuple], start: int, end: int):
    """A line of the trace, and of its mask, which stands where its span begins. `around`: the span
    of each hidden character."""
    left, right = [], []
    for at in range(start, end):
        char = trace[at] if trace[at].isprintable() else " "
        left.append((char, at in around))
        if at not in around:
            right.append((char, False))
        elif around[at][0] == at:
            right += [(sign, True) for sign in around[at][2]]
    return left, right


def side_by_side(trace: str, spans: list[tuple], width: int) -> list[str]:
    """Rows `trace | mask` of two columns, `width` each."""
    rows, around = [], {at: span for span in spans for at in range(*span[:2])}
    for line in re.finditer(r"[^\r\n]+|(?<=\n)(?=\r?\n)", trace):
        left, right = columns_of(trace, around, *line.span())
        for a, b in zip_longest(wrap(left, width), wrap(right, width), fillvalue=[]):
            rows.append(f"{paint(a)}{' ' * (width - len(a))} | {paint(b)}".rstrip())
    return rows


def show_trace(trace: str, domain: str, answer: str) -> None:
    """One trace beside its mask, and the verdict."""
    answer = answer or smepo.stated(trace)
    spans = merged(smepo.hidden_spans(trace, domain, answer))
    width = shutil.get_terminal_size().columns
    print("\n".join(side_by_side(trace, spans, max(20, width // 2 - 2))))
    plural = "" if len(spans) == 1 else "s"
    print(f"\n{len(spans)} span{plural} hidden, {kept(trace, spans):.0%} of the text kept")
    target = "the code" if domain == "code" else f"the answer {answer}"
    if domain != "code" and not answer:
        print("no verdict on leaks: no --answer is given, and the trace states none")
    elif smepo.leaks(smepo.replace_spans(trace, spans), answer, domain):
        print(f"LEAKS: {target} can be read off")
    else:
        print(f"no leak: {target} cannot be read off")


def kept(trace: str, spans: list[tuple]) -> float:
    return 1 - sum(end - start for start, end, _ in spans) / len(trace)


def show_data(config: smepo.Config) -> None:
    """Leak rate, spans a trace and the share of text kept of each arm, over a whole file."""
    problems = smepo.read_problems(config.data, "full", config)
    if not problems:
        raise smepo.UserError(f"{config.data} has no rows")
    arms = {"full": [], "prefix": [], "random": [], "semantic": []}
    for p in tqdm(problems):
        prefix = smepo.guide_trace(p.trace, "prefix", config.domain)
        semantic = merged(smepo.hidden_spans(p.trace, config.domain, p.answer))
        spans = {
            "full": [],
            "prefix": [(len(prefix), len(p.trace), "")],
            "random": smepo.random_spans(p.trace, semantic, f"0 {p.question}"),
            "semantic": semantic,
        }
        for guide, hidden in spans.items():
            shown = smepo.replace_spans(p.trace, hidden)
            masks = [mask for _, _, mask in hidden if mask]
            leaky = smepo.leaks(shown, p.answer, config.domain)
            arms[guide].append((leaky, len(masks), kept(p.trace, hidden)))
    print(f"{len(problems)} traces\nguide     leak rate  spans a trace  text kept")
    for guide, measured in arms.items():
        leak_rate, spans, text = map(mean, zip(*measured, strict=True))
        print(f"{guide:<8}  {leak_rate:<9.3f}  {spans:<13.1f}  {text:.3f}")


def main(arguments: list[str] | None = None) -> None:
    parser = toys.Parser("mask", __doc__)
    parser.add_argument("--domain", default="math", help="math, code, search or your own module")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", help="a text file with one trace; without it, standard input")
    source.add_argument("--data", help="problems with traces, as a run takes them")
    parser.add_argument("--answer", default="", help="ground truth; else what the trace states")
    given = parser.parse_args(arguments)
    if given.data:
        files = {"data": given.data, "test_data": given.data}
        return show_data(smepo.Config(domain=given.domain, **files))
    raw = Path(given.trace).read_bytes() if given.trace else sys.stdin.buffer.read()
    trace = raw.decode("utf-8-sig", errors="replace").strip("\r\n")
    if not trace.strip():
        raise smepo.UserError(f"{given.trace or 'standard input'} is empty: give a trace to mask")
    show_trace(trace, given.domain, given.answer)


if __name__ == "__main__":
    sys.exit(toys.command(main))
