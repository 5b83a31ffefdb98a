"""Sampling: from logits to the next token. One function per rule, in the order in which they apply.

Logits and probabilities are (V,) float32. A token that a rule excludes gets a logit of -infinity or a probability of 0.
"""
from collections.abc import Sequence

import numpy as np


def penalize_repetition(logits: np.ndarray, tokens: Sequence[int], penalty: float) -> np.ndarray:
    """Lower the logits of `tokens`: divide positive ones by `penalty`, multiply the others by it (Keskar et al. 2019)."""
    logits = logits.copy()
    seen = np.unique(tokens)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep the k largest logits, and any that equal the smallest of them."""
    if k >= logits.size:
        return logits
    return np.where(logits >= np.partition(logits, -k)[-k], logits, np.float32(-np.inf))


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities proportional to exp(logits / temperature)."""
    with np.errstate(over="ignore"):    # a temperature near 0 may give -infinity
        shifted = (logits - logits.max()) / np.float32(max(temperature, 1e-30))
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(dtype=np.float64).astype(np.float32)


def keep_top_p(probabilities: np.ndarray, p: float) -> np.ndarray:
    """Nucleus sampling: keep the largest probabilities whose sum reaches p, and ties (Holtzman et al. 2020).

    Probabilities below (1 - p) / V are always excluded, because even V of them sum to less than 1 - p. So only the others have
    to be sorted.
    """
    likely = probabilities[probabilities >= min((1 - p) / probabilities.size, probabilities.max())]
    descending = np.sort(likely)[::-1]
    before = np.cumsum(descending, dtype=np.float64) - descending
    smallest = descending[np.count_nonzero(before < p) - 1]
    return np.where(probabilities >= smallest, probabilities, np.float32(0))


def draw(probabilities: np.ndarray, generator: np.random.Generator) -> int:
    """Draw a token with one random number. The probabilities need not sum to 1."""
    possible = np.flatnonzero(probabilities)
    cumulative = np.cumsum(probabilities[possible], dtype=np.float64)
    return int(possible[np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")])


def sample(logits: np.ndarray, tokens: Sequence[int], generator: np.random.Generator, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0) -> int:
    """Sample the token that follows `tokens`.

    temperature 0: take the most likely token, the first one if several tie; top_k 0, top_p 1, repetition_penalty 1: off
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
    return draw(probabilities, generator)
