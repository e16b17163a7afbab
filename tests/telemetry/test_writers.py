"""A run's telemetry as a whole: console, stats.jsonl and events, over a crash and a resume."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from trainer.core import storage, tfrecord
from trainer.telemetry import images, tensorboard
from trainer.telemetry.descriptions import describe
from trainer.telemetry.statsfile import Stat, constant
from trainer.telemetry.writers import Telemetry


def _run(
    workdir: Path,
    ticks: list[int],
    loss: float,
    resume: float = 0.0,
    images: int = 4000,
    tick_kimg: float = 4.0,
) -> None:
    telemetry = Telemetry(
        str(workdir),
        tensorboard=str(workdir / "tensorboard"),
        total_kimg=100,
        tick_kimg=tick_kimg,
        resume_kimg=resume,
        resume_tick=ticks[0] if resume else 0,
    )
    for tick in ticks:
        stats = {"Loss/G/loss": Stat(64, loss, 0.1), "Loss/pl_penalty": Stat(0, np.nan, np.nan)}
        telemetry.tick(
            stats,
            tick=tick,
            nimg=tick * images,
            augment_p=0.25,
            r1_gamma=1.0,
            total_sec=tick * 20.0,
            tick_sec=16.0,
            maintenance_sec=4.0,
        )
    telemetry.close()


def _scalars(workdir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return [
        (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
        for event in events.Tensors(name)
    ]


def test_tick_reports_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path, [1, 2], loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("tick 2 ")
    assert "sec/kimg 4.00" in lines[1]
    assert lines[1].endswith("ETA 7m 40s")  # 92 kimg at 20 s for 4
    first, second = map(json.loads, (tmp_path / "stats.jsonl").read_text().splitlines())
    assert (second["tick"], second["nimg"]) == (2, 8000)
    assert first["Loss/G/loss"] == {"num": 64, "mean": 0.5, "std": 0.1}
    means = {name: stat["mean"] for name, stat in second.items() if isinstance(stat, dict)}
    memory, peak = means.pop("Resources/cpu_mem_gb"), means.pop("Resources/peak_mem_gb")
    assert 0.01 < memory < peak * 1.001 < 1000
    means.pop("Resources/peak_gpu_mem_gb", None)
    assert means == {
        "Loss/G/loss": 0.5,
        "Loss/pl_penalty": None,
        "Progress/tick": 2,
        "Progress/kimg": 8,
        "Progress/augment": 0.25,
        "Timing/total_sec": 40,
        "Timing/sec_per_tick": 16,
        "Timing/sec_per_kimg": 4,
        "Timing/maintenance_sec": 4,
    }
    assert _scalars(tmp_path, "Loss/G/loss") == [(4, 0.5), (8, 0.5)]
    with pytest.raises(KeyError):
        _scalars(tmp_path, "Loss/pl_penalty")  # not measured: no point


def test_advice_reaches_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the weight of R1 that the tick is given, and after the tick."""
    telemetry = Telemetry(str(tmp_path), tensorboard="", total_kimg=100)
    for tick in range(5):
        telemetry.tick(
            {"Progress/variety": constant(0.1)},
            tick=tick,
            nimg=10_000 * (tick + 1),
            augment_p=0.25,
            r1_gamma=0.3,
            total_sec=1.0,
            tick_sec=1.0,
            maintenance_sec=0.0,
        )
    telemetry.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tick"] * 3 + ["advice:"] + ["tick"] * 2
    assert "objective.r1_gamma=3, in place of 0.3" in lines[3]


def test_resume_writes_no_tick_twice(tmp_path: Path) -> None:
    _run(tmp_path, [1, 2, 3, 4], loss=0.5)
    _run(tmp_path, [3, 4, 5], loss=0.25, resume=8.0)  # the last checkpoint was that of tick 2
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["tick"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["Loss/G/loss"]["mean"] for line in lines] == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert lines[2]["Timing/sec_per_kimg"]["mean"] == 4
    points = _scalars(tmp_path, "Loss/G/loss")
    assert points == [(4, 0.5), (8, 0.5), (12, 0.25), (16, 0.25), (20, 0.25)]


def test_ticks_that_share_a_step_are_told_apart(tmp_path: Path) -> None:
    """Of four in a step, two are in the checkpoint; resumed twice from it."""
    _run(tmp_path, [0, 1, 2, 3], loss=0.5, images=250)
    for loss, ticks in ((0.25, [2, 3, 4]), (0.125, [2, 3])):
        _run(tmp_path, ticks, loss=loss, resume=0.5, images=250)
        points = [(0, 0.5), (0, 0.5), (0, loss), (0, loss), (1, loss)]
        assert _scalars(tmp_path, "Loss/G/loss") == points[: 2 + len(ticks)]
    # What held nothing that stays is gone.
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize(("tick_kimg", "steps"), [(1, [1, 2, 3]), (0.999, [1000, 2000, 3000])])
def test_steps_are_kimg_and_images_where_ticks_are_shorter(
    tmp_path: Path, tick_kimg: float, steps: list[int]
) -> None:
    _run(tmp_path, [1, 2, 3], loss=0.5, images=1000, tick_kimg=tick_kimg)
    assert [step for step, _ in _scalars(tmp_path, "Loss/G/loss")] == steps


def test_scalars_are_described_once_in_a_file(tmp_path: Path) -> None:
    _run(tmp_path, [1, 2], loss=0.5)
    _run(tmp_path, [2, 3], loss=0.5, resume=4.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.SummaryMetadata("Loss/G/loss").summary_description.startswith("Loss of the gen")
    for path in (tmp_path / "tensorboard").iterdir():
        assert path.read_bytes().count(describe("Loss/G/loss").encode()) == 1


def test_the_config_is_a_text_of_tensorboard(tmp_path: Path) -> None:
    telemetry = Telemetry(str(tmp_path), tensorboard=str(tmp_path / "tensorboard"), total_kimg=1)
    telemetry.config("run:\n  jit: off\n")
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("Config")
    shown = tensor_util.make_ndarray(event.tensor_proto).item().decode()
    assert (event.step, shown) == (0, "```yaml\nrun:\n  jit: off\n```\n")


def test_images_stay_with_their_tick(tmp_path: Path) -> None:
    """They are there when a checkpoint can follow, and go with a tick that is taken back."""
    telemetry = Telemetry(str(tmp_path), tensorboard=str(tmp_path / "tensorboard"), total_kimg=100)

    def tick(number: int) -> None:
        telemetry.tick(
            {},
            tick=number,
            nimg=number * 100,
            augment_p=0.0,
            r1_gamma=1.0,
            total_sec=1.0,
            tick_sec=1.0,
            maintenance_sec=0.0,
        )

    picture = np.zeros((4, 4, 3), np.uint8)
    telemetry.image("Reals", picture, 0.0)
    for number in range(3):
        tick(number)
        telemetry.image("Fakes", picture + number, number / 10)
    # Killed here: nothing is closed. The last checkpoint was that after tick 1.
    telemetry = Telemetry(
        str(tmp_path),
        tensorboard=str(tmp_path / "tensorboard"),
        total_kimg=100,
        resume_kimg=0.1,
        resume_tick=2,
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert len(events.Tensors("Reals")) == 1
    assert len(events.Tensors("Fakes")) == len(events.Tensors("Progress/tick")) == 2
    telemetry.close()


def test_starting_over_forgets_the_old_run(tmp_path: Path) -> None:
    _run(tmp_path, [1, 2, 3], loss=0.5)
    _run(tmp_path, [1], loss=0.25)
    assert len((tmp_path / "stats.jsonl").read_text().splitlines()) == 1
    assert _scalars(tmp_path, "Loss/G/loss") == [(4, 0.25)]


def test_starting_over_forgets_step_zero_too(tmp_path: Path) -> None:
    logdir = str(tmp_path / "tensorboard")
    for loss in (0.5, 0.25):
        board = tensorboard.TensorBoard(logdir, 0)
        board.scalars({"Loss/G/loss": Stat(1, loss, 0.0), "Progress/tick": Stat(1, 0, 0.0)}, 999)
    assert _scalars(tmp_path, "Loss/G/loss") == [(0, 0.25)]


def test_a_torn_event_file_does_not_stop_a_resume(tmp_path: Path) -> None:
    _run(tmp_path, [1, 2, 3], loss=0.5)
    (events,) = (tmp_path / "tensorboard").iterdir()
    whole = events.read_bytes()
    events.write_bytes(whole[:-7])
    _run(tmp_path, [3], loss=0.25, resume=8.0)
    assert _scalars(tmp_path, "Loss/G/loss") == [(4, 0.5), (8, 0.5), (12, 0.25)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("place", [3, 20, -1])
def test_of_a_damaged_event_file_what_is_whole_stays(tmp_path: Path, kept: int, place: int) -> None:
    """Whatever is damaged of an event: its length, its payload or its checksum."""
    _run(tmp_path, [1, 2, 3, 4], loss=0.5)
    (events,) = (tmp_path / "tensorboard").iterdir()
    with events.open("rb") as file:
        frames = [bytearray(tfrecord.frame(payload)) for payload in tfrecord.read_records(file)]
    frames[kept][place] ^= 1  # the head of the file, or its first tick
    events.write_bytes(b"".join(frames))
    _run(tmp_path, [4], loss=0.25, resume=12.0)
    left = [(4, 0.5)] if kept == 0 else []
    assert _scalars(tmp_path, "Loss/G/loss") == [*left, (8, 0.5), (12, 0.5), (16, 0.25)]


def test_a_run_without_tensorboard_writes_no_events(tmp_path: Path) -> None:
    telemetry = Telemetry(str(tmp_path), tensorboard="", total_kimg=1)
    telemetry.image("fakes", np.zeros((4, 4, 3), np.uint8), 0.0)
    telemetry.close()
    assert [path.name for path in tmp_path.iterdir()] == ["stats.jsonl"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_reach_tensorboard(tmp_path: Path, channels: int) -> None:
    grid = images.tile(
        np.random.RandomState(0).randint(0, 256, (4, 8, 8, channels)).astype(np.uint8), (2, 2)
    )
    telemetry = Telemetry(str(tmp_path), tensorboard=str(tmp_path / "tensorboard"), total_kimg=1)
    telemetry.image("fakes", grid, 4.0)
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("fakes")
    assert event.step == 4
    png = event.tensor_proto.string_val[2]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))).reshape(grid.shape), grid)


def test_events_are_what_tensorboards_own_functions_write(tmp_path: Path) -> None:
    image = np.random.RandomState(0).randint(0, 256, (6, 4, 3)).astype(np.uint8)
    ours = tensorboard.TensorBoard(str(tmp_path / "ours"), 0)
    ours.scalars({"Loss/G/loss": Stat(2, 0.5, 0.1)}, 4000)
    ours.image("fakes", image, 4000)
    ours.text("Config", "run: {}", 4000)
    with tf.summary.create_file_writer(str(tmp_path / "theirs")).as_default(step=4):
        tf.summary.scalar("Loss/G/loss", 0.5, description=describe("Loss/G/loss"))
        tf.summary.image("fakes", image[np.newaxis])
        tf.summary.text("Config", "run: {}")
    both = [EventAccumulator(str(tmp_path / name)) for name in ("ours", "theirs")]
    for events in both:
        events.Reload()
    for name in ("Loss/G/loss", "fakes", "Config"):
        (mine,), (reference,) = (events.Tensors(name) for events in both)
        assert mine.step == reference.step
        metadata = [events.SummaryMetadata(name) for events in both]
        assert metadata[0].plugin_data.plugin_name == metadata[1].plugin_data.plugin_name
        assert metadata[0].summary_description == metadata[1].summary_description
        values = [tensor_util.make_ndarray(event.tensor_proto) for event in (mine, reference)]
        assert values[0].tolist() == values[1].tolist()


def test_large_grids_are_thinned_out_for_tensorboard(tmp_path: Path) -> None:
    board = tensorboard.TensorBoard(str(tmp_path), 0)
    board.image("fakes", np.zeros((1024, 4100, 1), np.uint8), 0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    width, height = (int(x) for x in events.Tensors("fakes")[0].tensor_proto.string_val[:2])
    assert (width, height) == (1367, 342)


@pytest.mark.parametrize("told", [False, True])
def test_other_files_stay(tmp_path: Path, told: bool) -> None:
    """Those of others in the directory, and in one that is given."""
    _run(tmp_path, [1, 2, 3], loss=0.5)
    others = [tmp_path / "tensorboard" / "events.out.tfevents.1700000000.host.1.0.v2"]
    others += [tmp_path / "tensorboard" / "plugins" / "events.out.tfevents.tick000000009.1.h.1.0"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not to be read")
    files = storage.walk(str(tmp_path)) if told else None
    Telemetry(
        str(tmp_path),
        tensorboard=str(tmp_path / "tensorboard"),
        files=files,
        total_kimg=100,
        resume_kimg=4.0,
        resume_tick=2,
    ).close()
    assert [path.read_bytes() for path in others] == [b"not to be read"] * 2
    for path in others:
        path.unlink()
    assert _scalars(tmp_path, "Loss/G/loss") == [(4, 0.5)]
