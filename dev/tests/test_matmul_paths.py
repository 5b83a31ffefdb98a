"""The paths of the matrix product: AMX without a processor that has it, and what is chosen for which processor.

`GPT2_CPU=avx2 python -m pytest dev/tests/test_kernels.py dev/tests/test_decode_kernels.py` tests all kernels on a lesser path.
"""
import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import njit
from numba.core import cgutils

import kernels_cpu
import kernels_float64 as exact
import matmul_cpu
from conftest import random_params
from dataloader import write_tokens
from gpt2 import Config
from matmul_cpu import FASTMATH, FLOAT, INT64, Tile
from model_files import save_model
from tokenizer import NO_TOKENIZER

ROOT = Path(matmul_cpu.__file__).parent
BYTE, SHORT = ir.IntType(8), ir.IntType(16)
CONFIG = Config(max_seq_len=64, vocab_size=300, padded_vocab_size=384, num_layers=1, num_heads=1, channels=32)
AMX_TILE = Tile(numbers=2, rows=32, vectors=2, depth=16)


class EmulatedAmx:
    """AMX's instructions as loops over arrays in memory, from Intel's manual: emits LLVM in the place of matmul_cpu.amx."""

    def __init__(self):
        self.tiles, self.shape = np.zeros((8, 16, 64), np.uint8), np.zeros(64, np.uint8)
        self.counts = {}

    def place(self, build, address, kind, *offsets):
        for offset in offsets:
            address = build.add(address, offset)
        return build.inttoptr(address, kind.as_pointer())

    def loaded(self, build, address, kind, *offsets):
        return build.load(self.place(build, address, kind, *offsets), align=1)

    def rows_and_bytes(self, build, register):
        """The height and width of a register: zero if nothing is configured."""
        shape = INT64(self.shape.ctypes.data)
        return (build.zext(self.loaded(build, shape, BYTE, INT64(48 + register)), INT64),
                build.zext(self.loaded(build, shape, SHORT, INT64(16 + 2 * register)), INT64))

    def tile(self, register):
        return INT64(self.tiles.ctypes.data + 1024 * register)

    def __call__(self, build, instruction, *operands):
        self.counts[instruction] = self.counts.get(instruction, 0) + 1
        getattr(self, instruction)(build, *operands)

    def ldtilecfg(self, build, pointer):
        cgutils.raw_memcpy(build, self.place(build, INT64(self.shape.ctypes.data), BYTE), pointer, INT64(64), 1)

    def tilerelease(self, build):
        for i in range(64):
            build.store(BYTE(0), self.place(build, INT64(self.shape.ctypes.data + i), BYTE))

    def tilezero(self, build, register):
        for i in range(0, 1024, 8):
            build.store(INT64(0), self.place(build, self.tile(register), INT64, INT64(i)))

    def copy(self, build, register, pointer, stride, to_tile):
        rows, width = self.rows_and_bytes(build, register)
        with cgutils.for_range(build, rows) as row:
            there = build.inttoptr(build.add(build.ptrtoint(pointer, INT64), build.mul(row.index, stride)), BYTE.as_pointer())
            here = self.place(build, self.tile(register), BYTE, build.mul(row.index, INT64(64)))
            cgutils.raw_memcpy(build, *((here, there) if to_tile else (there, here)), width, 1)

    def tileloadd64(self, build, register, pointer, stride):
        self.copy(build, register, pointer, stride, to_tile=True)

    def tilestored64(self, build, register, pointer, stride):
        self.copy(build, register, pointer, stride, to_tile=False)

    def tdpbf16ps(self, build, sums, a, b):
        rows, width = self.rows_and_bytes(build, sums)
        depth, _ = self.rows_and_bytes(build, b)

        def number(tile, row, pair, half):
            offset = build.add(build.mul(row, INT64(64)), build.add(build.mul(pair, INT64(4)), INT64(2 * half)))
            bits = build.zext(self.loaded(build, self.tile(tile), SHORT, offset), ir.IntType(32))
            return build.bitcast(build.shl(bits, ir.IntType(32)(16)), FLOAT)

        with cgutils.for_range(build, rows) as m, cgutils.for_range(build, depth) as k:
            with cgutils.for_range(build, build.sdiv(width, INT64(4))) as n:
                place = self.place(build, self.tile(sums), FLOAT, build.mul(m.index, INT64(64)), build.mul(n.index, INT64(4)))
                total = build.load(place)
                for half in 0, 1:
                    factors = number(a, m.index, k.index, half), number(b, k.index, n.index, half)
                    total = build.fadd(total, build.fmul(*factors))
                build.store(total, place)


@pytest.fixture
def amx(monkeypatch):
    """The emulated AMX, and a `multiply` that uses it."""
    if matmul_cpu.LANES != 16:
        pytest.skip("processors with AMX have AVX-512")
    emulated = EmulatedAmx()
    monkeypatch.setattr(matmul_cpu, "amx", emulated)
    monkeypatch.setattr(matmul_cpu, "BFLOAT16_TILE", AMX_TILE)
    return emulated, njit(error_model="numpy", fastmath=FASTMATH)(matmul_cpu.multiply.py_func)


def test_amx_computes_what_float64_does(amx):
    """Whole tiles and parts of them, several blocks in each direction, odd sizes, transposes, adding and overwriting."""
    emulated, multiply = amx
    scratch = kernels_cpu.make_workspace(1, "bfloat16")[0]
    generator = np.random.default_rng(0)
    sizes = [(32, 64, 32), (1, 1, 1), (3, 5, 7), (33, 31, 17), (40, 769, 64), (1030, 33, 16), (32, 32, 400), (64, 96, 31)]
    for m, k, n in sizes:
        for transposed in range(4):
            for alpha, beta in (1, 0), (1, 1), (0.3, 0), (1, 0.5):
                scratch[:] = 0x7fc07fc0     # NaN, wherever a product reads what it has not written
                a = generator.standard_normal((k, m) if transposed & 1 else (m, k), dtype=np.float32)
                b = generator.standard_normal((n, k) if transposed & 2 else (k, n), dtype=np.float32)
                a, b = a.T if transposed & 1 else a, b.T if transposed & 2 else b
                around = generator.standard_normal((m + 2, n + 2), dtype=np.float32)
                before, c = around.copy(), around[1:-1, 1:-1]
                expected = alpha * exact.bfloat16(a) @ exact.bfloat16(b) + beta * c
                if beta == 0:
                    c[...] = np.nan
                multiply(c, np.float32(alpha), a[:, :], b[:, :], np.float32(beta), scratch)
                assert np.abs(c - expected).max() <= 2e-6 * np.abs(expected).max(), (m, k, n, transposed, alpha, beta)
                c[...] = before[1:-1, 1:-1]
                assert np.array_equal(around, before)
    assert emulated.counts.keys() == {"ldtilecfg", "tilerelease", "tilezero", "tileloadd64", "tilestored64", "tdpbf16ps"}
    assert not emulated.shape.any(), "the tile registers were not released"


def test_nan_comes_out_of_amx(amx):
    _, multiply = amx
    a, b, c = np.ones((33, 65), np.float32), np.ones((65, 33), np.float32), np.zeros((33, 33), np.float32)
    a[32, 64] = np.nan
    multiply(c, np.float32(1), a[:, :], b[:, :], np.float32(0), kernels_cpu.make_workspace(1, "bfloat16")[0])
    assert np.isnan(c[32]).all() and (c[:32] == 65).all()


def compiled_for(cpu, features, has_tiles=False):
    """The assembly of sgemm in bfloat16 for a processor that need not be this one."""
    program = f"""
import llvmlite.binding as llvm
features = llvm.FeatureMap(dict.fromkeys({features!r}.split(), True))
llvm.get_host_cpu_features = lambda: features
from numba import config, float32, types, uint32
config.CPU_NAME = {cpu!r}
import ctypes
class Linux:
    def syscall(self, *numbers):
        assert numbers == (158, 0x1023, 18)
        return 0 if {has_tiles} else -1
CDLL, ctypes.CDLL = ctypes.CDLL, lambda name, *rest, **more: Linux() if name is None else CDLL(name, *rest, **more)
import matmul_cpu
ctypes.CDLL = CDLL
view = types.Array(float32, 2, "A")
signature = (view, float32, view, view, float32, types.Array(uint32, 1, "C"))
from numba import njit
multiply = njit(error_model="numpy", fastmath=matmul_cpu.FASTMATH)(matmul_cpu.multiply.py_func)
multiply.compile(signature)
print(matmul_cpu.instructions("bfloat16"))
print(*multiply.inspect_asm().values())
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    chosen, _, assembly = finished.stdout.partition("\n")
    return chosen, assembly


X86 = "sse2 avx avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512cd"


@pytest.mark.skipif(not llvm.get_process_triple().startswith("x86_64"), reason="these are x86's instructions")
def test_each_path_is_compiled_for_its_processor():
    """LLVM accepts it, and emits its instructions."""
    chosen, assembly = compiled_for("sapphirerapids", X86 + " avx512bf16 amx-tile amx-bf16 amx-int8", has_tiles=True)
    assert chosen == "AMX"
    for instruction in "ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "vcvtne2ps2bf16":
        assert instruction in assembly, instruction
    chosen, assembly = compiled_for("sapphirerapids", X86 + " avx512bf16 amx-tile amx-bf16 amx-int8")
    assert chosen == "AVX512-BF16" and "vdpbf16ps" in assembly and "tdpbf16ps" not in assembly, "Linux lends no tiles"


def test_unknown_processor():
    finished = subprocess.run([sys.executable, "train_gpt2.py"], cwd=ROOT, env=os.environ | {"GPT2_CPU": "386"},
                              capture_output=True, text=True)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr == ("error: the environment variable GPT2_CPU is '386', expected one of amx, avx512_bf16, avx512, "
                               "avx2\n")


@pytest.mark.parametrize("program, flags, says", [
    ("train_gpt2", ["--num-iterations", "1", "--input-bin", "tokens.bin", "--sample-every", "0"], "saves no time"),
    ("generate_gpt2", ["--model", "out", "--perplexity", "tokens.bin"], "halves the memory of the weights, but saves no time")])
def test_processor_without_bfloat16(program, flags, says, tmp_path):
    """One line says what --dtype bfloat16 is good for there. The kernels are replaced, to save compiling them."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import {program} as program
assert not program.HAS_BFLOAT16
program.compile_kernels = lambda *arguments: sys.exit(7)
sys.argv[1:] = {flags + ["--dtype", "bfloat16"]!r}
program.main()
"""
    save_model(tmp_path / "out", CONFIG, random_params(CONFIG), NO_TOKENIZER)
    write_tokens(tmp_path / "tokens.bin", np.arange(700) % 300)
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"GPT2_CPU": "avx2"},
                              capture_output=True, text=True)
    assert finished.returncode == 7, finished.stderr
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if "cannot multiply bfloat16" in line]
    assert len(lines) == 1 and lines[0].endswith(says)
