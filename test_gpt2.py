"""Hold the program to float64: activations, gradients, and ten steps of training.

    python test_gpt2.py                                        a tiny model, every tensor, seconds
    python test_gpt2.py --model d12 --python OTHER/bin/python  the 124M shape, minutes; OTHER has PyTorch
    pytest test_gpt2.py                                        the tiny model's checks as tests

The truth is dev/reference_tiny.npz, which dev/reference_pytorch.py wrote in float64 with PyTorch. An
error is ||x - truth|| / ||truth|| over a whole tensor. Beside the program's stands the error of PyTorch
itself in float32, or with products in bfloat16: the two should be alike, since rounding is all that either
should get wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import gpt2
from gpt2 import Tensors
from train_gpt2 import GPT2

REFERENCE_SCRIPT = Path(__file__).parent / "dev" / "reference_pytorch.py"
TINY = Path(__file__).parent / "dev" / "reference_tiny.npz"
THREADS = os.cpu_count()

# Ten steps or twelve layers of float32 rounding stay well below these; a forgotten term does not.
BOUNDS = {"tiny": 1e-5, "d12": 1e-4}

# In bfloat16: how often the error of PyTorch's autocast, tensor by tensor, over several models.
BFLOAT16_BOUND = 1.2

PADDED = ("wte", "headw")   # their last rows only pad the vocabulary; GPT-2 has no headw


class Row(NamedTuple):
    """One line of the report."""
    name: str
    error: float
    bound: float
    pytorch: float | None = None  # the error of PyTorch in the same precision, where it has one

    @property
    def ok(self):
        return bool(self.error <= self.bound)  # False for NaN


class Reference:
    """A file written by dev/reference_pytorch.py; its arrays are read when asked for.

    definition: the module that defines the model, gpt2 or llama
    """

    def __init__(self, path, bound, definition=gpt2):
        self.arrays = np.load(path)
        self.bound = bound
        self.definition = definition
        settings = json.loads(str(self.arrays["settings"]))
        self.config = definition.Config(**settings["config"])
        self.training = settings["training"]
        self.tokens = self.arrays["tokens"].astype(np.int32)    # (B,T)
        self.targets = self.arrays["targets"].astype(np.int32)  # (B,T)

    def row(self, name, value, key, part=np.s_[...]):
        """Compare value with the given part of the float64 array called key."""
        truth = self.arrays[f"float64.{key}"][part]
        pytorch = self.arrays[f"float32.{key}"][part]
        return Row(name, relative_error(value, truth), self.bound, relative_error(pytorch, truth))

    def worst_gradient(self, name, model):
        """One row for all the gradients of a model: the largest of their errors."""
        return Row(name, np.max([row.error for row in self.gradients(model)]), self.bound)

    def gradients(self, model):
        for name, tensor in self.without_padding(model.grads):
            yield self.row(name, tensor, f"grads.{name}")

    def without_padding(self, tensors):
        """(name, view) of all parameters or gradients that are not empty, less the rows that only pad the vocabulary."""
        for name, tensor in tensors.items():
            if tensor.size > 0:
                yield name, tensor[: self.config.vocab_size] if name in PADDED else tensor

    def padding(self, tensors):
        """The rows that `without_padding` leaves out."""
        return [tensor[self.config.vocab_size :] for name, tensor in tensors.items() if name in PADDED and tensor.size > 0]

    def new_params(self, prefix=""):
        """The parameters in the file, as Tensors."""
        params = Tensors(self.definition.parameter_shapes(self.config))
        for name, tensor in self.without_padding(params):
            tensor[...] = self.arrays[f"{prefix}params.{name}"]
        return params

    def layer_activations(self):
        """The names of the activations that have rows of channels in each layer."""
        shapes = self.definition.activation_shapes(self.config, *self.tokens.shape)
        return [name for name, shape in shapes.items() if len(shape) == 3]


def relative_error(value, truth):
    value = value.get() if hasattr(value, "get") else value  # from the GPU
    return np.linalg.norm(np.asarray(value, np.float64) - truth) / np.linalg.norm(truth)


def build(model_class, reference, batch_size=None, sequence_length=None, threads=THREADS):
    """A model with the reference's parameters, for the reference's batch unless told otherwise."""
    B, T = reference.tokens.shape
    model = model_class(reference.config, batch_size or B, sequence_length or T, threads)
    model.set_params(reference.new_params())
    return model


def run(model, tokens, targets, accumulation_steps=1):
    """Forward and backward over one batch; return its loss."""
    model.forward(tokens)
    return model.backward(targets, accumulation_steps)


def train(model, reference):
    """Take the reference's AdamW steps on its one batch, yielding every step's (loss, gradient norm)."""
    settings = reference.training
    for step in range(1, settings["steps"] + 1):
        started = model.start_timer()
        loss = run(model, reference.tokens, reference.targets)
        norm = model.gradient_norm()
        model.update(step, settings["learning_rate"], settings["weight_decay"], norm, settings["grad_clip"])
        loss, norm, _ = model.finish_step(loss, norm, started)
        yield loss, norm


# Each check takes a model class and a reference and yields rows; its docstring heads them in the report.


def check_activations(model_class, reference):
    """activations"""
    model = build(model_class, reference)
    model.forward(reference.tokens)
    model.loss(reference.targets)
    yield reference.row("encoded", model.acts.encoded, "acts.encoded")
    for layer in range(reference.config.num_layers):
        for name in reference.layer_activations():
            yield reference.row(f"{name}[{layer}]", getattr(model.acts, name)[layer], f"acts.{name}", layer)
    yield reference.row("lnf", model.acts.lnf, "acts.lnf")
    yield reference.row("losses", model.acts.losses, "acts.losses")
    B, T = reference.tokens.shape
    for b in range(B):
        logits = model.next_token_logits(reference.tokens[b : b + 1])
        yield reference.row(f"logits after sequence {b}", logits, "acts.logits", (b + 1) * T - 1)


def check_gradients(model_class, reference):
    """gradients"""
    model = build(model_class, reference)
    run(model, reference.tokens, reference.targets)
    yield from reference.gradients(model)


def check_losses(model_class, reference):
    """losses and gradient norms while training"""
    model = build(model_class, reference)
    losses, norms = reference.arrays["float64.step_losses"], reference.arrays["float64.step_norms"]
    steps = list(train(model, reference))
    for i, (loss, _) in enumerate(steps):
        yield reference.row(f"step {i + 1:2}  loss {loss:9.6f}  expected {losses[i]:9.6f}", loss, "step_losses", i)
    for i, (_, norm) in enumerate(steps):
        yield reference.row(f"step {i + 1:2}  norm {norm:9.6f}  expected {norms[i]:9.6f}", norm, "step_norms", i)


def check_parameters(model_class, reference):
    """parameters after training"""
    model = build(model_class, reference)
    for _ in train(model, reference):
        pass
    for name, value in reference.without_padding(model.params):
        if name == "qkvb" and reference.definition is gpt2:
            # The bias of the keys adds the same amount to all scores of a query, which softmax ignores:
            # its gradient is zero except for rounding, and Adam divides rounding by its own size. (Llama rotates its keys.)
            C = reference.config.channels
            yield reference.row("qkvb (queries)", value[:, :C], f"params.{name}", np.s_[:, :C])
            yield reference.row("qkvb (values)", value[:, 2 * C :], f"params.{name}", np.s_[:, 2 * C :])
        else:
            yield reference.row(name, value, f"params.{name}")


def check_padding(model_class, reference):
    """padding of the vocabulary"""
    def largest(tensors):
        return max(float(abs(rows).max()) for rows in reference.padding(tensors))

    model = build(model_class, reference)
    for rows in reference.padding(model.params):
        rows[...] = 100.0  # no score against these rows may reach the loss
    loss = run(model, reference.tokens, reference.targets)
    yield reference.row("loss, padding rows at 100", loss, "step_losses", 0)
    yield reference.worst_gradient("worst gradient, padding rows at 100", model)
    yield Row("largest gradient in a padding row", largest(model.grads), 0.0)

    model = build(model_class, reference)  # with the padding rows at 0
    for _ in train(model, reference):
        pass
    yield Row("largest padding weight after training", largest(model.params), 0.0)


def check_batching(model_class, reference):
    """the same gradients by other ways"""
    tokens, targets = reference.tokens, reference.targets
    B, T = tokens.shape

    for threads in (1, 2, 3):
        model = build(model_class, reference, threads=threads)
        run(model, tokens, targets)
        yield reference.worst_gradient(f"threads = {threads}", model)

    model = build(model_class, reference, batch_size=1)
    for b in range(B):
        run(model, tokens[b : b + 1], targets[b : b + 1], accumulation_steps=B)
    yield reference.worst_gradient(f"{B} accumulated micro-batches", model)

    model = build(model_class, reference, batch_size=B + 1, sequence_length=reference.config.max_seq_len)
    run(model, tokens, targets)
    yield reference.worst_gradient("buffers larger than the batch", model)

    # More tokens than the classifier takes at once. A mean over copies of the batch has the batch's gradients.
    copies = 8
    model = build(model_class, reference, batch_size=copies * B)
    run(model, np.tile(tokens, (copies, 1)), np.tile(targets, (copies, 1)))
    yield reference.worst_gradient(f"{copies} copies of the batch", model)


def check_bfloat16(model_class, reference):
    """gradients with products in bfloat16"""
    arrays, errors = reference.arrays, {}
    while f"bfloat16.{len(errors)}.tokens" in arrays:
        prefix = f"bfloat16.{len(errors)}."
        model = model_class(reference.config, *reference.tokens.shape, THREADS, dtype="bfloat16")
        model.set_params(reference.new_params(prefix))
        run(model, *(arrays[prefix + name].astype(np.int32) for name in ("tokens", "targets")))
        errors[prefix] = {name: relative_error(tensor, arrays[f"{prefix}grads.{name}"])
                          for name, tensor in reference.without_padding(model.grads)}
    for name in next(iter(errors.values())):
        pytorch = root_mean_square([arrays[f"{prefix}error.{name}"] for prefix in errors])
        yield Row(name, root_mean_square([error[name] for error in errors.values()]), BFLOAT16_BOUND * pytorch, pytorch)


def root_mean_square(values):
    return float(np.sqrt(np.mean(np.square(values))))


CHECKS = {
    "tiny": (check_activations, check_gradients, check_losses, check_parameters, check_padding, check_batching, check_bfloat16),
    "d12": (check_gradients, check_losses),
}


@pytest.mark.parametrize("check", CHECKS["tiny"])
def test_gpt2(check):
    failed = [row for row in check(GPT2, Reference(TINY, BOUNDS["tiny"])) if not row.ok]
    assert not failed


def report(checks, model_class, reference):
    """Print every row of the checks and a summary; return whether all are within their bounds."""
    print(f"{reference.config}, tokens {reference.tokens.shape}")
    rows = []
    for check in checks:
        print(f"\n{check.__doc__:45} {'error':>9}  {'PyTorch':>15}  {'bound':>7}")
        for row in check(model_class, reference):
            pytorch = "" if row.pytorch is None else f"{row.pytorch:.1e}"
            print(f"  {row.name:43} {row.error:9.1e}  {pytorch:>15}  {row.bound:7.0e}  {'OK' if row.ok else 'FAIL'}",
                  flush=True)
            rows.append(row)
    failed = [row for row in rows if not row.ok]
    if failed:
        print(f"\nFAIL: {len(failed)} of {len(rows)} rows; the first is {failed[0].name}")
    else:
        worst = max(rows, key=lambda row: row.error)
        print(f"\nOK: all {len(rows)} rows; the worst error is {worst.error:.1e}, of {worst.name}")
    return not failed


def write_reference(python, model, path):
    """Have another Python, one with PyTorch, write the reference: this process never loads it."""
    try:
        has_torch = subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: --python {python}: {error.strerror}")
    if not has_torch:
        sys.exit(f"{Path(sys.argv[0]).name}: {python} cannot import torch: name a Python that can with --python PATH")
    subprocess.run([python, REFERENCE_SCRIPT, "--model", model, "--output", path], check=True)


def main():
    parser = argparse.ArgumentParser(description="Compare the program with PyTorch in float64.")
    parser.add_argument("--model", choices=CHECKS, default="tiny", help="default: %(default)s")
    parser.add_argument("--python", default=sys.executable, metavar="PATH",
                        help="for --model d12, a Python that has PyTorch (default: this one)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = TINY
        if args.model != "tiny":
            path = Path(folder) / "reference.npz"
            write_reference(args.python, args.model, path)
        reference = Reference(path, BOUNDS[args.model])
        ok = report(CHECKS[args.model], GPT2, reference)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
