"""The command show: one step by hand."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import smepo
from tiny_tasks import show
from tiny_tasks.show import Section, Step

ROOMS = Path(show.__file__).parent
VOID = {"meta"}  # elements without an end


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """A few problems of each task."""
    paths = {}
    for task, room in smepo.TOYS.items():
        lines = (ROOMS / room / "train.jsonl").read_text(encoding="utf-8").splitlines(True)
        path = tmp_path_factory.mktemp("data") / f"{task}.jsonl"
        path.write_text("".join(lines[:12]), encoding="utf-8")
        paths[task] = str(path)
    return paths


@pytest.fixture(scope="module")
def steps(data) -> dict[str, Step]:
    """One step of each task."""
    taken = {}
    for task, path in data.items():
        config = smepo.Config(task=task, data=path, device="cpu")
        taken[task] = show.take_step(config)
    return taken


def table_of(step: Step, title: str) -> list[list]:
    """The rows of the section, without the header."""
    (section,) = (one for one in show.explain(step) if title in one.title)
    return section.table[1:]


def chosen(step: Step) -> int:
    (section,) = (one for one in show.explain(step) if "token by token" in one.title)
    return int(section.title.split()[1].strip(",")) - 1


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert smepo.main(["show", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert smepo.main(["show", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("task", smepo.TOYS)
def test_the_text_fits_100_columns(steps, task, monkeypatch, capsys):
    monkeypatch.setattr(show, "take_step", lambda config: steps[task])
    out = printed(capsys, "--task", task)
    assert max(map(len, out.splitlines())) <= 100
    assert not re.search(f"[\033{show.SIGNS}]", out)
    assert steps[task].rollouts[0].problem.question in " ".join(out.split())


@pytest.mark.parametrize("task", smepo.TOYS)
def test_a_row_for_each_rollout_with_the_advantage_of_group_advantages(steps, task):
    step = steps[task]
    rewards = [r.reward for r in step.rollouts]
    table = table_of(step, "a group")
    assert [row[1] for row in table] == rewards
    assert [row[2] for row in table] == smepo.group_advantages(rewards, 8).tolist()


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("task", smepo.TOYS)
def test_the_shares_sum_to_the_loss_of_the_rollout(steps, task, aggregation):
    i = chosen(steps[task])
    group = [replace(r, sampled=r.sampled[:9]) for r in steps[task].rollouts]  # of other lengths
    group[i] = steps[task].rollouts[i]
    config = replace(steps[task].config, aggregation=aggregation)
    step = replace(steps[task], config=config, rollouts=group)
    r, sampled = step.rollouts[i], torch.tensor([step.rollouts[i].sampled])
    table = [row for row in table_of(step, "token by token") if row[2] != "told"]
    before, after = torch.tensor([step.before[i]]), torch.tensor([step.after[i]])
    weight = 1 / 8
    if aggregation == "token":
        weight = sampled.sum() / sum(sum(other.sampled) for other in step.rollouts)
    for new, column in (before, 5), (after, 9):
        loss, stats = smepo.policy_loss(new, before, torch.tensor([r.advantage]), sampled)
        assert sum(row[column] for row in table) == pytest.approx(float(loss * weight))
        clipped = [row[column - 1] == "yes" for row in table]
        assert sum(clipped) / len(clipped) == pytest.approx(stats["clip_fraction"].item())


def test_the_ratio_is_1_in_the_step_and_not_after_it(steps):
    table = table_of(steps["arithmetic"], "token by token")
    assert {row[3] for row in table} == {1.0}
    assert len({row[7] for row in table}) > 1


@pytest.mark.parametrize("task", smepo.TOYS)
def test_the_probability_of_the_chosen_one_moves_with_its_advantage(steps, task):
    step = steps[task]
    row = table_of(step, "The loss")[chosen(step)]
    old, new = row[4:6]
    assert row[1] > 0 and new > old
    assert new / old == pytest.approx(row[6])
    falling = [row for row in table_of(step, "The loss") if row[1] < 0 and row[6] < 1]
    assert len(falling) > len(step.rollouts) / 2


def test_the_log_probabilities_are_those_of_the_policy_before_and_after(steps):
    step = steps["arithmetic"]
    model, _ = smepo.load_model(step.config.model, step.config)
    for r, before, after in zip(step.rollouts, step.before, step.after, strict=True):
        logits = model(torch.tensor([r.prompt_ids + r.ids])).logits[0, -len(r.ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(len(r.ids)), r.ids]
        assert before == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert before != after


def test_what_an_environment_told_has_no_loss(steps):
    step = steps["search"]
    r = step.rollouts[chosen(step)]
    table = table_of(step, "token by token")
    assert [int(row[2] != "told") for row in table] == r.sampled
    assert 0 in r.sampled


def test_problems_without_a_signal_are_passed_over_aloud(data, monkeypatch):
    config = smepo.Config(data=data["arithmetic"], device="cpu")
    policy = smepo.load_model(config.model, config)
    collect, count = smepo.collect_rollouts, iter(range(99))

    def first_all_wrong(*inputs):
        rollouts, sampled = collect(*inputs)
        if next(count) == 0:
            for r in rollouts:
                r.reward = 0.0
        return rollouts, sampled

    monkeypatch.setattr(smepo, "collect_rollouts", first_all_wrong)
    rollouts, skipped = show.find_group(*policy, config)
    assert len({r.reward for r in rollouts}) == 2
    assert "all 8 rollouts earn 0, so every advantage is 0" in skipped[0]
    monkeypatch.setattr(smepo, "group_advantages", lambda *_: torch.zeros(8))
    with pytest.raises(smepo.UserError, match="take another --seed"):
        show.find_group(*policy, config)


def test_colours_are_for_a_terminal_alone(steps, monkeypatch, capsys):
    monkeypatch.setattr(show, "take_step", lambda config: steps["arithmetic"])
    assert "\033" not in printed(capsys)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = printed(capsys)
    assert "\033[7m[NUMBER]\033[0m" in out
    truth = steps["arithmetic"].rollouts[0].problem.answer
    assert f"The answer is \033[1;32m{truth}\033[0m." in " ".join(out.split())
    assert "\033[1;31m" in out


@pytest.mark.parametrize("task", ["code", "search"])
def test_what_the_verifier_reads_is_marked(steps, task):
    for r in steps[task].rollouts:
        sign = show.RIGHT if r.reward else show.WRONG
        place = f"{sign}int(input()){show.END}"
        if task == "search":
            place = f"<answer>{sign}{smepo.stated(r.text)}{show.END}</answer>"
        assert place in show.mark_rewarded(r, task)


def test_a_rollout_that_was_cut_off_has_stated_nothing(steps):
    r = replace(steps["arithmetic"].rollouts[0], ended=False)
    marked = show.mark_rewarded(r, "math")
    assert marked.endswith("(cut off)")
    assert show.RIGHT not in marked and show.WRONG not in marked


class Reader(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.names, self.text = [], set(), ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_text_says_and_has_no_script(steps, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(show, "take_step", lambda config: steps["search"])
    out = printed(capsys, "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader(page)
    assert "script" not in reader.names and not re.search(r"(?:src|href|on\w+)=", page)
    for section in show.explain(steps["search"]):
        for text in (section.title, *section.notes):
            assert text in reader.text
            assert "".join(text.split()) in "".join(out.split())
        for row in section.table:
            for cell in show.as_cells(row):
                cell = re.sub(f"[{show.SIGNS}]", "", cell)
                assert cell in reader.text
                assert "".join(cell.split()) in "".join(out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_escapes_what_it_shows():
    hostile = "<script>alert(1)</script> & \"'"
    page = show.as_page([Section(hostile, [hostile], [[hostile, 1.0]])])
    reader = Reader(page)
    assert "script" not in reader.names
    assert reader.text.count(hostile) == 3


def test_no_text_can_steer_the_terminal_or_forge_a_mark():
    assert show.mark(f"a\033[2Jb{show.WRONG}c\nd") == "a [2Jb c\nd"


def test_errors_are_one_line(capsys):
    assert "unknown flag --fast" in refused(capsys, "--fast")
    assert "--group_size 1: it must be" in refused(capsys, "--group_size", "1")
    assert "invalid choice: 'chess'" in refused(capsys, "--task", "chess")
    assert "--html no/page.html: name a file" in refused(capsys, "--html", "no/page.html")
    assert "--html .: name a file" in refused(capsys, "--html", ".")
    assert "no.jsonl" in refused(capsys, "--data", "no.jsonl")


def test_the_seed_picks_the_problem_that_the_training_begins_with(data):
    questions = set()
    for seed in (0, 1, 2):
        config = smepo.Config(data=data["arithmetic"], seed=seed, device="cpu")
        step = show.take_step(config)
        again = show.take_step(config)
        assert [r.ids for r in step.rollouts] == [r.ids for r in again.rollouts]
        assert step.after == again.after
        questions.add(step.rollouts[0].problem.question)
    assert len(questions) > 1
