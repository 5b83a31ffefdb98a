"""
The pages of dev/derivations: their code, arithmetic, gradients, names, quotations and links are checked against the program.

    python -m pytest dev/tests/test_derivations.py

Lines that begin with >>> are run as doctests. Every other block of Python or C++ must occur in the program verbatim. In
`a sum = its result` and `a number ≈ another` both sides are evaluated and compared.
"""
import doctest
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import gpt2
import kernels_cpu
import kernels_float64 as exact
import kernels_gpu
import llama
import train_gpt2
import train_llama
from dev import figures
from launcher import parse_signatures
from test_kernels import finite_differences, relative_error

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(figures.PAGES.glob("*.md"))
LAYERS = [page for page in PAGES if page.name != "README.md"]
FENCED = re.compile(r"^```([\w+]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
MATH = re.compile(r"\$([^$\n]+)\$")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, *languages):
    return [body for language, body in FENCED.findall(text_of(page)) if language in languages]


def examples(page):
    return "\n".join(blocks(page, "pycon"))


def quotations(page):
    return blocks(page, "python", "c++")


def prose(page):
    """A page without its blocks of code and formulas."""
    return FENCED.sub("", text_of(page))


@cache
def run(page):
    """Run a page's examples as doctests. Returns the variables they define, and a report of the failures."""
    only_code = FENCED.sub(lambda block: block[2] if block[1] == "pycon" else
                           "\n" * block[0].count("\n"), text_of(page))
    test = doctest.DocTestParser().get_doctest(only_code, {}, page.name, str(page), 0)
    report = []
    with np.printoptions():
        doctest.DocTestRunner(verbose=False).run(test, out=report.append, clear_globs=False)
    return test.globs, "".join(report)


# ----------------------------------------------------------------------------------------------------------------------
# Code, arithmetic and formulas

@every_page
def test_example_prints_what_the_page_says(page):
    _, failures = run(page)
    assert not failures, failures


def lines_of(text):
    """The lines of a text, without indentation and with single spaces."""
    return [" ".join(line.split()) for line in text.split("\n")]


@every_page
def test_quotations_are_in_the_program(page):
    lines = {path.name: lines_of(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}
    for body in quotations(page):
        wanted = lines_of(body.strip())
        assert any(wanted == there[i:i + len(wanted)] for there in lines.values() for i in range(len(there))), body


def value(expression):
    """The value of an arithmetic expression; None for anything else."""
    functions = {name: getattr(math, name) for name in ("sqrt", "exp", "log", "pi")}
    words = set(re.findall(r"[A-Za-z_]\w*", expression))
    if not expression.strip() or not words <= functions.keys():
        return None
    return float(eval(expression, {"__builtins__": {}}, functions))


def sums(page):
    """(span, values of its sides, decimals of the last side) for every `... = ...` and `... ≈ ...` that is arithmetic."""
    for span in SPAN.findall(prose(page)):
        sides = re.split(r" [=≈] ", span)
        if len(sides) > 1 and all(value(side) is not None for side in sides):
            decimals = len(sides[-1].partition(".")[2])
            yield span, [value(side) for side in sides], decimals


def test_sums_in_the_text_are_right():
    found = 0
    for page in PAGES:
        for span, sides, decimals in sums(page):
            bound = 0.5 * 10**-decimals if "≈" in span else 1e-9
            assert all(abs(side - sides[-1]) <= bound for side in sides), f"{page.name}: {span}"
            found += 1
    assert found >= 40


FORBIDDEN = {
    r"\\(?:unicode|operatorname|newcommand|def|require|href|class|style|label|tag)\b": "GitHub rejects it",
    r"\\(?:text|mathrm|mathsf)\{[^}]*_": "an underscore in text is an error",
}
FORBIDDEN_INLINE = {
    r"\\[^A-Za-z]": "Markdown removes the backslash",
    r"\*|[^A-Za-z0-9]_": "Markdown may read it as emphasis",
    r"[<|]": "Markdown reads HTML or a table",
}


@every_page
def test_formulas_survive_markdown(page):
    """GitHub would show them as plain text, or not at all."""
    inline = MATH.findall(SPAN.sub("", prose(page)))
    for formula in blocks(page, "math") + inline:
        assert formula.count("{") == formula.count("}"), formula
        for pattern, reason in {**FORBIDDEN, **(FORBIDDEN_INLINE if formula in inline else {})}.items():
            assert not re.search(pattern, formula), f"{page.name}: {formula}: {reason}"


@every_page
def test_every_block_names_its_language(page):
    """Without one, formulas would not be rendered and examples not be run."""
    for body in blocks(page, ""):
        assert "\\" not in body and ">>>" not in body, body


def test_model_in_fifteen_lines():
    """Run without their remarks, they compute what train_gpt2.py computes, under the same names."""
    [lines] = [body for body in blocks(figures.PAGES / "README.md", "") if "in each of L blocks:" in body]
    lines = re.sub(r"(?<=\S) {3,}\w.*$", "", lines, flags=re.MULTILINE).replace("in each of L blocks:", "for l in range(L):")
    assert len([line for line in lines.split("\n") if line.strip()]) == 15

    B, T, config = 2, 5, gpt2.Config(8, 50, 128, num_layers=3, num_heads=2, channels=8)
    model = train_gpt2.GPT2(config, B, T, threads=1)
    model.params.flat[...] = np.random.default_rng(0).normal(0, 0.3, model.params.size)
    model.params.wte[50:] = 0
    tokens, targets = np.random.default_rng(1).integers(50, size=(2, B, T), dtype=np.int32)
    model.forward(tokens)
    model.loss(targets)

    p, L = model.params, config.num_layers
    weights = iter([(matrix[l], bias[l]) for l in range(L) for matrix, bias in (
        (p.qkvw, p.qkvb), (p.attprojw, p.attprojb), (p.fcw, p.fcb), (p.fcprojw, p.fcprojb))])
    scales = iter([*((scale[l], shift[l]) for l in range(L) for scale, shift in ((p.ln1w, p.ln1b), (p.ln2w, p.ln2b))),
                   (p.lnfw, p.lnfb)])
    names = dict(
        wte=p.wte[:50].astype(np.float64), wpe=p.wpe.astype(np.float64), L=L, range=range, log=np.log, gelu=exact.gelu_forward,
        token=tokens.reshape(-1), position=np.tile(np.arange(T), B), target=(np.arange(B * T), targets.reshape(-1)),
        linear=lambda inp: exact.matmul_forward(inp, *next(weights)),
        layernorm=lambda inp: exact.layernorm_forward(inp, *next(scales))[0],
        attention=lambda qkv: exact.attention_forward(qkv, B, T, config.num_heads)[0],
        softmax=lambda logits: np.array([exact.softmax(row) for row in logits]))
    exec(lines, names)
    assert next(weights, None) is next(scales, None) is None
    for name in ("ln1", "qkv", "att", "residual2", "ln2", "fch", "fch_gelu", "residual3"):
        assert relative_error(getattr(model.acts, name)[-1], names[name]) <= 1e-5, name
    for name in ("encoded", "lnf"):
        assert relative_error(getattr(model.acts, name), names[name]) <= 1e-5, name
    assert relative_error(model.acts.losses, names["loss"]) <= 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# The examples' gradients, against float64 and finite differences

# page -> (forward kernel, its inputs, the differentiable ones), named as on the page and in kernels_float64
GRADIENTS = {
    "matmul": ("matmul_forward", ("inp", "weight", "bias"), ("inp", "weight", "bias")),
    "gelu": ("gelu_forward", ("inp",), ("inp",)),
    "layernorm": ("layernorm_forward", ("inp", "weight", "bias"), ("inp", "weight", "bias")),
    "encoder": ("encoder_forward", ("tokens", "wte", "wpe"), ("wte", "wpe")),
    "attention": ("attention_forward", ("qkv", "B", "T", "NH"), ("qkv",)),
    "rmsnorm": ("rmsnorm_forward", ("inp", "weight", "epsilon"), ("inp", "weight")),
    "rope": ("rope", ("rows", "cos", "sin", "heads", "T", "position", "sign"), ("rows",)),
    "swiglu": ("swiglu_forward", ("inp",), ("inp",)),
    "grouped_query": ("attention_forward", ("qkv", "B", "T", "NH", "KV"), ("qkv",)),
}
MORE_INPUTS = {      # sizes of the examples, where the page does not name them or later gives the names to others
    "attention": dict(B=1, T=2, NH=1),
    "rope": dict(heads=2, T=3, position=0, sign=1),
    "grouped_query": dict(B=1, T=2, NH=2, KV=1),
}


@pytest.mark.parametrize("layer", GRADIENTS)
def test_gradients_of_the_examples(layer):
    """The page's `out`, and the gradient d<input> of each differentiable input for the page's `dout`."""
    names, _ = run(figures.PAGES / f"{layer}.md")
    forward, inputs, differentiable = GRADIENTS[layer]
    names = names | MORE_INPUTS.get(layer, {})
    arguments = {name: names[name] for name in inputs}

    def out(**changed):
        result = getattr(exact, forward)(**arguments | changed)
        return result[0] if isinstance(result, tuple) else result

    np.testing.assert_allclose(names["out"], out(), rtol=1e-5, atol=1e-6)
    for name in differentiable:
        expected = finite_differences(lambda x, name=name: np.sum(out(**{name: x}) * names["dout"]), arguments[name])
        np.testing.assert_allclose(names["d" + name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_gradients_of_the_classifier():
    names, _ = run(figures.PAGES / "classifier.md")
    logits, targets, dloss, V = (names[name] for name in ("logits", "targets", "dloss", "vocab_size"))
    losses, dlogits = exact.fused_classifier(logits, targets, dloss, V)
    np.testing.assert_allclose(names["losses"], losses, rtol=1e-6)
    np.testing.assert_allclose(names["dlogits"], dlogits, rtol=1e-6)
    expected = finite_differences(lambda x: dloss * exact.fused_classifier(x, targets, dloss, V)[0].sum(), logits)
    np.testing.assert_allclose(names["dlogits"], expected, atol=1e-6)


def test_gradients_of_the_residual_stream():
    names, _ = run(figures.PAGES / "residual.md")
    a, b = names["a"], names["b"]

    def stream(inp):
        middle = exact.residual_forward(inp, a * inp)
        return exact.residual_forward(middle, b * middle)

    np.testing.assert_array_equal(names["out"], stream(names["inp"]))
    expected = finite_differences(lambda x: stream(x).sum(), names["inp"])
    np.testing.assert_allclose(names["dresidual"], expected, rtol=1e-8)


def test_gradients_of_tied_weights():
    """The gradients of a loss that uses wte twice."""
    names, _ = run(figures.PAGES / "weight_tying.md")

    def loss(wte, wpe):
        row = exact.encoder_forward(names["tokens"], wte, wpe)
        return exact.fused_classifier(exact.matmul_forward(row, wte, names["no_bias"]), names["targets"], 1.0, 2)[0].sum()

    wte, wpe = names["wte"], names["wpe"]
    np.testing.assert_allclose(names["losses"], loss(wte, wpe), rtol=1e-6)
    np.testing.assert_allclose(names["dwte"], finite_differences(lambda x: loss(x, wpe), wte), atol=1e-6)
    np.testing.assert_allclose(names["dwpe"], finite_differences(lambda x: loss(wte, x), wpe), atol=1e-6)


def test_steps_of_adamw():
    names, _ = run(figures.PAGES / "adamw.md")
    params, m, v = np.array([2.0]), np.zeros(1), np.zeros(1)
    for step in (1, 2, 3):
        params, m, v = exact.adamw_update(params, np.array([3.0]), m, v, names["learning_rate"], train_gpt2.BETA1,
                                          train_gpt2.BETA2, names["eps"], names["weight_decay"], names["grad_scale"], step)
    np.testing.assert_allclose([names["params"], names["m"], names["v"]], [params, m, v], rtol=1e-6)


def test_clipped_gradient_is_the_nearest():
    """Of a grid of vectors no longer than the limit, in all directions, none is nearer to the gradient."""
    names, _ = run(figures.PAGES / "clipping.md")
    clipped, grads, limit = names["grad_scale"] * names["grads"], names["grads"], names["grad_clip"]
    assert np.linalg.norm(clipped) == pytest.approx(limit)
    angles, lengths = np.meshgrid(np.linspace(0, 2 * np.pi, 1000), np.linspace(0, limit, 100))
    others = lengths[..., None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    assert np.linalg.norm(clipped - grads) <= np.linalg.norm(others - grads, axis=-1).min() + 1e-6


def test_costs_are_those_of_a_step():
    """The FLOPs of the matrix products sum to those of training_flops, and every kernel of a step has a cost."""
    costs = figures.page_costs()
    linear, _ = gpt2.training_flops(gpt2.model_config("d12"), 4, 1024)
    assert sum(calls * flops for call, (calls, flops, _) in costs.items() if call.startswith("matmul")) == linear
    kernels_of_a_step = {call.partition(",")[0] for call, (calls, _, _) in costs.items() if calls > 0}
    training = set(kernels_cpu.training_kernels(gpt2.model_config("d12").layers))
    assert kernels_of_a_step == {kernel.__name__ for kernel in training}


def counted_calls(monkeypatch, make_model):
    """Kernel -> its calls in a step of a model with 12 layers and 8 chunks of the classifier, as in 124M at B=4 T=1024."""
    calls = {}

    def counting(name, kernel):
        def call(*arguments):
            calls[name] = calls.get(name, 0) + 1
            return kernel(*arguments)
        return call

    for name in cpu_kernels():
        monkeypatch.setattr(kernels_cpu, name, counting(name, getattr(kernels_cpu, name)))
    monkeypatch.setattr(train_gpt2, "CLASSIFIER_ROWS", 1)
    monkeypatch.setattr(train_llama, "CLASSIFIER_ROWS", 1)
    model, tokens = make_model(), np.zeros((1, 8), dtype=np.int32)
    model.forward(tokens)
    model.backward(tokens)
    assert model.gradient_norm() >= 0
    return calls


def test_counted_calls_are_those_of_the_program(monkeypatch):
    """`calls` of every `cost`. The program updates tensor by tensor; the page counts all parameters as one call."""
    expected = {"adamw_update": -1}
    for call, (count, _, _) in figures.page_costs().items():
        name = call.partition(",")[0]
        expected[name] = expected.get(name, 0) + count
    config = gpt2.Config(8, 128, 128, num_layers=12, num_heads=1, channels=1)
    calls = counted_calls(monkeypatch, lambda: train_gpt2.GPT2(config, 1, 8, threads=1))
    assert calls == {name: count for name, count in expected.items() if count > 0}


def test_counted_calls_of_llama_are_those_of_the_program(monkeypatch):
    """`calls` of every `llama_cost`."""
    config = llama.Config(8, 128, 128, num_layers=12, num_heads=1, num_key_heads=1, head_size=2, channels=2, hidden=2)
    calls = counted_calls(monkeypatch, lambda: train_llama.Llama(config, 1, 8, threads=1))
    expected = {call.partition(",")[0]: count for call, (count, _, _) in figures.page_costs("llama_cost").items() if count > 0}
    assert expected == {name: calls[name] for name in expected} and len(expected) == 7


# ----------------------------------------------------------------------------------------------------------------------
# Names and links

def cpu_kernels():
    """The names of the parallel kernels in kernels_cpu."""
    return {name for name, kernel in vars(kernels_cpu).items()
            if isinstance(kernel, Dispatcher) and kernel.targetoptions.get("parallel")}


def gpu_kernels():
    """The names of the CUDA kernels in kernels_gpu, and of the functions that launch them or call cuBLAS."""
    compiled = [name for source in kernels_gpu.SOURCES for name in parse_signatures(source)]
    return {*compiled, *(name for name, function in vars(kernels_gpu).items() if callable(function) and
                         getattr(function, "__module__", "") == "kernels_gpu" and
                         {"launch", "gemm"} & {*function.__code__.co_names})}


FILE = re.compile(r"[\w/]+\.py|dev/[\w./]+|\w+_\w+/")      # a file or folder of the checkout


def named(page):
    """The identifiers in backticks in a page."""
    return {word for span in SPAN.findall(prose(page)) for word in re.findall(r"[A-Za-z_]\w*", FILE.sub("", span))}


def test_every_kernel_has_a_page():
    on_pages = set().union(*map(named, LAYERS))
    missing = (cpu_kernels() | gpu_kernels()) - on_pages
    assert not missing, f"name {', '.join(sorted(missing))} on the page of its layer in dev/derivations"


@every_page
def test_pages_name_nothing_that_is_gone(page):
    """Kernels must exist as kernels; other names must occur somewhere in the program or in the page's examples."""
    kernels = cpu_kernels() | gpu_kernels() | set(vars(train_gpt2.GPT2))
    program = "\n".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), ROOT / "dev" / "figures.py"])
    words = set(re.findall(r"[A-Za-z_]\w*", program + examples(page)))
    for name in named(page) - {"onehot", "dx", "x"}:
        if re.search(r"_(forward|backward|update|classifier)$", name):
            assert name in kernels, f"{page.name} names `{name}`, which is no kernel"
        assert name in words or value(name) is not None, f"{page.name} names `{name}`, which does not occur in the program"


@every_page
def test_files_exist(page):
    for span in SPAN.findall(prose(page)):
        for name in FILE.findall(span):
            assert (ROOT / name).exists(), f"{page.name} names `{name}`, and there is no such file"


@every_page
def test_flags_exist(page):
    flags = re.findall(r"`(--[\w-]+)", text_of(page))
    program = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert all(f'"{flag}"' in program or f'"{flag[2:]}": dict(' in program for flag in flags), flags


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHER_PAGES = [ROOT / name for name in ("README.md", "cuda_on_cpu/README.md", "dev/USAGE.md", "dev/BENCHMARK.md",
                                        "dev/EXERCISES.md")]


@pytest.mark.parametrize("page", PAGES + [page for page in OTHER_PAGES if page.exists()],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_exist(page):
    for text, target in re.findall(r"!?\[([^\]]*)\]\(([^)]*)\)", prose(page)):
        name, _, anchor = target.partition("#")
        if not name.startswith("https://"):
            path = page.parent / name if name else page
            assert text and path.exists() and (not anchor or anchor in anchors(path)), f"{page.name}: {target}"


def test_the_list_of_pages_is_complete():
    rows = re.findall(r"^\| \[[^\]]+\]\(([\w.]+)\) \| [^|]+ \|$", text_of(figures.PAGES / "README.md"), re.MULTILINE)
    assert sorted(rows) == [page.name for page in LAYERS]


# ----------------------------------------------------------------------------------------------------------------------
# Docstrings of the kernels

DERIVED = re.compile(r"(?:Derived in|See) dev/derivations/(\w+)\.md\.")
COST = re.compile(r"Cost[^:]*: (\S.*?) FLOPs(?: for P = (.*?) (?:pairs|keys)[^,]*)?, (.*?) bytes: (memory|compute)-bound\.")


def docstring(kernel):
    return " ".join(kernel.__doc__.split())


@pytest.mark.parametrize("kernels", [kernels_cpu, kernels_gpu], ids=["cpu", "gpu"])
def test_docstrings_lead_to_the_page_of_the_kernel(kernels):
    heads = {page.stem: text_of(page).partition("\n## ")[0] for page in LAYERS}
    for name in (cpu_kernels() | gpu_kernels()) & vars(kernels).keys():
        page = DERIVED.search(docstring(getattr(kernels, name)))
        assert page and f"`{name}`" in heads[page[1]], name


@pytest.mark.parametrize("call", [*figures.page_costs(), *figures.page_costs("llama_cost"), "gelu_exact_forward",
                                  "gelu_exact_backward"])
def test_costs_of_the_docstrings_are_those_of_the_pages(call):
    """For GPT-2 124M, or a Llama of its width, at B=4 T=1024. Docstrings leave out vectors of C beside arrays of N*C."""
    name, _, variant = call.partition(", ")
    tensor = "" if variant == "KV=4" else variant
    config, rows = gpt2.model_config("d12"), train_gpt2.CLASSIFIER_ROWS
    shapes = gpt2.parameter_shapes(config)
    sizes = dict(B=4, T=1024, N=4 * 1024, C=config.channels, NH=config.num_heads, HS=config.channels // config.num_heads,
                 V=config.vocab_size, Vp=config.padded_vocab_size, P=sum(map(math.prod, shapes.values())), position=1023,
                 KV=4 if variant == "KV=4" else config.num_heads, H=2048, heads=12 + 4)
    if tensor:
        sizes["OC"], sizes["C"] = shapes["wte"] if tensor == "logits" else shapes[tensor + "w"][1:]
    if tensor == "logits" or name == "fused_classifier":
        sizes["N"] = rows
    if name.startswith("matvec"):
        sizes["N"] = 1
    if name.startswith("gelu"):
        sizes["C"] *= 4
    if name == "attention_cached_forward":
        sizes["B"] = 1
    flops, pairs, moved, bound = COST.search(docstring(getattr(kernels_cpu, name))).groups()
    if pairs:
        sizes["P"] = eval(pairs, sizes)
    exact_cost = run(figures.PAGES / "gelu.md")[0]["exact_cost"]
    _, expected_flops, expected_moved = (figures.page_costs() | figures.page_costs("llama_cost") | exact_cost)[call]
    assert eval(flops, sizes) == pytest.approx(expected_flops, rel=0.002)
    assert eval(moved, sizes) == pytest.approx(expected_moved, rel=0.002)
    most_flops, bandwidth = figures.PROCESSORS[figures.CPU]
    assert bound == ("memory" if expected_flops / expected_moved < most_flops / bandwidth else "compute")
