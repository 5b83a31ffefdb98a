"""What dev/figures.py draws, and the page that dev/draw_step.py draws."""
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib import image, pyplot
from matplotlib.colors import to_rgb
from PIL import Image

import gpt2
import kernels_cpu
import kernels_float64 as exact
import train_gpt2
from model_files import save_model
from conftest import random_params
from dev import draw_step, figures, style
from dev.recorder import Call, record_step, tiny_step
from test_kernels import finite_differences

MODEL = gpt2.Config(64, 50257, 50304, num_layers=2, num_heads=2, channels=8)


@pytest.fixture(scope="module")
def model():
    return SimpleNamespace(config=MODEL, params=random_params(MODEL))


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """drawn(name) draws a figure, once. Returns it and its file."""
    folder, saved = tmp_path_factory.mktemp("figures"), []
    write = style.save

    def save(figure, *arguments):
        saved.append(figure)
        write(figure, *arguments)

    @cache
    def draw(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(style, "save", save)
            patch.setattr(pyplot, "close", lambda figure: None)
            figures.draw(name, (model.config, model.params), folder)
        return saved[-1], folder / name
    yield draw
    for figure in saved:
        pyplot.close(figure)


# ---- files

def texts_of(path):
    """The texts in a PNG, by their keywords."""
    with Image.open(path) as picture:
        return picture.text


@pytest.mark.parametrize("name", figures.DRAWINGS)
def test_figures_are_small_wide_enough_for_a_readme_and_without_background(name, drawn):
    for path in (drawn(name)[1], figures.PAGES / name):
        pixels = image.imread(path)
        assert path.stat().st_size < 100_000 and pixels.shape[1] >= 850 and pixels.shape[2] == 4
        assert (pixels[..., 3] == 0).mean() > 0.2 and (pixels[..., 3] > 0.98).any()


@pytest.mark.parametrize("name", [name for name in figures.DRAWINGS if name != "attention.png"])    # of a trained model
def test_figures_are_todays(name, drawn):
    """If this fails, the program has other numbers than when the figure was drawn: python dev/figures.py."""
    assert texts_of(drawn(name)[1])["Description"] == texts_of(figures.PAGES / name)["Description"]


def test_everything_is_drawn(run_main, model, tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(figures, "draw", lambda name, model, folder: wanted.append((model[0], folder / name)))
    monkeypatch.setattr(draw_step, "draw", lambda step, path: wanted.append((step.turn.kernel, path)))
    save_model(tmp_path / "model", model.config, model.params)
    assert run_main(figures, "--model", tmp_path / "model").status == 0
    assert wanted == [*((model.config, figures.PAGES / name) for name in figures.DRAWINGS),
                      ("fused_classifier", draw_step.PICTURE)]


def test_error_without_a_model(run_main, tmp_path):
    finished = run_main(figures, "--model", tmp_path / "nothing")
    assert finished.status == 1 and finished.err.count("\n") == 1
    assert str(tmp_path / "nothing") in finished.err and "train_gpt2.py" in finished.err


@pytest.mark.parametrize("changes, problem", [
    (dict(vocab_size=50, padded_vocab_size=128), "has a vocabulary of 50 tokens"),
    (dict(max_seq_len=8), "expected at most 8, the model's context"),
])
def test_error_of_a_model_that_cannot_read_the_prompt(run_main, tmp_path, monkeypatch, changes, problem):
    config = replace(MODEL, **changes)
    save_model(tmp_path / "model", config, gpt2.Tensors(gpt2.parameter_shapes(config)))
    monkeypatch.setattr(figures, "draw", None)
    finished = run_main(figures, "--model", tmp_path / "model")
    assert finished.status == 1 and finished.err.count("\n") == 1 and problem in finished.err


def luminance(color):
    """WCAG's relative luminance of #rrggbb."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
              for value in (int(color[i:i + 2], 16) / 255 for i in (1, 3, 5))]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(*colors):
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colors_can_be_read_on_a_light_and_on_a_dark_page(page):
    for color in (style.INK, style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.RED, draw_step.INK):
        assert contrast(color, page) >= 3.9, color


def test_letters_can_be_read_on_their_grounds():
    for ground, letters in [*draw_step.COLORS.values(), (draw_step.CARD_GROUND, draw_step.CARD_TEXT),
                            (draw_step.CARD_GROUND, draw_step.CARD_LABEL)]:
        assert contrast(ground, letters) >= 4.5


# ---- figures

def curves(axes):
    """label -> (x, y) of the lines."""
    return {line.get_label(): line.get_data() for line in axes.lines}


def matrix_of(axes):
    """The numbers that a heatmap shows: their sign by the color, their size by how little of the page is seen through it."""
    pixels = axes.images[0].get_array()
    blue, orange = (np.isclose(pixels[..., :3], to_rgb(color)).all(axis=-1) for color in (style.BLUE, style.ORANGE))
    assert (blue != orange).all()
    return np.where(blue, 1, -1) * pixels[..., 3] ** 2


def test_gelu(drawn):
    [axes] = drawn("gelu.png")[0].axes
    lines = curves(axes)
    x, out = lines["gelu(x)"]
    assert x.min() == -4 and x.max() == 4
    np.testing.assert_allclose(out, exact.gelu_forward(x), atol=1e-5)
    np.testing.assert_allclose(lines["gelu'(x)"], [x, exact.gelu_backward(np.ones_like(x), x)], atol=1e-5)
    np.testing.assert_array_equal(lines["max(x, 0)"], [x, np.maximum(x, 0)])


def test_layernorm(drawn):
    """The terms add up to the derivative of a row's norm, by finite differences."""
    one, mean, rstd, jacobian = map(matrix_of, drawn("layernorm.png")[0].axes)
    C = len(one)
    np.testing.assert_array_equal(one, np.eye(C))
    np.testing.assert_allclose(mean, -1 / C)
    np.testing.assert_allclose(one + mean + rstd, jacobian, atol=1e-12)
    row = np.array([0.2, -1.1, 0.6, 1.9, -0.4, 0.9, -1.6, 0.3])
    ones, zeros = np.ones(C), np.zeros(C)
    _, _, [scale] = exact.layernorm_forward(row[None], ones, zeros)
    expected = [finite_differences(lambda x: exact.layernorm_forward(x[None], ones, zeros)[0][0, i], row) / scale
                for i in range(C)]
    np.testing.assert_allclose(jacobian, expected, atol=1e-4)


def test_attention_tiles(drawn):
    """Of each tile the weights lie left of the diagonal; what is computed ends with the tile's last query."""
    [axes] = drawn("attention_tiles.png")[0].axes
    size, [*patches] = kernels_cpu.QUERY_TILE, axes.patches
    computed, weights, frames = patches[0::3], patches[1::3], patches[2::3]
    for tile, (rectangle, polygon, frame) in enumerate(zip(computed, weights, frames, strict=True)):
        first, last = tile * size, (tile + 1) * size
        assert rectangle.get_bbox().bounds == frame.get_bbox().bounds == (0, first, last, size)
        assert {*map(tuple, polygon.get_xy())} == {(0, first), (first, first), (last, last), (0, last)}
    assert len(frames) == 4


def test_attention(drawn, model, encoding):
    """Of all heads those whose weights, computed in float64, have the most and the least entropy."""
    tokens = encoding.encode(figures.PROMPT)
    T, HS = len(tokens), model.config.channels // model.config.num_heads
    network = train_gpt2.GPT2(model.config, 1, T, threads=1)
    network.set_params(model.params)
    network.forward(np.array([tokens], dtype=np.int32))
    weights, evenness = {}, {}
    for l in range(model.config.num_layers):
        for h in range(model.config.num_heads):
            q, k = (kernels_cpu.one_head(network.acts.qkv[l].astype(np.float64), 0, T, first + h, HS)
                    for first in (0, model.config.num_heads))
            weights[l, h] = p = np.tril(np.exp(q @ k.T / np.sqrt(HS)))
            p /= p.sum(axis=1, keepdims=True)
            evenness[l, h] = np.mean([np.sum(p[i, :i + 1] * -np.log(p[i, :i + 1])) / np.log(i + 1) for i in range(2, T)])
    panels = drawn("attention.png")[0].axes
    for axes, (l, h), kind in zip(panels, (max(evenness, key=evenness.get), min(evenness, key=evenness.get)),
                                  ("even", "concentrated"), strict=True):
        assert axes.get_title() == f"layer {l}, head {h}: the most {kind}"
        np.testing.assert_allclose(matrix_of(axes), weights[l, h], atol=1e-5)
    for labels in (panels[0].get_yticklabels(), *(axes.get_xticklabels() for axes in panels)):
        assert [label.get_text() for label in labels] == [encoding.decode([token]).replace("\n", "\\n") for token in tokens]
    assert min(evenness.values()) < 0.9


def test_evenness():
    assert figures.evenness(np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]) == pytest.approx(1)
    assert figures.evenness(np.eye(5)) == 0


def test_initialization(drawn):
    """The variance grows by the same with each block, or, with the factor, hardly at all."""
    [axes] = drawn("initialization.png")[0].axes
    lines = curves(axes)
    depths, without = lines["all weights from N(0, 0.02)"]
    same_depths, scaled = lines["projections smaller by 1/sqrt(2L)"]
    assert np.array_equal(depths, same_depths) and depths[0] == 1 and depths[-1] == 48
    growth = np.diff(np.square(without)) / np.diff(depths)
    assert np.all(np.abs(growth / growth.mean() - 1) < 0.5) and without[-1] > 4 * without[0]
    assert np.all(np.abs(scaled / scaled.mean() - 1) < 0.1)
    assert scaled[0] == pytest.approx(np.sqrt(without[0]**2 - growth.mean() / 2), rel=0.1)


def test_memory(drawn):
    """Of each batch size the tables of tensors, and what the program does without."""
    [axes] = drawn("memory.png")[0].axes
    config = gpt2.model_config("d12")
    parameters = 124_475_904
    L, NH, Vp = 12, 12, 50304
    kinds = [text.get_text() for text in axes.get_legend().get_texts()]
    assert kinds == ["parameters", "gradients", "AdamW's moments", "activations", "scratch",
                     "spared: attention's weights, logits"]
    bars = [[patch for patch in axes.patches if patch.get_y() < y < patch.get_y() + patch.get_height()] for y in range(4)]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    for row, label, text in zip(bars, labels, axes.texts, strict=True):
        B, T = map(int, label.partition(",")[0].split(" x "))
        recompute = label.endswith("--recompute")
        shapes = (gpt2.activation_shapes(config, B, T, recompute),
                  gpt2.scratch_shapes(config, B, T, train_gpt2.CLASSIFIER_ROWS))
        needed = gpt2.memory_needed(config, *shapes) / 1e9
        spared = 4 * ((B * T - min(B * T, 512)) * Vp + B * NH * T * T * (1 if recompute else L)) / 1e9
        sizes = [bar.get_width() for bar in row]
        assert sizes[:3] == pytest.approx([4e-9 * parameters, 4e-9 * parameters, 8e-9 * parameters])
        assert sizes[3] == pytest.approx(gpt2.Tensors(shapes[0], lambda size: np.empty(size, np.int8)).size * 4e-9)
        assert sum(sizes[:5]) == pytest.approx(needed) and sizes[5] == pytest.approx(spared)
        assert [bar.get_x() for bar in row] == pytest.approx([sum(sizes[:i]) for i in range(6)])
        assert text.get_text() == (f"{needed:.1f}" if (B, T) == (4, 64) else f"{needed:.1f}, not {needed + spared:.1f}")
    assert len(labels) == 4 and axes.get_xlim()[1] > 8


def test_roofline(drawn):
    """Each kernel's points, what its memory leaves of the processor's arithmetic, and the time that it takes in a step."""
    axes, columns = drawn("roofline.png")[0].axes
    costs = figures.page_costs()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(names) == sorted({call.partition(",")[0] for call in costs})
    texts = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in columns.texts}
    flops_a_second, bytes_a_second = figures.PROCESSORS["2 CPU cores"]
    balance = flops_a_second / bytes_a_second
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for y, (name, line) in enumerate(zip(names, points, strict=True)):
        mine = [cost for call, cost in costs.items() if call.partition(",")[0] == name]
        intensities = [flops / moved for _, flops, moved in mine]
        assert [*line.get_xdata()] == pytest.approx(intensities) and {*line.get_ydata()} == {y}
        bound_by_memory = min(intensities) < balance
        assert line.get_color() == (style.BLUE if bound_by_memory else style.ORANGE)
        share = intensities[0] / balance if bound_by_memory else 1
        seconds = sum(calls * max(flops / flops_a_second, moved / bytes_a_second) for calls, flops, moved in mine)
        assert (texts[0, y], texts[1, y]) == (f"{share:.1%}", f"{1000 * seconds:,.0f}" if seconds > 0 else "–")
    verticals = {line.get_label(): line.get_xdata()[0] for line in axes.lines if line.get_marker() != "o"}
    assert verticals == pytest.approx({"2 CPU cores: 13": 385 / 30, "H100, float32: 20": 67 / 3.35,
                                       "H100, TF32: 148": 495 / 3.35})


# ---- the page

@pytest.fixture(scope="module")
def calls():
    """Those of a step of the tiny model."""
    return record_step(*tiny_step())[0]


class Card(NamedTuple):
    """One call on the page."""
    column: tuple
    y: float
    call: Call
    words: str
    end: float               # of the names
    colors: list            # of the names


@pytest.fixture(scope="module")
def page(calls, tmp_path_factory):
    """The page: its file, its cards as Cards, all texts, and all boxes as (ground, width, height)."""
    path = tmp_path_factory.mktemp("page") / "step.png"
    found = SimpleNamespace(path=path, cards=[], texts=[], boxes=[])
    text, chip, box, card = (getattr(draw_step.Page, name) for name in ("text", "chip", "box", "card"))

    def noting_text(page, x, y, words, *arguments, **settings):
        found.texts.append(words)
        text(page, x, y, words, *arguments, **settings)

    def noting_box(page, x, y, width, height, ground="none", *arguments, **settings):
        found.boxes.append((ground, width, height))
        box(page, x, y, width, height, ground, *arguments, **settings)

    def noting_chip(page, x, y, name, colors):
        chips.append((chip(page, x, y, name, colors), colors))
        return chips[-1][0]

    def noting_card(page, column, y, call, times=1):
        before = len(found.texts)
        chips.clear()
        card(page, column, y, call, times)
        ends, colors = zip(*chips)
        found.cards.append(Card(column, y, call, " ".join(found.texts[before:]), max(ends), [*colors]))

    chips = []
    with pytest.MonkeyPatch.context() as patch:
        for method in (noting_text, noting_box, noting_chip, noting_card):
            patch.setattr(draw_step.Page, method.__name__.removeprefix("noting_"), method)
        draw_step.draw(draw_step.Step(calls), path)
    return found


def test_page_is_todays():
    """If this fails, train_gpt2.py calls its kernels in another way than when the page was drawn: python dev/draw_step.py."""
    assert texts_of(draw_step.PICTURE)["Description"] == draw_step.todays_step().description


def test_page_is_written_where_it_is_wanted(run_main, tmp_path):
    finished = run_main(draw_step, "--output", tmp_path / "step.png")
    assert finished.status == 0 and finished.out.endswith(f"wrote {tmp_path / 'step.png'}\n")
    assert texts_of(tmp_path / "step.png") == texts_of(draw_step.PICTURE)


def test_page_is_small_and_transparent(page):
    for path in (page.path, draw_step.PICTURE):
        assert path.stat().st_size < 200_000
        with Image.open(path) as file:
            picture = file.convert("RGBA")
        assert picture.width == 1600 and picture.getpixel((0, 0))[3] == 0 and picture.getextrema()[3] == (0, 255)


def cards_in(column, page):
    """From above."""
    return sorted((card for card in page.cards if card.column == column), key=lambda card: card.y)


def test_calls_of_the_page_are_in_order(page, calls):
    """Down the left side the forward pass, the classifier below, and up the right side the backward pass and the update."""
    turn = [call.kernel for call in calls].index("fused_classifier")
    first_of_update = [call.phase for call in calls].index("update")
    shown = [[call for call in part if call.layer in (None, draw_step.LAYER)]
             for part in (calls[:turn], calls[turn + 1:first_of_update])]
    left, right = ([card.call for card in cards_in(column, page)] for column in (draw_step.LEFT, draw_step.RIGHT))
    assert left == shown[0] and len(left) == 1 + 10 + 2
    assert [call.kernel for call in right[:2]] == ["adamw_update", "global_norm"]
    assert right[2:] == shown[1][::-1] and len(right[2:]) == 1 + 8 + 2
    assert [card.call.kernel for card in page.cards if card.column not in (draw_step.LEFT, draw_step.RIGHT)] == [
        "fused_classifier"]


def test_backward_calls_face_their_forward_calls(page):
    facing = {card.y: card.call.kernel for card in cards_in(draw_step.LEFT, page)}
    for card in cards_in(draw_step.RIGHT, page)[2:]:
        assert facing.pop(card.y) == card.call.kernel.replace("_backward", "_forward")
    assert [*facing.values()] == 2 * ["residual_forward"]


# One card of each kind: what is in a layer, in the layer before, in the last; overwritten, added to, and changed in place.
CARDS = [
    "layernorm_forward writes ln1 ln1_mean ln1_rstd reads residual3[l-1] ln1w ln1b",
    "layernorm_backward writes +dresidual +grads.ln1w +grads.ln1b reads dln ln1_mean ln1_rstd residual3[l-1] ln1w",
    "residual_forward writes residual3 reads residual2 proj",
    "gelu_backward writes +dfch reads fch",
    "matmul_backward writes dln +grads.wte reads logits lnf wte",
    "layernorm_forward writes lnf lnf_mean lnf_rstd reads residual3[L-1] lnfw lnfb",
    "fused_classifier writes losses +logits reads targets",
    "global_norm reads grads",
    "adamw_update for each of 16 tensors writes +params +grads +adam_m +adam_v",
]


def test_cards_say_what_a_kernel_writes_and_reads(page):
    written = [card.words for card in page.cards]
    for words in CARDS:
        assert written.count(words) == 1, words


def test_names_lie_within_their_cards_in_the_colors_of_their_buffers(page):
    for card in page.cards:
        assert card.end <= draw_step.edge(card.column) - 0.02, card
        assert card.colors == [draw_step.COLORS[array.buffer.split("_")[0]] for array in card.call.written + card.call.read]


def test_sizes_on_the_page_are_those_of_the_124m_model(page):
    for name, size in (("qkv", "453 MB"), ("att_lse", "2.4 MB"), ("fch", "604 MB"), ("lnf_rstd", "16 KB"),
                       ("params", "498 MB"), ("grads", "498 MB"), ("acts", "2.44 GB"), ("scratch", "241 MB")):
        assert (name, size) in zip(page.texts, page.texts[1:]), name
    assert "memory: 4.68 GB" in page.texts and "L = 12; where l = 0, residual3[l-1] is encoded" in " ".join(page.texts)
    params, acts, scratch = (draw_step.COLORS[buffer][0] for buffer in ("params", "acts", "scratch"))
    left = [width for ground, width, height in page.boxes if height == 0.11 and ground == acts]
    fch, ln1, qkv = max(left), left[1], left[4]
    assert fch == pytest.approx(4 * ln1) and qkv == pytest.approx(3 * ln1)
    memory = {ground: width + 0.02 for ground, width, height in page.boxes if height == 0.38}
    assert memory[acts] / memory[params] == pytest.approx(2.44e9 / 498e6, rel=0.01)
    assert memory[scratch] / memory[params] == pytest.approx(241 / 498, rel=0.01)


def without(calls, kernel):
    """The calls but for the first of a kernel."""
    first = [call.kernel for call in calls].index(kernel)
    return calls[:first] + calls[first + 1:]


@pytest.mark.parametrize("broken", [
    lambda calls: without(calls, "gelu_backward"),
    lambda calls: without(calls, "gelu_forward"),
    lambda calls: without(calls, "residual_forward"),
    lambda calls: without(calls, "encoder_backward"),
    lambda calls: [call for call in calls if call.layer != 0],
    lambda calls: [call._replace(kernel="gelu_backward") if call.kernel == "attention_backward" else call for call in calls],
    lambda calls: [call._replace(arrays=call.arrays[:-1] + [call.arrays[-1]._replace(name="fch_gelu")])
                   if str(call) == "fch_gelu[2] = gelu_forward(fch[2])" else call for call in calls],
], ids=["backward missing", "forward missing", "residual missing", "encoder missing", "layer missing", "another kernel",
        "another array"])
def test_page_is_not_drawn_of_passes_that_do_not_mirror(calls, broken):
    draw_step.Step(calls)
    with pytest.raises(ValueError):
        draw_step.Step(broken(calls))
