"""The CUDA kernels with bfloat16 activations against float64, on the same inputs rounded to bfloat16.

The cases and the comparisons are those of test_kernels_gpu.py. A number rounded to bfloat16 is off by up to 2**-9 = 2e-3 of
itself; outputs in float32, such as the gradients of parameters, are as accurate as in float32.
"""
import sys

import numpy as np
import pytest

import test_kernels as cpu
from cli import UserError
from cuda_on_cpu import CpuDevice
from device import open_device
from test_kernels_gpu import CASE, CASES, OUTPUTS, Runner, expected, spoilt

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
DEVICES = {
    "cpu": lambda: CpuDevice("bfloat16", reverse=True, sanitize=sys.platform == "linux"),
    "cuda": lambda: open_device("cuda", "bfloat16"),
}


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    try:
        return Runner(DEVICES[request.param]())
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(run, case):
    actual, exactly = run(case.kernel, case.args), expected(case.kernel, run.rounded(case.kernel, case.args))
    for output in exactly:
        bound = BOUNDS.get((case.kernel, output), BOUND32 if output in FLOAT32 else BOUND)
        error = cpu.relative_error(actual[output], exactly[output])
        assert error <= bound, f"{output}: relative error {error:.1e}, bound {bound:.0e}"


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
