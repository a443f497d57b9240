"""Whether an answer is JSON that a schema accepts."""

import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..patterns import Pattern, SlowPattern

FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def check_schema(answer: str, schema: dict[str, Any]) -> str | None:
    """Say why an answer is not JSON of this schema, in one line; None where it is. JSON may stand in a code block, the last counts.

    Raises UserError for a schema that is none. A reference to elsewhere is never fetched.
    """
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"json schema: is not valid at {error.json_path}: {_short(error.message)}") from None
    blocks = FENCE.findall(answer)
    try:
        value = json.loads(blocks[-1] if blocks else answer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {_short(str(error))}"
    try:
        patterns = {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional_properties}
        limited = jsonschema.validators.extend(kind, patterns)
        first = jsonschema.exceptions.best_match(limited(schema, registry=Registry()).iter_errors(value))
    except Unresolvable as error:
        raise UserError(f"json schema: refers to {_short(str(error))}, which is not in it; put it under $defs") from None
    except RecursionError:
        return "$: nests too deeply to be checked, or the schema refers to itself without end"
    except SlowPattern as error:
        return f"$: cannot be checked against the pattern {error}"
    except OverflowError as error:
        return f"$: holds a number that cannot be checked: {_short(str(error))}"
    return None if first is None else f"{first.json_path}: {_short(first.message)}"


def _pattern(validator: Any, wanted: str, value: Any, _schema: Any) -> Iterator[Any]:
    """Hold a text against a pattern of the schema, as jsonschema does, but not without end."""
    from jsonschema import ValidationError

    if validator.is_type(value, "string") and not Pattern("json schema: pattern ", wanted).search(value):
        yield ValidationError(f"{value!r} does not match {wanted!r}")


def _pattern_properties(validator: Any, wanted: dict[str, Any], value: Any, _schema: Any) -> Iterator[Any]:
    """Hold the properties whose names a pattern finds against its schema, likewise."""
    for text, inner in wanted.items() if validator.is_type(value, "object") else ():
        pattern = Pattern("json schema: pattern ", text)
        for name in value:
            if pattern.search(name):
                yield from validator.descend(value[name], inner, path=name, schema_path=text)


def _additional_properties(validator: Any, wanted: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    """Hold the properties that neither a name nor a pattern of the schema tells against `wanted`, likewise."""
    from jsonschema import ValidationError

    if not validator.is_type(value, "object"):
        return
    patterns = [Pattern("json schema: pattern ", text) for text in schema.get("patternProperties", {})]
    told = schema.get("properties", {})
    more = [name for name in value if name not in told and not any(pattern.search(name) for pattern in patterns)]
    if validator.is_type(wanted, "object"):
        for name in more:
            yield from validator.descend(value[name], wanted, path=name)
    elif wanted is False and more:
        yield ValidationError(f"Additional properties are not allowed: {', '.join(map(repr, more))}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")  # Python reads and writes NaN and Infinity, which no other reader takes


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"
