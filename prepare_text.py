"""Turn texts of your own into the token files that training reads.

    python prepare_text.py book.txt --output data/book
    python prepare_text.py books/ more.txt dump.jsonl --output data/books
    zcat dump.txt.gz | python prepare_text.py - --output data/dump

The first writes data/book_val.bin and data/book_train_000000.bin, _000001.bin and so on for a large text, and prints the
command that trains on them. A document is a file, a line of a .jsonl file (its field "text"), or what stands between two
<|endoftext|> in a text; each begins with the token of that name. Without these tokens the files decode to the texts as they
were, save for a byte order mark, which goes, and Windows' line ends, which become "\\n".
"""
import codecs
import contextlib
import copy
import glob
import itertools
import json
import math
import os
import re
import reprlib
import shutil
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from dataloader import write_runs
from cli import OneLineParser, ProgressBar, UserError, bounded, run_program
from files import cannot_write, temporary_folder
from tokenizer import END_OF_TEXT, gpt2_encoding

OUT_OF_MEMORY_HINT = "choose fewer --threads"

VALIDATION_TOKENS = 32_768
SMALLEST_TEXT = 3_000            # tokens; a tenth of them, for validation, is just more than a batch of 4 x 64
SMALL_TEXT = 100_000             # tokens; fewer call for a word of advice
SHARD_TOKENS = 100_000_000       # llm.c's
MOST_SHARD_TOKENS = 2**30        # a token file counts its tokens in an int32
SMALLEST_SHARD = 2**20           # tokens; training has no use for a shard shorter than its step

BLOCK = 2**18                    # bytes read at a time, and characters, more or less, that a thread encodes at a time
LINE_BYTES = 2**26               # of a .jsonl file; a longer line is no line but a file of another sort
STANDARD_INPUT = "-"
SEPARATOR = "<|endoftext|>"

LAST_CUT = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)  # all of a text up to the last place where `pieces` may cut it
UNFINISHED = re.compile(r"(\r|<[|a-z]*)?\Z")            # the end of a text that may be the beginning of "\r\n" or SEPARATOR
SHORT = reprlib.Repr()
SHORT.maxdict = 8               # fields shown of a line that lacks the right one


def main():
    parser = OneLineParser(description="Write token files for training from texts of your own.")
    parser.add_argument("inputs", nargs="+", metavar="FILE-OR-FOLDER",
                        help="a UTF-8 text, one document; a .jsonl file, where every line is one; a folder, all of whose files "
                             "are read in the order of their names, hidden ones excepted; or - for a text on standard input. "
                             "<|endoftext|> in a text begins another document")
    parser.add_argument("--output", required=True, metavar="NAME",
                        help="such as data/books: data/books_train_000000.bin, ... and data/books_val.bin are made or replaced")
    parser.add_flag("--text-field", default="text", metavar="FIELD", help="where a line of a .jsonl file has its text")
    positive = bounded(int, 1, MOST_SHARD_TOKENS)
    parser.add_flag("--val-tokens", type=positive, metavar="N", help="tokens for validation, the first of all; the others are for "
                    f"training (default: {VALIDATION_TOKENS}, or a tenth of a small text)")
    parser.add_flag("--shard-tokens", default=SHARD_TOKENS, type=positive, metavar="N",
                    help="tokens in a training file; the last one may have a tenth more")
    parser.add_flag("--threads", default=os.cpu_count(), type=bounded(int, 1, os.cpu_count()), metavar="N", help="CPU threads")
    options = parser.parse_args()
    if os.path.basename(options.output) in ("", ".", ".."):
        parser.error(f"--output is {options.output!r}, expected a name for the files, such as data/books")
    prepare(options)


def prepare(options):
    """Write the token files that the flags `options` ask for; print what was written and how to train on it."""
    name = options.output
    train_paths = (Path(f"{name}_train_{i:06}.bin") for i in itertools.count())
    val_path = Path(f"{name}_val.bin")
    files = find_files(options.inputs)
    with Reading("encoding", total_size(files)) as reading:
        texts = read_texts(files, options.text_field, reading)
        sizes = write_token_files(encode(texts, options.threads), train_paths, val_path, options.val_tokens,
                                  options.shard_tokens, earlier_shards(name))
    print_written(sizes)
    num_tokens = sum(sizes.values())
    print(f"{reading.documents:,} document{'s' * (reading.documents != 1)}, {num_tokens:,} tokens; {reading.summary()}")
    if num_tokens < SMALL_TEXT:
        print(f"a word of advice: {num_tokens:,} tokens are few, and a new model will soon know them by heart; give it "
              f"{SMALL_TEXT:,} or more, or go on from a trained model (--model)")
    print("to train on it:")
    print(f'python {Path(sys.argv[0]).with_name("train_gpt2.py")} --input-bin "{glob.escape(name)}_train_*.bin" '
          f'--input-val-bin "{val_path}"')


class Reading(ProgressBar):
    """How many bytes have been read, and how many documents."""
    documents = 0

    def summary(self):
        seconds = time.perf_counter() - self.started
        return f"{self.done / 1e6:,.2f} MB in {seconds:,.1f} s, {self.done / 1e6 / seconds:.1f} MB/s"


# ----------------------------------------------------------------------------------------------------------------------
# Reading: a stream of texts, with END_OF_TEXT before each that begins a document

def find_files(inputs):
    """Return the files to read, in order: each folder in `inputs` is replaced by the files in it, "-" stays as it is.

    Hidden files and folders are left out, and links to folders. Raises UserError for a folder that cannot be read or is empty.
    """
    files = []
    for name in inputs:
        if not os.path.isdir(name):
            files.append(name)
            continue
        before = len(files)
        for folder, subfolders, names in os.walk(name, onerror=partial(cannot_read, name)):
            subfolders[:] = sorted(subfolder for subfolder in subfolders if not subfolder.startswith("."))
            files += [os.path.join(folder, file) for file in sorted(names) if not file.startswith(".")]
        if len(files) == before:
            raise UserError(f"{name} is a folder without files, expected texts in it; name another", status=2)
    return files


def cannot_read(name, error):
    raise UserError(f"cannot read {error.filename or name}: {error.strerror}; name files that can be read, or a folder of them",
                    status=2) from error


def total_size(files):
    """Return the bytes in all `files` together, or math.inf if there is standard input or a pipe among them.

    Raises UserError for a file that is not there.
    """
    try:
        return sum(path != STANDARD_INPUT and os.stat(path).st_size or math.inf for path in files)   # of a pipe it is 0
    except OSError as error:
        cannot_read(error.filename, error)


def read_texts(files, text_field, reading):
    """Yield what is in all `files` as strings of up to twice BLOCK characters, with END_OF_TEXT before every document.

    Each string encodes to the same tokens as within its document. Raises UserError for what is no text, or not JSON.
    """
    for path in files:
        name = "standard input" if path == STANDARD_INPUT else path
        try:
            with contextlib.nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else open(path, "rb") as file:
                if path.endswith(".jsonl"):
                    texts = read_json_lines(name, file, text_field, reading)
                else:
                    texts = read_plain_text(name, file, reading)
                for text in texts:
                    reading.documents += text == END_OF_TEXT
                    yield text
        except OSError as error:
            cannot_read(name, error)


def read_plain_text(name, file, reading):
    empty = True
    yield END_OF_TEXT
    for piece in pieces(decode(name, iter(partial(file.read, BLOCK), b""), reading)):
        empty = empty and piece.isspace()
        yield from split_documents(piece)
    if empty:
        raise UserError(f"{name} is empty, expected some text; leave it out")


def split_documents(text):
    """Yield what stands between each two <|endoftext|> of `text`, and END_OF_TEXT in place of them."""
    first, *others = text.split(SEPARATOR)
    yield first
    for document in others:
        yield END_OF_TEXT
        yield document


def decode(name, chunks, reading):
    """Yield the text of each of `chunks` of a file's bytes, without a byte order mark. Raises UserError if they are no text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    for chunk in itertools.chain(chunks, [b""]):
        if len(chunk) > LINE_BYTES:     # a block is shorter
            raise UserError(f"{name} has a line of more than {LINE_BYTES:,} bytes, expected one JSON object on every line")
        try:
            text = decoder.decode(chunk, final=not chunk)       # till then an incomplete character waits
        except UnicodeDecodeError as error:
            place = offset + len(chunk) - len(error.object) + error.start
            raise UserError(f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place:,}; save it as "
                            "UTF-8, or leave it out if it is no text") from error
        if "\0" in text:
            raise UserError(f"{name} is binary, no text: byte 0x00 at offset {offset + chunk.index(0):,}; leave it out")
        yield text
        offset += len(chunk)
        reading.advance(len(chunk))


def read_json_lines(name, file, text_field, reading):
    documents = 0
    lines = decode(name, iter(partial(file.readline, LINE_BYTES + 1), b""), reading)
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            documents += 1
            text = parse_line(f"{name} line {line_number}", line.rstrip(), text_field)
            yield END_OF_TEXT
            yield from pieces(text[start:start + BLOCK] for start in range(0, len(text), BLOCK))
    if documents == 0:
        raise UserError(f"{name} is empty, expected a JSON object on every line; leave it out")


def parse_line(place, line, text_field):
    """Return the field `text_field` of a JSON object; `place` is its file and line, for the UserError."""
    try:
        fields = json.loads(line)
        text = fields.get(text_field) if isinstance(fields, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place} is {SHORT.repr(fields)}, expected a JSON object with a string in the field {text_field!r}"
                            "; name the field with the text by --text-field")
        text.encode()       # fails for half a character, which JSON can spell
    except (ValueError, RecursionError) as error:   # also for thousands of digits, or of brackets
        reason = str(error).replace(": line 1", ":")
        raise UserError(f"{place} cannot be read as JSON: {reason}; mend the line or leave it out") from error
    return text


def pieces(blocks):
    """Cut a text that comes in `blocks` of up to BLOCK characters into pieces that make the same tokens as the whole.

    The cut may come between any character and white space after it. GPT-2's encoding splits a text by PATTERN, in
    tokenizer.py, and then encodes part by part. No part has white space after another character, so one ends at the cut. Those
    before it stay what they are: the pattern sees white space at the cut, or the end of the text, and nothing in it tells the
    two apart after another character. Those after it stay, too, for the pattern never looks back.

    Where BLOCK characters have no such place, which is no longer language, a cut comes anyway: tiktoken fails on a million
    spaces. The tokens are then others, but decode to the same text; neither <|endoftext|> nor "\\r\\n" is cut apart. On the
    way "\\r\\n" becomes "\\n".
    """
    rest = ""
    for block in blocks:
        text = rest + block
        cut = LAST_CUT.match(text)
        if cut or len(text) >= BLOCK:
            end = cut.end() if cut else UNFINISHED.search(text, len(text) - len(SEPARATOR) + 1).start()
            yield text[:end].replace("\r\n", "\n")
            text = text[end:]
        rest = text
    if rest:
        yield rest.replace("\r\n", "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Encoding

def encode(texts, threads):
    """Yield the tokens of a stream of strings and of END_OF_TEXT, which stands for itself, as arrays of uint16, in order.

    tiktoken encodes without Python's lock, so threads do what processes would, in a tenth of the memory. But each needs an
    Encoding for itself: those that share one wait for each other at its regular expression.
    """
    encoding = gpt2_encoding()
    own = threading.local()

    def copy_encoding():
        own.encoding = copy.copy(encoding)

    def encode_batch(batch):
        # What says <|endoftext|> in a text by now is like any other words.
        tokens = [[END_OF_TEXT] if text == END_OF_TEXT else own.encoding.encode_to_numpy(text, disallowed_special=())
                  for text in batch]
        return np.concatenate(tokens, dtype=np.uint16, casting="unsafe")

    waiting = deque()
    with ThreadPoolExecutor(threads, initializer=copy_encoding) as pool:
        for batch in batches(texts):
            waiting.append(pool.submit(encode_batch, batch))
            if len(waiting) > 2 * threads:  # enough to keep all threads busy; more would only take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batches(texts):
    """Yield lists of at least BLOCK characters, all but the last: many documents are shorter than is worth while."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += 1 if text == END_OF_TEXT else len(text)
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def write_token_files(runs, train_paths, val_path, val_tokens=None, shard_tokens=SHARD_TOKENS, earlier=()):
    """Write arrays of tokens, one after the other, as a file for validation and shards for training.

    runs: an iterator of arrays of uint16
    train_paths: an iterator of the shards' paths
    val_tokens: how many of the first tokens are for validation (None: VALIDATION_TOKENS, or a tenth of a small text)
    earlier: files that shall be gone, since they would be taken for shards of this text

    Nothing is replaced until all is written. The file for validation is the first to go and the last to come, so that the
    shards of two texts never look like one, whenever the computer stops.

    Returns a dictionary from the files' paths, in the order of their tokens, to how many each has. Raises UserError if there
    are too few, or a file cannot be written.
    """
    beginning, num_tokens = [], 0
    while num_tokens < 10 * VALIDATION_TOKENS and (run := next(runs, None)) is not None:
        beginning.append(run)
        num_tokens += len(run)
    if num_tokens < SMALLEST_TEXT:
        raise UserError(f"the text makes {num_tokens:,} tokens, expected at least {SMALLEST_TEXT:,}, of which some are for "
                        "validation; give more text")
    if val_tokens is None:
        val_tokens = min(VALIDATION_TOKENS, num_tokens // 10)

    sizes = {}
    try:
        for unfinished in val_path.parent.glob(f"{glob.escape(val_path.stem)}.*.tmp"):      # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        with temporary_folder(val_path.with_name(val_path.stem)) as folder:
            shares = divide(itertools.chain(beginning, runs), val_tokens, shard_tokens)
            for _, share in itertools.groupby(shares, key=itemgetter(0)):
                path = next(train_paths) if sizes else val_path
                sizes[path] = write_runs(folder / path.name, (tokens for _, tokens in share))
            if len(sizes) == 1:
                raise UserError(f"--val-tokens is {val_tokens:,}, expected fewer than the {sizes[val_path]:,} tokens of the "
                                "text; lower it", status=2)
            for path in (val_path, *earlier):
                path.unlink(missing_ok=True)
            for path in reversed(sizes):
                os.replace(folder / path.name, path)
    except OSError as error:
        raise cannot_write(val_path, error) from error
    return sizes


def divide(runs, val_tokens, shard_tokens):
    """Yield (0, tokens) for the tokens of validation, then (1, tokens) for those of the first shard, and so on, in order.

    A shard begins only when more follows than SMALLEST_SHARD tokens, or a tenth of a shard; the last one takes what is left.
    """
    least = min(SMALLEST_SHARD, shard_tokens // 10)
    index, room = 0, val_tokens
    held = np.zeros(0, dtype=np.uint16)
    for run in runs:
        held = np.concatenate([held, run])
        while len(held) > (least if room == 0 and index > 0 else 0):
            if room == 0:
                index, room = index + 1, shard_tokens
            size = min(room, len(held))
            yield index, held[:size]
            held = held[size:]
            room -= size
    if len(held) > 0:
        yield index, held


def print_written(sizes):
    """Print which files write_token_files has written."""
    val_path, first, *others = sizes
    print(f"wrote {first}{f' to {others[-1].name}' if others else ''}: {sum(sizes.values()) - sizes[val_path]:,} tokens")
    print(f"wrote {val_path}: {sizes[val_path]:,} tokens")


def earlier_shards(name):
    """Return the paths of all training shards that this program has written under `name`."""
    shard = re.compile(re.escape(os.path.basename(name)) + r"_train_\d{6,}\.bin")
    return [path for path in Path(name).parent.glob("*") if shard.fullmatch(path.name)]


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
