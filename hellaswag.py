"""HellaSwag: how often does the model rank the right one of four endings as the most likely? The file format and the score.

Source: Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". The file format is llm.c's: a header of
256 little-endian int32 (magic, version, number of examples, bytes of the longest example, then zeros), then the examples, each
of them a sequence of little-endian uint16:

    65535, bytes of this example, its index, label, 4 (number of completions),
    n and the n tokens of the context, then n and the n tokens of each completion

The score is llm.c's, too: the model chooses the completion with the lowest mean cross-entropy per token, given the context.
This length-normalized score is called acc_norm. lm-evaluation-harness normalizes by bytes instead of tokens and formats the
contexts differently, so its scores differ: according to llm.c's notes, GPT-2 124M scores 0.2955 here and 0.3114 there.
"""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError, progress_bar
from files import HEADER_BYTES, atomic_file, make_header, open_file, read_header
from gpt2 import chunks
from tokenizer import GPT2_FINGERPRINT, NO_TOKENIZER, Tokenizer

HELLASWAG_MAGIC = 20240522
HELLASWAG_VERSION = 1
EXAMPLE_START = 65535     # marks the beginning of an example
COMPLETIONS = 4
EXAMPLE_WORDS = 5         # before the context
MAX_UINT16 = 65535        # limits the bytes of an example and the number of examples
REPAIR_HINT = "write it with dev/prepare_hellaswag.py"

TokenLosses = Callable[[np.ndarray, np.ndarray], np.ndarray]    # a model's loss of every token; see completion_losses


class Example(NamedTuple):
    """A context and four completions, each a nonempty sequence of tokens; label: the index of the right completion."""
    context: Sequence[int]
    completions: list[Sequence[int]]
    label: int

    @property
    def length(self) -> int:
        """The longest input for a model, in tokens. The last token of a completion is predicted, but never read."""
        return len(self.context) + max(map(len, self.completions)) - 1


def write_examples(path: str | Path, examples: list[Example]) -> None:
    """Write `examples` to a file. Raises UserError if it cannot be written, ValueError if the format's limits are exceeded."""
    contents = []
    for index, (context, completions, label) in enumerate(examples):
        texts = [word for text in (context, *completions) for word in (len(text), *text)]
        size = 2 * (EXAMPLE_WORDS + len(texts))
        if max(size, len(examples)) > MAX_UINT16:
            raise ValueError(f"{len(examples):,} examples, one of {size:,} bytes, expected at most {MAX_UINT16:,} of both")
        contents.append(np.array([EXAMPLE_START, size, index, label, COMPLETIONS, *texts], dtype="<u2").tobytes())
    with atomic_file(path) as file:
        file.write(make_header(HELLASWAG_MAGIC, HELLASWAG_VERSION, len(examples), max(map(len, contents), default=0)))
        file.writelines(contents)


def read_examples(path: str | Path, vocab_size: int, tokenizer: Tokenizer = NO_TOKENIZER) -> list[Example]:
    """Return the Examples in a file, their tokens as uint16 arrays.

    tokenizer: the model's

    Raises UserError if the file has another format or version, is truncated or damaged, or holds a token >= `vocab_size`; or if
    the tokenizer is not GPT-2's, whose tokens these files hold.
    """
    if tokenizer.fingerprint not in (0, GPT2_FINGERPRINT):
        raise UserError(f"{path} holds GPT-2's tokens, but the model has another tokenizer; leave out --hellaswag")
    with open_file(path, REPAIR_HINT) as file:
        size, _, (num_examples, *_) = read_header(file, path, "a file of HellaSwag examples", HELLASWAG_MAGIC,
                                                  {HELLASWAG_VERSION: "uint16"}, REPAIR_HINT)
        file.seek(HEADER_BYTES)
        words = np.fromfile(file, dtype="<u2")
    if not 1 <= num_examples <= MAX_UINT16:
        raise UserError(f"{path} holds {num_examples:,} examples by its header, expected 1 to {MAX_UINT16:,}; {REPAIR_HINT}")

    examples, position = [], 0
    for index in range(num_examples):
        try:
            example, length = parse_example(words[position:], index)
        except ValueError as error:
            raise UserError(f"{path}, example {index:,} of {num_examples:,}: {error}; {REPAIR_HINT}") from error
        largest = max(int(text.max()) for text in (example.context, *example.completions))
        if largest >= vocab_size:   # the embedding kernel would read past the end of its table
            raise UserError(f"{path}, example {index:,} holds token {largest:,}, expected tokens below the model's vocabulary "
                            f"of {vocab_size:,}; take a model with GPT-2's")
        examples.append(example)
        position += length
    rest = size - HEADER_BYTES - 2 * position
    if rest > 0:
        raise UserError(f"{path} has {rest:,} bytes after the {num_examples:,} examples of its header, expected none; "
                        f"{REPAIR_HINT}")
    return examples


def parse_example(words, index):
    """Return the Example at the start of `words` (uint16) and its length in words. Raises ValueError if it is malformed."""
    if len(words) < EXAMPLE_WORDS:
        raise ValueError(f"found the end of the file, after {2 * len(words)} bytes")
    start, size, found, label, completions = (int(word) for word in words[:EXAMPLE_WORDS])
    if (start, found, completions) != (EXAMPLE_START, index, COMPLETIONS):
        raise ValueError(f"it begins with {start}, has index {found} and {completions} completions, "
                         f"expected {EXAMPLE_START}, {index} and {COMPLETIONS}")
    if label >= COMPLETIONS:
        raise ValueError(f"the label is {label}, expected 0 to {COMPLETIONS - 1}")
    if size % 2 != 0 or size > 2 * len(words):
        raise ValueError(f"it has {size:,} bytes, expected an even number up to {2 * len(words):,}, the rest of the file")

    texts, rest = [], words[EXAMPLE_WORDS:size // 2]
    while len(rest) > 0:
        length = int(rest[0])
        if not 1 <= length < len(rest):
            raise ValueError(f"a text of {length:,} tokens, expected 1 to {len(rest) - 1:,}, the end of the example")
        texts.append(rest[1:1 + length])
        rest = rest[1 + length:]
    if len(texts) != 1 + COMPLETIONS:
        raise ValueError(f"{len(texts)} texts, expected a context and {COMPLETIONS} completions")
    return Example(texts[0], texts[1:], label), size // 2


def completion_losses(token_losses: TokenLosses, examples: list[Example], batch_size: int,
                      sequence_length: int) -> np.ndarray:
    """Return the mean cross-entropy of every completion given its context, in nats per token: (examples, 4) float64.

    token_losses(tokens, targets) is the model. Both are int32 (B, T) with B <= batch_size and T <= sequence_length; it returns
    the cross-entropy of each target given the tokens before it, float32 (B*T,).

    If a context and completion are too long for the model, their first tokens are dropped. Raises UserError if a loss is not
    finite.
    """
    rows = [np.concatenate([example.context, completion])[-1 - sequence_length:]
            for example in examples for completion in example.completions]
    scored = [min(len(completion), sequence_length) for example in examples for completion in example.completions]
    means = np.empty(len(rows))

    # Sorted by length, so that a batch needs little padding; longest first, so that the time left is never underestimated.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches = [order[batch] for batch in chunks(len(rows), batch_size)]
    with progress_bar("hellaswag", len(batches), " batches") as bar:
        for batch in batches:
            B, T = len(batch), len(rows[batch[0]]) - 1
            tokens, targets = np.zeros((2, B, T), dtype=np.int32)
            for b, i in enumerate(batch):
                length = len(rows[i]) - 1
                tokens[b, :length], targets[b, :length] = rows[i][:-1], rows[i][1:]    # causal attention never sees the padding
            losses = token_losses(tokens, targets).reshape(B, T)
            for b, i in enumerate(batch):
                length = len(rows[i]) - 1
                means[i] = losses[b, length - scored[i]:length].mean(dtype=np.float64)
            bar.update()
    if not np.isfinite(means).all():
        raise UserError(f"the loss of example {np.isfinite(means).argmin() // COMPLETIONS:,} of HellaSwag is not finite: "
                        "the model's weights are damaged, or it diverged in training; take another --model")
    return means.reshape(-1, COMPLETIONS)


def count_correct(token_losses: TokenLosses, examples: list[Example], batch_size: int, sequence_length: int) -> int:
    """Count the examples whose completion with the lowest mean loss is the right one. Arguments: see completion_losses."""
    choices = completion_losses(token_losses, examples, batch_size, sequence_length).argmin(axis=1)
    return sum(int(choice) == example.label for choice, example in zip(choices, examples))
