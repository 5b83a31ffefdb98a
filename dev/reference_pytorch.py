"""An independent GPT-2 and Llama in plain PyTorch, the reference for test_gpt2.py and test_llama.py.

    python dev/reference_pytorch.py                                    writes dev/reference_tiny.npz
    python dev/reference_pytorch.py --model d12 --output d12.npz       the 124M shape, about 2 GB
    python dev/reference_pytorch.py --model llama-tiny                 writes dev/reference_llama_tiny.npz
    python dev/reference_pytorch.py --model llama-tied                 writes dev/reference_llama_tied.npz
    python dev/reference_pytorch.py --model llama-smollm2 --output smollm2.npz     SmolLM2-135M's sizes, about 2 GB

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
    # Six heads in groups of three, of 6 channels, so that no two of 6 * 6, 21 and 17 are the same.
    "llama-tiny": dict(
        config=dict(max_seq_len=72, vocab_size=131, padded_vocab_size=256, num_layers=2, num_heads=6, num_key_heads=2,
                    head_size=6, channels=21, hidden=17, rope_base=1e4, epsilon=1e-5, tied=False, qkv_bias=True),
        batch=dict(batch_size=2, sequence_length=67),
        training=dict(steps=10, learning_rate=1e-3, weight_decay=0.1, grad_clip=1.0),
    ),
    # The other branches: one matrix for embedding and classifier, and no biases. One key head for all queries; rope_base and
    # epsilon are not those that llama.Config has by default. The gradient norm falls from 0.78 to 0.70, so clipping at 0.75
    # acts on the first steps only.
    "llama-tied": dict(
        config=dict(max_seq_len=72, vocab_size=61, padded_vocab_size=128, num_layers=1, num_heads=3, num_key_heads=1,
                    head_size=4, channels=13, hidden=19, rope_base=1e3, epsilon=1e-3, tied=True, qkv_bias=False),
        batch=dict(batch_size=2, sequence_length=67),
        training=dict(steps=10, learning_rate=1e-3, weight_decay=0.1, grad_clip=0.75),
    ),
    "llama-smollm2": dict(
        config=dict(max_seq_len=8192, vocab_size=49152, padded_vocab_size=49152, num_layers=30, num_heads=9, num_key_heads=3,
                    head_size=64, channels=576, hidden=1536, rope_base=1e5, epsilon=1e-5, tied=True, qkv_bias=False),
        batch=dict(batch_size=4, sequence_length=64),
        training=dict(steps=10, learning_rate=1e-4, weight_decay=0.1, grad_clip=1.0),
    ),
}
LARGE = ("d12", "llama-smollm2")    # only gradients, losses and norms are kept


def causal_attention(q, k, v):
    """Each position's average of the values up to its own, weighted by the softmax of its scores: all (B,NH,T,HS)."""
    T, HS = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(HS)                            # (B,NH,T,T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v                # (B,NH,T,HS)


class Block(nn.Module):
    """One block of GPT-2, (B,T,C) -> (B,T,C)."""
    qkv_module, activation = "qkv", "fch_gelu"          # for record_activations

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
            out = causal_attention(q, k, v)
        return out.transpose(1, 2).reshape(B, T, C3 // 3)

    def forward(self, x):
        x = x + self.attproj(self.attend(self.qkv(self.ln1(x))))
        x = x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))
        return x


class Rotary(nn.Module):
    """Rotary position embedding of the queries and keys in qkv (B,T,(NH+2KV)*HS), by halves: channel i of a head is paired with
    channel HS/2 + i, as in Hugging Face's Llama."""

    def __init__(self, max_seq_len, num_rotated_heads, head_size, rope_base):
        super().__init__()
        self.num_rotated_heads = num_rotated_heads
        frequencies = rope_base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)       # (maxT,HS/2)
        angles = angles.repeat(1, 2)[:, None]                                                   # (maxT,1,HS)
        self.register_buffer("cos", angles.cos(), persistent=False)     # in float64 until the model is converted
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, qkv):
        B, T, _ = qkv.shape
        heads = qkv.view(B, T, -1, self.cos.shape[-1])                                          # (B,T,NH+2KV,HS)
        x, values = heads[:, :, :self.num_rotated_heads], heads[:, :, self.num_rotated_heads:]
        first, second = x.chunk(2, dim=-1)
        x = x * self.cos[:T] + torch.cat((-second, first), dim=-1) * self.sin[:T]
        return torch.cat((x, values), dim=2).flatten(2)


class LlamaBlock(nn.Module):
    """One block of Llama, (B,T,C) -> (B,T,C)."""
    qkv_module, activation = "rotary", "fch_swiglu"     # for record_activations

    def __init__(self, max_seq_len, num_heads, num_key_heads, head_size, channels, hidden, rope_base, epsilon, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads
        self.head_size = head_size
        self.ln1 = nn.RMSNorm(channels, epsilon)
        self.qkv = nn.Linear(channels, (num_heads + 2 * num_key_heads) * head_size, bias=qkv_bias)
        self.rotary = Rotary(max_seq_len, num_heads + num_key_heads, head_size, rope_base)
        self.attproj = nn.Linear(num_heads * head_size, channels, bias=False)
        self.ln2 = nn.RMSNorm(channels, epsilon)
        self.fc = nn.Linear(channels, 2 * hidden, bias=False)                   # the gates, then the values
        self.fcproj = nn.Linear(hidden, channels, bias=False)

    def attend(self, qkv):
        """Causal self-attention with grouped queries, (B,T,(NH+2KV)*HS) -> (B,T,NH*HS)."""
        NH, KV = self.num_heads, self.num_key_heads
        heads = qkv.unflatten(-1, (-1, self.head_size)).transpose(1, 2)         # (B,NH+2KV,T,HS)
        q, k, v = heads.split((NH, KV, KV), dim=1)
        k, v = (x.repeat_interleave(NH // KV, dim=1) for x in (k, v))           # NH/KV neighboring queries share a key
        return causal_attention(q, k, v).transpose(1, 2).flatten(2)

    def mlp(self, x):
        gate, value = self.fc(x).chunk(2, dim=-1)
        return self.fcproj(F.silu(gate) * value)

    def forward(self, x):
        x = x + self.attproj(self.attend(self.rotary(self.qkv(self.ln1(x)))))
        x = x + self.mlp(self.ln2(x))
        return x


class Model(nn.Module):
    """What GPT2 and Llama have in common: a model that returns its mean cross-entropy.

    A subclass has the modules wte, blocks, lnf and head. They and the modules of a block are named like the program's tensors.
    """

    def __init__(self):
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(reduction="none")

    def embed(self, tokens):
        return self.wte(tokens)

    def forward(self, tokens, targets):
        """Mean loss of predicting targets (B,T) from tokens (B,T), both int64."""
        x = self.embed(tokens)                                                  # (B,T,C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.lnf(x))                                         # (B,T,V)
        return self.cross_entropy(logits.flatten(0, 1), targets.flatten()).mean()

    @torch.no_grad()
    def initialize(self, seed):
        """GPT-2's initialization: weights from N(0, 0.02), the two projections into the residual stream scaled by 1/sqrt(2L)
        because 2L of them are summed; biases 0, norm weights 1."""
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
        """Add N(0, std) to every parameter. With biases 0 and norm weights 1, a term missing in a backward pass could go
        unnoticed."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
        return self

    def optimizer(self, learning_rate, weight_decay):
        """AdamW with weight decay on the matrices only, not on biases and norms."""
        matrices = [p for p in self.parameters() if p.ndim == 2]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **ADAMW)

    def tensors(self):
        """The parameters by the program's names; those of the blocks are lists, one tensor per layer.

        wte.weight is wte, and blocks.0.ln1.weight is the first of ln1w. A tied head has no parameters of its own.
        """
        named = {}
        for path, parameter in self.named_parameters():
            *block, module, kind = path.split(".")
            name = module if module in ("wte", "wpe") else module + kind[0]
            if block:
                named.setdefault(name, []).append(parameter)
            else:
                named[name] = parameter
        return named

    def gradients(self):
        """The gradients, like tensors()."""
        return {name: [p.grad for p in tensor] if isinstance(tensor, list) else tensor.grad
                for name, tensor in self.tensors().items()}


class GPT2(Model):
    """attention is "plain" (softmax of the scores, written out) or "sdpa" (PyTorch's fused kernel)."""

    def __init__(self, max_seq_len, vocab_size, num_layers, num_heads, channels, attention="plain"):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, channels)
        self.wpe = nn.Embedding(max_seq_len, channels)
        self.blocks = nn.ModuleList(Block(num_heads, channels, attention) for _ in range(num_layers))
        self.lnf = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocab_size, bias=False)
        self.head.weight = self.wte.weight  # tied: one matrix reads tokens in and scores tokens out

    def embed(self, tokens):
        return self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]


class Llama(Model):
    """The arguments are the fields of the program's llama.Config, less the padding."""

    def __init__(self, max_seq_len, vocab_size, num_layers, num_heads, num_key_heads, head_size, channels, hidden, rope_base,
                 epsilon, tied, qkv_bias):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, channels)
        self.blocks = nn.ModuleList(LlamaBlock(max_seq_len, num_heads, num_key_heads, head_size, channels, hidden, rope_base,
                                               epsilon, qkv_bias) for _ in range(num_layers))
        self.lnf = nn.RMSNorm(channels, epsilon)
        self.head = nn.Linear(channels, vocab_size, bias=False)
        if tied:
            self.head.weight = self.wte.weight


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
        record("qkv", getattr(block, block.qkv_module), "output")
        record("att", block.attproj, "input")
        record("residual2", block.ln2, "input")
        record("ln2", block.ln2, "output")
        record("fch", block.fc, "output")
        record(block.activation, block.fcproj, "input")
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
            results |= to_numpy(model.gradients(), "grads.")
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


def autocast_errors(model_class, config, batch, index):
    """How far the gradients of a random model are from float64 if PyTorch multiplies in bfloat16 (autocast).

    Returns the model's parameters and batch, the gradients in float64, rounded to float32, and the relative errors.
    """
    inputs, targets = random_batch(np.random.default_rng(10 + index), config["vocab_size"], **batch)
    start = model_class(**config).initialize(seed=20 + index)
    start.roughen(std=0.2, seed=30 + index)
    gradients = {}
    for precision in ("float64", "float32"):
        model = model_class(**config)
        model.load_state_dict(start.state_dict())
        model.to(getattr(torch, precision))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "float32"):
            loss = model(torch.from_numpy(inputs), torch.from_numpy(targets))
        loss.backward()
        gradients[precision] = to_numpy(model.gradients(), "")
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
    PRECISION.acts.NAME      activations before the first step       (not of LARGE models)
    PRECISION.params.NAME    parameters after the last step          (not of LARGE models)
    and for INDEX 0 to BFLOAT16_MODELS - 1, see autocast_errors:
    bfloat16.INDEX.tokens, targets, params.NAME, grads.NAME, error.NAME     (not of LARGE models)
    """
    parser = argparse.ArgumentParser(description="Write the reference numbers for test_gpt2.py and test_llama.py.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside this file, reference_MODEL.npz")
    args = parser.parse_args()
    tiny = args.model not in LARGE
    if not tiny and args.output is None:
        parser.error(f"--model {args.model} writes 2 GB; name the file with --output FILE")
    output = args.output or Path(__file__).with_name(f"reference_{args.model.replace('-', '_')}.npz")

    settings = MODELS[args.model]
    model_class = Llama if args.model.startswith("llama") else GPT2
    config = {name: size for name, size in settings["config"].items() if name != "padded_vocab_size"}
    inputs, targets = random_batch(np.random.default_rng(1), config["vocab_size"], **settings["batch"])
    tokens, labels = torch.from_numpy(inputs), torch.from_numpy(targets)

    start = model_class(**config).initialize(seed=2)
    if tiny:
        start.roughen(std=0.2, seed=3)
    arrays = dict(settings=json.dumps(settings), tokens=inputs, targets=targets)
    arrays |= to_numpy(start.tensors(), "params.")

    for precision in ("float64", "float32"):
        model = model_class(**config)
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
            arrays |= autocast_errors(model_class, config, settings["batch"], index)

    with open(output, "wb") as file:
        (np.savez_compressed if tiny else np.savez)(file, **arrays)
    print(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
