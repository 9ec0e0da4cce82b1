"""The commands mask, export and compare, and the makers."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smepo
from tiny_tasks import compare, export, make_tasks, mask, pretrain, tables, toys, warm_up
from tiny_tasks.fixtures import GOOD, ROOT, TASKS, random_model, rows, settings, write_rows


def refused(capsys, main, *arguments: str) -> str:
    """Exit code 2, and one line on stderr, which is returned."""
    capsys.readouterr()
    assert toys.command(lambda: main(list(arguments))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# ---- mask ----------------------------------------------------------------------------------------


def test_mask_shows_a_trace_above_its_mask_and_the_verdict(tmp_path, capsys, monkeypatch):
    path = tmp_path / "trace.txt"
    path.write_text("Step 1: 7 − 6 = 1.\n\nThe answer is 1.\n", encoding="utf-8")
    mask.main(["--trace", str(path)])
    out = capsys.readouterr().out
    mask_text = "Step 1: [NUMBER] − [NUMBER] = [NUMBER].\n\nThe answer is [NUMBER].\n"
    assert "Step 1: 7 − 6 = 1.\n\nThe answer is 1.\n" in out.partition(mask_text)[0]
    assert mask_text in out and "spans hidden: 4, text kept: 89%" in out
    assert "no leak: the answer 1 cannot be read off" in out and "\033" not in out
    monkeypatch.setattr(smepo, "leaks", lambda *_: True)
    mask.main(["--trace", str(path)])
    assert "LEAKS: the answer 1 can be read off" in capsys.readouterr().out


def test_mask_reads_standard_input_and_marks_hidden_spans_on_a_terminal(capsys, monkeypatch):
    text = "Sum them:\n```python\nprint(1)\nprint(2)\n```\nDone."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    mask.main(["--domain", "code"])
    out = capsys.readouterr().out
    assert "no leak: the code cannot be read off" in out
    assert re.findall("\033\\[7m([^\033]*)\033\\[0m", out) == ["print(1)\nprint(2)", "[CODE]"]


def test_a_pipe_of_windows_may_know_few_signs(monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", pipe)
    assert toys.command(lambda: print("log π")) == 0
    assert pipe.buffer.getvalue().strip() == b"log ?"


def test_mask_of_a_file_counts_leaks_spans_and_text_of_every_arm_by_hand(tmp_path, capsys):
    first = GOOD | {"teacher_ds": "a 5", "reward_model": {"ground_truth": "5"}}
    second = GOOD | {"teacher_ds": "b 6 7\nc", "reward_model": {"ground_truth": "8"}}
    mask.main(["--data", write_rows(tmp_path / "two.jsonl", [first, second])])
    out = capsys.readouterr().out.splitlines()
    table = {name: [*map(float, cells)] for name, *cells in map(str.split, out[-4:])}
    assert table["full"] == [0.5, 0, 1]
    assert table["semantic"] == [0, 1.5, round((2 / 3 + 5 / 7) / 2, 3)]
    assert table["random"][1] == 1.5 and table["random"][2] == table["semantic"][2]


def test_mask_refuses_bad_input_in_one_line(capsys):
    Path("empty.txt").write_text(" \n", encoding="utf-8")
    Path("bare.jsonl").touch()
    assert "none.txt" in refused(capsys, mask.main, "--trace", "none.txt")
    assert "arguments: --colour" in refused(capsys, mask.main, "--colour")
    assert "bare.jsonl has no rows" in refused(capsys, mask.main, "--data", "bare.jsonl")
    assert "empty.txt is empty" in refused(capsys, mask.main, "--trace", "empty.txt")
    assert "not allowed with" in refused(capsys, mask.main, "--trace", "empty.txt", "--data", "x")


# ---- export, and TRL on it -----------------------------------------------------------------------


def exported(records: list[dict], *arguments: str) -> list[dict]:
    write_rows("rows.jsonl", records)
    export.main(["--data", "rows.jsonl", "--out", "out.jsonl", *arguments])
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_export_for_trl_has_the_guide_as_an_earlier_assistant_turn(base):
    written = exported(rows("train", 16), "--format", "trl")
    for row, source in zip(written, rows("train", 16), strict=True):
        assert row["ground_truth"] == source["reward_model"]["ground_truth"]
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"]
        guide = smepo.mask_trace(source["teacher_ds"], "math", row["ground_truth"])
        prompt = smepo.build_prompt(base[1], source["question"], guide)
        settings = {"tokenize": False, "add_generation_prompt": True}
        assert base[1].apply_chat_template(row["prompt"], **settings) == prompt


def test_export_for_verl_has_its_columns_and_loses_no_row():
    written = exported(rows("train", 16), "--format", "verl", "--system", "Think.")
    for i, (row, source) in enumerate(zip(written, rows("train", 16), strict=True)):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["prompt"][0] == {"role": "system", "content": "Think."}
        assert row["reward_model"] == source["reward_model"]
        assert row["extra_info"]["index"] == i and row["data_source"] == "smepo/math"
        assert row["extra_info"]["teacher_ds"] == source["teacher_ds"]


def test_export_drops_or_keeps_what_leaks_and_counts_it(capsys):
    bare = dict(GOOD, question="Compute 2 + 1", reward_model={"style": "rule", "ground_truth": "3"})
    full = ["--format", "trl", "--guide", "full"]
    assert len(exported([GOOD, bare], *full)) == 1  # 3 is not in the second's trace
    assert "1 of 2 rows; 1 guides leak the answer (leak rate 0.500)" in capsys.readouterr().out
    assert len(exported([GOOD, bare], *full, "--leaks", "keep")) == 2


def test_export_refuses_bad_input_in_one_line_and_overwrites_nothing(capsys):
    Path("out.jsonl").touch()
    write_rows("train.jsonl", [GOOD])
    full = "--format trl --guide full --data train.jsonl --out".split()
    assert "all 1 guides leak" in refused(capsys, export.main, *full, "out.jsonl")
    assert not Path("out.jsonl").read_bytes()
    assert ".jsonl or .parquet" in refused(capsys, export.main, *full, "guided.txt")
    for data in "train.jsonl", ".":  # of a folder it trains on every train*.jsonl
        flags = [*full, "train.jsonl", "--data", data]
        assert "would be overwritten" in refused(capsys, export.main, *flags)
    assert "--what is no flag" in refused(capsys, export.main, *full, "out.jsonl", "--what")


def trl_script(folder: Path) -> Path:
    """The script of tiny_tasks/README.md, in a folder with what it reads."""
    pytest.importorskip("trl")
    page = (TASKS / "README.md").read_text(encoding="utf-8")
    script = re.search(r'```python\n("""SMEPO on TRL.*?)```', page, re.DOTALL)[1]
    (folder / "train_trl.py").write_text(script, encoding="utf-8")
    shutil.copytree(TASKS / "arithmetic/base", folder / "tiny_tasks/arithmetic/base")
    data = write_rows(folder / "rows.jsonl", rows("train", 64))
    out = str(folder / "runs/guided.jsonl")
    export.main(["--data", data, "--format", "trl", "--out", out])
    return folder / "train_trl.py"


def test_the_trl_script_of_the_readme_trains_in_two_processes(tmp_path):
    script = trl_script(tmp_path)
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    torchrun = "torch.distributed.run --standalone --nproc_per_node 2".split()
    command = [sys.executable, "-m", *torchrun, script.name]
    settings = {"cwd": tmp_path, "env": os.environ | environment, "timeout": 300}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = re.findall(r"'reward': '([\d.]+)'", done.stdout)
    assert len(logs) == 10 and sum(map(float, logs)) > 0


def test_trl_agrees_with_us_on_the_same_rollouts(tmp_path, base, monkeypatch):
    """Its advantages, loss and gradient of the first step (its epsilon is 1e-4, ours 1e-6)."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script = trl_script(tmp_path).read_text(encoding="utf-8").replace("max_steps=10", "max_steps=1")
    names = {"__name__": "train_trl"}
    torch.manual_seed(0)
    exec(compile(script, "train_trl.py", "exec"), names)
    trainer, seen = names["trainer"], {}

    def spy(name: str):
        real = getattr(trainer, name)

        def call(*arguments):
            seen.setdefault(f"{name} of", arguments)
            return seen.setdefault(name, real(*arguments))

        monkeypatch.setattr(trainer, name, call)

    spy("_generate_and_score_completions")
    spy("_compute_loss")
    trainer.train()
    batch = seen["_generate_and_score_completions"]
    (sources,) = seen["_generate_and_score_completions of"]
    model, tokenizer = smepo.load_model(TASKS / "arithmetic/base", settings())
    texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    truths = [row["ground_truth"] for row in sources]
    A = smepo.group_advantages(smepo.math_rewards(texts, truths), 8, eps=1e-4)
    assert A.abs().max() > 0.3  # else there is nothing to compare
    torch.testing.assert_close(batch["advantages"], A, atol=1e-4, rtol=0)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logprobs = smepo.token_logprobs(model, ids, attention, batch["completion_ids"].shape[1], 1.0)
    loss, _ = smepo.policy_loss(logprobs, logprobs.detach(), A, batch["completion_mask"])
    assert abs(loss.item() - seen["_compute_loss"].item()) < 1e-4
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    logged = next(record["grad_norm"] for record in trainer.state.log_history)
    assert logged == pytest.approx(norm, rel=1e-3)


# ---- compare -------------------------------------------------------------------------------------


def fake(arm: str, accuracies: list[float], seconds: float) -> dict:
    """What a run with 2 steps between points, of `seconds` each, would leave."""
    points = [dict.fromkeys("2345", accuracy / 2) | {"mean": accuracy} for accuracy in accuracies]
    result = {"arm": arm, "seed": 1, "final": points[-1], "reward": 0.5}
    points = [{"seconds": 2 * i * seconds} | point for i, point in enumerate(points)]
    return result | {"points": points, "leak_rate": 0.0, "hint_reliance": 1.0}


def test_speed_and_equal_seconds_are_told_by_hand():
    grpo = fake("grpo", [0.2, 0.3, 0.4], 1.0)  # it ends after 4 s
    # 1 s for what took GRPO 4; a seed that never gets there; one that has it late
    assert tables.times_faster(fake("smepo", [0.2, 0.45, 0.5], 0.5), grpo) == 4.0
    assert tables.times_faster(fake("smepo", [0.2, 0.3, 0.3], 0.5), grpo) is None
    assert tables.times_faster(fake("full", [0.2, 0.4, 0.4], 4.0), grpo) == 0.5
    slow = fake("smepo", [0.2, 0.6, 0.7], 1.5)  # measured after 3 and 6 s
    assert tables.when_grpo_ends(slow, grpo)["mean"] == 0.6
    assert "| smepo | 0.300 | 0.600 | 1.3 | 1.3 |" in tables.summary([grpo, slow])  # 4 s against 3
    many = [fake(arm, [0.2, 0.4], 10.0) | {"seed": n} for arm in compare.ARMS for n in range(10)]
    assert max(map(len, tables.summary(many).splitlines())) <= 100


def test_compare_trains_measures_resumes_and_refuses_other_settings(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows("train", 8))
    few = "--steps 2 --points 1 --prompts_per_step 2 --group_size 2 --max_new_tokens 8".split()
    arguments = ["--arms", "grpo,fade", "--seeds", "3-3", "--out", "c", "--jobs", "2", *few]
    arguments += ["--data", data, "--test_data", data]
    compare.main(arguments)
    shown = capsys.readouterr().out
    assert "| grpo | 1 |" in shown and "| fade | 1 |" in shown
    result = json.loads(Path("c/runs/arithmetic-fade-0.0004-2-3/result.json").read_text("utf-8"))
    assert [point["step"] for point in result["points"]] == [0, 2]
    assert (result["arm"], result["seed"]) == ("fade", 3)
    assert Path("c/summary.md").exists() and Path("c/curves.png").exists()
    before = Path("c/runs.jsonl").read_bytes()
    compare.main(arguments)  # nothing is run again
    assert Path("c/runs.jsonl").read_bytes() == before
    assert "other settings" in refused(capsys, compare.main, *arguments, "--clip_low", "0.1")
    for bad in ("--arms what", "--seeds 3-1", "--seeds=-1", "--steps 0", "--nonsense 1"):
        refused(capsys, compare.main, *bad.split())


# ---- The makers ----------------------------------------------------------------------------------


def test_what_is_shipped_is_what_the_seed_makes_without_a_problem_twice():
    for task in toys.TASKS:
        for path, content in make_tasks.files_of(task, 0).items():
            assert path.read_bytes() == content
        shipped = rows("train", task=task) + rows("test", task=task)
        assert len(shipped) == len({row["question"] for row in shipped})
        pretrain.make_tokenizer(toys.find(task)).save_pretrained("made")
        tokenizers = Path("made"), TASKS / task / "base"
        assert len({(path / "tokenizer.json").read_bytes() for path in tokenizers}) == 1


def test_pretrain_makes_a_base_that_loads_and_leaves_what_lay_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "pretrain --steps 2 --batch_size 4 --out base".split())
    monkeypatch.setattr(pretrain, "calibrate", lambda *_: {("none", 2): (0.5, 0.25)})
    Path("base").mkdir()
    Path("base/notes").touch()
    pretrain.main()
    assert "none      2  0.500     0.250" in capsys.readouterr().out
    assert smepo.load_model("base", settings())[0].num_parameters() < 250_000
    assert Path("base/notes").exists() and not list(Path("base").glob("*.new"))


def test_pretraining_does_not_teach_what_the_environment_says():
    search, told = toys.find("search"), smepo.find_domain("search").told
    tokenizer = pretrain.make_tokenizer(search)
    ids, _, labels = next(pretrain.batches(search, tokenizer, random.Random(0), 16, told))
    for row, wanted in zip(ids, labels, strict=True):
        text = tokenizer.decode(row[wanted >= 0])
        assert "information>" not in text and text.startswith("<search>")
        assert text.endswith("</answer><|end|>")


def test_a_warmed_up_model_comes_with_problems_to_train_on(base, monkeypatch):
    fresh = random_model("llama", len(base[1])), base[1]
    monkeypatch.setattr(warm_up, "load_gguf", lambda path: fresh)
    monkeypatch.setattr(sys, "argv", "warm_up --gguf a.gguf --out warm --steps 2".split())
    warm_up.main()
    paths = {"model": "warm", "data": "warm/train.jsonl", "test_data": "warm/test.jsonl"}
    assert smepo.train(settings(**paths, steps=1, eval_samples=1)).name.startswith("math-")
