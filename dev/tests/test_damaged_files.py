"""Damaged files of every kind that a program reads: it accepts the file and works, or ends with one line of error.

Each file is made from a valid one by one damage, which depends only on the kind and the file's index. A whole program reads it,
in this process: it must not raise, hang, warn, or need much more memory than for the valid file. A run ends after one step.
DAMAGED_FILES is the number of files of all kinds together, by default as many as take a few seconds.
"""
import contextlib
import itertools
import json
import os
import re
import reprlib
import shutil
import signal
import struct
import sys
import time
import traceback
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib.figure import Figure

import generate_gpt2
import gpt2
import train_gpt2
import training
from conftest import random_params
from dataloader import write_tokens
from gpt2 import Config
from hellaswag import Example, write_examples
from model_files import safetensors_pieces, save_llmc, save_model
from tokenizer import NO_TOKENIZER, train_tokenizer

NUM_FILES = int(os.environ.get("DAMAGED_FILES", 165))
SECONDS = 5             # for one file; most take a hundredth of a second
FACTOR = 8              # bytes of memory for each byte of the files, beyond what the valid files need
SLACK = 2**24           # and for any file, enough for a plot
PLOT_EVERY = 20         # a plot takes ten times as long as the run
CONFIG = Config(max_seq_len=8, vocab_size=60, padded_vocab_size=128, num_layers=2, num_heads=2, channels=4)
ALONE = Config(max_seq_len=8, vocab_size=60, padded_vocab_size=128, num_layers=1, num_heads=1, channels=64)
ROOT = Path(train_gpt2.__file__).parent
CHECKPOINT = "run/checkpoints/step-00000006"

# ----------------------------------------------------------------------------------------------------------------------
# Damages: functions of a generator and the contents of a file. They return other contents.

DEEP = [opening * depth + closing * depth for depth in (2_000, 100_000) for opening, closing in (("[", "]"), ('{"a":', "}"))]
# Large numbers are odd: an even --total-batch-size would be valid, and its step would take days.
LIES = ["null", "true", "false", "-1", "0", "1", "3", "1.5", "1e308", "-1e308", "1e999", "NaN", "Infinity", "-Infinity",
        "1e-400", *map(str, (2**31 + 1, 2**63 - 1, 2**63 + 1, -2**63, 10**30 + 1)), "9" * 400, "9" * 5000, '""', '"x"',
        '"a\\nb"', '"\\u0000"', '"\\ud800"', '"\\u2028"', '"1"', '"-"', '"%s"', '"$x^$"', f'"{"x" * 100_000}"', "[]", "{}",
        "[16.0]", "[[0]]", "[null]", "[-1, 0]", "[0, 99, 3]", "[0, 0, -5]", "[1e999, 1, 2, 3, 4]", '{"a": 1}', *DEEP]
KEYS = ["x", "", "a b", "class", "_x", "help", "resume", "output_dir", "input_bin", "checkpoint", "flags", "shuffle", "h", "h.",
        "h.9.x", "transformer.", "wte.weight", "lm_head.weight", "__metadata__", "n_inner", "\ud800", "a\nb", "x" * 100_000]
INTS = [0, 1, -1, 2, 3, 7, 8, 64, 127, 129, 65535, 65536, 2**30, 2**31 - 1, -2**31]
FIELDS = ["abc", "", "-1", "0", "3", "1e308", "1e400", "nan", "inf", "-inf", "1e30", "-1e300", '"', '"a', '"a"b', "\0", "1,2",
          "1_0", " 3 ", "0x10", "é", "٣", "1.5", "x" * 140_000, '"' + "\n" * 140_000]
DTYPES = ["'<f4'", "'>f4'", "'<f8'", "'|O'", "'<f'", "''", "None", "1", "'<U999999999'", "'|V0'", "'|S0'", "[('a', '<f4')]",
          "[]", "[('a', '|O')]", "[('a', '<f4', (10**9,))]", "('<f4', (2,))", "'<f4,<f4'", "'M8[s]'", "'\\n'", "[('a', 'a')]"]
SHAPES = ["({n},)", "({n}, 1)", "({n}.0,)", "[{n}]", "{n}", "()", "(0,)", "(-{n},)", "(-1,)", f"({10**18},)", "(0, {n})",
          f"({10**18}, {10**18})", f"({2**63},)", f"({10**30},)", "(True,)", "('a',)", "(None,)", "(1e400,)", f"({'1,' * 100})"]
LITERALS = ["", "{}", "[", "{'descr'", "1", "None", "{1: 2}", "__import__('os')", "{**{}}", "(" * 150 + ")" * 150, "[" * 5000,
            "-" * 9000 + "1", "9" * 5000, "{'descr': '<f4'}", "\0", "é", "'a' 'b'", "1+" * 4000 + "1", "{[]: 1}"]


def pick(rng, values):
    return values[rng.integers(len(values))]


def replace_part(replacement):
    """The damage of replacing a part of the file, often near its beginning, by replacement(rng, part)."""
    def damage(rng, contents):
        start = int(rng.integers(1 + min(len(contents), pick(rng, [16, 1200, len(contents)]))))
        part = contents[start:start + int(rng.integers(1, 40))]
        return contents[:start] + replacement(rng, part) + contents[start + len(part):]
    return damage


ANY_FILE = {
    "truncate": lambda rng, contents: contents[:rng.integers(min(len(contents), pick(rng, [40, 1200, len(contents)])))],
    "append": lambda rng, contents: contents + pick(rng, [rng.bytes(rng.integers(1, 100)), b"\n", b"\0" * 4, contents]),
    "flip bits": replace_part(lambda rng, part: bytes(byte ^ pick(rng, [0, 0, 0, 1 << rng.integers(8)]) for byte in part)),
    "overwrite": replace_part(lambda rng, part: rng.bytes(len(part))),
    "insert": replace_part(lambda rng, part: rng.bytes(rng.integers(1, 9)) + part),
    "duplicate": replace_part(lambda rng, part: part * int(rng.integers(2, 5))),
    "delete": replace_part(lambda rng, part: b""),
    "NULs": replace_part(lambda rng, part: bytes(len(part))),
    "swap": replace_part(lambda rng, part: part[len(part) // 3:] + part[:len(part) // 3]),
    "digits": replace_part(lambda rng, part: re.sub(rb"\d", b"%d" % rng.integers(10), part)),
}


def places(value):
    """Yield (container, key) of every value in a JSON document, at any depth."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def change_json(rng, contents):
    """Replace a value, delete one, or add one with an unknown, another's or the same key. Do it once or twice."""
    document, texts = [json.loads(contents)], {}        # texts: JSON that is put in later, as json.dumps would never write it
    for mark in ("@0", "@1")[:rng.integers(1, 3)]:
        container, key = pick(rng, list(places(document)))
        value, action = container[key], rng.integers(8)
        lie = pick(rng, LIES)
        if isinstance(value, (int, float)) and rng.integers(3) == 0:
            lie = pick(rng, [f"{value}.0", f"{value}e0", f'"{value}"', f"[{value}]", f"-{value}", f"{value + 1}"])
        if action == 0 and container is not document:
            del container[key]
        elif action <= 2 and isinstance(container, dict):
            container[mark] = mark + "value"
            texts |= {f'"{mark}"': json.dumps(pick(rng, [key, pick(rng, KEYS)])), f'"{mark}value"': lie}
        else:
            container[key] = mark
            texts[f'"{mark}"'] = lie
    changed = json.dumps(document)[1:-1]
    for mark, text in texts.items():
        changed = changed.replace(mark, text)
    return changed.encode()


def change_header(rng, contents):
    """change_json for the header of a safetensors file, whose length is then right; or a wrong length."""
    length, = struct.unpack("<Q", contents[:8])
    if rng.integers(4) == 0:
        others = [0, 1, 2, length - 1, length + 1, len(contents), len(contents) - 8, 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1]
        return struct.pack("<Q", pick(rng, others)) + contents[8:]
    header = change_json(rng, contents[8:8 + length])
    return struct.pack("<Q", len(header)) + header + contents[8 + length:]


def change_integer(dtype, first, last):
    """The damage of setting one of the integers number `first` to `last` to an extreme value."""
    def damage(rng, contents):
        size = np.dtype(dtype).itemsize
        where = size * int(rng.integers(first, min(last, len(contents) // size)))
        return contents[:where] + np.array(pick(rng, INTS)).astype(dtype).tobytes() + contents[where + size:]
    return damage


def change_npy(rng, contents):
    """Another header, of any version."""
    text = pick(rng, LITERALS)
    if rng.integers(4):
        descr, order = pick(rng, [pick(rng, DTYPES), "'<f4'"]), pick(rng, [*["False"] * 4, "True", "0"])
        shape = pick(rng, SHAPES).replace("{n}", str((len(contents) - 128) // 4))
        text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    version = pick(rng, [*[(1, 0)] * 4, (2, 0), (3, 0), (0, 0), (9, 9)])
    header = text.encode() + b" " * (-len(text.encode()) % 64) + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + contents[128:]


def change_field(rng, contents):
    """Another field in one line of a log, possibly its heading, and possibly another encoding."""
    lines = [line.split(",") for line in contents.decode().splitlines()]
    line = pick(rng, lines)
    line[pick(rng, [0, rng.integers(len(line))])] = pick(rng, FIELDS)
    return ("\n".join(map(",".join, lines)) + "\n").encode(pick(rng, [*["utf-8"] * 5, "utf-8-sig", "utf-16"]))


def change_lines(rng, contents):
    """Other lines, columns or characters of a log."""
    heading, *lines = contents.splitlines(keepends=True)
    if rng.integers(2):
        old, new = pick(rng, [(",", ";"), ("\n", "\r"), (",", ",,"), ("step", "Step"), ("train_loss", "step"), ("_", "é"),
                              ("\n", ",1\n"), ("\n", "\n\n"), (".", ","), ("4", "x"), ("4.5", '"4.5"')])
        return contents.replace(old.encode("latin-1"), new.encode("latin-1"))
    return pick(rng, [b"".join(lines), heading, heading * 2, heading + b"".join(reversed(lines)), b"\n" + contents,
                      contents * 3, b'"' + contents, b"step\n1\n", heading + b"1\n", heading + b",1\n", heading + b"1,x\n"])


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of files

SCORE = generate_gpt2, "--threads", 1, "--perplexity", "train_0.bin", "--model"
NEW = (train_gpt2, "--threads", 1, "--input-bin", "train_?.bin", "--input-val-bin", "val.bin", "--batch-size", 2,
       "--sequence-length", 8, "--num-iterations", 7, "--sample-every", 0, "--val-loss-every", 1, "--shuffle-shards",
       "--skip-update-lossz", 1.3, "--skip-update-gradz", 1.3, "--model")
RESUME = train_gpt2, "--output-dir", "run", "--resume"


class Kind(NamedTuple):
    files: str          # a regular expression for the files that the programs need, besides the tokens
    damaged: list       # one of them is damaged
    damages: list       # or one of ANY_FILE
    commands: list      # one of them reads it: a program and its flags


def model_kind(path, *damages):
    model = path.split("/")[0]
    return Kind(model, [path], damages, [(*SCORE, model), (*NEW, model)])


KINDS = {
    "config": model_kind("model/config.json", change_json),
    "index": model_kind("shards/model.safetensors.index.json", change_json),
    "safetensors": model_kind("model/model.safetensors", change_header),
    "safetensors alone": model_kind("alone.safetensors", change_header),
    "llm.c float32": model_kind("float32.bin", change_integer("<i4", 0, 9)),
    "llm.c bfloat16": model_kind("bfloat16.bin", change_integer("<i4", 0, 9)),
    "tokens": Kind("model", ["train_0.bin", "val.bin"], [change_integer("<i4", 0, 4), change_integer("<u2", 512, 9999)],
                   [(*NEW, "d4"), (*NEW, "model"), (*SCORE, "model")]),
    "tokenizer": Kind("own", ["own/tokenizer.json", "own/tokenizer.json", "own/tokenizer_config.json"], [change_json],
                      [(generate_gpt2, "--threads", 1, "--prompt", "the cat", "--max-new-tokens", 2, "--model", "own")]),
    "hellaswag": Kind("hellaswag", ["hellaswag.bin"], [change_integer("<i4", 0, 5), change_integer("<u2", 512, 9999)],
                      [(*NEW, "d4", "--hellaswag", "hellaswag.bin", "--hellaswag-every", 1)]),
    "state": Kind("run", [f"{CHECKPOINT}/training.json"], [change_json],
                  [RESUME, RESUME, RESUME, (*NEW, "d4", "--output-dir", "run")]),
    "moments": Kind("run", [f"{CHECKPOINT}/adam_m.npy", f"{CHECKPOINT}/adam_v.npy"], [change_npy], [RESUME]),
    "log": Kind("run", ["run/log.csv"], [change_field, change_lines], [RESUME]),
}


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
    """Path -> contents of a valid file of every kind, with the same numbers on any machine where they decide about a damage."""
    folder = tmp_path_factory.mktemp("valid")
    generator = np.random.default_rng(0)
    for name, size in (("train_0", 97), ("train_1", 97), ("val", 40)):
        write_tokens(folder / f"{name}.bin", generator.integers(60, size=size))
    write_examples(folder / "hellaswag.bin", [Example([6, 7, 8], [[1, 2], [3], [4], [5]], label) for label in range(3)])
    params = random_params(CONFIG)
    save_model(folder / "model", CONFIG, params)
    save_llmc(folder / "float32.bin", CONFIG, params, version=3)
    save_llmc(folder / "bfloat16.bin", CONFIG, params, version=5)
    own = train_tokenizer(["the cat and the dog " * 50], 300)
    config = replace(CONFIG, vocab_size=own.vocab_size, padded_vocab_size=384)
    save_model(folder / "own", config, random_params(config), own)
    alone = safetensors_pieces(ALONE, random_params(ALONE), NO_TOKENIZER)
    (folder / "alone.safetensors").write_bytes(b"".join(map(bytes, alone)))
    shutil.copytree(folder / "model", folder / "shards")
    (folder / "shards/model.safetensors").rename(folder / "shards/a.safetensors")
    (folder / "shards/model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "a.safetensors"}}')
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(folder)
        patches.setattr(gpt2, "model_config", lambda name: CONFIG)
        patches.setattr(training, "OUTLIER_WINDOW", 4)
        patches.setattr(training.TrainingLog, "plot", lambda log: None)
        flags = "--output-dir", "run", "--checkpoint-every", 6, "--keep-checkpoints", 2
        patches.setattr(sys, "argv", [*map(str, (NEW[0].__file__, *NEW[1:], "d4", *flags))])
        with contextlib.suppress(SystemExit):
            train_gpt2.main()
    shutil.rmtree(folder / "run/checkpoints/step-00000007")     # as if it had been stopped before
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files["run/log.csv"] = re.sub(rb"\d+\.\d+(e-\d+)?", b"4.5", files["run/log.csv"])
    state = json.loads(files[f"{CHECKPOINT}/training.json"])
    assert len(state["latest_norms"]) == len(state["latest_losses"]) == 4
    state |= {"latest_norms": [1.5, 1.25, 2.5, 1.75], "latest_losses": [4.5, 4.25, 5.5, 4.75], "best_val_loss": 5.25}
    files[f"{CHECKPOINT}/training.json"] = json.dumps(state).encode()
    return files


def difference(valid, damaged):
    """The part of a valid file that a damage changed, and what it became."""
    start = len(os.path.commonprefix([valid, damaged]))
    end = min(len(os.path.commonprefix([valid[::-1], damaged[::-1]])), len(valid) - start, len(damaged) - start)
    short = reprlib.Repr()
    short.maxother = 120
    before, after = (short.repr(contents[start:len(contents) - end]) for contents in (valid, damaged))
    return f"at byte {start}, {before} became {after}"


# ----------------------------------------------------------------------------------------------------------------------
# The test

class TookTooLongError(BaseException):      # no program catches it
    pass


def took_too_long(*_):
    raise TookTooLongError


@pytest.fixture
def read(run_main, monkeypatch, tmp_path):
    """read(command, files) runs a program in a folder of these files. Returns its exit status, its peak of memory and what went
    wrong, or None.

    New models are small, a run ends after one step, and every PLOT_EVERY-th plot is made, but not written.
    """
    def plot(log, original=training.TrainingLog.plot):
        if next(plots) % PLOT_EVERY == PLOT_EVERY - 1:
            original(log)

    def read(command, files, seconds=SECONDS):
        folder = tmp_path / str(next(folders))
        for name, contents in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents)
        started = time.perf_counter()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds)
        tracemalloc.start()
        try:
            with monkeypatch.context() as patches, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for hidden in (DeprecationWarning, ResourceWarning):    # Python does not print them
                    warnings.simplefilter("ignore", hidden)
                patches.chdir(folder)
                finished = run_main(*command)
            peak = tracemalloc.get_traced_memory()[1]
        except (Exception, TookTooLongError) as error:
            where = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == ROOT][-1]
            return None, 0, f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error!s:.100}"
        finally:
            tracemalloc.stop()
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
            shutil.rmtree(folder, ignore_errors=True)
        return finished.status, peak, fault(command[0], finished, caught, time.perf_counter() - started, seconds)

    plots, folders = itertools.count(), itertools.count()
    monkeypatch.setattr(gpt2, "model_config", lambda name: CONFIG)
    monkeypatch.setattr(training, "OUTLIER_WINDOW", 4)
    monkeypatch.setattr(training.StopRequest, "signal", signal.SIGTERM)
    monkeypatch.setattr(training.TrainingLog, "plot", plot)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figure.draw_without_rendering())
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, took_too_long)
    return read


def fault(program, finished, caught, elapsed, seconds):
    """What a program that ended in order did wrong, or None."""
    message = finished.err
    if 0 < seconds < elapsed:
        return f"too long: {elapsed:.1f} s"
    if caught:
        return f"warning in {Path(caught[0].filename).name}:{caught[0].lineno}: {caught[0].message!s:.100}"
    if "not enough memory" in message:
        return f"memory: {message}"
    one_line = message.startswith(f"{Path(program.__file__).name}: error: ") and message[:-1].isprintable()
    if finished.status not in (0, 143) and not (one_line and message[-1] == "\n" and len(message) < 3000):
        return f"not one line of error: {len(message):,} characters, {reprlib.repr(message)}"
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(read, valid_files, kind):
    pattern, paths, damages, commands = KINDS[kind]
    files = {path: contents for path, contents in valid_files.items() if re.match(f"train_|val|{pattern}", path)}
    limit = SLACK
    for command in commands * 2:        # at first it imports modules, and may compile kernels
        status, peak, problem = read(command, files, seconds=0)
        assert not problem and status in ([1] if command[-1] == "run" else [0, 143]), (status, problem)
        limit = max(limit, peak + SLACK)

    problems, statuses = {}, set()
    for index in range(-(-NUM_FILES // len(KINDS))):
        rng = np.random.default_rng([list(KINDS).index(kind), index])
        path, command, name = pick(rng, paths), pick(rng, commands), pick(rng, list(ANY_FILE))
        damage = pick(rng, [ANY_FILE[name], *damages, *damages])
        contents = damage(rng, valid_files[path])
        status, peak, problem = read(command, files | {path: contents})
        if peak > limit + FACTOR * (sum(map(len, files.values())) + len(contents)):
            problem = f"memory: {peak:,} bytes"
        if problem:
            problems.setdefault(problem.split(": ")[0], []).append(
                f"file {index}, {problem}\n        {path}: {difference(valid_files[path], contents)}")
        statuses.add(status)
    report = "\n".join(f"{len(found)} x, such as {found[0]}" for found in problems.values())
    assert not problems, f"{kind}, {len(problems)} problems:\n{report}"
    assert NUM_FILES < 200 or {0, 143} & statuses and 1 in statuses, "some files are accepted, others are not"
