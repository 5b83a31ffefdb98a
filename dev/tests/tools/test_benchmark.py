"""The benchmarks: their arithmetic, and runs without peers, on the CPU and on a stand-in for a GPU. No test asserts a time."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest

import kernels_gpu
import llama
import train_gpt2
import train_gpt2_gpu
import train_llama
from cli import UserError
from cuda_on_cpu import CpuDevice
from dev import benchmark, benchmark_generate
from dev.benchmark import OURS, OURS_BF16, OURS_INT4, OURS_INT8, OURS_TF32, PROGRAMS, Peers, Program, Shape
from dev.benchmark_generate import OUR_FILES, TASKS, seconds_until, time_generation, write_model
from device import open_device
from generate_gpt2 import BITS, prompt_dtype, weight_kinds
from gpt2 import Config, training_flops
from launcher import C_TYPES, FLOATS, parse_signatures
from model_files import load_model, load_model_tokenizer

DEV = Path(__file__).resolve().parents[2]
TINY = Config(max_seq_len=16, vocab_size=120, padded_vocab_size=128, num_layers=2, num_heads=2, channels=32)
TINY_LLAMA = llama.Config(max_seq_len=16, vocab_size=120, padded_vocab_size=128, num_layers=2, num_heads=6, num_key_heads=2,
                          head_size=4, channels=32, hidden=40)


@pytest.mark.parametrize("model_class, config", [(train_gpt2.GPT2, TINY), (train_llama.Llama, TINY_LLAMA)])
def test_flops_of_the_kernels_add_up_to_the_flops_of_a_step(model_class, config):
    """Counted call by call from the shapes of the arguments, and by formula."""
    model = model_class(config, batch_size=3, sequence_length=10, threads=1)
    tokens = np.ones((3, 10), dtype=np.int32)
    with benchmark.timing_kernels() as calls:
        model.forward(tokens)
        model.backward(tokens)
    assert sum(call.flops for call in calls) == sum(benchmark.step_flops(config, Shape(3, 10)))
    assert {"encoder_forward", "attention_backward"} <= {call.name for call in calls}


def test_summary():
    """Times and ratios are medians; TF32 programs are compared with ours in TF32."""
    def rounds(*seconds):
        return [dict(seconds=[value], peak_memory=memory) for memory, value in enumerate(seconds)]
    summary = benchmark.summarize({OURS: rounds(1.0, 10.0, 2.0), "peer": rounds(2.0, 20.0, 6.0),
                         OURS_TF32: rounds(0.5, 0.5, 0.5), "peer tf32": rounds(2.0, 2.0, 2.0)})
    assert summary == {OURS: (2000, 1, 2), "peer": (6000, 2, 2), OURS_TF32: (500, 1, 2), "peer tf32": (2000, 4, 2)}


def run(script, *flags):
    return subprocess.run([sys.executable, DEV / script, *map(str, flags)], capture_output=True, text=True)


def rows_of(output):
    """The cells of all tables in the output, row by row."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]


def test_without_pytorch_it_measures_our_step_alone(tmp_path):
    chart = tmp_path / "chart.png"
    finished = run("benchmark.py", "--model", "d2", "--shapes", "1x16", "--rounds", 1, "--steps", 1,
                   "--python", shutil.which("false"), "--output", chart)
    assert finished.returncode == 0, finished.stderr
    assert "no torch in " in finished.stderr and "pip install torch" in finished.stderr
    assert ["1x16", OURS] in [row[:2] for row in rows_of(finished.stdout)] and "PyTorch" not in finished.stdout
    assert "kernel at 1x16" in finished.stdout and chart.read_bytes().startswith(b"\x89PNG")


def test_without_pytorch_it_measures_our_llama_alone(monkeypatch, capsys, tmp_path):
    """A tiny one, in this process; results still pass through JSON."""
    def run_task(python, task):
        return json.loads(json.dumps(PROGRAMS[task["device"]][task["program"]].measure(task)))

    monkeypatch.setattr(benchmark, "run_task", run_task)
    monkeypatch.setattr(benchmark, "config_of", lambda model: TINY_LLAMA)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--model", "smollm2", "--shapes", "2x16", "--rounds", "1", "--steps", "1",
                                      "--python", shutil.which("false"), "--output", str(tmp_path / "chart.png")])
    benchmark.main()
    output, errors = capsys.readouterr()
    assert "no torch and transformers in" in errors and output.startswith("SmolLM2-135M, training steps.")
    table = rows_of(output)
    assert [row[1] for row in table if row[0] == "2x16" and len(row) == 6 and "by-hand" in row[1]] == [OURS, OURS_BF16]
    assert "6 N (L C (2 (NH + KV) HS + 3 H) + Vp C)" in output
    assert [row[1] for row in table if row[0] == "rmsnorm_backward"] == 2 * [str(2 * TINY_LLAMA.num_layers + 1)]


@pytest.mark.parametrize("script, flags", [
    ("benchmark.py", ("--model", "smollm2", "--device", "cuda")), ("benchmark.py", ("--shapes", "1x1025")),
    ("benchmark.py", ("--shapes", "4x")), ("benchmark.py", ("--python", "/no/such/python")),
    ("benchmark.py", ("--dtypes", "tf32")), ("benchmark_attention.py", ("--sizes", "4x12")),
    ("benchmark_generate.py", ("--llama-python", "/no/such/python"))])
def test_a_mistake_on_the_command_line_is_one_line(script, flags):
    finished = run(script, *flags)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and flags[0] in finished.stderr


# On a GPU

@pytest.fixture
def stand_in(monkeypatch):
    """The CPU in the role of this machine's GPU: a function that replaces open_device."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the CUDA source with")

    def open_device(name, dtype):
        device = CpuDevice(dtype.replace("tf32", "float32"))
        pool = SimpleNamespace(total_bytes=lambda: 3_210_000_000)
        device.cupy = SimpleNamespace(get_default_memory_pool=lambda: pool, __version__="0.0")
        device.peak_flops = lambda: 1e9
        return device

    monkeypatch.setattr("device.open_device", open_device)
    return open_device


def step(device, config=TINY):
    """One training step of a tiny model on the device. Returns the parameters."""
    model = train_gpt2_gpu.GPT2(config, 3, 10, device)
    model.initialize(seed=1)
    generator = np.random.default_rng(0)
    inputs, targets = (device.to_device(generator.integers(120, size=(3, 10), dtype=np.int32)) for _ in range(2))
    model.forward(inputs)
    model.backward(targets)
    model.update(1, 1e-3, 0.1, model.gradient_norm(), 1.0)
    return model.params.flat


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_launch_and_product_is_timed_and_the_results_stay_the_same(stand_in, dtype):
    device = stand_in("cuda", dtype)
    untimed = step(device)
    launched, launch = [], device.launch

    def noted(name, *arguments, **options):
        launched.append(name)
        launch(name, *arguments, **options)

    device.launch = noted
    with benchmark.timing_launches(device) as calls:
        assert (step(device) == untimed).all()
    assert [call.name for call in calls if not call.flops] == [name for name in launched if name != "spin"]
    # On a GPU, attention makes seven products of whole (T, T) matrices; the formula counts six of their lower halves.
    (linear, _), T = training_flops(TINY, 3, 10), 10
    assert sum(call.flops for call in calls) == linear + TINY.num_layers * 7 * 2 * 3 * T * T * TINY.channels
    assert all((call.nbytes > 0) == (call.flops == 0) for call in calls)
    timed, spins = len(calls), launched.count("spin")
    step(device)
    assert len(calls) == timed and launched.count("spin") == spins, "a launch after the end was timed"


def test_kernels_are_not_timed_in_a_graph(stand_in):
    """A step launches graphs; while its kernels are timed, it calls the work. Afterward it launches graphs again."""
    device, replayed = stand_in("cuda", "float32"), []
    device.replay = lambda graphs, key, work: replayed.append(key) or work()
    with benchmark.timing_launches(device):
        step(device)
    assert not replayed
    step(device)
    assert len(replayed) == 2     # forward and backward


def test_flash_attention_counts_two_products_forward_and_five_backward(stand_in):
    """Over the scores that the causal mask keeps. The formula for a step counts six: without the scores computed again."""
    device, config = stand_in("cuda", "bfloat16"), replace(TINY, channels=128)
    with benchmark.timing_launches(device) as calls:
        step(device, config)
    linear, attention = training_flops(config, 3, 10)
    flops = {name: sum(call.flops for call in calls if call.name.startswith(name)) for name in
             ("gemm", "attention_forward", "attention_backward")}
    assert flops == {"gemm": linear, "attention_forward": attention * 2 / 6, "attention_backward": attention * 5 / 6}


def test_every_exception_to_bytes_moved_is_an_array_of_a_kernel():
    kernels = parse_signatures("\n".join(kernels_gpu.SOURCES))
    for name, arrays in benchmark.TIMES_MOVED.items():
        assert arrays.keys() <= {array.name for _, array in kernels[name].arrays}, name
    assert benchmark.FLASH_PRODUCTS.keys() == {name for name in kernels if name.startswith("flash")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_moved(dtype):
    """Activations and the weights of products have 2 bytes in bfloat16; statistics, gradients and moments always have 4."""
    kernels = parse_signatures("\n".join(kernels_gpu.SOURCES), FLOATS[dtype])
    Float = C_TYPES[FLOATS[dtype]]
    nbytes = Float.itemsize

    def moved(name, *arguments):
        return benchmark.bytes_moved(kernels[name], arguments)

    def floats(*shape):
        return np.empty(shape, dtype=np.float32)

    def acts(*shape):
        return np.empty(shape, dtype=Float)

    N, T, C, Vp, maxT, blocks = 6, 3, 5, 40, 20, 2
    tokens = np.empty(N, dtype=np.int32)
    for position in np.empty(0, dtype=np.int32), np.empty(1, dtype=np.int32):
        assert moved("encoder_forward", acts(N, C), tokens, acts(Vp, C), acts(maxT, C), position, N, T, C, Vp, maxT
                     ) == pytest.approx(4 * N + 4 * len(position) + nbytes * (N * C + N * C + T * C))
    assert moved("column_sums", floats(1, C), acts(N, C), 1, N, C, 0) == 4 * C + nbytes * N * C
    assert moved("column_sums", floats(1, C), acts(N, C), 1, N, C, 1) == 4 * 2 * C + nbytes * N * C
    assert moved("layernorm_backward", acts(N, C), floats(blocks, C), floats(blocks, C), acts(N, C), floats(N), floats(N),
                 acts(N, C), floats(C), N, C, blocks) == nbytes * 4 * N * C + 4 * (2 * blocks * C + 2 * N + C)
    weights = acts(7 if dtype == "bfloat16" else 0)
    assert moved("adamw_update", *(floats(7) for _ in range(4)), weights, floats(1), *(9 * [0.0]), 7) == (
        4 * (8 * 7 + 1) + weights.nbytes)


@pytest.mark.parametrize("flags, programs", [([], [OURS, OURS_TF32, OURS_BF16]), (["--dtypes", "bfloat16"], [OURS_BF16])])
def test_a_whole_run_on_the_stand_in(stand_in, monkeypatch, capsys, tmp_path, flags, programs):
    """Tasks run in this process, which has the stand-in; their results still pass through JSON."""
    def run_task(python, task):
        return json.loads(json.dumps(PROGRAMS[task["device"]][task["program"]].measure(task)))

    monkeypatch.setattr(benchmark, "run_task", run_task)
    monkeypatch.setattr("gpt2.model_config", lambda name: TINY)
    monkeypatch.setitem(benchmark.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setattr(benchmark, "COPIED_FLOATS", 1000)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", "--shapes", "2x16", "--rounds", "2", "--steps", "3",
                                      "--python", shutil.which("false"), "--output", str(tmp_path / "chart.png"), *flags])
    benchmark.main()
    output = capsys.readouterr().out
    table = rows_of(output)
    steps = [row for row in table if row[:2] in [["2x16", name] for name in programs]]
    assert [(row[1], row[3], row[5]) for row in steps] == [(name, "1.00", "3.21 GB") for name in programs]
    for row in steps:
        assert float(row[6].rstrip("%")) == pytest.approx(
            100 * sum(training_flops(TINY, 2, 16)) / 1e9 / (float(row[2].replace(",", "")) / 1000), rel=0.1)
    headers = [row for row in table if row[0].startswith("kernel at")]
    headings = {OURS: "kernel at 2x16", OURS_TF32: "kernel at 2x16, tf32", OURS_BF16: "kernel at 2x16, bfloat16"}
    assert [row[0] for row in headers] == [headings[name] for name in programs]
    calls = {row[0]: row[1:] for row in table[table.index(headers[-1]):]}
    assert calls["layernorm_backward"][0] == str(2 * TINY.num_layers + 1) and calls["layernorm_backward"][5].endswith("%")
    assert calls["gemm, 32 x 96 x 32"][0] == str(TINY.num_layers) and calls["gemm, 32 x 96 x 32"][5].endswith("%")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_when_a_program_of_ours_fails_its_peers_are_left_out(monkeypatch, capsys):
    """A GPU without TF32 and bfloat16 still has its float32 programs measured."""
    def run_task(python, task):
        if task["program"] in (OURS_TF32, OURS_BF16):
            raise UserError("needs a GPU of compute capability 8.0")
        return dict(seconds=[1.0], loss=1.0, busy_cores=0)

    monkeypatch.setattr(benchmark, "run_task", run_task)
    options = SimpleNamespace(device="cuda", model="d2", steps=3, rounds=2, threads=1)
    peers = {"torch": Peers("python", "--python", "torch")}
    results = benchmark.measure_shape(Shape(1, 16), options, PROGRAMS["cuda"], peers)
    assert {name: len(rounds) for name, rounds in results.items()} == {
        OURS: 2, "PyTorch eager, plain": 2, "PyTorch compile, plain": 2}
    assert capsys.readouterr().err.count("left out: needs a GPU of compute capability 8.0") == 2


def test_without_a_gpu_one_line_says_what_is_missing():
    try:
        open_device("cuda", "float32")
    except UserError as error:
        missing = str(error)
    else:
        pytest.skip("there is a GPU")
    finished = run("benchmark.py", "--device", "cuda", "--model", "d2", "--shapes", "1x16", "--python", shutil.which("false"))
    assert finished.returncode == 1 and finished.stdout == "" and "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1] == f"benchmark.py: error: {OURS} at 1x16: {missing}"


# Generating text

def result(seconds, prompt_seconds=1.0, first_token=1.0, logits=(3.0, 4.0), peak_memory=0):
    return dict(seconds=[seconds], prompt_seconds=[prompt_seconds], first_token=first_token, logits=list(logits),
                peak_memory=peak_memory, busy_cores=0)


def test_the_fastest_variant_that_works_is_kept(capsys):
    def measure(python, name, variant):
        if variant.get("attention") == "flash":
            raise UserError("no flash attention")
        return result(dict(plain=3.0, sparse=2.0).get(variant.get("attention"), 1.0))

    programs = {OURS: Program(None), "peer": Program(None, "module", tuple(
        {"attention": attention} for attention in ("flash", "plain", "sparse")))}
    peers = {"module": Peers("python", "--python", "package")}
    results = benchmark.take_turns(programs, peers, 2, measure, lambda label, result: label)
    assert {name: len(rounds) for name, rounds in results.items()} == {OURS: 2, "peer, sparse": 2}
    assert "left out: no flash attention" in capsys.readouterr().err


def test_speeds_and_ratios_of_generation():
    """Speeds come from median times; a ratio is the median over the rounds, with ours of the same weights."""
    summary = benchmark_generate.summarize({
        OURS: [result(0.1, 2.0, 1.0, peak_memory=1), result(0.2, 4.0, 3.0), result(0.1, 2.0, 2.0)],
        "transformers": [result(0.3, 1.0, 5.0), result(0.4, 2.0, 9.0, peak_memory=2), result(0.4, 3.0, 8.0)],
        OURS_INT8: 3 * [result(0.05, 8.0, 1.0)],
        "llama.cpp q8_0, plain": 3 * [result(0.04, 4.0, 0.5)]})
    ratios = [row[1::2] for row in summary.values()]
    assert np.array(ratios) == pytest.approx(np.array([(1, 1, 1), (3, 0.5, 4), (1, 1, 1), (0.8, 0.5, 0.5)]))
    assert summary["transformers"][::2] == (2.5, 256, 8.0, 2)


@pytest.mark.parametrize("logits, left_out", [((3.0, 4.001), False), ((3.0, 4.1), True), ((np.nan, 4.0), True)])
def test_a_peer_with_other_logits_is_left_out(monkeypatch, capsys, logits, left_out):
    def run_task(python, task, script):
        return result(1.0, logits=logits if task["program"] == "transformers" else (3.0, 4.0))

    monkeypatch.setattr(benchmark_generate, "run_task", run_task)
    monkeypatch.setattr(benchmark_generate, "seconds_until", lambda command, size: 1.0)
    programs = {name: benchmark_generate.PROGRAMS[name] for name in (OURS, "transformers")}
    peers = {"torch, transformers": Peers("python", "--python", "torch transformers")}
    options = SimpleNamespace(model="d2", threads=1, rounds=1)
    results = benchmark_generate.measure_all(programs, peers, options, "folder")
    assert ("transformers" not in results) == left_out
    assert ("left out: transformers: its logits differ from ours" in capsys.readouterr().err) == left_out


def test_timed_generation_is_greedy_and_token_by_token():
    class Counter:
        """A model in which each token is followed by the next number."""

        def __init__(self):
            self.texts = [[]]

        def read(self, tokens):
            self.texts[-1].append(list(tokens))
            return np.eye(1, 60_000, tokens[-1] + 1, dtype=np.float32)[0]

        def forget(self):
            self.texts.append([])

    model = Counter()
    timed = time_generation(model, vocab_size=50_000)
    *prompts, decoded = model.texts
    prompt = prompts[0][0]
    assert len(prompt) == 512 and max(prompt) < 50_000
    assert prompts == len(prompts) * [[prompt]] and len(timed["prompt_seconds"]) == len(prompts) - 1
    first = prompt[15] + 1
    assert decoded == [prompt[:16]] + [[token] for token in range(first, first + 128)] and len(timed["seconds"]) == 128


LLAMA_TO_READ = llama.Config(max_seq_len=16, vocab_size=320, padded_vocab_size=384, num_layers=2, num_heads=4, num_key_heads=2,
                             head_size=16, channels=64, hidden=96)


@pytest.mark.parametrize("config, programs", [
    (replace(TINY, vocab_size=50257, padded_vocab_size=50304), [OURS, OURS_INT8, OURS_INT4]),
    (LLAMA_TO_READ, [OURS, OURS_BF16, OURS_INT8, OURS_INT4])])
def test_our_programs_read_the_model_that_all_read(tmp_path, monkeypatch, config, programs):
    monkeypatch.setattr(benchmark, "config_of", lambda model: config)
    write_model(dict(model="tiny", folder=tmp_path))
    config, params = load_model(tmp_path / "model")
    assert (load_model(tmp_path / "model-f32.gguf")[1].flat == params.flat).all()
    for file in "model", "model-q8_0.gguf":
        tokenizer = load_model_tokenizer(tmp_path / file, config.vocab_size)
        assert tokenizer.vocab_size == config.vocab_size and tokenizer.end_tokens == [config.vocab_size - 1]
        assert tokenizer.decode(tokenizer.encode("The first citizen: 漢字")) == "The first citizen: 漢字"
    threads = numba.get_num_threads()
    assert [name for name in benchmark_generate.programs_for("tiny") if benchmark.is_ours(name)] == programs
    for name in programs:
        weights = load_model(tmp_path / OUR_FILES[name], BITS)[1]
        model = benchmark_generate.PROGRAMS[name].measure(dict(program=name, folder=tmp_path, threads=threads))
        model.read([8, 9])
        model.forget()
        model.read([5, 6])
        decoder = type(model.decoder)(config, weights, 1, threads, prompt_dtype(weight_kinds(weights)))
        together = decoder.next_logits([[5, 6, 7]])[0]
        bound = 1e-4 if name == OURS else 1e-2      # attention of several tokens is in bfloat16
        assert np.linalg.norm(model.read([7]) - together) <= bound * np.linalg.norm(together)


def test_seconds_until_a_program_has_written_something():
    command = [sys.executable, "-c", "import sys; sys.stdout.write('text'); sys.exit(int(sys.argv[1]))"]
    assert seconds_until([*command, "0"], 4) > 0
    with pytest.raises(UserError, match="status 0 after 4 bytes"):
        seconds_until([*command, "0"], 5)
    with pytest.raises(UserError, match="status 3"):
        seconds_until([*command, "3"], 4)


def test_without_peers_it_measures_our_generation_alone(tmp_path):
    chart = tmp_path / "chart.png"
    finished = run("benchmark_generate.py", "--model", "d2", "--rounds", 1,
                   "--python", shutil.which("false"), "--output", chart)
    assert finished.returncode == 0, finished.stderr
    assert "no torch and transformers in" in finished.stderr and "no llama_cpp in" in finished.stderr
    rows = rows_of(finished.stdout)[2:]
    assert [row[0] for row in rows] == [OURS, OURS_INT8, OURS_INT4]
    assert all(row[2::2][:3] == ["1.00", "1.00", "1.00"] for row in rows)
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_without_peers_it_measures_our_llamas_generation_alone(monkeypatch, capsys, tmp_path):
    """A tiny one, in this process, except that a command writes the first token; results still pass through JSON."""
    def run_task(python, task, script):
        return json.loads(json.dumps(TASKS[task["work"]](task)))

    monkeypatch.setattr(benchmark_generate, "run_task", run_task)
    monkeypatch.setattr(benchmark, "config_of", lambda model: LLAMA_TO_READ)
    chart, threads = tmp_path / "chart.png", numba.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmark_generate.py", "--model", "smollm2", "--rounds", "1", "--threads", str(threads),
                                      "--python", shutil.which("false"), "--output", str(chart)])
    benchmark_generate.main()
    output = capsys.readouterr().out
    assert output.startswith("SmolLM2-135M, text.") and chart.exists()
    assert [row[0] for row in rows_of(output)[2:]] == [OURS, OURS_BF16, OURS_INT8, OURS_INT4]
