"""Metrics against NVIDIA's values, closed forms, and what no split or order may change."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.errors import DataError, UsageError
from trainer.metrics import statistics
from trainer.metrics.statistics import (
    Moments,
    frechet_distance,
    in_manifold,
    inception_score,
    kernel_distance,
    kernel_distances,
    neighbour_distances,
    perceptual_path_length,
    precision_recall,
)

with np.load(pathlib.Path(__file__).parents[1] / "goldens" / "metrics.npz") as arrays:
    GOLDEN = dict(arrays)
META = json.loads(str(GOLDEN["meta_json"]))
CASES = pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["kind"])
LENGTHS = pytest.mark.parametrize("name", ["ppl_gamma", "ppl_ties"])
SEEDS = st.integers(0, 2**32 - 1)


def of_case(case: dict[str, Any], *names: str) -> list[np.ndarray]:
    return [GOLDEN[f"case{case['case']}/{name}"] for name in names]


def of_case_f64(case: dict[str, Any], name: str) -> np.ndarray:
    return GOLDEN[f"f64/case{case['case']}/{name}_f64"]


def features(seed: int, n: int, dim: int = 5, mean: float = 0.0) -> np.ndarray:
    """Correlated, in float32."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal([n, dim]) @ rng.standard_normal([dim, dim])
    return (mixed + mean).astype(np.float32)


def given_moments(mean: Any, covariance: Any, count: int = 10) -> Moments:
    return Moments(count, np.array(mean, np.float64), count * np.array(covariance, np.float64))


def assert_same_moments(actual: Moments, expected: Moments, rtol: float = 1e-9) -> None:
    assert actual.count == expected.count
    for a, b in ((actual.mean, expected.mean), (actual.covariance, expected.covariance)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


# ---------------------------------------------------------------- goldens


@CASES
def test_moments_are_nvidias(case: dict[str, Any]) -> None:
    for name, values in zip(("real", "fake"), of_case(case, "real", "fake"), strict=True):
        moments = Moments.of(values)
        np.testing.assert_allclose(moments.mean, of_case_f64(case, f"mu_{name}"), rtol=1e-12)
        if case["kind"] != "lowrank":
            expected = of_case_f64(case, f"cov_{name}")
            np.testing.assert_allclose(moments.covariance, expected, rtol=1e-9, atol=1e-12)
        elif name == "real":
            found = np.diag(moments.covariance)
            np.testing.assert_allclose(found, of_case_f64(case, "cov_real_diag"), rtol=1e-9)
        else:
            found = moments.covariance[0]
            expected = of_case_f64(case, "cov_fake_row0")
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@CASES
def test_frechet_distance_is_nvidias(case: dict[str, Any]) -> None:
    real, fake = (Moments.of(values) for values in of_case(case, "real", "fake"))
    # Singular covariances show the rounding of NVIDIA's square root; ours is the exact one, below.
    rtol = 1e-6 if case["kind"] == "lowrank" else 1e-10
    assert frechet_distance(real, fake) == pytest.approx(case["fid"], rel=rtol)
    assert frechet_distance(fake, real) == pytest.approx(case["fid"], rel=rtol)


@CASES
def test_frechet_distance_is_exact_for_singular_covariances(case: dict[str, Any]) -> None:
    """The trace of the root from the features themselves, without a covariance in between."""
    real, fake = (values.astype(np.float64) for values in of_case(case, "real", "fake"))
    x, y = ((v - v.mean(0)) / np.sqrt(len(v)) for v in (real, fake))
    trace = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    means = np.sum((real.mean(0) - fake.mean(0)) ** 2)
    exact = means + np.sum(x**2) + np.sum(y**2) - 2 * trace
    found = frechet_distance(Moments.of(real), Moments.of(fake))
    assert found == pytest.approx(exact, rel=1e-11)


@CASES
def test_kernel_distance_is_nvidias(case: dict[str, Any]) -> None:
    real, fake, of_real, of_fake = of_case(case, "real", "fake", "kid_idx_real", "kid_idx_fake")
    found = kernel_distances(real, fake, real_indices=of_real, fake_indices=of_fake)
    expected = of_case_f64(case, "kid_per_subset")
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

    settings = {"subsets": case["kid_num_subsets"], "subset_size": case["kid_subset_size"]}
    distance = kernel_distance(real, fake, seed=case["kid_numpy_seed"], **settings)
    assert distance.mean == pytest.approx(case["kid_subsets_f64"], rel=1e-9)
    assert distance.spread == pytest.approx(expected.std(), rel=1e-9)

    # One subset, of as many as the smaller set has. NVIDIA's float32 cubes are good to 2e-5.
    seed = case["kid_numpy_seed"]
    whole = kernel_distance(real, fake, subsets=1, subset_size=100_000, seed=seed)
    assert whole.mean == pytest.approx(case["kid_full"], rel=2e-5, abs=1e-6)
    assert whole.spread == 0


@CASES
def test_precision_and_recall_are_nvidias(case: dict[str, Any]) -> None:
    real, fake = of_case(case, "real", "fake")
    precise, recalled = of_case(case, "precision_pred", "recall_pred")
    k = case["pr_k"]
    for manifold, probes, name, expected in (
        (real, fake, "precision", precise),
        (fake, real, "recall", recalled),
    ):
        radii = neighbour_distances(manifold, k)
        np.testing.assert_allclose(radii, of_case_f64(case, f"{name}_kth_dist"), rtol=1e-10)
        np.testing.assert_array_equal(in_manifold(manifold, radii, probes), expected)
    blocks = {"block_rows": case["pr_row_batch"], "block_columns": case["pr_col_batch"]}
    found = precision_recall(real, fake, neighbours=k, **blocks)
    assert (found.precision, found.recall) == (case["precision_f64"], case["recall_f64"])


def test_inception_score_is_nvidias() -> None:
    probabilities, expected = GOLDEN["is/probs"], META["is"]
    score = inception_score(probabilities, expected["num_splits"])
    assert score.mean == pytest.approx(expected["mean_f64"], rel=1e-10)
    assert score.std == pytest.approx(expected["std_f64"], rel=1e-9)
    edges = [i * len(probabilities) // 10 for i in range(11)]
    each = [inception_score(probabilities[a:b], 1).mean for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(each, GOLDEN["f64/is/scores_per_split_f64"], rtol=1e-10)


@LENGTHS
def test_path_length_is_nvidias(name: str) -> None:
    expected = META[name]
    found = perceptual_path_length(GOLDEN[f"{name}/dist"])
    assert (found.low, found.high, found.kept) == tuple(expected[k] for k in ("lo", "hi", "kept"))
    assert found.mean == pytest.approx(expected["ppl_f64"], rel=1e-12)


# ---------------------------------------------------------------- moments


@settings(max_examples=40)
@given(
    seed=SEEDS,
    cuts=st.lists(st.integers(0, 60), max_size=8),
    replicas=st.integers(1, 4),
    mean=st.sampled_from([0.0, 1.0, 3e4]),
)
def test_moments_are_the_same_in_any_split(
    seed: int, cuts: list[int], replicas: int, mean: float
) -> None:
    """Batches of any size, empty ones too, dealt to replicas, merged from the last to the first."""
    values = features(seed, 60, mean=mean)
    parts = [Moments.empty(5) for _ in range(replicas)]
    for i, batch in enumerate(np.split(values, sorted(cuts))):
        parts[i % replicas].update(batch)
    total = Moments.empty(5)
    for part in reversed(parts):
        total.merge(part)
    assert_same_moments(total, Moments.of(values))


@given(seed=SEEDS)
def test_moments_do_not_depend_on_the_order(seed: int) -> None:
    values = features(seed, 50)
    shuffled = np.random.default_rng(seed).permutation(values)
    assert_same_moments(Moments.of(shuffled), Moments.of(values))


def test_a_large_mean_costs_no_digits() -> None:
    """Sums of squares, subtracted at the end, would leave nothing of this covariance."""
    small = features(0, 300).astype(np.float64)
    far = Moments.empty(5)
    for batch in np.split(small + 1e9, 30):
        far.update(batch)
    # What float64 leaves of the features themselves, so far out.
    np.testing.assert_allclose(far.covariance, Moments.of(small).covariance, rtol=1e-5, atol=1e-6)


def test_more_rows_than_are_converted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = features(0, 50)
    whole = Moments.of(values)
    probabilities = np.full([50, 4], 0.25)
    monkeypatch.setattr(statistics, "_ROWS", 7)
    assert_same_moments(Moments.of(values), whole)
    assert inception_score(probabilities).mean == pytest.approx(1)


def test_moments_merge_with_themselves_and_with_none() -> None:
    values = features(0, 20)
    moments = Moments.of(values)
    moments.merge(Moments.empty(5))
    assert_same_moments(moments, Moments.of(values), rtol=0)
    moments.merge(moments)
    assert_same_moments(moments, Moments.of(np.concatenate([values, values])))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", "bool"])
def test_features_of_any_real_type(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, [30, 4]).astype(dtype)
    other = ~values if dtype == "bool" else values
    assert_same_moments(Moments.of(values), Moments.of(values.astype(np.float64)), rtol=0)
    assert np.isfinite(kernel_distance(values, other, seed=0).mean)
    assert precision_recall(values, values).precision == 1


def test_moments_come_back_from_a_file_bit_by_bit(tmp_path: pathlib.Path) -> None:
    moments = Moments.of(features(0, 20))
    np.savez(tmp_path / "moments.npz", **moments.to_arrays())
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as stored:
        back = Moments.from_arrays(stored)
    assert_same_moments(back, moments, rtol=0)
    back.update(features(1, 10))  # what was read can be added to
    moments.update(features(1, 10))
    assert_same_moments(back, moments, rtol=0)


# ---------------------------------------------------------------- distances


@given(seed=SEEDS, n=st.integers(2, 12))
def test_frechet_distance_of_equal_sets_is_0(seed: int, n: int) -> None:
    """Also with fewer images than features."""
    values = features(seed, n, dim=7)
    moments, shuffled = Moments.of(values), Moments.of(values[::-1])
    assert 0 <= frechet_distance(moments, shuffled) < 1e-10 * np.trace(moments.covariance)


@given(
    shift=st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    a=st.lists(st.floats(0, 100), min_size=4, max_size=4),
    b=st.lists(st.floats(0, 100), min_size=4, max_size=4),
    seed=SEEDS,
)
def test_frechet_distance_of_gaussians_with_common_axes(
    shift: list[float], a: list[float], b: list[float], seed: int
) -> None:
    """|shift|^2 and the squared differences of the standard deviations along each axis."""
    axes, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal([4, 4]))
    first = given_moments(np.zeros(4), axes @ np.diag(a) @ axes.T)
    second = given_moments(shift, axes @ np.diag(b) @ axes.T)
    expected = np.sum(np.square(shift)) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    scale = sum(a) + sum(b) + np.sum(np.square(shift))
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6 * scale + 1e-300)


@given(seed=SEEDS)
def test_frechet_distance_of_gaussians_in_the_plane(seed: int) -> None:
    """The root of a 2x2 matrix M has the trace sqrt(tr M + 2 sqrt(det M))."""
    x, y = np.random.default_rng(seed).standard_normal([2, 2, 2])
    a, b = x @ x.T, y @ y.T
    root = np.sqrt(np.trace(a @ b) + 2 * abs(np.linalg.det(x) * np.linalg.det(y)))
    found = frechet_distance(given_moments([0, 0], a), given_moments([3, 4], b))
    assert found == pytest.approx(25 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)


def test_frechet_distance_of_constant_features_is_that_of_the_means() -> None:
    ones = Moments.of(np.ones([3, 4]))
    assert frechet_distance(ones, Moments.of(np.zeros([5, 4]))) == 4
    assert frechet_distance(ones, ones) == 0


@given(seed=SEEDS)
def test_kernel_distance_does_not_depend_on_the_order(seed: int) -> None:
    """As long as each subset is everything."""
    real, fake = features(seed, 30), features(seed + 1, 20)
    every = np.arange(20)[np.newaxis]
    rng = np.random.default_rng(seed)
    order = rng.permutation(20)[np.newaxis]
    a = kernel_distances(real, fake, real_indices=every, fake_indices=every)
    b = kernel_distances(real, fake, real_indices=order, fake_indices=order[:, ::-1])
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    """Against loops, and with more rows than are multiplied at a time."""
    x, y = features(0, 6, dim=3), features(1, 6, dim=3)

    def mean_kernel(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        return float(np.mean([(np.dot(a, b) / 3 + 1) ** 3 for a, b in np.float64(pairs)]))

    alike = [mean_kernel([(a, b) for a in z for b in z if a is not b]) for z in ([*x], [*y])]
    expected = sum(alike) - 2 * mean_kernel([(a, b) for a in x for b in y])
    assert kernel_distance(x, y, subsets=1, seed=0).mean == pytest.approx(expected, rel=1e-9)

    real, fake = features(0, 2300, dim=3), features(1, 2300, dim=3)
    a, b = real.astype(np.float64), fake.astype(np.float64)
    of_a, of_b, between = ((p @ q.T / 3 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    pairs = 2300 * 2299
    expected = (of_a.sum() - np.trace(of_a) + of_b.sum() - np.trace(of_b)) / pairs
    expected -= 2 * between.mean()
    found = kernel_distance(real, fake, subsets=1, subset_size=3000, seed=0).mean
    assert found == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_follows_its_seed() -> None:
    real, fake = features(0, 90), features(1, 80)
    settings = {"subsets": 5, "subset_size": 10}
    first = kernel_distance(real, fake, seed=1, **settings)
    assert first == kernel_distance(real, fake, seed=1, **settings)
    assert first != kernel_distance(real, fake, seed=2, **settings)
    assert first.spread > 0


# ---------------------------------------------------------------- precision and recall


@settings(max_examples=40)
@given(
    seed=SEEDS,
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    neighbours=st.integers(1, 5),
    ties=st.booleans(),
)
def test_blocks_of_any_size_give_the_same(
    seed: int, rows: int, columns: int, neighbours: int, ties: bool
) -> None:
    """On a coarse grid many images are the same, and many distances."""
    real, fake = features(seed, 30, dim=3), features(seed + 1, 25, dim=3)
    if ties:
        real, fake = np.round(real), np.round(fake)
    whole = precision_recall(real, fake, neighbours=neighbours)
    blocks = {"block_rows": rows, "block_columns": columns}
    assert precision_recall(real, fake, neighbours=neighbours, **blocks) == whole

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(real), rng.permutation(fake)
    assert precision_recall(*shuffled, neighbours=neighbours, **blocks) == whole


@settings(max_examples=40)
@given(seed=SEEDS, mean=st.sampled_from([0, 1000]), neighbours=st.integers(1, 4))
def test_ties_count_as_in_exact_arithmetic(seed: int, mean: int, neighbours: int) -> None:
    """Whole numbers, whose distances can be compared without rounding."""
    rng = np.random.default_rng(seed)
    real, fake = (rng.integers(0, 4, [n, 3]) + mean for n in (25, 20))
    found = precision_recall(
        real.astype(np.float32), fake.astype(np.float32), neighbours=neighbours
    )
    for manifold, probes, share in ((real, fake, found.precision), (fake, real, found.recall)):
        squares = np.sum((manifold[:, np.newaxis] - manifold) ** 2, 2)
        radii = np.sort(squares, 1)[:, neighbours]
        distances = np.sum((probes[:, np.newaxis] - manifold) ** 2, 2)
        assert share == np.mean((distances <= radii).any(1))


@settings(max_examples=40)
@given(seed=SEEDS, scale=st.sampled_from([1e-6, 1.0, 1e6]), mean=st.sampled_from([0.0, 1e3]))
def test_identical_sets_have_precision_and_recall_1(seed: int, scale: float, mean: float) -> None:
    values = features(seed, 30) * scale + mean
    copies = np.concatenate([values, values[:10], values[:10], values[:10]])
    for same in (values, copies):
        found = precision_recall(same, np.random.default_rng(seed).permutation(same))
        assert (found.precision, found.recall) == (1, 1)


def test_far_from_the_origin_distances_are_the_same() -> None:
    values = features(0, 40).astype(np.float64)
    far = neighbour_distances(values + 1e7, 3)
    # What float64 leaves of the features themselves, so far out.
    np.testing.assert_allclose(far, neighbour_distances(values, 3), rtol=1e-6)


def test_sets_far_apart_have_neither() -> None:
    found = precision_recall(features(0, 30), features(1, 30) + 1000)
    assert (found.precision, found.recall) == (0, 0)


def test_one_image_repeated_is_precise_and_recalls_next_to_nothing() -> None:
    real = features(0, 40)
    found = precision_recall(real, np.repeat(real[:1], 40, 0))
    assert (found.precision, found.recall) == (1, 1 / 40)


# ---------------------------------------------------------------- Inception score, path length


def test_inception_score_of_extremes() -> None:
    """K for sure and balanced predictions, 1 for predictions that are all the same."""
    sure = np.eye(4)[np.arange(80) % 4]
    score = inception_score(sure)
    assert score.mean == pytest.approx(4) and score.std == pytest.approx(0, abs=1e-12)
    assert inception_score(np.tile([[0.7, 0.3, 0.0]], [20, 1])).mean == pytest.approx(1)


@given(seed=SEEDS)
def test_one_split_does_not_depend_on_the_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(6, 0.2), 30)
    score = inception_score(probabilities, 1)
    assert 1 <= score.mean <= 6 and score.std == 0
    assert inception_score(rng.permutation(probabilities), 1).mean == pytest.approx(score.mean)


@given(lengths=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=300), seed=SEEDS)
def test_path_length_leaves_out_the_extremes(lengths: list[float], seed: int) -> None:
    """Of up to 100 none, of more as many on either side as make a whole percent."""
    values = np.array(lengths)
    found = perceptual_path_length(values)
    cut = (len(values) - 1) // 100
    ordered = np.sort(values)
    assert (found.low, found.high) == (ordered[cut], ordered[len(values) - 1 - cut])
    assert found.kept >= len(values) - 2 * cut
    assert found.low <= found.mean * (1 + 1e-9) and found.mean <= found.high * (1 + 1e-9)
    again = perceptual_path_length(np.random.default_rng(seed).permutation(values))
    assert again.mean == pytest.approx(found.mean)


# ---------------------------------------------------------------- errors

GOOD = features(0, 10)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: frechet_distance(Moments.of(GOOD), Moments.of(GOOD[:1])),
            "a Fréchet distance needs 2 images in the second set or more: given 1",
        ),
        (lambda: Moments.empty(3).covariance, "a covariance needs 1 images or more: given 0"),
        (
            lambda: kernel_distance(GOOD[:1], GOOD, seed=0),
            "a kernel distance needs 2 real images or more: given 1",
        ),
        (lambda: kernel_distance(GOOD, GOOD[:0], seed=0), "2 generated images or more: given 0"),
        (lambda: kernel_distance(GOOD, GOOD, subset_size=1, seed=0), "subset_size=1"),
        (lambda: kernel_distance(GOOD, GOOD, subsets=0, seed=0), "subsets=0"),
        (
            lambda: precision_recall(GOOD, GOOD[:3]),
            "precision with 3 neighbours needs 4 generated images or more: given 3",
        ),
        (lambda: neighbour_distances(GOOD, 10), "needs 11 images or more: given 10"),
        (lambda: precision_recall(GOOD, GOOD, neighbours=0), "neighbours=0"),
        (lambda: precision_recall(GOOD, GOOD, block_rows=0), "a block has"),
        (lambda: in_manifold(GOOD[:0], np.zeros(0), GOOD), "needs 1 images or more: given 0"),
        (lambda: inception_score(np.ones([9, 1])), "10 splits needs 10 images or more: given 9"),
        (lambda: inception_score(np.ones([9, 1]), 0), "splits=0"),
        (lambda: perceptual_path_length(np.zeros(0)), "needs 1 images or more: given 0"),
    ],
)
def test_too_few_images(call: Callable[[], object], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize(
    "call",
    [
        Moments.of,
        lambda x: Moments.empty(5).update(x),
        lambda x: kernel_distance(GOOD, x, seed=0),
        lambda x: precision_recall(x, GOOD),
        lambda x: in_manifold(GOOD, np.zeros(10), x),
        inception_score,
        lambda x: perceptual_path_length(x[:, 0]),
    ],
)
def test_what_is_not_finite(call: Callable[[np.ndarray], object], value: float) -> None:
    values = GOOD.astype(np.float64)
    values[7:9, 0] = value
    with pytest.raises(UsageError, match="not finite in 2 of 10 rows, first in row 7"):
        call(values)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: frechet_distance(Moments.of(GOOD), Moments.empty(4)), "5 features, another 4"),
        (lambda: Moments.of(GOOD).update(GOOD[:, :4]), "5 features, another 4"),
        (lambda: Moments.of(GOOD).merge(Moments.empty(4)), "5 features, another 4"),
        (lambda: kernel_distance(GOOD, GOOD[:, :4], seed=0), "5 features, another 4"),
        (lambda: precision_recall(GOOD, GOOD[:, :4]), "5 features, another 4"),
        (lambda: Moments.of(GOOD[0]), "float32 [5]"),
        (lambda: Moments.of(GOOD[:, :0]), "float32 [10, 0]"),
        (lambda: Moments.of(GOOD.astype(str)), "[10, 5]"),
        (lambda: Moments.of(GOOD * 1j), "complex64 [10, 5]"),
        (lambda: in_manifold(GOOD, np.zeros(9), GOOD), "10 centres have radii of shape [9]"),
        (lambda: perceptual_path_length(GOOD), "[10, 5]"),
        (
            lambda: kernel_distances(
                GOOD, GOOD, real_indices=np.zeros([2, 3], int), fake_indices=np.zeros([2, 2], int)
            ),
            "they are [2, 3] and [2, 2]",
        ),
        (lambda: inception_score(GOOD), "of 10 rows 10 don't sum to 1"),
    ],
)
def test_shapes_and_values_that_do_not_fit(call: Callable[[], object], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mean": None}, "lack 'mean'"),
        ({"count": np.array(1.5)}, "float64 []"),
        ({"count": np.array(-1)}, "negative count"),
        ({"mean": np.zeros(4)}, "float64 [4]"),
        ({"mean": np.zeros(5, np.float32)}, "float32 [5]"),
        ({"scatter": np.zeros([5, 4])}, "float64 [5, 4]"),
        ({"scatter": np.full([5, 5], np.nan)}, "not finite"),
    ],
)
def test_stored_moments_that_are_none(changes: dict[str, Any], expected: str) -> None:
    stored = Moments.of(GOOD).to_arrays() | changes
    with pytest.raises(DataError) as caught:
        Moments.from_arrays({key: value for key, value in stored.items() if value is not None})
    assert expected in str(caught.value)
