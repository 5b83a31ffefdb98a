"""Model definition, independent of the device: config, tensor shapes, memory layout, initialization.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

NAME = "GPT-2"
CONTEXT = 1024
VOCABULARY = 50257
HEADS_BY_DEPTH = {2: 2, 4: 4, 6: 6, 8: 8, 12: 12, 24: 16, 36: 20, 48: 25}
CHANNELS_PER_HEAD = 64
ALIGNMENT = 64      # elements: 256 bytes, or 128 in bfloat16; a cache line of a CPU has 64 bytes, of a GPU 128


@dataclass(frozen=True)
class Config:
    """The sizes of a model, named as in llm.c. `channels` is a multiple of `num_heads`.

    exact_gelu: whether the activation is GELU itself, not the tanh approximation of GPT-2
    """
    max_seq_len: int
    vocab_size: int
    padded_vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    exact_gelu: bool = False

    @property
    def head_size(self) -> int:
        return self.channels // self.num_heads

    @property
    def num_key_heads(self) -> int:
        """Heads of keys and of values: as many as those of queries. Llama's may be fewer."""
        return self.num_heads

    @property
    def layers(self) -> tuple[str, ...]:
        """The kinds of layers in which models differ, by their names in kernels_cpu.DIFFERENT_LAYERS."""
        return "layernorm", "gelu_exact" if self.exact_gelu else "gelu"


NEW_MODELS = [f"d{depth}" for depth in HEADS_BY_DEPTH]
NEW_MODELS_HELP = "a new model of that depth (d12 is GPT-2 124M)"
PRETRAINED_HELP = ("a Hugging Face folder, such as train_gpt2.py writes; a .safetensors, .gguf or llm.c .bin file; or a name "
                   "on the Hugging Face hub: gpt2, gpt2-medium, distilgpt2, ...")


def model_config(name: str) -> Config:
    """The Config of `d2` ... `d48`, named by depth, with 64 channels per head. d12, d24, d36 and d48 are GPT-2's four sizes.

    Raises KeyError for any other name.
    """
    depth = {f"d{layers}": layers for layers in HEADS_BY_DEPTH}[name]
    heads = HEADS_BY_DEPTH[depth]
    return Config(CONTEXT, VOCABULARY, padded(VOCABULARY), depth, heads, CHANNELS_PER_HEAD * heads)


def smallest_model(config: Config, context: int = 1, channels: int = 1) -> Config:
    """The smallest model that needs the same kernels."""
    return Config(context, 1, 128, num_layers=1, num_heads=1, channels=channels, exact_gelu=config.exact_gelu)


def padded(vocab_size: int) -> int:
    """The rows of wte: the next multiple of 128, for aligned matrix products. No token uses the extra rows."""
    return ceil_div(vocab_size, 128) * 128


def parameter_shapes(config: Config) -> dict[str, tuple]:
    """Name -> shape of every parameter, in llm.c's order. Linear weights are (layers, output channels, input channels)."""
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


def row_parts(config: Config) -> dict[str, list[slice]]:
    """Name -> the rows of a layer's weight that other programs store apart: none."""
    return {}


MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
RESIDUAL_PROJECTIONS = ("attprojw", "fcprojw")

# AdamW
WEIGHT_DECAYED = MATRICES                   # no decay for biases and layernorm weights
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8     # with small batches, a beta2 of 0.95 forgets rare tokens too soon


def activation_shapes(config: Config, B: int, T: int, recompute: bool = False) -> dict[str, tuple]:
    """Name -> shape of every activation; most are kept for the backward pass. N = B*T rows, one per token.

    With `recompute` (activation checkpointing, Chen et al. 2016) the tensors in RECOMPUTED hold one layer, L = 1.
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
        "losses": (N,),                           # one per target
    }


STATISTICS = ("ln1_mean", "ln1_rstd", "att_lse", "ln2_mean", "ln2_rstd", "lnf_mean", "lnf_rstd", "losses")   # always float32
RECOMPUTED = ("ln1", "ln1_mean", "ln1_rstd", "qkv", "att", "att_lse", "residual2", "ln2", "ln2_mean", "ln2_rstd", "fch",
              "fch_gelu")


def activations(config: Config, B: int, T: int, recompute: bool, allocate: Callable, dtype=np.float32) -> "Tensors":
    """The Tensors of activation_shapes, of a dtype. With `recompute`, all layers of those in RECOMPUTED share memory."""
    acts = Tensors(activation_shapes(config, B, T, recompute), allocate, ALIGNMENT, dtype, STATISTICS)
    if recompute:
        share_memory(acts, RECOMPUTED, config.num_layers)
    return acts


def share_memory(acts: "Tensors", names: Sequence[str], layers: int) -> None:
    """Make `layers` layers of each of the named tensors, which have one: views of the same memory."""
    for name in names:
        setattr(acts, name, layers * [getattr(acts, name)[0]])


def scratch_shapes(config: Config, B: int, T: int, classifier_rows: int) -> dict[str, tuple]:
    """Name -> shape of the buffers that every layer reuses.

    Logits are computed `classifier_rows` rows at a time: those of 4 x 1024 tokens would take 824 MB.
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


def memory_needed(parameter_shapes: dict, activation_shapes: dict, scratch_shapes: dict, processes: int = 1, dtype=np.float32
                  ) -> int:
    """Bytes that one process needs to train: parameters, gradients, its shard of the moments, activations and scratch.

    The dtype is that of activations; if it is not float32, there is also a copy of the parameters in it.
    """
    itemsize, parameters = np.dtype(dtype).itemsize, sum(map(prod, parameter_shapes.values()))
    copies = itemsize * parameters if itemsize < 4 else 0
    tensors = [*activation_shapes.items(), *scratch_shapes.items()]
    return (4 * (2 * parameters + 2 * ceil_div(parameters, processes)) + copies
            + sum((4 if name in STATISTICS else itemsize) * prod(shape) for name, shape in tensors))


def ceil_div(length: int, size: int) -> int:
    """length / size, rounded up."""
    return -(-length // size)


def chunks(rows: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows that cover all `rows`."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def training_flops(config: Config, B: int, T: int) -> tuple[int, int]:
    """FLOPs of a training step's matrix products on a batch: (linear layers, attention).

    Each weight of a linear layer, and of the classifier (padded vocabulary), takes part in one product forward and two
    backward, 2 FLOPs per token each. Attention has two products forward and four backward, not counting recomputation, over
    the scores that the causal mask keeps (j <= i).
    """
    L, C = config.num_layers, config.channels
    return 6 * B * T * (12 * L * C * C + config.padded_vocab_size * C), 6 * L * C * B * T * (T + 1)


def new_array(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.float32)


class Tensors:
    """One flat buffer, `flat`. Each entry of a name -> shape table is an attribute: a view into it.

    allocate(size): returns the buffer, an array of `dtype`, which may be longer than needed
    alignment: in elements; each view starts at a multiple of it. Parameters are contiguous, as in a checkpoint. Activations and
        scratch use ALIGNMENT, because kernels load several neighboring elements at once.
    float32: the names of views that are float32 whatever the dtype
    """

    def __init__(self, shapes: dict[str, tuple], allocate: Callable = new_array, alignment: int = 1, dtype=np.float32,
                 float32: Sequence[str] = ()):
        self.shapes, self.places, self.size = shapes, {}, 0
        for name, shape in shapes.items():
            start = ceil_div(self.size, alignment) * alignment
            self.size = start + prod(shape) * (4 // np.dtype(dtype).itemsize if name in float32 else 1)
            self.places[name] = slice(start, self.size)
        self.flat = allocate(self.size)
        for name, shape in shapes.items():
            view = self.flat[self.places[name]]
            setattr(self, name, (view.view(np.float32) if name in float32 else view).reshape(shape))

    def slices(self, within: slice | None = None) -> list[tuple[str, slice]]:
        """(name, slice of `flat`) pairs in the order of the table, cut to the slice `within` if it is given."""
        start, stop = (within.start, within.stop) if within else (0, self.size)
        slices = [(name, slice(max(place.start, start), min(place.stop, stop))) for name, place in self.places.items()]
        return [(name, part) for name, part in slices if part.start < part.stop]

    def items(self) -> list[tuple[str, np.ndarray]]:
        """(name, view) pairs in the order of the table."""
        return [(name, getattr(self, name)) for name in self.shapes]


def initialize(params: Tensors, config: Config, seed: int, matrices: Sequence[str] = MATRICES) -> None:
    """Fill `params` (NumPy arrays) as GPT-2 does: normal weights with standard deviation 0.02, biases 0, layernorm weights 1.

    Each block adds to the residual stream twice. To keep its variance from growing with depth, the 2L projections that
    feed it are scaled by 1/sqrt(2L). The padding rows of wte are zero and stay zero. Derived in
    dev/derivations/initialization.md.

    matrices: the names of the weights to draw
    """
    generator = np.random.default_rng(seed)
    for name, tensor in params.items():
        if name in matrices:
            std = 0.02 / np.sqrt(2 * config.num_layers) if name in RESIDUAL_PROJECTIONS else 0.02
            generator.standard_normal(dtype=np.float32, out=tensor)
            tensor *= np.float32(std)
        else:
            tensor[...] = 1 if name in ("ln1w", "ln2w", "lnfw") else 0
    params.wte[config.vocab_size:] = 0
