"""Images, sheets and walks from a generator, and what the command says to a wrong call."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags as absl_flags
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.serving.test_rendering import (
    NAMES,
    Network,
    assert_same_pixels,
    expected,
    make_network,
    trained,
)
from trainer import generate
from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.generate import choose_classes, parse_seeds
from trainer.serving import rendering
from trainer.serving.rendering import Renderer, TrainedGenerator

# Seeds and classes --------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 200), st.integers(0, 100)), min_size=1, max_size=9)
)
def test_seed_lists_round_trip(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{a}-{a + n}" if n else f"{a}" for a, n in ranges)
    assert parse_seeds(text) == [seed for a, n in ranges for seed in range(a, a + n + 1)]


def test_seed_lists_keep_order_and_repetitions() -> None:
    assert parse_seeds("3-5, 1 ,3 - 4") == [3, 4, 5, 1, 3, 4]
    assert parse_seeds("7-7") == [7]


@pytest.mark.parametrize(
    "text",
    ["", ",", "1,", "a", "1-", "-1", "5-3", "1--2", "1.5", "1-2-3", "4294967296", "٣", "0-1000000"],
)
def test_bad_seed_lists_name_the_flag(text: str) -> None:
    with pytest.raises(UsageError, match="--walk=") as caught:
        parse_seeds(text, "walk")
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="0123456789-, x", max_size=12))
def test_any_text_is_a_list_of_seeds_or_a_usage_error(text: str) -> None:
    try:
        seeds = parse_seeds(text)
    except UsageError:
        return
    assert seeds
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.fixture(scope="module")
def plain() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def conditional() -> Network:
    return make_network(c_dim=4)


def test_classes_are_one_or_all() -> None:
    assert choose_classes("dog", NAMES) == [1]
    assert choose_classes("all", NAMES) == [0, 1, 2, 3]
    assert choose_classes("all", ["none", "all"]) == [1]
    assert choose_classes(None, []) == [-1]
    with pytest.raises(UsageError, match="needs --class: use all, an index from 0 to 3 or one of:"):
        choose_classes(None, NAMES)
    with pytest.raises(UsageError, match="--class=all: .* without classes"):
        choose_classes("all", [])


# Files --------------------------------------------------------------------------------------


def read(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_write_images_of_one_class(conditional: Network, tmp_path: Path) -> None:
    renderer = Renderer(*conditional, batch=3)
    paths = generate.write_images(renderer, [0, 12, 5], [2], NAMES, str(tmp_path))
    names = [Path(path).name for path in paths]
    assert names == ["seed0000.png", "seed0012.png", "seed0005.png", "grid.png"]
    for seed in (0, 12, 5):
        image = read(tmp_path / f"seed{seed:04d}.png")
        assert_same_pixels(image, expected(conditional, seed, label=2))


def sheet_tiles(path: Path, rows: int, cols: int) -> np.ndarray:
    """The tiles of a labelled sheet of 16x32 images, [rows, cols, 16, 32, 3]."""
    pixels = read(path)
    step_y, step_x = (pixels.shape[0] - 3) // rows, (pixels.shape[1] - 3) // cols
    assert step_x == 99  # tripled to 96, and a gap
    starts = [(3 + r * step_y, 3 + c * step_x) for r in range(rows) for c in range(cols)]
    tiles = [pixels[y : y + 48 : 3, x : x + 96 : 3] for y, x in starts]
    return np.reshape(tiles, (rows, cols, 16, 32, 3))


def test_all_classes_make_a_row_each(conditional: Network, tmp_path: Path) -> None:
    renderer = Renderer(*conditional)
    paths = generate.write_images(renderer, [4, 9], [0, 1, 2, 3], NAMES, str(tmp_path))
    assert len(paths) == 9
    tiles = sheet_tiles(tmp_path / "grid.png", 4, 2)
    for label in range(4):
        for i, seed in enumerate((4, 9)):
            assert_same_pixels(tiles[label, i], expected(conditional, seed, label))
            single = read(tmp_path / f"class{label:03d}-seed{seed:04d}.png")
            assert np.array_equal(single, tiles[label, i])
    assert np.abs(tiles[0].astype(int) - tiles[1]).mean() > 1  # the classes do differ


def test_grid_is_in_the_order_of_the_seeds(plain: Network, tmp_path: Path) -> None:
    generate.write_images(Renderer(*plain), [8, 1, 5, 2, 0], [-1], [], str(tmp_path))
    tiles = sheet_tiles(tmp_path / "grid.png", 2, 3).reshape(6, 16, 32, 3)
    for seed, tile in zip([8, 1, 5, 2, 0], tiles, strict=False):
        assert np.array_equal(tile, read(tmp_path / f"seed{seed:04d}.png"))
    assert (tiles[5] == 255).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (4, "RGBA")])
def test_other_channel_counts(tmp_path: Path, channels: int, mode: str) -> None:
    network = make_network(channels=channels)
    generate.write_images(Renderer(*network), [3], [-1], [], str(tmp_path))
    assert Image.open(tmp_path / "seed0003.png").mode == mode
    image = read(tmp_path / "seed0003.png").reshape(16, 32, channels)
    assert_same_pixels(image, expected(network, 3))


def mixing_sheet(network: Network, folder: Path, layers: list[int] | None) -> np.ndarray:
    path = generate.write_mixing_sheet(
        Renderer(*network, batch=3), [1, 2], [5, 6, 7], layers, -1, str(folder)
    )
    return sheet_tiles(Path(path), 3, 4)


def test_mixing_takes_the_named_layers_of_the_column(plain: Network, tmp_path: Path) -> None:
    tiles = mixing_sheet(plain, tmp_path, [0, 3])
    renderer = Renderer(*plain)
    assert (tiles[0, 0] == 255).all()
    for c, column in enumerate((5, 6, 7), start=1):
        assert_same_pixels(tiles[0, c], expected(plain, column))
        for r, row in enumerate((1, 2), start=1):
            assert_same_pixels(tiles[r, 0], expected(plain, row))
            row_ws, col_ws = renderer.ws([row], [-1]), renderer.ws([column], [-1])
            take = np.array([1, 0, 0, 1, 0, 0], bool)[:, None]
            (wanted,) = renderer.render(np.where(take, col_ws, row_ws), [row])
            assert_same_pixels(tiles[r, c], wanted)
            assert (tiles[r, c] != tiles[r, 0]).mean() > 0.2
            assert (tiles[r, c] != tiles[0, c]).mean() > 0.2


@pytest.mark.parametrize(
    ("num_ws", "count"), [(2, 1), (6, 2), (8, 3), (10, 4), (12, 5), (14, 5), (16, 6), (18, 7)]
)
def test_coarse_layers_are_nvidias_share(num_ws: int, count: int) -> None:
    assert generate.coarse_layers(num_ws) == list(range(count))


def test_by_default_a_mixture_shows_both(plain: Network, tmp_path: Path) -> None:
    tiles = mixing_sheet(plain, tmp_path, None)
    assert np.array_equal(tiles, mixing_sheet(plain, tmp_path, [0, 1]))
    for r in (1, 2):
        for c in (1, 2, 3):
            assert (tiles[r, c] != tiles[r, 0]).mean() > 0.2
            assert (tiles[r, c] != tiles[0, c]).mean() > 0.2


def test_mixing_all_layers_gives_the_column(plain: Network, tmp_path: Path) -> None:
    tiles = mixing_sheet(plain, tmp_path, list(range(6)))
    for r in (1, 2):
        for c in (1, 2, 3):
            assert_same_pixels(tiles[r, c], tiles[0, c])


def test_mixing_a_layer_that_is_not_there(plain: Network, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--mix_layers.*0-5, not 6"):
        mixing_sheet(plain, tmp_path, [5, 6])


def test_walk_passes_its_seeds_and_closes(plain: Network, tmp_path: Path) -> None:
    path = str(tmp_path / "walk.webp")
    renderer = Renderer(*plain, noise_mode="none", batch=4)
    generate.write_walk(renderer, [1, 2, 3], -1, path, frames=6, fps=20)
    walk = Image.open(path)
    assert walk.n_frames == 18

    def frame(i: int) -> np.ndarray:
        walk.seek(i % 18)
        return np.asarray(walk.convert("RGB"))[4::8, 4::8].astype(int)

    for i, image in zip((0, 6, 12), renderer.images([1, 2, 3], [-1] * 3), strict=True):
        assert np.abs(frame(i) - image).mean() < 12  # WebP is lossy
    steps = [np.abs(frame(i + 1) - frame(i)).mean() for i in range(18)]
    assert steps[17] <= 1.5 * max(steps[:17])


# The command --------------------------------------------------------------------------------


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: Network, conditional: Network
) -> Callable[..., Path]:
    """Runs the command in this process on a run that is one of the small networks."""

    def load(path: str, **options: Any) -> TrainedGenerator:
        network, names = (conditional, NAMES) if path.endswith("classes") else (plain, [])
        return trained(network, names, **options)

    def run(*arguments: str, run: str = "runs/plain") -> Path:
        values = absl_flags.FlagValues()
        generate.define_flags(values)
        values(["generate", f"--run={run}", f"--out={tmp_path / 'out'}", *arguments])
        monkeypatch.setattr(generate, "FLAGS", values)
        generate.main(["generate"])
        return tmp_path / "out"

    monkeypatch.setattr(rendering, "load", load)
    return run


def test_command_draws_sixteen_images_by_default(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command()
    wanted = {"grid.png", *(f"seed{seed:04d}.png" for seed in range(16))}
    assert {path.name for path in out.iterdir()} == wanted
    assert capsys.readouterr().out.splitlines() == [
        "G_ema of step 123, 45.6 kimg (runs/a/checkpoints/step-000000123)",
        f"wrote 16 images and {out / 'grid.png'}",
    ]


def test_command_uses_its_flags(command: Callable[..., Path], conditional: Network) -> None:
    flags = ("--seeds=4", "--truncation_psi=0.5", "--batch=1", "--class=sea lion")
    out = command(*flags, run="runs/classes")
    image = read(out / "seed0004.png")
    assert_same_pixels(image, expected(conditional, 4, label=3, psi=0.5))
    command(*flags, "--truncation_psi=1", "--noise_mode=none", run="runs/classes")
    assert (read(out / "seed0004.png") != image).mean() > 0.1  # and replaces what was there


def test_command_mixes_and_walks(command: Callable[..., Path]) -> None:
    out = command("--mix_rows=0,1", "--mix_cols=2", "--mix_layers=0-2")
    command("--walk=0-1", "--video=loop.gif", "--frames=3")
    assert {path.name for path in out.iterdir()} == {"mixing.png", "loop.gif"}
    assert Image.open(out / "loop.gif").n_frames == 6


def test_command_writes_to_a_url(command: Callable[..., Path]) -> None:
    command("--seeds=0", "--out=memory://bucket/generate")
    assert storage.listdir("memory://bucket/generate") == ["grid.png", "seed0000.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out="], "--out"),
        (["--run="], "--run"),
        (["--seeds="], "--seeds="),
        (["--seeds=3-1"], "--seeds=3-1"),
        (["--mix_rows=1"], "--mix_cols"),
        (["--mix_cols=1"], "--mix_rows"),
        (["--mix_rows=1", "--mix_cols=2", "--walk=1-2"], "one of them"),
        (["--mix_rows=1", "--mix_cols=2", "--mix_layers=6"], "--mix_layers"),
        (["--walk=1"], "two seeds"),
        (["--walk=1-2", "--video=walk.avi"], r"walk\.avi"),
        (["--truncation_cutoff=9"], "truncation_cutoff=9"),
        (["--class=dog"], "without classes"),
    ],
)
def test_wrong_calls_are_usage_errors(
    command: Callable[..., Path], arguments: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        command(*arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("flag", ["--walk=0-1", "--mix_rows=0"])
def test_all_classes_are_for_single_images(command: Callable[..., Path], flag: str) -> None:
    with pytest.raises(UsageError, match="--class=all"):
        command(
            flag,
            "--mix_cols=1" * flag.startswith("--mix") or "--fps=9",
            "--class=all",
            run="classes",
        )


def test_examples_in_the_help_are_real_calls() -> None:
    calls = re.findall(r"python -m trainer generate (.*)", generate.__doc__ or "")
    assert len(calls) == 3
    for call in calls:
        values = absl_flags.FlagValues()
        generate.define_flags(values)
        assert values(["generate", *call.split()]) == ["generate"]
