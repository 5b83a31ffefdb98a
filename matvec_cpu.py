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
HALF, BYTE, SHORTS = ir.HalfType(), ir.IntType(8), ir.VectorType(INT16, QUANT_GROUP)


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
# INPUT_ROWS rows of activations are multiplied with WEIGHT_ROWS rows of a weight at once. Against integers, activations are
# integers, too: a row of them is rounded to 16 bits, so that the sum over a group is exact. Several rows of a weight hide the
# latency of the additions. A single one is read faster from memory, since rows follow one another there.

INPUT_ROWS = 4
WEIGHT_ROWS = {types.float32: 1, types.uint16: 1, types.int8: 2, types.uint8: 2}
FLOAT_GROUP = 64            # numbers of a weight that are read at a time, if they are no integers
FLOATS_PREFETCHED = 2048    # bytes ahead, in rows of floats
LARGEST_INT16 = np.float32(32767)


def factors(inp, weight):
    """What is multiplied with this weight: inp (N, C), float32, or integers, and the scales of its rows, (N), or none."""
    raise NotImplementedError("only compiled code calls it")


@overload(factors)
def compile_factors(inp, weight):
    if weight.dtype in BLOCK_BYTES:
        return lambda inp, weight: round_activations(inp)
    return lambda inp, weight: (inp, np.empty(0, dtype=np.float32))


@jit()      # reassociated, a product of large numbers would overflow
def round_activations(inp):
    """inp (N, C) as int16, and the scale of each row (N).

    The maximum is taken on the bits: without the sign bit, floats sort like integers with the same bits, and integer
    comparisons vectorize. Infinity and NaN sort above all numbers; they make the scale NaN, and everything computed from it.
    """
    N, C = inp.shape
    rounded, scales = np.empty((N, C), dtype=np.int16), np.empty(N, dtype=np.float32)
    for n in range(N):
        bits = inp[n].view(np.int32)
        largest_bits = np.int32(0)
        for c in range(C):
            largest_bits = np.int32(max(largest_bits, bits[c] & np.int32(0x7fffffff)))
        largest = np.int32(largest_bits).view(np.float32)
        finite = np.float32(1e-33) < largest and largest_bits < np.int32(0x7f800000)     # 32767 / 1e-33 is still a float
        if not finite:
            scales[n], rounded[n, :] = largest * np.float32(0), 0
            continue
        factor = LARGEST_INT16 / largest
        scales[n] = largest / LARGEST_INT16
        for c in range(C):
            rounded[n, c] = np.int16(np.floor(inp[n, c] * factor + np.float32(0.5)))
    return rounded, scales


@intrinsic
def dot_products(typing, out, inp, weight):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T over the whole groups of each row; the caller adds the rest.

    inp is the first of `factors`. N is at most INPUT_ROWS, OC at most WEIGHT_ROWS.
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
    distance = 1
    while len(vectors) > 1:     # one vector of every two, with the lanes of both side by side
        first, second = halves_to_swap(distance)
        vectors = [build.fadd(shuffle(build, *pair, first), shuffle(build, *pair, second))
                   for pair in zip(vectors[::2], vectors[1::2])]
        distance *= 2
    [total] = vectors
    while distance < LANES:
        total = build.fadd(total, shuffle(build, total, total, [lane ^ distance for lane in range(LANES)]))
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
    totals = {(n, i): build.phi(VECTOR) for n in range(len(input_rows)) for i in range(len(weight_rows))}
    build.cbranch(build.icmp_signed("<", g, groups), body, after)

    build.position_at_end(body)
    add_group = add_group_of_integers if dtype in BLOCK_BYTES else add_group_of_floats
    sums = add_group(build, dtype, g, input_rows, weight_rows, totals)
    for phi, start, following in [(g, INT64(0), build.add(g, INT64(1)))] + [
            (total, VECTOR(None), sums[ni]) for ni, total in totals.items()]:
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
    offset = build.mul(g, INT64(BLOCK_BYTES[dtype]))
    input_offset = build.mul(g, INT64(2 * QUANT_GROUP))
    inputs = [load_as(build, SHORTS, row, input_offset) for row in input_rows]
    for i, row in enumerate(weight_rows):
        scale = splat(build, build.fpext(load_as(build, HALF, row, offset), FLOAT))
        after_scale = build.add(offset, INT64(2))
        if dtype == types.int8:
            weights = build.sext(load_as(build, ir.VectorType(BYTE, QUANT_GROUP), row, after_scale), SHORTS)
        else:
            half = ir.VectorType(INT16, QUANT_GROUP // 2)
            both = build.zext(load_as(build, ir.VectorType(BYTE, QUANT_GROUP // 2), row, after_scale), half)
            lower = build.sub(build.and_(both, half([15] * 16)), half([8] * 16))
            upper = build.sub(build.and_(both, half([240] * 16)), half([128] * 16))      # times 16
        for n in range(len(input_rows)):
            if dtype == types.int8:
                products = sums_of_pairs(build, inputs[n], weights)
            else:
                first, second = (shuffle(build, inputs[n], inputs[n], range(start, start + 16)) for start in (0, 16))
                sixteenfold = sums_of_pairs(build, second, upper)
                products = build.add(sums_of_pairs(build, first, lower), build.ashr(sixteenfold, INTEGERS([4] * LANES)))
            products = build.sitofp(products, VECTOR)
            sums[n, i] = build.fadd(build.fmul(products, scale, flags=FUSED), totals[n, i], flags=FUSED)
        prefetch(build, pointer(build, build.add(build.add(row, offset), INT64(PREFETCH_AHEAD))), level=2)
    return sums


# x86's multiplication of int16, which adds neighboring products: length of the vectors -> feature and LLVM's name.
MULTIPLY_PAIRS = {32: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512"), 16: ("avx2", "llvm.x86.avx2.pmadd.wd"),
                  8: ("sse2", "llvm.x86.sse2.pmadd.wd")}


def sums_of_pairs(build, a, b):
    """A vector of int32 whose LANES lanes sum to the dot product of two vectors of int16."""
    total = INTEGERS(None)
    length = min(a.type.count, 2 * LANES)
    feature, name = MULTIPLY_PAIRS[length]
    kind = ir.VectorType(INT32, length // 2)
    for start in range(0, a.type.count, length):
        pair = [shuffle(build, vector, vector, range(start, start + length)) for vector in (a, b)]
        if feature in FEATURES:
            sums = call(build, name, kind, pair)
        else:
            every_other = [[build.sext(shuffle(build, vector, vector, range(first, length, 2)), kind) for vector in pair]
                           for first in (0, 1)]
            sums = build.add(*(build.mul(*factors) for factors in every_other))
        if length // 2 < LANES:
            sums = shuffle(build, sums, kind(None), range(LANES))
        total = build.add(total, sums)
    return total


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
def multiply_few_rows(out, inp, rounded, scales, weight, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), on one thread. rounded and scales are factors(inp, weight)."""
    N, OC = out.shape
    step, has_rest = rows_at_once(weight), inp.shape[1] % FLOAT_GROUP > 0
    for o in range(0, OC, step):
        part = slice(o, o + step)
        for n in range(0, N, INPUT_ROWS):
            tile = out[n:n + INPUT_ROWS, part]
            dot_products(tile, rounded[n:n + INPUT_ROWS], weight[part])
    for n in range(N):
        row = out[n]
        if scales.size > 0:
            for o in range(OC):
                row[o] *= scales[n]
        if has_rest:
            for o in range(OC):
                row[o] += rest_of_product(inp[n], weight[o])
        if bias.size > 0:
            for o in range(OC):
                row[o] += bias[o]
