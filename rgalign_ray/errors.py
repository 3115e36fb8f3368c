"""The three kinds of failure, and the sentence a user sees.

`InfrastructureError` is worth another try elsewhere, `DataError` names what is wrong in an input,
`ConfigError` names the key to change. Everything else is a bug and keeps its traceback.
The command line prints a `UserError` as one line and exits with its `exit_code`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator


class RGAlignError(Exception):
    """Root of every error this package raises on purpose."""


class UserError(RGAlignError):
    """What a user can cause and mend: one sentence with the place and the way out."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be run; the message starts with the full name of the key."""


class DataError(UserError):
    """An input with a structural fault; the message names file, column and what was expected."""

    exit_code = 3


class InfrastructureError(RGAlignError):
    """A worker, node or deadline that failed, after its retries were used up."""

    exit_code = 4


STORE_ERROR = re.compile(r"\bAWS Error\b|\bgoogle::cloud::Status\b")
"""pyarrow gives errors of object stores no class of their own."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_no_space(error: BaseException) -> bool:
    """Whether a full disk, or a used-up quota, is behind an error, wherever in the cluster it was met.

    Ray meets one as it puts on disk what does not fit into its object store.
    """
    return any(
        (isinstance(each, OSError) and each.errno in NO_SPACE) or _is_rays(each, "OutOfDiskError")
        for each in _behind(error)
    )


def is_full_store(error: BaseException) -> bool:
    """Whether Ray's object store, which holds what goes between processes, had no room for one object."""
    return any(_is_rays(each, "ObjectStoreFullError") for each in _behind(error))


def _is_rays(error: BaseException, name: str) -> bool:
    """By its name, since `ray` is not imported for the sake of errors that it has not raised."""
    return type(error).__name__ == name and type(error).__module__ == "ray.exceptions"


def refused_by_storage(error: BaseException) -> str | None:
    """What an object store said, in one line, if it is behind an error: it refused, or did not answer in spite of
    retries."""
    told = [str(each) for each in _behind(error) if isinstance(each, OSError) and STORE_ERROR.search(str(each))]
    return " ".join(told[-1].split()) if told else None


def _behind(error: BaseException | None, depth: int = 16) -> Iterator[BaseException]:
    """An error and those that it came from; Ray hangs them on attributes of its own."""
    if error is None or depth == 0:
        return
    yield error
    failures = getattr(error, "worker_failures", {})  # of ray.train.WorkerGroupError
    for cause in (error.__cause__, error.__context__, getattr(error, "cause", None), *failures.values()):
        if isinstance(cause, BaseException):
            yield from _behind(cause, depth - 1)
