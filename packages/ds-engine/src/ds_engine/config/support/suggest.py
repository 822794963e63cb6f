"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache


def distance(a: str, b: str) -> int:
    """Returns the number of edits from `a` to `b`: insertions, deletions, substitutions, and swaps of adjacent
    letters.

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
    """Returns the candidate with the fewest edits, and their number; None if no candidate is near. Case is ignored.

    Near means that at most a third of the letters (but at least one) differ: "foo" must not become "bf16". Of several
    candidates with the same number of edits, the alphabetically first is returned.
    """
    folded = word.lower()
    letters = _letters(folded)
    nearest: tuple[int, str] | None = None
    for candidate in sorted(set(candidates)):
        limit = max(1, max(len(word), len(candidate)) // 3)
        if nearest is not None:
            limit = min(limit, nearest[0] - 1)
        if abs(len(word) - len(candidate)) > limit:
            continue
        # Each letter that the other word lacks costs an edit: this excludes most candidates.
        theirs = _letters(candidate.lower())
        if max((letters & ~theirs).bit_count(), (theirs & ~letters).bit_count()) > limit:
            continue
        edits = distance(folded, candidate.lower())
        if edits <= limit:
            nearest = (edits, candidate)
    return None if nearest is None else (nearest[1], nearest[0])


@cache
def _letters(word: str) -> int:
    """Returns the set of letters as bits."""
    bits = 0
    for letter in word:
        bits |= 1 << (ord(letter) % 64)
    return bits


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?', or the list of valid names if none is near."""
    known = sorted(set(candidates), key=str.lower)
    near = closest(word, known)
    if near is not None:
        return f' Did you mean "{near[0]}"?'
    return f" Valid names: {', '.join(known)}." if known else ""
