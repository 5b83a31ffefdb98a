"""explore.py: its tables of a training step and of a prompt, and its one-line errors."""
import re

import numpy as np
import pytest

import train_gpt2
from conftest import random_params
from dataloader import write_tokens
from dev import explore
from dev.explore import attention_weights, next_tokens
from dev.recorder import TINY, Call, record_step, tiny_step
from generate_gpt2 import Decoder
from gpt2 import Config
from model_files import save_model
from tokenizer import GPT2Tokenizer

SMALL = Config(max_seq_len=40, vocab_size=50257, padded_vocab_size=50304, num_layers=3, num_heads=2, channels=8)
PNG = b"\x89PNG\r\n\x1a\n"
ROW = re.compile(r"  (\w+) +([\d.]+)  ")            # one call in the table: its kernel and its milliseconds


@pytest.fixture(scope="module")
def calls():
    """The calls of a tiny model's step, which take 0, 1, 2, ... seconds."""
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


# ---- A step

def test_norms_by_layer(calls):
    """The norm of each tensor in each layer, as the last call that wrote it left it."""
    norms = explore.norms_by_layer(calls, TINY.num_layers)
    assert set(norms.activations) == {"ln1", "qkv", "att", "proj", "residual2", "ln2", "fch", "fch_gelu", "residual3"}
    assert set(norms.activation_gradients) == {"dfch", "dln", "datt", "dqkv", "dresidual"}
    assert set(norms.weight_gradients) == {"qkvw", "attprojw", "fcw", "fcprojw"}
    last = {(call.phase, array.buffer == "grads", array.name, call.layer): array.norm
            for call in calls for array in call.written}
    for tensors, phase, of_weights in zip(norms, ("forward", "backward", "backward"), (False, False, True)):
        for name, values in tensors.items():
            assert values == [last[phase, of_weights, name, l] for l in range(TINY.num_layers)] and min(values) > 0


def test_times_by_kernel():
    calls = [Call("forward", kernel, None, [], None, seconds) for kernel, seconds in (("few", 1), ("most", 3), ("few", 1.5))]
    assert explore.times_by_kernel(calls, whole=6) == [("most", 1, 3), ("few", 2, 2.5), ("(between them)", 0, 0.5)]


def test_step(run_main, model_folder, tokens_file, tmp_path, calls, monkeypatch):
    """The table has a line for every call, in order, with its time."""
    monkeypatch.setattr(explore, "time_step", lambda model, batch: ([call.seconds for call in calls], 9999))
    picture = tmp_path / "new" / "step.png"
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 2,
                        "--sequence-length", 16, "--output", picture)
    assert finished.status == 0 and finished.err == "", finished.err
    assert picture.read_bytes().startswith(PNG)
    rows = [row for row in map(ROW.match, finished.out.splitlines()) if row]
    assert [(row[1], float(row[2])) for row in rows] == [(call.kernel, 1000 * call.seconds) for call in calls]
    for part in ("3 layers, 2 heads", "2 x 16 tokens", "\nforward\n", "\nbackward\n", "\nupdate\n", " 32x24 ", "loss 1",
                 "grads.qkvw", "9,999,000.0 ms per step"):
        assert part in finished.out, part
    assert "nan" not in finished.out


def test_step_with_recompute(run_main, model_folder, tokens_file, tmp_path):
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 1,
                        "--sequence-length", 8, "--recompute", "--output", tmp_path / "step.png")
    assert finished.out.count("\n  gelu_forward ") == 3 + 2


def test_first_nan_shows_in_the_table(run_main, tmp_path, tokens_file):
    params = random_params(SMALL)
    params.fcw[1, 0, 0] = np.nan
    save_model(tmp_path / "model", SMALL, params)
    flags = ("--model", tmp_path / "model", "--output", tmp_path / "a.png")
    finished = run_main(explore, *flags, "--input-bin", tokens_file, "--batch-size", 1, "--sequence-length", 8)
    assert finished.status == 0 and finished.err == ""
    first = next(line for line in finished.out.splitlines() if " nan " in line)
    assert first.split()[0] == "matmul_forward" and "fch[1]" in first
    finished = run_main(explore, *flags, "--prompt", "a b")
    assert finished.status == 1 and "not finite" in finished.err and finished.err.count("\n") == 1


# ---- A prompt

def test_attention():
    """Rows sum to 1, no position sees a later one, and with the values they give the output of attention_forward."""
    config = Config(21, 50, 128, num_layers=2, num_heads=5, channels=35)
    T, HS = config.max_seq_len, config.channels // config.num_heads
    model = train_gpt2.GPT2(config, 1, T, threads=1)
    model.set_params(random_params(config))
    model.forward(np.random.default_rng(0).integers(config.vocab_size, size=(1, T), dtype=np.int32))
    for l in range(config.num_layers):
        for head in range(config.num_heads):
            p = attention_weights(model.acts.qkv[l], model.acts.att_lse[l][0], head, model.config.num_key_heads)
            assert p.shape == (T, T) and np.all(p >= 0) and not np.triu(p, 1).any()
            np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-4)
            v = model.acts.qkv[l][:, 2 * config.channels + head * HS:][:, :HS]
            expected = model.acts.att[l][:, head * HS:][:, :HS]
            assert np.linalg.norm(p @ v - expected) <= 1e-4 * np.linalg.norm(expected)


def test_next_tokens_are_those_of_the_decoder(monkeypatch):
    """At every position, with the logits in several chunks."""
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
    """A token's probability is the one that the position before it gave to it."""
    probabilities = np.array([[0.4, 0.5, 0.1], [0.2, 0.1, 0.7]])
    explore.print_next_tokens([1, 0], np.array([[1, 0], [2, 0]]), probabilities, "abc".__getitem__)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["0", "b", "50.0%", "b", "40.0%", "a"],
                                                ["1", "a", "40.0%", "70.0%", "c", "20.0%", "a"], []]


@pytest.mark.filterwarnings("error")
def test_prompt(run_main, model_folder, tmp_path):
    """Including tokens that are half a character, or that the font lacks, line ends, and dollars."""
    prompt, picture = "ROMEO: 1 $$$$_\nの 日", tmp_path / "attention.png"
    finished = run_main(explore, "--model", model_folder, "--prompt", prompt, "--layer", 2, "--head", 1, "--top", 2,
                        "--output", picture)
    assert finished.status == 0 and finished.err == "", finished.err
    assert picture.read_bytes().startswith(PNG)

    encoding = GPT2Tokenizer()
    tokens = encoding.encode(prompt)
    names = [repr(encoding.decode([token])) for token in tokens]
    model = train_gpt2.GPT2(SMALL, 1, len(tokens), threads=1)
    model.set_params(random_params(SMALL))
    model.forward(np.array([tokens], dtype=np.int32))
    weights = attention_weights(model.acts.qkv[2], model.acts.att_lse[2][0], 1, model.config.num_key_heads)

    attention = finished.out.split("\n\n")[2]
    assert "attends to, in layer 2, head 1" in attention
    for n, line in enumerate(attention.splitlines()[1:]):
        seen = sorted(range(n + 1), key=lambda j: -weights[n, j])[:explore.ATTENDED]
        cells = [f"{weights[n, j]:.1%} {j} {names[j]}" for j in seen]
        assert line.split() == f"{n} {names[n]} {' '.join(cells)}".split()
    assert n + 1 == len(tokens)


def test_empty_prompt_is_the_beginning_of_a_text(run_main, model_folder, tmp_path):
    finished = run_main(explore, "--model", model_folder, "--prompt", "", "--output", tmp_path / "a.png")
    assert finished.status == 0 and "\n0  '<|endoftext|>' " in finished.out


# ---- Errors

@pytest.mark.parametrize("flags, status, parts", [
    (("--prompt", "a", "--layer", 3), 2, ("--layer is 3, expected at most 2", "has 3")),
    (("--prompt", "a", "--head", 2), 2, ("--head is 2, expected at most 1", "has 2")),
    (("--prompt", 41 * " a"), 1, ("41 tokens long", "at most 40")),
    (("--sequence-length", 41), 2, ("--sequence-length is 41, expected at most 40",)),
    (("--model", "missing.bin"), 1, ("missing.bin",)),
    (("--batch-size", 50), 1, ("400 tokens", "401", "lower --batch-size")),
], ids=["layer", "head", "long prompt", "long sequence", "no such model", "large batch"])
def test_one_line_errors(run_main, model_folder, tokens_file, tmp_path, flags, status, parts):
    picture = tmp_path / "a.png"
    finished = run_main(explore, "--model", model_folder, "--input-bin", tokens_file, "--batch-size", 1, "--sequence-length", 8,
                        "--output", picture, *flags)
    assert finished.status == status and finished.err.count("\n") == 1, finished
    assert finished.err.startswith("explore.py: error: ") and all(part in finished.err for part in parts), finished.err
    assert not picture.exists()


def test_model_with_another_vocabulary(run_main, tmp_path, tokens_file):
    """A step needs no tokenizer, but tokens of the model's own vocabulary."""
    save_model(tmp_path / "model", TINY, random_params(TINY))
    write_tokens(tmp_path / "few.bin", np.arange(50))
    flags = ("--model", tmp_path / "model", "--batch-size", 2, "--sequence-length", 8, "--output", tmp_path / "a.png")
    assert run_main(explore, *flags, "--input-bin", tmp_path / "few.bin").status == 0
    finished = run_main(explore, *flags, "--input-bin", tokens_file)
    assert finished.status == 1 and "vocabulary of 50" in finished.err and finished.err.count("\n") == 1
