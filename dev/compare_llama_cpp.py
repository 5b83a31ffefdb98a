"""Compare our GGUF files in llama.cpp and here: the ids of texts, greedy continuations and perplexities.

    mkdir node && (cd node && npm install node-llama-cpp@3.21.1)      # a prebuilt llama.cpp
    python dev/compare_llama_cpp.py --model out --text TEXT.txt --node node

The model is a GPT-2 or a Llama. Its file is written in every type. In float32, the ids and the 32 greedy ids must be equal; in
every type, the perplexities must agree to 0.5 %. They cannot be equal: llama.cpp's GELU and its KV cache have float16, and it
rounds activations to 8 bits where the weights have 4 or 8. The exit status is 1 if they differ.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

from cli import OneLineParser, UserError, bounded, run_program

import numpy as np

import generate_gpt2
import generate_llama
import gpt2
import kernels_cpu as kernels
import llama
from files import open_file
from generate_gpt2 import mean_loss
from gguf_files import FILE_TYPES, write_gguf
from llama import definition_of
from model_files import load_model, load_model_tokenizer

DECODERS = {gpt2: generate_gpt2.Decoder, llama: generate_llama.Decoder}
NEW_IDS = 32        # as many as compare_llama_cpp.mjs generates
PROMPT_IDS = 8
LONGEST_WINDOW = 128        # node-llama-cpp keeps the probabilities of all tokens at every place
BOUND = 0.005       # of the perplexities' relative difference
TEXTS = ["don't   I'LL\n\n<|endoftext|> naïve café\t\n ", "漢字 🙂 12345 $%&/\r\n", "\u00a0\u3000 q\x01\x7f", "<|endo> [PAD]"]


def main():
    parser = OneLineParser(description="Compare our GGUF files in llama.cpp and here.")
    parser.add_flag("--model", required=True, help="a model as generate_gpt2.py or generate_llama.py takes it")
    parser.add_flag("--text", required=True, type=Path, metavar="FILE", help="a text to score")
    parser.add_flag("--node", required=True, type=Path, metavar="FOLDER", help="where node-llama-cpp is installed")
    parser.add_flag("--windows", default=8, type=bounded(int, 1),
                    help=f"parts of the text to score, each of at most {LONGEST_WINDOW} tokens")
    options = parser.parse_args()
    kernels.use_threads(None)
    model = load_model(options.model)
    tokenizer = load_model_tokenizer(options.model, model[0].vocab_size)
    with open_file(options.text, "name a text") as file:
        ids = tokenizer.encode(file.read().decode())
    context = min(model[0].max_seq_len, LONGEST_WINDOW)
    if len(ids) <= options.windows * context:
        raise UserError(f"{options.text} has {len(ids):,} tokens, expected more than {options.windows * context:,} for "
                        f"--windows {options.windows}; choose fewer")
    windows = [ids[i * context:(i + 1) * context + 1] for i in range(options.windows)]
    task = {"prompt": ids[:PROMPT_IDS], "windows": windows, "texts": TEXTS}
    print(f"{'type':6} {'MB':>8} {'equal ids':>10} {'here':>12} {'llama.cpp':>12} {'difference':>11}")
    same = [compare(type, model, tokenizer, task, options.node) for type in FILE_TYPES]
    sys.exit(0 if all(same) else 1)


def compare(type, model, tokenizer, task, node):
    """Print a row of the table. Returns whether it is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, *model, tokenizer, type)
        size = path.stat().st_size
        config, params = load_model(path)
        llama_cpp = subprocess.run(["node", HERE.with_suffix(".mjs"), path], input=json.dumps(task).encode(), cwd=node,
                                   stdout=subprocess.PIPE, check=True)
    theirs = json.loads(llama_cpp.stdout)
    decoder = DECODERS[definition_of(config)](config, params, num_texts=1, threads=1)
    loss = np.mean([mean_loss(decoder, window) for window in task["windows"]])
    decoder.rewind(0)
    ids = list(task["prompt"])
    for _ in range(NEW_IDS):
        ids.append(int(decoder.next_logits([ids])[0].argmax()))
    equal = sum(ours == id for ours, id in zip(ids[PROMPT_IDS:], theirs["greedy"]))
    here, there = np.exp([loss, theirs["loss"]])
    difference = abs(here / there - 1)
    print(f"{type:6} {size / 1e6:8.1f} {equal:5} of {NEW_IDS} {here:12.3f} {there:12.3f} {difference:11.4%}", flush=True)
    same_texts = [tokenizer.encode(text) for text in task["texts"]] == theirs["ids"]
    return difference <= BOUND and (type != "f32" or same_texts and equal == NEW_IDS)


if __name__ == "__main__":
    run_program(main)
