"""Where arrays live and kernels run: on a GPU through CuPy, or on the CPU, which runs the same CUDA source.

Both devices, `CudaDevice` below and `CpuDevice` in cuda_on_cpu, have the same methods, so kernels_gpu.py and
train_gpt2_gpu.py do not know which of the two they run on.
"""
import itertools
import operator
import re

import numpy as np

from cli import UserError
from launcher import Device

# Floating-point operations that a multiprocessor does per clock cycle, by compute capability: a multiplication and an
# addition in each of its 64 or 128 cores, or in its tensor cores (dense matrices, TF32).
FLOPS_PER_CYCLE = {
    "float32": {"70": 128, "75": 128, "80": 128, "86": 256, "87": 256, "89": 256, "90": 256, "100": 256, "103": 256, "120": 256},
    "tf32": {"80": 1024, "86": 256, "89": 256, "90": 2048, "100": 4096, "120": 256},
}
FIRST_WITH_TF32 = 80


def open_device(name, dtype):
    """The device "cuda", "cuda:1" or "cpu", for matrix products in "float32" or "tf32".

    Raises UserError if there is no such device, or if it cannot compute in that type.
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


def layout(matrices):
    """Whether these are transposes, and how many numbers apart the rows lie, or the columns of a transpose.

    Of a single row or column that distance means nothing, but cuBLAS wants it to be no less than its length.
    """
    rows, columns = matrices.shape[-2:]
    if matrices.strides[-1] == 4:
        return False, max(matrices.strides[-2] // 4, columns)
    return True, max(matrices.strides[-1] // 4, rows)


class CudaDevice(Device):
    """A GPU, its arrays being CuPy's. Kernels, matrix products and copies run in order on CuPy's current stream.

    Calls return before the GPU is done, but for `to_host` and `seconds`, which wait for it.
    """

    def __init__(self, index, dtype):
        super().__init__()
        try:
            import cupy
            import cupyx
            from cupy_backends.cuda.libs import cublas
        except ImportError as error:
            raise UserError(f"--device cuda needs CuPy and its CUDA libraries ({str(error).splitlines()[0]}): "
                            "pip install -r requirements-gpu.txt, or choose --device cpu") from error
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise UserError(f"--device cuda needs an NVIDIA GPU and its driver ({error}); without one choose --device cpu, "
                            "or train_gpt2.py, which is made for the CPU") from error
        if index >= count:
            raise UserError(f"--device cuda:{index}: the last GPU here is cuda:{count - 1}")
        self.cupy, self.cupyx, self.cublas = cupy, cupyx, cublas
        self.Array = cupy.ndarray
        self.device = cupy.cuda.Device(index).use()
        self.name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        self.capability = self.device.compute_capability
        if dtype == "tf32" and int(self.capability) < FIRST_WITH_TF32:
            raise UserError(f"--dtype tf32 needs a GPU of compute capability 8.0; {self.name} has "
                            f"{self.capability[:-1]}.{self.capability[-1]}: leave it at float32")
        self.dtype = dtype
        self.compute_type = cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if dtype == "tf32" else cublas.CUBLAS_COMPUTE_32F
        self.handle = cupy.cuda.device.get_cublas_handle()
        self.alpha_and_beta = np.empty(2, dtype=np.float32)     # cuBLAS reads them during the call
        self.alpha_address = self.alpha_and_beta.ctypes.data

    def memory(self):
        """Bytes free, and in all."""
        free, total = self.device.mem_info
        return free + self.cupy.get_default_memory_pool().free_bytes(), total

    def peak_flops(self):
        """Floating-point operations a second of matrix products at the highest clock rate. None for a GPU unknown here."""
        per_cycle = FLOPS_PER_CYCLE[self.dtype].get(self.capability)
        attributes = self.device.attributes
        return per_cycle and per_cycle * attributes["MultiProcessorCount"] * attributes["ClockRate"] * 1e3

    # Arrays

    def allocate(self, make, shape, dtype):
        try:
            return make(shape, dtype)
        except MemoryError as error:
            asked = np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64)
            asked, free, total = (f"{nbytes / 2**20:,.0f} MiB" for nbytes in (asked, *self.memory()))
            raise MemoryError(f"{self.name}: {asked} asked for, {free} of {total} free") from error

    def zeros(self, shape, dtype=np.float32):
        return self.allocate(self.cupy.zeros, shape, dtype)

    def empty(self, shape, dtype=np.float32):
        return self.allocate(self.cupy.empty, shape, dtype)

    def to_device(self, array):
        """A copy of a NumPy array on the GPU, C-contiguous."""
        copy = self.empty(array.shape, array.dtype)
        self.fill(copy, array)
        return copy

    def fill(self, array, values):
        """Copy a NumPy array of the same shape and dtype into a GPU array."""
        array.set(np.ascontiguousarray(values))

    def to_host(self, array):
        """A copy of a GPU array as NumPy array, once everything launched before has run."""
        return array.get()

    def uploader(self, shape, dtype):
        """A function that copies a NumPy array to the GPU while kernels run, and returns the GPU array at once.

        Kernels launched from then on find the copy complete. It is good for those launched before the next call but one.
        It is made by a second stream, from page-locked memory: the only memory that a GPU can read by itself.
        """
        cuda = self.cupy.cuda
        copies, previous_call = cuda.Stream(non_blocking=True), cuda.Event()
        buffers = itertools.cycle([(self.cupyx.empty_pinned(shape, dtype), self.empty(shape, dtype), cuda.Event())
                                   for _ in range(3)])
        cuda.get_current_stream().synchronize()     # whoever had this memory before is done with it

        def upload(array):
            stream = cuda.get_current_stream()
            pinned, uploaded, copied = next(buffers)
            copied.synchronize()                    # three calls ago; now the page-locked memory may change
            pinned[...] = array
            copies.wait_event(previous_call)        # what was launched before it may still use the array of three calls ago
            previous_call.record(stream)
            uploaded.set(pinned, stream=copies)
            copied.record(copies)
            stream.wait_event(copied)
            return uploaded

        return upload

    def argsort(self, array):
        """The places of a 1-D array's elements in ascending order, int32. Equal elements keep their order."""
        return self.cupy.argsort(array, kind="stable").astype(np.int32)

    address = operator.attrgetter("data.ptr")
    contiguous = operator.attrgetter("_c_contiguous")   # what flags.c_contiguous reads, in a tenth of the time

    def writable(self, array):
        return True

    # Computing

    def compile(self, preamble, layer, kernels):
        module = self.cupy.RawModule(code=preamble + layer, options=("--std=c++17",))
        return {kernel.name: module.get_function(kernel.name).kernel for kernel in kernels}

    def gemm(self, c, alpha, a, b, beta):
        """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c.

        The arrays are matrices, or batches of them (batch, m, n), with contiguous rows; a and b may be transposes of such.
        cuBLAS counts columns first: to it, they are their own transposes, and c.T = b.T @ a.T is what it is asked for. With a
        beta of 0, what c holds does not matter, be it NaN.
        """
        self.check_product(c, a, b)
        cublas = self.cublas
        operations = cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T
        (b_transposed, b_stride), (a_transposed, a_stride), (_, c_stride) = map(layout, (b, a, c))
        self.alpha_and_beta[:] = alpha, beta
        call = [self.handle, operations[b_transposed], operations[a_transposed], c.shape[-1], c.shape[-2], a.shape[-1]]
        for array, stride, scalars in ((b, b_stride, [self.alpha_address]), (a, a_stride, []),
                                       (c, c_stride, [self.alpha_address + 4])):
            call += scalars
            call += array.data.ptr, self.cupy.cuda.runtime.CUDA_R_32F, stride
            if c.ndim == 3:
                call.append(array.strides[0] // 4)
        if c.ndim == 3:
            cublas.gemmStridedBatchedEx(*call, len(c), self.compute_type, cublas.CUBLAS_GEMM_DEFAULT)
        else:
            cublas.gemmEx(*call, self.compute_type, cublas.CUBLAS_GEMM_DEFAULT)

    # Timing

    def event(self):
        """A point in time: when everything launched so far has run."""
        event = self.cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, start, stop):
        """The seconds between two events, once the second has come."""
        stop.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, stop) / 1e3
