"""HellaSwag: the same choices and losses as transformers, llm.c's file format, and a one-line error for every damaged file.

dev/reference_hellaswag.jsonl holds the results of dev/reference_hellaswag.py for the model in dev/reference_transformers. The
last test compares scores of random sentences, if the Python in TRANSFORMERS_PYTHON has transformers.
"""
import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest

import generate_gpt2
import generate_gpt2_gpu
import train_gpt2
import train_gpt2_gpu
from cli import UserError
from dataloader import write_tokens
from dev import evaluate, prepare_hellaswag
from dev.evaluate import make_token_losses
from files import DATA_DIR
from hellaswag import Example, completion_losses, count_correct, read_examples, write_examples
from model_files import load_model, save_model
from tokenizer import train_tokenizer

DEV = Path(__file__).resolve().parents[1]
MODEL = DEV / "reference_transformers"
CONFIG, PARAMS = load_model(MODEL)
ITEMS = [json.loads(line) for line in (DEV / "reference_hellaswag.jsonl").read_text().splitlines()]
EXAMPLES = [Example(item["ctx"], item["endings"], item["label"]) for item in ITEMS]
EXPECTED = np.array([item["losses"] for item in ITEMS])
CORRECT = 15
BOUND = 1e-5
BATCH = 6
FEW = 10    # examples for CUDA kernels that may run on the CPU; one of them is longer than the context


def assert_same_choices(losses, expected):
    """The same choices, and losses equal to float32 rounding."""
    assert losses.argmin(axis=1).tolist() == expected.argmin(axis=1).tolist()
    np.testing.assert_allclose(losses, expected, rtol=BOUND, atol=0)


def token_losses_on_the_cpu(batch_size=BATCH):
    return make_token_losses(generate_gpt2.Decoder(CONFIG, PARAMS, batch_size, threads=2))


# ----------------------------------------------------------------------------------------------------------------------
# The score

def test_reference_discriminates():
    """Two of the 50 examples are longer than the context, and summing losses instead of averaging would change many choices."""
    assert EXPECTED.shape == (50, 4) and sum(example.length > CONFIG.max_seq_len for example in EXAMPLES) == 2
    sums = EXPECTED * [[len(completion) for completion in example.completions] for example in EXAMPLES]
    assert (sums.argmin(axis=1) != EXPECTED.argmin(axis=1)).sum() > 20
    assert np.bincount(EXPECTED.argmin(axis=1)).min() > 5
    assert sum(EXPECTED.argmin(axis=1) == [example.label for example in EXAMPLES]) == CORRECT


@pytest.mark.parametrize("batch_size", [6, 200])
def test_choices_of_transformers(tmp_path, batch_size):
    write_examples(tmp_path / "examples.bin", EXAMPLES)
    examples = read_examples(tmp_path / "examples.bin", CONFIG.vocab_size)
    losses = completion_losses(token_losses_on_the_cpu(batch_size), examples, batch_size, CONFIG.max_seq_len)
    assert_same_choices(losses, EXPECTED)


def test_choices_of_transformers_on_a_device(on):
    decoder = generate_gpt2_gpu.Decoder(CONFIG, PARAMS, BATCH, on)
    losses = completion_losses(make_token_losses(decoder), EXAMPLES[:FEW], BATCH, CONFIG.max_seq_len)
    assert_same_choices(losses, EXPECTED[:FEW])


def test_choices_of_a_model_in_training():
    model = train_gpt2.GPT2(CONFIG, BATCH, CONFIG.max_seq_len, threads=2)
    model.set_params(PARAMS)
    assert_same_choices(completion_losses(model.token_losses, EXAMPLES, BATCH, CONFIG.max_seq_len), EXPECTED)


def test_choices_of_a_model_in_training_on_a_device(on):
    model = train_gpt2_gpu.GPT2(CONFIG, BATCH, CONFIG.max_seq_len, on)
    model.set_params(PARAMS)
    losses = completion_losses(model.token_losses, EXAMPLES[:FEW], BATCH, CONFIG.max_seq_len)
    assert_same_choices(losses, EXPECTED[:FEW])


def test_batches_fit_the_model_and_need_little_padding():
    padded = 0

    def token_losses(tokens, targets):
        nonlocal padded
        assert tokens.shape == targets.shape and len(tokens) <= 6 and tokens.shape[1] <= 40
        assert tokens.dtype == targets.dtype == np.int32 and tokens.flags.c_contiguous and targets.flags.c_contiguous
        padded += tokens.size
        return np.ones(tokens.size, np.float32)
    assert (completion_losses(token_losses, EXAMPLES, 6, 40) == 1).all()
    tokens_read = sum(min(40, len(example.context) + len(completion) - 1)
                      for example in EXAMPLES for completion in example.completions)
    assert tokens_read <= padded < 1.05 * tokens_read


def test_model_with_a_shorter_context_reads_the_end():
    """Of a completion longer than the context, only the last tokens are scored."""
    losses = completion_losses(token_losses_on_the_cpu(), EXAMPLES, BATCH, 8)
    model = train_gpt2.GPT2(CONFIG, 1, 8, threads=1)
    model.set_params(PARAMS)
    for example, found in zip(EXAMPLES, losses):
        for completion, loss in zip(example.completions, found):
            row = np.array((example.context + completion)[-9:], np.int32)
            model.forward(row[None, :-1].copy())
            model.loss(row[None, 1:].copy())
            assert loss == pytest.approx(model.acts.losses[-len(completion):].mean(), rel=BOUND)


def test_the_first_of_equal_losses_is_chosen():
    examples = [Example([1], [[2], [3], [4], [5]], label) for label in (0, 1, 0)]
    assert count_correct(lambda tokens, targets: np.ones(tokens.size, np.float32), examples, 4, 8) == 2


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    def score():
        count_correct(lambda tokens, targets: np.ones(tokens.size, np.float32), EXAMPLES, 1, 8)
        return capsys.readouterr().err
    assert score() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "hellaswag: 100%" in (bar := score()) and "200/200" in bar and bar.endswith("\n")


def test_losses_that_are_not_finite():
    def token_losses(tokens, targets):
        return np.where(targets == EXAMPLES[3].completions[1][0], np.nan, 1).astype(np.float32).reshape(-1)
    with pytest.raises(UserError, match="loss of example [0-3] of HellaSwag is not finite: .*; take another --model"):
        count_correct(token_losses, EXAMPLES, BATCH, CONFIG.max_seq_len)


# ----------------------------------------------------------------------------------------------------------------------
# The file

SMALL = [Example([5, 6], [[1], [2, 3], [4], [7, 8, 9]], 3), Example([11], [[1], [1], [2], [2]], 0)]
WORDS = [[65535, 38, 0, 3, 4, 2, 5, 6, 1, 1, 2, 2, 3, 1, 4, 3, 7, 8, 9], [65535, 30, 1, 0, 4, 1, 11, 1, 1, 1, 1, 1, 2, 1, 2]]


def file_of(words=None, **changes):
    """A file in llm.c's format. Each example is a list of words; its size in bytes is filled in."""
    words = WORDS if words is None else words
    words = [[word, 2 * len(example), *rest] for example in words for word, _, *rest in [example]]
    longest = max(2 * len(example) for example in words)
    header = dict(magic=20240522, version=1, num_examples=len(words), longest=longest) | changes
    stream = [word for example in words for word in example]
    return struct.pack("<256i", *header.values(), *[0] * 252) + struct.pack(f"<{len(stream)}H", *stream)


def assert_same_examples(examples, expected):
    assert [([*context], [[*text] for text in completions], label) for context, completions, label in examples] == [
        ([*context], [[*text] for text in completions], label) for context, completions, label in expected]


def test_file_follows_the_format(tmp_path):
    write_examples(tmp_path / "folder" / "examples.bin", SMALL)
    assert (tmp_path / "folder" / "examples.bin").read_bytes() == file_of()
    assert_same_examples(read_examples(tmp_path / "folder" / "examples.bin", 12), SMALL)


def test_limits_of_the_format(tmp_path):
    path = tmp_path / "examples.bin"
    most = 32767 - 5 - 5 - 4
    write_examples(path, [Example([1] * most, [[2]] * 4, 0)])
    assert_same_examples(read_examples(path, 3), [Example([1] * most, [[2]] * 4, 0)])
    before = path.read_bytes()
    for examples in ([Example([1] * (most + 1), [[2]] * 4, 0)], [SMALL[0]] * 65536):
        with pytest.raises(ValueError, match="at most 65,535"):
            write_examples(path, examples)
    assert path.read_bytes() == before and len(before) == 1024 + 65534


def changed(example, position, word):
    """The file with one word of one example replaced."""
    words = [list(each) for each in WORDS]
    words[example][position] = word
    return file_of(words)


WHOLE = file_of()
SECOND = 1024 + 38     # the second example begins here
DAMAGED = {
    "truncated header": (WHOLE[:1023], ("has 1,023 bytes", "a header of 1,024")),
    "token file": (file_of(magic=20240520), ("is an llm.c token file", "expected a file of HellaSwag examples")),
    "other version": (file_of(version=2), ("version 2", "expected version 1")),
    "no examples": (file_of(num_examples=0)[:1024], ("holds 0 examples", "expected 1 to 65,535")),
    "too many examples": (file_of(num_examples=2**31 - 1), ("holds 2,147,483,647 examples",)),
    "fewer than the header says": (file_of(num_examples=3), ("example 2 of 3", "end of the file")),
    "more than the header says": (file_of(num_examples=1), ("has 30 bytes after the 1 examples", "expected none")),
    "half a word": (WHOLE + b"\0", ("has 1 bytes after",)),
    "truncated": (WHOLE[:-1], ("example 1 of 2", "30 bytes", "up to 28")),
    "truncated at the start of an example": (WHOLE[:SECOND + 9], ("example 1 of 2", "end of the file, after 8 bytes")),
    "no start mark": (changed(1, 0, 65534), ("example 1 of 2", "begins with 65534", "expected 65535")),
    "other index": (changed(1, 2, 0), ("example 1 of 2", "index 0", "expected 65535, 1 and 4")),
    "three completions": (changed(0, 4, 3), ("example 0 of 2", "3 completions", "and 4")),
    "label": (changed(1, 3, 4), ("example 1 of 2", "the label is 4", "0 to 3")),
    "odd size": (WHOLE[:1026] + b"\x25\0" + WHOLE[1028:], ("example 0 of 2", "37 bytes", "even number up to 68")),
    "size 0": (WHOLE[:1026] + b"\0\0" + WHOLE[1028:], ("example 0 of 2", "0 texts")),
    "size too large": (WHOLE[:1026] + b"\x46\0" + WHOLE[1028:], ("example 0 of 2", "70 bytes", "up to 68")),
    "no context": (file_of([WORDS[0][:5] + [0] + WORDS[0][8:], WORDS[1]]),
                   ("example 0 of 2", "text of 0 tokens", "expected 1 to")),
    "empty completion": (file_of([WORDS[0], WORDS[1][:7] + [0] + WORDS[1][9:]]), ("example 1 of 2", "text of 0 tokens")),
    "text longer than the example": (changed(0, 15, 4), ("example 0 of 2", "text of 4 tokens", "expected 1 to 3")),
    "a text too many": (file_of([WORDS[0] + [1, 1], WORDS[1]]), ("example 0 of 2", "6 texts", "a context and 4")),
    "a text too few": (file_of([WORDS[0], WORDS[1][:-2]]), ("example 1 of 2", "4 texts", "a context and 4")),
    "token outside the vocabulary": (changed(1, 6, 12), ("example 1", "token 12", "vocabulary of 12")),
}


def error_of(path, vocab_size=12):
    with pytest.raises(UserError) as caught:
        read_examples(path, vocab_size)
    return str(caught.value)


@pytest.mark.parametrize("contents, parts", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file(tmp_path, contents, parts):
    path = tmp_path / "examples.bin"
    path.write_bytes(contents)
    message = error_of(path)
    assert re.search(".*".join(map(re.escape, (str(path), *parts, ";"))), message) and message.isprintable(), message


def test_no_file(tmp_path):
    assert "No such file" in error_of(tmp_path / "none.bin") and "dev/prepare_hellaswag.py" in error_of(tmp_path / "none.bin")
    assert f"cannot read {tmp_path}" in error_of(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# dev/prepare_hellaswag.py

class ByteEncoding:
    """One token per byte, so that the tests need no vocabulary."""

    def encode(self, text):
        return list(text.encode())


@pytest.fixture
def byte_encoding(monkeypatch):
    monkeypatch.setattr(prepare_hellaswag, "GPT2Tokenizer", ByteEncoding)


def line(**changes):
    """A line of HellaSwag's file. A change to None removes the field."""
    item = {"ind": 24, "activity_label": "Roofing", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he",
            "split": "val", "split_type": "indomain", "label": 3,
            "endings": ["skis.", "rips.", "is [on] a roof's edge.", ""], "source_id": "a~b"}
    return json.dumps({name: value for name, value in (item | changes).items() if value is not None}, ensure_ascii=False)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "some.jsonl"


@pytest.mark.parametrize("end", ["", "\n"])
def test_prepared_examples(run_main, byte_encoding, tmp_path, source, end):
    """Texts are unchanged, except for a space before every ending, even an empty one."""
    source.write_text(line() + "\n" + line(ctx="é\u2028", label=0) + end, encoding="utf-8")
    output = tmp_path / "new" / "some.bin"
    finished = run_main(prepare_hellaswag, "--input", source, "--output", output)
    assert finished == (0, f"wrote {output}: 2 examples\n", "")
    endings = [b" skis.", b" rips.", b" is [on] a roof's edge.", b" "]
    assert_same_examples(read_examples(output, 256), [Example(b"A man sits. he", endings, 3),
                                                      Example("é\u2028".encode(), endings, 0)])


@pytest.mark.parametrize("contents", [
    "\r\n\r\n".join([line(), line(label="0")]),
    f"[{line()},\n {line(label='0')}]",
    json.dumps([json.loads(line()), json.loads(line(label=0))], indent=2),
], ids=["blank lines and labels as strings", "an array", "an array over lines"])
def test_forms_that_the_examples_come_in(run_main, byte_encoding, tmp_path, source, contents):
    source.write_text(contents, newline="")
    assert run_main(prepare_hellaswag, "--input", source, "--output", tmp_path / "some.bin").status == 0
    assert [example.label for example in read_examples(tmp_path / "some.bin", 256)] == [3, 0]


def test_models_with_another_tokenizer_are_refused(tmp_path):
    """The examples are GPT-2's tokens."""
    write_examples(tmp_path / "some.bin", [Example([1], [[2], [3], [4], [5]], 0)])
    assert read_examples(tmp_path / "some.bin", 256)
    with pytest.raises(UserError, match="holds GPT-2's tokens, but the model has another tokenizer"):
        read_examples(tmp_path / "some.bin", 300, train_tokenizer(["the cat and the dog"], 300))


def test_prepared_tokens(tmp_path, source, encoding):
    source.write_text(line() + "\n" + line(ctx="He said <|endoftext|> 😀", label=1), encoding="utf-8")
    prepare_hellaswag.prepare(source, tmp_path / "some.bin")
    first, second = read_examples(tmp_path / "some.bin", 50257)
    assert first.context.tolist() == [32, 582, 10718, 13, 339]     # "A", " man", " sits", ".", " he"
    assert [encoding.decode(text.tolist()) for text in first.completions] == [
        " skis.", " rips.", " is [on] a roof's edge.", " "]
    assert encoding.decode(second.context.tolist()) == "He said <|endoftext|> 😀"


UNUSABLE = {
    "not JSON": ("{'ctx': 1}", ("line 2 cannot be read as JSON",)),
    "a list": ("[1]", ("line 2", "not a JSON object")),
    "nested": ('{"a":' * 100_000, ("line 2", "recursion")),
    "5,000 digits": ("9" * 5000, ("line 2", "4300")),
    "no context": (line(ctx=None), ("line 2", "no text in 'ctx'")),
    "empty context": (line(ctx=""), ("line 2", "no text in 'ctx'")),
    "context not a string": (line(ctx=["a"]), ("line 2", "no text in 'ctx'")),
    "three endings": (line(endings=["a", "b", "c"]), ("line 2", "4 texts in 'endings'")),
    "ending not a string": (line(endings=["a", "b", "c", 4]), ("line 2", "4 texts in 'endings'")),
    "no label": (line(label=None), ("line 2", "no 'label'", "test examples have none")),
    "label of the test split": (line(label=""), ("line 2", "no 'label'", "test examples have none")),
    "label in words": (line(label="two"), ("line 2", "0 to 3 in 'label'")),
    "label too large": (line(label=4), ("line 2", "0 to 3 in 'label'")),
    "label true": (line(label=True), ("line 2", "0 to 3 in 'label'")),
    "too long": (line(ctx="a" * 40_000), ("line 2", "40,036 tokens", "32,757")),
}


@pytest.mark.parametrize("text, parts", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_line(run_main, byte_encoding, tmp_path, source, text, parts):
    source.write_text(line() + "\n" + text + "\n" + line())
    finished = run_main(prepare_hellaswag, "--input", source, "--output", tmp_path / "some.bin")
    assert finished.status == 1 and finished.err.startswith("prepare_hellaswag.py: error: ") and finished.err.count("\n") == 1
    for part in (str(source), *parts):
        assert part in finished.err, finished.err
    assert not (tmp_path / "some.bin").exists()


def test_line_that_is_not_utf8(run_main, byte_encoding, tmp_path, source):
    source.write_bytes(line().encode() + b'\n{"ctx": "caf\xe9"}\n')
    finished = run_main(prepare_hellaswag, "--input", source, "--output", tmp_path / "some.bin")
    assert finished.status == 1 and "line 2 is not UTF-8" in finished.err and finished.err.count("\n") == 1


def test_source_that_cannot_be_used(run_main, byte_encoding, tmp_path, source):
    for path, status, part in ((tmp_path / "none.jsonl", 2, "No such file"), (tmp_path, 2, "cannot read"),
                               (source, 1, "is empty")):
        source.write_text("\n" * 9)
        finished = run_main(prepare_hellaswag, "--input", path, "--output", tmp_path / "some.bin")
        assert finished.status == status and part in finished.err and finished.err.count("\n") == 1, finished.err
    source.write_text(line())
    finished = run_main(prepare_hellaswag, "--input", source, "--output", source / "some.bin")
    assert finished.status == 1 and "cannot write" in finished.err


def test_download(run_main, byte_encoding, tmp_path, monkeypatch):
    contents = "\n".join(line(label=i % 4) for i in range(1000)).encode()
    assert len(contents) > 2 * prepare_hellaswag.PIECE_BYTES
    monkeypatch.setattr(prepare_hellaswag, "SIZE", len(contents))
    monkeypatch.setattr(prepare_hellaswag, "SHA256", prepare_hellaswag.sha256(contents))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(contents))
    finished = run_main(prepare_hellaswag, "--output", tmp_path / "some.bin")
    assert finished == (0, f"wrote {tmp_path / 'some.bin'}: 1,000 examples\n", "")
    assert [example.label for example in read_examples(tmp_path / "some.bin", 256)] == [0, 1, 2, 3] * 250


@pytest.mark.parametrize("answer, parts", [
    (b"<html>please log in</html>", ("sent 26 bytes", "expected 12,246,618", "0aa3b888")),
    (urllib.error.URLError("Name or service not known"), ("(Name or service not known)",)),
    (TimeoutError("timed out"), ("(timed out)",)),
])
def test_download_that_fails(run_main, tmp_path, monkeypatch, answer, parts):
    def urlopen(url, timeout):
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    finished = run_main(prepare_hellaswag, "--output", tmp_path / "some.bin")
    assert finished.status == 1 and finished.err.count("\n") == 1
    for part in (*parts, "hellaswag_val.jsonl", "by hand", "--input"):
        assert part in finished.err
    assert not (tmp_path / "some.bin").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The program

@pytest.fixture
def examples_file(tmp_path):
    write_examples(tmp_path / "examples.bin", EXAMPLES)
    return tmp_path / "examples.bin"


def test_evaluate(run_main, examples_file):
    finished = run_main(evaluate, "--model", MODEL, "--hellaswag", examples_file, "--threads", 1)
    assert finished.status == 0, finished.err
    score, too_long = finished.out.splitlines()[-2:]
    assert score.startswith("hellaswag | 0.3000 (15 of 50) | standard error 0.0648 | ") and score.endswith(" examples/s")
    assert too_long.startswith("2 examples are longer than the model's context, 231 tokens")


def test_evaluate_on_a_device(run_main, tmp_path, on, monkeypatch):
    monkeypatch.setattr(evaluate, "open_device", lambda name, dtype: on)
    choices = EXPECTED[:FEW].argmin(axis=1)
    write_examples(tmp_path / "some.bin", [example._replace(label=choice if i < 7 else (choice + 1) % 4)
                                           for i, (example, choice) in enumerate(zip(EXAMPLES, choices))])
    finished = run_main(evaluate, "--model", MODEL, "--hellaswag", tmp_path / "some.bin", "--device", "cuda", "--batch-size", 8)
    assert finished.status == 0, finished.err
    assert "hellaswag | 0.7000 (7 of 10) |" in finished.out


@pytest.mark.parametrize("flags, status, parts", [
    ((), 2, ("--model",)),
    (("--model", "no/such/model"), 1, ("no/such/model",)),
    (("--model", MODEL, "--hellaswag", "none.bin"), 1, ("none.bin", "dev/prepare_hellaswag.py")),
    (("--model", MODEL, "--batch-size", 0), 2, ("--batch-size", "'0'")),
    (("--model", MODEL, "--threads", 9999), 2, ("--threads", "9999")),
    (("--model", MODEL, "--device", "gpu"), 2, ("--device gpu",)),
])
def test_mistake_on_the_command_line(run_main, flags, status, parts):
    finished = run_main(evaluate, *flags)
    assert finished.status == status and finished.err.startswith("evaluate.py: error: ") and finished.err.count("\n") == 1
    for part in parts:
        assert part in finished.err


@pytest.mark.parametrize("program", [train_gpt2, train_gpt2_gpu])
def test_training_scores_the_model(run_main, tmp_path, examples_file, program):
    """Scores are logged after step 2 and at the end; the last one is the saved model's. Too long examples are counted."""
    write_tokens(tmp_path / "tokens.bin", np.random.default_rng(3).integers(CONFIG.vocab_size, size=200))
    finished = run_main(program, "--model", MODEL, "--input-bin", tmp_path / "tokens.bin", "--batch-size", 3,
                        "--sequence-length", 20, "--num-iterations", 3, "--learning-rate", 0.01, "--warmup-iters", 0,
                        "--sample-every", 0, "--hellaswag", examples_file, "--hellaswag-every", 2,
                        "--output-dir", tmp_path / "out", *(("--device", "cpu") if program is train_gpt2_gpu else ()))
    assert finished.status == 0, finished.err
    too_long = sum(example.length > 20 for example in EXAMPLES)
    assert f"   hellaswag | 50 examples in {examples_file}, {too_long} longer than 20 tokens" in finished.out
    with open(tmp_path / "out" / "log.csv") as file:
        scores = {row["step"]: float(row["hellaswag"]) for row in csv.DictReader(file) if row["hellaswag"]}
    decoder = generate_gpt2.Decoder(*load_model(tmp_path / "out"), BATCH, threads=2)
    correct = count_correct(make_token_losses(decoder), EXAMPLES, BATCH, 20)
    assert list(scores) == ["2", "3"] and scores["3"] == correct / 50
    assert f"step 3/3 |  hellaswag {correct / 50:9.6f} ({correct} of 50)\n" in finished.out


def test_model_with_damaged_weights(run_main, tmp_path, examples_file):
    config, params = load_model(MODEL)
    params.lnfb[0] = np.nan
    save_model(tmp_path / "model", config, params)
    finished = run_main(evaluate, "--model", tmp_path / "model", "--hellaswag", examples_file)
    assert finished.status == 1 and finished.err.count("\n") == 1
    assert "loss of example 0 of HellaSwag is not finite" in finished.err


# ----------------------------------------------------------------------------------------------------------------------
# transformers

STEMS = "roof snow kettle piano river market window soldier naïve garden 漢字 engine letter 1995 paint climb whisper".split()
TAILS = "'s ing ed . , ! ly 's, er ; [step] -- (or) \u00a0 s".split(" ")


def random_text(rng, max_words):
    words = [rng.choice(STEMS) + rng.choice(["", rng.choice(TAILS)]) for _ in range(rng.integers(1, max_words))]
    return rng.choice([" ", " ", "  "]).join(words)


def test_scores_of_transformers(run_main, tmp_path):
    """50 random examples and a Hugging Face model with GPT-2's vocabulary: the same tokens and choices as transformers."""
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode != 0:
        pytest.skip(f"{python} has no transformers: name a Python that has it in TRANSFORMERS_PYTHON")

    def run(script, *arguments):
        finished = subprocess.run([python, DEV / script, *map(str, arguments)], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr

    rng = np.random.default_rng(1)
    items = [line(ctx=random_text(rng, 40), endings=[random_text(rng, 20) for _ in range(4)], label=int(rng.integers(4)))
             for _ in range(50)]
    (tmp_path / "random.jsonl").write_text("\n".join(items), encoding="utf-8")
    prepare_hellaswag.prepare(tmp_path / "random.jsonl", tmp_path / "random.bin")

    run("reference_transformers.py", tmp_path / "model", "--shape", "gpt2")
    for name, original in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        shutil.copy(DATA_DIR / original, tmp_path / "model" / name)
    run("reference_hellaswag.py", tmp_path / "model", tmp_path / "random.jsonl", tmp_path / "scored.jsonl")
    scored = [json.loads(each) for each in (tmp_path / "scored.jsonl").read_text().splitlines()]
    expected = np.array([item["losses"] for item in scored])

    config, params = load_model(tmp_path / "model")
    examples = read_examples(tmp_path / "random.bin", config.vocab_size)
    decoder = generate_gpt2.Decoder(config, params, 16, threads=2)
    assert_same_choices(completion_losses(make_token_losses(decoder), examples, 16, config.max_seq_len), expected)

    correct = sum(int(losses.argmin()) == item["label"] for losses, item in zip(expected, scored))
    finished = run_main(evaluate, "--model", tmp_path / "model", "--hellaswag", tmp_path / "random.bin")
    assert f"hellaswag | {correct / 50:.4f} ({correct} of 50) |" in finished.out, finished
