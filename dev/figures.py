"""Draw the figures of dev/derivations, one function per figure (DRAWINGS), and the pages of a step (draw_step.py).

    python train_gpt2.py                    saves a trained model in `out`
    python dev/figures.py                   draws all figures
    python dev/figures.py --model FOLDER    with the attention of another model

The numbers come from the program itself: its tables of tensors, its kernels, and the costs in the pages' own code blocks
(`page_costs`). style.py sets how the figures look.
"""
import contextlib
import doctest
import io
import re
import sys
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import kernels_cpu
import llama
from cli import OneLineParser, UserError, run_program
from dev import draw_step, style
from dev.explore import attention_weights
from dev.style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, WIDTH
from generate_gpt2 import encode
from gpt2 import (CHANNELS_PER_HEAD, RESIDUAL_PROJECTIONS, Config, activation_shapes, model_config, parameter_shapes,
                  scratch_shapes)
from model_files import load_model
from tokenizer import GPT2Tokenizer
from train_gpt2 import CLASSIFIER_ROWS, GPT2, compile_kernels

PAGES = Path(__file__).parent / "derivations"
OUT_OF_MEMORY_HINT = "choose a smaller --model"

CENTERED = dict(horizontalalignment="center", verticalalignment="center")

# The processors of the roofline: FLOP/s and bytes/s. Two cores of BENCHMARK.md's Xeon; NVIDIA's data sheet of the H100 SXM.
CPU = "2 CPU cores"
PROCESSORS = {CPU: (385e9, 30e9), "H100, float32": (67e12, 3.35e12), "H100, TF32": (495e12, 3.35e12)}
EXAMPLE_LANE = 13       # of a warp: the one that stands out in the figure of FlashAttention
PROMPT = "ROMEO:\nO my love, my wife!\nDeath hath no power."


# ----------------------------------------------------------------------------------------------------------------------
# Costs, from the pages

def example_blocks(text):
    """A page's ```pycon blocks, in order."""
    return re.findall(r"^```pycon\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def page_costs(name="cost"):
    """Call -> (calls in a step, FLOPs, bytes moved) at B=4 T=1024, from the "Cost" section of every page.

    name: the variable there, "cost" for GPT-2 124M or "llama_cost" for a Llama of its width
    """
    costs = {}
    for page in sorted(PAGES.glob("*.md")):
        _, _, section = page.read_text(encoding="utf-8").partition("\n## Cost\n")
        variables = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for block in example_blocks(section.partition("\n## ")[0]):
                for example in doctest.DocTestParser().get_examples(block):
                    exec(example.source, variables)
        costs |= variables.get(name, {})
    return costs


def print_costs(cost):
    """Print one line per call. cost: call -> (calls in a step, FLOPs, bytes moved)."""
    width = max(24, *map(len, cost))
    for call, (calls, flops, moved) in cost.items():
        print(f"{call:{width}} {calls:2} x  {flops / 1e9:7.3f} GFLOP  {moved / 1e6:7.1f} MB  {flops / moved:7.2f} FLOP/byte")


# ----------------------------------------------------------------------------------------------------------------------
# One function per figure: (pyplot, (Config and parameters of a trained model)) -> the figure

def draw_gelu(pyplot, model):
    x = np.linspace(-4, 4, 801, dtype=np.float32).reshape(1, -1)
    out, slope = np.empty_like(x), np.empty_like(x)
    kernels_cpu.gelu_forward(out, x)
    kernels_cpu.gelu_backward(slope, np.ones_like(x), x)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.plot(x[0], np.maximum(x[0], 0), color=INK, linewidth=1, linestyle="dotted", label="max(x, 0)")
    axes.plot(x[0], out[0], color=BLUE, label="gelu(x)")
    axes.plot(x[0], slope[0], color=ORANGE, label="gelu'(x)")
    axes.set(xlabel="x", ylim=(-0.4, 4.1))
    axes.legend(loc="upper left")
    return figure


def draw_swiglu(pyplot, model):
    x = np.linspace(-6, 6, 1201, dtype=np.float32).reshape(-1, 1)
    inp = np.hstack([x, np.ones_like(x)])       # gates x and values 1: silu(x) itself
    out, slopes, gelu = np.empty_like(x), np.empty_like(inp), np.empty_like(x)
    kernels_cpu.swiglu_forward(out, inp)
    kernels_cpu.swiglu_backward(slopes, np.ones_like(x), inp)
    kernels_cpu.gelu_forward(gelu, x)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.plot(x, gelu, color=INK, linewidth=1, linestyle="dotted", label="gelu(x)")
    axes.plot(x, out, color=BLUE, label="silu(x)")
    axes.plot(x, slopes[:, 0], color=ORANGE, label="silu'(x)")
    axes.set(xlabel="x", ylim=(-0.5, 4.1))
    axes.legend(loc="upper left")
    return figure


def draw_rope(pyplot, model):
    HS, positions = 64, 257
    figure, (turns, scores) = pyplot.subplots(1, 2, figsize=(WIDTH, 3.4))
    for base, color in ((10_000, BLUE), (100_000, ORANGE)):
        config = llama.Config(positions, 128, 128, num_layers=1, num_heads=1, num_key_heads=1, head_size=HS, channels=HS,
                              hidden=HS, rope_base=base)
        cos, sin = llama.rotations(config, config.max_seq_len)
        rows = np.ones((positions, HS), dtype=np.float32)
        kernels_cpu.rope(rows, cos, sin, 1, positions, 0, 1)
        scores.plot(rows @ rows[0] / HS, color=color, linewidth=1.5, label=f"base {base:,}")
        if base == 10_000:
            for i, pair_color in ((0, FAINT), (6, BLUE), (10, ORANGE), (16, GREEN)):
                turns.plot(cos[:129, i], color=pair_color, linewidth=1.5, label=f"pair {i}")
    turns.set(xlabel="position", title="cosine of the angle, base 10,000", ylim=(-1.1, 1.75), yticks=(-1, 0, 1))
    turns.legend(loc="upper center", ncols=2)
    scores.set(xlabel="distance", title="score of equal vectors", ylim=(0, 1.05))
    scores.legend(loc="upper right")
    return figure


def draw_layernorm(pyplot, model):
    inp = np.array([0.2, -1.1, 0.6, 1.9, -0.4, 0.9, -1.6, 0.3])
    C = inp.size
    rstd = 1 / np.sqrt(inp.var() + kernels_cpu.LAYERNORM_EPSILON)
    norm = (inp - inp.mean()) * rstd
    terms = [np.eye(C), -np.ones((C, C)) / C, -np.outer(norm, norm) / C]
    titles = ["1: the element\nitself", "-1/C: through\nthe row's mean", "-norm[i] norm[j] / C:\nthrough its rstd",
              "∂norm[i] / ∂inp[j],\nin units of rstd"]
    figure, panels = pyplot.subplots(1, 4, figsize=(WIDTH, 2.7))
    for axes, matrix, title, sign in zip(panels, [*terms, sum(terms)], titles, ["+", "+", "=", ""]):
        heatmap(axes, matrix)
        axes.set(xticks=[], yticks=[], title=title)
        axes.text(1.1, 0.5, sign, transform=axes.transAxes, fontsize=16, **CENTERED)
    panels[0].set(xlabel="norm[i]", ylabel="inp[j]")
    return figure


def heatmap(axes, matrix):
    """Draw a matrix of numbers from -1 to 1: blue above zero, orange below, more transparent the closer to zero."""
    from matplotlib.colors import to_rgb
    pixels = np.empty((*matrix.shape, 4))
    pixels[..., :3] = np.where(matrix[..., None] > 0, to_rgb(BLUE), to_rgb(ORANGE))
    pixels[..., 3] = np.minimum(np.abs(matrix), 1) ** 0.5
    axes.imshow(pixels)
    axes.spines[:].set_visible(True)


def draw_attention_tiles(pyplot, model):
    from matplotlib.patches import Polygon, Rectangle
    size, tiles = kernels_cpu.QUERY_TILE, 4
    T = tiles * size
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.8))
    for tile in range(tiles):
        start, stop = tile * size, (tile + 1) * size
        axes.add_patch(Rectangle((0, start), stop, size, facecolor=FAINT, edgecolor="none",
                                 label="computed with its tile, then masked" if tile == 0 else None))
        axes.add_patch(Polygon([(0, start), (start, start), (stop, stop), (0, stop)], facecolor=BLUE, edgecolor="none",
                               label="attention weight: j ≤ i" if tile == 0 else None))
        axes.add_patch(Rectangle((0, start), stop, size, facecolor="none", edgecolor=INK, linewidth=1.2))
        axes.text(stop + 10, start + size / 2, f"tile {tile}", verticalalignment="center")
    for x, ends, text in ((1.3 * T, (0.35 * T, T), "forward:\nfirst tile\nto last"),
                          (1.85 * T, (T, 0.35 * T), "backward:\nlast tile\nto first")):
        axes.annotate("", (x, ends[1]), (x, ends[0]), arrowprops=dict(arrowstyle="->", color=INK, linewidth=1.2))
        axes.text(x + 12, 0.68 * T, text, verticalalignment="center")
    edges = range(0, T + 1, size)
    axes.set(xlim=(0, 2.3 * T), ylim=(T, 0), aspect="equal", ylabel="query i")
    axes.set_xticks(edges, edges)
    axes.set_yticks(edges, edges)
    axes.set_xlabel("key j", loc="left")
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper right")
    return figure


def draw_attention(pyplot, model):
    config, params = model
    encoding = GPT2Tokenizer()
    tokens = encoding.encode(PROMPT)
    model = GPT2(config, 1, len(tokens), threads=1)
    model.set_params(params)
    model.forward(np.array([tokens], dtype=np.int32))
    weights = {(l, h): attention_weights(model.acts.qkv[l], model.acts.att_lse[l][0], h, model.config.num_heads)
               for l in range(config.num_layers) for h in range(config.num_heads)}
    ranking = sorted(weights, key=lambda head: evenness(weights[head]))
    labels = [encoding.decode([token]).replace("\n", "\\n") for token in tokens]
    figure, panels = pyplot.subplots(1, 2, figsize=(WIDTH, 4.6), sharey=True)
    for axes, (l, h), kind in zip(panels, (ranking[-1], ranking[0]), ("most even", "most concentrated")):
        heatmap(axes, weights[l, h])
        axes.set_title(f"layer {l}, head {h}: the {kind}")
        axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        axes.set_xlabel("key position")
    panels[0].set_ylabel("query position")
    panels[1].tick_params(left=False)
    return figure


def evenness(p):
    """The entropy of a head's weights p (T, T) as a fraction of the maximum: 1 if a row's weights are equal, 0 if one is 1.

    Averaged over the positions. The first two are left out: they have too few keys to be concentrated or even.
    """
    return np.mean([-np.sum(row * np.log(np.maximum(row, 1e-30))) / np.log(n) for n, row in enumerate(p, 1) if n > 2])


def lanes_of_sums():
    """The lane of a warp that holds each number of a (16, 8) sum of tensor cores: row_of and column_of in kernels_gpu.py."""
    lanes = np.empty((16, 8), dtype=int)
    for lane in range(32):
        for i in range(4):
            lanes[lane // 4 + i // 2 * 8, 2 * (lane % 4) + i % 2] = lane
    return lanes


def lanes_of_left_factor():
    """The same of a (16, 16) left factor: register i of a lane has a pair of neighbors in a row."""
    lanes = np.empty((16, 16), dtype=int)
    for lane in range(32):
        for i in range(4):
            column = i // 2 * 8 + 2 * (lane % 4)
            lanes[lane // 4 + i % 2 * 8, column:column + 2] = lane
    return lanes


def lanes_of_right_factor():
    """The same of a (16, 8) right factor: register i of a lane has a pair of neighbors in a column."""
    lanes = np.empty((16, 8), dtype=int)
    for lane in range(32):
        for i in range(2):
            row = i * 8 + 2 * (lane % 4)
            lanes[row:row + 2, lane // 4] = lane
    return lanes


def draw_flash_attention(pyplot, model):
    figure, ((scores, right), (left, sums)) = pyplot.subplots(2, 2, figsize=(WIDTH, 7.2), width_ratios=(16, 8))
    halves = "[0], [1]", "[2], [3]"
    draw_lanes(scores, "two sums, 16 x 8 each", np.hstack(2 * [lanes_of_sums()]), (1, 2), ("x[2k]", "x[2k + 1]"), halves)
    draw_lanes(right, "right factor, 16 x 8", lanes_of_right_factor(), (2, 1), ("",), ("tiles[0]", "tiles[1]"))
    draw_lanes(left, "left factor, 16 x 16", lanes_of_left_factor(), (1, 2), ("pairs[k][0]", "pairs[k][2]"), ("", ""))
    draw_lanes(sums, "sums += left @ right", lanes_of_sums(), (1, 2), ("x[n]",), halves)
    for x, name in ((3.5, "pairs[k][1]"), (11.5, "pairs[k][3]")):
        left.text(x, 16.3, name, **CENTERED)
    arrow = left.annotate("", (-1.4, 7.5), (-1.4, 7.5), textcoords=scores.transData, annotation_clip=False,
                          arrowprops=dict(arrowstyle="->", color=INK, linewidth=1.2))
    arrow.set_in_layout(False)
    scores.text(-2.2, 17, "round_to_factor", rotation=90, in_layout=False, **CENTERED)
    return figure


def draw_lanes(axes, title, lanes, pair, columns, rows):
    """Draw which lane holds each number of a matrix: a cell with the lane's number for each pair of numbers.

    The color stands for lane % 4, and red for one lane, as an example.
    pair: its shape, (1, 2) or (2, 1)
    columns, rows: what the tiles of 8 x 8 are called, above and to the right
    """
    from matplotlib.patches import Rectangle
    height, width = pair
    for row in range(0, len(lanes), height):
        for column in range(0, len(lanes[0]), width):
            lane = lanes[row, column]
            color = RED if lane == EXAMPLE_LANE else (BLUE, ORANGE, GREEN, PURPLE)[lane % 4]
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), width - 0.08, height - 0.08, facecolor=color))
            axes.text(column + (width - 1) / 2, row + (height - 1) / 2, str(lane), color="white", fontsize=8, **CENTERED)
    for row in range(0, len(lanes), 8):
        axes.text(len(lanes[0]) - 0.2, row + 3.5, rows[row // 8], verticalalignment="center")
        for column in range(0, len(lanes[0]), 8):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 8, 8, facecolor="none", edgecolor=INK, linewidth=1.2))
    for column, name in zip(range(0, len(lanes[0]), 8), columns):
        axes.text(column + 3.5, -1.2, name, **CENTERED)
    axes.set_title(title, pad=20 if columns[0] else 6)
    axes.set(xlim=(-0.6, len(lanes[0]) - 0.4), ylim=(len(lanes) - 0.4, -0.6), aspect="equal")
    axes.set_axis_off()


def draw_initialization(pyplot, model):
    depths = (1, 2, 4, 6, 12, 24, 36, 48)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    for scaled, color, label in ((False, ORANGE, "all weights from N(0, 0.02)"),
                                  (True, BLUE, "residual projections scaled by 1/sqrt(2L)")):
        axes.plot(depths, [stream_deviation(depth, scaled) for depth in depths], color=color, marker="o", label=label)
    axes.set(xlabel="blocks, L", ylabel="std of the residual stream\nafter the last block", xticks=depths[2:], ylim=(0, None))
    axes.legend(loc="upper left")
    return figure


def stream_deviation(depth, scaled):
    """The standard deviation of a new model's residual stream after its last block."""
    config = Config(32, 128, 128, depth, num_heads=1, channels=CHANNELS_PER_HEAD)
    model = GPT2(config, 1, config.max_seq_len, threads=1)
    model.initialize(seed=0)
    if not scaled:
        for name in RESIDUAL_PROJECTIONS:
            getattr(model.params, name)[...] *= np.float32(np.sqrt(2 * depth))
    model.forward(np.random.default_rng(0).integers(config.vocab_size, size=(1, config.max_seq_len), dtype=np.int32))
    return model.acts.residual3[-1].std()


def draw_memory(pyplot, model):
    config = model_config("d12")
    parameters = gigabytes(parameter_shapes(config))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    batches = {"4 x 64": (4, 64, False), "1 x 1024": (1, 1024, False), "4 x 1024, --recompute": (4, 1024, True),
               "4 x 1024": (4, 1024, False)}
    for y, (B, T, recompute) in enumerate(batches.values()):
        scratch = scratch_shapes(config, B, T, CLASSIFIER_ROWS)
        sizes = {
            "parameters": parameters,
            "gradients": parameters,
            "AdamW's moments": 2 * parameters,
            "activations": gigabytes(activation_shapes(config, B, T, recompute)),
            "scratch": gigabytes(scratch),
        }
        rows, _ = scratch["logits"]
        avoided = gigabytes({"attention weights": (1 if recompute else config.num_layers, B, config.num_heads, T, T),
                             "logits": (B * T - rows, config.padded_vocab_size)})
        bars, total = [], 0
        for size, color in zip(sizes.values(), (BLUE, ORANGE, PURPLE, GREEN, RED)):
            bars.append(axes.barh(y, size, left=total, height=0.6, color=color))
            total += size
        bars.append(axes.barh(y, avoided, left=total, height=0.6, facecolor="none", edgecolor=INK, linestyle="dashed"))
        instead = f", not {total + avoided:.1f}" if avoided > 0.1 else ""
        axes.text(total + avoided + 0.05, y, f"{total:.1f}{instead}", verticalalignment="center")
    axes.set_yticks(range(len(batches)), batches)
    axes.set(xlabel="GB of memory for a step of GPT-2 124M", xlim=(0, 9))
    axes.legend(bars, [*sizes, "avoided: attention weights, logits"], loc="upper center", bbox_to_anchor=(0.45, 1.32),
                ncols=3)
    return figure


def gigabytes(shapes):
    """The size of a table of float32 tensors, name -> shape."""
    return 4 * sum(map(prod, shapes.values())) / 1e9


def draw_roofline(pyplot, model):
    kernels = {}
    for call, (calls, flops, moved) in page_costs().items():
        kernels.setdefault(call.partition(",")[0], []).append((flops / moved, calls * least_seconds(flops, moved)))
    names = sorted(kernels, key=lambda name: np.mean(kernels[name], axis=0)[0])
    figure, (axes, columns) = pyplot.subplots(1, 2, figsize=(WIDTH, 4.8), sharey=True, width_ratios=(2.7, 1))
    for (processor, (flops, bandwidth)), dashes in zip(PROCESSORS.items(), ("solid", "dashed", "dotted")):
        balance = flops / bandwidth
        axes.axvline(balance, color=INK, linewidth=1.2, linestyle=dashes, label=f"{processor}: {balance:.0f}")
    flops, bandwidth = PROCESSORS[CPU]
    for y, name in enumerate(names):
        intensities, seconds = np.array(kernels[name]).T
        share = np.minimum(1, intensities * bandwidth / flops).mean()
        axes.plot(intensities, np.full(len(intensities), y), "o", color=ORANGE if share == 1 else BLUE, markersize=7)
        for x, text in enumerate((f"{share:.1%}", f"{1000 * sum(seconds):,.0f}" if any(seconds) else "-")):
            columns.text(x, y, text, horizontalalignment="right", verticalalignment="center")
    for x, heading in enumerate(("of peak\nFLOP/s", "ms/step,\nat least")):
        columns.text(x, len(names) - 0.2, heading, horizontalalignment="right")
    columns.set(xlim=(-0.6, 1))
    columns.set_axis_off()
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlim=(0.05, 1000), ylim=(-0.7, len(names) - 0.3), xlabel="FLOP/byte")
    axes.grid(axis="x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.3, 1), ncols=3, columnspacing=1, handlelength=1.5)
    return figure


def least_seconds(flops, moved):
    """A lower bound on a call's time on the two cores: its FLOPs at peak rate or its bytes at full bandwidth."""
    peak_flops, bandwidth = PROCESSORS[CPU]
    return max(flops / peak_flops, moved / bandwidth)


DRAWINGS = {
    "gelu.png": draw_gelu,
    "swiglu.png": draw_swiglu,
    "rope.png": draw_rope,
    "layernorm.png": draw_layernorm,
    "attention_tiles.png": draw_attention_tiles,
    "attention.png": draw_attention,
    "flash_attention.png": draw_flash_attention,
    "initialization.png": draw_initialization,
    "memory.png": draw_memory,
    "roofline.png": draw_roofline,
}


def draw(name, model, folder):
    """Write one figure into a folder. Raises UserError if it cannot be written."""
    style.draw(lambda pyplot: DRAWINGS[name](pyplot, model), folder / name)


def main():
    parser = OneLineParser(description="Draw the figures of dev/derivations, and the pages of a step.")
    parser.add_flag("--model", default=Path("out"), type=Path, help="folder of a trained model, to draw its attention")
    options = parser.parse_args()
    if not options.model.is_dir():
        raise UserError(f"there is no folder {options.model}; run python train_gpt2.py to train a model, or name a trained one "
                        "with --model")
    config, params = load_model(options.model)
    length = len(encode(GPT2Tokenizer(), PROMPT, config))
    if length > config.max_seq_len:
        raise UserError(f"the prompt of the figure is {length} tokens long, expected at most {config.max_seq_len}, the model's "
                        "context; name another --model")
    compile_kernels(config)
    for name in DRAWINGS:
        draw(name, (config, params), PAGES)
    draw_step.draw_all()


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
