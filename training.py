"""What surrounds the training loop on any device: the flags, the learning-rate schedule, the samples and the log."""
import argparse
import csv
import math
from pathlib import Path

import numpy as np

from files import DATA_DIR, OneLineParser, UserError, whole_file
from gpt2 import CONTEXT, HEADS_BY_DEPTH
from prepare_tinyshakespeare import prepare
from tokenizer import END_OF_TEXT, fetch_vocabulary, gpt2_encoding

TRAIN_TOKENS = DATA_DIR / "tiny_shakespeare_train.bin"
VAL_TOKENS = DATA_DIR / "tiny_shakespeare_val.bin"
CSV_COLUMNS = ("step", "train_loss", "val_loss", "grad_norm", "learning_rate", "milliseconds", "tokens_per_second")
SAMPLE_TOKENS = 96
TEMPERATURE = 0.8


# ----------------------------------------------------------------------------------------------------------------------
# Flags

def number(kind, low, high=math.inf, exclusive=False):
    """An argparse type: an int or float from low (or above it, if exclusive) to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if exclusive else low <= value <= high) or value == math.inf:
            wanted = f"{'above' if exclusive else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            sort = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {sort} {wanted}")
        return value
    return parse


def parse_options(description, arguments=None):
    """The flags as a namespace, checked, with `total_batch_size` and `accumulation_steps` (micro-batches a step) filled in.

    Raises UserError with status 2 for anything that cannot be.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    positive, count = number(int, 1), number(int, 0)
    add("--model", choices=[f"d{depth}" for depth in HEADS_BY_DEPTH], default="d4", help="layers of the model; d12 is GPT-2 124M")
    add("--input-bin", help="training tokens: a file, or a glob in quotes (default: Tiny Shakespeare, prepared if need be)")
    add("--input-val-bin", help="validation tokens (default: Tiny Shakespeare's if --input-bin is not given, else none)")
    add("--output-dir", default="out", type=Path, help="folder for log.csv and loss.png")
    add("--batch-size", default=4, type=positive, help="sequences in a (micro-)batch, B")
    add("--sequence-length", default=64, type=positive, help=f"tokens in a sequence, T, up to {CONTEXT}")
    add("--total-batch-size", type=positive, help="tokens in a step, a multiple of B*T (default: B*T); gradients accumulate")
    add("--num-iterations", default=1000, type=positive, help="steps")
    add("--learning-rate", default=1e-3, type=number(float, 0), help="highest learning rate")
    add("--warmup-iters", default=50, type=count, help="steps over which the learning rate rises to it")
    add("--learning-rate-decay-frac", default=0.1, type=number(float, 0, 1), help="share of it left at the end")
    add("--schedule", choices=["cosine", "linear", "constant", "wsd"], default="cosine", help="how it falls; wsd: in the last fifth")
    add("--weight-decay", default=0.1, type=number(float, 0), help="AdamW's, on matrices and embeddings only")
    add("--grad-clip", default=1.0, type=number(float, 0), help="longest gradient, by norm; 0: any")
    add("--val-loss-every", default=100, type=count, help="steps between validations; 0: never")
    add("--val-max-steps", default=20, type=positive, help="batches in a validation")
    add("--sample-every", default=250, type=count, help="steps between samples of generated text; 0: never")
    add("--overfit-single-batch", action="store_true", help="train on the first batch again and again")
    add("--seed", default=1337, type=count, help="of the initial weights and of the samples")
    add("--threads", type=positive, help="CPU threads (default: one for each core)")
    options = parser.parse_args(arguments)

    tokens = options.batch_size * options.sequence_length
    if options.sequence_length > CONTEXT:
        parser.error(f"--sequence-length is {options.sequence_length}, expected at most {CONTEXT}, GPT-2's context")
    if options.total_batch_size is None:
        options.total_batch_size = tokens
    if options.total_batch_size % tokens != 0:
        parser.error(f"--total-batch-size is {options.total_batch_size}, expected a multiple of "
                     f"--batch-size x --sequence-length = {tokens}")
    options.accumulation_steps = options.total_batch_size // tokens
    if options.input_bin is None:
        options.input_bin = str(TRAIN_TOKENS)
        options.input_val_bin = options.input_val_bin or str(VAL_TOKENS)
    if options.input_val_bin is None:
        options.val_loss_every = 0
    return options


def due(every, step, last):
    """Whether something done every so many steps (0: never), and at the last one, is due."""
    return every > 0 and (step % every == 0 or step == last)


def prepare_data(options):
    """Prepare Tiny Shakespeare if it is what was asked for and is not there yet; make sure samples can be turned into text.

    Raises UserError if the text cannot be had.
    """
    wanted = {options.input_bin, options.input_val_bin}
    if any(str(path) in wanted and not path.exists() for path in (TRAIN_TOKENS, VAL_TOKENS)):
        print(f"no tokens in {DATA_DIR} yet: preparing Tiny Shakespeare")
        prepare()
    if options.sample_every > 0:
        try:
            fetch_vocabulary()
        except UserError as error:
            print(f"no samples will be printed: {error}")
            options.sample_every = 0


# ----------------------------------------------------------------------------------------------------------------------
# Schedule, checks and samples

def learning_rate(step, options):
    """The learning rate of step 1 ... num_iterations: a linear rise over warmup_iters, then the schedule's fall.

    It falls to learning_rate_decay_frac of the highest: along half a cosine, along a line, not at all, or (wsd: warm-up,
    stable, decay; Hu et al. 2024) with the square root of the time left to go in the last fifth of the run.
    """
    n, warmup, highest = options.num_iterations, options.warmup_iters, options.learning_rate
    if step <= warmup:
        return highest * step / warmup
    lowest = highest * options.learning_rate_decay_frac
    done = (step - warmup) / (n - warmup)
    if options.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))
    elif options.schedule == "linear":
        height = 1 - done
    elif options.schedule == "wsd":
        height = 1 - math.sqrt(max(0.0, (step - 0.8 * n) / (0.2 * n)))
    else:
        height = 1.0
    return lowest + (highest - lowest) * height


def check_finite(step, loss, norm, model):
    """Raise UserError, naming the step and the first non-finite tensor on the way through the model, if loss or norm is."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    tensors = [*((f"parameter {name}", tensor) for name, tensor in model.params.items()),
               *((f"activation {name}", tensor) for name, tensor in activations_in_order(model)),
               *((f"gradient d{name}", tensor) for name, tensor in reversed(model.grads.items()))]
    first = next((name for name, tensor in tensors if not np.isfinite(tensor).all()), "none of those kept")
    raise UserError(f"step {step}: the loss is {loss} and the gradient norm {norm}; first non-finite tensor: {first}; "
                    "try a lower --learning-rate or a longer --warmup-iters")


def activations_in_order(model):
    """(name, tensor) of the kept activations in the order in which the forward pass computes them, layer by layer."""
    L = model.config.num_layers
    names = list(model.acts.shapes)
    per_layer = names[names.index("ln1"):names.index("lnf")]
    yield "encoded", model.acts.encoded
    for l in range(L):
        for name in per_layer:
            yield f"{name} of layer {l}", getattr(model.acts, name)[l]
    for name in names[names.index("lnf"):]:
        yield name, getattr(model.acts, name)


def sample_text(model, options):
    """Text the model makes up, as long as the sequences it is trained on but at most SAMPLE_TOKENS tokens."""
    generator = np.random.default_rng(options.seed)
    tokens = [END_OF_TEXT]
    for _ in range(min(SAMPLE_TOKENS, options.sequence_length)):
        logits = model.next_token_logits(np.array([tokens], dtype=np.int32)).astype(np.float64) / TEMPERATURE
        probabilities = np.exp(logits - logits.max())
        tokens.append(int(generator.choice(logits.size, p=probabilities / probabilities.sum())))
    return gpt2_encoding().decode([token for token in tokens if token != END_OF_TEXT])


# ----------------------------------------------------------------------------------------------------------------------
# What the run prints and leaves behind

def print_configuration(options, model, train_loader, val_loader):
    """A small table of what is about to happen."""
    config = model.config
    B, T, steps = options.batch_size, options.sequence_length, options.accumulation_steps
    rows = {
        "model": f"{options.model}: {config.num_layers} layers, {config.num_heads} heads, {config.channels} channels, "
                 f"{model.params.size / 1e6:.1f} M parameters",
        "batch": f"{B} x {T} tokens" + (f", {steps} to a step: {options.total_batch_size:,} tokens" if steps > 1 else ""),
        "training": f"{train_loader.num_tokens:,} tokens in {options.input_bin}",
        "validation": f"{val_loader.num_tokens:,} tokens in {options.input_val_bin}" if val_loader else "none",
        "steps": f"{options.num_iterations:,}, seeing {options.num_iterations * options.total_batch_size:,} tokens",
        "learning rate": f"{options.learning_rate:g} after {options.warmup_iters} steps of warm-up, then {options.schedule} "
                         f"to {options.learning_rate_decay_frac:g} of it",
        "weight decay": f"{options.weight_decay:g}, gradients clipped at norm {options.grad_clip:g}",
        "threads": f"{options.threads}",
        "output": f"{options.output_dir}",
    }
    for name, value in rows.items():
        print(f"{name:>13} | {value}")
    print(flush=True)


class TrainingLog:
    """The lines of a run on the screen and in `log.csv` as it goes, and `loss.png` when it ends, however it ends.

    A row of log.csv is a training step or, with the other columns empty, a validation after so many steps.
    Raises UserError if the output folder cannot be written.
    """

    def __init__(self, options):
        self.options = options
        self.rows = []
        self.width = len(str(options.num_iterations))
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
            self.file = open(options.output_dir / "log.csv", "w", newline="")
        except OSError as error:
            raise UserError(f"cannot write to --output-dir {options.output_dir}: {error.strerror}; "
                            "choose a folder that can be written") from error
        self.csv = csv.DictWriter(self.file, CSV_COLUMNS, restval="")
        self.csv.writeheader()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
        if self.rows:
            self.plot()

    def step(self, step, loss, norm, rate, seconds):
        """Report one training step: its loss before the update, gradient norm, learning rate and duration."""
        speed = self.options.total_batch_size / seconds
        print(f"{self.heading(step)} | train loss {loss:9.6f} | norm {norm:8.4f} | lr {rate:.2e} | "
              f"{1000 * seconds:8.1f} ms | {speed:7,.0f} tok/s", flush=True)
        self.write(step=step, train_loss=loss, grad_norm=norm, learning_rate=rate,
                   milliseconds=round(1000 * seconds, 3), tokens_per_second=round(speed, 1))

    def validation(self, step, loss):
        """Report the mean loss on the validation tokens after `step` steps."""
        print(f"{self.heading(step)} |   val loss {loss:9.6f}", flush=True)
        self.write(step=step, val_loss=loss)

    def sample(self, text):
        """Show a text the model made up."""
        print("\n    " + text.strip().replace("\n", "\n    ") + "\n", flush=True)

    def heading(self, step):
        return f"step {step:{self.width}}/{self.options.num_iterations}"

    def write(self, **row):
        self.rows.append(row)
        self.csv.writerow(row)
        self.file.flush()

    def plot(self):
        """Draw the losses of the run so far as loss.png."""
        import matplotlib  # here, not above: it takes longer to import than the first steps to compute
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for name, label, style in (("train_loss", "training", {"linewidth": 0.6, "alpha": 0.6}),
                                   ("val_loss", "validation", {"marker": "o", "markersize": 3})):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), label=f"{label}, last {points[-1][1]:.3f}", **style)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{self.options.model}, {self.options.input_bin}")
        axes.grid(alpha=0.3)
        axes.legend()
        with whole_file(self.options.output_dir / "loss.png") as file:
            figure.savefig(file, dpi=120, format="png")
        pyplot.close(figure)
        print(f"wrote {self.options.output_dir / 'log.csv'} and {self.options.output_dir / 'loss.png'}")
