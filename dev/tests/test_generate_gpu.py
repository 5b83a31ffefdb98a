"""Generating text with the CUDA kernels: the decoder against the training program, the program against generate_gpt2.py."""
import math
import re
from functools import partial

import numpy as np
import pytest

import generate_gpt2
import generate_gpt2_gpu
import kernels_gpu
from cuda_on_cpu import CpuDevice
from generate_gpt2 import generate, mean_loss
from generate_gpt2_gpu import Decoder
from gpt2 import Config
from model_files import load_model, save_model
from test_kernels import relative_error
from test_generate import (CONFIGS, REFERENCE, THREADS, assert_cached_equals_full, assert_close, full_logits, random_params,
                           random_texts)
from test_train_gpt2_gpu import RepeatingDevice


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts, B", [("one by one", 3), ("at once", 1), ("prompts", 3)])
def test_cached_forward_equals_full_forward(on, name, B, parts):
    assert_cached_equals_full(partial(Decoder, device=on), name, B, parts)


@pytest.mark.parametrize("same_prompt", [True, False])
def test_growing_texts(on, same_prompt):
    """Also past the end of the context. All texts start with the same prompt, which is read once, or with different ones."""
    config, B = CONFIGS["odd"], 3
    T = config.max_seq_len
    params, texts = random_params(config), random_texts(config, B, 2 * T)
    if same_prompt:
        texts = [texts[0][:5] + text[5:] for text in texts]
    decoder, start = Decoder(config, params, B, on), 0
    for end in range(5, 2 * T):
        if end - start > T:
            start = end - T // 2
        assert_close(decoder.next_logits([text[:end] for text in texts]),
                     full_logits(config, params, [text[start:end] for text in texts])[:, -1])


def test_bfloat16(on_bfloat16):
    """Logits, of a prompt and then of one token after another, and losses are near those in float32."""
    config, n = CONFIGS["odd"], 9
    params, text = random_params(config), random_texts(config, 1, n)[0]
    tokens = np.array([text], dtype=np.int32)
    decoder, exact = Decoder(config, params, 1, on_bfloat16), generate_gpt2.Decoder(config, params, 1, THREADS)
    for part in np.split(tokens, [5, 6, 7, 8], axis=1):
        found, expected = (each.logits(each.forward(part)) for each in (decoder, exact))
        assert found.dtype == np.float32 and relative_error(found, expected) < 3e-2
        assert (np.float32(found).view(np.uint32) & 0xFFFF).any(), "logits are not rounded to bfloat16"
    losses = [mean_loss(each, text) for each in (decoder, exact)]
    assert math.isclose(*losses, rel_tol=2e-2) and losses[0] != losses[1]


@pytest.mark.parametrize("room", [kernels_gpu.CACHED_POSITIONS, 7])
def test_launches_repeated_for_other_tokens(monkeypatch, room):
    """Of prompts, and of one or two texts, with a cache whose scores fit into shared memory or not."""
    monkeypatch.setattr(kernels_gpu, "CACHED_POSITIONS", room)
    config, tokens = CONFIGS["odd"], np.random.default_rng(0).integers(50, size=(2, 21), dtype=np.int32)
    params = random_params(config)
    plain, repeating = (Decoder(config, params, 2, device) for device in (CpuDevice(), RepeatingDevice()))
    for position, (B, T) in zip((0, 3, 6, 7, 8, 9, 11, 12, 13, 14), (
            (2, 3), (2, 3), (2, 1), (2, 1), (2, 1), (2, 2), (2, 1), (2, 1), (1, 1), (1, 1))):
        part = tokens[:B, position:position + T]
        expected, found = (decoder.logits(decoder.forward(part)) for decoder in (plain, repeating))
        assert np.isfinite(found).all() and found.tobytes() == expected.tobytes(), position


def test_greedy_text_of_transformers(on):
    config, params = load_model(REFERENCE)
    expected = np.load(REFERENCE / "expected.npz")
    text = expected["prompt"].tolist()
    for _ in generate(Decoder(config, params, 1, on), [text], [np.random.default_rng()], expected["continuation"].size,
                      temperature=0):
        pass
    assert text == expected["prompt"].tolist() + expected["continuation"].tolist()


@pytest.mark.parametrize("n", [2, 21, 70])
def test_mean_loss(on, n):
    config = CONFIGS["odd"]
    params, tokens = random_params(config), random_texts(config, 1, n)[0]
    on_the_cpu = mean_loss(generate_gpt2.Decoder(config, params, 1, THREADS), tokens)
    assert math.isclose(mean_loss(Decoder(config, params, 1, on), tokens), on_the_cpu, rel_tol=1e-6)


def test_two_decoders_on_two_devices():
    """Each runs its kernels on its own device, although the kernels have one device at a time."""
    class Counting(CpuDevice):
        launches = 0

        def launch(self, *args, **options):
            self.launches += 1
            super().launch(*args, **options)

    config = CONFIGS["odd"]
    params, tokens = random_params(config), np.array(random_texts(config, 1, 3), dtype=np.int32)
    devices = Counting(), Counting()
    decoders = [Decoder(config, params, 1, device) for device in devices]
    calls = (lambda decoder: decoder.forward(tokens), lambda decoder: decoder.logits(decoder.acts.ln),
             lambda decoder: decoder.losses(decoder.acts.ln, tokens[0]))
    for call in calls:
        before = [device.launches for device in devices]
        call(decoders[0])
        after = [device.launches for device in devices]
        assert after[0] > before[0] and after[1] == before[1]
        call(decoders[1])
        assert devices[0].launches == after[0] and devices[1].launches - after[1] == after[0] - before[0]


def test_program(run_main, device_flag, tmp_path):
    """It writes the same text and finds the same loss as generate_gpt2.py."""
    config = Config(16, 50257, 50304, num_layers=2, num_heads=2, channels=6)
    model = "--model", tmp_path / "model"
    save_model(model[1], config, random_params(config, scale=20))
    flags = *model, "--prompt", "To be", "--max-new-tokens", 4, "--num-samples", 2
    finished = run_main(generate_gpt2_gpu, *flags, *device_flag)
    assert finished.status == 0 and finished.out == run_main(generate_gpt2, *flags).out and "tok/s" in finished.err
    (tmp_path / "text.txt").write_text("To be, or not to be")
    scored = [run_main(program, *model, "--perplexity", tmp_path / "text.txt", *flags)
              for program, flags in ((generate_gpt2, ()), (generate_gpt2_gpu, device_flag))]
    losses = [float(re.search("loss ([0-9.]+) nats", finished.out)[1]) for finished in scored]
    assert math.isclose(*losses, rel_tol=1e-6)


def test_no_such_device(run_main, tmp_path):
    finished = run_main(generate_gpt2_gpu, "--model", tmp_path, "--prompt", "I", "--device", "gpu")
    assert finished.status == 2 and finished.err.endswith("--device gpu: expected cpu, cuda, or cuda:1 for the second GPU\n")
