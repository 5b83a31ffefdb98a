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
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from cli import UserError, note, progress_bar
from files import REPAIR_HINT, atomic_file, open_file, short_repr
from gpt2 import MATRICES, Config, Tensors, ceil_div, chunks, parameter_shapes
from hugging_face import join_names, make_config
from machine import check_memory, main_memory
from tokenizer import Tokenizer, merge_lines, tokenizer_from_files

MAGIC = b"GGUF"
VERSIONS = 2, 3
ARCHITECTURE = "gpt2"
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

# Our tensors -> llama.cpp's, which are one per layer. All have our shapes, except that wte has no padding rows.
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
CLASSIFIER = "output.weight"    # a second copy of wte that some files have

SPECIAL_KEYS = {name: f"tokenizer.ggml.{name}" for name in ("bos_token_id", "eos_token_id")} | {
    "pad_token_id": "tokenizer.ggml.padding_token_id"}
TOKENIZER, PRE_TOKENIZER = "gpt2", "gpt-2"      # llama.cpp's names of byte-level BPE and of GPT-2's way to split a text
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


def stored_tensors(config):
    """Yield (name in the file, shape there, our name, index) of each of the model's tensors. It equals our tensor[index]."""
    for ours, shape in parameter_shapes(config).items():
        name = NAMES[ours]
        if "{layer}" in name:
            yield from ((name.format(layer=l), shape[1:], ours, l) for l in range(config.num_layers))
        elif ours == "wte":
            yield name, (config.vocab_size, config.channels), ours, np.s_[:config.vocab_size]
        else:
            yield name, shape, ours, np.s_[:]


def stored_views(config, params):
    """Yield (name in the file, view of the parameters) of each of the model's tensors."""
    for name, _, ours, index in stored_tensors(config):
        yield name, getattr(params, ours)[index]


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def write_gguf(path: str | Path, config: Config, params: Tensors, tokenizer: Tokenizer, type: str = "f32") -> None:
    """Write a model for llama.cpp.

    type: a key of FILE_TYPES, of the matrices. In q8_0 and q4_0, those whose rows are no multiple of 32 become f16. Biases,
        layernorm weights and position embeddings stay f32, as llama.cpp expects.

    Raises UserError if llama.cpp has no such tokenizer, if the type cannot hold a number, or if writing fails.
    """
    tokens, types, merges = vocabulary(tokenizer, config.vocab_size)
    kinds = {name: kind_of(ours, shape, GGMLQuantizationType[type.upper()]) for name, shape, ours, _ in stored_tensors(config)}
    with atomic_file(path) as file, contextlib.closing(GGUFWriter(file.name, ARCHITECTURE)) as writer:
        writer.add_file_type(FILE_TYPES[type])
        writer.add_quantization_version(2)
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.channels)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(4 * config.channels)
        writer.add_head_count(config.num_heads)
        writer.add_layer_norm_eps(EPSILON)
        writer.add_tokenizer_model(TOKENIZER)
        writer.add_tokenizer_pre(PRE_TOKENIZER)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        for name, token in special_tokens(tokenizer).items():
            writer.add_uint32(SPECIAL_KEYS[name], token)
        writer.add_add_bos_token(bool(tokenizer.prefix))
        for name, view in stored_views(config, params):
            num_bytes = prod(quant_shape_to_byte_shape(view.shape, kinds[name]))
            writer.add_tensor_info(name, view.shape, view.dtype, num_bytes, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(f"writing {path}", 4 * params.size, "B") as bar:
            for name, view in stored_views(config, params):
                writer.write_tensor_data(converted(name, view, kinds[name]))
                bar.update(view.nbytes)


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
    """The tokens of a vocabulary of `rows`, their types and the merges.

    Raises UserError if llama.cpp would turn a text into other tokens.
    """
    try:
        library = tokenizer.to_library()
    except UserError as error:
        raise UserError(f"{error}, and llama.cpp needs a byte-level BPE with merges; {FOLDER_HINT}") from error
    settings = json.loads(library.to_str())
    model, splitter, normalizer = settings["model"], settings["pre_tokenizer"] or {}, settings["normalizer"]
    if model["type"] != "BPE" or not model["merges"]:
        found = model["type"] + " without merges" * (model["type"] == "BPE")
        raise UserError(f"the model's tokenizer is {found}, and llama.cpp needs a byte-level BPE with merges; {FOLDER_HINT}")
    own_ways = [name for name in ("byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
                if model.get(name)]
    if splitter.get("type") != "ByteLevel" or splitter.get("use_regex") is False:
        own_ways.append(f"the pre-tokenizer {splitter.get('type')}")
    if normalizer:
        own_ways.append(f"the normalizer {normalizer['type']}")
    if own_ways:
        raise UserError(f"the model's tokenizer has {join_names(own_ways)}, and llama.cpp would split text as GPT-2 does; "
                        f"{FOLDER_HINT}")
    if splitter.get("add_prefix_space"):
        note("the model's tokenizer puts a space before a text; llama.cpp does not, so put one before your prompts")
    if tokenizer.vocab_size > rows:
        raise UserError(f"the model's tokenizer has {tokenizer.vocab_size:,} tokens, expected at most {rows:,}, as many as the "
                        f"model; {FOLDER_HINT}")
    tokens, types = [f"[PAD{id}]" for id in range(rows)], rows * [TokenType.UNUSED]
    for token, id in library.get_vocab().items():
        tokens[id], types[id] = token, TokenType.NORMAL
    for id, token in library.get_added_tokens_decoder().items():
        types[id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return tokens, types, merge_lines(model["merges"])


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

class StoredTensor(NamedTuple):
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
        return StoredTensor(kind=self.number("<u4"), shape=tuple(reversed(dims)), offset=self.number("<u8"))


def read_gguf(path: str | Path, as_stored: Iterable = ()) -> tuple[Config, Tensors | SimpleNamespace]:
    """Read a GPT-2 from a GGUF file: its Config and its parameters, converted to float32, wte padded with zeros.

    as_stored: keys of STORED_KINDS: matrices of these kinds are mapped into memory as they lie there, if aligned. If there are
        any, a SimpleNamespace of arrays is returned, or of a list of them with one for each layer. Its wte has no padding.

    Raises UserError if the file is damaged, or holds another model than a GPT-2.
    """
    path = Path(path)
    with open_file(path, REPAIR_HINT) as file:
        fields, tensors, start = read_header(file, path)
        config = read_config(path, fields, tensors)
        check_tensors(path, config, tensors, file.seek(0, os.SEEK_END) - start)
        copies = sorted((tensors[name] for name in (NAMES["wte"], CLASSIFIER) if name in tensors), key=bits)
        tensors = tensors | {NAMES["wte"]: copies[-1]}
        kinds = {STORED_KINDS[name][0]: STORED_KINDS[name][1] for name in as_stored}
        if len(copies) == 1 and any(tensors[name].kind in kinds for name, *_ in stored_tensors(config)):
            return config, read_as_stored(file, path, start, config, tensors, kinds)
        shapes = parameter_shapes(config)
        check_memory(f"the model in {path}", 4 * sum(map(prod, shapes.values())), main_memory(), "this machine",
                     "choose a smaller model")
        params = Tensors(shapes)
        for name, view in stored_views(config, params):
            for rows, numbers in strips(file, path, start, tensors[name]):
                view.reshape(-1, view.shape[-1])[rows] = numbers
        if len(copies) == 2:
            check_copies(path, params.wte, copies, strips(file, path, start, copies[0]))
    return config, params


def read_as_stored(file, path, start, config, tensors, kinds):
    """The parameters of a model for `read_gguf`. kinds: kind in the file -> dtype of the array."""
    def is_mapped(tensor, ours):
        """Whether an array over the file is used. Numba would compile other kernels for one that is not aligned."""
        return (tensor.kind in kinds and ours in MATRICES and ours != "wpe"
                and (start + tensor.offset) % np.dtype(kinds[tensor.kind]).itemsize == 0)

    converted = sum(4 * prod(shape) for name, shape, ours, _ in stored_tensors(config) if not is_mapped(tensors[name], ours))
    check_memory(f"the model in {path}", converted, main_memory(), "this machine", "choose a smaller model")
    params = {}
    for name, shape, ours, _ in stored_tensors(config):
        tensor = tensors[name]
        if is_mapped(tensor, ours):
            dtype = np.dtype(kinds[tensor.kind])
            sizes = (shape[0], tensor.row_bytes // dtype.itemsize)
            # Copy-on-write: the file never changes.
            array = np.asarray(np.memmap(path, dtype, "c", start + tensor.offset, sizes))
        else:
            array = np.empty(shape, np.float32)
            for rows, numbers in strips(file, path, start, tensor):
                array.reshape(-1, shape[-1])[rows] = numbers
        if "{layer}" in NAMES[ours]:
            params.setdefault(ours, []).append(array)
        else:
            params[ours] = array
    return SimpleNamespace(**params)


def read_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer from a GGUF file. One of another kind than GPT-2's is left out, and a note says so.

    Raises UserError if the file is damaged, or holds another model than a GPT-2.
    """
    path = Path(path)
    with open_file(path, REPAIR_HINT) as file:
        fields, tensors, _ = read_header(file, path)
    rows = read_config(path, fields, tensors).vocab_size
    ids = {name: fields.get(key) for name, key in SPECIAL_KEYS.items()}
    ids = {name: id if type(id) is int and 0 <= id < rows else None for name, id in ids.items()}
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind in ((TOKENIZER, PRE_TOKENIZER), (TOKENIZER, "default")):    # which older files have for GPT-2's
        return tokenizer_from_files(tokenizer_files(path, fields, ids, rows), ids, path, rows)
    note(f"{path} has the tokenizer {short_repr(kind)}, expected {(TOKENIZER, PRE_TOKENIZER)}; it is left out")
    return Tokenizer(ids)


def read_header(file, path):
    """Return the metadata (key -> value), name -> StoredTensor, and the position of the data.

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
    """Return the Config of a file. Raises UserError if it holds another architecture, or what GPT-2 does not compute."""
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{path} is a {short_repr(architecture)} model, expected {ARCHITECTURE}; choose a GPT-2")
    embedding = tensors.get(NAMES["wte"])
    config = make_config(path, {
        "gpt2.context_length": fields.get("gpt2.context_length"),
        f"the number of rows of {NAMES['wte']}": embedding.shape[0] if embedding and embedding.shape else None,
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
    """Raise UserError unless `tensors` (name -> StoredTensor) are the model's, of kinds that we can read, inside the data."""
    if config.num_layers > len(tensors):    # checked first, or stored_tensors() might list billions of layers
        raise UserError(f"{path} has {len(tensors):,} tensors, too few for its {config.num_layers:,} layers; {REPAIR_HINT}")
    shapes = {name: shape for name, shape, *_ in stored_tensors(config)} | {CLASSIFIER: (config.vocab_size, config.channels)}
    missing = [name for name in shapes if name not in tensors and name != CLASSIFIER]
    unknown = [short_repr(name) for name in tensors if name not in shapes]
    if missing or unknown:
        faults = f"lacks {join_names(missing)}" * bool(missing), f"holds {join_names(unknown)}" * bool(unknown)
        raise UserError(f"{path} {' and '.join(filter(None, faults))}, expected the tensors of a GPT-2; {REPAIR_HINT}")
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


def strips(file, path, start, tensor):
    """Yield (slice of rows, their numbers as float32), so that a model is never in memory twice. A vector is one row.

    Raises UserError if the file has become shorter. (A mapped file that shrinks would kill the process.)
    """
    file.seek(start + tensor.offset)
    for rows in chunks(prod(tensor.shape[:-1]), max(1, STRIP_NUMBERS // tensor.shape[-1])):
        shape = rows.stop - rows.start, tensor.row_bytes
        contents = np.fromfile(file, np.uint8, prod(shape))
        if len(contents) < prod(shape):
            raise UserError(f"{path} was cut short while it was read; {REPAIR_HINT}")
        with np.errstate(all="ignore"):     # of damaged blocks
            yield rows, dequantize(contents.reshape(shape), GGMLQuantizationType(tensor.kind))


def bits(tensor):
    """The bits of a number in a StoredTensor."""
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
        raise UserError(f"{path} holds an {CLASSIFIER} that differs from {NAMES['wte']}, expected one matrix for both; choose "
                        "a model whose classifier is tied to its embedding, as GPT-2's is")
    if difference > 0:
        coarser, finer = (KIND_NAMES[tensor.kind] for tensor in copies)
        note(f"{path} holds the token embedding twice, as {coarser} and {finer}; the latter is used")


def tokenizer_files(path, fields, ids, rows):
    """The tokenizer in the metadata as a Hugging Face folder has it: name -> contents of its files.

    ids: its special tokens

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
    named = {name.removesuffix("_id"): known[id] for name, id in ids.items() if id in known}
    added = {id: {"content": tokens[id], "special": kind == control} for id, kind in enumerate(types)
             if kind in (control, own) and tokens[id] not in named.values()}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **named,
                "add_bos_token": fields.get("tokenizer.ggml.add_bos_token") is True}
    return {
        "vocab.json": json.dumps(dict(zip(known.values(), known))).encode(),      # GPT-2's: the same bytes
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": json.dumps(settings | ({"added_tokens_decoder": added} if added else {}), indent=2).encode(),
    }


def is_list_of(kind, values):
    return isinstance(values, list) and set(map(type, values)) <= {kind}
