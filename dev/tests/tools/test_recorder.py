"""recorder.py: every kernel call of a step is recorded, with its arrays by name, and recording changes nothing."""
import math
from dataclasses import replace
from itertools import groupby
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest

import gpt2
import train_gpt2
from dev import recorder
from dev.recorder import TINY, TINY_LLAMA, effects, record_step, run_step, time_step, tiny_step
from training import parse_options

LLAMA_WITH_ALL = replace(TINY_LLAMA, tied=False, qkv_bias=True)


@pytest.fixture(scope="module")
def step():
    """The calls of a tiny model's step, its loss, its norm, and the model afterward."""
    return recorded(TINY)


def recorded(config):
    model, batch = tiny_step(config)
    return *record_step(model, batch), model


# The parameters that each kernel writes, as its docstring says; + where it adds to them or changes them in place.
WRITES = {
    "encoder_forward": "out",
    "encoder_backward": "+dwte +dwpe",
    "layernorm_forward": "out mean rstd",
    "layernorm_backward": "+dinp +dweight +dbias",
    "matmul_forward": "out",
    "matmul_backward": "dinp +dweight +dbias",
    "attention_forward": "out lse",
    "attention_backward": "dqkv",
    "gelu_forward": "out",
    "gelu_backward": "dinp",
    "residual_forward": "out",
    "fused_classifier": "losses +logits",
    "global_norm": "",
    "adamw_update": "+params +grads +m +v",
}


OF_GPT2_ONLY = {"layernorm_forward", "layernorm_backward", "gelu_forward", "gelu_backward"}
LLAMA_WRITES = {kernel: writes for kernel, writes in WRITES.items() if kernel not in OF_GPT2_ONLY} | {
    "encoder_backward": "+dwte",
    "rmsnorm_forward": "out rstd",
    "rmsnorm_backward": "+dinp +dweight",
    "rope": "+rows",
    "swiglu_forward": "out",
    "swiglu_backward": "dinp",
}


@pytest.mark.parametrize("config, expected", [(TINY, WRITES), (LLAMA_WITH_ALL, LLAMA_WRITES)], ids=["gpt2", "llama"])
def test_effects_found_by_experiment(config, expected):
    found = {}
    for name, (reads, writes) in effects(config).items():
        parameters = getattr(train_gpt2.kernels, name).py_func.__code__.co_varnames
        found[name] = " ".join("+" * (i in reads) + parameters[i] for i in sorted(writes))
    assert found == expected


def test_a_step_with_exact_gelu():
    """The calls of any other step, with the other two kernels."""
    calls, _, _ = record_step(*tiny_step(replace(TINY, exact_gelu=True)))
    assert [str(call).replace("gelu_exact", "gelu") for call in calls] == [str(call) for call in record_step(*tiny_step())[0]]
    assert sum("gelu_exact" in call.kernel for call in calls) == 2 * TINY.num_layers


def test_phases_and_layers(step):
    """Forward through the layers, back through them, and the update."""
    found = [(*place, len([*group])) for place, group in groupby(step[0], key=lambda call: (call.phase, call.layer))]
    assert found == [("forward", None, 1), ("forward", 0, 10), ("forward", 1, 10), ("forward", 2, 10), ("forward", None, 1),
                     ("backward", None, 4), ("backward", 2, 8), ("backward", 1, 8), ("backward", 0, 8), ("backward", None, 1),
                     ("update", None, 1 + 16)]


def test_arrays_by_name(step):
    found = [str(call) for call in step[0]]
    assert found[0] == "encoded = encoder_forward(tokens, wte, wpe)"
    for text in ("residual2[0] = residual_forward(encoded, proj)", "qkv[2] = matmul_forward(ln1[2], qkvw[2], qkvb[2])",
                 "att[1], att_lse[1] = attention_forward(qkv[1])", "losses, +logits = fused_classifier(targets)",
                 "dln, +grads.wte = matmul_backward(logits, lnf, wte)", "+dfch = gelu_backward(fch[0])",
                 "+dresidual, +grads.ln1w[1], +grads.ln1b[1] = "
                 "layernorm_backward(dln, ln1_mean[1], ln1_rstd[1], residual3[0], ln1w[1])", "global_norm(grads)",
                 "+qkvw, +grads.qkvw, +adam_m.qkvw, +adam_v.qkvw = adamw_update()"):
        assert found.count(text) == 1, text


def test_arrays_of_a_llama_by_name():
    found = [str(call) for call in recorded(LLAMA_WITH_ALL)[0]]
    assert found[0] == "encoded = encoder_forward(tokens, wte)"
    for text in ("qkv[2] = matmul_forward(ln1[2], qkvw[2], qkvb[2])", "+qkv[1] = rope(cos, sin, sign=1)",
                 "fch_swiglu[0] = swiglu_forward(fch[0])", "dln, +grads.headw = matmul_backward(logits, lnf, headw)",
                 "dfch = swiglu_backward(dfch_swiglu, fch[0])", "dln, +grads.fcw[0] = matmul_backward(dfch, ln2[0], fcw[0])",
                 "+dresidual, +grads.ln1w[1] = rmsnorm_backward(dln, ln1_rstd[1], residual3[0], ln1w[1])",
                 "+qkvb, +grads.qkvb, +adam_m.qkvb, +adam_v.qkvb = adamw_update()"):
        assert found.count(text) == 1, text
    assert found.count("+dqkv = rope(cos, sin, sign=-1)") == TINY_LLAMA.num_layers


@pytest.mark.parametrize("config", [TINY, TINY_LLAMA, LLAMA_WITH_ALL], ids=["gpt2", "tied llama", "llama"])
def test_every_tensor_is_recognized(config):
    """Each activation is written anew once in each layer, and the gradient of every parameter is written."""
    calls, _, _, model = recorded(config)
    L = TINY.num_layers
    arrays = [array for call in calls if call.phase != "update" for array in call.written]
    written = [(array.buffer, array.name, array.layer) for array in arrays]

    def in_every_layer(tensors):
        return [(name, layer) for name, shape in tensors.shapes.items() if prod(shape) > 0
                for layer in (range(L) if shape[0] == L else [None])]
    activations = [(array.name, array.layer) for array in arrays if array.buffer == "acts" and not array.read]
    assert sorted(activations, key=str) == sorted(in_every_layer(model.acts), key=str)
    assert {(name, layer) for buffer, name, layer in written if buffer == "grads"} == set(in_every_layer(model.grads))
    assert {name for buffer, name, _ in written if buffer == "scratch"} == set(model.scratch.shapes)


@pytest.mark.parametrize("config, last_call", [(TINY, "fch_gelu = gelu_forward(fch)"),
                                               (TINY_LLAMA, "fch_swiglu = swiglu_forward(fch)")], ids=["gpt2", "llama"])
def test_recomputed_activations_have_one_layer_only(config, last_call):
    _, loss, norm, kept = recorded(config)
    model = type(kept)(config, *kept.tokens.shape, threads=1, recompute=True)
    model.initialize(0)
    calls, *again = record_step(model, tiny_step(config)[1])
    found = [(call.phase, call.layer, str(call)) for call in calls]
    for l in range(TINY.num_layers):
        assert found.count(("backward", l, last_call)) == (l < TINY.num_layers - 1) and ("forward", l, last_call) in found
    assert again == [loss, norm]


@pytest.mark.parametrize("config", [TINY, TINY_LLAMA], ids=["gpt2", "llama"])
def test_recording_changes_nothing(config):
    model, batch = tiny_step(config)
    loss, norm = run_step(model, batch)
    calls, recorded_loss, recorded_norm, recorded_model = recorded(config)
    assert (loss, norm) == (recorded_loss, recorded_norm)
    assert model.params.flat.tobytes() == recorded_model.params.flat.tobytes()
    seconds, whole = time_step(model, batch)
    assert len(seconds) == len(calls) and min(seconds) > 0 and sum(seconds) <= whole


def test_norms(step):
    """Those of activations are as the step left them; those of gradients add up to the norm that the step reports."""
    calls, _, norm, model = step
    for call in calls:
        for array in call.written:
            if array.buffer == "acts":
                tensor = getattr(model.acts, array.name)
                tensor = tensor if array.layer is None else tensor[array.layer]
                assert array.shape == tensor.shape and array.norm == pytest.approx(np.linalg.norm(tensor))
    last = {str(array): array.norm for call in calls if call.phase == "backward" for array in call.written
            if array.buffer == "grads"}
    assert math.hypot(*last.values()) == pytest.approx(norm, rel=1e-5)


def test_times_are_those_of_the_fastest_step(monkeypatch):
    """On a clock that advances only in kernels and, between them, in the program."""
    class Kernel:
        def __init__(self, seconds):
            self.seconds = seconds

        def __call__(self):
            nonlocal now
            now += self.seconds * slowness

    def run(model, batch):
        nonlocal now, slowness
        slowness = next(slownesses)
        train_gpt2.kernels.short()
        now += 0.5
        train_gpt2.kernels.long()

    now, slowness, slownesses = 0.0, 1, iter([3, 1, 2])
    monkeypatch.setattr(recorder, "Dispatcher", Kernel)
    monkeypatch.setattr(recorder, "run_step", run)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(train_gpt2, "kernels", SimpleNamespace(short=Kernel(1), long=Kernel(4)))
    assert time_step(None, None) == ([1, 4], 5.5)


def test_settings_are_the_defaults_of_the_program(tmp_path):
    options = parse_options(gpt2, "CPU", ["--output-dir", str(tmp_path)])
    assert ((recorder.LEARNING_RATE, recorder.WEIGHT_DECAY, recorder.GRAD_CLIP) ==
            (options.learning_rate, options.weight_decay, options.grad_clip))
