"""Sampling: each rule on logits small enough to check by hand, and the frequencies of the drawn tokens.

Pearson's chi-squared test compares frequencies with probabilities. Seeds are fixed, so a test passes always or never. The
bounds are quantiles that a correct distribution exceeds for one seed in 10,000.
"""
import numpy as np
import pytest

import sampling

V = 8
LOGITS = np.log(np.array([0.3, 0.05, 0.2, 0.01, 0.25, 0.1, 0.02, 0.07])).astype(np.float32)
DRAWS = 5_000
# Degrees of freedom -> the 0.9999 quantile of the chi-squared distribution.
CHI_SQUARED = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88}


def draw(seed=0, logits=LOGITS, tokens=(), **settings):
    """How often each token is drawn."""
    generator = np.random.default_rng(seed)
    return np.bincount([sampling.sample(logits, tokens, generator, **settings) for _ in range(DRAWS)], minlength=logits.size)


def assert_drawn(counts, probabilities):
    """Compare counts with probabilities, which need not sum to 1. A token of probability 0 must never occur."""
    probabilities = np.asarray(probabilities) / np.sum(probabilities)
    possible = probabilities > 0
    assert not counts[~possible].any(), counts
    expected = DRAWS * probabilities[possible]
    chi_squared = np.sum((counts[possible] - expected) ** 2 / expected)
    assert chi_squared <= CHI_SQUARED[possible.sum() - 1], (counts, expected)


P = np.exp(LOGITS.astype(np.float64))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    assert_drawn(draw(temperature=temperature), P ** (1 / temperature))


def only(*tokens):
    return np.where(np.isin(np.arange(V), tokens), P, 0)


@pytest.mark.parametrize("k, kept", [(2, (0, 4)), (3, (0, 4, 2)), (V - 1, (0, 1, 2, 4, 5, 6, 7)), (100, range(V))])
def test_top_k(k, kept):
    assert_drawn(draw(top_k=k), only(*kept))


# The largest are 0.3, 0.25 and 0.2: two of them reach 0.55, three 0.75.
@pytest.mark.parametrize("p, kept", [(0.31, (0, 4)), (0.54, (0, 4)), (0.56, (0, 4, 2)), (0.9999, range(V))])
def test_top_p(p, kept):
    assert_drawn(draw(top_p=p), only(*kept))


def test_top_p_applies_after_top_k_and_temperature():
    """At temperature 0.5, the first of the three most probable tokens has 0.47 of their probability, the first two 0.79."""
    assert_drawn(draw(top_k=3, top_p=0.78, temperature=0.5), only(0, 4) ** 2)
    assert_drawn(draw(top_k=3, top_p=0.80, temperature=0.5), only(0, 4, 2) ** 2)


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-9), dict(temperature=1e-320),
                                      dict(temperature=0), dict(temperature=0, top_k=3, top_p=0.5)])
def test_only_the_most_probable_is_left(settings):
    assert draw(**settings)[0] == DRAWS


def test_greedy_takes_the_first_of_equal_logits_and_uses_no_random_number():
    generator = np.random.default_rng(0)
    assert sampling.sample(np.array([1, 3, 3, 2], np.float32), [], generator, temperature=0) == 1
    assert generator.random() == np.random.default_rng(0).random()


def test_equal_logits_stay_together():
    """Among the logits 0, 0, 0, 1 the largest has probability 0.48: top_k = 2 and top_p = 0.6 both need one of three equals."""
    logits = np.array([0, 0, 0, 1], dtype=np.float32)
    for settings in (dict(top_k=2), dict(top_p=0.6)):
        assert_drawn(draw(logits=logits, **settings), np.exp(logits))
    assert draw(logits=logits, top_p=0.4)[3] == DRAWS
    assert np.count_nonzero(draw(logits=np.zeros(V, np.float32), top_p=1e-17)) == V


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99, 0.999999])
def test_top_p_is_the_shortest_list_that_is_enough(p):
    """The shortcut gives the same result as sorting the whole vocabulary."""
    for seed in range(20):
        probabilities = sampling.softmax(np.random.default_rng(seed).normal(0, 4, 1000).astype(np.float32), 1.0)
        order = np.argsort(-probabilities)
        size = 1
        while probabilities[order[:size]].sum(dtype=np.float64) < p:
            size += 1
        kept = sampling.keep_top_p(probabilities, p)
        assert set(np.flatnonzero(kept)) == set(order[:size]) and (kept[order[:size]] == probabilities[order[:size]]).all()


def test_repetition_penalty():
    """Positive logits are divided by the penalty, negative ones multiplied, once per token no matter how often it occurred."""
    logits = np.array([2, -1, 0, 1, 2, 0.5, -2, 1], dtype=np.float32)
    tokens = [0, 1, 1, 1, 2, 6]
    expected = np.array([1, -2, 0, 1, 2, 0.5, -4, 1])
    before = logits.copy()
    assert sampling.penalize_repetition(logits, tokens, 2.0).tolist() == expected.tolist()
    assert_drawn(draw(logits=logits, tokens=tokens, repetition_penalty=2.0), np.exp(expected))
    assert_drawn(draw(logits=logits, tokens=tokens, repetition_penalty=2.0, temperature=2.0), np.exp(expected / 2))
    assert sampling.sample(logits, tokens, None, temperature=0) == 0
    assert sampling.sample(logits, tokens, None, temperature=0, repetition_penalty=2.0) == 4
    assert (logits == before).all()


def test_same_seed_same_tokens():
    def tokens(seed):
        generator = np.random.default_rng(seed)
        return [sampling.sample(LOGITS, [], generator, temperature=0.9, top_k=6, top_p=0.9) for _ in range(50)]
    assert tokens(1) == tokens(1) != tokens(2)


def test_large_logits_and_a_whole_vocabulary():
    """exp(1000) would overflow. One of the 50,257 tokens has half of the probability."""
    logits = np.full(50257, 1000, dtype=np.float32)
    logits[50256] += np.log(50256)
    generator = np.random.default_rng(0)
    drawn = [sampling.sample(logits, [], generator) for _ in range(400)]
    assert 160 < drawn.count(50256) < 240 and len(set(drawn)) > 150
    assert sampling.sample(logits, [], generator, top_p=0.4) == 50256
