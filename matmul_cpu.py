"""The inside of the CPU's matrix product: register tiles in LLVM, packing, blocking, and Numba's settings and cache folder.

kernels_cpu.py calls `sgemm` and `multiply_few_rows`. Everything runs on one thread: kernels_cpu.py gives each thread a block
of the result. dev/derivations/matmul.md has the arithmetic; this file is about keeping the processor busy with it.
"""
import contextlib
import hashlib
import os
from pathlib import Path

# Busy-wait iterations of idle OpenMP threads. GNU's default, milliseconds long, makes a step four times slower as soon as
# another program wants the same cores. This value costs nothing where none does.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from files import cache_folder, delete_unused


def use_kernel_cache():
    """Have Numba cache compiled kernels in a folder named by a hash of this file and kernels_cpu.py.

    Numba compiles a function again when its own file changes, but not when a function that it calls changes in another file:
    a kernel would keep running an old `sgemm`. A folder per content cannot be out of date. It lies in the user's cache folder,
    since the checkout may be read-only, below a folder for this checkout, in which earlier contents are deleted.
    """
    checkout = Path(__file__).resolve().parent
    sources = [(checkout / name).read_bytes() for name in ("kernels_cpu.py", "matmul_cpu.py")]
    contents = hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]
    folder = cache_folder() / f"kernels-{hashlib.sha256(str(checkout).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    delete_unused(cache_folder().glob("kernels-*"))     # of other checkouts
    delete_unused((earlier for earlier in folder.iterdir() if earlier.name != contents), days=0)
    config.CACHE_DIR = str(folder / contents)


use_kernel_cache()

# Sums may be reordered and products fused into sums: without that a sum does not vectorize. Unlike `fastmath=True`, this set
# does not assume that there are no NaNs: a NaN must come out wherever it went in.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}



class KernelCache(FunctionCache):
    """Numba's cache of one compiled function. A damaged file counts as absent, and a full disk only costs the cache.

    Numba raises for either, at every run until somebody deletes the folder. Its file format is pickle, so any type of exception
    can come from a damaged file.
    """

    def load_overload(self, signature, target_context):
        """The function as it was compiled for a signature, or None."""
        try:
            return super().load_overload(signature, target_context)
        except Exception:
            with contextlib.suppress(OSError):
                self.flush()        # or saving fails, too: it reads the index first
            return None

    def save_overload(self, signature, compiled):
        """Add what was compiled for a signature."""
        with contextlib.suppress(OSError):
            super().save_overload(signature, compiled)

    def is_intact(self, target):
        """Whether a function for this target, a codegen's magic_tuple, is there and can be read.

        Numba has no public way to ask. An index reads as empty if another version of Numba wrote it.
        """
        try:
            files = [name for (_, found, *_), name in self._cache_file._load_index().items() if found == target]
            return bool(files) and all(map(self._cache_file._load_data, files))
        except Exception:
            return False


def jit(**options):
    """numba.njit with this program's settings and a KernelCache."""
    def decorate(function):
        compiled = njit(error_model="numpy", **options)(function)
        compiled._cache = KernelCache(function)
        return compiled
    return decorate


helper = jit(fastmath=FASTMATH)

QUANT_GROUP = 64        # numbers of an int8 weight that share a scale


# ----------------------------------------------------------------------------------------------------------------------
# The matrix product on one thread
#
# A number that was loaded should be multiplied many times while it is in a register. So c is computed in tiles of TILE_ROWS
# rows of TILE_VECTORS vectors, which stay in registers while they are summed: each step loads one row of b, and multiplies it
# by one number of a for every row of the tile. Beforehand b is packed, block by block: copied into the order in which it will
# be read. A block stays in the second-level cache while all of a passes by (Goto and van de Geijn 2008).
#
# Numba has no vector type. The functions that need one emit LLVM instructions. They take addresses as integers, and the
# distance from one row to the next in bytes.

FEATURES = llvm.get_host_cpu_features()
LANES = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx") else 4     # numbers in a vector
TILE_ROWS = 4 if FEATURES.get("sse2") and not FEATURES.get("avx512f") else 8   # as many as 16 or 32 vector registers hold
TILE_VECTORS = 3
TILE_COLUMNS = TILE_VECTORS * LANES
BLOCK_DEPTH, BLOCK_COLUMNS = 768, 384     # of b: 1.2 MB
LARGE_PAGE = 2 ** 21                      # bytes
SCRATCH = LARGE_PAGE // 4                 # float32 numbers of scratch memory per thread, for a packed block
BLOCK_ROWS = 1024                         # of a, where it has to be transposed
PREFETCH_AHEAD = 7680                     # bytes: the hardware prefetcher stops at the end of a 4096-byte page

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
ZERO = INT64(0)
VECTOR = ir.VectorType(FLOAT, LANES)


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
    """The vector of the given lanes: 0 to LANES - 1 are those of first, LANES and up those of second."""
    return build.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, LANES), list(lanes)))


def splat(build, number):
    """The vector with number in every lane: a broadcast."""
    nothing = VECTOR(ir.Undefined)
    return shuffle(build, build.insert_element(nothing, number, INT32(0)), nothing, [0] * LANES)


def clamped_row_indices(build, rows, count):
    """The indices 0 ... count - 1, those past the last of `rows` rows replaced by the last."""
    last = build.sub(rows, INT64(1))
    return [build.select(build.icmp_signed("<", last, INT64(r)), last, INT64(r)) for r in range(count)]


def prefetch(build, place, level=1):
    """Prefetch the cache line at place into the first- or second-level cache."""
    byte = ir.IntType(8).as_pointer()
    function = build.module.declare_intrinsic("llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *[INT32] * 3]))
    for_reading, kept_near, data = INT32(0), INT32(4 - level), INT32(1)
    build.call(function, [build.bitcast(place, byte), for_reading, kept_near, data])


@intrinsic
def multiply_tile(typing, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """c (TILE_ROWS, vectors * LANES) = alpha * a (rows, depth) @ b (depth, vectors * LANES) + beta * c.

    b is packed: its rows follow one another. If a has fewer than TILE_ROWS rows, its last row is used for the missing ones.
    """
    def emit(context, build, signature, arguments):
        vectors, *others = arguments
        end = build.append_basic_block()
        choice = build.switch(vectors, end)
        for width in range(1, TILE_VECTORS + 1):
            block = build.append_basic_block()
            choice.add_case(INT64(width), block)
            build.position_at_end(block)
            emit_tile(build, width, *others)
            build.branch(end)
        build.position_at_end(end)
        return context.get_dummy_value()

    address = stride = count = types.intp
    return types.void(count, address, stride, types.float32, types.float32, address, stride, count, address, count), emit


def emit_tile(build, vectors, c, c_row, alpha, beta, a, a_row, rows, b, depth):
    """The instructions of `multiply_tile` for one width: a loop over depth. Its phi nodes are the sums, held in registers."""
    tile = [(r, v) for r in range(TILE_ROWS) for v in range(vectors)]
    places = {(r, v): pointer(build, c, r, c_row, INT64(v * LANES)) for r, v in tile}
    for place in places.values():
        prefetch(build, place)
    a_rows = [build.add(a, build.mul(r, a_row)) for r in clamped_row_indices(build, rows, TILE_ROWS)]

    before, loop, after = build.block, build.append_basic_block(), build.append_basic_block()
    build.branch(loop)
    build.position_at_end(loop)
    k = build.phi(INT64)
    sums = {rv: build.phi(VECTOR) for rv in tile}
    b_row = build.mul(k, INT64(vectors * LANES))
    b_vectors = [load(build, pointer(build, b, number=build.add(b_row, INT64(v * LANES)))) for v in range(vectors)]
    prefetch(build, pointer(build, b, number=build.add(b_row, INT64(PREFETCH_AHEAD // 4))))
    fused, sums_after = ("contract",), {}
    for r in range(TILE_ROWS):
        number = splat(build, build.load(pointer(build, a_rows[r], number=k)))
        for v in range(vectors):
            sums_after[r, v] = build.fadd(build.fmul(number, b_vectors[v], flags=fused), sums[r, v], flags=fused)
    k_after = build.add(k, INT64(1))
    for phi, first, following in [(k, INT64(0), k_after)] + [(sums[rv], VECTOR(None), sums_after[rv]) for rv in tile]:
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)
    build.cbranch(build.icmp_signed("<", k_after, depth), loop, after)

    build.position_at_end(after)
    alphas, betas = splat(build, alpha), splat(build, beta)
    with build.if_else(build.fcmp_ordered("==", beta, FLOAT(0))) as (overwrite, add):
        with overwrite:
            for rv in tile:
                store(build, build.fmul(alphas, sums_after[rv]), places[rv])
        with add:
            for rv in tile:
                kept = build.fmul(betas, load(build, places[rv]))
                store(build, build.fadd(build.fmul(alphas, sums_after[rv], flags=fused), kept, flags=fused), places[rv])


@intrinsic
def transpose_square(typing, out, out_row, inp, inp_row):
    """out (LANES, LANES) = inp (LANES, LANES).T, in log2(LANES) rounds; each swaps parts of pairs of rows."""
    def emit(context, build, signature, arguments):
        out, out_row, inp, inp_row = arguments
        rows = [load(build, pointer(build, inp, r, inp_row)) for r in range(LANES)]
        distance = 1
        while distance < LANES:
            upper = [LANES + j - distance if j & distance else j for j in range(LANES)]
            lower = [LANES + j if j & distance else j + distance for j in range(LANES)]
            for r in range(LANES):
                if not r & distance:
                    pair = rows[r], rows[r + distance]
                    rows[r], rows[r + distance] = shuffle(build, *pair, upper), shuffle(build, *pair, lower)
            distance *= 2
        for r in range(LANES):
            store(build, rows[r], pointer(build, out, r, out_row))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


@intrinsic
def copy_vector(typing, out, inp):
    """out (LANES) = inp (LANES)."""
    def emit(context, build, signature, arguments):
        out, inp = arguments
        store(build, load(build, pointer(build, inp)), pointer(build, out))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


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
def pack(out, inp):
    """out (flat) = inp (depth, columns), in rows of whole vectors. inp may be the transpose of a matrix.

    Rows are padded with zeros; the products with those are never stored.
    """
    depth, columns = inp.shape
    row = ceil_div(columns, LANES) * LANES
    whole = columns // LANES * LANES
    to, source = out.ctypes.data, inp.ctypes.data
    if inp.strides[1] == 4:
        for k in range(depth):
            for c in range(0, whole, LANES):
                copy_vector(to + 4 * (k * row + c), source + k * inp.strides[0] + 4 * c)
            for c in range(whole, row):
                out[k * row + c] = inp[k, c] if c < columns else np.float32(0)
    else:
        whole_depth = depth // LANES * LANES
        for c in range(0, whole, LANES):
            for k in range(0, whole_depth, LANES):
                transpose_square(to + 4 * (k * row + c), 4 * row, source + c * inp.strides[1] + 4 * k, inp.strides[1])
        for c in range(row):
            for k in range(whole_depth if c < whole else 0, depth):
                out[k * row + c] = inp[k, c] if c < columns else np.float32(0)


@helper
def sgemm(c, alpha, a, b, beta, scratch):
    """c (m, n) = alpha * a (m, k) @ b (k, n) + beta * c, on one thread.

    The arrays are 2-D views, so column blocks and heads need no copies. The last axis of c is contiguous; of a and b either
    the last or the first (the transpose of a matrix). If beta is 0, c is overwritten, even where it was NaN. The order of the
    sum over k is the same everywhere in c. scratch holds SCRATCH numbers.
    """
    # [:, :] turns whole arrays into views too, so that the rest is compiled for one type only.
    multiply(c[:, :], np.float32(alpha), a[:, :], b[:, :], np.float32(beta), scratch)


@helper
def multiply(c, alpha, a, b, beta, scratch):
    """`sgemm` on views; if a is the transpose of a matrix, it is copied, BLOCK_ROWS rows at a time."""
    m, k = a.shape
    upright = a.strides[1] == 4
    rows = m if upright else min(m, BLOCK_ROWS)
    copy = np.empty((0 if upright else rows, ceil_div(k, LANES) * LANES), dtype=np.float32)
    for start in range(0, m, rows):
        part = a[start:start + rows, :]
        if not upright:
            pack(copy.reshape(-1), part)
            part = copy[:part.shape[0], :k]
        multiply_blocks(c[start:start + rows, :], alpha, part, b, beta, scratch)


@helper
def multiply_blocks(c, alpha, a, b, beta, packed):
    """`sgemm` for an `a` with contiguous rows, block by block of b; `packed` has room for one block."""
    m, n = c.shape
    k = a.shape[1]
    edge = np.empty((TILE_ROWS, TILE_COLUMNS), dtype=np.float32)    # for a tile that extends past the edge of c
    for block in range(0, n, BLOCK_COLUMNS):
        block_end = min(block + BLOCK_COLUMNS, n)
        for start in range(0, k, BLOCK_DEPTH):
            depth = min(BLOCK_DEPTH, k - start)
            keep = beta if start == 0 else np.float32(1)
            for column in range(block, block_end, TILE_COLUMNS):
                pack(packed[(column - block) * depth:], b[start:start + depth, column:min(column + TILE_COLUMNS, block_end)])
            for row in range(0, m, TILE_ROWS):
                rows = min(TILE_ROWS, m - row)
                for column in range(block, block_end, TILE_COLUMNS):
                    columns = min(TILE_COLUMNS, block_end - column)
                    vectors = ceil_div(columns, LANES)
                    inside = rows == TILE_ROWS and columns == vectors * LANES
                    multiply_tile(vectors, c.ctypes.data + row * c.strides[0] + 4 * column if inside else edge.ctypes.data,
                                  c.strides[0] if inside else edge.strides[0], alpha, keep if inside else np.float32(0),
                                  a.ctypes.data + row * a.strides[0] + 4 * start, a.strides[0], rows,
                                  packed.ctypes.data + 4 * (column - block) * depth, depth)
                    if not inside:
                        part = c[row:row + rows, column:column + columns]
                        for r in range(rows):
                            for j in range(columns):
                                part[r, j] = edge[r, j] + (keep * part[r, j] if keep != 0 else np.float32(0))


# ----------------------------------------------------------------------------------------------------------------------
# Dot products of a few rows of activations with a few rows of a weight, in LLVM's vectors like the tiles above
#
# INPUT_ROWS rows of activations are multiplied with WEIGHT_ROWS rows of a weight at once, or with INT8_ROWS of an int8 weight:
# there each group is summed by itself first, so that its scale multiplies LANES sums at once, which takes twice the registers.
# The hardware prefetcher follows four float32 rows read side by side; int8 rows need explicit prefetches.

INPUT_ROWS = 4
WEIGHT_ROWS = TILE_ROWS // 2
INT8_ROWS = WEIGHT_ROWS // 2
BYTES = ir.VectorType(ir.IntType(8), LANES)
INTEGERS = ir.VectorType(INT32, LANES)


@intrinsic
def dot_products(typing, out, inp, weight, scales):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T over the whole groups of each row; the caller adds the rest.

    The weight is float32, or int8 with scales (OC, groups). N is at most INPUT_ROWS, OC at most WEIGHT_ROWS or INT8_ROWS.
    """
    def emit(context, build, signature, arguments):
        arrays = [context.make_array(kind)(context, build, array) for kind, array in zip(signature.args, arguments)]
        emit_dot_products(build, *arrays, in_int8=weight.dtype == types.int8)
        return context.get_dummy_value()

    return types.void(out, inp, weight, scales), emit


def emit_dot_products(build, out, inp, weight, scales, in_int8):
    """Emit the loop over groups, once for every possible number of rows of inp."""
    N, C = build.extract_value(inp.shape, 0), build.extract_value(inp.shape, 1)
    columns = clamped_row_indices(build, build.extract_value(weight.shape, 0), INT8_ROWS if in_int8 else WEIGHT_ROWS)
    weight_rows = [row_address(build, weight, o) for o in columns]
    scale_rows = [row_address(build, scales, o) for o in columns] if in_int8 else None
    end = build.append_basic_block()
    choice = build.switch(N, end)
    for count in range(1, INPUT_ROWS + 1):
        block = build.append_basic_block()
        choice.add_case(INT64(count), block)
        build.position_at_end(block)
        input_rows = [row_address(build, inp, INT64(n)) for n in range(count)]
        sums = emit_loop_over_groups(build, input_rows, weight_rows, scale_rows, build.sdiv(C, INT64(QUANT_GROUP)))
        for (n, i), total in sums.items():
            distance = LANES // 2
            while distance > 0:    # halve the vector until its sum stands in its first lane
                moved = shuffle(build, total, total, [(lane + distance) % LANES for lane in range(LANES)])
                total = build.fadd(total, moved)
                distance //= 2
            place = pointer(build, row_address(build, out, INT64(n)), number=columns[i])
            build.store(build.extract_element(total, INT32(0)), place)
        build.branch(end)
    build.position_at_end(end)


def row_address(build, array, row):
    """The address of a row of a Numba array."""
    return build.add(build.ptrtoint(array.data, INT64), build.mul(row, build.extract_value(array.strides, 0)))


def emit_loop_over_groups(build, input_rows, weight_rows, scale_rows, groups):
    """Rows (n, i) -> the vector whose lanes sum to their dot product. scale_rows is None for a float32 weight."""
    fused = ("contract",)
    before, loop, body, after = build.block, *(build.append_basic_block() for _ in range(3))
    build.branch(loop)
    build.position_at_end(loop)
    g = build.phi(INT64)
    totals = {(n, i): build.phi(VECTOR) for n in range(len(input_rows)) for i in range(len(weight_rows))}
    build.cbranch(build.icmp_signed("<", g, groups), body, after)

    build.position_at_end(body)
    first = build.mul(g, INT64(QUANT_GROUP))
    sums = dict.fromkeys(totals, VECTOR(None)) if scale_rows else dict(totals)
    for v in range(0, QUANT_GROUP, LANES):
        number = build.add(first, INT64(v))
        if scale_rows:
            places = [build.inttoptr(build.add(row, number), BYTES.as_pointer()) for row in weight_rows]
            weights = [build.sitofp(build.sext(build.load(place, align=1), INTEGERS), VECTOR) for place in places]
        else:
            weights = [load(build, pointer(build, row, number=number)) for row in weight_rows]
        for n, row in enumerate(input_rows):
            inputs = load(build, pointer(build, row, number=number))
            for i in range(len(weights)):
                sums[n, i] = build.fadd(build.fmul(inputs, weights[i], flags=fused), sums[n, i], flags=fused)
    if scale_rows:
        scales = [splat(build, build.load(pointer(build, row, number=g))) for row in scale_rows]
        for n, i in sums:
            sums[n, i] = build.fadd(build.fmul(sums[n, i], scales[i], flags=fused), totals[n, i], flags=fused)
        for row in weight_rows:
            prefetch(build, pointer(build, build.add(build.add(row, first), INT64(PREFETCH_AHEAD))), level=2)
    for phi, start, following in [(g, INT64(0), build.add(g, INT64(1)))] + [
            (total, VECTOR(None), sums[ni]) for ni, total in totals.items()]:
        phi.add_incoming(start, before)
        phi.add_incoming(following, body)
    build.branch(loop)

    build.position_at_end(after)
    return totals


@jit(fastmath=FASTMATH - {"reassoc"})     # sums keep the order written here
def multiply_few_rows(out, inp, weight, scales, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), on one thread. The weight is int8 if there are scales."""
    N, OC = out.shape
    C = inp.shape[1]
    weight_rows = INT8_ROWS if scales.size > 0 else WEIGHT_ROWS
    for o in range(0, OC, weight_rows):
        part = slice(o, o + weight_rows)
        for n in range(0, N, INPUT_ROWS):
            tile, rows = out[n:n + INPUT_ROWS, part], inp[n:n + INPUT_ROWS]
            dot_products(tile, rows, weight[part], scales[part])
            for r in range(tile.shape[0]):
                for i in range(tile.shape[1]):
                    rest = bias[o + i] if bias.size > 0 else np.float32(0)
                    for c in range(C // QUANT_GROUP * QUANT_GROUP, C):
                        scale = scales[o + i, c // QUANT_GROUP] if scales.size > 0 else np.float32(1)
                        rest += rows[r, c] * np.float32(weight[o + i, c]) * scale
                    tile[r, i] += rest
