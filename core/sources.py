"""Where rows come from: files, folders, standard input, data sets of the Hub. Each row comes with its place, as file:row."""

import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from . import llama_factory
from .errors import UserError
from .files import file_hash, read_json
from .hub import hub_away, is_for_want_of_it
from .text import counted

log = logging.getLogger(__name__)

Row = dict[str, Any]
Read = tuple[str, Row | UserError]  # the place of a row, and the row or why it cannot be read
Faulty = Callable[[str, UserError], None]  # is told of the place of a row that cannot be read, and of the reason
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
ROW_COLUMNS = (  # an object with one of these is a row, not a wrapping around rows
    *("messages", "conversations", "conversation", "chosen", "instruction"),
    *("prompt", "question", "query", "problem", "input", "text"),
)
GZIP = b"\x1f\x8b"
POINTER = b"version https://git-lfs"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNNAMED = "Unnamed: 0"  # what pandas and datasets call a first column without a name: the index that pandas wrote
ROWS_AT_A_TIME = 10_000


def iterate_rows(
    source: str | Path, *, revision: str | None = None, split: str = "train", faulty: Faulty | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) from a file, a folder of files, a run folder, `-` (standard input) or a data set of the Hub.

    A line of plain text is the row {"text": line}. Raises UserError, with file and row, for what cannot be read; of single rows
    `faulty` is told, where it is given, and they are left out.
    """
    for place, row in _source(source, revision, split):
        if not isinstance(row, UserError):
            yield place, row
        elif faulty is None:
            raise row
        else:
            faulty(place, row)


def _source(source: str | Path, revision: str | None, split: str) -> Iterator[Read]:
    if str(source) == "-":
        yield from _some(_standard_input(), "stdin")
        return
    path = find_source(source)
    if path.is_dir():
        yield from _folder(path, split)
    elif path.exists():
        yield from _file(path)
    else:
        yield from _some(_hub(str(source), revision, split), str(source))


def find_source(source: str | Path) -> Path:
    """Return the path of a source; where nothing is there, it may be a data set of the Hub. Raises UserError for what is neither.

    Nothing is read and nothing heavy imported: a mistyped name is told before what takes seconds.
    """
    if not str(source).strip():  # a variable of a shell that is not set would be this folder
        raise UserError("the name of the data is empty; give a file, a folder (. for this one), - or a data set of the Hub")
    path = Path(source).expanduser()
    if not path.exists() and not (HUB_ID.fullmatch(str(source)) and kind_of(path) is None and not path.parent.exists()):
        raise _missing(path)
    return path


def kind_of(path: Path) -> str | None:
    """Return what kind of file a name stands for (`.jsonl` for `a.jsonl.gz`), or None for a name that tells none."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; NaN and infinities, which are no JSON, become None, and so do numbers too large. Raises ValueError in one short line."""
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{error.msg} at {where}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if abs(number) < float("inf") else None


def mend_text(value: Any) -> Any:
    """Replace each half of a surrogate pair, which no file and no tokenizer takes, by U+FFFD, at any depth."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [mend_text(each) for each in value]
    if isinstance(value, dict):
        return {mend_text(key): mend_text(each) for key, each in value.items()}
    return value


def _missing(path: Path) -> UserError:
    if not path.parent.is_dir():
        return UserError(f"{path}: no such file, nor a folder {path.parent}; a data set of the Hub is named ORGANISATION/NAME")
    names = [each.name for each in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return UserError(f"{path}: no such file or folder{f'; did you mean {path.parent / near[0]}?' if near else ''}")


def _folder(folder: Path, split: str) -> Iterator[Read]:
    curated = (folder / "curate").is_dir() or (folder / "ledger.parquet").exists()
    if (folder / "config.yaml").exists() and (curated or (folder / "versions.json").exists()):
        made = folder / "curate" / "dataset.jsonl"
        if not made.exists() and (prompts := made.with_name("prompts.jsonl")).exists():  # they are all that it was to make
            made = prompts
        if not made.exists():
            mend = "finish its curation, or run its last step again" if curated else "give the data that it was given itself"
            raise UserError(f"{folder}: this run has no data set (no curate/dataset.jsonl); {mend}")
        yield from _file(made)
        return
    if (folder / "dataset_info.json").exists() and not (folder / "state.json").exists():
        for file, entry in llama_factory.data_sets(folder):
            for place, row in _file(file):
                yield place, row if isinstance(row, UserError) else llama_factory.renamed(row, entry)
        return
    if (folder / "export.json").exists():
        if "written" not in read_json(folder / "export.json"):
            raise UserError(f"{folder}: this export was cut off before it was whole; `sftkit curate export` writes it again")
        yield from _file(next(each for each in sorted(folder.glob("train.*")) if kind_of(each)))
        return
    if (folder / "state.json").exists() and any(folder.glob("*.arrow")):
        yield from _some(_saved_by_datasets(folder), str(folder))
        return
    if (folder / "dataset_dict.json").exists():
        splits = sorted(each.parent.name for each in folder.glob("*/state.json"))
        if split not in splits:
            raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(splits)}")
        yield from _folder(folder / split, split)
        return
    files = [each for each in _shown(folder) if kind_of(each)]
    tables = [each for each in files if kind_of(each) != ".txt"]
    if not files:
        raise UserError(f"{folder}: holds no data file ({', '.join(KINDS)}, each also as .gz)")
    if tables and len(tables) < len(files):
        log.info("%s: its .txt files are not read, as there are files with columns", folder)
    for file in tables or files:
        yield from _file(file)


def _shown(folder: Path) -> list[Path]:
    """Return the files of a folder, in order; what is hidden is none of its data."""
    shown = (each for each in folder.rglob("*") if not any(part.startswith(".") for part in each.relative_to(folder).parts))
    return sorted(each for each in shown if each.is_file())


def hash_files(source: Path) -> str:
    """Return a hash of a file's bytes, or of a folder's data files and their names in it (of a run, of its data set), wherever it lies."""
    if source.is_file():
        return file_hash(source)
    made = [source / "curate" / name for name in ("dataset.jsonl", "prompts.jsonl")] if (source / "config.yaml").exists() else []
    files = [each for each in made if each.exists()][:1] or [each for each in _shown(source) if kind_of(each) or each.suffix == ".arrow"]
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.relative_to(source).as_posix()}\0{file_hash(file)}\n".encode())
    return whole.hexdigest()


def _file(path: Path) -> Iterator[Read]:
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: not a kind of file that is read here; give {', '.join(KINDS)}, each also as .gz")
    yield from _some(_parsed(path, kind), str(path))


def _some(rows: Iterable[Read], name: str) -> Iterator[Read]:
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise UserError(f"{name}: is empty; expected at least one row")


def _parsed(path: Path, kind: str) -> Iterator[Read]:
    with _reading(path) as file:
        if kind == ".parquet":
            yield from _parquet(path, file)
        elif kind in (".csv", ".tsv"):
            yield from _table(path, file, "\t" if kind == ".tsv" else None)
        elif kind == ".txt":
            yield from _plain_lines(file, str(path))
        else:
            yield from _json(file, str(path))


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked where its first bytes say gzip, and turn what can go wrong on the way into one line."""
    try:
        with open(path, "rb") as raw:
            start = raw.read(len(POINTER))
            if start == POINTER:
                raise UserError(f"{path}: only Git LFS's pointer to the file; `git lfs pull` fetches it")
            raw.seek(0)
            if start.startswith(GZIP):
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, str | UserError]]:
    """Yield (number, line or why it is none) of the lines that are not blank, without their ends; numbers count from 1."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, _not_utf8(f"{name}:{number}", error)
            continue
        if text and not text.isspace():
            yield number, text


def _not_utf8(place: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{place}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); save the file as UTF-8 if it is text")


def _plain_lines(file: Iterable[bytes], name: str) -> Iterator[Read]:
    for number, line in _lines(file, name):
        yield f"{name}:{number}", line if isinstance(line, UserError) else {"text": line}


def _json(file: IO[bytes], name: str) -> Iterator[Read]:
    """Yield the rows of JSON or JSON lines: which of the two it is stands in the content, whatever the file is called."""
    lines = _lines(file, name)
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    text = first[1]
    if isinstance(text, UserError):  # then its name tells
        alone = kind_of(Path(name)) in (".jsonl", ".ndjson")
    else:
        try:
            parse_json(text)
            alone = second is not None  # no document goes on behind a whole value
        except ValueError:
            alone = not text.lstrip().startswith("[") and text.strip() != "{" and kind_of(Path(name)) != ".json"
    every = itertools.chain([first], lines if second is None else itertools.chain([second], lines))
    if alone:
        for number, line in every:
            place = f"{name}:{number}"
            yield place, line if isinstance(line, UserError) else _json_line(line, place)
    else:
        yield from _json_document("\n".join(_with_blank(every)), name)


def _with_blank(lines: Iterable[tuple[int, str | UserError]]) -> Iterator[str]:
    """Return the lines with the blank ones between them, so that a fault keeps its line number."""
    before = 0
    for number, line in lines:
        if isinstance(line, UserError):
            raise line
        yield from [""] * (number - before - 1)
        yield line
        before = number


def _json_line(line: str, place: str) -> Row | UserError:
    try:
        row = parse_json(line)
    except ValueError as error:
        return UserError(f'{place}: not valid JSON ({error}); expected one object a line, as {{"messages": [...]}}')
    return _row(row, place, mend="\\ud" in line.lower())


def _json_document(text: str, name: str) -> Iterator[Read]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error}); expected a list of objects, or one object a line") from None
    rows = _only_list(content, name) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{name}: expected a list of objects, found {_kind(rows)}")
    mend = "\\ud" in text.lower()
    for number, row in enumerate(rows, start=1):
        place = f"{name}:{number}"
        yield place, _row(row, place, mend=mend)


def _only_list(content: Row, name: str) -> list[Any]:
    """Return the rows of a JSON object: its one list of objects, or the object itself where it is a row."""
    lists = {key: each for key, each in content.items() if isinstance(each, list) and each and all(isinstance(one, dict) for one in each)}
    if not lists or set(content) & set(ROW_COLUMNS):
        return [content]
    if len(lists) > 1:
        raise UserError(f"{name}: has {len(lists)} lists ({', '.join(lists)}); expected a list of rows, or an object with one such list")
    return next(iter(lists.values()))


def _row(row: Any, place: str, *, mend: bool) -> Row | UserError:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        return UserError(f'{place}: expected an object, as {{"messages": [...]}}, found {_kind(row)}')
    if mend and (mended := mend_text(row)) != row:
        log.warning("%s: half a surrogate pair became U+FFFD", place)
        return mended
    return row


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _table(path: Path, file: IO[bytes], delimiter: str | None) -> Iterator[Read]:
    """Yield the rows of a CSV file. A row's number is that of its first line, as an editor counts."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 131,072 characters is shorter than a long conversation
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    line = 0
    try:
        head = text.readline()
        comma = delimiter or next((each for each in ",;\t" if each in head), ",")
        names = [name.strip() for name in next(csv.reader([head], delimiter=comma, strict=True), [])]
        if len(names) > 1 and not names[0]:
            names[0] = UNNAMED
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or any(not name.strip() for name in names):
            raise UserError(f"{path}:1: each column needs a name of its own; found {', '.join(map(repr, names))}")
        line = 2
        reader = csv.reader(text, delimiter=comma, strict=True)
        for cells in reader:
            place = f"{path}:{line}"
            if cells and len(cells) != len(names):
                told = f"{place}: has {counted(len(cells), 'cell')}, the first line names {len(names)}; quote cells that hold {comma!r}"
                yield place, UserError(told)
            elif cells:
                yield place, dict(zip(names, cells, strict=True))
            line = reader.line_num + 2
    except csv.Error as error:
        raise UserError(f"{path}:{max(line, 1)}: not valid CSV ({error}); check its quotes") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}:{max(line, 1)}", error) from None
    finally:
        text.detach()


def _parquet(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import polars as pl

    try:
        frame = pl.read_parquet(path if not isinstance(file, gzip.GzipFile) else file.read(), glob=False)  # a name is no pattern
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())[:120]})") from None
    number = 0
    for part in frame.iter_slices(ROWS_AT_A_TIME):
        for row in part.iter_rows(named=True):
            number += 1
            yield f"{path}:{number}", {name: plain(value) for name, value in row.items()}


def plain(value: Any) -> Any:
    """Return a cell as JSON has it: NaN is None, a date its ISO text, bytes base64.

    Objects of a column have all names that any of them has there; what one of them has as null, it does not have.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: told for key, each in value.items() if (told := plain(each)) is not None}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        import base64

        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _standard_input() -> Iterator[Read]:
    if sys.stdin.isatty():
        log.info("reading rows from this terminal; Ctrl-D ends them")
    content = sys.stdin.buffer.read()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"stdin: damaged or cut short ({error})") from None
    start = content.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    read = _json if start in (b"{", b"[") else _plain_lines
    yield from read(io.BytesIO(content), "stdin")


def _hub(name: str, revision: str | None, split: str) -> Iterator[tuple[str, Row]]:
    away = hub_away()
    import datasets

    path, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(path, subset or None, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{away}; nor is it in the Hub's cache" if away and is_for_want_of_it(error) else " ".join(str(error).split())[:240]
        raise UserError(
            f"{name}: no such file, and not to be had as a data set of the Hub ({reason}); check the name, "
            "`NAME:SUBSET`, the split and the network, or give a file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", {key: plain(value) for key, value in row.items()}


def _saved_by_datasets(folder: Path) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{folder}: saved by the datasets library, but cannot be read ({' '.join(str(error).split())[:200]})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{folder}:{number}", {key: plain(value) for key, value in row.items()}
