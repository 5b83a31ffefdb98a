"""What dev/explore.py records of a training step, what it makes of a prompt, and the page that dev/draw_step.py draws."""
import math
import re

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from PIL import Image

import train_gpt2
from checkpoint import save_model
from dataloader import write_tokens
from dev import draw_step, explore
from dev.explore import TINY, attention_weights, effects, next_tokens, record_step, time_step, tiny_step
from generate_gpt2 import Decoder
from gpt2 import Config, Tensors, initialize, parameter_shapes
from tokenizer import gpt2_encoding

SMALL = Config(max_seq_len=40, vocab_size=50257, padded_vocab_size=50304, num_layers=3, num_heads=2, channels=8)
PNG = b"\x89PNG\r\n\x1a\n"
ROW = re.compile(r"  (\w+) +([\d.]+)  ")            # a call in the table: its kernel and its milliseconds


def random_params(config, seed=0):
    """GPT-2's initialisation, its weights some times larger: attention is then not the same everywhere."""
    params = Tensors(parameter_shapes(config))
    initialize(params, config, seed)
    params.flat *= 8
    return params


@pytest.fixture(scope="module")
def step():
    """The calls of a tiny model's step, its loss, its norm, and the model afterwards."""
    model, batch = tiny_step()
    return *record_step(model, batch), model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small model with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("explore") / "_a$_$"
    save_model(folder, SMALL, random_params(SMALL))
    return folder


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("explore") / "tokens.bin"
    write_tokens(path, np.random.default_rng(0).integers(50257, size=400))
    return path


# ---- what is recorded

# Written parameters of each kernel, with a + where what they held before counts, as the kernels' docstrings have it.
WRITES = {
    "encoder_forward": "out",
    "encoder_backward": "+dwte +dwpe",
    "layernorm_forward": "out mean rstd",
    "layernorm_backward": "+dinp +dweight +dbias",
    "matmul_forward": "out",
    "matmul_backward": "dinp +dweight +dbias",
    "attention_forward": "out lse",
    "attention_backward": "dqkv",
    "gelu_forward": "out",
    "gelu_backward": "dinp",
    "residual_forward": "out",
    "fused_classifier": "losses +logits",
    "global_norm": "",
    "adamw_update": "+params +grads +m +v",
}


def test_effects_found_by_experiment():
    found = {}
    for name, (reads, writes) in effects().items():
        parameters = getattr(train_gpt2.kernels, name).py_func.__code__.co_varnames
        found[name] = " ".join("+" * (i in reads) + parameters[i] for i in sorted(writes))
        assert name != "matmul_forward" or {parameters[i] for i in reads} == {"inp", "weight", "bias"}
    assert found == WRITES


def kernel_calls(monkeypatch, run):
    """The names of the kernels that `run` calls, by other means than the recorder's."""
    names = []

    def noting(name, kernel):
        def call(*arguments):
            names.append(name)
            return kernel(*arguments)
        return call
    with monkeypatch.context() as patch:
        for name, value in list(vars(train_gpt2.kernels).items()):
            if isinstance(value, Dispatcher) and value.targetoptions.get("parallel"):
                patch.setattr(train_gpt2.kernels, name, noting(name, value))
        run()
    return names


def test_every_call_is_recorded_and_timed_in_order(step, monkeypatch):
    model, batch = tiny_step()
    expected = kernel_calls(monkeypatch, lambda: explore.run_step(model, batch))
    calls = step[0]
    assert [call.kernel for call in calls] == expected and len(expected) > 18 * TINY.num_layers
    assert [call.phase for call in calls] == sorted((call.phase for call in calls), key=["forward", "backward", "update"].index)
    seconds, whole = time_step(model, batch)
    assert len(seconds) == len(expected) and all(0 < time for time in seconds) and sum(seconds) <= whole


def test_forward_mirrors_backward(step):
    """Every kernel of the forward pass, the logits' product included, has its twin in the reverse order, which writes the
    gradients of just the parameters that it reads, in the same layer."""
    calls = [call for call in step[0] if call.phase != "update"]
    turn = [call.kernel for call in calls].index("fused_classifier")
    forward = [call for call in calls[:turn] if call.kernel != "residual_forward"]
    backward = calls[:turn:-1]
    assert [call.kernel for call in backward] == [call.kernel.replace("_forward", "_backward") for call in forward]
    for call, twin in zip(forward, backward, strict=True):
        assert twin.layer == call.layer
        assert ({(array.name, array.layer) for array in twin.written if array.buffer == "grads"} ==
                {(array.name, array.layer) for array in call.read if array.buffer == "params"}), (call, twin)


def test_every_tensor_is_recognised(step):
    """Each activation is written once in each layer, each parameter's gradient is written, and nothing else is unknown."""
    calls, _, _, model = step
    L = TINY.num_layers
    written = [(array.buffer, array.name, array.layer) for call in calls if call.phase != "update" for array in call.written]

    def every_layer_of(tensors):
        return [(name, layer) for name, shape in tensors.shapes.items() for layer in (range(L) if shape[0] == L else [None])]
    activations = [(name, layer) for buffer, name, layer in written if buffer == "acts"]
    assert sorted(activations, key=str) == sorted(every_layer_of(model.acts), key=str)
    assert {(name, layer) for buffer, name, layer in written if buffer == "grads"} == set(every_layer_of(model.grads))
    assert {name for buffer, name, _ in written if buffer == "scratch"} == set(model.scratch.shapes)
    for call in calls:
        if call.layer is not None:
            assert all(array.layer in (call.layer, call.layer - 1, None) for array in call.arrays), call
    [norm] = [call for call in calls if call.kernel == "global_norm"]
    assert str(norm) == "global_norm(grads)"
    updates = [call for call in calls if call.kernel == "adamw_update"]
    assert [str(call) for call in updates] == [f"+{name}, +grads.{name}, +adam_m.{name}, +adam_v.{name} = adamw_update()"
                                               for name in model.params.shapes]


def test_arrays_by_name():
    calls, _, _ = record_step(*tiny_step())
    found = [str(call) for call in calls]
    assert found[0] == "encoded = encoder_forward(tokens, wte, wpe)"
    for text in ("residual2[0] = residual_forward(encoded, proj)", "qkv[2] = matmul_forward(ln1[2], qkvw[2], qkvb[2])",
                 "att[1], att_lse[1] = attention_forward(qkv[1])", "losses, +logits = fused_classifier(targets)",
                 "dln, +grads.wte = matmul_backward(logits, lnf, wte)", "+dfch = gelu_backward(fch[0])",
                 "+dresidual, +grads.ln1w[1], +grads.ln1b[1] = "
                 "layernorm_backward(dln, ln1_mean[1], ln1_rstd[1], residual3[0], ln1w[1])"):
        assert found.count(text) == 1, text


def test_recomputed_activations_have_one_layer_only():
    _, batch = tiny_step()
    model = train_gpt2.GPT2(TINY, *batch.tokens.shape, threads=1, recompute=True)
    model.initialize(0)
    calls, loss, norm = record_step(model, batch)
    found = [(call.phase, call.layer, str(call)) for call in calls]
    for l in range(TINY.num_layers):
        again = ("backward", l, "fch_gelu = gelu_forward(fch)")
        assert found.count(again) == (l < TINY.num_layers - 1) and ("forward", *again[1:]) in found
    assert (loss, norm) == record_step(*tiny_step())[1:]


def test_recording_changes_nothing(step):
    model, batch = tiny_step()
    loss, norm = explore.run_step(model, batch)
    _, recorded_loss, recorded_norm, recorded = step
    assert (loss, norm) == (recorded_loss, recorded_norm)
    assert model.params.flat.tobytes() == recorded.params.flat.tobytes()
    assert isinstance(train_gpt2.kernels.gelu_forward, Dispatcher)


def test_norms(step):
    """Of activations as they are at the end, of gradients together the norm that the step reports."""
    calls, _, norm, model = step
    for call in calls:
        for array in call.written:
            if array.buffer == "acts":
                tensor = getattr(model.acts, array.name)
                tensor = tensor if array.layer is None else tensor[array.layer]
                assert array.shape == tensor.shape and array.norm == pytest.approx(np.linalg.norm(tensor))
    last = {str(array): array.norm for call in calls if call.phase == "backward" for array in call.written
            if array.buffer == "grads"}
    assert math.hypot(*last.values()) == pytest.approx(norm, rel=1e-5)


def test_norms_by_layer(step):
    calls, _, _, model = step
    norms = explore.norms_by_layer(calls, TINY.num_layers)
    assert set(norms.activations) == {"ln1", "qkv", "att", "proj", "residual2", "ln2", "fch", "fch_gelu", "residual3"}
    assert set(norms.activation_gradients) == {"dfch", "dln", "datt", "dqkv", "dresidual"}
    assert set(norms.weight_gradients) == {"qkvw", "attprojw", "fcw", "fcprojw"}
    assert norms.activations["fch"] == pytest.approx([np.linalg.norm(fch) for fch in model.acts.fch])
    backward = {call.layer: call for call in calls if call.kernel == "layernorm_backward" and call.layer is not None}
    assert norms.activation_gradients["dresidual"] == [backward[l].written[0].norm for l in range(TINY.num_layers)]
    assert np.isfinite([*norms.activations.values(), *norms.activation_gradients.values()]).all()


# ---- a prompt

@pytest.mark.parametrize("config", [Config(21, 50, 128, 2, 5, 35), Config(9, 2, 128, 1, 1, 1)], ids=["odd", "smallest"])
def test_attention(config):
    """Rows sum to 1, no position sees one after it, and with the values they make the output that attention_forward made."""
    T, HS = config.max_seq_len, config.channels // config.num_heads
    model = train_gpt2.GPT2(config, 1, T, threads=1)
    model.set_params(random_params(config))
    model.forward(np.random.default_rng(0).integers(config.vocab_size, size=(1, T), dtype=np.int32))
    for l in range(config.num_layers):
        for head in range(config.num_heads):
            p = attention_weights(model.acts.qkv[l], model.acts.att_lse[l][0], head)
            assert p.shape == (T, T) and np.all(p >= 0) and not np.triu(p, 1).any()
            np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-4)
            v = model.acts.qkv[l][:, 2 * config.channels + head * HS:][:, :HS]
            expected = model.acts.att[l][:, head * HS:][:, :HS]
            assert np.linalg.norm(p @ v - expected) <= 1e-4 * np.linalg.norm(expected)


def test_next_tokens_are_the_decoders(monkeypatch):
    """At every position, in more chunks than one."""
    monkeypatch.setattr(explore, "CLASSIFIER_ROWS", 16)
    config = Config(40, 131, 256, num_layers=2, num_heads=4, channels=12)
    params, tokens = random_params(config), np.random.default_rng(0).integers(131, size=(1, 40), dtype=np.int32)
    model = train_gpt2.GPT2(config, 1, 40, threads=1)
    model.set_params(params)
    model.forward(tokens)
    likeliest, probabilities = next_tokens(model, 3)

    decoder = Decoder(config, params, 1, threads=1)
    logits = decoder.logits(decoder.forward(tokens)).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    np.testing.assert_array_equal(likeliest, np.argsort(-expected, axis=1)[:, :3])


# ---- the program

@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved from now on."""
    saved, save = [], explore.save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)
    monkeypatch.setattr(explore, "save", keep)
    return saved


def assert_is_picture(path):
    assert path.read_bytes().startswith(PNG) and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_step(run_main, model_folder, tokens_file, tmp_path, figures):
    """The table has a line for every call, and all shows on the picture."""
    picture = tmp_path / "new" / "step.png"
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 2,
                        "--sequence-length", 16, "--output", picture)
    assert finished.status == 0 and finished.err == "", finished.err
    assert_is_picture(picture)
    rows = [ROW.match(line) for line in finished.out.splitlines()]
    kernels = [row[1] for row in rows if row]
    assert kernels == [call.kernel for call in record_step(*tiny_step())[0]]
    assert all(float(row[2]) >= 0 for row in rows if row)
    for part in ("3 layers, 2 heads", "2 x 16 tokens", "\nforward\n", "\nbackward\n", "\nupdate\n", " 32x24 ", "loss 1",
                 "grads.qkvw"):
        assert part in finished.out, part
    assert "nan" not in finished.out

    [figure] = figures
    *norms, times = figure.axes
    assert sum(len(axes.lines) for axes in norms) == 9 + 5 + 4 and all(len(line.get_xdata()) == 3 for line in norms[0].lines)
    assert {label.get_text() for label in times.get_yticklabels()} == {*kernels, "(between them)"}


@pytest.mark.filterwarnings("error")
def test_prompt(run_main, model_folder, tmp_path, figures):
    """Tokens of half a letter, of one that the font lacks, a line's end or dollars included."""
    prompt, picture = "ROMEO: 1 $$$$_\nの 日", tmp_path / "attention.png"
    finished = run_main(explore, "--model", model_folder, "--prompt", prompt, "--layer", 2, "--head", 1, "--top", 2,
                        "--output", picture)
    assert finished.status == 0 and finished.err == "", finished.err
    assert_is_picture(picture)

    tokens = gpt2_encoding().encode_ordinary(prompt)
    _, following, attention, _ = re.split(r"\n\n", finished.out, maxsplit=3)
    lines = following.splitlines()[1:]
    assert len(lines) == len(tokens) and all(line.count("%") == (2 if n == 0 else 3) for n, line in enumerate(lines))
    assert "layer 2, head 1" in attention and "'\\n'" in following and "' \ufffd'" in following
    for n, line in enumerate(attention.splitlines()[1:]):
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == min(n + 1, explore.LOOKED_AT) and sum(shares) <= 100.3 and shares == sorted(shares, reverse=True)
        assert n + 1 > explore.LOOKED_AT or sum(shares) == pytest.approx(100, abs=0.3)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [label.get_text() for label in axes.get_xticklabels()]
    assert axes.get_yticklabels()[0].get_text() == "ROM" and len(axes.get_yticklabels()) == len(tokens)
    weights = axes.images[0].get_array().filled(np.nan)
    model = train_gpt2.GPT2(SMALL, 1, len(tokens), threads=1)
    model.set_params(random_params(SMALL))
    model.forward(np.array([tokens], dtype=np.int32))
    expected = attention_weights(model.acts.qkv[2], model.acts.att_lse[2][0], 1)
    assert np.nan_to_num(weights) == pytest.approx(expected, abs=1e-5)
    assert np.isnan(weights[np.triu_indices(len(tokens), 1)]).all()


def test_no_prompt_is_the_beginning_of_a_text(run_main, model_folder, tmp_path):
    finished = run_main(explore, "--model", model_folder, "--prompt", "", "--output", tmp_path / "a.png")
    assert finished.status == 0 and "\n0  '<|endoftext|>' " in finished.out


def test_longest_prompt_has_labels_that_can_be_read(run_main, model_folder, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(explore, "MOST_LABELS", 16)
    assert run_main(explore, "--model", model_folder, "--prompt", 40 * " a", "--output", tmp_path / "a.png").status == 0
    assert len(figures[0].axes[0].get_xticklabels()) == 14


# ---- mistakes

MISTAKES = {
    "layer": (("--prompt", "a", "--layer", 3), 2, ("--layer is 3, expected at most 2", "has 3")),
    "head": (("--prompt", "a", "--head", 2), 2, ("--head is 2, expected at most 1", "has 2")),
    "negative layer": (("--prompt", "a", "--layer", -1), 2, ("--layer", "-1")),
    "long prompt": (("--prompt", 41 * " a"), 1, ("41 tokens long", "at most 40")),
    "long sequence": (("--sequence-length", 41), 2, ("--sequence-length is 41, expected at most 40",)),
    "no such model": (("--model", "missing.bin"), 1, ("missing.bin",)),
    "no such depth": (("--model", "d3"), 2, ("'d3'", "'d4'")),
    "no tokens": (("--input-bin", "missing.bin"), 1, ("missing.bin", "token files")),
    "unknown flag": (("--layers", 1), 2, ("--layers", "--help")),
    "large batch": (("--batch-size", 50), 1, ("400 tokens", "401", "lower --batch-size")),
}


@pytest.mark.parametrize("flags, status, parts", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(run_main, model_folder, tokens_file, tmp_path, flags, status, parts):
    picture = tmp_path / "a.png"
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 1, "--sequence-length", 8,
                        "--output", picture, *flags)
    assert finished.status == status and finished.err.count("\n") == 1, finished
    assert finished.err.startswith("explore.py: error: ")
    for part in parts:
        assert part in finished.err, finished.err
    assert not picture.exists()


def test_too_little_memory(run_main, model_folder, tokens_file, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "main_memory", lambda: (8_000_000, 10**9))
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--sequence-length", 8,
                        "--output", tmp_path / "a.png")
    assert finished.status == 1 and "free; lower --batch-size" in finished.err and finished.err.count("\n") == 1


def test_picture_that_cannot_be_written(run_main, model_folder, tokens_file):
    finished = run_main(explore, "--model", model_folder, "--prompt", "a", "--output", tokens_file / "a.png")
    assert finished.status == 1 and "cannot write" in finished.err and finished.err.count("\n") == 1


def test_another_vocabulary(run_main, tmp_path, tokens_file):
    """A step needs no tokenizer, only tokens of the model's own."""
    save_model(tmp_path / "model", TINY, random_params(TINY))
    write_tokens(tmp_path / "few.bin", np.arange(50))
    flags = ("--model", tmp_path / "model", "--batch-size", 2, "--sequence-length", 8, "--output", tmp_path / "a.png")
    assert run_main(explore, *flags, "--input-bin", tmp_path / "few.bin").status == 0
    for more, part in ((("--input-bin", tokens_file), "vocabulary of 50"), (("--prompt", "a"), "vocabulary of 50 tokens")):
        finished = run_main(explore, *flags, *more)
        assert finished.status == 1 and part in finished.err and finished.err.count("\n") == 1


def test_model_with_nan(run_main, tmp_path, tokens_file):
    """The table tells where it began; a prompt has nothing to show."""
    params = random_params(SMALL)
    params.fcw[1, 0, 0] = np.nan
    save_model(tmp_path / "model", SMALL, params)
    flags = ("--model", tmp_path / "model", "--output", tmp_path / "a.png")
    finished = run_main(explore, *flags, "--input-bin", tokens_file, "--batch-size", 1, "--sequence-length", 8)
    assert finished.status == 0 and finished.err == ""
    first = next(line for line in finished.out.splitlines() if " nan " in line)
    assert first.split()[0] == "matmul_forward" and "fch[1]" in first
    assert_is_picture(tmp_path / "a.png")
    finished = run_main(explore, *flags, "--prompt", "a b")
    assert finished.status == 1 and "not finite" in finished.err and finished.err.count("\n") == 1


# ---- the page

def test_page_is_todays():
    """If this fails, train_gpt2.py calls its kernels in another way than when the page was drawn: python dev/draw_step.py."""
    calls, _, _ = record_step(*tiny_step())
    assert Image.open(draw_step.PICTURE).text["Description"] == draw_step.Step(calls).description


def test_page(run_main, tmp_path, monkeypatch):
    """It is small and transparent, every kernel of the step has its card, and every name lies within it."""
    ends, cards = [], []
    chip, card = draw_step.Page.chip, draw_step.Page.card

    def noting_chip(page, x, y, text, colours):
        ends.append(chip(page, x, y, text, colours))
        return ends[-1]

    def noting_card(page, column, y, call, times=1):
        ends.clear()
        card(page, column, y, call, times)
        cards.append(call.kernel)
        assert max(ends) <= draw_step.edge(column) - 0.02, call
    monkeypatch.setattr(draw_step.Page, "chip", noting_chip)
    monkeypatch.setattr(draw_step.Page, "card", noting_card)
    finished = run_main(draw_step, "--output", tmp_path / "step.png")
    assert finished.status == 0 and finished.err == "", finished.err
    assert set(cards) == set(WRITES) and len(cards) == 2 + 2 + (10 + 8) + 4 + 1
    assert_is_picture(tmp_path / "step.png")
    for path in (tmp_path / "step.png", draw_step.PICTURE):
        assert path.stat().st_size < 200_000
        image = Image.open(path).convert("RGBA")
        assert image.width == 1600 and image.getpixel((0, 0))[3] == 0 and image.getextrema()[3] == (0, 255)


def luminance(colour):
    """WCAG's relative luminance of #rrggbb."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
              for value in (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(*colours):
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_page_reads_on_light_and_on_dark():
    for ground, letters in [*draw_step.COLOURS.values(), (draw_step.CARD_GROUND, draw_step.CARD_TEXT),
                            (draw_step.CARD_GROUND, draw_step.CARD_LABEL)]:
        assert contrast(ground, letters) >= 4.5
    for page in ("#ffffff", "#0d1117"):
        assert contrast(page, draw_step.GREY) >= 4


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
def test_page_is_not_drawn_of_passes_that_do_not_mirror(step, broken):
    draw_step.Step(step[0])
    with pytest.raises(ValueError):
        draw_step.Step(broken(step[0]))
