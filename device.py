"""Devices: where arrays live and kernels run. Either a GPU through CuPy, or the CPU, which runs the same CUDA source.

`open_device` opens one by its name. `CudaDevice` below and `CpuDevice` in cuda_on_cpu have the same methods, so kernels_gpu.py
and the programs do not depend on which of the two they run on. How both launch kernels is in launcher.py.
"""
import itertools
import operator
import re
from collections.abc import Callable
from contextlib import suppress

import numpy as np

import cublaslt
from cli import UserError, note
from distributed import SINGLE_PROCESS, Nccl, World
from launcher import FLOATS, Device, DeviceArray, Shape

# FLOPs per multiprocessor and clock cycle, by compute capability: one multiply-add (two FLOPs) in each of its 64 or 128 cores,
# or those of its tensor cores (dense matrices, TF32 or bf16).
FLOPS_PER_CYCLE = {
    "float32": {"70": 128, "75": 128, "80": 128, "86": 256, "87": 256, "89": 256, "90": 256, "100": 256, "103": 256,
                "120": 256},
    "tf32": {"80": 1024, "86": 256, "89": 256, "90": 2048, "100": 4096, "120": 256},
    "bfloat16": {"80": 2048, "86": 512, "89": 512, "90": 4096, "100": 8192, "120": 512},
}
FIRST_WITH_TENSOR_CORES = 80    # for tf32 and bfloat16


def open_device(name: str, dtype: str, world: World = SINGLE_PROCESS) -> Device:
    """The device "cuda", "cuda:1" or "cpu", with the dtype "float32", "tf32" or "bfloat16", see Device.

    With several processes in the world, "cuda" is a GPU of its own for each process of a machine.

    Raises UserError if the device does not exist or does not support the dtype.
    """
    if name == "cpu":
        if dtype == "tf32":
            raise UserError("--dtype tf32 needs a GPU; with --device cpu choose float32 or bfloat16", status=2)
        from cuda_on_cpu import CpuDevice
        return CpuDevice(dtype)
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: expected cpu, cuda, or cuda:1 for the second GPU", status=2)
    if match[1] and world.size > 1:
        raise UserError(f"--device {name} is one GPU; leave it at cuda: each of {world.size} processes takes its own", status=2)
    return CudaDevice(int(match[1] or world.local_rank), dtype)


class CudaDevice(Device):
    """A GPU. Its arrays are CuPy's; kernels, matrix products and copies run in order on CuPy's current stream.

    Calls are asynchronous: they return before the GPU is done. `to_host`, `to_device`, `copy_to_device` and `seconds` wait;
    `uploader` copies without waiting. A process can use one GPU only, the one that CuPy allocates and launches on; a second one
    raises ValueError.
    """
    index = stream = None       # of the GPU that this process uses, and where all is launched
    records = True              # whether CUDA records graphs, as far as is known
    library_bytes = 500_000_000     # cuBLASLt and its workspace, compiled kernels, temporary arrays: an estimate
    workspace_bytes = 32 * 2**20    # of cuBLAS, as NVIDIA advises for an H100

    def __init__(self, index: int, dtype: str):
        super().__init__(dtype)
        try:
            import cupy
            import cupyx
            from cupy_backends.cuda.libs import nvrtc
            nvrtc.getVersion()          # loads the library
            library = cublaslt.open_library()
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
        self.cupy, self.cupyx = cupy, cupyx
        self.Array = cupy.ndarray
        self.device = cupy.cuda.Device(index)
        self.name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        try:
            self.device.use()
            # CUDA records no graph of the default stream. One for all: what one device launches comes after what another did.
            CudaDevice.stream = CudaDevice.stream or cupy.cuda.Stream(non_blocking=True)
            self.stream.use()
            self.workspace = cupy.empty(self.workspace_bytes, np.uint8)
            self.products = cublaslt.CublasLt(library, self.workspace.data.ptr, self.workspace_bytes, tf32=dtype == "tf32")
        except RuntimeError as error:
            raise UserError(f"--device cuda:{index}: {self.name} cannot be used ({str(error).splitlines()[0]}); free its "
                            "memory, end the process that keeps it to itself, or choose another GPU") from error
        self.capability = self.device.compute_capability
        if dtype != "float32" and int(self.capability) < FIRST_WITH_TENSOR_CORES:
            raise UserError(f"--dtype {dtype} needs a GPU of compute capability 8.0; {self.name} has "
                            f"{self.capability[:-1]}.{self.capability[-1]}: leave it at float32")
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

        In every step, upload the next batch, then launch kernels on this one. Kernels launched after call n + 1 wait for the
        copy of call n, and none waits for a later copy. An array is valid for kernels launched before call n + 2. The copy
        runs on a second stream, from pinned memory.
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

    address = operator.attrgetter("data.ptr")
    contiguous = operator.attrgetter("_c_contiguous")   # flags.c_contiguous, ten times as fast

    def writable(self, array):
        return True

    # Computing

    def replay(self, graphs: dict, key, work: Callable[[], None]) -> None:
        """Call work, or from the second time on launch the CUDA graph of its launches: for the host, all are one launch.

        The first call is an ordinary one: it compiles kernels, and temporary arrays find their memory. If CUDA cannot record
        the work, all calls are.
        """
        if key in graphs:
            graphs[key] = graphs[key] or self.record(work)
            graphs[key]()
        else:
            work()
            graphs[key] = None

    def record(self, work):
        """A function that launches the CUDA graph of work, or work itself if there can be none."""
        if not self.records:
            return work
        stream = self.cupy.cuda.get_current_stream()
        try:
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):
                    stream.end_capture()
                raise
            return stream.end_capture().launch
        except RuntimeError as error:       # of CUDA, CuPy or cuBLASLt
            self.records = False
            note(f"no CUDA graphs on {self.name}: {str(error).splitlines()[0]}")
            return work

    def compile(self, preamble, layer, kernels):
        module = self.cupy.RawModule(code=preamble + layer, options=("--std=c++17", f"-DFloat={FLOATS[self.dtype]}"))
        return {kernel.name: module.get_function(kernel.name).kernel for kernel in kernels}

    def gemm(self, c: DeviceArray, alpha: float, a: DeviceArray, b: DeviceArray, beta: float,
             bias: DeviceArray | None = None) -> None:
        """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c + bias (n). With a beta of 0, c may hold anything, even NaN.

        The arrays are matrices, or batches of them (batch, m, n), with contiguous rows; a and b may be transposed views. They
        are float32 or bf16, a and b the same; c may be float32 either way; the bias is as c, or empty: none. Sums are in
        float32. Raises TypeError or ValueError for other arrays, and RuntimeError if cuBLASLt cannot multiply these.
        """
        problem = self.check_product(c, a, b, bias)
        self.products.matmul(problem, c.data.ptr, alpha, a.data.ptr, b.data.ptr, beta,
                             bias.data.ptr if bias is not None and bias.size else 0, self.cupy.cuda.get_current_stream().ptr)

    def collectives(self, world: World) -> Nccl:
        """What adds and gathers arrays on the GPUs of several processes. Raises UserError if NCCL is missing."""
        from cupy.cuda import nccl      # not a part of cupy until it is imported
        if not nccl.available:
            raise UserError("several GPUs need NVIDIA's NCCL: pip install nvidia-nccl-cu12 (with CUDA 13: nvidia-nccl-cu13)")
        return Nccl(nccl, world, lambda: self.cupy.cuda.get_current_stream().ptr)

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
