"""What the command lines of all rooms share: options made from config fields, errors without tracebacks, Ctrl-C."""

import dataclasses
import errno
import logging
import os
import signal
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .errors import UserError
from .files import FULL

MENDABLE = {
    **dict.fromkeys(FULL, "make room or name another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to it, or name another place"),
    errno.EROFS: "name another place",
    errno.ENAMETOOLONG: "give a shorter one",
}
SECONDS_TO_ASK_AGAIN = 0.05
NO_TEMPORARY = "No usable temporary directory"  # Python's words, where torch is imported at the latest


class Commands(click.Group):
    """A command group that lists its commands in the order in which they were added, as the chain runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each with the whole first sentence of its help: click would cut it off at the end of the line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in self.commands.items()])


def config_option(config: type, name: str, *flags: str, show_default: bool = True, **extra: Any) -> Callable[[Any], Any]:
    """Make a click option from a field of a config dataclass: its help, default, choices and type stand there.

    An option that was not given passes None, so that a config file below it can speak: see `given`. Where something
    else than the field's default fills it then, say `show_default=False`.
    """
    field = next(each for each in dataclasses.fields(config) if each.name == name)
    hint = typing.get_type_hints(config)[name]
    members = [each for each in typing.get_args(hint) if each is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    kind = members[0]
    default = field.default if field.default is not dataclasses.MISSING else None
    shown = "" if default in (None, "", ()) or not show_default else f"  [default: {default}]"
    choices = field.metadata.get("choices")
    declared = flags or ("--" + name.replace("_", "-"),)
    if kind is bool:
        word = declared[0].removeprefix("--")
        return click.option(f"--{word}/--no-{word}", name, default=None, help=field.metadata["help"] + shown, **extra)
    if typing.get_origin(kind) in (list, tuple):
        return click.option(*declared, name, multiple=True, help=field.metadata["help"] + shown, **extra)
    converter: Any = click.Choice(choices) if choices else (click.Path(path_type=Path) if kind is Path else kind)
    return click.option(*declared, name, type=converter, default=None, help=field.metadata["help"] + shown, **extra)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line: a config's own defaults fill the rest."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if value not in (None, ())}


def run_command_line(command: click.Command) -> None:
    """Run a command: a UserError is one line and its exit code, Ctrl-C says how to resume, a bug keeps its traceback.

    A reader of its output that goes away (`| head`) ends it quietly; click sees to that.
    """
    start_talking()
    stopping_like_ctrl_c()
    try:
        code = command(standalone_mode=False, prog_name="sftkit")
        if code:  # what a command ends itself with; none of ours returns anything
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        said = str(stop.__cause__ or stop)  # where a command keeps nothing, it says so
        click.echo(f"\nstopped. {said or 'Everything that finished is kept: the same command goes on from here.'}", err=True)
        sys.exit(130)
    except OSError as error:
        cure = "let TMPDIR name a folder that can be written" if NO_TEMPORARY in str(error) else MENDABLE.get(error.errno or 0)
        if cure is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        again = "" if error.errno == errno.ENAMETOOLONG else ": the same command goes on from here"  # with a shorter name it is another
        click.echo(f"error: {place}{error.strerror}; {cure}{again}", err=True)
        sys.exit(1)


def stopping_like_ctrl_c() -> None:
    """Take SIGTERM, by which schedulers and notebooks end a process, as Ctrl-C: what runs is ended in order, and how to go on is said."""
    if threading.current_thread() is not threading.main_thread():
        return
    here = os.getpid()

    def stop(_number: int, _frame: Any) -> None:
        if os.getpid() != here:  # a copy of this process, made by fork
            os._exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    ignored = sys.unraisablehook

    def ask_again(found: Any) -> None:
        """Ask once more where Python drops the stop: what is raised while an object is taken apart, as by an import of patterns."""
        if issubclass(found.exc_type, KeyboardInterrupt):
            told = threading.main_thread().ident, signal.SIGTERM
            threading.Timer(SECONDS_TO_ASK_AGAIN, signal.pthread_kill, told).start()
        else:
            ignored(found)

    if ignored.__module__ != __name__:
        sys.unraisablehook = ask_again


def start_talking() -> None:
    """Send sftkit's own log lines to stderr, as plain sentences; of transformers only errors are heard, unless the user says otherwise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # what its own callers are to change
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # the thread of the first backward pass, which then sets one
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars: anywhere but on a terminal they are one endless line
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("sftkit")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
