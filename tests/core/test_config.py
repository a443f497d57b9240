"""What a settings file may hold, what its faults say, and that a resolved config reads back as itself."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
import yaml
from click.testing import CliRunner
from sftkit.core.cli import config_option, given
from sftkit.core.config import load_config, read_yaml, setting, to_mapping
from sftkit.core.errors import UserError
from sftkit.curate.decide_config import SelectConfig
from sftkit.evaluate.config import LossConfig, TasksConfig
from sftkit.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A section."""

    device: str | None = setting(None, "Where.")
    names: tuple[str, ...] = setting((), "Which.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All kinds of fields."""

    model: str = field(metadata={"help": "The model."})
    rate: float = setting(2e-5, "Learning rate.")
    steps: int = setting(10, "How many.")
    limit: int | None = setting(None, "At most.")
    fast: bool = setting(False, "In a hurry.")
    dtype: str = setting("auto", "Number format.", choices=("auto", "bfloat16", "float32"))
    layers: tuple[str, ...] = setting((), "Layers.", choices=("attention", "mlp"))
    kind: Literal["a", "b"] = setting("a", "Either.")
    folder: Path | None = setting(None, "Where to.")  # noqa: RUF009
    weights: dict[str, float] = setting({}, "By name.")  # noqa: RUF009
    sizes: list[int] = setting([], "In order.")  # noqa: RUF009
    inner: Inner = field(default_factory=Inner, metadata={"help": "A section."})
    extra: Any = setting(None, "Anything.")  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: expected 1 or more, found {self.steps}")


def load(text: str, tmp_path: Path) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Config, read_yaml(path), str(path))


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    config = load(
        """
        model: 模型
        rate: 8e-5          # YAML 1.1 reads a text here
        steps: 3
        limit: 7
        fast: true
        dtype: float32
        layers: [mlp]
        kind: b
        folder: runs/a
        weights: {numeric: 1, length: 0.5}
        sizes: [1, 2]
        inner:
          device: cpu
          names: [x, y]
        extra: {any: [thing]}
        """,
        tmp_path,
    )
    assert config == Config(
        model="模型", rate=8e-5, steps=3, limit=7, fast=True, dtype="float32", layers=("mlp",), kind="b", folder=Path("runs/a"),
        weights={"numeric": 1.0, "length": 0.5}, sizes=[1, 2], inner=Inner(device="cpu", names=("x", "y")), extra={"any": ["thing"]},
    )  # fmt: skip
    assert isinstance(config.weights["numeric"], float)
    assert isinstance(config.sizes, list)


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    config = load("model: m", tmp_path)
    assert config == Config(model="m")
    assert config.rate == 2e-5
    assert config.inner == Inner()
    assert config.weights is not Config(model="m").weights, "a default that can change is each config's own"
    assert load("model: m\nlimit: null\ninner: {device: null}", tmp_path) == config


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = Config(model="m", folder=tmp_path / "x", weights={"a": 0.1}, layers=("mlp", "attention"), inner=Inner(names=("y",)), limit=3)
    mapping = to_mapping(config)
    assert list(mapping) == [each.name for each in dataclasses.fields(Config)]
    assert load(yaml.safe_dump(mapping), tmp_path) == config
    assert mapping["folder"] == str(tmp_path / "x")


FAULTS = {
    "an unknown key": ("model: m\nstepps: 3", ["unknown setting 'stepps': did you mean 'steps'? known are dtype, extra"]),
    "an unknown key in a section": ("model: m\ninner: {devise: cpu}", ["config.yaml: inner: unknown setting 'devise': did you mean 'device'?"]),
    "nothing like it": ("model: m\nzzz: 3", ["unknown setting 'zzz': known are dtype"]),
    "a missing one": ("steps: 3", ["config.yaml: missing setting model"]),
    "a text for a whole number": ("model: m\nsteps: many", ["steps: expected a whole number, found 'many'"]),
    "a fraction for a whole number": ("model: m\nsteps: 1.5", ["steps: expected a whole number, found 1.5"]),
    "true for a whole number": ("model: m\nsteps: true", ["steps: expected a whole number, found True"]),
    "true for a number": ("model: m\nrate: true", ["rate: expected a number, found True"]),
    "a word for a number": ("model: m\nrate: fast", ["rate: expected a number, found 'fast'"]),
    "nan for a number": ("model: m\nrate: .nan", ["rate: expected a number, found nan"]),
    "nan as a text": ("model: m\nrate: nan", ["rate: expected a number, found 'nan'"]),
    "a number for true or false": ("model: m\nfast: 1", ["fast: expected true or false, found 1"]),
    "a number for a text": ("model: 7", ["model: expected a text, found 7"]),
    "nothing for a text": ("model: null", ["model: expected a text, found None"]),
    "another choice": ("model: m\ndtype: bfloat", ["unknown value for dtype 'bfloat': did you mean 'bfloat16'? known are auto, bfloat16, float32"]),
    "another choice in a list": ("model: m\nlayers: [mlp, atention]", ["unknown value for layers 'atention': did you mean 'attention'?"]),
    "another literal": ("model: m\nkind: c", ["kind: unknown value 'c': known are a, b"]),
    "a text for a list": ("model: m\nsizes: 3", ["sizes: expected a list, found 3"]),
    "a text in a list": ("model: m\nsizes: [1, x]", ["sizes[1]: expected a whole number, found 'x'"]),
    "a list for a mapping": ("model: m\nweights: [1]", ["weights: expected a mapping, found [1]"]),
    "a text in a mapping": ("model: m\nweights: {a: x}", ["weights.a: expected a number, found 'x'"]),
    "a text for a section": ("model: m\ninner: x", ["inner: expected settings like 'key: value', found 'x'"]),
    "what the config itself refuses": ("model: m\nsteps: 0", ["config.yaml: steps: expected 1 or more, found 0"]),
    "a list": ("- model", ["config.yaml: expected settings like 'key: value', found list"]),
    "broken YAML": ("model: [", ["config.yaml: not valid YAML: "]),
    "a key twice": ("model: m\nsteps: 1\nsteps: 2", ["config.yaml: not valid YAML: the key 'steps' is given twice", "line 3"]),
    "a key twice in a section": ("model: m\ninner: {device: cpu, device: cuda}", ["the key 'device' is given twice"]),
    "code": ("model: !!python/object/apply:os.getcwd []", ["not valid YAML: could not determine a constructor"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_place_and_cure(name: str, tmp_path: Path) -> None:
    text, words = FAULTS[name]
    with pytest.raises(UserError) as error:
        load(text, tmp_path)
    told = str(error.value)
    assert told.startswith(str(tmp_path / "config.yaml"))
    assert "\n" not in told
    for word in words:
        assert word in told


def test_keys_are_texts_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {on: prompt, no: 1}\nshares: {<<: *base, 2024: 2, null: 3}")
    assert read_yaml(path)["shares"] == {"on": "prompt", "no": 1, "2024": 2, "null": 3}
    path.write_text("a: {b: &base {on: prompt, 2024: 1}}\nc: {<<: *base, on: pair}\nd: {<<: [{no: 1}, {off: 2}]}\ne: {<<: *base, on: pair}")
    assert read_yaml(path) == {
        "a": {"b": {"on": "prompt", "2024": 1}}, "c": {"on": "pair", "2024": 1}, "d": {"no": 1, "off": 2}, "e": {"on": "pair", "2024": 1},
    }  # fmt: skip


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml: cannot be read: No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"latin.yaml: not valid YAML"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    (tmp_path / "anchors.yaml").write_text("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n")
    assert read_yaml(tmp_path / "anchors.yaml")["b"] == {"x": 1, "y": 2}


def test_options_show_what_the_config_says_and_pass_only_what_was_given() -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @config_option(Config, "rate")
    @config_option(Config, "steps", "-n", "--steps")
    @config_option(Config, "limit")
    @config_option(Config, "fast")
    @config_option(Config, "dtype")
    @config_option(Config, "folder")
    @config_option(Config, "sizes", show_default=False)
    def command(**options: Any) -> None:
        seen.update(options)

    run = CliRunner().invoke
    text = " ".join(run(command, ["--help"]).output.split())
    assert "Learning rate. [default: 2e-05]" in text
    assert "--fast / --no-fast In a hurry. [default: False]" in text
    assert "[auto|bfloat16|float32]" in text
    assert re.search(r"--limit INTEGER At most\. --fast", text), "no default is shown where there is none"
    assert run(command, []).exit_code == 0
    assert given(seen) == {}
    assert run(command, ["--rate", "0", "-n", "4", "--no-fast", "--folder", "x", "--sizes", "1", "--sizes", "2"]).exit_code == 0
    assert given(seen) == {"rate": 0.0, "steps": 4, "fast": False, "folder": Path("x"), "sizes": ["1", "2"]}
    result = run(command, ["--dtype", "int8"])
    assert result.exit_code == 2
    assert "is not one of 'auto', 'bfloat16', 'float32'" in result.output


@pytest.mark.parametrize("kind", [SelectConfig, LossConfig, TasksConfig, TrainConfig])
def test_a_seed_that_nothing_can_draw_by_is_refused_before_the_work(kind: type) -> None:
    """numpy takes no number below 0, and is asked after all answers are there."""
    needed = {"budget": 1} if kind is SelectConfig else {}
    assert load_config(kind, {"seed": 0, **needed}).seed == 0
    with pytest.raises(UserError, match="seed: expected 0 or more, found -1"):
        load_config(kind, {"seed": -1, **needed})


def test_a_share_of_answers_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="top_p: expected a share above 0 and up to 1, found 2"):
        TasksConfig(samples=2, top_p=2.0)
