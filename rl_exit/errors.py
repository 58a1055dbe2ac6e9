"""Errors that are meant for the user.

Everything a user can get wrong (a key, a file, a column, a full disk) is raised as :class:`UserError`: one message that
says what was given, what is accepted and where. The command line prints it and ends with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(Exception):
    """Bad input or a condition the user can mend; the message is complete as it stands."""


class ConfigError(UserError):
    """A configuration key or value that is not accepted."""


class DataError(UserError):
    """A dataset, column or label that cannot be used."""


class ModelError(UserError):
    """A model folder, hub id or backbone family that cannot be used."""


class RunError(UserError):
    """A run directory that is missing, in the way or not of the expected form."""


class StorageError(RunError):
    """Storage that does not answer; it may come back, so the step can be tried again."""


def nearest(word: str, accepted: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest accepted word, or an empty string if none is close."""
    close = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
