"""Take conversations, given as JSON text, apart in columns, as they are nearly all: turns of a role and a text alone.

A text begins with BEGIN and ends with END, and its turns stand apart by BETWEEN, which no text within may hold, since JSON escapes
its quotes. So nothing has to be parsed: texts are cut, and what is escaped in them is put back.
"""

import polars as pl

BEGIN, BETWEEN, END = '[{"role": "', '"}, {"role": "', '"}]'
MIDDLE = '", "content": "'  # between role and text
ROLES = ("system", "user", "assistant", "tool")
TURNS: pl.DataType = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
LETTERS = {"\\\\": "\\", '\\"': '"', "\\n": "\n", "\\t": "\t", "\\r": "\r", "\\/": "/", "\\b": "\b", "\\f": "\f"}  # by their escapes


def plain_turns(messages: pl.Series) -> pl.Series:
    """Return the turns of each conversation as TURNS has them; null where a turn holds anything but a role and a text."""
    role, content, turns = pl.field("role"), pl.field("content"), pl.col("turns")
    halves = pl.element().str.splitn(MIDDLE, 2).struct.rename_fields(["role", "content"])
    sound = role.is_in(ROLES) & _is_text(content).fill_null(value=False)
    read = halves.struct.with_fields(sound=sound, content=_text(content))
    found = pl.DataFrame({"turns": messages}).lazy().select(_parts(turns).list.eval(read))
    each = pl.element().struct
    both = found.select(
        sound=turns.list.eval(each.field("sound")).list.all(),
        turns=turns.list.eval(pl.struct(each.field("role"), each.field("content"))),
    )
    return both.select(pl.when("sound").then("turns").alias(messages.name)).collect().to_series()


def plain_answers(messages: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return the text of the last turn of each conversation, null unless it is the assistant's; and whether that can be told so."""
    last = pl.col("text")
    found = (
        pl.DataFrame({"text": messages})
        .lazy()
        .select(_parts(last).list.last())
        .select(body=last.str.strip_prefix("assistant" + MIDDLE), answered=last.str.starts_with("assistant" + MIDDLE))
        .select(
            answers=pl.when("answered").then(_text(pl.col("body"))),
            told=(pl.col("answered") & _is_text(pl.col("body"))).fill_null(value=False),
        )
        .collect()
    )
    return found["answers"].alias(messages.name), found["told"]


def _parts(text: pl.Expr) -> pl.Expr:
    """Return what stands between BEGIN and END, a part for each turn; null for what does not begin and end so."""
    inside = text.cast(pl.Binary).bin.slice(len(BEGIN), text.str.len_bytes() - len(BEGIN) - len(END)).cast(pl.String, strict=False)
    return pl.when(text.str.starts_with(BEGIN) & text.str.ends_with(END)).then(inside.str.split(BETWEEN))


def _is_text(body: pl.Expr) -> pl.Expr:
    """Say whether a part is one text of JSON, escaped by LETTERS alone: no quote ends it, and no letter stands as its number."""
    left = body.str.replace_many(["\\\\", '\\"'], ["", ""])
    return ~left.str.contains('"', literal=True) & ~left.str.contains("\\u", literal=True)


def _text(body: pl.Expr) -> pl.Expr:
    return body.str.replace_many(list(LETTERS), list(LETTERS.values()))
