"""Scores that are statistics of a text, or of its place among the others: language, repetition, refusal, neighbours, clusters."""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl

from ..core.errors import UserError, unknown_name
from ..core.language import CODES, detect_language
from ..core.ngrams import WORD
from ..core.run import Run
from .decide_config import TEXTS, EmbedConfig
from .repeats import TOPS, WINDOW, duplicate_ngrams
from .repeats import top_ngram as share_of_top
from .scorers import Candidate, ColumnScorer, Result, Scorer

DEFAULT = EmbedConfig()

_NOT = r"(?:can(?:no|['’])t|can not|am (?:not able|unable)|['’]m (?:not able|unable)|won['’]t|will not|do(?:n['’]t| not)|am not|['’]m not)"
_DO = (
    r"(?:help|assist|provide|answer|comply|fulfil|create|generate|write|complete|process|access|engage|offer|give|support|discuss"
    r"|do that|do this)"
)
_SORRY = r"(?:(?:i['’]?m|i am)(?: \w+)? (?:sorry|afraid)|my apologies|i apologi[sz]e|sorry)"
REFUSALS = re.compile(
    "|".join(
        [
            rf"^\W*{_SORRY}\b[^.!?\n]{{0,80}}\bi ?{_NOT}\b[^.!?\n]{{0,30}}\b{_DO}",
            rf"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b[^.!?\n]{{0,60}}\bi ?{_NOT}\b",
            rf"^\W*(?:unfortunately,? |sorry,? (?:but )?)?i ?{_NOT}\b(?: to| be able to)? {_DO}(?! but\b)\b",
            r"^[^\n]{0,80}\bi(?: am|['’]m) unable to"
            r" (?:fulfil+|comply with|process|complete|assist with) (?:this|your|that|the) (?:request|task)",
            r"(?:抱歉|对不起|對不起|不好意思)[^。！？\n]{0,24}(?:无法|無法|不能|没有办法|沒有辦法|不便|没法)",
            r"作[为為](?:一[个個名位款种種])?[^。！？\n，,]{0,12}(?:AI|人工智[能慧]|[语語]言模型|助手)[^。！？\n]{0,24}"
            r"(?:无法|無法|不能|没有|沒有|不具备|不具備)",
            r"^\W*我(?:无法|無法|不能)(?:提供|回答|帮助|幫助|满足|滿足|执行|執行|协助|協助|完成|生成)",
        ]
    ),
    re.IGNORECASE,
)
REFUSAL_CHARS = 300  # a refusal stands at the beginning
REFUSAL_SIGNS = (  # no refusal is without one of these, in whatever case
    *("cannot", "can't", "can’t", "can not", "am not", "unable", "'m not", "’m not", "won't", "won’t", "will not"),
    *("don't", "don’t", "do not", "抱歉", "对不起", "對不起", "不好意思", "作为", "作為", "我无法", "我無法", "我不能"),
    *("\u0131", "\u0130", "\u017f", "\u212a"),  # which ignoring case takes for an i, s or k
)


def language(*, wanted: str | None = None) -> Scorer:
    """Give how sure it is in which language the answer is written, from 0 to 1; the detail is the language. See core.language.

    With `wanted`, as en or zh-Hant or zh (either script), 1 where the answer is written in it and 0 where it is not. Raises
    UserError for a language that is never found.
    """
    if wanted is not None and wanted not in CODES:
        raise unknown_name("language", wanted, CODES, "scorer language: wanted")

    def score(text: str) -> Result:
        found = detect_language(text)
        if found.code == "und":
            return None, "no language is clear"
        if wanted is None:
            return found.confidence, found.code
        return float(found.code == wanted or found.code.startswith(f"{wanted}-")), found.code

    return _of_response(score)


def repetition() -> Scorer:
    """Give the share of the answer's 10-word windows that stood in it before: what the filter's rule `duplicate_ngrams` measures."""
    return _of_response(lambda text: (duplicate_ngrams(WORD.findall(text.lower()), WINDOW), ""))


def top_ngram() -> Scorer:
    """Give the largest share of the answer's words in one 2-, 3- or 4-gram: as the filter's rule measures from 50 words on."""

    def score(text: str) -> Result:
        words = WORD.findall(text.lower())
        return max(share_of_top(words, n) for n in TOPS), ""

    return _of_response(score)


def refusal() -> Scorer:
    """Say whether the answer begins with a refusal or a disclaimer, as the filter's rule has them: 1 or 0. The detail is its words."""

    def score(text: str) -> Result:
        match = REFUSALS.search(text[:REFUSAL_CHARS])
        return (0.0, "") if match is None else (1.0, match[0][:200])

    return _of_response(score)


def truncated() -> Scorer:
    """Say whether the answer was cut at the longest length: 1 or 0; nothing where it is not known how it ended."""
    return lambda row: (None, "how it ended is not known") if row.finish_reason is None else (float(row.finish_reason == "length"), "")


def neighbour(
    *, on: str = "pair", model: str = DEFAULT.model, max_seq_length: int = DEFAULT.max_seq_length, device: str | None = None
) -> ColumnScorer:
    """Give the cosine with the most similar other row; the detail is that row. Of equals the first counts.

    Vectors are those that dedup and select keep in the run. Costs n² · d multiplications, in blocks: 8 MB are held, not n².
    """
    config = _embed_config(on, model, max_seq_length, device)

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        from .embed import embed_rows
        from .similarity import BLOCK, TILE, Candidates

        vectors = embed_rows(run, _frame(rows), on, config)
        everyone = np.arange(len(rows))
        for start in range(0, len(rows), BLOCK):
            block = everyone[start : start + BLOCK]
            found = Candidates(len(block), floor=-2.0)
            for tile in range(0, len(rows), TILE):
                columns = everyone[tile : tile + TILE]
                cosines = vectors[block] @ vectors[columns].T
                own = np.flatnonzero((block >= tile) & (block < tile + len(columns)))
                cosines[own, block[own] - tile] = -3.0  # a row is not its own neighbour
                found.add(cosines, tile)
            for number, (places, exact) in zip(block.tolist(), found.verified(vectors, block, everyone), strict=True):
                if not len(places):
                    yield number, (None, "there is no other row")
                    continue
                best = int(np.argmax(exact))
                yield number, (float(exact[best]), rows[int(places[best])].id)

    return ColumnScorer(score)


def cluster(
    *,
    clusters: int | None = None,
    seed: int = 0,
    on: str = "pair",
    model: str = DEFAULT.model,
    max_seq_length: int = DEFAULT.max_seq_length,
    device: str | None = None,
) -> ColumnScorer:
    """Give the number of the row's cluster: k-means by cosine, seeded, as `select` makes them; as many as the root of the rows."""
    config = _embed_config(on, model, max_seq_length, device)
    if (clusters is not None and clusters < 1) or seed < 0:
        raise UserError(f"scorer cluster: expected clusters above 0 and a seed from 0 on, found {clusters} and {seed}")

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        from .embed import embed_rows
        from .quotas import cluster as k_means
        from .quotas import num_clusters

        if not rows:
            return
        vectors = embed_rows(run, _frame(rows), on, config)
        for number, label in enumerate(k_means(vectors, num_clusters(len(rows), clusters), seed)):
            yield number, (float(label), "")

    return ColumnScorer(score)


def _of_response(score: Callable[[str], Result]) -> Scorer:
    return lambda row: (None, "no response") if row.response is None else score(row.response)


def _frame(rows: Sequence[Candidate]) -> pl.DataFrame:
    return pl.DataFrame({"messages": [each.messages for each in rows]}, schema={"messages": pl.String})


def _embed_config(on: str, model: str, max_seq_length: int, device: str | None) -> EmbedConfig:
    if on not in TEXTS:
        raise unknown_name("value for on", on, TEXTS)
    return EmbedConfig(model=model, max_seq_length=max_seq_length, device=device)
