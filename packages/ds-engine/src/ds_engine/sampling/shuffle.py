"""Random permutations that are computed instead of stored; they are the same on every machine.

[Note: computed order]
A shuffled list of n samples would be n indices in memory on every rank, and continuing in the middle of an epoch would
require shuffling it again. Here the i-th sample of the order is computed from (key, i, n): a Feistel network permutes
the numbers below 4^k >= n, and a result of n or more is permuted again until it is less than n ("cycle walking"; Black
and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Only integers are used, so that the order does not depend on
a library's random generator or on rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    """A bijection of 64-bit words whose every output bit depends on every input bit.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), figure 14.
    """
    mixed: Words = words + _ODD
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def key_of(*numbers: int) -> Words:
    """Hashes integers to one word, as an array of one element."""
    word = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        word = mix(word ^ mix(np.array([number & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)))
    return word


def draws(key: Words, count: int, below: int) -> NDArray[np.int64]:
    """Returns `count` random integers from 0 to `below` - 1."""
    numbers: Words = np.arange(count, dtype=np.uint64)
    drawn: NDArray[np.int64] = (mix(key + numbers) % np.uint64(below)).astype(np.int64)
    return drawn


def shuffled(places: NDArray[np.int64], count: int, key: Words) -> NDArray[np.int64]:
    """Returns the elements at `places` of a random permutation of 0 to `count` - 1, [Note: computed order]."""
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [mix(key + np.uint64(turn)) for turn in range(_ROUNDS)]

    def permute(words: Words) -> Words:
        left, right = words >> half, words & mask
        for key_of_round in keys:
            left, right = right, left ^ (mix(right ^ key_of_round) & mask)
        both: Words = (left << half) | right
        return both

    permuted = permute(places.astype(np.uint64))
    while (outside := permuted >= np.uint64(count)).any():
        permuted[outside] = permute(permuted[outside])
    return permuted.astype(np.int64)
