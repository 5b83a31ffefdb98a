"""Whole training steps and decoding with real CuPy arrays, without a GPU: launches and products are recorded, not run.

A CuPy array over an address that nobody reads needs no driver. Every launch and product of CudaDevice is held against those of
a device whose arrays are NumPy's, at the same addresses.
"""
import ctypes
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import cublaslt
import kernels_gpu
from cuda_on_cpu import CpuDevice
from device import CudaDevice
from generate_gpt2_gpu import Decoder
from gpt2 import CHANNELS_PER_HEAD, Config, Tensors, padded, parameter_shapes
from launcher import Device, parse_signatures
from test_cublaslt import StandIn
from train_gpt2_gpu import GPT2

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
DTYPES = "float32", "bfloat16"
FIRST_ADDRESS, ALIGNMENT = 2 ** 40, 512     # of arrays, in bytes, as CuPy aligns them
STREAM = 7
# Name -> the names of the arrays that are read in Parts.
IN_PARTS = {name: re.findall(r"\w+", (re.search(rf"{name}\(.*?(?:Parts \w+\((.*?)\);|\n}})", source, re.DOTALL)[1] or ""))
            for source in kernels_gpu.SOURCES[1:] for name in parse_signatures(source)}


class Recorder:
    """What both devices share: arrays at addresses that count up, and the list of calls."""

    def __init__(self, dtype):
        Device.__init__(self, dtype)
        self.calls, self.next_address = [], FIRST_ADDRESS

    def empty(self, shape, dtype=np.float32):
        shape = shape if isinstance(shape, tuple) else (shape,)
        array = self.array_at(self.next_address, shape, np.dtype(dtype))
        self.next_address += -(-max(1, array.nbytes) // ALIGNMENT) * ALIGNMENT
        return array

    zeros, load, temporary, replay = empty, Device.load, Device.temporary, Device.replay

    def to_device(self, array):
        return self.empty(array.shape, array.dtype)

    def copy_to_device(self, array, values):
        assert array.shape == values.shape

    def to_host(self, array):
        return np.broadcast_to(np.float32(0), array.shape)

    def compile(self, preamble, layer, kernels):
        def recorder(name):
            return lambda grid, block, values, shared_bytes: self.calls.append((name, grid, block, tuple(values), shared_bytes))
        return {kernel.name: recorder(kernel.name) for kernel in kernels}


class NumpyArray(np.ndarray):
    def fill(self, value):
        self[...] = value

    def copy(self):
        return self

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

    def gemm(self, c, alpha, a, b, beta, bias=None):
        self.check_product(c, a, b, bias)
        self.calls.append(("gemm", alpha, beta, bias.ctypes.data if bias is not None and bias.size else 0, *(
            part for array in (a, b, c) for part in matrices(array.ctypes.data, array.shape, array.strides, array.itemsize))))


def matrices(address, shape, strides, itemsize):
    """A batch of matrices: address, size of a number, shape, and strides. Those along a length of 1 mean nothing."""
    shape, strides = (1, *shape)[-3:], (0, *strides)[-3:]
    return address, itemsize, shape, tuple(stride if length > 1 else 0 for length, stride in zip(shape, strides))


class CupyArray(cupy.ndarray):
    def fill(self, value):
        self[...] = value

    def copy(self):
        return self

    def __setitem__(self, index, value):
        part = self[index]
        CudaRecorder.current.calls.append(("set", part.data.ptr, part.shape, part.strides))


class Products(StandIn):
    """cuBLASLt, with its own descriptors, that records products as the row-major matrices that they are to us."""

    def Matmul(self, kind, handle, product, alpha, a, layout_a, b, layout_b, beta, c, layout_c, d, layout_d, algorithm, *where):
        assert where == (CudaRecorder.current.workspace, CudaDevice.workspace_bytes, STREAM)
        product = self.read("MatmulDesc", product)

        def row_major(address, layout, transposed=False):
            layout = self.read("MatrixLayout", layout)
            shape = layout.BATCH_COUNT, layout.COLS, layout.ROWS
            itemsize = {0: 4, 14: 2}[layout.TYPE]
            strides = itemsize * layout.STRIDED_BATCH_OFFSET, itemsize * layout.LD, itemsize
            if transposed:
                shape, strides = (shape[0], shape[2], shape[1]), (strides[0], strides[2], strides[1])
            return matrices(address, shape, strides, itemsize)

        alpha, beta = (ctypes.c_float.from_address(address).value for address in (alpha, beta))
        CudaRecorder.current.calls.append(("gemm", alpha, beta, product.BIAS_POINTER, *row_major(b, layout_b, product.TRANSB),
                                           *row_major(a, layout_a, product.TRANSA), *row_major(d, layout_d)))
        return 0


class CudaRecorder(Recorder, CudaDevice):
    current = None

    def __init__(self, dtype):
        super().__init__(dtype)
        CudaRecorder.current, self.Array, self.workspace = self, cupy.ndarray, 2 ** 39
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=STREAM)))
        self.products = cublaslt.CublasLt(Products(), self.workspace, self.workspace_bytes, tf32=False)

    def array_at(self, address, shape, dtype):
        memory = cupy.cuda.UnownedMemory(address, max(1, math.prod(shape) * dtype.itemsize), self, 0)
        return CupyArray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def sizes(depth, heads, context):
    """GPT-2's, with a small vocabulary."""
    return Config(context, 1000, padded(1000), depth, heads, CHANNELS_PER_HEAD * heads)


def train(device, config, B, T, recompute):
    """A step; then another one, which makes the same calls, addresses included. Calls of the first one are removed."""
    model = GPT2(config, B, T, device, recompute)
    tokens, targets = device.empty((B, T), np.int32), device.empty((B, T), np.int32)
    steps = []
    for _ in range(2):
        model.forward(tokens)
        model.backward(targets)
        model.update(1, 1e-3, 0.1, model.gradient_norm(), 1.0)
        steps.append(device.calls[:])
        device.calls.clear()
    assert steps[0] == steps[1]
    device.calls += steps[1]


def decode(device, config, B):
    params = Tensors(parameter_shapes(config), lambda size: np.broadcast_to(np.float32(0), size))
    decoder = Decoder(config, params, B, device)
    decoder.forward(np.zeros((B, 5), np.int32))
    steps = []
    for _ in range(3):      # each makes the same calls, addresses included: what a CUDA graph needs
        calls = len(device.calls)
        rows = decoder.forward(np.zeros((B, 1), np.int32))
        steps.append(device.calls[calls:])
        decoder.logits(rows)
    assert steps[0] == steps[1] == steps[2]


def recorded(work, dtype, *arguments):
    """The calls of both devices, which are equal, and the Cuda device."""
    both = []
    for device in NumpyRecorder(dtype), CudaRecorder(dtype):
        work(device, *arguments)
        both.append(device.calls)
    assert len(both[0]) == len(both[1])
    for numpy_call, cuda_call in zip(*both):
        assert_same(numpy_call, cuda_call)
    return both[1], device


def assert_same(a, b):
    if a[0] == "gemm":
        assert a[:1] + a[3:] == b[:1] + b[3:] and np.float32(a[1:3]).tolist() == np.float32(b[1:3]).tolist()
    else:
        assert a == b


def unaligned(calls, device):
    """Which kernels go number by number, because an array does not start at a multiple of 16 bytes, and how often."""
    counts = Counter()
    for name, *_, values, _ in (call for call in calls if call[0] in IN_PARTS):
        counts[name] += any(value % 16 for value, parameter in zip(values, device.kernels[name].parameters)
                            if parameter.is_array and parameter.name in IN_PARTS[name])
    return +counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("depth, heads, B, T", [(2, 2, 1, 16), (2, 2, 3, 63), (2, 2, 32, 64), (12, 12, 4, 1024),
                                                (12, 12, 5, 33)])
def test_training(dtype, depth, heads, B, T, recompute):
    assert not unaligned(*recorded(train, dtype, sizes(depth, heads, max(T, 64)), B, T, recompute))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth, heads", [(2, 2), (12, 12)])
@pytest.mark.parametrize("B", [1, 2, 3, 13])
def test_decoding(dtype, depth, heads, B):
    assert not unaligned(*recorded(decode, dtype, sizes(depth, heads, 64), B))
