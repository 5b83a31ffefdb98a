"""
The CPU kernels against a slow float64 implementation of the same mathematics (kernels_float64.py).

    python -m pytest dev/tests/test_kernels.py        as tests; -s also prints the worst error of every output

An error is relative and taken over a whole tensor: ||actual - expected|| / ||expected||. The float64 backward functions
are themselves tested, against finite differences of the float64 forward functions.

Every test below sees the kernels through `Fast`, which calls them the way the program does: what a kernel overwrites
starts as NaN, and what it adds to starts from numbers that are not zero.
"""
from dataclasses import dataclass, replace
from functools import partial

import numba
import numpy as np
import pytest

import kernels_cpu
import kernels_float64 as exact

OUTPUTS = {
    "encoder_forward": ("out",),
    "encoder_backward": ("dwte", "dwpe"),
    "layernorm_forward": ("out", "mean", "rstd"),
    "layernorm_backward": ("dinp", "dweight", "dbias"),
    "rmsnorm_forward": ("out", "rstd"),
    "rmsnorm_backward": ("dinp", "dweight"),
    "rope": ("rows",),
    "matmul_forward": ("out",),
    "matmul_backward": ("dinp", "dweight", "dbias"),
    "attention_forward": ("out", "lse"),
    "attention_backward": ("dqkv",),
    "matmul_forward_bfloat16": ("out",),
    "matmul_backward_bfloat16": ("dinp", "dweight", "dbias"),
    "attention_forward_bfloat16": ("out", "lse"),
    "attention_backward_bfloat16": ("dqkv",),
    "gelu_forward": ("out",),
    "gelu_backward": ("dinp",),
    "gelu_exact_forward": ("out",),
    "gelu_exact_backward": ("dinp",),
    "swiglu_forward": ("out",),
    "swiglu_backward": ("dinp",),
    "residual_forward": ("out",),
    "fused_classifier": ("losses", "dlogits"),
    "global_norm": ("norm",),
    "adamw_update": ("params", "m", "v"),
}

# Rounding to float32 alone is an error of 3e-8. Of large attention scores it becomes an error of the weights.
BOUND = 2e-6
# In bfloat16, attention rounds its weights p, which are known to float32's precision: now and then to the other neighbor.
BOUNDS = {"attention_backward": 5e-6, "global_norm": 1e-12, "attention_forward_bfloat16": 2e-5,
          "attention_backward_bfloat16": 2e-5}
THREADS = 2
EMPTY = np.empty(0, dtype=np.float32)
LEARNING_RATE, BETA1, BETA2, EPSILON = 0.1, 0.9, 0.95, 1e-8


# Calling the kernels

def unset(*shape):
    """An output that a kernel must overwrite."""
    return np.full(shape, np.nan, dtype=np.float32)


class Accumulator:
    """An output that a kernel must add to: `array` starts with random numbers, `added()` is what was added."""

    def __init__(self, *shape):
        self.start = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        self.array = self.start.copy()

    def added(self):
        return self.array.astype(np.float64) - self.start


class Fast:
    """The kernels of kernels_cpu.py behind the interface of kernels_float64.py: results are returned."""

    def encoder_forward(tokens, wte, wpe):
        out = unset(tokens.size, wte.shape[1])
        kernels_cpu.encoder_forward(out, tokens, wte, wpe)
        return out

    def encoder_backward(dout, tokens, wte_shape, wpe_shape):
        dwte, dwpe = Accumulator(*wte_shape), Accumulator(*wpe_shape)
        kernels_cpu.encoder_backward(dwte.array, dwpe.array, dout, tokens)
        return dwte.added(), dwpe.added()

    def layernorm_forward(inp, weight, bias):
        out, mean, rstd = unset(*inp.shape), unset(len(inp)), unset(len(inp))
        kernels_cpu.layernorm_forward(out, mean, rstd, inp, weight, bias)
        return out, mean, rstd

    def layernorm_backward(dout, inp, weight):
        _, mean, rstd = exact.layernorm_forward(inp, weight, weight)
        dinp, dweight, dbias = Accumulator(*inp.shape), Accumulator(weight.size), Accumulator(weight.size)
        kernels_cpu.layernorm_backward(dinp.array, dweight.array, dbias.array, dout,
                                       mean.astype(np.float32), rstd.astype(np.float32), inp, weight)
        return dinp.added(), dweight.added(), dbias.added()

    def matmul_forward(inp, weight, bias, threads=THREADS, dtype="float32"):
        out = unset(len(inp), len(weight))
        kernels_cpu.matmul_forward(out, inp, weight, bias, kernels_cpu.make_workspace(threads, dtype))
        return out

    def matmul_backward(dout, inp, weight, threads=THREADS, dtype="float32"):
        dinp, dweight, dbias = unset(*inp.shape), Accumulator(*weight.shape), Accumulator(len(weight))
        kernels_cpu.matmul_backward(dinp, dweight.array, dbias.array, dout, inp, weight,
                                    kernels_cpu.make_workspace(threads, dtype))
        return dinp, dweight.added(), dbias.added()

    def rmsnorm_forward(inp, weight, epsilon):
        out, rstd = unset(*inp.shape), unset(len(inp))
        kernels_cpu.rmsnorm_forward(out, rstd, inp, weight, epsilon)
        return out, rstd

    def rmsnorm_backward(dout, inp, weight, epsilon):
        _, rstd = exact.rmsnorm_forward(inp, weight, epsilon)
        dinp, dweight = Accumulator(*inp.shape), Accumulator(weight.size)
        kernels_cpu.rmsnorm_backward(dinp.array, dweight.array, dout, rstd.astype(np.float32), inp, weight)
        return dinp.added(), dweight.added()

    def rope(rows, **settings):
        rows = rows.copy()
        kernels_cpu.rope(rows, **settings)
        return rows

    def attention_forward(qkv, B, T, NH, KV=None, threads=THREADS, dtype="float32"):
        out, lse = unset(B * T, qkv.shape[1] // (NH + 2 * (KV or NH)) * NH), unset(B, NH, T)
        kernels_cpu.attention_forward(out, lse, qkv, kernels_cpu.make_workspace(threads, dtype))
        return out, lse

    def attention_backward(dout, qkv, B, T, NH, KV=None, threads=THREADS, dtype="float32"):
        out, lse = exact.attention_forward(qkv, B, T, NH, KV)
        dqkv = unset(*qkv.shape)
        kernels_cpu.attention_backward(dqkv, dout, out.astype(np.float32), lse.astype(np.float32), qkv,
                                       kernels_cpu.make_workspace(threads, dtype))
        return dqkv

    matmul_forward_bfloat16 = partial(matmul_forward, dtype="bfloat16")
    matmul_backward_bfloat16 = partial(matmul_backward, dtype="bfloat16")
    attention_forward_bfloat16 = partial(attention_forward, dtype="bfloat16")
    attention_backward_bfloat16 = partial(attention_backward, dtype="bfloat16")

    def gelu_forward(inp):
        out = unset(*inp.shape)
        kernels_cpu.gelu_forward(out, inp)
        return out

    def gelu_backward(dout, inp):
        dinp = unset(*inp.shape)
        kernels_cpu.gelu_backward(dinp, dout, inp)
        return dinp

    def gelu_exact_forward(inp):
        out = unset(*inp.shape)
        kernels_cpu.gelu_exact_forward(out, inp)
        return out

    def gelu_exact_backward(dout, inp):
        dinp = unset(*inp.shape)
        kernels_cpu.gelu_exact_backward(dinp, dout, inp)
        return dinp

    def swiglu_forward(inp):
        out = unset(len(inp), inp.shape[1] // 2)
        kernels_cpu.swiglu_forward(out, inp)
        return out

    def swiglu_backward(dout, inp):
        dinp = unset(*inp.shape)
        kernels_cpu.swiglu_backward(dinp, dout, inp)
        return dinp

    def residual_forward(inp1, inp2):
        out = unset(*inp1.shape)
        kernels_cpu.residual_forward(out, inp1, inp2)
        return out

    def fused_classifier(logits, targets, dloss, V):
        losses, dlogits = unset(len(logits)), logits.copy()
        kernels_cpu.fused_classifier(losses, dlogits, targets, dloss, V)
        return losses, dlogits

    def global_norm(grads):
        return kernels_cpu.global_norm(grads)

    def adamw_update(params, grads, m, v, **settings):
        params, grads, m, v = params.copy(), grads.copy(), m.copy(), v.copy()
        kernels_cpu.adamw_update(params, grads, m, v, **settings)
        assert not grads.any(), "adamw_update must clear the gradients"
        return params, m, v


def results(implementation, kernel, args):
    """Output name -> array of one call."""
    values = getattr(implementation, kernel)(**args)
    values = values if isinstance(values, tuple) else (values,)
    return dict(zip(OUTPUTS[kernel], values))


# Comparing

def relative_error(actual, expected):
    difference = np.linalg.norm(np.subtract(actual, expected, dtype=np.float64))
    size = np.linalg.norm(expected)
    return difference / size if size > 0 else difference


def check(kernel, actual, expected, bound=None):
    bound = bound or BOUNDS.get(kernel, BOUND)
    for output in expected:
        error = relative_error(actual[output], expected[output])
        assert error <= bound, f"{kernel} {output}: relative error {error:.1e}, bound {bound:.0e}"


def assert_same_bits(actual, expected):
    for output in expected:
        assert np.asarray(actual[output]).tobytes() == np.asarray(expected[output]).tobytes(), output


# The cases: every kernel at ordinary and at awkward sizes

@dataclass
class Case:
    kernel: str
    sizes: str
    args: dict

    def __str__(self):
        return f"{self.kernel}-{self.sizes}"


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, dtype=np.float32)


def integers(high, *shape):
    return np.random.default_rng((high, *shape)).integers(high, size=shape, dtype=np.int32)


def encoder_cases(B, T, C, V=5):
    """The vocabulary is small, so tokens repeat."""
    sizes, tokens = f"B{B}-T{T}-C{C}", integers(V, B, T)
    wte, wpe = normal(V, C), normal(T + 2, C, seed=1)
    yield Case("encoder_forward", sizes, dict(tokens=tokens, wte=wte, wpe=wpe))
    yield Case("encoder_backward", sizes, dict(dout=normal(B * T, C), tokens=tokens, wte_shape=wte.shape,
                                               wpe_shape=wpe.shape))


def token_cases(B, T, C):
    """encoder_cases without a position table."""
    for case in encoder_cases(B, T, C):
        no_positions = {"wpe": np.empty((0, C), np.float32)} if case.kernel == "encoder_forward" else {"wpe_shape": (0, C)}
        yield Case(case.kernel, case.sizes + "-tokens", case.args | no_positions)


def layernorm_cases(N, C):
    inp, weight, bias = 3 * normal(N, C) + 1, normal(C), normal(C, seed=1)
    yield Case("layernorm_forward", f"N{N}-C{C}", dict(inp=inp, weight=weight, bias=bias))
    yield Case("layernorm_backward", f"N{N}-C{C}", dict(dout=normal(N, C, seed=1), inp=inp, weight=weight))


def rmsnorm_cases(N, C, epsilon=1e-5):
    args = dict(inp=3 * normal(N, C) + 1, weight=normal(C), epsilon=epsilon)
    yield Case("rmsnorm_forward", f"N{N}-C{C}", args)
    yield Case("rmsnorm_backward", f"N{N}-C{C}", dict(dout=normal(N, C, seed=1), **args))


def rope_cases(B, T, heads, HS, position):
    """The last head of a row is not rotated, as values are not."""
    angles = 30 * np.random.default_rng(HS).random((position + T + 1, HS // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    args = dict(cos=cos, sin=sin, heads=heads, T=T, position=position)
    for sign in (1, -1):
        yield Case("rope", f"B{B}-T{T}-heads{heads}-HS{HS}-position{position}-sign{sign}",
                   dict(rows=normal(B * T, (heads + 1) * HS), sign=sign, **args))


def matmul_cases(N, C, OC):
    sizes, inp, weight, bias = f"N{N}-C{C}-OC{OC}", normal(N, C), normal(OC, C, seed=1), normal(OC)
    yield Case("matmul_forward", sizes, dict(inp=inp, weight=weight, bias=bias))
    yield Case("matmul_forward", sizes + "-nobias", dict(inp=inp, weight=weight, bias=EMPTY))
    yield Case("matmul_backward", sizes, dict(dout=normal(N, OC), inp=inp, weight=weight))


def attention_cases(B, T, NH, HS):
    """Queries and keys twice as large as normal numbers make some rows attend to one position and others to many."""
    sizes, qkv = f"B{B}-T{T}-NH{NH}-HS{HS}", 2 * normal(B * T, 3 * NH * HS)
    yield Case("attention_forward", sizes, dict(qkv=qkv, B=B, T=T, NH=NH))
    yield Case("attention_backward", sizes, dict(dout=normal(B * T, NH * HS), qkv=qkv, B=B, T=T, NH=NH))


def grouped_query_cases(B, T, NH, KV, HS):
    """As attention_cases, with fewer key heads than query heads."""
    sizes, qkv = f"B{B}-T{T}-NH{NH}-KV{KV}-HS{HS}", 2 * normal(B * T, (NH + 2 * KV) * HS)
    yield Case("attention_forward", sizes, dict(qkv=qkv, B=B, T=T, NH=NH, KV=KV))
    yield Case("attention_backward", sizes, dict(dout=normal(B * T, NH * HS), qkv=qkv, B=B, T=T, NH=NH, KV=KV))


def swiglu_cases(N, H):
    inp = 2 * normal(N, 2 * H)
    yield Case("swiglu_forward", f"N{N}-H{H}", dict(inp=inp))
    yield Case("swiglu_backward", f"N{N}-H{H}", dict(dout=normal(N, H, seed=1), inp=inp))


def elementwise_cases(N, C):
    inp = 2 * normal(N, C)
    for gelu in ("gelu", "gelu_exact"):
        yield Case(f"{gelu}_forward", f"N{N}-C{C}", dict(inp=inp))
        yield Case(f"{gelu}_backward", f"N{N}-C{C}", dict(dout=normal(N, C, seed=1), inp=inp))
    yield Case("residual_forward", f"N{N}-C{C}", dict(inp1=inp, inp2=normal(N, C, seed=1)))


def classifier_cases(N, V, Vp, spread):
    logits, targets = spread * normal(N, Vp), integers(V, N)
    targets[0] = logits[0, :V].argmax()
    yield Case("fused_classifier", f"N{N}-V{V}-Vp{Vp}-spread{spread}",
               dict(logits=logits, targets=targets, dloss=1 / N, V=V))


def adamw_cases(size, step, weight_decay, grad_scale):
    """Gradients from 1e-9, where epsilon decides the step, to 1."""
    scale = 10 ** np.random.default_rng(size).uniform(-9, 0, size).astype(np.float32)
    yield Case("adamw_update", f"size{size}-step{step}-decay{weight_decay}-scale{grad_scale}",
               dict(params=normal(size), grads=scale * normal(size, seed=1), m=scale * normal(size, seed=2),
                    v=(scale * normal(size, seed=3)) ** 2, learning_rate=LEARNING_RATE, beta1=BETA1, beta2=BETA2,
                    eps=EPSILON, weight_decay=weight_decay, grad_scale=grad_scale, step=step))


def collect(function, *arguments):
    return [case for sizes in arguments for case in function(*sizes)]


def in_bfloat16(cases):
    return [replace(case, kernel=case.kernel + "_bfloat16") for case in cases]


PRODUCTS = (
    collect(matmul_cases, (1, 1, 1), (2, 7, 5), (13, 36, 109), (65, 768, 67), (130, 65, 2304))
    + collect(attention_cases, (1, 1, 1, 1), (3, 2, 1, 7), (1, 13, 3, 12), (1, 64, 1, 64), (2, 65, 1, 5), (3, 130, 3, 12))
    + collect(grouped_query_cases, (1, 1, 2, 1, 1), (2, 13, 6, 3, 7), (1, 65, 9, 3, 12), (3, 130, 4, 1, 5))
)
CASES = (
    collect(encoder_cases, (1, 1, 1), (3, 13, 7), (1, 65, 36), (3, 130, 768))
    + collect(token_cases, (1, 1, 1), (3, 13, 36))
    + collect(layernorm_cases, (1, 1), (2, 7), (13, 36), (130, 65), (13, 768))
    + collect(rmsnorm_cases, (1, 3, 1.0), (2, 7, 1e-6), (13, 36), (130, 65, 1.0), (13, 768))
    + collect(rope_cases, (1, 1, 1, 2, 0), (2, 13, 3, 6, 0), (3, 7, 2, 64, 5))
    + PRODUCTS + in_bfloat16(PRODUCTS)
    + collect(swiglu_cases, (1, 1), (13, 7), (65, 768))
    + collect(elementwise_cases, (1, 1), (13, 7), (65, 768))
    + collect(classifier_cases, (1, 1, 128, 1), (5, 7, 7, 1), (13, 65, 128, 30), (3, 50257, 50304, 3))
    + collect(adamw_cases, (1, 1, 0.1, 1.0), (1003, 1, 0.0, 1.0), (1003, 10, 0.1, 0.25))
    + [Case("global_norm", f"size{size}", dict(grads=normal(size))) for size in (1, 1000, 1000003)]
)

# One case of moderate size per kernel, for tests that need no other sizes.
CASE = {case.kernel: case for case in CASES if case.sizes in (
    "B3-T13-C7", "N13-C36", "B2-T13-heads3-HS6-position0-sign1", "N13-H7", "N13-C36-OC109",
    "B1-T13-NH3-HS12", "N13-C7", "N13-V65-Vp128-spread30",
    "size1003-step10-decay0.1-scale0.25", "size1000")}
assert CASE.keys() == OUTPUTS.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case):
    actual, expected = results(Fast, case.kernel, case.args), results(exact, case.kernel, case.args)
    for output in expected:
        error = relative_error(actual[output], expected[output])
        worst[case.kernel, output] = np.maximum(worst.get((case.kernel, output), 0), error)
    check(case.kernel, actual, expected)


worst = {}   # (kernel, output) -> largest error over all sizes


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print(f"\n{'kernel':27} {'output':8} {'worst error':>11}  {'bound':>7}")
    for (kernel, output), error in worst.items():
        print(f"{kernel:27} {output:8} {error:11.1e}  {BOUNDS.get(kernel, BOUND):7.0e}")


# The float64 implementation itself

DIFFERENTIABLE = {
    # backward: (forward, {input of the forward: the gradient that the backward returns for it})
    "encoder_backward": ("encoder_forward", {"wte": "dwte", "wpe": "dwpe"}),
    "layernorm_backward": ("layernorm_forward", {"inp": "dinp", "weight": "dweight", "bias": "dbias"}),
    "matmul_backward": ("matmul_forward", {"inp": "dinp", "weight": "dweight", "bias": "dbias"}),
    "attention_backward": ("attention_forward", {"qkv": "dqkv"}),
    "gelu_backward": ("gelu_forward", {"inp": "dinp"}),
    "gelu_exact_backward": ("gelu_exact_forward", {"inp": "dinp"}),
    "rmsnorm_backward": ("rmsnorm_forward", {"inp": "dinp", "weight": "dweight"}),
    "swiglu_backward": ("swiglu_forward", {"inp": "dinp"}),
}
SMALL = [
    *encoder_cases(2, 3, 2), *layernorm_cases(3, 5), *matmul_cases(3, 4, 5), *attention_cases(2, 4, 2, 3),
    *elementwise_cases(5, 3), *rmsnorm_cases(3, 5, 0.1), *swiglu_cases(5, 3), *grouped_query_cases(2, 4, 4, 2, 3)]


def finite_differences(loss, x, h=1e-5):
    """dloss/dx by central differences, element by element."""
    x = x.astype(np.float64)
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + h
        above = loss(x)
        x[index] = value - h
        gradient[index] = (above - loss(x)) / (2 * h)
        x[index] = value
    return gradient


@pytest.mark.parametrize("backward", DIFFERENTIABLE)
def test_float64_backward_against_finite_differences(backward):
    forward, gradients = DIFFERENTIABLE[backward]
    for case in (case for case in SMALL if case.kernel == backward):
        forward_args = next(other.args for other in SMALL if other.kernel == forward and other.sizes == case.sizes)
        actual = results(exact, backward, case.args)
        for name, gradient in gradients.items():
            def loss(x, name=name, args=forward_args, dout=case.args["dout"]):
                return np.sum(results(exact, forward, {**args, name: x})["out"] * dout)
            assert relative_error(actual[gradient], finite_differences(loss, forward_args[name])) <= 1e-8, name


def test_float64_rope_is_its_own_backward():
    """A linear map, whose gradient is its transpose: a product with another vector is the same from either side."""
    turn, back = (case.args for case in rope_cases(2, 3, 2, 4, 1))
    rows, other = turn["rows"], normal(*turn["rows"].shape, seed=1)
    assert np.sum(exact.rope(**turn) * other) == pytest.approx(np.sum(rows * exact.rope(**{**back, "rows": other})), rel=1e-6)
    assert relative_error(exact.rope(**{**back, "rows": exact.rope(**turn)}), rows) <= 1e-6


def test_float64_classifier_against_finite_differences():
    args = dict(targets=np.array([0, 4, 2]), dloss=0.3, V=5)
    logits = normal(3, 8)
    expected = finite_differences(lambda x: 0.3 * exact.fused_classifier(x, **args)[0].sum(), logits)
    assert relative_error(exact.fused_classifier(logits, **args)[1], expected) <= 1e-8


def test_float64_adamw_takes_a_first_step_of_the_learning_rate():
    """From zero moments m_hat = g and v_hat = g**2, so each parameter moves by the learning rate against its gradient."""
    params, grads, zero = exact.float64(normal(9)), exact.float64(normal(9, seed=1)), np.zeros(9)
    settings = dict(learning_rate=0.01, beta1=BETA1, beta2=BETA2, eps=0, weight_decay=0, grad_scale=0.5, step=1)
    new_params, m, v = exact.adamw_update(params, grads, zero, zero, **settings)
    np.testing.assert_allclose(new_params, params - 0.01 * np.sign(grads), rtol=1e-12)
    np.testing.assert_allclose(m, 0.1 * 0.5 * grads)
    np.testing.assert_allclose(v, 0.05 * (0.5 * grads) ** 2)


# What holds for every kernel

@pytest.mark.parametrize("kernel", OUTPUTS)
def test_same_input_gives_the_same_bits(kernel):
    """Called twice, and by one thread of Numba's instead of all."""
    first = results(Fast, kernel, CASE[kernel].args)
    assert_same_bits(results(Fast, kernel, CASE[kernel].args), first)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert_same_bits(results(Fast, kernel, CASE[kernel].args), first)
    finally:
        numba.set_num_threads(threads)


def test_global_norm_of_many_blocks_does_not_depend_on_the_threads():
    grads = normal(3_000_000)
    threads = numba.get_num_threads()
    norms = set()
    for count in range(1, threads + 1):
        numba.set_num_threads(count)
        norms.add(kernels_cpu.global_norm(grads))
    numba.set_num_threads(threads)
    assert len(norms) == 1


def spoilt(kernel, value):
    """(name, args) with one element of one floating-point input set to value, for each such input."""
    for name, array in CASE[kernel].args.items():
        if isinstance(array, np.ndarray) and array.dtype == np.float32:
            array = array.copy()
            # Halfway in, but among what is read: token 2, position 6, a column of the vocabulary.
            array[tuple(2 if name == "wte" else size // 2 if size < 128 else 40 for size in array.shape)] = value
            yield name, {**CASE[kernel].args, name: array}


@pytest.mark.parametrize("kernel", OUTPUTS)
def test_nan_comes_out(kernel):
    """NaN in one element of an input reaches every element of the outputs that depends on it, and no other.

    Except in attention: there a NaN also reaches some elements which it is multiplied into with a weight of zero.
    """
    for name, args in spoilt(kernel, np.nan):
        actual, expected = results(Fast, kernel, args), results(exact, kernel, args)
        assert any(np.isnan(expected[output]).any() for output in expected), name
        for output in expected:
            missed = np.isnan(expected[output]) & ~np.isnan(actual[output])
            extra = ~np.isnan(expected[output]) & np.isnan(actual[output])
            assert not missed.any(), f"NaN in {name} vanished from {missed.sum()} elements of {output}"
            assert "attention" in kernel or not extra.any(), f"NaN in {name} spread to {extra.sum()} of {output}"


@pytest.mark.parametrize("kernel", OUTPUTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinity_comes_out(kernel):
    """Infinity in one element of an input makes every element of the outputs non-finite that it makes so in float64."""
    for name, args in spoilt(kernel, np.inf):
        actual, expected = results(Fast, kernel, args), results(exact, kernel, args)
        assert any(not np.isfinite(expected[output]).all() for output in expected), name
        for output in expected:
            vanished = np.isfinite(actual[output]) & ~np.isfinite(expected[output])
            assert not vanished.any(), f"infinity in {name} vanished from {vanished.sum()} elements of {output}"


# What holds for one kernel

def test_layernorm_of_numbers_far_from_zero():
    """With a mean of 1000 times the deviation, E[x^2] - E[x]^2 would have no correct digit left."""
    args = dict(inp=normal(13, 768) + 1000, weight=normal(768), bias=normal(768, seed=1))
    check("layernorm_forward", results(Fast, "layernorm_forward", args), results(exact, "layernorm_forward", args), 1e-4)


@pytest.mark.parametrize("kernel", [kernel for kernel in OUTPUTS if kernel.startswith(("matmul", "attention"))])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_products_shared_among_threads(kernel, threads):
    """Also with more threads than blocks of columns, or than heads."""
    args = CASE[kernel].args
    check(kernel, results(Fast, kernel, {**args, "threads": threads}), results(exact, kernel, args))


ODD_PRODUCTS = [*matmul_cases(N=35, C=1001, OC=777), *attention_cases(B=1, T=140, NH=5, HS=9)]


@pytest.mark.parametrize("case", ODD_PRODUCTS + in_bfloat16(ODD_PRODUCTS), ids=str)
def test_products_give_the_same_bits_on_any_number_of_threads(case):
    """Sizes for which the edges of the threads' blocks differ with the number of threads."""
    one = results(Fast, case.kernel, {**case.args, "threads": 1})
    for threads in (2, 3):
        assert_same_bits(results(Fast, case.kernel, {**case.args, "threads": threads}), one)


# Whole tiles and parts of them, and one or several blocks in each direction: of rows (where a is transposed), depth, columns.
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 5, 7), (8, 16, 48), (7, 16, 96), (32, 64, 32), (15, 33, 45), (67, 131, 33),
                                     (1030, 20, 17), (30, 1600, 20), (20, 24, 800)])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (1.0, 1.0), (-0.3, 0.7)])
@pytest.mark.parametrize("dtype", kernels_cpu.DTYPES)
def test_sgemm(m, k, n, a_transposed, b_transposed, alpha, beta, dtype):
    margin = 16
    generator = np.random.default_rng(0)

    def matrix(rows, columns, transposed=False):
        """A matrix, or the transpose of one, that is part of a wider array."""
        shape = (columns, rows) if transposed else (rows, columns)
        whole = generator.standard_normal((shape[0] + 2 * margin, shape[1] + 2 * margin), dtype=np.float32)
        part = whole[margin:-margin, margin:-margin]
        return whole, part.T if transposed else part

    (_, a), (_, b), (around, c) = matrix(m, k, a_transposed), matrix(k, n, b_transposed), matrix(m, n)
    before = around.copy()
    rounded = exact.bfloat16 if dtype == "bfloat16" else exact.float64
    expected = alpha * rounded(a) @ rounded(b) + beta * c
    scale = np.linalg.norm(abs(alpha) * np.abs(rounded(a)) @ np.abs(rounded(b)) + abs(beta) * np.abs(c))
    if beta == 0:
        c[...] = np.nan
    kernels_cpu.sgemm(c, alpha, a, b, beta, kernels_cpu.make_workspace(1, dtype)[0])
    assert np.linalg.norm(c - expected) <= 1e-6 * scale
    c[...] = before[margin:-margin, margin:-margin]
    assert np.array_equal(around, before)  # nothing was written beside c


def test_matmul_backward_without_bias():
    args = CASE["matmul_backward"].args
    dinp, dweight = unset(*args["inp"].shape), np.zeros_like(args["weight"])
    kernels_cpu.matmul_backward(dinp, dweight, EMPTY, **args, workspace=kernels_cpu.make_workspace(THREADS))
    expected = results(exact, "matmul_backward", args)
    del expected["dbias"]
    check("matmul_backward", dict(dinp=dinp, dweight=dweight), expected)


@pytest.mark.parametrize("changed", [1, 64, 100])
def test_attention_never_looks_ahead(changed):
    """Outputs before a position do not depend, bit for bit, on inputs at that position and after it."""
    B, T, NH = 1, 130, 3
    qkv = normal(B * T, 36 * 3)
    later = qkv.copy()
    later[changed:] = 7 * normal(T - changed, 36 * 3, seed=1)
    out, lse = Fast.attention_forward(qkv, B, T, NH)
    later_out, later_lse = Fast.attention_forward(later, B, T, NH)
    assert later_out[:changed].tobytes() == out[:changed].tobytes()
    assert later_lse[..., :changed].tobytes() == lse[..., :changed].tobytes()
    assert not np.any(later_out[changed:] == out[changed:])


def test_attention_with_large_scores():
    """Scores of several hundred: exp would overflow if the largest were not subtracted first."""
    args = dict(qkv=10 * normal(65, 36 * 3), B=1, T=65, NH=3)
    check("attention_forward", results(Fast, "attention_forward", args), results(exact, "attention_forward", args))
    args["dout"] = normal(65, 36)
    check("attention_backward", results(Fast, "attention_backward", args), results(exact, "attention_backward", args), 5e-5)


@pytest.mark.parametrize("gelu", ["gelu", "gelu_exact"])
def test_gelu_over_its_whole_range(gelu):
    """Element by element, since a few large numbers would hide the others: both tails, and either side of zero."""
    x = np.concatenate([np.linspace(-30, 30, 601), 10.0 ** np.arange(-30, 0), -(10.0 ** np.arange(-30, 0))])
    x = x.astype(np.float32).reshape(1, -1)
    one = np.ones_like(x)
    forward, backward = f"{gelu}_forward", f"{gelu}_backward"
    np.testing.assert_allclose(getattr(Fast, forward)(x), getattr(exact, forward)(x), rtol=5e-6, atol=1e-30)
    np.testing.assert_allclose(getattr(Fast, backward)(one, x), getattr(exact, backward)(one, x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", ["gelu_backward", "gelu_exact_backward"])
def test_gelu_backward_in_place(kernel):
    args = CASE[kernel].args
    dout = args["dout"].copy()
    getattr(kernels_cpu, kernel)(dout, dout, args["inp"])
    assert_same_bits(dict(dinp=dout), results(Fast, kernel, args))


@pytest.mark.parametrize("padding", [80, 1e30, np.inf, np.nan])
def test_padding_gets_no_probability_and_no_gradient(padding):
    args = dict(CASE["fused_classifier"].args)
    V, logits = args["V"], args["logits"].copy()
    expected = results(Fast, "fused_classifier", args)
    logits[:, V:] = padding
    actual = results(Fast, "fused_classifier", {**args, "logits": logits})
    assert not actual["dlogits"][:, V:].any()
    assert_same_bits(actual, expected)


def test_classifier_over_the_whole_range_of_exp():
    """Probabilities down to 1e-37, each with its own relative error: this tests the kernels' exponential."""
    V = 8001
    logits = np.linspace(0, -85, V, dtype=np.float32).reshape(1, -1)
    targets = np.array([V - 1], dtype=np.int32)
    losses, dlogits = Fast.fused_classifier(logits, targets, 1.0, V)
    expected_losses, expected_dlogits = exact.fused_classifier(logits, targets, 1.0, V)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    np.testing.assert_allclose(dlogits, expected_dlogits, rtol=1e-6)


def test_classifier_with_large_logits():
    """A certain target has loss 0; an impossible one has the distance of its logit from the largest."""
    logits = np.full((2, 128), -80, dtype=np.float32)
    logits[:, 3] = 80
    losses, dlogits = Fast.fused_classifier(logits, np.array([3, 4], dtype=np.int32), 1.0, 100)
    np.testing.assert_array_equal(losses, [0, 160])
    np.testing.assert_array_equal(dlogits[0], 0)
    np.testing.assert_array_equal(dlogits[1].nonzero(), [[3, 4]])
    np.testing.assert_array_equal(dlogits[1, 3:5], [1, -1])


def test_global_norm_of_unequal_numbers():
    """A large number followed by a million small ones: a float32 sum of squares would lose every one of them."""
    grads = np.full(1000003, 1e-4, dtype=np.float32)
    grads[0] = 1
    check("global_norm", dict(norm=kernels_cpu.global_norm(grads)), dict(norm=exact.global_norm(grads)))
    assert kernels_cpu.global_norm(np.full(3, 1e30, dtype=np.float32)) > 1e30, "squares must not overflow"


def test_adamw_without_gradient_only_decays():
    args = {**CASE["adamw_update"].args, "grads": np.zeros(1003, np.float32), "m": np.zeros(1003, np.float32)}
    params, _, _ = Fast.adamw_update(**args)
    np.testing.assert_allclose(params, args["params"] * (1 - LEARNING_RATE * 0.1), rtol=2e-7)
