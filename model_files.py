"""Models on disk: Hugging Face folders and .safetensors files, models on the Hugging Face hub, and llm.c checkpoints.

Model files are untrusted input: everything in a header is checked before it is used, and memory is allocated only for data
that the file really holds. Pickles are never opened, because opening one can run any program. Every error is one line.

A safetensors file holds the length of the header (8 bytes), the header (JSON: each tensor's dtype, shape and position in the
data) and the data. We do not use the safetensors package: the format takes a page of code, the package's errors are not
written for users, and it cannot load bfloat16 into NumPy.
"""
import contextlib
import json
import os
import re
import textwrap
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from files import (HEADER_BYTES, MAX_JSON_BYTES, REPAIR_HINT, atomic_file, make_header, open_file, parse_json, read_header,
                   read_json, short_repr)
from gpt2 import CHANNELS_PER_HEAD, VOCABULARY, Config, Tensors, chunks, padded, parameter_shapes
from machine import check_memory, main_memory
from tokenizer import NO_TOKENIZER, SPECIAL_IDS, TOKENIZER_FILES, GPT2Tokenizer, Tokenizer, load_tokenizer

HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]

# Our tensors -> Hugging Face's, which are one per layer. Some files prefix the names with "transformer.".
HUGGING_FACE_NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln1w": "h.{layer}.ln_1.weight",
    "ln1b": "h.{layer}.ln_1.bias",
    "qkvw": "h.{layer}.attn.c_attn.weight",
    "qkvb": "h.{layer}.attn.c_attn.bias",
    "attprojw": "h.{layer}.attn.c_proj.weight",
    "attprojb": "h.{layer}.attn.c_proj.bias",
    "ln2w": "h.{layer}.ln_2.weight",
    "ln2b": "h.{layer}.ln_2.bias",
    "fcw": "h.{layer}.mlp.c_fc.weight",
    "fcb": "h.{layer}.mlp.c_fc.bias",
    "fcprojw": "h.{layer}.mlp.c_proj.weight",
    "fcprojb": "h.{layer}.mlp.c_proj.bias",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
PREFIX = "transformer."
TRANSPOSED = ("qkvw", "attprojw", "fcw", "fcprojw")     # Hugging Face's Conv1D stores weights as (in, out)
CAUSAL_MASKS = r"h\.\d+\.attn\.(masked_)?bias"          # constants in older files
TIED_HEAD = "lm_head.weight"                            # some files store wte a second time, as the classifier

# The supported values of the other settings in config.json. The first is the default, as in transformers.
SUPPORTED_SETTINGS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
CONFIG_SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
SIZES_KEY = "gpt2_sizes"        # of CONFIG_SIZES as JSON, in the metadata of some of our safetensors files

# dtype in a file -> in NumPy, which lacks bfloat16: its bits are the upper half of a float32.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

LLMC_MAGIC = 20240326
LLMC_VERSIONS = {3: "float32", 5: "bfloat16"}
LLMC_SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels")

MODEL_FILES = "model.safetensors", "config.json", *TOKENIZER_FILES
MAX_NAMES = 8                   # in an error
STRIP_ROWS = 64                 # rows transposed at a time: the strip fits in the cache, which is three times as fast
STRIP_NUMBERS = 2**18           # read at a time where nothing is transposed
PICKLE_HINT = ("a Python pickle, which can run any program when it is opened, so it is not read; load it in the Python that "
               "wrote it and save it as model.safetensors, for example with save_pretrained of transformers")


def load_model(name: str | Path) -> tuple[Config, Tensors]:
    """Load a model: its Config and its parameters, converted to float32, wte padded with zeros.

    `name` is one of
        a folder with config.json and model.safetensors, or with the shards listed in model.safetensors.index.json
        a .safetensors file; if there is no config.json beside it, we assume 64 channels per head
        an llm.c checkpoint, version 3 (float32; memory-mapped) or 5 (bfloat16)
        a model on the Hugging Face hub, such as gpt2; a file or folder of that name takes precedence

    Raises UserError if the model is not found, cannot be downloaded or is not supported, or if a file is damaged.
    """
    path = find_model(name)
    if path.is_dir():
        return load_hugging_face(path, weight_files(path), path / "config.json")
    if is_llmc(path):
        return load_llmc(path)
    config_path = path.with_name("config.json")
    return load_hugging_face(path, [path], config_path if config_path.is_file() else None)


def load_model_tokenizer(name: str | Path, rows: int = 2**31 - 1) -> Tokenizer:
    """The tokenizer of a model, see load_model, whose vocabulary has so many rows; or that of a folder of tokenizer files.

    Raises UserError if it is damaged, or needs a package that is not installed.
    """
    path = find_model(name)
    if path.is_file() and is_llmc(path):
        return GPT2Tokenizer() if rows >= VOCABULARY else NO_TOKENIZER
    folder = path if path.is_dir() else path.parent
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return load_tokenizer(folder, {name: settings.get(name) for name in SPECIAL_IDS}, rows)


def is_llmc(path):
    return read_opening(path).startswith(LLMC_MAGIC.to_bytes(4, "little"))


def find_model(name):
    """Return the path of the file or folder `name`, or else that of the hub's model in the cache of huggingface_hub."""
    if os.path.exists(name):
        return Path(name)
    name = str(name)
    if not re.fullmatch(HUB_NAME, name, re.ASCII) or name.endswith((".bin", ".safetensors")):
        raise UserError(f"there is no file or folder {name!r}; name a Hugging Face folder, a .safetensors file, an llm.c .bin "
                        "checkpoint or a model on the Hugging Face hub, such as gpt2")
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


# ----------------------------------------------------------------------------------------------------------------------
# Configurations

def make_config(source, sizes):
    """Return the Config of `sizes` (name -> value as found in the file `source`, in the order of CONFIG_SIZES).

    Raises UserError for sizes that no model can have. The caller must still check that the file holds that much.
    """
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size < 2**31:
            raise UserError(f"{source}: {name} is {short_repr(size)}, expected a whole number from 1 to {2**31 - 1:,}; "
                            f"{REPAIR_HINT}")
    T, V, L, NH, C = sizes.values()
    if C % NH != 0:
        *_, heads, channels = sizes
        raise UserError(f"{source}: {channels} is {C:,}, expected a multiple of {heads}, {NH:,}; {REPAIR_HINT}")
    return Config(max_seq_len=T, vocab_size=V, padded_vocab_size=padded(V), num_layers=L, num_heads=NH, channels=C)


def read_config(path):
    """Return the Config in a config.json. Raises UserError if it describes another architecture or an unsupported variant."""
    settings = read_json(path)
    if settings.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {short_repr(settings.get('model_type'))}, expected 'gpt2'; choose a model of "
                        "GPT-2's architecture")
    config = make_config(path, {name: settings.get(name) for name in CONFIG_SIZES})
    for name, choices in {**SUPPORTED_SETTINGS, "n_inner": (None, 4 * config.channels)}.items():
        value = settings.get(name, choices[0])
        if value not in choices:
            raise UserError(f"{path}: {name} is {short_repr(value)}, expected {' or '.join(map(short_repr, choices))}; "
                            "choose a model that computes what GPT-2 does")
    return config


def config_from_shapes(path, tensors):
    """Infer the Config from the shapes of `tensors` (name -> StoredTensor), assuming 64 channels per head."""
    shapes = [tensors[name].shape if name in tensors else None for name in ("wte.weight", "wpe.weight")]
    match shapes:
        case [(V, C), (T, _)] if type(C) is int and C % CHANNELS_PER_HEAD == 0:
            return make_config(path, dict(zip(CONFIG_SIZES, (T, V, count_layers(tensors), C // CHANNELS_PER_HEAD, C))))
    raise UserError(f"{path} has no config.json beside it, and wte.weight and wpe.weight have the shapes {short_repr(shapes)}, "
                    f"expected two matrices with a multiple of {CHANNELS_PER_HEAD} channels; put the model's config.json there")


def config_from_metadata(path, sizes):
    """The Config in the header of a safetensors file that was written over another model, see save_model."""
    sizes = parse_json(sizes, f"{SIZES_KEY} in the header of {path}") if isinstance(sizes, str) else {}
    return make_config(path, {name: sizes.get(name) for name in CONFIG_SIZES})


def count_layers(tensors):
    return len({name.split(".")[1] for name in tensors if name.startswith("h.")})


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


def stored_tensors(config):
    """Yield (name, shape, our name, index) of each of the model's tensors in Hugging Face's format.

    It equals our tensor[index], transposed if our name is in TRANSPOSED. `shape` is the one in the file.
    """
    for ours, shape in parameter_shapes(config).items():
        name = HUGGING_FACE_NAMES[ours]
        if ours == "wte":
            yield name, (config.vocab_size, config.channels), ours, np.s_[:config.vocab_size]
        elif "{layer}" not in name:
            yield name, shape, ours, np.s_[:]
        else:
            for l in range(config.num_layers):
                yield name.format(layer=l), shape[:0:-1] if ours in TRANSPOSED else shape[1:], ours, l


def stored_views(config, params):
    """Yield (name, view) of the parameters, each view shaped as Hugging Face stores it."""
    for name, _, ours, index in stored_tensors(config):
        view = getattr(params, ours)[index]
        yield name, view.T if ours in TRANSPOSED else view


def load_hugging_face(source, paths, config_path):
    """load_model for the safetensors files `paths`. Errors name `source`. No config_path: infer the Config from the shapes."""
    tensors, config = {}, None
    for path in paths:
        stored, metadata = read_safetensors(path)
        if isinstance(metadata, dict) and SIZES_KEY in metadata:
            config = config_from_metadata(path, metadata[SIZES_KEY])
        prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
        for name, tensor in stored.items():
            name = name.removeprefix(prefix)
            if name in tensors:
                raise UserError(f"{path} holds {short_repr(name)} a second time; {REPAIR_HINT}")
            if not re.fullmatch(CAUSAL_MASKS, name):
                tensors[name] = tensor
    config = config or (read_config(config_path) if config_path else config_from_shapes(source, tensors))
    check_tensors(source, config, tensors)
    shapes = parameter_shapes(config)
    check_memory(f"the model in {source}", 4 * sum(map(prod, shapes.values())), main_memory(), "this machine",
                 "choose a smaller model")
    params = Tensors(shapes)
    for name, view in stored_views(config, params):
        convert_into(view, tensors[name])
    return config, params


def weight_files(folder):
    """Return the paths of a folder's safetensors files. Raises UserError if it has none."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if weights.is_file():
        return [weights]
    if not index.is_file():
        raise UserError(f"{folder} has no model.safetensors; name a folder that has one; if it has a pytorch_model.bin, "
                        f"that is {PICKLE_HINT}")
    weight_map = read_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UserError(f"{index}: weight_map names the file {short_repr(shard)}, expected a .safetensors file "
                            f"in this folder; {REPAIR_HINT}")
    return [folder / shard for shard in sorted(set(shards))]


def read_opening(path):
    """Return the first 32 bytes of a file, which tell its format. Raises UserError if it cannot be read or is not a file."""
    with open_file(path, REPAIR_HINT) as file:
        return file.read(32)


def read_safetensors(path):
    """Return name -> StoredTensor, and the metadata. Raises UserError unless the tensors fill the file without gaps."""
    opening = read_opening(path)
    if opening[8:9] != b"{":
        if opening.startswith((b"PK", b"\x80")):  # torch.save writes a zip archive, or formerly a bare pickle
            raise UserError(f"{path} is {PICKLE_HINT}")
        if opening.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is only a Git LFS pointer to the file; fetch it with git lfs pull")
        raise UserError(f"{path} begins with {opening[:9]!r}, expected a safetensors file or an llm.c checkpoint; "
                        f"{REPAIR_HINT}")
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


def check_tensors(source, config, tensors):
    """Raise UserError unless `tensors` (name -> StoredTensor) are exactly the model's, with the right shapes and sizes."""
    layers = count_layers(tensors)
    if layers != config.num_layers:  # checked first, or stored_tensors() might list billions of layers
        raise UserError(f"layers in {source}: {layers}, expected {config.num_layers:,}, n_layer of its config.json; "
                        f"{REPAIR_HINT}")
    head = tensors.pop(TIED_HEAD, None)
    shapes = {name: shape for name, shape, *_ in stored_tensors(config)}
    missing = [name for name in shapes if name not in tensors]
    unknown = [short_repr(name) for name in tensors if name not in shapes]
    wrong = [f"{name} is {short_repr(tensors[name].dtype)} {short_repr(tensors[name].shape)}, expected {' or '.join(DTYPES)} "
             f"{shape}" for name, shape in shapes.items()
             if name in tensors and (tensors[name].shape != shape or tensors[name].dtype not in DTYPES)]
    faults = wrong[:MAX_NAMES]
    if unknown:
        faults.insert(0, f"holds {join_names(unknown)}, which GPT-2 does not have")
    if missing:
        faults.insert(0, f"lacks {join_names(missing)}")
    if faults:
        raise UserError(f"{source} is not the GPT-2 of its config.json or of its shapes: {'; '.join(faults)}"
                        f"{' ...' if len(wrong) > MAX_NAMES else ''}; {REPAIR_HINT}")
    for name, shape in shapes.items():
        expected = np.dtype(DTYPES[tensors[name].dtype]).itemsize * prod(shape)
        if tensors[name].size != expected:
            raise UserError(f"the header of {source} gives {name} {tensors[name].size:,} bytes, expected {expected:,} for its "
                            f"shape; {REPAIR_HINT}")
    wte = tensors["wte.weight"]
    if head and not ((head.dtype, head.size) == (wte.dtype, wte.size) and same_bytes(head, wte)):
        raise UserError(f"{source} holds an {TIED_HEAD} that differs from wte.weight, expected one matrix for both; choose a "
                        "model whose classifier is tied to its embedding, as GPT-2's is")


def same_tensors(tensors, others):
    """Whether two files, given as what read_safetensors returns, hold the same tensors."""
    return tensors.keys() == others.keys() and all(
        (tensor.dtype, tensor.shape) == (others[name].dtype, others[name].shape) and same_bytes(tensor, others[name])
        for name, tensor in tensors.items())


def same_bytes(tensor, other):
    """Whether two StoredTensors of the same size hold the same bytes."""
    parts = [part.stop - part.start for part in chunks(tensor.size, STRIP_NUMBERS)]
    return all(map(np.array_equal, tensor.read("u1", parts), other.read("u1", parts)))


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
            rows[...] = numbers


def join_names(names):
    """Return the first few names and how many others there are."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face: writing

def save_model(folder: str | Path, config: Config, params: Tensors, tokenizer: Tokenizer = NO_TOKENIZER) -> None:
    """Write a model as float32, with its tokenizer, to a folder that transformers can load.

    All files are complete before the first one is renamed, and model.safetensors is renamed last. Exception: over a model of
    another shape it is renamed first and carries its sizes in its header, which load_model prefers to config.json. So a process
    that is killed between two renames leaves the old or the new model. If GPT-2's vocabulary cannot be downloaded, the model
    is saved without a tokenizer and a line says so. Raises UserError if a file cannot be written.
    """
    folder = Path(folder)
    sizes = dict(zip(CONFIG_SIZES, (config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads,
                                    config.channels)))
    replaces_other = holds_other_model(folder / "config.json", config)
    contents = {"model.safetensors": safetensors_pieces(config, params, sizes if replaces_other else None),
                "config.json": [json_bytes(hugging_face_settings(sizes) | saved_ids(tokenizer))],
                **{name: [content] for name, content in tokenizer_files(folder, tokenizer).items()}}
    with contextlib.ExitStack() as unfinished:  # renames the files in reverse order
        for name in reversed(contents) if replaces_other else contents:
            file = unfinished.enter_context(atomic_file(folder / name))
            for piece in contents[name]:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())     # a full disk fails here, before any file is renamed
    for name in TOKENIZER_FILES:    # of another tokenizer
        if name not in contents:
            (folder / name).unlink(missing_ok=True)


def holds_other_model(config_path, config):
    """Whether a model is there whose config.json is not the one of this Config, or missing."""
    try:
        if not config_path.exists():
            return config_path.with_name("model.safetensors").exists()
        return read_config(config_path) != config
    except UserError:
        return True


def tokenizer_files(folder, tokenizer):
    """Name -> contents of the tokenizer's files: none if they cannot be downloaded."""
    try:
        return tokenizer.files
    except UserError as error:
        print(f"{folder} gets no tokenizer: {error}")
        return {}


def saved_ids(tokenizer):
    """The special tokens for config.json. transformers assumes GPT-2's if they are absent."""
    return {name: tokenizer.special_ids.get(name) for name in SPECIAL_IDS}


def safetensors_pieces(config, params, sizes=None):
    """Yield the contents of a model.safetensors: the header, with the `sizes` if any, then tensor by tensor."""
    metadata = {"format": "pt"} | ({SIZES_KEY: json.dumps(sizes)} if sizes else {})
    header, position = {"__metadata__": metadata}, 0
    for name, shape, *_ in stored_tensors(config):
        end = position + 4 * prod(shape)
        header[PREFIX + name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # aligns the data, so that it can be memory-mapped
    yield len(header).to_bytes(8, "little") + header
    for _, view in stored_views(config, params):
        yield np.ascontiguousarray(view)


def hugging_face_settings(sizes):
    """Return the contents of config.json, given the sizes by their names in CONFIG_SIZES."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **sizes,
        "n_inner": None,
        **{name: choices[0] for name, choices in SUPPORTED_SETTINGS.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),      # no dropout
        "tie_word_embeddings": True,
    }


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
    shapes = parameter_shapes(config)
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
    """Write a model as an llm.c checkpoint, version 3 (float32) or 5 (bfloat16). Raises UserError if it cannot be written."""
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
