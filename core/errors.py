"""The errors a user can mend: one line that says what was found, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class TooManyFailures(UserError):
    """More rows failed than `--max-failed` allows; everything that finished has been kept."""

    exit_code = 3


class DamagedFile(UserError, ValueError):
    """A file that was written whole and is not any more, or that someone changed."""


class Diverged(UserError):
    """The loss of a training is no number any more: the settings' doing, and so the same each time."""


def unknown_name(what: str, name: object, known: Iterable[str], where: str = "", *, also: str = "") -> UserError:
    """Return the error for a name that is not known: it names the nearest known one and lists them all, `also` what else may be given."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    place = f"{where}: " if where else ""
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"{place}unknown {what} {name!r}: {hint}known are {', '.join(names)}{f'; or give {also}' if also else ''}")


def missing_package(package: str, extra: str) -> UserError:
    """Return the error for an optional package that is not installed, with the line that installs it."""
    return UserError(f"{package} is not installed: pip install 'sftkit[{extra}]'")
