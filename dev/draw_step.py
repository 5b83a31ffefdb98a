"""Draw one training step on one page: which kernels are called, in which order, and which memory they read and write.

    python dev/draw_step.py                   writes dev/training_step.png and dev/training_step_llama.png
                                              (dev/figures.py draws them, too)

Each is drawn from a recording of a real step of a tiny model (recorder.py), so it shows what train_gpt2.py or train_llama.py
actually does. The calls and sizes are also stored in the file, as the PNG text `Description`: a test fails when they change.
"""
import sys
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt2
import kernels_cpu as kernels
import llama
from cli import OneLineParser, run_program
from dev import style
from dev.recorder import TINY, record_step, tiny, tiny_step
from dev.style import INK, WIDTH
from train_gpt2 import CLASSIFIER_ROWS, compile_kernels

OUT_OF_MEMORY_HINT = "close other programs"
PICTURE = Path(__file__).with_name("training_step.png")
B, T = 4, 1024                                  # the batch whose sizes are drawn
TURN = "fused_classifier"                       # where forward becomes backward
LAYER = 1                                       # the layer that is drawn: the first differs slightly

# Inches, from the top left. At README width an inch is about 105 pixels.
LEFT, MIDDLE, RIGHT = (0.2, 2.2), (2.6, 1.8), (4.5, 3.3)      # columns: x and width
DOWN, UP = 0.36, 7.64                           # where the line of the step's flow runs
LINE = 0.148                                   # height of a line of a card
CARD, ROW = 0.19 + 2 * LINE, 0.56               # height of a call's card and of its row
CORNER = 0.04
FONT = "DejaVu Sans Mono"
LETTER = 0.602 / 72                             # width of a letter per point of font size
SMALL, MEDIUM, LARGE = 7.2, 8.2, 9.2

# Every color reads on white and on black: letters have a background of their own, or are INK.
CARD_GROUND, CARD_EDGE, CARD_TEXT, CARD_LABEL = "#3b4858", "#5d6c7d", "#ffffff", "#b4c0cc"
COLORS = {                                     # buffer -> background, letters
    "params": ("#a8c7fa", "#0a2351"),
    "acts": ("#9fdcae", "#073b1a"),
    "grads": ("#f9b4a2", "#5b1606"),
    "scratch": ("#f4df9a", "#463600"),
    "adam": ("#d3c2f5", "#2c1760"),
    "batch": ("#d3d9df", "#1d2731"),
    "tables": ("#8fdce4", "#05363c"),
}
MEANINGS = {
    "params": "parameters",
    "acts": "activations, kept for backward",
    "grads": "gradients of the parameters",
    "scratch": "reused from layer to layer",
    "adam": "AdamW's moments",
    "batch": "tokens and targets",
    "tables": "cosine and sine of the angles by which rope rotates queries and keys; sign = -1 rotates back",
}


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn

class Model(NamedTuple):
    """A model and the texts of its page."""
    config: gpt2.Config | llama.Config      # whose sizes are drawn
    name: str
    suffix: str                             # of the picture's name
    title: str
    note: str                               # below the legend: what is not clear from the names
    remarks: dict                           # name of an activation -> what its channels are

    @property
    def definition(self):
        return llama.definition_of(self.config)

    @property
    def sizes(self):
        """The tables, name -> shape, of the parameters, the activations, and the scratch."""
        return (self.definition.parameter_shapes(self.config), self.definition.activation_shapes(self.config, B, T),
                self.definition.scratch_shapes(self.config, B, T, CLASSIFIER_ROWS))


GPT2 = Model(gpt2.model_config("d12"), "GPT-2 124M", "", "One training step",
             "dln is the gradient of lnf, ln2 or ln1; dfch of fch_gelu, then of fch; "
             "dresidual of the residual stream, initially 0", {})
L12 = llama.model_config("l12")
LLAMA = Model(L12, "a 114M Llama (l12)", "_llama", "One training step of Llama",
              "dln is the gradient of lnf, ln2 or ln1; dqkv of the rotated qkv, then of qkv; "
              "dresidual of the residual stream, initially 0",
              {"qkv": f"{L12.num_heads} heads of q, {L12.num_key_heads} of k, {L12.num_key_heads} of v",
               "fch": f"{L12.hidden} gates, then {L12.hidden} values"})


def mirror(forward, backward):
    """Pairs (forward call, its backward call or None) in the order of the forward pass.

    The twin of X_forward is X_backward, if that kernel exists, and rope is its own. Raises ValueError unless the backward calls
    are the twins of the forward calls in reverse order.
    """
    twins = [twin if hasattr(kernels, twin := call.kernel.replace("_forward", "_backward")) else None for call in forward]
    expected, found = [twin for twin in reversed(twins) if twin], [call.kernel for call in backward]
    if found != expected:
        raise ValueError(f"the backward pass does not mirror the forward pass: found {found}, expected {expected}")
    rest = list(backward)
    return [(call, rest.pop() if twin else None) for call, twin in zip(forward, twins)]


class Step:
    """The calls of a step of the tiny model as they are drawn, with one layer in place of all.

    model: the Model whose sizes are drawn
    pairs: forward and backward calls, see `mirror`, in three parts: before the layers, one layer, after the layers
    turn: the call between forward and backward
    update: the calls after the backward pass, one per kernel
    updates: kernel -> number of its calls in the update
    last_writers: name of an array -> the last forward call that writes it, which leaves what is kept: rope changes qkv in place
    buffers: the names of those that appear
    first_layer: (name, its name in the first layer) where they differ
    description: all calls and sizes, as text

    Raises ValueError if backward does not mirror forward, or if the layers differ.
    """

    def __init__(self, calls, model):
        self.model = model
        turn = next(i for i, call in enumerate(calls) if call.kernel == TURN)
        first_of_update = next(i for i, call in enumerate(calls) if call.phase == "update")
        self.turn = calls[turn]
        pairs = mirror(calls[:turn], calls[turn + 1:first_of_update])
        groups = {layer: list(group) for layer, group in groupby(pairs, key=lambda pair: pair[0].layer) if layer is not None}
        if list(groups) != list(range(TINY.num_layers)):
            raise ValueError(f"layers were visited in the order {list(groups)}")
        self.first_layer, *others = (differences(group, groups[LAYER]) for group in groups.values())
        if any(others):
            raise ValueError(f"the layers differ, so one cannot stand for all: {others}")
        before, after = pairs[:pairs.index(groups[0][0])], pairs[pairs.index(groups[TINY.num_layers - 1][-1]) + 1:]
        self.pairs = before, groups[LAYER], after
        self.last_writers = {array.name: call for part in self.pairs for call, _ in part for array in call.written}
        self.buffers = {array.buffer.partition("_")[0] for call in calls for array in call.arrays}
        self.update = list({call.kernel: call for call in calls[first_of_update:]}.values())
        self.updates = {call.kernel: sum(other.kernel == call.kernel for other in calls) for call in self.update}
        self.description = "\n".join([f"{call.phase}: {call}" for call in calls] +
                                     [f"{name}: {shape}" for shapes in model.sizes for name, shape in shapes.items()])


def todays_step(model):
    """The Step that the program takes now."""
    calls, _, _ = record_step(*tiny_step(tiny(model.config)))
    return Step(calls, model)


def differences(group, other):
    """(other's name, group's name) wherever the calls of two layers have different arrays.

    Raises ValueError if they call different kernels.
    """
    found = {}
    for calls, other_calls in zip(group, other, strict=True):
        for call, other_call in zip(calls, other_calls):
            if (call and call.kernel) != (other_call and other_call.kernel):
                raise ValueError("the layers differ, so one cannot stand for all")
            if call:
                for array, other_array in zip(call.arrays, other_call.arrays, strict=True):
                    if label(array, call) != label(other_array, other_call):
                        found[label(other_array, other_call)] = label(array, call)
    return list(found.items())


def label(array, call):
    """An array's name in the picture: with its layer only if that is not the layer of the call."""
    if array.layer is None or array.layer == call.layer:
        return array.tensor
    if call.layer is None:
        return f"{array.tensor}[L-{TINY.num_layers - array.layer}]"
    return f"{array.tensor}[l-{call.layer - array.layer}]"


def colors_of(buffer):
    return COLORS[buffer.partition("_")[0]]     # adam_m and adam_v are adam's


def format_bytes(nbytes):
    """To at least two digits."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    if nbytes >= 1e5:
        return f"{nbytes / 1e6:.{0 if nbytes >= 1e7 else 1}f} MB"
    return f"{nbytes / 1e3:.0f} KB"


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

class Page:
    """A figure without visible axes. Coordinates are inches from its top left."""

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
        """A rectangle with round corners and its top left at (x, y)."""
        from matplotlib.patches import FancyBboxPatch
        self.axes.add_patch(FancyBboxPatch((x + corner, y + corner), width - 2 * corner, height - 2 * corner, facecolor=ground,
                                           edgecolor=edge, **{"boxstyle": f"round,pad={corner}", "linewidth": 0.8} | settings))

    def flow(self, *points):
        """A line through points (x, y), behind everything else, with an arrowhead at the last one."""
        *_, (_, before), (x, y) = points
        self.axes.plot(*zip(*points), color=INK, linewidth=1.2, solid_joinstyle="round", zorder=-1)
        self.axes.plot(x, y, "v" if y > before else "^", color=INK, markersize=5, zorder=-1)

    def loop(self, y, rows, heading, middle="", right=""):
        """A frame around `rows` rows of calls, starting at height y, with texts in its top edge."""
        self.box(0.07, y - 0.2, WIDTH - 0.14, rows * ROW + 0.2, edge=INK, corner=0.08, linewidth=0.8, zorder=-2)
        self.text(DOWN + 0.1, y - 0.1, heading)
        self.text(center(MIDDLE), y - 0.1, middle, ha="center")
        self.text(UP - 0.1, y - 0.1, right, ha="right")

    def chip(self, x, y, text, colors):
        """A name on the background of its buffer, centered at height y. Returns the x of the next chip."""
        ground, letters = colors
        width = LETTER * SMALL * len(text) + 0.07
        self.box(x, y - 0.065, width, 0.13, ground, corner=0.025, linewidth=0)
        self.text(x + 0.035, y + 0.004, text, letters)
        return x + width + 0.035

    def card(self, column, y, call, times=1):
        """One call: its kernel, the arrays it writes and those it only reads."""
        remark = f"for each of {times} tensors" if times > 1 else f"sign = {call.sign}" if call.sign else ""
        x, width = column
        lines = [(verb, arrays) for verb, arrays in (("writes", call.written), ("reads", call.read)) if arrays]
        self.box(x, y, width, CARD - (2 - len(lines)) * LINE, CARD_GROUND, CARD_EDGE)
        self.text(x + 0.08, y + 0.1, call.kernel, CARD_TEXT, MEDIUM, weight="bold")
        if remark:
            self.text(x + width - 0.08, y + 0.1, remark, CARD_LABEL, ha="right")
        for i, (verb, arrays) in enumerate(lines):
            line = y + 0.1 + (i + 1) * LINE
            self.text(x + 0.08, line, verb, CARD_LABEL, SMALL - 1)
            at = x + 0.43
            for array in arrays:
                name = array.buffer if times > 1 else label(array, call)
                at = self.chip(at, line, ("+" if array.written and array.read else "") + name, colors_of(array.buffer))


def center(column):
    return column[0] + column[1] / 2


def edge(column):
    return column[0] + column[1]


def draw(step, path):
    """Draw a Step and write the PNG."""
    before, layer, after = step.pairs
    model, legend = step.model, [buffer for buffer in MEANINGS if buffer in step.buffers]
    # backward() itself computes the logits, chunk by chunk.
    of_all_rows, of_chunks = ([pair for pair in after if pair[0].phase == phase] for phase in ("forward", "backward"))
    notes_top = 0.7 + gpt2.ceil_div(len(legend), 3) * 0.19
    update_top = notes_top + 0.56
    top = update_top + len(step.update) * (ROW - LINE) + 0.28
    layers_top = top + len(before) * ROW + 0.24
    after_top = layers_top + len(layer) * ROW + 0.08
    chunks_top = after_top + len(of_all_rows) * ROW + 0.24
    turn_top = chunks_top + len(of_chunks) * ROW
    memory_top = turn_top + ROW + 0.2
    page = Page(WIDTH, memory_top + 0.85)

    # The heading and the legend.
    x = LEFT[0]
    page.text(x, 0.2, model.title, size=15, weight="bold")
    page.text(x, 0.45, f"Every kernel call of train_{model.definition.__name__}.py, recorded as it ran. "
              f"Sizes: all layers of {model.name}, B = {B}, T = {T}.")
    for i, buffer in enumerate(legend):
        at, y = x + (i % 3) * 2.6, 0.7 + i // 3 * 0.19
        page.text(page.chip(at, y, buffer, COLORS[buffer]) + 0.02, y, MEANINGS[buffer])
    page.text(x, notes_top, "+ before a name: the kernel adds to the array or changes it in place")
    page.text(x, notes_top + 0.16, model.note)

    # The columns, and the flow through them: down, across, up, and back to the start.
    loop, turn = update_top + (CARD - LINE) / 2, turn_top + CARD / 2
    page.flow((RIGHT[0], loop), (DOWN, loop), (DOWN, top - 0.05))
    page.flow((DOWN, top), (DOWN, turn), (UP, turn), (UP, update_top + CARD + ROW - 2 * LINE + 0.05))
    page.text(DOWN + 0.1, loop + 0.12, "the next step, with the new parameters")
    for x, y, heading in ((DOWN + 0.1, top, "forward"), (MIDDLE[0], top, "kept for backward"),
                          (RIGHT[0], top, "backward: read upward"), (RIGHT[0], update_top, "update")):
        page.text(x, y - 0.12, heading, size=LARGE, weight="bold")
    for i, call in enumerate(reversed(step.update)):
        page.card(RIGHT, update_top + i * (ROW - LINE), call, step.updates[call.kernel])

    # The calls, forward beside backward, and between them the activations that forward keeps for backward.
    exceptions = "".join(f"; for l = 0, {name} is {instead}" for name, instead in step.first_layer)
    page.loop(layers_top, len(layer), "for l in range(L):", f"L = {model.config.num_layers}{exceptions}", "reversed(range(L)):")
    page.loop(chunks_top, len(of_chunks) + 1, f"for each chunk of {CLASSIFIER_ROWS} of the N = B*T rows, in backward():")
    for first, pairs in ((top, before), (layers_top, layer), (after_top, of_all_rows), (chunks_top, of_chunks)):
        for i, (forward, backward) in enumerate(pairs):
            y = first + i * ROW
            page.card(LEFT, y, forward)
            draw_kept(page, y + CARD / 2, forward, step)
            if backward:
                page.card(RIGHT, y, backward)
            else:
                page.text(UP - 0.1, y + CARD / 2 - 0.07, "no kernel: dresidual is", ha="right")
                page.text(UP - 0.1, y + CARD / 2 + 0.07, "the gradient of both terms", ha="right")
    page.card((center(MIDDLE) - 1.2, 2.4), turn_top, step.turn)
    draw_memory(page, memory_top, model)
    style.save(page.figure, path, step.description)


def draw_kept(page, y, call, step):
    """Draw the activations that a forward call keeps for the backward pass, as bars to scale, centered at height y."""
    x, _ = MIDDLE
    _, acts, _ = step.model.sizes
    largest = max(map(prod, acts.values()))
    kept = [array for array in call.written if array.buffer == "acts" and step.last_writers[array.name] is call]
    remarks = [step.model.remarks[array.name] for array in kept if array.name in step.model.remarks]
    first = y - (len(kept) + len(remarks) - 1) / 2 * LINE
    for i, array in enumerate(kept):
        line = first + i * LINE
        size = prod(acts[array.name])
        page.text(x + 0.55, line, array.name, ha="right")
        bar = max(0.7 * size / largest, 0.01)
        page.box(x + 0.61, line - 0.055, bar, 0.11, COLORS[array.buffer][0], corner=0, linewidth=0)
        page.text(x + 0.61 + bar + 0.05, line, format_bytes(4 * size))
    for i, remark in enumerate(remarks, len(kept)):
        page.text(center(MIDDLE), first + i * LINE, remark, ha="center")


def draw_memory(page, y, model):
    """Draw the memory of a step as one bar to scale."""
    params, acts, scratch = (4 * sum(map(prod, shapes.values())) for shapes in model.sizes)
    total = gpt2.memory_needed(*model.sizes)
    x, scale = LEFT[0], (edge(RIGHT) - LEFT[0]) / total
    page.text(x, y, f"memory: {format_bytes(total)}", size=LARGE, weight="bold")
    for buffer, size in (("params", params), ("grads", params), ("adam_m", params), ("adam_v", params), ("acts", acts),
                         ("scratch", scratch)):
        ground, letters = colors_of(buffer)
        page.box(x, y + 0.12, scale * size - 0.02, 0.38, ground, corner=0, linewidth=0)
        for line, text in ((0.24, buffer), (0.38, format_bytes(size))):
            letter_size = min(SMALL - 0.7, (scale * size - 0.08) / (LETTER * len(text)))
            page.text(x + scale * size / 2 - 0.01, y + line, text, letters, letter_size, ha="center")
        x += scale * size
    at = LEFT[0]
    for name, shape in model.sizes[2].items():
        at = page.chip(at, y + 0.66, f"{name} {format_bytes(4 * prod(shape))}", COLORS["scratch"]) + 0.03


def draw_all(path=PICTURE):
    """Draw today's step of both models. path: of GPT-2's picture; Llama's is beside it."""
    for model in (GPT2, LLAMA):
        compile_kernels(model.config)
        draw(todays_step(model), path.with_stem(path.stem + model.suffix))


def main():
    parser = OneLineParser(description="Draw one training step on one page.")
    parser.add_flag("--output", default=PICTURE, type=Path, metavar="FILE",
                    help="the PNG to write for GPT-2; Llama's is beside it, with _llama in its name")
    options = parser.parse_args()
    draw_all(options.output)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
