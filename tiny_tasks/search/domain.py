"""The domain search: the verifier reads a short answer, most often a name, a date or a number.

So all of these are hidden, on the way to the answer, too. What is left is the plan: what is looked
up, in which order, and why.
"""

import re

from smepo import Domain, Span, number_value, stated
from tiny_tasks.search.dialogue import TOLD, converse

# ---- The mask ------------------------------------------------------------------------------------

NUMERAL = "|".join(
    """two three third four five fifth six seven eight eighth nine ninth ten eleven twelve twelfth
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty
    seventy eighty ninety hundred thousand million billion""".split()
)
NO_NAME = "|".join(  # though a sentence may begin with it
    """A An The I We He She It They You This That These Those There My Our His Her Its Their Who
    Which What When Where Why How Is Are Was Were Do Does Did Has Have If So No Not Yes And Or But
    For In On At By To Of From With As Than Since Because Although While Before After During Both
    Also However Therefore Thus Hence Instead Meanwhile Finally Next Now Later First Second Third
    Final Find Search Look Identify Determine Compare Check Let Based Given Answer""".split()
)
LOWER = "a-zß-öø-ÿ"
WORD = (  # not in lower case; also Yun-ho and 北京, and of "Hindi-language" the first part
    rf"(?<![\w\]])(?![{LOWER}\d_]|(?:{NO_NAME})\b(?!\. ?[A-Z]))"
    rf"\w+(?:['’-](?!s\b|[{LOWER}]{{5}})\w+)*"
)
FIGURES = r"[$€£¥]?\d+(?:[.,:/–−-]\d+)*(?:%|st\b|nd\b|rd\b|th\b)?"
SPELLED = rf"\b(?i:(?:{NUMERAL})(?:th|s)?(?:(?:-| and | )(?:one|{NUMERAL})(?:th|s)?)*)\b"
PARTICLE = r"(?:(?:of|of the|of The|van|van de[rn]|von|zu|de|de la|del|di|da|ibn|bin|&) )"
LINK = rf"(?:[ \u00a0]{PARTICLE}?|(?<=\b\w)\. ?|(?<=\b[DMSJ][rst])\. |(?<=\d),? )"
OPENING = r"""(?<![^.!?:>*#|\n-] )(?<![^.!?:>*#|\n-] ["'“(\[])(?<!\w[-/'’&])"""
VERB = r"['’]s?\b| (?:is|was|has|had|are|were|became|won|wrote|died)\b"  # after a name
URL = r"(?:\bhttps?://|\b(?:[\w-]+\.)+[a-z]{2,9}/)[^\s<>()\[\]\"]*"
LABEL = r"(?:Thought|Action|Observation|Step|Hop|Doc) \d{1,2}\b|\(?\d{1,2}[.)](?= )"

RULES = [  # what becomes of it, its pattern, and an example; the first that matches wins
    ("keep", r"\[(?:ENTITY|ANSWER)\]", "[ENTITY]"),
    ("keep", r"</?[a-z_]+>", "<answer>"),
    ("answer", r"(?<=<answer>)[^<]+(?=</answer>)", "<answer>no idea</answer>"),
    ("answer", r"(?i:(?<=finish\[))[^\]\n]+(?=\])", "Finish[no idea]"),
    ("keep", rf"^[ \t>*#-]*(?:{LABEL})", "Thought 1: So"),
    ("entity", URL, "example.org/fern_castle"),
    (
        "maybe",
        rf"{OPENING}(?={WORD})(?!{SPELLED})\w[{LOWER}]*(?![\w-]|{LINK}(?:{WORD}|\d)|{VERB})",
        "Cities grow",
    ),
    ("entity", rf"(?:{WORD}|{FIGURES}|{SPELLED})(?:{LINK}(?:{WORD}|{FIGURES}))*", "9 March 1742"),
]
RULE = re.compile("|".join(f"(?P<{a}_{i}>{p})" for i, (a, p, _) in enumerate(RULES)), re.MULTILINE)
LOOKED_UP = re.compile(rf"<search>[^<\n]+|\bsearch\[[^\]\n]+|{URL}")  # names in lower case, too
GAP = r"\W{1,3}(?:(?:an?|the)\W)?"
VERDICT, CHOICE = r"(?i:\W*(?:yes|no)\W*)", r"(?i:\W*[a-h]\W*)"


def mask_of(text: str) -> str:
    """[ANSWER] for a verdict, a letter, a common word. Names all look alike: of the two that are
    compared, another mask for one would tell which it is."""
    common = re.fullmatch(rf"{VERDICT}|{CHOICE}", text) or re.fullmatch(rf"[{LOWER}\W]+", text)
    return "[ANSWER]" if common and number_value(text) is None else "[ENTITY]"


def answer_pattern(answer: str) -> str:
    """However it is written; where one of several is right, all of them, for the rest would tell"""
    if re.fullmatch(VERDICT, answer):
        return r"(?i:\byes\b|\bno\b(?!['’-]| [\w\[])|(?<=answer is )no\b)"  # not in "no such film"
    if re.fullmatch(CHOICE, answer):
        return r"(?<![\w\\'’])(?!A (?!is|are|and|or)[a-z])[A-H](?![\w'’^(]|\s?=)"
    words = [word for word in re.findall(r"\w+", answer) if word.lower() not in ARTICLES]
    if not words or re.search(RULES[0][1], answer):
        return r"(?!)"
    if number_value(answer) == 1:
        words = ["one"]
    return rf"(?<![A-Za-zÀ-ɏ\d])(?i:{GAP.join(words)}s?)(?![A-Za-zÀ-ɏ\d])"


def search_spans(trace: str, answer: str) -> list[Span]:
    """The answer, given and stated; names and numbers; and words that may be names, if they are."""
    spans, unsure, names = [], [], set()
    for text in {answer, stated(trace)}:
        for match in re.finditer(rf"{RULES[0][1]}|({answer_pattern(text)})", trace):
            if match[1]:
                found = match[0] if mask_of(text) == "[ANSWER]" else text
                spans.append((*match.span(), mask_of(found)))
    for match in RULE.finditer(trace):
        action = match.lastgroup.split("_")[0]
        if action == "answer":
            spans.append((*match.span(), mask_of(match[0])))
        elif action == "maybe":
            unsure.append(match.span())
        elif action == "entity":
            spans.append((*match.span(), "[ENTITY]"))
            words = re.findall(r"\w+", match[0])
            names |= {word.casefold() for word in words if not word.islower()}
    names -= set(re.findall(rf"\b[{LOWER}]+\b", LOOKED_UP.sub("", trace)))
    for query in LOOKED_UP.finditer(trace):
        unsure += [word.span() for word in re.compile(r"\w+").finditer(trace, *query.span())]
    return spans + [(a, b, "[ENTITY]") for a, b in unsure if trace[a:b].casefold() in names]


# ---- The reward ----------------------------------------------------------------------------------

ARTICLES = {"a", "an", "the"}


def plain_words(text: str) -> list[str]:
    """Case, articles and punctuation do not matter: `The Beatles!` is `beatles`."""
    words = re.findall(r"\w+", text.casefold())
    return [word for word in words if word not in ARTICLES] or [text.casefold()]


def search_rewards(completions: list[str], truths: list[str]) -> list[float]:
    """1.0 where the answer that is stated last is the truth; a number may be written otherwise."""
    rewards = []
    for given, truth in zip(map(stated, completions), truths, strict=True):
        value = number_value(truth)
        same = (
            plain_words(given) == plain_words(truth)
            if value is None
            else number_value(given) == value
        )
        rewards.append(float(given != "" and same))
    return rewards


# ---- The leak check: it shares nothing with the mask, and cries if in doubt ----------------------


def search_leaks(masked: str, answer: str) -> bool:
    """Could the verifier accept what stands anywhere in the text?"""
    text = re.sub(r"\[(?:ENTITY|ANSWER)\]", " [] ", masked)
    wanted, value = " ".join(plain_words(answer)), number_value(answer)
    if wanted in ("yes", "no"):  # but not "no such film"
        said = rf"\b{wanted}\b(?!['’-]| +(?!because|since|as\b)[a-z\[])"
        return bool(re.search(rf"(?i){said}|answer is {wanted}\b", text))
    letter = answer.strip(" ().").upper()
    if re.fullmatch("[A-H]", letter):  # no article, no variable
        return bool(re.search(rf"(?<![\w'’]){letter}(?![\w'’^(]| [b-hj-z=]| in | a)", text))
    if value is None:
        visible = plain_words(text.replace("[]", "_"))
        return wanted != "" and f" {wanted} " in f" {' '.join(visible)} "
    text = re.sub(r"(?im)^\W*(?:[a-z]+ )?\(?\d{1,2}[.):(]", "", text)  # Step 1: or 1.
    words = re.sub("(?<=[xrn])th|th(?=e)", "", text.casefold())
    numbers = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text) + re.findall(
        r"[a-z]+(?:-[a-z]+)?", words
    )
    large = abs(value) > 99 and re.search("hundred|thousand|million|billion", words)
    return bool(large) or abs(value) in map(number_value, numbers)


DOMAIN = Domain(
    spans=search_spans,
    leaks=search_leaks,
    rewards=search_rewards,
    told=TOLD,
    converse=converse,
)
