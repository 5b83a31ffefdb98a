"""Initialization, the learning-rate schedule, and the training loop: averages, clipping, stopping, learning."""
from dataclasses import replace

import numpy as np
import pytest

import gpt2
import train_gpt2
from cli import UserError
from dataloader import DataLoader, ValidationLoader, write_tokens
from gpt2 import Config, Tensors, initialize, parameter_shapes
from train_gpt2 import GPT2, evaluate
from training import OUTLIER_WINDOW, Progress, StopRequest, learning_rate, parse_options, z_score

T = 8
CONFIG = Config(max_seq_len=T, vocab_size=60, padded_vocab_size=128, num_layers=2, num_heads=2, channels=16)


def options(*flags):
    return parse_options(gpt2, "CPU", ["--input-bin", "train", "--sequence-length", str(T), *flags])


# Initialization

def test_first_weights():
    """Standard deviations to 3 %, three times the largest sampling error."""
    config = Config(64, 500, 512, num_layers=3, num_heads=2, channels=64)
    params = Tensors(parameter_shapes(config))
    initialize(params, config, seed=0)
    for name, tensor in params.items():
        if name in ("ln1w", "ln2w", "lnfw"):
            assert (tensor == 1).all(), name
        elif name.endswith("b"):
            assert (tensor == 0).all(), name
        else:
            tensor = tensor[:config.vocab_size] if name == "wte" else tensor
            expected = 0.02 / np.sqrt(2 * 3) if name in ("attprojw", "fcprojw") else 0.02
            assert tensor.std() == pytest.approx(expected, rel=0.03), name
            assert abs(tensor.mean()) < 0.05 * expected, name
    assert not params.wte[config.vocab_size:].any()


def test_first_weights_depend_on_the_seed_alone():
    def first_weights(seed):
        params = Tensors(parameter_shapes(CONFIG))
        initialize(params, CONFIG, seed)
        return params.flat
    assert np.array_equal(first_weights(3), first_weights(3))
    assert not np.array_equal(first_weights(3), first_weights(4))


# Learning rate

def rates(schedule, warmup_iters=10):
    """The learning rates of 100 steps with 10 steps of warmup, a peak of 2 and a final rate of 0.2."""
    return [learning_rate(step, 100, warmup_iters, 2.0, 0.1, schedule) for step in range(1, 101)]


@pytest.mark.parametrize("schedule, middle, end",
                         [("cosine", 1.1, 0.2), ("linear", 1.1, 0.2), ("constant", 2, 2), ("wsd", 2, 0.2)])
def test_schedule(schedule, middle, end):
    r = rates(schedule)
    assert r[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert r[54] == pytest.approx(middle)            # halfway between the end of warmup and the end of training
    assert r[99] == pytest.approx(end)
    assert r[9:] == sorted(r[9:], reverse=True)


def test_cosine_is_slow_at_both_ends():
    r = rates("cosine")
    assert r[9] - r[10] < 1e-3 and r[98] - r[99] < 1e-3 and r[54] - r[55] > 0.03


def test_wsd_falls_in_the_last_fifth():
    r = rates("wsd")
    assert r[79] == 2 and r[80] < 2
    assert r[84] == pytest.approx(1.1)               # a quarter into it, the square root has come halfway


def test_no_warmup():
    assert rates("cosine", warmup_iters=0)[0] == pytest.approx(2, rel=1e-3)


# The training loop

class Log:
    """Records what the training loop reports, in place of a TrainingLog and a Saver."""

    def __init__(self):
        self.losses, self.norms, self.rates, self.validations, self.notes = [], [], [], {}, {}

    def step(self, step, loss, norm, rate, seconds):
        self.losses.append(loss)
        self.norms.append(norm)
        self.rates.append(rate)

    def validation(self, step, loss):
        self.validations[step] = loss

    def note(self, step, text):
        self.notes[step] = text

    def save_model(self, folder, step):
        self.best = folder

    def save_checkpoint(self, progress):
        self.saved = progress.step


def train(model, settings, train_loader, val_loader, log, progress=None):
    """The training loop, with a Log in place of everything that writes to disk."""
    train_gpt2.train(model, settings, train_loader, val_loader, examples=[], tokenizer=None, log=log,
                     progress=progress or Progress(), stop=StopRequest(), saver=log)


@pytest.fixture
def loader(tmp_path):
    """loader(batch_size) is a DataLoader over 4*8 random tokens."""
    write_tokens(tmp_path / "tokens.bin", np.random.default_rng(0).integers(CONFIG.vocab_size, size=4 * T + 1))
    return lambda batch_size: DataLoader(tmp_path / "tokens.bin", batch_size, T)


def small_model(batch_size):
    model = GPT2(CONFIG, batch_size, T, threads=2)
    model.initialize(seed=0)
    return model


@pytest.mark.parametrize("norm, grad_clip, scale", [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0)])
def test_long_gradients_are_clipped(norm, grad_clip, scale):
    model = small_model(1)
    model.grads.flat[...] = 2
    model.update(1, 0.1, 0.1, norm, grad_clip)
    np.testing.assert_allclose(model.adam_m, 2 * scale * (1 - train_gpt2.BETA1), rtol=1e-6)


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_gradients_that_are_not_finite_change_nothing(norm):
    model = small_model(1)
    model.grads.flat[...] = 2
    before = model.params.flat.copy()
    model.update(1, 0.1, 0.1, norm, 1.0)
    assert np.array_equal(model.params.flat, before) and (model.grads.flat == 2).all() and not model.adam_m.any()


def test_every_update_has_the_rate_and_the_norm_of_its_step(loader, monkeypatch):
    model, log, updates = small_model(4), Log(), []
    settings = options("--num-iterations", "2", "--grad-clip", "0.5", "--learning-rate", "1e-3")
    monkeypatch.setattr(model, "update", lambda *arguments: updates.append(arguments))
    train(model, settings, loader(4), None, log)
    assert updates == [(step, step / 50 * 1e-3, 0.1, log.norms[step - 1], 0.5) for step in (1, 2)]    # in warmup


def test_accumulated_batches_train_like_one_large_batch(loader):
    logs = []
    for batch_size in (4, 1):
        settings = options("--batch-size", str(batch_size), "--total-batch-size", str(4 * T), "--num-iterations", "3")
        logs.append(Log())
        train(small_model(batch_size), settings, loader(batch_size), None, logs[-1])
    assert logs[1].losses == pytest.approx(logs[0].losses, rel=1e-5)
    assert logs[1].norms == pytest.approx(logs[0].norms, rel=1e-5)


def test_a_single_batch_is_learned_by_heart(loader):
    """And no other batch is seen or learned."""
    log, model, batches = Log(), small_model(2), loader(2)
    settings = options("--batch-size", "2", "--num-iterations", "150", "--overfit-single-batch", "--learning-rate", "1e-2")
    train(model, settings, batches, None, log)
    assert log.losses[0] == pytest.approx(np.log(CONFIG.vocab_size), rel=0.02)
    assert log.losses[-1] < 0.05
    inputs, targets = batches.next_batch()
    model.forward(inputs)
    assert model.loss(targets) > np.log(CONFIG.vocab_size)


def test_validation_between_and_after(loader):
    log, val_loader = Log(), ValidationLoader(loader(2).shards[0].path, 2, T)
    settings = options("--batch-size", "2", "--num-iterations", "5", "--input-val-bin", "val", "--val-loss-every", "2")
    model = small_model(2)
    before = evaluate(model, val_loader, max_steps=20)
    train(model, settings, loader(2), val_loader, log)
    assert list(log.validations) == [2, 4, 5]
    assert log.validations[5] == evaluate(model, val_loader, max_steps=20) < before


def test_evaluation_averages_batches_from_the_first(tmp_path):
    """The mean over targets, also if the last batch has fewer."""
    write_tokens(tmp_path / "val.bin", np.random.default_rng(0).integers(CONFIG.vocab_size, size=3 * T + 4))
    model, val_loader = small_model(1), ValidationLoader(tmp_path / "val.bin", 1, T)
    losses, sizes = [], []
    for inputs, targets in val_loader.batches():
        model.forward(inputs)
        losses.append(model.loss(targets))
        sizes.append(targets.size)
    assert sizes == [T, T, T, 3]
    for _ in range(2):
        assert evaluate(model, val_loader, max_steps=3) == pytest.approx(np.mean(losses[:3]))
    assert evaluate(model, val_loader, max_steps=99) == pytest.approx(np.average(losses, weights=sizes))


def test_nan_stops_training_and_is_located(loader):
    model = small_model(2)
    model.params.fcw[1, 3, 5] = np.nan
    with pytest.raises(UserError, match="step 1: train loss is nan .*first non-finite tensor: parameter fcw"):
        train(model, options("--batch-size", "2", "--num-iterations", "1"), loader(2), None, Log())


def test_tokens_beyond_the_context():
    with pytest.raises(ValueError, match="9 long, expected at most 8"):
        small_model(2).forward(np.zeros((1, T + 1), dtype=np.int32))


def test_classifier_in_chunks(loader, monkeypatch):
    """Loss and gradients do not depend on CLASSIFIER_ROWS, even if the last chunk is shorter."""
    inputs, targets = loader(2).next_batch()
    losses, gradients = [], []
    for rows in (512, 5):
        monkeypatch.setattr(train_gpt2, "CLASSIFIER_ROWS", rows)
        model = small_model(2)
        model.forward(inputs)
        losses += [model.loss(targets), model.backward(targets)]
        gradients.append(model.grads.flat)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert np.linalg.norm(gradients[1] - gradients[0]) <= 1e-6 * np.linalg.norm(gradients[0])


def test_next_token_logits_of_a_prompt_of_any_length(loader):
    """The logits after the last token, for prompts of any length."""
    model = small_model(1)
    tokens = loader(1).next_batch()[0]
    for length in (1, 5, T):
        model.forward(tokens)
        expected = model.acts.lnf[length - 1].astype(np.float64) @ model.params.wte[:CONFIG.vocab_size].T
        np.testing.assert_allclose(model.next_token_logits(tokens[:, :length]), expected, rtol=1e-4, atol=1e-6)


# Memory

def test_recomputed_activations_give_the_same_gradients():
    """Bit for bit, with the activations of one layer in memory; and again with another batch size."""
    config = replace(CONFIG, num_layers=4)
    results = []
    for recompute in (False, True):
        model = GPT2(config, 3, T, 2, recompute=recompute)
        model.initialize(seed=0)
        losses = []
        for B in (3, 2):
            tokens = np.random.default_rng(B).integers(CONFIG.vocab_size, size=(2, B, T), dtype=np.int32)
            model.forward(tokens[0])
            losses.append(model.backward(tokens[1]))
        results.append((losses, model.grads.flat.tobytes(), model.acts.size))
    assert results[0][:2] == results[1][:2]
    outputs_of_layers = 4 * 3 * T * CONFIG.channels
    assert results[1][2] < results[0][2] / 4 + outputs_of_layers


# Outliers

def test_z_score():
    """Of the newest value in its window, and NaN before the window is full."""
    values, window = np.random.default_rng(0).normal(size=3 * OUTLIER_WINDOW).tolist(), []
    for i, value in enumerate(values):
        score = z_score(window, value)
        latest = values[:i + 1][-OUTLIER_WINDOW:]
        assert window == latest
        if i < OUTLIER_WINDOW:
            assert np.isnan(score)
        else:
            assert score == pytest.approx((value - np.mean(latest)) / np.std(latest))
    assert z_score([1.0] * OUTLIER_WINDOW, 1.0) == 0


@pytest.mark.parametrize("flags, name", [(("--skip-update-lossz", "5"), "loss"), (("--skip-update-gradz", "5"), "norm")])
def test_update_of_an_outlier_is_skipped(loader, flags, name):
    """Only the gradients change: they are cleared. Without the flag the update is not skipped."""
    for given in (flags, ()):
        log, model = Log(), small_model(2)
        progress = Progress(latest_losses=[4 + 1e-6 * i for i in range(OUTLIER_WINDOW)],
                            latest_norms=[1e-3 + 1e-9 * i for i in range(OUTLIER_WINDOW)])
        if name == "loss":
            model.params.lnfw[...] = 300        # confident, and wrong
        before = model.params.flat.copy()
        settings = options("--batch-size", "2", "--num-iterations", "1", "--grad-clip", "0", *given)
        train(model, settings, loader(2), None, log, progress)
        assert np.array_equal(model.params.flat, before) == bool(given)
        assert not model.grads.flat.any() and model.adam_m.any() != bool(given)
        assert list(log.notes) == ([1] if given else [])
        assert not given or f"its {name} is" in log.notes[1]
