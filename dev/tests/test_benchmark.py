"""The benchmark's arithmetic, and runs of it without PyTorch: of the CPU program, and of the GPU's on a stand-in for a GPU.

No test here asserts anything about time.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

DEV = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DEV))

import benchmark
import kernels_gpu
import train_gpt2
import train_gpt2_gpu
from benchmark import OURS, OURS_TF32, PROGRAMS, TIMES_MOVED, Shape, bytes_moved, summarize, time_kernels, time_launches
from dev.cuda_on_cpu import CpuDevice
from device import open_device, parse_signatures
from files import UserError
from gpt2 import Config, training_flops

TINY = Config(max_seq_len=16, vocab_size=120, padded_vocab_size=128, num_layers=2, num_heads=2, channels=32)


def test_flops_of_the_kernels_add_up_to_the_flops_of_a_step(monkeypatch):
    """Counted call by call from the shapes of the arguments, and by formula."""
    kernels = SimpleNamespace(**vars(train_gpt2.kernels))
    monkeypatch.setattr(train_gpt2, "kernels", kernels)
    model = train_gpt2.GPT2(TINY, batch_size=3, sequence_length=10, threads=1)
    tokens = np.ones((3, 10), dtype=np.int32)
    calls = time_kernels(kernels)
    model.forward(tokens)
    model.backward(tokens)
    assert sum(call.flops for call in calls) == sum(training_flops(TINY, 3, 10))
    assert {"encoder_forward", "attention_backward"} <= {call.name for call in calls}


def test_ratio_is_the_median_over_rounds():
    """A round in which the machine was slow for both programs moves the median time, and not the ratio."""
    def rounds(*seconds):
        return [dict(seconds=[value], peak_memory=memory) for memory, value in enumerate(seconds)]
    summary = summarize({OURS: rounds(1.0, 10.0, 2.0), "peer": rounds(2.0, 20.0, 6.0)})
    assert summary[OURS] == (2000.0, 1.0, 2)
    assert summary["peer"] == (6000.0, 2.0, 2)


def test_a_program_is_compared_with_ours_whose_products_are_of_the_same_type():
    def rounds(seconds):
        return [dict(seconds=[seconds], peak_memory=0)]
    summary = summarize({OURS: rounds(8.0), OURS_TF32: rounds(2.0), "PyTorch eager, sdpa": rounds(8.0),
                         "PyTorch eager tf32, sdpa": rounds(6.0)})
    assert [row.ratio for row in summary.values()] == [1.0, 1.0, 1.0, 3.0]


def run(*flags):
    return subprocess.run([sys.executable, DEV / "benchmark.py", *map(str, flags)], capture_output=True, text=True)


def test_without_pytorch_it_measures_the_program_alone(tmp_path):
    python, chart = tmp_path / "python", tmp_path / "chart.png"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    finished = run("--model", "d2", "--shapes", "1x16", "2x16", "--rounds", 1, "--steps", 1,
                   "--python", python, "--output", chart)
    assert finished.returncode == 0, finished.stderr
    assert f"no PyTorch in {python}" in finished.stderr
    for shape in ("1x16", "2x16"):
        assert f"| {shape}  | {OURS}" in finished.stdout
        assert f"kernel at {shape}" in finished.stdout
    assert not any(name in finished.stdout for name in PROGRAMS["cpu"] if name != OURS)
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [("--shapes", "4x"), ("--shapes", "1x2048"), ("--python", "/no/such/python"),
                                   ("--rounds", "0"), ("--device", "gpu")])
def test_a_mistake_on_the_command_line_is_one_line(flags):
    finished = run(*flags)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and flags[0] in finished.stderr


# On a GPU

@pytest.fixture
def stand_in(monkeypatch):
    """The CPU, which is told to pass for the one GPU of this machine."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the CUDA source with")
    device = CpuDevice()
    pool = SimpleNamespace(total_bytes=lambda: 3_210_000_000)
    device.cupy = SimpleNamespace(get_default_memory_pool=lambda: pool, __version__="0.0")
    device.peak_flops = lambda: 1e9
    monkeypatch.setattr("device.open_device", lambda name, dtype: device)
    return device


def step(device):
    """One training step of a tiny model on the device."""
    model = train_gpt2_gpu.GPT2(TINY, 3, 10, device)
    model.initialize(seed=1)
    generator = np.random.default_rng(0)
    inputs, targets = (device.to_device(generator.integers(120, size=(3, 10), dtype=np.int32)) for _ in range(2))
    model.forward(inputs)
    model.backward(targets)
    model.update(1, 1e-3, 0.1, model.gradient_norm(), 1.0)
    return model.params.flat


def test_every_launch_and_product_is_timed_and_computes_what_it_did_before(stand_in):
    untimed = step(stand_in)
    launched = []
    launch = stand_in.launch

    def noted(name, *arguments, **options):
        launched.append(name)
        launch(name, *arguments, **options)

    stand_in.launch = noted
    calls = time_launches(stand_in)
    assert (step(stand_in) == untimed).all()
    calls = calls()
    assert [call.name for call in calls if not call.flops] == [name for name in launched if name != "spin"]
    # Attention makes seven products in all, of whole (T, T) matrices, where the formula counts six of their lower half.
    (linear, _), T = training_flops(TINY, 3, 10), 10
    assert sum(call.flops for call in calls) == linear + TINY.num_layers * 7 * 2 * 3 * T * T * TINY.channels
    assert [call.flops for call in calls if call.name == "gemm, 2 of 10 x 10 x 16"] == 2 * 3 * 3 * [2 * 2 * 10 * 10 * 16]
    assert all((call.nbytes > 0) == (call.flops == 0) for call in calls)


def test_what_the_table_calls_read_and_written_is_what_a_kernel_reads_and_writes(stand_in):
    """An array that a kernel writes is also read if other contents make for another result."""
    launch = stand_in.launch
    read = set()

    def watched(name, grid, block, *arguments, **options):
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        before = [array.copy() for array in arrays]
        launch(name, grid, block, *arguments, **options)
        after = [array.copy() for array in arrays]

        def put_back(contents):
            for array, content in zip(arrays, contents):
                array[...] = content

        for i, parameter in stand_in.kernels[name].arrays:
            alone = sum(np.shares_memory(array, arguments[i]) for array in arrays) == 1     # not so where one works in place
            if not parameter.is_const and alone:
                put_back(before)
                arguments[i][...] = np.nan
                launch(name, grid, block, *arguments, **options)
                if not all(np.array_equal(array, content, equal_nan=True) for array, content in zip(arrays, after)):
                    read.add((name, parameter.name))
        put_back(after)

    stand_in.launch = watched
    step(stand_in)
    kernels = parse_signatures("\n".join(kernels_gpu.SOURCES))
    const = {(name, parameter.name) for name, kernel in kernels.items() for parameter in kernel.parameters if parameter.is_const}
    table = {(name, array) for name, arrays in TIMES_MOVED.items() for array in arrays}
    assert table - const == read
    assert table & const == {("encoder_forward", "wte"), ("encoder_forward", "wpe")}    # a part of each is read


def test_bytes_moved():
    kernels = parse_signatures("\n".join(kernels_gpu.SOURCES))

    def moved(name, *arguments):
        return bytes_moved(kernels[name], arguments)

    def floats(*shape):
        return np.empty(shape, dtype=np.float32)

    N, T, C, Vp, maxT = 6, 3, 5, 40, 20
    tokens, none = np.empty(N, dtype=np.int32), floats(0)
    assert moved("encoder_forward", floats(N, C), tokens, floats(Vp, C), floats(maxT, C), N, T, C, Vp, maxT) == pytest.approx(
        4 * (N * C + N + N * C + T * C))
    assert moved("column_sums", floats(1, C), floats(N, C), 1, N, C, 0) == 4 * (C + N * C)
    assert moved("column_sums", floats(1, C), floats(N, C), 1, N, C, 1) == 4 * (2 * C + N * C)
    assert moved("residual_layernorm_forward", none, floats(N, C), floats(N), floats(N), floats(N, C), none, none,
                 floats(C), floats(C), N, C) == 4 * (2 * N * C + 2 * N + 2 * C)
    assert moved("adamw_update", *(floats(7) for _ in range(4)), floats(1), *(9 * [0.0]), 7) == 4 * (8 * 7 + 1)


def test_a_whole_run_on_the_stand_in(stand_in, monkeypatch, capsys, tmp_path):
    """Its processes are calls here, for only this process knows of the stand-in; their results pass through JSON all the same."""
    def run_task(python, task):
        return json.loads(json.dumps(PROGRAMS[task["device"]][task["program"]].measure(task)))

    monkeypatch.setattr(benchmark, "run_task", run_task)
    monkeypatch.setattr("gpt2.model_config", lambda name: TINY)
    monkeypatch.setitem(benchmark.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setattr(benchmark, "COPIED_FLOATS", 1000)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", "--shapes", "2x16", "--rounds", "2", "--steps", "3",
                                      "--python", shutil.which("false"), "--output", str(tmp_path / "chart.png")])
    benchmark.main()
    output = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    steps = [row for row in table if row[:2] in (["2x16", OURS], ["2x16", OURS_TF32])]
    assert [(row[1], row[3], row[5]) for row in steps] == [(OURS, "1.00", "3.21 GB"), (OURS_TF32, "1.00", "3.21 GB")]
    for row in steps:
        assert float(row[6].rstrip("%")) == pytest.approx(
            100 * sum(training_flops(TINY, 2, 16)) / 1e9 / (float(row[2].replace(",", "")) / 1000), rel=0.1)
    assert stand_in.name in output and "cupy 0.0" in output
    assert "The fastest float32 products of 64 x 64" in output and "The fastest tf32 products of 64 x 64" in output
    headings = [row for row in table if row[0].startswith("kernel at")]
    assert [row[0] for row in headings] == ["kernel at 2x16", "kernel at 2x16, tf32"]
    assert headings[0][1:] == ["calls", "ms a step", "share", "GFLOP/s", "GB/s", "of best"]
    calls = {row[0]: row[1:] for row in table[table.index(headings[1]):]}
    assert calls["layernorm_backward"][0] == str(2 * TINY.num_layers + 1) and calls["layernorm_backward"][3] == ""
    assert calls["gemm, 32 x 96 x 32"][0] == str(TINY.num_layers) and calls["gemm, 32 x 96 x 32"][4] == ""
    assert calls["gemm, 32 x 96 x 32"][5].endswith("%") and calls["layernorm_backward"][5].endswith("%")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_program_of_ours_that_fails_takes_its_peers_with_it(monkeypatch):
    """A GPU without TF32 still has its float32 programs measured."""
    def run_task(python, task):
        if task["program"] == OURS_TF32:
            raise UserError("--dtype tf32 needs a GPU of compute capability 8.0")
        return dict(seconds=[1.0], loss=1.0, busy_cores=0)

    monkeypatch.setattr(benchmark, "run_task", run_task)
    options = SimpleNamespace(device="cuda", model="d2", steps=3, rounds=2, threads=1, python="python")
    results = benchmark.measure_shape(Shape(1, 16), options, PROGRAMS["cuda"])
    assert {name: len(rounds) for name, rounds in results.items()} == {
        OURS: 2, "PyTorch eager, plain": 2, "PyTorch compile, plain": 2}


def test_without_a_gpu_one_line_says_what_is_missing():
    try:
        open_device("cuda", "float32")
    except UserError as error:
        missing = str(error)
    else:
        pytest.skip("there is a GPU")
    finished = run("--device", "cuda", "--model", "d2", "--shapes", "1x16", "--python", shutil.which("false"))
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.splitlines()[-1] == f"benchmark.py: error: {OURS} at 1x16: {missing}"
    assert "Traceback" not in finished.stderr
