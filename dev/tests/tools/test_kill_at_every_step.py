"""That the promises hold at some of the steps, and that a broken one is noticed."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
PROGRAM = """
import contextlib, shutil, sys
import checkpoint, files
from cli import run_program

@contextlib.contextmanager
def in_place(path):
    with open(path, "wb") as file:
        yield file

{patch}
from dev import kill_at_every_step
run_program(kill_at_every_step.main)
"""
ROW = re.compile(r" *(\w+) \| +(\d+) \| +(\d+) \| +(\d+) \| (.+)")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def run(*flags, patch=""):
    """Run the tool in its own process, since it forks. Returns its status, output and (scenario, promise) -> (kills, held)."""
    finished = subprocess.run([sys.executable, "-c", PROGRAM.format(patch=patch), *map(str, flags)], cwd=CHECKOUT,
                              capture_output=True, text=True)
    assert not finished.stderr, finished
    rows = [ROW.fullmatch(line) for line in finished.stdout.splitlines()]
    return finished.returncode, finished.stdout, {(row[1], row[5]): (int(row[3]), int(row[4])) for row in rows if row}


def test_promises_hold():
    status, out, promises = run("--every", 25)
    assert status == 0 and {scenario for scenario, _ in promises} == {"training", "resuming", "prepare_text", "files"}, out
    assert all(0 < kills == held for kills, held in promises.values()), out
    assert "broken before" not in out


def test_operations_are_those_that_matter():
    status, out, promises = run("--list", "--only", "training")
    assert status == 0 and not promises
    for line in ("rename out/checkpoints/step-00000004.PID.tmp -> out/checkpoints/step-00000004", "write out/log.csv",
                 "rename out/best/model.safetensors.PID.tmp -> out/best/model.safetensors",
                 "rename out/model.safetensors.PID.tmp -> out/model.safetensors",
                 "remove out/checkpoints/step-00000002.PID.tmp/adam_m.npy"):
        assert f" | {line}\n" in out, line


@pytest.mark.parametrize("patch, scenario, every, promise, broken", [
    ("files.atomic_file = in_place", "files", 1, "each file is the old or the new one",
     "write tokens.bin: neither: tokens.bin"),
    ("checkpoint.delete_checkpoint = shutil.rmtree", "training", 5, "every checkpoint loads",
     "remove out/checkpoints/step-0000"),
], ids=["file written in place", "checkpoint deleted under its name"])
def test_broken_promise_is_noticed(patch, scenario, every, promise, broken):
    status, out, promises = run("--only", scenario, "--every", every, patch=patch)
    kills, held = promises[scenario, promise]
    assert status == 1 and held < kills and f" | broken before {broken}" in out, out


def test_mistakes_are_one_line():
    finished = subprocess.run([sys.executable, CHECKOUT / "dev" / "kill_at_every_step.py", "--every", "0"],
                              capture_output=True, text=True)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and "--every" in finished.stderr
