"""The executable specification of smepo.py: every equation, pitfall and promise has a test here.

Run `python -m pytest`; it needs no network, no GPU, and under two minutes on two cores. What the
tests share is in tiny_tasks/fixtures.py; code, search and the commands are tested in their rooms.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
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
    with pytest.raises(SystemExit) as stop:
        smepo.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for setting in dataclasses.fields(Config):
        assert f"--{setting.name} " in shown
        assert len(setting.metadata["help"]) > 10 and setting.metadata["help"] in shown


def test_bounds_go_by_the_setting_and_not_by_what_is_given():
    assert Config(clip_low=0, expert_coef=0, prefix_ratio=1).clip_low == 0
    with pytest.raises(UserError, match="--steps 0"):
        Config(steps=0)


def test_flags_reach_the_config():
    config = settings(columns=["question=a", "trace=b"], guide="random", clip_low=0.1, name="x")
    assert smepo.parse(flags(config)) == config
    assert smepo.parse([]) == Config()


def test_flags_of_a_resumed_run_are_checked_beside_its_own_settings():
    config = settings(prompts_per_step=12, name="mine")
    Path("runs/mine").mkdir(parents=True)
    text = json.dumps(dataclasses.asdict(config))
    Path("runs/mine/config.json").write_text(text, encoding="utf-8")
    expected = dataclasses.replace(config, mini_batches=3, resume=True)  # of 16, 3 is no divisor
    assert smepo.parse(["--resume", "--mini_batches", "3"]) == expected
    for broken in ('{"steps": 3', '{"epochs": 3}', "[]"):
        Path("runs/mine/config.json").write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match="cannot read runs.mine.config.json"):
            smepo.parse(["--resume"])
        with pytest.raises(UserError, match="cannot read runs.mine.config.json"):
            smepo.open_run(Config(name="mine"))


@pytest.mark.parametrize(
    "flag",
    "steps 0|steps many|guide half|group_size 1|guide_when sometimes|guide_when 1.5|temperature 0"
    "|mini_batches 3|seed -1|seed 100000000000000000|prefix_ratio nan|prefix_ratio 2|clip_low 2"
    "|clip_low -3|learning_rate -1|learning_rate nan|learning_rate inf|name ../elsewhere"
    "|device warp|device None|model no/such/folder|data none.jsonl|domain nowhere|eval 5"
    "|max_prompt_tokens 10|columns question|columns color=red|columns color=question"
    "|nonsense 1".split("|"),
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, capsys, flag):
    name, value = flag.split()
    message = refused(capsys, flags(small(tmp_path)) + [f"--{name}", value])
    assert (value if name in ("data", "device") else f"--{name}") in message
    assert not Path("runs").exists()


def test_a_refusal_says_what_would_do(tmp_path, capsys):
    for flag, rule in {
        "--steps 0": "--steps 0: it must be from 1 to 2147483648",
        "--prefix_ratio 2": "--prefix_ratio 2.0: it must be from 0 to 1",
        "--mini_batches 3": "--mini_batches 3: it must be a divisor of --prompts_per_step",
        "--guide_when 2": "--guide_when 2: it must be always, on-failure or a fraction from 0 to 1",
        "--resume": "--resume: no run is in runs/ yet",
    }.items():
        assert refused(capsys, flag.split()) == f"smepo.py: {rule}"


def test_the_rest_comes_from_the_toy_beside_smepo_wherever_it_is_called_from():
    for task, room in smepo.TOYS.items():
        config = Config(task=task)
        paths = [Path(path) for path in (config.model, config.data, config.test_data)]
        assert paths == [TASKS / room / name for name in ("base", "train.jsonl", "test.jsonl")]
        assert all(path.exists() for path in paths)
        assert config.domain == {"arithmetic": "math"}.get(task, task) and config.system == ""
    assert "boxed" in Config(domain="math").system
    assert Config(domain="math", system="").system == ""


# ---- The guide: what the policy is shown of a trace ----------------------------------------------

PIECE = re.compile(r"\d+|[^\W\d]+|[^\w\s]")  # a number, a word or a sign


def test_spans_that_overlap_or_touch_become_one(monkeypatch):
    spans = [(9, 12, "[C]"), (3, 6, "[B]"), (0, 4, "[A]"), (4, 5, "[X]"), (6, 7, "[Y]")]
    domain = Domain("", spans=lambda trace, answer: spans, leaks=None, rewards=None)
    monkeypatch.setitem(smepo.DOMAINS, "mine", domain)
    assert smepo.hidden_spans("0123456789abcdef", "mine") == [(0, 7, "[A]"), (9, 12, "[C]")]
    assert smepo.mask_trace("0123456789abcdef", "mine") == "[A]78[C]cdef"


def test_random_mask_hides_as_many_spans_as_long_and_depends_on_the_seed():
    semantic = smepo.hidden_spans(TRACE, "math")
    chosen = [smepo.random_spans(TRACE, semantic, str(seed)) for seed in range(300)]
    for spans in chosen:
        assert [len(PIECE.findall(TRACE[a:b])) for a, b, _ in spans] == [1] * len(semantic)
        assert all(b <= c for (_, b, _), (c, _, _) in itertools.pairwise(spans))  # no overlap
    pieces = {match.start() for match in PIECE.finditer(TRACE)}
    assert {start for spans in chosen for start, _, _ in spans} == pieces  # anywhere
    assert chosen[0] != chosen[1]
    assert chosen[0] == smepo.random_spans(TRACE, semantic, "0")


def test_random_mask_keeps_long_spans_whole():
    text = "one two three four five six seven eight"
    for seed in range(50):
        chosen = smepo.random_spans(text, [(0, 13, "[X]"), (14, 18, "[Y]")], str(seed))
        lengths = {mask: len(text[a:b].split()) for a, b, mask in chosen}
        assert lengths == {"[X]": 3, "[Y]": 1} and chosen[0][1] <= chosen[1][0]
        masked = smepo.guide_trace("1a2b3", "random", "math", seed=str(seed))
        assert masked.count("[NUMBER]") == 3  # what touches is apart
        masked = smepo.guide_trace("北京和北京", "random", "math", "北京", seed=str(seed))
        assert masked == "[ANSWER]"  # one piece only


def test_guide_arms():
    assert smepo.guide_trace(TRACE, "none", "math") == ""
    assert smepo.guide_trace(TRACE, "full", "math") == TRACE
    masked = smepo.guide_trace(TRACE, "semantic", "math", "16")
    assert masked.startswith("Step 1: [NUMBER] * [NUMBER] = [NUMBER].\nStep 2: [NUMBER] -")
    assert masked == smepo.mask_trace(TRACE, "math", "16") == smepo.mask_trace(TRACE, "math")
    assert smepo.leaks(TRACE, "16", "math") and not smepo.leaks(masked, "16", "math")
    for ratio in (0.0, 0.3, 0.5, 0.9):
        prefix = smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=ratio)
        assert TRACE.startswith(prefix) and len(prefix) <= ratio * len(TRACE)
        assert prefix == "" or TRACE[len(prefix)] == "\n"  # whole lines only
    assert smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=1.0) == TRACE
    half = smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=0.5)
    assert half == "Step 1: 3 * 5 = 15.\nStep 2: 7 - 6 = 1."


def test_a_new_domain_is_one_module(tmp_path, base, monkeypatch):
    def check(truth):
        if not truth.islower():
            raise ValueError("it must be in lower case")

    colors = Domain(
        system="Say a color.",
        spans=lambda trace, _: [(*m.span(), "[COLOR]") for m in re.finditer("red|blue", trace)],
        leaks=lambda masked, answer: answer in masked,
        rewards=lambda texts, truths: [float(b in a) for a, b in zip(texts, truths, strict=True)],
        check=check,
    )
    monkeypatch.setitem(sys.modules, "my.colors", SimpleNamespace(DOMAIN=colors))
    monkeypatch.setattr(smepo, "DOMAINS", dict(smepo.DOMAINS))
    row = {"question": "Compute what?", "trace": "It is red, not blue.", "answer": "red"}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    config = settings(domain="my.colors", data=path)
    assert config.system == "Say a color."
    (p,) = smepo.load_problems(path, "semantic", base[1], config)
    assert p.guide == "It is [COLOR], not [COLOR]." and not p.leaky
    assert smepo.reward("a red one", "red", "my.colors") == 1.0
    assert smepo.load_problems(path, "full", base[1], config)[0].leaky
    path = write_rows(tmp_path / "rows.jsonl", [row, row | {"answer": "RED"}])
    with pytest.raises(UserError, match="row 2: it must be in lower case"):
        smepo.load_problems(path, "semantic", base[1], config)


# ---- Data and prompts ----------------------------------------------------------------------------


def test_prompt_is_question_then_guide_as_a_finished_turn_then_an_open_turn(base):
    tokenizer, question = base[1], "Compute 7 - 6"
    assert smepo.build_prompt(tokenizer, question) == f"<|user|>{question}<|end|><|assistant|>"
    assert smepo.build_prompt(tokenizer, question, "Step 1: [NUMBER].", "Be brief.") == (
        f"<|system|>Be brief.<|end|><|user|>{question}<|end|>"
        "<|assistant|>Here is an example solution:\nStep 1: [NUMBER].<|end|><|assistant|>"
    )


def test_problems_carry_their_prompts_as_the_template_writes_them(tmp_path, base):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD | {"difficulty": 5}])
    (p,) = smepo.load_problems(path, "semantic", base[1], settings(data=path))
    assert (p.answer, p.difficulty, p.leaky) == ("2", "5", False)
    assert p.guide == "Step 1: [NUMBER] + [NUMBER] = [NUMBER].\nThe answer is [NUMBER]."
    plain, guided = base[1].batch_decode([p.question_ids, p.guided_ids])
    assert plain == smepo.build_prompt(base[1], GOOD["question"])
    assert guided == smepo.build_prompt(base[1], GOOD["question"], p.guide)
    (unguided,) = smepo.load_problems(path, "none", base[1], settings(data=path))
    assert unguided.guide == "" and unguided.guided_ids == unguided.question_ids == p.question_ids


GSM8K = {"question": "Two and 70?", "answer": "Add: 2 + 70 = <<2+70=72>>72.\n#### 72"}
MATH = {"problem": "Halve 1.", "level": "Level 1", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
OFFICIAL = {
    "data_source": "x",
    "prompt": [{"role": "user", "content": "Not this."}],
    "reward_model": {"style": "rule", "ground_truth": "7"},
    "extra_info": {"question": "Six and one?", "teacher_ds": "6 + 1 = 7", "index": 3},
}
TRL = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
    "solution": "It is 2.",
    "ground_truth": "2",
}
UNLIKE = [GOOD, GOOD | {"reward_model": {"ground_truth": "3", "index": 1}}]
PARTS = [{"role": "user", "content": ["Be brief.", {"type": "text", "text": "1 + 1?"}]}]
TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}


@pytest.mark.parametrize(
    "row, columns, expected",
    [
        (GOOD, "", (GOOD["question"], GOOD["teacher_ds"], "2")),
        (OFFICIAL, "", ("Six and one?", "6 + 1 = 7", "7")),
        (GSM8K, "", ("Two and 70?", GSM8K["answer"], "72")),
        (MATH, "", ("Halve 1.", MATH["solution"], r"\frac{1}{2}")),
        (MATH | {"answer": "0.5"}, "", ("Halve 1.", MATH["solution"], "0.5")),
        (TRL, "", ("Be brief.\n\n1 + 1?", "It is 2.", "2")),
        (
            {"problem": "No.", "q": "1 + 1?", "why": "It is 2.", "solution": "No.", "n": 2},
            "question=q trace=why answer=n",
            ("1 + 1?", "It is 2.", "2"),
        ),
        (MATH | {"answer": "0.5", "long": "So."}, "trace=long", ("Halve 1.", "So.", "0.5")),
        (GOOD | {"reward_model": {"ground_truth": 0}}, "", (*list(GOOD.values())[:2], "0")),
        (
            {"question": PARTS, "trace": ["It is 2.", "So 2."], "answer": ["3"]},
            "",
            ("Be brief.\n\n1 + 1?", "It is 2.\n\nSo 2.", "3"),
        ),
        (GOOD | {"reward_model": {"ground_truth": TESTS}}, "", (*list(GOOD.values())[:2], TESTS)),
    ],
    ids="toy official GSM8K MATH OpenR1 TRL mine one-of-mine zero lists tests".split(),
)
def test_columns_of_the_usual_data_sets_are_found(tmp_path, capsys, row, columns, expected):
    path = write_rows(tmp_path / "rows.jsonl", [row] * 2)
    config = settings(data=path, columns=columns.split())
    for p in smepo.read_problems(path, "semantic", config):
        answer = p.answer if isinstance(expected[2], str) else json.loads(p.answer)
        assert (p.question, p.trace, answer) == expected
        assert p.difficulty == "all"
    assert capsys.readouterr().out.startswith(f"{path}: question: ")


def test_a_column_that_is_not_there_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [GSM8K])
    config = settings(data=path, columns=["answer=anser", "trace=why"])
    with pytest.raises(UserError, match="answer=anser: it must be .* one of question, answer"):
        smepo.read_problems(path, "semantic", config)
    config.columns = ["trace=why"]  # held-out problems need none
    assert smepo.read_problems(path, "none", config)[0].trace == ""


def test_rows_may_differ_in_what_is_nested(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", UNLIKE)
    answers = [p.answer for p in smepo.read_problems(path, "semantic", settings(data=path))]
    assert answers == ["2", "3"]  # not what the trace states


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"question": None}, "row 2 has no question"),
        ({"teacher_ds": " "}, "row 2 has no trace"),
        ({"teacher_ds": "No.", "reward_model": None}, "row 2 has no answer"),
        ({"teacher_ds": "No.", "reward_model": {"style": "rule"}}, "row 2 has no answer"),
        ({"reward_model": {"style": "rule", "ground_truth": " "}}, "row 2 has no answer"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path, capsys, bad, message):
    data = write_rows(tmp_path / "bad.jsonl", [GOOD, GOOD | bad, GOOD])
    assert f"bad.jsonl {message}" in refused(capsys, flags(small(tmp_path, data=data)))


def test_a_row_needs_a_trace_only_where_the_arm_does(tmp_path, base):
    path = write_rows(tmp_path / "bare.jsonl", [GOOD | {"teacher_ds": None}] * 2)
    config = settings(data=path)
    assert len(smepo.load_problems(path, "none", base[1], config)) == 2
    with pytest.raises(UserError, match="no trace"):
        smepo.load_problems(path, "semantic", base[1], config)
    config.expert_coef = 0.1  # its loss is on the traces
    with pytest.raises(UserError, match="no trace"):
        smepo.load_problems(path, "none", base[1], config)
    # but what is held out is never shown one
    assert len(smepo.load_problems(path, "none", base[1], config, "test")) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"not json\n", b'{"question": \n', '{"question": "café"}'.encode("latin-1")],
    ids=["empty", "blank", "words", "torn", "latin-1"],
)
def test_unreadable_data_is_refused(tmp_path, capsys, monkeypatch, content):
    for handler in logging.getLogger("datasets").handlers:
        monkeypatch.setattr(handler, "stream", sys.stderr)  # else pytest would not see it
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    message = refused(capsys, flags(small(tmp_path, data=str(path))))
    assert "bad.jsonl has no rows" in message and "StopIteration" not in message


def test_parquet_and_folders_load_like_jsonl(tmp_path, base):
    lines, config = rows("train", 5), settings()
    jsonl = write_rows(tmp_path / "rows.jsonl", lines)
    expected = smepo.load_problems(jsonl, "semantic", base[1], config)
    parquet = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(lines).to_parquet(parquet)
    assert smepo.load_problems(parquet, "semantic", base[1], config) == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "test.jsonl", lines)  # it may have one split,
    held_out = {"guide": "semantic", "tokenizer": base[1], "config": config, "split": "test"}
    assert smepo.load_problems(str(folder), **held_out) == expected
    write_rows(folder / "train.jsonl", rows("train", 9))  # or both
    assert smepo.load_problems(str(folder), **held_out) == expected
    assert len(smepo.load_problems(str(folder), "semantic", base[1], config)) == 9
    (folder / "test.jsonl").rename(folder / "validation.jsonl")  # the next best
    assert smepo.load_problems(str(folder), **held_out) == expected


def test_long_prompts_are_left_out_and_counted(tmp_path, capsys, base):
    long = GOOD | {"question": "Compute 1" + " + 1" * 40}
    wordy = GOOD | {"teacher_ds": "\n".join(["Step 1: 1 + 1 = 2."] * 30)}
    path = write_rows(tmp_path / "rows.jsonl", [long, GOOD, wordy])
    config = settings(max_prompt_tokens=70)
    (p,) = smepo.load_problems(path, "full", base[1], config)
    assert p.guide == GOOD["teacher_ds"]
    assert f"{path}: 2 prompts exceed --max_prompt_tokens" in capsys.readouterr().out
    assert len(smepo.load_problems(path, "none", base[1], config)) == 2  # without its guide
    config.max_prompt_tokens = len(p.guided_ids)
    assert len(smepo.load_problems(path, "full", base[1], config)) == 1
    config.max_prompt_tokens -= 1
    with pytest.raises(UserError, match="no prompt within --max_prompt_tokens"):
        smepo.load_problems(path, "full", base[1], config)


# ---- Rollouts ------------------------------------------------------------------------------------


def test_completions_end_with_one_eos_and_padding_goes_by_position():
    assert smepo.until_eos([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert smepo.until_eos([5, 9, 2, 0], [2, 9]) == [5, 9]  # several EOS ids: the first counts
    assert smepo.until_eos([5, 6, 7], [2]) == [5, 6, 7]  # truncated
    ids, mask = smepo.pad([[0, 5, 0], [0]], "right", "cpu")  # the pad token is a real one, too
    assert ids.tolist() == [[0, 5, 0], [0, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = smepo.pad([[2, 5, 2], [7]], "left", "cpu")
    assert ids.tolist() == [[2, 5, 2], [0, 0, 7]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


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
    for i, ids in enumerate(smepo.sample(model, base[1], prompts, config)):
        logits = model(torch.tensor([prompts[i] + ids])).logits[0, len(prompts[i]) - 1 : -1]
        ours = torch.stack([step[i] for step in drawn[: len(ids)]])
        torch.testing.assert_close(ours, (logits / 0.7).softmax(-1), atol=1e-5, rtol=1e-4)


def test_rollouts_carry_what_was_sampled_and_are_rewarded_in_one_call(base, monkeypatch):
    """One that was cut off has stated no answer, whatever its text."""
    tokenizer, calls, prompts = base[1], [], []
    eos = tokenizer.eos_token_id

    def rewards(texts, truths):
        calls.append((texts, truths))
        return [float(i % 2) for i in range(len(texts))]

    def sample(model, tokenizer, given, config):
        prompts.extend(given)
        return [[20, eos], [21], [22, eos], [23, 24]]

    monkeypatch.setitem(smepo.DOMAINS, "mine", Domain("", None, None, rewards))
    monkeypatch.setattr(smepo, "sample", sample)
    p, q = problem(base), problem(base, answer="17")
    guided = [True, False, True, False]
    rollouts = smepo.rollout(*base, [p, p, q, q], guided, settings(domain="mine"))
    whole = tokenizer.batch_decode([[20], [22]])
    assert calls == [([whole[0], "", whole[1], ""], ["16", "16", "17", "17"])]
    assert prompts == [p.guided_ids, p.question_ids, q.guided_ids, q.question_ids]
    assert [r.prompt_ids for r in rollouts] == prompts and [r.guided for r in rollouts] == guided
    assert [r.problem for r in rollouts] == [p, p, q, q]
    assert [r.ids for r in rollouts] == [[20, eos], [21], [22, eos], [23, 24]]
    assert [r.sampled for r in rollouts] == [[1, 1], [1], [1, 1], [1, 1]]
    assert [r.text for r in rollouts] == tokenizer.batch_decode([[20], [21], [22], [23, 24]])
    assert [r.ended for r in rollouts] == [True, False, True, False]
    assert [r.reward for r in rollouts] == [0.0, 1.0, 0.0, 1.0]


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


def test_a_group_is_guided_as_one(base):
    problems = [problem(base, question=f"Compute {i} + 1", answer="9") for i in range(8)]
    config = settings(guide_when="0.5", max_new_tokens=2)
    rollouts, count = smepo.collect_rollouts(*base, problems, 3, config)
    assert count == len(rollouts) == 32
    expected = [smepo.shows_guide(p, 3, config) for p in problems for _ in range(4)]
    assert [r.guided for r in rollouts] == expected and 0 < sum(expected) < 32
    for r in rollouts:
        assert r.prompt_ids == (r.problem.guided_ids if r.guided else r.problem.question_ids)


def test_a_problem_without_a_guide_is_never_guided(base):
    p = dataclasses.replace(problem(base), guide="")
    for when in ("always", "on-failure"):
        config = settings(guide_when=when, max_new_tokens=2)
        rollouts, count = smepo.collect_rollouts(*base, [p], 1, config)
        assert count == 4 and not any(r.guided for r in rollouts)


def test_on_failure_guides_only_groups_that_all_failed_and_counts_both_passes(base, monkeypatch):
    problems = [problem(base, answer=str(i)) for i in range(4)]
    passes = []

    def rollout(model, tokenizer, problems, guided, config):
        passes.append([(p.answer, g) for p, g in zip(problems, guided, strict=True)])
        rewards = [float(p.answer in "13" and i % 2) for i, p in enumerate(problems)]
        parts = zip(problems, guided, rewards, strict=True)
        return [Rollout(p, g, [], [2], [1], "", True, r) for p, g, r in parts]

    monkeypatch.setattr(smepo, "rollout", rollout)
    config = settings(guide_when="on-failure", group_size=2)
    rollouts, count = smepo.collect_rollouts(None, None, problems, 1, config)
    first = [(answer, False) for answer in "00112233"]
    assert passes == [first, [("0", True), ("0", True), ("2", True), ("2", True)]]
    assert [r.guided for r in rollouts] == [True, True, False, False] * 2
    assert [r.problem.answer for r in rollouts] == list("00112233") and count == 12


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


def test_advantages_sum_to_zero_and_ignore_other_groups():
    torch.manual_seed(0)
    rewards = torch.rand(6, 8)
    A = smepo.group_advantages(rewards.flatten(), 8).view(6, 8)
    torch.testing.assert_close(A.sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(A[2], smepo.group_advantages(rewards[2], 8))


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10], [8, 9]]  # of unequal lengths, some twice
COMPLETIONS = [[11, 2], [12, 13, 14, 2], [4, 4, 4], [15], [2]]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask: prompts on the left, completions on the right. (5, 5 + 4)"""
    prompts, prompt_mask = smepo.pad(PROMPTS, "left", "cpu")
    completions, mask = smepo.pad(COMPLETIONS, "right", "cpu")
    return torch.cat([prompts, completions], 1), torch.cat([prompt_mask, mask], 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_sharing_prompts_changes_neither_logits_nor_gradients(name):
    model, (ids, mask) = random_model(name), padded()
    real, found = mask[:, 5:, None], []
    torch.manual_seed(0)
    pull = torch.randn(5, 4, 23)
    for shared in (True, False):
        model.zero_grad()
        if shared:
            logits = smepo.completion_logits(model, ids, mask, 4)
        else:
            at = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=at).logits[:, -5:-1]
        (logits * pull * real).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((logits * real, gradient))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-3, rtol=1e-4)
    assert found[0][1].abs().max() > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "lfm2"])
def test_logprobs_under_unequal_left_padding_equal_unpadded_forwards(name, temperature):
    """Rotary and absolute positions alike, a window, rescaled logits: padding shifts nothing."""
    model = random_model(name)
    ours = smepo.token_logprobs(model, *padded(), 4, temperature)
    for row, prompt, ids in zip(ours, PROMPTS, COMPLETIONS, strict=True):
        r = Rollout(None, True, prompt, ids, [], "", True, 0.0)
        expected = unpadded_logprobs(model, r, temperature)
        torch.testing.assert_close(row[: len(ids)], expected, atol=1e-5, rtol=1e-5)


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


def test_aggregations_by_hand():
    """Two rows of 1 and 3 tokens, ratio 1, A = 1 and -1: only the weights of the tokens differ."""
    mask, zeros = [[1, 0, 0], [1, 1, 1]], [[0.0] * 3] * 2
    loss, gradient, _ = loss_of(zeros, zeros, [1.0, -1.0], mask, aggregation="sequence")
    assert loss == pytest.approx((-1 + 1) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]]))
    loss, gradient, _ = loss_of(zeros, zeros, [1.0, -1.0], mask, aggregation="token")
    assert loss == pytest.approx((-1 + 3) / 4)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0, 0], [0.25, 0.25, 0.25]]))


def test_loss_is_zero_but_its_gradient_is_not_at_the_first_update():
    A = smepo.group_advantages([1.0, 0.0], 2).tolist()
    loss, gradient, clip_fraction = loss_of([[-1.0], [-2.0]], [[-1.0], [-2.0]], A)
    assert loss == pytest.approx(0, abs=1e-7) and gradient.abs().min() > 0.1
    assert clip_fraction == 0


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_padding_gets_no_gradient_even_where_its_logprobs_are_wild(aggregation):
    new, old = [[0.0, 300.0, -math.inf]], [[0.0, 0.0, -math.inf]]
    loss, gradient, clipped = loss_of(new, old, [1.0], [[1, 0, 0]], aggregation=aggregation)
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
    loss, stats = smepo.policy_loss(new, old, A, mask, 0.2, 0.28, "sequence")
    torch.testing.assert_close(loss, torch.as_tensor(total))
    assert stats["clip_fraction"] == pytest.approx(clipped / 20) and clipped > 2


# ---- Update --------------------------------------------------------------------------------------


def test_update_sets_the_advantages(fresh_base):
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0]) + make_group(fresh_base, [1.0] * 4)
    gradient_of(fresh_base, rollouts)
    assert [r.advantage for r in rollouts] == pytest.approx([1.5, -0.5, -0.5, -0.5] + [0] * 4, 1e-4)
    gradient_of(fresh_base, rollouts, advantage_scale="none")
    assert [r.advantage for r in rollouts] == [0.75, -0.25, -0.25, -0.25] + [0] * 4


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_micro_batch_size_does_not_change_the_gradient(fresh_base, aggregation):
    groups = [make_group(fresh_base, r) for r in ([1.0, 0, 0, 0], [0.0] * 4, [0.0, 1, 1, 1])]
    rollouts = sum(groups, [])
    whole = gradient_of(fresh_base, rollouts, micro_batch=100, aggregation=aggregation)
    assert whole.abs().max() > 1e-3
    for size, counts in ((1, [1] * 8), (3, [3, 3, 2]), (100, [8])):
        batches = smepo.micro_batches(rollouts, "cpu", settings(micro_batch=size))
        assert [len(batch.advantages) for batch in batches] == counts
        assert sum(batch.share for batch in batches) == pytest.approx(8 / 12)
        part = gradient_of(fresh_base, rollouts, micro_batch=size, aggregation=aggregation)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("told", [False, True], ids=["all sampled", "some told"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_update_has_the_gradient_of_the_whole_unskipped_loss(fresh_base, aggregation, told):
    """Skipping, sorting, splitting and padding together equal one loss over all B*G rows, at the
    temperature of the sampling. What an environment told has no gradient and no place in it."""
    rewards = [1.0, 0, 0, 0], [1.0] * 4, [0.0, 1, 1, 1]
    rollouts = sum((make_group(fresh_base, r, guided=r[0] > 0) for r in rewards), [])
    options = {"aggregation": aggregation, "temperature": 0.7}
    plain = gradient_of(fresh_base, rollouts, **options)
    for r in rollouts if told else []:
        r.sampled[1:-1] = [i % 3 % 2 for i in range(len(r.sampled) - 2)]
    ours = gradient_of(fresh_base, rollouts, micro_batch=3, **options)
    loss, tokens = 0.0, sum(sum(r.sampled) for r in rollouts)
    for r in rollouts:
        logprobs = unpadded_logprobs(fresh_base[0], r, 0.7)
        divisor = sum(r.sampled) * len(rollouts) if aggregation == "sequence" else tokens
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


def test_a_mini_batch_without_signal_takes_no_step_and_enters_no_average(fresh_base):
    model, tokenizer = fresh_base
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    useful, useless = make_group(fresh_base, [1.0, 0, 0, 0]), make_group(fresh_base, [0.0] * 4)
    alone = smepo.update(model, tokenizer, optimizer, useful, settings())
    config = settings(mini_batches=2)
    both = smepo.update(model, tokenizer, optimizer, useful + useless, config)
    assert both["grad_norm"] == pytest.approx(alone["grad_norm"]) and alone["grad_norm"] > 0


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
    model, tokenizer = fresh_base
    captured, forward = [], model.base_model.forward

    def spy(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state.retain_grad()
        captured.append(output.last_hidden_state)
        return output

    monkeypatch.setattr(model.base_model, "forward", spy)
    rollouts = make_group(fresh_base, [1.0, 0, 0, 0])
    gradient_of(fresh_base, rollouts)
    prompt, completion = captured  # the group's prompt is read once, then its completions
    lengths = torch.tensor(sorted((len(r.ids) for r in rollouts), reverse=True))
    assert completion.shape[:2] == (4, lengths.max())
    sampled = torch.arange(lengths.max()) < lengths[:, None]
    assert torch.equal(completion.grad.abs().sum(-1) > 0, sampled)
    assert prompt.shape[0] == 1 and prompt.grad is None


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
    with pytest.raises(UserError, match="not finite"):
        smepo.update(model, tokenizer, optimizer, rollouts, settings())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_metrics_of_a_step_by_hand(base, monkeypatch):
    p = problem(base)
    leaky = dataclasses.replace(p, leaky=True)

    def group(of, guided, sampled, rewards, ended=(True,) * 4):
        parts = zip(rewards, ended, strict=True)
        return [Rollout(of, guided, [], [], sampled, "", end, r) for r, end in parts]

    rollouts = [
        *group(p, True, [1] * 2, [0.0] * 4),
        *group(leaky, True, [1] * 4, [1.0] * 4),
        # seven tokens, of which six were sampled
        *group(p, False, [1, 1, 0, 1, 1, 1, 1], [1.0, 0.0] * 2, [True, False] * 2),
        *group(p, False, [1] * 4, [0.0] * 4),
    ]
    monkeypatch.setattr(smepo, "collect_rollouts", lambda *_: (rollouts, 24))
    monkeypatch.setattr(smepo, "update", lambda *_: {"loss": 0.5})
    returned, metrics = smepo.train_step(*base, None, [p], 7, settings())
    expected = {"step": 7, "reward": 6 / 16, "completion_length": 4.0, "truncated": 2 / 16}
    expected |= {"zero_variance_wrong": 0.5, "zero_variance_right": 0.25, "guided": 0.5}
    expected |= {"leak_rate": 0.5, "loss": 0.5, "rollouts": 24}
    assert returned is rollouts and {k: metrics[k] for k in expected} == pytest.approx(expected)
    assert set(metrics) - set(expected) == {"seconds_rollout", "seconds_update"}


# ---- Evaluation ----------------------------------------------------------------------------------


def test_evaluation_by_hand_and_unguided_by_construction(base, monkeypatch):
    p = dataclasses.replace(problem(base), difficulty="2")
    q = dataclasses.replace(p, difficulty="5")
    rewards = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]

    def rollout(model, tokenizer, problems, guided, config):
        assert problems == [p, p, p, p, q, q, q, q] and guided == [False] * 8
        pairs = zip(problems, rewards, strict=True)
        return [Rollout(x, False, [], [], [], "", True, r) for x, r in pairs]

    monkeypatch.setattr(smepo, "rollout", rollout)
    table = smepo.evaluate(None, None, [p, p, q, q], settings(eval_samples=2))
    assert list(table) == ["pass@1", "pass@2"]
    assert table["pass@1"]["2"] == pytest.approx([0.75, 0.25 / 2**0.5])
    assert table["pass@1"]["5"] == pytest.approx([0.25, 0.25 / 2**0.5])
    assert table["pass@1"]["mean"] == pytest.approx([0.5, 0.125])
    assert table["pass@2"] == {"2": [1, 0], "5": [0.5, pytest.approx(0.5 / 2**0.5)]} | {
        "mean": pytest.approx([0.75, 0.25 / 2**0.5])
    }


def test_evaluation_never_puts_a_guide_into_a_prompt(base, monkeypatch):
    prompts, sample = [], smepo.sample
    monkeypatch.setattr(smepo, "sample", lambda *a: prompts.extend(a[2]) or sample(*a))
    config = settings(guide="full", eval_samples=1)
    table = smepo.evaluate(*base, [problem(base)], config)  # the problem has a guide
    assert base[1].batch_decode(prompts) == ["<|user|>Compute 7 - 6 + 3 * 5<|end|><|assistant|>"]
    assert list(table) == ["pass@1"]


# ---- Training and the run folder -----------------------------------------------------------------


def test_a_run_writes_what_it_promises_and_the_same_seed_writes_the_same(tmp_path, capsys):
    config = small(tmp_path)
    assert smepo.main(flags(config)) == 0
    shown = capsys.readouterr().out
    for part in ("Compute", "[NUMBER]", "step 0 ", "step 4 ", "difficulty mean", "±", "runs"):
        assert part in shown
    (folder,) = Path("runs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "rollouts.jsonl", "curve.png", "checkpoint"}
    assert json.loads((folder / "config.json").read_text("utf-8")) == dataclasses.asdict(config)
    before, *steps = read_log(folder / "metrics.jsonl")
    assert before["step"] == 0 and [step["step"] for step in steps] == [1, 2, 3, 4]
    assert ["pass@1" in step for step in (before, *steps)] == [True, False, True, False, True]
    mean, error = steps[-1]["pass@1"]["mean"]
    assert f"{mean:.3f} ± {error:.3f}    {mean - before['pass@1']['mean'][0]:+.3f}" in shown
    promised = {"reward", "zero_variance_wrong", "zero_variance_right", "completion_length"}
    promised |= {"truncated", "entropy", "clip_fraction", "grad_norm", "loss", "rollouts"}
    assert all(promised <= set(step) for step in steps)
    assert all(step["guided"] == 1 and step["leak_rate"] == 0 for step in steps)
    rollouts = read_log(folder / "rollouts.jsonl")
    assert len(rollouts) == 4 * 4 * 4
    for step in steps:
        rewards = [r["reward"] for r in rollouts if r["step"] == step["step"]]
        assert sum(rewards) / 16 == pytest.approx(step["reward"])
    smepo.train(dataclasses.replace(config, name="again"))
    assert_same_run(folder, Path("runs/again"))
    smepo.train(dataclasses.replace(config, name="other", seed=1))
    assert read_log("runs/other/metrics.jsonl") != [before, *steps]


def test_one_folder_serves_both_splits(tmp_path, monkeypatch):
    folder, asked = tmp_path / "both", []
    folder.mkdir()
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", rows(split, 6))
    evaluate = smepo.evaluate
    monkeypatch.setattr(smepo, "evaluate", lambda *a: asked.append(a[2]) or evaluate(*a))
    run = smepo.train(settings(data=str(folder), test_data=str(folder), steps=1))
    trained = {record["question"] for record in read_log(run / "rollouts.jsonl")}
    assert trained <= {row["question"] for row in rows("train", 6)}
    assert [p.question for p in asked[0]] == [row["question"] for row in rows("test", 6)]


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


RESUMED = {"save_every": 1, "mini_batches": 2, "guide_when": "on-failure", "steps": 3}
RESUMED |= {"max_new_tokens": 32, "eval_samples": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        config = small(Path.cwd(), **RESUMED)
        return smepo.train(dataclasses.replace(config, name="whole")).resolve(), config


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_again_and_again_a_run_resumes_to_the_same_bits(whole, monkeypatch, point):
    """First in the midst of a chosen call, then wherever a seed says, until it has survived."""
    rng, calls, deaths = random.Random(point), Counter(), 0
    config = dataclasses.replace(whole[1], name="killed")

    def dies(name):
        calls[name] += 1
        target = "update" if point == "truncate" and not deaths else point  # it is of a resume
        if name == target and calls[name] == (3 if target in MANY_TIMES else 1):
            return "midst"
        return rng.choice(("before", "midst", "after")) if deaths and rng.random() < 0.06 else ""

    while train_and_die(config, monkeypatch, dies):
        deaths += 1
        config.resume = True
    assert deaths > 0
    assert_same_run(whole[0], Path("runs/killed"))
    names = {path.name for path in Path("runs/killed").iterdir()}  # nothing half-written is left
    assert names == {"config.json", "checkpoint", "metrics.jsonl", "rollouts.jsonl"}
    assert not list(Path("runs/killed/checkpoint").glob("*.new"))


def test_ctrl_c_exits_at_once_and_resume_takes_the_latest_run_with_its_settings(
    whole, monkeypatch, capsys
):
    def pressed(*args):
        if args[4] == 3:
            raise KeyboardInterrupt  # as Python does at Ctrl-C; a background job ignores the signal
        return train_step(*args)

    train_step = smepo.train_step
    config = whole[1]
    with monkeypatch.context() as patch:
        patch.setattr(smepo, "train_step", pressed)
        assert smepo.main(flags(config)) == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    (folder,) = Path("runs").iterdir()
    assert torch.load(folder / "checkpoint/training.pt", weights_only=True)["step"] == 2
    older = Path("runs/older")
    shutil.copytree(folder, older)
    os.utime(older / "config.json", (1, 1))
    assert smepo.main(["--resume"]) == 0
    assert_same_run(whole[0], folder)
    assert len(read_log(older / "metrics.jsonl")) == 3  # steps 0 to 2


def test_resume_of_a_longer_run_and_of_a_finished_one(whole):
    longer = dataclasses.replace(whole[1], name="longer", steps=2)
    folder = smepo.train(longer)
    write_rows(folder / "notes.jsonl", [GOOD])  # of somebody else
    before = (folder / "notes.jsonl").read_bytes()
    longer = dataclasses.replace(longer, steps=3, resume=True)
    for _ in range(2):  # the second has nothing left to do
        assert_same_run(whole[0], smepo.train(longer))
    assert (folder / "notes.jsonl").read_bytes() == before


def test_a_run_folder_is_never_overwritten_and_belongs_to_one_config(tmp_path, capsys):
    config = small(tmp_path, steps=1, name="mine")
    folder = smepo.train(config)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = refused(capsys, flags(config))
    assert "runs/mine holds a run: go on with --resume, or take another --name" in message
    other = dataclasses.replace(config, resume=True, learning_rate=0.5, eval_every=7)
    message = refused(capsys, flags(other))
    assert f"--learning_rate {config.learning_rate} --eval_every {config.eval_every}" in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_runs_without_a_name_are_named_by_what_they_are_and_counted():
    for name in ("arithmetic-semantic", "arithmetic-semantic-2", "arithmetic-semantic-3"):
        assert smepo.run_folder(Config()) == Path("runs", name)
        Path("runs", name).mkdir(parents=True)
    Path("runs", "arithmetic-semantic-2").rmdir()
    assert smepo.run_folder(Config()) == Path("runs/arithmetic-semantic-2")
    assert smepo.run_folder(Config(guide="none")) == Path("runs/arithmetic-none")
    assert smepo.run_folder(Config(name="mine")) == Path("runs/mine")


def test_a_checkpoint_that_cannot_be_read_is_refused(whole, capsys):
    shutil.copytree(whole[0], "runs/torn")
    path = Path("runs/torn/checkpoint/training.pt")
    path.write_bytes(path.read_bytes()[:99])
    message = refused(capsys, ["--resume", "--name", "torn", "--steps", "9"])
    assert f"--resume cannot read {path}" in message


def test_a_run_without_matplotlib_still_ends_with_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smepo, "find_spec", lambda name: None)
    assert smepo.main(flags(small(tmp_path, steps=1, name="mine"))) == 0
    assert "difficulty mean" in capsys.readouterr().out
    assert not Path("runs/mine/curve.png").exists()


def test_a_step_that_is_not_finite_is_refused_and_the_last_checkpoint_stays(
    tmp_path, capsys, monkeypatch
):
    config = small(tmp_path, steps=2, save_every=99, name="mine")
    path = smepo.train(config) / "checkpoint" / "training.pt"
    before, stats = path.read_bytes(), {"clip_fraction": torch.tensor(0.0)}
    monkeypatch.setattr(smepo, "policy_loss", lambda new, *_: (new.sum() * math.nan, stats))
    longer = dataclasses.replace(config, steps=50, resume=True)
    assert "not finite" in refused(capsys, flags(longer), running=True)
    assert path.read_bytes() == before


# ---- The file alone, and the plain command -------------------------------------------------------


def test_copied_alone_it_trains_evaluates_saves_and_resumes(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(ROOT / "smepo.py", folder)
    config = small(tmp_path, model=str(TASKS / "arithmetic/base"), domain="math", save_every=1)
    arguments = flags(dataclasses.replace(config, mini_batches=2, max_new_tokens=32))
    shown = run(["smepo.py", *arguments, "--name", "parts", "--steps", "2"], folder)
    assert "difficulty mean" in shown and "step 2 " in shown
    script = f"""if True:
        import smepo
        assert smepo.main(["--resume", "--steps", "4"]) == 0
        assert smepo.main({arguments!r} + ["--name", "whole"]) == 0"""
    shown = run(["-c", script], folder)
    assert shown.count("difficulty mean") == 2 and shown.count("step 4 ") == 2
    assert_same_run(folder / "runs/parts", folder / "runs/whole")


# ---- Math: the verifier --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, truth, expected",
    [
        ("The answer is 16.", "16", 1.0),
        ("The answer is 16.", "6", 0.0),
        ("The answer is 61.", "16", 0.0),
        ("The answer is 1,234.", "1234", 1.0),
        ("The answer is 42.0", "42", 1.0),
        (r"so \boxed{-3}", "\u22123", 1.0),
        ("#### 74", "74", 1.0),
        ("<answer> 74 </answer>", "74", 1.0),
        ("The answer is 16. No, wait: the answer is 17.", "16", 0.0),
        ("The answer is 17. No, wait: the answer is 16.", "16", 1.0),
        ("The answer is 3.5.\nSo the answer is 4.5", "4.5", 1.0),
        ("The answer is 3.5.\nSo the answer is 4.5", "3.5", 0.0),
        ("Step 1: 2 + 2 = 16.", "16", 0.0),  # a number in passing is no answer
        ("The answer is", "16", 0.0),
        ("The answer is [NUMBER].", "16", 0.0),
        ("", "16", 0.0),
        ("", "", 0.0),
        (r"\boxed{\frac14}", "0.25", 1.0),
        (r"\boxed{0.25}", r"\dfrac{1}{4}", 1.0),
        (r"\boxed{\frac { 1 } { 2 }}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{23}}", r"\frac{12}{3}", 0.0),
        (r"\boxed{1/0}", "0", 0.0),
        ("The answer is .5.", "0.5", 1.0),
        ("The answer is .5.", "5", 0.0),
        (r"\boxed{2 \frac{1}{2}}", "5/2", 1.0),
        (r"\boxed{-2 \frac{1}{2}}", "-5/2", 1.0),
        (r"\boxed{2½}", "2.5", 1.0),
        ("#### 50%", r"50\%", 1.0),
        (r"\boxed{50\%}", "0.5", 0.0),
        (r"\boxed{3 \times 10^{8}}", "300000000", 1.0),
        ("The answer is 12,34.", "1234", 0.0),
        ("The answer is 1.234.", "1234", 0.0),
        ("The answer is forty-two.", "42", 1.0),
        ("The answer is seven thousand two hundred.", "7200", 1.0),
        ("The answer is two million four hundred thousand.", "2400000", 1.0),
        ("The answer is twelve dozen.", "144", 1.0),
        ("The answer is two three.", "5", 0.0),
        ("The answer is (twenty, five).", "25", 0.0),
        ("The answer is 5 or six.", "5", 0.0),
        ("The answer is one third.", "4", 0.0),
        ("The answer is $42$.", "42", 1.0),
        ("The answer is 3 4.", "7", 0.0),
        ("The answer is 1e999999999.", "42", 0.0),
        (f"The answer is {'9' * 5000}.", "42", 0.0),
        ("The answer is 0.3333.", "1/3", 0.0),
        ("The answer is x = 5.", "5", 1.0),
        ("The answer is $5.", "5", 1.0),
        ("The answer is 5 dollars.", "5", 1.0),
        (r"\boxed{12 \text{ cm}^2}", "12", 1.0),
        (r"\boxed{5\pi}", "5", 0.0),
        (r"\boxed{3 million}", "3", 0.0),
        (r"\boxed{5}. The answer is correct.", "5", 1.0),
        (r"\boxed{5}. The answer is", "5", 1.0),
        (r"The answer is \boxed{\text{(B)}}.", "B", 1.0),
        ("The answer is b.", "(B)", 1.0),
        ("The answer is (A) or (B).", "(B)", 0.0),
        ("The answer is not B.", "B", 0.0),
        (r"\boxed{x^{2} + 6x+11}", "x^2+6x+11", 1.0),
        (r"\boxed{x^2-6x+11}", "x^2+6x+11", 0.0),
        (r"\boxed{[2, 5)}", "[2,5)", 1.0),
        (r"\boxed{(2, 5)}", "[2,5)", 0.0),
        (r"\boxed{\left(1, 234\right)}", "1234", 0.0),
        ("The answer is 1/2.", "2", 0.0),
        (r"\boxed{\frac{a}{bc}}", r"\frac{ab}{c}", 0.0),
        (r"\boxed{2π}", r"2\pi", 1.0),
        (r"\boxed{16} and then \boxed{17}", "16", 0.0),
        (r"\boxed{1} #### 16", "16", 1.0),
        (r"The answer is 16. \boxed{17}", "16", 0.0),
        (r"\boxed{16", "16", 0.0),
        (r"<answer>\boxed{5}</answer>", "5", 1.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "5", 1.0),
        (r"\boxed{5\,\mathrm{cm}}", "5", 1.0),
        (r"The answer is \(5\).", "5", 1.0),
        (r"\boxed{\binom{1}{2} \\ -2}", r"\binom{1}{2}\\-2", 1.0),
        (r"\boxed{10000000000000000}", "1e+16", 1.0),
        (r"\boxed{twenty - one}", "21", 0.0),
        *((f"The answer is 5 {rest}.", "5", 0.0) for rest in ("and six", "or 6", "not six", "pi")),
        *((f"The answer is 5 {rest}.", "5", 0.0) for rest in ("tenths", "halves", "hundredths")),
        *((f"The answer is 5 {rest}.", "5", 0.0) for rest in ("millions", "trillion", "plus two")),
        *(
            (f"The answer is 5 {unit}.", "5", 1.0)
            for unit in ("seconds", "times", "feet per second")
        ),
        ("The answer is 30 sixth graders.", "30", 1.0),
        ("The answer is forty  two.", "42", 1.0),
        (r"\boxed{1\text{,}000}", "1000", 1.0),
        (r"\fbox{5}", "5", 1.0),
        ("<answer>Answer: 5</answer>", "5", 1.0),
        ("**Answer:** Thursday", "thursday", 1.0),
        ("The answer is no.", "yes", 0.0),
    ],
)
def test_reward(completion, truth, expected):
    assert smepo.reward(completion, truth, "math") == expected


# ---- Math: what is hidden ------------------------------------------------------------------------


RULES = {}  # example: (action, pattern)
for action, body in re.findall(r"\(\?P<(\w+)>\n(.*?)\n    \)", smepo.RULES.pattern, re.DOTALL):
    for pattern, example in re.findall(r"^ {6}[ |] ((?s:.+?))  # (.+)$", body, re.MULTILINE):
        RULES[example] = action, pattern


@pytest.mark.parametrize("example", RULES)
def test_every_rule_acts_on_its_example(example):
    action, pattern = RULES[example]
    others = [other for _, other in RULES.values() if other != pattern]
    flags = re.VERBOSE | re.MULTILINE
    rules = re.findall(r"^ {6}[ |] \S", smepo.RULES.pattern, re.MULTILINE)
    assert len(RULES) == len(rules) and re.search(pattern, example, flags)
    text = f"so\n{example}"
    masked = smepo.mask_trace(text, "math", "none")
    assert (masked == text) == (action in ("keep", "equal"))
    if action == "keep":  # nothing else would keep it
        rest = re.compile("|".join(others) + "|[A-Za-z]+", flags)
        assert pattern == smepo.MASK or any(
            re.search(r"\d", match[0]) for match in rest.finditer(text)
        )


@pytest.mark.parametrize(
    "text, masked",
    [
        ("Step 1: 7 − 6 = 1.", "Step 1: [NUMBER] − [NUMBER] = [NUMBER]."),
        ("STEP 2) By Theorem 4.2, 9 | n.", "STEP 2) By Theorem 4.2, [NUMBER] | n."),
        ("Cases 1, 2 and 3 give 9", "Cases 1, 2 and 3 give [NUMBER]"),
        ("case 3 gives 9", "case 3 gives [NUMBER]"),
        ("the worst case 17 draws", "the worst case [NUMBER] draws"),
        ("each step 18 cm", "each step [NUMBER] cm"),
        ("in this case 18 is left", "in this case [NUMBER] is left"),
        (
            "that case 7, which part 7; each step 7",
            "that case [NUMBER], which part [NUMBER]; each step [NUMBER]",
        ),
        ("the part 45/72", "the part [NUMBER]/[NUMBER]"),
        ("1. Let x_1 be 4.", "1. Let x_1 be [NUMBER]."),
        ("## 2.1 Counting 7", "## 2.1 Counting [NUMBER]"),
        ("3.75 litres", "[NUMBER] litres"),
        ("it is\n72.\nDone.", "it is\n[NUMBER].\nDone."),
        ("a_{n+1} = a_n + 2, x₁ = 3", "a_{n+1} = a_n + [NUMBER], x₁ = [NUMBER]"),
        (r"\log_2 8 \tag{2}", r"\log_[NUMBER] [NUMBER] \tag{2}"),
        ("n(n-3)/2", "n(n-[NUMBER])/[NUMBER]"),
        (r"\frac{n(n+1)}{2}", r"\frac{n(n+[NUMBER])}{[NUMBER]}"),
        ("12,480 or 15{,}600 or −17", "[NUMBER] or [NUMBER] or [NUMBER]"),
        ("½ of 2⁵ is -3.5%, the 21st", "[NUMBER] of [NUMBER] is [NUMBER], the [NUMBER]"),
        ("<<18*7=126>>126", "<<[NUMBER]*[NUMBER]=[NUMBER]>>[NUMBER]"),
        ("forty-two, two-thirds, sixty four", "[NUMBER], [NUMBER], [NUMBER]"),
        ("one can check the two roots", "one can check the two roots"),
        (
            "the tens digit and zeros, 2 m per second",
            "the tens digit and zeros, [NUMBER] m per second",
        ),
        (r"the angle is \pi. \boxed{\pi}", r"the angle is [ANSWER]. \boxed{[ANSWER]}"),
        (r"so π = \boxed{\pi}", r"so [ANSWER] = \boxed{[ANSWER]}"),
        (r"it is x^2 + 6x. \boxed{x^2+6x}", r"it is [ANSWER]. \boxed{[ANSWER]}"),
        (r"is $\sqrt{3}$. #### \sqrt{3}", "is $[ANSWER]$. #### [ANSWER]"),
        ("on Thursday. The answer is Thursday.", "on [ANSWER]. The answer is [ANSWER]."),
        ("There is no such n. #### no", "There is no such n. #### [ANSWER]"),
        (r"\boxed{[NUMBER]}", r"\boxed{[NUMBER]}"),
        ("from (1) and (2), (3)", "from (1) and (2), ([NUMBER])"),
        ("no numbers here", "no numbers here"),
        ("", ""),
        ("By Theorem 4.2, 9 divides n", "By Theorem 4.2, [NUMBER] divides n"),
    ],
)
def test_mask(text, masked):
    assert smepo.mask_trace(text, "math") == masked
    assert smepo.mask_trace(masked, "math") == masked


@pytest.mark.parametrize(
    "answer, text", [("1", "one of them"), ("2", "the two roots"), ("6", "sixth")]
)
def test_small_words_are_hidden_if_they_are_the_answer(answer, text):
    assert "[NUMBER]" in smepo.mask_trace(text, "math", answer)
    assert smepo.mask_trace(text, "math", "7") == text


def test_an_answer_is_not_looked_for_inside_a_mask():
    assert smepo.mask_trace("[NUMBER] is a number", "math", "number") == "[NUMBER] is a [ANSWER]"


# ---- Math: can the answer still be read off? -----------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, leaky",
    [
        ("so x is 0.5", r"\frac12", True),
        ("half of it", "1/2", True),
        ("so it is forty-two", "42", True),
        ("We get:\n42 is it", "42", True),
        (r"we take (\text{C})", "C", True),
        ("## 4.2 is it", "4.2", False),
        ("so it is 42.0", "42", True),
        ("that is 1,234 or 1{,}234", "1234", True),
        ("it is [NUMBER] - 17 floors", "-17", True),
        ("the 6th platform", "6", True),
        ("the sixth platform", "6", True),
        ("one hundred and five", "105", True),
        ("it is 3.50 in all", "3.5", True),
        ("a cost of $5", "5 dollars", True),
        (r"is \frac{3}{4}", "0.75", True),
        (r"is 2\frac{1}{4}", "9/4", True),
        ("[NUMBER]+3=7", "7", True),
        (r"is 3 \times 10^{8}", "3e8", True),
        ("an angle of π", r"\pi", True),
        ("it is x ^ {2} + 1", "x^2+1", True),
        (r"it is \sqrt{3}", r"\sqrt 3", True),
        ("it is Thursday", "Thursday", True),
        ("it is THURSDAY", r"\text{Thursday}", True),
        ("the answer is B", "(B)", True),
        ("Ans: 2/5 B", "B", True),
        ("Therefore (B) 47", "B", True),
        ("so the answer is no.", "no", True),
        ('the answer to the question is "Yes."', "Yes", True),
        ("<answer> No </answer>", "no", True),
        ("Step 42: it is [NUMBER]", "42", False),
        ("Case 2. By Theorem 4.2 and Lemma 2", "2", False),
        ("1. Let x_1 be\n(2) the sum (3)", "2", False),
        (r"x_42 and y_{42} \tag{42}", "42", False),
        ("so it is 43 of 421", "42", False),
        ("[NUMBER] [ANSWER]", "7", False),
        ("the [ANSWER] to the number", "number", True),
        ("see part (b) of B", "(B)", False),
        ("there is no such n", "no", False),
        ("an eastern wind", "east", False),
        ("", "42", False),
    ],
)
def test_leaks_sees_every_spelling_and_no_label(text, answer, leaky):
    assert smepo.leaks(text, answer, "math") is leaky
