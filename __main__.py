"""Start the command line: `sftkit`, or `python -m sftkit` (not in the repository's root, where `evaluate` would shadow a library)."""

import sys


def main() -> None:
    """Run `sftkit`. Ctrl-C while the commands are still being read ends it as it does later: with 130 and without a traceback."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
