"""What a recipe says to SLURM: ``cluster.slurm``, checked so that nothing of it is executed."""

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from llmscale.settings import Settings, shown

OWN_OPTIONS = (
    "array",
    "begin",
    "chdir",
    "dependency",
    "error",
    "export",
    "export-file",
    "input",
    "job-name",
    "kill-on-invalid-dep",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
    "uid",
    "wait",
    "wrap",
)


def _matching(pattern: str, rule: str) -> AfterValidator:
    """A text that matches a pattern whole, or a line that says by what rule it does not."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value, re.ASCII) is None:
            raise ValueError(f"{shown(value)} cannot be given to SLURM; use {rule}")
        return value

    return AfterValidator(check)


def _known_option(value: str) -> str:
    name = value[2:].split("=")[0]
    # sbatch takes any beginning of an option's name for that option
    if own := next((option for option in OWN_OPTIONS if option.startswith(name)), None):
        raise ValueError(f"--{own} is set by llmscale; remove it")
    return value


Word = Annotated[
    str, _matching(r"[\w][\w.,:@/+-]*", "letters, digits and .,:@/+-_, no space, a letter first")
]
Constraint = Annotated[
    str, _matching(r"[\w(\[][\w.,:&|()\[\]*+-]*", "names of features joined by & | ( ) [ ] * and ,")
]
TimeLimit = Annotated[
    str,
    _matching(
        r"\d+|(\d+-)?\d{1,2}(:\d{2}){1,2}", "minutes in quotes, or [days-]hours:minutes:seconds"
    ),
]
Module = Annotated[str, _matching(r"[\w][\w./+:@=~-]*", "a module's name like cuda/12.4")]
VariableName = Annotated[
    str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "letters, digits and _, a letter first")
]
Text = Annotated[str, _matching(r"[^\x00]*", "text without null characters")]
OneLine = Annotated[
    str,
    _matching(r"[^\x00-\x20\x7f-][^\x00-\x1f\x7f]*", "one line of text that does not begin with -"),
]
Mount = Annotated[
    str, _matching(r"/[^\x00-\x1f\x7f,]*", "/HOST/PATH:/CONTAINER/PATH without commas")
]
Option = Annotated[
    str,
    _matching(
        r"--[a-z][a-z0-9-]*(=[^\x00-\x1f\x7f]*)?", "an option of sbatch like --mail-type=END"
    ),
    AfterValidator(_known_option),
]


class Container(Settings):
    """The image that ranks run in, by NVIDIA's pyxis (``srun --container-image``).

    ``python`` is the interpreter in the image. The run folder is mounted by itself.
    """

    image: OneLine
    mounts: tuple[Mount, ...] = ()
    python: OneLine = "python3"


class SlurmSettings(Settings):
    """What a job asks of SLURM besides its nodes.

    ``extra_lines`` are further options of sbatch, one a line. ``restarts`` is how often in a
    row a job that makes no progress is started again. Ranks are asked to save
    ``save_seconds`` before the time limit.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Constraint | None = None
    time_limit: TimeLimit | None = None
    gpus_per_node: NonNegativeInt | None = None
    cpus_per_rank: PositiveInt | None = None
    memory_gib_per_node: PositiveInt | None = None
    modules: tuple[Module, ...] = ()
    container: Container | None = None
    environment: dict[VariableName, Text] = Field(default={}, max_length=1000)
    extra_lines: tuple[Option, ...] = ()
    launcher: Literal["srun", "torchrun"] = "srun"
    restarts: NonNegativeInt = 3
    save_seconds: PositiveInt = 120

    def options(self) -> Iterable[tuple[str, str]]:
        """Options of sbatch that hold for every job of a run."""
        for name in ("partition", "account", "qos", "constraint"):
            if (value := getattr(self, name)) is not None:
                yield name, value
        if self.time_limit is not None:
            yield "time", self.time_limit
        if self.memory_gib_per_node is not None:
            yield "mem", f"{self.memory_gib_per_node}G"
