"""`python -m tiny_tasks.mask`: what is hidden of one trace, or of a whole file of traces."""

import sys
from pathlib import Path
from statistics import mean

from tqdm import tqdm

import smepo
from tiny_tasks import toys


def printable(text: str) -> str:
    """Tabs and what else would move the cursor are blanks."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def merged(spans: list[tuple]) -> list[tuple]:
    """As replace_spans shows them: those that overlap are one, with the first one's mask."""
    parts: list[tuple] = []
    for start, end, mask in spans:
        if parts and start < parts[-1][1]:
            start, last, mask = parts.pop()
            end = max(end, last)
        parts.append((start, end, mask))
    return parts


def show_trace(trace: str, domain: str, answer: str) -> None:
    """One trace, its mask below it, and the verdict. On a terminal the spans stand out."""
    answer = answer or smepo.stated(trace)
    spans = merged(smepo.hidden_spans(trace, domain, answer))
    begin, end = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("", "")
    seen = printable(trace)
    marked = [(a, b, begin + seen[a:b] + end) for a, b, _ in spans]
    masks = [(a, b, begin + mask + end) for a, b, mask in spans]
    for title, shown in ("trace", marked), ("mask", masks):
        print(f"---- {title}\n{smepo.replace_spans(seen, shown)}\n")
    print(f"spans hidden: {len(spans)}, text kept: {kept(trace, spans):.0%}")
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
        return show_data(smepo.Config(domain=given.domain, data=given.data, test_data=given.data))
    raw = Path(given.trace).read_bytes() if given.trace else sys.stdin.buffer.read()
    trace = raw.decode("utf-8-sig", errors="replace").strip("\r\n")
    if not trace.strip():
        raise smepo.UserError(f"{given.trace or 'standard input'} is empty: give a trace to mask")
    show_trace(trace, given.domain, given.answer)


if __name__ == "__main__":
    sys.exit(toys.command(main))
