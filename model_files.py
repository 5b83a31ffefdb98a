"""Models on disk: Hugging Face's folders and files, the models on its hub, and llm.c's checkpoints.

A checkpoint may come from anywhere, so nothing in it is believed before it is checked. No pickle is ever opened: opening one
can run any program. Memory is taken only for what a file was found to hold, and every complaint is one line.

A safetensors file is a header's length (8 bytes), the header (JSON: each tensor's dtype, shape and place in the data) and the
data. The package of that name is not used: the format takes a page to read, its complaints are not for users, and with NumPy
it has no bfloat16.
"""
import contextlib
import json
import os
import re
import reprlib
import textwrap
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from files import DATA_DIR, HEADER_BYTES, atomic_file, make_header, read_header
from gpt2 import CHANNELS_PER_HEAD, VOCABULARY, Config, Tensors, parameter_shapes
from tokenizer import END_OF_TEXT, fetch_vocabulary

HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", "vocab.json", "merges.txt", "tokenizer.json"]

# Ours -> Hugging Face's, which some files prefix with "transformer.", and which has a tensor for each layer.
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
TRANSPOSED = ("qkvw", "attprojw", "fcw", "fcprojw")     # its Conv1D keeps weights as (input, output) channels
CAUSAL_MASKS = r"h\.\d+\.attn\.(masked_)?bias"          # constants that older files carry along
TIED_HEAD = "lm_head.weight"                            # wte once more, in files that do not leave it out

# What config.json may ask for besides its sizes. A setting that is not there has the first value, as in transformers.
SETTINGS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")

# A tensor's dtype in a file. NumPy has no bfloat16: its bits are the upper half of a float32's.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

LLMC_MAGIC = 20240326
LLMC_VERSIONS = {3: "float32", 5: "bfloat16"}
LLMC_SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels")

JSON_BYTES = 2**20              # parsed JSON can take many times its own size; GPT-2 XL's header has 70 KB
NAMES_LISTED = 8
TRANSPOSED_ROWS = 64            # at a time: what is read by columns then stays in the cache, which is three times as fast
REPAIR_HINT = "download or save it again"
PICKLE_HINT = ("a Python pickle, which can run any program as it is opened and is not read here; have the Python that "
                        "wrote it save the model as model.safetensors, which save_pretrained of transformers does")


def load_model(name):
    """The Config of a model, and its parameters: Tensors of NumPy's float32, converted if need be, wte padded with zeros.

    `name` is one of
        a folder with config.json and model.safetensors, or the shards of model.safetensors.index.json
        a .safetensors file; without a config.json beside it, its heads are taken to have 64 channels each
        an llm.c checkpoint of version 3 (float32, which is mapped from the disk) or 5 (bfloat16)
        the name of a model on the Hugging Face hub, such as gpt2, unless there is a file or folder of that name

    Raises UserError if there is no such model, it cannot be fetched, a file is damaged, or it is no GPT-2 that these programs
    compute.
    """
    path = find_model(name)
    if path.is_dir():
        return load_hugging_face(path, weight_files(path), path / "config.json")
    if read_opening(path).startswith(LLMC_MAGIC.to_bytes(4, "little")):
        return load_llmc(path)
    config_path = path.with_name("config.json")
    return load_hugging_face(path, [path], config_path if config_path.is_file() else None)


def find_model(name):
    """The path of the file or folder called `name`; if there is none, that of the hub's model in huggingface_hub's cache."""
    if os.path.exists(name):
        return Path(name)
    name = str(name)
    if not re.fullmatch(HUB_NAME, name, re.ASCII) or name.endswith((".bin", ".safetensors")):
        raise UserError(f"there is no file or folder {name!r}; name a Hugging Face folder, a .safetensors file, an llm.c .bin "
                        "checkpoint or a model on the Hugging Face hub, such as gpt2")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"there is no file or folder {name}; to fetch the model of that name from the Hugging Face hub, "
                        "pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's errors, those of its HTTP library and the system's have no ancestor in common
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"there is no file or folder {name}, and the Hugging Face hub did not give a model of that name "
                        f"({type(error).__name__}: {reason}); check the name and the network") from error


# ----------------------------------------------------------------------------------------------------------------------
# Configurations

def make_config(source, sizes):
    """The Config of `sizes`, which maps what `source` calls them to the values found there, in the order of SIZES.

    Raises UserError for sizes that no model has. They may still be far too large for the file.
    """
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size < 2**31:
            raise UserError(f"{source}: {name} is {shown(size)}, expected a whole number from 1 to {2**31 - 1:,}; {REPAIR_HINT}")
    T, V, L, NH, C = sizes.values()
    if C % NH != 0:
        *_, heads, channels = sizes
        raise UserError(f"{source}: {channels} is {C:,}, expected a multiple of {heads}, {NH:,}; {REPAIR_HINT}")
    return Config(max_seq_len=T, vocab_size=V, padded_vocab_size=-(-V // 128) * 128, num_layers=L, num_heads=NH, channels=C)


def read_config(path):
    """The Config in a config.json. Raises UserError if it is another architecture's, or of a variant that is not computed."""
    settings = read_json(path)
    if settings.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {shown(settings.get('model_type'))}, expected 'gpt2'; choose a model of "
                        "GPT-2's architecture")
    config = make_config(path, {name: settings.get(name) for name in SIZES})
    for name, choices in {**SETTINGS, "n_inner": (None, 4 * config.channels)}.items():
        value = settings.get(name, choices[0])
        if value not in choices:
            raise UserError(f"{path}: {name} is {shown(value)}, expected {' or '.join(map(shown, choices))}; choose a model "
                            "that computes what GPT-2 does")
    return config


def config_from_shapes(path, tensors):
    """The Config that the shapes of `tensors` (name -> Stored) tell, with heads of 64 channels, which they do not tell."""
    shapes = [tensors[name].shape if name in tensors else None for name in ("wte.weight", "wpe.weight")]
    match shapes:
        case [(V, C), (T, _)] if type(C) is int and C % CHANNELS_PER_HEAD == 0:
            return make_config(path, dict(zip(SIZES, (T, V, count_layers(tensors), C // CHANNELS_PER_HEAD, C))))
    raise UserError(f"{path} has no config.json beside it, and wte.weight and wpe.weight have the shapes {shown(shapes)}, "
                    f"expected rows of a multiple of {CHANNELS_PER_HEAD} channels; put the model's config.json there")


def count_layers(tensors):
    return len({name.split(".")[1] for name in tensors if name.startswith("h.")})


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face: reading

class Stored(NamedTuple):
    """A tensor in a file: its dtype and shape as the header has them, unchecked, and where its bytes are."""
    dtype: str
    shape: tuple
    path: Path
    start: int
    size: int

    @property
    def data(self):
        """The bytes, mapped from the disk for as long as somebody holds them: then a model is never in memory twice."""
        return np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.start, shape=(self.size,)))


def stored_tensors(config):
    """(name, shape, our name, index) of each tensor that Hugging Face stores for the model.

    It is ours[index], transposed if that is one of TRANSPOSED; `shape` is its shape there.
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
    """(name, view) of the parameters as Hugging Face stores them."""
    for name, _, ours, index in stored_tensors(config):
        view = getattr(params, ours)[index]
        yield name, view.T if ours in TRANSPOSED else view


def load_hugging_face(source, paths, config_path):
    """load_model for the safetensors files `paths`. `source` is what errors call them; a config_path of None: there is none."""
    tensors = {}
    for path in paths:
        stored = read_safetensors(path)
        prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
        for name, tensor in stored.items():
            name = name.removeprefix(prefix)
            if name in tensors:
                raise UserError(f"{path} holds {shown(name)} a second time; {REPAIR_HINT}")
            if not re.fullmatch(CAUSAL_MASKS, name):
                tensors[name] = tensor
    config = read_config(config_path) if config_path else config_from_shapes(source, tensors)
    check_tensors(source, config, tensors)
    params = Tensors(parameter_shapes(config))
    for name, view in stored_views(config, params):
        fill(view, tensors[name])
    return config, params


def weight_files(folder):
    """The safetensors files that hold the model in a folder. Raises UserError if there are none."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if weights.is_file():
        return [weights]
    if not index.is_file():
        raise UserError(f"{folder} has no model.safetensors; name a folder that has one; if a model is there as "
                        f"pytorch_model.bin, that is {PICKLE_HINT}")
    weight_map = read_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UserError(f"{index}: weight_map names the file {shown(shard)}, expected one of this folder, named "
                            f"....safetensors; {REPAIR_HINT}")
    return [folder / shard for shard in sorted(set(shards))]


def read_opening(path):
    """The first bytes of a file, which tell what it is. Raises UserError if it cannot be read or is no file."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for somebody to write
        raise UserError(f"{path} is not a file, expected a checkpoint")
    try:
        with open(path, "rb") as file:
            return file.read(32)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {REPAIR_HINT}") from error


def read_safetensors(path):
    """Name -> Stored of the tensors in a file. Raises UserError if its header does not describe all of the file and no more."""
    opening = read_opening(path)
    if opening[8:9] != b"{":
        if opening.startswith((b"PK", b"\x80")):  # a zip archive, as torch.save makes them, or the pickle itself
            raise UserError(f"{path} is {PICKLE_HINT}")
        if opening.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} only points to the file, which Git LFS keeps apart; fetch it with git lfs pull")
        raise UserError(f"{path} begins with {opening[:9]!r}, expected a safetensors file or an llm.c checkpoint; {REPAIR_HINT}")
    size = path.stat().st_size
    start = 8 + int.from_bytes(opening[:8], "little")  # of the data
    if start > min(size, 8 + JSON_BYTES):
        raise UserError(f"{path} has {size:,} bytes and says that {start - 8:,} of them are its header, expected fewer, and at "
                        f"most {JSON_BYTES:,}; {REPAIR_HINT}")
    with open(path, "rb") as file:
        header = file.read(start)[8:]
    entries = []
    for name, entry in parse_json(header, f"the header of {path}").items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if begin <= end < 2**63:
                entries.append((begin, end, name, dtype, tuple(shape)))
            case _ if name != "__metadata__":
                raise UserError(f"the header of {path} has {shown(entry)} for {shown(name)}, expected a dtype, a shape and "
                                f"data_offsets; {REPAIR_HINT}")
    tensors = {}
    position = 0
    for begin, end, name, dtype, shape in sorted(entries):
        if begin != position:
            raise UserError(f"the header of {path} places {shown(name)} at byte {begin:,} of the data, expected "
                            f"{position:,}, where the tensor before it ends; {REPAIR_HINT}")
        tensors[name] = Stored(dtype, shape, path, start + begin, end - begin)
        position = end
    if start + position != size:
        raise UserError(f"{path} has {size:,} bytes, expected {start + position:,} for the tensors of its header; {REPAIR_HINT}")
    return tensors


def check_tensors(source, config, tensors):
    """Raise UserError unless `tensors` (name -> Stored) are exactly those of the model, and as long as their shapes say."""
    layers = count_layers(tensors)
    if layers != config.num_layers:  # which bounds what is listed below by the size of the file
        raise UserError(f"layers in {source}: {layers}, expected {config.num_layers:,}, n_layer of its config.json; "
                        f"{REPAIR_HINT}")
    head = tensors.pop(TIED_HEAD, None)
    shapes = {name: shape for name, shape, *_ in stored_tensors(config)}
    missing = [name for name in shapes if name not in tensors]
    unknown = [shown(name) for name in tensors if name not in shapes]
    wrong = [f"{name} is {shown(tensors[name].dtype)} {shown(tensors[name].shape)}, expected {' or '.join(DTYPES)} "
             f"{shape}" for name, shape in shapes.items()
             if name in tensors and (tensors[name].shape != shape or tensors[name].dtype not in DTYPES)]
    faults = [fault for fault in (missing and f"lacks {listed(missing)}",
                                  unknown and f"holds {listed(unknown)}, which GPT-2 has not",
                                  *wrong[:NAMES_LISTED]) if fault]
    if faults:
        raise UserError(f"{source} is not the GPT-2 of its config.json or of its shapes: {'; '.join(faults)}"
                        f"{' ...' if len(wrong) > NAMES_LISTED else ''}; {REPAIR_HINT}")
    for name, shape in shapes.items():
        expected = np.dtype(DTYPES[tensors[name].dtype]).itemsize * prod(shape)
        if tensors[name].size != expected:
            raise UserError(f"the header of {source} gives {name} {tensors[name].size:,} bytes, expected {expected:,} for its "
                            f"shape; {REPAIR_HINT}")
    wte = tensors["wte.weight"]
    if head and not ((head.dtype, head.size) == (wte.dtype, wte.size) and np.array_equal(head.data, wte.data)):
        raise UserError(f"{source} holds an {TIED_HEAD} that differs from wte.weight, expected one matrix for both; choose a "
                        "model whose classifier is tied to its embedding, as GPT-2's is")


def fill(view, tensor):
    """Convert a Stored tensor to float32, into `view`."""
    values = tensor.data.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
    strip = len(view) if view.flags.c_contiguous else TRANSPOSED_ROWS
    for start in range(0, len(view), strip):
        rows = slice(start, start + strip)
        if tensor.dtype == "BF16":
            bits = view[rows].view(np.uint32)
            bits[...] = values[rows]
            bits <<= 16
        else:
            view[rows] = values[rows]


def read_json(path):
    """The JSON object in a file as a dict. Raises UserError if it holds none."""
    read_opening(path)  # if only to complain
    size = path.stat().st_size
    if size > JSON_BYTES:
        raise UserError(f"{path} has {size:,} bytes, expected at most {JSON_BYTES:,}; {REPAIR_HINT}")
    return parse_json(path.read_bytes(), path)


def parse_json(contents, source):
    """The JSON object in bytes as a dict. Raises UserError, which calls them `source`, if it is none."""
    try:
        value = json.loads(contents)
    except (ValueError, RecursionError) as error:  # also for what is not UTF-8
        raise UserError(f"{source} is not JSON ({shown(str(error))}); {REPAIR_HINT}") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} is {shown(value)}, expected a JSON object; {REPAIR_HINT}")
    return value


def shown(value):
    """A value out of a file, or a part of it, on one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 200
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 200 else short.repr(value)


def listed(names):
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_LISTED
    return ", ".join(names[:NAMES_LISTED]) + (f" and {more:,} more" if more > 0 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face: writing

def save_model(folder, config, params):
    """Write a model, as float32, to a folder that transformers loads; GPT-2's tokenizer with it, if it has GPT-2's vocabulary.

    Whole or not at all: every file is complete before the first of them takes its name, and model.safetensors does so last.
    Without the vocabulary files, which only means that transformers cannot turn text into tokens, a line says so. Raises
    UserError if a file cannot be written.
    """
    with contextlib.ExitStack() as unfinished:  # which lets files have their names in the reverse order

        def write(name, pieces):
            file = unfinished.enter_context(atomic_file(Path(folder) / name))
            for piece in pieces:
                file.write(piece)
            file.flush()  # a full disk shows now, not when other files have their names

        write("model.safetensors", safetensors_pieces(config, params))
        write("config.json", [json_bytes(hugging_face_settings(config))])
        if config.vocab_size == VOCABULARY:
            try:
                fetch_vocabulary()
            except UserError as error:
                print(f"{folder} gets no tokenizer: {error}")
                return
            write("vocab.json", [(DATA_DIR / "encoder.json").read_bytes()])
            write("merges.txt", [(DATA_DIR / "vocab.bpe").read_bytes()])
            write("tokenizer_config.json", [json_bytes({
                "tokenizer_class": "GPT2Tokenizer",
                "model_max_length": config.max_seq_len,
                "add_prefix_space": False,
                **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
            })])


def safetensors_pieces(config, params):
    """The header and then the tensors of a model.safetensors, in pieces."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, *_ in stored_tensors(config):
        end = position + 4 * prod(shape)
        header[PREFIX + name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that the data can be mapped
    yield len(header).to_bytes(8, "little") + header
    for _, view in stored_views(config, params):
        yield np.ascontiguousarray(view)


def hugging_face_settings(config):
    """The contents of config.json."""
    sizes = (config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.channels)
    end_of_text = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None  # else transformers takes GPT-2's for granted
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **dict(zip(SIZES, sizes)),
        "n_inner": None,
        **{name: choices[0] for name, choices in SETTINGS.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),      # no dropout
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
    }


def json_bytes(value):
    return (json.dumps(value, indent=2) + "\n").encode()


# ----------------------------------------------------------------------------------------------------------------------
# llm.c: a header of 256 int32 (magic, version, LLMC_SIZES, padded vocabulary) and the tensors, which are ours in our order

def load_llmc(path):
    """load_model for an llm.c checkpoint."""
    size, version, fields = read_header(path, "an llm.c checkpoint", LLMC_MAGIC, LLMC_VERSIONS, REPAIR_HINT)
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
        mapped = np.memmap(path, dtype="<f4", mode="c", offset=HEADER_BYTES)    # a change to it stays in memory
        params = Tensors(shapes, allocate=lambda _: np.asarray(mapped))
    else:
        params = Tensors(shapes)
        fill(params.flat, Stored("BF16", (elements,), path, HEADER_BYTES, 2 * elements))
    params.wte[config.vocab_size:] = 0
    return config, params


def save_llmc(path, config, params, version):
    """Write a model as an llm.c checkpoint of version 3 (float32) or 5 (bfloat16). Raises UserError if it cannot be written."""
    with atomic_file(path) as file:
        file.write(make_header(LLMC_MAGIC, version, config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads,
                             config.channels, config.padded_vocab_size))
        for _, tensor in params.items():
            file.write(bfloat16_bits(tensor) if version == 5 else np.ascontiguousarray(tensor))


def bfloat16_bits(values):
    """The upper 16 bits of float32, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")
