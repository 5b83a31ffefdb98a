"""The layers of GPT-2 on the GPU: CUDA C kernels, each above the Python function that launches it.

Read it beside kernels_cpu.py. What accumulates, what is overwritten and what is saved for the backward pass is the same, and so
are names, shapes, argument order and cost, except:
    matmul_forward, matmul_backward, matvec_forward     no workspace; the bias is of the dtype of out
    attention_forward, attention_backward               scratch for scores, in place of the workspace; or FlashAttention
    encoder_forward, attention_cached_forward           also take the position as an array on the device, for CUDA graphs
    residual_layernorm_forward, bias_gelu_forward       several kernels of the CPU in one launch
    mean_loss, global_norm                              results stay on the device
    adamw_update                                        reads the norm there, and writes `weights`
What else differs is how the work is divided among threads; the comments are about that. The gradients are derived in
dev/derivations/. A new layer's source is added to SOURCES, at the end.

How the work is divided
    A kernel launch starts a grid of thread blocks. All threads run the same function and find their part of the work from
    `blockIdx` and `threadIdx`. The threads of a block share fast on-chip memory (`__shared__`) and can wait for each other
    at a barrier (`__syncthreads`). The 32 threads of a warp, its lanes, run together and can read each other's registers
    (`__shfl`). Blocks cannot wait for each other, so a reduction across blocks takes a second launch.

What is fast
    All kernels in this file but flash attention and sort_rows_by_token are memory-bound; matrix products are left to cuBLASLt.
    Memory is fastest under two conditions. The lanes of a warp read neighboring addresses (coalesced access), each with one
    vectorized 16-byte load. And enough loads are in flight to hide their latency: about 20 KB per multiprocessor, for which
    2,048 threads (full occupancy) with one load each are enough. So nearly every kernel handles a `Part` per thread: four
    neighboring floats, or eight bf16.

Number formats
    `Float` is the type of activations, their gradients and the weights in matrix products: float, or bf16 with --dtype
    bfloat16. One source serves both. Parameters, parameter gradients, AdamW's moments, losses and the statistics of layernorm
    and softmax are always float. So is what docstrings call dwte, dwpe, dweight, dbias, mean, rstd, lse, losses, norm, m or v;
    tokens and positions are int32. Kernels compute in float. Costs are those in float; in bf16, activations and weights take
    half the bytes. See dev/derivations/mixed_precision.md.

Determinism
    There are no atomic additions, and every sum runs in an order that depends only on the shapes, not on the GPU: the same
    input gives the same bits. What one launch leaves for the next is in `device.temporary`, memory that all calls share.
"""
import numpy as np

from gpt2 import ceil_div

CLASSIFIER_ROWS = 2048  # rows of logits that exist at any one time: 2048 * 50304 * 4 bytes = 412 MB, half of it in bfloat16
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

// bfloat16: the upper half of a float, with 8 bits of precision. Arithmetic is in float; only memory holds these.
#ifdef __CUDA_ARCH__                            // cuda_on_cpu.h has the same function for the CPU
__device__ inline unsigned bf16_pair(float low, float high) {       // both rounded to nearest even
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

struct bf16 {
    unsigned short bits;
    bf16() = default;
    __device__ bf16(float x) : bits(bf16_pair(x, 0)) {}
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

// The part of a row that one thread handles at a time: neighboring numbers, as many as 16 bytes hold of `Float`. That is the
// type of activations and of the weights in matrix products, float or bf16; the compiler's option -DFloat=... names it.
constexpr int WIDTH = 16 / sizeof(Float);
struct alignas(16) Part { float x[WIDTH]; };

__device__ inline void operator+=(Part& sum, Part term) {
    for (int k = 0; k < WIDTH; k++) sum.x[k] += term.x[k];
}

// Access to rows of `length` numbers, a Part per thread. It is vectorized, in accesses of 16 bytes, if the length is a multiple
// of WIDTH and all arrays start at multiples of 16 bytes, which holds for GPT-2's own sizes (see gpt2.ALIGNMENT). Otherwise the
// numbers are accessed one by one; those past the end of a row read as 0 and are not written.
struct Parts {
    size_t length;
    bool vectorized;

    template <class... Arrays>
    __device__ Parts(size_t length, Arrays... arrays)
        : length(length), vectorized(((length % WIDTH == 0) && ... && ((size_t)arrays % 16 == 0))) {}

    template <class Number>
    __device__ Part load(const Number* row, size_t i) const {
        Part part;
        if (vectorized) read(part, row + i);
        else for (int k = 0; k < WIDTH; k++) part.x[k] = i + k < length ? (float)row[i + k] : 0;
        return part;
    }

    template <class Number>
    __device__ void store(Number* row, size_t i, Part part) const {
        if (vectorized) write(row + i, part);
        else for (int k = 0; k < WIDTH; k++) if (i + k < length) row[i + k] = part.x[k];
    }

    __device__ static void read(Part& part, const float* from) {
        for (int k = 0; k < WIDTH; k += 4) {
            float4 four = *(const float4*)(from + k);
            part.x[k] = four.x, part.x[k + 1] = four.y, part.x[k + 2] = four.z, part.x[k + 3] = four.w;
        }
    }

    __device__ static void write(float* to, Part part) {
        for (int k = 0; k < WIDTH; k += 4)
            *(float4*)(to + k) = make_float4(part.x[k], part.x[k + 1], part.x[k + 2], part.x[k + 3]);
    }

    __device__ static void read(Part& part, const bf16* from) {
        uint4 pairs = *(const uint4*)from;
        unsigned pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
        for (int k = 0; k < WIDTH; k++) part.x[k] = __uint_as_float(k % 2 ? pair[k / 2] & 0xffff0000 : pair[k / 2] << 16);
    }

    __device__ static void write(bf16* to, Part part) {
        unsigned pair[4];
        for (int k = 0; k < WIDTH; k += 2) pair[k / 2] = bf16_pair(part.x[k], part.x[k + 1]);
        *(uint4*)to = make_uint4(pair[0], pair[1], pair[2], pair[3]);
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
// sum is rescaled to it, so one pass finds both. `see` adds the first `count` numbers of a part. As in kernels_cpu.py, a NaN
// never becomes the largest; it comes out in the sum.
struct Softmax { float largest, sum; };
#define NOTHING_SEEN Softmax{-FLOAT_MAX, 0}

__device__ inline Softmax see(Softmax seen, Part part, int count) {
    float largest = seen.largest;
    for (int k = 0; k < WIDTH; k++) if (k < count) largest = fmaxf(largest, part.x[k]);
    float sum = seen.sum * expf(seen.largest - largest);
    for (int k = 0; k < WIDTH; k++) if (k < count) sum += expf(part.x[k] - largest);
    return {largest, sum};
}

__device__ inline Softmax warp_softmax(Softmax seen) {
    float largest = warp_max(seen.largest);
    return {largest, warp_sum(seen.sum * expf(seen.largest - largest))};
}

// Once per kernel: unlike block_sum, it does not wait for readers of the result before.
__device__ inline Softmax block_softmax(Softmax seen, Softmax* warps) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    seen = warp_softmax(seen);
    if (lane == 0) warps[warp] = seen;
    __syncthreads();
    return warp_softmax(lane < blockDim.x / 32 ? warps[lane] : NOTHING_SEEN);
}

// Block reduction over threadIdx.y: the sum of the parts of each column of threads, for the threads with threadIdx.y == 0.
// Each round adds one half of the rows of threads to the other, until one row is left. `threads` is shared memory, one Part
// per thread; blockDim.y is a power of two.
__device__ inline Part sum_over_y(Part value, Part* threads) {
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
    """The block size for a row of C numbers, a Part per thread: whole warps, no more rounds than with `most` threads."""
    parts = ceil_div(C, device.width)
    return 32 * ceil_div(parts, 32 * ceil_div(parts, most))


def part_blocks(size):
    """How many blocks of 256 threads cover a flat array of `size` numbers, a Part per thread."""
    return ceil_div(size, 256 * device.width)


def part_bytes(C):
    """Bytes of shared memory for a row of C floats in whole Parts."""
    return 4 * device.width * ceil_div(C, device.width)


COLUMN_SUMS = r"""
// out (parts, C) = or += the sum of inp (N, C) over its rows; each of the `parts` rows of out sums different rows of inp. A
// block has 8 x 32 threads: the 8 in x read eight neighboring Parts of a row, the 32 in y loop over the rows.
template <class Number>
__device__ void sum_columns(float* out, const Number* inp, int parts, int N, int C, int accumulate) {
    Parts columns(C, out, inp);
    __shared__ Part threads[256];
    int c = WIDTH * (blockIdx.x * blockDim.x + threadIdx.x);
    float* out_row = out + (size_t)blockIdx.y * C;
    int first = blockIdx.y * blockDim.y + threadIdx.y, step = parts * blockDim.y, rounds = (N - first + step - 1) / step;
    Part sum = {};
    if (c < C) {
        #pragma unroll 4                // four loads in flight per thread: there is no arithmetic to hide their latency
        for (int round = 0; round < rounds; round++) sum += columns.load(inp + (size_t)(first + round * step) * C, c);
    }
    sum = sum_over_y(sum, threads);
    if (threadIdx.y == 0 && c < C) {
        if (accumulate) sum += columns.load(out_row, c);
        columns.store(out_row, c, sum);
    }
}

extern "C" __global__ void column_sums(
    float* __restrict__ out,            // (parts, C)
    const Float* __restrict__ inp,      // (N, C)
    int parts, int N, int C, int accumulate)
{
    sum_columns(out, inp, parts, N, C, accumulate);
}

extern "C" __global__ void column_sums_of_floats(
    float* __restrict__ out,            // (parts, C)
    const float* __restrict__ inp,      // (N, C)
    int parts, int N, int C, int accumulate)
{
    sum_columns(out, inp, parts, N, C, accumulate);
}
"""


def column_sums(out, inp):
    """out (C) += the sum of inp (N, C) over its rows: in one launch, or in two if there are more than 1,024 rows.

    The first of two launches divides the rows into enough parts for 1,024 blocks, 8 per multiprocessor of a large GPU.

    Cost: N*C FLOPs, 4*N*C bytes: memory-bound. See dev/derivations/matmul.md.
    """
    N, C = inp.shape
    kernel = "column_sums" if inp.dtype == device.Float else "column_sums_of_floats"
    columns, block = ceil_div(C, 8 * device.width), (8, 32)
    if N > 1024:
        parts = max(1, min(1024 // columns, N // 32))
        partial = device.temporary((parts, C))
        device.launch(kernel, (columns, parts), block, partial, inp, parts, N, C, 0)
        kernel, N, inp = "column_sums_of_floats", parts, partial
    device.launch(kernel, columns, block, out, inp, 1, N, C, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder: token and position embedding

ENCODER = r"""
// One block per row, a part per thread.
extern "C" __global__ void encoder_forward(
    Float* __restrict__ out,            // (N, C)
    const int* __restrict__ tokens,     // (N)
    const Float* __restrict__ wte,      // (Vp, C)
    const Float* __restrict__ wpe,      // (maxT, C)
    const int* __restrict__ position,   // (1) or empty
    int N, int T, int C, int Vp, int maxT)
{
    Parts parts(C, out, wte, wpe);
    int n = blockIdx.x, t = n % T + (position ? position[0] : 0);
    const Float* token_row = wte + (size_t)tokens[n] * C;
    const Float* position_row = wpe + (size_t)t * C;
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part sum = parts.load(token_row, c);
        sum += parts.load(position_row, c);
        parts.store(out + (size_t)n * C, c, sum);
    }
}

// order = the rows sorted by token, those of one token in their order. The place of a row is the number of rows before it. Each
// thread counts them for one row: N * N comparisons, few beside the products of a step.
extern "C" __global__ void sort_rows_by_token(
    int* __restrict__ order,            // (N)
    const int* __restrict__ tokens,     // (N)
    int N)
{
    int n = blockIdx.x * blockDim.x + threadIdx.x, place = 0;
    if (n >= N) return;
    int token = tokens[n];
    for (int m = 0; m < N; m++) place += m < n ? tokens[m] <= token : tokens[m] < token;
    order[place] = n;
}

// A token can occur many times, so one block must sum all its rows. `order` lists the rows sorted by token, which gives each
// token one run of rows. The block at the start of a run sums it; the other blocks return at once. A block has 32 x 8 threads:
// 32 for neighboring parts of a row, and 8 for the rows of a run.
extern "C" __global__ void encoder_backward_wte(
    float* __restrict__ dwte,           // (Vp, C)
    const Float* __restrict__ dout,     // (N, C)
    const int* __restrict__ tokens,     // (N)
    const int* __restrict__ order,      // (N)
    int N, int C, int Vp)
{
    Parts parts(C, dwte, dout);
    __shared__ Part threads[256];
    int first = blockIdx.x, c = WIDTH * (blockIdx.y * blockDim.x + threadIdx.x);
    int token = tokens[order[first]];
    if (first > 0 && tokens[order[first - 1]] == token) return;
    Part sum = {};
    if (c < C)
        for (int i = first + threadIdx.y; i < N && tokens[order[i]] == token; i += blockDim.y)
            sum += parts.load(dout + (size_t)order[i] * C, c);
    sum = sum_over_y(sum, threads);
    if (threadIdx.y == 0 && c < C) {
        sum += parts.load(dwte + (size_t)token * C, c);
        parts.store(dwte + (size_t)token * C, c, sum);
    }
}

// One block per position, a part per thread. Each thread sums over the sequences.
extern "C" __global__ void encoder_backward_wpe(
    float* __restrict__ dwpe,           // (maxT, C)
    const Float* __restrict__ dout,     // (N, C)
    int N, int T, int C, int maxT)
{
    Parts parts(C, dwpe, dout);
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part sum = parts.load(dwpe + (size_t)blockIdx.x * C, c);
        for (int n = blockIdx.x; n < N; n += T) sum += parts.load(dout + (size_t)n * C, c);
        parts.store(dwpe + (size_t)blockIdx.x * C, c, sum);
    }
}
"""


def encoder_forward(out, tokens, wte, wpe, position_on_device=None):
    """out (N, C) = wte[token] + wpe[position], for tokens (B, T), wte (Vp, C) and wpe (maxT, C).

    position_on_device: that of the first token of each sequence, an int32 array (1); None: 0. Derived in
    dev/derivations/encoder.md.
    """
    N, C = out.shape
    first = device.none if position_on_device is None else position_on_device
    device.launch("encoder_forward", N, row_threads(C), out, tokens, wte, wpe, first,
                  N, tokens.shape[1], C, len(wte), len(wpe))


def encoder_backward(dwte, dwpe, dout, tokens):
    """dwte[token] += dout and dwpe[position] += dout, for every row of dout (N, C); dwte (Vp, C), dwpe (maxT, C).

    Derived in dev/derivations/encoder.md.
    """
    N, C = dout.shape
    T, order = tokens.shape[1], device.temporary(N, np.int32)
    device.launch("sort_rows_by_token", ceil_div(N, 128), 128, order, tokens, N)
    device.launch("encoder_backward_wte", (N, ceil_div(C, 32 * device.width)), (32, 8), dwte, dout, tokens, order,
                  N, C, len(dwte))
    device.launch("encoder_backward_wpe", T, row_threads(C), dwpe, dout, N, T, C, len(dwpe))


# ----------------------------------------------------------------------------------------------------------------------
# Layer normalization (Ba, Kiros and Hinton 2016)

LAYERNORM = r"""
constexpr float LAYERNORM_EPSILON = 1e-5f;

// One block per row, a part per thread. The row is read, or it is the sum of the residual stream and a projection's output. It
// stays in shared memory for the two passes after its mean is known: the variance and the result. A thread reads
// only the parts that it wrote itself, so no barrier is needed for them.
extern "C" __global__ void residual_layernorm_forward(
    Float* __restrict__ residual,           // (N, C) or empty
    Float* __restrict__ out,                // (N, C)
    float* __restrict__ mean,               // (N)
    float* __restrict__ rstd,               // (N)
    const Float* __restrict__ inp1,         // (N, C)
    const Float* __restrict__ inp2,         // (N, C) or empty
    const float* __restrict__ inp2_bias,    // (C) or empty
    const float* __restrict__ weight,       // (C)
    const float* __restrict__ bias,         // (C)
    int N, int C)
{
    Parts parts(C, residual, out, inp1, inp2, inp2_bias, weight, bias);
    extern __shared__ Part row[];
    __shared__ float warps[32];
    size_t start = (size_t)blockIdx.x * C;
    float total = 0;
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part x = parts.load(inp1 + start, c), y = inp2 ? parts.load(inp2 + start, c) : Part{};
        y += inp2_bias ? parts.load(inp2_bias, c) : Part{};
        x += y;
        if (residual) {
            parts.store(residual + start, c, x);
            for (int k = 0; k < WIDTH; k++) x.x[k] = Float(x.x[k]);     // as the backward pass will read it
        }
        for (int k = 0; k < WIDTH; k++) total += x.x[k];
        row[c / WIDTH] = x;
    }
    float m = block_sum(total, warps) / C, squares = 0;
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part x = row[c / WIDTH];
        for (int k = 0; k < WIDTH; k++) squares += c + k < C ? (x.x[k] - m) * (x.x[k] - m) : 0;
    }
    float r = 1 / sqrtf(block_sum(squares, warps) / C + LAYERNORM_EPSILON);
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part x = row[c / WIDTH], w = parts.load(weight, c), b = parts.load(bias, c);
        for (int k = 0; k < WIDTH; k++) x.x[k] = (x.x[k] - m) * r * w.x[k] + b.x[k];
        parts.store(out + start, c, x);
    }
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }
}

// A grid-stride loop over the rows: a block handles the rows n, n + blocks, n + 2 * blocks, ..., a part per thread. What a row
// needs again once its two sums are known stays in shared memory, including dinp with the direct term added. So each
// number of the row is read once from global memory, and all of these loads are in flight together. dweight and dbias are
// sums over rows: a block accumulates its partial sums in shared memory, and column_sums adds those of all blocks.
extern "C" __global__ void __launch_bounds__(256, 3) layernorm_backward(
    Float* __restrict__ dinp,               // (N, C)
    float* __restrict__ dweight_parts,      // (blocks, C)
    float* __restrict__ dbias_parts,        // (blocks, C)
    const Float* __restrict__ dout,         // (N, C)
    const float* __restrict__ mean,         // (N)
    const float* __restrict__ rstd,         // (N)
    const Float* __restrict__ inp,          // (N, C)
    const float* __restrict__ weight,       // (C)
    int N, int C, int blocks)
{
    Parts parts(C, dinp, dweight_parts, dbias_parts, dout, inp, weight);
    extern __shared__ Part rows[];
    __shared__ float warps[32];
    int count = (C + WIDTH - 1) / WIDTH;
    Part *dweight = rows, *dbias = rows + count, *norm = rows + 2 * count, *direct = rows + 3 * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) dweight[i] = dbias[i] = Part{};
    for (int n = blockIdx.x; n < N; n += blocks) {
        size_t start = (size_t)n * C;
        float m = mean[n], r = rstd[n], dnorm_sum = 0, dnorm_norm_sum = 0;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            Part x = parts.load(inp + start, WIDTH * i), d = parts.load(dout + start, WIDTH * i);
            Part w = parts.load(weight, WIDTH * i), sum = parts.load(dinp + start, WIDTH * i), dw = dweight[i], db = dbias[i];
            for (int k = 0; k < WIDTH; k++) {
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
            Part sum = direct[i];
            for (int k = 0; k < WIDTH; k++) sum.x[k] -= r * (dnorm_mean + norm[i].x[k] * dnorm_norm_mean);
            parts.store(dinp + start, WIDTH * i, sum);
        }
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        parts.store(dweight_parts + (size_t)blockIdx.x * C, WIDTH * i, dweight[i]);
        parts.store(dbias_parts + (size_t)blockIdx.x * C, WIDTH * i, dbias[i]);
    }
}
"""


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out (N, C) is inp (N, C), each row shifted to mean 0 and scaled to variance 1, then by the learned weight and bias (C).

    mean (N) and rstd (N) are saved. Derived in dev/derivations/layernorm.md.
    """
    none = device.none
    residual_layernorm_forward(none, out, mean, rstd, inp, none, none, weight, bias)


def residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, inp2_bias, weight, bias):
    """residual (N, C) = inp1 + inp2 + inp2_bias (C), then layernorm_forward of it. An empty inp2_bias means there is none.

    inp2 (N, C) is a matrix product without its bias. If it and residual are empty, this is layernorm_forward of inp1. Three
    separate kernels would write the sums and read them back twice.

    Cost: 10*N*C FLOPs, 16*N*C bytes: memory-bound. See dev/derivations/residual.md.
    """
    N, C = inp1.shape
    device.launch("residual_layernorm_forward", N, row_threads(C), residual, out, mean, rstd, inp1, inp2, inp2_bias,
                  weight, bias, N, C, shared_bytes=part_bytes(C))


def layernorm_backward(dinp, dweight, dbias, dout, mean, rstd, inp, weight):
    """dinp (N, C) += the gradient through the normalization; dweight (C) and dbias (C) += sums over the rows.

    Derived in dev/derivations/layernorm.md.
    """
    N, C = inp.shape
    # About 4 blocks per multiprocessor of a large GPU: more would leave more partial sums to add. And up to 1,024 rows,
    # column_sums needs no temporary memory, which would overwrite these.
    blocks = min(N, 512)
    dweight_parts, dbias_parts = device.temporary((2, blocks, C))
    device.launch("layernorm_backward", blocks, row_threads(C), dinp, dweight_parts, dbias_parts, dout, mean, rstd, inp,
                  weight, N, C, blocks, shared_bytes=4 * part_bytes(C))
    column_sums(dweight, dweight_parts)
    column_sums(dbias, dbias_parts)


# ----------------------------------------------------------------------------------------------------------------------
# Matrix product: the linear layers, and the logits

MATMUL = r"""
// One warp per row of the weight, a part per lane. Each weight that is loaded serves four rows of inp.
template <class Number>
__device__ void multiply_rows(Number* out, const Float* inp, const Float* weight, const Float* bias, int N, int C, int OC) {
    Parts parts(C, inp, weight);
    int o = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, first = 4 * blockIdx.y;
    if (o >= OC) return;
    float sums[4] = {};
    for (int start = WIDTH * lane; start < C; start += 4 * WIDTH * 32) {
        Part w[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {           // four loads in flight per lane
            int c = start + i * WIDTH * 32;
            w[i] = c < C ? parts.load(weight + (size_t)o * C, c) : Part{};
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = start + i * WIDTH * 32;
            if (c >= C) break;
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                if (first + r >= N) break;
                Part x = parts.load(inp + (size_t)(first + r) * C, c);
                for (int k = 0; k < WIDTH; k++) sums[r] += w[i].x[k] * x.x[k];
            }
        }
    }
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < N) out[(size_t)(first + r) * OC + o] = sum + (bias ? (float)bias[o] : 0);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) matvec_forward(
    Float* __restrict__ out,            // (N, OC)
    const Float* __restrict__ inp,      // (N, C)
    const Float* __restrict__ weight,   // (OC, C)
    const Float* __restrict__ bias,     // (OC) or empty
    int N, int C, int OC)
{
    multiply_rows(out, inp, weight, bias, N, C, OC);
}

extern "C" __global__ void __launch_bounds__(256, 2) matvec_forward_to_floats(
    float* __restrict__ out,            // (N, OC)
    const Float* __restrict__ inp,      // (N, C)
    const Float* __restrict__ weight,   // (OC, C)
    const Float* __restrict__ bias,     // (OC) or empty
    int N, int C, int OC)
{
    multiply_rows(out, inp, weight, bias, N, C, OC);
}
"""


def matmul_forward(out, inp, weight, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC). An empty bias array means there is none.

    Derived in dev/derivations/matmul.md.
    """
    device.gemm(out, 1.0, inp, weight.T, 0.0, bias)


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

    out is of `Float`, or float32 for logits. See dev/derivations/matmul.md.
    """
    N, OC = out.shape
    kernel = "matvec_forward" if out.dtype == device.Float else "matvec_forward_to_floats"
    device.launch(kernel, (ceil_div(OC, 8), ceil_div(N, 4)), 256, out, inp, weight, bias, N, inp.shape[1], OC)


# ----------------------------------------------------------------------------------------------------------------------
# Attention: causal, multi-head, with the (T, T) scores of one sequence at a time

ATTENTION = r"""
// Softmax of each row of scores, in place: one warp per row, a part per lane. Query i attends to the first
// S - T + i + 1 of the S keys: those of the tokens before it, and its own. Later scores are masked: they are not read (except
// for those in the same part as the last key) and become 0 for the product with v. The second read of a row hits the
// cache. The 8 rows of a block are neighbors, so they take equally long.
extern "C" __global__ void causal_softmax(
    Float* __restrict__ scores,         // (NH, T, S)
    float* __restrict__ lse,            // (NH, T) or empty
    int NH, int T, int S)
{
    Parts parts(S, scores);
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, last = S - T + row % T;
    if (row >= NH * T) return;
    Float* p = scores + (size_t)row * S;
    Softmax seen = NOTHING_SEEN;
    for (int j = WIDTH * lane; j <= last; j += WIDTH * 32) seen = see(seen, parts.load(p, j), last + 1 - j);
    seen = warp_softmax(seen);
    float factor = 1 / seen.sum;
    for (int j = WIDTH * lane; j < S; j += WIDTH * 32) {
        Part score = j <= last ? parts.load(p, j) : Part{};
        for (int k = 0; k < WIDTH; k++) score.x[k] = j + k <= last ? expf(score.x[k] - seen.largest) * factor : 0;
        parts.store(p, j, score);
    }
    if (lane == 0 && lse) lse[row] = seen.largest + logf(seen.sum);
}

// From a row's scores and dp to its p and dscore, in place, with the work divided in the same way. delta reads 2 * HS numbers
// of one head and position, few compared with the row.
extern "C" __global__ void causal_softmax_backward(
    Float* __restrict__ dscores,        // (NH, T, T)
    Float* __restrict__ scores,         // (NH, T, T)
    const Float* __restrict__ dout,     // (T, C)
    const Float* __restrict__ out,      // (T, C)
    const float* __restrict__ lse,      // (NH, T)
    int NH, int T, int C)
{
    Parts parts(T, dscores, scores);
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, i = row % T;
    if (row >= NH * T) return;
    int HS = C / NH;
    size_t head = (size_t)i * C + row / T * HS;
    float delta = 0;
    for (int c = lane; c < HS; c += 32) delta += (float)dout[head + c] * (float)out[head + c];
    delta = warp_sum(delta);
    float row_lse = lse[row];
    Float *p = scores + (size_t)row * T, *dp = dscores + (size_t)row * T;
    for (int j = WIDTH * lane; j < T; j += WIDTH * 32) {
        Part x = {}, dx = {};
        if (j <= i) {
            x = parts.load(p, j);
            dx = parts.load(dp, j);
        }
        for (int k = 0; k < WIDTH; k++) {
            x.x[k] = j + k <= i ? expf(x.x[k] - row_lse) : 0;
            dx.x[k] = j + k <= i ? x.x[k] * (dx.x[k] - delta) : 0;
        }
        parts.store(p, j, x);
        parts.store(dp, j, dx);
    }
}

// Attention of one new query per text and head, one block each. The query attends to the KV cache of `last` tokens and to its
// own key and value, which the block appends to the cache. The warps take turns with four keys, a part of a key per lane: four
// loads in flight. Once all scores are in shared memory, every warp finds the largest and the sum itself: waiting for another
// warp to do it would take as long.
extern "C" __global__ void __launch_bounds__(512, 1) attention_cached_forward(
    Float* __restrict__ out,            // (B, NH*HS)
    Float* keys,                        // (B, NH, maxT, HS)
    Float* values,                      // (B, NH, maxT, HS)
    const Float* __restrict__ qkv,      // (B, 3*NH*HS)
    const int* __restrict__ position,   // (1)
    float scale, int B, int NH, int maxT, int HS)
{
    Parts parts(HS, out, keys, values, qkv);
    extern __shared__ Part scores[];            // last + 1 numbers
    __shared__ Part threads[512];
    float* score = scores[0].x;
    int head = blockIdx.x, b = head / NH, lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, last = position[0];
    const Float *q = qkv + ((size_t)b * 3 * NH + head % NH) * HS, *k = q + (size_t)NH * HS, *v = k + (size_t)NH * HS;
    keys += (size_t)head * maxT * HS;
    values += (size_t)head * maxT * HS;
    for (int c = warp * 32 + lane; c < HS; c += warps * 32) {
        keys[(size_t)last * HS + c] = k[c];
        values[(size_t)last * HS + c] = v[c];
    }
    __syncthreads();
    for (int first = 4 * warp; first <= last; first += 4 * warps) {
        float sums[4] = {};
        for (int c = WIDTH * lane; c < HS; c += WIDTH * 32) {
            Part query = parts.load(q, c), key[4];
            #pragma unroll
            for (int r = 0; r < 4; r++) key[r] = parts.load(keys + (size_t)min(first + r, last) * HS, c);
            #pragma unroll
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < WIDTH; i++) sums[r] += query.x[i] * key[r].x[i];
        }
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            float sum = warp_sum(sums[r]);
            if (lane == 0 && first + r <= last) score[first + r] = scale * sum;
        }
    }
    __syncthreads();
    Softmax seen = NOTHING_SEEN;
    for (int j = WIDTH * lane; j <= last; j += WIDTH * 32) seen = see(seen, scores[j / WIDTH], last + 1 - j);
    seen = warp_softmax(seen);
    for (int start = 0; start < HS; start += WIDTH * 32) {      // the same for all threads: there are barriers inside
        int c = start + WIDTH * lane;
        Part sum = {};
        if (c < HS)
            for (int first = 4 * warp; first <= last; first += 4 * warps) {
                Part value[4];
                #pragma unroll
                for (int r = 0; r < 4; r++) value[r] = parts.load(values + (size_t)min(first + r, last) * HS, c);
                #pragma unroll
                for (int r = 0; r < 4; r++) {
                    float weight = first + r <= last ? expf(score[first + r] - seen.largest) : 0;
                    for (int i = 0; i < WIDTH; i++) sum.x[i] += weight * value[r].x[i];
                }
            }
        __syncthreads();                                    // the round before may still be summing
        sum = sum_over_y(sum, threads);
        for (int i = 0; i < WIDTH; i++) sum.x[i] /= seen.sum;
        if (warp == 0 && c < HS) parts.store(out + (size_t)head * HS, c, sum);
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

    qkv (N, 3C); lse (B, NH, T) is saved for the backward pass. In bf16 with heads of 64 channels this is
    flash_attention_forward, and scores is not used. Otherwise scores (NH, T, T) is scratch for one sequence: the matrix
    products include the masked keys, and each score is written twice and read twice: 16 bytes. Derived in
    dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    if has_flash_attention(out.dtype, out.shape[1] // NH):
        flash_attention_forward(out, lse, qkv)
        return
    scale = (NH / out.shape[1]) ** 0.5      # 1 / sqrt(HS)
    qkv, out = heads(qkv, B, 3 * NH), heads(out, B, NH)
    for b in range(B):
        q, k, v = qkv[b, :NH], qkv[b, NH:2 * NH], qkv[b, 2 * NH:]
        device.gemm(scores, scale, q, transposed(k), 0.0)
        device.launch("causal_softmax", ceil_div(NH * T, 8), 256, scores, lse[b], NH, T, T)
        device.gemm(out[b], 1.0, scores, v, 0.0)


def attention_backward(dqkv, dout, out, lse, qkv, scores, dscores):
    """dqkv (N, 3C) from dout (N, C), with p recomputed from lse.

    In bf16 with heads of 64 channels this is flash_attention_backward, and scores and dscores are not used. Otherwise they,
    (NH, T, T), are scratch for one sequence: each score is written twice and read twice, its gradient written twice and read
    three times: 36 bytes. Derived in dev/derivations/attention.md.
    """
    B, NH, T = lse.shape
    C = out.shape[1]
    if has_flash_attention(out.dtype, C // NH):
        flash_attention_backward(dqkv, dout, out, lse, qkv)
        return
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


CACHED_POSITIONS = 8192     # whose scores, 4 bytes each, fit into 48 KB of shared memory beside `threads`, 16 KB in bf16


def attention_cached_forward(out, keys, values, qkv, position, position_on_device):
    """attention_forward for T tokens that follow `position` others, with a KV cache.

    keys and values (B, NH, maxT, HS) are the cache: they hold those of the positions before `position`, and those of the T
    positions in qkv (B*T, 3C) are appended. Every query sees all positions up to its own; out (B*T, C). With a cache of up to
    CACHED_POSITIONS, a single query takes one launch, which reads the cache in place and, so that a CUDA graph can repeat it,
    the position from an int32 array (1). Otherwise scores are stored for one text at a time, in matrix products, with any
    dtype. See dev/derivations/attention.md.
    """
    B, NH, maxT, HS = keys.shape
    T = len(out) // B
    end, scale = position + T, HS ** -0.5
    if T == 1 and maxT <= CACHED_POSITIONS:
        device.launch("attention_cached_forward", B * NH, (32, 16), out, keys, values, qkv, position_on_device,
                      scale, B, NH, maxT, HS, shared_bytes=part_bytes(maxT))
        return
    qkv, out = heads(qkv, B, 3 * NH), heads(out, B, NH)
    scores = device.empty((NH, T, end), device.Float)
    for b in range(B):
        k, v = keys[b, :, :end], values[b, :, :end]
        k[:, position:] = qkv[b, NH:2 * NH]
        v[:, position:] = qkv[b, 2 * NH:]
        device.gemm(scores, scale, qkv[b, :NH], transposed(k), 0.0)
        device.launch("causal_softmax", ceil_div(NH * T, 8), 256, scores, device.none, NH, T, end)
        device.gemm(out[b], 1.0, scores, v, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Attention in bf16 for heads of 64 channels: tile by tile on tensor cores, without a (T, T) tensor (FlashAttention, Dao 2023)

FLASH_ATTENTION = r"""
// A tensor core multiplies small matrices whose numbers are spread over the registers of a warp. Here a warp has 16 rows of 64
// numbers, 32 in each lane. The figure in dev/derivations/flash_attention.md shows which.
constexpr int HS = 64;                      // channels of a head
constexpr int TILE = 64;                    // rows in shared memory: queries or keys
constexpr int THREADS = 128;                // four warps of 16 rows
constexpr int PITCH = HS + 8;               // so that 8 neighboring rows are in different banks of shared memory
constexpr float SCALE = 0.125f;             // 1 / sqrt(HS)
constexpr float LOG2_E = 1.442695041f, LN_2 = 0.6931471806f;       // exp2f is one instruction: exp(x) = exp2(LOG2_E * x)

struct alignas(16) Tile { bf16 rows[TILE][PITCH]; };
struct Rows { float x[8][4]; };             // of sums: x[n] has two neighboring columns of row lane / 4, and of the row 8 below
struct Factor { unsigned pairs[4][4]; };    // of bf16, the left factor of a product: pairs[k] has 16 columns

#ifdef __CUDA_ARCH__                        // cuda_on_cpu.h has the same functions for the CPU
// Four 8 x 8 tiles from shared memory. Lane i names row i % 8 of tile i / 8, and receives two neighboring numbers of row i / 4
// of every tile.
__device__ inline void load_tiles(unsigned (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// The same, of the transposed tiles.
__device__ inline void load_tiles_transposed(unsigned (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// c (16, 8) += a (16, 16) @ b (16, 8)
__device__ inline void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Where x[n][i] of Rows is: its row in the block's tile, and its column.
__device__ inline int row_of(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ inline int column_of(int n, int i) { return 8 * n + 2 * (threadIdx.x % 4) + i % 2; }

// Over the four lanes that share a row.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// The block copies TILE rows of HS numbers, `stride` apart, to shared memory, 16 bytes per thread; rows from `count` on are 0.
__device__ inline void load_tile(Tile& tile, const bf16* rows, int stride, int count) {
    #pragma unroll
    for (int n = 0; n < TILE * HS / 8 / THREADS; n++) {     // unrolled, so that all loads are in flight together
        int i = n * THREADS + threadIdx.x, row = i / (HS / 8), c = i % (HS / 8) * 8;
        *(uint4*)&tile.rows[row][c] = row < count ? *(const uint4*)(rows + row * stride + c) : make_uint4(0, 0, 0, 0);
    }
}

// The warp's own 16 rows of a tile, as a left factor.
__device__ inline void load_factor(Factor& a, const Tile& tile) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16, c = lane / 16 * 8;
    #pragma unroll
    for (int k = 0; k < 4; k++) load_tiles(a.pairs[k], &tile.rows[row][16 * k + c]);
}

// a = x, rounded to bf16. The numbers stay in their lanes: two neighboring 16 x 8 sums lie as a left factor of 16 x 16 does.
__device__ inline void round_to_factor(Factor& a, const Rows& x) {
    #pragma unroll
    for (int k = 0; k < 4; k++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &x.x[2 * k + i / 2][i % 2 * 2];
            a.pairs[k][i] = bf16_pair(pair[0], pair[1]);
        }
}

// sums (16, 64) += a (16, 64) @ b (64, 64)
__device__ inline void multiply_by(Rows& sums, const Factor& a, const Tile& b) {
    int lane = threadIdx.x % 32, row = lane % 16, c = lane / 16 * 8;
    #pragma unroll
    for (int k = 0; k < 4; k++)
        #pragma unroll
        for (int n = 0; n < 8; n += 2) {
            unsigned tiles[4];      // rows 16 k and 16 k + 8, columns 8 n; the same rows, columns 8 n + 8
            load_tiles_transposed(tiles, &b.rows[16 * k + row][8 * n + c]);
            multiply_tiles(sums.x[n], a.pairs[k], tiles[0], tiles[1]);
            multiply_tiles(sums.x[n + 1], a.pairs[k], tiles[2], tiles[3]);
        }
}

// sums (16, 64) += a (16, 64) @ b (64, 64).T
__device__ inline void multiply_by_transposed(Rows& sums, const Factor& a, const Tile& b) {
    int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8, c = lane / 8 % 2 * 8;
    #pragma unroll
    for (int k = 0; k < 4; k++)
        #pragma unroll
        for (int n = 0; n < 8; n += 2) {
            unsigned tiles[4];      // rows 8 n, columns 16 k and 16 k + 8; rows 8 n + 8, the same columns
            load_tiles(tiles, &b.rows[8 * n + row][16 * k + c]);
            multiply_tiles(sums.x[n], a.pairs[k], tiles[0], tiles[1]);
            multiply_tiles(sums.x[n + 1], a.pairs[k], tiles[2], tiles[3]);
        }
}

// The block writes rows of x, times a factor for each row of a lane, `stride` apart; rows from `count` on are not written.
__device__ inline void store_rows(bf16* rows, int stride, int count, const Rows& x, float upper, float lower) {
    #pragma unroll
    for (int n = 0; n < 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float factor = i < 2 ? upper : lower;
            unsigned pair = bf16_pair(x.x[n][i] * factor, x.x[n][i + 1] * factor);
            if (row_of(i) < count) *(unsigned*)(rows + row_of(i) * stride + column_of(n, i)) = pair;
        }
}

// One block of four warps per head and tile of queries, 16 queries per warp. The softmax is online: when a larger score
// arrives, the sums so far shrink. Of a head's blocks, those with the most keys start first.
extern "C" __global__ void __launch_bounds__(128, 3) flash_attention_forward(
    bf16* __restrict__ out,             // (B*T, NH*64)
    float* __restrict__ lse,            // (B, NH, T)
    const bf16* __restrict__ qkv,       // (B*T, 3*NH*64)
    int B, int NH, int T)
{
    __shared__ Tile keys, values;
    int last = gridDim.x - 1 - blockIdx.x, first = last * TILE, count = T - first, head = blockIdx.y, C = NH * HS;
    int stride = 3 * C;
    size_t start = (size_t)(head / NH) * T;
    const bf16 *q = qkv + start * stride + head % NH * HS, *k = q + C, *v = k + C;

    load_tile(keys, q + (size_t)first * stride, stride, count);     // the block's own queries, on their way to registers
    __syncthreads();
    Factor queries;
    load_factor(queries, keys);
    Rows sums = {};
    float largest[2] = {-FLOAT_MAX, -FLOAT_MAX};        // of a row's scores * LOG2_E
    float total[2] = {};                                // of this lane's columns only
    for (int tile = 0; tile <= last; tile++) {
        __syncthreads();                                                // all warps have read the tiles before
        load_tile(keys, k + (size_t)tile * TILE * stride, stride, T - tile * TILE);
        load_tile(values, v + (size_t)tile * TILE * stride, stride, T - tile * TILE);
        __syncthreads();
        Rows p = {};
        multiply_by_transposed(p, queries, keys);
        float before[2] = {largest[0], largest[1]};
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                bool masked = tile == last && column_of(n, i) > row_of(i);
                p.x[n][i] = masked ? -FLOAT_MAX : p.x[n][i] * (SCALE * LOG2_E);
                largest[i / 2] = fmaxf(largest[i / 2], p.x[n][i]);
            }
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            largest[r] = quad_max(largest[r]);
            float shrink = exp2f(before[r] - largest[r]);
            total[r] *= shrink;
            #pragma unroll
            for (int n = 0; n < 8; n++) sums.x[n][2 * r] *= shrink, sums.x[n][2 * r + 1] *= shrink;
        }
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                p.x[n][i] = exp2f(p.x[n][i] - largest[i / 2]);
                total[i / 2] += p.x[n][i];
            }
        Factor weights;
        round_to_factor(weights, p);
        multiply_by(sums, weights, values);
    }
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] = quad_sum(total[r]);
        int row = row_of(2 * r);
        if (row < count && threadIdx.x % 4 == 0)
            lse[(size_t)head * T + first + row] = LN_2 * (largest[r] + log2f(total[r]));
    }
    store_rows(out + (start + first) * C + head % NH * HS, C, count, sums, 1 / total[0], 1 / total[1]);
}

// dq, with the work divided as in the forward pass, and delta, the sums of dout * out over the channels of a head, which the
// other kernel needs too.
extern "C" __global__ void __launch_bounds__(128, 2) flash_attention_backward_q(
    bf16* __restrict__ dqkv,            // (B*T, 3*NH*64)
    float* __restrict__ delta,          // (B, NH, T)
    const bf16* __restrict__ dout,      // (B*T, NH*64)
    const bf16* __restrict__ out,       // (B*T, NH*64)
    const float* __restrict__ lse,      // (B, NH, T)
    const bf16* __restrict__ qkv,       // (B*T, 3*NH*64)
    int B, int NH, int T)
{
    __shared__ Tile keys, values;
    int last = gridDim.x - 1 - blockIdx.x, first = last * TILE, count = T - first, head = blockIdx.y, C = NH * HS;
    int stride = 3 * C;
    size_t start = (size_t)(head / NH) * T, own = (start + first) * C + head % NH * HS;
    const bf16 *q = qkv + start * stride + head % NH * HS, *k = q + C, *v = k + C;

    load_tile(keys, q + (size_t)first * stride, stride, count);     // the block's own rows, on their way to registers
    load_tile(values, dout + own, C, count);
    __syncthreads();
    Factor queries, douts, outs;
    load_factor(queries, keys);
    load_factor(douts, values);
    __syncthreads();
    load_tile(keys, out + own, C, count);
    __syncthreads();
    load_factor(outs, keys);
    float row_delta[2] = {}, row_lse[2];
    #pragma unroll
    for (int k = 0; k < 4; k++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {       // pairs[k][0] and [2] are of the upper row
            unsigned d = douts.pairs[k][i], o = outs.pairs[k][i];
            row_delta[i % 2] += __uint_as_float(d << 16) * __uint_as_float(o << 16)
                              + __uint_as_float(d & 0xffff0000) * __uint_as_float(o & 0xffff0000);
        }
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        row_delta[r] = quad_sum(row_delta[r]);
        int row = row_of(2 * r);
        size_t place = (size_t)head * T + first + row;
        row_lse[r] = row < count ? lse[place] * LOG2_E : 0;
        if (row < count && threadIdx.x % 4 == 0) delta[place] = row_delta[r];
    }
    Rows dq = {};
    for (int tile = 0; tile <= last; tile++) {
        __syncthreads();                                                // all warps have read the tiles before
        load_tile(keys, k + (size_t)tile * TILE * stride, stride, T - tile * TILE);
        load_tile(values, v + (size_t)tile * TILE * stride, stride, T - tile * TILE);
        __syncthreads();
        Rows p = {}, dp = {};
        multiply_by_transposed(p, queries, keys);
        multiply_by_transposed(dp, douts, values);
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                bool masked = tile == last && column_of(n, i) > row_of(i);
                float weight = masked ? 0 : exp2f(p.x[n][i] * (SCALE * LOG2_E) - row_lse[i / 2]);
                dp.x[n][i] = weight * (dp.x[n][i] - row_delta[i / 2]);
            }
        Factor dscores;
        round_to_factor(dscores, dp);
        multiply_by(dq, dscores, keys);
    }
    store_rows(dqkv + (start + first) * stride + head % NH * HS, stride, count, dq, SCALE, SCALE);
}

// dk and dv. One block per head and tile of keys, which visits the tiles of queries that see them: so every sum has one writer.
// The matrices of scores are transposed here: a row is a key.
extern "C" __global__ void __launch_bounds__(128, 2) flash_attention_backward_kv(
    bf16* __restrict__ dqkv,            // (B*T, 3*NH*64)
    const float* __restrict__ delta,    // (B, NH, T)
    const bf16* __restrict__ dout,      // (B*T, NH*64)
    const float* __restrict__ lse,      // (B, NH, T)
    const bf16* __restrict__ qkv,       // (B*T, 3*NH*64)
    int B, int NH, int T)
{
    __shared__ Tile queries, douts;
    __shared__ float row_lse[TILE], row_delta[TILE];
    int own = blockIdx.x, first = own * TILE, count = T - first, head = blockIdx.y, C = NH * HS;
    int stride = 3 * C;
    size_t start = (size_t)(head / NH) * T;
    const bf16 *q = qkv + start * stride + head % NH * HS, *k = q + C, *v = k + C;

    load_tile(queries, k + (size_t)first * stride, stride, count);  // the block's own rows, on their way to registers
    load_tile(douts, v + (size_t)first * stride, stride, count);
    __syncthreads();
    Factor keys, values;
    load_factor(keys, queries);
    load_factor(values, douts);
    Rows dk = {}, dv = {};
    for (int tile = own; tile < gridDim.x; tile++) {
        int seen = T - tile * TILE;
        __syncthreads();                                                // all warps have read the tiles before
        load_tile(queries, q + (size_t)tile * TILE * stride, stride, seen);
        load_tile(douts, dout + (start + tile * TILE) * C + head % NH * HS, C, seen);
        if (threadIdx.x < TILE) {
            size_t place = (size_t)head * T + tile * TILE + threadIdx.x;
            row_lse[threadIdx.x] = threadIdx.x < seen ? lse[place] * LOG2_E : 0;
            row_delta[threadIdx.x] = threadIdx.x < seen ? delta[place] : 0;
        }
        __syncthreads();
        Rows p = {}, dp = {};
        multiply_by_transposed(p, keys, queries);
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                bool masked = tile == own && column_of(n, i) < row_of(i);
                p.x[n][i] = masked ? 0 : exp2f(p.x[n][i] * (SCALE * LOG2_E) - row_lse[column_of(n, i)]);
            }
        Factor weights;
        round_to_factor(weights, p);
        multiply_by(dv, weights, douts);
        multiply_by_transposed(dp, values, douts);
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) dp.x[n][i] = p.x[n][i] * (dp.x[n][i] - row_delta[column_of(n, i)]);
        Factor dscores;
        round_to_factor(dscores, dp);
        multiply_by(dk, dscores, queries);
    }
    bf16* rows = dqkv + (start + first) * stride + head % NH * HS;
    store_rows(rows + C, stride, count, dk, SCALE, SCALE);
    store_rows(rows + 2 * C, stride, count, dv, 1, 1);
}
"""

FLASH_TILE, FLASH_HEAD_SIZE, FLASH_THREADS = 64, 64, 128      # TILE, HS and THREADS of the source


def has_flash_attention(dtype, head_size):
    """Whether attention over heads of head_size channels, in activations of this dtype, runs without a (T, T) tensor."""
    return dtype != np.float32 and head_size == FLASH_HEAD_SIZE


def flash_attention_forward(out, lse, qkv):
    """attention_forward in bf16, for heads of 64 channels: out (N, C), lse (B, NH, T) and qkv (N, 3C), C = 64*NH.

    Scores exist in registers only; the keys and values are read once for every 64 queries. Derived in
    dev/derivations/flash_attention.md.
    """
    B, NH, T = lse.shape
    device.launch("flash_attention_forward", (ceil_div(T, FLASH_TILE), B * NH), FLASH_THREADS, out, lse, qkv, B, NH, T)


def flash_attention_backward(dqkv, dout, out, lse, qkv):
    """attention_backward in bf16, for heads of 64 channels. Scores are computed twice: once for dq, once for dk and dv.

    FlashAttention-2 computes them once and adds to dq atomically, so its sums run in another order every time. Derived in
    dev/derivations/flash_attention.md.
    """
    B, NH, T = lse.shape
    grid, delta = (ceil_div(T, FLASH_TILE), B * NH), device.temporary(lse.shape)
    device.launch("flash_attention_backward_q", grid, FLASH_THREADS, dqkv, delta, dout, out, lse, qkv, B, NH, T)
    device.launch("flash_attention_backward_kv", grid, FLASH_THREADS, dqkv, delta, dout, lse, qkv, B, NH, T)


# ----------------------------------------------------------------------------------------------------------------------
# GELU, the tanh approximation GPT-2 was trained with (Hendrycks and Gimpel 2016)

GELU = r"""
constexpr float GELU_SCALE = 0.7978845608f;     // sqrt(2 / pi)
constexpr float GELU_CUBIC = 0.044715f;

__device__ inline float gelu_gate(float x) {
    return 1 / (1 + expf(-2 * GELU_SCALE * (x + GELU_CUBIC * x * x * x)));
}

// One block per row, a part per thread. It also adds the bias of the matrix product before it, and writes the sum back to inp
// for the backward pass.
extern "C" __global__ void bias_gelu_forward(
    Float* __restrict__ out,            // (N, C)
    Float* __restrict__ inp,            // (N, C)
    const float* __restrict__ bias,     // (C)
    int N, int C)
{
    Parts parts(C, out, inp, bias);
    Float *out_row = out + (size_t)blockIdx.x * C, *inp_row = inp + (size_t)blockIdx.x * C;
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part x = parts.load(inp_row, c);
        x += parts.load(bias, c);
        parts.store(inp_row, c, x);
        for (int k = 0; k < WIDTH; k++) x.x[k] *= gelu_gate(x.x[k]);
        parts.store(out_row, c, x);
    }
}

// One part per thread. dinp may be dout.
extern "C" __global__ void gelu_backward(
    Float* dinp,                        // (size)
    const Float* dout,                  // (size)
    const Float* __restrict__ inp,      // (size)
    size_t size)
{
    Parts parts(size, dinp, dout, inp);
    size_t i = WIDTH * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    Part x = parts.load(inp, i), d = parts.load(dout, i);
    for (int k = 0; k < WIDTH; k++) {
        float s = gelu_gate(x.x[k]);
        float slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * x.x[k] * x.x[k]);
        d.x[k] *= s + x.x[k] * s * (1 - s) * 2 * slope;
    }
    parts.store(dinp, i, d);
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
    device.launch("gelu_backward", part_blocks(inp.size), 256, dinp, dout, inp, inp.size)


# ----------------------------------------------------------------------------------------------------------------------
# GELU itself, for models that were trained with it, such as nanoGPT's since 2023 and Cerebras-GPT

GELU_EXACT = r"""
// As bias_gelu_forward. normcdff is Phi, CUDA's distribution function of standard normal numbers, accurate in both tails.
extern "C" __global__ void bias_gelu_exact_forward(
    Float* __restrict__ out,            // (N, C)
    Float* __restrict__ inp,            // (N, C)
    const float* __restrict__ bias,     // (C)
    int N, int C)
{
    Parts parts(C, out, inp, bias);
    Float *out_row = out + (size_t)blockIdx.x * C, *inp_row = inp + (size_t)blockIdx.x * C;
    for (int c = WIDTH * threadIdx.x; c < C; c += WIDTH * blockDim.x) {
        Part x = parts.load(inp_row, c);
        x += parts.load(bias, c);
        parts.store(inp_row, c, x);
        for (int k = 0; k < WIDTH; k++) x.x[k] *= normcdff(x.x[k]);
        parts.store(out_row, c, x);
    }
}

// One part per thread. dinp may be dout.
extern "C" __global__ void gelu_exact_backward(
    Float* dinp,                        // (size)
    const Float* dout,                  // (size)
    const Float* __restrict__ inp,      // (size)
    size_t size)
{
    Parts parts(size, dinp, dout, inp);
    size_t i = WIDTH * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    Part x = parts.load(inp, i), d = parts.load(dout, i);
    for (int k = 0; k < WIDTH; k++) {
        float density = 0.3989422804f * expf(-0.5f * x.x[k] * x.x[k]);      // exp(-x**2 / 2) / sqrt(2 pi)
        d.x[k] *= normcdff(x.x[k]) + x.x[k] * density;
    }
    parts.store(dinp, i, d);
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
    device.launch("gelu_exact_backward", part_blocks(inp.size), 256, dinp, dout, inp, inp.size)


# ----------------------------------------------------------------------------------------------------------------------
# Softmax and cross-entropy, forward and backward in one launch

CLASSIFIER = r"""
// One block per row, which it reads twice: for the largest logit and the sum of the softmax, then to replace the logits by
// their gradients. A row of 200 KB (in bf16, 100 KB) does not fit into shared memory. In float, only part of the second read
// hits the L2 cache: the rows of all blocks that run at a time, two on a multiprocessor, are about as large as that cache (on
// an H100, 53 and 50 MB). In bf16 they fit.
extern "C" __global__ void fused_classifier(
    float* __restrict__ losses,         // (N)
    Float* __restrict__ logits,         // (N, Vp)
    const int* __restrict__ targets,    // (N)
    float dloss, int vocab_size, int N, int Vp)
{
    Parts parts(Vp, logits);
    __shared__ Softmax warps[32];
    Float* row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    float target_logit = row[target];       // before block_softmax's barrier: after it, a thread overwrites it
    Softmax seen = NOTHING_SEEN;
    for (int i = WIDTH * threadIdx.x; i < vocab_size; i += WIDTH * blockDim.x)
        seen = see(seen, parts.load(row, i), vocab_size - i);
    seen = block_softmax(seen, warps);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(seen.sum) - (target_logit - seen.largest);
    if (dloss == 0) return;
    float factor = dloss / seen.sum;
    for (int i = WIDTH * threadIdx.x; i < Vp; i += WIDTH * blockDim.x) {
        Part logit = parts.load(row, i), dlogit;
        for (int k = 0; k < WIDTH; k++) {
            dlogit.x[k] = i + k < vocab_size ? expf(logit.x[k] - seen.largest) * factor : 0;
            if (i + k == target) dlogit.x[k] -= dloss;
        }
        parts.store(row, i, dlogit);
    }
}

// One block; each thread sums every 1,024th loss, in double precision: in float32 each addition to a large sum would round.
extern "C" __global__ void mean_loss(
    float* __restrict__ mean,           // (1)
    const float* __restrict__ losses,   // (N)
    int N)
{
    __shared__ double warps[32];
    double sum = 0;
    for (int n = threadIdx.x; n < N; n += blockDim.x) sum += losses[n];
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) mean[0] = sum / N;
}
"""


def fused_classifier(losses, logits, targets, dloss, vocab_size):
    """losses (N) from logits (N, Vp) and int32 targets (N), the logits being overwritten by their gradients.

    If dloss is 0, only the losses are computed. Derived in dev/derivations/classifier.md.
    """
    N, Vp = logits.shape
    device.launch("fused_classifier", N, row_threads(Vp, most=1024), losses, logits, targets, dloss, vocab_size, N, Vp)


def mean_loss(mean, losses):
    """mean (1) = the mean of losses (N). It stays on the GPU until the host reads it.

    See dev/derivations/classifier.md.
    """
    device.launch("mean_loss", 1, 1024, mean, losses, losses.size)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer

OPTIMIZER = r"""
// The first of two launches of a reduction: every block leaves a partial sum. A grid-stride loop, a part per thread, in
// double precision: a float32 sum of 124 million squares would lose too many digits.
extern "C" __global__ void sum_of_squares(
    double* __restrict__ sums,          // (blocks)
    const float* __restrict__ grads,    // (size)
    int blocks, size_t size)
{
    Parts parts(size, grads);
    __shared__ double warps[32];
    double sum = 0;
    size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x, step = (size_t)blocks * blockDim.x;
    for (size_t i = WIDTH * first; i < size; i += WIDTH * step) {
        Part g = parts.load(grads, i);
        for (int k = 0; k < WIDTH; k++) sum += (double)g.x[k] * g.x[k];
    }
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The second launch: one block, one thread per partial sum.
extern "C" __global__ void global_norm(
    float* __restrict__ norm,           // (1)
    const double* __restrict__ sums,    // (blocks)
    int blocks)
{
    __shared__ double warps[32];
    double sum = block_sum(threadIdx.x < blocks ? sums[threadIdx.x] : 0.0, warps);
    if (threadIdx.x == 0) norm[0] = sqrt(sum);
}

// One part of each array per thread. The norm is read here, on the GPU, so that the host need not wait for it. If it is not
// finite, nothing changes.
extern "C" __global__ void adamw_update(
    float* __restrict__ params,         // (size)
    float* __restrict__ grads,          // (size)
    float* __restrict__ m,              // (size)
    float* __restrict__ v,              // (size)
    Float* __restrict__ weights,        // (size) or empty
    const float* __restrict__ norm,     // (1)
    float keep_m, float take_m, float keep_v, float take_v, float rate, float unbias_v, float epsilon, float decay,
    float grad_clip, size_t size)
{
    Parts parts(size, params, grads, m, v, weights);
    size_t i = WIDTH * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    Part p = parts.load(params, i), g = parts.load(grads, i), mean = parts.load(m, i), square = parts.load(v, i);
    if (!(norm[0] <= FLOAT_MAX)) return;
    float scale = 0 < grad_clip && grad_clip < norm[0] ? grad_clip / norm[0] : 1;
    for (int k = 0; k < WIDTH; k++) {
        g.x[k] *= scale;
        mean.x[k] = keep_m * mean.x[k] + take_m * g.x[k];
        square.x[k] = keep_v * square.x[k] + take_v * g.x[k] * g.x[k];
        p.x[k] -= rate * mean.x[k] / (sqrtf(square.x[k] * unbias_v) + epsilon) + decay * p.x[k];
    }
    parts.store(params, i, p);
    if (weights) parts.store(weights, i, p);
    parts.store(grads, i, Part{});
    parts.store(m, i, mean);
    parts.store(v, i, square);
}
"""


def global_norm(norm, grads):
    """norm (1) = the Euclidean norm of grads (P), one flat array: a float32 that stays on the GPU.

    Derived in dev/derivations/clipping.md.
    """
    blocks = min(1024, part_blocks(grads.size))
    sums = device.temporary(blocks, np.float64)
    device.launch("sum_of_squares", blocks, 256, sums, grads, blocks, grads.size)
    device.launch("global_norm", 1, 1024, norm, sums, blocks)


def adamw_update(params, grads, m, v, weights, norm, learning_rate, beta1, beta2, eps, weight_decay, grad_clip, step):
    """One step of AdamW (Loshchilov and Hutter 2019) on flat arrays (P); step counts from 1. The gradients are cleared.

    weights (P) becomes a copy of params rounded to bf16, for matrix products; empty: there is none. Gradient clipping: if norm
    (1), the norm of all gradients together, exceeds grad_clip, they are scaled down to it; 0 disables clipping. If norm is not
    finite nothing changes, not even the gradients, so that the first bad tensor can be found. Derived in
    dev/derivations/adamw.md.
    """
    device.launch("adamw_update", part_blocks(params.size), 256, params, grads, m, v, weights, norm, beta1, 1 - beta1,
                  beta2, 1 - beta2, learning_rate / (1 - beta1 ** step), 1 / (1 - beta2 ** step), eps,
                  learning_rate * weight_decay, grad_clip, params.size)


# ----------------------------------------------------------------------------------------------------------------------

# All sources. COMMON is put in front of each of the others.
SOURCES = [COMMON, COLUMN_SUMS, ENCODER, LAYERNORM, MATMUL, ATTENTION, FLASH_ATTENTION, GELU, GELU_EXACT, CLASSIFIER,
           OPTIMIZER]
