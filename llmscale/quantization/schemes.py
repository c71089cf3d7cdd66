"""What the names of schemes stand for: plain data, a line a scheme."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, PositiveInt

from llmscale.errors import RecipeError
from llmscale.settings import Settings, choices, divisors

GROUP_SIZES = (128, 64, 32)
"""Group sizes to choose from, the one with the least overhead first."""

MIXED_BITS = 5.0


Observer = Literal["mse", "minmax"]
Layout = Literal["compressed-tensors", "gptq"]


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a linear layer are stored.

    A ``group`` has a scale for so many columns of a row, a ``channel`` one for a row. By ``mse``
    its range is the one of least squared error, by ``minmax`` as far as its weights reach.
    """

    bits: int
    granularity: Literal["channel", "group"]
    number: Literal["int", "float"] = "int"
    symmetric: bool = True
    observer: Observer = "mse"

    def stored_bits(self, columns: int, group_size: int | None) -> float:
        """Bits that a weight takes, its part of a 16-bit scale and of a zero point counted."""
        width = group_size if self.granularity == "group" and group_size else columns
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / width


@dataclass(frozen=True)
class ActivationFormat:
    """How the inputs of a linear layer are rounded while it computes.

    ``dynamic``: a scale a token, found as it runs; else one a layer, from the calibration, where
    that serves. Integers have a zero point beside it.
    """

    dynamic: bool
    number: Literal["int", "float"] = "int"

    @property
    def symmetric(self) -> bool:
        """Whether zero is in the middle of the range."""
        return self.number == "float"


CacheNumber = Literal["int8", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """A composition of parts; embeddings, norms and the head stay as they are.

    ``rounding`` is how weights meet their format, ``scaling`` what is moved from a layer's inputs
    to its weights before; ``rotated`` turns the hidden states, ``refined`` goes over codes and
    scales again. ``wider`` is the format of the layers that need more bits than others. A
    ``library_type`` is bitsandbytes' own name for what it does alone. ``cache`` is how keys and
    values are kept.
    """

    weights: WeightFormat
    activations: ActivationFormat | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    scaling: Literal["awq", "smoothquant"] | None = None
    library_type: Literal["nf4", "fp4", "int8"] | None = None
    wider: WeightFormat | None = None
    rotated: bool = False
    refined: bool = False
    cache: CacheNumber | None = None

    @property
    def calibrated(self) -> bool:
        """Whether texts are necessary."""
        return bool(self.by_products or self.by_range or self.cache)

    @property
    def by_products(self) -> bool:
        """Whether the sum of X^T X of a layer's inputs X is necessary."""
        return self.rounding == "gptq" or self.scaling == "awq"

    @property
    def by_range(self) -> bool:
        """Whether a layer's least and greatest inputs are necessary."""
        return self.scaling == "smoothquant" or self.fixed_inputs

    @property
    def fixed_inputs(self) -> bool:
        """Whether a layer's inputs have a scale from the calibration."""
        return self.activations is not None and not self.activations.dynamic

    @property
    def plain(self) -> bool:
        """Whether weights are rounded to the nearest integers, and that is all."""
        changed = self.scaling or self.rounding != "nearest" or self.library_type
        return not changed and self.weights.number == "int"

    @property
    def grouped(self) -> bool:
        """Whether a group size can be chosen."""
        return self.weights.granularity == "group" and self.library_type is None


INT8 = WeightFormat(8, "channel")
INT4 = WeightFormat(4, "group")
FP8 = WeightFormat(8, "channel", "float")

SCHEMES: dict[str, Scheme] = {
    "int8-weight": Scheme(INT8),
    "int8-dynamic": Scheme(INT8, ActivationFormat(True)),
    "int8-static": Scheme(INT8, ActivationFormat(False), "gptq", "smoothquant"),
    "int8-smoothquant": Scheme(INT8, ActivationFormat(True), scaling="smoothquant"),
    "int4-weight": Scheme(INT4),
    "int4-gptq": Scheme(INT4, rounding="gptq"),
    "int4-awq": Scheme(INT4, scaling="awq"),
    "int4-awq-gptq": Scheme(INT4, rounding="gptq", scaling="awq", refined=True),
    "int4-rotated-gptq": Scheme(INT4, rounding="gptq", rotated=True, refined=True),
    "mixed": Scheme(INT4, rounding="gptq", wider=INT8),
    "fp8": Scheme(FP8, ActivationFormat(True, number="float")),
    "fp8-static": Scheme(FP8, ActivationFormat(False, number="float")),
    "nf4": Scheme(INT4, library_type="nf4"),
    "fp4": Scheme(INT4, library_type="fp4"),
    "llm-int8": Scheme(INT8, library_type="int8"),
}

SchemeName = Literal[
    "int8-weight",
    "int8-dynamic",
    "int8-static",
    "int8-smoothquant",
    "int4-weight",
    "int4-gptq",
    "int4-awq",
    "int4-awq-gptq",
    "int4-rotated-gptq",
    "mixed",
    "fp8",
    "fp8-static",
    "nf4",
    "fp4",
    "llm-int8",
]


class Quantization(Settings):
    """How a model is quantized.

    ``group_size`` is by default the largest of 128, 64 and 32 that divides every layer's inputs;
    groups that are not ``symmetric`` have a zero point each. By the observer ``minmax`` a scale is
    found at once, as in quantization-aware training. ``bits`` is what a weight of ``mixed`` takes
    on average, scales and zero points counted. With ``key_value_cache`` keys and values have scales
    too, for a cache of 8 bits, from the texts of the calibration. ``layout`` is how the folder
    holds 4-bit weights: as compressed-tensors does, or GPTQ's own tools.
    """

    scheme: SchemeName
    group_size: PositiveInt | None = None
    symmetric: bool = True
    observer: Observer = "mse"
    bits: float | None = Field(default=None, gt=4, le=8)
    key_value_cache: CacheNumber | None = None
    layout: Layout = "compressed-tensors"

    @property
    def budget(self) -> float | None:
        """Bits a weight on average, of a scheme that chooses."""
        return None if SCHEMES[self.scheme].wider is None else self.bits or MIXED_BITS

    def composition(self) -> Scheme:
        """The scheme's parts."""
        scheme = SCHEMES[self.scheme]
        weights = replace(scheme.weights, symmetric=self.symmetric, observer=self.observer)
        return replace(scheme, weights=weights, cache=self.key_value_cache)

    @property
    def calibrates(self) -> str | None:
        """What of it takes texts, if anything does."""
        if SCHEMES[self.scheme].calibrated:
            return self.scheme
        return None if self.key_value_cache is None else f"key_value_cache {self.key_value_cache}"

    def misplaced(self) -> Iterable[tuple[str, str]]:
        """Settings that the scheme has no use for, each with what is wrong."""
        if not SCHEMES[self.scheme].grouped:
            grouped = choices([name for name, scheme in SCHEMES.items() if scheme.grouped])
            if self.group_size is not None:
                yield "group_size", f"{self.scheme} has no groups; remove it, or use {grouped}"
            if not self.symmetric:
                yield "symmetric", f"{self.scheme} has no zero points; remove it, or use {grouped}"
        if self.observer != "mse" and not SCHEMES[self.scheme].plain:
            plain = choices([name for name, scheme in SCHEMES.items() if scheme.plain])
            yield "observer", f"{self.scheme} has ranges of its own; remove it, or use {plain}"
        if self.bits is not None and SCHEMES[self.scheme].wider is None:
            yield "bits", f"{self.scheme} has bits of its own; remove it, or use mixed"
        if self.key_value_cache and SCHEMES[self.scheme].library_type:
            yield (
                "key_value_cache",
                f"{self.scheme} has no scales for it; remove it, or use int8-weight",
            )
        if self.layout == "gptq":
            yield from self._beyond_gptq()

    def _beyond_gptq(self) -> Iterable[tuple[str, str]]:
        """What GPTQ's own layout cannot hold."""
        if not SCHEMES[self.scheme].grouped or self.budget is not None:
            held = choices(
                [name for name, one in SCHEMES.items() if one.grouped and one.wider is None]
            )
            yield "layout", f"gptq holds no {self.scheme}; remove it, or use {held}"
        if self.group_size not in (None, *GROUP_SIZES):
            yield "group_size", f"layout gptq is read in groups of {choices(GROUP_SIZES)}; use one"
        if not self.symmetric:
            yield "symmetric", "layout gptq is written without zero points; remove one of them"
        if self.key_value_cache:
            yield "key_value_cache", "layout gptq has no scales for it; remove one of them"


class QuantizationAware(Settings):
    """Training whose weights are rounded, wherever the model computes, as ``scheme`` stores them.

    ``group_size`` and ``symmetric`` are as where the model is quantized, with the observer
    ``minmax``: a search of ranges at every step would take longer than the step.
    """

    scheme: Literal["int8-weight", "int4-weight"]
    group_size: PositiveInt | None = None
    symmetric: bool = True

    def quantization(self) -> Quantization:
        """How the trained model is to be quantized."""
        return Quantization(**self.model_dump(), observer="minmax")


def fitting_group_size(wanted: int | None, columns: Iterable[int]) -> tuple[int, str]:
    """A group size that divides every layer's inputs, and a line on why, where it is not 128.

    Raises:
        RecipeError: if the one wanted does not, or none of the usual ones.
    """
    widths = sorted(set(columns))
    tried = GROUP_SIZES if wanted is None else (wanted,)
    for size in tried:
        undivided = [width for width in widths if width % size]
        if not undivided:
            larger = [other for other in tried if other > size]
            if not larger:
                return size, ""
            first = next(width for width in widths if width % larger[-1])
            return (
                size,
                f"group size {size}: {larger[-1]} does not divide {first} inputs of a layer",
            )
    common = [size for size in divisors(widths[0]) if not any(width % size for width in widths)]
    fitting = choices([size for size in common if size >= 8][-4:] or common[-1:])
    raise RecipeError(
        f"group_size: {choices(tried)} does not divide {undivided[0]} inputs of a layer; "
        f"use {fitting}"
    )
