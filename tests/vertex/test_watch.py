"""Following a job to the end of its run, over as many jobs as that takes."""

from __future__ import annotations

import json
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from tests.gcs.fixture import Gcs
from tests.vertex.fake import Vertex
from tests.vertex.test_service import Call, flags, tick
from trainer.core import storage
from trainer.core.errors import StorageError, TrainerError
from trainer.vertex import watch
from trainer.vertex.service import Job, ServiceError

LIMIT = 60.0
STOCKOUT = {"code": 8, "message": "could not be restarted: STOCKOUT"}
DONE: dict[str, Any] = {"state": "JOB_STATE_SUCCEEDED"}


def failed(code: int) -> dict[str, Any]:
    message = f"The replica workerpool0-0 exited with a non-zero status of {code}."
    return {"state": "JOB_STATE_FAILED", "error": {"code": 3, "message": message}}


class Ends(threading.Thread):
    """Lets each job that is submitted end in its way, with so many ticks in its run's statistics."""

    def __init__(self, vertex: Vertex, workdir: str, ends: Sequence[tuple[dict[str, Any], int]]):
        super().__init__(daemon=True)
        self._vertex, self._workdir, self._ends = vertex, workdir, ends

    def run(self) -> None:
        for number, (end, ticks) in enumerate(self._ends):
            deadline = time.monotonic() + LIMIT
            while len(self._vertex.documents) <= number and time.monotonic() < deadline:
                time.sleep(0.02)
            text = "".join(tick(index + 1) for index in range(ticks))
            storage.write_text_atomic(f"{self._workdir}/stats.jsonl", text)
            list(self._vertex.documents.values())[number].update(end)


def watched(
    call: Call, vertex: Vertex, gcs: Gcs, ends: Sequence[tuple[dict[str, Any], int]], *more: str
) -> TrainerError | None:
    call(*flags(gcs))
    thread = Ends(vertex, f"{gcs.url}/runs/a", ends)
    thread.start()
    try:
        call("watch", f"{gcs.url}/runs/a", "--resume", *more)
    except TrainerError as error:
        return error
    finally:
        thread.join(LIMIT)
    return None


def test_a_run_over_several_jobs(
    call: Call,
    vertex: Vertex,
    gcs: Gcs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stockout = {"state": "JOB_STATE_FAILED", "error": STOCKOUT}
    ends = [(failed(75), 1), (stockout, 2), (failed(134), 3), (DONE, 4)]
    assert watched(call, vertex, gcs, ends) is None
    assert len(vertex.requests) == 4
    assert all(request == vertex.requests[0] for request in vertex.requests)
    lines = capsys.readouterr().out.splitlines()
    jobs = "projects/pay/locations/us-central1/customJobs"
    assert [line for line in lines if "ended at" in line] == [
        f"{jobs}/1 ended at kimg 1 (code 75); {jobs}/2 goes on (1 of 20)",
        f"{jobs}/2 ended at kimg 2 (could not be restarted: STOCKOUT); {jobs}/3 goes on (2 of 20)",
        f"{jobs}/3 ended at kimg 3 (code 134); {jobs}/4 goes on (3 of 20)",
    ]
    assert [line.split()[1] for line in lines if line.startswith("tick")] == ["1", "2", "3", "4"]
    record = json.loads(storage.read_text(f"{gcs.url}/runs/a/submitted/job.json"))
    assert record["name"] == f"{jobs}/4"


@pytest.mark.parametrize(
    ("ends", "more", "jobs", "why"),
    [
        ([(failed(75), 3), (failed(75), 3)], [], 2, "ended at kimg 3: the run makes no progress"),
        ([(failed(75), 0), (failed(75), 0)], [], 2, "ended at kimg 0: the run makes no progress"),
        ([(failed(75), 1), (failed(75), 2)], ["--max_resumes=1"], 2, "again 1 times, as --max_re"),
    ],
)
def test_not_for_ever(
    call: Call,
    vertex: Vertex,
    gcs: Gcs,
    ends: Sequence[tuple[dict[str, Any], int]],
    more: list[str],
    jobs: int,
    why: str,
) -> None:
    error = watched(call, vertex, gcs, ends, *more)
    assert error is not None and error.exit_code == 75
    assert why in str(error) and "\n" not in str(error)
    assert len(vertex.requests) == jobs


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 137])
def test_never_after_a_fault(
    call: Call,
    vertex: Vertex,
    gcs: Gcs,
    code: int,
) -> None:
    error = watched(call, vertex, gcs, [(failed(code), 1)])
    assert error is not None and error.exit_code == code
    assert len(vertex.requests) == 1


@pytest.mark.parametrize(
    "end",
    [
        {"state": "JOB_STATE_CANCELLED"},
        {"state": "JOB_STATE_CANCELLED", "error": STOCKOUT},
        {"state": "JOB_STATE_FAILED", "error": {"code": 7, "message": "no access to the image"}},
    ],
)
def test_not_what_somebody_cancelled_or_cannot_start(
    call: Call,
    vertex: Vertex,
    gcs: Gcs,
    end: dict[str, Any],
) -> None:
    assert watched(call, vertex, gcs, [(end, 1)]) is not None
    assert len(vertex.requests) == 1


def test_a_service_that_is_away_for_a_while(
    call: Call,
    vertex: Vertex,
    gcs: Gcs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At any request: of the first looks, and of those around the next job's start."""
    call(*flags(gcs))
    vertex.silent = 3
    threads = [Ends(vertex, f"{gcs.url}/runs/a", [(failed(75), 1), (DONE, 2)])]
    create = vertex.post

    def away_at_first(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        vertex.silent, vertex.post = 2, create  # type: ignore[method-assign]
        return vertex.busy() or (500, {})

    vertex.post = away_at_first  # type: ignore[method-assign]
    threads[0].start()
    call("watch", f"{gcs.url}/runs/a", "--resume")
    threads[0].join(LIMIT)
    assert len(vertex.requests) == 2
    assert "(tried again for 60 minutes)" in capsys.readouterr().out


def test_somebody_else_was_faster(
    call: Call,
    vertex: Vertex,
    gcs: Gcs,
) -> None:
    call(*flags(gcs))
    next(iter(vertex.documents.values())).update(failed(75))
    call("resume", f"{gcs.url}/runs/a")
    list(vertex.documents.values())[1].update(DONE)
    call("watch", "1", "--resume")
    assert len(vertex.requests) == 2


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE_SEC", 0.05)

    def never() -> Job:
        raise ServiceError("can't look at it: connection refused")

    with pytest.raises(ServiceError, match="connection refused"):
        watch.patiently(never, 0.01)

    answers = iter([StorageError("cannot read"), None])

    def once() -> str:
        error = next(answers)
        if error:
            raise error
        return "it"

    monkeypatch.setattr(watch, "PATIENCE_SEC", 60.0)
    assert watch.patiently(once, 0.0) == "it"


def test_only_new_ticks_are_told(tmp_path: pathlib.Path) -> None:
    """Also after a resumed run has dropped the last, and has written longer ones in their place."""
    path, ticks = tmp_path / "stats.jsonl", watch.Ticks(str(tmp_path))
    assert ticks.new() == []
    path.write_text(tick(1) + tick(2))
    assert len(ticks.new()) == 2
    assert ticks.kimg == 2
    path.write_text(tick(1))
    assert ticks.new() == []
    path.write_text(tick(1) + tick(2))
    assert [line.split()[1] for line in ticks.new()] == ["2"]
    path.write_text(tick(1) + tick(20000) + tick(30000))
    assert [line.split()[1] for line in ticks.new()] == ["30000"]
