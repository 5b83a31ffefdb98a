"""Train GPT-2 on the CPU: `python train_gpt2.py`. `python train_gpt2.py --help` lists all options.

Read it from the top: the model's memory, its forward pass, its backward pass, the update, and the training loop. The
forward and backward passes are flat lists of kernel calls (kernels_cpu.py) that mirror each other. A trailing comment is
the shape of a call's main output.
"""
import itertools
import math
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

from cli import bounded, run_program    # first: from here on, Ctrl-C is one line

import numpy as np

import gpt2
import kernels_cpu as kernels
from checkpoint import Saver, checkpoints, delete_checkpoint
from dataloader import DataLoader, ValidationLoader
from distributed import SINGLE_PROCESS, DataParallel, World, join_world
from files import cache_lifetime
from gpt2 import ALIGNMENT, BETA1, BETA2, EPSILON, Config, Tensors, chunks, memory_needed, new_array
from hellaswag import count_correct, read_examples
from kernels_cpu import CLASSIFIER_ROWS, NO_BIAS
from llama import definition_of
from machine import check_memory, main_memory
from matmul_cpu import HAS_BFLOAT16, instructions
from tokenizer import Tokenizer
from training import (OUT_OF_MEMORY_HINT, NullLog, Progress, StopRequest, TrainingLog, baselines, bytes_per_token, check_finite,
                      data_loaders, initial_progress, is_due, knows_text, learning_rate, load_or_create_model, memory_hint,
                      open_run, outlier, prepare_data, print_configuration, sample_text)


class GPT2:
    """GPT-2 with its gradients, activations and AdamW moments, for batches of up to (batch_size, sequence_length) tokens.

    threads: number of blocks that a matrix product is split into, at most Numba's number of threads
    recompute: activation checkpointing: keep all block outputs; recompute the other activations block by block
    dtype: of the factors in matrix products, float32 or bfloat16; all that is kept is float32
    definition: the module that defines the model, here gpt2; train_llama.Llama has another

    All parameters are zero until `initialize` or `set_params` fills them.
    """
    definition = gpt2

    def __init__(self, config: Config, batch_size: int, sequence_length: int, threads: int, recompute: bool = False,
                 dtype: str = "float32"):
        self.config = config
        self.recompute = recompute
        self.workspace = kernels.make_workspace(threads, dtype)
        shapes = self.definition.parameter_shapes(config)
        self.params, self.grads = Tensors(shapes), Tensors(shapes)
        self.adam_m, self.adam_v = new_array(self.params.size), new_array(self.params.size)
        # The part of the flat arrays to update. DataParallel narrows it to a shard: then the rest of the moments is never
        # written to, and so takes no memory (Linux and macOS provide the pages of np.zeros when they are written).
        self.owned = slice(0, self.params.size)
        self.acts = self.definition.activations(config, batch_size, sequence_length, recompute, new_array)
        self.scratch = Tensors(self.definition.scratch_shapes(config, batch_size, sequence_length, CLASSIFIER_ROWS),
                               alignment=ALIGNMENT)
        self.tokens = None

    def initialize(self, seed: int) -> None:
        """Initialize the parameters at random, as GPT-2 does."""
        self.definition.initialize(self.params, self.config, seed)

    def classifier(self, tensors: Tensors) -> np.ndarray:
        """The weight of the classifier among the parameters, or its gradient among the gradients: (Vp, C)."""
        return tensors.wte

    def set_params(self, params: Tensors) -> None:
        """Copy in the parameters, Tensors of the same shapes."""
        self.params.flat[...] = params.flat

    def get_params(self) -> Tensors:
        """The parameters, as Tensors of NumPy arrays."""
        return self.params

    def set_moments(self, m: np.ndarray, v: np.ndarray) -> None:
        """Copy in AdamW's moments of the owned parameters, from two flat arrays of all in the order of the parameters."""
        self.adam_m[self.owned], self.adam_v[self.owned] = m[self.owned], v[self.owned]

    def get_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """AdamW's two moments of the owned parameters, flat NumPy arrays in the order of the parameters."""
        return self.adam_m[self.owned], self.adam_v[self.owned]

    def forward(self, tokens: np.ndarray) -> None:
        """Compute `acts.lnf` (N, C), the normalized output of the last block, from tokens (B, T), N = B*T.

        Requires T <= max_seq_len (ValueError) and B*T <= the size the model was built for. Activations live in one reused
        buffer, so call `loss` or `backward` before the next `forward`.
        """
        B, T = tokens.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"tokens are {T} long, expected at most {self.config.max_seq_len}")
        buffer = self.acts.flat
        self.acts = self.definition.activations(self.config, B, T, self.recompute, lambda size: buffer)
        self.tokens = tokens
        params, acts = self.params, self.acts

        kernels.encoder_forward(acts.encoded, tokens, params.wte, params.wpe)                                    # (N, C)
        for l in range(self.config.num_layers):
            self.block_forward(l)                                                                                # (N, C)
        kernels.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd,
                                  acts.residual3[-1], params.lnfw, params.lnfb)                                  # (N, C)

    def block_forward(self, l: int, recomputing: bool = False) -> None:
        """The forward pass of block l: ten calls. Its output is `acts.residual3[l]` (N, C).

        recomputing: skip the last two calls, whose outputs the block's backward pass does not read
        """
        params, acts, workspace = self.params, self.acts, self.workspace
        proj = self.scratch.proj[:self.tokens.size]
        gelu_forward = kernels.gelu_exact_forward if self.config.exact_gelu else kernels.gelu_forward
        residual = acts.residual3[l - 1] if l > 0 else acts.encoded
        kernels.layernorm_forward(acts.ln1[l], acts.ln1_mean[l], acts.ln1_rstd[l],
                                  residual, params.ln1w[l], params.ln1b[l])                                      # (N, C)
        kernels.matmul_forward(acts.qkv[l], acts.ln1[l], params.qkvw[l], params.qkvb[l], workspace)              # (N, 3C)
        kernels.attention_forward(acts.att[l], acts.att_lse[l], acts.qkv[l], workspace)                          # (N, C)
        kernels.matmul_forward(proj, acts.att[l], params.attprojw[l], params.attprojb[l], workspace)             # (N, C)
        kernels.residual_forward(acts.residual2[l], residual, proj)                                              # (N, C)
        kernels.layernorm_forward(acts.ln2[l], acts.ln2_mean[l], acts.ln2_rstd[l],
                                  acts.residual2[l], params.ln2w[l], params.ln2b[l])                             # (N, C)
        kernels.matmul_forward(acts.fch[l], acts.ln2[l], params.fcw[l], params.fcb[l], workspace)                # (N, 4C)
        gelu_forward(acts.fch_gelu[l], acts.fch[l])                                                              # (N, 4C)
        if recomputing:
            return
        kernels.matmul_forward(proj, acts.fch_gelu[l], params.fcprojw[l], params.fcprojb[l], workspace)          # (N, C)
        kernels.residual_forward(acts.residual3[l], acts.residual2[l], proj)                                     # (N, C)

    def loss(self, targets: np.ndarray) -> float:
        """The mean cross-entropy of the last forward pass against targets (B, T), in nats per token."""
        params, acts, workspace = self.params, self.acts, self.workspace
        targets = targets.reshape(self.tokens.size)
        for rows in chunks(self.tokens.size, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], self.classifier(params), NO_BIAS, workspace)          # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows], 0.0, self.config.vocab_size)      # (rows)
        return float(np.mean(acts.losses, dtype=np.float64))

    def backward(self, targets: np.ndarray, accumulation_steps: int = 1) -> float:
        """Return the mean loss against targets (B, T); accumulate into `grads` the gradient of loss / accumulation_steps.

        The forward pass in reverse. It starts with the classifier, which computes the loss and its gradient from one set of
        logits.
        """
        N = self.tokens.size
        params, grads, acts, workspace = self.params, self.grads, self.acts, self.workspace
        targets = targets.reshape(N)
        dresidual, dln, datt, dqkv, dfch = (getattr(self.scratch, name)[:N]
                                            for name in ("dresidual", "dln", "datt", "dqkv", "dfch"))
        gelu_backward = kernels.gelu_exact_backward if self.config.exact_gelu else kernels.gelu_backward

        for rows in chunks(N, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], self.classifier(params), NO_BIAS, workspace)          # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, targets[rows],
                                     1 / (N * accumulation_steps), self.config.vocab_size)                       # (rows, Vp)
            # wte's gradient from the classifier. encoder_backward, the last call, adds the embedding's.
            kernels.matmul_backward(dln[rows], self.classifier(grads), NO_BIAS,
                                    logits, acts.lnf[rows], self.classifier(params), workspace)                  # (rows, C)
        dresidual[...] = 0
        kernels.layernorm_backward(dresidual, grads.lnfw, grads.lnfb,
                                   dln, acts.lnf_mean, acts.lnf_rstd, acts.residual3[-1], params.lnfw)           # (N, C)
        L = self.config.num_layers
        for l in reversed(range(L)):
            residual = acts.residual3[l - 1] if l > 0 else acts.encoded
            if self.recompute and l + 1 < L:    # the last block's activations are still in memory
                self.block_forward(l, recomputing=True)
            # residual3 = residual2 + proj: dresidual is the gradient of both.
            kernels.matmul_backward(dfch, grads.fcprojw[l], grads.fcprojb[l],
                                    dresidual, acts.fch_gelu[l], params.fcprojw[l], workspace)                   # (N, 4C)
            gelu_backward(dfch, dfch, acts.fch[l])                                                               # (N, 4C)
            kernels.matmul_backward(dln, grads.fcw[l], grads.fcb[l],
                                    dfch, acts.ln2[l], params.fcw[l], workspace)                                 # (N, C)
            kernels.layernorm_backward(dresidual, grads.ln2w[l], grads.ln2b[l],
                                       dln, acts.ln2_mean[l], acts.ln2_rstd[l], acts.residual2[l], params.ln2w[l])  # (N, C)
            # residual2 = residual + proj: dresidual is the gradient of both.
            kernels.matmul_backward(datt, grads.attprojw[l], grads.attprojb[l],
                                    dresidual, acts.att[l], params.attprojw[l], workspace)                       # (N, C)
            kernels.attention_backward(dqkv, datt, acts.att[l], acts.att_lse[l], acts.qkv[l], workspace)         # (N, 3C)
            kernels.matmul_backward(dln, grads.qkvw[l], grads.qkvb[l],
                                    dqkv, acts.ln1[l], params.qkvw[l], workspace)                                # (N, C)
            kernels.layernorm_backward(dresidual, grads.ln1w[l], grads.ln1b[l],
                                       dln, acts.ln1_mean[l], acts.ln1_rstd[l], residual, params.ln1w[l])        # (N, C)
        kernels.encoder_backward(grads.wte, grads.wpe, dresidual, self.tokens)                                   # (Vp, C)
        return float(np.mean(acts.losses, dtype=np.float64))

    def gradient_norm(self) -> float:
        """The Euclidean norm of the owned gradients, taken together."""
        return float(kernels.global_norm(self.grads.flat[self.owned]))

    def update(self, step: int, learning_rate: float, weight_decay: float, norm: float, grad_clip: float) -> None:
        """AdamW step number `step`, from 1. Clears the gradients.

        Gradients, of global norm `norm`, are first clipped to norm `grad_clip` (0 disables). If `norm` is not finite, nothing
        is updated or cleared, so that check_finite can find the first bad tensor.
        """
        if not math.isfinite(norm):
            return
        grad_scale = grad_clip / norm if 0 < grad_clip < norm else 1.0
        for name, part in self.params.slices(self.owned):
            kernels.adamw_update(self.params.flat[part], self.grads.flat[part], self.adam_m[part], self.adam_v[part],
                                 learning_rate, BETA1, BETA2, EPSILON,
                                 weight_decay if name in self.definition.WEIGHT_DECAYED else 0.0, grad_scale, step)

    def start_timer(self) -> float:
        """The start of a step, for `finish_step`."""
        return time.perf_counter()

    def finish_step(self, loss: float, norm: float, started: float) -> tuple[float, float, float]:
        """Return loss and norm as floats, and the seconds since `started`. A GPU's model waits for the GPU here."""
        return loss, norm, time.perf_counter() - started

    def token_losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Run a forward pass; return the cross-entropy (N,) of each of the targets (B, T) given tokens (B, T)."""
        self.forward(tokens)
        self.loss(targets)
        return self.acts.losses

    def next_token_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Run a forward pass; return the logits (V,) of the token after tokens (1, T)."""
        self.forward(tokens)
        logits = self.scratch.logits[:1]
        kernels.matmul_forward(logits, self.acts.lnf[-1:], self.classifier(self.params), NO_BIAS, self.workspace)
        return logits[0, :self.config.vocab_size].copy()


def evaluate(model: GPT2, loader: ValidationLoader, max_steps: int, world: World = SINGLE_PROCESS) -> float:
    """The mean loss over at most max_steps validation batches, which are divided among the processes."""
    total, num_targets = 0.0, 0
    for step, (inputs, targets) in enumerate(itertools.islice(loader.batches(), max_steps)):
        if step % world.size == world.rank:
            model.forward(inputs)
            total += model.loss(targets) * targets.size
        num_targets += targets.size
    return world.sum(float(total)) / num_targets


def train(model: GPT2, options, train_loader: DataLoader, val_loader: ValidationLoader | None, examples: list,
          tokenizer: Tokenizer | None, log: TrainingLog, progress: Progress, stop: StopRequest, saver: Saver,
          world: World = SINGLE_PROCESS) -> int:
    """The training loop, for any model with GPT2's methods. Returns the exit status of a run that was stopped, or 0.

    options: the settings, see training.parse_options
    val_loader: None to train without validation
    examples: HellaSwag's examples to score the model on, possibly none
    tokenizer: to print samples of generated text with; None: print none
    progress: the Progress so far, updated in place

    On a GPU, methods return before the GPU is done: losses and norms are numbers only after `finish_step`.
    """
    n = options.num_iterations
    may_skip = options.skip_update_lossz > 0 or options.skip_update_gradz > 0
    for step in range(progress.step + 1, n + 1):
        started = model.start_timer()
        if options.overfit_single_batch:
            train_loader.reset()

        loss = 0.0
        for _ in range(options.accumulation_steps):     # gradient accumulation over micro-batches
            inputs, targets = train_loader.next_batch()
            model.forward(inputs)
            loss += model.backward(targets, options.accumulation_steps) / options.accumulation_steps
        norm = model.gradient_norm()
        rate = learning_rate(step, n, options.warmup_iters, options.learning_rate, options.learning_rate_decay_frac,
                             options.schedule)
        reason = None
        if may_skip:
            step_loss, step_norm, _ = model.finish_step(loss, norm, started)
            reason = outlier(step_loss, step_norm, progress, options.skip_update_lossz, options.skip_update_gradz)
        if reason:
            model.grads.flat[...] = 0
        else:
            model.update(step, rate, options.weight_decay, norm, options.grad_clip)
        loss, norm, seconds = model.finish_step(loss, norm, started)
        check_finite(step, model, train_loss=loss, gradient_norm=norm)
        log.step(step, loss, norm, rate, seconds)
        if reason:
            log.note(step, f"update skipped: {reason}")
        progress.step, progress.data = step, train_loader.state

        if val_loader and is_due(options.val_loss_every, step, n):
            val_loss = evaluate(model, val_loader, options.val_max_steps, world)
            check_finite(step, model, val_loss=val_loss)
            log.validation(step, val_loss)
            if val_loss < progress.best_val_loss:
                progress.best_val_loss = val_loss
                saver.save_model(options.output_dir / "best", step)
        if examples and is_due(options.hellaswag_every or n, step, n):
            own_examples = examples[world.rank::world.size]
            correct = count_correct(model.token_losses, own_examples, options.batch_size, options.sequence_length)
            log.hellaswag(step, world.sum(correct), len(examples))
        if tokenizer and is_due(options.sample_every, step, n):
            log.sample(sample_text(step, model, tokenizer, options.seed, options.sequence_length))
        stopped = world.max(stop.status)    # a signal may reach one process only, or each at another step
        if is_due(options.checkpoint_every, step, n) or stopped:
            saver.save_checkpoint(progress)
        if stopped:
            return stopped
    return 0


def load_weights(model: GPT2, params: Tensors | None, moments: list | None, seed: int) -> None:
    """Copy in parameters (None: initialize) and AdamW's moments (None: leave them zero)."""
    if params is not None:
        model.set_params(params)
    else:
        model.initialize(seed)
    if moments is not None:
        model.set_moments(*moments)


def train_and_save(model: GPT2, options, train_loader: DataLoader, val_loader: ValidationLoader | None, tokenizer: Tokenizer,
                   world: World = SINGLE_PROCESS, ideal_seconds: float | None = None, **device_rows) -> int:
    """Train the model and save it. Returns the exit status: not 0 if a signal stopped it.

    For ideal_seconds see TrainingLog, for device_rows print_configuration.
    """
    examples = read_examples(options.hellaswag, model.config.vocab_size, tokenizer) if options.hellaswag else []
    progress = initial_progress(options, train_loader.checksum())
    train_loader.set_state(progress.data)
    if world.size > 1:
        world.check_same(**{"the model": zlib.crc32(model.get_params().flat), "the training data": progress.fingerprint,
                            "the validation data": val_loader and val_loader.checksum(), "HellaSwag": len(examples)})
    print_configuration(options, model, train_loader, val_loader, examples, **device_rows)
    title = f"{options.model} on {Path(options.input_bin).name}"
    with world.local_rank_zero_first():
        has_text = knows_text(tokenizer)
    log = TrainingLog(options.output_dir, title, options.num_iterations, options.total_batch_size, ideal_seconds,
                      bytes_per_token(val_loader, tokenizer) if has_text else None, baselines(model.config, train_loader),
                      progress.step) if world.rank == 0 else NullLog()
    if world.rank == 0:     # delete an earlier run's checkpoints, or old ones that a killed run did not get to delete
        for checkpoint in checkpoints(options.output_dir)[:-options.keep_checkpoints if progress.step > 0 else None]:
            delete_checkpoint(checkpoint)
    saver = Saver(model, tokenizer, options.output_dir, options.keep_checkpoints, options.flags, world)
    with log, StopRequest() as stop:
        status = train(model, options, train_loader, val_loader, examples, tokenizer if has_text else None, log, progress, stop,
                       saver, world)
        if progress.step >= options.num_iterations:
            saver.save_model(options.output_dir, progress.step)
            print(f"wrote the model to {options.output_dir}, a Hugging Face folder")
            return 0
    if world.rank == 0:
        print(f"stopped after step {progress.step:,} and saved a checkpoint; continue with --resume", file=sys.stderr)
    return status


def compile_kernels(config: Config, dtype: str = "float32") -> None:
    """Compile the kernels into Numba's cache if any is missing there that training such a model needs."""
    if not kernels.all_compiled(kernels.training_kernels(config.layers), workspace=kernels.WORDS[dtype]):
        print(f"compiling the kernels, {cache_lifetime()}: about 15 seconds", flush=True)
        definition = definition_of(config)
        kernels.compile_in_processes(f"train_{definition.__name__}", asdict(definition.smallest_model(config)), dtype)


def run_every_kernel(backward_first: bool, sizes: dict, dtype: str = "float32", model_class: type = GPT2) -> None:
    """One step of the smallest model, so that Numba compiles every kernel: for kernels_cpu.compile_in_processes.

    sizes: the fields of its Config
    With backward_first it begins with the two kernels of the backward pass that take longest to compile.
    """
    model = model_class(model_class.definition.Config(**sizes), 1, 1, threads=1, dtype=dtype)
    grads, params, acts, scratch = model.grads, model.params, model.acts, model.scratch
    token = np.zeros((1, 1), dtype=np.int32)
    if backward_first:
        kernels.attention_backward(scratch.dqkv, scratch.datt, acts.att[0], acts.att_lse[0], acts.qkv[0],
                                   model.workspace)
        kernels.matmul_backward(scratch.datt, grads.attprojw[0], NO_BIAS,
                                scratch.dresidual, acts.att[0], params.attprojw[0], model.workspace)
        model.tokens = token
        model.backward(token)
    model.forward(token)
    model.gradient_norm()
    model.update(1, learning_rate=0.0, weight_decay=0.0, norm=0.0, grad_clip=0.0)
    model.backward(token)


def main(model_class: type = GPT2):
    with join_world() as world:
        own_flags = {
            "threads": dict(type=bounded(int, 1), help="CPU threads per process (default: the usable cores, divided among the "
                                                       "processes)"),
            "dtype": dict(default="float32", choices=kernels.DTYPES, help="of the factors in matrix products; bfloat16 is "
                          "twice as fast, on processors with AVX512-BF16 or AMX"),
        }
        with open_run(model_class.definition, "CPU", world, **own_flags) as options:
            status = run(model_class, options, world)
    sys.exit(status)


def run(model_class: type, options, world: World) -> int:
    """Load the model and the data, train, and save. Returns the exit status."""
    threads = kernels.use_threads(options.threads, world.local_size)
    prepare_data(options.input_bin, options.input_val_bin)
    train_loader, val_loader = data_loaders(options, world)
    definition = model_class.definition
    config, params, moments, tokenizer = load_or_create_model(definition, options, train_loader, val_loader)
    if options.dtype == "bfloat16" and not HAS_BFLOAT16:
        print("this processor cannot multiply bfloat16: --dtype bfloat16 computes what one that can would, and saves no time")
    with world.local_rank_zero_first():
        compile_kernels(config, options.dtype)
    B, T = options.batch_size, options.sequence_length
    needed = memory_needed(definition.parameter_shapes(config), definition.activation_shapes(config, B, T, options.recompute),
                           definition.scratch_shapes(config, B, T, CLASSIFIER_ROWS), world.size)
    memory = check_memory(f"{options.model} with batches of {B} x {T}", needed * world.local_size, main_memory(),
                          "this machine", memory_hint(options.recompute))
    model = model_class(config, B, T, threads, options.recompute, options.dtype)
    if world.size > 1:
        model = DataParallel(model, world)
    load_weights(model, params, moments, options.seed)
    del params, moments     # to free their memory; and Windows cannot delete a memory-mapped checkpoint
    processes = f"{world.size} processes of {threads}" if world.size > 1 else threads
    return train_and_save(model, options, train_loader, val_loader, tokenizer, world, threads=processes, memory=memory,
                          products=f"{options.dtype}, {instructions(options.dtype)}")


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
