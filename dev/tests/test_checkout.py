"""The checkout as a whole: who imports whom, the kernel cache, and a checkout that cannot be written to."""
import ast
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {path.stem: path for path in ROOT.glob("*.py")} | {"cuda_on_cpu": ROOT / "cuda_on_cpu" / "__init__.py"}


def imports(path):
    """Names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_no_import_circle_and_no_import_of_dev():
    graph = {name: set(imports(path)) for name, path in MODULES.items()}
    assert not [name for name, imported in graph.items() if "dev" in imported]
    list(graphlib.TopologicalSorter({name: imported & MODULES.keys() for name, imported in graph.items()}).static_order())


def test_gpu_program_is_imported_without_numba():
    program = "import sys; sys.modules['numba'] = None; import train_gpt2_gpu"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# The kernel cache

@pytest.fixture
def checkout(tmp_path):
    """A copy of the product's modules."""
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "out", "dev"))
    return tmp_path / "checkout"


def run(checkout, *arguments, prefix=(), **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("GPT2_BY_HAND_CACHE", "XDG_CACHE_HOME")}
    environment = inherited | environment
    return subprocess.run([*prefix, sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)


def test_edited_product_is_compiled_again(checkout, tmp_path):
    """Numba by itself would keep running matvec_forward with the old product. The cache of the old sources is deleted."""
    program = ("import numpy as np, kernels_cpu\n"
               "out, one, weight = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)\n"
               "kernels_cpu.matvec_forward(out, one, weight, kernels_cpu.NO_BIAS, kernels_cpu.make_workspace(1))\n"
               "print(out[0, 0], sum(kernels_cpu.matvec_forward.stats.cache_hits.values()))")
    source = checkout / "matvec_cpu.py"
    outputs, caches = [], []
    line = "total += inp[c] * "
    for factor in (1, 1, 2):
        text = (ROOT / "matvec_cpu.py").read_text()
        assert text.count(line) == 1
        source.write_text(text.replace(line, f"{line}np.float32({factor}) * "))
        os.utime(source, (0, 0))
        # Without .pyc files: an edited source of the same size and time is the same to Python.
        finished = run(checkout, "-c", program, GPT2_BY_HAND_CACHE=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
        assert finished.returncode == 0, finished.stderr
        outputs.append(finished.stdout.split())
        [kernels] = (tmp_path / "cache").glob("kernels-*")
        caches.append([folder.name for folder in kernels.iterdir()])
    assert outputs == [["1.0", "0"], ["1.0", "1"], ["2.0", "0"]]
    assert len(caches[0]) == len(caches[2]) == 1 and caches[0] == caches[1] != caches[2]


# A checkout that cannot be written to

@pytest.mark.skipif(sys.platform != "linux", reason="takes root's rights by setpriv")
def test_read_only_checkout_and_home(checkout, tmp_path):
    """The programs start, and compiled code goes into a temporary folder that child processes share."""
    home = tmp_path / "home"
    home.mkdir()
    drop = []
    if os.geteuid() == 0:
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all"]
    subprocess.run(["chmod", "-R", "a-w", checkout, home], check=True)
    try:
        for program in ("train_gpt2.py", "train_gpt2_gpu.py", "generate_gpt2.py", "prepare_text.py"):
            finished = run(checkout, program, "--help", prefix=drop, HOME=str(home))
            assert (finished.returncode, finished.stderr) == (0, ""), finished
        program = "import files, os; print(files.cache_folder(), os.environ['GPT2_BY_HAND_CACHE'], files.DATA_DIR.parent)"
        finished = run(checkout, "-c", program, prefix=drop, HOME=str(home))
        [folder, variable, data] = finished.stdout.split()
        assert folder == variable == data and not Path(folder).exists()
    finally:
        subprocess.run(["chmod", "-R", "u+w", checkout, home], check=True)
