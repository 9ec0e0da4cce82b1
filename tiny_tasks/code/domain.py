"""The domain code: the verifier reads the last closed block, so the mask hides all programs.

The plan is the prose between them, with names and costs, but not what computes: `dp[i-1] + 1`.
"""

import re
import textwrap

from smepo import Domain, UserError
from tiny_tasks.code import judge

# ---- What is hidden ----
# What matches first wins: kept inline code, a block, other inline code.
KEEP = r"`+[OΘΩT]\([^`\n]*\)`+|`+[\w.]*\w\(\)`+|`+[a-z]{2,}(?:-[a-z]+)+`+"  # `O(n)`, `join()`
BLOCK = (  # in a quote, in a list, after a word; up to its fence, or the end
    r"^(?:[ \t>]*|[^`~\n]{0,99}(?=`{3,}[\w+#-]*[ \t\r]*$))(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})"
    r".*(?:\n|\Z)[> \t\r\n]*(?P<block>[\s\S]*?)(?:^[ \t>]*(?P=fence)[`~]*[ \t]*\r?$|\Z)"
)
INLINE = r"(?<!`)(?P<ticks>`+)(?!`)(?P<inline>.+?)(?<!`)(?P=ticks)(?!`)"
RULE = re.compile(f"{KEEP}|{BLOCK}|{INLINE}", re.MULTILINE)
COMPUTES = re.compile(  # a call, an index, an operator between two values, a keyword
    r"[\w)\]][(\[]|[\w)\]'\"] ?[-+*/%^&|<>=!~:]{1,3} ?[\w([{'\"-]|\+\+|--"
    r"|[\w)\]] (?:and|or|in|if) \w|\b(?:return|lambda) \w"
)
CODE_LINE = re.compile(  # of a program without a fence
    r"\s*(?:(?:def|class|for|from|import|return)\b[^.?!]*[\w):{;]"
    r"|(?:while|if|elif|else|try|with)\b[^.?!]*:"
    r"|(?:#!|#include|//|/\*|<|(?:SELECT|CREATE|INSERT|UPDATE) ).*"
    r"|[\w.$\[\]]+(?:, ?[\w.]+)* ?[-+*/]?= ?\S.*|[\w.]+\(.*\)|.*[;{}])\s*$"
)


def code_spans(trace: str, answer: str) -> list[tuple]:
    """What a block holds, and inline code that computes; without a block, what is a program."""
    found = list(RULE.finditer(trace))
    spans = [match.span("inline") for match in found if COMPUTES.search(match["inline"] or "")]
    blocks = [match.span("block") for match in found if match["block"]]
    lines = list(re.finditer(r"\S.*", trace))
    code = [line for line in lines if CODE_LINE.match(line[0])]
    if code and not blocks and code[0] is lines[0]:
        blocks = [(code[0].start(), len(trace))]
    elif not blocks and len(code) > len(lines) / 2:
        blocks = [(code[0].start(), code[-1].end())]
    spans += [(start, start + len(trace[start:end].rstrip())) for start, end in blocks]
    return [(*span, "[CODE]") for span in spans if trace[slice(*span)] != "[CODE]"]


# ---- The leak check: it shares nothing with the mask ----

STATEMENT = re.compile(
    r"\s*(?:(?:def|for|while|if) [^.?!]*:|return \S+(?: \S+)?"
    r"|[\w.\[\]]+ ?[-+*/]?= ?\S.*|[^.?!]*[\w)] ?[;{])\s*"
)


def code_leaks(masked: str, answer: str) -> bool:
    """Is a line left in a fence, or inline code that computes, or a line of code elsewhere?"""
    outside, fence = [], ""
    for line in re.sub(r"\$\$[^$]*\$\$", "", masked).split("\n"):  # without formulas
        mark = re.match(r"[\s>]*(?:[-*+] |\d+[.)] )?(?:[^`~]*(?=```[\w+#-]*$))?(```+|~~~+)", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif fence and line.replace("[CODE]", "").strip("> \t\r"):
            return True
        elif not fence and not re.search(r"\\[A-Za-z]{2}", line):  # a formula
            outside.append(re.sub(r"`*\[CODE\]`*", "", line).rstrip())
    for inline in re.findall(r"`+([^`]+)`", "\n".join(outside)):
        harmless = re.fullmatch(r" ?[OoΘΩT]\(.*\) ?|[\w.]+\(\)|[a-z]+(?:-[a-z]+)+", inline)
        if not harmless and re.search(
            r"\w[(\[] ?[\w\"'-]|[^<>=!]=[^=]|\w\)? ?[-+*/%<>]+ ?\w", inline
        ):
            return True
    return any(STATEMENT.fullmatch(line) for line in outside if "`" not in line)


# ---- The reward ----

PROGRAM = re.compile(r"^[ \t]*```.*\n([\s\S]*?)^[ \t]*```", re.MULTILINE)


def code_rewards(completions: list[str], tests: list[str]) -> list[float]:
    """1.0 where the last closed ``` block passes its tests. All are judged at once, in parallel."""
    try:
        list(map(judge.cases, set(tests)))
    except ValueError as error:
        raise UserError(f"a ground truth of code is unreadable: {error}") from error
    blocks = [PROGRAM.findall(text) or ["raise SystemExit(1)"] for text in completions]
    programs = [textwrap.dedent(found[-1]) for found in blocks]
    return [float(passed) for passed in judge.judge(programs, tests)]


DOMAIN = Domain(spans=code_spans, leaks=code_leaks, rewards=code_rewards)
