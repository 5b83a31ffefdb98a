"""Draw one training step on one page: which kernels are called, in which order, and which memory they read and write.

    python dev/draw_step.py                   writes dev/training_step.png, as dev/figures.py does among others

The picture is made from the calls themselves, recorded in a step of a tiny model (recorder.py), so it shows what train_gpt2.py
does and not what somebody remembers of it. The calls and sizes are written into the file, too, as the text `Description`: a
test holds them against those of today.
"""
import sys
from itertools import groupby
from math import prod
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

import kernels_cpu as kernels
from dev import style
from dev.recorder import TINY, record_step, tiny_step
from dev.style import INK, WIDTH
from cli import OneLineParser, run_program
from gpt2 import activation_shapes, memory_needed, model_config, parameter_shapes, scratch_shapes
from train_gpt2 import CLASSIFIER_ROWS, compile_kernels

OUT_OF_MEMORY_HINT = "close other programs"
PICTURE = HERE.with_name("training_step.png")
CONFIG, B, T = model_config("d12"), 4, 1024     # whose sizes are drawn: GPT-2 124M
PARAMS, ACTS, SCRATCH = SIZES = (parameter_shapes(CONFIG), activation_shapes(CONFIG, B, T),
                                 scratch_shapes(CONFIG, B, T, CLASSIFIER_ROWS))
TURN = "fused_classifier"                       # where forward becomes backward
LAYER = 1                                       # the one that stands for all: the first is a little different

# Inches, from the top left. At README width an inch has some 105 pixels.
LEFT, MIDDLE, RIGHT = (0.2, 2.2), (2.6, 1.8), (4.5, 3.3)      # columns: x and width
DOWN, UP = 0.36, 7.64                           # where the step flows
LINE = 0.148                                   # from one line of a card to the next
CARD, ROW = 0.19 + 2 * LINE, 0.56               # heights of a call and of its row
CORNER = 0.04
FONT = "DejaVu Sans Mono"
LETTER = 0.602 / 72                             # width of one of its letters, for each point of its size
SMALL, MEDIUM, LARGE = 7.2, 8.2, 9.2

# Every color reads on a white page and on a black one: letters stand on grounds of their own, or are INK.
CARD_GROUND, CARD_EDGE, CARD_TEXT, CARD_LABEL = "#3b4858", "#5d6c7d", "#ffffff", "#b4c0cc"
COLORS = {                                     # buffer -> its ground and its letters
    "params": ("#a8c7fa", "#0a2351"),
    "acts": ("#9fdcae", "#073b1a"),
    "grads": ("#f9b4a2", "#5b1606"),
    "scratch": ("#f4df9a", "#463600"),
    "adam": ("#d3c2f5", "#2c1760"),
    "batch": ("#d3d9df", "#1d2731"),
}
MEANINGS = {
    "params": "parameters",
    "acts": "activations, kept for backward",
    "grads": "gradients of the parameters",
    "scratch": "reused from layer to layer",
    "adam": "the optimizer's moments",
    "batch": "tokens and targets",
}


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn

def mirror(forward, backward):
    """Pairs (forward call, its backward call or None) in the order of the forward pass.

    A kernel's twin has its name but for the end, and there need not be one. Raises ValueError if the calls of backward are not
    the twins of forward's in the reverse order.
    """
    twins = [twin if hasattr(kernels, twin := call.kernel.replace("_forward", "_backward")) else None for call in forward]
    expected, found = [twin for twin in reversed(twins) if twin], [call.kernel for call in backward]
    if found != expected:
        raise ValueError(f"the backward pass does not mirror the forward pass: found {found}, expected {expected}")
    rest = list(backward)
    return [(call, rest.pop() if twin else None) for call, twin in zip(forward, twins)]


class Step:
    """The calls of a step of the tiny model as they are drawn: of all layers one.

    pairs: of forward and backward calls, see `mirror`, in three parts: before the layers, one layer, after the layers
    turn: the call between forward and backward
    update: the calls after the backward pass, once for each kernel
    first_layer: (name, name in its stead in the first layer) where those differ
    description: all that is drawn, in words

    Raises ValueError if the calls cannot be drawn so: backward does not mirror forward, or the layers differ.
    """

    def __init__(self, calls):
        turn = next(i for i, call in enumerate(calls) if call.kernel == TURN)
        first_of_update = next(i for i, call in enumerate(calls) if call.phase == "update")
        self.turn = calls[turn]
        pairs = mirror(calls[:turn], calls[turn + 1:first_of_update])
        groups = {layer: list(group) for layer, group in groupby(pairs, key=lambda pair: pair[0].layer) if layer is not None}
        if list(groups) != list(range(TINY.num_layers)):
            raise ValueError(f"layers were visited in the order {list(groups)}")
        self.first_layer, *others = (differences(group, groups[LAYER]) for group in groups.values())
        if any(others):
            raise ValueError(f"the layers differ, and one cannot stand for all: {others}")
        before, after = pairs[:pairs.index(groups[0][0])], pairs[pairs.index(groups[TINY.num_layers - 1][-1]) + 1:]
        self.pairs = before, groups[LAYER], after
        self.update = list({call.kernel: call for call in calls[first_of_update:]}.values())
        self.updates = {call.kernel: sum(other.kernel == call.kernel for other in calls) for call in self.update}
        self.description = "\n".join([f"{call.phase}: {call}" for call in calls] +
                                     [f"{name}: {shape}" for shapes in SIZES for name, shape in shapes.items()])


def todays_step():
    """The Step that train_gpt2.py takes."""
    calls, _, _ = record_step(*tiny_step())
    return Step(calls)


def differences(group, other):
    """(other's name, group's name) wherever two layers' pairs of calls have different arrays.

    Raises ValueError if they call other kernels.
    """
    found = {}
    for calls, other_calls in zip(group, other, strict=True):
        for call, other_call in zip(calls, other_calls):
            if (call and call.kernel) != (other_call and other_call.kernel):
                raise ValueError("the layers differ, and one cannot stand for all")
            if call:
                for array, other_array in zip(call.arrays, other_call.arrays, strict=True):
                    if label(array, call) != label(other_array, other_call):
                        found[label(other_array, other_call)] = label(array, call)
    return list(found.items())


def label(array, call):
    """An array's name in the picture; within a layer those of the same layer do without its number."""
    if array.layer is None or array.layer == call.layer:
        return array.tensor
    if call.layer is None:
        return f"{array.tensor}[L-{TINY.num_layers - array.layer}]"
    return f"{array.tensor}[l-{call.layer - array.layer}]"


def color_of(array):
    return COLORS[array.buffer.removesuffix("_m").removesuffix("_v")]


def megabytes(nbytes):
    """In words, to two digits or more."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e7 else \
        f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.0f} KB"


# ----------------------------------------------------------------------------------------------------------------------
# How it is drawn

class Page:
    """A figure without axes, to draw on in inches from its top left."""

    def __init__(self, width, height):
        from matplotlib.figure import Figure
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x, y, text, color=INK, size=SMALL, **settings):
        self.axes.text(x, y, text, **{"color": color, "fontsize": size, "family": FONT, "va": "center", "parse_math": False}
                       | settings)

    def box(self, x, y, width, height, ground="none", edge="none", corner=CORNER, **settings):
        """A rectangle with round corners, with its top left at x, y."""
        from matplotlib.patches import FancyBboxPatch
        self.axes.add_patch(FancyBboxPatch((x + corner, y + corner), width - 2 * corner, height - 2 * corner, facecolor=ground,
                                           edgecolor=edge, **{"boxstyle": f"round,pad={corner}", "linewidth": 0.8} | settings))

    def flow(self, *points):
        """A line through points (x, y), behind all else, with a head at the last, up or down."""
        *_, (_, before), (x, y) = points
        self.axes.plot(*zip(*points), color=INK, linewidth=1.2, solid_joinstyle="round", zorder=-1)
        self.axes.plot(x, y, "v" if y > before else "^", color=INK, markersize=5, zorder=-1)

    def loop(self, y, rows, heading, middle="", right=""):
        """A frame around so many rows, the first of which is at height y."""
        self.box(0.07, y - 0.2, WIDTH - 0.14, rows * ROW + 0.2, edge=INK, corner=0.08, linewidth=0.8, zorder=-2)
        self.text(DOWN + 0.1, y - 0.1, heading)
        self.text(center(MIDDLE), y - 0.1, middle, ha="center")
        self.text(UP - 0.1, y - 0.1, right, ha="right")

    def chip(self, x, y, text, colors):
        """A name on the ground of its buffer, its middle at height y. Returns where the next may begin."""
        ground, letters = colors
        width = LETTER * SMALL * len(text) + 0.07
        self.box(x, y - 0.065, width, 0.13, ground, corner=0.025, linewidth=0)
        self.text(x + 0.035, y + 0.004, text, letters)
        return x + width + 0.035

    def card(self, column, y, call, times=1):
        """One call: its kernel, what it writes and what it reads besides."""
        x, width = column
        lines = [(verb, arrays) for verb, arrays in (("writes", call.written), ("reads", call.read)) if arrays]
        self.box(x, y, width, CARD - (2 - len(lines)) * LINE, CARD_GROUND, CARD_EDGE)
        self.text(x + 0.08, y + 0.1, call.kernel, CARD_TEXT, MEDIUM, weight="bold")
        if times > 1:
            self.text(x + width - 0.08, y + 0.1, f"for each of {times} tensors", CARD_LABEL, ha="right")
        for i, (verb, arrays) in enumerate(lines):
            line = y + 0.1 + (i + 1) * LINE
            self.text(x + 0.08, line, verb, CARD_LABEL, SMALL - 1)
            at = x + 0.43
            for array in arrays:
                name = array.buffer if times > 1 else label(array, call)
                at = self.chip(at, line, ("+" if array.written and array.read else "") + name, color_of(array))


def center(column):
    return column[0] + column[1] / 2


def edge(column):
    return column[0] + column[1]


def draw(step, path):
    """Write the picture of a Step."""
    before, layer, after = step.pairs       # of the last, what makes logits and takes their gradient is part of `backward`
    of_all_rows, of_chunks = ([pair for pair in after if pair[0].phase == phase] for phase in ("forward", "backward"))
    update_top = 1.64
    top = update_top + len(step.update) * (ROW - LINE) + 0.28
    layers_top = top + len(before) * ROW + 0.24
    after_top = layers_top + len(layer) * ROW + 0.08
    chunks_top = after_top + len(of_all_rows) * ROW + 0.24
    turn_top = chunks_top + len(of_chunks) * ROW
    memory_top = turn_top + ROW + 0.2
    page = Page(WIDTH, memory_top + 0.85)

    # The heading and the legend.
    x = LEFT[0]
    page.text(x, 0.2, "One training step", size=15, weight="bold")
    page.text(x, 0.45, "Every kernel call of train_gpt2.py, recorded as it ran. "
              f"Sizes: all layers of GPT-2 124M, B = {B}, T = {T}.")
    for i, (buffer, meaning) in enumerate(MEANINGS.items()):
        at, y = x + (i % 3) * 2.6, 0.7 + i // 3 * 0.19
        page.text(page.chip(at, y, buffer, COLORS[buffer]) + 0.02, y, meaning)
    page.text(x, 1.08, "+ before a name: what it held before counts, it is added to or changed in place")
    page.text(x, 1.24, "dln is the gradient of lnf, ln2 or ln1; dfch that of fch_gelu, then of fch; "
              "dresidual that of the stream, at first 0")

    # The columns, and the flow through them: down, around, up, and back to the beginning.
    loop, turn = update_top + (CARD - LINE) / 2, turn_top + CARD / 2
    page.flow((RIGHT[0], loop), (DOWN, loop), (DOWN, top - 0.05))
    page.flow((DOWN, top), (DOWN, turn), (UP, turn), (UP, update_top + CARD + ROW - 2 * LINE + 0.05))
    page.text(DOWN + 0.1, loop + 0.12, "the next step, with the new parameters")
    for x, y, heading in ((DOWN + 0.1, top, "forward"), (MIDDLE[0], top, "what it leaves"),
                          (RIGHT[0], top, "backward: read upwards"), (RIGHT[0], update_top, "update")):
        page.text(x, y - 0.12, heading, size=LARGE, weight="bold")
    for i, call in enumerate(reversed(step.update)):
        page.card(RIGHT, update_top + i * (ROW - LINE), call, step.updates[call.kernel])

    # The calls, forward beside backward, and between them what the one leaves for the other.
    exceptions = "".join(f"; where l = 0, {name} is {instead}" for name, instead in step.first_layer)
    page.loop(layers_top, len(layer), "for l in range(L):", f"L = {CONFIG.num_layers}{exceptions}", "reversed(range(L)):")
    page.loop(chunks_top, len(of_chunks) + 1, f"for {CLASSIFIER_ROWS} of the N = B*T rows at a time, in backward():")
    for first, pairs in ((top, before), (layers_top, layer), (after_top, of_all_rows), (chunks_top, of_chunks)):
        for i, (forward, backward) in enumerate(pairs):
            y = first + i * ROW
            page.card(LEFT, y, forward)
            draw_kept(page, y + CARD / 2, forward)
            if backward:
                page.card(RIGHT, y, backward)
            else:
                page.text(UP - 0.1, y + CARD / 2 - 0.07, "no kernel: dresidual is", ha="right")
                page.text(UP - 0.1, y + CARD / 2 + 0.07, "the gradient of both terms", ha="right")
    page.card((center(MIDDLE) - 1.2, 2.4), turn_top, step.turn)
    draw_memory(page, memory_top)
    style.save(page.figure, path, step.description)


def draw_kept(page, y, call):
    """What a forward call leaves for the backward pass, as bars to scale, around height y."""
    x, _ = MIDDLE
    largest = max(map(prod, ACTS.values()))
    kept = [array for array in call.written if array.buffer == "acts"]
    for i, array in enumerate(kept):
        line = y + (i - (len(kept) - 1) / 2) * LINE
        size = prod(ACTS[array.name])
        page.text(x + 0.55, line, array.name, ha="right")
        bar = max(0.7 * size / largest, 0.01)
        page.box(x + 0.61, line - 0.055, bar, 0.11, COLORS[array.buffer][0], corner=0, linewidth=0)
        page.text(x + 0.61 + bar + 0.05, line, megabytes(4 * size))


def draw_memory(page, y):
    """All that a step needs, as one bar to scale."""
    params, acts, scratch = (4 * sum(map(prod, shapes.values())) for shapes in SIZES)
    total = memory_needed(CONFIG, ACTS, SCRATCH)
    x, scale = LEFT[0], (edge(RIGHT) - LEFT[0]) / total
    page.text(x, y, f"memory: {megabytes(total)}", size=LARGE, weight="bold")
    for buffer, size in (("params", params), ("grads", params), ("adam_m", params), ("adam_v", params), ("acts", acts),
                         ("scratch", scratch)):
        ground, letters = COLORS[buffer.split("_")[0]]
        page.box(x, y + 0.12, scale * size - 0.02, 0.38, ground, corner=0, linewidth=0)
        for line, text in ((0.24, buffer), (0.38, megabytes(size))):
            letter_size = min(SMALL - 0.7, (scale * size - 0.08) / (LETTER * len(text)))
            page.text(x + scale * size / 2 - 0.01, y + line, text, letters, letter_size, ha="center")
        x += scale * size
    at = LEFT[0]
    for name, shape in SCRATCH.items():
        at = page.chip(at, y + 0.66, f"{name} {megabytes(4 * prod(shape))}", COLORS["scratch"]) + 0.03


def main():
    parser = OneLineParser(description="Draw one training step on one page.")
    parser.add_flag("--output", default=PICTURE, type=Path, metavar="FILE", help="the PNG to write")
    options = parser.parse_args()
    compile_kernels()
    draw(todays_step(), options.output)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
