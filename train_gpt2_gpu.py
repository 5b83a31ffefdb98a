"""Train GPT-2 on the GPU: `python train_gpt2_gpu.py`, or the same kernels without a GPU: `--device cpu` (cuda_on_cpu/).

The twin of train_gpt2.py, with its training loop and the same two flat passes, and with the kernels of kernels_gpu.py. Its
memory also has `weights` and attention scores, and only this process's shard of the moments. The passes differ where one launch
does what takes several on the CPU: the bias of a projection, the residual connection and the layernorm after it are one call, a
bias and the GELU another. Every call returns at once. The GPU works through the launches while Python continues; within a step
only `finish_step` waits for it.
"""
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from cli import run_program     # first: from here on, Ctrl-C is one line

import numpy as np

import gpt2
import kernels_gpu as kernels
from dataloader import DataLoader, ValidationLoader
from device import open_device
from distributed import SINGLE_PROCESS, DataParallel, World, join_world
from gpt2 import (ALIGNMENT, BETA1, BETA2, EPSILON, WEIGHT_DECAYED, Config, Tensors, activation_shapes, activations, ceil_div,
                  chunks, initialize, memory_needed, parameter_shapes, scratch_shapes, training_flops)
from kernels_gpu import CLASSIFIER_ROWS
from launcher import Device, DeviceArray
from machine import check_memory
from training import OUT_OF_MEMORY_HINT, data_loaders, load_or_create_model, memory_hint, open_run, prepare_data


def gpu_scratch_shapes(config: Config, B: int, T: int, dtype) -> dict[str, tuple]:
    """scratch_shapes, plus the attention scores of one sequence, unless flash attention does without them."""
    scores = (0,) if kernels.has_flash_attention(dtype, config.channels // config.num_heads) else (config.num_heads, T, T)
    return scratch_shapes(config, B, T, CLASSIFIER_ROWS) | {"scores": scores, "dscores": scores}


class GPT2:
    """GPT-2 on a device, with its gradients, AdamW's moments and activations, for up to (batch_size, sequence_length) tokens.

    The methods are those of train_gpt2.GPT2. Tokens and targets are int32 arrays on the device, except in token_losses and
    next_token_logits. A loss or norm that a method returns is an array on the device, of shape () or (1), and may not be
    computed yet.

    Activations are of the device's `Float`, and so are `weights`, a copy of the parameters for the embedding and for products.
    With float32 they are the parameters themselves.

    world: the processes that train it together, see DeviceDataParallel. Flat arrays are longer than needed, so that all shards
    are equally long; moments are those of this process's shard, `owned`.
    """

    def __init__(self, config: Config, batch_size: int, sequence_length: int, device: Device, recompute: bool = False,
                 world: World = SINGLE_PROCESS):
        self.config = config
        self.recompute = recompute
        self.device = device

        def zeros(size, dtype=np.float32):
            whole = world.size * ALIGNMENT
            return device.zeros(ceil_div(size, whole) * whole, dtype)

        shapes = parameter_shapes(config)
        self.params, self.grads = Tensors(shapes, zeros), Tensors(shapes, zeros)
        self.weights = self.params if device.Float == np.float32 else Tensors(shapes, partial(zeros, dtype=device.Float))
        self.owned = world.shard(self.params.size)
        self.adam_m, self.adam_v = (device.zeros(self.owned.stop - self.owned.start) for _ in range(2))
        empty = partial(device.empty, dtype=device.Float)
        self.acts = activations(config, batch_size, sequence_length, recompute, empty, device.Float)
        self.scratch = Tensors(gpu_scratch_shapes(config, batch_size, sequence_length, device.Float), empty, ALIGNMENT)
        self.batch_shape = batch_size, sequence_length
        self.no_bias = device.none
        self.mean = device.zeros(1)         # of the losses
        self.report = device.zeros(2)       # a step's loss and gradient norm, side by side for one copy to the host
        self.batch = device.zeros((2, batch_size * sequence_length), np.int32)      # tokens and targets
        self.tokens, self.graphs = None, {}

    def initialize(self, seed: int) -> None:
        """Initialize the parameters at random, as GPT-2 does."""
        params = Tensors(parameter_shapes(self.config))
        initialize(params, self.config, seed)
        self.set_params(params)

    def set_params(self, params: Tensors) -> None:
        """Copy in the parameters, Tensors of NumPy arrays of the same shapes."""
        size = self.params.size
        self.device.copy_to_device(self.params.flat[:size], params.flat)
        if self.weights is not self.params:
            self.device.copy_to_device(self.weights.flat[:size], params.flat.astype(self.device.Float))

    def get_params(self) -> Tensors:
        """A copy of the parameters, as Tensors of NumPy arrays."""
        return Tensors(self.params.shapes, allocate=lambda size: self.device.to_host(self.params.flat[:size]))

    def set_moments(self, m: np.ndarray, v: np.ndarray) -> None:
        """Copy in AdamW's moments of the owned parameters, from two flat NumPy arrays of all in the order of the parameters."""
        self.device.copy_to_device(self.adam_m, m[self.owned])
        self.device.copy_to_device(self.adam_v, v[self.owned])

    def get_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of AdamW's two moments of the owned parameters, flat NumPy arrays in the order of the parameters."""
        return self.device.to_host(self.adam_m), self.device.to_host(self.adam_v)

    def forward(self, tokens: DeviceArray) -> None:
        """Compute `acts.lnf` (N, C), the normalized output of the last block, from tokens (B, T), N = B*T.

        Requires T <= the model's sequence_length (ValueError) and B*T <= the size it was built for. Activations live in one
        reused buffer, so call `loss` or `backward` before the next `forward`.
        """
        kernels.use(self.device)
        B, T = tokens.shape
        if T > self.batch_shape[1]:
            raise ValueError(f"tokens are {T} long, expected at most {self.batch_shape[1]}")
        acts, scratch = self.acts.flat, self.scratch.flat
        self.acts = activations(self.config, B, T, self.recompute, lambda size: acts, self.device.Float)
        self.scratch = Tensors(gpu_scratch_shapes(self.config, B, T, self.device.Float), lambda size: scratch, ALIGNMENT)
        self.tokens = self.batch[0, :B * T].reshape(B, T)
        self.tokens[...] = tokens
        self.replay("forward", self.forward_pass)

    def replay(self, key, work):
        """Call work, or repeat its launches as a CUDA graph if the batch has the shape that the model was built for."""
        if self.tokens.shape == self.batch_shape:
            self.device.replay(self.graphs, key, work)
        else:
            work()

    def forward_pass(self):
        params, weights, acts = self.params, self.weights, self.acts
        kernels.encoder_forward(acts.encoded, self.tokens, weights.wte, weights.wpe)                             # (N, C)
        kernels.layernorm_forward(acts.ln1[0], acts.ln1_mean[0], acts.ln1_rstd[0],
                                  acts.encoded, params.ln1w[0], params.ln1b[0])                                  # (N, C)
        for l in range(self.config.num_layers):
            self.block_forward(l)                                                                                # (N, C)

    def block_forward(self, l: int, recomputing: bool = False) -> None:
        """The forward pass of block l, given the output of its first layernorm. Its output is `acts.residual3[l]` (N, C).

        The last call also computes the layernorm that follows: the first one of block l + 1, or the last of all.
        recomputing: skip the last two calls, whose outputs the block's backward pass does not read
        """
        params, weights, acts, proj, no_bias = self.params, self.weights, self.acts, self.scratch.proj, self.no_bias
        bias_gelu_forward = kernels.bias_gelu_exact_forward if self.config.exact_gelu else kernels.bias_gelu_forward
        residual = acts.residual3[l - 1] if l > 0 else acts.encoded
        # The product adds this bias, and so takes it in the dtype of its output. Kernels add the others, in float32.
        kernels.matmul_forward(acts.qkv[l], acts.ln1[l], weights.qkvw[l], weights.qkvb[l])                       # (N, 3C)
        kernels.attention_forward(acts.att[l], acts.att_lse[l], acts.qkv[l], self.scratch.scores)                # (N, C)
        kernels.matmul_forward(proj, acts.att[l], weights.attprojw[l], no_bias)                                  # (N, C)
        kernels.residual_layernorm_forward(acts.residual2[l], acts.ln2[l], acts.ln2_mean[l], acts.ln2_rstd[l],
                                           residual, proj, params.attprojb[l], params.ln2w[l], params.ln2b[l])   # (N, C)
        kernels.matmul_forward(acts.fch[l], acts.ln2[l], weights.fcw[l], no_bias)                                # (N, 4C)
        bias_gelu_forward(acts.fch_gelu[l], acts.fch[l], params.fcb[l])                                          # (N, 4C)
        if recomputing:
            return
        kernels.matmul_forward(proj, acts.fch_gelu[l], weights.fcprojw[l], no_bias)                              # (N, C)
        if l + 1 < self.config.num_layers:
            norm = acts.ln1[l + 1], acts.ln1_mean[l + 1], acts.ln1_rstd[l + 1]
            weight, bias = params.ln1w[l + 1], params.ln1b[l + 1]
        else:
            norm = acts.lnf, acts.lnf_mean, acts.lnf_rstd
            weight, bias = params.lnfw, params.lnfb
        kernels.residual_layernorm_forward(acts.residual3[l], *norm,
                                           acts.residual2[l], proj, params.fcprojb[l], weight, bias)             # (N, C)

    def loss(self, targets: DeviceArray) -> DeviceArray:
        """The mean cross-entropy of the last forward pass against targets (B, T), in nats per token."""
        kernels.use(self.device)
        self.set_targets(targets)
        self.replay("loss", self.classifier_pass)
        return self.mean.reshape(()).copy()

    def set_targets(self, targets):
        self.targets = self.batch[1, :self.tokens.size]
        self.targets[...] = targets.reshape(self.tokens.size)

    def classifier_pass(self):
        acts = self.acts
        for rows in chunks(self.tokens.size, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], self.weights.wte, self.no_bias)                       # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, self.targets[rows], 0.0, self.config.vocab_size)  # (rows)
        kernels.mean_loss(self.mean, acts.losses)

    def backward(self, targets: DeviceArray, accumulation_steps: int = 1) -> DeviceArray:
        """Return the mean loss against targets (B, T); accumulate into `grads` the gradient of loss / accumulation_steps.

        The forward pass in reverse. It starts with the classifier, which computes the loss and its gradient from one set of
        logits.
        """
        kernels.use(self.device)
        self.set_targets(targets)
        self.replay(("backward", accumulation_steps), partial(self.backward_pass, accumulation_steps))
        return self.mean.reshape(()).copy()

    def backward_pass(self, accumulation_steps):
        N = self.tokens.size
        params, weights, grads, acts = self.params, self.weights, self.grads, self.acts
        dresidual, dln, datt, dqkv, dfch, scores, dscores = (
            getattr(self.scratch, name) for name in ("dresidual", "dln", "datt", "dqkv", "dfch", "scores", "dscores"))
        gelu_backward = kernels.gelu_exact_backward if self.config.exact_gelu else kernels.gelu_backward

        for rows in chunks(N, CLASSIFIER_ROWS):
            logits = self.scratch.logits[:rows.stop - rows.start]
            kernels.matmul_forward(logits, acts.lnf[rows], weights.wte, self.no_bias)                            # (rows, Vp)
            kernels.fused_classifier(acts.losses[rows], logits, self.targets[rows],
                                     1 / (N * accumulation_steps), self.config.vocab_size)                       # (rows, Vp)
            # wte's gradient from the classifier. encoder_backward, the last call, adds the embedding's.
            kernels.matmul_backward(dln[rows], grads.wte, self.no_bias, logits, acts.lnf[rows], weights.wte)     # (rows, C)
        dresidual.fill(0)
        kernels.layernorm_backward(dresidual, grads.lnfw, grads.lnfb,
                                   dln, acts.lnf_mean, acts.lnf_rstd, acts.residual3[-1], params.lnfw)           # (N, C)
        L = self.config.num_layers
        for l in reversed(range(L)):
            residual = acts.residual3[l - 1] if l > 0 else acts.encoded
            if self.recompute and l + 1 < L:    # the last block's activations are still in memory
                kernels.layernorm_forward(acts.ln1[l], acts.ln1_mean[l], acts.ln1_rstd[l],
                                          residual, params.ln1w[l], params.ln1b[l])                              # (N, C)
                self.block_forward(l, recomputing=True)
            # residual3 = residual2 + proj: dresidual is the gradient of both.
            kernels.matmul_backward(dfch, grads.fcprojw[l], grads.fcprojb[l],
                                    dresidual, acts.fch_gelu[l], weights.fcprojw[l])                             # (N, 4C)
            gelu_backward(dfch, dfch, acts.fch[l])                                                               # (N, 4C)
            kernels.matmul_backward(dln, grads.fcw[l], grads.fcb[l], dfch, acts.ln2[l], weights.fcw[l])          # (N, C)
            kernels.layernorm_backward(dresidual, grads.ln2w[l], grads.ln2b[l],
                                       dln, acts.ln2_mean[l], acts.ln2_rstd[l], acts.residual2[l], params.ln2w[l])  # (N, C)
            # residual2 = residual + proj: dresidual is the gradient of both.
            kernels.matmul_backward(datt, grads.attprojw[l], grads.attprojb[l],
                                    dresidual, acts.att[l], weights.attprojw[l])                                 # (N, C)
            kernels.attention_backward(dqkv, datt, acts.att[l], acts.att_lse[l], acts.qkv[l], scores, dscores)   # (N, 3C)
            kernels.matmul_backward(dln, grads.qkvw[l], grads.qkvb[l], dqkv, acts.ln1[l], weights.qkvw[l])       # (N, C)
            kernels.layernorm_backward(dresidual, grads.ln1w[l], grads.ln1b[l],
                                       dln, acts.ln1_mean[l], acts.ln1_rstd[l], residual, params.ln1w[l])        # (N, C)
        kernels.encoder_backward(grads.wte, grads.wpe, dresidual, self.tokens)                                   # (Vp, C)
        kernels.mean_loss(self.mean, acts.losses)

    def gradient_norm(self) -> DeviceArray:
        """The Euclidean norm of the owned gradients, taken together."""
        kernels.use(self.device)
        norm = self.report[1:]
        kernels.global_norm(norm, self.grads.flat[self.owned])
        return norm

    def update(self, step: int, learning_rate: float, weight_decay: float, norm: DeviceArray, grad_clip: float) -> None:
        """AdamW step number `step`, from 1. Clears the gradients.

        Gradients, of global norm `norm`, are first clipped to norm `grad_clip` (0 disables). If `norm` is not finite, nothing
        is updated or cleared, so that check_finite can find the first bad tensor.
        """
        kernels.use(self.device)
        for name, part in self.params.slices(self.owned):
            weights = self.device.none if self.weights is self.params else self.weights.flat[part]
            moments = slice(part.start - self.owned.start, part.stop - self.owned.start)
            kernels.adamw_update(self.params.flat[part], self.grads.flat[part], self.adam_m[moments], self.adam_v[moments],
                                 weights, norm, learning_rate, BETA1, BETA2, EPSILON,
                                 weight_decay if name in WEIGHT_DECAYED else 0.0, grad_clip, step)

    def start_timer(self):
        """The start of a step, for `finish_step`: when all earlier launches have run."""
        return self.device.event()

    def finish_step(self, loss: DeviceArray, norm: DeviceArray, started) -> tuple[float, float, float]:
        """Wait for the device; return loss and norm as floats, and the seconds since `started`."""
        stopped = self.device.event()
        self.report[0] = loss
        loss, norm = (float(number) for number in self.device.to_host(self.report))
        return loss, norm, self.device.seconds(started, stopped)

    def token_losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Run a forward pass; return the cross-entropy (N,) of targets (B, T) given tokens (B, T), all NumPy arrays."""
        self.forward(self.device.to_device(tokens))
        self.loss(self.device.to_device(targets))
        return self.device.to_host(self.acts.losses)

    def next_token_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Run a forward pass; return the logits (V,) of the token after tokens (1, T), both NumPy arrays."""
        self.forward(self.device.to_device(tokens))
        logits = self.scratch.logits[:1]
        kernels.matmul_forward(logits, self.acts.lnf[-1:], self.weights.wte, self.no_bias)
        return self.device.to_host(logits)[0, :self.config.vocab_size].astype(np.float32)


class DeviceDataParallel(DataParallel):
    """distributed.DataParallel for models on devices, one per process: all that it adds and gathers stays there."""

    def __init__(self, model: GPT2, world: World):
        super().__init__(model, world)
        self.collectives = model.device.collectives(world)
        self.norms = model.device.zeros(world.size * ALIGNMENT)     # of every process's shard, at the start of its own

    def gradient_norm(self) -> DeviceArray:
        """The norm of the summed gradients. Afterward `grads` has the sum in this process's shard, and zeros elsewhere."""
        self.collectives.reduce_scatter(self.model.grads.flat)
        norm = self.model.gradient_norm()
        start = self.world.shard(self.norms.size).start
        self.norms[start:start + 1] = norm
        self.collectives.all_gather(self.norms)
        kernels.global_norm(norm, self.norms)       # which is the norm of the shards' norms
        return norm

    def update(self, step: int, learning_rate: float, weight_decay: float, norm: DeviceArray, grad_clip: float) -> None:
        """GPT2.update on this process's shard, then an all-gather of the parameters."""
        self.model.update(step, learning_rate, weight_decay, norm, grad_clip)
        self.collectives.all_gather(self.model.params.flat)
        if self.model.weights is not self.model.params:
            self.collectives.all_gather(self.model.weights.flat)


class Prefetch:
    """The batches of a DataLoader on a device. While the model computes with one, the next is copied.

    All that is not defined here is the DataLoader's.
    """

    def __init__(self, loader: DataLoader, device: Device):
        self.loader = loader
        self.upload = device.uploader((2, loader.batch_size, loader.sequence_length), np.int32)
        self.reset()

    def reset(self) -> None:
        """Start over at the first token."""
        self.loader.reset()
        self.fetch()

    @property
    def state(self):
        """The state of the DataLoader before the batch that comes next."""
        return self.upcoming_state

    def set_state(self, state: Sequence[int]) -> None:
        """Continue at a state of the DataLoader."""
        self.loader.set_state(state)
        self.fetch()

    def fetch(self):
        self.upcoming_state = self.loader.state
        self.upcoming = self.upload(np.stack(self.loader.next_batch()))

    def next_batch(self) -> tuple[DeviceArray, DeviceArray]:
        """Return inputs (B, T) and targets (B, T), int32 arrays on the device, valid until the next call."""
        inputs, targets = self.upcoming
        self.fetch()
        return inputs, targets

    def __getattr__(self, name):
        return getattr(self.loader, name)


class OnDevice:
    """The batches of a ValidationLoader on a device. All that is not defined here is the ValidationLoader's."""

    def __init__(self, loader: ValidationLoader, device: Device):
        self.loader, self.device = loader, device

    def batches(self) -> Iterator[tuple[DeviceArray, DeviceArray]]:
        """Yield inputs and targets, int32 arrays (B, T) on the device."""
        for batch in self.loader.batches():
            yield tuple(map(self.device.to_device, batch))

    def __getattr__(self, name):
        return getattr(self.loader, name)


def main():
    own_flags = {
        "device": dict(default="cuda", help="cuda, cuda:1 for the second GPU, or cpu: the same kernels on the CPU (slow)"),
        "dtype": dict(default="float32", choices=["float32", "tf32", "bfloat16"],
                      help="tf32: faster matrix products, with 10 bits of mantissa; bfloat16: activations too, with 7 bits"),
    }
    with join_world() as world, open_run(gpt2, "GPU", world, **own_flags) as options:
        status = run(options, world)
    sys.exit(status)


def run(options, world: World) -> int:
    """Load the model and the data, train, and save. Returns the exit status."""
    from train_gpt2 import load_weights, train_and_save  # here, not above: it loads the CPU's kernels, and Numba

    device = open_device(options.device, options.dtype, world)
    prepare_data(options.input_bin, options.input_val_bin)
    loaders = data_loaders(options, world)
    config, params, moments, tokenizer = load_or_create_model(gpt2, options, *loaders)
    B, T = options.batch_size, options.sequence_length
    needed = memory_needed(parameter_shapes(config), activation_shapes(config, B, T, options.recompute),
                           gpu_scratch_shapes(config, B, T, device.Float), world.size, device.Float)
    processes = world.local_size if options.device == "cpu" else 1      # in the same memory
    memory = check_memory(f"{options.model} with batches of {B} x {T}", processes * needed + device.library_bytes,
                          device.memory(), device.name, memory_hint(options.recompute))
    train_loader, val_loader = Prefetch(loaders[0], device), loaders[1] and OnDevice(loaders[1], device)
    model = GPT2(config, B, T, device, options.recompute, world)
    if world.size > 1:
        model = DeviceDataParallel(model, world)
    load_weights(model, params, moments, options.seed)
    del params, moments     # to free their memory; and Windows cannot delete a memory-mapped checkpoint
    peak = device.peak_flops()
    name = f"{device.name}, {options.dtype}" + (f", {world.size} processes" if world.size > 1 else "")
    return train_and_save(model, options, train_loader, val_loader, tokenizer, world,
                          ideal_seconds=options.accumulation_steps * sum(training_flops(config, B, T)) / peak if peak else None,
                          device=name, memory=memory)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
