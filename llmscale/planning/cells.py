"""The cells of a table's row: numbers, or why there are none."""

from collections.abc import Mapping

LARGEST_NUMBER = 2**24
"""Above every size, degree and rate of a run, so that no cell keeps a reader busy for hours."""


class Unpredictable(Exception):
    """A row lacks what a prediction needs; the message says what."""


def positive(cells: Mapping[str, str], key: str) -> float | None:
    """What a cell says; None where it is empty.

    Raises:
        Unpredictable: if it is no positive number.
    """
    text = cells.get(key, "").strip().replace(",", "")
    if not text or text.lower() in ("n/a", "na", "-", "none", "nan"):
        return None
    try:
        number = float(text)
    except ValueError:
        raise Unpredictable(f"{key}: {text!r} is no number") from None
    if not 0 < number <= LARGEST_NUMBER:
        raise Unpredictable(f"{key}: {text!r} is not between 0 and {LARGEST_NUMBER:,}")
    return number


def whole(cells: Mapping[str, str], key: str, otherwise: int) -> int:
    number = positive(cells, key)
    return otherwise if number is None else max(1, round(number))


def needed(cells: Mapping[str, str], *keys: str) -> list[int]:
    missing = [key for key in keys if positive(cells, key) is None]
    if missing:
        raise Unpredictable(f"{', '.join(missing)}: empty")
    return [whole(cells, key, 1) for key in keys]
