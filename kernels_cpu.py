"""The layers of GPT-2 on the CPU, each forward and backward pass written out by hand for Numba.

How to read a kernel
    Arguments run: outputs, saved statistics, inputs, weights, dimensions; in a backward pass dout, the gradient it begins
    with, stands before the saved statistics. A name that starts with `d` is the gradient of the loss with respect to the
    tensor named after it, and has its shape. Each backward stands right under its forward.
    A docstring gives the result with its shapes, why it is so, what the backward pass will need, and the cost. The pages it
    names, in dev/derivations/, derive every gradient step by step, with an example to check by hand.

Shapes
    B sequences, T positions, N = B*T rows (one per token), C channels, NH heads of HS = C/NH channels, OC output channels,
    V tokens in the vocabulary, Vp rows in the padded token table, maxT in the position table. Arrays are float32 and
    C-contiguous; token ids are int32.

What is added and what is overwritten
    Gradients of weights are added to (+=), so that several micro-batches, and both uses of `wte`, sum up by themselves.
    Gradients of activations are overwritten (=). The one exception is `layernorm_backward`, whose result joins the gradient
    that already flows down the residual stream.

Costs
    FLOPs are additions, multiplications, divisions, comparisons and square roots; an exponential counts as 20. Bytes are those
    that have to be moved between memory and processor, each array once for reading and once for writing. A kernel is
    memory-bound if it does fewer than a dozen FLOPs a byte, which is what a processor has time for.

Threads
    There is one thread pool, Numba's. Every thread computes its own block of a matrix product with `sgemm`, which runs on one
    thread and stands toward the end of this file. No two threads ever add into the same number, and every sum runs in a fixed
    order that does not depend on how many threads there are, so the same input gives the same bits.
"""
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType

# How often an OpenMP thread looks for its next kernel before it goes to sleep. GNU's default, milliseconds long, makes a
# step four times slower as soon as another program wants the same cores; this costs nothing where none does.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, njit, prange, set_num_threads, types
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

from cli import UserError

# Sums may be reordered and products fused into sums, which is what lets a loop run on vector registers. Unlike
# `fastmath=True`, this set does not assume the absence of NaN, which must come out wherever it went in.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

kernel = njit(parallel=True, cache=True, fastmath=FASTMATH, error_model="numpy")
helper = njit(cache=True, fastmath=FASTMATH, error_model="numpy")

LAYERNORM_EPSILON = np.float32(1e-5)
GELU_SCALE = np.float32(np.sqrt(2 / np.pi))
GELU_CUBIC = np.float32(0.044715)
QUERY_TILE = 128    # rows of the attention matrix that exist at any one time, per thread
MAX_LANES = 64         # running maxima side by side
COLUMN_BLOCK = 64   # channels a thread sums over tokens at a time, when a sum over tokens is shared among threads
QUANT_GROUP = 64          # numbers of an int8 weight that share a scale


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks

@helper
def partition(part, parts, length):
    """The [start, stop) of one of `parts` equal shares of a row, cut at multiples of 16 numbers, a cache line's worth."""
    lines = (length + 15) // 16
    return min(lines * part // parts * 16, length), min(lines * (part + 1) // parts * 16, length)


@helper
def add_to(total, term):
    """total += term, for two 1-D views of the same length."""
    for i in range(total.size):
        total[i] += term[i]


@njit(inline="always", fastmath=FASTMATH)
def exp(x):
    """e**x to 3e-7 relative, in arithmetic that vectorizes (Numba would call the C library once per element).

    x = n*ln(2) + r with |r| <= ln(2)/2, so e**x = 2**n * e**r: a polynomial (coefficients of Cephes' expf; ln(2) in two
    parts, to keep r exact) times a power of two made by writing n into a float's exponent bits. Below -87 the answer is 0
    and above 88 infinity, because n would not fit. The comparisons are put so that NaN passes through.
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
    """The largest element. It only shifts a softmax, so a NaN may be passed over here: it comes out in the sum.

    A loop with a single maximum would go one element at a time, since floating-point maxima may not be reordered when a
    NaN is possible. MAX_LANES running maxima side by side fill a vector register without any reordering.
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
    """out (N, C) = wte[token] + wpe[position], for tokens (B, T), wte (Vp, C) and wpe (maxT, C).

    Backward needs tokens.
    Cost: N*C FLOPs, 4*(2*N*C + T*C) bytes: memory-bound. Derived in dev/derivations/encoder.md.
    """
    B, T = tokens.shape
    for n in prange(B * T):
        b, t = n // T, n % T
        token = tokens[b, t]
        for c in range(out.shape[1]):
            out[n, c] = wte[token, c] + wpe[t, c]


@kernel
def encoder_backward(dwte, dwpe, dout, tokens):
    """dwte[token] += dout and dwpe[position] += dout, for every row of dout (N, C); dwte (Vp, C), dwpe (maxT, C).

    A token can occur many times, so threads that shared out the rows would race. They share out the channels instead.

    Cost: 2*N*C FLOPs, 4*(3*N*C + 2*T*C) bytes: memory-bound. Derived in dev/derivations/encoder.md.
    """
    B, T = tokens.shape
    C = dout.shape[1]
    for block in prange((C + COLUMN_BLOCK - 1) // COLUMN_BLOCK):
        columns = slice(block * COLUMN_BLOCK, min((block + 1) * COLUMN_BLOCK, C))
        for n in range(B * T):
            b, t = n // T, n % T
            add_to(dwte[tokens[b, t], columns], dout[n, columns])
            add_to(dwpe[t, columns], dout[n, columns])


# ----------------------------------------------------------------------------------------------------------------------
# Layer normalization (Ba, Kiros and Hinton 2016)

@kernel
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out (N, C) is inp (N, C), each row shifted to mean 0 and scaled to variance 1, then by the learned weight and bias (C).

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

    where mean_c is the mean over a row's channels. That is dnorm without its components along the two directions the
    normalization took away: the constant and norm.

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
    for block in prange((C + COLUMN_BLOCK - 1) // COLUMN_BLOCK):
        columns = slice(block * COLUMN_BLOCK, min((block + 1) * COLUMN_BLOCK, C))
        dw, db = dweight[columns], dbias[columns]
        for n in range(N):
            m, r = mean[n], rstd[n]
            do, x = dout[n, columns], inp[n, columns]
            for c in range(dw.size):
                dw[c] += do[c] * (x[c] - m) * r
                db[c] += do[c]


# ----------------------------------------------------------------------------------------------------------------------
# Matrix product: the linear layers, and the logits

@kernel
def matmul_forward(out, inp, weight, bias, workspace):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC). An empty bias array means there is none.

    By far the most time is spent in this kernel and the next. Each thread owns a block of output columns, so each row of
    the weight, which is read only once, is read by one thread only. workspace is what `make_workspace` returns: as many rows
    of scratch memory as threads share the work.

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

    From out[n, o] = sum_c inp[n, c] * weight[o, c] + bias[o]: inp[n, c] reaches the loss through every o, weight[o, c]
    and bias[o] through every n. Threads share out the columns of dinp and the rows of dweight.

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
    """matmul_forward for an inp (N, C) of few rows: then the time it takes is that of reading the weight (OC, C), once.

    Each row of the weight meets all rows of inp while it is in cache, and nothing is copied. Row by row the bits of out are
    the same, however many rows there are.

    Cost: 2*N*C*OC FLOPs, 4*(N*C + OC*C + N*OC) bytes: memory-bound. See dev/derivations/matmul.md.
    """
    no_scales = np.empty((0, 0), dtype=np.float32)
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, len(weight))
        multiply_few_rows(out[:, start:stop], inp, weight[start:stop], no_scales, bias[start:stop])


@njit(cache=True, fastmath=FASTMATH - {"reassoc"}, error_model="numpy")     # sums keep the order that is spelled out
def multiply_few_rows(out, inp, weight, scales, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), on one thread. The weight is int8 if there are scales."""
    N, OC = out.shape
    C = inp.shape[1]
    weight_rows = INT8_ROWS if scales.size > 0 else WEIGHT_ROWS
    for o in range(0, OC, weight_rows):
        part = slice(o, o + weight_rows)
        for n in range(0, N, INPUT_ROWS):
            tile, rows = out[n:n + INPUT_ROWS, part], inp[n:n + INPUT_ROWS]
            dot_products(tile, rows, weight[part], scales[part])
            for r in range(tile.shape[0]):
                for i in range(tile.shape[1]):
                    rest = bias[o + i] if bias.size > 0 else np.float32(0)
                    for c in range(C // QUANT_GROUP * QUANT_GROUP, C):
                        scale = scales[o + i, c // QUANT_GROUP] if scales.size > 0 else np.float32(1)
                        rest += rows[r, c] * np.float32(weight[o + i, c]) * scale
                    tile[r, i] += rest


# ----------------------------------------------------------------------------------------------------------------------
# Attention: causal, multi-head, without a (T, T) tensor (Dao et al. 2022)

@helper
def one_head(rows, b, T, h, HS):
    """Sequence b's (T, HS) view of head h. In qkv the heads of q come first, then those of k and of v: h, NH + h, 2*NH + h."""
    return rows[b * T:(b + 1) * T, h * HS:(h + 1) * HS]


@helper
def attend(out, lse, q, k, v, position):
    """One head of attention_forward: out (T, HS) and lse (T) from q (T, HS), k and v (position + T, HS).

    The queries are those of the last T positions; there are `position` before them.
    """
    T, HS = q.shape
    scratch = np.empty(SCRATCH, dtype=np.float32)
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
def attention_forward(out, lse, qkv):
    """Each position of out (N, C) averages the values of the positions before it and its own, weighted by softmax.

        score[i, j] = q[i] . k[j] / sqrt(HS)   for j <= i
        p[i, j]     = exp(score[i, j] - lse[i])                lse[i] = log(sum_j exp(score[i, j]))
        out[i]      = sum_j p[i, j] * v[j]

    in each sequence and head, i and j being positions. qkv (N, 3C) holds queries, keys and values side by side, each with its
    heads side by side. The scores exist for one tile of queries at a time. Those of keys after the tile's last query are
    never computed; the few after an earlier query of it are set to zero.

    Backward needs qkv, out, and lse (B, NH, T), the log of each row's sum of exponentials, which is saved: one number a row
    is all it takes to rebuild p.
    Cost: (4*HS + 24)*P FLOPs for P = B*NH*T*(T + 1)/2 pairs of a query and a key it sees, 4*(4*N*C + NH*N) bytes:
    compute-bound. Derived in dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    HS = out.shape[1] // NH
    for head in prange(B * NH):
        b, h = head // NH, head % NH
        q, k, v = one_head(qkv, b, T, h, HS), one_head(qkv, b, T, NH + h, HS), one_head(qkv, b, T, 2 * NH + h, HS)
        attend(one_head(out, b, T, h, HS), lse[b, h], q, k, v, 0)


@kernel
def attention_backward(dqkv, dout, out, lse, qkv):
    """dqkv (N, 3C) from dout (N, C), tile by tile, with p rebuilt from lse.

    out = p @ v gives                        dv[j] = sum_i p[i, j] * dout[i]      dp[i, j] = dout[i] . v[j]
    The softmax of a row gives               dscore[i, j] = p[i, j] * (dp[i, j] - delta[i])
    A score acts on its own p[i, j], and through lse[i] on the whole row: each p[i, k] loses p[i, k] * p[i, j]. So
    delta[i] = sum_k p[i, k] * dp[i, k] = dout[i] . out[i], which is why out is kept: no second pass over the row.
    score = q @ k.T / sqrt(HS) gives         dq[i] = sum_j dscore[i, j] * k[j] / sqrt(HS)
                                             dk[j] = sum_i dscore[i, j] * q[i] / sqrt(HS)

    Keys and values collect from every tile that saw them. Going through the tiles from the last, which saw all of them,
    the first product overwrites (beta = 0) and the later ones add (beta = 1).

    Cost: (10*HS + 23)*P + 2*N*C FLOPs for P = B*NH*T*(T + 1)/2 pairs, 4*(8*N*C + NH*N) bytes: compute-bound.
    Derived in dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    C = out.shape[1]
    HS = C // NH
    scale = 1.0 / np.sqrt(HS)
    for head in prange(B * NH):
        b, h = head // NH, head % NH
        q, k, v = one_head(qkv, b, T, h, HS), one_head(qkv, b, T, NH + h, HS), one_head(qkv, b, T, 2 * NH + h, HS)
        o = one_head(out, b, T, h, HS)
        dq, dk, dv = one_head(dqkv, b, T, h, HS), one_head(dqkv, b, T, NH + h, HS), one_head(dqkv, b, T, 2 * NH + h, HS)
        do = one_head(dout, b, T, h, HS)
        scratch = np.empty(SCRATCH, dtype=np.float32)
        buffer = np.empty(2 * min(QUERY_TILE, T) * T, dtype=np.float32)
        tiles = (T + QUERY_TILE - 1) // QUERY_TILE
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
                    delta += do[start + i, c] * o[start + i, c]
                row, drow = p[i, :visible], dscore[i, :visible]
                for j in range(visible):
                    row[j] = exp(row[j] - row_lse)
                    drow[j] = row[j] * (drow[j] - delta)
                p[i, visible:] = 0
                dscore[i, visible:] = 0
            beta = 0.0 if tile == tiles - 1 else 1.0
            sgemm(dv[:stop], 1.0, p.T, do[start:stop], beta, scratch)
            sgemm(dk[:stop], scale, dscore.T, q[start:stop], beta, scratch)
            sgemm(dq[start:stop], scale, dscore, k[:stop], 0.0, scratch)


@kernel
def attention_cached_forward(out, keys, values, qkv, position):
    """attention_forward for tokens that come after `position` others, whose keys and values were kept.

    keys and values (B, NH, maxT, HS) hold those of the positions before `position`; those of the T positions in qkv
    (B*T, 3C) are put behind them. Every query sees all earlier positions, and of the new ones its own and those before.
    A single query needs no matrix product: its keys and values are read where they lie.

    Cost of a single query: (4*HS + 24)*P FLOPs for P = B*NH*(position + 1) keys, 8*HS*P bytes: memory-bound.
    See dev/derivations/attention.md.
    """
    B, NH, _, HS = keys.shape
    T = out.shape[0] // B
    scale = np.float32(1 / np.sqrt(HS))
    for head in prange(B * NH):
        b, h = head // NH, head % NH
        k, v = keys[b, h, :position + T], values[b, h, :position + T]
        k[position:] = one_head(qkv, b, T, NH + h, HS)
        v[position:] = one_head(qkv, b, T, 2 * NH + h, HS)
        if T > 1:
            attend(one_head(out, b, T, h, HS), np.empty(T, dtype=np.float32), one_head(qkv, b, T, h, HS), k, v, position)
        else:
            p = np.empty(position + 1, dtype=np.float32)
            query, average = qkv[b, h * HS:(h + 1) * HS], out[b, h * HS:(h + 1) * HS]    # whose numbers are side by side
            for j in range(position + 1):
                key, score = k[j], np.float32(0)
                for c in range(HS):
                    score += query[c] * key[c]
                p[j] = scale * score
            softmax(p)
            average[:] = 0
            for j in range(position + 1):
                value, weight = v[j], p[j]
                for c in range(HS):
                    average[c] += weight * value[c]


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

    The product rule on x * s, and ds/du = 2 s (1 - s), the logistic function's own derivative. dinp may be dout itself.

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
# Softmax and cross-entropy, forward and backward at once

@kernel
def fused_classifier(losses, logits, targets, dloss, vocab_size):
    """losses (N) from logits (N, Vp) and int32 targets (N), the logits being overwritten by their gradients.

        loss = -log(p[target])       p = softmax(logits over the first vocab_size columns)
        dlogits = (p - onehot(target)) * dloss

    since dlog(sum_j exp(logit_j))/dlogit_i = p_i. dloss is the weight of one token's loss in that of the step: 1 divided by
    the tokens of all its batches.
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
# The optimizer

@kernel
def global_norm(grads):
    """The Euclidean norm of grads (P), one flat array: a float64, summed block by block so that no thread count changes it.

    Cost: 2*P FLOPs, 4*P bytes: memory-bound. Derived in dev/derivations/clipping.md.
    """
    size = 65536
    blocks = (grads.size + size - 1) // size
    partial = np.empty(blocks)
    for block in prange(blocks):
        squares = 0.0
        part = grads[block * size:(block + 1) * size]
        for i in range(part.size):
            squares += np.float64(part[i]) * np.float64(part[i])
        partial[block] = squares
    total = 0.0
    for block in range(blocks):  # in order; np.sum would be shared among the threads
        total += partial[block]
    return np.sqrt(total)


@kernel
def adamw_update(params, grads, m, v, learning_rate, beta1, beta2, eps, weight_decay, grad_scale, step):
    """One step of AdamW (Loshchilov and Hutter 2019) on flat arrays (P); step counts from 1. The gradients are cleared.

        g = grads * grad_scale                       grad_scale < 1 where the gradient was too long: clipping by norm
        m = beta1 * m + (1 - beta1) * g              v = beta2 * v + (1 - beta2) * g**2
        params -= learning_rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * params)

    m and v start at zero and so are too small at first, by exactly the factors that m_hat = m / (1 - beta1**step) and
    v_hat = v / (1 - beta2**step) undo. Setting grads to zero here, while they are in cache, spares another pass over them.

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
# For a token at a time

def on_one_thread(kernel):
    """The same kernel without threads: for a few rows, waking the others would take longer than the work."""
    function = FunctionType(kernel.py_func.__code__, globals())
    function.__name__ = function.__qualname__ = f"{kernel.__name__}_on_one_thread"    # also its name in Numba's cache
    return helper(function)


layernorm_forward_on_one_thread = on_one_thread(layernorm_forward)
gelu_forward_on_one_thread = on_one_thread(gelu_forward)
residual_forward_on_one_thread = on_one_thread(residual_forward)


# ----------------------------------------------------------------------------------------------------------------------
# Weights in int8, for decoding, which is as fast as the weights can be read
#
# Every QUANT_GROUP numbers along a row of a weight share a scale: weight[o, c] is about numbers[o, c] * scales[o, c // QUANT_GROUP], with
# numbers from -127 to 127, and one scale more for the numbers left over. Activations stay float32.

@kernel
def quantize(numbers, scales, weight):
    """numbers (OC, C), int8, and scales (OC, groups) from weight (OC, C). It runs once, when a model is loaded.

    See dev/derivations/matmul.md.
    """
    for o in prange(weight.shape[0]):
        for g in range(scales.shape[1]):
            group = slice(g * QUANT_GROUP, (g + 1) * QUANT_GROUP)
            scales[o, g] = quantize_group(numbers[o, group], weight[o, group])


@helper
def quantize_group(numbers, weight):
    """numbers from weight, up to QUANT_GROUP of both: the largest becomes 127 or -127. Returns their scale.

    The largest is found among the bits: without their sign, floats are in the order of the integers that have the same
    bits, and integers can be compared a whole vector at a time. Infinity and NaN stand above all numbers there. They make
    the scale NaN, and with it whatever is computed from the group.
    """
    bits = weight.view(np.int32)
    largest_bits = np.int32(0)
    for i in range(bits.size):
        largest_bits = np.int32(max(largest_bits, bits[i] & np.int32(0x7fffffff)))
    largest = np.int32(largest_bits).view(np.float32)
    if largest_bits >= np.int32(0x7f800000) or largest < np.float32(1e-36):    # 127 / 1e-36 is still a float
        numbers[:] = 0
        return largest * np.float32(0)
    to_127 = np.float32(127) / largest
    for i in range(weight.size):
        numbers[i] = np.int8(np.floor(weight[i] * to_127 + np.float32(0.5)))
    return largest / np.float32(127)


@helper
def dequantize_row(out, numbers, scales):
    """out (C) = numbers * scales, one row of a weight."""
    for g in range(scales.size):
        part, whole = out[g * QUANT_GROUP:(g + 1) * QUANT_GROUP], numbers[g * QUANT_GROUP:(g + 1) * QUANT_GROUP]
        for i in range(part.size):
            part[i] = scales[g] * np.float32(whole[i])


@kernel
def encoder_int8_forward(out, tokens, numbers, scales, wpe):
    """encoder_forward with a wte in int8, numbers (Vp, C) and scales (Vp, groups). See dev/derivations/encoder.md."""
    B, T = tokens.shape
    for n in prange(B * T):
        b, t = n // T, n % T
        dequantize_row(out[n], numbers[tokens[b, t]], scales[tokens[b, t]])
        add_to(out[n], wpe[t])


@kernel
def matvec_int8_forward(out, inp, numbers, scales, bias, workspace):
    """matvec_forward with a weight in int8, numbers (OC, C) and scales (OC, groups).

    Cost: 2*N*C*OC FLOPs, 17/16*OC*C + 4*(N*C + N*OC) bytes: memory-bound. See dev/derivations/matmul.md.
    """
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, len(numbers))
        multiply_few_rows(out[:, start:stop], inp, numbers[start:stop], scales[start:stop], bias[start:stop])


@kernel
def matmul_int8_forward(out, inp, numbers, scales, bias, workspace):
    """matmul_forward with a weight in int8, numbers (OC, C) and scales (OC, groups).

    Each thread turns some rows at a time into float32. See dev/derivations/matmul.md.
    """
    N, OC = out.shape
    C = inp.shape[1]
    threads = len(workspace)
    for thread in prange(threads):
        start, stop = partition(thread, threads, OC)
        buffer = np.empty((min(BLOCK_COLUMNS, stop - start), C), dtype=np.float32)
        for first in range(start, stop, BLOCK_COLUMNS):
            last = min(first + BLOCK_COLUMNS, stop)
            weight = buffer[:last - first]
            for o in range(first, last):
                dequantize_row(weight[o - first], numbers[o], scales[o])
            if bias.size > 0:
                for n in range(N):
                    out[n, first:last] = bias[first:last]
            sgemm(out[:, first:last], 1.0, inp, weight.T, 1.0 if bias.size > 0 else 0.0, workspace[thread])


# ----------------------------------------------------------------------------------------------------------------------
# The matrix product on one thread
#
# A number that was loaded should meet many others while it is in a register. So the result is made in tiles, TILE_ROWS rows
# of TILE_VECTORS vectors, which stay in registers for the whole of their sum: each step of it loads one row of b, and
# multiplies it by one number of a for every row of the tile. The rows of b are copied beforehand, block by block, into the
# order in which they will be read, and wait in the second-level cache while all of a goes past (Goto and van de Geijn 2008).
#
# Numba has no vectors. The three functions that need them spell out LLVM's instructions, on addresses, which they take as
# integers; the distance from one row to the next is in bytes, too.

FEATURES = llvm.get_host_cpu_features()
LANES = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx") else 4     # numbers in a vector
TILE_ROWS = 4 if FEATURES.get("sse2") and not FEATURES.get("avx512f") else 8   # as many as 16 or 32 vector registers hold
TILE_VECTORS = 3
TILE_COLUMNS = TILE_VECTORS * LANES
BLOCK_DEPTH, BLOCK_COLUMNS = 768, 384     # of b: 1.2 MB
LARGE_PAGE = 2 ** 21                      # bytes
SCRATCH = LARGE_PAGE // 4                 # numbers a thread has for such a block
BLOCK_ROWS = 1024                         # of a, where it has to be transposed
PREFETCH_AHEAD = 7680                     # bytes: the processor by itself does not look beyond a page of 4096

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)


def pointer(build, address, row=0, row_bytes=INT64(0), number=INT64(0)):
    """A pointer to a number, counted in a row, counted in a matrix that starts at address."""
    start = build.add(address, build.mul(INT64(row), row_bytes))
    return build.gep(build.inttoptr(start, FLOAT.as_pointer()), [number])


def load(build, place):
    """The vector that starts at place."""
    return build.load(build.bitcast(place, VECTOR.as_pointer()), align=4)


def store(build, vector, place):
    build.store(vector, build.bitcast(place, VECTOR.as_pointer()), align=4)


def shuffle(build, first, second, lanes):
    """The vector of these lanes of first and, counted on, of second."""
    return build.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, LANES), list(lanes)))


def splat(build, number):
    """The vector with number in every lane."""
    nothing = VECTOR(ir.Undefined)
    return shuffle(build, build.insert_element(nothing, number, INT32(0)), nothing, [0] * LANES)


def clamped_row_indices(build, rows, count):
    """The numbers of the first `count` rows; where there are fewer, the last stands in for those that are missing."""
    last = build.sub(rows, INT64(1))
    return [build.select(build.icmp_signed("<", last, INT64(r)), last, INT64(r)) for r in range(count)]


def prefetch(build, place, level=1):
    """Have the cache line at place brought into the first- or second-level cache, without waiting for it."""
    byte = ir.IntType(8).as_pointer()
    function = build.module.declare_intrinsic("llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *[INT32] * 3]))
    for_reading, kept_near, data = INT32(0), INT32(4 - level), INT32(1)
    build.call(function, [build.bitcast(place, byte), for_reading, kept_near, data])


@intrinsic
def multiply_tile(typing, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """c (TILE_ROWS, vectors * LANES) = alpha * a (rows, depth) @ b (depth, vectors * LANES) + beta * c.

    The rows of b follow one another. Where a has fewer than TILE_ROWS rows, its last stands in for those it lacks.
    """
    def emit(context, build, signature, arguments):
        vectors, *others = arguments
        end = build.append_basic_block()
        choice = build.switch(vectors, end)
        for width in range(1, TILE_VECTORS + 1):
            block = build.append_basic_block()
            choice.add_case(INT64(width), block)
            build.position_at_end(block)
            emit_tile(build, width, *others)
            build.branch(end)
        build.position_at_end(end)
        return context.get_dummy_value()

    address = stride = count = types.intp
    return types.void(count, address, stride, types.float32, types.float32, address, stride, count, address, count), emit


def emit_tile(build, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """The instructions of `multiply_tile` for one width: a loop over depth, whose phis are the sums that stay in registers."""
    tile = [(r, v) for r in range(TILE_ROWS) for v in range(vectors)]
    places = {(r, v): pointer(build, c, r, c_row, INT64(v * LANES)) for r, v in tile}
    for place in places.values():
        prefetch(build, place)
    a_rows = [build.add(a, build.mul(r, a_row)) for r in clamped_row_indices(build, rows, TILE_ROWS)]

    before, loop, after = build.block, build.append_basic_block(), build.append_basic_block()
    build.branch(loop)
    build.position_at_end(loop)
    k = build.phi(INT64)
    sums = {rv: build.phi(VECTOR) for rv in tile}
    b_row = build.mul(k, INT64(vectors * LANES))
    b_vectors = [load(build, pointer(build, b, number=build.add(b_row, INT64(v * LANES)))) for v in range(vectors)]
    prefetch(build, pointer(build, b, number=build.add(b_row, INT64(PREFETCH_AHEAD // 4))))
    fused, sums_after = ("contract",), {}
    for r in range(TILE_ROWS):
        number = splat(build, build.load(pointer(build, a_rows[r], number=k)))
        for v in range(vectors):
            sums_after[r, v] = build.fadd(build.fmul(number, b_vectors[v], flags=fused), sums[r, v], flags=fused)
    k_after = build.add(k, INT64(1))
    for phi, first, following in [(k, INT64(0), k_after)] + [(sums[rv], VECTOR(None), sums_after[rv]) for rv in tile]:
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)
    build.cbranch(build.icmp_signed("<", k_after, depth), loop, after)

    build.position_at_end(after)
    alphas, betas = splat(build, alpha), splat(build, beta)
    with build.if_else(build.fcmp_ordered("==", beta, FLOAT(0))) as (overwrite, add):
        with overwrite:
            for rv in tile:
                store(build, build.fmul(alphas, sums_after[rv]), places[rv])
        with add:
            for rv in tile:
                kept = build.fmul(betas, load(build, places[rv]))
                store(build, build.fadd(build.fmul(alphas, sums_after[rv], flags=fused), kept, flags=fused), places[rv])


@intrinsic
def transpose_square(typing, out, out_row, inp, inp_row):
    """out (LANES, LANES) = inp (LANES, LANES).T, in log2(LANES) rounds, each of which swaps parts of every two rows."""
    def emit(context, build, signature, arguments):
        out, out_row, inp, inp_row = arguments
        rows = [load(build, pointer(build, inp, r, inp_row)) for r in range(LANES)]
        distance = 1
        while distance < LANES:
            upper = [LANES + j - distance if j & distance else j for j in range(LANES)]
            lower = [LANES + j if j & distance else j + distance for j in range(LANES)]
            for r in range(LANES):
                if not r & distance:
                    pair = rows[r], rows[r + distance]
                    rows[r], rows[r + distance] = shuffle(build, *pair, upper), shuffle(build, *pair, lower)
            distance *= 2
        for r in range(LANES):
            store(build, rows[r], pointer(build, out, r, out_row))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


@intrinsic
def copy_vector(typing, out, inp):
    """out (LANES) = inp (LANES)."""
    def emit(context, build, signature, arguments):
        out, inp = arguments
        store(build, load(build, pointer(build, inp)), pointer(build, out))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


def in_large_pages(shape, dtype=np.float32):
    """An array, not set to anything, that begins at a multiple of 2 MB: then it may lie in large pages of memory.

    Of 4 MB and more NumPy asks Linux for such pages. Hundreds of small ones are more than a processor remembers the places of.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + LARGE_PAGE, dtype=np.uint8)
    first = -memory.ctypes.data % LARGE_PAGE
    return memory[first:first + size].view(dtype).reshape(shape)


def make_workspace(threads):
    """A row of scratch memory, one large page, for each of so many threads, for the kernels that multiply matrices."""
    return in_large_pages((threads, SCRATCH))


@helper
def whole_vectors(numbers):
    """How many vectors it takes to hold so many numbers."""
    return (numbers + LANES - 1) // LANES


@helper
def pack(out, inp):
    """out = inp (depth, columns), in rows of whole vectors; out is flat, and inp may be the transpose of a matrix.

    Numbers past the end of a row are zeros: they are multiplied, but nobody stores the result.
    """
    depth, columns = inp.shape
    row = whole_vectors(columns) * LANES
    whole = columns // LANES * LANES
    to, source = out.ctypes.data, inp.ctypes.data
    if inp.strides[1] == 4:
        for k in range(depth):
            for c in range(0, whole, LANES):
                copy_vector(to + 4 * (k * row + c), source + k * inp.strides[0] + 4 * c)
            for c in range(whole, row):
                out[k * row + c] = inp[k, c] if c < columns else np.float32(0)
    else:
        whole_depth = depth // LANES * LANES
        for c in range(0, whole, LANES):
            for k in range(0, whole_depth, LANES):
                transpose_square(to + 4 * (k * row + c), 4 * row, source + c * inp.strides[1] + 4 * k, inp.strides[1])
        for c in range(row):
            for k in range(whole_depth if c < whole else 0, depth):
                out[k * row + c] = inp[k, c] if c < columns else np.float32(0)


@helper
def sgemm(c, alpha, a, b, beta, scratch):
    """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c, on one thread.

    The arrays are 2-D views, so column blocks and heads need no copies; the last axis is contiguous, in a and b perhaps the
    first (the transpose of a matrix). Where beta is 0, c is overwritten, whatever was in it. Every number's sum runs over k
    in the same order, wherever it stands in c. scratch holds SCRATCH numbers.
    """
    # [:, :] makes views of whole arrays, too: one type to compile the rest for.
    multiply(c[:, :], np.float32(alpha), a[:, :], b[:, :], np.float32(beta), scratch)


@helper
def multiply(c, alpha, a, b, beta, scratch):
    """`sgemm`, which from here on needs no transpose of a."""
    m, k = a.shape
    upright = a.strides[1] == 4
    rows = m if upright else min(m, BLOCK_ROWS)
    copy = np.empty((0 if upright else rows, whole_vectors(k) * LANES), dtype=np.float32)
    for start in range(0, m, rows):
        part = a[start:start + rows, :]
        if not upright:
            pack(copy.reshape(-1), part)
            part = copy[:part.shape[0], :k]
        multiply_blocks(c[start:start + rows, :], alpha, part, b, beta, scratch)


@helper
def multiply_blocks(c, alpha, a, b, beta, packed):
    """`sgemm`, block by block of b, of which `packed` holds one."""
    m, n = c.shape
    k = a.shape[1]
    edge = np.empty((TILE_ROWS, TILE_COLUMNS), dtype=np.float32)    # a tile that would stick out of c
    for block in range(0, n, BLOCK_COLUMNS):
        block_end = min(block + BLOCK_COLUMNS, n)
        for start in range(0, k, BLOCK_DEPTH):
            depth = min(BLOCK_DEPTH, k - start)
            keep = beta if start == 0 else np.float32(1)
            for column in range(block, block_end, TILE_COLUMNS):
                pack(packed[(column - block) * depth:], b[start:start + depth, column:min(column + TILE_COLUMNS, block_end)])
            for row in range(0, m, TILE_ROWS):
                rows = min(TILE_ROWS, m - row)
                for column in range(block, block_end, TILE_COLUMNS):
                    columns = min(TILE_COLUMNS, block_end - column)
                    vectors = whole_vectors(columns)
                    inside = rows == TILE_ROWS and columns == vectors * LANES
                    multiply_tile(vectors, c.ctypes.data + row * c.strides[0] + 4 * column if inside else edge.ctypes.data,
                                  c.strides[0] if inside else edge.strides[0], alpha, keep if inside else np.float32(0),
                                  a.ctypes.data + row * a.strides[0] + 4 * start, a.strides[0], rows,
                                  packed.ctypes.data + 4 * (column - block) * depth, depth)
                    if not inside:
                        part = c[row:row + rows, column:column + columns]
                        for r in range(rows):
                            for j in range(columns):
                                part[r, j] = edge[r, j] + (keep * part[r, j] if keep != 0 else np.float32(0))


# ----------------------------------------------------------------------------------------------------------------------
# Dot products of a few rows of activations with a few rows of a weight, in LLVM's vectors like the tiles above
#
# INPUT_ROWS rows of activations meet WEIGHT_ROWS rows of a weight at once, or INT8_ROWS of one in int8: there the products of
# a group are summed by themselves first, so that its scale multiplies once for LANES of them, which takes twice the registers.
# Where four rows of float32 are read side by side, the processor foresees what comes next; in int8 it has to be told.

INPUT_ROWS = 4
WEIGHT_ROWS = TILE_ROWS // 2
INT8_ROWS = WEIGHT_ROWS // 2
BYTES = ir.VectorType(ir.IntType(8), LANES)
INTEGERS = ir.VectorType(INT32, LANES)


@intrinsic
def dot_products(typing, out, inp, weight, scales):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T, of every row the whole groups only.

    The weight is float32, or int8 with scales (OC, groups). N is at most INPUT_ROWS, OC at most WEIGHT_ROWS or INT8_ROWS.
    """
    def emit(context, build, signature, arguments):
        arrays = [context.make_array(kind)(context, build, array) for kind, array in zip(signature.args, arguments)]
        emit_dot_products(build, *arrays, in_int8=weight.dtype == types.int8)
        return context.get_dummy_value()

    return types.void(out, inp, weight, scales), emit


def emit_dot_products(build, out, inp, weight, scales, in_int8):
    """The loop over groups, once for each number of rows of inp."""
    N, C = build.extract_value(inp.shape, 0), build.extract_value(inp.shape, 1)
    columns = clamped_row_indices(build, build.extract_value(weight.shape, 0), INT8_ROWS if in_int8 else WEIGHT_ROWS)
    weight_rows = [row_address(build, weight, o) for o in columns]
    scale_rows = [row_address(build, scales, o) for o in columns] if in_int8 else None
    end = build.append_basic_block()
    choice = build.switch(N, end)
    for count in range(1, INPUT_ROWS + 1):
        block = build.append_basic_block()
        choice.add_case(INT64(count), block)
        build.position_at_end(block)
        input_rows = [row_address(build, inp, INT64(n)) for n in range(count)]
        sums = emit_loop_over_groups(build, input_rows, weight_rows, scale_rows, build.sdiv(C, INT64(QUANT_GROUP)))
        for (n, i), total in sums.items():
            distance = LANES // 2
            while distance > 0:    # halve the vector until its sum stands in its first lane
                moved = shuffle(build, total, total, [(lane + distance) % LANES for lane in range(LANES)])
                total = build.fadd(total, moved)
                distance //= 2
            place = pointer(build, row_address(build, out, INT64(n)), number=columns[i])
            build.store(build.extract_element(total, INT32(0)), place)
        build.branch(end)
    build.position_at_end(end)


def row_address(build, array, row):
    """Where a row of one of Numba's arrays begins."""
    return build.add(build.ptrtoint(array.data, INT64), build.mul(row, build.extract_value(array.strides, 0)))


def emit_loop_over_groups(build, input_rows, weight_rows, scale_rows, groups):
    """Which rows (n, i) -> the vector whose lanes add up to their dot product. scale_rows is None for a weight in float32."""
    fused = ("contract",)
    before, loop, body, after = build.block, *(build.append_basic_block() for _ in range(3))
    build.branch(loop)
    build.position_at_end(loop)
    g = build.phi(INT64)
    totals = {(n, i): build.phi(VECTOR) for n in range(len(input_rows)) for i in range(len(weight_rows))}
    build.cbranch(build.icmp_signed("<", g, groups), body, after)

    build.position_at_end(body)
    first = build.mul(g, INT64(QUANT_GROUP))
    sums = dict.fromkeys(totals, VECTOR(None)) if scale_rows else dict(totals)
    for v in range(0, QUANT_GROUP, LANES):
        number = build.add(first, INT64(v))
        if scale_rows:
            places = [build.inttoptr(build.add(row, number), BYTES.as_pointer()) for row in weight_rows]
            weights = [build.sitofp(build.sext(build.load(place, align=1), INTEGERS), VECTOR) for place in places]
        else:
            weights = [load(build, pointer(build, row, number=number)) for row in weight_rows]
        for n, row in enumerate(input_rows):
            inputs = load(build, pointer(build, row, number=number))
            for i in range(len(weights)):
                sums[n, i] = build.fadd(build.fmul(inputs, weights[i], flags=fused), sums[n, i], flags=fused)
    if scale_rows:
        scales = [splat(build, build.load(pointer(build, row, number=g))) for row in scale_rows]
        for n, i in sums:
            sums[n, i] = build.fadd(build.fmul(sums[n, i], scales[i], flags=fused), totals[n, i], flags=fused)
        for row in weight_rows:
            prefetch(build, pointer(build, build.add(build.add(row, first), INT64(PREFETCH_AHEAD))), level=2)
    for phi, start, following in [(g, INT64(0), build.add(g, INT64(1)))] + [
            (total, VECTOR(None), sums[ni]) for ni, total in totals.items()]:
        phi.add_incoming(start, before)
        phi.add_incoming(following, body)
    build.branch(loop)

    build.position_at_end(after)
    return totals


# ----------------------------------------------------------------------------------------------------------------------
# Numba's cache

# What training does without, and what it shares with decoding.
DECODING = (quantize, encoder_int8_forward, matvec_forward, matvec_int8_forward, matmul_int8_forward, attention_cached_forward,
            layernorm_forward_on_one_thread, gelu_forward_on_one_thread, residual_forward_on_one_thread)
SHARED = (encoder_forward, layernorm_forward, matmul_forward, gelu_forward, residual_forward, fused_classifier)


def use_threads(threads, processes=1):
    """Let the kernels run on so many threads; None: on one for each core, shared among so many processes. Returns how many.

    Raises UserError with status 2 if there are fewer cores.
    """
    cores = config.NUMBA_NUM_THREADS
    threads = threads or max(1, cores // processes)
    if threads > cores:
        raise UserError(f"--threads is {threads}, expected at most {cores}, all there are here; lower it", status=2)
    set_num_threads(threads)
    return threads


def all_compiled(decoding=False):
    """Whether Numba's cache holds every kernel of training, or of decoding, as this file has it and for this processor.

    Numba has no public way to ask: an index of its cache is empty if another version wrote it or the file has changed since.
    """
    kernels = DECODING + SHARED if decoding else [
        value for value in globals().values()
        if isinstance(value, Dispatcher) and value.targetoptions.get("parallel") and value not in DECODING]
    indices = {kernel: kernel._cache._cache_file._load_index() for kernel in kernels}
    return all(any(target == kernel.targetctx.codegen().magic_tuple() for _, target, *_ in index)
               for kernel, index in indices.items())


def compile_in_processes(program):
    """Have two processes compile into Numba's cache what run_every_kernel(False) and (True) of a program's module call.

    A parallel kernel that was just compiled, and the same kernel loaded from the cache, may add in another order. If no run
    computes with what it compiled itself, the first run gives the same bits as every later one. The two begin with different
    kernels, and each finds in the cache what the other has done. They are silent: what goes wrong there goes wrong again
    here, unless it is Ctrl-C.
    """
    run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {program}; {program}.run_every_kernel"
    compilers = [subprocess.Popen([sys.executable, "-c", f"{run}({argument})"], stderr=subprocess.DEVNULL)
                 for argument in (False, True)]
    for compiler in compilers:
        compiler.wait()
