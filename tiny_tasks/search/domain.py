"""The domain search: the verifier reads a short answer, most often a name, a date or a number.
So all of these are hidden, on the way to the answer, too. The plan is the rest: what is looked up,
in which order, and why."""

import re

from smepo import Domain, Span, number_value, stated
from tiny_tasks.search.dialogue import TOLD, converse

# ---- The mask ------------------------------------------------------------------------------------
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
WORD = rf"(?<![\w\]])(?![{LOWER}\d_]|(?:{NO_NAME})\b(?!\. ?[A-Z]))\w+"  # 北京, and J. in J. Doe
NAME = rf"{WORD}(?:['’-](?!s\b|[{LOWER}]{{5}})\w+)*"  # Yun-ho, but of Hindi-language only Hindi
FIGURES = r"[$€£¥]?\d+(?:[.,:/–−-]\d+)*%?"
SPELLED = rf"(?<![\w\]])(?i:(?:one[ -])?(?:{NUMERAL})(?:[ -](?:one|{NUMERAL}))*(?:th|s)?)(?![\w[])"
LINK = r"(?:[ \xa0](?:(?:v[ao]n|und|zu|der|de|la) )*|(?<=\b\w)\. ?|(?<=\b[DMSJ][rst])\. |(?<=\d), )"
OPENS = r"(?<![\w,;”\"'’&%] )(?<![\w\"“(\[/'’&-])"  # a sentence, or a line
VERB = r"(?:['’]s?| (?:is|was|has|had|are|were|became|won|wrote|died))\b"  # after a name
RULES = [  # what becomes of it, its pattern, and an example; the first that matches wins
    ("keep", r"\[(?:ENTITY|ANSWER)\]", "[ENTITY]"),
    ("keep", r"</?[a-z_]+>", "<answer>"),
    (
        "keep",
        r"\b(?:Thought|Action|Observation|Step|Hop|Doc) \d{1,2}\b|^[ (>*#-]*\d{1,2}[.)] ",
        "Hop 1",
    ),
    ("hide", r"(?i:(?<=<answer>)[^<]+(?=</)|(?<=finish\[)[^]\n]+)", "finish[no idea]"),
    ("hide", r"(?:https?://|(?<![\w.-])(?:[\w-]+\.)+[a-z]+/)[^\s<>()\[\]]*", "x.org/fern_castle"),
    ("if known", rf"{OPENS}(?!{SPELLED}){WORD}(?![\w-]|{LINK}(?:{NAME}|\d)|{VERB})", "Cities grow"),
    ("hide", rf"(?:{NAME}|{FIGURES}|{SPELLED})(?:{LINK}(?:{NAME}|{FIGURES}))*", "9 March 1742"),
]
RULE = re.compile("|".join(f"({pattern})" for _, pattern, _ in RULES), re.MULTILINE)
QUERY = re.compile(r"<search>[^<\n]+|\bsearch\[[^\]\n]+|(?<!\S)\S*/\S*")  # names in lower case, too
VERDICT, LETTER = r"(?i:\W*(?:yes|no)\W*)", r"(?i:\W*[a-h]\W*)"
# Names all look alike: another mask for the right one of two that are compared would tell it.
COMMON = re.compile(rf"{VERDICT}|{LETTER}|(?!{SPELLED})[{LOWER}\s,'’-]+")


def answer_pattern(answer: str) -> str:
    """Wherever it stands; where one of few is right, all of them, as the rest would tell."""
    if re.fullmatch(VERDICT, answer):  # but not "no such film"
        return r"(?i:\byes\b|(?<=answer is )no\b|\bno\b(?!['’-]| [\w\[]))"
    if re.fullmatch(LETTER, answer):  # but no article, no variable
        return r"(?<![\w\\'’])(?!A (?!is|are|and|or)[a-z])[A-H](?![\w'’^(]|\s?=)"
    if number_value(answer) is not None or "[" in answer or not re.search(r"\w", answer):
        return r"\b(?i:one)\b" if number_value(answer) == 1 else r"(?!)"  # the rules hide the rest
    phrase = r"\W{1,9}(?:(?:an?|the)\W)?".join(plain_words(answer))
    names = re.findall(WORD, answer)
    words = "|".join([*names, phrase]) if names else f"(?i:{phrase})"
    return rf"(?<![A-Za-zÀ-ɏ\d])(?!(?:ENTITY|ANSWER)\])(?:{words})s?(?![A-Za-zÀ-ɏ\d]|\[[EA])"


def spans(trace: str, answer: str) -> list[Span]:
    """The answer, given and stated; names and numbers; words that may be names, if they are."""
    patterns = map(answer_pattern, {answer, stated(trace)})
    hidden = [match for pattern in patterns for match in re.finditer(pattern, trace)]
    matches = [(RULES[match.lastindex - 1][0], match) for match in RULE.finditer(trace)]
    hidden += [match for action, match in matches if action == "hide"]
    unsure = [match for action, match in matches if action == "if known"]
    for query in QUERY.finditer(trace):
        unsure += re.compile(r"\w+").finditer(trace, *query.span())
    names = {word for match in hidden for word in re.findall(r"\w+", match[0].casefold())}
    names -= set(re.findall(rf"\b[{LOWER}]+\b", QUERY.sub("", trace)))
    known = [(*match.span(), "[ENTITY]") for match in unsure if match[0].casefold() in names]
    masks = ["[ANSWER]" if COMMON.fullmatch(match[0]) else "[ENTITY]" for match in hidden]
    return known + [(*match.span(), mask) for match, mask in zip(hidden, masks, strict=True)]


# ---- The reward, and the leak check, which shares nothing with the mask --------------------------


def plain_words(text: str) -> list[str]:
    """What is compared: a number's value, else words, without case, articles and punctuation."""
    value = number_value(text)
    words = re.findall(r"\w+", text.lower()) if value is None else [str(value)]
    return [word for word in words if word not in ("a", "an", "the")] or [text.lower()]


def rewards(texts: list[str], truths: list[str]) -> list[float]:
    """1.0 where the answer that is stated last is the truth."""
    pairs = zip(map(stated, texts), truths, strict=True)
    return [
        float(given != "" and plain_words(given) == plain_words(truth)) for given, truth in pairs
    ]


def leaks(masked: str, answer: str) -> bool:
    """Would the verifier accept what stands anywhere in the text? If in doubt, yes."""
    text = re.sub(r"\[(?:ENTITY|ANSWER)\]", " _ ", masked)
    wanted, value = " ".join(plain_words(answer)), number_value(answer)
    letter = answer.strip(" ().").upper()
    if wanted in ("yes", "no"):  # "no such film" is no verdict
        noun = r" +(?!because|since)[a-z_]" if wanted == "no" else "_"
        return bool(re.search(rf"(?i)answer is {wanted}\b|\b{wanted}\b(?!['’-]|{noun})", text))
    if re.fullmatch("[A-H]", letter):  # no article, no variable
        return bool(re.search(rf"(?<!\w){letter}(?![\w'’^(]| ?=|(?<=A) (?!is|are)[a-z])", text))
    if value is None:
        return wanted != "" and f" {wanted} " in f" {' '.join(plain_words(text))} "
    text = re.sub(
        r"(?im)^[^\w\n]{0,9}(?:[a-z]+ )?\d{1,2}[.):(]", "", text
    ).casefold()  # Step 1: or 1.
    numbers = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|[a-z]+(?:-[a-z]+)?", text)
    values = {number_value(re.sub(r"(?<=[fxhnr])th$", "", number)) for number in numbers}
    return abs(value) in values or (abs(value) > 99 and bool({"hundred", "thousand"} & {*numbers}))


DOMAIN = Domain(spans=spans, leaks=leaks, rewards=rewards, told=TOLD, converse=converse)
