"""What the domain search promises: the mask, the leak check, the reward and the dialogue."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import smepo
from smepo import Rollout, UserError
from tiny_tasks.fixtures import TASKS, rows, settings, unpadded_logprobs
from tiny_tasks.search import dialogue, domain, toy


def mask(text: str, answer: str = "") -> str:
    return smepo.mask_trace(text, "search", answer)


# ---- The mask ------------------------------------------------------------------------------------


CASES = r"""
| Hija del Sol, Ali bin Roe, Ana da Cruz | [ENTITY], [ENTITY], [ENTITY]
| by J. Smith and Dr. Roe on 9 March 1742 | by [ENTITY]. [ENTITY] and [ENTITY]. [ENTITY] on [ENTITY]
| Ludwig van Beethoven's, Lee Yun-ho's, Ana de la Cruz | [ENTITY]'s, [ENTITY]'s, [ENTITY]
| by O'Neil, O’Dowd. Yun-ho won. May 1742 came | by [ENTITY], [ENTITY]. [ENTITY] won. [ENTITY] came
| 1,250 at 12:30 on 14/06/1931, 1641–44, 3−4 | [ENTITY] at [ENTITY] on [ENTITY], [ENTITY], [ENTITY]
| twenty-one, a sixth, thousands, one hundred | [ENTITY], a [ENTITY], [ENTITY], [ENTITY]
| third, fifth, ninth, twelfth, hundredths | [ENTITY], [ENTITY], [ENTITY], [ENTITY], [ENTITY]
| is it? Trees! Trees: Trees (so) Trees | is it? Trees! Trees: Trees (so) Trees
| U2 left. A 3D film élan, Ada Roe | U2 left. A [ENTITY]D film élan, [ENTITY]
search | <search>a search</search> | <search>a [ANSWER]</search>
| $4.5 million, 12% of forty-two | [ENTITY] [ENTITY], [ENTITY] of [ENTITY]
| Cities like Cork. Cork grows. | Cities like [ENTITY]. [ENTITY] grows.
| Rome is. Oslo was. Cork had. Riga has. | [ENTITY] is. [ENTITY] was. [ENTITY] had. [ENTITY] has.
| Up premiered. Queen were. Bach died. | [ENTITY] premiered. [ENTITY] were. [ENTITY] died.
| Lazio won. Trees grow. | [ENTITY] won. Trees grow.
| A) Rome\n(A) Oslo\nA: Bern | A) [ENTITY]\n(A) [ENTITY]\nA: [ENTITY]
twelve | it is ten, not twelve | it is [ENTITY], not [ENTITY]
| search[lena roe born] by Lena Roe | search[[ENTITY] born] by [ENTITY]
Okja | of Train to Busan or Okja | of [ENTITY] to [ENTITY] or [ENTITY]
| So the answer is oxygen. It is oxygen | So the answer is [ANSWER]. It is [ANSWER]
the red hen | a red hen, red hens, a hen | a [ANSWER], [ANSWER], a hen
end of the war | the end of war, an end of the war | the [ANSWER], an [ANSWER]
entity | an entity in Rome | an [ANSWER] in [ENTITY]
Jane Roe | Roe won | [ENTITY] won
| <answer>no idea</answer> | <answer>[ANSWER]</answer>
| <answer>J. Roe</answer>\nFinish[no end] | <answer>[ENTITY]. [ENTITY]</answer>\nFinish[[ANSWER]]
B | Choice B is, A and (D) are not. | Choice [ANSWER] is, [ANSWER] and ([ANSWER]) are not.
(B) | A fox, b and B = c | A fox, b and [ENTITY] = c
J. Roe | The answer is Lou. Lou won | The answer is [ENTITY]. [ENTITY] won
no | No, there is no rush, no-one runs. YES! | [ANSWER], there is no rush, no-one runs. [ANSWER]!
no | The answer is no as so. Answer: no | The answer is [ANSWER] as so. Answer: [ANSWER]
1 | Step 1: b\n1. Then\n(3) So | Step 1: b\n1. Then\n(3) So
2 | Thought 2: b\nAction 12: b\nObservation 2: b | Thought 2: b\nAction 12: b\nObservation 2: b
| https://a, x.org/upper/fern: by Fern. Fern grows | [ENTITY] [ENTITY] by [ENTITY]. [ENTITY] grows
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_what_is_hidden_and_what_is_kept(case):
    answer, text, masked = (part.strip().replace("\\n", "\n") for part in case.split("|"))
    assert mask(text, answer) == masked
    assert mask(masked, answer) == masked


def test_the_traces_of_the_toy_replay_and_mask_without_a_leak():
    known = dialogue.load_knowledge(dialogue.KNOWLEDGE)
    for row in rows("train", 300, "search") + rows("test", 300, "search"):
        trace, answer = row["teacher_ds"], row["reward_model"]["ground_truth"]
        turns = re.findall(r"<search>(.*)</search>\n<information>(.*)</information>", trace)
        assert all(known[query.casefold()] == found for query, found in turns)
        assert len(turns) == row["difficulty"] and smepo.reward(trace, answer, "search") == 1.0
        masked = mask(trace, answer)
        assert masked == re.sub(r"\b[A-Z]\w+", "[ENTITY]", trace)  # nothing tells the answer apart
        assert domain.leaks(trace, answer) and not domain.leaks(masked, answer)


# ---- The leak check, and the reward --------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, cries",
    [
        ("the SILVER\nHarbor film", "silver harbor", True),
        ("it is an office", "The Office", True),
        ("it has 1,250.0 rooms", "1250", True),
        ("it has sixteen", "16", True),
        ("No, the harbour is older.", "no", True),
        ("Yes the harbour is", "Yes", True),
        ("so the answer is no as both are", "no", True),
        ("Option B is correct", "B", True),
        ("A fox, or B_1, B = 2", "B", False),
        ("at -5 degrees", "-5", True),
        ("in [ENTITY]", "entity", False),
        ("there is no such film, so no one can say", "no", False),
        ("silver [ENTITY] harbor", "silver harbor", False),
        ("Step 1: look\n2. find", "2", False),
    ],
)
def test_the_leak_check_cries_where_the_answer_can_be_read(text, answer, cries):
    assert domain.leaks(text, answer) == cries
    assert not domain.leaks(mask(text, answer), answer)


def test_one_in_words_is_not_hidden_but_leaks_where_it_is_the_answer():
    assert mask("it has one", "1") == "it has one"
    assert domain.leaks("it has one", "1") and not domain.leaks("it has one", "2")


def test_the_reward_is_an_exact_match_of_what_is_stated_last():
    right = [("<answer> the trieste. </answer>", "Trieste"), ("<answer>1,250</answer>", "1250")]
    right += [("<answer>J. K. Roe</answer>", "J. K. Roe"), ("Action 2: Finish[Oslo]", "Oslo")]
    right += [("<answer>(A)</answer>", "A")]
    wrong = [("<answer>-5</answer>", "5"), ("<answer>50</answer>", "50 Cent")]
    wrong += [("<answer>Trieste, Italy</answer>", "Trieste"), ("<answer></answer>", "")]
    assert domain.rewards(*zip(*right)) == [1.0] * 5
    assert domain.rewards(*zip(*wrong)) == [0.0] * 4


# ---- The dialogue --------------------------------------------------------------------------------

ASK, END = "<search>mayor of Bergen</search>", "<answer>Ada</answer>|"
NOTHING = "\n<information></information>\n"


def test_the_environment_answers_a_query_and_nothing_else(tmp_path):
    mayor = dialogue.load_knowledge(dialogue.KNOWLEDGE)["mayor of bergen"]
    found = f"<information>{mayor}</information>\n"
    assert dialogue.look_up(ASK) == "\n" + found
    assert dialogue.look_up(ASK + "\n") == found  # the policy began the line itself
    for text in ("<search>mayor of Atlantis</search>", "</search>", "<search>a<b>c</search>"):
        assert dialogue.look_up(text) == NOTHING
    assert domain.DOMAIN.told.sub("", ASK + "\n" + found + END) == ASK + END
    (tmp_path / "knowledge.jsonl").write_text('{"entity": "Oslo"}', encoding="utf-8")
    with pytest.raises(UserError, match="knowledge.jsonl"):
        dialogue.load_knowledge(tmp_path / "knowledge.jsonl")


class Letters:
    """A tokenizer of one token a letter; | is the EOS."""

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))


def follow(monkeypatch, scripts) -> list:
    """Put scripts, one a prompt, in the place of the policy; returns the contexts of each call."""
    turns, calls = [iter(script) for script in scripts], []

    def sample(model, contexts, config, stops):
        calls.append(contexts)
        return Letters()([next(turns[ids[0]]) for ids in contexts])["input_ids"]

    monkeypatch.setattr(dialogue, "sample", sample)
    return calls


def test_rows_of_a_batch_go_on_until_each_has_its_own_end(monkeypatch):
    monkeypatch.setattr(dialogue, "MAX_TURNS", 3)
    scripts = [[END], [ASK + "more", END], ["</search>", END], [ASK] * 5]
    calls, config = follow(monkeypatch, scripts), SimpleNamespace(max_new_tokens=999)
    rows, marks = dialogue.converse(None, Letters(), [[i] for i in range(4)], config)
    assert [len(call) for call in calls] == [4, 3, 1, 1]  # only open rows; the last is stopped
    told = dialogue.look_up(ASK)
    texts = [END, ASK + told + END, "</search>" + NOTHING + END, (ASK + told) * 3 + ASK]
    assert [Letters().decode(row) for row in rows] == texts  # a turn ends with its first query
    for row, mark, text in zip(rows, marks, texts, strict=True):
        sampled = [token for token, one in zip(row, mark, strict=True) if one]
        assert Letters().decode(sampled) == text.replace(told, "").replace(NOTHING, "")
    for ids in sum(calls, []):  # each goes on from the very ids of its row so far
        assert [ids[0], *rows[ids[0]]][: len(ids)] == ids


def test_the_token_limit_counts_what_was_sampled_over_all_turns(monkeypatch):
    for limit in range(len(ASK), 3 * len(ASK) + 1):
        calls = follow(monkeypatch, [[ASK] * 9])
        config = SimpleNamespace(max_new_tokens=limit)
        _, marks = dialogue.converse(None, Letters(), [[0]], config)
        assert sum(marks[0]) == limit and len(calls) == math.ceil(limit / len(ASK))
        assert marks[0][-1] == 1  # nothing is told to a row that may say no more


def test_only_what_is_sampled_after_the_prompt_can_end_a_turn():
    pieces = ["<sea", "rch>", "</", "search", ">.", "more", "<search>a</search>"]
    tokenizer = SimpleNamespace(
        decode=lambda ids: "".join(pieces[i] for i in ids),
        batch_decode=lambda rows: ["".join(pieces[i] for i in row) for row in rows],
    )
    ids = torch.tensor([[6, 0, 1, 2, 3, 4], [6, 2, 3, 5, 5, 5], [6, 5, 5, 5, 3, 4]])
    assert dialogue.has_asked(tokenizer, 1, ids, None).tolist() == [True, False, False]
    assert dialogue.until_asked([5, 2, 3, 4, 5], tokenizer) == [5, 2, 3, 4]  # kept whole: `>.`
    assert dialogue.until_asked([5, 2, 3], tokenizer) == [5, 2, 3]


@pytest.fixture(scope="module")
def searcher():
    return smepo.load_model(TASKS / "search" / "base", settings())


def test_dialogues_of_the_base_score_as_they_were_sampled(searcher):
    model, tokenizer = searcher
    config = settings(task="search")
    problems = smepo.load_problems("", "semantic", tokenizer, config, "test")[::40]
    torch.manual_seed(0)
    asked = [(p, i % 2 == 0) for i, p in enumerate(problems)]
    rollouts = sum(smepo.rollout(model, tokenizer, asked, config), [])
    for r in rollouts:
        told = tokenizer.decode([t for t, one in zip(r.ids, r.sampled, strict=True) if not one])
        assert told == "".join(match[0] for match in dialogue.TOLD.finditer(r.text))
        assert all(map(r.text.__contains__, map(dialogue.look_up, re.findall("<se.*h>", r.text))))
        assert r.reward == (r.ended and smepo.stated(r.text) == r.problem.answer)
    assert len({r.text.count("</search>") for r in rollouts}) > 2


def test_the_expert_loss_does_not_teach_what_the_environment_says(searcher):
    model, tokenizer = searcher
    config = settings(task="search")
    p = smepo.load_problems(config.data, "semantic", tokenizer, config)[0]
    ids = tokenizer(p.trace + tokenizer.eos_token)["input_ids"]
    whole = Rollout(p, False, p.prompts[False], ids, [], "", True, 0.0, False)
    nll = -unpadded_logprobs(model, whole)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    told_or_hidden = re.compile(rf"\n?</?information>\n?|{'|'.join(toy.KIND)}")
    kept = [i for i, token in enumerate(tokens) if not told_or_hidden.fullmatch(token)]
    ours = smepo.masked_expert_loss(model, tokenizer, p, "search")
    torch.testing.assert_close(ours, nll[kept].mean(), atol=1e-5, rtol=1e-4)
