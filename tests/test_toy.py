"""What is claimed of the toy data is what is in its text."""

import numpy as np
import pytest

from mini_llm import toy


@pytest.mark.parametrize("seed", [0, 1337])
def test_the_stationary_distribution_is_where_a_chain_ends(seed):
    matrix = toy.transitions(seed)
    assert matrix.shape == (64, 64) and matrix.sum(1) == pytest.approx(1)
    limit = np.linalg.matrix_power(matrix, 4096)
    assert np.allclose(toy.stationary(matrix), limit[0]) and np.allclose(limit[0], limit[-1])
    rows = [-sum(p * np.log(p) for p in row if p) for row in matrix]
    assert toy.entropy_rate(seed) == pytest.approx(limit[0] @ rows)


def test_the_text_has_the_entropy_that_is_told_and_is_the_same_every_time():
    texts = list(toy.text(5))
    assert [split for split, _ in texts] == ["train"] * 480 + ["val"] * 32
    assert {len(text) for _, text in texts} == {2048}
    assert len({text for _, text in texts}) == 512, "no chain is another's"
    assert texts[0] == next(toy.text(5)) and (toy.transitions(5) != toy.transitions(6)).any()
    ids, counts = np.zeros(128, int), np.zeros((64, 64))
    ids[[ord(char) for char in toy.ALPHABET]] = range(64)
    for _, text in texts:
        chain = ids[np.frombuffer(text.encode(), np.uint8)]
        np.add.at(counts, (chain[:-1], chain[1:]), 1)
    found = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    assert abs(found - toy.transitions(5))[counts.sum(1) > 2000].max() < 0.06
    nats = -(counts * np.log(np.where(counts, found, 1))).sum() / counts.sum()
    assert nats == pytest.approx(toy.entropy_rate(5), rel=0.01)
