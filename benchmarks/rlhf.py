"""Learning from rewards, beside TRL 1.12's PPO (its last release with one), GRPO and RLOO of 1.16.

The task: a random Llama of two layers (hidden size 64, 30 tokens) learns to write one of its
tokens; an answer of 16 tokens is worth that token's share of them, by chance 0.033. An update
learns of 64 answers. All start from the same weights, with the same learning rates, KL
coefficients and number of threads, each in a process of its own, in turns.

Seconds are those of iterations alone, until one whose answers are worth 0.95 in the mean: ours are
``step_seconds`` of ``metrics.jsonl``; TRL's are from the beginning of ``train()`` on, from callback
to callback. Starting processes, loading models and writing checkpoints is in neither. TRL's
environments are made in FOLDER, if they are not there.

    python benchmarks/rlhf.py [FOLDER] [SEEDS]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"]
RELEASES = {"ppo": "1.12.0", "grpo": "1.16.0", "rloo": "1.16.0"}
GROUPS = {"prompts": 8, "answers": 8, "max_new_tokens": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {
        "rollout": {"prompts": 64, "max_new_tokens": 16},
        "learning_rate": 1e-3,
        "kl": 1e-3,
        "passes": 4,
        "iterations": 40,
    },
    "grpo": {
        "rollout": GROUPS,
        "learning_rate": 5e-3,
        "kl": 0.0,
        "passes": 1,
        "iterations": 40,
    },
    "rloo": {
        "rollout": GROUPS,
        "learning_rate": 5e-3,
        "kl": 1e-3,
        "passes": 1,
        "iterations": 40,
    },
}
"""Passes are TRL's defaults. Where its default has a reference, both sides have one, with a KL
coefficient that lets 0.95 be reached: to write one token alone is 16 ln 30 = 54 nats away. With a
learning rate of 3e-3 TRL's PPO does not reach 0.95 in 80 iterations."""
EPSILON, THREADS = 1e-5, 1
GOAL = 0.95

Iteration = dict[str, float]


@dataclass(frozen=True)
class Learned:
    """What came of one run: ``seconds`` and ``iterations`` to the goal, if it was reached."""

    seconds: float | None
    iterations: int | None
    seconds_each: float
    reward: float

    @classmethod
    def of(cls, told: list[Iteration]) -> "Learned":
        """From each iteration's seconds and reward."""
        seconds = [one["seconds"] for one in told]
        reached = next((n for n, one in enumerate(told, 1) if one["reward"] >= GOAL), None)
        return cls(
            seconds=sum(seconds[:reached]) if reached else None,
            iterations=reached,
            seconds_each=statistics.median(seconds),
            reward=told[-1]["reward"],
        )


def environment(folder: Path, release: str) -> Path:
    """The Python of an environment with that release of TRL, made if it is not there."""
    home = folder / f"trl-{release}"
    made, python = home / "made", home / "bin" / "python"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", f"trl=={release}", *PACKAGES]
        subprocess.run(install, check=True)
        made.touch()
    return python


def ours(algorithm: str, seed: int, folder: Path) -> Learned:
    """A stage of kind ppo on one rank, by ``llmscale run``; leaves the model in ``base``."""
    sys.path.insert(0, str(ROOT))
    from tests.rlhf.letters import letters_home

    own = SETTINGS[algorithm]
    optimizer = {
        "learning_rate": own["learning_rate"],
        "schedule": "constant",
        "weight_decay": 0.0,
        "beta2": 0.999,
        "epsilon": EPSILON,
    }
    home = letters_home(
        folder,
        seed=seed,
        algorithm=algorithm,
        rollout=own["rollout"],
        kl={"coefficient": own["kl"]},
        update={"passes": own["passes"]},
        optimizer=optimizer,
        validation_fraction=0.0,
        steps=own["iterations"],
    )
    command = [sys.executable, "-m", "llmscale", "run", str(home / "recipe.yaml")]
    environment = os.environ | {"LLMSCALE_CORES": str(THREADS), "OMP_NUM_THREADS": str(THREADS)}
    said = subprocess.DEVNULL
    subprocess.run(
        [*command, "--run-dir", str(folder / "run")], check=True, env=environment, stderr=said
    )
    lines = (folder / "run" / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [one for one in map(json.loads, lines) if "step_seconds" in one]
    return Learned.of([{"seconds": s["step_seconds"], "reward": s["reward"]} for s in steps])


def theirs(algorithm: str, seed: int, folder: Path, python: Path) -> Learned:
    """TRL's trainer, on the model and prompts that ``ours`` left."""
    own = SETTINGS[algorithm]
    prompts = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    settings = {
        "folder": str(folder / "trl"),
        "model": str(folder / "base"),
        "prompts": [json.loads(line)["prompt"] for line in prompts],
        "wanted": "e",
        "seed": seed,
        "samples": own["rollout"]["prompts"] * own["rollout"].get("answers", 1),
        "answers": own["rollout"].get("answers", 1),
        "answer_tokens": own["rollout"]["max_new_tokens"],
        "learning_rate": own["learning_rate"],
        "epsilon": EPSILON,
        "kl": own["kl"],
        "passes": own["passes"],
        "iterations": own["iterations"],
        "threads": THREADS,
    }
    file = folder / "settings.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    worker = str(Path(__file__).with_name("rlhf_trl.py"))
    done = subprocess.run(
        [str(python), worker, algorithm, str(file)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
    )
    return Learned.of(json.loads(done.stdout.splitlines()[-1]))


def told(name: str, runs: list[Learned]) -> str:
    """A line of the table: medians over the seeds, and the final reward's range."""
    reached = [run for run in runs if run.seconds is not None]
    cells = [f"{name:<14}", f"{len(reached)} of {len(runs)}"]
    if reached:
        cells.append(f"{statistics.median(run.seconds or 0.0 for run in reached):7.2f}")
        cells.append(f"{statistics.median(run.iterations or 0 for run in reached):4.0f}")
    else:
        cells += [f"{'-':>7}", f"{'-':>4}"]
    cells.append(f"{statistics.median(run.seconds_each for run in runs):6.3f}")
    final = [run.reward for run in runs]
    cells.append(f"{min(final):.3f} to {max(final):.3f}")
    return " | ".join(cells)


def main(folder: Path, seeds: int) -> None:
    """Prints a table."""
    pythons = {release: environment(folder, release) for release in set(RELEASES.values())}
    found: dict[str, list[tuple[Learned, Learned]]] = {name: [] for name in SETTINGS}
    for seed in range(1, seeds + 1):
        for algorithm, runs in found.items():
            python = pythons[RELEASES[algorithm]]
            with tempfile.TemporaryDirectory() as place:
                own = ours(algorithm, seed, Path(place))
                runs.append((own, theirs(algorithm, seed, Path(place), python)))
            print(f"seed {seed}, {algorithm}: {runs[-1]}", file=sys.stderr, flush=True)
    print(f"trainer | reach {GOAL} | seconds | iterations | seconds each | final reward")
    for algorithm, runs in found.items():
        mine, peer = zip(*runs, strict=True)
        print(told(f"{algorithm}, llmscale", list(mine)))
        print(told(f"{algorithm}, TRL {RELEASES[algorithm]}", list(peer)))
        both = [(a.seconds, b.seconds) for a, b in runs if a.seconds and b.seconds]
        if both:
            ratio = statistics.median(own / other for own, other in both)
            print(f"{algorithm}: llmscale takes {ratio:.2f} of TRL's seconds, the median of seeds")


if __name__ == "__main__":
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmscale" / "rlhf"
    main(
        Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else cache,
        int(sys.argv[2]) if len(sys.argv) > 2 else 5,
    )
