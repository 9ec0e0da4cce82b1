"""The domain search: the verifier reads a short answer, most often a name, a date or a number.
So all of these are hidden, on the way to the answer, too. The plan is the rest: what is looked up,
in which order, and why."""

import re

from smepo import LABEL, OPTION, WORD, Domain, number_value, stated
from tiny_tasks.search.dialogue import TOLD, converse

# ---- What is hidden ----
NO_NAME = r"""(?x: (?:An?|The|I|We|He|She|It|They|There|This|That|These|His|Her|Its|Their|Who|Which
    |What|When|Where|Why|How|Is|Are|Was|Were|Do|Does|Did|Has|Have|If|So|No|Not|Yes|And|Or|But|For|In
    |On|At|By|To|Of|From|With|As|Since|Because|Before|After|Both|However|First|Next|Now|Then|Thus
    |Therefore|Meanwhile|Final|Answer|Action|Title|Find|Search|Let|Choices?)\b)"""
NAME = rf"(?<![\w\]])(?![a-zß-öø-ÿ\d_]|{NO_NAME})\w++(?:['’-](?!s\b)\w+)*+"  # O'Neil, 北京
THING = rf"(?:{NAME}|[$€£¥]?(?<!\w)\d+(?:[.,:/–−-]\d+)*%?)"
LINK = r"[ \xa0](?:(?:v[ao]n|und|zu|d[aei]|der|del|la|bin) )*"  # Ana de la Cruz
OPENS = r"(?:^|(?<=>)|(?<=[.?!:)] )(?<![A-Z][.:)] )(?<![A-Z][rt]\. ))"  # a sentence; no J. Roe
# Cities grow: no name, unless it is one elsewhere
ALONE = rf"{OPENS}[^\W\d]\w++(?!['’-]| (?:is|was|were|has|had|won|[a-z]+ed)\b|{LINK}{THING})"

# What matches first wins. Kept are masks, tags and labels; hidden are links, numbers and names.
KEEP = rf"\[[A-Z]{{6}}\]|</?[a-z]+>|^\(?\d\d?[.)] |(?:{LABEL}|Thought|Action|Observation|Doc) \d+"
URL = r"(?<![\w.\]-])(?:https?://|(?:[\w-]+\.)+[a-z]+/)[^\s<>()\[\]]*"  # x.org/fern_castle
NUMERAL = rf"\b(?i:(?:one[ -])?(?:{WORD}|third|fifth|ninth|twelfth)(?:t?h|s|[ -](?:one|{WORD}))*)\b"
ENTITY = rf"{URL}|{NUMERAL}|(?!{ALONE}){THING}(?:{LINK}{THING})*"  # 9 March 1742
# Names all look alike: another mask for the right one of two that are compared would tell it.
COMMON = re.compile(rf"\W*(?i:yes|no|[a-h])\W*|(?s:(?!{THING}|{NUMERAL}).)+")


def answer_pattern(answer: str) -> str:
    """Wherever it stands; where one of few is right, all of them, as the rest would tell."""
    if re.fullmatch("(?i:yes|no)", answer):  # but not "no such film"
        return r"\b(?i:yes|(?<=answer is )no|no(?!['’-]| [\w\[]))\b"
    if re.fullmatch(r"\(?[A-Ha-h]\)?", answer):
        return OPTION
    phrase = r"[\W_]{1,9}(?:(?:an?|the)\W)?".join(map(re.escape, plain_words(answer)))
    return rf"\b(?:{'|'.join([*re.findall(NAME, answer), f'(?i:{phrase})'])})s?\b"


def unkept(trace: str, pattern: str) -> list[re.Match]:
    found = re.finditer(f"{KEEP}|({pattern})", trace, re.MULTILINE)
    return [match for match in found if match[1]]


def spans(trace: str, answer: str) -> list[tuple]:
    """The answer, names and numbers; and those names wherever else they stand."""
    given = {answer, concluded(trace)}
    patterns = [answer_pattern(text) for text in given if re.fullmatch(r"[^\[]+", text)]
    answers = unkept(trace, "|".join(patterns))
    found = unkept(trace, ENTITY)
    again = [word for match in found for word in re.findall(NAME, match[0])]
    again += [rf"(?i:{re.escape(match[0])})" for match in found if " " in match[0]]
    found += unkept(trace, rf"\b(?:{'|'.join(again) or '(?!)'})\b")
    masks = ["[ANSWER]" if COMMON.fullmatch(match[0]) else "[ENTITY]" for match in answers]
    masks += ["[ENTITY]"] * len(found)
    return [(*match.span(), mask) for match, mask in zip(answers + found, masks)]


# ---- The reward ----
def concluded(text: str) -> str:
    """The last <answer>...</answer> or finish[...]; without one, what math reads."""
    found = re.findall(r"(?i)(?:<answer>|finish\[)([^]<\n]+)", text)
    return found[-1].strip() if found else stated(text)


def plain_words(text: str) -> list[str]:
    """What is compared: a number's value, else words, without case, articles and punctuation."""
    value = number_value(text)
    words = re.findall(r"\w+", text.lower()) if value is None else [str(value)]
    return [word for word in words if word not in ("a", "an", "the")] or [text.lower().strip(" ()")]


def rewards(texts: list[str], truths: list[str]) -> list[float]:
    """1.0 where the answer that is stated last is the truth."""
    pairs = zip(map(concluded, texts), truths, strict=True)
    return [float(a != "" and plain_words(a) == plain_words(b)) for a, b in pairs]


def leaks(masked: str, answer: str) -> bool:
    """Could the answer be read anywhere? It shares NUMERAL and plain_words with the mask."""
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
    spelled = r"\bone\b" if abs(value) == 1 else NUMERAL  # any: which it is, is not asked
    return bool(re.search(spelled, text)) or abs(value) in map(number_value, numbers)


DOMAIN = Domain(spans=spans, leaks=leaks, rewards=rewards, told=TOLD, converse=converse)
