"""HellaSwag losses from transformers, the reference for dev/tests/test_hellaswag.py.

    python dev/reference_hellaswag.py                        writes dev/reference_hellaswag.jsonl: 50 random examples for the
                                                             model in dev/reference_transformers, with their losses
    python dev/reference_hellaswag.py FOLDER IN.jsonl OUT    scores examples in HellaSwag's own format with another model

It needs PyTorch and transformers, and shares no code with the program. Each completion is scored alone, in float64: no batch,
no padding. OUT has one line per line of IN: the example plus "losses", the mean loss of each completion's tokens.
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
SMALLEST_GAP = 1e-4       # between the two lowest losses: a closer call would prove nothing


def random_examples(vocab_size, context):
    """Random tokens of many lengths; two examples are longer than the model's context."""
    rng = np.random.default_rng(4)
    lengths = [(rng.integers(1, 60), rng.integers(1, 20, 4)) for _ in range(EXAMPLES)]
    lengths[7], lengths[31] = (context - 3, [3, 4, 5, 9]), (2, [context, context - 2, 5, context + 7])
    return [{"ctx": rng.integers(0, vocab_size, n).tolist(), "endings": [rng.integers(0, vocab_size, m).tolist() for m in each],
             "label": int(rng.integers(4))} for n, each in lengths]


@torch.no_grad()
def score(model, tokenizer, item):
    """The mean cross-entropy of each ending's tokens after the context. Examples that are too long lose their beginning."""
    context, endings, losses = item["ctx"], item["endings"], []
    if tokenizer:
        context, endings = tokenizer(context)["input_ids"], [tokenizer(" " + ending)["input_ids"] for ending in endings]
    for ending in endings:
        tokens = torch.tensor((context + ending)[-model.config.n_positions - 1:])
        logits = model(tokens[None, :-1]).logits[0, -len(ending):]
        losses.append(cross_entropy(logits, tokens[-len(logits):]).item())
    return losses


def main():
    parser = argparse.ArgumentParser(description="Score HellaSwag examples with transformers.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parent / "reference_transformers")
    parser.add_argument("source", nargs="?", type=Path, help="default: random examples")
    parser.add_argument("target", nargs="?", type=Path, default=HERE.with_suffix(".jsonl"))
    options = parser.parse_args()
    model = GPT2LMHeadModel.from_pretrained(options.folder, dtype=torch.float64).eval()
    if options.source:
        tokenizer = AutoTokenizer.from_pretrained(options.folder)
        items = map(json.loads, options.source.read_text(encoding="utf-8").splitlines())
    else:
        tokenizer, items = None, random_examples(model.config.vocab_size, model.config.n_positions)
    items = [item | {"losses": score(model, tokenizer, item)} for item in items]
    gap = min(np.diff(sorted(item["losses"])[:2]).item() for item in items)
    if not gap > SMALLEST_GAP:
        raise SystemExit(f"two losses are nearly equal ({gap:.1e} apart): choose another seed")
    options.target.write_text("".join(json.dumps(item, separators=(",", ":")) + "\n" for item in items))
    print(f"wrote {options.target}: {len(items)} examples; the closest losses are {gap:.1e} apart")


if __name__ == "__main__":
    main()
