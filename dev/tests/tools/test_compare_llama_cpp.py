"""compare_llama_cpp.py with a stand-in for llama.cpp, which finds what our decoders find, or something else."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

import generate_gpt2
import generate_llama
import gpt2
import llama
from dev import compare_llama_cpp
from dev.compare_llama_cpp import NEW_IDS, PROMPT_IDS
from gpt2 import Tensors
from llama import definition_of
from tokenizer import train_tokenizer

GPT2 = gpt2.Config(max_seq_len=48, vocab_size=300, padded_vocab_size=384, num_layers=2, num_heads=2, channels=64)
LLAMA = llama.Config(max_seq_len=48, vocab_size=300, padded_vocab_size=384, num_layers=2, num_heads=4, num_key_heads=2,
                     head_size=16, channels=64, hidden=96)


@pytest.mark.parametrize("config, program", [(GPT2, generate_gpt2), (LLAMA, generate_llama)])
def test_a_difference_is_found(monkeypatch, capsys, config, program):
    params, tokenizer = Tensors(definition_of(config).parameter_shapes(config)), train_tokenizer([9 * "wind and sea "], 280)
    params.flat[:] = np.random.default_rng(0).normal(0, 0.2, params.size)
    ids = list(range(40))
    task = {"prompt": ids[:PROMPT_IDS], "windows": [ids], "texts": ["The sea"]}
    decoder = program.Decoder(config, params, num_texts=1, threads=1)
    text, loss = list(task["prompt"]), generate_gpt2.mean_loss(decoder, ids)
    decoder.rewind(0)
    for _ in range(NEW_IDS):
        text.append(int(decoder.next_logits([text])[0].argmax()))

    def same(**other):
        found = dict(greedy=text[PROMPT_IDS:], loss=loss, ids=[tokenizer.encode("The sea")]) | other
        monkeypatch.setattr(compare_llama_cpp.subprocess, "run", lambda *command, **settings: SimpleNamespace(
            stdout=json.dumps(found)))
        return compare_llama_cpp.compare("f32", (config, params), tokenizer, task, node=None)

    assert same() and not same(greedy=text[PROMPT_IDS:-1] + [-1])
    assert not same(loss=loss + 0.006) and not same(loss=np.nan) and not same(ids=[[0]])
    assert capsys.readouterr().out.count("32 of 32") == 4
