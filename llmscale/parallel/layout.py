"""The layout of a model over ranks: a few integers and a check."""

import math
from collections.abc import Iterator

from pydantic import PositiveInt

from llmscale.settings import Problem, Settings, choices, divisors, nearest, nearest_multiples


class Layout(Settings):
    """How many ways each dimension is split.

    ``tensor * pipeline * context * data`` is the number of ranks. ``virtual_pipeline`` is the
    number of model chunks each pipeline stage holds (interleaved 1F1B; Narayanan et al. 2021,
    section 2.2). ``sequence`` splits the activations between tensor-parallel regions along
    the sequence (Korthikanti et al. 2022). ``context`` splits every sequence over ranks.
    ``expert`` deals the experts out, each whole, to the ranks of ``tensor * context * data``.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    data: PositiveInt | None = None
    expert: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    layers_per_stage: tuple[PositiveInt, ...] | None = None
    sequence: bool = False

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def data_ranks(self, ranks: int) -> int:
        """Copies of the model among ``ranks`` ranks."""
        return self.data or max(1, ranks // self.model_ranks)

    def problems(
        self, *, ranks: int, whose: str = "cluster.nodes x cluster.ranks_per_node"
    ) -> Iterator[Problem]:
        """What stops this layout on that many ranks, whatever the model.

        Args:
            whose: what has that many.
        """
        degrees = f"tensor {self.tensor} x pipeline {self.pipeline}"
        if self.context > 1:
            degrees += f" x context {self.context}"
        if self.data is not None and self.model_ranks * self.data != ranks:
            yield Problem(
                ("data",),
                f"{degrees} x data {self.data} is "
                f"{self.model_ranks * self.data} ranks, but {whose} is {ranks}; use "
                f"{self._other_data(ranks)}"
                f"{self.model_ranks * self.data} ranks",
            )
        elif ranks % self.model_ranks:
            yield Problem(
                ("tensor",),
                f"{degrees} = {self.model_ranks} does not "
                f"divide the {ranks} ranks of the cluster; use "
                f"{nearest_multiples(ranks, self.model_ranks)} ranks",
            )
        elif (sharing := ranks // self.pipeline) % self.expert:
            yield Problem(
                ("expert",),
                f"{self.expert} does not divide the {sharing} ranks of a pipeline stage; "
                f"use {choices(nearest(divisors(sharing), self.expert))}",
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            yield Problem(
                ("virtual_pipeline",), "needs pipeline above 1; remove it or set pipeline: 2"
            )
        if self.sequence and self.tensor == 1:
            yield Problem(("sequence",), "needs tensor above 1; remove it or set tensor: 2")

    def _other_data(self, ranks: int) -> str:
        return "" if ranks % self.model_ranks else f"data {ranks // self.model_ranks}, or "

    def length_problems(self, length: int) -> Iterator[Problem]:
        """What stops samples of ``length`` tokens from being split."""
        pieces = 2 * self.context if self.context > 1 else 1
        if length % pieces:
            yield Problem(
                ("context",),
                f"2 x context {self.context} does not divide sequence_length {length}; "
                f"use sequence_length {nearest_multiples(length, pieces)}",
            )
        elif self.sequence and length // self.context % self.tensor:
            parts = math.lcm(pieces, self.context * self.tensor)
            of = f"tensor {self.tensor}" + (f" x context {self.context}" if pieces > 1 else "")
            yield Problem(
                ("sequence",),
                f"{of} does not divide sequence_length {length}; "
                f"use sequence_length {nearest_multiples(length, parts)}, "
                "or remove sequence",
            )

    def stage_problems(self, layers: int) -> Iterator[Problem]:
        """What stops the layers from being laid out over the pipeline."""
        chunks = self.pipeline * self.virtual_pipeline
        if self.layers_per_stage is not None:
            if len(self.layers_per_stage) != chunks:
                yield Problem(
                    ("layers_per_stage",),
                    f"lists {len(self.layers_per_stage)} for {chunks} stages (pipeline "
                    f"{self.pipeline} x virtual_pipeline {self.virtual_pipeline}); list {chunks}",
                )
            elif sum(self.layers_per_stage) != layers:
                yield Problem(
                    ("layers_per_stage",),
                    f"sums to {sum(self.layers_per_stage)} layers, but the model has {layers}; "
                    f"make it sum to {layers}",
                )
        elif layers % chunks:
            key = "virtual_pipeline" if layers % self.pipeline == 0 else "pipeline"
            fixed = self.pipeline if key == "virtual_pipeline" else self.virtual_pipeline
            smallest = 2 if key == "pipeline" and self.virtual_pipeline > 1 else 1
            degrees = (d // fixed for d in divisors(layers) if d % fixed == 0)
            valid = nearest((d for d in degrees if d >= smallest), chunks // fixed)
            mends = [f"use {choices(valid)}"] if valid else []
            mends += ["lay the layers out by layers_per_stage"] if layers > chunks else []
            yield Problem(
                (key,),
                f"{self._chunks_in_words()} stages do not divide {layers} layers; "
                f"{', or '.join(mends) or 'use fewer stages'}",
            )

    def _chunks_in_words(self) -> str:
        if self.virtual_pipeline == 1:
            return f"{self.pipeline} pipeline"
        return (
            f"pipeline {self.pipeline} x virtual_pipeline {self.virtual_pipeline} = "
            f"{self.pipeline * self.virtual_pipeline}"
        )
