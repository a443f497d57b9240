"""Settings: frozen dataclasses with one line of help per field, and the one loader that turns YAML into them."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError, unknown_name

T = TypeVar("T")
MERGE = "tag:yaml.org,2002:merge"


def setting(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Declare a field of a config dataclass. The default stands here and nowhere else; command lines read it back."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings like 'key: value', found {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Takes keys as they are written, as texts: `on` and `no` are true and false to YAML 1.1.

    Refuses a key that is given twice: YAML would keep the last of them without a word.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._looked_at: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Look at a mapping's own keys before those of `<<` come to them; this is called for what `<<` names, too."""
        if id(node) not in self._looked_at:
            self._looked_at.add(id(node))
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                    key.tag = "tag:yaml.org,2002:str"
                if str(key.value) in seen and key.tag != MERGE:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(str(key.value))
        super().flatten_mapping(node)


def load_config(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass (nested ones too) from a mapping.

    Raises UserError for an unknown key (naming the nearest), a value of the wrong type, a value that is not among
    the choices, or whatever `__post_init__` refuses; `where` (a file, then the path of keys) begins the message.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name("setting", key, fields, where)
        place = f"{where}: {key}" if where else str(key)
        arguments[key] = convert(hints[key], value, place)
        choices = fields[key].metadata.get("choices") or ()
        given = arguments[key] if isinstance(arguments[key], (list, tuple)) else [arguments[key]]
        wrong = [each for each in given if choices and each is not None and each not in choices]
        if wrong:
            raise unknown_name(f"value for {key}", wrong[0], choices, where)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in arguments
    ]
    if required:
        raise UserError(f"{where + ': ' if where else ''}missing setting{'s' * (len(required) > 1)} {', '.join(required)}")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def convert(hint: Any, value: Any, place: str) -> Any:
    """Return a value as a type hint has it. Raises UserError, beginning with `place`, for one of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [member for member in arguments if member is not type(None)]
        errors = []
        for member in members:
            try:
                return convert(member, value, place)
            except UserError as error:
                errors.append(error)
        if len(members) == 1:
            raise errors[0]
        raise UserError(f"{place}: expected {' or '.join(_name(m) for m in members)}, found {value!r}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{place}: expected settings like 'key: value', found {value!r}")
        return load_config(hint, value, place)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{place}: expected a list, found {value!r}")
        item = arguments[0] if arguments else Any
        return origin(convert(item, each, f"{place}[{number}]") for number, each in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{place}: expected a mapping, found {value!r}")
        return {key: convert(arguments[1] if arguments else Any, each, f"{place}.{key}") for key, each in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise unknown_name("value", value, [str(a) for a in arguments], place)
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 8e-5 as a string
        except ValueError:
            number = math.nan
        if math.isfinite(number):  # nan would pass every limit, and no file holds infinities
            return number
        raise UserError(f"{place}: expected a number, found {value!r}")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{place}: expected {_name(hint)}, found {value!r}")


def _name(hint: Any) -> str:
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "Path": "a path"}
    return words.get(getattr(hint, "__name__", ""), str(hint))


def part(config: Any, cls: type[T]) -> T:
    """Return the settings of a config that its base class `cls` has, as a `cls`."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a config as plain YAML-ready values, every default resolved."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))
