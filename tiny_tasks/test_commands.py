"""The commands mask, compare and export, the makers, and the toys code and search."""

import dataclasses
import doctest
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import smepo
from smepo import Config
from tiny_tasks import compare, pretrain, tables, toys, warm_up
from tiny_tasks.coding import judge
from tiny_tasks.coding import toy as coding
from tiny_tasks.compare import Run
from tiny_tasks.fixtures import (
    GOOD,
    ROOT,
    TASKS,
    assert_same_run,
    problem,
    random_model,
    read_log,
    refused,
    rows,
    settings,
    small,
    unpadded_logprobs,
    write_rows,
)
from tiny_tasks.searching import toy as searching

# ---- mask ----------------------------------------------------------------------------------------


def mask(capsys, *arguments) -> str:
    capsys.readouterr()
    assert smepo.main(["mask", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_mask_shows_a_trace_beside_its_mask_and_the_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "trace.txt"
    path.write_text("Step 1: 7 − 6 = 1.\n\nThe answer is 1.\n", encoding="utf-8")
    out = mask(capsys, "--trace", path)
    lines = [[half.strip() for half in line.split(" |")] for line in out.splitlines()]
    assert lines[:4] == [
        ["Step 1: 7 − 6 = 1.", "Step 1: [NUMBER] − [NUMBER] ="],
        ["", "[NUMBER]."],
        ["", ""],
        ["The answer is 1.", "The answer is [NUMBER]."],
    ]
    assert "4 spans hidden, 89% of the text kept" in out
    assert "no leak: the answer 1 cannot be read off" in out and "\033" not in out


def test_mask_reads_standard_input_and_marks_hidden_spans_on_a_terminal(capsys, monkeypatch):
    text = "Sum them:\n```python\nprint(1)\nprint(2)\n```\nDone."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = mask(capsys, "--domain", "code")
    assert "no leak: the code cannot be read off" in out
    assert re.findall("\033\\[7m(.*?)\033\\[0m", out) == ["print(1)", "[CODE]", "print(2)"]


def test_mask_says_when_the_answer_can_be_read_off(tmp_path, capsys, monkeypatch):
    path = tmp_path / "trace.txt"
    path.write_text("We know n2, so n2.", encoding="utf-8")
    assert "no verdict on leaks" in mask(capsys, "--trace", path)
    monkeypatch.setattr(smepo, "leaks", lambda *_: True)
    assert "LEAKS: the answer 5 can be read off" in mask(capsys, "--trace", path, "--answer", 5)


def test_mask_of_a_file_counts_leaks_spans_and_text_of_every_arm_by_hand(tmp_path, capsys):
    lines = [
        {"q": "one", "plan": "a 5", "truth": "5"},
        {"q": "two", "plan": "b 6 7\nc", "truth": "8"},
    ]
    path = write_rows(tmp_path / "two.jsonl", lines)
    columns = ["--columns", "question=q", "trace=plan", "answer=truth"]
    _, _, *out = mask(capsys, "--data", path, *columns).splitlines()
    table = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in out[1:]}
    assert table["full"] == [0.5, 0, 1] and table["prefix"] == [0, 0, 0]
    assert table["semantic"] == [0, 1.5, round((2 / 3 + 5 / 7) / 2, 3)]
    assert table["random"][1] == 1.5 and table["random"][2] == table["semantic"][2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trace", "none.txt"], "none.txt"),
        (["--domain", "art"], "--domain art: it must be math, code, search or a module"),
        (["--colour"], "unknown flag --colour"),
        (["--data", "none.jsonl"], "none.jsonl has no rows"),
        (["--trace", "empty.txt"], "empty.txt is empty"),
        (["--trace", "empty.txt", "--data", "x"], "not allowed with"),
    ],
)
def test_mask_refuses_bad_input_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    assert message in refused(capsys, ["mask", *arguments])


def test_mask_runs_from_anywhere_even_into_a_pipe_that_knows_few_signs(tmp_path):
    """As a Windows pipe does; and the script is __main__, not the module that the command uses."""
    command, environment = (
        [sys.executable, ROOT / "smepo.py", "mask"],
        {"PYTHONIOENCODING": "cp1252"},
    )
    text, environment = "it is −5".encode(), os.environ | environment
    done = subprocess.run(command, input=text, capture_output=True, env=environment)
    assert done.returncode == 0 and b"it is [NUMBER]" in done.stdout


# ---- export, and TRL on it -----------------------------------------------------------------------


def export(data: str, *arguments: str) -> list[dict]:
    assert smepo.main(["export", "--data", data, "--out", "out.jsonl", *arguments]) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_export_for_trl_poses_the_guide_as_an_earlier_assistant_turn(tmp_path, capsys, base):
    data = write_rows(tmp_path / "rows.jsonl", rows("train", 16))
    written = export(data, "--format", "trl")
    assert "16 of 16 rows; 0 guides leak" in capsys.readouterr().out
    for row, source in zip(written, rows("train", 16), strict=True):
        assert row["ground_truth"] == source["reward_model"]["ground_truth"]
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"]
        guide = smepo.mask_trace(source["teacher_ds"], "math", row["ground_truth"])
        prompt = smepo.build_prompt(base[1], source["question"], guide)
        settings = {"tokenize": False, "add_generation_prompt": True}
        assert base[1].apply_chat_template(row["prompt"], **settings) == prompt


def test_export_for_verl_has_its_columns_and_loses_no_row(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows("train", 16))
    written = export(data, "--format", "verl", "--system", "Think.")
    for i, (row, source) in enumerate(zip(written, rows("train", 16), strict=True)):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["prompt"][0] == {"role": "system", "content": "Think."}
        assert row["reward_model"] == source["reward_model"]
        assert row["extra_info"]["index"] == i and row["data_source"] == "smepo/math"
        assert row["extra_info"]["teacher_ds"] == source["teacher_ds"]


TESTS = json.dumps({"inputs": ["2 3\n"], "outputs": ["5\n"]})
CODE = "Read both numbers.\n\n```python\na, b = map(int, input().split())\nprint(a + b)\n```"
FRACTION = "Divide: $3/6 = \\frac{1}{2}$. So \\boxed{\\frac{1}{2}}."
MASKED = "Divide: $[NUMBER]/[NUMBER] = \\frac{[NUMBER]}{[NUMBER]}$. So \\boxed{[ANSWER]}."


@pytest.mark.parametrize(
    "domain, truth, trace, shown",
    [
        ("math", "\\frac{1}{2}", FRACTION, MASKED),
        ("code", TESTS, CODE, "Read both numbers.\n\n```python\n[CODE]\n```"),
    ],
)
def test_official_rows_round_trip_through_load_mask_and_export(
    tmp_path, domain, truth, trace, shown
):
    row = {
        "data_source": "official",
        "question": f"A {domain} problem.",
        "ability": domain,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "teacher_ds": trace,
        "extra_info": {"index": 7, "split": "train"},
    }
    path = str(tmp_path / "official.parquet")
    datasets.Dataset.from_list([row] * 3).to_parquet(path)
    arguments = ["export", "--format", "verl", "--domain", domain, "--data", path]
    assert smepo.main([*arguments, "--out", "out.parquet"]) == 0
    written = datasets.Dataset.from_parquet("out.parquet")
    assert len(written) == 3
    for out in written:
        system, question, guide = out["prompt"]
        assert system["content"] == smepo.find_domain(domain).system
        assert question["content"] == row["question"]
        assert guide["content"] == "Here is an example solution:\n" + shown
        assert out["reward_model"] == row["reward_model"]
        assert out["extra_info"]["teacher_ds"] == trace


def test_export_drops_or_keeps_what_leaks_and_counts_it(tmp_path, capsys):
    bare = dict(GOOD, question="Compute 2 + 1", reward_model={"style": "rule", "ground_truth": "3"})
    data = write_rows(tmp_path / "leaky.jsonl", [GOOD, bare])  # 3 is not in the second's trace
    full = ["--format", "trl", "--guide", "full"]
    assert len(export(data, *full)) == 1
    assert "1 of 2 rows; 1 guides leak the answer (leak rate 0.500)" in capsys.readouterr().out
    assert len(export(data, *full, "--leaks", "keep")) == 2
    before = Path("out.jsonl").read_bytes()
    data = write_rows(tmp_path / "all.jsonl", [GOOD])
    again = ["export", *full, "--data", data, "--out"]
    assert "all 1 guides leak" in refused(capsys, [*again, "out.jsonl"], running=True)
    assert Path("out.jsonl").read_bytes() == before
    assert ".jsonl or .parquet" in refused(capsys, [*again, "guided.txt"])
    assert "unknown flag --what" in refused(capsys, [*again, "out.jsonl", "--what"])


def trl_script(folder: Path) -> Path:
    """The script of a README, in a folder with what it reads."""
    pages = [(folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, TASKS)]
    script = re.search(r'```python\n("""SMEPO on TRL.*?)```', "".join(pages), re.DOTALL)[1]
    assert len(script.splitlines()) <= 50
    (folder / "train_trl.py").write_text(script, encoding="utf-8")
    shutil.copytree(TASKS / "arithmetic/base", folder / "tiny_tasks/arithmetic/base")
    data = write_rows(folder / "rows.jsonl", rows("train", 64))
    out = str(folder / "runs/guided.jsonl")
    assert smepo.main(["export", "--data", data, "--format", "trl", "--out", out]) == 0
    return folder / "train_trl.py"


def test_the_trl_script_of_the_readme_trains_in_two_processes(tmp_path):
    pytest.importorskip("trl")
    script = trl_script(tmp_path)
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    torchrun = "torch.distributed.run --standalone --nproc_per_node 2".split()
    command = [sys.executable, "-m", *torchrun, script.name]
    settings = {"cwd": tmp_path, "env": environment, "timeout": 300}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = re.findall(r"'reward': '([\d.]+)'", done.stdout)
    assert len(logs) == 10 and sum(map(float, logs)) > 0


def test_trl_agrees_with_us_on_the_same_rollouts(tmp_path, base, monkeypatch):
    """Its advantages, loss and gradient of the first step (its epsilon is 1e-4, ours 1e-6)."""
    pytest.importorskip("trl")
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


def fake(arm: str, seed: int, accuracies: list[float], seconds: float, **changes) -> Run:
    """What a run with 2 steps between points, of `seconds` each, would leave."""
    steps, levels = 2 * (len(accuracies) - 1), dict.fromkeys("2345", 0.1)
    curve = {"reward": 0.5, "zero_variance_wrong": 0.7, "zero_variance_right": 0.2, "leak_rate": 0}
    run = Run("arithmetic", arm, seed, steps, 2, 2e-4, copy_rate=0.5)
    run.curve = {name: [value] * steps for name, value in curve.items()}
    for i, accuracy in enumerate(accuracies):
        point = {"step": 2 * i, "seconds": 2 * i * seconds}
        run.points.append(point | {"accuracy": levels | {"mean": accuracy}})
    run.final = {"pass@1": levels | {"mean": accuracies[-1]}, "pass@8": {"mean": 0.9}}
    return dataclasses.replace(run, **changes)


def test_speed_is_told_of_every_seed_by_hand():
    grpo = [fake("none", 1, [0.2, 0.3, 0.4], 1.0), fake("none", 2, [0.2, 0.3, 0.6], 1.0)]
    ours = [fake("semantic", 1, [0.2, 0.45, 0.5], 0.5), fake("semantic", 2, [0.2, 0.3, 0.5], 2.0)]
    # seed 1 takes 1 s for what took GRPO 4; seed 2 never gets there, and counts as 0
    assert tables.speed(ours, grpo, "mean") == ["2, –", "1, –", "2.00", "1 of 2"]
    assert tables.speed(grpo, grpo, "mean") == ["4, 4", "4, 4", "1.00", "0 of 2"]
    slow = [fake("full", 1, [0.4, 0.4, 0.4], 4.0)]  # from the start, so at the first evaluation
    assert tables.speed(slow, grpo, "mean") == ["2", "8", "0.50", "0 of 1"]
    lucky = [fake("full", 1, [0.2, 0.45, 0.3], 1.0)]  # a point that it does not hold
    assert tables.speed(lucky, grpo, "mean") == ["–", "–", "0.00", "0 of 1"]
    grpo[0].final["pass@1"]["mean"] = 0.7  # no point of its curve is: then at its end
    assert tables.speed(grpo[:1], grpo, "mean")[:3] == ["4", "4", "1.00"]


def test_equal_seconds_by_hand():
    grpo = [fake("none", 1, [0.2, 0.3, 0.4], 1.0), fake("none", 2, [0.2, 0.3, 0.4], 1.0)]
    ours = [fake("semantic", 1, [0.2, 0.6, 0.7], 1.5), fake("semantic", 2, [0.2, 0.3, 0.9], 1.0)]
    # GRPO ends after 4 s; seed 1 is measured after 3 and 6 s, seed 2 after 2 and 4
    assert tables.when_grpo_ends(ours, grpo, "mean") == ["0.750 ± 0.150", "2 of 2"]
    assert tables.when_grpo_ends(grpo, grpo, "mean") == ["0.400 ± 0.000", "0 of 2"]


def test_sweep_tells_speed_by_the_success_of_the_base(tmp_path):
    kinds = {}
    for k in (2, None):
        ours = [0.2, 0.4, 0.5] if k else [0.2] * 3
        for arm, accuracies in (("none", [0.2, 0.3, 0.4]), ("semantic", ours)):
            runs = [fake(arm, seed, accuracies, 1.0, k=k) for seed in (1, 2)]
            kinds.setdefault(f"k = {k}" if k else "the mix", []).extend(runs)
    text = tables.sweep(kinds)
    ends = "semantic | 0.100 ± 0.000"
    assert f"| k = 2 | 0.100 | {ends} | 0.500 ± 0.000 | 2.00 | 2 of 2 |" in text
    assert f"| the mix | 0.100 | {ends} | 0.200 ± 0.000 | 0.00 | 0 of 2 |" in text
    pytest.importorskip("matplotlib")
    compare.draw("sweep", kinds, tmp_path)
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_learning_rates_are_tabulated_by_arm():
    tried = ((1e-4, 0.3), (2e-4, 0.5))
    runs = [fake("full", 101, [0.2, end], 1.0, learning_rate=rate) for rate, end in tried]
    text = tables.rates(runs)
    assert "| full | 0.0001 | 0.100 | 0.300 |\n| full | 0.0002 | 0.100 | 0.500 |" in text


def test_rates_are_tried_in_a_folder_of_their_own(monkeypatch):
    places = []  # else their seeds would enter the next report
    monkeypatch.setattr(compare, "run_all", lambda runs, out, jobs: places.append(out))
    tried = fake("none", 101, [0.2, 0.3], 1.0)
    monkeypatch.setattr(compare, "read_result", lambda path: tried)
    assert smepo.main(["compare", "--rates", "1e-4", "--arms", "none", "--seeds", "1"]) == 0
    assert places == [Path("runs/compare/rates").resolve()]


def test_mean_error_by_hand():
    assert tables.mean_error([1.0, 2.0, 3.0]) == "2.000 ± 0.577"  # 1 / sqrt 3
    assert tables.mean_error([1.0]) == "1.000" and tables.mean_error([None]) == "–"
    assert tables.mean_error([1.0, None], 1) == "1.0"


def test_plan_of_quick_rates_and_sweep():
    quick = compare.plan(compare.parse(["--quick"]))
    assert [run.arm for run in quick] == ["none", "full", "semantic", "on-failure"]
    assert {run.seed for run in quick} == {1}
    rates = compare.plan(compare.parse(["--rates", "1e-4,1e-3", "--arms", "none", "--seeds", "2"]))
    tried = [(seed, rate) for seed in (101, 102) for rate in (1e-4, 1e-3)]
    assert [(run.seed, run.learning_rate) for run in rates] == tried
    given = ["--rates", "1e-3,0.001", "--arms", "none,none", "--seeds", "1"]
    assert len(compare.plan(compare.parse(given))) == 1  # no folder has two runs
    sweep = compare.plan(compare.parse(["--sweep", "--seeds", "4-5"]))
    assert {run.k for run in sweep} == {None, 2, 3, 4, 5} and {run.seed for run in sweep} == {4, 5}
    everything = compare.plan(compare.parse(["--steps", "9", "--points", "3"]))
    runs = [*quick, *rates, *sweep, *everything]
    assert len({run.folder() for run in runs}) == len(runs)
    for run in everything:
        assert run.eval_every == 3 and run.level() == "5"
        best = compare.RATES["arithmetic"].get(run.arm, Config.learning_rate)
        assert run.learning_rate == best


def test_a_run_keeps_what_the_tables_need_and_a_killed_one_ends_the_same(monkeypatch):
    load = smepo.load_problems  # only every 50th problem, so that it takes a second
    monkeypatch.setattr(smepo, "load_problems", lambda *given, **named: load(*given, **named)[::50])
    run = Run("arithmetic", "on-failure", 3, 2, 1, 2e-4)
    compare.run_one(run)
    config = json.loads((run.folder() / "config.json").read_text(encoding="utf-8"))
    assert config["guide_when"] == "on-failure" and config["seed"] == 3
    result = json.loads((run.folder() / "result.json").read_text(encoding="utf-8"))
    assert Run(**result) == run
    assert set(run.curve) == set(compare.KEPT) and len(run.curve["reward"]) == 2
    assert [point["step"] for point in run.points] == [0, 1, 2]
    assert 0 == run.points[0]["seconds"] < run.points[1]["seconds"] < run.points[2]["seconds"]
    assert list(run.final["pass@8"]) == ["2", "3", "4", "5", "mean"]
    assert 0 <= run.copy_rate <= 1
    again = Run("arithmetic", "on-failure", 3, 2, 1, 2e-4)
    compare.run_one(again)  # killed after the last checkpoint: it is not trained again
    assert again == run


def test_hint_reliance_is_the_mean_difference_of_sequence_logprobs(base):
    p = problem(base)
    torch.manual_seed(0)
    value = compare.hint_reliance(*base, [p] * 20, settings())
    torch.manual_seed(0)
    differences = []
    for rollout in smepo.rollout(*base, [p] * 20, [True] * 20, settings()):
        if rollout.reward:
            alone = dataclasses.replace(rollout, prompt_ids=p.question_ids)
            sums = [unpadded_logprobs(base[0], one).sum().item() for one in (rollout, alone)]
            differences.append(sums[0] - sums[1])
    assert value == pytest.approx(sum(differences) / len(differences), abs=1e-3)
    hopeless = dataclasses.replace(p, answer="none")  # no right rollout, so nothing to average
    assert compare.hint_reliance(*base, [hopeless], settings()) is None


def test_finished_runs_are_not_repeated_and_the_summary_comes_from_their_files(capsys):
    flags = ["--arms", "none,semantic", "--seeds", "2", "--steps", "4", "--points", "2"]
    for run in compare.plan(compare.parse(flags)):
        known = fake(run.arm, run.seed, [0.2, 0.3, 0.5], 1.0, learning_rate=run.learning_rate)
        folder = Path("runs/compare") / run.folder()
        folder.mkdir(parents=True)
        compare.save(json.dumps(dataclasses.asdict(known)), folder / "result.json")
    lonely = fake("semantic", 3, [0.2, 0.3, 0.5], 1.0, learning_rate=4e-4)  # GRPO has no seed 3
    folder = Path("runs/compare") / lonely.folder()
    folder.mkdir()
    compare.save(json.dumps(dataclasses.asdict(lonely)), folder / "result.json")
    flags[1] = "none"  # what else the folder holds is in the tables all the same
    assert smepo.main(["compare", *flags]) == 0
    summary = Path("runs/compare/summary.md").read_text(encoding="utf-8")
    assert summary in capsys.readouterr().out and "| semantic | 0.500 ± 0.000 |" in summary
    assert len(Path("runs/compare/runs.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert "0 of 2 |" in summary and " of 3 |" not in summary
    pytest.importorskip("matplotlib")
    for name in ("learning.png", "compare.png"):
        assert Path("runs/compare", name).stat().st_size > 0


def test_a_run_that_fails_ends_the_command_with_its_one_line(tmp_path):
    (run, *_) = compare.plan(compare.parse(["--quick"]))
    folder = tmp_path / "runs/compare" / run.folder()
    folder.mkdir(parents=True)
    settings = dataclasses.asdict(Config(name=run.folder().name, seed=9))
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, ROOT / "smepo.py", "compare", "--quick", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "smepo.py: runs/" in done.stderr.replace("\\", "/") and "holds a run" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arms", "none,magic"], "unknown arm magic: take some of none, full"),
        (["--seeds", "0"], "--seeds: invalid list_of_seeds value: '0'"),
        (["--seeds", "7-3"], "--seeds: invalid list_of_seeds value: '7-3'"),
        (["--steps", "0"], "--steps: invalid at_least_1 value: '0'"),
        (["--rates", "fast"], "--rates: invalid list_of_rates value: 'fast'"),
        (["--sweep", "--arms", "semantic"], "add none to --arms"),
        (["--what"], "unknown flag --what"),
        (["--quick", "--sweep"], "not allowed with"),
    ],
)
def test_compare_refuses_bad_input_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, ["compare", *arguments])
    assert not Path("runs").exists()


def test_help_and_mask_do_not_wait_for_torch(tmp_path):
    trace = tmp_path / "trace.txt"
    trace.write_text("Step 1: 1 + 1 = 2.", encoding="utf-8")
    for arguments in (["--help"], ["mask", "--trace", trace]):
        command = [sys.executable, "-X", "importtime", ROOT / "smepo.py", *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 0 and "argparse" in done.stderr
        assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


# ---- The makers ----------------------------------------------------------------------------------


def test_make_tasks_reproduces_the_shipped_files():
    command = [sys.executable, "-m", "tiny_tasks.make_tasks", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


def test_pretrain_makes_a_base_that_loads_and_calibrates_it(tmp_path, capsys, monkeypatch):
    flags = ["--steps", "2", "--batch_size", "4", "--out", str(tmp_path / "base")]
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    monkeypatch.setattr(pretrain, "calibrate", lambda *_: {("none", 2): (0.5, 0.25)})
    (tmp_path / "base").mkdir()
    write_rows(tmp_path / "base" / "notes.jsonl", [GOOD])
    assert toys.command(pretrain.main) == 0
    assert "none      2  0.500     0.250" in capsys.readouterr().out
    model, _ = smepo.load_model(tmp_path / "base", settings())
    assert model.num_parameters() < 250_000
    assert smepo.read_records(tmp_path / "base" / "notes.jsonl") == [GOOD]  # what lay there stays
    assert not list((tmp_path / "base").glob("*.new"))
    monkeypatch.setattr(sys, "argv", ["pretrain", "--calibrate", "--out", str(tmp_path / "none")])
    assert toys.command(pretrain.main) == 2
    assert capsys.readouterr().err.startswith("cannot load --model ")


def test_a_warmed_up_model_comes_with_problems_to_train_on(tmp_path, base, monkeypatch):
    fresh = random_model("llama", len(base[1])), base[1]
    monkeypatch.setattr(warm_up, "load_gguf", lambda path: fresh)
    command = ["warm_up", "--gguf", "a.gguf", "--out", str(tmp_path / "warm"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    warm_up.main()
    paths = [str(tmp_path / "warm" / name) for name in ("", "train.jsonl", "test.jsonl")]
    config = settings(model=paths[0], data=paths[1], test_data=paths[2], steps=1, eval_samples=1)
    assert smepo.train(config).name == "warm-semantic"
    rng = random.Random(0)
    examples = [warm_up.draw_example(rng) for _ in range(200)]
    assert 80 <= sum(guide == "" for _, guide, _ in examples) <= 120
    for question, guide, trace in examples:
        assert not toys.is_held_out(question) and trace.startswith("Step 1: ")
        assert guide in ("", trace, smepo.mask_trace(trace, "math"))


def test_pretraining_does_not_teach_what_the_environment_says():
    tokenizer = pretrain.make_tokenizer(searching)
    told = smepo.find_domain("search").told
    ids, _, labels = next(pretrain.batches(searching, tokenizer, random.Random(0), 16, told))
    for row, wanted in zip(ids, labels, strict=True):
        text = tokenizer.decode(row[wanted >= 0])
        assert "information>" not in text and text.startswith("<search>")
        assert text.endswith("</answer><|end|>")
        assert torch.equal(row[wanted >= 0], wanted[wanted >= 0])


# ---- The toys code and search --------------------------------------------------------------------


@pytest.mark.parametrize("toy", [coding, searching], ids=["code", "search"])
def test_the_examples_in_the_docstrings_hold(toy):
    results = doctest.testmod(toy)
    assert results.failed == 0 and results.attempted > 0


@pytest.mark.parametrize("task, hidden", [("code", "[CODE]"), ("search", "[ENTITY]")])
def test_no_test_problem_is_pretrained_on_and_the_tokenizer_round_trips(task, hidden):
    toy, room, rng = toys.find(task), smepo.TOYS[task], random.Random(0)
    drawn = [toy.draw_example(rng) for _ in range(2000)]
    train, test = (
        {row["question"] for row in rows(split, room=room)} for split in ("train", "test")
    )
    assert all(map(toys.is_held_out, test))
    assert not any(map(toys.is_held_out, {example[0] for example in drawn} | train))
    assert any(hidden in guide for _, guide, _ in drawn)
    tokenizer = AutoTokenizer.from_pretrained(TASKS / room / "base")
    for text in {text for example in drawn[:500] for text in example}:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_the_tests_of_the_code_toy_catch_every_wrong_line():
    rng = random.Random(0)
    for _ in range(200):
        plan = coding.draw_problem(rng, 5)
        question = coding.question_of(plan)
        assert coding.problem_of(question) == plan
        truth = json.loads(coding.unit_tests(question, plan))
        for i in range(5):
            lines = [*plan[:i], coding.wrong(rng, plan[i]), *plan[i + 1 :]]
            printed = [str(coding.run(lines, int(x))) for x in truth["inputs"]]
            if printed == truth["outputs"]:  # then it prints the same for any input
                assert all(coding.run(lines, x) == coding.run(plan, x) for x in range(-99, 99))


@pytest.mark.parametrize("task, easy", [("code", (0.4, 0.7)), ("search", (0.4, 0.65))])
def test_calibration_of_the_shipped_bases(task, easy, monkeypatch):
    """They are careless, cannot plan five steps alone, follow a plan, and copy."""
    monkeypatch.setattr(judge, "SECONDS", 9.0)  # a busy machine fails no test
    room, config = TASKS / smepo.TOYS[task], settings(task=task)
    base = smepo.load_model(room / "base", config)
    table = pretrain.calibrate(toys.find(task), *base, config, count=100)
    assert easy[0] <= table["none", 2][0] <= easy[1]
    assert table["none", 5][0] <= 0.06
    assert table["semantic", 5][0] >= 0.10
    assert table["full", 5][0] >= 0.85
    assert table.get(("altered", 5), (1, 0))[0] >= 0.85  # a program is copied, whatever its plan
    assert sum(path.stat().st_size for path in (room / "base").iterdir()) <= 2**20


def test_a_run_on_search_resumes_bit_equal_and_shows_whole_dialogues(tmp_path):
    config = small(tmp_path, "searching", task="search", mini_batches=2, steps=3, save_every=1)
    config = dataclasses.replace(config, guide_when="on-failure", aggregation="token")
    whole = smepo.train(dataclasses.replace(config, name="whole"))
    smepo.train(dataclasses.replace(config, name="parts", steps=2))
    parts = smepo.train(dataclasses.replace(config, name="parts", resume=True))
    assert_same_run(whole, parts)
    _, *steps = read_log(whole / "metrics.jsonl")
    assert all(step["leak_rate"] == 0 and math.isfinite(step["entropy"]) for step in steps)
    rollouts = read_log(whole / "rollouts.jsonl")
    talks = [record["completion"] for record in rollouts]
    assert sum("</information>\n<search>" in text for text in talks) > len(talks) / 2
    assert any("[ENTITY]" in record["guide"] for record in rollouts)
