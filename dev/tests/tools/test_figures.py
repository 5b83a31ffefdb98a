"""figures.py: the pictures show the program's own numbers, and are up to date."""
from functools import cache
from math import ceil, floor
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from PIL import Image

import gpt2
import kernels_float64 as exact
import kernels_gpu
import train_gpt2
from cli import UserError
from conftest import random_params
from cuda_on_cpu import CpuDevice
from dev import draw_step, figures, style
from dev.explore import attention_weights
from model_files import save_model
from test_kernels import finite_differences

MODEL = gpt2.Config(64, 50257, 50304, num_layers=2, num_heads=2, channels=8)


@pytest.fixture(scope="module")
def model():
    return SimpleNamespace(config=MODEL, params=random_params(MODEL))


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """drawn(name) draws a figure, once. Returns the figure and its file."""
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


def description(path):
    """The text `Description` in a PNG: everything that is written in the picture."""
    with Image.open(path) as picture:
        return picture.text["Description"]


@pytest.mark.parametrize("name", [name for name in figures.DRAWINGS if name != "attention.png"])    # of a trained model
def test_figures_are_todays(name, drawn):
    """If this fails, the program's numbers have changed since the figure was drawn: run python dev/figures.py."""
    assert description(drawn(name)[1]) == description(figures.PAGES / name)


def test_everything_is_drawn(run_main, model, tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(figures, "draw", lambda name, model, folder: wanted.append((model[0], folder / name)))
    monkeypatch.setattr(draw_step, "draw", lambda step, path: wanted.append((step.model, path)))
    save_model(tmp_path / "model", model.config, model.params)
    assert run_main(figures, "--model", tmp_path / "model").status == 0
    assert wanted == [*((model.config, figures.PAGES / name) for name in figures.DRAWINGS),
                      (draw_step.GPT2, draw_step.PICTURE),
                      (draw_step.LLAMA, draw_step.PICTURE.with_stem("training_step_llama"))]


def test_one_line_errors(run_main, tmp_path, monkeypatch):
    """Without a model, and with one that cannot read the prompt: before anything is drawn."""
    monkeypatch.setattr(figures, "draw", None)
    config = gpt2.Config(8, 50257, 50304, num_layers=1, num_heads=1, channels=8)
    save_model(tmp_path / "short", config, gpt2.Tensors(gpt2.parameter_shapes(config)))
    for name, problem in (("nothing", "train_gpt2.py"), ("short", "expected at most 8, the model's context")):
        finished = run_main(figures, "--model", tmp_path / name)
        assert finished.status == 1 and finished.err.count("\n") == 1 and problem in finished.err, finished.err


# ---- Figures

def matrix_of(axes):
    """The numbers of a heatmap: the color gives the sign, the opacity the size."""
    pixels = axes.images[0].get_array()
    blue, orange = (np.isclose(pixels[..., :3], to_rgb(color)).all(axis=-1) for color in (style.BLUE, style.ORANGE))
    assert (blue != orange).all()
    return np.where(blue, 1, -1) * pixels[..., 3] ** 2


def test_gelu(drawn):
    [axes] = drawn("gelu.png")[0].axes
    lines = {line.get_label(): line.get_data() for line in axes.lines}
    x, out = lines["gelu(x)"]
    np.testing.assert_allclose(out, exact.gelu_forward(x), atol=1e-5)
    np.testing.assert_allclose(lines["gelu'(x)"], [x, exact.gelu_backward(np.ones_like(x), x)], atol=1e-5)
    np.testing.assert_array_equal(lines["max(x, 0)"], [x, np.maximum(x, 0)])


def test_swiglu(drawn):
    """silu is what passes of a value of 1, and its derivative the gate's gradient."""
    [axes] = drawn("swiglu.png")[0].axes
    lines = {line.get_label(): line.get_data() for line in axes.lines}
    x, out = lines["silu(x)"]
    inp = np.stack([x, np.ones_like(x)], axis=1)
    np.testing.assert_allclose(out, exact.swiglu_forward(inp)[:, 0], atol=1e-5)
    slopes = exact.swiglu_backward(np.ones((x.size, 1)), inp)[:, 0]
    np.testing.assert_allclose(lines["silu'(x)"], [x, slopes], atol=1e-5)
    np.testing.assert_allclose(lines["gelu(x)"], [x, exact.gelu_forward(x)], atol=1e-5)


def test_rope(drawn):
    """The angles are position * base**(-2i/64); a score of equal vectors is the mean cosine of the pairs' angles."""
    turns, scores = drawn("rope.png")[0].axes
    for line in turns.lines:
        i = int(line.get_label().removeprefix("pair "))
        np.testing.assert_allclose(line.get_ydata(), np.cos(np.arange(129) * 10_000 ** (-i / 32)), atol=1e-5)
    for line in scores.lines:
        base = int(line.get_label().removeprefix("base ").replace(",", ""))
        angles = np.arange(257)[:, None] * base ** (-np.arange(32) / 32)
        np.testing.assert_allclose(line.get_ydata(), np.cos(angles).mean(axis=1), atol=1e-5)
    assert len(turns.lines) == 4 and len(scores.lines) == 2


def test_layernorm(drawn):
    """The three terms add up to the Jacobian of a row's norm, by finite differences."""
    one, mean, rstd, jacobian = map(matrix_of, drawn("layernorm.png")[0].axes)
    C = len(one)
    np.testing.assert_allclose(one + mean + rstd, jacobian, atol=1e-12)
    row = np.array([0.2, -1.1, 0.6, 1.9, -0.4, 0.9, -1.6, 0.3])
    ones, zeros = np.ones(C), np.zeros(C)
    _, _, [scale] = exact.layernorm_forward(row[None], ones, zeros)
    expected = [finite_differences(lambda x, i=i: exact.layernorm_forward(x[None], ones, zeros)[0][0, i], row) / scale
                for i in range(C)]
    np.testing.assert_allclose(jacobian, expected, atol=1e-4)


def test_attention(drawn, model, encoding):
    """The heads with the most and with the least even weights."""
    tokens = encoding.encode(figures.PROMPT)
    network = train_gpt2.GPT2(model.config, 1, len(tokens), threads=1)
    network.set_params(model.params)
    network.forward(np.array([tokens], dtype=np.int32))
    weights = {(l, h): attention_weights(network.acts.qkv[l], network.acts.att_lse[l][0], h, network.config.num_heads)
               for l in range(model.config.num_layers) for h in range(model.config.num_heads)}
    ranking = sorted(weights, key=lambda head: figures.evenness(weights[head]))
    for axes, (l, h), kind in zip(drawn("attention.png")[0].axes, (ranking[-1], ranking[0]), ("even", "concentrated")):
        assert axes.get_title() == f"layer {l}, head {h}: the most {kind}"
        np.testing.assert_allclose(matrix_of(axes), weights[l, h], atol=1e-5)
        names = [encoding.decode([token]).replace("\n", "\\n") for token in tokens]
        assert [label.get_text() for label in axes.get_xticklabels()] == names


def test_evenness():
    assert figures.evenness(np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]) == pytest.approx(1)
    assert figures.evenness(np.eye(5)) == 0


LANES = r"""
// One warp. Every number is its own place in a row-major (16, 16) matrix: 16 * row + column, exact in bf16.
extern "C" __global__ void __launch_bounds__(32) find_lanes(
    int* sums,                  // (256)
    int* left,                  // (256)
    int* rounded,               // (256)
    int* right,                 // (256)
    int n)
{
    __shared__ Tile tile;
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) tile.rows[i / 16][i % 16] = (float)i;
    __syncwarp();
    Rows x = {};
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) {
            x.x[n][i] = 16 * row_of(i) + column_of(n, i);
            sums[16 * row_of(i) + column_of(n, i)] = lane;
        }
    Factor loaded, of_sums;
    load_factor(loaded, tile);
    round_to_factor(of_sums, x);
    unsigned tiles[4];
    load_tiles_transposed(tiles, &tile.rows[lane % 16][lane / 16 * 8]);     // as multiply_by does for k = n = 0
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            left[(int)__uint_as_float(loaded.pairs[0][i] >> 16 * half << 16)] = lane;
            rounded[(int)__uint_as_float(of_sums.pairs[0][i] >> 16 * half << 16)] = lane;
            if (i < 2) right[(int)__uint_as_float(tiles[i] >> 16 * half << 16)] = lane;
        }
}
"""


def lanes_in(axes):
    """The numbers in the cells of a panel, as a matrix: each is that of all numbers that its cell covers."""
    lanes = {(row, column): int(text.get_text()) for text in axes.texts if text.get_text().isdigit()
             for x, y in [text.get_position()] for row in (floor(y), ceil(y)) for column in (floor(x), ceil(x))}
    shape = np.max([*lanes], axis=0) + 1
    assert len(lanes) == np.prod(shape)
    return np.array([lanes[place] for place in np.ndindex(*shape)]).reshape(shape)


def test_flash_attention(drawn):
    """The lanes are those whose registers get the numbers when the kernels' own functions run in the emulator."""
    try:
        device = CpuDevice("bfloat16")
        device.load([kernels_gpu.COMMON, kernels_gpu.FLASH_ATTENTION + LANES])
    except UserError as error:
        pytest.skip(str(error))
    arrays = sums, left, rounded, right = [device.to_device(np.full(256, -1, dtype=np.int32)) for _ in range(4)]
    device.launch("find_lanes", 1, 32, *arrays, 0)
    sums, left, rounded, right = (device.to_host(array).reshape(16, 16) for array in arrays)
    panels = drawn("flash_attention.png")[0].axes
    for axes, lanes in zip(panels, (sums, right[:, :8], left, sums[:, :8]), strict=True):
        np.testing.assert_array_equal(lanes_in(axes), lanes, err_msg=axes.get_title())
    np.testing.assert_array_equal(rounded, left)
    red = {text.get_text() for axes in panels for text, patch in zip(axes.texts, axes.patches) if
           np.allclose(patch.get_facecolor()[:3], to_rgb(style.RED)) and patch.get_facecolor()[3] == 1}
    assert red == {str(figures.EXAMPLE_LANE)}


def test_memory(drawn):
    """The bars are the program's own tables of tensors, and the total is what it says it needs."""
    [axes] = drawn("memory.png")[0].axes
    config = gpt2.model_config("d12")
    bars = [[patch.get_width() for patch in axes.patches if patch.get_y() < y < patch.get_y() + patch.get_height()]
            for y in range(4)]
    for sizes, label, text in zip(bars, axes.get_yticklabels(), axes.texts, strict=True):
        B, T = map(int, label.get_text().partition(",")[0].split(" x "))
        layers = 1 if label.get_text().endswith("--recompute") else 12
        shapes = (gpt2.activation_shapes(config, B, T, recompute=layers == 1),
                  gpt2.scratch_shapes(config, B, T, train_gpt2.CLASSIFIER_ROWS))
        needed = gpt2.memory_needed(gpt2.parameter_shapes(config), *shapes) / 1e9
        assert sizes[:3] == pytest.approx(np.array([4, 4, 8]) * 124_475_904 / 1e9)
        assert sum(sizes[:5]) == pytest.approx(needed) and text.get_text().startswith(f"{needed:.1f}")
        assert sizes[5] == pytest.approx(4e-9 * ((B * T - min(B * T, 512)) * 50304 + B * 12 * T * T * layers))


def test_roofline(drawn):
    """Each kernel's FLOP/byte, the share of the processor's FLOP/s that memory leaves it, and its time in a step."""
    axes, columns = drawn("roofline.png")[0].axes
    costs = figures.page_costs()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(names) == sorted({call.partition(",")[0] for call in costs})
    texts = {text.get_position(): text.get_text() for text in columns.texts}
    flops_per_second, bytes_per_second = figures.PROCESSORS["2 CPU cores"]
    balance = flops_per_second / bytes_per_second
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for y, (name, line) in enumerate(zip(names, points, strict=True)):
        mine = [cost for call, cost in costs.items() if call.partition(",")[0] == name]
        intensities = [flops / moved for _, flops, moved in mine]
        assert [*line.get_xdata()] == pytest.approx(intensities)
        share = intensities[0] / balance if min(intensities) < balance else 1
        seconds = sum(calls * max(flops / flops_per_second, moved / bytes_per_second) for calls, flops, moved in mine)
        assert (texts[0, y], texts[1, y]) == (f"{share:.1%}", f"{1000 * seconds:,.0f}" if seconds > 0 else "-")
    verticals = {line.get_label(): line.get_xdata()[0] for line in axes.lines if line.get_marker() != "o"}
    assert verticals == pytest.approx({"2 CPU cores: 13": 385 / 30, "H100, float32: 20": 67 / 3.35,
                                       "H100, TF32: 148": 495 / 3.35})
