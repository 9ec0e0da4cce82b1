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
TRAIN = {2: 300, 3: 300}  # difficulty k: problems
TEST = {2: 60, 3: 60}


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
    parser.add_argument("--batch_size", type=toys.at_least_1, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-5, help="peak, then to 0")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, tokenizer = load_gguf(given.gguf)
    examples = pretrain.batches(
        sys.modules[__name__], tokenizer, random.Random(given.seed), given.batch_size
    )
    pretrain.pretrain(model, examples, given.steps, given.learning_rate)
    pretrain.save(model, tokenizer, given.out)
    train = toys.draw_rows(toy, 1, TRAIN, held_out=False)
    test = toys.draw_rows(toy, 2, TEST, held_out=True)
    for name, rows in {"train.jsonl": train, "test.jsonl": test}.items():
        with smepo.replacing(given.out / name) as new:
            new.write_bytes(toys.to_jsonl(rows))


if __name__ == "__main__":
    sys.exit(toys.command(main))
