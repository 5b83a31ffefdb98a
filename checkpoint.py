"""Checkpoints of a training run. A resumed run is bit-for-bit identical to an uninterrupted one.

A checkpoint is a folder in `checkpoints`, in the run's output folder, named for the number of steps done:

    step-00000500/
        model.safetensors, config.json, ...     the model, a Hugging Face folder (model_files.save_model)
        adam_m.npy, adam_v.npy                  AdamW's moments of all parameters, flat, float32
        training.json                           the flags, the step, the place in the data, and all else a step depends on

It is written atomically, under a temporary name: a folder with such a name is complete.
"""
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cli import UserError
from distributed import SINGLE_PROCESS, World
from files import atomic_file, atomic_folder
from gpt2 import Config, Tensors
from model_files import load_model, save_model

MOMENTS = "adam_m.npy", "adam_v.npy"
STATE = "training.json"
STATE_KEYS = "flags", "step", "data", "fingerprint", "best_val_loss", "latest_losses", "latest_norms"
REPAIR_HINT = "delete this folder to resume from the checkpoint before it, if one was kept"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = Path(output_dir, "checkpoints")
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def save_checkpoint(output_dir: Path, config: Config, params: Tensors, moments, state: dict, keep: int) -> Path:
    """Write a checkpoint after state["step"] steps, then delete all but the latest `keep`. Returns its path.

    config, params: the model, see save_model
    moments: AdamW's two moments, flat NumPy arrays
    state: the contents of training.json, a dict with STATE_KEYS

    Raises UserError if it cannot be written; all earlier checkpoints are then still there.
    """
    path = Path(output_dir, "checkpoints", f"step-{state['step']:08}")
    for unfinished in path.parent.glob("step-*.tmp"):       # of a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    with atomic_folder(path) as folder:
        save_model(folder, config, params)
        for name, moment in zip(MOMENTS, moments):
            with atomic_file(folder / name) as file:
                np.save(file, moment)
        with atomic_file(folder / STATE) as file:
            file.write(json.dumps(state, indent=2).encode())
    for old in checkpoints(output_dir)[:-keep]:
        delete_checkpoint(old)
    return path


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, renaming it first: a folder with its name must be complete. Raises UserError if that fails."""
    unnamed = checkpoint.with_name(f"{checkpoint.name}.{os.getpid()}.tmp")
    try:
        os.rename(checkpoint, unnamed)
    except OSError as error:
        raise UserError(f"cannot delete {checkpoint}: {error.strerror}; delete it by hand, then --resume") from error
    shutil.rmtree(unnamed, ignore_errors=True)


def load_state(path: Path) -> dict:
    """The contents of a checkpoint's training.json. Raises UserError if it is damaged or lacks one of STATE_KEYS."""
    try:
        state = json.loads((path / STATE).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path / STATE}: {error.strerror}; {REPAIR_HINT}") from error
    except ValueError as error:
        raise UserError(f"{path / STATE} is not the JSON of a checkpoint ({error}); {REPAIR_HINT}") from error
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path / STATE} lacks {', '.join(missing)}; {REPAIR_HINT}")
    flags = state["flags"]
    if not (isinstance(flags, dict) and all(re.fullmatch(r"[a-z]\w*", name, re.ASCII) for name in flags)):
        raise UserError(f"{path / STATE}: flags are {flags!r:.100}, expected the names and values of flags; {REPAIR_HINT}")
    if "shuffle" in flags:     # the former name of --shuffle-shards
        flags["shuffle_shards"] = flags.pop("shuffle")
    return state


def load_checkpoint(path: Path) -> tuple[Config, Tensors, list[np.ndarray]]:
    """The model of a checkpoint, see load_model, and its two moments, flat float32 arrays, memory-mapped.

    Raises UserError if a file is missing or damaged, or does not belong to this model.
    """
    config, params = load_model(path)
    moments = []
    for name in MOMENTS:
        try:
            moment = np.load(path / name, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UserError(f"cannot read {path / name}: {error.strerror or error}; {REPAIR_HINT}") from error
        except (ValueError, EOFError) as error:
            raise UserError(f"{path / name} is damaged ({error}); {REPAIR_HINT}") from error
        if moment.shape != (params.size,) or moment.dtype != np.float32:
            raise UserError(f"{path / name} holds {moment.dtype} of shape {moment.shape}, expected float32 of shape "
                            f"({params.size},), a number for each parameter of its model; {REPAIR_HINT}")
        moments.append(moment)
    return config, params, moments


class Saver:
    """Saves the checkpoints and models of a run (process 0 only).

    output_dir: folder of the run
    keep: how many checkpoints to keep
    flags: the flags that a checkpoint records, a dict
    """

    def __init__(self, model, output_dir: Path, keep: int, flags: dict, world: World = SINGLE_PROCESS):
        self.model, self.output_dir, self.keep, self.flags, self.world = model, output_dir, keep, flags, world

    def save_checkpoint(self, progress) -> None:
        """Write a checkpoint, from which --resume continues. progress is a training.Progress."""
        moments = self.model.get_moments()      # every process sends its shard
        if self.world.rank == 0:
            state = asdict(progress) | {"flags": self.flags}
            save_checkpoint(self.output_dir, self.model.config, self.model.get_params(), moments, state, self.keep)

    def save_model(self, folder: Path) -> None:
        """Write the model to a folder."""
        if self.world.rank == 0:
            save_model(folder, self.model.config, self.model.get_params())
