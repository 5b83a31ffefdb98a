"""Where arrays live and how kernels are launched: on a GPU through CuPy, or the same CUDA source on the CPU.

Both devices, `CudaDevice` below and `CpuDevice` in dev/cuda_on_cpu, have the same methods: kernels_gpu.py and
train_gpt2_gpu.py do not know on which of the two they run. Every launch goes through `Device.launch`, which holds the
arguments against the declaration in the kernel's own source. A GPU would not: to it an array is an address, and one of the
wrong type or length is read and overwritten in silence.
"""
import functools
import itertools
import math
import operator
import re
from typing import NamedTuple

import numpy as np

from files import UserError

C_TYPES = {name: np.dtype(dtype) for name, dtype in {
    "float": np.float32, "double": np.float64, "int": np.int32, "unsigned": np.uint32, "unsigned int": np.uint32,
    "long long": np.int64, "unsigned long long": np.uint64, "size_t": np.uint64, "unsigned char": np.uint8}.items()}
MAX_GRID = (2 ** 31 - 1, 65535, 65535)      # what every GPU can launch
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024                          # of a block
MAX_SHARED_BYTES = 48 * 1024

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
        from dev.cuda_on_cpu import CpuDevice
        return CpuDevice()
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: expected cpu, cuda, or cuda:1 for the second GPU", status=2)
    return CudaDevice(int(match[1] or 0), dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels as their source declares them

KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\((\d+)\) )?(\w+)\(')
DECLARATION = re.compile(r"(const )?(\w[\w ]*?)\s*(\*?)\s*(?:__restrict__ )?(\w+)")
SHAPE = re.compile(r"\(([\w ,*+-]+)\)( or empty)?")


class Parameter(NamedTuple):
    """A number, or an array with its shape in the comment behind it: `float* out,  // (N, 3*C) or empty`."""
    name: str
    dtype: np.dtype
    is_array: bool
    is_const: bool
    shape: str = ""             # "N, 3*C", in terms of the kernel's integer parameters
    or_empty: bool = False      # may have size 0 instead, and then is passed as a null pointer


def parse_signatures(source):
    """The kernels that a CUDA source declares: {name: Kernel}. Raises ValueError for one whose arguments it could not check."""
    kernels = {}
    for match in KERNEL.finditer(source):
        max_threads, name = match.groups()
        parameters = []
        for line in source[match.end():].split("\n"):
            code, _, comment = line.partition("//")
            code, closed, _ = code.partition(")")
            declarations = [declaration.strip() for declaration in code.split(",") if declaration.strip()]
            shape = SHAPE.match(comment.strip())
            for declaration in declarations:
                parts = DECLARATION.fullmatch(declaration)
                if not parts or parts[2] not in C_TYPES:
                    raise ValueError(f"{name}: unknown type in {declaration!r}, expected one of {', '.join(C_TYPES)}")
                const, c_type, star, parameter = parts.groups()
                if star and (not shape or len(declarations) > 1):
                    raise ValueError(f"{name}: expected {parameter} on a line of its own with its shape behind it: // (N, C)")
                parameters.append(Parameter(parameter, C_TYPES[c_type], bool(star), bool(const),
                                            *((shape[1], bool(shape[2])) if star else ())))
            if closed:
                break
        kernels[name] = Kernel(name, parameters, int(max_threads or MAX_THREADS))
    if len(kernels) != len(re.findall(r"^[^/\n]*__global__", source, re.MULTILINE)):
        raise ValueError(f'a kernel beside {", ".join(kernels) or "none"} is not declared as: extern "C" __global__ void name(')
    return kernels


class Kernel:
    """A kernel as its source declares it, and the check of a launch's arguments."""

    def __init__(self, name, parameters, max_threads):
        self.name = name
        self.parameters = parameters
        self.max_threads = max_threads
        self.arrays = [(i, p) for i, p in enumerate(parameters) if p.is_array]
        self.floats = [(i, p) for i, p in enumerate(parameters) if not p.is_array and p.dtype.kind == "f"]
        self.integers = [(i, p, np.iinfo(p.dtype).min, np.iinfo(p.dtype).max)
                         for i, p in enumerate(parameters) if not p.is_array and p.dtype.kind in "iu"]
        names = [p.name for _, p, _, _ in self.integers]
        for _, p in self.arrays:
            for unknown in set(re.findall(r"[a-zA-Z_]\w*", p.shape)).difference(names):
                raise ValueError(f"{name}: the shape ({p.shape}) of {p.name} names {unknown}, which is no integer parameter")
        # Compiled once, a function from the integer arguments to the sizes of the arrays, and one to their shapes.
        sizes = "".join("*".join(f"({length})" for length in p.shape.split(",")) + ", " for _, p in self.arrays)
        shapes = "".join(f"({p.shape},), " for _, p in self.arrays)
        self.sizes = eval(f"lambda {', '.join(names)}: ({sizes})")
        self.shapes = eval(f"lambda {', '.join(names)}: ({shapes})")

    def check(self, args, device):
        """The arguments as a kernel takes them: an address for each array, a NumPy scalar of the declared type for each number.

        A training step spends a few microseconds here on each of its hundreds of launches. Raises TypeError or ValueError.
        """
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(args)} arguments, expected {len(self.parameters)}: "
                            f"{', '.join(p.name for p in self.parameters)}")
        values = list(args)
        integers = []
        for i, p, lowest, highest in self.integers:
            try:
                integer = operator.index(args[i])
            except TypeError:
                raise TypeError(f"{self.name}: {p.name} is {describe(args[i])}, expected an integer") from None
            if not lowest <= integer <= highest:
                raise ValueError(f"{self.name}: {p.name} is {integer}, expected {lowest} to {highest}: it is declared {p.dtype}")
            integers.append(integer)
            values[i] = p.dtype.type(integer)
        for i, p in self.floats:
            if not isinstance(args[i], (float, int, np.floating, np.integer)):
                raise TypeError(f"{self.name}: {p.name} is {describe(args[i])}, expected a number")
            values[i] = p.dtype.type(args[i])
        for n, ((i, p), size) in enumerate(zip(self.arrays, self.sizes(*integers))):
            array = args[i]
            if not isinstance(array, device.Array) or array.dtype != p.dtype:
                raise TypeError(f"{self.name}: {p.name} is {describe(array)}, expected {type_name(device.Array)} of {p.dtype}")
            if array.size != size and not (p.or_empty and array.size == 0):
                expected = str(self.shapes(*integers)[n]) + " or empty" * p.or_empty
                raise ValueError(f"{self.name}: {p.name} has shape {array.shape}, expected ({p.shape}) = {expected}")
            if not device.contiguous(array):
                raise ValueError(f"{self.name}: {p.name} has strides {array.strides} for shape {array.shape}, expected it to be "
                                 "C-contiguous")
            if not p.is_const and not device.writable(array):
                raise ValueError(f"{self.name}: {p.name} is read-only, expected one to write to")
            values[i] = device.address(array) if array.size else 0
        return values


def type_name(kind):
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def describe(value):
    """What an argument is: "numpy.ndarray of float64", "str 'abc'"."""
    return f"{type_name(type(value))} " + (f"of {value.dtype}" if hasattr(value, "shape") else repr(value))


# ----------------------------------------------------------------------------------------------------------------------
# Devices

class Device:
    """What both devices share: kernels known by name, launched with arguments that were checked.

    A device adds the type of its arrays, `Array`, a method `compile`, and what can be asked of an array: `address`,
    `contiguous` and `writable`.
    """

    def __init__(self):
        self.kernels = {}       # name -> Kernel
        self.layers = {}        # name -> the two sources that it is compiled from
        self.functions = {}     # name -> function of (grid, block, values, shared_bytes), once compiled

    def load(self, sources):
        """Make known the kernels of these CUDA sources. The first source stands in front of each of the others.

        Each of the others is compiled once one of its kernels is launched. Raises ValueError for a declaration that launches
        could not be checked against.
        """
        preamble, *layers = sources
        for layer in layers:
            if (preamble, layer) not in self.layers.values():
                for name, kernel in parse_signatures(layer).items():
                    self.kernels[name], self.layers[name] = kernel, (preamble, layer)
                    self.functions.pop(name, None)

    def launch(self, kernel_name, grid, block, *args, shared_bytes=0):
        """Start a kernel on `grid` blocks of `block` threads, each a number or a tuple of up to three.

        Raises TypeError or ValueError, before anything runs, if the arguments are not those that its source declares.
        """
        kernel = self.kernels.get(kernel_name)
        if kernel is None:
            raise ValueError(f"{kernel_name}: no such kernel, expected one of {', '.join(self.kernels)}")
        values = kernel.check(args, self)
        grid, block = launch_shape(kernel_name, kernel.max_threads, grid, block, shared_bytes)
        if kernel_name not in self.functions:
            preamble, layer = self.layers[kernel_name]
            names = [name for name, sources in self.layers.items() if sources == (preamble, layer)]
            self.functions.update(self.compile(preamble, layer, [self.kernels[name] for name in names]))
        self.functions[kernel_name](grid, block, values, shared_bytes)

    def check_product(self, c, a, b):
        """Raise TypeError or ValueError unless c = a @ b is a product that `gemm` can do."""
        for name, array in (("c", c), ("a", a), ("b", b)):
            if not isinstance(array, self.Array) or array.dtype != np.float32:
                raise TypeError(f"gemm: {name} is {describe(array)}, expected {type_name(self.Array)} of float32")
            if not (array.ndim == c.ndim and array.ndim in (2, 3)
                    and (has_whole_rows(array) or array is not c and has_whole_rows(array.swapaxes(-1, -2)))):
                raise ValueError(f"gemm: {name} has shape {array.shape} and strides {array.strides}, expected a matrix, or a "
                                 f"batch of them, with contiguous rows{'' if array is c else ' or columns'}")
        if not (c.shape[-2:] == (a.shape[-2], b.shape[-1]) and a.shape[-1] == b.shape[-2]
                and c.shape[:-2] == a.shape[:-2] == b.shape[:-2]):
            raise ValueError(f"gemm: c {c.shape}, a {a.shape} and b {b.shape} do not fit together")


def has_whole_rows(matrices):
    """Whether the rows are contiguous and do not overlap."""
    return matrices.strides[-1] == 4 and (matrices.shape[-2] == 1 or matrices.strides[-2] >= 4 * matrices.shape[-1])


def layout(matrices):
    """Whether these are transposes, and how many numbers apart the rows lie, or the columns of a transpose.

    Of a single row or column that distance means nothing, but cuBLAS wants it to be no less than its length.
    """
    rows, columns = matrices.shape[-2:]
    if matrices.strides[-1] == 4:
        return False, max(matrices.strides[-2] // 4, columns)
    return True, max(matrices.strides[-1] // 4, rows)


@functools.lru_cache(maxsize=None)
def launch_shape(name, max_threads, grid, block, shared_bytes):
    """grid and block as tuples of three, if every GPU can launch them; else ValueError. Launches repeat, so it is remembered."""
    grid, block = ((*((size,) if isinstance(size, (int, np.integer)) else size), 1, 1)[:3] for size in (grid, block))
    if not all(0 < blocks <= most for blocks, most in zip(grid, MAX_GRID)):
        raise ValueError(f"{name}: a grid of {grid} blocks, expected at least 1 and at most {MAX_GRID}")
    if not (all(0 < threads <= most for threads, most in zip(block, MAX_BLOCK)) and math.prod(block) <= max_threads):
        raise ValueError(f"{name}: a block of {block} threads, expected at least 1, at most {MAX_BLOCK} and {max_threads} in all")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"{name}: {shared_bytes} bytes of shared memory, expected 0 to {MAX_SHARED_BYTES}")
    return grid, block


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
