"""HellaSwag: how often does the model find the right one of four endings the most likely? Its files, and the score.

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". A file of examples, which is llm.c's, is a header
of 256 little-endian int32 (magic, version, number of examples, bytes of the longest, then zeros), then the examples. Each is
a run of little-endian uint16:

    65535, the bytes of this example, its index, the label, 4 (completions),
    n and the n tokens of the context, then n and the n tokens of each completion

The score is llm.c's, too: the model chooses the completion whose tokens have the least mean cross-entropy after the context.
To divide by a completion's length is what is called acc_norm; lm-evaluation-harness divides by its bytes, and words the
contexts differently, so its scores are others (llm.c's notes on GPT-2 124M: 0.2955, and 0.3114 by the harness).
"""
from typing import NamedTuple

import numpy as np

from cli import ProgressBar, UserError
from files import HEADER_BYTES, atomic_file, make_header, read_header
from gpt2 import chunks

MAGIC = 20240522
VERSION = 1
START = 65535
COMPLETIONS = 4
EXAMPLE_WORDS = 5         # before the context
LARGEST = 65535           # bytes of an example, and examples in a file
REPAIR_HINT = "write it with dev/prepare_hellaswag.py"


class Example(NamedTuple):
    """A context and its four completions, sequences of tokens of which none is empty, and which completion is right: 0 to 3."""
    context: np.ndarray
    completions: list
    label: int

    @property
    def length(self):
        """How many tokens a model has to read of it at once: the last one of all is only predicted."""
        return len(self.context) + max(map(len, self.completions)) - 1


def write_examples(path, examples):
    """Write `examples` as one file. Raises UserError if it cannot be written, ValueError for what the format cannot hold."""
    contents = []
    for index, (context, completions, label) in enumerate(examples):
        texts = [word for text in (context, *completions) for word in (len(text), *text)]
        size = 2 * (EXAMPLE_WORDS + len(texts))
        if max(size, len(examples)) > LARGEST:
            raise ValueError(f"{len(examples):,} examples, one of {size:,} bytes, expected at most {LARGEST:,} of both")
        contents.append(np.array([START, size, index, label, COMPLETIONS, *texts], dtype="<u2").tobytes())
    with atomic_file(path) as file:
        file.write(make_header(MAGIC, VERSION, len(examples), max(map(len, contents), default=0)))
        file.writelines(contents)


def read_examples(path, vocab_size):
    """Return the Examples of a file, their texts uint16.

    Raises UserError if it is no file of examples of this version, is cut short or damaged, or holds a token that is not below
    `vocab_size`.
    """
    size, _, (num_examples, *_) = read_header(path, "a file of HellaSwag examples", MAGIC, {VERSION: "uint16"}, REPAIR_HINT)
    if not 1 <= num_examples <= LARGEST:
        raise UserError(f"{path} holds {num_examples:,} examples by its header, expected 1 to {LARGEST:,}; {REPAIR_HINT}")

    words = np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)
    examples, position = [], 0
    for index in range(num_examples):
        try:
            example, length = parse_example(words[position:], index)
        except ValueError as error:
            raise UserError(f"{path}, example {index:,} of {num_examples:,}: {error}; {REPAIR_HINT}") from error
        largest = max(int(text.max()) for text in (example.context, *example.completions))
        if largest >= vocab_size:   # would make the embedding kernel read past its table
            raise UserError(f"{path}, example {index:,} holds token {largest:,}, expected tokens below the model's vocabulary "
                            f"of {vocab_size:,}; take a model with GPT-2's")
        examples.append(example)
        position += length
    rest = size - HEADER_BYTES - 2 * position
    if rest > 0:
        raise UserError(f"{path} goes on for {rest:,} bytes after the {num_examples:,} examples of its header; {REPAIR_HINT}")
    return examples


def parse_example(words, index):
    """The Example with which `words` (uint16) begins, and how many of them it takes. Raises ValueError if they are none."""
    if len(words) < EXAMPLE_WORDS:
        raise ValueError(f"found the end of the file, after {2 * len(words)} bytes")
    start, size, found, label, completions = (int(word) for word in words[:EXAMPLE_WORDS])
    if (start, found, completions) != (START, index, COMPLETIONS):
        raise ValueError(f"it begins with {start}, has index {found} and {completions} completions, "
                         f"expected {START}, {index} and {COMPLETIONS}")
    if label >= COMPLETIONS:
        raise ValueError(f"the label is {label}, expected 0 to {COMPLETIONS - 1}")
    if size % 2 != 0 or size > 2 * len(words):
        raise ValueError(f"it has {size:,} bytes, expected an even number up to {2 * len(words):,}, all that follow")

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


def completion_losses(token_losses, examples, batch_size, sequence_length):
    """The mean cross-entropy of every completion, in nats a token, each given its context: (examples, 4) float64.

    token_losses(tokens, targets) is the model: from int32 arrays (B, T), with B up to batch_size and T up to sequence_length,
    to the cross-entropy of each target given the tokens before it, float32 (B*T,).

    Of a context and completion that are too long for the model, the latest tokens remain. Raises UserError if a loss is not
    a finite number.
    """
    rows = [np.concatenate([example.context, completion])[-1 - sequence_length:]
            for example in examples for completion in example.completions]
    scored = [min(len(completion), sequence_length) for example in examples for completion in example.completions]
    means = np.empty(len(rows))

    # Rows of about the same length go together, so that there is little padding; the longest first, so that it gets faster.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches = [order[batch] for batch in chunks(len(rows), batch_size)]
    with ProgressBar("hellaswag", len(batches)) as bar:
        for batch in batches:
            B, T = len(batch), len(rows[batch[0]]) - 1
            tokens, targets = np.zeros((2, B, T), dtype=np.int32)
            for b, i in enumerate(batch):
                length = len(rows[i]) - 1
                tokens[b, :length], targets[b, :length] = rows[i][:-1], rows[i][1:]    # attention never sees the padding
            losses = token_losses(tokens, targets).reshape(B, T)
            for b, i in enumerate(batch):
                length = len(rows[i]) - 1
                means[i] = losses[b, length - scored[i]:length].mean(dtype=np.float64)
            bar.advance()
    if not np.isfinite(means).all():
        raise UserError(f"the loss of example {np.isfinite(means).argmin() // COMPLETIONS:,} of HellaSwag is not finite: "
                        "the model's weights are damaged, or it diverged in training; take another --model")
    return means.reshape(-1, COMPLETIONS)


def count_correct(token_losses, examples, batch_size, sequence_length):
    """How many of the examples' completions with the least mean loss are the right ones; see completion_losses."""
    choices = completion_losses(token_losses, examples, batch_size, sequence_length).argmin(axis=1)
    return sum(int(choice) == example.label for choice, example in zip(choices, examples))
