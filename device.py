"""Devices: where arrays live and kernels run. Either a GPU through CuPy, or the CPU, which runs the same CUDA source.

`open_device` opens one by its name. `CudaDevice` below and `CpuDevice` in cuda_on_cpu have the same methods, so kernels_gpu.py
and the programs do not depend on which of the two they run on. How both launch kernels is in launcher.py.
"""
import functools
import itertools
import operator
import re
from collections.abc import Callable

import numpy as np

from cli import UserError
from launcher import Device, DeviceArray, Shape

# FLOPs per multiprocessor and clock cycle, by compute capability: one multiply-add (two FLOPs) in each of its 64 or 128 cores,
# or those of its tensor cores (dense matrices, TF32).
FLOPS_PER_CYCLE = {
    "float32": {"70": 128, "75": 128, "80": 128, "86": 256, "87": 256, "89": 256, "90": 256, "100": 256, "103": 256,
                "120": 256},
    "tf32": {"80": 1024, "86": 256, "89": 256, "90": 2048, "100": 4096, "120": 256},
}
FIRST_WITH_TF32 = 80


def open_device(name: str, dtype: str) -> Device:
    """The device "cuda", "cuda:1" or "cpu", for matrix products in "float32" or "tf32".

    Raises UserError if the device does not exist or does not support the dtype.
    """
    if name == "cpu":
        if dtype != "float32":
            raise UserError(f"--dtype {dtype} needs a GPU; with --device cpu leave it at float32", status=2)
        from cuda_on_cpu import CpuDevice
        return CpuDevice()
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: expected cpu, cuda, or cuda:1 for the second GPU", status=2)
    return CudaDevice(int(match[1] or 0), dtype)


@functools.cache
def layout(shape: tuple, strides: tuple) -> tuple[int, int, int]:
    """How cuBLAS takes float32 matrices: transposed (1) or not (0); the leading dimension; the distance of those in a batch.

    The leading dimension is how many numbers apart rows (or columns) start. The stride of a single row or column means nothing,
    but cuBLAS requires a leading dimension of at least its length. Cached, because products repeat.
    """
    rows, columns = shape[-2:]
    between = strides[0] // 4
    if strides[-1] == 4:
        return 0, max(strides[-2] // 4, columns), between
    return 1, max(strides[-1] // 4, rows), between


class CudaDevice(Device):
    """A GPU. Its arrays are CuPy's; kernels, matrix products and copies run in order on CuPy's current stream.

    Calls are asynchronous: they return before the GPU is done. Only `to_host` and `seconds` wait for it. A process can use one
    GPU only, the one that CuPy allocates and launches on; a second one raises ValueError.
    """
    index = None        # of the GPU that this process uses
    library_bytes = 500_000_000     # cuBLAS and its workspace, compiled kernels, temporary arrays: an estimate

    def __init__(self, index: int, dtype: str):
        super().__init__()
        try:
            import cupy
            import cupyx
            from cupy_backends.cuda.libs import cublas, nvrtc
            nvrtc.getVersion()      # loads the library
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--device cuda needs CuPy and its CUDA libraries ({str(error).splitlines()[0]}): "
                            "pip install -r requirements-gpu.txt, or choose --device cpu") from error
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise UserError(f"--device cuda needs an NVIDIA GPU and its driver ({error}); without one choose --device cpu, "
                            "or train_gpt2.py, which is made for the CPU") from error
        if index >= count:
            raise UserError(f"--device cuda:{index}: the last GPU here is cuda:{count - 1}")
        if CudaDevice.index not in (None, index):
            raise ValueError(f"cuda:{index}: this process already uses cuda:{CudaDevice.index}; start one process per GPU")
        self.cupy, self.cupyx, self.cublas = cupy, cupyx, cublas
        self.Array = cupy.ndarray
        self.device = cupy.cuda.Device(index)
        self.name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        try:
            self.device.use()
            self.handle = cupy.cuda.device.get_cublas_handle()
        except RuntimeError as error:
            raise UserError(f"--device cuda:{index}: {self.name} cannot be used ({str(error).splitlines()[0]}); free its "
                            "memory, end the process that keeps it to itself, or choose another GPU") from error
        self.capability = self.device.compute_capability
        if dtype == "tf32" and int(self.capability) < FIRST_WITH_TF32:
            raise UserError(f"--dtype tf32 needs a GPU of compute capability 8.0; {self.name} has "
                            f"{self.capability[:-1]}.{self.capability[-1]}: leave it at float32")
        self.dtype = dtype
        self.compute_type = cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if dtype == "tf32" else cublas.CUBLAS_COMPUTE_32F
        self.alpha_and_beta = np.empty(2, dtype=np.float32)     # cuBLAS reads them during the call
        self.alpha_address = self.alpha_and_beta.ctypes.data
        CudaDevice.index = index

    def memory(self) -> tuple[int, int]:
        """Free and total memory in bytes."""
        free, total = self.device.mem_info
        return free + self.cupy.get_default_memory_pool().free_bytes(), total

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of matrix products, at the highest clock rate. None for an unknown GPU."""
        per_cycle = FLOPS_PER_CYCLE[self.dtype].get(self.capability)
        attributes = self.device.attributes
        return per_cycle and per_cycle * attributes["MultiProcessorCount"] * attributes["ClockRate"] * 1e3

    # Arrays

    def allocate(self, make, shape, dtype):
        try:
            return make(shape, dtype)
        except MemoryError as error:
            requested = np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64)
            requested, free, total = (f"{nbytes / 2**20:,.0f} MiB" for nbytes in (requested, *self.memory()))
            raise MemoryError(f"{self.name}: {requested} requested, {free} of {total} free") from error

    def zeros(self, shape: Shape, dtype=np.float32) -> DeviceArray:
        return self.allocate(self.cupy.zeros, shape, dtype)

    def empty(self, shape: Shape, dtype=np.float32) -> DeviceArray:
        """An uninitialized array."""
        return self.allocate(self.cupy.empty, shape, dtype)

    def to_device(self, array: np.ndarray) -> DeviceArray:
        """A C-contiguous copy of a NumPy array on the GPU."""
        copy = self.empty(array.shape, array.dtype)
        self.copy_to_device(copy, array)
        return copy

    def copy_to_device(self, array: DeviceArray, values: np.ndarray) -> None:
        """Copy a NumPy array into a GPU array of the same shape and dtype."""
        array.set(np.ascontiguousarray(values))
        # A GPU that reads pageable memory by itself may still be reading the values when `set` returns.
        self.cupy.cuda.get_current_stream().synchronize()

    def to_host(self, array: DeviceArray) -> np.ndarray:
        """A copy of a GPU array as a NumPy array. Waits until everything launched before has run."""
        return array.get()

    def uploader(self, shape: Shape, dtype) -> Callable[[np.ndarray], DeviceArray]:
        """A function that copies a NumPy array to the GPU while kernels run, and returns the GPU array at once.

        Call it for the next batch before launching kernels on this one: they wait for the copy of an array only if they are
        launched after the next call. The array is valid for kernels launched before the call after that. So no kernel waits
        for the copy of a later batch. The copy runs on a second stream, from pinned memory.
        """
        cuda = self.cupy.cuda
        copies, previous_call, previous_copy = cuda.Stream(non_blocking=True), cuda.Event(), None
        buffers = itertools.cycle([(self.cupyx.empty_pinned(shape, dtype), self.empty(shape, dtype), cuda.Event())
                                   for _ in range(3)])
        cuda.get_current_stream().synchronize()     # kernels may still be using this memory for arrays freed before

        def upload(array):
            nonlocal previous_copy
            stream = cuda.get_current_stream()
            pinned, uploaded, copied = next(buffers)
            copied.synchronize()                    # the copy of three calls ago: now the pinned memory may change
            pinned[...] = array
            copies.wait_event(previous_call)        # kernels launched before it may still use the array of three calls ago
            previous_call.record(stream)
            uploaded.set(pinned, stream=copies)
            copied.record(copies)
            if previous_copy:
                stream.wait_event(previous_copy)
            previous_copy = copied
            return uploaded

        return upload

    def argsort(self, array: DeviceArray) -> DeviceArray:
        """The indices that sort a 1-D array, int32. Equal elements keep their order (a stable sort)."""
        return self.cupy.argsort(array, kind="stable").astype(np.int32)

    address = operator.attrgetter("data.ptr")
    contiguous = operator.attrgetter("_c_contiguous")   # flags.c_contiguous, ten times as fast

    def writable(self, array):
        return True

    # Computing

    def compile(self, preamble, layer, kernels):
        module = self.cupy.RawModule(code=preamble + layer, options=("--std=c++17",))
        return {kernel.name: module.get_function(kernel.name).kernel for kernel in kernels}

    def gemm(self, c: DeviceArray, alpha: float, a: DeviceArray, b: DeviceArray, beta: float) -> None:
        """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c. With a beta of 0, c may hold anything, even NaN.

        The arrays are matrices, or batches of them (batch, m, n), with contiguous rows; a and b may be transposed views.
        cuBLAS is column-major: it takes a row-major matrix for its transpose. So it is asked for c.T = b.T @ a.T.
        """
        self.check_product(c, a, b)
        transposed_b, rows_b, next_b = layout(b.shape, b.strides)
        transposed_a, rows_a, next_a = layout(a.shape, a.strides)
        _, rows_c, next_c = layout(c.shape, c.strides)
        self.alpha_and_beta[:] = alpha, beta
        alpha, beta, kind = self.alpha_address, self.alpha_address + 4, self.cupy.cuda.runtime.CUDA_R_32F
        sizes = self.handle, transposed_b, transposed_a, c.shape[-1], c.shape[-2], a.shape[-1]
        algorithm = self.compute_type, self.cublas.CUBLAS_GEMM_DEFAULT
        if c.ndim == 2:
            self.cublas.gemmEx(*sizes, alpha, b.data.ptr, kind, rows_b, a.data.ptr, kind, rows_a,
                               beta, c.data.ptr, kind, rows_c, *algorithm)
        else:
            self.cublas.gemmStridedBatchedEx(*sizes, alpha, b.data.ptr, kind, rows_b, next_b, a.data.ptr, kind, rows_a, next_a,
                                             beta, c.data.ptr, kind, rows_c, next_c, len(c), *algorithm)

    # Timing

    def event(self):
        """The point in time when everything launched so far has run."""
        event = self.cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, start, stop) -> float:
        """The seconds between two events. Waits for the second."""
        stop.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, stop) / 1e3
