"""Everything that is wrong with the data, said at once.

Who mends a data file wants the list, not its first entry: what is wrong with one row is
written down, the rest is read on, and the run is refused at the end with all of it.
"""

from qlora_jax.errors import UserError

_LIMIT = 100
_SHOWN = 20


class Problems:
    """Collects messages; `refuse` raises them as one error.

    Args:
      of: what the problems are with.
    """

    def __init__(self, of: str = "the data"):
        self._of = of
        self._messages: list[str] = []

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, problem: UserError | str) -> None:
        """Writes a problem down.

        Raises:
          UserError: it is the hundredth; a file with that many is not read to its end.
        """
        self._messages.append(str(problem))
        if len(self._messages) >= _LIMIT:
            self.refuse(more=True)

    def refuse(self, *, more: bool = False) -> None:
        """Raises what was written down, if anything was.

        Args:
          more: reading stopped early, so there may be further problems.

        Raises:
          UserError: the one problem as it is, or a list of the first twenty.
        """
        count = len(self._messages)
        if count == 1:
            raise UserError(self._messages[0])
        if count:
            lines = [f"- {message}" for message in self._messages[:_SHOWN]]
            if count > _SHOWN:
                lines.append(f"- and {count - _SHOWN} more of this kind or another")
            at_least = "at least " if more else ""
            raise UserError(
                f"{at_least}{count} problems with {self._of}:\n" + "\n".join(lines)
            )
