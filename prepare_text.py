"""Turn your own texts into the token files that training reads.

    python prepare_text.py book.txt --output data/book
    python prepare_text.py books/ more.txt dump.jsonl --output data/books
    zcat dump.txt.gz | python prepare_text.py - --output data/dump

The first command writes data/book_val.bin and data/book_train_000000.bin (for a large text also _000001.bin and so on) and
prints the command that trains on them. A document is a file, a line of a .jsonl file (its field "text"), or the text between
two <|endoftext|> in a file. Every document begins with the token <|endoftext|>. Without these tokens, the token files decode to
the original texts, except that a byte order mark is removed and "\\r\\n" becomes "\\n".
"""
import argparse
import codecs
import contextlib
import copy
import glob
import itertools
import json
import os
import re
import reprlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path

from cli import OneLineParser, UserError, bounded, progress_bar, run_program    # first: from here on, Ctrl-C is one line

import numpy as np

from dataloader import NEW_SUFFIX, lock_data, replace_token_files, write_token_stream
from files import cannot_write, delete_unfinished, made_folder, open_file, temporary_folder
from machine import usable_cores
from tokenizer import END_OF_TEXT, gpt2_encoding

OUT_OF_MEMORY_HINT = "choose fewer --threads"
READABLE_HINT = "name files that can be read, or a folder of them"

VALIDATION_TOKENS = 32_768
MIN_TEXT_TOKENS = 3_000          # a tenth of them, for validation, is just more than a batch of 4 x 64
SMALL_TEXT_TOKENS = 100_000      # below this, the program suggests fine-tuning
SHARD_TOKENS = 100_000_000       # as in llm.c
MAX_SHARD_TOKENS = 2**30         # a token file counts its tokens in an int32
MIN_SHARD_TOKENS = 2**20         # training refuses a shard that is shorter than a step

BLOCK_SIZE = 2**18               # bytes read at a time, and roughly the characters that a thread encodes at a time
MAX_LINE_BYTES = 2**26           # a longer line in a .jsonl file means that the file has another format
STANDARD_INPUT = "-"
SEPARATOR = "<|endoftext|>"

LAST_CUT = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)  # matches up to the last place where `pieces` may cut
PARTIAL_ENDING = re.compile(r"(\r|<[|a-z]*)?\Z")        # the end of a block that may be the start of "\r\n" or SEPARATOR
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxdict = 8           # fields shown if the one with the text is missing


def main():
    parser = OneLineParser(description="Turn your own texts into token files for training.")
    parser.add_argument("inputs", nargs="+", metavar="FILE-OR-FOLDER",
                        help="a UTF-8 text (one document); a .jsonl file (one document per line); a folder (all its files in "
                             "order of their names, except hidden ones); or - for a text on standard input. <|endoftext|> in a "
                             "text starts a new document")
    parser.add_argument("--output", required=True, metavar="NAME",
                        help="such as data/books: writes data/books_train_000000.bin, ... and data/books_val.bin; existing "
                             "files are replaced only after everything has been written")
    parser.add_flag("--text-field", default="text", metavar="FIELD", help="field of a .jsonl line that holds its text")
    positive = bounded(int, 1, MAX_SHARD_TOKENS)
    parser.add_flag("--val-tokens", type=positive, metavar="N", help="tokens for validation, taken from the beginning "
                    f"(default: {VALIDATION_TOKENS}, or a tenth of a small text)")
    parser.add_flag("--shard-tokens", default=SHARD_TOKENS, type=positive, metavar="N",
                    help="tokens per training file; the last one may have up to a tenth more")
    parser.add_flag("--threads", default=usable_cores(), type=bounded(int, 1, os.cpu_count()), metavar="N", help="CPU threads")
    options = parser.parse_args()
    if os.path.basename(options.output) in ("", ".", ".."):
        parser.error(f"--output is {options.output!r}, expected a name for the files, such as data/books")
    prepare(options)


def prepare(options: argparse.Namespace) -> None:
    """Write the token files for the parsed flags; print what was written and the command that trains on it."""
    name = options.output
    train_paths = (Path(f"{name}_train_{i:06}.bin") for i in itertools.count())
    val_path = Path(f"{name}_val.bin")
    files = find_files(options.inputs)
    started = time.perf_counter()
    with progress_bar("encoding", total_size(files), "B") as bar:
        counter = ReadCounter(bar)
        texts = read_texts(files, options.text_field, counter)
        sizes = write_token_files(encode(texts, options.threads), train_paths, val_path, options.val_tokens,
                                  options.shard_tokens)
    print_written(sizes)
    num_tokens = sum(sizes.values())
    seconds, megabytes = time.perf_counter() - started, counter.num_bytes / 1e6
    print(f"{counter.documents:,} document{'s' * (counter.documents != 1)}, {num_tokens:,} tokens; "
          f"{megabytes:,.2f} MB in {seconds:,.1f} s, {megabytes / seconds:.1f} MB/s")
    if num_tokens < SMALL_TEXT_TOKENS:
        print(f"note: {num_tokens:,} tokens are few, and a model trained from scratch will memorize them; give it "
              f"{SMALL_TEXT_TOKENS:,} or more, or fine-tune a pretrained model (--model)")
    print("to train on it:")
    print(f'python {Path(sys.argv[0]).with_name("train_gpt2.py")} --input-bin "{glob.escape(name)}_train_*.bin" '
          f'--input-val-bin "{val_path}"')


# ----------------------------------------------------------------------------------------------------------------------
# Reading: a stream of strings, with END_OF_TEXT before every document

class ReadCounter:
    """Counts the bytes and documents that have been read, and advances a progress bar."""

    def __init__(self, bar):
        self.bar = bar      # a tqdm bar that is not shown does not count
        self.num_bytes = self.documents = 0

    def add_bytes(self, count):
        self.num_bytes += count
        self.bar.update(count)


def find_files(inputs):
    """Return the files to read, in order. Each folder in `inputs` is replaced by the files in it.

    Skips hidden files and folders, and links to folders. Raises UserError for a folder that cannot be read or has no files.
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
        for path in files[before:]:
            if os.path.exists(path) and not os.path.isfile(path):   # a pipe is welcome only if it is named
                raise UserError(f"{path} is a pipe or a device, expected texts in {name}; move it away", status=2)
        if len(files) == before:
            raise UserError(f"{name} is a folder without files, expected texts in it; name another", status=2)
    return files


def cannot_read(name, error):
    raise UserError(f"cannot read {error.filename or name}: {error.strerror}; {READABLE_HINT}", status=2) from error


def total_size(files):
    """Return the total size of `files` in bytes, or None if one of them is standard input or a pipe.

    Raises UserError for a file that does not exist.
    """
    try:
        sizes = [0 if path == STANDARD_INPUT else os.stat(path).st_size for path in files]      # a pipe's is 0, too
    except OSError as error:
        cannot_read(error.filename, error)
    return sum(sizes) if all(sizes) else None


def read_texts(files, text_field, counter):
    """Yield the contents of `files` as strings of up to 2 * BLOCK_SIZE characters, with END_OF_TEXT before every document.

    Encoded one by one, the strings give the same tokens as whole documents. Raises UserError for a file that is not UTF-8 text
    or not JSON.
    """
    for path in files:
        name = "standard input" if path == STANDARD_INPUT else path
        try:
            with contextlib.nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else open_file(
                    path, READABLE_HINT, stream=True, status=2) as file:
                if path.endswith(".jsonl"):
                    texts = read_json_lines(name, file, text_field, counter)
                else:
                    texts = read_plain_text(name, file, counter)
                for text in texts:
                    counter.documents += text == END_OF_TEXT
                    yield text
        except OSError as error:
            cannot_read(name, error)


def read_plain_text(name, file, counter):
    empty = True
    yield END_OF_TEXT
    for piece in pieces(decode(name, iter(partial(file.read, BLOCK_SIZE), b""), counter)):
        empty = empty and piece.isspace()
        yield from split_documents(piece)
    if empty:
        raise UserError(f"{name} is empty, expected some text; leave it out")


def split_documents(text: str) -> Iterator[str | int]:
    """Split `text` at <|endoftext|>: yield the strings between, and END_OF_TEXT in place of each <|endoftext|>."""
    first, *others = text.split(SEPARATOR)
    yield first
    for document in others:
        yield END_OF_TEXT
        yield document


def decode(name, chunks, counter):
    """Decode a file, given as an iterator of `chunks` (bytes). Drops a byte order mark. Raises UserError if it is not text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    for chunk in itertools.chain(chunks, [b""]):
        if len(chunk) > MAX_LINE_BYTES:     # only read_json_lines can yield so long a chunk
            raise UserError(f"{name} has a line of more than {MAX_LINE_BYTES:,} bytes, expected one JSON object on every line")
        try:
            text = decoder.decode(chunk, final=not chunk)       # keeps an incomplete character for the next chunk
        except UnicodeDecodeError as error:
            place = offset + len(chunk) - len(error.object) + error.start
            raise UserError(f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place:,}; save it as "
                            "UTF-8, or leave it out if it is not text") from error
        if "\0" in text:
            raise UserError(f"{name} is binary, not text: byte 0x00 at offset {offset + chunk.index(0):,}; leave it out")
        yield text
        offset += len(chunk)
        counter.add_bytes(len(chunk))


def read_json_lines(name, file, text_field, counter):
    documents = 0
    lines = decode(name, iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), counter)
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            documents += 1
            text = parse_line(f"{name} line {line_number}", line.rstrip(), text_field)
            yield END_OF_TEXT
            yield from pieces(text[start:start + BLOCK_SIZE] for start in range(0, len(text), BLOCK_SIZE))
    if documents == 0:
        raise UserError(f"{name} is empty, expected a JSON object on every line; leave it out")


def parse_line(place, line, text_field):
    """Return the field `text_field` of the JSON object in `line`. `place` names file and line in a UserError."""
    try:
        fields = json.loads(line)
        text = fields.get(text_field) if isinstance(fields, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place} is {SHORT_REPR.repr(fields)}, expected a JSON object with a string in the field "
                            f"{text_field!r}; name the field that holds the text with --text-field")
        text.encode()       # fails for half a surrogate pair, which JSON allows
    except (ValueError, RecursionError) as error:   # also for too many digits or brackets
        reason = str(error).replace(": line 1", ":")
        raise UserError(f"{place} cannot be read as JSON: {reason}; fix the line or leave it out") from error
    return text


def pieces(blocks):
    """Cut a text that arrives in `blocks` of up to BLOCK_SIZE characters into pieces that encode to the same tokens.

    We cut between a visible character and the white space after it. GPT-2's encoding first splits the text into parts with
    PATTERN (tokenizer.py) and then encodes each part separately. No part has white space after another character, so a part
    ends at the cut. The parts before the cut do not change, because after a visible character PATTERN treats white space and
    the end of the text alike. The parts after the cut do not change, because PATTERN never looks back.

    If there is no such place in BLOCK_SIZE characters, the text is not natural language and we cut anyway, because tiktoken
    fails on a million spaces. The tokens then differ, but decode to the same text. We never cut inside <|endoftext|> or
    "\\r\\n". Finally, every "\\r\\n" becomes "\\n".
    """
    rest = ""
    for block in blocks:
        text = rest + block
        cut = LAST_CUT.match(text)
        if cut or len(text) >= BLOCK_SIZE:
            end = cut.end() if cut else PARTIAL_ENDING.search(text, len(text) - len(SEPARATOR) + 1).start()
            yield text[:end].replace("\r\n", "\n")
            text = text[end:]
        rest = text
    if rest:
        yield rest.replace("\r\n", "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Encoding

def encode(texts: Iterable[str | int], threads: int) -> Iterator[np.ndarray]:
    """Encode a stream of strings; END_OF_TEXT is passed through. Yields the tokens in order, as arrays of uint16.

    tiktoken releases the GIL, so threads are as fast as processes and need a tenth of the memory. Each thread has its own copy
    of the Encoding, because threads that share one wait for each other at its regular expression.
    """
    encoding = gpt2_encoding()
    thread_local = threading.local()

    def copy_encoding():
        thread_local.encoding = copy.copy(encoding)

    def encode_batch(batch):
        # disallowed_special: an <|endoftext|> that is still in a text is encoded as ordinary text.
        tokens = [[END_OF_TEXT] if text == END_OF_TEXT else thread_local.encoding.encode_to_numpy(text, disallowed_special=())
                  for text in batch]
        return np.concatenate(tokens, dtype=np.uint16, casting="unsafe")

    futures = deque()
    with ThreadPoolExecutor(threads, initializer=copy_encoding) as pool:
        for batch in batches(texts):
            futures.append(pool.submit(encode_batch, batch))
            if len(futures) > 2 * threads:  # enough to keep all threads busy; more would only use memory
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def batches(texts):
    """Group texts into lists of at least BLOCK_SIZE characters, because a short document is not worth a task of its own."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += 1 if text == END_OF_TEXT else len(text)
        if size >= BLOCK_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def write_token_files(arrays: Iterator[np.ndarray], train_paths: Iterator[Path], val_path: Path, val_tokens: int | None = None,
                      shard_tokens: int = SHARD_TOKENS) -> dict[Path, int]:
    """Write a stream of tokens (uint16 arrays) as one validation file and one or more training shards.

    train_paths: yields the paths of the shards, in the folder of val_path, NAME_val.bin
    val_tokens: number of tokens for validation, taken from the beginning (None: VALIDATION_TOKENS, or a tenth of a small text)

    No existing file changes until everything has been written; see dataloader.replace_token_files. Returns path -> number of
    tokens, in the order of the tokens. Raises UserError if there are too few tokens, a file cannot be written, or another
    process is writing these files.
    """
    name = val_path.with_name(val_path.stem.removesuffix("_val"))
    new = val_path.with_name(name.name + NEW_SUFFIX)
    try:
        with made_folder(name.parent), lock_data(name):
            delete_unfinished(name.parent, glob.escape(new.name))
            if new.exists():
                replace_token_files(new)
            with temporary_folder(new) as folder:
                sizes = write_all(arrays, folder, train_paths, val_path, val_tokens, shard_tokens)
                os.rename(folder, new)
            replace_token_files(new)
    except OSError as error:
        raise cannot_write(val_path, error) from error
    return sizes


def write_all(arrays, folder, train_paths, val_path, val_tokens, shard_tokens):
    """Write the files of write_token_files to another folder."""
    beginning, num_tokens = [], 0
    while num_tokens < 10 * VALIDATION_TOKENS and (tokens := next(arrays, None)) is not None:
        beginning.append(tokens)
        num_tokens += len(tokens)
    if num_tokens < MIN_TEXT_TOKENS:
        raise UserError(f"the text makes {num_tokens:,} tokens, expected at least {MIN_TEXT_TOKENS:,} for training and "
                        "validation; give more text")
    if val_tokens is None:
        val_tokens = min(VALIDATION_TOKENS, num_tokens // 10)

    sizes = {}
    slices = divide(itertools.chain(beginning, arrays), val_tokens, shard_tokens)
    for _, group in itertools.groupby(slices, key=itemgetter(0)):
        path = next(train_paths) if sizes else val_path
        sizes[path] = write_token_stream(folder / path.name, (tokens for _, tokens in group))
    if len(sizes) == 1:
        raise UserError(f"--val-tokens is {val_tokens:,}, expected fewer than the {sizes[val_path]:,} tokens of the "
                        "text; lower it", status=2)
    return sizes


def divide(arrays, val_tokens, shard_tokens):
    """Divide a stream of tokens among the files: yield (0, tokens) for validation, (1, tokens) for the first shard, and so on.

    A new shard needs more than MIN_SHARD_TOKENS tokens, or a tenth of shard_tokens if that is less. A shorter rest is added to
    the last shard.
    """
    min_tokens = min(MIN_SHARD_TOKENS, shard_tokens // 10)
    index, room = 0, val_tokens
    waiting = np.zeros(0, dtype=np.uint16)
    for tokens in arrays:
        waiting = np.concatenate([waiting, tokens])
        while len(waiting) > (min_tokens if room == 0 and index > 0 else 0):
            if room == 0:
                index, room = index + 1, shard_tokens
            size = min(room, len(waiting))
            yield index, waiting[:size]
            waiting = waiting[size:]
            room -= size
    if len(waiting) > 0:
        yield index, waiting


def print_written(sizes: dict[Path, int]) -> None:
    """Print the files that write_token_files has written."""
    val_path, first, *others = sizes
    print(f"wrote {first}{f' to {others[-1].name}' if others else ''}: {sum(sizes.values()) - sizes[val_path]:,} tokens")
    print(f"wrote {val_path}: {sizes[val_path]:,} tokens")


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
