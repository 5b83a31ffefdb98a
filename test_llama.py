"""Hold Llama to float64 with the checks of test_gpt2.py: activations, gradients, and ten steps of training.

    python test_llama.py                                            two tiny models, every tensor, seconds
    python test_llama.py --model smollm2 --python OTHER/bin/python  SmolLM2-135M's shape, minutes; OTHER has PyTorch
    pytest test_llama.py                                            the checks of the tiny models as tests

The truth is dev/reference_llama_tiny.npz and dev/reference_llama_tied.npz, which dev/reference_pytorch.py wrote.
"""

import argparse
import sys
import tempfile
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pytest

import llama
from gpt2 import Tensors
from test_gpt2 import BOUNDS, CHECKS, PADDED, Reference, build, report, run, write_reference
from train_llama import Llama

DEV = Path(__file__).parent / "dev"
REFERENCES = {
    "tiny": DEV / "reference_llama_tiny.npz",   # with biases, and a classifier with a weight of its own
    "tied": DEV / "reference_llama_tied.npz",   # without
}


def check_recompute(model_class, reference):
    """gradients from recomputed activations"""
    model = build(partial(model_class, recompute=True), reference)
    run(model, reference.tokens, reference.targets)
    yield from reference.gradients(model)


LLAMA_CHECKS = (*CHECKS["tiny"], check_recompute)


def read_reference(name):
    return Reference(REFERENCES[name], BOUNDS["tiny"], llama)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("check", LLAMA_CHECKS)
def test_llama(check, name):
    failed = [row for row in check(Llama, read_reference(name)) if not row.ok]
    assert not failed


def test_parameters_of_smollm2_135m():
    """As many as the published model has."""
    config = llama.Config(max_seq_len=8192, vocab_size=49152, padded_vocab_size=49152, num_layers=30, num_heads=9,
                          num_key_heads=3, head_size=64, channels=576, hidden=1536, rope_base=1e5)
    embedding, attention, mlp = 49152 * 576, (9 + 2 * 3) * 64 * 576 + 576 * 9 * 64, 3 * 1536 * 576
    by_hand = embedding + 30 * (attention + mlp + 2 * 576) + 576
    assert sum(map(prod, llama.parameter_shapes(config).values())) == by_hand == 134_515_008


@pytest.mark.parametrize("tied", [False, True])
def test_first_weights(tied):
    """Standard deviations to 3 %, as in test_training.py."""
    config = llama.Config(64, 500, 512, num_layers=3, num_heads=4, num_key_heads=2, head_size=16, channels=64, hidden=100,
                          tied=tied, qkv_bias=True)
    params = Tensors(llama.parameter_shapes(config))
    params.flat[...] = np.nan
    llama.initialize(params, config, seed=0)
    assert (params.headw.size == 0) == tied
    for name, tensor in params.items():
        if name in ("ln1w", "ln2w", "lnfw"):
            assert (tensor == 1).all(), name
        elif name == "qkvb":
            assert (tensor == 0).all()
        elif tensor.size > 0:
            if name in PADDED:
                assert not tensor[config.vocab_size:].any(), name
                tensor = tensor[:config.vocab_size]
            expected = 0.02 / np.sqrt(2 * 3) if name in ("attprojw", "fcprojw") else 0.02
            assert tensor.std() == pytest.approx(expected, rel=0.03), name


def main():
    parser = argparse.ArgumentParser(description="Compare Llama with PyTorch in float64.")
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny", help="default: %(default)s")
    parser.add_argument("--python", default=sys.executable, metavar="PATH",
                        help="for --model smollm2, a Python that has PyTorch (default: this one)")
    args = parser.parse_args()

    if args.model == "smollm2":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "reference.npz")
            write_reference(args.python, "llama-smollm2", path)
            sys.exit(not report(CHECKS["d12"], Llama, Reference(path, BOUNDS["d12"], llama)))
    for name in REFERENCES:
        if not report(LLAMA_CHECKS, Llama, read_reference(name)):
            sys.exit(1)
        print()


if __name__ == "__main__":
    main()
