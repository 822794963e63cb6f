"""Numbers in the options of commands: sizes with units, lists of counts."""

from ds_engine.config.support.sizes import parse_bytes

__all__ = ["parse_bytes", "parse_counts"]


def parse_counts(option: str, text: str, of: str) -> list[int]:
    """Returns the positive numbers in a text such as "1,8,64".

    Raises:
        ValueError: there is something else; the message says of what the option counts, and ends with an example.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"{option} {text}: write numbers of {of}")
    return counts
