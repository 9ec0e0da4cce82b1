"""The executable specification of smepo.py: every equation, pitfall and promise has a test here.

Run `python -m pytest`; it needs no network and no GPU. What the tests share is in
tiny_tasks/fixtures.py; code, search and the commands are tested beside them.
"""

import dataclasses
import itertools
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pytest
import torch

import smepo
from smepo import Config, Domain, Problem, Rollout, UserError
from tiny_tasks.fixtures import (
    GOOD,
    KILL_POINTS,
    MANY_TIMES,
    TASKS,
    TRACE,
    assert_same_run,
    flags,
    gradient_of,
    make_group,
    problem,
    random_model,
    read_log,
    refused,
    rows,
    run,
    saved,
    settings,
    small,
    train_and_die,
    unpadded_logprobs,
    write_rows,
)

# ---- Flags ---------------------------------------------------------------------------------------


def test_every_setting_is_a_documented_flag(capsys):
    assert smepo.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for setting in dataclasses.fields(Config):
        assert re.search(rf"^    {setting.name}: .+ = .+  # .{{10}}", shown, re.MULTILINE)


def test_flags_reach_the_config():
    config = settings(guide="random", clip_low=0.1, out="x", guide_when="fade")
    assert smepo.parse(flags(config)) == config
    assert smepo.parse([]) == Config()
    assert Config(clip_low=0, expert_coef=0, learning_rate=1e-6).clip_low == 0


@pytest.mark.parametrize(
    "flag",
    "steps 0|steps many|guide half|group_size 1|guide_when sometimes|guide_when 1.5|temperature 0"
    "|mini_batches 3|seed -1|seed 100000000000000000|clip_high nan|clip_low -3"
    "|model no/such/folder|data none.jsonl|max_prompt_tokens 10|nonsense 1".split("|"),
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, capsys, flag):
    name, value = flag.split()
    message = refused(capsys, flags(small(tmp_path)) + [f"--{name}", value])
    assert value in message or f"--{name}" in message
    assert not Path("runs").exists()


def test_a_refusal_says_what_to_give_instead(tmp_path, capsys):
    data = write_rows(tmp_path / "train.jsonl", rows("train", 3))
    assert "give --test_data, too" in refused(capsys, ["--data", data])
    assert "has no file test.jsonl" in refused(capsys, ["--data", str(tmp_path)])
    assert "python -m tiny_tasks.compare" in refused(capsys, ["compare", "--quick"])


def test_the_rest_comes_from_the_task_beside_smepo_wherever_it_is_called_from():
    for task, domain in (("arithmetic", "math"), ("code", "code"), ("search", "search")):
        config = Config(task=task)
        assert config.domain == domain
        assert smepo.load_model(config.model, config)[0].name_or_path == str(TASKS / task / "base")
        for split in ("train", "test"):
            found = smepo.read_problems("", "none", config, split)
            assert [p.question for p in found] == [r["question"] for r in rows(split, None, task)]
    assert Config(domain="math") == Config()  # typed or not: no system prompt comes with it


# ---- The guide, data and prompts -----------------------------------------------------------------


def test_spans_that_overlap_become_one():
    spans = [(0, 4, "[A]"), (3, 6, "[B]"), (6, 7, "[Y]"), (9, 12, "[C]")]
    assert smepo.replace_spans("0123456789abcdef", spans) == "[A][Y]78[C]cdef"
    assert smepo.replace_spans("0123", []) == "0123"


def test_random_mask_hides_as_many_words_and_signs_anywhere_and_depends_on_the_seed():
    semantic = smepo.hidden_spans(TRACE, "math")
    chosen = [smepo.random_spans(TRACE, semantic, str(seed)) for seed in range(300)]
    for spans in chosen:
        assert len(spans) == len(semantic) and spans == sorted(set(spans))
    pieces = {match.span() for match in re.finditer(r"\w+|[^\w\s]", TRACE)}
    assert {span[:2] for spans in chosen for span in spans} == pieces
    assert chosen[1] != chosen[0] == smepo.random_spans(TRACE, semantic, "0")
    long = smepo.random_spans("one two three four", [(0, 13, "[X]")], "0")
    assert len(long) == 3 and smepo.random_spans("no number", [], "0") == []


def test_guide_arms():
    assert smepo.guide_trace(TRACE, "none", "math") == ""
    assert smepo.guide_trace(TRACE, "full", "math") == TRACE
    masked = smepo.guide_trace(TRACE, "semantic", "math", "16")
    assert masked.startswith("Step 1: [NUMBER] * [NUMBER] = [NUMBER].\nStep 2: [NUMBER] -")
    assert masked == smepo.mask_trace(TRACE, "math", "16") == smepo.mask_trace(TRACE, "math")
    assert smepo.leaks(TRACE, "16", "math") and not smepo.leaks(masked, "16", "math")
    for ratio, count in ((0.0, 1), (0.3, 1), (0.5, 2), (0.9, 3), (1.0, 4)):  # of four lines
        prefix = smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=ratio)
        assert prefix == "\n".join(TRACE.split("\n")[:count])


def test_a_new_domain_is_one_module(tmp_path, base, monkeypatch, capsys):
    domain = Domain(
        spans=lambda trace, _: [(*m.span(), "[COLOR]") for m in re.finditer("red|blue", trace)],
        leaks=lambda masked, answer: answer in masked,
        rewards=lambda texts, truths: [float(b in a) for a, b in zip(texts, truths, strict=True)],
    )
    monkeypatch.setitem(sys.modules, "my_colors", SimpleNamespace(DOMAIN=domain))
    row = GOOD | {"teacher_ds": "It is red, not blue.", "reward_model": {"ground_truth": "red"}}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    config = settings(domain="my_colors")
    (p,) = smepo.load_problems(path, "semantic", base[1], config)
    assert p.guide == "It is [COLOR], not [COLOR]."
    assert smepo.reward("a red one", "red", "my_colors") == 1.0
    smepo.load_problems(path, "full", base[1], config)
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"train: 1 of 1 prompts fit, {n} leak the answer" for n in (0, 1)]


def test_prompt_is_question_then_guide_as_a_finished_turn_then_an_open_turn(tmp_path, base):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD | {"difficulty": 5}])
    (p,) = smepo.load_problems(path, "semantic", base[1], settings(system="Compute"))
    assert (p.answer, p.difficulty) == ("2", "5")
    assert p.guide == "Step 1: [NUMBER] + [NUMBER] = [NUMBER].\nThe answer is [NUMBER]."
    asked = "<|system|>Compute<|end|><|user|>Compute 1 + 1<|end|><|assistant|>"
    shown = f"Here is an example solution:\n{p.guide}<|end|><|assistant|>"
    assert base[1].batch_decode(p.prompts) == [asked, asked + shown]
    (unguided,) = smepo.load_problems(path, "none", base[1], settings())
    assert unguided.guide == "" and unguided.prompts == [unguided.prompts[False]] * 2


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
LLAMA_2 = (  # and Mistral: an assistant's turn ends in EOS, and nothing opens after it
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DROPS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}!"


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "solution:\nt<|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA_3, "solution:\nt<|eot|><|h|>assistant<|/h|>\n\n"),
        (smepo.PLAIN_TEMPLATE, "solution:\nt\n\nAssistant:"),
        (LLAMA_2, "opens no turn after it"),
        (DROPS, "the chat template drops a part, or opens no turn after it"),
        (CHATML.replace("messages %}", "messages if m.role != 'system' %}"), "no turn after it"),
    ],
    ids=["ChatML", "Llama-3", "plain", "Llama-2", "drops", "drops the system prompt"],
)
def test_a_template_opens_a_turn_or_is_refused(base, monkeypatch, template, end):
    monkeypatch.setattr(base[1], "chat_template", template)
    assert "x" in smepo.build_prompt(base[1], "x")  # the question alone suits every one
    try:
        text = smepo.build_prompt(base[1], "x", "t", "the system prompt")
    except UserError as error:
        text = str(error)
    assert text.endswith(end)


@pytest.mark.parametrize("truth", ["2001-03-01", "007", 9223372036854775808, 0.10, "½"])
def test_an_answer_stays_what_it_is(tmp_path, truth):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD | {"reward_model": {"ground_truth": truth}}])
    (p,) = smepo.read_problems(path, "semantic", settings())
    assert p.answer == str(truth)


FAULTS = {"question": None}, {"teacher_ds": ""}, {"reward_model": None}


@pytest.mark.parametrize("fault", [*FAULTS, {"reward_model": {"ground_truth": " "}}])
def test_bad_rows_are_named_by_their_number_and_what_mends_them(tmp_path, capsys, fault):
    data = write_rows(tmp_path / "bad.jsonl", [GOOD, GOOD | fault, GOOD])
    message = refused(capsys, flags(small(tmp_path, data=data)))
    assert f"{data} row 2 has no" in message and "python -m tiny_tasks.prepare" in message


def test_a_row_needs_a_trace_only_where_the_arm_does(tmp_path, base):
    path = write_rows(tmp_path / "bare.jsonl", [GOOD | {"teacher_ds": None}] * 2)
    assert len(smepo.load_problems(path, "none", base[1], settings())) == 2
    config = settings(expert_coef=0.1)  # its loss is on the traces
    with pytest.raises(UserError, match="row 1 has no"):
        smepo.load_problems(path, "none", base[1], config)
    # but what is held out is never shown one
    assert len(smepo.load_problems(path, "none", base[1], config, "test")) == 2


def test_parquet_and_folders_load_like_jsonl(tmp_path, base):
    def load(path, split="train"):
        return smepo.load_problems(str(path), "semantic", base[1], settings(), split)

    date = {"reward_model": {"ground_truth": "2001-03-01"}, "difficulty": 0}  # and no other type
    lines = [row | date for row in rows("train", 5)]
    write_rows(tmp_path / "train.jsonl", rows("train", 9))
    write_rows(tmp_path / "test.jsonl", lines)
    datasets.Dataset.from_list(lines).to_parquet(tmp_path / "rows.parquet")
    expected = load(tmp_path / "test.jsonl")
    assert expected == load(tmp_path / "rows.parquet") == load(tmp_path, "test")
    assert len(load(tmp_path)) == 9


def test_long_prompts_are_left_out_and_counted(tmp_path, capsys, base):
    long = GOOD | {"question": "Compute 1" + " + 1" * 40}
    wordy = GOOD | {"teacher_ds": "\n".join(["Step 1: 1 + 1 = 2."] * 30)}
    path = write_rows(tmp_path / "rows.jsonl", [long, GOOD, wordy])
    config = settings(max_prompt_tokens=70)
    (p,) = smepo.load_problems(path, "full", base[1], config)
    assert p.guide == GOOD["teacher_ds"]
    assert "train: 1 of 3 prompts fit" in capsys.readouterr().out
    assert len(smepo.load_problems(path, "none", base[1], config)) == 2  # without its guide
    config.max_prompt_tokens = len(p.prompts[True])
    assert len(smepo.load_problems(path, "full", base[1], config)) == 1
    config.max_prompt_tokens -= 1
    with pytest.raises(UserError, match="the shortest prompts have"):
        smepo.load_problems(path, "full", base[1], config)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m, t: setattr(t, "eos_token", None), "no eos_token"),
        (lambda m, t: t.add_tokens(["one", "more"] * 99), "more tokens than its"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(tmp_path, capsys, fresh_base, damage, message):
    damage(*fresh_base)
    path = saved(tmp_path / "model", *fresh_base)
    assert message in refused(capsys, flags(small(tmp_path, model=path)))


# ---- Rollouts ------------------------------------------------------------------------------------


def test_completions_end_with_one_eos_and_padding_goes_by_position():
    assert smepo.until_eos([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert smepo.until_eos([5, 9, 2, 0], [2, 9]) == [5, 9]  # several EOS ids: the first counts
    assert smepo.until_eos([5, 6, 7], [2]) == [5, 6, 7]  # truncated
    ids, mask = smepo.pad([[0, 5, 0], [7]], "cpu")  # the pad token is a real one, too
    assert ids.tolist() == [[0, 5, 0], [0, 0, 7]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "lfm2"])
def test_a_sample_is_drawn_token_by_token_from_the_model(name, base, monkeypatch):
    """Prompts of unequal lengths: every token is drawn from the softmax of an unpadded forward."""
    model, config = random_model(name, len(base[1])), settings(max_new_tokens=6, temperature=0.7)
    model.generation_config = smepo.GenerationConfig(eos_token_id=[2])
    spy = Mock(wraps=torch.multinomial)
    monkeypatch.setattr(torch, "multinomial", spy)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
    completions = smepo.sample(model, prompts, config)
    drawn = torch.stack([call.args[0] for call in spy.call_args_list], dim=1)  # (N, T, V)
    for prompt, ids, ours in zip(prompts, completions, drawn, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).softmax(-1)
        torch.testing.assert_close(ours[: len(ids)], expected, atol=1e-5, rtol=1e-4)


def test_rollouts_carry_what_was_sampled_and_are_rewarded_in_one_call(base, monkeypatch):
    """One that was cut off has stated no answer, whatever its text."""
    eos = base[1].eos_token_id
    sample = Mock(return_value=[[20, eos], [21], [22, eos], [23, 24]])
    rewards = Mock(return_value=[0.2, 1.0, 0.0, 0.5])
    domain = Domain(None, None, rewards, solved_from=0.5)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(DOMAIN=domain))
    monkeypatch.setattr(smepo, "sample", sample)
    p, q = problem(base), problem(base, answer="17")
    asked = [(p, True), (q, False)]
    groups = smepo.rollout(*base, asked, settings(domain="mine"), 2)
    a, b, c, d = base[1].batch_decode([[20], [21], [22], [23, 24]])
    rewards.assert_called_once_with([a, "", c, ""], ["16", "16", "17", "17"])
    rollouts = [
        Rollout(p, True, p.prompts[1], [20, eos], [1, 1], a, True, 0.2, False),
        Rollout(p, True, p.prompts[1], [21], [1], b, False, 1.0, True),
        Rollout(q, False, q.prompts[0], [22, eos], [1, 1], c, True, 0.0, False),
        Rollout(q, False, q.prompts[0], [23, 24], [1, 1], d, False, 0.5, True),
    ]
    assert groups == [rollouts[:2], rollouts[2:]]
    assert sample.call_args.args[1] == [r.prompt_ids for r in rollouts]
    assert [smepo.loggable(r, 1)["guide"] for r in rollouts] == [p.guide, p.guide, "", ""]


def test_a_fraction_is_drawn_by_seed_step_and_question():
    def shown(when: str, seed=0) -> list[bool]:
        config = settings(guide_when=when, seed=seed)
        problems = [Problem(f"question {i}", "") for i in range(300)]
        return [smepo.shows_guide(p, step, config) for p in problems for step in range(10)]

    for when in ("0", "0.25", ".5", "1", "1.0"):
        assert sum(shown(when)) / 3000 == pytest.approx(float(when), abs=0.03)
    half = shown("0.5")
    assert half == shown("0.5") != shown("0.5", seed=1)
    assert half[::10] != half[1::10]  # a question is not always shown its guide
    assert all(shown("always")) and not any(shown("on-failure"))


def test_fading_falls_from_always_to_never_in_the_first_part_of_the_steps():
    config = settings(guide_when="fade", steps=100)
    problems = [Problem(f"question {i}", "") for i in range(1000)]
    for step, chance in ((0, 1.0), (15, 0.75), (30, 0.5), (59, 1 / 60), (60, 0), (100, 0)):
        shown = [smepo.shows_guide(p, step, config) for p in problems]
        assert sum(shown) / 1000 == pytest.approx(chance, abs=0.05 * (0 < chance < 1))


def test_a_schedule_is_asked_once_for_a_group_and_step(base, monkeypatch):
    """So that one which draws without a seed cannot split a group."""
    shows_guide = Mock(side_effect=[True, False] * 3)
    monkeypatch.setattr(smepo, "shows_guide", shows_guide)
    problems = [problem(base, question=f"Compute {i} + 1", answer="9") for i in range(4)]
    groups = smepo.collect_rollouts(*base, problems, 1, settings(max_new_tokens=2))
    asked = [call.args[0] for call in shows_guide.call_args_list]
    assert asked == problems + problems[1::2]  # the unguided ones, once they have failed
    for group in groups:
        assert len(group) == 4 and len({(r.guided, tuple(r.prompt_ids)) for r in group}) == 1


def test_on_failure_guides_only_groups_that_all_failed_and_counts_both_passes(base, monkeypatch):
    problems = [problem(base, answer=str(i)) for i in range(4)]
    passes = []

    def rollout(model, tokenizer, asked, config, n):
        passes.append([(p.answer, g) for p, g in asked])
        rewards = {"1": [0.2, 1.0], "3": [1.0, 0.2]}  # 0.2 is a part, and not solved
        rows = [(p, g, rewards.get(p.answer, [0.2, 0.2])) for p, g in asked]
        return [[Rollout(p, g, [], [2], [1], "", True, r, r == 1) for r in R] for p, g, R in rows]

    monkeypatch.setattr(smepo, "rollout", rollout)
    config = settings(guide_when="on-failure", group_size=2)
    rollouts = sum(smepo.collect_rollouts(None, None, problems, 1, config), [])
    assert passes == [[(answer, False) for answer in "0123"], [("0", True), ("2", True)]]
    assert [r.guided for r in rollouts] == [True, True, False, False] * 2
    assert [r.problem.answer for r in rollouts] == list("00112233")


# ---- Loss, update and evaluation -----------------------------------------------------------------


def test_advantages_by_hand():
    A = smepo.group_advantages([1.0, 0, 0, 0, 1, 1, 0, 0], group_size=4)
    # group 1: mean 1/4, std (n - 1) = 1/2; group 2: mean 1/2, std = 1/sqrt(3)
    expected = [1.5, -0.5, -0.5, -0.5] + [math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2
    torch.testing.assert_close(A, torch.tensor(expected), atol=1e-5, rtol=0)
    A = smepo.group_advantages(torch.tensor([1.0, 0, 0, 0]), group_size=4, scale="none")
    assert A.tolist() == [0.75, -0.25, -0.25, -0.25]
    for value, scale in itertools.product((0.0, 1.0, 0.1, 1 / 3), ("std", "none")):
        # of equal rewards exactly 0, however their mean was rounded
        assert smepo.group_advantages([value] * 7, 7, scale).tolist() == [0.0] * 7


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "lfm2"])
def test_logprobs_under_unequal_left_padding_equal_unpadded_forwards(name, temperature):
    """Rotary and absolute positions alike, a window, rescaled logits: padding shifts nothing."""
    model = random_model(name)
    prompts = [[3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10], [8, 9]]
    completions = [[11, 2], [12, 13, 14, 2], [4, 4, 4], [15], [2]]
    parts = zip(prompts, completions, strict=True)
    rollouts = [Rollout(None, True, c, o, [1] * len(o), "", True, 0.0, False) for c, o in parts]
    ours, _ = smepo.score(model, rollouts, settings(temperature=temperature))
    for row, r in zip(ours, rollouts, strict=True):
        expected = unpadded_logprobs(model, r, temperature)
        torch.testing.assert_close(row[-len(r.ids) :], expected, atol=1e-5, rtol=1e-5)


def loss_of(logprobs, old, advantages, mask):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    old, advantages, mask = torch.tensor(old), torch.tensor(advantages), torch.tensor(mask)
    loss, stats = smepo.policy_loss(logprobs, old, advantages, mask, 0.2, 0.28)
    loss.backward()
    return loss.item(), logprobs.grad, stats["clip_fraction"].item()


@pytest.mark.parametrize(
    "ratio, A, expected, clipped",
    [
        (1.5, 1.0, -1.28, True),  # good action, already likelier by more than clip_high: stop
        (1.5, -1.0, 1.5, False),  # bad action that became likelier: always push back
        (0.5, 1.0, -0.5, False),  # good action that became rarer: always pull back
        (0.5, -1.0, 0.8, True),  # bad action, already rarer by more than clip_low: stop
        (1.2, 1.0, -1.2, False),  # inside the range nothing clips
        (0.9, -2.0, 1.8, False),
    ],
)
def test_clip_cases_for_both_signs(ratio, A, expected, clipped):
    loss, gradient, clip_fraction = loss_of([[math.log(ratio)]], [[0.0]], [A], [[1]])
    assert loss == pytest.approx(expected, abs=1e-6) and clip_fraction == clipped
    # d/d logprob of -ratio * A
    assert gradient.item() == pytest.approx(-ratio * A * (not clipped), abs=1e-6)


def test_aggregation_by_hand():
    """The mean over the sampled tokens of a row, then over the rows."""
    new = [
        [0.0, 300.0, -math.inf],  # one token; the logprobs of padding are wild
        [0.0, 0.0, math.log(0.5)],  # three, of which the last is clipped
        [-1.0, -1.0, -1.0],  # none
    ]
    old = [[0.0, 0.0, -math.inf], [0.0] * 3, [-1.0] * 3]
    mask = [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    loss, gradient, clip_fraction = loss_of(new, old, [1.0, -1.0, 1.0], mask)
    assert loss == pytest.approx((-1 + (1 + 1 + 0.8) / 3 + 0) / 3)
    torch.testing.assert_close(3 * gradient, torch.tensor([[-1, 0, 0], [1 / 3, 1 / 3, 0], [0] * 3]))
    assert clip_fraction == 1 / 4


def test_expert_loss_is_the_mean_over_visible_tokens_and_is_added_by_its_weight(fresh_base):
    """Hidden spans carry none; EOS counts, the prompt does not."""
    model, tokenizer = fresh_base
    p = problem(fresh_base)
    text = p.trace + tokenizer.eos_token
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    r = Rollout(p, False, p.prompts[False], encoded["input_ids"], [], "", True, 0.0, False)
    logprobs = unpadded_logprobs(model, r)
    hidden = {i for a, b, _ in smepo.hidden_spans(p.trace, "math") for i in range(a, b)}
    spans = [set(range(*offset)) for offset in encoded["offset_mapping"]]
    visible = [not span & hidden for span in spans]
    assert 0 < visible.count(False) < len(visible)
    loss = smepo.masked_expert_loss(model, tokenizer, p, "math")
    torch.testing.assert_close(loss, -logprobs[visible].mean())
    (0.5 * loss).backward()
    expected = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    without_signal = make_group(fresh_base, [0.0] * 4) + make_group(fresh_base, [1.0] * 4)
    ours = gradient_of(fresh_base, without_signal, expert_coef=0.5)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def updated(policy, rollouts: list[Rollout], learning_rate=0.0, **changes) -> dict:
    optimizer = torch.optim.AdamW(policy[0].parameters(), learning_rate)
    return smepo.update(*policy, optimizer, rollouts, settings(**changes))


def test_update_has_the_gradient_of_the_whole_unskipped_loss(fresh_base):
    """Skipping, sorting, splitting and padding together equal one loss over all B*G rows, at the
    temperature of the sampling. What an environment told has no gradient and no place in it."""
    rewards = [1.0, 0, 0, 0], [1.0] * 4, [0.0, 1, 1, 1]
    rollouts = sum((make_group(fresh_base, r, guided=r[0] > 0) for r in rewards), [])
    for r in rollouts[::2]:  # the others have sampled all
        r.sampled[1:-1] = [i % 3 % 2 for i in range(len(r.sampled) - 2)]
    ours = gradient_of(fresh_base, rollouts, micro_batch=3, temperature=0.7)
    loss = 0.0
    for r in rollouts:
        logprobs = unpadded_logprobs(fresh_base[0], r, 0.7)
        divisor = sum(r.sampled) * len(rollouts)
        loss -= r.advantage * (logprobs * torch.tensor(r.sampled)).sum() / divisor
    fresh_base[0].zero_grad()
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in fresh_base[0].parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_zero_variance_groups_move_nothing_and_cost_no_forward(fresh_base, monkeypatch):
    before = [p.clone() for p in fresh_base[0].parameters()]
    monkeypatch.setattr(smepo, "token_logprobs", lambda *_: pytest.fail("scored a useless group"))
    rollouts = make_group(fresh_base, [1.0] * 4) + make_group(fresh_base, [0.0] * 4)
    stats = updated(fresh_base, rollouts, learning_rate=1.0)
    assert stats == {"loss": 0, "grad_norm": 0, "clip_fraction": 0}
    assert all(map(torch.equal, before, fresh_base[0].parameters()))


def test_the_logged_loss_is_that_of_the_mini_batch(fresh_base):
    """However it was split: weighted by share, 0 at the first update, where the gradient is not."""
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0]) + make_group(fresh_base, [0.0, 0, 0, 1])
    for size in (1, 3, 100):
        stats = updated(fresh_base, rollouts, micro_batch=size)
        assert stats["loss"] == pytest.approx(0, abs=1e-6) and stats["grad_norm"] > 0.01


def test_ratio_is_exactly_one_at_the_first_update_only(fresh_base, monkeypatch):
    spy = Mock(wraps=smepo.policy_loss)
    monkeypatch.setattr(smepo, "policy_loss", spy)
    rollouts = sum([make_group(fresh_base, [1.0, 0, 0, 0]) for _ in range(4)], [])
    updated(fresh_base, rollouts, learning_rate=1e-2)  # one update a batch
    stats = updated(fresh_base, rollouts, learning_rate=1e-2, mini_batches=4)
    parts = [call.args[:4] for call in spy.call_args_list]
    moved = [((new - old) * mask).abs().max().item() for new, old, _, mask in parts]
    assert len(moved) == 5 and moved[:2] == [0.0, 0.0] and min(moved[2:]) > 1e-4
    assert {call.args[4:] for call in spy.call_args_list} == {(0.2, 0.28)}
    assert stats["clip_fraction"] > 0  # and so clipping can be seen to act


def test_each_mini_batch_takes_one_clipped_step_with_fresh_gradients(fresh_base, monkeypatch):
    parameters, norms = list(fresh_base[0].parameters()), []

    def step(_):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0]) + make_group(fresh_base, [0.0, 0, 0, 1])
    stats = updated(fresh_base, rollouts, mini_batches=2, grad_clip=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3) and stats["grad_norm"] > 0.1
    assert all(p.grad is None for p in parameters)  # nothing is carried over


def test_a_loss_that_is_not_finite_never_reaches_the_weights(fresh_base, monkeypatch):
    before = [p.clone() for p in fresh_base[0].parameters()]
    stats = {"clip_fraction": torch.tensor(0.0)}
    monkeypatch.setattr(smepo, "policy_loss", lambda new, *_: (new.sum() * math.inf, stats))
    with pytest.raises(RuntimeError, match="non-finite"):
        updated(fresh_base, make_group(fresh_base, [1.0, 0, 0, 0]), learning_rate=1e-3)
    assert all(map(torch.equal, before, fresh_base[0].parameters()))


def test_metrics_of_a_step_by_hand(base, monkeypatch):
    p = problem(base)

    def group(of, guided, sampled, rewards):
        return [Rollout(of, guided, [], [], sampled, "", True, r, r == 1) for r in rewards]

    rollouts = [
        *group(p, True, [1] * 2, [0.2] * 4),  # paid in part, not solved
        *group(p, True, [1] * 4, [1.0] * 4),
        *group(p, False, [1, 1, 0, 1, 1, 1, 1], [1.0, 0.0] * 2),  # one of seven was told
        *group(p, False, [1] * 4, [0.0] * 4),
    ]
    rollouts[9].ended = rollouts[11].ended = False

    def update(_, __, ___, given, config):
        for r in given[8:12]:
            r.advantage = 1.0  # the others have no signal
        return {"loss": 0.5}

    collect_rollouts = Mock(return_value=smepo.chunks(rollouts, 4))
    monkeypatch.setattr(smepo, "collect_rollouts", collect_rollouts)
    monkeypatch.setattr(smepo, "update", update)
    returned, metrics = smepo.train_step(*base, None, [p], 7, settings())
    assert collect_rollouts.call_args.args[2:4] == ([p] * 4, 7)
    expected = {"step": 7, "reward": 6.8 / 16, "completion_length": 4.0, "truncated": 2 / 16}
    expected |= {"zero_variance_wrong": 0.5, "zero_variance_right": 0.25, "guided": 0.5}
    expected |= {"loss": 0.5}
    del metrics["seconds_processor"]
    assert returned == rollouts and metrics == pytest.approx(expected)


def test_evaluation_by_hand_and_unguided_by_construction(base, monkeypatch):
    p = dataclasses.replace(problem(base), difficulty="2")
    q = dataclasses.replace(p, difficulty="5")
    pairs = zip([p, p, p, p, q, q, q, q], [1, 1, 0, 1, 0, 0, 0, 1], strict=True)
    rollouts = [Rollout(x, False, [], [], [], "", True, 0.5, solved) for x, solved in pairs]
    rollout = Mock(return_value=smepo.chunks(rollouts, 2))
    monkeypatch.setattr(smepo, "rollout", rollout)
    config = settings(eval_samples=2)
    table = smepo.evaluate(None, None, [p, p, q, q], config)
    asked = [(problem, False) for problem in (p, p, q, q)]
    rollout.assert_called_once_with(None, None, asked, config, 2)
    assert table["2"] == pytest.approx([0.75, 0.25 / 2**0.5])
    assert table["5"] == pytest.approx([0.25, 0.25 / 2**0.5])
    assert table["mean"] == pytest.approx([0.5, 0.125])


# ---- Training and the run folder -----------------------------------------------------------------


def test_a_run_writes_what_it_promises_and_the_same_seed_writes_the_same(tmp_path, capsys):
    config = small(tmp_path)
    assert smepo.main(flags(config)) == 0
    shown = capsys.readouterr().out
    for part in ("Compute", "[NUMBER]", "step 0 ", "step 4 ", "difficulty mean", "±", "runs"):
        assert part in shown
    (folder,) = Path("runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {*FILES, "curve.png"}
    before, *steps = read_log(folder / "metrics.jsonl")
    assert before["step"] == 0 and [step["step"] for step in steps] == [1, 2, 3, 4]
    assert ["pass@1" in step for step in (before, *steps)] == [True, False, True, False, True]
    mean, error = steps[-1]["pass@1"]["mean"]
    assert f"{mean:.3f} ± {error:.3f}    {mean - before['pass@1']['mean'][0]:+.3f}" in shown
    promised = {"reward", "zero_variance_wrong", "zero_variance_right", "completion_length"}
    promised |= {"truncated", "guided", "clip_fraction", "grad_norm", "loss"}
    assert all(promised <= set(step) for step in steps)
    rollouts = read_log(folder / "rollouts.jsonl")
    assert len(rollouts) == 4 * 4 * 4
    for step in steps:
        rewards = [r["reward"] for r in rollouts if r["step"] == step["step"]]
        assert sum(rewards) / 16 == pytest.approx(step["reward"])
    smepo.train(dataclasses.replace(config, out="runs/again"))
    assert_same_run(folder, Path("runs/again"))
    smepo.train(dataclasses.replace(config, out="runs/other", seed=1))
    assert read_log("runs/other/metrics.jsonl") != [before, *steps]


FILES = {"config.json", "metrics.jsonl", "rollouts.jsonl", "checkpoint"}
RESUMED = {"eval_every": 1, "mini_batches": 2, "guide_when": "on-failure", "steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        config = small(Path.cwd(), **RESUMED)
        return smepo.train(dataclasses.replace(config, out="whole")).resolve(), config


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_again_and_again_a_run_resumes_to_the_same_bits(whole, monkeypatch, point):
    """First in the midst of a chosen call, then wherever a seed says, until it has survived."""
    rng, calls, deaths = random.Random(point), Counter(), 0
    config = dataclasses.replace(whole[1], out="killed")

    def dies(name):
        calls[name] += 1
        if name == point and calls[name] == (3 if point in MANY_TIMES else 1):
            return "midst"
        return rng.choice(("before", "midst", "after")) if deaths and rng.random() < 0.06 else ""

    while train_and_die(config, monkeypatch, dies):
        deaths += 1
        if Path("killed/config.json").exists():
            config.resume = "killed"
    assert deaths > 0
    assert_same_run(whole[0], Path("killed"))
    assert {path.name for path in Path("killed").iterdir()} == FILES  # nothing half-written
    assert not list(Path("killed/checkpoint").glob("*.new"))


def test_ctrl_c_names_the_command_to_go_on_with(whole, monkeypatch, capsys):
    monkeypatch.setattr(smepo, "train_step", Mock(side_effect=KeyboardInterrupt))
    assert smepo.main(flags(whole[1]) + ["--out", "mine"]) == 130
    assert "python smepo.py --resume mine --steps 3\n" in capsys.readouterr().out


def test_resume_goes_on_for_more_steps_and_refuses_other_settings_and_data(whole, capsys):
    folder = smepo.train(dataclasses.replace(whole[1], out="mine", steps=2))
    for _ in range(2):  # the second has nothing left to do
        assert smepo.main(["--resume", "mine", "--steps", "3", "--micro_batch", "64"]) == 0
        assert_same_run(whole[0], folder)
    message = refused(capsys, ["--resume", "mine", "--learning_rate", "0.5"])
    assert message == "smepo.py: --resume mine: its settings or data have changed"
    assert "nowhere/config.json" in refused(capsys, ["--resume", "nowhere"])
    data = Path(whole[1].data)
    before = data.read_bytes()
    data.write_bytes(before.replace(b"Compute", b"Calculate", 1))
    assert refused(capsys, ["--resume", "mine"]) == message
    data.write_bytes(before)


def test_runs_without_a_name_are_counted_and_none_is_overwritten(capsys):
    names = [smepo.open_run(Config(guide_when="fade", seed=7)).name for _ in range(3)]
    assert names == [f"math-semantic-fade-seed7{end}" for end in ("", "-2", "-3")]
    folder = str(smepo.open_run(Config(guide="none")))
    assert folder == str(Path("runs/math-none-always-seed0"))
    assert "File exists" in refused(capsys, ["--out", folder])
    # the paths of a task are not written, so that a clone can move
    assert smepo.parse(["--resume", folder]) == Config(guide="none", resume=folder)


def test_copied_alone_it_trains_evaluates_saves_and_resumes(tmp_path):
    shutil.copy(smepo.__file__, tmp_path)
    bare = subprocess.run(
        [sys.executable, "smepo.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert bare.returncode == 2 and "tiny_tasks/arithmetic/base" in bare.stderr
    config = small(tmp_path, model=str(TASKS / "arithmetic/base"), domain="math", eval_every=1)
    arguments = flags(dataclasses.replace(config, mini_batches=2, max_new_tokens=32))
    shown = run(["smepo.py", *arguments, "--out", "parts", "--steps", "2"], tmp_path)
    assert "difficulty mean" in shown and "step 2 " in shown
    script = f"""if True:
        import smepo
        assert smepo.main(["--resume", "parts", "--steps", "4"]) == 0
        assert smepo.main({arguments!r} + ["--out", "whole"]) == 0"""
    shown = run(["-c", script], tmp_path)
    assert shown.count("difficulty mean") == 2 and shown.count("step 4 ") == 2
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ---- Math ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, truth, expected",
    [
        ("The answer is 16.", "16", 1.0),
        ("The answer is 1,234.", "1234", 1.0),
        ("The answer is 12,34.", "1234", 0.0),
        (r"so \boxed{-3}", "\u22123", 1.0),
        ("<answer>\n74\n</answer>", "74", 1.0),
        ("The answer is 17. No, wait: the answer is 16.", "16", 1.0),
        ("Step 1: 2 + 2 = 16.", "16", 0.0),  # a number in passing is no answer
        ("", "", 0.0),
        (r"\boxed{\frac14}", "0.25", 1.0),
        (r"\boxed{1/0}", "0", 0.0),
        ("The answer is .5.", "5", 0.0),
        ("#### 50%", r"50\%", 1.0),
        (r"\boxed{50\%}", "0.5", 0.0),
        ("The answer is 3 4.", "34", 0.0),
        ("The answer is 1e999999999.", "42", 0.0),
        (f"The answer is {'9' * 5000}.", "42", 0.0),
        ("The answer is 5 dollars.", "5", 0.0),  # units are math_verify's
        (r"The answer is \boxed{\text{(B)}}.", "B", 1.0),
        ("The answer is b.", "(B)", 1.0),
        ("The answer is (B) 5 metres.", "B", 1.0),
        ("The answer is C or D", "C", 0.0),
        (r"\boxed{x^2 + 6x+11}", "x^2+6x+11", 1.0),
        (r"\boxed{\frac{a}{bc}}", r"\frac{ab}{c}", 0.0),
        (r"\boxed{1} #### 16", "1", 1.0),  # a box comes first, whatever follows
        (r"\boxed{16", "16", 0.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        (r"\boxed 7 is it", "7", 1.0),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "5", 1.0),
        ("The answer is:\n\\[\n5\n\\]", "5", 1.0),
        ("**Answer**: `13`", "13", 1.0),
        (r"\boxed{2\frac{1}{2}}", "21/2", 0.0),
        ("The answer is (A) or (B).", "A", 0.0),
    ],
)
def test_reward(completion, truth, expected):
    assert smepo.reward(completion, truth, "math") == expected


@pytest.mark.parametrize("pattern, example", [*smepo.KEEP.items(), *smepo.HIDE.items()])
def test_every_rule_acts_on_its_example(pattern, example):
    assert re.search(pattern, example, re.MULTILINE)
    masked = smepo.mask_trace(f"so\n{example}", "math", "none")
    assert (masked == f"so\n{example}") == (pattern in smepo.KEEP)


@pytest.mark.parametrize(
    "text, masked",
    [
        ("Step 1: 7 \u2212 6 = 1.", "Step 1: [NUMBER] \u2212 [NUMBER] = [NUMBER]."),
        ("By Theorem 4.2, 9 divides n", "By Theorem 4.2, [NUMBER] divides n"),
        ("in the worst case 17 draws", "in the worst case [NUMBER] draws"),
        ("1. Let x_1 be 4.", "1. Let x_1 be [NUMBER]."),
        ("it is\n72.\nDone.", "it is\n[NUMBER].\nDone."),
        ("a_{n+1} = a_n + 2, x₁ = 3", "a_{n+1} = a_n + [NUMBER], x₁ = [NUMBER]"),
        (r"\log_2 8 \tag{2}", r"\log_[NUMBER] [NUMBER] \tag{2}"),
        ("n(n-3)/2", "n(n-[NUMBER])/[NUMBER]"),
        ("12,480 or 15{,}600 or \u221217", "[NUMBER] or [NUMBER] or [NUMBER]"),
        ("½ of 2⁵ is -3.5%, the 21st", "[NUMBER] of [NUMBER][NUMBER] is [NUMBER], the [NUMBER]"),
        ("forty-two, one can check", "[NUMBER], one can check"),
        (r"\boxed{42} or \boxed{x+1}", r"\boxed{[NUMBER]} or \boxed{[ANSWER]}"),
        (r"is $\sqrt{3}$. #### \sqrt{3}", "is $[ANSWER]$. #### [ANSWER]"),
        ("Is it A or B? #### B", "Is it [ANSWER] or [ANSWER]? #### [ANSWER]"),
        ("A side a of f(A) = A_1. #### A", "A side a of f([ANSWER]) = A_1. #### [ANSWER]"),
        ("[NUMBER] is a number. #### number", "[NUMBER] is a [ANSWER]. #### [ANSWER]"),
    ],
)
def test_mask(text, masked):
    assert smepo.mask_trace(text, "math") == masked
    assert smepo.mask_trace(masked, "math") == masked


@pytest.mark.parametrize(
    "text, answer, leaky",
    [
        ("so it is forty-two", "42", True),
        ("We get:\n42 is it", "42", True),
        (r"we take (\text{C})", "C", True),
        ("so it is 42.0", "42", True),
        ("that is 1,234", "1234", True),
        ("it is [NUMBER] - 17 floors", "-17", True),
        (r"is \frac{3}{4}", "0.75", True),
        ("[NUMBER]+3=7", "7", True),
        ("it is x ^ {2} + 1", "x^2+1", True),
        ("it is THURSDAY", r"\text{Thursday}", True),
        ("Step 42: it is [NUMBER]", "42", False),
        ("1. Let x_1 be\n(2) the sum", "2", False),
        ("so it is 43 of 421", "42", False),
        ("[NUMBER] [ANSWER]", "7", False),
        ("a point B_1 of f(B)", "B", True),
        ("an eastern wind", "east", False),
    ],
)
def test_leaks(text, answer, leaky):
    assert smepo.leaks(text, answer, "math") is leaky
