"""Score a model on HellaSwag: how often does it rank the right one of four endings as the most likely?

    python dev/prepare_hellaswag.py                                       once: writes data/hellaswag_val.bin
    python dev/evaluate.py --model out
    python dev/evaluate.py --model gpt2 --device cuda --batch-size 64

The score is llm.c's acc_norm, defined in hellaswag.py. Guessing scores 0.25 and, according to llm.c's notes, GPT-2 124M 0.2955.
"""
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import generate_gpt2
import generate_gpt2_gpu
import generate_llama
import gpt2
import llama
from cli import OneLineParser, UserError, bounded, run_program
from device import open_device
from files import DATA_DIR
from gpt2 import chunks
from hellaswag import TokenLosses, count_correct, read_examples
from kernels_cpu import CLASSIFIER_ROWS, use_threads
from llama import definition_of
from model_files import find_model, load_model, load_model_tokenizer, stored_definition

OUT_OF_MEMORY_HINT = "choose a smaller --model or --batch-size"


def make_token_losses(decoder: generate_gpt2.Decoder | generate_gpt2_gpu.Decoder) -> TokenLosses:
    """Return the function token_losses that hellaswag.completion_losses needs, for a Decoder on any device."""
    def token_losses(tokens, targets):
        decoder.length = 0      # empties the KV cache
        rows, targets = decoder.forward(tokens), targets.reshape(-1)
        return np.concatenate([decoder.losses(rows[part], targets[part]) for part in chunks(len(rows), CLASSIFIER_ROWS)])
    return token_losses


def main():
    parser = OneLineParser(description="Score a model on HellaSwag.")
    add = parser.add_flag
    add("--model", required=True, help="a folder (Hugging Face's format, as train_gpt2.py writes it), a .safetensors file, an "
        "llm.c .bin, or a name on the Hugging Face hub: gpt2, gpt2-medium, distilgpt2, ...")
    add("--hellaswag", metavar="FILE", default=DATA_DIR / "hellaswag_val.bin", help="examples from dev/prepare_hellaswag.py")
    add("--device", default="cpu", help="cpu, cuda, or cuda:1 for the second GPU")
    add("--batch-size", default=4, type=bounded(int, 1), help="endings scored at once; an example has four")
    add("--threads", type=bounded(int, 1), help="CPU threads (default: one per core)")
    options = parser.parse_args()

    threads = use_threads(options.threads)
    device = None if options.device == "cpu" else open_device(options.device, "float32")
    if device and stored_definition(find_model(options.model)) is not gpt2:
        raise UserError(f"--model {options.model} is no GPT-2, and only a GPT-2 runs on a GPU; leave out --device")
    config, params = load_model(options.model)
    examples = read_examples(options.hellaswag, config.vocab_size, load_model_tokenizer(options.model, config.vocab_size))
    if device:
        decoder = generate_gpt2_gpu.Decoder(config, params, options.batch_size, device)
    else:
        generate_gpt2.compile_kernels(config)
        program = generate_llama if definition_of(config) is llama else generate_gpt2
        decoder = program.Decoder(config, params, options.batch_size, threads)

    started = time.perf_counter()
    correct = count_correct(make_token_losses(decoder), examples, options.batch_size, config.max_seq_len)
    seconds = time.perf_counter() - started
    n, accuracy = len(examples), correct / len(examples)
    standard_error = math.sqrt(accuracy * (1 - accuracy) / n)
    print(f"hellaswag | {accuracy:.4f} ({correct:,} of {n:,}) | standard error {standard_error:.4f} | "
          f"{n / seconds:,.1f} examples/s")
    too_long = sum(example.length > config.max_seq_len for example in examples)
    if too_long > 0:
        print(f"{too_long:,} examples are longer than the model's context, {config.max_seq_len:,} tokens; only their ends were "
              "read")


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
