"""Token files, and batches of inputs and targets from them, in the same order as in llm.c.

A token file is a header of 256 little-endian int32 (magic, version, number of tokens, then zeros) followed by the tokens as
little-endian uint16. A large text is split over several such files, the shards.
"""
import glob
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cli import UserError
from files import HEADER_BYTES, LOCK_NAME, atomic_file, cannot_write, lock, make_header, open_file, read_header
from gpt2 import chunks

TOKENS_MAGIC = 20240520
TOKENS_VERSION = 1
TOKEN_BYTES = 2
TOKENS_AT_ONCE = 2**20         # read together to check a file
ENDS_TOKENS = 65536            # at each end of a file, to recognize it
NEW_SUFFIX = "_val.new"        # of the folder with a complete new set of files, about to replace the old set
REPAIR_HINT = "write it again with prepare_text.py or prepare_tinyshakespeare.py"


def write_tokens(path: str | Path, tokens: Sequence[int]) -> None:
    """Write `tokens` (integers below 65,536) to a token file. Raises UserError if it cannot be written."""
    write_token_stream(path, [tokens])


def write_token_stream(path: str | Path, arrays: Iterable[Sequence[int]]) -> int:
    """Write `arrays` of tokens, one after the other, to one token file. Return its number of tokens.

    Never holds more than one array in memory. Raises UserError if the file cannot be written.
    """
    num_tokens = 0
    with atomic_file(path) as file:
        file.seek(HEADER_BYTES)
        for tokens in arrays:
            tokens = np.asarray(tokens)
            if tokens.size > 0 and not 0 <= tokens.min() <= tokens.max() < 65536:
                raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}, expected 0 to 65535")
            file.write(tokens.astype("<u2").tobytes())
            num_tokens += len(tokens)
        file.seek(0)
        file.write(make_header(TOKENS_MAGIC, TOKENS_VERSION, num_tokens))
    return num_tokens


class TokenFile:
    """A token file that is read in parts. Open until `close`; the next `read` opens it again.

    Nothing is mapped: a file that shrinks while it is used is then an error in one line, not the death of the process.

    file: the opened file, for one that can be read only once

    Raises UserError if it has another format or version, is truncated, or holds a token >= vocab_size.
    """

    def __init__(self, path: str | Path, vocab_size: int, file: BinaryIO | None = None):
        self.path, self.file = path, file or open_file(path, REPAIR_HINT)
        size, _, (self.num_tokens, *_) = read_header(self.file, path, "a token file", TOKENS_MAGIC, {TOKENS_VERSION: "uint16"},
                                                     REPAIR_HINT)
        expected_size = HEADER_BYTES + TOKEN_BYTES * self.num_tokens
        if size != expected_size:
            raise UserError(f"{path} has {size:,} bytes, expected {expected_size:,} for the {self.num_tokens:,} tokens of its "
                            f"header; {REPAIR_HINT}")
        if self.num_tokens == 0:
            raise UserError(f"{path} holds no tokens; {REPAIR_HINT}")
        for part in chunks(self.num_tokens, TOKENS_AT_ONCE):
            # With an id outside the vocabulary, the embedding kernel would read past the end of its table.
            tokens = self.read(part.start, part.stop)
            if tokens.max() >= vocab_size:
                place = part.start + int(tokens.argmax())
                raise UserError(f"{path} holds token {tokens.max():,} at position {place:,}, expected tokens below the model's "
                                f"vocabulary of {vocab_size:,}; prepare it with the model's tokenizer")
        self.checksum = zlib.crc32(self.read_ends())

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start to stop, (stop - start,) uint16. Raises UserError if the file has become shorter."""
        if self.file is None:
            self.file = open_file(self.path, REPAIR_HINT)
            if zlib.crc32(self.read_ends()) != self.checksum:
                raise UserError(f"{self.path} was replaced while it was in use; bring the other file back, or start a new run")
        self.file.seek(HEADER_BYTES + TOKEN_BYTES * start)
        contents = self.file.read(TOKEN_BYTES * (stop - start))
        if len(contents) < TOKEN_BYTES * (stop - start):
            raise UserError(f"{self.path} was cut short while it was in use; {REPAIR_HINT}")
        return np.frombuffer(contents, "<u2")

    def read_ends(self) -> bytes:
        """The number of tokens, then the first and the last of them: they tell one text from another."""
        n, size = min(self.num_tokens, ENDS_TOKENS), self.num_tokens
        return size.to_bytes(8, "little") + self.read(0, n).tobytes() + self.read(size - n, size).tobytes()

    def close(self) -> None:
        """Close the file until the next `read`."""
        if self.file:
            self.file.close()
        self.file = None


def replace_token_files(new: Path) -> None:
    """Move a complete set of token files out of the folder NAME_val.new, in place of an earlier set of that NAME.

    The validation file is deleted first and moved last, so that a mixture of two texts is never mistaken for one. If the
    process is killed meanwhile, the next one that reads or writes token files there continues (finish_replacing): the last
    training shard, whose number tells which old ones must go, is moved after the others.
    """
    name = new.name.removesuffix(NEW_SUFFIX)
    val_name = f"{name}_val.bin"
    in_order = sorted(new.iterdir(), key=lambda path: (path.name == val_name, *by_number(path)))
    if in_order and in_order[0].name != val_name:
        (new.parent / val_name).unlink(missing_ok=True)
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


class DataLoader:
    """Batches from all token files that match `pattern` (a path or a glob): the shards, in order of their names.

    Each step takes B*T tokens for every process: rank 0's first, then rank 1's and so on. The last tokens of a shard are
    skipped if they are too few for a step. An epoch visits every shard once. With a shuffle_seed, the order of the shards
    differs from epoch to epoch; it depends only on the seed and the epoch.

    num_tokens: tokens in all shards together
    batches: steps per epoch
    state: (epoch, shards done in this epoch, position in the next shard) of the next step; can be saved and restored

    Raises UserError if no file matches, a file is invalid (see TokenFile) or a file is too short for a step.
    """

    START = 0, 0, 0

    def __init__(self, pattern: str | Path, batch_size: int, sequence_length: int, vocab_size: int, rank: int = 0,
                 world_size: int = 1, shuffle_seed: int | None = None):
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.offset = rank * batch_size * sequence_length
        self.step_tokens = world_size * batch_size * sequence_length
        self.shuffle_seed = shuffle_seed

        finish_replacing(Path(pattern).parent)
        # Try a plain path first, because the name of a folder may contain the brackets of a glob.
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(str(pattern)))
        if not paths:
            raise UserError(f"no file matches {pattern}, expected token files; write them with prepare_text.py")
        self.shards = []
        for path in paths:
            shard = TokenFile(path, vocab_size)
            if shard.num_tokens < self.step_tokens + 1:  # the target of the last input is the token after it
                raise UserError(f"{path} holds {shard.num_tokens:,} tokens, expected at least {self.step_tokens + 1:,} for one "
                                f"step (batch size {batch_size} x sequence length {sequence_length} x processes {world_size} "
                                "+ 1); lower --batch-size or --sequence-length")
            if self.shards:
                shard.close()       # there may be more shards than a process may have open files
            self.shards.append(shard)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.batches = sum((shard.num_tokens - 1) // self.step_tokens for shard in self.shards)
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
        B, T = self.batch_size, self.sequence_length
        start = position + self.offset
        tokens = shard.read(start, start + B * T + 1)
        inputs = tokens[:-1].astype(np.int32).reshape(B, T)
        targets = tokens[1:].astype(np.int32).reshape(B, T)
        self.state = epoch, done, position + self.step_tokens
        return inputs, targets

    def fingerprint(self) -> int:
        """A checksum of the length and the first and last tokens of every shard, to recognize the data of a resumed run.

        It does not read all tokens, because that would take long.
        """
        checksum = 0
        for shard in self.shards:
            checksum = zlib.crc32(shard.read_ends(), checksum)
            if shard is not self.shards[0]:
                shard.close()
        return checksum
