"""What `sftkit doctor` finds: the installation against its own metadata, the machine, and an exit code for what is broken."""

import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core import doctor

Cli = Callable[..., tuple[int, str, str]]


def test_a_sound_installation_has_no_problem(cli: Cli) -> None:
    code, out, _ = cli("doctor")
    assert code == 0
    assert "problem" not in out
    assert f"torch {importlib.metadata.version('torch')}" in out
    assert "sandbox" in out


def test_a_missing_and_an_old_package_are_problems_with_their_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "trl":
            return "0.9"
        if package == "polars":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    problems = {each.about: each.text for each in doctor.examine() if each.level == "problem"}
    assert problems.keys() == {"trl", "polars"}
    assert problems["trl"].startswith("0.9 is installed, sftkit needs ")
    assert "pip install 'polars" in problems["polars"]


def test_a_folder_on_the_path_has_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(package: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = {each.about: each for each in doctor.examine()}
    assert found["packages"].level == "note"
    assert "not installed" in found["packages"].text
    assert "disk" in found  # the rest is looked at all the same


def test_a_card_that_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    which = shutil.which
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name, *rest, **more: "/bin/it" if name == "nvidia-smi" else which(name, *rest, **more))
    code, out, _ = cli("doctor")
    assert code == 1
    assert "problem GPU         there is one, and torch" in out


@pytest.mark.parametrize(("limit", "told"), [(str(3 << 30), True), ("max\n", False)])
def test_a_container_has_the_memory_that_it_was_given(limit: str, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(doctor, "MEMORY_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 24, "SC_PAGE_SIZE": 4096}[name])
    assert f"{3 if told else 64} GiB of memory" in next(each.text for each in doctor.examine() if each.about == "python")


def test_a_full_disk_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 30))
    notes = [each.text for each in doctor.examine() if each.about == "disk"]
    assert f"1 GiB free for this folder, {tmp_path}" in notes
    assert all(each.level == "note" for each in doctor.examine() if each.about == "disk")


def test_a_cache_that_cannot_be_made_is_a_problem_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFTKIT_CACHE", str(tmp_path / "no" / "home"))
    monkeypatch.setattr(doctor.os, "access", lambda place, _: place != tmp_path)
    problems = [each.text for each in doctor.examine() if each.level == "problem" and each.about == "disk"]
    assert problems == [f"{tmp_path} may not be written by this user: SFTKIT_CACHE names another place for the cache"]
