"""A device that runs CUDA kernels on the CPU, compiled by g++ from the same source that a GPU gets. See README.md."""
import contextlib
import ctypes
import functools
import hashlib
import operator
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cli import UserError
from files import atomic_file, cache_folder, delete_unused
from launcher import FLOATS, Device, DeviceArray, Shape
from machine import main_memory

FOLDER = Path(__file__).resolve().parent
COMPILER = "g++"
# As in CUDA, a product may be fused into a sum, sums are not reordered, and floats may be read as structs of floats.
FLAGS = ["-std=c++17", "-g", "-march=native", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC", "-shared"]
FAST = ["-O2"]
SANITIZE = ["-O0", "-fsanitize=address,signed-integer-overflow,integer-divide-by-zero,shift,bounds,alignment,null"]
SHARED = re.compile(r"(extern )?__shared__ (__align__\(\d+\) )?(\w[\w ]*) (\w+(?:\[[^]]*\])*(?:, *\w+(?:\[[^]]*\])*)*);")
ALIGNMENT = 16      # bytes, as a float4 requires; a guarded copy of an array is misaligned exactly as the array is
MARGIN = 2 ** 20    # out-of-bounds bytes before and after an array, when sanitizing
UNSET = 0xFF        # floats made of such bytes are NaN, integers -1
ERROR_LINES = 10    # of the compiler's output, shown at most


class KernelError(RuntimeError):
    """A kernel does not compile, or does something that CUDA forbids. The message names the kernel and the line."""


class CpuDevice(Device):
    """The CPU as a CUDA device. Its arrays are NumPy's; calls are synchronous: a kernel has run when its launch returns.

    reverse: run the threads of a block from the last to the first, which can reveal a missing barrier.
    sanitize: check the bounds of every memory access, and every integer operation for overflow.

    The methods are those of device.CudaDevice.
    """
    Array = np.ndarray

    def __init__(self, dtype: str = "float32", reverse: bool = False, sanitize: bool = False):
        super().__init__(dtype)
        if sys.platform == "win32":
            raise UserError("--device cpu needs Linux or macOS; on Windows, run it in WSL")
        machine()   # raises UserError now, not in the middle of a run, if there is no compiler
        self.name = "CPU (CUDA compiled by g++)"
        self.reverse = reverse
        self.sanitize = sanitize
        self.places = {}    # source -> the line at which it starts in a Python file, and the file

    def memory(self) -> tuple[int, int] | None:
        """Free and total memory in bytes. None where the system does not tell."""
        return main_memory()

    def peak_flops(self) -> None:
        return None

    # Arrays

    def zeros(self, shape: Shape, dtype=np.float32) -> DeviceArray:
        return np.zeros(shape, dtype)

    def empty(self, shape: Shape, dtype=np.float32) -> DeviceArray:
        """An array of NaN, or of -1 for integers, so that reading uninitialized memory shows in the result."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = UNSET
        return array

    def temporary(self, shape: Shape, dtype=np.float32) -> DeviceArray:
        array = super().temporary(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = UNSET
        return array

    def to_device(self, array: np.ndarray) -> DeviceArray:
        return np.array(array, order="C")

    def copy_to_device(self, array: DeviceArray, values: np.ndarray) -> None:
        array[...] = values

    def to_host(self, array: DeviceArray) -> np.ndarray:
        return array.copy()

    def uploader(self, shape: Shape, dtype) -> Callable[[np.ndarray], DeviceArray]:
        return self.to_device

    address = operator.attrgetter("ctypes.data")
    contiguous = operator.attrgetter("flags.c_contiguous")
    writable = operator.attrgetter("flags.writeable")

    # Computing

    def gemm(self, c: DeviceArray, alpha: float, a: DeviceArray, b: DeviceArray, beta: float,
             bias: DeviceArray | None = None) -> None:
        self.check_product(c, a, b, bias)
        a, b = a.astype(np.float32, copy=False), b.astype(np.float32, copy=False)
        with np.errstate(all="ignore"):     # no warnings about infinity and NaN, as on a GPU
            total = np.float32(alpha) * (a @ b)
            if beta:
                total += np.float32(beta) * c.astype(np.float32, copy=False)
            c[...] = total + bias if bias is not None and bias.size else total

    def load(self, sources: Sequence[str]) -> None:
        super().load(sources)
        path = Path(sys._getframe(1).f_code.co_filename)    # the caller's file, which most likely contains the sources
        text = path.read_text() if path.exists() else ""
        for source in sources:
            if source in text:
                self.places[source] = text[:text.index(source)].count("\n") + 1, path

    def compile(self, preamble, layer, kernels):
        text = ['#include "cuda_on_cpu.h"', "namespace {"]
        for source in (preamble, layer):
            line, path = self.places.get(source, (1, f"{kernels[0].name}.cu"))
            text += [f'#line {line} "{path}"', SHARED.sub(shared_memory, source)]
        text += ["}", '#line 1 "launchers"']
        file = os.path.basename(path)
        for kernel in kernels:
            text.append(f"""
                extern "C" const char* launch_{kernel.name}(const char* args, const int* shape, bool reverse) {{
                    auto body = [](const char* args) {{
                        cuda_on_cpu::call({kernel.name}, args, std::make_index_sequence<{len(kernel.parameters)}>());
                    }};
                    return cuda_on_cpu::launch("{kernel.name}", "{file}", body, args, shape, reverse);
                }}""")
        flags = FLAGS + (SANITIZE if self.sanitize else FAST) + [f"-DFloat={FLOATS[self.dtype]}"]
        library = ctypes.PyDLL(str(build("\n".join(text), kernels[0].name, flags)))     # Py: one launch at a time
        return {kernel.name: self.function(kernel, library, file) for kernel in kernels}

    def function(self, kernel, library, file):
        """A function that runs a kernel of the library, compiled from that file, on checked values."""
        entry = library[f"launch_{kernel.name}"]
        entry.restype = ctypes.c_char_p
        slots = np.dtype({"names": [p.name for p in kernel.parameters],
                          "formats": [np.uint64 if p.is_array else p.dtype for p in kernel.parameters],
                          "offsets": [8 * i for i in range(len(kernel.parameters))]})

        def run(grid, block, values, shared_bytes):
            args = np.array(tuple(values), slots)
            shape = (ctypes.c_int * 7)(*grid, *block, shared_bytes)
            message = entry(args.ctypes.data_as(ctypes.c_void_p), shape, self.reverse)
            if message:
                raise KernelError(message.decode(errors="replace"))

        def run_guarded(grid, block, values, shared_bytes):
            with guarded_arrays(kernel, values, library, file) as copies:
                run(grid, block, copies, shared_bytes)

        return run_guarded if self.sanitize else run

    def collectives(self, world):
        return world    # which adds and gathers NumPy arrays

    # Timing

    def event(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


def shared_memory(declaration):
    """The replacement for a match of SHARED, a declaration of arrays in shared memory."""
    is_extern, alignment, c_type, arrays = declaration.groups()
    if is_extern:
        name = arrays.removesuffix("[]")
        return f"{c_type}* const {name} = ({c_type}*)cuda_on_cpu::dynamic_shared;"
    return " ".join(f"{alignment or ''}static cuda_on_cpu::Shared<{c_type}{dimensions}> shared_{name}; "
                    f"auto& {name} = shared_{name}.object;"
                    for name, dimensions in re.findall(r"(\w+)((?:\[[^]]*\])*)(?:, *|$)", arrays))


@contextlib.contextmanager
def guarded_arrays(kernel, values, library, file):
    """The values with every array replaced by a copy in the middle of out-of-bounds memory. The results are copied back.

    An array that is passed twice is copied once, so that a kernel can work in place; arrays must not overlap otherwise. If a
    sanitizer raises KernelError, the line is added to it and, for a memory access, the name of the array.
    """
    poison, unpoison = library["__asan_poison_memory_region"], library["__asan_unpoison_memory_region"]
    poison.argtypes = unpoison.argtypes = ctypes.c_void_p, ctypes.c_size_t
    faulty_address = ctypes.c_size_t.in_dll(library, "faulty_address")
    faulty_calls = (ctypes.c_ssize_t * 16).in_dll(library, "faulty_calls")
    faulty_calls[0] = 0
    arrays = {}     # address -> size in bytes, and name
    for (i, p), size in zip(kernel.arrays, kernel.sizes(*(int(values[i]) for i, *_ in kernel.integers))):
        if values[i]:
            arrays[values[i]] = max(arrays.get(values[i], (0, "")), (size * p.dtype.itemsize, p.name))
    copies = {}     # address -> address of the copy, and the memory around it
    for address, (nbytes, _) in arrays.items():
        memory = np.empty(nbytes + 2 * MARGIN, np.uint8)
        copy = memory.ctypes.data + MARGIN
        copy += (address - copy) % ALIGNMENT
        ctypes.memmove(copy, address, nbytes)
        poison(memory.ctypes.data, copy - memory.ctypes.data)
        poison(copy + nbytes, memory.ctypes.data + memory.size - (copy + nbytes))
        copies[address] = copy, memory
    try:
        yield [copies[value][0] if p.is_array and value else value for p, value in zip(kernel.parameters, values)]
        for address, (nbytes, _) in arrays.items():
            ctypes.memmove(address, copies[address][0], nbytes)
    except KernelError as error:
        if not faulty_calls[0]:
            raise
        what = ": memory of no array" if faulty_address.value else ""
        for address, (nbytes, name) in arrays.items():
            copy, memory = copies[address]
            if 0 <= faulty_address.value - memory.ctypes.data < memory.size:
                what = f": byte {faulty_address.value - copy} of {name}, which has {nbytes}"
        raise KernelError(f"{error} at {', called at '.join(source_lines(library, file, faulty_calls))}{what}") from None
    finally:
        for _, memory in copies.values():
            unpoison(memory.ctypes.data, memory.size)


def source_lines(library, file, instructions):
    """The source lines of instructions of the library, as far as they are in the file: "kernels_gpu.py:66"."""
    command = ["addr2line", "-i", "-e", library._name, *(hex(instruction) for instruction in instructions if instruction)]
    places = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [os.path.basename(place).split(" ")[0] for place in places]
    return [line for line in lines if line.startswith(f"{file}:")]


@functools.cache
def machine():
    """The compiler's predefined macros: they identify it and the target processor. UserError if there is no compiler."""
    try:
        return subprocess.run([COMPILER, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise UserError(f"--device cpu needs a C++ compiler, and {COMPILER} was not found: install it "
                        "(Debian and Ubuntu: apt install g++; macOS: xcode-select --install)") from None


def build_folder() -> Path:
    """The folder of compiled libraries, in the user's cache folder: the checkout may be read-only."""
    folder = cache_folder() / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    delete_unused(folder.iterdir())
    return folder


def build(text, name, flags):
    """The path of a library compiled from C++ text, which may be cached. Raises UserError or KernelError."""
    headers = [path.read_text() for path in sorted(FOLDER.glob("*.h"))]
    key = hashlib.sha256("\0".join([machine(), *headers, *flags, text]).encode()).hexdigest()[:16]
    library = build_folder() / f"{name}-{key}.so"
    if not library.exists():
        source = library.with_suffix(".cpp")
        with atomic_file(source) as file:
            file.write(text.encode())
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        command = [COMPILER, *flags, "-I", str(FOLDER), "-o", str(unfinished), str(source)]
        compiler = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
        if compiler.returncode:
            lines = [line for line in compiler.stderr.splitlines() if "In function" not in line]
            raise KernelError("\n".join([f"{name} does not compile:", *lines[:ERROR_LINES]]))
        os.replace(unfinished, library)
    os.utime(library)   # or delete_unused would delete it
    return library
