"""What the files of Llama models mean, Hugging Face's and GGUF's: their settings, and the names and order of their tensors.

Read are LlamaForCausalLM and Qwen2ForCausalLM, which is Llama with biases on queries, keys and values. Anything that llama.py
does not compute is refused, with a line that says what.
"""
import math
import re
from dataclasses import replace

import numpy as np

from cli import LARGEST, UserError
from files import REPAIR_HINT, short_repr
from gpt2 import padded
from hugging_face import (CONFIG_HINT, OTHER_HINT, StoredModel, check_foreign, check_tensors, check_whole, join_names,
                          stored_tensors, without_nulls)
from llama import Config, RopeScaling, frequencies
from tokenizer import SPECIAL_IDS

MODEL_TYPES = "llama", "qwen2"      # of a config.json, and architectures of a GGUF file
LLAMA_HINT = OTHER_HINT.format("Llama")
DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}
SIZES = ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "hidden_size", "intermediate_size")

# Our tensors -> Hugging Face's, without the prefix "model."; the parts of llama.row_parts are stored apart
HUGGING_FACE_NAMES = {
    "wte": "embed_tokens.weight",
    "ln1w": "layers.{layer}.input_layernorm.weight",
    "qkvw": [f"layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"],
    "qkvb": [f"layers.{{layer}}.self_attn.{part}_proj.bias" for part in "qkv"],
    "attprojw": "layers.{layer}.self_attn.o_proj.weight",
    "ln2w": "layers.{layer}.post_attention_layernorm.weight",
    "fcw": [f"layers.{{layer}}.mlp.{part}_proj.weight" for part in ("gate", "up")],
    "fcprojw": "layers.{layer}.mlp.down_proj.weight",
    "lnfw": "norm.weight",
    "headw": "lm_head.weight",
}
GGUF_NAMES = {
    "wte": "token_embd.weight",
    "ln1w": "blk.{layer}.attn_norm.weight",
    "qkvw": [f"blk.{{layer}}.attn_{part}.weight" for part in "qkv"],
    "qkvb": [f"blk.{{layer}}.attn_{part}.bias" for part in "qkv"],
    "attprojw": "blk.{layer}.attn_output.weight",
    "ln2w": "blk.{layer}.ffn_norm.weight",
    "fcw": [f"blk.{{layer}}.ffn_{part}.weight" for part in ("gate", "up")],
    "fcprojw": "blk.{layer}.ffn_down.weight",
    "lnfw": "output_norm.weight",
    "headw": "output.weight",
}
PREFIX = re.compile(r"((?:.*\.)?)(?:embed_tokens|layers\.0\.input_layernorm)\.weight")     # what stands before all names
TRANSPOSED = ()         # no weight, unlike GPT-2's
CLASSIFIER_NAME = HUGGING_FACE_NAMES["headw"]        # has no prefix
CONSTANTS = re.compile(r".*rotary_emb\.inv_freq")
UNUSED = re.compile(r"(.*\.)?(score|classifier|qa_outputs|v_head)\b.*")     # heads for other purposes
ROTATED = re.compile(r".*\.attn_[qk]\.(weight|bias)")                       # in a GGUF file
ROPE_FACTORS = "rope_freqs.weight"              # of a GGUF file: by what rope_scaling divides the frequencies
LLAMA_3_CONTEXT = 8192


def make_config(source, sizes, tied, qkv_bias, rope_base, epsilon, rope_scaling=None):
    """Return the Config of `sizes` (name -> value as found in the file `source`, in the order of SIZES).

    Raises UserError for sizes that no model can have. The caller must still check that the file holds that much.
    """
    check_whole(source, sizes)
    T, V, L, NH, KV, HS, C, H = sizes.values()
    _, _, _, heads, key_heads, head_size, *_ = sizes
    if NH % KV != 0:
        raise UserError(f"{source}: {heads} is {NH:,}, expected a multiple of {key_heads}, {KV:,}; correct the wrong one")
    if HS % 2 != 0:
        raise UserError(f"{source}: {head_size} is {HS:,}, expected an even number, because pairs of channels are rotated; "
                        f"{LLAMA_HINT}")
    for name, number in {"the base of the rotations": rope_base, "epsilon of the norms": epsilon}.items():
        if not is_positive(number):
            raise UserError(f"{source}: {name} is {number!r:.50}, expected a number above 0; {REPAIR_HINT}")
    return Config(T, V, padded(V), L, NH, KV, HS, C, H, float(rope_base), float(epsilon), tied, qkv_bias, rope_scaling)


def is_positive(number):
    return type(number) in (int, float) and 0 < number <= LARGEST[float]


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face

def holds_llama(settings, stored):
    """Whether a file's settings (a config.json's, or None) are those of a model that this module reads."""
    if settings is not None:
        return settings.get("model_type") in MODEL_TYPES
    return any(map(PREFIX.fullmatch, stored))


def config_from_settings(source, settings):
    """Return the Config in the settings of a config.json. Raises UserError for what llama.py does not compute."""
    settings = DEFAULTS | without_nulls(settings)
    heads, channels = settings.get("num_attention_heads"), settings.get("hidden_size")
    check_whole(source, {"num_attention_heads": heads, "hidden_size": channels})
    settings = {"num_key_value_heads": heads, "head_dim": channels // heads} | settings
    for name in ("tie_word_embeddings", "attention_bias", "use_sliding_window"):
        if type(settings.get(name, False)) is not bool:
            raise UserError(f"{source}: {name} is {short_repr(settings[name])}, expected true or false; {CONFIG_HINT}")
    for name, expected in {"hidden_act": "silu", "mlp_bias": False}.items():
        if settings.get(name, expected) != expected:
            raise UserError(f"{source}: {name} is {short_repr(settings[name])}, expected {short_repr(expected)}; {LLAMA_HINT}")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: the rotations' settings are {short_repr(rope)}, expected an object; {CONFIG_HINT}")
    config = make_config(source, {name: settings.get(name) for name in SIZES}, settings["tie_word_embeddings"],
                         settings["model_type"] == "qwen2" or settings.get("attention_bias", False),
                         rope.get("rope_theta", settings["rope_theta"]), settings["rms_norm_eps"], scaling_of(source, rope))

    def reaches(name, number):
        return type(settings.get(name)) is int and settings[name] >= number

    layers = settings.get("layer_types")
    if isinstance(layers, list):
        slides = "sliding_attention" in layers
    else:
        slides = settings.get("use_sliding_window", False) and not reaches("max_window_layers", config.num_layers)
    if slides and not reaches("sliding_window", config.max_seq_len):
        raise UserError(f"{source}: attention has a sliding window of {short_repr(settings.get('sliding_window'))} positions, "
                        f"expected at least the context of {config.max_seq_len:,}; choose a model without a sliding window")
    return config


def scaling_of(source, rope):
    """The RopeScaling in the settings of the rotations; None if they are the plain ones."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{source}: the rotations' rope_type is {short_repr(kind)}, expected 'default' or 'llama3'; "
                        f"{LLAMA_HINT}")
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    values = [rope.get(name) for name in names]
    if not all(map(is_positive, values)) or values[1] >= values[2]:
        raise UserError(f"{source}: the rotations' {', '.join(names)} are {short_repr(values)}, expected numbers above 0, the "
                        f"second below the third; {CONFIG_HINT}")
    return RopeScaling(*values)


def settings_from_config(config):
    """Return the contents of config.json, but for the special tokens."""
    rope = {"rope_theta": config.rope_base, "rope_type": "default"}
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                 "original_max_position_embeddings": context}
    sizes = (config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.num_key_heads, config.head_size,
             config.channels, config.hidden)
    return {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.qkv_bias else "llama",
        **dict(zip(SIZES, sizes)),
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "rope_parameters": rope,
        "rope_theta": config.rope_base,     # of transformers before 5, as is rope_scaling
        "rope_scaling": rope if config.rope_scaling else None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
    }


def hugging_face_settings(config, special_ids):
    """Return the contents of config.json. special_ids: the tokenizer's."""
    return settings_from_config(config) | {name: special_ids.get(name) for name in SPECIAL_IDS}


def hugging_face_tensors(config):
    """Yield (name, shape, our name, index) of each of the model's tensors in Hugging Face's format."""
    return stored_tensors(config, HUGGING_FACE_NAMES)


def with_prefix(name):
    """The name in a file, as LlamaForCausalLM saves it."""
    return name if name == CLASSIFIER_NAME else f"model.{name}"


def read(source, stored, settings, config_path):
    """The StoredModel of a file's tensors (name -> StoredTensor) and the settings of a config.json, not None.

    Raises UserError unless the tensors are the model's.
    """
    if settings is None:
        raise UserError(f"{source} holds the tensors of a Llama and has no config.json beside it, which tells its number of "
                        f"heads; {CONFIG_HINT}")
    config = config_from_settings(config_path, settings)
    check_foreign(source, "Llama", stored)
    prefixes = sorted({match[1] for match in map(PREFIX.fullmatch, stored) if match})
    if len(prefixes) != 1:
        raise UserError(f"{source} holds {join_names(stored) or 'no tensors'}, expected those of one Llama: "
                        f"model.embed_tokens.weight, ...; {LLAMA_HINT}")
    [prefix], tensors, zeros, others = prefixes, {}, [], []
    classifier = prefix.removesuffix("model.") + CLASSIFIER_NAME
    if config.num_layers > len(stored):     # checked first, or stored_tensors might list billions of layers
        raise UserError(f"{config_path}: num_hidden_layers is {config.num_layers:,}, and {source} has {len(stored):,} tensors; "
                        f"{CONFIG_HINT}")
    shapes = {name: shape for name, shape, *_ in hugging_face_tensors(config)}
    for name, tensor in stored.items():
        if name == classifier:
            own = CLASSIFIER_NAME
        else:
            own = name.removeprefix(prefix) if name.startswith(prefix) else f"{name} (without {prefix})"
        if own.endswith(".bias") and own not in shapes and not any(part.any() for part in tensor.parts()):
            zeros.append(name)      # as transformers initializes the biases that Llama has with attention_bias
        elif UNUSED.fullmatch(own):
            others.append(name)
        elif not CONSTANTS.fullmatch(own):
            tensors[own] = tensor
    if config.tied and CLASSIFIER_NAME in tensors:   # once more, or in place of the embedding
        classifier = tensors.pop(CLASSIFIER_NAME)
        if not classifier.equals(tensors.setdefault(HUGGING_FACE_NAMES["wte"], classifier)):
            raise UserError(f"{config_path}: tie_word_embeddings is true, and {source} holds an {CLASSIFIER_NAME} that differs "
                            f"from {HUGGING_FACE_NAMES['wte']}; {CONFIG_HINT}")
    check_tensors(source, "Llama", shapes, tensors)
    notes = [f"{source}: left out {join_names(others)}, which Llama's language model does not use"] * bool(others)
    notes += [f"{source}: left out {join_names(zeros)}: {len(zeros)} biases that are zero"] * bool(zeros)
    return StoredModel(config, tensors, notes)


# ----------------------------------------------------------------------------------------------------------------------
# GGUF

def config_from_fields(path, fields, tensors, rows):
    """Return the Config in the metadata of a GGUF file (key -> value). rows: of its token embedding.

    tensors: name -> GGUFTensor. rope_scaling is still missing: with_rope_factors finds it in the tensor ROPE_FACTORS.

    Raises UserError for what llama.py does not compute.
    """
    architecture = fields["general.architecture"]

    def field(key, default=None):
        return fields.get(f"{architecture}.{key}", default)

    heads, channels = field("attention.head_count"), field("embedding_length")
    head_size = channels // heads if type(heads) is int and type(channels) is int and heads > 0 else None
    sizes = {"context_length": field("context_length"), "number of tokens": rows, "block_count": field("block_count"),
             "attention.head_count": heads, "attention.head_count_kv": field("attention.head_count_kv", heads),
             "attention.key_length": field("attention.key_length", head_size), "embedding_length": channels,
             "feed_forward_length": field("feed_forward_length")}
    sizes = {f"{architecture}.{key}": size for key, size in sizes.items()}
    config = make_config(path, sizes, GGUF_NAMES["headw"] not in tensors, "blk.0.attn_q.bias" in tensors,
                         field("rope.freq_base", 10000.0), rounded(field("attention.layer_norm_rms_epsilon")))
    expected = {"attention.value_length": config.head_size, "rope.dimension_count": config.head_size, "expert_count": 0,
                "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0}
    for key, value in expected.items():
        if field(key, value) != value:
            raise UserError(f"{path}: {architecture}.{key} is {short_repr(field(key))}, expected {value}; {LLAMA_HINT}")
    return config


def rounded(epsilon):
    """The shortest number with the same float32, which is how a GGUF file stores it: 1e-5."""
    return float(str(np.float32(epsilon))) if isinstance(epsilon, float) and abs(epsilon) < 1 else epsilon


def llama_fields(config):
    """The metadata of a GGUF file, without the architecture's name before each key: key -> value."""
    return {
        "context_length": config.max_seq_len, "embedding_length": config.channels, "block_count": config.num_layers,
        "feed_forward_length": config.hidden, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_key_heads, "attention.key_length": config.head_size,
        "attention.value_length": config.head_size, "rope.dimension_count": config.head_size, "vocab_size": config.vocab_size,
        "rope.freq_base": config.rope_base, "attention.layer_norm_rms_epsilon": config.epsilon,
    }


def rope_factors(config):
    """What a GGUF file has instead of the parameters of rope_scaling: by what it divides each frequency, (HS/2,) float32."""
    return (frequencies(replace(config, rope_scaling=None)) / frequencies(config)).astype(np.float32)


def with_rope_factors(path, config, factors):
    """The Config with the rope_scaling that these rope_factors come from. Raises UserError unless they are Llama 3's."""
    largest = float(factors.max(initial=0))
    if 1 <= largest < math.inf and len(factors) == config.head_size // 2:
        scaled = replace(config, rope_scaling=RopeScaling(round(largest, 3), 1.0, 4.0, LLAMA_3_CONTEXT))
        if np.allclose(rope_factors(scaled), factors, rtol=1e-5):
            return scaled
    raise UserError(f"{path}: {ROPE_FACTORS} holds {short_repr(factors.tolist())}, expected Llama 3's scaling from a context "
                    f"of {LLAMA_3_CONTEXT:,}; {LLAMA_HINT}")


def from_neighbors(rows, head_size):
    """Reorder rows of queries or keys (heads * head_size, ...), or of their biases, from a GGUF file's order to ours.

    In a GGUF file of a Llama, channels 2i and 2i+1 rotate together; here, as in Hugging Face's files, i and HS/2 + i. See
    "Halves or neighbors" in dev/derivations/rope.md.
    """
    return rows.reshape(-1, head_size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_neighbors(rows, head_size):
    """The inverse of from_neighbors."""
    return rows.reshape(-1, 2, head_size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
