"""What dev/recorder.py notes of a training step."""
import math
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import train_gpt2
from dev import recorder
from dev.recorder import TINY, effects, record_step, run_step, time_step, tiny_step
from training import parse_options


@pytest.fixture(scope="module")
def step():
    """The calls of a tiny model's step, its loss, its norm, and the model afterward."""
    model, batch = tiny_step()
    return *record_step(model, batch), model


# Written parameters of each kernel, with a + where what they held before counts, as the kernels' docstrings have it.
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


def test_effects_found_by_experiment():
    found = {}
    for name, (reads, writes) in effects().items():
        parameters = getattr(train_gpt2.kernels, name).py_func.__code__.co_varnames
        found[name] = " ".join("+" * (i in reads) + parameters[i] for i in sorted(writes))
        assert name != "matmul_forward" or {parameters[i] for i in reads} == {"inp", "weight", "bias"}
    assert found == WRITES


def kernel_calls(monkeypatch, run):
    """The names of the kernels that `run` calls, by other means than the recorder's."""
    names = []

    def noting(name, kernel):
        def call(*arguments):
            names.append(name)
            return kernel(*arguments)
        return call
    with monkeypatch.context() as patch:
        for name, value in list(vars(train_gpt2.kernels).items()):
            if isinstance(value, Dispatcher) and value.targetoptions.get("parallel"):
                patch.setattr(train_gpt2.kernels, name, noting(name, value))
        run()
    return names


def test_every_call_is_recorded_and_timed_in_order(step, monkeypatch):
    model, batch = tiny_step()
    expected = kernel_calls(monkeypatch, lambda: run_step(model, batch))
    calls = step[0]
    assert [call.kernel for call in calls] == expected and len(expected) > 18 * TINY.num_layers
    seconds, whole = time_step(model, batch)
    assert len(seconds) == len(expected) and all(0 < time for time in seconds) and sum(seconds) <= whole


def test_phases_and_layers(step):
    """Forward through the layers, back through them, and the update."""
    found = [(*place, len([*group])) for place, group in groupby(step[0], key=lambda call: (call.phase, call.layer))]
    assert found == [("forward", None, 1), ("forward", 0, 10), ("forward", 1, 10), ("forward", 2, 10), ("forward", None, 1),
                     ("backward", None, 4), ("backward", 2, 8), ("backward", 1, 8), ("backward", 0, 8), ("backward", None, 1),
                     ("update", None, 1 + 16)]


def test_times_are_those_of_the_fastest_step_call_by_call(monkeypatch):
    """By a clock that stands still but for what kernels and the program between them take."""
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


def test_step_is_that_of_the_program(tmp_path):
    options = parse_options("", ["--output-dir", str(tmp_path)])
    assert ((recorder.LEARNING_RATE, recorder.WEIGHT_DECAY, recorder.GRAD_CLIP) ==
            (options.learning_rate, options.weight_decay, options.grad_clip))


def test_forward_mirrors_backward(step):
    """Every kernel of the forward pass, the logits' product included, has its twin in the reverse order, which writes the
    gradients of just the parameters that it reads, in the same layer."""
    calls = [call for call in step[0] if call.phase != "update"]
    turn = [call.kernel for call in calls].index("fused_classifier")
    forward = [call for call in calls[:turn] if call.kernel != "residual_forward"]
    backward = calls[:turn:-1]
    assert [call.kernel for call in backward] == [call.kernel.replace("_forward", "_backward") for call in forward]
    for call, twin in zip(forward, backward, strict=True):
        assert twin.layer == call.layer
        assert ({(array.name, array.layer) for array in twin.written if array.buffer == "grads"} ==
                {(array.name, array.layer) for array in call.read if array.buffer == "params"}), (call, twin)


def test_every_tensor_is_recognized(step):
    """Each activation is written once in each layer, each parameter's gradient is written, and nothing else is unknown."""
    calls, _, _, model = step
    L = TINY.num_layers
    written = [(array.buffer, array.name, array.layer) for call in calls if call.phase != "update" for array in call.written]

    def every_layer_of(tensors):
        return [(name, layer) for name, shape in tensors.shapes.items() for layer in (range(L) if shape[0] == L else [None])]
    activations = [(name, layer) for buffer, name, layer in written if buffer == "acts"]
    assert sorted(activations, key=str) == sorted(every_layer_of(model.acts), key=str)
    assert {(name, layer) for buffer, name, layer in written if buffer == "grads"} == set(every_layer_of(model.grads))
    assert {name for buffer, name, _ in written if buffer == "scratch"} == set(model.scratch.shapes)
    for call in calls:
        if call.layer is not None:
            assert all(array.layer in (call.layer, call.layer - 1, None) for array in call.arrays), call
    [norm] = [call for call in calls if call.kernel == "global_norm"]
    assert str(norm) == "global_norm(grads)"
    updates = [call for call in calls if call.kernel == "adamw_update"]
    assert [str(call) for call in updates] == [f"+{name}, +grads.{name}, +adam_m.{name}, +adam_v.{name} = adamw_update()"
                                               for name in model.params.shapes]


def test_arrays_by_name():
    calls, _, _ = record_step(*tiny_step())
    found = [str(call) for call in calls]
    assert found[0] == "encoded = encoder_forward(tokens, wte, wpe)"
    for text in ("residual2[0] = residual_forward(encoded, proj)", "qkv[2] = matmul_forward(ln1[2], qkvw[2], qkvb[2])",
                 "att[1], att_lse[1] = attention_forward(qkv[1])", "losses, +logits = fused_classifier(targets)",
                 "dln, +grads.wte = matmul_backward(logits, lnf, wte)", "+dfch = gelu_backward(fch[0])",
                 "+dresidual, +grads.ln1w[1], +grads.ln1b[1] = "
                 "layernorm_backward(dln, ln1_mean[1], ln1_rstd[1], residual3[0], ln1w[1])"):
        assert found.count(text) == 1, text


def test_recomputed_activations_have_one_layer_only():
    _, batch = tiny_step()
    model = train_gpt2.GPT2(TINY, *batch.tokens.shape, threads=1, recompute=True)
    model.initialize(0)
    calls, loss, norm = record_step(model, batch)
    found = [(call.phase, call.layer, str(call)) for call in calls]
    for l in range(TINY.num_layers):
        again = ("backward", l, "fch_gelu = gelu_forward(fch)")
        assert found.count(again) == (l < TINY.num_layers - 1) and ("forward", *again[1:]) in found
    assert (loss, norm) == record_step(*tiny_step())[1:]


def test_recording_changes_nothing(step):
    model, batch = tiny_step()
    loss, norm = run_step(model, batch)
    _, recorded_loss, recorded_norm, recorded = step
    assert (loss, norm) == (recorded_loss, recorded_norm)
    assert model.params.flat.tobytes() == recorded.params.flat.tobytes()
    assert isinstance(train_gpt2.kernels.gelu_forward, Dispatcher)


def test_norms(step):
    """Of activations as they are at the end, of gradients together the norm that the step reports."""
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
