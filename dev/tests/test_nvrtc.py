"""Every CUDA kernel compiles with NVIDIA's compiler, for the GPUs it is meant for. Needs neither a GPU nor a driver."""
import re

import pytest

from dev import ptxas
from kernels_gpu import CACHED_POSITIONS, FLASH_ATTENTION, SOURCES
from launcher import MAX_SHARED_BYTES, parse_signatures

PREAMBLE, *LAYERS = SOURCES
DEFINITION = r"__global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(.*?\n}"


@pytest.fixture(scope="module", params=[(layer, *build) for build in ptxas.builds()
                                        for layer in ptxas.layers_of(LAYERS, build[1])],
                ids=lambda param: "-".join((next(iter(parse_signatures(param[0]))), *param[1:])))
def layer_and_compiled(request):
    """The source of a layer, and NVRTC's output for it."""
    layer, *build = request.param
    try:
        return layer, ptxas.compile_source(PREAMBLE + layer, *build)
    except ptxas.NvrtcMissing as error:
        pytest.skip(str(error))


def test_compiles_without_spills(layer_and_compiled):
    layer, compiled = layer_and_compiled
    assert compiled.cubin.startswith(b"\x7fELF")
    assert "warning" not in compiled.log
    usages = ptxas.usages(compiled.log)
    assert usages.keys() == parse_signatures(layer).keys()
    assert not any(usage.spilled for usage in usages.values()), compiled.log


def test_fits_every_gpu(layer_and_compiled):
    """A block of the largest size has registers, and arrays of fixed size fit beside the largest that a launch may ask for."""
    layer, compiled = layer_and_compiled
    sources = bodies(layer, DEFINITION)
    largest = {"attention_cached_forward": 4 * CACHED_POSITIONS}
    for name, usage in ptxas.usages(compiled.log).items():
        assert ptxas.threads(usage.registers) >= parse_signatures(layer)[name].max_threads
        dynamic = largest.get(name, MAX_SHARED_BYTES) if "extern __shared__" in sources[name] else 0
        assert usage.shared + dynamic <= 48 * 1024


def test_parts_are_read_and_written_16_bytes_at_a_time(layer_and_compiled):
    """A compiler may split such an access into four, which would quietly make a kernel slower."""
    layer, compiled = layer_and_compiled
    sources, functions = bodies(layer, DEFINITION), bodies(layer, r"__device__ \w+ (\w+)\(.*?\n}")
    for name in sources:
        sources[name] += "".join(body for function, body in functions.items() if f" {function}(" in sources[name])
    assembly = bodies(compiled.ptx, r"\.entry (\w+)\(.*?\n}")
    assert sources.keys() == assembly.keys() == parse_signatures(layer).keys()
    for name in sources:
        for ours, instruction in ("store", r"st\.global"), ("load", r"ld\.global(?:\.nc)?"):
            found = re.findall(rf"{instruction}\.(?:v4\.[fbu]32|v2\.[bu]64)", assembly[name])
            assert len(found) >= sources[name].count(f".{ours}("), name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_flash_attention_uses_tensor_cores(architecture):
    """Products on tensor cores, tiles by ldmatrix, and 16 bytes from global memory at a time."""
    try:
        listing = ptxas.disassemble(ptxas.compile_source(PREAMBLE + FLASH_ATTENTION, architecture, "bf16").cubin)
    except (ptxas.NvrtcMissing, ptxas.NvdisasmMissing) as error:
        pytest.skip(str(error))
    code = bodies(listing, r"\.text\.(\w+):\n.*?(?=\.text\.|\Z)")
    for kernel, products in ("forward", 2), ("backward_q", 3), ("backward_kv", 4):
        text = code[f"flash_attention_{kernel}"]
        assert len(re.findall(r"HMMA\.16816\.F32\.BF16", text)) >= 32 * products, "an instruction has two 16 x 8 x 16 products"
        assert len(re.findall(r"LDSM\.16\.M88\.4", text)) >= 16 and len(re.findall(r"LDSM\.16\.MT88\.4", text)) >= 16
        assert len(re.findall(r"LDG\.E\.128", text)) >= 4


def bodies(text, pattern):
    """Kernel name -> its text. The first group of the pattern is the name."""
    return {match[1]: match[0] for match in re.finditer(pattern, text, re.DOTALL)}


def test_table_is_of_these_kernels():
    """dev/ptxas.txt has one row per kernel and type, in order. The numbers depend on the compiler's version."""
    rows = re.findall(r"^(\w+) +\d", ptxas.TABLE.read_text(), re.MULTILINE)
    assert rows == [name for Float in ("float", "bf16") for layer in ptxas.layers_of(LAYERS, Float)
                    for name in parse_signatures(layer)], "run dev/ptxas.py again"
