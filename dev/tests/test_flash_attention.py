"""Flash attention against float64, on inputs rounded to bfloat16: in the emulator and, where there is one, on a GPU."""

import numpy as np
import pytest

import kernels_gpu
from cuda_on_cpu import CpuDevice
from device import open_device
from test_kernels import assert_same_bits, normal, relative_error
from test_kernels_gpu import Runner, expected, open_runner

HS = kernels_gpu.FLASH_HEAD_SIZE
SIZES = (1, 1, 1), (1, 16, 2), (2, 17, 1), (1, 64, 3), (2, 65, 2), (1, 128, 1), (1, 300, 1)     # B, T, NH
DEVICES = {
    "cpu": lambda: CpuDevice("bfloat16"),
    "cpu-reversed": lambda: CpuDevice("bfloat16", reverse=True),
    "cpu-sanitized": lambda: CpuDevice("bfloat16", sanitize=True),
    "cuda": lambda: open_device("cuda", "bfloat16"),
}


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    return open_runner(DEVICES, request.param)


def arguments(B, T, NH, scale=1.0):
    return dict(qkv=scale * normal(B * T, 3 * NH * HS), B=B, T=T, NH=NH), dict(dout=normal(B * T, NH * HS, seed=1))


def check(run, forward, backward, bound):
    """Each of dq, dk and dv on its own: dv is the largest, and its error would hide that of the others."""
    actual, exactly = (find("attention_forward", forward if find is run else run.rounded("attention_forward", forward))
                       for find in (run, expected))
    assert relative_error(actual["out"], exactly["out"]) <= bound
    assert relative_error(actual["lse"], exactly["lse"]) <= 1e-6
    both = forward | backward
    actual, exactly = (find("attention_backward", both if find is run else run.rounded("attention_backward", both))["dqkv"]
                       for find in (run, expected))
    for name, ours, true in zip(("dq", "dk", "dv"), np.split(actual, 3, axis=1), np.split(exactly, 3, axis=1)):
        assert relative_error(ours, true) <= bound, name


@pytest.mark.parametrize("B, T, NH", SIZES)
def test_against_float64(run, B, T, NH):
    check(run, *arguments(B, T, NH), bound=5e-3)


def test_large_scores(run):
    """Scores up to 100: their exp would overflow if the largest were not subtracted first."""
    forward, backward = arguments(1, 130, 2, scale=4.5)
    q, k, _ = (part.reshape(130, 2, HS) for part in np.split(forward["qkv"], 3, axis=1))
    assert 90 < np.abs(np.einsum("ihc,jhc->hij", q, k) / 8).max() < 150
    check(run, forward, backward, bound=1e-2)


def test_order_of_threads_does_not_change_a_bit():
    forward, backward = arguments(1, 130, 2)
    for kernel, args in ("attention_forward", forward), ("attention_backward", forward | backward):
        assert_same_bits(*(Runner(CpuDevice("bfloat16", reverse=reverse))(kernel, args) for reverse in (False, True)))


@pytest.mark.parametrize("changed", [1, 64, 100])
def test_never_looks_ahead(run, changed):
    """The outputs before a position are the same, bit for bit, for any inputs at that position and after it."""
    first, _ = arguments(1, 132, 1)
    second = first | dict(qkv=first["qkv"].copy())
    second["qkv"][changed:] = 7 * normal(132 - changed, 3 * HS, seed=2)
    one, other = (run("attention_forward", args) for args in (first, second))
    assert one["out"][:changed].tobytes() == other["out"][:changed].tobytes()
    assert one["lse"][..., :changed].tobytes() == other["lse"][..., :changed].tobytes()
    assert not np.any(one["lse"][..., changed:] == other["lse"][..., changed:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_come_out(run, value):
    forward, backward = arguments(1, 70, 2)
    for part in range(3):
        qkv = forward["qkv"].copy()
        qkv[66, part * 2 * HS + 5] = value
        spoilt = forward | dict(qkv=qkv)
        for kernel, args in ("attention_forward", spoilt), ("attention_backward", spoilt | backward):
            actual, exactly = run(kernel, args), expected(kernel, args)
            for output in exactly:
                assert not (np.isfinite(actual[output]) & ~np.isfinite(exactly[output])).any(), output
