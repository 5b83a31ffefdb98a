"""Put a bug into the program, see a test fail, and again for every bug in a table: who tests the tests.

    python dev/mutations.py               all bugs: about ten minutes on two cores
    python dev/mutations.py layernorm     those with `layernorm` in their name

Each bug is one exact replacement in a copy of the checkout, in a temporary folder, where only the tests named beside it
run; they are a narrow choice, to save compiling kernels that the bug does not touch. The exit status is 1 if a bug
survives.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "data", "out")

TRAINING, DATA = "dev/tests/test_training.py", "dev/tests/test_dataloader.py"
GRADIENTS = "test_gpt2.py -k gradients"
PARAMETERS = "test_gpt2.py -k parameters"


def kernel(names):
    """The tests of the kernels with these names."""
    return f"dev/tests/test_kernels.py -k {names}"


def cuda(names):
    """The tests of the CUDA kernels with these names."""
    return f"dev/tests/test_kernels_gpu.py -k {names}"


def whole_cuda(names):
    """The tests of the GPU program with these names."""
    return f"dev/tests/test_train_gpt2_gpu.py -k {names}"


def cuda_decoding(names):
    """The tests of generate_gpt2_gpu.py with these names."""
    return f"dev/tests/test_generate_gpu.py -k {names}"


def checkpoints(names):
    """The tests of checkpoint.py with these names."""
    return f"dev/tests/test_checkpoint.py -k {names}"


def generating(names):
    """The tests of generate_gpt2.py with these names."""
    return f"dev/tests/test_generate.py -k {names}"


def decoding(names):
    """The tests of the decoding kernels with these names."""
    return f"dev/tests/test_decode_kernels.py -k {names}"


def resuming(names):
    """The tests of checkpoints and resuming with these names."""
    return f"dev/tests/test_resume.py -k {names}"


def scoring(names):
    """The tests of HellaSwag with these names."""
    return f"dev/tests/test_hellaswag.py -k {names}"


SAMPLING, PLOTTING = "dev/tests/test_sampling.py", "dev/tests/test_plot_runs.py"
GPU = "kernels_gpu.py"


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

    # Layernorm
    ("layernorm: epsilon too small", "kernels_cpu.py",
     "np.float32(1e-5)", "np.float32(1e-6)", kernel("layernorm")),
    ("layernorm: variance without the mean", "kernels_cpu.py",
     "squares += (inp[n, c] - m) * (inp[n, c] - m)", "squares += inp[n, c] * inp[n, c]", kernel("layernorm")),
    ("layernorm backward: direct term dropped", "kernels_cpu.py",
     "r * (dout[n, c] * weight[c] - dnorm_mean -", "r * (-dnorm_mean -", kernel("layernorm")),
    ("layernorm backward: mean term dropped", "kernels_cpu.py",
     "dout[n, c] * weight[c] - dnorm_mean -", "dout[n, c] * weight[c] -", kernel("layernorm")),
    ("layernorm backward: rstd term dropped", "kernels_cpu.py",
     " - norm * dnorm_norm_mean)", ")", kernel("layernorm")),
    ("layernorm backward: dinp overwritten", "kernels_cpu.py",
     "dinp[n, c] += r *", "dinp[n, c] = r *", kernel("layernorm")),
    ("layernorm backward: dweight overwritten", "kernels_cpu.py",
     "dw[c] += do[c]", "dw[c] = do[c]", kernel("layernorm")),

    # Matrix product
    ("matmul: last columns left out", "kernels_cpu.py",
     "lines = (length + 15) // 16", "lines = length // 16", kernel("matmul")),
    ("matmul backward: dbias lost", "kernels_cpu.py",
     "add_to(dbias[start:stop], dout[n, start:stop])", "pass", kernel("matmul")),
    ("matmul backward: dweight overwritten", "kernels_cpu.py",
     "dout[:, start:stop].T, inp, 1.0,", "dout[:, start:stop].T, inp, 0.0,", kernel("matmul")),

    # The product on one thread
    ("sgemm: beta applied to every block of the depth", "kernels_cpu.py",
     "keep = beta if start == 0 else np.float32(1)", "keep = beta", kernel("sgemm")),
    ("sgemm: next block of b packed one row too far", "kernels_cpu.py",
     "b[start:start + depth, column:", "b[min(start, start + 1):start + depth, column + (start > 0):", kernel("sgemm")),
    ("sgemm: rows that stick out are written", "kernels_cpu.py",
     "inside = rows == TILE_ROWS and", "inside = rows >= TILE_ROWS - 1 and", kernel("sgemm")),
    ("sgemm: columns that stick out are written", "kernels_cpu.py",
     "columns == vectors * LANES", "columns >= vectors * LANES - 3", kernel("sgemm")),
    ("sgemm: alpha forgotten where c is kept", "kernels_cpu.py",
     "build.fadd(build.fmul(alphas, sums_after[rv], flags=fused), kept", "build.fadd(sums_after[rv], kept", kernel("sgemm")),
    ("sgemm: remaining columns of a transpose not copied", "kernels_cpu.py",
     "for k in range(whole_depth if c < whole else 0, depth):", "for k in range(whole_depth, depth):", kernel("sgemm")),
    ("sgemm: transpose in one round too few", "kernels_cpu.py",
     "while distance < LANES:", "while distance < LANES // 2:", kernel("sgemm")),
    ("sgemm: c at the edge overwritten", "kernels_cpu.py",
     "(keep * part[r, j] if keep != 0 else np.float32(0))", "np.float32(0)", kernel("sgemm")),

    # Attention
    ("attention: scores not scaled", "kernels_cpu.py",
     "sgemm(p, 1.0 / np.sqrt(HS), q[start:stop]", "sgemm(p, 1.0, q[start:stop]", kernel("attention")),
    ("attention: mask lets one later key through", "kernels_cpu.py",
     "visible = position + start + i + 1", "visible = min(position + start + i + 2, end)", kernel("attention")),
    ("attention: lse without the maximum", "kernels_cpu.py",
     "largest + np.log(total)", "np.log(total)", kernel("attention")),
    ("attention backward: mask hides the position itself", "kernels_cpu.py",
     "visible = start + i + 1\n                row_lse", "visible = start + i\n                row_lse", kernel("attention")),
    ("attention backward: delta missing", "kernels_cpu.py",
     "(drow[j] - delta)", "drow[j]", kernel("attention")),
    ("attention backward: dq not scaled", "kernels_cpu.py",
     "sgemm(dq[start:stop], scale,", "sgemm(dq[start:stop], 1.0,", kernel("attention")),
    ("attention backward: tiles overwrite each other", "kernels_cpu.py",
     "beta = 0.0 if tile == tiles - 1 else 1.0", "beta = 0.0", kernel("attention")),

    # GELU
    ("gelu: wrong constant", "kernels_cpu.py",
     "np.float32(0.044715)", "np.float32(0.04715)", kernel("gelu")),
    ("gelu backward: second term dropped", "kernels_cpu.py",
     "(s + x * s * (np.float32(1) - s) * np.float32(2) * slope)", "s", kernel("gelu")),
    ("gelu backward: cubic's derivative without 3", "kernels_cpu.py",
     "np.float32(3) * GELU_CUBIC", "GELU_CUBIC", kernel("gelu")),
    ("exp: NaN clamped", "kernels_cpu.py",
     "(np.float32(-87) if x < np.float32(-87) else x)", "(x if x > np.float32(-87) else np.float32(-87))",
     kernel("classifier")),
    ("exp: a coefficient slightly wrong", "kernels_cpu.py",
     "np.float32(4.1665795894e-2)", "np.float32(4.18e-2)", kernel("classifier")),
    ("fastmath: NaN assumed away", "kernels_cpu.py",
     '"nsz", "arcp"}', '"nsz", "arcp", "nnan", "ninf"}', kernel("nan_comes_out or infinity_comes_out")),

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

    # Optimiser
    ("global_norm: squares in float32", "kernels_cpu.py",
     "np.float64(part[i]) * np.float64(part[i])", "part[i] * part[i]", kernel("global_norm")),
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

    # Model
    ("model: beta2 of PyTorch", "train_gpt2.py",
     "BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8", "BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8", PARAMETERS),
    ("model: biases decay", "train_gpt2.py",
     "weight_decay if name in WEIGHT_DECAYED else 0.0", "weight_decay", PARAMETERS),
    ("model: position embedding does not decay", "gpt2.py",
     "WEIGHT_DECAYED = MATRICES", "WEIGHT_DECAYED = MATRICES[:1] + MATRICES[2:]", PARAMETERS),
    ("model: final layernorm with another's weight", "train_gpt2.py",
     "acts.residual3[-1], params.lnfw, params.lnfb)", "acts.residual3[-1], params.ln1w[0], params.lnfb)",
     "test_gpt2.py -k activations"),
    ("model backward: final layernorm with another's weight", "train_gpt2.py",
     "acts.lnf_rstd, acts.residual3[-1], params.lnfw)", "acts.lnf_rstd, acts.residual3[-1], params.ln1w[0])", GRADIENTS),
    ("model backward: residual branch dropped", "train_gpt2.py",
     "kernels.gelu_backward(dfch, dfch, acts.fch[l])", "kernels.gelu_backward(dfch, dfch, acts.fch[l]); dresidual[...] = 0",
     GRADIENTS),
    ("model backward: residual of the wrong layer", "train_gpt2.py",
     "            residual = acts.residual3[l - 1] if l > 0 else acts.encoded\n            if",
     "            residual = acts.residual3[l]\n            if",
     GRADIENTS),
    ("model backward: old dresidual left in", "train_gpt2.py",
     "dresidual[...] = 0\n", "pass\n", "test_gpt2.py"),
    ("model backward: token embedding used once", "train_gpt2.py",
     "kernels.encoder_backward(grads.wte,", "kernels.encoder_backward(np.zeros_like(grads.wte),", GRADIENTS),
    ("model: last classifier chunk left out", "gpt2.py",
     "for start in range(0, rows, size)", "for start in range(0, rows - size + 1, size)", TRAINING),
    ("model: logits of the first token, not the last", "train_gpt2.py",
     "self.acts.lnf[-1:]", "self.acts.lnf[:1]", TRAINING),
    ("model backward: not divided by the micro-batches", "train_gpt2.py",
     "1 / (N * accumulation_steps * self.world.size)", "1 / N", TRAINING),
    ("initialisation: residual projections not smaller", "gpt2.py",
     "std = 0.02 / np.sqrt(2 * config.num_layers) if name in RESIDUAL_PROJECTIONS else 0.02", "std = 0.02", TRAINING),
    ("initialisation: padding rows not zero", "gpt2.py",
     "params.wte[config.vocab_size:] = 0", "pass", TRAINING),

    # Training loop
    ("loop: loss not divided by the micro-batches", "train_gpt2.py",
     "model.backward(targets, options.accumulation_steps) / options.accumulation_steps",
     "model.backward(targets, options.accumulation_steps)", TRAINING),
    ("loop: clipping inverted", "train_gpt2.py",
     "grad_clip / norm if", "norm / grad_clip if", TRAINING),
    ("loop: short gradients stretched", "train_gpt2.py",
     "if 0 < grad_clip < norm else 1.0", "if 0 < grad_clip else 1.0", TRAINING),
    ("loop: an update by what is not finite", "train_gpt2.py",
     "if not math.isfinite(norm):", "if math.isnan(norm):", TRAINING),
    ("loop: NaN goes unnoticed", "training.py",
     "if all(map(math.isfinite, values.values())):", "if not any(value > 1e30 for value in values.values()):", TRAINING),
    ("loop: single batch not repeated", "train_gpt2.py",
     "if options.overfit_single_batch:", "if False:", TRAINING),
    ("loop: validation goes on where it stopped", "train_gpt2.py",
     "loader.reset()\n    steps", "steps", TRAINING),
    ("schedule: warm-up starts at zero", "training.py",
     "highest * step / warmup", "highest * (step - 1) / warmup", TRAINING),
    ("schedule: cosine ends too high", "training.py",
     "done = (step - warmup) / (n - warmup)", "done = (step - warmup) / n", TRAINING),
    ("schedule: height above zero, not above the lowest", "training.py",
     "lowest + (highest - lowest) * height", "highest * height", TRAINING),

    # Data
    ("data: rank ignored", "dataloader.py",
     "self.offset = rank * batch_size * sequence_length", "self.offset = 0", DATA),
    ("data: targets not shifted", "dataloader.py",
     "targets = tokens[1:]", "targets = tokens[:-1]", DATA),
    ("data: last target read past the end", "dataloader.py",
     "position + self.step_tokens + 1 > len", "position + self.step_tokens > len", DATA),
    ("data: every round in the same order", "dataloader.py",
     "default_rng([self.shuffle_seed, epoch])", "default_rng([self.shuffle_seed, 0])", DATA),
    ("data: order of another seed", "dataloader.py",
     "default_rng([self.shuffle_seed, epoch])", "default_rng([0, epoch])", DATA),
    ("data: a new round begins with its second file", "dataloader.py",
     "else (epoch + 1, 0)", "else (epoch + 1, min(1, len(self.shards) - 1))", DATA),
    ("data: fingerprint of the first two tokens alone", "dataloader.py",
     "len(tokens).to_bytes(8, \"little\") + tokens[:FINGERPRINT].tobytes() + tokens[-FINGERPRINT:].tobytes()",
     "tokens[:2].tobytes()", DATA),

    # Runs that last
    ("resume: moments of one kind for both", "resume.py", "for name, moment in zip(MOMENTS, moments)",
     "for name, moment in zip(MOMENTS, moments[::-1])", resuming("is_the_uninterrupted_one")),
    ("resume: all checkpoints kept", "resume.py", "[:-keep]", "[:0]", resuming("every_so_often")),
    ("resume: the latest is deleted", "resume.py", "[:-keep]", "[-keep:]", resuming("every_so_often")),
    ("resume: state written under its name before it is whole", "resume.py", "with whole_folder(path) as folder:",
     "path.mkdir(parents=True)\n    for folder in [path]:", resuming("full_disk or killed")),
    ("resume: half-written folder left behind", "files.py",
     "        shutil.rmtree(unfinished, ignore_errors=True)\n\n\ndef cannot_write", "        pass\n\n\ndef cannot_write",
     resuming("full_disk")),
    ("resume: moments unpickled", "resume.py", "allow_pickle=False", "allow_pickle=True", resuming("damaged")),
    ("resume: moments of another model", "resume.py", "moment.shape != (params.size,) or ", "", resuming("damaged")),
    ("resume: unfinished run replaced", "training.py",
     "    if not options.checkpoint:\n        check_unfinished(options.output_dir)\n", "",
     resuming("does_not_replace")),
    ("resume: other tokens taken for the same", "training.py", "if state[\"fingerprint\"] != train_loader.fingerprint():",
     "if False:",
     resuming("other_tokens")),
    ("resume: other seed taken for the same", "training.py", "\"total_batch_size\", \"seed\", ", "\"total_batch_size\", ",
     resuming("must_not_change")),
    ("resume: log begins anew", "training.py", "read_log(options.output_dir / \"log.csv\", done) if done else []", "[]",
     resuming("is_the_uninterrupted_one")),
    ("resume: log keeps steps that are done again", "training.py", "if row[\"step\"] <= done]", "]", resuming("log_goes_on")),
    ("resume: place in the data forgotten", "train_gpt2.py", "    train_loader.state = progress.data\n", "",
     resuming("is_the_uninterrupted_one")),
    ("resume: a step is left out", "train_gpt2.py", "range(progress.step + 1, n + 1)", "range(progress.step + 1 + (progress.step > 0), n + 1)",
     resuming("is_the_uninterrupted_one")),
    ("resume: the batch that was fetched early is lost", "train_gpt2_gpu.py", "return self.upcoming_state",
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
    ("recompute: the last layer's activations for all", "train_gpt2.py", "if self.recompute and l + 1 < L:", "if False:",
     TRAINING),
    ("recompute: nothing saved", "gpt2.py", "L = 1 if recompute else layers", "L = layers", TRAINING),
    ("cuda recompute: layernorm of the block after", "train_gpt2_gpu.py", "if self.recompute and l + 1 < L:", "if False:",
     whole_cuda("recomputed")),

    # CUDA: building blocks
    ("cuda load: end of an odd row lost", GPU,
     "four.x[k] = i + k < length ? row[i + k] : 0;", "four.x[k] = i + k + 1 < length ? row[i + k] : 0;", cuda("encoder")),
    ("cuda load: read past the end of an odd row", GPU,
     "four.x[k] = i + k < length ? row[i + k] : 0;", "four.x[k] = row[i + k];", cuda("gelu")),
    ("cuda store: written past the end of an odd row", GPU,
     "if (i + k < length) row[i + k] = four.x[k];", "row[i + k] = four.x[k];", cuda("gelu")),
    ("cuda load: 16 bytes at a time from odd rows", GPU,
     "((length % 4 == 0) &&", "((length % 4 <= 1) &&", cuda("encoder")),
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
    ("cuda layernorm: rows after a block's first round left out", GPU,
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
    ("cuda attention backward: guard of the rows off by one", GPU,
     "    if (row >= NH * T) return;\n    int HS", "    if (row > NH * T) return;\n    int HS", cuda("attention")),
    ("cuda attention: guard of the rows missing", GPU,
     "    if (row >= NH * T) return;\n    float* p", "    float* p", cuda("attention")),
    ("cuda attention backward: delta of dout alone", GPU,
     "delta += dout[head + c] * out[head + c];", "delta += dout[head + c] * dout[head + c];", cuda("attention")),
    ("cuda attention backward: delta of another head", GPU,
     "(size_t)i * C + row / T * HS", "(size_t)i * C + row % NH * HS", cuda("attention")),
    ("cuda attention backward: a lane's delta", GPU,
     "    delta = warp_sum(delta);\n", "", cuda("attention")),
    ("cuda attention backward: dscore right of the diagonal", GPU,
     "dx.x[k] = j + k <= i ? x.x[k] * (dx.x[k] - delta) : 0;", "dx.x[k] = x.x[k] * (dx.x[k] - delta) + j;", cuda("attention")),
    ("cuda decode matvec: bias lost", GPU, "sum + (bias ? bias[o] : 0)", "sum", cuda("matvec")),
    ("cuda decode matvec: rows read past the last", GPU, "if (first + r >= N) break;", "", cuda("matvec")),
    ("cuda decode matvec: rows past the fourth left out", GPU, "(ceil_div(OC, 8), ceil_div(N, 4))", "(ceil_div(OC, 8), 1)",
     cuda("matvec")),
    ("cuda decode matvec: last columns left out", GPU, "(ceil_div(OC, 8), ceil_div(N, 4))", "(OC // 8 or 1, ceil_div(N, 4))",
     cuda("matvec")),
    ("cuda decode matvec: guard of the columns off by one", GPU, "if (o >= OC) return;", "if (o > OC) return;", cuda("matvec")),
    ("cuda decode matvec: a lane's sum", GPU, "float sum = warp_sum(sums[r]);", "float sum = sums[r];", cuda("matvec")),
    ("cuda decode attention: own key not kept", GPU, "        keys[(size_t)position * HS + c] = k[c];\n", "", cuda("cached")),
    ("cuda decode attention: value kept one further on", GPU, "values[(size_t)position * HS + c] = v[c];",
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
    ("cuda decode attention: prompt sees itself alone", GPU, "last = S - T + row % T;", "last = row % T;", cuda("cached")),
    ("cuda decode attention: prompt's values not kept", GPU, "        v[:, position:] = qkv[b, 2 * NH:]\n", "", cuda("cached")),
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
    ("cuda decode: last layernorm is the last block's own", "generate_gpt2_gpu.py",
     "else (params.lnfw, params.lnfb)", "else (params.ln1w[l], params.ln1b[l])", cuda_decoding("cached_forward")),
    ("cuda decode: last layernorm before its time", "generate_gpt2_gpu.py", "if l + 1 < L else", "if l + 2 < L else",
     cuda_decoding("cached_forward")),
    ("cuda decode: MLP's bias lost", "generate_gpt2_gpu.py", "acts.fch, params.fcb[l])", "acts.fch, 0 * params.fcb[l])",
     cuda_decoding("cached_forward")),
    ("cuda decode: padding scored", "generate_gpt2_gpu.py", "0.0, self.config.vocab_size)", "0.0, self.config.vocab_size - 1)",
     cuda_decoding("mean_loss")),
    ("cuda attention backward: dk not scaled", GPU,
     "device.gemm(dk, scale,", "device.gemm(dk, 1.0,", cuda("attention")),

    # CUDA: GELU
    ("cuda gelu: bias not saved", GPU,
     "        fours.store(inp_row, c, x);\n", "", cuda("gelu")),
    ("cuda gelu backward: guard missing", GPU,
     "    if (i >= size) return;\n    Four x", "    Four x", cuda("gelu")),
    ("cuda gelu backward: guard off by one", GPU,
     "    if (i >= size) return;\n    Four x", "    if (i > size) return;\n    Four x", cuda("gelu")),
    ("cuda gelu backward: a block too few", GPU,
     "device.launch(\"gelu_backward\", ceil_div(inp.size, 4 * 256),", "device.launch(\"gelu_backward\", inp.size // (4 * 256),",
     cuda("gelu")),

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

    # CUDA: optimiser
    ("cuda norm: squares in float32", GPU,
     "sum += (double)g.x[k] * g.x[k];", "sum += g.x[k] * g.x[k];", cuda("global_norm")),
    ("cuda norm: blocks overlap", GPU,
     "i += (size_t)4 * blocks * blockDim.x", "i += (size_t)4 * blocks", cuda("global_norm")),
    ("cuda norm: a part too many", GPU,
     "threadIdx.x < blocks ? parts", "threadIdx.x <= blocks ? parts", cuda("global_norm")),
    ("cuda adamw: norm that is not a number goes on", GPU,
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
     "kernels.gelu_backward(dfch, dfch, acts.fch[l])", "pass", whole_cuda("gradients")),
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
    ("cuda batches: the one that is still to come", "train_gpt2_gpu.py",
     "        inputs, targets = self.upcoming\n        self.fetch()\n",
     "        self.fetch()\n        inputs, targets = self.upcoming\n",
     whole_cuda("prefetched")),
    ("cuda memory: moments forgotten", "gpt2.py",
     "4 * (2 * parameters + 2 * -(-parameters // processes)", "4 * (2 * parameters", whole_cuda("memory_needed")),

    # Checkpoints
    ("checkpoint: prefix kept", "checkpoint.py",
     "name = name.removeprefix(prefix)", "pass", checkpoints("names_of_any_file")),
    ("checkpoint: qkvw not transposed", "checkpoint.py",
     'TRANSPOSED = ("qkvw", ', "TRANSPOSED = (", checkpoints("names_of_any_file")),
    ("checkpoint: square projection not transposed", "checkpoint.py",
     'TRANSPOSED = ("qkvw", "attprojw", ', 'TRANSPOSED = ("qkvw", ', checkpoints("logits_of_transformers")),
    ("checkpoint: weights of two layernorms exchanged", "checkpoint.py",
     '"ln1w": "h.{layer}.ln_1.weight"', '"ln1w": "h.{layer}.ln_2.weight"', checkpoints("names_of_any_file")),
    ("checkpoint: causal masks are unknown tensors", "checkpoint.py",
     "if not re.fullmatch(CAUSAL_MASKS, name):", "if True:", checkpoints("names_of_any_file")),
    ("checkpoint: a transposed strip too few", "checkpoint.py",
     "for start in range(0, len(view), strip):",
     "for start in range(0, len(view) - strip + 1, strip):", checkpoints("names_of_any_file or half")),
    ("checkpoint: bfloat16 in the lower half", "checkpoint.py",
     "bits <<= 16", "bits <<= 15", checkpoints("half_precision")),
    ("checkpoint: classifier not compared", "checkpoint.py",
     'np.array_equal(head.data, tensors["wte.weight"].data)', "True", checkpoints("damaged_safetensors")),
    ("checkpoint: classifier always differs", "checkpoint.py",
     "if head and not (", "if head and (", checkpoints("names_of_any_file")),
    ("checkpoint: only the first shard", "checkpoint.py",
     "return [folder / shard for shard in sorted(set(shards))]", "return [folder / shards[0]]", checkpoints("test_shards")),
    ("checkpoint: shards from anywhere", "checkpoint.py",
     're.fullmatch(r"[\\w.-]+\\.safetensors", shard)',
     're.fullmatch(r".+\\.safetensors", shard)', checkpoints("index_of_shards")),
    ("checkpoint: heads guessed otherwise", "checkpoint.py",
     "C // CHANNELS_PER_HEAD, C))))", "1, C))))", checkpoints("without_its_config")),
    ("checkpoint: a folder needs no config.json", "checkpoint.py",
     'weight_files(path), path / "config.json")', "weight_files(path), None)", checkpoints("round_trip")),
    ("checkpoint: architecture not checked", "checkpoint.py",
     'if settings.get("model_type") != "gpt2":', "if False:", checkpoints("config_of_another")),
    ("checkpoint: activation not checked", "checkpoint.py",
     '"activation_function": ("gelu_new", "gelu_pytorch_tanh"),', "", checkpoints("config_of_another or other_words")),
    ("checkpoint: tanh GELU's other name", "checkpoint.py",
     '("gelu_new", "gelu_pytorch_tanh")', '("gelu_new",)', checkpoints("other_words")),
    ("checkpoint: epsilon not checked", "checkpoint.py",
     '"layer_norm_epsilon": (1e-5,),', "", checkpoints("config_of_another")),
    ("checkpoint: attention scale not checked", "checkpoint.py",
     '"scale_attn_weights": (True,),', "", checkpoints("config_of_another")),
    ("checkpoint: scale by layer not checked", "checkpoint.py",
     '"scale_attn_by_inverse_layer_idx": (False,),', "", checkpoints("config_of_another")),
    ("checkpoint: n_inner not checked", "checkpoint.py",
     '{**SETTINGS, "n_inner": (None, 4 * config.channels)}', "SETTINGS", checkpoints("config_of_another")),
    ("checkpoint: absent settings refused", "checkpoint.py",
     "settings.get(name, choices[0])", "settings.get(name)", checkpoints("other_words")),
    ("checkpoint: sizes may be zero", "checkpoint.py",
     "not 1 <= size < 2**31", "not 0 <= size < 2**31", checkpoints("config_of_another or llmc")),
    ("checkpoint: sizes may be true", "checkpoint.py",
     "type(size) is not int", "not isinstance(size, int)", checkpoints("config_of_another")),
    ("checkpoint: heads need not divide channels", "checkpoint.py",
     "if C % NH != 0:", "if False:", checkpoints("config_of_another")),
    ("checkpoint: vocabulary not padded", "checkpoint.py",
     "padded_vocab_size=-(-V // 128) * 128", "padded_vocab_size=V // 128 * 128 + 128", checkpoints("round_trip")),
    ("checkpoint: layers not counted", "checkpoint.py",
     "if layers != config.num_layers:", "if False:", checkpoints("test_config_of_another_model and more")),
    ("checkpoint: missing names not listed", "checkpoint.py",
     "missing = [name for name in shapes if name not in tensors]", "missing = []", checkpoints("damaged_safetensors")),
    ("checkpoint: unknown tensors ignored", "checkpoint.py",
     "unknown = [shown(name) for name in tensors if name not in shapes]", "unknown = []", checkpoints("damaged_safetensors")),
    ("checkpoint: shapes not compared", "checkpoint.py",
     "if name in tensors and (tensors[name].shape != shape or", "if name in tensors and (", checkpoints("damaged_safetensors")),
    ("checkpoint: byte count not compared", "checkpoint.py",
     "if tensors[name].data.size != expected:", "if False:", checkpoints("damaged_safetensors")),
    ("checkpoint: tensors may overlap", "checkpoint.py",
     "if begin != position:", "if begin > position:", checkpoints("damaged_safetensors")),
    ("checkpoint: holes allowed", "checkpoint.py",
     "if begin != position:", "if begin < position:", checkpoints("damaged_safetensors")),
    ("checkpoint: file's length not compared", "checkpoint.py",
     "if start + position != size:", "if False:", checkpoints("damaged_safetensors")),
    ("checkpoint: offsets without end", "checkpoint.py",
     "if begin <= end < 2**63:", "if begin <= end:", checkpoints("damaged_safetensors")),
    ("checkpoint: offsets reversed", "checkpoint.py",
     "if begin <= end < 2**63:", "if end < 2**63:", checkpoints("damaged_safetensors")),
    ("checkpoint: header as long as it says", "checkpoint.py",
     "if start > min(size, 8 + JSON_BYTES):", "if start > size:", checkpoints("damaged_safetensors")),
    ("checkpoint: header beyond the file", "checkpoint.py",
     "if start > min(size, 8 + JSON_BYTES):", "if start > 8 + JSON_BYTES:", checkpoints("damaged_safetensors")),
    ("checkpoint: tensors twice", "checkpoint.py",
     "if name in tensors:\n", "if False:\n", checkpoints("damaged_safetensors")),
    ("checkpoint: deep JSON", "checkpoint.py",
     "except (ValueError, RecursionError) as error:", "except ValueError as error:", checkpoints("damaged_json")),
    ("checkpoint: JSON of any size", "checkpoint.py",
     "if size > JSON_BYTES:", "if False:", checkpoints("damaged_json")),
    ("checkpoint: JSON no object", "checkpoint.py",
     "if not isinstance(value, dict):", "if False:", checkpoints("damaged_json")),
    ("checkpoint: values over several lines", "checkpoint.py",
     "isinstance(value, str) and value.isprintable() and", "isinstance(value, str) and", checkpoints("config_of_another")),
    ("checkpoint: pickles unexplained", "checkpoint.py",
     'if opening.startswith((b"PK", b"\\x80")):', 'if opening.startswith(b"PK"):', checkpoints("pickle")),
    ("checkpoint: zipped pickles unexplained", "checkpoint.py",
     'if opening.startswith((b"PK", b"\\x80")):', 'if opening.startswith(b"\\x80"):', checkpoints("pickle")),
    ("checkpoint: Git LFS unexplained", "checkpoint.py",
     'if opening.startswith(b"version https://git-lfs"):', "if False:", checkpoints("damaged_safetensors")),
    ("checkpoint: the hub before the disk", "checkpoint.py",
     "if os.path.exists(name):", "if os.path.isfile(name):", checkpoints("before_the_hub")),
    ("checkpoint: the hub asked for paths", "checkpoint.py",
     'or name.endswith((".bin", ".safetensors")):', ":", checkpoints("before_the_hub")),
    ("checkpoint: the hub's errors let through", "checkpoint.py",
     "except Exception as error:", "except OSError as error:", checkpoints("no_hub")),
    ("checkpoint: pickles fetched", "checkpoint.py",
     'HUB_FILES = ["config.json", ', 'HUB_FILES = ["pytorch_model.bin", ', checkpoints("from_the_hub")),
    ("checkpoint: format not said", "checkpoint.py",
     '{"__metadata__": {"format": "pt"}}', "{}", checkpoints("laid_out")),
    ("checkpoint: header not aligned", "checkpoint.py",
     'header += b" " * (-len(header) % 8)', 'header += b""', checkpoints("laid_out")),
    ("checkpoint: saved without prefix", "checkpoint.py",
     "header[PREFIX + name]", "header[name]", checkpoints("laid_out")),
    ("checkpoint: saved transposed", "checkpoint.py",
     "yield np.ascontiguousarray(view)", 'yield np.asfortranarray(view).tobytes("A")', checkpoints("laid_out or round_trip")),
    ("checkpoint: no vocabulary, no model", "checkpoint.py",
     'print(f"{folder} gets no tokenizer: {error}")\n                return', "raise", checkpoints("cannot_be_had")),
    ("checkpoint: llm.c's padding kept", "checkpoint.py",
     "params.wte[config.vocab_size:] = 0", "pass", checkpoints("padding_rows")),
    ("checkpoint: llm.c's file written to", "checkpoint.py",
     'mode="c", offset', 'mode="r+", offset', checkpoints("llmc_float32")),
    ("checkpoint: llm.c's padding not checked", "checkpoint.py",
     "if padded != config.padded_vocab_size:", "if False:", checkpoints("damaged_llmc")),
    ("checkpoint: llm.c's length not checked", "checkpoint.py",
     "if size != LLMC_HEADER_BYTES + dtype.itemsize * elements:", "if False:", checkpoints("damaged_llmc or without_harm")),
    ("checkpoint: llm.c's header not checked", "checkpoint.py",
     "if size < LLMC_HEADER_BYTES:", "if False:", checkpoints("damaged_llmc")),
    ("checkpoint: llm.c's version not checked", "checkpoint.py",
     "if version not in LLMC_DTYPES:", "if False:", checkpoints("damaged_llmc")),
    ("checkpoint: llm.c's versions exchanged", "checkpoint.py",
     '{3: "F32", 5: "BF16"}', '{5: "F32", 3: "BF16"}', checkpoints("llmc")),
    ("checkpoint: bfloat16 rounds down", "checkpoint.py",
     "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16", "bits >> 16", checkpoints("rounding")),
    ("checkpoint: bfloat16 ties up", "checkpoint.py",
     "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16", "(bits + 0x8000) >> 16", checkpoints("rounding")),
    ("checkpoint: bfloat16 loses NaN", "checkpoint.py",
     "np.where(np.isnan(values), 0x7FC0, rounded)", "rounded", checkpoints("rounding")),
    ("checkpoint: all of a long buffer saved", "checkpoint.py",
     "for _, tensor in params.items():", "for tensor in [params.flat]:", checkpoints("longer_than")),

    # Generating text
    ("decoder: positions of a new token counted from 0", "generate_gpt2.py",
     "params.wpe[position:end])", "params.wpe[:T])", generating("cached_forward")),
    ("decoder: window re-read from a token too late", "generate_gpt2.py",
     "length - max(1, self.config.max_seq_len // 2), 0", "length - max(1, self.config.max_seq_len // 2 - 1), 0",
     generating("growing")),
    ("decoder: values of a shared prompt not handed on", "generate_gpt2.py",
     "            self.values[:, 1:, :, :self.length] = self.values[:, :1, :, :self.length]\n", "", generating("same_prompt")),
    ("decoder: windows of a scored text do not overlap", "generate_gpt2.py",
     "scored, start = end, end - T // 2", "scored, start = end, end", generating("mean_loss")),
    ("decoder: kernel for many rows from two rows on", "generate_gpt2.py",
     "kernels.matvec_forward if len(inp) <= FEW_ROWS", "kernels.matvec_forward if len(inp) == 1", generating("batch_equals")),
    ("decoder: text waits in a buffer", "generate_gpt2.py",
     'print(text, end="", flush=True)\n\n    start, length', 'print(text, end="")\n\n    start, length', generating("appears")),
    ("decoder: text printed at the end", "generate_gpt2.py",
     "write(i, streams[i].add(token))", "streams[i].waiting += streams[i].add(token)", generating("appears")),
    ("decoder: NaN goes unnoticed", "generate_gpt2.py",
     "if not np.isfinite(logits).all():", "if np.isinf(logits).any():", generating("not_numbers")),
    ("decoding attention: the latest key not kept", "kernels_cpu.py",
     "k[position:] = one_head", "k[position + 1:] = one_head", decoding("attention")),
    ("decoding attention: new queries see the new keys only", "kernels_cpu.py",
     "visible = position + start + i + 1", "visible = start + i + 1", decoding("attention")),
    ("decoding attention: one query's scores not scaled", "kernels_cpu.py",
     "p[j] = scale * score", "p[j] = score", decoding("attention")),
    ("decoding attention: one query adds to what was there", "kernels_cpu.py",
     "            average[:] = 0\n", "", decoding("attention")),
    ("few rows: the rest of a row left out", "kernels_cpu.py",
     "for c in range(C // GROUP * GROUP, C):", "for c in range(C, C):", decoding("product_against")),
    ("few rows: bias lost", "kernels_cpu.py",
     "rest = bias[o + i] if bias.size > 0 else np.float32(0)", "rest = np.float32(0)", decoding("product_against")),
    ("few rows: the first four alone", "kernels_cpu.py",
     "for n in range(0, N, INPUT_ROWS):", "for n in range(0, min(N, 4), INPUT_ROWS):", decoding("product_against")),
    ("few rows: one alone adds in another order", "kernels_cpu.py",
     "for v in range(0, GROUP, LANES):\n        number", "for v in sorted(range(0, GROUP, LANES), reverse=len(input_rows) == 1):\n"
     "        number", decoding("depend_on")),
    ("int8: one scale for a whole row", "kernels_cpu.py",
     "scales[o + i, c // GROUP] if scales", "scales[o + i, 0] if scales", decoding("product_against")),
    ("int8: the first row's scale for all", "kernels_cpu.py",
     "fmul(sums[n, i], scales[i]", "fmul(sums[n, i], scales[0]", decoding("product_against")),
    ("int8: rounded down", "kernels_cpu.py",
     "to_127 + np.float32(0.5)", "to_127", decoding("nearest")),
    ("int8: NaN becomes 0", "kernels_cpu.py",
     "return largest * np.float32(0)", "return np.float32(0)", decoding("finite or extremes")),
    ("sampling: largest logit not subtracted", "sampling.py",
     "(logits - logits.max()) /", "logits /", SAMPLING),
    ("sampling: penalty rewards what is improbable", "sampling.py",
     "logits[seen] * penalty", "logits[seen] / penalty", SAMPLING),
    ("sampling: too little probability kept", "sampling.py",
     "before < p", "before <= p - 0.1", SAMPLING),
    ("sampling: one token too many kept", "sampling.py",
     "np.partition(logits, -k)[-k]", "np.partition(logits, -k)[-k - 1]", SAMPLING),
    ("sampling: chosen among what was thrown away", "sampling.py",
     "generator.random() * cumulative[-1]", "generator.random()", SAMPLING),

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
    ("hellaswag: too long a row loses its end", "hellaswag.py",
     "[-1 - sequence_length:]", "[:1 + sequence_length]", scoring("choices_of_transformers")),
    ("hellaswag: too long a row loses a token too many", "hellaswag.py",
     "[-1 - sequence_length:]", "[-sequence_length:]", scoring("choices_of_transformers or shorter")),
    ("hellaswag: targets not shifted", "hellaswag.py",
     "rows[i][:-1], rows[i][1:]", "rows[i][:-1], rows[i][:-1]", scoring("choices_of_transformers")),
    ("hellaswag: worst completion chosen", "hellaswag.py",
     "sequence_length).argmin(axis=1)", "sequence_length).argmax(axis=1)", scoring("evaluate")),
    ("hellaswag: last of equals chosen", "hellaswag.py",
     "sequence_length).argmin(axis=1)", "sequence_length)[:, ::-1].argmin(axis=1) * -1 + 3", scoring("equal")),
    ("hellaswag: NaN is a score", "hellaswag.py",
     "if not np.isfinite(means).all():", "if False:", scoring("finite or damaged")),
    ("hellaswag: progress never done", "hellaswag.py",
     'show_progress("hellaswag", done + 1', 'show_progress("hellaswag", done', scoring("progress")),
    ("hellaswag: longest example not in the header", "hellaswag.py",
     "max(map(len, contents), default=0)", "0", scoring("laid_out")),
    ("hellaswag: magic not checked", "hellaswag.py", "if magic != MAGIC:", "if False:", scoring("damaged_file")),
    ("hellaswag: version not checked", "hellaswag.py", "if version != VERSION:", "if False:", scoring("damaged_file")),
    ("hellaswag: no example is fine", "hellaswag.py", "if not 1 <= num_examples", "if not 0 <= num_examples",
     scoring("damaged_file")),
    ("hellaswag: vocabulary not checked", "hellaswag.py", "if largest >= vocab_size:", "if largest > vocab_size:",
     scoring("damaged_file")),
    ("hellaswag: what follows the examples ignored", "hellaswag.py", "if 2 * position != len(contents):", "if False:",
     scoring("damaged_file")),
    ("hellaswag: index not checked", "hellaswag.py", "(start, found, completions) != (START, index, COMPLETIONS)",
     "(start, completions) != (START, COMPLETIONS)", scoring("damaged_file")),
    ("hellaswag: number of completions not checked", "hellaswag.py",
     "(start, found, completions) != (START, index, COMPLETIONS)",
     "(start, found) != (START, index)", scoring("damaged_file")),
    ("hellaswag: label 4 is fine", "hellaswag.py", "if label >= COMPLETIONS:", "if label > COMPLETIONS:",
     scoring("damaged_file")),
    ("hellaswag: odd sizes are fine", "hellaswag.py", "if size % 2 != 0 or size", "if size", scoring("damaged_file")),
    ("hellaswag: example may go beyond the file", "hellaswag.py", "or size > 2 * len(words):", "or False:",
     scoring("damaged_file")),
    ("hellaswag: empty texts are fine", "hellaswag.py", "if not 1 <= length < len(rest):", "if not 0 <= length < len(rest):",
     scoring("damaged")),
    ("hellaswag: text may go beyond its example", "hellaswag.py", "if not 1 <= length < len(rest):", "if not 1 <= length:",
     scoring("damaged")),
    ("hellaswag: texts not counted", "hellaswag.py", "if len(texts) != 1 + COMPLETIONS:", "if False:", scoring("damaged_file")),
    ("hellaswag: example of any size is written", "hellaswag.py", "if max(size, len(examples)) > LARGEST:",
     "if len(examples) > LARGEST:", scoring("cannot_hold")),
    ("evaluate: the batch before is remembered", "dev/evaluate.py", "decoder.length = 0 ", "pass ",
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
    ("prepare hellaswag: the rest not downloaded", "dev/prepare_hellaswag.py", "-(-SIZE // PIECE)", "SIZE // PIECE",
     scoring("download")),
    ("prepare hellaswag: lines counted from 0", "dev/prepare_hellaswag.py", "enumerate(lines, 1)", "enumerate(lines)",
     scoring("unusable")),
    ("prepare hellaswag: line ends of Unicode end lines", "dev/prepare_hellaswag.py",
     'contents.removesuffix(b"\\n").split(b"\\n")', '[each.encode() for each in contents.decode().splitlines()]', scoring("prepared_examples")),
    # plot_runs
    ("plot: last line read though it is cut", "dev/plot_runs.py", 'text.split("\\n")[:-1]', 'text.split("\\n")', PLOTTING),
    ("plot: mean of later steps", "dev/plot_runs.py", "starts = np.maximum(ends - window, 0)",
     "starts = np.maximum(ends - window - 1, 0)", PLOTTING),
    ("plot: seconds not added up", "dev/plot_runs.py", 'seconds += row.get("milliseconds", 0.0) / 1000',
     'seconds = row.get("milliseconds", 0.0) / 1000', PLOTTING),
    ("plot: validation out of sight", "dev/plot_runs.py",
     "run.validation[run.validation[:, 0] >= tenth, 2]]", "[]]", PLOTTING),
    ("plot: steep fall in sight", "dev/plot_runs.py", "smooth[run.training[:, 0] >= tenth]", "smooth", PLOTTING),
    ("plot: numbers of any size", "dev/plot_runs.py", "0 <= value <= LARGEST", "0 <= value", PLOTTING),
    ("plot: names may be the same", "dev/plot_runs.py", "if len({run.name for run in runs}) < len(runs):", "if False:",
     PLOTTING),
    ("plot: columns taken by place", "dev/plot_runs.py", "zip(columns, fields) if field and name in COLUMNS",
     "zip(COLUMNS, fields) if field", PLOTTING),
    ("plot: names are formulas", "dev/plot_runs.py", "text=label, parse_math=False", "text=label", PLOTTING),
]]


COMPILE_ERRORS = "numba.core.errors", "does not compile"     # Numba's, and what dev/cuda_on_cpu says


def run_tests(folder, tests):
    """Run pytest in folder. Return the name of the first test that fails, or None if all pass.

    Raises RuntimeError if the tests could not be run: a bug that does not even compile would prove nothing.
    """
    selection = tests.split(maxsplit=2)     # a file, and perhaps -k and an expression
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *selection]
    # Python takes a file of the same size and second for the same file, and would go on running its bytecode.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    failed = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    if result.returncode == 0:
        return None
    if result.returncode != 1 or not failed or any(error in result.stdout for error in COMPILE_ERRORS):
        raise RuntimeError(f"pytest could not run {tests}:\n{result.stdout}{result.stderr}")
    return failed[1].split("/")[-1]


def first_failure(folder, mutation):
    """Apply the mutation in folder, run its tests and take it back. Return what run_tests returns."""
    path = folder / mutation.file
    source = path.read_text()
    count = source.count(mutation.original)
    if count != 1:
        raise RuntimeError(f"{mutation.name}: found {count} times in {mutation.file}, expected once: {mutation.original!r}")
    path.write_text(source.replace(mutation.original, mutation.replacement))
    try:
        return run_tests(folder, mutation.tests)
    finally:
        path.write_text(source)


def main():
    mutations = [mutation for mutation in MUTATIONS if all(word in mutation.name for word in sys.argv[1:])]
    if not mutations:
        sys.exit(f"mutations.py: no bug has {' and '.join(sys.argv[1:])} in its name")
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        shutil.copytree(CHECKOUT, folder, ignore=NOT_COPIED)
        for tests in sorted({mutation.tests for mutation in mutations}):
            failure = run_tests(folder, tests)
            if failure:
                sys.exit(f"mutations.py: {failure} fails without any bug")
        for mutation in mutations:
            failure = first_failure(folder, mutation)
            survivors += failure is None
            print(f"{mutation.name:54} {f'caught by {failure}' if failure else 'NOT CAUGHT'}", flush=True)
    print(f"\n{len(mutations) - survivors} of {len(mutations)} bugs caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
