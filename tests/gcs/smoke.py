"""Everything on gs://: convert, train, SIGKILL, resume, generate, export; then looks at what there is.

  make smoke-gcs
  python -m tests.gcs.smoke gcp-storage-emulator     # on another server, see tests.gcs.emulator

The networks are too small to learn anything, and not compiled: it takes a minute or two.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from typing import Any

import yaml
from PIL import Image

from tests.gcs.emulator import ROOT, SERVERS, Emulator
from trainer.core import storage, tfrecord
from trainer.data import manifest

BUCKET = "smoke"
URL = f"gs://{BUCKET}"
STEPS, EVERY = 24, 4
SETTINGS = {
    "base": "smoke.yaml",
    "run": {"deterministic": True, "jit": "off"},
    "model": {"channel_max": 8},
    "training": {"total_kimg": STEPS * 16 / 1000},
    "objective": {"pl_weight": 0, "r1_gamma": 0},
    "checkpoint": {"every_steps": EVERY, "keep_last": 2},
    "telemetry": {"tick_kimg": 0.064, "snap_ticks": 3},
}


class Smoke:
    """The commands of a run, each in a process of its own, and what they cost."""

    def __init__(self, emulator: Emulator):
        self.emulator = emulator
        self.environment = os.environ | emulator.environment()
        self.summary: list[str] = []

    def start(self, module: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"trainer.{module}", *flags]
        print("$", "python", *command[1:], flush=True)
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE
        )

    def run(self, module: str, *flags: str) -> str:
        """Runs a command to its end and returns its output."""
        began = time.monotonic()
        self.emulator.reset_counts()
        process = self.start(module, *flags)
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            print("   ", line, end="", flush=True)
            lines.append(line)
        assert process.wait() == 0, f"trainer.{module} ended with {process.returncode}"
        self.note(module, time.monotonic() - began)
        return "".join(lines)

    def note(self, what: str, seconds: float) -> None:
        """Adds a line to the summary: what the requests since the last one were."""
        counts = self.emulator.counts()
        kinds = ("list", "stat", "read", "write", "part", "copy", "compose", "delete")
        requests = ", ".join(
            f"{number} {kind}"
            for kind in kinds
            if (number := sum(n for (_, name), n in counts.items() if name == kind))
        )
        megabytes = (counts["bytes", "received"] + counts["bytes", "sent"]) / 1e6
        self.summary.append(f"{what:<16}{seconds:6.1f} s   {requests}; {megabytes:.1f} MB")

    def committed(self) -> list[int]:
        """Steps of the checkpoints that are complete."""
        names = self.emulator.names(BUCKET)
        folders = {name.split("/")[2] for name in names if name.startswith("run/checkpoints/step-")}
        return sorted(
            int(folder.removeprefix("step-"))
            for folder in folders
            if any(n.startswith(f"run/checkpoints/{folder}/COMMITTED-") for n in names)
        )


def _put_images(emulator: Emulator) -> None:
    """A zip of the images that ship with the package."""
    small = manifest.load(storage.resolve("package:data/fluent_emoji_32"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for shard in range(len(small.shards)):
            with storage.open_read(small.path(shard)) as file:
                for number, record in enumerate(tfrecord.read_records(file)):
                    image = record[record.index(b"\x89PNG") : record.index(b"IEND") + 8]
                    archive.writestr(f"{shard}/{number}.png", image)
    emulator.put(BUCKET, "emoji.zip", buffer.getvalue())


def _train_and_kill(smoke: Smoke, flags: list[str]) -> int:
    """Starts training, and kills it when its second checkpoint is there. Returns its step."""
    began = time.monotonic()
    smoke.emulator.reset_counts()
    process = smoke.start("task", *flags)
    while len(smoke.committed()) < 2:
        assert process.poll() is None, f"training ended with {process.returncode}"
        assert time.monotonic() - began < 600, "no checkpoint within ten minutes"
        time.sleep(0.05)
    process.kill()
    process.wait()
    smoke.note("train, SIGKILL", time.monotonic() - began)
    return smoke.committed()[-1]


def _check(emulator: Emulator, images: list[str]) -> list[str]:
    """Looks at everything that was left behind; what is worth telling."""
    names = emulator.names(BUCKET)
    lines = emulator.get(BUCKET, "run/stats.jsonl").decode().splitlines()
    stats: list[dict[str, Any]] = [json.loads(line) for line in lines]
    ticks = [line["tick"] for line in stats]
    assert ticks == list(range(len(ticks))), f"ticks {ticks}"
    assert stats[-1]["nimg"] == STEPS * 16
    assert any(name.startswith("run/tensorboard/events.out.tfevents") for name in names)
    assert not any("tmp" in name.lower() for name in names), names
    assert {f"models/emoji/1/{name}" for name in ("saved_model.pb", "MODEL_CARD.md")} <= set(names)
    for name in ("run/reals.png", "run/fakes_init.png", *images):
        Image.open(io.BytesIO(emulator.get(BUCKET, name))).verify()
    small = manifest.load(f"{URL}/data")
    return [
        f"{URL}/data: {small.num_images} images in {len(small.shards)} shards",
        f"{URL}/run: {len(ticks)} ticks, none twice and none missing",
        f"{len(names)} objects",
    ]


def main(server: str = SERVERS[0]) -> None:
    began = time.monotonic()
    with Emulator(server) as emulator:
        emulator.url(BUCKET)
        os.environ.update(emulator.environment())
        smoke = Smoke(emulator)
        _put_images(emulator)
        base = storage.read_bytes(os.path.join(ROOT, "configs", "smoke.yaml"))
        emulator.put(BUCKET, "configs/smoke.yaml", base)
        emulator.put(BUCKET, "configs/tiny.yaml", yaml.safe_dump(SETTINGS).encode())

        source = ("--resolution=32", "--shards=4", f"--source={URL}/emoji.zip")
        smoke.run("convert", *source, f"--dest={URL}/data")
        flags = [f"--config={URL}/configs/tiny.yaml", f"--data={URL}/data", f"--workdir={URL}/run"]
        killed = _train_and_kill(smoke, flags)
        print(f"    killed after step {killed}")
        output = smoke.run("task", *flags)
        assert f"step {killed}," in output, "it did not go on from the last checkpoint"
        assert f"finished: {STEPS * 16 / 1000:g} kimg, {STEPS} steps" in output
        assert smoke.committed()[-1] == STEPS
        smoke.run("generate", f"--run={URL}/run", f"--out={URL}/out", "--seeds=0-3")
        smoke.run("export", f"--run={URL}/run", f"--dest={URL}/models/emoji")
        found = _check(emulator, [f"out/seed{n:04d}.png" for n in range(4)] + ["out/grid.png"])
    print("\nall on gs://, against the Cloud Storage of the tests:")
    print(*(f"  {line}" for line in [*smoke.summary, *found]), sep="\n")
    print(f"smoke-gcs passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
