"""Time attention in bfloat16 alone, ours and PyTorch's, side by side, on a GPU: forward and backward apart.

    python dev/benchmark_attention.py                               with 12 heads, the 25 of GPT-2 1.6B, and 8,192 tokens
    python dev/benchmark_attention.py --sizes 4x12x1024 --python ~/torch/bin/python
    python dev/benchmark_attention.py --sizes 4x12x1024 --once      each of our kernels once, for a profiler such as ncu

What is timed
    flash_attention_forward and flash_attention_backward of kernels_gpu.py, and PyTorch's scaled_dot_product_attention
    (is_causal=True) with two of its implementations, FlashAttention and cuDNN's. All read the same random queries, keys and
    values where a linear layer leaves them, side by side in one array. Ours writes their gradients in the same way; PyTorch's
    become three arrays.

How
    Each program runs in its own process. A time is that between CUDA events around one call, the median of many, after as many
    to warm up. Before each the GPU is kept busy, so that it never waits for Python. TFLOP/s count the scores that the causal
    mask keeps: two products forward and five backward. Ours computes seven, because it adds up dq apart from dk and dv. Small
    arrays stay in the GPU's cache from call to call. Some numbers of every result are compared, so that no program is fast at
    computing something else.
"""
# As in benchmark.py, only the measuring processes import what they measure.
import argparse
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from math import hypot
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import OneLineParser, UserError, bounded, run_program
from dev import benchmark
from dev.benchmark import (MEASURE, OURS, SEED, SPIN, SPIN_ROUNDS, Peers, Program, TorchCudaClock, WallClock, attention_flops,
                           print_table, progress, run_task, versions)

PRODUCTS = {"forward": 2, "backward": 5}    # of (T, T) matrices
RESULTS = "out", "dq", "dk", "dv"
COMPARED = 1000             # numbers of each result
BOUND = 2e-2                # on their relative error: results in bfloat16 are off by up to 5e-3
SPINS = 5                   # 0.5 ms, longer than Python takes for a call
SPIN_CYCLES = 1_000_000     # the same, in PyTorch


class Size(NamedTuple):
    batch_size: int
    num_heads: int
    sequence_length: int

    def __repr__(self):
        return "x".join(map(str, self))


# ----------------------------------------------------------------------------------------------------------------------
# The measuring processes: a task {program, device, sizes, calls} -> a result for JSON

class Attention(NamedTuple):
    """One program's attention at one size."""
    forward: Callable[[], None]
    backward: Callable[[], None]        # after forward
    results: Callable[[], tuple]        # out, dq, dk, dv as float32 NumPy arrays (B*T, NH*HS)


def inputs(B, NH, T):
    """Queries, keys and values (B*T, 3*NH*HS), and the gradient of the output (B*T, NH*HS)."""
    import numpy as np

    from gpt2 import CHANNELS_PER_HEAD
    generator = np.random.default_rng(SEED)
    return [generator.standard_normal((B * T, columns * NH * CHANNELS_PER_HEAD), dtype=np.float32) for columns in (3, 1)]


def our_attention(device, B, NH, T):
    import numpy as np

    import kernels_gpu as kernels
    kernels.use(device)
    qkv, dout = (device.to_device(array.astype(device.Float)) for array in inputs(B, NH, T))
    out, dqkv, lse = device.empty(dout.shape, device.Float), device.empty(qkv.shape, device.Float), device.empty((B, NH, T))

    def results():
        host_out, host_dqkv = (device.to_host(array).astype(np.float32) for array in (out, dqkv))
        return host_out, *np.split(host_dqkv, 3, axis=1)

    return Attention(lambda: kernels.flash_attention_forward(out, lse, qkv),
                     lambda: kernels.flash_attention_backward(dqkv, dout, out, lse, qkv), results)


def pytorch_attention(device, B, NH, T):
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    qkv, dout = (torch.from_numpy(array).to(device, torch.bfloat16).view(B, T, -1, NH, array.shape[1] // NH // columns)
                 for array, columns in zip(inputs(B, NH, T), (3, 1)))
    q, k, v = (part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4))     # (B, NH, T, HS)
    dout = dout[:, :, 0].transpose(1, 2)
    out, gradients = None, None

    def forward():
        nonlocal out
        out = scaled_dot_product_attention(q, k, v, is_causal=True)

    def backward():
        nonlocal gradients
        gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    def results():
        return tuple(array.detach().transpose(1, 2).reshape(B * T, -1).float().cpu().numpy() for array in (out, *gradients))

    return Attention(forward, backward, results)


def time_attention(task, attention, clock, keep_busy):
    """The median seconds of each call at every size, and some numbers of what it computed. attention: B, NH, T -> Attention"""
    rows = []
    for size in task["sizes"]:
        computed, row = attention(*size), {}
        for name in PRODUCTS:
            work, events = getattr(computed, name), []
            for _ in range(2 * task["calls"]):
                keep_busy()
                started = clock.event()
                work()
                events.append((started, clock.event()))
            row[name] = median(clock.seconds(*pair) for pair in events[task["calls"]:])
        row["results"] = [some_of(array) for array in computed.results()]
        rows.append(row)
    return rows


def some_of(array):
    """About COMPARED numbers. The distance between them is odd, so that they come from many rows and columns."""
    return array.reshape(-1)[::array.size // COMPARED | 1].tolist()


def measure_ours(task):
    from device import open_device
    device = open_device(task["device"], "bfloat16")
    device.load(["", SPIN])
    spun = device.empty(1)

    def keep_busy():
        for _ in range(SPINS):
            device.launch("spin", 1, 1, spun, SPIN_ROUNDS)

    rows = time_attention(task, partial(our_attention, device), device, keep_busy)
    return dict(rows=rows, versions=versions("numpy"), gpu=device.name, peak_flops=device.peak_flops())


def measure_pytorch(task, backend):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    on_gpu = task["device"] == "cuda"
    with sdpa_kernel(getattr(SDPBackend, backend)):
        rows = time_attention(task, partial(pytorch_attention, task["device"]), TorchCudaClock() if on_gpu else WallClock(),
                              lambda: on_gpu and torch.cuda._sleep(SPIN_CYCLES))
    return dict(rows=rows, versions=versions("torch"))


PROGRAMS = {
    OURS: Program(measure_ours),
    "PyTorch FlashAttention": Program(partial(measure_pytorch, backend="FLASH_ATTENTION"), "torch"),
    "PyTorch cuDNN": Program(partial(measure_pytorch, backend="CUDNN_ATTENTION"), "torch"),
}


def measure(task):
    return PROGRAMS[task["program"]].measure(task)


# ----------------------------------------------------------------------------------------------------------------------
# The process that starts them

def measure_all(options):
    """Program -> result. A peer that fails, or computes something else, is left out."""
    peers, results = {"torch": Peers(options.python, "--python", "torch")}, {}
    for name, program in benchmark.programs_that_run(PROGRAMS, peers).items():
        task = dict(title=name, program=name, device=options.device, sizes=options.sizes, calls=options.calls)
        try:
            result = run_task(options.python if program.needs else sys.executable, task, __file__)
            check_results(name, options.sizes, result, results.get(OURS, result))
        except UserError as error:
            if name == OURS:
                raise
            progress(f"left out: {error}")
            continue
        results[name] = result
    return results


def check_results(name, sizes, result, ours):
    """Raise UserError unless a program has the results of ours."""
    for size, its_row, our_row in zip(sizes, result["rows"], ours["rows"]):
        for array, its, our in zip(RESULTS, its_row["results"], our_row["results"]):
            error = hypot(*(x - y for x, y in zip(its, our))) / hypot(*our)
            if not error <= BOUND:
                raise UserError(f"{name}: its {array} differs from ours at {size}, relative error {error:.1e}, expected at "
                                f"most {BOUND:.0e}")


def print_times(sizes, results):
    from gpt2 import CHANNELS_PER_HEAD
    header, rows = ["B x NH x T", "program"], []
    for name in PRODUCTS:
        header += [f"{name}, ms", "TFLOP/s", "time / ours"]
    for i, (B, NH, T) in enumerate(sizes):
        for program, result in results.items():
            row, ours = result["rows"][i], results[OURS]["rows"][i]
            cells = [str(sizes[i]), program]
            for name, products in PRODUCTS.items():
                flops = attention_flops(B, T, NH * CHANNELS_PER_HEAD, products)
                cells += [f"{1000 * row[name]:,.3f}", f"{flops / row[name] / 1e12:,.1f}", f"{row[name] / ours[name]:.2f}"]
            rows.append(cells)
    print_table(header, rows, left=2)


def run_once(options):
    """Run each of our kernels once per size, in this process, with nothing else on the GPU but copies."""
    from device import open_device
    device = open_device(options.device, "bfloat16")
    for size in options.sizes:
        attention = our_attention(device, *size)
        attention.forward()
        attention.backward()
        attention.results()     # waits
        print(f"ran flash_attention_forward and flash_attention_backward once at {size}")


def parse_size(text):
    try:
        size = Size(*map(int, text.split("x")))
    except (ValueError, TypeError):
        size = Size(0, 0, 0)
    if not (min(size) >= 1 and size.sequence_length >= 2):      # the gradient of a single score is 0
        raise argparse.ArgumentTypeError(f"found {text!r}, expected BxNHxT such as 4x12x1024: sequences, heads, two tokens or "
                                         "more")
    return size


def parse_options():
    parser = OneLineParser(description="Time attention in bfloat16 alone, ours and PyTorch's, side by side.",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: run our CUDA kernels on the CPU, very slowly")
    add("--sizes", nargs="+", type=parse_size, metavar="BxNHxT", help="sequences x heads x tokens in a sequence",
        default=[Size(4, 12, 1024), Size(32, 12, 1024), Size(4, 25, 1024), Size(1, 12, 8192)])
    add("--calls", type=bounded(int, 1), default=100, help="timed calls; as many run before, to warm up")
    add("--python", type=benchmark.python_path, default=sys.executable, metavar="PATH", help="a Python with PyTorch")
    add("--once", action="store_true", help="run each of our kernels once, and time nothing")
    return parser.parse_args()


def main():
    if sys.argv[1:2] == [MEASURE]:
        return benchmark.measuring_process(measure)
    options = parse_options()
    if options.once:
        return run_once(options)
    results = measure_all(options)
    ours, found = results[OURS], {}
    for result in results.values():
        found = result["versions"] | found      # of the Python versions, keep ours
    peak = f", at most {ours['peak_flops'] / 1e12:,.0f} TFLOP/s" if ours["peak_flops"] else ""
    print(f"Causal attention in bfloat16, heads of 64 channels. {ours['gpu']}{peak}; "
          + ", ".join(f"{name} {version}" for name, version in found.items()) + f"; {date.today()}.\n")
    print_times(options.sizes, results)


if __name__ == "__main__":
    run_program(main)
