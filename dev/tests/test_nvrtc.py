"""Every CUDA kernel compiles with NVIDIA's compiler, for the GPUs it is meant for. Needs neither a GPU nor a driver."""
import re

import pytest

from dev import ptxas
from kernels_gpu import CACHED_POSITIONS, SOURCES
from launcher import MAX_SHARED_BYTES, parse_signatures

PREAMBLE, *LAYERS = SOURCES
DEFINITION = r"__global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(.*?\n}"


@pytest.fixture(scope="module", params=[(layer, architecture) for layer in LAYERS for architecture in ptxas.ARCHITECTURES],
                ids=lambda param: f"{next(iter(parse_signatures(param[0])))}-{param[1]}")
def layer_and_compiled(request):
    """The source of a layer, and NVRTC's output for it."""
    layer, architecture = request.param
    try:
        return layer, ptxas.compile_source(PREAMBLE + layer, architecture)
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


def test_float4_is_read_and_written_by_one_instruction(layer_and_compiled):
    """A compiler may split a float4 into four accesses, which would quietly make a kernel slower."""
    layer, compiled = layer_and_compiled
    sources = bodies(layer, DEFINITION)
    assembly = bodies(compiled.ptx, r"\.entry (\w+)\(.*?\n}")
    assert sources.keys() == assembly.keys() == parse_signatures(layer).keys()
    for name in sources:
        for ours, instruction in ("store", r"st\.global"), ("load", r"ld\.global(?:\.nc)?"):
            found = re.findall(rf"{instruction}\.(?:v4\.[fb]32|v2\.b64)", assembly[name])
            assert len(found) >= sources[name].count(f"fours.{ours}("), name


def bodies(text, pattern):
    """Kernel name -> its text. The first group of the pattern is the name."""
    return {match[1]: match[0] for match in re.finditer(pattern, text, re.DOTALL)}


def test_table_is_of_these_kernels():
    """dev/ptxas.txt has exactly one row per kernel, in order. The numbers depend on the compiler's version."""
    rows = [line.split()[0] for line in ptxas.TABLE.read_text().splitlines()[5:]]
    assert rows == [name for layer in LAYERS for name in parse_signatures(layer)], "run dev/ptxas.py again"
