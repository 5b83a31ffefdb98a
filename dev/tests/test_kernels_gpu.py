"""
The CUDA kernels against the naive float64 implementation (kernels_float64.py) and against the CPU kernels.

    python -m pytest dev/tests/test_kernels_gpu.py        as tests; -s also prints the worst error of every output

Every test runs on three devices: on the CPU with all memory accesses checked, on the CPU with the threads of a block in
reverse order (both cuda_on_cpu), and on the GPU if there is one. The comparisons are those of test_kernels.py: arrays that
a kernel overwrites start as NaN, arrays that it adds to start from other numbers than zero.
"""
import inspect
import sys

import numpy as np
import pytest

import kernels_cpu
import kernels_float64 as exact
import kernels_gpu
import test_kernels as cpu
from cli import UserError
from cuda_on_cpu import CpuDevice
from device import open_device
from test_kernels import BETA1, BETA2, EMPTY, EPSILON, LEARNING_RATE, Accumulator, Case, collect, normal, unset

OUTPUTS = {
    **{kernel: cpu.OUTPUTS[kernel] for kernel in (
        "encoder_forward", "encoder_backward", "layernorm_forward", "layernorm_backward", "matmul_forward", "matmul_backward",
        "attention_forward", "attention_backward", "gelu_backward", "gelu_exact_backward", "fused_classifier", "global_norm",
        "adamw_update")},
    "residual_layernorm_forward": ("residual", "out", "mean", "rstd"),
    "matvec_forward": ("out",),
    "attention_cached_forward": ("out", "keys", "values"),
    "bias_gelu_forward": ("out", "inp"),
    "bias_gelu_exact_forward": ("out", "inp"),
    "mean_loss": ("mean",),
}
BOUND = cpu.BOUND
BOUNDS = {"attention_backward": cpu.BOUNDS["attention_backward"]}
DEVICES = {
    "cpu-sanitized": lambda: CpuDevice(sanitize=True),      # first: on the others, a wrong address can crash the process
    "cpu-reversed": lambda: CpuDevice(reverse=True),
    "cuda": lambda: open_device("cuda", "float32"),
}


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    """run(kernel, args) calls a kernel and returns its outputs, name -> array. One device after another."""
    return open_runner(DEVICES, request.param)


def open_runner(devices, name):
    """A Runner on the device of this name. Skips the test if this machine cannot open it."""
    if "sanitized" in name and sys.platform != "linux":
        pytest.skip("AddressSanitizer reports to Python on Linux only")
    try:
        return Runner(devices[name]())
    except UserError as error:
        pytest.skip(str(error))


# Calling the kernels

FLOAT32 = "inp2_bias", "losses", "grads", "params", "m", "v"       # arguments that are float32 with any dtype




class Runner:
    """The kernels of kernels_gpu.py on one device, with the interface of kernels_float64.py."""

    def __init__(self, device):
        self.device = device

    def is_activation(self, kernel, name, arg):
        """Whether the kernel takes this argument as an array of the device's Float."""
        float32 = name in FLOAT32 or name == "weight" and "layernorm" in kernel or name == "bias" and "mat" not in kernel
        return isinstance(arg, np.ndarray) and arg.dtype == np.float32 and not float32

    def rounded(self, kernel, args):
        """The arguments as the kernel gets them: float32 arrays of numbers rounded to the device's Float."""
        return {name: arg.astype(self.device.Float).astype(np.float32) if self.is_activation(kernel, name, arg) else arg
                for name, arg in args.items()}

    def __call__(self, kernel, args):
        """Copy the arrays among the arguments to the device, and the results back, as float32."""
        kernels_gpu.use(self.device)
        args = {name: self.activation(arg) if self.is_activation(kernel, name, arg)
                else self.device.to_device(arg) if isinstance(arg, np.ndarray) else arg for name, arg in args.items()}
        values = getattr(self, kernel)(**args)
        values = values if isinstance(values, tuple) else (values,)
        return {output: value.added(self.device) if isinstance(value, Added)
                else self.host(value) for output, value in zip(OUTPUTS[kernel], values)}

    def activation(self, array):
        return self.device.to_device(array.astype(self.device.Float))

    def host(self, array):
        return self.device.to_host(array).astype(np.float32, copy=False)

    def unset(self, *shape):
        """An array of the device's Float."""
        return self.activation(unset(*shape))

    def unset32(self, *shape):
        return self.device.to_device(unset(*shape))

    def accumulator(self, *shape, dtype=np.float32):
        return Added(self.device, *shape, dtype=dtype)

    def encoder_forward(self, tokens, wte, wpe):
        out = self.unset(tokens.size, wte.shape[1])
        kernels_gpu.encoder_forward(out, tokens, wte, wpe)
        return out

    def encoder_backward(self, dout, tokens, wte_shape, wpe_shape):
        dwte, dwpe = self.accumulator(*wte_shape), self.accumulator(*wpe_shape)
        kernels_gpu.encoder_backward(dwte.array, dwpe.array, dout, tokens)
        return dwte, dwpe

    def layernorm_forward(self, inp, weight, bias):
        out, mean, rstd = self.unset(*inp.shape), self.unset32(len(inp)), self.unset32(len(inp))
        kernels_gpu.layernorm_forward(out, mean, rstd, inp, weight, bias)
        return out, mean, rstd

    def residual_layernorm_forward(self, inp1, inp2, inp2_bias, weight, bias):
        residual, out = self.unset(*inp1.shape), self.unset(*inp1.shape)
        mean, rstd = self.unset32(len(inp1)), self.unset32(len(inp1))
        kernels_gpu.residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, inp2_bias, weight, bias)
        return residual, out, mean, rstd

    def layernorm_backward(self, dout, inp, weight):
        _, mean, rstd = exact.layernorm_forward(self.host(inp), np.ones(weight.size), np.zeros(weight.size))
        dinp = self.accumulator(*inp.shape, dtype=self.device.Float)
        dweight, dbias = self.accumulator(weight.size), self.accumulator(weight.size)
        kernels_gpu.layernorm_backward(dinp.array, dweight.array, dbias.array, dout,
                                       self.device.to_device(mean.astype(np.float32)),
                                       self.device.to_device(rstd.astype(np.float32)), inp, weight)
        return dinp, dweight, dbias

    def matmul_forward(self, inp, weight, bias):
        out = self.unset(len(inp), len(weight))
        kernels_gpu.matmul_forward(out, inp, weight, bias)
        return out

    def matmul_backward(self, dout, inp, weight):
        dinp, dweight, dbias = self.unset(*inp.shape), self.accumulator(*weight.shape), self.accumulator(len(weight))
        kernels_gpu.matmul_backward(dinp, dweight.array, dbias.array, dout, inp, weight)
        return dinp, dweight, dbias

    def matvec_forward(self, inp, weight, bias):
        out = self.unset(len(inp), len(weight))
        kernels_gpu.matvec_forward(out, inp, weight, bias)
        return out

    def attention_cached_forward(self, qkv, B, NH, position):
        """The positions of qkv (B, S, 3C) before `position` are already in the KV cache; the rest of the cache is NaN."""
        qkv = self.host(qkv)
        S, HS = qkv.shape[1], qkv.shape[2] // (3 * NH)
        room = np.full((2, B, NH, 3, HS), np.nan)
        keys, values = np.concatenate((split(qkv, NH)[1:], room), axis=3).astype(np.float32)
        keys[:, :, position:] = values[:, :, position:] = np.nan
        keys, values = map(self.activation, (keys, values))
        out = self.unset(B * (S - position), NH * HS)
        new = self.activation(qkv[:, position:].reshape(len(out), -1))
        kernels_gpu.attention_cached_forward(out, keys, values, new, position, self.device.to_device(np.int32([position])))
        for cache in map(self.host, (keys, values)):
            assert np.isnan(cache[:, :, S:]).all(), "the cache must not be written past the new tokens"
        return out, keys[:, :, :S].copy(), values[:, :, :S].copy()

    def attention_forward(self, qkv, B, T, NH):
        out, lse = self.unset(B * T, qkv.shape[1] // 3), self.unset32(B, NH, T)
        kernels_gpu.attention_forward(out, lse, qkv, self.unset(NH, T, T))
        return out, lse

    def attention_backward(self, dout, qkv, B, T, NH):
        out, lse = exact.attention_forward(self.host(qkv), B, T, NH)
        dqkv = self.unset(*qkv.shape)
        kernels_gpu.attention_backward(dqkv, dout, self.activation(out), self.device.to_device(lse.astype(np.float32)), qkv,
                                       self.unset(NH, T, T), self.unset(NH, T, T))
        return dqkv

    def bias_gelu_forward(self, inp, bias):
        out = self.unset(*inp.shape)
        kernels_gpu.bias_gelu_forward(out, inp, bias)
        return out, inp

    def gelu_backward(self, dout, inp):
        dinp = self.unset(*inp.shape)
        kernels_gpu.gelu_backward(dinp, dout, inp)
        return dinp

    def bias_gelu_exact_forward(self, inp, bias):
        out = self.unset(*inp.shape)
        kernels_gpu.bias_gelu_exact_forward(out, inp, bias)
        return out, inp

    def gelu_exact_backward(self, dout, inp):
        dinp = self.unset(*inp.shape)
        kernels_gpu.gelu_exact_backward(dinp, dout, inp)
        return dinp

    def fused_classifier(self, logits, targets, dloss, V):
        losses = self.unset32(len(logits))
        kernels_gpu.fused_classifier(losses, logits, targets, dloss, V)
        return losses, logits

    def mean_loss(self, losses):
        mean = self.unset32(1)
        kernels_gpu.mean_loss(mean, losses)
        return mean

    def global_norm(self, grads):
        norm = self.unset32(1)
        kernels_gpu.global_norm(norm, grads)
        return norm

    def adamw_update(self, params, grads, m, v, grad_scale, norm=8.0, grad_clip=None, **settings):
        """A grad_scale below 1 comes from a grad_clip that is smaller than the norm by that factor."""
        grad_clip = grad_scale * norm if grad_clip is None else grad_clip
        norm = self.device.to_device(np.full(1, norm, dtype=np.float32))
        weights = self.unset(*(params.shape if self.device.Float != np.float32 else (0,)))
        kernels_gpu.adamw_update(params, grads, m, v, weights, norm, grad_clip=grad_clip, **settings)
        if np.isfinite(self.device.to_host(norm)):
            assert not self.device.to_host(grads).any(), "adamw_update must clear the gradients"
            if weights.size:
                rounded = self.device.to_host(params).astype(self.device.Float)
                np.testing.assert_array_equal(self.host(weights), rounded.astype(np.float32))
        return params, m, v


def split(qkv, NH):
    """(3, B, NH, S, HS): queries, keys and values, from qkv (B, S, 3C)."""
    B, S, C3 = qkv.shape
    return qkv.reshape(B, S, 3, NH, C3 // (3 * NH)).transpose(2, 0, 3, 1, 4)


class Added(Accumulator):
    """An Accumulator whose array is on a device."""

    def __init__(self, device, *shape, dtype=np.float32):
        super().__init__(*shape)
        self.start = self.array.astype(dtype).astype(np.float64)
        self.array = device.to_device(self.array.astype(dtype))

    def added(self, device):
        return device.to_host(self.array).astype(np.float64) - self.start


class Exact:
    """kernels_float64.py, and the fused kernels composed from its functions."""

    def __getattr__(self, kernel):
        return getattr(exact, kernel)

    def residual_layernorm_forward(self, inp1, inp2, inp2_bias, weight, bias):
        residual = exact.residual_forward(inp1, inp2) + (inp2_bias.astype(np.float64) if inp2_bias.size else 0)
        return residual, *exact.layernorm_forward(residual, weight, bias)

    def matvec_forward(self, inp, weight, bias):
        return exact.matmul_forward(inp, weight, bias)

    def attention_cached_forward(self, qkv, B, NH, position):
        S = qkv.shape[1]
        out, _ = exact.attention_forward(qkv.reshape(B * S, -1), B, S, NH)
        out = out.reshape(B, S, -1)[:, position:]
        return out.reshape(-1, out.shape[-1]), *split(qkv, NH)[1:]

    def bias_gelu_forward(self, inp, bias):
        inp = inp.astype(np.float64) + bias
        return exact.gelu_forward(inp), inp

    def bias_gelu_exact_forward(self, inp, bias):
        inp = inp.astype(np.float64) + bias
        return exact.gelu_exact_forward(inp), inp

    def mean_loss(self, losses):
        return np.array([losses.astype(np.float64).mean()])

    def global_norm(self, grads):
        return np.array([exact.global_norm(grads)])


def expected(kernel, args):
    values = getattr(Exact(), kernel)(**args)
    values = values if isinstance(values, tuple) else (values,)
    return dict(zip(OUTPUTS[kernel], values))


def check(kernel, actual, expected, bound=None):
    cpu.check(kernel, actual, expected, bound or BOUNDS.get(kernel, BOUND))


# The cases: every kernel at sizes that cover each of its branches, most of them awkward. 1,100 channels are more than a block
# of 256 threads handles in one round, 1,100 rows more than are summed in one launch. Rows whose length is a multiple of 4 are
# read with vectorized 16-byte loads, the others with 4-byte loads.

def residual_layernorm_cases(N, C):
    args = dict(inp1=3 * normal(N, C) + 1, inp2=normal(N, C, seed=1), inp2_bias=normal(C), weight=normal(C, seed=1),
                bias=normal(C, seed=2))
    yield Case("residual_layernorm_forward", f"N{N}-C{C}", args)
    yield Case("residual_layernorm_forward", f"N{N}-C{C}-nobias", {**args, "inp2_bias": EMPTY})


def matvec_cases(N, C, OC):
    sizes, inp, weight, bias = f"N{N}-C{C}-OC{OC}", normal(N, C), normal(OC, C, seed=1), normal(OC)
    yield Case("matvec_forward", sizes, dict(inp=inp, weight=weight, bias=bias))
    yield Case("matvec_forward", sizes + "-nobias", dict(inp=inp, weight=weight, bias=EMPTY))


def cached_attention_cases(B, S, NH, HS, position):
    qkv = 2 * normal(B, S, 3 * NH * HS)
    yield Case("attention_cached_forward", f"B{B}-S{S}-NH{NH}-HS{HS}-position{position}",
               dict(qkv=qkv, B=B, NH=NH, position=position))


def gelu_cases(N, C):
    inp = 2 * normal(N, C)
    for gelu in ("gelu", "gelu_exact"):
        yield Case(f"bias_{gelu}_forward", f"N{N}-C{C}", dict(inp=inp, bias=normal(C)))
        yield Case(f"{gelu}_backward", f"N{N}-C{C}", dict(dout=normal(N, C, seed=1), inp=inp))


def loss_cases(N):
    yield Case("mean_loss", f"N{N}", dict(losses=normal(N) + 3))


def norm_cases(size):
    yield Case("global_norm", f"size{size}", dict(grads=normal(size)))


CASES = (
    collect(cpu.encoder_cases, (1, 1, 1), (3, 13, 21), (2, 67, 36), (2, 3, 1100))
    + collect(cpu.layernorm_cases, (1, 1), (2, 7), (13, 21), (13, 36), (3, 1100), (2, 1101), (1100, 12))
    + collect(residual_layernorm_cases, (1, 1), (2, 7), (13, 21), (13, 36), (3, 1100), (2, 1101))
    + collect(cpu.matmul_cases, (1, 1, 1), (2, 7, 5), (13, 36, 109), (3, 5, 1100), (1100, 5, 36), (1101, 3, 21))
    + collect(cpu.attention_cases, (1, 1, 1, 1), (3, 2, 1, 7), (1, 13, 3, 12), (2, 67, 2, 5), (1, 8, 1, 65), (2, 132, 3, 4))
    + collect(matvec_cases, (1, 1, 1), (2, 7, 5), (4, 36, 109), (9, 1100, 17), (1, 300, 8))
    + collect(cached_attention_cases, (1, 1, 1, 1, 0), (3, 2, 1, 7, 0), (2, 9, 2, 5, 8), (1, 14, 3, 12, 13), (2, 67, 3, 64, 66),
              (1, 68, 1, 132, 67), (2, 130, 2, 36, 129), (1, 13, 3, 12, 5), (2, 67, 2, 5, 30))
    + collect(gelu_cases, (1, 1), (13, 7), (13, 36), (3, 1100), (2, 1101))
    + collect(cpu.classifier_cases, (1, 1, 128, 1), (5, 7, 7, 1), (13, 65, 128, 30), (2, 4999, 5000, 3), (2, 5001, 5003, 3))
    + collect(loss_cases, (1,), (1000,), (3001,))
    + collect(norm_cases, (1,), (1000,), (1003,), (2100003,))
    + collect(cpu.adamw_cases, (1, 1, 0.1, 1.0), (1003, 1, 0.0, 1.0), (1004, 10, 0.1, 0.25), (2052, 2, 0.1, 1.0))
)

# One case of moderate size per kernel, for tests that need not cover every size.
CASE = {case.kernel: case.args for case in CASES if case.sizes in (
    "B3-T13-C21", "N13-C36", "N13-C36-OC109", "N4-C36-OC109", "B1-S14-NH3-HS12-position13", "B1-T13-NH3-HS12",
    "N13-V65-Vp128-spread30", "N1000", "size1000", "size1004-step10-decay0.1-scale0.25")}
assert CASE.keys() == OUTPUTS.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(run, case):
    actual, exactly = run(case.kernel, case.args), expected(case.kernel, case.args)
    for output in exactly:
        error = cpu.relative_error(actual[output], exactly[output])
        worst[case.kernel, output] = np.maximum(worst.get((case.kernel, output), 0), error)
    check(case.kernel, actual, exactly)


worst = {}   # (kernel, output) -> largest error over all sizes and devices


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print(f"\n{'kernel':26} {'output':8} {'worst error':>11}  {'bound':>7}")
    for (kernel, output), error in worst.items():
        print(f"{kernel:26} {output:8} {error:11.1e}  {BOUNDS.get(kernel, BOUND):7.0e}")


# Properties of every kernel

@pytest.mark.parametrize("kernel", [kernel for kernel in OUTPUTS if kernel in cpu.OUTPUTS])
def test_against_the_cpu_kernels(run, kernel):
    on_cpu = cpu.results(cpu.Fast, kernel, CASE[kernel])
    check(kernel, run(kernel, CASE[kernel]), on_cpu, 2 * BOUNDS.get(kernel, BOUND))


@pytest.mark.parametrize("kernel", [kernel for kernel in OUTPUTS if hasattr(kernels_cpu, kernel)])
def test_arguments_are_those_of_the_cpu_kernels(kernel):
    """In the same order, except for those that only the GPU has: scratch at the end, and numbers that stay on the device."""
    arguments = inspect.signature(getattr(kernels_gpu, kernel)).parameters.keys()
    of_cpu = inspect.signature(getattr(kernels_cpu, kernel).py_func).parameters.keys()
    of_gpu = "norm", "scores", "dscores", "grad_clip", "weights", "position_on_device"
    shared = [name for name in arguments if name not in of_gpu]
    assert shared == [name for name in of_cpu if name not in ("workspace", "grad_scale")]


@pytest.mark.parametrize("kernel", OUTPUTS)
def test_same_input_gives_the_same_bits(run, kernel):
    for case in CASES:
        if case.kernel == kernel and max(np.size(arg) for arg in case.args.values()) < 10000:
            cpu.assert_same_bits(run(kernel, case.args), run(kernel, case.args))


def test_order_of_threads_does_not_change_a_bit():
    """A result that depends on which thread runs first is a race: a missing barrier, for example."""
    for kernel, args in CASE.items():
        forward, backward = (Runner(CpuDevice(reverse=reverse))(kernel, args) for reverse in (False, True))
        cpu.assert_same_bits(forward, backward)


def spoilt(kernel, value):
    """(name, args) for each floating-point input, with one of its elements set to value."""
    for name, array in CASE[kernel].items():
        if isinstance(array, np.ndarray) and array.dtype == np.float32:
            array = array.copy()
            # In the middle, but an element that is read: token 2, position 6, a column of the vocabulary.
            array[tuple(2 if name == "wte" else size // 2 if size < 128 else 40 for size in array.shape)] = value
            yield name, {**CASE[kernel], name: array}


@pytest.mark.parametrize("kernel", OUTPUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_come_out(run, kernel, value):
    """NaN or infinity in one element of an input reaches every element of the outputs that it reaches in float64.

    NaN reaches no other elements, except in attention, where NaN times a weight of zero is NaN. For infinity that is not
    checked: it can become NaN on the way, and spread in the same manner.
    """
    for name, args in spoilt(kernel, value):
        actual, exactly = run(kernel, args), expected(kernel, args)
        assert any(not np.isfinite(exactly[output]).all() for output in exactly), name
        for output in exactly:
            missed = np.isfinite(actual[output]) & ~np.isfinite(exactly[output])
            extra = ~np.isfinite(actual[output]) & np.isfinite(exactly[output])
            assert not missed.any(), f"{value} in {name} is missing from {missed.sum()} elements of {output}"
            if np.isnan(value) and "attention" not in kernel:
                assert not extra.any(), f"{value} in {name} spread to {extra.sum()} elements of {output}"


# Properties of single kernels

def test_layernorm_of_numbers_far_from_zero(run):
    """With a mean of 1,000 standard deviations, E[x^2] - E[x]^2 would have no correct digit left."""
    args = dict(inp=normal(13, 768) + 1000, weight=normal(768), bias=normal(768, seed=1))
    check("layernorm_forward", run("layernorm_forward", args), expected("layernorm_forward", args), 1e-4)


def test_odd_rows_need_no_alignment(run):
    """A tensor that follows one of odd length can start at any multiple of 4 bytes."""
    C, device = 21, run.device
    args = cpu.collect(cpu.layernorm_cases, (13, C))[0].args
    buffers = {name: device.to_device(np.append(np.float32(0), array)) for name, array in args.items()}
    inp, weight, bias = (buffers[name][1:].reshape(args[name].shape) for name in args)
    out, mean, rstd = run.layernorm_forward(inp, weight, bias)
    check("layernorm_forward", dict(out=device.to_host(out)), dict(out=expected("layernorm_forward", args)["out"]))


def test_matmul_backward_without_bias(run):
    args, device = CASE["matmul_backward"], run.device
    dinp, dweight = run.unset(*args["inp"].shape), device.zeros(args["weight"].shape)
    kernels_gpu.use(device)
    kernels_gpu.matmul_backward(dinp, dweight, device.zeros(0), **{name: device.to_device(args[name]) for name in args})
    exactly = expected("matmul_backward", args)
    del exactly["dbias"]
    check("matmul_backward", dict(dinp=device.to_host(dinp), dweight=device.to_host(dweight)), exactly)


@pytest.mark.parametrize("changed", [1, 64, 100])
def test_attention_never_looks_ahead(run, changed):
    """The outputs before a position are the same, bit for bit, for any inputs at that position and after it."""
    B, T, NH = 1, 132, 3
    qkv = normal(B * T, 36 * 3)
    later = qkv.copy()
    later[changed:] = 7 * normal(T - changed, 36 * 3, seed=1)
    first, second = (run("attention_forward", dict(qkv=x, B=B, T=T, NH=NH)) for x in (qkv, later))
    assert first["out"][:changed].tobytes() == second["out"][:changed].tobytes()
    assert first["lse"][..., :changed].tobytes() == second["lse"][..., :changed].tobytes()
    assert not np.any(first["out"][changed:] == second["out"][changed:])


def test_attention_with_large_scores(run):
    """Scores of several hundred: their exp would overflow if the largest were not subtracted first."""
    args = dict(qkv=10 * normal(65, 36 * 3), B=1, T=65, NH=3)
    check("attention_forward", run("attention_forward", args), expected("attention_forward", args))
    args["dout"] = normal(65, 36)
    check("attention_backward", run("attention_backward", args), expected("attention_backward", args), 5e-5)


@pytest.mark.parametrize("position", [8191, 12288])
def test_more_cached_tokens_than_fit_into_shared_memory(run, position):
    """All values are near 3: the mean of 8,000 values near 0 would be mostly rounding error."""
    qkv = normal(1, position + 1, 3 * 4)
    qkv[..., 2 * 4:] += 3
    args = dict(qkv=qkv, B=1, NH=1, position=position)
    check("attention_cached_forward", run("attention_cached_forward", args), expected("attention_cached_forward", args))


@pytest.mark.parametrize("gelu", ["gelu", "gelu_exact"])
def test_gelu_over_its_whole_range(run, gelu):
    """Both tails, and both sides of zero. Element by element, since a few large numbers would hide the others."""
    x = np.concatenate([np.linspace(-30, 30, 601), 10.0 ** np.arange(-30, 0), -(10.0 ** np.arange(-30, 0))])
    x = x.astype(np.float32).reshape(1, -1)
    one = np.ones_like(x)
    out = run(f"bias_{gelu}_forward", dict(inp=x, bias=np.zeros(x.size, np.float32)))["out"]
    np.testing.assert_allclose(out, getattr(exact, f"{gelu}_forward")(x), rtol=5e-6, atol=1e-30)
    dinp = run(f"{gelu}_backward", dict(dout=one, inp=x))["dinp"]
    np.testing.assert_allclose(dinp, getattr(exact, f"{gelu}_backward")(one, x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", ["gelu_backward", "gelu_exact_backward"])
def test_gelu_backward_in_place(run, kernel):
    args, device = CASE[kernel], run.device
    dout = device.to_device(args["dout"])
    kernels_gpu.use(device)
    getattr(kernels_gpu, kernel)(dout, dout, device.to_device(args["inp"]))
    cpu.assert_same_bits(dict(dinp=device.to_host(dout)), run(kernel, args))


@pytest.mark.parametrize("padding", [80, 1e30, np.inf, np.nan])
def test_padding_gets_no_probability_and_no_gradient(run, padding):
    args = CASE["fused_classifier"]
    V, logits = args["V"], args["logits"].copy()
    logits[:, V:] = padding
    actual = run("fused_classifier", {**args, "logits": logits})
    assert not actual["dlogits"][:, V:].any()
    cpu.assert_same_bits(actual, run("fused_classifier", args))


def test_classifier_over_the_whole_range_of_exp(run):
    """Probabilities down to 1e-37, each with a relative bound; smaller ones are 0. The largest logit comes first or last."""
    V = 8001
    logits = np.linspace(0, -80, V, dtype=np.float32).reshape(1, -1)
    for args in (dict(logits=logits, targets=np.array([V - 1], dtype=np.int32), dloss=1.0, V=V),
                 dict(logits=logits[:, ::-1].copy(), targets=np.array([0], dtype=np.int32), dloss=1.0, V=V)):
        actual, exactly = run("fused_classifier", args), expected("fused_classifier", args)
        for output in exactly:
            np.testing.assert_allclose(actual[output], exactly[output], rtol=1e-6)


def test_classifier_with_large_logits(run):
    """A certain target has loss 0, an impossible one the whole difference of the logits."""
    logits = np.full((2, 128), -80, dtype=np.float32)
    logits[:, 3] = 80
    args = dict(logits=logits, targets=np.array([3, 4], dtype=np.int32), dloss=1.0, V=100)
    losses, dlogits = run("fused_classifier", args).values()
    np.testing.assert_array_equal(losses, [0, 160])
    np.testing.assert_array_equal(dlogits[0], 0)
    np.testing.assert_array_equal(dlogits[1].nonzero(), [[3, 4]])
    np.testing.assert_array_equal(dlogits[1, 3:5], [1, -1])


def test_global_norm_of_unequal_numbers(run):
    """One large number, then a million small ones: a float32 sum of squares would round each of them away."""
    grads = np.full(1000003, 1e-4, dtype=np.float32)
    grads[0] = 1
    check("global_norm", run("global_norm", dict(grads=grads)), expected("global_norm", dict(grads=grads)), 1e-7)
    large = run("global_norm", dict(grads=np.full(3, 1e30, dtype=np.float32)))
    assert 1e30 < large["norm"][0] < 2e30, "squares must not overflow"


def test_adamw_without_gradient_only_decays(run):
    args = {**CASE["adamw_update"], "grads": np.zeros(1004, np.float32), "m": np.zeros(1004, np.float32)}
    params = run("adamw_update", args)["params"]
    np.testing.assert_allclose(params, args["params"] * (1 - LEARNING_RATE * 0.1), rtol=2e-7)


@pytest.mark.parametrize("norm, grad_clip, scale", [(0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 0.0, 1.0)])
def test_adamw_clips_only_longer_gradients(run, norm, grad_clip, scale):
    """A shorter gradient is not scaled up, and a grad_clip of 0 disables clipping."""
    args = CASE["adamw_update"]
    actual = run("adamw_update", {**args, "norm": norm, "grad_clip": grad_clip})
    check("adamw_update", actual, expected("adamw_update", {**args, "grad_scale": scale}))


@pytest.mark.parametrize("norm", [np.inf, np.nan])
def test_adamw_changes_nothing_if_the_norm_is_not_finite(run, norm):
    device = run.device
    names = ("params", "grads", "m", "v")
    arrays = {name: device.to_device(CASE["adamw_update"][name]) for name in names}
    kernels_gpu.use(device)
    kernels_gpu.adamw_update(*arrays.values(), device.empty(0), device.to_device(np.full(1, norm, dtype=np.float32)),
                             LEARNING_RATE, BETA1, BETA2, EPSILON, weight_decay=0.1, grad_clip=1.0, step=1)
    for name in names:
        assert device.to_host(arrays[name]).tobytes() == CASE["adamw_update"][name].tobytes(), name
