"""GGUF files: what we write, what others write, and one line of error for a damaged file.

The package gguf's own reader is the judge of what we write; dev/compare_llama_cpp.py asks llama.cpp itself. DAMAGED_FILES is
the number of damaged files.
"""
import json
import os
import time
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize, quant_shape_to_byte_shape

import convert_model
import gguf_files
from cli import UserError, one_line
from conftest import random_params
from generate_gpt2 import Decoder, round_weights
from gguf_files import FILE_TYPES, NAMES, gguf_tensors, read_gguf, read_gguf_tokenizer, write_gguf
from gpt2 import Config, Tensors, parameter_shapes
from matvec_cpu import WEIGHT_DTYPES
from model_files import load_model, load_model_tokenizer, save_model
from test_damaged_files import ANY_FILE, pick
from tokenizer import NO_TOKENIZER, GPT2Tokenizer, Tokenizer, own_tokenizer, tokenizer_from_files, train_tokenizer

NUM_DAMAGED = int(os.environ.get("DAMAGED_FILES", 100))
SECONDS = 5             # for a damaged file; most take a hundredth of a second
CONFIG = Config(max_seq_len=8, vocab_size=300, padded_vocab_size=384, num_layers=2, num_heads=2, channels=64)
TEXT = "The wind and the sea, the sea and the wind.\n\n  naïve café 漢字 🙂<|endoftext|><pad>the <mine>end"
END, PAD, MINE = 280, 281, 282          # the tokenizer's added tokens; rows from 283 on are unused


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 283 tokens with a padding token, a token of the user's, and fewer tokens than the model has rows."""
    library = train_tokenizer([TEXT.replace("<|endoftext|>", " ") * 3], END + 1).to_library()
    library.add_special_tokens(["<pad>"])
    library.add_tokens(["<mine>"])
    return own(library, pad_token="<pad>")


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def own(library, **settings):
    """The Tokenizer of a tokenizers.Tokenizer, with names of special tokens."""
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | settings
    return tokenizer_from_files({"tokenizer.json": library.to_str().encode(),
                                 "tokenizer_config.json": json.dumps(settings).encode()}, {}, Path("here"), CONFIG.vocab_size)


def relative_error(found, expected):
    return np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(np.float64(expected))


# ----------------------------------------------------------------------------------------------------------------------
# Writing and reading

@pytest.mark.parametrize("type, bound", {"f32": 0, "f16": 2**-11, "bf16": 2**-9, "q8_0": 6e-3, "q4_0": 0.1}.items())
def test_round_trip(tmp_path, params, tokenizer, type, bound):
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, params, tokenizer, type)
    config, found = load_model(path)
    assert config == CONFIG
    for name, tensor in params.items():
        rounded = name in ("wte", "qkvw", "attprojw", "fcw", "fcprojw")
        error = relative_error(getattr(found, name), tensor) if tensor.any() else getattr(found, name).any()
        assert error <= (bound if rounded else 0), name
    assert sorted(tmp_path.iterdir()) == [path]


AS_STORED = "float32", "bfloat16", "int8", "int4"


@pytest.mark.parametrize("type, kind", [("f32", "float32"), ("bf16", "bfloat16"), ("q8_0", "int8"), ("q4_0", "int4")])
def test_matrices_as_they_lie(tmp_path, params, tokenizer, type, kind):
    """Those that the decoder multiplies as they are. It computes the same as when it rounds the file's numbers itself."""
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, params, tokenizer, type)
    contents = path.read_bytes()
    config, stored = load_model(path, AS_STORED)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for name, _, ours, index in gguf_tensors(config):
        array = getattr(stored, ours)[index] if "{layer}" in NAMES[ours] else getattr(stored, ours)
        if ours in ("wte", "qkvw", "attprojw", "fcw", "fcprojw"):
            assert array.dtype == WEIGHT_DTYPES[kind] and array.tobytes() == tensors[name].tobytes(), name
        else:
            assert array.dtype == np.float32 and array.tobytes() == getattr(params, ours)[index].tobytes(), name
    tokens = np.arange(1, 8, dtype=np.int32)
    losses = []
    for weights in (stored, round_weights(config, load_model(path)[1], kind)):
        decoder = Decoder(config, weights, 1, 2)
        rows = np.concatenate([decoder.forward(tokens[None, t:t + 1]) for t in range(7)])
        losses.append(decoder.losses(rows[:6], tokens[1:]))
    assert losses[0].tobytes() == losses[1].tobytes()
    stored.wte[:] = 0
    assert path.read_bytes() == contents


def test_matrices_are_converted_where_they_are_not_asked_for_as_they_lie(tmp_path, params, tokenizer):
    write_gguf(tmp_path / "model.gguf", CONFIG, params, tokenizer, "q8_0")
    assert isinstance(load_model(tmp_path / "model.gguf", ("int4", "bfloat16"))[1], Tensors)
    kind = GGMLQuantizationType.Q8_0
    up = gguf.quants.quantize(random_params(SMALL).fcw[0], kind)
    write_other(tmp_path / "model.gguf", tensors={"blk.0.ffn_up.weight": (kind, up)})
    _, stored = load_model(tmp_path / "model.gguf", AS_STORED)
    assert stored.fcw[0].view(np.uint8).tobytes() == up.tobytes() and stored.wte.dtype == np.float32


def test_the_package_reads_the_same(tmp_path, params, tokenizer):
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, params, tokenizer, "q8_0")
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tokens, types = values.pop("tokenizer.ggml.tokens"), values.pop("tokenizer.ggml.token_type")
    merges = values.pop("tokenizer.ggml.merges")
    assert values == {
        "general.architecture": "gpt2", "general.file_type": 7, "general.quantization_version": 2,
        "gpt2.context_length": 8, "gpt2.embedding_length": 64, "gpt2.block_count": 2, "gpt2.feed_forward_length": 256,
        "gpt2.attention.head_count": 2, "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": END,
        "tokenizer.ggml.eos_token_id": END, "tokenizer.ggml.padding_token_id": PAD, "tokenizer.ggml.add_bos_token": False}
    assert tokens[END:284] == ["<|endoftext|>", "<pad>", "<mine>", "[PAD283]"] and len(tokens) == len(types) == 300
    assert types == END * [TokenType.NORMAL] + 2 * [TokenType.CONTROL] + [TokenType.USER_DEFINED] + 17 * [TokenType.UNUSED]
    library = tokenizer.to_library()
    assert all(library.token_to_id(token) == id for id, token in enumerate(tokens[:283]))
    assert len(merges) == END - 256 and {merge.replace(" ", "") for merge in merges} == set(tokens[256:END])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    arch = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
    names = {gguf.TENSOR_NAMES[tensor].format(bid=l) for tensor in arch for l in range(2)} - {"output"}
    assert {name.rsplit(".", 1)[0] for name in tensors} == names
    assert {name for name, tensor in tensors.items() if tensor.tensor_type == GGMLQuantizationType.Q8_0} == {
        "token_embd.weight"} | {f"blk.{l}.{name}.weight" for l in range(2) for name in
                                ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}
    ups = [dequantize(tensors[f"blk.{l}.ffn_up.weight"].data, GGMLQuantizationType.Q8_0) for l in range(2)]
    assert all(relative_error(up, params.fcw[l]) < 6e-3 for l, up in enumerate(ups))


def test_rows_that_are_not_whole_blocks_become_f16(tmp_path, tokenizer):
    config = replace(CONFIG, channels=40)
    write_gguf(tmp_path / "model.gguf", config, random_params(config), tokenizer, "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up.weight"] == "F16" and kinds["blk.1.ffn_down.weight"] == "Q4_0"
    assert load_model(tmp_path / "model.gguf")[0] == config


def test_tokenizer_round_trip(tmp_path, params, tokenizer):
    write_gguf(tmp_path / "model.gguf", CONFIG, params, tokenizer)
    found = load_model_tokenizer(tmp_path / "model.gguf", CONFIG.vocab_size)
    assert found.special_ids == tokenizer.special_ids == {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    assert (found.vocab_size, found.fingerprint, found.prefix) == (283, tokenizer.fingerprint, [])
    ids = tokenizer.encode(TEXT)
    assert found.encode(TEXT) == ids and found.decode(ids) == TEXT
    assert {END, PAD, MINE} < set(ids)


def test_gpt2s_vocabulary_stays_itself(tmp_path):
    try:
        files = GPT2Tokenizer().files
    except UserError as error:
        pytest.skip(str(error))
    config = Config(4, 50304, 50304, 1, 1, 4)
    write_gguf(tmp_path / "model.gguf", config, Tensors(parameter_shapes(config)), GPT2Tokenizer())
    found = read_gguf_tokenizer(tmp_path / "model.gguf")
    assert type(found) is GPT2Tokenizer and found.end_of_text == 50256
    assert all(found.files[name] == files[name] for name in ("vocab.json", "merges.txt"))


def test_a_token_before_every_text(tmp_path, params, tokenizer):
    from tokenizers.processors import TemplateProcessing
    library = own_tokenizer(tokenizer.files["tokenizer.json"]).to_library()
    library.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)])
    write_gguf(tmp_path / "model.gguf", CONFIG, params, own(library))
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert read_gguf_tokenizer(tmp_path / "model.gguf").prefix == [END]


def test_a_model_without_end_of_text(tmp_path, params, tokenizer, caplog):
    for ids, expected in (({}, {}), ({"eos_token_id": [END, 3]}, {"bos_token_id": END, "eos_token_id": END})):
        other = own_tokenizer(tokenizer.files["tokenizer.json"])
        other.special_ids = ids
        write_gguf(tmp_path / "model.gguf", CONFIG, params, other)
        found = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
        assert {name: found[key] for name, key in gguf_files.SPECIAL_KEYS.items() if key in found} == expected
        assert ("the model has no end-of-text token; llama.cpp takes token 11 for it" in caplog.text) == (not ids)
        caplog.clear()


def changed(tokenizer, **parts):
    """A tokenizer with other parts of its tokenizer.json."""
    settings = json.loads(tokenizer.files["tokenizer.json"])
    return own_tokenizer(json.dumps(settings | parts | {"model": settings["model"] | parts.get("model", {})}).encode())


WORDS = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
         "vocab": {"a": 0}}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("parts, message", {
    "none": (None, "has no tokenizer that .* needs a byte-level BPE with merges; convert it to a folder instead"),
    "WordPiece": (dict(model=WORDS), "tokenizer is WordPiece, and llama.cpp needs a byte-level BPE with merges"),
    "merges": (dict(model={"merges": []}), "tokenizer is BPE without merges, and"),
    "pre-tokenizer": (dict(pre_tokenizer=DIGITS), "has the pre-tokenizer Sequence, and llama.cpp would split"),
    "no pre-tokenizer": (dict(pre_tokenizer=None), "has the pre-tokenizer None, and"),
    "no regex": (dict(pre_tokenizer=BYTES | {"use_regex": False}), "has the pre-tokenizer ByteLevel, and"),
    "normalizer": (dict(normalizer={"type": "Lowercase"}), "has the normalizer Lowercase, and"),
    "whole words": (dict(model={"ignore_merges": True}), "has ignore_merges, and"),
}.values())
def test_tokenizers_that_llama_cpp_lacks(tmp_path, params, tokenizer, parts, message):
    with pytest.raises(UserError, match=message):
        write_gguf(tmp_path / "model.gguf", CONFIG, params, changed(tokenizer, **parts) if parts else NO_TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_too_large(tmp_path, tokenizer):
    config = replace(CONFIG, vocab_size=282)
    with pytest.raises(UserError, match="has 283 tokens, expected at most 282"):
        write_gguf(tmp_path / "model.gguf", config, random_params(config), tokenizer)


def test_a_space_before_texts_is_noted(tmp_path, params, tokenizer, caplog):
    other = changed(tokenizer, pre_tokenizer=BYTES | {"add_prefix_space": True})
    write_gguf(tmp_path / "model.gguf", CONFIG, params, other)
    assert "puts a space before a text; llama.cpp does not" in caplog.text


@pytest.mark.parametrize("type", FILE_TYPES)
def test_numbers_too_large_for_the_type(tmp_path, tokenizer, type):
    params = random_params(CONFIG)
    params.fcw[1, 2, 3] = 1e7       # beyond float16, and the scale of 32 numbers beyond it, too
    path = tmp_path / "model.gguf"
    if type in ("f32", "bf16"):
        write_gguf(path, CONFIG, params, tokenizer, type)
        assert read_gguf(path)[1].fcw[1, 2, 3] == pytest.approx(1e7, rel=2**-8)
    else:
        with pytest.raises(UserError, match=f"blk.1.ffn_up.weight has numbers that {type} cannot hold; choose"):
            write_gguf(path, CONFIG, params, tokenizer, type)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_earlier_file(tmp_path, params, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.gguf"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(gguf_files, "quantize", full)
    with pytest.raises(UserError, match="cannot write .*model.gguf: No space left"):
        write_gguf(path, CONFIG, params, tokenizer, "q8_0")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


# ----------------------------------------------------------------------------------------------------------------------
# Files that others wrote

FIELDS = {"gpt2.context_length": 4, "gpt2.embedding_length": 256, "gpt2.block_count": 1, "gpt2.attention.head_count": 4}
SMALL = Config(4, 7, 128, 1, 4, 256)


def write_other(path, fields=None, tensors=None, architecture="gpt2"):
    """Write a GGUF file by the package: FIELDS and tensors of random numbers, with changes. None leaves one out.

    tensors: name -> an array, or a kind and its bytes
    """
    params = random_params(SMALL)
    arrays = {name: getattr(params, ours)[index] for name, _, ours, index in gguf_files.gguf_tensors(SMALL)}
    writer = GGUFWriter(path, architecture)
    for key, value in (FIELDS | (fields or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in (arrays | (tensors or {})).items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=tensor[0])
        elif tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


def header_end(path):
    with open(path, "rb") as file:
        return gguf_files.parse_header(file, path)[2]


def test_matrices_at_odd_positions(tmp_path):
    """Which a file without alignment may have. They are copied."""
    path = tmp_path / "model.gguf"
    params = write_other(path, {"general.alignment": 1})
    data = path.read_bytes()[-(-header_end(path) // 32) * 32:]      # the package aligns it all the same
    for letters in range(4):
        write_other(path, {"general.alignment": 1, "general.name": letters * "a"})
        path.write_bytes(path.read_bytes()[:header_end(path)] + data)
        _, stored = read_gguf(path, AS_STORED)
        assert stored.wte.flags.aligned and stored.wte.tobytes() == params.wte[:7].tobytes()


def test_every_kind_that_the_package_converts(tmp_path):
    generator = np.random.default_rng(0)
    path, read = tmp_path / "model.gguf", []
    for kind in GGMLQuantizationType:
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (KeyError, NotImplementedError):
            continue
        stored = generator.integers(256, size=quant_shape_to_byte_shape((7, 256), kind), dtype=np.uint8)
        with np.errstate(all="ignore"):
            expected = dequantize(stored, kind)
        write_other(path, tensors={"token_embd.weight": (kind, stored)})
        assert np.array_equal(read_gguf(path)[1].wte[:7], expected, equal_nan=True), kind
        read.append(kind.name)
    assert {"F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "IQ1_S", "IQ4_XS"} <= set(read)


EMBEDDING = random_params(SMALL).wte[:7]
OTHER = np.float32(np.random.default_rng(1).standard_normal((7, 256)))


@pytest.mark.parametrize("kinds, noted", [
    (("F32", "F32"), None), (("F16", "F32"), "as F16 and F32; the latter is used"), (("F32", "BF16"), "as BF16 and F32"),
    (("Q4_0", "Q8_0"), "as Q4_0 and Q8_0"), (("Q8_0", "Q8_0"), None), (("Q8_0", "Q4_0"), "as Q4_0 and Q8_0"),
    (("Q4_1", "Q5_0"), "as Q4_1 and Q5_0")])
def test_a_second_copy_of_the_embedding(tmp_path, caplog, kinds, noted):
    embedding, classifier = (GGMLQuantizationType[name] for name in kinds)
    copies = [gguf.quants.quantize(EMBEDDING, kind) for kind in (embedding, classifier)]
    names = "token_embd.weight", "output.weight"
    write_other(tmp_path / "model.gguf", tensors=dict(zip(names, zip((embedding, classifier), copies))))
    _, params = read_gguf(tmp_path / "model.gguf")
    errors = [relative_error(dequantize(copy, kind), EMBEDDING) for copy, kind in zip(copies, (embedding, classifier))]
    assert relative_error(params.wte[:7], EMBEDDING) == min(errors)
    assert noted in caplog.text if noted else caplog.text == ""


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("other", [OTHER, EMBEDDING + np.float32(0.3) * EMBEDDING.std() * OTHER, -EMBEDDING, np.nan * OTHER],
                         ids=["other", "fine-tuned", "negative", "NaN"])
def test_an_untied_classifier(tmp_path, kind, other):
    kind = GGMLQuantizationType[kind]
    with np.errstate(all="ignore"):
        write_other(tmp_path / "model.gguf", tensors={"output.weight": (kind, gguf.quants.quantize(other, kind))})
    with pytest.raises(UserError, match="output.weight that differs from token_embd.weight, expected one matrix for both"):
        read_gguf(tmp_path / "model.gguf")


def test_an_untied_classifier_in_a_coarse_file(tmp_path):
    kind = GGMLQuantizationType.Q4_0
    fine_tuned = EMBEDDING + np.float32(0.3) * EMBEDDING.std() * OTHER
    write_other(tmp_path / "model.gguf", tensors={"token_embd.weight": (kind, gguf.quants.quantize(EMBEDDING, kind)),
                                                  "output.weight": (kind, gguf.quants.quantize(fine_tuned, kind))})
    with pytest.raises(UserError, match="differs from token_embd.weight"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("changes, message", {
    "architecture": (dict(architecture="bert"), "is a bert model, expected gpt2, llama or qwen2; choose a model"),
    "epsilon": (dict(fields={"gpt2.attention.layer_norm_epsilon": 1e-6}), "epsilon is 9.99.*e-07, expected 1e-05; choose"),
    "feed-forward": (dict(fields={"gpt2.feed_forward_length": 512}), "length is 512, expected 1024; choose"),
    "heads of keys": (dict(fields={"gpt2.attention.head_count_kv": 2}), "head_count_kv is 2, expected 4"),
    "heads": (dict(fields={"gpt2.attention.head_count": 5}), "gpt2.embedding_length is 256, expected a multiple of .*, 5"),
    "heads by layer": (dict(fields={"gpt2.attention.head_count": [4]}), r"head_count is \[4\], expected a whole number"),
    "no context": (dict(fields={"gpt2.context_length": None}), "gpt2.context_length is None, expected a whole number"),
    "layers": (dict(fields={"gpt2.block_count": 2**31 - 1}), "16 tensors, too few for its 2,147,483,647 layers"),
    "missing": (dict(tensors={"output_norm.bias": None}), "lacks output_norm.bias, expected the tensors of a GPT-2"),
    "no embedding": (dict(tensors={"token_embd.weight": None}), "number of rows of token_embd.weight is None, expected"),
    "unknown": (dict(tensors={"rope_freqs.weight": np.ones(3, np.float32)}), "holds rope_freqs.weight, expected"),
    "shape": (dict(tensors={"position_embd.weight": np.ones((5, 256), np.float32)}),
              r"position_embd.weight has the shape \(5, 256\), expected \(4, 256\)"),
    "kind": (dict(tensors={"output_norm.bias": np.ones(256, np.int32)}), "output_norm.bias is of the kind I32, which"),
    "alignment": (dict(fields={"general.alignment": 0}), "general.alignment is 0, expected a power of two"),
}.values())
def test_refused(tmp_path, changes, message):
    write_other(tmp_path / "model.gguf", **changes)
    with pytest.raises(UserError, match=message):
        read_gguf(tmp_path / "model.gguf")


def test_cut_short(tmp_path):
    write_other(tmp_path / "model.gguf")
    contents = (tmp_path / "model.gguf").read_bytes()
    for size in (len(contents) - 4, len(contents) // 2, 2000, 500, 30, 4):      # in the data, then in the header
        (tmp_path / "model.gguf").write_bytes(contents[:size])
        found = "bytes of data, expected at least" if size > 1000 else "piece of .* expected at most"
        with pytest.raises(UserError, match=found):
            read_gguf(tmp_path / "model.gguf")


TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": list("abcdef") + ["ab"],
          "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 5}


def test_other_tokenizers(tmp_path, caplog):
    path = tmp_path / "model.gguf"
    for pre in ("gpt-2", "default", None):     # older files have none
        write_other(path, TOKENS | {"tokenizer.ggml.pre": pre})
        assert read_gguf_tokenizer(path).encode("abcf") == [6, 2, 5] and caplog.text == ""
    for change in ({"tokenizer.ggml.pre": "starcoder"}, {"tokenizer.ggml.model": "llama"}, {"tokenizer.ggml.model": None}):
        write_other(path, TOKENS | change | {"tokenizer.ggml.bos_token_id": 7})
        found = read_gguf_tokenizer(path)
        assert type(found) is Tokenizer and found.end_of_text == 5 and found.special_ids["bos_token_id"] is None
        assert "has the tokenizer (" in caplog.text
        caplog.clear()
    for key, value in (("tokens", list("abcdef")), ("tokens", list("abcdeff")), ("merges", None), ("merges", [1]),
                       ("token_type", [1, 2]), ("tokens", "x")):
        write_other(path, TOKENS | {f"tokenizer.ggml.{key}": value})
        with pytest.raises(UserError, match="damaged tokenizer, expected 7 different tokens"):
            read_gguf_tokenizer(path)


# ----------------------------------------------------------------------------------------------------------------------
# convert_model.py

def test_convert(tmp_path, run_main, params, tokenizer):
    folder = tmp_path / "model"
    save_model(folder, CONFIG, params, tokenizer)
    save_model(tmp_path / "without", CONFIG, params)
    for source, name, type in (("model", "model.gguf", "f32"), ("model.gguf", "back", "f32"), ("without", "model.bin", "f32"),
                               ("without", "half.bin", "bf16"), ("back", "eight.GGUF", "q8_0")):
        finished = run_main(convert_model, tmp_path / source, tmp_path / name, "--type", type)
        assert (finished.status, finished.err) == (0, "")
        config, found = load_model(tmp_path / name)
        assert config == CONFIG and relative_error(found.flat, params.flat) <= (0 if type == "f32" else 6e-3)
    assert finished.out == f"wrote {tmp_path / 'eight.GGUF'}: 2 layers, 0.1 M parameters, 0.1 MB\n"
    assert load_model_tokenizer(tmp_path / "back").encode(TEXT) == tokenizer.encode(TEXT)
    finished = run_main(convert_model, folder, tmp_path / "own.bin")
    assert finished.status == 1 and "llm.c's files have no tokenizer, and the model's is not GPT-2's" in finished.err


@pytest.mark.parametrize("output, flags, message", [
    ("model.bin", ["--type", "q8_0"], "--type is q8_0, expected f32 or bf16 for model.bin; --help"),
    ("folder", ["--type", "f16"], "--type is f16, expected f32 for folder; --help"),
    ("model.safetensors", [], "OUTPUT is model.safetensors, expected a folder, in which"),
    ("model.gguf", ["--type", "q5_0"], "argument --type: invalid choice: 'q5_0'"),
])
def test_convert_refuses(tmp_path, monkeypatch, run_main, output, flags, message):
    monkeypatch.chdir(tmp_path)
    finished = run_main(convert_model, "model", output, *flags)
    assert finished.status == 2 and message in finished.err and list(tmp_path.iterdir()) == []


def test_exact_gelu_is_noted(tmp_path, run_main, monkeypatch, caplog, params, tokenizer):
    monkeypatch.setattr(convert_model, "find_model", lambda name: name)
    monkeypatch.setattr(convert_model, "load_model", lambda name: (replace(CONFIG, exact_gelu=True), params))
    monkeypatch.setattr(convert_model, "load_model_tokenizer", lambda name, rows: tokenizer)
    run_main(convert_model, "x", tmp_path / "model")
    assert caplog.text == ""
    run_main(convert_model, "x", tmp_path / "model.gguf")
    assert "llm.c compute the tanh form" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files

NUMBERS = [0, 1, 4, 8, 9, 12, 13, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def change_number(rng, contents):
    """Another number where the header has one of 4 or 8 bytes, most often one of its first: counts, lengths, types, offsets."""
    header = contents[:contents.index(b"blk.1.ffn_down") + 60]
    places = [place for place in range(4, len(header) - 8) if header[place + 1:place + 4] == b"\0\0\0"]
    place, size = pick(rng, places[:int(pick(rng, [12, 80, len(places)]))]), pick(rng, [4, 8])
    return contents[:place] + (pick(rng, NUMBERS) % 2**(8 * size)).to_bytes(size, "little") + contents[place + size:]


def test_damaged_files(tmp_path, params, tokenizer):
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, params, tokenizer, "q4_0")
    valid = path.read_bytes()

    def read():
        """Read path. Returns the error or None, the peak of memory and the time."""
        started = time.perf_counter()
        tracemalloc.start()
        try:
            config, _ = load_model(path)
            load_model_tokenizer(path, config.vocab_size)
            error = None
        except UserError as caught:
            error = str(caught)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return error, peak, time.perf_counter() - started

    read()      # imports what it needs
    error, valid_peak, _ = read()
    assert error is None
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(NUM_DAMAGED):
            rng = np.random.default_rng([7, index])
            damage = pick(rng, [ANY_FILE[pick(rng, list(ANY_FILE))], change_number])
            path.write_bytes(damage(rng, valid))
            error, peak, seconds = read()
            assert error is None or error == one_line(error), (index, error)
            assert peak < valid_peak + 2**20 + 8 * len(valid), (index, peak, error)
            assert seconds < SECONDS, (index, seconds, error)
            outcomes["refused" if error else "read"] += 1
    assert min(outcomes.values()) > NUM_DAMAGED / 20, outcomes
