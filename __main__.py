"""Run the command line: `python -m sftkit`. In the repository's root use `sftkit` instead: there `evaluate` would shadow a library."""

from .cli import main

main()
