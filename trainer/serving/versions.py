"""Numbered versions of a model in one directory, each there completely or not at all.

`<dest>/1/`, `<dest>/2/` ... are what TensorFlow Serving calls the versions of a model: it takes the
largest number and ignores names that are none. A new one is written under such a name,
`.<number>.<random>.partial`, by whoever has the lease of `<dest>`, and moved to its number:

* on a disk in one step, so that a reader sees the whole version or nothing;
* in an object store, where a directory is only the beginning of names, file by file. Uploaded and
  compared first, the files are copied within the store, which takes moments, and `saved_model.pb`
  comes last. Between the first and the last a reader sees a directory without that file, and every
  loader of a SavedModel refuses it; what it would not refuse, a graph without its parameters, never
  exists. TensorFlow Serving keeps the version it has and tries again.

A process that is killed leaves a `.partial`, and in a store it may leave a number without
`saved_model.pb`. Neither can be loaded, and the next export removes them, before it writes anything:
the `.partial` first, so that a process that was paused and lost the lease has nothing left to move.
It takes another number: a server that has given up on one doesn't come back to it. No file of a
number is ever replaced.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from trainer.core import documents, storage
from trainer.core import lease as lease_lib
from trainer.core.errors import StorageError
from trainer.core.lease import Lease
from trainer.core.storage import ConflictError

LAST = "saved_model.pb"
"""With this file a version is complete."""
FIRST = "model_card.json"
"""By this one, which comes first, a number that isn't complete is known to be an export's."""

_NUMBER = re.compile(r"\d+")
_PARTIAL = re.compile(r"\.\d+\.[0-9a-f]{8}\.partial")


@dataclass(frozen=True)
class Draft:
    """A version that is being written.

    Attributes:
      number: which it will be.
      folder: local; what is written there becomes the version.
      path: where it will be.
    """

    number: int
    folder: str
    path: str


@contextlib.contextmanager
def draft(
    dest: str,
    *,
    scratch: Callable[[], AbstractContextManager[str]],
    log: Callable[[str], object] = print,
) -> Iterator[Draft]:
    """A version to write; it is published when the block ends, and gone if it raises.

    Args:
      dest: directory of the model, local or in an object store; made if it isn't there.
      scratch: makes a local directory, for what is to be uploaded.
      log: is told of a wait for the lease.

    Raises:
      LeaseHeldError: another process exports to this directory.
      StorageError: it can't be written.
    """
    remote = storage.is_remote(dest)
    with lease_lib.acquire(dest, log=log) as lease:
        number = _clean(dest, lease)
        path = storage.join(dest, str(number))
        # A name of its own: whoever lost the lease to this process may still be writing.
        partial = storage.join(dest, f".{number}.{secrets.token_hex(4)}.partial")
        with scratch() if remote else contextlib.nullcontext(partial) as folder:
            try:
                storage.makedirs(folder)
                yield Draft(number, folder, path)
                publish = _publish_remote if remote else _publish_locally
                publish(folder, partial, path, lease)
            except ConflictError:  # the lease is another's, or will be seen to be
                raise  # and what is there is another's to judge
            except BaseException:
                with contextlib.suppress(StorageError):
                    storage.remove_tree(partial)
                    lease.check()
                    if remote and not storage.isfile(storage.join(path, LAST)):
                        _remove(path)
                raise
        storage.remove_tree(partial)


def newest_card(dest: str) -> dict[str, Any] | None:
    """The newest complete version's description of itself, None if there is no such version.

    Args:
      dest: directory of the model.
    """
    there = storage.walk(dest)
    complete = [int(name) for name in _names(there, _NUMBER) if f"{name}/{LAST}" in there]
    if not complete:
        return None
    found = storage.read_version(storage.join(dest, str(max(complete)), FIRST))
    try:
        return documents.parse_object(found[0] if found else b"")
    except documents.DocumentError:
        return None  # another program's


def _publish_locally(folder: str, partial: str, path: str, lease: Lease) -> None:
    for name in storage.walk(folder):
        storage.sync(storage.join(folder, name))
    with lease.fenced():
        storage.rename(partial, path)
    storage.sync(path)


def _publish_remote(folder: str, partial: str, path: str, lease: Lease) -> None:
    ranks = {FIRST: -1, LAST: 1}
    names = sorted(storage.walk(folder), key=lambda name: (ranks.get(name, 0), name))
    for name in names:
        here, there = storage.join(folder, name), storage.join(partial, name)
        storage.upload(here, there)
        if storage.digest(there) != storage.digest(here):
            raise StorageError(
                f"{there} is not in the store as it was written; run the same command again"
            )
    for name in names:
        lease.check()
        storage.rename(storage.join(partial, name), storage.join(path, name))


def _names(files: dict[str, storage.Digest], pattern: re.Pattern[str]) -> set[str]:
    """The directories at the top that are so named."""
    names = {name.partition("/")[0] for name in files if "/" in name}
    return {name for name in names if pattern.fullmatch(name)}


def _clean(dest: str, lease: Lease) -> int:
    """Removes what killed exports have left; returns the next number.

    A number without `saved_model.pb` may be another program's: only a model card makes it ours.
    """
    there = storage.walk(dest)
    for name in sorted(_names(there, _PARTIAL)):
        lease.check()
        _remove(storage.join(dest, name))
    # Once more: until its `.partial` was gone, a process that lost the lease could go on.
    if _names(there, _PARTIAL):
        there |= storage.walk(dest)
    ours = {
        name
        for name in _names(there, _NUMBER)
        if f"{name}/{FIRST}" in there and f"{name}/{LAST}" not in there
    }
    for name in sorted(ours):
        lease.check()
        _remove(storage.join(dest, name))
    return 1 + max(map(int, _names(there, _NUMBER)), default=0)


def _remove(path: str) -> None:
    """The card last: without it what a killed removal leaves would be nobody's."""
    names = set(storage.walk(path)) - {FIRST}
    storage.remove_files(storage.join(path, name) for name in sorted(names))
    storage.remove_tree(path)
