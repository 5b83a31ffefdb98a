"""draw_step.py: the pages of a step, of GPT-2 and of Llama, show the program's own calls and sizes, and are up to date."""
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from PIL import Image

from dev import draw_step
from dev.draw_step import GPT2, LLAMA
from dev.recorder import Call, record_step, tiny, tiny_step

MODELS = pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])


class Card(NamedTuple):
    """One call on the page."""
    column: tuple
    y: float
    call: Call
    words: str


@pytest.fixture(scope="module")
def calls():
    """By the model's name: the calls of a step of the tiny model."""
    return {model.name: record_step(*tiny_step(tiny(model.config)))[0] for model in (GPT2, LLAMA)}


@pytest.fixture(scope="module")
def pages(calls, tmp_path_factory):
    """By the model's name: the page, with its cards and all its texts."""
    return {model.name: drawn(draw_step.Step(calls[model.name], model), tmp_path_factory.mktemp("page"))
            for model in (GPT2, LLAMA)}


def drawn(step, folder):
    found = SimpleNamespace(cards=[], texts=[])
    text, card = draw_step.Page.text, draw_step.Page.card

    def noting_text(page, x, y, words, *arguments, **settings):
        found.texts.append(words)
        text(page, x, y, words, *arguments, **settings)

    def noting_card(page, column, y, call, times=1):
        before = len(found.texts)
        card(page, column, y, call, times)
        found.cards.append(Card(column, y, call, " ".join(found.texts[before:])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_step.Page, "text", noting_text)
        patch.setattr(draw_step.Page, "card", noting_card)
        draw_step.draw(step, folder / "step.png")
    return found


def description(path):
    """The text `Description` in a PNG: the calls and sizes that it shows."""
    with Image.open(path) as picture:
        return picture.text["Description"]


def test_pages_are_todays(run_main, tmp_path):
    """If this fails, the kernels are called differently since the pages were drawn: run python dev/draw_step.py."""
    finished = run_main(draw_step, "--output", tmp_path / "step.png")
    assert finished.status == 0
    for name, page in (("step.png", "training_step.png"), ("step_llama.png", "training_step_llama.png")):
        assert f"wrote {tmp_path / name}\n" in finished.out
        assert description(tmp_path / name) == description(draw_step.PICTURE.with_name(page)), page


def cards_in(column, page):
    """Its cards, from top to bottom."""
    return sorted((card for card in page.cards if card.column == column), key=lambda card: card.y)


@pytest.mark.parametrize("model, forward, backward", [(GPT2, 10, 8), (LLAMA, 11, 9)], ids=["gpt2", "llama"])
def test_calls_of_the_page_are_in_order(pages, calls, model, forward, backward):
    """The forward pass runs down the left side, the backward pass and the update up the right side."""
    page, calls = pages[model.name], calls[model.name]
    turn = [call.kernel for call in calls].index("fused_classifier")
    first_of_update = [call.phase for call in calls].index("update")
    shown = [[call for call in part if call.layer in (None, draw_step.LAYER)]
             for part in (calls[:turn], calls[turn + 1:first_of_update])]
    left, right = ([card.call for card in cards_in(column, page)] for column in (draw_step.LEFT, draw_step.RIGHT))
    assert left == shown[0] and len(left) == 1 + forward + 2
    assert [call.kernel for call in right[:2]] == ["adamw_update", "global_norm"]
    assert right[2:] == shown[1][::-1] and len(right[2:]) == 1 + backward + 2
    assert [card.call.kernel for card in page.cards if card.column not in (draw_step.LEFT, draw_step.RIGHT)] == [
        "fused_classifier"]


@MODELS
def test_backward_calls_face_their_forward_calls(pages, model):
    facing = {card.y: card.call.kernel for card in cards_in(draw_step.LEFT, pages[model.name])}
    for card in cards_in(draw_step.RIGHT, pages[model.name])[2:]:
        assert facing.pop(card.y) == card.call.kernel.replace("_backward", "_forward")
    assert [*facing.values()] == 2 * ["residual_forward"]


# One card of each kind: tensors of a layer, of the layer before, of the last; overwritten, accumulated, changed in place.
@pytest.mark.parametrize("model, words", [
    (GPT2, "layernorm_forward writes ln1 ln1_mean ln1_rstd reads residual3[l-1] ln1w ln1b"),
    (GPT2, "layernorm_backward writes +dresidual +grads.ln1w +grads.ln1b reads dln ln1_mean ln1_rstd residual3[l-1] ln1w"),
    (GPT2, "gelu_backward writes +dfch reads fch"),
    (GPT2, "layernorm_forward writes lnf lnf_mean lnf_rstd reads residual3[L-1] lnfw lnfb"),
    (GPT2, "fused_classifier writes losses +logits reads targets"),
    (GPT2, "adamw_update for each of 16 tensors writes +params +grads +adam_m +adam_v"),
    (LLAMA, "rmsnorm_backward writes +dresidual +grads.ln1w reads dln ln1_rstd residual3[l-1] ln1w"),
    (LLAMA, "rope sign = 1 writes +qkv reads cos sin"),
    (LLAMA, "rope sign = -1 writes +dqkv reads cos sin"),
    (LLAMA, "swiglu_backward writes dfch reads dfch_swiglu fch"),
    (LLAMA, "encoder_backward writes +grads.wte reads dresidual tokens"),
    (LLAMA, "adamw_update for each of 8 tensors writes +params +grads +adam_m +adam_v"),
])
def test_cards_say_what_a_kernel_writes_and_reads(pages, model, words):
    assert [card.words for card in pages[model.name].cards].count(words) == 1


@pytest.mark.parametrize("model, total, sizes", [
    (GPT2, "4.68 GB", [("qkv", "453 MB"), ("fch", "604 MB"), ("params", "498 MB"), ("acts", "2.44 GB"), ("scratch", "241 MB")]),
    (LLAMA, "4.34 GB", [("qkv", "252 MB"), ("252 MB", "12 heads of q, 4 of k, 4 of v"), ("fch", "805 MB"),
                        ("805 MB", "2048 gates, then 2048 values"), ("params", "457 MB"), ("acts", "2.24 GB"),
                        ("scratch", "275 MB")]),
], ids=["gpt2", "llama"])
def test_sizes_on_the_page_are_those_of_the_model(pages, model, total, sizes):
    texts = pages[model.name].texts
    for name, size in sizes:
        assert (name, size) in zip(texts, texts[1:]), name
    assert f"memory: {total}" in texts and "L = 12; for l = 0, residual3[l-1] is encoded" in " ".join(texts)


@pytest.mark.parametrize("model, writer_of_qkv", [(GPT2, "matmul_forward"), (LLAMA, "rope")], ids=["gpt2", "llama"])
def test_activations_are_beside_the_call_that_leaves_them(pages, model, writer_of_qkv):
    """All except the losses are kept for the backward pass. Llama's qkv is complete only after rope."""
    page, kept, kernel = pages[model.name], {}, None
    names, kernels = model.definition.activation_shapes(model.config, 1, 1), {card.call.kernel for card in page.cards}
    for words, following in zip(page.texts, page.texts[1:]):
        kernel = words if words in kernels else kernel
        if words in names and following.endswith("B"):
            assert words not in kept
            kept[words] = kernel
    assert [*kept] == [name for name in names if name != "losses"]
    assert kept["qkv"] == writer_of_qkv and kept["att_lse"] == "attention_forward" and kept["residual3"] == "residual_forward"


def without(calls, kernel):
    """The calls without the first one of a kernel."""
    first = [call.kernel for call in calls].index(kernel)
    return [*calls[:first], *calls[first + 1:]]


def with_another_array(calls, text, name):
    """The calls, with another last array of the call that reads `text`."""
    assert text in map(str, calls)
    return [call._replace(arrays=[*call.arrays[:-1], call.arrays[-1]._replace(name=name)]) if str(call) == text else call
            for call in calls]


@pytest.mark.parametrize("model, broken", [
    (GPT2, lambda calls: without(calls, "gelu_backward")),
    (GPT2, lambda calls: without(calls, "residual_forward")),
    (GPT2, lambda calls: [call for call in calls if call.layer != 0]),
    (GPT2, lambda calls: [call._replace(kernel="gelu_backward") if call.kernel == "attention_backward" else call
                          for call in calls]),
    (GPT2, lambda calls: with_another_array(calls, "fch_gelu[2] = gelu_forward(fch[2])", "fch_gelu")),
    (LLAMA, lambda calls: [call for call in calls if call.kernel != "rope" or call.sign == 1]),
    (LLAMA, lambda calls: with_another_array(calls, "fch_swiglu[2] = swiglu_forward(fch[2])", "fch_swiglu")),
], ids=["backward missing", "residual missing", "layer missing", "another kernel", "another array", "not rotated back",
        "another array of llama"])
def test_page_is_not_drawn_if_passes_do_not_mirror(calls, model, broken):
    draw_step.Step(calls[model.name], model)
    with pytest.raises(ValueError):
        draw_step.Step(broken(calls[model.name]), model)
