"""Generate text with GPT-2 on the GPU: `python generate_gpt2_gpu.py --model MODEL --prompt TEXT`, or --help for the rest.

The GPU version of generate_gpt2.py, from which it imports everything except the decoder. The decoder has the same KV cache and
the same flat forward pass, with the kernels of kernels_gpu.py. `--device cpu` runs them without a GPU (cuda_on_cpu).
"""
from cli import run_program     # first: from here on, Ctrl-C is one line

import generate_gpt2
import kernels_gpu as kernels
from device import open_device
from generate_gpt2 import check_cache_memory, load, parse_options, read_prompt, run
from gpt2 import ALIGNMENT, Tensors, parameter_shapes

MEMORY_BOUND_ROWS = 12      # up to this many rows, a matrix product is memory-bound: reading the weight takes the time
OUT_OF_MEMORY_HINT = "choose a smaller --model or fewer --num-samples"


def linear_forward(out, inp, weight, bias):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), with the faster kernel for N rows."""
    product = kernels.matvec_forward if len(inp) <= MEMORY_BOUND_ROWS else kernels.matmul_forward
    product(out, inp, weight, bias)


class Decoder(generate_gpt2.Decoder):
    """generate_gpt2.Decoder with its parameters and KV cache on `device`.

    params: Tensors of NumPy arrays. `forward` returns an array on the device, `logits` and `losses` return NumPy arrays.
    """

    def __init__(self, config, params, num_texts, device):
        self.config, self.device = config, device
        self.params = Tensors(parameter_shapes(config), device.empty)
        device.copy_to_device(self.params.flat, params.flat)
        cache = (config.num_layers, num_texts, config.num_heads, config.max_seq_len, config.channels // config.num_heads)
        self.keys, self.values = device.zeros(cache), device.zeros(cache)
        self.start = self.length = 0
        self.acts = Tensors({"residual": (0, 0)}, device.empty)
        self.no_bias = device.empty(0)

    def forward(self, tokens):
        """From tokens (B, T), a NumPy array, to the normalized output of the last block (N, C), N = B*T."""
        kernels.use(self.device)
        B, T = tokens.shape
        N, C, L = B * T, self.config.channels, self.config.num_layers
        position, end = self.length, self.length + T
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens, expected at most {self.config.max_seq_len}")
        if len(self.acts.residual) != N:
            self.acts = Tensors({"residual": (N, C), "residual2": (N, C), "ln": (N, C), "mean": (N,), "rstd": (N,),
                                 "qkv": (N, 3 * C), "att": (N, C), "proj": (N, C), "fch": (N, 4 * C), "fch_gelu": (N, 4 * C)},
                                self.device.empty, ALIGNMENT)
        params, acts, no_bias = self.params, self.acts, self.no_bias
        norm = acts.ln, acts.mean, acts.rstd
        bias_gelu_forward = kernels.bias_gelu_exact_forward if self.config.exact_gelu else kernels.bias_gelu_forward

        kernels.encoder_forward(acts.residual, self.device.to_device(tokens), params.wte, params.wpe[position:end])  # (N, C)
        kernels.layernorm_forward(*norm, acts.residual, params.ln1w[0], params.ln1b[0])                          # (N, C)
        for l in range(L):
            linear_forward(acts.qkv, acts.ln, params.qkvw[l], params.qkvb[l])                                    # (N, 3C)
            kernels.attention_cached_forward(acts.att, self.keys[l, :B], self.values[l, :B], acts.qkv, position)  # (N, C)
            linear_forward(acts.proj, acts.att, params.attprojw[l], no_bias)                                     # (N, C)
            kernels.residual_layernorm_forward(acts.residual2, *norm, acts.residual, acts.proj, params.attprojb[l],
                                               params.ln2w[l], params.ln2b[l])                                   # (N, C)
            linear_forward(acts.fch, acts.ln, params.fcw[l], no_bias)                                            # (N, 4C)
            bias_gelu_forward(acts.fch_gelu, acts.fch, params.fcb[l])                                            # (N, 4C)
            linear_forward(acts.proj, acts.fch_gelu, params.fcprojw[l], no_bias)                                 # (N, C)
            # The layernorm that follows is the first of the next block, or the model's last.
            weight, bias = (params.ln1w[l + 1], params.ln1b[l + 1]) if l + 1 < L else (params.lnfw, params.lnfb)
            kernels.residual_layernorm_forward(acts.residual, *norm, acts.residual2, acts.proj, params.fcprojb[l],
                                               weight, bias)                                                     # (N, C)
        self.length = end
        return acts.ln

    def logits_on_device(self, rows):
        kernels.use(self.device)
        logits = self.device.empty((len(rows), self.config.padded_vocab_size))      # whole rows, at aligned addresses
        linear_forward(logits, rows, self.params.wte, self.no_bias)                                              # (n, Vp)
        return logits

    def logits(self, rows):
        """The logits (n, V) of the tokens that follow, for rows (n, C) of what `forward` returned."""
        return self.device.to_host(self.logits_on_device(rows))[:, :self.config.vocab_size]

    def losses(self, rows, targets):
        """The cross-entropies (n,), in nats, of targets (n,), a NumPy array, given rows (n, C) of what `forward` returned."""
        losses, logits = self.device.empty(len(rows)), self.logits_on_device(rows)
        kernels.fused_classifier(losses, logits, self.device.to_device(targets), 0.0, self.config.vocab_size)
        return self.device.to_host(losses)


def main():
    options = parse_options(
        "Generate text with GPT-2 on a GPU.",
        device=dict(default="cuda", help="cuda, cuda:1 for the second GPU, or cpu: the same kernels on the CPU (slow)"))
    prompt = read_prompt(options)
    device = open_device(options.device, "float32")
    config, params, tokenizer = load(options)
    check_cache_memory(config, options.num_samples, 4 * params.size + device.library_bytes, device.memory(), device.name)
    run(Decoder(config, params, options.num_samples, device), tokenizer, prompt, options)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT, output_required=True)
