"""Every CUDA kernel through NVIDIA's own compiler, for the GPUs it is meant for; needs neither a GPU nor a driver."""
import re

import pytest
from dev import ptxas
from launcher import parse_signatures
from kernels_gpu import SOURCES

PREAMBLE, *LAYERS = SOURCES


@pytest.fixture(scope="module", params=[(layer, architecture) for layer in LAYERS for architecture in ptxas.ARCHITECTURES],
                ids=lambda param: f"{next(iter(parse_signatures(param[0])))}-{param[1]}")
def layer_and_compiled(request):
    """The source of a layer, and what NVRTC makes of it."""
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


def test_fours_are_read_and_written_in_one_go(layer_and_compiled):
    """A compiler may take a float4 apart, at which a kernel would quietly become slower."""
    layer, compiled = layer_and_compiled
    sources = bodies(layer, r"__global__ void (\w+)\(.*?\n}")
    assembly = bodies(compiled.ptx, r"\.entry (\w+)\(.*?\n}")
    assert sources.keys() == assembly.keys() == parse_signatures(layer).keys()
    for name in sources:
        assert assembly[name].count("st.global.v4.f32") >= sources[name].count("fours.store("), name
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v4\.f32", assembly[name]))
        assert loads >= sources[name].count("fours.load("), name


def bodies(text, pattern):
    """Kernel name -> its text, for a pattern of it whose first group is the name."""
    return {match[1]: match[0] for match in re.finditer(pattern, text, re.DOTALL)}


def test_table_is_of_these_kernels():
    """dev/ptxas.txt has a row for every kernel, and none for one that is gone; the numbers differ from compiler to compiler."""
    rows = [line.split()[0] for line in ptxas.TABLE.read_text().splitlines()[5:]]
    assert rows == [name for layer in LAYERS for name in parse_signatures(layer)], "run dev/ptxas.py again"
