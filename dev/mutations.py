"""Put a bug into the program, see a test fail, and again for every bug in a table: who tests the tests.

    python dev/mutations.py               all bugs: about five minutes on two cores
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
     "dout[:, start:stop].T, inp, 1.0)", "dout[:, start:stop].T, inp, 0.0)", kernel("matmul")),

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
     "sgemm(p, scale, q[start:stop], k[:stop].T, 0.0)\n            for",
     "sgemm(p, 1.0, q[start:stop], k[:stop].T, 0.0)\n            for", kernel("attention")),
    ("attention: mask lets one later key through", "kernels_cpu.py",
     "visible = start + i + 1\n                row =", "visible = min(start + i + 2, stop)\n                row =",
     kernel("attention")),
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
     "residual, params.lnfw, params.lnfb)", "residual, params.ln1w[0], params.lnfb)", "test_gpt2.py -k activations"),
    ("model backward: final layernorm with another's weight", "train_gpt2.py",
     "acts.lnf_mean, acts.lnf_rstd, residual, params.lnfw)", "acts.lnf_mean, acts.lnf_rstd, residual, params.ln1w[0])",
     GRADIENTS),
    ("model backward: residual branch dropped", "train_gpt2.py",
     "kernels.gelu_backward(dfch, dfch, acts.fch[l])", "kernels.gelu_backward(dfch, dfch, acts.fch[l]); dresidual[...] = 0",
     GRADIENTS),
    ("model backward: residual of the wrong layer", "train_gpt2.py",
     "acts.residual3[l - 1] if l > 0 else acts.encoded", "acts.residual3[l]", GRADIENTS),
    ("model backward: old dresidual left in", "train_gpt2.py",
     "dresidual[...] = 0\n", "pass\n", "test_gpt2.py"),
    ("model backward: token embedding used once", "train_gpt2.py",
     "kernels.encoder_backward(grads.wte,", "kernels.encoder_backward(np.zeros_like(grads.wte),", GRADIENTS),
    ("model: last classifier chunk left out", "train_gpt2.py",
     "for start in range(0, N, size)", "for start in range(0, N - size + 1, size)", TRAINING),
    ("model: logits of the first token, not the last", "train_gpt2.py",
     "self.acts.lnf[-1:]", "self.acts.lnf[:1]", TRAINING),
    ("model backward: not divided by the micro-batches", "train_gpt2.py",
     "1 / (N * accumulation_steps)", "1 / N", TRAINING),
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
     "self.position + self.step_tokens + 1 > len", "self.position + self.step_tokens > len", DATA),
]]


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
    if result.returncode != 1 or not failed or "numba.core.errors" in result.stdout:
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
