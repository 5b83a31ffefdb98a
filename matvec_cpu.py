"""Products of a few rows with weights of 32, 16, 8 or 4 bits, for decoding: the time goes into reading the weight once.

kernels_cpu.py calls `multiply_few_rows`, on one thread, and `widen` where a weight is needed in float32.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from matmul_cpu import (FASTMATH, FEATURES, FLOAT, FUSED, INT16, INT32, INT64, INTEGERS, LANES, PREFETCH_AHEAD, VECTOR,
                        bfloat16_number, call, clamped_row_indices, halves_to_swap, jit, load, pointer, prefetch, shuffle,
                        splat)

# ----------------------------------------------------------------------------------------------------------------------
# Weights (OC, C) that are not float32. The type of the array tells the format:
#
#     uint16    bfloat16
#     int8      GGUF's Q8_0: for each QUANT_GROUP numbers of a row a block of 34 bytes, a float16 scale and 32 integers from
#               -127 to 127. The number is the product of both.
#     uint8     GGUF's Q4_0: blocks of 18 bytes, a scale and 16 bytes. The lower halves of the bytes are the first 16 integers,
#               the upper halves the others; 8 is subtracted from each.
#
# The formats: https://github.com/ggml-org/ggml, src/ggml-common.h

QUANT_GROUP = 32
WEIGHT_DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8, "int4": np.uint8}
BLOCK_BYTES = {types.int8: 2 + QUANT_GROUP, types.uint8: 2 + QUANT_GROUP // 2}      # 8 or 4 bits a number, and the scale
HALF, BYTES = ir.HalfType(), ir.VectorType(ir.IntType(8), QUANT_GROUP)


@intrinsic
def float16_number(typing, bits):
    """The float32 number whose float16 has these bits (int)."""
    def emit(context, build, signature, arguments):
        return build.fpext(build.bitcast(build.trunc(arguments[0], INT16), HALF), FLOAT)

    return types.float32(types.intp), emit


@intrinsic
def float16_bits(typing, number):
    """The bits of a float32 rounded to float16, an int."""
    def emit(context, build, signature, arguments):
        return build.zext(build.bitcast(build.fptrunc(arguments[0], HALF), INT16), INT64)

    return types.intp(types.float32), emit


def number_at(weight, i):
    """Number i of a row of a weight in float32 or bfloat16, as float32."""
    raise NotImplementedError("only compiled code calls it")


@overload(number_at)
def compile_number_at(weight, i):
    if weight.dtype == types.float32:
        return lambda weight, i: weight[i]
    return lambda weight, i: bfloat16_number(weight[i])


def widen(out, weight):
    """out (C), float32 = a row of a weight of any format."""
    raise NotImplementedError("only compiled code calls it")


@overload(widen)
def compile_widen(out, weight):
    size = BLOCK_BYTES.get(weight.dtype, 0)

    def widen_floats(out, weight):
        for i in range(out.size):
            out[i] = number_at(weight, i)

    def widen_int8(out, weight):
        for g in range(out.size // QUANT_GROUP):
            block, part = weight[g * size:(g + 1) * size], out[g * QUANT_GROUP:(g + 1) * QUANT_GROUP]
            scale = float16_number(np.intp(np.uint8(block[0])) | np.intp(np.uint8(block[1])) << 8)
            for i in range(QUANT_GROUP):
                part[i] = scale * np.float32(block[2 + i])

    def widen_int4(out, weight):
        for g in range(out.size // QUANT_GROUP):
            block, part = weight[g * size:(g + 1) * size], out[g * QUANT_GROUP:(g + 1) * QUANT_GROUP]
            scale = float16_number(np.intp(block[0]) | np.intp(block[1]) << 8)
            for i in range(16):
                part[i] = scale * np.float32(np.int32(block[2 + i] & 15) - 8)
                part[16 + i] = scale * np.float32(np.int32(block[2 + i] >> 4) - 8)

    return {types.float32: widen_floats, types.uint16: widen_floats, types.int8: widen_int8,
            types.uint8: widen_int4}[weight.dtype]


@jit()      # no fused operations: as gguf rounds, bit for bit
def round_group(block, weight, bits):
    """block, as bytes = up to QUANT_GROUP numbers rounded to 8 or 4 bits. Infinity and NaN make all of them NaN."""
    largest, is_nan = weight[0], False
    for i in range(QUANT_GROUP):
        largest = weight[i] if abs(weight[i]) > abs(largest) else largest
        is_nan |= not np.isfinite(weight[i])
    scale = abs(largest) / np.float32(127) if bits == 8 else largest / np.float32(-8)
    inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
    scale_bits = float16_bits(np.float32(np.nan) if is_nan else scale)
    block[0], block[1] = scale_bits & 255, scale_bits >> 8
    block[2:] = 0
    for i in range(QUANT_GROUP):
        x = np.float32(0) if is_nan else weight[i] * inverse
        if bits == 8:
            size = abs(x)
            whole = np.floor(size)
            whole += np.floor(np.float32(2) * (size - whole))       # halves away from zero
            block[2 + i] = np.int32(whole if x > 0 else -whole) & 255
        else:
            number = min(15, np.int32(x + np.float32(8.5)))
            block[2 + i % 16] |= number << (4 if i >= 16 else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Dot products of a few rows of activations with a few rows of a weight, in LLVM's vectors like the tiles above
#
# INPUT_ROWS rows of activations are multiplied with WEIGHT_ROWS rows of a weight at once. Several rows of a weight hide the
# latency of the additions. A single one is read faster from memory, since rows follow one another there.
#
# Against integers, activations are integers, too: each group of them is rounded to 8 bits, with a scale of its own, as
# llama.cpp does. Sums over a group are exact. x86 multiplies bytes without a sign by bytes with a sign, and adds four products
# in one instruction. So a zero point z is added to the weights w to make them positive, which sum((w + z) * a) - z * sum(a)
# undoes. The last term is known beforehand: the sum starts there.

INPUT_ROWS = 4
WEIGHT_ROWS = {types.float32: 1, types.uint16: 1, types.int8: 2, types.uint8: 2}
ZERO_POINTS = {types.int8: 128, types.uint8: 8}
FLOAT_GROUP = 64                # numbers of a weight that are read at a time, if they are no integers
FLOATS_PREFETCHED = 2048        # bytes ahead, in rows of floats
LARGEST_INT8 = np.float32(127)
GROUP_WORDS = 2 + QUANT_GROUP // 4      # of rounded activations: the scale, a float32; where the sum starts; the integers
SUMS = {dtype: ir.VectorType(FLOAT, QUANT_GROUP // 4) if dtype in BLOCK_BYTES else VECTOR for dtype in WEIGHT_ROWS}


def factor(inp, weight):
    """What is multiplied with this weight: inp (N, C), float32, or what `round_activations` returns."""
    raise NotImplementedError("only compiled code calls it")


@overload(factor)
def compile_factor(inp, weight):
    zero_point = ZERO_POINTS.get(weight.dtype)
    return (lambda inp, weight: inp) if zero_point is None else lambda inp, weight: round_activations(inp, zero_point)


@jit()      # no fused or reordered operations: rounds alike everywhere
def round_activations(inp, zero_point):
    """inp (N, C), float32, rounded to 8 bits, as int32 (N, C / QUANT_GROUP * GROUP_WORDS).

    A group is its scale (the bits of a float32), -zero_point times the sum of its integers, and the integers, four in a word.
    The maximum is taken on the bits: without the sign bit, floats sort like integers with the same bits, and integer
    comparisons vectorize. Infinity and NaN sort above all numbers; they make the scale NaN, and everything computed from it.
    """
    N, C = inp.shape
    words = np.empty((N, C // QUANT_GROUP * GROUP_WORDS), dtype=np.int32)
    for n in range(N):
        for g in range(C // QUANT_GROUP):
            numbers, group = inp[n, g * QUANT_GROUP:(g + 1) * QUANT_GROUP], words[n, g * GROUP_WORDS:(g + 1) * GROUP_WORDS]
            bits, rounded = numbers.view(np.int32), group[2:].view(np.int8)
            largest_bits = np.int32(0)
            for i in range(QUANT_GROUP):
                largest_bits = np.int32(max(largest_bits, bits[i] & np.int32(0x7fffffff)))
            largest = np.int32(largest_bits).view(np.float32)
            finite = np.float32(1e-33) < largest and largest_bits < np.int32(0x7f800000)     # 127 / 1e-33 is still a float
            scale = largest / LARGEST_INT8 if finite else largest * np.float32(0)
            inverse = LARGEST_INT8 / largest if finite else np.float32(0)
            total = np.int32(0)
            for i in range(QUANT_GROUP):
                integer = np.int32(np.floor(numbers[i] * inverse + np.float32(0.5)) if finite else np.float32(0))
                rounded[i] = integer
                total += integer
            group[0], group[1] = np.float32(scale).view(np.int32), -zero_point * total
    return words


@intrinsic
def dot_products(typing, out, inp, weight):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T over the whole groups of each row; the caller adds the rest.

    inp is rows of what `factor` returned: against integers, rounded groups in place of (N, C) numbers. N is at most
    INPUT_ROWS, OC at most WEIGHT_ROWS.
    """
    def emit(context, build, signature, arguments):
        arrays = [context.make_array(kind)(context, build, array) for kind, array in zip(signature.args, arguments)]
        emit_dot_products(build, weight.dtype, *arrays)
        return context.get_dummy_value()

    return types.void(out, inp, weight), emit


def emit_dot_products(build, dtype, out, inp, weight):
    """Emit the loop over groups, once for every possible number of rows of inp."""
    group = BLOCK_BYTES.get(dtype, FLOAT_GROUP)
    N = build.extract_value(inp.shape, 0)
    groups = build.sdiv(build.extract_value(weight.shape, 1), INT64(group))
    columns = clamped_row_indices(build, build.extract_value(weight.shape, 0), WEIGHT_ROWS[dtype])
    weight_rows = [row_address(build, weight, o) for o in columns]
    end = build.append_basic_block()
    choice = build.switch(N, end)
    for count in range(1, INPUT_ROWS + 1):
        block = build.append_basic_block()
        choice.add_case(INT64(count), block)
        build.position_at_end(block)
        input_rows = [row_address(build, inp, INT64(n)) for n in range(count)]
        sums = emit_loop_over_groups(build, dtype, input_rows, weight_rows, groups)
        for n in range(count):
            totals = sums_of_lanes(build, [sums[n, i] for i in range(len(columns))])
            for i, column in enumerate(columns):
                place = pointer(build, row_address(build, out, INT64(n)), number=column)
                build.store(build.extract_element(totals, INT32(i)), place)
        build.branch(end)
    build.position_at_end(end)


def sums_of_lanes(build, vectors):
    """A vector whose first lanes are the sums of the lanes of 1, 2 or 4 vectors."""
    lanes, distance = vectors[0].type.count, 1
    while len(vectors) > 1:     # one vector of every two, with the lanes of both side by side
        first, second = halves_to_swap(distance, lanes)
        vectors = [build.fadd(shuffle(build, *pair, first), shuffle(build, *pair, second))
                   for pair in zip(vectors[::2], vectors[1::2])]
        distance *= 2
    [total] = vectors
    while distance < lanes:
        total = build.fadd(total, shuffle(build, total, total, [lane ^ distance for lane in range(lanes)]))
        distance *= 2
    return total


def row_address(build, array, row):
    """The address of a row of a Numba array."""
    return build.add(build.ptrtoint(array.data, INT64), build.mul(row, build.extract_value(array.strides, 0)))


def emit_loop_over_groups(build, dtype, input_rows, weight_rows, groups):
    """Rows (n, i) -> the vector whose lanes sum to their dot product."""
    before, loop, body, after = build.block, *(build.append_basic_block() for _ in range(3))
    build.branch(loop)
    build.position_at_end(loop)
    g = build.phi(INT64)
    totals = {(n, i): build.phi(SUMS[dtype]) for n in range(len(input_rows)) for i in range(len(weight_rows))}
    build.cbranch(build.icmp_signed("<", g, groups), body, after)

    build.position_at_end(body)
    add_group = add_group_of_integers if dtype in BLOCK_BYTES else add_group_of_floats
    sums = add_group(build, dtype, g, input_rows, weight_rows, totals)
    for phi, start, following in [(g, INT64(0), build.add(g, INT64(1)))] + [
            (total, SUMS[dtype](None), sums[ni]) for ni, total in totals.items()]:
        phi.add_incoming(start, before)
        phi.add_incoming(following, body)
    build.branch(loop)

    build.position_at_end(after)
    return totals


def load_as(build, kind, address, offset):
    """What lies `offset` bytes behind an address, wherever that is."""
    return build.load(build.inttoptr(build.add(address, offset), kind.as_pointer()), align=1)


def add_group_of_floats(build, dtype, g, input_rows, weight_rows, totals):
    """The totals with the products of group g, FLOAT_GROUP numbers, added."""
    sums = dict(totals)
    number_bytes = dtype.bitwidth // 8
    for v in range(0, FLOAT_GROUP, LANES):
        number = build.add(build.mul(g, INT64(FLOAT_GROUP)), INT64(v))
        if v * number_bytes % 64 == 0:      # once a cache line
            for row in weight_rows:
                ahead = build.add(build.mul(number, INT64(number_bytes)), INT64(FLOATS_PREFETCHED))
                prefetch(build, pointer(build, build.add(row, ahead)), level=2)
        if dtype == types.float32:
            weights = [load(build, pointer(build, row, number=number)) for row in weight_rows]
        else:
            offset = build.mul(number, INT64(2))
            bits = [load_as(build, ir.VectorType(INT16, LANES), row, offset) for row in weight_rows]
            weights = [build.bitcast(build.shl(build.zext(row, INTEGERS), INTEGERS([16] * LANES)), VECTOR) for row in bits]
        for n, row in enumerate(input_rows):
            inputs = load(build, pointer(build, row, number=number))
            for i in range(len(weights)):
                sums[n, i] = build.fadd(build.fmul(inputs, weights[i], flags=FUSED), sums[n, i], flags=FUSED)
    return sums


def add_group_of_integers(build, dtype, g, input_rows, weight_rows, totals):
    """The same for a block of integers."""
    sums = {}
    input_offset, offset = build.mul(g, INT64(4 * GROUP_WORDS)), build.mul(g, INT64(BLOCK_BYTES[dtype]))
    after_scale = build.add(offset, INT64(2))
    inputs = [group_of_activations(build, row, input_offset) for row in input_rows]
    for i, row in enumerate(weight_rows):
        scale = build.fpext(splat(build, load_as(build, HALF, row, offset), SUMS[dtype].count), SUMS[dtype])
        if dtype == types.int8:
            weights = build.xor(load_as(build, BYTES, row, after_scale), BYTES([ZERO_POINTS[dtype]] * QUANT_GROUP))
        else:
            half = ir.VectorType(BYTES.element, QUANT_GROUP // 2)
            both = load_as(build, half, row, after_scale)
            lower, upper = build.and_(both, half([15] * half.count)), build.lshr(both, half([4] * half.count))
            weights = shuffle(build, lower, upper, range(QUANT_GROUP))
        for n, (input_scale, start, integers) in enumerate(inputs):
            products = build.sitofp(sums_of_four(build, start, weights, integers), SUMS[dtype])
            both_scales = build.fmul(scale, splat(build, input_scale, SUMS[dtype].count))
            sums[n, i] = build.fadd(build.fmul(products, both_scales, flags=FUSED), totals[n, i], flags=FUSED)
        prefetch(build, pointer(build, build.add(build.add(row, offset), INT64(PREFETCH_AHEAD))), level=2)
    return sums


def group_of_activations(build, row, offset):
    """What `round_activations` wrote there: the scale, where the sum starts, as a vector, and the integers."""
    scale, start, integers = (load_as(build, kind, row, build.add(offset, INT64(at)))
                              for kind, at in ((FLOAT, 0), (INT32, 4), (BYTES, 8)))
    return scale, build.insert_element(ir.VectorType(INT32, QUANT_GROUP // 4)(None), start, INT32(0)), integers


def sums_of_four(build, start, weights, integers):
    """start plus products of bytes without and with a sign: the lanes of both sum to the dot product."""
    if "avxvnni" in FEATURES or {"avx512vnni", "avx512vl"} <= FEATURES:
        fours = [build.bitcast(vector, start.type) for vector in (weights, integers)]
        return call(build, "llvm.x86.avx512.vpdpbusd.256", start.type, [start, *fours])
    words = ir.VectorType(INT32, QUANT_GROUP)
    sums = build.mul(build.zext(weights, words), build.sext(integers, words))       # LLVM finds its multiplication of int16
    for first, second in (range(0, 32, 2), range(1, 32, 2)), (range(8), range(8, 16)):
        sums = build.add(shuffle(build, sums, sums, first), shuffle(build, sums, sums, second))
    return build.add(start, sums)


def rows_at_once(weight):
    """The number of a weight's rows that `dot_products` takes."""
    raise NotImplementedError("only compiled code calls it")


@overload(rows_at_once)
def compile_rows_at_once(weight):
    rows = WEIGHT_ROWS[weight.dtype]
    return lambda weight: rows


def rest_of_product(inp, weight):
    """The dot product of what is left of a row of inp (C) and of a weight behind their whole groups."""
    raise NotImplementedError("only compiled code calls it")


@overload(rest_of_product)
def compile_rest_of_product(inp, weight):
    def rest_of_floats(inp, weight):
        total = np.float32(0)
        for c in range(inp.size // FLOAT_GROUP * FLOAT_GROUP, inp.size):
            total += inp[c] * number_at(weight, c)
        return total

    return (lambda inp, weight: np.float32(0)) if weight.dtype in BLOCK_BYTES else rest_of_floats


@jit(fastmath=FASTMATH - {"reassoc"})     # sums keep the order written here
def multiply_few_rows(out, inp, rounded, weight, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), on one thread. rounded is factor(inp, weight)."""
    N, OC = out.shape
    step, has_rest = rows_at_once(weight), inp.shape[1] % FLOAT_GROUP > 0
    for o in range(0, OC, step):
        part = slice(o, o + step)
        for n in range(0, N, INPUT_ROWS):
            tile = out[n:n + INPUT_ROWS, part]
            dot_products(tile, rounded[n:n + INPUT_ROWS], weight[part])
    for n in range(N):
        row = out[n]
        if has_rest:
            for o in range(OC):
                row[o] += rest_of_product(inp[n], weight[o])
        if bias.size > 0:
            for o in range(OC):
                row[o] += bias[o]
