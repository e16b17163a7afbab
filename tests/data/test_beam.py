"""Apache Beam makes the same data set; bundles that are tried again leave nothing twice.

What a machine does needs no Beam to be tested; the pipeline itself is run where Beam is installed.
"""

from __future__ import annotations

import functools
import io
import os
import pathlib
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from trainer.core.errors import DataError, TrainerError, UsageError
from trainer.data import beam, conversion, images, manifest


@pytest.fixture(params=["folder", "zip"])
def source(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """40 images, one of them broken."""
    rng = np.random.default_rng(5)
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(40):
        path = root / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, [16, 16, 3], np.uint8)).save(path)
    if request.param == "folder":
        return str(root)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(root.iterdir()):
            archive.write(path, path.name)
    return str(tmp_path / "photos.zip")


def settings(source: str, dest: pathlib.Path, **changes) -> conversion.Settings:
    options = images.ImageOptions(resolution=(8, 8))
    return conversion.Settings(source, str(dest), options, shards=4, **changes)


def convert(source: str, dest: pathlib.Path, how=None, **changes) -> manifest.Manifest:
    return conversion.convert(settings(source, dest, **changes), lambda *_: None, how)[0]


def content(dest: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dest.iterdir() if path.is_file()}


class Machines:
    """Beam, as far as it matters here: elements in another order, some more than once."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at = fail_at

    def __call__(self, frame, dest, shards) -> None:
        for name, tasks in shards.items():
            beam.storage.write_text_atomic(beam._tasks_path(dest, name), beam._dump(tasks))
        for number, name in enumerate([*reversed(shards), *shards]):
            if number == self.fail_at:
                raise TrainerError("the machines went away")
            assert beam.make_shard(frame, dest, name) == name
        beam._raise_first(dest, list(shards))


def test_machines_make_what_this_one_makes(source: str, tmp_path: pathlib.Path) -> None:
    local = convert(source, tmp_path / "a" / "small")
    other = convert(source, tmp_path / "b" / "small", Machines())
    assert local.fingerprint == other.fingerprint
    assert content(tmp_path / "a" / "small") == content(tmp_path / "b" / "small")
    assert not (tmp_path / "b" / "small" / ".partial").exists()


def test_pipeline_that_failed_goes_on(source: str, tmp_path: pathlib.Path) -> None:
    convert(source, tmp_path / "a" / "small")
    with pytest.raises(TrainerError, match="went away"):
        convert(source, tmp_path / "b" / "small", Machines(fail_at=2))
    asked: list[list[str]] = []

    def rest(frame, dest, shards) -> None:
        asked.append(list(shards))
        Machines()(frame, dest, shards)

    convert(source, tmp_path / "b" / "small", rest)
    assert [name[6:11] for name in asked[0]] == ["00000", "00001"]
    assert content(tmp_path / "a" / "small") == content(tmp_path / "b" / "small")


def test_bundle_tried_again_after_its_entry_was_lost(source: str, tmp_path: pathlib.Path) -> None:
    """A machine that dies between the shard and its entry."""
    seen: list[bytes] = []

    def again(frame, dest, shards) -> None:
        Machines()(frame, dest, shards)
        name = next(iter(shards))
        seen.append((tmp_path / "small" / name).read_bytes())
        os.remove(os.path.join(dest, manifest.PARTIAL_NAME, f"{name}.json"))
        beam.make_shard(frame, dest, name)
        seen.append((tmp_path / "small" / name).read_bytes())

    convert(source, tmp_path / "small", again)
    assert seen[0] == seen[1]
    assert len(content(tmp_path / "small")) == 5


def test_missing_shards_are_told(source: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(TrainerError, match=r"4 shards \(small-00000.*missing; run the same"):
        convert(source, tmp_path / "small", lambda *_: None)
    assert "dataset.json" not in content(tmp_path / "small")


@pytest.fixture
def broken(tmp_path: pathlib.Path) -> str:
    root = tmp_path / "broken"
    root.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    for number in range(20):
        (root / f"{number:02d}.png").write_bytes(buffer.getvalue())
    for number in (7, 8):
        (root / f"{number:02d}.png").write_bytes(b"no image")
    return str(root)


def test_bad_image_is_named(broken: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"0[78].png in .*--on_bad=skip"):
        convert(broken, tmp_path / "small", Machines())


def test_bad_images_are_counted_over_all_machines(broken: str, tmp_path: pathlib.Path) -> None:
    result = convert(broken, tmp_path / "small", Machines(), skip_bad=True, max_bad=2)
    assert sorted(each["name"] for each in result.skipped) == ["07.png", "08.png"]
    with pytest.raises(DataError, match="2 images cannot be used, more than --max_bad=1"):
        convert(broken, tmp_path / "other", Machines(), skip_bad=True, max_bad=1)


def test_dataflow_needs_paths_that_others_see(
    source: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("apache_beam", "apache_beam.options", "apache_beam.options.pipeline_options"):
        module = type(sys)(name)
        module.PipelineOptions = None
        monkeypatch.setitem(sys.modules, name, module)
    how = functools.partial(beam.convert, runner="DataflowRunner", options=[])
    with pytest.raises(UsageError, match=r"--source=.*photos.*: other machines cannot see it"):
        convert(source, tmp_path / "small", how)


def test_without_beam_the_extra_is_named(
    source: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    how = functools.partial(beam.convert, runner="DirectRunner", options=[])
    with pytest.raises(UsageError, match=r"stylegan-trainer\[beam\]"):
        convert(source, tmp_path / "small", how)


# ---------------------------------------------------------------- the pipeline


@pytest.fixture
def direct() -> functools.partial[None]:
    pytest.importorskip("apache_beam")
    return functools.partial(beam.convert, runner="DirectRunner", options=[])


def test_direct_runner_makes_the_same(source: str, tmp_path: pathlib.Path, direct) -> None:
    convert(source, tmp_path / "a" / "small")
    convert(source, tmp_path / "b" / "small", direct)
    assert content(tmp_path / "a" / "small") == content(tmp_path / "b" / "small")


def test_direct_runner_names_a_bad_image(broken: str, tmp_path: pathlib.Path, direct) -> None:
    with pytest.raises(DataError, match=r"0[78].png in .*--on_bad=skip"):
        convert(broken, tmp_path / "small", direct)


def test_direct_runner_failure_is_one_line(
    source: str, tmp_path: pathlib.Path, direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("a disk broke")

    monkeypatch.setattr(beam, "write_shard", fail)
    with pytest.raises(TrainerError, match=r"the Beam pipeline failed \(.*a disk broke") as caught:
        convert(source, tmp_path / "small", direct)
    assert "\n" not in str(caught.value)
