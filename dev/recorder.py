"""Record a training step: every kernel call, the arrays it read and wrote, their norms, and its time.

Nothing about the model is written down here: calls are intercepted as they happen, and an experiment finds out what each kernel
reads and writes. explore.py prints the recording, draw_step.py draws it.
"""
import contextlib
import functools
import math
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numba.core.dispatcher import Dispatcher

import llama
import train_gpt2
import train_llama
from gpt2 import Config, Tensors

LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 2e-3, 0.1, 1.0     # train_gpt2.py's defaults
TIMED_STEPS = 3
SIZES = dict(max_seq_len=8, vocab_size=50, padded_vocab_size=128, num_layers=3, num_heads=2, channels=8)
LLAMA_SIZES = SIZES | dict(num_key_heads=1, head_size=4, hidden=12)
TINY, TINY_LLAMA = Config(**SIZES), llama.Config(**LLAMA_SIZES)


# ----------------------------------------------------------------------------------------------------------------------
# Intercepting kernel calls

class WatchedKernels:
    """Replaces the module of kernels: a call of a kernel becomes watch(kernel, *arguments)."""

    def __init__(self, kernels, watch):
        self.kernels, self.watch = kernels, watch

    def __getattr__(self, name):
        value = getattr(self.kernels, name)
        return functools.partial(self.watch, value) if isinstance(value, Dispatcher) else value


@contextlib.contextmanager
def watching(watch):
    """Route every kernel call of a model through watch(kernel, *arguments), which makes the call and returns its result."""
    modules = train_gpt2, train_llama       # both at once: Llama has its update from GPT2
    originals = [module.kernels for module in modules]
    for module in modules:
        module.kernels = WatchedKernels(module.kernels, watch)
    try:
        yield
    finally:
        for module, kernels in zip(modules, originals):
            module.kernels = kernels


def run_step(model, batch, begin=lambda phase: None):
    """Take a training step on batch.tokens and batch.targets; call begin(phase) before each phase. Returns loss and norm."""
    begin("forward")
    model.forward(batch.tokens)
    begin("backward")
    loss = model.backward(batch.targets)
    begin("update")
    norm = model.gradient_norm()
    model.update(1, LEARNING_RATE, WEIGHT_DECAY, norm, GRAD_CLIP)
    return loss, norm


def as_batch(tokens, targets):
    """Tokens and targets, (B, T) each, as Tensors, so that the recorder recognizes them by address like all other arrays."""
    return Tensors({"tokens": tokens.shape, "targets": targets.shape},
                   lambda size: np.concatenate([tokens, targets], axis=None, dtype=np.int32))


@functools.cache
def effects(config=TINY):
    """Name of a kernel -> (positions of the arguments it reads, positions of those it writes).

    Found by experiment, in a step of a tiny model. A kernel writes an argument if a call changes it. It reads an argument if it
    does not write it, or if a NaN put there before the call is still somewhere in its arguments afterward.
    """
    found = {}

    def trial(kernel, arguments, poisoned=None):
        arguments = [argument.copy() if isinstance(argument, np.ndarray) else argument for argument in arguments]
        if poisoned is not None:
            arguments[poisoned][...] = np.nan
        kernel(*arguments)
        return arguments

    def watch(kernel, *arguments):
        arrays = array_positions(kernel, arguments)

        def spreads(poisoned):
            return any(np.isnan(array).any() for i, array in enumerate(trial(kernel, arguments, poisoned)) if i in arrays)

        after = trial(kernel, arguments)
        writes = {i for i in arrays if not np.array_equal(after[i], arguments[i])}
        reads = {i for i in arrays if i not in writes or spreads(i)}
        earlier_reads, earlier_writes = found.get(kernel.__name__, (set(), set()))      # a call without a bias, say
        found[kernel.__name__] = earlier_reads | reads, earlier_writes | writes
        return kernel(*arguments)

    with watching(watch):
        run_step(*tiny_step(config))
    return found


def tiny(config):
    """A config with the sizes of TINY or TINY_LLAMA. The rest stays, so the tiny model calls the same kernels."""
    return replace(config, **LLAMA_SIZES if isinstance(config, llama.Config) else SIZES)


def tiny_step(config=TINY):
    """A tiny model and a batch: a step takes milliseconds."""
    model_class = train_llama.Llama if isinstance(config, llama.Config) else train_gpt2.GPT2
    model = model_class(config, 2, 4, threads=1)
    model.initialize(seed=0)
    sequences = np.arange(2 * 5, dtype=np.int32).reshape(2, 5)
    return model, as_batch(sequences[:, :-1], sequences[:, 1:])


def array_positions(kernel, arguments):
    """The positions of the model's arrays among a kernel's arguments, without empty arrays (no bias) and the workspace."""
    names = kernel.py_func.__code__.co_varnames
    return {i for i, argument in enumerate(arguments)
            if isinstance(argument, np.ndarray) and argument.size > 0 and names[i] != "workspace"}


# ----------------------------------------------------------------------------------------------------------------------
# Recording a step

class Array(NamedTuple):
    """An array argument of a kernel call, named by its place in the model's memory."""
    buffer: str              # params, grads, acts, scratch, adam_m, adam_v, batch, or tables: cos and sin of a Llama
    name: str                # in that buffer's table of shapes; empty: the whole buffer
    layer: int | None        # None: not one layer's part of a tensor
    shape: tuple
    read: bool
    written: bool
    norm: float              # after the call; NaN if it was not written

    @property
    def tensor(self):
        """Its name without the layer. Gradients and moments have the names of their parameters, so their buffer precedes it."""
        return f"{self.buffer}.{self.name}".rstrip(".") if self.buffer in ("grads", "adam_m", "adam_v") else self.name

    def __str__(self):
        return self.tensor if self.layer is None else f"{self.tensor}[{self.layer}]"


class Call(NamedTuple):
    """One kernel call."""
    phase: str               # forward, backward or update
    kernel: str
    layer: int | None
    arrays: list
    result: float | None
    seconds: float = math.nan
    sign: int | None = None  # of rope: 1, or -1 to rotate back

    @property
    def written(self):
        return [array for array in self.arrays if array.written]

    @property
    def read(self):
        """The arrays that are only read."""
        return [array for array in self.arrays if not array.written]

    def __str__(self):
        writes = ", ".join(f"{'+' if array.read else ''}{array}" for array in self.written)
        reads = ", ".join([*map(str, self.read), *([f"sign={self.sign}"] if self.sign else [])])
        return f"{writes} = {self.kernel}({reads})".removeprefix(" = ")


class Recorder:
    """A `watch` function that appends every kernel call to `calls`, see `watching`.

    A call belongs to the layer of its parameters or their gradients. A call without any belongs to the previous call's layer.
    """

    def __init__(self, model, batch):
        self.model, self.batch, self.effects = model, batch, effects(tiny(model.config))
        self.calls = []
        self.phase = self.layer = None

    def begin(self, phase):
        self.phase = phase

    def __call__(self, kernel, *arguments):
        result = kernel(*arguments)
        reads, writes = self.effects[kernel.__name__]
        positions = {}      # several positions if a kernel gets the same array twice
        for i in sorted(array_positions(kernel, arguments)):
            positions.setdefault(self.place(arguments[i]), set()).add(i)
        arrays = []
        for place, where in positions.items():
            array = arguments[min(where)]
            norm = float(np.linalg.norm(array)) if where & writes else math.nan
            arrays.append(Array(*place, array.shape, bool(where & reads), bool(where & writes), norm))
        of_parameters = [array.layer for array in arrays if array.buffer in ("params", "grads")]
        self.layer = of_parameters[0] if of_parameters else self.layer
        sign = dict(zip(kernel.py_func.__code__.co_varnames, arguments)).get("sign")
        self.calls.append(Call(self.phase, kernel.__name__, self.layer, arrays, result, sign=sign))
        return result

    def place(self, array):
        """Where an array lies in the model's memory: (buffer, name in that buffer, layer)."""
        model = self.model
        buffers = dict(params=model.params, grads=model.grads, acts=model.acts, scratch=model.scratch, batch=self.batch,
                       adam_m=Tensors(model.params.shapes, lambda size: model.adam_m),
                       adam_v=Tensors(model.params.shapes, lambda size: model.adam_v))
        buffer = next((buffer for buffer, tensors in buffers.items() if np.may_share_memory(array, tensors.flat)), None)
        if buffer is None:
            return "tables", next(name for name, value in vars(model).items() if value is array), None
        tensors = buffers[buffer]
        first = (array.ctypes.data - tensors.flat.ctypes.data) // array.itemsize
        for name, place in tensors.places.items():
            if place.start <= first and first + array.size <= place.stop:
                shared = model.recompute and name in model.definition.RECOMPUTED
                one_layer = array.shape == tensors.shapes[name][1:] and not shared
                return buffer, name, (first - place.start) // array.size if one_layer else None
        return buffer, "", None


def record_step(model, batch):
    """Take a training step. Returns its Calls, its loss and the norm of its gradients."""
    recorder = Recorder(model, batch)
    with watching(recorder):
        loss, norm = run_step(model, batch, recorder.begin)
    return recorder.calls, loss, norm


def time_step(model, batch):
    """Time a few training steps. Returns the seconds of each call in the fastest step, and of that step as a whole."""
    def watch(kernel, *arguments):
        started = time.perf_counter()
        result = kernel(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    timed = []
    for _ in range(TIMED_STEPS):
        seconds = []
        started = time.perf_counter()
        with watching(watch):
            run_step(model, batch)
        timed.append((time.perf_counter() - started, seconds))
    whole, seconds = min(timed)
    return seconds, whole
