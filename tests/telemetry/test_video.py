"""Videos: what is written can be played, and the walk is a loop."""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.telemetry import video


def _frames(count: int, channels: int = 3, height: int = 8, width: int = 16) -> list[np.ndarray]:
    levels = np.linspace(10, 240, count).astype(np.uint8)
    return [np.full((height, width, channels), level, np.uint8) for level in levels]


def test_spline_passes_its_keys_and_closes() -> None:
    keys = np.random.RandomState(0).randn(4, 3, 5).astype(np.float32)
    points = np.stack(list(video.closed_spline(keys, 10)))
    assert points.shape == (40, 3, 5)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points[::10], keys, atol=1e-6)
    # Closed and smooth: no step, and no change of step, is larger at the seam than elsewhere.
    loop = np.concatenate([points, points[:2]])
    steps = np.abs(np.diff(loop, axis=0)).max(axis=(1, 2))
    bends = np.abs(np.diff(loop, n=2, axis=0)).max(axis=(1, 2))
    assert steps[-2:].max() <= 1.5 * steps[:-2].max()
    assert bends[-2:].max() <= 1.5 * bends[:-2].max()


def test_spline_of_two_keys_goes_there_and_back() -> None:
    keys = np.array([[0.0], [1.0]], np.float32)
    points = np.stack(list(video.closed_spline(keys, 4)))[:, 0]
    np.testing.assert_allclose(points[1:4], points[:4:-1], atol=1e-6)
    assert points[4] == 1
    assert (np.diff(points[:5]) > 0).all()


def test_spline_is_exact_on_a_line() -> None:
    keys = np.arange(6, dtype=np.float32)[:, None]
    points = np.stack(list(video.closed_spline(keys, 5)))[:, 0]
    np.testing.assert_allclose(points[5:20], np.arange(5, 20) / 5, atol=1e-5)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_animations_hold_every_frame_and_repeat(tmp_path: Path, name: str, channels: int) -> None:
    frames = _frames(7, channels)
    if channels in (2, 4):
        for frame in frames:
            frame[..., -1] = 255
    path = str(tmp_path / name)
    video.save_video(path, iter(frames), fps=25)
    picture = Image.open(path)
    assert picture.n_frames == 7
    assert picture.size == (256, 128)
    assert picture.info["loop"] == 0
    for i, frame in enumerate(frames):
        picture.seek(i)
        picture.load()
        assert picture.info["duration"] == 40
        level = np.asarray(picture.convert("RGB"))[64, 100]
        assert np.abs(level.astype(int) - int(frame[0, 0, 0])).max() <= 6


@pytest.mark.parametrize(("channels", "size"), [(3, (8, 16)), (1, (16, 8)), (4, (300, 270))])
def test_mp4_holds_every_frame(tmp_path: Path, channels: int, size: tuple[int, int]) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = _frames(9, channels, *size)
    if channels == 4:
        for frame in frames:
            frame[..., -1] = 255
    path = str(tmp_path / "a.mp4")
    video.save_video(path, iter(frames), fps=25)
    reader = ffmpeg.read_frames(path)
    meta = next(reader)
    decoded = [np.frombuffer(data, np.uint8).reshape(*meta["size"][::-1], 3) for data in reader]
    assert len(decoded) == 9
    assert meta["fps"] == 25
    factor = max(1, -(-256 // size[1]))
    assert meta["size"] == (size[1] * factor, size[0] * factor)
    for got, frame in zip(decoded, frames, strict=True):
        assert abs(int(got[got.shape[0] // 2, 100, 1]) - int(frame[0, 0, 0])) <= 8


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    frame = np.zeros((8, 8, 4), np.uint8)
    frame[:4, :, 3] = 255
    path = str(tmp_path / "a.gif")
    video.save_video(path, [frame], fps=10)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels[10, 10].tolist() == [0, 0, 0]
    assert pixels[200, 10].tolist() == [255, 255, 255]


def test_videos_go_to_urls() -> None:
    video.save_video("memory://bucket/walk.webp", _frames(3), fps=10)
    assert storage.read_bytes("memory://bucket/walk.webp")[:4] == b"RIFF"
    pytest.importorskip("imageio_ffmpeg")
    video.save_video("memory://bucket/walk.mp4", _frames(3), fps=10)
    assert storage.read_bytes("memory://bucket/walk.mp4")[4:8] == b"ftyp"


def test_unknown_extension() -> None:
    with pytest.raises(UsageError, match=r"walk\.avi.*mp4"):
        video.format_of("walk.avi")


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UsageError, match=r"\[video\].*gif") as caught:
        video.format_of("walk.mp4")
    assert "\n" not in str(caught.value)
    assert video.format_of("walk.GIF") == "gif"


def test_no_broken_video_is_left_when_drawing_fails(tmp_path: Path) -> None:
    def frames():
        yield from _frames(3)
        raise RuntimeError("the generator broke")

    with pytest.raises(RuntimeError, match="broke"):
        video.save_video(str(tmp_path / "a.gif"), frames(), fps=10)
    assert os.listdir(tmp_path) == []
