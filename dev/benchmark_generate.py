"""Time text generation by this program, transformers and llama.cpp, side by side, on this machine's CPU (Linux or macOS).

    python dev/benchmark_generate.py --python PATH --llama-python PATH      d12, GPT-2 124M
    python dev/benchmark_generate.py --model smollm2 --python PATH ...      Llama with the sizes of SmolLM2-135M

The first Python has transformers (pip install torch transformers), the second llama.cpp (pip install llama-cpp-python, which
compiles it for this machine). Missing programs are left out.

What is timed
    Decoding: the greedy choice of 128 tokens, one after another, after a prompt of 16. For each token that is its forward pass
    with a KV cache, the logits of the next token and their argmax. The prompt: 512 tokens read at once, up to the first choice.
    The first token: from the start of the process until it has written the first token after a short prompt, with kernels
    compiled and files in memory. Ours is the command generate_gpt2.py or generate_llama.py, a peer's a minimal Python script
    that does the same. Memory is the peak of a process, including the files it mapped.

How
    As in benchmark.py: each program in its own process, in turn, for several rounds, with the same number of threads. All have
    the same random weights: transformers loads the folder that model_files.save_model writes, llama.cpp the files in f32,
    q8_0 and q4_0 that gguf_files.write_gguf writes, ours the folder and the last two. Ours also runs a Llama in bfloat16, in
    which most of them are published. All logits are compared with ours, so that no program is fast at computing something else.
    llama.cpp is called through its C interface, with default settings for context and KV cache; flash attention is tried in the
    first round and kept if it is faster.

    GCC 12.2 miscompiles llama.cpp's AMX code: on a processor with AMX, q8_0 then ends with status -11.
"""
# As in benchmark.py, only the measuring processes import what they measure.
import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from math import hypot
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError, run_program
from dev import benchmark
from dev.benchmark import (MEASURE, OURS, OURS_BF16, OURS_INT4, OURS_INT8, SMOLLM2, Bar, Peers, Program, is_llama, is_ours,
                           label, run_task, versions)

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
SMOLLM2_CHART = HERE.with_name(f"{HERE.stem}_{SMOLLM2}.png")
PROMPT_TOKENS = 512
SHORT_PROMPT_TOKENS = 16
NEW_TOKENS = 128
PROMPT_REPEATS = 4
PROMPT = "The first citizen spoke:"     # for the time to the first token
FIRST_TOKEN = "--first-token"           # runs this file as a peer's program for that, with a task in JSON
LOGITS_STRIDE = 100                     # every 100th logit is compared

# Largest relative error of logits from ours in float32. llama.cpp has a float16 table of GELU and a float16 KV cache.
LOGITS_BOUND = {OURS: 2e-3, OURS_BF16: 5e-2, OURS_INT8: 5e-2, OURS_INT4: 0.5}
# The error of rounded weights grows with depth, here 30 layers; that of unrelated logits is 1.4.
LOGITS_BOUND_SMOLLM2 = LOGITS_BOUND | {OURS_INT8: 0.1, OURS_INT4: 0.9}


# ----------------------------------------------------------------------------------------------------------------------
# The model on disk, for all programs

MODEL, GGUF = "model", "model-{}.gguf"      # in a temporary folder
OUR_FILES = {OURS: MODEL, OURS_BF16: GGUF.format("bf16"), OURS_INT8: GGUF.format("q8_0"), OURS_INT4: GGUF.format("q4_0")}


def write_model(task):
    """Write a new model plus noise, so that no bias is 0 and no norm's weight is 1: a folder, and GGUF files.

    Its context is at most GPT-2's: a longer one would only make the KV cache larger.
    """
    import numpy as np

    from gguf_files import write_gguf
    from gpt2 import CONTEXT, Tensors
    from llama import definition_of
    from model_files import save_model

    config = benchmark.config_of(task["model"])
    config = replace(config, max_seq_len=min(config.max_seq_len, CONTEXT))
    definition, tokenizer = definition_of(config), tokenizer_of(config.vocab_size)
    params = Tensors(definition.parameter_shapes(config))
    definition.initialize(params, config, benchmark.SEED)
    params.flat += np.float32(0.02) * np.random.default_rng(benchmark.SEED).standard_normal(params.size, dtype=np.float32)
    save_model(Path(task["folder"], MODEL), config, params, tokenizer)
    for kind in ("f32", *["bf16"] * is_llama(config), "q8_0", "q4_0"):
        write_gguf(Path(task["folder"], GGUF.format(kind)), config, params, tokenizer, kind)
    return {}


def tokenizer_of(vocab_size):
    """GPT-2's tokenizer, or for fewer tokens its first merges and <|endoftext|>."""
    from tokenizer import GPT2Tokenizer, own_tokenizer
    tokenizer = GPT2Tokenizer()
    if vocab_size == tokenizer.vocab_size:
        return tokenizer
    end = vocab_size - 1
    settings = json.loads(tokenizer.to_library().to_str())
    model, [end_of_text] = settings["model"], settings["added_tokens"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < end}
    model["merges"] = model["merges"][:end - 256]       # the first tokens are the bytes
    end_of_text["id"] = end
    return own_tokenizer(json.dumps(settings).encode())


def our_program(config):
    """The module that generates text with such a model."""
    return "generate_llama" if is_llama(config) else "generate_gpt2"


# ----------------------------------------------------------------------------------------------------------------------
# The programs, in the measuring processes. The constructor loads the model, from a task {folder, threads, ...}. Methods:
#     read(tokens)      append tokens to the text so far; returns the logits (V,) of the next token, NumPy float32
#     forget()          start a new text
#     tokens(text), text(token)     the tokenizer, of peers only: ours runs as a command

class Ours:
    @staticmethod
    def versions():
        return versions("numpy", "numba")

    def __init__(self, task):
        import numba

        from generate_gpt2 import BITS, compile_kernels, prompt_dtype, weight_kinds
        from model_files import load_model

        numba.set_num_threads(task["threads"])
        config, params = load_model(Path(task["folder"], OUR_FILES[task["program"]]), BITS)
        kinds = weight_kinds(params)
        compile_kernels(config, kinds, prompt_dtype(kinds))
        decoder_class = importlib.import_module(our_program(config)).Decoder
        self.decoder = decoder_class(config, params, 1, task["threads"], prompt_dtype(kinds))
        self.forget()

    def read(self, tokens):
        self.text += tokens
        return self.decoder.next_logits([self.text])[0]

    def forget(self):
        self.text, self.decoder.start, self.decoder.length = [], 0, 0


class Transformers:
    @staticmethod
    def versions():
        return versions("torch", "transformers")

    def __init__(self, task):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(task["threads"])
        folder = Path(task["folder"], MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.torch = torch
        self.forget()

    def read(self, tokens):
        with self.torch.inference_mode():
            output = self.model(self.torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[0, -1].numpy()

    def forget(self):
        self.cache = None

    def tokens(self, text):
        return self.tokenizer(text)["input_ids"]

    def text(self, token):
        return self.tokenizer.decode([token]).encode()


class LlamaCpp:
    @staticmethod
    def versions():
        import llama_cpp
        features = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())
        return versions("llama_cpp_python") | {"llama.cpp with": " ".join(features)}

    def __init__(self, task, weights):
        import llama_cpp
        import numpy as np

        self.llama_cpp, self.as_array = llama_cpp, np.ctypeslib.as_array
        path = Path(task["folder"], GGUF.format(weights))
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 0      # the model's
        settings.n_batch = settings.n_ubatch = PROMPT_TOKENS
        settings.n_threads = settings.n_threads_batch = task["threads"]
        settings.flash_attn_type = {"flash": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
                                    "plain": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}[task["attention"]]
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise UserError(f"llama.cpp could not load {path}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def read(self, tokens):
        array = (self.llama_cpp.llama_token * len(tokens))(*tokens)
        status = self.llama_cpp.llama_decode(self.context, self.llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise UserError(f"llama_decode returned {status}")
        return self.as_array(self.llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab_size,))

    def forget(self):
        self.llama_cpp.llama_memory_clear(self.llama_cpp.llama_get_memory(self.context), False)

    def tokens(self, text):
        text = text.encode()
        array = (self.llama_cpp.llama_token * len(text))()
        return array[:self.llama_cpp.llama_tokenize(self.vocabulary, text, len(text), array, len(text), False, False)]

    def text(self, token):
        import ctypes
        piece = ctypes.create_string_buffer(100)
        return piece[:self.llama_cpp.llama_token_to_piece(self.vocabulary, token, piece, len(piece), 0, False)]


FLASH_OR_NOT = ({"attention": "flash"}, {"attention": "plain"})
PROGRAMS = {
    OURS: Program(Ours),
    "transformers": Program(Transformers, "torch, transformers"),
    "llama.cpp f32": Program(partial(LlamaCpp, weights="f32"), "llama_cpp", FLASH_OR_NOT),
    OURS_BF16: Program(Ours),
    OURS_INT8: Program(Ours),
    "llama.cpp q8_0": Program(partial(LlamaCpp, weights="q8_0"), "llama_cpp", FLASH_OR_NOT),
    OURS_INT4: Program(Ours),
    "llama.cpp q4_0": Program(partial(LlamaCpp, weights="q4_0"), "llama_cpp", FLASH_OR_NOT),
}


def programs_for(model):
    """PROGRAMS; bfloat16 for a Llama only."""
    return {name: program for name, program in PROGRAMS.items() if name != OURS_BF16 or is_llama(benchmark.config_of(model))}


def time_generation(model, vocab_size):
    """Time each reading of the prompt and each new token. The result also has some of the logits after the prompt."""
    import numpy as np
    prompt = np.random.default_rng(benchmark.SEED).integers(vocab_size, size=PROMPT_TOKENS).tolist()
    logits = model.read(prompt).copy()
    others = benchmark.OtherPrograms()
    prompt_seconds, seconds = [], []
    for _ in range(PROMPT_REPEATS):
        model.forget()
        started = time.perf_counter()
        model.read(prompt).argmax()
        prompt_seconds.append(time.perf_counter() - started)
    model.forget()
    token = int(model.read(prompt[:SHORT_PROMPT_TOKENS]).argmax())
    for _ in range(NEW_TOKENS):
        started = time.perf_counter()
        token = int(model.read([token]).argmax())
        seconds.append(time.perf_counter() - started)
    return dict(seconds=seconds, prompt_seconds=prompt_seconds, logits=logits[::LOGITS_STRIDE].tolist(),
                busy_cores=others.cores(), peak_memory=benchmark.peak_memory())


def measure_speed(task):
    model = PROGRAMS[task["program"]].measure(task)
    return time_generation(model, benchmark.config_of(task["model"]).vocab_size) | dict(versions=model.versions())


TASKS = {"model": write_model, "speed": measure_speed}


def write_first_token(task):
    """Write the prompt and the first token after it, as a peer's program."""
    model = PROGRAMS[task["program"]].measure(task)
    token = int(model.read(model.tokens(PROMPT)).argmax())
    print(PROMPT, end="", flush=True)
    sys.stdout.buffer.write(model.text(token) + b"\n")


# ----------------------------------------------------------------------------------------------------------------------
# The process that starts them

def first_token_command(python, task):
    if not is_ours(task["program"]):
        return [python, str(HERE), FIRST_TOKEN, json.dumps(task)]
    script = f"{our_program(benchmark.config_of(task['model']))}.py"
    return [python, str(ROOT / script), "--model", str(Path(task["folder"], OUR_FILES[task["program"]])), "--prompt", PROMPT,
            "--max-new-tokens", "1", "--temperature", "0", "--threads", str(task["threads"])]


def seconds_until(command, size):
    """Seconds from a program's start until it has written `size` bytes. Raises UserError if it fails."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        written = process.stdout.read(size)
        seconds = time.perf_counter() - started
        process.stdout.read()   # the rest, so that it does not write to a closed pipe
    if process.returncode != 0 or len(written) < size:
        raise UserError(f"{' '.join(command)}: ended with status {process.returncode} after {len(written)} bytes of output")
    return seconds


def relative_error(values, truth):
    return hypot(*(value - true for value, true in zip(values, truth, strict=True))) / hypot(*truth)


def measure_all(programs, peers, options, folder):
    """Measure every program. Returns what take_turns returns; each result also has `first_token` (seconds) and `error`."""
    truth = []

    def measure(python, name, variant):
        title = label(name, variant)
        task = dict(title=title, work="speed", program=name, model=options.model, folder=folder,
                    threads=options.threads) | variant
        result = run_task(python, task, HERE)
        truth[:] = truth or result["logits"]    # ours in float32 comes first
        result["error"] = relative_error(result["logits"], truth)
        bounds = LOGITS_BOUND_SMOLLM2 if options.model == SMOLLM2 else LOGITS_BOUND
        bound = bounds[benchmark.ours_beside(name)]
        if not result["error"] <= bound:
            raise UserError(f"{title}: its logits differ from ours by {result['error']:.1e}, expected at most {bound:.0e}: "
                            "it does not compute the same thing")
        result["first_token"] = seconds_until(first_token_command(python, task), len(PROMPT) + 1)
        return result

    def describe(label, result):
        return (f"{label:<21} | {1 / median(result['seconds']):6.1f} tok/s | prompt "
                f"{PROMPT_TOKENS / median(result['prompt_seconds']):6,.0f} tok/s | "
                f"first token {result['first_token']:5.2f} s | logits {result['error']:.1e}")

    return benchmark.take_turns(programs, peers, options.rounds, measure, describe)


class Summary(NamedTuple):
    """The speeds of one program. The ratios are its time / ours."""
    decoding: float     # tokens a second
    decoding_ratio: float
    prompt: float       # tokens a second
    prompt_ratio: float
    first_token: float  # seconds
    first_token_ratio: float
    peak_memory: int


def summarize(results):
    """label -> Summary."""
    def token(result):
        return median(result["seconds"])

    def prompt_token(result):
        return median(result["prompt_seconds"]) / PROMPT_TOKENS

    def first_token(result):
        return result["first_token"]

    ratio = partial(benchmark.time_beside_ours, results)
    return {name: Summary(
        decoding=1 / median(seconds for result in rounds for seconds in result["seconds"]),
        decoding_ratio=ratio(name, token),
        prompt=PROMPT_TOKENS / median(seconds for result in rounds for seconds in result["prompt_seconds"]),
        prompt_ratio=ratio(name, prompt_token),
        first_token=median(map(first_token, rounds)),
        first_token_ratio=ratio(name, first_token),
        peak_memory=max(result["peak_memory"] for result in rounds)) for name, rounds in results.items()}


def print_speeds(summary):
    rows = [(name, f"{row.decoding:,.1f}", f"{row.decoding_ratio:.2f}", f"{row.prompt:,.0f}", f"{row.prompt_ratio:.2f}",
             f"{row.first_token:.2f} s", f"{row.first_token_ratio:.2f}", f"{row.peak_memory / 1e9:.2f} GB")
            for name, row in summary.items()]
    header = ("program", "decoding, tok/s", "time / ours", "prompt, tok/s", "time / ours", "first token", "time / ours",
              "peak memory")
    benchmark.print_table(header, rows, left=1)


def print_errors(results):
    print(f"Relative error of the logits after a prompt of {PROMPT_TOKENS} tokens, from {OURS}'s: "
          + ", ".join(f"{name} {max(result['error'] for result in rounds):.0e}"
                      for name, rounds in results.items() if name != OURS) + ".\n")


def draw_speeds(summary, options):
    def bars(what, number, unit):
        return [Bar(name, getattr(row, what), format(getattr(row, what), number) + unit
                    + ("" if is_ours(name) else f", ours {getattr(row, what + '_ratio'):.2f} x"))
                for name, row in summary.items()]
    groups = {
        f"Decoding, after a prompt of {SHORT_PROMPT_TOKENS} tokens (longer is better)": bars("decoding", ",.1f", " tok/s"),
        f"Reading a prompt of {PROMPT_TOKENS} tokens (longer is better)": bars("prompt", ",.0f", " tok/s"),
        "From the start of the program to the first token (shorter is better)": bars("first_token", ".2f", " s"),
    }
    title = f"{benchmark.title(options.model)}: generating text, {options.threads} CPU threads (ours 2 x: twice as fast)"
    benchmark.draw(groups, title, options.output)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def parse_options():
    parser = benchmark.shared_parser("Time text generation by this program, transformers and llama.cpp, side by side.",
                                     **{SMOLLM2: f"{SMOLLM2} is a Llama with the sizes of SmolLM2-135M"})
    add = parser.add_argument
    add("--python", type=benchmark.python_path, default=sys.executable, metavar="PATH", help="a Python with transformers")
    add("--llama-python", type=benchmark.python_path, default=argparse.SUPPRESS, metavar="PATH",
        help="a Python with llama-cpp-python (default: that of --python)")
    add("--output", type=Path, default=argparse.SUPPRESS, metavar="FILE",
        help=f"the bar chart (default: {HERE.with_suffix('.png')}; of {SMOLLM2}: {SMOLLM2_CHART.name} there)")
    options = parser.parse_args()
    defaults = dict(llama_python=options.python,
                    output=SMOLLM2_CHART if options.model == SMOLLM2 else HERE.with_suffix(".png"))
    return argparse.Namespace(**defaults | vars(options))


def main():
    match sys.argv[1:]:
        case [flag, _] if flag == MEASURE:
            return benchmark.measuring_process(lambda task: TASKS[task["work"]](task))
        case [flag, task] if flag == FIRST_TOKEN:
            return write_first_token(json.loads(task))
    options = parse_options()
    peers = {"torch, transformers": Peers(options.python, "--python", "torch transformers"),
             "llama_cpp": Peers(options.llama_python, "--llama-python", "llama-cpp-python")}
    programs = benchmark.programs_that_run(programs_for(options.model), peers)
    with tempfile.TemporaryDirectory() as folder:
        task = dict(model=options.model, folder=folder, threads=options.threads)
        benchmark.progress("writing the model")
        run_task(sys.executable, task | dict(title="the model", work="model"), HERE)
        results = measure_all(programs, peers, options, folder)
    summary = summarize(results)
    benchmark.progress("")
    hardware = f"{benchmark.cpu_name()}, {options.threads} threads"
    benchmark.print_machine(f"{benchmark.title(options.model)}, text", options, results.values(), hardware)
    print_speeds(summary)
    print_errors(results)
    draw_speeds(summary, options)


if __name__ == "__main__":
    run_program(main)
