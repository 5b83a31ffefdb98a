"""Checkpoints of a training run. A resumed run is bit-for-bit identical to an uninterrupted one.

A checkpoint is a folder in `checkpoints`, in the run's output folder, named for the number of steps done:

    step-00000500/
        model.safetensors, config.json, ...     the model, a Hugging Face folder (model_files.save_model)
        adam_m.npy, adam_v.npy                  AdamW's moments of all parameters, flat, float32
        training.json                           the flags, the step, the place in the data, and all else a step depends on

It is written atomically, under a temporary name: a folder with such a name is complete. It may also come from a stranger, so
everything in it is checked before it is used.
"""
import json
import math
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cli import LARGEST, UserError
from distributed import SINGLE_PROCESS, World
from files import atomic_file, atomic_folder, delete_unfinished, open_file, read_array_header, read_json, short_repr
from gpt2 import Config, Tensors
from model_files import MODEL_FILES, load_model, load_model_tokenizer, read_safetensors, same_tensors, save_model
from tokenizer import Tokenizer

MOMENTS = "adam_m.npy", "adam_v.npy"
STATE = "training.json"
OUTLIER_WINDOW = 128    # the latest losses and norms that a z-score compares with
REPAIR_HINT = "delete this folder to resume from the checkpoint before it, if one was kept"


def is_count(value):
    return type(value) is int and 0 <= value < 2**63


def is_window(value):
    return (isinstance(value, list) and len(value) <= OUTLIER_WINDOW
            and all(type(number) is float and abs(number) <= LARGEST[float] for number in value))


# The contents of training.json: name -> a test of the value, and what it must be. The flags are checked by training.py.
STATE_FIELDS = {
    "flags": (lambda value: isinstance(value, dict), "the names and values of flags"),
    "step": (is_count, "the number of steps done"),
    "data": (lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_count, value)), "three whole numbers"),
    "fingerprint": (is_count, "a checksum"),
    "best_val_loss": (lambda value: type(value) is float and value > -math.inf, "a loss"),
    "latest_losses": (is_window, f"at most {OUTLIER_WINDOW} finite numbers"),
    "latest_norms": (is_window, f"at most {OUTLIER_WINDOW} finite numbers"),
}


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = Path(output_dir, "checkpoints")
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name)), key=step_of)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(output_dir: Path, config: Config, params: Tensors, tokenizer: Tokenizer, moments, state: dict, keep: int
                    ) -> Path:
    """Write a checkpoint after state["step"] steps, then delete all but the latest `keep`. Returns its path.

    config, params, tokenizer: the model, see save_model
    moments: AdamW's two moments, flat NumPy arrays
    state: the contents of training.json, a dict with the keys of STATE_FIELDS

    Raises UserError if it cannot be written; all earlier checkpoints are then still there.
    """
    path = Path(output_dir, "checkpoints", f"step-{state['step']:08}")
    with atomic_folder(path) as folder:
        save_model(folder, config, params, tokenizer)
        for name, moment in zip(MOMENTS, moments):
            with atomic_file(folder / name) as file:
                np.save(file, moment)
        with atomic_file(folder / STATE) as file:
            file.write(json.dumps(state, indent=2).encode())
    for old in checkpoints(output_dir)[:-keep]:
        delete_checkpoint(old)
    return path


def delete_leftovers(output_dir: Path) -> None:
    """Delete the unfinished files and folders that killed processes left in the output folder of a run."""
    for folder in (output_dir, output_dir / "best"):
        for name in (*MODEL_FILES, "log.csv", "loss.png"):
            delete_unfinished(folder, name)
    delete_unfinished(output_dir / "checkpoints", "step-*")


def refuse_links(output_dir: Path) -> None:
    """Raise UserError if a folder that a run writes to is a link: in a folder from a stranger it may lead anywhere."""
    for folder in (output_dir / "best", output_dir / "checkpoints"):
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, expected a folder; replace it by one, or choose another --output-dir")


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, renaming it first: a folder with its name must be complete. Raises UserError if that fails."""
    unnamed = checkpoint.with_name(f"{checkpoint.name}.{os.getpid()}.tmp")
    try:
        os.rename(checkpoint, unnamed)
    except OSError as error:
        raise UserError(f"cannot delete {checkpoint}: {error.strerror}; delete it by hand, then --resume") from error
    shutil.rmtree(unnamed, ignore_errors=True)


def load_state(path: Path) -> dict:
    """The contents of a checkpoint's training.json. Raises UserError if it is damaged or fails a test of STATE_FIELDS."""
    state = read_json(path / STATE, REPAIR_HINT)
    for name, (is_valid, expected) in STATE_FIELDS.items():
        if name not in state:
            raise UserError(f"{path / STATE} lacks {name}, expected {expected}; {REPAIR_HINT}")
        if not is_valid(state[name]):
            raise UserError(f"{path / STATE}: {name} is {short_repr(state[name])}, expected {expected}; {REPAIR_HINT}")
    if state["step"] != step_of(path):
        raise UserError(f"{path / STATE}: step is {state['step']:,}, expected that of its folder's name; {REPAIR_HINT}")
    return state


def is_saved(checkpoint: Path, output_dir: Path) -> bool:
    """Whether the output folder holds the model of a checkpoint and its tokenizer, as it does at the end of a run."""
    folders = checkpoint, output_dir
    try:
        tokenizers = [load_model_tokenizer(folder).fingerprint for folder in folders]
        return tokenizers[0] == tokenizers[1] and same_tensors(
            *(read_safetensors(folder / "model.safetensors")[0] for folder in folders))
    except UserError:       # there is none, or it is damaged
        return False


def load_checkpoint(path: Path) -> tuple[Config, Tensors, list[np.ndarray]]:
    """The model of a checkpoint, see load_model, and its two moments, flat float32 arrays, memory-mapped.

    Raises UserError if a file is missing or damaged, or does not belong to this model.
    """
    config, params = load_model(path)
    return config, params, [open_moment(path / name, params.size) for name in MOMENTS]


def open_moment(path, size):
    """One of AdamW's moments, a memory-mapped float32 array of that size. Raises UserError if the file is anything else."""
    with open_file(path, REPAIR_HINT) as file:
        start, dtype, shape = read_array_header(file, path, REPAIR_HINT)
        end = file.seek(0, os.SEEK_END)
    if shape != (size,) or dtype != np.dtype("<f4"):
        raise UserError(f"{path} holds {short_repr(str(dtype))} of shape {short_repr(shape)}, expected float32 of shape "
                        f"({size},), a number for each parameter of its model; {REPAIR_HINT}")
    if end - start != 4 * size:
        raise UserError(f"{path} is damaged: {end - start:,} bytes after its header, expected {4 * size:,}; {REPAIR_HINT}")
    return np.memmap(path, "<f4", "r", start, shape)


def check_weights(step: int, params: Tensors, moments=()) -> None:
    """Raise UserError if a number that is to be saved after `step` steps is not finite: it must not replace a good one."""
    named = {f"parameter {name}": tensor for name, tensor in params.items()} | dict(zip(("AdamW's m", "AdamW's v"), moments))
    for name, tensor in named.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"step {step}: {name} is not finite after the update, so it was not saved, and what was saved "
                            "before is still there; try a lower --learning-rate or a longer --warmup-iters")


class Saver:
    """Saves the checkpoints and models of a run (process 0 only).

    tokenizer: saved with the model
    output_dir: folder of the run
    keep: how many checkpoints to keep
    flags: the flags that a checkpoint records, a dict
    """

    def __init__(self, model, tokenizer: Tokenizer, output_dir: Path, keep: int, flags: dict, world: World = SINGLE_PROCESS):
        self.model, self.tokenizer, self.output_dir = model, tokenizer, output_dir
        self.keep, self.flags, self.world = keep, flags, world

    def save_checkpoint(self, progress) -> None:
        """Write a checkpoint, from which --resume continues. progress is a training.Progress.

        Raises UserError if it cannot be written, or check_weights fails.
        """
        moments = self.model.get_moments()      # every process sends its shard
        if self.world.rank == 0:
            params = self.model.get_params()
            check_weights(progress.step, params, moments)
            state = asdict(progress) | {"flags": self.flags}
            save_checkpoint(self.output_dir, self.model.config, params, self.tokenizer, moments, state, self.keep)

    def save_model(self, folder: Path, step: int) -> None:
        """Write the model, after `step` steps, to a folder. Raises UserError as save_checkpoint does."""
        if self.world.rank == 0:
            params = self.model.get_params()
            check_weights(step, params)
            save_model(folder, self.model.config, params, self.tokenizer)
