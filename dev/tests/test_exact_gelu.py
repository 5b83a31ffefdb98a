"""A model with exact_gelu: training on both devices, and both decoders, against a float64 model and its finite differences."""
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module

import numpy as np
import pytest

import generate_gpt2
import generate_gpt2_gpu
import kernels_cpu
import kernels_float64 as exact
import llama
import train_gpt2
import train_gpt2_gpu
from dev.recorder import WatchedKernels
from gpt2 import Config, Tensors, parameter_shapes
from matmul_cpu import KernelCache
from matvec_cpu import QUANT_GROUP
from test_kernels import EMPTY, finite_differences, relative_error

CONFIG = Config(max_seq_len=4, vocab_size=5, padded_vocab_size=5, num_layers=2, num_heads=2, channels=4, exact_gelu=True)
PARAMS = Tensors(parameter_shapes(CONFIG))
PARAMS.flat[...] = np.random.default_rng(0).normal(0, 0.7, PARAMS.size)     # large: the tanh form would give other numbers
INPUTS, TARGETS = np.random.default_rng(1).integers(CONFIG.vocab_size, size=(2, 3, CONFIG.max_seq_len), dtype=np.int32)
BOUND = 2e-6


def last_rows(**changed):
    """The normalized output of the last block (N, C) for INPUTS, in float64, with PARAMS except for those in `changed`."""
    params = dict(PARAMS.items()) | changed
    residual = exact.encoder_forward(INPUTS, params["wte"], params["wpe"])
    for l in range(CONFIG.num_layers):
        p = {name: tensor[l] for name, tensor in params.items() if len(tensor) == CONFIG.num_layers}
        ln1, _, _ = exact.layernorm_forward(residual, p["ln1w"], p["ln1b"])
        qkv = exact.matmul_forward(ln1, p["qkvw"], p["qkvb"])
        att, _ = exact.attention_forward(qkv, *INPUTS.shape, CONFIG.num_heads)
        residual = residual + exact.matmul_forward(att, p["attprojw"], p["attprojb"])
        ln2, _, _ = exact.layernorm_forward(residual, p["ln2w"], p["ln2b"])
        fch = exact.matmul_forward(ln2, p["fcw"], p["fcb"])
        residual = residual + exact.matmul_forward(exact.gelu_exact_forward(fch), p["fcprojw"], p["fcprojb"])
    return exact.layernorm_forward(residual, params["lnfw"], params["lnfb"])[0]


def mean_loss(**changed):
    logits = exact.matmul_forward(last_rows(**changed), changed.get("wte", PARAMS.wte), EMPTY)
    return exact.fused_classifier(logits, TARGETS.reshape(-1), 1.0, CONFIG.vocab_size)[0].mean()


@cache
def gradients():
    """Name -> gradient of mean_loss."""
    return {name: finite_differences(lambda x, name=name: mean_loss(**{name: x}), tensor) for name, tensor in PARAMS.items()}


def assert_loss_and_gradients(loss, grads):
    assert relative_error(loss, mean_loss()) <= BOUND
    for name, expected in gradients().items():
        assert relative_error(getattr(grads, name), expected) <= BOUND, name


@pytest.mark.parametrize("recompute", [False, True])
def test_training(recompute):
    model = train_gpt2.GPT2(CONFIG, *INPUTS.shape, threads=1, recompute=recompute)
    model.set_params(PARAMS)
    model.forward(INPUTS)
    assert_loss_and_gradients(model.backward(TARGETS), model.grads)


def test_training_on_a_device(on):
    model = train_gpt2_gpu.GPT2(CONFIG, *INPUTS.shape, on)
    model.set_params(PARAMS)
    model.forward(on.to_device(INPUTS))
    loss = on.to_host(model.backward(on.to_device(TARGETS)))
    assert_loss_and_gradients(loss, Tensors(model.grads.shapes, lambda size: on.to_host(model.grads.flat)))


@pytest.mark.parametrize("memory_bound_rows", [0, INPUTS.size])      # the kernels for many rows, and those on one thread
def test_decoder(monkeypatch, memory_bound_rows):
    monkeypatch.setattr(generate_gpt2, "MEMORY_BOUND_ROWS", memory_bound_rows)
    decoder = generate_gpt2.Decoder(CONFIG, PARAMS, len(INPUTS), threads=1)
    assert relative_error(decoder.forward(INPUTS), last_rows()) <= BOUND


def test_decoder_on_a_device(on):
    decoder = generate_gpt2_gpu.Decoder(CONFIG, PARAMS, len(INPUTS), on)
    assert relative_error(on.to_host(decoder.forward(INPUTS)), last_rows()) <= BOUND


@pytest.mark.parametrize("config", [replace(CONFIG, exact_gelu=False), CONFIG, llama.model_config("l2")],
                         ids=["gelu", "exact gelu", "llama"])
@pytest.mark.parametrize("kind, settings", [
    ("train", ["float32"]), ("train", ["bfloat16"]),
    ("generate", [{"float32"}, "float32"]), ("generate", [{"int8", "int4"}, "bfloat16"])])
def test_compiled_kernels_are_those_that_are_called(monkeypatch, config, kind, settings):
    """Of the kinds of layers, and of the formats of weights and products, only the model's are compiled before a run."""
    definition, generating = llama.definition_of(config), kind == "generate"
    shared = generate_gpt2 if generating else train_gpt2
    program = import_module(f"{kind}_{definition.__name__}")
    compiled, called, missing = set(), set(), []

    def is_intact(self, target, dtypes):
        compiled.add((self, frozenset((name, np.dtype(dtype)) for name, dtype in dtypes.items()
                                      if name in self._py_func.__code__.co_varnames)))
        return missing == []

    monkeypatch.setattr(KernelCache, "is_intact", is_intact)
    monkeypatch.setattr(kernels_cpu, "compile_in_processes", lambda *arguments: missing.append(arguments))
    with_weights = kernels_cpu.DECODING_FLOAT32 + kernels_cpu.DECODING_COMPACT
    shared.compile_kernels(config, *settings)
    assert missing == []

    def watch(kernel, *arguments):
        dtypes = {name: value.dtype for name, value in zip(kernel.py_func.__code__.co_varnames, arguments)
                  if name == "workspace" or generating and kernel in with_weights and name in ("weight", "wte")}
        called.add((kernel._cache, frozenset(dtypes.items())))
        return kernel(*arguments)

    for module in (shared, program):
        monkeypatch.setattr(module, "kernels", WatchedKernels(kernels_cpu, watch))
    rest = settings if not generating else [sorted(settings[0]), settings[1]]
    sizes = dict(context=2 * generate_gpt2.MEMORY_BOUND_ROWS, channels=QUANT_GROUP) if generating else {}
    for first in (False, True):
        program.run_every_kernel(first, asdict(definition.smallest_model(config, **sizes)), *rest)
    assert called == compiled
