"""From logits to the next token: the usual few rules, one function each, in the order in which they apply.

Logits and probabilities are (V,) float32. A rule that leaves tokens out gives them a logit of -infinity, or probability 0.
"""
import numpy as np


def penalize_repetition(logits, tokens, penalty):
    """Logits with those of `tokens` lowered: divided by `penalty` where positive, else multiplied (Keskar et al. 2019)."""
    logits = logits.copy()
    seen = np.unique(tokens)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def keep_top_k(logits, k):
    """Only the k largest logits, and those that equal the smallest of them."""
    if k >= logits.size:
        return logits
    return np.where(logits >= np.partition(logits, -k)[-k], logits, np.float32(-np.inf))


def softmax(logits, temperature):
    """Probabilities, proportional to exp(logits / temperature)."""
    with np.errstate(over="ignore"):    # toward -infinity, of a temperature near 0
        shifted = (logits - logits.max()) / np.float32(max(temperature, 1e-30))
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(dtype=np.float64).astype(np.float32)


def keep_top_p(probabilities, p):
    """Only the largest probabilities that together have at least p (Holtzman et al. 2020), and those that equal the smallest.

    A token with less than an equal share of what may be left out, 1 - p, is left out in any case: only the others are sorted.
    """
    likely = probabilities[probabilities >= min((1 - p) / probabilities.size, probabilities.max())]
    descending = np.sort(likely)[::-1]
    before = np.cumsum(descending, dtype=np.float64) - descending
    smallest = descending[np.count_nonzero(before < p) - 1]
    return np.where(probabilities >= smallest, probabilities, np.float32(0))


def choose(probabilities, generator):
    """A token, drawn with one random number in proportion to the probabilities, which need not add up to 1."""
    possible = np.flatnonzero(probabilities)
    cumulative = np.cumsum(probabilities[possible], dtype=np.float64)
    return int(possible[np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")])


def sample(logits, tokens, generator, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """The token to follow `tokens`, drawn with `generator` (np.random.Generator).

    temperature 0 takes the most probable one, the first of equals; top_k 0 and top_p 1 leave nothing out.
    """
    if repetition_penalty != 1:
        logits = penalize_repetition(logits, tokens, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    probabilities = softmax(logits, temperature)
    if top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    return choose(probabilities, generator)
