"""Turn a PyTorch checkpoint into a folder that this program and transformers read.

    python dev/from_pytorch.py pytorch_model.bin FOLDER     or the folder of it, or of its shards
    python dev/from_pytorch.py ckpt.pt FOLDER               of nanoGPT, or another one with a config.json beside it

Run it with a Python that has PyTorch, NumPy and safetensors; it needs nothing else. A checkpoint is a pickle, which could run
any program, so it is opened with weights_only=True: nothing but tensors and simple values is made of it. Tokenizer files beside
it are copied.
"""
import argparse
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import OneLineParser, UserError, run_program

try:
    import torch
    from safetensors.torch import save_file
except ImportError as error:
    raise SystemExit(f"from_pytorch.py: error: {error}; run it with a Python that has PyTorch and safetensors") from error

from files import read_json, short_repr
from hugging_face import (CONFIG_HINT, TRANSPOSED, WRAPPERS, check_sizes, config_from_settings, gpt2_tensors,
                          hugging_face_settings, hugging_face_tensors, join_names, make_config, missing_biases)
from tokenizer import END_OF_TEXT, TOKENIZER_FILES

STATE_KEYS = "model", "state_dict", "model_state_dict", "module"    # where training programs keep the tensors


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint, given a folder or one of them. Raises UserError if that is not clear, or one is missing."""
    if path.is_dir():
        patterns = ("pytorch_model.bin",), ("pytorch_model*.bin",), ("*.pt", "*.pth", "*.ckpt")
        found = next(filter(None, ([file for name in names for file in sorted(path.glob(name))] for names in patterns)), [])
        if not found or len(found) > 1 and not shard_count(found[0]):
            names = join_names([file.name for file in found])
            raise UserError(f"{path} has {names or 'no checkpoint'}, expected one; name the file that you want")
        path = found[0]
    count = shard_count(path)
    if not count:
        return [path]
    shards = sorted(path.parent.glob(re.sub(r"-\d+-of-", "-*-of-", path.name)))
    if len(shards) != count:
        raise UserError(f"{path.parent} has {len(shards)} of the {count} files of {path.name}; download the others")
    return shards


def shard_count(path):
    """How many shards there are, by the name of one of them; 0 for another file."""
    match = re.search(r"-\d+-of-(\d+)\.", path.name)
    return int(match[1]) if match else 0


def load_checkpoint(path: Path) -> tuple[dict, dict | None]:
    """The tensors of a checkpoint by their names, and nanoGPT's model_args or None. Raises UserError if there are none."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; name a checkpoint, or its folder") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and simple values, and making those could run any program; save the "
                        "model's state_dict() alone") from error
    except Exception as error:  # PyTorch raises many types for a file that is damaged, or none of its own
        raise UserError(f"{path} is no checkpoint that PyTorch reads ({short_repr(str(error))}); download or save it again"
                        ) from error
    value = value if isinstance(value, dict) else {}
    model_args = value.get("model_args")
    for key in STATE_KEYS:
        if isinstance(value.get(key), dict):
            value = value[key]
    tensors = {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; choose a checkpoint of a model's state_dict()")
    return tensors, model_args if isinstance(model_args, dict) else None


def find_settings(path: Path, model_args: dict | None) -> dict:
    """The contents of config.json: of nanoGPT's model_args, or of the file beside it. Raises UserError if there is neither."""
    config_path = path.with_name("config.json")
    if model_args:
        names = "block_size", "vocab_size", "n_layer", "n_head", "n_embd"
        print("assumed: nanoGPT's activation is GELU itself, as since 2023; if the model is older, write "
              '"activation_function": "gelu_new" into config.json')
        config = make_config(f"model_args in {path}", {name: model_args.get(name) for name in names}, exact_gelu=True)
        end_of_text = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
        return hugging_face_settings(config, {"bos_token_id": end_of_text, "eos_token_id": end_of_text})
    try:
        settings = read_json(config_path)
    except UserError as error:
        raise UserError(f"{path} has no model_args, as nanoGPT's checkpoints have them, and there is no {config_path}, or it "
                        f"is no JSON object; {CONFIG_HINT}") from error
    return settings | {"model_type": settings.get("model_type") or "gpt2"}


def converted_tensors(path: Path, settings: dict, stored: dict) -> dict:
    """GPT-2's tensors, named and shaped as transformers saves them. Raises UserError if they are not those of the settings."""
    config, _ = config_from_settings(f"config.json for {path}", settings)
    tensors, classifiers, others = gpt2_tensors(path, {WRAPPERS.sub("", name): tensor for name, tensor in stored.items()})
    check_sizes(f"config.json for {path}", settings, tensors)
    wte = tensors.get("wte.weight")
    for name, tensor in classifiers.items():
        if not torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("bias") else wte):
            raise UserError(f"{path} holds {short_repr(name)}, which differs from GPT-2's: there, the classifier is wte.weight "
                            "again, without a bias; choose a GPT-2")
    if others:
        print(f"left out {join_names(others)}, which GPT-2's language model does not use")
    missing = missing_biases(config, tensors)
    if missing:
        print("biases that no layer has are written as zeros")
    C = config.channels
    linear = "h.0.attn.c_attn.weight" in tensors and tensors["h.0.attn.c_attn.weight"].shape == (3 * C, C)      # nanoGPT's
    converted = {}
    for name, shape, ours, _ in hugging_face_tensors(config):
        tensor = torch.zeros(shape, dtype=wte.dtype) if ours in missing else tensors.pop(name, None)
        if linear and ours in TRANSPOSED and tensor is not None:
            tensor = tensor.T
        if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
            found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(f"{path}: {name} is {found}, expected floating-point numbers of shape {shape}; choose a GPT-2")
        converted[f"transformer.{name}"] = tensor.contiguous()
    if tensors:
        raise UserError(f"{path} holds {join_names(tensors)}, which GPT-2 does not have; choose a GPT-2")
    return converted


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a file, or a folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write model.safetensors and config.json")
    options = parser.parse_args()

    target = options.folder / "model.safetensors"
    if target.exists():
        raise UserError(f"{target} exists; choose another FOLDER")
    files = checkpoint_files(options.checkpoint)
    stored, model_args = {}, None
    for path in files:
        tensors, model_args = load_checkpoint(path)
        stored |= tensors
    settings = find_settings(files[0], model_args)
    tensors = converted_tensors(files[0], settings, stored)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    beside = files[0].parent
    for name in TOKENIZER_FILES:
        if (beside / name).is_file() and beside.resolve() != options.folder.resolve():
            shutil.copyfile(beside / name, options.folder / name)
    save_file(tensors, target, metadata={"format": "pt"})
    print(f"wrote {options.folder}: {sum(tensor.numel() for tensor in tensors.values()):,} parameters")


if __name__ == "__main__":
    run_program(main)
