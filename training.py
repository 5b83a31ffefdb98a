"""What surrounds the training loop on any device: flags, learning-rate schedule, checks, samples and the log."""
import argparse
import csv
import io
import math
import re
import signal
import sys
import textwrap
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from checkpoint import REPAIR_HINT as CHECKPOINT_HINT
from checkpoint import (OUTLIER_WINDOW, STATE, checkpoints, delete_leftovers, is_saved, load_checkpoint, load_state,
                        refuse_links)
from cli import OneLineParser, UserError, bounded, one_line
from dataloader import DataLoader, ValidationLoader, finish_replacing, refuse_leak
from distributed import SINGLE_PROCESS, World
from files import DATA_DIR, LOCK_NAME, atomic_file, lock, locked_folder, made_folder, open_file, short_repr
from gpt2 import VOCABULARY, Config, Tensors, padded
from llama import definition_of
from model_files import check_definition, find_model, load_model, load_model_tokenizer
from prepare_tinyshakespeare import prepare as prepare_tinyshakespeare
from sampling import sample
from tokenizer import GPT2_FINGERPRINT, NO_TOKENIZER, GPT2Tokenizer, Tokenizer, load_tokenizer, tokenizer_folder

TRAIN_TOKENS = DATA_DIR / "tiny_shakespeare_train.bin"
VAL_TOKENS = DATA_DIR / "tiny_shakespeare_val.bin"
CSV_COLUMNS = ("step", "train_loss", "val_loss", "bits_per_byte", "hellaswag", "grad_norm", "learning_rate", "milliseconds",
               "tokens_per_second")
FLAGS_NOT_SAVED = "output_dir", "resume"     # all others go into checkpoints
RENAMED_FLAGS = {"shuffle": "shuffle_shards"}   # of earlier checkpoints
FLAGS_OF_ONE_PROGRAM = "threads", "device"  # which the other program ignores in a checkpoint
DTYPES = "float32", "bfloat16", "tf32"      # of either program; the other ignores one that it lacks
FLAGS_THAT_MUST_MATCH = "model", "sequence_length", "total_batch_size", "seed", "shuffle_shards", "overfit_single_batch"
OUT_OF_MEMORY_HINT = "choose a smaller --model, --batch-size or --sequence-length"
MEAN_WINDOWS = 40       # of the running mean, in a plot
LOG_HINT = "delete it, and --resume starts a new one"
SAMPLE_TOKENS = 96
EXAMINED_TOKENS = 2**20
TEMPERATURE = 0.8


# ----------------------------------------------------------------------------------------------------------------------
# Flags

def model_name(definition: ModuleType, text: str) -> str:
    """An argparse type: the name of a new model, or anything that model_files.load_model may find."""
    names = definition.NEW_MODELS
    if re.fullmatch(r"[dl]\d+", text) and text not in names and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(map(repr, names))}, or a checkpoint")
    return text


def folder_name(text: str) -> Path:
    """An argparse type: a folder. An unset variable of the shell must not name the current one."""
    if not text:
        raise argparse.ArgumentTypeError("found '', expected a folder")
    return Path(text)


def make_parser(definition: ModuleType, processor: str, own_flags: dict) -> OneLineParser:
    """The parser of a training program. own_flags are those of one program only: {"threads": dict(type=..., help=...)}.

    definition: the module that defines the model, gpt2 or llama
    """
    parser = OneLineParser(description=f"Train {definition.NAME} on the {processor}.")
    add, switch = parser.add_flag, parser.add_argument
    positive, count = bounded(int, 1), bounded(int, 0)
    add("--model", default=definition.NEW_MODELS[0], type=partial(model_name, definition),
        help=f"{', '.join(definition.NEW_MODELS)}: {definition.NEW_MODELS_HELP}; or a pretrained model to fine-tune: "
             f"{definition.PRETRAINED_HELP}")
    add("--input-bin", help="training tokens: a file, or a glob in quotes (default: Tiny Shakespeare, prepared on first use)")
    add("--input-val-bin", help="validation tokens (default: Tiny Shakespeare's if --input-bin is not given, else none)")
    add("--output-dir", default="out", type=folder_name, help="folder for log.csv, loss.png and the trained model; overwritten")
    add("--batch-size", default=8, type=positive, help="sequences per micro-batch per process, B")
    add("--sequence-length", default=64, type=positive,
        help="tokens per sequence, T: a new model's context; at most a pretrained one's")
    add("--total-batch-size", type=positive, help="tokens per optimizer step, via gradient accumulation; a multiple of B*T "
        "times the number of processes (default: that product)")
    add("--num-iterations", default=1250, type=positive, help="optimizer steps")
    add("--learning-rate", type=bounded(float, 0), help="peak learning rate (default: 0.002 for the smallest new model, less "
        "for wider ones, and 0.0001 for pretrained ones)")
    add("--warmup-iters", default=50, type=count, help="steps of linear warmup to the peak learning rate")
    add("--learning-rate-decay-frac", default=0.1, type=bounded(float, 0, 1),
        help="final learning rate, as a fraction of the peak")
    add("--schedule", choices=["cosine", "linear", "constant", "wsd"], default="cosine",
        help="learning-rate schedule after warmup; wsd (warmup, stable, decay) decays in the last fifth only")
    add("--weight-decay", default=0.1, type=bounded(float, 0), help="AdamW's weight decay, on matrices and embeddings only")
    add("--grad-clip", default=1.0, type=bounded(float, 0), help="clip gradients to this global norm; 0: off")
    add("--val-loss-every", default=100, type=count, help="steps between validations, with one at the end; 0: never")
    add("--val-max-steps", default=20, type=positive, help="batches per validation")
    add("--hellaswag", metavar="FILE", help="examples from dev/prepare_hellaswag.py, to score the model on (default: none)")
    add("--hellaswag-every", default=0, type=count, help="steps between HellaSwag scores; 0: at the end only")
    add("--checkpoint-every", default=500, type=count,
        help="steps between checkpoints, with one at the end; 0: only when stopped by Ctrl-C or SIGTERM")
    add("--keep-checkpoints", default=1, type=positive, help="how many of the latest checkpoints to keep")
    switch("--resume", action="store_true",
           help="resume from the latest checkpoint in --output-dir; omitted flags keep that run's values")
    add("--sample-every", default=250, type=count, help="steps between samples of text, with one at the end; 0: never")
    switch("--overfit-single-batch", action="store_true", help="train on the first batch over and over")
    switch("--recompute", action="store_true",
           help="activation checkpointing: recompute activations in the backward pass (less memory, about 12%% slower)")
    switch("--shuffle-shards", action="store_true", help="shuffle the order of the files of --input-bin every epoch")
    add("--skip-update-lossz", default=0, type=bounded(float, 0),
        help=f"skip updates whose loss has a z-score above this over the last {OUTLIER_WINDOW} steps; 0: never")
    add("--skip-update-gradz", default=0, type=bounded(float, 0), help="the same for the gradient norm")
    add("--seed", default=1337, type=bounded(int, 0, 2**63 - 1), help="random seed: initialization, order of shards, samples")
    for name, settings in own_flags.items():
        add(f"--{name}", **settings)
    return parser


@contextmanager
def open_run(definition: ModuleType, processor: str, world: World = SINGLE_PROCESS, **own_flags):
    """Parse the command line, lock the output folder while entered, and yield the options (parse_options).

    Raises UserError also if another process has locked the folder, it cannot be written, or the flags are not the same in all
    processes of the world.
    """
    output_dir = make_parser(definition, processor, own_flags).parse_args().output_dir
    with locked_folder("--output-dir", output_dir) if world.rank == 0 else nullcontext():   # rank 0 alone writes
        if world.rank == 0:
            refuse_links(output_dir)
            delete_leftovers(output_dir)
        options = parse_options(definition, processor, None, world, **own_flags)
        world.check_same(**{flag_name(name): value for name, value in options.flags.items()},
                         **{"--output-dir": output_dir, "the checkpoint to resume from": options.checkpoint})
        yield options


def parse_options(definition: ModuleType, processor: str, arguments: list | None = None, world: World = SINGLE_PROCESS,
                  **own_flags):
    """All settings of a run, read-only: its flags, those saved by a resumed run, and what follows from them.

    Besides the flags: `checkpoint`, the folder to resume from or None; `accumulation_steps`, micro-batches per step; and
    `flags`, what a checkpoint records, a dict.
    Raises UserError if a flag or combination is wrong (status 2), there is nothing to --resume, or --output-dir holds an
    unfinished run that would be replaced.
    """
    new_parser = partial(make_parser, definition, processor, own_flags)
    parser = new_parser()
    settings = vars(parser.parse_args(arguments))
    checkpoint = None
    if settings["resume"]:
        checkpoint = latest_checkpoint(settings["output_dir"])
        saved = saved_flags(checkpoint, new_parser)
        parser.set_defaults(**saved)
        settings = vars(parser.parse_args(arguments))
        report_changes(saved, settings)
    tokens = settings["batch_size"] * settings["sequence_length"] * world.size
    total = settings["total_batch_size"] or tokens
    if total % tokens != 0:
        parser.error(f"--total-batch-size is {total}, expected a multiple of --batch-size x --sequence-length"
                     f"{f' x {world.size} processes' if world.size > 1 else ''} = {tokens}")
    if settings["learning_rate"] is None:
        settings["learning_rate"] = default_learning_rate(definition, settings["model"])
    for name in ("input_bin", "input_val_bin"):
        if settings[name] == "":
            parser.error(f"{flag_name(name)} is empty, expected a file or a glob")
    flags = {name: value for name, value in settings.items() if name not in FLAGS_NOT_SAVED} | {"total_batch_size": total}
    if settings["input_bin"] is None:
        settings["input_bin"] = str(TRAIN_TOKENS)
        settings["input_val_bin"] = settings["input_val_bin"] or str(VAL_TOKENS)
    settings |= {"total_batch_size": total, "accumulation_steps": total // tokens, "checkpoint": checkpoint, "flags": flags}
    options = namedtuple("Options", settings)(**settings)
    if not checkpoint:
        check_unfinished(options.output_dir, new_parser)
    return options


def default_learning_rate(definition: ModuleType, model: str) -> float:
    """The peak for --model. It falls with the square root of a new model's width; a pretrained one must not forget."""
    return 2e-3 * math.sqrt(128 / definition.model_config(model).channels) if model in definition.NEW_MODELS else 1e-4


def flag_name(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def latest_checkpoint(output_dir: Path) -> Path:
    """The checkpoint that --resume continues from. Raises UserError if there is none."""
    found = checkpoints(output_dir)
    if not found:
        raise UserError(f"{output_dir} has no checkpoint to --resume from; leave out --resume to start a new run, or name "
                        "the --output-dir of the run to continue")
    return found[-1]


def saved_flags(checkpoint: Path, new_parser: Callable[[], OneLineParser]) -> dict:
    """The flags in a checkpoint, each checked as on the command line. Raises UserError if one is unknown or damaged."""
    source = checkpoint / STATE
    parser = new_parser()
    parser.hint = CHECKPOINT_HINT
    known = vars(parser.parse_args([])).keys() - set(FLAGS_NOT_SAVED)
    saved = {RENAMED_FLAGS.get(name, name): value for name, value in load_state(checkpoint)["flags"].items()
             if name in known or name not in FLAGS_OF_ONE_PROGRAM}
    if saved.get("dtype") in DTYPES:
        try:
            parser.parse_args([f"--dtype={saved['dtype']}"])
        except UserError:
            del saved["dtype"]
    for name in saved:
        if name not in known:
            raise UserError(f"{source} has the flag {short_repr(name)}, expected those of this program that a checkpoint "
                            f"keeps; {CHECKPOINT_HINT}")
    try:
        flags = vars(parser.parse_args([flag_name(name) if value is True else f"{flag_name(name)}={value}"
                                        for name, value in saved.items() if value is not None and value is not False]))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for name, value in saved.items():
        if flags[name] != value:
            raise UserError(f"{source}: {flag_name(name)} is {short_repr(value)}, expected a value of that flag; "
                            f"{CHECKPOINT_HINT}")
    return {name: flags[name] for name in saved}


def report_changes(saved: dict, settings: dict) -> None:
    """Print which flags differ from those of the resumed run. Raises UserError if one may not change."""
    for name, before in saved.items():
        flag, now = flag_name(name), settings.get(name, before)
        if now != before and name in FLAGS_THAT_MUST_MATCH:
            raise UserError(f"{flag} is {now}, expected {before}, as in the run in {settings['output_dir']}; leave it out, "
                            "or start a new run in another --output-dir", status=2)
        if now != before:
            print(one_line(f"{flag} is {now} from here on; it was {'not given' if before is None else before}"))


def check_unfinished(output_dir: Path, new_parser: Callable[[], OneLineParser]) -> None:
    """Raise UserError if this folder holds an unfinished run: forgetting --resume must not cost days of work."""
    for checkpoint in checkpoints(output_dir)[-1:]:
        done, steps = load_state(checkpoint)["step"], saved_flags(checkpoint, new_parser).get("num_iterations", 0)
        if done < steps or not is_saved(checkpoint, output_dir):
            stopped = f"stopped after {done:,} of {steps:,} steps" if done < steps else "was killed before it saved its model"
            raise UserError(f"{output_dir} is the folder of a run that {stopped}; continue it with --resume, choose another "
                            f"--output-dir, or delete {checkpoint.parent}")


def is_due(every: int, step: int, last: int) -> bool:
    """True every `every` steps and at the last step; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


# ----------------------------------------------------------------------------------------------------------------------
# Model and data

def load_or_create_model(definition: ModuleType, options, train_loader: DataLoader, val_loader: ValidationLoader | None
                         ) -> tuple[Config, Tensors | None, list[np.ndarray] | None, Tokenizer]:
    """Return (config, params, moments, tokenizer) of a checkpoint, a new model or a pretrained one.

    params are Tensors, moments two flat arrays. A new model has neither (None), a pretrained one no moments. A new model takes
    its vocabulary and its tokenizer from the data.
    Raises UserError if there is no such model, its context is shorter than the sequences, or its tokens are not the data's.
    """
    params = moments = None
    if options.checkpoint:
        check_definition(definition, options.checkpoint, "train")
        config, params, moments = load_checkpoint(options.checkpoint)
        tokenizer = load_model_tokenizer(options.checkpoint, config.vocab_size)
    elif options.model in definition.NEW_MODELS:
        vocab_size, tokenizer = vocabulary_of(train_loader)
        config = replace(definition.model_config(options.model), max_seq_len=options.sequence_length, vocab_size=vocab_size,
                         padded_vocab_size=padded(vocab_size))
    else:
        path = find_model(options.model)
        check_definition(definition, path, "train")
        config, params = load_model(path)
        tokenizer = load_model_tokenizer(path, config.vocab_size)
    if options.sequence_length > config.max_seq_len:
        raise UserError(f"--sequence-length is {options.sequence_length}, expected at most {config.max_seq_len}, the context "
                        f"of --model {options.model}", status=2)
    for loader in filter(None, (train_loader, val_loader)):
        loader.check_vocabulary(config.vocab_size, tokenizer.fingerprint, options.model)
    return config, params, moments, tokenizer


def vocabulary_of(loader: DataLoader) -> tuple[int, Tokenizer]:
    """The size of the data's vocabulary, and its tokenizer. Raises UserError if another one is stored beside the data.

    Files that do not name their tokenizer, such as llm.c's, have GPT-2's tokens, unless their largest token is too small or too
    large for that: a text of GPT-2's tokens hardly ever has none in the last third.
    """
    fingerprint, largest, path = loader.tokenizer_fingerprint, loader.largest, Path(loader.shards[0].path)
    size, folder = max(loader.vocab_size, largest + 1), tokenizer_folder(path)
    if not fingerprint:
        if 2 * VOCABULARY // 3 < largest < VOCABULARY:
            return VOCABULARY, GPT2Tokenizer()
        print(f"{path} does not name a tokenizer, and its tokens are not GPT-2's: the model knows {size:,} tokens, but no text")
        return size, NO_TOKENIZER
    if folder.is_dir():
        tokenizer = load_tokenizer(folder, {}, size)
        if tokenizer.fingerprint != fingerprint:
            raise UserError(f"{folder} is another tokenizer than that of {path}; prepare the text again with prepare_text.py")
        return size, tokenizer
    if fingerprint == GPT2_FINGERPRINT:
        return VOCABULARY, GPT2Tokenizer()
    print(f"{folder} is missing, the tokenizer of {path}: the model will have none")
    return size, NO_TOKENIZER


def data_loaders(options, world: World = SINGLE_PROCESS) -> tuple[DataLoader, ValidationLoader | None]:
    """The loaders of training and validation tokens (None without validation). Raises UserError, also if they share a file.

    Every process has its own training batches; all read the same validation batches.
    """
    sizes = options.batch_size, options.sequence_length
    shuffle_seed = options.seed if options.shuffle_shards else None
    train_loader = DataLoader(options.input_bin, *sizes, world.rank, world.size, shuffle_seed)
    val_loader = ValidationLoader(options.input_val_bin, *sizes) if options.input_val_bin else None
    if val_loader:
        refuse_leak(train_loader, val_loader)
    return train_loader, val_loader


def memory_hint(recompute: bool) -> str:
    """What to do if a model does not fit in memory."""
    smaller = "lower --batch-size or --sequence-length" + ("" if recompute else ", add --recompute")
    return f"{smaller}, or choose a smaller --model"


def prepare_data(input_bin: str, input_val_bin: str | None) -> None:
    """Prepare Tiny Shakespeare if its token files are wanted and missing. Raises UserError if that fails."""
    wanted = {input_bin, input_val_bin}
    finish_replacing(DATA_DIR)

    def missing():
        return any(str(path) in wanted and not path.exists() for path in (TRAIN_TOKENS, VAL_TOKENS))
    if not missing():
        return
    with made_folder(DATA_DIR), lock(DATA_DIR / LOCK_NAME, "the data of Tiny Shakespeare", wait=True):
        if missing():       # another run may have prepared it by now
            print(f"no tokens in {DATA_DIR} yet: preparing Tiny Shakespeare")
            prepare_tinyshakespeare()


def knows_text(tokenizer: Tokenizer) -> bool:
    """Whether tokens can be turned into text: the model has a tokenizer, and it is available. Prints the reason if not."""
    try:
        tokenizer.decode([0])
        return True
    except UserError as error:
        print(f"no samples will be printed: {error}")
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Progress, and stopping

@dataclass
class Progress:
    """What the next step depends on, besides the model, AdamW's moments and the flags."""
    step: int = 0                               # steps done
    data: tuple = DataLoader.START              # the DataLoader's state
    fingerprint: int = 0                        # the DataLoader's
    best_val_loss: float = math.inf
    latest_losses: list = field(default_factory=list)       # the last OUTLIER_WINDOW, for the z-score
    latest_norms: list = field(default_factory=list)


def initial_progress(options, fingerprint: int) -> Progress:
    """The Progress of the run's checkpoint, or of a new run. `fingerprint` is that of the training tokens.

    Raises UserError if the run was on other training tokens.
    """
    if not options.checkpoint:
        return Progress(fingerprint=fingerprint)
    state = load_state(options.checkpoint)
    if state["fingerprint"] != fingerprint:
        raise UserError(f"--input-bin {options.input_bin} holds other tokens than those that the run in {options.output_dir} "
                        "was trained on; pass those, or start a new run in another --output-dir")
    progress = Progress(**{field.name: state[field.name] for field in fields(Progress)})
    if progress.step >= options.num_iterations:
        print(f"the run in {options.output_dir} is finished, after {progress.step:,} steps; raise --num-iterations to train on")
    return progress


class StopRequest:
    """Defers the first Ctrl-C, SIGTERM or SIGHUP to the end of the step; a second one interrupts at once.

    SIGHUP comes when a terminal closes. If it is already ignored (nohup), it stays ignored. If the reader of our output exits
    (`| head`), that also counts as a request to stop.
    """
    NAMES = "SIGINT", "SIGTERM", "SIGHUP"       # Windows has no SIGHUP
    signal = 0

    def __enter__(self):
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        self.handlers = {number: signal.signal(number, self.receive) for number in numbers
                         if not (number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN)}
        return self

    def receive(self, signum, frame):
        self.signal = signum
        self.__exit__()
        if hasattr(signal, "SIGHUP"):   # a closing terminal may send it a second time
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        print("\nstopping when this step is done (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)

    @property
    def status(self) -> int:
        """The exit status of a run that stops now, the shell's for a signal; 0 if nobody asks for it."""
        if self.signal:
            return 128 + self.signal
        return 141 if isinstance(getattr(sys.stdout, "failure", None), BrokenPipeError) else 0     # as for SIGPIPE

    def __exit__(self, *exception):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Schedule, checks and samples

def learning_rate(step: int, num_iterations: int, warmup_iters: int, peak: float, decay_frac: float, schedule: str) -> float:
    """The learning rate of step 1 ... num_iterations: linear warmup to the peak, then a decay to peak * decay_frac.

    The decay is half a cosine, a line, none at all, or (wsd: warmup, stable, decay) 1 - sqrt(progress) over the last fifth
    of the run (Haegele et al. 2024).
    """
    if step <= warmup_iters:
        return peak * step / warmup_iters
    lowest = peak * decay_frac
    done = (step - warmup_iters) / (num_iterations - warmup_iters)
    if schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == "linear":
        height = 1 - done
    elif schedule == "wsd":
        height = 1 - math.sqrt(max(0.0, (step - 0.8 * num_iterations) / (0.2 * num_iterations)))
    else:
        height = 1.0
    return lowest + (peak - lowest) * height


def check_finite(step: int, model, **values: float) -> None:
    """Raise UserError if a value is not finite, naming the step and the first tensor that is not finite either.

    Parameters are searched first, then activations in the order of the forward pass, then gradients.
    """
    if all(map(math.isfinite, values.values())):
        return
    tensors = [*((f"parameter {name}", tensor) for name, tensor in model.params.items()),
               *((f"activation {name}", tensor) for name, tensor in activations_in_order(model)),
               *((f"gradient d{name}", tensor) for name, tensor in model.grads.items())]
    first = next((name for name, tensor in tensors if not np.isfinite(tensor.astype(np.float32, copy=False)).all()),
                 "none of those in memory")
    found = " and ".join(f"{name.replace('_', ' ')} is {value}" for name, value in values.items())
    raise UserError(f"step {step}: {found}; first non-finite tensor: {first}; "
                    "try a lower --learning-rate or a longer --warmup-iters")


def z_score(window: list, value: float) -> float:
    """Append value to the window and return its z-score there, as llm.c's outlier detector does: NaN until it is full."""
    window.append(value)
    if len(window) <= OUTLIER_WINDOW:
        return math.nan
    del window[0]
    deviation = np.std(window)
    return (value - np.mean(window)) / deviation if deviation > 0 else 0.0


def outlier(loss: float, norm: float, progress: Progress, loss_limit: float, norm_limit: float) -> str | None:
    """The reason to skip the update, a z-score of the loss or gradient norm above its limit; None: do not skip."""
    scores = {"loss": (z_score(progress.latest_losses, loss), loss_limit),
              "norm": (z_score(progress.latest_norms, norm), norm_limit)}
    for name, (score, limit) in scores.items():
        if 0 < limit < score:
            return f"its {name} is {score:.1f} standard deviations above the mean"
    return None


def activations_in_order(model):
    """(name, tensor) of the activations in memory, in the order in which the forward pass computes them."""
    L, recomputed = model.config.num_layers, definition_of(model.config).RECOMPUTED
    names = list(model.acts.shapes)
    per_layer = [name for name in names[names.index("ln1"):names.index("lnf")] if not (model.recompute and name in recomputed)]
    yield "encoded", model.acts.encoded
    for l in range(L):
        for name in per_layer:
            yield f"{name} of layer {l}", getattr(model.acts, name)[l]
    for name in names[names.index("lnf"):]:
        yield name, getattr(model.acts, name)


def sample_text(step: int, model, tokenizer: Tokenizer, seed: int, max_tokens: int) -> str:
    """Text that the model generates after `step` steps: at most min(max_tokens, SAMPLE_TOKENS) tokens."""
    generator = np.random.default_rng(seed)
    tokens = [tokenizer.end_of_text or 0]
    for _ in range(min(SAMPLE_TOKENS, max_tokens)):
        logits = model.next_token_logits(np.array([tokens], dtype=np.int32))
        check_finite(step, model, sum_of_logits=logits.sum(dtype=np.float64))
        tokens.append(sample(logits[:tokenizer.vocab_size], tokens, generator, TEMPERATURE))
    return tokenizer.decode([token for token in tokens[1:] if token not in tokenizer.end_tokens])


def bytes_per_token(val_loader: ValidationLoader | None, tokenizer: Tokenizer) -> float | None:
    """The mean length of a validation token's text in UTF-8, over the first EXAMINED_TOKENS; None if it is not known."""
    if not val_loader:
        return None
    tokens = val_loader.first_tokens(EXAMINED_TOKENS)
    return tokenizer.num_bytes(tokens) / len(tokens) or None


def baselines(config: Config, train_loader: DataLoader) -> dict[str, float]:
    """The losses, in nats per token, of two models that read nothing: for comparison.

    They are the entropy of a uniform distribution, and of the frequencies of the first EXAMINED_TOKENS training tokens.
    """
    counts = np.bincount(train_loader.first_tokens(EXAMINED_TOKENS))
    frequencies = counts[counts > 0] / counts.sum()
    return {"guessing": math.log(config.vocab_size), "token frequencies": -float(frequencies @ np.log(frequencies))}


# ----------------------------------------------------------------------------------------------------------------------
# What the run prints and leaves behind

def print_configuration(options, model, train_loader, val_loader, examples=(), **device_rows) -> None:
    """Print the settings of a run as a small table; device_rows are those that depend on the device."""
    config = model.config
    B, T = options.batch_size, options.sequence_length
    batches = options.total_batch_size // (B * T)   # of all processes
    decay = f", then {options.schedule} to {options.learning_rate_decay_frac:g} of it" if options.schedule != "constant" else ""
    clipping = f"gradients clipped at norm {options.grad_clip:g}" if options.grad_clip else "no gradient clipping"
    rows = {
        "model": f"{options.model}: {config.num_layers} layers, {config.num_heads} heads"
                 + (f" on {config.num_key_heads} of keys" if config.num_key_heads < config.num_heads else "")
                 + f", {config.channels} channels, {model.params.size / 1e6:.1f} M parameters",
        "batch": f"{B} x {T} tokens" + (f", {batches} per step: {options.total_batch_size:,} tokens" if batches > 1 else ""),
        "training": f"{train_loader.num_tokens:,} tokens in {options.input_bin}",
        "validation": f"{val_loader.num_tokens:,} tokens in {options.input_val_bin}" if val_loader else "none",
        "steps": f"{options.num_iterations:,}, {options.num_iterations * options.total_batch_size:,} tokens in all",
        "learning rate": f"{options.learning_rate:g} after {options.warmup_iters} steps of warmup{decay}",
        "weight decay": f"{options.weight_decay:g}, {clipping}",
        **device_rows,
        "output": f"{options.output_dir}",
    }
    if examples:
        too_long = sum(example.length > T for example in examples)
        rows["hellaswag"] = (f"{len(examples):,} examples in {options.hellaswag}, {too_long:,} longer than {T} "
                             "tokens: the model reads their end")
    for name, value in rows.items():
        print(f"{name:>13} | {one_line(str(value))}")
    print(flush=True)


class TrainingLog:
    """Prints the progress of a run, logs it to `log.csv`, and plots `loss.png` at the end, even after an error.

    A row of log.csv is a training step, a validation or a HellaSwag score; its other columns are empty.

    title: the title of the plot
    tokens_per_step: to compute the speed
    ideal_seconds: how long a step would take at the device's peak FLOP rate, if known. Divided by the measured time, it
        is the MFU, model FLOPs utilization (Chowdhery et al. 2022).
    bytes_per_token: of the validation text, if known, to state its loss in bits per byte, too: losses per token do not compare
        across vocabularies
    baselines: name -> loss of models that the plot compares with
    done: steps already done by a resumed run; its log continues there

    Raises UserError if the output folder cannot be written, or the log of a resumed run cannot be read.
    """

    def __init__(self, output_dir: Path, title: str, num_iterations: int, tokens_per_step: int,
                 ideal_seconds: float | None = None, bytes_per_token: float | None = None, baselines: dict | None = None,
                 done: int = 0):
        self.output_dir, self.title, self.num_iterations = output_dir, title, num_iterations
        self.tokens_per_step, self.ideal_seconds = tokens_per_step, ideal_seconds
        self.bytes_per_token, self.baselines = bytes_per_token, baselines or {}
        self.rows = read_log(output_dir / "log.csv", done) if done else []
        try:
            with suppress(IsADirectoryError, PermissionError):     # something else has this name, so there will be no picture
                (output_dir / "loss.png").unlink(missing_ok=True)   # an earlier run's
            with atomic_file(output_dir / "log.csv") as file:
                file.write(log_lines(self.rows).encode())
            self.file = open(output_dir / "log.csv", "a", newline="")
        except OSError as error:
            raise UserError(f"cannot write {error.filename} for --output-dir {output_dir}: {error.strerror}; "
                            "choose a folder that can be written") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(OSError):  # a full disk has been reported by then
            self.file.close()
        if self.rows:
            try:
                self.plot()
            except Exception as error:      # of whatever kind: a picture must not cost a trained model
                print(f"no picture of the losses was drawn: {textwrap.shorten(str(error), 200)}")

    def step(self, step: int, loss: float, norm: float, rate: float, seconds: float) -> None:
        """Report one training step: its loss before the update, gradient norm, learning rate and duration."""
        speed = self.tokens_per_step / seconds
        self.write(step=step, train_loss=loss, grad_norm=norm, learning_rate=rate,
                   milliseconds=round(1000 * seconds, 3), tokens_per_second=round(speed, 1))
        print(f"{self.heading(step)} | train loss {loss:9.6f} | norm {norm:8.4f} | lr {rate:.2e} | "
              f"{1000 * seconds:8.1f} ms | {speed:7,.0f} tok/s"
              + (f" | {self.ideal_seconds / seconds:5.1%} MFU" if self.ideal_seconds else ""), flush=True)

    def validation(self, step: int, loss: float) -> None:
        """Report the mean loss on the validation tokens after `step` steps."""
        bits = {"bits_per_byte": loss / math.log(2) / self.bytes_per_token} if self.bytes_per_token else {}
        self.write(step=step, val_loss=loss, **bits)
        print(f"{self.heading(step)} |   val loss {loss:9.6f}"
              + "".join(f" | {value:.4f} bits per byte" for value in bits.values()), flush=True)

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        """Report the fraction of HellaSwag's examples that the model gets right after `step` steps."""
        self.write(step=step, hellaswag=correct / total)
        print(f"{self.heading(step)} |  hellaswag {correct / total:9.6f} ({correct:,} of {total:,})", flush=True)

    def sample(self, text: str) -> None:
        """Print a generated text."""
        print("\n    " + text.strip().replace("\n", "\n    ") + "\n", flush=True)

    def heading(self, step):
        return f"step {step:{len(str(self.num_iterations))}}/{self.num_iterations}"

    def note(self, step: int, text: str) -> None:
        """Print a remark about a step."""
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
        import matplotlib  # not at the top: importing it takes longer than the first steps
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        steps, losses = self.column("train_loss")
        window = max(1, len(losses) // MEAN_WINDOWS)
        axes.plot(steps, losses, linewidth=0.5, color="tab:blue", alpha=0.3)
        means = np.convolve(losses, np.full(window, 1 / window), "valid")
        axes.plot(steps[window - 1:], means, linewidth=1.8, color="tab:blue",
                  label=f"training, mean of {window} steps" if window > 1 else "training")
        steps, losses = self.column("val_loss")
        if losses:
            axes.plot(steps, losses, marker="o", markersize=4, color="tab:red", label=f"validation, last {losses[-1]:.3f}")
        for name, loss in self.baselines.items():
            axes.axhline(loss, linewidth=0.8, color="gray")
            axes.text(1, loss, f" {name}: {loss:.2f}", transform=axes.get_yaxis_transform(), fontsize="small", va="center")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.set_title(self.title, parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_file(self.output_dir / "loss.png") as file:
            figure.savefig(file, dpi=200, format="png")
        pyplot.close(figure)
        print(f"wrote {self.output_dir / 'log.csv'} and {self.output_dir / 'loss.png'}")

    def column(self, name):
        """The steps at which a column of the log is filled, and its values."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


class NullLog:
    """A TrainingLog that does nothing, for ranks other than 0."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __getattr__(self, name):
        return lambda *arguments: None


def log_lines(rows, header=True):
    """Format rows (dicts) as lines of CSV."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, CSV_COLUMNS, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()


def read_log(path, done):
    """The rows of a log.csv up to `done` steps, as TrainingLog keeps them. A last line that is cut short is left out.

    Raises UserError if it cannot be read.
    """
    if not path.exists():
        return []
    with open_file(path, LOG_HINT) as file:
        contents = file.read()
    try:
        lines = list(csv.DictReader(io.StringIO(contents.decode(), newline="")))
        if lines and None in lines[-1].values():    # it has too few columns: a process was killed while it wrote them
            del lines[-1]
        return [row for row in map(parse_row, lines) if row["step"] <= done]
    except (ValueError, csv.Error) as error:    # ValueError also if it is not UTF-8
        raise UserError(f"{path} is not the log of a run ({short_repr(str(error))}); {LOG_HINT}") from error


def parse_row(line):
    """A row of the log, given its columns as text. Raises ValueError for anything but the finite numbers of a step."""
    if line.keys() | {"bits_per_byte"} != set(CSV_COLUMNS) or not (line["step"] or "").isdecimal():
        raise ValueError(f"found {line}, expected a step and other numbers")
    row = {name: float(value) for name, value in line.items() if value}
    if not all(map(math.isfinite, row.values())):
        raise ValueError(f"found {line}, expected finite numbers")
    return row | {"step": int(line["step"])}
