"""Generating text with Llama: its decoder against float64 and the training program, and chat as a user meets it."""
import io
import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import generate_gpt2
import generate_llama
import gpt2
import kernels_float64 as exact
import train_gpt2
from cli import UserError
from chat import ChatTemplate, common_start
from dataloader import write_tokens
from generate_gpt2 import BITS, MEMORY_BOUND_ROWS, mean_loss, round_weights
from generate_llama import Decoder
from gpt2 import Tensors
from llama import Config, RopeScaling, parameter_shapes
from model_files import save_model
from test_checkpoint import TRAIN_LLAMA
from test_generate import SPEED, assert_close, bound_of_one_by_one, random_texts, read, stored_values
from test_model_files import assert_says
from tokenizer import NO_TOKENIZER, Tokenizer, tokenizer_from_files, train_tokenizer
from train_llama import Llama

THREADS = 2
GENERATE_LLAMA = SimpleNamespace(main=partial(generate_gpt2.main, **generate_llama.model_and_decoder),
                                 __file__=generate_llama.__file__, OUT_OF_MEMORY_HINT=generate_llama.OUT_OF_MEMORY_HINT)

# The smallest; odd sizes, with biases and one head of keys for three of queries; sizes that fill groups of 32, with a long
# context; and a head of keys for every head of queries
CONFIGS = {
    "smallest": Config(9, 2, 128, num_layers=1, num_heads=1, num_key_heads=1, head_size=2, channels=1, hidden=1),
    "odd": Config(21, 50, 64, num_layers=3, num_heads=3, num_key_heads=1, head_size=6, channels=7, hidden=11, rope_base=100.0,
                  epsilon=0.01, tied=False, qkv_bias=True),
    "groups": Config(40, 131, 256, num_layers=2, num_heads=4, num_key_heads=2, head_size=16, channels=32, hidden=96,
                     rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)),
    "untied": Config(12, 30, 128, num_layers=2, num_heads=2, num_key_heads=2, head_size=16, channels=32, hidden=32, tied=False),
}


def random_params(config, seed=0):
    """Large enough that attention is not uniform."""
    params = Tensors(parameter_shapes(config))
    generator = np.random.default_rng(seed)
    for name, tensor in params.items():
        scale = 0.3 if tensor.ndim < 3 or name in ("ln1w", "ln2w", "qkvb") else 2 / math.sqrt(tensor.shape[-1])
        tensor[...] = generator.normal(name in ("ln1w", "ln2w", "lnfw"), scale, tensor.shape)
    params.wte[config.vocab_size:] = params.headw[config.vocab_size:] = 0
    return params


def rotations(config):
    """cos and sin (maxT, HS/2), with the frequencies of Llama 3 by wavelength."""
    angles = np.empty((config.max_seq_len, config.head_size // 2))
    for i in range(config.head_size // 2):
        frequency = config.rope_base ** (-2 * i / config.head_size)
        if config.rope_scaling:
            factor, low, high, context = config.rope_scaling
            wavelength = 2 * math.pi / frequency
            if wavelength > context / low:
                frequency /= factor
            elif wavelength > context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency *= smooth + (1 - smooth) / factor
        angles[:, i] = frequency * np.arange(config.max_seq_len)
    return np.cos(angles), np.sin(angles)


def exact_logits(config, params, texts):
    """(B, T, V) in float64. params: names -> tensors, of a kind that indexing with a layer gives its weight"""
    texts = np.array(texts)
    (B, T), (cos, sin), NH, KV = texts.shape, rotations(config), config.num_heads, config.num_key_heads
    no_bias, epsilon = np.empty(0), config.epsilon
    residual = exact.encoder_forward(texts, params.wte, np.empty((0, 0)))
    for l in range(config.num_layers):
        ln1, _ = exact.rmsnorm_forward(residual, params.ln1w[l], epsilon)
        qkv = exact.matmul_forward(ln1, params.qkvw[l], params.qkvb[l])
        att, _ = exact.attention_forward(exact.rope(qkv, cos, sin, NH + KV, T, 0, 1), B, T, NH, KV)
        residual = residual + exact.matmul_forward(att, params.attprojw[l], no_bias)
        ln2, _ = exact.rmsnorm_forward(residual, params.ln2w[l], epsilon)
        swiglu = exact.swiglu_forward(exact.matmul_forward(ln2, params.fcw[l], no_bias))
        residual = residual + exact.matmul_forward(swiglu, params.fcprojw[l], no_bias)
    classifier = params.wte if config.tied else params.headw
    lnf, _ = exact.rmsnorm_forward(residual, params.lnfw, epsilon)
    return exact.matmul_forward(lnf, classifier[:config.vocab_size], no_bias).reshape(B, T, -1)


def with_stored_values(config, rounded):
    """What the compact weights of round_weights hold, as float64."""
    values = vars(rounded) | {name: [stored_values(weight) for weight in getattr(rounded, name)]
                              for name in generate_gpt2.LINEAR_WEIGHTS}
    values["wte"] = stored_values(rounded.wte)
    values["headw"] = stored_values(rounded.headw) if rounded.headw.size else rounded.headw
    return SimpleNamespace(**values)


# The decoder

@pytest.mark.parametrize("name, B", [("smallest", 3), ("odd", 1), ("odd", 3), ("groups", 3), ("untied", 1)])
def test_logits(name, B):
    """At every position, read one by one, a few at a time, at once, and in prompts: those of float64."""
    config = CONFIGS[name]
    T, params, texts = config.max_seq_len, random_params(config), random_texts(config, B, config.max_seq_len)
    expected = exact_logits(config, params, texts)
    model = Llama(config, B, T, THREADS)
    model.set_params(params)
    model.forward(np.array(texts, dtype=np.int32))
    trained = model.acts.lnf.astype(np.float64) @ model.classifier(params)[:config.vocab_size].T
    for parts in ([1] * T, [3] * (T // 3) + [1] * (T % 3), [T], [T // 2, 1, 1, T - T // 2 - 2]):
        actual = read(Decoder(config, params, B, THREADS), texts, parts)
        for t in range(T):
            assert_close(actual[:, t], expected[:, t])
    assert_close(trained.reshape(expected.shape), expected)
    assert name == "smallest" or len(np.unique(expected.argmax(axis=-1))) > 5


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("name", ["odd", "groups", "untied"])
def test_compact_weights(name, kind):
    """The logits are those of float64 with the numbers that the weights hold. Tensors of other rows stay float32."""
    config = CONFIGS[name]
    T, texts = config.max_seq_len, random_texts(config, 3, config.max_seq_len)
    rounded = round_weights(config, random_params(config), kind)
    expected = exact_logits(config, with_stored_values(config, rounded), texts)
    assert_close(read(Decoder(config, rounded, 3, THREADS), texts, [T]), expected)      # more than MEMORY_BOUND_ROWS
    assert_close(read(Decoder(config, rounded, 3, THREADS), texts, [1] * T), expected, 2 * bound_of_one_by_one(kind))
    assert 3 * T > MEMORY_BOUND_ROWS
    kinds = {"float32"} if kind == "float32" or name == "odd" and BITS[kind] < 16 else {kind}
    assert generate_gpt2.weight_kinds(rounded) == kinds


def test_rewinding():
    """To any earlier length, also past it: the cache is that of a decoder that never read the rest."""
    config = CONFIGS["groups"]
    params, text, other = random_params(config), *(random_texts(config, 1, 30, seed)[0] for seed in (0, 1))
    decoder = Decoder(config, params, 1, THREADS)
    for length in (20, 1, 0, 29, 40):
        decoder.rewind(0)
        decoder.next_logits([text])
        decoder.rewind(length)
        assert decoder.length == min(length, 30)
        changed = text[:length] + other
        fresh = Decoder(config, params, 1, THREADS)
        if length > 0:
            fresh.next_logits([text[:length]])
        for end in range(length + 1, min(length + 4, 40) + 1):
            assert_close(decoder.next_logits([changed[:end]]), fresh.next_logits([changed[:end]]))
    assert decoder.start == 0


def test_rewinding_after_the_context_was_full():
    config = CONFIGS["groups"]
    decoder = Decoder(config, params := random_params(config), 1, THREADS)
    text = random_texts(config, 1, 45)[0]
    decoder.next_logits([text[:40]])
    decoder.next_logits([text])
    assert decoder.start > 0
    decoder.rewind(3)       # the cache no longer begins with the text
    assert (decoder.start, decoder.length) == (0, 0)
    assert_close(decoder.next_logits([text[:6]]), exact_logits(config, params, [text[:6]])[:, -1])


def test_texts_that_outgrow_the_context():
    """The model sees the most recent half of it, from position 0, and then more until it is full again."""
    config, B = CONFIGS["odd"], 2
    T, params, texts = config.max_seq_len, random_params(config), random_texts(config, B, 50)
    decoder, start = Decoder(config, params, B, THREADS), 0
    for end in range(20, 46):
        if end - start > T:
            start = end - T // 2
        assert_close(decoder.next_logits([text[:end] for text in texts]),
                     exact_logits(config, params, [text[start:end] for text in texts])[:, -1])
    with pytest.raises(ValueError, match=r"tokens, expected at most 21"):
        decoder.forward(np.zeros((2, 21), dtype=np.int32))


def test_perplexity_of_an_untied_model():
    config = CONFIGS["odd"]
    params, tokens = random_params(config), random_texts(config, 1, 20)[0]
    logits = exact_logits(config, params, [tokens[:-1]])[0]
    expected = np.mean([np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, tokens[1:])])
    assert mean_loss(Decoder(config, params, 1, THREADS), tokens) == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates

TEMPLATE = """
{%- for message in messages -%}
    {{ '<|start|>' + message['role'] + '\n' + message.content + '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|start|>assistant\n' }}
{%- endif -%}
"""
WORDS = "the wind and the sea, the cat and the dog\nuser assistant "


def make_tokenizer(template=TEMPLATE, **settings):
    library = train_tokenizer([WORDS * 9], 290).to_library()
    library.add_special_tokens(["<|start|>", "<|end|>"])
    library.add_tokens(["<call>"])
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": template} | settings
    return tokenizer_from_files({"tokenizer.json": library.to_str().encode(),
                                 "tokenizer_config.json": json.dumps(settings).encode()}, {}, Path("here"), 300)


def says(template, **settings):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "wind"}]
    return ChatTemplate(make_tokenizer(template, **settings)).text(messages)


def test_a_template_is_rendered_as_transformers_does(monkeypatch):
    """White space, the special tokens, functions and filters that templates use, and what is not given."""
    assert says(TEMPLATE) == "<|start|>user\nHi<|end|>\n<|start|>assistant\nwind<|end|>\n<|start|>assistant\n"
    assert says("{% if true %}\na\n  {% endif %}\nb") == "a\nb"
    assert says("{{ bos_token }}{{ eos_token }}{{ pad_token }}.") == "<|start|><|end|>."
    assert says("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hi"}'
    assert says("{{ ['é<'] | tojson(indent=1) }}") == '[\n "é<"\n]'
    assert says("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}") == "Hi"
    assert re.fullmatch(r"\d{4}", says("{{ strftime_now('%Y') }}"))
    assert says("{{ tools is none }} {{ documents is none }} {{ 'x' if date_string is defined }}") == "True True "


@pytest.mark.parametrize("template", [
    "{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ undefined.name }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% for i in range(10**9) %}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{% include 'README.md' %}",
    "{{ strftime_now.__globals__['json'] }}", "{% set x = messages[0].update({'role': 1}) %}"])
def test_templates_that_fail_or_try_to_escape(template):
    with pytest.raises(UserError) as error:
        says(template)
    assert_says(str(error.value), "the model's chat template fails (", "put the model's own chat_template.jinja")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["{% for x in y %}", "{{ 'a }}", "{% unknown %}", "{{ a | no_such_filter }}",
                                      "{{" + 300 * "(" + ")" * 300 + "}}", 30 * "{% for x in y %}" + 30 * "{% endfor %}"])
def test_damaged_templates(template):
    with pytest.raises(UserError) as error:
        says(template)
    assert_says(str(error.value), "the model's chat template ", "put the model's own chat_template.jinja into its folder")


def test_where_templates_are():
    """In a file of their own before all, or in the settings, alone or as the default of several."""
    tokenizer = make_tokenizer("in the settings")
    assert tokenizer.chat_template == "in the settings"
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "the default"}, "junk"]
    assert make_tokenizer(several).chat_template == "the default"
    assert make_tokenizer(several[:1]).chat_template is None and make_tokenizer(5).chat_template is None
    files = tokenizer.files | {"chat_template.jinja": "in a file: é".encode()}
    assert tokenizer_from_files(files, {}, Path("here"), 300).chat_template == "in a file: é"
    assert NO_TOKENIZER.chat_template is None
    with pytest.raises(UserError, match="the model has no chat template, .*; put the model's own chat_template.jinja"):
        ChatTemplate(make_tokenizer(None))


def test_common_start():
    for first, second, expected in (([], [], 0), ([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1], [1, 2], 1),
                                    ([1, 2, 3], [1, 5, 3], 1), ([2], [1], 0)):
        assert common_start(first, second) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Special tokens

def test_special_tokens_of_chat_models():
    """The end of a message is not the end of a document, and a token of the user's is text."""
    tokenizer = make_tokenizer()
    start, end, call, separator = map(tokenizer.library.token_to_id, ("<|start|>", "<|end|>", "<call>", "<|endoftext|>"))
    assert [*map(tokenizer.is_special, (start, end, separator, call, 65, 10**6))] == [True, True, True, False, False, False]
    assert tokenizer.end_tokens == [end, separator] and tokenizer.end_of_text == separator
    assert tokenizer.begin == []
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    assert tokenizer.end_tokens == [separator] and tokenizer.begin == [start]
    assert Tokenizer({"eos_token_id": [7, 3], "bos_token_id": None}).end_tokens == [7, 3]
    assert Tokenizer({"eos_token_id": [7, 3]}).end_of_text == 7 and Tokenizer({"eos_token_id": [7, 3]}).begin == [7]
    assert Tokenizer({"bos_token_id": 5, "eos_token_id": 7}).begin == [5]
    assert [*map(Tokenizer({"eos_token_id": 7}).is_special, (7, 8))] == [True, False]
    assert NO_TOKENIZER.end_tokens == NO_TOKENIZER.begin == [] and NO_TOKENIZER.end_of_text is None


# ----------------------------------------------------------------------------------------------------------------------
# Chat

CHAT_CONFIG = replace(CONFIGS["groups"], max_seq_len=200, vocab_size=300, padded_vocab_size=384)


class Chat:
    """Chats with a model whose every sampled token is scripted, and watches what its decoder reads.

    replies: of the model, texts in which special tokens are written out; a token that is an exception is raised instead
    seen: (text so far, logits) of each sampled token
    read: the tokens of each call of the decoder, with the length of its cache before
    """

    def __init__(self, run_main, monkeypatch, folder):
        self.run_main, self.monkeypatch, self.folder = run_main, monkeypatch, folder
        self.tokenizer, self.params = make_tokenizer(), random_params(CHAT_CONFIG)
        save_model(folder, CHAT_CONFIG, self.params, self.tokenizer)

    def say(self, lines, replies, *flags):
        self.seen, self.read = [], []
        script = iter([token for reply in replies for token in (
            [reply] if isinstance(reply, BaseException) else self.tokenizer.encode(reply))])
        forward = Decoder.forward

        def sample(logits, text, *arguments, **sampling):
            self.seen.append((list(text), logits.copy()))
            token = next(script)
            if isinstance(token, BaseException):
                raise token
            return token

        def watched_forward(decoder, tokens):
            self.read.append((decoder.length, tokens[0].tolist()))
            return forward(decoder, tokens)

        with self.monkeypatch.context() as patches:
            patches.setattr(generate_gpt2, "sample", sample)
            patches.setattr(Decoder, "forward", watched_forward)
            patches.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
            finished = self.run_main(GENERATE_LLAMA, "--model", self.folder, "--chat", *flags)
        assert finished.status == 0 and next(script, None) is None, finished
        return finished

    def expected(self, *contents):
        """The tokens of a conversation up to where the model replies, by hand."""
        roles = ("user", "assistant")
        text = "".join(f"<|start|>{roles[i % 2]}\n{content}<|end|>\n" for i, content in enumerate(contents))
        return self.tokenizer.encode(text + "<|start|>assistant\n")

    def check_logits(self, config=CHAT_CONFIG):
        """Each sampled token came from the logits of the whole text before it."""
        for text, logits in self.seen:
            assert_close(logits, exact_logits(config, self.params, [text])[0, -1, :len(logits)])

    def prompts(self):
        """The texts before the first token of each reply."""
        return [text for i, (text, _) in enumerate(self.seen) if i == 0 or text[:-1] != self.seen[i - 1][0]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture
def conversation(run_main, monkeypatch, saved):
    return Chat(run_main, monkeypatch, saved)


def test_a_conversation(conversation):
    """The template gets all of it, replies without white space around them; special tokens end a reply and are not printed."""
    finished = conversation.say(["the wind", "and?", "sea"], [" the sea \n<|end|>", "<call>cat<|endoftext|>", "<|start|>"])
    assert finished.out == " the sea \n\n<call>cat\n\n"
    assert conversation.prompts() == [conversation.expected("the wind"), conversation.expected("the wind", "the sea", "and?"),
                                      conversation.expected("the wind", "the sea", "and?", "<call>cat", "sea")]
    conversation.check_logits()


def test_what_texts_have_in_common_is_read_once(conversation):
    """The KV cache holds the first message and the reply, except its last token, which the model did not read."""
    reply = "the sea and the dog"
    finished = conversation.say(["the wind", "and"], [reply + "<|end|>", "<|end|>"])
    first, second = conversation.prompts()
    old = first + conversation.tokenizer.encode(reply)
    assert second[:len(old)] == old         # the template gives back what was read and said
    new_turns = [(length, tokens) for length, tokens in conversation.read if len(tokens) > 1]
    assert new_turns == [(0, first), (len(old), second[len(old):])]
    assert SPEED.search(finished.err).group(1) == str(len(first) + len(second) - len(old))
    conversation.check_logits()


def test_a_reply_that_the_template_changes(conversation):
    """What it strips is forgotten by the cache, and nothing that comes before."""
    conversation.say(["the wind", "and"], ["  the sea  <|end|>", "<|end|>"])
    first, second = conversation.prompts()
    assert [length for length, tokens in conversation.read if len(tokens) > 1] == [0, len(first)]
    conversation.check_logits()


def test_the_same_conversation_again(conversation):
    """If everything is in the cache already, the last token is read again: its logits are needed."""
    conversation.monkeypatch.setattr(conversation, "tokenizer", fixed := make_tokenizer("<|start|>the wind"))
    save_model(conversation.folder, CHAT_CONFIG, conversation.params, fixed)
    conversation.say(["the", "wind"], ["<|end|>", "<|end|>"])
    tokens = fixed.encode("<|start|>the wind")
    assert conversation.read == [(0, tokens), (len(tokens) - 1, tokens[-1:])]
    conversation.check_logits()


@pytest.mark.parametrize("where", ["sampling", "before the forward pass", "after it"])
def test_ctrl_c_ends_a_reply(conversation, monkeypatch, where):
    """The partial reply stays in the history."""
    reply = "the sea and"
    count = len(conversation.tokenizer.encode(reply))
    if where == "sampling":
        replies = [reply, KeyboardInterrupt(), "cat<|end|>"]
    else:
        forward, replies = Decoder.forward, [reply, "cat<|end|>"]

        def interrupted(decoder, tokens):
            interrupted.calls += 1
            if interrupted.calls == count + 1 and where.startswith("before"):
                raise KeyboardInterrupt
            rows = forward(decoder, tokens)
            if interrupted.calls == count + 1:
                raise KeyboardInterrupt
            return rows
        interrupted.calls = 0
        monkeypatch.setattr(Decoder, "forward", interrupted)
    finished = conversation.say(["the wind", "why"], replies)
    assert finished.out == reply + "\ncat\n"
    assert conversation.prompts()[-1] == conversation.expected("the wind", reply, "why")
    conversation.check_logits()


def test_the_oldest_turns_are_forgotten(conversation):
    """When the conversation and the longest reply no longer fit in the context, which is a part of the model's."""
    flags = "--max-new-tokens", 40, "--context-length", 100
    lines = ["wind" + 19 * " wind", "the cat", "the dog", "sea", "the sea"]     # without the first alone, it would fit again
    replies = "sea", "wind", "cat", "dog", "sea"
    finished = conversation.say(lines, [f"{reply}<|end|>" for reply in replies], *flags)
    turns, expected, forgotten = [], [], set()
    for line, reply in zip(lines, replies):
        turns.append(line)
        while len(conversation.expected(*turns)) > 60:
            del turns[:2]
            forgotten.add(line)
        expected.append(conversation.expected(*turns))
        turns.append(reply)
    assert conversation.prompts() == expected
    assert finished.err.count("the oldest turns are forgotten") == len(forgotten)
    assert 0 < len(forgotten) and lines[-1] not in forgotten        # what is forgotten does not come back
    conversation.check_logits()


def test_a_line_that_is_too_long_is_left_out(conversation):
    """And nothing else is forgotten because of it."""
    finished = conversation.say(["the wind", "sea " * 200, "why"], ["sea<|end|>", "cat<|end|>"])
    assert_says(finished.err, "this line is left out: it has", "tokens, expected 1 to 100")
    assert conversation.prompts()[-1] == conversation.expected("the wind", "sea", "why")
    assert "forgotten" not in finished.err


def test_a_reply_longer_than_the_context(conversation):
    """The model continues from the most recent half of the context; the next message is prefilled from the start."""
    flags = "--context-length", 60, "--max-new-tokens", 100
    finished = conversation.say(["the sea", "why"], [100 * "x", "cat<|end|>"], *flags)
    assert "context full: from here on" in finished.err
    assert "the oldest turns are forgotten" in finished.err and conversation.prompts()[-1] == conversation.expected("why")
    text, logits = conversation.seen[-1]
    assert_close(logits, exact_logits(CHAT_CONFIG, conversation.params, [text])[0, -1, :len(logits)])


def test_a_refusal_is_one_line():
    with pytest.raises(UserError, match=r"^the model's chat template refuses it: only one\\nturn$"):
        says("{{ raise_exception('only one\nturn') }}")


def test_a_template_that_refuses_a_line(conversation):
    """Only that message is skipped."""
    refusing = "{% if messages[-1].content == 'no' %}{{ raise_exception('not so') }}{% endif %}" + TEMPLATE
    save_model(conversation.folder, CHAT_CONFIG, conversation.params, make_tokenizer(refusing))
    finished = conversation.say(["the wind", "no", "why"], ["sea<|end|>", "cat<|end|>"])
    assert_says(finished.err, "this line is left out: the model's chat template refuses it: not so")
    assert conversation.prompts()[-1] == conversation.expected("the wind", "sea", "why")


def test_a_prompt_is_the_first_line(conversation):
    finished = conversation.say(["why"], ["sea<|end|>", "cat<|end|>"], "--prompt", "the wind")
    assert finished.out == "sea\ncat\n"
    assert conversation.prompts()[-1] == conversation.expected("the wind", "sea", "why")


def test_chat_is_greedy_and_text_is_not():
    options = partial(generate_gpt2.parse_options, gpt2, "CPU")
    assert options(["--model", "m", "--chat"]).temperature == 0
    assert options(["--model", "m"]).temperature == generate_gpt2.TEMPERATURE > 0
    assert options(["--model", "m", "--chat", "--temperature", "0.3"]).temperature == 0.3


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a Llama with a tokenizer and no chat template, one with both, one without a tokenizer, and a GPT-2."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "llama", CHAT_CONFIG, random_params(CHAT_CONFIG), make_tokenizer(None))
    save_model(folder / "chat", CHAT_CONFIG, random_params(CHAT_CONFIG), make_tokenizer(TEMPLATE))
    save_model(folder / "silent", CHAT_CONFIG, random_params(CHAT_CONFIG))
    config = gpt2.Config(16, 300, 384, 1, 1, 4)
    save_model(folder / "gpt2", config, Tensors(gpt2.parameter_shapes(config)), make_tokenizer(None))
    return folder


def assert_fails(finished, status, *parts):
    assert finished.status == status and finished.err.count("\n") == 1, finished
    assert_says(finished.err, ": error: ", *parts)


GENERATING = {
    "a GPT-2": ("gpt2", (), 1, ("is a GPT-2, expected a Llama; run it with generate_gpt2.py",)),
    "no template": ("llama", ("--chat",), 1, ("the model has no chat template", "leave out --chat")),
    "no tokenizer": ("silent", (), 1, ("the model has no tokenizer", "tokenizer.json")),
    "no tokenizer to chat": ("silent", ("--chat",), 1, ("the model has no tokenizer", "tokenizer.json")),
    "context": ("llama", ("--context-length", 201), 2, ("--context-length is 201, expected at most 200, the context of",)),
    "context of the template": ("chat", ("--chat", "--context-length", 2), 1, ("context of 2 tokens is", "--context")),
    "no context": ("llama", ("--context-length", 0), 2, ("--context-length", "'0'", "at least 1")),
    "two ways": ("llama", ("--chat", "--interactive"), 2, ("--interactive and --chat", "expected one of them")),
    "samples": ("llama", ("--chat", "--num-samples", 2), 2, ("--num-samples is 2, expected 1 with --chat",)),
}


@pytest.mark.parametrize("model, flags, status, parts", GENERATING.values(), ids=GENERATING)
def test_generating(run_main, folders, monkeypatch, model, flags, status, parts):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the")))
    assert_fails(run_main(GENERATE_LLAMA, "--model", folders / model, *flags), status, *parts)


def test_a_llama_for_gpt2s_program(run_main, folders):
    finished = run_main(generate_gpt2, "--model", folders / "llama", "--prompt", "the")
    assert_fails(finished, 1, "is a Llama, expected a GPT-2; run it with generate_llama.py")


@pytest.mark.parametrize("program, model, parts", [
    (TRAIN_LLAMA, "gpt2", ("is a GPT-2, expected a Llama; train it with train_gpt2.py",)),
    (train_gpt2, "llama", ("is a Llama, expected a GPT-2; train it with train_llama.py",))])
def test_training_the_wrong_model(run_main, folders, tmp_path, program, model, parts):
    write_tokens(tmp_path / "tokens.bin", range(99))
    finished = run_main(program, "--model", folders / model, "--input-bin", tmp_path / "tokens.bin", "--sequence-length", 8,
                        "--batch-size", 1, "--output-dir", tmp_path / "out")
    assert_fails(finished, 1, *parts)
