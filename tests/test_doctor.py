"""What the doctor promises."""

import importlib
import os
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from llmscale import doctor
from llmscale.doctor import Finding, examine


def found(name: str) -> Finding:
    """The one finding of that name."""
    [finding] = [finding for finding in examine() if finding.name == name]
    return finding


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Lets modules look as if they were not installed."""
    real = doctor.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name in modules else real(name)

    monkeypatch.setattr(doctor, "find_spec", without)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernel shows an NVIDIA GPU."""
    monkeypatch.setattr(doctor, "cuda_present", lambda: True)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one."""
    monkeypatch.setattr(doctor, "cuda_present", lambda: False)


@pytest.mark.parametrize(
    "name", ["python", "cores", "memory", "torch", "megatron-core", "transformers"]
)
@pytest.mark.usefixtures("without_gpu")
def test_what_the_package_needs_is_found_where_it_is_installed(name: str) -> None:
    finding = found(name)
    assert (finding.state, finding.mend) == ("ok", "")
    assert finding.detail


@pytest.mark.parametrize(
    ("module", "name", "mend"),
    [
        ("torch", "torch", "pip install torch"),
        ("megatron", "megatron-core", "pip install megatron-core==0.16.1"),
        ("transformers", "transformers", "pip install transformers"),
    ],
)
def test_a_needed_package_that_is_not_there_is_missing_and_its_mend_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, mend: str
) -> None:
    hide(monkeypatch, module)
    finding = found(name)
    assert (finding.state, finding.mend) == ("missing", mend)


def test_an_untested_megatron_core_is_told_with_the_tested_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "version", lambda distribution: "0.99")
    finding = found("megatron-core")
    assert finding.state == "missing"
    assert "0.99" in finding.detail and "0.16.1" in finding.detail
    assert finding.mend == "pip install megatron-core==0.16.1"


def test_a_torch_that_cannot_be_imported_is_no_crash_but_a_finding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> types.ModuleType:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    findings = {finding.name: finding for finding in examine()}
    assert findings["torch"].state == "missing"
    assert "libcudart.so.12" in findings["torch"].detail
    assert findings["megatron-core"].state == "missing"


OPTIONAL_NAMES = [package.name for package in doctor.OPTIONAL]


@pytest.mark.parametrize("name", OPTIONAL_NAMES)
@pytest.mark.usefixtures("without_gpu")
def test_an_optional_package_is_only_a_note_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hide(monkeypatch, *(package.module.split(".")[0] for package in doctor.OPTIONAL))
    finding = found(name)
    assert finding.state == "note"
    assert "pip install" in finding.mend


@pytest.mark.parametrize("name", ["flash-attn", "transformer-engine"])
@pytest.mark.usefixtures("with_gpu")
def test_on_a_gpu_its_fast_kernels_are_missing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hide(monkeypatch, "flash_attn", "transformer_engine")
    finding = found(name)
    assert finding.state == "missing"
    assert "llmscale[gpu]" in finding.mend


@pytest.fixture
def torch_like(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, list[str]], None]:
    """Puts a torch of the given CUDA build, seeing the given GPUs, in torch's place."""

    def put(cuda: str | None, gpus: list[str]) -> None:
        torch = types.SimpleNamespace(
            __version__="2.13.0",
            version=types.SimpleNamespace(cuda=cuda),
            cuda=types.SimpleNamespace(
                is_available=lambda: bool(gpus),
                device_count=lambda: len(gpus),
                get_device_name=gpus.__getitem__,
            ),
        )
        monkeypatch.setattr(importlib, "import_module", lambda name: torch)

    return put


@pytest.mark.usefixtures("with_gpu")
def test_gpus_are_counted_by_name(torch_like: Callable[[str | None, list[str]], None]) -> None:
    torch_like("12.8", ["H100", "H100", "A100"])
    assert found("gpus") == Finding("gpus", "ok", "2 x H100, 1 x A100")
    assert found("torch") == Finding("torch", "ok", "2.13.0, built for CUDA 12.8")


@pytest.mark.usefixtures("with_gpu")
def test_a_torch_for_the_cpu_on_a_machine_with_a_gpu_is_to_be_mended(
    torch_like: Callable[[str | None, list[str]], None],
) -> None:
    torch_like(None, [])
    assert found("torch").state == "missing"
    assert found("torch").mend == "pip install torch --force-reinstall"
    assert found("gpus").state == "missing"


def package(folder: Path, *names: str) -> None:
    """Makes an importable package whose import would fail."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('imported')\n")


def test_the_other_project_named_apex_is_not_taken_for_nvidias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package(tmp_path, "apex")
    monkeypatch.syspath_prepend(tmp_path)
    finding = found("apex")
    assert finding.state != "ok"
    assert "another project" in finding.detail
    assert finding.mend.startswith("pip uninstall --yes apex && ")
    assert "github.com/NVIDIA/apex" in finding.mend


def test_nvidias_apex_is_known_by_its_optimizers_and_not_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package(tmp_path, "apex", "apex/optimizers")
    monkeypatch.syspath_prepend(tmp_path)
    assert found("apex").state == "ok"


def test_a_folder_that_merely_has_a_packages_name_is_not_that_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deepspeed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "find_spec", _only(tmp_path))
    assert not doctor._found("deepspeed")


def _only(folder: Path) -> Callable[[str], ModuleSpec | None]:
    return lambda name: doctor.PathFinder.find_spec(name, [str(folder)])


def commands(folder: Path, *names: str) -> None:
    """Makes executable files."""
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("present", "states"),
    [
        ((), ["note", "note", "note"]),
        (("sbatch", "srun", "scontrol"), ["ok", "ok", "ok"]),
        (("sbatch",), ["ok", "missing", "missing"]),
    ],
)
def test_slurm_is_all_there_or_not_expected_or_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, present: tuple[str, ...], states: list[str]
) -> None:
    commands(tmp_path, *present)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    findings = [found(name) for name in ("sbatch", "srun", "scontrol")]
    assert [finding.state for finding in findings] == states
    assert all(bool(finding.mend) == (finding.state != "ok") for finding in findings)


def test_a_nearly_full_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(total=2**40, used=2**40 - 2**30, free=2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    finding = found("disk")
    assert finding.state == "note"
    assert "1.0 GiB free" in finding.detail
