"""Random numbers from whole numbers: the published generator, and names that do not run into each other."""

import numpy as np

from datamodules.episodes.counter import below, key_of, keys_of, mix, random_words, steps

# The first outputs of SplitMix64 from state 1234567, as printed by the reference implementation.
REFERENCE = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_the_bits_are_those_of_splitmix64():
    assert mix(np.uint64(1234567) + steps(np.arange(1, 6))).tolist() == REFERENCE
    words = random_words(np.array([1234567], dtype=np.uint64), steps(np.arange(1, 6)))
    assert words.tolist() == [[value >> 32 for value in REFERENCE]]


def test_every_name_counts_and_their_order():
    names = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32 - 1, 2, 10**6), (2**32 - 1, 2, 10**6 + 1)]
    assert len({key_of(*n) for n in names}) == len(names)
    keys = keys_of(key_of(0, 0), np.arange(1000))
    assert len(set(keys.tolist())) == 1000
    assert not set(keys.tolist()) & set(keys_of(key_of(0, 1), np.arange(1000)).tolist())
    # One at a time or together.
    assert keys_of(key_of(0, 0), np.array([7]))[0] == keys[7]


def test_numbers_below_a_limit_are_uniform():
    words = random_words(keys_of(key_of(3), np.arange(100)), steps(np.arange(600)))
    counts = np.bincount(below(words, np.uint64(6)).astype(int).ravel(), minlength=6)
    expected = 100 * 600 / 6
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom: above 25.7 once in 10,000 such generators.
    assert ((counts - expected) ** 2 / expected).sum() < 25.7
