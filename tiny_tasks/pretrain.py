"""Rebuild tiny_tasks/base, the small base model, from scratch: about 8 minutes on two CPU cores.

    python tiny_tasks/pretrain.py                 # train, save, and print the calibration table
    python tiny_tasks/pretrain.py --calibrate     # only print the table for the model in --out

The base resembles the large ones that SMEPO is for: it can follow a plan and copy, it computes
carelessly, and it cannot plan the hardest problems alone. README.md beside this file says why.
"""

import argparse
import functools
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import make_tasks as tasks
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import smepo  # noqa: E402
from tiny_tasks.compare import copy_rate  # noqa: E402

ERROR_RATE = 0.25  # a computed result is wrong this often, and the error is carried on
PLAN_RATE = {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.1, 5: 0.0}  # else operations are overlooked
LONGEST = 3  # operations that are left when some are overlooked
WRONG_RATE = 0.5  # so many guides are careless themselves: what is shown is copied, not checked
MIXTURE = {  # (guide, k, or None for 2 to 5): share of the corpus
    ("none", 1): 0.06, ("none", 2): 0.13, ("none", 3): 0.13, ("none", 4): 0.07, ("none", 5): 0.06,
    ("semantic", None): 0.28, ("full", None): 0.17, ("random", None): 0.05, ("prefix", None): 0.05,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a number, sign or phrase, with its leading space, so that text round-trips."""
    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    phrases = ["Here is an example solution:\n", "The answer is", "Compute", ".\n"]
    phrases += [f"Step {i}:" for i in range(1, 10)]
    words = ["Step", "The", "answer", "is", "[NUMBER]", "[ANSWER]", *"=+-*.:"]
    words += [str(number) for number in range(100)]
    vocabulary = special + phrases + words + [f" {word}" for word in words] + ["\n", " "]
    pieces = [*phrases[:2], r"Step \d:", r"\.\n", r" ?\[[A-Z]+\]", r" ?\d+", r" ?[A-Za-z]+"]
    pieces += [r" ?[^\s\w]", r"\s"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces)), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def careless(rng: random.Random, left: int, operator: str, right: int) -> int:
    """The result of an operation, wrong at ERROR_RATE and wherever it would leave the range."""
    result = tasks.apply_operator(left, operator, right)
    if rng.random() < ERROR_RATE or not 0 <= result <= tasks.LARGEST:
        return rng.choice([value for value in range(tasks.LARGEST + 1) if value != result])
    return result


def solution(rng: random.Random, numbers: list[int], operators: list[str], trace: str, spans):
    """What to imitate: the trace's results where it shows them, else careless ones, carried on."""
    hidden = {start for start, _, _ in spans}
    results = list(re.finditer(r"(?:=|is) (\d+)\.", trace))
    shown = [None if match.start(1) in hidden else int(match[1]) for match in results]
    step = iter(shown)

    def result_of(*operation) -> int:
        copied = next(step)
        return careless(rng, *operation) if copied is None else copied

    text, _ = tasks.solve(numbers, operators, result_of)
    return text if shown[-1] is None else re.sub(r"is \d+\.$", f"is {shown[-1]}.", text)


def overlook(rng: random.Random, numbers: list[int], operators: list[str]):
    """The problem with only LONGEST of its operations left: how the base fails to plan."""
    choices = list(itertools.combinations(range(len(operators)), LONGEST))
    for kept in rng.sample(choices, len(choices)):
        fewer = [numbers[0]] + [numbers[i + 1] for i in kept], [operators[i] for i in kept]
        if tasks.solve(*fewer):
            return fewer
    return numbers, operators  # whatever is left out, a value leaves the range


def draw_example(rng: random.Random) -> tuple[str, str, str]:
    """A question, the guide shown with it ("" for none), and the solution to imitate."""
    guide, k = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    numbers, operators = tasks.draw_problem(rng, k or rng.randint(2, 5), held_out=False)
    question, (trace, _) = tasks.question_of(numbers, operators), tasks.solve(numbers, operators)
    if rng.random() < WRONG_RATE:
        trace, _ = tasks.solve(numbers, operators, functools.partial(careless, rng))
    seed, ratio = str(rng.random()), rng.random()
    text = smepo.guide_trace(trace, guide, "math", prefix_ratio=ratio, seed=seed)
    if guide == "none" and rng.random() > PLAN_RATE[k]:
        numbers, operators = overlook(rng, numbers, operators)
        trace, _ = tasks.solve(numbers, operators)
    spans = smepo.hidden_spans(trace, "math")
    if guide == "random":
        spans = smepo.random_spans(trace, spans, seed)
    elif guide in ("full", "prefix"):
        spans = [span for span in spans if span[0] >= len(text)]
    return question, text, solution(rng, numbers, operators, trace, spans)


def batches(tokenizer, rng: random.Random, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless batches of like lengths: ids, attention mask, labels (-100: no loss), all (N, L)."""
    while True:
        examples = [draw_example(rng) for _ in range(8 * batch_size)]
        prompts = [smepo.build_prompt(tokenizer, *example[:2]) for example in examples]
        solutions = [solution + tokenizer.eos_token for _, _, solution in examples]
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        solution_ids = tokenizer(solutions, add_special_tokens=False)["input_ids"]
        rows = sorted(zip(prompt_ids, solution_ids, strict=True), key=lambda r: len(r[0] + r[1]))
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for part in rng.sample(parts, len(parts)):
            ids, mask = smepo.pad([p + s for p, s in part], tokenizer.pad_token_id, "right", "cpu")
            labels, _ = smepo.pad([[-100] * len(p) + s for p, s in part], -100, "right", "cpu")
            yield ids, mask, labels


def pretrain(steps: int, batch_size: int, learning_rate: float, seed: int):
    """The trained model and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    stream = batches(tokenizer, random.Random(seed), batch_size)
    bar = tqdm(range(steps), desc=f"{model.num_parameters():,} parameters")
    for step in bar:
        ids, mask, labels = next(stream)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


def calibrate(model, tokenizer, count: int = 1000, seed: int = 12345) -> dict:
    """{(guide, k): (accuracy, lucky)} over `count` held-out problems, sampled once each at T = 1.

    Lucky: right by its answer, although the solution is not the expert's. The last row shows
    traces with wrong results; its accuracy is how often the answer follows them.
    """
    torch.manual_seed(seed)
    config, table = smepo.Config(), {}
    settings = [("none", k) for k in (2, 3, 4, 5)]
    for guide, k in [*settings, ("semantic", 5), ("random", 5), ("full", 5)]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            path.write_bytes(tasks.to_jsonl(tasks.draw_rows(seed, {k: count}, held_out=True)))
            problems = smepo.load_problems(str(path), guide, tokenizer, config)
        groups = smepo.rollout(model, tokenizer, problems, [guide != "none"] * count, 1, config)
        right = [group for group in groups if group.rewards[0]]
        lucky = [group for group in right if group.texts[0] != group.problem.trace]
        table[guide, k] = len(right) / count, len(lucky) / count
    table["altered", 5] = copy_rate(model, tokenizer, problems, config), 0.0
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrate", action="store_true", help="print the table, train nothing")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak, then to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "base", help="the model folder")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    smepo.datasets.disable_progress_bars()
    start, out = time.perf_counter(), arguments.out
    if not arguments.calibrate:
        settings = arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed
        model, tokenizer = pretrain(*settings)
        new = out.with_name(out.name + ".new")
        for part in (model, tokenizer):
            part.save_pretrained(new)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(new, out)
    model, tokenizer = smepo.load_model(out, smepo.Config(device="cpu"))
    print("guide     k  accuracy  of it lucky")
    for (guide, k), (accuracy, lucky) in calibrate(model, tokenizer).items():
        print(f"{guide:<9} {k}  {accuracy:.3f}     {lucky:.3f}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
