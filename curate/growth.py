"""Ways to get new prompts from a teacher: what each asks it, and how its answers are read. Pure functions of seeds and pool."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.example import Message
from ..core.ngrams import CHINESE_WORD
from .config import GrowConfig

ASKS_A_ROUND = 32  # fixed, so that a larger count goes on where a smaller one ended
SHOWN_SEEDS, SHOWN_NEW = 6, 2  # of the tasks in a request of Self-Instruct (Wang et al. 2022, arXiv 2212.10560)
# how items begin, one way an answer: what stands within an item, a list of another kind or a time, is the item's
ITEMS = tuple(
    re.compile(rf"^\s*{start}", re.MULTILINE)
    for start in (
        r"(?:#+\s*)?\d+\s*[.):]\s+",  # "1. "
        # as Chinese writes it: "1、", or "1." with no space behind it; of "2024、2025" it is no item
        r"(?:#+\s*)?(?:\d{1,2}\s*、|\d+\s*(?:[.):](?=[^\x00-\x7f])|[、．：](?!\d)))\s*",
        r"(?:#+\s*)?[(（]\d+[)）]\s*",  # "（1）"
        r"[-*\u2022]\s+",
    )
)
LABEL = re.compile(
    r"^\s*(?:#\s*)?(?:(?:new|rewritten|created|given)\s+)?(?:prompt|task|question|instruction)\s*#?\s*[:：]\s*", re.IGNORECASE
)
QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”', re.DOTALL)  # as a whole; what is quoted within keeps its marks
# a word of a passage: what stands between spaces, in scripts without them a character
PIECE = re.compile(rf"{CHINESE_WORD}|(?:(?!{CHINESE_WORD})\S)+")
TEXT_FILES = (".txt", ".md", ".markdown", ".rst")


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, or a passage, by its name."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to the teacher. `ids` in place of messages where the teacher is to go on with raw tokens."""

    messages: list[Message]
    parents: tuple[str, ...]
    index: int = 0  # of the answer, where the same is asked several times
    ids: tuple[int, ...] = ()
    what: str = ""  # the operation, for the meta of what comes of it


Method = Callable[
    [int, Sequence[Text], Sequence[Text], Sequence[Text]], Iterator[Ask]
]  # (round, seeds, all grown, those of the last round)


def self_instruct(config: GrowConfig) -> Method:
    """Show some seed tasks and some new ones, and ask for more (Wang et al. 2022)."""

    def asks(number: int, seeds: Sequence[Text], grown: Sequence[Text], last: Sequence[Text]) -> Iterator[Ask]:
        for place in range(ASKS_A_ROUND):
            chance = random.Random(f"{config.seed}/{number}/{place}")
            shown = chance.sample(list(seeds), min(SHOWN_SEEDS, len(seeds))) + chance.sample(list(grown), min(SHOWN_NEW, len(grown)))
            chance.shuffle(shown)
            listed = "\n".join(f"{position}. {' '.join(each.text.split())}" for position, each in enumerate(shown, 1))
            yield Ask(
                _user(
                    f"Here are {len(shown)} tasks that people gave to an assistant:\n\n{listed}\n\nWrite {config.per_ask} new tasks for it."
                    " Let them differ from these and from each other in subject, kind and wording. Each is complete: whatever text,"
                    " numbers or facts it needs stand in it. Do not solve them. Write a numbered list and nothing else."
                ),
                tuple(each.id for each in shown),
                index=number * ASKS_A_ROUND + place,  # of a few seeds the same may be shown twice
            )

    return asks


def magpie(config: GrowConfig, chat: Chat | None) -> Method:
    """Let the teacher write what a user would say, after what its template puts before that (Xu et al. 2024, arXiv 2406.08464)."""
    if chat is None:
        raise UserError("magpie: a server renders for itself; the teacher's files are needed, with the engine transformers or vllm")
    ids = pre_query(chat, config.system)

    def asks(number: int, seeds: Sequence[Text], grown: Sequence[Text], last: Sequence[Text]) -> Iterator[Ask]:
        for place in range(ASKS_A_ROUND):
            yield Ask([], (), index=number * ASKS_A_ROUND + place, ids=ids)

    return asks


def pre_query(chat: Chat, system: str | None = None) -> tuple[int, ...]:
    """Return the ids that a template puts before a user's first words: what renderings of different words begin with alike.

    Raises UserError for a template that puts nothing there.
    """
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    rendered = [chat.render([*before, {"role": "user", "content": text}]).ids for text in ("x", "7", "?", "Why", "\u4f60")]
    same = 0
    while same < min(map(len, rendered)) and len({ids[same] for ids in rendered}) == 1:
        same += 1
    if not same:
        raise UserError(f"magpie: the template of {chat.name} puts nothing before a user's words, so nothing tells it to write them")
    return tuple(rendered[0][:same])


DEEPER = {  # ways to make a prompt harder, after WizardLM's Evol-Instruct (Xu et al. 2023, arXiv 2304.12244); the words are our own
    "constraint": "Add one more condition or requirement that a good answer has to meet.",
    "deepen": "Let it ask for more depth: causes, exceptions, or what follows from it.",
    "concrete": "Replace what is general in it by something specific: a case, numbers, names.",
    "reasoning": "Change it so that an answer needs several steps of reasoning where one was enough.",
    "input": "Add some data that an answer has to work with: a short table, a piece of code, a passage.",
    "breadth": "Write another prompt of the same field, rarer and about as hard.",
}


def evol(config: GrowConfig) -> Method:
    """Rewrite each prompt into a harder one, round after round; one that was not kept is tried again in another way."""

    def asks(number: int, seeds: Sequence[Text], grown: Sequence[Text], last: Sequence[Text]) -> Iterator[Ask]:
        for parent in seeds if number == 0 else last:
            what = random.Random(f"{config.seed}/{number}/{parent.id}").choice(list(DEEPER))
            yield Ask(
                _user(
                    f"Rewrite the prompt below. {DEEPER[what]} It must stay answerable and understandable to people, and grow by no more"
                    f" than 40 words. Write the new prompt alone, without an answer or a comment.\n\nPrompt:\n{parent.text}"
                ),
                (parent.id,),
                index=number,
                what=what,
            )

    return asks


def documents(config: GrowConfig) -> Method:
    """Ask for questions that a passage answers, each complete without the passage."""

    def asks(number: int, seeds: Sequence[Text], grown: Sequence[Text], last: Sequence[Text]) -> Iterator[Ask]:
        for passage in seeds if number == 0 else ():
            yield Ask(
                _user(
                    f"Read this passage:\n\n{passage.text}\n\nWrite {config.per_ask} different questions that it answers. Someone who has"
                    " not seen the passage must understand each of them: name what it is about, and never speak of a passage, text or"
                    " document. Write a numbered list and nothing else."
                ),
                (passage.id,),
            )

    return asks


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def open_method(config: GrowConfig, chat: Chat | None) -> Method:
    """Return the method that a config names."""
    if config.method == "magpie":
        return magpie(config, chat)
    return {"self-instruct": self_instruct, "evol": evol, "documents": documents}[config.method](config)


def read_answer(config: GrowConfig, text: str) -> list[str]:
    """Return the prompts in an answer: the items of its list, numbered or else bulleted, or for evol and magpie all of it."""
    if config.method in ("evol", "magpie"):
        parts = [text]
    else:
        items = next((found for each in ITEMS if (found := [match.span() for match in each.finditer(text)])), [])
        ends = [*(start for start, _ in items[1:]), len(text)]
        parts = [text[begin:end] for (_, begin), end in zip(items, ends, strict=False)]  # of an answer without a list, none
    cleaned = [LABEL.sub("", part).strip() for part in parts]
    bare = [(quoted[1] or quoted[2] or "").strip() if (quoted := QUOTED.fullmatch(each)) else each for each in cleaned]
    return [each for each in bare if each]


FAULTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    # a text model cannot see or draw; Self-Instruct's list of such words, by sense
    (
        "needs_media",
        re.compile(r"\b(?:images?|pictures?|photos?|videos?|audio|diagrams?|the (?:graph|chart|map|figure) (?:below|above))\b", re.I),
    ),
    ("talks_of_itself", re.compile(r"\b(?:(?:given|rewritten|new|original|created) prompt|(?:the|this) (?:passage|excerpt))\b", re.I)),
    ("placeholder", re.compile(r"\[(?:insert|your|name|topic|text)[^\]]*\]|<(?:insert|your)[^>]*>|\b(?:lorem ipsum|TODO)\b", re.I)),
    ("begins_with_punctuation", re.compile(r"^[^\w\"'(\[{<$#`*¿¡«“‘「『《〈（【〔-]")),
)


def fault(config: GrowConfig, text: str, num_words: int) -> tuple[str, float | None, float | None] | None:
    """Return the rule that a prompt breaks, with its score and threshold; None for a sound one."""
    if num_words < config.min_words:
        return "too_short", num_words, config.min_words
    if num_words > config.max_words:
        return "too_long", num_words, config.max_words
    found = next((name for name, pattern in FAULTS if pattern.search(text)), None)
    return None if found is None else (found, None, None)


def read_passages(source: Path, chunk_words: int) -> list[Text]:
    """Return the passages of a text or Markdown file, or of all in a folder, each of up to about so many words.

    A paragraph is never cut unless it alone is longer; a heading begins a new passage where the one before has half its size.
    Their names are FILE#NUMBER. Raises UserError where there is no text.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in TEXT_FILES and path.is_file())
    else:
        files = [source]
    passages = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
        name = str(path.relative_to(source)) if source.is_dir() else path.name
        passages += [Text(f"{name}#{number}", chunk) for number, chunk in enumerate(chunks(text, chunk_words), 1)]
    if not passages:
        raise UserError(f"{source}: holds no text; expected a file, or a folder of {', '.join(TEXT_FILES)} files")
    return passages


def chunks(text: str, most: int) -> list[str]:
    """Return the passages of one text."""
    found: list[str] = []
    current: list[str] = []
    size = 0

    def end() -> None:
        nonlocal size
        if current:
            found.append("\n\n".join(current))
        current.clear()
        size = 0

    for paragraph in re.split(r"\n\s*\n", text):
        parts = [match.span() for match in PIECE.finditer(paragraph)]
        if not parts:
            continue
        alone = len(current) == 1 and current[0].lstrip().startswith("#")  # a heading stays with what follows it
        if (size and size + len(parts) > most and not alone) or (paragraph.lstrip().startswith("#") and size >= most / 2):
            end()
        for first in range(0, len(parts), most):
            within = parts[first : first + most]
            current.append(paragraph[within[0][0] : within[-1][1]])
            size += min(most, len(parts) - first)
            if size >= most:
                end()
    end()
    return found
