"""The failures a user can cause and mend.

Anything else that is raised is a defect of this library. The command line prints these
as one paragraph and exits with status 1; every other exception keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """A value, file or setting the user gave cannot be used.

    The message says what was expected, what came, and what to do next.
    """


class CheckpointError(UserError):
    """A checkpoint, adapter or tokenizer on disk is missing, damaged or not understood.

    The message names the file, and the tensor or field in it.
    """


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raises what is wrong in one place as one error, if anything is.

    Args:
      where: the place, in a word or two; the message starts with it.
      problems: sentences.

    Raises:
      UserError: the one problem, or a list of them.
    """
    found = list(problems)
    if len(found) == 1:
        raise UserError(f"{where}: {found[0]}")
    if found:
        lines = "".join(f"\n- {problem}" for problem in found)
        raise UserError(f"{where}: {len(found)} problems:{lines}")
