"""Texts from files of every kind: plain text, JSON Lines, a JSON array, compressed or not. One reader for all programs.

What a file is, is told by what is in it; the ending of its name only tells JSON from plain text. All texts are UTF-8. A byte
order mark is removed, and every line end becomes "\\n", so that one text is one sequence of tokens, wherever it comes from.
"""
import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from cli import UserError, note
from files import open_file
from tokenizer import SEPARATOR, partial_separator

READABLE_HINT = "name files that can be read, or a folder of them"
STANDARD_INPUT = "-"
BLOCK_SIZE = 2**18               # bytes read at a time
MAX_RECORD_BYTES = 2**26         # a longer line in a .jsonl file means that the file has another format
MAX_NAMED = 5                    # files or records that are named of those left out
JSON_ENDINGS = ".jsonl", ".ndjson", ".json"
COMPRESSED_ENDINGS = ".gz", ".bz2", ".xz", ".zst"
ZSTANDARD = b"\x28\xb5\x2f\xfd"
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
DAMAGED = EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile   # what decompression raises, besides OSError
BETWEEN_VALUES = re.compile(r"[\s,]*\]?\s*")
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxdict = 8           # fields shown if the one with the text is missing


def as_text(name: str, contents: bytes) -> str:
    """The text in `contents`. Raises UserError, which calls it `name`, if it is not UTF-8."""
    return "".join(decode(name, [contents]))


def clean(text: str) -> str:
    """A text without a byte order mark and with "\\n" at the end of every line."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def decode(name: str, chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode a file that arrives in chunks, and `clean` it. Raises UserError, which calls it `name`, if it is not text."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    offset = 0
    for chunk in itertools.chain(chunks, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)       # keeps an incomplete character for the next chunk
        except UnicodeDecodeError as error:
            place = offset + len(chunk) - len(error.object) + error.start
            if place == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{name} is UTF-16, expected UTF-8; convert it to UTF-8") from error
            raise UserError(f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place:,}; save it as "
                            "UTF-8, or leave it out if it is not text") from error
        if "\0" in text:
            raise UserError(f"{name} is binary, not text: byte 0x00 at offset {offset + chunk.index(0):,}; leave it out")
        yield text
        offset += len(chunk)


def split_documents(blocks: Iterable[str]) -> Iterator[str]:
    """Split a text that arrives in blocks at every <|endoftext|>: yield SEPARATOR before each document, then the document.

    A document may be yielded in several blocks. One of white space only is left out.
    """
    begun, waiting, rest = False, "", ""
    for block in itertools.chain(blocks, [None]):
        text = rest + (block or "")
        rest = text[len(text) - partial_separator(text):] if block is not None else ""
        first, *others = text[:len(text) - len(rest)].split(SEPARATOR)
        for i, part in enumerate([first, *others]):
            if i > 0:
                begun, waiting = False, ""
            if begun and part:
                yield part
            elif part and not part.isspace():
                begun = True
                yield SEPARATOR
                yield waiting + part
            else:
                waiting += part     # it belongs to the document if anything else follows


class TextReader:
    """Reads texts from files, and counts what it reads and leaves out.

    text_field: the field of a JSON record that holds its text; None: "text"
    skip_bad: whether to leave out JSON records that cannot be read
    progress: called with the numbers of bytes read from files

    Raises UserError for a file that is not what its name says, or cannot be read.
    """

    def __init__(self, text_field: str | None = None, skip_bad: bool = False, progress=lambda count: None):
        self.text_field, self.skip_bad, self.progress = text_field, skip_bad, progress
        self.num_bytes = self.documents = 0
        self.left_out: dict[str, list] = {"file": [], "record": []}     # why; each reason names its place

    def read(self, files: list[tuple[str, bool]]) -> Iterator[str]:
        """Yield SEPARATOR before every document of the files, and each document in blocks of a few hundred thousand characters.

        files: (path, whether it is to be left out if it is no text), see find_files
        """
        for path, optional in files:
            try:
                if optional and not (self.skip_bad and self.is_json(path)):
                    self.check_text(path)
                for text in self.read_file(path):
                    self.documents += text == SEPARATOR
                    yield text
            except NotText as error:
                if not optional:
                    raise
                self.leave_out("file", error)

    def check_text(self, path):
        """Raise NotText for a file that is empty or no text, before any of it is used."""
        try:
            with self.open(path, path) as file:
                is_blank = [not text.strip() for text in decode(path, blocks_of(file))]     # all of them are decoded
            if all(is_blank):
                raise NotText(f"{path} is empty")
        except UserError as error:
            raise NotText(str(error)) from error

    def read_file(self, path):
        name = "standard input" if path == STANDARD_INPUT else path
        with self.open(path, name) as file:
            if self.is_json(path):
                for record in self.read_records(name, file):
                    yield from split_documents([record])
            else:
                yield from self.read_plain(name, file)

    def is_json(self, path):
        """Whether to read a file as JSON: by the ending of its name. Standard input has none: by --text-field."""
        if path == STANDARD_INPUT:
            return self.text_field is not None
        return without_compression(path).endswith(JSON_ENDINGS)

    @contextlib.contextmanager
    def open(self, path, name):
        """Open a file, through its compression, as a buffered binary file."""
        try:
            with contextlib.nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else open_file(
                    path, READABLE_HINT, stream=True, status=2) as file:
                file = io.BufferedReader(CountedFile(file, self.progress))
                opening = file.peek(8)
                opener = next((opener for magic, opener in OPENERS.items() if opening.startswith(magic)), None)
                yield opener(file) if opener else open_zstandard(file, name) if opening.startswith(ZSTANDARD) else file
        except DAMAGED as error:
            raise UserError(f"{name} is damaged: {error or 'its end is missing'}; compress or download it again") from error
        except OSError as error:
            raise cannot_read(name, error) from error

    def read_plain(self, name, file):
        blocks = decode(name, self.counted(blocks_of(file)))
        first = next(blocks)
        lines = list(filter(str.strip, first.split("\n")[:-1]))
        if lines and all(map(is_json_object, lines)):
            note(f"{name} is read as plain text, but its lines are JSON objects; if it is JSON Lines, name it .jsonl")
        documents = 0
        for text in split_documents(itertools.chain([first], blocks)):
            documents += text == SEPARATOR
            yield text
        if documents == 0:
            raise NotText(f"{name} is empty, expected some text; leave it out")

    def read_records(self, name, file):
        """Yield the texts of JSON records."""
        for place, parse in self.records(name, file):
            try:
                text = self.text_of(place, parse())
            except UserError as error:
                if not self.skip_bad:
                    raise UserError(f"{error}, or leave such records out with --skip-bad") from error
                self.leave_out("record", error)
            else:
                yield text

    def records(self, name: str, file: io.BufferedReader) -> Iterator[tuple[str, Callable]]:
        """Yield (place, function that parses it) of each JSON record in a file: one a line, or the elements of an array.

        The function raises UserError. So does this one, if a record of several lines has no end, or there is none.
        """
        opening = file.peek(BLOCK_SIZE).removeprefix(codecs.BOM_UTF8).lstrip()[:BLOCK_SIZE]
        first_line, *more = list(filter(bytes.strip, opening.split(b"\n"))) or [b""]
        if opening.startswith(b"["):
            is_lines = bool(more) and is_json(first_line)
        else:       # a single line, or one among several is JSON on its own; the last may be cut off
            is_lines = not more or any(map(is_json, [first_line, *more[:-1]]))
        records = 0
        for record in self.read_lines(name, file) if is_lines else self.read_values(name, file):
            records += 1
            yield record
        if records == 0:
            raise NotText(f"{name} is empty, expected JSON objects; leave it out")

    def read_lines(self, name, file):
        lines = self.counted(iter(partial(file.readline, MAX_RECORD_BYTES + 1), b""))
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_RECORD_BYTES:
                raise UserError(f"{name} has a line of more than {MAX_RECORD_BYTES:,} bytes, expected one JSON object on every "
                                "line")
            place = f"{name} line {number:,}"
            if line.strip().removeprefix(codecs.BOM_UTF8):
                yield place, partial(parse_json_line, place, line)

    def read_values(self, name, file):
        """The records of a file that is an array, or holds objects over several lines."""
        decoder, text, number, enough, error = json.JSONDecoder(), "", 0, 0, None
        for block in itertools.chain(decode(name, self.counted(blocks_of(file))), [None]):
            text += block or ""
            if block is not None and len(text) < enough:     # not too often: each time begins at the same value
                continue
            position = text.index("[") + 1 if number == 0 and text.lstrip().startswith("[") else 0
            while (begin := BETWEEN_VALUES.match(text, position).end()) < len(text):
                try:
                    value, position = decoder.raw_decode(text, begin)
                except (ValueError, RecursionError) as problem:     # the end may be missing as yet
                    error = problem
                    break
                number += 1
                yield f"{name} record {number:,}", partial(lambda value: value, value)
            text = text[max(position, begin):]
            enough = 2 * len(text)
            if text and (block is None or len(text) > MAX_RECORD_BYTES):
                raise UserError(f"{name} record {number + 1:,} cannot be read as JSON: {error}; mend it")

    def text_of(self, place, value):
        """The text of a JSON value: of a field of an object, or the value itself if it is a string."""
        field = self.text_field or "text"
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f"{place} is {SHORT_REPR.repr(value)}, expected a JSON object with a string in the field "
                            f"{field!r}; name the field that holds the text with --text-field")
        # Half a surrogate pair, which JSON allows, becomes U+FFFD.
        return clean(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def leave_out(self, kind, error):
        self.left_out[kind].append(str(error).split("; ")[0])      # without what to do about it

    def counted(self, chunks):
        for chunk in chunks:
            self.num_bytes += len(chunk)
            yield chunk

    def report(self) -> Iterator[str]:
        """Lines that say what was left out."""
        for kind, reasons in self.left_out.items():
            if reasons:
                more = f"; and {len(reasons) - MAX_NAMED:,} more" if len(reasons) > MAX_NAMED else ""
                named = "; ".join(reasons[:MAX_NAMED])
                yield f"note: left out {len(reasons):,} {kind}{'s' * (len(reasons) > 1)}: {named}{more}"


class NotText(UserError):
    """A file is empty, or no text. In a folder, it is left out."""


class CountedFile(io.RawIOBase):
    """A file that tells `progress` how many bytes are read from it."""

    def __init__(self, file, progress):
        self.file, self.progress = file, progress

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto1(buffer)
        self.progress(count)
        return count


def blocks_of(file):
    return iter(partial(file.read, BLOCK_SIZE), b"")


def open_zstandard(file, name):
    """A file that decompresses another. Python has the library from 3.14 on; before that it is the package zstandard."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
            return zstd.open(file)
        return io.BufferedReader(ZstandardFile(file))
    except ImportError as error:
        raise UserError(f"{name} is compressed by Zstandard; to read it, pip install zstandard, or decompress it") from error


class ZstandardFile(io.RawIOBase):
    """A file that the package zstandard decompresses. Raises EOFError if it is damaged or its end is missing."""

    def __init__(self, file):
        import zstandard
        self.file, self.zstandard = file, zstandard
        self.frame, self.waiting, self.started = None, b"", False

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.waiting:
            rest = b""
            if self.frame is None or self.frame.eof:
                rest = self.frame.unused_data if self.frame else b""
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            chunk = rest or self.file.read(BLOCK_SIZE)
            if not chunk:
                if self.started:
                    raise EOFError("its end is missing")
                return 0
            try:
                self.waiting = self.frame.decompress(chunk)
            except self.zstandard.ZstdError as error:
                raise EOFError(error) from error
            self.started = not self.frame.eof
        size = min(len(buffer), len(self.waiting))
        buffer[:size], self.waiting = self.waiting[:size], self.waiting[size:]
        return size


def without_compression(path):
    """The name of a file in lower case, without the ending of its compression."""
    name = path.lower()
    return name[:name.rindex(".")] if name.endswith(COMPRESSED_ENDINGS) else name


def is_json(line):
    """Whether a line is a JSON object or array."""
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def is_json_object(line):
    return line.lstrip().startswith("{") and is_json(line)


def parse_json_line(place, line):
    try:
        return json.loads("".join(decode(place, [line])).strip())
    except (ValueError, RecursionError) as error:   # also for too many digits or brackets
        reason = str(error).replace(": line 1", ":")
        raise UserError(f"{place} cannot be read as JSON: {reason}; mend it") from error


def find_files(inputs: list[str]) -> list[tuple[str, bool]]:
    """The files to read, in order, each with whether it was found in a folder. Every folder is replaced by the files in it.

    Skips hidden files and folders, and links to folders. Raises UserError for a folder that cannot be read or has no files.
    """
    files = []
    for name in inputs:
        if not os.path.isdir(name):
            files.append((name, False))
            continue
        found = []
        for folder, subfolders, names in os.walk(name, onerror=partial(raise_cannot_read, name)):
            subfolders[:] = sorted(subfolder for subfolder in subfolders if not subfolder.startswith("."))
            found += [os.path.join(folder, file) for file in sorted(names) if not file.startswith(".")]
        for path in found:
            if os.path.exists(path) and not os.path.isfile(path):   # a pipe is welcome only if it is named
                raise UserError(f"{path} is a pipe or a device, expected texts in {name}; move it away", status=2)
        if not found:
            raise UserError(f"{name} is a folder without files, expected texts in it; name another", status=2)
        files += [(path, True) for path in found]
    return files


def total_size(files: list[tuple[str, bool]]) -> int | None:
    """The number of bytes that are read from `files`, or None if one of them is standard input or a pipe.

    Raises UserError for a file that does not exist.
    """
    files = [(path, optional) for path, optional in files if not optional or os.path.exists(path)]      # dangling links
    try:
        sizes = [0 if path == STANDARD_INPUT else (1 + optional) * os.stat(path).st_size for path, optional in files]
    except OSError as error:
        raise cannot_read(error.filename, error) from error
    return sum(sizes) if all(size or optional for size, (_, optional) in zip(sizes, files)) else None


def cannot_read(name, error):
    return UserError(f"cannot read {error.filename or name}: {error.strerror or error}; {READABLE_HINT}", status=2)


def raise_cannot_read(name, error):
    raise cannot_read(name, error) from error
