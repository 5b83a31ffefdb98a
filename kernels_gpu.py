"""The layers of GPT-2 on the GPU: CUDA C kernels, each above the Python function that launches it.

Read it beside kernels_cpu.py. Names, argument order and shapes are the same, and so is what accumulates, what is overwritten
and what is saved for the backward pass. The cost is the same too, unless a docstring here gives another. What differs is how
the work is divided among threads; the comments are about that. The gradients are derived in dev/derivations/.

How the work is divided
    A kernel launch starts a grid of thread blocks. All threads run the same function and find their part of the work from
    `blockIdx` and `threadIdx`. The threads of a block share fast on-chip memory (`__shared__`) and can wait for each other
    at a barrier (`__syncthreads`). The 32 threads of a warp, its lanes, run together and can read each other's registers
    (`__shfl`). Blocks cannot wait for each other, so a reduction across blocks takes a second launch.

What is fast
    All kernels in this file are memory-bound; matrix products are left to cuBLAS. Memory is fastest under two conditions.
    The lanes of a warp read neighboring addresses (coalesced access), each with one vectorized 16-byte load. And enough
    loads are in flight to hide their latency: about 20 KB per multiprocessor, for which 2,048 threads (full occupancy) with
    one load each are enough. So nearly every kernel handles four neighboring floats per thread: `Four`.

Determinism
    There are no atomic additions, and every sum runs in an order that depends only on the shapes, not on the GPU: the same
    input gives the same bits. Partial sums that one launch leaves for the next are in temporary arrays (`device.empty`).
"""
import numpy as np

from gpt2 import ceil_div

CLASSIFIER_ROWS = 2048  # rows of logits that exist at any one time: 2048 * 50304 * 4 bytes = 412 MB
device = None           # device.CudaDevice or cuda_on_cpu.CpuDevice: where arrays live and kernels run, set by `use`


def use(new_device):
    """Run the kernels on new_device from now on.

    The device is a global of this module, so that calls read as they do in kernels_cpu.py. With two models on two devices, a
    pass of one would therefore run on the device of the other. So every method that launches kernels first calls this.
    """
    global device
    if new_device is not device:
        new_device.load(SOURCES)
        device = new_device


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks, in front of every layer's source

COMMON = r"""
constexpr float FLOAT_MAX = 3.402823466e38f;    // infinity compares greater; a comparison with NaN is false

// Four neighboring floats of a row, the part of one thread.
struct alignas(16) Four { float x[4]; };

__device__ inline void operator+=(Four& sum, Four term) {
    for (int k = 0; k < 4; k++) sum.x[k] += term.x[k];
}

// Access to rows of `length` floats, four per thread. It is vectorized, one 16-byte access (CUDA's float4), if the length is a
// multiple of 4 and all arrays start at multiples of 16 bytes, which holds for GPT-2's own sizes (see gpt2.ALIGNMENT).
// Otherwise the floats are accessed one by one; those past the end of a row read as 0 and are not written.
struct Fours {
    size_t length;
    bool vectorized;

    template <class... Arrays>
    __device__ Fours(size_t length, Arrays... arrays)
        : length(length), vectorized(((length % 4 == 0) && ... && ((size_t)arrays % 16 == 0))) {}

    __device__ Four load(const float* row, size_t i) const {
        if (vectorized) {
            float4 four = *(const float4*)(row + i);
            return {four.x, four.y, four.z, four.w};
        }
        Four four;
        for (int k = 0; k < 4; k++) four.x[k] = i + k < length ? row[i + k] : 0;
        return four;
    }

    __device__ void store(float* row, size_t i, Four four) const {
        if (vectorized) *(float4*)(row + i) = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
        else for (int k = 0; k < 4; k++) if (i + k < length) row[i + k] = four.x[k];
    }
};

// Warp reduction: the sum of the lanes' values, in every lane. Each lane adds the value of the lane at distance 1, then at
// distance 2, 4, 8 and 16.
template <class Number>
__device__ inline Number warp_sum(Number value) {
    for (int distance = 1; distance < 32; distance *= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int distance = 1; distance < 32; distance *= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, distance));
    return value;
}

// Block reduction: the sum of the threads' values, in every thread. `warps` is shared memory, one number per warp, at most 32.
template <class Number>
__device__ inline Number block_sum(Number value, Number* warps) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = warp_sum(value);
    __syncthreads();                                    // a slower warp may still be reading the sum before this one
    if (lane == 0) warps[warp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? warps[lane] : Number(0));
}

// The state of an online softmax: the largest number so far, and the sum of exp(x - largest). When a larger number arrives, the
// sum is rescaled to it, so one pass finds both. `see` adds the first `count` of four numbers. As in kernels_cpu.py, a NaN
// never becomes the largest; it comes out in the sum.
struct Softmax { float largest, sum; };
#define NOTHING_SEEN Softmax{-FLOAT_MAX, 0}

__device__ inline Softmax see(Softmax seen, Four four, int count) {
    float largest = seen.largest;
    for (int k = 0; k < 4; k++) if (k < count) largest = fmaxf(largest, four.x[k]);
    float sum = seen.sum * expf(seen.largest - largest);
    for (int k = 0; k < 4; k++) if (k < count) sum += expf(four.x[k] - largest);
    return {largest, sum};
}

__device__ inline Softmax warp_softmax(Softmax seen) {
    float largest = warp_max(seen.largest);
    return {largest, warp_sum(seen.sum * expf(seen.largest - largest))};
}

__device__ inline Softmax block_softmax(Softmax seen, Softmax* warps) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    seen = warp_softmax(seen);
    if (lane == 0) warps[warp] = seen;
    __syncthreads();
    return warp_softmax(lane < blockDim.x / 32 ? warps[lane] : NOTHING_SEEN);
}

// Block reduction over threadIdx.y: the sum of the fours of each column of threads, for the threads with threadIdx.y == 0.
// Each round adds one half of the rows of threads to the other, until one row is left. `threads` is shared memory, one Four
// per thread; blockDim.y is a power of two.
__device__ inline Four sum_over_y(Four value, Four* threads) {
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    threads[thread] = value;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) threads[thread] += threads[thread + half * blockDim.x];
    }
    return threads[thread];
}
"""

ROW_THREADS = 256       # at most, in a block that handles one row


def row_threads(C, most=ROW_THREADS):
    """The block size for a row of C floats, four per thread: whole warps, no more rounds than with `most` threads."""
    rounds = ceil_div(ceil_div(C, 4), most)
    return 32 * ceil_div(ceil_div(C, 4), 32 * rounds)


COLUMN_SUMS = r"""
// out (parts, C) = or += the sum of inp (N, C) over its rows; each part sums different rows. A block has 8 x 32 threads for
// 32 columns: the 8 in x read 128 neighboring bytes of a row, the 32 in y loop over the rows.
extern "C" __global__ void column_sums(
    float* __restrict__ out,            // (parts, C)
    const float* __restrict__ inp,      // (N, C)
    int parts, int N, int C, int accumulate)
{
    Fours fours(C, out, inp);
    __shared__ Four threads[256];
    int c = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    float* out_row = out + (size_t)blockIdx.y * C;
    int first = blockIdx.y * blockDim.y + threadIdx.y, step = parts * blockDim.y, rounds = (N - first + step - 1) / step;
    Four sum = {};
    if (c < C) {
        #pragma unroll 4                // four loads in flight per thread: there is no arithmetic to hide their latency
        for (int round = 0; round < rounds; round++) sum += fours.load(inp + (size_t)(first + round * step) * C, c);
    }
    sum = sum_over_y(sum, threads);
    if (threadIdx.y == 0 && c < C) {
        if (accumulate) sum += fours.load(out_row, c);
        fours.store(out_row, c, sum);
    }
}
"""


def column_sums(out, inp):
    """out (C) += the sum of inp (N, C) over its rows: in one launch, or in two if there are more than 1,024 rows.

    The first of two launches divides the rows into enough parts for 1,024 blocks, 8 per multiprocessor of a large GPU.

    Cost: N*C FLOPs, 4*N*C bytes: memory-bound. See dev/derivations/matmul.md.
    """
    N, C = inp.shape
    columns, block = ceil_div(C, 32), (8, 32)
    if N > 1024:
        parts = max(1, min(1024 // columns, N // 32))
        partial = device.empty((parts, C))
        device.launch("column_sums", (columns, parts), block, partial, inp, parts, N, C, 0)
        N, inp = parts, partial
    device.launch("column_sums", columns, block, out, inp, 1, N, C, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder: token and position embedding

ENCODER = r"""
// One block per row, four channels per thread.
extern "C" __global__ void encoder_forward(
    float* __restrict__ out,            // (N, C)
    const int* __restrict__ tokens,     // (N)
    const float* __restrict__ wte,      // (Vp, C)
    const float* __restrict__ wpe,      // (maxT, C)
    int N, int T, int C, int Vp, int maxT)
{
    Fours fours(C, out, wte, wpe);
    int n = blockIdx.x;
    const float* token_row = wte + (size_t)tokens[n] * C;
    const float* position_row = wpe + (size_t)(n % T) * C;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four sum = fours.load(token_row, c);
        sum += fours.load(position_row, c);
        fours.store(out + (size_t)n * C, c, sum);
    }
}

// A token can occur many times, so one block must sum all its rows. `order` lists the rows sorted by token, which gives each
// token one run of rows. The block at the start of a run sums it; the other blocks return at once. A block has 32 x 8 threads
// for 128 channels and reads eight rows of a run at a time.
extern "C" __global__ void encoder_backward_wte(
    float* __restrict__ dwte,           // (Vp, C)
    const float* __restrict__ dout,     // (N, C)
    const int* __restrict__ tokens,     // (N)
    const int* __restrict__ order,      // (N)
    int N, int C, int Vp)
{
    Fours fours(C, dwte, dout);
    __shared__ Four threads[256];
    int first = blockIdx.x, c = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    int token = tokens[order[first]];
    if (first > 0 && tokens[order[first - 1]] == token) return;
    Four sum = {};
    if (c < C)
        for (int i = first + threadIdx.y; i < N && tokens[order[i]] == token; i += blockDim.y)
            sum += fours.load(dout + (size_t)order[i] * C, c);
    sum = sum_over_y(sum, threads);
    if (threadIdx.y == 0 && c < C) {
        sum += fours.load(dwte + (size_t)token * C, c);
        fours.store(dwte + (size_t)token * C, c, sum);
    }
}

// One block per position, four channels per thread. Each thread sums over the sequences.
extern "C" __global__ void encoder_backward_wpe(
    float* __restrict__ dwpe,           // (maxT, C)
    const float* __restrict__ dout,     // (N, C)
    int N, int T, int C, int maxT)
{
    Fours fours(C, dwpe, dout);
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four sum = fours.load(dwpe + (size_t)blockIdx.x * C, c);
        for (int n = blockIdx.x; n < N; n += T) sum += fours.load(dout + (size_t)n * C, c);
        fours.store(dwpe + (size_t)blockIdx.x * C, c, sum);
    }
}
"""


def encoder_forward(out, tokens, wte, wpe):
    """out (N, C) = wte[token] + wpe[position], for tokens (B, T), wte (Vp, C) and wpe (maxT, C).

    Derived in dev/derivations/encoder.md.
    """
    N, C = out.shape
    device.launch("encoder_forward", N, row_threads(C), out, tokens, wte, wpe, N, tokens.shape[1], C, len(wte), len(wpe))


def encoder_backward(dwte, dwpe, dout, tokens):
    """dwte[token] += dout and dwpe[position] += dout, for every row of dout (N, C); dwte (Vp, C), dwpe (maxT, C).

    Derived in dev/derivations/encoder.md.
    """
    N, C = dout.shape
    T = tokens.shape[1]
    order = device.argsort(tokens.reshape(N))
    device.launch("encoder_backward_wte", (N, ceil_div(C, 128)), (32, 8), dwte, dout, tokens, order, N, C, len(dwte))
    device.launch("encoder_backward_wpe", T, row_threads(C), dwpe, dout, N, T, C, len(dwpe))


# ----------------------------------------------------------------------------------------------------------------------
# Layer normalization (Ba, Kiros and Hinton 2016)

LAYERNORM = r"""
constexpr float LAYERNORM_EPSILON = 1e-5f;

// One block per row, four channels per thread. The row is read, or it is the sum of the residual stream and a projection's
// output. It stays in shared memory for the two passes after its mean is known: the variance and the result. A thread reads
// only the fours that it wrote itself, so no barrier is needed for them.
extern "C" __global__ void residual_layernorm_forward(
    float* __restrict__ residual,           // (N, C) or empty
    float* __restrict__ out,                // (N, C)
    float* __restrict__ mean,               // (N)
    float* __restrict__ rstd,               // (N)
    const float* __restrict__ inp1,         // (N, C)
    const float* __restrict__ inp2,         // (N, C) or empty
    const float* __restrict__ inp2_bias,    // (C) or empty
    const float* __restrict__ weight,       // (C)
    const float* __restrict__ bias,         // (C)
    int N, int C)
{
    Fours fours(C, residual, out, inp1, inp2, inp2_bias, weight, bias);
    extern __shared__ Four row[];
    __shared__ float warps[32];
    size_t start = (size_t)blockIdx.x * C;
    float total = 0;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four x = fours.load(inp1 + start, c), y = inp2 ? fours.load(inp2 + start, c) : Four{};
        y += inp2_bias ? fours.load(inp2_bias, c) : Four{};
        x += y;
        if (residual) fours.store(residual + start, c, x);
        for (int k = 0; k < 4; k++) total += x.x[k];
        row[c / 4] = x;
    }
    float m = block_sum(total, warps) / C, squares = 0;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four x = row[c / 4];
        for (int k = 0; k < 4; k++) squares += c + k < C ? (x.x[k] - m) * (x.x[k] - m) : 0;
    }
    float r = 1 / sqrtf(block_sum(squares, warps) / C + LAYERNORM_EPSILON);
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four x = row[c / 4], w = fours.load(weight, c), b = fours.load(bias, c);
        for (int k = 0; k < 4; k++) x.x[k] = (x.x[k] - m) * r * w.x[k] + b.x[k];
        fours.store(out + start, c, x);
    }
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }
}

// A grid-stride loop over the rows: a block handles the rows n, n + blocks, n + 2 * blocks, ..., four channels per thread. What
// a row needs again once its two sums are known stays in shared memory, including dinp with the direct term added. So each
// number of the row is read once from global memory, and all of these loads are in flight together. dweight and dbias are
// sums over rows: a block accumulates its partial sums in shared memory, and column_sums adds those of all blocks.
extern "C" __global__ void layernorm_backward(
    float* __restrict__ dinp,               // (N, C)
    float* __restrict__ dweight_parts,      // (blocks, C)
    float* __restrict__ dbias_parts,        // (blocks, C)
    const float* __restrict__ dout,         // (N, C)
    const float* __restrict__ mean,         // (N)
    const float* __restrict__ rstd,         // (N)
    const float* __restrict__ inp,          // (N, C)
    const float* __restrict__ weight,       // (C)
    int N, int C, int blocks)
{
    Fours fours(C, dinp, dweight_parts, dbias_parts, dout, inp, weight);
    extern __shared__ Four rows[];
    __shared__ float warps[32];
    int count = (C + 3) / 4;
    Four *dweight = rows, *dbias = rows + count, *norm = rows + 2 * count, *direct = rows + 3 * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) dweight[i] = dbias[i] = Four{};
    for (int n = blockIdx.x; n < N; n += blocks) {
        size_t start = (size_t)n * C;
        float m = mean[n], r = rstd[n], dnorm_sum = 0, dnorm_norm_sum = 0;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            Four x = fours.load(inp + start, 4 * i), d = fours.load(dout + start, 4 * i);
            Four w = fours.load(weight, 4 * i), sum = fours.load(dinp + start, 4 * i), dw = dweight[i], db = dbias[i];
            for (int k = 0; k < 4; k++) {
                float dnorm = d.x[k] * w.x[k];
                x.x[k] = (x.x[k] - m) * r;
                sum.x[k] += r * dnorm;
                dnorm_sum += dnorm;
                dnorm_norm_sum += dnorm * x.x[k];
                dw.x[k] += d.x[k] * x.x[k];
                db.x[k] += d.x[k];
            }
            dweight[i] = dw;
            dbias[i] = db;
            norm[i] = x;
            direct[i] = sum;
        }
        float dnorm_mean = block_sum(dnorm_sum, warps) / C, dnorm_norm_mean = block_sum(dnorm_norm_sum, warps) / C;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            Four sum = direct[i];
            for (int k = 0; k < 4; k++) sum.x[k] -= r * (dnorm_mean + norm[i].x[k] * dnorm_norm_mean);
            fours.store(dinp + start, 4 * i, sum);
        }
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        fours.store(dweight_parts + (size_t)blockIdx.x * C, 4 * i, dweight[i]);
        fours.store(dbias_parts + (size_t)blockIdx.x * C, 4 * i, dbias[i]);
    }
}
"""


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out (N, C) is inp (N, C), each row shifted to mean 0 and scaled to variance 1, then by the learned weight and bias (C).

    mean (N) and rstd (N) are saved. Derived in dev/derivations/layernorm.md.
    """
    none = device.empty(0)
    residual_layernorm_forward(none, out, mean, rstd, inp, none, none, weight, bias)


def residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, inp2_bias, weight, bias):
    """residual (N, C) = inp1 + inp2 + inp2_bias (C), then layernorm_forward of it. An empty inp2_bias means there is none.

    inp2 is a matrix product without its bias. Three separate kernels would write the sums and read them back twice.

    Cost: 10*N*C FLOPs, 16*N*C bytes: memory-bound. See dev/derivations/residual.md.
    """
    N, C = inp1.shape
    device.launch("residual_layernorm_forward", N, row_threads(C), residual, out, mean, rstd, inp1, inp2, inp2_bias,
                  weight, bias, N, C, shared_bytes=16 * ceil_div(C, 4))


def layernorm_backward(dinp, dweight, dbias, dout, mean, rstd, inp, weight):
    """dinp (N, C) += the gradient through the normalization; dweight (C) and dbias (C) += sums over the rows.

    Derived in dev/derivations/layernorm.md.
    """
    N, C = inp.shape
    blocks = min(N, 512)        # about 4 per multiprocessor of a large GPU: more would leave more partial sums to add
    dweight_parts, dbias_parts = device.empty((blocks, C)), device.empty((blocks, C))
    device.launch("layernorm_backward", blocks, row_threads(C), dinp, dweight_parts, dbias_parts, dout, mean, rstd, inp,
                  weight, N, C, blocks, shared_bytes=4 * 16 * ceil_div(C, 4))
    column_sums(dweight, dweight_parts)
    column_sums(dbias, dbias_parts)


# ----------------------------------------------------------------------------------------------------------------------
# Matrix product: the linear layers, and the logits

MATMUL = r"""
// One block per row, four columns per thread.
extern "C" __global__ void add_bias(
    float* __restrict__ out,            // (N, OC)
    const float* __restrict__ bias,     // (OC)
    int N, int OC)
{
    Fours fours(OC, out, bias);
    float* row = out + (size_t)blockIdx.x * OC;
    for (int o = 4 * threadIdx.x; o < OC; o += 4 * blockDim.x) {
        Four sum = fours.load(row, o);
        sum += fours.load(bias, o);
        fours.store(row, o, sum);
    }
}

// One warp per row of the weight, four columns per lane. Each weight that is loaded serves four rows of inp.
extern "C" __global__ void matvec_forward(
    float* __restrict__ out,            // (N, OC)
    const float* __restrict__ inp,      // (N, C)
    const float* __restrict__ weight,   // (OC, C)
    const float* __restrict__ bias,     // (OC) or empty
    int N, int C, int OC)
{
    Fours fours(C, inp, weight);
    int o = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, first = 4 * blockIdx.y;
    if (o >= OC) return;
    float sums[4] = {};
    #pragma unroll 4                    // four loads in flight per lane
    for (int c = 4 * lane; c < C; c += 4 * 32) {
        Four w = fours.load(weight + (size_t)o * C, c);
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            if (first + r >= N) break;
            Four x = fours.load(inp + (size_t)(first + r) * C, c);
            for (int k = 0; k < 4; k++) sums[r] += w.x[k] * x.x[k];
        }
    }
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < N) out[(size_t)(first + r) * OC + o] = sum + (bias ? bias[o] : 0);
    }
}
"""


def matmul_forward(out, inp, weight, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC). An empty bias array means there is none.

    Adding the bias reads and writes out once more, 8*N*OC bytes. Derived in dev/derivations/matmul.md.
    """
    N, OC = out.shape
    device.gemm(out, 1.0, inp, weight.T, 0.0)
    if bias.size > 0:
        device.launch("add_bias", N, row_threads(OC), out, bias, N, OC)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """dinp (N, C) = dout @ weight; dweight (OC, C) += dout.T @ inp; dbias (OC) += sum of dout (N, OC) over its rows.

    Derived in dev/derivations/matmul.md.
    """
    device.gemm(dinp, 1.0, dout, weight, 0.0)
    device.gemm(dweight, 1.0, dout.T, inp, 1.0)
    if dbias.size > 0:
        column_sums(dbias, dout)


def matvec_forward(out, inp, weight, bias):
    """matmul_forward for an inp (N, C) of few rows, where all the time goes into reading the weight (OC, C) once.

    See dev/derivations/matmul.md.
    """
    N, OC = out.shape
    device.launch("matvec_forward", (ceil_div(OC, 8), ceil_div(N, 4)), 256, out, inp, weight, bias, N, inp.shape[1], OC)


# ----------------------------------------------------------------------------------------------------------------------
# Attention: causal, multi-head, with the (T, T) scores of one sequence at a time

ATTENTION = r"""
// Softmax of each row of scores, in place: one warp per row, 128 columns at a time. Query i attends to the first
// S - T + i + 1 of the S keys: those of the tokens before it, and its own. Later scores are masked: they are not read (except
// for up to three in the same four as the last key) and become 0 for the product with v. The second read of a row hits the
// cache. The 8 rows of a block are neighbors, so they take equally long.
extern "C" __global__ void causal_softmax(
    float* __restrict__ scores,         // (NH, T, S)
    float* __restrict__ lse,            // (NH, T) or empty
    int NH, int T, int S)
{
    Fours fours(S, scores);
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, last = S - T + row % T;
    if (row >= NH * T) return;
    float* p = scores + (size_t)row * S;
    Softmax seen = NOTHING_SEEN;
    for (int j = 4 * lane; j <= last; j += 4 * 32) seen = see(seen, fours.load(p, j), last + 1 - j);
    seen = warp_softmax(seen);
    float factor = 1 / seen.sum;
    for (int j = 4 * lane; j < S; j += 4 * 32) {
        Four score = j <= last ? fours.load(p, j) : Four{};
        for (int k = 0; k < 4; k++) score.x[k] = j + k <= last ? expf(score.x[k] - seen.largest) * factor : 0;
        fours.store(p, j, score);
    }
    if (lane == 0 && lse) lse[row] = seen.largest + logf(seen.sum);
}

// From a row's scores and dp to its p and dscore, in place, with the work divided in the same way. delta reads 2 * HS numbers
// of one head and position, few compared with the row.
extern "C" __global__ void causal_softmax_backward(
    float* __restrict__ dscores,        // (NH, T, T)
    float* __restrict__ scores,         // (NH, T, T)
    const float* __restrict__ dout,     // (T, C)
    const float* __restrict__ out,      // (T, C)
    const float* __restrict__ lse,      // (NH, T)
    int NH, int T, int C)
{
    Fours fours(T, dscores, scores);
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, i = row % T;
    if (row >= NH * T) return;
    int HS = C / NH;
    size_t head = (size_t)i * C + row / T * HS;
    float delta = 0;
    for (int c = lane; c < HS; c += 32) delta += dout[head + c] * out[head + c];
    delta = warp_sum(delta);
    float row_lse = lse[row];
    float *p = scores + (size_t)row * T, *dp = dscores + (size_t)row * T;
    for (int j = 4 * lane; j < T; j += 4 * 32) {
        Four x = {}, dx = {};
        if (j <= i) {
            x = fours.load(p, j);
            dx = fours.load(dp, j);
        }
        for (int k = 0; k < 4; k++) {
            x.x[k] = j + k <= i ? expf(x.x[k] - row_lse) : 0;
            dx.x[k] = j + k <= i ? x.x[k] * (dx.x[k] - delta) : 0;
        }
        fours.store(p, j, x);
        fours.store(dp, j, dx);
    }
}

// Attention of one new query per text and head, one block each. The query attends to the KV cache of `position` tokens and to
// its own key and value, which the block appends to the cache. The keys are dealt out to the warps in turn, four channels per
// lane. Once all scores are in shared memory, every warp finds the largest and the sum itself: waiting for another warp to do
// it would take as long.
extern "C" __global__ void __launch_bounds__(512, 1) attention_cached_forward(
    float* __restrict__ out,            // (B, NH*HS)
    float* keys,                        // (B, NH, maxT, HS)
    float* values,                      // (B, NH, maxT, HS)
    const float* __restrict__ qkv,      // (B, 3*NH*HS)
    float scale, int B, int NH, int maxT, int HS, int position)
{
    Fours fours(HS, out, keys, values, qkv);
    extern __shared__ Four scores[];            // position + 1 numbers
    __shared__ Four threads[512];
    float* score = scores[0].x;
    int head = blockIdx.x, b = head / NH, lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const float *q = qkv + ((size_t)b * 3 * NH + head % NH) * HS, *k = q + (size_t)NH * HS, *v = k + (size_t)NH * HS;
    keys += (size_t)head * maxT * HS;
    values += (size_t)head * maxT * HS;
    for (int c = warp * 32 + lane; c < HS; c += warps * 32) {
        keys[(size_t)position * HS + c] = k[c];
        values[(size_t)position * HS + c] = v[c];
    }
    __syncthreads();
    for (int j = warp; j <= position; j += warps) {
        float sum = 0;
        for (int c = 4 * lane; c < HS; c += 4 * 32) {
            Four key = fours.load(keys + (size_t)j * HS, c), query = fours.load(q, c);
            for (int i = 0; i < 4; i++) sum += query.x[i] * key.x[i];
        }
        sum = warp_sum(sum);
        if (lane == 0) score[j] = scale * sum;
    }
    __syncthreads();
    Softmax seen = NOTHING_SEEN;
    for (int j = 4 * lane; j <= position; j += 4 * 32) seen = see(seen, scores[j / 4], position + 1 - j);
    seen = warp_softmax(seen);
    for (int start = 0; start < HS; start += 4 * 32) {      // the same for all threads: there are barriers inside
        int c = start + 4 * lane;
        Four sum = {};
        if (c < HS)
            for (int j = warp; j <= position; j += warps) {
                Four value = fours.load(values + (size_t)j * HS, c);
                float weight = expf(score[j] - seen.largest);
                for (int i = 0; i < 4; i++) sum.x[i] += weight * value.x[i];
            }
        __syncthreads();                                    // the round before may still be summing
        sum = sum_over_y(sum, threads);
        for (int i = 0; i < 4; i++) sum.x[i] /= seen.sum;
        if (warp == 0 && c < HS) fours.store(out + (size_t)head * HS, c, sum);
    }
}
"""


def heads(rows, B, NH):
    """A (B, NH, T, HS) view of rows (N, C), whose columns are the heads side by side."""
    N, C = rows.shape
    return rows.reshape(B, N // B, NH, C // NH).transpose(0, 2, 1, 3)


def transposed(matrices):
    """A view of a batch of matrices in which each is transposed."""
    return matrices.swapaxes(1, 2)


def attention_forward(out, lse, qkv, scores):
    """out (N, C): at each position, the softmax-weighted mean of the values up to and including its own.

    qkv (N, 3C); lse (B, NH, T) is saved for the backward pass; scores (NH, T, T) is scratch for one sequence. The matrix
    products include the masked keys, and each score is written twice and read twice: 16 bytes. Derived in
    dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    scale = (NH / out.shape[1]) ** 0.5      # 1 / sqrt(HS)
    qkv, out = heads(qkv, B, 3 * NH), heads(out, B, NH)
    for b in range(B):
        q, k, v = qkv[b, :NH], qkv[b, NH:2 * NH], qkv[b, 2 * NH:]
        device.gemm(scores, scale, q, transposed(k), 0.0)
        device.launch("causal_softmax", ceil_div(NH * T, 8), 256, scores, lse[b], NH, T, T)
        device.gemm(out[b], 1.0, scores, v, 0.0)


def attention_backward(dqkv, dout, out, lse, qkv, scores, dscores):
    """dqkv (N, 3C) from dout (N, C), with p recomputed from lse.

    scores and dscores (NH, T, T) are scratch for one sequence. Each score is written twice and read twice, its gradient
    written twice and read three times: 36 bytes. Derived in dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    C = out.shape[1]
    scale = (NH / C) ** 0.5
    dqkv, qkv, dout_heads = heads(dqkv, B, 3 * NH), heads(qkv, B, 3 * NH), heads(dout, B, NH)
    for b in range(B):
        q, k, v = qkv[b, :NH], qkv[b, NH:2 * NH], qkv[b, 2 * NH:]
        dq, dk, dv = dqkv[b, :NH], dqkv[b, NH:2 * NH], dqkv[b, 2 * NH:]
        rows = slice(b * T, (b + 1) * T)
        device.gemm(scores, scale, q, transposed(k), 0.0)
        device.gemm(dscores, 1.0, dout_heads[b], transposed(v), 0.0)
        device.launch("causal_softmax_backward", ceil_div(NH * T, 8), 256, dscores, scores, dout[rows], out[rows], lse[b],
                      NH, T, C)
        device.gemm(dv, 1.0, transposed(scores), dout_heads[b], 0.0)
        device.gemm(dk, scale, transposed(dscores), q, 0.0)
        device.gemm(dq, scale, dscores, k, 0.0)


CACHED_POSITIONS = 8192     # whose scores, 4 bytes each, fit into shared memory beside `threads`


def attention_cached_forward(out, keys, values, qkv, position):
    """attention_forward for T tokens that follow `position` others, with a KV cache.

    keys and values (B, NH, maxT, HS) are the cache: they hold those of the positions before `position`, and those of the T
    positions in qkv (B*T, 3C) are appended. Every query sees all positions up to its own. A single query takes one launch and
    reads the cache in place; a prompt uses the matrix products of training. See dev/derivations/attention.md.
    """
    B, NH, maxT, HS = keys.shape
    T = len(out) // B
    end, scale = position + T, HS ** -0.5
    if T == 1 and end <= CACHED_POSITIONS:
        warps = min(16, 1 << (position // 8).bit_length())      # a power of two for sum_over_y
        device.launch("attention_cached_forward", B * NH, (32, warps), out, keys, values, qkv, scale, B, NH, maxT, HS, position,
                      shared_bytes=16 * ceil_div(end, 4))
        return
    qkv, out = heads(qkv, B, 3 * NH), heads(out, B, NH)
    scores = device.empty((NH, T, end))
    for b in range(B):
        k, v = keys[b, :, :end], values[b, :, :end]
        k[:, position:] = qkv[b, NH:2 * NH]
        v[:, position:] = qkv[b, 2 * NH:]
        device.gemm(scores, scale, qkv[b, :NH], transposed(k), 0.0)
        device.launch("causal_softmax", ceil_div(NH * T, 8), 256, scores, device.empty(0), NH, T, end)
        device.gemm(out[b], 1.0, scores, v, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# GELU, the tanh approximation GPT-2 was trained with (Hendrycks and Gimpel 2016)

GELU = r"""
constexpr float GELU_SCALE = 0.7978845608f;     // sqrt(2 / pi)
constexpr float GELU_CUBIC = 0.044715f;

__device__ inline float gelu_gate(float x) {
    return 1 / (1 + expf(-2 * GELU_SCALE * (x + GELU_CUBIC * x * x * x)));
}

// One block per row, four columns per thread. It also adds the bias of the matrix product before it, and writes the sum back
// to inp for the backward pass.
extern "C" __global__ void bias_gelu_forward(
    float* __restrict__ out,            // (N, C)
    float* __restrict__ inp,            // (N, C)
    const float* __restrict__ bias,     // (C)
    int N, int C)
{
    Fours fours(C, out, inp, bias);
    float *out_row = out + (size_t)blockIdx.x * C, *inp_row = inp + (size_t)blockIdx.x * C;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four x = fours.load(inp_row, c);
        x += fours.load(bias, c);
        fours.store(inp_row, c, x);
        for (int k = 0; k < 4; k++) x.x[k] *= gelu_gate(x.x[k]);
        fours.store(out_row, c, x);
    }
}

// Four numbers per thread. dinp may be dout.
extern "C" __global__ void gelu_backward(
    float* dinp,                        // (size)
    const float* dout,                  // (size)
    const float* __restrict__ inp,      // (size)
    size_t size)
{
    Fours fours(size, dinp, dout, inp);
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    Four x = fours.load(inp, i), d = fours.load(dout, i);
    for (int k = 0; k < 4; k++) {
        float s = gelu_gate(x.x[k]);
        float slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * x.x[k] * x.x[k]);
        d.x[k] *= s + x.x[k] * s * (1 - s) * 2 * slope;
    }
    fours.store(dinp, i, d);
}
"""


def bias_gelu_forward(out, inp, bias):
    """inp (N, C) += bias (C), in place; out (N, C) = gelu(inp).

    Cost: 29*N*C FLOPs, 12*N*C bytes: memory-bound. Derived in dev/derivations/gelu.md.
    """
    N, C = inp.shape
    device.launch("bias_gelu_forward", N, row_threads(C), out, inp, bias, N, C)


def gelu_backward(dinp, dout, inp):
    """dinp = dout * gelu'(inp), all of shape (N, C). dinp may be dout itself. Derived in dev/derivations/gelu.md."""
    device.launch("gelu_backward", ceil_div(inp.size, 4 * 256), 256, dinp, dout, inp, inp.size)


# ----------------------------------------------------------------------------------------------------------------------
# GELU itself, for models that were trained with it, such as nanoGPT's since 2023 and Cerebras-GPT

GELU_EXACT = r"""
// As bias_gelu_forward. normcdff is Phi, CUDA's distribution function of standard normal numbers, accurate in both tails.
extern "C" __global__ void bias_gelu_exact_forward(
    float* __restrict__ out,            // (N, C)
    float* __restrict__ inp,            // (N, C)
    const float* __restrict__ bias,     // (C)
    int N, int C)
{
    Fours fours(C, out, inp, bias);
    float *out_row = out + (size_t)blockIdx.x * C, *inp_row = inp + (size_t)blockIdx.x * C;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        Four x = fours.load(inp_row, c);
        x += fours.load(bias, c);
        fours.store(inp_row, c, x);
        for (int k = 0; k < 4; k++) x.x[k] *= normcdff(x.x[k]);
        fours.store(out_row, c, x);
    }
}

// Four numbers per thread. dinp may be dout.
extern "C" __global__ void gelu_exact_backward(
    float* dinp,                        // (size)
    const float* dout,                  // (size)
    const float* __restrict__ inp,      // (size)
    size_t size)
{
    Fours fours(size, dinp, dout, inp);
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    Four x = fours.load(inp, i), d = fours.load(dout, i);
    for (int k = 0; k < 4; k++) {
        float density = 0.3989422804f * expf(-0.5f * x.x[k] * x.x[k]);      // exp(-x**2 / 2) / sqrt(2 pi)
        d.x[k] *= normcdff(x.x[k]) + x.x[k] * density;
    }
    fours.store(dinp, i, d);
}
"""


def bias_gelu_exact_forward(out, inp, bias):
    """inp (N, C) += bias (C), in place; out (N, C) = inp * Phi(inp). It moves 12*N*C bytes.

    Derived in dev/derivations/gelu.md.
    """
    N, C = inp.shape
    device.launch("bias_gelu_exact_forward", N, row_threads(C), out, inp, bias, N, C)


def gelu_exact_backward(dinp, dout, inp):
    """dinp = dout * (Phi(inp) + inp * phi(inp)), all of shape (N, C). dinp may be dout itself.

    Derived in dev/derivations/gelu.md.
    """
    device.launch("gelu_exact_backward", ceil_div(inp.size, 4 * 256), 256, dinp, dout, inp, inp.size)


# ----------------------------------------------------------------------------------------------------------------------
# Softmax and cross-entropy, forward and backward in one launch

CLASSIFIER = r"""
// One block per row, which it reads twice: for the largest logit and the sum of the softmax, then to replace the logits by
// their gradients. A row of 200 KB does not fit into shared memory. Only part of the second read hits the L2 cache: the rows
// of all blocks that run at a time, two on a multiprocessor, are about as large as that cache (on an H100, 53 and 50 MB).
extern "C" __global__ void fused_classifier(
    float* __restrict__ losses,         // (N)
    float* __restrict__ logits,         // (N, Vp)
    const int* __restrict__ targets,    // (N)
    float dloss, int vocab_size, int N, int Vp)
{
    Fours fours(Vp, logits);
    __shared__ Softmax warps[32];
    float* row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    float target_logit = row[target];       // before block_softmax's barrier: after it, a thread overwrites it
    Softmax seen = NOTHING_SEEN;
    for (int i = 4 * threadIdx.x; i < vocab_size; i += 4 * blockDim.x) seen = see(seen, fours.load(row, i), vocab_size - i);
    seen = block_softmax(seen, warps);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(seen.sum) - (target_logit - seen.largest);
    if (dloss == 0) return;
    float factor = dloss / seen.sum;
    for (int i = 4 * threadIdx.x; i < Vp; i += 4 * blockDim.x) {
        Four logit = fours.load(row, i), dlogit;
        for (int k = 0; k < 4; k++) {
            dlogit.x[k] = i + k < vocab_size ? expf(logit.x[k] - seen.largest) * factor : 0;
            if (i + k == target) dlogit.x[k] -= dloss;
        }
        fours.store(row, i, dlogit);
    }
}

// One block; each thread sums every 1,024th loss, in double precision: in float32 each addition to a large sum would round.
extern "C" __global__ void add_mean_loss(
    float* __restrict__ total,          // (1)
    const float* __restrict__ losses,   // (N)
    float scale, int N)
{
    __shared__ double warps[32];
    double sum = 0;
    for (int n = threadIdx.x; n < N; n += blockDim.x) sum += losses[n];
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) total[0] += scale * sum;
}
"""


def fused_classifier(losses, logits, targets, dloss, vocab_size):
    """losses (N) from logits (N, Vp) and int32 targets (N), the logits being overwritten by their gradients.

    If dloss is 0, only the losses are computed. Derived in dev/derivations/classifier.md.
    """
    N, Vp = logits.shape
    device.launch("fused_classifier", N, row_threads(Vp, most=1024), losses, logits, targets, dloss, vocab_size, N, Vp)


def add_mean_loss(total, losses, scale):
    """total (1) += scale * the sum of losses (N). The total stays on the GPU until the host reads it.

    See dev/derivations/classifier.md.
    """
    device.launch("add_mean_loss", 1, 1024, total, losses, scale, losses.size)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer

OPTIMIZER = r"""
// The first of two launches of a reduction: every block leaves a partial sum. A grid-stride loop, four numbers per thread, in
// double precision: a float32 sum of 124 million squares would lose too many digits.
extern "C" __global__ void sum_of_squares(
    double* __restrict__ parts,         // (blocks)
    const float* __restrict__ grads,    // (size)
    int blocks, size_t size)
{
    Fours fours(size, grads);
    __shared__ double warps[32];
    double sum = 0;
    for (size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x); i < size; i += (size_t)4 * blocks * blockDim.x) {
        Four g = fours.load(grads, i);
        for (int k = 0; k < 4; k++) sum += (double)g.x[k] * g.x[k];
    }
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The second launch: one block, one thread per partial sum.
extern "C" __global__ void global_norm(
    float* __restrict__ norm,           // (1)
    const double* __restrict__ parts,   // (blocks)
    int blocks)
{
    __shared__ double warps[32];
    double sum = block_sum(threadIdx.x < blocks ? parts[threadIdx.x] : 0.0, warps);
    if (threadIdx.x == 0) norm[0] = sqrt(sum);
}

// Four numbers of each of the four arrays per thread. The norm is read here, on the GPU, so that the host need not wait for
// it. If it is not finite, nothing changes.
extern "C" __global__ void adamw_update(
    float* __restrict__ params,         // (size)
    float* __restrict__ grads,          // (size)
    float* __restrict__ m,              // (size)
    float* __restrict__ v,              // (size)
    const float* __restrict__ norm,     // (1)
    float keep_m, float take_m, float keep_v, float take_v, float rate, float unbias_v, float epsilon, float decay,
    float grad_clip, size_t size)
{
    Fours fours(size, params, grads, m, v);
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    Four p = fours.load(params, i), g = fours.load(grads, i), m4 = fours.load(m, i), v4 = fours.load(v, i);
    if (!(norm[0] <= FLOAT_MAX)) return;
    float scale = 0 < grad_clip && grad_clip < norm[0] ? grad_clip / norm[0] : 1;
    for (int k = 0; k < 4; k++) {
        g.x[k] *= scale;
        m4.x[k] = keep_m * m4.x[k] + take_m * g.x[k];
        v4.x[k] = keep_v * v4.x[k] + take_v * g.x[k] * g.x[k];
        p.x[k] -= rate * m4.x[k] / (sqrtf(v4.x[k] * unbias_v) + epsilon) + decay * p.x[k];
    }
    fours.store(params, i, p);
    fours.store(grads, i, Four{});
    fours.store(m, i, m4);
    fours.store(v, i, v4);
}
"""


def global_norm(norm, grads):
    """norm (1) = the Euclidean norm of grads (P), one flat array: a float32 that stays on the GPU.

    Derived in dev/derivations/clipping.md.
    """
    blocks = min(1024, ceil_div(grads.size, 4 * 256))
    parts = device.empty(blocks, np.float64)
    device.launch("sum_of_squares", blocks, 256, parts, grads, blocks, grads.size)
    device.launch("global_norm", 1, 1024, norm, parts, blocks)


def adamw_update(params, grads, m, v, norm, learning_rate, beta1, beta2, eps, weight_decay, grad_clip, step):
    """One step of AdamW (Loshchilov and Hutter 2019) on flat arrays (P); step counts from 1. The gradients are cleared.

    Gradient clipping: if norm (1), the norm of all gradients together, exceeds grad_clip, they are scaled down to it; 0
    disables clipping. If norm is not finite nothing changes, not even the gradients, so that the first bad tensor can be
    found. Derived in dev/derivations/adamw.md.
    """
    device.launch("adamw_update", ceil_div(params.size, 4 * 256), 256, params, grads, m, v, norm, beta1, 1 - beta1,
                  beta2, 1 - beta2, learning_rate / (1 - beta1 ** step), 1 / (1 - beta2 ** step), eps,
                  learning_rate * weight_decay, grad_clip, params.size)


# ----------------------------------------------------------------------------------------------------------------------

SOURCES = [COMMON, COLUMN_SUMS, ENCODER, LAYERNORM, MATMUL, ATTENTION, GELU, GELU_EXACT, CLASSIFIER, OPTIMIZER]
