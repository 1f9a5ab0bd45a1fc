"""Ready rewards, what the loop does with broken ones, and the tasks that are read from files."""

import json
import math
import random
import re
import sys
import time
from fractions import Fraction

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structadapt as sa
from structadapt.grpo import tasks
from structadapt.grpo.rewards import Record, score, with_meta
from structadapt.grpo.rollout import Rollout
from structadapt.grpo.sandbox import SandboxError

# -- numeric_match ---------------------------------------------------------------------------------


def match(completion, answer):
    return sa.grpo.numeric_match("prompt", completion, {"answer": answer})


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("42", 42),
        ("first 41, then 42.", "42"),
        ("7 * 6 = 42\n", 42.0),
        ("The answer is 42, not 43", 42),
        ("Answer: **42** (of 100)", 42),
        ("17\n#### 42\nso 1 more", 42),
        ("it is \\boxed{42}, as 1 + 1 = 2", 42),
        ("\\boxed{41} no, \\boxed{ $x = 42$. }", 42),
        ("$\\boxed{42\\text{ cm}}$", 42),
        ("\\boxed{1{,}234}", "1234"),
        ("\\boxed{1\\,234\\,567}", 1234567),
        ("\\boxed{\\$1,234.50}", "1234.5"),
        ("\\boxed{50\\%}", "50"),
        ("50%", "50\\%"),
        ("\\boxed{90^\\circ}", 90),
        ("$-\\frac{3}{4}$", "-0.75"),
        ("\\boxed{\\dfrac{-6}{8}}", "-\\frac{3}{4}"),
        ("so 3/4", 0.75),
        ("so -3 / 4", Fraction(-3, 4)),
        ("1.5/2", ".75"),
        ("x=-5", -5),
        ("10-5", 5),
        ("−5", "-5"),
        ("+5", 5),
        ("0.1", "1/10"),
        ("1e3 or 1,000", "1000"),
        ("2.5E-3", "0.0025"),
        ("-.5", -0.5),
        ("1e400", "10e399"),
        ("a list: 1,2,3", 3),
        ("000", 0),
        ("$x_1=2$", 2),
    ],
)
def test_numeric_match_reads(completion, answer):
    assert match(completion, answer) == 1.0
    assert match(completion, "123454321") == 0.0


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("", 0),
        ("no number", 0),
        ("0.30000000000000004", "0.3"),
        ("1/0", 0),
        ("42 and \\boxed{}", 42),
        ("42 and \\boxed{\\sqrt{42}}", 42),
        ("\\boxed{42, 43}", 43),
        ("\\boxed{42", 43),
        ("\\boxed{2\\frac{1}{2}}", "1/2"),
        ("1e401", "1"),
        ("1e-999999999", 0),
        ("9" * 65, "9"),
        ("0" * 65, 0),
        ("42 and #### 43", 42),
        ("٤٢", 42),  # digits, but not of this reward
    ],
)
def test_numeric_match_refuses(completion, answer):
    assert match(completion, answer) == 0.0


def test_numeric_match_needs_text_and_a_number():
    with pytest.raises(TypeError, match="numeric_match reads text: pass tokenizer="):
        match([4, 2], 42)
    for answer in ("x + 1", "", math.nan, "1" * 65, "1e401", None, "4 5", "3\\sqrt{2}"):
        with pytest.raises(ValueError, match="the answer .* is not a number"):
            match("42", answer)
    with pytest.raises(KeyError):
        sa.grpo.numeric_match("", "42", {})


PIECES = [*"0123456789+-−.,/eE%$ \n{}\\=#x٣\0", "\\boxed{", "\\frac{", "#### ", "answer is"]


def test_numeric_match_on_20_000_random_strings():
    noise = random.Random(0)
    texts = ["".join(noise.choices(PIECES, k=noise.randrange(100))) for _ in range(20_000)]
    start = time.process_time()
    values = {match(text, "7") for text in texts}
    assert time.process_time() - start < 2.0
    assert values == {0.0, 1.0}


@given(st.fractions(), st.text(max_size=50))
@settings(max_examples=100, deadline=None)
def test_numeric_match_finds_any_rational(number, noise):
    written = str(number) if len(str(number)) <= 64 else "0"
    number = Fraction(written)
    assert match(f"{noise} \\boxed{{{written}}}", number) == 1.0
    assert match(f"#### {written}", number) == 1.0
    assert match(f"#### {written}", number + 1) == 0.0
    assert match(noise, 12345.5) in (0.0, 1.0)


MEGABYTE = 2**20


@pytest.mark.parametrize(
    "unit", ["1", "1,", "1.", "1e", "1/", "(", "-", "\\frac{", "\\text{", "\\boxed{", "####",
             "1,111", "answer is", " ", "{", "\\frac{1}{", "1 / ", "\0", "=", "\\text{x"]
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_fast(unit):
    text = unit * (MEGABYTE // len(unit))
    for completion in (text, text + "7", "\\boxed{" + text):
        start = time.process_time()
        match(completion, 7)
        assert time.process_time() - start < 3  # an input that is not linear takes hours


# -- other rewards ---------------------------------------------------------------------------------


def test_matches_format():
    reward = sa.grpo.matches_format(r"<think>.*</think>\s*<answer>[^<]*</answer>", longest=100)
    good = "<think>so\nit is</think>\n<answer>42</answer>"
    assert reward("p", good) == 1.0 and reward("p", good + "!") == 0.0
    assert reward("p", good.replace("so", "o" * 100)) == 0.0
    with pytest.raises(Exception, match="unterminated|missing"):
        sa.grpo.matches_format("(")


def test_combine():
    reward = sa.grpo.combine({sa.grpo.exact_match: 1.0, sa.grpo.matches_format("[0-9]+"): 0.25})
    values = [with_meta(reward)("p", text, {"answer": 4}) for text in ("4", "5", "x")]
    assert values == [1.25, 0.25, 0.0]
    with pytest.raises(ValueError, match="nan is not a finite number"):
        sa.grpo.combine({lambda p, c: math.nan: 1.0})("p", "c", {})
    with pytest.raises(TypeError, match="reward must take"):
        sa.grpo.combine({lambda: 1.0: 1.0})


# -- faults ----------------------------------------------------------------------------------------


def rollout(count):
    """Completions [0], [1], ..."""
    ones = torch.ones(count, 1, dtype=torch.long)
    column = torch.arange(count)[:, None]
    return Rollout(ones, ones, column, ones, ones * 0.0, ones * 0.0, ones[:, 0].bool())


def scored(reward, prompts=10, group=10, **options):
    batch = [Record([i], [i], {"answer": i}) for i in range(prompts)]
    return score(rollout(prompts * group), batch, with_meta(reward), [-1], None, **options)


class Broken:
    def __float__(self):
        raise OverflowError("too large")


@pytest.mark.parametrize(
    "bad, words",
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: math.inf, "ValueError: inf is not a finite number"),
        (lambda: None, "ValueError: None is not a finite number"),
        (lambda: 10**400, r"ValueError: 1000+\.\.\. \(401 characters\) is not a finite number"),
        (Broken, "ValueError: .*Broken.* is not a finite number"),
        (lambda: eval("(" * 300), "SyntaxError: too many nested parentheses"),
        (lambda: {}["x" * 999], r"KeyError: 'xxx+\.\.\. \(1001 characters\)"),
    ],
)
def test_a_fault_counts_as_0_and_is_named(bad, words):
    scores = scored(lambda p, c: bad() if c in ([13], [57]) else 1.0)
    assert scores.rewards.shape == (10, 10) and scores.rewards.dtype == torch.float64
    expected = torch.ones(100, dtype=torch.float64)
    expected[[13, 57]] = 0.0
    assert torch.equal(scores.rewards.flatten(), expected)
    first, second = scores.faults
    assert first.startswith("the reward of prompt [1], completion [13]: ")
    assert second.startswith("the reward of prompt [5], completion [57]: ")
    assert re.search(words, first) and len(first) < 500


@pytest.mark.parametrize("allowed, faults", [(0.05, 5), (0.0, 0), (0.5, 50), (1.0, 100)])
def test_more_faults_than_allowed_stop_the_run(allowed, faults):
    seen = []

    def reward(prompt, completion):
        seen.append(completion)
        if completion[0] < broken:
            raise LookupError(f"number {completion[0]}")
        return 1.0

    broken = faults
    scores = scored(reward, max_faults=allowed)
    assert len(scores.faults) == faults and scores.rewards.sum() == 100 - faults
    if faults < 100:
        broken = 100
        seen.clear()
        n = faults + 1
        words = rf"{n} of {n} rewards failed, and at most {allowed:.3g} of the 100 may; .* number 0"
        with pytest.raises(RuntimeError, match=words) as caught:
            scored(reward, max_faults=allowed)
        assert len(seen) == n
        assert repr(caught.value.__cause__) == "LookupError('number 0')"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_fault(stop):
    def reward(prompt, completion):
        raise stop

    with pytest.raises(stop):
        scored(reward, max_faults=1.0)


def test_a_run_counts_its_faults():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 8))
    model.forward = lambda ids, mask, position_ids: model[1](model[0](ids))
    calls = iter(range(1000))

    def reward(prompt, completion):
        return 1 / (next(calls) % 25) if len(completion) else 0.0

    def step(**options):
        config = sa.grpo.Config(eos_token_id=[], max_new_tokens=2, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return next(sa.grpo.train(model, optimizer, [[1]] * 10, reward, config))

    assert step(group_size=10).reward_faults == 4
    assert step(group_size=10, max_reward_faults=1.0).reward_faults == 4
    with pytest.raises(RuntimeError, match="1 of 1 rewards failed"):
        step(max_reward_faults=0.0)


# -- JSONL -----------------------------------------------------------------------------------------


def test_load_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"q": "1+1=", "a": 2, "level": {"x": [1, null]}}\r\n{"a": "4", "q": [1, 2]}'
    )
    assert sa.grpo.load_jsonl(path, prompt="q", answer="a") == [
        {"prompt": "1+1=", "answer": 2, "level": {"x": [1, None]}},
        {"prompt": [1, 2], "answer": "4"},
    ]
    path.write_text('{"prompt": "p", "answer": [1]}\n')
    assert sa.grpo.load_jsonl(str(path)) == [{"prompt": "p", "answer": [1]}]


BAD_LINES = [
    ("", "is empty"),
    ("{", "is not JSON: Expecting property name"),
    ("[1]", r"is \[1\], not an object"),
    ('{"answer": 1}', "has no 'prompt', but \\['answer'\\]"),
    ('{"prompt": "p", "answer": null}', "has no 'answer'"),
    ('{"prompt": "", "answer": 1}', "\"prompt\" is '', neither text nor token ids"),
    ('{"prompt": [1, true], "answer": 1}', r'"prompt" is \[1, True\], neither'),
    ('{"prompt": "p", "answer": NaN}', "is not JSON: it has no NaN"),
    ("[" * 10**5, "is nested too deeply"),
    ('{"prompt": "p", "answer": ' + "1" * 5000 + "}", "is not JSON"),
    ("\udcff", "is not JSON: .*utf-8"),
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_a_malformed_line_is_named(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "p", "answer": 1}\n'
    path.write_bytes(good + line.encode("utf-8", "surrogateescape") + b"\n" + good)
    with pytest.raises(ValueError, match=rf"malformed rows:\n.*rows.jsonl:2: {words}") as caught:
        sa.grpo.load_jsonl(path)
    assert len(str(caught.value)) < 500


def test_malformed_lines_are_named_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 3 + '{"prompt": "p", "answer": 1}\n' + "{}\n")
    with pytest.raises(ValueError) as caught:
        sa.grpo.load_jsonl(path)
    assert [n for n in range(9) if f"rows.jsonl:{n}: " in str(caught.value)] == [1, 2, 3, 5]
    path.write_text("{}\n" * 100)
    with pytest.raises(ValueError, match="rows.jsonl:10: .*\nand there may be more$"):
        sa.grpo.load_jsonl(path)
    path.write_text('{"prompt": "p", "q": "r", "answer": 1}\n')
    with pytest.raises(ValueError, match='1: has "prompt" beside "q" and "answer"'):
        sa.grpo.load_jsonl(path, prompt="q")
    path.write_text("")
    with pytest.raises(ValueError, match="rows.jsonl has no line"):
        sa.grpo.load_jsonl(path)


# -- DeepMath --------------------------------------------------------------------------------------

ROWS = [
    {"question": f"What is {{{i}}}?", "final_answer": str(i), "difficulty": i / 2 - 1, "topic": "t",
     "r1_solution_1": "long"}
    for i in range(20)
]  # fmt: skip


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_load_deepmath(tmp_path, kind):
    path = write(tmp_path / f"part{kind}", ROWS)
    records = sa.grpo.load_deepmath(path, template="Q: {question} {}")
    assert len(records) == 20
    assert records[3] == {
        "prompt": "Q: What is {3}? {}", "answer": "3", "difficulty": 0.5, "topic": "t",
    }  # fmt: skip
    hard = sa.grpo.load_deepmath(str(path), min_difficulty=5.0, max_difficulty=7)
    assert [record["difficulty"] for record in hard] == [5.0, 5.5, 6.0, 6.5, 7.0]
    assert hard[0]["prompt"].startswith("What is {12}?\n") and "\\boxed{}" in hard[0]["prompt"]
    json.dumps(records)

    words = "no row of 20 has a difficulty from 9 to inf; they go from -1.0 to 8.5"
    with pytest.raises(ValueError, match=words):
        sa.grpo.load_deepmath(path, min_difficulty=9)
    with pytest.raises(ValueError, match="template must contain {question}"):
        sa.grpo.load_deepmath(path, template="{}")


def test_load_deepmath_from_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "b.parquet", ROWS[:2])
    write(tmp_path / "data" / "a.jsonl", ROWS[2:5])
    (tmp_path / "README.md").write_text("#")
    answers = [record["answer"] for record in sa.grpo.load_deepmath(tmp_path)]
    assert answers == ["2", "3", "4", "0", "1"]
    with pytest.raises(ValueError, match="neither a .jsonl nor a .parquet file"):
        sa.grpo.load_deepmath(tmp_path / "README.md")
    with pytest.raises(FileNotFoundError):
        sa.grpo.load_deepmath(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .jsonl or .parquet file"):
        sa.grpo.load_deepmath(tmp_path / "empty")


def test_load_deepmath_from_the_hub(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("owner/name", "train")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(sa.grpo.load_deepmath("owner/name", 0.0, 1.0)) == 3
    for row in ROWS:
        monkeypatch.delitem(row, "topic")
    with pytest.raises(ValueError, match="owner/name has no column 'topic', but .*'question'"):
        sa.grpo.load_deepmath("owner/name")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"difficulty": "hard"}, "\"difficulty\" is 'hard', not a finite number"),
        ({"difficulty": True}, '"difficulty" is True'),
        ({"question": " "}, "\"question\" is ' ', not text"),
        ({"final_answer": 3}, '"final_answer" is 3, not text'),
        ({"topic": None}, "has no 'topic'"),
    ],
)
def test_load_deepmath_names_a_malformed_row(tmp_path, change, words):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(ValueError, match=rf"malformed rows:\n.*rows.jsonl:2: {words}"):
        sa.grpo.load_deepmath(path)


def test_malformed_parquet_files_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", [row | {"difficulty": math.nan} for row in ROWS[:2]])
    with pytest.raises(ValueError, match=r'a.parquet, row 2: "difficulty" is nan'):
        sa.grpo.load_deepmath(path)
    write(path, [{"question": "q", "difficulty": 1.0}])
    words = r"a.parquet has no column 'final_answer', 'topic', but \['question', 'difficulty'\]"
    with pytest.raises(ValueError, match=words):
        sa.grpo.load_deepmath(path)


@pytest.mark.parametrize("name", ["pyarrow.parquet", "datasets"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name):
    source = write(tmp_path / "a.parquet", ROWS) if "parquet" in name else "owner/name"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"{name} cannot be imported .*: pip install {name[:7]}"):
        sa.grpo.load_deepmath(source)


# -- foreign verifiers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verify():
    return sa.grpo.math_verify_reward(seconds=4.0)


def test_math_verify_reward(verify):
    for completion, answer, value in [
        ("so $x = \\frac{1}{2}$", "0.5", 1.0),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", 1.0),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "$\\frac{1}{\\sqrt{2}}$", 1.0),
        ("\\boxed{3}", "4", 0.0),
        ("no mathematics", "4", 0.0),
    ]:
        assert verify("p", completion, {"answer": answer}) == value, completion
    with pytest.raises(SandboxError, match="math-verify finds no expression in the answer"):
        verify("p", "4", {"answer": ""})


@pytest.mark.parametrize(
    "attack", ["9^{9^{9}}", "$9^{9^{9^{9}}}$", "$(10^8)!$", "$" + "(" * 10**6, "[" * 10**6,
               "$\\text{__import__('os').system('touch /tmp/executed')}$"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_math_verify_under_attack(verify, attack):
    start = time.monotonic()
    try:
        assert verify("p", attack, {"answer": "2"}) == 0.0
    except SandboxError as error:
        assert "too long" in str(error)
    assert time.monotonic() - start < 6.0
    assert verify("p", "$2$", {"answer": "2"}) == 1.0


@pytest.mark.parametrize("name, options", [("chain_sum", {"max_terms": 3}), ("countdown", {})])
def test_reasoning_gym(name, options):
    records, reward = sa.grpo.reasoning_gym(name, 10, 3, **options)
    assert len(records) == 10 and json.loads(json.dumps(records)) == records
    for record in records:
        answer = record["answer"]
        assert reward(record["prompt"], answer, record) == 1.0
        assert reward("another prompt", f"<think>0</think><answer> {answer} </answer>", record) == 1
        assert reward("", f"<answer>0</answer> no, <answer>{answer}</answer>", record) == 1.0
        assert reward(record["prompt"], "<answer>x</answer>", record) < 0.1
    with pytest.raises(SandboxError, match="question 0 is another one than in the record"):
        reward("p", "1", records[0] | {"question": "?"})


def test_reasoning_gym_records_are_those_of_the_seed(monkeypatch):
    monkeypatch.setattr(tasks, "sandboxed", lambda *_, **__: None)
    first, again, other = (sa.grpo.reasoning_gym("chain_sum", 10, seed)[0] for seed in (3, 3, 4))
    assert first == again != other


def test_reasoning_gym_under_attack():
    """countdown evaluates what it is given."""
    (record,), reward = sa.grpo.reasoning_gym("countdown", 1, 3, seconds=1.0)
    with pytest.raises(SandboxError, match="too long"):
        reward("p", "9**9**9**9", record)
    assert reward("p", record["answer"], record) == 1.0


def test_reasoning_gym_refuses():
    with pytest.raises(ValueError, match="not registered"):
        sa.grpo.reasoning_gym("no_such_task", 1, 0)
    with pytest.raises(TypeError, match="no_such_option"):
        sa.grpo.reasoning_gym("chain_sum", 1, 0, no_such_option=1)


@pytest.mark.parametrize("name", ["reasoning_gym", "math_verify"])
def test_missing_extras_are_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    words = rf"{name} cannot be imported .*: pip install 'structadapt\[tasks\]'"
    with pytest.raises(ImportError, match=words):
        if name == "math_verify":
            sa.grpo.math_verify_reward()
        else:
            sa.grpo.reasoning_gym("chain_sum", 1, 0)
