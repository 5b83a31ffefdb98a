#!/usr/bin/env bash
# What to run on a GPU that has not seen this program, in three parts of a few minutes each:
#
#     dev/first_gpu.sh tests OUT          versions, the tests on the GPU, losses beside the CPU program's, races between threads
#     dev/first_gpu.sh benchmark OUT      steps and kernels beside PyTorch's, if this Python has it
#     dev/first_gpu.sh training OUT       300 steps of GPT-2 124M in float32 and in TF32, and whether two runs are the same
#
# Each writes what it finds to the folder OUT; the exit status is 1 if something failed. PYTHON, DEVICE and MODELS in the
# environment replace python3, cuda and "d4 d12". It needs no network, because the tokens are drawn at random, and no CUDA
# toolkit. `dev/first_gpu.sh record OUT` writes dev/first_gpu_losses.csv, the losses of the CPU program.
set -uo pipefail
part=${1:?"expected tests, benchmark, training or record"} out=${2:?"expected a folder"}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} recorded=dev/first_gpu_losses.csv status=0

run() {     # run NAME COMMAND...: what it prints also goes to OUT/NAME.txt
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.txt" | tail -n 15 || { echo "== $name failed"; status=1; }
}

report_versions() {
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv
    for tool in nvcc compute-sanitizer ncu; do command -v $tool || echo "$tool: none"; done
    $python - <<'PYTHON'
import importlib.metadata, platform
print("python", platform.python_version())
for name in "cupy-cuda12x", "cupy-cuda13x", "numpy", "numba", "torch":
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "none")
PYTHON
}

make_tokens() {     # words of a language have about these frequencies
    $python - "$out/tokens.bin" <<'PYTHON'
import sys
import zlib
import numpy as np
from dataloader import write_tokens
tokens = np.random.default_rng(1337).zipf(1.2, 4_000_000)
tokens = tokens[tokens < 50257][:1_300_000].astype(np.uint16)
if zlib.crc32(tokens.tobytes()) != 1435750095:
    print("first_gpu.sh: this version of NumPy draws other tokens than those of the recorded losses", file=sys.stderr)
write_tokens(sys.argv[1], tokens)
PYTHON
}

train() {   # train PROGRAM NAME FLAGS...
    local program=$1 name=$2
    shift 2
    $python "$program" --input-bin "$out/tokens.bin" --sample-every 0 --output-dir "$out/$name" "$@" \
        && rm -f "$out/$name"/*.safetensors
}

ten_steps() {   # ten_steps PROGRAM NAME FLAGS...: of d4 and d12
    local program=$1 name=$2 model
    shift 2
    for model in ${MODELS:-d4 d12}; do
        train "$program" "$name-$model" --model "$model" --batch-size 4 --sequence-length 64 --num-iterations 10 \
            --learning-rate 3e-4 "$@" || return 1
    done
}

compare_losses() {
    $python - "$recorded" "$out" ${MODELS:-d4 d12} <<'PYTHON'
import csv, sys
recorded, out, *models = sys.argv[1:]
worst = 0
for model in models:
    expected = [row for row in csv.DictReader(open(recorded)) if row["model"] == model]
    actual = [row for row in csv.DictReader(open(f"{out}/losses-{model}/log.csv")) if row["train_loss"]]
    assert len(actual) == len(expected) > 0, f"{len(actual)} losses of {model}, expected {len(expected)}"
    for theirs, ours in zip(expected, actual):
        error = abs(float(ours["train_loss"]) / float(theirs["train_loss"]) - 1)
        print(f"{model} step {ours['step']:>2}: {ours['train_loss']}, on the CPU {theirs['train_loss']}, "
              f"relative difference {error:.1e}")
        worst = max(worst, error) if error == error else float("inf")
sys.exit(0 if worst < 1e-4 else f"first_gpu.sh: losses differ by {worst:.1e}, expected less than 1e-4")
PYTHON
}

record_losses() {
    ten_steps train_gpt2.py recorded || return 1
    $python - "$recorded" "$out" ${MODELS:-d4 d12} <<'PYTHON'
import csv, sys
recorded, out, *models = sys.argv[1:]
with open(recorded, "w") as file:
    print("model,step,train_loss", file=file)
    for model in models:
        for row in csv.DictReader(open(f"{out}/recorded-{model}/log.csv")):
            if row["train_loss"]:
                print(model, row["step"], row["train_loss"], sep=",", file=file)
PYTHON
}

case $part in
    tests)
        run versions report_versions
        run tests $python -m pytest -q dev/tests/test_device.py dev/tests/test_kernels_gpu.py dev/tests/test_train_gpt2_gpu.py \
            dev/tests/test_generate_gpu.py -k cuda
        make_tokens || exit 1
        run steps ten_steps train_gpt2_gpu.py losses --device "$device"
        run losses compare_losses
        if command -v compute-sanitizer > /dev/null; then
            run races compute-sanitizer --tool racecheck --error-exitcode 1 $python -m pytest -q dev/tests/test_kernels_gpu.py \
                -k "cuda and (layernorm or classifier or cached)"
        fi;;
    benchmark)
        run benchmark $python dev/benchmark.py --device "$device" --model d12 --shapes 4x1024 32x1024 --rounds 2 \
            --output "$out/benchmark.png";;
    training)
        make_tokens || exit 1
        for dtype in float32 tf32 tf32-again; do
            run "train-$dtype" train train_gpt2_gpu.py "$dtype" --device "$device" --dtype "${dtype%-again}" \
                --model d12 --batch-size 4 --sequence-length 1024 --num-iterations 300
        done
        cut -d, -f1,2,6 "$out/tf32/log.csv" > "$out/tf32.csv"
        cut -d, -f1,2,6 "$out/tf32-again/log.csv" > "$out/tf32-again.csv"
        run identical cmp "$out/tf32.csv" "$out/tf32-again.csv";;
    record)
        make_tokens || exit 1
        run record record_losses;;
    *)
        echo "first_gpu.sh: $part, expected tests, benchmark, training or record" >&2
        exit 2;;
esac
exit $status
