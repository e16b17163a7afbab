"""Who the workers are, that they meet, and that none stays when one is gone."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

from trainer.core.errors import ConfigError
from trainer.distribution import cluster as cluster_lib
from trainer.distribution import meeting
from trainer.distribution.cluster import EvaluatorTask, find, parse

ROOT = pathlib.Path(__file__).parents[2]
ADDRESSES = ["a:1", "b:1", "c:1"]


def config(task: Any = ("worker", 0), **jobs: Any) -> str:
    if isinstance(task, tuple):
        task = {"type": task[0], "index": task[1]}
    return json.dumps({"cluster": jobs or {"worker": ADDRESSES}, "task": task})


# ------------------------------------------------------------------------------ environment


def test_workers_alone() -> None:
    found = parse("TF_CONFIG", config(("worker", 2)))
    assert found is not None
    assert found.names == ("worker:0", "worker:1", "worker:2")
    assert found.addresses == tuple(ADDRESSES)
    assert (found.index, found.is_chief, found.task) == (2, False, ("worker", 2))
    assert found.jobs() == {"worker": ADDRESSES}
    assert found.peer(1) == "worker:1 (b:1)"


def test_the_chief_comes_first() -> None:
    found = parse("TF_CONFIG", config(("worker", 0), worker=["b:1", "c:1"], chief=["a:1"]))
    assert found is not None
    assert found.names == ("chief:0", "worker:0", "worker:1")
    assert (found.index, found.is_chief) == (1, False)
    chief = parse("TF_CONFIG", config(("chief", 0), worker=["b:1"], chief=["a:1"]))
    assert chief is not None
    assert chief.is_chief


@pytest.mark.parametrize("pool", ["ps", "workerpool2"])
def test_a_pool_of_nobody_is_none(pool: str) -> None:
    found = parse("TF_CONFIG", config(("chief", 0), chief=["a:1"], worker=["b:1"], **{pool: []}))
    assert found is not None
    assert found.names == ("chief:0", "worker:0")


def test_pools_of_vertex() -> None:
    """Their task index may come as text."""
    text = config(
        {"type": "workerpool1", "index": "1", "trial": ""},
        workerpool0=["a:2222"],
        workerpool1=["b:2222", "c:2222"],
    )
    found = parse("CLUSTER_SPEC", text)
    assert found is not None
    assert found.jobs() == {"chief": ["a:2222"], "worker": ["b:2222", "c:2222"]}
    assert found.task == ("worker", 1)


@pytest.mark.parametrize(
    "text",
    [
        config(("evaluator", 0), worker=ADDRESSES),
        config(("evaluator", 0), worker=ADDRESSES, evaluator=["d:1"]),
        config(("workerpool3", 0), workerpool0=["a:1"], workerpool3=["d:1"]),
    ],
)
def test_an_evaluator_has_nothing_to_do(text: str) -> None:
    with pytest.raises(EvaluatorTask):
        parse("TF_CONFIG", text)


def test_workers_pass_over_an_evaluator() -> None:
    found = parse("TF_CONFIG", config(("chief", 0), chief=["a:1"], evaluator=["d:1"]))
    assert found is not None
    assert found.names == ("chief:0",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TF_CONFIG is not JSON"),
        ("[1]", "it is no object"),
        (config(worker="a:1"), "the addresses of worker are 'a:1'"),
        (config(worker=["a:1", "b"]), "the addresses of worker"),
        (config(worker=["a:1", "b:port"]), "the addresses of worker"),
        (config(worker=["a:1", "b:99999"]), "the addresses of worker"),
        (config(worker=["a:1", "a:1"]), "a:1 is there twice"),
        (config(workers=["a:1"]), "there is no job 'workers'; expected chief, worker"),
        (config(chief=["a:1", "b:1"]), "several chiefs"),
        (config(("worker", 3)), "task worker:3 is not one of the 3.*an index from 0 to 2"),
        (config(("worker", -1)), "an index from 0 to 2"),
        (config(("worker", "x")), "its task is"),
        (config(("chief", 0)), "its task is .*one of the cluster"),
        (config(None), "its task is None"),
        (config({"type": "worker"}), "its task is"),
        (config(("ps", 0), worker=["a:1"], ps=["b:1"]), "parameter servers.*pool 2"),
        (config(("worker", 0), worker=["a:1"], ps=["b:1"]), "parameter servers"),
    ],
)
def test_a_wrong_description(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse("TF_CONFIG", text)
    assert "\n" not in str(raised.value)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in cluster_lib.SOURCES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_alone(environment: pytest.MonkeyPatch) -> None:
    assert find("auto") is None
    with pytest.raises(ConfigError, match="'multi_worker' needs TF_CONFIG or CLUSTER_SPEC"):
        find("multi_worker")
    environment.setenv("TF_CONFIG", "{}")
    assert find("mirrored") is None
    with pytest.raises(ConfigError, match="'multi_worker' needs"):
        find("multi_worker")


def test_a_cluster_of_one_is_no_cluster_unless_asked_for(environment: pytest.MonkeyPatch) -> None:
    """Vertex AI describes a single machine, too."""
    environment.setenv("TF_CONFIG", config(("chief", 0), chief=["a:1"]))
    assert find("auto") is None
    assert find("one_device") is None
    alone = find("multi_worker")
    assert alone is not None
    assert alone.names == ("chief:0",)


def test_tf_config_goes_before_cluster_spec(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CLUSTER_SPEC", config(("worker", 1)))
    found = find("auto")
    assert found is not None and (found.source, found.index) == ("CLUSTER_SPEC", 1)
    environment.setenv("TF_CONFIG", config(("worker", 2)))
    found = find("auto")
    assert found is not None and (found.source, found.index) == ("TF_CONFIG", 2)


def test_workers_dont_each_train_alone(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TF_CONFIG", config(("worker", 1)))
    with pytest.raises(ConfigError, match="'mirrored', but TF_CONFIG names 3 workers"):
        find("mirrored")


# ------------------------------------------------------------------------------ meeting

LIMIT, LONG_LIMIT, SILENCE = 6.0, 60.0, 5.0

# A worker that does as its argument says once all have met.
_WORKER = """
import os, random, signal, sys, threading, time
from trainer import config as config_lib
from trainer.core import flags
from trainer.core.errors import DataError, PreemptedError
from trainer.distribution import cluster, meeting, membership

behaviour = sys.argv.pop(1)
membership._GRACE_SEC = 1.5
os.environ["CUDA_VISIBLE_DEVICES"] = "0,1" if behaviour == "two GPUs" else "-1"

def make_steps(members):
    # 2000 of them, as fast as it can, at a pace of its own; "steps N" wants to stop after N
    # milliseconds, "steps at N" once it has begun step N.
    pace, step, asks_at = random.Random(members._cluster.index), 0, None
    match behaviour.split():
        case [_, "at", number]:
            asks_at = int(number)
        case [_, *after]:
            for each in after:
                threading.Timer(float(each) / 1000, members.ask_to_stop, ["SIGTERM"]).start()
    while step < 2000:
        if (reason := members.begin(step + 2)) is not None:
            print(f"stopped after {step}: {reason}", flush=True)
            if members._cluster.is_chief:
                time.sleep(1)  # saves
            raise PreemptedError(f"saved {step}")
        step += 2
        if step == asks_at:
            members.ask_to_stop("SIGTERM")
        time.sleep(pace.random() * 0.002)

def main(_):
    config = config_lib.from_dict(
        {"run": {"join_timeout": LIMIT, "worker_timeout": SILENCE},
         "training": {"rounds": 2 if behaviour == "differs" else 1}}
    )
    if behaviour == "other version":
        versions = meeting.identity(config)
        meeting.identity = lambda _: {**versions, "TensorFlow": "2.16.2"}
    if behaviour == "dies unanswering":
        membership.Membership._take = lambda *_: None
    with membership.member(cluster.find("auto"), config) as members:
        print("met", flush=True)
        if behaviour.startswith("steps"):
            make_steps(members)
        time.sleep(0.3)
        if behaviour.startswith("dies"):
            time.sleep(1 if behaviour == "dies unanswering" else 0)
            os._exit(9)
        if behaviour == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        if behaviour == "fails":
            raise DataError("shard 3 is gone")
        if behaviour == "waits":
            time.sleep(60)
        if behaviour == "breaks":  # as TensorFlow does when a peer goes away
            time.sleep(1)
            raise RuntimeError("collective failed")
    print("done")

flags.run(main, usage="")
"""


class Result:
    """What a worker printed, and its exit code."""

    def __init__(self, out: str, err: str, code: int) -> None:
        self.out, self.err, self.code = out, err, code


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def workers(
    *behaviours: str, ports: list[int] | None = None, limit: float = LONG_LIMIT
) -> dict[int, Result]:
    """Runs a worker for each, but for 'absent' ones; those that hang are ended after the others."""
    addresses = [f"localhost:{port}" for port in ports or _ports(len(behaviours))]
    code = textwrap.dedent(_WORKER).replace("LIMIT", str(limit)).replace("SILENCE", str(SILENCE))
    processes = {}
    for index, behaviour in enumerate(behaviours):
        if behaviour == "absent":
            continue
        environment = {"TF_CONFIG": config(("worker", index), worker=addresses), "PATH": ""}
        processes[index] = subprocess.Popen(
            [sys.executable, "-c", code, behaviour],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    results = {
        index: Result(*process.communicate(timeout=60), process.returncode)
        for index, process in processes.items()
        if behaviours[index] != "hangs"
    }
    for process in processes.values():
        process.kill()
        process.wait()
    return results


def test_workers_meet_and_part() -> None:
    for result in workers("works", "works", "works").values():
        assert (result.out, result.err, result.code) == ("met\ndone\n", "", 0)


@pytest.mark.parametrize(
    ("behaviours", "message", "code"),
    [
        (("waits", "dies", "waits"), "worker:1 (localhost:PORT1) has ended", 75),
        (("dies", "waits", "waits"), "worker:0 (localhost:PORT0) has ended", 75),
        (("breaks", "dies", "breaks"), "worker:1 (localhost:PORT1) has ended", 75),
        (("waits", "hangs", "waits"), "worker:1 (localhost:PORT1) has been silent for", 75),
        (("waits", "fails"), "worker:1 (localhost:PORT1) has stopped: shard 3 is gone", 3),
        (("fails", "waits"), "worker:0 (localhost:PORT0) has stopped: shard 3 is gone", 3),
    ],
)
def test_none_stays_alone(behaviours: tuple[str, ...], message: str, code: int) -> None:
    ports = _ports(len(behaviours))
    for number, port in enumerate(ports):
        message = message.replace(f"PORT{number}", str(port))
    began = time.monotonic()
    results = workers(*behaviours, ports=ports)
    assert time.monotonic() - began < 60
    survivors = {k: r for k, r in results.items() if behaviours[k] in ("waits", "breaks")}
    assert len(survivors) == len(behaviours) - 1
    for result in survivors.values():
        assert (result.out, result.code) == ("met\n", code)
        assert len(result.err.splitlines()) == 1
        assert result.err.startswith("error: ")
        assert message in result.err


@pytest.mark.parametrize(
    "behaviours",
    [
        ("steps", "steps 300", "steps"),
        ("steps 300", "steps", "steps"),
        ("steps 0", "steps", "steps"),
        # All machines are told at once, and some twice.
        ("steps 200 210", "steps 200", "steps 201 202"),
    ],
)
def test_all_stop_after_the_same_step(behaviours: tuple[str, ...]) -> None:
    """However far each has come: here nothing holds them together."""
    ports = _ports(len(behaviours))
    results = workers(*behaviours, ports=ports)
    stops = set()
    for result in results.values():
        met, line = result.out.splitlines()
        stop, _, reason = line.partition(": ")
        stops.add(stop)
        assert met == "met"
        asking = [index for index, each in enumerate(behaviours) if each != "steps"]
        assert reason in [f"SIGTERM on worker:{i} (localhost:{ports[i]})" for i in asking]
        # Nobody takes the end of another for its death.
        assert result.code == 75
        assert result.err == f"stopped: saved {stop.removeprefix('stopped after ')}\n"
    assert len(stops) == 1


def test_what_follows_a_greeting_is_not_lost() -> None:
    """The chief may hold all while another is still being told to go."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with theirs:
        theirs.sendall(b'{"go": true}\n{"hold": "SIGTERM"}\n')
        line = meeting.Line(ours)
        assert line.wait_for(time.monotonic() + 5) == {"go": True}
        assert line.receive() == [{"hold": "SIGTERM"}]
        line.close()


@pytest.mark.parametrize("asks", [0, 1])
def test_who_wants_to_stop_too_late_disturbs_nobody(asks: int) -> None:
    """However far from the end the other is."""
    behaviours = ["steps", "steps"]
    behaviours[asks] = "steps at 2000"
    for result in workers(*behaviours).values():
        assert (result.out, result.err, result.code) == ("met\ndone\n", "", 0)


def test_a_stop_near_the_end_stops_all_or_none() -> None:
    codes = {result.code for result in workers("steps", "steps at 1998", "steps").values()}
    assert codes in ({0}, {75})


def test_a_worker_that_dies_while_the_others_hold() -> None:
    """The answer that never comes is not waited for."""
    ports = _ports(3)
    results = workers("steps 300", "dies unanswering", "steps", ports=ports)
    for index in (0, 2):
        assert results[index].code == 75
        assert f"worker:1 (localhost:{ports[1]}) has ended" in results[index].err


def test_a_missing_worker_is_named() -> None:
    ports = _ports(3)
    for result in workers("works", "absent", "works", ports=ports, limit=LIMIT).values():
        assert (result.code, result.out) == (75, "")
        assert result.err.startswith(f"error: missing after 6 s: worker:1 (localhost:{ports[1]});")


def test_a_missing_chief_is_named() -> None:
    ports = _ports(2)
    result = workers("absent", "works", ports=ports, limit=LIMIT)[1]
    assert result.code == 75
    assert f"missing after 6 s: worker:0 (localhost:{ports[0]}) (Connection" in result.err


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("other version", "has TensorFlow 2.16.2, worker:0 (localhost:PORT) has 2."),
        ("two GPUs", "has GPUs 2, worker:0 (localhost:PORT) has 0; start all workers with the"),
        ("differs", "has rounds 2, worker:0 (localhost:PORT) has 1; start all workers with the"),
    ],
)
def test_workers_that_differ(behaviour: str, message: str) -> None:
    ports = _ports(3)
    message = message.replace("PORT", str(ports[0]))
    for result in workers("works", "works", behaviour, ports=ports).values():
        assert (result.code, result.out) == (2, "")
        assert f"worker:2 (localhost:{ports[2]}) {message}" in result.err


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        results = workers("works", "works", ports=[port, _ports(1)[0]], limit=LIMIT)
    first, second = results[0], results[1]
    assert first.code == 2
    assert f"can't listen on port {port} (Address already in use); end the program" in first.err
    # The other program takes connections, but says nothing.
    assert second.code == 75
    assert "missing after 6 s: worker:0" in second.err


def test_strangers_are_passed_over() -> None:
    """A port scanner that talks to the chief takes nobody's place."""
    ports = _ports(2)
    code = f"""
import socket, time
for _ in range(100):
    try:
        with socket.create_connection(("localhost", {ports[0]}), 1) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            break
    except OSError:
        time.sleep(0.02)
"""
    stranger = subprocess.Popen([sys.executable, "-c", code])
    results = workers("works", "works", ports=ports)
    stranger.wait()
    assert [result.code for result in results.values()] == [0, 0]
