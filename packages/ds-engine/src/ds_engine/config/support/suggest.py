"""What somebody probably meant to type."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache


def distance(a: str, b: str) -> int:
    """Edits that turn `a` into `b`: insertions, deletions, substitutions, and swaps of neighbours.

    Source: the optimal string alignment form of Damerau, A technique for computer detection and correction
    of spelling errors (1964).
    """
    two_back: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, two_back[j - 2] + 1)
            current.append(cost)
        two_back, previous = previous, current
    return previous[-1]


def closest(word: str, candidates: Iterable[str]) -> tuple[str, int] | None:
    """The candidate with the fewest edits and their number, case ignored; None when nothing comes near.

    Near means that at most a third of the letters (and always one) would have to change: "foo" must not
    become "bf16". Of several that are as near, the first in the alphabet.
    """
    folded = word.lower()
    letters = _letters(folded)
    found: tuple[int, str] | None = None
    for candidate in sorted(set(candidates)):
        limit = max(1, max(len(word), len(candidate)) // 3)
        if found is not None:
            limit = min(limit, found[0] - 1)
        if abs(len(word) - len(candidate)) > limit:
            continue
        # Each letter that the other lacks costs an edit: most candidates are done with here.
        theirs = _letters(candidate.lower())
        if max((letters & ~theirs).bit_count(), (theirs & ~letters).bit_count()) > limit:
            continue
        edits = distance(folded, candidate.lower())
        if edits <= limit:
            found = (edits, candidate)
    return None if found is None else (found[1], found[0])


@cache
def _letters(word: str) -> int:
    """The set of letters as bits."""
    bits = 0
    for letter in word:
        bits |= 1 << (ord(letter) % 64)
    return bits


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """' Did you mean "x"?', or the list of what there is when nothing comes near."""
    known = sorted(set(candidates), key=str.lower)
    found = closest(word, known)
    if found is not None:
        return f' Did you mean "{found[0]}"?'
    return f" There is {', '.join(known)}." if known else ""
