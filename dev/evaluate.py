"""Score a model on HellaSwag: how often it finds the right one of four endings the most likely.

    python dev/prepare_hellaswag.py                                       once: writes data/hellaswag_val.bin
    python dev/evaluate.py --model out
    python dev/evaluate.py --model gpt2 --device cuda --batch-size 64

The score is llm.c's acc_norm; hellaswag.py says how it is computed. Guessing scores 0.25, GPT-2 124M 0.2955 by llm.c's notes.
"""
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import generate_gpt2
import generate_gpt2_gpu
import kernels_cpu
from model_files import load_model
from device import open_device
from cli import OneLineParser, bounded, run_program
from files import DATA_DIR
from generate_gpt2 import CLASSIFIER_ROWS
from gpt2 import chunks
from hellaswag import count_correct, read_examples

OUT_OF_MEMORY_HINT = "choose a smaller --model or --batch-size"


def token_losses_of(decoder):
    """The function token_losses of hellaswag.completion_losses for a Decoder, on whichever device it is."""
    def token_losses(tokens, targets):
        decoder.length = 0      # it forgets the batch before
        rows, targets = decoder.forward(tokens), targets.reshape(-1)
        return np.concatenate([decoder.losses(rows[part], targets[part]) for part in chunks(len(rows), CLASSIFIER_ROWS)])
    return token_losses


def main():
    parser = OneLineParser(description="Score a model on HellaSwag.")
    add = parser.add_flag
    add("--model", required=True, help="a folder as Hugging Face's or as train_gpt2.py leaves it, a .safetensors file, llm.c's "
        ".bin, or a name on the Hugging Face hub: gpt2, gpt2-medium, distilgpt2, ...")
    add("--hellaswag", metavar="FILE", default=DATA_DIR / "hellaswag_val.bin", help="examples from dev/prepare_hellaswag.py")
    add("--device", default="cpu", help="cpu, cuda, or cuda:1 for the second GPU")
    add("--batch-size", default=4, type=bounded(int, 1), help="endings to score at once, of which each example has four")
    add("--threads", type=bounded(int, 1), help="CPU threads (default: one for each core)")
    options = parser.parse_args()

    threads = kernels_cpu.use_threads(options.threads)
    device = None if options.device == "cpu" else open_device(options.device, "float32")
    config, params = load_model(options.model)
    examples = read_examples(options.hellaswag, config.vocab_size)
    if device:
        decoder = generate_gpt2_gpu.Decoder(config, params, options.batch_size, device)
    else:
        generate_gpt2.compile_kernels()
        decoder = generate_gpt2.Decoder(config, params, options.batch_size, threads)

    started = time.perf_counter()
    correct = count_correct(token_losses_of(decoder), examples, options.batch_size, config.max_seq_len)
    seconds = time.perf_counter() - started
    n, accuracy = len(examples), correct / len(examples)
    standard_error = math.sqrt(accuracy * (1 - accuracy) / n)
    print(f"hellaswag | {accuracy:.4f} ({correct:,} of {n:,}) | standard error {standard_error:.4f} | "
          f"{n / seconds:,.1f} examples/s")
    too_long = sum(example.length > config.max_seq_len for example in examples)
    if too_long > 0:
        print(f"{too_long:,} examples are longer than the model's context, {config.max_seq_len:,} tokens: it read their end")


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
