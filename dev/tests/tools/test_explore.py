"""What dev/explore.py shows of a training step, and what it makes of a prompt."""
import re
from string import ascii_letters

import numpy as np
import pytest

import train_gpt2
from model_files import save_model
from conftest import random_params
from dataloader import write_tokens
from dev import explore
from dev.explore import attention_weights, next_tokens
from dev.recorder import TINY, Call, record_step, tiny_step
from generate_gpt2 import Decoder
from gpt2 import Config, Tensors, initialize, parameter_shapes
from tokenizer import gpt2_encoding

SMALL = Config(max_seq_len=40, vocab_size=50257, padded_vocab_size=50304, num_layers=3, num_heads=2, channels=8)
PNG = b"\x89PNG\r\n\x1a\n"
ROW = re.compile(r"  (\w+) +([\d.]+)  ")            # a call in the table: its kernel and its milliseconds


@pytest.fixture(scope="module")
def calls():
    """Those of a tiny model's step. The first took no time, and each a second more than that before."""
    recorded, _, _ = record_step(*tiny_step())
    return [call._replace(seconds=i) for i, call in enumerate(recorded)]


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


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved from now on."""
    saved, save = [], explore.save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)
    monkeypatch.setattr(explore, "save", keep)
    return saved


# ---- a step

def test_norms_by_layer(calls):
    """Of each tensor in each layer as the last call left it."""
    norms = explore.norms_by_layer(calls, TINY.num_layers)
    assert set(norms.activations) == {"ln1", "qkv", "att", "proj", "residual2", "ln2", "fch", "fch_gelu", "residual3"}
    assert set(norms.activation_gradients) == {"dfch", "dln", "datt", "dqkv", "dresidual"}
    assert set(norms.weight_gradients) == {"qkvw", "attprojw", "fcw", "fcprojw"}
    last = {(call.phase, array.buffer == "grads", array.name, call.layer): array.norm
            for call in calls for array in call.written}
    for tensors, phase, of_weights in zip(norms, ("forward", "backward", "backward"), (False, False, True)):
        for name, values in tensors.items():
            assert values == [last[phase, of_weights, name, l] for l in range(TINY.num_layers)] and min(values) > 0


def test_table_of_calls(calls, capsys):
    """Each with its time, and the shape and norm of the first that it wrote."""
    explore.print_calls(calls)
    _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    for i, (call, line) in enumerate(zip(calls, lines, strict=True)):
        shape = ["x".join(map(str, call.written[0].shape))] if call.written else []
        norm = call.written[0].norm if call.written else call.result
        writes = ["+" * array.read + str(array) for array in call.written]
        assert line.split() == [call.kernel, f"{1000 * i}.000", *writes, *shape, f"{norm:.4g}", *map(str, call.read)]


def test_times_by_kernel(capsys):
    calls = [Call("forward", kernel, None, [], None, seconds) for kernel, seconds in (("few", 1), ("most", 3), ("few", 1.5))]
    times = explore.times_by_kernel(calls, whole=6)
    assert times == [("most", 1, 3), ("few", 2, 2.5), ("(between them)", 0, 0.5)]
    explore.print_times(times, whole=6)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["kernel", "calls", "ms", "share"], ["most", "1", "3000.000", "50.0%"], ["few", "2", "2500.000", "41.7%"],
        ["(between", "them)", "500.000", "8.3%"], ["a", "step", "6000.000"], []]


def test_picture_of_a_step(figures, tmp_path):
    norms = explore.Norms({"act": [1, 2, 3]}, {"dact": [4, 5, 6]}, {"weight": [7, 8, 9]})
    explore.draw_recorded(norms, [("most", 1, 3), ("few", 2, 2.5)], "a step", tmp_path / "step.png")
    *panels, times = figures[0].axes
    for axes, heading, tensors in zip(panels, ("activations", "gradients of activations", "gradients of weights"), norms,
                                      strict=True):
        assert axes.get_title() == f"norms of {heading}"
        assert {line.get_label(): [*line.get_ydata()] for line in axes.lines} == tensors
    assert [label.get_text() for label in times.get_yticklabels()] == ["few", "most"]       # from below
    assert [bar.get_width() for bar in times.patches] == [2500, 3000]
    assert [text.get_text() for text in times.texts] == ["2,500.00 in 2 calls", "3,000.00"]


def test_new_models_are_those_of_the_seed_and_others_of_their_parameters():
    model, _ = tiny_step()
    initial = Tensors(parameter_shapes(TINY))
    initialize(initial, TINY, seed=5)
    explore.fill(model, None, None, seed=5)
    assert model.params.flat.tobytes() == initial.flat.tobytes()
    explore.fill(model, random_params(TINY), None, seed=5)
    assert model.params.flat.tobytes() == random_params(TINY).flat.tobytes()


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


def test_table_of_next_tokens(capsys):
    """A token was as probable as the position before it had it."""
    probabilities = np.array([[0.4, 0.5, 0.1], [0.2, 0.1, 0.7]])
    explore.print_next_tokens([1, 0], np.array([[1, 0], [2, 0]]), probabilities, "abc".__getitem__)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["0", "b", "50.0%", "b", "40.0%", "a"],
                                                ["1", "a", "40.0%", "70.0%", "c", "20.0%", "a"], []]


# ---- the program

def assert_is_picture(path):
    assert path.read_bytes().startswith(PNG) and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_step(run_main, model_folder, tokens_file, tmp_path, calls, figures, monkeypatch):
    """The table has a line for every call, with its time, and all shows on the picture."""
    monkeypatch.setattr(explore, "time_step", lambda model, batch: ([call.seconds for call in calls], 9999))
    picture = tmp_path / "new" / "step.png"
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 2,
                        "--sequence-length", 16, "--output", picture)
    assert finished.status == 0 and finished.err == "", finished.err
    assert_is_picture(picture)
    rows = [ROW.match(line) for line in finished.out.splitlines()]
    kernels = [row[1] for row in rows if row]
    assert kernels == [call.kernel for call in calls]
    assert [float(row[2]) for row in rows if row] == [1000 * call.seconds for call in calls]
    for part in ("3 layers, 2 heads", "2 x 16 tokens", "\nforward\n", "\nbackward\n", "\nupdate\n", " 32x24 ", "loss 1",
                 "grads.qkvw", "9,999,000.0 ms a step"):
        assert part in finished.out, part
    assert "nan" not in finished.out

    [figure] = figures
    *norms, times = figure.axes
    assert sum(len(axes.lines) for axes in norms) == 9 + 5 + 4 and all(len(line.get_xdata()) == 3 for line in norms[0].lines)
    assert {label.get_text() for label in times.get_yticklabels()} == {*kernels, "(between them)"}


def test_step_that_recomputes(run_main, model_folder, tokens_file, tmp_path):
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 1,
                        "--sequence-length", 8, "--recompute", "--output", tmp_path / "step.png")
    assert finished.out.count("\n  gelu_forward ") == 3 + 2


@pytest.mark.filterwarnings("error")
def test_prompt(run_main, model_folder, tmp_path, figures):
    """Tokens of half a letter, of one that the font lacks, a line's end or dollars included."""
    prompt, picture = "ROMEO: 1 $$$$_\nの 日", tmp_path / "attention.png"
    finished = run_main(explore, "--model", model_folder, "--prompt", prompt, "--layer", 2, "--head", 1, "--top", 2,
                        "--output", picture)
    assert finished.status == 0 and finished.err == "", finished.err
    assert_is_picture(picture)

    encoding = gpt2_encoding()
    tokens = encoding.encode_ordinary(prompt)
    names = [repr(encoding.decode_single_token_bytes(token).decode("utf-8", errors="replace")) for token in range(50257)]
    model = train_gpt2.GPT2(SMALL, 1, len(tokens), threads=1)
    model.set_params(random_params(SMALL))
    model.forward(np.array([tokens], dtype=np.int32))

    _, following, attention, _ = re.split(r"\n\n", finished.out, maxsplit=3)
    assert "'\\n'" in following and "' \ufffd'" in following
    likeliest, probabilities = next_tokens(model, 2)
    for n, line in enumerate(following.splitlines()[1:]):
        cells = [f"{probabilities[n - 1, tokens[n]]:.1%}"] if n > 0 else []
        cells += [f"{probabilities[n, token]:.1%} {names[token]}" for token in likeliest[n]]
        assert line.split() == f"{n} {names[tokens[n]]} {' '.join(cells)}".split()
    assert n + 1 == len(tokens)

    weights = attention_weights(model.acts.qkv[2], model.acts.att_lse[2][0], 1)
    assert "attends to, in layer 2, head 1" in attention
    for n, line in enumerate(attention.splitlines()[1:]):
        seen = sorted(range(n + 1), key=lambda j: -weights[n, j])[:explore.LOOKED_AT]
        cells = [f"{weights[n, j]:.1%} {j} {names[tokens[j]]}" for j in seen]
        assert line.split() == f"{n} {names[tokens[n]]} {' '.join(cells)}".split()
    assert n + 1 == len(tokens)

    axes = figures[0].axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [names[token][1:-1] for token in tokens]
    drawn = axes.images[0].get_array().filled(np.nan)
    assert np.nan_to_num(drawn) == pytest.approx(weights, abs=1e-5)
    assert np.isnan(drawn[np.triu_indices(len(tokens), 1)]).all()


def test_no_prompt_is_the_beginning_of_a_text(run_main, model_folder, tmp_path):
    finished = run_main(explore, "--model", model_folder, "--prompt", "", "--output", tmp_path / "a.png")
    assert finished.status == 0 and "\n0  '<|endoftext|>' " in finished.out


def test_longest_prompt_has_labels_that_can_be_read(run_main, model_folder, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(explore, "MOST_LABELS", 16)
    words = [f" {letter}" for letter in ascii_letters[:40]]
    assert run_main(explore, "--model", model_folder, "--prompt", "".join(words), "--output", tmp_path / "a.png").status == 0
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == words[::3]
    assert [*axes.get_xticks()] == [*range(0, 40, 3)]


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
