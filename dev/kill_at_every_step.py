"""Kill programs before each of their file operations, and see which promises of dev/USAGE.md ("Long runs") hold.

    python dev/kill_at_every_step.py                    four scenarios, a minute
    python dev/kill_at_every_step.py --only training    one of them
    python dev/kill_at_every_step.py --every 10         kill before every tenth operation only
    python dev/kill_at_every_step.py --list             list the operations, kill nothing

A scenario is a command that replaces earlier files. An uninterrupted run of it counts the file operations: files opened for
writing, written, renamed and deleted, folders made and deleted. Then, for each k, the same command runs from the same starting
state, and SIGKILL ends it just before operation k. We check what is left, continue as a user would, and compare the result
with that of the uninterrupted run, bit for bit. The exit status is 1 if a promise is broken.

Only the first write after a file was opened or flushed is an operation, and half of it is in the file when the kill comes.
Operations that change nothing, such as making a folder that is there, do not count. Every run is a fork of one process, which
has imported everything and loaded the kernels.
"""
import builtins
import csv
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["NUMBA_THREADING_LAYER"] = "forksafe"    # GNU OpenMP, the usual one, ends a fork of a process that has used it
os.environ["NUMBA_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

import prepare_text
import gpt2
import train_gpt2
import training
from checkpoint import MOMENTS, checkpoints, load_checkpoint, load_state
from cli import OneLineParser, UserError, bounded, progress_bar, run_program
from dataloader import DataLoader, write_tokens
from files import atomic_file
from gpt2 import Config, Tensors, initialize, parameter_shapes
from hellaswag import Example, write_examples
from model_files import load_model, save_llmc
from tokenizer import GPT2Tokenizer

SECONDS = 60    # a run that takes longer hangs


# ----------------------------------------------------------------------------------------------------------------------
# A run that is killed

class Watch:
    """Counts this process's file operations in a folder, writes them to `log`, and kills it before number `kill` (0: never)."""

    def __init__(self, folder, log, kill):
        self.folder, self.log, self.kill, self.number, self.tree = f"{folder}{os.sep}", log, kill, 0, ""
        builtins.open = io.open = partial(self.open, open)
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.before("open", path)
        elif event == "os.mkdir" and not os.path.isdir(arguments[0]):
            self.before("mkdir", arguments[0])
        elif event == "shutil.rmtree":
            self.tree = arguments[0]
        elif event in ("os.remove", "os.rmdir"):
            path, descriptor = arguments
            if descriptor != -1:    # of a folder that rmtree deletes
                path = os.path.join(self.tree, path)
            if os.path.lexists(path):
                self.before(event[3:], path)
        elif event in ("os.rename", "os.link", "os.symlink", "os.truncate"):
            self.before(event[3:], *(path for path in arguments[:2] if not isinstance(path, int)))

    def before(self, name, *paths, half=lambda: None):
        """Count an operation. If it is the one to be killed, do half of it, and die."""
        paths = [os.path.abspath(path) for path in paths if not isinstance(path, int)]     # an int is an open file
        if not any(path.startswith(self.folder) for path in paths):
            return
        self.number += 1
        line = f"{name} {' -> '.join(path.removeprefix(self.folder) for path in paths)}\n"
        os.write(self.log.fileno(), re.sub(rf"\b{os.getpid()}\b", "PID", line).encode())
        if self.number == self.kill:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, original, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **others):
        """In place of Python's open: files to write are HalfWriters."""
        if isinstance(file, int) or mode.strip("bt") not in ("w", "a", "x"):
            return original(file, mode, buffering, encoding, errors, newline, *rest, **others)
        binary = HalfWriter(io.FileIO(file, mode.replace("t", "")))
        binary.watch = self
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)


class HalfWriter(io.BufferedWriter):
    """A file whose first write after it was opened or flushed is an operation."""
    begun = False

    def write(self, data):
        if not self.begun:
            self.begun = True
            self.watch.before("write", self.name, half=lambda: self.raw.write(bytes(data)[:len(bytes(data)) // 2]))
        return super().write(data)

    def flush(self):
        self.begun = False
        super().flush()


class Finished(NamedTuple):
    status: int             # negative: the signal that ended it
    last_line: str          # of its output
    operations: list[str]   # the one that was killed included


def run(main, folder, *flags, kill=0):
    """Run a program's main in a fork, killed before operation `kill` (0: never) in the folder. Returns Finished."""
    with tempfile.TemporaryFile("w+", errors="replace") as output, tempfile.TemporaryFile("w+") as log:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                status = 0
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout, sys.stderr, sys.argv = sys.__stdout__, sys.__stderr__, ["program", *map(str, flags)]
                signal.alarm(SECONDS)
                Watch(folder, log, kill)
                run_program(main)
            except BaseException as error:
                status = error.code if isinstance(error, SystemExit) else traceback.print_exc() or 1
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        log.seek(0)
        return Finished(status, output.read().strip().split("\n")[-1], log.read().splitlines())


def succeed(finished):
    """Raise UserError if a run failed."""
    if finished.status != 0:
        raise UserError(f"exit status {finished.status}: {finished.last_line}")
    return finished


# ----------------------------------------------------------------------------------------------------------------------
# Scenarios

class Scenario:
    """A command that is killed, and what must hold then.

        prepare(folder)             make the starting state
        start(folder, kill=0)       run the command, see `run`
        go_on(folder)               the run that follows a kill
        result(folder)              name -> what is the same after every run that was not killed
        promise_...(folder, done)   raise an exception if the promise in the docstring is broken; `done` lists the operations
                                    before the kill. Those of a subclass are checked first
    """

    def go_on(self, folder):
        return self.start(folder)

    def result(self, folder):
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}

    def learn(self, before, after):
        """Keep what the checks need from copies of the folder before and after an uninterrupted run."""
        self.old, self.new, self.names = self.result(before), self.result(after), names_in(after)

    def promise_continued(self, folder, done):
        """continuing ends as if never killed"""
        succeed(self.go_on(folder))
        found = self.result(folder)
        assert found == self.new, "not the same: " + ", ".join(name for name in {**found, **self.new}
                                                               if found.get(name) != self.new.get(name))

    def promise_clean(self, folder, done):
        """continuing leaves nothing else behind"""
        more = names_in(folder) - self.names
        assert not more, f"there is {', '.join(sorted(more))}"


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Training(Scenario):
    """train_gpt2.py, in a folder with a finished run of another shape: its checkpoints, its model and its best model."""
    STEPS = 6
    MODELS = {"d2": Config(8, 60, 128, num_layers=2, num_heads=1, channels=8),      # the earlier run
              "d4": Config(8, 60, 128, num_layers=2, num_heads=2, channels=16)}
    FLAGS = ["--batch-size", 2, "--sequence-length", 8, "--warmup-iters", 4, "--schedule", "constant", "--learning-rate", 0.05,
             "--val-loss-every", 1, "--val-max-steps", 1, "--sample-every", 0]

    def __init__(self):
        def plot(log):
            with atomic_file(log.output_dir / "loss.png") as file:
                file.write(b"a picture that takes no time to draw")
        gpt2.model_config, training.TrainingLog.plot = self.MODELS.get, plot

    def train(self, folder, shape="d4", steps=STEPS, every=2, keep=2, **rest):
        return run(train_gpt2.main, folder, "--model", shape, *self.FLAGS, "--num-iterations", steps,
                   "--output-dir", folder / "out", "--input-bin", folder / "train.bin", "--input-val-bin", folder / "val.bin",
                   "--checkpoint-every", every, "--keep-checkpoints", keep, **rest)

    start = train

    def prepare(self, folder):
        self.write_data(folder)
        return self.train(folder, "d2")

    def write_data(self, folder):
        generator = np.random.default_rng(0)
        for name in ("train.bin", "val.bin"):
            write_tokens(folder / name, generator.integers(30, size=50))    # the best models are those of steps 1, 2 and 3

    def go_on(self, folder):
        if self.own_checkpoints(folder):
            return run(train_gpt2.main, folder, "--output-dir", folder / "out", "--resume")
        return self.start(folder)

    def learn(self, before, after):
        super().learn(before, after)
        every = shutil.copytree(before, before.with_name("every"))      # where a run keeps the model of each step
        shutil.rmtree(every / "out")
        succeed(self.train(every, every=1, keep=self.STEPS))
        self.best = self.old["best"], *map(model, checkpoints(every / "out"))

    def own_checkpoints(self, folder):
        return [path for path in checkpoints(folder / "out") if load_state(path)["flags"]["model"] == "d4"]

    def promise_checkpoints(self, folder, done):
        """every checkpoint loads"""
        for path in checkpoints(folder / "out"):
            load_checkpoint(path)
            load_state(path)

    def promise_latest(self, folder, done):
        """a checkpoint stays until a later one is there"""
        written = re.findall(r" -> out/checkpoints/(step-\d+)$", "\n".join(done), re.MULTILINE)
        kept = [path.name for path in self.own_checkpoints(folder)]
        assert max(written, default="") <= max(kept, default=""), f"{max(written)} was complete; left are {kept}"

    def promise_model(self, folder, done):
        """the model in out is the old or the new one"""
        assert model(folder / "out") in (self.old["out"], self.new["out"]), "it is neither"

    def promise_best(self, folder, done):
        """the model in out/best is the old one or one of the new run"""
        assert model(folder / "out" / "best") in self.best, "it is neither"

    def result(self, folder):
        columns, out = ("step", "train_loss", "val_loss", "grad_norm", "learning_rate"), folder / "out"
        with open(out / "log.csv", newline="") as file:
            result = {"log.csv": [[row[name] for name in columns] for row in csv.DictReader(file)]}
        result |= {path.name: model(path) for path in (out, out / "best")}
        return result | {path.name: (model(path), load_state(path) | {"flags": None},
                                     [(path / name).read_bytes() for name in MOMENTS]) for path in checkpoints(out)}


class Resuming(Training):
    """train_gpt2.py --resume, of a run of the same shape that ended after two steps."""

    def prepare(self, folder):
        self.write_data(folder)
        return self.train(folder, steps=2)

    def start(self, folder, **rest):
        return run(train_gpt2.main, folder, "--output-dir", folder / "out", "--resume", "--num-iterations", self.STEPS, **rest)

    go_on = start


def model(folder):
    """A model as a value to compare: its Config and the bits of its parameters."""
    config, params = load_model(folder)
    return config, params.flat.tobytes()


class PrepareText(Scenario):
    """prepare_text.py, in place of another text with more shards."""

    def prepare(self, folder):
        GPT2Tokenizer().encode("the")     # its files stay in memory for the forks
        generator = np.random.default_rng(0)
        for name, words in (("old", 5000), ("new", 3500)):
            (folder / f"{name}.txt").write_text(" ".join(generator.choice(["the", "quick", "brown", "fox"], words)))
        return self.start(folder, "old")

    def start(self, folder, text="new", **rest):
        return run(prepare_text.main, folder, folder / f"{text}.txt", "--output", folder / "text", "--threads", 1,
                   "--shard-tokens", 1000, **rest)

    def promise_text(self, folder, done):
        """the old text or the new text, or no validation file"""
        found = self.result(folder)
        assert found in (self.old, self.new) or "text_val.bin" not in found, f"a mixture: {', '.join(found)}"

    def promise_reading(self, folder, done):
        """training reads the old or the new text, or has no validation file"""
        with tempfile.TemporaryDirectory() as copy:     # reading may finish what was killed
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            try:
                for name in ("text_train_*.bin", "text_val.bin"):
                    DataLoader(Path(copy, name), 1, 8)
            except UserError:
                if Path(copy, "text_val.bin").exists():
                    raise
            else:
                assert self.result(Path(copy)) in (self.old, self.new), "it is neither"


class Files(Scenario):
    """The writers of single files, each in place of an older file."""

    def prepare(self, folder):
        return self.start(folder, seed=1)

    def start(self, folder, seed=2, **rest):
        return run(partial(self.write, folder, seed), folder, **rest)

    def write(self, folder, seed):
        config = Training.MODELS["d2"]
        params = Tensors(parameter_shapes(config))
        initialize(params, config, seed)
        save_llmc(folder / "model.bin", config, params, version=3)
        write_examples(folder / "hellaswag.bin", [Example([seed], [[1], [2], [3], [4]], label=0)])
        write_tokens(folder / "tokens.bin", [seed] * 100)

    def promise_files(self, folder, done):
        """each file is the old or the new one"""
        found = self.result(folder)
        wrong = [name for name in self.new if found.get(name) not in (self.old[name], self.new[name])]
        assert not wrong, f"neither: {', '.join(wrong)}"


SCENARIOS = {"training": Training, "resuming": Resuming, "prepare_text": PrepareText, "files": Files}


# ----------------------------------------------------------------------------------------------------------------------
# The trial

def try_scenario(scenario, every, work):
    """Kill a scenario's command before every `every`-th operation (0: not at all), in the folder `work`.

    Returns the operations, the numbers of those killed, and promise -> [(number of an operation, complaint), ...].
    """
    folder = work / "run"
    folder.mkdir()
    succeed(scenario.prepare(folder))
    before = shutil.copytree(folder, work / "before")
    operations = succeed(scenario.start(folder)).operations
    scenario.learn(before, shutil.copytree(folder, work / "after"))

    promises = [getattr(scenario, name) for kind in type(scenario).mro() for name in vars(kind) if name.startswith("promise_")]
    broken = {promise.__doc__: [] for promise in promises}
    kills = range(min(every, len(operations)), len(operations) + 1, every) if every else ()
    with progress_bar("killed", len(kills), " runs") as bar:
        for number in kills:
            shutil.rmtree(folder)
            shutil.copytree(before, folder)
            killed = scenario.start(folder, kill=number)
            if killed.status != -signal.SIGKILL:
                raise UserError(f"operation {number} of {len(operations)} never came: {killed.last_line}")
            for promise in promises:
                try:
                    promise(folder, killed.operations[:-1])
                except Exception as error:
                    complaint = (str(error) or repr(error)).replace(f"{work}{os.sep}", "")
                    broken[promise.__doc__].append((number, complaint))
            bar.update()
    return operations, kills, broken


def main():
    parser = OneLineParser(description="Kill programs before each of their file operations, and check what is left.")
    parser.add_flag("--only", choices=SCENARIOS, help="one scenario (default: all)")
    parser.add_flag("--every", default=1, type=bounded(int, 1), metavar="N", help="kill before every Nth operation only")
    parser.add_argument("--list", action="store_true", help="list the operations, kill nothing")
    options = parser.parse_args()
    if not hasattr(os, "fork"):
        raise UserError("this needs fork and SIGKILL, which Windows lacks; run it on Linux or macOS")
    from tqdm import tqdm
    tqdm.monitor_interval = 0       # no thread, which a fork would lose
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)     # that Numba's worker, which each fork restarts, is lost
    config = gpt2.model_config("d2")
    train_gpt2.compile_kernels(config)
    train_gpt2.run_every_kernel(backward_first=False, sizes=asdict(gpt2.smallest_model(config)))   # loads them before a fork

    failed = False
    if not options.list:
        print("    scenario | operations |  kills |   held | promise")
    for name in [options.only] if options.only else SCENARIOS:
        with tempfile.TemporaryDirectory() as work:
            work = Path(work).resolve()
            operations, kills, broken = try_scenario(SCENARIOS[name](), 0 if options.list else options.every, work)
        if options.list:
            print(*(f"{name:>12} | {number:4} | {operation}" for number, operation in enumerate(operations, 1)), sep="\n")
            continue
        for promise, complaints in broken.items():
            failed |= bool(complaints)
            print(f"{name:>12} | {len(operations):10} | {len(kills):6} | {len(kills) - len(complaints):6} | {promise}")
            for number, complaint in complaints:
                print(f"{number:>25} | broken before {operations[number - 1]}: {complaint}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
