"""Token files, and batches of inputs and targets from them, in the same order as in llm.c.

A token file is a header of 256 little-endian int32 (magic, version, number of tokens, size of the vocabulary, fingerprint of
the tokenizer, then zeros) followed by the tokens as little-endian uint16 or, for a vocabulary above 65,536, uint32. llm.c's
files have zeros in place of vocabulary and fingerprint. A large text is split over several such files, the shards.
"""
import glob
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cli import UserError, note
from files import (HEADER_BYTES, LOCK_NAME, atomic_file, cannot_write, kind_of, lock, make_header, open_file, read_array_header,
                   read_header)
from gpt2 import chunks

TOKENS_MAGIC, TOKENS_VERSION = 20240520, 1          # uint16
LARGE_MAGIC, LARGE_VERSION = 20240801, 7            # uint32
MAX_UINT16 = 65535
TOKENS_AT_ONCE = 2**20         # read together to check a file
ENDS_TOKENS = 65536            # at each end of a file, to recognize it
NEW_SUFFIX = "_val.new"        # of the folder with a complete new set of files, about to replace the old set
REPAIR_HINT = "write it again with prepare_text.py or prepare_tinyshakespeare.py"
RAW_OPENING = 1024             # bytes that tell raw tokens from other files


def write_tokens(path: str | Path, tokens: Sequence[int]) -> None:
    """Write `tokens` (integers below 65,536) to a token file. Raises UserError if it cannot be written."""
    write_token_stream(path, [tokens])


def write_token_stream(path: str | Path, arrays: Iterable[Sequence[int]], vocab_size: int = 0, fingerprint: int = 0) -> int:
    """Write `arrays` of tokens, one after the other, to one token file. Return its number of tokens.

    vocab_size, fingerprint: of their tokenizer, see tokenizer.Tokenizer; 0: unknown

    Never holds more than one array in memory. Raises UserError if the file cannot be written.
    """
    num_tokens = 0
    kind = (LARGE_MAGIC, LARGE_VERSION) if vocab_size > MAX_UINT16 + 1 else (TOKENS_MAGIC, TOKENS_VERSION)
    dtype, largest = ("<u4", 2**31 - 1) if kind[0] == LARGE_MAGIC else ("<u2", MAX_UINT16)
    with atomic_file(path) as file:
        file.seek(HEADER_BYTES)
        for tokens in arrays:
            tokens = np.asarray(tokens)
            if tokens.size > 0 and not 0 <= tokens.min() <= tokens.max() <= largest:
                raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}, expected 0 to {largest}")
            file.write(tokens.astype(dtype).tobytes())
            num_tokens += len(tokens)
        file.seek(0)
        file.write(make_header(*kind, num_tokens, vocab_size, fingerprint))
    return num_tokens


class TokenFile:
    """A token file that is read in parts. Open until `close`; the next `read` opens it again.

    Besides llm.c's two formats, these are read: a .npy array of integers; nanoGPT's raw uint16 and llm.c's first raw int32,
    which have no header (`raw`).

    Nothing is mapped: a file that shrinks while it is used is then an error in one line, not the death of the process.

    file: the opened file, for one that can be read only once
    largest: the largest token
    vocab_size, tokenizer_fingerprint: those of the tokenizer; 0 if the file does not tell

    Raises UserError if it has another format or version, is truncated, or holds a negative number.
    """

    vocab_size = tokenizer_fingerprint = 0
    raw = False

    def __init__(self, path: str | Path, file: BinaryIO | None = None):
        self.path, self.file = path, file or open_file(path, REPAIR_HINT)
        size = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        opening = self.file.read(RAW_OPENING)
        self.file.seek(0)
        if opening.startswith(np.lib.format.MAGIC_PREFIX):
            self.start, self.dtype, shape = read_array_header(self.file, path, REPAIR_HINT)
            if len(shape) != 1 or self.dtype.kind not in "iu":
                raise UserError(f"{path} is an array of {self.dtype} of shape {shape}, expected whole numbers in one row; "
                                f"{REPAIR_HINT}")
            [self.num_tokens] = shape
        elif looks_raw(opening, size):
            self.raw, self.start, self.dtype = True, 0, np.dtype("<i4" if not any(opening[2::4] + opening[3::4]) else "<u2")
            self.num_tokens = size // self.dtype.itemsize
        else:
            large = opening.startswith(LARGE_MAGIC.to_bytes(4, "little"))
            magic, versions = (LARGE_MAGIC, {LARGE_VERSION: "uint32"}) if large else (TOKENS_MAGIC, {TOKENS_VERSION: "uint16"})
            _, _, (self.num_tokens, self.vocab_size, self.tokenizer_fingerprint, *_) = read_header(
                self.file, path, "a token file", magic, versions, REPAIR_HINT)
            self.start, self.dtype = HEADER_BYTES, np.dtype("<u4" if large else "<u2")
        expected_size = self.start + self.dtype.itemsize * self.num_tokens
        if size != expected_size:
            raise UserError(f"{path} has {size:,} bytes, expected {expected_size:,} for the {self.num_tokens:,} tokens of its "
                            f"header; {REPAIR_HINT}")
        if self.num_tokens == 0:
            raise UserError(f"{path} holds no tokens; {REPAIR_HINT}")
        self.largest, self.largest_at = -1, 0
        for part in chunks(self.num_tokens, TOKENS_AT_ONCE):
            tokens = self.read(part.start, part.stop)
            if not 0 <= tokens.min() <= tokens.max() < 2**31:
                raise UserError(f"{path} holds numbers from {tokens.min():,} to {tokens.max():,}, expected tokens; "
                                f"{REPAIR_HINT}")
            if tokens.max() > self.largest:
                self.largest, self.largest_at = int(tokens.max()), part.start + int(tokens.argmax())
        if 0 < self.vocab_size <= self.largest:
            raise UserError(f"{path} holds token {self.largest:,} at position {self.largest_at:,}, expected tokens below the "
                            f"vocabulary of its header, {self.vocab_size:,}; {REPAIR_HINT}")
        self.checksum = zlib.crc32(self.read_ends())

    def check_vocabulary(self, vocab_size: int, fingerprint: int, model: str) -> None:
        """Raise UserError unless a model of this vocabulary and this tokenizer (0: unknown) can read the tokens.

        With an id outside the vocabulary, the embedding kernel would read past the end of its table.
        """
        if self.tokenizer_fingerprint and fingerprint and self.tokenizer_fingerprint != fingerprint:
            raise UserError(f"{self.path} holds the tokens of another tokenizer than that of {model}; prepare the text again "
                            "with prepare_text.py and its --model or --tokenizer")
        if self.largest >= vocab_size:
            raise UserError(f"{self.path} holds token {self.largest:,} at position {self.largest_at:,}, expected tokens below "
                            f"the model's vocabulary of {vocab_size:,}; use the model's tokenizer, by the --model of "
                            "prepare_text.py or prepare_tinyshakespeare.py")

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start to stop, (stop - start,) integers. Raises UserError if the file has become shorter."""
        if self.file is None:
            self.file = open_file(self.path, REPAIR_HINT)
            if zlib.crc32(self.read_ends()) != self.checksum:
                raise UserError(f"{self.path} was replaced while it was in use; bring the other file back, or start a new run")
        size = self.dtype.itemsize
        self.file.seek(self.start + size * start)
        contents = self.file.read(size * (stop - start))
        if len(contents) < size * (stop - start):
            raise UserError(f"{self.path} was cut short while it was in use; {REPAIR_HINT}")
        return np.frombuffer(contents, self.dtype)

    def read_batch(self, start: int, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets from `start` on, new int32 arrays (B, T). Each target is the token after its input."""
        tokens = self.read(start, start + B * T + 1).astype(np.int32)
        return tokens[:-1].reshape(B, T), tokens[1:].copy().reshape(B, T)

    def read_ends(self) -> bytes:
        """The number of tokens, then the first and the last of them: they tell one text from another."""
        n, size = min(self.num_tokens, ENDS_TOKENS), self.num_tokens
        return size.to_bytes(8, "little") + self.read(0, n).tobytes() + self.read(size - n, size).tobytes()

    def close(self) -> None:
        """Close the file until the next `read`."""
        if self.file:
            self.file.close()
        self.file = None


def is_token_file(opening: bytes) -> bool:
    """Whether a file that begins so is a token file by its magic number."""
    return opening[:4] in (magic.to_bytes(4, "little") for magic in (TOKENS_MAGIC, LARGE_MAGIC))


def looks_raw(opening: bytes, size: int) -> bool:
    """Whether a file may be tokens without a header, as nanoGPT writes them: even, of no known kind, and no text.

    A header whose magic number is damaged ends with zeros.
    """
    return size % 2 == 0 and size > RAW_OPENING and kind_of(opening) is None and any(opening[64:])


def replace_token_files(new: Path) -> None:
    """Move a complete set of token files out of the folder NAME_val.new, in place of an earlier set of that NAME.

    The validation file is deleted first and moved last, so that a mixture of two texts is never mistaken for one. If the
    process is killed meanwhile, the next one that reads or writes token files there continues (finish_replacing): the last
    training shard, whose number tells which old ones must go, is moved after the others. While there is one, the old tokenizer
    must go, too; then comes the new one, if there is any.
    """
    name = new.name.removesuffix(NEW_SUFFIX)
    last = f"{name}_tokenizer", f"{name}_val.bin"
    in_order = sorted(new.iterdir(), key=lambda path: (last.index(path.name) if path.name in last else -1, *by_number(path)))
    if in_order and in_order[0].name not in last:
        (new.parent / last[1]).unlink(missing_ok=True)
        shutil.rmtree(new.parent / last[0], ignore_errors=True)
    numbered = find_shards(new / name)      # none if there is a single file without a number
    for old in find_shards(new.parent / name) if numbered else ():
        if by_number(old) > max(map(by_number, numbered)):
            old.unlink()
    for path in in_order:
        os.replace(path, new.parent / path.name)
    new.rmdir()


def by_number(shard):
    return len(shard.name), shard.name      # beyond six digits, a number is longer


def finish_replacing(folder: Path) -> None:
    """Finish what killed processes have begun in replace_token_files. Raises UserError if that fails."""
    for new in folder.glob(f"*{NEW_SUFFIX}"):
        try:
            with lock_data(new.with_name(new.name.removesuffix(NEW_SUFFIX)), wait=True):
                if new.exists():
                    replace_token_files(new)
        except OSError as error:
            raise cannot_write(new, error) from error


def lock_data(name: Path, wait: bool = False):
    """The lock of the token files of a NAME, see files.lock."""
    return lock(name.with_name(f".{name.name}{LOCK_NAME}"), f"--output {name}", wait)


def find_shards(name: Path) -> list[Path]:
    """The existing training shards of a NAME."""
    shard = re.compile(re.escape(name.name) + r"_train_\d{6,}\.bin")
    return [path for path in name.parent.glob("*") if shard.fullmatch(path.name)]


@lru_cache(maxsize=1)      # called for every batch
def shuffled_order(num_shards, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_shards)


class Shards:
    """All token files that match `pattern` (a path or a glob), in order of their names.

    num_tokens: tokens in all of them together
    largest: the largest token
    vocab_size, tokenizer_fingerprint: those of their tokenizer; 0 if they do not tell

    Raises UserError if no file matches, a file is invalid (see TokenFile), or they are the tokens of several tokenizers.
    """

    def __init__(self, pattern: str | Path):
        finish_replacing(Path(pattern).parent)
        # Try a plain path first, because the name of a folder may contain the brackets of a glob.
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(str(pattern)))
        if not paths:
            raise UserError(f"no file matches {pattern}, expected token files; write them with prepare_text.py")
        self.shards = []
        for path in paths:
            shard = TokenFile(path)
            if self.shards:
                shard.close()       # there may be more shards than a process may have open files
            self.shards.append(shard)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.largest = max(shard.largest for shard in self.shards)
        known = {shard.tokenizer_fingerprint: shard for shard in self.shards if shard.tokenizer_fingerprint}
        if len(known) > 1:
            one, other, *_ = known.values()
            raise UserError(f"{one.path} and {other.path} hold the tokens of two tokenizers, expected one; prepare both texts "
                            "with the same")
        self.vocab_size, self.tokenizer_fingerprint = next(
            ((shard.vocab_size, fingerprint) for fingerprint, shard in known.items()), (0, 0))
        raw = [shard for shard in self.shards if shard.raw]
        if raw:
            note(f"{raw[0].path} has no header; it is read as tokens in {raw[0].dtype.name}")

    def check_vocabulary(self, vocab_size: int, fingerprint: int, model: str) -> None:
        """TokenFile.check_vocabulary of all files."""
        for shard in self.shards:
            shard.check_vocabulary(vocab_size, fingerprint, model)

    def first_tokens(self, count: int) -> np.ndarray:
        """At most `count` tokens, from the beginning of the first file."""
        return self.shards[0].read(0, min(count, self.shards[0].num_tokens))

    def checksum(self) -> int:
        """A checksum of the length and the first and last tokens of every file, to recognize the data of a resumed run.

        It does not read all tokens, because that would take long.
        """
        checksum = 0
        for shard in self.shards:
            checksum = zlib.crc32(shard.read_ends(), checksum)
            if shard is not self.shards[0]:
                shard.close()
        return checksum


class DataLoader(Shards):
    """Batches for training. Each step takes B*T tokens for every process: rank 0's first, then rank 1's and so on.

    The last tokens of a shard are skipped if they are too few for a step. An epoch visits every shard once. With a
    shuffle_seed, the order of the shards differs from epoch to epoch; it depends only on the seed and the epoch.

    state: (epoch, shards done in this epoch, position in the next shard) of the next step; can be saved and restored

    Raises UserError as Shards does, and if a file is too short for a step.
    """

    START = 0, 0, 0

    def __init__(self, pattern: str | Path, batch_size: int, sequence_length: int, rank: int = 0, world_size: int = 1,
                 shuffle_seed: int | None = None):
        super().__init__(pattern)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.offset = rank * batch_size * sequence_length
        self.step_tokens = world_size * batch_size * sequence_length
        self.shuffle_seed = shuffle_seed
        for shard in self.shards:
            if shard.num_tokens < self.step_tokens + 1:  # the target of the last input is the token after it
                raise UserError(f"{shard.path} holds {shard.num_tokens:,} tokens, expected at least {self.step_tokens + 1:,} "
                                f"for one step (batch size {batch_size} x sequence length {sequence_length} x processes "
                                f"{world_size} + 1); lower --batch-size or --sequence-length")
        self.reset()

    def set_state(self, state: Sequence[int]) -> None:
        """Continue at a state. Raises UserError if this data has no such place."""
        epoch, done, position = state
        if not (done < len(self.shards) and position <= self.shards[self.shard_order(epoch)[done]].num_tokens):
            raise UserError(f"the checkpoint's place in the data is {tuple(state)} (epoch, files done, token), which the "
                            "training tokens do not have; resume from another checkpoint")
        self.state = epoch, done, position

    def reset(self) -> None:
        """Restart at the first token of the first epoch."""
        self.state = self.START

    def shard_order(self, epoch: int) -> Sequence[int]:
        """The order of the shards in an epoch, as indices."""
        num_shards = len(self.shards)
        return range(num_shards) if self.shuffle_seed is None else shuffled_order(num_shards, self.shuffle_seed, epoch)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, new int32 arrays (B, T). Each target is the token after its input."""
        epoch, done, position = self.state
        shard = self.shards[self.shard_order(epoch)[done]]
        if position + self.step_tokens + 1 > shard.num_tokens:
            shard.close()
            epoch, done = (epoch, done + 1) if done + 1 < len(self.shards) else (epoch + 1, 0)
            shard, position = self.shards[self.shard_order(epoch)[done]], 0
        self.state = epoch, done, position + self.step_tokens
        return shard.read_batch(position + self.offset, self.batch_size, self.sequence_length)


class ValidationLoader(Shards):
    """Batches of all tokens, at most B*T at a time. At the end of a file, the last batch is smaller.

    Raises UserError as Shards does, and if a file has a single token, which no other predicts.
    """

    def __init__(self, pattern: str | Path, batch_size: int, sequence_length: int):
        super().__init__(pattern)
        self.batch_size, self.sequence_length = batch_size, sequence_length
        for shard in self.shards:
            if shard.num_tokens < 2:
                raise UserError(f"{shard.path} holds one token, expected at least 2: the first is not predicted; "
                                f"{REPAIR_HINT}")

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield inputs and targets, int32 arrays (B, T), then of each file's end: (rows, T) and (1, the rest)."""
        T = self.sequence_length
        for shard in self.shards:
            position, last = 0, shard.num_tokens - 1       # the last token is only a target
            while position < last:
                rows = min(self.batch_size, (last - position) // T)
                shape = (rows, T) if rows else (1, last - position)
                yield shard.read_batch(position, *shape)
                position += math.prod(shape)
            if shard is not self.shards[0]:
                shard.close()


def refuse_leak(train: Shards, validation: Shards) -> None:
    """Raise UserError if a validation file, or a copy of one, is among the training files."""
    checksums = {shard.checksum for shard in validation.shards}
    for shard in train.shards:
        if shard.checksum in checksums:
            raise UserError(f"--input-bin takes in {shard.path}, which is validation data (--input-val-bin), expected other "
                            "tokens; write a glob that leaves it out, such as \"NAME_train_*.bin\"", status=2)
