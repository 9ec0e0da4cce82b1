"""The domain code: what the verifier reads is the last program, so the mask hides all programs.

The plan is the prose between them. It keeps the names, costs and links that stand in back-ticks,
but not what computes: `dp[i-1] + dp[i-2]` is the solution.
"""

import re

from smepo import Domain, Span
from tiny_tasks.code import judge

# ---- The mask: one rule an entry, the first that fits wins, from left to right -------------------

SIGN = r"""(?: [\w)\]] [(\[] | \w\+\+ | --\w | \blambda\b |  # a call, an index, or an operator:
    [\w)\]'"] [ ]? [-+*/%^&|<>=!~]{1,3} [ ]? [\w(\[{'"-] )"""
COMPUTES = re.compile(SIGN, re.VERBOSE)
KEY = r"(?: code | source | script | program | python | command | input | old | new )"

RULES = {  # an example: its pattern, of which the group is hidden; without a group all is kept
    "`O(n log n)`": r"`{1,2} [OoΘΩT\\Thetamg]{1,6} [ ]? \( [^`\n]* \) [.,]? `{1,2}",
    "`left-to-right`": r"`{1,2} [a-z]{2,} (?: - [a-z]{2,} )+ `{1,2}",
    "`.equals()`": r"`{1,2} \. \w+ \(\) `{1,2}",
    "```python\nx = 1\n```": r"""
        ^ (?P<quote> [ \t]*> )?  # in a quote, in a list, after a word
        (?: [ \t>]* (?: [-*+][ ] | \d+[.)][ ] )? |
            [^`~<"\\\n]{0,99} (?= `{3,} [\w+\#-]* [ \t\r]* $ ) )
        (?P<fence> `{3,} (?= [^`\n]* $ ) | ~{3,} ) (?! .* \[CODE\] ) .* (?: \n | \Z )
        (?P<block_fence> [\s\S]*? )
        (?: ^[ \t>]* (?P=fence) [`~]* [ \t]* \r?$ | (?(quote) ^(?! [ \t]*> ) | \Z ) | \Z )""",
    "<pre>x = 1</pre>": r"""
        < (?P<tag> (?i: pre | code ) ) \b [^>\n]{0,99} > (?: <code\b [^>\n]{0,99} > )?
        (?P<block_html> [\s\S]*? ) (?: (?: </code> )? </(?P=tag)> | \Z )""",
    "\\begin{verbatim}\nx = 1\n\\end{verbatim}": r"""
        \\begin\{ (?P<tex> lstlisting | verbatim | minted ) \} .{0,99} \n
        (?P<block_latex> [\s\S]*? ) (?: \\end\{ (?P=tex) \} | \Z )""",
    '{"code": "x = 1"}': rf"""
        (?P<mark> \\{{0,3}}" ) {KEY} (?P=mark) \s{{0,3}} : \s{{0,3}} (?P=mark)
        (?P<block_call> [\s\S]*? ) (?: (?<!\\) (?P=mark) | \Z )""",
    "`a[i] + 1`": r"(?<!`) (?P<ticks> `+ ) (?!`) (?P<inline> .{1,300}? ) (?<!`) (?P=ticks) (?!`)",
}
CODE = re.compile("|".join(f"(?:{rule})" for rule in RULES.values()), re.MULTILINE | re.VERBOSE)

NO_PROSE = r"(?! .* (?<![A-Za-z'’]) (?: [A-Za-z'’]+ ,? [ ] ){6} | .* \\[A-Za-z]{2} )"  # no formula
STATEMENT = rf"""(?! \s | .*` ) (?:  # no sentence begins as the first two lines say
    (?: \#! | <!DOCTYPE | <html | <\?php | (?: SELECT | CREATE | INSERT | UPDATE )[ ] ) [\s\S]* |
    >>>[ ] | In[ ]\[ | \#include | // | /\* | @\w+ \s* (?: \( | $ ) |
    (?: def | class )[ ] \w .* : | for[ ] [\w(]+ (?: ,[ ]? [\w()]+ )* [ ] in[ ] .* : |
    (?: while | if | elif | with | except )\b (?: (?: [ ]\S+ ){{1,2}} | .* {SIGN} .* ) : |
    (?: for | while | if | switch )[ ]? \( .* \) | (?: else | try | finally ) \s* [:{{] |
    return[ ] (?: \S+ \s* $ | .* {SIGN} ) | (?: pass | break | continue ) \s* $ |
    import[ ] [\w.]+ (?: [ ]as[ ]\w+ | ,[ ]?\w+ )* \s* $ | from[ ]\S+[ ]import[ ] |
    {NO_PROSE} (?: [\w.\[\]:*&,'"()]+ [ ] ){{0,2}} [\w.\[\]*&,'"()]+  # an assignment
        [ ]? [-+*/%&|^:]{{0,2}} = [ ]? [^=\s] |
    {NO_PROSE} (?! [-*+][ ] | \d+[.)][ ] ) .* [;{{}}] \s* $ |
    [\w.]+ \( .* \) \s* $ )"""
GOES_ON = rf"(?<=[ \t]) \S | (?<=\n) (?: {STATEMENT} | [\]\[(){{}}'\"\#] | \.{{3}} )"
RUN = rf"^[ \t]* (?P<run> {STATEMENT} .* (?: \n\s* (?: {GOES_ON} ) .* )* )"
RUN = re.compile(RUN, re.MULTILINE | re.VERBOSE)


def bare_spans(trace: str) -> list[tuple[int, int]]:
    """The runs of lines that are code; or all, if it begins with one and most of it is code."""
    runs = [match.span("run") for match in RUN.finditer(trace)]
    size = sum(end - start for start, end in runs)
    if size > len(trace) / 2 and trace[: runs[0][0]].strip() == "":
        return [(runs[0][0], len(trace))]
    return runs


def code_spans(trace: str, answer: str) -> list[Span]:
    """What a block holds, without its fence, and inline code; lines of code if it has no block."""
    hidden = [match for match in CODE.finditer(trace) if match.lastgroup]
    blocks = [match.span(match.lastgroup) for match in hidden if match.lastgroup != "inline"]
    inline = [match.span("inline") for match in hidden if COMPUTES.search(match["inline"] or "")]
    spans = []
    for start, end in inline + (blocks or bare_spans(trace)):
        code = trace[start:end].rstrip()
        end = start + len(code)
        start = end - len(code.lstrip("> \t\r\n"))  # indentation and prompts stay
        if trace[start:end] not in ("", "[CODE]"):
            spans.append((start, end, "[CODE]"))
    return spans


# ---- The leak check: it shares nothing with the mask ---------------------------------------------

BEFORE = r"[\s>]*(?:[-*+] |\d+[.)] )?|[^`~]*(?=`{3,}[\w+#-]*$)"  # a word before a tagged one
FENCE = re.compile(rf"({BEFORE})(`{{3,}}|~{{3,}})([^`]*)$")
PLAINLY_CODE = re.compile(
    r"""\s*(?:
    (?: >>>\ | In\ \[ | @\w | \#include ) .* |  # as no sentence starts
    (?: def | class | for | while | if | elif | with )\b [^.?!]* : |
    (?: return | import | from )\s \S+ (?: \s\S+ )? |
    [\w.\[\]]+ (?: ,\s? [\w.\[\]]+ )* \s? [-+*/]? = \s? [^=\s] .* |
    [\w.]+ \( .* \) |
    [^.?!"\\]* [\w)]\s? [;{] )""",
    re.VERBOSE,
)
NEW_LINE = re.compile(r"\\+n|</?\w[^<>\n]*>|\"\s*:\s*\\*\"")  # in a JSON string, in HTML
INLINE_COMPUTES = re.compile(r"\w[(\[]\s?[\w\"'-]|[^<>=!]=[^=]|\w\)?\s?[-+*/%<>]+\s?[\w(]|\w\+\+")
NO_CODE = re.compile(r"\[CODE\]|\\[A-Za-z]{2}")  # hidden, or a formula
HARMLESS = re.compile(r"[OoΘΩ]\(.*\)|[a-z]+(?:-[a-z]+)+|.*\[CODE\].*")


def split_fences(text: str) -> tuple[list[str], list[str]]:
    """The lines within fences, and the others."""
    inside, outside, fence, quoted = [], [], "", False
    for line in text.split("\n"):
        mark = FENCE.match(line.rstrip())
        if fence and quoted and not line.lstrip().startswith(">"):
            fence = ""  # the quote ends, and so does its fence
        closes = mark and not mark[1].strip("> \t") and not mark[3]
        if fence and closes and mark[2].startswith(fence):
            fence = ""
        elif fence:
            inside.append(line)
        elif mark:
            fence, quoted = mark[2], mark[1].lstrip().startswith(">")
            outside.append(mark[1])
        else:
            outside.append(line)
    return inside, outside


def code_leaks(masked: str, answer: str) -> bool:
    """Is a line left in a fence, or inline code that computes, or a line of code elsewhere?"""
    inside, outside = split_fences(masked)
    if any(line.replace("[CODE]", "").strip("> \t\r") for line in inside):
        return True
    for inline in re.findall(r"`+([^`]+)`", "\n".join(outside)):
        if INLINE_COMPUTES.search(inline) and not HARMLESS.fullmatch(inline.strip()):
            return True
    lines = NEW_LINE.sub("\n", "\n".join(outside)).split("\n")
    lines = [line.rstrip('\\"} \t\r') for line in lines if not NO_CODE.search(line)]
    return any(PLAINLY_CODE.fullmatch(line) for line in lines)


# ---- The reward ----------------------------------------------------------------------------------

PROGRAM = re.compile(r"^ {0,3}```.*\n([\s\S]*?)^ {0,3}```", re.MULTILINE)


def code_rewards(completions: list[str], tests: list[str]) -> list[float]:
    """1.0 where the last fenced block passes its tests. All are judged at once, in parallel."""
    programs = []
    for completion in completions:
        blocks = PROGRAM.findall(completion)
        programs.append(blocks[-1] if blocks else "raise SystemExit(1)")
    return [float(passed) for passed in judge.judge(programs, tests)]


DOMAIN = Domain(
    system="Plan first. Then write a program that reads standard input, in one ```python block.",
    spans=code_spans,
    leaks=code_leaks,
    rewards=code_rewards,
    check=judge.cases,
)
