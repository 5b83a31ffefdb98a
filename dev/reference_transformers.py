"""Logits and greedy text from transformers, the reference for dev/tests/test_model_files.py and others.

    python dev/reference_transformers.py                      writes the model and numbers in dev/reference_transformers
    python dev/reference_transformers.py --shape half FOLDER  a model of another shape, in another folder
    python dev/reference_transformers.py --saved FOLDER       numbers for an existing model

It needs PyTorch and transformers, and shares no code with the program; the tests run it in a process of its own. FOLDER gets
the model and expected.npz:

    tokens         (T,) int64    random tokens that fill the context; the last one is the last of the vocabulary
    logits         (T,V) float32 the logits after each token, computed in float64
    float32_error  the error of transformers itself in float32, ||x - truth|| / ||truth||
    prompt         (P,) int64    random tokens
    continuation   (G,) int64    the greedy continuation, up to 200 tokens or the end of the context
    text           int64         TEXT in tokens of the folder's tokenizer, if it has one
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

# Sizes that divide nothing evenly; GPT-2's own vocabulary and context; bfloat16 in several files, names without a prefix; and
# GPT-2's own shape, which no test uses: it takes minutes and 700 MB.
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
    """A model whose parameters are all far from their initial values, so that a missing or misplaced one changes the logits."""
    end_of_text = 50256 if sizes["vocab_size"] > 50256 else None
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=end_of_text, eos_token_id=end_of_text))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large position embeddings keep the greedy text from repeating itself; wide sums need smaller weights.
            scale = 1.0 if name.endswith("wpe.weight") else min(0.2, 2 / sizes["n_embd"] ** 0.5)
            parameter += scale * torch.randn(parameter.shape)
    return model


def write_model(folder, config, dtype=torch.float32, max_shard_size="1GB", prefix=True):
    model = random_model(config, seed=1).to(dtype)
    saved = model if prefix else model.transformer  # its names have no prefix "transformer."
    saved.save_pretrained(folder, max_shard_size=max_shard_size)


def write_expected(folder):
    """Load the model in a folder as a user would, and write expected.npz."""
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
        scores = model(inputs).logits[0, len(prompt) - 1:-1]                    # (G,V), the logits of each greedy choice
    best = scores.topk(2).values
    gap = ((best[:, 0] - best[:, 1]) / scores.square().mean(-1).sqrt()).min().item()    # relative to the logits
    if not torch.equal(scores.argmax(-1), greedy) or gap < 1e-4:
        raise SystemExit(f"two logits of a greedy choice are nearly equal ({gap:.1e} apart): choose another seed")

    arrays = dict(tokens=tokens, logits=logits.astype(np.float32), prompt=prompt, continuation=greedy.numpy(),
                  float32_error=np.linalg.norm(float32 - logits) / np.linalg.norm(logits))
    if (Path(folder) / "vocab.json").is_file():
        arrays["text"] = np.array(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    np.savez_compressed(Path(folder) / "expected.npz", **arrays)
    print(f"wrote {folder}: {len(set(greedy.tolist()))} different tokens in {len(greedy)}, the closest logits {gap:.1e} apart, "
          f"error in float32 {arrays['float32_error']:.1e}")


def main():
    parser = argparse.ArgumentParser(description="Write reference logits and text of transformers.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument("--shape", choices=SHAPES, default="odd", help="default: %(default)s")
    parser.add_argument("--saved", action="store_true", help="use the model that is in the folder")
    options = parser.parse_args()
    if not options.saved:
        write_model(options.folder, **SHAPES[options.shape])
    write_expected(options.folder)


if __name__ == "__main__":
    main()
