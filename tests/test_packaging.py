"""The wheel holds every package, help stays light, and arrows point down only."""

import ast
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sftkit.cli import sftkit

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "curate", "train", "evaluate", "pipelines")
HEAVY = ("torch", "transformers", "trl", "datasets", "vllm", "sentence_transformers")


def commands(group: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            found += commands(command, (*path, name))
    return found


ALL_COMMANDS = commands(sftkit)


def test_the_wheel_holds_every_package_and_the_quickstart(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in tracked.stdout.split():
        path = Path(name)
        if path.parts[0] in ROOMS or (len(path.parts) == 1 and path.suffix in (".py", ".typed")):
            assert f"sftkit/{name}" in inside, f"{name} is in the repository and not in the wheel"
    assert not [name for name in inside if "tests" in name or "benchmarks" in name]


def test_every_package_that_is_imported_is_declared() -> None:
    """What another package happens to bring along, it may leave out one day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(each for group in project["optional-dependencies"].values() for each in group)]
    names = {canonicalize_name(Requirement(each).name) for each in declared}
    brought_by = importlib.metadata.packages_distributions()
    undeclared: dict[str, list[str]] = {}
    for file in [*ROOT.glob("*.py"), *(each for room in ROOMS for each in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in {each.partition(".")[0] for each in modules} - {"sftkit", *sys.stdlib_module_names}:
                if not {canonicalize_name(each) for each in brought_by.get(module, [module])} & names:
                    undeclared.setdefault(module, []).append(str(file.relative_to(ROOT)))
    assert undeclared == {}


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from sftkit.cli import sftkit\n"
        f"for path in {ALL_COMMANDS!r}:\n"
        "    result = CliRunner().invoke(sftkit, [*path, '--help'])\n"
        "    assert result.exit_code == 0, (path, result.output)\n"
        f"print(json.dumps([name for name in {(*HEAVY, 'polars', 'numpy', 'rich')!r} if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(result.stdout) == []


def test_what_only_reads_files_and_decides_imports_nothing_heavy() -> None:
    names = ("intake", "score", "filters", "dedup", "selection", "mix", "certificate", "show", "export")
    modules = ", ".join(["sftkit.pipelines.report", *(f"sftkit.curate.{name}" for name in names)])
    code = f"import json, sys, {modules}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(result.stdout) == []


def test_help_answers_within_three_tenths_of_a_second() -> None:
    def seconds() -> float:  # of the processor: what else the machine does is not ours
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", "from sftkit.cli import main; import sys; sys.argv=['sftkit','--help']; main()"],
            check=True,
            capture_output=True,
            cwd="/",
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) <= 0.3


@pytest.mark.parametrize("path", ALL_COMMANDS, ids=lambda path: " ".join(path) or "sftkit")
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    command: click.Command = sftkit
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert command.help, f"{' '.join(path)} has no help"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(path)} {parameter.opts[0]} has no help"


def imports_of(file: Path) -> list[str]:
    """Return the rooms that a file of the package imports, from its relative and absolute imports."""
    package = file.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = [*package][: len(package) - node.level + 1] if node.level else []
            name = [*base, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            if not node.level and name[0] != "sftkit":
                continue
            name = [part for part in name if part and part != "sftkit"]
            found += [name[0]] if name else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sftkit.")]
    return [name for name in found if name in ROOMS]


def test_arrows_point_down_only() -> None:
    allowed = {"core": {"core"}, "pipelines": set(ROOMS), **{room: {room, "core"} for room in ("curate", "train", "evaluate")}}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            wrong = set(imports_of(file)) - allowed[room]
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}: rooms meet in files and in core only"


def test_no_circles_between_files() -> None:
    files = {file: f"{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}" for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    names = set(files.values())
    edges: dict[str, set[str]] = {}
    for file, name in files.items():
        targets = set()
        for node in ast.parse(file.read_text()).body:  # imports at the top only: those inside functions run later
            if isinstance(node, ast.ImportFrom) and node.level:
                base = list(file.relative_to(ROOT).parent.parts)[: len(file.relative_to(ROOT).parent.parts) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
                targets |= {module} & names
                targets |= {f"{module}.{alias.name}" for alias in node.names} & names
        edges[name] = targets
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_python_minus_m_works_outside_the_repository(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sftkit", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0
    assert "sftkit" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["nonsense"], "No such command 'nonsense'", 2),
        (["curate", "nonsense"], "No such command 'nonsense'", 2),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], message: str, code: int) -> None:
    result = subprocess.run([sys.executable, "-m", "sftkit", *arguments], capture_output=True, text=True, cwd="/")
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
