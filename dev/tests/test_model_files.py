"""Models on disk: round trips, files written by other programs, and a one-line error for every damaged file.

The other programs' files are written here by hand, according to the formats' specifications, or by transformers:
dev/reference_transformers is committed. The tests with transformers in their name write more, if the Python in
TRANSFORMERS_PYTHON has transformers.
"""
import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hugging_face
import model_files
import tokenizer
from cli import UserError
from conftest import REFERENCE_SCRIPT
from gpt2 import Config, Tensors, model_config, parameter_shapes
from model_files import load_model, load_model_tokenizer, save_llmc, save_model
from tokenizer import NO_TOKENIZER, VOCABULARY_SHA256, GPT2Tokenizer, train_tokenizer
from train_gpt2 import GPT2

ROOT = Path(model_files.__file__).parent
REFERENCE = REFERENCE_SCRIPT.with_suffix("")
SMALL = Config(max_seq_len=3, vocab_size=5, padded_vocab_size=128, num_layers=2, num_heads=2, channels=8)
BOUND = 1e-5
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak. <|endoftext|> naïve café 漢字 🙂"  # the script's


def random_params(config, seed=0):
    params = Tensors(parameter_shapes(config))
    params.flat[...] = np.random.default_rng(seed).standard_normal(params.size, dtype=np.float32)
    params.wte[config.vocab_size:] = 0
    return params


def assert_same(loaded, config, params):
    """Bitwise equal, including the padding."""
    assert loaded[0] == config
    assert loaded[1].flat.dtype == np.float32 and type(loaded[1].flat) is np.ndarray
    for name, tensor in params.items():
        assert np.array_equal(getattr(loaded[1], name), tensor), name


def logits_error(config, params, expected):
    """The relative error of the logits of every token in an expected.npz."""
    tokens = expected["tokens"].astype(np.int32)[None]
    model = GPT2(config, 1, tokens.size, threads=1)
    model.set_params(params)
    model.forward(tokens)
    logits = model.acts.lnf @ model.params.wte[:config.vocab_size].T
    return np.linalg.norm(logits - expected["logits"]) / np.linalg.norm(expected["logits"])


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Files written by hand

def hugging_face_tensors(params, config, prefix=""):
    """Name -> array, written out independently of model_files. Hugging Face's Conv1D weights are (input, output)."""
    tensors = {"wte.weight": params.wte[:config.vocab_size], "wpe.weight": params.wpe}
    for l in range(config.num_layers):
        tensors |= {
            f"h.{l}.ln_1.weight": params.ln1w[l], f"h.{l}.ln_1.bias": params.ln1b[l],
            f"h.{l}.attn.c_attn.weight": params.qkvw[l].T, f"h.{l}.attn.c_attn.bias": params.qkvb[l],
            f"h.{l}.attn.c_proj.weight": params.attprojw[l].T, f"h.{l}.attn.c_proj.bias": params.attprojb[l],
            f"h.{l}.ln_2.weight": params.ln2w[l], f"h.{l}.ln_2.bias": params.ln2b[l],
            f"h.{l}.mlp.c_fc.weight": params.fcw[l].T, f"h.{l}.mlp.c_fc.bias": params.fcb[l],
            f"h.{l}.mlp.c_proj.weight": params.fcprojw[l].T, f"h.{l}.mlp.c_proj.bias": params.fcprojb[l],
        }
    tensors |= {"ln_f.weight": params.lnfw, "ln_f.bias": params.lnfb}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def safetensors(tensors, change=lambda header: None, padding=0):
    """The contents of a safetensors file of name -> array or (dtype name, array). `change` may edit the header, a dict."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        dtype, tensor = tensor if isinstance(tensor, tuple) else ("F32", tensor)
        contents = np.ascontiguousarray(tensor).tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(contents)]}
        data += contents
    change(header)
    header = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(header)) + header + data


def config_json(config, **changes):
    """The config.json that transformers writes, without the settings for training."""
    settings = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "layer_norm_epsilon": 1e-05,
                "model_type": "gpt2", "n_ctx": config.max_seq_len, "n_positions": config.max_seq_len, "n_embd": config.channels,
                "n_head": config.num_heads, "n_layer": config.num_layers, "n_inner": None, "scale_attn_weights": True,
                "vocab_size": config.vocab_size}
    return json.dumps({name: value for name, value in {**settings, **changes}.items() if value != "absent"}).encode()


def llmc(version=3, config=SMALL, data=None, **changes):
    """An llm.c checkpoint of random parameters."""
    header = dict(magic=20240326, version=version, T=config.max_seq_len, V=config.vocab_size, L=config.num_layers,
                  NH=config.num_heads, C=config.channels, Vp=config.padded_vocab_size) | changes
    data = random_params(config).flat.tobytes() if data is None else data
    return struct.pack("<256i", *header.values(), *[0] * 248) + data


def write_folder(folder, config=SMALL, tensors=None, **config_changes):
    """A model's folder, and its parameters."""
    params = random_params(config)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config_json(config, **config_changes))
    tensors = hugging_face_tensors(params, config) if tensors is None else tensors
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    return params


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_model_is_not_in_memory_twice(tmp_path):
    config = Config(max_seq_len=64, vocab_size=128, padded_vocab_size=128, num_layers=8, num_heads=8, channels=512)
    params = Tensors(parameter_shapes(config))
    params.flat[...] = 1
    save_model(tmp_path / "model", config, params)
    program = (f"import sys; sys.path.insert(0, {str(Path(model_files.__file__).parent)!r}); import model_files\n"
               f"model_files.load_model({str(tmp_path / 'model')!r})\n"
               "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])")
    peak = 1024 * int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert params.flat.nbytes > 100e6 and peak < 1.6 * params.flat.nbytes


# ----------------------------------------------------------------------------------------------------------------------
# Round trips

@pytest.mark.parametrize("config", [SMALL, Config(7, 128, 128, 1, 1, 1), Config(2, 129, 256, 3, 3, 9)], ids=str)
def test_folder_round_trip(tmp_path, config):
    params = random_params(config)
    save_model(tmp_path / "model", config, params)
    assert files_in(tmp_path / "model") == ["config.json", "model.safetensors"]
    assert_same(load_model(tmp_path / "model"), config, params)
    assert_same(load_model(str(tmp_path / "model" / "model.safetensors")), config, params)


def test_saved_file_follows_the_format(tmp_path):
    save_model(tmp_path, SMALL, random_params(SMALL))
    contents = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    header = json.loads(contents[8:start])
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}  # transformers requires it
    expected = hugging_face_tensors(random_params(SMALL), SMALL, prefix="transformer.")
    assert set(header) == set(expected)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert entry["dtype"] == "F32" and tuple(entry["shape"]) == expected[name].shape
        assert contents[start + begin:start + end] == expected[name].tobytes(), name
    assert json.loads((tmp_path / "config.json").read_text()).items() >= json.loads(config_json(SMALL)).items()


def test_only_the_parameters_of_a_longer_buffer_are_saved(tmp_path):
    params = random_params(SMALL)
    longer = Tensors(params.shapes, allocate=lambda size: np.concatenate([params.flat, np.ones(7, np.float32)]))
    save_model(tmp_path / "folder", SMALL, longer)
    save_llmc(tmp_path / "model.bin", SMALL, longer, version=3)
    assert_same(load_model(tmp_path / "folder"), SMALL, params)
    assert_same(load_model(tmp_path / "model.bin"), SMALL, params)


def test_model_with_gpt2s_vocabulary_is_saved_with_its_tokenizer(tmp_path, encoding):
    config = Config(3, 50257, 50304, 1, 1, 1)
    (tmp_path / "tokenizer.json").write_text("{}")      # another tokenizer's, which would be read instead
    save_model(tmp_path, config, random_params(config), encoding)
    assert files_in(tmp_path) == ["config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    for name, original in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == VOCABULARY_SHA256[original]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 50256


def test_model_is_saved_even_if_the_vocabulary_is_unavailable(tmp_path, monkeypatch, capsys):
    def unreachable():
        raise UserError("GPT-2's vocabulary is missing")
    monkeypatch.setattr(tokenizer, "fetch_vocabulary", unreachable)
    config = Config(3, 50257, 50304, 1, 1, 1)
    params = random_params(config)
    save_model(tmp_path, config, params, GPT2Tokenizer())
    assert_same(load_model(tmp_path), config, params)
    assert capsys.readouterr().out == f"{tmp_path} gets no tokenizer: GPT-2's vocabulary is missing\n"


def test_tokenizer_of_another_model_goes_and_ones_own_stays(tmp_path, monkeypatch):
    """Beside a model with another vocabulary, a tokenizer would be wrong. Without a network, GPT-2's is still right."""
    def unreachable():
        raise UserError("GPT-2's vocabulary is missing")
    monkeypatch.setattr(tokenizer, "fetch_vocabulary", unreachable)
    for name in model_files.TOKENIZER_FILES:
        (tmp_path / name).write_text("{}")
    save_model(tmp_path, SMALL, random_params(SMALL))
    assert set(model_files.TOKENIZER_FILES) < set(files_in(tmp_path))       # in a folder without a model they may be its own
    save_model(tmp_path, SMALL, random_params(SMALL), GPT2Tokenizer())
    assert set(model_files.TOKENIZER_FILES) < set(files_in(tmp_path))
    for config in replace(SMALL, vocab_size=59), SMALL:
        save_model(tmp_path, config, random_params(config))
        assert files_in(tmp_path) == ["config.json", "model.safetensors"]
        (tmp_path / "tokenizer.json").write_text("{}")


def test_special_tokens_that_a_config_only_assumes(tmp_path):
    """transformers writes GPT-2's end of text into the config.json of any vocabulary."""
    (tmp_path / "config.json").write_text('{"vocab_size": 7, "eos_token_id": 50256}')
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\na")
    assert load_model_tokenizer(tmp_path).end_tokens == [] and load_model_tokenizer(tmp_path).end_of_text == 1


def test_tokenizer_of_another_model_beside_the_weights(tmp_path):
    """As a killed process may leave it: the header of the weights tells."""
    one, two = (train_tokenizer([text * 99], 300) for text in ("the cat and the dog ", "wind and sea "))
    config = replace(SMALL, vocab_size=300, padded_vocab_size=384)
    save_model(tmp_path, config, random_params(config), one)
    assert load_model_tokenizer(tmp_path, 300).fingerprint == one.fingerprint
    (tmp_path / "tokenizer.json").write_bytes(two.files["tokenizer.json"])
    with pytest.raises(UserError, match=r"the tokenizer in .* is not that of its model.safetensors.*--resume"):
        load_model_tokenizer(tmp_path, 300)


def test_a_kill_between_two_renames_leaves_a_model(tmp_path, monkeypatch):
    """The old or the new one, also if they have the same tensors and another number of heads."""
    old, new = Config(3, 60, 128, 1, 1, 4), Config(3, 60, 128, 1, 2, 4)
    for count in range(3):
        def rename(*names, original=os.replace):
            rename.left -= 1
            if rename.left < 0:
                raise KeyboardInterrupt
            original(*names)
        rename.left = count
        save_model(tmp_path / str(count), old, params := random_params(old))
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", rename)
            save_model(tmp_path / str(count), new, params)
        assert_same(load_model(tmp_path / str(count)), new if count > 0 else old, params)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("padding", [0, 1])  # with one of them, the data is unaligned
def test_names_of_any_file(tmp_path, prefix, padding):
    params = random_params(SMALL)
    tensors = hugging_face_tensors(params, SMALL, prefix)
    for l in range(SMALL.num_layers):
        tensors[f"{prefix}h.{l}.attn.bias"] = ("BOOL", np.tri(3, dtype=bool)[None, None])
        tensors[f"{prefix}h.{l}.attn.masked_bias"] = np.float32(-1e4).reshape(())
    tensors["lm_head.weight"] = params.wte[:SMALL.vocab_size]
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors(dict(reversed(tensors.items())), padding=padding))
    assert_same(load_model(tmp_path), SMALL, params)


def test_half_precision(tmp_path):
    """All dtypes in one file, and all bit patterns of bfloat16."""
    config = Config(256, 5, 128, 1, 2, 256)
    tensors = hugging_face_tensors(random_params(config), config)
    halves = {name: ("F16", tensor.astype(np.float16)) if "c_" in name else tensor for name, tensor in tensors.items()}
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    write_folder(tmp_path, config, halves | {"wpe.weight": ("BF16", bits)})
    _, params = load_model(tmp_path)
    assert np.array_equal(params.wpe.view(np.uint32), bits.astype(np.uint32) << 16)
    assert np.array_equal(params.fcw[0], tensors["h.0.mlp.c_fc.weight"].T.astype(np.float16).astype(np.float32))
    assert np.array_equal(params.wte[:5], tensors["wte.weight"])


def test_shards(tmp_path):
    params = write_folder(tmp_path)
    tensors = hugging_face_tensors(params, SMALL, "transformer.")
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        (tmp_path / shard).write_bytes(safetensors({name: tensors[name] for name in tensors if weight_map[name] == shard}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "model.safetensors").unlink()
    assert_same(load_model(tmp_path), SMALL, params)


def test_file_without_its_config(tmp_path, caplog):
    config = Config(3, 5, 128, 2, 2, 128)
    params = random_params(config)
    (tmp_path / "any.name").write_bytes(safetensors(hugging_face_tensors(params, config)))
    assert_same(load_model(tmp_path / "any.name"), config, params)
    [note] = caplog.messages
    assert_says(note, tmp_path / "any.name", "no config.json beside it", "heads of 64 channels", "GELU")


# A file that GPT-2 users have -> its tensors, made of Hugging Face's, and what a note says
PREFIXED = {
    "compiled": "_orig_mod.transformer.",
    "parallel": "module.transformer.",
    "parallel and compiled": "module._orig_mod.transformer.",
    "parallel, bare": "module.",
    "TRL": "pretrained_model.transformer.",
    "PEFT, merged": "base_model.model.transformer.",
    "one's own module": "net.gpt2.",
    "Lightning": "model.transformer.",
}
HEADS = {
    "value head": ("transformer.", "", ["v_head.summary.weight", "v_head.summary.bias"]),
    "TRL's value head": ("pretrained_model.transformer.", "", ["v_head.summary.weight"]),
    "token classifier": ("transformer.", "", ["classifier.weight", "classifier.bias"]),
    "sequence classifier": ("transformer.", "", ["score.weight"]),
    "double heads": ("transformer.", "", ["multiple_choice_head.summary.weight"]),
    "questions": ("transformer.", "", ["qa_outputs.weight"]),
    "any name": ("transformer.", "", ["my_own.0.weight"]),
    "bare": ("", "", ["score.weight", "value_head.0.bias", "summary.weight"]),
    "same prefix": ("model.", "model.", ["v_head.weight", "position_ids"]),
}


@pytest.mark.parametrize("prefix", PREFIXED.values(), ids=PREFIXED)
@pytest.mark.parametrize("classifier", ["absent", "twice", "alone"])
def test_prefixes(tmp_path, caplog, prefix, classifier):
    tensors = hugging_face_tensors(random_params(SMALL), SMALL, prefix)
    if classifier != "absent":
        tensors[prefix.removesuffix("transformer.") + "lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    if classifier == "alone":
        del tensors[f"{prefix}wte.weight"]
    params = write_folder(tmp_path, tensors=tensors)
    assert_same(load_model(tmp_path), SMALL, params)
    assert not caplog.messages


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_wrapped_layers(tmp_path, wrapper):
    tensors = hugging_face_tensors(random_params(SMALL), SMALL, "transformer.")
    tensors = {re.sub(r"(\.h\.\d\.)", rf"\1{wrapper}.", name): tensor for name, tensor in tensors.items()}
    params = write_folder(tmp_path, tensors=tensors)
    assert_same(load_model(tmp_path), SMALL, params)


@pytest.mark.parametrize("prefix, head_prefix, names", HEADS.values(), ids=HEADS)
def test_heads_are_left_out_with_a_note(tmp_path, caplog, prefix, head_prefix, names):
    names = [head_prefix + name for name in names]
    tensors = hugging_face_tensors(random_params(SMALL), SMALL, prefix) | dict.fromkeys(names, numbers(1, 8))
    params = write_folder(tmp_path, tensors=tensors)
    assert_same(load_model(tmp_path), SMALL, params)
    [note] = caplog.messages
    assert_says(note, f"note: {tmp_path}: left out", *sorted(names, key=list(tensors).index), "does not use")


def test_a_note_is_one_line_on_standard_error(tmp_path):
    tensors = hugging_face_tensors(random_params(SMALL), SMALL, "transformer.")
    write_folder(tmp_path, tensors=tensors | {"score\n.weight": numbers(1, 8)})
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import model_files; model_files.load_model({str(tmp_path)!r})"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "" and finished.stderr.count("\n") == 1
    assert_says(finished.stderr[:-1], "note:", r"'score\n.weight'")


WITHOUT_BIAS = {
    "no bias": (r".*\.bias", True),
    "linear layers": (r".*(c_\w+)\.bias", True),
    "one linear layer": (r".*c_attn\.bias", True),
    "layernorms": (r".*ln_\w\.bias", True),
    "one bias": (r"h\.0\.ln_1\.bias", False),
    "one layer": (r"h\.1\..*\.bias", False),
    "the last bias": (r"ln_f\.bias", False),
    "no layernorm's weight": (r".*ln_1\.weight", False),
}


@pytest.mark.parametrize("pattern, complete", WITHOUT_BIAS.values(), ids=WITHOUT_BIAS)
def test_biases_that_no_layer_has_are_zero(tmp_path, caplog, pattern, complete):
    """As with nanoGPT's bias=False. A single bias that is missing is damage."""
    tensors = {name: tensor for name, tensor in without().items() if not re.fullmatch(pattern, name)}
    params = write_folder(tmp_path, tensors=tensors)
    if not complete:
        message = error_of(tmp_path)
        assert_says(message, "lacks", "download")
        assert all(name in message for name in without() if name not in tensors)
        return
    for ours, name in hugging_face.HUGGING_FACE_NAMES.items():
        if re.fullmatch(pattern, name.format(layer=0)):
            getattr(params, ours)[...] = 0
    assert_same(load_model(tmp_path), SMALL, params)
    [note] = caplog.messages
    assert_says(note, "no layer has", ".bias", "zero")


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_precisions(tmp_path, dtype):
    """float64 rounds to the nearest float32; what is larger is infinite, without a warning."""
    tensors = {name: tensor.astype(dtype) for name, tensor in without().items()}
    tensors["h.0.mlp.c_fc.weight"][2, 3] = np.inf if dtype == np.float16 else 1e300
    write_folder(tmp_path, tensors={name: (f"F{8 * tensor.itemsize}", tensor) for name, tensor in tensors.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, params = load_model(tmp_path)
    loaded = hugging_face_tensors(params, SMALL)
    with np.errstate(over="ignore"):
        assert all(np.array_equal(loaded[name], tensor.astype(np.float32)) for name, tensor in tensors.items())


# Files in a folder -> what the error says, or None: it is read
FOLDERS = {
    "variant": (["model.fp16.safetensors"], None),
    "any name": (["gpt2.safetensors", "adapter_model.safetensors"], None),
    "sharded variant": (["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json", "optimizer.safetensors"],
                        None),
    "two variants": (["model.bf16.safetensors", "model.fp16.safetensors"],
                     ("model.bf16.safetensors, model.fp16.safetensors", "name the file")),
    "adapter": (["adapter_model.safetensors"], ("adapter_model.safetensors is an adapter's weights", "merge_and_unload")),
    "older adapter": (["adapter_model.bin"], ("adapter_model.bin is an adapter's weights", "merge_and_unload")),
    "GGUF": (["model-q4.gguf"], ("model-q4.gguf is a GGUF file", "name the file itself")),
    "TensorFlow": (["tf_model.h5"], ("tf_model.h5 is weights of TensorFlow", "from_tf")),
    "Flax": (["flax_model.msgpack"], ("flax_model.msgpack is weights of TensorFlow or Flax", "from_flax")),
    "pickles": (["training_args.bin", "pytorch_model-00001-of-00002.bin"], ("pytorch_model-00001", "dev/from_pytorch.py")),
    "nanoGPT": (["ckpt.pt"], ("ckpt.pt is a Python pickle", "dev/from_pytorch.py")),
    "checkpoints of a trainer": (["checkpoint-5/model.safetensors", "checkpoint-10/model.safetensors", "trainer.pt"],
                                 ("name a folder in it that has one: checkpoint-10, checkpoint-5",)),
    "the hub's cache": (["snapshots/0a1b/model.safetensors"], (f"one: {Path('snapshots', '0a1b')}",)),
    "nothing": ([], ("name a folder that has one")),
}


@pytest.mark.parametrize("names, parts", FOLDERS.values(), ids=FOLDERS)
def test_what_is_in_a_folder(tmp_path, names, parts):
    params = write_folder(tmp_path)
    contents = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(contents)
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps({"weight_map": {"wte.weight": names[0]}}))
    if parts:
        message = error_of(tmp_path)
        assert_says(message, tmp_path, "has no model.safetensors", *parts)
        assert "download" not in message
    else:
        assert_same(load_model(tmp_path), SMALL, params)


# Tensors beside GPT-2's own -> what the error says
FOREIGN = {
    "adapter": ("h.0.attn.c_attn.lora_A.default.weight", ("lora_A", "an adapter's weights", "merge_and_unload")),
    "adapter's base": ("base_model.model.h.0.attn.c_attn.base_layer.weight", ("base_layer", "merge_and_unload")),
    "prompt": ("prompt_encoder.default.embedding.weight", ("prompt_encoder", "an adapter's weights")),
    "cross-attention": ("h.1.crossattention.c_attn.weight", ("cross-attention", "encoder")),
    "quantized": ("h.0.mlp.c_fc.qweight", ("qweight", "quantized weights")),
    "split attention": ("h.0.attn.q_proj.weight", ("holds h.0.attn.q_proj.weight, which GPT-2 does not have", "choose")),
    "rotary": ("h.0.attn.rotary_emb.inv_freq", ("inv_freq, which GPT-2 does not have",)),
    "third layernorm": ("h.0.ln_3.weight", ("ln_3.weight, which GPT-2 does not have",)),
    "embedding's layernorm": ("emb_ln.weight", ("emb_ln.weight, which GPT-2 does not have",)),
    "classifier's bias": ("lm_head.bias", ("lm_head.bias, which is not zero",)),
}


@pytest.mark.parametrize("name, parts", FOREIGN.values(), ids=FOREIGN)
def test_what_changes_the_computation_is_refused(tmp_path, name, parts):
    write_folder(tmp_path, tensors=without() | {name: numbers(8)})
    message = error_of(tmp_path)
    assert_says(message, tmp_path, *parts)
    assert "download" not in message


def test_classifiers(tmp_path, caplog):
    """By any name: a matrix of wte's shape is one. A bias of zeros does nothing."""
    tensors = hugging_face_tensors(random_params(SMALL), SMALL, "transformer.")
    wte = tensors["transformer.wte.weight"]
    params = write_folder(tmp_path, tensors=tensors | {"embed_out.weight": wte, "lm_head.bias": 0 * numbers(5)})
    assert_same(load_model(tmp_path), SMALL, params)
    assert not caplog.messages
    write_folder(tmp_path, tensors=tensors | {"embed_out.weight": wte + 1})
    assert_says(error_of(tmp_path), "embed_out.weight, which differs from wte.weight", "tied")


def test_files_of_other_kinds(tmp_path):
    for opening, says in {"\x89HDF\r\n": "is weights of TensorFlow",
                          "<!DOCTYPE html>": "is a web page", "llama": "begins with b'llama"}.items():
        (tmp_path / "file").write_bytes(opening.encode("latin-1") + bytes(100))
        assert_says(error_of(tmp_path / "file"), tmp_path / "file", says)
    write_folder(tmp_path, tensors={"model.layers.0.mlp.up_proj.weight": numbers(8)}, model_type="absent")
    assert_says(error_of(tmp_path), tmp_path, "holds model.layers.0.mlp.up_proj.weight, expected GPT-2's wte.weight", "choose")


def test_llmc_float32(tmp_path):
    params = random_params(SMALL)
    save_llmc(tmp_path / "ours.bin", SMALL, params, version=3)
    assert (tmp_path / "ours.bin").read_bytes() == llmc()
    loaded = load_model(tmp_path / "ours.bin")
    assert_same(loaded, SMALL, params)
    loaded[1].flat[...] = 0     # as training might: the parameters are memory-mapped, but the file must not change
    assert (tmp_path / "ours.bin").read_bytes() == llmc()


def test_llmc_bfloat16(tmp_path):
    """Saving rounds to eight bits; saving rounded values is exact."""
    params = random_params(SMALL)
    save_llmc(tmp_path / "once.bin", SMALL, params, version=5)
    rounded = load_model(tmp_path / "once.bin")[1]
    assert np.all(abs(rounded.flat - params.flat) <= 2.0**-8 * abs(params.flat))
    save_llmc(tmp_path / "twice.bin", SMALL, rounded, version=5)
    assert_same(load_model(tmp_path / "twice.bin"), SMALL, rounded)
    assert (tmp_path / "twice.bin").read_bytes() == llmc(5, data=(rounded.flat.view(np.uint32) >> 16).astype("<u2").tobytes())


def test_rounding_to_bfloat16():
    """To nearest, ties to even; infinities and NaN stay."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000], np.uint32)
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80, 0xFF80, 0x7F80, 0x8000]
    assert model_files.bfloat16_bits(bits.view(np.float32)).tolist() == expected
    for nan in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
        [rounded] = model_files.bfloat16_bits(np.array([nan], np.uint32).view(np.float32))
        assert rounded & 0x7F80 == 0x7F80 and rounded & 0x7F != 0


def test_padding_rows_of_a_checkpoint_are_cleared(tmp_path):
    params = random_params(SMALL)
    dirty = random_params(SMALL)
    dirty.wte[SMALL.vocab_size:] = 7
    (tmp_path / "dirty.bin").write_bytes(llmc(data=dirty.flat.tobytes()))
    assert_same(load_model(tmp_path / "dirty.bin"), SMALL, params)


# ----------------------------------------------------------------------------------------------------------------------
# transformers

def test_logits_of_transformers():
    config, params = load_model(REFERENCE)
    assert config == Config(max_seq_len=231, vocab_size=131, padded_vocab_size=256, num_layers=2, num_heads=3, channels=24)
    assert logits_error(config, params, np.load(REFERENCE / "expected.npz")) <= BOUND


@pytest.mark.parametrize("shape", ["odd", "gpt2", "half"])
def test_models_saved_by_transformers(transformers, tmp_path, shape):
    transformers(tmp_path, "--shape", shape)
    assert logits_error(*load_model(tmp_path), np.load(tmp_path / "expected.npz")) <= BOUND


@pytest.mark.parametrize("config", [Config(9, 131, 256, 2, 3, 24), Config(64, 50257, 50304, 2, 2, 8)], ids=str)
def test_transformers_loads_what_is_saved_here(transformers, tmp_path, encoding, config):
    params = random_params(config)
    save_model(tmp_path, config, params, encoding if config.vocab_size == encoding.vocab_size else NO_TOKENIZER)
    transformers(tmp_path, "--saved")
    expected = np.load(tmp_path / "expected.npz")
    assert logits_error(config, params, expected) <= BOUND
    if "text" in expected:
        assert expected["text"].tolist() == encoding.encode(TEXT)
    assert ("text" in expected) == (tmp_path / "vocab.json").exists()


MAKE_CHECKPOINT = """
import sys, torch
from safetensors.torch import load_file
folder, kind = sys.argv[1:]
tensors = load_file(folder + "/model.safetensors")
if kind == "nanoGPT":
    linear = "c_attn.weight", "c_proj.weight", "c_fc.weight"
    tensors = {"_orig_mod." + name: tensor.T if name.endswith(linear) else tensor for name, tensor in tensors.items()
               if not name.endswith("bias")}
    sizes = dict(n_layer=2, n_head=2, n_embd=8, block_size=3, vocab_size=5, bias=False, dropout=0.0)
    torch.save({"model": tensors, "model_args": sizes, "iter_num": 1}, folder + "/ckpt.pt")
else:
    for i in range(2):
        torch.save(dict(list(tensors.items())[i::2]), f"{folder}/pytorch_model-0000{i + 1}-of-00002.bin")
"""


@pytest.mark.parametrize("kind, name", [("nanoGPT", "ckpt.pt"), ("shards", "")])
def test_from_pytorch_with_the_python_of_transformers(transformers, tmp_path, kind, name):
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    params = random_params(SMALL)
    if kind == "nanoGPT":
        for ours, _ in params.items():
            if hugging_face.HUGGING_FACE_NAMES[ours].endswith("bias"):
                getattr(params, ours)[...] = 0
    save_model(tmp_path / "saved", SMALL, params)
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    subprocess.run([python, "-c", MAKE_CHECKPOINT, tmp_path / "saved", kind], check=True)
    program = [python, ROOT / "dev" / "from_pytorch.py", tmp_path / "saved" / name]
    finished = subprocess.run([*program, tmp_path / "model"], capture_output=True, text=True, check=True)
    assert_same(load_model(tmp_path / "model"), replace(SMALL, exact_gelu=kind == "nanoGPT"), params)
    assert ("assumed: nanoGPT's activation is GELU itself" in finished.stdout) == (kind == "nanoGPT")
    assert files_in(tmp_path / "model") == ["config.json", "model.safetensors", "tokenizer.json"]
    again = subprocess.run([*program, tmp_path / "model"], capture_output=True, text=True)
    assert again.returncode == 1 and re.fullmatch("from_pytorch.py: error: .*exists; choose another FOLDER\n", again.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Errors of one line

def error_of(path):
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500 and caught.value.status == 1, message
    return message


def assert_says(message, *parts):
    """The message contains all parts, in this order."""
    assert re.search(".*".join(re.escape(str(part)) for part in parts), message), (message, parts)


CONFIGS = {
    "another architecture": (dict(model_type="mistral"), ("config.json", "model_type", "mistral", "'gpt2', 'llama'")),
    "other activation": (dict(activation_function="relu"), ("activation_function", "relu", "gelu_new or gelu_pytorch_tanh")),
    "approximated with a sigmoid": (dict(activation_function="quick_gelu"), ("activation_function", "quick_gelu", "computes")),
    "activation in a list": (dict(activation_function=["gelu"]), ("activation_function", "['gelu']", "gelu_new")),
    "other epsilon": (dict(layer_norm_epsilon=1e-6), ("layer_norm_epsilon", "1e-06", "1e-05")),
    "attention scaled otherwise": (dict(scale_attn_weights=0.5), ("scale_attn_weights", "0.5", "True or False")),
    "cross-attention": (dict(add_cross_attention=True), ("add_cross_attention", "True", "expected False", "computes")),
    "other width": (dict(n_inner=24), ("n_inner", "24", "expected 32")),
    "default layers": (dict(n_layer="absent"), ("config.json: n_layer (by default) is 12,", "2 layers", "right number")),
    "default positions": (dict(n_positions=None, n_ctx="absent"), ("n_positions (by default) is 1,024", "3 rows of wpe")),
    "default vocabulary": (dict(vocab_size="absent"), ("vocab_size (by default) is 50,257", "5 rows of wte.weight")),
    "default channels": (dict(n_embd=None), ("n_embd (by default) is 768", "8 columns of wpe.weight")),
    "default heads": (dict(n_head="absent"), ("n_embd is 8, expected a multiple of n_head (by default), 12")),
    "size NaN": (dict(n_embd=float("nan")), ("n_embd", "nan", "whole number")),
    "size true": (dict(n_head=True), ("n_head", "True", "whole number")),
    "size zero": (dict(vocab_size=0), ("vocab_size", "0", "from 1")),
    "size of 4,001 digits": (dict(n_embd=10**4000), ("n_embd", "whole number")),
    "size of two lines": (dict(n_embd="a\nb\u2028c"), ("n_embd", r"'a\nb\u2028c'", "whole number")),
    "indivisible heads": (dict(n_head=3), ("n_embd", "8", "multiple of n_head, 3")),
    "more layers": (dict(n_layer=3), ("n_layer is 3", "2 layers")),
    "very many layers": (dict(n_layer=2**31 - 1), ("n_layer is 2,147,483,647", "2 layers")),
    "larger vocabulary": (dict(vocab_size=6), ("vocab_size is 6", "5 rows of wte.weight")),
    "smaller vocabulary": (dict(vocab_size=4), ("vocab_size is 4", "5 rows of wte.weight")),
    "largest sizes": (dict(n_embd=2**30, n_positions=2**31 - 1, vocab_size=2**31 - 1), ("vocab_size is 2,147,483,647", "5 ro")),
}


@pytest.mark.parametrize("changes, parts", CONFIGS.values(), ids=CONFIGS)
def test_config_of_another_model(tmp_path, changes, parts):
    write_folder(tmp_path, **changes)
    message = error_of(tmp_path)
    assert_says(message, *parts)
    assert ("download" in message) == ("whole number" in message)   # where that may help


GENERAL_NAMES = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_head": "num_attention_heads",
                 "n_layer": "num_hidden_layers"}
SETTINGS = "model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "n_inner"
EQUIVALENT = {
    "2019": dict(dict.fromkeys(SETTINGS, "absent"), initializer_range=0.02, output_past=True, pruned_heads={}),
    "nulls": dict.fromkeys(SETTINGS),
    "general names": dict.fromkeys(GENERAL_NAMES, "absent") | {
        general: json.loads(config_json(SMALL))[name] for name, general in GENERAL_NAMES.items()},
    "one's own name first": dict.fromkeys(GENERAL_NAMES.values(), 7),
    "n_ctx only": dict(n_positions="absent"),
    "no n_ctx": dict(n_ctx="absent"),
    "other settings": dict(afn="gelu_new", n_inner=32, torch_dtype="float16", reorder_and_upcast_attn=True, bos_token_id=None,
                           summary_activation=None, task_specific_params={"a": {"b": [1]}}),
    **{activation: dict(activation_function=activation) for activation in hugging_face.TANH_GELUS},
}


@pytest.mark.parametrize("changes", EQUIVALENT.values(), ids=EQUIVALENT)
def test_equivalent_config(tmp_path, changes, caplog):
    params = write_folder(tmp_path, **changes)
    assert_same(load_model(tmp_path), SMALL, params)
    assert not caplog.messages


def test_default_sizes(tmp_path):
    """GPT-2's own, if config.json gives none."""
    config = Config(1024, 50257, 50304, num_layers=12, num_heads=12, channels=12)
    sizes = dict.fromkeys(("n_positions", "n_ctx", "vocab_size", "n_layer", "n_head"), "absent")
    params = write_folder(tmp_path, config, **sizes)
    assert_same(load_model(tmp_path), config, params)
    assert hugging_face.config_from_settings("", {})[0] == replace(model_config("d12"), max_seq_len=1024)


@pytest.mark.parametrize("activation", ["gelu", "gelu_python"])
def test_exact_gelu(tmp_path, activation):
    """It is told apart from GPT-2's, and kept; llm.c's format could not tell it."""
    params = write_folder(tmp_path / "model", activation_function=activation)
    exact = replace(SMALL, exact_gelu=True)
    assert_same(load_model(tmp_path / "model"), exact, params)
    for old in (None, SMALL):   # over another model, weights carry their settings
        if old:
            save_model(tmp_path / "saved", old, params)
        save_model(tmp_path / "saved", exact, params)
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["activation_function"] == "gelu"
        assert_same(load_model(tmp_path / "saved"), exact, params)
    assert_same(load_model(tmp_path / "saved" / "model.safetensors"), exact, params)
    write_folder(tmp_path / "saved")
    for version in (3, 5):
        with pytest.raises(UserError, match="model.bin: llm.c computes the tanh form of GELU"):
            save_llmc(tmp_path / "model.bin", exact, params, version)
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("by_layer", [True, False])
def test_attention_scales_are_folded_into_the_queries(tmp_path, scaled, by_layer):
    """The scores q.k / sqrt(head size) become what transformers computes with these settings."""
    params = write_folder(tmp_path, scale_attn_weights=scaled, scale_attn_by_inverse_layer_idx=by_layer)
    for l in range(SMALL.num_layers):
        scale = (1 if scaled else math.sqrt(SMALL.channels / SMALL.num_heads)) / (l + 1 if by_layer else 1)
        params.qkvw[l, :SMALL.channels] *= scale
        params.qkvb[l, :SMALL.channels] *= scale
    loaded = load_model(tmp_path)
    assert_same(loaded, SMALL, params)
    save_model(tmp_path, *loaded)
    assert_same(load_model(tmp_path), SMALL, params)


def test_a_kill_between_two_renames_folds_no_scales_twice(tmp_path, monkeypatch):
    write_folder(tmp_path, scale_attn_weights=False)
    loaded = load_model(tmp_path)
    real, renamed = os.replace, []

    def replace_once(*names):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(real(*names))
    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, *loaded)
    assert_same(load_model(tmp_path), *loaded)


NOT_JSON = {
    "syntax": (b'{"model_type": gpt2}', ("is not JSON", "line 1 column 16")),
    "not UTF-8": (b'{"model_type": "\xff"}', ("is not JSON", "utf-8")),
    "not an object": (b'["gpt2"]', ("['gpt2']", "expected a JSON object")),
    "deep": (b"[" * 100_000, ("is not JSON",)),
    "many digits": (b'{"n_layer": ' + b"9" * 100_000 + b"}", ("is not JSON", "digits")),
    "long": (b" " * (2**20 + 1), ("1,048,577 bytes", "at most 1,048,576")),
}


@pytest.mark.parametrize("contents, parts", NOT_JSON.values(), ids=NOT_JSON)
def test_damaged_json(tmp_path, contents, parts):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(contents)
    assert_says(error_of(tmp_path), tmp_path / "config.json", *parts)


def without(*names):
    return {name: tensor for name, tensor in hugging_face_tensors(random_params(SMALL), SMALL).items() if name not in names}


def with_tensors(**tensors):
    return without() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def edited(name, **changes):
    """A file with changes to one tensor's entry in the header."""
    return safetensors(without(), lambda header: header[name].update(changes))


def numbers(*shape):
    return np.ones(shape, dtype=np.float32)


WHOLE = safetensors(without())
HEADER_BYTES, = struct.unpack("<Q", WHOLE[:8])

SAFETENSORS = {
    "empty": (b"", ("b''", "expected a safetensors file")),
    "truncated header": (WHOLE[:100], ("has 100 bytes", f"{HEADER_BYTES:,} of them are its header")),
    "truncated data": (WHOLE[:-1], (f"has {len(WHOLE) - 1:,} bytes", f"expected {len(WHOLE):,}", "download")),
    "trailing bytes": (WHOLE + b"\0", (f"has {len(WHOLE) + 1:,} bytes", f"expected {len(WHOLE):,}")),
    "header of 2**64 - 1": (b"\xff" * 8 + WHOLE[8:], ("18,446,744,073,709,551,615 of them are its header",)),
    "header over the limit": (struct.pack("<Q", 2**20 + 1) + b"{}".ljust(2**20 + 1), ("at most 1,048,576",)),
    "header not JSON": (WHOLE[:8] + WHOLE[8:].replace(b'"', b"'"), ("header", "is not JSON")),
    "header empty": (struct.pack("<Q", 2) + b"{}", ("holds no tensors", "wte.weight")),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 498\n", ("Git LFS", "git lfs pull")),
    "entry not an object": (safetensors(without(), lambda header: header.update(x=3)),
                            ("header", "3 for x", "expected a dtype")),
    "entry incomplete": (safetensors(without(), lambda header: header["wte.weight"].pop("shape")), ("wte.weight", "a shape")),
    "shape of fractions": (edited("ln_f.bias", shape=[8.0]), ("ln_f.bias", "a shape")),
    "offsets reversed": (edited("wte.weight", data_offsets=[160, 0]), ("wte.weight", "data_offsets")),
    "offsets of 4,300 digits": (edited("ln_f.bias", data_offsets=[0, 10**4299]), ("ln_f.bias", "data_offsets")),
    "offsets beyond the file": (edited("ln_f.bias", data_offsets=[len(WHOLE) - 8 - HEADER_BYTES - 32, 2**62]),
                                ("bytes", "expected 4,611,")),
    "offsets negative": (edited("wte.weight", data_offsets=[-160, 0]), ("wte.weight", "byte -160", "expected 0")),
    "overlap": (edited("wpe.weight", data_offsets=[156, 256]), ("wpe.weight", "byte 156", "expected 160")),
    "hole": (edited("wpe.weight", data_offsets=[164, 256]), ("wpe.weight", "byte 164", "expected 160")),
    "shape for other bytes": (safetensors(with_tensors(ln_f__bias=numbers(9)),
                                          lambda header: header["ln_f.bias"].update(shape=[8])),
                              ("ln_f.bias 36 bytes", "expected 32")),
    "missing": (safetensors(without("wte.weight", "h.1.mlp.c_fc.bias")), ("lacks wte.weight, h.1.mlp.c_fc.bias;",)),
    "many missing": (safetensors({"h.0.ln_1.bias": numbers(8), "h.1.ln_1.weight": numbers(8), "wte.weight": numbers(5, 8)}),
                     ("lacks wpe.weight, h.0.ln_1.weight, h.1.ln_1.bias", "and 6 more")),
    "unknown": (safetensors(with_tensors(h__0__attn__q_norm=numbers(8))),
                ("holds h.0.attn.q_norm, which GPT-2 does not have",)),
    "not transposed": (safetensors(with_tensors(h__0__mlp__c_fc__weight=numbers(32, 8))),
                       ("h.0.mlp.c_fc.weight", "(32, 8)", "(8, 32)", "transposed", "from_pytorch.py")),
    "wrong dtype": (safetensors(with_tensors(ln_f__bias=("I8", np.ones(8, np.int8)))),
                    ("ln_f.bias is I8", "F32 or F16 or BF16 or F64", "not quantized")),
    "twice": (safetensors(without() | {"_orig_mod.wte.weight": numbers(5, 8)}), ("wte.weight", "a second time")),
    "two models": (safetensors(without() | {"ref.transformer.wte.weight": numbers(5, 8)}),
                   ("holds 2 models", "'', ref.transformer.")),
    "untied classifier": (safetensors(without() | {"lm_head.weight": numbers(5, 8)}), ("lm_head.weight", "differs", "tied")),
}


@pytest.mark.parametrize("contents, parts", SAFETENSORS.values(), ids=SAFETENSORS)
def test_damaged_safetensors(tmp_path, contents, parts):
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    assert_says(error_of(tmp_path), *parts)
    assert_says(error_of(path), *parts)


def test_wrong_names_and_shapes_are_listed_together(tmp_path):
    tensors = without("ln_f.weight") | {"ln_x.weight": numbers(8), "h.0.ln_1.weight": numbers(9), "ln_f.bias": numbers(7)}
    write_folder(tmp_path, tensors=tensors)
    assert_says(error_of(tmp_path), tmp_path, "lacks ln_f.weight;", "holds ln_x.weight, which", "h.0.ln_1.weight is F32 (9,)",
                "(8,)", "ln_f.bias is F32 (7,)", "(8,)")


def test_shapes_that_imply_no_config(tmp_path):
    path = tmp_path / "model.safetensors"
    for tensors in (without(), without("wpe.weight"), with_tensors(wte__weight=numbers(5)),
                    with_tensors(wte__weight=numbers(5, 0))):
        path.write_bytes(safetensors(tensors))
        assert_says(error_of(path), path, "config.json" if tensors["wte.weight"].size else "n_head is 0")


SHARDS = {
    "elsewhere": ("../model.safetensors", ("weight_map", "../model.safetensors", "this folder")),
    "absolute": ("/model.safetensors", ("weight_map", "/model.safetensors", "this folder")),
    "a pickle": ("pytorch_model.bin", ("weight_map", "pytorch_model.bin", ".safetensors")),
    "not a string": (3, ("weight_map", "3", ".safetensors")),
    "missing": ("model-1.safetensors", ("cannot read", "model-1.safetensors", "No such file", "download")),
}


@pytest.mark.parametrize("shard, parts", SHARDS.values(), ids=SHARDS)
def test_index_of_shards(tmp_path, shard, parts):
    folder = tmp_path / "folder"
    write_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    assert_says(error_of(folder), *parts)


def test_index_without_shards(tmp_path):
    for contents, parts in (("{}", ("weight_map", "None")), ('{"weight_map": {}}', ("holds no tensors",))):
        write_folder(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(contents)
        assert_says(error_of(tmp_path), *parts)


LLMC = {
    "truncated header": (llmc()[:1023], ("has 1,023 bytes", "expected a header of 1,024")),
    "truncated": (llmc()[:-1], (f"has {len(llmc()) - 1:,} bytes", f"expected {len(llmc()):,}", "parameters of its header")),
    "bfloat16's size": (llmc(5), (f"has {len(llmc()):,} bytes", "expected")),
    "old version": (llmc(1), ("version 1", "expected version 3 (float32) or 5 (bfloat16)")),
    "other magic": (llmc(magic=20240520), ("is an llm.c token file", "expected a safetensors file or an llm.c checkpoint")),
    "vocabulary larger than padded": (llmc(V=129), ("padded_vocab_size", "128", "expected 256")),
    "not padded": (llmc(Vp=5), ("padded_vocab_size", "5", "expected 128")),
    "no layers": (llmc(L=0), ("num_layers", "0", "from 1")),
    "indivisible heads": (llmc(NH=3), ("channels", "8", "multiple of num_heads, 3")),
    "largest sizes": (llmc(L=2**31 - 1, C=2**30, NH=1), (f"has {len(llmc()):,} bytes", "expected 118,")),
}


@pytest.mark.parametrize("contents, parts", LLMC.values(), ids=LLMC)
def test_damaged_llmc(tmp_path, contents, parts):
    path = tmp_path / "model.bin"
    path.write_bytes(contents)
    assert_says(error_of(path), path, *parts)


class Bomb:
    """Unpickling it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [lambda contents: contents, lambda contents: b"PK\x03\x04" + contents], ids=["plain", "zip"])
def test_no_pickle_is_opened(tmp_path, wrap):
    exploded = tmp_path / "exploded"
    pickled = wrap(pickle.dumps(Bomb(exploded), protocol=2))
    folder = tmp_path / "folder"
    write_folder(folder)
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
        (folder / name).write_bytes(pickled)
        assert_says(error_of(folder / name), folder / name, "is a Python pickle", "dev/from_pytorch.py")
    assert_says(error_of(folder), "model.safetensors is a Python pickle", "dev/from_pytorch.py")
    (folder / "model.safetensors").unlink()
    assert_says(error_of(folder), folder, "has no model.safetensors;", "pytorch_model.bin is a Python pickle", "from_pytorch")
    assert not exploded.exists()


def test_missing_files(tmp_path):
    assert_says(error_of(tmp_path), tmp_path, "has no model.safetensors")
    write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_says(error_of(tmp_path), "cannot read", tmp_path / "config.json", "No such file", "the model's own config.json")
    for missing in (tmp_path / "model", "./model", "models/model.bin", "gpt2.safetensors", "a/b/c", ""):
        assert_says(error_of(missing), "there is no file or folder", repr(str(missing)), "Hugging Face", "gpt2")


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_says(error_of(tmp_path / "pipe"), "cannot read", tmp_path / "pipe", "it is a named pipe, expected a file")


# ----------------------------------------------------------------------------------------------------------------------
# The hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replaces huggingface_hub.snapshot_download, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def install(snapshot_download):
        module = types.ModuleType("huggingface_hub")
        if snapshot_download:
            module.snapshot_download = snapshot_download
        monkeypatch.setitem(sys.modules, "huggingface_hub", module if snapshot_download else None)
    return install


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "openai-community/gpt2-xl", "user_1/GPT.2-small"])
def test_model_from_the_hub(hub, tmp_path, name):
    params = write_folder(tmp_path / "cache")
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append(repo_id)
        assert not any(pattern.endswith((".bin", "*")) for pattern in allow_patterns)  # never downloads a pickle
        return str(tmp_path / "cache")
    hub(snapshot_download)
    assert_same(load_model(name), SMALL, params)
    assert asked == [name]


def test_local_folder_takes_precedence_over_the_hub(hub, tmp_path):
    def snapshot_download(repo_id, allow_patterns):
        raise AssertionError("the hub was asked")
    hub(snapshot_download)
    params = write_folder(tmp_path / "gpt2")
    assert_same(load_model("gpt2"), SMALL, params)
    for name in ("model.bin", "user/model.safetensors", "a/b/c", "/gpt2x", "gpt 2", ""):
        assert_says(error_of(name), "there is no file or folder", repr(name))


def test_no_hub(hub):
    def unreachable(repo_id, allow_patterns):
        raise RuntimeError("cannot reach the hub\n\nCheck your connection\n")
    hub(unreachable)
    assert_says(error_of("gpt2"), "no file or folder gpt2", "hub", "RuntimeError: cannot reach the hub Check", "network")
    hub(None)
    assert_says(error_of("gpt2"), "no file or folder gpt2", "pip install huggingface_hub")


# ----------------------------------------------------------------------------------------------------------------------
# Atomic writes

def test_failed_write_keeps_the_old_model(tmp_path, encoding):
    """If only one file were replaced, the weights might not fit config.json."""
    params = write_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config = Config(7, 50257, 50304, 1, 1, 4)
    for obstacle in ("config.json", "tokenizer_config.json"):
        with pytest.MonkeyPatch.context() as patch:
            times = full_disk(patch, obstacle)
            with pytest.raises(UserError, match=rf"cannot write .*{obstacle}: No space left on device"):
                save_model(tmp_path, config, random_params(config), encoding)
            assert times == [obstacle]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same(load_model(tmp_path), SMALL, params)


def full_disk(patch, name):
    """Make writing the file `name` fail with a full disk. The returned list tells how often that happened."""
    real, times = model_files.atomic_file, []

    def write(piece):
        times.append(name)
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def atomic_file(path):
        with real(path) as file:
            yield types.SimpleNamespace(write=write) if path.name == name else file
    patch.setattr(model_files, "atomic_file", atomic_file)
    return times


def test_interrupted_save_keeps_the_old_model(tmp_path):
    params = write_folder(tmp_path)
    broken = random_params(SMALL, seed=1)
    del broken.lnfb
    with pytest.raises(AttributeError):
        save_model(tmp_path, SMALL, broken)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]
    assert_same(load_model(tmp_path), SMALL, params)


def test_weights_are_renamed_last(tmp_path, monkeypatch):
    replaced = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (replaced.append(Path(target).name), real(source, target)))
    save_model(tmp_path, SMALL, random_params(SMALL))
    assert replaced == ["config.json", "model.safetensors"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"as it was")
    with pytest.raises(UserError, match=r"cannot write .*model.safetensors"):
        save_model(tmp_path / "file", SMALL, random_params(SMALL))
    with pytest.raises(UserError, match=r"cannot write .*model.bin"):
        save_llmc(tmp_path / "file" / "model.bin", SMALL, random_params(SMALL), version=3)
    assert (tmp_path / "file").read_bytes() == b"as it was" and files_in(tmp_path) == ["file"]


# ----------------------------------------------------------------------------------------------------------------------
# Random damage

LIES = [b"0", b"1", b"-1", b"7", b"1.5", b"1e9", b"1e999", b"NaN", b"null", b"true", b'"8"', b"[]", b"{}", b"[[8]]",
        b"2147483647", b"4294967296", b"18446744073709551616", b"9" * 400]


def flip_bits(rng, contents):
    contents = bytearray(contents)
    for _ in range(rng.integers(1, 9)):
        contents[rng.integers(len(contents))] ^= 1 << rng.integers(8)
    return bytes(contents)


def truncate(rng, contents):
    return contents[:rng.integers(len(contents))]


def insert_bytes(rng, contents):
    where = rng.integers(len(contents) + 1)
    return contents[:where] + rng.bytes(rng.integers(1, 40)) + contents[where:]


def drop_bytes(rng, contents):
    where = rng.integers(len(contents))
    return contents[:where] + contents[where + rng.integers(1, 40):]


def damage_opening(rng, contents):
    """Flip bits in the first 40 bytes, which hold the lengths."""
    return flip_bits(rng, contents[:40]) + contents[40:]


def lie(rng, contents):
    """Replace a number in JSON. In a safetensors header, correct the header's length."""
    start = 8 if contents[8:9] == b"{" and contents[:1] != b"{" else 0
    end = start + struct.unpack("<Q", contents[:8])[0] if start else len(contents)
    text = contents[start:end]
    numbers = list(re.finditer(rb"\b\d+(?:e-\d+)?\b", text))
    number = numbers[rng.integers(len(numbers))]
    text = text[:number.start()] + LIES[rng.integers(len(LIES))] + text[number.end():]
    return (struct.pack("<Q", len(text)) if start else b"") + text + contents[end:]


def lie_in_int32(rng, contents):
    """Replace a number in llm.c's header."""
    header = list(struct.unpack("<8i", contents[:32]))
    header[rng.integers(1, 8)] = int(rng.choice([0, 1, -1, 2, 3, 5, 64, 127, 128, 129, 2**16, 2**30, 2**31 - 1, -2**31]))
    return struct.pack("<8i", *header) + contents[32:]


ANY_FILE = (flip_bits, truncate, insert_bytes, drop_bytes, damage_opening)


@pytest.mark.parametrize("name, damages", [
    ("model.safetensors", (*ANY_FILE, lie, lie, lie)), ("config.json", (*ANY_FILE, lie, lie)),
    ("model.safetensors.index.json", ANY_FILE), ("model.bin", (*ANY_FILE, lie_in_int32, lie_in_int32))])
def test_random_damage_is_harmless(tmp_path, name, damages):
    """250 damaged files of each kind: either a one-line error or a model, and never much memory."""
    folder = tmp_path / "folder"
    write_folder(folder)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(without(), "shard.safetensors")}))
    if name == "model.bin":
        (folder / name).write_bytes(llmc())
    whole = (folder / name).read_bytes()
    target = folder / name if name == "model.bin" else folder
    rng = np.random.default_rng(len(name))
    read = 0
    tracemalloc.start()
    try:
        for i in range(250):
            contents = damages[i % len(damages)](rng, whole)
            (folder / name).write_bytes(contents)
            tracemalloc.reset_peak()
            try:
                config, params = load_model(target)
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 3000, str(error)
            else:
                read += 1
                assert params.size == sum(tensor.size for _, tensor in params.items())
                assert params.wte.shape == (config.padded_vocab_size, config.channels)
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 2**19, (peak, len(contents))
    finally:
        tracemalloc.stop()
    assert 0 < read < 200
