"""Show the answers of several models side by side in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.text import visible
from .compare import Answer, CompareResult

MIN_COLUMN = 28  # characters a model's column needs; in a narrower terminal the answers stand below one another


def show_answers(result: CompareResult, *, console: Console | None = None) -> None:
    """Print each question with the answer of every model. Control characters in the texts are shown, never sent."""
    console = console or Console()
    beside = console.width // len(result.answers) >= MIN_COLUMN
    for place, question in enumerate(result.questions):
        if question.error == "repeated":  # it stands there already
            continue
        earlier = sum(each["role"] != "system" for each in question.messages) - 1
        after = f"  (after {earlier} earlier messages)" if earlier > 0 else ""
        number = f"question {place + 1} of {len(result.questions)}: "
        console.print(Text.assemble((number, "dim"), (visible(question.text), "bold"), (after, "dim")))
        table = Table(box=box.ROUNDED, expand=beside, show_lines=not beside, show_header=beside)
        if not beside:
            table.add_column(style="bold magenta")
            table.add_column(overflow="fold")
            for name, answers in result.answers.items():
                table.add_row(name, _cell(answers[place]))
        else:
            for name in result.answers:
                table.add_column(Text(name, style="bold magenta"), ratio=1, overflow="fold")
            table.add_row(*(_cell(answers[place]) for answers in result.answers.values()))
        console.print(table)


def _cell(answer: Answer) -> Text:
    if answer.error:
        return Text(f"no answer: {visible(answer.error)}", style="yellow")
    ending = "stopped" if answer.stopped else "cut"
    shown = Text(visible(answer.text)) if answer.text.strip() else Text("(empty)", style="yellow")
    return Text.assemble(shown, "\n", (f"{ending} after {answer.num_tokens} token{'s' * (answer.num_tokens != 1)}", "dim"))
