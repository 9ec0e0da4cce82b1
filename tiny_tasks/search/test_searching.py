"""What the domain search promises: the mask, the leak check, the reward and the dialogue."""

import itertools
import math
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import smepo
from smepo import UserError
from tiny_tasks.fixtures import masker_cases, rows
from tiny_tasks.searching import dialogue, domain

ROOM = Path(__file__).parent
CASES = masker_cases("search")


def mask(text: str, answer: str = "") -> str:
    return smepo.mask_trace(text, "search", answer)


def leaks(text: str, answer: str) -> bool:
    return smepo.leaks(text, answer, "search")


# ---- The mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_masker_case(case):
    text, answer = case["text"], case["answer"]
    masked = mask(text, answer)
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert mask(masked, answer) == masked
    assert leaks(text, answer) and not leaks(masked, answer)


@pytest.mark.parametrize("example", domain.RULES)
def test_every_rule_is_the_first_that_fits_its_example(example):
    match = domain.ENTITY.match(example)
    assert match[0] == example
    first = next(
        rule
        for rule, pattern in domain.RULES.items()
        if re.match(pattern, example, re.MULTILINE | re.VERBOSE)
    )
    assert first == example
    assert (mask(example) != example) == (match.lastgroup == "name")


@pytest.mark.parametrize(
    "text, masked",
    [
        ("She met Ada Byron in May 1833.", "She met [ENTITY] in [ENTITY]."),
        ("Ludwig van Beethoven's friend", "[ENTITY] van [ENTITY]'s friend"),
        ("by A. Smith on March 9, 1742", "by [ENTITY] on [ENTITY]"),
        ("Twenty bells", "[ENTITY] bells"),
        ("So the answer is oxygen.\nIt is oxygen", "So the answer is [ANSWER].\nIt is [ANSWER]"),
        ("by J. R. Pemberton of Marlow", "by [ENTITY] of [ENTITY]"),
        ("in 北京, by Анна Соколова", "in [ENTITY], by [ENTITY]"),
        ("It costs $4.5 million, 12% more.", "It costs [ENTITY] million, [ENTITY] more."),
        ("the 40th president", "the [ENTITY]th president"),
        ("Find Ada, who had two sons.", "Find [ENTITY], who had two sons."),
        ("with twenty-three of a hundred bells", "with [ENTITY] of [ENTITY] bells"),
        ("Cities grow. So they say.", "Cities grow. So they say."),
        ("Cities like Cork. Cork grows.", "Cities like [ENTITY]. [ENTITY] grows."),
        ("Cork is old.", "[ENTITY] is old."),
        ("**Step 2: Determine it**\n1. Then\n(3) So", "**Step 2: Determine it**\n1. Then\n(3) So"),
        ("Text: Start Finish Lookup", "Text: [ENTITY]"),
        ("Text: a\nStart: b\nFinish: c\nLookup: d", "Text: a\nStart: b\nFinish: c\nLookup: d"),
        ("a Hindi-language film by Yun-ho", "a [ENTITY]-language film by [ENTITY]"),
        ("Action: search[mayor of Cork]", "Action: search[mayor of [ENTITY]]"),
        ("search[lena roe born] by Lena Roe", "search[[ENTITY] [ENTITY] born] by [ENTITY]"),
        ("Action: finish[no idea]", "Action: finish[[ANSWER]]"),
        ("<answer> a red fox </answer>", "<answer> [ANSWER] </answer>"),
        ("It has forty-two bells.", "It has [ENTITY] bells."),
        ("3.5 million people", "[ENTITY] million people"),
        ("", ""),
    ],
)
def test_what_is_hidden_and_what_is_kept(text, masked):
    assert mask(text) == masked
    assert mask(masked) == masked


@pytest.mark.parametrize("verdict", ["yes", "No", "Yes", "NO"])
@pytest.mark.parametrize(
    "phrase",
    [
        "finish[{}]",
        "Action: Finish[{}]",
        "<answer>{}</answer>",
        "<answer> {} </answer>",
        "<answer>\n{}\n</answer>",
        'So the answer to the question is "{}."',
        "The answer is {}.",
        "The answer is {} because both are.",
        "Final Answer: {}.",
        "**{}**",
        "{}",
        "So {}.",
    ],
)
def test_yes_and_no_are_hidden_wherever_they_conclude(phrase, verdict):
    text = "There is no rush, no plan yet.\n" + phrase.format(verdict)
    masked = mask(text, verdict)
    assert masked == "There is no rush, no plan yet.\n" + phrase.format("[ANSWER]")
    assert leaks(text, verdict) and not leaks(masked, verdict)


@pytest.mark.parametrize(
    "phrase", ["finish[{}]", "Option {} is right.", "The answer is {}.", "<answer> ({}) </answer>"]
)
@pytest.mark.parametrize("letter", "AB")
def test_a_letter_is_hidden_where_it_concludes(phrase, letter):
    text = "A fox and a bee met.\n" + phrase.format(letter)
    masked = mask(text, letter)
    assert masked.startswith("A fox and a bee met.\n")
    assert not re.search(rf"\b{letter}\b", masked.split("\n")[1])
    assert leaks(text, letter) and not leaks(masked, letter)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so it is a Sunflower family.", "a sunflower family"),
        ("so it is sunflower  family", "the sunflower family"),
        ("It is on the 6th platform, the sixth one of six.", "6"),
        ("in (6) or\n6. Then step 6", "six"),
        ("the third of three", "3"),
        ("in the year [1988] and finish[1988]", "1988"),
        ("It has 1,250 rooms.", "1250"),
        ("It is 7 up, the drink.", "7 Up"),
        ("It has twenty-three bells.", "23"),
        ("on 9 March 1742, that is March 9, 1742", "9 March 1742"),
        ("red squirrels and Red-squirrel", "red squirrel"),
    ],
)
def test_the_answer_is_hidden_however_it_is_written(text, answer):
    assert leaks(text, answer)
    assert not leaks(mask(text, answer), answer)


def test_a_name_that_begins_with_a_number_is_hidden_whole():
    assert mask("the drink 7 up is", "7 Up") == "the drink [ENTITY] is"


def test_a_plural_of_the_answer_is_hidden_as_a_whole():
    assert mask("two red squirrels", "a red squirrel") == "two [ANSWER]"


def test_the_traces_of_the_toy_replay_and_mask_without_a_leak():
    lines = rows("train", room="searching") + rows("test", room="searching")
    assert len({row["question"] for row in lines}) == len(lines) == 3000
    known = dialogue.load_knowledge(dialogue.KNOWLEDGE)
    names = {word for key in known for word in (key.split(" of ")[1], known[key].casefold())}
    for row in lines:
        trace, answer = row["teacher_ds"], row["reward_model"]["ground_truth"]
        turns = re.findall(r"(<search>\w+ of \w+</search>)(\n<\w+>\w+</information>\n)", trace)
        assert all(dialogue.look_up(query) == information for query, information in turns)
        assert "".join(sum(turns, ())) + f"<answer>{answer}</answer>" == trace
        assert len(turns) == row["difficulty"] and smepo.reward(trace, answer, "search") == 1.0
        masked = mask(trace, answer)
        assert leaks(trace, answer) and not leaks(masked, answer)
        assert not names & {*re.findall(r"\w+", masked.casefold())}
        assert re.sub(r"\[\w+\]", "", masked) == re.sub(r"\b[A-Z]\w+", "", trace)


PIECES = (
    *r"""Step 1: (3) 2. - | <answer> yes no </answer> <search> </search> <information> search[ ]
    finish[ Answer: (B) B Silver Harbor silver harbor of the The T. E. van Whitlock's 北京 é Москва
    twenty three hundred and third [ENTITY] [ANSWER] March 9 1742 $4.5 % 6th Mr. O'Neil is was
    Hindi-language " “ ” ? ! * # \\""".split(),
    *("\n", "\n\n", "    ", "\r\n", "\t", "\x00", "\ud800"),
)


@pytest.mark.parametrize(
    "answer",
    ["Silver Harbor", "yes", "B", "9 March 1742", "3", "the silver harbor", "!", "[ANSWER]"],
)
def test_no_text_breaks_the_masker(answer):
    rng = random.Random(answer)
    for _ in range(600):
        text = "".join(rng.choice(PIECES) + rng.choice(("", " ", "\n")) for _ in range(20))
        masked = mask(text, answer)
        assert mask(masked, answer) == masked
        assert leaks(masked, answer) in (True, False)
        assert 0.0 <= smepo.reward(text, answer, "search") <= 1.0
        spans = smepo.hidden_spans(text, "search", answer)
        assert all(0 <= start < end <= len(text) for start, end, _ in spans)
        assert all(b <= c for (_, b, _), (c, _, _) in itertools.pairwise(spans))


HARD = r"""ab|a |A |Ab|AB|1|1,|1.|a-|A-|A'|'s |- |A. |Mr. |$|<|<a|<answer>|<answer>x |finish[
    |finish[x |<search>|<search>a |search[|search[x |[|[ENTITY]|twenty |twenty-|one |one hundred
    |a hundred and |Step 1|1. X|(1) |silver |Silver Harbor |silverX|中|é|is |The |The A|X|XX| X|X |.
    |.X|"|(|“|%| and """


@pytest.mark.parametrize("piece", HARD.replace("|\n    |", "|").replace("X", "\n").split("|"))
def test_masking_takes_linear_time(piece):
    def seconds(size: int) -> float:
        text = (piece * size)[:size]
        start = time.perf_counter()
        for answer in ("Silver Harbor", "7", "no"):
            leaks(mask(text, answer), answer)
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(40_000) < 100 * max(0.01, seconds(4000))  # 10 times, if it is linear


# ---- The leak check: what it must not let pass ---------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("born in trieste", "Trieste"),
        ("born in TRIESTE, Italy", "Trieste"),
        ("<answer> Trieste </answer>", "Trieste"),
        ("a city (Trieste)", "Trieste"),
        ("the Silver\nHarbor film", "silver harbor"),
        ("by Silver-Harbor", "Silver Harbor"),
        ("it is the office", "The Office"),
        ("it is an office", "The Office"),
        ("sunflower family", "a sunflower family"),
        ("Bells of the Sorrow", "The Bells of Sorrow"),
        ("it has 1,250 rooms", "1250"),
        ("it has 1250.0 rooms", "1,250"),
        ("finish[1988]", "1988"),
        ("sixteen", "16"),
        ("it has 16 of them", "sixteen"),
        ("on its 6th platform", "6"),
        ("on its sixth platform", "6"),
        ("twenty-three of them", "23"),
        ("one hundred and five", "105"),
        ("finish[yes]", "yes"),
        ("Finish[No]", "no"),
        ("<answer> No </answer>", "no"),
        ('the answer to the question is "Yes."', "yes"),
        ("Therefore, yes.", "Yes"),
        ("Final Answer: **No**", "no"),
        ("So\nNo.", "no"),
        ("Option B is correct", "B"),
        ("ANS: so the answer is (B).", "b"),
        ("by 李白", "李白"),
        ("at -5 degrees", "-5"),
    ],
)
def test_the_leak_check_finds_what_a_mask_could_miss(text, answer):
    assert leaks(text, answer)
    assert not leaks(mask(text, answer), answer)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("in [ENTITY]", "Trieste"),
        ("in [ENTITY]", "entity"),
        ("there is no such film, so no one can say", "no"),
        ("see a bee, or option A", "B"),
        ("it has 12500 rooms", "1250"),
        ("a bill of 12 pages", "12 Angry Men"),
        ("in the harbor of silver [ENTITY] harbor", "silver harbor"),
        ("", "Trieste"),
        ("words", ""),
    ],
)
def test_the_leak_check_keeps_quiet_about_a_plan(text, answer):
    assert not leaks(text, answer)


# ---- The reward ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, truth, right",
    [
        ("<answer>Trieste</answer>", "Trieste", True),
        ("<answer> the trieste. </answer>", "Trieste", True),
        ("<answer>Beatles</answer>", "The Beatles!", True),
        ("<answer>1,250</answer>", "1250", True),
        ("<answer>twelve</answer>", "12", True),
        ("<answer>9 April</answer>", "9 March", False),
        ("<answer>12 floors</answer>", "12", True),
        ("<answer>50</answer>", "50 Cent", False),
        ("<answer>12 angry men</answer>", "12 Angry Men", True),
        ("<answer>The</answer>", "The", True),
        ("<answer>?</answer>", "?", True),
        ("<answer>a</answer>", "The", False),
        ("<answer>Trieste, Italy</answer>", "Trieste", False),
        ("<answer>x</answer><answer>Trieste</answer>", "Trieste", True),
        ("<answer>Trieste</answer><answer>x</answer>", "Trieste", False),
        ("Trieste", "Trieste", False),
        ("<answer></answer>", "", False),
        ("", "", False),
    ],
)
def test_the_reward_is_an_exact_match_of_what_is_stated_last(said, truth, right):
    assert domain.search_rewards([said, said], [truth, truth]) == [float(right)] * 2


# ---- The dialogue --------------------------------------------------------------------------------


def test_the_environment_answers_a_query_and_nothing_else():
    mayor = dialogue.load_knowledge(dialogue.KNOWLEDGE)["mayor of bergen"]
    found = f"<information>{mayor}</information>\n"
    told = dialogue.look_up
    assert told("<search>mayor of Bergen</search>") == "\n" + found
    assert told("I see. <search> Mayor  of bergen </search>") == "\n" + found
    assert told("<search>mayor of <search>mayor of Bergen</search>") == "\n" + found
    assert told("<search>mayor of Bergen</search>\n") == found  # the policy began the line itself


@pytest.mark.parametrize(
    "text",
    [
        "<search>mayor of Atlantis</search>",
        "<search>Bergen</search>",
        "</search>",
        "<search></search>",
        "mayor of Bergen</search>",
        "<search>a<b>c</search>",
        "<search> of </search>",
        "</search>.",
        "<search>Bergen<search></search>",
    ],
)
def test_an_unclear_or_unknown_query_finds_nothing(text):
    assert dialogue.look_up(text) == "\n<information></information>\n"


@pytest.mark.parametrize("content", ["[]", "not json", '{"entity": "Oslo"}', "3", None])
def test_a_broken_knowledge_file_is_refused(tmp_path, content):
    path = tmp_path / "knowledge.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="knowledge.jsonl"):
        dialogue.load_knowledge(path)


def test_what_the_environment_told_is_found_again():
    query = "<search>mayor of Bergen</search>"
    text = query + dialogue.look_up(query) + "<answer>Ada</answer>"
    assert domain.DOMAIN.told.sub("", text) == query + "<answer>Ada</answer>"


class Letters:
    """A tokenizer of one token a letter; | is the EOS."""

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) for letter in texts]}
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))

    def batch_decode(self, rows) -> list[str]:
        return [self.decode(row) for row in rows]


ASK, END = "<search>mayor of Bergen</search>", "<answer>Ada</answer>|"
NOTHING = "\n<information></information>\n"
SCRIPTS = [  # what each of five rows says, turn by turn
    [END],
    [ASK, END],
    ["<search>Bergen</search>", "</search>", END],
    [ASK, ASK, ASK, ASK, ASK],
    [ASK, "<answer>Ada"],
]


def follow(monkeypatch, scripts) -> list:
    """Put scripts, one a prompt, in the place of the policy; returns the contexts of each call."""
    turns, calls = [iter(script) for script in scripts], []

    def sample(model, tokenizer, contexts, config, stops):
        calls.append(contexts)
        return tokenizer([next(turns[ids[0]]) for ids in contexts])["input_ids"]

    monkeypatch.setattr(dialogue, "sample", sample)
    return calls


def test_rows_of_a_batch_go_on_until_each_has_its_own_end(monkeypatch):
    monkeypatch.setattr(dialogue, "MAX_TURNS", 3)
    tokenizer, calls = Letters(), follow(monkeypatch, SCRIPTS)
    config = SimpleNamespace(max_new_tokens=999)
    rows, marks = dialogue.converse(None, tokenizer, [[i] for i in range(5)], config)
    assert [len(call) for call in calls] == [5, 4, 2, 1]  # only open rows; the fourth is stopped
    told = dialogue.look_up(ASK)
    assert tokenizer.batch_decode(rows) == [
        END,
        ASK + told + END,
        f"<search>Bergen</search>{NOTHING}</search>{NOTHING}{END}",
        (ASK + told) * 3 + ASK,
        ASK + told + "<answer>Ada",
    ]
    for row, mark, script in zip(rows, marks, SCRIPTS, strict=True):
        chosen = [token for token, one in zip(row, mark, strict=True) if one]
        assert tokenizer.decode(chosen) == "".join(script[:4])
    for ids in sum(calls, []):  # each goes on from the very ids of its row so far
        assert [ids[0], *rows[ids[0]]][: len(ids)] == ids


def test_the_token_limit_counts_what_was_sampled_over_all_turns(monkeypatch):
    for limit in range(len(ASK), 3 * len(ASK) + 1):
        calls = follow(monkeypatch, [[ASK] * 9])
        config = SimpleNamespace(max_new_tokens=limit)
        rows, marks = dialogue.converse(None, Letters(), [[0]], config)
        assert sum(marks[0]) == limit and len(calls) == math.ceil(limit / len(ASK))
        assert marks[0][-1] == 1  # nothing is told to a row that may say no more
        assert Letters().decode(rows[0]).startswith(ASK)


@pytest.mark.parametrize("said", [ASK + ">more", ASK + "\n" + ASK, ASK])
def test_a_turn_ends_with_the_first_query(monkeypatch, said):
    follow(monkeypatch, [[said]])
    rows = dialogue.speak(None, Letters(), [[0]], None)
    assert Letters().batch_decode(rows) == [ASK]
