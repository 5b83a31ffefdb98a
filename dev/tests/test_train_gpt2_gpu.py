"""The whole GPU program: against the PyTorch reference, against the CPU program, and the mistakes of a user.

The checks of test_gpt2.py, on three devices: on the CPU with a block's threads run from the first to the last and from the
last to the first (cuda_on_cpu), and on the GPU, where there is one.
"""
import csv
from functools import partial

import numpy as np
import pytest

import test_gpt2
import train_gpt2
import train_gpt2_gpu
from cli import UserError
from cuda_on_cpu import CpuDevice
from dataloader import DataLoader, write_tokens
from device import CudaDevice
from generate_gpt2_gpu import Decoder
from gpt2 import ALIGNMENT, Config, Tensors, activation_shapes, memory_needed, model_config, parameter_shapes

STEPS = 12


@pytest.fixture
def run(run_main):
    """Runs train_gpt2_gpu.py, or another program, in this process with the given flags."""
    return lambda *flags, program=train_gpt2_gpu: run_main(program, *flags)


@pytest.fixture
def tokens(tmp_path):
    """Of GPT-2's vocabulary, because of the first."""
    write_tokens(tmp_path / "tokens.bin", [50256, *np.random.default_rng(0).integers(50, size=1999)])
    return tmp_path / "tokens.bin"


@pytest.fixture
def val_tokens(tmp_path):
    write_tokens(tmp_path / "val.bin", np.random.default_rng(1).integers(50, size=50))     # not a multiple of a batch
    return tmp_path / "val.bin"


# Against PyTorch and against the CPU program

def model_on(on):
    """train_gpt2_gpu.GPT2 with the interface that test_gpt2.py expects: tokens and targets are NumPy arrays."""
    class Model(train_gpt2_gpu.GPT2):
        def __init__(self, config, batch_size, sequence_length, threads, dtype=None):
            super().__init__(config, batch_size, sequence_length, on)

        def forward(self, tokens):
            super().forward(on.to_device(tokens))

        def loss(self, targets):
            return super().loss(on.to_device(targets))

        def backward(self, targets, accumulation_steps=1):
            return super().backward(on.to_device(targets), accumulation_steps)

    return Model


@pytest.mark.parametrize("check", [check for check in test_gpt2.CHECKS["tiny"] if check is not test_gpt2.check_bfloat16])
def test_tiny_model_against_pytorch(on, check):
    reference = test_gpt2.Reference(test_gpt2.TINY, test_gpt2.BOUNDS["tiny"])
    failed = [row for row in check(model_on(on), reference) if not row.ok]
    assert not failed


def test_bfloat16_against_pytorch(on_bfloat16, monkeypatch):
    """Gradients of six tiny models, against the errors of PyTorch's autocast, which keeps the residual stream in float32."""
    monkeypatch.setattr(test_gpt2, "BFLOAT16_BOUND", 1.5)
    rows = test_gpt2.check_bfloat16(model_on(on_bfloat16), test_gpt2.Reference(test_gpt2.TINY, 0))
    failed = [row for row in rows if not row.ok]
    assert not failed


def test_chunks_of_the_classifier(on, monkeypatch):
    """A batch of more rows than CLASSIFIER_ROWS has the same loss and gradients."""
    reference = test_gpt2.Reference(test_gpt2.TINY, test_gpt2.BOUNDS["tiny"])
    monkeypatch.setattr(train_gpt2_gpu, "CLASSIFIER_ROWS", 50)
    rows = [*test_gpt2.check_gradients(model_on(on), reference), *test_gpt2.check_losses(model_on(on), reference)]
    assert all(row.ok for row in rows)


def columns(path, *names):
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[name] or "nan") for name in names] for row in rows])


def test_training_in_bfloat16_like_the_cpu_program_in_float32(run, device_flag, tokens, tmp_path):
    """Twenty steps of a model with flash attention: losses to 2e-2 relative."""
    flags = ("--model", "d2", "--batch-size", 2, "--sequence-length", 70, "--num-iterations", 20, "--warmup-iters", 2,
             "--input-bin", tokens, "--sample-every", 0, "--learning-rate", 1e-3)
    losses = []
    for program, own in ((train_gpt2, ()), (train_gpt2_gpu, (*device_flag, "--dtype", "bfloat16"))):
        finished = run(*flags, *own, "--output-dir", tmp_path / program.__name__, program=program)
        assert finished.status == 0, finished.err
        losses.append(columns(tmp_path / program.__name__ / "log.csv", "train_loss"))
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)
    assert losses[0][0] - losses[0][-1] > 1 and (losses[0] != losses[1]).any()


def test_training_like_the_cpu_program(run, device_flag, tokens, val_tokens, tmp_path):
    """A dozen steps with accumulation and clipping, and a validation: losses and norms to 1e-5 relative."""
    flags = ("--model", "d2", "--batch-size", 2, "--sequence-length", 9, "--total-batch-size", 36, "--num-iterations", STEPS,
             "--input-bin", tokens, "--input-val-bin", val_tokens, "--val-max-steps", 9, "--sample-every", 0,
             "--learning-rate", 1e-3, "--warmup-iters", 2, "--val-loss-every", 10)
    for program, own in ((train_gpt2, ()), (train_gpt2_gpu, device_flag)):
        finished = run(*flags, *own, "--output-dir", tmp_path / program.__name__, program=program)
        assert finished.status == 0, finished.err
    cpu, gpu = (columns(tmp_path / program.__name__ / "log.csv", "train_loss", "val_loss", "grad_norm")
                for program in (train_gpt2, train_gpt2_gpu))
    assert len(cpu) == STEPS + 2
    np.testing.assert_allclose(gpu, cpu, rtol=1e-5)
    assert cpu[0, 0] - cpu[-2, 0] > 1e-2     # it has learned something, so the steps were not all the same


@pytest.mark.parametrize("first, second", [(train_gpt2, train_gpt2_gpu), (train_gpt2_gpu, train_gpt2)])
def test_each_program_goes_on_from_what_the_other_saved(run, device_flag, tokens, val_tokens, tmp_path, first, second):
    """A run that changes nothing has the validation loss with which the one before it ended."""
    flags = ("--input-bin", tokens, "--input-val-bin", val_tokens, "--batch-size", 2, "--sequence-length", 9,
             "--sample-every", 0, "--val-max-steps", 3)
    own = {train_gpt2: (), train_gpt2_gpu: device_flag}
    folders = tmp_path / "first", tmp_path / "second"
    finished = [run("--model", "d2", "--num-iterations", 5, "--warmup-iters", 0, *flags, *own[first],
                    "--output-dir", folders[0], program=first),
                run("--model", folders[0], "--num-iterations", 1, "--learning-rate", 0, *flags, *own[second],
                    "--output-dir", folders[1], program=second)]
    assert [each.status for each in finished] == [0, 0], finished
    losses = [columns(folder / "log.csv", "val_loss")[-1, 0] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[0] < 10.8
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def test_the_same_run_twice_gives_the_same_bits(on):
    reference = test_gpt2.Reference(test_gpt2.TINY, 0)
    runs = [list(test_gpt2.train(test_gpt2.build(model_on(on), reference), reference)) for _ in range(2)]
    assert runs[0] == runs[1] and np.isfinite(runs[0]).all()


def test_a_norm_that_is_not_finite_updates_nothing(on):
    reference = test_gpt2.Reference(test_gpt2.TINY, 0)
    model = test_gpt2.build(model_on(on), reference)
    test_gpt2.run(model, reference.tokens, reference.targets)
    model.grads.lnfb[0] = np.nan
    before = [on.to_host(array) for array in (model.params.flat, model.grads.flat, model.adam_m)]
    model.update(1, 0.1, 0.1, model.gradient_norm(), 1.0)
    after = [on.to_host(array) for array in (model.params.flat, model.grads.flat, model.adam_m)]
    for was, now in zip(before, after):
        np.testing.assert_array_equal(was, now)


def test_recomputed_activations_give_the_same_gradients(on):
    config = Config(max_seq_len=8, vocab_size=60, padded_vocab_size=128, num_layers=4, num_heads=2, channels=16)
    tokens = np.random.default_rng(0).integers(60, size=(2, 3, 8), dtype=np.int32)
    gradients = []
    for recompute in (False, True):
        model = train_gpt2_gpu.GPT2(config, 3, 8, on, recompute)
        model.initialize(seed=0)
        model.forward(on.to_device(tokens[0]))
        model.backward(on.to_device(tokens[1]))
        gradients.append(on.to_host(model.grads.flat).tobytes())
    assert gradients[0] == gradients[1]


def test_recomputed_activations_in_bfloat16(on_bfloat16):
    test_recomputed_activations_give_the_same_gradients(on_bfloat16)


class RepeatingDevice(CpuDevice):
    """Does as a GPU does: from the second time on, it repeats what work of that key launched before, and does not call it."""
    recording = None

    def launch(self, *args, **options):
        self.do(super().launch, *args, **options)

    def gemm(self, *args):
        self.do(super().gemm, *args)

    def do(self, function, *args, **options):
        function(*args, **options)
        if self.recording is not None:
            self.recording.append(partial(function, *args, **options))

    def empty(self, shape, dtype=np.float32):
        class Array(np.ndarray):
            def fill(array, value):
                self.do(np.ndarray.fill, array, value)
        return super().empty(shape, dtype).view(Array)

    def replay(self, graphs, key, work):
        if key in graphs:
            for repeat in graphs[key]:
                repeat()
        else:
            self.recording = graphs[key] = []
            work()
            self.recording = None


def test_launches_repeated_for_other_batches():
    """Of two shapes, and with two numbers of micro-batches."""
    config = Config(max_seq_len=8, vocab_size=60, padded_vocab_size=128, num_layers=2, num_heads=2, channels=16)
    tokens = np.random.default_rng(0).integers(60, size=(9, 2, 3, 8), dtype=np.int32)
    results = []
    for device in (CpuDevice(), RepeatingDevice()):
        model, losses = train_gpt2_gpu.GPT2(config, 3, 8, device), []
        model.initialize(seed=0)
        for i, (inputs, targets) in enumerate(tokens):
            if i in (4, 7):
                inputs, targets = inputs[:2, :5], targets[:2, :5]
            model.forward(inputs.copy())
            losses += map(float, (model.loss(targets.copy()), model.backward(targets.copy(), 1 + i // 2 % 2)))
        results.append((losses, model.grads.flat.tobytes()))
    assert results[0] == results[1] and len(set(results[0][0])) == len(tokens)


def test_two_models_on_two_devices():
    """Each launches on its own, whichever was built or used last."""
    devices, losses = (CpuDevice(), CpuDevice(reverse=True)), []
    config = Config(max_seq_len=8, vocab_size=60, padded_vocab_size=128, num_layers=1, num_heads=2, channels=16)
    tokens = np.random.default_rng(0).integers(60, size=(2, 2, 8), dtype=np.int32)
    models = [train_gpt2_gpu.GPT2(config, 2, 8, device) for device in devices]
    launched = {device: 0 for device in devices}
    for device in devices:
        def launch(*arguments, device=device, original=device.launch, **rest):
            launched[device] += 1
            original(*arguments, **rest)
        device.launch = launch
    for model in models:
        model.initialize(seed=0)
    for method in (lambda model: model.forward(tokens[0]), lambda model: model.loss(tokens[1]),
                   lambda model: losses.append(model.backward(tokens[1])), lambda model: model.gradient_norm(),
                   lambda model: model.update(1, 0.1, 0.1, model.report[1:], 1.0)):
        for model in models:
            before = dict(launched)
            method(model)
            assert {device for device in devices if launched[device] > before[device]} == {model.device}
    assert losses[0] == losses[1]


# Batches

def test_prefetched_batches_are_those_of_the_loader(on, tokens):
    plain, prefetched = (DataLoader(tokens, 2, 16) for _ in range(2))
    prefetched = train_gpt2_gpu.Prefetch(prefetched, on)
    for batch in range(70):         # more than an epoch, which has 62
        if batch == 5:
            plain.reset()
            prefetched.reset()
        for expected, found in zip(plain.next_batch(), prefetched.next_batch()):
            np.testing.assert_array_equal(on.to_host(found), expected)
    assert prefetched.num_tokens == plain.num_tokens


# Memory

def test_tensors_start_where_kernels_load_several_numbers_at_once():
    """Whatever the number of tokens: 15 in training, 1 in decoding."""
    config, device = model_config("d2"), CpuDevice()
    model = train_gpt2_gpu.GPT2(config, 1, 15, device)
    decoder = Decoder(config, Tensors(parameter_shapes(config)), 1, device)
    decoder.forward(np.zeros((1, 1), dtype=np.int32))
    for tensors in model.acts, model.scratch, decoder.acts:
        assert not any(place.start % ALIGNMENT for place in tensors.places.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_needed_is_what_is_allocated(monkeypatch, recompute, dtype):
    counting, allocated = CpuDevice(dtype), []

    def count(make, *args, **options):
        array = make(*args, **options)
        allocated.append(array.nbytes)
        return array

    for name in "zeros", "empty":
        monkeypatch.setattr(counting, name, partial(count, getattr(counting, name)))
    config = model_config("d2")
    model = train_gpt2_gpu.GPT2(config, 2, 160, counting, recompute)
    needed = memory_needed(parameter_shapes(config), activation_shapes(config, 2, 160, recompute),
                           train_gpt2_gpu.gpu_scratch_shapes(config, 2, 160, counting.Float), dtype=counting.Float)
    gaps = 4 * ALIGNMENT * 30       # between 30 tensors
    assert (model.scratch.scores.size == 0) == (dtype == "bfloat16")
    assert 0 <= sum(allocated) - needed < gaps


def test_too_large_a_model_is_refused_before_anything_is_allocated(run, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(CpuDevice, "memory", lambda self: (100_000_000, 200_000_000))
    finished = run("--device", "cpu", "--model", "d4", "--input-bin", tokens, "--batch-size", 3, "--sequence-length", 10,
                   "--sample-every", 0, "--output-dir", tmp_path / "out")
    assert finished.status == 1 and finished.err.count("\n") == 1
    for part in ("d4", "3 x 10", "0.3 GB", "0.1 of its 0.2 GB free", "--batch-size", "--model"):
        assert part in finished.err
    assert not (tmp_path / "out").exists()


# Mistakes

@pytest.mark.parametrize("flags, status, parts", [
    (("--device", "gpu"), 2, ("--device gpu", "expected cpu, cuda")),
    (("--device", "cpu", "--dtype", "tf32"), 2, ("--dtype tf32", "needs a GPU")),
    (("--dtype", "float16"), 2, ("--dtype", "'float16'", "'bfloat16'")),
])
def test_mistake_on_the_command_line(run, tokens, tmp_path, flags, status, parts):
    finished = run("--input-bin", tokens, "--sample-every", 0, "--output-dir", tmp_path / "out", *flags)
    assert finished.status == status and finished.err.count("\n") == 1
    for part in parts:
        assert part in finished.err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_one_line_says_what_to_do(run, tokens, tmp_path):
    try:
        CudaDevice(0, "float32")
    except UserError:
        finished = run("--input-bin", tokens, "--sample-every", 0, "--output-dir", tmp_path / "out")
        assert finished.status == 1 and finished.err.count("\n") == 1 and "--device cpu" in finished.err
        assert not (tmp_path / "out").exists()
    else:
        pytest.skip("there is a GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_stops_training_and_is_located(run, device_flag, tokens, tmp_path, dtype):
    finished = run(*device_flag, "--dtype", dtype, "--model", "d2", "--input-bin", tokens, "--batch-size", 1,
                   "--sequence-length", 16, "--sample-every", 0, "--learning-rate", 1e30, "--warmup-iters", 0,
                   "--output-dir", tmp_path / "out")
    assert finished.status == 1 and finished.err.count("\n") == 1
    assert "step 2" in finished.err and "first non-finite tensor" in finished.err


def test_mfu_is_in_the_step_line_where_the_peak_is_known(run, tokens, tmp_path, monkeypatch):
    flags = ("--device", "cpu", "--model", "d2", "--input-bin", tokens, "--batch-size", 1, "--sequence-length", 16,
             "--sample-every", 0, "--num-iterations", 1, "--output-dir", tmp_path / "out")
    assert "MFU" not in run(*flags).out
    monkeypatch.setattr(CpuDevice, "peak_flops", lambda self: 1e11)
    flops = 6 * 16 * (12 * 2 * 128**2 + 50304 * 128) + 6 * 2 * 128 * 16 * 17
    line = next(line for line in run(*flags).out.splitlines() if line.startswith("step 1/1 | train"))
    milliseconds, share = float(line.split("|")[4].split()[0]), float(line.split("|")[-1].split("%")[0])
    assert share == pytest.approx(100 * flops / (milliseconds / 1e3) / 1e11, abs=0.1)
