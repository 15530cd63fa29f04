"""A text source of known entropy: a Markov chain over characters. Its entropy rate, −Σᵢ πᵢ Σⱼ Pᵢⱼ ln Pᵢⱼ, is the lowest
loss that any model can reach on it: a run on toy data shows whether training works, not just that the loss falls."""

import string

import numpy as np

ALPHABET = string.ascii_letters + string.digits + " ."
N_CHAINS, LENGTH = 512, 2048  # one document of about a million characters; the chains are generated in parallel
VAL_CHAINS = 32


def transitions(seed):
    """P, (64, 64): row i is the distribution of the character that follows character i."""
    return np.random.default_rng(seed).dirichlet(np.full(len(ALPHABET), 0.2), len(ALPHABET))


def stationary(matrix):
    """The stationary distribution: π with πP = π, (64,)."""
    values, vectors = np.linalg.eig(matrix.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    return pi / pi.sum()


def entropy_rate(seed):
    """In nats per character."""
    matrix = transitions(seed)
    return float(-stationary(matrix) @ (matrix * np.log(np.maximum(matrix, 1e-300))).sum(1))  # 0 ln 0 = 0


def text(seed):
    """(split, text) for each chain: the last VAL_CHAINS are for validation."""
    rng = np.random.default_rng([seed, 1])
    cumulative = transitions(seed).cumsum(axis=1)
    state = rng.choice(len(ALPHABET), N_CHAINS, p=stationary(transitions(seed)))
    states = np.empty((N_CHAINS, LENGTH), dtype=np.int64)
    for position in range(LENGTH):
        states[:, position] = state
        drawn = rng.random((N_CHAINS, 1))
        state = np.minimum((cumulative[state] < drawn).sum(axis=1), len(ALPHABET) - 1)
    for number, row in enumerate(np.array(list(ALPHABET))[states]):
        yield "val" if number >= N_CHAINS - VAL_CHAINS else "train", "".join(row)
