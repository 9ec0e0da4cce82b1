"""The command show: one training step by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import smepo
from tiny_tasks import show, toys
from tiny_tasks.fixtures import rows, unpadded_logprobs, write_rows


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, show.Step]:
    """One step of each task."""
    taken = {}
    for task in toys.TASKS:
        data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows("train", 12, task))
        config = smepo.Config(task=task, data=data, test_data=data, device="cpu")
        taken[task] = show.take_step(config)
    return taken


def table_of(step: show.Step, title: str) -> list[list]:
    """The rows of the section, without the header."""
    (section,) = (one for one in show.explain(step) if title in one.title)
    return section.table[1:]


@pytest.mark.parametrize("task", toys.TASKS)
def test_the_text_fits_100_columns_and_marks_on_a_pipe_and_the_page(
    steps, task, monkeypatch, capsys
):
    monkeypatch.setattr(show, "take_step", lambda config: steps[task])
    show.main(["--html", "page.html"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "«[" in out and "««" not in out and "\033" not in out
    assert steps[task].rollouts[0].problem.question in " ".join(out.split())
    page = Path("page.html").read_text(encoding="utf-8")
    assert "The page is page.html" in out and "<h1>" in page and "guide_trace   " in page
    assert "<b class=" in page and "<script" not in page


@pytest.mark.parametrize("task", toys.TASKS)
def test_advantages_are_told_from_the_rewards_and_sum_to_0(steps, task):
    step = steps[task]
    rewards = [r.reward for r in step.rollouts]
    table = table_of(step, "a group")
    assert [row[1] for row in table] == rewards
    assert [row[3] for row in table] == smepo.group_advantages(rewards, 8).tolist()
    assert sum(row[2] for row in table) == 0
    assert sum(row[3] for row in table) == pytest.approx(0, abs=1e-5)


def test_the_shares_sum_to_the_loss_of_the_rollout_after_the_step(steps):
    step = steps["search"]  # where an environment told some tokens: these have none
    i = max(range(8), key=lambda i: step.rollouts[i].advantage)
    r = step.rollouts[i]
    table = [row for row in table_of(step, "token by token") if row[2] != "told"]
    assert len(table) == sum(r.sampled) < len(r.sampled)
    before, after = torch.tensor([step.before[i]]), torch.tensor([step.after[i]])
    sampled, A = torch.tensor([r.sampled]), torch.tensor([r.advantage])
    loss, _ = smepo.policy_loss(after, before, A, sampled)
    assert sum(row[6] for row in table) == pytest.approx(float(loss / 8))
    assert {"yes", "no"} >= {row[5] for row in table} and len({row[4] for row in table}) > 1


def test_the_bare_question_gives_another_probability(steps, base):
    step = steps["arithmetic"]
    (prompt,) = (one for one in show.explain(step) if one.title == "Prompt c")
    guided = sum(step.before[0])
    assert f"{guided:.3g}, but log π_old(o|x) = {step.bare:.3g}" in prompt.notes[1]
    r = step.rollouts[0]
    unguided = replace(r, prompt_ids=r.problem.prompts[False])
    assert step.bare == pytest.approx(unpadded_logprobs(base[0], unguided).sum().item(), abs=1e-4)
    assert abs(guided - step.bare) > 0.1


def test_a_full_trace_shows_its_slide_and_no_guide_no_sentence_about_guides(capsys):
    data = write_rows("rows.jsonl", rows("train", 12))
    flags = ["--data", data, "--test_data", data, "--device", "cpu"]
    show.main(["--guide", "full", *flags])
    out = capsys.readouterr().out
    assert "the 8 rewards is 1;" in out and "all A are 0: no gradient" in out
    assert "nothing to teach" not in out
    show.main(["--guide", "none", *flags, "--html", "page.html"])
    for text in capsys.readouterr().out, Path("page.html").read_text(encoding="utf-8"):
        assert "guide" not in text.lower() and "Trace" not in text
