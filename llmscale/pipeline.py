"""A recipe's stages in order: what is finished is skipped, what is not is resumed."""

import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from llmscale.artifacts import (
    MANIFEST,
    RunFolder,
    folder_fingerprint,
    now,
    remove_leftovers,
    write_text,
)
from llmscale.clusters.base import Cluster, Job, Task
from llmscale.errors import Interrupted, LlmscaleError, RecipeError
from llmscale.recipe.recipe import Recipe

NAMED_PACKAGES = ("llmscale", "torch", "megatron-core", "transformers", "tokenizers", "numpy")


class Display(Protocol):
    """Who is told how a run goes."""

    def stage_skipped(self, name: str) -> None:
        """The stage was finished before."""

    def stage_started(self, name: str, task: str, ranks: int) -> None:
        """A task of the stage begins."""

    def stage_finished(self, name: str, metrics: dict[str, object]) -> None:
        """The stage is done."""

    def note(self, line: str) -> None:
        """Anything else worth a line."""


@dataclass(frozen=True)
class Plan:
    """What running a stage now would mean."""

    name: str
    fingerprint: str
    action: str
    """``skip``, ``start``, ``resume`` or ``rerun``."""


def common_place(name: str) -> Path:
    """Where a sweep's member links to for what all members have in common."""
    return Path("..", "..", name)


@dataclass
class Pipeline:
    """A recipe in a run folder, on a cluster."""

    recipe: Recipe
    folder: RunFolder
    cluster: Cluster
    display: Display

    def run(self, only: Iterable[str] | None = None, fresh: bool = False) -> None:
        """Runs, or resumes, the stages.

        Args:
            only: these stages alone, or single tasks of them as ``STAGE.TASK``.
            fresh: keep the stages' former results aside and start over.

        Raises:
            RecipeError: if the folder is in use, or a chosen stage needs an unfinished one.
            StageError: if a stage failed.
            Interrupted: if the user or the system stopped the run.
        """
        chosen = self.chosen(only)
        self._require_inputs(chosen)
        with self.folder.locked():
            write_text(self.folder.recipe_file, self.recipe.to_yaml())
            self.folder.push(self.folder.recipe_file.name)
            self.folder.pull(*(f"{name}/{MANIFEST}" for name in self.recipe.order()))
            if fresh:
                self.set_aside(chosen)
            for name in chosen:
                self._run_stage(name, self.tasks_of(name, only))

    def set_aside(self, names: Iterable[str]) -> None:
        """Keeps the former results of stages where they are not in the way."""
        for name in names:
            if self.folder.stage(name).path.exists():
                kept = self.folder.set_aside(name)
                self.display.note(f"{name}: the former result is kept in {kept}")

    def jobs(self, only: Iterable[str] | None = None) -> list[Job]:
        """The tasks of the stages that are not finished, in order.

        Raises:
            RecipeError: if a chosen stage needs an unfinished one.
        """
        self._require_inputs(self.chosen(only))
        return [
            self._job(plan.name, task)
            for plan in self.plans(only)
            if plan.action != "skip"
            for task in self.tasks_of(plan.name, only)
        ]

    def tasks(self, only: Iterable[str] | None = None) -> list[Task]:
        """The tasks of the stages, finished or not, in order."""
        return [task for name in self.chosen(only) for task in self.tasks_of(name, only)]

    def plans(self, only: Iterable[str] | None = None) -> list[Plan]:
        """What ``run`` would do with each stage, in order."""
        return [self._plan(name) for name in self.chosen(only)]

    def chosen(self, only: Iterable[str] | None) -> list[str]:
        """The names of the stages, in order."""
        order = self.recipe.order()
        if only is None:
            return order
        wanted = [name.partition(".")[0] for name in only]
        for name in wanted:
            if name not in order:
                raise RecipeError(f"--stages: {name!r} is no stage; use {', '.join(order)}")
        return [name for name in order if name in wanted]

    def tasks_of(self, name: str, only: Iterable[str] | None) -> tuple[Task, ...]:
        """The chosen tasks of a stage: all of them, unless some are named."""
        tasks = self.recipe.stages[name].tasks(self.recipe.cluster)
        named = [wanted.partition(".")[2] for wanted in only or () if wanted.startswith(f"{name}.")]
        for task in named:
            if task not in [known.name for known in tasks]:
                raise RecipeError(
                    f"--stages: {name} has no task {task!r}; "
                    f"use {', '.join(f'{name}.{known.name}' for known in tasks)}"
                )
        return tuple(task for task in tasks if not named or task.name in named)

    def _require_inputs(self, chosen: list[str]) -> None:
        for name in chosen:
            for needed in self.recipe.stages[name].linked(self.recipe.stages).values():
                if needed not in chosen and self._plan(needed).action != "skip":
                    raise RecipeError(
                        f"--stages: {name} needs {needed}, which is not finished; add it"
                    )

    def _fingerprint(self, name: str) -> str:
        stage = self.recipe.stages[name]
        linked = stage.linked(self.recipe.stages)
        inputs = {key: self._fingerprint(needed) for key, needed in linked.items()}
        for named in stage.named():
            if named.key not in inputs:
                inputs[named.key] = folder_fingerprint(Path(named.name))
        return stage.fingerprint(self.recipe.seed, inputs)

    def _plan(self, name: str) -> Plan:
        manifest = self.folder.stage(name).manifest()
        wanted = self._fingerprint(name)
        if not manifest:
            action = "start"
        elif manifest.get("fingerprint") != wanted:
            action = "rerun"
        else:
            action = "skip" if manifest.get("status") == "finished" else "resume"
        return Plan(name, wanted, action)

    def _run_stage(self, name: str, tasks: tuple[Task, ...]) -> None:
        plan = self._plan(name)
        if plan.action == "skip":
            self.display.stage_skipped(name)
            return
        stage = self.recipe.stages[name]
        linked = stage.linked(self.recipe.stages)
        own = self.folder.stage(name).path
        if own.is_symlink() and own.readlink() == common_place(name):
            raise RecipeError(
                f"{own}: all members of the sweep have this stage in common, and it is not "
                "finished; run the sweep"
            )
        if plan.action == "rerun":
            kept = self.folder.set_aside(name)
            self.display.note(f"{name}: the recipe changed; the former result is kept in {kept}")
        folder = self.folder.stage(name)
        remove_leftovers(folder.path)
        remove_leftovers(folder.checkpoints)
        folder.update_manifest(
            stage=name,
            kind=stage.kind,
            status="running",
            fingerprint=plan.fingerprint,
            inputs={
                key: {"stage": n, "fingerprint": self._fingerprint(n)} for key, n in linked.items()
            },
            started=folder.manifest().get("started", now()),
            finished=None,
            error=None,
            versions=_versions(),
        )
        manifest = f"{name}/{MANIFEST}"
        self.folder.push(manifest)
        try:
            for task in tasks:
                folder.progress_file.unlink(missing_ok=True)
                self.display.stage_started(name, task.name, task.ranks)
                self.cluster.run(self._job(name, task))
        except LlmscaleError as error:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            with suppress(OSError, LlmscaleError):  # on a full disk, the error itself matters more
                folder.update_manifest(status=status, error=str(error))
                self.folder.push(manifest)
            raise
        if tasks[-1] != stage.tasks(self.recipe.cluster)[-1]:
            return
        folder.update_manifest(status="finished", finished=now(), outputs=self._outputs(name))
        self.folder.push(manifest)
        self.display.stage_finished(name, folder.manifest().get("metrics", {}))

    def _job(self, name: str, task: Task) -> Job:
        folder, stages = self.folder, self.recipe.stages
        linked = stages[name].linked(stages).values()
        reads = tuple(f"{needed}/{stages[needed].product}".rstrip("/") for needed in linked)
        url = None if folder.mirror is None else folder.mirror.url
        return Job(folder.path.absolute(), name, task, url, reads)

    def _outputs(self, name: str) -> list[str]:
        """What the stage's folder holds; at a URL, all of what its nodes have sent there."""
        if self.folder.mirror is not None:
            return self.folder.mirror.parts(name)
        files = self.folder.stage(name).path.iterdir()
        return sorted(file.name for file in files if not file.name.startswith("."))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in NAMED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
