"""The benchmarks' arithmetic, and runs of them without peers: of the CPU programs, and of the GPU's on a stand-in for a GPU.

No test here asserts anything about time.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest

DEV = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(DEV))

import benchmark
import benchmark_generate
import kernels_gpu
import train_gpt2
import train_gpt2_gpu
from benchmark import (
    OURS, OURS_INT8, OURS_TF32, PROGRAMS, TIMES_MOVED, Peers, Program, Shape, bytes_moved, summarize, take_turns, time_kernels,
    time_launches)
from benchmark_generate import GGUF_NAMES, seconds_until, time_generation, write_gguf, write_model
from model_files import load_model
from cuda_on_cpu import CpuDevice
from device import open_device
from launcher import parse_signatures
from cli import UserError
from generate_gpt2 import Decoder, quantize
from gpt2 import Config, Tensors, parameter_shapes, training_flops

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


def run(*flags, script="benchmark.py"):
    return subprocess.run([sys.executable, DEV / script, *map(str, flags)], capture_output=True, text=True)


@pytest.fixture
def python_without_modules(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    return python


def test_without_pytorch_it_measures_the_program_alone(tmp_path, python_without_modules):
    python, chart = python_without_modules, tmp_path / "chart.png"
    finished = run("--model", "d2", "--shapes", "1x16", "2x16", "--rounds", 1, "--steps", 1,
                   "--python", python, "--output", chart)
    assert finished.returncode == 0, finished.stderr
    assert f"no torch in {python}: measuring without; pip install torch" in finished.stderr
    for shape in ("1x16", "2x16"):
        assert f"| {shape}  | {OURS}" in finished.stdout
        assert f"kernel at {shape}" in finished.stdout
    assert not any(name in finished.stdout for name in PROGRAMS["cpu"] if name != OURS)
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script, flags", [
    ("benchmark.py", ("--shapes", "4x")), ("benchmark.py", ("--shapes", "1x2048")), ("benchmark.py", ("--device", "gpu")),
    ("benchmark.py", ("--python", "/no/such/python")), ("benchmark.py", ("--rounds", "0")),
    ("benchmark_generate.py", ("--llama-python", "/no/such/python")), ("benchmark_generate.py", ("--model", "d3"))])
def test_a_mistake_on_the_command_line_is_one_line(script, flags):
    finished = run(*flags, script=script)
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
    options = SimpleNamespace(device="cuda", model="d2", steps=3, rounds=2, threads=1)
    peers = {"torch": Peers("python", "--python", "torch")}
    results = benchmark.measure_shape(Shape(1, 16), options, PROGRAMS["cuda"], peers)
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


# Generating text

def result(seconds, prompt_seconds=1.0, first_token=1.0, logits=(3.0, 4.0), peak_memory=0):
    return dict(seconds=[seconds], prompt_seconds=[prompt_seconds], first_token=first_token, logits=list(logits),
                peak_memory=peak_memory, busy_cores=0)


def test_a_variant_that_fails_leaves_the_others(capsys):
    def measure(python, name, variant):
        if variant.get("attention") == "flash":
            raise UserError("no flash attention")
        return result(dict(plain=3.0, sparse=2.0).get(variant.get("attention"), 1.0))

    programs = {OURS: Program(None), "peer": Program(None, "module", tuple(
        {"attention": attention} for attention in ("flash", "plain", "sparse")))}
    results = take_turns(programs, {"module": Peers("python", "--python", "package")}, 2, measure, lambda label, result: label)
    assert {name: len(rounds) for name, rounds in results.items()} == {OURS: 2, "peer, sparse": 2}
    assert "left out: no flash attention" in capsys.readouterr().err


def test_speeds_and_ratios_of_generation():
    """Rates are those of the median times; a ratio is the median over rounds, with ours of the same weights."""
    summary = benchmark_generate.summarize({
        OURS: [result(0.1, 2.0, 1.0, peak_memory=1), result(0.2, 4.0, 3.0), result(0.1, 2.0, 2.0)],
        "transformers": [result(0.3, 1.0, 5.0), result(0.4, 2.0, 9.0, peak_memory=2), result(0.4, 3.0, 8.0)],
        OURS_INT8: 3 * [result(0.05, 8.0, 1.0)],
        "llama.cpp q8_0, plain": 3 * [result(0.04, 4.0, 0.5)]})
    ratios = [row[1::2] for row in summary.values()]
    assert np.array(ratios) == pytest.approx(np.array([(1, 1, 1), (3, 0.5, 4), (1, 1, 1), (0.8, 0.5, 0.5)]))
    assert summary["transformers"][::2] == (2.5, 256, 8.0, 2)
    assert summary[OURS][::2] == (10, 256, 2.0, 1)
    assert summary[OURS_INT8].decoding == 20


@pytest.mark.parametrize("logits, left_out", [
    ((3.0, 4.001), False), ((3.0, 4.1), True), ((np.nan, 4.0), True), ((np.inf, 4.0), True)])
def test_who_computes_something_else_is_left_out(monkeypatch, capsys, logits, left_out):
    def run_task(python, task, script):
        return result(1.0, logits=logits if task["program"] == "transformers" else (3.0, 4.0))

    monkeypatch.setattr(benchmark_generate, "run_task", run_task)
    monkeypatch.setattr(benchmark_generate, "seconds_until", lambda command, size: 1.0)
    programs = {name: benchmark_generate.PROGRAMS[name] for name in (OURS, "transformers")}
    peers = {"torch, transformers": Peers("python", "--python", "torch transformers")}
    results = benchmark_generate.measure_all(programs, peers, SimpleNamespace(threads=1, rounds=1), "folder")
    assert ("transformers" not in results) == left_out
    assert ("left out: transformers: its logits differ from ours" in capsys.readouterr().err) == left_out


def test_generation_that_is_timed_is_greedy_and_token_by_token():
    class Counter:
        """Each token is followed by the next number."""

        def __init__(self):
            self.texts = [[]]

        def read(self, tokens):
            self.texts[-1].append(list(tokens))
            return np.eye(1, 60_000, tokens[-1] + 1, dtype=np.float32)[0]

        def forget(self):
            self.texts.append([])

    model = Counter()
    timed = time_generation(model)
    *prompts, decoded = model.texts
    prompt = prompts[0][0]
    assert len(prompt) == 512 and prompts == len(prompts) * [[prompt]]
    assert len(timed["prompt_seconds"]) == len(prompts) - 1
    first = prompt[15] + 1
    assert decoded == [prompt[:16]] + [[token] for token in range(first, first + 128)]
    assert len(timed["seconds"]) == 128
    assert timed["logits"] == np.eye(1, 60_000, prompt[-1] + 1)[0, ::100].tolist()


def test_our_programs_read_the_model_that_all_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.model_config", lambda name: TINY)
    write_model(dict(model="tiny", folder=tmp_path))
    config, params = load_model(tmp_path / "model")
    threads = numba.get_num_threads()
    for name, weights in ((OURS, params), (OURS_INT8, quantize(config, params))):
        model = benchmark_generate.PROGRAMS[name].measure(dict(folder=tmp_path, threads=threads))
        model.read([8, 9])
        model.forget()
        model.read([5, 6])
        assert model.read([7]) == pytest.approx(Decoder(config, weights, 1, threads).next_logits([[5, 6, 7]])[0], rel=1e-4)


def test_seconds_until_a_program_has_written_something():
    command = [sys.executable, "-c", "import sys; sys.stdout.write('text'); sys.exit(int(sys.argv[1]))"]
    assert seconds_until([*command, "0"], 4) > 0
    with pytest.raises(UserError, match="ended with status 0 after 4 bytes"):
        seconds_until([*command, "0"], 5)
    with pytest.raises(UserError, match="ended with status 3"):
        seconds_until([*command, "3"], 4)


def test_every_parameter_goes_into_a_gguf_file():
    assert list(GGUF_NAMES) == list(parameter_shapes(TINY))


def test_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    words = [f"w{i}" for i in range(TINY.vocab_size - 1)] + ["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in reversed(list(enumerate(words)))}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nw 0\nw 1\n")
    params = Tensors(parameter_shapes(TINY))
    params.flat[:] = np.random.default_rng(0).standard_normal(params.size)
    write_gguf(tmp_path / "model.gguf", TINY, params, tmp_path)

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert {name.removeprefix("gpt2."): value for name, value in fields.items() if name.startswith("gpt2.")} == {
        "block_count": 2, "context_length": 16, "embedding_length": 32, "feed_forward_length": 128, "attention.head_count": 2,
        "attention.layer_norm_epsilon": pytest.approx(1e-5)}
    assert fields["tokenizer.ggml.tokens"] == words
    assert fields["tokenizer.ggml.merges"] == ["w 0", "w 1"]
    assert fields["tokenizer.ggml.eos_token_id"] == TINY.vocab_size - 1
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 4 + 12 * TINY.num_layers
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert np.array_equal(tensors["token_embd.weight"], params.wte[:TINY.vocab_size])
    assert np.array_equal(tensors["position_embd.weight"], params.wpe)
    assert np.array_equal(tensors["output_norm.bias"], params.lnfb)
    for l in range(TINY.num_layers):
        assert np.array_equal(tensors[f"blk.{l}.attn_qkv.weight"], params.qkvw[l])
        assert np.array_equal(tensors[f"blk.{l}.ffn_down.weight"], params.fcprojw[l])
        assert np.array_equal(tensors[f"blk.{l}.ffn_norm.bias"], params.ln2b[l])


def test_without_peers_it_measures_our_generation_alone(tmp_path, python_without_modules):
    python, chart = python_without_modules, tmp_path / "chart.png"
    finished = run("--model", "d2", "--rounds", 2, "--python", python, "--output", chart, script="benchmark_generate.py")
    assert finished.returncode == 0, finished.stderr
    assert f"no torch and transformers in {python}" in finished.stderr
    assert f"no llama_cpp and gguf in {python}: measuring without; pip install llama-cpp-python gguf" in finished.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in finished.stdout.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == [OURS, OURS_INT8]
    for row in rows[2:]:
        assert row[2::2][:3] == ["1.00", "1.00", "1.00"]
        assert float(row[1].replace(",", "")) > 0 and float(row[3].replace(",", "")) > 0 and row[7].endswith("GB")
    assert chart.read_bytes().startswith(b"\x89PNG")
