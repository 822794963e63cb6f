"""What somebody probably meant to type."""

from __future__ import annotations

from collections.abc import Iterable


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
    become "bf16".
    """
    folded = word.lower()
    ranked = sorted((distance(folded, c.lower()), c) for c in set(candidates))
    if not ranked:
        return None
    edits, best = ranked[0]
    return (best, edits) if edits <= max(1, max(len(word), len(best)) // 3) else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """' Did you mean "x"?', or the list of what there is when nothing comes near."""
    known = sorted(set(candidates), key=str.lower)
    found = closest(word, known)
    if found is not None:
        return f' Did you mean "{found[0]}"?'
    return f" There is {', '.join(known)}." if known else ""
