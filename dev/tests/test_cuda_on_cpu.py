"""CUDA's semantics on the CPU: small kernels that test one thing each, including every mistake that must be detected.

Most kernels run twice, with their threads in order and in reverse.
"""
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import cuda_on_cpu
from cli import UserError
from cuda_on_cpu import CpuDevice, KernelError

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source with")

COMMON = r"""
#define FULL 0xffffffff

__device__ float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}
"""

SEMANTICS = r"""
extern "C" __global__ void indices(
    int* out,                   // (blocks*threads, 12)
    int blocks, int threads)
{
    uint3 t = threadIdx, b = blockIdx;
    int block = (b.z * gridDim.y + b.y) * gridDim.x + b.x, thread = (t.z * blockDim.y + t.y) * blockDim.x + t.x;
    int* row = out + 12 * (block * threads + thread);
    row[0] = t.x, row[1] = t.y, row[2] = t.z, row[3] = b.x, row[4] = b.y, row[5] = b.z;
    row[6] = blockDim.x, row[7] = blockDim.y, row[8] = blockDim.z, row[9] = gridDim.x, row[10] = gridDim.y, row[11] = gridDim.z;
}

extern "C" __global__ void arguments(
    double* out,                // (9)
    const unsigned char* bytes, // (n)
    const double* doubles,      // (n)
    const long long* longs,     // (n) or empty
    int n, float f, double d, long long l, unsigned u, size_t s)
{
    out[0] = bytes[n - 1], out[1] = doubles[n - 1], out[2] = longs ? longs[n - 1] : -1;
    out[3] = n, out[4] = f, out[5] = d, out[6] = l, out[7] = u, out[8] = s;
}

// The name is also that of a C library function.
extern "C" __global__ void write(
    int* out)                   // (1)
{
    *out = 1;
}

extern "C" __global__ void halve(
    float* out,                 // (N)
    const float* inp,           // (N)
    int N)
{
    out[threadIdx.x] = inp[threadIdx.x] * 0.5f;
}

extern "C" __global__ void backwards(
    float* out,                 // (N)
    const float* inp,           // (N)
    int N)
{
    __shared__ float numbers[1024];
    int i = threadIdx.x;
    if (i >= N) return;
    numbers[i] = inp[i];
    __syncthreads();
    out[i] = numbers[N - 1 - i];
}

// The barrier between writing and reading is missing.
extern "C" __global__ void shift(
    float* out,                 // (N)
    const float* inp,           // (N)
    int N, int distance)
{
    __shared__ float numbers[1024];
    int i = threadIdx.x;
    numbers[i] = inp[i];
    out[i] = numbers[(i + distance + N) % N];
}

extern "C" __global__ void row_sums(
    float* out,                 // (N)
    const float* inp,           // (N, C)
    int N, int C)
{
    __shared__ float sums[32];
    float sum = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += inp[blockIdx.x * C + c];
    for (int round = 0; round < 3; round++) {       // repeated, to test that one round does not disturb the next
        float total = warp_sum(sum);
        __syncthreads();
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
        __syncthreads();
        total = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0);
        if (threadIdx.x == 0) out[blockIdx.x] = total;
    }
}

template <class T>
__device__ T first_of_shared() {
    __shared__ T numbers[4];
    T before = numbers[3];
    numbers[3] = 1;
    return before;
}

extern "C" __global__ void unset(
    double* out,                // (blocks, 4)
    int blocks)
{
    extern __shared__ __align__(16) double dynamic[];
    double* row = out + 4 * blockIdx.x;
    row[0] = first_of_shared<float>(), row[1] = first_of_shared<int>(), row[2] = first_of_shared<double>(), row[3] = dynamic[1];
    dynamic[1] = 1;
}

extern "C" __global__ void print(int n) { printf("thread %d of %d\n", threadIdx.x, n); }
"""

WARPS = r"""
extern "C" __global__ void shuffles(
    float* out,                 // (4, 32)
    int argument, int width)
{
    float lane = threadIdx.x;
    out[threadIdx.x] = __shfl_sync(FULL, lane, argument, width);
    out[threadIdx.x + 32] = __shfl_up_sync(FULL, lane, argument, width);
    out[threadIdx.x + 64] = __shfl_down_sync(FULL, lane, argument, width);
    out[threadIdx.x + 96] = __shfl_xor_sync(FULL, lane, argument, width);
}

// Nothing waits for lanes that have returned or are not in the mask, and nothing can be read from them.
extern "C" __global__ void some_lanes(
    float* out,                 // (64)
    int n)
{
    float i = threadIdx.x;
    if (i >= 48) return;
    if (i < 32) out[threadIdx.x] = i < 16 ? __shfl_down_sync(0x0000ffff, i, 1)
                                          : __shfl_down_sync(0xffff0000, i, 1);
    else out[threadIdx.x] = __shfl_down_sync(FULL, i, 1);
}

// Lanes return while others already wait for them.
extern "C" __global__ void leaving_lanes(
    float* out,                 // (32)
    int n)
{
    if (threadIdx.x == 31 || threadIdx.x == 0) return;
    out[threadIdx.x] = __shfl_xor_sync(FULL, 1.0f * threadIdx.x, 1);
}

extern "C" __global__ void neighbors(
    int* out,                   // (32)
    int n)
{
    __shared__ int numbers[32];
    numbers[threadIdx.x] = 10 * threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = numbers[(threadIdx.x + n) % 32];
}
"""

FUNCTIONS = r"""
extern "C" __global__ void __launch_bounds__(64) functions(
    float* out,                 // (16)
    const float* inp,           // (4)
    int n)
{
    float4 x = __ldcs((const float4*)inp), y = make_float4(__ldg(inp + 3), 0, 0, 0);
    out[0] = x.w, out[1] = y.x;
    __stcs(out + 2, x.x + x.y);
    out[3] = rsqrtf(x.z), out[4] = __expf(x.x), out[5] = __logf(x.y), out[6] = fmaxf(x.x, x.y), out[7] = tanhf(x.x);
    out[8] = max(n, 7), out[9] = min(threadIdx.x, 7), out[10] = max(x.x, __int_as_float(0x7fc00000));
    out[11] = __float_as_int(x.x), out[12] = __uint_as_float(__float_as_uint(x.y)), out[13] = __popc(0xf0f);
    out[14] = isfinite(__int_as_float(0x7f800000)), out[15] = isfinite(x.x);
}
"""

TILES = r"""
// Where the values of a lane are in a (M, K), b (N, K) and c (M, N), all in column-major order: the layouts of CUTLASS's
// MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>.
__device__ int a_place(int lane, int i) { return 32 * (lane % 4) + lane / 4 + 16 * (i % 2) + 8 * (i / 2 % 2) + 128 * (i / 4); }
__device__ int b_place(int lane, int i) { return 16 * (lane % 4) + lane / 4 + 8 * (i % 2) + 64 * (i / 2); }
__device__ int c_place(int lane, int i) { return 32 * (lane % 4) + lane / 4 + 16 * (i % 2) + 8 * (i / 2); }

extern "C" __global__ void multiply(
    float* c,                   // (warps, 8, 16)
    const float* a,             // (warps, 16, 16)
    const float* b,             // (warps, 16, 8)
    int warps, int rounds)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    a += 256 * warp, b += 128 * warp, c += 128 * warp;
    float sums[4];
    unsigned left[4], right[2];
    for (int i = 0; i < 4; i++) {
        left[i] = bf16_pair(a[a_place(lane, 2 * i)], a[a_place(lane, 2 * i + 1)]);
        if (i < 2) right[i] = bf16_pair(b[b_place(lane, 2 * i)], b[b_place(lane, 2 * i + 1)]);
        sums[i] = c[c_place(lane, i)];
    }
    for (int i = 0; i < rounds; i++) multiply_tiles(sums, left, right[0], right[1]);
    for (int i = 0; i < 4; i++) c[c_place(lane, i)] = sums[i];
}

// c += a b, all (16, 16) in row-major order. The rows in shared memory are 24 numbers long.
extern "C" __global__ void load_and_multiply(
    float* c,                   // (16, 16)
    const float* a,             // (16, 16)
    const float* b,             // (16, 16)
    int rounds)
{
    __shared__ __align__(16) unsigned a_rows[16][12], b_rows[16][12];
    int lane = threadIdx.x;
    for (int i = lane; i < 128; i += 32) {
        a_rows[i / 8][i % 8] = bf16_pair(a[2 * i], a[2 * i + 1]);
        b_rows[i / 8][i % 8] = bf16_pair(b[2 * i], b[2 * i + 1]);
    }
    __syncwarp();
    for (int round = 0; round < rounds; round++) {
        unsigned left[4], right[4];
        load_tiles(left, &a_rows[lane % 16][lane / 16 * 4]);
        load_tiles_transposed(right, &b_rows[lane % 16][lane / 16 * 4]);
        for (int half = 0; half < 2; half++) {
            float sums[4] = {};
            multiply_tiles(sums, left, right[2 * half], right[2 * half + 1]);
            for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] += sums[i];
        }
    }
}

// Each lane names the row that `which` gives.
extern "C" __global__ void load(
    unsigned* tiles,            // (2, 32, 4)
    const unsigned* rows,       // (40, 4)
    const int* which,           // (32)
    int n)
{
    extern __shared__ __align__(16) unsigned shared[];
    for (int i = threadIdx.x; i < 160; i += 32) shared[i] = rows[i];
    __syncwarp();
    for (int transposed = 0; transposed < 2; transposed++) {
        unsigned own[4];
        const unsigned* row = shared + 4 * which[threadIdx.x];
        if (transposed) load_tiles_transposed(own, row);
        else load_tiles(own, row);
        for (int k = 0; k < 4; k++) tiles[(transposed * 32 + threadIdx.x) * 4 + k] = own[k];
    }
}

extern "C" __global__ void pairs(
    unsigned* out,              // (N)
    const float* low,           // (N)
    const float* high,          // (N)
    int N)
{
    for (int i = threadIdx.x; i < N; i += blockDim.x) out[i] = bf16_pair(low[i], high[i]);
}

extern "C" __global__ void misuse_tiles(
    const float* far,           // (4)
    int what, int n)
{
    __shared__ __align__(16) float rows[32][4];
    int lane = threadIdx.x;
    float c[4] = {};
    unsigned tiles[4] = {};
    if (what == 0 && lane == n) return;
    if (what <= 1) multiply_tiles(c, tiles, 0, 0);    // of all lanes
    if (what == 2 && lane < n) __syncthreads();    // instead
    if (what == 3 && lane < n) __shfl_sync(FULL, 1, 0);    // as well
    if (what == 2 || what == 3) load_tiles(tiles, rows[lane]);    // the others
    if (what == 4) lane < n ? load_tiles(tiles, rows[lane]) : load_tiles_transposed(tiles, rows[lane]);    // one of two
    if (what == 5) load_tiles(tiles, (char*)rows[lane] + (lane == n ? 8 : 0));    // misaligned
    if (what == 6) load_tiles_transposed(tiles, lane == n ? far : rows[lane]);    // not shared
    if (what == 7) load_tiles(tiles, rows[0] + 4 * (lane + n));    // too far
}
"""

MISTAKES = r"""
extern "C" __global__ void different_barriers(int n) {
    if (threadIdx.x < n)
        __syncthreads();    // the lower
    else
        __syncthreads();    // the upper
}

extern "C" __global__ void barrier_and_shuffle(int n) {
    if (threadIdx.x == 63) return;
    if (threadIdx.x < n)
        __shfl_sync(FULL, 1, 0);    // in the warp
    else
        __syncthreads();    // at the barrier
}

extern "C" __global__ void different_masks(int n) {
    __shfl_sync(threadIdx.x < n ? 0x0001ffff : FULL, 1, 0);    // masks
}

extern "C" __global__ void different_shuffles(int n) {
    if (threadIdx.x < n)
        __shfl_sync(FULL, 1, 0);    // one shuffle
    else
        __shfl_sync(FULL, 1, 0);    // another shuffle
}

extern "C" __global__ void not_in_mask(int n) {
    __shfl_sync(0x0000fffe, 1, 0);    // without lane 0
}

extern "C" __global__ void overrun(
    float* out,                 // (1)
    int i)
{
    extern __shared__ float numbers[];
    numbers[i] = 1;    // dynamic
    *out = numbers[0];
}
"""

# Compiled with and without the sanitizers.
BOUNDS = r"""
__device__ float get(const float* from, int i) {
    return from[i];    // the read
}

extern "C" __global__ void copy(
    float* out,                 // (N)
    const float* inp,           // (N)
    int N, int start, int stop)
{
    int i = start + threadIdx.x;
    if (i < stop) out[i] = get(inp, i);    // the write
}

extern "C" __global__ void add(
    float* out,                 // (N)
    const float* inp,           // (N)
    int N)
{
    for (int i = threadIdx.x; i < N; i += blockDim.x) out[i] += inp[i];
}

extern "C" __global__ void misuse(
    float* out,                 // (N)
    const float* nothing,       // (N) or empty
    int N, int what)
{
    __shared__ float before[8], shared[8], after[8];
    float local[8];
    before[0] = after[0] = 0;
    for (int i = 0; i < 8; i++) shared[i] = local[i] = i;
    float* either = what == 0 ? shared : local;
    if (what < 2) out[0] = either[N];    // an index
    if (what == 2) out[0] = shared[N];    // a constant size
    if (what == 3) out[0] = nothing[0];    // a null pointer
    if (what == 4) *(float4*)(out + 1) = float4{};    // 16 bytes
    if (what == 5) out[0] = N * 268435456;    // a product
    if (what == 6) out[0] = what / (N - 8);    // a quotient
    if (what == 7) out[0] = what << (N + 24);    // a shift
}
"""

SOURCES = [COMMON, SEMANTICS, WARPS, FUNCTIONS, TILES, MISTAKES, BOUNDS]


@pytest.fixture(scope="module", params=[False, True], ids=["forward", "reverse"])
def device(request):
    device = CpuDevice(reverse=request.param)
    device.load(SOURCES)
    return device


@pytest.fixture(scope="module")
def sanitizer():
    device = CpuDevice(sanitize=True)
    device.load(SOURCES)
    return device


def place(comment):
    """The line of this file that ends with a comment, as error messages name it."""
    [line] = [i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith(f"    // {comment}")]
    return f"{Path(__file__).name}:{line}"


def fails(message):
    return pytest.raises(KernelError, match=f"^{re.escape(message)}$")


# What CUDA guarantees

def test_every_thread_of_every_block_runs_once_and_knows_where_it_is(device):
    grid, block = (3, 4, 2), (5, 3, 7)
    out = device.empty((24 * 105, 12), np.int32)
    device.launch("indices", grid, block, out, 24, 105)
    threads = [(x, y, z) for z in range(7) for y in range(3) for x in range(5)]
    blocks = [(x, y, z) for z in range(2) for y in range(4) for x in range(3)]
    assert out.tolist() == [[*t, *b, *block, *grid] for b in blocks for t in threads]


def test_arguments_of_all_types(device):
    out = device.empty(9, np.float64)
    numbers = 1000000007, 0.1, 0.1, -2 ** 62, 2 ** 32 - 1, 2 ** 63
    device.launch("arguments", 1, 1, out, np.array([255], np.uint8), np.array([1e300]), np.array([2 ** 40]), 1, *numbers[1:])
    assert out.tolist() == [255, 1e300, 2 ** 40, 1, np.float32(0.1), 0.1, -2 ** 62, 2 ** 32 - 1, 2 ** 63]
    device.launch("arguments", 1, 1, out, np.array([255], np.uint8), np.array([1e300]), np.empty(0, np.int64), 1, *numbers[1:])
    assert out[2] == -1


def test_a_kernel_may_have_the_name_of_a_c_function(device):
    out = device.empty(1, np.int32)
    device.launch("write", 1, 1, out)
    assert out == 1


@pytest.mark.parametrize("N", [1, 33, 1000])
def test_a_barrier_waits_for_all_threads_that_have_not_returned(device, N):
    inp, out = np.arange(N, dtype=np.float32), device.empty(N)
    device.launch("backwards", 1, 1024, out, inp, N)
    assert np.array_equal(out, inp[::-1])


def test_sums_with_shuffles_and_barriers(device):
    inp, out = np.random.default_rng(0).integers(-99, 99, (7, 1000)).astype(np.float32), device.empty(7)
    device.launch("row_sums", 7, 256, out, inp, 7, 1000)
    assert np.array_equal(out, inp.sum(1))


def test_shared_memory_is_unset_at_the_start_of_every_block(device):
    out = device.zeros((3, 4), np.float64)
    device.launch("unset", 3, 1, out, 3, shared_bytes=16)
    assert np.array_equal(out, [[np.nan, -1, np.nan, np.nan]] * 3, equal_nan=True)


def test_printf(device, capfd):
    device.launch("print", 1, 3, 3)
    lines = [f"thread {i} of 3" for i in range(3)]
    assert capfd.readouterr().out.splitlines() == lines[::-1 if device.reverse else 1]


@pytest.mark.parametrize("argument, width", [(1, 32), (5, 8), (31, 16)])
def test_shuffles(device, argument, width):
    out = device.empty((4, 32))
    device.launch("shuffles", 1, 32, out, argument, width)
    lane = np.arange(32)
    segment, end = lane // width * width, lane // width * width + width
    up, down, xor = lane - argument, lane + argument, lane ^ argument
    assert out.tolist() == [(segment + argument % width).tolist(), np.where(up >= segment, up, lane).tolist(),
                            np.where(down < end, down, lane).tolist(), np.where(xor < end, xor, lane).tolist()]


def test_shuffles_among_some_lanes(device):
    out = device.zeros(64)
    device.launch("some_lanes", 1, 64, out, 64)
    expected = np.arange(64) + 1.0
    expected[[15, 47]] = np.nan     # 15 reads a lane that is not in the mask, 47 one that has returned
    expected[31] = 31               # at the end of the warp
    expected[48:] = 0
    assert np.array_equal(out, expected, equal_nan=True)


def test_a_warp_does_not_wait_for_lanes_that_return(device):
    out = device.zeros(32)
    device.launch("leaving_lanes", 1, 32, out, 32)
    expected = np.arange(32) ^ 1
    assert np.array_equal(out, [0, np.nan, *expected[2:30], np.nan, 0], equal_nan=True)


def test_syncwarp(device):
    out = device.empty(32, np.int32)
    device.launch("neighbors", 1, 32, out, 5)
    assert out.tolist() == [(i + 5) % 32 * 10 for i in range(32)]


def test_unwritten_arrays_are_nan(device):
    assert np.isnan(device.empty((2, 3))).all() and (device.empty(3, np.int32) == -1).all()
    for _ in range(2):
        temporary = device.temporary(3)
        assert np.isnan(temporary).all()
        temporary.fill(0)


def test_denormals_are_zero_in_a_kernel_only(device):
    inp, out = np.array([1e-38, 2e-38, 3e-38], dtype=np.float32), device.empty(3)
    device.launch("halve", 1, 3, out, inp, 3)
    assert out.tolist() == [0, 0, np.float32(1.5e-38)]
    assert (inp * np.float32(0.5) > 0).all()


def test_functions(device):
    out, inp = device.empty(16), np.array([0.5, 3, 4, 7], np.float32)
    device.launch("functions", 1, 1, out, inp, 3)
    expected = [7, 7, 3.5, 0.5, np.exp(0.5), np.log(3), 3, np.tanh(0.5), 7, 0, 0.5, 0x3f000000, 3, 8, 0, 1]
    assert np.allclose(out, expected, rtol=1e-6, atol=0)


# Tensor cores

def small_integers(*shape):
    return np.random.default_rng(0).integers(-99, 99, shape).astype(np.float32)


def bf16(values):
    """The upper halves of float32 numbers, rounded to the nearest, to even from the middle."""
    bits = values.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FFF, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint32)


@pytest.mark.parametrize("rounds", [1, 3])
def test_product_of_tiles(device, sanitizer, rounds):
    a, b, c = small_integers(3, 16, 16), small_integers(3, 16, 8), small_integers(3, 16, 8)
    for working in (device, sanitizer):
        out = np.ascontiguousarray(c.swapaxes(1, 2))
        working.launch("multiply", 1, 96, out, np.ascontiguousarray(a.swapaxes(1, 2)), b, 3, rounds)
        assert np.array_equal(out.swapaxes(1, 2), c + rounds * a @ b)


def test_tiles_hold_large_and_small_numbers_and_nan(device):
    a, b, out = np.ones((16, 16), np.float32), np.zeros((16, 8), np.float32), device.zeros((8, 16))
    b[5] = [2 ** -100, 2.0 ** 100, np.inf, -np.inf, np.nan, 1, -3, 0]
    device.launch("multiply", 1, 32, out, a, b, 1, 1)
    assert np.array_equal(out, np.repeat(b[5][:, None], 16, 1), equal_nan=True)


def test_tiles_from_shared_memory(device, sanitizer):
    a, b, c = small_integers(16, 16), small_integers(16, 16).T.copy(), small_integers(16, 16)
    for working in (device, sanitizer):
        out = c.copy()
        working.launch("load_and_multiply", 1, 32, out, a, b, 3)
        assert np.array_equal(out, c + 3 * a @ b)


def test_each_lane_names_a_row_and_gets_a_pair_of_each_tile(device):
    rng = np.random.default_rng(0)
    numbers, which = rng.integers(0, 2 ** 16, (40, 8), dtype=np.uint16), rng.integers(0, 40, 32, dtype=np.int32)
    out = device.empty((2, 32, 4), np.uint32)
    device.launch("load", 1, 32, out, numbers.view(np.uint32), which, 0, shared_bytes=640)
    tiles = numbers[which].reshape(4, 8, 8).astype(np.uint32)
    for tiles_of_load, registers in zip((tiles, tiles.swapaxes(1, 2)), out):
        for i in range(32):
            row, column = i // 4, 2 * (i % 4)
            assert registers[i].tolist() == [tile[row, column] | tile[row, column + 1] << 16 for tile in tiles_of_load]


def test_bf16_pair(device):
    bits = np.random.default_rng(0).integers(0, 2 ** 32, 100000, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000     # in the middle between two
    bits[::5] = bits[::5] & 0x80000000 | bits[::5] & 0x007FFFFF     # denormal
    bits[:9] = 0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F7FFFFF, 0xFFFFFFFF
    low = bits.view(np.float32)
    high, out = low[::-1].copy(), device.empty(bits.size, np.uint32)
    device.launch("pairs", 1, 64, out, low, high, bits.size)
    assert np.array_equal(out, bf16(high) << 16 | bf16(low))
    assert (out[:9] & 0xFFFF).tolist() == [0, 0x8000, 0x7F80, 0xFF80, 0x7FFF, 0x7FFF, 0x7FFF, 0x7F80, 0x7FFF]
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x3F808001, 0x3F817FFF], np.uint32).view(np.float32)
    out = device.empty(6, np.uint32)
    device.launch("pairs", 1, 1, out, ties, device.zeros(6), 6)
    assert out.tolist() == [0x3F80, 0x3F82, 0xBF80, 0xBF82, 0x3F81, 0x3F81]


@pytest.mark.parametrize("threads, what, n, message", [
    (32, 0, 9, "an instruction of a whole warp lacks lanes: of 32 threads 1 have returned; "
               "31 wait at {of all lanes}, the first being (0, 0, 0)"),
    (20, 1, 0, "an instruction of a whole warp lacks lanes: of 20 threads 0 have returned; "
               "20 wait at {of all lanes}, the first being (0, 0, 0)"),
    (32, 2, 9, "deadlock: of 32 threads 0 have returned; 9 wait at {instead}, the first being (0, 0, 0); "
               "23 wait at {the others}, the first being (9, 0, 0)"),
    (32, 3, 9, "lanes of a warp differ in intrinsic or in mask: of 32 threads 0 have returned; "
               "9 wait at {as well}, the first being (0, 0, 0); 23 wait at {the others}, the first being (9, 0, 0)"),
    (32, 4, 9, "lanes of a warp differ in intrinsic or in mask: of 32 threads 0 have returned; "
               "32 wait at {one of two}, the first being (0, 0, 0)"),
    (32, 5, 9, "thread (9, 0, 0) loads a row of a tile that is not aligned to 16 bytes at {misaligned}"),
    (32, 6, 9, "thread (9, 0, 0) loads a row of a tile from outside of shared memory at {not shared}"),
])
def test_misused_tiles(device, threads, what, n, message):
    far = np.zeros(8, np.float32)
    far = far[-far.ctypes.data % 16 // 4:][:4]      # aligned
    with fails("misuse_tiles: block (0, 0, 0): " + re.sub(r"{([^}]*)}", lambda match: place(match[1]), message)):
        device.launch("misuse_tiles", 1, threads, far, what, n)


@pytest.mark.parametrize("n, thread", [(4, 28), (-3, 0)])
def test_loading_a_row_out_of_bounds(sanitizer, n, thread):
    with fails(f"misuse_tiles: block (0, 0, 0): thread ({thread}, 0, 0) reads 16 bytes at {place('too far')}: "
               "memory of no array"):
        sanitizer.launch("misuse_tiles", 1, 32, np.zeros(4, np.float32), 7, n)


# What CUDA forbids

@pytest.mark.parametrize("distance", [1, -1])
def test_a_missing_barrier_shows_in_one_of_the_two_orders(device, distance):
    """In one order the first thread reads what is not written yet; in the other order the result is right."""
    inp, out = np.arange(64, dtype=np.float32), device.empty(64)
    device.launch("shift", 1, 64, out, inp, 64, distance)
    late = distance < 0 if device.reverse else distance > 0
    assert np.isnan(out).sum() == (63 if late else 1)


def test_threads_at_different_barriers(device):
    lower, upper = place("the lower"), place("the upper")
    with fails("different_barriers: block (0, 0, 0): threads wait at different barriers: of 64 threads 0 have returned; "
               f"40 wait at {lower}, the first being (0, 0, 0); 24 wait at {upper}, the first being (40, 0, 0)"):
        device.launch("different_barriers", 2, 64, 40)


def test_deadlock(device):
    """Lanes wait for the rest of their warp, which waits for them at a barrier."""
    with fails("barrier_and_shuffle: block (0, 0, 0): deadlock: of 64 threads 1 have returned; "
               f"10 wait at {place('in the warp')}, the first being (0, 0, 0); "
               f"53 wait at {place('at the barrier')}, the first being (10, 0, 0)"):
        device.launch("barrier_and_shuffle", 1, 64, 10)


def test_lanes_with_different_masks(device):
    with pytest.raises(KernelError, match="^different_masks: block .0, 0, 0.: lanes of a warp differ in intrinsic or in mask: "
                                          f".* wait at {place('masks')}, the first being "):
        device.launch("different_masks", 1, 32, 16)


def test_lanes_at_different_shuffles(device):
    with fails("different_shuffles: block (0, 0, 0): lanes of a warp differ in intrinsic or in mask: "
               f"of 32 threads 0 have returned; 30 wait at {place('one shuffle')}, the first being (0, 0, 0); "
               f"2 wait at {place('another shuffle')}, the first being (30, 0, 0)"):
        device.launch("different_shuffles", 1, 32, 30)


def test_a_lane_outside_its_own_mask(device):
    with pytest.raises(KernelError, match=re.escape(f"is not in its own mask at {place('without lane 0')}")):
        device.launch("not_in_mask", 1, 32, 0)


def test_writing_past_the_end_of_dynamic_shared_memory(device, sanitizer):
    out = device.zeros(1)
    device.launch("overrun", 1, 1, out, 1, shared_bytes=8)
    with fails("overrun: block (0, 0, 0): writes past its 8 bytes of dynamic shared memory"):
        device.launch("overrun", 1, 1, out, 2, shared_bytes=8)
    sanitizer.launch("overrun", 1, 1, out, 1, shared_bytes=8)
    with fails(f"overrun: block (0, 0, 0): thread (0, 0, 0) writes 4 bytes at {place('dynamic')}: memory of no array"):
        sanitizer.launch("overrun", 1, 1, out, 2, shared_bytes=8)


def test_a_device_works_after_an_error(device, sanitizer):
    """Even though the threads of the failed kernel never returned."""
    inp = np.arange(70, dtype=np.float32)
    for _ in range(10):
        with pytest.raises(KernelError):
            device.launch("barrier_and_shuffle", 1, 64, 10)
        with pytest.raises(KernelError):
            sanitizer.launch("misuse", 1, 1, inp[:8].copy(), np.empty(0, np.float32), 8, 1)
        for working in (device, sanitizer):
            out = working.zeros(70)
            working.launch("backwards", 1, 128, out, inp, 70)
            assert np.array_equal(out, inp[::-1])


# Sanitizers

def test_no_error_within_bounds(sanitizer):
    inp, out = np.arange(70, dtype=np.float32), sanitizer.zeros(70)
    sanitizer.launch("copy", 1, 70, out, inp, 70, 0, 70)
    assert np.array_equal(out, inp)
    sanitizer.launch("row_sums", 1, 64, out[:1], inp, 1, 70)
    assert out[0] == inp.sum()


def test_reads_out_of_bounds(sanitizer):
    """The array is part of a larger one, as a layer's tensors are."""
    inp, out = np.zeros(270, np.float32)[100:170], sanitizer.zeros(70)
    for start, thread, byte in ((60, 10, 280), (-1, 0, -4)):
        with fails(f"copy: block (0, 0, 0): thread ({thread}, 0, 0) reads 4 bytes at {place('the read')}, called at "
                   f"{place('the write')}: byte {byte} of inp, which has 280"):
            sanitizer.launch("copy", 1, 32, out, inp, 70, start, 71)


def test_writes_out_of_bounds(sanitizer):
    whole = sanitizer.zeros(300)
    with fails(f"misuse: block (0, 0, 0): thread (0, 0, 0) writes 16 bytes at {place('16 bytes')}: "
               "byte 4 of out, which has 16"):
        sanitizer.launch("misuse", 1, 1, whole[99:103], np.empty(0, np.float32), 4, 4)
    assert not whole.any()


def test_the_same_array_twice(sanitizer):
    array = np.arange(70, dtype=np.float32)
    sanitizer.launch("add", 1, 32, array, array, 70)
    assert np.array_equal(array, 2 * np.arange(70))


@pytest.mark.parametrize("what, message", [
    (0, "reads 4 bytes at {}: memory of no array // an index"),
    (1, "reads 4 bytes at {}: memory of no array // an index"),
    (2, "exceeds the bounds of an array at {} // a constant size"),
    (3, "uses a null pointer, or one not aligned for its type at {} // a null pointer"),
    (4, "uses a null pointer, or one not aligned for its type at {} // 16 bytes"),
    (5, "overflows an integer at {} // a product"),
    (6, "divides an integer by zero at {} // a quotient"),
    (7, "shifts by a negative number or too many bits at {} // a shift"),
])
def test_undefined_behavior(sanitizer, what, message):
    message, comment = message.split(" // ")
    out = sanitizer.zeros(8)
    with fails("misuse: block (0, 0, 0): thread (0, 0, 0) " + message.format(place(comment))):
        sanitizer.launch("misuse", 1, 1, out, np.empty(0, np.float32), 8, what)


# Compiling

@pytest.fixture
def empty_build_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_on_cpu, "build_folder", lambda: tmp_path)
    return tmp_path


BROKEN = r"""
extern "C" __global__ void broken(int n) {
    int x = unknown;    // a mistake
}
"""


def test_a_compiler_error_names_the_line(empty_build_folder):
    device = CpuDevice()
    device.load([COMMON, BROKEN])
    with pytest.raises(KernelError, match=f"^broken does not compile:\n.*{place('a mistake')}:.*error: .unknown. was not "):
        device.launch("broken", 1, 1, 0)
    assert not list(empty_build_folder.glob("*.so"))


def test_a_library_is_compiled_once(empty_build_folder, monkeypatch):
    def launch(preamble=COMMON):
        device = CpuDevice()
        device.load([preamble, FUNCTIONS])
        device.launch("functions", 1, 1, device.empty(16), np.ones(4, np.float32), 3)
    launch()
    [library] = empty_build_folder.glob("*.so")
    compiled = library.stat().st_ino
    launch()
    assert library.stat().st_ino == compiled and len(list(empty_build_folder.iterdir())) == 2
    launch(COMMON + "\n#define CHANGED")
    assert len(list(empty_build_folder.glob("*.so"))) == 2


def test_a_source_may_change_under_the_same_name(device):
    again = CpuDevice()
    for number in (1, 2):
        again.load([COMMON, f'extern "C" __global__ void write(\n    int* out)    // (1)\n{{ *out = {number}; }}'])
        out = again.empty(1, np.int32)
        again.launch("write", 1, 1, out)
        assert out == number


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cuda_on_cpu, "COMPILER", "no-such-compiler")
    cuda_on_cpu.machine.cache_clear()
    with pytest.raises(UserError, match=r"needs a C.. compiler, and no-such-compiler was not found: install it "):
        CpuDevice()
    monkeypatch.undo()
    CpuDevice()     # the failure is not cached
