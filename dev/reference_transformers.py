"""What transformers computes with a model: the numbers that dev/tests/test_checkpoint.py and others hold the program to.

    python dev/reference_transformers.py                      writes the model and numbers in dev/reference_transformers
    python dev/reference_transformers.py --shape half FOLDER  another shape, into another folder
    python dev/reference_transformers.py --saved FOLDER       numbers for a model that is there already

It needs PyTorch and transformers; the tests that use it start it in a process of their own. Nothing here is shared with the
program. Beside the model, FOLDER gets expected.npz:

    tokens         (T,) int64    random tokens as long as the context, of which the last is the vocabulary's last
    logits         (T,V) float32 what follows each, computed in float64
    float32_error  of transformers itself in float32, ||x - truth|| / ||truth||
    prompt         (P,) int64    random tokens
    continuation   (G,) int64    what greedy generation appends, up to 200 tokens or the end of the context
    text           what the folder's tokenizer makes of TEXT, if it has one: its ids, int64
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

# Sizes that divide nothing evenly; GPT-2's own vocabulary and context; half precision, without names' prefix, in several files;
# and GPT-2 itself, which no test asks for: it takes some minutes and 700 MB.
SHAPES = {
    "odd": dict(config=dict(n_positions=231, vocab_size=131, n_embd=24, n_layer=2, n_head=3)),
    "gpt2": dict(config=dict(n_positions=1024, vocab_size=50257, n_embd=64, n_layer=3, n_head=2)),
    "half": dict(config=dict(n_positions=250, vocab_size=1000, n_embd=96, n_layer=5, n_head=12),
                 dtype=torch.bfloat16, max_shard_size="400KB", prefix=False),
    "124M": dict(config=dict(n_positions=1024, vocab_size=50257, n_embd=768, n_layer=12, n_head=12)),
}
HERE = Path(__file__).resolve().with_suffix("")
PROMPT_TOKENS = 31
NEW_TOKENS = 200
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak. <|endoftext|> naïve café 漢字 🙂"


def random_model(sizes, seed):
    """A model with every parameter far enough from its first value for a missing or misplaced one to show in the logits."""
    end_of_text = 50256 if sizes["vocab_size"] > 50256 else None
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=end_of_text, eos_token_id=end_of_text))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Positions keep the greedy text from repeating itself; sums over many channels should not become too large.
            scale = 1.0 if name.endswith("wpe.weight") else min(0.2, 2 / sizes["n_embd"] ** 0.5)
            parameter += scale * torch.randn(parameter.shape)
    return model


def write_model(folder, config, dtype=torch.float32, max_shard_size="1GB", prefix=True):
    model = random_model(config, seed=1).to(dtype)
    saved = model if prefix else model.transformer  # whose tensors' names lack the prefix "transformer."
    saved.save_pretrained(folder, max_shard_size=max_shard_size)


def write_expected(folder):
    """Load the model in a folder as its users do, and write expected.npz."""
    model, loading = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {what: names for what, names in loading.items() if names}
    if left:
        raise SystemExit(f"transformers does not load {folder} cleanly: {left}")
    model.eval()
    T, V = model.config.n_positions, model.config.vocab_size
    rng = np.random.default_rng(2)
    tokens, prompt = rng.integers(0, V, T), rng.integers(0, V, min(PROMPT_TOKENS, T // 2))
    tokens[-1] = V - 1

    new_tokens = min(NEW_TOKENS, T - len(prompt))
    with torch.no_grad():
        float32 = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        greedy = model.generate(torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=new_tokens,
                                eos_token_id=None, pad_token_id=0)[0, len(prompt):]
        model.double()
        logits = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        inputs = torch.cat([torch.from_numpy(prompt), greedy])[None]
        scores = model(inputs).logits[0, len(prompt) - 1:-1]                    # (G,V), what each greedy choice was among
    best = scores.topk(2).values
    gap = ((best[:, 0] - best[:, 1]) / scores.square().mean(-1).sqrt()).min().item()    # beside the size of a logit
    if not torch.equal(scores.argmax(-1), greedy) or gap < 1e-4:
        raise SystemExit(f"a greedy choice was nearly a tie ({gap:.1e}): choose another seed")

    arrays = dict(tokens=tokens, logits=logits.astype(np.float32), prompt=prompt, continuation=greedy.numpy(),
                  float32_error=np.linalg.norm(float32 - logits) / np.linalg.norm(logits))
    if (Path(folder) / "vocab.json").is_file():
        arrays["text"] = np.array(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    np.savez_compressed(Path(folder) / "expected.npz", **arrays)
    print(f"wrote {folder}: {len(set(greedy.tolist()))} different tokens in {len(greedy)}, the closest choice by {gap:.1e}, "
          f"error in float32 {arrays['float32_error']:.1e}")


def main():
    parser = argparse.ArgumentParser(description="Write what transformers computes with a model.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument("--shape", choices=SHAPES, default="odd", help="default: %(default)s")
    parser.add_argument("--saved", action="store_true", help="take the model that is in the folder")
    options = parser.parse_args()
    if not options.saved:
        write_model(options.folder, **SHAPES[options.shape])
    write_expected(options.folder)


if __name__ == "__main__":
    main()
