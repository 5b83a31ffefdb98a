"""Generate text with Llama on the CPU: `python generate_llama.py --model smollm2 --chat`. --help lists all options.

Here is its decoder, whose flat forward pass is train_llama.py's with a KV cache. generate_gpt2.py has all the rest: compact
weights, sampling, text, the command line.
"""
from functools import partial

from cli import run_program     # first: from here on, Ctrl-C is one line

import generate_gpt2
import kernels_cpu as kernels
import llama
from generate_gpt2 import MEMORY_BOUND_ROWS, OUT_OF_MEMORY_HINT, encoder_forward, linear_forward
from gpt2 import Tensors
from kernels_cpu import NO_BIAS, NO_POSITIONS
from train_llama import ROTATE


class Decoder(generate_gpt2.Decoder):
    """Llama with a KV cache, see generate_gpt2.Decoder. config: a llama.Config."""

    def __init__(self, config, params, num_texts, threads, dtype="float32"):
        super().__init__(config, params, num_texts, threads, dtype)
        self.cos, self.sin = llama.rotations(config, config.max_seq_len)
        self.rotated_heads = config.num_heads + config.num_key_heads

    def classifier(self):
        return self.params.wte if self.config.tied else self.params.headw

    def forward(self, tokens):
        """As generate_gpt2.Decoder.forward. The cache has rotated keys: a rotation depends on the key's own position only."""
        B, T = tokens.shape
        N, C, H, workspace, epsilon = B * T, self.config.channels, self.config.hidden, self.workspace, self.config.epsilon
        position, end = self.length, self.length + T
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens, expected at most {self.config.max_seq_len}")
        if len(self.acts.residual) != N:
            qkv, att = self.config.qkv_channels, self.config.att_channels
            self.acts = Tensors({"residual": (N, C), "ln": (N, C), "rstd": (N,), "qkv": (N, qkv), "att": (N, att),
                                 "proj": (N, C), "fch": (N, 2 * H), "fch_swiglu": (N, H)})
        params, acts, residual, attention_forward = self.params, self.acts, self.acts.residual, kernels.attention_cached_forward
        rmsnorm_forward, rope, residual_forward = kernels.rmsnorm_forward, kernels.rope, kernels.residual_forward
        swiglu_forward = kernels.swiglu_forward
        if N <= MEMORY_BOUND_ROWS:      # waking the other threads would take longer than the work
            rmsnorm_forward, rope = kernels.rmsnorm_forward_on_one_thread, kernels.rope_on_one_thread
            residual_forward = kernels.residual_forward_on_one_thread
            swiglu_forward = kernels.swiglu_forward_on_one_thread

        encoder_forward(residual, tokens, params.wte, NO_POSITIONS)                                              # (N, C)
        for l in range(self.config.num_layers):
            rmsnorm_forward(acts.ln, acts.rstd, residual, params.ln1w[l], epsilon)                               # (N, C)
            linear_forward(acts.qkv, acts.ln, params.qkvw[l], params.qkvb[l], workspace)                         # (N, QKV)
            rope(acts.qkv, self.cos, self.sin, self.rotated_heads, T, position, ROTATE)                          # (N, QKV)
            attention_forward(acts.att, self.keys[l, :B], self.values[l, :B], acts.qkv, position, workspace)     # (N, NH*HS)
            linear_forward(acts.proj, acts.att, params.attprojw[l], NO_BIAS, workspace)                          # (N, C)
            residual_forward(residual, residual, acts.proj)                                                      # (N, C)
            rmsnorm_forward(acts.ln, acts.rstd, residual, params.ln2w[l], epsilon)                               # (N, C)
            linear_forward(acts.fch, acts.ln, params.fcw[l], NO_BIAS, workspace)                                 # (N, 2H)
            swiglu_forward(acts.fch_swiglu, acts.fch)                                                            # (N, H)
            linear_forward(acts.proj, acts.fch_swiglu, params.fcprojw[l], NO_BIAS, workspace)                    # (N, C)
            residual_forward(residual, residual, acts.proj)                                                      # (N, C)
        rmsnorm_forward(acts.ln, acts.rstd, residual, params.lnfw, epsilon)                                      # (N, C)
        self.length = end
        return acts.ln


model_and_decoder = dict(definition=llama, decoder_class=Decoder)
run_every_kernel = partial(generate_gpt2.run_every_kernel, **model_and_decoder)


if __name__ == "__main__":
    run_program(partial(generate_gpt2.main, **model_and_decoder), OUT_OF_MEMORY_HINT, output_required=True)
