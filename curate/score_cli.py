"""The command of `sftkit curate` that attaches scores."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click

from ..core.config import load_config, read_yaml
from .config import ScoreConfig
from .decide_cli import run_options


@click.command()
@run_options
@click.option("--with", "scorers", multiple=True, help="Scorer to apply: NAME or NAME:option=value,option=value (name=… calls it so).")
def score(run: str, out: Path | None, settings: Path | None, scorers: tuple[str, ...]) -> None:
    """Attach scores to every row of a RUN, kept or not.

    \b
    numeric     the final number is that of the reference: 1 or 0 (rule=strict|flexible, gold=COLUMN)
    exact       the answer is the reference (ignore_case=false, gold=COLUMN)
    regex       a pattern is found (pattern=…, ignore_case=true)
    math        the final formula equals the reference's (pip install 'sftkit[math]'; gold=COLUMN)
    json_schema the answer is JSON of this schema (schema=FILE, or column=NAME)
    ifeval      the share of IFEval's instructions that is followed (columns instruction_id_list, kwargs; loose=true)
    unit_test   the program passes the tests in a column, in a sandbox (tests=COLUMN, entry_point=COLUMN, unsafe=true)
    length      num_chars, num_words and num_tokens (num_tokens:model=… counts by that model's tokenizer)
    logprob     the teacher's mean log-probability per token, as it told it (distill --logprobs) or under model=…
    grape       the student's: which answer fits it best (model=…)
    perplexity  of the answer after its prompt (model=…)
    ifd         how little the prompt helps to find the answer, in both definitions: ifd and ifd_ppl (model=…)
    reward      what a reward model says of the conversation (model=…)
    language    how sure it is which one, by name; or 1 and 0 (wanted=zh-Hant)
    repetition  repetition and top_ngram: the shares that the filter's rules measure
    refusal     begins with a refusal: 1 or 0;  truncated  cut at the longest length: 1 or 0
    neighbour   the cosine with the most similar other row (on=prompt);  cluster  its number (clusters=…, seed=…)
    pairwise    the share of comparisons with other answers to its prompt that it wins, by a judge (model=…, opponents=3)
    tags        how many intentions a model finds in the prompt, by name (model=…)
    judge       a grade by any model (model=…, rubric=helpfulness|correctness|FILE|words, scale=6, engine=…, base_url=…)

    What a language model computes also takes device=, batch_tokens= and dtype=: auto is 16 bits where the processor computes in
    them, and float32 exact to the fifth digit. All but reward take replicas= and executor=ray, as distill does. What a scorer says
    beside the number is NAME.detail in `filter --where`.

    \b
    sftkit curate score runs/a --with numeric --with length
    sftkit curate score runs/a --with 'regex:pattern=```python,name=has_code'
    sftkit curate score data.jsonl -o runs/b --with numeric:gold=answer
    sftkit curate score runs/a --with grape:model=smollm2-135m-instruct --with ifd:model=smollm2-135m-instruct
    """
    from .intake import open_run
    from .score import parse_scorers, score, summary

    base = read_yaml(settings) if settings else {}
    config = load_config(ScoreConfig, base)
    config = replace(config, scorers={**config.scorers, **parse_scorers(list(scorers))})
    with closing(open_run(run, out)) as opened:
        for name, scores in score(opened, config).items():
            click.echo(summary(name, scores))
