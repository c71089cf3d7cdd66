"""Running a sweep: what its members have in common once, then each of them."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llmscale.artifacts import write_text
from llmscale.clusters.base import Task
from llmscale.clusters.slurm.jobs import array, chain
from llmscale.clusters.slurm.script import BatchJob
from llmscale.errors import RecipeError, StageError
from llmscale.launch import Request, run_pipeline
from llmscale.pipeline import Pipeline, common_place
from llmscale.recipe.recipe import Recipe
from llmscale.recipe.sweep import grid, in_words
from llmscale.status import members as members_of


@dataclass(frozen=True)
class Member:
    """One combination of a sweep's values: a recipe with a run folder of its own.

    Attributes:
        request: to run the stages that are not common to all members.
    """

    number: str
    values: Mapping[str, Any]
    request: Request

    def lay_out(self, common: Sequence[str], code: Path | None) -> None:
        """Writes its recipe, and links to the stages that all members have in common.

        Args:
            code: the sweep's snapshot of the package, if the member's job is to run from it.
        """
        folder, recipe = self.request.folder, self.request.recipe
        text = recipe.to_yaml()
        amiss = [n for n in recipe.stages if folder.stage(n).path.is_symlink() != (n in common)]
        known = folder.recipe_file.exists() and folder.recipe_file.read_text("utf-8") == text
        own_code = code is not None and not (folder.path / code.name).is_symlink()
        if known and not amiss and not own_code:
            return
        with folder.locked():
            for name in amiss:
                place = folder.stage(name).path
                if name not in common:
                    place.unlink()
                    continue
                if place.exists():
                    folder.set_aside(name)
                place.symlink_to(common_place(name))
            if code is not None and own_code:
                shutil.rmtree(folder.path / code.name, ignore_errors=True)
                (folder.path / code.name).symlink_to(common_place(code.name))
            write_text(folder.recipe_file, text)

    def __str__(self) -> str:
        return f"member {self.number}: {in_words(self.values)}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as the requests that it stands for.

    Attributes:
        common: to run, in the sweep's own folder, the stages that are the same in all members.
        common_stages: all of these, also those that were not asked for.
    """

    common: Request
    common_stages: tuple[str, ...]
    members: tuple[Member, ...]

    @staticmethod
    def of(request: Request) -> "Sweep":
        """The sweep of a request whose recipe has one."""
        recipe, recipes = request.recipe, request.recipe.members()
        same = _common_stages(recipe, recipes)
        asked = list(request.stages or recipe.order())
        own = [name for name in asked if name.partition(".")[0] not in same]
        common = replace(request, stages=[name for name in asked if name not in own])
        numbered = zip(grid(recipe.sweep or {}).items(), recipes, strict=True)
        members = tuple(
            Member(
                number,
                values,
                replace(request, recipe=member, folder=request.folder.member(number), stages=own),
            )
            for (number, values), member in numbered
        )
        return Sweep(common, tuple(same), members)

    def lay_out(self, code: Path | None = None) -> None:
        """Makes the members' folders ready to run in, on SLURM with a snapshot of the package."""
        for member in self.members:
            member.lay_out(self.common_stages, code)

    def require_inputs(self) -> None:
        """Checks that what the chosen stages need is finished or chosen.

        Raises:
            RecipeError: if it is not.
        """
        requests = [self.common, *(member.request for member in self.members)]
        chosen = [request.pipeline().chosen(request.stages) for request in requests]
        all_chosen = {name for names in chosen for name in names}
        for request, names in zip(requests, chosen, strict=True):
            for name in names:
                for needed in request.recipe.stages[name].linked(request.recipe.stages).values():
                    owner = self.common if needed in self.common_stages else request
                    if needed not in all_chosen and not owner.finished([needed]):
                        raise RecipeError(
                            f"--stages: {name} needs {needed}, which is not finished; add it"
                        )

    def dry_run(self) -> dict[str, Any]:
        """What would run, and what it would do with each stage, whatever the cluster."""
        members = [
            {"member": m.number, "values": m.values, "tasks": m.request.dry_run()["tasks"]}
            for m in self.members
        ]
        return {**self.common.dry_run(), "sweep": members}

    def jobs(self, code: Path | None) -> list[BatchJob]:
        """The batch jobs of what is left to run: a chain of common tasks, then one array."""
        recipe, folder = self.common.recipe, self.common.folder
        tasks = self.common.pipeline().jobs(self.common.stages)
        jobs = chain(recipe.name, folder, tasks, code)
        left = [
            member for member in self.members if not member.request.finished(member.request.stages)
        ]
        if left:
            request = left[0].request
            numbers, stages = [member.number for member in left], list(request.stages or ())
            largest = _largest(request.pipeline().tasks(stages))
            jobs.append(array(recipe.name, folder, numbers, stages, largest, code))
        return jobs


def dry_run(request: Request) -> dict[str, Any]:
    """What would run of a request, and of each member if its recipe has a sweep."""
    return Sweep.of(request).dry_run() if request.recipe.sweep else request.dry_run()


def _common_stages(recipe: Recipe, members: Sequence[Recipe]) -> list[str]:
    """The stages that are the same in the recipe and all members, with all they need.

    The same settings, not merely the same fingerprint: members that differ by their layout
    have the same result, but are run to be compared.
    """
    same: list[str] = []
    for name in recipe.order():
        stage = recipe.stages[name]
        equal = all(m.stages[name] == stage and m.seed == recipe.seed for m in members)
        if equal and all(needed in same for needed in stage.linked(recipe.stages).values()):
            same.append(name)
    return same


def _largest(tasks: Sequence[Task]) -> Task:
    return max(tasks, key=lambda task: (task.nodes, task.ranks, task.on_device))


def run_sweep(
    request: Request, pipeline: Callable[[Request], Pipeline], console: Console
) -> dict[str, Any]:
    """Runs what the members have in common, then each member; none stops the others.

    Args:
        pipeline: the stages of a request on the cluster they are to run on.

    Raises:
        RecipeError: if the folder is in use, or a chosen stage needs an unfinished one.
        StageError: if a common stage failed, or members did.
        Interrupted: if the user or the system stopped the run.
    """
    sweep = Sweep.of(request)
    if request.stages is not None:
        sweep.require_inputs()
    with request.folder.locked():
        sweep.lay_out()
        answer = run_pipeline(pipeline(sweep.common), sweep.common, console)
        members = [member for member in sweep.members if member.request.stages]
        for member in members:
            own = member.request
            if not own.fresh and own.finished(own.stages):
                console.print(f"{member}: finished before", markup=False)
                continue
            console.print(str(member), markup=False)
            try:
                run_pipeline(pipeline(own), own, console)
            except StageError as error:
                console.print(f"member {member.number} failed: {error}", markup=False)
    answer["sweep"] = members_of(request.folder, request.recipe, {})
    if members:
        require_no_failure(answer["sweep"], answer)
    return answer


def require_no_failure(rows: Sequence[Mapping[str, Any]], answer: dict[str, Any]) -> None:
    """Checks that no member of a sweep failed.

    Args:
        answer: what is known of the sweep all the same.

    Raises:
        StageError: if some did; names them, and the first one's error.
    """
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        numbers = ", ".join(row["member"] for row in failed)
        several = f"members {numbers} of {len(rows)}" if len(failed) > 1 else f"member {numbers}"
        error = StageError(f"{several} failed; {failed[0]['member']}: {failed[0]['error']}")
        error.answer = answer
        raise error
