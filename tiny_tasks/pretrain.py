import argparse
import random
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import smepo  # noqa: E402
from make_tasks import LARGEST, apply_operator, draw_problem, question_of, solve  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PHRASES = ["Here is an example solution:\n", "The answer is", "Compute", ".\n", "Step", "The", " answer", " is",
           ".", "\n", ":", "=", "+", "-", "*", " =", " +", " -", " *", "[NUMBER]", " [NUMBER]", "[ANSWER]", " [ANSWER]"]


def make_tokenizer():
    steps = [f"Step {i}:" for i in range(1, 10)]
    numbers = [str(n) for n in range(100)]
    vocabulary = SPECIAL + PHRASES + steps + [" " + n for n in numbers] + numbers
    pieces = [r"Here is an example solution:\n", r"The answer is", r"Step \d:", r"\.\n", r" ?\[[A-Z]+\]", r" ?\d+",
              r" ?[A-Za-z]+", r" ?[^\s\w]", r"\s"]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<|unknown|>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces)), behavior="isolated")
    t.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<|pad|>", unk_token="<|unknown|>",
        eos_token="<|end|>", additional_special_tokens=SPECIAL[3:], padding_side="left",
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def careless(rng, numbers, operators, error_rate, spans):
    """sloppy solution; visible results are copied."""
    trace, answer = solve(numbers, operators)
    hidden = {a for a, b, _ in spans}
    results = [m.start(1) for m in re.finditer(r"(?:=|is) (\d+)\.", trace)]
    step = 0
    k = len(operators)

    def result_of(left, operator, right):
        nonlocal step
        true = apply_operator(left, operator, right)
        visible = results[step] not in hidden
        step += 1
        if visible:
            return int(re.match(r"\d+", trace[results[step - 1]:])[0])
        if rng.random() < error_rate or not 0 <= true <= LARGEST:
            return rng.choice([v for v in range(LARGEST + 1) if v != true])
        return true

    while True:
        step = 0
        solved = solve(numbers, operators, result_of)
        if solved:
            break
    text = solved[0]
    if results[-1] not in hidden:
        text = text[: text.rindex("is ") + 3] + f"{answer}."
    return text


UNGUIDED = {1: 0.08, 2: 0.14, 3: 0.14, 4: 0.08, 5: 0.08}
PLAN = {1: 1, 2: 1, 3: 1, 4: 0.6, 5: 0.05}
def drop(rng, numbers, operators):
    while True:
        i = rng.randrange(len(operators))
        n, o = numbers[:i+1] + numbers[i+2:], operators[:i] + operators[i+1:]
        if rng.random() < 0.5:
            n = numbers[:i] + numbers[i+1:]
        if solve(n, o):
            return n, o
        if all(solve(numbers[:i+1] + numbers[i+2:], operators[:i] + operators[i+1:]) is None and solve(numbers[:i] + numbers[i+1:], operators[:i] + operators[i+1:]) is None for i in range(len(operators))):
            return numbers, operators
GUIDED = {"semantic": 0.29, "full": 0.12, "random": 0.06, "prefix": 0.06}


def draw_example(rng, tokenizer, mix, error_rate):
    kind = rng.choices(list(mix), list(mix.values()))[0]
    guide, k = kind
    if k is None:
        k = rng.choice([2, 3, 4, 5])
    numbers, operators = draw_problem(rng, k, held_out=False)
    question = question_of(numbers, operators)
    trace, answer = solve(numbers, operators)
    everything = spans = smepo.hidden_spans(trace, "math")
    guide_text = ""
    if guide == "semantic":
        guide_text = smepo.apply_mask(trace, spans)
    elif guide == "full":
        guide_text, spans = trace, []
    elif guide == "random":
        spans = smepo.random_spans(trace, spans, rng.random())
        guide_text = smepo.apply_mask(trace, spans)
    elif guide == "prefix":
        guide_text = smepo.cut_prefix(trace, rng.random())
        spans = [s for s in everything if s[0] >= len(guide_text)]
    if guide == "none" and rng.random() > PLAN[k]:
        numbers, operators = drop(rng, numbers, operators)
        trace, answer = solve(numbers, operators)
        spans = smepo.hidden_spans(trace, "math")
    prompt = smepo.build_prompt(tokenizer, question, guide_text)
    return prompt, careless(rng, numbers, operators, error_rate, spans)


def batches(tokenizer, mix, error_rate, batch, seed, chunk=8):
    rng = random.Random(seed)
    while True:
        ex = [draw_example(rng, tokenizer, mix, error_rate) for _ in range(batch * chunk)]
        P = tokenizer([p for p, _ in ex], add_special_tokens=False)["input_ids"]
        C = tokenizer([c + tokenizer.eos_token for _, c in ex], add_special_tokens=False)["input_ids"]
        rows = sorted(zip(P, C), key=lambda r: len(r[0]) + len(r[1]))
        groups = [rows[i:i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(groups)
        for g in groups:
            T = max(len(p) + len(c) for p, c in g)
            ids = torch.full((len(g), T), tokenizer.pad_token_id)
            labels = torch.full((len(g), T), -100)
            for i, (p, c) in enumerate(g):
                ids[i, :len(p) + len(c)] = torch.tensor(p + c)
                labels[i, len(p):len(p) + len(c)] = torch.tensor(c)
            yield ids, labels


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--steps", type=int, default=3000)
    ap.add_argument("--batch", type=int, default=128)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--k5", type=float, default=0.005)
    ap.add_argument("--k4", type=float, default=0.03)
    ap.add_argument("--error", type=float, default=0.25)
    ap.add_argument("--out", default="/tmp/base")
    ap.add_argument("--kv", type=int, default=4)
    ap.add_argument("--ffn", type=int, default=192)
    ap.add_argument("--layers", type=int, default=3)
    a = ap.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    mix = {("none", k): w for k, w in UNGUIDED.items()} | {(g, None): w for g, w in GUIDED.items()}
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=a.ffn, num_hidden_layers=a.layers,
        num_attention_heads=4, num_key_value_heads=a.kv, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    n = sum(p.numel() for p in model.parameters())
    print("parameters", n)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.01, betas=(0.9, 0.98))
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, a.lr, total_steps=a.steps, pct_start=0.1)
    bar = tqdm(range(a.steps), mininterval=10)
    stream = batches(tokenizer, mix, a.error, a.batch, 0)
    t_data = 0
    for s in bar:
        t = time.time()
        ids, labels = next(stream)
        t_data += time.time() - t
        loss = model(input_ids=ids, labels=labels).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if s % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", data=f"{t_data:.0f}s")
    model.save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)


if __name__ == "__main__":
    main()
