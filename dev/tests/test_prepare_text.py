"""Token files from your own texts: the same tokens for any number of threads, atomic writes, a one-line error per mistake."""
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_text
import text_files
import tokenizer
import train_gpt2
from cli import UserError
from dataloader import DataLoader, write_token_stream
from model_files import load_model_tokenizer
from prepare_text import batches, divide, encode
from text_files import SEPARATOR, TextReader
from tokenizer import GPT2_FINGERPRINT, GPT2Tokenizer, save_tokenizer, train_tokenizer
from training import vocabulary_of

PROGRAM = Path(prepare_text.__file__)
END = tokenizer.END_OF_TEXT
SECONDS = 60  # time limit for a process


class ByteTokenizer(GPT2Tokenizer):
    """One token per byte, so that most tests need no vocabulary."""

    def encode_pieces(self, texts):
        return [list(text.encode()) for text in texts]


@pytest.fixture
def byte_encoding(monkeypatch):
    monkeypatch.setattr(prepare_text, "GPT2Tokenizer", ByteTokenizer)


@pytest.fixture
def run(run_main, byte_encoding):
    """Runs prepare_text.py in this process with the given arguments, one token per byte."""
    return lambda *arguments: run_main(prepare_text, *arguments)


def read_tokens(path):
    return np.fromfile(path, dtype="<u2", offset=1024)


def read_all(name):
    """The tokens of all files written as `name`, in order."""
    return np.concatenate([read_tokens(path) for path in
                           [f"{name}_val.bin", *sorted(Path(name).parent.glob(f"{Path(name).name}_train_*.bin"))]])


def tokens_of(*documents):
    """The documents (bytes) encoded by ByteTokenizer."""
    return [token for document in documents for token in [END, *document]]


def some_text(length, seed=0):
    """Words in lines, as bytes."""
    words = random.Random(seed)
    return "".join(f"{words.randrange(10**6)}{words.choice(' ,é漢')}{words.choice(' ' * 9 + chr(10))}"
                   for _ in range(length // 7)).encode()


# ---- encoding

@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tokens_of_a_file(encoding, tmp_path, monkeypatch, threads):
    text = some_text(30_000).decode()
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 100)
    monkeypatch.setattr(tokenizer, "BLOCK_SIZE", 256)
    monkeypatch.setattr(prepare_text, "BATCH_SIZE", 256)
    texts = TextReader().read([(str(tmp_path / "text.txt"), False)])
    assert np.concatenate(list(encode(texts, threads, encoding))).tolist() == [END, *encoding.encode(text)]


def test_texts_are_read_only_as_needed(monkeypatch):
    monkeypatch.setattr(prepare_text, "BATCH_SIZE", 10)
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield from (SEPARATOR, "ten bytes.")
    tokens = encode(endless(), 2, ByteTokenizer())
    for count in range(1, 4):
        next(tokens)
        assert len(read) <= 6 + count
    tokens.close()


def test_short_documents_are_encoded_together(monkeypatch):
    monkeypatch.setattr(prepare_text, "BATCH_SIZE", 70)
    texts = [SEPARATOR, "one", SEPARATOR, "two", SEPARATOR, "three", SEPARATOR, "a longer one" * 5, SEPARATOR, "four"]
    assert list(batches(texts)) == [texts[:8], texts[8:]]


def test_folder_is_read_in_order(run, tmp_path):
    names = ["a/z.txt", "a/b/c.md", "b.txt", "a.txt", "a/.hidden", ".git/config", "B/d"]
    for name in names:
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 200)
    (tmp_path / "texts" / "c.jsonl").write_text('{"text": "line 1"}\n{"text": "line 2"}\n')
    last = tmp_path / ".last"  # hidden, but given on the command line
    last.write_text("last")
    finished = run(tmp_path / "texts", last, "--output", tmp_path / "out")
    expected = [b"a.txt" * 200, b"b.txt" * 200, b"line 1", b"line 2", b"B/d" * 200, b"a/z.txt" * 200, b"a/b/c.md" * 200,
                b"last"]
    assert read_all(tmp_path / "out").tolist() == tokens_of(*expected)
    assert f"8 documents, {len(tokens_of(*expected)):,} tokens" in finished.out


def test_standard_input(run, tmp_path, monkeypatch):
    contents = some_text(4_000)
    for given, flags in ((contents, ()), (json.dumps({"text": contents.decode()}).encode(), ("--text-field", "text"))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
        assert run("-", "--output", tmp_path / "out", *flags).status == 0
        assert read_all(tmp_path / "out").tolist() == tokens_of(contents)


def test_what_is_left_out_is_named(run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_bytes(contents := some_text(4_000))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "more.jsonl").write_text('{"id": 1}\n{"text": "more"}\nnonsense\n')
    assert_one_line(run(folder, "--output", tmp_path / "out"), 1, "more.jsonl line 1 is {'id': 1}", "--skip-bad")
    finished = run(folder, "--output", tmp_path / "out", "--skip-bad")
    assert read_all(tmp_path / "out").tolist() == tokens_of(contents, b"more")
    assert "left out 2 files: " in finished.out
    assert "cover.jpg is not UTF-8" in finished.out and "empty.txt is empty" in finished.out
    assert "left out 2 records: " in finished.out and "more.jsonl line 3" in finished.out


# ---- tokenizers

def test_trained_tokenizer_is_stored_with_the_tokens(run, tmp_path, monkeypatch):
    """And training on the tokens takes vocabulary and tokenizer from there; another text in its place takes it away."""
    (tmp_path / "text.txt").write_bytes(contents := some_text(40_000))
    finished = run(tmp_path / "text.txt", "--output", tmp_path / "out", "--train-tokenizer", 300)
    assert "trained a tokenizer of 300 tokens" in finished.out
    loader = DataLoader(tmp_path / "out_train_000000.bin", 4, 64)
    size, known = vocabulary_of(loader)
    assert (loader.vocab_size, loader.tokenizer_fingerprint) == (300, known.fingerprint)
    tokens = read_all(tmp_path / "out")
    assert size == known.vocab_size == 300 and tokens[0] == known.end_of_text == 299
    assert known.decode(tokens[1:].tolist()) == contents.decode()
    assert run(tmp_path / "text.txt", "--output", tmp_path / "two", "--tokenizer", tmp_path / "out_tokenizer").status == 0
    assert read_all(tmp_path / "two").tolist() == tokens.tolist()
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out").status == 0
    assert not (tmp_path / "out_tokenizer").exists()


def test_a_tokenizer_goes_with_its_model(run_main, tmp_path):
    """Training on its tokens saves it, fine-tuning keeps it, and a model with another one refuses the tokens."""
    (tmp_path / "text.txt").write_bytes(contents := some_text(40_000))
    steps = ("--num-iterations", 2, "--sample-every", 2, "--val-loss-every", 2, "--sequence-length", 16, "--threads", 1)
    data = "--input-bin", tmp_path / "own_train_*.bin", "--input-val-bin", tmp_path / "own_val.bin"
    assert run_main(prepare_text, tmp_path / "text.txt", "--output", tmp_path / "own", "--train-tokenizer", 300).status == 0
    finished = run_main(train_gpt2, "--model", "d2", *data, *steps, "--output-dir", tmp_path / "new")
    assert finished.status == 0 and finished.err == ""
    loss, bits = re.search(r"val loss +([\d.]+) \| ([\d.]+) bits per byte", finished.out).groups()
    tokens = read_tokens(tmp_path / "own_val.bin")
    num_bytes = len(load_model_tokenizer(tmp_path / "own_tokenizer").decode(tokens[1:].tolist()).encode())
    assert float(bits) == pytest.approx(float(loss) / math.log(2) * len(tokens) / num_bytes, rel=1e-3)
    finished = run_main(train_gpt2, "--model", tmp_path / "new", *data, *steps, "--output-dir", tmp_path / "tuned")
    assert finished.status == 0
    own = load_model_tokenizer(tmp_path / "own_tokenizer")
    for folder in tmp_path / "new", tmp_path / "tuned", tmp_path / "tuned" / "best":
        saved, settings = load_model_tokenizer(folder), json.loads((folder / "config.json").read_text())
        assert (saved.fingerprint, saved.special_ids) == (own.fingerprint, own.special_ids)
        assert settings["eos_token_id"] == settings["bos_token_id"] == settings["vocab_size"] - 1 == own.end_of_text
        assert saved.decode(saved.encode(contents.decode()[:99])) == contents.decode()[:99]
    write_token_stream(tmp_path / "gpt2.bin", [range(200)], 50257, GPT2_FINGERPRINT)
    finished = run_main(train_gpt2, "--model", tmp_path / "new", "--input-bin", tmp_path / "gpt2.bin", *steps,
                        "--output-dir", tmp_path / "refused")
    assert_one_line(finished, 1, "gpt2.bin holds the tokens of another tokenizer than that of", "--model", program=train_gpt2)
    finished = run_main(train_gpt2, "--model", "d2", *data[:3], tmp_path / "gpt2.bin", *steps, "--output-dir", tmp_path / "no")
    assert_one_line(finished, 1, "gpt2.bin holds the tokens of another tokenizer", program=train_gpt2)


def test_ids_of_ones_own(run_main, tmp_path):
    """They have no tokenizer: the model has as many rows as there are ids, and is saved without one."""
    write_token_stream(tmp_path / "ids.bin", [np.arange(200) % 65])
    finished = run_main(train_gpt2, "--model", "d2", "--input-bin", tmp_path / "ids.bin", "--num-iterations", 1,
                        "--sequence-length", 16, "--threads", 1, "--output-dir", tmp_path / "out")
    assert finished.status == 0 and "the model knows 65 tokens, but no text" in finished.out
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["vocab_size"], settings["eos_token_id"]) == (65, None)
    assert not (tmp_path / "out" / "vocab.json").exists() and not (tmp_path / "out" / "tokenizer.json").exists()


def test_vocabulary_of_the_data(tmp_path):
    """GPT-2's, also of files that do not say so; that of the header, though its last tokens may not occur; or all ids."""
    own, other = (train_tokenizer([text * 99], 300) for text in ("the cat and the dog ", "wind and sea "))

    def vocabulary(largest, *header):
        write_token_stream(tmp_path / "a_train.bin", [[0, largest]], *header)
        return vocabulary_of(DataLoader(tmp_path / "a_train.bin", 1, 1))

    for largest, header, size in ((50256, (), 50257), (40_000, (), 50257), (7, (50257, GPT2_FINGERPRINT), 50257), (64, (), 65),
                                  (50257, (), 50258), (7, (300, own.fingerprint), 300)):
        assert vocabulary(largest, *header)[0] == size
    save_tokenizer(tmp_path / "a_tokenizer", own)
    assert vocabulary(7, 300, own.fingerprint)[1].fingerprint == own.fingerprint
    with pytest.raises(UserError, match="a_tokenizer is another tokenizer than that of .*a_train.bin"):
        vocabulary(7, 300, other.fingerprint)


# ---- writing

@pytest.mark.parametrize("length, num_validation", [(3_000, 300), (327_679, 32_767), (327_680, 32_768), (400_000, 32_768)])
def test_validation_is_the_beginning(run, tmp_path, monkeypatch, length, num_validation):
    monkeypatch.setattr(prepare_text, "BATCH_SIZE", 1_000)
    contents = bytes(97 + i % 26 for i in range(length - 1))  # with <|endoftext|>, `length` tokens
    (tmp_path / "text.txt").write_bytes(contents)
    assert run(tmp_path / "text.txt", "--output", tmp_path / "new" / "out").status == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out_train_000000.bin", "out_val.bin"]
    assert len(read_tokens(tmp_path / "new" / "out_val.bin")) == num_validation
    assert read_all(tmp_path / "new" / "out").tolist() == tokens_of(contents)


@pytest.mark.parametrize("num_tokens, val_tokens, expected", [
    (3_300, 300, [300, 1_000, 1_000, 1_000]),
    (3_400, 300, [300, 1_000, 1_000, 1_100]),        # the rest is too short for a shard
    (3_401, 300, [300, 1_000, 1_000, 1_000, 101]),
    (3_001, 3_000, [3_000, 1]),
    (3_050, 2_000, [2_000, 1_050]),
])
@pytest.mark.parametrize("length", [1, 7, 100, 5_000])
def test_shards(num_tokens, val_tokens, expected, length):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    slices = list(divide((tokens[i:i + length] for i in range(0, num_tokens, length)), val_tokens, 1_000))
    indices = [index for index, _ in slices]
    assert indices == sorted(indices)
    assert np.bincount(indices, [len(part) for _, part in slices]).tolist() == expected
    np.testing.assert_array_equal(np.concatenate([part for _, part in slices]), tokens)


def test_smallest_shard_of_large_ones():
    arrays = [np.zeros(10**6, dtype=np.uint16)] * 31
    sizes = [0] * 4
    for index, part in divide(arrays, 10**6, 14_400_000):
        sizes[index] += len(part)
    assert sizes == [10**6, 14_400_000, 14_400_000, 1_200_000]  # less than a tenth of a shard, but enough for any step


def test_printed_command_finds_the_files(run, tmp_path):
    folder = tmp_path / "a $folder's [1]"
    (tmp_path / "text.txt").write_bytes(contents := some_text(20_000))
    finished = run(tmp_path / "text.txt", "--output", folder / "my books", "--shard-tokens", 5_000, "--val-tokens", 1_000)
    assert finished.status == 0 and finished.err == ""
    command = finished.out.splitlines()[-1]
    python, program, input_bin, train_pattern, input_val_bin, val_pattern = shlex.split(command)
    assert (python, program) == ("python", str(PROGRAM.with_name("train_gpt2.py")))
    assert (input_bin, input_val_bin) == ("--input-bin", "--input-val-bin")
    train, val = DataLoader(train_pattern, 1, 64), DataLoader(val_pattern, 1, 64)
    assert len(train.shards) >= 4 and val.num_tokens == 1_000
    tokens = [shard.read(0, shard.num_tokens) for shard in (*val.shards, *train.shards)]
    assert np.concatenate(tokens).tolist() == tokens_of(contents)


def test_shards_of_an_earlier_text_are_deleted(run, tmp_path):
    (tmp_path / "long.txt").write_bytes(some_text(20_000))
    (tmp_path / "short.txt").write_bytes(contents := some_text(5_000, seed=1))
    others = ["out_train_1.bin", "out_train_000001.bin.old", "my_out_train_000001.bin", "out_train_more.bin", "out_test.bin",
              "out_train_two_train_000001.bin"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    assert run(tmp_path / "long.txt", "--output", tmp_path / "out", "--shard-tokens", 2_000).status == 0
    assert (tmp_path / "out_train_000007.bin").exists()
    assert run(tmp_path / "short.txt", "--output", tmp_path / "out").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["long.txt", "short.txt", "out_val.bin", "out_train_000000.bin", *others])
    assert all((tmp_path / name).read_bytes() == b"mine" for name in others)
    shards = [read_tokens(tmp_path / name) for name in ("out_val.bin", "out_train_000000.bin")]
    assert np.concatenate(shards).tolist() == tokens_of(contents)


def test_a_single_file_without_a_number_deletes_no_shards(tmp_path):
    """As prepare_tinyshakespeare.py writes it: shards of that name are somebody's own."""
    (tmp_path / "text_train_000000.bin").write_bytes(b"mine")
    arrays = iter([np.arange(5_000, dtype=np.uint16)])
    prepare_text.write_token_files(arrays, iter([tmp_path / "text_train.bin"]), tmp_path / "text_val.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text_train.bin", "text_train_000000.bin", "text_val.bin"]
    assert (tmp_path / "text_train_000000.bin").read_bytes() == b"mine"


def test_leftovers_of_a_killed_process_are_deleted(run, tmp_path):
    (tmp_path / "text.txt").write_bytes(some_text(20_000))
    for name in ("out_val.new.99999.tmp", "other_val.new.99999.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "out_val.bin").write_bytes(b"half")
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other_val.new.99999.tmp", "out_train_000000.bin", "out_val.bin", "text.txt"]


def test_failure_keeps_the_old_files(run, tmp_path):
    (tmp_path / "long.txt").write_bytes(some_text(20_000))
    (tmp_path / "bad.txt").write_bytes(some_text(400_000) + b"\xff")
    assert run(tmp_path / "long.txt", "--output", tmp_path / "out", "--shard-tokens", 2_000).status == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path / "bad.txt", "--output", tmp_path / "out", "--shard-tokens", 2_000).status == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_mixture_of_two_texts_looks_complete(run, tmp_path, monkeypatch):
    """Stop after any number of steps: the files are all old or all new, or there is no validation file until they are read."""
    old, new = some_text(12_000), some_text(14_000, seed=1)
    (tmp_path / "old.txt").write_bytes(old)
    (tmp_path / "new.txt").write_bytes(new)

    class Stopped(BaseException):
        pass

    def stopping(action):
        def step(*arguments, **options):
            nonlocal steps
            if Path(arguments[-1]).parent == tmp_path:
                if steps == 0:
                    raise Stopped
                steps -= 1
            return action(*arguments, **options)
        return step

    states = []
    for count in range(30):
        with monkeypatch.context() as patch:
            assert run(tmp_path / "old.txt", "--output", tmp_path / "out", "--shard-tokens", 2_000).status == 0
            steps = count
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(Path, "unlink", stopping(Path.unlink))
            try:
                assert run(tmp_path / "new.txt", "--output", tmp_path / "out", "--shard-tokens", 2_000).status == 0
            except Stopped:
                pass
            else:
                assert count > 5
                break
        if not (tmp_path / "out_val.bin").exists():
            states.append("incomplete")
            DataLoader(tmp_path / "out_val.bin", 1, 64)      # finishes what was stopped
        else:
            states.append("old" if read_all(tmp_path / "out").tolist() == tokens_of(old) else "new")
        if states[-1] != "old":
            assert read_all(tmp_path / "out").tolist() == tokens_of(new)
    assert read_all(tmp_path / "out").tolist() == tokens_of(new)
    assert list(dict.fromkeys(states)) == ["old", "incomplete", "new"]


def test_full_disk(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(some_text(20_000))

    def full(path, runs, **header):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prepare_text, "write_token_stream", full)
    assert_one_line(run(tmp_path / "text.txt", "--output", tmp_path / "out"), 1, "cannot write", "out_val.bin", "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_output_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "text.txt").write_bytes(some_text(20_000))
    assert_one_line(run(tmp_path / "text.txt", "--output", tmp_path / "text.txt" / "out"), 1, "cannot write", "out_val.bin")


# ---- output

def test_note_for_a_small_text(run, tmp_path):
    for length, noted in (99_999, True), (100_000, False):
        (tmp_path / "text.txt").write_bytes(b"a" * (length - 1))
        finished = run(tmp_path / "text.txt", "--output", tmp_path / "out")
        assert finished.status == 0 and finished.err == ""
        assert ("will memorize them" in finished.out) == noted
        assert f"1 document, {length:,} tokens; 0.10 MB in " in finished.out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_on_a_terminal(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(b"a" * 100_000)
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out").err == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out").status == 0
    assert "encoding: 100%" in terminal.getvalue() and "100k/100k" in terminal.getvalue()


def test_error_begins_on_a_line_of_its_own(run, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "text.txt").write_bytes(b"a" * 10_000 + b"\xff")
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out").status == 1
    assert "\nprepare_text.py: error: " in terminal.getvalue()


# ---- user errors: one line, no traceback, nothing written

def assert_one_line(finished, status, *parts, program=prepare_text):
    assert finished.status == status, finished
    assert finished.err.startswith(f"{program.__name__}.py: error: ")
    assert finished.err.find("\n") == len(finished.err) - 1, finished.err
    for part in parts:
        assert str(part) in finished.err, (finished.err, part)


LONG = some_text(600_000)


@pytest.mark.parametrize("name, contents, part", [
    ("text.txt", b"caf\xe9 au lait", "not UTF-8"),
    ("dump.jsonl", b'{"text": null}', "line 1 is {'text': None}"),
])
def test_unusable_file(run, tmp_path, name, contents, part):
    (tmp_path / name).write_bytes(contents)
    (tmp_path / "a.txt").write_bytes(LONG)
    assert_one_line(run(tmp_path / "a.txt", tmp_path / name, "--output", tmp_path / "out"), 1, tmp_path / name, part)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.txt", name])


def test_text_too_small(run, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a" * 2_998)
    finished = run(tmp_path / "text.txt", "--output", tmp_path / "new" / "out")
    assert_one_line(finished, 1, "makes 2,999 tokens, expected at least 3,000", "give more text")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("length", [5_000, 400_000])
def test_validation_larger_than_the_text(run, tmp_path, length):
    (tmp_path / "text.txt").write_bytes(b"a" * (length - 1))
    assert_one_line(run(tmp_path / "text.txt", "--output", tmp_path / "out", "--val-tokens", length), 2,
                    f"--val-tokens is {length:,}, expected fewer than the {length:,} tokens", "lower it")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out", "--val-tokens", length - 1).status == 0


@pytest.mark.parametrize("flags, parts", [
    (["none.txt"], ("cannot read none.txt: No such file",)),
    (["text.txt", "none/"], ("cannot read none/: No such file",)),
    (["empty"], ("empty is a folder without files",)),
    ([], ("FILE-OR-FOLDER",)),
    (["text.txt", "--val-tokens", 0], ("--val-tokens", "'0'", "of at least 1 and at most 1073741824")),
    (["text.txt", "--shard-tokens", 2**31], ("--shard-tokens", "'2147483648'", "at most 1073741824")),
    (["text.txt", "--threads", os.cpu_count() + 1], ("--threads", "at most")),
    (["text.txt", "--model", "out", "--train-tokenizer", 300], ("--model and --train-tokenizer name two tokenizers",)),
    (["-", "--train-tokenizer", 300], ("--train-tokenizer reads the text twice",)),
    (["text.txt", "--train-tokenizer", 256], ("--train-tokenizer", "at least 257")),
    (["text.txt", "--output", ""], ("--output is '', expected a name",)),
    (["text.txt", "--output", "new/"], ("--output is 'new/', expected a name",)),
], ids=str)
def test_mistake_on_the_command_line(run, tmp_path, monkeypatch, flags, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(LONG)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_bytes(LONG)
    assert_one_line(run("--output", "out", *flags), 2, *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.txt"]


def test_missing_file_is_reported_before_any_is_read(run, tmp_path, monkeypatch):
    def nothing(*arguments):
        raise AssertionError("a file was read")
    monkeypatch.setattr(TextReader, "read", nothing)
    (tmp_path / "text.txt").write_bytes(LONG)
    assert_one_line(run(tmp_path / "text.txt", tmp_path / "none.txt", "--output", tmp_path / "out"), 2, "none.txt")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a file that cannot be read")
def test_file_that_cannot_be_read(run, tmp_path):
    (tmp_path / "text.txt").write_bytes(LONG)
    (tmp_path / "text.txt").chmod(0)
    assert_one_line(run(tmp_path / "text.txt", "--output", tmp_path / "out"), 2, "text.txt", "Permission denied")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c(encoding, tmp_path):
    # If the tests run in the background, SIGINT is ignored, and a child process inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([sys.executable, str(PROGRAM), "-", "--output", tmp_path / "new" / "out", "--threads", "1"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        process.stdin.write(LONG * 8)
        process.stdin.flush()
        give_up = time.monotonic() + SECONDS
        while not list(tmp_path.glob("new/*.tmp/*")):
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.stdin.close()  # at a terminal, Ctrl-C also stops the program that writes to the pipe
        assert process.wait(SECONDS) == 130
        assert process.stderr.read() == b"interrupted\n" and process.stdout.read() == b""
    finally:
        process.kill()
    assert not (tmp_path / "new").exists()
