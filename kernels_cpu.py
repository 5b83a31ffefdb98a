"""The layers of GPT-2 on the CPU: every forward and backward pass written out by hand, compiled by Numba.

New here? dev/tests/kernels_float64.py has the same layers as plain, slow NumPy: read it first.

Contents
    Building blocks                     exp, maximum and softmax, which vectorize
    Encoder                             encoder_forward, encoder_backward
    Layer normalization                 layernorm_forward, layernorm_backward
    Root mean square normalization      rmsnorm_forward, rmsnorm_backward (Llama)
    Matrix product                      matmul_forward, matmul_backward, matvec_forward (sgemm is in matmul_cpu.py)
    Rotary position embedding           rope, its own backward (Llama)
    Attention                           attention_forward, attention_backward, attention_cached_forward (KV cache)
    GELU                                gelu_forward, gelu_backward; gelu_exact_forward, gelu_exact_backward
    SwiGLU                              swiglu_forward, swiglu_backward (Llama)
    Residual connection                 residual_forward
    Softmax and cross-entropy           fused_classifier
    Optimizer                           global_norm, adamw_update
    Decoding                            the kernels for one token at a time; weights of 16, 8 or 4 bits
    Compiling                           threads, and Numba's cache

How to read a kernel
    Argument order: outputs, saved statistics, inputs, weights, dimensions. In a backward pass, dout, the gradient it starts
    from, comes before the saved statistics. `dx` is the gradient of the loss with respect to `x`, and has the shape
    of `x`. Each backward stands right under its forward.
    A docstring gives shapes, the formula, why it holds, what the backward pass needs, and the cost. The pages it names,
    in dev/derivations/, derive every gradient step by step, with an example to check by hand.

Shapes
    B sequences, T positions, N = B*T rows (one per token), C channels, NH heads of HS = C/NH channels, OC output channels,
    V tokens in the vocabulary, Vp rows in the padded token table, maxT in the position table. Arrays are float32 and
    C-contiguous; token ids are int32.

Accumulate or overwrite
    Gradients of weights accumulate (+=): over micro-batches, and over both uses of `wte`. Gradients of activations are
    overwritten (=). The exceptions are `layernorm_backward` and `rmsnorm_backward`, which add to the gradient that already
    flows down the residual stream.

Costs
    FLOPs count additions, multiplications, divisions, comparisons and square roots; an exponential counts as 20. Bytes are
    those that have to move between memory and processor, each array once for reading and once for writing. A kernel is
    memory-bound below about 13 FLOPs per byte, the FLOP rate of two cores over their memory bandwidth.

Threads
    There is one thread pool, Numba's: a threaded BLAS would compete with it. Each thread computes its own block of a matrix
    product. No two threads ever add to the same number, and every sum runs in a fixed order that does not depend on the
    number of threads, so the same input gives the same bits.
"""
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import numpy as np
from numba import config, njit, prange, set_num_threads

from cli import UserError
from machine import usable_cores
from matmul_cpu import (BLOCK_COLUMNS, FASTMATH, SCRATCH, WORDS, as_factor, bfloat16_bits, ceil_div, helper, in_large_pages,
                        jit, sgemm)
from matvec_cpu import QUANT_GROUP, factor, multiply_few_rows, round_group, widen

kernel = jit(parallel=True, fastmath=FASTMATH)

NO_BIAS = np.empty(0, dtype=np.float32)     # for a matrix product without bias
NO_POSITIONS = np.empty((0, 0), dtype=np.float32)       # wpe of a Llama, whose rotations take its place
CLASSIFIER_ROWS = 512                       # rows of logits that exist at any one time: 512 * 50304 * 4 bytes = 103 MB
LAYERNORM_EPSILON = np.float32(1e-5)
GELU_SCALE = np.float32(np.sqrt(2 / np.pi))
GELU_CUBIC = np.float32(0.044715)
QUERY_TILE = 128    # rows of the attention matrix that a thread has in memory at a time
MAX_LANES = 64      # running maxima in row_max
COLUMN_BLOCK = 64   # channels per block in a sum over tokens


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks

@helper
def partition(part, parts, length):
    """[start, stop) of piece `part` of `parts` of a row, cut at multiples of 16 numbers (a cache line)."""
    lines = ceil_div(length, 16)
    return min(lines * part // parts * 16, length), min(lines * (part + 1) // parts * 16, length)


@helper
def add_to(total, term):
    """total += term, for two 1-D views of the same length."""
    for i in range(total.size):
        total[i] += term[i]


@helper
def dot(a, b):
    """The sum of a * b, for two 1-D views of the same length."""
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@helper
def add_scaled(total, factor, term):
    """total += factor * term, for two 1-D views of the same length."""
    for i in range(total.size):
        total[i] += factor * term[i]


@njit(inline="always", fastmath=FASTMATH)
def exp(x):
    """e**x to 3e-7 relative, in arithmetic that vectorizes (Numba would call the C library once per element).

    x = n*ln(2) + r with |r| <= ln(2)/2, so e**x = 2**n * e**r: a polynomial (coefficients of Cephes' expf) times a
    power of two made by writing n into a float's exponent bits. ln(2) is in two parts, to keep r exact. Below -87 the answer
    is 0 and above 88 infinity, because n would not fit. The comparisons are written so that NaN passes through.
    """
    y = np.float32(88) if x > np.float32(88) else (np.float32(-87) if x < np.float32(-87) else x)
    n = np.floor(y * np.float32(1.44269504088896341) + np.float32(0.5))
    r = y - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < np.float32(-87) else (np.float32(np.inf) if x > np.float32(88) else p * power)


@helper
def row_max(row):
    """The largest element. It may miss a NaN: harmless, since the sum in softmax is NaN all the same.

    A loop with a single maximum would not vectorize, since floating-point maxima may not be reordered when a NaN is
    possible. MAX_LANES running maxima side by side fill vector registers without any reordering.
    """
    largest = row[0]
    lanes = np.full(MAX_LANES, largest)
    whole = row.size // MAX_LANES * MAX_LANES
    for start in range(0, whole, MAX_LANES):
        part = row[start:start + MAX_LANES]
        for i in range(MAX_LANES):
            lanes[i] = part[i] if part[i] > lanes[i] else lanes[i]
    for i in range(MAX_LANES):
        largest = lanes[i] if lanes[i] > largest else largest
    for i in range(whole, row.size):
        largest = row[i] if row[i] > largest else largest
    return largest


@helper
def softmax(row):
    """row = exp(row) / sum(exp(row)). Returns log(sum(exp(row)))."""
    largest = row_max(row)
    total = np.float32(0)
    for j in range(row.size):
        row[j] = exp(row[j] - largest)
        total += row[j]
    factor = np.float32(1) / total
    for j in range(row.size):
        row[j] *= factor
    return largest + np.log(total)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder: token and position embedding

@kernel
def encoder_forward(out, tokens, wte, wpe):
    """out (N, C) = wte[token] + wpe[position], for tokens (B, T), wte (Vp, C) and wpe (maxT, C); empty: only wte[token].

    Backward needs tokens.
    Cost: N*C FLOPs, 4*(2*N*C + T*C) bytes: memory-bound. Derived in dev/derivations/encoder.md.
    """
    B, T = tokens.shape
    for n in prange(B * T):
        b, t = n // T, n % T
        token = tokens[b, t]
        for c in range(out.shape[1]):
            out[n, c] = wte[token, c]
        if wpe.size > 0:
            add_to(out[n], wpe[t])


@kernel
def encoder_backward(dwte, dwpe, dout, tokens):
    """dwte[token] += dout and dwpe[position] += dout, for every row of dout (N, C); dwte (Vp, C), dwpe (maxT, C) or empty.

    A token can occur many times, so threads that split the rows would race. They split the channels.

    Cost: 2*N*C FLOPs, 4*(3*N*C + 2*T*C) bytes: memory-bound. Derived in dev/derivations/encoder.md.
    """
    B, T = tokens.shape
    C = dout.shape[1]
    for block in prange(ceil_div(C, COLUMN_BLOCK)):
        columns = slice(block * COLUMN_BLOCK, min((block + 1) * COLUMN_BLOCK, C))
        for n in range(B * T):
            b, t = n // T, n % T
            add_to(dwte[tokens[b, t], columns], dout[n, columns])
            if dwpe.size > 0:
                add_to(dwpe[t, columns], dout[n, columns])


# ----------------------------------------------------------------------------------------------------------------------
# Layer normalization (Ba, Kiros and Hinton 2016)

@kernel
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out (N, C): each row of inp (N, C) normalized to mean 0 and variance 1, then the learned weight and bias (C).

        norm = (inp - mean) * rstd          rstd = 1 / sqrt(variance + 1e-5)
        out  = norm * weight + bias

    Backward needs inp, and mean (N) and rstd (N), which are saved: with them it recomputes norm without another reduction.
    Cost: 8*N*C FLOPs, 8*N*C bytes: memory-bound. Derived in dev/derivations/layernorm.md.
    """
    N, C = inp.shape
    for n in prange(N):
        total = np.float32(0)
        for c in range(C):
            total += inp[n, c]
        m = total / np.float32(C)
        squares = np.float32(0)
        for c in range(C):
            squares += (inp[n, c] - m) * (inp[n, c] - m)
        r = np.float32(1) / np.sqrt(squares / np.float32(C) + LAYERNORM_EPSILON)
        for c in range(C):
            out[n, c] = (inp[n, c] - m) * r * weight[c] + bias[c]
        mean[n] = m
        rstd[n] = r


@kernel
def layernorm_backward(dinp, dweight, dbias, dout, mean, rstd, inp, weight):
    """dinp (N, C) += the gradient through the normalization; dweight (C) and dbias (C) += sums over the rows.

        dweight = sum_n(dout * norm)        dbias = sum_n(dout)        norm = (inp - mean) * rstd

    With dnorm = dout * weight, one element of inp (N, C) acts on the loss in three ways: directly, through the row's mean,
    and through the row's rstd. From dmean/dinp = 1/C and drstd/dinp = -rstd**2 * norm / C, and with inp - mean = norm / rstd,
    the three terms are

        dinp = rstd * (dnorm - mean_c(dnorm) - norm * mean_c(dnorm * norm))

    where mean_c is the mean over a row's channels. That is dnorm without its components along the two directions that the
    normalization removed: the constant and norm.

    Cost: 19*N*C FLOPs, 16*N*C bytes: memory-bound. Derived in dev/derivations/layernorm.md.
    """
    N, C = inp.shape
    for n in prange(N):
        m, r = mean[n], rstd[n]
        dnorm_sum = np.float32(0)
        dnorm_norm_sum = np.float32(0)
        for c in range(C):
            dnorm = dout[n, c] * weight[c]
            dnorm_sum += dnorm
            dnorm_norm_sum += dnorm * (inp[n, c] - m) * r
        dnorm_mean = dnorm_sum / np.float32(C)
        dnorm_norm_mean = dnorm_norm_sum / np.float32(C)
        for c in range(C):
            norm = (inp[n, c] - m) * r
            dinp[n, c] += r * (dout[n, c] * weight[c] - dnorm_mean - norm * dnorm_norm_mean)
    for block in prange(ceil_div(C, COLUMN_BLOCK)):
        columns = slice(block * COLUMN_BLOCK, min((block + 1) * COLUMN_BLOCK, C))
        dw, db = dweight[columns], dbias[columns]
        for n in range(N):
            m, r = mean[n], rstd[n]
            do, x = dout[n, columns], inp[n, columns]
            for c in range(dw.size):
                dw[c] += do[c] * (x[c] - m) * r
                db[c] += do[c]


# ----------------------------------------------------------------------------------------------------------------------
# Root mean square normalization (Zhang and Sennrich 2019): Llama's

@kernel
def rmsnorm_forward(out, rstd, inp, weight, epsilon):
    """out (N, C): each row of inp (N, C) scaled to a mean square of 1, then by the learned weight (C).

        norm = inp * rstd                   rstd = 1 / sqrt(mean_c(inp**2) + epsilon)
        out  = norm * weight

    It is layer normalization without the shift to mean 0 and without bias.

    Backward needs inp, and rstd (N), which is saved.
    Cost: 4*N*C FLOPs, 8*N*C bytes: memory-bound. Derived in dev/derivations/rmsnorm.md.
    """
    N, C = inp.shape
    for n in prange(N):
        squares = np.float32(0)
        for c in range(C):
            squares += inp[n, c] * inp[n, c]
        r = np.float32(1) / np.sqrt(squares / np.float32(C) + np.float32(epsilon))
        for c in range(C):
            out[n, c] = inp[n, c] * r * weight[c]
        rstd[n] = r


@kernel
def rmsnorm_backward(dinp, dweight, dout, rstd, inp, weight):
    """dinp (N, C) += the gradient through the normalization; dweight (C) += a sum over the rows.

        dweight = sum_n(dout * norm)        norm = inp * rstd

    With dnorm = dout * weight, one element of inp acts on the loss directly and through the row's rstd. From
    drstd/dinp = -rstd**2 * norm / C the two terms are

        dinp = rstd * (dnorm - norm * mean_c(dnorm * norm))

    where mean_c is the mean over a row's channels: dnorm without its component along norm, the direction that the
    normalization removed.

    Cost: 13*N*C FLOPs, 16*N*C bytes: memory-bound. Derived in dev/derivations/rmsnorm.md.
    """
    N, C = inp.shape
    for n in prange(N):
        r = rstd[n]
        dnorm_norm_sum = np.float32(0)
        for c in range(C):
            dnorm_norm_sum += dout[n, c] * weight[c] * inp[n, c] * r
        dnorm_norm_mean = dnorm_norm_sum / np.float32(C)
        for c in range(C):
            dinp[n, c] += r * (dout[n, c] * weight[c] - inp[n, c] * r * dnorm_norm_mean)
    for block in prange(ceil_div(C, COLUMN_BLOCK)):
        columns = slice(block * COLUMN_BLOCK, min((block + 1) * COLUMN_BLOCK, C))
        dw = dweight[columns]
        for n in range(N):
            r, do, x = rstd[n], dout[n, columns], inp[n, columns]
            for c in range(dw.size):
                dw[c] += do[c] * x[c] * r


# ----------------------------------------------------------------------------------------------------------------------
# Matrix product: the linear layers, and the logits

def make_workspace(threads, dtype="float32"):
    """Scratch memory for matrix products, (threads, SCRATCH): a row for each thread.

    It decides in which dtype, one of DTYPES, the kernels that get it multiply.
    """
    return in_large_pages((threads, SCRATCH), WORDS[dtype])


@kernel
def matmul_forward(out, inp, weight, bias, workspace):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC). An empty bias array means there is none.

    Most of the time is spent here and in matmul_backward. Each thread owns a block of output columns, so each row of
    the weight is read once, by one thread. workspace is what `make_workspace` returns: a row of scratch memory for each
    thread, which decides whether the factors are float32 or bfloat16.

    Backward needs inp and weight.
    Cost: 2*N*C*OC FLOPs, 4*(N*C + OC*C + N*OC) bytes: compute-bound. Derived in dev/derivations/matmul.md.
    """
    N, OC = out.shape
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, OC)
        if start < stop:
            if bias.size > 0:
                for n in range(N):
                    out[n, start:stop] = bias[start:stop]
            # sgemm(c, alpha, a, b, beta, scratch): c = alpha * a @ b + beta * c
            sgemm(out[:, start:stop], 1.0, inp, weight[start:stop].T, 1.0 if bias.size > 0 else 0.0, workspace[thread])


@kernel
def matmul_backward(dinp, dweight, dbias, dout, inp, weight, workspace):
    """dinp (N, C) = dout @ weight; dweight (OC, C) += dout.T @ inp; dbias (OC) += sum of dout (N, OC) over its rows.

    From out[n, o] = sum_c inp[n, c] * weight[o, c] + bias[o]: inp[n, c] reaches the loss through every o; weight[o, c]
    and bias[o], through every n. Each thread owns a block of columns of dinp and a block of rows of dweight.

    Cost: 4*N*C*OC FLOPs, 4*(2*N*C + 3*OC*C + N*OC) bytes: compute-bound. Derived in dev/derivations/matmul.md.
    """
    N, OC = dout.shape
    C = inp.shape[1]
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, C)
        if start < stop:
            sgemm(dinp[:, start:stop], 1.0, dout, weight[:, start:stop], 0.0, workspace[thread])
        start, stop = partition(thread, threads, OC)
        if start < stop:
            sgemm(dweight[start:stop], 1.0, dout[:, start:stop].T, inp, 1.0, workspace[thread])
            if dbias.size > 0:
                for n in range(N):
                    add_to(dbias[start:stop], dout[n, start:stop])


@kernel
def matvec_forward(out, inp, weight, bias, workspace):
    """matmul_forward for an inp (N, C) of few rows, where all the time goes into reading the weight (OC, C) once.

    The weight may have any format of matvec_cpu.py. Each row of it is multiplied with all rows of inp while it is in cache,
    and nothing is copied. The bits of a row of out do not depend on how many rows there are.

    Cost: 2*N*C*OC FLOPs, 4*(N*C + OC*C + N*OC) bytes: memory-bound. See dev/derivations/matmul.md.
    """
    rounded = factor(inp, weight)
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, len(weight))
        multiply_few_rows(out[:, start:stop], inp, rounded, weight[start:stop], bias[start:stop])


# ----------------------------------------------------------------------------------------------------------------------
# Rotary position embedding (Su et al. 2021): Llama's

@kernel
def rope(rows, cos, sin, heads, T, position, sign):
    """Rotate the first `heads` heads of each row of rows (N, ...) by the angles of its position, in place.

    cos and sin (maxT, HS/2) have the angle of each position and pair of channels. Row n is at position + n % T. A head of HS
    channels is HS/2 pairs, channels i and HS/2 + i, each rotated as a vector in the plane:

        x[i], x[HS/2 + i] = x[i] * cos - x[HS/2 + i] * sin,  x[i] * sin + x[HS/2 + i] * cos

    sign is 1, or -1 to rotate back. A rotation is orthogonal, so the gradient passes through its transpose, the rotation by
    the opposite angle: this kernel with sign = -1 is its own backward pass, and needs nothing saved.

    Cost: 3.5*N*heads*HS FLOPs, 4*(2*N*heads*HS + T*HS) bytes: memory-bound. Derived in dev/derivations/rope.md.
    """
    half = cos.shape[1]
    for n in prange(len(rows)):
        t = position + n % T
        for head in range(heads):
            start = 2 * half * head
            first, second = rows[n, start:start + half], rows[n, start + half:start + 2 * half]
            for i in range(half):
                c, s = cos[t, i], np.float32(sign) * sin[t, i]
                x, y = first[i], second[i]
                first[i] = x * c - y * s
                second[i] = x * s + y * c


# ----------------------------------------------------------------------------------------------------------------------
# Attention: causal, multi-head, without a (T, T) tensor, as FlashAttention does it (Dao et al. 2022)

@helper
def one_head(rows, b, T, h, HS):
    """The (T, HS) view of head h in sequence b. qkv has NH heads of q, then KV of k, then KV of v."""
    return rows[b * T:(b + 1) * T, h * HS:(h + 1) * HS]


@helper
def count_key_heads(qkv, NH, HS):
    """KV, the number of key heads, from the number of columns of qkv (N, (NH + 2*KV)*HS)."""
    return (qkv.shape[1] // HS - NH) // 2


@helper
def attend(out, lse, q, k, v, position, scratch):
    """One head of attention_forward: out (T, HS) and lse (T) from q (T, HS), k and v (position + T, HS).

    The T queries are at positions `position` to position + T - 1.
    """
    T, HS = q.shape
    buffer = np.empty(min(QUERY_TILE, T) * len(k), dtype=np.float32)
    for start in range(0, T, QUERY_TILE):
        stop = min(start + QUERY_TILE, T)
        end = position + stop
        p = buffer[:(stop - start) * end].reshape(stop - start, end)
        sgemm(p, 1.0 / np.sqrt(HS), q[start:stop], k[:end].T, 0.0, scratch)
        for i in range(stop - start):
            visible = position + start + i + 1
            lse[start + i] = softmax(p[i, :visible])
            p[i, visible:] = 0
        sgemm(out[start:stop], 1.0, p, v[:end], 0.0, scratch)


@kernel
def attention_forward(out, lse, qkv, workspace):
    """out (N, C): at each position, the softmax-weighted mean of the values up to and including its own.

        score[i, j] = q[i] . k[j] / sqrt(HS)   for j <= i
        p[i, j]     = exp(score[i, j] - lse[i])                lse[i] = log(sum_j exp(score[i, j]))
        out[i]      = sum_j p[i, j] * v[j]

    in each sequence and head, i and j being positions. qkv (N, 3C) holds queries, keys and values side by side, each with its
    heads side by side. The scores exist for one tile of queries at a time. Keys after the tile's last query
    are not scored; for other masked keys, p is set to zero.

    Grouped-query attention (Ainslie et al. 2023): with (NH + 2*KV)*HS columns, qkv has KV heads of keys and values, a divisor
    of NH. Query head h reads key head h // (NH / KV). GPT-2 has KV = NH. See dev/derivations/grouped_query.md.

    Backward needs qkv, out, and lse (B, NH, T), the log-sum-exp of each row, which is saved: one number per row is all it
    takes to recompute p.
    Cost: (4*HS + 24)*P FLOPs for P = B*NH*T*(T + 1)/2 pairs of a query and a key it sees, 4*(2*N*(NH + KV)*HS + NH*N) bytes:
    compute-bound. Derived in dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    HS = out.shape[1] // NH
    KV = count_key_heads(qkv, NH, HS)
    threads = len(workspace)
    for thread in prange(threads):
        for head in range(thread, B * NH, threads):
            b, h = head // NH, head % NH
            kv = h // (NH // KV)
            q, k, v = one_head(qkv, b, T, h, HS), one_head(qkv, b, T, NH + kv, HS), one_head(qkv, b, T, NH + KV + kv, HS)
            attend(one_head(out, b, T, h, HS), lse[b, h], q, k, v, 0, workspace[thread])


@kernel
def attention_backward(dqkv, dout, out, lse, qkv, workspace):
    """dqkv, of the shape of qkv, from dout (N, C), tile by tile, with p recomputed from lse.

    out = p @ v gives                        dv[j] = sum_i p[i, j] * dout[i]      dp[i, j] = dout[i] . v[j]
    The softmax of a row gives               dscore[i, j] = p[i, j] * (dp[i, j] - delta[i])
    with delta[i] = sum_k p[i, k] * dp[i, k], because score[i, j] also changes each p[i, k], by -p[i, k] * p[i, j],
    through lse[i]. That sum is dout[i] . out[i]: since `out` is saved, one pass is enough.
    score = q @ k.T / sqrt(HS) gives         dq[i] = sum_j dscore[i, j] * k[j] / sqrt(HS)
                                             dk[j] = sum_i dscore[i, j] * q[i] / sqrt(HS)

    dk and dv sum over tiles, and over the query heads that read the key head. The last tile sees all keys, so that of the first
    query head goes first and overwrites (beta = 0); the others add (beta = 1). One thread computes all query heads of a key
    head, so every sum has one writer.

    Cost: (10*HS + 23)*P + 2*N*C FLOPs for P = B*NH*T*(T + 1)/2 pairs, 4*(4*N*(NH + KV)*HS + NH*N) bytes: compute-bound.
    Derived in dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    HS = out.shape[1] // NH
    KV = count_key_heads(qkv, NH, HS)
    scale, group = 1.0 / np.sqrt(HS), NH // KV
    threads = len(workspace)
    for thread in prange(threads):
        scratch = workspace[thread]
        for head in range(thread * group, B * NH, threads * group):
            for h in range(head % NH, head % NH + group):
                b, kv = head // NH, h // group
                q, k, v = one_head(qkv, b, T, h, HS), one_head(qkv, b, T, NH + kv, HS), one_head(qkv, b, T, NH + KV + kv, HS)
                dq, dk, dv = (one_head(dqkv, b, T, h, HS), one_head(dqkv, b, T, NH + kv, HS),
                              one_head(dqkv, b, T, NH + KV + kv, HS))
                o, do = one_head(out, b, T, h, HS), one_head(dout, b, T, h, HS)
                buffer = np.empty(2 * min(QUERY_TILE, T) * T, dtype=np.float32)
                tiles = ceil_div(T, QUERY_TILE)
                for tile in range(tiles - 1, -1, -1):
                    start, stop = tile * QUERY_TILE, min((tile + 1) * QUERY_TILE, T)
                    size = (stop - start) * stop
                    p = buffer[:size].reshape(stop - start, stop)
                    dscore = buffer[size:2 * size].reshape(stop - start, stop)
                    sgemm(p, scale, q[start:stop], k[:stop].T, 0.0, scratch)
                    sgemm(dscore, 1.0, do[start:stop], v[:stop].T, 0.0, scratch)
                    for i in range(stop - start):
                        visible = start + i + 1
                        row_lse = lse[b, h, start + i]
                        delta = np.float32(0)
                        for c in range(HS):
                            delta += as_factor(do[start + i, c], scratch) * o[start + i, c]
                        row, drow = p[i, :visible], dscore[i, :visible]
                        for j in range(visible):
                            row[j] = exp(row[j] - row_lse)
                            drow[j] = row[j] * (drow[j] - delta)
                        p[i, visible:] = 0
                        dscore[i, visible:] = 0
                    beta = 0.0 if tile == tiles - 1 and h == head % NH else 1.0
                    sgemm(dv[:stop], 1.0, p.T, do[start:stop], beta, scratch)
                    sgemm(dk[:stop], scale, dscore.T, q[start:stop], beta, scratch)
                    sgemm(dq[start:stop], scale, dscore, k[:stop], 0.0, scratch)


@kernel
def attention_cached_forward(out, keys, values, qkv, position, workspace):
    """attention_forward for T tokens that follow `position` others, with a KV cache.

    keys and values (B, KV, maxT, HS) are the cache, filled up to `position`; those of the T tokens in qkv, (B*T, 3C) or with
    fewer key heads as in attention_forward, are appended. Every query sees all positions up to its own. A single query needs no
    matrix product: it reads the cache in place, and its own key and value from qkv, so that heads that share them need not
    wait for each other.

    Cost of a single query: (4*HS + 24)*P FLOPs for P = B*NH*(position + 1) keys, 8*HS*B*(KV*(position + 1) + NH) bytes:
    memory-bound. See dev/derivations/attention.md.
    """
    B, KV, _, HS = keys.shape
    NH = out.shape[1] // HS
    T, group = out.shape[0] // B, NH // KV
    scale = np.float32(1 / np.sqrt(HS))
    threads = len(workspace)
    if T > 1:
        for head in prange(B * KV):
            b, kv = head // KV, head % KV
            keys[b, kv, position:position + T] = one_head(qkv, b, T, NH + kv, HS)
            values[b, kv, position:position + T] = one_head(qkv, b, T, NH + KV + kv, HS)
    for thread in prange(threads):
        for head in range(thread, B * NH, threads):
            b, h = head // NH, head % NH
            kv = h // group
            k, v = keys[b, kv, :position + T], values[b, kv, :position + T]
            if T > 1:
                lse = np.empty(T, dtype=np.float32)
                attend(one_head(out, b, T, h, HS), lse, one_head(qkv, b, T, h, HS), k, v, position, workspace[thread])
            else:
                p = np.empty(position + 1, dtype=np.float32)
                query, average = qkv[b, h * HS:(h + 1) * HS], out[b, h * HS:(h + 1) * HS]    # contiguous
                own_key = qkv[b, (NH + kv) * HS:(NH + kv + 1) * HS]
                own_value = qkv[b, (NH + KV + kv) * HS:(NH + KV + kv + 1) * HS]
                for j in range(position):
                    p[j] = scale * dot(query, k[j])
                p[position] = scale * dot(query, own_key)
                softmax(p)
                average[:] = 0
                for j in range(position):
                    add_scaled(average, p[j], v[j])
                add_scaled(average, p[position], own_value)
                if h % group == 0:
                    keys[b, kv, position] = own_key
                    values[b, kv, position] = own_value


# ----------------------------------------------------------------------------------------------------------------------
# GELU, the tanh approximation GPT-2 was trained with (Hendrycks and Gimpel 2016)

@kernel
def gelu_forward(out, inp):
    """out = x * (1 + tanh(u)) / 2 with u = sqrt(2/pi) * (x + 0.044715 x**3), for every x of inp (N, C).

    Since (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) = s, this is x * s: one exponential and no cancellation for x << 0.

    Backward needs inp, from which it computes s again.
    Cost: 28*N*C FLOPs, 8*N*C bytes: memory-bound. Derived in dev/derivations/gelu.md.
    """
    N, C = inp.shape
    for n in prange(N):
        for c in range(C):
            x = inp[n, c]
            u = GELU_SCALE * (x + GELU_CUBIC * x * x * x)
            out[n, c] = x / (np.float32(1) + exp(np.float32(-2) * u))


@kernel
def gelu_backward(dinp, dout, inp):
    """dinp = dout * (s + x * s * (1 - s) * 2u') with u' = sqrt(2/pi) * (1 + 3 * 0.044715 x**2), all of shape (N, C).

    The product rule on x * s (see gelu_forward). s is logistic in 2u, so ds/du = 2 s (1 - s). dinp may be dout itself.

    Cost: 39*N*C FLOPs, 12*N*C bytes: memory-bound. Derived in dev/derivations/gelu.md.
    """
    N, C = inp.shape
    for n in prange(N):
        for c in range(C):
            x = inp[n, c]
            u = GELU_SCALE * (x + GELU_CUBIC * x * x * x)
            s = np.float32(1) / (np.float32(1) + exp(np.float32(-2) * u))
            slope = GELU_SCALE * (np.float32(1) + np.float32(3) * GELU_CUBIC * x * x)
            dinp[n, c] = dout[n, c] * (s + x * s * (np.float32(1) - s) * np.float32(2) * slope)


# ----------------------------------------------------------------------------------------------------------------------
# GELU itself, for models that were trained with it, such as nanoGPT's since 2023 and Cerebras-GPT

@njit(inline="always", fastmath=FASTMATH)
def normal_distribution(x):
    """Phi(x) and phi(x): the probability that a standard normal number is below x, and the density at x.

    The tail Phi(-|x|) is phi(x) times a ratio (Mills') that falls only like 1/|x|: a polynomial in t = 1 / (1 + 0.35 |x|), in
    the form of Abramowitz and Stegun 26.2.17 (Hastings 1955), with coefficients fitted in dev/derivations/gelu.md. Its relative
    error is 6e-8. With rounding, that of Phi is below 1e-6 down to x = -5, then grows with the exponent, to 6e-6 at -13; below,
    the result is 0. The comparison is written so that NaN passes through.
    """
    density = np.float32(0.39894228040143268) * exp(np.float32(-0.5) * x * x)
    t = np.float32(1) / (np.float32(1) + np.float32(0.35) * abs(x))
    p = np.float32(-0.0743955)
    p = p * t + np.float32(0.3673359)
    p = p * t + np.float32(-0.6541328)
    p = p * t + np.float32(0.4137215)
    p = p * t + np.float32(-0.0677958)
    p = p * t + np.float32(0.2684965)
    p = p * t + np.float32(0.2994040)
    p = p * t + np.float32(0.3507081)
    p = p * t + np.float32(0.3499722)
    tail = density * t * p
    return (tail if x < np.float32(0) else np.float32(1) - tail), density


@kernel
def gelu_exact_forward(out, inp):
    """out = x * Phi(x) for every x of inp (N, C), with the distribution function Phi of standard normal numbers.

    Backward needs inp, from which it computes Phi again.
    Cost: 47*N*C FLOPs, 8*N*C bytes: memory-bound. Derived in dev/derivations/gelu.md.
    """
    N, C = inp.shape
    for n in prange(N):
        for c in range(C):
            x = inp[n, c]
            probability, _ = normal_distribution(x)
            out[n, c] = x * probability


@kernel
def gelu_exact_backward(dinp, dout, inp):
    """dinp = dout * (Phi(x) + x * phi(x)) for every x of inp, all of shape (N, C).

    The product rule on x * Phi(x): the density phi is the derivative of Phi. dinp may be dout itself.

    Cost: 49*N*C FLOPs, 12*N*C bytes: memory-bound. Derived in dev/derivations/gelu.md.
    """
    N, C = inp.shape
    for n in prange(N):
        for c in range(C):
            x = inp[n, c]
            probability, density = normal_distribution(x)
            dinp[n, c] = dout[n, c] * (probability + x * density)


# ----------------------------------------------------------------------------------------------------------------------
# SwiGLU (Shazeer 2020): Llama's activation

@kernel
def swiglu_forward(out, inp):
    """out (N, H) = silu(gate) * value, where inp (N, 2H) has the gates in its first H columns and the values in the others.

    silu(x) = x / (1 + exp(-x)): the gate says how much of the value passes.

    Backward needs inp, from which it computes the logistic function again.
    Cost: 23*N*H FLOPs, 12*N*H bytes: memory-bound. Derived in dev/derivations/swiglu.md.
    """
    N, H = out.shape
    for n in prange(N):
        for c in range(H):
            gate = inp[n, c]
            out[n, c] = gate / (np.float32(1) + exp(-gate)) * inp[n, H + c]


@kernel
def swiglu_backward(dinp, dout, inp):
    """dinp (N, 2H), gradients of the gates and of the values, from dout (N, H) and inp (N, 2H).

        dgate = dout * value * (s + gate * s * (1 - s))         dvalue = dout * gate * s

    with s = 1 / (1 + exp(-gate)), whose derivative is s * (1 - s): the product rule on gate * s * value.

    Cost: 30*N*H FLOPs, 20*N*H bytes: memory-bound. Derived in dev/derivations/swiglu.md.
    """
    N, H = dout.shape
    for n in prange(N):
        for c in range(H):
            gate, value, d = inp[n, c], inp[n, H + c], dout[n, c]
            s = np.float32(1) / (np.float32(1) + exp(-gate))
            dinp[n, c] = d * value * (s + gate * s * (np.float32(1) - s))
            dinp[n, H + c] = d * gate * s


# ----------------------------------------------------------------------------------------------------------------------
# Residual connection

@kernel
def residual_forward(out, inp1, inp2):
    """out (N, C) = inp1 + inp2.

    There is no residual_backward: d(inp1 + inp2) hands dout to both sides unchanged, so both simply read the same array.

    Cost: N*C FLOPs, 12*N*C bytes: memory-bound. Derived in dev/derivations/residual.md.
    """
    N, C = out.shape
    for n in prange(N):
        for c in range(C):
            out[n, c] = inp1[n, c] + inp2[n, c]


# ----------------------------------------------------------------------------------------------------------------------
# Softmax and cross-entropy, forward and backward in one pass

@kernel
def fused_classifier(losses, logits, targets, dloss, vocab_size):
    """losses (N) from logits (N, Vp) and int32 targets (N). Overwrites logits with their gradients.

        loss = -log(p[target])       p = softmax(logits over the first vocab_size columns)
        dlogits = (p - onehot(target)) * dloss

    since dlog(sum_j exp(logit_j))/dlogit_i = p_i. dloss is the weight of one token's loss in the loss of the step: 1 divided
    by the number of tokens in all its micro-batches.
    The padding columns take no part in the sum and get a gradient of exactly 0, so the padding rows of wte never move.

    Nothing is left for a backward pass to do.
    Cost: 24*N*V FLOPs, 8*N*Vp bytes: memory-bound. Derived in dev/derivations/classifier.md.
    """
    N, Vp = logits.shape
    for n in prange(N):
        row = logits[n]
        target = targets[n]
        largest = row_max(row[:vocab_size])
        target_logit = row[target] - largest
        total = np.float32(0)
        for i in range(vocab_size):
            row[i] = exp(row[i] - largest)
            total += row[i]
        losses[n] = np.log(total) - target_logit
        factor = np.float32(dloss) / total
        for i in range(vocab_size):
            row[i] *= factor
        row[target] -= np.float32(dloss)
        row[vocab_size:] = 0


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer

@kernel
def global_norm(grads):
    """The Euclidean norm of grads (P), one flat array: a float64, summed in an order independent of the thread count.

    Cost: 2*P FLOPs, 4*P bytes: memory-bound. Derived in dev/derivations/clipping.md.
    """
    size = 65536
    blocks = ceil_div(grads.size, size)
    partial = np.empty(blocks)
    for block in prange(blocks):
        squares = 0.0
        part = grads[block * size:(block + 1) * size]
        for i in range(part.size):
            squares += np.float64(part[i]) * np.float64(part[i])
        partial[block] = squares
    total = 0.0
    for block in range(blocks):  # in order; Numba would split np.sum among the threads
        total += partial[block]
    return np.sqrt(total)


@kernel
def adamw_update(params, grads, m, v, learning_rate, beta1, beta2, eps, weight_decay, grad_scale, step):
    """One step of AdamW (Loshchilov and Hutter 2019) on flat arrays (P); step counts from 1. The gradients are cleared.

        g = grads * grad_scale                       grad_scale < 1 clips the gradient by its norm
        m = beta1 * m + (1 - beta1) * g              v = beta2 * v + (1 - beta2) * g**2
        params -= learning_rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * params)

    m and v start at zero, so they are biased toward zero at first. m_hat = m / (1 - beta1**step) and
    v_hat = v / (1 - beta2**step) correct that bias. Clearing grads here, while they are in cache, saves another pass over them.

    Cost: 16*P FLOPs, 32*P bytes: memory-bound. Derived in dev/derivations/adamw.md.
    """
    keep_m, take_m = np.float32(beta1), np.float32(1 - beta1)
    keep_v, take_v = np.float32(beta2), np.float32(1 - beta2)
    rate = np.float32(learning_rate / (1 - beta1 ** step))
    unbias_v = np.float32(1 / (1 - beta2 ** step))
    decay = np.float32(learning_rate * weight_decay)
    scale, epsilon = np.float32(grad_scale), np.float32(eps)
    for i in prange(params.size):
        g = grads[i] * scale
        m[i] = keep_m * m[i] + take_m * g
        v[i] = keep_v * v[i] + take_v * g * g
        params[i] -= rate * m[i] / (np.sqrt(v[i] * unbias_v) + epsilon) + decay * params[i]
        grads[i] = 0


# ----------------------------------------------------------------------------------------------------------------------
# Decoding, one token at a time

def on_one_thread(kernel):
    """The same kernel on one thread: for a few rows, waking more threads takes longer than the work."""
    function = FunctionType(kernel.py_func.__code__, globals())
    function.__name__ = function.__qualname__ = f"{kernel.__name__}_on_one_thread"    # also its name in Numba's cache
    return helper(function)


layernorm_forward_on_one_thread = on_one_thread(layernorm_forward)
rmsnorm_forward_on_one_thread = on_one_thread(rmsnorm_forward)
rope_on_one_thread = on_one_thread(rope)
gelu_forward_on_one_thread = on_one_thread(gelu_forward)
gelu_exact_forward_on_one_thread = on_one_thread(gelu_exact_forward)
swiglu_forward_on_one_thread = on_one_thread(swiglu_forward)
residual_forward_on_one_thread = on_one_thread(residual_forward)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding with weights of 16, 8 or 4 bits: decoding is limited by reading the weights. matvec_cpu.py has the formats.

@kernel
def quantize(out, weight, bits):
    """out (OC, bytes) = weight (OC, C) in GGUF's Q8_0 or Q4_0, C a multiple of QUANT_GROUP. See dev/derivations/matmul.md."""
    for o in prange(len(weight)):
        block_bytes = 2 + QUANT_GROUP * bits // 8
        for g in range(weight.shape[1] // QUANT_GROUP):
            round_group(out[o, g * block_bytes:(g + 1) * block_bytes], weight[o, g * QUANT_GROUP:(g + 1) * QUANT_GROUP], bits)


@kernel
def round_to_bfloat16(out, weight):
    """out (OC, C), uint16 = weight (OC, C) in bfloat16. See dev/derivations/mixed_precision.md."""
    for o in prange(len(weight)):
        for c in range(weight.shape[1]):
            out[o, c] = bfloat16_bits(weight[o, c])


@kernel
def encoder_compact_forward(out, tokens, wte, wpe):
    """encoder_forward with a wte of any format. Llama's wpe is empty. See dev/derivations/encoder.md."""
    B, T = tokens.shape
    for n in prange(B * T):
        b, t = n // T, n % T
        widen(out[n], wte[tokens[b, t]])
        if wpe.size > 0:
            add_to(out[n], wpe[t])


@kernel
def matmul_compact_forward(out, inp, weight, bias, workspace):
    """matmul_forward with a weight of any format. Each thread widens some rows at a time. See dev/derivations/matmul.md."""
    N, OC = out.shape
    C = inp.shape[1]
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, OC)
        buffer = np.empty((min(BLOCK_COLUMNS, stop - start), C), dtype=np.float32)
        for first in range(start, stop, BLOCK_COLUMNS):
            last = min(first + BLOCK_COLUMNS, stop)
            wide = buffer[:last - first]
            for o in range(first, last):
                widen(wide[o - first], weight[o])
            if bias.size > 0:
                for n in range(N):
                    out[n, first:last] = bias[first:last]
            sgemm(out[:, first:last], 1.0, inp, wide.T, 1.0 if bias.size > 0 else 0.0, workspace[thread])


# ----------------------------------------------------------------------------------------------------------------------
# Compiling

DTYPES = tuple(WORDS)       # of matrix products
TRAINING = (encoder_forward, encoder_backward, matmul_forward, matmul_backward, attention_forward, attention_backward,
            residual_forward, fused_classifier, global_norm, adamw_update)
DECODING = (attention_cached_forward, residual_forward, residual_forward_on_one_thread, fused_classifier)
DECODING_FLOAT32 = (encoder_forward, matvec_forward, matmul_forward)                        # besides, for weights in float32
DECODING_COMPACT = (encoder_compact_forward, matvec_forward, matmul_compact_forward)        # and in other formats
DIFFERENT_LAYERS = {    # besides, for those that a model has: kernels of training, of decoding
    "layernorm": ((layernorm_forward, layernorm_backward), (layernorm_forward, layernorm_forward_on_one_thread)),
    "rmsnorm": ((rmsnorm_forward, rmsnorm_backward), (rmsnorm_forward, rmsnorm_forward_on_one_thread)),
    "rope": ((rope,), (rope, rope_on_one_thread)),
    "gelu": ((gelu_forward, gelu_backward), (gelu_forward, gelu_forward_on_one_thread)),
    "gelu_exact": ((gelu_exact_forward, gelu_exact_backward), (gelu_exact_forward, gelu_exact_forward_on_one_thread)),
    "swiglu": ((swiglu_forward, swiglu_backward), (swiglu_forward, swiglu_forward_on_one_thread)),
}


def training_kernels(layers):
    """The kernels that train a model with these layers, keys of DIFFERENT_LAYERS."""
    return [*TRAINING, *(kernel for name in layers for kernel in DIFFERENT_LAYERS[name][0])]


def decoding_kernels(layers):
    """The kernels that decode with a model with these layers, besides those for the formats of its weights."""
    return [*DECODING, *(kernel for name in layers for kernel in DIFFERENT_LAYERS[name][1])]


def use_threads(threads, processes=1):
    """Set the number of threads and return it. None: all usable cores, divided by the processes on this machine.

    Raises UserError with status 2 if there are fewer cores.
    """
    cores = config.NUMBA_NUM_THREADS
    threads = threads or max(1, min(cores, usable_cores()) // processes)
    if threads > cores:
        raise UserError(f"--threads is {threads}, expected at most {cores}, the number of cores; lower it", status=2)
    set_num_threads(threads)
    return threads


def all_compiled(kernels, **dtypes):
    """Whether Numba's cache holds these kernels as they are written now and for this processor.

    dtypes: parameter -> dtype of its arrays, for those that can have several
    """
    return all(kernel._cache.is_intact(kernel.targetctx.codegen().magic_tuple(), dtypes) for kernel in kernels)


def compile_in_processes(program, *arguments):
    """Fill Numba's cache by calling a program's run_every_kernel(False, *arguments) and (True, *arguments) in two processes.

    A parallel kernel that was just compiled may add in another order than the same kernel loaded from the cache. No run
    computes with kernels that it compiled itself, so the first run gives the same bits as every later one. The two processes
    start with different kernels, and each finds in the cache what the other has compiled. Errors are
    hidden, but recur in this run.
    """
    run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {program}; {program}.run_every_kernel"
    compilers = [subprocess.Popen([sys.executable, "-c", f"{run}{(first, *arguments)!r}"], stderr=subprocess.DEVNULL)
                 for first in (False, True)]
    for compiler in compilers:
        compiler.wait()
