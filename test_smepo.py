"""The executable specification of smepo.py: every equation, pitfall and promise has a test here.

Run `python -m pytest`; it needs no network and no GPU. What the tests share is in
tiny_tasks/fixtures.py; code, search and the commands are tested beside them.
"""

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

import smepo
from smepo import Config, Domain, Problem, Rollout, UserError
from tiny_tasks.fixtures import (
    GOOD,
    KILL_POINTS,
    MANY_TIMES,
    ROOT,
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
    assert Config(clip_low=0, expert_coef=0, prefix_ratio=1, learning_rate=1e-6).clip_low == 0


@pytest.mark.parametrize(
    "flag",
    "steps 0|steps many|guide half|group_size 1|guide_when sometimes|guide_when 1.5|temperature 0"
    "|mini_batches 3|seed -1|seed 100000000000000000|prefix_ratio nan|clip_low -3|learning_rate -1"
    "|learning_rate inf|fade_until 0|model no/such/folder|data none.jsonl|max_prompt_tokens 10"
    "|nonsense 1".split("|"),
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, capsys, flag):
    name, value = flag.split()
    message = refused(capsys, flags(small(tmp_path)) + [f"--{name}", value])
    assert value in message or f"--{name}" in message
    assert not Path("runs").exists()


def test_one_file_of_data_wants_another_for_the_test(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows("train", 3))
    assert "give --test_data, too" in refused(capsys, ["--data", data])
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl", rows("train", 3))
    message = refused(capsys, ["--data", str(tmp_path / "folder")])
    assert "has no file test.jsonl" in message


def test_a_command_of_old_is_told_where_it_is(capsys):
    assert "python -m tiny_tasks.compare" in refused(capsys, ["compare", "--quick"])


def test_the_rest_comes_from_the_task_beside_smepo_wherever_it_is_called_from():
    for task, domain in (("arithmetic", "math"), ("code", "code"), ("search", "search")):
        config = Config(task=task)
        assert config.domain == domain
        assert smepo.load_model(config.model, config)[0].name_or_path == str(TASKS / task / "base")
        for split in ("train", "test"):
            found = smepo.read_problems("", "none", config, split)
            assert [p.question for p in found] == [
                row["question"] for row in rows(split, None, task)
            ]
    assert Config(domain="math") == Config()  # typed or not: no system prompt comes with it


# ---- The guide: what the policy is shown of a trace ----------------------------------------------


def test_spans_that_overlap_become_one():
    spans = [(0, 4, "[A]"), (3, 6, "[B]"), (6, 7, "[Y]"), (9, 12, "[C]")]
    assert smepo.replace_spans("0123456789abcdef", spans) == "[A][Y]78[C]cdef"
    assert smepo.replace_spans("0123", []) == "0123"


def test_random_mask_hides_as_many_words_and_signs_anywhere_and_depends_on_the_seed():
    semantic = smepo.hidden_spans(TRACE, "math")
    chosen = [smepo.random_spans(TRACE, semantic, str(seed)) for seed in range(300)]
    pieces = [match.span() for match in re.finditer(r"\w+|[^\w\s]", TRACE)]
    for spans in chosen:
        assert len(spans) == len(semantic) and spans == sorted(set(spans))
    assert {span[:2] for spans in chosen for span in spans} == set(pieces)
    assert chosen[0] != chosen[1]
    assert chosen[0] == smepo.random_spans(TRACE, semantic, "0")
    long = smepo.random_spans("one two three four", [(0, 13, "[X]")], "0")
    assert len(long) == 3 and smepo.random_spans("no number", [], "0") == []


def test_guide_arms():
    assert smepo.guide_trace(TRACE, "none", "math") == ""
    assert smepo.guide_trace(TRACE, "full", "math") == TRACE
    masked = smepo.guide_trace(TRACE, "semantic", "math", "16")
    assert masked.startswith("Step 1: [NUMBER] * [NUMBER] = [NUMBER].\nStep 2: [NUMBER] -")
    assert masked == smepo.mask_trace(TRACE, "math", "16") == smepo.mask_trace(TRACE, "math")
    assert smepo.leaks(TRACE, "16", "math") and not smepo.leaks(masked, "16", "math")
    lines = TRACE.split("\n")
    for ratio, count in ((0.0, 1), (0.3, 1), (0.5, 2), (0.9, 3), (1.0, 4)):  # of four lines
        prefix = smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=ratio)
        assert prefix == "\n".join(lines[:count])


def color_domain(**changes):
    return Domain(
        spans=lambda trace, _: [(*m.span(), "[COLOR]") for m in re.finditer("red|blue", trace)],
        leaks=lambda masked, answer: answer in masked,
        rewards=lambda texts, truths: [float(b in a) for a, b in zip(texts, truths, strict=True)],
        **changes,
    )


def test_a_new_domain_is_one_module(tmp_path, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_colors", SimpleNamespace(DOMAIN=color_domain()))
    row = GOOD | {"teacher_ds": "It is red, not blue.", "reward_model": {"ground_truth": "red"}}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    config = settings(domain="my_colors")
    (p,) = smepo.load_problems(path, "semantic", base[1], config)
    assert p.guide == "It is [COLOR], not [COLOR]." and not p.leaky
    assert smepo.reward("a red one", "red", "my_colors") == 1.0
    assert smepo.load_problems(path, "full", base[1], config)[0].leaky


def test_an_error_in_a_domain_shows_itself(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_broken.py").write_text("DOMAIN = no_such_name", encoding="utf-8")
    with pytest.raises(NameError, match="no_such_name"):
        smepo.main(flags(small(tmp_path, domain="my_broken")))


# ---- Data and prompts ----------------------------------------------------------------------------


def test_prompt_is_question_then_guide_as_a_finished_turn_then_an_open_turn(base):
    tokenizer, question = base[1], "Compute 7 - 6"
    assert smepo.build_prompt(tokenizer, question) == f"<|user|>{question}<|end|><|assistant|>"
    assert smepo.build_prompt(tokenizer, question, "Step 1: [NUMBER].", "Be brief.") == (
        f"<|system|>Be brief.<|end|><|user|>{question}<|end|>"
        "<|assistant|>Here is an example solution:\nStep 1: [NUMBER].<|end|><|assistant|>"
    )


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
GPT_2 = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
DROPS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}!"


@pytest.mark.parametrize(
    "template, unguided, guided",
    [
        (
            CHATML,
            "user\nx<|im_end|>\n<|im_start|>assistant\n",
            "t<|im_end|>\n<|im_start|>assistant\n",
        ),
        (LLAMA_3, "x<|eot|><|h|>assistant<|/h|>\n\n", "t<|eot|><|h|>assistant<|/h|>\n\n"),
        (LLAMA_2, "[INST] x [/INST]", "opens no turn"),
        (GPT_2, "opens no turn", "opens no turn"),
        (DROPS, "x!", "drops a part"),
        (smepo.PLAIN_TEMPLATE, "User: x\n\nAssistant:", "solution:\nt\n\nAssistant:"),
    ],
    ids="ChatML Llama-3 Llama-2 GPT-2 drops plain".split(),
)
def test_a_template_that_drops_the_guide_or_opens_no_turn_is_refused(
    base, monkeypatch, template, unguided, guided
):
    monkeypatch.setattr(base[1], "chat_template", template)
    for guide, wanted in (("", unguided), ("t", guided)):
        try:
            text = smepo.build_prompt(base[1], "x", guide)
        except UserError as error:
            text = str(error)
            assert wanted in text
        assert text.endswith(wanted) or wanted in ("opens no turn", "drops a part")


def test_problems_carry_their_prompts_as_the_template_writes_them(tmp_path, base):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD | {"difficulty": 5}])
    (p,) = smepo.load_problems(path, "semantic", base[1], settings())
    assert (p.answer, p.difficulty, p.leaky) == ("2", "5", False)
    assert p.guide == "Step 1: [NUMBER] + [NUMBER] = [NUMBER].\nThe answer is [NUMBER]."
    plain, guided = base[1].batch_decode(p.prompts)
    assert plain == smepo.build_prompt(base[1], GOOD["question"])
    assert guided == smepo.build_prompt(base[1], GOOD["question"], p.guide)
    (unguided,) = smepo.load_problems(path, "none", base[1], settings())
    assert unguided.guide == "" and unguided.prompts == [p.prompts[False]] * 2


@pytest.mark.parametrize("answer", ["2001-03-01", "007", 9223372036854775808, 0.10, "½"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_answer_stays_what_it_is(tmp_path, answer, kind):
    path = tmp_path / f"rows.{kind}"
    truth = answer if kind == "jsonl" else str(answer)
    row = GOOD | {"reward_model": {"ground_truth": truth}, "difficulty": 3}
    if kind == "jsonl":
        write_rows(path, [row])
    else:
        datasets.Dataset.from_list([row]).to_parquet(path)
    (p,) = smepo.read_problems(str(path), "semantic", settings())
    assert (p.answer, p.difficulty) == (str(answer), "3")


@pytest.mark.parametrize(
    "bad",
    [
        {"question": None},
        {"teacher_ds": ""},
        {"reward_model": None},
        {"reward_model": {"style": "rule"}},
        {"reward_model": {"ground_truth": " "}},
    ],
)
def test_bad_rows_are_named_by_their_number_and_the_command_that_mends_them(tmp_path, capsys, bad):
    data = write_rows(tmp_path / "bad.jsonl", [GOOD, GOOD | bad, GOOD])
    message = refused(capsys, flags(small(tmp_path, data=data)))
    assert f"{data} row 2 has no" in message and "python -m tiny_tasks.prepare" in message


def test_a_row_needs_a_trace_only_where_the_arm_does(tmp_path, base):
    path = write_rows(tmp_path / "bare.jsonl", [GOOD | {"teacher_ds": None}] * 2)
    config = settings()
    assert len(smepo.load_problems(path, "none", base[1], config)) == 2
    with pytest.raises(UserError, match="row 1 has no"):
        smepo.load_problems(path, "semantic", base[1], config)
    config.expert_coef = 0.1  # its loss is on the traces
    with pytest.raises(UserError, match="row 1 has no"):
        smepo.load_problems(path, "none", base[1], config)
    # but what is held out is never shown one
    assert len(smepo.load_problems(path, "none", base[1], config, "test")) == 2


def test_parquet_and_folders_load_like_jsonl(tmp_path, base):
    lines, config = rows("train", 5), settings()
    jsonl = write_rows(tmp_path / "rows.jsonl", lines)
    expected = smepo.load_problems(jsonl, "semantic", base[1], config)
    parquet = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(lines).to_parquet(parquet)
    assert smepo.load_problems(parquet, "semantic", base[1], config) == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "test.jsonl", lines)
    write_rows(folder / "train.jsonl", rows("train", 9))
    held_out = smepo.load_problems(str(folder), "semantic", base[1], config, "test")
    assert held_out == expected
    assert len(smepo.load_problems(str(folder), "semantic", base[1], config)) == 9


def test_long_prompts_are_left_out_and_counted(tmp_path, capsys, base):
    long = GOOD | {"question": "Compute 1" + " + 1" * 40}
    wordy = GOOD | {"teacher_ds": "\n".join(["Step 1: 1 + 1 = 2."] * 30)}
    path = write_rows(tmp_path / "rows.jsonl", [long, GOOD, wordy])
    config = settings(max_prompt_tokens=70)
    (p,) = smepo.load_problems(path, "full", base[1], config)
    assert p.guide == GOOD["teacher_ds"]
    assert "1 of 3 train prompts fit into --max_prompt_tokens" in capsys.readouterr().out
    assert len(smepo.load_problems(path, "none", base[1], config)) == 2  # without its guide
    config.max_prompt_tokens = len(p.prompts[True])
    assert len(smepo.load_problems(path, "full", base[1], config)) == 1
    config.max_prompt_tokens -= 1
    with pytest.raises(UserError, match="the shortest prompt has"):
        smepo.load_problems(path, "full", base[1], config)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m, t: setattr(t, "eos_token", None), "has no eos_token"),
        (lambda m, t: t.add_tokens(["one", "more"] * 99), "fewer rows than tokens"),
        (lambda m, t: m.model.layers.__delitem__(2), "they would be random"),
    ],
    ids=["eos", "tokens", "weights"],
)
def test_a_model_that_cannot_be_trained_is_refused(tmp_path, capsys, fresh_base, damage, message):
    size = len(fresh_base[0].model.layers)
    damage(*fresh_base)
    path = saved(tmp_path / "model", *fresh_base)
    settings_file = Path(path, "config.json")
    text = json.loads(settings_file.read_text("utf-8")) | {"num_hidden_layers": size}
    settings_file.write_text(json.dumps(text), "utf-8")
    assert message in refused(capsys, flags(small(tmp_path, model=path)))


# ---- Rollouts ------------------------------------------------------------------------------------


def test_completions_end_with_one_eos_and_padding_goes_by_position():
    assert smepo.until_eos([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert smepo.until_eos([5, 9, 2, 0], [2, 9]) == [5, 9]  # several EOS ids: the first counts
    assert smepo.until_eos([5, 6, 7], [2]) == [5, 6, 7]  # truncated
    ids, mask = smepo.pad([[0, 5, 0], [7]], "cpu")  # the pad token is a real one, too
    assert ids.tolist() == [[0, 5, 0], [0, 0, 7]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sample_is_drawn_token_by_token_from_the_model(name, base, monkeypatch):
    """Prompts of unequal lengths: every token is drawn from the softmax of an unpadded forward."""
    model, config = random_model(name, len(base[1])), settings(max_new_tokens=6, temperature=0.7)
    model.generation_config = smepo.GenerationConfig(eos_token_id=[2])
    drawn, multinomial = [], torch.multinomial

    def spy(probabilities, *args, **kwargs):
        drawn.append(probabilities)
        return multinomial(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
    for i, ids in enumerate(smepo.sample(model, prompts, config)):
        logits = model(torch.tensor([prompts[i] + ids])).logits[0, len(prompts[i]) - 1 : -1]
        ours = torch.stack([step[i] for step in drawn[: len(ids)]])
        torch.testing.assert_close(ours, (logits / 0.7).softmax(-1), atol=1e-5, rtol=1e-4)


def test_rollouts_carry_what_was_sampled_and_are_rewarded_in_one_call(base, monkeypatch):
    """One that was cut off has stated no answer, whatever its text."""
    tokenizer, calls, prompts = base[1], [], []
    eos = tokenizer.eos_token_id

    def rewards(texts, truths):
        calls.append((texts, truths))
        return [0.2, 1.0, 0.0, 0.5]

    def sample(model, given, config):
        prompts.extend(given)
        return [[20, eos], [21], [22, eos], [23, 24]]

    domain = Domain(None, None, rewards, solved_from=0.5)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(DOMAIN=domain))
    monkeypatch.setattr(smepo, "sample", sample)
    p, q = problem(base), problem(base, answer="17")
    guided = [True, False, True, False]
    rollouts = smepo.rollout(*base, [p, p, q, q], guided, settings(domain="mine"))
    whole = tokenizer.batch_decode([[20], [22]])
    assert calls == [([whole[0], "", whole[1], ""], ["16", "16", "17", "17"])]
    assert prompts == [p.prompts[1], p.prompts[0], q.prompts[1], q.prompts[0]]
    assert [r.prompt_ids for r in rollouts] == prompts and [r.guided for r in rollouts] == guided
    assert [r.problem for r in rollouts] == [p, p, q, q]
    assert [r.ids for r in rollouts] == [[20, eos], [21], [22, eos], [23, 24]]
    assert [r.sampled for r in rollouts] == [[1, 1], [1], [1, 1], [1, 1]]
    assert [r.text for r in rollouts] == tokenizer.batch_decode([[20], [21], [22], [23, 24]])
    assert [r.ended for r in rollouts] == [True, False, True, False]
    assert [r.reward for r in rollouts] == [0.2, 1.0, 0.0, 0.5]
    assert [r.solved for r in rollouts] == [False, True, False, True]


# ---- When the guide is shown ---------------------------------------------------------------------


def test_a_fraction_is_drawn_by_seed_step_and_question():
    def shown(when: str, seed: int = 0, steps=range(10)) -> list[bool]:
        config = settings(guide_when=when, seed=seed)
        asked = [(Problem(f"question {i}", "", ""), step) for i in range(300) for step in steps]
        return [smepo.shows_guide(p, step, config) for p, step in asked]

    for when in ("0", "0.25", ".5", "1", "1.0"):
        draws = shown(when)
        assert sum(draws) / len(draws) == pytest.approx(float(when), abs=0.03)
    half = shown("0.5")
    assert half == shown("0.5") and half != shown("0.5", seed=1)
    assert half[::10] != half[1::10]  # a question is not always shown its guide
    assert all(shown("always")) and not any(shown("on-failure"))


def test_fading_falls_from_always_to_never_in_the_first_part_of_the_steps():
    config = settings(guide_when="fade", steps=100, fade_until=0.6)
    problems = [Problem(f"question {i}", "") for i in range(1000)]
    for step, chance in ((0, 1.0), (15, 0.75), (30, 0.5), (59, 1 / 60), (60, 0), (100, 0)):
        shown = [smepo.shows_guide(p, step, config) for p in problems]
        assert sum(shown) / 1000 == pytest.approx(chance, abs=0.05 * (0 < chance < 1))


def test_a_schedule_is_asked_once_for_a_group_and_step(base, monkeypatch):
    """So that one which draws without a seed cannot split a group."""
    asked = []
    monkeypatch.setattr(smepo, "shows_guide", lambda p, *_, **__: asked.append(p) or len(asked) % 2)
    problems = [problem(base, question=f"Compute {i} + 1", answer="9") for i in range(4)]
    rollouts = smepo.collect_rollouts(*base, problems, 1, settings(max_new_tokens=2))
    assert asked == problems + problems[1::2]  # the unguided ones, once they have failed
    for group in smepo.chunks(rollouts, 4):
        assert len({(r.guided, tuple(r.prompt_ids)) for r in group}) == 1


def test_on_failure_guides_only_groups_that_all_failed_and_counts_both_passes(base, monkeypatch):
    problems = [problem(base, answer=str(i)) for i in range(4)]
    passes = []

    def rollout(model, tokenizer, problems, guided, config, n):
        passes.append([(p.answer, g) for p, g in zip(problems, guided, strict=True)])
        rows = [(p, g, i) for p, g in zip(problems, guided, strict=True) for i in range(n)]
        # a part of the reward does not make it solved
        parts = [(p, g, 0.2 + 0.8 * (p.answer in "13" and i)) for p, g, i in rows]
        return [Rollout(p, g, [], [2], [1], "", True, r, r == 1) for p, g, r in parts]

    monkeypatch.setattr(smepo, "rollout", rollout)
    config = settings(guide_when="on-failure", group_size=2)
    rollouts = smepo.collect_rollouts(None, None, problems, 1, config)
    assert passes == [[(answer, False) for answer in "0123"], [("0", True), ("2", True)]]
    assert [r.guided for r in rollouts] == [True, True, False, False] * 2
    assert [r.problem.answer for r in rollouts] == list("00112233")


def test_a_new_schedule_is_one_function_of_problem_step_and_config(tmp_path, monkeypatch):
    def fading(problem, step, config, failed=False):
        return step <= config.steps // 2 and problem.difficulty != "none"

    monkeypatch.setattr(smepo, "shows_guide", fading)
    folder = smepo.train(small(tmp_path))
    assert [r["guided"] for r in read_log(folder / "metrics.jsonl")[1:]] == [1, 1, 0, 0]
    guides = [(r["step"], bool(r["guide"])) for r in read_log(folder / "rollouts.jsonl")]
    assert set(guides) == {(1, True), (2, True), (3, False), (4, False)}


# ---- Advantages, log-probs, loss -----------------------------------------------------------------


def test_advantages_by_hand():
    A = smepo.group_advantages([1.0, 0, 0, 0, 1, 1, 0, 0], group_size=4)
    # group 1: mean 1/4, std (n - 1) = 1/2; group 2: mean 1/2, std = 1/sqrt(3)
    expected = [1.5, -0.5, -0.5, -0.5] + [math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2
    torch.testing.assert_close(A, torch.tensor(expected), atol=1e-5, rtol=0)
    A = smepo.group_advantages(torch.tensor([1.0, 0, 0, 0]), group_size=4, scale="none")
    assert A.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_equal_rewards_have_advantage_exactly_zero_however_rounded():
    for value, scale in itertools.product((0.0, 1.0, 0.1, 1 / 3), ("std", "none")):
        assert smepo.group_advantages([value] * 7, 7, scale).tolist() == [0.0] * 7


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10], [8, 9]]  # of unequal lengths, some twice
COMPLETIONS = [[11, 2], [12, 13, 14, 2], [4, 4, 4], [15], [2]]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    return smepo.pad([a + b for a, b in zip(PROMPTS, COMPLETIONS, strict=True)], "cpu")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "lfm2"])
def test_logprobs_under_unequal_left_padding_equal_unpadded_forwards(name, temperature):
    """Rotary and absolute positions alike, a window, rescaled logits: padding shifts nothing."""
    model = random_model(name)
    ours = smepo.token_logprobs(model, *padded(), 4, temperature)
    for row, prompt, ids in zip(ours, PROMPTS, COMPLETIONS, strict=True):
        r = Rollout(None, True, prompt, ids, [], "", True, 0.0, False)
        expected = unpadded_logprobs(model, r, temperature)
        torch.testing.assert_close(row[-len(ids) :], expected, atol=1e-5, rtol=1e-5)


def loss_of(logprobs, old, advantages, mask=None, **options):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.ones_like(logprobs) if mask is None else torch.tensor(mask)
    old, advantages = torch.tensor(old), torch.tensor(advantages)
    loss, stats = smepo.policy_loss(logprobs, old, advantages, mask, **options)
    loss.backward()
    return loss.item(), logprobs.grad, stats["clip_fraction"].item()


@pytest.mark.parametrize(
    "ratio, A, expected, gradient_flows, clipped",
    [
        (1.0, 1.0, -1.0, True, 0),
        (1.0, -1.0, 1.0, True, 0),
        (1.5, 1.0, -1.28, False, 1),  # good action, already likelier by more than clip_high: stop
        (1.5, -1.0, 1.5, True, 0),  # bad action that became likelier: always push back
        (0.5, 1.0, -0.5, True, 0),  # good action that became rarer: always pull back
        (0.5, -1.0, 0.8, False, 1),  # bad action, already rarer by more than clip_low: stop
        (1.2, 1.0, -1.2, True, 0),  # inside the range nothing clips
        (0.9, -2.0, 1.8, True, 0),
    ],
)
def test_clip_cases_for_both_signs(ratio, A, expected, gradient_flows, clipped):
    ends = {"clip_low": 0.2, "clip_high": 0.28}
    loss, gradient, clip_fraction = loss_of([[math.log(ratio)]], [[0.0]], [A], **ends)
    assert loss == pytest.approx(expected, abs=1e-6) and clip_fraction == clipped
    # d/d logprob of -ratio * A
    assert gradient.item() == pytest.approx(-ratio * A * gradient_flows, abs=1e-6)


def test_aggregation_by_hand():
    """Two rows of 1 and 3 tokens, ratio 1, A = 1 and -1: the mean of a row, then of the rows."""
    mask, zeros = [[1, 0, 0], [1, 1, 1]], [[0.0] * 3] * 2
    loss, gradient, _ = loss_of(zeros, zeros, [1.0, -1.0], mask)
    assert loss == pytest.approx((-1 + 1) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]]))


def test_loss_is_zero_but_its_gradient_is_not_at_the_first_update():
    A = smepo.group_advantages([1.0, 0.0], 2).tolist()
    loss, gradient, clip_fraction = loss_of([[-1.0], [-2.0]], [[-1.0], [-2.0]], A)
    assert loss == pytest.approx(0, abs=1e-7) and gradient.abs().min() > 0.1
    assert clip_fraction == 0


def test_padding_gets_no_gradient_even_where_its_logprobs_are_wild():
    new, old = [[0.0, 300.0, -math.inf]], [[0.0, 0.0, -math.inf]]
    loss, gradient, clipped = loss_of(new, old, [1.0], [[1, 0, 0]])
    assert loss == -1.0 and clipped == 0 and gradient.tolist() == [[-1.0, 0.0, 0.0]]


def test_a_rollout_without_a_sampled_token_counts_as_zero():
    loss, gradient, clipped = loss_of([[-1.0], [-1.0]], [[-1.0]] * 2, [1.0, 1.0], [[1], [0]])
    assert loss == -0.5 and clipped == 0 and gradient.tolist() == [[-0.5], [0.0]]


def test_policy_loss_agrees_with_a_loop_written_from_the_paper():
    torch.manual_seed(0)
    new, old, A = torch.randn(5, 7) / 3, torch.randn(5, 7) / 3, torch.randn(5)
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [2], [6]])
    total, clipped = 0.0, 0
    for i in range(5):
        terms = []
        for t in range(int(mask[i].sum())):
            rho = math.exp(new[i, t] - old[i, t])
            terms.append(min(rho * A[i], max(0.8, min(1.28, rho)) * A[i]))
            clipped += bool(terms[-1] < rho * A[i])
        total -= sum(terms) / len(terms) / 5
    loss, stats = smepo.policy_loss(new, old, A, mask, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.as_tensor(total))
    assert stats["clip_fraction"] == pytest.approx(clipped / 20) and clipped > 2


def test_expert_loss_is_the_mean_over_visible_tokens(base):
    """Hidden spans carry none; EOS counts, the prompt does not."""
    model, tokenizer = base
    p = problem(base)
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


# ---- Update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True], ids=["all sampled", "some told"])
def test_update_has_the_gradient_of_the_whole_unskipped_loss(fresh_base, told):
    """Skipping, sorting, splitting and padding together equal one loss over all B*G rows, at the
    temperature of the sampling. What an environment told has no gradient and no place in it."""
    rewards = [1.0, 0, 0, 0], [1.0] * 4, [0.0, 1, 1, 1]
    rollouts = sum((make_group(fresh_base, r, guided=r[0] > 0) for r in rewards), [])
    plain = gradient_of(fresh_base, rollouts, temperature=0.7)
    for r in rollouts if told else []:
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
    assert ((ours - plain).abs().max() > 1e-3) == told


def test_zero_variance_groups_move_nothing_and_cost_no_forward(fresh_base, monkeypatch):
    model, tokenizer = fresh_base
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(smepo, "token_logprobs", lambda *_: pytest.fail("scored a useless group"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    rollouts = make_group(fresh_base, [1.0] * 4) + make_group(fresh_base, [0.0] * 4)
    stats = smepo.update(model, tokenizer, optimizer, rollouts, settings())
    assert stats == {"loss": 0, "grad_norm": 0, "clip_fraction": 0, "entropy": 0}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_logged_loss_is_that_of_the_mini_batch(fresh_base):
    """However it was split: weighted by share, 0 at the first update."""
    model, tokenizer = fresh_base
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0]) + make_group(fresh_base, [0.0, 1, 1, 1])
    for size in (1, 3, 100):
        config = settings(micro_batch=size)
        stats = smepo.update(model, tokenizer, optimizer, rollouts, config)
        assert stats["loss"] == pytest.approx(0, abs=1e-6) and stats["grad_norm"] > 0.01


def test_ratio_is_exactly_one_at_the_first_update_only(fresh_base, monkeypatch):
    model, tokenizer = fresh_base
    seen, policy_loss = [], smepo.policy_loss

    def spy(logprobs, old, A, mask, *rest):
        seen.append(((logprobs - old) * mask).abs().max().item())
        return policy_loss(logprobs, old, A, mask, *rest)

    monkeypatch.setattr(smepo, "policy_loss", spy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rollouts = sum([make_group(fresh_base, [1.0, 0, 0, 0]) for _ in range(4)], [])
    smepo.update(model, tokenizer, optimizer, rollouts, settings())  # one update a batch
    assert seen == [0.0]
    stats = smepo.update(model, tokenizer, optimizer, rollouts, settings(mini_batches=4))
    assert len(seen) == 5 and seen[1] == 0.0 and min(seen[2:]) > 1e-4
    assert stats["clip_fraction"] > 0  # and so clipping can be seen to act


def test_each_mini_batch_takes_one_clipped_step_with_fresh_gradients(fresh_base):
    model, tokenizer = fresh_base
    rollouts = sum([make_group(fresh_base, r) for r in ([1.0, 0, 0, 0], [0.0, 0, 0, 1])], [])
    config = settings(mini_batches=2, grad_clip=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norms, step = [], optimizer.step

    def spy():
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        step()

    optimizer.step = spy
    stats = smepo.update(model, tokenizer, optimizer, rollouts, config)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3) and stats["grad_norm"] > 0.1
    assert all(p.grad is None for p in model.parameters())  # nothing is carried over


def test_only_sampled_tokens_carry_gradient(fresh_base, monkeypatch):
    """The states of prompt, guide and padding get no gradient; those of sampled tokens all do."""
    model, _ = fresh_base
    captured, forward = [], model.base_model.forward

    def spy(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state.retain_grad()
        captured.append(output.last_hidden_state)
        return output

    monkeypatch.setattr(model.base_model, "forward", spy)
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0])
    gradient_of(fresh_base, rollouts)
    (states,) = captured
    lengths = torch.tensor(sorted((len(r.ids) for r in rollouts), reverse=True))
    T = lengths.max()
    touched = states.grad.abs().sum(-1) > 0  # a state is of the token that it predicts
    assert torch.equal(touched[:, -T - 1 : -1], torch.arange(T) >= T - lengths[:, None])
    assert not touched[:, : -T - 1].any() and not touched[:, -1].any()


def test_entropy_and_clip_statistics_leave_out_what_was_told(fresh_base):
    model, tokenizer = fresh_base
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0])
    expected = -sum(unpadded_logprobs(model, r)[-1].item() for r in rollouts) / 4
    for r in rollouts:
        r.sampled[:-1] = [0] * (len(r.ids) - 1)  # the EOS alone was sampled
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = smepo.update(model, tokenizer, optimizer, rollouts, settings())
    assert stats["entropy"] == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_not_finite_never_reaches_the_weights(fresh_base, monkeypatch):
    model, tokenizer = fresh_base
    before, stats = [p.clone() for p in model.parameters()], {"clip_fraction": torch.tensor(0.0)}
    monkeypatch.setattr(smepo, "policy_loss", lambda new, *_: (new.sum() * math.inf, stats))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0])
    with pytest.raises(RuntimeError, match="non-finite"):
        smepo.update(model, tokenizer, optimizer, rollouts, settings())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_metrics_of_a_step_by_hand(base, monkeypatch):
    p = problem(base)
    leaky = dataclasses.replace(p, leaky=True)

    def group(of, guided, sampled, rewards, ended=(True,) * 4):
        parts = zip(rewards, ended, strict=True)
        return [Rollout(of, guided, [], [], sampled, "", end, r, r == 1) for r, end in parts]

    rollouts = [
        *group(p, True, [1] * 2, [0.2] * 4),  # paid in part, not solved
        *group(leaky, True, [1] * 4, [1.0] * 4),
        # seven tokens, of which six were sampled
        *group(p, False, [1, 1, 0, 1, 1, 1, 1], [1.0, 0.0] * 2, [True, False] * 2),
        *group(p, False, [1] * 4, [0.0] * 4),
    ]
    monkeypatch.setattr(smepo, "collect_rollouts", lambda *_: rollouts)
    monkeypatch.setattr(smepo, "update", lambda *_: {"loss": 0.5})
    returned, metrics = smepo.train_step(*base, None, [p], 7, settings())
    expected = {"step": 7, "reward": 6.8 / 16, "completion_length": 4.0, "truncated": 2 / 16}
    expected |= {"zero_variance_wrong": 0.5, "zero_variance_right": 0.25, "guided": 0.5}
    expected |= {"leak_rate": 0.5, "loss": 0.5}
    assert returned is rollouts and {k: metrics[k] for k in expected} == pytest.approx(expected)
    assert set(metrics) - set(expected) == {"seconds_processor"}


# ---- Evaluation ----------------------------------------------------------------------------------


def test_evaluation_by_hand_and_unguided_by_construction(base, monkeypatch):
    p = dataclasses.replace(problem(base), difficulty="2")
    q = dataclasses.replace(p, difficulty="5")
    solved = [1, 1, 0, 1, 0, 0, 0, 1]

    def rollout(model, tokenizer, problems, guided, config, n):
        assert problems == [p, p, q, q] and guided == [False] * 4 and n == 2
        pairs = zip([p, p, p, p, q, q, q, q], solved, strict=True)
        return [Rollout(x, False, [], [], [], "", True, 0.5, s) for x, s in pairs]

    monkeypatch.setattr(smepo, "rollout", rollout)
    table = smepo.evaluate(None, None, [p, p, q, q], settings(eval_samples=2))
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
    names = {path.name for path in folder.iterdir()}
    assert names == {*FILES, "curve.png"}
    assert folder.name == "math-semantic-always-seed0"
    before, *steps = read_log(folder / "metrics.jsonl")
    assert before["step"] == 0 and [step["step"] for step in steps] == [1, 2, 3, 4]
    assert ["pass@1" in step for step in (before, *steps)] == [True, False, True, False, True]
    mean, error = steps[-1]["pass@1"]["mean"]
    assert f"{mean:.3f} ± {error:.3f}    {mean - before['pass@1']['mean'][0]:+.3f}" in shown
    promised = {"reward", "zero_variance_wrong", "zero_variance_right", "completion_length"}
    promised |= {"truncated", "entropy", "clip_fraction", "grad_norm", "loss"}
    assert all(promised <= set(step) for step in steps)
    assert all(step["guided"] == 1 and step["leak_rate"] == 0 for step in steps)
    rollouts = read_log(folder / "rollouts.jsonl")
    assert len(rollouts) == 4 * 4 * 4
    for step in steps:
        rewards = [r["reward"] for r in rollouts if r["step"] == step["step"]]
        assert sum(rewards) / 16 == pytest.approx(step["reward"])
    smepo.train(dataclasses.replace(config, out="runs/again"))
    assert_same_run(folder, Path("runs/again"))
    smepo.train(dataclasses.replace(config, out="runs/other", seed=1))
    assert read_log("runs/other/metrics.jsonl") != [before, *steps]


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "lfm2"])
def test_other_architectures_train_and_their_checkpoints_load(tmp_path, base, name):
    model = saved(tmp_path / name, random_model(name, len(base[1])), base[1])
    config = small(tmp_path, model=model, expert_coef=0.1, learning_rate=1e-2, steps=2)
    folder = smepo.train(dataclasses.replace(config, mini_batches=2, max_new_tokens=8))
    trained = smepo.load_model(folder / "checkpoint", config)[0]
    pairs = zip(trained.parameters(), smepo.load_model(model, config)[0].parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in pairs)
    state = torch.load(folder / "checkpoint" / "training.pt", weights_only=True)
    assert all(torch.equal(v, state["model"][k]) for k, v in trained.state_dict().items())


FILES = {"config.json", "metrics.jsonl", "rollouts.jsonl", "checkpoint"}
RESUMED = {"eval_every": 1, "mini_batches": 2, "guide_when": "on-failure", "steps": 3}
RESUMED |= {"max_new_tokens": 32, "eval_samples": 1}


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
    names = {path.name for path in Path("killed").iterdir()}  # nothing half-written is left
    assert names == FILES
    assert not list(Path("killed/checkpoint").glob("*.new"))


def test_ctrl_c_names_the_command_to_go_on_with(whole, monkeypatch, capsys):
    def pressed(*args):
        if args[4] == after + 1:
            raise KeyboardInterrupt  # as Python does at Ctrl-C
        return train_step(*args)

    train_step = smepo.train_step
    for after in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(smepo, "train_step", pressed)
            assert smepo.main(flags(whole[1]) + ["--out", f"mine{after}"]) == 130
        assert f"python smepo.py --resume mine{after}\n" in capsys.readouterr().out
        assert smepo.main(["--resume", f"mine{after}"]) == 0
        assert_same_run(whole[0], Path(f"mine{after}"))


def test_resume_of_a_longer_run_and_of_a_finished_one(whole):
    folder = smepo.train(dataclasses.replace(whole[1], out="longer", steps=2))
    write_rows(folder / "notes.jsonl", [GOOD])  # of somebody else
    before = (folder / "notes.jsonl").read_bytes()
    for _ in range(2):  # the second has nothing left to do
        assert smepo.main(["--resume", "longer", "--steps", "3"]) == 0
        assert_same_run(whole[0], folder)
    assert (folder / "notes.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_other_data_and_no_run(whole, capsys):
    shutil.copytree(whole[0], "mine")
    message = refused(capsys, ["--resume", "mine", "--learning_rate", "0.5"])
    assert message == "smepo.py: --resume mine: it was started with other {'learning_rate'}"
    assert "nowhere/config.json" in refused(capsys, ["--resume", "nowhere"])
    data = Path(whole[1].data)
    before = data.read_bytes()
    data.write_bytes(before.replace(b"Compute", b"Calculate", 1))
    assert "the data have changed" in refused(capsys, ["--resume", "mine"])
    data.write_bytes(before)


def test_the_paths_of_a_task_are_not_written_so_a_clone_can_move(tmp_path):
    config = settings(out="mine", steps=1)
    smepo.open_run(config)
    written = json.loads(Path("mine/config.json").read_text("utf-8"))
    assert (written["model"], written["data"], written["test_data"]) == ("", "", "")
    assert smepo.parse(["--resume", "mine"]) == dataclasses.replace(config, resume="mine")


def test_a_log_that_is_torn_or_too_long_is_written_again(whole):
    shutil.copytree(whole[0], "torn")
    state = torch.load("torn/checkpoint/training.pt", weights_only=True)
    torch.save(state | {"step": 2}, "torn/checkpoint/training.pt")
    with open("torn/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "rew')
    smepo.restore(Path("torn"), *fresh_parts(whole[1]), state["data"])
    assert [record["step"] for record in read_log("torn/metrics.jsonl")] == [0, 1, 2]
    assert b"\0" not in Path("torn/metrics.jsonl").read_bytes()


def fresh_parts(config):
    model, _ = smepo.load_model(config.model, config)
    return model, torch.optim.AdamW(model.parameters())


def test_a_run_folder_is_never_overwritten(tmp_path, capsys):
    config = small(tmp_path, steps=1, out="mine")
    folder = smepo.train(config)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "File exists: 'mine'" in refused(capsys, flags(config))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_runs_without_a_name_say_what_they_are_and_are_counted():
    names = [smepo.open_run(Config(guide_when="fade", seed=7)).name for _ in range(3)]
    assert names == [f"math-semantic-fade-seed7{end}" for end in ("", "-2", "-3")]
    assert smepo.open_run(Config(guide="none")).name == "math-none-always-seed0"


def test_a_run_without_matplotlib_still_ends_with_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "tiny_tasks.plots", raising=False)
    monkeypatch.delattr("tiny_tasks.plots", raising=False)
    assert smepo.main(flags(small(tmp_path, steps=1, out="mine"))) == 0
    assert "difficulty mean" in capsys.readouterr().out
    assert not Path("mine/curve.png").exists()


# ---- The file alone, and the plain command -------------------------------------------------------


def test_copied_alone_it_trains_evaluates_saves_and_resumes(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(ROOT / "smepo.py", folder)
    bare = subprocess.run([sys.executable, "smepo.py"], cwd=folder, capture_output=True, text=True)
    assert bare.returncode == 2 and "tiny_tasks/arithmetic/base" in bare.stderr
    config = small(tmp_path, model=str(TASKS / "arithmetic/base"), domain="math", eval_every=1)
    arguments = flags(dataclasses.replace(config, mini_batches=2, max_new_tokens=32))
    shown = run(["smepo.py", *arguments, "--out", "parts", "--steps", "2"], folder)
    assert "difficulty mean" in shown and "step 2 " in shown
    script = f"""if True:
        import smepo
        assert smepo.main(["--resume", "parts", "--steps", "4"]) == 0
        assert smepo.main({arguments!r} + ["--out", "whole"]) == 0"""
    shown = run(["-c", script], folder)
    assert shown.count("difficulty mean") == 2 and shown.count("step 4 ") == 2
    assert_same_run(folder / "parts", folder / "whole")


# ---- Math: the verifier --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, truth, expected",
    [
        ("The answer is 16.", "16", 1.0),
        ("The answer is 16.", "6", 0.0),
        ("The answer is 1,234.", "1234", 1.0),
        ("The answer is 12,34.", "1234", 0.0),
        (r"so \boxed{-3}", "\u22123", 1.0),
        ("#### 74", "74", 1.0),
        ("<answer> 74 </answer>", "74", 1.0),
        ("<answer>\n74\n</answer>", "74", 1.0),
        ("The answer is 17. No, wait: the answer is 16.", "16", 1.0),
        ("Step 1: 2 + 2 = 16.", "16", 0.0),  # a number in passing is no answer
        ("", "", 0.0),
        (r"\boxed{}", "", 0.0),
        ("#### $", "$", 0.0),  # nothing is left of it
        (r"\boxed{\frac14}", "0.25", 1.0),
        (r"\boxed{\frac { 1 } { 2 }}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{23}}", r"\frac{12}{3}", 0.0),
        (r"\boxed{1/0}", "0", 0.0),
        ("The answer is .5.", "5", 0.0),
        ("#### 50%", r"50\%", 1.0),
        (r"\boxed{50\%}", "0.5", 0.0),
        ("The answer is 3 4.", "34", 0.0),
        ("The answer is 1e999999999.", "42", 0.0),
        (f"The answer is {'9' * 5000}.", "42", 0.0),
        ("The answer is $5.", "5", 1.0),
        ("The answer is 5 dollars.", "5", 0.0),  # units are math_verify's
        ("#### 5 < x", "5", 0.0),
        ("<answer>x < 5</answer>", "x<5", 1.0),
        (r"The answer is \boxed{\text{(B)}}.", "B", 1.0),
        ("The answer is b.", "(B)", 1.0),
        ("The answer is (B) 5 metres.", "B", 1.0),
        ("The answer is (A) or (B).", "(B)", 0.0),
        ("The answer is C or D", "C", 0.0),
        (r"\boxed{x^2 + 6x+11}", "x^2+6x+11", 1.0),
        (r"\boxed{(2, 5)}", "[2,5)", 0.0),
        (r"\boxed{\frac{a}{bc}}", r"\frac{ab}{c}", 0.0),
        (r"\boxed{1} #### 16", "1", 1.0),  # a box comes first, whatever follows
        (r"\boxed{16", "16", 0.0),
        (r"<answer>\boxed{5}</answer>", "5", 1.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        (r"\boxed 7 is it", "7", 1.0),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "5", 1.0),
        ("The answer is:\n\\[\n5\n\\]", "5", 1.0),
        ("**Answer**: `13`", "13", 1.0),
        (r"\boxed{2\frac{1}{2}}", "21/2", 0.0),
        (r"\boxed{2*5}", "25", 0.0),
        ("The answer is A, B.", "A", 0.0),
        ("The answer is (A) or (B).", "A", 0.0),
        ("<answer>2001-03-01</answer>", "2001-03-01", 1.0),
    ],
)
def test_reward(completion, truth, expected):
    assert smepo.reward(completion, truth, "math") == expected


# ---- Math: what is hidden ------------------------------------------------------------------------


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
        ("Cases 1, 2 and 3 give 9", "Cases 1, 2 and 3 give [NUMBER]"),
        ("in the worst case 17 draws", "in the worst case [NUMBER] draws"),
        ("1. Let x_1 be 4.", "1. Let x_1 be [NUMBER]."),
        ("it is\n72.\nDone.", "it is\n[NUMBER].\nDone."),
        ("a_{n+1} = a_n + 2, x₁ = 3", "a_{n+1} = a_n + [NUMBER], x₁ = [NUMBER]"),
        (r"\log_2 8 \tag{2}", r"\log_[NUMBER] [NUMBER] \tag{2}"),
        ("n(n-3)/2", "n(n-[NUMBER])/[NUMBER]"),
        ("12,480 or 15{,}600 or \u221217", "[NUMBER] or [NUMBER] or [NUMBER]"),
        ("½ of 2⁵ is -3.5%, the 21st", "[NUMBER] of [NUMBER][NUMBER] is [NUMBER], the [NUMBER]"),
        ("<<18*7=126>>126", "<<[NUMBER]*[NUMBER]=[NUMBER]>>[NUMBER]"),
        ("forty-two, one can check", "[NUMBER], one can check"),
        (r"the angle is \pi. \boxed{\pi}", r"the angle is [ANSWER]. \boxed{[ANSWER]}"),
        (r"\boxed{42} or \boxed{x+1}", r"\boxed{[NUMBER]} or \boxed{[ANSWER]}"),
        (r"is $\sqrt{3}$. #### \sqrt{3}", "is $[ANSWER]$. #### [ANSWER]"),
        ("on Thursday. The answer is Thursday.", "on [ANSWER]. The answer is [ANSWER]."),
        (
            "Choice B is right, A and C are not. #### B",
            "Choice [ANSWER] is right, [ANSWER] and [ANSWER] are not. #### [ANSWER]",
        ),
        ("A side a of f(A) = A_1. #### A", "A side a of f([ANSWER]) = A_1. #### [ANSWER]"),
        (r"\boxed{[NUMBER]}", r"\boxed{[NUMBER]}"),
        ("", ""),
    ],
)
def test_mask(text, masked):
    assert smepo.mask_trace(text, "math") == masked
    assert smepo.mask_trace(masked, "math") == masked


def test_an_answer_is_not_looked_for_inside_a_mask():
    assert smepo.mask_trace("[NUMBER] is a number", "math", "number") == "[NUMBER] is a [ANSWER]"


# ---- Math: can the answer still be read off? -----------------------------------------------------


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
        (r"it is \sqrt{3}", r"\sqrt 3", True),
        ("it is THURSDAY", r"\text{Thursday}", True),
        ("so the answer is no.", "no", True),
        ("Step 42: it is [NUMBER]", "42", False),
        ("Case 2. By Theorem 4.2 and Lemma 2", "2", False),
        ("1. Let x_1 be\n(2) the sum", "2", False),
        ("so it is 43 of 421", "42", False),
        ("[NUMBER] [ANSWER]", "7", False),
        ("the [ANSWER] to the number", "number", True),
        ("a point B_1 of f(B)", "B", True),
        ("an eastern wind", "east", False),
        ("", "42", False),
    ],
)
def test_leaks(text, answer, leaky):
    assert smepo.leaks(text, answer, "math") is leaky
