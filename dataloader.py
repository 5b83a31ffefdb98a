"""Token files, and the batches of inputs and targets read from them in llm.c's order.

A token file is a header of 256 little-endian int32 (magic, version, number of tokens, then zeros) followed by the tokens as
little-endian uint16. A text larger than memory is split over several such files, the shards.
"""

import glob
import os
import zlib
from functools import lru_cache

import numpy as np

from cli import UserError
from files import HEADER_BYTES, atomic_file, make_header, read_header

MAGIC = 20240520
VERSION = 1
TOKEN_BYTES = 2
FINGERPRINT = 65536     # tokens at either end of a file
REPAIR_HINT = "write it again with prepare_text.py or prepare_tinyshakespeare.py"


def write_tokens(path, tokens):
    """Write `tokens` (a sequence of integers below 65,536) as one token file. Raises UserError if it cannot be written."""
    write_runs(path, [tokens])


def write_runs(path, runs):
    """Write all `runs` of tokens, one after the other, as one token file, however long; return how many tokens it has.

    Raises UserError if it cannot be written.
    """
    num_tokens = 0
    with atomic_file(path) as file:
        file.seek(HEADER_BYTES)
        for tokens in runs:
            tokens = np.asarray(tokens)
            if tokens.size > 0 and not 0 <= tokens.min() <= tokens.max() < 65536:
                raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}, expected 0 to 65535")
            file.write(tokens.astype("<u2").tobytes())
            num_tokens += len(tokens)
        file.seek(0)
        file.write(make_header(MAGIC, VERSION, num_tokens))
    return num_tokens


def open_tokens(path, vocab_size):
    """Return the tokens of a file, (n,) uint16, mapped from the disk rather than read into memory.

    Raises UserError if it is no token file of this version, is cut short, or holds a token that is not below `vocab_size`.
    """
    size, _, (num_tokens, *_) = read_header(path, "a token file", MAGIC, {VERSION: "uint16"}, REPAIR_HINT)
    expected_size = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if size != expected_size:
        raise UserError(f"{path} has {size:,} bytes, expected {expected_size:,} for the {num_tokens:,} tokens of its header; "
                        f"{REPAIR_HINT}")
    if num_tokens == 0:
        raise UserError(f"{path} holds no tokens; {REPAIR_HINT}")

    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
    # An id outside the vocabulary would make the embedding kernel read past its table. One pass over the file, reading only.
    largest = int(tokens.max())
    if largest >= vocab_size:
        where = int(tokens.argmax())
        raise UserError(f"{path} holds token {largest:,} at position {where:,}, expected tokens below the model's vocabulary "
                        f"of {vocab_size:,}; prepare it with the model's tokenizer")
    return tokens


@lru_cache(maxsize=1)      # every batch asks for it
def shuffled(num_files, seed, epoch):
    """The order in which a round visits the files, as indices."""
    return np.random.default_rng([seed, epoch]).permutation(num_files)


class DataLoader:
    """Batches from every token file that `pattern` (a path or a glob) matches, in the order of their names.

    A step takes B*T tokens for each of `world_size` processes, one process after the other; `rank` is this process. A file is
    left when too few of its tokens remain for a whole step, and after the last file a new round of all files begins. With a
    shuffle_seed every round has another order, which depends on the seed alone.

    num_tokens: tokens in all files together
    batches: steps before the first batch comes again
    state: where the next step starts, (round, how many of its files are done, token in the next); may be saved and set again

    Raises UserError if no file matches, a file is not sound (see open_tokens) or one is too short for a step.
    """

    START = 0, 0, 0

    def __init__(self, pattern, batch_size, sequence_length, vocab_size, rank=0, world_size=1, shuffle_seed=None):
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.offset = rank * batch_size * sequence_length
        self.step_tokens = world_size * batch_size * sequence_length
        self.shuffle_seed = shuffle_seed

        # A plain path first: a folder's own name may hold a glob's brackets.
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(str(pattern)))
        if not paths:
            raise UserError(f"no file matches {pattern}, expected token files; write them with prepare_text.py")
        self.shards = [open_tokens(path, vocab_size) for path in paths]
        for path, tokens in zip(paths, self.shards):
            if len(tokens) < self.step_tokens + 1:  # the last input's target is one token further
                raise UserError(f"{path} holds {len(tokens):,} tokens, expected at least {self.step_tokens + 1:,} for one step "
                                f"(batch size {batch_size} x sequence length {sequence_length} x processes {world_size} + 1); "
                                "lower --batch-size or --sequence-length")
        self.num_tokens = sum(len(tokens) for tokens in self.shards)
        self.batches = sum((len(tokens) - 1) // self.step_tokens for tokens in self.shards)
        self.reset()

    def reset(self):
        """Start again at the first token of the first round."""
        self.state = self.START

    def order(self, epoch):
        """The order in which a round visits the files, as indices."""
        num_files = len(self.shards)
        return range(num_files) if self.shuffle_seed is None else shuffled(num_files, self.shuffle_seed, epoch)

    def next_batch(self):
        """Return inputs (B, T) and targets (B, T), two new int32 arrays; a target is the token after its input."""
        epoch, done, position = self.state
        shard = self.shards[self.order(epoch)[done]]
        if position + self.step_tokens + 1 > len(shard):
            epoch, done = (epoch, done + 1) if done + 1 < len(self.shards) else (epoch + 1, 0)
            shard, position = self.shards[self.order(epoch)[done]], 0
        B, T = self.batch_size, self.sequence_length
        start = position + self.offset
        tokens = shard[start:start + B * T + 1]
        inputs = tokens[:-1].astype(np.int32).reshape(B, T)
        targets = tokens[1:].astype(np.int32).reshape(B, T)
        self.state = epoch, done, position + self.step_tokens
        return inputs, targets

    def fingerprint(self):
        """A number that other tokens most likely do not have: of every file's length and first and last tokens.

        Not of all tokens: there may be many gigabytes, and what it is for is a file of another name or another preparation.
        """
        ends = b"".join(len(tokens).to_bytes(8, "little") + tokens[:FINGERPRINT].tobytes() + tokens[-FINGERPRINT:].tobytes()
                        for tokens in self.shards)
        return zlib.crc32(ends)
