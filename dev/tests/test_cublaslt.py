"""Matrix products by cuBLASLt. Without a GPU a stand-in, which does what the documentation says, multiplies in main memory.

Descriptors need no GPU: they are the stand-in's own in some tests, and in others those of the library, read back from it.
"""
import ctypes
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cublaslt
from cublaslt import FUNCTIONS, CublasLt, HeuristicResult, alignment

FLOAT, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
HANDLE, WORKSPACE, WORKSPACE_BYTES, STREAM, NOT_SUPPORTED = 77, 2 ** 40, 2 ** 25, 99, 15
# Descriptor -> its attributes: name, number, type, default. The first ones are given when it is created.
ATTRIBUTES = {
    "MatmulDesc": (("COMPUTE_TYPE", 0, ctypes.c_int32, None), ("SCALE_TYPE", 1, ctypes.c_int32, None),
                   ("TRANSA", 3, ctypes.c_int32, 0), ("TRANSB", 4, ctypes.c_int32, 0), ("EPILOGUE", 7, ctypes.c_uint32, 1),
                   ("BIAS_POINTER", 8, ctypes.c_uint64, 0), ("BIAS_DATA_TYPE", 26, ctypes.c_int32, -1)),
    "MatrixLayout": (("TYPE", 0, ctypes.c_uint32, None), ("ROWS", 2, ctypes.c_uint64, None), ("COLS", 3, ctypes.c_uint64, None),
                     ("LD", 4, ctypes.c_int64, None), ("BATCH_COUNT", 5, ctypes.c_int32, 1),
                     ("STRIDED_BATCH_OFFSET", 6, ctypes.c_int64, 0)),
    "MatmulPreference": (("MAX_WORKSPACE_BYTES", 1, ctypes.c_uint64, 0), ("REDUCTION_SCHEME_MASK", 3, ctypes.c_uint32, 7),
                         *((f"MIN_ALIGNMENT_{matrix}_BYTES", 5 + i, ctypes.c_uint32, 256) for i, matrix in enumerate("ABCD"))),
}
PREFIXES = {"MatmulDesc": "CUBLASLT_MATMUL_DESC", "MatrixLayout": "CUBLASLT_MATRIX_LAYOUT",
            "MatmulPreference": "CUBLASLT_MATMUL_PREF"}


class StandIn:
    """cuBLASLt, on arrays in main memory. With a library, descriptors are made and read by that."""

    def __init__(self, library=None):
        self.library, self.descriptors, self.calls, self.products, self.algorithms = library, {}, [], [], []
        self.failing, self.finds = None, True

    def __getattr__(self, name):
        def call(*args):
            assert len(args) == len(FUNCTIONS[name])
            self.calls.append(name)
            if name == self.failing:
                return NOT_SUPPORTED
            values = [ctypes.addressof(arg._obj) if hasattr(arg, "_obj") else arg for arg in args]      # of ctypes.byref
            kind, function = re.fullmatch("cublasLt(MatmulDesc|MatrixLayout|MatmulPreference|)(.*)", name).groups()
            if kind and self.library:
                return getattr(self.library, name)(*values)
            return getattr(self, function)(kind, *values)
        return call

    def cublasLtGetStatusName(self, status):
        return {NOT_SUPPORTED: b"CUBLAS_STATUS_NOT_SUPPORTED"}[status]

    def Create(self, kind, address, *values):
        descriptor = 1000 + len(self.descriptors) if kind else HANDLE
        self.descriptors[descriptor] = {
            name: default if default is not None else value
            for (name, _, _, default), value in itertools.zip_longest(ATTRIBUTES.get(kind, ()), values)}
        ctypes.c_uint64.from_address(address).value = descriptor
        return 0

    def SetAttribute(self, kind, descriptor, number, address, size):
        [(name, c_type)] = [(name, c_type) for name, n, c_type, _ in ATTRIBUTES[kind] if n == number]
        assert size == ctypes.sizeof(c_type)
        self.descriptors[descriptor][name] = c_type.from_address(address).value
        return 0

    def read(self, kind, descriptor):
        """The attributes of a descriptor."""
        if not self.library:
            return SimpleNamespace(**self.descriptors[descriptor])
        values = {}
        for name, number, c_type, _ in ATTRIBUTES[kind]:
            value, written = c_type(), ctypes.c_size_t()
            status = getattr(self.library, f"cublasLt{kind}GetAttribute")(
                ctypes.c_void_p(descriptor), number, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)),
                ctypes.byref(written))
            assert status == 0 and written.value == ctypes.sizeof(value)
            values[name] = value.value
        return SimpleNamespace(**values)

    def MatmulAlgoGetHeuristic(self, kind, handle, product, a, b, c, d, preference, count, results, found):
        assert handle == HANDLE and count == 1
        ctypes.c_int.from_address(found).value = self.finds
        if self.finds:
            preference = self.read("MatmulPreference", preference)
            assert preference.MAX_WORKSPACE_BYTES == WORKSPACE_BYTES
            self.algorithms.append(((product, a, b, c, d), preference, self.read("MatmulDesc", product).BIAS_POINTER))
            result = HeuristicResult.from_address(results)
            result.algorithm[0], result.status = len(self.algorithms), 0
        return 0

    def Matmul(self, kind, handle, product, alpha, a, layout_a, b, layout_b, beta, c, layout_c, d, layout_d, algorithm, *where):
        """D = alpha * op(A) @ op(B) + beta * C + the bias in each column."""
        assert (handle, *where) == (HANDLE, WORKSPACE, WORKSPACE_BYTES, STREAM)
        descriptors, preference, bias = self.algorithms[ctypes.c_uint64.from_address(algorithm).value - 1]
        assert descriptors == (product, layout_a, layout_b, layout_c, layout_d) and (c, layout_c) == (d, layout_d)
        for name, address in zip("ABCD", (a, b, c, d)):
            assert getattr(preference, f"MIN_ALIGNMENT_{name}_BYTES") == alignment(address)
        product, *layouts = self.read("MatmulDesc", product), *(
            self.read("MatrixLayout", layout) for layout in (layout_a, layout_b, layout_d))
        assert alignment(product.BIAS_POINTER) == alignment(bias)
        assert (product.EPILOGUE, product.BIAS_DATA_TYPE) == (4 if bias else 1, -1)
        assert preference.REDUCTION_SCHEME_MASK == {0: 7, 14: 2}[layouts[2].TYPE]
        self.products.append((product, *layouts))
        a, b, d = (matrices(address, layout) for address, layout in zip((a, b, d), layouts))
        a, b = (matrix.swapaxes(1, 2) if transposed else matrix
                for matrix, transposed in ((a, product.TRANSA), (b, product.TRANSB)))
        alpha, beta = (ctypes.c_float.from_address(address).value for address in (alpha, beta))
        total = alpha * a.astype(float) @ b.astype(float)
        if beta:
            total += beta * d.astype(float)
        if bias:
            total += numbers(product.BIAS_POINTER, (d.shape[1], 1), d.dtype, (d.itemsize, 0))
        d[...] = total
        return 0


def numbers(address, shape, dtype, strides):
    last = sum((length - 1) * stride for length, stride in zip(shape, strides))
    return np.ndarray(shape, dtype, (ctypes.c_byte * (last + dtype.itemsize)).from_address(address), 0, strides)


def matrices(address, layout):
    """(batch, rows, columns): the rows of a column are contiguous."""
    assert layout.LD >= layout.ROWS
    dtype = {0: FLOAT, 14: BF16}[layout.TYPE]
    strides = (layout.STRIDED_BATCH_OFFSET, 1, layout.LD)
    return numbers(address, (layout.BATCH_COUNT, layout.ROWS, layout.COLS), dtype, [dtype.itemsize * n for n in strides])


def open_library():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        return cublaslt.open_library()
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture
def cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("there is no GPU")
    open_library()
    return cupy


@pytest.fixture(params=["own descriptors", "descriptors of the library"])
def stand_in(request, monkeypatch):
    library = StandIn(open_library() if request.param == "descriptors of the library" else None)
    monkeypatch.setattr(cublaslt, "open_library", lambda: library)
    return library


def new(tf32=False):
    return CublasLt(cublaslt.open_library(), WORKSPACE, WORKSPACE_BYTES, tf32)


def new_on_gpu(cupy, tf32=False):
    workspace = cupy.empty(WORKSPACE_BYTES, np.uint8)
    lt = CublasLt(cublaslt.open_library(), workspace.data.ptr, WORKSPACE_BYTES, tf32)
    lt.memory = workspace
    return lt


def address(array):
    return 0 if array is None else array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def matmul(lt, c, alpha, a, b, beta, bias=None, stream=STREAM):
    problem = c.shape, c.strides, a.shape, a.strides, b.shape, b.strides, c.itemsize, a.itemsize
    lt.matmul(problem, address(c), alpha, address(a), address(b), beta, address(bias), stream)


def aligned_numbers(size):
    """float32 zeros at a multiple of 256 bytes."""
    memory = np.zeros(size + 64, FLOAT)
    start = -address(memory) % 256 // 4
    return memory[start:start + size]


# ----------------------------------------------------------------------------------------------------------------------
# Products

TYPES = [(FLOAT, FLOAT), (BF16, BF16), (BF16, FLOAT)]      # of a and b; of c and the bias
VARIANTS = [*itertools.product([(), (3,)], [False, True], [False, True], [False, True], [0, 1, -0.5])]


def check_product(lt, to_device, to_host, sizes, types, batch, transpose_a, transpose_b, bias, beta, bound, stream=STREAM):
    """A product of parts of larger arrays, with gaps between rows, against float64."""
    (m, k, n), (dtype, dtype_c) = sizes, types
    random = np.random.default_rng(m)

    def part(shape, dtype):
        values = random.standard_normal(shape).astype(dtype)
        padded = np.full([length + 2 for length in shape], np.nan, dtype)
        inner = tuple(slice(1, -1) for _ in shape)
        padded[inner] = values
        padded = to_device(padded)
        return values.astype(float), padded[inner], padded

    a, a_part, _ = part((*batch, *((k, m) if transpose_a else (m, k))), dtype)
    b, b_part, _ = part((*batch, *((n, k) if transpose_b else (k, n))), dtype)
    c, c_part, c_padded = part((*batch, m, n), dtype_c)
    added, bias_part, _ = part((n,), dtype_c) if bias else (0, None, None)
    if beta == 0:
        c = np.zeros_like(c)
        c_part[...] = np.nan
    a, a_part, b, b_part = (array.swapaxes(-1, -2) if transposed else array for array, transposed in (
        (a, transpose_a), (a_part, transpose_a), (b, transpose_b), (b_part, transpose_b)))
    matmul(lt, c_part, 0.3, a_part, b_part, beta, bias_part, stream)
    expected = 0.3 * a @ b + beta * c + added
    size = 0.3 * np.abs(a) @ np.abs(b) + np.abs(beta * c) + np.abs(added)
    error = np.abs(to_host(c_part).astype(float) - expected)
    variant = sizes, batch, transpose_a, transpose_b, bias, beta
    assert (error <= bound * size + (2 ** -8 * np.abs(expected) if dtype_c == BF16 else 0)).all(), variant
    assert np.isnan(to_host(c_padded).astype(float)).sum() == c_padded.size - c.size, variant   # nothing around it was written


@pytest.mark.parametrize("types", TYPES)
def test_products(stand_in, types):
    for variant, sizes in itertools.product(VARIANTS, ((5, 4, 7), (1, 3, 2), (3, 1, 1))):
        check_product(new(), np.asarray, np.asarray, sizes, types, *variant, bound=1e-6)


@pytest.mark.parametrize("types, tf32, bound", [*((types, False, 1e-5) for types in TYPES), (TYPES[0], True, 2e-3)])
def test_products_on_a_gpu(cupy, types, tf32, bound):
    lt, stream = new_on_gpu(cupy, tf32), cupy.cuda.get_current_stream().ptr
    for variant, sizes in itertools.product(VARIANTS, ((5, 4, 7), (1, 3, 2), (3, 1, 1), (128, 64, 256), (126, 254, 510))):
        check_product(lt, cupy.asarray, cupy.asnumpy, sizes, types, *variant, bound, stream)


def test_a_product_in_a_cuda_graph(cupy):
    """Recorded once, it runs on what the arrays hold at each launch."""
    lt, stream = new_on_gpu(cupy), cupy.cuda.Stream(non_blocking=True)
    with stream:
        a, b, c, bias = cupy.ones((8, 16), FLOAT), cupy.ones((16, 32), FLOAT), cupy.zeros((8, 32), FLOAT), cupy.ones(32, FLOAT)
        matmul(lt, c, 1, a, b, 1, bias, stream.ptr)     # loads the kernel
        stream.begin_capture()
        matmul(lt, c, 1, a, b, 1, bias, stream.ptr)
        graph = stream.end_capture()
        a.fill(2)
        c.fill(0)
        for _ in range(2):
            graph.launch(stream)
        assert (c.get() == 2 * (2 * 16 + 1)).all()


# ----------------------------------------------------------------------------------------------------------------------
# What cuBLASLt is asked for

def test_bias_of_each_call(stand_in):
    """A bias at another address needs no other descriptor."""
    lt, a, b, c = new(), np.ones((2, 3), FLOAT), np.ones((3, 4), FLOAT), np.empty((2, 4), FLOAT)
    memory = aligned_numbers(128)
    memory[:4], memory[64:68] = range(4), range(4, 8)
    for bias in (memory[:4], memory[64:68], memory[:4]):
        matmul(lt, c, 1, a, b, 0, bias)
        assert np.array_equal(c, [3 + bias, 3 + bias])
    assert stand_in.calls.count("cublasLtMatmulDescCreate") == 1


def test_descriptors_are_made_once(stand_in):
    lt, memory = new(), aligned_numbers(3 * 128 + 64)
    a, b, c = (memory[128 * i:128 * i + 64].reshape(8, 8) for i in range(3))

    def made_by(*args):
        before = len(stand_in.calls)
        matmul(lt, *args)
        return stand_in.calls[before:]

    first = made_by(c, 1, a, b, 0)
    assert len(first) > 1 and first.count("cublasLtMatrixLayoutCreate") == 3 and "cublasLtMatmulAlgoGetHeuristic" in first
    assert made_by(c, 2, a, b, 1) == made_by(a, 1, b, c, -1) == ["cublasLtMatmul"]     # other factors, other addresses
    shifted = memory[256 + 2:256 + 66].reshape(8, 8)
    for args in ((shifted, 1, a, b, 0), (c, 1, shifted, b, 0), (c, 1, a, shifted, 0),   # aligned to 8 bytes
                 (c, 1, a.T, b, 0), (c, 1, a, b.T, 0), (c[:, :7], 1, a, b[:, :7], 0), (c[None], 1, a[None], b[None], 0),
                 (c, 1, a, b, 0, memory[:8]), (c, 1, a, b, 0, memory[1:9])):
        assert made_by(*args).count("cublasLtMatmulAlgoGetHeuristic") == 1
        assert made_by(*args) == ["cublasLtMatmulDescSetAttribute"] * (len(args) > 5) + ["cublasLtMatmul"]


QKV = np.zeros((6, 3, 2, 4), BF16)      # (T, 3, NH, HS)


@pytest.mark.parametrize("tf32, c, a, b, expected", [   # expected: compute type, TRANSA, TRANSB; the layouts of A, B and D
    (False, np.zeros((5, 7), FLOAT), np.zeros((5, 4), FLOAT), np.zeros((4, 7), FLOAT),
     [(68, 0, 0), (0, 7, 4, 7, 1, 0), (0, 4, 5, 4, 1, 0), (0, 7, 5, 7, 1, 0)]),
    (True, np.zeros((5, 7), FLOAT), np.zeros((4, 5), FLOAT).T, np.zeros((7, 4), FLOAT).T,
     [(77, 1, 1), (0, 4, 7, 4, 1, 0), (0, 5, 4, 5, 1, 0), (0, 7, 5, 7, 1, 0)]),
    (False, np.zeros((5, 9), FLOAT)[:, :7], np.zeros((5, 10), BF16)[:, 2:6], np.zeros((7, 11), BF16)[:, :4].T,
     [(68, 1, 0), (14, 4, 7, 11, 1, 0), (14, 4, 5, 10, 1, 0), (0, 7, 5, 9, 1, 0)]),
    # Two heads of attention: queries (T, HS) and transposed keys (HS, T), which lie between each other
    (False, np.zeros((2, 6, 6), BF16), QKV[:, 0].transpose(1, 0, 2), QKV[:, 1].transpose(1, 2, 0),
     [(68, 1, 0), (14, 4, 6, 24, 2, 4), (14, 4, 6, 24, 2, 4), (14, 6, 6, 6, 2, 36)]),
    (False, np.zeros(7, FLOAT)[None], np.zeros(4, FLOAT)[None], np.zeros((4, 7), FLOAT),      # rows with a stride of 0
     [(68, 0, 0), (0, 7, 4, 7, 1, 0), (0, 4, 1, 4, 1, 0), (0, 7, 1, 7, 1, 0)]),
    (False, np.zeros((5, 1), FLOAT), np.zeros((5, 4), FLOAT), np.zeros((4, 1), FLOAT),
     [(68, 0, 0), (0, 1, 4, 1, 1, 0), (0, 4, 5, 4, 1, 0), (0, 1, 5, 1, 1, 0)]),
], ids=["float32", "tf32, transposed", "bf16 to float32", "bf16, batch", "single rows", "single columns"])
def test_descriptors(stand_in, tf32, c, a, b, expected):
    """A layout: its type, rows, columns, leading dimension, and the number of matrices and their distance."""
    matmul(new(tf32), c, 1, a, b, 0)
    [(product, *layouts)] = stand_in.products
    assert product.SCALE_TYPE == 0
    assert expected == [(product.COMPUTE_TYPE, product.TRANSA, product.TRANSB),
                        *(tuple(vars(layout).values()) for layout in layouts)]


# ----------------------------------------------------------------------------------------------------------------------
# The library

def test_numbers_of_the_header():
    """The numbers in this file and, as far as no other test compares them with these, in cublaslt.py."""
    headers = [path for name in ("cublasLt.h", "cublas_api.h", "library_types.h")
               for path in Path(open_library()._name).parents[2].glob(f"*/include/{name}")]     # in several wheels, or in one
    if len(headers) != 3:
        pytest.skip("the library has no headers beside it")
    found = dict(re.findall(r"^ *(\w+) *= *(0x\d+|\d+)\b", "\n".join(path.read_text() for path in headers), re.MULTILINE))
    for kind, attributes in ATTRIBUTES.items():
        for name, number, _, _ in attributes:
            assert int(found[f"{PREFIXES[kind]}_{name}"], 0) == number, name
    for name, number in vars(cublaslt).items():
        if name.startswith("CU") and isinstance(number, int):
            assert int(found[name], 0) == number, name


def test_it_is_the_library_of_cupy():
    """A process with two of them would have two sets of kernels in the GPU's memory."""
    library = open_library()
    from cupy_backends.cuda.libs import cublas  # noqa: F401   loads cuBLAS and with it cuBLASLt
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the list of loaded libraries is in /proc/self/maps, which only Linux has")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libcublasLt" in line}
    assert loaded == {str(Path(library._name).resolve())}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "cublasLtCreate"])
def test_a_failing_call(stand_in, name):
    a, b, c, bias = (np.zeros(shape, FLOAT) for shape in ((2, 5, 4), (2, 4, 7), (2, 5, 7), 7))
    lt, stand_in.failing = new(), name
    with pytest.raises(RuntimeError, match=re.escape(
            "cuBLASLt: CUBLAS_STATUS_NOT_SUPPORTED: c, a and b with shapes and strides ((2, 5, 7), (140, 28, 4), (2, 5, 4), "
            f"(80, 16, 4), (2, 4, 7), (112, 28, 4)) and item sizes (4, 4), at {address(c):#x}, ")):
        matmul(lt, c, 1, a, b, 0, bias)
    stand_in.failing = None
    matmul(lt, c, 1, a, b, 0, bias)     # is not remembered


def test_no_algorithm(stand_in):
    stand_in.finds = False
    with pytest.raises(RuntimeError, match="^cuBLASLt: CUBLAS_STATUS_NOT_SUPPORTED: c, a and b"):
        matmul(new(), np.empty((1, 1), FLOAT), 1, np.ones((1, 1), FLOAT), np.ones((1, 1), FLOAT), 0)


def test_no_gpu():
    library = open_library()
    import cupy
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    assert library.cublasLtGetStatusName(0) == b"CUBLAS_STATUS_SUCCESS"
    with pytest.raises(RuntimeError, match="^cuBLASLt: CUBLAS_STATUS_NOT_INITIALIZED$"):
        new()


@pytest.mark.parametrize("number, expected", [(0, 0), (256, 256), (2 ** 40, 256), (2 ** 40 + 128, 128), (24, 8), (7, 1)])
def test_alignment(number, expected):
    assert alignment(number) == expected
