"""The CUDA kernels with bfloat16 activations against float64, on the same inputs rounded to bfloat16.

The cases and the comparisons are those of test_kernels_gpu.py. A number rounded to bfloat16 is off by up to 2**-9 = 2e-3 of
itself; outputs in float32, such as the gradients of parameters, are as accurate as in float32.
"""
import sys

import numpy as np
import pytest

import kernels_gpu
import test_kernels as cpu
from cuda_on_cpu import CpuDevice
from device import open_device
from test_kernels import collect
from test_kernels_gpu import (CASE, CASES, OUTPUTS, Runner, expected, gelu_cases, matvec_cases, norm_cases, open_runner,
                              residual_layernorm_cases, spoilt)

BOUND, BOUND32 = 3e-3, 1e-6         # of outputs in bfloat16, and in float32
BOUNDS = {
    ("layernorm_backward", "dinp"): 8e-3,               # a difference: what was added to other numbers
    ("residual_layernorm_forward", "mean"): BOUND,      # both of the rounded residual
    ("residual_layernorm_forward", "rstd"): BOUND,
    # With scores and weights in bfloat16. Heads of 64 channels have none, see test_flash_attention.py.
    ("attention_forward", "out"): 1e-2,
    ("attention_forward", "lse"): BOUND,
    ("attention_backward", "dqkv"): 3e-2,
    ("attention_cached_forward", "out"): 1e-2,          # of a prompt
}
FLOAT32 = "mean", "rstd", "dwte", "dwpe", "dweight", "dbias", "losses", "norm", "params", "m", "v"
# Rows whose length is a multiple of 8, as GPT-2's: test_kernels_gpu.py has few of them. They are read in Parts of 16 bytes.
CASES_IN_PARTS = (
    collect(cpu.encoder_cases, (3, 13, 40)) + collect(cpu.layernorm_cases, (13, 40), (3, 2072), (1100, 8))
    + collect(residual_layernorm_cases, (13, 40), (3, 2072)) + collect(cpu.matmul_cases, (1100, 8, 40))
    + collect(cpu.attention_cases, (2, 40, 2, 8)) + collect(matvec_cases, (9, 1104, 16)) + collect(gelu_cases, (13, 40))
    + collect(norm_cases, (1008,)) + collect(cpu.adamw_cases, (1008, 10, 0.1, 0.25)))
DEVICES = {
    "cpu": lambda: CpuDevice("bfloat16", reverse=True, sanitize=sys.platform == "linux"),
    "cuda": lambda: open_device("cuda", "bfloat16"),
}


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    return open_runner(DEVICES, request.param)


@pytest.mark.parametrize("case", CASES + CASES_IN_PARTS, ids=str)
def test_against_float64(run, case):
    actual, exactly = run(case.kernel, case.args), expected(case.kernel, run.rounded(case.kernel, case.args))
    for output in exactly:
        bound = BOUNDS.get((case.kernel, output), BOUND32 if output in FLOAT32 else BOUND)
        error = cpu.relative_error(actual[output], exactly[output])
        assert error <= bound, f"{output}: relative error {error:.1e}, bound {bound:.0e}"


def test_adamw_needs_no_alignment_of_weights(run):
    """A tensor that starts at a multiple of 16 bytes among the parameters starts at one of 8 bytes among the weights."""
    device, size = run.device, 1008
    params, grads, m, v = (device.to_device(cpu.normal(size, seed=seed) ** 2) for seed in range(4))
    weights = run.unset(size + 4)[4:]
    kernels_gpu.use(device)
    kernels_gpu.adamw_update(params, grads, m, v, weights, device.to_device(np.ones(1, np.float32)), learning_rate=0.1,
                             beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, grad_clip=0, step=1)
    assert device.to_host(weights).tolist() == device.to_host(params).astype(device.Float).tolist()


@pytest.mark.parametrize("kernel", OUTPUTS)
def test_order_of_threads_does_not_change_a_bit(kernel):
    cpu.assert_same_bits(*(Runner(CpuDevice("bfloat16", reverse=reverse))(kernel, CASE[kernel]) for reverse in (False, True)))


@pytest.mark.parametrize("kernel", OUTPUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_come_out(run, kernel, value):
    for name, args in spoilt(kernel, value):
        actual, exactly = run(kernel, args), expected(kernel, args)
        for output in exactly:
            missed = np.isfinite(actual[output]) & ~np.isfinite(exactly[output])
            assert not missed.any(), f"{value} in {name} is missing from {missed.sum()} elements of {output}"
