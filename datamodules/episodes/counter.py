"""Random numbers as a pure function of whole numbers: SplitMix64 (Steele, Lea and Flood 2014) from a hashed start.

numpy's generators take 20 to 30 microseconds to be seeded, and numpy may change what they give; this is some operations
on whole arrays of episodes at once, and gives the same everywhere.
"""

import functools

import numpy as np

_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of 64 bits onto themselves, for an array of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FACTORS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def key_of(*names: int) -> int:
    """A key of 64 bits for a sequence of whole numbers: `(seed, split, epoch)`."""
    key = 0
    for name in names:
        key = int(mix(np.array([(key + name + 1) * _STEP & _MASK], dtype=np.uint64))[0])
    return key


def keys_of(key: int, indices: np.ndarray) -> np.ndarray:
    """A key `[T]` (uint64) for each of the indices `[T]` that follow the names of `key`."""
    return mix((np.asarray(indices).astype(np.uint64) + np.uint64(key) + np.uint64(1)) * np.uint64(_STEP))


def steps(counters: np.ndarray) -> np.ndarray:
    """What `random_words` adds to a key for each counter (uint64)."""
    return np.asarray(counters).astype(np.uint64) * np.uint64(_STEP)


def random_words(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """32 random bits, in uint64, for each pair of a key and a step: `[T, len(steps)]`."""
    return mix(keys[:, None] + steps) >> np.uint64(32)


def below(words: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to limit - 1 (limits are below 2^32), uniform up to limit / 2^32; uint64."""
    return (words * limits) >> np.uint64(32)
