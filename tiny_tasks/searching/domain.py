"""The domain search: the verifier reads a short answer, most often a name, a date or a number.

So the mask hides all of these, also on the way to the answer, and the answer whatever it is. The
plan is the rest: what is looked up, in which order, and why.
"""

import re
from fractions import Fraction

from smepo import VALUES, Domain, Span, number_value, stated
from tiny_tasks.searching.dialogue import TOLD, converse

# ---- The mask: one rule an entry, the first that fits wins, from left to right -------------------

NUMERALS = """zero zeroth one first two second three third four fourth five fifth six sixth seven
seventh eight eighth nine ninth ten tenth eleven eleventh twelve twelfth""".split()
ORDINARY = """a an the i we he she it they this that these those there my our his her its their who
which what when where why how is are was were do does did has have if so no not yes and or but for
in on at by to of from with as than since because although while before after during both also
however therefore thus hence instead meanwhile finally next now later first second third final find
search look identify determine compare check let based given answer""".split()  # are no names
LOWER, MASK = "a-zß-öø-ÿ", r"\[(?:ENTITY|ANSWER)\]"
START, END = r"(?<![A-Za-zÀ-ɏ\d\]])", r"(?![A-Za-zÀ-ɏ\d])"  # not \b: 北京 has no spaces
NO_NAME = rf"(?: {'|'.join(map(str.title, ORDINARY))} ) \b (?! \.[ ]?[A-Z] )"  # but J. or I. Doe
WORD = rf"""(?: (?<! [\w\]] ) (?= \w ) (?! [{LOWER}\d_] | {NO_NAME} ) \w+
    (?: ['’-] (?! s\b | [{LOWER}]{{5}} ) \w+ )* )"""  # Yun-ho, O'Neil, but Hindi-language
FIGURES = r"(?: [$€£¥]? \d+ (?: [.,:/–−-] \d+ )* %? )"
SMALL = "|".join(sorted(NUMERALS, key=len, reverse=True))
LARGE = rf"""(?: (?: twen|thir|fou?r|fif|six|seven|eigh|nine ) (?: teen | t(?:y|ieth) ) |
    (?: a | {SMALL} ) [ -] (?: hundred | thousand | million | billion ) )"""
SPELLED = rf"""(?<! [\w\]] ) (?= [aefnostzAEFNOSTZ] )
    (?i: {LARGE} (?: (?: - | [ ]and[ ] | [ ] ) (?: {LARGE} | {SMALL} ) )* (?: th | s )? ) \b"""
LINK = r"(?: [ \u00a0] | (?<=\b\w)\.[ ]? | (?<=\b[DMSJ][rst])\.[ ] | (?<=\d),[ ](?=\d) )"
OPENING = r"""(?<! [^.!?:>*\#|\n-] [ ] ) (?<! [^.!?:>*\#|\n-] [ ] ["'“(\[] ) (?<! \w[-/'’&] )"""
VERB = r"(?: ['’]s?\b | [ ] (?: is|was|has|had|became|won|wrote|died|are|were|van|von|de ) \b )"

RULES = {  # an example: its pattern. The group `name` is hidden, `maybe` if it is known as a name
    "<search>": rf"</?[a-zA-Z][^<>\n]{{0,99}}> | {MASK}",
    "Step 2": r"^[ \t]* \(?\d{1,2}[.)](?!\d) | \b (?i: step | hop | doc ) [ ]? \d+",
    "Cities": rf"""(?= {WORD} ) {OPENING} (?! {SPELLED} ) (?P<maybe> \w [{LOWER}]* )
        (?! [\w-] | ['’]\w\w | {LINK} (?: {WORD} | \d ) | {VERB} )""",
    "9 March 1742": rf"""(?P<name> (?: {WORD} | {FIGURES} | {SPELLED} )
        (?: {LINK} (?: {WORD} | {FIGURES} ) )* )""",
    "city": r"\w+",
}
ENTITY = re.compile("|".join(f"(?:{r})" for r in RULES.values()), re.MULTILINE | re.VERBOSE)
QUERY = re.compile(r"<search>([^<\n]+)|\bsearch\[([^\]\n]+)")
CONCLUDED = r"(?:<answer>|[Ff]inish\[)\s*([^][<\s](?:[^][<\n]{0,200}[^][<\s])?)\s*(?:</answer>|\])"


def value_of(text: str) -> Fraction | None:
    """Of a number and nothing else: 12 Angry Men is a name, 9 March a date."""
    if re.search(r"\d\W*[^\W\d]", text):
        return None
    return number_value(text)


def answer_pattern(answer: str) -> str:
    """However the answer is written; yes, no and a letter only where no sentence goes on."""
    text = "" if re.search(MASK, answer) else re.sub(r"^(?i:an?|the)\s", "", answer.strip())
    if re.fullmatch(r"(?i)yes|no|[a-e]", text):
        verdict = "(?i:yes|no)" if len(text) > 1 else text.upper()
        after = r"(?:(?<=answer is )|(?<=[Oo]ption )|(?<=[Cc]hoice ))"
        return rf"{after}{verdict}\b|{START}{verdict}\b(?!['’-]| [\w\[])"
    words = r"\W{1,3}".join(re.findall(r"\w+", text)) or "(?!)"
    value = value_of(text)
    if value in range(13):
        first = 2 * int(value)
        words = "|".join([str(value), *NUMERALS[first : first + 2]])
    return rf"{START}(?i:{words})(?:s|th|st|nd|rd)?{END}"


def search_spans(trace: str, answer: str) -> list[Span]:
    """The answer, what the trace concludes, names and numbers; and names that are hard to tell."""
    answers = re.finditer(rf"{MASK}|({answer_pattern(answer or stated(trace))})", trace)
    answers = [match for match in (*answers, *re.finditer(CONCLUDED, trace)) if match[1]]
    spans, unsure, names = [(*match.span(1), "[ANSWER]") for match in answers], [], set()
    for match in ENTITY.finditer(trace):
        if match["maybe"]:
            unsure.append(match.span("maybe"))
        elif match["name"]:
            spans.append((*match.span(), "[ENTITY]"))
            names.update(re.findall(r"\w+", match[0].casefold()))
    for query in QUERY.finditer(trace):  # its names may be in lower case
        words = re.compile(r"\w+").finditer(trace, *query.span(query.lastindex))
        unsure += [word.span() for word in words]
    names -= set(re.findall(rf"\b[{LOWER}]+\b", QUERY.sub("", trace)))
    return spans + [(a, b, "[ENTITY]") for a, b in unsure if trace[a:b].casefold() in names]


# ---- The reward: exact match -----------------------------------------------------------------

ARTICLES = {"a", "an", "the"}


def plain_words(text: str) -> list[str]:
    """Case, articles and punctuation do not matter: `The Beatles!` is `beatles`."""
    words = re.findall(r"\w+|^\W+$", text.casefold())
    return [word for word in words if word not in ARTICLES] or words


def is_right(given: str, truth: str) -> bool:
    value = value_of(truth)
    if given == "":
        return False
    if value is not None:
        return number_value(given) == value
    return plain_words(given) == plain_words(truth)


def search_rewards(completions: list[str], truths: list[str]) -> list[float]:
    """1.0 where the answer that a dialogue states is the truth, numbers by their value."""
    pairs = zip(completions, truths, strict=True)
    return [float(is_right(stated(completion), truth)) for completion, truth in pairs]


# ---- The leak check: it shares nothing with the mask ---------------------------------------------

NUMBER_WORD = "|".join(sorted(VALUES, key=len, reverse=True))
CONCLUDES = r"\b(?:answer|finish|final|option|choice|correct|so|thus|hence|therefore|conclusion)\b"


def concludes(masked: str, verdict: str) -> bool:
    """Is yes, no or a letter said last, as in `so the answer is "Yes."`, or after `option`?"""
    last = rf"\b{verdict}\b(?![\w'’-]| [a-z])"
    near = rf"(?i:{CONCLUDES})[^\n]{{0,60}}?[^\w'’-]{last}"
    alone = rf"(?m:^[^\w\n]*{last}[^\w\n]*$)"
    named = rf"(?i:option|choice|answer is)\W{{1,3}}{verdict}\b"
    return bool(re.search(rf"{near}|{alone}|{named}", masked))


def visible_values(masked: str) -> set:
    """The value of every number in the text: 1,234, 6th, forty-two, third."""
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", masked)
    found += re.findall(rf"\b(?i:{NUMBER_WORD})(?i:[ -](?:and )?(?:{NUMBER_WORD}))*\b", masked)
    values = {number_value(number.strip(" -")) for number in found}
    words = set(re.findall(r"[a-z]+", masked.casefold()))
    return values | {i // 2 for i, numeral in enumerate(NUMERALS) if numeral in words}


def search_leaks(masked: str, answer: str) -> bool:
    """Would the verifier accept what stands anywhere in the text?"""
    masked = re.sub(r"\[(?:ENTITY|ANSWER)\]", "[]", masked)
    wanted, value = " ".join(plain_words(answer)), value_of(answer)
    if re.fullmatch("yes|no", wanted):
        return concludes(masked, f"(?i:{wanted})")
    if re.fullmatch("[a-e]", answer.strip().casefold()):
        return concludes(masked, answer.strip().upper())
    if value is not None:
        return bool({value, -value} & visible_values(masked))
    visible = plain_words(masked.replace("[]", " _ "))
    return wanted != "" and f" {wanted} " in f" {' '.join(visible)} "


DOMAIN = Domain(
    system="Search with <search>relation of entity</search> and read <information>, as often as "
    "you need; then answer with <answer>...</answer>.",
    spans=search_spans,
    leaks=search_leaks,
    rewards=search_rewards,
    told=TOLD,
    converse=converse,
)
