"""Train GPT-2 on the CPU: `python train_gpt2.py`, or `python train_gpt2.py --help` for what can be chosen.

Read it from the top: the model's memory, its forward pass, its backward pass, the update, and the training loop. The
forward and backward passes are flat lists of kernel calls (kernels_cpu.py) that mirror each other; each trailing comment
gives the shape of what the call writes.
"""
import contextlib
import math
import os
import sys
import time
from dataclasses import asdict

import numpy as np

import kernels_cpu as kernels
from model_files import save_model
from distributed import ALONE, start
from cli import bounded, run_program
from files import main_memory
from gpt2 import (WEIGHT_DECAYED, Config, Tensors, activation_shapes, activations, chunks, initialize, memory_needed, new_array,
                  parameter_shapes, scratch_shapes)
from hellaswag import count_correct, read_examples
from checkpoint import checkpoints, delete, save_checkpoint
from training import (OUT_OF_MEMORY_HINT, StopRequest, TrainingLog, NullLog, check_finite, check_memory, data_loaders, is_due,
                      load_or_create_model, initial_progress, learning_rate, outlier, parse_options, prepare_data,
                      print_configuration, sample_text)

CLASSIFIER_ROWS = 512     # tokens whose logits exist at any one time: 512 * 50304 * 4 bytes = 103 MB
NO_BIAS = np.empty(0, dtype=np.float32)
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8     # with small batches, a second moment of 0.95 forgets rare tokens too soon


class GPT2:
    """A GPT-2 with its gradients, moments and activations, for batches of up to (batch_size, sequence_length) tokens.

    `threads` is how many blocks a matrix product is cut into: as many as Numba has threads. `world` are the processes that
    train the model together; each has all its parameters, and the moments of its own share. With `recompute`, activations
    are kept for one layer at a time. The parameters are zero until they are filled, by `initialize` or through the views in
    `params`.
    """

    def __init__(self, config, batch_size, sequence_length, threads, world=ALONE, recompute=False):
        self.config = config
        self.recompute = recompute
        self.world = world
        self.workspace = kernels.make_workspace(threads)
        shapes = parameter_shapes(config)
        self.params, self.grads = Tensors(shapes), Tensors(shapes)
        self.share = world.share(self.params.size)      # whose moments are here, as a slice of the flat parameters
        self.adam_m, self.adam_v = (np.zeros_like(self.params.flat[self.share]) for _ in range(2))
        self.acts = activations(config, batch_size, sequence_length, recompute, new_array)
        self.scratch = Tensors(scratch_shapes(config, batch_size, sequence_length, CLASSIFIER_ROWS))
        self.tokens = None

    def initialize(self, seed):
        """GPT-2's random initialization."""
        initialize(self.params, self.config, seed)

    def set_params(self, params):
        """Copy the parameters from `params`, Tensors of the same shapes."""
        self.params.flat[...] = params.flat

    def get_params(self):
        """The parameters, Tensors of NumPy arrays."""
        return self.params

    def set_moments(self, m, v):
        """Copy the optimizer's moments from two flat arrays, in the order of the parameters."""
        self.adam_m[...], self.adam_v[...] = m[self.share], v[self.share]

    def get_moments(self):
        """The optimizer's two moments, flat NumPy arrays in the order of the parameters; None but for process 0."""
        return [self.world.gather(moment, self.params.size) for moment in (self.adam_m, self.adam_v)]

    def forward(self, tokens):
        """From tokens (B, T) to the normalized output of the last block, `acts.lnf` (N, C).

        T may be up to the context, B*T up to the model's; ValueError if not. `loss` and `backward` belong to the latest
        forward pass: the next one lays its activations out anew, for its own B and T, in the same memory.
        """
        B, T = tokens.shape
        N = B * T
        if T > self.config.max_seq_len:
            raise ValueError(f"tokens are {T} long, expected at most {self.config.max_seq_len}")
        buffer = self.acts.flat
        self.acts = activations(self.config, B, T, self.recompute, lambda size: buffer)
        self.tokens = tokens
        params, acts, workspace = self.params, self.acts, self.workspace
        proj = self.scratch.proj[:N]

        kernels.encoder_forward(acts.encoded, tokens, params.wte, params.wpe)                                    # (N, C)
        for l in range(self.config.num_layers):
            self.block_forward(l)
            kernels.matmul_forward(proj, acts.fch_gelu[l], params.fcprojw[l], params.fcprojb[l], workspace)      # (N, C)
            kernels.residual_forward(acts.residual3[l], acts.residual2[l], proj)                                 # (N, C)
        kernels.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd,
                                  acts.residual3[-1], params.lnfw, params.lnfb)                                  # (N, C)

    def block_forward(self, l):
        """Block l from its input to the GELU: all that its backward pass reads, so that it can be computed again."""
        params, acts, workspace = self.params, self.acts, self.workspace
        proj = self.scratch.proj[:self.tokens.size]
        residual = acts.residual3[l - 1] if l > 0 else acts.encoded
        kernels.layernorm_forward(acts.ln1[l], acts.ln1_mean[l], acts.ln1_rstd[l],
                                  residual, params.ln1w[l], params.ln1b[l])                                      # (N, C)
        kernels.matmul_forward(acts.qkv[l], acts.ln1[l], params.qkvw[l], params.qkvb[l], workspace)              # (N, 3C)
        kernels.attention_forward(acts.att[l], acts.att_lse[l], acts.qkv[l])                                     # (N, C)
        kernels.matmul_forward(proj, acts.att[l], params.attprojw[l], params.attprojb[l], workspace)             # (N, C)
        kernels.residual_forward(acts.residual2[l], residual, proj)                                              # (N, C)
        kernels.layernorm_forward(acts.ln2[l], acts.ln2_mean[l], acts.ln2_rstd[l],
                                  acts.residual2[l], params.ln2w[l], params.ln2b[l])                             # (N, C)
        kernels.matmul_forward(acts.fch[l], acts.ln2[l], params.fcw[l], params.fcb[l], workspace)                # (N, 4C)
        kernels.gelu_forward(acts.fch_gelu[l], acts.fch[l])                                                      # (N, 4C)

    def loss(self, targets):
        """Mean cross-entropy of the last forward pass against targets (B, T), without a backward pass."""
        params, acts, workspace = self.params, self.acts, self.workspace
        targets = targets.reshape(self.tokens.size)
        for rows in chunks(self.tokens.size, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], params.wte, NO_BIAS, workspace)                       # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows], 0.0, self.config.vocab_size)      # (rows)
        return float(np.mean(acts.losses, dtype=np.float64))

    def backward(self, targets, accumulation_steps=1):
        """Return the mean loss against targets (B, T), and add the gradients of its part in the step's loss to `grads`.

        A step is the mean over accumulation_steps batches of every process. The forward pass in reverse: it starts with the
        classifier, whose logits serve the loss and the gradients at once.
        """
        N = self.tokens.size
        params, grads, acts, workspace = self.params, self.grads, self.acts, self.workspace
        targets = targets.reshape(N)
        dresidual, dln, datt, dqkv, dfch = (getattr(self.scratch, name)[:N]
                                            for name in ("dresidual", "dln", "datt", "dqkv", "dfch"))

        for rows in chunks(N, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], params.wte, NO_BIAS, workspace)                       # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows],
                                     1 / (N * accumulation_steps * self.world.size), self.config.vocab_size)     # (rows, Vp)
            # wte's gradient as the classifier's weight; its gradient as the encoder's table is added last.
            kernels.matmul_backward(dln[rows], grads.wte, NO_BIAS,
                                    logits, acts.lnf[rows], params.wte, workspace)                               # (rows, C)
        dresidual[...] = 0
        kernels.layernorm_backward(dresidual, grads.lnfw, grads.lnfb,
                                   dln, acts.lnf_mean, acts.lnf_rstd, acts.residual3[-1], params.lnfw)           # (N, C)
        L = self.config.num_layers
        for l in reversed(range(L)):
            residual = acts.residual3[l - 1] if l > 0 else acts.encoded
            if self.recompute and l + 1 < L:    # the last block's activations are still there
                self.block_forward(l)
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
        """The Euclidean norm of all gradients together, once those of all processes are added up."""
        self.world.reduce_scatter(self.grads.flat)
        return math.sqrt(self.world.sum(float(kernels.global_norm(self.grads.flat[self.share])) ** 2))

    def update(self, step, learning_rate, weight_decay, norm, grad_clip):
        """One AdamW step (counted from 1) on the gradients, which are cleared for the next.

        They are shortened to grad_clip (0: never) first, if `norm`, which is theirs, is more. If it is not a finite number,
        nothing changes: whatever went wrong first can still be found.
        """
        if not math.isfinite(norm):
            return
        grad_scale = grad_clip / norm if 0 < grad_clip < norm else 1.0
        for name, part in self.params.parts(self.share):
            here = slice(part.start - self.share.start, part.stop - self.share.start)
            kernels.adamw_update(self.params.flat[part], self.grads.flat[part], self.adam_m[here], self.adam_v[here],
                                 learning_rate, BETA1, BETA2, EPSILON,
                                 weight_decay if name in WEIGHT_DECAYED else 0.0, grad_scale, step)
        self.world.all_gather(self.params.flat)

    def clock(self):
        """The time, for `finish`."""
        return time.perf_counter()

    def finish(self, loss, norm, started):
        """A step's mean loss over all processes and norm as numbers, and the seconds since `started`."""
        return self.world.sum(loss) / self.world.size, norm, time.perf_counter() - started

    def token_losses(self, tokens, targets):
        """The cross-entropies (N,) of targets (B, T) after tokens (B, T), by a forward pass."""
        self.forward(tokens)
        self.loss(targets)
        return self.acts.losses

    def next_token_logits(self, tokens):
        """The logits (V,) of the token that follows tokens (1, T), by a forward pass."""
        self.forward(tokens)
        logits = self.scratch.logits[:1]
        kernels.matmul_forward(logits, self.acts.lnf[-1:], self.params.wte, NO_BIAS, self.workspace)
        return logits[0, :self.config.vocab_size].copy()


def evaluate(model, loader, max_steps):
    """Mean loss over the first max_steps batches of the validation tokens (fewer if there are fewer).

    The processes take turns with the batches.
    """
    loader.reset()
    steps = min(max_steps, loader.batches)
    total = 0.0
    for step in range(steps):
        inputs, targets = loader.next_batch()
        if step % model.world.size == model.world.rank:
            model.forward(inputs)
            total += model.loss(targets)
    return model.world.sum(float(total)) / steps


def train(model, options, train_loader, val_loader, log, progress, stop, save, examples=()):
    """The training loop, for any model with GPT2's methods. Returns the number of the signal that stopped it, or 0.

    options: the flags
    log: a TrainingLog
    progress: the Progress so far, which is kept up to date
    stop: a StopRequest
    save: a Saver
    examples: HellaSwag's, on which the model is scored

    A model may still be computing when its methods return: losses and norms are numbers only after `finish`.
    """
    n = options.num_iterations
    may_skip = options.skip_update_lossz > 0 or options.skip_update_gradz > 0
    for step in range(progress.step + 1, n + 1):
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
        reason = outlier(*model.finish(loss, norm, started)[:2], progress, options) if may_skip else None
        if reason:
            model.grads.flat[...] = 0
        else:
            model.update(step, rate, options.weight_decay, norm, options.grad_clip)
        loss, norm, seconds = model.finish(loss, norm, started)
        check_finite(step, model, train_loss=loss, gradient_norm=norm)
        log.step(step, loss, norm, rate, seconds)
        if reason:
            log.note(step, f"update skipped: {reason}")
        progress.step, progress.data = step, train_loader.state

        if is_due(options.val_loss_every, step, n):
            val_loss = evaluate(model, val_loader, options.val_max_steps)
            check_finite(step, model, val_loss=val_loss)
            log.validation(step, val_loss)
            if val_loss < progress.best_val_loss:
                progress.best_val_loss = val_loss
                save.model_to(options.output_dir / "best")
        if examples and is_due(options.hellaswag_every or n, step, n):
            mine = examples[model.world.rank::model.world.size]
            correct = count_correct(model.token_losses, mine, options.batch_size, options.sequence_length)
            log.hellaswag(step, model.world.sum(correct), len(examples))
        if is_due(options.sample_every, step, n):
            log.sample(sample_text(step, model, options))
        stopped = model.world.largest(stop.signal)      # the others did not get it, or in another step
        if is_due(options.checkpoint_every, step, n) or stopped:
            save.checkpoint(progress)
        if stopped:
            return stopped
    return 0


class Saver:
    """Writes what training a model leaves behind into options.output_dir, on process 0 only."""

    def __init__(self, model, options):
        self.model, self.options = model, options

    def checkpoint(self, progress):
        """Write a checkpoint, from which --resume goes on (checkpoint.py)."""
        model, options = self.model, self.options
        moments = model.get_moments()
        if model.world.rank == 0:
            state = asdict(progress) | {"flags": options.flags}
            save_checkpoint(options.output_dir, model.config, model.get_params(), moments, state, options.keep_checkpoints)

    def model_to(self, folder):
        """Write the model to a folder."""
        if self.model.world.rank == 0:
            save_model(folder, self.model.config, self.model.get_params())


def fill(model, params, moments, seed):
    """Give a model its first parameters (None: random ones) and moments (None: zeros). It copies them."""
    if params is not None:
        model.set_params(params)
    else:
        model.initialize(seed)
    if moments is not None:
        model.set_moments(*moments)


def train_and_save(model, options, train_loader, val_loader, ideal_seconds=None, **device_rows):
    """All that follows once a model is there: train it, and keep what it has learned.

    ideal_seconds is TrainingLog's, device_rows are print_configuration's.
    """
    examples = read_examples(options.hellaswag, model.config.vocab_size) if options.hellaswag else []
    progress = initial_progress(options, train_loader)
    train_loader.state = progress.data
    print_configuration(options, model, train_loader, val_loader, examples, **device_rows)
    save = Saver(model, options)
    first = model.world.rank == 0
    with TrainingLog(options, ideal_seconds, progress.step) if first else contextlib.nullcontext(NullLog()) as log:
        if first and progress.step == 0:
            for finished in checkpoints(options.output_dir):    # of an earlier run
                delete(finished)
        with StopRequest() as stop:
            stopped = train(model, options, train_loader, val_loader, log, progress, stop, save, examples)
    if stopped and progress.step < options.num_iterations:
        print(f"stopped after step {progress.step:,}, with a checkpoint: --resume goes on from there")
        sys.exit(128 + stopped)     # the shell's convention
    save.model_to(options.output_dir)
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
    with start() as world:
        if world.rank > 0:
            sys.stdout = open(os.devnull, "w")
        options = parse_options("Train GPT-2 on the CPU.", world=world, threads=dict(
            type=bounded(int, 1), help="CPU threads of a process (default: its part of the cores)"))
        threads = kernels.use_threads(options.threads, world.local_size)
        config, params, moments = load_or_create_model(options)
        with world.local_rank_zero_first():
            prepare_data(options)
            compile_kernels()
        train_loader, val_loader = data_loaders(options, config, world)
        B, T = options.batch_size, options.sequence_length
        needed = memory_needed(config, activation_shapes(config, B, T, options.recompute),
                               scratch_shapes(config, B, T, CLASSIFIER_ROWS), world.size)
        memory = check_memory(options, needed * world.local_size, main_memory(), "this machine")
        model = GPT2(config, B, T, threads, world, options.recompute)
        fill(model, params, moments, options.seed)
        del params, moments     # or they would stay in memory all along, and their files could not be deleted on Windows
        processes = f"{world.size} processes of {threads}" if world.size > 1 else threads
        train_and_save(model, options, train_loader, val_loader, threads=processes, memory=memory)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
