"""Whole training steps and decoding with real CuPy arrays, without a GPU: launches and products are recorded, not run.

A CuPy array over an address that nobody reads needs no driver. Every launch and product of CudaDevice is held against those of
a device whose arrays are NumPy's, at the same addresses.
"""
import ctypes
import math
import re
from collections import Counter

import numpy as np
import pytest

import kernels_gpu
from cuda_on_cpu import CpuDevice
from device import CudaDevice
from generate_gpt2_gpu import Decoder
from gpt2 import CHANNELS_PER_HEAD, Config, Tensors, padded, parameter_shapes
from launcher import Device, parse_signatures
from train_gpt2_gpu import GPT2

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
FIRST_ADDRESS, ALIGNMENT = 2 ** 40, 512     # of arrays, in bytes, as CuPy aligns them
# Name -> signature, and the names of the arrays that are read four numbers at a time.
KERNELS = {name: (kernel, re.search(rf"{name}\(.*?(?:Fours \w+\((.*?)\);|\n}})", source, re.DOTALL)[1] or "")
           for source in kernels_gpu.SOURCES[1:] for name, kernel in parse_signatures(source).items()}
KERNELS = {name: (kernel, re.findall(r"\w+", arrays)) for name, (kernel, arrays) in KERNELS.items()}


class Recorder:
    """What both devices share: arrays at addresses that count up, and the list of calls."""

    def __init__(self):
        Device.__init__(self)
        self.calls, self.next_address = [], FIRST_ADDRESS

    def empty(self, shape, dtype=np.float32):
        shape = shape if isinstance(shape, tuple) else (shape,)
        array = self.array_at(self.next_address, shape, np.dtype(dtype))
        self.next_address += -(-max(1, array.nbytes) // ALIGNMENT) * ALIGNMENT
        return array

    zeros, load = empty, Device.load

    def to_device(self, array):
        return self.empty(array.shape, array.dtype)

    def copy_to_device(self, array, values):
        assert array.shape == values.shape

    def argsort(self, array):
        return self.empty(array.shape, np.int32)

    def to_host(self, array):
        return np.broadcast_to(np.float32(0), array.shape)

    def compile(self, preamble, layer, kernels):
        def recorder(name):
            return lambda grid, block, values, shared_bytes: self.calls.append((name, grid, block, tuple(values), shared_bytes))
        return {kernel.name: recorder(kernel.name) for kernel in kernels}


class NumpyArray(np.ndarray):
    def __setitem__(self, index, value):
        part = self[index]
        part.base_device.calls.append(("set", part.ctypes.data, part.shape, part.strides))

    def __array_finalize__(self, parent):
        self.base_device = getattr(parent, "base_device", None)


class NumpyRecorder(Recorder, CpuDevice):
    def array_at(self, address, shape, dtype):
        memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(address)
        array = np.frombuffer(memory, dtype).reshape(shape).view(NumpyArray)
        array.base_device = self
        return array

    def gemm(self, c, alpha, a, b, beta):
        self.check_product(c, a, b)
        self.calls.append(("gemm", alpha, beta, *(part for array in (a, b, c) for part in matrices(
            array.ctypes.data, array.shape, array.strides))))


def matrices(address, shape, strides):
    """A batch of matrices of float32: address, shape, and strides in numbers. Those along a length of 1 mean nothing."""
    strides = tuple(stride // 4 for stride in strides)
    shape, strides = (1, *shape)[-3:], (0, *strides)[-3:]
    return address, shape, tuple(stride if length > 1 else 0 for length, stride in zip(shape, strides))


class CupyArray(cupy.ndarray):
    def __setitem__(self, index, value):
        part = self[index]
        CudaRecorder.current.calls.append(("set", part.data.ptr, part.shape, part.strides))


class CudaRecorder(Recorder, CudaDevice):
    current = None

    def __init__(self):
        super().__init__()
        CudaRecorder.current = self
        self.cupy, self.Array, self.cublas = cupy, cupy.ndarray, self
        self.handle, self.compute_type, self.CUBLAS_GEMM_DEFAULT = 0, 68, -1
        self.alpha_and_beta = np.empty(2, dtype=np.float32)
        self.alpha_address = self.alpha_and_beta.ctypes.data

    def array_at(self, address, shape, dtype):
        memory = cupy.cuda.UnownedMemory(address, max(1, math.prod(shape) * dtype.itemsize), self, 0)
        return CupyArray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    def gemmEx(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, *way):
        self.gemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0, beta,
                                  C, Ctype, ldc, 0, 1, *way)

    def gemmStridedBatchedEx(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta,
                             C, Ctype, ldc, strideC, batchCount, computeType, algo):
        """cuBLAS multiplies column-major matrices: its product is the transpose of ours."""
        assert (Atype, Btype, Ctype, computeType, algo) == (0, 0, 0, 68, -1)

        def row_major(address, rows, columns, leading, between, transposed=0):
            assert leading >= max(1, rows if transposed else columns)
            strides = (4 * between, 4, 4 * leading) if transposed else (4 * between, 4 * leading, 4)
            return matrices(address, (batchCount, rows, columns), strides)

        a, b = row_major(B, n, k, ldb, strideB, transb), row_major(A, k, m, lda, strideA, transa)
        self.calls.append(("gemm", *self.alpha_and_beta.tolist(), *a, *b, *row_major(C, n, m, ldc, strideC)))


def sizes(depth, heads, context):
    """GPT-2's, with a small vocabulary."""
    return Config(context, 1000, padded(1000), depth, heads, CHANNELS_PER_HEAD * heads)


def train(device, config, B, T, recompute):
    model = GPT2(config, B, T, device, recompute)
    tokens, targets = device.empty((B, T), np.int32), device.empty((B, T), np.int32)
    model.forward(tokens)
    model.backward(targets)
    model.update(1, 1e-3, 0.1, model.gradient_norm(), 1.0)


def decode(device, config, B):
    params = Tensors(parameter_shapes(config), lambda size: np.broadcast_to(np.float32(0), size))
    decoder = Decoder(config, params, B, device)
    decoder.forward(np.zeros((B, 5), np.int32))
    for _ in range(3):
        decoder.logits(decoder.forward(np.zeros((B, 1), np.int32)))


def recorded(work, *arguments):
    """The calls of both devices, which are equal."""
    both = []
    for device in NumpyRecorder(), CudaRecorder():
        work(device, *arguments)
        both.append(device.calls)
    assert len(both[0]) == len(both[1])
    for numpy_call, cuda_call in zip(*both):
        assert_same(numpy_call, cuda_call)
    return both[1]


def assert_same(a, b):
    if a[0] == "gemm":
        assert a[:1] + a[3:] == b[:1] + b[3:] and np.float32(a[1:3]).tolist() == np.float32(b[1:3]).tolist()
    else:
        assert a == b


def unaligned(calls):
    """Which kernels go number by number, because an array does not start at a multiple of 16 bytes, and how often."""
    counts = Counter()
    for name, *_, values, _ in (call for call in calls if call[0] in KERNELS):
        kernel, in_fours = KERNELS[name]
        counts[name] += any(value % 16 for value, parameter in zip(values, kernel.parameters)
                            if parameter.is_array and parameter.name in in_fours)
    return +counts


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("depth, heads, B, T", [(2, 2, 1, 16), (2, 2, 3, 63), (2, 2, 32, 64), (12, 12, 4, 1024),
                                                (12, 12, 5, 33)])
def test_training(depth, heads, B, T, recompute):
    calls = recorded(train, sizes(depth, heads, max(T, 64)), B, T, recompute)
    assert not unaligned(calls)


@pytest.mark.parametrize("depth, heads", [(2, 2), (12, 12)])
@pytest.mark.parametrize("B", [1, 2, 3, 13])
def test_decoding(depth, heads, B):
    calls = recorded(decode, sizes(depth, heads, 64), B)
    assert not unaligned(calls)
