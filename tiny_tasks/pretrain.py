"""Rebuild the small base model of a task from scratch: about 8 minutes on two CPU cores.

    python -m tiny_tasks.pretrain                   # train, save, and print the calibration table
    python -m tiny_tasks.pretrain --calibrate       # only print the table for the model in --out
    python -m tiny_tasks.pretrain --task code       # another task; also search

The base resembles the large ones that SMEPO is for: it can follow a plan and copy, it computes
carelessly, and it cannot plan the hardest problems alone. README.md beside this file says why.
"""

import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import smepo
from tiny_tasks import toys

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(toy) -> PreTrainedTokenizerFast:
    """One token a phrase or word, words also with a leading space, so that text round-trips."""
    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    phrases = ["Here is an example solution:\n", *toy.PHRASES]
    vocabulary = special + phrases + toy.WORDS + [f" {word}" for word in toy.WORDS] + ["\n", " "]
    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    pieces = Regex("|".join([phrases[0], *toy.PIECES]))
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
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


def encode(tokenizer, example: tuple, told: re.Pattern | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels. -100 has no loss: the prompt, and what an environment told."""
    question, guide, solution = example
    prompt = smepo.build_prompt(tokenizer, question, guide)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    text = solution + tokenizer.eos_token
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    spans = [match.span() for match in told.finditer(text)] if told else []
    labels = [-100] * len(prompt_ids)
    for token, (start, _) in zip(ids, encoded["offset_mapping"]):
        hidden = any(a <= start < b for a, b in spans)
        labels.append(-100 if hidden else token)
    return torch.tensor(prompt_ids + ids), torch.tensor(labels)


def batches(toy, tokenizer, rng: random.Random, size: int, told=None) -> Iterator[tuple]:
    """Endless batches of like lengths: ids, attention mask, labels, all (N, L)."""
    while True:
        rows = [encode(tokenizer, toy.draw_example(rng), told) for _ in range(8 * size)]
        rows.sort(key=lambda row: len(row[0]))
        parts = smepo.chunks(rows, size)
        for part in rng.sample(parts, len(parts)):
            ids, labels = (pad_sequence(column, True, -100) for column in zip(*part))
            yield ids.clamp(min=0), (ids >= 0).long(), labels


def make_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model, stream: Iterator[tuple], steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
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


def calibrate(toy, model, tokenizer, config: smepo.Config, count: int = 1000) -> dict:
    """{(guide, k): (accuracy, lucky)} over `count` held-out problems, sampled once each at T = 1.

    Lucky: right by its answer, although the solution is not the expert's. The last row, of a task
    that has `altered`, shows traces with wrong results; its accuracy is how often the answer
    follows them.
    """
    torch.manual_seed(12345)
    table, hardest = {}, max(toy.TRAIN)
    settings = [("none", k) for k in toy.TEST]
    settings += [(guide, hardest) for guide in ("semantic", "random", "full")]
    settings += [("altered", hardest)] if hasattr(toy, "altered") else []
    for guide, k in settings:
        rows = toys.draw_rows(toy, 12345, {k: count}, held_out=True)
        if guide == "altered":
            for row in rows:
                trace, truth = toy.altered(row["question"], random.Random(row["question"]))
                row |= {"teacher_ds": trace, "reward_model": {"ground_truth": truth}}
        shown = guide.replace("altered", "full")
        problems = load_rows(rows, shown, tokenizer, config)
        asked = [(problem, guide != "none") for problem in problems]
        groups = smepo.rollout(model, tokenizer, asked, config)
        right = [rollout for group in groups for rollout in group if rollout.reward]
        lucky = [rollout for rollout in right if rollout.text != rollout.problem.trace]
        table[guide, k] = len(right) / count, len(lucky) / count
    return table


def load_rows(rows: list[dict], guide: str, tokenizer, config) -> list[smepo.Problem]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        path = Path(folder, "rows.jsonl")
        path.write_bytes(toys.to_jsonl(rows))
        return smepo.load_problems(str(path), guide, tokenizer, config)


def save(model, tokenizer, out: Path) -> None:
    """Written aside, then swapped in, file by file: what else lies there stays."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, suffix=".new") as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for path in Path(new).iterdir():
            os.replace(path, out / path.name)


def main() -> None:
    parser = toys.Parser("pretrain", __doc__.splitlines()[0])
    parser.add_argument("--task", choices=toys.TASKS, default="arithmetic")
    parser.add_argument("--calibrate", action="store_true", help="print the table, train nothing")
    parser.add_argument("--steps", type=toys.at_least_1, help="else as the task's base took")
    parser.add_argument("--batch_size", type=toys.at_least_1, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak, then to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the model folder, else the task's")
    given = parser.parse_args()
    config = smepo.Config(task=given.task, device="cpu")
    toy, told = toys.find(given.task), smepo.find_domain(config.domain).told
    out = given.out or smepo.TASKS / given.task / "base"
    if not given.calibrate:
        tokenizer = make_tokenizer(toy)
        torch.manual_seed(given.seed)
        model = make_model(tokenizer)
        stream = batches(toy, tokenizer, random.Random(given.seed), given.batch_size, told)
        pretrain(model, stream, given.steps or toy.PRETRAIN_STEPS, given.learning_rate)
        save(model, tokenizer, out)
    model, tokenizer = smepo.load_model(out, config)
    print("guide     k  accuracy  of it lucky")
    for (guide, k), (accuracy, lucky) in calibrate(toy, model, tokenizer, config).items():
        print(f"{guide:<9} {k}  {accuracy:.3f}     {lucky:.3f}")


if __name__ == "__main__":
    sys.exit(toys.command(main))
