"""The decoding kernels against the slow float64 implementation of training's (kernels_float64.py).

An error is relative and taken over a whole tensor: ||actual - expected|| / ||expected||.
"""
import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

import kernels_cpu
import kernels_float64 as exact
from generate_gpt2 import BITS, rounded_weight

BOUND = 2e-6
EMPTY = np.empty(0, dtype=np.float32)
QUANT_GROUP = kernels_cpu.QUANT_GROUP


def unset(*shape):
    """An output that a kernel must overwrite."""
    return np.full(shape, np.nan, dtype=np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, dtype=np.float32)


def assert_close(actual, expected, bound=BOUND):
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= bound, f"relative error {error:.1e}, bound {bound:.0e}"


# Products

GGUF_KINDS = {"bfloat16": GGMLQuantizationType.BF16, "int8": GGMLQuantizationType.Q8_0, "int4": GGMLQuantizationType.Q4_0}


def stored(weight, kind):
    """A weight as an array of a kind, and its values in float64."""
    array = rounded_weight(weight, kind) if kind != "float32" else weight
    wide = dequantize(array.view(np.uint8), GGUF_KINDS[kind]) if kind != "float32" else weight
    return array, wide.astype(np.float64)


def product(kind, kernel=kernels_cpu.matvec_forward, dtype="float32"):
    def multiply(inp, weight, bias, threads=2):
        out = unset(len(inp), len(weight))
        kernel(out, inp, stored(weight, kind)[0], bias, kernels_cpu.make_workspace(threads, dtype))
        return out
    return multiply


PRODUCTS = {kind: product(kind) for kind in BITS}
PROMPT_PRODUCTS = {kind: product(kind, kernels_cpu.matmul_compact_forward) for kind in BITS}
# Rows that fill INPUT_ROWS or do not, and WEIGHT_ROWS; channels of one group, of several, with and without a rest.
SIZES = [(1, 1, 1), (2, 7, 5), (3, 63, 33), (4, 64, 16), (5, 65, 18), (1, 96, 3), (1, 128, 64), (9, 200, 67), (13, 768, 40),
         (1, 768, 1000)]


def works(kind, C):
    return BITS[kind] >= 16 or C % QUANT_GROUP == 0


@pytest.mark.parametrize("kind, N, C, OC", [(kind, *sizes) for kind in BITS for sizes in SIZES if works(kind, sizes[1])])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_product_against_float64(kind, N, C, OC, bias):
    inp, weight, bias = normal(N, C), normal(OC, C, seed=1), normal(OC) if bias else EMPTY
    _, wide = stored(weight, kind)
    rounded = exact.round_activations(inp) if BITS[kind] < 16 else inp
    assert_close(PRODUCTS[kind](inp, weight, bias), exact.matmul_forward(rounded, wide, bias))
    assert_close(PROMPT_PRODUCTS[kind](inp, weight, bias), exact.matmul_forward(inp, wide, bias))
    in_bfloat16 = product(kind, kernels_cpu.matmul_compact_forward, "bfloat16")(inp, weight, bias)
    assert_close(in_bfloat16, exact.matmul_forward_bfloat16(inp, wide, bias))


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("products", [PRODUCTS, PROMPT_PRODUCTS], ids=["decoding", "prompt"])
def test_same_bits_whatever_the_threads(kind, products):
    inp, weight, bias = normal(5, 224), normal(67, 224), normal(67)
    expected = products[kind](inp, weight, bias)
    threads = numba.get_num_threads()
    try:
        for count in (1, threads):
            numba.set_num_threads(count)
            for blocks in (1, 2, 3, 100):
                assert products[kind](inp, weight, bias, blocks).tobytes() == expected.tobytes()
    finally:
        numba.set_num_threads(threads)


@pytest.mark.parametrize("kind", BITS)
def test_a_row_does_not_depend_on_the_others(kind):
    inp, weight, bias = normal(9, 224), normal(67, 224), normal(67)
    alone = np.concatenate([PRODUCTS[kind](inp[n:n + 1], weight, bias) for n in range(len(inp))])
    for N in range(2, len(inp) + 1):
        assert PRODUCTS[kind](inp[:N], weight, bias).tobytes() == alone[:N].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [3, 70, 223])      # in the first group, in another, in the rest
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("products", [PRODUCTS, PROMPT_PRODUCTS], ids=["decoding", "prompt"])
def test_what_is_not_finite_comes_out(kind, products, column, value):
    """Integers have no way to hold infinity: it becomes NaN."""
    inp, weight, bias = normal(5, 224), normal(67, 224), normal(67)
    spoilt = inp.copy()
    spoilt[2, column] = value
    out = products[kind](spoilt, weight, bias)
    assert not np.isfinite(out[2]).any() and np.isfinite(np.delete(out, 2, axis=0)).all()
    spoilt = weight.copy()
    spoilt[30, column] = value
    out = products[kind](inp, spoilt, bias)
    assert not np.isfinite(out[:, 30]).any() and np.isfinite(np.delete(out, 30, axis=1)).all()
    if BITS[kind] < 16:
        assert np.isnan(out[:, 30]).all()


def test_activations_of_all_sizes_against_integers():
    """Groups of zeros, and of numbers that float32 can hardly hold. Zeros are exact."""
    inp = np.repeat(10.0 ** np.array([[0, -45, -38, -20, 20, 37, -33, -34]]), QUANT_GROUP, axis=1) * normal(1, 256)
    inp = np.concatenate([inp, np.zeros((1, 256))]).astype(np.float32)
    for g in range(8):
        group = np.zeros_like(inp)
        group[:, g * QUANT_GROUP:(g + 1) * QUANT_GROUP] = inp[:, g * QUANT_GROUP:(g + 1) * QUANT_GROUP]
        out = PRODUCTS["int8"](group, normal(9, 256, seed=1), EMPTY)
        expected = exact.matmul_forward(exact.round_activations(group), stored(normal(9, 256, seed=1), "int8")[1], EMPTY)
        assert not out[1].any() and np.linalg.norm(out - expected) <= BOUND * np.linalg.norm(expected) + 1e-37


# Rounding weights

@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_weights_are_rounded_as_gguf_does(kind):
    """Bit for bit, so that a file that holds such weights is used as it is, and exporting rounds once."""
    weight = 0.1 * normal(333, 96) * 10.0 ** np.linspace(-12, 4, 333, dtype=np.float32)[:, None]
    weight[0] = 0
    weight[1, :5] = 1, -1, 0.5, 0.25, 127
    weight[2] = np.linspace(-127, 127, 96) / 2      # halves
    weight[3, :4] = -8, 8, 7.5, -0.5
    weight[4] = -0.0
    assert stored(weight, kind)[0].view(np.uint8).tobytes() == gguf_quantize(weight, GGUF_KINDS[kind]).tobytes()


def test_rows_that_are_no_whole_groups_stay_float32():
    weight = normal(5, 33)
    assert rounded_weight(weight, "int8").tobytes() == rounded_weight(weight, "int4").tobytes() == weight.tobytes()
    assert rounded_weight(weight, "bfloat16").dtype == np.uint16


# Embedding

@pytest.mark.parametrize("kind", BITS)
def test_encoder_compact(kind):
    wte, wpe, tokens = normal(7, 224), normal(3, 224, seed=1), np.array([[6, 0, 3], [3, 3, 1]], dtype=np.int32)
    weight, wide = stored(wte, kind)
    out = unset(6, 224)
    kernels_cpu.encoder_compact_forward(out, tokens, weight, wpe)
    assert_close(out, exact.encoder_forward(tokens, wide, wpe))


# Attention

def attend(qkv, B, NH, parts, room=3):
    """Attention over qkv (B, T, 3C), given in parts of these lengths. The unused part of the cache is NaN."""
    T, C = qkv.shape[1], qkv.shape[2] // 3
    assert sum(parts) == T
    keys, values = unset(B, NH, T + room, C // NH), unset(B, NH, T + room, C // NH)
    outs, position = [], 0
    for part in parts:
        out, rows = unset(B * part, C), np.ascontiguousarray(qkv[:, position:position + part]).reshape(B * part, -1)
        kernels_cpu.attention_cached_forward(out, keys, values, rows, position, kernels_cpu.make_workspace(2))
        outs.append(out.reshape(B, part, C))
        position += part
    assert np.isnan(keys[:, :, T:]).all() and np.isnan(values[:, :, T:]).all()
    return np.concatenate(outs, axis=1)


@pytest.mark.parametrize("B, T, NH, HS, parts", [
    (1, 1, 1, 1, [1]), (2, 3, 1, 7, [1, 1, 1]), (1, 13, 3, 12, [5, 1, 7]), (3, 13, 2, 5, [12, 1]),
    (1, 300, 2, 64, [300]), (1, 300, 2, 64, [129, 1, 1, 169]), (2, 40, 3, 16, [1] * 40)])
def test_attention_in_parts_against_float64(B, T, NH, HS, parts):
    """Numbers twice as large as normal ones make some rows attend to one position and others to many."""
    qkv = 2 * normal(B, T, 3 * NH * HS)
    expected, _ = exact.attention_forward(qkv.reshape(B * T, -1), B, T, NH)
    assert_close(attend(qkv, B, NH, parts), expected.reshape(B, T, -1))


def test_attention_with_large_scores():
    """Scores of several hundred: exp would overflow if the largest were not subtracted first."""
    qkv = 10 * normal(1, 20, 36 * 3)
    expected, _ = exact.attention_forward(qkv[0], 1, 20, 3)
    assert_close(attend(qkv, 1, 3, [9, 1, 10]), expected[None], 1e-5)


@pytest.mark.parametrize("parts", [[20], [9, 11], [9] + [1] * 11])
def test_nan_comes_out_of_attention_from_its_position_on(parts):
    """And perhaps, where it is a value, before: 0 times NaN is NaN. Never in another head or sequence."""
    B, T, NH, C = 2, 20, 3, 36
    for column in (1, C + 1, 2 * C + 1):     # in the query, key or value of head 0
        qkv = normal(B, T, 3 * C)
        qkv[1, 10, column] = np.nan
        nan = np.isnan(attend(qkv, B, NH, parts)).reshape(B, T, NH, -1).any(axis=-1)
        assert nan[1, 10:11 if column == 1 else T, 0].all()
        nan[1, :, 0] = False
        assert not nan.any()


def test_sequences_and_heads_do_not_mix():
    """A sequence has the same output alone and in a batch, bit for bit, and so has a head."""
    B, T, NH, HS = 3, 20, 4, 9
    qkv = normal(B, T, 3 * NH * HS)
    together = attend(qkv, B, NH, [13, 1, 6])
    for b in range(B):
        assert attend(qkv[b:b + 1], 1, NH, [13, 1, 6])[0].tobytes() == together[b].tobytes()
        for h in range(NH):
            head = qkv.reshape(B, T, 3, NH, HS)[b:b + 1, :, :, h].reshape(1, T, 3 * HS)
            assert attend(head, 1, 1, [13, 1, 6])[0].tobytes() == together[b][:, h * HS:(h + 1) * HS].tobytes()
