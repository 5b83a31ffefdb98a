"""How transformers scores HellaSwag: the losses to which dev/tests/test_hellaswag.py holds the program.

    python dev/reference_hellaswag.py                        writes dev/reference_hellaswag.jsonl: 50 made examples in tokens of
                                                             dev/reference_transformers, and their losses
    python dev/reference_hellaswag.py FOLDER IN.jsonl OUT    losses of examples in HellaSwag's own format, by another model

It needs PyTorch and transformers. Nothing here is shared with the program, and each completion is scored by itself, in float64:
no batch, no padding. OUT has a line for each of IN: its item, and "losses", the mean of each completion's tokens.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPT2LMHeadModel

HERE = Path(__file__).resolve()
EXAMPLES = 50
SMALLEST_GAP = 1e-4       # between the losses of the best and second best completion: a closer choice would prove nothing


def made_examples(vocab_size, context):
    """Random tokens of many lengths; two of them longer than the model's context."""
    rng = np.random.default_rng(4)
    lengths = [(rng.integers(1, 60), rng.integers(1, 20, 4)) for _ in range(EXAMPLES)]
    lengths[7], lengths[31] = (context - 3, [3, 4, 5, 9]), (2, [context, context - 2, 5, context + 7])
    return [{"ctx": rng.integers(0, vocab_size, n).tolist(), "endings": [rng.integers(0, vocab_size, m).tolist() for m in each],
             "label": int(rng.integers(4))} for n, each in lengths]


@torch.no_grad()
def score(model, tokenizer, item):
    """The mean cross-entropy of each ending's tokens after the context; what is too long loses its beginning."""
    context, endings, losses = item["ctx"], item["endings"], []
    if tokenizer:
        context, endings = tokenizer(context)["input_ids"], [tokenizer(" " + ending)["input_ids"] for ending in endings]
    for ending in endings:
        tokens = torch.tensor((context + ending)[-model.config.n_positions - 1:])
        logits = model(tokens[None, :-1]).logits[0, -len(ending):]
        losses.append(cross_entropy(logits, tokens[-len(logits):]).item())
    return losses


def main():
    parser = argparse.ArgumentParser(description="Write how transformers scores HellaSwag.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parent / "reference_transformers")
    parser.add_argument("source", nargs="?", type=Path, help="default: made examples")
    parser.add_argument("target", nargs="?", type=Path, default=HERE.with_suffix(".jsonl"))
    options = parser.parse_args()
    model = GPT2LMHeadModel.from_pretrained(options.folder, dtype=torch.float64).eval()
    if options.source:
        tokenizer = AutoTokenizer.from_pretrained(options.folder)
        items = map(json.loads, options.source.read_text(encoding="utf-8").splitlines())
    else:
        tokenizer, items = None, made_examples(model.config.vocab_size, model.config.n_positions)
    items = [item | {"losses": score(model, tokenizer, item)} for item in items]
    gap = min(np.diff(sorted(item["losses"])[:2]).item() for item in items)
    if not gap > SMALLEST_GAP:
        raise SystemExit(f"a choice was nearly a tie ({gap:.1e}): choose another seed")
    options.target.write_text("".join(json.dumps(item, separators=(",", ":")) + "\n" for item in items))
    print(f"wrote {options.target}: {len(items)} examples, the closest choice by {gap:.1e}")


if __name__ == "__main__":
    main()
