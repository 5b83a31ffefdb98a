"""Generating text: the decoder against the training program's forward pass, and the program as a user meets it."""
import io
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import generate_gpt2
import gpt2
from cli import UserError, run_program
from conftest import Finished
from dataloader import write_tokens
from generate_gpt2 import BITS, MEMORY_BOUND_ROWS, Decoder, TextStream, encode, generate, mean_loss, round_weights
from gpt2 import Config, Tensors, initialize, parameter_shapes
from model_files import load_model, save_model
from tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_from_files, train_tokenizer
from train_gpt2 import GPT2

THREADS = 2
PROGRAM = Path(generate_gpt2.__file__).resolve()
REFERENCE = PROGRAM.parent / "dev" / "reference_transformers"

# Odd sizes: one channel, heads of 7 and of 32 channels, channels that fill groups of 32, and of 64 with some left over.
CONFIGS = {
    "smallest": Config(9, 2, 128, num_layers=1, num_heads=1, channels=1),
    "odd": Config(21, 50, 64, num_layers=3, num_heads=5, channels=35),
    "groups": Config(40, 131, 256, num_layers=2, num_heads=5, channels=160),
}


def random_params(config, seed=0, scale=8):
    """GPT-2's initialization with larger weights, so that attention is not uniform."""
    params = Tensors(parameter_shapes(config))
    initialize(params, config, seed)
    generator = np.random.default_rng(seed)
    for name, tensor in params.items():
        tensor *= scale if tensor.ndim > 1 and name not in ("ln1w", "ln2w") else 1
        if name.endswith("b"):
            tensor += generator.normal(0, 0.1, tensor.shape).astype(np.float32)
    params.wte[config.vocab_size:] = 0
    return params


def random_texts(config, B, T, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(B, T)).tolist()


def full_logits(config, params, texts):
    """(B, T, V), by the training program's forward pass over the whole texts."""
    texts = np.array(texts, dtype=np.int32)
    model = GPT2(config, *texts.shape, THREADS)
    model.set_params(params)
    model.forward(texts)
    return (model.acts.lnf.astype(np.float64) @ params.wte[:config.vocab_size].T).reshape(*texts.shape, -1)


def assert_close(actual, expected, bound=1e-5):
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= bound, f"relative error {error:.1e}, bound {bound:.0e}"


def read(decoder, texts, parts):
    """(B, T, V): the logits at every position of texts that the decoder reads in parts of these lengths."""
    texts, position, logits = np.array(texts, dtype=np.int32), 0, []
    for part in parts:
        rows = decoder.forward(np.ascontiguousarray(texts[:, position:position + part]))
        logits.append(decoder.logits(rows).reshape(len(texts), part, -1))
        position += part
    return np.concatenate(logits, axis=1)


# The decoder

@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("B", [1, 3, 15])
@pytest.mark.parametrize("parts", ["one by one", "at once", "prompts"])
def test_cached_forward_equals_full_forward(name, B, parts):
    assert_cached_equals_full(partial(Decoder, threads=THREADS), name, B, parts)


def assert_cached_equals_full(make_decoder, name, B, parts):
    """At every position of B texts, which a decoder (config, params, B) reads in parts."""
    config = CONFIGS[name]
    T = config.max_seq_len
    parts = {"one by one": [1] * T, "at once": [T], "prompts": [T // 2, 1, 1, 3, T - T // 2 - 5]}[parts]
    params, texts = random_params(config), random_texts(config, B, T)
    actual = read(make_decoder(config, params, B), texts, [part for part in parts if part > 0])
    expected = full_logits(config, params, texts)
    for t in range(T):
        assert_close(actual[:, t], expected[:, t])


def test_context_exceeded():
    config = CONFIGS["odd"]
    decoder = Decoder(config, random_params(config), 1, THREADS)
    with pytest.raises(ValueError, match="22 tokens, expected at most 21"):
        decoder.forward(np.zeros((1, 22), dtype=np.int32))


@pytest.mark.parametrize("kind", BITS)
def test_batch_equals_single(kind):
    """Bit for bit, for up to MEMORY_BOUND_ROWS texts; more take other kernels, which add in another order."""
    config, T = CONFIGS["groups"], 12
    params, texts = random_params(config), random_texts(config, MEMORY_BOUND_ROWS + 1, T)
    params = round_weights(config, params, kind)
    alone = np.concatenate([read(Decoder(config, params, 1, THREADS), [text], [1] * T) for text in texts])
    for B in (2, 3, 4, 5, MEMORY_BOUND_ROWS):
        assert read(Decoder(config, params, B, THREADS), texts[:B], [1] * T).tobytes() == alone[:B].tobytes()
    together = read(Decoder(config, params, MEMORY_BOUND_ROWS + 1, THREADS), texts, [1] * T)
    for t in range(T):
        assert_close(together[:, t], alone[:, t], bound_of_one_by_one(kind))


def bound_of_one_by_one(kind):
    """Against integers, few rows of activations are rounded to 8 bits. test_decode_kernels.py checks that precisely."""
    return 5e-2 if BITS[kind] < 16 else 1e-5


@pytest.mark.parametrize("kind", [kind for kind in BITS if kind != "float32"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", ["one by one", "at once"])
def test_compact_weights_equal_float32_of_the_rounded_weights(name, parts, kind):
    """The compact weights, converted to float32 and used by the other kernels."""
    config = CONFIGS[name]
    T = config.max_seq_len
    params, texts = random_params(config), random_texts(config, 2, T)
    rounded = round_weights(config, params, kind)
    for tensor, weights in ((params.wte[None, :config.vocab_size], [rounded.wte]), (params.qkvw, rounded.qkvw),
                            (params.attprojw, rounded.attprojw), (params.fcw, rounded.fcw), (params.fcprojw, rounded.fcprojw)):
        for weight, array in zip(tensor, weights):
            weight[...] = stored_values(array)
    actual = read(Decoder(config, rounded, 2, THREADS), texts, [1] * T if parts == "one by one" else [T])
    assert_close(actual, full_logits(config, params, texts), bound_of_one_by_one(kind) if parts == "one by one" else 1e-5)


def stored_values(array):
    """The numbers in an array of compact weights, converted by the package gguf."""
    kinds = {np.uint16: GGMLQuantizationType.BF16, np.int8: GGMLQuantizationType.Q8_0, np.uint8: GGMLQuantizationType.Q4_0}
    return array if array.dtype == np.float32 else dequantize(array.view(np.uint8), kinds[array.dtype.type])


@pytest.mark.parametrize("kind, bits", [("bfloat16", 16), ("int8", 8.5), ("int4", 4.5)])
def test_compact_weights_are_small_and_keep_nothing_of_the_original(kind, bits):
    config = Config(16, 500, 512, num_layers=2, num_heads=4, channels=256)
    params = random_params(config)
    rounded = round_weights(config, params, kind)
    weights = [rounded.wte, *rounded.qkvw, *rounded.attprojw, *rounded.fcw, *rounded.fcprojw]
    numbers = sum(tensor.size for tensor in (params.wte[:500], params.qkvw, params.attprojw, params.fcw, params.fcprojw))
    assert 8 * sum(weight.nbytes for weight in weights) == bits * numbers
    others = [value for value in vars(rounded).values() if isinstance(value, np.ndarray)]
    assert not any(np.shares_memory(array, params.flat) for array in [*others, *weights])


@pytest.mark.parametrize("B", [1, 3])
def test_next_logits_of_growing_texts(B):
    """Beyond the context too: the model sees the most recent half of it, and then more until it is full again."""
    config = CONFIGS["odd"]
    T = config.max_seq_len
    params, texts = random_params(config), random_texts(config, B, 3 * T)
    decoder, start = Decoder(config, params, B, THREADS), 0
    for end in range(5, 3 * T):
        if end - start > T:
            start = end - T // 2
        assert_close(decoder.next_logits([text[:end] for text in texts]),
                     full_logits(config, params, [text[start:end] for text in texts])[:, -1])
        assert decoder.start == start


def test_same_prompt_for_several_texts():
    """It is read once, and every text continues it in its own way."""
    config, B = CONFIGS["odd"], 3
    params = random_params(config)
    prompt = random_texts(config, 1, 6)[0]
    texts = [prompt + later for later in random_texts(config, B, 4, seed=1)]
    decoder = Decoder(config, params, B, THREADS)
    for end in range(6, 11):
        assert_close(decoder.next_logits([text[:end] for text in texts]),
                     full_logits(config, params, [text[:end] for text in texts])[:, -1])


def generated(config, params, prompt, n, num_texts=1, seed=0, **sampling):
    texts = [list(prompt) for _ in range(num_texts)]
    generators = [np.random.default_rng([seed, i]) for i in range(num_texts)]
    for _ in generate(Decoder(config, params, num_texts, THREADS), texts, generators, n, **sampling):
        pass
    return [text[len(prompt):] for text in texts]


def test_greedy_equals_greedy_without_a_cache():
    config = CONFIGS["groups"]
    params, text = random_params(config), [3, 1, 4]
    new = generated(config, params, text, 30, temperature=0)[0]
    for token in new:
        assert token == full_logits(config, params, [text])[0, -1].argmax()
        text.append(token)
    assert len(set(new)) > 3


def test_seeds_and_samples():
    """The same seed gives the same text, another seed another; a sample does not depend on how many there are."""
    config = CONFIGS["groups"]
    params = random_params(config)
    texts = generated(config, params, [1, 2], 30, num_texts=MEMORY_BOUND_ROWS)
    assert len(set(map(tuple, texts))) == MEMORY_BOUND_ROWS
    for num_texts in (1, 2, 5, MEMORY_BOUND_ROWS):
        assert generated(config, params, [1, 2], 30, num_texts) == texts[:num_texts]
    assert generated(config, params, [1, 2], 30, seed=1)[0] != texts[0]


@pytest.fixture(scope="module", params=["committed", "gpt2", "half"])
def saved(request, tmp_path_factory):
    """(config, params, expected): a model saved by transformers, and what it computes with it; the first is of shape "odd"."""
    folder = REFERENCE
    if request.param != "committed":
        folder = tmp_path_factory.mktemp(request.param)
        request.getfixturevalue("transformers")(folder, "--shape", request.param)
    return *load_model(folder), dict(np.load(folder / "expected.npz"))


@pytest.mark.parametrize("parts", ["one by one", "at once"])
def test_logits_of_transformers(saved, parts):
    """Which are computed in float64."""
    config, params, expected = saved
    T = expected["tokens"].size
    actual = read(Decoder(config, params, 1, THREADS), expected["tokens"][None], [1] * T if parts == "one by one" else [T])[0]
    for t in range(T):
        assert_close(actual[t], expected["logits"][t])


def test_greedy_text_of_transformers(saved):
    config, params, expected = saved
    new = generated(config, params, expected["prompt"].tolist(), expected["continuation"].size, temperature=0)[0]
    assert new == expected["continuation"].tolist() and len(new) == 200 and len(set(new)) > 20


@pytest.mark.parametrize("kind", BITS)
def test_weights_that_are_not_numbers(kind):
    config = CONFIGS["groups"]
    params = random_params(config)
    params.fcw[1, 3, 3] = np.nan
    with pytest.raises(UserError, match="logits after 2 tokens are not finite.*weights are damaged.*--model"):
        generated(config, round_weights(config, params, kind), [1, 2], 1)


@pytest.mark.parametrize("n", [2, 20, 21, 22, 23, 100])
def test_mean_loss(n):
    """Windows of a context that overlap by half; every token but the first is scored once."""
    config = CONFIGS["odd"]
    T = config.max_seq_len
    params, tokens = random_params(config), random_texts(config, 1, n)[0]
    losses, start = [], 0
    while len(losses) < n - 1:
        inputs, targets = tokens[start:start + T][:n - 1 - start], tokens[start + 1:start + T + 1]
        logits = full_logits(config, params, [inputs])[0]
        all_losses = [np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, targets)]
        losses += all_losses[len(losses) - start:]
        start = len(losses) - T // 2
    assert len(losses) == n - 1
    assert math.isclose(mean_loss(Decoder(config, params, 1, THREADS), tokens), np.mean(losses), rel_tol=1e-6)


# From tokens to text

def streamed(encoding, tokens, stops=()):
    stream = TextStream(encoding, stops, [])
    return [*(stream.add(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("text", ["naïve café", "漢字かな 한국어 עברית", "🙂👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301\u200b\x00", ""])
def test_no_half_characters(encoding, text):
    """Byte by byte, the worst way to split a text into tokens."""
    pieces = streamed(encoding, [encoding.encoding.encode_single_token(bytes([byte])) for byte in text.encode()])
    assert "".join(pieces) == text and "\ufffd" not in pieces and max(map(len, pieces)) <= 1


def test_stream_of_any_tokens_is_the_text_of_all(encoding):
    """Random tokens, most of them not valid UTF-8 together."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        tokens = generator.choice([*range(188, 256), *generator.integers(50257, size=20)], size=40).tolist()
        assert "".join(streamed(encoding, tokens)) == encoding.decode(tokens)


def test_stops(encoding):
    text = "To be, or not to be: that is the question: 🙂 to be"
    tokens = encoding.encode(text)
    for stops in (["question"], ["that is", "not"], [": that"], ["be:"], ["🙂"], ["to be: what"], ["T"],
                  ["or not to be; ", "q"], ["ee", "e"]):
        expected = text[:min((text.index(stop) for stop in stops if stop in text), default=len(text))]
        assert "".join(streamed(encoding, tokens, stops)) == expected
        by_byte = [encoding.encoding.encode_single_token(bytes([byte])) for byte in text.encode()]
        assert "".join(streamed(encoding, by_byte, stops)) == expected


def test_only_what_may_begin_a_stop_waits(encoding):
    stream = TextStream(encoding, ["\n\n"], [])
    pieces = [stream.add(encoding.encoding.encode_single_token(token)) for token in (" a", "\n", "b", "\n", "\n")]
    assert pieces == [" a", "", "\nb", "", ""]
    assert stream.stopped and stream.add(encoding.encoding.encode_single_token(" c")) == "" and stream.finish() == ""


def test_spaces_between_words():
    """Where tokens hold none, a word's space depends on the token before it, which may be the prompt's."""
    words = tokenizer_from_files({"vocab.txt": b"[UNK]\nhello\n##llo\nhe\nworld"}, {}, Path("here"), 10)
    prompt, new = [1, 3], [2, 4, 1]
    stream = TextStream(words, [], prompt)
    assert [*map(stream.add, new), stream.finish()] == ["llo", " world", " hello", ""]


def test_text_for_which_a_model_has_no_row(encoding):
    assert encode(encoding, "!", CONFIGS["odd"]) == [0]
    with pytest.raises(UserError, match=r"holds ' world', token 995 of the tokenizer, but the model knows only 50 tokens"):
        encode(encoding, "! world", CONFIGS["odd"])


# The program

TINY = Config(16, 50257, 50304, num_layers=2, num_heads=2, channels=6)


@pytest.fixture
def run(run_main, monkeypatch, encoding):
    """Runs generate_gpt2.py in this process on a tiny model."""
    def run(*flags, config=TINY, params=None, stdin=None):
        params = params or random_params(config, scale=20)
        monkeypatch.setattr(generate_gpt2, "find_model", Path)
        monkeypatch.setattr(generate_gpt2, "load_model", lambda path, as_stored: (config, params))
        monkeypatch.setattr(generate_gpt2, "load_model_tokenizer", lambda path, rows: load_tokenizer(path, {}, rows))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8"))
        return run_main(generate_gpt2, "--model", "tiny", *flags)
    return run


def assert_one_line(finished, status, *parts):
    """An error with all of the parts, in this order."""
    assert finished.status == status, finished
    assert finished.err.startswith("generate_gpt2.py: error: "), finished.err
    assert finished.err.find("\n") == len(finished.err) - 1, finished.err
    assert re.search(".*".join(re.escape(str(part)) for part in parts), finished.err), (finished.err, parts)


SPEED = re.compile(r"prompt: ([\d,]+) tokens, [\d,.]+ tok/s \| generated: ([\d,]+) tokens, [\d,.]+ tok/s\n$")


def test_text_on_standard_output_and_speed_on_standard_error(run, encoding):
    finished = run("--prompt", "naïve", "--max-new-tokens", 9)
    assert finished.status == 0 and finished.out.startswith("naïve") and finished.out.endswith("\n")
    assert SPEED.fullmatch(finished.err).groups() == (str(len(encoding.encode("naïve"))), "8")


def test_the_text_is_that_of_the_tokens(run, encoding):
    """Streamed on the screen, piped, from standard input with or without a newline at its end, and decoded in one go."""
    params, prompt = random_params(TINY, scale=20), "To be, "
    texts = generated(TINY, params, encoding.encode(prompt), 12, seed=7, temperature=0.8, top_p=0.95)
    expected = prompt + encoding.decode(texts[0]) + "\n"
    flags = ("--max-new-tokens", 12, "--seed", 7)
    assert run("--prompt", prompt, *flags).out == expected
    for stdin in (prompt, prompt + "\n", prompt + "\r\n"):
        assert run(*flags, stdin=stdin.encode()).out == expected
    assert run(*flags, stdin=(prompt + "\n\n").encode()).out.startswith(prompt + "\n")
    assert run("--prompt", prompt, *flags, "--stop", expected[-2] + "nowhere").out == expected   # which may begin as it ends


def test_text_appears_as_it_is_made(run, encoding, monkeypatch):
    """When a token is sampled, all text that is certain by then has been written and flushed."""
    class Screen(io.StringIO):
        """Knows what was written to it before it was last flushed."""
        seen = ""

        def flush(self):
            self.seen = self.getvalue()

        def reconfigure(self, errors):
            pass

    screen, shown, sample = Screen(), [], generate_gpt2.sample

    def watched_sample(logits, text, *arguments, **sampling):
        shown.append((list(text), screen.seen))
        return sample(logits, text, *arguments, **sampling)

    monkeypatch.setattr(generate_gpt2, "sample", watched_sample)
    monkeypatch.setattr(sys, "stdout", screen)
    run("--prompt", "I", "--max-new-tokens", 15)
    for tokens, seen in shown:
        assert seen == "".join(streamed(encoding, tokens)[:-1])
    assert len(shown) == 15


def test_every_flag_reaches_the_sampling(run):
    """Each setting changes the text of the same seed, or makes it greedy."""
    def text(*flags):
        return run("--prompt", "I", "--max-new-tokens", 14, *flags).out
    plain = ("--temperature", 1, "--top-p", 1)
    texts = [text(*plain), text("--temperature", 3, "--top-p", 1), text("--temperature", 1, "--top-p", 0.2),
             text(*plain, "--top-k", 3), text(*plain, "--repetition-penalty", 5), text(*plain, "--seed", 1)]
    assert len(set(texts)) == len(texts)
    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, "--seed", 1) == text(*plain, "--top-k", 1)
    assert greedy == text("--temperature", 1, "--top-p", 1e-9)


def test_empty_prompt_starts_a_text(run, encoding):
    expected = encoding.decode(generated(TINY, random_params(TINY, scale=20), [END_OF_TEXT], 5, temperature=0)[0])
    assert run("--prompt", "", "--max-new-tokens", 5, "--temperature", 0).out == expected + "\n"
    assert run("--max-new-tokens", 5, "--temperature", 0, stdin=b"").out == expected + "\n"


def test_samples_in_order(run):
    alone = run("--prompt", "I", "--max-new-tokens", 6).out
    finished = run("--prompt", "I", "--max-new-tokens", 6, "--num-samples", 3)
    first, second, third = re.fullmatch(r"--- sample 1 of 3 ---\n(.*)--- sample 2 of 3 ---\n(.*)--- sample 3 of 3 ---\n(.*)",
                                        finished.out, re.DOTALL).groups()
    assert first == alone and len({first, second, third}) == 3
    assert SPEED.search(finished.err).group(2) == "15"


def test_longer_than_the_context_and_said_once(run, encoding):
    finished = run("--prompt", "I", "--max-new-tokens", 50, "--temperature", 0)
    assert finished.status == 0 and finished.err.count("context full") == 1
    assert "the latest 8 to 16 tokens" in finished.err
    expected = generated(TINY, random_params(TINY, scale=20), encoding.encode("I"), 50, temperature=0)[0]
    assert finished.out == "I" + encoding.decode(expected) + "\n"
    assert "context" not in run("--prompt", "I", "--max-new-tokens", 16).err


def test_prompt_as_long_as_the_context_and_longer(run):
    """Of a longer one, the model sees the end; that is said."""
    flags = "--max-new-tokens", 2, "--temperature", 0
    assert "context full" in run("--prompt", "I" + 15 * " a", *flags).err
    longer, end = run("--prompt", "I" + 50 * " a", *flags), run("--prompt", 8 * " a", *flags)
    assert longer.status == 0 and "context full" in longer.err and "context full" not in end.err
    assert longer.out.removeprefix("I" + 50 * " a") == end.out.removeprefix(8 * " a")


def test_one_prompt_however_it_is_given(run):
    """Byte order mark and line ends; a million spaces; <|endoftext|> is one token."""
    flags = "--max-new-tokens", 2, "--temperature", 0
    expected = run("--prompt", "One line\nTwo", *flags)
    for stdin in (b"One line\nTwo", b"One line\r\nTwo\r\n", b"\xef\xbb\xbfOne line\nTwo"):
        assert run(*flags, stdin=stdin).out == run("--prompt", stdin.decode().rstrip(), *flags).out == expected.out
    assert run("--prompt", "a" + 1_200_000 * " " + "b", *flags).status == 0
    assert SPEED.search(run("--prompt", "Hi<|endoftext|>", *flags).err).group(1) == "2"


def test_turns_that_end_with_end_of_text(run, encoding):
    """As in DialoGPT: the token stays, and no newline follows it."""
    finished = run("--interactive", stdin=b"I<|endoftext|>\nyou\n", params=silent_params())
    assert SPEED.search(finished.err).group(1) == str(2 + 1 + len(encoding.encode("you")))


def test_rows_beyond_the_tokenizer_are_never_drawn(run):
    """As in nanoGPT, whose vocabulary is padded to 50,304 rows."""
    config = Config(16, 50304, 50304, num_layers=1, num_heads=1, channels=4)
    params = random_params(config)
    params.lnfb[0] = 100
    params.wte[50257:, 0] = 100
    finished = run("--prompt", "I", "--max-new-tokens", 5, config=config, params=params)
    assert finished.status == 0 and len(finished.out) > len("I\n")


def test_text_of_a_model_with_its_own_tokenizer(run_main, tmp_path):
    """Its tokens, its special tokens, and its text; all of them are kept when the model is saved again."""
    own = train_tokenizer(["the cat and the dog, the wind and the sea " * 50], 300)
    config = Config(32, own.vocab_size, 384, num_layers=2, num_heads=2, channels=8)
    params = random_params(config, scale=20)
    save_model(tmp_path, config, params, own)
    tokens = own.encode("the cat")
    expected = own.decode(tokens + generated(config, params, tokens, 9, temperature=0)[0])
    finished = run_main(generate_gpt2, "--model", tmp_path, "--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 9)
    assert finished.out == expected + "\n"
    (tmp_path / "text.txt").write_text("the dog and the sea")
    finished = run_main(generate_gpt2, "--model", tmp_path, "--perplexity", tmp_path / "text.txt")
    bits, count = re.search(r"([\d.]+) bits per byte \| (\d+) tokens", finished.out).groups()
    loss = mean_loss(Decoder(config, params, 1, THREADS), [own.end_of_text, *own.encode("the dog and the sea")])
    assert int(count) == len(own.encode("the dog and the sea"))
    assert abs(float(bits) / (loss * int(count) / math.log(2) / len("the dog and the sea")) - 1) < 1e-4


def test_argument_that_is_not_utf_8(run):
    for flag in "--prompt", "--stop":
        assert_one_line(run(flag, "caf\udce9"), 2, flag, "expected UTF-8")


def test_conversation_survives_a_line_that_is_not_utf_8(run):
    finished = run("--interactive", "--max-new-tokens", 2, stdin=b"caf\xe9\nI" + 30 * b" a" + b"\nyou\n")
    assert finished.status == 0 and finished.out.count("\n") >= 2 and "expected UTF-8" in finished.err


def silent_params():
    """A model that ends every text at once."""
    params = random_params(TINY)
    params.lnfb[0] = 100
    params.wte[END_OF_TEXT, 0] = 100
    return params


def test_stop_and_end_of_text(run, encoding):
    flags = ("--prompt", "I", "--temperature", 0, "--max-new-tokens", 10)
    text = run(*flags).out
    assert run(*flags, "--stop", text[4:6], "--stop", "nowhere").out == text[:text.index(text[4:6], 1)] + "\n"
    finished = run(*flags, params=silent_params())
    assert finished.out == "I\n" and SPEED.search(finished.err).group(2) == "0"


def test_interactive_remembers(run, encoding):
    """The second line follows the first and its reply, after a newline; nothing is read twice."""
    params = random_params(TINY, scale=20)
    finished = run("--interactive", "--temperature", 0, "--max-new-tokens", 3, stdin=b"I\nyou\n", params=params)
    text = encoding.encode("I")
    text += generated(TINY, params, text, 3, temperature=0)[0]
    first = encoding.decode(text[1:])
    text += encoding.encode("\nyou")
    second = encoding.decode(generated(TINY, params, text, 3, temperature=0)[0])
    assert finished.out == f"{first}\n{second}\n" and finished.status == 0
    assert SPEED.search(finished.err).groups() == (str(1 + 1 + len(encoding.encode("\nyou"))), "4")
    flags = "--interactive", "--prompt", "I", "--temperature", 0, "--max-new-tokens", 3
    with_prompt = run(*flags, stdin=b"you\n", params=params)
    assert with_prompt.out == finished.out


def test_interactive_with_nothing_said(run):
    assert run("--interactive", stdin=b"").status == 0
    assert run("--interactive", "--max-new-tokens", 1, stdin=b"\n\n\n").out.count("\n") >= 3


def test_interactive_forgets_the_end_of_a_text(run, encoding):
    """A model that generates only <|endoftext|>, which must not precede the next line."""
    finished = run("--interactive", stdin=b"I\nyou\n", params=silent_params())
    assert finished.out == "\n\n"
    assert SPEED.search(finished.err).groups() == (str(1 + len(encoding.encode("\nyou"))), "0")


@pytest.mark.parametrize("flags, most", [(("--dtype", "bfloat16"), 0.01), (("--quantize", "int8"), 0.01),
                                         (("--quantize", "int4"), 0.1)])
def test_compact_weights(run, tmp_path, flags, most):
    """It generates, and its rounding changes the loss slightly."""
    config = replace(TINY, channels=64)
    finished = run("--prompt", "I", *flags, "--max-new-tokens", 3, config=config)
    assert finished.status == 0 and SPEED.search(finished.err)
    write_tokens(tmp_path / "tokens.bin", range(100))
    losses = [float(re.search(r"loss ([\d.]+)", run("--perplexity", tmp_path / "tokens.bin", *given, config=config).out)[1])
              for given in ((), flags)]
    assert 0 < abs(losses[0] - losses[1]) < most * losses[0]


def test_perplexity_of_a_text_and_of_its_tokens(run, tmp_path, encoding):
    text, tokens = tmp_path / "text.txt", tmp_path / "tokens.bin"
    text.write_text("To be, or not to be: that is the question, naïve", encoding="utf-8")
    ids = [END_OF_TEXT, *encoding.encode(text.read_text(encoding="utf-8"))]
    write_tokens(tokens, ids)
    params = random_params(TINY)
    loss = mean_loss(Decoder(TINY, params, 1, THREADS), ids)
    for path in (text, tokens):
        finished = run("--perplexity", path, params=params)
        bits = loss * (len(ids) - 1) / math.log(2) / len("To be, or not to be: that is the question, naïve".encode())
        assert finished.out == (f"perplexity {math.exp(loss):,.3f} | loss {loss:.5f} nats per token | "
                                f"{bits:.4f} bits per byte | {len(ids) - 1} tokens of {path}\n")
        assert re.fullmatch(r"[\d,.]+ tok/s\n", finished.err)


def test_perplexity_of_tokens_of_another_vocabulary(run, tmp_path):
    config = CONFIGS["odd"]
    tokens = tmp_path / "tokens.bin"
    write_tokens(tokens, [1, 2, 49, 3])
    assert run("--perplexity", tokens, config=config).out.startswith("perplexity ")
    write_tokens(tokens, [1, 2, 50, 3])
    assert_one_line(run("--perplexity", tokens, config=config), 1, tokens, "token 50 at position 2", "vocabulary of 50")


# In processes

def test_first_run_gives_the_text_of_every_later_one(tmp_path, encoding, cold_cache):
    """It compiles the kernels, and says so on standard error. From any working directory; nothing but text is piped."""
    params = random_params(TINY, scale=20)
    save_model(tmp_path / "model", TINY, params)
    new = generated(TINY, params, encoding.encode("To be"), 40, seed=1337, temperature=0.8, top_p=0.95)[0]
    expected = ("To be" + encoding.decode(new) + "\n").encode()
    environment = {**os.environ, **cold_cache, "PYTHONUTF8": "1"}
    finished = [subprocess.run([sys.executable, PROGRAM, "--model", "model", "--max-new-tokens", "40"], input=b"To be",
                               capture_output=True, cwd=tmp_path, env=environment, timeout=300) for _ in range(2)]
    for run, compiles in zip(finished, (True, False)):
        assert run.returncode == 0 and (b"compiling" in run.stderr) == compiles, run
        assert run.stdout == expected and len(run.stderr.splitlines()) <= 4


def test_one_line_for_no_model(tmp_path):
    finished = subprocess.run([sys.executable, PROGRAM, "--model", "none.bin", "--prompt", "I"], capture_output=True, text=True,
                              cwd=tmp_path, timeout=300)
    assert_one_line(Finished(finished.returncode, finished.stdout, finished.stderr), 1, "none.bin")
    assert finished.stdout == ""


# Mistakes

CORES = numba.config.NUMBA_NUM_THREADS
USAGE = {
    "negative temperature": (("--temperature", "-0.1"), ("--temperature", "'-0.1'", "at least 0")),
    "temperature nan": (("--temperature", "nan"), ("--temperature", "'nan'", "expected a number")),
    "top-p 0": (("--top-p", "0"), ("--top-p is 0", "more than 0 and at most 1")),
    "top-p above 1": (("--top-p", "1.1"), ("--top-p", "'1.1'", "at most 1")),
    "top-k": (("--top-k", "-1"), ("--top-k", "'-1'", "at least 0")),
    "penalty": (("--repetition-penalty", "0.5"), ("--repetition-penalty", "'0.5'", "at least 1")),
    "no tokens": (("--max-new-tokens", "0"), ("--max-new-tokens", "'0'", "at least 1")),
    "no samples": (("--num-samples", "0"), ("--num-samples", "'0'", "at least 1")),
    "samples in a conversation": (("--num-samples", "2", "--interactive"), ("--num-samples is 2", "1 with --interactive")),
    "empty stop": (("--stop", ""), ("--stop is empty",)),
    "other bits": (("--quantize", "int2"), ("--quantize", "'int2'", "'int8'", "'int4'")),
    "more threads than cores": (("--threads", CORES + 1), ("--threads", CORES + 1, "expected at most", CORES)),
    "unknown flag": (("--tempratur", "1"), ("--tempratur", "--help")),
}


@pytest.mark.parametrize("flags, parts", USAGE.values(), ids=USAGE)
def test_mistake_on_the_command_line(run, flags, parts):
    finished = run("--prompt", "I", *flags)
    assert_one_line(finished, 2, *parts)
    assert finished.out == ""


def test_no_model(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM)])
    with pytest.raises(SystemExit):
        run_program(generate_gpt2.main, generate_gpt2.OUT_OF_MEMORY_HINT)
    assert_one_line(Finished(2, *capsys.readouterr()), 2, "--model", "--help")


def test_files_that_cannot_be_scored(run, tmp_path):
    latin, empty, cut = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "cut.bin"
    latin.write_bytes(b"na\xefve")
    empty.write_bytes(b"")
    write_tokens(cut, [1, 2, 3])
    cut.write_bytes(cut.read_bytes()[:-1])
    assert_one_line(run("--perplexity", tmp_path / "none"), 1, "cannot read", tmp_path / "none", "No such file")
    assert_one_line(run("--perplexity", tmp_path), 1, "cannot read", tmp_path, "directory")
    assert_one_line(run("--perplexity", latin), 1, latin, "0xef at offset 2", "UTF-8")
    assert_one_line(run("--perplexity", empty), 1, empty, "holds 1 token", "at least 2")
    assert_one_line(run("--perplexity", cut), 1, cut, "1,029 bytes", "expected 1,030")


def test_prompt_that_is_not_utf_8(run):
    assert_one_line(run(stdin=b"na\xefve"), 1, "standard input", "0xef at offset 2", "UTF-8")


def test_model_without_a_tokenizer(run):
    assert_one_line(run("--prompt", "I", config=CONFIGS["odd"]), 1, "the model has no tokenizer", "tokenizer.json")


def test_more_samples_than_memory(run, monkeypatch):
    def too_large(*arguments):
        raise MemoryError
    monkeypatch.setattr(generate_gpt2.Decoder, "__init__", too_large)
    assert_one_line(run("--prompt", "I", "--num-samples", 99), 1, "memory", "--num-samples")


def test_help_states_the_real_defaults(run, monkeypatch):
    """As a value, or in words if it depends on something else; and once."""
    monkeypatch.setenv("COLUMNS", "200")
    finished = run("--help")
    assert finished.status == 0 and finished.err == ""
    texts = dict(re.findall(r"^  --([a-z0-9-]+)(.*(?:\n {10,}.*)*)", finished.out, re.MULTILINE))
    own_flags = dict.fromkeys(("quantize", "dtype", "context_length", "threads"), {})
    flags = generate_gpt2.parse_options(gpt2, "CPU", ["--model", "m"], **own_flags)._asdict()
    assert {flag.replace("-", "_") for flag in texts} == set(flags)
    for flag, text in texts.items():
        stated = re.findall(r"\(default: ([^)]*)\)", text)
        value = flags[flag.replace("-", "_")]
        if flag in ("threads", "prompt", "dtype", "temperature", "context-length"):
            assert len(stated) == 1 and stated != ["None"], text
        elif flag == "model" or value is None or value is False or value == []:
            assert stated == [], text
        else:
            assert stated == [str(value)], text
