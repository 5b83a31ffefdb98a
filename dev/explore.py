"""See what every kernel does in one training step, or how a model reads a prompt.

    python dev/explore.py                                                     one step of a new four-layer model
    python dev/explore.py --model out --batch-size 2                          one step of a trained model
    python dev/explore.py --model out --prompt "ROMEO:" --layer 2 --head 1    the likeliest next tokens, and a head's attention

A step is listed call by call, in the order of train_gpt2.py: how long the kernel took, which arrays it wrote and read, and the
shape and norm of the first array it wrote. The norms show what vanishes or explodes, and where the first NaN appears. Names are
those of the model's memory: qkv[0] is model.acts.qkv[0], and the gradients of parameters begin with "grads.". A + before a name
means that the kernel adds to the array or changes it in place. The times by kernel and the norms by layer follow, as text
and as a picture.
"""
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import gpt2
import kernels_cpu as kernels
import llama
from cli import OneLineParser, UserError, bounded, run_program
from dataloader import DataLoader
from dev.recorder import as_batch, record_step, time_step
from files import atomic_file
from generate_gpt2 import DAMAGED_WEIGHTS_HINT, encode
from gpt2 import chunks, memory_needed
from llama import definition_of
from machine import check_memory, main_memory
from model_files import load_model, load_model_tokenizer
from prepare_tinyshakespeare import prepare
from sampling import softmax
from tokenizer import GPT2Tokenizer
from train_gpt2 import CLASSIFIER_ROWS, GPT2, NO_BIAS, compile_kernels, load_weights
from train_llama import Llama
from training import OUT_OF_MEMORY_HINT, TRAIN_TOKENS, memory_hint

NEW_MODELS = {name: definition for definition in (gpt2, llama) for name in definition.NEW_MODELS}
MODELS = {gpt2: GPT2, llama: Llama}
MAX_LABELS = 64           # tokens along an axis of the picture; more would overlap
ATTENDED = 4              # positions listed for each position of the prompt


# ----------------------------------------------------------------------------------------------------------------------
# Showing a step

def print_columns(rows, right=()):
    """Print rows of strings in aligned columns, the header first; the columns in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (f"{cell:>{width}}" if i in right else f"{cell:<{width}}" for i, (cell, width) in enumerate(zip(row, widths)))
        print("  ".join(cells).rstrip())
    print()


def format_norm(norm):
    return f"{norm:.4g}"


def print_calls(calls):
    """Print one line per call."""
    rows = [("", "ms", "writes", "shape", "norm", "reads")]
    for i, call in enumerate(calls):
        if i == 0 or call.phase != calls[i - 1].phase:
            rows.append((call.phase, *[""] * 5))
        writes = " ".join(f"{'+' if array.read else ''}{array}" for array in call.written)
        shape = "x".join(map(str, call.written[0].shape)) if call.written else ""
        norm = call.written[0].norm if call.written else call.result
        reads = " ".join(map(str, call.read))
        rows.append((f"  {call.kernel}", f"{1000 * call.seconds:.3f}", writes, shape, format_norm(norm), reads))
    print_columns(rows, right=(1, 4))


def times_by_kernel(calls, whole):
    """(kernel, number of calls, total seconds), longest first; then the time that the step spends between kernels."""
    seconds, numbers = Counter(), Counter(call.kernel for call in calls)
    for call in calls:
        seconds[call.kernel] += call.seconds
    return [(kernel, numbers[kernel], time) for kernel, time in seconds.most_common()] + [
        ("(between them)", 0, whole - seconds.total())]


def print_times(times, whole):
    print_columns([("kernel", "calls", "ms", "share")] + [
        (kernel, str(calls or ""), f"{1000 * seconds:.3f}", f"{seconds / whole:.1%}") for kernel, calls, seconds in times] + [
        ("one step", "", f"{1000 * whole:.3f}", "")], right=(1, 2, 3))


class Norms(NamedTuple):
    """Each a dict: name of a tensor -> its norm in every layer."""
    activations: dict
    activation_gradients: dict
    weight_gradients: dict


def norms_by_layer(calls, num_layers):
    """The Norms of the matrices that a step wrote, each after the last call in its layer that wrote it.

    Vectors (statistics, biases, scales) are left out.
    """
    norms = Norms({}, {}, {})
    for call in calls:
        for array in call.written:
            if call.layer is not None and len(array.shape) == 2:
                group = (norms.weight_gradients if array.buffer == "grads" else
                         norms.activations if call.phase == "forward" else
                         norms.activation_gradients if array.buffer == "scratch" and array.name.startswith("d") else None)
                if group is not None:
                    group.setdefault(array.name, [math.nan] * num_layers)[call.layer] = array.norm
    return norms


def print_norms(norms):
    for heading, tensors in (("norms of activations", norms.activations),
                             ("norms of gradients", norms.activation_gradients | {
                                 f"grads.{name}": values for name, values in norms.weight_gradients.items()})):
        print(heading)
        layers = [(str(l), *map(format_norm, values)) for l, values in enumerate(zip(*tensors.values()))]
        print_columns([("layer", *tensors), *layers], right=range(1 + len(tensors)))


def draw_step(norms, times, title, path):
    """Draw a step: its norms by layer and its times by kernel."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(5, 4))
    for i, (heading, tensors) in enumerate(zip(("activations", "gradients of activations", "gradients of weights"), norms)):
        axes = figure.add_subplot(grid[0, i])
        for name, values in tensors.items():
            axes.plot(values, label=name, marker="o", markersize=3.5, linewidth=1)
        axes.set(title=f"norms of {heading}", xlabel="layer", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, fontsize=8)
    axes = figure.add_subplot(grid[1, :])
    names, calls, seconds = zip(*reversed(times))
    bars = axes.barh(names, 1000 * np.array(seconds), color="tab:blue")
    axes.bar_label(bars, [f"{1000 * time:,.2f}" + (f" in {number} calls" if number > 1 else "")
                          for number, time in zip(calls, seconds)], padding=3, fontsize=8)
    axes.set(title="milliseconds by kernel", xlim=(0, 1.15 * 1000 * max(seconds)))
    axes.tick_params(axis="y", length=0)
    for axes in figure.axes:
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save(figure, path)


def save(figure, path):
    with atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")      # a token may hold characters that the font lacks
        figure.savefig(file, dpi=120, format="png")
    print(f"wrote {path}")


def explore_step(config, params, threads, options):
    """Print and draw a training step on the first batch of options.input_bin."""
    B, T = options.batch_size, options.sequence_length
    if T > config.max_seq_len:
        raise UserError(f"--sequence-length is {T}, expected at most {config.max_seq_len}, the context of --model "
                        f"{options.model}", status=2)
    if options.input_bin is None and not TRAIN_TOKENS.exists():
        prepare()
    loader = DataLoader(options.input_bin or TRAIN_TOKENS, B, T)
    loader.check_vocabulary(config.vocab_size, 0, options.model)
    definition = definition_of(config)
    needed = memory_needed(definition.parameter_shapes(config), definition.activation_shapes(config, B, T, options.recompute),
                           definition.scratch_shapes(config, B, T, CLASSIFIER_ROWS))
    check_memory(f"{options.model} with a batch of {B} x {T}", needed, main_memory(), "this machine",
                 memory_hint(options.recompute))
    model = MODELS[definition](config, B, T, threads, recompute=options.recompute)
    load_weights(model, params, None, options.seed)
    batch = as_batch(*loader.next_batch())

    print_model(model, options, f"a step on {B} x {T} tokens")
    calls, loss, norm = record_step(model, batch)
    seconds, whole = time_step(model, batch)
    calls = [call._replace(seconds=time) for call, time in zip(calls, seconds, strict=True)]
    times, norms = times_by_kernel(calls, whole), norms_by_layer(calls, config.num_layers)
    print_calls(calls)
    print_times(times, whole)
    print_norms(norms)
    print(f"loss {loss:.6f} | norm of all gradients {format_norm(norm)} | {1000 * whole:,.1f} ms per step")
    draw_step(norms, times, f"one training step of {options.model}, {B} x {T} tokens: loss {loss:.3f}", options.output)


def print_model(model, options, task):
    config = model.config
    print(f"{options.model}: {config.num_layers} layers, {config.num_heads} heads, {config.channels} channels, "
          f"{model.params.size / 1e6:.1f} M parameters; {task}\n")


# ----------------------------------------------------------------------------------------------------------------------
# A prompt

def attention_weights(qkv, lse, head, num_key_heads):
    """The attention weights p (T, T) of one head: row i holds the weight of each position's value in output i.

    The forward pass does not store p, only qkv (T, (NH + 2*KV)*HS) and lse (NH, T). Since
    lse[i] = log(sum_j exp(score[i, j])), the softmax of a row is p[i, j] = exp(score[i, j] - lse[i]). attention_backward
    recomputes p in the same way.
    """
    NH, T = lse.shape
    HS = qkv.shape[1] // (NH + 2 * num_key_heads)
    q, k = (qkv[:, index * HS:(index + 1) * HS] for index in (head, NH + head * num_key_heads // NH))
    score = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(np.float32(HS)), -np.inf)     # causal mask
    return np.exp(score - lse[head, :, None])


def next_tokens(model, count):
    """The `count` likeliest next tokens (N, count) after each position of the latest forward pass, likeliest first, and the
    probabilities of all tokens (N, V).

    Raises UserError if the logits are not finite.
    """
    N, V = model.tokens.size, model.config.vocab_size
    likeliest, probabilities = np.empty((N, count), dtype=int), np.empty((N, V), dtype=np.float32)
    for rows in chunks(N, CLASSIFIER_ROWS):
        logits = model.scratch.logits[:rows.stop - rows.start]
        kernels.matmul_forward(logits, model.acts.lnf[rows], model.classifier(model.params), NO_BIAS, model.workspace)
        if not np.isfinite(logits).all():
            raise UserError(f"the logits of the prompt are not finite: {DAMAGED_WEIGHTS_HINT}")
        for n, row in enumerate(logits[:, :V], rows.start):
            probabilities[n] = softmax(row, temperature=1)
            candidates = np.argpartition(row, -count)[-count:]
            likeliest[n] = candidates[np.argsort(-row[candidates], kind="stable")]
    return likeliest, probabilities


def print_next_tokens(tokens, likeliest, probabilities, name_of):
    """Print, for each position, its token, the probability the model gave to it, and the likeliest next tokens."""
    rows = [("", "token", "probability", "likeliest next", *[""] * (likeliest.shape[1] - 1))]
    for n, token in enumerate(tokens):
        rows.append((str(n), name_of(token), f"{probabilities[n - 1, token]:.1%}" if n > 0 else "",
                     *(f"{probabilities[n, following]:6.1%} {name_of(following)}" for following in likeliest[n])))
    print_columns(rows, right=(0, 2))


def print_attention(tokens, weights, heading, name_of):
    """Print, for each position, the positions it attends to most."""
    rows = [("", "token", heading, *[""] * (ATTENDED - 1))]
    for n, row in enumerate(weights):
        seen = np.argsort(-row[:n + 1], kind="stable")[:ATTENDED]
        rows.append((str(n), name_of(tokens[n]), *(f"{row[j]:6.1%} {j} {name_of(tokens[j])}" for j in seen),
                     *[""] * (ATTENDED - len(seen))))
    print_columns(rows, right=(0,))


def draw_attention(tokens, weights, title, name_of, path):
    """Draw one head's attention weights, one row per position. Each row sums to 1."""
    from matplotlib.colors import PowerNorm  # its square root makes small weights visible
    from matplotlib.figure import Figure

    T = len(tokens)
    labeled = range(0, T, math.ceil(T / MAX_LABELS))
    labels = [name_of(tokens[t])[1:-1] for t in labeled]
    inches = 1.6 + min(max(0.18 * T, 2.5), 11)
    figure = Figure(figsize=(inches + 0.6, inches), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.where(np.tri(T, dtype=bool), weights, np.nan), cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.set_facecolor("0.9")       # masked
    for axis, place in ((axes.xaxis, "top"), (axes.yaxis, "left")):
        axis.set_ticks(labeled, labels, fontsize=8, parse_math=False)
        axis.set_ticks_position(place)
        axis.set_label_position(place)
    axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.set(xlabel="key position", ylabel="query position")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight", ticks=(0, 0.05, 0.2, 0.5, 1))
    figure.suptitle(title, fontsize=10, parse_math=False)
    save(figure, path)


def explore_prompt(config, params, threads, options):
    """Print the likeliest next tokens of options.prompt; print and draw one head's attention to it."""
    for flag, value, count in (("--layer", options.layer, config.num_layers), ("--head", options.head, config.num_heads)):
        if value >= count:
            raise UserError(f"{flag} is {value}, expected at most {count - 1}: --model {options.model} has {count}, counted "
                            "from 0", status=2)
    tokenizer = (GPT2Tokenizer() if options.model in NEW_MODELS
                 else load_model_tokenizer(options.model, config.vocab_size))
    tokens = encode(tokenizer, options.prompt, config) or tokenizer.begin or [0]
    if len(tokens) > config.max_seq_len:
        raise UserError(f"--prompt is {len(tokens):,} tokens long, expected at most {config.max_seq_len:,}, the model's "
                        "context; shorten it")
    model = MODELS[definition_of(config)](config, 1, len(tokens), threads)
    load_weights(model, params, None, options.seed)
    print_model(model, options, f"a prompt of {len(tokens):,} tokens")
    model.forward(np.array([tokens], dtype=np.int32))

    def name_of(token):
        return repr(tokenizer.decode([token]))

    print_next_tokens(tokens, *next_tokens(model, options.top), name_of)
    qkv, lse = model.acts.qkv[options.layer], model.acts.att_lse[options.layer][0]
    weights = attention_weights(qkv, lse, options.head, config.num_key_heads)
    title = f"layer {options.layer}, head {options.head}"
    print_attention(tokens, weights, f"attends to, in {title}", name_of)
    draw_attention(tokens, weights, f"{options.model}: attention in {title}", name_of, options.output)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def main():
    parser = OneLineParser(description="See what every kernel does in one training step, or how a model reads a prompt.")
    add = parser.add_flag
    positive, count = bounded(int, 1), bounded(int, 0)
    add("--model", default="d4",
        help=f"a new model: one of {', '.join(NEW_MODELS)}; or a pretrained one: a Hugging Face folder or hub name, a "
             ".safetensors file, an llm.c .bin file")
    add("--input-bin", help="tokens of the step's batch: a file, or a glob in quotes (default: Tiny Shakespeare, prepared "
        "if missing)")
    add("--batch-size", default=4, type=positive, help="sequences in the batch, B")
    add("--sequence-length", default=64, type=positive, help="tokens in a sequence, T")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, as in train_gpt2.py --recompute")
    add("--prompt", help="explore this text instead of a step: the likeliest next tokens, and one head's attention")
    add("--top", default=4, type=bounded(int, 1, 50), help="how many of the likeliest next tokens to list")
    add("--layer", default=0, type=count, help="layer whose attention is shown, counted from 0")
    add("--head", default=0, type=count, help="head whose attention is shown, counted from 0")
    add("--seed", default=1337, type=count, help="random seed of a new model's weights")
    add("--threads", type=positive, help="CPU threads (default: one per core)")
    add("--output", default=Path("out", "explore.png"), type=Path, metavar="FILE", help="the PNG to write")
    options = parser.parse_args()

    threads = kernels.use_threads(options.threads)
    config, params = ((NEW_MODELS[options.model].model_config(options.model), None) if options.model in NEW_MODELS
                      else load_model(options.model))
    compile_kernels(config)
    if options.prompt is None:
        explore_step(config, params, threads, options)
    else:
        explore_prompt(config, params, threads, options)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
