"""Trains the same few steps on many placements and shows how far their results are apart.

    python -m tests.training.placement                        # the table, in float64
    python -m tests.training.placement --precision=float32

Each placement is a run of the training command with tiny networks and everything on (both
regularisers, ADA that moves p, style mixing, classes), in one or several processes of its own:
mirrored strategies can't follow each other in one process, since TensorFlow numbers their
collectives alike.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tests.training import conftest
from trainer import task
from trainer.core import flags as flags_lib
from trainer.data.pipeline import ImageStream
from trainer.layers.ops import Backend
from trainer.training import build, checkpoint
from trainer.training.step import TrainStep

ROOT = pathlib.Path(__file__).parents[2]
STEPS, GROUP = 8, 2

# With this seed and target p goes up and down, and is close to doing the other.
CONFIG = """
run: {jit: "off", seed: 4, worker_timeout: 300}
data: {use_labels: true, window: 8}
model: {z_dim: 8, w_dim: 8, mapping_layers: 1, d_mapping_layers: 1, channel_base: 64,
  channel_max: 8}
training: {group_size: 2, ema_kimg: 0.05, ema_rampup: 0.5}
objective: {g_reg_interval: 2, d_reg_interval: 3}
augment: {mode: ada, pipe: b, p: 0.3, target: 0.4, interval: 2}
telemetry: {tensorboard: false}
"""


@dataclass(frozen=True)
class Placement:
    """Where and in how many pieces a batch is computed; `replicas` are those of one worker.

    With several steps in each call, ticks come at other steps. `tpu` computes as on
    TPUs.
    """

    workers: int = 1
    replicas: int = 1
    rounds: int = 1
    batch: int = 16
    steps_per_loop: int = 1
    tpu: bool = False

    def __str__(self) -> str:
        each = self.batch // (self.workers * self.replicas * self.rounds)
        in_a_row = f", {self.steps_per_loop} in a row" if self.steps_per_loop > 1 else ""
        tpu = ", as TPUs" if self.tpu else ""
        where = f"{self.workers} workers x {self.replicas} x {self.rounds} rounds x {each}"
        return f"{where}{in_a_row}{tpu}"

    @property
    def whole(self) -> Placement:
        """The same batch in one piece."""
        return Placement(batch=self.batch, steps_per_loop=self.steps_per_loop)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
      values: the state after the last step, by the names of a checkpoint.
      stats: the lines of stats.jsonl, without timings and resources.
      images: checksum of each group's images and labels, by the group's number.
      collectives: how often each operation between replicas is in the step's graph, in all that a
        worker traces for its replicas.
    """

    values: dict[str, np.ndarray]
    stats: list[dict[str, Any]]
    images: dict[int, int]
    collectives: dict[str, int]


# One, two and four replicas in one process, two and four in two, each in one, two and four rounds.
# Four replicas in four rounds need sixteen groups.
SHAPES = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
PLACEMENTS = (
    *(
        Placement(workers, replicas, rounds, 32 if workers * replicas * rounds > 8 else 16)
        for workers, replicas in SHAPES
        for rounds in (1, 2, 4)
        if workers * replicas * rounds > 1
    ),
    Placement(replicas=2, steps_per_loop=4),
    Placement(workers=2, steps_per_loop=4),
    Placement(workers=2, tpu=True),
    Placement(workers=2, rounds=2, tpu=True),
)


# ------------------------------------------------------------------------------ running


def run(
    placement: Placement,
    data: str,
    folder: pathlib.Path,
    *,
    precision: str = "float64",
) -> Outcome:
    """Trains in processes of their own, and reads what they left.

    Args:
      placement: where.
      data: directory of the data set.
      folder: empty; for the run.
      precision: `run.precision`.
    """
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    kimg = placement.batch / 1000
    settings = {
        "run.precision": precision,
        "run.cpu_replicas": placement.replicas,
        "run.steps_per_loop": placement.steps_per_loop,
        "training.batch_size": placement.batch,
        "training.rounds": placement.rounds,
        "training.total_kimg": STEPS * kimg,
        "augment.adjust_kimg": 10 * kimg,  # p moves by 0.2
        "telemetry.tick_kimg": 2 * kimg,
    }
    flags = [f"--config={config}", f"--data={data}", f"--workdir={folder / 'run'}"]
    flags += [f"--set={key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "tests.training.placement"]
    processes = []
    for index, environment in enumerate(environments(placement.workers)):
        order = folder / f"images-{index}"
        with open(folder / f"log-{index}", "w") as log:
            process = subprocess.Popen(
                [*command, f"--order={order}", *(["--tpu"] if placement.tpu else []), *flags],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = "".join((folder / f"log-{i}").read_text() for i in range(placement.workers))
        raise AssertionError(f"{placement} ended with {codes}:\n{logs}")
    return _read(folder)


def environments(workers: int) -> list[dict[str, str]]:
    """The environment of each worker."""
    base = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    if workers == 1:
        return [base]
    sockets = [socket.socket() for _ in range(workers)]
    for each in sockets:
        each.bind(("localhost", 0))
    addresses = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return [
        {
            **base,
            "TF_CONFIG": json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            ),
        }
        for index in range(workers)
    ]


def _read(folder: pathlib.Path) -> Outcome:
    found, _ = checkpoint.newest(str(folder / "run"))
    assert found is not None and found.step == STEPS
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    with checkpoint._reader(found) as reader:
        values = {
            key[: -len(suffix)].replace(".S", "/").replace("..", "."): reader.get_tensor(key)
            for key in reader.get_variable_to_shape_map()
            if key.endswith(suffix) and not key.startswith("save_counter")
        }
    lines = (folder / "run" / "stats.jsonl").read_text().splitlines()
    passing = ("Timing/", "Resources/", "timestamp")
    stats = [
        {key: value for key, value in json.loads(line).items() if not key.startswith(passing)}
        for line in lines
    ]
    images: dict[int, int] = {}
    for path in folder.glob("images-?"):
        pairs = [line.split() for line in path.read_text().splitlines()]
        assert not images.keys() & {int(number) for number, _ in pairs}
        images |= {int(number): int(checksum) for number, checksum in pairs}
    collectives = json.loads((folder / "images-0.collectives").read_text())
    return Outcome(values, stats, images, collectives)


def distance(found: Any, wanted: Any) -> float:
    """Relative L2."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-12))


def distances(found: Outcome, wanted: Outcome) -> dict[str, float]:
    """Of every tensor of the state."""
    assert found.values.keys() == wanted.values.keys()
    return {name: distance(found.values[name], value) for name, value in wanted.values.items()}


# ------------------------------------------------------------------------------ one process


def _train(order: str, tpu: bool, flags: list[str]) -> None:
    """The training command, with a record of the images it takes and of what crosses replicas."""
    if tpu:
        build.backend = lambda *_: Backend.TPU
    # Rewriting graphs takes longer than the few steps made with them.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    original = ImageStream.__next__

    def recorded(self: ImageStream) -> Any:
        images, labels, numbers = batch = original(self)
        with open(order, "a") as file:
            for number, *content in zip(
                numbers.numpy(), images.numpy(), labels.numpy(), strict=True
            ):
                checksum = zlib.crc32(b"".join(part.tobytes() for part in content))
                file.write(f"{number} {checksum}\n")
        return batch

    ImageStream.__next__ = recorded  # type: ignore[method-assign]
    create, steps = TrainStep.__init__, []

    def created(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        steps.append(self._steps)

    TrainStep.__init__ = created  # type: ignore[method-assign]

    def main(argv: Any) -> None:
        task.main(argv)
        with open(f"{order}.collectives", "w") as file:
            json.dump(_collectives(steps[0]), file)

    sys.argv[1:] = flags
    task.define_flags()
    flags_lib.run(main, usage="")


def _collectives(function: Any) -> dict[str, int]:
    """The operations between replicas in a traced function, and in all that it calls."""
    (traced,) = function._list_all_concrete_functions()
    definition = traced.graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return collections.Counter(node.op for node in nodes if "Collective" in node.op)


# ------------------------------------------------------------------------------ the table


def run_all(
    placements: tuple[Placement, ...], data: str, folder: pathlib.Path, precision: str
) -> dict[Placement, Outcome]:
    """Runs placements and what they are compared with, two at a time."""
    wanted = list(dict.fromkeys([*(each.whole for each in placements), *placements]))

    def outcome(placement: Placement) -> Outcome:
        name = str(placement).replace(",", "").replace(" ", "-")
        return run(placement, data, folder / f"{placement.batch}-{name}", precision=precision)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(outcome, wanted), strict=True))


TABLES = {
    "G": "G/",
    "D": "D/",
    "G_ema": "G_ema/",
    "Adam": ("G_opt/", "D_opt/"),
    "w_avg": "G/mapping.w_avg",
    "pl_mean": "objective/pl_mean",
    "p": "augment/p",
}


def table(outcomes: dict[Placement, Outcome]) -> str:
    """For each placement the largest difference of a tensor in each part of the state."""
    lines = [f"{'relative L2 to the batch in one piece':<44}" + "".join(f"{n:>9}" for n in TABLES)]
    for placement, outcome in outcomes.items():
        if placement == placement.whole:
            continue
        found = distances(outcome, outcomes[placement.whole])
        largest = [
            max(value for name, value in found.items() if name.startswith(prefix))
            for prefix in TABLES.values()
        ]
        lines.append(f"{placement!s:<44}" + "".join(f"{value:>9.1e}" for value in largest))
    return "\n".join(lines)


def main() -> None:
    """Shows the table, or is one process of a placement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="float64")
    parser.add_argument("--order", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tpu", action="store_true", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.order:
        _train(arguments.order, arguments.tpu, flags)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data = conftest.write(folder / "squares").directory
        print(table(run_all(PLACEMENTS, data, folder, arguments.precision)))


if __name__ == "__main__":
    main()
