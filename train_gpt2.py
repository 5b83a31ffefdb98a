"""Train GPT-2 on the CPU: `python train_gpt2.py`, or `python train_gpt2.py --help` for what can be chosen.

Read it from the top: the model's memory, its forward pass, its backward pass, the update, and the training loop. The
forward and backward passes are flat lists of kernel calls (kernels_cpu.py) that mirror each other; each trailing comment
gives the shape of what the call writes.
"""
import math
import time
from copy import copy
from dataclasses import replace

import numpy as np

import kernels_cpu as kernels
from checkpoint import save_model
from dataloader import DataLoader
from files import run_program
from gpt2 import (WEIGHT_DECAYED, Config, Tensors, activation_shapes, chunks, initialize, parameter_shapes,
                  scratch_shapes)
from training import (NEW_MODELS, TO_SAVE_MEMORY, TrainingLog, check_finite, due, first_model, learning_rate, number,
                      parse_options, prepare_data, print_configuration, sample_text)

CLASSIFIER_ROWS = 512     # tokens whose logits exist at any one time: 512 * 50304 * 4 bytes = 103 MB
NO_BIAS = np.empty(0, dtype=np.float32)
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8     # with small batches, a second moment of 0.95 forgets rare tokens too soon


class GPT2:
    """A GPT-2 with its gradients, moments and activations, for batches of up to (batch_size, sequence_length) tokens.

    `threads` is how many blocks a matrix product is cut into: as many as Numba has threads. The parameters are zero until
    they are filled, by `initialize` or through the views in `params`.
    """

    def __init__(self, config, batch_size, sequence_length, threads):
        self.config = config
        self.workspace = kernels.make_workspace(threads)
        shapes = parameter_shapes(config)
        self.params, self.grads, self.adam_m, self.adam_v = (Tensors(shapes) for _ in range(4))
        self.acts = Tensors(activation_shapes(config, batch_size, sequence_length))
        self.scratch = Tensors(scratch_shapes(config, batch_size, sequence_length, CLASSIFIER_ROWS))
        self.tokens = None

    def initialize(self, seed):
        """GPT-2's random initialisation."""
        initialize(self.params, self.config, seed)

    def set_params(self, params):
        """Copy the parameters from `params`, Tensors of the same shapes."""
        self.params.flat[...] = params.flat

    def get_params(self):
        """The parameters, Tensors of NumPy arrays."""
        return self.params

    def forward(self, tokens):
        """From tokens (B, T) to the normalised output of the last block, `acts.lnf` (N, C).

        T may be up to the context, B*T up to the model's; ValueError if not. `loss` and `backward` belong to the latest
        forward pass: the next one lays its activations out anew, for its own B and T, in the same memory.
        """
        B, T = tokens.shape
        N = B * T
        if T > self.config.max_seq_len:
            raise ValueError(f"tokens are {T} long, expected at most {self.config.max_seq_len}")
        buffer = self.acts.flat
        self.acts = Tensors(activation_shapes(self.config, B, T), allocate=lambda size: buffer)
        self.tokens = tokens
        params, acts, workspace = self.params, self.acts, self.workspace
        proj = self.scratch.proj[:N]

        kernels.encoder_forward(acts.encoded, tokens, params.wte, params.wpe)                                    # (N, C)
        residual = acts.encoded
        for l in range(self.config.num_layers):
            kernels.layernorm_forward(acts.ln1[l], acts.ln1_mean[l], acts.ln1_rstd[l],
                                      residual, params.ln1w[l], params.ln1b[l])                                  # (N, C)
            kernels.matmul_forward(acts.qkv[l], acts.ln1[l], params.qkvw[l], params.qkvb[l], workspace)          # (N, 3C)
            kernels.attention_forward(acts.att[l], acts.att_lse[l], acts.qkv[l])                                 # (N, C)
            kernels.matmul_forward(proj, acts.att[l], params.attprojw[l], params.attprojb[l], workspace)         # (N, C)
            kernels.residual_forward(acts.residual2[l], residual, proj)                                          # (N, C)
            kernels.layernorm_forward(acts.ln2[l], acts.ln2_mean[l], acts.ln2_rstd[l],
                                      acts.residual2[l], params.ln2w[l], params.ln2b[l])                         # (N, C)
            kernels.matmul_forward(acts.fch[l], acts.ln2[l], params.fcw[l], params.fcb[l], workspace)            # (N, 4C)
            kernels.gelu_forward(acts.fch_gelu[l], acts.fch[l])                                                  # (N, 4C)
            kernels.matmul_forward(proj, acts.fch_gelu[l], params.fcprojw[l], params.fcprojb[l], workspace)      # (N, C)
            kernels.residual_forward(acts.residual3[l], acts.residual2[l], proj)                                 # (N, C)
            residual = acts.residual3[l]
        kernels.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd,
                                  residual, params.lnfw, params.lnfb)                                            # (N, C)

    def loss(self, targets):
        """Mean cross entropy of the last forward pass against targets (B, T), without a backward pass."""
        params, acts, workspace = self.params, self.acts, self.workspace
        targets = targets.reshape(self.tokens.size)
        for rows in chunks(self.tokens.size, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], params.wte, NO_BIAS, workspace)                       # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows], 0.0, self.config.vocab_size)      # (rows)
        return float(np.mean(acts.losses, dtype=np.float64))

    def backward(self, targets, accumulation_steps=1):
        """Return the mean loss against targets (B, T), and add the gradients of loss / accumulation_steps to `grads`.

        The forward pass in reverse. It starts with the classifier, whose logits serve the loss and the gradients at once.
        """
        N = self.tokens.size
        params, grads, acts, workspace = self.params, self.grads, self.acts, self.workspace
        targets = targets.reshape(N)
        dresidual, dln, datt, dqkv, dfch = (getattr(self.scratch, name)[:N]
                                            for name in ("dresidual", "dln", "datt", "dqkv", "dfch"))

        for rows in chunks(self.tokens.size, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], params.wte, NO_BIAS, workspace)                       # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows],
                                     1 / (N * accumulation_steps), self.config.vocab_size)                       # (rows, Vp)
            kernels.matmul_backward(dln[rows], grads.wte, NO_BIAS,
                                    logits, acts.lnf[rows], params.wte, workspace)                               # (rows, C)
        residual = acts.residual3[-1]
        dresidual[...] = 0
        kernels.layernorm_backward(dresidual, grads.lnfw, grads.lnfb,
                                   dln, acts.lnf_mean, acts.lnf_rstd, residual, params.lnfw)                     # (N, C)
        for l in reversed(range(self.config.num_layers)):
            residual = acts.residual3[l - 1] if l > 0 else acts.encoded
            # residual3 = residual2 + proj: dresidual is the gradient of both.
            kernels.matmul_backward(dfch, grads.fcprojw[l], grads.fcprojb[l],
                                    dresidual, acts.fch_gelu[l], params.fcprojw[l], workspace)                   # (N, 4C)
            kernels.gelu_backward(dfch, dfch, acts.fch[l])                                                       # (N, 4C)
            kernels.matmul_backward(dln, grads.fcw[l], grads.fcb[l],
                                    dfch, acts.ln2[l], params.fcw[l], workspace)                                 # (N, C)
            kernels.layernorm_backward(dresidual, grads.ln2w[l], grads.ln2b[l],
                                       dln, acts.ln2_mean[l], acts.ln2_rstd[l], acts.residual2[l], params.ln2w[l])  # (N, C)
            # residual2 = residual + proj: dresidual is the gradient of both.
            kernels.matmul_backward(datt, grads.attprojw[l], grads.attprojb[l],
                                    dresidual, acts.att[l], params.attprojw[l], workspace)                       # (N, C)
            kernels.attention_backward(dqkv, datt, acts.att[l], acts.att_lse[l], acts.qkv[l])                    # (N, 3C)
            kernels.matmul_backward(dln, grads.qkvw[l], grads.qkvb[l],
                                    dqkv, acts.ln1[l], params.qkvw[l], workspace)                                # (N, C)
            kernels.layernorm_backward(dresidual, grads.ln1w[l], grads.ln1b[l],
                                       dln, acts.ln1_mean[l], acts.ln1_rstd[l], residual, params.ln1w[l])        # (N, C)
        kernels.encoder_backward(grads.wte, grads.wpe, dresidual, self.tokens)                                   # (Vp, C)
        return float(np.mean(acts.losses, dtype=np.float64))

    def gradient_norm(self):
        """The Euclidean norm of all gradients together."""
        return float(kernels.global_norm(self.grads.flat))

    def update(self, step, learning_rate, weight_decay, norm, grad_clip):
        """One AdamW step (counted from 1) on the gradients, which are cleared for the next.

        They are shortened to grad_clip (0: never) first, if `norm`, which is theirs, is more. If it is not a finite number,
        nothing changes: whatever went wrong first can still be found.
        """
        if not math.isfinite(norm):
            return
        grad_scale = grad_clip / norm if 0 < grad_clip < norm else 1.0
        for name, param in self.params.items():
            kernels.adamw_update(param.reshape(-1), getattr(self.grads, name).reshape(-1),
                                 getattr(self.adam_m, name).reshape(-1), getattr(self.adam_v, name).reshape(-1),
                                 learning_rate, BETA1, BETA2, EPSILON,
                                 weight_decay if name in WEIGHT_DECAYED else 0.0, grad_scale, step)

    def clock(self):
        """The time, for `finish`."""
        return time.perf_counter()

    def finish(self, loss, norm, started):
        """A step's loss and norm as numbers, and the seconds since `started`, once everything is computed: here, at once."""
        return loss, norm, time.perf_counter() - started

    def next_token_logits(self, tokens):
        """The logits (V,) of the token that follows tokens (1, T), by a forward pass."""
        self.forward(tokens)
        logits = self.scratch.logits[:1]
        kernels.matmul_forward(logits, self.acts.lnf[-1:], self.params.wte, NO_BIAS, self.workspace)
        return logits[0, :self.config.vocab_size].copy()


def evaluate(model, loader, max_steps):
    """Mean loss over the first max_steps batches of the validation tokens (fewer if there are fewer)."""
    loader.reset()
    steps = min(max_steps, loader.batches)
    total = 0.0
    for _ in range(steps):
        inputs, targets = loader.next_batch()
        model.forward(inputs)
        total += model.loss(targets)
    return float(total) / steps


def train(model, options, train_loader, val_loader, log):
    """The training loop, for any model with GPT2's methods. `options` are the flags, `log` a TrainingLog.

    A model may still be computing when its methods return: losses and norms are numbers only after `finish`.
    """
    n = options.num_iterations
    for step in range(1, n + 1):
        started = model.clock()
        if options.overfit_single_batch:
            train_loader.reset()
        loss = 0.0
        for _ in range(options.accumulation_steps):
            inputs, targets = train_loader.next_batch()
            model.forward(inputs)
            loss += model.backward(targets, options.accumulation_steps) / options.accumulation_steps
        norm = model.gradient_norm()
        rate = learning_rate(step, options)
        model.update(step, rate, options.weight_decay, norm, options.grad_clip)
        loss, norm, seconds = model.finish(loss, norm, started)
        check_finite(step, model, train_loss=loss, gradient_norm=norm)
        log.step(step, loss, norm, rate, seconds)

        if due(options.val_loss_every, step, n):
            val_loss = evaluate(model, val_loader, options.val_max_steps)
            check_finite(step, model, val_loss=val_loss)
            log.validation(step, val_loss)
        if due(options.sample_every, step, n):
            log.sample(sample_text(step, model, options))


def trained_part(model, options):
    """The Config and parameters of what was trained: a new model's positions past --sequence-length never were, and go."""
    config, params = model.config, model.get_params()
    if options.model not in NEW_MODELS:
        return config, params
    trained = copy(params)      # of the names, not of the tensors
    trained.wpe = params.wpe[:options.sequence_length]
    return replace(config, max_seq_len=options.sequence_length), trained


def train_and_save(model, params, options, train_loader, val_loader, ideal_seconds=None, **device_rows):
    """All that follows once a model is there: fill it with params (None: random ones), train it, and keep what it has learned.

    ideal_seconds is TrainingLog's, device_rows are print_configuration's.
    """
    if params is not None:
        model.set_params(params)
    else:
        model.initialize(options.seed)
    print_configuration(options, model, train_loader, val_loader, **device_rows)
    with TrainingLog(options, ideal_seconds) as log:
        train(model, options, train_loader, val_loader, log)
    save_model(options.output_dir, *trained_part(model, options))
    print(f"wrote the model to {options.output_dir}, a Hugging Face folder")


def compile_kernels():
    """Compile the kernels into Numba's cache, unless they are there."""
    if not kernels.all_compiled():
        print("compiling the kernels, once: some 15 seconds", flush=True)
        kernels.compile_in_processes("train_gpt2")


def run_every_kernel(backward_first):
    """One step of the smallest model, which makes Numba compile all it has not yet: for kernels_cpu.compile_in_processes.

    With backward_first it begins with the two kernels of the backward pass that take longest to compile.
    """
    model = GPT2(Config(1, 1, 128, num_layers=1, num_heads=1, channels=1), 1, 1, threads=1)
    grads, params, acts, scratch = model.grads, model.params, model.acts, model.scratch
    token = np.zeros((1, 1), dtype=np.int32)
    if backward_first:
        kernels.attention_backward(scratch.dqkv, scratch.datt, acts.att[0], acts.att_lse[0], acts.qkv[0])
        kernels.matmul_backward(scratch.datt, grads.attprojw[0], grads.attprojb[0],
                                scratch.dresidual, acts.att[0], params.attprojw[0], model.workspace)
        model.tokens = token
        model.backward(token)
    model.forward(token)
    model.gradient_norm()
    model.update(1, learning_rate=0.0, weight_decay=0.0, norm=0.0, grad_clip=0.0)
    model.backward(token)


def main():
    options = parse_options("Train GPT-2 on the CPU.",
                            threads=dict(type=number(int, 1), help="CPU threads (default: one for each core)"))
    threads = kernels.use_threads(options.threads)
    config, params = first_model(options)
    prepare_data(options)
    train_loader, val_loader = (
        DataLoader(pattern, options.batch_size, options.sequence_length, config.vocab_size) if pattern else None
        for pattern in (options.input_bin, options.input_val_bin))
    compile_kernels()
    model = GPT2(config, options.batch_size, options.sequence_length, threads)
    train_and_save(model, params, options, train_loader, val_loader, threads=threads)


if __name__ == "__main__":
    run_program(main, TO_SAVE_MEMORY)
