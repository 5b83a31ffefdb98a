"""Record a training step: every kernel call, which arrays it read and wrote, their norms and its time.

Nothing about the model is spelled out here: its calls are watched as they happen, and what a kernel reads and writes is found
by experiment. explore.py shows what is recorded, draw_step.py draws it.
"""
import contextlib
import functools
import math
import time
from math import prod
from typing import NamedTuple

import numpy as np
from numba.core.dispatcher import Dispatcher

import train_gpt2
from gpt2 import RECOMPUTED, Config, Tensors
from train_gpt2 import GPT2

LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 1e-3, 0.1, 1.0     # train_gpt2.py's defaults
TIMED_STEPS = 3
TINY = Config(max_seq_len=8, vocab_size=50, padded_vocab_size=128, num_layers=3, num_heads=2, channels=8)


# ----------------------------------------------------------------------------------------------------------------------
# Watching the kernels

class Watched:
    """Stands in for the module of kernels: every call of one becomes watch(kernel, *arguments)."""

    def __init__(self, kernels, watch):
        self.kernels, self.watch = kernels, watch

    def __getattr__(self, name):
        value = getattr(self.kernels, name)
        return functools.partial(self.watch, value) if isinstance(value, Dispatcher) else value


@contextlib.contextmanager
def watching(watch):
    """Have watch(kernel, *arguments) make every call of a kernel in train_gpt2, and return what the kernel does."""
    kernels = train_gpt2.kernels
    train_gpt2.kernels = Watched(kernels, watch)
    try:
        yield
    finally:
        train_gpt2.kernels = kernels


def run_step(model, batch, begin=lambda phase: None):
    """A training step on batch.tokens and batch.targets; begin(phase) is called before each part. Returns loss and norm."""
    begin("forward")
    model.forward(batch.tokens)
    begin("backward")
    loss = model.backward(batch.targets)
    begin("update")
    norm = model.gradient_norm()
    model.update(1, LEARNING_RATE, WEIGHT_DECAY, norm, GRAD_CLIP)
    return loss, norm


def as_batch(tokens, targets):
    """Tokens and targets, (B, T) each, as Tensors, so that they are found by their memory like all other arrays."""
    return Tensors({"tokens": tokens.shape, "targets": targets.shape},
                   lambda size: np.concatenate([tokens, targets], axis=None, dtype=np.int32))


@functools.cache
def effects():
    """What every kernel of a training step does to its arguments: its name -> (positions it reads, positions it writes).

    Found by experiment, in a step of a tiny model. What a kernel writes is not the same after a call. What it does not write
    it reads, and what it writes it reads as well if a NaN that was there before is anywhere afterward.
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
        earlier_reads, earlier_writes = found.get(kernel.__name__, (set(), set()))      # of a call without a bias, say
        found[kernel.__name__] = earlier_reads | reads, earlier_writes | writes
        return kernel(*arguments)

    with watching(watch):
        run_step(*tiny_step())
    return found


def tiny_step():
    """A tiny model and a batch for it, that take a step in no time."""
    model = GPT2(TINY, 2, 4, threads=1)
    model.initialize(seed=0)
    sequences = np.arange(2 * 5, dtype=np.int32).reshape(2, 5)
    return model, as_batch(sequences[:, :-1], sequences[:, 1:])


def array_positions(kernel, arguments):
    """Where among a kernel's arguments the model's arrays are: not those that stand for none, nor a product's workspace."""
    names = kernel.py_func.__code__.co_varnames
    return {i for i, argument in enumerate(arguments)
            if isinstance(argument, np.ndarray) and argument.size > 0 and names[i] != "workspace"}


# ----------------------------------------------------------------------------------------------------------------------
# Recording a step

class Array(NamedTuple):
    """One of a kernel's arrays, by its place in the model's memory."""
    buffer: str              # params, grads, acts, scratch, adam_m, adam_v, or batch
    name: str                # in that buffer's table of shapes; empty: the whole buffer
    layer: int | None        # where the tensor has one for each
    shape: tuple
    read: bool
    written: bool
    norm: float              # after the call, if it was written

    @property
    def tensor(self):
        """What it is called in all layers. The names of parameters stand for their gradients and moments, too."""
        return f"{self.buffer}.{self.name}".rstrip(".") if self.buffer in ("grads", "adam_m", "adam_v") else self.name

    def __str__(self):
        return self.tensor if self.layer is None else f"{self.tensor}[{self.layer}]"


class Call(NamedTuple):
    """One call of a kernel."""
    phase: str               # forward, backward or update
    kernel: str
    layer: int | None
    arrays: list
    result: float | None
    seconds: float = math.nan

    @property
    def written(self):
        return [array for array in self.arrays if array.written]

    @property
    def read(self):
        """What is read only."""
        return [array for array in self.arrays if not array.written]

    def __str__(self):
        writes = ", ".join(f"{'+' if array.read else ''}{array}" for array in self.written)
        return f"{writes} = {self.kernel}({', '.join(map(str, self.read))})".removeprefix(" = ")


class Recorder:
    """Notes in `calls` every call of a kernel that it makes, see `watching`.

    A call belongs to the layer of its parameters or their gradients. A call without any belongs to that of the call before.
    """

    def __init__(self, model, batch):
        self.model, self.batch, self.effects = model, batch, effects()
        self.calls = []
        self.phase = self.layer = None

    def begin(self, phase):
        self.phase = phase

    def __call__(self, kernel, *arguments):
        result = kernel(*arguments)
        reads, writes = self.effects[kernel.__name__]
        positions = {}      # more than one, if a kernel is given the same array twice
        for i in sorted(array_positions(kernel, arguments)):
            positions.setdefault(self.place(arguments[i]), set()).add(i)
        arrays = []
        for place, here in positions.items():
            array = arguments[min(here)]
            norm = float(np.linalg.norm(array)) if here & writes else math.nan
            arrays.append(Array(*place, array.shape, bool(here & reads), bool(here & writes), norm))
        of_parameters = [array.layer for array in arrays if array.buffer in ("params", "grads")]
        self.layer = of_parameters[0] if of_parameters else self.layer
        self.calls.append(Call(self.phase, kernel.__name__, self.layer, arrays, result))
        return result

    def place(self, array):
        """Where in the model's memory an array is: its buffer, its name there and its layer."""
        model = self.model
        buffers = dict(params=model.params, grads=model.grads, acts=model.acts, scratch=model.scratch, batch=self.batch,
                       adam_m=Tensors(model.params.shapes, lambda size: model.adam_m),
                       adam_v=Tensors(model.params.shapes, lambda size: model.adam_v))
        buffer = next(buffer for buffer, tensors in buffers.items() if np.may_share_memory(array, tensors.flat))
        tensors, stop = buffers[buffer], 0
        first = (array.ctypes.data - tensors.flat.ctypes.data) // array.itemsize
        for name, shape in tensors.shapes.items():
            start, stop = stop, stop + prod(shape)
            if start <= first and first + array.size <= stop:
                of_one_layer = array.shape == shape[1:] and not (model.recompute and name in RECOMPUTED)
                return buffer, name, (first - start) // array.size if of_one_layer else None
        return buffer, "", None


def record_step(model, batch):
    """The Calls of a training step, its loss and the norm of its gradients."""
    recorder = Recorder(model, batch)
    with watching(recorder):
        loss, norm = run_step(model, batch, recorder.begin)
    return recorder.calls, loss, norm


def time_step(model, batch):
    """The seconds of each call in the fastest of a few training steps, and of that whole step."""
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
