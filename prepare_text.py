"""Turn your own texts into the token files that training reads.

    python prepare_text.py book.txt --output data/book
    python prepare_text.py books/ more.txt dump.jsonl.gz --output data/books
    python prepare_text.py wiki/ --output data/wiki --train-tokenizer 4096
    curl URL | python prepare_text.py - --output data/dump

The first command writes data/book_val.bin and data/book_train_000000.bin (for a large text also _000001.bin and so on) and
prints the command that trains on them. The tokens are GPT-2's, those of a --model, or those of a new tokenizer; a tokenizer
that is not GPT-2's is stored beside them, in data/wiki_tokenizer. A document is a file, a JSON record, or the text between two
<|endoftext|>. Every document begins with the token that ends a text. Without these tokens, those of GPT-2 decode to
the original texts, as text_files.py reads them.
"""
import argparse
import glob
import itertools
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

from cli import OneLineParser, UserError, bounded, progress_bar, run_program    # first: from here on, Ctrl-C is one line

import numpy as np

import gpt2
from dataloader import NEW_SUFFIX, lock_data, replace_token_files, write_token_stream
from files import cannot_write, delete_unfinished, made_folder, temporary_folder
from machine import usable_cores
from model_files import find_model, load_model_tokenizer, stored_definition
from text_files import STANDARD_INPUT, TextReader, find_files, total_size
from tokenizer import SEPARATOR, GPT2Tokenizer, Tokenizer, save_tokenizer, tokenizer_folder, train_tokenizer

OUT_OF_MEMORY_HINT = "choose fewer --threads"

VALIDATION_TOKENS = 32_768
MIN_TEXT_TOKENS = 3_000          # a tenth of them, for validation, is just more than a batch of 4 x 64
SMALL_TEXT_TOKENS = 100_000      # below this, the program suggests fine-tuning
SHARD_TOKENS = 100_000_000       # as in llm.c
MAX_SHARD_TOKENS = 2**30         # a token file counts its tokens in an int32
MIN_SHARD_TOKENS = 2**20         # training refuses a shard that is shorter than a step
BATCH_SIZE = 2**18               # roughly the characters that a thread encodes at a time


def main():
    parser = OneLineParser(description="Turn your own texts into token files for training.")
    parser.add_argument("inputs", nargs="+", metavar="FILE-OR-FOLDER",
                        help="a UTF-8 text (one document); a .jsonl, .ndjson or .json file (one document per record); these "
                             "also compressed (.gz, .bz2, .xz, .zst); a folder (all its texts in order of their names, except "
                             "hidden ones); or - for standard input. <|endoftext|> in a text starts a new document")
    parser.add_argument("--output", required=True, metavar="NAME",
                        help="such as data/books: writes data/books_train_000000.bin, ... and data/books_val.bin; existing "
                             "files are replaced only after everything has been written")
    parser.add_flag("--text-field", metavar="FIELD", help="field of a JSON record that holds its text (default: text); with "
                    "it, standard input is JSON")
    parser.add_argument("--skip-bad", action="store_true", help="leave out JSON records that cannot be read, and count them")
    parser.add_flag("--model", "--tokenizer", metavar="MODEL", help="write the tokens of this model: a Hugging Face folder, a "
                    "name on the hub, a .gguf file, or a folder of tokenizer files (default: GPT-2's tokens)")
    parser.add_flag("--train-tokenizer", type=bounded(int, 257, 2**20), metavar="N",
                    help="train a tokenizer of at most N tokens on the text, for another language or for a small model")
    positive = bounded(int, 1, MAX_SHARD_TOKENS)
    parser.add_flag("--val-tokens", type=positive, metavar="N", help="tokens for validation, taken from the beginning "
                    f"(default: {VALIDATION_TOKENS}, or a tenth of a small text)")
    parser.add_flag("--shard-tokens", default=SHARD_TOKENS, type=positive, metavar="N",
                    help="tokens per training file; the last one may have up to a tenth more")
    parser.add_flag("--threads", default=usable_cores(), type=bounded(int, 1, os.cpu_count()), metavar="N", help="CPU threads")
    options = parser.parse_args()
    if os.path.basename(options.output) in ("", ".", ".."):
        parser.error(f"--output is {options.output!r}, expected a name for the files, such as data/books")
    if options.model and options.train_tokenizer:
        parser.error("--model and --train-tokenizer name two tokenizers, expected one of them")
    if options.train_tokenizer and STANDARD_INPUT in options.inputs:
        parser.error("--train-tokenizer reads the text twice, but standard input can be read once; save it to a file")
    prepare(options)


def prepare(options: argparse.Namespace) -> None:
    """Write the token files for the parsed flags; print what was written and the command that trains on it."""
    name = options.output
    train_paths = (Path(f"{name}_train_{i:06}.bin") for i in itertools.count())
    val_path = Path(f"{name}_val.bin")
    files = find_files(options.inputs)
    tokenizer = choose_tokenizer(options, files)
    started = time.perf_counter()
    with progress_bar("encoding", total_size(files), "B") as bar:
        reader = TextReader(options.text_field, options.skip_bad, bar.update)
        sizes = write_token_files(encode(reader.read(files), options.threads, tokenizer), train_paths, val_path,
                                  options.val_tokens, options.shard_tokens, tokenizer)
    print_written(sizes)
    for line in reader.report():
        print(line)
    num_tokens = sum(sizes.values())
    seconds, megabytes = time.perf_counter() - started, reader.num_bytes / 1e6
    print(f"{reader.documents:,} document{'s' * (reader.documents != 1)}, {num_tokens:,} tokens; "
          f"{megabytes:,.2f} MB in {seconds:,.1f} s, {megabytes / seconds:.1f} MB/s")
    if num_tokens < SMALL_TEXT_TOKENS:
        print(f"note: {num_tokens:,} tokens are few, and a model trained from scratch will memorize them; give it "
              f"{SMALL_TEXT_TOKENS:,} or more, or fine-tune a pretrained model (--model)")
    print("to train on it:")
    is_model = options.model and not (os.path.isdir(options.model) and not Path(options.model, "config.json").is_file())
    program = f"train_{(stored_definition(find_model(options.model)) if is_model else gpt2).__name__}.py"
    command = ["python", str(Path(sys.argv[0]).with_name(program)), *(["--model", options.model] if is_model else []),
               "--input-bin", f"{glob.escape(name)}_train_*.bin", "--input-val-bin", str(val_path)]
    print(subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command))


def choose_tokenizer(options: argparse.Namespace, files: list) -> Tokenizer:
    """The tokenizer that the flags ask for. Raises UserError if the model has none that can encode text."""
    if options.train_tokenizer:
        with progress_bar("training the tokenizer", total_size(files), "B") as bar:
            reader = TextReader(options.text_field, options.skip_bad, bar.update)
            tokenizer = train_tokenizer((text for text in reader.read(files) if text != SEPARATOR), options.train_tokenizer)
        print(f"trained a tokenizer of {tokenizer.vocab_size:,} tokens")
        return tokenizer
    tokenizer = load_model_tokenizer(options.model) if options.model else GPT2Tokenizer()
    tokenizer.encode("text")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Encoding

def encode(texts: Iterable[str], threads: int, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Encode a stream of strings, see TextReader.read. Yields the tokens in order, as arrays of uint32.

    A SEPARATOR becomes the tokenizer's end-of-text token, if it has one.
    """
    end_of_text = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]

    def encode_batch(batch):
        tokens = iter(tokenizer.encode_pieces([text for text in batch if text != SEPARATOR]))
        return np.concatenate([np.array(end_of_text if text == SEPARATOR else next(tokens), dtype=np.uint32) for text in batch])

    futures = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches(document_pieces(texts, tokenizer)):
            futures.append(pool.submit(encode_batch, batch))
            if len(futures) > 2 * threads:  # enough to keep all threads busy; more would only use memory
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def document_pieces(texts, tokenizer):
    """Cut each document into pieces that are encoded one by one."""
    for is_separator, group in itertools.groupby(texts, key=lambda text: text == SEPARATOR):
        pieces = iter if is_separator else tokenizer.pieces
        yield from pieces(group)


def batches(texts):
    """Group texts into lists of at least BATCH_SIZE characters, because a short document is not worth a task of its own."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def write_token_files(arrays: Iterator[np.ndarray], train_paths: Iterator[Path], val_path: Path, val_tokens: int | None = None,
                      shard_tokens: int = SHARD_TOKENS, tokenizer: Tokenizer | None = None) -> dict[Path, int]:
    """Write a stream of tokens (arrays) as one validation file and one or more training shards.

    train_paths: yields the paths of the shards, in the folder of val_path, NAME_val.bin
    val_tokens: number of tokens for validation, taken from the beginning (None: VALIDATION_TOKENS, or a tenth of a small text)
    tokenizer: stored beside the tokens if it is not GPT-2's (None: GPT-2's)

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
                tokenizer = tokenizer or GPT2Tokenizer()
                sizes = write_all(arrays, folder, train_paths, val_path, val_tokens, shard_tokens, tokenizer)
                if not isinstance(tokenizer, GPT2Tokenizer):
                    save_tokenizer(folder / tokenizer_folder(val_path).name, tokenizer)
                os.rename(folder, new)
            replace_token_files(new)
    except OSError as error:
        raise cannot_write(val_path, error) from error
    return sizes


def write_all(arrays, folder, train_paths, val_path, val_tokens, shard_tokens, tokenizer):
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
        sizes[path] = write_token_stream(folder / path.name, (tokens for _, tokens in group),
                                         vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
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
    waiting = np.zeros(0, dtype=np.uint32)
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
