"""The toy arithmetic, its base, and what smepo.py does with a trained base."""

import dataclasses
import doctest
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import smepo
from smepo import Rollout, UserError
from tiny_tasks import pretrain, toys
from tiny_tasks.arithmetic import toy
from tiny_tasks.fixtures import (
    ROOT,
    TASKS,
    flags,
    gradient_of,
    make_group,
    problem,
    read_log,
    refused,
    rows,
    run,
    saved,
    settings,
    small,
    unpadded_logprobs,
    write_rows,
)

# ---- The toy -------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(toy)
    assert results.failed == 0 and results.attempted > 0


def test_no_test_problem_is_trained_or_pretrained_on():
    train, test = ({row["question"] for row in rows(split)} for split in ("train", "test"))
    rng = random.Random(1)
    pretraining = {toy.draw_example(rng)[0] for _ in range(3000)}
    assert all(toys.is_held_out(question) for question in test)
    assert not any(toys.is_held_out(question) for question in train | pretraining)


def test_shipped_traces_are_right_and_mask_without_a_leak():
    for row in rows("train", 300) + rows("test"):
        value, trace = str(eval(row["question"].removeprefix("Compute "))), row["teacher_ds"]
        assert value == row["reward_model"]["ground_truth"]
        assert smepo.reward(trace, value, "math") == 1.0 and smepo.leaks(trace, value, "math")
        masked = smepo.mask_trace(trace, "math", value)
        assert masked == re.sub(r"\d+(?!:)", "[NUMBER]", trace)
        assert not smepo.leaks(masked, value, "math")


def test_the_tokenizer_round_trips_every_row(base):
    tokenizer = base[1]
    for row in rows("test")[::5]:
        trace = row["teacher_ds"]
        for text in (row["question"], trace, smepo.mask_trace(trace, "math")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_altered_traces_are_wrong_in_every_result_but_look_like_the_expert_s():
    for row in rows("test"):
        trace, answer = toy.altered(row["question"], random.Random(row["question"]))
        assert smepo.stated(trace) == answer != row["reward_model"]["ground_truth"]
        assert smepo.mask_trace(trace, "math") == smepo.mask_trace(row["teacher_ds"], "math")
        for operation, value in re.findall(r"Step \d: (.*) = (\d+)", trace):
            assert eval(operation) != int(value)


def test_calibration_of_the_shipped_base(base):
    """It computes carelessly, cannot plan five steps alone, follows a plan, copies."""
    table = pretrain.calibrate(toy, *base, settings(), count=150)
    assert 0.25 <= table["none", 2][0] <= 0.60
    assert table["none", 5][0] <= 0.08
    assert table["semantic", 5][0] >= 0.08
    assert table["full", 5][0] >= 0.90
    assert table["altered", 5][0] >= 0.40  # it copies what it is shown, even if that is wrong
    size = sum(path.stat().st_size for path in (TASKS / "arithmetic" / "base").iterdir())
    assert size <= 2**20


# ---- What a trained base is needed for -----------------------------------------------------------


def test_training_raises_the_guided_reward(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", rows("train", 100))  # the easy ones
    tests = write_rows(tmp_path / "test.jsonl", rows("test", 4))
    config = settings(steps=10, prompts_per_step=8, group_size=8, learning_rate=1e-3, seed=2)
    config.data, config.test_data, config.eval_every = data, tests, 99
    records = read_log(smepo.train(config) / "metrics.jsonl")
    rewards = [record["reward"] for record in records[1:]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def test_entropy_metric_estimates_the_entropy(fresh_base):
    model, tokenizer = fresh_base
    torch.manual_seed(0)
    rollouts = smepo.rollout(*fresh_base, [problem(fresh_base)] * 128, [True] * 128, settings())
    total, tokens = 0.0, 0
    for i, r in enumerate(rollouts):
        r.reward = float(i % 2)
        logits = model(torch.tensor([r.prompt_ids + r.ids])).logits[0, -len(r.ids) - 1 : -1]
        total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        tokens += len(r.ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = smepo.update(model, tokenizer, optimizer, rollouts, settings(group_size=128))
    assert stats["entropy"] == pytest.approx(total / tokens, rel=0.1)


def test_logprobs_of_sampled_completions_equal_unpadded_forwards(base):
    """Scored as update scores them: sorted, split, padded."""
    easy = problem(base, "Compute 2 * 3", "Step 1: 2 * 3 = 6.\nThe answer is 6.")
    torch.manual_seed(0)
    rollouts = smepo.rollout(*base, [problem(base), easy] * 3, [True, True, False] * 2, settings())
    for i, r in enumerate(rollouts):
        r.advantage = 1.0 + i  # tells them apart
    config, seen = settings(micro_batch=2), []
    for batch in smepo.micro_batches(rollouts, "cpu", config):
        scores = smepo.score(base[0], batch, config)
        for row, marks, a in zip(scores, batch.sampled, batch.advantages, strict=True):
            expected = unpadded_logprobs(base[0], rollouts[int(a) - 1])
            torch.testing.assert_close(row[marks.bool()], expected, atol=1e-4, rtol=1e-4)
            seen.append(int(a))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


def test_a_tokenizer_without_pad_pads_with_its_eos(tmp_path, base, fresh_base):
    model, tokenizer = fresh_base
    tokenizer.pad_token = None
    other = smepo.load_model(saved(tmp_path / "model", model, tokenizer), settings())
    assert other[1].pad_token_id == tokenizer.eos_token_id != base[1].pad_token_id
    easy = problem(base, "Compute 2 + 2", "Step 1: 2 + 2 = 4.\nThe answer is 4.", "4")
    runs = []
    for policy in (base, other):  # padding goes by position, so nothing changes
        torch.manual_seed(0)
        batch = [easy, problem(base)] * 4
        runs.append(smepo.rollout(*policy, batch, [False, True] * 4, settings()))
    assert runs[0] == runs[1] and sum(r.reward for r in runs[0]) > 0


def test_generation_settings_of_the_model_folder_do_not_reach_the_rollouts(base, tmp_path):
    """A folder that recommends greedy, top-k or penalties samples like one that does not."""
    path = Path(saved(tmp_path / "hostile", *base))
    hostile = {"do_sample": False, "top_k": 1, "top_p": 0.1, "temperature": 0.01, "min_p": 0.9}
    hostile |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_new_tokens": 1}
    hostile |= {"suppress_tokens": [*range(6, 60)], "eos_token_id": [2], "typical_p": 0.1}
    (path / "generation_config.json").write_text(json.dumps(hostile), "utf-8")
    model, tokenizer = smepo.load_model(path, settings())
    samples = []
    for policy in (base[0], model):
        torch.manual_seed(0)
        prompts = [problem(base).guided_ids] * 16
        samples.append(smepo.sample(policy, tokenizer, prompts, settings()))
    assert samples[0] == samples[1]
    assert len({tuple(ids) for ids in samples[0]}) > 1


def test_several_eos_ids_of_the_model_folder_all_end_a_completion(base, tmp_path):
    path = Path(saved(tmp_path / "chat", *base))
    newline = base[1].convert_tokens_to_ids(".\n")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [newline]}), "utf-8")
    model, tokenizer = smepo.load_model(path, settings())
    assert model.generation_config.eos_token_id == sorted([tokenizer.eos_token_id, newline])
    rollouts = smepo.rollout(model, tokenizer, [problem(base)] * 8, [True] * 8, settings())
    assert all(r.ids[-1] == newline and newline not in r.ids[:-1] for r in rollouts)
    assert all(r.ended for r in rollouts)


def test_the_plain_command_runs_from_any_folder(tmp_path):
    few = "--steps 1 --prompts_per_step 2 --group_size 2 --eval_samples 1 --max_new_tokens 2"
    shown = run([ROOT / "smepo.py", *few.split()], tmp_path)
    assert "difficulty 5 " in shown and "difficulty mean" in shown
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name == "arithmetic-semantic" and (path / "curve.png").stat().st_size > 0


def test_long_calls_are_split_and_completions_cut_at_the_limit(base, monkeypatch):
    model, calls, generate = base[0], [], base[0].generate

    def spy(**inputs):
        calls.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    config = settings(generate_batch=8, max_new_tokens=5)
    rollouts = smepo.rollout(*base, [problem(base)] * 20, [True] * 20, config)
    assert calls == [8, 8, 4]
    assert [len(r.ids) for r in rollouts] == [5] * 20
    assert not any(r.ended or r.reward for r in rollouts)


def test_a_tokenizer_without_eos_is_refused(tmp_path, capsys, fresh_base):
    model, tokenizer = fresh_base
    tokenizer.eos_token = None
    path = saved(tmp_path / "model", model, tokenizer)
    assert "has no eos_token" in refused(capsys, flags(small(tmp_path, model=path)))


def test_a_base_model_gets_a_plain_template_and_is_told_so(tmp_path, capsys, fresh_base):
    fresh_base[1].chat_template = None
    _, tokenizer = smepo.load_model(saved(tmp_path / "model", *fresh_base), settings())
    assert "model has no chat template: a plain one is used" in capsys.readouterr().out
    assert smepo.build_prompt(tokenizer, "1 + 1?", "2.", "Be brief.") == (
        "System: Be brief.\n\nUser: 1 + 1?\n\nAssistant: Here is an example solution:\n2.\n\n"
        "Assistant:"
    )


def test_a_chat_template_that_refuses_a_guide_is_refused_in_one_line(tmp_path, capsys, fresh_base):
    fresh_base[1].chat_template = (
        "{% for message in messages %}{% if message.role != 'user' %}"
        "{{ raise_exception('only users') }}{% endif %}{{ message.content }}{% endfor %}"
    )
    path = saved(tmp_path / "model", *fresh_base)
    message = refused(capsys, flags(small(tmp_path, model=path)))
    assert "template refuses user, assistant: only users" in message
    assert smepo.build_prompt(fresh_base[1], "1 + 1?") == "1 + 1?"  # GRPO shows none


def test_a_chat_template_that_drops_a_part_of_the_guide_is_refused(fresh_base):
    tokenizer = fresh_base[1]
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content.split('</think>')[-1] }}{% endfor %}"
    )
    assert smepo.build_prompt(tokenizer, "1 + 1?", "It is 2.").endswith("It is 2.")
    with pytest.raises(UserError, match="drops a part of the question or of the guide"):
        smepo.build_prompt(tokenizer, "1 + 1?", "<think>Add.</think> It is 2.")


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = refused(capsys, flags(small(tmp_path, model=str(tmp_path / "empty"))))
    assert f"--model {tmp_path / 'empty'} on cpu" in message


def test_a_model_with_fewer_positions_than_tokens_is_refused(tmp_path, base):
    positions = base[0].config.max_position_embeddings
    config = settings(max_prompt_tokens=positions - 64)
    smepo.load_model(config.model, config)
    config.max_prompt_tokens += 1
    with pytest.raises(UserError, match=f"{positions} positions: --max_prompt_tokens and"):
        smepo.load_model(config.model, config)


def test_a_model_that_is_not_finite_is_refused(tmp_path, capsys, fresh_base):
    model, tokenizer = fresh_base
    with torch.no_grad():
        next(model.parameters())[3, 3] = math.nan
    path = saved(tmp_path / "model", model, tokenizer)
    assert "not finite" in refused(capsys, flags(small(tmp_path, model=path)))
    with pytest.raises(UserError, match="outputs are not finite"):
        smepo.sample(model, tokenizer, [[3, 4, 5]], settings())


def test_dropout_of_the_model_folder_is_off(tmp_path, base):
    drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    size = {"vocab_size": len(base[1]), "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, **drops, bos_token_id=2, eos_token_id=2)).train()
    model, _ = smepo.load_model(saved(tmp_path / "dropout", model, base[1]), settings())
    ids = torch.tensor([[5, 6, 7, 8]])
    scores = [smepo.token_logprobs(model, ids, torch.ones_like(ids), 2, 1.0) for _ in range(2)]
    assert torch.equal(*scores)


def test_masked_expert_loss_is_the_nll_of_the_visible_tokens_only(base):
    model, tokenizer = base
    p = problem(base, "Compute 2 * 3", "Step 1: 2 * 3 = 6.\nThe answer is 6.", "6")
    tokens = tokenizer.tokenize(p.trace) + [tokenizer.eos_token]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    nll = -unpadded_logprobs(model, Rollout(p, False, p.question_ids, ids, [], "", True, 0.0))
    visible = [not token.strip().isdigit() for token in tokens]
    assert visible.count(False) == 4
    ours = smepo.masked_expert_loss(model, tokenizer, p, "math")
    torch.testing.assert_close(ours, nll[visible].mean())


def test_expert_loss_is_off_by_default_and_moves_the_policy_when_on(fresh_base):
    groups = make_group(fresh_base, [0.0] * 4) + make_group(fresh_base, [1.0] * 4)  # no signal
    p = dataclasses.replace(groups[0].problem, trace="The answer is Step 3: Compute ===.")
    for r in groups:
        r.problem = p
    ours = gradient_of(fresh_base, groups, expert_coef=0.5)
    fresh_base[0].zero_grad()
    (0.5 * smepo.masked_expert_loss(*fresh_base, p, "math")).backward()  # the mean of two equal
    theirs = torch.cat([p.grad.flatten() for p in fresh_base[0].parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert ours.abs().max() > 1e-2
