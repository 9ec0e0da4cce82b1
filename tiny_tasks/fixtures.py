"""What the tests share: a scratch folder, the shipped base, small settings, groups of rollouts.

`.pytest.ini` loads this file as a plugin, so its fixtures are there in every test; its functions
are imported by name.
"""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import smepo
from smepo import Config, Problem, Rollout

ROOT = Path(smepo.__file__).resolve().parent
TASKS = ROOT / "tiny_tasks"
TRACE = "Step 1: 3 * 5 = 15.\nStep 2: 7 - 6 = 1.\nStep 3: 1 + 15 = 16.\nThe answer is 16."
GOOD = {  # a row in the schema of the official data
    "question": "Compute 1 + 1",
    "teacher_ds": "Step 1: 1 + 1 = 2.\nThe answer is 2.",
    "reward_model": {"style": "rule", "ground_truth": "2"},
}


def pytest_load_initial_conftests(early_config, args: list[str]):
    """A worker for each of two cores where pytest-xdist is installed; `-n 0` takes none."""
    if early_config.pluginmanager.hasplugin("xdist"):
        args[:] = ["-n", "auto", "--maxprocesses", "2", *args]


@pytest.fixture(scope="session", autouse=True)
def cache_of_datasets(tmp_path_factory):
    """What `datasets` keeps of the files that tests write goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    """Every test writes its runs/ to a folder of its own; nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def base():
    """Model and tokenizer of the arithmetic task; for tests that leave them as they are."""
    return smepo.load_model(TASKS / "arithmetic" / "base", settings())


@pytest.fixture
def fresh_base(base):
    """The same, for tests that train them."""
    return copy.deepcopy(base)


def rows(split: str, count: int | None = None, task: str = "arithmetic") -> list[dict]:
    """The first rows of a task's data."""
    return smepo.read_records(TASKS / task / f"{split}.jsonl")[:count]


def masker_cases(domain: str) -> list[dict]:
    cases = smepo.read_records(TASKS / "masker_cases.jsonl")
    return [case for case in cases if case["domain"] == domain]


def write_rows(path, records: list[dict]) -> str:
    text = "".join(json.dumps(record) + "\n" for record in records)
    Path(path).write_text(text, encoding="utf-8")
    return str(path)


def read_log(path) -> list[dict]:
    """The records of a log, without what a clock said."""
    records = smepo.read_records(Path(path))
    return [{k: v for k, v in r.items() if not k.startswith("seconds_")} for r in records]


def settings(**changes) -> Config:
    """A Config on a shipped task, small enough to train in a second."""
    small = {"device": "cpu", "steps": 4, "prompts_per_step": 4, "group_size": 4}
    small |= {"eval_every": 2, "eval_samples": 2}
    return Config(**small | changes)


def small(tmp_path, **changes) -> Config:
    """The same on a dozen rows of the task written to tmp_path."""
    task = changes.get("task", "arithmetic")
    data = write_rows(tmp_path / "train.jsonl", rows("train", 12, task))
    tests = write_rows(tmp_path / "test.jsonl", rows("test", 6, task))
    return settings(**{"data": data, "test_data": tests} | changes)


def flags(config: Config) -> list[str]:
    """The command line of a Config."""
    words = []
    for name, value in asdict(config).items():
        if value != "":
            words += [f"--{name}", str(value)]
    return words


def refused(capsys, arguments: list[str]) -> str:
    """Exit code 2 and exactly one line on stderr, which is returned."""
    capsys.readouterr()
    assert smepo.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def problem(base, question="Compute 7 - 6 + 3 * 5", trace=TRACE, answer="16") -> Problem:
    """One problem as load_problems would make it, guided by its semantic mask."""
    guide = smepo.mask_trace(trace, "math", answer)
    texts = [smepo.build_prompt(base[1], question, text) for text in ("", guide)]
    prompts = base[1](texts, add_special_tokens=False)["input_ids"]
    return Problem(question, answer, trace, "3", guide, prompts)


def make_group(base, rewards: list[float], guided: bool = True) -> list[Rollout]:
    """Sampled-looking completions of unequal lengths, with rewards of our choosing."""
    torch.manual_seed(int(sum(2**i * r for i, r in enumerate(rewards))))
    p, group = problem(base), []
    for i, reward in enumerate(rewards):
        ids = torch.randint(10, 60, (3 + 2 * i,)).tolist() + [base[1].eos_token_id]
        text, sampled, solved = base[1].decode(ids), [1] * len(ids), reward == 1
        r = Rollout(p, guided, p.prompts[guided], ids, sampled, text, True, reward, solved)
        group.append(r)
    return group


def gradient_of(policy, rollouts: list[Rollout], **changes) -> torch.Tensor:
    """The gradient that update steps with (learning rate 0, so that nothing moves)."""
    model, tokenizer = policy
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda: None
    smepo.update(model, tokenizer, optimizer, rollouts, settings(grad_clip=1e9, **changes))
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])


def unpadded_logprobs(model, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """log pi of each token of a completion, by the plainest forward that there is. (T,)"""
    logits = model(torch.tensor([rollout.prompt_ids + rollout.ids])).logits[0] / temperature
    logprobs = logits[-len(rollout.ids) - 1 : -1].log_softmax(-1)
    return logprobs[range(len(rollout.ids)), rollout.ids]


def weights(folder: Path) -> list[torch.Tensor]:
    """Of the Hugging Face folder that a run leaves."""
    return list(smepo.load_model(folder / "checkpoint", settings())[0].parameters())


def assert_same_run(a: Path, b: Path):
    """Equal in every bit: the metrics, all that was sampled, the weights."""
    assert read_log(a / "metrics.jsonl") == read_log(b / "metrics.jsonl")
    assert (a / "rollouts.jsonl").read_bytes() == (b / "rollouts.jsonl").read_bytes()
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# ---- Models, processes, deaths ----------------------------------------------------------------


def random_model(name: str, vocabulary: int = 23):
    """A small random model that tells tokens and places apart; GPT-2 has absolute positions."""
    torch.manual_seed(0)
    ids = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    ids["initializer_range"] = 0.5
    if name == "gpt2":
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
        return GPT2LMHeadModel(GPT2Config(**size, **ids)).eval()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**size, **ids)).eval()
    if name == "gemma2":
        caps = {"final_logit_softcapping": 0.5, "sliding_window": 4, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(**size, **ids, **caps)).eval()
    if name == "lfm2":  # some of its layers have a state in place of keys
        layers = ["conv", "full_attention"]
        return Lfm2ForCausalLM(Lfm2Config(**size, **ids, layer_types=layers)).eval()
    return LlamaForCausalLM(LlamaConfig(**size, **ids)).eval()


def saved(path: Path, model, tokenizer) -> str:
    for part in (model, tokenizer):
        part.save_pretrained(path)
    return str(path)


def run(command: list, folder: Path) -> str:
    """Its standard output. Nothing is on standard error but the progress bar."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment = os.environ | offline | {"PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600)
    errors = done.stderr.decode().replace("\r", "\n").strip().splitlines()
    assert done.returncode == 0, done.stderr.decode()
    assert all(re.fullmatch(r" *\d+%\|.*\| *\d+/\d+ .*", line) for line in errors if line), errors
    return done.stdout.decode()


class Killed(BaseException):
    """Stands for the process dying at that instant: nothing catches it, nothing cleans up."""


MANY_TIMES = {"sample": smepo, "update": smepo, "write": smepo, "save": torch, "replace": os}
KILL_POINTS = MANY_TIMES | {"save_pretrained": LlamaForCausalLM}


def train_and_die(config: Config, monkeypatch, dies) -> bool:
    """Whether it died: before, in the midst of, or after a call that `dies` picks by its name."""
    with monkeypatch.context() as patch:
        for name, owner in KILL_POINTS.items():
            real = getattr(owner, name)

            def deadly(*args, name=name, real=real, **kwargs):
                when = dies(name)
                if when == "midst" and name == "save":
                    Path(args[1]).write_bytes(b"half a file")
                if when == "midst" and name == "write":
                    with open(args[0], "a", encoding="utf-8") as file:
                        file.write('{"step": 3, "rew')
                if when in ("before", "midst"):
                    raise Killed
                result = real(*args, **kwargs)
                if when == "after":
                    raise Killed
                return result

            patch.setattr(owner, name, deadly)
        try:
            smepo.train(config)
        except Killed:
            return True
    return False
