"""A training step of this program beside the same step in PyTorch, on this machine (Linux or macOS).

    python dev/benchmark.py                                            d12, at B x T = 4x64 and 1x1024
    python dev/benchmark.py --python ~/torch/bin/python                PyTorch lives in another environment
    python dev/benchmark.py --shapes 4x64 1x1024 4x1024 --rounds 5

What is timed
    A whole step: forward, backward, clipping at norm 1, AdamW, and reading the loss. Ours is the loop of train_gpt2.py itself.
    PyTorch's is the GPT-2 of reference_pytorch.py with its real vocabulary, GPT-2's initialisation and fused AdamW. Random
    tokens from one seed and as many threads for all.

How
    Each program runs in a process of its own, so that no thread pool or allocator disturbs another. They take turns, for
    several rounds, so that a slow minute of the machine hits all of them; the first steps, which compile, are left out. A time
    is the median over all steps, a ratio the median over the rounds of the ratio of that round's medians. PyTorch's two ways
    to compute attention, spelled out and scaled_dot_product_attention (sdpa), both run in the first round, and each program
    keeps the one that is faster for it.
"""
# The processes that measure import NumPy, Numba and PyTorch themselves: PyTorch may be in another environment, and on Linux a process counts what its parent occupied when it started as its own peak memory.
import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files import OneLineParser, UserError, run_program, whole_file

SEED = 1337
LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 1e-4, 0.1, 1.0
WARMUP_STEPS = 2          # the first compiles, or loads what was compiled before
MINIMUM_STEPS = 3
STEP_TOKENS = 256         # batches with more tokens than this get fewer steps
PROFILED_STEPS = 3
SGEMM_SIZE = 3072
SGEMM_PRODUCTS = 5
QUIET_CORES = 0.2         # as much as other programs may keep busy before times say little
MEASURE = "--measure"     # starts this file as one of its own measuring processes, with a task in JSON


class Shape(NamedTuple):
    batch_size: int
    sequence_length: int

    def __repr__(self):
        return f"{self.batch_size}x{self.sequence_length}"

    @property
    def tokens(self):
        return prod(self)


# ----------------------------------------------------------------------------------------------------------------------
# In the measuring processes: a task {program, model, shape, threads, steps, and a variant's keys} -> a result for JSON

class RandomBatches:
    """A data loader of random tokens, the same for every program."""

    def __init__(self, shape, vocab_size):
        import numpy as np
        self.generator = np.random.default_rng(SEED)
        self.shape, self.vocab_size = shape, vocab_size

    def next_batch(self):
        """Inputs (B, T) and targets (B, T), int32."""
        B, T = self.shape
        sequences = self.generator.integers(0, self.vocab_size, (B, T + 1), dtype="int32")
        return sequences[:, :-1].copy(), sequences[:, 1:].copy()


def peak_memory():
    """The most memory this process has occupied so far, in bytes."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class OtherPrograms:
    """How many cores other programs kept busy since this was made; known on Linux, elsewhere `cores()` is None.

    Programs that share their cores slow down unequally: threads wait for each other by spinning, for longer or shorter, in the
    very time that the one waited for needs. With 1.0 and 1.4 of 2 cores taken, the same two programs were seen to differ 3.4
    and 1.6 times.
    """

    def __init__(self):
        self.started = self.clocks()

    def clocks(self):
        """Seconds on the clock, of CPU time of this process, and of all CPU time, that stolen from a virtual machine included."""
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


def measure_ours(task):
    """Time train_gpt2's own loop, then large matrix products, and last, in further steps, the kernels one by one."""
    import numba
    import train_gpt2
    from gpt2 import model_config
    from training import parse_options

    numba.set_num_threads(task["threads"])
    config = model_config(task["model"])
    B, T = task["shape"]
    model = train_gpt2.GPT2(config, B, T, task["threads"])
    model.initialize(SEED)
    options = parse_options("", f"--model {task['model']} --batch-size {B} --sequence-length {T} --learning-rate {LEARNING_RATE} "
                                f"--warmup-iters 0 --schedule constant --weight-decay {WEIGHT_DECAY} --grad-clip {GRAD_CLIP} "
                                "--val-loss-every 0 --sample-every 0".split())
    batches = RandomBatches(task["shape"], config.vocab_size)

    def train(steps):
        log = StepTimes()
        options.num_iterations = steps
        train_gpt2.train(model, options, batches, None, log)
        return log

    train(WARMUP_STEPS)
    others = OtherPrograms()
    log = train(task["steps"])
    result = dict(seconds=log.seconds, loss=log.loss, busy_cores=others.cores(), peak_memory=peak_memory(),
                  versions=versions("numpy", "numba"))
    result["sgemm_flops"] = our_sgemm_flops(train_gpt2.kernels, task["threads"])
    result["kernels"] = time_kernels(train_gpt2.kernels)
    result["profiled_seconds"] = sum(train(PROFILED_STEPS).seconds)
    return result


class StepTimes:
    """Stands in for the training loop's log, which is told how long every step took."""

    def __init__(self):
        self.seconds = []

    def step(self, step, loss, norm, rate, seconds):
        self.seconds.append(seconds)
        self.loss = loss


def attention_flops(B, T, C, products):
    """FLOPs of so many (T, T) products with all heads of one layer: only the scores of keys j <= i, which a causal mask keeps."""
    return products * 2 * B * C * T * (T + 1) // 2


# FLOPs of one call, from its leading arguments. Scores that a backward pass computes again are not counted as work done.
KERNEL_FLOPS = {
    "matmul_forward": lambda out, inp, *rest: 2 * out.size * inp.shape[1],
    "matmul_backward": lambda dinp, dweight, dbias, dout, *rest: 4 * dout.size * dinp.shape[1],
    "attention_forward": lambda out, lse, *rest: attention_flops(lse.shape[0], lse.shape[2], out.shape[1], 2),
    "attention_backward": lambda dqkv, dout, out, lse, *rest: attention_flops(lse.shape[0], lse.shape[2], out.shape[1], 4),
}


def time_kernels(kernels):
    """Replace every parallel kernel of the module by one that records its calls; return the list they will be in.

    A record is (name, seconds, FLOPs or 0).
    """
    from numba.core.dispatcher import Dispatcher
    calls = []

    def recording(name, kernel):
        def call(*arguments):
            started = time.perf_counter()
            result = kernel(*arguments)
            seconds = time.perf_counter() - started
            calls.append((name, seconds, KERNEL_FLOPS[name](*arguments) if name in KERNEL_FLOPS else 0))
            return result
        return call

    for name, value in list(vars(kernels).items()):
        if isinstance(value, Dispatcher) and value.targetoptions.get("parallel"):
            setattr(kernels, name, recording(name, value))
    return calls


def sgemm_flops(multiply):
    """FLOPs a second of a function that multiplies two SGEMM_SIZE x SGEMM_SIZE matrices: no smaller product will be faster."""
    seconds = []
    for _ in range(1 + SGEMM_PRODUCTS):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    return 2 * SGEMM_SIZE ** 3 / median(seconds[1:])


def our_sgemm_flops(kernels, threads):
    import numpy as np
    generator = np.random.default_rng(SEED)
    inp, weight = (generator.standard_normal((SGEMM_SIZE, SGEMM_SIZE), dtype=np.float32) for _ in range(2))
    out, no_bias, workspace = np.zeros_like(inp), np.empty(0, dtype=np.float32), kernels.make_workspace(threads)
    return sgemm_flops(lambda: kernels.matmul_forward(out, inp, weight, no_bias, workspace))


def measure_pytorch(task, compiled, bf16):
    """Time PyTorch's step, with task["attention"] "plain" or "sdpa"."""
    import torch
    from gpt2 import model_config
    from reference_pytorch import GPT2

    torch.set_num_threads(task["threads"])
    config = model_config(task["model"])
    # initialize: with the N(0, 1) of PyTorch's own embedding, probabilities underflow to denormals and a step takes 6 times
    # as long as any user's.
    model = GPT2(config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.channels,
                 task["attention"]).initialize(SEED)
    optimizer = model.optimizer(LEARNING_RATE, WEIGHT_DECAY)
    forward = torch.compile(model) if compiled else model
    batches = RandomBatches(task["shape"], config.vocab_size)

    def train(steps):
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            inputs, targets = (torch.from_numpy(tokens).long() for tokens in batches.next_batch())
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = forward(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.item()
            seconds.append(time.perf_counter() - started)
        return seconds, loss

    train(WARMUP_STEPS)
    others = OtherPrograms()
    seconds, loss = train(task["steps"])
    result = dict(seconds=seconds, loss=loss, busy_cores=others.cores(), peak_memory=peak_memory(), versions=versions("torch"))
    matrices = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    result["sgemm_flops"] = sgemm_flops(lambda: torch.mm(*matrices))
    return result


class Program(NamedTuple):
    measure: Callable        # task -> result: seconds, loss, busy_cores, peak_memory, versions, sgemm_flops
    needs_torch: bool = False
    variants: tuple = ({},)  # what to add to the task: all are tried in the first round, then the fastest


ATTENTIONS = ({"attention": "plain"}, {"attention": "sdpa"})
OURS = "gpt2-by-hand"
PROGRAMS = {
    OURS: Program(measure_ours),
    "PyTorch eager": Program(partial(measure_pytorch, compiled=False, bf16=False), True, ATTENTIONS),
    "PyTorch compile": Program(partial(measure_pytorch, compiled=True, bf16=False), True, ATTENTIONS),
    "PyTorch compile bf16": Program(partial(measure_pytorch, compiled=True, bf16=True), True, ATTENTIONS),
}


def measuring_process(task):
    """What a measuring process does: carry out the task and print its result, or what went wrong, as the last line."""
    task["shape"] = Shape(*task["shape"])
    try:
        result = PROGRAMS[task["program"]].measure(task)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        result = {"error": f"{type(error).__name__}: {message}"}
    print(json.dumps(result))


# ----------------------------------------------------------------------------------------------------------------------
# In the program that starts them

def run_task(python, task):
    """The result of a task, measured in a new process. Raises UserError if that fails."""
    process = subprocess.run([python, __file__, MEASURE, json.dumps(task)], capture_output=True, text=True)
    lines = process.stdout.splitlines()
    if process.returncode != 0 or not lines:
        raise UserError(f"{task['program']} at {Shape(*task['shape'])}: its process ended with status {process.returncode}"
                        + (", killed, perhaps for want of memory" if process.returncode == -9 else ""))
    result = json.loads(lines[-1])
    if "error" in result:
        raise UserError(f"{task['program']} at {Shape(*task['shape'])}: {result['error']}")
    return result


def progress(line):
    """Progress goes to standard error, so that standard output can be kept as a file."""
    print(line, file=sys.stderr, flush=True)


def measure_shape(shape, options, programs):
    """The programs in turn, for some rounds: label -> its results, one a round. A peer that fails is left out."""
    variants = {name: PROGRAMS[name].variants for name in programs}
    results = {name: [] for name in programs}
    steps = max(MINIMUM_STEPS, options.steps * STEP_TOKENS // max(STEP_TOKENS, shape.tokens))
    for round_number in range(1, options.rounds + 1):
        for name in list(variants):
            python = options.python if PROGRAMS[name].needs_torch else sys.executable
            tried = []
            try:
                for variant in variants[name]:
                    result = run_task(python, dict(program=name, model=options.model, shape=shape, steps=steps,
                                                   threads=options.threads) | variant)
                    tried.append((median(result["seconds"]), variant, result))
                    progress(f"round {round_number}/{options.rounds} | {str(shape):>7} | {label(name, variant):<29} | "
                             f"{steps} steps, median {1000 * tried[-1][0]:8,.1f} ms | loss {result['loss']:.3f}"
                             + (f" | others kept {result['busy_cores']} cores busy" if result["busy_cores"] else ""))
            except UserError as error:
                if name == OURS:
                    raise
                progress(f"left out: {error}")
                del variants[name], results[name]
                continue
            _, fastest, result = min(tried, key=lambda row: row[0])
            variants[name] = (fastest,)
            results[name].append(result)
    return {label(name, variants[name][0]): rounds for name, rounds in results.items()}


def label(name, variant):
    return ", ".join([name, *variant.values()])


class Summary(NamedTuple):
    milliseconds: float
    ratio: float             # to ours
    peak_memory: int


def summarize(results):
    """label -> Summary, from the results of one shape."""
    medians = {name: [median(result["seconds"]) for result in rounds] for name, rounds in results.items()}
    return {name: Summary(milliseconds=1000 * median(second for result in rounds for second in result["seconds"]),
                          ratio=median(its / ours for its, ours in zip(medians[name], medians[OURS])),
                          peak_memory=max(result["peak_memory"] for result in rounds))
            for name, rounds in results.items()}


# ----------------------------------------------------------------------------------------------------------------------
# What it prints and draws

def print_table(header, rows, left):
    """A Markdown table, aligned for reading as it is; its first `left` columns hold text, the others numbers."""
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


def print_machine(options, results):
    found, busy = {}, []
    for rounds in (rounds for programs in results.values() for rounds in programs.values()):
        found = rounds[0]["versions"] | found  # ours, the first, is the one whose Python is named
        busy += [result["busy_cores"] for result in rounds if result["busy_cores"] is not None]
    print(f"GPT-2 {options.model}, training steps. {cpu_name()}, {options.threads} threads, {platform.system()}; "
          + ", ".join(f"{name} {version}" for name, version in found.items())
          + f"; {options.rounds} {'round' if options.rounds == 1 else 'rounds'}, {date.today()}."
          + (f" Meanwhile other programs kept {min(busy)} to {max(busy)} cores busy." if busy else "") + "\n")
    if busy and max(busy) > QUIET_CORES:
        print("**The machine was not quiet, which slows programs down unequally: measure again before quoting a ratio.**\n")


def print_steps(summaries):
    rows = [(str(shape), name, f"{row.milliseconds:,.0f}", f"{row.ratio:.2f}",
             f"{1000 * shape.tokens / row.milliseconds:,.0f}", f"{row.peak_memory / 1e9:.2f} GB")
            for shape, summary in summaries.items() for name, row in summary.items()]
    print_table(("B x T", "program", "ms a step", "time / ours", "tokens/s", "peak memory"), rows, left=2)


def print_floor(config, results, summaries):
    """How far the step is from what its matrix products alone would take."""
    from gpt2 import training_flops
    rates = [(result["sgemm_flops"], name) for programs in results.values() for name, rounds in programs.items()
             for result in rounds]
    peak, program = max(rates)
    ours = max(rate for rate, name in rates if name == OURS)
    print(f"The fastest float32 products of {SGEMM_SIZE} x {SGEMM_SIZE} matrices were those of {program}, {peak / 1e9:,.0f} "
          f"GFLOP/s; ours reach {ours / 1e9:,.0f}. The products of a step: 6 N (12 L C^2 + Vp C) in the linear layers and the "
          "classifier, and 6 L C B T (T+1) in attention, whose causal half alone is counted, once.\n")
    rows = []
    for shape, summary in summaries.items():
        linear, attention = training_flops(config, *shape)
        floor = 1000 * (linear + attention) / peak
        rows.append((str(shape), f"{linear / 1e9:,.1f}", f"{attention / 1e9:,.1f}", f"{floor:,.0f}",
                     f"{summary[OURS].milliseconds:,.0f}", f"{summary[OURS].milliseconds / floor:.2f}"))
    print_table(("B x T", "GFLOP linear", "GFLOP attention", "ms at that rate", "ms a step", "step / products"), rows, left=1)


def print_kernels(shape, rounds):
    """Where our step spends its time: every kernel, summed over the rounds, and what is left for Python between them."""
    steps = len(rounds) * PROFILED_STEPS
    calls, seconds, flops = Counter(), Counter(), Counter()
    for name, call_seconds, call_flops in (call for result in rounds for call in result["kernels"]):
        calls[name] += 1
        seconds[name] += call_seconds
        flops[name] += call_flops
    total = sum(result["profiled_seconds"] for result in rounds)
    rows = [(name, f"{calls[name] // steps}", f"{1000 * kernel_seconds / steps:,.1f}", f"{kernel_seconds / total:.1%}",
             f"{flops[name] / kernel_seconds / 1e9:,.0f}" if flops[name] else "")
            for name, kernel_seconds in seconds.most_common()]
    rest = total - seconds.total()
    rows.append(("(between kernels)", "", f"{1000 * rest / steps:,.1f}", f"{rest / total:.1%}", ""))
    print_table((f"kernel at {shape}", "calls", "ms a step", "share", "GFLOP/s"), rows, left=1)


def draw(summaries, options):
    """A bar for every program, a group for every shape. Each group has its own scale: the shapes differ by more than tenfold."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [len(summary) for summary in summaries.values()]
    figure, groups = pyplot.subplots(len(bars), figsize=(8, 0.8 + 0.6 * len(bars) + 0.32 * sum(bars)), squeeze=False,
                                     layout="constrained", gridspec_kw={"height_ratios": bars})
    for axes, (shape, summary) in zip(groups[:, 0], summaries.items()):
        times = [row.milliseconds for row in summary.values()]
        colours = ["tab:orange" if name == OURS else "lightsteelblue" for name in summary]
        drawn = axes.barh(list(summary), times, color=colours)
        axes.bar_label(drawn, [f"{row.milliseconds:,.0f} ms" + ("" if name == OURS else f", {row.ratio:.2f} x")
                               for name, row in summary.items()], padding=4, fontsize=9)
        axes.get_yticklabels()[list(summary).index(OURS)].set_fontweight("bold")
        axes.set_title(f"B x T = {shape}", loc="left", fontsize=10)
        axes.set_xlim(0, 1.3 * max(times))  # room for the labels
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(f"GPT-2 {options.model}: time of a training step, {options.threads} CPU threads (shorter is better)",
                    fontsize=11)
    with whole_file(options.output) as file:
        figure.savefig(file, dpi=120, format="png")
    print(f"wrote {options.output}")


# ----------------------------------------------------------------------------------------------------------------------
# Flags

def parse_shape(text):
    from gpt2 import CONTEXT
    try:
        shape = Shape(*map(int, text.split("x")))
    except (ValueError, TypeError):
        shape = Shape(0, 0)
    if not (shape.batch_size >= 1 and 1 <= shape.sequence_length <= CONTEXT):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected BxT such as 4x64, with T at most {CONTEXT}")
    return shape


def parse_options():
    from gpt2 import HEADS_BY_DEPTH
    from training import number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = OneLineParser(description="Measure a training step beside PyTorch's.",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[f"d{depth}" for depth in HEADS_BY_DEPTH], default="d12", help="d12 is GPT-2 124M")
    add("--shapes", nargs="+", type=parse_shape, default=[Shape(4, 64), Shape(1, 1024)], metavar="BxT",
        help="sequences in a batch x tokens in a sequence")
    add("--rounds", type=number(int, 1), default=3, help="times each program gets its turn")
    add("--steps", type=number(int, 1), default=10,
        help=f"timed steps a turn up to {STEP_TOKENS} tokens; fewer, at least {MINIMUM_STEPS}, for larger batches")
    add("--threads", type=number(int, 1, cores), default=cores, help="threads of every program")
    add("--python", default=sys.executable, metavar="PATH", help="the Python that has PyTorch")
    add("--output", type=Path, default=Path(__file__).with_name("benchmark.png"), metavar="FILE", help="the bar chart")
    options = parser.parse_args()
    options.python = shutil.which(options.python)
    if options.python is None:
        parser.error("--python names no program that can be run, expected the path of a Python")
    return options


def main():
    if sys.argv[1:2] == [MEASURE]:
        return measuring_process(json.loads(sys.argv[2]))
    options = parse_options()
    from gpt2 import model_config
    programs = list(PROGRAMS)
    if subprocess.run([options.python, "-c", "import torch"], capture_output=True).returncode != 0:
        progress(f"no PyTorch in {options.python}: measuring {OURS} alone; --python PATH names a Python that has it")
        programs = [name for name in programs if not PROGRAMS[name].needs_torch]

    results = {shape: measure_shape(shape, options, programs) for shape in dict.fromkeys(options.shapes)}
    summaries = {shape: summarize(by_program) for shape, by_program in results.items()}
    progress("")
    print_machine(options, results)
    print_steps(summaries)
    print_floor(model_config(options.model), results, summaries)
    for shape, by_program in results.items():
        print_kernels(shape, by_program[OURS])
    draw(summaries, options)


if __name__ == "__main__":
    run_program(main)
