"""What Hugging Face's files mean: settings in a config.json, names of GPT-2's tensors, and what else is stored with them.

Read is all that computes what GPT-2 does: with prefixes before the names, with heads for other purposes, with other names for
the sizes, with scales that can be folded into the weights. The rest is refused, by saying what it is.
"""
import re
from collections.abc import Callable, Iterator
from math import prod, sqrt
from typing import NamedTuple

import numpy as np

from cli import UserError
from files import REPAIR_HINT, short_repr
from gpt2 import CHANNELS_PER_HEAD, CONTEXT, VOCABULARY, Config, Tensors, padded
from llama import definition_of
from tokenizer import SPECIAL_IDS

# Our tensors -> Hugging Face's, which are one per layer. In a file, a prefix such as "transformer." stands before the names.
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
TRANSPOSED = ("qkvw", "attprojw", "fcw", "fcprojw")     # Hugging Face's Conv1D stores weights as (in, out)
PREFIX = re.compile(r"((?:.*\.)?)(?:wte|wpe|h\.0\.ln_1)\.weight")           # what stands before these stands before all names
# What PyTorch's wrappers (compilation, data parallelism, activation checkpointing) insert into names, at any place
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
CAUSAL_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")      # constants in older files
CLASSIFIER = re.compile(r"(.*\.)?lm_head\.(weight|bias)")       # some files store wte a second time, or only, as lm_head.weight
# Constants, and heads for other purposes, where they have GPT-2's prefix; what has another one is no part of GPT-2
UNUSED = re.compile(r"(.*\.)?position_ids|\w*(head|score|classifier|summary|outputs|critic|reward)\w*\..*")

# The sizes in config.json: GPT-2's name -> the default of transformers, and other names
CONFIG_SIZES = {
    "n_positions": (CONTEXT, "max_position_embeddings", "n_ctx"),
    "vocab_size": (VOCABULARY,),
    "n_layer": (12, "num_hidden_layers"),
    "n_head": (12, "num_attention_heads"),
    "n_embd": (768, "hidden_size"),
}
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")    # one formula
EXACT_GELUS = ("gelu", "gelu_python")
# The supported values of the other settings in config.json. The first is GPT-2's, and the default.
SUPPORTED_SETTINGS = {
    "activation_function": TANH_GELUS + EXACT_GELUS,
    "layer_norm_epsilon": (1e-5,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
}
GPT2_SCALES = True, False       # the last two settings

# dtype in a file -> in NumPy, which lacks bfloat16: its bits are the upper half of a float32.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}

MAX_NAMES = 8                   # in an error
CONFIG_HINT = "put the model's own config.json there"
OTHER_HINT = "choose a model that computes what {} does"
ADAPTER = ("an adapter's weights (such as LoRA's), which are no model without their base model; merge them into it with "
           "merge_and_unload of PEFT, and save that with save_pretrained")
# Names of tensors that change what a model computes -> what they are
FOREIGN = {
    r"lora_|ia3_|adapter|base_layer|prefix_encoder|prompt_e": ADAPTER,
    r"crossattention|ln_cross_attn": "cross-attention, of a decoder that needs an encoder; {}",
    r"\.(qweight|qzeros|absmax|quant_map|SCB)$": "quantized weights; choose the model that they were made from",
}


# ----------------------------------------------------------------------------------------------------------------------
# Settings

def make_config(source, sizes, exact_gelu=False):
    """Return the Config of `sizes` (name -> value as found in the file `source`, in the order of CONFIG_SIZES).

    Raises UserError for sizes that no model can have. The caller must still check that the file holds that much.
    """
    check_whole(source, sizes)
    T, V, L, NH, C = sizes.values()
    if C % NH != 0:
        *_, heads, channels = sizes
        raise UserError(f"{source}: {channels} is {C:,}, expected a multiple of {heads}, {NH:,}; correct the one that is wrong")
    return Config(T, V, padded_vocab_size=padded(V), num_layers=L, num_heads=NH, channels=C, exact_gelu=exact_gelu)


def check_whole(source, sizes):
    """Raise UserError unless all sizes (name -> value) are whole numbers that a model can have."""
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size < 2**31:
            raise UserError(f"{source}: {name} is {short_repr(size)}, expected a whole number from 1 to {2**31 - 1:,}; "
                            f"{REPAIR_HINT}")


def config_from_settings(source, settings):
    """Return the Config in the settings of a config.json, and the two settings that scale attention scores, see scale_queries.

    Raises UserError, which names the file `source`, if they describe another architecture or an unsupported variant.
    """
    settings = without_nulls(settings)
    if settings.get("model_type", "gpt2") != "gpt2":        # in 2019 it was not written
        raise UserError(f"{source}: model_type is {short_repr(settings['model_type'])}, expected 'gpt2', 'llama' or 'qwen2'; "
                        "choose a model of one of these architectures")
    settings = {name: choices[0] for name, choices in SUPPORTED_SETTINGS.items()} | settings
    config = make_config(source, config_sizes(settings), exact_gelu=settings["activation_function"] in EXACT_GELUS)
    for name, choices in {**SUPPORTED_SETTINGS, "n_inner": (4 * config.channels,)}.items():
        value = settings.get(name, choices[0])
        if value not in choices:
            raise UserError(f"{source}: {name} is {short_repr(value)}, expected {' or '.join(map(short_repr, choices))}; "
                            f"{OTHER_HINT.format('GPT-2')}")
    return config, (settings["scale_attn_weights"], settings["scale_attn_by_inverse_layer_idx"])


def without_nulls(settings):
    """A setting that is null has its default."""
    return {name: value for name, value in settings.items() if value is not None}


def config_sizes(settings):
    """Return name -> value of the sizes in the settings of a config.json, in the order of CONFIG_SIZES."""
    sizes = {}
    for name, (default, *others) in CONFIG_SIZES.items():
        given = [settings[other] for other in (name, *others) if other in settings]
        sizes[name if given else f"{name} (by default)"] = given[0] if given else default
    return sizes


def config_from_shapes(path, tensors):
    """Infer the Config from the shapes of `tensors` (name -> StoredTensor), assuming 64 channels per head and GPT-2's GELU."""
    shapes = [tensors[name].shape if name in tensors else None for name in ("wte.weight", "wpe.weight")]
    match shapes:
        case [(V, C), (T, _)] if type(C) is int and C % CHANNELS_PER_HEAD == 0:
            return make_config(path, dict(zip(CONFIG_SIZES, (T, V, count_layers(tensors), C // CHANNELS_PER_HEAD, C))))
    raise UserError(f"{path} has no config.json beside it, and wte.weight and wpe.weight have the shapes {short_repr(shapes)}, "
                    f"expected two matrices with a multiple of {CHANNELS_PER_HEAD} channels; {CONFIG_HINT}")


def settings_from_config(config):
    """Return what a Config holds by its names in config.json."""
    sizes = config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.channels
    return {**dict(zip(CONFIG_SIZES, sizes)), "activation_function": (EXACT_GELUS if config.exact_gelu else TANH_GELUS)[0]}


def hugging_face_settings(config, special_ids):
    """Return the contents of config.json. special_ids: the tokenizer's; transformers assumes GPT-2's if one is absent."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: choices[0] for name, choices in SUPPORTED_SETTINGS.items()},
        **settings_from_config(config),
        "n_ctx": config.max_seq_len,        # llama.cpp's converter needs it
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),      # no dropout
        **{name: special_ids.get(name) for name in SPECIAL_IDS},
        "tie_word_embeddings": True,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Tensors: name -> StoredTensor of model_files.py

class StoredModel(NamedTuple):
    """A model in files: its Config, and its tensors by their names in hugging_face_tensors, as StoredTensors.

    notes: what was left out or assumed
    finish: what is to be done to the parameters that were read
    """
    config: object
    tensors: dict
    notes: list
    finish: Callable[[Tensors], None] = lambda params: None


def stored_tensors(config, names: dict) -> Iterator[tuple[str, tuple, str, tuple]]:
    """Yield (name in a file, shape, our name, index) of each of a model's tensors. It equals our tensor[index].

    names: our name -> that in a file, which is one per layer, or a list of them for parts that are stored apart
    """
    definition = definition_of(config)
    parts = definition.row_parts(config)
    for ours, shape in definition.parameter_shapes(config).items():
        if 0 in shape:
            continue
        if ours in ("wte", "headw"):    # without the padding
            yield names[ours], (config.vocab_size, config.channels), ours, np.s_[:config.vocab_size]
        elif ours in parts:
            for l in range(config.num_layers):
                for name, rows in zip(names[ours], parts[ours]):
                    yield name.format(layer=l), (rows.stop - rows.start, *shape[2:]), ours, (l, rows)
        elif "{layer}" in names[ours]:
            for l in range(config.num_layers):
                yield names[ours].format(layer=l), shape[1:], ours, l
        else:
            yield names[ours], shape, ours, np.s_[:]


def hugging_face_tensors(config):
    """stored_tensors in Hugging Face's format. A tensor whose name of ours is in TRANSPOSED is stored transposed."""
    for name, shape, ours, index in stored_tensors(config, HUGGING_FACE_NAMES):
        yield name, shape[::-1] if ours in TRANSPOSED else shape, ours, index


def with_prefix(name):
    """The name in a file, as GPT2LMHeadModel saves it."""
    return f"transformer.{name}"


def read(source, stored, settings, config_path):
    """The StoredModel of a file's tensors (name -> StoredTensor) and the settings of a config.json.

    settings: None: the Config is inferred from the shapes
    Raises UserError unless the tensors are the model's.
    """
    if settings is not None:
        config, scales = config_from_settings(config_path, settings)
    tensors, classifiers, others = gpt2_tensors(source, stored)
    if settings is not None:
        check_sizes(config_path, settings, tensors)
    else:
        config, scales = config_from_shapes(source, tensors), GPT2_SCALES
    missing = missing_biases(config, tensors)
    shapes = {name: shape for name, shape, ours, _ in hugging_face_tensors(config) if ours not in missing}
    check_tensors(source, "GPT-2", shapes, tensors)
    check_classifiers(source, tensors["wte.weight"], classifiers)
    notes = []
    if others:
        notes.append(f"{source}: left out {join_names(others)}, which GPT-2's language model does not use")
    if missing:
        names = join_names([HUGGING_FACE_NAMES[name].format(layer="*") for name in missing])
        notes.append(f"{source}: no layer has {names}, so they are zero")
    if settings is None:
        notes.append(f"{source} has no config.json beside it, so heads of {CHANNELS_PER_HEAD} channels and GPT-2's form of "
                     "GELU are assumed, which its tensors do not tell")
    return StoredModel(config, tensors, notes, lambda params: scale_queries(config, params, *scales))


def check_foreign(source, model, stored):
    """Raise UserError if there are tensors that change what a model computes. model: its name."""
    for name in stored:
        for pattern, what in FOREIGN.items():
            if re.search(pattern, name):
                raise UserError(f"{source} holds {short_repr(name)}: {what.format(OTHER_HINT.format(model))}")


def gpt2_tensors(source, stored):
    """Sort the tensors of a file: GPT-2's, by their names without a prefix, its classifiers, and all others.

    A classifier stands in for a missing wte. Any matrix of wte's shape is taken for one.
    Raises UserError for tensors that change what a model computes, for more than one model, and for none.
    """
    check_foreign(source, "GPT-2", stored)
    prefixes = sorted({match[1] for match in map(PREFIX.fullmatch, stored) if match})
    if not prefixes:
        raise UserError(f"{source} holds {join_names(stored) or 'no tensors'}, expected GPT-2's wte.weight, wpe.weight, "
                        f"h.0.ln_1.weight, ...; {OTHER_HINT.format('GPT-2')}")
    if len(prefixes) > 1:
        raise UserError(f"{source} holds {len(prefixes)} models, with names that begin with {join_names(prefixes)}, expected "
                        "one; save the one that you want alone")
    tensors, classifiers, others = {}, {}, {}
    for name, tensor in stored.items():
        own = name.removeprefix(prefixes[0])
        if CLASSIFIER.fullmatch(name):
            classifiers[name] = tensor
        elif not name.startswith(prefixes[0]) or UNUSED.fullmatch(own):
            others[name] = tensor
        elif not CAUSAL_MASKS.fullmatch(own):
            tensors[own] = tensor
    for name, tensor in classifiers.items():
        if name.endswith("weight"):
            tensors.setdefault("wte.weight", tensor)
    shape = tensors["wte.weight"].shape if "wte.weight" in tensors else None
    classifiers |= {name: others.pop(name) for name in list(others) if others[name].shape == shape}
    return tensors, classifiers, others


def count_layers(tensors):
    return len({name.split(".")[1] for name in tensors if name.startswith("h.")})


def missing_biases(config, tensors):
    """Return our names of the biases that no layer has. If that is only ln_f's, it is damage."""
    found = {ours for name, _, ours, _ in hugging_face_tensors(config) if name in tensors}
    missing = [ours for ours, name in HUGGING_FACE_NAMES.items() if name.endswith("bias") and ours not in found]
    return [] if missing == ["lnfb"] else missing


def check_sizes(source, settings, tensors):
    """Raise UserError if the settings of a config.json, `source`, contradict the tensors."""
    sizes = config_sizes(without_nulls(settings))
    positions, vocabulary, layers, _, channels = sizes
    found = {layers: (count_layers(tensors), "layers")}
    for name, size in (("wte.weight", vocabulary), ("wpe.weight", positions)):
        if name in tensors and len(tensors[name].shape) == 2:
            rows, columns = tensors[name].shape
            found |= {size: (rows, f"rows of {name}"), channels: (columns, f"columns of {name}")}
    for name, (number, what) in found.items():
        if sizes[name] != number:
            raise UserError(f"{source}: {name} is {sizes[name]:,}, and the tensors have {number:,} {what}; {CONFIG_HINT}, or "
                            "write the right number into it")


def check_tensors(source, model, shapes, tensors):
    """Raise UserError unless `tensors` are those of `shapes` (name -> shape), with the right sizes. model: its name."""
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    wrong = [name for name, shape in shapes.items()
             if name in tensors and (tensors[name].shape != shape or tensors[name].dtype not in DTYPES)]
    faults = [f"{name} is {short_repr(tensors[name].dtype)} {short_repr(tensors[name].shape)}, expected {' or '.join(DTYPES)} "
              f"{shapes[name]}" for name in wrong[:MAX_NAMES]]
    if unknown:
        faults.insert(0, f"holds {join_names(unknown)}, which {model} does not have")
    if missing:
        faults.insert(0, f"lacks {join_names(missing)}")
    if faults:
        if missing and not (unknown or wrong):
            hint = REPAIR_HINT
        elif any(tensors[name].dtype not in DTYPES for name in wrong):
            hint = "choose a model that is not quantized, or save it in one of these types"
        elif model == "GPT-2" and not unknown and all(tensors[name].shape == shapes[name][::-1] for name in wrong):
            hint = "it is transposed, as in nanoGPT; turn nanoGPT's own checkpoint into a folder with dev/from_pytorch.py"
        else:
            hint = OTHER_HINT.format(model)
        raise UserError(f"{source} is not the {model} of its config.json or of its shapes: {'; '.join(faults)}"
                        f"{' ...' if len(wrong) > MAX_NAMES else ''}; {hint}")
    for name, shape in shapes.items():
        expected = np.dtype(DTYPES[tensors[name].dtype]).itemsize * prod(shape)
        if tensors[name].size != expected:
            raise UserError(f"the header of {source} gives {name} {tensors[name].size:,} bytes, expected {expected:,} for its "
                            f"shape; {REPAIR_HINT}")


def check_classifiers(source, wte, classifiers):
    """Raise UserError unless the classifiers are wte once more, and their biases are zero."""
    for name, tensor in classifiers.items():
        if name.endswith("bias"):
            tied, found = not any(part.any() for part in tensor.parts()), "is not zero, expected no bias"
        else:
            tied, found = tensor is wte or tensor.equals(wte), "differs from wte.weight, expected one matrix for both"
        if not tied:
            raise UserError(f"{source} holds {short_repr(name)}, which {found}; choose a model whose classifier is tied to "
                            "its embedding, as GPT-2's is")


def scale_queries(config, params, scaled, by_layer):
    """Fold what scales the attention scores of a layer otherwise than GPT-2's 1/sqrt(head size) into its queries.

    scaled: whether that scale applies; by_layer: whether scores are also divided by the layer's number, counted from 1
    """
    C = config.channels
    for l in range(config.num_layers):
        scale = (1 if scaled else sqrt(C // config.num_heads)) / (l + 1 if by_layer else 1)
        params.qkvw[l, :C] *= scale     # the first C rows compute the queries
        params.qkvb[l, :C] *= scale


def join_names(names):
    """Return the first few names and how many others there are."""
    first = [short_repr(name) or "''" for name in list(names)[:MAX_NAMES]]
    return ", ".join(first) + (f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else "")
