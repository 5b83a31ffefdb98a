"""The decoding kernels against the slow float64 implementation of training's (kernels_float64.py).

An error is relative and taken over a whole tensor: ||actual - expected|| / ||expected||.
"""
import numba
import numpy as np
import pytest

import kernels_cpu
import kernels_float64 as exact

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

def float32(inp, weight, bias, threads=2):
    out = unset(len(inp), len(weight))
    kernels_cpu.matvec_forward(out, inp, weight, bias, kernels_cpu.make_workspace(threads))
    return out


def quantized(weight):
    """A weight in int8, (numbers, scales), and its values in float64."""
    numbers = np.full(weight.shape, 99, dtype=np.int8)
    scales = unset(len(weight), -(-weight.shape[1] // QUANT_GROUP))
    kernels_cpu.quantize(numbers, scales, weight)
    return (numbers, scales), numbers * np.repeat(scales.astype(np.float64), QUANT_GROUP, axis=1)[:, :weight.shape[1]]


def int8(kernel):
    def product(inp, weight, bias, threads=2):
        out = unset(len(inp), len(weight))
        kernel(out, inp, *quantized(weight)[0], bias, kernels_cpu.make_workspace(threads))
        return out
    return product


PRODUCTS = {"float32": float32, "int8": int8(kernels_cpu.matvec_int8_forward),
            "int8 prefill": int8(kernels_cpu.matmul_int8_forward)}
# Rows that fill INPUT_ROWS or do not, and WEIGHT_ROWS; channels of no whole group, of one, of several with and without a rest.
SIZES = [(1, 1, 1), (2, 7, 5), (3, 63, 33), (4, 64, 16), (5, 65, 18), (1, 128, 64), (9, 200, 67), (13, 768, 40), (1, 768, 1000)]


@pytest.mark.parametrize("N, C, OC", SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_against_float64(name, N, C, OC, bias):
    inp, weight, bias = normal(N, C), normal(OC, C, seed=1), normal(OC) if bias else EMPTY
    exact_weight = weight if name == "float32" else quantized(weight)[1]
    assert_close(PRODUCTS[name](inp, weight, bias), exact.matmul_forward(inp, exact_weight, bias))


@pytest.mark.parametrize("name", PRODUCTS)
def test_same_bits_whatever_the_threads(name):
    inp, weight, bias = normal(5, 200), normal(67, 200), normal(67)
    expected = PRODUCTS[name](inp, weight, bias)
    threads = numba.get_num_threads()
    try:
        for count in (1, threads):
            numba.set_num_threads(count)
            for blocks in (1, 2, 3, 100):
                assert PRODUCTS[name](inp, weight, bias, blocks).tobytes() == expected.tobytes()
    finally:
        numba.set_num_threads(threads)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_row_does_not_depend_on_the_others(name):
    inp, weight, bias = normal(9, 200), normal(67, 200), normal(67)
    alone = np.concatenate([PRODUCTS[name](inp[n:n + 1], weight, bias) for n in range(len(inp))])
    for N in range(2, len(inp) + 1):
        assert PRODUCTS[name](inp[:N], weight, bias).tobytes() == alone[:N].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", [3, 70, 199])      # in the first group, in the second, in the rest
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_not_finite_comes_out(name, column, value):
    """In float32 infinity may come out as itself; a weight in int8 has no way to hold it, and becomes NaN."""
    inp, weight, bias = normal(5, 200), normal(67, 200), normal(67)
    spoilt = inp.copy()
    spoilt[2, column] = value
    out = PRODUCTS[name](spoilt, weight, bias)
    assert not np.isfinite(out[2]).any() and np.isfinite(np.delete(out, 2, axis=0)).all()
    spoilt = weight.copy()
    spoilt[30, column] = value
    out = PRODUCTS[name](inp, spoilt, bias)
    assert not np.isfinite(out[:, 30]).any() and np.isfinite(np.delete(out, 30, axis=1)).all()
    if name != "float32":
        assert np.isnan(out[:, 30]).all()


# Quantization

@pytest.mark.parametrize("C", [1, 64, 65, 200])
def test_quantized_weights_are_the_nearest(C):
    weight = normal(13, C)
    (numbers, scales), stood_for = quantized(weight)
    groups = [slice(start, start + QUANT_GROUP) for start in range(0, C, QUANT_GROUP)]
    for g, group in enumerate(groups):
        largest = np.abs(weight[:, group]).max(axis=1)
        np.testing.assert_allclose(scales[:, g], largest / 127, rtol=1e-6)
        assert (np.abs(numbers[:, group].astype(int)).max(axis=1) == 127).all()
    step = np.repeat(scales, QUANT_GROUP, axis=1)[:, :C]
    assert (np.abs(stood_for - weight) <= step * 0.50001).all()


def test_quantized_extremes():
    """Zeros, signs, and groups so small and so large that their scales are at the ends of float32."""
    weight = np.zeros((6, QUANT_GROUP), dtype=np.float32)
    weight[1, :3] = 1, -1, 0.5
    weight[2, :2] = 1e35, -3e34
    weight[3, :2] = 1e-30, -2e-30
    weight[4, 7] = np.nan
    weight[5, 0] = 1e-40
    (numbers, scales), stood_for = quantized(weight)
    assert not numbers[0].any() and scales[0] == 0
    assert numbers[1, :4].tolist() == [127, -127, 64, 0]
    np.testing.assert_allclose(stood_for[2:4], weight[2:4], atol=1e35 / 250, rtol=0.01)
    assert numbers[3, :2].tolist() == [64, -127] and np.isnan(scales[4])
    assert np.abs(stood_for[5]).max() <= 1e-36


# Embedding

def test_encoder_int8():
    wte, wpe, tokens = normal(7, 200), normal(3, 200, seed=1), np.array([[6, 0, 3], [3, 3, 1]], dtype=np.int32)
    weight, stood_for = quantized(wte)
    out = unset(6, 200)
    kernels_cpu.encoder_int8_forward(out, tokens, *weight, wpe)
    assert_close(out, exact.encoder_forward(tokens, stood_for, wpe))


# Attention

def attend(qkv, B, NH, parts, room=3):
    """Attention over qkv (B, T, 3C), given in parts of these lengths. The unused part of the cache is NaN."""
    T, C = qkv.shape[1], qkv.shape[2] // 3
    assert sum(parts) == T
    keys, values = unset(B, NH, T + room, C // NH), unset(B, NH, T + room, C // NH)
    outs, position = [], 0
    for part in parts:
        out, rows = unset(B * part, C), np.ascontiguousarray(qkv[:, position:position + part]).reshape(B * part, -1)
        kernels_cpu.attention_cached_forward(out, keys, values, rows, position)
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
