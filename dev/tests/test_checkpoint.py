"""Checkpoints: a resumed run is bit-for-bit identical to an uninterrupted one, and nothing loses a checkpoint."""
import csv
import gc
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import astuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoint
import gpt2
import llama
import train_gpt2
import train_gpt2_gpu
import train_llama
import training
from checkpoint import checkpoints, load_state
from cli import UserError
from dataloader import write_tokens
from gpt2 import Config, Tensors
from model_files import load_model, save_model
from training import Progress

CONFIG = Config(max_seq_len=8, vocab_size=60, padded_vocab_size=128, num_layers=2, num_heads=2, channels=16)
LLAMA_CONFIG = llama.Config(8, 60, 128, num_layers=2, num_heads=2, num_key_heads=1, head_size=8, channels=16, hidden=24)
TRAIN_LLAMA = SimpleNamespace(main=partial(train_gpt2.main, train_llama.Llama), GPT2=train_llama.Llama,
                              __file__=train_llama.__file__, OUT_OF_MEMORY_HINT=train_llama.OUT_OF_MEMORY_HINT)
STEPS = 12
STOP = 6
# Everything a step may depend on: two micro-batches per step from shuffled shards, a schedule that decays at the end, and soon
# after the stop an outlier among the losses and one among the norms. The model overfits, so that its best validation loss comes
# early. The seed was chosen to give all of this.
FLAGS = ["--batch-size", 2, "--sequence-length", 8, "--total-batch-size", 32, "--num-iterations", STEPS, "--warmup-iters", 2,
         "--learning-rate", 0.03, "--schedule", "wsd", "--shuffle-shards", "--skip-update-lossz", 1.3,
         "--skip-update-gradz", 1.3, "--seed", 15, "--val-loss-every", 1, "--val-max-steps", 3, "--sample-every", 0]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(gpt2, "model_config", lambda name: CONFIG)
    monkeypatch.setattr(llama, "model_config", lambda name: LLAMA_CONFIG)
    monkeypatch.setattr(training, "OUTLIER_WINDOW", 4)
    monkeypatch.setattr(training.TrainingLog, "plot", lambda log: None)     # takes a third of the time of a short run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for i in range(3):
        write_tokens(folder / f"train_{i}.bin", generator.integers(60, size=49))
    write_tokens(folder / "val.bin", generator.integers(60, size=100))
    return folder


@pytest.fixture
def run(run_main, monkeypatch, tmp_path, data):
    """run(folder, *flags, stop=step) trains in this process, into a folder; a signal comes during step `stop`."""
    def run(folder, *flags, stop=None, number=signal.SIGTERM, program=train_gpt2):
        with monkeypatch.context() as patches:
            if stop:
                def finish(model, *arguments, original=program.GPT2.finish_step):
                    finish.calls += 1
                    if finish.calls == 2 * stop:    # twice a step, since the update may be skipped
                        os.kill(os.getpid(), number)
                    return original(model, *arguments)
                finish.calls = 0
                patches.setattr(program.GPT2, "finish_step", finish)
            return run_main(program, "--output-dir", tmp_path / folder, *flags)
    new_run = [*FLAGS, "--input-bin", data / "train_*.bin", "--input-val-bin", data / "val.bin"]
    return lambda folder, *flags, new=True, **rest: run(folder, *(new_run if new else ()), *flags, **rest)


def left_behind(folder):
    """The output of a run that does not depend on time: its log, and the bytes of its models and moments."""
    rows = [(row["step"], row["train_loss"], row["val_loss"], row["grad_norm"], row["learning_rate"])
            for row in csv.DictReader(open(folder / "log.csv"))]
    latest = checkpoints(folder)[-1]
    files = [folder / "model.safetensors", folder / "best" / "model.safetensors", *map(latest.joinpath, checkpoint.MOMENTS)]
    return rows, [file.read_bytes() for file in files], load_state(latest) | {"flags": None}


@pytest.fixture
def uninterrupted(run, tmp_path):
    """The output of an uninterrupted run, made once."""
    if not EXPECTED:
        EXPECTED.append(run_uninterrupted(run, tmp_path))
    return EXPECTED[0]


EXPECTED = []


def run_uninterrupted(run, tmp_path):
    finished = run("whole")
    assert finished.status == 0 and finished.out.count("update skipped: its loss") >= 1
    assert finished.out.count("update skipped: its norm") >= 1
    rows, *_ = expected = left_behind(tmp_path / "whole")
    losses = [float(row[2]) for row in rows if row[2]]
    assert losses.index(min(losses)) < STOP - 1, "the best model must be one from before the stop"
    return expected


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopped_and_resumed_run_is_the_uninterrupted_one(run, uninterrupted, tmp_path, stop):
    """Bit for bit, for a signal in any step. Exit statuses are the shell's for Ctrl-C and SIGTERM."""
    number = signal.SIGINT if stop % 2 else signal.SIGTERM
    finished = run("out", stop=stop, number=number)
    assert finished.status == 128 + number and re.search(rf"stopping when .*\n.*stopped after step {stop} ", finished.err)
    assert [load_state(path)["step"] for path in checkpoints(tmp_path / "out")] == [stop]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert run("out", "--resume", new=False).status == 0
    assert left_behind(tmp_path / "out") == uninterrupted


FORGOTTEN = {
    "first moment": lambda latest: np.save(latest / "adam_m.npy", 0 * np.load(latest / "adam_m.npy")),
    "second moment": lambda latest: np.save(latest / "adam_v.npy", 0 * np.load(latest / "adam_v.npy")),
    "model": lambda latest: [shutil.copy(latest.parents[1] / "best" / name, latest) for name in ("model.safetensors",)],
    "step": lambda latest: [change_state(latest, step=0), latest.rename(latest.with_name("step-00000000"))],
    **{name: lambda latest, name=name: change_state(latest, **{name: getattr(Progress(), name)})
       for name in ("data", "best_val_loss", "latest_losses", "latest_norms")},
    **{flag: lambda latest, flag=flag, value=value: change_flag(latest, flag, value)
       for flag, value in dict(total_batch_size=16, schedule="cosine", warmup_iters=12, learning_rate=1e-3, num_iterations=11,
                               learning_rate_decay_frac=0.5, weight_decay=0.0, grad_clip=0.01, shuffle_shards=False,
                               batch_size=1, skip_update_lossz=0.0, skip_update_gradz=0.0, val_max_steps=1).items()},
}


def change_state(latest, **changed):
    (latest / "training.json").write_text(json.dumps(load_state(latest) | changed))


def change_flag(latest, flag, value):
    assert flag in load_state(latest)["flags"]
    change_flags(latest, {flag: value})


def change_flags(latest, flags):
    change_state(latest, flags=load_state(latest)["flags"] | flags)


@pytest.mark.parametrize("name", FORGOTTEN)
def test_whatever_is_forgotten_shows(run, uninterrupted, tmp_path, name):
    """Everything in a checkpoint is needed: without any one part, the rest of the run differs."""
    run("out", stop=STOP)
    FORGOTTEN[name](checkpoints(tmp_path / "out")[-1])
    run("out", "--resume", new=False)
    assert left_behind(tmp_path / "out") != uninterrupted


def test_gpu_program_resumes_too(run, tmp_path):
    """From its own checkpoint, and from one of the CPU program."""
    cpu = "--device", "cpu"
    assert run("whole", *cpu, program=train_gpt2_gpu).status == 0
    assert run("out", *cpu, program=train_gpt2_gpu, stop=STOP).status == 128 + signal.SIGTERM
    assert run("out", *cpu, "--resume", program=train_gpt2_gpu, new=False).status == 0
    assert left_behind(tmp_path / "out") == left_behind(tmp_path / "whole")
    run("crossed", stop=STOP)
    assert run("crossed", *cpu, "--resume", program=train_gpt2_gpu, new=False).status == 0
    losses = [[float(row[1]) for row in left_behind(tmp_path / folder)[0] if row[1]] for folder in ("crossed", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_bfloat16_run_resumes(run, uninterrupted, tmp_path):
    """Bit for bit, with the checkpoint's --dtype. The GPU program, which cannot multiply bfloat16, resumes in float32."""
    assert run("whole", "--dtype", "bfloat16").status == 0
    assert run("out", "--dtype", "bfloat16", stop=STOP).status == 128 + signal.SIGTERM
    shutil.copytree(tmp_path / "out", tmp_path / "crossed")
    assert run("out", "--resume", new=False).status == 0
    assert left_behind(tmp_path / "out") == left_behind(tmp_path / "whole") != uninterrupted
    assert run("crossed", "--device", "cpu", "--resume", program=train_gpt2_gpu, new=False).status == 0
    losses = [[float(row[1]) for row in left_behind(tmp_path / folder)[0] if row[1]] for folder in ("crossed", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-2)


def losses_of(folder):
    """The training losses in a log, and the validation losses."""
    rows, *_ = left_behind(folder)
    return [[float(row[column]) for row in rows if row[column]] for column in (1, 2)]


def test_llama(run, tmp_path):
    """It learns. Stopped and resumed, or with recomputed activations, the run is the same bit for bit. What it saved is
    fine-tuned from where it stood."""
    program = dict(program=TRAIN_LLAMA)
    assert run("whole", **program).status == 0
    expected = left_behind(tmp_path / "whole")
    train_losses, val_losses = losses_of(tmp_path / "whole")
    assert train_losses[-1] < train_losses[0] - 0.1
    assert run("out", stop=STOP, **program).status == 128 + signal.SIGTERM
    assert run("out", "--resume", new=False, **program).status == 0
    assert left_behind(tmp_path / "out") == expected
    assert run("recomputed", "--recompute", **program).status == 0
    assert left_behind(tmp_path / "recomputed") == expected
    tuning = "--model", tmp_path / "whole", "--num-iterations", 1, "--weight-decay", 0, "--warmup-iters", 0
    assert run("still", *tuning, "--learning-rate", 0, **program).status == 0
    config, params = load_model(tmp_path / "whole")
    found, still = load_model(tmp_path / "still")
    assert found == config == LLAMA_CONFIG and still.flat.tobytes() == params.flat.tobytes()
    assert losses_of(tmp_path / "still")[1] == val_losses[-1:]
    assert run("tuned", *tuning, "--learning-rate", 0.01, **program).status == 0
    tuned = load_model(tmp_path / "tuned")[1]
    assert all((getattr(tuned, name) != tensor).any() for name, tensor in params.items() if tensor.size)


def test_llamas_micro_batches(run, tmp_path):
    """They train like one large batch."""
    flags = "--num-iterations", 4, "--skip-update-lossz", 0, "--skip-update-gradz", 0, "--overfit-single-batch"
    for folder, sizes in (("two", (2, 32)), ("one", (4, 32))):
        assert run(folder, *flags, "--batch-size", sizes[0], "--total-batch-size", sizes[1], program=TRAIN_LLAMA).status == 0
    np.testing.assert_allclose(losses_of(tmp_path / "two")[0], losses_of(tmp_path / "one")[0], rtol=1e-5)


@pytest.mark.parametrize("flags, message", [
    (("--sequence-length", 9), r"--sequence-length is 9, expected at most 8, the context of --model"),
    (("--model", "l3"), r"found 'l3', expected one of 'l2', .*'l12', or a checkpoint"),
    (("--model", "l2", "--batch-size", 0), "argument --batch-size: found '0'")])
def test_llamas_mistakes(run, tmp_path, flags, message):
    save_model(tmp_path / "model", LLAMA_CONFIG, Tensors(llama.parameter_shapes(LLAMA_CONFIG)))
    finished = run("out", "--total-batch-size", 72, "--model", tmp_path / "model", *flags, program=TRAIN_LLAMA)
    assert finished.status == 2 and re.search(message, finished.err) and finished.err.count("\n") == 1


@pytest.mark.parametrize("program, flags", [(train_gpt2, ()), (train_gpt2_gpu, ("--device", "cpu"))], ids=["cpu", "gpu"])
def test_what_was_loaded_does_not_stay_in_memory(run, tmp_path, monkeypatch, program, flags):
    """While a resumed run trains, there is no second copy of the parameters, and no mapped file of moments."""
    def loaded():
        gc.collect()
        arrays = [array for array in gc.get_objects() if type(array) is Tensors and "wte" in array.shapes]
        return len(arrays), sum(type(array.base) is np.memmap for array in gc.get_objects()
                                if issubclass(type(array), np.ndarray))

    def train(*arguments, original=train_gpt2.train):
        during.append(loaded())
        return original(*arguments)

    during = []
    monkeypatch.setattr(train_gpt2, "train", train)
    assert run("new", *flags, stop=2, program=program).status == 128 + signal.SIGTERM
    shutil.copytree(tmp_path / "new", tmp_path / "resumed")
    assert run("resumed", *flags, "--resume", new=False, program=program).status == 0
    assert during[0] == during[1] and during[0][0] >= 2


def test_checkpoint_that_cannot_be_deleted(tmp_path, monkeypatch):
    def rename(*names):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(UserError, match="cannot delete .*step-00000001: Permission denied; delete it by hand"):
        checkpoint.delete_checkpoint(tmp_path / "step-00000001")


def test_best_model_is_not_the_last(run, tmp_path):
    """`best` is the model of the step with the lowest validation loss: a run of that many steps ends with it."""
    run("whole", "--schedule", "constant")
    rows, (last, best, *_), _ = left_behind(tmp_path / "whole")
    losses = [float(row[2]) for row in rows if row[2]]
    run("short", "--schedule", "constant", "--num-iterations", 1 + losses.index(min(losses)))
    assert best != last and best == (tmp_path / "short" / "model.safetensors").read_bytes()


def test_checkpoints_every_so_often(run, tmp_path):
    """The latest K are kept, the last one is of the last step, and each can be loaded as a model."""
    assert run("out", "--checkpoint-every", 4, "--keep-checkpoints", 2).status == 0
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000008", "step-00000012"]
    latest = checkpoints(tmp_path / "out")[-1]
    assert (latest / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert run("none", "--checkpoint-every", 0).status == 0
    assert not checkpoints(tmp_path / "none")


def test_finished_run(run, tmp_path):
    """It can be extended; a new run in its folder replaces everything, checkpoints included."""
    run("out")
    before = left_behind(tmp_path / "out")
    for missing in ("model.safetensors", "loss.png", None):
        if missing:
            (tmp_path / "out" / missing).unlink(missing_ok=True)
        if missing == "model.safetensors":
            assert_one_line(run("out"), 1, "was killed before it saved its model", "--resume")
        finished = run("out", "--resume", new=False)
        assert finished.status == 0 and "is finished, after 12 steps; raise --num-iterations" in finished.out
        assert left_behind(tmp_path / "out") == before and (tmp_path / "out" / "config.json").exists()
    finished = run("out", "--resume", "--num-iterations", 14, new=False)
    assert finished.status == 0 and "--num-iterations is 14 from here on; it was 12" in finished.out
    assert [load_state(path)["step"] for path in checkpoints(tmp_path / "out")] == [14]
    assert run("out", "--num-iterations", 3).status == 0
    assert [load_state(path)["step"] for path in checkpoints(tmp_path / "out")] == [3]
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "out" / "log.csv"))] == ["1", "1", "2", "2", "3", "3"]


def test_line_of_the_log_that_is_cut_in_its_step(run, uninterrupted, tmp_path):
    run("out", stop=STOP)
    append(tmp_path / "out" / "log.csv", b"1")      # of step 12
    assert run("out", "--resume", new=False).status == 0 and left_behind(tmp_path / "out") == uninterrupted


def test_checkpoints_are_in_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    assert checkpoints(tmp_path)[-1].name == "step-100000000"


def test_log_goes_on_after_the_checkpoint(run, uninterrupted, tmp_path):
    """Steps after the checkpoint are repeated, and an incomplete line is dropped."""
    run("out", stop=STOP)
    with open(tmp_path / "out" / "log.csv", "a") as log:
        log.write(f"{STOP + 1},9.9,,,9.9,0.1,1,1\n{STOP + 2},9.")
    assert run("out", "--resume", new=False).status == 0
    assert left_behind(tmp_path / "out") == uninterrupted


# Mistakes

def assert_one_line(finished, status, *parts):
    assert finished.status == status, finished
    assert finished.err.startswith("train_gpt2.py: error: ") and finished.err.count("\n") == 1, finished.err
    place = 0
    for part in map(str, parts):
        assert part in finished.err[place:], (finished.err, part)
        place = finished.err.index(part, place)


def test_nothing_to_resume_from(run, tmp_path):
    assert_one_line(run("out", "--resume"), 1, "out", "no checkpoint to --resume from")
    assert not (tmp_path / "out").exists()


def test_new_run_does_not_replace_an_unfinished_one(run, tmp_path):
    run("out", stop=STOP)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert_one_line(run("out"), 1, "stopped after 6 of 12 steps", "--resume", "--output-dir", "delete")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [("--model", "d6"), ("--sequence-length", 4), ("--sequence-length", 6),
                                   ("--total-batch-size", 64), ("--seed", 2)])
def test_what_must_not_change(run, tmp_path, flags):
    run("out", stop=STOP)
    assert_one_line(run("out", "--resume", *flags, new=False), 2, f"{flags[0]} is {flags[1]}, expected", "leave it out")


def test_default_tokens_are_not_saved_as_a_path():
    """A checkout may move, or its data be in another folder when the run is resumed."""
    options = training.parse_options(gpt2, "CPU", [])
    assert options.input_bin == str(training.TRAIN_TOKENS)
    assert options.flags["input_bin"] is options.flags["input_val_bin"] is None


def test_what_may_change_is_said(run, tmp_path):
    run("out", stop=STOP)
    finished = run("out", "--resume", "--learning-rate", 0.001, "--weight-decay", 0.1, new=False)
    assert finished.status == 0 and "--learning-rate is 0.001 from here on; it was 0.03" in finished.out
    assert "--weight-decay" not in finished.out.split("\n\n")[0].replace("weight decay", "")


def test_other_tokens(run, tmp_path, data):
    run("out", stop=STOP)
    finished = run("out", "--resume", "--input-bin", data / "train_0.bin", new=False)
    assert_one_line(finished, 1, "--input-bin", "other tokens", "start a new run")
    moved = shutil.copytree(data, tmp_path / "moved")
    assert run("out", "--resume", "--input-bin", moved / "train_*.bin", new=False).status == 0


@pytest.fixture
def stopped(run, tmp_path_factory):
    """The folder of a run that stopped after step 6, with two checkpoints, made once."""
    if not STOPPED:
        STOPPED.append(tmp_path_factory.mktemp("stopped") / "out")
        run(STOPPED[0], "--checkpoint-every", 1, "--keep-checkpoints", 2, stop=STOP)
    return STOPPED[0]


STOPPED = []


DAMAGES = {
    "no state": (lambda latest: (latest / "training.json").unlink(), ("training.json", "No such file")),
    "cut state": (lambda latest: cut(latest / "training.json"), ("training.json", "is not JSON")),
    "state of something else": (lambda latest: (latest / "training.json").write_text("[1]"), ("training.json", "is [1]")),
    "state without the step": (lambda latest: (latest / "training.json").write_text('{"flags": {}}'),
                               ("training.json", "lacks step")),
    "flags of another type": (lambda latest: change_state(latest, flags=None), ("training.json", "flags is None")),
    "unknown flag": (lambda latest: change_flags(latest, {"a b": 1}), ("training.json", "has the flag a b")),
    "beginning of a flag": (lambda latest: change_flags(latest, {"output": "elsewhere"}),
                            ("training.json", "has the flag output")),
    "flag that is not saved": (lambda latest: change_flags(latest, {"output_dir": str(latest / "elsewhere")}),
                               ("training.json", "has the flag output_dir")),
    **{f"flag {flag} = {value!r:.20}": (lambda latest, flag=flag, value=value: change_flags(latest, {flag: value}),
                                     ("training.json", f"--{flag}".replace("_", "-")))
       for flag, values in dict(batch_size=([16.0], "4", None, True, 0, 1e400, 10**30), learning_rate=("1", -1.0, {}),
                                schedule=(3, "cosin"), recompute=("yes", 1.5), input_bin=(3, ["a"]), seed=(10**400,)).items()
       for value in values},
    **{f"{name} = {value!r:.20}": (lambda latest, name=name, value=value: change_state(latest, **{name: value}),
                                ("training.json", name))
       for name, values in dict(step=(-1, 1.0, "1", 10**30), data=([0, 0], [0, 0, -1], 3, None), fingerprint=("x",),
                                best_val_loss=(math.nan, "low"), latest_losses=([math.inf], [[1.0]], [1.0] * 1000),
                                latest_norms=({},)).items() for value in values},
    "step of another checkpoint": (lambda latest: change_state(latest, step=5), ("training.json", "step is 5")),
    "place beyond the data": (lambda latest: change_state(latest, data=[0, 3, 0]), ("place in the data", "(0, 3, 0)")),
    "token beyond a file": (lambda latest: change_state(latest, data=[0, 0, 50]), ("place in the data", "(0, 0, 50)")),
    "deep state": (lambda latest: (latest / "training.json").write_text('{"flags":' * 50_000), ("training.json", "not JSON")),
    "pipe instead of a state": (lambda latest: pipe(latest / "training.json"), ("training.json", "it is a named pipe")),
    "pipe instead of a moment": (lambda latest: pipe(latest / "adam_m.npy"), ("adam_m.npy", "it is a named pipe")),
    "pipe instead of a log": (lambda latest: pipe(latest.parents[1] / "log.csv"), ("log.csv", "it is a named pipe")),
    "no numbers in the log": (lambda latest: (latest.parents[1] / "log.csv").write_text("step\nx\n"), ("log.csv",)),
    "huge field in the log": (lambda latest: (latest.parents[1] / "log.csv").write_text("9" * 10**6), ("log.csv",)),
    "no moment": (lambda latest: (latest / "adam_v.npy").unlink(), ("adam_v.npy", "No such file")),
    "cut moment": (lambda latest: cut(latest / "adam_m.npy"), ("adam_m.npy", "damaged")),
    "empty moment": (lambda latest: (latest / "adam_m.npy").write_bytes(b""), ("adam_m.npy", "damaged")),
    "moment of another shape": (lambda latest: np.save(latest / "adam_m.npy", np.zeros(3, np.float32)),
                                ("adam_m.npy", "(3,)", "expected float32 of shape (8768,)")),
    "moment of another dtype": (lambda latest: np.save(latest / "adam_m.npy", np.zeros(8768)), ("adam_m.npy", "float64")),
    "pickled moment": (lambda latest: np.save(latest / "adam_m.npy", np.array([{}], dtype=object)),
                       ("adam_m.npy", "holds object")),
    "pickle instead of a moment": (lambda latest: (latest / "adam_m.npy").write_bytes(pickle.dumps([1.0])),
                                   ("adam_m.npy", "damaged")),
    "moment with another shape": (lambda latest: np.save(latest / "adam_m.npy", np.zeros((8768, 1), np.float32)),
                                  ("adam_m.npy", "(8768, 1)")),
    "moment with more bytes": (lambda latest: append(latest / "adam_m.npy", b"more"), ("adam_m.npy", "damaged", "35,076")),
    "moment of another format": (lambda latest: (latest / "adam_m.npy").write_bytes(b"\x93NUMPY\x02\0"),
                                 ("adam_m.npy", "damaged")),
    "infinity in the log": (lambda latest: append(latest.parents[1] / "log.csv", b"3,inf,,,,1.0,0.1,1,1\n"),
                            ("log.csv", "finite numbers")),
    "no step in the log": (lambda latest: append(latest.parents[1] / "log.csv", b"x1,1.0,,,,1.0,0.1,1,1\n"),
                           ("log.csv", "a step")),
    "moment that is too short": (lambda latest: cut(latest / "adam_m.npy", 128 + 4 * 8767),
                                 ("adam_m.npy", "damaged", "35,072")),
    "no model": (lambda latest: (latest / "model.safetensors").unlink(), ("no model.safetensors",)),
    "cut model": (lambda latest: cut(latest / "model.safetensors"), ("model.safetensors",)),
}


def cut(path, size=None):
    path.write_bytes(path.read_bytes()[:size or path.stat().st_size // 2])


def append(path, contents):
    with open(path, "ab") as file:
        file.write(contents)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


if sys.platform == "win32":     # where there are no named pipes
    DAMAGES = {name: damage for name, damage in DAMAGES.items() if not name.startswith("pipe")}


@pytest.mark.parametrize("damage, parts", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint(run, stopped, tmp_path, damage, parts):
    """One line that names the file. Nothing else changes, whatever a stranger has put there."""
    shutil.copytree(stopped, tmp_path / "out")
    earlier, latest = checkpoints(tmp_path / "out")
    damage(latest)
    before = sizes(tmp_path)
    assert_one_line(run("out", "--resume", new=False), 1, *parts)
    assert sizes(tmp_path) == before


def sizes(folder):
    return {path: path.stat().st_size for path in folder.rglob("*")}


def test_checkpoint_before_the_damaged_one(run, stopped, tmp_path):
    """Once the folder of the damaged one is deleted, --resume continues from the checkpoint before."""
    shutil.copytree(stopped, tmp_path / "out")
    shutil.rmtree(checkpoints(tmp_path / "out")[-1])
    assert run("out", "--resume", new=False).status == 0


# Kills and full disks

PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpt2, training, train_gpt2, train_gpt2_gpu
from gpt2 import Config
from cli import run_program
gpt2.model_config = lambda name: Config({}, {}, {}, {}, {}, {})
run_program({program}.main, training.OUT_OF_MEMORY_HINT)
"""
ROOT = Path(train_gpt2.__file__).parent


def command(config, *flags, program="train_gpt2"):
    """The command that runs train_gpt2.py with a small model in its own process."""
    return [sys.executable, "-c", PROGRAM.format(*astuple(config), program=program), str(ROOT), *map(str, flags)]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_at_any_moment(tmp_path, data):
    """A run that writes a checkpoint after every step always leaves one to resume from."""
    flags = ["--output-dir", tmp_path / "out", "--input-bin", data / "train_*.bin", "--batch-size", 2, "--sequence-length", 8,
             "--sample-every", 0, "--checkpoint-every", 1, "--keep-checkpoints", 2, "--num-iterations", 100_000]
    generator, steps = np.random.default_rng(0), []
    for kill in range(KILLS):
        process = subprocess.Popen(command(CONFIG, *flags, *(["--resume"] if kill else [])), stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step ") and checkpoints(tmp_path / "out"):
                break
        else:
            raise AssertionError(f"no progress after {kill} kills: exit status {process.wait()}")
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.wait()
        process.stdout.close()
        latest = checkpoints(tmp_path / "out")[-1]
        checkpoint.load_checkpoint(latest)
        steps.append(load_state(latest)["step"])
    assert steps == sorted(steps), "what a checkpoint once held must not get lost"
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) <= 2 + 2


KILLS = int(os.environ.get("KILLS", 3))     # each takes a second, most of it to start Python


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of a file")
def test_full_disk(tmp_path, data, run):
    """A checkpoint that cannot be written is one line; nothing of it remains, and the one before is complete."""
    run("out", stop=STOP)
    latest = checkpoints(tmp_path / "out")[-1]
    before = {path: path.read_bytes() for path in latest.iterdir()}
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"   # less than a moment takes
    ignored = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"                     # so that a write fails
    interpreter, option, program, *rest = command(CONFIG, "--output-dir", tmp_path / "out", "--resume", "--checkpoint-every", 1)
    finished = subprocess.run([interpreter, option, limited + ignored + program, *rest], capture_output=True, text=True)
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1 and "cannot write" in finished.stderr, finished
    assert before == {path: path.read_bytes() for path in latest.iterdir()}
    assert checkpoints(tmp_path / "out") == [latest] and list(latest.parent.iterdir()) == [latest]
