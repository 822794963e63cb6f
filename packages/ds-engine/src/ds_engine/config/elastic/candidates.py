"""Which batch sizes divide among many numbers of ranks: arithmetic on whole numbers.

A batch suits `n` ranks if batch = micro-batch x accumulation steps x n for one of the allowed micro-batch sizes. A
batch that is a micro-batch size times a number with many divisors suits many `n`. The candidates are therefore each
micro-batch size, and the least common multiple of all of them, times the largest highly composite number that fits
under the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
"""Their product exceeds 2^58: no highly composite number below the limit of a config key (2^63) needs another."""


def highly_composite(limit: int) -> int:
    """Returns the largest number up to `limit` that has more divisors than every smaller number.

    Args:
        limit: at least 1.
    """
    best, most = 1, 1
    for number, divisors in sorted(_falling_exponents(limit)):
        if divisors > most:
            best, most = number, divisors
    return best


def _falling_exponents(
    limit: int, place: int = 0, largest: int = 64, divisors: int = 1, number: int = 1
) -> Iterator[tuple[int, int]]:
    """Yields (number, number of its divisors) for 2^a 3^b 5^c ... up to `limit` with a >= b >= c ...; every highly
    composite number has this form, because exchanging two exponents would give a smaller number with as many
    divisors.
    """
    yield number, divisors
    if place == len(_PRIMES):
        return
    for exponent in range(1, largest + 1):
        number *= _PRIMES[place]
        if number > limit:
            return
        yield from _falling_exponents(limit, place + 1, exponent, divisors * (exponent + 1), number)


def candidates(micro_batches: Sequence[int], max_batch: int) -> list[int]:
    """Returns the batch sizes up to `max_batch` from which the best one is chosen, in ascending order."""
    bases = {*micro_batches, math.lcm(*micro_batches)}
    return sorted({base * highly_composite(max_batch // base) for base in bases if base <= max_batch})


def compatible(batch: int, micro_batches: Sequence[int], smallest: int, largest: int) -> tuple[int, ...]:
    """Returns the numbers of ranks from `smallest` to `largest` among which `batch` can be divided, in ascending
    order.
    """
    numbers: set[int] = set()
    for share in {batch // micro for micro in micro_batches if batch % micro == 0}:
        for divisor in range(1, min(math.isqrt(share), largest) + 1):
            if share % divisor == 0:
                numbers |= {divisor, share // divisor}
    return tuple(sorted(number for number in numbers if smallest <= number <= largest))
