"""The domain search: the verifier reads a short answer, most often a name, a date or a number.
So all of these are hidden, on the way to the answer, too. The plan is the rest: what is looked up,
in which order, and why."""

import re

from smepo import Domain, number_value, stated
from tiny_tasks.search.dialogue import TOLD, converse

NUMERALS = """two three third four five fifth six seven eight eighth nine ninth ten eleven twelve
    twelfth thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty
    sixty seventy eighty ninety hundred thousand million billion"""
NO_NAMES = """A An The I We He She It They This That These Those My Our His Her Its Their Who Which
    What When Where Why How Is Are Was Were Do Does Did Has Have If So No Not Yes And Or But For In
    On At By To Of From With As Since Because Although While Before After Both Also However Hence
    Therefore Thus Instead Meanwhile Finally Next Now Later First Second Final Find Search Look Let
    Identify Determine Compare Check Based Given Answer Title Choice Choices Option Options"""
NUMERAL, NO_NAME = ("|".join(words.split()) for words in (NUMERALS, NO_NAMES))
LOWER = "a-zß-öø-ÿ"
WORD = rf"(?<![\w\]])(?![{LOWER}\d_]|(?:{NO_NAME})\b)\w+"  # Ada, 北京
NAME = rf"{WORD}(?:['’-](?!s\b)\w+)*"  # O'Neil
FIGURES = r"[$€£¥]?\d+(?:[.,:/–−-]\d+)*%?"
SPELLED = rf"\b(?i:(?:one[ -])?(?:{NUMERAL})(?:[ -](?:one|{NUMERAL}))*(?:th|s)?)\b"
LINK = r"[ \xa0](?:(?:v[ao]n|und|zu|der|de|la) )*"
OPENS = r"(?:^|(?<=>)|(?<=[.?!:)] )(?<![A-Z]\. )(?<![A-Z][rt]\. ))"  # a sentence; not J. Roe
URL = r"(?<![\w.\]-])(?:https?://|(?:[\w-]+\.)+[a-z]+/)[^\s<>()\[\]]*"
RULES = [  # what becomes of it, its pattern, and an example; the first that matches wins
    ("keep", r"\[(?:ENTITY|ANSWER)\]|</?[a-z_]+>", "<answer>"),
    ("keep", r"\b(?:Thought|Action|Observation|Step|Doc) \d\d?\b", "Thought 1"),
    ("keep", r"^\(?\d\d?[.)] ", "(3) "),
    ("answer", r"(?i:(?<=<answer>)[^<]+(?=</)|(?<=finish\[)[^]\n]+)", "finish[no idea]"),
    ("entity", URL, "x.org/fern_castle"),
    ("entity", SPELLED, "forty-two"),
    ("if known", rf"{OPENS}{WORD}(?![\w-]|{LINK}(?:{NAME}|\d))", "Cities grow"),
    ("entity", rf"(?:{NAME}|{FIGURES})(?:{LINK}(?:{NAME}|{FIGURES}))*", "9 March 1742"),
]
RULE = re.compile("|".join(f"({pattern})" for _, pattern, _ in RULES), re.MULTILINE)
# Queries and paths: a word without a capital may be a name there.
NO_PROSE = re.compile(r"<search>[^<\n]+|\bsearch\[[^\]\n]+|(?<![^\s<>])[^\s<>]*/[^\s<>]*")
VERDICT, LETTER = r"(?i:\W*(?:yes|no)\W*)", r"(?i:\W*[a-h]\W*)"
# Names all look alike: another mask for the right one of two that are compared would tell it.
COMMON = re.compile(rf"{VERDICT}|{LETTER}|[{LOWER}\s,'’-]+")


def answer_pattern(answer: str) -> str:
    """Wherever it stands; where one of few is right, all of them, as the rest would tell."""
    if re.fullmatch(VERDICT, answer):  # but not "no such film"
        return r"\b(?i:yes|(?<=answer is )no|no(?!['’-]| [\w\[]))\b"
    if re.fullmatch(LETTER, answer):  # but no article, no variable
        return r"(?<![\w\\'’])(?!A (?!is|are|and|or)[a-z])[A-H](?![\w'’^(]|\s?=)"
    if number_value(answer) is not None or "[" in answer or not re.search(r"\w", answer):
        return r"(?!)"  # nothing, as the rules hide all numbers
    phrase = r"\W{1,9}(?:(?:an?|the)\W)?".join(map(re.escape, plain_words(answer)))
    names = re.findall(WORD, answer)
    words = "|".join([*names, phrase]) if names else f"(?i:{phrase})"
    return rf"\b(?!(?:ENTITY|ANSWER)\])(?:{words})s?\b"


def spans(trace: str, answer: str) -> list[tuple]:
    """The answer, names and numbers; words that may be names, if they are elsewhere."""
    patterns = map(answer_pattern, {answer, stated(trace)})
    answers = [match for pattern in patterns for match in re.finditer(pattern, trace)]
    matches = [(RULES[match.lastindex - 1][0], match) for match in RULE.finditer(trace)]
    answers += [match for action, match in matches if action == "answer"]
    entities = [match for action, match in matches if action == "entity"]
    unsure = [match for action, match in matches if action == "if known"]
    for text in NO_PROSE.finditer(trace):
        unsure += re.compile(r"[^\W_]+").finditer(trace, *text.span())
    names = {word for m in answers + entities for word in re.findall(r"\w+", m[0].casefold())}
    names -= set(re.findall(rf"\b[{LOWER}]+\b", NO_PROSE.sub("", trace)))
    entities += [match for match in unsure if match[0].casefold() in names]
    entities += [match for match in answers if not COMMON.fullmatch(match[0])]
    masks = [(*match.span(), "[ENTITY]") for match in entities]
    return masks + [(*m.span(), "[ANSWER]") for m in answers if COMMON.fullmatch(m[0])]


def plain_words(text: str) -> list[str]:
    """What is compared: a number's value, else words, without case, articles and punctuation."""
    value = number_value(text)
    words = re.findall(r"\w+", text.lower()) if value is None else [str(value)]
    return [word for word in words if word not in ("a", "an", "the")] or [text.lower()]


def rewards(texts: list[str], truths: list[str]) -> list[float]:
    """1.0 where the answer that is stated last is the truth."""
    pairs = zip(map(stated, texts), truths, strict=True)
    return [float(a != "" and plain_words(a) == plain_words(b)) for a, b in pairs]


def leaks(masked: str, answer: str) -> bool:
    """Would the verifier accept what stands anywhere? It shares nothing with the mask's rules."""
    text = re.sub(r"\[(?:ENTITY|ANSWER)\]", " _ ", masked)
    wanted, value = " ".join(plain_words(answer)), number_value(answer)
    if wanted in ("yes", "no"):  # "no such film" is no verdict
        noun = r" +(?!because|since)[a-z_]" if wanted == "no" else "_"
        return bool(re.search(rf"(?i)answer is {wanted}\b|\b{wanted}\b(?!['’-]|{noun})", text))
    letter = answer.strip(" ().").upper()
    if re.fullmatch("[A-H]", letter):  # no article, no variable
        return bool(re.search(rf"(?<!\w){letter}(?![\w'’^(]| ?=|(?<=A) (?!is|are)[a-z])", text))
    if value is None:
        return wanted != "" and f" {wanted} " in f" {' '.join(plain_words(text))} "
    text = re.sub(r"(?m)^[^\w\n]{0,9}(?:[a-z]+ )?\d\d?[.):(]", "", text.casefold())  # Step 1: or 1.
    numbers = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)
    spelled = "one" if abs(value) == 1 else NUMERAL  # any: which it is, is not asked
    said = re.search(rf"\b(?:{spelled})(?:th|s)?\b", text)
    return said is not None or abs(value) in map(number_value, numbers)


DOMAIN = Domain(spans=spans, leaks=leaks, rewards=rewards, told=TOLD, converse=converse)
