"""Bugs with which to test the tests, and yourself.

    python dev/mutations.py                 put each bug of the table into a copy of the program, and see a test fail
    python dev/mutations.py layernorm       only those with `layernorm` in their name
    python dev/mutations.py --exercise 17   a copy of the program with one bug in it, for you to find
    python dev/mutations.py --solve 17      which one it was

Each bug is one exact replacement. The tests named beside it are a narrow choice, to save compiling kernels that the bug does
not touch. The exit status is 1 if a bug survives. dev/EXERCISES.md says how to go about the exercises.
"""
import os
import queue
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from cli import OneLineParser, UserError, bounded, run_program
from files import atomic_folder

TRAINING, DATA = "dev/tests/test_training.py", "dev/tests/test_dataloader.py"
GRADIENTS = "test_gpt2.py -k gradients"
PARAMETERS = "test_gpt2.py -k parameters"
ACTIVATIONS = "test_gpt2.py -k activations"
BATCHING = "test_gpt2.py -k batching"


def tests_in(file):
    """A function from names to those of the tests in this file that have them in their own."""
    return lambda names: f"dev/tests/{file} -k {names}"


kernel = tests_in("test_kernels.py")
cuda = tests_in("test_kernels_gpu.py")
whole_cuda = tests_in("test_train_gpt2_gpu.py")
cuda_decoding = tests_in("test_generate_gpu.py")
checkpoints = tests_in("test_model_files.py")
generating = tests_in("test_generate.py")
decoding = tests_in("test_decode_kernels.py")
resuming = tests_in("test_checkpoint.py")
scoring = tests_in("test_hellaswag.py")
preparing = tests_in("test_prepare_text.py")
erring = tests_in("test_errors.py")
faults = tests_in("test_faults.py")
damaged = tests_in("test_damaged_files.py")
exact_gelu = tests_in("test_exact_gelu.py")
of_processes = tests_in("test_distributed.py")
pages = tests_in("test_derivations.py")
drawing = tests_in("tools/test_figures.py")
recording = tests_in("tools/test_recorder.py")
exploring = tests_in("tools/test_explore.py")
SAMPLING, PLOTTING = "dev/tests/test_sampling.py", "dev/tests/tools/test_plot_runs.py"
GPU, PAGES = "kernels_gpu.py", "dev/derivations/"
FOURS_OF_GELU = "    Four x = fours.load(inp, i), d = fours.load(dout, i);\n    for (int k = 0; k < 4; k++) {\n        float "


class Mutation(NamedTuple):
    name: str
    file: str
    original: str         # found in the file exactly once
    replacement: str
    tests: str            # arguments of pytest


MUTATIONS = [Mutation(*row) for row in [
    # Encoder
    ("encoder: positions off by one", "kernels_cpu.py",
     "wte[token, c] + wpe[t, c]", "wte[token, c] + wpe[t + 1, c]", kernel("encoder")),
    ("encoder: dwte overwritten", "kernels_cpu.py",
     "add_to(dwte[tokens[b, t], columns], dout[n, columns])", "dwte[tokens[b, t], columns] = dout[n, columns]",
     kernel("encoder")),
    ("encoder: dwpe overwritten", "kernels_cpu.py",
     "add_to(dwpe[t, columns], dout[n, columns])", "dwpe[t, columns] = dout[n, columns]", kernel("encoder")),
    ("encoder: position embedding subtracted", "kernels_cpu.py",
     "wte[token, c] + wpe[t, c]", "wte[token, c] - wpe[t, c]", kernel("encoder")),
    ("encoder backward: last channels left out", "kernels_cpu.py",
     "C = dout.shape[1]\n    for block in prange(ceil_div(C, COLUMN_BLOCK)):",
     "C = dout.shape[1]\n    for block in prange(C // COLUMN_BLOCK):", kernel("encoder_backward")),

    # Layernorm
    ("layernorm: epsilon too small", "kernels_cpu.py",
     "np.float32(1e-5)", "np.float32(1e-6)", kernel("layernorm")),
    ("layernorm: variance without the mean", "kernels_cpu.py",
     "squares += (inp[n, c] - m) * (inp[n, c] - m)", "squares += inp[n, c] * inp[n, c]", kernel("layernorm")),
    ("layernorm: mean not subtracted", "kernels_cpu.py",
     "out[n, c] = (inp[n, c] - m) * r", "out[n, c] = inp[n, c] * r", kernel("layernorm")),
    ("layernorm: bias scaled by the weight", "kernels_cpu.py",
     "(inp[n, c] - m) * r * weight[c] + bias[c]", "((inp[n, c] - m) * r + bias[c]) * weight[c]", kernel("layernorm")),
    ("layernorm: variance over C - 1", "kernels_cpu.py",
     "squares / np.float32(C) + LAYERNORM_EPSILON", "squares / np.float32(C - 1) + LAYERNORM_EPSILON", kernel("layernorm")),
    ("layernorm: epsilon outside the root", "kernels_cpu.py",
     "np.sqrt(squares / np.float32(C) + LAYERNORM_EPSILON)", "(np.sqrt(squares / np.float32(C)) + LAYERNORM_EPSILON)",
     kernel("layernorm")),
    ("layernorm: variance as mean square minus squared mean", "kernels_cpu.py",
     "squares += (inp[n, c] - m) * (inp[n, c] - m)", "squares += inp[n, c] * inp[n, c] - m * m", kernel("layernorm")),
    ("layernorm: standard deviation saved for its reciprocal", "kernels_cpu.py",
     "rstd[n] = r\n", "rstd[n] = np.float32(1) / r\n", kernel("layernorm")),
    ("layernorm backward: direct term dropped", "kernels_cpu.py",
     "r * (dout[n, c] * weight[c] - dnorm_mean -", "r * (-dnorm_mean -", kernel("layernorm_backward")),
    ("layernorm backward: mean term dropped", "kernels_cpu.py",
     "dout[n, c] * weight[c] - dnorm_mean -", "dout[n, c] * weight[c] -", kernel("layernorm_backward")),
    ("layernorm backward: rstd term dropped", "kernels_cpu.py",
     " - norm * dnorm_norm_mean)", ")", kernel("layernorm_backward")),
    ("layernorm backward: dinp overwritten", "kernels_cpu.py",
     "dinp[n, c] += r *", "dinp[n, c] = r *", kernel("layernorm_backward")),
    ("layernorm backward: dweight overwritten", "kernels_cpu.py",
     "dw[c] += do[c]", "dw[c] = do[c]", kernel("layernorm_backward")),
    ("layernorm backward: rstd forgotten", "kernels_cpu.py",
     "dinp[n, c] += r * (dout", "dinp[n, c] += (dout", kernel("layernorm_backward")),
    ("layernorm backward: rstd squared", "kernels_cpu.py",
     "dinp[n, c] += r * (dout", "dinp[n, c] += r * r * (dout", kernel("layernorm_backward")),
    ("layernorm backward: rstd term added", "kernels_cpu.py",
     " - norm * dnorm_norm_mean)", " + norm * dnorm_norm_mean)", kernel("layernorm_backward")),
    ("layernorm backward: rstd term the same for a whole row", "kernels_cpu.py",
     " - norm * dnorm_norm_mean)", " - dnorm_norm_mean)", kernel("layernorm_backward")),
    ("layernorm backward: sum instead of mean", "kernels_cpu.py",
     "dnorm_mean = dnorm_sum / np.float32(C)", "dnorm_mean = dnorm_sum", kernel("layernorm_backward")),
    ("layernorm backward: weight forgotten in the means", "kernels_cpu.py",
     "dnorm = dout[n, c] * weight[c]\n", "dnorm = dout[n, c]\n", kernel("layernorm_backward")),
    ("layernorm backward: weight forgotten in the direct term", "kernels_cpu.py",
     "r * (dout[n, c] * weight[c] - dnorm_mean", "r * (dout[n, c] - dnorm_mean", kernel("layernorm_backward")),
    ("layernorm backward: input not normalized in the rstd term", "kernels_cpu.py",
     "dnorm_norm_sum += dnorm * (inp[n, c] - m) * r", "dnorm_norm_sum += dnorm * (inp[n, c] - m)",
     kernel("layernorm_backward")),
    ("layernorm backward: dweight of the input, not of norm", "kernels_cpu.py",
     "dw[c] += do[c] * (x[c] - m) * r", "dw[c] += do[c] * x[c]", kernel("layernorm_backward")),
    ("layernorm backward: dweight without rstd", "kernels_cpu.py",
     "dw[c] += do[c] * (x[c] - m) * r", "dw[c] += do[c] * (x[c] - m)", kernel("layernorm_backward")),
    ("layernorm backward: dbias multiplied by norm", "kernels_cpu.py",
     "db[c] += do[c]", "db[c] += do[c] * (x[c] - m) * r", kernel("layernorm_backward")),
    ("layernorm backward: dbias overwritten", "kernels_cpu.py",
     "db[c] += do[c]", "db[c] = do[c]", kernel("layernorm_backward")),
    ("layernorm backward: last channels left out", "kernels_cpu.py",
     "norm * dnorm_norm_mean)\n    for block in prange(ceil_div(C, COLUMN_BLOCK)):",
     "norm * dnorm_norm_mean)\n    for block in prange(C // COLUMN_BLOCK):", kernel("layernorm_backward")),

    # Matrix product
    ("matmul: last columns left out", "kernels_cpu.py",
     "lines = ceil_div(length, 16)", "lines = length // 16", kernel("matmul")),
    ("matmul: bias overwritten by the product", "kernels_cpu.py",
     "weight[start:stop].T, 1.0 if bias.size > 0 else 0.0", "weight[start:stop].T, 0.0",
     kernel("matmul")),
    ("matmul: old output kept", "kernels_cpu.py",
     "weight[start:stop].T, 1.0 if bias.size > 0 else 0.0", "weight[start:stop].T, 1.0",
     kernel("matmul")),
    ("matmul: bias of other columns", "kernels_cpu.py",
     "out[n, start:stop] = bias[start:stop]", "out[n, start:stop] = bias[:stop - start]", kernel("matmul")),
    ("matmul backward: dbias lost", "kernels_cpu.py",
     "add_to(dbias[start:stop], dout[n, start:stop])", "pass", kernel("matmul_backward")),
    ("matmul backward: dweight overwritten", "kernels_cpu.py",
     "dout[:, start:stop].T, inp, 1.0,", "dout[:, start:stop].T, inp, 0.0,", kernel("matmul_backward")),
    ("matmul backward: dinp added to", "kernels_cpu.py",
     "dout, weight[:, start:stop], 0.0,", "dout, weight[:, start:stop], 1.0,", kernel("matmul_backward")),
    ("matmul backward: dweight averaged over the rows", "kernels_cpu.py",
     "sgemm(dweight[start:stop], 1.0, dout", "sgemm(dweight[start:stop], 1.0 / N, dout", kernel("matmul_backward")),
    ("matmul backward: dbias overwritten", "kernels_cpu.py",
     "add_to(dbias[start:stop], dout[n, start:stop])", "dbias[start:stop] = dout[n, start:stop]", kernel("matmul_backward")),
    ("matmul backward: dbias of the first row only", "kernels_cpu.py",
     "for n in range(N):\n                    add_to(dbias", "for n in range(1):\n                    add_to(dbias",
     kernel("matmul_backward")),
    ("matmul backward: dweight of other output channels", "kernels_cpu.py",
     "dout[:, start:stop].T, inp, 1.0,", "dout[:, :stop - start].T, inp, 1.0,", kernel("matmul_backward")),
    ("matmul backward: dinp of other channels", "kernels_cpu.py",
     "dout, weight[:, start:stop], 0.0,", "dout, weight[:, :stop - start], 0.0,", kernel("matmul_backward")),

    # The product on one thread
    ("sgemm: beta applied to every block of the depth", "matmul_cpu.py",
     "keep = beta if start == 0 else np.float32(1)", "keep = beta", kernel("sgemm")),
    ("sgemm: next block of b packed one row too far", "matmul_cpu.py",
     "b[start:start + depth, column:", "b[min(start, start + 1):start + depth, column + (start > 0):", kernel("sgemm")),
    ("sgemm: rows that stick out are written", "matmul_cpu.py",
     "inside = rows == TILE_ROWS and", "inside = rows >= TILE_ROWS - 1 and", kernel("sgemm")),
    ("sgemm: columns that stick out are written", "matmul_cpu.py",
     "columns == vectors * LANES", "columns >= vectors * LANES - 3", kernel("sgemm")),
    ("sgemm: alpha forgotten where c is kept", "matmul_cpu.py",
     "build.fadd(build.fmul(alphas, sums_after[rv], flags=fused), kept", "build.fadd(sums_after[rv], kept", kernel("sgemm")),
    ("sgemm: remaining columns of a transpose not copied", "matmul_cpu.py",
     "for k in range(whole_depth if c < whole else 0, depth):", "for k in range(whole_depth, depth):", kernel("sgemm")),
    ("sgemm: transpose in one round too few", "matmul_cpu.py",
     "while distance < LANES:", "while distance < LANES // 2:", kernel("sgemm")),
    ("sgemm: c at the edge overwritten", "matmul_cpu.py",
     "(keep * part[r, j] if keep != 0 else np.float32(0))", "np.float32(0)", kernel("sgemm")),

    # Attention
    ("attention: scores not scaled", "kernels_cpu.py",
     "sgemm(p, 1.0 / np.sqrt(HS), q[start:stop]", "sgemm(p, 1.0, q[start:stop]", kernel("attention")),
    ("attention: mask lets one later key through", "kernels_cpu.py",
     "visible = position + start + i + 1", "visible = min(position + start + i + 2, end)", kernel("attention")),
    ("attention: lse without the maximum", "kernels_cpu.py",
     "largest + np.log(total)", "np.log(total)", kernel("attention")),
    ("attention: scaled by HS, not by its root", "kernels_cpu.py",
     "sgemm(p, 1.0 / np.sqrt(HS), q[start:stop]", "sgemm(p, 1.0 / HS, q[start:stop]", kernel("attention")),
    ("attention: mask by tile, not by row", "kernels_cpu.py",
     "visible = position + start + i + 1", "visible = end", kernel("attention")),
    ("attention: mask of the first tile for all", "kernels_cpu.py",
     "visible = position + start + i + 1", "visible = position + i + 1", kernel("attention")),
    ("attention: scores of hidden keys left in", "kernels_cpu.py",
     "            p[i, visible:] = 0\n        sgemm(out", "        sgemm(out", kernel("attention")),
    ("attention: keys for values", "kernels_cpu.py",
     "2 * NH + h, HS)\n        attend(", "NH + h, HS)\n        attend(", kernel("attention")),
    ("attention: queries of the first tile for all", "kernels_cpu.py",
     "q[start:stop], k[:end].T", "q[:stop - start], k[:end].T", kernel("attention")),
    ("attention: lse of every tile over the first's", "kernels_cpu.py",
     "lse[start + i] = softmax(", "lse[i] = softmax(", kernel("attention")),
    ("attention: values of the first positions only", "kernels_cpu.py",
     "sgemm(out[start:stop], 1.0, p, v[:end], 0.0", "sgemm(out[start:stop], 1.0, p[:, :stop - start], v[:stop - start], 0.0",
     kernel("attention")),
    ("attention backward: mask hides the position itself", "kernels_cpu.py",
     "visible = start + i + 1\n                row_lse", "visible = start + i\n                row_lse",
     kernel("attention_backward")),
    ("attention backward: delta missing", "kernels_cpu.py",
     "(drow[j] - delta)", "drow[j]", kernel("attention_backward")),
    ("attention backward: dq not scaled", "kernels_cpu.py",
     "sgemm(dq[start:stop], scale,", "sgemm(dq[start:stop], 1.0,", kernel("attention_backward")),
    ("attention backward: tiles overwrite each other", "kernels_cpu.py",
     "beta = 0.0 if tile == tiles - 1 else 1.0", "beta = 0.0", kernel("attention_backward")),
    ("attention backward: dk not scaled", "kernels_cpu.py",
     "sgemm(dk[:stop], scale,", "sgemm(dk[:stop], 1.0,", kernel("attention_backward")),
    ("attention backward: dv scaled", "kernels_cpu.py",
     "sgemm(dv[:stop], 1.0, p.T", "sgemm(dv[:stop], scale, p.T", kernel("attention_backward")),
    ("attention backward: dq and dk exchanged", "kernels_cpu.py",
     "dq, dk, dv = one_head(", "dk, dq, dv = one_head(", kernel("attention_backward")),
    ("attention backward: scores rebuilt without the scale", "kernels_cpu.py",
     "sgemm(p, scale, q[start:stop], k[:stop].T", "sgemm(p, 1.0, q[start:stop], k[:stop].T", kernel("attention_backward")),
    ("attention backward: delta of dout and dout", "kernels_cpu.py",
     "do[start + i, c] * o[start + i, c]", "do[start + i, c] * do[start + i, c]", kernel("attention_backward")),
    ("attention backward: delta of the first tile's rows", "kernels_cpu.py",
     "do[start + i, c] * o[start + i, c]", "do[i, c] * o[i, c]", kernel("attention_backward")),
    ("attention backward: delta without the last channel", "kernels_cpu.py",
     "for c in range(HS):\n                    delta", "for c in range(HS - 1):\n                    delta",
     kernel("attention_backward")),
    ("attention backward: lse of the first tile's rows", "kernels_cpu.py",
     "row_lse = lse[b, h, start + i]", "row_lse = lse[b, h, i]", kernel("attention_backward")),
    ("attention backward: lse of the first head", "kernels_cpu.py",
     "row_lse = lse[b, h, start + i]", "row_lse = lse[b, 0, start + i]", kernel("attention_backward")),
    ("attention backward: weights rebuilt without lse", "kernels_cpu.py",
     "row[j] = exp(row[j] - row_lse)", "row[j] = exp(row[j])", kernel("attention_backward")),
    ("attention backward: dscore not multiplied by the weight", "kernels_cpu.py",
     "drow[j] = row[j] * (drow[j] - delta)", "drow[j] = drow[j] - delta", kernel("attention_backward")),
    ("attention backward: scores of hidden keys left in dv", "kernels_cpu.py",
     "                p[i, visible:] = 0\n", "", kernel("attention_backward")),
    ("attention backward: hidden keys get a gradient", "kernels_cpu.py",
     "                dscore[i, visible:] = 0\n", "", kernel("attention_backward")),
    ("attention backward: dv from dscore", "kernels_cpu.py",
     "sgemm(dv[:stop], 1.0, p.T", "sgemm(dv[:stop], 1.0, dscore.T", kernel("attention_backward")),
    ("attention backward: dk from the first tile's queries", "kernels_cpu.py",
     "dscore.T, q[start:stop], beta", "dscore.T, q[:stop - start], beta", kernel("attention_backward")),
    ("attention backward: tiles from the first, which saw the fewest keys", "kernels_cpu.py",
     "range(tiles - 1, -1, -1)", "range(tiles)", kernel("attention_backward")),
    ("softmax: not divided by the sum", "kernels_cpu.py", "        row[j] *= factor\n", "        row[j] *= 1\n",
     kernel("attention")),
    ("softmax: largest score not subtracted", "kernels_cpu.py",
     "largest = row_max(row)\n", "largest = np.float32(0)\n", kernel("attention_with_large")),
    ("softmax: smallest score subtracted", "kernels_cpu.py", "largest = row_max(row)\n", "largest = row.min()\n",
     kernel("attention_with_large")),

    # GELU
    ("gelu: wrong constant", "kernels_cpu.py",
     "np.float32(0.044715)", "np.float32(0.04715)", kernel("gelu")),
    ("gelu: square for the cube", "kernels_cpu.py",
     "GELU_CUBIC * x * x * x)\n            out", "GELU_CUBIC * x * x)\n            out",
     kernel("gelu")),
    ("gelu: sqrt(pi / 2)", "kernels_cpu.py", "np.sqrt(2 / np.pi)", "np.sqrt(np.pi / 2)", kernel("gelu")),
    ("gelu: exponent without the 2", "kernels_cpu.py",
     "x / (np.float32(1) + exp(np.float32(-2) * u))", "x / (np.float32(1) + exp(-u))", kernel("gelu")),
    ("gelu: ReLU", "kernels_cpu.py",
     "out[n, c] = x / (np.float32(1) + exp(np.float32(-2) * u))", "out[n, c] = x if x > 0 else np.float32(0)", kernel("gelu")),
    ("gelu backward: second term dropped", "kernels_cpu.py",
     "(s + x * s * (np.float32(1) - s) * np.float32(2) * slope)", "s", kernel("gelu_backward")),
    ("gelu backward: cubic's derivative without 3", "kernels_cpu.py",
     "np.float32(3) * GELU_CUBIC", "GELU_CUBIC", kernel("gelu_backward")),
    ("gelu backward: chain rule without the 2", "kernels_cpu.py",
     "* np.float32(2) * slope)", "* slope)", kernel("gelu_backward")),
    ("gelu backward: chain rule without the inner slope", "kernels_cpu.py",
     "* np.float32(2) * slope)", "* np.float32(2))", kernel("gelu_backward")),
    ("gelu backward: product rule without x", "kernels_cpu.py",
     "(s + x * s * (np.float32(1)", "(s + s * (np.float32(1)", kernel("gelu_backward")),
    ("gelu backward: logistic slope without 1 - s", "kernels_cpu.py",
     "x * s * (np.float32(1) - s) * np.float32(2)", "x * s * np.float32(2)", kernel("gelu_backward")),
    ("gelu backward: slope without sqrt(2 / pi)", "kernels_cpu.py",
     "slope = GELU_SCALE * (", "slope = (", kernel("gelu_backward")),
    ("gelu backward: dout forgotten", "kernels_cpu.py",
     "dinp[n, c] = dout[n, c] * (s", "dinp[n, c] = (s", kernel("gelu_backward")),
    ("gelu backward: dinp added to", "kernels_cpu.py",
     "dinp[n, c] = dout[n, c] * (s", "dinp[n, c] += dout[n, c] * (s", kernel("gelu_backward")),
    ("gelu exact: probability of a number above x", "kernels_cpu.py",
     "tail if x < np.float32(0) else", "tail if x > np.float32(0) else", kernel("gelu_exact")),
    ("gelu exact: a digit of a coefficient", "kernels_cpu.py",
     "np.float32(0.2684965)", "np.float32(0.2685965)", kernel("gelu_exact")),
    ("gelu exact: variance 1/2", "kernels_cpu.py",
     "exp(np.float32(-0.5) * x * x)", "exp(-x * x)", kernel("gelu_exact")),
    ("gelu exact: tail to the digits that 1 minus it has", "kernels_cpu.py",
     "(tail if x < np.float32(0) else", "(np.floor(tail * np.float32(2**24)) / np.float32(2**24) if x < np.float32(0) else",
     kernel("gelu_exact")),
    ("gelu exact backward: density not multiplied by x", "kernels_cpu.py",
     "(probability + x * density)", "(probability + density)", kernel("gelu_exact")),
    ("gelu exact backward: density subtracted", "kernels_cpu.py",
     "(probability + x * density)", "(probability - x * density)", kernel("gelu_exact")),
    ("gelu exact backward: dout forgotten", "kernels_cpu.py",
     "dout[n, c] * (probability + x * density)", "probability + x * density", kernel("gelu_exact")),
    ("gelu exact: the tanh form's kernels compiled, too", "kernels_cpu.py",
     "unused = TANH_GELU if exact_gelu else EXACT_GELU", "unused = () if exact_gelu else EXACT_GELU", exact_gelu("compiled")),
    ("gelu exact: GPT-2 waits for its kernels", "kernels_cpu.py",
     "unused = TANH_GELU if exact_gelu else EXACT_GELU", "unused = TANH_GELU if exact_gelu else ()", exact_gelu("compiled")),
    ("exp: NaN clamped", "kernels_cpu.py",
     "(np.float32(-87) if x < np.float32(-87) else x)", "(x if x > np.float32(-87) else np.float32(-87))",
     kernel("classifier")),
    ("exp: a coefficient slightly wrong", "kernels_cpu.py",
     "np.float32(4.1665795894e-2)", "np.float32(4.18e-2)", kernel("classifier")),
    ("fastmath: NaN assumed away", "matmul_cpu.py",
     '"nsz", "arcp"}', '"nsz", "arcp", "nnan", "ninf"}', kernel("nan_comes_out or infinity_comes_out")),

    # Residual connection
    ("residual: branch subtracted", "kernels_cpu.py",
     "inp1[n, c] + inp2[n, c]", "inp1[n, c] - inp2[n, c]", kernel("residual")),
    ("residual: stream left out", "kernels_cpu.py",
     "inp1[n, c] + inp2[n, c]", "inp2[n, c]", kernel("residual")),

    # Classifier
    ("classifier: padding has probability", "kernels_cpu.py",
     "for i in range(vocab_size):\n            row[i] = exp", "for i in range(Vp):\n            row[i] = exp",
     kernel("classifier or padding")),
    ("classifier: padding has gradient", "kernels_cpu.py",
     "row[vocab_size:] = 0", "pass", kernel("classifier or padding")),
    ("classifier: maximum not taken off", "kernels_cpu.py",
     "largest = row_max(row[:vocab_size])", "largest = np.float32(0)", kernel("classifier or padding")),
    ("classifier: dloss lost", "kernels_cpu.py",
     "factor = np.float32(dloss) / total", "factor = np.float32(1) / total", kernel("classifier or padding")),
    ("classifier: target not subtracted from the gradient", "kernels_cpu.py",
     "row[target] -= np.float32(dloss)", "pass", kernel("classifier")),
    ("classifier: dloss lost at the target", "kernels_cpu.py",
     "row[target] -= np.float32(dloss)", "row[target] -= np.float32(1)", kernel("classifier")),
    ("classifier: gradient not divided by the sum", "kernels_cpu.py",
     "factor = np.float32(dloss) / total", "factor = np.float32(dloss)", kernel("classifier")),
    ("classifier: loss with the target's exponential for its logit", "kernels_cpu.py",
     "losses[n] = np.log(total) - target_logit", "losses[n] = np.log(total) - row[target]", kernel("classifier")),
    ("classifier: target's logit added to the loss", "kernels_cpu.py",
     "losses[n] = np.log(total) - target_logit", "losses[n] = np.log(total) + target_logit", kernel("classifier")),
    ("classifier: maximum subtracted from the sum only", "kernels_cpu.py",
     "target_logit = row[target] - largest", "target_logit = row[target]", kernel("classifier")),
    ("classifier: maximum of the padding, too", "kernels_cpu.py",
     "row_max(row[:vocab_size])", "row_max(row)", kernel("classifier or padding")),
    ("classifier: loss in bits", "kernels_cpu.py",
     "losses[n] = np.log(total)", "losses[n] = np.log2(total)", kernel("classifier")),

    # Optimizer
    ("global_norm: squares in float32", "kernels_cpu.py",
     "np.float64(part[i]) * np.float64(part[i])", "part[i] * part[i]", kernel("global_norm")),
    ("global_norm: root forgotten", "kernels_cpu.py", "return np.sqrt(total)", "return total", kernel("global_norm")),
    ("global_norm: last numbers left out", "kernels_cpu.py",
     "blocks = ceil_div(grads.size, size)", "blocks = max(1, grads.size // size)", kernel("global_norm")),
    ("adamw: m corrected for a step too many", "kernels_cpu.py",
     "1 - beta1 ** step", "1 - beta1 ** (step + 1)", kernel("adamw")),
    ("adamw: v not corrected", "kernels_cpu.py",
     "np.sqrt(v[i] * unbias_v)", "np.sqrt(v[i])", kernel("adamw")),
    ("adamw: epsilon inside the root", "kernels_cpu.py",
     "(np.sqrt(v[i] * unbias_v) + epsilon)", "np.sqrt(v[i] * unbias_v + epsilon)", kernel("adamw")),
    ("adamw: no decay", "kernels_cpu.py",
     " + decay * params[i]", "", kernel("adamw")),
    ("adamw: gradients not cleared", "kernels_cpu.py",
     "grads[i] = 0", "pass", kernel("adamw")),
    ("adamw: m not corrected", "kernels_cpu.py",
     "np.float32(learning_rate / (1 - beta1 ** step))", "np.float32(learning_rate)", kernel("adamw")),
    ("adamw: v keeps as much as m", "kernels_cpu.py",
     "keep_v, take_v = np.float32(beta2)", "keep_v, take_v = np.float32(beta1)", kernel("adamw")),
    ("adamw: gradient not squared in v", "kernels_cpu.py", "take_v * g * g", "take_v * g", kernel("adamw")),
    ("adamw: gradient not scaled", "kernels_cpu.py", "g = grads[i] * scale", "g = grads[i]", kernel("adamw")),
    ("adamw: gradient not scaled in v", "kernels_cpu.py", "take_v * g * g", "take_v * grads[i] * grads[i]", kernel("adamw")),
    ("adamw: decay without the learning rate", "kernels_cpu.py",
     "decay = np.float32(learning_rate * weight_decay)", "decay = np.float32(weight_decay)", kernel("adamw")),
    ("adamw: decay added to the gradient, as in Adam", "kernels_cpu.py",
     "g = grads[i] * scale", "g = grads[i] * scale + np.float32(weight_decay) * params[i]", kernel("adamw")),

    # Model
    ("model: PyTorch's beta2", "gpt2.py",
     "BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8", "BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8", PARAMETERS),
    ("model: biases decay", "train_gpt2.py",
     "weight_decay if name in WEIGHT_DECAYED else 0.0", "weight_decay", PARAMETERS),
    ("model: position embedding does not decay", "gpt2.py",
     "WEIGHT_DECAYED = MATRICES", "WEIGHT_DECAYED = MATRICES[:1] + MATRICES[2:]", PARAMETERS),
    ("model: final layernorm with another's weight", "train_gpt2.py",
     "acts.residual3[-1], params.lnfw, params.lnfb)", "acts.residual3[-1], params.ln1w[0], params.lnfb)",
     ACTIVATIONS),
    ("model: last classifier chunk left out", "gpt2.py",
     "for start in range(0, rows, size)", "for start in range(0, rows - size + 1, size)", TRAINING),
    ("model: logits of the first token, not the last", "train_gpt2.py",
     "self.acts.lnf[-1:]", "self.acts.lnf[:1]", TRAINING),
    ("model: every block reads the embedding", "train_gpt2.py",
     "residual = acts.residual3[l - 1] if l > 0 else acts.encoded\n        kernels", "residual = acts.encoded\n        kernels",
     ACTIVATIONS),
    ("model: attention reads the residual stream without layernorm", "train_gpt2.py",
     "kernels.matmul_forward(acts.qkv[l], acts.ln1[l],", "kernels.matmul_forward(acts.qkv[l], residual,", ACTIVATIONS),
    ("model: attention added to the normalized stream", "train_gpt2.py",
     "kernels.residual_forward(acts.residual2[l], residual, proj)",
     "kernels.residual_forward(acts.residual2[l], acts.ln1[l], proj)",
     ACTIVATIONS),
    ("model: second layernorm of the block's input", "train_gpt2.py",
     "acts.residual2[l], params.ln2w[l], params.ln2b[l])", "residual, params.ln2w[l], params.ln2b[l])", ACTIVATIONS),
    ("model: MLP reads the residual stream without layernorm", "train_gpt2.py",
     "kernels.matmul_forward(acts.fch[l], acts.ln2[l],", "kernels.matmul_forward(acts.fch[l], acts.residual2[l],", ACTIVATIONS),
    ("model: first layer's MLP weight for all", "train_gpt2.py",
     "params.fcw[l], params.fcb[l], workspace)", "params.fcw[0], params.fcb[l], workspace)", ACTIVATIONS),
    ("model: GELU left out", "train_gpt2.py",
     "kernels.matmul_forward(proj, acts.fch_gelu[l],", "kernels.matmul_forward(proj, acts.fch[l],", ACTIVATIONS),
    ("model: tanh form for GELU itself", "train_gpt2.py",
     "kernels.gelu_exact_forward if self.config.exact_gelu else kernels.gelu_forward", "kernels.gelu_forward",
     exact_gelu("test_training")),
    ("model: MLP added to the block's input", "train_gpt2.py",
     "kernels.residual_forward(acts.residual3[l], acts.residual2[l], proj)",
     "kernels.residual_forward(acts.residual3[l], residual, proj)",
     ACTIVATIONS),
    ("model: final layernorm of the first block", "train_gpt2.py",
     "acts.residual3[-1], params.lnfw, params.lnfb)", "acts.residual3[0], params.lnfw, params.lnfb)", ACTIVATIONS),
    ("model backward: final layernorm with another's weight", "train_gpt2.py",
     "acts.lnf_rstd, acts.residual3[-1], params.lnfw)", "acts.lnf_rstd, acts.residual3[-1], params.ln1w[0])", GRADIENTS),
    ("model backward: residual branch dropped", "train_gpt2.py",
     "gelu_backward(dfch, dfch, acts.fch[l])", "gelu_backward(dfch, dfch, acts.fch[l]); dresidual[...] = 0",
     GRADIENTS),
    ("model backward: residual of the wrong layer", "train_gpt2.py",
     "            residual = acts.residual3[l - 1] if l > 0 else acts.encoded\n            if",
     "            residual = acts.residual3[l]\n            if",
     GRADIENTS),
    ("model backward: old dresidual left in", "train_gpt2.py",
     "dresidual[...] = 0\n", "pass\n", "test_gpt2.py"),
    ("model backward: token embedding used once", "train_gpt2.py",
     "kernels.encoder_backward(grads.wte,", "kernels.encoder_backward(np.zeros_like(grads.wte),", GRADIENTS),
    ("model backward: not divided by the micro-batches", "train_gpt2.py",
     "1 / (N * accumulation_steps)", "1 / N", TRAINING),
    ("model backward: wte's gradient as the classifier's weight lost", "train_gpt2.py",
     "kernels.matmul_backward(dln[rows], grads.wte,", "kernels.matmul_backward(dln[rows], np.zeros_like(grads.wte),",
     GRADIENTS),
    ("model backward: classifier's gradient of the first chunk's rows", "train_gpt2.py",
     "logits, acts.lnf[rows], params.wte, workspace)", "logits, acts.lnf[:len(logits)], params.wte, workspace)", BATCHING),
    ("model backward: targets of the first chunk for all", "train_gpt2.py",
     "logits, targets[rows],\n", "logits, targets[:len(logits)],\n", BATCHING),
    ("model backward: blocks in forward order", "train_gpt2.py",
     "for l in reversed(range(L)):", "for l in range(L):", GRADIENTS),
    ("model backward: fcprojw's gradient from before the GELU", "train_gpt2.py",
     "dresidual, acts.fch_gelu[l], params.fcprojw[l]", "dresidual, acts.fch[l], params.fcprojw[l]", GRADIENTS),
    ("model backward: GELU's gradient left out", "train_gpt2.py",
     "gelu_backward(dfch, dfch, acts.fch[l])", "pass", GRADIENTS),
    ("model backward: tanh form for GELU itself", "train_gpt2.py",
     "kernels.gelu_exact_backward if self.config.exact_gelu else kernels.gelu_backward", "kernels.gelu_backward",
     exact_gelu("test_training")),
    ("model: only the tanh form compiled before training", "train_gpt2.py",
     "channels=1, exact_gelu=exact_gelu)", "channels=1)", exact_gelu("compiled")),
    ("model backward: GELU's slope at its output", "train_gpt2.py",
     "gelu_backward(dfch, dfch, acts.fch[l])", "gelu_backward(dfch, dfch, acts.fch_gelu[l])", GRADIENTS),
    ("model backward: fcw's gradient from the first layernorm", "train_gpt2.py",
     "dfch, acts.ln2[l], params.fcw[l], workspace)", "dfch, acts.ln1[l], params.fcw[l], workspace)", GRADIENTS),
    ("model backward: first block's fcw collects the gradients of all", "train_gpt2.py",
     "kernels.matmul_backward(dln, grads.fcw[l],", "kernels.matmul_backward(dln, grads.fcw[0],", GRADIENTS),
    ("model backward: second layernorm with the first's mean and rstd", "train_gpt2.py",
     "dln, acts.ln2_mean[l], acts.ln2_rstd[l],", "dln, acts.ln1_mean[l], acts.ln1_rstd[l],", GRADIENTS),
    ("model backward: second layernorm of the block's output", "train_gpt2.py",
     "acts.ln2_rstd[l], acts.residual2[l],", "acts.ln2_rstd[l], acts.residual3[l],", GRADIENTS),
    ("model backward: stream around attention dropped", "train_gpt2.py",
     "kernels.attention_backward(dqkv, datt, acts.att[l]",
     "dresidual[...] = 0; kernels.attention_backward(dqkv, datt, acts.att[l]",
     GRADIENTS),
    ("model backward: attention's output of the block before", "train_gpt2.py",
     "kernels.attention_backward(dqkv, datt, acts.att[l],", "kernels.attention_backward(dqkv, datt, acts.att[l - 1],",
     GRADIENTS),
    ("model backward: position embedding gets no gradient", "train_gpt2.py",
     "kernels.encoder_backward(grads.wte, grads.wpe,", "kernels.encoder_backward(grads.wte, np.zeros_like(grads.wpe),",
     GRADIENTS),
    ("initialization: residual projections not smaller", "gpt2.py",
     "std = 0.02 / np.sqrt(2 * config.num_layers) if name in RESIDUAL_PROJECTIONS else 0.02", "std = 0.02", TRAINING),
    ("initialization: padding rows not zero", "gpt2.py",
     "params.wte[config.vocab_size:] = 0", "pass", TRAINING),

    # Training loop
    ("loop: loss not divided by the micro-batches", "train_gpt2.py",
     "model.backward(targets, options.accumulation_steps) / options.accumulation_steps",
     "model.backward(targets, options.accumulation_steps)", TRAINING),
    ("loop: clipping inverted", "train_gpt2.py",
     "grad_clip / norm if", "norm / grad_clip if", TRAINING),
    ("loop: short gradients stretched", "train_gpt2.py",
     "if 0 < grad_clip < norm else 1.0", "if 0 < grad_clip else 1.0", TRAINING),
    ("loop: an infinite norm updates the weights", "train_gpt2.py",
     "if not math.isfinite(norm):", "if math.isnan(norm):", TRAINING),
    ("loop: NaN not noticed", "training.py",
     "if all(map(math.isfinite, values.values())):", "if not any(value > 1e30 for value in values.values()):", TRAINING),
    ("loop: single batch not repeated", "train_gpt2.py",
     "if options.overfit_single_batch:", "if False:", TRAINING),
    ("loop: validation continues where it stopped", "train_gpt2.py",
     "loader.reset()\n    steps", "steps", TRAINING),
    ("loop: learning rate of the next step", "train_gpt2.py",
     "rate = learning_rate(step, n,", "rate = learning_rate(step + 1, n,", TRAINING),
    ("schedule: warm-up starts at zero", "training.py",
     "peak * step / warmup_iters", "peak * (step - 1) / warmup_iters", TRAINING),
    ("schedule: cosine ends too high", "training.py",
     "(step - warmup_iters) / (num_iterations - warmup_iters)", "(step - warmup_iters) / num_iterations", TRAINING),
    ("schedule: decays to zero, not to the final rate", "training.py",
     "lowest + (peak - lowest) * height", "peak * height", TRAINING),

    # Data
    ("data: rank ignored", "dataloader.py",
     "self.offset = rank * batch_size * sequence_length", "self.offset = 0", DATA),
    ("data: targets not shifted", "dataloader.py",
     "targets = tokens[1:]", "targets = tokens[:-1]", DATA),
    ("data: last target read past the end", "dataloader.py",
     "position + self.step_tokens + 1 > shard", "position + self.step_tokens > shard", DATA),
    ("data: every epoch in the same order", "dataloader.py",
     "default_rng([seed, epoch])", "default_rng([seed, 0])", DATA),
    ("data: order of another seed", "dataloader.py",
     "default_rng([seed, epoch])", "default_rng([0, epoch])", DATA),
    ("data: an epoch begins with its second file", "dataloader.py",
     "else (epoch + 1, 0)", "else (epoch + 1, min(1, len(self.shards) - 1))", DATA),
    ("data: fingerprint of the first two tokens only", "dataloader.py",
     'size.to_bytes(8, "little") + self.read(0, n).tobytes() + self.read(size - n, size).tobytes()',
     "self.read(0, 2).tobytes()", DATA),

    # Runs that last
    ("resume: moments exchanged", "checkpoint.py", "for name, moment in zip(MOMENTS, moments)",
     "for name, moment in zip(MOMENTS, moments[::-1])", resuming("is_the_uninterrupted_one")),
    ("resume: all checkpoints kept", "checkpoint.py", "[:-keep]", "[:0]", resuming("every_so_often")),
    ("resume: the latest is deleted", "checkpoint.py", "[:-keep]", "[-keep:]", resuming("every_so_often")),
    ("resume: checkpoint not written atomically", "checkpoint.py", "with atomic_folder(path) as folder:",
     "path.mkdir(parents=True)\n    for folder in [path]:", resuming("full_disk or killed")),
    ("resume: half-written folder left behind", "files.py",
     "        shutil.rmtree(unfinished, ignore_errors=True)\n\n\n@contextlib", "        pass\n\n\n@contextlib",
     resuming("full_disk")),
    ("resume: moments unpickled", "checkpoint.py", "    with open_file(path, REPAIR_HINT) as file:\n",
     "    return np.load(path, allow_pickle=True)\n    with open_file(path, REPAIR_HINT) as file:\n",
     resuming("damaged and pickle")),
    ("resume: moments of another model", "checkpoint.py", "if shape != (size,) or dtype", "if dtype", resuming("damaged")),
    ("resume: unfinished run replaced", "training.py", "if not checkpoint:\n        check_unfinished(",
     "if False:\n        check_unfinished(", resuming("does_not_replace")),
    ("resume: loaded tensors stay in memory", "train_gpt2.py", "del params, moments ", "params, moments ",
     resuming("stay_in_memory")),
    ("resume: other tokens accepted", "training.py", "if state[\"fingerprint\"] != fingerprint:",
     "if False:",
     resuming("other_tokens")),
    ("resume: other seed accepted", "training.py", "\"total_batch_size\", \"seed\", ", "\"total_batch_size\", ",
     resuming("must_not_change")),
    ("resume: log starts over", "training.py", "read_log(output_dir / \"log.csv\", done) if done else []", "[]",
     resuming("is_the_uninterrupted_one")),
    ("resume: log keeps steps that are repeated", "training.py", "if row[\"step\"] <= done]", "]", resuming("log_goes_on")),
    ("resume: position in the data forgotten", "train_gpt2.py", "    train_loader.set_state(progress.data)\n", "",
     resuming("is_the_uninterrupted_one")),
    ("resume: a step is left out", "train_gpt2.py",
     "range(progress.step + 1, n + 1)", "range(progress.step + 1 + (progress.step > 0), n + 1)",
     resuming("is_the_uninterrupted_one")),
    ("resume: prefetched batch lost", "train_gpt2_gpu.py", "return self.upcoming_state",
     "return self.loader.state",
     resuming("gpu_program")),
    ("resume: stopped without a checkpoint", "train_gpt2.py", "step, n) or stopped:", "step, n):",
     resuming("is_the_uninterrupted_one")),
    ("resume: worse model kept as the best", "train_gpt2.py", "if val_loss < progress.best_val_loss:", "if True:",
     resuming("best_model")),
    ("outliers: window too long", "training.py", "    del window[0]\n", "", TRAINING),
    ("outliers: update not skipped", "training.py", "if 0 < limit < score:", "if 0 < limit < -score:", TRAINING),
    ("outliers: gradients not cleared", "train_gpt2.py", "            model.grads.flat[...] = 0\n", "            pass\n",
     TRAINING),
    ("recompute: nothing recomputed", "train_gpt2.py", "if self.recompute and l + 1 < L:", "if False:",
     TRAINING),
    ("recompute: no memory saved", "gpt2.py", "L = 1 if recompute else layers", "L = layers", TRAINING),
    ("cuda recompute: nothing recomputed", "train_gpt2_gpu.py", "if self.recompute and l + 1 < L:", "if False:",
     whole_cuda("recomputed")),

    # CUDA: building blocks
    ("cuda load: end of an odd row lost", GPU,
     "four.x[k] = i + k < length ? row[i + k] : 0;", "four.x[k] = i + k + 1 < length ? row[i + k] : 0;", cuda("encoder")),
    ("cuda load: read past the end of an odd row", GPU,
     "four.x[k] = i + k < length ? row[i + k] : 0;", "four.x[k] = row[i + k];", cuda("gelu")),
    ("cuda load: 16 bytes at a time from odd rows", GPU,
     "((length % 4 == 0) &&", "((length % 4 <= 1) &&", cuda("encoder")),
    ("cuda store: written past the end of an odd row", GPU,
     "if (i + k < length) row[i + k] = four.x[k];", "row[i + k] = four.x[k];", cuda("gelu")),
    ("cuda warp_sum: half of the lanes missing", GPU,
     "distance < 32; distance *= 2) value +=", "distance < 16; distance *= 2) value +=", cuda("layernorm")),
    ("cuda warp_max: half of the lanes missing", GPU,
     "distance < 32; distance *= 2) value = fmaxf", "distance < 16; distance *= 2) value = fmaxf", cuda("attention")),
    ("cuda block_sum: barrier before the sum dropped", GPU,
     "    if (lane == 0) warps[warp] = value;\n    __syncthreads();\n", "    if (lane == 0) warps[warp] = value;\n",
     cuda("layernorm")),
    ("cuda block_sum: barrier before the next sum dropped", GPU,
     "    __syncthreads();                                    // a slower warp may still be reading the sum before this one\n",
     "", cuda("layernorm")),
    ("cuda block_sum: last warp missing", GPU,
     "lane < blockDim.x / 32 ? warps[lane] : Number(0)", "lane < blockDim.x / 32 - 1 ? warps[lane] : Number(0)",
     cuda("layernorm")),
    ("cuda softmax: sum not scaled to a larger maximum", GPU,
     "float sum = seen.sum * expf(seen.largest - largest);", "float sum = seen.sum;", cuda("attention")),
    ("cuda softmax: warps' sums not scaled to the largest", GPU,
     "warp_sum(seen.sum * expf(seen.largest - largest))", "warp_sum(seen.sum)", cuda("attention")),
    ("cuda block_softmax: barrier dropped", GPU,
     "    if (lane == 0) warps[warp] = seen;\n    __syncthreads();\n", "    if (lane == 0) warps[warp] = seen;\n",
     cuda("classifier")),
    ("cuda sum_over_y: barrier dropped", GPU,
     "half /= 2) {\n        __syncthreads();\n", "half /= 2) {\n", cuda("matmul")),
    ("cuda sum_over_y: last pair of rows not added", GPU,
     "half = blockDim.y / 2; half > 0;", "half = blockDim.y / 2; half > 1;", cuda("matmul")),
    ("cuda column_sums: last rows left out", GPU,
     "rounds = (N - first + step - 1) / step;", "rounds = (N - first) / step;", cuda("matmul")),
    ("cuda column_sums: rows summed by several blocks", GPU,
     "step = parts * blockDim.y,", "step = blockDim.y,", cuda("matmul")),
    ("cuda column_sums: gradient overwritten", GPU,
     "        if (accumulate) sum += fours.load(out_row, c);\n", "", cuda("matmul")),
    ("cuda column_sums: guard of the columns off by one", GPU,
     "    if (c < C) {\n        #pragma", "    if (c <= C) {\n        #pragma", cuda("matmul")),

    # CUDA: encoder
    ("cuda encoder: position of another row", GPU,
     "wpe + (size_t)(n % T) * C", "wpe + (size_t)(n / T) * C", cuda("encoder")),
    ("cuda encoder: guard off by one", GPU,
     "c < C; c += 4 * blockDim.x) {\n        Four sum = fours.load(token_row",
     "c <= C; c += 4 * blockDim.x) {\n        Four sum = fours.load(token_row",
     cuda("encoder")),
    ("cuda encoder backward: every row starts a run", GPU,
     "    if (first > 0 && tokens[order[first - 1]] == token) return;\n", "", cuda("encoder")),
    ("cuda encoder backward: a run has no end", GPU,
     "i < N && tokens[order[i]] == token; i +=", "i < N; i +=", cuda("encoder")),
    ("cuda encoder backward: end of the last run not seen", GPU,
     "i < N && tokens[order[i]] == token; i +=", "tokens[order[i]] == token; i +=", cuda("encoder")),
    ("cuda encoder backward: dwte overwritten", GPU,
     "        sum += fours.load(dwte + (size_t)token * C, c);\n", "", cuda("encoder")),
    ("cuda encoder backward: rows unsorted", GPU,
     "fours.load(dout + (size_t)order[i] * C, c)", "fours.load(dout + (size_t)i * C, c)", cuda("encoder")),
    ("cuda encoder backward: wrong stride between sequences", GPU,
     "n < N; n += T)", "n < N; n += T + 1)", cuda("encoder")),

    # CUDA: layernorm
    ("cuda layernorm: variance of the numbers past an odd row", GPU,
     "squares += c + k < C ? (x.x[k] - m) * (x.x[k] - m) : 0;", "squares += (x.x[k] - m) * (x.x[k] - m);", cuda("layernorm")),
    ("cuda layernorm: columns after a block's first round left out", GPU,
     "c < C; c += 4 * blockDim.x) {\n        Four x = fours.load(inp1",
     "c < C; c += C) {\n        Four x = fours.load(inp1", cuda("layernorm")),
    ("cuda layernorm: bias of the projection lost", GPU,
     "        y += inp2_bias ? fours.load(inp2_bias, c) : Four{};\n", "", cuda("layernorm")),
    ("cuda layernorm: missing bias read", GPU,
     "inp2_bias ? fours.load(inp2_bias, c) : Four{}", "fours.load(inp2_bias, c)", cuda("layernorm")),
    ("cuda layernorm: too little shared memory", GPU,
     "weight, bias, N, C, shared_bytes=16 * ceil_div(C, 4))", "weight, bias, N, C, shared_bytes=4 * C)", cuda("layernorm")),
    ("cuda layernorm backward: dinp overwritten", GPU,
     "sum.x[k] += r * dnorm;", "sum.x[k] = r * dnorm;", cuda("layernorm")),
    ("cuda layernorm backward: mean term dropped", GPU,
     "r * (dnorm_mean + norm", "r * (norm", cuda("layernorm")),
    ("cuda layernorm backward: dbias_parts not cleared", GPU,
     "dweight[i] = dbias[i] = Four{};", "dweight[i] = Four{};", cuda("layernorm")),
    ("cuda layernorm backward: sums of a block's last row only", GPU,
     "dw.x[k] += d.x[k] * x.x[k];", "dw.x[k] = d.x[k] * x.x[k];", cuda("layernorm")),

    # CUDA: matrix product
    ("cuda matmul: bias lost", GPU,
     "    if bias.size > 0:\n", "    if bias.size < 0:\n", cuda("matmul")),
    ("cuda matmul backward: dweight overwritten", GPU,
     "device.gemm(dweight, 1.0, dout.T, inp, 1.0)", "device.gemm(dweight, 1.0, dout.T, inp, 0.0)",
     cuda("matmul")),

    # CUDA: attention
    ("cuda attention: wrong stride of the heads", GPU,
     "rows.reshape(B, N // B, NH, C // NH).transpose(0, 2, 1, 3)", "rows.reshape(B, NH, N // B, C // NH)", cuda("attention")),
    ("cuda attention: sum takes one later key in", GPU,
     "fours.load(p, j), last + 1 - j)", "fours.load(p, j), last + 2 - j)", cuda("attention")),
    ("cuda attention: weight for one later key", GPU,
     "score.x[k] = j + k <= last ?", "score.x[k] = j + k <= last + 1 ?", cuda("attention")),
    ("cuda attention: scores right of the diagonal left in", GPU,
     "for (int j = 4 * lane; j < S; j += 4 * 32) {\n        Four score",
     "for (int j = 4 * lane; j <= last; j += 4 * 32) {\n        Four score",
     cuda("attention")),
    ("cuda attention: guard of the rows off by one", GPU,
     "    if (row >= NH * T) return;\n    float* p", "    if (row > NH * T) return;\n    float* p", cuda("attention")),
    ("cuda attention: guard of the rows missing", GPU,
     "    if (row >= NH * T) return;\n    float* p", "    float* p", cuda("attention")),
    ("cuda attention backward: guard of the rows off by one", GPU,
     "    if (row >= NH * T) return;\n    int HS", "    if (row > NH * T) return;\n    int HS", cuda("attention")),
    ("cuda attention backward: delta of dout alone", GPU,
     "delta += dout[head + c] * out[head + c];", "delta += dout[head + c] * dout[head + c];", cuda("attention")),
    ("cuda attention backward: delta of another head", GPU,
     "(size_t)i * C + row / T * HS", "(size_t)i * C + row % NH * HS", cuda("attention")),
    ("cuda attention backward: lanes of delta not summed", GPU,
     "    delta = warp_sum(delta);\n", "", cuda("attention")),
    ("cuda attention backward: dscore right of the diagonal", GPU,
     "dx.x[k] = j + k <= i ? x.x[k] * (dx.x[k] - delta) : 0;", "dx.x[k] = x.x[k] * (dx.x[k] - delta) + j;", cuda("attention")),
    ("cuda attention backward: dk not scaled", GPU,
     "device.gemm(dk, scale,", "device.gemm(dk, 1.0,", cuda("attention")),
    ("cuda decode matvec: bias lost", GPU, "sum + (bias ? bias[o] : 0)", "sum", cuda("matvec")),
    ("cuda decode matvec: rows read past the last", GPU, "if (first + r >= N) break;", "", cuda("matvec")),
    ("cuda decode matvec: rows past the fourth left out", GPU, "(ceil_div(OC, 8), ceil_div(N, 4))", "(ceil_div(OC, 8), 1)",
     cuda("matvec")),
    ("cuda decode matvec: last columns left out", GPU, "(ceil_div(OC, 8), ceil_div(N, 4))", "(OC // 8 or 1, ceil_div(N, 4))",
     cuda("matvec")),
    ("cuda decode matvec: guard of the columns off by one", GPU, "if (o >= OC) return;", "if (o > OC) return;", cuda("matvec")),
    ("cuda decode matvec: lanes not summed", GPU, "float sum = warp_sum(sums[r]);", "float sum = sums[r];", cuda("matvec")),
    ("cuda decode attention: own key not cached", GPU, "        keys[(size_t)position * HS + c] = k[c];\n", "", cuda("cached")),
    ("cuda decode attention: value stored one position late", GPU, "values[(size_t)position * HS + c] = v[c];",
     "values[(size_t)(position + 1) * HS + c] = v[c];", cuda("cached")),
    ("cuda decode attention: keys for values", GPU, "*v = k + (size_t)NH * HS;", "*v = k;", cuda("cached")),
    ("cuda decode attention: another head's query", GPU, "3 * NH + head % NH) * HS", "3 * NH + head / B) * HS", cuda("cached")),
    ("cuda decode attention: scores not scaled", GPU, "score[j] = scale * sum;", "score[j] = sum;", cuda("cached")),
    ("cuda decode attention: own key not seen", GPU, "for (int j = warp; j <= position; j += warps) {\n        float sum",
     "for (int j = warp; j < position; j += warps) {\n        float sum", cuda("cached")),
    ("cuda decode attention: own value not seen",
     GPU, "for (int j = warp; j <= position; j += warps) {\n                Four value",
     "for (int j = warp; j < position; j += warps) {\n                Four value", cuda("cached")),
    ("cuda decode attention: own score not in the sum", GPU, "see(seen, scores[j / 4], position + 1 - j)",
     "see(seen, scores[j / 4], position - j)", cuda("cached")),
    ("cuda decode attention: barrier behind the cache dropped", GPU,
     "= v[c];\n    }\n    __syncthreads();\n", "= v[c];\n    }\n", cuda("cached")),
    ("cuda decode attention: barrier behind the scores dropped", GPU,
     "score[j] = scale * sum;\n    }\n    __syncthreads();\n", "score[j] = scale * sum;\n    }\n", cuda("cached")),
    ("cuda decode attention: barrier between rounds dropped", GPU,
     "        __syncthreads();                                    // the round before may still be summing\n", "",
     cuda("cached")),
    ("cuda decode attention: weights do not sum to 1", GPU,
     "        for (int i = 0; i < 4; i++) sum.x[i] /= seen.sum;\n", "", cuda("cached")),
    ("cuda decode attention: prompt sees one later key", GPU, "last = S - T + row % T;", "last = S - T + row % T + 1;",
     cuda("cached")),
    ("cuda decode attention: prompt sees itself only", GPU, "last = S - T + row % T;", "last = row % T;", cuda("cached")),
    ("cuda decode attention: prompt's values not cached", GPU,
     "        v[:, position:] = qkv[b, 2 * NH:]\n", "", cuda("cached")),
    ("cuda decode attention: prompt's scores not scaled", GPU, "device.gemm(scores, scale, qkv[b, :NH]",
     "device.gemm(scores, 1.0, qkv[b, :NH]", cuda("cached")),
    ("cuda decode attention: more scores than shared memory holds", GPU, "T == 1 and end <= 8192", "T == 1",
     cuda("cached or room")),
    ("cuda decode: positions from 0", "generate_gpt2_gpu.py", "params.wpe[position:end])", "params.wpe[:T])",
     cuda_decoding("cached_forward")),
    ("cuda decode: first layer's cache for all", "generate_gpt2_gpu.py", "self.keys[l, :B]", "self.keys[0, :B]",
     cuda_decoding("cached_forward")),
    ("cuda decode: residual connection skips attention", "generate_gpt2_gpu.py",
     "acts.residual2, acts.proj, params.fcprojb[l]", "acts.residual, acts.proj, params.fcprojb[l]",
     cuda_decoding("cached_forward")),
    ("cuda decode: final layernorm with a block's weights", "generate_gpt2_gpu.py",
     "else (params.lnfw, params.lnfb)", "else (params.ln1w[l], params.ln1b[l])", cuda_decoding("cached_forward")),
    ("cuda decode: final layernorm a block too early", "generate_gpt2_gpu.py", "if l + 1 < L else", "if l + 2 < L else",
     cuda_decoding("cached_forward")),
    ("cuda decode: MLP's bias lost", "generate_gpt2_gpu.py", "acts.fch, params.fcb[l])", "acts.fch, 0 * params.fcb[l])",
     cuda_decoding("cached_forward")),
    ("cuda decode: padding scored", "generate_gpt2_gpu.py", "0.0, self.config.vocab_size)", "0.0, self.config.vocab_size - 1)",
     cuda_decoding("mean_loss")),

    # CUDA: GELU
    ("cuda gelu: bias not saved", GPU,
     "        fours.store(inp_row, c, x);\n        for (int k = 0; k < 4; k++) x.x[k] *= gelu_gate",
     "        for (int k = 0; k < 4; k++) x.x[k] *= gelu_gate", cuda("gelu")),
    ("cuda gelu backward: guard missing", GPU,
     "    if (i >= size) return;\n" + FOURS_OF_GELU + "s =", FOURS_OF_GELU + "s =", cuda("gelu")),
    ("cuda gelu backward: guard off by one", GPU,
     "    if (i >= size) return;\n" + FOURS_OF_GELU + "s =", "    if (i > size) return;\n" + FOURS_OF_GELU + "s =",
     cuda("gelu")),
    ("cuda gelu backward: a block too few", GPU,
     "device.launch(\"gelu_backward\", ceil_div(inp.size, 4 * 256),", "device.launch(\"gelu_backward\", inp.size // (4 * 256),",
     cuda("gelu")),
    ("cuda gelu exact: bias not saved", GPU,
     "        fours.store(inp_row, c, x);\n        for (int k = 0; k < 4; k++) x.x[k] *= normcdff",
     "        for (int k = 0; k < 4; k++) x.x[k] *= normcdff", cuda("gelu_exact")),
    ("cuda gelu exact: 1 + erf, which is 0 in the lower tail", GPU,
     "x.x[k] *= normcdff(x.x[k]);", "x.x[k] *= 0.5f * (1 + erff(0.70710678f * x.x[k]));", cuda("gelu_exact")),
    ("cuda gelu exact backward: guard missing", GPU,
     "    if (i >= size) return;\n" + FOURS_OF_GELU + "density", FOURS_OF_GELU + "density", cuda("gelu_exact")),
    ("cuda gelu exact backward: variance 1/2", GPU,
     "expf(-0.5f * x.x[k] * x.x[k])", "expf(-x.x[k] * x.x[k])", cuda("gelu_exact")),
    ("cuda gelu exact backward: product rule without x", GPU,
     "+ x.x[k] * density", "+ density", cuda("gelu_exact")),
    ("cuda gelu exact backward: a block too few", GPU,
     "device.launch(\"gelu_exact_backward\", ceil_div(inp.size, 4 * 256),",
     "device.launch(\"gelu_exact_backward\", inp.size // (4 * 256),", cuda("gelu_exact")),

    # CUDA: classifier
    ("cuda classifier: target read after it is overwritten", GPU,
     "logf(seen.sum) - (target_logit - seen.largest)", "logf(seen.sum) - (row[target] - seen.largest)",
     cuda("classifier")),
    ("cuda classifier: one padding column has probability", GPU,
     "fours.load(row, i), vocab_size - i)", "fours.load(row, i), vocab_size + 1 - i)", cuda("classifier or padding")),
    ("cuda classifier: one padding column has gradient", GPU,
     "i + k < vocab_size ? expf", "i + k <= vocab_size ? expf", cuda("classifier or padding")),
    ("cuda classifier: padding not cleared", GPU,
     "i < Vp; i += 4 * blockDim.x", "i < vocab_size; i += 4 * blockDim.x", cuda("classifier or padding")),
    ("cuda classifier: dloss lost", GPU,
     "float factor = dloss / seen.sum;", "float factor = 1 / seen.sum;", cuda("classifier")),
    ("cuda mean loss: total overwritten", GPU,
     "total[0] += scale * sum;", "total[0] = scale * sum;", cuda("mean_loss")),

    # CUDA: optimizer
    ("cuda norm: squares in float32", GPU,
     "sum += (double)g.x[k] * g.x[k];", "sum += g.x[k] * g.x[k];", cuda("global_norm")),
    ("cuda norm: blocks overlap", GPU,
     "i += (size_t)4 * blocks * blockDim.x", "i += (size_t)4 * blocks", cuda("global_norm")),
    ("cuda norm: a part too many", GPU,
     "threadIdx.x < blocks ? parts", "threadIdx.x <= blocks ? parts", cuda("global_norm")),
    ("cuda adamw: update despite a NaN norm", GPU,
     "if (!(norm[0] <= FLOAT_MAX)) return;", "if (norm[0] > FLOAT_MAX) return;", cuda("adamw")),
    ("cuda adamw: short gradients stretched", GPU,
     "0 < grad_clip && grad_clip < norm[0] ?", "0 < grad_clip ?", cuda("adamw")),
    ("cuda adamw: no clipping clips all", GPU,
     "0 < grad_clip && grad_clip < norm[0] ?", "grad_clip < norm[0] ?", cuda("adamw")),
    ("cuda adamw: gradients not cleared", GPU,
     "    fours.store(grads, i, Four{});\n", "", cuda("adamw")),
    ("cuda adamw: epsilon inside the root", GPU,
     "(sqrtf(v4.x[k] * unbias_v) + epsilon)", "sqrtf(v4.x[k] * unbias_v + epsilon)", cuda("adamw")),

    # CUDA: the passes
    ("cuda passes: GELU's gradient left out", "train_gpt2_gpu.py",
     "gelu_backward(dfch, dfch, acts.fch[l])", "pass", whole_cuda("gradients")),
    ("cuda passes: tanh form for GELU itself", "train_gpt2_gpu.py",
     "kernels.bias_gelu_exact_forward if self.config.exact_gelu else kernels.bias_gelu_forward", "kernels.bias_gelu_forward",
     exact_gelu("training_on")),
    ("cuda passes: the tanh form's slope for GELU itself", "train_gpt2_gpu.py",
     "kernels.gelu_exact_backward if self.config.exact_gelu else kernels.gelu_backward", "kernels.gelu_backward",
     exact_gelu("training_on")),
    ("cuda passes: layernorm's input of another block", "train_gpt2_gpu.py",
     "            residual = acts.residual3[l - 1] if l > 0 else acts.encoded\n            if",
     "            residual = acts.residual3[l]\n            if",
     whole_cuda("gradients")),
    ("cuda passes: gradient of the last batch left in dresidual", "train_gpt2_gpu.py",
     "        dresidual[...] = 0\n", "", whole_cuda("gradients")),
    ("cuda passes: decay on all tensors", "train_gpt2_gpu.py",
     "weight_decay if name in WEIGHT_DECAYED else 0.0", "weight_decay", whole_cuda("parameters")),
    ("cuda passes: loss of the last chunk lost", "gpt2.py",
     "return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]",
     "return [slice(start, start + size) for start in range(0, rows - size + 1, size)]", whole_cuda("chunks")),
    ("cuda batches: returns the next one", "train_gpt2_gpu.py",
     "        inputs, targets = self.upcoming\n        self.fetch()\n",
     "        self.fetch()\n        inputs, targets = self.upcoming\n",
     whole_cuda("prefetched")),
    ("cuda memory: moments forgotten", "gpt2.py",
     "4 * (2 * parameters + 2 * ceil_div(parameters, processes)", "4 * (2 * parameters", whole_cuda("memory_needed")),

    # Checkpoints
    ("checkpoint: prefix kept", "hugging_face.py",
     "own = name.removeprefix(prefixes[0])", "own = name", checkpoints("test_prefixes")),
    ("checkpoint: square projection not transposed", "hugging_face.py",
     'TRANSPOSED = ("qkvw", "attprojw", ', 'TRANSPOSED = ("qkvw", ', checkpoints("logits_of_transformers")),
    ("checkpoint: weights of two layernorms exchanged", "hugging_face.py",
     '"ln1w": "h.{layer}.ln_1.weight"', '"ln1w": "h.{layer}.ln_2.weight"', checkpoints("names_of_any_file")),
    ("checkpoint: causal masks are unknown tensors", "hugging_face.py",
     "elif not CAUSAL_MASKS.fullmatch(own):", "else:", checkpoints("names_of_any_file")),
    ("checkpoint: a transposed strip too few", "model_files.py",
     "in chunks(len(view), strip)]", "in chunks(len(view) // strip * strip, strip)]", checkpoints("names_of_any_file or half")),
    ("checkpoint: bfloat16 in the lower half", "model_files.py",
     "bits <<= 16", "bits <<= 15", checkpoints("half_precision")),
    ("checkpoint: classifier not compared", "hugging_face.py",
     "tensor is wte or tensor.equals(wte)", "True", checkpoints("damaged_safetensors")),
    ("checkpoint: only the first shard", "model_files.py",
     "return [folder / shard for shard in sorted(set(shards))]", "return [folder / shards[0]]", checkpoints("test_shards")),
    ("checkpoint: shards from anywhere", "model_files.py",
     're.fullmatch(r"[\\w.-]+\\.safetensors", shard)',
     're.fullmatch(r".+\\.safetensors", shard)', checkpoints("index_of_shards")),
    ("checkpoint: heads guessed otherwise", "hugging_face.py",
     "C // CHANNELS_PER_HEAD, C))))", "1, C))))", checkpoints("without_its_config")),
    ("checkpoint: a folder needs no config.json", "model_files.py",
     'weight_files(path), path / "config.json")', "weight_files(path), None)", checkpoints("round_trip")),
    ("checkpoint: architecture not checked", "hugging_face.py",
     'if settings.get("model_type", "gpt2") != "gpt2":', "if False:", checkpoints("config_of_another")),
    ("checkpoint: activation not checked", "hugging_face.py",
     "TANH_GELUS + EXACT_GELUS,", 'TANH_GELUS + EXACT_GELUS + ("relu",),', checkpoints("config_of_another")),
    ("checkpoint: epsilon not checked", "hugging_face.py",
     '"layer_norm_epsilon": (1e-5,),', '"layer_norm_epsilon": (1e-5, 1e-6),', checkpoints("config_of_another")),
    ("checkpoint: n_inner not checked", "hugging_face.py",
     '{**SUPPORTED_SETTINGS, "n_inner": (4 * config.channels,)}', "SUPPORTED_SETTINGS", checkpoints("config_of_another")),
    ("checkpoint: absent settings refused", "hugging_face.py",
     "settings.get(name, choices[0])", "settings.get(name)", checkpoints("equivalent_config")),
    ("checkpoint: sizes may be zero", "hugging_face.py",
     "not 1 <= size < 2**31", "not 0 <= size < 2**31", checkpoints("config_of_another or llmc")),
    ("checkpoint: heads need not divide channels", "hugging_face.py",
     "if C % NH != 0:", "if False:", checkpoints("config_of_another")),
    ("checkpoint: vocabulary not padded", "hugging_face.py",
     "padded_vocab_size=ceil_div(V, 128) * 128", "padded_vocab_size=V // 128 * 128 + 128", checkpoints("round_trip")),
    ("checkpoint: layers not counted", "hugging_face.py",
     "{layers: (count_layers(tensors), \"layers\")}", "{}", checkpoints("test_config_of_another_model and more")),
    ("checkpoint: missing names not listed", "hugging_face.py",
     "missing = [name for name in shapes if name not in tensors]", "missing = []", checkpoints("damaged_safetensors")),
    ("checkpoint: unknown tensors ignored", "hugging_face.py",
     "unknown = [name for name in tensors if name not in shapes]", "unknown = []",
     checkpoints("damaged_safetensors")),
    ("checkpoint: shapes not compared", "hugging_face.py",
     "if name in tensors and (tensors[name].shape != shape or", "if name in tensors and (", checkpoints("damaged_safetensors")),
    ("checkpoint: byte count not compared", "hugging_face.py",
     "if tensors[name].size != expected:", "if False:", checkpoints("damaged_safetensors")),
    ("checkpoint: all tensors held while they are converted", "model_files.py",
     "    for name, view in stored_views(config, params):\n",
     "    held = [tensor.data.copy() for tensor in tensors.values()]\n"
     "    for name, view in stored_views(config, params):\n",
     checkpoints("in_memory_twice")),
    ("checkpoint: tensors may overlap", "model_files.py",
     "if begin != position:", "if begin > position:", checkpoints("damaged_safetensors")),
    ("checkpoint: file's length not compared", "model_files.py",
     "if start + position != size:", "if False:", checkpoints("damaged_safetensors")),
    ("checkpoint: offsets reversed", "model_files.py",
     "and begin <= end < 2**63", "and end < 2**63", checkpoints("damaged_safetensors")),
    ("checkpoint: header as long as it says", "model_files.py",
     "if start > min(size, 8 + MAX_JSON_BYTES):", "if start > size:", checkpoints("damaged_safetensors")),
    ("checkpoint: tensors twice", "model_files.py",
     "if name in stored:", "if False:", checkpoints("damaged_safetensors")),
    ("checkpoint: deep JSON", "model_files.py",
     "except (ValueError, RecursionError) as error:", "except ValueError as error:", checkpoints("damaged_json")),
    ("checkpoint: JSON of any size", "model_files.py",
     "if size > MAX_JSON_BYTES:", "if False:", checkpoints("damaged_json")),
    ("checkpoint: JSON no object", "model_files.py",
     "if not isinstance(value, dict):", "if False:", checkpoints("damaged_json")),
    ("checkpoint: values over several lines", "hugging_face.py",
     "isinstance(value, str) and value.isprintable() and", "isinstance(value, str) and", checkpoints("config_of_another")),
    ("checkpoint: pickles unexplained", "model_files.py",
     '    b"\\x80": PICKLE,\n', "", checkpoints("pickle")),
    ("checkpoint: Git LFS unexplained", "model_files.py",
     'b"version https://git-lfs":', 'b"version http://git-lfs":', checkpoints("damaged_safetensors")),
    ("checkpoint: the hub before the disk", "model_files.py",
     "if os.path.exists(name):", "if os.path.isfile(name):", checkpoints("precedence")),
    ("checkpoint: the hub asked for paths", "model_files.py",
     'or name.endswith((".bin", ".safetensors")):', ":", checkpoints("precedence")),
    ("checkpoint: the hub's errors let through", "model_files.py",
     "except Exception as error:", "except OSError as error:", checkpoints("no_hub")),
    ("checkpoint: pickles fetched", "model_files.py",
     'HUB_FILES = ["config.json", ', 'HUB_FILES = ["pytorch_model.bin", ', checkpoints("from_the_hub")),
    ("checkpoint: format not said", "model_files.py",
     'metadata = {"format": "pt"} |', "metadata = {} |", checkpoints("follows_the_format")),
    ("checkpoint: header not aligned", "model_files.py",
     'header += b" " * (-len(header) % 8)', 'header += b""', checkpoints("follows_the_format")),
    ("checkpoint: saved without prefix", "model_files.py",
     'header[f"transformer.{name}"]', "header[name]", checkpoints("follows_the_format")),
    ("checkpoint: saved transposed", "model_files.py",
     "yield np.ascontiguousarray(view)", 'yield np.asfortranarray(view).tobytes("A")',
     checkpoints("follows_the_format or round_trip")),
    ("checkpoint: no vocabulary, no model", "model_files.py",
     'print(f"{folder} gets no tokenizer: {error}")\n        return {}', "raise",
     checkpoints("vocabulary_is_unavailable")),
    ("checkpoint: llm.c's padding kept", "model_files.py",
     "params.wte[config.vocab_size:] = 0", "pass", checkpoints("padding_rows")),
    ("checkpoint: llm.c's file written to", "model_files.py",
     'mode="c", offset', 'mode="r+", offset', checkpoints("llmc_float32")),
    ("checkpoint: llm.c's padding not checked", "model_files.py",
     "if padded != config.padded_vocab_size:", "if False:", checkpoints("damaged_llmc")),
    ("checkpoint: llm.c's length not checked", "model_files.py",
     "if size != expected:", "if False:", checkpoints("damaged_llmc or harmless")),
    ("checkpoint: llm.c's header not checked", "files.py",
     "if len(header) < HEADER_BYTES:", "if False:", checkpoints("damaged_llmc")),
    ("checkpoint: llm.c's version not checked", "files.py",
     "if version not in versions:", "if False:", checkpoints("damaged_llmc")),
    ("checkpoint: llm.c's versions exchanged", "model_files.py",
     "(4 if version == 3 else 2)", "(2 if version == 3 else 4)", checkpoints("llmc")),
    ("checkpoint: bfloat16 ties up", "model_files.py",
     "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16", "(bits + 0x8000) >> 16", checkpoints("rounding")),
    ("checkpoint: bfloat16 loses NaN", "model_files.py",
     "np.where(np.isnan(values), 0x7FC0, rounded)", "rounded", checkpoints("rounding")),
    ("checkpoint: all of a long buffer saved", "model_files.py",
     "for _, tensor in params.items():", "for tensor in [params.flat]:", checkpoints("longer_buffer")),
    ("model files: wrappers' names kept", "model_files.py",
     'name = WRAPPERS.sub("", name)', "pass", checkpoints("wrapped_layers")),
    ("model files: two models read as one", "hugging_face.py",
     "if len(prefixes) > 1:", "if False:", checkpoints("damaged_safetensors")),
    ("model files: no model described", "hugging_face.py",
     "if not prefixes:", "if not (prefixes := prefixes or ['']):", checkpoints("damaged_safetensors")),
    ("model files: heads with GPT-2's prefix refused", "hugging_face.py",
     " or UNUSED.fullmatch(own):", ":", checkpoints("heads_are_left_out")),
    ("model files: what has another prefix refused", "hugging_face.py",
     "elif not name.startswith(prefixes[0]) or ", "elif ", checkpoints("heads_are_left_out")),
    ("model files: heads left out without a word", "model_files.py",
     "    if others:\n", "    if False:\n", checkpoints("heads_are_left_out")),
    ("model files: adapters left out", "hugging_face.py",
     "if re.search(pattern, name):", "if False:", checkpoints("changes_the_computation")),
    ("model files: another classifier left out", "hugging_face.py",
     "if others[name].shape == shape}", "if False}", checkpoints("test_classifiers")),
    ("model files: classifier's bias ignored", "hugging_face.py",
     "not any(part.any() for part in tensor.parts())", "True", checkpoints("changes_the_computation")),
    ("model files: no wte, no model", "hugging_face.py",
     'tensors.setdefault("wte.weight", tensor)', "pass", checkpoints("test_prefixes")),
    ("model files: a setting that is null", "hugging_face.py",
     "for name, value in settings.items() if value is not None}", "for name, value in settings.items()}",
     checkpoints("equivalent_config")),
    ("model files: general names unread", "hugging_face.py",
     "for other in (name, *others) if", "for other in (name,) if", checkpoints("equivalent_config")),
    ("model files: general names first", "hugging_face.py",
     "for other in (name, *others) if", "for other in (*others, name) if", checkpoints("equivalent_config")),
    ("model files: defaults of a larger model", "hugging_face.py",
     '(12, "num_hidden_layers")', '(24, "num_hidden_layers")', checkpoints("default_sizes")),
    ("model files: GELU taken for its approximation", "hugging_face.py",
     'exact_gelu=settings["activation_function"] in EXACT_GELUS', "exact_gelu=False", checkpoints("exact_gelu")),
    ("model files: GELU saved as its approximation", "hugging_face.py",
     "(EXACT_GELUS if config.exact_gelu else TANH_GELUS)[0]", "TANH_GELUS[0]", checkpoints("exact_gelu")),
    ("model files: GELU in llm.c's format", "model_files.py",
     "if config.exact_gelu:", "if False:", checkpoints("exact_gelu")),
    ("model files: scores divided by the number from 0", "hugging_face.py",
     "/ (l + 1 if by_layer else 1)", "/ (max(l, 1) if by_layer else 1)", checkpoints("folded_into_the_queries")),
    ("model files: keys scaled too", "hugging_face.py",
     "params.qkvw[l, :C] *= scale", "params.qkvw[l, :2 * C] *= scale", checkpoints("folded_into_the_queries")),
    ("model files: biases of queries not scaled", "hugging_face.py",
     "        params.qkvb[l, :C] *= scale\n", "", checkpoints("folded_into_the_queries")),
    ("model files: scales folded in twice after a kill", "model_files.py",
     "read_json(config_path)) != (config, GPT2_SCALES)", "read_json(config_path))[0] != config",
     checkpoints("no_scales_twice")),
    ("model files: a single missing bias is zero", "hugging_face.py",
     "and ours not in found]", "and HUGGING_FACE_NAMES[ours].format(layer=0) not in tensors]",
     checkpoints("biases_that_no_layer_has")),
    ("model files: the last bias is zero", "hugging_face.py",
     'return [] if missing == ["lnfb"] else missing', "return missing", checkpoints("biases_that_no_layer_has")),
    ("model files: assumed heads not mentioned", "model_files.py",
     "    if settings is None:\n        note(", "    if False:\n        note(", checkpoints("without_its_config")),
    ("model files: a variant's shards unread", "model_files.py",
     'folder.glob("model.safetensors.index.*.json")', "()", checkpoints("what_is_in_a_folder")),
    ("model files: an adapter is a model", "model_files.py",
     ' if not path.match("adapter_model.*"))', ")", checkpoints("what_is_in_a_folder")),
    ("model files: folders inside not found", "model_files.py",
     "    if inner:\n", "    if False:\n", checkpoints("what_is_in_a_folder")),
    ("model files: damage called another model", "hugging_face.py",
     "            hint = REPAIR_HINT\n", "            hint = OTHER_HINT\n", checkpoints("biases_that_no_layer_has")),
    ("model files: n_ctx not written", "hugging_face.py",
     '        "n_ctx": config.max_seq_len,        # llama.cpp\'s converter needs it\n', "", checkpoints("follows_the_format")),
    ("model files: float64 read as float32", "hugging_face.py",
     '"F64": "<f8"', '"F64": "<f4"', checkpoints("other_precisions")),
    ("model files: float64 warns", "model_files.py",
     'np.errstate(over="ignore")', "np.errstate()", checkpoints("other_precisions")),

    # Generating text
    ("decoder: positions of a new token counted from 0", "generate_gpt2.py",
     "params.wpe[position:end])", "params.wpe[:T])", generating("cached_forward")),
    ("decoder: window re-read from a token too late", "generate_gpt2.py",
     "length - max(1, self.config.max_seq_len // 2), 0", "length - max(1, self.config.max_seq_len // 2 - 1), 0",
     generating("growing")),
    ("decoder: values of a shared prompt not broadcast", "generate_gpt2.py",
     "            self.values[:, 1:, :, :self.length] = self.values[:, :1, :, :self.length]\n", "", generating("same_prompt")),
    ("decoder: windows of a scored text do not overlap", "generate_gpt2.py",
     "scored, start = end, end - T // 2", "scored, start = end, end", generating("mean_loss")),
    ("decoder: kernel for many rows from two rows on", "generate_gpt2.py",
     "kernels.matvec_forward if len(inp) <= MEMORY_BOUND_ROWS", "kernels.matvec_forward if len(inp) == 1",
     generating("batch_equals")),
    ("decoder: tanh form for GELU itself", "generate_gpt2.py",
     "kernels.gelu_exact_forward if exact_gelu else kernels.gelu_forward\n", "kernels.gelu_forward\n",
     exact_gelu("test_decoder")),
    ("decoder: tanh form for GELU itself, of few rows", "generate_gpt2.py",
     "kernels.gelu_exact_forward_on_one_thread if exact_gelu else kernels.gelu_forward_on_one_thread",
     "kernels.gelu_forward_on_one_thread", exact_gelu("test_decoder")),
    ("decoder: only the tanh form compiled", "generate_gpt2.py",
     "                    exact_gelu=exact_gelu)", "                    exact_gelu=False)", exact_gelu("compiled")),
    ("cuda decoder: tanh form for GELU itself", "generate_gpt2_gpu.py",
     "kernels.bias_gelu_exact_forward if self.config.exact_gelu else kernels.bias_gelu_forward", "kernels.bias_gelu_forward",
     exact_gelu("decoder_on")),
    ("decoder: text not flushed", "generate_gpt2.py",
     'print(text, end="", flush=True)\n\n    start, length', 'print(text, end="")\n\n    start, length', generating("appears")),
    ("decoder: text printed at the end", "generate_gpt2.py",
     "write(i, streams[i].add(token))", "streams[i].waiting += streams[i].add(token)", generating("appears")),
    ("decoder: NaN not noticed", "generate_gpt2.py",
     "if not np.isfinite(logits).all():", "if np.isinf(logits).any():", generating("not_numbers")),
    ("decoder: first layer's cache for all", "generate_gpt2.py",
     "self.keys[l, :B], self.values[l, :B]", "self.keys[0, :B], self.values[0, :B]", generating("cached_forward")),
    ("decoder: cached positions not counted", "generate_gpt2.py", "        self.length = end\n", "",
     generating("cached_forward")),
    ("decoder: logits after the first new token, not the last", "generate_gpt2.py",
     "rows[:, -1].copy()", "rows[:, 0].copy()", generating("growing")),
    ("decoding attention: new key not cached", "kernels_cpu.py",
     "k[position:] = one_head(", "k[position:] = 0 * one_head(", decoding("attention")),
    ("decoding attention: new queries see the new keys only", "kernels_cpu.py",
     "visible = position + start + i + 1", "visible = start + i + 1", decoding("attention")),
    ("decoding attention: new value not cached", "kernels_cpu.py",
     "v[position:] = one_head(", "v[position:] = 0 * one_head(", decoding("attention")),
    ("decoding attention: key cached as the value", "kernels_cpu.py",
     "v[position:] = one_head(qkv, b, T, 2 * NH + h, HS)", "v[position:] = one_head(qkv, b, T, NH + h, HS)",
     decoding("attention")),
    ("decoding attention: one query's weights not from softmax", "kernels_cpu.py",
     "            softmax(p)\n", "", decoding("attention")),
    ("decoding attention: one query does not see its own value", "kernels_cpu.py",
     "for j in range(position + 1):\n                value", "for j in range(position):\n                value",
     decoding("attention")),
    ("decoding attention: one query's scores not scaled", "kernels_cpu.py",
     "p[j] = scale * score", "p[j] = score", decoding("attention")),
    ("decoding attention: one query adds to what was there", "kernels_cpu.py",
     "            average[:] = 0\n", "", decoding("attention")),
    ("few rows: the rest of a row left out", "matmul_cpu.py",
     "for c in range(C // QUANT_GROUP * QUANT_GROUP, C):", "for c in range(C, C):", decoding("product_against")),
    ("few rows: bias lost", "matmul_cpu.py",
     "rest = bias[o + i] if bias.size > 0 else np.float32(0)", "rest = np.float32(0)", decoding("product_against")),
    ("few rows: only the first four", "matmul_cpu.py",
     "for n in range(0, N, INPUT_ROWS):", "for n in range(0, min(N, 4), INPUT_ROWS):", decoding("product_against")),
    ("few rows: a single row adds in another order", "matmul_cpu.py",
     "for v in range(0, QUANT_GROUP, LANES):\n        number",
     "for v in sorted(range(0, QUANT_GROUP, LANES), reverse=len(input_rows) == 1):\n"
     "        number", decoding("depend_on")),
    ("int8: one scale for a whole row", "matmul_cpu.py",
     "scales[o + i, c // QUANT_GROUP] if scales", "scales[o + i, 0] if scales", decoding("product_against")),
    ("int8: the first row's scale for all", "matmul_cpu.py",
     "fmul(sums[n, i], scales[i]", "fmul(sums[n, i], scales[0]", decoding("product_against")),
    ("int8: rounded down", "kernels_cpu.py",
     "to_127 + np.float32(0.5)", "to_127", decoding("nearest")),
    ("int8: NaN becomes 0", "kernels_cpu.py",
     "return largest * np.float32(0)", "return np.float32(0)", decoding("finite or extremes")),
    ("sampling: largest logit not subtracted", "sampling.py",
     "(logits - logits.max()) /", "logits /", SAMPLING),
    ("sampling: penalty raises negative logits", "sampling.py",
     "logits[seen] * penalty", "logits[seen] / penalty", SAMPLING),
    ("sampling: top-p keeps too little", "sampling.py",
     "before < p", "before <= p - 0.1", SAMPLING),
    ("sampling: top-k keeps one token too many", "sampling.py",
     "np.partition(logits, -k)[-k]", "np.partition(logits, -k)[-k - 1]", SAMPLING),
    ("sampling: excluded tokens keep their probability", "sampling.py",
     "generator.random() * cumulative[-1]", "generator.random()", SAMPLING),
    ("sampling: logits multiplied by the temperature", "sampling.py",
     "(logits - logits.max()) /", "(logits - logits.max()) *", SAMPLING),

    # HellaSwag
    ("hellaswag: losses summed, not divided by the length", "hellaswag.py",
     "length].mean(dtype=np.float64)", "length].sum(dtype=np.float64)", scoring("choices_of_transformers")),
    ("hellaswag: context scored, too", "hellaswag.py",
     "losses[b, length - scored[i]:length]", "losses[b, :length]", scoring("choices_of_transformers")),
    ("hellaswag: first token of a completion not scored", "hellaswag.py",
     "losses[b, length - scored[i]:length]", "losses[b, min(length - 1, length - scored[i] + 1):length]",
     scoring("choices_of_transformers")),
    ("hellaswag: padding scored", "hellaswag.py",
     "losses[b, length - scored[i]:length]", "losses[b, length - scored[i]:]", scoring("choices_of_transformers")),
    ("hellaswag: too long a row loses a token too many", "hellaswag.py",
     "[-1 - sequence_length:]", "[-sequence_length:]", scoring("choices_of_transformers or shorter")),
    ("hellaswag: targets not shifted", "hellaswag.py",
     "rows[i][:-1], rows[i][1:]", "rows[i][:-1], rows[i][:-1]", scoring("choices_of_transformers")),
    ("hellaswag: last of equals chosen", "hellaswag.py",
     "sequence_length).argmin(axis=1)", "sequence_length)[:, ::-1].argmin(axis=1) * -1 + 3", scoring("equal")),
    ("hellaswag: NaN is a score", "hellaswag.py",
     "if not np.isfinite(means).all():", "if False:", scoring("finite or damaged")),
    ("hellaswag: progress never done", "hellaswag.py",
     "            bar.update()\n", "", scoring("progress")),
    ("hellaswag: longest example not in the header", "hellaswag.py",
     "max(map(len, contents), default=0)", "0", scoring("follows_the_format")),
    ("hellaswag: no examples accepted", "hellaswag.py", "if not 1 <= num_examples", "if not 0 <= num_examples",
     scoring("damaged_file")),
    ("hellaswag: vocabulary not checked", "hellaswag.py", "if largest >= vocab_size:", "if largest > vocab_size:",
     scoring("damaged_file")),
    ("hellaswag: what follows the examples ignored", "hellaswag.py", "if rest > 0:", "if False:",
     scoring("damaged_file")),
    ("hellaswag: index not checked", "hellaswag.py", "(start, found, completions) != (EXAMPLE_START, index, COMPLETIONS)",
     "(start, completions) != (EXAMPLE_START, COMPLETIONS)", scoring("damaged_file")),
    ("hellaswag: label 4 accepted", "hellaswag.py", "if label >= COMPLETIONS:", "if label > COMPLETIONS:",
     scoring("damaged_file")),
    ("hellaswag: example may go beyond the file", "hellaswag.py", "or size > 2 * len(words):", "or False:",
     scoring("damaged_file")),
    ("hellaswag: text may go beyond its example", "hellaswag.py", "if not 1 <= length < len(rest):", "if not 1 <= length:",
     scoring("damaged")),
    ("hellaswag: texts not counted", "hellaswag.py", "if len(texts) != 1 + COMPLETIONS:", "if False:", scoring("damaged_file")),
    ("hellaswag: oversized example written", "hellaswag.py", "if max(size, len(examples)) > MAX_UINT16:",
     "if len(examples) > MAX_UINT16:", scoring("limits")),
    ("data: order drawn for every batch", "dataloader.py", "@lru_cache(maxsize=1)      #", "#", DATA),
    ("data: token file's magic not checked", "files.py", "if found != magic:", "if False:", DATA),
    ("prepare text: <|endoftext|> cut apart", "prepare_text.py",
     "PARTIAL_ENDING.search(text, len(text) - len(SEPARATOR) + 1).start()", "len(text)", preparing("no_cut_inside")),
    ("prepare text: line end cut apart", "prepare_text.py", '(\\r|<[|a-z]*)?', '(<[|a-z]*)?', preparing("no_cut_inside")),
    ("prepare text: endless word after a < never cut", "prepare_text.py", "len(text) - len(SEPARATOR) + 1)", "0)",
     preparing("place_to_cut")),
    ("prepare text: another text's shards deleted", "dataloader.py", 'r"_train_\\d{6,}', 'r"_train_.*\\d{6,}',
     preparing("earlier_text")),
    ("prepare text: leftovers of a killed process stay", "prepare_text.py",
     "            delete_unfinished(name.parent, glob.escape(new.name))\n", "", preparing("killed_process")),
    ("prepare text: half a character accepted", "prepare_text.py", "        text.encode() ", "        text ",
     preparing("unusable_file")),
    ("errors: output folder neither tried nor locked", "training.py",
     'with locked_folder("--output-dir", output_dir) if world.rank == 0 else nullcontext():', "with nullcontext():",
     erring("cannot_be_written")),
    ("errors: every process locks the output folder", "training.py",
     'with locked_folder("--output-dir", output_dir) if world.rank == 0 else nullcontext():',
     'with locked_folder("--output-dir", output_dir):', erring("process_that_writes")),
    ("errors: output folder stays, though empty", "files.py", "                path.rmdir()\n", "                pass\n",
     erring("leaves_nothing")),
    ("errors: dangling link taken for a free name", "files.py", "os.path.lexists(path)", "os.path.exists(path)",
     erring("cannot_be_written")),
    ("evaluate: cache of the last batch kept", "dev/evaluate.py", "decoder.length = 0 ", "pass ",
     scoring("choices_of_transformers")),
    ("evaluate: later rows forgotten", "dev/evaluate.py", "chunks(len(rows), CLASSIFIER_ROWS)]",
     "chunks(len(rows), CLASSIFIER_ROWS)][::-1]",
     scoring("choices_of_transformers")),
    ("prepare hellaswag: no space before an ending", "dev/prepare_hellaswag.py", '" " + ending', "ending", scoring("prepared")),
    ("prepare hellaswag: label not checked", "dev/prepare_hellaswag.py",
     "if type(label) is not int or not 0 <= label < COMPLETIONS:",
     "if False:", scoring("unusable")),
    ("prepare hellaswag: another download is fine", "dev/prepare_hellaswag.py", "if sha256(contents) != SHA256:", "if False:",
     scoring("download")),
    ("prepare hellaswag: the rest not downloaded", "dev/prepare_hellaswag.py", "ceil_div(SIZE, PIECE_BYTES)",
     "SIZE // PIECE_BYTES",
     scoring("download")),
    ("prepare hellaswag: lines counted from 0", "dev/prepare_hellaswag.py", "enumerate(lines, 1)", "enumerate(lines)",
     scoring("unusable")),
    ("prepare hellaswag: line ends of Unicode end lines", "dev/prepare_hellaswag.py",
     'contents.removesuffix(b"\\n").split(b"\\n")', '[each.encode() for each in contents.decode().splitlines()]',
     scoring("prepared_examples")),
    # plot_runs
    ("plot: incomplete last line read", "dev/plot_runs.py", 'text.split("\\n")[:-1]', 'text.split("\\n")', PLOTTING),
    ("plot: mean of later steps", "dev/plot_runs.py", "starts = np.maximum(ends - window, 0)",
     "starts = np.maximum(ends - window - 1, 0)", PLOTTING),
    ("plot: seconds not added up", "dev/plot_runs.py", 'seconds += row.get("milliseconds", 0.0) / 1000',
     'seconds = row.get("milliseconds", 0.0) / 1000', PLOTTING),
    ("plot: validation out of sight", "dev/plot_runs.py",
     "run.validation[run.validation[:, 0] >= tenth, 2]]", "[]]", PLOTTING),
    ("plot: steep fall in sight", "dev/plot_runs.py", "smooth[run.training[:, 0] >= tenth]", "smooth", PLOTTING),
    ("plot: numbers of any size", "dev/plot_runs.py", "0 <= value <= MAX_NUMBER", "0 <= value", PLOTTING),
    ("plot: names may be the same", "dev/plot_runs.py", "if len({run.name for run in runs}) < len(runs):", "if False:",
     PLOTTING),
    ("plot: columns taken by position", "dev/plot_runs.py", "zip(columns, fields) if field and name in COLUMNS",
     "zip(COLUMNS, fields) if field", PLOTTING),
    ("plot: names are formulas", "dev/plot_runs.py", "text=label, parse_math=False", "text=label", PLOTTING),

    # Faults of the machine, and files that are not what they should be
    ("output: its failure ends a run that can do without", "cli.py",
     "if self.required and isinstance(error, OSError):", "if isinstance(error, OSError):", faults("outlives_its_output")),
    ("output: failure with status 0", "cli.py", 'status, line = 1, f"{program}: error: cannot write standard output',
     'status, line = 0, f"{program}: error: cannot write standard output', faults("before_output_fails")),
    ("output: closed streams stay closed", "cli.py", "    reopen_closed_streams()\n", "", faults("outlives_its_output")),
    ("output: what is buffered is written at exit", "cli.py",
     "os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())", "pass", faults("outlives_its_output")),
    ("output: a failure at the end has a traceback", "cli.py", "        output.required = False\n", "", faults("all_there_is")),
    ("signals: a second one waits, too", "training.py", "        self.signal = signum\n        self.__exit__()\n",
     "        self.signal = signum\n", faults("second_ctrl_c")),
    ("weights: the best model is not checked", "checkpoint.py", "            check_weights(step, params)\n", "",
     faults("best_model")),
    ("resume: a moment of another shape", "checkpoint.py", "shape != (size,) or", "math.prod(shape) != size or",
     "dev/tests/test_checkpoint.py -k damaged"),
    ("resume: a moment with more bytes", "checkpoint.py", "!= 4 * size:", "< 4 * size:",
     "dev/tests/test_checkpoint.py -k damaged"),
    ("resume: infinity in the log", "training.py", "if not all(map(math.isfinite, row.values())):", "if False:",
     "dev/tests/test_checkpoint.py -k damaged"),
    ("resume: checkpoints in order of their names", "checkpoint.py", ", key=step_of)", ")",
     "dev/tests/test_checkpoint.py -k in_order"),
    ("resume: a cut line of the log stays", "training.py", "            del lines[-1]\n", "            pass\n",
     "dev/tests/test_checkpoint.py -k cut_in_its_step"),
    ("data: a place in the unshuffled order", "dataloader.py",
     "position <= self.shards[self.shard_order(epoch)[done]].num_tokens", "position <= self.shards[done].num_tokens",
     faults("shuffled_files")),
    ("model: a short read is accepted", "model_files.py", "if len(numbers) < count:", "if False:",
     faults("model_file_that_shrinks")),
    ("machine: total memory for free memory", "machine.py", "if needed > free:", "if needed > total:", faults("not_free")),
    ("machine: no quota is a quota", "machine.py", "if quota and quota > 0 else", "if quota else", faults("may_be_used")),
    ("machine: affinity ignored", "machine.py", "len(os.sched_getaffinity(0)) if", "os.cpu_count() if", faults("may_be_used")),
    ("machine: threads for the whole machine", "kernels_cpu.py", "min(cores, usable_cores())", "cores", faults("may_be_used")),
    ("output: Ctrl-C while importing has a traceback", "cli.py", "sys.excepthook = interrupted", "_ = interrupted",
     faults("while_importing")),
    ("output: any failure stops the run", "training.py",
     'isinstance(getattr(sys.stdout, "failure", None), BrokenPipeError)', 'getattr(sys.stdout, "failure", None)',
     faults("outlives_its_output")),
    ("output: reader that left not noticed", "training.py", "return 141 if isinstance", "return 0 if isinstance",
     faults("outlives_its_output")),
    ("numbers: no largest one", "cli.py", "LARGEST[kind] if high is None", "math.inf if high is None",
     faults("largest_numbers")),
    ("signals: hangup noticed though ignored", "training.py", "and signal.getsignal(number) == signal.SIG_IGN)", "and False)",
     faults("hangup_that_is_ignored")),
    ("signals: hangup kills", "training.py", '"SIGINT", "SIGTERM", "SIGHUP" ', '"SIGINT", "SIGTERM" ', faults("test_hangup")),
    ("lock: its file stays", "files.py", "            path.unlink()\n        with contextlib.suppress(OSError):\n", "",
     erring("leaves_nothing")),
    ("lock: granted to everybody", "files.py", "except (BlockingIOError, PermissionError):\n        return False",
     "except (BlockingIOError, PermissionError):\n        return True", faults("belongs_to_one_preparation")),
    ("lock: held by the dead", "files.py", "if try_lock(file):", "if not file.read(1) and try_lock(file):",
     faults("belongs_to_one_run")),
    ("lock: never waited for", "files.py", "        if not wait:\n", "        if True:\n", faults("lock_waits")),
    ("lock: holder unnamed", "files.py", "            file.flush()\n        yield", "        yield",
     faults("belongs_to_one_preparation")),
    ("lock: follows links", "files.py", 'getattr(os, "O_NOFOLLOW", 0)', "0", faults("links")),
    ("lock: a second preparation does not ask", "prepare_text.py", "with made_folder(name.parent), lock_data(name):",
     "with made_folder(name.parent):", faults("belongs_to_one_preparation")),
    ("leftovers: those of running processes deleted", "files.py", " and (locked or not is_running(int(process[1])))", "",
     faults("running_processes")),
    ("leftovers: every process is running", "files.py", "except ProcessLookupError:\n        return False",
     "except ProcessLookupError:\n        return True", faults("running_processes")),
    ("leftovers: of files of all names", "files.py", 'folder.glob(f"{name}.*.tmp")', 'folder.glob("*.tmp")',
     preparing("killed_process")),
    ("leftovers: of the run stay", "training.py", "            delete_leftovers(output_dir)\n", "", faults("killed_run")),
    ("leftovers: of the best model stay", "checkpoint.py", '(output_dir, output_dir / "best"):\n        for name',
     "(output_dir,):\n        for name", faults("killed_run")),
    ("files: devices are read", "files.py", "if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) and stream):",
     "if stat.S_ISFIFO(mode) and not stream:", faults("pipes_and_devices")),
    ("files: pipes refused where they are welcome", "files.py", " or stat.S_ISFIFO(mode) and stream", "",
     faults("a_pipe_is_read_once")),
    ("machine: memory limit of cgroups 2 overlooked", "machine.py", 'folder / "memory.max", ', "", faults("limits")),
    ("machine: memory limit of cgroups 1 overlooked", "machine.py", ', folder / "memory.limit_in_bytes"', "", faults("limits")),
    ("machine: the last cgroup's limit counts", "machine.py", "min(free, max(0, limit - used", "max(0, min(limit - used",
     faults("limits")),
    ("machine: half a core is none", "machine.py", "(math.ceil(quota) for folder", "(int(quota) for folder", faults("limits")),
    ("machine: cores of cgroups 1 unlimited", "machine.py", "return quota / period if quota and quota > 0 else None",
     "return None", faults("limits")),
    ("machine: pages of files not free", "machine.py", " + reclaimable(folder)", "", faults("limits")),
    ("machine: own cgroup only", "machine.py", "in (own, *own.parents)", "in (own,)", faults("limits")),
    ("machine: top cgroup only", "machine.py", "in (own, *own.parents)", "in (top,)", faults("limits")),
    ("machine: one kind of limit per tree", "machine.py", 'kind in kinds.split(",")', "kind == kinds", faults("limits")),
    ("state: negative numbers", "checkpoint.py", "type(value) is int and 0 <= value <", "type(value) is int and value <",
     resuming("damaged and data")),
    ("state: outliers' window of any length", "checkpoint.py", "isinstance(value, list) and len(value) <= OUTLIER_WINDOW",
     "isinstance(value, list)", resuming("damaged and latest_losses")),
    ("state: infinite losses", "checkpoint.py", "type(number) is float and abs(number) <= LARGEST[float]", "True",
     resuming("damaged and latest_losses")),
    ("state: place in the data of two numbers", "checkpoint.py", " and len(value) == 3 and", " and",
     resuming("damaged and data")),
    ("state: best loss NaN", "checkpoint.py", "type(value) is float and value > -math.inf", "type(value) is float",
     resuming("damaged and best_val_loss")),
    ("state: fields may be missing", "checkpoint.py", "if name not in state:", "if False:", resuming("damaged and state")),
    ("state: step of another checkpoint", "checkpoint.py", 'if state["step"] != step_of(path):', "if False:",
     resuming("damaged and step")),
    ("flags: unknown ones accepted", "training.py", "        if name not in known:\n", "        if False:\n",
     resuming("damaged and flag")),
    ("flags: output folder from a checkpoint", "training.py", " - set(FLAGS_NOT_SAVED)", "", resuming("damaged and flag")),
    ("flags: values of another type", "training.py", "        if flags[name] != value:\n", "        if False:\n",
     resuming("damaged and flag")),
    ("flags: the other program's refused", "training.py", " or name not in FLAGS_OF_ONE_PROGRAM}", " or True}",
     resuming("gpu_program")),
    ("resume: moments too short", "checkpoint.py", "if end - start != 4 * size:", "if False:", resuming("damaged and moment")),
    ("resume: moments of another dtype", "checkpoint.py", ' or dtype != np.dtype("<f4")', "", resuming("damaged and moment")),
    ("resume: weights not checked before they are saved", "checkpoint.py",
     "            check_weights(progress.step, params, moments)\n", "", faults("not_finite")),
    ("resume: one finite weight is enough", "checkpoint.py", "if not np.isfinite(tensor).all():",
     "if not np.isfinite(tensor).any():", faults("not_finite")),
    ("resume: old checkpoints deleted first", "checkpoint.py", "    with atomic_folder(path) as folder:",
     "    for old in checkpoints(output_dir):\n        delete_checkpoint(old)\n    with atomic_folder(path) as folder:",
     resuming("full_disk")),
    ("resume: links out of the folder followed", "training.py", "            refuse_links(output_dir)\n", "", faults("links")),
    ("resume: finished run not written", "train_gpt2.py", "    title = f",
     "    if progress.step >= options.num_iterations:\n        return 0\n    title = f", resuming("finished_run")),
    ("resume: its own checkpoints deleted", "train_gpt2.py",
     "[:-options.keep_checkpoints if progress.step > 0 else None]", "[:None]", resuming("full_disk")),
    ("resume: another run's checkpoints kept", "train_gpt2.py",
     "[:-options.keep_checkpoints if progress.step > 0 else None]", "[:-options.keep_checkpoints]", resuming("finished_run")),
    ("log: picture before the model", "train_gpt2.py", "            saver.save_model(options.output_dir, progress.step)\n",
     "            log.plot()\n            saver.save_model(options.output_dir, progress.step)\n", erring("picture")),
    ("log: picture that fails ends the run", "training.py", "except Exception as error:      # of whatever",
     "except UserError as error:      # of whatever", erring("picture")),
    ("log: damaged CSV raises", "training.py", "except (ValueError, csv.Error) as error:", "except ValueError as error:",
     resuming("damaged and log")),
    ("log: any columns", "training.py", "if line.keys() != set(CSV_COLUMNS) or not", "if not", damaged("log")),
    ("processes: training data not compared", "train_gpt2.py", ', "the training data": progress.fingerprint', "",
     of_processes("data_must_be_the_same")),
    ("processes: validation data not compared", "train_gpt2.py", "val_loader and val_loader.fingerprint()", "None",
     of_processes("data_must_be_the_same")),
    ("processes: model not compared", "train_gpt2.py", "zlib.crc32(model.get_params().flat)",
     "None", of_processes("checkpoints_must_be_the_same")),
    ("processes: checkpoint not compared", "training.py", '"the checkpoint to resume from": options.checkpoint',
     '"the checkpoint to resume from": None', of_processes("checkpoints_must_be_the_same")),
    ("processes: nothing compared", "distributed.py", "if value != everyone[0][name]:", "if False:",
     of_processes("flags_must_be_the_same")),
    ("processes: all print", "train_gpt2.py", "        if world.rank > 0:\n            sys.stdout",
     "        if False:\n            sys.stdout", of_processes("help_of_all")),
    ("processes: --help of all is a failure", "distributed.py", "kind is SystemExit and self.all_leave()", "False",
     of_processes("help_of_all")),
    ("processes: error said by all", "distributed.py", "            time.sleep(ERROR_SECONDS)\n", "            pass\n",
     of_processes("mistake_is_said_once")),
    ("processes: aborted before the error is said", "distributed.py", "atexit.register(self.communicator.Abort, ",
     "self.communicator.Abort(", of_processes("error_of_one")),
    ("data: short read accepted", "dataloader.py", "if len(contents) < TOKEN_BYTES * (stop - start):", "if False:",
     faults("shrinks")),
    ("data: another file under the same name", "dataloader.py", "if zlib.crc32(self.read_ends()) != self.checksum:",
     "if False:", faults("replaced")),
    ("data: files stay open once they are checked", "dataloader.py", "            if self.shards:\n", "            if False:\n",
     faults("more_shards")),
    ("data: files stay open once they are read", "dataloader.py", "            shard.close()\n            epoch, done =",
     "            epoch, done =", faults("more_shards")),
    ("data: place beyond a file accepted", "dataloader.py", "num_tokens):\n            raise UserError(f\"the checkpoint's",
     "num_tokens + 99):\n            raise UserError(f\"the checkpoint's", resuming("damaged and token")),
    ("data: files beyond the last accepted", "dataloader.py", "if not (done < len(self.shards) and", "if not (",
     resuming("damaged and place")),
    ("data: validation file moved first", "dataloader.py", "path: (path.name == val_name,", "path: (path.name != val_name,",
     preparing("mixture")),
    ("data: validation file stays beside new shards", "dataloader.py",
     "        (new.parent / val_name).unlink(missing_ok=True)\n", "", preparing("mixture")),
    ("data: an earlier text's shards stay", "dataloader.py", "for old in find_shards(new.parent / name) if numbered else ():",
     "for old in ():", preparing("earlier_text")),
    ("data: somebody's shards are deleted", "dataloader.py",
     "numbered = find_shards(new / name) ", "numbered = in_order ", preparing("without_a_number")),
    ("data: reading does not finish a replacement", "dataloader.py", "        finish_replacing(Path(pattern).parent)\n", "",
     preparing("mixture")),
    ("prepare text: an unfinished replacement is in the way", "prepare_text.py",
     "            if new.exists():\n                replace_token_files(new)\n", "", preparing("mixture")),
    ("prepare text: complete files left in their folder", "prepare_text.py", "            replace_token_files(new)\n    except",
     "    except", preparing("earlier_text")),
    ("prepare text: empty folder stays", "prepare_text.py", "with made_folder(name.parent), lock_data(name):",
     "name.parent.mkdir(parents=True, exist_ok=True)\n        with lock_data(name):", preparing("too_small")),
    ("checkpoint: weights not renamed last", "model_files.py",
     "for name in reversed(contents) if replaces_other else contents:", "for name in reversed(contents):",
     checkpoints("renamed_last")),
    ("checkpoint: another model's tokenizer stays", "model_files.py",
     "            (folder / name).unlink(missing_ok=True)\n", "            pass\n", checkpoints("tokenizer_of_another")),
    ("checkpoint: one's own tokenizer deleted", "model_files.py", "for name in TOKENIZER_FILES if replaces_other else ():",
     "for name in TOKENIZER_FILES:", checkpoints("tokenizer_of_another")),
    ("checkpoint: shapes of fractions", "model_files.py", "all(type(number) is int for number",
     "all(isinstance(number, (int, float)) for number", checkpoints("damaged_safetensors")),
    ("kernel cache: a damaged file raises", "matmul_cpu.py", "                self.flush()        # or",
     "                raise        # or", faults("kernel_cache")),
    ("kernel cache: a damaged file stays", "matmul_cpu.py", "                self.flush()        # or",
     "                pass        # or", faults("kernel_cache")),
    ("kernel cache: only its index is read", "matmul_cpu.py",
     "return bool(files) and all(map(self._cache_file._load_data, files))", "return bool(files)", faults("kernel_cache")),
    ("kernel cache: a full disk raises", "matmul_cpu.py", "        with contextlib.suppress(OSError):\n            super()",
     "        if True:\n            super()", faults("kernel_cache")),
    ("vocabulary: fetched at every try", "tokenizer.py", "@functools.cache\ndef download_vocabulary", "def download_vocabulary",
     faults("vocabulary_once")),

    # The pages of derivations
    ("page: wrong number under an example", PAGES + "attention.md",
     "[[4. 7.]]", "[[4. 6.]]", pages("prints_what and attention")),
    ("page: wrong sum in an example by hand", PAGES + "layernorm.md",
     "`0.5 * (4 - 1.5 - (-1) * (-0.5)) = 1`", "`0.5 * (4 - 1.5 - (-1) * (-0.5)) = 2`", pages("sums")),
    ("page: quotes what the kernel no longer says", "kernels_cpu.py",
     "r * (dout[n, c] * weight[c] - dnorm_mean - norm * dnorm_norm_mean)",
     "r * (dout[n, c] * weight[c] - norm * dnorm_norm_mean - dnorm_mean)", pages("quotations")),
    ("page: example that is not run", PAGES + "gelu.md",
     "```pycon\n>>> x = np.linspace", "```\n>>> x = np.linspace", pages("every_block")),
    ("page: names a kernel that does not exist", PAGES + "residual.md",
     "`residual_forward`;", "`residual_add_forward`;", pages("gone")),
    ("page: another model in fifteen lines", PAGES + "README.md",
     "residual3 = residual2 + linear(fch_gelu)", "residual3 = residual + linear(fch_gelu)", pages("fifteen")),
    ("page: missing from the list", PAGES + "README.md",
     "| [Encoder](encoder.md) | a table that is read forward and added to backward, and a trap |\n", "",
     pages("list_of_pages")),
    ("page: kernel without a page", "kernels_cpu.py", "@kernel\ndef residual_forward(",
     "@kernel\ndef scale_forward(out, inp):\n    for n in prange(len(inp)):\n        out[n] = 2 * inp[n]\n\n\n"
     "@kernel\ndef residual_forward(", pages("every_kernel_has_a_page")),
    ("page: cost with a call too few", PAGES + "layernorm.md", "(25, 8 * N * C", "(24, 8 * N * C", pages("counted_calls")),
    ("page: cost of other bytes than the kernel's", PAGES + "adamw.md",
     "4 * 2 * 4 * P)", "4 * 7 * P)", pages("docstrings_are")),

    # Their figures
    ("figures: Jacobian without the mean", "dev/figures.py",
     "-np.ones((C, C)) / C,", "np.zeros((C, C)),", drawing("test_layernorm")),
    ("figures: GELU's derivative of another dout", "dev/figures.py", "np.ones_like(x), x)", "x, x)", drawing("test_gelu")),
    ("figures: attention of the next head", "dev/figures.py",
     "model.acts.att_lse[l][0], h)", "model.acts.att_lse[l][0], h - 1)", drawing("test_attention")),
    ("figures: one of the moments forgotten", "dev/figures.py",
     '"AdamW\'s moments": 2 * parameters', '"AdamW\'s moments": parameters', drawing("test_memory")),
    ("figures: points of the roofline upside down", "dev/figures.py",
     ".append((flops / moved, calls", ".append((moved / flops, calls", drawing("test_roofline")),
    ("figures: processor's line misplaced", "dev/figures.py",
     "balance = flops / bandwidth\n", "balance = bandwidth / flops\n", drawing("test_roofline")),
    ("figures: out of date", "kernels_cpu.py", "QUERY_TILE = 128", "QUERY_TILE = 64", drawing("todays")),

    # The page of a step, and what is recorded of it
    ("recorder: accumulated gradient taken for overwritten", "dev/recorder.py",
     "if i not in writes or spreads(i)}", "if i not in writes}", recording("experiment")),
    ("recorder: times of the calls in reverse", "dev/recorder.py",
     "    return seconds, whole", "    return seconds[::-1], whole", recording("fastest")),
    ("recorder: call without parameters in no layer", "dev/recorder.py",
     "of_parameters[0] if of_parameters else self.layer", "of_parameters[0] if of_parameters else None", recording("layers")),
    ("draw step: call missing", "dev/draw_step.py",
     "groups[LAYER], after\n", "groups[LAYER][1:], after\n", drawing("in_order")),
    ("draw step: backward a row too low", "dev/draw_step.py",
     "page.card(RIGHT, y, backward)", "page.card(RIGHT, y + ROW, backward)", drawing("face")),
    ("draw step: layer before is the layer", "dev/draw_step.py",
     "{array.tensor}[l-{call.layer - array.layer}]", "{array.tensor}[l]", drawing("cards_say")),
    ("draw step: passes that do not mirror", "dev/draw_step.py",
     "    if found != expected:", "    if False:", drawing("mirror")),
    ("draw step: page out of date", "train_gpt2.py",
     "dfch, acts.ln2[l], params.fcw[l], workspace)", "dfch, acts.ln1[l], params.fcw[l], workspace)",
     drawing("page_is_todays")),

    # explore
    ("explore: mask off by one", "dev/explore.py",
     "np.where(np.tri(T, dtype=bool), q @", "np.where(np.tri(T, k=1, dtype=bool), q @", exploring("test_attention")),
    ("explore: always the first layer", "dev/explore.py",
     "model.acts.qkv[options.layer], model.acts.att_lse[options.layer][0]", "model.acts.qkv[0], model.acts.att_lse[0][0]",
     exploring("test_prompt")),
    ("explore: probability of a token from its own row", "dev/explore.py",
     "probabilities[n - 1, token]", "probabilities[n, token]", exploring("table_of_next_tokens")),
    ("explore: times of other calls", "dev/explore.py",
     "zip(calls, seconds, strict=True)]", "zip(calls, seconds[::-1], strict=True)]", exploring("test_step")),
    ("explore: time of a kernel's last call only", "dev/explore.py",
     "seconds[call.kernel] += call.seconds", "seconds[call.kernel] = call.seconds", exploring("times")),
]]


# ----------------------------------------------------------------------------------------------------------------------
# Testing the tests

FOLDERS = "dev", "cuda_on_cpu", "data"      # of the checkout, besides the files at its top
LARGEST_FILE = 10_000_000                   # bytes: the tests need the vocabulary in `data`, not its training tokens
KERNELS = "kernels_cpu.py", "matmul_cpu.py"
COMPILE_ERRORS = "numba.core.errors", "does not compile"     # Numba's, and what cuda_on_cpu says


def copy_checkout(folder, without=()):
    """Copy the program and its tests to a folder, without Git's history, caches, trained models and the files `without`."""
    paths = [path for path in CHECKOUT.iterdir() if path.is_file()]
    paths += [path for name in FOLDERS for path in (CHECKOUT / name).rglob("*") if path.is_file()]
    for path in paths:
        relative = path.relative_to(CHECKOUT)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if not hidden and relative.as_posix() not in without and path.stat().st_size <= LARGEST_FILE:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / relative)


def mutated(mutation, folder=CHECKOUT):
    """The file's text as it is and with the bug in it. Raises UserError if the row no longer fits the file."""
    source = (folder / mutation.file).read_text(encoding="utf-8")
    count = source.count(mutation.original)
    if count != 1:
        raise UserError(f"{mutation.name}: found {count} times in {mutation.file}, expected once: {mutation.original!r}; "
                        "adapt the table in dev/mutations.py")
    return source, source.replace(mutation.original, mutation.replacement)


def write_source(path, text):
    """Write text to a file of the program, which keeps its time: its compiled kernels stay valid once it is restored."""
    times = path.stat()
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def environment(cache):
    """That of a process in a copy, with compiled kernels in the folder `cache`."""
    # Python does not notice a change that leaves a file's size and time as they were, so no bytecode must be kept.
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "GPT2_BY_HAND_CACHE": str(cache)}


def compile_kernels(folder):
    """Compile the kernels of a copy, so that no test has to, and none finds the note that says so in a program's output."""
    program = "import generate_gpt2, train_gpt2; train_gpt2.compile_kernels(); generate_gpt2.compile_kernels()"
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=folder, env=environment(folder / "cache"), capture_output=True, check=True)


def run_tests(folder, tests, cache):
    """Run pytest in folder, with compiled kernels in the folder `cache`. Return the first test that fails, or None.

    Raises UserError if the tests could not be run: a bug that does not even compile would prove nothing.
    """
    selection = tests.split(maxsplit=2)     # a file, and perhaps -k and an expression
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *selection]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(cache))
    failed = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    if result.returncode == 0:
        return None
    if result.returncode != 1 or not failed or any(error in result.stdout for error in COMPILE_ERRORS):
        print(result.stdout, result.stderr, file=sys.stderr)
        raise UserError(f"pytest could not run {tests}, see above")
    return failed[1].split("/")[-1]


def first_failure(folder, mutation):
    """Put the bug into folder, run its tests and restore the file. Return what run_tests returns."""
    path = folder / mutation.file
    source, text = mutated(mutation, folder)
    write_source(path, text)
    try:
        with tempfile.TemporaryDirectory() as temporary:    # other kernels would push the true ones out of their cache
            return run_tests(folder, mutation.tests, temporary if mutation.file in KERNELS else folder / "cache")
    finally:
        write_source(path, source)


def baseline_tests(mutations):
    """The tests of all mutations together, once for each file: they must pass before a bug goes in."""
    expressions = {}
    for mutation in mutations:
        file, _, expression = mutation.tests.partition(" -k ")
        expressions.setdefault(file, set()).add(expression)
    return [file if "" in found else f"{file} -k {' or '.join(f'({expression})' for expression in sorted(found))}"
            for file, found in sorted(expressions.items())]


def run_table(mutations, jobs):
    """Run every mutation, `jobs` at a time, each job in a copy of its own. Return how many bugs survive."""
    for mutation in mutations:
        mutated(mutation)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        free = queue.SimpleQueue()

        def prepare(job):
            folder = Path(temporary) / f"job{job}"
            copy_checkout(folder)
            if any(mutation.file not in KERNELS for mutation in mutations):
                compile_kernels(folder)
            free.put(folder)

        def in_a_copy(work, item):
            folder = free.get()
            try:
                return work(folder, item)
            finally:
                free.put(folder)

        def in_order(work, items):
            """(item, result) pairs, in the order of the items."""
            return zip(items, pool.map(lambda item: in_a_copy(work, item), items))

        def baseline(folder, tests):
            return run_tests(folder, tests, folder / "cache")

        try:
            list(pool.map(prepare, range(jobs)))
            for _, failure in in_order(baseline, baseline_tests(mutations)):
                if failure:
                    raise UserError(f"{failure} fails without any bug; mend it first")
            survivors = 0
            for mutation, failure in in_order(first_failure, mutations):
                survivors += failure is None
                print(f"{mutation.name:67} {f'caught by {failure}' if failure else 'NOT CAUGHT'}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"\n{len(mutations) - survivors} of {len(mutations)} bugs caught")
    return survivors


# ----------------------------------------------------------------------------------------------------------------------
# Exercises

FORWARD, BACKWARD, UPDATE = "the forward pass", "the backward pass", "the optimizer's update"
LOOP, GENERATION = "the training loop, its schedule or its data", "text generation"
FIRST_COMMAND = {
    FORWARD: "python test_gpt2.py",
    BACKWARD: "python test_gpt2.py",
    UPDATE: "python test_gpt2.py",
    LOOP: "python -m pytest -x dev/tests/test_training.py dev/tests/test_dataloader.py",
    GENERATION: "python -m pytest -x dev/tests/test_sampling.py dev/tests/test_decode_kernels.py dev/tests/test_generate.py",
}
GIVEAWAYS = "dev/mutations.py", "dev/tests/tools/test_mutations.py"     # not in an exercise's copy
IN_PLACE_OF_THE_TABLE = 'raise SystemExit("mutations.py: run this in the original, not in the copy of an exercise")\n'


class Exercise(NamedTuple):
    bug: str            # the name of a mutation
    place: str          # the part of the program that is wrong
    page: str = ""      # the derivation, if there is one


# From easy to hard. Readers know an exercise by its number, its place in this list: add new ones at the end.
EXERCISES = [Exercise(*row) for row in [
    # Easy: the first wrong row of test_gpt2.py's report, or the first test that fails, names the culprit
    ("encoder: position embedding subtracted", FORWARD, "encoder"),
    ("residual: branch subtracted", FORWARD, "residual"),
    ("gelu: exponent without the 2", FORWARD, "gelu"),
    ("layernorm: mean not subtracted", FORWARD, "layernorm"),
    ("matmul: bias overwritten by the product", FORWARD, "matmul"),
    ("attention: keys for values", FORWARD, "attention"),
    ("classifier: loss with the target's exponential for its logit", FORWARD, "classifier"),
    ("model: MLP added to the block's input", FORWARD, "residual"),
    ("layernorm: bias scaled by the weight", FORWARD, "layernorm"),
    ("attention: scaled by HS, not by its root", FORWARD, "attention"),
    ("sampling: logits multiplied by the temperature", GENERATION),
    ("model: GELU left out", FORWARD, "gelu"),
    # Medium: gradients flow, so one bug makes many rows wrong
    ("matmul backward: dbias overwritten", BACKWARD, "matmul"),
    ("gelu backward: chain rule without the 2", BACKWARD, "gelu"),
    ("layernorm backward: dbias multiplied by norm", BACKWARD, "layernorm"),
    ("classifier: target not subtracted from the gradient", BACKWARD, "classifier"),
    ("attention backward: dk not scaled", BACKWARD, "attention"),
    ("model backward: stream around attention dropped", BACKWARD, "residual"),
    ("encoder: dwte overwritten", BACKWARD, "encoder"),
    ("layernorm backward: mean term dropped", BACKWARD, "layernorm"),
    ("attention backward: dq and dk exchanged", BACKWARD, "attention"),
    ("adamw: v not corrected", UPDATE, "adamw"),
    ("model backward: GELU's slope at its output", BACKWARD, "gelu"),
    ("layernorm backward: weight forgotten in the means", BACKWARD, "layernorm"),
    ("attention backward: dscore not multiplied by the weight", BACKWARD, "attention"),
    ("model backward: token embedding used once", BACKWARD, "weight_tying"),
    ("adamw: decay without the learning rate", UPDATE, "adamw"),
    ("schedule: warm-up starts at zero", LOOP),
    ("model: biases decay", UPDATE, "adamw"),
    ("gelu backward: slope without sqrt(2 / pi)", BACKWARD, "gelu"),
    ("decoder: first layer's cache for all", GENERATION, "attention"),
    ("matmul backward: dweight averaged over the rows", BACKWARD, "matmul"),
    ("sampling: penalty raises negative logits", GENERATION),
    ("data: targets not shifted", LOOP),
    # Hard: it shows only at some sizes or for some numbers, or in something small
    ("layernorm backward: rstd term the same for a whole row", BACKWARD, "layernorm"),
    ("softmax: largest score not subtracted", FORWARD, "attention"),
    ("attention backward: delta of the first tile's rows", BACKWARD, "attention"),
    ("layernorm: variance as mean square minus squared mean", FORWARD, "layernorm"),
    ("classifier: padding has gradient", BACKWARD, "classifier"),
    ("attention backward: tiles overwrite each other", BACKWARD, "attention"),
    ("attention: lse of every tile over the first's", FORWARD, "attention"),
    ("loop: short gradients stretched", UPDATE, "clipping"),
    ("model backward: targets of the first chunk for all", BACKWARD, "classifier"),
    ("adamw: epsilon inside the root", UPDATE, "adamw"),
    ("adamw: decay added to the gradient, as in Adam", UPDATE, "adamw"),
    ("model backward: not divided by the micro-batches", BACKWARD, "classifier"),
    ("decoding attention: new queries see the new keys only", GENERATION, "attention"),
    ("global_norm: squares in float32", UPDATE, "clipping"),
    ("exp: NaN clamped", FORWARD, "classifier"),
    ("sampling: top-p keeps too little", GENERATION),
    ("initialization: residual projections not smaller", LOOP, "initialization"),
    ("data: last target read past the end", LOOP),
]]
EASY, MEDIUM = 12, 34       # the last numbers of these levels


def level(number):
    return "easy" if number <= EASY else "medium" if number <= MEDIUM else "hard"


def mutation_of(number):
    """The Mutation of an exercise."""
    return next(mutation for mutation in MUTATIONS if mutation.name == EXERCISES[number - 1].bug)


def make_exercise(number, folder):
    """Copy the program to a folder that does not exist yet, with the bug in it, and print how to look for it."""
    mutation, exercise = mutation_of(number), EXERCISES[number - 1]
    _, text = mutated(mutation)
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists; delete it, or name another folder with --output-dir")
    with atomic_folder(folder) as copy:
        copy_checkout(copy, without=GIVEAWAYS)
        (copy / "dev" / "mutations.py").write_text(IN_PLACE_OF_THE_TABLE)    # a page names this file, and a test looks for it
        write_source(copy / mutation.file, text)
    print(f"Exercise {number} ({level(number)}): {folder} is a copy of the program with one bug in it, in {exercise.place}.\n"
          f"Find it with whatever is in there, and correct it until the tests pass. A start:\n\n"
          f"    cd {shlex.quote(str(folder))}\n"
          f"    {FIRST_COMMAND[exercise.place]}\n\n"
          "Then narrow it down:\n\n"
          "    python -m pytest                                           all tests: some bugs show at some sizes only\n"
          "    python -m pytest dev/tests/test_kernels.py -k layernorm    one kernel alone, against float64\n"
          "    python dev/explore.py                                      what each call of a step reads and writes\n"
          "    dev/derivations/README.md                                  what each line should compute, and why\n\n"
          "The copy has no Git history, and comparing it to the original would spoil it.\n"
          f"The solution: python dev/mutations.py --solve {number}, in the original.")


def lines_around(text, start, length):
    """The whole lines of a text in which length characters from start on lie, and the number of the first."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", max(start, start + length - 1))
    return text[first:last].split("\n"), text.count("\n", 0, first) + 1


def print_solution(number):
    mutation, exercise = mutation_of(number), EXERCISES[number - 1]
    source, text = mutated(mutation)
    start = source.index(mutation.original)
    correct, line = lines_around(source, start, len(mutation.original))
    wrong, _ = lines_around(text, start, len(mutation.replacement))
    indent = min(len(each) - len(each.lstrip()) for each in correct + wrong if each.strip())
    print(f"Exercise {number} ({level(number)}): {mutation.name}\n\n{mutation.file}, line {line}\n")
    for heading, lines in (("correct", correct), ("with the bug", wrong)):
        print(f"{heading}:", *(each[indent:] for each in lines), sep="\n    ")
    print(f"\nCaught by python -m pytest {shlex.join(mutation.tests.split(maxsplit=2))}")
    if exercise.page:
        print(f"Derived in dev/derivations/{exercise.page}.md")


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def main():
    number = bounded(int, 1, len(EXERCISES))
    parser = OneLineParser(description="Bugs with which to test the tests, and yourself.")
    parser.add_argument("words", nargs="*", help="run the bugs whose names contain all of these words (default: all bugs)")
    parser.add_flag("--jobs", type=bounded(int, 1, 64), default=2, metavar="N", help="bugs to run at a time")
    parser.add_flag("--exercise", type=number, nargs="?", const=0, metavar="NUMBER",
                    help=f"make a copy of the program with one bug in it, for you to find: 1, the easiest, to {len(EXERCISES)} "
                         "(default: a random one)")
    parser.add_flag("--output-dir", type=Path, metavar="FOLDER",
                    help="where to put the copy (default: exercise_NUMBER in the current folder)")
    parser.add_flag("--solve", type=number, metavar="NUMBER", help="show the bug of an exercise")
    options = parser.parse_args()
    if options.solve is not None:
        print_solution(options.solve)
    elif options.exercise is not None:
        chosen = options.exercise or random.randint(1, len(EXERCISES))
        make_exercise(chosen, options.output_dir or Path(f"exercise_{chosen}"))
    else:
        mutations = [mutation for mutation in MUTATIONS if all(word in mutation.name for word in options.words)]
        if not mutations:
            raise UserError(f"no bug has {' and '.join(map(repr, options.words))} in its name; dev/mutations.py lists them",
                            status=2)
        sys.exit(1 if run_table(mutations, min(options.jobs, len(mutations))) else 0)


if __name__ == "__main__":
    run_program(main)
