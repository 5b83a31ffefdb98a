"""Time a training step of this program and of PyTorch, side by side, on this machine (Linux or macOS).

    python dev/benchmark.py                                            d12, at B x T = 4x64 and 1x1024
    python dev/benchmark.py --python ~/torch/bin/python                with the PyTorch of another environment
    python dev/benchmark.py --shapes 4x64 1x1024 4x1024 --rounds 5
    python dev/benchmark.py --model smollm2                            Llama with the sizes of SmolLM2-135M, at 4x256
    python dev/benchmark.py --device cuda                              train_gpt2_gpu.py on a GPU, at 4x1024
    python dev/benchmark.py --device cuda --dtypes tf32 bfloat16       without the programs in float32

The last two need a GPU, CuPy (requirements-gpu.txt) and PyTorch for CUDA. benchmark_generate.py measures text generation,
benchmark_attention.py attention on a GPU alone.

What is timed
    A whole step: forward, backward, gradient clipping at norm 1, AdamW, and the loss. Ours is the loop of train_gpt2.py itself.
    PyTorch's is the GPT-2 of reference_pytorch.py with the unpadded vocabulary, GPT-2's initialization and fused AdamW; its
    Llama is that of transformers. All programs get the same random tokens and the same number of threads.

How
    Each program runs in its own process, so that no thread pool or allocator affects another. The programs take turns for
    several rounds, so that a slow minute of the machine hits all of them. The first steps, which compile, are not counted. A
    time is the median over all steps; a ratio is the median over the rounds of the ratio of that round's medians. PyTorch's
    attention, written out ("plain"; transformers calls it "eager") or by scaled_dot_product_attention ("sdpa"), runs both ways
    in the first round; each program keeps the faster one.

On a GPU (--device cuda)
    Each program runs with float32, TF32 and bfloat16 products, and is compared with ours of the same kind; kinds that the GPU
    does not have are left out. PyTorch in bfloat16 is what most people train with: autocast, torch.compile, and its flash
    attention ("sdpa"). Times are those of CUDA events, from before a batch is copied to the GPU until the last kernel has
    finished. PyTorch's vocabulary is padded like ours: with 50,257 its products would be slower. Memory is that of arrays: for
    PyTorch its peak, for ours all that CuPy's pool holds, which is at least the peak. MFU, model FLOPs utilization, is the
    FLOPs of a step's matrix products divided by what the GPU could have computed in that time at its highest clock rate.

    Our steps launch CUDA graphs, as when training. Additional steps without graphs time our kernels one by one. A kernel's GB/s
    count the bytes it must move: each array once, or twice if it is read and written. They are compared with a copy of 1 GiB,
    counted the same way; an array that is still in the GPU's cache can be faster. A product's GFLOP/s, which include masked
    scores, are compared with a product of large matrices. So are those of flash attention, which count only scores that are
    kept, in two products forward and five backward. What is "between kernels" is the rest of a step with graphs. It is negative
    if kernels take longer one by one.
"""
# The measuring processes import NumPy, Numba and PyTorch themselves, for two reasons: PyTorch may be in another environment,
# and on Linux a process counts its parent's memory at the time it was started toward its own peak.
import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import pairwise
from math import inf, prod
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import OneLineParser, UserError, bounded, run_program
from dev import style

SEED = 1337
LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 1e-4, 0.1, 1.0
WARMUP_STEPS = 2          # the first compiles, or loads what was compiled before
MINIMUM_STEPS = 3
STEP_TOKENS = {"cpu": 256, "cuda": 4096}    # larger batches get fewer steps
PROFILED_STEPS = 3
MATRIX_SIZE = {"cpu": 3072, "cuda": 8192}   # of the products that measure the machine's rate
TILE_BYTES = 24 * 1024    # of both factors of a tile, less than a first-level cache
TILE_REPEATS = 20_000
COPIED_FLOATS = 2 ** 28   # of the copy that measures a GPU's memory
RATE_REPEATS = 5
SPIN_ROUNDS = 50_000      # about 0.1 ms on a GPU
QUIET_CORES = 0.2         # if other programs keep more cores busy, the report warns
MEASURE = "--measure"     # runs this file as a measuring process, with a task in JSON
SMOLLM2 = "smollm2"       # a --model: Llama with the sizes of SmolLM2-135M


class Shape(NamedTuple):
    batch_size: int
    sequence_length: int

    def __repr__(self):
        return f"{self.batch_size}x{self.sequence_length}"

    @property
    def tokens(self):
        return prod(self)


def config_of(model):
    """The gpt2.Config or llama.Config of a --model."""
    from gpt2 import model_config
    from llama import Config
    if model == SMOLLM2:
        return Config(max_seq_len=8192, vocab_size=49152, padded_vocab_size=49152, num_layers=30, num_heads=9, num_key_heads=3,
                      head_size=64, channels=576, hidden=1536, rope_base=1e5)
    return model_config(model)


def is_llama(config):
    from llama import Config
    return isinstance(config, Config)


def step_flops(config, shape):
    """gpt2.training_flops for either model."""
    from gpt2 import training_flops
    if not is_llama(config):
        return training_flops(config, *shape)
    L, C, T = config.num_layers, config.channels, shape.sequence_length
    weights = L * C * (config.qkv_channels + config.att_channels + 3 * config.hidden) + config.padded_vocab_size * C
    return 6 * shape.tokens * weights, 6 * L * config.att_channels * shape.tokens * (T + 1)


# ----------------------------------------------------------------------------------------------------------------------
# The measuring processes: a task {program, device, model, shape, threads, steps, and a variant's keys} -> a result for JSON

class RandomBatches:
    """Replaces a DataLoader: random tokens, the same for every program."""
    num_tokens = inf
    state = None

    def __init__(self, shape, vocab_size):
        self.batch_size, self.sequence_length = shape
        self.vocab_size = vocab_size
        self.reset()

    def reset(self):
        import numpy as np
        self.generator = np.random.default_rng(SEED)

    def next_batch(self):
        """Inputs (B, T) and targets (B, T), int32."""
        sequences = self.generator.integers(0, self.vocab_size, (self.batch_size, self.sequence_length + 1), dtype="int32")
        return sequences[:, :-1].copy(), sequences[:, 1:].copy()


class WallClock:
    """The clock of the CPU, with the interface of device.CudaDevice."""
    event = staticmethod(time.perf_counter)

    def seconds(self, start, stop):
        return stop - start


class TorchCudaClock:
    """The clock of PyTorch's CUDA stream, with the same interface."""

    def event(self):
        import torch
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, stop):
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


def typical_seconds(work, clock):
    """The median time of a few calls of `work`, without the first. Calls are queued, so that a GPU never waits for Python."""
    events = [clock.event()]
    for _ in range(1 + RATE_REPEATS):
        work()
        events.append(clock.event())
    return median(clock.seconds(*pair) for pair in list(pairwise(events))[1:])


def product_rate(multiply, n, clock):
    """FLOP/s of `multiply`, which multiplies two n x n matrices: an upper bound for smaller products."""
    return 2 * n ** 3 / typical_seconds(multiply, clock)


def peak_memory():
    """The peak memory of this process so far, in bytes."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class OtherPrograms:
    """How many cores other programs have kept busy since this was created. Linux only; elsewhere `cores()` is None.

    Programs that share their cores slow down unequally, because threads that wait for each other by spinning take time from
    the thread they wait for. With 1.0 of 2 cores taken, the ratio of the same two programs was 3.4; with 1.4 taken, 1.6.
    """

    def __init__(self):
        self.started = self.clocks()

    def clocks(self):
        """Seconds of wall time, of this process's CPU time, and of all CPU time, including time stolen from a virtual machine.
        """
        try:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except OSError:
            return None
        ticks = user + nice + system + irq + softirq + steal
        return time.perf_counter(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK")

    def cores(self):
        if self.started is None:
            return None
        wall, own, total = (now - then for now, then in zip(self.clocks(), self.started))
        return round(max(0.0, (total - own) / wall), 1)  # Linux counts the total in hundredths of a second


def versions(*packages):
    return {"python": platform.python_version()} | {package: importlib.metadata.version(package) for package in packages}


def measure_ours(task, dtype="float32"):
    """Time train_gpt2's own loop, then large matrix products, then each kernel in additional steps."""
    import numba

    import train_gpt2
    import train_llama

    numba.set_num_threads(task["threads"])
    config = config_of(task["model"])
    model_class = train_llama.Llama if is_llama(config) else train_gpt2.GPT2
    model = model_class(config, *task["shape"], task["threads"], dtype=dtype)
    train = our_training(model, RandomBatches(task["shape"], config.vocab_size), task)
    result = time_training(train, task) | dict(peak_memory=peak_memory(), versions=versions("numpy", "numba"))
    result["product_rate"] = our_product_rate(train_gpt2.kernels, task["threads"], dtype)
    result["tile_rate"] = our_tile_rate(task["threads"], dtype)
    with timing_kernels() as result["kernels"]:
        result["profiled_seconds"] = sum(train(PROFILED_STEPS)[0])
    return result


def measure_ours_on_gpu(task, dtype):
    """The same for train_gpt2_gpu, with matrix products in `dtype`. Measures the rates of this GPU as well."""
    import train_gpt2_gpu
    from device import open_device
    from gpt2 import model_config

    device = open_device(task["device"], dtype)

    def time_steps_and_kernels():   # a function, so that the model is freed before gpu_rates allocates its large arrays
        config = model_config(task["model"])
        model = train_gpt2_gpu.GPT2(config, *task["shape"], device)
        batches = train_gpt2_gpu.Prefetch(RandomBatches(task["shape"], config.vocab_size), device)
        train = our_training(model, batches, task)
        result = time_training(train, task)
        result["peak_memory"] = device.cupy.get_default_memory_pool().total_bytes()
        with timing_launches(device) as result["kernels"]:
            train(PROFILED_STEPS)
        result["profiled_seconds"] = PROFILED_STEPS * median(result["seconds"])    # the profiled steps wait between kernels
        return result

    result = time_steps_and_kernels() | gpu_rates(device)
    result["versions"] = versions("numpy") | {"cupy": device.cupy.__version__}
    return result | dict(gpu=device.name, peak_flops=device.peak_flops())


def our_training(model, batches, task):
    """A function train(steps) that runs train_gpt2's loop. It returns the seconds of each step and the last loss."""
    import gpt2
    import train_gpt2
    from training import Progress, StopRequest, parse_options

    model.initialize(SEED)
    B, T = task["shape"]
    flags = (f"--batch-size {B} --sequence-length {T} --learning-rate {LEARNING_RATE} --warmup-iters 0 --schedule constant "
             f"--weight-decay {WEIGHT_DECAY} --grad-clip {GRAD_CLIP} --val-loss-every 0 --sample-every 0 --checkpoint-every 0 "
             f"--output-dir {Path(tempfile.gettempdir(), 'gpt2-benchmark')}")      # nothing is written
    options = parse_options(gpt2, "CPU", flags.split())

    def train(steps):
        log = StepTimes()
        train_gpt2.train(model, options._replace(num_iterations=steps), batches, val_loader=None, examples=[],
                         tokenizer=None, log=log, progress=Progress(), stop=StopRequest(), saver=None)
        return log.seconds, log.loss

    return train


def time_training(train, task):
    """Time train(steps): the part of a result that all programs have."""
    train(WARMUP_STEPS)
    others = OtherPrograms()
    seconds, loss = train(task["steps"])
    return dict(seconds=seconds, loss=loss, busy_cores=others.cores())


class StepTimes:
    """Replaces the training loop's log, to keep the seconds of every step."""

    def __init__(self):
        self.seconds = []

    def step(self, step, loss, norm, rate, seconds):
        self.seconds.append(seconds)
        self.loss = loss


def attention_flops(B, T, C, products):
    """FLOPs of `products` (T, T) products in all heads of one layer. Only keys j <= i count, which the causal mask keeps."""
    return products * 2 * B * C * T * (T + 1) // 2


class Call(NamedTuple):
    """One kernel call."""
    name: str
    seconds: float
    flops: int = 0          # of matrix products
    nbytes: float = 0       # moved between a GPU and its memory


# FLOPs of one call, from its first arguments. Scores that attention_backward recomputes are not counted.
KERNEL_FLOPS = {
    "matmul_forward": lambda out, inp, *rest: 2 * out.size * inp.shape[1],
    "matmul_backward": lambda dinp, dweight, dbias, dout, *rest: 4 * dout.size * dinp.shape[1],
    "attention_forward": lambda out, lse, *rest: attention_flops(lse.shape[0], lse.shape[2], out.shape[1], 2),
    "attention_backward": lambda dqkv, dout, out, lse, *rest: attention_flops(lse.shape[0], lse.shape[2], out.shape[1], 4),
}


@contextlib.contextmanager
def timing_kernels():
    """Time every kernel call of a model on the CPU while this is entered. Yields the list of Calls, which grows."""
    from dev.recorder import watching
    calls = []

    def watch(kernel, *arguments):
        started = time.perf_counter()
        result = kernel(*arguments)
        seconds = time.perf_counter() - started
        flops = KERNEL_FLOPS.get(kernel.__name__, lambda *arguments: 0)
        calls.append(Call(kernel.__name__, seconds, flops(*arguments)))
        return result

    with watching(watch):
        yield calls


def our_product_rate(kernels, threads, dtype):
    import numpy as np
    generator = np.random.default_rng(SEED)
    n = MATRIX_SIZE["cpu"]
    inp, weight = (generator.standard_normal((n, n), dtype=np.float32) for _ in range(2))
    out, no_bias, workspace = np.zeros_like(inp), np.empty(0, dtype=np.float32), kernels.make_workspace(threads, dtype)
    return product_rate(lambda: kernels.matmul_forward(out, inp, weight, no_bias, workspace), n, WallClock())


def our_tile_rate(threads, dtype):
    """FLOP/s of single tiles, on all threads: the instructions alone, with all factors in the first-level cache."""
    import numpy as np
    from numba import njit, prange

    from matmul_cpu import LANES, WORDS, configure_tiles, multiply_tile, release_tiles, tile_shape

    @njit
    def shape_of(words):
        return tile_shape(words)

    @njit(parallel=True)
    def multiply_tiles(out, words, depth):
        for thread in prange(len(words)):
            factors = words[thread]
            _, rows, vectors, _ = tile_shape(factors)
            a, b = factors.ctypes.data, factors[depth * rows:].ctypes.data
            configure_tiles(factors)
            for _ in range(TILE_REPEATS):
                multiply_tile(factors, vectors, out[thread].ctypes.data, 4 * vectors * LANES, np.float32(1), np.float32(0), a,
                              4 * depth, rows, b, depth)
            release_tiles(factors)

    numbers, rows, vectors, _ = shape_of(np.empty(0, dtype=WORDS[dtype]))
    depth = TILE_BYTES // (4 * (rows + vectors * LANES)) // 16 * 16
    one = {"float32": 1, "bfloat16": 0x3f803f80}[dtype]     # not zeros, with which a processor may run faster
    words = np.full((threads, TILE_BYTES // 4), one, dtype=WORDS[dtype])
    out = np.zeros((threads, rows * vectors * LANES), dtype=np.float32)
    seconds = typical_seconds(lambda: multiply_tiles(out, words, depth), WallClock())
    return threads * TILE_REPEATS * 2 * rows * vectors * LANES * depth * numbers / seconds


SPIN = r"""
// One thread keeps the GPU busy, but not its memory, while Python prepares the launch to be timed. Otherwise the GPU could run
// out of work, and the time between the two events would be Python's.
extern "C" __global__ void spin(
    float* __restrict__ out,    // (1)
    int rounds)
{
    float x = 0;
    for (int i = 0; i < rounds; i++) x = 0.5f * x + 1;
    out[0] = x;
}
"""

# How often a launch moves the bytes of an array, if not once: a number, or a function of the arguments `a`.
TIMES_MOVED = {
    "column_sums": {"out": lambda a: 1 + a["accumulate"]},
    "column_sums_of_floats": {"out": lambda a: 1 + a["accumulate"]},
    "encoder_forward": {"wte": lambda a: a["N"] / a["Vp"], "wpe": lambda a: a["T"] / a["maxT"]},
    "encoder_backward_wte": {"dwte": lambda a: 2 * a["N"] / a["Vp"]},      # assuming that no token repeats
    "encoder_backward_wpe": {"dwpe": lambda a: 2 * a["T"] / a["maxT"]},
    "layernorm_backward": {"dinp": 2},
    "causal_softmax": {"scores": 1.5},                                     # read only up to the diagonal
    "causal_softmax_backward": {"scores": 1.5, "dscores": 1.5},
    "bias_gelu_forward": {"inp": 2},
    "bias_gelu_exact_forward": {"inp": 2},
    "fused_classifier": {"logits": 2},      # at least: a third time, if the L2 cache does not hold the row for the second read
    "adamw_update": {"params": 2, "grads": 2, "m": 2, "v": 2},
}


# The launches of flash attention -> the call that each is a part of, and how many of its (T, T) products count here. The last
# one computes the scores and their gradients once more, which does not count.
FLASH_PRODUCTS = {
    "flash_attention_forward": ("attention_forward", 2),
    "flash_attention_backward_q": ("attention_backward", 3),
    "flash_attention_backward_kv": ("attention_backward", 2),
}


def bytes_moved(kernel, arguments):
    """Bytes that a launch of a launcher.Kernel reads and writes."""
    a = dict(zip((parameter.name for parameter in kernel.parameters), arguments, strict=True))
    total = 0
    for _, array in kernel.arrays:
        times = TIMES_MOVED.get(kernel.name, {}).get(array.name, 1)
        total += a[array.name].nbytes * (times(a) if callable(times) else times)
    return total


@contextlib.contextmanager
def timing_launches(device):
    """Time every launch and product of the device while this is entered. Yields the list of Calls, filled at the end."""
    from gpt2 import CHANNELS_PER_HEAD
    timed, calls = [], []
    launch, gemm, replay = device.launch, device.gemm, device.replay
    device.load(["", SPIN])
    spun = device.empty(1)

    def time_one(name, flops, nbytes, start):
        launch("spin", 1, 1, spun, SPIN_ROUNDS)
        started = device.event()
        start()
        timed.append((name, started, device.event(), flops, nbytes))

    def timed_launch(kernel_name, grid, block, *arguments, **options):
        if kernel_name in FLASH_PRODUCTS:
            name, products = FLASH_PRODUCTS[kernel_name]
            B, NH, T = arguments[-3:]
            flops, nbytes = attention_flops(B, T, NH * CHANNELS_PER_HEAD, products), 0
        else:
            name, flops, nbytes = kernel_name, 0, bytes_moved(device.kernels[kernel_name], arguments)
        time_one(name, flops, nbytes, lambda: launch(kernel_name, grid, block, *arguments, **options))

    def timed_gemm(c, alpha, a, b, beta, *bias):
        (m, n), k = c.shape[-2:], a.shape[-1]
        batch = f"{len(c)} of " if c.ndim == 3 else ""
        time_one(f"gemm, {batch}{m} x {n} x {k}", 2 * c.size * k, 0, lambda: gemm(c, alpha, a, b, beta, *bias))

    device.launch, device.gemm = timed_launch, timed_gemm
    device.replay = lambda graphs, key, work: work()    # a CUDA graph would be one launch
    try:
        yield calls
    finally:
        device.launch, device.gemm, device.replay = launch, gemm, replay
    calls += [Call(name, device.seconds(started, stopped), flops, nbytes) for name, started, stopped, flops, nbytes in timed]


def gpu_rates(device):
    """This GPU's FLOP/s in a large product, of numbers like activations, and its bytes/s in a copy: reads and writes."""
    import numpy as np
    generator = np.random.default_rng(SEED)
    n = MATRIX_SIZE["cuda"]
    a, b = (device.to_device(generator.standard_normal((n, n), dtype=np.float32).astype(device.Float)) for _ in range(2))
    c = device.empty((n, n), device.Float)
    source, copy = device.zeros(COPIED_FLOATS), device.empty(COPIED_FLOATS)
    copy_seconds = typical_seconds(lambda: np.copyto(copy, source), device)     # NumPy dispatches to CuPy
    return dict(product_rate=product_rate(lambda: device.gemm(c, 1.0, a, b, 0.0), n, device),
                copy_rate=2 * copy.nbytes / copy_seconds)


def pytorch_gpt2(config, attention, on_gpu):
    from dev.reference_pytorch import GPT2

    # `initialize` matters: with PyTorch's default N(0, 1) embedding, probabilities underflow to denormals and a step is six
    # times slower than in real training.
    return GPT2(config.max_seq_len, config.padded_vocab_size if on_gpu else config.vocab_size, config.num_layers,
                config.num_heads, config.channels, attention).initialize(SEED)


def transformers_llama(config, attention):
    """transformers' Llama, initialized as it does by default, with the loss and the optimizer of reference_pytorch.Model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dev.reference_pytorch import Model

    class Llama(Model):
        def __init__(self):
            super().__init__()
            self.llama = LlamaForCausalLM(LlamaConfig(
                max_position_embeddings=config.max_seq_len, vocab_size=config.vocab_size, num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads, num_key_value_heads=config.num_key_heads, head_dim=config.head_size,
                hidden_size=config.channels, intermediate_size=config.hidden, rms_norm_eps=config.epsilon,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_base}, tie_word_embeddings=config.tied,
                attention_bias=config.qkv_bias, attn_implementation="sdpa" if attention == "sdpa" else "eager"))

        def forward(self, tokens, targets):
            logits = self.llama(tokens, use_cache=False).logits     # (B,T,V)
            return self.cross_entropy(logits.flatten(0, 1), targets.flatten()).mean()

    torch.manual_seed(SEED)
    return Llama()


def measure_pytorch(task, compiled, bf16=False, tf32=False):
    """Time PyTorch's step. task["attention"] is "plain" or "sdpa"."""
    import torch

    torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    config = config_of(task["model"])
    on_gpu = task["device"] == "cuda"
    clock = TorchCudaClock() if on_gpu else WallClock()
    if is_llama(config):
        model, packages = transformers_llama(config, task["attention"]), ("torch", "transformers")
    else:
        model, packages = pytorch_gpt2(config, task["attention"], on_gpu), ("torch",)
    model.to(task["device"])
    optimizer = model.optimizer(LEARNING_RATE, WEIGHT_DECAY)
    forward = torch.compile(model) if compiled else model
    batches = RandomBatches(task["shape"], config.vocab_size)

    def upload(tokens):     # from pinned memory, so that Python need not wait for the copy
        tokens = torch.from_numpy(tokens)
        return (tokens.pin_memory() if on_gpu else tokens).to(task["device"], non_blocking=True).long()

    def train(steps):
        seconds = []
        for _ in range(steps):
            batch = batches.next_batch()
            started = clock.event()
            inputs, targets = map(upload, batch)
            with torch.autocast(task["device"], dtype=torch.bfloat16, enabled=bf16):
                loss = forward(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad()       # sets the gradients to None
            stopped = clock.event()
            loss = loss.item()
            seconds.append(clock.seconds(started, stopped))
        return seconds, loss

    result = time_training(train, task)
    result["peak_memory"] = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    n = MATRIX_SIZE[task["device"]]
    matrices = torch.randn(2, n, n, device=task["device"]).to(torch.bfloat16 if bf16 else torch.float32)
    result["product_rate"] = product_rate(lambda: torch.mm(*matrices), n, clock)
    return result | dict(versions=versions(*packages))


class Program(NamedTuple):
    measure: Callable        # task -> result: seconds, busy_cores, peak_memory, versions, and more
    needs: str = ""          # modules that a peer imports
    variants: tuple = ({},)  # additions to the task: all run in the first round, then only the fastest


def pytorch(attentions=("plain", "sdpa"), **settings):
    return Program(partial(measure_pytorch, **settings), "torch", tuple({"attention": kind} for kind in attentions))


OURS, OURS_BF16, OURS_TF32 = "gpt2-by-hand", "gpt2-by-hand bf16", "gpt2-by-hand tf32"
NUMBERS = {OURS: "float32", OURS_BF16: "bfloat16", OURS_TF32: "tf32"}     # that its products multiply
OURS_INT8, OURS_INT4 = "gpt2-by-hand int8", "gpt2-by-hand int4"
PROGRAMS = {
    "cpu": {
        OURS: Program(measure_ours),
        "PyTorch eager": pytorch(compiled=False),
        "PyTorch compile": pytorch(compiled=True),
        OURS_BF16: Program(partial(measure_ours, dtype="bfloat16")),
        "PyTorch eager bf16": pytorch(compiled=False, bf16=True),
        "PyTorch compile bf16": pytorch(compiled=True, bf16=True),
    },
    "cuda": {
        OURS: Program(partial(measure_ours_on_gpu, dtype="float32")),
        OURS_TF32: Program(partial(measure_ours_on_gpu, dtype="tf32")),
        OURS_BF16: Program(partial(measure_ours_on_gpu, dtype="bfloat16")),
        "PyTorch eager": pytorch(compiled=False),
        "PyTorch eager tf32": pytorch(compiled=False, tf32=True),
        "PyTorch compile": pytorch(compiled=True),
        "PyTorch compile tf32": pytorch(compiled=True, tf32=True),
        "PyTorch compile bf16": pytorch(attentions=["sdpa"], compiled=True, bf16=True),
    },
}


def ours_beside(name):
    """The program of ours that a program is compared with: the one with products or weights of the same type."""
    same = {"bf16": OURS_BF16, "tf32": OURS_TF32, "int8": OURS_INT8, "q8_0": OURS_INT8, "int4": OURS_INT4, "q4_0": OURS_INT4}
    return next((ours for word, ours in same.items() if word in name), OURS)


def is_ours(name):
    return name == ours_beside(name)


def measure_step(task):
    task["shape"] = Shape(*task["shape"])
    return PROGRAMS[task["device"]][task["program"]].measure(task)


def measuring_process(measure):
    """Run the task on the command line and print its result, or the error, as the last line."""
    try:
        result = measure(json.loads(sys.argv[2]))
    except UserError as error:
        result = {"error": str(error)}
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        result = {"error": f"{type(error).__name__}: {message}"}
    print(json.dumps(result))


# ----------------------------------------------------------------------------------------------------------------------
# The process that starts them

class Peers(NamedTuple):
    """A Python with the modules that some programs need."""
    python: str
    flag: str       # the flag that names it
    packages: str   # to pip install


def programs_that_run(programs, peers):
    """The programs whose modules can be imported. Reports the others. peers: what a program needs -> Peers."""
    missing = [needs for needs, (python, *_) in peers.items()
               if subprocess.run([python, "-c", f"import {needs}"], capture_output=True).returncode != 0]
    for needs in missing:
        python, flag, packages = peers[needs]
        progress(f"no {needs.replace(', ', ' and ')} in {python}: measuring without; pip install {packages}, or name a Python "
                 f"that has it with {flag}")
    return {name: program for name, program in programs.items() if program.needs not in missing}


def run_task(python, task, script=__file__):
    """Run a task in a new process and return its result. Raises UserError, beginning with task["title"], if it fails."""
    process = subprocess.run([python, script, MEASURE, json.dumps(task)], capture_output=True, text=True)
    lines = process.stdout.splitlines()
    if process.returncode != 0 or not lines:
        raise UserError(f"{task['title']}: its process ended with status {process.returncode}"
                        + (", killed, perhaps out of memory" if process.returncode == -9 else ""))
    result = json.loads(lines[-1])
    if "error" in result:
        raise UserError(f"{task['title']}: {result['error']}")
    return result


def progress(line):
    """Print to standard error, so that standard output can be redirected to a file."""
    print(line, file=sys.stderr, flush=True)


def take_turns(programs, peers, rounds, measure, describe):
    """Run the programs in turn for some rounds. Returns label -> results, one per round.

    A program that fails is left out. If it is one of ours, so are the programs compared with it. The first must not fail.
    measure: (python, name, variant) -> result
    describe: (label of name and variant, result) -> text of a progress line
    """
    first = next(iter(programs))
    variants = {name: program.variants for name, program in programs.items()}
    results = {name: [] for name in programs}
    for round_number in range(1, rounds + 1):
        for name in list(variants):
            if ours_beside(name) not in variants:   # it failed
                del variants[name], results[name]
                continue
            needs = programs[name].needs
            python = peers[needs].python if needs else sys.executable
            tried = []
            for variant in variants[name]:
                try:
                    result = measure(python, name, variant)
                except UserError as error:
                    if name == first:
                        raise
                    progress(f"left out: {error}")
                    continue
                tried.append((median(result["seconds"]), variant, result))
                progress(f"round {round_number}/{rounds} | {describe(label(name, variant), result)}"
                         + (f" | others kept {result['busy_cores']} cores busy" if result["busy_cores"] else ""))
            if not tried:
                del variants[name], results[name]
                continue
            _, fastest, result = min(tried, key=lambda row: row[0])
            variants[name] = (fastest,)
            results[name].append(result)
    return {label(name, variants[name][0]): rounds for name, rounds in results.items()}


def measure_shape(shape, options, programs, peers):
    """Time every program's steps on batches of one shape. Returns what take_turns returns."""
    most_tokens = STEP_TOKENS[options.device]
    steps = max(MINIMUM_STEPS, options.steps * most_tokens // max(most_tokens, shape.tokens))

    def measure(python, name, variant):
        return run_task(python, dict(title=f"{label(name, variant)} at {shape}", program=name, device=options.device,
                                     model=options.model, shape=shape, steps=steps, threads=options.threads) | variant)

    def describe(label, result):
        return (f"{shape!s:>7} | {label:<29} | {steps} steps, median {1000 * median(result['seconds']):8,.1f} ms | "
                f"loss {result['loss']:.3f}")

    return take_turns(programs, peers, options.rounds, measure, describe)


def label(name, variant):
    return ", ".join([name, *variant.values()])


def time_beside_ours(results, name, seconds):
    """The median over the rounds of a program's time / ours. seconds: result -> the time to compare."""
    return median(seconds(its) / seconds(ours) for its, ours in zip(results[name], results[ours_beside(name)]))


class Summary(NamedTuple):
    milliseconds: float
    ratio: float             # to ours_beside it
    peak_memory: int


def summarize(results):
    """label -> Summary, from the results of one shape."""
    return {name: Summary(milliseconds=1000 * median(second for result in rounds for second in result["seconds"]),
                          ratio=time_beside_ours(results, name, lambda result: median(result["seconds"])),
                          peak_memory=max(result["peak_memory"] for result in rounds))
            for name, rounds in results.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Printing and drawing

def print_table(header, rows, left):
    """Print a Markdown table with aligned columns: the first `left` columns are text, the others numbers."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    for row in [header, rule, *rows]:
        cells = (f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
                 for column, (cell, width) in enumerate(zip(row, widths)))
        print("| " + " | ".join(cells) + " |")
    print()


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_machine(what, options, all_rounds, hardware):
    """Print what was measured, the hardware and the versions. all_rounds: every program's results, ours first."""
    found, busy = {}, []
    for rounds in all_rounds:
        found |= rounds[0]["versions"] | found  # of the Python versions, keep ours
        busy += [result["busy_cores"] for result in rounds if result["busy_cores"] is not None]
    print(f"{what}. {hardware}, {platform.system()}; " + ", ".join(f"{name} {version}" for name, version in found.items())
          + f"; {options.rounds} {'round' if options.rounds == 1 else 'rounds'}, {date.today()}."
          + (f" Other programs kept {min(busy)} to {max(busy)} cores busy." if busy else "") + "\n")
    if busy and max(busy) > QUIET_CORES:
        print("**The machine was not quiet, which slows programs down unequally: measure again before quoting a ratio.**\n")


def milliseconds(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def print_steps(config, summaries, peak_flops):
    """Print the main table. peak_flops: program of ours -> the GPU's peak FLOP/s, if known."""
    def mfu(shape, name, row):
        peak = peak_flops.get(ours_beside(name))
        return f"{sum(step_flops(config, shape)) / (row.milliseconds / 1000) / peak:.1%}" if peak else ""

    rows = [(str(shape), name, milliseconds(row.milliseconds), f"{row.ratio:.2f}",
             f"{1000 * shape.tokens / row.milliseconds:,.0f}", f"{row.peak_memory / 1e9:.2f} GB",
             *([mfu(shape, name, row)] if peak_flops else []))
            for shape, summary in summaries.items() for name, row in summary.items()]
    print_table(("B x T", "program", "ms/step", "time / ours", "tokens/s", "peak memory", *(["MFU"] if peak_flops else [])),
                rows, left=2)


def print_floor(config, results, summaries, ours, size):
    """Print the step time of one of our programs next to the time that its matrix products alone would take."""
    rates = [(result["product_rate"], name) for programs in results.values() for name, rounds in programs.items()
             if ours_beside(name) == ours for result in rounds]
    peak, program = max(rates)
    our_peak = max(rate for rate, name in rates if name == ours)
    tile_rates = [result["tile_rate"] for programs in results.values() for result in programs.get(ours, ())
                  if "tile_rate" in result]
    tiles = f", {our_peak / max(tile_rates):.0%} of single tiles in the first-level cache" if tile_rates else ""
    weights, width = ("L C (2 (NH + KV) HS + 3 H) + Vp C", "NH HS") if is_llama(config) else ("12 L C^2 + Vp C", "C")
    print(f"The fastest {NUMBERS[ours]} products of {size} x {size} matrices were those of {program}: {peak / 1e9:,.0f} "
          f"GFLOP/s; ours reach {our_peak / 1e9:,.0f}{tiles}. FLOPs of a step's products: 6 N ({weights}) in the linear "
          f"layers and the classifier, 6 L {width} B T (T+1) in the causal half of attention.\n")
    rows = []
    for shape, summary in ((shape, summary) for shape, summary in summaries.items() if ours in summary):
        linear, attention = step_flops(config, shape)
        floor = 1000 * (linear + attention) / peak
        rows.append((str(shape), f"{linear / 1e9:,.1f}", f"{attention / 1e9:,.1f}", milliseconds(floor),
                     milliseconds(summary[ours].milliseconds), f"{summary[ours].milliseconds / floor:.2f}"))
    print_table(("B x T", "GFLOP linear", "GFLOP attention", "ms at that rate", "ms/step", "step / products"), rows, left=1)


def print_kernels(heading, rounds):
    """Print where our step spends its time: in each kernel, averaged over the rounds, and between kernels, in Python.

    On a GPU also the bytes moved, and the fraction of the measured rates that a kernel reaches.
    """
    steps = len(rounds) * PROFILED_STEPS
    calls, seconds, flops, nbytes = Counter(), Counter(), Counter(), Counter()
    for call in (Call(*call) for result in rounds for call in result["kernels"]):
        calls[call.name] += 1
        seconds[call.name] += call.seconds
        flops[call.name] += call.flops
        nbytes[call.name] += call.nbytes
    total = sum(result["profiled_seconds"] for result in rounds)
    on_gpu = "copy_rate" in rounds[0]
    decimals = 3 if on_gpu else 1

    def row(name, number_of_calls, kernel_seconds):
        flop_rate, byte_rate = flops[name] / kernel_seconds, nbytes[name] / kernel_seconds
        cells = (name, number_of_calls, f"{1000 * kernel_seconds / steps:,.{decimals}f}", f"{kernel_seconds / total:.1%}",
                 f"{flop_rate / 1e9:,.0f}" if flop_rate else "")
        if on_gpu:
            best = max(result["product_rate"] if flop_rate else result["copy_rate"] for result in rounds)
            cells += (f"{byte_rate / 1e9:,.0f}" if byte_rate else "",
                      f"{(flop_rate or byte_rate) / best:.0%}" if flop_rate or byte_rate else "")
        return cells

    rows = [row(name, f"{calls[name] // steps}", kernel_seconds) for name, kernel_seconds in seconds.most_common()]
    rows.append(row("(between kernels)", "", total - seconds.total()))
    print_table((heading, "calls", "ms/step", "share", "GFLOP/s", *(["GB/s", "of best"] if on_gpu else [])), rows, left=1)


class Bar(NamedTuple):
    program: str
    value: float
    text: str       # printed at the bar's end


def draw(groups, title, path):
    """Draw a bar chart with one group of bars per heading, each with its own scale. groups: heading -> [Bar]."""
    style.draw(lambda pyplot: bar_chart(pyplot, groups, title), path)


def bar_chart(pyplot, groups, title):
    sizes = [len(bars) for bars in groups.values()]
    height = 0.5 + 0.4 * len(sizes) + 0.28 * sum(sizes)
    figure, all_axes = pyplot.subplots(len(sizes), figsize=(style.WIDTH, height), squeeze=False,
                                       gridspec_kw={"height_ratios": sizes})
    for axes, (heading, bars) in zip(all_axes[:, 0], groups.items()):
        programs, values, texts = zip(*bars)
        drawn = axes.barh(programs, values, color=[style.ORANGE if is_ours(name) else style.BLUE for name in programs])
        axes.bar_label(drawn, texts, padding=4)
        for name, tick in zip(programs, axes.get_yticklabels()):
            tick.set_fontweight("bold" if is_ours(name) else "normal")
        axes.set_title(heading, loc="left")
        axes.set_xlim(0, 1.4 * max(values))  # room for the labels
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    return figure


def title(model):
    return "SmolLM2-135M" if model == SMOLLM2 else f"GPT-2 {model}"


def draw_steps(summaries, options, hardware):
    """Draw one group per shape, since their times differ more than tenfold."""
    draw({f"B x T = {shape}": [Bar(name, row.milliseconds, f"{milliseconds(row.milliseconds)} ms"
                                   + ("" if is_ours(name) else f", {row.ratio:.2f} x")) for name, row in summary.items()]
          for shape, summary in summaries.items()},
         f"{title(options.model)}: time of a training step, {hardware} (shorter is better)", options.output)


# ----------------------------------------------------------------------------------------------------------------------
# Flags

def parse_shape(text):
    try:
        shape = Shape(*map(int, text.split("x")))
    except (ValueError, TypeError):
        shape = Shape(0, 0)
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected BxT such as 4x64")
    return shape


DEFAULTS = {
    "cpu": dict(shapes=[Shape(4, 64), Shape(1, 1024)], steps=10, dtypes=["float32", "bfloat16"],
                output=Path(__file__).with_name("benchmark.png")),
    "cuda": dict(shapes=[Shape(4, 1024)], steps=40, dtypes=["float32", "tf32", "bfloat16"],
                 output=Path(__file__).with_name("benchmark_cuda.png")),
}
SMOLLM2_DEFAULTS = dict(shapes=[Shape(4, 256)], output=Path(__file__).with_name("benchmark_smollm2.png"))


def shared_parser(description, **models):
    """A parser with the flags of both benchmarks. models: choices of --model besides GPT-2's -> their help."""
    from gpt2 import HEADS_BY_DEPTH
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[*(f"d{depth}" for depth in HEADS_BY_DEPTH), *models], default="d12",
        help="; ".join(["d12 is GPT-2 124M", *models.values()]))
    add("--rounds", type=bounded(int, 1), default=3, help="how often each program gets its turn")
    add("--threads", type=bounded(int, 1, cores), default=cores, help="CPU threads of every program")
    return parser


def python_path(text):
    path = shutil.which(text)
    if path is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected the path of a Python")
    return path


def parse_options():
    parser = shared_parser("Time a training step of this program and of PyTorch, side by side.", **{
        SMOLLM2: f"{SMOLLM2} is a Llama with the sizes of SmolLM2-135M, by default at {SMOLLM2_DEFAULTS['shapes']}"})
    add = parser.add_argument

    def add_by_device(flag, help, **settings):
        cpu, cuda = (DEFAULTS[device][flag] for device in ("cpu", "cuda"))
        add(f"--{flag}", default=argparse.SUPPRESS, help=f"{help} (default: {cpu}; on cuda: {cuda})", **settings)

    add("--device", choices=list(PROGRAMS), default="cpu", help="cuda: train_gpt2_gpu.py and PyTorch on a GPU")
    add_by_device("shapes", "sequences in a batch x tokens in a sequence", nargs="+", type=parse_shape, metavar="BxT")
    add_by_device("steps", f"timed steps per turn; batches of more than {STEP_TOKENS['cpu']} tokens (on cuda "
                  f"{STEP_TOKENS['cuda']:,}) get fewer, at least {MINIMUM_STEPS}", type=bounded(int, 1))
    add_by_device("dtypes", "measure the programs whose products multiply these numbers", nargs="+",
                  choices=DEFAULTS["cuda"]["dtypes"])
    add("--python", type=python_path, default=sys.executable, metavar="PATH", help="a Python with PyTorch")
    add_by_device("output", "the bar chart", type=Path, metavar="FILE")
    options = parser.parse_args()
    defaults = DEFAULTS[options.device] | (SMOLLM2_DEFAULTS if options.model == SMOLLM2 else {})
    options = argparse.Namespace(**defaults | vars(options))
    missing = set(options.dtypes).difference(DEFAULTS[options.device]["dtypes"])
    if missing:
        parser.error(f"argument --dtypes: {', '.join(missing)} needs --device cuda")
    if options.model == SMOLLM2 and options.device == "cuda":
        parser.error(f"argument --model: {SMOLLM2} needs --device cpu")
    context = config_of(options.model).max_seq_len
    for shape in options.shapes:
        if shape.sequence_length > context:
            parser.error(f"argument --shapes: found {shape}, expected BxT with T at most {context}")
    return options


def main():
    if sys.argv[1:2] == [MEASURE]:
        return measuring_process(measure_step)
    options = parse_options()
    config = config_of(options.model)
    needs, packages = ("torch, transformers", "torch transformers") if is_llama(config) else ("torch", "torch")
    peers = {needs: Peers(options.python, "--python", packages)}
    programs = programs_that_run({name: program._replace(needs=program.needs and needs)
                                  for name, program in PROGRAMS[options.device].items()
                                  if NUMBERS[ours_beside(name)] in options.dtypes}, peers)

    results = {shape: measure_shape(shape, options, programs, peers) for shape in dict.fromkeys(options.shapes)}
    summaries = {shape: summarize(by_program) for shape, by_program in results.items()}
    ours = {name: rounds for by_program in results.values() for name, rounds in by_program.items() if is_ours(name)}
    gpu = next(iter(ours.values()))[0].get("gpu")
    progress("")
    print_machine(f"{title(options.model)}, training steps", options,
                  [rounds for by_program in results.values() for rounds in by_program.values()],
                  gpu or f"{cpu_name()}, {options.threads} threads")
    peak_flops = {name: rounds[0].get("peak_flops") for name, rounds in ours.items()}
    print_steps(config, summaries, {name: peak for name, peak in peak_flops.items() if peak})
    for name in ours:
        print_floor(config, results, summaries, name, MATRIX_SIZE[options.device])
    for shape, by_program in results.items():
        for name in filter(is_ours, by_program):
            print_kernels(f"kernel at {shape}{f', {NUMBERS[name]}' if name != OURS else ''}", by_program[name])
    draw_steps(summaries, options, gpu or f"{options.threads} CPU threads")


if __name__ == "__main__":
    run_program(main)
