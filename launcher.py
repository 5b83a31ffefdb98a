"""Launching CUDA kernels with checked arguments, and the base class of both devices.

A GPU checks nothing: to a kernel an array is an address, and an array of the wrong type or length is read or overwritten
silently. So `parse_signatures` reads the declaration of every kernel from its CUDA source, array shapes included, and
`Device.launch` checks the arguments against it.
"""
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DeviceArray = Any                           # numpy.ndarray on the CPU, cupy.ndarray on a GPU
Shape = int | tuple[int, ...]
C_TYPES = {name: np.dtype(dtype) for name, dtype in {
    "float": np.float32, "double": np.float64, "int": np.int32, "unsigned": np.uint32, "unsigned int": np.uint32,
    "long long": np.int64, "unsigned long long": np.uint64, "size_t": np.uint64, "unsigned char": np.uint8,
    "bf16": ml_dtypes.bfloat16}.items()}
FLOATS = {"float32": "float", "tf32": "float", "bfloat16": "bf16"}     # --dtype -> what `Float` stands for in a source
MAX_GRID = (2 ** 31 - 1, 65535, 65535)      # the limits that hold for every GPU
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024                          # per block
MAX_SHARED_BYTES = 47 * 1024                # of a launch; with arrays of fixed size 48 KB, see dev/tests/test_nvrtc.py


# ----------------------------------------------------------------------------------------------------------------------
# Kernel signatures, and the check of a launch's arguments

KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\((\d+)(?:, \d+)?\) )?(\w+)\(')
DECLARATION = re.compile(r"(const )?(\w[\w ]*?)\s*(\*?)\s*(?:__restrict__ )?(\w+)")
SHAPE = re.compile(r"\(([\w ,*+-]+)\)( or empty)?")


class Parameter(NamedTuple):
    """A parameter of a kernel: a number, or an array with its shape in a comment: `float* out,  // (N, 3*C) or empty`."""
    name: str
    dtype: np.dtype
    is_array: bool
    is_const: bool
    shape: str = ""             # "N, 3*C", in terms of the kernel's integer parameters
    or_empty: bool = False      # may have size 0 instead; it is then passed as a null pointer


def parse_signatures(source: str, Float: str = "float") -> dict[str, "Kernel"]:
    """The kernels that a CUDA source declares, by name. Float: the C type that this name stands for.

    Raises ValueError for a kernel whose arguments could not be checked.
    """
    kernels, c_types = {}, C_TYPES | {"Float": C_TYPES[Float]}
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
                if not parts or parts[2] not in c_types:
                    raise ValueError(f"{name}: unknown type in {declaration!r}, expected one of {', '.join(c_types)}")
                const, c_type, star, parameter = parts.groups()
                if star and (not shape or len(declarations) > 1):
                    raise ValueError(f"{name}: expected {parameter} on its own line, followed by its shape: // (N, C)")
                parameters.append(Parameter(parameter, c_types[c_type], bool(star), bool(const),
                                            *((shape[1], bool(shape[2])) if star else ())))
            if closed:
                break
        kernels[name] = Kernel(name, parameters, int(max_threads or MAX_THREADS))
    found = len(re.findall(r"^[^/\n]*__global__", source, re.MULTILINE))
    if len(kernels) != found:
        raise ValueError(f'found {found} kernels, only {len(kernels)} ({", ".join(kernels) or "none"}) declared as expected: '
                         'extern "C" __global__ void name(')
    return kernels


class Kernel:
    """The signature of a kernel, and the check of a launch's arguments against it."""

    def __init__(self, name: str, parameters: list[Parameter], max_threads: int):
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
                raise ValueError(f"{name}: the shape ({p.shape}) of {p.name} names {unknown}, expected an integer parameter")
        # Compiled once: a function from the integer arguments to the sizes of the arrays, and one to their shapes.
        sizes = "".join("*".join(f"({length})" for length in p.shape.split(",")) + ", " for _, p in self.arrays)
        shapes = "".join(f"({p.shape},), " for _, p in self.arrays)
        self.sizes = eval(f"lambda {', '.join(names)}: ({sizes})")
        self.shapes = eval(f"lambda {', '.join(names)}: ({shapes})")

    def check(self, args: Sequence, device: "Device") -> list:
        """The arguments as the kernel takes them: an array by its address, a number as NumPy scalar of the declared type.

        It takes a few microseconds per launch; a training step has hundreds of launches. Raises TypeError or ValueError.
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
                raise ValueError(f"{self.name}: {p.name} is {integer}, expected {lowest} to {highest}: "
                                 f"it is declared {p.dtype}")
            integers.append(integer)
            values[i] = p.dtype.type(integer)
        for i, p in self.floats:
            if not isinstance(args[i], (float, int, np.floating, np.integer)):
                raise TypeError(f"{self.name}: {p.name} is {describe(args[i])}, expected a number")
            values[i] = p.dtype.type(args[i])
        for n, ((i, p), size) in enumerate(zip(self.arrays, self.sizes(*integers))):
            array = args[i]
            if p.or_empty and isinstance(array, device.Array) and array.size == 0:      # of any dtype
                values[i] = 0
                continue
            if not isinstance(array, device.Array) or array.dtype != p.dtype:
                raise TypeError(f"{self.name}: {p.name} is {describe(array)}, expected {type_name(device.Array)} of {p.dtype}")
            if array.size != size:
                expected = str(self.shapes(*integers)[n]) + " or empty" * p.or_empty
                raise ValueError(f"{self.name}: {p.name} has shape {array.shape}, expected ({p.shape}) = {expected}")
            if not device.contiguous(array):
                raise ValueError(f"{self.name}: {p.name} has strides {array.strides} for shape {array.shape}, expected a "
                                 "C-contiguous array")
            if not p.is_const and not device.writable(array):
                raise ValueError(f"{self.name}: {p.name} is read-only, expected a writable array")
            values[i] = device.address(array) if size else 0
        return values


def type_name(kind):
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def describe(value):
    """An argument in words: "numpy.ndarray of float64", "str 'abc'"."""
    return f"{type_name(type(value))} " + (f"of {value.dtype}" if hasattr(value, "shape") else repr(value))


# ----------------------------------------------------------------------------------------------------------------------
# The base class of devices

class Device:
    """What both devices share: loading kernels by name, and launching them with checked arguments.

    Subclasses add the type of their arrays, `Array`; the functions `address`, `contiguous` and `writable` of an array; and the
    methods that device.CudaDevice documents: memory, arrays, compiling, matrix products, several processes, timing.
    """
    library_bytes = 0       # of the device's memory that its libraries take besides the arrays

    def __init__(self, dtype: str):
        """dtype: "float32", "tf32" (float32 arrays, and products of numbers rounded to 10 bits) or "bfloat16"."""
        self.dtype = dtype
        self.Float = C_TYPES[FLOATS[dtype]]         # of activations and of the weights in products
        self.width = 16 // self.Float.itemsize      # numbers in a kernel's Part
        self.temporaries = []   # the memory of `temporary`, the largest last; a CUDA graph may still use the others
        self.kernels = {}       # name -> Kernel
        self.layers = {}        # name -> the two sources that it is compiled from
        self.functions = {}     # name -> function of (grid, block, values, shared_bytes), once compiled

    def load(self, sources: Sequence[str]) -> None:
        """Register the kernels of CUDA sources. The first source is the preamble: it is put in front of each of the others.

        A source is compiled at the first launch of one of its kernels. Raises ValueError for a kernel whose arguments could not
        be checked.
        """
        preamble, *layers = sources
        for layer in layers:
            if (preamble, layer) not in self.layers.values():
                for name, kernel in parse_signatures(layer, FLOATS[self.dtype]).items():
                    self.kernels[name], self.layers[name] = kernel, (preamble, layer)
                    self.functions.pop(name, None)

    def launch(self, kernel_name: str, grid: Shape, block: Shape, *args, shared_bytes: int = 0) -> None:
        """Launch a kernel on `grid` blocks of `block` threads, each a number or a tuple of up to three.

        Raises TypeError or ValueError, before anything runs, if the arguments do not match the declaration in its source.
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

    @functools.cached_property
    def none(self) -> DeviceArray:
        """An empty array: for a kernel or a product, none."""
        return self.empty(0)

    def replay(self, graphs: dict, key, work: Callable[[], None]) -> None:
        """Call work, which launches kernels on arrays that stay where they are. A GPU may repeat launches of an earlier call.

        graphs: a dictionary, empty at first, for what is to be repeated. key: which work this is
        """
        work()

    def temporary(self, shape: Shape, dtype=np.float32) -> DeviceArray:
        """An uninitialized array, valid until the next call, in memory that all calls share."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if not self.temporaries or self.temporaries[-1].size < nbytes:
            self.temporaries.append(self.empty(nbytes, np.uint8))
        return self.temporaries[-1][:nbytes].view(dtype).reshape(shape)

    def check_product(self, c: DeviceArray, a: DeviceArray, b: DeviceArray, bias: DeviceArray | None) -> tuple:
        """The shapes, strides and item sizes of a product: what its layout depends on.

        Raises TypeError or ValueError unless `gemm` can compute c = a @ b + bias.
        """
        for name, array in (("c", c), ("a", a), ("b", b)):
            if not isinstance(array, self.Array) or array.dtype != np.float32 and array.dtype != self.Float:
                raise TypeError(f"gemm: {name} is {describe(array)}, expected {type_name(self.Array)} of {self.Float}"
                                f"{' or float32' * (self.Float != np.float32)}")
        if not (a.dtype == b.dtype and c.dtype in (a.dtype, np.float32)):
            raise TypeError(f"gemm: a and b are {a.dtype} and {b.dtype} and c is {c.dtype}, expected the same for a and b, and "
                            "for c either that or float32")
        problem = c.shape, c.strides, a.shape, a.strides, b.shape, b.strides, c.itemsize, a.itemsize
        check_matrices(*problem)
        if bias is not None and bias.size and not (isinstance(bias, self.Array) and bias.dtype == c.dtype
                                                   and bias.shape == c.shape[-1:] and self.contiguous(bias)):
            raise TypeError(f"gemm: bias is {describe(bias)} of shape {bias.shape}, expected a contiguous "
                            f"{type_name(self.Array)} of {c.dtype} of shape {c.shape[-1:]}")
        return problem


@functools.cache
def check_matrices(c_shape, c_strides, a_shape, a_strides, b_shape, b_strides, c_itemsize, itemsize):
    """Raise ValueError unless arrays of these shapes can be multiplied. Cached, because products repeat."""
    for name, shape, strides, size in (("c", c_shape, c_strides, c_itemsize), ("a", a_shape, a_strides, itemsize),
                                       ("b", b_shape, b_strides, itemsize)):
        if not (len(shape) == len(c_shape) and len(shape) in (2, 3) and (
                has_whole_rows(shape, strides, size)
                or name != "c" and has_whole_rows(transposed(shape), transposed(strides), size))):
            raise ValueError(f"gemm: {name} has shape {shape} and strides {strides}, expected a matrix, or a batch of them, "
                             f"with contiguous rows{'' if name == 'c' else ' or columns'}")
    if not (c_shape[-2:] == (a_shape[-2], b_shape[-1]) and a_shape[-1] == b_shape[-2]
            and c_shape[:-2] == a_shape[:-2] == b_shape[:-2]):
        raise ValueError(f"gemm: c {c_shape}, a {a_shape} and b {b_shape} do not match")


def has_whole_rows(shape, strides, itemsize):
    """Whether the rows of matrices are contiguous and do not overlap."""
    return strides[-1] == itemsize and (shape[-2] == 1 or strides[-2] >= itemsize * shape[-1])


def transposed(sizes):
    return sizes[:-2] + (sizes[-1], sizes[-2])


@functools.cache
def launch_shape(name, max_threads, grid, block, shared_bytes):
    """grid and block as tuples of three. ValueError if not every GPU can launch them. Cached, because launches repeat."""
    grid, block = ((*((size,) if isinstance(size, (int, np.integer)) else size), 1, 1)[:3] for size in (grid, block))
    if not all(0 < blocks <= most for blocks, most in zip(grid, MAX_GRID)):
        raise ValueError(f"{name}: a grid of {grid} blocks, expected at least 1 and at most {MAX_GRID}")
    if not (all(0 < threads <= most for threads, most in zip(block, MAX_BLOCK)) and math.prod(block) <= max_threads):
        raise ValueError(f"{name}: a block of {block} threads, expected at least 1, at most {MAX_BLOCK} and "
                         f"{max_threads} in all")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"{name}: {shared_bytes} bytes of shared memory, expected 0 to {MAX_SHARED_BYTES}")
    return grid, block
