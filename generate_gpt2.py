"""Generate text with GPT-2 on the CPU: `python generate_gpt2.py --model MODEL --prompt TEXT`. --help lists all options.

Read it from the top: compact weights; the decoder, whose flat forward pass is train_gpt2.py's with a KV cache; the sampling
loop; from tokens to text; and the command line. Results go to standard output; notes and speed go to standard error.
"""
import contextlib
import io
import math
import sys
import time
from argparse import ArgumentTypeError
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from math import prod
from types import ModuleType, SimpleNamespace

from cli import OneLineParser, UserError, bounded, run_program, utf8      # first: from here on, Ctrl-C is one line

import numpy as np

import gpt2
import kernels_cpu as kernels
from chat import ChatTemplate, common_start
from dataloader import TokenFile, is_token_file
from files import cache_lifetime, open_file
from gpt2 import Config, Tensors, chunks
from llama import definition_of
from machine import check_memory, main_memory
from matmul_cpu import HAS_BFLOAT16, in_large_pages
from matvec_cpu import QUANT_GROUP, WEIGHT_DTYPES
from model_files import check_definition, find_model, load_model, load_model_tokenizer
from sampling import sample
from text_files import as_text, clean
from tokenizer import Tokenizer

TEMPERATURE, CHAT_TEMPERATURE = 0.8, 0.0        # of a text, and of an answer
LONGEST_CONTEXT = 8192      # unless the user asks for more: a cache of 131,072 positions, some models' context, takes gigabytes
MEMORY_BOUND_ROWS = 24    # up to this many rows, a matrix product is limited by reading its weight
OUT_OF_MEMORY_HINT = "choose a smaller --model, fewer --num-samples or --quantize int8"
REPLACEMENT = "\ufffd"            # for bytes that are not UTF-8
DAMAGED_WEIGHTS_HINT = "the model's weights are damaged, or it diverged in training; use another --model"


# ----------------------------------------------------------------------------------------------------------------------
# Compact weights: bfloat16, or integers of 8 or 4 bits (GGUF's Q8_0 and Q4_0). matvec_cpu.WEIGHT_DTYPES has the array types.

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
LINEAR_WEIGHTS = ("qkvw", "attprojw", "fcw", "fcprojw")
TOKEN_WEIGHTS = ("wte", "headw")        # a row for each token; only a Llama has the second


def round_weights(config: Config, params: Tensors | SimpleNamespace, kind: str) -> SimpleNamespace:
    """A copy of the parameters with the float32 weights of tokens and linear layers rounded to a key of BITS.

    8 and 4 bits need rows of a multiple of QUANT_GROUP numbers: other weights stay as they are.
    """
    rounded = {}
    for name in definition_of(config).parameter_shapes(config):
        tensor = getattr(params, name)
        if name in LINEAR_WEIGHTS:
            rounded[name] = [rounded_weight(weight, kind) for weight in tensor]
        elif name in TOKEN_WEIGHTS:
            rounded[name] = rounded_weight(tensor[:config.vocab_size], kind)
        else:
            rounded[name] = np.copy(tensor)
    return SimpleNamespace(**rounded)


def rounded_weight(weight, kind):
    """A float32 weight (OC, C) rounded to `kind`, an array that its kernels read."""
    OC, C = weight.shape
    if weight.dtype != np.float32:
        return weight       # a file holds it in fewer bits
    if kind == "float32" or BITS[kind] < 16 and C % QUANT_GROUP:
        return np.copy(weight)
    out = in_large_pages((OC, row_length(C, kind)), WEIGHT_DTYPES[kind])
    if kind == "bfloat16":
        kernels.round_to_bfloat16(out, weight)
    else:
        kernels.quantize(out, weight, BITS[kind])
    return out


def weight_kinds(params: Tensors | SimpleNamespace) -> set:
    """The kinds, keys of BITS, of the weights of the tokens and of all linear layers."""
    tokens = [getattr(params, name) for name in TOKEN_WEIGHTS if hasattr(params, name)]
    weights = [weight for weight in tokens if weight.size]
    weights += [weight for name in LINEAR_WEIGHTS for weight in getattr(params, name)]
    return {kind for kind, dtype in WEIGHT_DTYPES.items() if any(weight.dtype == dtype for weight in weights)}


def prompt_dtype(kinds: set) -> str:
    """In which dtype to multiply the weights of a model with a long prompt, unless the user says it."""
    return "bfloat16" if kinds != {"float32"} and HAS_BFLOAT16 else "float32"


def row_length(C, kind):
    """Elements of an array that hold a row of C numbers."""
    return C if BITS[kind] >= 16 else C // QUANT_GROUP * (2 + QUANT_GROUP * BITS[kind] // 8)


def encoder_forward(out, tokens, wte, wpe):
    """out (N, C) = wte[token] + wpe[position] for tokens (B, T), N = B*T."""
    kernel = kernels.encoder_forward if wte.dtype == np.float32 else kernels.encoder_compact_forward
    kernel(out, tokens, wte, wpe)


def linear_forward(out, inp, weight, bias, workspace):
    """out (N, OC) = inp (N, C) @ weight (OC, C).T + bias (OC), with the fastest kernel for N and the type of the weight."""
    if len(inp) <= MEMORY_BOUND_ROWS:
        kernels.matvec_forward(out, inp, weight, bias, workspace)
    elif weight.dtype == np.float32:
        kernels.matmul_forward(out, inp, weight, bias, workspace)
    else:
        kernels.matmul_compact_forward(out, inp, weight, bias, workspace)


# ----------------------------------------------------------------------------------------------------------------------
# The decoder

class Decoder:
    """GPT-2 with a KV cache, for a batch of B texts.

    params: gpt2.Tensors, or what `round_weights` returns
    dtype: of the factors in the matrix products of a prompt, float32 or bfloat16
    keys, values: the cache, (L, B, KV, maxT, HS) each; GPT-2 has as many heads of keys, KV, as of queries
    start: index in the texts of the first token in the cache
    length: number of tokens of each text in the cache, at most config.max_seq_len
    """

    def __init__(self, config: Config, params: Tensors | SimpleNamespace, num_texts: int, threads: int,
                 dtype: str = "float32"):
        self.config, self.params, self.workspace = config, params, kernels.make_workspace(threads, dtype)
        cache = (config.num_layers, num_texts, config.num_key_heads, config.max_seq_len, config.head_size)
        self.keys, self.values = np.zeros(cache, dtype=np.float32), np.zeros(cache, dtype=np.float32)
        self.start = self.length = 0
        self.acts = Tensors({"residual": (0, 0)})

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """Return the normalized output of the last block (N, C), N = B*T, for tokens (B, T) that follow those in the cache.

        Appends to the cache. B may be less than num_texts: the first B texts. Raises ValueError if the context is too
        short.
        """
        B, T = tokens.shape
        N, C, workspace = B * T, self.config.channels, self.workspace
        position, end = self.length, self.length + T
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens, expected at most {self.config.max_seq_len}")
        if len(self.acts.residual) != N:
            self.acts = Tensors({"residual": (N, C), "ln": (N, C), "mean": (N,), "rstd": (N,), "qkv": (N, 3 * C),
                                 "att": (N, C), "proj": (N, C), "fch": (N, 4 * C), "fch_gelu": (N, 4 * C)})
        params, acts, residual, exact_gelu = self.params, self.acts, self.acts.residual, self.config.exact_gelu
        attention_forward = kernels.attention_cached_forward
        layernorm_forward, residual_forward = kernels.layernorm_forward, kernels.residual_forward
        gelu_forward = kernels.gelu_exact_forward if exact_gelu else kernels.gelu_forward
        if N <= MEMORY_BOUND_ROWS:      # waking the other threads would take longer than the work
            layernorm_forward = kernels.layernorm_forward_on_one_thread
            residual_forward = kernels.residual_forward_on_one_thread
            gelu_forward = kernels.gelu_exact_forward_on_one_thread if exact_gelu else kernels.gelu_forward_on_one_thread

        encoder_forward(residual, tokens, params.wte, params.wpe[position:end])                                  # (N, C)
        for l in range(self.config.num_layers):
            layernorm_forward(acts.ln, acts.mean, acts.rstd, residual, params.ln1w[l], params.ln1b[l])           # (N, C)
            linear_forward(acts.qkv, acts.ln, params.qkvw[l], params.qkvb[l], workspace)                         # (N, 3C)
            attention_forward(acts.att, self.keys[l, :B], self.values[l, :B], acts.qkv, position, workspace)     # (N, C)
            linear_forward(acts.proj, acts.att, params.attprojw[l], params.attprojb[l], workspace)               # (N, C)
            residual_forward(residual, residual, acts.proj)                                                      # (N, C)
            layernorm_forward(acts.ln, acts.mean, acts.rstd, residual, params.ln2w[l], params.ln2b[l])           # (N, C)
            linear_forward(acts.fch, acts.ln, params.fcw[l], params.fcb[l], workspace)                           # (N, 4C)
            gelu_forward(acts.fch_gelu, acts.fch)                                                                # (N, 4C)
            linear_forward(acts.proj, acts.fch_gelu, params.fcprojw[l], params.fcprojb[l], workspace)            # (N, C)
            residual_forward(residual, residual, acts.proj)                                                      # (N, C)
        layernorm_forward(acts.ln, acts.mean, acts.rstd, residual, params.lnfw, params.lnfb)                     # (N, C)
        self.length = end
        return acts.ln

    def classifier(self) -> np.ndarray:
        """The weight of the classifier, (V, C), possibly with padding."""
        return self.params.wte

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """The logits (n, V) of the next tokens, from rows (n, C) of what `forward` returned."""
        logits = np.empty((len(rows), self.config.vocab_size), dtype=np.float32)
        linear_forward(logits, rows, self.classifier()[:self.config.vocab_size], kernels.NO_BIAS, self.workspace)
        return logits

    def losses(self, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The cross-entropy (n,), in nats, of each of the targets (n,), from rows (n, C) of what `forward` returned."""
        losses, logits = np.empty(len(rows), dtype=np.float32), self.logits(rows)
        kernels.fused_classifier(losses, logits, targets, 0.0, self.config.vocab_size)
        return losses

    def next_logits(self, texts: list[list[int]]) -> np.ndarray:
        """The logits (B, V) of the next token of each of B texts, lists of tokens of the same length.

        The texts must begin with those of the last call: only the new tokens are read. When the context is full, the cache is
        cleared and the most recent half context is read again. Just dropping the oldest tokens is not enough: the rest would
        move to other positions, with other position embeddings.
        """
        length = len(texts[0])
        if length - self.start > self.config.max_seq_len:
            self.start, self.length = length - max(1, self.config.max_seq_len // 2), 0
        B, fresh, seen = len(texts), self.length == 0, self.start + self.length
        tokens = np.array([text[seen:] for text in texts], dtype=np.int32)                                       # (B, T)
        if fresh and (tokens == tokens[0]).all():   # the same prompt for all: read it once
            rows = self.forward(tokens[:1])
            self.keys[:, 1:, :, :self.length] = self.keys[:, :1, :, :self.length]
            self.values[:, 1:, :, :self.length] = self.values[:, :1, :, :self.length]
            return np.repeat(self.logits(rows[-1:]), B, axis=0)
        rows = self.forward(tokens).reshape(*tokens.shape, -1)
        return self.logits(rows[:, -1].copy())

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length` of the texts, so that others can follow."""
        self.length = min(length, self.length) if self.start == 0 else 0
        self.start = 0


def generate(decoder: Decoder, texts: list, generators: list, max_new_tokens: int, vocab_size: int | None = None, **sampling
             ) -> Iterator[list[int]]:
    """Yield the next token of each of the texts and append it, max_new_tokens times.

    vocab_size: of the tokenizer. Tokens beyond it, which only fill up the model's rows, are never drawn.

    Each text has its own random generator. While no more than MEMORY_BOUND_ROWS rows are read at a time, the bits of a text's
    logits do not depend on the other texts. With more rows, other kernels are used and logits differ by 1e-6, which may change
    a sampled token.
    Raises UserError if logits are not finite.
    """
    for _ in range(max_new_tokens):
        logits = decoder.next_logits(texts)
        if not np.isfinite(logits).all():
            raise UserError(f"the logits after {len(texts[0]):,} tokens are not finite: {DAMAGED_WEIGHTS_HINT}")
        tokens = [sample(row[:vocab_size], text, generator, **sampling)
                  for row, text, generator in zip(logits, texts, generators)]
        for text, token in zip(texts, tokens):
            text.append(token)
        yield tokens


def mean_loss(decoder: Decoder, tokens) -> float:
    """The mean cross-entropy, in nats per token, of all tokens after the first, each given those before it.

    The text is read in windows of one context that overlap by half, so that every token after the first half context has at
    least half a context before it.
    """
    config = decoder.config
    T, n = config.max_seq_len, len(tokens) - 1
    total, scored, start = 0.0, 0, 0
    while scored < n:
        end = min(start + T, n)
        decoder.length = 0
        rows = decoder.forward(np.array([tokens[start:end]], dtype=np.int32))[scored - start:]
        targets = np.array(tokens[scored + 1:end + 1], dtype=np.int32)
        for part in chunks(len(rows), kernels.CLASSIFIER_ROWS):
            total += decoder.losses(rows[part], targets[part]).sum(dtype=np.float64)
        scored, start = end, end - T // 2
    return total / n


# ----------------------------------------------------------------------------------------------------------------------
# From tokens to text

class TextStream:
    """Turns tokens into text as they arrive, up to the first stop string.

    A token may end inside a UTF-8 character, and a text may end with the beginning of a stop: both wait for the next token.

    tokens: those before, which may decide whether the first word needs a space
    stopped: whether a stop was found
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], tokens: list[int]):
        self.tokenizer, self.stops = tokenizer, stops
        self.begin(tokens[-1:])
        self.waiting = ""
        self.stopped = False

    def begin(self, tokens):
        """Forget all tokens but these, whose text has been printed."""
        self.tokens, self.printed = tokens, len(self.tokenizer.decode(tokens))

    def add(self, token: int) -> str:
        """The text that can be printed after this token."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        complete = text.rstrip(REPLACEMENT)     # they may be the beginning of a character
        new, self.printed = complete[self.printed:], max(self.printed, len(complete))
        if complete == text:
            self.begin([token])
        return self.release(new)

    def finish(self) -> str:
        """The remaining text, when no token follows."""
        text = self.release(self.tokenizer.decode(self.tokens)[self.printed:]) + self.waiting
        self.waiting = ""
        return text

    def release(self, text):
        if self.stopped:
            return ""
        text = self.waiting + text
        found = min((text.index(stop) for stop in self.stops if stop in text), default=None)
        self.stopped = found is not None
        if self.stopped:
            self.waiting = ""
            return text[:found]
        waiting = max((size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self.waiting = text[len(text) - waiting:]
        return text[:len(text) - waiting]


class Speed:
    """Counts the tokens and seconds of prompts and of generated text; its string is the last line of a run."""

    def __init__(self):
        self.prompt_tokens = self.new_tokens = 0
        self.prompt_seconds = self.new_seconds = 0.0

    def __str__(self):
        def rate(tokens, seconds):
            return f"{tokens:,} tokens, {tokens / seconds if seconds > 0 else 0:,.1f} tok/s"
        return (f"prompt: {rate(self.prompt_tokens, self.prompt_seconds)} | "
                f"generated: {rate(self.new_tokens, self.new_seconds)}")


def write_texts(decoder: Decoder, tokenizer: Tokenizer, texts: list, generators: list, options, speed: Speed,
                is_end: Callable[[int], bool] | None = None) -> list[str]:
    """Continue the texts until each has max_new_tokens more tokens, hits a stop string or ends. Return what was added, as text.

    The first text is streamed to standard output. Counts and times are added to `speed`. Ctrl-C ends a reply, of --interactive
    or --chat, and is an error otherwise.

    is_end: whether a token ends a text; None: the tokenizer's end_tokens do
    """
    is_end = is_end or tokenizer.end_tokens.__contains__
    streams = [TextStream(tokenizer, options.stop, text) for text in texts]
    written = [""] * len(texts)
    ended = [False] * len(texts)

    def write(i, text):
        written[i] += text
        if i == 0:
            print(text, end="", flush=True)

    start, length = decoder.start, decoder.length
    truncated = start > 0
    started = time.perf_counter()
    with contextlib.suppress(*[KeyboardInterrupt] * (options.interactive or options.chat)):
        for step, tokens in enumerate(generate(decoder, texts, generators, options.max_new_tokens, tokenizer.vocab_size,
                                               temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                                               repetition_penalty=options.repetition_penalty)):
            if step == 0:
                speed.prompt_tokens += decoder.length - (length if decoder.start == start else 0)
                speed.prompt_seconds += time.perf_counter() - started
                started = time.perf_counter()
            else:
                speed.new_tokens += len(texts)
            for i, token in enumerate(tokens):
                if not ended[i]:
                    ended[i] = is_end(token)
                    if not ended[i]:
                        write(i, streams[i].add(token))
                        ended[i] = streams[i].stopped
            if decoder.start > 0 and not truncated:
                truncated = True
                context = decoder.config.max_seq_len
                note("\n[context full: from here on the model sees only the latest "
                     f"{context // 2:,} to {context:,} tokens]")
            if all(ended):
                break
    speed.new_seconds += time.perf_counter() - started
    for i, stream in enumerate(streams):
        write(i, stream.finish())
    return written


def note(text) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def parse_options(definition: ModuleType, processor: str, arguments: list | None = None, **own_flags):
    """The flags, as a named tuple. own_flags are those of one program only: threads=dict(type=..., help=...).

    definition: the module that defines the program's models, gpt2 or llama

    Raises UserError with status 2 for a wrong flag or combination.
    """
    parser = OneLineParser(description=f"Generate text with {definition.NAME} on the {processor}.")
    add, switch = parser.add_flag, parser.add_argument
    positive, count = bounded(int, 1), bounded(int, 0)
    add("--model", required=True, help=definition.PRETRAINED_HELP)
    add("--prompt", type=utf8, help="the text to continue; if empty, generation starts from the token that begins a new text "
        "(default: standard input without its last newline, if it is a file or a pipe)")
    add("--max-new-tokens", default=256, type=positive, help="tokens to generate")
    add("--temperature", type=bounded(float, 0), help="above 1 is more random, below 1 less; 0: always the most likely token "
        f"(default: {TEMPERATURE}, with --chat {CHAT_TEMPERATURE:g})")
    add("--top-k", default=0, type=count, help="sample from the k most likely tokens; 0: all")
    add("--top-p", default=0.95, type=bounded(float, 0, 1),
        help="nucleus sampling: the most likely tokens with this total probability")
    add("--repetition-penalty", default=1.0, type=bounded(float, 1),
        help="penalizes tokens that have already occurred; 1: off")
    add("--seed", default=1337, type=bounded(int, 0, 2**63 - 1),
        help="random seed for sampling: the same seed gives the same text")
    add("--num-samples", default=1, type=positive, help="texts to generate in one batch")
    switch("--stop", action="append", default=[], type=utf8, metavar="TEXT",
           help="stop before this text; may be given several times")
    switch("--interactive", action="store_true",
           help="continue each line of standard input, given all text so far")
    switch("--chat", action="store_true",
           help="chat with a model that was trained to: each line of standard input is a message, put into its chat template")
    add("--perplexity", metavar="FILE", help="score a text or token file instead of generating")
    for name, settings in own_flags.items():
        add("--" + name.replace("_", "-"), **settings)
    options = parser.parse_args(arguments)

    if options.top_p == 0:
        parser.error("--top-p is 0, expected more than 0 and at most 1")
    if "" in options.stop:
        parser.error("--stop is empty, expected a text")
    if options.interactive and options.chat:
        parser.error("--interactive and --chat read the same lines, expected one of them")
    if (options.interactive or options.chat) and options.num_samples > 1:
        parser.error(f"--num-samples is {options.num_samples}, expected 1 with --{'chat' if options.chat else 'interactive'}")
    if options.temperature is None:
        options.temperature = CHAT_TEMPERATURE if options.chat else TEMPERATURE
    return namedtuple("Options", vars(options))(**vars(options))


def compile_kernels(config: Config, kinds: Iterable = ("float32",), dtype: str = "float32") -> None:
    """Compile the kernels into Numba's cache, unless those that such a model needs are there.

    kinds: of its weights, keys of BITS
    dtype: of the factors in matrix products, see Decoder
    """
    words = kernels.WORDS[dtype]

    def is_compiled(kind):
        dtypes = {"workspace": words, "weight": WEIGHT_DTYPES[kind], "wte": WEIGHT_DTYPES[kind]}
        return kernels.all_compiled(kernels.DECODING_FLOAT32 if kind == "float32" else kernels.DECODING_COMPACT, **dtypes)

    if not (kernels.all_compiled(kernels.decoding_kernels(config.layers), workspace=words) and all(map(is_compiled, kinds))):
        note(f"compiling the kernels, {cache_lifetime()}: about 10 seconds")
        definition = definition_of(config)
        sizes = asdict(definition.smallest_model(config, context=2 * MEMORY_BOUND_ROWS, channels=QUANT_GROUP))
        kernels.compile_in_processes(f"generate_{definition.__name__}", sizes, sorted(kinds), dtype)


def run_every_kernel(prompt_first: bool, sizes: dict, kinds: list, dtype: str, definition: ModuleType = gpt2,
                     decoder_class: type = Decoder) -> None:
    """Read and score a text with the smallest model, so that Numba compiles every kernel it needs.

    sizes: the fields of its Config
    kinds: of its weights, keys of BITS
    """
    config = definition.Config(**sizes)
    T, params = config.max_seq_len, Tensors(definition.parameter_shapes(config))
    for kind in kinds:
        weights = SimpleNamespace(**dict(params.items()))
        for name in ("wte", *LINEAR_WEIGHTS):
            *rows, C = params.shapes[name]
            setattr(weights, name, np.zeros((*rows, row_length(C, kind)), WEIGHT_DTYPES[kind]))
        decoder = decoder_class(config, weights, num_texts=1, threads=1, dtype=dtype)
        if prompt_first:
            decoder.losses(decoder.forward(np.zeros((1, T), dtype=np.int32)), np.zeros(T, dtype=np.int32))
            decoder.length = 0
        decoder.next_logits([[0]])
        mean_loss(decoder, [0] * (T + 1))


def encode(tokenizer: Tokenizer, text: str, config: Config) -> list[int]:
    """The tokens of a text. Raises UserError if the model has no row for one of them."""
    tokens = tokenizer.encode(text)
    if max(tokens, default=0) >= config.vocab_size:
        raise UserError(f"the text holds {tokenizer.decode([max(tokens)])!r}, token {max(tokens):,} of the tokenizer, but the "
                        f"model knows only {config.vocab_size:,} tokens; leave it out")
    return tokens


def score(decoder: Decoder, tokenizer: Tokenizer, path: str, model_name: str) -> None:
    """Print the perplexity of a text or token file."""
    config = decoder.config
    with open_file(path, "pass a text or a token file", stream=True) as file:
        contents = file.read()      # once: it may be a pipe
    if is_token_file(contents):
        token_file = TokenFile(path, io.BytesIO(contents))
        token_file.check_vocabulary(config.vocab_size, tokenizer.fingerprint, model_name)
        tokens = token_file.read(0, token_file.num_tokens)
    else:
        tokens = encode(tokenizer, as_text(path, contents), config)
        begin = tokenizer.begin
        if tokens[:len(begin)] != begin:
            tokens = begin + tokens
    if len(tokens) < 2:
        raise UserError(f"{path} holds {len(tokens)} token{'s' * (len(tokens) != 1)}, expected at least 2: the first is not "
                        "scored")
    started = time.perf_counter()
    loss = mean_loss(decoder, tokens)
    seconds = time.perf_counter() - started
    if not math.isfinite(loss):
        raise UserError(f"the loss on {path} is {loss}: {DAMAGED_WEIGHTS_HINT}")
    with np.errstate(over="ignore"):    # of a damaged model it may be infinite
        perplexity = np.exp(np.float64(loss))
    size = tokenizer.num_bytes(tokens[1:])
    bits = f" | {loss * (len(tokens) - 1) / size / math.log(2):.4f} bits per byte" if size else ""
    print(f"perplexity {perplexity:,.3f} | loss {loss:.5f} nats per token{bits} | {len(tokens) - 1:,} tokens of {path}")
    note(f"{(len(tokens) - 1) / seconds:,.1f} tok/s")


def complete(decoder: Decoder, tokenizer: Tokenizer, prompt: str, options, generators: list, speed: Speed) -> None:
    """Print the prompt and its continuation. With several samples, the first is streamed and the others follow."""
    tokens = tokenizer.prefix + encode(tokenizer, prompt, decoder.config) or tokenizer.begin or tokenizer.end_tokens[-1:]
    if not tokens:
        raise UserError("--prompt is empty, expected a text, because the model has no token that begins one", status=2)
    texts = [list(tokens) for _ in generators]
    heading = (lambda i: f"--- sample {i + 1} of {len(texts)} ---\n") if len(texts) > 1 else lambda i: ""
    print(heading(0) + prompt, end="", flush=True)
    written = write_texts(decoder, tokenizer, texts, generators, options, speed)
    print()
    for i in range(1, len(texts)):
        print(heading(i) + prompt + written[i])


def read_lines(prompt: str) -> Iterator[str]:
    """Yield the prompt, if there is one, and each line of standard input until it ends. What is not UTF-8 is left out."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, it gives `input` arrow keys and a history
    sys.stdin.reconfigure(errors="surrogateescape")
    if prompt:
        yield prompt
    while True:
        try:
            yield utf8(clean(input("> " if sys.stdin.isatty() else "")))
        except EOFError:
            return
        except ArgumentTypeError as error:
            note(f"this line is left out: {error}")
            print()


def converse(decoder: Decoder, tokenizer: Tokenizer, options, prompt: str, generators: list, speed: Speed) -> None:
    """Continue each of read_lines, given all text so far.

    A newline separates a reply from the next line. If a line ends with <|endoftext|>, this token separates the reply from the
    next line, as in DialoGPT (Zhang et al. 2020).
    """
    text, ends = [], tokenizer.end_tokens
    for line in read_lines(prompt):
        try:
            text += encode(tokenizer, "\n" + line if text and text[-1] not in ends else line, decoder.config)
        except UserError as error:
            note(f"this line is left out: {error}")
        else:
            text = text or list(tokenizer.begin)
            in_turns = text[-1:] == ends[:1]
            if text:
                write_texts(decoder, tokenizer, [text], generators, options, speed)
            print()
            if text and text[-1] in ends and not in_turns:
                text.pop()


def chat(decoder: Decoder, tokenizer: Tokenizer, options, prompt: str, generators: list, speed: Speed) -> None:
    """Reply to each of read_lines, in the form that the model's chat template gives to the conversation so far.

    Any special token ends a reply. What the text has in common with that of the last turn is still in the cache. If the
    conversation outgrows the context, its oldest turns are forgotten.
    """
    template, messages, text = ChatTemplate(tokenizer), [], []
    context = decoder.config.max_seq_len
    longest = context - min(options.max_new_tokens, context // 2)
    shortest = len(tokenizer.encode(template.text([{"role": "user", "content": ""}])))
    if shortest >= longest:
        raise UserError(f"the context of {context:,} tokens is too short for the chat template, which takes {shortest:,}; "
                        "raise --context-length or use another --model")
    for line in read_lines(prompt):
        turns = [*messages, {"role": "user", "content": line}]
        try:
            tokens = encode(tokenizer, template.text(turns), decoder.config)
            while len(tokens) > longest and len(turns) > 1:
                turns = turns[2:]
                tokens = encode(tokenizer, template.text(turns), decoder.config)
            if not 0 < len(tokens) <= longest:
                raise UserError(f"it has {len(tokens):,} tokens, expected 1 to {longest:,}")
        except UserError as error:
            note(f"this line is left out: {error}")
            continue
        if len(turns) <= len(messages):
            note("[context full: the oldest turns are forgotten]")
        messages = turns
        decoder.rewind(min(common_start(text, tokens), len(tokens) - 1))
        text = tokens
        [reply] = write_texts(decoder, tokenizer, [text], generators, options, speed, tokenizer.is_special)
        print()
        messages.append({"role": "assistant", "content": reply.strip()})


def read_prompt(options) -> str:
    """The prompt: --prompt, or standard input if it is a file or a pipe."""
    if options.prompt is not None or options.interactive or options.chat or options.perplexity or sys.stdin.isatty():
        return clean(options.prompt or "")
    return as_text("standard input", sys.stdin.buffer.read()).removesuffix("\n")


def run(decoder: Decoder, tokenizer: Tokenizer, prompt: str, options) -> None:
    """Do what the flags ask for: score a file, continue the prompt, or converse."""
    if options.perplexity:
        score(decoder, tokenizer, options.perplexity, options.model)
        return
    generators = [np.random.default_rng([options.seed, i]) for i in range(options.num_samples)]
    speed = Speed()
    if options.interactive or options.chat:
        reply = chat if options.chat else converse
        reply(decoder, tokenizer, options, prompt, generators, speed)
    else:
        complete(decoder, tokenizer, prompt, options, generators, speed)
    note(speed)


def load(definition: ModuleType, options, as_stored: Iterable = ()) -> tuple[Config, Tensors | SimpleNamespace, Tokenizer]:
    """The model and its tokenizer. Raises UserError if there is none, unless the model is to score a file.

    definition: the module that defines the program's models, gpt2 or llama

    as_stored: keys of BITS: weights of these kinds are not converted to float32, see load_model
    """
    path = find_model(options.model)
    check_definition(definition, path, "run")
    config, params = load_model(path, as_stored)
    tokenizer = load_model_tokenizer(path, config.vocab_size)
    if not options.perplexity:
        tokenizer.encode("text")
    if options.chat:
        ChatTemplate(tokenizer)
    return config, params, tokenizer


def check_cache_memory(config: Config, num_texts: int, more: int, memory: tuple | None, where: str, itemsize: int = 4) -> None:
    """Raise UserError if `more` bytes and the KV cache of num_texts texts do not fit in memory, see machine.check_memory."""
    cache = 2 * itemsize * config.num_layers * num_texts * config.max_seq_len * config.num_key_heads * config.head_size
    check_memory(f"generating {num_texts:,} texts", cache + more, memory, where, OUT_OF_MEMORY_HINT)


def main(definition: ModuleType = gpt2, decoder_class: type = Decoder):
    options = parse_options(
        definition, "CPU",
        quantize=dict(choices=["int8", "int4"], help="store weights in 8 or 4 bits, as GGUF's Q8_0 and Q4_0 do: smaller and "
                      "faster, and less exact; those that a .gguf file holds in as few bits are used as they are"),
        dtype=dict(choices=kernels.DTYPES, help="of weights that are not quantized, and of the factors in products of long "
                   "prompts (default: float32; for prompts of quantized models bfloat16, where the processor multiplies it "
                   "faster)"),
        context_length=dict(type=bounded(int, 1), help="tokens that the KV cache holds, at most the model's context (default: "
                            f"that, up to {LONGEST_CONTEXT:,})"),
        threads=dict(type=bounded(int, 1), help="CPU threads (default: all usable cores)"))
    threads = kernels.use_threads(options.threads)
    prompt = read_prompt(options)
    kind = options.quantize or options.dtype or "float32"
    config, params, tokenizer = load(definition, options, [stored for stored in BITS if BITS[stored] <= BITS[kind]])
    context = options.context_length or min(config.max_seq_len, LONGEST_CONTEXT)
    if context > config.max_seq_len:
        raise UserError(f"--context-length is {context:,}, expected at most {config.max_seq_len:,}, the context of --model "
                        f"{options.model}", status=2)
    config = replace(config, max_seq_len=context)
    rounds = kind != "float32" and "float32" in weight_kinds(params)
    num_params = sum(map(prod, definition.parameter_shapes(config).values()))
    check_cache_memory(config, options.num_samples, rounds * (BITS[kind] + 1) * num_params // 8, main_memory(), "this machine")
    if rounds:
        params = round_weights(config, params, kind)
    kinds = weight_kinds(params)
    dtype = options.dtype or prompt_dtype(kinds)
    if options.dtype == "bfloat16" and not HAS_BFLOAT16:
        note("this processor cannot multiply bfloat16: --dtype bfloat16 halves the memory of the weights, but saves no time")
    compile_kernels(config, kinds, dtype)
    run(decoder_class(config, params, options.num_samples, threads, dtype), tokenizer, prompt, options)


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT, output_required=True)
