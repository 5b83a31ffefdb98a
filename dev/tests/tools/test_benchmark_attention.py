"""benchmark_attention.py: its arithmetic, and runs without PyTorch on a stand-in for a GPU. No test asserts a time."""
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import kernels_gpu
from cli import UserError
from cuda_on_cpu import CpuDevice
from dev import benchmark_attention
from dev.benchmark import OURS, WallClock
from dev.benchmark_attention import Attention, Size, check_results, measure_all, print_times, time_attention
from test_benchmark import rows_of, run

PEERS = [name for name in benchmark_attention.PROGRAMS if name != OURS]


@pytest.fixture(autouse=True)
def compiler():
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the CUDA source with")


def test_without_pytorch_it_measures_ours_alone():
    finished = run("benchmark_attention.py", "--device", "cpu", "--sizes", "1x2x70", "2x1x3", "--calls", 1,
                   "--python", shutil.which("false"))
    assert finished.returncode == 0, finished.stderr
    assert "no torch in " in finished.stderr
    rows = rows_of(finished.stdout)[2:]
    assert [(*row[:2], row[4], row[7]) for row in rows] == [(size, OURS, "1.00", "1.00") for size in ("1x2x70", "2x1x3")]
    assert all(float(row[column]) > 0 for row in rows for column in (2, 5))


def test_it_computes_attention():
    """Against the formulas, in float64. The numbers that are compared come from all rows and columns of a small result."""
    B, NH, T, HS = 1, 2, 70, kernels_gpu.FLASH_HEAD_SIZE
    attention = benchmark_attention.our_attention(CpuDevice("bfloat16"), B, NH, T)
    attention.forward()
    attention.backward()
    qkv, dout = benchmark_attention.inputs(B, NH, T)
    q, k, v, dout = (part.reshape(T, NH, HS).transpose(1, 0, 2).astype(float) for part in (*np.split(qkv, 3, axis=1), dout))
    p = np.exp(q @ k.swapaxes(1, 2) / 8) * np.tri(T)
    p /= p.sum(axis=2, keepdims=True)
    dp = dout @ v.swapaxes(1, 2)
    dscores = p * (dp - (p * dp).sum(axis=2, keepdims=True)) / 8
    expected = p @ v, dscores @ k, dscores.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ dout
    for ours, true in zip(attention.results(), expected, strict=True):
        true = true.transpose(1, 0, 2).reshape(ours.shape)
        assert np.linalg.norm(ours - true) <= benchmark_attention.BOUND / 2 * np.linalg.norm(true)
    places = np.array(benchmark_attention.some_of(np.arange(T * NH * HS)))
    assert abs(len(places) / benchmark_attention.COMPARED - 1) < 0.1
    assert set(places // (NH * HS)) == set(range(T)) and set(places % (NH * HS)) == set(range(NH * HS))


def test_every_timed_call_comes_after_as_many_and_after_other_work():
    done = []
    array = np.arange(6.0)
    attention = Attention(lambda: done.append("forward"), lambda: done.append("backward"), lambda: (array,))
    rows = time_attention(dict(sizes=[(1, 2, 3)], calls=2), lambda *size: attention, WallClock(), lambda: done.append("busy"))
    assert done == 4 * ["busy", "forward"] + 4 * ["busy", "backward"]
    assert rows[0].keys() == {"forward", "backward", "results"} and rows[0]["results"] == [[0, 1, 2, 3, 4, 5]]


def result(forward, backward, results=4 * [[3.0, 4.0]]):
    return dict(rows=[dict(forward=forward, backward=backward, results=results)], versions={})


def test_times_and_rates(capsys):
    print_times([Size(4, 12, 1024)], {OURS: result(1e-4, 2e-4), PEERS[0]: result(5e-5, 3e-4)})
    teraflop = 4 * 12 * 64 * 1024 * 1025 / 1e12     # of one product: two FLOPs for each kept score and channel
    assert rows_of(capsys.readouterr().out)[2:] == [
        ["4x12x1024", OURS, "0.100", f"{2 * teraflop / 1e-4:.1f}", "1.00", "0.200", f"{5 * teraflop / 2e-4:.1f}", "1.00"],
        ["4x12x1024", PEERS[0], "0.050", f"{2 * teraflop / 5e-5:.1f}", "0.50", "0.300", f"{5 * teraflop / 3e-4:.1f}", "1.50"]]


@pytest.mark.parametrize("numbers, left_out", [([3.0, 4.05], False), ([3.0, 4.2], True), ([np.nan, 4.0], True)])
def test_a_peer_with_other_results_or_none_is_left_out(monkeypatch, capsys, numbers, left_out):
    def run_task(python, task, script):
        if task["program"] == PEERS[1]:
            raise UserError(f"{task['title']}: no such kernel")
        return result(1.0, 1.0, [[3.0, 4.0], [3.0, 4.0], numbers if task["program"] == PEERS[0] else [3.0, 4.0], [3.0, 4.0]])

    monkeypatch.setattr(benchmark_attention, "run_task", run_task)
    monkeypatch.setattr(benchmark_attention.benchmark, "programs_that_run", lambda programs, peers: programs)
    results = measure_all(SimpleNamespace(python="python", device="cuda", sizes=[Size(1, 1, 2)], calls=1))
    assert list(results) == [OURS] + (not left_out) * PEERS[:1]
    errors = capsys.readouterr().err
    assert f"left out: {PEERS[1]}: no such kernel" in errors
    assert (f"left out: {PEERS[0]}: its dk differs from ours at 1x1x2" in errors) == left_out


def test_if_ours_fails_nothing_is_measured(monkeypatch):
    def run_task(python, task, script):
        raise UserError("no GPU")

    monkeypatch.setattr(benchmark_attention, "run_task", run_task)
    monkeypatch.setattr(benchmark_attention.benchmark, "programs_that_run", lambda programs, peers: programs)
    with pytest.raises(UserError, match="no GPU"):
        measure_all(SimpleNamespace(python="python", device="cuda", sizes=[Size(1, 1, 2)], calls=1))
    with pytest.raises(UserError, match="dv"):
        check_results("ours", [Size(1, 1, 2)], *2 * [result(1, 1, [[1.0], [1.0], [1.0], [np.nan]])])


def test_once_launches_each_kernel_once(monkeypatch, capsys):
    """For a profiler, which finds nothing else on the GPU."""
    device, launched = CpuDevice("bfloat16"), []
    launch = device.launch

    def noted(name, *arguments, **options):
        launched.append(name)
        launch(name, *arguments, **options)

    device.launch = noted
    monkeypatch.setattr("device.open_device", lambda name, dtype: device)
    monkeypatch.setattr(sys, "argv", ["benchmark_attention.py", "--once", "--sizes", "1x1x70"])
    benchmark_attention.main()
    assert launched == ["flash_attention_forward", "flash_attention_backward_q", "flash_attention_backward_kv"]
    assert capsys.readouterr().out.count("once at 1x1x70") == 1
