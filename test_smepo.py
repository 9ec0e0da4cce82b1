"""The executable specification of smepo.py: every equation, pitfall and promise has a test here.

Run `python -m pytest`; it needs no network, no GPU, and under two minutes on two cores.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import smepo
from smepo import Config, Group, Problem, UserError
from tiny_tasks import arithmetic, compare, dialogue, files

HERE = Path(smepo.__file__).resolve().parent
TASKS = HERE / "tiny_tasks"
sys.path.insert(0, str(TASKS))
TRACE = "Step 1: 3 * 5 = 15.\nStep 2: 7 - 6 = 1.\nStep 3: 1 + 15 = 16.\nThe answer is 16."
TIMES = ("seconds_", "rollouts_per_second", "tokens_per_second")


@pytest.fixture(scope="session", autouse=True)
def quiet():
    files.quiet()


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    """Every test writes its runs/ to a folder of its own; nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smepo, "STOP", [])


@pytest.fixture(scope="session")
def base():
    return smepo.load_model(TASKS / "base", settings())


@pytest.fixture
def fresh_base():
    return smepo.load_model(TASKS / "base", settings())


def rows(split: str, count: int) -> list[dict]:
    lines = (TASKS / f"arithmetic_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def write_rows(path, lines) -> str:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(path).write_text(text, encoding="utf-8")
    return str(path)


def settings(**changes) -> Config:
    """A Config on the shipped base, small enough to train in a second."""
    defaults = {"model": str(TASKS / "base"), "device": "cpu", "steps": 4, "prompts_per_step": 4,
                "group_size": 4, "eval_every": 2, "eval_samples": 2, "save_every": 2}
    defaults["data"] = str(TASKS / "arithmetic_train.jsonl")
    defaults["test_data"] = str(TASKS / "arithmetic_test.jsonl")
    return Config(**defaults | changes)


def small(tmp_path, **changes) -> Config:
    """The same on a dozen rows written to tmp_path."""
    data = write_rows(tmp_path / "train.jsonl", rows("train", 12))
    tests = write_rows(tmp_path / "test.jsonl", rows("test", 6))
    return settings(**{"data": data, "test_data": tests} | changes)


def flags(config: Config) -> list[str]:
    pairs = [(f"--{name}", str(value)) for name, value in dataclasses.asdict(config).items()]
    return [word for pair in pairs for word in pair]


def problem(base, question="Compute 7 - 6 + 3 * 5", trace=TRACE, answer="16") -> Problem:
    """One problem as load_problems would make it, guided by its semantic mask."""
    guide = smepo.mask_trace(trace, "math", answer)
    plain, guided = (
        base[1](smepo.build_prompt(base[1], question, text), add_special_tokens=False)["input_ids"]
        for text in ("", guide)
    )
    return Problem(question, answer, trace, "3", guide, False, plain, guided)


def make_group(base, rewards, completions=None) -> Group:
    """A group of sampled-looking completions of unequal lengths, with rewards of our choosing."""
    eos = base[1].eos_token_id
    torch.manual_seed(int(sum(2**i * r for i, r in enumerate(rewards))))
    completions = completions or [
        torch.randint(10, 60, (3 + 2 * i,)).tolist() + [eos] for i in range(len(rewards))
    ]
    p = problem(base)
    texts = base[1].batch_decode(completions)
    marks = [[1] * len(ids) for ids in completions]
    return Group(p, True, p.guided_ids, completions, marks, texts, [True] * len(rewards), rewards)


def tiny_llama(vocabulary=23, **changes):
    torch.manual_seed(0)
    config = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


def tiny_gpt2(vocabulary=23):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                        initializer_range=0.5, bos_token_id=2, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def without_times(path) -> list[dict]:
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in records]


# ---- Masking and guidance ------------------------------------------------------------------------


def test_mask_hides_every_number_and_keeps_the_step_labels():
    assert smepo.mask_trace(TRACE, "math", "16") == (
        "Step 1: [NUMBER] * [NUMBER] = [NUMBER].\nStep 2: [NUMBER] - [NUMBER] = [NUMBER].\n"
        "Step 3: [NUMBER] + [NUMBER] = [NUMBER].\nThe answer is [NUMBER]."
    )


@pytest.mark.parametrize("text, masked", [
    ("It costs 12,480 or -3.5%.", "It costs [NUMBER] or [NUMBER]."),
    ("A rise of \u22127 degrees", "A rise of [NUMBER] degrees"),
    ("n(n-3)", "n(n-[NUMBER])"),
    ("1. Let x_1 be 4.\n2. Then x_2 = 5.", "1. Let x_1 be [NUMBER].\n2. Then x_2 = [NUMBER]."),
    ("By Theorem 4.2, case 3 gives 9.", "By Theorem 4.2, case 3 gives [NUMBER]."),
    ("no numbers here", "no numbers here"),
    ("", ""),
])
def test_mask_number_forms_and_structure(text, masked):
    assert smepo.mask_trace(text, "math") == masked
    assert smepo.mask_trace(masked, "math") == masked  # idempotent


def test_every_toy_trace_masks_without_a_leak_and_keeps_no_digit_but_labels():
    for row in rows("train", 2000) + rows("test", 1000):
        answer = row["reward_model"]["ground_truth"]
        masked = smepo.mask_trace(row["teacher_ds"], "math", answer)
        assert not smepo.leaks(masked, answer, "math")
        assert smepo.leaks(row["teacher_ds"], answer, "math")
        digits = [c for c in masked if c.isdigit()]
        assert digits == [str(i + 1) for i in range(row["difficulty"])]


CASES = [json.loads(line) for line in
         (TASKS / "masker_cases.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_masker_case(case):
    text, domain, answer = case["text"], case["domain"], case["answer"]
    masked = smepo.mask_trace(text, domain, answer)
    assert [part for part in case["must_hide"] if part in masked] == []
    assert [part for part in case["must_keep"] if part not in masked] == []
    assert smepo.mask_trace(masked, domain, answer) == masked
    assert not smepo.leaks(masked, answer, domain)
    # its two answers stand in two boxes, so the verifier could not read them as one
    assert smepo.leaks(text, answer, domain) or case["id"] == "math_b_m61_two_boxes"


def test_the_lines_in_the_readme_are_what_the_masker_does():
    readme = (HERE / "README.md").read_text(encoding="utf-8").split("~~~~\n")[1]
    pairs = re.findall(r"(math|code|search) +(.*)\n +-> (.*)\n", readme)
    assert len(pairs) > 12
    for domain, before, after in pairs:
        text, masked = ((line.replace("\\n", "\n") if domain == "code" else line)
                        for line in (before, after))
        assert smepo.mask_trace(text, domain) == masked


def test_aliases_share_the_mask_of_the_name():
    text = ("<search>first year of uneb and lena marchetti</search> The United Nations Education "
            "Body was led by Lena Marchetti. Marchetti wrote in 1987. UNEB grew.")
    assert smepo.mask_trace(text, "search", "1987") == (
        "<search>first year of [ENTITY] and [ENTITY]</search> The [ENTITY] was led by [ENTITY]. "
        "[ENTITY] wrote in [ENTITY]. [ENTITY] grew.")


def test_every_kept_structure_is_kept_by_its_own_rule():
    for example, pattern in smepo.KEEP.items():
        assert re.search(pattern, example, re.MULTILINE), example
        assert smepo.mask_trace(f"so\n{example}", "math") == f"so\n{example}"


KEPT = r"""Step 3:|Case 2a|Lemma 4.1|by Theorem 7|x_1|a_{n+1}|\alpha_2|P2|cm^2|Eq. (4)|from (1)
    |the two roots|one can see|\tag{3}|Cases 1, 2 and 3|STEP II|Part (b)|the worst case|no two of
    |第三步""".replace("\n    ", "").split("|")
VALUES = r"""17|-3|−3.5|12,480|15{,}600|3/4|\frac{3}{4}|\tfrac12|½|2½|1.5e-3|3 \times 10^{8}|3×10⁸
    |forty-two|one hundred and five|three dozen|twenty-first|two thirds|XIV|十二|50%|50\%|21st
    |3 million""".replace("\n    ", "").split("|")


def test_generated_math_hides_exactly_the_values():
    rng = random.Random(0)
    for _ in range(2000):
        text, expected = "Here", "Here"
        for _ in range(rng.randint(0, 8)):
            link = rng.choice([" we get ", ", so then ", " equals ", "; hence\n", " (see below): "])
            value = rng.random() < 0.5
            piece = rng.choice(VALUES if value else KEPT)
            text += link + piece
            expected += link + ("[NUMBER]" if value else piece)
        masked = smepo.mask_trace(text, "math")
        assert masked == expected
        assert smepo.mask_trace(masked, "math") == masked


PIECES = (*KEPT, *VALUES, *r"""Step 1 : (3) 2. - | { } $ \ \boxed{ \pi π x^2 #### <answer> yes
    </answer> <search> </search> <information> Answer: no (B) B Silver Harbor of the The T. E.
    van Whitlock's 北京 Москва é ` `` ``` ~~~ ```python > >>> x=1 f(x): return if else: print( ) ;
    "code":" \" <pre> </pre> \begin{verbatim} \end{verbatim} O(n) `a+b` `x` [NUMBER] [CODE] \\ March
    1742""".split(), "\n", "\n\n", "    ", "\r\n", "\t", "\x00", "\ud800")


@pytest.mark.parametrize("domain, answer", [
    ("math", "42"), ("math", "\\pi"), ("math", "(B)"), ("math", "x^2"), ("code", "{}"),
    ("search", "Silver Harbor"), ("search", "yes"), ("search", "9 March 1742")])
def test_no_text_breaks_the_masker(domain, answer):
    rng = random.Random(f"{domain} {answer}")
    for _ in range(400):
        text = "".join(rng.choice(PIECES) + rng.choice(("", " ", "\n")) for _ in range(20))
        masked = smepo.mask_trace(text, domain, answer)
        assert smepo.mask_trace(masked, domain, answer) == masked
        assert not smepo.leaks(masked, answer, domain)
        assert 0.0 <= smepo.reward(text, answer, domain) <= 1.0
        spans = smepo.hidden_spans(text, domain, answer)
        assert all(0 <= a < b <= len(text) for a, b, _ in spans)
        assert all(b <= c for (_, b, _), (c, _, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("domain, text", [
    ("math", "Let x_1 be the smaller root.\nOne can check that no two of them agree (Lemma 4.2)."),
    ("code", "Sort by start, then sweep.\n\n- keep `dp` small\n- it costs `O(n log n)`\n"),
    ("search", "First find who directed the film.\n<search>director of the film</search>"),
    *((domain, "") for domain in smepo.DOMAINS)])
def test_a_text_without_anything_to_hide_comes_back_unchanged(domain, text):
    assert smepo.mask_trace(text, domain) == text


HARD = r"""a |A |1 |1,|1,234|- |\boxed{|\boxed{a} |{|}|#### |x_|x_{1|`|``|`a|> |>>> |~~~|```X|<|<a
    |one|<answer>|<answer>x |<pre>|\begin{verbatim}|"code": "|\"code\": \"|one hundred and |twenty-
    |IV|J.|Step 1 and |Cases 1, 2, |from (|(1) |\frac{1|1/|12:34 |10^|½|一|第|. |A. |def f(x):X
    |if x:X|x = [|the answer is |so B |Silver Harbor |silver |van |é|中|$|\|\text{|[|[NUMBER]|worst
    |1. |i) |\sqrt|O(|(((|;X|{X|X|    X| X|    x = 1X"""
HARD = HARD.replace("\n    ", "").replace("X", "\n").split("|")


def test_masking_takes_linear_time_whatever_the_text():
    """Quadratic work on any of these takes hours, so the limit only ends such a hang."""
    script = """if True:
        import json, sys, smepo
        for piece in json.load(sys.stdin):
            for domain, answer in ("math", "\\\\frac{\\\\pi}{2}"), ("code", ""), ("search", "A B"):
                text = (piece * 20_000)[:20_000]
                smepo.leaks(smepo.mask_trace(text, domain, answer), answer, domain)"""
    subprocess.run([sys.executable, "-c", script], input=json.dumps(HARD), text=True, cwd=HERE,
                   check=True, timeout=300)


@pytest.mark.parametrize("masked, answer, domain, leaky", [
    ("so x is 0.5", r"\frac12", "math", True), ("half of it", "1/2", "math", True),
    ("so it is forty-two", "42", "math", True), ("that is 1,234", "1234", "math", True),
    ("an angle of π", "\\pi", "math", True), ("it is Thursday", "Thursday", "math", True),
    ("the answer is B", "(B)", "math", True), ("see part (b) of B", "(B)", "math", False),
    ("there is no such n", "no", "math", False), ("so the answer is no.", "no", "math", True),
    ("we need 43 of the 421", "42", "math", False), ("x_42", "42", "math", False),
    ("born in trieste", "Trieste", "search", True), ("in [ENTITY]", "Trieste", "search", False),
    ("it has 1,250 rooms", "1250", "search", True), ("```\nx = 1\n```", "{}", "code", True),
    ("```\n[CODE]\n```", "{}", "code", False)])
def test_leaks_sees_every_spelling_and_nothing_else(masked, answer, domain, leaky):
    assert smepo.leaks(masked, answer, domain) is leaky


def test_leaks_compares_by_value_and_ignores_labels():
    assert smepo.leaks("so it is 42.0", "42", "math")
    assert not smepo.leaks("Step 42: it is [NUMBER]", "42", "math")
    assert not smepo.leaks("so it is 43", "42", "math")
    assert not smepo.leaks("", "42", "math")


def test_random_mask_hides_as_many_spans_as_long_and_depends_on_the_seed():
    semantic = smepo.hidden_spans(TRACE, "math")
    chosen = [smepo.random_spans(TRACE, semantic, str(seed)) for seed in range(300)]
    words = [[len(smepo.PIECE.findall(TRACE[a:b])) for a, b, _ in spans] for spans in chosen]
    assert all(sorted(counts) == [1] * len(semantic) for counts in words)
    for spans in chosen:
        assert all(b <= c for (_, b, _), (c, _, _) in itertools.pairwise(spans))  # no overlap
    pieces = {match.start() for match in smepo.PIECE.finditer(TRACE)}
    assert {start for spans in chosen for start, _, _ in spans} == pieces  # anywhere
    assert chosen[0] != chosen[1]
    assert chosen[0] == smepo.random_spans(TRACE, semantic, "0")


def test_random_mask_keeps_long_spans_whole():
    text = "one two three four five six seven eight"
    spans = [(0, 13, "[X]"), (14, 18, "[Y]")]  # three words, one word
    for seed in range(50):
        chosen = smepo.random_spans(text, spans, str(seed))
        assert sorted(len(text[a:b].split()) for a, b, _ in chosen) == [1, 3]
        assert chosen[0][1] <= chosen[1][0]


def test_random_mask_of_glued_letters_and_digits():
    for seed in range(20):
        masked = smepo.guide_trace("1a2b3", "random", "math", seed=str(seed))
        assert masked.count("[NUMBER]") == 3


def test_guide_arms():
    assert smepo.guide_trace(TRACE, "none", "math") == ""
    assert smepo.guide_trace(TRACE, "full", "math") == TRACE
    assert smepo.guide_trace(TRACE, "semantic", "math") == smepo.mask_trace(TRACE, "math")
    for ratio in (0.0, 0.3, 0.5, 0.9):
        prefix = smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=ratio)
        assert TRACE.startswith(prefix) and len(prefix) <= ratio * len(TRACE)
        assert prefix == "" or TRACE[len(prefix)] == "\n"  # whole lines only
    assert smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=1.0) == TRACE
    half = smepo.guide_trace(TRACE, "prefix", "math", prefix_ratio=0.5)
    assert half == "Step 1: 3 * 5 = 15.\nStep 2: 7 - 6 = 1."


# ---- The mask command: tiny_tasks/mask.py --------------------------------------------------------


def mask(capsys, *arguments) -> tuple[int, str, str]:
    code = smepo.main(["mask", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_mask_shows_a_trace_beside_its_mask_and_the_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "trace.txt"
    path.write_text("Step 1: 7 − 6 = 1.\n\nThe answer is 1.\n", encoding="utf-8")
    code, out, _ = mask(capsys, "--trace", path)
    lines = [[half.rstrip() for half in line.split(" |")] for line in out.splitlines()]
    assert code == 0 and lines[:4] == [
        ["Step 1: 7 − 6 = 1.", " Step 1: [NUMBER] − [NUMBER] ="], ["", " [NUMBER]."], ["", ""],
        ["The answer is 1.", " The answer is [NUMBER]."]]
    assert "4 spans hidden, 89% of the text kept" in out
    assert "no leak: the answer 1 cannot be read off" in out and "\033" not in out


def test_mask_reads_standard_input_and_marks_hidden_spans_on_a_terminal(capsys, monkeypatch):
    import io

    text = "Sum them:\n```python\nprint(1)\nprint(2)\n```\nDone."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = mask(capsys, "--domain", "code")
    assert code == 0 and "no leak: the code cannot be read off" in out
    assert re.findall("\033\\[7m(.*?)\033\\[0m", out) == ["print(1)", "[CODE]", "print(2)"]


def test_mask_says_when_the_answer_can_be_read_off(tmp_path, capsys):
    path = tmp_path / "trace.txt"
    path.write_text("We know n2, so n2.", encoding="utf-8")
    _, out, _ = mask(capsys, "--trace", path)
    assert "no verdict on leaks" in out
    smepo_leaks, smepo.leaks = smepo.leaks, lambda *_: True
    try:
        assert "LEAKS: the answer 5 can be read off" in mask(capsys, "--trace", path,
                                                             "--answer", 5)[1]
    finally:
        smepo.leaks = smepo_leaks


def test_mask_of_a_file_counts_leaks_spans_and_text_of_every_arm_by_hand(tmp_path, capsys):
    lines = [dict(row) for row in rows("train", 2)]
    lines[0]["teacher_ds"], lines[0]["reward_model"] = "a 5", {"ground_truth": "5"}
    lines[1]["teacher_ds"], lines[1]["reward_model"] = "b 6 7\nc", {"ground_truth": "8"}
    path = write_rows(tmp_path / "two.jsonl", lines)
    code, out, err = mask(capsys, "--data", path)
    table = {line.split()[0]: [float(n) for n in line.split()[1:]] for line in out.splitlines()[2:]}
    assert code == 0 and out.startswith("2 traces\n") and "2/2" in err  # the bar
    assert table["full"] == [0.5, 0, 1] and table["prefix"] == [0, 0, 0]
    assert table["semantic"] == [0, 1.5, round((2 / 3 + 5 / 7) / 2, 3)]
    assert table["random"][1] == 1.5 and table["random"][2] == table["semantic"][2]


@pytest.mark.parametrize("arguments, message", [
    (["--trace", "none.txt"], "none.txt"), (["--domain", "art"], "invalid choice: 'art'"),
    (["--colour"], "unknown flag --colour"), (["--data", "none.jsonl"], "none.jsonl is no json"),
    (["--trace", "empty.txt"], "empty.txt is empty"),
    (["--trace", "empty.txt", "--data", "x"], "not allowed with")])
def test_mask_refuses_bad_input_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    code, out, err = mask(capsys, *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_mask_runs_from_anywhere_even_into_a_pipe_that_knows_few_signs(tmp_path):
    """As a Windows pipe does; and the script is __main__, not the module that the command uses."""
    run = subprocess.run([sys.executable, HERE / "smepo.py", "mask"], input="it is −5".encode(),
                         capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert run.returncode == 0 and b"it is [NUMBER]" in run.stdout


# ---- Data, prompts, reward -----------------------------------------------------------------------


def test_prompt_is_question_then_guide_as_a_finished_turn_then_an_open_turn(base):
    tokenizer = base[1]
    question = "Compute 7 - 6"
    assert smepo.build_prompt(tokenizer, question) == f"<|user|>{question}<|end|><|assistant|>"
    assert smepo.build_prompt(tokenizer, question, "Step 1: [NUMBER].") == (
        f"<|user|>{question}<|end|><|assistant|>Here is an example solution:\nStep 1: [NUMBER]."
        "<|end|><|assistant|>"
    )


def test_tokenizer_round_trips_every_toy_row(base):
    tokenizer = base[1]
    for row in rows("test", 200):
        trace = row["teacher_ds"]
        for text in (row["question"], trace, smepo.mask_trace(trace, "math")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_no_test_problem_is_trained_or_pretrained_on():
    from tiny_tasks.arithmetic import draw_example
    from tiny_tasks.toys import is_held_out

    train, test = ({row["question"] for row in rows(s, 10**6)} for s in ("train", "test"))
    rng = random.Random(1)
    pretraining = {draw_example(rng)[0] for _ in range(20_000)}
    assert all(is_held_out(question) for question in test)
    assert not any(is_held_out(question) for question in train | pretraining)


def test_make_tasks_reproduces_the_shipped_files():
    command = [sys.executable, str(TASKS / "make_tasks.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_shipped_traces_are_right():
    for row in rows("train", 300) + rows("test", 1000):
        value = eval(row["question"].removeprefix("Compute "))
        assert str(value) == row["reward_model"]["ground_truth"]
        assert smepo.reward(row["teacher_ds"], str(value), "math") == 1.0


@pytest.mark.parametrize("completion, truth, expected", [
    ("The answer is 16.", "16", 1.0),
    ("The answer is 16.", "6", 0.0),
    ("The answer is 61.", "16", 0.0),
    ("The answer is 1,234.", "1234", 1.0),
    ("The answer is 42.0", "42", 1.0),
    (r"so \boxed{-3}", "\u22123", 1.0),
    ("#### 74", "74", 1.0),
    ("The answer is 16. No, wait: the answer is 17.", "16", 0.0),
    ("The answer is 17. No, wait: the answer is 16.", "17", 0.0),
    ("The answer is 16. No, wait: the answer is 17.", "17", 1.0),
    ("The answer is 3.5.\nSo the answer is 4.5", "4.5", 1.0),
    ("The answer is 3.5.\nSo the answer is 4.5", "3.5", 0.0),
    ("Step 1: 2 + 2 = 16.", "16", 0.0),  # a number in passing is no answer
    ("The answer is", "16", 0.0),
    ("The answer is [NUMBER].", "16", 0.0),
    ("", "16", 0.0),
    (r"\boxed{\frac14}", "0.25", 1.0), (r"\boxed{0.25}", r"\dfrac{1}{4}", 1.0),
    (r"\boxed{\frac{1}{23}}", r"\frac{12}{3}", 0.0), (r"\boxed{1/0}", "0", 0.0),
    (r"\boxed{2 \frac{1}{2}}", "5/2", 1.0), (r"\boxed{2½}", "2.5", 1.0), ("#### 50%", r"50\%", 1.0),
    (r"\boxed{50\%}", "0.5", 0.0), (r"\boxed{3 \times 10^{8}}", "300000000", 1.0),
    ("The answer is 12,34.", "1234", 0.0), ("The answer is 1.234.", "1234", 0.0),
    ("The answer is forty-two.", "42", 1.0), ("The answer is $42$.", "42", 1.0),
    ("The answer is 3 4.", "7", 0.0), ("The answer is 1e999999999.", "42", 0.0),
    (f"The answer is {'9' * 5000}.", "42", 0.0), ("The answer is 0.3333.", "1/3", 0.0),
    (r"The answer is \boxed{\text{(B)}}.", "B", 1.0), ("The answer is b.", "(B)", 1.0),
    ("The answer is (A) or (B).", "(B)", 0.0), ("The answer is not B.", "B", 0.0),
    (r"\boxed{x^{2} + 6x+11}", "x^2+6x+11", 1.0), (r"\boxed{x^2-6x+11}", "x^2+6x+11", 0.0),
    (r"\boxed{[2, 5)}", "[2,5)", 1.0), (r"\boxed{(2, 5)}", "[2,5)", 0.0),
    (r"\boxed{\left(1, 234\right)}", "1234", 0.0), ("The answer is 1/2.", "2", 0.0),
    (r"\boxed{\frac{a}{bc}}", r"\frac{ab}{c}", 0.0),
    (r"\boxed{16} and then \boxed{17}", "16", 0.0), (r"\boxed{1} #### 16", "16", 1.0),
    (r"The answer is 16. \boxed{17}", "16", 0.0), (r"\boxed{16", "16", 0.0),
    ("**Answer:** Thursday", "thursday", 1.0), ("The answer is no.", "yes", 0.0),
])
def test_reward(completion, truth, expected):
    assert smepo.reward(completion, truth, "math") == expected


@pytest.mark.parametrize("completion, truth, expected", [
    ("<answer>Trieste</answer>", "Trieste", 1.0), ("<answer> the  A team </answer>", "A Team", 1.0),
    ("<answer>\nJ. R. R. Tolkien.\n</answer>", "J.R.R. Tolkien", 1.0), ("Trieste", "Trieste", 0.0),
    ("<answer>Trieste, Italy</answer>", "Trieste", 0.0), ("<answer>1,250</answer>", "1250", 1.0),
    ("<answer>no</answer>", "yes", 0.0), ("<answer>-5</answer>", "5", 0.0),
    ("<answer>a</answer>", "the", 0.0), ("<answer>[ENTITY]</answer>", "Trieste", 0.0),
    ("<answer>Rome</answer> no: <answer>Trieste</answer>", "Rome", 0.0)])
def test_search_reward_is_exact_match_after_normalisation(completion, truth, expected):
    assert smepo.reward(completion, truth, "search") == expected


# ---- Rollouts ------------------------------------------------------------------------------------


def test_completion_keeps_exactly_one_eos_whatever_follows_it():
    assert smepo.until_eos([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert smepo.until_eos([5, 9, 2, 0], [2, 9]) == [5, 9]  # several EOS ids: the first counts
    assert smepo.until_eos([5, 6, 7], [2]) == [5, 6, 7]  # truncated


def test_padding_mask_goes_by_position_even_if_pad_is_a_real_token():
    ids, mask = smepo.pad([[2, 5, 2], [2]], pad_id=2, side="right", device="cpu")
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = smepo.pad([[2, 5, 2], [7]], pad_id=2, side="left", device="cpu")
    assert ids.tolist() == [[2, 5, 2], [2, 2, 7]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert smepo.positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_sampling_from_a_shared_prefill_is_sampling_from_the_model(make_model, base):
    """Prompts of unequal lengths, read once a group: the samples of plain generate, row by row."""
    model = make_model(vocabulary=len(base[1]))
    model.generation_config = smepo.GenerationConfig(eos_token_id=[2])
    prompts, config = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]], settings(max_new_tokens=8)
    torch.manual_seed(0)
    ours = smepo.sample(model, base[1], prompts, 4, config)
    ids, mask = smepo.pad(prompts, 0, "left", "cpu")
    torch.manual_seed(0)
    plain = model.generate(
        ids.repeat_interleave(4, 0), attention_mask=mask.repeat_interleave(4, 0), do_sample=True,
        top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=8, eos_token_id=2, pad_token_id=0,
    )[:, 5:]
    assert ours == [smepo.until_eos(row, [2]) for row in plain.tolist()]


def test_sampled_frequencies_follow_the_temperature(base):
    model = tiny_llama(vocabulary=len(base[1]))
    model.generation_config = smepo.GenerationConfig(eos_token_id=[2])
    config, prompt = settings(max_new_tokens=1, temperature=2.0), [5, 6, 7]
    torch.manual_seed(0)
    tokens = torch.tensor(smepo.sample(model, base[1], [prompt], 20_000, config)).flatten()
    logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    observed = torch.bincount(tokens, minlength=len(expected)) / len(tokens)
    assert (observed - expected).abs().max() < 0.015
    assert (observed - logits.softmax(-1)).abs().max() > 0.05  # it can tell temperatures apart


def test_generation_settings_of_the_model_folder_do_not_reach_the_rollouts(base, tmp_path):
    """A folder that recommends greedy, top-k or penalties samples like one that does not."""
    for part in base:
        part.save_pretrained(tmp_path / "hostile")
    hostile = {"do_sample": False, "top_k": 1, "top_p": 0.1, "temperature": 0.01, "min_p": 0.9,
               "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_new_tokens": 1,
               "suppress_tokens": [*range(6, 60)], "eos_token_id": [2], "typical_p": 0.1}
    (tmp_path / "hostile" / "generation_config.json").write_text(json.dumps(hostile), "utf-8")
    model, tokenizer = smepo.load_model(tmp_path / "hostile", settings())
    samples = []
    for policy in (base[0], model):
        torch.manual_seed(0)
        samples.append(smepo.sample(policy, tokenizer, [problem(base).guided_ids], 16, settings()))
    assert samples[0] == samples[1]
    assert len({tuple(ids) for ids in samples[0]}) > 1


def test_several_eos_ids_of_the_model_folder_all_end_a_completion(base, tmp_path):
    for part in base:
        part.save_pretrained(tmp_path / "chat")
    newline = base[1].convert_tokens_to_ids(".\n")
    path = tmp_path / "chat" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [newline]}), "utf-8")
    model, tokenizer = smepo.load_model(tmp_path / "chat", settings())
    p = problem(base)
    group = smepo.rollout(model, tokenizer, [p], [True], 8, settings())[0]
    assert all(ids[-1] == newline and newline not in ids[:-1] for ids in group.completions)
    assert all(group.ended)


def test_truncated_rollouts_earn_nothing_and_long_calls_are_split(base, monkeypatch):
    monkeypatch.setattr(smepo, "rewards", lambda texts, *_: [float(text != "") for text in texts])
    p = problem(base)
    cut = smepo.rollout(*base, [p], [True], 4, settings(max_new_tokens=5))[0]
    assert cut.rewards == [0.0] * 4 and cut.ended == [False] * 4
    assert [len(ids) for ids in cut.completions] == [5] * 4
    calls = []
    sample = smepo.sample
    monkeypatch.setattr(smepo, "sample", lambda *a: calls.append(len(a[2])) or sample(*a))
    groups = smepo.rollout(*base, [p] * 5, [True] * 5, 4, settings(generate_batch=8))
    assert calls == [2, 2, 1] and len(groups) == 5
    assert all(len(g.rewards) == 4 and sum(g.rewards) == sum(g.ended) for g in groups)


@pytest.mark.parametrize("when, expected", [("always", 4), ("0.5", 2), ("0.25", 1), ("0", 0)])
def test_a_fraction_of_the_problems_is_guided(base, when, expected):
    problems = [problem(base) for _ in range(4)]
    groups, sampled = smepo.collect_rollouts(*base, problems, settings(guide_when=when))
    assert sum(g.guided for g in groups) == expected and sampled == 16
    halves = [sum(g.guided for g in half) for half in (groups[:2], groups[2:])]
    assert abs(halves[0] - halves[1]) <= 1  # spread over the mini-batches
    for g in groups:
        assert g.prompt_ids == (g.problem.guided_ids if g.guided else g.problem.prompt_ids)


def test_on_failure_guides_only_groups_that_all_failed_and_counts_both_passes(base, monkeypatch):
    problems = [problem(base, answer=str(i)) for i in range(4)]
    passes = []

    def rollout(model, tokenizer, problems, guided, group_size, config):
        passes.append((len(problems), guided))
        return [
            Group(p, g, [], [[2]], [[1]], [""], [True],
                  [1.0, 0.0] if int(p.answer) % 2 else [0.0, 0.0])
            for p, g in zip(problems, guided, strict=True)
        ]

    monkeypatch.setattr(smepo, "rollout", rollout)
    config = settings(guide_when="on-failure", group_size=2)
    groups, sampled = smepo.collect_rollouts(None, None, problems, config)
    assert passes == [(4, [False] * 4), (2, [True, True])]
    assert [g.guided for g in groups] == [True, False, True, False]
    assert [g.problem for g in groups] == problems and sampled == 12


# ---- Advantages, log-probs, loss -----------------------------------------------------------------


def test_advantages_by_hand():
    A = smepo.group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0]), group_size=4)
    # group 1: mean 1/4, std (n - 1) = 1/2; group 2: mean 1/2, std = 1/sqrt(3)
    expected = [1.5, -0.5, -0.5, -0.5] + [math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2
    torch.testing.assert_close(A, torch.tensor(expected), atol=1e-5, rtol=0)
    A = smepo.group_advantages(torch.tensor([1.0, 0, 0, 0]), group_size=4, scale="none")
    assert A.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_equal_rewards_have_advantage_exactly_zero_however_rounded():
    for value in (0.0, 1.0, 0.1, 1 / 3):
        for scale in ("std", "none"):
            A = smepo.group_advantages(torch.full((7,), value), group_size=7, scale=scale)
            assert A.tolist() == [0.0] * 7


def test_advantages_sum_to_zero_and_ignore_other_groups():
    torch.manual_seed(0)
    rewards = torch.rand(6, 8)
    A = smepo.group_advantages(rewards.flatten(), 8).view(6, 8)
    torch.testing.assert_close(A.sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(A[2], smepo.group_advantages(rewards[2], 8))


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_under_unequal_left_padding_equal_unpadded_forwards(make_model, temperature):
    """Rotary and absolute positions alike: neither padding side may shift or leak anything."""
    model = make_model()
    prompts, completions = [[3, 4, 5, 6, 7], [8, 9], [10]], [[11, 2], [12, 13, 14, 2], [15]]
    prompt_ids, prompt_mask = smepo.pad(prompts, 0, "left", "cpu")
    completion_ids, mask = smepo.pad(completions, 0, "right", "cpu")
    ids, attention = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask], 1)
    ours = smepo.token_logprobs(model, ids, attention, 4, temperature)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs[range(len(completion)), completion]
        torch.testing.assert_close(ours[i, : len(completion)], expected, atol=1e-5, rtol=1e-5)


def test_logprobs_of_sampled_completions_equal_unpadded_forwards(base):
    model, tokenizer = base
    short = problem(base, "Compute 2 * 3", "Step 1: 2 * 3 = 6.\nThe answer is 6.")
    problems = [problem(base), short]
    torch.manual_seed(0)
    for group in smepo.rollout(model, tokenizer, problems, [True, True], 3, settings()):
        for ids in group.completions:
            whole = torch.tensor([group.prompt_ids + ids])
            ours = smepo.token_logprobs(model, whole, torch.ones_like(whole), len(ids), 1.0)[0]
            logprobs = model(whole).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
            torch.testing.assert_close(ours, logprobs[range(len(ids)), ids])


def loss_of(logprobs, old, advantages, mask=None, **options):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.ones_like(logprobs) if mask is None else torch.tensor(mask)
    loss, stats = smepo.policy_loss(
        logprobs, torch.tensor(old), torch.tensor(advantages), mask, **options
    )
    loss.backward()
    return loss.item(), logprobs.grad, stats


@pytest.mark.parametrize("ratio, A, expected, gradient_flows, clipped", [
    (1.0, 1.0, -1.0, True, 0), (1.0, -1.0, 1.0, True, 0),
    (1.5, 1.0, -1.28, False, 1),  # good action, already likelier by more than clip_high: stop
    (1.5, -1.0, 1.5, True, 0),  # bad action that became likelier: always push back
    (0.5, 1.0, -0.5, True, 0),  # good action that became rarer: always pull back
    (0.5, -1.0, 0.8, False, 1),  # bad action, already rarer by more than clip_low: stop
    (1.2, 1.0, -1.2, True, 0), (0.9, -2.0, 1.8, True, 0),  # inside the range nothing clips
])
def test_clip_cases_for_both_signs(ratio, A, expected, gradient_flows, clipped):
    loss, gradient, stats = loss_of([[math.log(ratio)]], [[0.0]], [A], clip_low=0.2, clip_high=0.28)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert bool(gradient.abs().sum() > 0) == gradient_flows
    assert stats["clip_fraction"] == clipped
    if gradient_flows:  # d/d logprob of -ratio * A
        assert gradient.item() == pytest.approx(-ratio * A, abs=1e-6)


def test_aggregations_by_hand():
    """Two rows of 1 and 3 tokens, ratio 1, A = 1 and -1: only the weights of the tokens differ."""
    mask = [[1, 0, 0], [1, 1, 1]]
    zeros = [[0.0] * 3] * 2
    loss, gradient, _ = loss_of(zeros, zeros, [1.0, -1.0], mask, aggregation="sequence")
    assert loss == pytest.approx((-1 + 1) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]]))
    loss, gradient, _ = loss_of(zeros, zeros, [1.0, -1.0], mask, aggregation="token")
    assert loss == pytest.approx((-1 + 3) / 4)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0, 0], [0.25, 0.25, 0.25]]))


def test_loss_is_zero_but_its_gradient_is_not_at_the_first_update():
    A = smepo.group_advantages(torch.tensor([1.0, 0.0]), 2).tolist()
    loss, gradient, stats = loss_of([[-1.0], [-2.0]], [[-1.0], [-2.0]], A)
    assert loss == pytest.approx(0, abs=1e-7) and gradient.abs().min() > 0.1
    assert stats["clip_fraction"] == 0


def test_padding_gets_no_gradient_even_where_its_logprobs_are_wild():
    loss, gradient, stats = loss_of([[0.0, 300.0, -math.inf]], [[0.0, 0.0, -math.inf]], [1.0],
                                    [[1, 0, 0]])
    assert loss == -1.0 and stats["clip_fraction"] == 0
    assert gradient[0, 0] != 0 and gradient[0, 1:].tolist() == [0.0, 0.0]


def test_policy_loss_agrees_with_a_loop_written_from_the_paper():
    torch.manual_seed(0)
    new, old, A = torch.randn(5, 7) / 3, torch.randn(5, 7) / 3, torch.randn(5)
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [2], [6]])
    total = 0.0
    for i in range(5):
        terms = []
        for t in range(int(mask[i].sum())):
            rho = math.exp(new[i, t] - old[i, t])
            terms.append(min(rho * A[i], max(0.8, min(1.28, rho)) * A[i]))
        total -= sum(terms) / len(terms) / 5
    loss, _ = smepo.policy_loss(new, old, A, mask, 0.2, 0.28, "sequence")
    torch.testing.assert_close(loss, torch.as_tensor(total))


# ---- Update --------------------------------------------------------------------------------------


def gradient_of(policy, groups, **changes) -> torch.Tensor:
    """The gradient that update would step with (learning rate 0, so that nothing moves)."""
    model, tokenizer = policy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    config = settings(**{"grad_clip": 1e9, "prompts_per_step": len(groups)} | changes)
    smepo.update(model, tokenizer, optimizer, groups, config)
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_micro_batch_size_does_not_change_the_gradient(fresh_base, aggregation):
    groups = [make_group(fresh_base, r) for r in ([1.0, 0, 0, 0], [0.0] * 4, [0.0, 1, 1, 1])]
    lengths = sorted(len(g.prompt_ids) + len(ids) for g in (groups[0], groups[2])
                     for ids in g.completions)
    whole = gradient_of(fresh_base, groups, micro_tokens=10**6, aggregation=aggregation)
    assert whole.abs().max() > 1e-3
    for size, counts in ((1, [1] * 8), (3 * lengths[-1], None), (10**6, [8])):
        parts = smepo.micro_batches(groups, 0, "cpu", settings(micro_tokens=size))
        rows = [len(part["A"]) for part in parts]
        assert rows == counts if counts else rows[0] == 3 and sum(rows) == 8
        part = gradient_of(fresh_base, groups, micro_tokens=size, aggregation=aggregation)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_update_has_the_gradient_of_the_whole_unskipped_loss(fresh_base, aggregation):
    """Skipping, sorting, splitting and padding together equal one loss over all B*G rows."""
    model, tokenizer = fresh_base
    groups = [make_group(fresh_base, r) for r in ([1.0, 0, 0, 0], [1.0] * 4, [0.0] * 4)]
    ours = gradient_of(fresh_base, groups, micro_tokens=100, aggregation=aggregation)
    model.zero_grad()
    A = smepo.group_advantages(torch.tensor([g.rewards for g in groups]), 4)
    losses, tokens = [], sum(len(ids) for g in groups for ids in g.completions)
    rows = [(g.prompt_ids, ids) for g in groups for ids in g.completions]
    for (prompt, ids), a in zip(rows, A, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(len(ids)), ids]
        ratio = (logprobs - logprobs.detach()).exp()
        weight = 1 / len(ids) / len(rows) if aggregation == "sequence" else 1 / tokens
        losses.append(-(ratio * a).sum() * weight)
    sum(losses).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_zero_variance_groups_move_nothing_and_cost_no_forward(fresh_base, monkeypatch):
    model, tokenizer = fresh_base
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(smepo, "token_logprobs", lambda *_: pytest.fail("scored a useless group"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    groups = [make_group(fresh_base, [1.0] * 4), make_group(fresh_base, [0.0] * 4)]
    stats = smepo.update(model, tokenizer, optimizer, groups, settings(prompts_per_step=2))
    assert stats["grad_norm"] == 0 and stats["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_mini_batch_without_signal_takes_no_step_and_enters_no_average(fresh_base):
    model, tokenizer = fresh_base
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    groups = [make_group(fresh_base, [1.0, 0, 0, 0]), make_group(fresh_base, [0.0] * 4)]
    alone = smepo.update(model, tokenizer, optimizer, groups[:1], settings(prompts_per_step=1))
    config = settings(prompts_per_step=2, mini_batches=2)
    both = smepo.update(model, tokenizer, optimizer, groups, config)
    assert both["grad_norm"] == pytest.approx(alone["grad_norm"]) and alone["grad_norm"] > 0


def spy_on_ratios(monkeypatch) -> list[float]:
    """The largest |log ratio| of each policy_loss call, in order."""
    seen, policy_loss = [], smepo.policy_loss

    def spy(logprobs, old, A, mask, *rest):
        seen.append(((logprobs - old) * mask).abs().max().item())
        return policy_loss(logprobs, old, A, mask, *rest)

    monkeypatch.setattr(smepo, "policy_loss", spy)
    return seen


def test_ratio_is_exactly_one_at_the_first_update_only(fresh_base, monkeypatch):
    seen = spy_on_ratios(monkeypatch)
    model, tokenizer = fresh_base
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = [make_group(fresh_base, [1.0, 0, 0, 0]) for _ in range(4)]
    smepo.update(model, tokenizer, optimizer, groups, settings())  # one update a batch
    assert seen == [0.0]
    seen.clear()
    config = settings(mini_batches=2, inner_epochs=2)
    stats = smepo.update(model, tokenizer, optimizer, groups, config)
    assert seen[0] == 0.0 and all(value > 1e-4 for value in seen[1:]) and len(seen) == 4
    assert stats["clip_fraction"] > 0  # and so clipping can be seen to act


def test_mini_batches_each_take_a_step_of_their_own(fresh_base):
    model, tokenizer = fresh_base
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups = [make_group(fresh_base, [1.0, 0, 0, 0]) for _ in range(4)]
    smepo.update(model, tokenizer, optimizer, groups, settings(mini_batches=4, inner_epochs=3))
    assert optimizer.state[next(model.parameters())]["step"] == 12


def test_only_sampled_tokens_carry_gradient(fresh_base, monkeypatch):
    """The states of prompt, guide and padding get no gradient; those of sampled tokens all do."""
    model, tokenizer = fresh_base
    captured, forward = [], model.base_model.forward

    def spy(*args, **kwargs):
        output = forward(*args, **kwargs)
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
        captured.append(output.last_hidden_state)
        return output

    monkeypatch.setattr(model.base_model, "forward", spy)
    group = make_group(fresh_base, [1.0, 0, 0, 0])
    smepo.update(model, tokenizer, torch.optim.SGD(model.parameters(), lr=0.0), [group],
                 settings(prompts_per_step=1))
    prompt, completion = captured  # one forward over the prompt, one over the completions
    lengths = torch.tensor(sorted(len(ids) for ids in group.completions))
    assert completion.shape[:2] == (4, lengths.max())
    sampled = torch.arange(lengths.max()) < lengths[:, None]
    assert torch.equal(completion.grad.abs().sum(-1) > 0, sampled)
    assert prompt.shape[0] == 1 and prompt.grad is None


def test_dropout_of_the_model_folder_is_off(tmp_path, base):
    config = GPT2Config(vocab_size=len(base[1]), n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5,
                        embd_pdrop=0.5, attn_pdrop=0.5, bos_token_id=2, eos_token_id=2)
    for part in (GPT2LMHeadModel(config).train(), base[1]):
        part.save_pretrained(tmp_path / "dropout")
    model, _ = smepo.load_model(tmp_path / "dropout", settings())
    ids = torch.tensor([[5, 6, 7, 8]])
    scores = [smepo.token_logprobs(model, ids, torch.ones_like(ids), 2, 1.0) for _ in range(2)]
    assert torch.equal(*scores)


def test_temperature_reaches_the_scoring(fresh_base):
    groups = [make_group(fresh_base, [1.0, 0, 0, 0])]
    warm = gradient_of(fresh_base, groups, temperature=1.0)
    hot = gradient_of(fresh_base, groups, temperature=2.0)
    assert (warm - hot).abs().max() > 1e-4


def test_entropy_metric_estimates_the_entropy(fresh_base):
    model, tokenizer = fresh_base
    torch.manual_seed(0)
    group = smepo.rollout(model, tokenizer, [problem(fresh_base)], [True], 256, settings())[0]
    group.rewards = [float(i % 2) for i in range(256)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = settings(prompts_per_step=1, group_size=256)
    stats = smepo.update(model, tokenizer, optimizer, [group], config)
    total, tokens = 0.0, 0
    for ids in group.completions:
        logits = model(torch.tensor([group.prompt_ids + ids])).logits[0, -len(ids) - 1 : -1]
        total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        tokens += len(ids)
    assert stats["entropy"] == pytest.approx(total / tokens, rel=0.1)


def test_masked_expert_loss_is_the_nll_of_the_visible_tokens_only(base):
    model, tokenizer = base
    p = problem(base, "Compute 2 * 3", "Step 1: 2 * 3 = 6.\nThe answer is 6.", "6")
    tokens = tokenizer.tokenize(p.trace) + [tokenizer.eos_token]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    logits = model(torch.tensor([p.prompt_ids + ids])).logits[0, len(p.prompt_ids) - 1 : -1]
    nll = -logits.log_softmax(-1)[range(len(ids)), ids]
    visible = [not token.strip().isdigit() for token in tokens]
    assert visible.count(False) == 4
    expected = nll[visible].mean()
    torch.testing.assert_close(smepo.masked_expert_loss(model, tokenizer, p, "math"), expected)


def test_expert_loss_is_off_by_default_and_moves_the_policy_when_on(fresh_base):
    model, tokenizer = fresh_base
    group = make_group(fresh_base, [0.0] * 4)  # no policy gradient
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for coefficient in (0.0, 1.0):
        config = settings(prompts_per_step=1, expert_coef=coefficient)
        smepo.update(model, tokenizer, optimizer, [group], config)
        losses.append(smepo.masked_expert_loss(model, tokenizer, group.problem, "math").item())
    untouched = smepo.load_model(TASKS / "base", config)
    first = smepo.masked_expert_loss(*untouched, group.problem, "math")
    assert losses[0] == first.item() and losses[1] < losses[0]


def test_metrics_of_a_step_by_hand(base, monkeypatch):
    p = problem(base)
    leaky = dataclasses.replace(p, leaky=True)
    groups = [
        Group(p, True, [], [], [[1] * 2] * 4, [""] * 4, [True] * 4, [0.0] * 4),
        Group(leaky, True, [], [], [[1] * 4] * 4, [""] * 4, [True] * 4, [1.0] * 4),
        Group(p, False, [], [], [[1, 1, 0, 1, 1, 1, 1]] * 4, [""] * 4, [True, False] * 2,
              [1.0, 0.0] * 2),  # seven tokens, of which six were sampled
        Group(p, False, [], [], [[1] * 4] * 4, [""] * 4, [True] * 4, [0.0] * 4),
    ]
    monkeypatch.setattr(smepo, "collect_rollouts", lambda *_: (groups, 24))
    monkeypatch.setattr(smepo, "update", lambda *_: {"loss": 0.5})
    optimizer = torch.optim.SGD(base[0].parameters())
    returned, metrics = smepo.train_step(*base, optimizer, [p], 7, settings())
    expected = {"step": 7, "reward": 6 / 16, "completion_length": 4.0, "truncated": 2 / 16,
                "zero_variance_wrong": 0.5, "zero_variance_right": 0.25, "guided": 0.5,
                "leak_rate": 0.5, "loss": 0.5, "rollouts": 24}
    assert returned is groups and {k: metrics[k] for k in expected} == pytest.approx(expected)
    seconds = metrics["seconds_rollout"] + metrics["seconds_update"]
    assert metrics["rollouts_per_second"] == pytest.approx(24 / seconds, rel=0.01)
    tokens = 24 * 4.0 / metrics["seconds_rollout"]
    assert metrics["tokens_per_second"] == pytest.approx(tokens, rel=0.01)


# ---- Evaluation ----------------------------------------------------------------------------------


def test_pass_at_k_equals_the_average_over_all_subsets():
    for n, c in [(4, 1), (5, 3), (6, 0), (6, 6)]:
        for k in range(1, n + 1):
            outcomes = [1] * c + [0] * (n - c)
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(max(subset) for subset in subsets) / len(subsets)
            assert smepo.pass_at_k(n, c, k) == pytest.approx(expected)


def test_evaluation_by_hand_and_unguided_by_construction(base, monkeypatch):
    p = dataclasses.replace(problem(base), difficulty="2")
    q = dataclasses.replace(p, difficulty="5")
    results = iter([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])

    def rollout(model, tokenizer, problems, guided, group_size, config):
        assert guided == [False] * 4 and group_size == 2
        return [Group(x, False, [], [], [], [], [], next(results)) for x in problems]

    monkeypatch.setattr(smepo, "rollout", rollout)
    table = smepo.evaluate(None, None, [p, p, q, q], settings(eval_samples=2))
    assert table["pass@1"]["2"] == pytest.approx([0.75, 0.25 / 2**0.5])
    assert table["pass@1"]["5"] == pytest.approx([0.25, 0.25 / 2**0.5])
    assert table["pass@1"]["mean"] == pytest.approx([0.5, 0.125])
    assert table["pass@2"]["mean"][0] == pytest.approx(0.75)


def test_evaluation_never_puts_a_guide_into_a_prompt(base, monkeypatch):
    prompts, sample = [], smepo.sample
    monkeypatch.setattr(smepo, "sample", lambda *a: prompts.extend(a[2]) or sample(*a))
    config = settings(guide="full", eval_samples=1)
    smepo.evaluate(*base, [problem(base)], config)  # the problem has a guide
    assert base[1].batch_decode(prompts) == ["<|user|>Compute 7 - 6 + 3 * 5<|end|><|assistant|>"]


def test_calibration_of_the_shipped_base(base):
    from pretrain import calibrate

    table = calibrate(arithmetic, *base, settings(), count=400)
    assert 0.45 <= table["none", 2][0] <= 0.60
    assert table["none", 5][0] <= 0.05
    assert table["semantic", 5][0] >= 0.15
    assert table["full", 5][0] >= 0.90
    assert table["altered", 5][0] >= 0.40  # it copies what it is shown, even if that is wrong
    size = sum(path.stat().st_size for path in (TASKS / "base").iterdir())
    assert size <= 2**20


# ---- Training, resuming, bad input ---------------------------------------------------------------


def test_training_raises_the_guided_reward(tmp_path):
    config = settings(steps=16, prompts_per_step=16, group_size=8, learning_rate=3e-4,
                      test_data=write_rows(tmp_path / "test.jsonl", rows("test", 20)))
    folder = smepo.train(config)
    rewards = [record["reward"] for record in without_times(folder / "metrics.jsonl")[1:]]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1


def test_a_run_writes_what_it_promises_and_the_same_seed_writes_the_same(tmp_path, capsys):
    config = small(tmp_path)
    assert smepo.main(flags(config)) == 0
    shown = capsys.readouterr().out
    for part in ("Compute", "[NUMBER]", "its reward", "difficulty mean", "±", "runs"):
        assert part in shown
    folder = Path("runs/smepo")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "rollouts.jsonl", "curve.png", "checkpoint"}
    assert json.loads((folder / "config.json").read_text("utf-8")) == dataclasses.asdict(config)
    before, *steps = without_times(folder / "metrics.jsonl")
    assert before["step"] == 0 and [step["step"] for step in steps] == [1, 2, 3, 4]
    promised = {"reward", "zero_variance_wrong", "zero_variance_right", "completion_length",
                "truncated", "entropy", "clip_fraction", "grad_norm", "loss", "guided", "leak_rate"}
    assert all(promised <= set(step) for step in steps)
    full = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[2])
    assert {"rollouts_per_second", "tokens_per_second", "seconds_rollout", "seconds_update",
            "seconds_evaluation"} <= set(full)
    assert all(step["guided"] == 1 and step["leak_rate"] == 0 for step in steps)
    lines = (folder / "rollouts.jsonl").read_text("utf-8").splitlines()
    groups = [json.loads(line) for line in lines]
    assert len(groups) == 16 and all(len(group["completions"]) == 4 for group in groups)
    smepo.train(dataclasses.replace(config, name="again"))
    assert without_times("runs/again/metrics.jsonl") == [before, *steps]
    smepo.train(dataclasses.replace(config, name="other", seed=1))
    assert without_times("runs/other/metrics.jsonl") != [before, *steps]
    smepo.load_model(folder / "checkpoint", config)  # a plain Hugging Face folder


def weights(folder) -> list[torch.Tensor]:
    return list(smepo.load_model(folder / "checkpoint", settings())[0].parameters())


def assert_same_run(a, b):
    assert without_times(a / "metrics.jsonl") == without_times(b / "metrics.jsonl")
    assert (a / "rollouts.jsonl").read_bytes() == (b / "rollouts.jsonl").read_bytes()
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


class Killed(BaseException):
    """Stands for the process dying at that instant: nothing catches it, nothing cleans up."""


KILL_POINTS = ["sample", "append", "save_pretrained", "os.replace", "shutil.rmtree", "torch.save"]
RESUMED = {"save_every": 1, "mini_batches": 2, "inner_epochs": 2, "guide_when": "0.5"}


def dying_at_once(*_):
    raise Killed


@pytest.mark.parametrize("point", KILL_POINTS)
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_killed_anywhere_a_run_resumes_to_the_same_weights_and_metrics(
    tmp_path, monkeypatch, point, nth
):
    config = small(tmp_path, **RESUMED)
    whole = smepo.train(dataclasses.replace(config, name="whole"))
    owner, name = {
        "sample": (smepo, "sample"), "append": (files, "append"), "os.replace": (os, "replace"),
        "save_pretrained": (LlamaForCausalLM, "save_pretrained"), "torch.save": (torch, "save"),
        "shutil.rmtree": (shutil, "rmtree"),
    }[point]  # fmt: skip
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        try:
            smepo.train(dataclasses.replace(config, name="killed"))
        except Killed:
            pass
    assert len(calls) >= min(nth, 4)
    folder = Path("runs/killed")
    with monkeypatch.context() as patch:  # and killed again as soon as it resumes
        patch.setattr(os, "truncate", dying_at_once)
        try:
            smepo.train(dataclasses.replace(config, name="killed", resume=True))
        except Killed:
            pass
    if folder.exists():
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 3, "rew')  # a line torn by the kill
    smepo.train(dataclasses.replace(config, name="killed", resume=True))
    assert_same_run(whole, folder)
    names = {path.name for path in folder.iterdir()}
    # nothing half-written is left
    assert names == {"config.json", "checkpoint", "metrics.jsonl", "rollouts.jsonl"}


def test_a_kill_between_the_two_renames_loses_no_step(tmp_path):
    config = small(tmp_path, steps=2)
    folder = smepo.train(config)
    os.replace(folder / "checkpoint", folder / "checkpoint.old")
    _, start = files.open_run(dataclasses.replace(config, resume=True))
    assert start == folder / "checkpoint" and (start / "training.pt").exists()


def test_resume_of_a_longer_run_and_of_a_finished_one(tmp_path):
    whole = smepo.train(small(tmp_path, name="whole", steps=6))
    smepo.train(small(tmp_path, name="short", steps=4, eval_every=6))
    with pytest.raises(UserError, match="--eval_every 6"):
        smepo.train(small(tmp_path, name="short", steps=6, resume=True))
    folder = smepo.train(small(tmp_path, name="whole", steps=6, resume=True))
    assert_same_run(whole, folder)


def test_ctrl_c_finishes_the_step_saves_it_and_resumes(tmp_path, monkeypatch, capsys):
    config = small(tmp_path, save_every=100)
    whole = smepo.train(dataclasses.replace(config, name="whole"))
    train_step = smepo.train_step

    def pressed(*args):
        smepo.on_ctrl_c()
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(smepo, "train_step", pressed)
        patch.setattr(smepo.signal, "signal", lambda *_: None)
        assert smepo.main(flags(config)) == 130
    assert "--resume" in capsys.readouterr().err
    assert torch.load("runs/smepo/checkpoint/training.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(smepo, "STOP", [])
    assert_same_run(whole, smepo.train(dataclasses.replace(config, resume=True)))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a Ctrl-C to one process")
def test_a_real_ctrl_c_exits_with_130_and_leaves_a_checkpoint(tmp_path):
    command = [sys.executable, str(HERE / "smepo.py"), *flags(small(tmp_path, steps=10_000))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "runs" / "smepo" / "rollouts.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert (tmp_path / "runs" / "smepo" / "checkpoint" / "training.pt").exists()


def refused(capsys, arguments, running=False) -> str:
    """Exit code 2 and exactly one line on stderr, which is returned; of a run that was `running`
    the last one, as its progress bar has been there."""
    assert smepo.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert running or len(lines) == 1, lines
    return lines[-1]


@pytest.mark.parametrize("change, message", [
    (["--guide", "half"], "half"), (["--steps", "many"], "many"), (["--nonsense", "1"], "nonsense"),
    (["--group_size", "1"], "group_size"), (["--steps", "0"], "steps"),
    (["--guide_when", "sometimes"], "guide_when"), (["--guide_when", "1.5"], "guide_when"),
    (["--mini_batches", "3"], "mini_batches"), (["--temperature", "0"], "temperature"),
    (["--max_prompt_tokens", "10"], "max_prompt_tokens"), (["--data", "none.jsonl"], "none.jsonl"),
    (["--model", "no/such/folder"], "no/such/folder"), (["--seed", "-1"], "seed"),
    (["--seed", str(10**17)], "seed"), (["--device", "warp"], "device"),
    (["--eval", "5"], "--eval"), (["--prefix_ratio", "nan"], "prefix_ratio"),
    (["--learning_rate", "-1"], "learning_rate"), (["--learning_rate", "nan"], "learning_rate"),
    (["--learning_rate", "inf"], "learning_rate"), (["--clip_low", "-3"], "clip_low"),
    (["--name", "../elsewhere"], "name"), (["--name", ""], "name"),
])
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, capsys, change, message):
    assert message in refused(capsys, flags(small(tmp_path)) + change)
    assert not Path("runs").exists()


GOOD = {"question": "Compute 1 + 1", "teacher_ds": "Step 1: 1 + 1 = 2.\nThe answer is 2.",
        "reward_model": {"style": "rule", "ground_truth": "2"}}


@pytest.mark.parametrize("bad, message", [
    ({"question": ""}, "row 2 has no question"),
    ({"question": None}, "row 2 has no question"),
    ({"reward_model": {"style": "rule", "ground_truth": None}}, "row 2 has no reward_model"),
    ({"reward_model": None}, "row 2 has no reward_model"),
    ({"teacher_ds": None}, "row 2 has no teacher_ds"),
    ({"teacher_ds": " "}, "row 2 has no teacher_ds"),
    ({"reward_model": {"style": "rule"}}, "row 2 has no reward_model"),
])
def test_bad_rows_are_named_by_their_line(tmp_path, capsys, bad, message):
    data = write_rows(tmp_path / "bad.jsonl", [GOOD, GOOD | bad, GOOD])
    assert message in refused(capsys, flags(small(tmp_path, data=data)))


def test_a_ground_truth_may_be_a_number_even_zero(tmp_path, base):
    row = GOOD | {"reward_model": {"style": "rule", "ground_truth": 0}}
    path = write_rows(tmp_path / "zero.jsonl", [row])
    assert smepo.load_problems(path, "semantic", base[1], settings())[0].answer == "0"


def test_a_row_needs_a_trace_only_where_the_arm_does(tmp_path, base):
    path = write_rows(tmp_path / "bare.jsonl", [GOOD | {"teacher_ds": None}] * 2)
    assert len(smepo.load_problems(path, "none", base[1], settings())) == 2
    with pytest.raises(UserError, match="teacher_ds"):
        smepo.load_problems(path, "none", base[1], settings(data=path, expert_coef=0.1))


@pytest.mark.parametrize("content", ["", "\n", "not json\n", '{"question": \n'])
def test_unreadable_data_is_refused(tmp_path, capsys, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    assert "bad.jsonl" in refused(capsys, flags(small(tmp_path, data=str(path))))


@pytest.mark.parametrize("change, message", [
    ({"reward_model": "16"}, "row 1 has no reward_model"),
    ({"teacher_ds": ["Step 1", "Step 2"]}, "row 1 has no teacher_ds"),
])
def test_columns_of_another_type_are_refused(tmp_path, capsys, change, message):
    data = write_rows(tmp_path / "bad.jsonl", [GOOD | change] * 2)
    assert message in refused(capsys, flags(small(tmp_path, data=data)))


def test_foreign_files_in_a_run_folder_are_left_alone(tmp_path):
    config = small(tmp_path, steps=2)
    folder = smepo.train(config)
    write_rows(folder / "mine.jsonl", [GOOD])
    before = (folder / "mine.jsonl").read_bytes()
    smepo.train(dataclasses.replace(config, steps=3, resume=True))
    assert (folder / "mine.jsonl").read_bytes() == before


def test_a_run_without_matplotlib_still_ends_with_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    assert smepo.main(flags(small(tmp_path, steps=1))) == 0
    shown = capsys.readouterr().out
    assert "difficulty mean" in shown and "matplotlib" in shown
    assert not Path("runs/smepo/curve.png").exists()


def test_parquet_loads_like_jsonl(tmp_path, base):
    lines = rows("train", 5)
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(lines).to_parquet(path)
    ours = smepo.load_problems(path, "semantic", base[1], settings())
    jsonl = write_rows(tmp_path / "rows.jsonl", lines)
    assert ours == smepo.load_problems(jsonl, "semantic", base[1], settings())


def saved_without(part: str, path, fresh_base) -> str:
    setattr(fresh_base[1], part, None)
    for piece in fresh_base:
        piece.save_pretrained(path)
    return str(path)


def test_a_tokenizer_without_eos_is_refused(tmp_path, capsys, fresh_base):
    model = saved_without("eos_token", tmp_path / "model", fresh_base)
    assert "eos_token" in refused(capsys, flags(small(tmp_path, model=model)))


def test_a_tokenizer_without_pad_pads_with_its_eos(tmp_path, fresh_base):
    path = saved_without("pad_token", tmp_path / "model", fresh_base)
    model, tokenizer = smepo.load_model(path, settings())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    problems = smepo.load_problems(settings().test_data, "none", tokenizer, settings())[::300]
    assert smepo.evaluate(model, tokenizer, problems, settings())["pass@1"]["2"][0] > 0


def test_a_base_model_gets_a_plain_template_and_is_told_so(tmp_path, capsys, fresh_base):
    path = saved_without("chat_template", tmp_path / "model", fresh_base)
    _, tokenizer = smepo.load_model(path, settings())
    assert "no chat template" in capsys.readouterr().err
    assert smepo.build_prompt(tokenizer, "1 + 1?", "2.", "Be brief.") == (
        "System: Be brief.\n\nUser: 1 + 1?\n\nAssistant: Here is an example solution:\n2.\n\n"
        "Assistant:")


def test_a_chat_template_that_refuses_a_guide_is_refused_in_one_line(tmp_path, capsys, fresh_base):
    model, tokenizer = fresh_base
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role != 'user' %}{{ raise_exception('only "
        "users') }}{% endif %}{{ message.content }}{% endfor %}")
    path = str(tmp_path / "model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = small(tmp_path, model=path)
    assert "refuses user, assistant, then an answer: only users" in refused(capsys, flags(config))
    smepo.load_model(path, dataclasses.replace(config, guide="none"))  # GRPO shows none
    with pytest.raises(UserError, match="refuses system, user, then"):
        smepo.load_model(path, dataclasses.replace(config, guide="none", system="Be brief."))


def test_a_system_prompt_comes_with_domain_and_none_with_a_toy():
    assert Config().system == Config(task="search").system == ""
    assert "boxed" in Config(domain="math").system and "python" in Config(domain="code").system
    assert Config(domain="math", system="").system == ""


def random_model(name: str, vocabulary: int):
    """A small random model of three architectures; GPT-2 has absolute positions."""
    torch.manual_seed(0)
    size = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **size))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **wide, **size))
    return LlamaForCausalLM(LlamaConfig(**wide, **size))


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_other_architectures_train_and_their_checkpoints_load(tmp_path, base, name):
    for piece in (random_model(name, len(base[1])), base[1]):
        piece.save_pretrained(tmp_path / name)
    config = small(tmp_path, model=str(tmp_path / name), gradient_checkpointing=True, warmup=0.5,
                   schedule="cosine", expert_coef=0.1, learning_rate=1e-2)
    folder = smepo.train(config)
    records = without_times(folder / "metrics.jsonl")
    assert [r["learning_rate"] for r in records[1:]] == pytest.approx(
        [1e-2 * rise * (0.5 + 0.5 * math.cos(math.pi * done / 4))
         for rise, done in ((0.5, 0), (1, 1), (1, 2), (1, 3))])
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    before = AutoModelForCausalLM.from_pretrained(config.model)
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in pairs)


def test_the_best_checkpoint_by_evaluation_is_kept(tmp_path, monkeypatch):
    scores = iter([0.1, 0.4, 0.3])  # steps 0, 2, 4
    monkeypatch.setattr(smepo, "evaluate", lambda *_: {"pass@1": {"mean": [next(scores), 0.0]}})
    folder = smepo.train(small(tmp_path))
    steps = [torch.load(folder / name / "training.pt", weights_only=True)["step"]
             for name in ("best", "checkpoint")]
    assert steps == [2, 4]


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_gradient_checkpointing_and_few_logits_at_a_time_change_nothing(monkeypatch, name):
    model = random_model(name, 50)
    ids, mask = smepo.pad([[5, 6, 7, 8, 9], [7, 8, 9], [5, 6, 7, 8, 9]], 0, "left", "cpu")
    tails = torch.randint(1, 50, (3, 6))
    inputs = torch.cat([ids, tails], 1), torch.cat([mask, torch.ones_like(tails)], 1), 6, 0.7
    found = []
    for trains, logits in ((False, 2**25), (False, 150), (True, 150)):
        monkeypatch.setattr(smepo, "LOGITS", logits)
        model.gradient_checkpointing_enable()
        model.train(trains)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if name == "gpt2":
            for block in model.transformer.h:
                block.attn.attn_dropout.p = 0.0
        model.zero_grad()
        logprobs = smepo.token_logprobs(model, *inputs)
        (logprobs * torch.arange(6)).sum().backward()
        found.append((logprobs, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for logprobs, gradient in found[1:]:
        torch.testing.assert_close(logprobs, found[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-4, rtol=1e-4)


def test_a_model_that_rescales_its_logits_is_refused(tmp_path, capsys, base):
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=len(base[1]), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1))
    for piece in (model, base[1]):
        piece.save_pretrained(tmp_path / "gemma")
    message = refused(capsys, flags(small(tmp_path, model=str(tmp_path / "gemma"))))
    assert "rescales its logits" in message


def test_long_prompts_are_left_out_and_long_guides_shortened_at_a_line_end(
        tmp_path, capsys, base):
    long = dict(GOOD, question="Compute 1" + " + 1" * 40)
    lines = ["Step 1: 1 + 1 = 2."] * 30
    wordy = dict(GOOD, teacher_ds="\n".join(lines))
    path = write_rows(tmp_path / "rows.jsonl", [long, GOOD, wordy])
    config = settings(max_prompt_tokens=70)
    problems = smepo.load_problems(path, "full", base[1], config)
    assert f"{path}: 1 questions exceed --max_prompt_tokens" in capsys.readouterr().out
    assert [p.shortened for p in problems] == [False, True]
    assert problems[0].guide == GOOD["teacher_ds"] and len(problems[1].guided_ids) <= 70
    kept = len(problems[1].guide.split("\n"))
    assert problems[1].guide == "\n".join(lines[:kept]) and 1 < kept < 30
    one_more = smepo.build_prompt(base[1], GOOD["question"], "\n".join(lines[: kept + 1]))
    assert len(base[1](one_more, add_special_tokens=False)["input_ids"]) > 70


def test_rows_may_be_nested_and_tests_may_be_no_text(tmp_path):
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    row = {"extra_info": {"question": "Add one.", "teacher_ds": "```python\nx\n```", "index": 3},
           "reward_model": {"style": "rule", "ground_truth": tests}}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (question, answer, trace, _), = files.read_rows(path, wants_trace=True)
    assert (question, trace) == ("Add one.", "```python\nx\n```") and json.loads(answer) == tests


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, flags(small(tmp_path, model=str(tmp_path / "empty"))))


def test_a_run_folder_is_never_overwritten_and_belongs_to_one_config(tmp_path, capsys):
    config = small(tmp_path, steps=2)
    smepo.train(config)
    before = (Path("runs/smepo/metrics.jsonl")).read_bytes()
    capsys.readouterr()
    assert "--resume" in refused(capsys, flags(config))
    other = dataclasses.replace(config, resume=True, learning_rate=0.5)
    assert f"--learning_rate {config.learning_rate}" in refused(capsys, flags(other))
    assert (Path("runs/smepo/metrics.jsonl")).read_bytes() == before


def test_a_step_that_is_not_finite_is_refused_and_the_last_checkpoint_stays(
    tmp_path, capsys, monkeypatch
):
    calls, policy_loss = [], smepo.policy_loss

    def exploding(*args):
        calls.append(1)
        loss, stats = policy_loss(*args)
        return (loss * math.nan if len(calls) > 2 else loss), stats

    monkeypatch.setattr(smepo, "policy_loss", exploding)
    config = small(tmp_path, save_every=1, data=write_rows(tmp_path / "easy.jsonl", [GOOD] * 4),
                   steps=50, guide="none")
    assert "not finite" in refused(capsys, flags(config), running=True)
    step = torch.load("runs/smepo/checkpoint/training.pt", weights_only=True)["step"]
    assert step >= 2 and all(p.isfinite().all() for p in weights(Path("runs/smepo")))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(fresh_base, monkeypatch):
    model, tokenizer = fresh_base
    before, policy_loss = [p.clone() for p in model.parameters()], smepo.policy_loss
    monkeypatch.setattr(smepo, "policy_loss", lambda *a: (policy_loss(*a)[0] * math.inf, {
        "clip_fraction": torch.tensor(0.0)}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups = [make_group(fresh_base, [1.0, 0, 0, 0])]
    with pytest.raises(UserError, match="not finite"):
        smepo.update(model, tokenizer, optimizer, groups, settings(prompts_per_step=1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_whose_outputs_are_not_finite_is_refused(tmp_path, capsys, base):
    model, tokenizer = smepo.load_model(TASKS / "base", settings())
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    for piece in (model, tokenizer):
        piece.save_pretrained(tmp_path / "model")
    assert "not finite" in refused(capsys, flags(small(tmp_path, model=str(tmp_path / "model"))))


def test_every_setting_is_a_documented_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        smepo.main(["--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    for setting in dataclasses.fields(Config):
        assert f"--{setting.name}" in shown and setting.metadata["help"]


# ---- The compare command: tiny_tasks/compare.py --------------------------------------------------


def fake(arm: str, seed: int, means: list[float], seconds: float, **changes) -> dict:
    """The record of a job with 2 steps between points, as run_job leaves it."""
    steps = 2 * (len(means) - 1)
    levels = {level: 0.1 for level in "2345"}
    return {"arm": arm, "seed": seed, "steps": steps, "eval_every": 2, "learning_rate": 2e-4,
            "task": "arithmetic", "data": "none_5.jsonl", "steps_kept": compare.KEPT,
            "curve": [[0.5, 0.75, 0.25, 0.0, 128, seconds / 2, seconds / 2]] * steps,
            "points": [levels | {"mean": mean} for mean in means],
            "final": {"pass@1": levels | {"mean": means[-1]}, "pass@8": {"mean": 0.9}},
            "copy_rate": 0.5, "hint_reliance": float("nan")} | changes


def test_speed_counts_steps_rollouts_and_seconds_by_hand():
    grpo = {0: fake("none", 0, [0.2, 0.3, 0.4], 1.0), 1: fake("none", 1, [0.2, 0.3, 0.6], 1.0)}
    smepo_runs = [fake("semantic", 0, [0.2, 0.45, 0.5], 0.5),
                  fake("semantic", 1, [0.2, 0.3, 0.5], 2.0)]
    assert compare.spent(grpo[0], "seconds") == [0, 2, 4]
    assert compare.spent(grpo[0], "rollouts") == [0, 256, 512]
    assert compare.reaches(smepo_runs[0], 0.4) == {"steps": 2, "rollouts": 256, "seconds": 1.0}
    assert compare.reaches(smepo_runs[1], 0.6) is None
    # seed 0 takes 1 s for what took GRPO 4; seed 1 never gets there, so it is not in the mean
    assert compare.speed(smepo_runs, grpo) == ["2.0", "256", "1.0", "4.00", "1 of 2"]
    assert compare.speed(list(grpo.values()), grpo)[-2:] == ["1.00 ± 0.00", "2 of 2"]
    ahead = fake("semantic", 0, [0.4, 0.4, 0.4], 0.5)  # from the start: at the first evaluation
    assert compare.speed_up(ahead, grpo[0]) == 4.0


def test_sweep_tells_speed_by_the_success_of_the_base(tmp_path):
    records = [fake(arm, seed, means, 1.0, data=f"train_{k}.jsonl")
               for k in (2, 5) for seed in (0, 1)
               for arm, means in (("none", [0.2, 0.3, 0.4]),
                                  ("semantic", [0.2, 0.4, 0.5] if k == 2 else [0.2] * 3))]
    text = compare.sweep_table(records, tmp_path)
    assert "| k = 2 | 0.100 | semantic | 0.500 ± 0.000 | 2.00 ± 0.00 | 2 of 2 |" in text
    assert "| k = 5 | 0.100 | semantic | 0.200 ± 0.000 | 0.00 ± 0.00 | 0 of 2 |" in text
    assert (tmp_path / "sweep.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_learning_rates_are_tabulated_by_arm(tmp_path):
    records = [fake("full", 100, [0.2, mean], 1.0, learning_rate=rate)
               for rate, mean in ((1e-4, 0.3), (2e-4, 0.5))]
    text = compare.rates_table(records, tmp_path)
    assert "| full | 0.0001 | 0.300 |\n| full | 0.0002 | 0.500 |" in text


def test_mean_error_by_hand():
    assert compare.mean_error([1.0, 2.0, 3.0]) == "2.000 ± 0.577"  # 1 / sqrt 3
    assert compare.mean_error([1.0]) == "1.000" and compare.mean_error([]) == "–"
    assert compare.mean_error([1.0, float("nan")], 1) == "1.0"


def test_altered_traces_are_wrong_in_every_result_but_look_like_the_expert_s():
    for row in rows("test", 1000):
        trace, answer = arithmetic.altered(row["question"], random.Random(row["question"]))
        assert smepo.stated(trace) == answer
        assert smepo.mask_trace(trace, "math") == smepo.mask_trace(row["teacher_ds"], "math")
        assert smepo.stated(trace) != row["reward_model"]["ground_truth"]
        for sum_, value in re.findall(r"Step \d: (.*) = (\d+)", trace):
            assert eval(sum_) != int(value)


def test_a_job_trains_its_arm_and_keeps_what_the_summary_needs(monkeypatch):
    load = smepo.load_problems
    monkeypatch.setattr(smepo, "load_problems", lambda *a: load(*a)[::50])
    given = compare.parse(["--arms", "on-failure", "--steps", "2"])
    job = compare.jobs_of(given, [3], {}, Config().data)[0]
    monkeypatch.chdir(HERE)
    ticks = []
    record = compare.run_job(job, lambda: ticks.append(1))
    again = compare.run_job(job, lambda: None)
    assert len(ticks) == len(record["curve"]) == 2 and len(record["points"]) == 3
    assert compare.column(record, "rollouts")[0] > 128  # both passes of on-failure count
    assert set(record["final"]["pass@8"]) == {"2", "3", "4", "5", "mean"}
    assert 0 <= record["copy_rate"] <= 1
    for key in ("points", "final", "copy_rate", "hint_reliance"):
        assert record[key] == again[key]
    assert json.loads(json.dumps(record))["curve"] == record["curve"]


def test_hint_reliance_is_the_mean_difference_of_sequence_logprobs(base, monkeypatch):
    model, tokenizer = base
    p = problem(base)
    torch.manual_seed(0)
    value = compare.hint_reliance(model, tokenizer, [p] * 20, settings())
    torch.manual_seed(0)
    groups = smepo.rollout(model, tokenizer, [p] * 20, [True] * 20, 1, settings())
    differences = []
    for ids in (group.completions[0] for group in groups if group.rewards[0]):
        parts = []
        for prompt in (p.guided_ids, p.prompt_ids):
            row = torch.tensor([prompt + ids])
            logprobs = model(row).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            parts.append(logprobs.gather(1, torch.tensor(ids)[:, None]).sum().item())
        differences.append(parts[0] - parts[1])
    assert value == pytest.approx(sum(differences) / len(differences), abs=1e-3)
    hopeless = dataclasses.replace(p, answer="none")  # no correct rollout, so nothing to average
    assert math.isnan(compare.hint_reliance(model, tokenizer, [hopeless], settings()))


def test_finished_jobs_are_not_run_again_and_the_summary_comes_from_their_files(
        tmp_path, capsys, monkeypatch):
    arguments = ["compare", "--arms", "none,semantic", "--seeds", "2", "--steps", "4"]
    given = compare.parse(arguments[1:])
    jobs = compare.jobs_of(given, (1, 2), compare.RATES["arithmetic"], Config().data)
    for job in jobs:
        record = fake(job["arm"], job["seed"], [0.2, 0.3, 0.4, 0.4, 0.5], 1.0) | job
        record["curve"] = record["curve"][:4]
        path = compare.file_of(job, Path("runs/compare"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(compare, "run_job", None)  # would raise
    assert smepo.main(arguments) == 0
    out = capsys.readouterr().out
    assert Path("runs/compare/summary.md").read_text(encoding="utf-8") in out
    assert "| semantic | 0.500 ± 0.000 |" in out
    assert Path("runs/compare/compare.png").stat().st_size > 0


def test_a_job_that_fails_ends_the_command_with_its_one_line(tmp_path, capsys):
    command = [sys.executable, HERE / "smepo.py", "compare", "--quick", "--jobs", "1"]
    run = subprocess.run(command, capture_output=True, text=True,  # no model in this folder
                         env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "smepo.py: --model tiny_tasks/base is no model" in run.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--arms", "none,magic"], "unknown arm magic: take some of none, full"),
    (["--seeds", "0"], "--seeds 0: it must be at least 1"), (["--rates", "fast"], "--rates fast"),
    (["--sweep", "--arms", "semantic"], "add none to --arms"), (["--what"], "unknown flag --what"),
    (["--quick", "--sweep"], "not allowed with")])
def test_compare_refuses_bad_input_in_one_line(capsys, arguments, message):
    assert smepo.main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path("runs").exists()


# ---- Search: the loop and the toy ----------------------------------------------------------------


@pytest.fixture(scope="session")
def searcher():
    return smepo.load_model(TASKS / "base_search", searching_settings())


def searching_settings(**changes) -> Config:
    paths = {"model": TASKS / "base_search", "data": TASKS / "search_train.jsonl",
             "test_data": TASKS / "search_test.jsonl",
             "knowledge": TASKS / "search_knowledge.jsonl"}
    return settings(**{"task": "search"} | {k: str(v) for k, v in paths.items()} | changes)


def search_rows(split: str) -> list[dict]:
    lines = (TASKS / f"search_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def told(text: str) -> str:
    return dialogue.look_up(text, searching_settings().knowledge)


def test_the_environment_answers_a_query_and_nothing_else():
    world = {(row["relation"], row["entity"]): row["value"] for row in map(json.loads, (
        TASKS / "search_knowledge.jsonl").read_text(encoding="utf-8").splitlines())}
    found = f"<information>{world['mayor', 'Bergen']}</information>\n"
    assert told("<search>mayor of Bergen</search>") == "\n" + found
    assert told("I see. <search> Mayor  of bergen </search>") == "\n" + found
    assert told("<search>mayor of <search>mayor of Bergen</search>") == "\n" + found
    assert told("<search>mayor of Bergen</search>\n") == found  # the policy began the line itself
    for text in ("<search>mayor of Atlantis</search>", "<search>Bergen</search>", "</search>",
                 "<search></search>", "mayor of Bergen</search>", "<search>a<b>c</search>",
                 "<search> of </search>", "</search>.", "<search>Bergen<search></search>"):
        assert told(text) == "\n<information></information>\n"


@pytest.mark.parametrize("content", ["[]", "not json", '{"entity": "Oslo"}', "3"])
def test_a_broken_knowledge_file_is_refused_before_anything_is_written(tmp_path, capsys, content):
    path = tmp_path / "knowledge.jsonl"
    path.write_text(content, encoding="utf-8")
    assert "knowledge.jsonl" in refused(capsys, flags(searching_settings(knowledge=str(path))))
    missing = searching_settings(knowledge=str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in refused(capsys, flags(missing)) and not Path("runs").exists()


ASK, END = "<search>mayor of Bergen</search>", "<answer>Ada</answer>"
SCRIPTS = [  # what each of five rows says, turn by turn; | is the EOS
    [END + "|"],
    [ASK, END + "|"],
    ["<search>Bergen</search>", "</search>", END + "|"],
    [ASK, ASK, ASK, ASK, ASK],
    [ASK, "<answer>Ada"]]


def follow(monkeypatch, tokenizer, scripts) -> list:
    """Put scripts, one a prompt, in the place of the policy; returns the contexts of each call."""
    scripts, calls = [iter(script) for script in scripts], []

    def sample(model, tokenizer, contexts, group_size, config, stops):
        calls.append(contexts)
        turns = [next(scripts[ids[0]]).replace("|", tokenizer.eos_token) for ids in contexts]
        return tokenizer(turns, add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(smepo, "sample", sample)
    return calls


def test_rows_of_a_batch_go_on_until_each_has_its_own_end(searcher, monkeypatch):
    tokenizer = searcher[1]
    config, prompts = searching_settings(max_turns=3), [[i] for i in range(5)]
    calls = follow(monkeypatch, tokenizer, SCRIPTS)
    rows, marks = dialogue.converse(None, tokenizer, prompts, 1, config)
    assert [len(call) for call in calls] == [5, 4, 2, 1]  # only open rows; the fourth is stopped
    nothing = "\n<information></information>\n"
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert texts == [
        END, ASK + told(ASK) + END, f"<search>Bergen</search>{nothing}</search>{nothing}{END}",
        (ASK + told(ASK)) * 3 + ASK, ASK + told(ASK) + "<answer>Ada"]
    for row, mark, script in zip(rows, marks, SCRIPTS, strict=True):
        assert len(row) == len(mark)
        chosen = [token for token, one in zip(row, mark, strict=True) if one]
        said = "".join(script[:4]).replace("|", "")
        assert tokenizer.decode(chosen, skip_special_tokens=True) == said
    for ids in sum(calls, []):  # each goes on from the very ids of its row so far
        assert [ids[0], *rows[ids[0]]][: len(ids)] == ids
    follow(monkeypatch, tokenizer, SCRIPTS)
    problems = [Problem("", "Ada", "", "2", "", False, ids, ids) for ids in prompts]
    eos = smepo.GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
    groups = smepo.rollout(SimpleNamespace(generation_config=eos), tokenizer, problems, [False] * 5,
                           1, config)
    assert [g.ended for g in groups] == [[True], [True], [True], [False], [False]]
    assert [g.rewards for g in groups] == [[1.0], [1.0], [1.0], [0.0], [0.0]]
    assert [g.texts[0] for g in groups] == texts and [g.sampled[0] for g in groups] == marks


def test_the_token_limit_counts_what_was_sampled_over_all_turns(searcher, monkeypatch):
    tokenizer = searcher[1]
    query = len(tokenizer(ASK)["input_ids"])
    for limit in range(query, 3 * query + 1):
        calls = follow(monkeypatch, tokenizer, [[ASK] * 9])
        config = searching_settings(max_new_tokens=limit)
        rows, marks = dialogue.converse(None, tokenizer, [[0]], 1, config)
        assert sum(marks[0]) == limit and len(calls) == math.ceil(limit / query)
        assert marks[0][-1] == 1  # nothing is told to a row that may say no more
        assert tokenizer.decode(rows[0]).startswith(ASK)


def scripted_by_bigrams(model, chain: list[int], monkeypatch) -> None:
    """After each token of the chain the policy is sure of the next; the cache is the model's."""
    after, forward = dict(itertools.pairwise(chain)), model.forward

    def sure(ids, **kwargs):
        output, keep = forward(ids, **kwargs), kwargs.get("logits_to_keep", 0)
        output.logits = torch.full_like(output.logits, -1e4)
        for row, column in itertools.product(*map(range, ids[:, -keep:].shape)):
            output.logits[row, column, after.get(ids[:, -keep:][row, column].item(), 0)] = 1e4
        return output

    monkeypatch.setattr(model, "forward", lambda input_ids, **k: sure(input_ids, **k))


@pytest.mark.parametrize("last, pad", [(">", "<|pad|>"), (">.\n", "<|pad|>"), (">", "<|end|>")])
def test_a_turn_ends_with_a_tag_of_several_tokens(monkeypatch, last, pad):
    """Its last token may hold more, which stays; and where pad is the EOS, a stop is no end."""
    from pretrain import make_tokenizer

    tokenizer = make_tokenizer(SimpleNamespace(
        PHRASES=["<sea", "rch>", "mayor of Ada", "</", "search", last, "more"], WORDS=[], PIECES=[
            "<sea", "rch>", "mayor of Ada", "</", "search", re.escape(last), "more"]))
    tokenizer.pad_token = pad
    model = tiny_llama(vocabulary=len(tokenizer))
    eos = tokenizer.eos_token_id
    model.generation_config = smepo.GenerationConfig(eos_token_id=[eos])
    asks = tokenizer("<search>mayor of Ada</search" + last)["input_ids"]
    assert len(asks) == 6
    more = tokenizer.convert_tokens_to_ids("more")
    scripted_by_bigrams(model, [3, *asks, more, 4, eos], monkeypatch)
    config = searching_settings()
    # the guide in a prompt holds the tag, too: only what is sampled after it can end the turn
    prompts = [[5, 3], [*asks, 3], [*asks, *asks, 4], [5, asks[4]]]
    rows = dialogue.speak(model, tokenizer, prompts, 2, config)
    tail = [asks[5], more, 4, eos]  # without "</search" before it, this is not the tag
    assert rows == [asks] * 4 + [[eos]] * 2 + [tail] * 2
    math_rows = smepo.sample(model, tokenizer, prompts, 2, settings())
    assert math_rows[0] == [*asks, more, 4, eos]  # in math the tag is a text like any other


def talks(searcher, count=24, **changes) -> list[Group]:
    """Groups of four dialogues of the shipped base, of unequal numbers of turns."""
    config = searching_settings(**changes)
    problems = smepo.load_problems(config.test_data, "semantic", searcher[1], config)
    torch.manual_seed(0)
    problems = problems[:: len(problems) // count][:count]
    return smepo.rollout(*searcher, problems, [i % 2 == 0 for i in range(count)], 4, config)


def test_dialogues_of_the_base_are_well_formed_and_score_as_they_were_sampled(searcher):
    model, tokenizer = searcher
    groups = talks(searcher)
    turns = set()
    for group in groups:
        for ids, marks, text in zip(group.completions, group.sampled, group.texts, strict=True):
            given = tokenizer.decode([t for t, one in zip(ids, marks, strict=True) if not one])
            assert given == "".join(match[0] for match in smepo.TOLD.finditer(text))
            for ask, answer in re.findall(r"(<search>[^<]*</search>)(\n.*\n)", text):
                assert told(ask) == answer
            turns.add(text.count("</search>"))
    assert len(turns) > 3
    for group in groups[:3]:  # padded beside each other, every token has the log-prob of its row
        rows = [(group.prompt_ids, ids) for ids in group.completions]
        prompts, mask = smepo.pad([p for p, _ in rows], tokenizer.pad_token_id, "left", "cpu")
        ids, seen = smepo.pad([ids for _, ids in rows], tokenizer.pad_token_id, "right", "cpu")
        ours = smepo.token_logprobs(model, torch.cat([prompts, ids], 1),
                                    torch.cat([mask, seen], 1), ids.shape[1], 1.0)
        for i, (prompt, row) in enumerate(rows):
            logprobs = model(torch.tensor([prompt + row])).logits[0].log_softmax(-1)
            theirs = logprobs[range(len(prompt) - 1, len(prompt + row) - 1), row]
            torch.testing.assert_close(ours[i, : len(row)], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_what_was_told_has_no_gradient_and_no_place_in_the_divisor(fresh_base, aggregation):
    """One loss over all rows, written out, against the update, in whatever micro-batches."""
    model = fresh_base[0]
    groups = [make_group(fresh_base, r) for r in ([1.0, 0, 0, 0], [0.0] * 4, [0.0, 1, 1, 1])]
    plain = gradient_of(fresh_base, groups, aggregation=aggregation)
    for group in groups:
        for marks in group.sampled:
            marks[1:-1] = [i % 3 % 2 for i in range(len(marks) - 2)]
    ours = gradient_of(fresh_base, groups, aggregation=aggregation)
    part = gradient_of(fresh_base, groups, aggregation=aggregation, micro_tokens=100)
    model.zero_grad()
    A = smepo.group_advantages([g.rewards for g in groups], 4).tolist()
    rows = [(g.prompt_ids, *row) for g in groups
            for row in zip(g.completions, g.sampled, strict=True)]
    loss, tokens = 0, sum(sum(marks) for _, _, marks in rows)
    for (prompt, ids, marks), a in zip(rows, A, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        chosen = (logits.log_softmax(-1)[range(len(ids)), ids] * torch.tensor(marks)).sum()
        loss -= a * chosen / (sum(marks) * len(rows) if aggregation == "sequence" else tokens)
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part, ours, atol=1e-5, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-3


def test_entropy_and_clip_statistics_leave_out_what_was_told(fresh_base):
    model, tokenizer = fresh_base
    group = make_group(fresh_base, [1.0, 0, 0, 0])
    for marks in group.sampled:
        marks[:] = [0] * (len(marks) - 1) + [1]  # the EOS alone was sampled
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = smepo.update(model, tokenizer, optimizer, [group], settings(prompts_per_step=1))
    rows = [torch.tensor([group.prompt_ids + ids]) for ids in group.completions]
    logprobs = [model(row).logits[0, -2].log_softmax(-1)[row[0, -1]].item() for row in rows]
    assert stats["entropy"] == pytest.approx(-sum(logprobs) / 4, rel=1e-3)


def test_neither_pretraining_nor_the_expert_loss_teaches_what_the_environment_says(searcher):
    from pretrain import batches

    from tiny_tasks import searching

    model, tokenizer = searcher
    config = searching_settings()
    p = smepo.load_problems(config.data, "semantic", tokenizer, config)[0]
    encoded = tokenizer(p.trace + tokenizer.eos_token, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    logits = model(torch.tensor([p.prompt_ids + ids])).logits[0, len(p.prompt_ids) - 1 : -1]
    nll = -logits.log_softmax(-1)[range(len(ids)), ids]
    written = smepo.TOLD.sub("", p.trace) + tokenizer.eos_token
    learned = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids))
               if "information>" not in token and token not in searching.KIND]
    assert tokenizer.decode([ids[i] for i in learned]) == re.sub(
        rf"\b({'|'.join(searching.KIND)})\b", "", written)
    ours = smepo.masked_expert_loss(model, tokenizer, p, "search")
    torch.testing.assert_close(ours, nll[learned].mean(), atol=1e-5, rtol=1e-4)
    ids, mask, labels = next(batches(searching, tokenizer, random.Random(0), 16))
    for row, wanted in zip(ids, labels, strict=True):
        text = tokenizer.decode(row[wanted >= 0])
        assert "information>" not in text and text.startswith("<search>")
        assert text.endswith("</answer><|end|>") and torch.equal(row[wanted >= 0],
                                                                 wanted[wanted >= 0])


def test_shipped_searches_replay_against_the_knowledge_and_mask_without_a_leak(searcher):
    from tiny_tasks import searching

    tokenizer = searcher[1]
    lines, names = search_rows("train") + search_rows("test"), rf"\b({'|'.join(searching.KIND)})\b"
    assert len({row["question"] for row in lines}) == len(lines) == 3000
    for row in lines:
        trace, answer = row["teacher_ds"], row["reward_model"]["ground_truth"]
        turns = re.findall(r"(<search>\w+ of \w+</search>)(\n<\w+>\w+</information>\n)", trace)
        assert all(told(query) == information for query, information in turns)
        assert "".join(sum(turns, ())) + f"<answer>{answer}</answer>" == trace
        assert len(turns) == row["difficulty"] and smepo.reward(trace, answer, "search") == 1.0
        masked = smepo.mask_trace(trace, "search", answer)
        assert not smepo.leaks(masked, answer, "search")
        assert smepo.leaks(trace, answer, "search")
        assert not re.search(names, masked)
        assert re.sub(r"\[\w+\]", "", masked) == re.sub(names, "", trace)
    for row in lines[::20]:
        masked = smepo.mask_trace(row["teacher_ds"], "search")
        for text in (row["question"], row["teacher_ds"], masked):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_no_search_of_the_test_split_is_trained_or_pretrained_on():
    from tiny_tasks import searching, toys

    train, test = ({row["question"] for row in search_rows(split)} for split in ("train", "test"))
    rng = random.Random(1)
    pretraining = {searching.draw_example(rng)[0] for _ in range(3000)}
    assert all(toys.is_held_out(question) for question in test)
    assert not any(toys.is_held_out(question) for question in train | pretraining)


def test_calibration_of_the_shipped_search_base(searcher):
    from pretrain import calibrate

    from tiny_tasks import searching

    table = calibrate(searching, *searcher, searching_settings(), count=300)
    assert 0.40 <= table["none", 2][0] <= 0.65
    assert table["none", 5][0] <= 0.06
    assert table["semantic", 5][0] >= 0.12
    assert table["full", 5][0] >= 0.85
    assert ("altered", 5) not in table
    size = sum(path.stat().st_size for path in (TASKS / "base_search").iterdir())
    assert size <= 2**20


def test_a_search_run_learns_resumes_and_shows_whole_dialogues(tmp_path):
    lines = {"data": search_rows("train")[:12], "test_data": search_rows("test")[::300]}
    paths = {name: write_rows(tmp_path / name, rows) for name, rows in lines.items()}
    config = searching_settings(**paths, mini_batches=2, inner_epochs=2, aggregation="token",
                                guide_when="on-failure", steps=3, save_every=1)
    whole = smepo.train(dataclasses.replace(config, name="whole"))
    smepo.train(dataclasses.replace(config, name="parts", steps=2))
    parts = smepo.train(dataclasses.replace(config, name="parts", resume=True))
    assert_same_run(whole, parts)
    _, *steps = without_times(whole / "metrics.jsonl")
    assert all(step["leak_rate"] == 0 and math.isfinite(step["entropy"]) for step in steps)
    groups = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    texts = [text for group in groups for text in group["completions"]]
    assert sum("</information>\n<search>" in text for text in texts) > len(texts) / 2
    assert any("[ENTITY]" in group["guide"] for group in groups)


# ---- Scale out: the export, and TRL on it --------------------------------------------------------


def export(tmp_path, *arguments: str, data=None) -> list[dict]:
    data = data or write_rows(tmp_path / "rows.jsonl", rows("train", 16))
    out = tmp_path / "out.jsonl"
    assert smepo.main(["export", "--data", data, "--out", str(out), *arguments]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_export_for_trl_poses_the_guide_as_an_earlier_assistant_turn(tmp_path, capsys, base):
    written, expected = export(tmp_path, "--format", "trl"), rows("train", 16)
    assert "16 of 16 rows; 0 guides leak" in capsys.readouterr().out
    for row, source in zip(written, expected, strict=True):
        assert row["ground_truth"] == source["reward_model"]["ground_truth"]
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"]
        prompt = base[1].apply_chat_template(row["prompt"], tokenize=False,
                                             add_generation_prompt=True)
        guide = smepo.mask_trace(source["teacher_ds"], "math", row["ground_truth"])
        assert prompt == smepo.build_prompt(base[1], source["question"], guide)


def test_export_for_verl_has_its_columns_and_loses_no_row(tmp_path):
    written = export(tmp_path, "--format", "verl", "--system", "Think.")
    for i, (row, source) in enumerate(zip(written, rows("train", 16), strict=True)):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["prompt"][0] == {"role": "system", "content": "Think."}
        assert row["reward_model"] == source["reward_model"]
        assert row["extra_info"]["index"] == i and row["data_source"] == "smepo/math"
        assert row["extra_info"]["teacher_ds"] == source["teacher_ds"]


def test_official_rows_of_math_and_code_round_trip_through_load_mask_and_export(tmp_path):
    """A hand-made sample of the official schema."""
    tests = json.dumps({"inputs": ["2 3\n"], "outputs": ["5\n"]})
    code = "Read both numbers.\n\n```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    for domain, truth, trace, shown in (
            ("math", "\\frac{1}{2}", "Divide: $3/6 = \\frac{1}{2}$. So \\boxed{\\frac{1}{2}}.",
             "Divide: $[NUMBER]/[NUMBER] = [NUMBER]$. So \\boxed{[NUMBER]}."),
            ("code", tests, code, "Read both numbers.\n\n```python\n[CODE]\n```")):
        row = {"data_source": "official", "question": f"A {domain} problem.", "ability": domain,
               "reward_model": {"style": "rule", "ground_truth": truth}, "teacher_ds": trace,
               "extra_info": {"index": 7, "split": "train"}}
        path = str(tmp_path / f"{domain}.parquet")
        datasets.Dataset.from_list([row] * 3).to_parquet(path)
        written = export(tmp_path, "--format", "verl", "--domain", domain, data=path)
        assert len(written) == 3
        for out in written:
            assert out["prompt"][1]["content"] == "Here is an example solution:\n" + shown
            assert out["reward_model"]["ground_truth"] == truth
            assert out["extra_info"]["teacher_ds"] == trace


def test_export_drops_or_keeps_what_leaks_and_counts_it(tmp_path, capsys):
    leaky, bare = GOOD, dict(GOOD, question="Compute 2 + 1", reward_model={"ground_truth": "3"})
    data = write_rows(tmp_path / "leaky.jsonl", [leaky, bare])  # 3 is not in the second's trace
    assert len(export(tmp_path, "--format", "trl", "--guide", "full", data=data)) == 1
    assert "1 of 2 rows; 1 guides leak the answer (leak rate 0.500)" in capsys.readouterr().out
    kept = export(tmp_path, "--format", "trl", "--guide", "full", "--leaks", "keep", data=data)
    assert len(kept) == 2
    out = tmp_path / "out.jsonl"
    before = out.read_bytes()
    data = write_rows(tmp_path / "leaky.jsonl", [leaky])
    assert "all 1 guides leak" in refused(capsys, running=True, arguments=[
        "export", "--format", "trl", "--guide", "full", "--data", data, "--out", str(out)])
    assert out.read_bytes() == before
    assert ".jsonl or .parquet" in refused(capsys, [
        "export", "--format", "trl", "--data", data, "--out", "guided.txt"])


def trl_script(folder: Path) -> Path:
    """The README's script, in a folder with what it reads."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    script = re.search(r'```python\n("""SMEPO on TRL.*?)```', text, re.DOTALL)[1]
    assert len(script.splitlines()) <= 30
    (folder / "train_trl.py").write_text(script, encoding="utf-8")
    (folder / "tiny_tasks").mkdir()
    shutil.copytree(TASKS / "base", folder / "tiny_tasks" / "base")
    data = write_rows(folder / "rows.jsonl", rows("train", 64))
    assert smepo.main(["export", "--data", data, "--format", "trl", "--out",
                       str(folder / "runs" / "guided.jsonl")]) == 0
    return folder / "train_trl.py"


def test_the_trl_script_of_the_readme_trains_in_two_processes(tmp_path):
    pytest.importorskip("trl")
    script = trl_script(tmp_path)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node", "2", script.name], cwd=tmp_path, env=environment,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    logs = re.findall(r"'reward': '([\d.]+)'", run.stdout)
    assert len(logs) == 10 and sum(map(float, logs)) > 0


def test_trl_agrees_with_us_on_the_same_rollouts(tmp_path, monkeypatch):
    """Its advantages, loss and gradient of the first step (its epsilon is 1e-4, ours 1e-6)."""
    pytest.importorskip("trl")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script = trl_script(tmp_path).read_text(encoding="utf-8").replace("max_steps=10", "max_steps=1")
    names = {"__name__": "train_trl"}
    torch.manual_seed(0)
    exec(compile(script, "train_trl.py", "exec"), names)
    trainer, seen = names["trainer"], {}
    model, tokenizer = smepo.load_model(TASKS / "base", settings())
    generate, compute = trainer._generate_and_score_completions, trainer._compute_loss
    monkeypatch.setattr(trainer, "_generate_and_score_completions",
                        lambda inputs: seen.update(texts=inputs) or seen.setdefault(
                            "batch", generate(inputs)))
    monkeypatch.setattr(trainer, "_compute_loss", lambda *a: seen.setdefault("loss", compute(*a)))
    trainer.train()
    batch, truths = seen["batch"], [row["ground_truth"] for row in seen["texts"]]
    texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = [smepo.reward(*row, "math") for row in zip(texts, truths, strict=True)]
    A = smepo.group_advantages(rewards, 8, eps=1e-4)
    assert A.abs().max() > 0.3  # else there is nothing to compare
    torch.testing.assert_close(batch["advantages"], A, atol=1e-4, rtol=0)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logprobs = smepo.token_logprobs(model, ids, mask, batch["completion_ids"].shape[1], 1.0)
    loss, _ = smepo.policy_loss(logprobs, logprobs.detach(), A, batch["completion_mask"])
    assert abs(loss.item() - seen["loss"].item()) < 1e-4
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    logged = next(record["grad_norm"] for record in trainer.state.log_history)
    assert logged == pytest.approx(norm, rel=1e-3)


# ---- Code: the judge and the toy ----------------------------------------------------------------


CUBE = json.dumps({"inputs": ["2\n", "-3\n"], "outputs": ["8\n", "-27\n"]})
RIGHT = "x = int(input())\nprint(x ** 3)\n"
PROGRAMS = {  # name: (program, whether it passes CUBE); {} is a path outside its folder
    "right": (RIGHT, True),
    "space at the end": (RIGHT + "print('  ')\n", True),
    "in a function": ("def main():\n    print(int(input()) ** 3)\nmain()\n", True),
    "reads all of stdin": ("import sys\nprint(int(sys.stdin.read()) ** 3)", True),
    "reads the file": ("print(int(open(0).read()) ** 3)", True),
    "ends well": (RIGHT + "raise SystemExit", True),
    "deep, but not too deep": (
        "import sys\nsys.setrecursionlimit(9000)\ndef f(n):\n    return n and 1 + f(n - 1)\n"
        "f(5000)\n" + RIGHT, True),
    "writes in its folder": ("open('a', 'w').write('b')\nprint(int(input()) ** 3)", True),
    "prints at its exit": (
        "import atexit\natexit.register(lambda: print(int(input()) ** 3))\n", True),
    "closes stdout when done": (RIGHT + "import sys\nsys.stdout.close()", True),
    "wrong": ("print(int(input()) ** 2)", False),
    "only the first test": ("print(8)", False),
    "more than is asked": (RIGHT + "print('done')", False),
    "nothing": ("", False),
    "syntax error": ("print(", False),
    "null byte": ("print(8)\0", False),
    "a lone surrogate": ("print('\ud800')", False),
    "raises": (RIGHT + "1 / 0", False),
    "sys.exit": (RIGHT + "import sys\nsys.exit(1)", False),
    "deep recursion": ("f = lambda n: f(n + 1)\nf(0)", False),
    "deeper recursion": ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)",
                         False),
    "closes stdout": ("import sys\nsys.stdout.close()\n" + RIGHT, False),
    "replaces stdout": ("import io, sys\nsys.stdout = io.StringIO()\n" + RIGHT, False),
    "memory bomb": ("a = [0]\nwhile True:\n    a += a", False),
    "huge output": ("while True:\n    print('x' * 10**6)", False),
    "fork": ("import os\nos.fork()\n" + RIGHT, False),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", False),
    "other programs": ("import subprocess\nsubprocess.run(['true'])\n" + RIGHT, False),
    "shell": ("import os\nos.system('true')\n" + RIGHT, False),
    "network": ("import socket\nsocket.socket()\n" + RIGHT, False),
    "kills the parent": ("import os\nos.kill(os.getppid(), 9)\n" + RIGHT, False),
    "kills its group": ("import os\nos.killpg(0, 9)\n" + RIGHT, False),
    "writes outside": ("open({}, 'w')\n" + RIGHT, False),
    "removes outside": ("import os\nos.remove({})\n" + RIGHT, False),
    "makes a folder outside": ("import os\nos.mkdir('../more')\n" + RIGHT, False),
    "reads the environment": (
        "import os\n" + RIGHT + "print(os.environ.get('HOME', ''), *os.environ)", True),
}


@pytest.fixture
def judge(monkeypatch):
    from tiny_tasks import judge

    monkeypatch.setattr(judge, "SECONDS", 9.0)  # a busy machine fails no test
    judge.verdict.cache_clear()
    return judge


@pytest.mark.parametrize("warm", [True, False], ids=["warm workers", "one process each"])
def test_the_judge_contains_every_accident_and_both_ways_agree(judge, tmp_path, warm):
    kept = tmp_path / "kept"
    kept.write_text("precious", encoding="utf-8")
    programs = [program.replace("{}", repr(str(kept))) for program, _ in PROGRAMS.values()]
    before = set(tmp_path.iterdir())
    passed = judge.judge(programs, [CUBE] * len(programs), warm)
    assert dict(zip(PROGRAMS, passed, strict=True)) == {
        name: verdict for name, (_, verdict) in PROGRAMS.items()}
    assert kept.read_text(encoding="utf-8") == "precious" and set(tmp_path.iterdir()) == before


HANGS = {"endless loop": "while True: pass", "sleeps": "import time\ntime.sleep(99)",
         "waits for more": "while True:\n    try: input()\n    except EOFError: pass",
         "stops its alarm": "import signal, time\nsignal.alarm(0)\n"
                            "signal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(99)"}


@pytest.mark.parametrize("warm", [True, False], ids=["warm workers", "one process each"])
def test_a_program_that_hangs_fails_and_the_jobs_after_it_are_judged(judge, monkeypatch, warm):
    monkeypatch.setattr(judge, "SECONDS", 0.5)
    programs = list(HANGS.values())
    start = time.perf_counter()
    assert judge.judge(programs, [CUBE] * 4, warm) == [False] * 4
    assert time.perf_counter() - start < 60  # only ends a hang
    monkeypatch.setattr(judge, "SECONDS", 9.0)
    programs = [RIGHT + "#" * i for i in range(8)]
    assert judge.judge(programs, [CUBE] * 8, warm) == [True] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")
def test_a_killed_worker_is_replaced(judge):
    def kill_the_worker_of_a_thread() -> int:
        judge.kill(judge.THREAD.worker)
        return judge.THREAD.worker.returncode

    programs = [RIGHT + "#" * i for i in range(16)]
    assert judge.judge(programs[:8], [CUBE] * 8) == [True] * 8
    assert judge.POOL.submit(kill_the_worker_of_a_thread).result() == -signal.SIGKILL
    assert judge.judge(programs[8:], [CUBE] * 8) == [True] * 8


@pytest.mark.parametrize("tests", [
    "", "{", "[]", "{}", "7", "null", '{"inputs": ["1"]}', '{"inputs": [], "outputs": []}',
    '{"inputs": ["1"], "outputs": []}', '{"inputs": [1], "outputs": [1]}',
    '{"inputs": 1, "outputs": 1}'])
def test_malformed_unit_tests_fail_and_are_refused_at_load(judge, tmp_path, base, tests):
    assert judge.judge([RIGHT], [tests]) == [False]
    assert smepo.reward(f"```\n{RIGHT}```", tests, "code") == 0.0
    row = GOOD | {"reward_model": {"style": "rule", "ground_truth": tests or "x"}}
    path = write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError, match="row 1: the ground truth is no unit tests"):
        smepo.load_problems(path, "none", base[1], settings(domain="code"))


def test_the_reward_of_code_is_that_of_the_last_fenced_block():
    block, wrong = f"```python\n{RIGHT}```", "```\nprint(8)\n```"
    texts = [block, f"So:\n{wrong}\n{block}\nDone.", f"{block}\n{wrong}", RIGHT, f"```\n{RIGHT}",
             "", "```python\n```"]
    assert smepo.rewards(texts, [CUBE] * 7, "code") == [1, 1, 0, 0, 0, 0, 0]
    assert [smepo.reward(text, CUBE, "code") for text in texts] == [1, 1, 0, 0, 0, 0, 0]
    assert smepo.rewards([], [], "code") == []


def test_a_batch_is_judged_in_one_call_and_rollouts_cut_off_are_not(base, judge, monkeypatch):
    model, tokenizer = base
    calls = []

    def seen(texts, truths, domain):
        calls.append((texts, truths, domain))
        return [float(i % 2) for i in range(len(texts))]

    monkeypatch.setattr(smepo, "rewards", seen)
    p, q = problem(base), problem(base, answer="17")
    eos = tokenizer.eos_token_id
    monkeypatch.setattr(smepo, "sample", lambda *a: [[20, eos], [21], [22, eos], [23, 24]])
    groups = smepo.rollout(model, tokenizer, [p, q], [False] * 2, 2, settings())
    texts = tokenizer.batch_decode([[20], [22]])
    assert calls == [([texts[0], "", texts[1], ""], ["16", "16", "17", "17"], "math")]
    assert [group.rewards for group in groups] == [[0.0, 1.0]] * 2
    assert [group.ended for group in groups] == [[True, False]] * 2
    assert groups[1].completions == [[22, eos], [23, 24]]


def code_rows(split: str) -> list[dict]:
    lines = (TASKS / f"code_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_traces_of_the_code_toy_pass_their_tests_and_mask_without_a_leak():
    lines = code_rows("train") + code_rows("test")
    for row in lines:
        trace, truth = row["teacher_ds"], row["reward_model"]["ground_truth"]
        masked = smepo.mask_trace(trace, "code", truth)
        assert masked == trace.split("```python\n")[0] + "```python\n[CODE]\n```"
        assert not smepo.leaks(masked, truth, "code") and smepo.leaks(trace, truth, "code")
    sampled = random.Random(0).sample(lines, 60)
    texts, truths = zip(*[(row["teacher_ds"], row["reward_model"]["ground_truth"])
                          for row in sampled], strict=True)
    assert smepo.rewards(texts, truths, "code") == [1.0] * 60
    assert smepo.rewards(texts, truths[1:] + truths[:1], "code") == [0.0] * 60


def test_the_tests_of_the_code_toy_catch_every_wrong_line():
    from tiny_tasks import coding

    rng = random.Random(0)
    for _ in range(300):
        plan = coding.draw_problem(rng, 5)
        question = coding.question_of(plan)
        assert coding.problem_of(question) == plan
        truth = json.loads(coding.unit_tests(question, plan))
        for i in range(5):
            lines = [*plan[:i], coding.wrong(rng, plan[i]), *plan[i + 1 :]]
            given = [int(x) for x in truth["inputs"]]
            printed = [str(coding.run(lines, x)) for x in given]
            if printed == truth["outputs"]:  # then it prints the same for any input
                assert all(coding.run(lines, x) == coding.run(plan, x) for x in range(-99, 99))


def test_the_code_toy_never_draws_a_held_out_problem_in_pretraining_and_round_trips():
    from tiny_tasks import coding, toys

    tokenizer = AutoTokenizer.from_pretrained(TASKS / "base_code")
    rng = random.Random(0)
    drawn = [coding.draw_example(rng) for _ in range(4000)]
    held_out = {row["question"] for row in code_rows("test")}
    assert not any(toys.is_held_out(question) or question in held_out for question, _, _ in drawn)
    assert not any(toys.is_held_out(row["question"]) for row in code_rows("train"))
    for text in {text for example in drawn[:1000] for text in example}:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        assert len(ids) < 64


@pytest.fixture
def code_base():
    return smepo.load_model(TASKS / "base_code", settings())


def code_settings(**changes) -> Config:
    files = {"model": "base_code", "data": "code_train.jsonl", "test_data": "code_test.jsonl"}
    files = {name: str(TASKS / file) for name, file in files.items()}
    return settings(task="code", **files | changes)


def test_calibration_of_the_shipped_base_of_code(code_base, judge):
    from pretrain import calibrate

    from tiny_tasks import coding

    table = calibrate(coding, *code_base, code_settings(), count=150)
    assert 0.40 <= table["none", 2][0] <= 0.70
    assert table["none", 5][0] <= 0.02
    assert table["semantic", 5][0] >= 0.12
    assert table["full", 5][0] >= 0.9  # it copies a program that it is shown,
    assert table["altered", 5][0] >= 0.85  # whatever its plan says
    size = sum(path.stat().st_size for path in (TASKS / "base_code").iterdir())
    assert size <= 2**20


def test_a_step_on_code_learns_from_the_tests_verdicts(code_base, judge):
    config = code_settings(prompts_per_step=8, group_size=8, data=str(TASKS / "code_train.jsonl"))
    model, tokenizer, optimizer, problems, _ = smepo.prepare(config.model, config)
    before = [weight.clone() for weight in model.parameters()]
    groups, metrics = smepo.train_step(model, tokenizer, optimizer, problems, 1, config)
    for group in groups:
        wanted = [end * smepo.reward(text, group.problem.answer, "code")
                  for text, end in zip(group.texts, group.ended, strict=True)]
        assert group.rewards == wanted
    assert 0 < metrics["reward"] < 1 and metrics["leak_rate"] == 0 and metrics["guided"] == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
