"""Matrix products on a GPU by cuBLASLt, the library inside cuBLAS, for which CuPy has no functions.

A call of cuBLASLt is told its stream and its workspace, so a CUDA graph can record it. CuPy refuses to record calls of cuBLAS.
cuBLASLt also adds a bias. Names and numbers are those of NVIDIA's documentation of cuBLAS, "Using the cuBLASLt API".
"""
import ctypes
import functools

POINTER, INT, LONG, SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t
SET_ATTRIBUTE = POINTER, INT, POINTER, SIZE     # the descriptor; which attribute; its value, and how many bytes that has
FUNCTIONS = {
    "cublasLtCreate": (POINTER,),
    "cublasLtMatmulDescCreate": (POINTER, INT, INT),
    "cublasLtMatmulDescSetAttribute": SET_ATTRIBUTE,
    "cublasLtMatrixLayoutCreate": (POINTER, INT, SIZE, SIZE, LONG),
    "cublasLtMatrixLayoutSetAttribute": SET_ATTRIBUTE,
    "cublasLtMatmulPreferenceCreate": (POINTER,),
    "cublasLtMatmulPreferenceSetAttribute": SET_ATTRIBUTE,
    "cublasLtMatmulAlgoGetHeuristic": (*[POINTER] * 7, INT, POINTER, POINTER),
    "cublasLtMatmul": (*[POINTER] * 14, SIZE, POINTER),
}
ATTRIBUTES = {      # kind of descriptor -> its attributes by the ends of their names: the number, and the type of the value
    "MatmulDesc": {"TRANSA": (3, INT), "TRANSB": (4, INT), "EPILOGUE": (7, INT), "BIAS_POINTER": (8, POINTER)},
    "MatrixLayout": {"BATCH_COUNT": (5, INT), "STRIDED_BATCH_OFFSET": (6, LONG)},
    "MatmulPreference": {"MAX_WORKSPACE_BYTES": (1, SIZE), "REDUCTION_SCHEME_MASK": (3, INT),
                         "MIN_ALIGNMENT_A_BYTES": (5, INT), "MIN_ALIGNMENT_B_BYTES": (6, INT),
                         "MIN_ALIGNMENT_C_BYTES": (7, INT), "MIN_ALIGNMENT_D_BYTES": (8, INT)},
}
CUDA_R_32F, CUDA_R_16BF = 0, 14
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 77
CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, CUBLASLT_REDUCTION_SCHEME_MASK = 2, 7       # the mask is all schemes
CUBLASLT_EPILOGUE_BIAS = 4
CUBLAS_STATUS_NOT_SUPPORTED = 15
MAX_ALIGNMENT = 256     # of addresses, in bytes: the most that cuBLASLt asks for


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm for a product."""
    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", SIZE), ("status", INT), ("waves", ctypes.c_float),
                ("reserved", INT * 4)]


def open_library() -> ctypes.CDLL:
    """The cuBLASLt that CuPy's cuBLAS uses. Raises ImportError or RuntimeError if there is none."""
    from cuda.pathfinder import load_nvidia_dynamic_lib     # CuPy loads its libraries by it. It returns what is loaded already.
    library = ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    for name, types in FUNCTIONS.items():
        getattr(library, name).argtypes = types
    library.cublasLtGetStatusName.restype = ctypes.c_char_p
    return library


def alignment(address: int) -> int:
    """The largest power of two that divides an address, at most MAX_ALIGNMENT. 0 for a null pointer."""
    return min(address & -address, MAX_ALIGNMENT)


class CublasLt:
    """Products on the current GPU. They share a workspace, so they have to run one after another, in one stream."""

    def __init__(self, library: ctypes.CDLL, workspace: int, workspace_bytes: int, tf32: bool):
        """library: see open_library. workspace: its address on the GPU, a multiple of 256

        tf32: whether to round float32 numbers to TF32 before they are multiplied
        Raises RuntimeError if the library cannot use the GPU.
        """
        self.library = library
        self.workspace, self.workspace_bytes = workspace, workspace_bytes
        self.compute_type = CUBLAS_COMPUTE_32F_FAST_TF32 if tf32 else CUBLAS_COMPUTE_32F
        self.handle = self.create("")
        self.alpha, self.beta = ctypes.c_float(), ctypes.c_float()      # cuBLASLt reads them during the call
        self.plan = functools.cache(self.make_plan)                     # products repeat

    def matmul(self, problem: tuple, c: int, alpha: float, a: int, b: int, beta: float, bias: int, stream: int) -> None:
        """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c + bias (n). With a beta of 0, c may hold anything, even NaN.

        The arrays are those of CudaDevice.gemm: float32 or bf16, batches too. They and the stream are given by their addresses.
        The bias has the dtype of c; 0 stands for none. A batch adds it to each product.
        problem: (c.shape, c.strides, a.shape, a.strides, b.shape, b.strides, c.itemsize, a.itemsize), checked before
        Raises RuntimeError if cuBLASLt cannot compute this.
        """
        try:
            product, layout_c, layout_a, layout_b, algorithm = self.plan(
                problem, alignment(c), alignment(a), alignment(b), alignment(bias))
            if bias:
                self.set("MatmulDesc", product, BIAS_POINTER=bias)
            self.alpha.value, self.beta.value = alpha, beta
            self.check(self.library.cublasLtMatmul(
                self.handle, product, ctypes.byref(self.alpha), b, layout_b, a, layout_a, ctypes.byref(self.beta),
                c, layout_c, c, layout_c, algorithm, self.workspace, self.workspace_bytes, stream))
        except RuntimeError as error:
            raise RuntimeError(f"{error}: c, a and b with shapes and strides {problem[:6]} and item sizes {problem[6:]}, at "
                               f"{c:#x}, {a:#x} and {b:#x}, bias at {bias:#x}") from None

    def make_plan(self, problem, alignment_c, alignment_a, alignment_b, alignment_bias):
        """The descriptors of the product, of the layouts of c, a and b, and the algorithm. They are never freed.

        cuBLASLt is column-major: it takes a row-major matrix for its transpose. So it is asked for c.T = b.T @ a.T: its A is b,
        its B is a. Both its C, which it reads, and its D, which it writes, are c.
        """
        shape_c, strides_c, shape_a, strides_a, shape_b, strides_b, itemsize_c, itemsize = problem
        _, layout_c = self.layout(shape_c, strides_c, itemsize_c)
        transposed_a, layout_a = self.layout(shape_a, strides_a, itemsize)
        transposed_b, layout_b = self.layout(shape_b, strides_b, itemsize)
        product = self.create("MatmulDesc", self.compute_type, CUDA_R_32F, TRANSA=transposed_b, TRANSB=transposed_a)
        if alignment_bias:      # the choice of an algorithm reads nothing at the address, but depends on its alignment
            self.set("MatmulDesc", product, EPILOGUE=CUBLASLT_EPILOGUE_BIAS, BIAS_POINTER=alignment_bias)
        # An algorithm may split sums into parts: then it may not round these to bf16 before it adds them.
        reductions = CUBLASLT_REDUCTION_SCHEME_MASK if itemsize_c == 4 else CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
        preference = self.create("MatmulPreference", MAX_WORKSPACE_BYTES=self.workspace_bytes, REDUCTION_SCHEME_MASK=reductions,
                                 MIN_ALIGNMENT_A_BYTES=alignment_b, MIN_ALIGNMENT_B_BYTES=alignment_a,
                                 MIN_ALIGNMENT_C_BYTES=alignment_c, MIN_ALIGNMENT_D_BYTES=alignment_c)
        result, found = HeuristicResult(status=CUBLAS_STATUS_NOT_SUPPORTED), INT()
        self.check(self.library.cublasLtMatmulAlgoGetHeuristic(
            self.handle, product, layout_b, layout_a, layout_c, layout_c, preference, 1,
            ctypes.byref(result), ctypes.byref(found)))
        self.check(result.status)       # as above if none was found
        return product, layout_c, layout_a, layout_b, ctypes.byref(result)

    def layout(self, shape, strides, itemsize):
        """Whether matrices are transposed (1) or not (0), and the descriptor of how they lie in memory.

        What cuBLASLt calls columns is contiguous: our rows, or the columns of a transposed view. The leading dimension is how
        many numbers apart they start. The stride of a single one means nothing, but cuBLASLt requires at least its length.
        """
        transposed = int(strides[-1] != itemsize)
        count, length = shape[-2:][::-1] if transposed else shape[-2:]
        leading_dimension = max(strides[-1 if transposed else -2] // itemsize, length)
        batch = dict(BATCH_COUNT=shape[0], STRIDED_BATCH_OFFSET=strides[0] // itemsize) if len(shape) == 3 else {}
        kind = CUDA_R_32F if itemsize == 4 else CUDA_R_16BF
        return transposed, self.create("MatrixLayout", kind, length, count, leading_dimension, **batch)

    def create(self, kind, *values, **attributes):
        """The address of a new descriptor, or with a kind of "" of a handle."""
        created = POINTER()
        self.check(getattr(self.library, f"cublasLt{kind}Create")(ctypes.byref(created), *values))
        self.set(kind, created.value, **attributes)
        return created.value

    def set(self, kind, descriptor, **attributes):
        for name, value in attributes.items():
            number, c_type = ATTRIBUTES[kind][name]
            self.check(getattr(self.library, f"cublasLt{kind}SetAttribute")(
                descriptor, number, ctypes.byref(c_type(value)), ctypes.sizeof(c_type)))

    def check(self, status):
        if status:
            raise RuntimeError(f"cuBLASLt: {self.library.cublasLtGetStatusName(status).decode()}")
