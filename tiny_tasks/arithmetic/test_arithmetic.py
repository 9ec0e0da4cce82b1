"""The task arithmetic, its base, and what smepo.py does with a trained base."""

import json
import random
import re
from pathlib import Path
from unittest.mock import Mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import smepo
from tiny_tasks import pretrain, toys
from tiny_tasks.arithmetic import toy
from tiny_tasks.fixtures import ROOT, problem, rows, run, saved, settings


def test_no_test_problem_is_trained_or_pretrained_on():
    rng = random.Random(1)
    seen = [row["question"] for row in rows("train")]
    seen += [toy.draw_example(rng)[0] for _ in range(3000)]
    assert all(toys.is_held_out(row["question"]) for row in rows("test"))
    assert not any(map(toys.is_held_out, seen))


def test_shipped_traces_are_right_and_mask_without_a_leak():
    for row in rows("train", 300) + rows("test"):
        value, trace = str(eval(row["question"].removeprefix("Compute "))), row["teacher_ds"]
        assert value == row["reward_model"]["ground_truth"]
        assert smepo.reward(trace, value, "math") == 1.0 and smepo.leaks(trace, value, "math")
        masked = smepo.mask_trace(trace, "math", value)
        assert masked == re.sub(r"\d+(?!:)", "[NUMBER]", trace)
        assert not smepo.leaks(masked, value, "math")


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


# ---- What a trained base is needed for -----------------------------------------------------------


def test_generation_settings_of_the_model_folder_do_not_reach_the_rollouts(base, tmp_path):
    """A folder that recommends greedy, top-k or penalties samples like one that does not."""
    path = Path(saved(tmp_path / "hostile", *base))
    hostile = {"do_sample": False, "top_k": 1, "top_p": 0.1, "temperature": 0.01}
    hostile |= {"repetition_penalty": 5.0, "max_new_tokens": 1, "suppress_tokens": [*range(6, 60)]}
    (path / "generation_config.json").write_text(json.dumps(hostile), "utf-8")
    model, tokenizer = smepo.load_model(path, settings())
    samples = []
    for policy in (base[0], model):
        torch.manual_seed(0)
        prompts = [problem(base).prompts[True]] * 16
        samples.append(smepo.sample(policy, prompts, settings()))
    assert samples[0] == samples[1]
    assert len({tuple(ids) for ids in samples[0]}) > 1


def test_several_eos_ids_of_the_model_folder_all_end_a_completion(base, tmp_path):
    path = Path(saved(tmp_path / "chat", *base))
    newline = base[1].convert_tokens_to_ids(".\n")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [newline]}), "utf-8")
    model, tokenizer = smepo.load_model(path, settings())
    assert model.generation_config.eos_token_id == sorted([tokenizer.eos_token_id, newline])
    (rollouts,) = smepo.rollout(model, tokenizer, [(problem(base), True)], settings(), 8)
    assert all(r.ended and r.ids.index(newline) == len(r.ids) - 1 for r in rollouts)


def test_the_plain_command_runs_from_any_folder(tmp_path):
    few = "--steps 1 --prompts_per_step 2 --group_size 2 --eval_samples 1 --max_new_tokens 2"
    shown = run([ROOT / "smepo.py", *few.split()], tmp_path)
    assert "difficulty 5 " in shown and "difficulty mean" in shown
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name == "math-semantic-always-seed0" and (path / "curve.png").stat().st_size > 0


def test_long_calls_are_split_and_completions_cut_at_the_limit(base, monkeypatch):
    spy = Mock(wraps=base[0].generate)
    monkeypatch.setattr(base[0], "generate", spy)
    config = settings(micro_batch=2, max_new_tokens=5)
    (rollouts,) = smepo.rollout(*base, [(problem(base), True)], config, 20)
    assert [len(call.args[0]) for call in spy.call_args_list] == [8, 8, 4]
    assert [len(r.ids) for r in rollouts] == [5] * 20
    assert not any(r.ended or r.reward for r in rollouts)


def test_dropout_of_the_model_folder_is_off(tmp_path, base):
    drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    size = {"vocab_size": len(base[1]), "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, **drops, bos_token_id=2, eos_token_id=2)).train()
    model, _ = smepo.load_model(saved(tmp_path / "dropout", model, base[1]), settings())
    ids = torch.tensor([[5, 6, 7, 8]])
    scores = [smepo.token_logprobs(model, ids, torch.ones_like(ids), 2, 1.0) for _ in range(2)]
    assert torch.equal(*scores)
