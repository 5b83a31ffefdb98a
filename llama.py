"""Llama's model definition, beside gpt2.py: config, tensor shapes, initialization.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models". What both models share, such as Tensors, is in
gpt2.py. dev/derivations/from_gpt2_to_llama.md lists what differs.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

import gpt2
from gpt2 import ALIGNMENT, CONTEXT, VOCABULARY, Tensors, ceil_div, padded, share_memory     # new models have GPT-2's tokens

NAME = "Llama"
HEADS_BY_DEPTH = {2: (2, 1), 4: (4, 2), 6: (6, 2), 8: (8, 2), 12: (12, 4)}     # of queries; of keys and values
HEAD_SIZE = 64


class RopeScaling(NamedTuple):
    """How Llama 3.1 stretches its rotations from a context of `original_context` to a longer one, see `frequencies`.

    Pairs that make fewer than low_freq_factor turns there turn `factor` times as slowly; those above high_freq_factor do not.
    """
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Config:
    """The sizes of a model. `num_heads` is a multiple of `num_key_heads`, and `head_size` is even.

    hidden: channels of the MLP. epsilon: of the norms. rope_base, rope_scaling: of the rotary frequencies
    tied: whether the token embedding is also the classifier's weight. qkv_bias: whether queries, keys and values have a bias
    """
    max_seq_len: int
    vocab_size: int
    padded_vocab_size: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_size: int
    channels: int
    hidden: int
    rope_base: float = 10000.0
    epsilon: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None

    @property
    def qkv_channels(self) -> int:
        """Columns of qkv: the heads of queries, then those of keys, then those of values."""
        return (self.num_heads + 2 * self.num_key_heads) * self.head_size

    @property
    def att_channels(self) -> int:
        return self.num_heads * self.head_size

    @property
    def layers(self) -> tuple[str, ...]:
        """The kinds of layers in which models differ, by their names in kernels_cpu.DIFFERENT_LAYERS."""
        return "rmsnorm", "rope", "swiglu"


NEW_MODELS = [f"l{depth}" for depth in HEADS_BY_DEPTH]
NEW_MODELS_HELP = "a new model of that depth"
PRETRAINED_HELP = ("smollm2, which is fetched on first use; a Hugging Face folder, such as train_llama.py writes; a "
                   ".safetensors or .gguf file; or a name on the Hugging Face hub")


def model_config(name: str) -> Config:
    """The Config of `l2` ... `l12`, named by depth, with 64 channels per head. Raises KeyError for any other name.

    They are as wide as GPT-2's of that depth. Two or more heads of queries share one of keys. The MLP has 8/3 as many channels
    as the model, rounded up to a multiple of 64: its three matrices are then as large as the two of GPT-2.
    """
    depth = {f"l{layers}": layers for layers in HEADS_BY_DEPTH}[name]
    heads, key_heads = HEADS_BY_DEPTH[depth]
    channels = HEAD_SIZE * heads
    return Config(CONTEXT, VOCABULARY, padded(VOCABULARY), depth, heads, key_heads, HEAD_SIZE, channels,
                  hidden=64 * ceil_div(8 * channels, 3 * 64))


def smallest_model(config: Config, context: int = 1, channels: int = 1) -> Config:
    """The smallest model that needs the same kernels."""
    return Config(context, 1, 128, num_layers=1, num_heads=1, num_key_heads=1, head_size=max(2, channels), channels=channels,
                  hidden=channels)


def definition_of(config: gpt2.Config | Config) -> ModuleType:
    """The module that defines a model: gpt2 or this one."""
    return sys.modules[__name__] if isinstance(config, Config) else gpt2


def parameter_shapes(config: Config) -> dict[str, tuple]:
    """Name -> shape of every parameter, named as in gpt2.py. Linear weights are (layers, output channels, input channels)."""
    L, C = config.num_layers, config.channels
    return {
        "wte": (config.padded_vocab_size, C),     # token embedding, and the classifier's weight if they are tied
        "ln1w": (L, C),
        "qkvw": (L, config.qkv_channels, C),
        "qkvb": (L, config.qkv_channels if config.qkv_bias else 0),
        "attprojw": (L, C, config.att_channels),
        "ln2w": (L, C),
        "fcw": (L, 2 * config.hidden, C),         # the gates, then the values
        "fcprojw": (L, C, config.hidden),
        "lnfw": (C,),
        "headw": (0 if config.tied else config.padded_vocab_size, C),
    }


def row_parts(config: Config) -> dict[str, list[slice]]:
    """Name -> the rows of a layer's weight that other programs store apart: queries, keys, values; gates and values."""
    queries, keys = config.att_channels, config.num_key_heads * config.head_size
    qkv = [slice(0, queries), slice(queries, queries + keys), slice(queries + keys, config.qkv_channels)]
    return {"qkvw": qkv, "qkvb": qkv,
            "fcw": [slice(0, config.hidden), slice(config.hidden, 2 * config.hidden)]}


MATRICES = ("wte", "qkvw", "attprojw", "fcw", "fcprojw", "headw")
WEIGHT_DECAYED = MATRICES                   # no decay for biases and norm weights


def activation_shapes(config: Config, B: int, T: int, recompute: bool = False) -> dict[str, tuple]:
    """Name -> shape of every activation; most are kept for the backward pass. N = B*T rows, one per token.

    With `recompute` (activation checkpointing, Chen et al. 2016) the tensors in RECOMPUTED hold one layer, L = 1.
    """
    layers, C, N = config.num_layers, config.channels, B * T
    L = 1 if recompute else layers
    return {
        "encoded": (N, C),
        "ln1": (L, N, C),
        "ln1_rstd": (L, N),
        "qkv": (L, N, config.qkv_channels),       # queries and keys rotated
        "att": (L, N, config.att_channels),
        "att_lse": (L, B, config.num_heads, T),
        "residual2": (L, N, C),                   # the block's input + attention
        "ln2": (L, N, C),
        "ln2_rstd": (L, N),
        "fch": (L, N, 2 * config.hidden),         # the gates, then the values
        "fch_swiglu": (L, N, config.hidden),
        "residual3": (layers, N, C),              # residual2 + MLP: the block's output
        "lnf": (N, C),
        "lnf_rstd": (N,),
        "losses": (N,),                           # one per target
    }


RECOMPUTED = ("ln1", "ln1_rstd", "qkv", "att", "att_lse", "residual2", "ln2", "ln2_rstd", "fch", "fch_swiglu")


def activations(config: Config, B: int, T: int, recompute: bool, allocate: Callable) -> Tensors:
    """The Tensors of activation_shapes. With `recompute`, all layers of those in RECOMPUTED share memory."""
    acts = Tensors(activation_shapes(config, B, T, recompute), allocate, ALIGNMENT)
    if recompute:
        share_memory(acts, RECOMPUTED, config.num_layers)
    return acts


def scratch_shapes(config: Config, B: int, T: int, classifier_rows: int) -> dict[str, tuple]:
    """Name -> shape of the buffers that every layer reuses. Logits are computed `classifier_rows` rows at a time."""
    N, C = B * T, config.channels
    return {
        "proj": (N, C),                           # what a projection adds to the residual stream
        "dresidual": (N, C),                      # the gradient that flows down the residual stream
        "dln": (N, C),
        "datt": (N, config.att_channels),
        "dqkv": (N, config.qkv_channels),
        "dfch_swiglu": (N, config.hidden),
        "dfch": (N, 2 * config.hidden),
        "logits": (min(N, classifier_rows), config.padded_vocab_size),
    }


def rotations(config: Config, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (positions, HS/2) of the angle of each position and pair of channels, for kernels_cpu.rope.

    Derived in dev/derivations/rope.md.
    """
    angles = np.arange(positions)[:, None] * frequencies(config)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def frequencies(config: Config) -> np.ndarray:
    """By how many radians per position each pair turns, (HS/2,) float64: the first by 1, later ones ever more slowly.

    rope_scaling divides the slowest ones by its factor, keeps the fast ones, and takes a mean of both in between (Llama 3.1;
    Grattafiori et al. 2024). See "A longer context" in dev/derivations/rope.md.
    """
    plain = config.rope_base ** (-np.arange(0, config.head_size, 2) / config.head_size)
    if config.rope_scaling is None:
        return plain
    factor, low, high, context = config.rope_scaling
    turns = context * plain / (2 * np.pi)       # in the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / factor


def initialize(params: Tensors, config: Config, seed: int) -> None:
    """Fill `params` (NumPy arrays) as gpt2.initialize does: the same deviations, biases 0, norm weights 1."""
    gpt2.initialize(params, config, seed, MATRICES)
    params.headw[config.vocab_size:] = 0
