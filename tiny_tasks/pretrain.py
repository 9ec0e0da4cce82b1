"""Rebuild the small base model of a toy from scratch: about 8 minutes on two CPU cores.

    python tiny_tasks/pretrain.py                   # train, save, and print the calibration table
    python tiny_tasks/pretrain.py --calibrate       # only print the table for the model in --out
    python tiny_tasks/pretrain.py --task code       # another toy; also search

The base resembles the large ones that SMEPO is for: it can follow a plan and copy, it computes
carelessly, and it cannot plan the hardest problems alone. README.md beside this file says why.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import smepo  # noqa: E402
from tiny_tasks import files, toys  # noqa: E402
from tiny_tasks.compare import copy_rate  # noqa: E402
from tiny_tasks.make_tasks import TOYS  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
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


def batches(toy, tokenizer, rng: random.Random, batch_size: int) -> Iterator[tuple]:
    """Endless batches of like lengths: ids, attention mask, labels (-100: no loss), all (N, L).
    Neither the prompt nor what an environment told has loss."""
    while True:
        examples = [toy.draw_example(rng) for _ in range(8 * batch_size)]
        prompts = [smepo.build_prompt(tokenizer, *example[:2]) for example in examples]
        solutions = [solution + tokenizer.eos_token for _, _, solution in examples]
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        encoded = tokenizer(solutions, add_special_tokens=False, return_offsets_mapping=True)
        told = [[match.span() for match in smepo.TOLD.finditer(text)] for text in solutions]
        labels = [[-100 if any(i <= a < j for i, j in spans) else token
                   for token, (a, _) in zip(ids, offsets, strict=True)]
                  for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"],
                                                 told, strict=True)]  # fmt: skip
        rows = sorted(zip(prompt_ids, encoded["input_ids"], labels, strict=True),
                      key=lambda r: len(r[0] + r[1]))  # fmt: skip
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for part in rng.sample(parts, len(parts)):
            rows = [(p + s, [-100] * len(p) + wanted) for p, s, wanted in part]
            ids, labels = zip(*rows, strict=True)
            ids, mask = smepo.pad(ids, tokenizer.pad_token_id, "right", "cpu")
            labels, _ = smepo.pad(labels, -100, "right", "cpu")
            yield ids, mask, labels


def pretrain(toy, steps: int, batch_size: int, learning_rate: float, seed: int):
    """The trained model and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(toy)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    stream = batches(toy, tokenizer, random.Random(seed), batch_size)
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


def calibrate(toy, model, tokenizer, config, count: int = 1000, seed: int = 12345) -> dict:
    """{(guide, k): (accuracy, lucky)} over `count` held-out problems, sampled once each at T = 1.

    Lucky: right by its answer, although the solution is not the expert's. The last row, of a toy
    that has `altered`, shows traces with wrong results; its accuracy is how often the answer
    follows them.
    """
    torch.manual_seed(seed)
    table, hardest = {}, max(toy.TRAIN)
    settings = [("none", k) for k in toy.TEST]
    settings += [(guide, hardest) for guide in ("semantic", "random", "full")]
    for guide, k in settings:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            path.write_bytes(toys.to_jsonl(toys.draw_rows(toy, seed, {k: count}, held_out=True)))
            problems = smepo.load_problems(str(path), guide, tokenizer, config)
        groups = smepo.rollout(model, tokenizer, problems, [guide != "none"] * count, 1, config)
        right = [group for group in groups if group.rewards[0]]
        lucky = [group for group in right if group.texts[0] != group.problem.trace]
        table[guide, k] = len(right) / count, len(lucky) / count
    if hasattr(toy, "altered"):
        table["altered", hardest] = copy_rate(model, tokenizer, problems, config), 0.0
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TOYS), default="arithmetic")
    parser.add_argument("--calibrate", action="store_true", help="print the table, train nothing")
    parser.add_argument("--steps", type=int, help="else as many as the task's base took")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak, then to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the model folder, else the task's")
    arguments = parser.parse_args()
    files.quiet()
    start, toy = time.perf_counter(), TOYS[arguments.task]
    config = smepo.Config(task=arguments.task, device="cpu")
    out = arguments.out or HERE.parent / config.model
    if not arguments.calibrate:
        steps = arguments.steps or toy.PRETRAIN_STEPS
        settings = arguments.batch_size, arguments.learning_rate, arguments.seed
        model, tokenizer = pretrain(toy, steps, *settings)
        new = out.with_name(out.name + ".new")
        for part in (model, tokenizer):
            part.save_pretrained(new)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(new, out)
    model, tokenizer = smepo.load_model(out, config)
    print("guide     k  accuracy  of it lucky")
    for (guide, k), (accuracy, lucky) in calibrate(toy, model, tokenizer, config).items():
        print(f"{guide:<9} {k}  {accuracy:.3f}     {lucky:.3f}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
