"""Texts from files of every kind: the same text for any block size, one text for one content, a one-line error per mistake."""
import bz2
import codecs
import gzip
import json
import lzma
import os
import random

import pytest

import text_files
from cli import UserError
from text_files import SEPARATOR, TextReader, as_text, clean, find_files, split_documents, total_size

TEXT = "Naïve 漢字\n\n🙂 <|endoftext"
DOCUMENTS = [f"Document {i}, naïve." for i in range(60)]


def read(path, contents, text_field=None, skip_bad=False):
    """The documents in a file of these contents, and the TextReader."""
    path.write_bytes(contents)
    reader = TextReader(text_field, skip_bad)
    text = "".join(reader.read(find_files([str(path)])))
    assert text.count(SEPARATOR) == reader.documents and text.startswith(SEPARATOR)
    return text.split(SEPARATOR)[1:], reader


# ---- plain text

@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_one_text_however_it_is_stored(tmp_path, monkeypatch, block):
    """Byte order mark and line ends, in blocks that cut characters, line ends and <|endoftext|> apart."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block)
    for mark in b"", codecs.BOM_UTF8:
        for line_end in "\n", "\r\n", "\r":
            contents = mark + TEXT.replace("\n", line_end).encode()
            assert read(tmp_path / "text.txt", contents)[0] == [TEXT]
            assert as_text("prompt", contents) == clean(contents.decode()) == TEXT


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("text, documents", [
    ("one", ["one"]),
    ("one\n<|endoftext|>\ntwo", ["one\n", "\ntwo"]),
    ("<|endoftext|>one<|endoftext|><|endoftext|>  <|endoftext|>two<|endoftext|>\n", ["one", "two"]),
    ("<<|endoftext|>|<|endoftext|", ["<", "|<|endoftext|"]),
    (" \n one <|endoftext|>", [" \n one "]),
])
def test_documents(size, text, documents):
    """One SEPARATOR before every document; one of white space only is left out."""
    parts = list(split_documents(text[start:start + size] for start in range(0, len(text), size)))
    assert "".join(parts) == "".join(SEPARATOR + document for document in documents)


def test_json_lines_in_a_plain_text_are_noted(tmp_path, caplog):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    read(tmp_path / "text.txt", lines.encode())
    assert "text.txt is read as plain text, but its lines are JSON objects" in caplog.text
    caplog.clear()
    read(tmp_path / "text.txt", (lines + "no JSON\n").encode())
    assert caplog.text == ""


# ---- JSON

def json_lines(values, end="\n"):
    return "".join(json.dumps(value) + end for value in values).encode()


RECORDS = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
JSON_FILES = {      # name, contents
    "lines": ("a.jsonl", json_lines(RECORDS)),
    "another ending": ("a.ndjson", json_lines(RECORDS)),
    "lines in a .json": ("a.json", json_lines(RECORDS)),
    "capitals": ("A.JSONL", json_lines(RECORDS)),
    "an array": ("a.json", json.dumps(RECORDS).encode()),
    "an array over lines": ("a.json", json.dumps(RECORDS, indent=2).encode()),
    "an array in a .jsonl": ("a.jsonl", json.dumps(RECORDS).encode()),
    "objects over lines": ("a.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode()),
    "an array of strings": ("a.json", json.dumps(DOCUMENTS).encode()),
    "blank lines and CRLF": ("a.jsonl", b"\r\n" + json_lines(RECORDS, "\r\n\n") + b"  \n"),
    "byte order mark": ("a.jsonl", codecs.BOM_UTF8 + json_lines(RECORDS)),
    "byte order mark and an array": ("a.json", codecs.BOM_UTF8 + json.dumps(RECORDS).encode()),
    "empty texts": ("a.jsonl", json_lines([{"text": ""}, *RECORDS, {"text": " \n"}])),
    "separators": ("a.jsonl", json_lines([{"text": "<|endoftext|>" + "<|endoftext|>".join(DOCUMENTS) + "<|endoftext|>"}])),
    "not a number": ("a.jsonl", json_lines([record | {"score": float("nan")} for record in RECORDS])),
    "gzip": ("a.jsonl.gz", gzip.compress(json_lines(RECORDS))),
    "gzip by its contents": ("a.jsonl", gzip.compress(json_lines(RECORDS))),
    "bzip2": ("a.json.BZ2", bz2.compress(json.dumps(RECORDS).encode())),
    "xz": ("a.ndjson.xz", lzma.compress(json_lines(RECORDS))),
    "an object a line in an array": ("a.json", b"[\n" + b",\n".join(json_lines([r]).strip() for r in RECORDS) + b"\n]\n"),
}


@pytest.mark.parametrize("block", [7, 2**18])
@pytest.mark.parametrize("name, contents", JSON_FILES.values(), ids=JSON_FILES)
def test_json(tmp_path, monkeypatch, name, contents, block):
    monkeypatch.setattr(text_files, "BLOCK_SIZE", block)
    assert read(tmp_path / name, contents)[0] == DOCUMENTS


def test_text_of_a_json_record(tmp_path):
    contents = b'{"body": "a\\r\\nb\\u0000 \\ud83d half \\ud83d\\ude42"}'
    assert read(tmp_path / "a.jsonl", contents, text_field="body")[0] == ["a\nb\0 \ufffd half 🙂"]


def test_a_bad_first_line_can_be_skipped(tmp_path):
    for bad in b'{"text": "cut', b'["id", "text"]', b"nonsense":
        documents, reader = read(tmp_path / "a.jsonl", bad + b"\n" + json_lines(RECORDS), skip_bad=True)
        assert documents == DOCUMENTS and len(reader.left_out["record"]) == 1


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    contents = zstandard.compress(json_lines(RECORDS))
    assert read(tmp_path / "a.jsonl.zst", contents + zstandard.compress(b'{"text": "more"}'))[0] == [*DOCUMENTS, "more"]
    for damaged in contents[:-20], contents[:30] + b"x" + contents[31:]:
        with pytest.raises(UserError, match="a.jsonl.zst is damaged"):
            read(tmp_path / "a.jsonl.zst", damaged)


def test_bad_records_can_be_skipped(tmp_path):
    bad = [b'{"text": null}', b'{"id": 1}', b'{"text": "cut', b"\xff", b"[" * 100_000, b'{"text": "\0"}',
           b'{"n": 1' + b"1" * 5000]
    lines = json_lines(RECORDS).splitlines()
    documents, reader = read(tmp_path / "a.jsonl", b"\n".join([*lines[:30], *bad, *lines[30:]]), skip_bad=True)
    assert documents == DOCUMENTS
    assert len(reader.left_out["record"]) == len(bad) and "a.jsonl line 31 is" in reader.left_out["record"][0]
    documents, reader = read(tmp_path / "a.json", json.dumps([*RECORDS, {"id": 1}, 7]).encode(), skip_bad=True)
    assert documents == DOCUMENTS and "record 61 is {'id': 1}" in reader.left_out["record"][0]
    assert len(list(reader.report())) == 1


# ---- errors: one line

LONG = "".join(f"{number} {'é' * (number % 7)}\n" for number in range(90_000)).encode()
UNUSABLE = {
    "empty": ("text.txt", b"", ("is empty",)),
    "blank": ("text.txt", b" \r\n\t\n", ("is empty",)),
    "latin-1": ("text.txt", b"caf\xe9 au lait", ("not UTF-8", "byte 0xe9 at offset 3;", "save it as UTF-8")),
    "latin-1 after a byte order mark": ("text.txt", b"\xef\xbb\xbfcaf\xe9 au lait", ("byte 0xe9 at offset 6;",)),
    "latin-1 in a later block": ("text.txt", LONG + b"\xe9 au lait", (f"byte 0xe9 at offset {len(LONG):,};",)),
    "UTF-16": ("text.txt", "text".encode("utf-16"), ("is UTF-16, expected UTF-8",)),
    "truncated": ("text.txt", LONG + "漢".encode()[:2], (f"byte 0xe6 at offset {len(LONG):,};",)),
    "binary": ("text.txt", b"\x7fELF\0\0", ("is binary", "byte 0x00 at offset 4;")),
    "half a gzip file": ("text.txt", gzip.compress(os.urandom(9999))[:2000], ("is damaged",)),
    "a damaged gzip file": ("text.gz", gzip.compress(b"abc" * 999)[:20] + b"x" * 50, ("is damaged",)),
    "half an xz file": ("text.xz", lzma.compress(os.urandom(9999))[:2000], ("is damaged",)),
    "not JSON": ("dump.jsonl", b'{"text": "one"}\n\n{"text": "two}\n',
                 ("line 3 cannot be read as JSON: Unterminated string starting at: column 10 ",
                  "mend it, or leave such records out with --skip-bad")),
    "half an array": ("dump.json", b'[{"text": "one"}, {"text": "tw', ("record 2 cannot be read as JSON",)),
    "a number": ("dump.jsonl", b"7\n", ("line 1 is 7, expected a JSON object",)),
    "nested JSON": ("dump.jsonl", b'{"a":' * 100_000, ("line 1 cannot be read as JSON",)),
    "5,000 digits": ("dump.jsonl", b'{"n": ' + b"1" * 5_000 + b"}", ("line 1 ",)),
    "other field": ("dump.jsonl", b'{"text": "one"}\n{"id": 1, "body": "two"}\n',
                    ("line 2 is {'body': 'two', 'id': 1}, expected", "a string in the field 'text'", "--text-field")),
    "not a string": ("dump.jsonl", b'{"text": null}', ("line 1 is {'text': None}, expected", "a string in the field 'text'")),
    "binary JSON": ("dump.jsonl", b'{"text": "one"}\n{"text": "\0"}', ("line 2 is binary",)),
    "empty JSON": ("dump.jsonl", b"\n \n", ("is empty", "expected JSON objects")),
}


@pytest.mark.parametrize("name, contents, parts", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_file(tmp_path, name, contents, parts):
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, contents)
    for part in (str(tmp_path / name), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_leaves_out_what_is_no_text(tmp_path):
    for name, contents in (("a.txt", b"one"), ("b.jpg", b"\xff\xd8"), ("c.txt", b""), ("d.txt", b"two"), ("e.bin", bytes(9))):
        (tmp_path / name).write_bytes(contents)
    reader = TextReader()
    assert list(reader.read(find_files([str(tmp_path)]))) == [SEPARATOR, "one", SEPARATOR, "two"]
    assert [reason.split("/")[-1][:5] for reason in reader.left_out["file"]] == ["b.jpg", "c.txt", "e.bin"]


@pytest.mark.parametrize("contents", [b'{"text": "one"}\n' + json.dumps([{"text": "word " * 30}]).encode(),
                                      b'[{"text": "' + b"word " * 60], ids=["line", "record"])
def test_one_long_record(tmp_path, monkeypatch, contents):
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 100)
    with pytest.raises(UserError, match="a line of more than 100 bytes|record 1 cannot be read"):
        read(tmp_path / "dump.jsonl", contents)


def test_long_array_is_read_in_parts(tmp_path, monkeypatch):
    """Not more than a record and a block are in memory, and a record is not parsed from its beginning for every block."""
    monkeypatch.setattr(text_files, "BLOCK_SIZE", 16)
    words = random.Random(0)
    texts = ["".join(words.choices("ab {}[],\"\\", k=words.randrange(1, 2000))) + "." for _ in range(30)]
    assert read(tmp_path / "a.json", json.dumps([{"text": text} for text in texts]).encode())[0] == texts


def test_total_size(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"text")
    path = str(tmp_path / "text.txt")
    assert total_size([(path, False), (path, True)]) == 12     # those of a folder are read twice
    for unknown in "-", os.devnull:
        assert total_size([(path, False), (unknown, False)]) is None
