"""The launcher's checks, and the behavior that both devices share.

A test that needs a GPU is skipped if there is none. `CudaDevice` is tested without a GPU too, on a fake CuPy: NumPy arrays,
products that are computed from addresses, and streams that record what they are told to do.
"""
import ctypes
import itertools
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cublaslt
from cli import UserError
from cuda_on_cpu import CpuDevice
from device import CudaDevice, open_device
from distributed import World
from launcher import parse_signatures

KERNEL = r"""
// Some words (with parentheses) before it.
extern "C" __global__ void __launch_bounds__(256) scale(
    float* __restrict__ out,            // (N, 2*C)
    const int* __restrict__ tokens,     // (N): which rows
    const double* weight,               // (C) or empty
    unsigned long long* counts,         // (C + 1, 2)
    int N, int C,                       // rows and half their length (no shape)
    unsigned seed, size_t skip, float factor, double offset)
{
    // out (N)
}
"""
LAUNCH = "extern \"C\" __global__ void copy(\n    float* out,  // (N)\n    const float* inp,  // (N)\n    int N)\n" \
         "{ out[threadIdx.x] = inp[threadIdx.x]; }\n"


# ----------------------------------------------------------------------------------------------------------------------
# A fake CuPy

class FakeArray(np.ndarray):
    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))
    _c_contiguous = property(lambda self: self.flags.c_contiguous)

    def get(self):
        return np.array(self)

    def set(self, array, stream=None):
        self[...] = array
        if stream:
            stream.log.append("copy")


class FakeProducts:
    """cublaslt.CublasLt, on arrays in main memory."""

    def __init__(self, library, workspace, workspace_bytes, tf32):
        self.tf32 = tf32

    def matmul(self, problem, c, alpha, a, b, beta, bias, stream):
        assert stream == 99
        c_shape, c_strides, a_shape, a_strides, b_shape, b_strides, c_itemsize, itemsize = problem
        c, a, b = (array_at(address, *layout) for address, *layout in (
            (c, c_shape, c_strides, c_itemsize), (a, a_shape, a_strides, itemsize), (b, b_shape, b_strides, itemsize)))
        total = alpha * (a.astype(float) @ b.astype(float)) + (beta * c.astype(float) if beta else 0)
        c[...] = total + array_at(bias, c_shape[-1:], (c_itemsize,), c_itemsize) if bias else total


def array_at(address, shape, strides, itemsize):
    nbytes = itemsize + sum((length - 1) * stride for length, stride in zip(shape, strides))
    dtype = np.float32 if itemsize == 4 else ml_dtypes.bfloat16
    return np.ndarray(shape, dtype, (ctypes.c_byte * nbytes).from_address(address), 0, strides)


class FakeStream:
    """Records what it is told to do: "copy", entries that the test adds, and what of another stream it waits for.

    refuses: the error of CUDA when it ends to record a graph, or None
    """
    ptr, refuses = 99, None

    def __init__(self, cupy):
        self.log, self.cupy = [], cupy

    def use(self):
        self.cupy.stream = self

    def begin_capture(self):
        self.log.append("begin")

    def end_capture(self):
        start = self.log.index("begin")
        self.log, graph = self.log[:start], self.log[start + 1:]
        if self.refuses:
            raise RuntimeError(self.refuses)
        return SimpleNamespace(launch=lambda: self.log.append(tuple(graph)))

    def wait_event(self, event):
        self.log.append(event.comes_after)

    def synchronize(self):
        pass


class FakeEvent:
    comes_after = ()    # the stream's log when the event was last recorded

    def record(self, stream):
        self.comes_after = tuple(stream.log)

    def synchronize(self):
        pass


class FakeCupy:
    """The module cupy on a machine with `gpus` GPUs, each with `free` bytes of free memory.

    missing, busy: what CuPy raises where NVRTC is missing, and for a GPU that cannot be used
    """
    ndarray = FakeArray

    def __init__(self, gpus=2, capability="80", free=2 ** 30, missing=None, busy=None):
        self.stream, self.streams, self.free = None, [], free
        self.modules = []

        class CUDARuntimeError(RuntimeError):
            pass

        def get_device_count():
            if not gpus:
                raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
            return gpus

        def fail_with(error):
            if error:
                raise error

        self.nvrtc = SimpleNamespace(getVersion=lambda: fail_with(missing))
        self.open_products = lambda *args, **options: fail_with(busy) or FakeProducts(*args, **options)

        def new_stream(non_blocking):
            assert non_blocking
            self.streams.append(FakeStream(self))
            return self.streams[-1]

        device = SimpleNamespace(compute_capability=capability, mem_info=(free, 2 ** 34),
                                 attributes={"MultiProcessorCount": 108, "ClockRate": 1410000})
        device.use = lambda: device
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=get_device_count,
                                    getDeviceProperties=lambda index: {"name": b"Fake GPU %d" % index}),
            Device=lambda index: device, Event=FakeEvent,
            Stream=new_stream, get_current_stream=lambda: self.stream)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_bytes=lambda: 2 ** 28)

    def empty(self, shape, dtype):
        if np.prod(shape) * np.dtype(dtype).itemsize > self.free:
            raise MemoryError
        return np.empty(shape, dtype).view(FakeArray)

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype).view(FakeArray)

    def RawModule(self, code, options):
        launches = []
        self.modules.append((code, options, launches))

        def function(grid, block, args, shared_mem):
            launches.append((grid, block, args, shared_mem))
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=function))


@pytest.fixture
def fake_cupy(monkeypatch):
    """Installs a FakeCupy for `import cupy` to find."""
    def install(**options):
        monkeypatch.setattr(CudaDevice, "index", None)
        monkeypatch.setattr(CudaDevice, "stream", None)
        cupy = FakeCupy(**options)
        libs = SimpleNamespace(nvrtc=cupy.nvrtc)
        monkeypatch.setattr(cublaslt, "open_library", lambda: None)
        monkeypatch.setattr(cublaslt, "CublasLt", cupy.open_products)
        modules = {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupyx": SimpleNamespace(empty_pinned=np.empty),
                   "cupy_backends": SimpleNamespace(), "cupy_backends.cuda": SimpleNamespace(libs=libs),
                   "cupy_backends.cuda.libs": libs}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return cupy
    return install


@pytest.fixture(params=["cpu", "fake cuda", "cuda"])
def device(request, fake_cupy):
    if request.param == "cpu":
        if not shutil.which("g++"):
            pytest.skip("no g++ to compile the CUDA source with")
        return CpuDevice()
    if request.param == "fake cuda":
        fake_cupy()
    try:
        return open_device("cuda", "float32")
    except UserError as error:
        pytest.skip(str(error))


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# ----------------------------------------------------------------------------------------------------------------------
# Declarations

def test_a_declaration():
    [kernel] = parse_signatures(KERNEL).values()
    assert kernel.name == "scale" and kernel.max_threads == 256
    assert [tuple(p) for p in kernel.parameters] == [
        ("out", "float32", True, False, "N, 2*C", False), ("tokens", "int32", True, True, "N", False),
        ("weight", "float64", True, True, "C", True), ("counts", "uint64", True, False, "C + 1, 2", False),
        *((name, dtype, False, False, "", False) for name, dtype in (
            ("N", "int32"), ("C", "int32"), ("seed", "uint32"), ("skip", "uint64"),
            ("factor", "float32"), ("offset", "float64")))]


@pytest.mark.parametrize("source, message", [
    ('extern "C" __global__ void k(\n    float* x,\n    int N) {}',
     "k: expected x on its own line, followed by its shape: // (N, C)"),
    ('extern "C" __global__ void k(\n    float* x, float* y,  // (N)\n    int N) {}',
     "k: expected x on its own line, followed by its shape: // (N, C)"),
    ('extern "C" __global__ void k(\n    float* x,  // (N, M)\n    int N) {}',
     "k: the shape (N, M) of x names M, expected an integer parameter"),
    ('extern "C" __global__ void k(half* x) {}',
     "k: unknown type in 'half* x', expected one of float, double, int, unsigned, unsigned int, long long, unsigned long long, "
     "size_t, unsigned char, bf16, Float"),
    ('extern "C" __global__ void k(int n) {}\n__global__ void other(int n) {}',
     'found 2 kernels, only 1 (k) declared as expected: extern "C" __global__ void name('),
])
def test_an_invalid_declaration(source, message):
    with raises(ValueError, message):
        parse_signatures(source)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments

class Arguments(dict):
    """Valid arguments of `scale`, except for the changes."""

    def __init__(self, **changes):
        super().__init__(out=np.zeros((3, 8), np.float32), tokens=np.zeros(3, np.int32), weight=np.zeros(4),
                         counts=np.zeros((5, 2), np.uint64), N=3, C=4, seed=1, skip=2, factor=0.5, offset=0.25)
        self.update(changes)

    def check(self):
        [kernel] = parse_signatures(KERNEL).values()
        return kernel.check(list(self.values()), CpuDevice())


def read_only(array):
    array.flags.writeable = False
    return array


def test_valid_arguments():
    args = Arguments()
    values = args.check()
    assert values[:4] == [args[name].ctypes.data for name in ("out", "tokens", "weight", "counts")]
    assert values[4:] == [3, 4, 1, 2, 0.5, 0.25]
    assert [value.dtype for value in values[4:]] == ["int32", "int32", "uint32", "uint64", "float32", "float64"]


@pytest.mark.parametrize("changes", [
    dict(out=np.zeros(24, np.float32)),                                 # another shape of the same size
    dict(weight=np.zeros(0)),
    dict(N=np.int64(3), factor=1, offset=np.float32(1), skip=2 ** 63),
    dict(tokens=read_only(np.zeros(3, np.int32))),                      # is only read
    dict(N=0, out=np.zeros(0, np.float32), tokens=np.zeros(0, np.int32)),
])
def test_other_valid_arguments(changes):
    values = Arguments(**changes).check()
    assert not values[2] == 0 or "weight" in changes    # an empty array is passed as a null pointer


@pytest.mark.parametrize("changes, kind, message", [
    (dict(out=np.zeros((3, 8))), TypeError, "out is numpy.ndarray of float64, expected numpy.ndarray of float32"),
    (dict(tokens=np.zeros(3, np.int64)), TypeError, "tokens is numpy.ndarray of int64, expected numpy.ndarray of int32"),
    (dict(out=[0.0] * 24), TypeError, "out is list " + repr([0.0] * 24) + ", expected numpy.ndarray of float32"),
    (dict(out=None), TypeError, "out is NoneType None, expected numpy.ndarray of float32"),
    (dict(out=np.zeros((3, 8), np.float32).view(FakeArray).data), TypeError, None),
    (dict(out=np.zeros((3, 7), np.float32)), ValueError, "out has shape (3, 7), expected (N, 2*C) = (3, 8)"),
    (dict(tokens=np.zeros(4, np.int32)), ValueError, "tokens has shape (4,), expected (N) = (3,)"),
    (dict(counts=np.zeros(8, np.uint64)), ValueError, "counts has shape (8,), expected (C + 1, 2) = (5, 2)"),
    (dict(weight=np.zeros(5)), ValueError, "weight has shape (5,), expected (C) = (4,) or empty"),
    (dict(tokens=np.zeros(0, np.int32)), ValueError, "tokens has shape (0,), expected (N) = (3,)"),
    (dict(out=np.zeros((8, 3), np.float32).T), ValueError,
     "out has strides (4, 12) for shape (3, 8), expected a C-contiguous array"),
    (dict(weight=np.zeros(8)[::2]), ValueError, "weight has strides (16,) for shape (4,), expected a C-contiguous array"),
    (dict(counts=read_only(np.zeros(10, np.uint64))), ValueError, "counts is read-only, expected a writable array"),
    (dict(N=3.0), TypeError, "N is float 3.0, expected an integer"),
    (dict(N="3"), TypeError, "N is str '3', expected an integer"),
    (dict(N=2 ** 31), ValueError, "N is 2147483648, expected -2147483648 to 2147483647: it is declared int32"),
    (dict(skip=-1), ValueError, "skip is -1, expected 0 to 18446744073709551615: it is declared uint64"),
    (dict(factor="1"), TypeError, "factor is str '1', expected a number"),
    (dict(factor=np.zeros(1, np.float32)), TypeError, "factor is numpy.ndarray of float32, expected a number"),
])
def test_invalid_arguments(changes, kind, message):
    with pytest.raises(kind, match=f"^scale: {re.escape(message)}$" if message else "^scale: out is "):
        Arguments(**changes).check()


def test_too_few_arguments():
    args = Arguments()
    del args["offset"]
    with raises(TypeError, "scale: 9 arguments, expected 10: out, tokens, weight, counts, N, C, seed, skip, factor, offset"):
        args.check()


def test_an_array_of_the_other_device(fake_cupy):
    fake_cupy()
    gpu, cpu = open_device("cuda", "float32"), CpuDevice()
    gpu.load(["", LAUNCH])
    cpu.load(["", LAUNCH])
    for device, other in ((gpu, np.zeros(3, np.float32)), (cpu, SimpleNamespace(shape=(3,), dtype="float32"))):
        with pytest.raises(TypeError, match="^copy: inp is .* of float32, expected .*[.].* of float32$"):
            device.launch("copy", 1, 3, device.zeros(3), other, 3)


@pytest.mark.parametrize("grid, block, shared_bytes, message", [
    (0, 1, 0, "a grid of (0, 1, 1) blocks, expected at least 1 and at most (2147483647, 65535, 65535)"),
    ((1, 65536), 1, 0, "a grid of (1, 65536, 1) blocks, expected at least 1 and at most (2147483647, 65535, 65535)"),
    (1, 1025, 0, "a block of (1025, 1, 1) threads, expected at least 1, at most (1024, 1024, 64) and 1024 in all"),
    (1, (32, 33), 0, "a block of (32, 33, 1) threads, expected at least 1, at most (1024, 1024, 64) and 1024 in all"),
    (1, (1, 1, 65), 0, "a block of (1, 1, 65) threads, expected at least 1, at most (1024, 1024, 64) and 1024 in all"),
    (1, 0, 0, "a block of (0, 1, 1) threads, expected at least 1, at most (1024, 1024, 64) and 1024 in all"),
    (1, 1, 48129, "48129 bytes of shared memory, expected 0 to 48128"),
])
def test_a_launch_beyond_the_limits_of_some_gpu(device, grid, block, shared_bytes, message):
    device.load(["", LAUNCH])
    with raises(ValueError, f"copy: {message}"):
        device.launch("copy", grid, block, device.zeros(1), device.zeros(1), 1, shared_bytes=shared_bytes)


def test_launch_bounds(device):
    device.load(["", LAUNCH.replace("copy(", "__launch_bounds__(64) copy(")])
    with raises(ValueError, "copy: a block of (65, 1, 1) threads, expected at least 1, at most (1024, 1024, 64) and 64 in all"):
        device.launch("copy", 1, 65, device.zeros(65), device.zeros(65), 65)


def test_an_unknown_kernel(device):
    device.load(["", LAUNCH])
    with raises(ValueError, "cpy: no such kernel, expected one of copy"):
        device.launch("cpy", 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# What both devices have in common

def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("m, k, n", [*itertools.product((1, 3), repeat=3)])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_gemm_of_single_rows_and_columns(device, m, k, n, transpose_a, transpose_b):
    """From their strides, a matrix and its transpose look the same."""
    a, b = normal(*((k, m) if transpose_a else (m, k))), normal(*((n, k) if transpose_b else (k, n)))
    c, a_array, b_array = device.zeros((m, n)), device.to_device(a), device.to_device(b)
    a, a_array, b, b_array = (array.T if transposed else array for array, transposed in (
        (a, transpose_a), (a_array, transpose_a), (b, transpose_b), (b_array, transpose_b)))
    device.gemm(c, 1, a_array, b_array, 0)
    assert np.allclose(device.to_host(c), a.astype(float) @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [0, 1, -0.5])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_gemm(device, batch, transpose_a, transpose_b, beta):
    """On parts of larger arrays: there can be gaps between rows and between batches, as between the queries of a head."""
    m, n, k = 5, 7, 4
    a, b = normal(*batch, *((k, m) if transpose_a else (m, k))), normal(*batch, *((n, k) if transpose_b else (k, n)))
    c = normal(*batch, m, n)

    def part(array):
        padded = device.to_device(np.full([length + 2 for length in array.shape], np.nan, np.float32))
        view = padded[tuple(slice(1, -1) for _ in array.shape)]
        view[...] = device.to_device(array)
        return view, padded

    (a_part, _), (b_part, _), (c_part, c_padded) = part(a), part(b), part(c if beta else np.full_like(c, np.nan))
    a, a_part, b, b_part = (array.swapaxes(-1, -2) if transposed else array for array, transposed in (
        (a, transpose_a), (a_part, transpose_a), (b, transpose_b), (b_part, transpose_b)))
    device.gemm(c_part, 0.3, a_part, b_part, beta)
    assert np.allclose(device.to_host(c_part), 0.3 * a.astype(float) @ b + beta * c, rtol=0, atol=1e-5)
    assert np.isnan(device.to_host(c_padded)).sum() == c_padded.size - c.size


@pytest.mark.parametrize("kind, dtype, dtype_c", [("cpu", "bfloat16", "bfloat16"), ("cpu", "bfloat16", "float32"),
                                                  ("cuda", "bfloat16", "bfloat16"), ("cuda", "bfloat16", "float32"),
                                                  ("cpu", "float32", "float32"), ("cuda", "float32", "float32")])
def test_gemm_with_bias(fake_cupy, kind, dtype, dtype_c):
    """The sum of product and bias is rounded once."""
    fake_cupy()
    device = open_device(kind, dtype)
    a, b, bias = (array.astype(dtype) for array in (normal(5, 4), normal(4, 7), normal(7)))
    c = device.empty((5, 7), np.dtype(dtype_c))
    device.gemm(c, 1, *map(device.to_device, (a, b)), 0, device.to_device(bias.astype(dtype_c)))
    exact = a.astype(float) @ b.astype(float) + bias.astype(float)
    tolerance = 1e-5 if dtype_c == "float32" else 2 ** -8
    np.testing.assert_allclose(device.to_host(c).astype(float), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("change, kind, message", [
    (dict(a=np.zeros((5, 4))), TypeError, "gemm: a is .* of float64, expected .* of float32"),
    (dict(a=np.zeros((5, 3))), ValueError, r"gemm: c \(5, 7\), a \(5, 3\) and b \(4, 7\) do not match"),
    (dict(a=np.zeros((2, 5, 4))), ValueError, r"gemm: a has shape \(2, 5, 4\) and strides \(80, 16, 4\), expected a matrix.*"),
    (dict(b=np.zeros((8, 14)).T[::2, ::2]), ValueError, r"gemm: b has shape .* and strides .*, expected a matrix.*"),
    (dict(c=np.zeros((7, 5)).T), ValueError, r"gemm: c has shape \(5, 7\) and strides \(4, 20\), expected a matrix.*"),
    (dict(b=np.broadcast_to(np.zeros(7), (4, 7))), ValueError, r"gemm: b has shape \(4, 7\) and strides \(0, 4\), expected .*"),
    (dict(c=np.zeros((5, 14))[:, ::2]), ValueError, r"gemm: c has shape \(5, 7\) and strides \(56, 8\), expected a matrix.*"),
    (dict(b=np.zeros((7, 4))), ValueError, r"gemm: c \(5, 7\), a \(5, 4\) and b \(7, 4\) do not match"),
])
def test_an_invalid_product(fake_cupy, change, kind, message):
    fake_cupy()
    for device in (CpuDevice(), open_device("cuda", "float32")):
        args = dict(c=np.zeros((5, 7)), a=np.zeros((5, 4)), b=np.zeros((4, 7))) | change
        arrays = {}
        for name in "cab":
            array = args[name] if kind is TypeError and name in change else strided_copy(args[name])
            arrays[name] = array.view(device.Array)
        with pytest.raises(kind, match=f"^{message}$"):
            device.gemm(arrays["c"], 1, arrays["a"], arrays["b"], 0)


BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("change, message", [
    (dict(b=np.zeros((4, 7), np.float32)), "gemm: a and b are bfloat16 and float32 and c is bfloat16, .*"),
    (dict(a=np.zeros((5, 4), np.float32), b=np.zeros((4, 7), np.float32)), "gemm: a and b are .* and c is bfloat16, .*"),
    (dict(a=np.zeros((5, 4), np.float16)), "gemm: a is .* of float16, expected .* of bfloat16 or float32"),
    (dict(bias=np.zeros(7, np.float32)), r"gemm: bias is .* of float32 .*, expected a contiguous .* of bfloat16 of .*"),
    (dict(bias=np.zeros(6, BF16)), r"gemm: bias is .* of shape \(6,\), expected a contiguous .* of shape \(7,\)"),
    (dict(bias=np.zeros(14, BF16)[::2]), r"gemm: bias is .*, expected a contiguous .* of shape \(7,\)"),
])
def test_an_invalid_product_in_bfloat16(fake_cupy, change, message):
    fake_cupy()
    args = dict(c=np.zeros((5, 7), BF16), a=np.zeros((5, 4), BF16), b=np.zeros((4, 7), BF16), bias=np.zeros(7, BF16)) | change
    for device in (CpuDevice("bfloat16"), open_device("cuda", "bfloat16")):
        c, a, b, bias = (array.view(device.Array) for array in args.values())
        with pytest.raises(TypeError, match=f"^{message}$"):
            device.gemm(c, 1, a, b, 0, bias)


def strided_copy(array):
    """A float32 array of the same shape, with half the strides of the float64 array."""
    base = np.zeros(array.size * 2, np.float32)
    return np.lib.stride_tricks.as_strided(base, array.shape, [stride // 2 for stride in array.strides])


def test_arrays(device):
    array = normal(3, 4)
    copy = device.to_device(array)
    assert isinstance(copy, device.Array)
    array[0] = 0
    assert device.to_host(copy)[0].all()
    transposed = device.to_device(array.T)
    assert device.contiguous(transposed) and np.array_equal(device.to_host(transposed), array.T)
    zeros = device.zeros((2, 3), np.int32)
    assert zeros.dtype == np.int32 and not device.to_host(zeros).any()
    assert device.zeros(3).dtype == device.empty(3).dtype == np.float32
    free, total = device.memory()
    assert 0 < free <= total


def test_temporary_arrays(device):
    """They share memory. Where a larger one needs more, the memory before it stays: a CUDA graph may still use it."""
    small = device.temporary(3)
    assert device.address(device.temporary((1, 2), np.int32)) == device.address(small)
    large = device.temporary((5, 7), np.float64)
    assert large.shape == (5, 7) and large.dtype == np.float64 and device.contiguous(large)
    assert device.address(device.temporary(70)) == device.address(large)
    assert list(map(device.address, device.temporaries)) == [device.address(small), device.address(large)]


def test_uploads(device):
    """An array has its contents from the next call to the one after it."""
    upload = device.uploader((2, 3), np.int32)
    uploaded = []
    for i in range(7):
        uploaded.append(upload(np.full((2, 3), i, np.int32)))
        if i > 0:
            assert np.array_equal(device.to_host(uploaded[i - 1]), np.full((2, 3), i - 1))


# ----------------------------------------------------------------------------------------------------------------------
# CudaDevice on the fake CuPy

def test_a_launch_on_a_gpu(fake_cupy):
    cupy = fake_cupy()
    device = open_device("cuda", "float32")
    device.load(["// in front\n", LAUNCH])
    assert not cupy.modules
    out, inp = device.zeros(3), device.zeros(3)
    for _ in range(2):
        device.launch("copy", (1, 2), 3, out, inp, 3, shared_bytes=16)
    [(code, options, launches)] = cupy.modules
    assert code == "// in front\n" + LAUNCH and options == ("--std=c++17", "-DFloat=float")
    assert launches == 2 * [((1, 2, 1), (3, 1, 1), [out.data.ptr, inp.data.ptr, np.int32(3)], 16)]
    assert launches[0][2][2].dtype == np.int32


def test_an_upload_waits_for_the_kernels_that_used_its_buffer(fake_cupy):
    cupy = fake_cupy()
    upload = open_device("cuda", "float32").uploader(3, np.int32)
    _, copies = cupy.streams
    arrays = []
    for i in range(8):
        cupy.stream.log.append(f"kernels {i}")      # they may use the array of upload i - 2
        arrays.append(upload(np.zeros(3, np.int32)))
        before_copy, copy = copies.log[-2:]
        assert copy == "copy"
        if i > 0:       # later kernels wait for the copy before this one
            assert cupy.stream.log[-1] == tuple(copies.log[:-2])
        if i >= 3:
            assert arrays[i] is arrays[i - 3] and len({id(array) for array in arrays}) == 3
            assert f"kernels {i - 1}" in before_copy and f"kernels {i}" not in before_copy


def test_a_graph_repeats_what_a_work_launches(fake_cupy):
    """The first call is an ordinary one, the second is recorded; from there on only the graph is launched."""
    cupy, graphs, calls = fake_cupy(), {}, []
    device = open_device("cuda", "float32")

    def work(name):
        calls.append(name)
        cupy.stream.log += [f"{name} 1", f"{name} 2"]

    for name in "aabaab":
        device.replay(graphs, name, partial(work, name))
    assert calls == ["a", "a", "b", "b"]
    assert cupy.stream.log == ["a 1", "a 2", ("a 1", "a 2"), "b 1", "b 2", ("a 1", "a 2"), ("a 1", "a 2"), ("b 1", "b 2")]


@pytest.mark.parametrize("where", ["work", "end"])
def test_what_cuda_does_not_record_is_launched(fake_cupy, caplog, where):
    cupy, graphs = fake_cupy(), {}
    device = open_device("cuda", "float32")

    def work():
        if where == "work" and "begin" in cupy.stream.log:
            raise NotImplementedError("no calls of cuBLAS\nin a graph")
        cupy.stream.log.append("launch")

    cupy.stream.refuses = "cudaErrorStreamCaptureInvalidated: no graph" if where == "end" else None
    for key in "aaabbb":
        device.replay(graphs, key, work)
    assert cupy.stream.log == 6 * ["launch"]
    assert [record.getMessage() for record in caplog.records] == [
        "note: no CUDA graphs on Fake GPU 0: " + (cupy.stream.refuses or "no calls of cuBLAS")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_record_ends(fake_cupy, error):
    """A mistake, or Ctrl-C: it is reported, and the stream launches again."""
    cupy = fake_cupy()
    device, graphs = open_device("cuda", "float32"), {"key": None}

    def work():
        raise error("stop")

    with pytest.raises(error, match="stop"):
        device.replay(graphs, "key", work)
    assert "begin" not in cupy.stream.log


def test_devices_of_a_process_share_a_stream(fake_cupy):
    cupy = fake_cupy()
    assert open_device("cuda", "float32").stream is open_device("cuda", "bfloat16").stream is cupy.stream


def test_peak_flops(fake_cupy):
    fake_cupy(capability="80")
    assert open_device("cuda", "float32").peak_flops() == pytest.approx(19.5e12, rel=0.01)    # NVIDIA's figure for the A100
    assert open_device("cuda", "tf32").peak_flops() == pytest.approx(156e12, rel=0.01)
    fake_cupy(capability="130")
    assert open_device("cuda", "float32").peak_flops() is None


def test_tf32(fake_cupy):
    fake_cupy()
    assert [open_device("cuda", dtype).products.tf32 for dtype in ("float32", "tf32", "bfloat16")] == [False, True, False]


def test_out_of_memory(fake_cupy):
    fake_cupy(free=2 ** 29)
    device = open_device("cuda:1", "float32")
    with raises(MemoryError, "Fake GPU 1: 8,192 MiB requested, 768 MiB of 16,384 MiB free"):
        device.empty((2 ** 21, 2 ** 10))


# ----------------------------------------------------------------------------------------------------------------------
# Opening a device

@pytest.mark.parametrize("name, dtype, status, message", [
    ("cpu", "tf32", 2, "--dtype tf32 needs a GPU; with --device cpu choose float32 or bfloat16"),
    ("gpu", "float32", 2, "--device gpu: expected cpu, cuda, or cuda:1 for the second GPU"),
    ("cuda:x", "float32", 2, "--device cuda:x: expected cpu, cuda, or cuda:1 for the second GPU"),
    ("cuda:2", "float32", 1, "--device cuda:2: the last GPU here is cuda:1"),
    ("cuda", "tf32", 1, "--dtype tf32 needs a GPU of compute capability 8.0; Fake GPU 0 has 7.5: leave it at float32"),
    ("cuda", "bfloat16", 1, "--dtype bfloat16 needs a GPU of compute capability 8.0; Fake GPU 0 has 7.5: leave it at float32"),
])
def test_no_such_device(fake_cupy, name, dtype, status, message):
    fake_cupy(capability="75")
    with raises(UserError, message) as caught:
        open_device(name, dtype)
    assert caught.value.status == status


def test_a_process_uses_one_gpu(fake_cupy):
    """CuPy allocates and launches on one current GPU: with a second one, arrays of the first would be used on the second."""
    fake_cupy()
    for dtype in ("float32", "tf32"):
        open_device("cuda:1", dtype)
    with raises(ValueError, "cuda:0: this process already uses cuda:1; start one process per GPU"):
        open_device("cuda", "float32")


def test_processes_take_a_gpu_each(fake_cupy):
    cupy, world = fake_cupy(), World()
    world.rank = world.local_rank = 1
    world.size = 2
    with raises(UserError, "--device cuda:1 is one GPU; leave it at cuda: each of 2 processes takes its own"):
        open_device("cuda:1", "float32", world)
    device = open_device("cuda", "float32", world)
    assert device.name == "Fake GPU 1"
    cupy.cuda.nccl = SimpleNamespace(available=False)
    with pytest.raises(UserError, match="^several GPUs need NVIDIA's NCCL: pip install nvidia-nccl-cu12 "):
        device.collectives(world)


def test_cuda_without_a_gpu(fake_cupy):
    fake_cupy(gpus=0)
    with raises(UserError, "--device cuda needs an NVIDIA GPU and its driver (cudaErrorNoDevice: no CUDA-capable device is "
                           "detected); without one choose --device cpu, or train_gpt2.py, which is made for the CPU"):
        open_device("cuda", "float32")


def test_cuda_without_its_compiler(fake_cupy):
    fake_cupy(missing=RuntimeError("CuPy failed to load libnvrtc.so.12: OSError"))
    with raises(UserError, "--device cuda needs CuPy and its CUDA libraries (CuPy failed to load libnvrtc.so.12: OSError): "
                           "pip install -r requirements-gpu.txt, or choose --device cpu"):
        open_device("cuda", "float32")


def test_a_gpu_that_is_full(fake_cupy):
    fake_cupy(busy=RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))
    with raises(UserError, "--device cuda:1: Fake GPU 1 cannot be used (CUBLAS_STATUS_ALLOC_FAILED); free its memory, end the "
                           "process that keeps it to itself, or choose another GPU"):
        open_device("cuda:1", "float32")


def test_cuda_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with raises(UserError, "--device cuda needs CuPy and its CUDA libraries (import of cupy halted; None in sys.modules): "
                           "pip install -r requirements-gpu.txt, or choose --device cpu"):
        open_device("cuda", "float32")


def test_devices_have_the_same_methods():
    def methods(kind):
        return {name for name in dir(kind) if not name.startswith("_")}
    assert methods(CpuDevice) - methods(CudaDevice) == {"Array", "function"}
    assert methods(CudaDevice) - methods(CpuDevice) == {"allocate", "index", "record", "records", "stream", "workspace_bytes"}
