"""Registers, shared memory and register spills of every CUDA kernel.

    python dev/ptxas.py         compiles all kernels, prints the table and writes it to dev/ptxas.txt

It needs no GPU and no driver, only NVRTC, NVIDIA's run-time compiler, which CuPy uses: `pip install nvidia-cuda-nvrtc` (58 MB).
The exit status is 1 if a kernel spills registers to memory.
"""
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "dev" / "ptxas.txt"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")    # T4, A100, RTX 30, H100, B200, RTX 50
REGISTERS = 65536                       # per multiprocessor, shared by up to 4 * 16 warps


class NvrtcMissing(Exception):
    """NVRTC is not installed; the message says how to install it."""


class NvdisasmMissing(Exception):
    """nvdisasm is not installed; the message says how to install it."""


class CompileError(Exception):
    """NVRTC could not compile a source; the message is its log."""


class Compiled(NamedTuple):
    """NVRTC's output."""
    ptx: str            # NVIDIA's assembly language, for any GPU
    cubin: bytes        # machine code
    log: str


class Usage(NamedTuple):
    """The resources of one kernel."""
    registers: int      # per thread
    shared: int         # bytes per block, without dynamic shared memory
    spilled: int        # bytes per thread, including arrays that are not in registers


def load_nvrtc():
    """NVRTC as a ctypes library, from its wheel: nvidia-cuda-nvrtc or nvidia-cuda-nvrtc-cu12. Raises NvrtcMissing."""
    libraries = wheel_files("*/lib/libnvrtc.so.*")
    if not libraries:
        raise NvrtcMissing("NVRTC is not installed; run: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(str(libraries[-1]))


def builds():
    """(architecture, Float) pairs: every architecture in float, and in bf16 where there are tensor cores for it."""
    return [(architecture, Float) for Float in ("float", "bf16") for architecture in ARCHITECTURES
            if Float == "float" or int(architecture.removeprefix("sm_")) >= 80]


def layers_of(layers, Float):
    """The sources of the layers that are used with this type: flash attention is for bf16 only."""
    return [layer for layer in layers if Float == "bf16" or "flash_attention" not in layer]


def compile_source(source, architecture, Float):
    """Compile CUDA source for an architecture and type. Returns Compiled; raises CompileError or NvrtcMissing."""
    nvrtc = load_nvrtc()
    # CuPy's options. ftz: denormal numbers are flushed to zero.
    options = [b"--std=c++17", b"-ftz=true", f"-DFloat={Float}".encode(), f"--gpu-architecture={architecture}".encode(),
               b"--ptxas-options=-v"]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = result(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if failed:
            raise CompileError(log)
        ptx = result(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).rstrip(b"\0").decode()
        return Compiled(ptx, result(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def wheel_files(pattern):
    """The paths that match a pattern in NVIDIA's wheels."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else []
    return [path for folder in folders for path in sorted(Path(folder).glob(pattern))]


def disassemble(cubin):
    """The machine code of a cubin as text. Raises NvdisasmMissing."""
    program = shutil.which("nvdisasm") or next(iter(wheel_files("*/bin/nvdisasm")), None)
    if not program:
        raise NvdisasmMissing("nvdisasm is not installed; run: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(cubin)
        return subprocess.run([program, file], capture_output=True, text=True, check=True).stdout


def result(get_size, get, program):
    """The bytes of one result of a program."""
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


def usages(log):
    """Kernel name -> Usage, from ptxas's messages in the log."""
    kernels = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        kernels[name] = Usage(int(re.search(r"Used (\d+) registers", part)[1]), int(shared[1]) if shared else 0,
                              max(stack, stores, loads))
    return kernels


def threads(registers):
    """How many threads a multiprocessor has registers for. Each of its four parts allocates them to warps in units of 256."""
    warp = -(-32 * registers // 256) * 256
    return 4 * 32 * min(16, REGISTERS // 4 // warp)


def table(kernels):
    """The lines of the table. `kernels`: Float -> architecture -> kernel name -> Usage."""
    version = [ctypes.c_int(), ctypes.c_int()]
    load_nvrtc().nvrtcVersion(*map(ctypes.byref, version))
    lines = [f"kernels_gpu.py as NVRTC {version[0].value}.{version[1].value} compiles it, written by `python dev/ptxas.py`.",
             "Shared: bytes of static shared memory per block. For each architecture: registers per thread, and threads whose "
             "registers fit."]
    for Float, by_architecture in kernels.items():
        lines += ["", f"Float = {Float:34}" + "".join(f"{architecture:>14}" for architecture in by_architecture),
                  f"{'kernel':34}{'shared':>8}" + f"{'regs':>7}{'thr.':>7}" * len(by_architecture)]
        for name, usage in next(iter(by_architecture.values())).items():
            registers = [by_name[name].registers for by_name in by_architecture.values()]
            lines.append(f"{name:34}{usage.shared:8}" + "".join(f"{count:7}{threads(count):7}" for count in registers))
    return lines


def main():
    sys.path.insert(0, str(ROOT))
    from kernels_gpu import SOURCES
    from launcher import parse_signatures
    preamble, *layers = SOURCES
    kernels = {}
    for architecture, Float in builds():
        by_name = kernels.setdefault(Float, {}).setdefault(architecture, {})
        for layer in layers_of(layers, Float):
            found = usages(compile_source(preamble + layer, architecture, Float).log)
            by_name |= {name: found[name] for name in parse_signatures(layer)}      # in the order of the file
    lines = table(kernels)
    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    spilling = sorted({name for by_architecture in kernels.values() for by_name in by_architecture.values()
                       for name, usage in by_name.items() if usage.spilled})
    if spilling:
        sys.exit(f"ptxas.py: {', '.join(spilling)} spilled registers; expected none")


if __name__ == "__main__":
    try:
        main()
    except NvrtcMissing as error:
        sys.exit(f"ptxas.py: {error}")
