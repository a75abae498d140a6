"""The errors a user is meant to read: one sentence that names the thing and the remedy, and the exit code that goes
with it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_NUMERICAL = 5
EXIT_ENVIRONMENT = 6
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class UserError(Exception):
    """Ends the program with its sentence on stderr and its `exit_code`; no traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A key, value or batch number of the configuration (or the command line) is wrong."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A data root, list, annotation or tokenizer file cannot be used."""

    exit_code = EXIT_DATA
    records: Sequence[dict[str, Any]] = ()  # of the bad files behind it, as quarantine.jsonl has them


class CheckpointError(UserError):
    """A checkpoint is damaged, missing, or belongs to another architecture."""

    exit_code = EXIT_CHECKPOINT


class NumericalError(UserError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    exit_code = EXIT_NUMERICAL


class MachineError(UserError):
    """This machine lacks something the configuration asks for."""

    exit_code = EXIT_ENVIRONMENT


def outcome(program: Callable[[], int | None]) -> int:
    """The exit code of a program: its own (0 where it returns None), that of its UserError, whose sentence goes to
    stderr, or 130 where the user interrupts it.
    """
    try:
        return program() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGINT
