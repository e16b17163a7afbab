"""The fence against jobs that lost their lease: a part of the lease's document.

A job that is paused, or whose request is on its way, may write after another one has taken the lease
over, and nothing in a store keeps it from that. So what it writes has names that hold its token, and
the lease's document says up to which step the files of a token count. What comes later is void for
every reader, whenever it comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST = 256
"""Jobs that are remembered: of those that lost the lease, the last so many."""

Mark = tuple[str, int]
"""A token and a step: what a job has written of one step."""


@dataclass(frozen=True)
class Superseded:
    """A job whose lease was taken over.

    Attributes:
      token: of its lease.
      through: the last of its steps that counts, -1 for none; None until the next job has looked.
      removing: what it was removing; that doesn't count any more, whether it is there or not.
    """

    token: str
    through: int | None
    removing: frozenset[Mark] = frozenset()


@dataclass(frozen=True)
class Record:
    """The writes that count in a workdir.

    Attributes:
      superseded: jobs that lost the lease, the last one last.
      removing: what the lease's owner is removing.
    """

    superseded: tuple[Superseded, ...] = ()
    removing: frozenset[Mark] = frozenset()

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Record:
        """The record in a lease's document.

        Raises:
          ValueError, KeyError, TypeError: it is damaged.
        """
        superseded = [
            Superseded(
                str(each["token"]),
                None if each["through"] is None else int(each["through"]),
                _marks(each["removing"]),
            )
            for each in document["superseded"]
        ]
        return cls(tuple(superseded), _marks(document["removing"]))

    def document(self) -> dict[str, Any]:
        """The document that `parse` reads."""
        superseded = [
            {"token": each.token, "through": each.through, "removing": sorted(each.removing)}
            for each in self.superseded
        ]
        return {"removing": sorted(self.removing), "superseded": superseded}

    def taken_over(self, token: str) -> Record:
        """The next owner's, who took the lease over from the job of this token."""
        last = Superseded(token, None, self.removing)
        return Record((*self.superseded, last)[-_MOST:])

    def settled(self, through: Mapping[str, int]) -> Record:
        """The same once the owner has looked for the last step of each job before it."""
        superseded = [
            each
            if each.through is not None
            else dataclasses.replace(each, through=through.get(each.token, -1))
            for each in self.superseded
        ]
        return dataclasses.replace(self, superseded=tuple(superseded))

    @property
    def pending(self) -> list[str]:
        """Tokens of jobs that no owner has looked for yet."""
        return [each.token for each in self.superseded if each.through is None]

    def is_void(self, token: str, step: int) -> bool:
        """Whether a job's writes of a step don't count, and never will.

        It may be removed at any time, by anybody.
        """
        removing = self.removing.union(*(each.removing for each in self.superseded))
        if (token, step) in removing:
            return True
        return any(
            each.token == token and each.through is not None and step > each.through
            for each in self.superseded
        )


def _marks(pairs: Iterable[Any]) -> frozenset[Mark]:
    return frozenset((str(token), int(step)) for token, step in pairs)
