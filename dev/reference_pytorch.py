"""An independent GPT-2 in plain PyTorch, the reference for test_gpt2.py.

    python dev/reference_pytorch.py                                    writes dev/reference_tiny.npz
    python dev/reference_pytorch.py --model d12 --output d12.npz       the 124M shape, about 2 GB

The model is built twice from the same float32 parameters: in float64, which serves as the truth, and in float32, whose error
shows how much comes from rounding alone. Both take ten AdamW steps on one batch. The file also holds all settings, so that the
test has none of its own that could drift: see `main` for the list of arrays.

This file shares no code with the program, only the names of the tensors.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ADAMW = dict(betas=(0.9, 0.99), eps=1e-8)

# The tiny model's sizes divide nothing evenly. Its sequences are shorter than its context, and longer than 64, a common tile
# of attention kernels. Its gradient norm falls from 1.4 to 0.8 in ten steps, so clipping at 1 acts on the first steps only.
MODELS = {
    "tiny": dict(
        config=dict(max_seq_len=72, vocab_size=131, padded_vocab_size=256, num_layers=2, num_heads=3, channels=21),
        batch=dict(batch_size=2, sequence_length=67),
        training=dict(steps=10, learning_rate=1e-3, weight_decay=0.1, grad_clip=1.0),
    ),
    "d12": dict(
        config=dict(max_seq_len=1024, vocab_size=50257, padded_vocab_size=50304, num_layers=12, num_heads=12, channels=768),
        batch=dict(batch_size=4, sequence_length=64),
        training=dict(steps=10, learning_rate=1e-4, weight_decay=0.1, grad_clip=1.0),
    ),
}


class Block(nn.Module):
    """One transformer block, (B,T,C) -> (B,T,C)."""

    def __init__(self, num_heads, channels, attention):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.ln1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attproj = nn.Linear(channels, channels)
        self.ln2 = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, 4 * channels)
        self.fcproj = nn.Linear(4 * channels, channels)

    def attend(self, qkv):
        """Causal self-attention, (B,T,3C) -> (B,T,C)."""
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # three of (B,NH,T,HS)
        if self.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])           # (B,NH,T,T)
            future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
            out = scores.masked_fill(future, -math.inf).softmax(-1) @ v         # (B,NH,T,HS)
        return out.transpose(1, 2).reshape(B, T, C3 // 3)

    def forward(self, x):
        x = x + self.attproj(self.attend(self.qkv(self.ln1(x))))
        x = x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))
        return x


class GPT2(nn.Module):
    """GPT-2 that returns its mean cross-entropy.

    attention is "plain" (softmax of the scores, written out) or "sdpa" (PyTorch's fused kernel).
    """

    def __init__(self, max_seq_len, vocab_size, num_layers, num_heads, channels, attention="plain"):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, channels)
        self.wpe = nn.Embedding(max_seq_len, channels)
        self.blocks = nn.ModuleList(Block(num_heads, channels, attention) for _ in range(num_layers))
        self.lnf = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocab_size, bias=False)
        self.head.weight = self.wte.weight  # tied: one matrix reads tokens in and scores tokens out
        self.cross_entropy = nn.CrossEntropyLoss(reduction="none")

    def forward(self, tokens, targets):
        """Mean loss of predicting targets (B,T) from tokens (B,T), both int64."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]               # (B,T,C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.lnf(x))                                         # (B,T,V)
        return self.cross_entropy(logits.flatten(0, 1), targets.flatten()).mean()

    @torch.no_grad()
    def initialize(self, seed):
        """GPT-2's initialization: weights from N(0, 0.02), the two projections into the residual stream scaled by 1/sqrt(2L)
        because 2L of them are summed; biases 0, layernorm weights 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                residual = name.endswith(("attproj.weight", "fcproj.weight"))
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02
                parameter.normal_(0.0, std, generator=generator)
        return self

    @torch.no_grad()
    def roughen(self, std, seed):
        """Add N(0, std) to every parameter. With biases 0 and layernorm weights 1, a term missing in a backward pass could go
        unnoticed."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
        return self

    def optimizer(self, learning_rate, weight_decay):
        """AdamW with weight decay on the matrices only, not on biases and layernorms."""
        matrices = [p for p in self.parameters() if p.ndim == 2]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **ADAMW)

    def tensors(self):
        """The parameters by the program's names; those of the blocks are lists, one tensor per layer."""
        named = {"wte": self.wte.weight, "wpe": self.wpe.weight}
        for layer in ("ln1", "qkv", "attproj", "ln2", "fc", "fcproj"):
            named[layer + "w"] = [getattr(block, layer).weight for block in self.blocks]
            named[layer + "b"] = [getattr(block, layer).bias for block in self.blocks]
        return named | {"lnfw": self.lnf.weight, "lnfb": self.lnf.bias}


def to_numpy(tensors, prefix):
    """{name: tensor, or list with one per layer} -> {prefix + name: array}, layers stacked along a new first axis."""
    def array(tensor):
        if isinstance(tensor, list):
            return np.stack([array(t) for t in tensor])
        return tensor.detach().numpy().copy()
    return {prefix + name: array(tensor) for name, tensor in tensors.items()}


def record_activations(model, tokens, targets):
    """Run the model forward and return all activations, one row per token: {name: tensor, or list with one per layer}.

    Hooks record the inputs and outputs of the modules, so that the model itself needs no bookkeeping.
    """
    acts, hooks = {}, []

    def record(name, module, side, layers=True):
        def hook(module, inputs, output):
            value = (inputs[0] if side == "input" else output).detach()
            value = value.reshape(-1, value.shape[-1]) if value.ndim == 3 else value
            if layers:
                acts.setdefault(name, []).append(value)
            else:
                acts[name] = value
        hooks.append(module.register_forward_hook(hook))

    record("encoded", model.blocks[0].ln1, "input", layers=False)
    for block in model.blocks:
        record("ln1", block.ln1, "output")
        record("qkv", block.qkv, "output")
        record("att", block.attproj, "input")
        record("residual2", block.ln2, "input")
        record("ln2", block.ln2, "output")
        record("fch", block.fc, "output")
        record("fch_gelu", block.fcproj, "input")
        record("residual3", block, "output")
    record("lnf", model.lnf, "output", layers=False)
    record("logits", model.head, "output", layers=False)
    record("losses", model.cross_entropy, "output", layers=False)
    with torch.no_grad():
        model(tokens, targets)
    for hook in hooks:
        hook.remove()
    return acts


def train(model, tokens, targets, steps, learning_rate, weight_decay, grad_clip):
    """Take AdamW steps on one batch. Returns the gradients of the first step, and the loss and norm of every step."""
    results = {}
    losses, norms = [], []
    optimizer = model.optimizer(learning_rate, weight_decay)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        if step == 0:
            gradients = {name: [p.grad for p in tensor] if isinstance(tensor, list) else tensor.grad
                         for name, tensor in model.tensors().items()}
            results |= to_numpy(gradients, "grads.")
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
        for parameter in model.parameters():
            # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6, which changes the sixth digit.
            parameter.grad *= min(1.0, grad_clip / norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return results | {"step_losses": np.array(losses), "step_norms": np.array(norms)}


def random_batch(rng, vocab_size, batch_size, sequence_length):
    """Random tokens and targets (B,T). Each sequence begins and ends with the last token of the vocabulary, whose row of wte
    is next to the padding rows."""
    sequences = rng.integers(0, vocab_size, (batch_size, sequence_length + 1))
    sequences[:, [0, -1]] = vocab_size - 1
    return sequences[:, :-1], sequences[:, 1:]


BFLOAT16_MODELS = 6     # the error of one model's gradients depends on luck


def autocast_errors(config, batch, index):
    """How far the gradients of a random model are from float64 if PyTorch multiplies in bfloat16 (autocast).

    Returns the model's parameters and batch, the gradients in float64, rounded to float32, and the relative errors.
    """
    inputs, targets = random_batch(np.random.default_rng(10 + index), config["vocab_size"], **batch)
    start = GPT2(**config).initialize(seed=20 + index)
    start.roughen(std=0.2, seed=30 + index)
    gradients = {}
    for precision in ("float64", "float32"):
        model = GPT2(**config)
        model.load_state_dict(start.state_dict())
        model.to(getattr(torch, precision))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "float32"):
            loss = model(torch.from_numpy(inputs), torch.from_numpy(targets))
        loss.backward()
        gradients[precision] = to_numpy({name: [p.grad for p in tensor] if isinstance(tensor, list) else tensor.grad
                                         for name, tensor in model.tensors().items()}, "")
    results = dict(tokens=inputs, targets=targets) | to_numpy(start.tensors(), "params.")
    for name, truth in gradients["float64"].items():
        results[f"grads.{name}"] = truth.astype(np.float32)
        results[f"error.{name}"] = np.linalg.norm(gradients["float32"][name] - truth) / np.linalg.norm(truth)
    return {f"bfloat16.{index}.{name}": array for name, array in results.items()}


def main():
    """Write the reference file. Its arrays:

    settings            JSON: the config, batch and training entries of MODELS
    tokens, targets     (B,T)
    params.NAME         the float32 parameters that both precisions start from
    and for PRECISION in float64, float32:
    PRECISION.grads.NAME     gradients of the first step, before clipping
    PRECISION.step_losses    the loss of every step;  PRECISION.step_norms    its gradient norm
    PRECISION.acts.NAME      activations before the first step       (tiny only)
    PRECISION.params.NAME    parameters after the last step          (tiny only)
    and for INDEX 0 to BFLOAT16_MODELS - 1, see autocast_errors:
    bfloat16.INDEX.tokens, targets, params.NAME, grads.NAME, error.NAME     (tiny only)
    """
    parser = argparse.ArgumentParser(description="Write the reference numbers for test_gpt2.py.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("reference_tiny.npz"), metavar="FILE")
    args = parser.parse_args()
    tiny = args.model == "tiny"
    if not tiny and args.output == parser.get_default("output"):
        parser.error("--model d12 writes 2 GB; name the file with --output FILE")

    settings = MODELS[args.model]
    config = {name: size for name, size in settings["config"].items() if name != "padded_vocab_size"}
    inputs, targets = random_batch(np.random.default_rng(1), config["vocab_size"], **settings["batch"])
    tokens, labels = torch.from_numpy(inputs), torch.from_numpy(targets)

    start = GPT2(**config).initialize(seed=2)
    if tiny:
        start.roughen(std=0.2, seed=3)
    arrays = dict(settings=json.dumps(settings), tokens=inputs, targets=targets)
    arrays |= to_numpy(start.tensors(), "params.")

    for precision in ("float64", "float32"):
        model = GPT2(**config)
        model.load_state_dict(start.state_dict())
        model.to(getattr(torch, precision))
        results = {}
        if tiny:
            results |= to_numpy(record_activations(model, tokens, labels), "acts.")
        results |= train(model, tokens, labels, **settings["training"])
        if tiny:
            results |= to_numpy(model.tensors(), "params.")
        arrays |= {f"{precision}.{name}": array for name, array in results.items()}
        print(f"{precision}: losses", *(f"{loss:.4f}" for loss in results["step_losses"]))
        print(f"{precision}: norms ", *(f"{norm:.4f}" for norm in results["step_norms"]))

    if tiny:
        for index in range(BFLOAT16_MODELS):
            arrays |= autocast_errors(config, settings["batch"], index)

    with open(args.output, "wb") as file:
        (np.savez_compressed if tiny else np.savez)(file, **arrays)
    print(f"wrote {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
