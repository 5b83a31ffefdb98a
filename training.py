"""What surrounds the training loop on any device: the flags, the learning-rate schedule, the samples and the log."""
import argparse
import contextlib
import csv
import io
import math
import re
import signal
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from model_files import load_model
from dataloader import DataLoader
from distributed import ALONE
from cli import OneLineParser, UserError, bounded
from files import DATA_DIR, atomic_file, check_writable
from gpt2 import CONTEXT, HEADS_BY_DEPTH, RECOMPUTED, VOCABULARY, model_config
from prepare_tinyshakespeare import prepare
from checkpoint import checkpoints, load_checkpoint, load_state
from tokenizer import END_OF_TEXT, fetch_vocabulary, gpt2_encoding

TRAIN_TOKENS = DATA_DIR / "tiny_shakespeare_train.bin"
VAL_TOKENS = DATA_DIR / "tiny_shakespeare_val.bin"
CSV_COLUMNS = ("step", "train_loss", "val_loss", "hellaswag", "grad_norm", "learning_rate", "milliseconds", "tokens_per_second")
OUTLIER_WINDOW = 128
FLAGS_NOT_SAVED = "output_dir", "resume", "checkpoint", "accumulation_steps"     # the flags of a run but for these go into checkpoints
FLAGS_THAT_MUST_MATCH = "model", "sequence_length", "total_batch_size", "seed", "shuffle", "overfit_single_batch"     # throughout a run
NEW_MODELS = [f"d{depth}" for depth in HEADS_BY_DEPTH]
OUT_OF_MEMORY_HINT = "choose a smaller --model, --batch-size or --sequence-length"
SAMPLE_TOKENS = 96
TEMPERATURE = 0.8


# ----------------------------------------------------------------------------------------------------------------------
# Flags

def model_name(text):
    """An argparse type: a name of model_config's, or whatever model_files.load_model may find."""
    if re.fullmatch(r"d\d+", text) and text not in NEW_MODELS and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(map(repr, NEW_MODELS))}, or a checkpoint")
    return text


def parse_options(description, arguments=None, world=ALONE, **own_flags):
    """The flags as a namespace, checked, with `total_batch_size` and `accumulation_steps` (micro-batches a step) filled in.

    own_flags are those of one program only: threads=dict(type=..., help=...). Raises UserError with status 2 for anything that
    cannot be, and UserError if there is nothing to --resume or --output-dir cannot be written.
    """
    parser = OneLineParser(description=description)
    add = parser.add_flag
    positive, count = bounded(int, 1), bounded(int, 0)
    add("--model", default="d4", type=model_name,
        help=f"a new model of so many layers, one of {', '.join(NEW_MODELS)}, of which d12 is GPT-2 124M; or one to go on from: "
             "a Hugging Face folder, its name on the hub, a .safetensors file, an llm.c .bin file")
    add("--input-bin", help="training tokens: a file, or a glob in quotes (default: Tiny Shakespeare, prepared if need be)")
    add("--input-val-bin", help="validation tokens (default: Tiny Shakespeare's if --input-bin is not given, else none)")
    add("--output-dir", default="out", type=Path, help="folder for log.csv, loss.png and the trained model, which are replaced")
    add("--batch-size", default=4, type=positive, help="sequences in a (micro-)batch of a process, B")
    add("--sequence-length", default=64, type=positive,
        help=f"tokens in a sequence, T: the context of a new model, and at most that of another ({CONTEXT} in GPT-2's own)")
    add("--total-batch-size", type=positive, help="tokens in a step, a multiple of B*T times the number of processes (default: "
        "that); gradients accumulate")
    add("--num-iterations", default=1000, type=positive, help="steps")
    add("--learning-rate", default=1e-3, type=bounded(float, 0), help="the highest learning rate")
    add("--warmup-iters", default=50, type=count, help="steps over which the learning rate rises to its highest")
    add("--learning-rate-decay-frac", default=0.1, type=bounded(float, 0, 1),
        help="share of the highest learning rate left at the end")
    add("--schedule", choices=["cosine", "linear", "constant", "wsd"], default="cosine",
        help="how the learning rate falls; wsd: in the last fifth only")
    add("--weight-decay", default=0.1, type=bounded(float, 0), help="AdamW's, on matrices and embeddings only")
    add("--grad-clip", default=1.0, type=bounded(float, 0), help="norm to which longer gradients are shortened; 0: never")
    add("--val-loss-every", default=500, type=count, help="steps between validations, with one at the end; 0: never")
    add("--val-max-steps", default=128, type=positive, help="batches in a validation")
    add("--hellaswag", metavar="FILE", help="examples from dev/prepare_hellaswag.py, to score the model on (default: none)")
    add("--hellaswag-every", default=0, type=count, help="steps between scores, with one at the end; 0: at the end only")
    add("--checkpoint-every", default=500, type=count,
        help="steps between checkpoints, with one at the end; 0: only where the run is stopped, by Ctrl-C or SIGTERM")
    add("--keep-checkpoints", default=1, type=positive, help="how many checkpoints to keep, the latest")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --output-dir; flags that "
                        "are not given are those of that run")
    add("--sample-every", default=250, type=count, help="steps between samples of generated text, with one at the end; 0: never")
    parser.add_argument("--overfit-single-batch", action="store_true", help="train on the first batch again and again")
    parser.add_argument("--recompute", action="store_true", help="keep the activations of one layer only, and compute those of "
                        "the others a second time: less memory, and a step takes about an eighth longer")
    parser.add_argument("--shuffle", action="store_true", help="visit the files of --input-bin in another order every round")
    add("--skip-update-lossz", default=0, type=bounded(float, 0),
        help="skip the update of a step whose loss is so many standard deviations above the mean of the latest "
             f"{OUTLIER_WINDOW}; 0: never")
    add("--skip-update-gradz", default=0, type=bounded(float, 0), help="the same for the norm of the gradient")
    add("--seed", default=1337, type=count, help="seed of the first weights, the order of the files and the samples")
    for name, settings in own_flags.items():
        add(f"--{name}", **settings)
    options = parser.parse_args(arguments)
    options.checkpoint = None
    if options.resume:
        checkpoint = latest_checkpoint(options)
        flags = load_state(checkpoint)["flags"]
        parser.set_defaults(**flags)
        options = parser.parse_args(arguments, argparse.Namespace(checkpoint=checkpoint))
        report_changes(flags, options)
    tokens = options.batch_size * options.sequence_length * world.size
    if options.total_batch_size is None:
        options.total_batch_size = tokens
    if options.total_batch_size % tokens != 0:
        parser.error(f"--total-batch-size is {options.total_batch_size}, expected a multiple of --batch-size x --sequence-length"
                     f"{f' x {world.size} processes' if world.size > 1 else ''} = {tokens}")
    options.accumulation_steps = options.total_batch_size // tokens
    for flag, value in (("--input-bin", options.input_bin), ("--input-val-bin", options.input_val_bin)):
        if value == "":
            parser.error(f"{flag} is empty, expected a file or a glob")
    if options.input_bin is None:
        options.input_bin = str(TRAIN_TOKENS)
        options.input_val_bin = options.input_val_bin or str(VAL_TOKENS)
    if options.input_val_bin is None:
        options.val_loss_every = 0
    if world.rank == 0:     # which alone writes there
        check_writable("--output-dir", options.output_dir)
    options.flags = {name: value for name, value in vars(options).items() if name not in FLAGS_NOT_SAVED}
    return options


def latest_checkpoint(options):
    """The checkpoint that --resume goes on from. Raises UserError if there is none."""
    found = checkpoints(options.output_dir)
    if not found:
        raise UserError(f"{options.output_dir} has no checkpoint to --resume from; leave --resume out to start anew, or name "
                        "the --output-dir of the run to go on with")
    return found[-1]


def report_changes(flags, options):
    """Print which flags differ from those of the run that goes on. Raises UserError for one that it cannot go on with."""
    for name, before in flags.items():
        flag, now = "--" + name.replace("_", "-"), getattr(options, name, before)
        if now != before and name in FLAGS_THAT_MUST_MATCH:
            raise UserError(f"{flag} is {now}, expected {before}, that of the run in {options.output_dir}; leave it out, or "
                            "start anew in another --output-dir", status=2)
        if now != before:
            print(f"{flag} is {now} from here on; it was {before}")


def is_due(every, step, last):
    """Whether something done every so many steps (0: never), and at the last one, is due."""
    return every > 0 and (step % every == 0 or step == last)


def load_or_create_model(options):
    """The Config of --model, its parameters, Tensors, and its moments, flat arrays: None for what begins anew.

    Raises UserError if there is no such model, none for sequences as long as --sequence-length, or if a new run would begin in
    the folder of one that is not finished.
    """
    params = moments = None
    if not options.checkpoint:
        check_unfinished(options.output_dir)
    if options.checkpoint:
        config, params, moments = load_checkpoint(options.checkpoint)
    elif options.model in NEW_MODELS:
        config = replace(model_config(options.model), max_seq_len=options.sequence_length)
    else:
        config, params = load_model(options.model)
    if options.sequence_length > config.max_seq_len:
        raise UserError(f"--sequence-length is {options.sequence_length}, expected at most {config.max_seq_len}, the context of "
                        f"--model {options.model}", status=2)
    if config.vocab_size != VOCABULARY and options.sample_every > 0:
        print(f"no samples will be printed: the model has a vocabulary of {config.vocab_size:,}, not GPT-2's")
        options.sample_every = 0
    return config, params, moments


def check_unfinished(output_dir):
    """Raise UserError if a run stopped halfway in this folder: days of work must not be lost for want of --resume."""
    for checkpoint in checkpoints(output_dir)[-1:]:
        state = load_state(checkpoint)
        steps = state["flags"]["num_iterations"]
        if state["step"] < steps:
            raise UserError(f"{output_dir} is the folder of a run that stopped after {state['step']:,} of {steps:,} steps; go on "
                            f"with it by --resume, choose another --output-dir, or delete {checkpoint.parent}")


def data_loaders(options, config, world=ALONE):
    """The DataLoaders of the training and of the validation tokens; None for validation if there are none.

    The processes of `world` share out the training batches; each sees all of validation's. Raises UserError, see DataLoader.
    """
    sizes = options.batch_size, options.sequence_length, config.vocab_size
    shuffle_seed = options.seed if options.shuffle else None
    return (DataLoader(options.input_bin, *sizes, world.rank, world.size, shuffle_seed),
            DataLoader(options.input_val_bin, *sizes) if options.input_val_bin else None)


def check_memory(options, needed, memory, where):
    """How the memory that training needs, in bytes, compares to (free, total) of it, in words. UserError if it is too much."""
    needs = f"{needed / 1e9:.1f} GB"
    if memory is None:
        return needs
    free, total = memory
    if needed > free:
        smaller = "lower --batch-size or --sequence-length" + ("" if options.recompute else ", add --recompute")
        raise UserError(f"{options.model} with batches of {options.batch_size} x {options.sequence_length} needs {needs}, and "
                        f"{where} has {free / 1e9:.1f} of its {total / 1e9:.1f} GB free; {smaller}, or choose a smaller --model")
    return f"{needs} of {free / 1e9:.1f} GB free"


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
# Going on from a checkpoint

@dataclass
class Progress:
    """Where a run is: what its next step depends on besides the model, the optimizer's moments and the flags."""
    step: int = 0                               # done
    data: tuple = DataLoader.START              # the DataLoader's state
    fingerprint: int = 0                        # the DataLoader's
    best_val_loss: float = math.inf
    latest_losses: list = field(default_factory=list)       # up to OUTLIER_WINDOW of them, to tell which are outliers
    latest_norms: list = field(default_factory=list)


def initial_progress(options, train_loader):
    """The Progress of the run's checkpoint, or of a new run.

    Raises UserError if there is nothing left to do, or the training tokens are not those of the checkpoint.
    """
    fingerprint = train_loader.fingerprint()
    if not options.checkpoint:
        return Progress(fingerprint=fingerprint)
    state = load_state(options.checkpoint)
    if state["fingerprint"] != fingerprint:
        raise UserError(f"--input-bin {options.input_bin} holds other tokens than those that the run in {options.output_dir} "
                        "has read so far; give it those, or start anew in another --output-dir")
    progress = Progress(**{field.name: state[field.name] for field in fields(Progress)})
    if progress.step >= options.num_iterations:
        raise UserError(f"the run in {options.output_dir} is finished, after {progress.step:,} steps; give more "
                        "--num-iterations, or leave --resume out to start anew")
    return progress


class StopRequest:
    """Ctrl-C and SIGTERM wait for the end of the step while this is entered; a second one does not.

    signal: the number of the one that came, or 0
    """
    signal = 0

    def __enter__(self):
        self.handlers = {signum: signal.signal(signum, self.receive) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, signum, frame):
        self.signal = signum
        self.__exit__()
        print("\nstopping when this step is done (once more: at once)", file=sys.stderr, flush=True)

    def __exit__(self, *exception):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Schedule, checks and samples

def learning_rate(step, options):
    """The learning rate of step 1 ... num_iterations: a linear rise over warmup_iters, then the schedule's fall.

    It falls to learning_rate_decay_frac of the highest: along half a cosine, along a line, not at all, or (wsd: warm-up,
    stable, decay) in the last fifth of the run, as 1 - sqrt(share of that fifth that is over) (Haegele et al. 2024).
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


def check_finite(step, model, **values):
    """Raise UserError if one of the values is not finite, naming the step and the first tensor that is not.

    First means in the order of the forward pass; parameters come before activations, gradients last.
    """
    if all(map(math.isfinite, values.values())):
        return
    tensors = [*((f"parameter {name}", tensor) for name, tensor in model.params.items()),
               *((f"activation {name}", tensor) for name, tensor in activations_in_order(model)),
               *((f"gradient d{name}", tensor) for name, tensor in model.grads.items())]
    first = next((name for name, tensor in tensors if not np.isfinite(tensor).all()), "none of those kept")
    found = " and ".join(f"{name.replace('_', ' ')} is {value}" for name, value in values.items())
    raise UserError(f"step {step}: {found}; first non-finite tensor: {first}; "
                    "try a lower --learning-rate or a longer --warmup-iters")


def z_score(window, value):
    """How many standard deviations a value lies above the mean of a window of the latest ones, which it joins.

    NaN until the window holds OUTLIER_WINDOW values (llm.c's outlier detector).
    """
    window.append(value)
    if len(window) <= OUTLIER_WINDOW:
        return math.nan
    del window[0]
    deviation = np.std(window)
    return (value - np.mean(window)) / deviation if deviation > 0 else 0.0


def outlier(loss, norm, progress, options):
    """Why the update of a step with this loss and norm is to be skipped, in words; None if it is not."""
    scores = {"loss": (z_score(progress.latest_losses, loss), options.skip_update_lossz),
              "norm": (z_score(progress.latest_norms, norm), options.skip_update_gradz)}
    for name, (score, limit) in scores.items():
        if 0 < limit < score:
            return f"its {name} is {score:.1f} standard deviations above the mean"
    return None


def activations_in_order(model):
    """(name, tensor) of the kept activations in the order in which the forward pass computes them, layer by layer."""
    L = model.config.num_layers
    names = list(model.acts.shapes)
    per_layer = [name for name in names[names.index("ln1"):names.index("lnf")] if not (model.recompute and name in RECOMPUTED)]
    yield "encoded", model.acts.encoded
    for l in range(L):
        for name in per_layer:
            yield f"{name} of layer {l}", getattr(model.acts, name)[l]
    for name in names[names.index("lnf"):]:
        yield name, getattr(model.acts, name)


def sample_text(step, model, options):
    """Text the model makes up after `step` steps, as long as a training sequence but at most SAMPLE_TOKENS tokens."""
    generator = np.random.default_rng(options.seed)
    tokens = [END_OF_TEXT]
    for _ in range(min(SAMPLE_TOKENS, options.sequence_length)):
        logits = model.next_token_logits(np.array([tokens], dtype=np.int32)).astype(np.float64) / TEMPERATURE
        check_finite(step, model, sum_of_logits=logits.sum())
        probabilities = np.exp(logits - logits.max())
        tokens.append(int(generator.choice(logits.size, p=probabilities / probabilities.sum())))
    return gpt2_encoding().decode([token for token in tokens if token != END_OF_TEXT])


# ----------------------------------------------------------------------------------------------------------------------
# What the run prints and leaves behind

def print_configuration(options, model, train_loader, val_loader, examples=(), **device_rows):
    """A small table of what is about to happen; device_rows say on what."""
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
        **device_rows,
        "output": f"{options.output_dir}",
    }
    if examples:
        too_long = sum(example.length > T for example in examples)
        rows["hellaswag"] = (f"{len(examples):,} examples in {options.hellaswag}, {too_long:,} of which are longer than {T} "
                             "tokens: of those it reads the end")
    for name, value in rows.items():
        print(f"{name:>13} | {value}")
    print(flush=True)


class TrainingLog:
    """The lines of a run on the screen and in `log.csv` as it goes, and `loss.png` when it ends, however it ends.

    A row of log.csv is a training step or, with the other columns empty, a validation after so many steps.
    ideal_seconds, if it is known, is what a step would take at the device's highest FLOP rate; its share in the time that a
    step took is the MFU, model FLOPs utilization (Chowdhery et al. 2022). With `done` steps done the log that is there goes on
    after them. Raises UserError if the output folder cannot be written.
    """

    def __init__(self, options, ideal_seconds=None, done=0):
        self.options = options
        self.ideal_seconds = ideal_seconds
        self.rows = read_log(options.output_dir / "log.csv", done) if done else []
        self.width = len(str(options.num_iterations))
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
            (options.output_dir / "loss.png").unlink(missing_ok=True)  # an earlier run's
            with atomic_file(options.output_dir / "log.csv") as file:
                file.write(log_lines(self.rows).encode())
            self.file = open(options.output_dir / "log.csv", "a", newline="")
        except OSError as error:
            raise UserError(f"cannot write {error.filename} for --output-dir {options.output_dir}: {error.strerror}; "
                            "choose a folder that can be written") from error

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        with contextlib.suppress(OSError):  # a full disk has been reported by then
            self.file.close()
        if self.rows:
            with contextlib.suppress(UserError) if failure else contextlib.nullcontext():     # the first one is to be read
                self.plot()

    def step(self, step, loss, norm, rate, seconds):
        """Report one training step: its loss before the update, gradient norm, learning rate and duration."""
        speed = self.options.total_batch_size / seconds
        self.write(step=step, train_loss=loss, grad_norm=norm, learning_rate=rate,
                   milliseconds=round(1000 * seconds, 3), tokens_per_second=round(speed, 1))
        print(f"{self.heading(step)} | train loss {loss:9.6f} | norm {norm:8.4f} | lr {rate:.2e} | "
              f"{1000 * seconds:8.1f} ms | {speed:7,.0f} tok/s"
              + (f" | {self.ideal_seconds / seconds:5.1%} MFU" if self.ideal_seconds else ""), flush=True)

    def validation(self, step, loss):
        """Report the mean loss on the validation tokens after `step` steps."""
        self.write(step=step, val_loss=loss)
        print(f"{self.heading(step)} |   val loss {loss:9.6f}", flush=True)

    def hellaswag(self, step, correct, total):
        """Report the share of HellaSwag's examples that the model gets right after `step` steps."""
        self.write(step=step, hellaswag=correct / total)
        print(f"{self.heading(step)} |  hellaswag {correct / total:9.6f} ({correct:,} of {total:,})", flush=True)

    def sample(self, text):
        """Show a text the model made up."""
        print("\n    " + text.strip().replace("\n", "\n    ") + "\n", flush=True)

    def heading(self, step):
        return f"step {step:{self.width}}/{self.options.num_iterations}"

    def note(self, step, text):
        """Say something about a step."""
        print(f"{self.heading(step)} | {text}", flush=True)

    def write(self, **row):
        try:
            self.file.write(log_lines([row], header=False))
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}; make room for it there or choose another "
                            "--output-dir") from error
        self.rows.append(row)

    def plot(self):
        """Draw the losses of the run so far as loss.png."""
        import matplotlib  # here, not above: it takes longer to import than the first steps to compute
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for name, label, style in (("train_loss", "training", {"linewidth": 0.6, "color": "tab:blue"}),
                                   ("val_loss", "validation", {"marker": "o", "markersize": 3, "color": "tab:red"})):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), label=f"{label}, last {points[-1][1]:.3f}", **style)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        axes.set_title(f"{self.options.model} on {Path(self.options.input_bin).name}", parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_file(self.options.output_dir / "loss.png") as file:
            figure.savefig(file, dpi=200, format="png")
        pyplot.close(figure)
        print(f"wrote {self.options.output_dir / 'log.csv'} and {self.options.output_dir / 'loss.png'}")


class NullLog:
    """What a process has that is not to print or write: a TrainingLog whose methods do nothing."""

    def __getattr__(self, name):
        return lambda *arguments: None


def log_lines(rows, header=True):
    """The lines of log.csv for rows, dicts."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, CSV_COLUMNS, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()


def read_log(path, done):
    """The rows of a log.csv up to `done` steps, as TrainingLog has them; of a line that is cut short, none.

    Raises UserError if it cannot be read.
    """
    try:
        with open(path, newline="") as file:
            lines = [line for line in csv.DictReader(file) if None not in line.values()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; delete it, and --resume begins a new one") from error
    rows = [{name: float(value) for name, value in line.items() if value} for line in lines]
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= done]
