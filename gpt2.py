"""What GPT-2 is, whatever computes it: its sizes, its tensors, their memory and their first values.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Nothing here knows of a device.
"""
from dataclasses import dataclass
from math import prod

import numpy as np

CONTEXT = 1024
VOCABULARY = 50257
PADDED_VOCABULARY = 50304           # the next multiple of 128: rows of wte that no token names, for aligned products
HEADS_BY_DEPTH = {2: 2, 4: 4, 6: 6, 8: 8, 12: 12, 24: 16, 36: 20, 48: 25}
CHANNELS_PER_HEAD = 64


@dataclass(frozen=True)
class Config:
    """The sizes of one model, under llm.c's names. `channels` is a multiple of `num_heads`."""
    max_seq_len: int
    vocab_size: int
    padded_vocab_size: int
    num_layers: int
    num_heads: int
    channels: int


def model_config(name):
    """The Config of `d2` ... `d48`: so many layers, 64 channels a head; d12, d24, d36 and d48 are GPT-2's own four sizes.

    Raises KeyError for any other name.
    """
    depth = {f"d{layers}": layers for layers in HEADS_BY_DEPTH}[name]
    heads = HEADS_BY_DEPTH[depth]
    return Config(CONTEXT, VOCABULARY, PADDED_VOCABULARY, depth, heads, CHANNELS_PER_HEAD * heads)


def parameter_shapes(config):
    """Name -> shape of every parameter, in llm.c's order. Weights are (output, input) channels; L counts the layers."""
    L, C = config.num_layers, config.channels
    return {
        "wte": (config.padded_vocab_size, C),     # token embedding, and the classifier's weight
        "wpe": (config.max_seq_len, C),           # position embedding
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
RESIDUAL_PROJECTIONS = ("attprojw", "fcprojw")
WEIGHT_DECAYED = MATRICES         # biases and the scales of layernorm are not pulled toward zero


def activation_shapes(config, B, T, recompute=False):
    """Name -> shape of what a batch leaves behind, most of it for the backward pass: N = B*T rows, one for each token.

    With `recompute`, RECOMPUTED are those of one layer only, L = 1: the backward pass computes them again layer by layer.
    """
    layers, C, NH, N = config.num_layers, config.channels, config.num_heads, B * T
    L = 1 if recompute else layers
    return {
        "encoded": (N, C),
        "ln1": (L, N, C),
        "ln1_mean": (L, N),
        "ln1_rstd": (L, N),
        "qkv": (L, N, 3 * C),
        "att": (L, N, C),
        "att_lse": (L, B, NH, T),
        "residual2": (L, N, C),                   # the block's input + attention
        "ln2": (L, N, C),
        "ln2_mean": (L, N),
        "ln2_rstd": (L, N),
        "fch": (L, N, 4 * C),
        "fch_gelu": (L, N, 4 * C),
        "residual3": (layers, N, C),              # residual2 + MLP: the block's output
        "lnf": (N, C),
        "lnf_mean": (N,),
        "lnf_rstd": (N,),
        "losses": (N,),                           # the classifier's, one for each target
    }


RECOMPUTED = ("ln1", "ln1_mean", "ln1_rstd", "qkv", "att", "att_lse", "residual2", "ln2", "ln2_mean", "ln2_rstd", "fch",
              "fch_gelu")


def activations(config, B, T, recompute, allocate):
    """The Tensors of activation_shapes. With `recompute` the tensors of all layers are the same memory: tensor[l] for any l."""
    acts = Tensors(activation_shapes(config, B, T, recompute), allocate)
    if recompute:
        for name in RECOMPUTED:
            setattr(acts, name, config.num_layers * [getattr(acts, name)[0]])
    return acts


def scratch_shapes(config, B, T, classifier_rows):
    """Name -> shape of what lives for one layer only, and so is not kept layer by layer.

    There are logits for so many rows at a time: those of a large batch would be larger than all activations together.
    """
    N, C = B * T, config.channels
    return {
        "proj": (N, C),                           # what a projection adds to the residual stream
        "dresidual": (N, C),                      # the gradient that flows down the residual stream
        "dln": (N, C),
        "datt": (N, C),
        "dqkv": (N, 3 * C),
        "dfch": (N, 4 * C),
        "logits": (min(N, classifier_rows), config.padded_vocab_size),
    }


def memory_needed(config, activation_shapes, scratch_shapes, processes=1):
    """Bytes that training takes: parameters, gradients, a process's share of the two moments, activations and scratch."""
    parameters, acts, scratch = (sum(map(prod, shapes.values()))
                                 for shapes in (parameter_shapes(config), activation_shapes, scratch_shapes))
    return 4 * (2 * parameters + 2 * -(-parameters // processes) + acts + scratch)


def chunks(rows, size):
    """Slices of at most `size` rows that make up all of them."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def training_flops(config, B, T):
    """FLOPs of a training step's matrix products on a batch: (in the linear layers, in attention).

    Each weight of a linear layer takes part in one product forward and two backward (input, weight), a multiplication and an
    addition per token each; so does the classifier's, for all rows of the padded vocabulary. Attention makes two products
    forward and four backward, of which only the scores of keys j <= i count, which the causal mask keeps.
    """
    L, C = config.num_layers, config.channels
    return 6 * B * T * (12 * L * C * C + config.padded_vocab_size * C), 6 * L * C * B * T * (T + 1)


def new_array(size):
    return np.zeros(size, dtype=np.float32)


class Tensors:
    """One flat float32 buffer, and a view into it for each row of a name -> shape table, as an attribute of that name.

    `allocate(size)` makes the buffer; a buffer that is longer than needed is fine.
    """

    def __init__(self, shapes, allocate=new_array):
        self.shapes = shapes
        self.size = sum(prod(shape) for shape in shapes.values())
        self.flat = allocate(self.size)
        offset = 0
        for name, shape in shapes.items():
            setattr(self, name, self.flat[offset:offset + prod(shape)].reshape(shape))
            offset += prod(shape)

    def parts(self, share):
        """(name, slice of `flat`) pairs in the order of the table, of what lies in `share`, a slice of `flat` too."""
        stops = np.cumsum([prod(shape) for shape in self.shapes.values()]).tolist()
        parts = [(name, slice(max(start, share.start), min(stop, share.stop)))
                 for name, start, stop in zip(self.shapes, [0, *stops], stops)]
        return [(name, part) for name, part in parts if part.start < part.stop]

    def items(self):
        """(name, view) pairs in the order of the table."""
        return [(name, getattr(self, name)) for name in self.shapes]


def initialize(params, config, seed):
    """Fill `params` (a Tensors of NumPy arrays) as GPT-2 does: weights from N(0, 0.02), biases 0, layernorm scales 1.

    Each block adds to the residual stream twice. So that its variance does not grow with depth, the 2L projections that
    end there start smaller by 1/sqrt(2L). The padding rows of wte are zero and stay zero. Derived in
    dev/derivations/initialization.md.
    """
    generator = np.random.default_rng(seed)
    for name, tensor in params.items():
        if name in MATRICES:
            std = 0.02 / np.sqrt(2 * config.num_layers) if name in RESIDUAL_PROJECTIONS else 0.02
            generator.standard_normal(dtype=np.float32, out=tensor)
            tensor *= np.float32(std)
        else:
            tensor[...] = 1 if name in ("ln1w", "ln2w", "lnfw") else 0
    params.wte[config.vocab_size:] = 0
