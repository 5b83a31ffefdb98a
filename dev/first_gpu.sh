#!/usr/bin/env bash
# What to run on a GPU that has not seen this program, in four parts of less than ten minutes each:
#
#     dev/first_gpu.sh tests OUT          versions, the tests on the GPU, losses beside the CPU program's, races between threads
#     dev/first_gpu.sh flash OUT          flash attention beside PyTorch's, forward and backward; ncu's report, if there is ncu
#     dev/first_gpu.sh benchmark OUT      steps and kernels in TF32 and bfloat16 beside PyTorch's, if this Python has it
#     dev/first_gpu.sh training OUT       300 steps of GPT-2 124M in TF32 and in bfloat16, and whether two runs are the same
#
# Each writes what it finds to the folder OUT; the exit status is 1 if something failed. PYTHON, DEVICE and MODELS in the
# environment replace python3, cuda and "d4 d12". Flags after OUT go to the program that a part runs, in `tests` to
# train_gpt2_gpu.py. It needs no network, because the tokens are drawn at random, and no CUDA toolkit: compute-sanitizer and ncu
# are left out where they are missing. `dev/first_gpu.sh record OUT` writes dev/first_gpu_losses.csv, the losses of the CPU
# program.
set -uo pipefail
usage="expected tests, flash, benchmark, training or record, then a folder"
part=${1:?"$usage"} out=${2:?"$usage"}
shift 2
case $part in
    tests | flash | benchmark | training | record) ;;
    *) echo "first_gpu.sh: $part: $usage" >&2; exit 2;;
esac
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} models=${MODELS:-d4 d12} recorded=dev/first_gpu_losses.csv status=0
export PIP_NO_INDEX=1       # if GPT-2's vocabulary is missing, pip does not look for a network, and programs do without
export PYTHONUNBUFFERED=1   # OUT has all that a part found before it was stopped

attempt() {     # attempt NAME COMMAND...: what it prints also goes to OUT/NAME.txt
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    if "$@" 2>&1 | tee "$out/$name.txt" | tail -n 20; then
        echo "== $name took $((SECONDS - started)) s"
    else
        echo "== $name failed after $((SECONDS - started)) s"
        return 1
    fi
}

run() {         # the same; a failure is one of the part
    attempt "$@" || status=1
}

there_is() {
    command -v "$1" > /dev/null
}

report_versions() {
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv
    for tool in nvcc compute-sanitizer ncu; do command -v "$tool" || echo "$tool: none"; done
    $python - <<'PYTHON'
import importlib.metadata, platform
print("python", platform.python_version())
for name in "cupy-cuda12x", "cupy-cuda13x", "nvidia-cublas-cu12", "nvidia-cublas", "numpy", "numba", "torch":
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
    $python "$program" --input-bin "$out/tokens.bin" --sample-every 0 --checkpoint-every 0 --output-dir "$out/$name" "$@" \
        && find "$out/$name" -name "*.safetensors" -delete
}

ten_steps() {   # ten_steps PROGRAM NAME FLAGS...: of every model
    local program=$1 name=$2 model
    shift 2
    for model in $models; do
        train "$program" "$name-$model" --model "$model" --batch-size 4 --sequence-length 64 --num-iterations 10 \
            --learning-rate 3e-4 "$@" || return 1
    done
}

compare_losses() {      # compare_losses NAME BOUND
    $python - "$recorded" "$out" "$1" "$2" $models <<'PYTHON'
import csv, sys
recorded, out, name, bound, *models = sys.argv[1:]
worst = 0
for model in models:
    expected = [row for row in csv.DictReader(open(recorded)) if row["model"] == model]
    actual = [row for row in csv.DictReader(open(f"{out}/{name}-{model}/log.csv")) if row["train_loss"]]
    if not len(actual) == len(expected) > 0:
        sys.exit(f"first_gpu.sh: {len(actual)} losses of {model}, expected {len(expected)} as in {recorded}")
    for theirs, ours in zip(expected, actual):
        error = abs(float(ours["train_loss"]) / float(theirs["train_loss"]) - 1)
        print(f"{name} {model} step {ours['step']:>2}: {ours['train_loss']}, on the CPU {theirs['train_loss']}, "
              f"relative difference {error:.1e}")
        worst = max(worst, error) if error == error else float("inf")
sys.exit(0 if worst < float(bound) else f"first_gpu.sh: losses differ by {worst:.1e}, expected less than {bound}")
PYTHON
}

record_losses() {
    ten_steps train_gpt2.py recorded || return 1
    $python - "$recorded" "$out" $models <<'PYTHON'
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

same_logs() {   # same_logs NAME NAME: without their times
    local name
    for name in "$@"; do
        cut -d, -f1-6 "$out/$name/log.csv" > "$out/$name.csv" || return 1
    done
    cmp "$out/$1.csv" "$out/$2.csv"
}

case $part in
    tests)
        run versions report_versions
        run tests $python -m pytest -q dev/tests/test_device.py dev/tests/test_cublaslt.py dev/tests/test_kernels_gpu.py \
            dev/tests/test_kernels_bfloat16.py dev/tests/test_flash_attention.py dev/tests/test_train_gpt2_gpu.py \
            dev/tests/test_generate_gpu.py -k "cuda or test_cublaslt"
        make_tokens || exit 1
        run steps-float32 ten_steps train_gpt2_gpu.py float32 --device "$device" "$@"
        run losses-float32 compare_losses float32 1e-4
        run steps-bfloat16 ten_steps train_gpt2_gpu.py bfloat16 --device "$device" --dtype bfloat16 "$@"
        run losses-bfloat16 compare_losses bfloat16 2e-2
        if there_is compute-sanitizer; then
            # Kernels with shared memory. Products are the library's; two cases of cached attention have some.
            kernels="(flash or encoder or norm or classifier or mean_loss or cached and not position5 and not position30)"
            run races timeout 300 compute-sanitizer --tool racecheck --target-processes all --error-exitcode 1 \
                $python -m pytest -q dev/tests/test_flash_attention.py dev/tests/test_kernels_gpu.py \
                dev/tests/test_kernels_bfloat16.py -k "cuda and against_float64 and $kernels"
        fi;;
    flash)
        run flash $python dev/benchmark_attention.py --device "$device" "$@"
        if there_is ncu; then       # not everybody may read the counters of a GPU
            attempt ncu timeout 120 ncu --target-processes all --clock-control none --kernel-name regex:^flash_attention \
                --section SpeedOfLight --section Occupancy --section LaunchStats --section MemoryWorkloadAnalysis \
                --section ComputeWorkloadAnalysis --section WarpStateStats \
                $python dev/benchmark_attention.py --device "$device" --sizes 4x12x1024 --once
        fi;;
    benchmark)
        run benchmark $python dev/benchmark.py --device "$device" --model d12 --shapes 4x1024 32x1024 --rounds 1 \
            --dtypes tf32 bfloat16 --output "$out/benchmark.png" "$@";;
    training)
        make_tokens || exit 1
        for name in tf32 bfloat16 bfloat16-again; do
            run "train-$name" train train_gpt2_gpu.py "$name" --device "$device" --dtype "${name%-again}" \
                --model d12 --batch-size 4 --sequence-length 1024 --num-iterations 300 "$@"
        done
        run identical same_logs bfloat16 bfloat16-again;;
    record)
        make_tokens || exit 1
        run record record_losses;;
esac
exit $status
