"""Generate text with GPT-2 on the GPU: `python generate_gpt2_gpu.py --model MODEL --prompt TEXT`, or --help for the rest.

The GPU version of generate_gpt2.py, from which it imports everything except the decoder. The decoder has the same KV cache and
the same flat forward pass, with the kernels of kernels_gpu.py. `--device cpu` runs them without a GPU (cuda_on_cpu).
"""
from functools import partial

from cli import run_program     # first: from here on, Ctrl-C is one line

import numpy as np

import generate_gpt2
import gpt2
import kernels_gpu as kernels
from device import open_device
from generate_gpt2 import check_cache_memory, load, parse_options, read_prompt, run
from gpt2 import ALIGNMENT, MATRICES, Tensors, parameter_shapes

MEMORY_BOUND_ROWS = 12      # up to this many rows, a matrix product is memory-bound: reading the weight takes the time
OUT_OF_MEMORY_HINT = "choose a smaller --model or fewer --num-samples"


def linear_forward(out, inp, weight, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), with the faster kernel for N rows."""
    product = kernels.matvec_forward if len(inp) <= MEMORY_BOUND_ROWS else kernels.matmul_forward
    product(out, inp, weight, bias)


class Decoder(generate_gpt2.Decoder):
    """generate_gpt2.Decoder with its weights and KV cache on `device`, in the device's `Float`.

    params: Tensors of NumPy arrays. `forward` returns an array on the device, `logits` and `losses` return NumPy arrays.
    """

    def __init__(self, config, params, num_texts, device):
        self.config, self.device = config, device
        empty = partial(device.empty, dtype=device.Float)
        self.weights = Tensors(parameter_shapes(config), empty)
        device.copy_to_device(self.weights.flat, params.flat.astype(device.Float, copy=False))
        vectors = {name: shape for name, shape in params.shapes.items() if name not in MATRICES}    # float32 with any dtype
        self.params = Tensors(vectors, device.empty)
        for name, tensor in self.params.items():
            device.copy_to_device(tensor, getattr(params, name))
        cache = (config.num_layers, num_texts, config.num_heads, config.max_seq_len, config.channels // config.num_heads)
        self.keys, self.values = device.zeros(cache, device.Float), device.zeros(cache, device.Float)
        self.start = self.length = 0
        self.acts = Tensors({"residual": (0, 0)}, empty)
        self.graphs = {}
        self.no_bias = device.none

    def forward(self, tokens):
        """From tokens (B, T), a NumPy array, to the normalized output of the last block (N, C), N = B*T."""
        kernels.use(self.device)
        B, T = tokens.shape
        N, C = B * T, self.config.channels
        position, end = self.length, self.length + T
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens, expected at most {self.config.max_seq_len}")
        if len(self.acts.residual) != N:
            self.acts = Tensors({"residual": (N, C), "residual2": (N, C), "ln": (N, C), "mean": (N,), "rstd": (N,),
                                 "qkv": (N, 3 * C), "att": (N, C), "proj": (N, C), "fch": (N, 4 * C), "fch_gelu": (N, 4 * C)},
                                partial(self.device.empty, dtype=self.device.Float), ALIGNMENT,
                                self.device.Float, float32=("mean", "rstd"))
            self.inputs = self.device.empty(1 + N, np.int32)    # the position and the tokens
            self.graphs = {}                                    # the old ones read arrays that are gone
        self.device.copy_to_device(self.inputs, np.append(np.int32(position), tokens))
        work = partial(self.forward_pass, B, T, position)
        if T == 1 and self.config.max_seq_len <= kernels.CACHED_POSITIONS:      # the launches are those of any other position
            self.device.replay(self.graphs, B, work)
        else:
            work()
        self.length = end
        return self.acts.ln

    def forward_pass(self, B, T, position):
        params, weights, acts, no_bias = self.params, self.weights, self.acts, self.no_bias
        on_device, tokens = self.inputs[:1], self.inputs[1:].reshape(B, T)
        norm, L = (acts.ln, acts.mean, acts.rstd), self.config.num_layers
        bias_gelu_forward = kernels.bias_gelu_exact_forward if self.config.exact_gelu else kernels.bias_gelu_forward

        kernels.encoder_forward(acts.residual, tokens, weights.wte, weights.wpe, on_device)                      # (N, C)
        kernels.layernorm_forward(*norm, acts.residual, params.ln1w[0], params.ln1b[0])                          # (N, C)
        for l in range(L):
            linear_forward(acts.qkv, acts.ln, weights.qkvw[l], weights.qkvb[l])                                  # (N, 3C)
            kernels.attention_cached_forward(acts.att, self.keys[l, :B], self.values[l, :B], acts.qkv, position,
                                             on_device)                                                          # (N, C)
            linear_forward(acts.proj, acts.att, weights.attprojw[l], no_bias)                                    # (N, C)
            kernels.residual_layernorm_forward(acts.residual2, *norm, acts.residual, acts.proj, params.attprojb[l],
                                               params.ln2w[l], params.ln2b[l])                                   # (N, C)
            linear_forward(acts.fch, acts.ln, weights.fcw[l], no_bias)                                           # (N, 4C)
            bias_gelu_forward(acts.fch_gelu, acts.fch, params.fcb[l])                                            # (N, 4C)
            linear_forward(acts.proj, acts.fch_gelu, weights.fcprojw[l], no_bias)                                # (N, C)
            # The layernorm that follows is the first of the next block, or the model's last.
            weight, bias = (params.ln1w[l + 1], params.ln1b[l + 1]) if l + 1 < L else (params.lnfw, params.lnfb)
            kernels.residual_layernorm_forward(acts.residual, *norm, acts.residual2, acts.proj, params.fcprojb[l],
                                               weight, bias)                                                     # (N, C)

    def logits_on_device(self, rows, dtype):
        kernels.use(self.device)
        logits = self.device.empty((len(rows), self.config.padded_vocab_size), dtype)   # whole rows, at aligned addresses
        linear_forward(logits, rows, self.weights.wte, self.no_bias)                                             # (n, Vp)
        return logits

    def logits(self, rows):
        """The logits (n, V) of the tokens that follow, for rows (n, C) of what `forward` returned."""
        return self.device.to_host(self.logits_on_device(rows, np.float32))[:, :self.config.vocab_size]

    def losses(self, rows, targets):
        """The cross-entropies (n,), in nats, of targets (n,), a NumPy array, given rows (n, C) of what `forward` returned."""
        losses, logits = self.device.empty(len(rows)), self.logits_on_device(rows, self.device.Float)
        kernels.fused_classifier(losses, logits, self.device.to_device(targets), 0.0, self.config.vocab_size)
        return self.device.to_host(losses)


def main():
    options = parse_options(
        gpt2, "GPU",
        device=dict(default="cuda", help="cuda, cuda:1 for the second GPU, or cpu: the same kernels on the CPU (slow)"),
        dtype=dict(default="float32", choices=["float32", "bfloat16"], help="of weights, activations and the KV "
                   "cache; bfloat16 takes half the memory"))
    prompt = read_prompt(options)
    device = open_device(options.device, options.dtype)
    config, params, tokenizer = load(gpt2, options)
    itemsize = device.Float.itemsize
    check_cache_memory(config, options.num_samples, itemsize * params.size + device.library_bytes, device.memory(), device.name,
                       itemsize)
    run(Decoder(config, params, options.num_samples, device), tokenizer, prompt, options)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT, output_required=True)
