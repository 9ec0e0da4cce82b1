"""Files: rows and models in; checkpoints, logs and the table out. No algorithm is in here."""
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from tiny_tasks import judge

class UserError(Exception):
    """Bad input, in one line: what is wrong and how to mend it. `main` exits with code 2."""

def assert_finite(value: float) -> None:
    if not math.isfinite(value):
        raise UserError("the model is not finite: this step is refused, lower --learning_rate")

def quiet() -> None:
    """No progress bars but our own."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

# ---- In: the rows of a data set, a model ---------------------------------------------------------
def read_rows(path: str, wants_trace: bool, domain: str = ""):
    """Question, answer, trace and difficulty of each row, in the schema of the official data."""
    kind = "parquet" if path.endswith(".parquet") else "json"
    local = Path(path).is_file() or path.endswith((".parquet", ".jsonl", ".json"))
    source = {"path": kind, "data_files": path} if local else {"path": path}
    try:
        rows = datasets.load_dataset(**source, split="train")
    except Exception as error:  # whatever a broken file makes the readers raise
        kind = kind if local else "hub dataset"
        raise UserError(f"{path} is no {kind} of rows: {error.__cause__ or error!r}") from error
    for number, row in enumerate(rows, start=1):
        row = (row.get("extra_info") or {}) | {key: row[key] for key in row if row[key] is not None}
        question, trace, rule = row.get("question"), row.get("teacher_ds"), row.get("reward_model")
        answer = rule.get("ground_truth") if isinstance(rule, dict) else None
        if answer is not None and not isinstance(answer, str):  # a number; the tests of a program
            answer = json.dumps(answer, ensure_ascii=False)
        needed = {"question": question, "reward_model.ground_truth": answer}
        needed |= {"teacher_ds (expert trace)": trace} if wants_trace else {}
        for name, value in needed.items():
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path} row {number} has no {name}: add it or drop the row")
        try:
            if domain == "code":
                judge.cases(answer)
        except ValueError as error:
            where = f"{path} row {number}"
            raise UserError(f"{where}: the ground truth is no unit tests: {error}") from error
        yield question, answer, trace or "", str(row.get("difficulty", "all"))

PLAIN_TEMPLATE = (  # for base models
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")

def load_model(path: str | Path, config):
    """Model, in float32 and without dropout (which would bend the ratio), and tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # whatever a broken folder makes the loaders raise
        raise UserError(f"--model {path} is no model: {str(error).strip()[:99]!r}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer in {path} has no eos_token: set one and save it there")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding goes by position
    if tokenizer.chat_template is None:
        print(f"{path} has no chat template: a plain one is used", file=sys.stderr)
        tokenizer.chat_template = PLAIN_TEMPLATE
    roles = ["system"] * bool(config.system) + ["user"] + ["assistant"] * (config.guide != "none")
    try:
        tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles],
                                      tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja's, or one that the template raises
        raise UserError(f"the chat template of {path} refuses {', '.join(roles)}, then an answer: "
                        f"{error}. Save one there that takes them") from error
    for module in model.modules():  # no dropout in train mode, either: checkpointing needs that
        for name in ("p", *(name for name in vars(module) if "drop" in name)):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    # a model can have several EOS ids; whatever else its folder recommends would bend the rollouts
    eos_ids = model.generation_config.eos_token_id or []
    eos_ids = {tokenizer.eos_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])}
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids))
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model.to(best if config.device == "auto" else config.device).eval()
    check_head(model, path)
    for part in (model.base_model, model.get_output_embeddings()):  # weights stay float32
        part.forward = torch.autocast(model.device.type, torch.bfloat16,
                                      enabled=model.device.type != "cpu")(part.forward)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # as newer versions say
        (enable or model.gradient_checkpointing_enable)()
    return model, tokenizer

@torch.no_grad()
def check_head(model, path) -> None:
    """token_logprobs reads the head alone: a model that rescales its logits would be misread."""
    ids = torch.arange(4, device=model.device)[None]
    states = model.base_model(ids, use_cache=False).last_hidden_state
    if not torch.allclose(model.get_output_embeddings()(states), model(ids).logits,
                          atol=1e-3, equal_nan=True):
        raise UserError(f"--model {path} rescales its logits: token_logprobs cannot")
# ---- The run folder: at whatever instant the process dies, --resume works ------------------------
def open_run(config) -> tuple[Path, Path | str]:
    """The run folder, new or with --resume of the same settings, and the model to start from."""
    folder, settings = Path("runs") / config.name, asdict(config)
    path, saved, old = (folder / name for name in ("config.json", "checkpoint", "checkpoint.old"))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        free = {key: settings[key] for key in ("resume", "steps", "device", "micro_tokens")}
        was = "".join(f" --{k} {v}" for k, v in (before | free).items() if settings.get(k) != v)
        if was or not config.resume:
            raise UserError(f"{folder} holds a run: go on with --resume{was} or take a new --name")
    if old.exists() and not saved.exists():  # died between the two renames of save_checkpoint
        os.replace(old, saved)
    return folder, saved if saved.exists() else config.model

def save_checkpoint(folder: Path, name: str, model, tokenizer, optimizer, step: int) -> None:
    """Write it aside, then swap it in: two renames, as no system replaces a folder in one."""
    new, current, old = (folder / f"{name}{suffix}" for suffix in (".new", "", ".old"))
    for stale in (new, old):  # left by a process that died
        shutil.rmtree(stale, ignore_errors=True)
    assert_finite(sum(weight.sum().item() for weight in model.parameters()))
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    # each step seeds its own sampling, so no RNG state is kept; the logs are cut to these sizes
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.jsonl")}
    torch.save(sizes | {"step": step, "optimizer": optimizer.state_dict()}, new / "training.pt")
    if current.exists():
        os.replace(current, old)
    os.replace(new, current)
    shutil.rmtree(old, ignore_errors=True)

def restore(folder: Path, optimizer, config) -> int:
    """Write config.json, load the optimizer, cut the logs to the checkpoint; the steps it has."""
    state, saved = {"step": 0}, folder / "checkpoint" / "training.pt"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(asdict(config), indent=2))
    if saved.exists():
        state = torch.load(saved, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    for path in filter(Path.exists, (folder / "metrics.jsonl", folder / "rollouts.jsonl")):
        os.truncate(path, state.get(path.name, 0))
    return state["step"]

def write(path: Path, text: str) -> None:
    """All of the file or nothing: written aside, then swapped in."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)

def read_metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]

def best_accuracy(folder: Path) -> float:
    return max(r["pass@1"]["mean"][0] for r in read_metrics(folder) if "pass@1" in r)

def append(folder: Path, name: str, records: list[dict]) -> None:
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

# ---- Out: what the reader sees -------------------------------------------------------------------
def show_start(model, problems: list, tests: list, group, config) -> None:
    """What is trained on what, and the first problem with a rollout of it."""
    print(f"model {config.model}, {model.num_parameters() / 1e6:.2f} M parameters, {model.device}\n"
          f"data  {len(problems)} problems to train on, {len(tests)} held-out, asked unguided\n"
          f"guide {config.guide} {config.guide_when}; {sum(p.leaky for p in problems)} leak\n"
          f"train {config.steps} steps of {config.prompts_per_step} problems x {config.group_size} "
          f"rollouts, learning rate {config.learning_rate:g}, seed {config.seed}")
    for title, text in {"question": group.problem.question, "expert trace": group.problem.trace,
                        "what the policy is shown": group.problem.guide or "(nothing)",
                        "a completion": group.texts[0], "its reward": group.rewards[0]}.items():
        print(f"\n{title}\n    " + str(text).replace("\n", "\n    "))

def report(folder: Path, start: float) -> None:
    """The table before -> after, and curve.png where matplotlib is installed."""
    steps = read_metrics(folder)
    points = [record for record in steps if "pass@1" in record]
    print(f"\nunguided accuracy  step 0           step {points[-1]['step']:<11} change")
    for level, (mean, error) in points[0]["pass@1"].items():
        after, e = points[-1]["pass@1"][level]
        row = f"{mean:.3f} ± {error:.3f}    {after:.3f} ± {e:.3f}    {after - mean:+.3f}"
        print(f"difficulty {level:<6}  {row}")
    if find_spec("matplotlib"):
        plot(steps, points, folder)
    else:
        print("no curve.png: it needs matplotlib")
    print(f"\n{folder} holds it all; {time.perf_counter() - start:.0f} s")

def plot(steps: list[dict], points: list[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(*zip(*[(r["step"], r["reward"]) for r in steps[1:]], strict=True), "0.6",
              label="training reward, as guided")
    axes.errorbar(*zip(*[(r["step"], *r["pass@1"]["mean"]) for r in points], strict=True),
                  marker="o", label="unguided accuracy")
    axes.set(xlabel="step", ylim=(0, 1), title=folder.name)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=150)
