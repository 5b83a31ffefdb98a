"""Models as GGUF files, which llama.cpp, Ollama and others run: writing them, and reading them back.

A GGUF file holds metadata (key -> value), the name, shape, kind and position of each tensor, and the data. The package gguf
writes it, and converts numbers to every kind and back. What is in front of the data we read ourselves, because the package's
reader is not made for untrusted files: it loops as often as a count in the file says, even beyond the end of the file, and
makes an array of every token and every number.

llama.cpp itself computes less exactly than the numbers in the file allow: its GELU is a table of float16, and it rounds the
activations to 8 bits where the weights have 4 or 8.
"""
import contextlib
import json
import math
import os
import struct
from math import prod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

import gpt2
import llama
import llama_files
from cli import UserError, note, progress_bar
from files import REPAIR_HINT, atomic_file, open_file, short_repr
from gpt2 import Config, Tensors, ceil_div, chunks
from hugging_face import join_names, make_config, stored_tensors
from llama import definition_of
from machine import check_memory, main_memory, usable_cores
from tokenizer import Tokenizer, merge_lines, tokenizer_from_files

MAGIC = b"GGUF"
VERSIONS = 2, 3
ARCHITECTURE = "gpt2"       # of GPT-2; llama_files.MODEL_TYPES has Llama's
EPSILON = 1e-5              # of GPT-2's layernorm
STRIP_NUMBERS = 2**18       # read at a time
MAX_HEADER_BYTES = 2**25    # what is in front of the data; GPT-2's has 1.7 MB, almost all of it tokens and merges
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,      # 8-bit integers, and a scale for each 32 of them
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}

# GPT-2's tensors -> llama.cpp's, which are one per layer. All have our shapes, except that wte has no padding rows.
NAMES = {
    "wte": "token_embd.weight",
    "wpe": "position_embd.weight",
    "ln1w": "blk.{layer}.attn_norm.weight",
    "ln1b": "blk.{layer}.attn_norm.bias",
    "qkvw": "blk.{layer}.attn_qkv.weight",
    "qkvb": "blk.{layer}.attn_qkv.bias",
    "attprojw": "blk.{layer}.attn_output.weight",
    "attprojb": "blk.{layer}.attn_output.bias",
    "ln2w": "blk.{layer}.ffn_norm.weight",
    "ln2b": "blk.{layer}.ffn_norm.bias",
    "fcw": "blk.{layer}.ffn_up.weight",
    "fcb": "blk.{layer}.ffn_up.bias",
    "fcprojw": "blk.{layer}.ffn_down.weight",
    "fcprojb": "blk.{layer}.ffn_down.bias",
    "lnfw": "output_norm.weight",
    "lnfb": "output_norm.bias",
}
STORED_KINDS = {    # kinds that kernels_cpu.py multiplies as they are -> kind in a file, dtype of the array
    "float32": (GGMLQuantizationType.F32, np.float32),
    "bfloat16": (GGMLQuantizationType.BF16, np.uint16),
    "int8": (GGMLQuantizationType.Q8_0, np.int8),
    "int4": (GGMLQuantizationType.Q4_0, np.uint8),
}
CLASSIFIER_NAME = "output.weight"    # a second copy of wte that some files of a GPT-2 have

SPECIAL_KEYS = {name: f"tokenizer.ggml.{name}" for name in ("bos_token_id", "eos_token_id")} | {
    "pad_token_id": "tokenizer.ggml.padding_token_id"}
TOKENIZER = "gpt2"          # llama.cpp's name of byte-level BPE
LLAMA_3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                   r"\s+(?!\S)|\s+")


class Splitter(NamedTuple):
    """How a byte-level BPE splits a text before it merges bytes, as the package tokenizers describes it."""
    digits: bool = False            # each digit is apart
    pattern: str | None = None      # other than GPT-2's
    ignore_merges: bool = False     # a part that is a token is not merged from bytes
    normalizer: dict | None = None
    adds_bos: bool = False          # unless the file says otherwise

    def pre_tokenizer(self):
        """Its pre_tokenizer in a tokenizer.json."""
        steps = [{"type": "Digits", "individual_digits": True}] * self.digits
        if self.pattern:
            steps.append({"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False})
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not self.pattern})
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


SPLITTERS = {   # by llama.cpp's names
    "gpt-2": Splitter(),
    "smollm": Splitter(digits=True),
    "llama-bpe": Splitter(pattern=LLAMA_3_PATTERN, ignore_merges=True, adds_bos=True),
    "qwen2": Splitter(pattern=LLAMA_3_PATTERN.replace("{1,3}", ""), normalizer={"type": "NFC"}),
}
FOLDER_HINT = "convert it to a folder instead"
KIND_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}

UINT64 = struct.Struct("<Q")
SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


def gguf_tensors(config):
    """stored_tensors in a GGUF file. The rows of a Llama's queries and keys are in another order there: llama_files.ROTATED."""
    return stored_tensors(config, llama_files.GGUF_NAMES if definition_of(config) is llama else NAMES)


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def write_gguf(path: str | Path, config: Config, params: Tensors, tokenizer: Tokenizer, type: str = "f32") -> None:
    """Write a model for llama.cpp.

    type: a key of FILE_TYPES, of the matrices. In q8_0 and q4_0, those whose rows are no multiple of 32 become f16. Biases,
        layernorm weights and position embeddings stay f32, as llama.cpp expects.

    Raises UserError if llama.cpp has no such tokenizer, if the type cannot hold a number, or if writing fails.
    """
    tokens, types, merges, splitter = vocabulary(tokenizer, config.vocab_size)
    architecture, fields, factors = ARCHITECTURE, gpt2_fields, None
    if definition_of(config) is llama:
        architecture, fields = "qwen2" if config.qkv_bias else "llama", llama_files.llama_fields
        if config.rope_scaling:
            factors = llama_files.rope_factors(config)
            llama_files.with_rope_factors(path, config, factors)    # or else nobody could read it back
    kinds = {name: kind_of(ours, shape, GGMLQuantizationType[type.upper()]) for name, shape, ours, _ in gguf_tensors(config)}
    with atomic_file(path) as file, contextlib.closing(GGUFWriter(file.name, architecture)) as writer:
        writer.add_file_type(FILE_TYPES[type])
        writer.add_quantization_version(2)
        for key, value in fields(config).items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{architecture}.{key}", value)
        writer.add_tokenizer_model(TOKENIZER)
        writer.add_tokenizer_pre(splitter)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        for name, token in special_tokens(tokenizer).items():
            writer.add_uint32(SPECIAL_KEYS[name], token)
        writer.add_add_bos_token(bool(tokenizer.prefix))
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)
        for name, shape, *_ in gguf_tensors(config):
            num_bytes = prod(quant_shape_to_byte_shape(shape, kinds[name]))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, kinds[name])
        if factors is not None:
            writer.add_tensor_info(llama_files.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(f"writing {path}", 4 * params.size, "B") as bar:
            for name, _, ours, index in gguf_tensors(config):
                numbers = getattr(params, ours)[index]
                if architecture == "llama" and llama_files.ROTATED.fullmatch(name):
                    numbers = llama_files.to_neighbors(numbers, config.head_size)
                writer.write_tensor_data(converted(name, numbers, kinds[name]))
                bar.update(numbers.nbytes)
            if factors is not None:
                writer.write_tensor_data(factors)


def gpt2_fields(config):
    """The metadata of a GPT-2, without the architecture's name before each key: key -> value."""
    return {"context_length": config.max_seq_len, "embedding_length": config.channels, "block_count": config.num_layers,
            "feed_forward_length": 4 * config.channels, "attention.head_count": config.num_heads,
            "attention.layer_norm_epsilon": EPSILON}


def kind_of(ours, shape, kind):
    """The kind of a tensor in a file whose matrices are of `kind`."""
    block, _ = GGML_QUANT_SIZES[kind]
    if len(shape) == 1 or ours == "wpe":
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % block else kind


def converted(name, view, kind):
    """A tensor as numbers of a kind. Raises UserError if the kind cannot hold one."""
    if kind == GGMLQuantizationType.F32:
        return view
    try:
        with np.errstate(over="raise", invalid="raise"):
            return quantize(view, kind)
    except FloatingPointError as error:
        raise UserError(f"{name} has numbers that {kind.name.lower()} cannot hold; choose --type f32 or bf16") from error


def vocabulary(tokenizer, rows):
    """The tokens of a vocabulary of `rows`, their types, the merges, and llama.cpp's name of the way to split a text.

    Raises UserError if llama.cpp would turn a text into other tokens.
    """
    try:
        library = tokenizer.to_library()
    except UserError as error:
        raise UserError(f"{error}, and llama.cpp needs a byte-level BPE with merges; {FOLDER_HINT}") from error
    settings = json.loads(library.to_str())
    model, normalizer = settings["model"], settings["normalizer"]
    if model["type"] != "BPE" or not model["merges"]:
        found = model["type"] + " without merges" * (model["type"] == "BPE")
        raise UserError(f"the model's tokenizer is {found}, and llama.cpp needs a byte-level BPE with merges; {FOLDER_HINT}")
    own_ways = [name for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    splitter = splitter_of(settings["pre_tokenizer"])
    if splitter is None:
        own_ways.append(f"the pre-tokenizer {(settings['pre_tokenizer'] or {}).get('type')}")
    elif (model.get("ignore_merges") is True) != SPLITTERS[splitter].ignore_merges:
        own_ways.append("ignore_merges")
    if normalizer and normalizer["type"] != "NFC":
        own_ways.append(f"the normalizer {normalizer['type']}")
    if own_ways:
        raise UserError(f"the model's tokenizer has {join_names(own_ways)}, and llama.cpp would split text as GPT-2 does; "
                        f"{FOLDER_HINT}")
    if normalizer:
        note("the model's tokenizer composes characters (Unicode's NFC); llama.cpp does not, and few texts need it")
    if (settings["pre_tokenizer"] or {}).get("add_prefix_space"):
        note("the model's tokenizer puts a space before a text; llama.cpp does not, so put one before your prompts")
    if tokenizer.vocab_size > rows:
        raise UserError(f"the model's tokenizer has {tokenizer.vocab_size:,} tokens, expected at most {rows:,}, as many as the "
                        f"model; {FOLDER_HINT}")
    tokens, types = [f"[PAD{id}]" for id in range(rows)], rows * [TokenType.UNUSED]
    for token, id in library.get_vocab().items():
        tokens[id], types[id] = token, TokenType.NORMAL
    for id, token in library.get_added_tokens_decoder().items():
        types[id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return tokens, types, merge_lines(model["merges"]), splitter


def splitter_of(pre_tokenizer):
    """The key of SPLITTERS with a pre_tokenizer of a tokenizer.json; None if there is none."""
    def essence(step):
        return {key: value for key, value in step.items() if key not in ("trim_offsets", "add_prefix_space")}

    def steps(pre_tokenizer):
        pre_tokenizer = pre_tokenizer or {}
        return list(map(essence, pre_tokenizer.get("pretokenizers", [pre_tokenizer])))
    return next((name for name, splitter in SPLITTERS.items() if steps(splitter.pre_tokenizer()) == steps(pre_tokenizer)), None)


def special_tokens(tokenizer):
    """SPECIAL_KEYS -> token. One that the model lacks is left out, except that its texts begin as they end."""
    first = {name: id[0] if isinstance(id, list) else id for name, id in tokenizer.special_ids.items()}
    known = {name: first.get(name) for name in SPECIAL_KEYS}
    if known["eos_token_id"] is None:
        note("the model has no end-of-text token; llama.cpp takes token 11 for it")
    elif known["bos_token_id"] is None:
        known["bos_token_id"] = known["eos_token_id"]
    return {name: token for name, token in known.items() if token is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Reading

class GGUFTensor(NamedTuple):
    """A tensor as the header has it, still unchecked: its kind, its shape and the position of its bytes in the data."""
    kind: int
    shape: tuple
    offset: int

    @property
    def row_bytes(self):
        return quant_shape_to_byte_shape(self.shape[-1:], self.kind)[0]

    @property
    def num_bytes(self):
        return prod(self.shape[:-1]) * self.row_bytes


class Data(NamedTuple):
    """The data of a file: where it starts, and whether the file has a Llama's order of rows (llama_files.from_neighbors)."""
    path: Path
    start: int
    neighbors: bool
    config: object

    def strips(self, tensor):
        """Yield (slice of rows, their numbers as float32), so that a model is never in memory twice. A vector is one row.

        Raises UserError if the file has become shorter. (A mapped file that shrinks would kill the process.)
        """
        with open_file(self.path, REPAIR_HINT) as file:
            file.seek(self.start + tensor.offset)
            for rows in chunks(prod(tensor.shape[:-1]), max(1, STRIP_NUMBERS // tensor.shape[-1])):
                shape = rows.stop - rows.start, tensor.row_bytes
                contents = np.fromfile(file, np.uint8, prod(shape))
                if len(contents) < prod(shape):
                    raise UserError(f"{self.path} was cut short while it was read; {REPAIR_HINT}")
                with np.errstate(all="ignore"):     # of damaged blocks
                    yield rows, dequantize(contents.reshape(shape), GGMLQuantizationType(tensor.kind))

    def read(self, view, name, tensor):
        """Convert a GGUFTensor to float32 and write it to `view`."""
        for rows, numbers in self.strips(tensor):
            view.reshape(-1, view.shape[-1])[rows] = numbers
        if self.is_permuted(name):
            view[...] = llama_files.from_neighbors(view, self.config.head_size)

    def stored(self, name, tensor, dtype):
        """A matrix as it is stored, an array of a dtype over the file. Copy-on-write: the file never changes."""
        sizes = tensor.shape[0], tensor.row_bytes // np.dtype(dtype).itemsize
        rows = np.asarray(np.memmap(self.path, dtype, "c", self.start + tensor.offset, sizes))
        return llama_files.from_neighbors(rows, self.config.head_size) if self.is_permuted(name) else rows

    def is_permuted(self, name):
        return self.neighbors and llama_files.ROTATED.fullmatch(name)


class Header:
    """Reads what is in front of the data, piece by piece.

    Raises UserError if a piece is longer than what is left of the file, so that a wrong count costs neither memory nor time.
    """

    def __init__(self, file, path):
        size = min(file.seek(0, os.SEEK_END), MAX_HEADER_BYTES)
        file.seek(0)
        self.contents, self.path, self.position = file.read(size), path, 0

    def skip(self, count):
        """Where the next `count` bytes start, which are then behind us."""
        start = self.position
        if start + count > len(self.contents):
            raise UserError(f"{self.path} has a piece of {count:,} bytes at byte {start:,} of its header, expected at most "
                            f"{len(self.contents) - start:,}; {REPAIR_HINT}")
        self.position += count
        return start

    def bytes(self, count):
        start = self.skip(count)
        return self.contents[start:start + count]

    def numbers(self, dtype, count):
        return np.frombuffer(self.bytes(count * np.dtype(dtype).itemsize), dtype).tolist()

    def number(self, dtype):
        return self.numbers(dtype, 1)[0]

    def text(self):
        contents = self.bytes(self.number("<u8"))
        try:
            return contents.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} has {short_repr(contents)} in its header, expected UTF-8; {REPAIR_HINT}") from error

    def texts(self, count):
        """`count` texts, which `text` would read one by one, four times as slowly. It reports what is wrong with them."""
        texts, contents, end = [], self.contents, self.position
        with contextlib.suppress(struct.error, UnicodeDecodeError):
            for _ in range(count):
                start = end + 8
                end = start + UINT64.unpack_from(contents, end)[0]
                if end > len(contents):
                    break
                texts.append(contents[start:end].decode())
                self.position = end
        return texts + [self.text() for _ in range(count - len(texts))]

    def value(self):
        """A number, a text, or a list of them."""
        kind, count = self.number("<u4"), None
        if kind == GGUFValueType.ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
        if kind == GGUFValueType.STRING:
            return self.text() if count is None else self.texts(count)
        if kind not in SCALARS:
            raise UserError(f"{self.path} has a value of type {kind} in its header, expected a number, a text or a list of "
                            f"them; {REPAIR_HINT}")
        return self.number(SCALARS[kind]) if count is None else self.numbers(SCALARS[kind], count)

    def tensor(self):
        *dims, = self.numbers("<u8", self.number("<u4"))
        return GGUFTensor(kind=self.number("<u4"), shape=tuple(reversed(dims)), offset=self.number("<u8"))


def read_gguf(path: str | Path, as_stored: Iterable = ()) -> tuple[Config, Tensors | SimpleNamespace]:
    """Read a model from a GGUF file: its Config and its parameters, converted to float32, wte padded with zeros.

    as_stored: keys of STORED_KINDS: matrices of these kinds are mapped into memory as they lie there, if aligned. If there are
        any, a SimpleNamespace of arrays is returned, or of a list of them with one for each layer. Its wte has no padding.

    Raises UserError if the file is damaged, or holds a model of another architecture than GPT-2's, Llama's or Qwen2's.
    """
    path = Path(path)
    with open_file(path, REPAIR_HINT) as file:
        fields, tensors, start = read_header(file, path)
        config = read_config(path, fields, tensors)
        check_tensors(path, config, tensors, file.seek(0, os.SEEK_END) - start)
    data = Data(path, start, fields["general.architecture"] == "llama", config)
    if llama_files.ROPE_FACTORS in tensors:
        factors = np.empty(config.head_size // 2, np.float32)
        data.read(factors, llama_files.ROPE_FACTORS, tensors[llama_files.ROPE_FACTORS])
        config = llama_files.with_rope_factors(path, config, factors)
    own_classifier = (CLASSIFIER_NAME,) if definition_of(config) is gpt2 else ()
    copies = sorted((tensors[name] for name in (NAMES["wte"], *own_classifier) if name in tensors), key=bits)
    tensors = tensors | {NAMES["wte"]: copies[-1]}
    kinds = {STORED_KINDS[name][0]: STORED_KINDS[name][1] for name in as_stored}
    if len(copies) == 1 and any(tensors[name].kind in kinds for name, *_ in gguf_tensors(config)):
        return config, read_as_stored(data, tensors, kinds)
    shapes = definition_of(config).parameter_shapes(config)
    check_memory(f"the model in {path}", 4 * sum(map(prod, shapes.values())), main_memory(), "this machine",
                 "choose a smaller model")
    params = Tensors(shapes)
    read_all((data, getattr(params, ours)[index], name, tensors[name]) for name, _, ours, index in gguf_tensors(config))
    if len(copies) == 2:
        check_copies(path, params.wte, copies, data.strips(copies[0]))
    return config, params


def read_all(arguments):
    """Call Data.read with each of the arguments on all cores: NumPy computes without Python's lock."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(lambda each: Data.read(*each), arguments))


def read_as_stored(data, tensors, kinds):
    """The parameters of a model for `read_gguf`. kinds: kind in the file -> dtype of the array."""
    definition = definition_of(data.config)

    def is_kept(tensor, ours):
        """Whether the numbers stay as they lie in the file. Numba would compile other kernels for unaligned ones."""
        return (tensor.kind in kinds and ours in definition.MATRICES and ours != "wpe"
                and (data.start + tensor.offset) % np.dtype(kinds[tensor.kind]).itemsize == 0)

    parts = {}      # (our name, layer or None) -> names of the tensors that it consists of
    for name, _, ours, index in gguf_tensors(data.config):
        layer = None if isinstance(index, slice) else index[0] if isinstance(index, tuple) else index
        parts.setdefault((ours, layer), []).append(name)
    kept = {part: all(is_kept(tensors[name], part[0]) and tensors[name].kind == tensors[names[0]].kind for name in names)
            for part, names in parts.items()}
    needed = sum(tensors[name].num_bytes if kept[part] else 4 * prod(tensors[name].shape)
                 for part, names in parts.items() if len(names) > 1 or not kept[part] for name in names)
    check_memory(f"the model in {data.path}", needed, main_memory(), "this machine", "choose a smaller model")
    params, conversions = {name: [] for name, layer in parts if layer is not None}, []
    for (ours, layer), names in parts.items():
        stored = [tensors[name] for name in names]
        if kept[ours, layer]:
            arrays = [data.stored(name, tensors[name], kinds[stored[0].kind]) for name in names]
            array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        else:
            rows = [tensor.shape[0] for tensor in stored]
            array = np.empty((sum(rows), *stored[0].shape[1:]), np.float32)
            views = np.split(array, np.cumsum(rows)[:-1])
            conversions += [(data, view, name, tensors[name]) for view, name in zip(views, names)]
        if layer is None:
            params[ours] = array
        else:
            params[ours].append(array)
    read_all(conversions)
    shapes = definition.parameter_shapes(data.config)
    return SimpleNamespace(**params, **{name: np.empty(shape, np.float32) for name, shape in shapes.items() if 0 in shape})


def read_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer from a GGUF file. One of another kind than GPT-2's is left out, and a note says so.

    Raises UserError if the file is damaged, or holds a model of another architecture.
    """
    path = Path(path)
    with open_file(path, REPAIR_HINT) as file:
        fields, tensors, _ = read_header(file, path)
    rows = read_config(path, fields, tensors).vocab_size
    ids = {name: fields.get(key) for name, key in SPECIAL_KEYS.items()}
    ids = {name: id if type(id) is int and 0 <= id < rows else None for name, id in ids.items()}
    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if splitter == "default":   # which older files have for GPT-2's
        splitter = "gpt-2"
    if kind == TOKENIZER and isinstance(splitter, str) and splitter in SPLITTERS:
        return tokenizer_from_files(tokenizer_files(path, fields, ids, rows, splitter), ids, path, rows)
    note(f"{path} has the tokenizer {short_repr((kind, splitter))}, expected {TOKENIZER} with {', '.join(SPLITTERS)}; it is "
         "left out")
    return Tokenizer(ids)


def read_architecture(path: Path) -> str | None:
    """The architecture that a GGUF file names. Raises UserError if its header is damaged."""
    with open_file(path, REPAIR_HINT) as file:
        return read_header(file, path)[0].get("general.architecture")


def read_header(file, path):
    """Return the metadata (key -> value), name -> GGUFTensor, and the position of the data.

    The latest is kept, since a model and its tokenizer are read one after the other.
    """
    status = os.stat(file.fileno())
    version = path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if version not in latest_header:
        latest_header.clear()
        latest_header[version] = parse_header(file, path)
    return latest_header[version]


latest_header = {}


def parse_header(file, path):
    """What read_header returns, parsed from the file."""
    header = Header(file, path)
    magic, version = header.bytes(len(MAGIC)), header.number("<u4")
    if magic != MAGIC or version not in VERSIONS:
        raise UserError(f"{path} begins with {magic} and version {version:,}, expected {MAGIC} and version "
                        f"{' or '.join(map(str, VERSIONS))}; {REPAIR_HINT}")
    num_tensors, num_fields = header.numbers("<u8", 2)
    fields = {header.text(): header.value() for _ in range(num_fields)}
    tensors = {}
    for _ in range(num_tensors):
        name = header.text()
        if name in tensors:
            raise UserError(f"{path} holds {short_repr(name)} a second time; {REPAIR_HINT}")
        tensors[name] = header.tensor()
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path}: general.alignment is {short_repr(alignment)}, expected a power of two; {REPAIR_HINT}")
    return fields, tensors, ceil_div(header.position, alignment) * alignment


def read_config(path, fields, tensors):
    """Return the Config of a file. Raises UserError if it holds another architecture, or what our models do not compute."""
    architecture, known = fields.get("general.architecture"), (ARCHITECTURE, *llama_files.MODEL_TYPES)
    if architecture not in known:
        raise UserError(f"{path} is a {short_repr(architecture)} model, expected {', '.join(known[:-1])} or {known[-1]}; "
                        "choose a model of one of these architectures")
    embedding = tensors.get(NAMES["wte"])
    rows = embedding.shape[0] if embedding and embedding.shape else None
    if architecture in llama_files.MODEL_TYPES:
        return llama_files.config_from_fields(path, fields, tensors, rows)
    config = make_config(path, {
        "gpt2.context_length": fields.get("gpt2.context_length"),
        f"the number of rows of {NAMES['wte']}": rows,
        "gpt2.block_count": fields.get("gpt2.block_count"),
        "gpt2.attention.head_count": fields.get("gpt2.attention.head_count"),
        "gpt2.embedding_length": fields.get("gpt2.embedding_length"),
    })
    expected = {"gpt2.feed_forward_length": 4 * config.channels, "gpt2.attention.head_count_kv": config.num_heads,
                "gpt2.attention.layer_norm_epsilon": float(np.float32(EPSILON))}
    for key, value in expected.items():
        if fields.get(key, value) != value:
            raise UserError(f"{path}: {key} is {short_repr(fields[key])}, expected {value:.6g}; choose a model that computes "
                            "what GPT-2 does")
    return config


def check_tensors(path, config, tensors, data_bytes):
    """Raise UserError unless `tensors` (name -> GGUFTensor) are the model's, of kinds that we can read, inside the data."""
    if config.num_layers > len(tensors):    # checked first, or stored_tensors() might list billions of layers
        raise UserError(f"{path} has {len(tensors):,} tensors, too few for its {config.num_layers:,} layers; {REPAIR_HINT}")
    shapes = {name: shape for name, shape, *_ in gguf_tensors(config)}
    missing = [name for name in shapes if name not in tensors]
    if definition_of(config) is llama:
        shapes[llama_files.ROPE_FACTORS] = (config.head_size // 2,)
    else:
        shapes[CLASSIFIER_NAME] = (config.vocab_size, config.channels)
    unknown = [short_repr(name) for name in tensors if name not in shapes]
    if missing or unknown:
        faults = f"lacks {join_names(missing)}" * bool(missing), f"holds {join_names(unknown)}" * bool(unknown)
        raise UserError(f"{path} {' and '.join(filter(None, faults))}, expected the tensors of a {definition_of(config).NAME}; "
                        f"{REPAIR_HINT}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise UserError(f"{path}: {name} has the shape {short_repr(tensor.shape)}, expected {shapes[name]}; {REPAIR_HINT}")
        check_kind(path, name, tensor)
        if tensor.offset + tensor.num_bytes > data_bytes:
            raise UserError(f"{path} has {max(data_bytes, 0):,} bytes of data, expected at least "
                            f"{tensor.offset + tensor.num_bytes:,} for {name}; {REPAIR_HINT}")


def check_kind(path, name, tensor):
    """Raise UserError unless the package gguf can convert a tensor to float32, and its rows are whole blocks."""
    try:
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        dequantize(np.zeros((1, block_bytes), np.uint8), GGMLQuantizationType(tensor.kind))
    except (KeyError, NotImplementedError) as error:
        kind = KIND_NAMES.get(tensor.kind, tensor.kind)
        raise UserError(f"{path}: {name} is of the kind {kind}, which the package gguf does not read; choose another file, or "
                        "pip install --upgrade gguf") from error
    if tensor.shape[-1] % block:
        raise UserError(f"{path}: {name} has rows of {tensor.shape[-1]:,} numbers, expected a multiple of {block} for the kind "
                        f"{KIND_NAMES[tensor.kind]}; {REPAIR_HINT}")


def bits(tensor):
    """The bits of a number in a GGUFTensor."""
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    return 8 * block_bytes / block


def check_copies(path, wte, copies, coarser_strips):
    """Raise UserError if the token embedding and the classifier are two matrices, not two copies of one, rounded or not.

    Older converters store both, and llama-quantize rounds the classifier less. We take the finer one for both: it is closer to
    the model as it was trained.

    wte: the finer one, (rows, C)
    copies: the StoredTensors of both, the coarser first
    coarser_strips: what `strips` yields of it
    """
    difference = norm = 0.0
    with np.errstate(all="ignore"):     # of damaged numbers
        for rows, numbers in coarser_strips:
            difference += np.square(wte[rows] - numbers, dtype=np.float64).sum()
            norm += np.square(wte[rows], dtype=np.float64).sum()
    # Rounding to b bits changes a matrix by less than 2**(2-b) of its norm, and to bfloat16 as if it had 9 bits.
    allowed = min(0.5, math.hypot(*(2 ** (2 - min(bits(tensor), 9)) for tensor in copies)))
    if not difference <= allowed**2 * norm:
        raise UserError(f"{path} holds an {CLASSIFIER_NAME} that differs from {NAMES['wte']}, expected one matrix for both; "
                        "choose a model whose classifier is tied to its embedding, as GPT-2's is")
    if difference > 0:
        coarser, finer = (KIND_NAMES[tensor.kind] for tensor in copies)
        note(f"{path} holds the token embedding twice, as {coarser} and {finer}; the latter is used")


def tokenizer_files(path, fields, ids, rows, splitter):
    """The tokenizer in the metadata as a Hugging Face folder has it: name -> contents of its files.

    ids: its special tokens. splitter: a key of SPLITTERS

    Raises UserError if it is damaged.
    """
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
    types = fields.get("tokenizer.ggml.token_type", rows * [int(TokenType.NORMAL)])
    if not (is_list_of(str, tokens) and is_list_of(str, merges) and is_list_of(int, types)
            and len(tokens) == len(set(tokens)) == len(types) == rows):
        raise UserError(f"{path} has a damaged tokenizer, expected {rows:,} different tokens, their types, and merges; "
                        f"{REPAIR_HINT}")
    unused, control, own = map(int, (TokenType.UNUSED, TokenType.CONTROL, TokenType.USER_DEFINED))     # compare faster
    known = {id: token for id, (token, kind) in enumerate(zip(tokens, types)) if kind != unused}
    known_ids = dict(zip(known.values(), known))
    named = {name.removesuffix("_id"): known[id] for name, id in ids.items() if id in known}
    added = {id: {"content": tokens[id], "special": kind == control} for id, kind in enumerate(types)
             if kind in (control, own) and tokens[id] not in named.values()}
    add_bos = fields.get("tokenizer.ggml.add_bos_token", SPLITTERS[splitter].adds_bos) is True
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **named, "add_bos_token": add_bos}
    if isinstance(fields.get("tokenizer.chat_template"), str):
        settings["chat_template"] = fields["tokenizer.chat_template"]
    if splitter != "gpt-2":
        special = {token: kind == control for token, kind in zip(tokens, types) if kind in (control, own)}
        bos = named.get("bos_token") if add_bos else None
        contents = tokenizer_json(known_ids, merges, special, SPLITTERS[splitter], bos)
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {"tokenizer.json": contents, "tokenizer_config.json": settings}
        return {name: json.dumps(value).encode() for name, value in files.items()}
    return {
        "vocab.json": json.dumps(known_ids).encode(),      # GPT-2's: the same bytes
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": json.dumps(settings | ({"added_tokens_decoder": added} if added else {}), indent=2).encode(),
    }


def tokenizer_json(ids, merges, special, splitter, bos):
    """The contents of a tokenizer.json.

    ids: token -> id. special: added token -> whether it is special. bos: the token before every text, or None
    """
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    before_text = bos and {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, first],
                           "pair": [first, second], "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[token], "content": token, "special": value, **flags} for token, value in special.items()],
        "normalizer": splitter.normalizer,
        "pre_tokenizer": splitter.pre_tokenizer(),
        "post_processor": before_text,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": splitter.ignore_merges, "vocab": ids, "merges": merges},
    }


def is_list_of(kind, values):
    return isinstance(values, list) and set(map(type, values)) <= {kind}
