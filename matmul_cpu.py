"""The inside of the CPU's matrix product: register tiles in LLVM, packing, blocking, and Numba's settings and cache folder.

kernels_cpu.py calls `sgemm`. Everything runs on one thread: kernels_cpu.py gives each thread a block of the result.
dev/derivations/matmul.md has the arithmetic; this file is about keeping the processor busy with it. Products of a few rows,
which are about reading weights from memory, are in matvec_cpu.py.
"""
import contextlib
import ctypes
import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

# Busy-wait iterations of idle OpenMP threads. GNU's default, milliseconds long, makes a step four times slower as soon as
# another program wants the same cores. This value costs nothing where none does.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys
from numba.extending import intrinsic, overload
from numba.np.numpy_support import from_dtype

from files import cache_folder, delete_unused


def use_kernel_cache():
    """Have Numba cache compiled kernels in a folder named by a hash of this file, matvec_cpu.py and kernels_cpu.py.

    Numba compiles a function again when its own file changes, but not when a function that it calls changes in another file:
    a kernel would keep running an old `sgemm`. A folder per content cannot be out of date. It lies in the user's cache folder,
    since the checkout may be read-only, below a folder for this checkout, in which earlier contents are deleted.
    """
    checkout = Path(__file__).resolve().parent
    sources = [(checkout / name).read_bytes() for name in ("kernels_cpu.py", "matmul_cpu.py", "matvec_cpu.py")]
    contents = hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]
    folder = cache_folder() / f"kernels-{hashlib.sha256(str(checkout).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    delete_unused(cache_folder().glob("kernels-*"))     # of other checkouts
    delete_unused((earlier for earlier in folder.iterdir() if earlier.name != contents), days=0)
    config.CACHE_DIR = str(folder / contents)


use_kernel_cache()

# Which instructions to use. The environment variable GPT2_CPU names a lesser processor than this one: then its instructions are
# used, here and by Numba, so that one machine can test several paths.
LACKING = {"amx": (), "avx512_bf16": ("amx",), "avx512": ("amx", "avx512bf16"), "avx2": ("amx", "avx512")}
AMX_TILES = 18      # number of the state component that Linux lends on request


def processor_features():
    """LLVM's names of this processor's features that are used."""
    features = llvm.get_host_cpu_features()
    level = os.environ.get("GPT2_CPU", "amx")
    if level not in LACKING:
        print(f"error: the environment variable GPT2_CPU is {level!r}, expected one of {', '.join(LACKING)}", file=sys.stderr)
        sys.exit(2)
    lacking = LACKING[level]
    if features.get("amx-bf16") and not (level == "amx" and linux_lends_tiles()):
        lacking += "amx",
    if lacking:
        for name in features:
            features[name] = features[name] and not name.startswith(lacking)
        # Numba's, also part of the key of its cache. It reads the environment again when something there changes.
        config.CPU_FEATURES = os.environ["NUMBA_CPU_FEATURES"] = features.flatten()
    return {name for name, present in features.items() if present}


def linux_lends_tiles():
    """Ask Linux for AMX's tile registers. Threads that start later have them, too."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission = 158, 0x1023
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, AMX_TILES) == 0


FEATURES = processor_features()
HAS_BFLOAT16 = {"avx512f", "avx512bf16"} <= FEATURES and llvm.llvm_version_info >= (17,)     # before, bfloat16 was an integer
HAS_AMX = {"amx-tile", "amx-bf16"} <= FEATURES and HAS_BFLOAT16


def instructions(dtype):
    """Which instructions multiply numbers of this dtype, float32 or bfloat16."""
    if dtype == "bfloat16" and HAS_BFLOAT16:
        return "AMX" if HAS_AMX else "AVX512-BF16"
    simd = next((name for feature, name in SIMD.items() if feature in FEATURES), "the processor's")
    return f"{simd} in float32" if dtype == "bfloat16" else simd


SIMD = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse2": "SSE2", "neon": "NEON"}

# Sums may be reordered and products fused into sums: without that a sum does not vectorize. Unlike `fastmath=True`, this set
# does not assume that there are no NaNs: a NaN must come out wherever it went in.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


class KernelCache(FunctionCache):
    """Numba's cache of one compiled function. A damaged file counts as absent, and a full disk only costs the cache.

    Numba raises for either, at every run until somebody deletes the folder. Its file format is pickle, so any type of exception
    can come from a damaged file.
    """

    def load_overload(self, signature, target_context):
        """The function as it was compiled for a signature, or None.

        Numba's own method first imports everything that compiling needs, 0.17 s. Only compiling does, and then it is imported.
        """
        try:
            rtsys.initialize(target_context)
            with self._guard_against_spurious_io_errors():
                return self._load_overload(signature, target_context)
        except Exception:
            with contextlib.suppress(OSError):
                self.flush()        # or saving fails, too: it reads the index first
            return None

    def save_overload(self, signature, compiled):
        """Add what was compiled for a signature."""
        with contextlib.suppress(OSError):
            super().save_overload(signature, compiled)

    def is_intact(self, target, dtypes):
        """Whether a function for this target, a codegen's magic_tuple, is there and can be read.

        dtypes: parameter -> dtype of its arrays, for those that can have several

        Numba has no public way to ask. An index reads as empty if another version of Numba wrote it.
        """
        parameters = self._py_func.__code__.co_varnames
        try:
            files = [name for (signature, found, *_), name in self._cache_file._load_index().items()
                     if found == target and all(kind.dtype == from_dtype(np.dtype(dtypes[parameter]))
                                                for parameter, kind in zip(parameters, signature) if parameter in dtypes)]
            return bool(files) and all(map(self._cache_file._load_data, files))
        except Exception:
            return False


def jit(fastmath=False, **options):
    """numba.njit with this program's settings and a KernelCache.

    If fastmath were left out, a function would inherit that of the first kernel which calls it.
    """
    def decorate(function):
        compiled = njit(error_model="numpy", fastmath=fastmath, **options)(function)
        compiled._cache = KernelCache(function)
        return compiled
    return decorate


helper = jit(fastmath=FASTMATH)


# ----------------------------------------------------------------------------------------------------------------------
# The matrix product on one thread
#
# A number that was loaded should be multiplied many times while it is in a register. So c is computed in tiles of some rows
# and some vectors, which stay in registers while they are summed: each step loads one row of b, and multiplies it by one
# number of a for every row of the tile. Beforehand b is packed, block by block: copied into the order in which it will be
# read. A block stays in the second-level cache while all of a passes by (Goto and van de Geijn 2008).
#
# The scratch memory that a product is given decides its format. Words of float32 are the numbers themselves. Words of uint32
# are pairs of bfloat16, neighbors along k: packing rounds to bfloat16 while it copies, and a is packed, too. Sums, and c, are
# float32 in either format. See dev/derivations/mixed_precision.md.
#
# Numba has no vector type. The functions that need one emit LLVM instructions. They take addresses as integers, and the
# distance from one row to the next in bytes.

LANES = 16 if "avx512f" in FEATURES else 8 if "avx" in FEATURES else 4     # words in a vector
BLOCK_DEPTH, BLOCK_COLUMNS = 768, 384     # of b: 1.2 MB of float32
BLOCK_ROWS = 1024                         # of a, where it is packed
LARGE_PAGE = 2 ** 21                      # bytes
WORDS = {"float32": np.float32, "bfloat16": np.uint32}      # of scratch memory, for the dtypes of products
SCRATCH = 3 * LARGE_PAGE // 4             # words of scratch memory per thread, for a block of b and one of a
PREFETCH_AHEAD = 7680                     # bytes: the hardware prefetcher stops at the end of a 4096-byte page


class Tile(NamedTuple):
    """A tile of c, (rows, vectors * LANES), is computed at a time, in steps of `depth` words along k."""
    numbers: int    # in a word
    rows: int
    vectors: int
    depth: int = 1


ROWS = 4 if "sse2" in FEATURES and "avx512f" not in FEATURES else 8     # as many as 16 or 32 vector registers hold
FLOAT32_TILE = Tile(numbers=1, rows=ROWS, vectors=3)
BFLOAT16_TILE = Tile(numbers=2, rows=2 * 16, vectors=2, depth=16) if HAS_AMX else Tile(numbers=2, rows=ROWS, vectors=3)

FLOAT, INT16, INT32, INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
ZERO = INT64(0)
VECTOR, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
FUSED = ("contract",)       # a product and a sum may become one instruction


def tile_of(scratch):
    """The Tile for a Numba array type of scratch memory."""
    return FLOAT32_TILE if scratch.dtype == types.float32 else BFLOAT16_TILE


def pointer(build, address, row=0, row_bytes=ZERO, number=ZERO):
    """A pointer to number `number` of row `row` of a matrix that starts at address."""
    start = build.add(address, build.mul(INT64(row), row_bytes))
    return build.gep(build.inttoptr(start, FLOAT.as_pointer()), [number])


def load(build, place):
    """The vector that starts at place."""
    return build.load(build.bitcast(place, VECTOR.as_pointer()), align=4)


def store(build, vector, place):
    build.store(vector, build.bitcast(place, VECTOR.as_pointer()), align=4)


def shuffle(build, first, second, lanes):
    """The vector of the given lanes: the first numbers count the lanes of first, those that follow the lanes of second."""
    return build.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes)))


def halves_to_swap(distance, lanes=LANES):
    """Lanes of two vectors for `shuffle`: groups of `distance` lanes, alternately from both, and those that were left out."""
    first = [lanes + j - distance if j & distance else j for j in range(lanes)]
    return first, [lanes + j if j & distance else j + distance for j in range(lanes)]


def splat(build, number, lanes=LANES):
    """The vector with number in every lane: a broadcast."""
    nothing = ir.VectorType(number.type, lanes)(ir.Undefined)
    return shuffle(build, build.insert_element(nothing, number, INT32(0)), nothing, [0] * lanes)


def clamped_row_indices(build, rows, count):
    """The indices 0 ... count - 1, those past the last of `rows` rows replaced by the last."""
    last = build.sub(rows, INT64(1))
    return [build.select(build.icmp_signed("<", last, INT64(r)), last, INT64(r)) for r in range(count)]


def call(build, name, result, arguments):
    """Call one of LLVM's intrinsics."""
    kinds = [argument.type for argument in arguments]
    module = build.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, kinds), name)
    return build.call(function, arguments)


def prefetch(build, place, level=1):
    """Prefetch the cache line at place into the first- or second-level cache."""
    byte = ir.IntType(8).as_pointer()
    function = build.module.declare_intrinsic("llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *[INT32] * 3]))
    for_reading, kept_near, data = INT32(0), INT32(4 - level), INT32(1)
    build.call(function, [build.bitcast(place, byte), for_reading, kept_near, data])


# ----------------------------------------------------------------------------------------------------------------------
# Words of two bfloat16: the upper halves of two float32, rounded to nearest, ties to even

class BFloat16Type(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat16Type)

    def __hash__(self):
        return hash(BFloat16Type)


PAIRS = ir.VectorType(BFloat16Type(), 2 * LANES)


def halves(build, words):
    """The first and the second numbers of a vector of words, as float32."""
    bits = build.bitcast(words, INTEGERS)
    first = build.shl(bits, INTEGERS([16] * LANES))
    second = build.and_(bits, INTEGERS([0xffff0000] * LANES))
    return build.bitcast(first, VECTOR), build.bitcast(second, VECTOR)


def rounded_bits(build, vector):
    """The bits of bfloat16 in the lower halves of integers. Adding half a unit, less one if the last bit is 0, rounds."""
    bits = build.bitcast(vector, INTEGERS)
    upper = build.lshr(bits, INTEGERS([16] * LANES))
    odd = build.and_(upper, INTEGERS([1] * LANES))
    rounded = build.lshr(build.add(build.add(bits, INTEGERS([0x7fff] * LANES)), odd), INTEGERS([16] * LANES))
    quiet = build.or_(upper, INTEGERS([0x40] * LANES))      # a NaN, which adding could turn into infinity or zero
    return build.select(build.fcmp_unordered("uno", vector, vector), quiet, rounded)


def side_by_side(build, first, second):
    """The numbers of two vectors in bfloat16, first those of one and then those of the other."""
    return call(build, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS, [second, first])


def words_of(build, first, second):
    """The words whose first numbers are those of one vector, and whose second numbers are those of another."""
    if HAS_BFLOAT16:
        shorts = build.bitcast(side_by_side(build, first, second), ir.VectorType(INT16, 2 * LANES))
        order = [half + lane for lane in range(LANES) for half in (0, LANES)]
        return build.bitcast(shuffle(build, shorts, shorts, order), VECTOR)
    upper = build.shl(rounded_bits(build, second), INTEGERS([16] * LANES))
    return build.bitcast(build.or_(upper, rounded_bits(build, first)), VECTOR)


def load_words(build, tile, down, place, row_bytes):
    """A vector of words, read from place. In a word of two numbers the second one stands below the first, or right of it."""
    if tile.numbers == 1:
        return load(build, place)
    first = load(build, place)
    if down:
        below = build.inttoptr(build.add(build.ptrtoint(place, INT64), row_bytes), FLOAT.as_pointer())
        return words_of(build, first, load(build, below))
    second = load(build, build.gep(place, [INT64(LANES)]))
    if HAS_BFLOAT16:
        return build.bitcast(side_by_side(build, first, second), VECTOR)
    even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
    return words_of(build, shuffle(build, first, second, even), shuffle(build, first, second, odd))


def multiply_add(build, tile, number, vector, total):
    """total + number * vector, where words of two numbers give two products."""
    if tile.numbers == 1:
        return build.fadd(build.fmul(number, vector, flags=FUSED), total, flags=FUSED)
    if HAS_BFLOAT16:
        pairs = [build.bitcast(words, PAIRS) for words in (number, vector)]
        return call(build, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, [total, *pairs])
    for pair in zip(halves(build, number), halves(build, vector)):
        total = build.fadd(build.fmul(*pair, flags=FUSED), total, flags=FUSED)
    return total


@helper
def bfloat16_bits(x):
    """The bits of a number rounded to bfloat16, uint32: `rounded_bits` for a single number."""
    bits = np.float32(x).view(np.uint32)
    if np.isnan(x):
        return np.uint32((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint32((bits + np.uint32(0x7fff) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@helper
def bfloat16_number(bits):
    """The float32 number whose upper half has these bits, uint32 or uint16."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def as_factor(x, scratch):
    """A float32 number as products with this scratch memory see it: rounded to bfloat16, or as it is."""
    raise NotImplementedError("only compiled code calls it")


@overload(as_factor)
def compile_as_factor(x, scratch):
    if scratch.dtype == types.float32:
        return lambda x, scratch: x
    return lambda x, scratch: bfloat16_number(bfloat16_bits(x))


@intrinsic
def tile_shape(typing, scratch):
    """The Tile of this scratch memory, as a tuple."""
    def emit(context, build, signature, arguments):
        return context.make_tuple(build, signature.return_type, [INT64(size) for size in tile_of(scratch)])

    return types.UniTuple(types.intp, len(Tile._fields))(scratch), emit


# ----------------------------------------------------------------------------------------------------------------------
# Tiles

@intrinsic
def multiply_tile(typing, scratch, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """c (tile's rows, vectors * LANES) = alpha * a (rows, depth) @ b (depth, vectors * LANES) + beta * c.

    a and b consist of the words of `scratch`. b is packed: its rows follow one another. If a has fewer rows than the tile, its
    last row is used for the missing ones. On AMX a is packed, too, and alpha is 1, beta 0 or 1.
    """
    def emit(context, build, signature, arguments):
        tile = tile_of(scratch)
        _, vectors, *others = arguments
        end = build.append_basic_block()
        choice = build.switch(vectors, end)
        for width in range(1, tile.vectors + 1):
            block = build.append_basic_block()
            choice.add_case(INT64(width), block)
            build.position_at_end(block)
            (emit_amx_tile if uses_amx(tile) else emit_tile)(build, tile, width, *others)
            build.branch(end)
        build.position_at_end(end)
        return context.get_dummy_value()

    address = stride = count = types.intp
    return types.void(scratch, count, address, stride, types.float32, types.float32, address, stride, count, address,
                      count), emit


def emit_tile(build, tile, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """The instructions of `multiply_tile` for one width: a loop over depth. Its phi nodes are the sums, held in registers."""
    positions = [(r, v) for r in range(tile.rows) for v in range(vectors)]
    places = {(r, v): pointer(build, c, r, c_row, INT64(v * LANES)) for r, v in positions}
    for place in places.values():
        prefetch(build, place)
    a_rows = [build.add(a, build.mul(r, a_row)) for r in clamped_row_indices(build, rows, tile.rows)]

    before, loop, after = build.block, build.append_basic_block(), build.append_basic_block()
    build.branch(loop)
    build.position_at_end(loop)
    k = build.phi(INT64)
    sums = {rv: build.phi(VECTOR) for rv in positions}
    b_row = build.mul(k, INT64(vectors * LANES))
    b_vectors = [load(build, pointer(build, b, number=build.add(b_row, INT64(v * LANES)))) for v in range(vectors)]
    prefetch(build, pointer(build, b, number=build.add(b_row, INT64(PREFETCH_AHEAD // 4))))
    sums_after = {}
    for r in range(tile.rows):
        number = splat(build, build.load(pointer(build, a_rows[r], number=k)))
        for v in range(vectors):
            sums_after[r, v] = multiply_add(build, tile, number, b_vectors[v], sums[r, v])
    k_after = build.add(k, INT64(1))
    for phi, first, following in [(k, INT64(0), k_after)] + [(sums[rv], VECTOR(None), sums_after[rv]) for rv in positions]:
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)
    build.cbranch(build.icmp_signed("<", k_after, depth), loop, after)

    build.position_at_end(after)
    alphas, betas = splat(build, alpha), splat(build, beta)
    with build.if_else(build.fcmp_ordered("==", beta, FLOAT(0))) as (overwrite, add):
        with overwrite:
            for rv in positions:
                store(build, build.fmul(alphas, sums_after[rv]), places[rv])
        with add:
            for rv in positions:
                kept = build.fmul(betas, load(build, places[rv]))
                store(build, build.fadd(build.fmul(alphas, sums_after[rv], flags=FUSED), kept, flags=FUSED), places[rv])


# AMX has eight tile registers of 16 rows of 64 bytes. Four hold sums, two the rows of a, and two the columns of b.
AMX_ROWS, AMX_BYTES = 16, 64


def uses_amx(tile):
    return tile.depth > 1


def amx(build, instruction, *operands):
    """Emit one of AMX's instructions. Numbers of tile registers are constants."""
    operands = [ir.IntType(8)(operand) if isinstance(operand, int) else operand for operand in operands]
    call(build, f"llvm.x86.{instruction}", ir.VoidType(), operands)


def emit_amx_tile(build, tile, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """`emit_tile` on AMX: each instruction multiplies 16 rows of a by 16 columns of b, 32 numbers deep."""
    byte = ir.IntType(8).as_pointer()

    def place(address, offset):
        return build.inttoptr(build.add(address, offset), byte)

    sums = {(r, v): (2 * r + v, place(c, build.add(build.mul(INT64(r * AMX_ROWS), c_row), INT64(v * AMX_BYTES))))
            for r in range(2) for v in range(vectors)}
    a_tiles, b_tiles = (4, 5), (6, 7)
    with build.if_else(build.fcmp_ordered("==", beta, FLOAT(0))) as (overwrite, add):
        with overwrite:
            for register, _ in sums.values():
                amx(build, "tilezero", register)
        with add:
            for register, c_place in sums.values():
                amx(build, "tileloadd64", register, c_place, c_row)

    before, loop, after = build.block, build.append_basic_block(), build.append_basic_block()
    build.branch(loop)
    build.position_at_end(loop)
    k = build.phi(INT64)
    b_row = INT64(vectors * AMX_BYTES)
    for v in range(vectors):
        amx(build, "tileloadd64", b_tiles[v], place(b, build.add(build.mul(k, b_row), INT64(v * AMX_BYTES))), b_row)
    for r in range(2):
        offset = build.add(build.mul(INT64(r * AMX_ROWS), a_row), build.mul(k, INT64(4)))
        amx(build, "tileloadd64", a_tiles[r], place(a, offset), a_row)
        for v in range(vectors):
            amx(build, "tdpbf16ps", sums[r, v][0], a_tiles[r], b_tiles[v])
    k_after = build.add(k, INT64(tile.depth))
    k.add_incoming(INT64(0), before)
    k.add_incoming(k_after, build.block)
    build.cbranch(build.icmp_signed("<", k_after, depth), loop, after)

    build.position_at_end(after)
    for register, c_place in sums.values():
        amx(build, "tilestored64", register, c_place, c_row)


@intrinsic
def configure_tiles(typing, scratch):
    """On AMX, set the shape of the tile registers: all of them 16 x 64 bytes. A thread does it before each product."""
    def emit(context, build, signature, arguments):
        if uses_amx(tile_of(scratch)):
            # Bytes: palette 1, 15 unused, two for the width of each of 16 registers, one for its height.
            shape = bytes([1] + 15 * [0] + 8 * [AMX_BYTES, 0] + 16 * [0] + 8 * [AMX_ROWS] + 8 * [0])
            constant = context.insert_const_bytes(build.module, shape, "tile_configuration")
            amx(build, "ldtilecfg", constant)
        return context.get_dummy_value()

    return types.void(scratch), emit


@intrinsic
def release_tiles(typing, scratch):
    """On AMX, give the tile registers back, so that Linux need not save them when it switches threads."""
    def emit(context, build, signature, arguments):
        if uses_amx(tile_of(scratch)):
            amx(build, "tilerelease")
        return context.get_dummy_value()

    return types.void(scratch), emit


# ----------------------------------------------------------------------------------------------------------------------
# Packing

def packing_intrinsics(down):
    """The two functions below for words whose second number stands `down`, below the first one, or else right of it."""
    @intrinsic
    def transpose_square(typing, words, out, out_row, inp, inp_row):
        """out (LANES, LANES) words = inp.T, in log2(LANES) rounds; each swaps parts of pairs of rows."""
        tile, across = tile_of(words), not down
        rows_in_a_word = tile.numbers if across else 1

        def emit(context, build, signature, arguments):
            _, out, out_row, inp, inp_row = arguments
            rows = [load_words(build, tile, across, pointer(build, inp, r * rows_in_a_word, inp_row), inp_row)
                    for r in range(LANES)]
            distance = 1
            while distance < LANES:
                upper, lower = halves_to_swap(distance)
                for r in range(LANES):
                    if not r & distance:
                        pair = rows[r], rows[r + distance]
                        rows[r], rows[r + distance] = shuffle(build, *pair, upper), shuffle(build, *pair, lower)
                distance *= 2
            for r in range(LANES):
                store(build, rows[r], pointer(build, out, r, out_row))
            return context.get_dummy_value()

        return types.void(words, *[types.intp] * 4), emit

    @intrinsic
    def copy_vector(typing, words, out, inp, inp_row):
        """out (LANES) words = inp."""
        def emit(context, build, signature, arguments):
            _, out, inp, inp_row = arguments
            store(build, load_words(build, tile_of(words), down, pointer(build, inp), inp_row), pointer(build, out))
            return context.get_dummy_value()

        return types.void(words, *[types.intp] * 3), emit

    return transpose_square, copy_vector


def make_pack(down):
    """`pack` for words whose second number stands `down`, below the first one, or else right of it."""
    transpose_square, copy_vector = packing_intrinsics(down)

    @helper
    def pack(out, height, width, inp):
        """out (height, width), flat, in words = inp (rows, columns), padded with zeros. inp may be a matrix's transpose."""
        numbers, _, _, _ = tile_shape(out)
        below, right = (numbers, 1) if down else (1, numbers)       # numbers of inp from one word to the next
        rows, columns = inp.shape
        done_rows, done_columns = rows // below, columns // right // LANES * LANES
        to, source = out.ctypes.data, inp.ctypes.data
        if inp.strides[1] == 4:
            row = inp.strides[0]
            for i in range(done_rows):
                for j in range(0, done_columns, LANES):
                    copy_vector(out, to + 4 * (i * width + j), source + i * below * row + 4 * j * right, row)
        else:
            column = inp.strides[1]
            done_rows = done_rows // LANES * LANES
            for j in range(0, done_columns, LANES):
                for i in range(0, done_rows, LANES):
                    transpose_square(out, to + 4 * (i * width + j), 4 * width, source + j * right * column + 4 * i * below,
                                     column)
        for i in range(height):
            for j in range(done_columns if i < done_rows else 0, width):
                first, second = (i * below, j * right), (i * below + below - 1, j * right + right - 1)
                number = inp[first] if first[0] < rows and first[1] < columns else np.float32(0)
                if numbers == 1:
                    out[i * width + j] = number
                else:
                    other = inp[second] if second[0] < rows and second[1] < columns else np.float32(0)
                    out[i * width + j] = bfloat16_bits(number) | bfloat16_bits(other) << np.uint32(16)

    return pack


pack_rows, pack_columns = make_pack(down=False), make_pack(down=True)   # of a, of b: along k


def in_large_pages(shape, dtype=np.float32):
    """An uninitialized array that starts at a multiple of 2 MB, so that Linux can put it in huge pages. Avoids TLB misses.

    NumPy asks Linux for huge pages for arrays of 4 MB and more.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + LARGE_PAGE, dtype=np.uint8)
    first = -memory.ctypes.data % LARGE_PAGE
    return memory[first:first + size].view(dtype).reshape(shape)


@helper
def ceil_div(length, size):
    """gpt2.ceil_div, for Numba."""
    return (length + size - 1) // size


@helper
def sgemm(c, alpha, a, b, beta, scratch):
    """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c, on one thread, in the format of scratch: SCRATCH words.

    The arrays are float32 and 2-D views, so column blocks and heads need no copies. The last axis of c is contiguous; of a and
    b either the last or the first (the transpose of a matrix). If beta is 0, c is overwritten, even where it was NaN. The order
    of the sum over k is the same everywhere in c.
    """
    # [:, :] turns whole arrays into views too, so that the rest is compiled for one type only.
    multiply(c[:, :], np.float32(alpha), a[:, :], b[:, :], np.float32(beta), scratch)


@helper
def multiply(c, alpha, a, b, beta, scratch):
    """`sgemm` on views, block by block: BLOCK_ROWS rows of a, BLOCK_DEPTH along k, BLOCK_COLUMNS columns of b."""
    numbers, tile_rows, tile_vectors, tile_depth = tile_shape(scratch)
    tile_columns = tile_vectors * LANES
    m, k = a.shape
    n = c.shape[1]
    packed_b, packed_a = scratch[:BLOCK_DEPTH * BLOCK_COLUMNS], scratch[BLOCK_DEPTH * BLOCK_COLUMNS:]
    edge = np.empty((tile_rows, tile_columns), dtype=np.float32)    # for a tile that extends past the edge of c
    packs_a = numbers > 1 or a.strides[1] != 4
    block_rows = BLOCK_ROWS if packs_a else m
    configure_tiles(scratch)
    for top in range(0, m, block_rows):
        bottom = min(top + block_rows, m)
        for start in range(0, k, BLOCK_DEPTH):
            stop = min(start + BLOCK_DEPTH, k)
            depth = ceil_div(ceil_div(stop - start, numbers), tile_depth) * tile_depth
            keep = beta if start == 0 else np.float32(1)
            a_start, a_row = a.ctypes.data + top * a.strides[0] + 4 * start, a.strides[0]
            if packs_a:
                width = ceil_div(depth, LANES) * LANES
                pack_rows(packed_a, bottom - top, width, a[top:bottom, start:stop])
                a_start, a_row = packed_a.ctypes.data, 4 * width
            for left in range(0, n, BLOCK_COLUMNS):
                right = min(left + BLOCK_COLUMNS, n)
                for column in range(left, right, tile_columns):
                    part = b[start:stop, column:min(column + tile_columns, right)]
                    pack_columns(packed_b[(column - left) * depth:], depth, ceil_div(part.shape[1], LANES) * LANES, part)
                for row in range(top, bottom, tile_rows):
                    rows = min(tile_rows, bottom - row)
                    for column in range(left, right, tile_columns):
                        columns = min(tile_columns, right - column)
                        vectors = ceil_div(columns, LANES)
                        inside = rows == tile_rows and columns == vectors * LANES
                        if tile_depth > 1:      # AMX can only add or overwrite
                            inside = inside and alpha == 1 and (keep == 0 or keep == 1)
                        to, to_row = (c.ctypes.data + row * c.strides[0] + 4 * column, c.strides[0]) if inside else (
                            edge.ctypes.data, edge.strides[0])
                        multiply_tile(scratch, vectors, to, to_row, alpha if inside else np.float32(1),
                                      keep if inside else np.float32(0), a_start + (row - top) * a_row, a_row, rows,
                                      packed_b.ctypes.data + 4 * (column - left) * depth, depth)
                        if not inside:
                            part = c[row:row + rows, column:column + columns]
                            for r in range(rows):
                                for j in range(columns):
                                    part[r, j] = alpha * edge[r, j] + (keep * part[r, j] if keep != 0 else np.float32(0))
    release_tiles(scratch)
