"""Your own texts: the same tokens for any block size and number of threads, atomic writes, a one-line error per mistake."""
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_text
import tokenizer
from cli import progress_bar
from dataloader import DataLoader
from prepare_text import ReadCounter, batches, divide, encode, pieces, read_texts, total_size

PROGRAM = Path(prepare_text.__file__)
END = tokenizer.END_OF_TEXT
SECONDS = 60  # time limit for a process


class ByteEncoding:
    """One token per byte, so that most tests need no vocabulary."""

    def encode_to_numpy(self, text, disallowed_special):
        assert disallowed_special == ()
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)


@pytest.fixture
def byte_encoding(monkeypatch):
    monkeypatch.setattr(prepare_text, "gpt2_encoding", ByteEncoding)


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
    """The documents (bytes) encoded by ByteEncoding."""
    return [token for document in documents for token in [END, *document]]


def make_counter():
    return ReadCounter(progress_bar("encoding", None, "B"))


def texts_of(*paths):
    return list(read_texts(list(map(str, paths)), "text", make_counter()))


def joined(texts):
    """Texts in one string, with | for END_OF_TEXT."""
    return "".join("|" if text == END else text for text in texts)


def in_blocks(text, size):
    return (text[start:start + size] for start in range(0, len(text), size))


def some_text(length, seed=0):
    """Words in lines, as bytes."""
    words = random.Random(seed)
    return "".join(f"{words.randrange(10**6)}{words.choice(' ,é漢')}{words.choice(' ' * 9 + chr(10))}"
                   for _ in range(length // 7)).encode()


# ---- pieces encode to the same tokens as the whole text

CHARACTERS = "as'1.\u00a0 \n\x1c"  # one of each kind; "'s" is a contraction, only Python treats \x1c as white space


def test_pieces_of_all_short_texts(encoding):
    """All texts of five of these characters, given one by one, so that they are cut wherever possible."""
    cuts = 0
    for characters in itertools.product(CHARACTERS, repeat=5):
        text = "".join(characters)
        parts = list(pieces(characters))
        assert "".join(parts) == text
        assert [token for part in parts for token in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text), parts
        cuts += len(parts) - 1
    assert cuts == 4 * 5 * 2 * 9**3  # at each of 4 places, 5 visible characters before 2 kinds of white space


def test_pieces_of_long_texts(encoding):
    draw = random.Random(1)
    parts = ["the ", "  ", "\n\n", "\t", "'s", " it'll", "1984", " naïve", "漢字", "\u3000", "🙂", "e\u0301", "...", "\r.",
             "\x85"]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=100))
        cut = list(pieces(in_blocks(text, draw.randrange(1, 50))))
        assert len(cut) > 5
        assert [token for part in cut for token in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["a" * 100, " " * 100, "漢" * 100, "a b" + "c" * 100, " \n" * 50, "<" + "a" * 100], ids=repr)
def test_text_without_a_place_to_cut(monkeypatch, text):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 16)
    parts = list(pieces(in_blocks(text, 16)))
    assert "".join(parts) == text
    assert len(parts) >= 4 and max(map(len, parts)) <= 32


def test_no_cut_inside_a_separator_or_line_end(tmp_path, monkeypatch):
    """Without a place to cut, <|endoftext|> and "\\r\\n" still stay whole, and text that only begins like them is unchanged."""
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 16)
    path = tmp_path / "text.txt"
    for before in range(40):
        path.write_text("a" * before + "<|endoftext|>" * 3 + "<|endoftext|", newline="")
        assert joined(texts_of(path)) == "|" + "a" * before + "|||<|endoftext|"
        path.write_text("\n" * before + "\r\n" * 40 + "\r.", newline="")
        assert joined(texts_of(path)) == "|" + "\n" * before + "\n" * 40 + "\r."
        path.write_text("<" * before + "<|endoftext" * 4 + "|" * before, newline="")
        assert joined(texts_of(path)) == "|" + "<" * before + "<|endoftext" * 4 + "|" * before


def test_more_spaces_than_tiktoken_can_encode(encoding, tmp_path):
    text = "a" + " " * 1_200_000 + "b"
    (tmp_path / "text.txt").write_text(text)
    tokens = np.concatenate(list(encode(iter(texts_of(tmp_path / "text.txt")), 1)))
    assert tokens[0] == END and encoding.decode(tokens[1:].tolist()) == text


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tokens_of_a_file(encoding, tmp_path, monkeypatch, threads):
    text = some_text(30_000).decode()
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 256)
    tokens = np.concatenate(list(encode(iter(texts_of(tmp_path / "text.txt")), threads)))
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [END, *encoding.encode_ordinary(text)]


def test_texts_are_read_only_as_needed(byte_encoding, monkeypatch):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 10)
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield "ten bytes."
    tokens = encode(endless(), threads=2)
    for count in range(1, 4):
        assert next(tokens).tolist() == list(b"ten bytes.")
        assert len(read) == 4 + count
    tokens.close()


def test_short_documents_are_encoded_together(monkeypatch):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 10)
    texts = [END, "one", END, "two", END, "three", END, "a longer one", "", END, "four"]
    assert list(batches(texts)) == [texts[:6], texts[6:8], texts[8:]]


# ---- reading

@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_characters_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", block)
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffNaïve 漢字\n🙂\ufeff\r".encode())
    assert "".join(texts_of(path)[1:]) == "Naïve 漢字\n🙂\ufeff\r"


def test_windows_line_ends_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 8)
    path = tmp_path / "text.txt"
    for length in range(20):
        path.write_bytes(b"x" * length + b" one\r\n\r\ntwo\r\n three")
        assert "".join(texts_of(path)[1:]) == "x" * length + " one\n\ntwo\n three"


@pytest.mark.parametrize("text, documents", [
    ("one", ["one"]),
    ("one\n<|endoftext|>\ntwo", ["one\n", "\ntwo"]),
    ("<|endoftext|>one<|endoftext|><|endoftext|>two<|endoftext|>", ["", "one", "", "two", ""]),
])
def test_end_of_text_separates_documents(tmp_path, text, documents):
    path = tmp_path / "text.txt"
    path.write_text(text, newline="\n")
    counter = make_counter()
    assert joined(read_texts([str(path)], "text", counter)) == "".join("|" + document for document in documents)
    assert counter.documents == len(documents) and counter.num_bytes == len(text)


def test_json_lines(tmp_path):
    path = tmp_path / "dump.jsonl"
    lines = [json.dumps({"id": 7, "text": "Naïve 漢字\r\n\u2028🙂"}), "", '{"text": ""}', "  ",
             json.dumps({"text": "a\x00 <|endoftext|>"}, ensure_ascii=False)]
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert texts_of(path) == [END, "Naïve 漢字", "\n\u2028🙂", END, END, "a\x00", " <|endoftext|>"]
    path.write_text('{"body": "one"}\n')
    assert list(read_texts([str(path)], "body", make_counter())) == [END, "one"]


def test_long_text_in_a_json_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 100)
    text = some_text(5_000).decode()
    path = tmp_path / "dump.jsonl"
    path.write_text(json.dumps({"text": text}))
    first, *parts = texts_of(path)
    assert first == END and "".join(parts) == text and max(map(len, parts)) <= 200


def test_end_of_text_in_json_is_ordinary_text(run, tmp_path):
    path = tmp_path / "dump.jsonl"
    path.write_text(json.dumps({"text": "<|endoftext|>" * 300}))
    assert run(path, "--output", tmp_path / "out").status == 0
    assert read_all(tmp_path / "out").tolist() == tokens_of(b"<|endoftext|>" * 300)


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
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(contents), encoding="ascii"))
    assert run("-", "--output", tmp_path / "out").status == 0
    assert read_all(tmp_path / "out").tolist() == tokens_of(contents)


# ---- writing

@pytest.mark.parametrize("length, num_validation", [(3_000, 300), (327_679, 32_767), (327_680, 32_768), (400_000, 32_768)])
def test_validation_is_the_beginning(run, tmp_path, monkeypatch, length, num_validation):
    monkeypatch.setattr(prepare_text, "BLOCK_SIZE", 1_000)
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
    folder = tmp_path / "a folder [1]"
    (tmp_path / "text.txt").write_bytes(contents := some_text(20_000))
    finished = run(tmp_path / "text.txt", "--output", folder / "my books", "--shard-tokens", 5_000, "--val-tokens", 1_000)
    assert finished.status == 0 and finished.err == ""
    command = finished.out.splitlines()[-1]
    program, *patterns = re.fullmatch('python (.*) --input-bin "(.*)" --input-val-bin "(.*)"', command).groups()
    assert program == str(PROGRAM.with_name("train_gpt2.py"))
    train, val = (DataLoader(pattern, 1, 64, 50257) for pattern in patterns)
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
            DataLoader(tmp_path / "out_val.bin", 1, 64, 50257)      # finishes what was stopped
        else:
            states.append("old" if read_all(tmp_path / "out").tolist() == tokens_of(old) else "new")
        if states[-1] != "old":
            assert read_all(tmp_path / "out").tolist() == tokens_of(new)
    assert read_all(tmp_path / "out").tolist() == tokens_of(new)
    assert list(dict.fromkeys(states)) == ["old", "incomplete", "new"]


def test_full_disk(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(some_text(20_000))

    def full(path, runs):
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


def test_total_size(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"text")
    path = str(tmp_path / "text.txt")
    assert total_size([path, path]) == 8
    for unknown in "-", os.devnull:
        assert total_size([path, unknown]) is None


def test_error_begins_on_a_line_of_its_own(run, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "text.txt").write_bytes(b"a" * 10_000 + b"\xff")
    assert run(tmp_path / "text.txt", "--output", tmp_path / "out").status == 1
    assert "\nprepare_text.py: error: " in terminal.getvalue()


# ---- user errors: one line, no traceback, nothing written

def assert_one_line(finished, status, *parts):
    assert finished.status == status, finished
    assert finished.err.startswith("prepare_text.py: error: ")
    assert finished.err.find("\n") == len(finished.err) - 1, finished.err
    for part in parts:
        assert str(part) in finished.err, (finished.err, part)


LONG = some_text(600_000)
UNUSABLE = {
    "empty": ("text.txt", b"", ("is empty",)),
    "blank": ("text.txt", b" \r\n\t\n", ("is empty",)),
    "latin-1": ("text.txt", b"caf\xe9 au lait", ("not UTF-8", "byte 0xe9 at offset 3;", "save it as UTF-8")),
    "latin-1 after a byte order mark": ("text.txt", b"\xef\xbb\xbfcaf\xe9 au lait", ("byte 0xe9 at offset 6;",)),
    "latin-1 in a later block": ("text.txt", LONG + b"\xe9 au lait", (f"byte 0xe9 at offset {len(LONG):,};",)),
    "truncated": ("text.txt", LONG + "漢".encode()[:2], (f"byte 0xe6 at offset {len(LONG):,};",)),
    "binary": ("text.txt", b"\x7fELF\0\0", ("is binary", "byte 0x00 at offset 4;")),
    "not JSON": ("dump.jsonl", b'{"text": "one"}\n\n{"text": "two}\n',
                 ("line 3 cannot be read as JSON: Unterminated string starting at: column 10 ",)),
    "JSON array": ("dump.jsonl", b'["one\\n",\t"two"]\n', ("line 1 is ['one\\n', 'two'], expected a JSON object",)),
    "JSON string": ("dump.jsonl", b'"' + b"x" * 1000 + b'"',
                    ("line 1 is 'xxxxxxxxxxxx...xxxxxxxxxxxxx', expected a JSON object",)),
    "nested JSON": ("dump.jsonl", b"[" * 100_000, ("line 1 cannot be read as JSON",)),
    "5,000 digits": ("dump.jsonl", b'{"n": ' + b"1" * 5_000 + b"}", ("line 1 ",)),
    "other field": ("dump.jsonl", b'{"text": "one"}\n{"id": 1, "body": "two"}\n',
                    ("line 2 is {'body': 'two', 'id': 1}, expected", "a string in the field 'text'", "--text-field")),
    "not a string": ("dump.jsonl", b'{"text": null}', ("line 1 is {'text': None}, expected", "a string in the field 'text'")),
    "half a surrogate pair": ("dump.jsonl", b'{"text": "\\ud83d"}', ("line 1 cannot be read", "'\\ud83d' in position 0")),
    "binary JSON": ("dump.jsonl", b'{"text": "one"}\n{"text": "\0"}', ("is binary", "byte 0x00 at offset 26;")),
    "empty JSON": ("dump.jsonl", b"\n \n", ("is empty", "JSON object on every line")),
}


@pytest.mark.parametrize("name, contents, parts", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_file(run, tmp_path, name, contents, parts):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(LONG)
    (tmp_path / "in" / name).write_bytes(contents)
    (tmp_path / "in" / "zzz.txt").write_bytes(LONG)
    finished = run(tmp_path / "in", "--output", tmp_path / "out")
    assert_one_line(finished, 1, tmp_path / "in" / name, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_json_on_one_long_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "MAX_LINE_BYTES", 100)
    (tmp_path / "dump.jsonl").write_text('{"text": "one"}\n' + json.dumps([{"text": "word " * 10}] * 10))
    assert_one_line(run(tmp_path / "dump.jsonl", "--output", tmp_path / "out"), 1,
                    "dump.jsonl has a line of more than 100 bytes")


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
    monkeypatch.setattr(prepare_text, "read_texts", nothing)
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
