"""How long the parts of a sample are under span corruption (Raffel et al. 2020, section 3.3)."""

from dataclasses import dataclass

NOISE_DENSITY = 0.15
SPAN_LENGTH = 3
SMALLEST_MULTIPLE = 8
SHORTEST_INPUT = 8


@dataclass(frozen=True)
class SpanLengths:
    """How many tokens each part of a sample has; the same for all samples of a length.

    ``text`` tokens lose ``noise`` of them in ``spans`` pieces. A sentinel takes each piece's
    place in the input and stands before it in the target; both have an end token.
    """

    input: int
    target: int

    @property
    def spans(self) -> int:
        """Pieces that are taken out."""
        return max(1, round((self.target - 1) / (1 + SPAN_LENGTH)))

    @property
    def noise(self) -> int:
        """Tokens that are taken out."""
        return self.target - 1 - self.spans

    @property
    def text(self) -> int:
        """Tokens of text."""
        return self.input - 1 - self.spans + self.noise


def span_lengths(input_length: int) -> SpanLengths:
    """The lengths that fill an input of ``input_length`` tokens, at 15 % noise, spans of 3.

    No sample is padded. So that the target can be split over ranks as the input can, it is
    rounded to a multiple of 8, or of the largest power of two up to a 32nd of the input.
    """
    multiple = max(SMALLEST_MULTIPLE, 1 << (input_length // 32 or 1).bit_length() - 1)
    share = NOISE_DENSITY * (1 + 1 / SPAN_LENGTH)
    wanted = (input_length - 1) * share / (1 - NOISE_DENSITY + NOISE_DENSITY / SPAN_LENGTH) + 1
    return SpanLengths(input_length, max(1, round(wanted / multiple)) * multiple)
