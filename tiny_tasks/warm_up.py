"""Warm up a real pretrained model on expert traces of the arithmetic task, until it solves a few.

    python -m tiny_tasks.warm_up --gguf FOLDER/FILE.gguf --out runs/warm

A GGUF file, read with the package `gguf`, becomes a plain float32 folder, after a few batches that
teach it the form of a solution and of a guide; their values are right. Beside it lie problems to
train on, train.jsonl and test.jsonl. It is run by hand; results/README.md says what came of it.
"""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import smepo
from tiny_tasks import pretrain, toys
from tiny_tasks.arithmetic import toy

GUIDES = ["none", "none", "semantic", "full"]  # half of the examples are unguided


def draw_example(rng: random.Random) -> tuple[str, str, str]:
    """A question, the guide shown with it, and the expert's trace."""
    problem = toys.draw_from_split(toy, rng, rng.randint(2, 5), held_out=False)
    trace, _ = toy.expert(problem)
    guide = smepo.guide_trace(trace, rng.choice(GUIDES), "math")
    return toy.question_of(problem), guide, trace


def load_gguf(path: Path):
    """The model with its weights unpacked, so that it trains and saves like any other."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    packed = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    if hasattr(packed.config, "quantization_config"):
        del packed.config.quantization_config
    model = LlamaForCausalLM(packed.config)
    model.load_state_dict(packed.state_dict())
    return model, tokenizer


def main() -> None:
    parser = toys.Parser("warm_up", __doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="a Llama, such as SmolLM2")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=toys.at_least_1, default=12)
    given = parser.parse_args()
    model, tokenizer = load_gguf(given.gguf)
    examples = pretrain.batches(sys.modules[__name__], tokenizer, random.Random(0), size=16)
    pretrain.pretrain(model, examples, given.steps, learning_rate=3e-5)
    pretrain.save(model, tokenizer, given.out)
    train = toys.draw_rows(toy, 1, {2: 300, 3: 300}, held_out=False)
    test = toys.draw_rows(toy, 2, {2: 60, 3: 60}, held_out=True)
    for name, rows in ("train.jsonl", train), ("test.jsonl", test):
        with smepo.replacing(given.out / name) as new:
            new.write_bytes(toys.to_jsonl(rows))


if __name__ == "__main__":
    sys.exit(toys.command(main))
