"""Train Llama on the CPU: `python train_llama.py`. `python train_llama.py --help` lists all options.

Here are its forward and backward pass. train_gpt2.py has all the rest: the update, the training loop, the command line. Lay the
two files side by side: every line that differs is one of the five changes in dev/derivations/from_gpt2_to_llama.md, or what
they bring along: the norms' epsilon, a gradient of the MLP's width, a classifier that may have a weight of its own.
"""
from functools import partial

from cli import run_program     # first: from here on, Ctrl-C is one line

import numpy as np

import kernels_cpu as kernels
import llama
import train_gpt2
from gpt2 import Tensors, chunks
from kernels_cpu import CLASSIFIER_ROWS, NO_BIAS, NO_POSITIONS
from train_gpt2 import GPT2
from training import OUT_OF_MEMORY_HINT

ROTATE, ROTATE_BACK = 1, -1


class Llama(GPT2):
    """Llama with the methods of train_gpt2.GPT2. config: a llama.Config.

    In the comments, QKV is (NH + 2*KV)*HS, the columns of queries, keys and values.
    """
    definition = llama

    def __init__(self, config: llama.Config, batch_size: int, sequence_length: int, threads: int, recompute: bool = False,
                 dtype: str = "float32"):
        super().__init__(config, batch_size, sequence_length, threads, recompute, dtype)
        self.cos, self.sin = llama.rotations(config, min(config.max_seq_len, batch_size * sequence_length))
        self.rotated_heads = config.num_heads + config.num_key_heads

    def classifier(self, tensors: Tensors) -> np.ndarray:
        """As GPT2.classifier."""
        return tensors.wte if self.config.tied else tensors.headw

    def forward(self, tokens: np.ndarray) -> None:
        """As GPT2.forward."""
        B, T = tokens.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"tokens are {T} long, expected at most {self.config.max_seq_len}")
        buffer = self.acts.flat
        self.acts = self.definition.activations(self.config, B, T, self.recompute, lambda size: buffer)
        self.tokens = tokens
        params, acts = self.params, self.acts

        kernels.encoder_forward(acts.encoded, tokens, params.wte, NO_POSITIONS)                                  # (N, C)
        for l in range(self.config.num_layers):
            self.block_forward(l)                                                                                # (N, C)
        kernels.rmsnorm_forward(acts.lnf, acts.lnf_rstd, acts.residual3[-1], params.lnfw, self.config.epsilon)   # (N, C)

    def block_forward(self, l: int, recomputing: bool = False) -> None:
        """The forward pass of block l: eleven calls. Its output is `acts.residual3[l]` (N, C).

        recomputing: skip the last two calls, whose outputs the block's backward pass does not read
        """
        params, acts, workspace, epsilon = self.params, self.acts, self.workspace, self.config.epsilon
        proj = self.scratch.proj[:self.tokens.size]
        residual = acts.residual3[l - 1] if l > 0 else acts.encoded
        kernels.rmsnorm_forward(acts.ln1[l], acts.ln1_rstd[l], residual, params.ln1w[l], epsilon)                # (N, C)
        kernels.matmul_forward(acts.qkv[l], acts.ln1[l], params.qkvw[l], params.qkvb[l], workspace)              # (N, QKV)
        kernels.rope(acts.qkv[l], self.cos, self.sin, self.rotated_heads, self.tokens.shape[1], 0, ROTATE)       # (N, QKV)
        kernels.attention_forward(acts.att[l], acts.att_lse[l], acts.qkv[l], workspace)                          # (N, NH*HS)
        kernels.matmul_forward(proj, acts.att[l], params.attprojw[l], NO_BIAS, workspace)                        # (N, C)
        kernels.residual_forward(acts.residual2[l], residual, proj)                                              # (N, C)
        kernels.rmsnorm_forward(acts.ln2[l], acts.ln2_rstd[l], acts.residual2[l], params.ln2w[l], epsilon)       # (N, C)
        kernels.matmul_forward(acts.fch[l], acts.ln2[l], params.fcw[l], NO_BIAS, workspace)                      # (N, 2H)
        kernels.swiglu_forward(acts.fch_swiglu[l], acts.fch[l])                                                  # (N, H)
        if recomputing:
            return
        kernels.matmul_forward(proj, acts.fch_swiglu[l], params.fcprojw[l], NO_BIAS, workspace)                  # (N, C)
        kernels.residual_forward(acts.residual3[l], acts.residual2[l], proj)                                     # (N, C)

    def backward(self, targets: np.ndarray, accumulation_steps: int = 1) -> float:
        """As GPT2.backward."""
        N = self.tokens.size
        params, grads, acts, workspace = self.params, self.grads, self.acts, self.workspace
        targets = targets.reshape(N)
        dresidual, dln, datt, dqkv, dfch_swiglu, dfch = (
            getattr(self.scratch, name)[:N] for name in ("dresidual", "dln", "datt", "dqkv", "dfch_swiglu", "dfch"))

        for rows in chunks(N, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], self.classifier(params), NO_BIAS, workspace)          # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows],
                                     1 / (N * accumulation_steps), self.config.vocab_size)                       # (rows, Vp)
            # If tied, this is wte's gradient from the classifier. encoder_backward, the last call, adds the embedding's.
            kernels.matmul_backward(dln[rows], self.classifier(grads), NO_BIAS,
                                    logits, acts.lnf[rows], self.classifier(params), workspace)                  # (rows, C)
        dresidual[...] = 0
        kernels.rmsnorm_backward(dresidual, grads.lnfw, dln, acts.lnf_rstd, acts.residual3[-1], params.lnfw)     # (N, C)
        L = self.config.num_layers
        for l in reversed(range(L)):
            residual = acts.residual3[l - 1] if l > 0 else acts.encoded
            if self.recompute and l + 1 < L:    # the last block's activations are still in memory
                self.block_forward(l, recomputing=True)
            # residual3 = residual2 + proj: dresidual is the gradient of both.
            kernels.matmul_backward(dfch_swiglu, grads.fcprojw[l], NO_BIAS,
                                    dresidual, acts.fch_swiglu[l], params.fcprojw[l], workspace)                 # (N, H)
            kernels.swiglu_backward(dfch, dfch_swiglu, acts.fch[l])                                              # (N, 2H)
            kernels.matmul_backward(dln, grads.fcw[l], NO_BIAS,
                                    dfch, acts.ln2[l], params.fcw[l], workspace)                                 # (N, C)
            kernels.rmsnorm_backward(dresidual, grads.ln2w[l],
                                     dln, acts.ln2_rstd[l], acts.residual2[l], params.ln2w[l])                   # (N, C)
            # residual2 = residual + proj: dresidual is the gradient of both.
            kernels.matmul_backward(datt, grads.attprojw[l], NO_BIAS,
                                    dresidual, acts.att[l], params.attprojw[l], workspace)                       # (N, NH*HS)
            kernels.attention_backward(dqkv, datt, acts.att[l], acts.att_lse[l], acts.qkv[l], workspace)         # (N, QKV)
            kernels.rope(dqkv, self.cos, self.sin, self.rotated_heads, self.tokens.shape[1], 0, ROTATE_BACK)     # (N, QKV)
            kernels.matmul_backward(dln, grads.qkvw[l], grads.qkvb[l],
                                    dqkv, acts.ln1[l], params.qkvw[l], workspace)                                # (N, C)
            kernels.rmsnorm_backward(dresidual, grads.ln1w[l],
                                     dln, acts.ln1_rstd[l], residual, params.ln1w[l])                            # (N, C)
        kernels.encoder_backward(grads.wte, NO_POSITIONS, dresidual, self.tokens)                                # (Vp, C)
        return float(np.mean(acts.losses, dtype=np.float64))


run_every_kernel = partial(train_gpt2.run_every_kernel, model_class=Llama)


if __name__ == "__main__":
    run_program(partial(train_gpt2.main, Llama), OUT_OF_MEMORY_HINT)
