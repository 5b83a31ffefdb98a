"""Token files, and batches of inputs and targets from them, in the same order as in llm.c.

A token file is a header of 256 little-endian int32 (magic, version, number of tokens, then zeros) followed by the tokens as
little-endian uint16. A large text is split over several such files, the shards.
"""
import glob
import os
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from cli import UserError
from files import HEADER_BYTES, atomic_file, make_header, read_header

TOKENS_MAGIC = 20240520
TOKENS_VERSION = 1
TOKEN_BYTES = 2
FINGERPRINT_TOKENS = 65536     # at each end of a shard
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


def open_tokens(path: str | Path, vocab_size: int) -> np.ndarray:
    """Return the tokens of a file, (n,) uint16, memory-mapped.

    Raises UserError if the file has another format or version, is truncated, or holds a token >= `vocab_size`.
    """
    size, _, (num_tokens, *_) = read_header(path, "a token file", TOKENS_MAGIC, {TOKENS_VERSION: "uint16"}, REPAIR_HINT)
    expected_size = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if size != expected_size:
        raise UserError(f"{path} has {size:,} bytes, expected {expected_size:,} for the {num_tokens:,} tokens of its header; "
                        f"{REPAIR_HINT}")
    if num_tokens == 0:
        raise UserError(f"{path} holds no tokens; {REPAIR_HINT}")

    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
    # With an id outside the vocabulary, the embedding kernel would read past the end of its table.
    largest = int(tokens.max())
    if largest >= vocab_size:
        where = int(tokens.argmax())
        raise UserError(f"{path} holds token {largest:,} at position {where:,}, expected tokens below the model's vocabulary "
                        f"of {vocab_size:,}; prepare it with the model's tokenizer")
    return tokens


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

    Raises UserError if no file matches, a file is invalid (see open_tokens) or a file is too short for a step.
    """

    START = 0, 0, 0

    def __init__(self, pattern: str | Path, batch_size: int, sequence_length: int, vocab_size: int, rank: int = 0,
                 world_size: int = 1, shuffle_seed: int | None = None):
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.offset = rank * batch_size * sequence_length
        self.step_tokens = world_size * batch_size * sequence_length
        self.shuffle_seed = shuffle_seed

        # Try a plain path first, because the name of a folder may contain the brackets of a glob.
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(str(pattern)))
        if not paths:
            raise UserError(f"no file matches {pattern}, expected token files; write them with prepare_text.py")
        self.shards = [open_tokens(path, vocab_size) for path in paths]
        for path, tokens in zip(paths, self.shards):
            if len(tokens) < self.step_tokens + 1:  # the target of the last input is the token after it
                raise UserError(f"{path} holds {len(tokens):,} tokens, expected at least {self.step_tokens + 1:,} for one step "
                                f"(batch size {batch_size} x sequence length {sequence_length} x processes {world_size} + 1); "
                                "lower --batch-size or --sequence-length")
        self.num_tokens = sum(len(tokens) for tokens in self.shards)
        self.batches = sum((len(tokens) - 1) // self.step_tokens for tokens in self.shards)
        self.reset()

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
        if position + self.step_tokens + 1 > len(shard):
            epoch, done = (epoch, done + 1) if done + 1 < len(self.shards) else (epoch + 1, 0)
            shard, position = self.shards[self.shard_order(epoch)[done]], 0
        B, T = self.batch_size, self.sequence_length
        start = position + self.offset
        tokens = shard[start:start + B * T + 1]
        inputs = tokens[:-1].astype(np.int32).reshape(B, T)
        targets = tokens[1:].astype(np.int32).reshape(B, T)
        self.state = epoch, done, position + self.step_tokens
        return inputs, targets

    def fingerprint(self) -> int:
        """A checksum of the length and the first and last tokens of every shard, to recognize the data of a resumed run.

        It does not read all tokens, because that would take long.
        """
        n = FINGERPRINT_TOKENS
        ends = (len(tokens).to_bytes(8, "little") + tokens[:n].tobytes() + tokens[-n:].tobytes() for tokens in self.shards)
        return zlib.crc32(b"".join(ends))
