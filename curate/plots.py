"""The plots of a data-set card as small SVG files: how long the rows are, and where they lie by meaning; all of them and those kept."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
import polars as pl

from ..core.errors import UserError
from ..core.files import write_text
from ..core.run import Run
from .rows import scan_rows, text_columns

log = logging.getLogger(__name__)

MOST = 2000  # rows drawn as points, and rows whose answers are measured where there are no token counts
WIDTH, HEIGHT, EDGE = 640, 260, 36
ALL, KEPT = "#c3c9d4", "#1f6feb"


def write_plots(run: Run, rows: pl.DataFrame) -> list[tuple[str, str]]:
    """Write curate/lengths.svg, and curate/clusters.svg where the rows were embedded and none of it is damaged; return file and caption.

    `rows` are all rows of the run: KEY, num_tokens and whether they are `kept`.
    """
    folder = run.room("curate")
    plots = []
    for name, draw in (("lengths.svg", _lengths), ("clusters.svg", _clusters)):
        found = draw(run, rows)
        if found is None:
            (folder / name).unlink(missing_ok=True)
            continue
        svg, caption = found
        write_text(folder / name, svg)
        plots.append((name, caption))
    return plots


def _lengths(run: Run, rows: pl.DataFrame) -> tuple[str, str] | None:
    unit = "tokens"
    if rows.is_empty():
        return None
    if rows["num_tokens"].null_count():
        some, unit = _some(run, rows), "characters"
        texts = text_columns(some["messages"]).struct.unnest()
        rows = some.with_columns(num_tokens=texts.select(pl.coalesce("response", "prompt").str.len_chars()).to_series())
    svg = histogram(rows["num_tokens"].cast(pl.Float64).to_numpy(), rows["kept"].to_numpy(), unit)
    told = "the answers" if unit == "tokens" else f"the answers of {len(rows):,} rows, evenly spaced,"
    return svg, f"Lengths of {told} in {unit}: grey all rows, blue those kept"


def _some(run: Run, rows: pl.DataFrame) -> pl.DataFrame:
    """Return every n-th row with its conversation, so that there are MOST at most."""
    step = max(math.ceil(len(rows) / MOST), 1)
    messages = scan_rows(run, all=True, columns=["messages"]).gather_every(step).collect(engine="streaming")
    return rows.gather_every(step).with_columns(messages["messages"])


def _clusters(run: Run, rows: pl.DataFrame) -> tuple[str, str] | None:
    told = run.config().get("embed")
    if not told:
        return None
    from .embed import embedded_text, stored_vectors

    try:
        stored = stored_vectors(run.path / "curate")
    except UserError as error:  # damaged: what a step decides does not hang on a plot
        log.warning("%s (no plot of the embeddings)", error)
        return None
    if stored is None:
        return None
    rows = _some(run, rows)
    place = {name: number for number, name in enumerate(stored[0]["name"])}
    settings = json.dumps([told["identity"], told["max_seq_length"], told["dtype"]])
    found: dict[int, int] = {}
    for row, messages in enumerate(rows["messages"]):
        for on in ("pair", "prompt"):
            text = f"{settings}\n{embedded_text(messages, on)}".encode("utf-8", "surrogatepass")
            name = hashlib.sha256(text).hexdigest()[:32]
            if name in place:
                found[row] = place[name]
                break
    if len(found) < 3:
        return None
    vectors = stored[1][list(found.values())].astype(np.float64)
    svg = scatter(two_directions(vectors), rows["kept"].gather(list(found)).to_numpy())
    return svg, f"{len(found):,} rows by the two directions in which their embeddings differ most: grey removed, blue kept"


def two_directions(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the vectors along their first two principal directions."""
    centred = vectors - vectors.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


def histogram(values: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_], unit: str) -> str:
    """Draw how many values there are by buckets that double, and how many of them are kept."""
    buckets = np.floor(np.log2(np.maximum(values, 0) + 1)).astype(int)
    numbers = range(int(buckets.min()), int(buckets.max()) + 1)
    both = [(int((buckets == each).sum()), int(((buckets == each) & kept).sum())) for each in numbers]
    most = max(count for count, _ in both)
    step = (WIDTH - 2 * EDGE) / len(both)
    parts = []
    for place, (number, counts) in enumerate(zip(numbers, both, strict=True)):
        left = EDGE + place * step
        for count, colour in zip(counts, (ALL, KEPT), strict=True):
            high = (HEIGHT - 2 * EDGE) * count / most
            parts.append(_bar(left + 1, HEIGHT - EDGE - high, step - 2, high, colour))
        parts.append(_label(left + step / 2, HEIGHT - EDGE + 14, f"{2**number - 1}–{2 ** (number + 1) - 2}"))
        parts.append(_label(left + step / 2, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * counts[0] / most - 4, f"{counts[1]:,}/{counts[0]:,}"))
    parts.append(_label(WIDTH / 2, HEIGHT - 6, unit))
    return _svg(parts)


def scatter(points: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]) -> str:
    """Draw points, those kept over the others."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    places = EDGE / 2 + (points - low) / span * (np.array([WIDTH, HEIGHT]) - EDGE)
    order = [*np.flatnonzero(~kept), *np.flatnonzero(kept)]
    return _svg(
        [f'<circle cx="{places[row, 0]:.1f}" cy="{places[row, 1]:.1f}" r="2" fill="{KEPT if kept[row] else ALL}"/>' for row in order]
    )


def _bar(left: float, top: float, wide: float, high: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(wide, 1):.1f}" height="{high:.1f}" fill="{colour}"/>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="9" font-family="sans-serif" text-anchor="middle" fill="#57606a">{escape(text)}</text>'


def _svg(parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
