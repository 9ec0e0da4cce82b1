"""A dialogue as smepo.py samples, scores and learns it: with generate, a tokenizer, the base."""

import functools
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch

import smepo
from smepo import Problem, Rollout
from tiny_tasks.fixtures import (
    TASKS,
    random_model,
    rows,
    settings,
    unpadded_logprobs,
)
from tiny_tasks.pretrain import make_tokenizer
from tiny_tasks.searching import dialogue, toy


@pytest.fixture(scope="module")
def searcher():
    return smepo.load_model(TASKS / "searching" / "base", settings())


def talks(searcher, count: int = 24) -> list[Rollout]:
    """Dialogues of the shipped base, four a problem, of unequal numbers of turns."""
    config = settings(task="search")
    problems = smepo.load_problems(config.test_data, "semantic", searcher[1], config)
    batch = [p for p in problems[:: len(problems) // count][:count] for _ in range(4)]
    torch.manual_seed(0)
    return smepo.rollout(*searcher, batch, [i % 8 < 4 for i in range(len(batch))], config)


def test_dialogues_of_the_base_are_well_formed_and_score_as_they_were_sampled(searcher):
    model, tokenizer = searcher
    rollouts, turns = talks(searcher), set()
    for i, r in enumerate(rollouts):
        assert len(r.ids) == len(r.sampled) and r.text == tokenizer.decode(r.ids).removesuffix(
            tokenizer.eos_token
        )
        given = tokenizer.decode([t for t, one in zip(r.ids, r.sampled, strict=True) if not one])
        assert given == "".join(match[0] for match in dialogue.TOLD.finditer(r.text))
        for ask, answer in re.findall(r"(<search>[^<]*</search>)(\n.*\n)", r.text):
            assert dialogue.look_up(ask) == answer
        right = r.ended and smepo.stated(r.text) == r.problem.answer
        assert r.reward == right
        turns.add(r.text.count("</search>"))
        r.advantage = 1.0 + i  # tells them apart
    assert len(turns) > 3 and 0 < sum(r.reward for r in rollouts) < len(rollouts)
    some, seen = rollouts[:12], 0
    for batch in smepo.micro_batches(some, "cpu", settings()):
        # padded beside each other, every token has the log-prob of its row alone
        scores = smepo.score(model, batch, settings())
        for row, marks, a in zip(scores, batch.sampled, batch.advantages, strict=True):
            r = rollouts[int(a) - 1]
            assert marks[: len(r.ids)].tolist() == r.sampled and not marks[len(r.ids) :].any()
            theirs = unpadded_logprobs(model, r)
            torch.testing.assert_close(row[: len(r.ids)], theirs, atol=1e-4, rtol=1e-4)
            seen += 1
    assert seen == 12


def test_a_dialogue_without_an_answer_or_an_end_earns_nothing(searcher, monkeypatch):
    ask, end = "<search>mayor of Bergen</search>", "<answer>Ada</answer>"
    scripts = [[f"{end}|"], [ask, f"{end}|"], [ask] * 99, [ask, end], [f"{ask}Ada|", "Ada|"]]
    turns = [iter(script) for script in scripts]

    def sample(model, tokenizer, contexts, config, stops):
        said = [next(turns[ids[0]]).replace("|", tokenizer.eos_token) for ids in contexts]
        return tokenizer(said, add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(dialogue, "sample", sample)
    problems = [Problem("", "Ada", "", question_ids=[i]) for i in range(5)]
    config = settings(task="search")
    rollouts = smepo.rollout(*searcher, problems, [False] * 5, config)
    assert [r.reward for r in rollouts] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [r.ended for r in rollouts] == [True, True, False, False, True]
    told = dialogue.look_up(ask)
    assert [r.text for r in rollouts][:2] == [end, ask + told + end]
    assert rollouts[3].text == ask + told + end and rollouts[4].text == ask + told + "Ada"
    assert rollouts[2].text.count("</search>") == dialogue.MAX_TURNS + 1


def scripted_by_bigrams(model, chain: list[int], monkeypatch) -> None:
    """After each token of the chain the policy is sure of the next; the cache is the model's."""
    after, forward = dict(itertools.pairwise(chain)), model.forward

    @functools.wraps(forward)
    def sure(input_ids, **kwargs):
        output = forward(input_ids, **kwargs)
        last = input_ids[:, -output.logits.shape[1] :]
        output.logits = torch.full_like(output.logits, -1e4)
        for row, column in itertools.product(*map(range, last.shape)):
            output.logits[row, column, after.get(last[row, column].item(), 0)] = 1e4
        return output

    monkeypatch.setattr(model, "forward", sure)


@pytest.mark.parametrize("last, pad", [(">", "<|pad|>"), (">.\n", "<|pad|>"), (">", "<|end|>")])
def test_a_turn_ends_with_a_tag_of_several_tokens(monkeypatch, last, pad):
    """Its last token may hold more, which stays; and where pad is the EOS, a stop is no end."""
    words = ["<sea", "rch>", "mayor of Ada", "</", "search", last, "more"]
    pieces = [re.escape(word) for word in words]
    tokenizer = make_tokenizer(SimpleNamespace(PHRASES=words, WORDS=[], PIECES=pieces))
    tokenizer.pad_token = pad
    model, eos = random_model("llama", len(tokenizer)), tokenizer.eos_token_id
    model.generation_config = smepo.GenerationConfig(eos_token_id=[eos])
    asks = tokenizer("<search>mayor of Ada</search" + last)["input_ids"]
    assert len(asks) == 6
    more = tokenizer.convert_tokens_to_ids("more")
    scripted_by_bigrams(model, [3, *asks, more, 4, eos], monkeypatch)
    # the guide in a prompt holds the tag, too: only what is sampled after it can end the turn
    prompts = [[5, 3], [*asks, 3], [*asks, *asks, 4], [5, asks[4]]]
    tail = [asks[5], more, 4, eos]  # without "</search" before it, this is not the tag
    spoken = dialogue.speak(model, tokenizer, prompts, settings())
    assert spoken == [asks, asks, [eos], tail]
    # in math the tag is a text like any other
    assert smepo.sample(model, tokenizer, prompts, settings())[0] == [*asks, more, 4, eos]


def test_the_expert_loss_does_not_teach_what_the_environment_says(searcher):
    model, tokenizer = searcher
    config = settings(task="search")
    p = smepo.load_problems(config.data, "semantic", tokenizer, config)[0]
    ids = tokenizer(p.trace + tokenizer.eos_token)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    nll = -unpadded_logprobs(model, Rollout(p, False, p.question_ids, ids, [], "", True, 0.0))
    learned = [
        i for i, t in enumerate(tokens) if "information>" not in t and t.strip() not in toy.KIND
    ]
    written = dialogue.TOLD.sub("", p.trace) + tokenizer.eos_token
    names = rf"\b({'|'.join(toy.KIND)})\b"
    assert tokenizer.decode([ids[i] for i in learned]) == re.sub(names, "", written)
    ours = smepo.masked_expert_loss(model, tokenizer, p, "search")
    torch.testing.assert_close(ours, nll[learned].mean(), atol=1e-5, rtol=1e-4)


def test_the_guide_of_a_dialogue_is_masked_in_the_prompt(searcher):
    config = settings(task="search")
    p = smepo.load_problems(config.data, "semantic", searcher[1], config)[0]
    (row,) = rows("train", 1, "searching")
    assert p.answer == row["reward_model"]["ground_truth"] and not p.leaky
    prompt = searcher[1].decode(p.guided_ids)
    assert "[ENTITY]" in prompt and "<information>[ENTITY]" in prompt
    assert json.dumps(p.answer) not in prompt and f">{p.answer}<" not in prompt
