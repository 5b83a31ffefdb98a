"""Fixtures shared by the test files. Puts the top level of the checkout, where the program is, on the import path."""
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numba
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cli import UserError, run_program
from cuda_on_cpu import CpuDevice
from device import open_device
from gpt2 import Tensors, initialize, parameter_shapes
from tokenizer import GPT2Tokenizer

REFERENCE_SCRIPT = Path(__file__).resolve().parents[1] / "reference_transformers.py"
DEVICES = {
    "cpu": CpuDevice,
    "cpu-reversed": lambda: CpuDevice(reverse=True),
    "cuda": lambda: open_device("cuda", "float32"),
}


@pytest.fixture(scope="module", params=DEVICES)
def on(request):
    """A device: the CPU with the threads of a block run in order, or in reverse order, or the GPU."""
    try:
        return DEVICES[request.param]()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["cpu", "cuda"])
def on_bfloat16(request):
    """A device with activations in bfloat16."""
    try:
        return open_device(request.param, "bfloat16")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["cpu", "cuda"])
def device_flag(request):
    """The flag for a device that this machine has."""
    try:
        open_device(request.param, "float32")
    except UserError as error:
        pytest.skip(str(error))
    return "--device", request.param


@pytest.fixture(scope="module")
def encoding():
    """GPT-2's tokenizer."""
    try:
        tokenizer = GPT2Tokenizer()
        tokenizer.encode("text")
        return tokenizer
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def transformers():
    """Runs the reference script in another Python, which has transformers."""
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode != 0:
        pytest.skip(f"{python} has no transformers: name a Python that has it in TRANSFORMERS_PYTHON")

    def run(*arguments):
        finished = subprocess.run([python, REFERENCE_SCRIPT, *map(str, arguments)], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
    return run


def random_params(config):
    """GPT-2's initialization with weights 8 times larger, so that attention is not uniform."""
    params = Tensors(parameter_shapes(config))
    initialize(params, config, seed=0)
    params.flat *= 8
    return params


class Finished(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(program, *flags) runs the main of a module in this process. Any exception but a UserError fails the test."""
    def run(program, *flags):
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, flags)])
        threads = numba.get_num_threads()
        status = 0
        try:
            run_program(program.main, program.OUT_OF_MEMORY_HINT)
        except SystemExit as error:
            status = error.code
        finally:
            numba.set_num_threads(threads)
        return Finished(status, *capsys.readouterr())
    return run


@pytest.fixture(scope="session")
def cold_cache(tmp_path_factory):
    """A kernel cache that is empty at first, for processes; tests that need it cold for different kernels share it."""
    return {"GPT2_BY_HAND_CACHE": str(tmp_path_factory.mktemp("cache"))}
