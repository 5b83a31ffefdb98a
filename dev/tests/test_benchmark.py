"""The benchmark's arithmetic, and a run of it without PyTorch. No test here asserts anything about time."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

DEV = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DEV))

import train_gpt2
from benchmark import OURS, PROGRAMS, Shape, summarize, time_kernels
from gpt2 import Config, training_flops


def test_flops_of_the_kernels_add_up_to_the_flops_of_a_step(monkeypatch):
    """Counted call by call from the shapes of the arguments, and by formula."""
    kernels = SimpleNamespace(**vars(train_gpt2.kernels))
    monkeypatch.setattr(train_gpt2, "kernels", kernels)
    config = Config(max_seq_len=16, vocab_size=120, padded_vocab_size=128, num_layers=2, num_heads=2, channels=32)
    model = train_gpt2.GPT2(config, batch_size=3, sequence_length=10, threads=1)
    tokens = np.ones((3, 10), dtype=np.int32)
    calls = time_kernels(kernels)
    model.forward(tokens)
    model.backward(tokens)
    assert sum(flops for _, _, flops in calls) == sum(training_flops(config, 3, 10))
    assert {"encoder_forward", "attention_backward"} <= {name for name, _, _ in calls}


def test_ratio_is_the_median_over_rounds():
    """A round in which the machine was slow for both programs moves the median time, and not the ratio."""
    def rounds(*seconds):
        return [dict(seconds=[value], peak_memory=memory) for memory, value in enumerate(seconds)]
    summary = summarize({OURS: rounds(1.0, 10.0, 2.0), "peer": rounds(2.0, 20.0, 6.0)})
    assert summary[OURS] == (2000.0, 1.0, 2)
    assert summary["peer"] == (6000.0, 2.0, 2)


def run(*flags):
    return subprocess.run([sys.executable, DEV / "benchmark.py", *map(str, flags)], capture_output=True, text=True)


def test_without_pytorch_it_measures_the_program_alone(tmp_path):
    python, chart = tmp_path / "python", tmp_path / "chart.png"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    finished = run("--model", "d2", "--shapes", "1x16", "2x16", "--rounds", 1, "--steps", 1,
                   "--python", python, "--output", chart)
    assert finished.returncode == 0, finished.stderr
    assert f"no PyTorch in {python}" in finished.stderr
    for shape in ("1x16", "2x16"):
        assert f"| {shape}  | {OURS}" in finished.stdout
        assert f"kernel at {shape}" in finished.stdout
    assert not any(name in finished.stdout for name in PROGRAMS if name != OURS)
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [("--shapes", "4x"), ("--shapes", "1x2048"), ("--python", "/no/such/python"),
                                   ("--rounds", "0")])
def test_a_mistake_on_the_command_line_is_one_line(flags):
    finished = run(*flags)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and flags[0] in finished.stderr
