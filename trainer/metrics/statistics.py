"""Metrics from the features of images, as NVIDIA's code defines them, in NumPy's float64.

Features are matrices [N, F], a row for each image, of any real type. What is large (images by
images, or images by features) is worked on in blocks, so that memory does not grow with the number
of images beyond the features themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trainer.core.errors import DataError, UsageError

# Features come in float32 or less. Within its range no sum here leaves that of float64.
_LARGEST = float(np.finfo(np.float32).max)
# Rows that are converted to float64 at a time.
_ROWS = 4096
# Of the squared lengths: far more than float64 loses in a squared distance, far less than features
# in float32 can resolve.
_TIE = 1e-11


# ---------------------------------------------------------------- Fréchet distance


@dataclass(eq=False)
class Moments:
    """Mean and covariance of features, gathered batch by batch and merged in any order.

    NVIDIA's FeatureStats sums x and x x^T and subtracts at the end, which cancels all digits where
    the mean is large against the spread. Here every batch is centred on its own mean, and what the
    shift between two means adds is exact algebra (Chan, Golub and LeVeque 1979): the same
    covariance up to rounding, and like NVIDIA's divided by N and not N - 1.

    Attributes:
      count: images seen.
      mean: [F] float64.
      scatter: [F, F] float64, the sum of (x - mean) (x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Those of no images yet, with `dim` features each."""
        return cls(0, np.zeros(dim), np.zeros([dim, dim]))

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Those of some features [N, F].

        Raises:
          UsageError: if they are not a matrix of finite numbers.
        """
        features = _checked(features)
        moments = cls.empty(features.shape[1])
        moments._add(features)
        return moments

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Moments:
        """Those that `to_arrays` has written down.

        Raises:
          DataError: if the arrays are not such.
        """
        try:
            count, mean, scatter = (np.asarray(arrays[key]) for key in ("count", "mean", "scatter"))
        except KeyError as error:
            raise DataError(f"stored moments of features lack {error}; compute them anew") from None
        fits = (
            (count.ndim, mean.ndim) == (0, 1)
            and scatter.shape == 2 * mean.shape
            and count.dtype.kind in "iu"
            and (mean.dtype, scatter.dtype) == (np.float64, np.float64)
        )
        if not fits:
            raise DataError(
                "stored moments of features are no integer, [F] float64 and [F, F] float64 but "
                f"{count.dtype} {list(count.shape)}, {mean.dtype} {list(mean.shape)} and "
                f"{scatter.dtype} {list(scatter.shape)}; compute them anew"
            )
        if count < 0 or not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
            raise DataError(
                "stored moments of features have a negative count or values that are not finite; "
                "compute them anew"
            )
        return cls(int(count), mean.copy(), scatter.copy())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a file, from which `from_arrays` makes the same moments bit by bit."""
        count = np.array(self.count, np.int64)
        return {"count": count, "mean": self.mean.copy(), "scatter": self.scatter.copy()}

    @property
    def dim(self) -> int:
        """F, the number of features."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """[F, F], divided by the number of images.

        Raises:
          UsageError: if there are no images yet.
        """
        _at_least(self.count, 1, "a covariance")
        return self.scatter / self.count

    def update(self, features: np.ndarray) -> None:
        """Adds a batch of features [N, F]; N may be 0.

        Every call passes over all of [F, F], so that batches of some hundred images are cheaper.

        Raises:
          UsageError: if they are no matrix of finite numbers, or F is another.
        """
        features = _checked(features)
        _same_dim(self.dim, features.shape[1])
        self._add(features)

    def merge(self, other: Moments) -> None:
        """Adds all that `other` has seen, such as another replica.

        Raises:
          UsageError: if its features are of another number.
        """
        _same_dim(self.dim, other.dim)
        if other.count:
            shift = self._move(other.count, other.mean)
            self.scatter += other.scatter + np.outer(shift, shift)

    def _add(self, features: np.ndarray) -> None:
        for start, stop in _blocks(len(features), _ROWS):
            rows = features[start:stop].astype(np.float64)
            mean = rows.mean(0)
            # One row more, the shift of the means, so that the sum of squares is one product.
            centred = np.vstack([rows - mean, self._move(len(rows), mean)])
            self.scatter += centred.T @ centred

    def _move(self, count: int, mean: np.ndarray) -> np.ndarray:
        """Moves the mean towards another's; returns [F], what the scatter gains is its square."""
        total = self.count + count
        shift = mean - self.mean
        gain = math.sqrt(self.count * count / total) * shift
        self.mean = self.mean + count / total * shift
        self.count = total
        return gain


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two sets, FID with Inception's features (Heusel et al. 2017, eq. 6).

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr sqrt(A B), of the covariances A = P P^T and
    B = Q Q^T. The last trace is the sum of the singular values of P^T Q. The other two ways,
    SciPy's `sqrtm(A B)` as in NVIDIA's code and the roots of the eigenvalues of sqrt(A) B sqrt(A),
    take roots of zeros that were rounded, and sets smaller than their dimension have many zeros: on
    90 and 70 images with 128 features both are 3e-7 off, relative to the distance, this is 3e-15;
    where no covariance is singular all agree to 3e-14. With 2048 features it takes 1.4 times as
    long as the eigenvalues.

    Args:
      a: moments of one set.
      b: moments of the other.

    Returns:
      The distance, 0 or more. It is biased: the fewer images, the larger.

    Raises:
      UsageError: with fewer than two images in a set, or sets with other numbers of features.
    """
    _same_dim(a.dim, b.dim)
    for moments, which in ((a, "images in the first set"), (b, "images in the second set")):
        _at_least(moments.count, 2, "a Fréchet distance", which)
    root = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    means = np.sum((a.mean - b.mean) ** 2)
    variances = np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(means + variances - 2 * root), 0.0)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """[F, rank], whose product with its transpose is the covariance [F, F]."""
    values, vectors = np.linalg.eigh(covariance)
    # What is below is the rounding of a zero, whose root would be larger by far.
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


# ---------------------------------------------------------------- kernel distance


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distance over random subsets: its mean, and the standard deviation between them."""

    mean: float
    spread: float


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int
) -> KernelDistance:
    """Kernel distance, KID with Inception's features (Bińkowski et al. 2018, section 4).

    Args:
      real: [N, F] features of real images.
      fake: [M, F] features of generated images.
      subsets: random subsets to average over.
      subset_size: images in each, or as many as the smaller set has.
      seed: of the choice of subsets, 0 to 2^32 - 1. They are those that NVIDIA's code chooses after
        `numpy.random.seed(seed)`.

    Returns:
      The mean, which is unbiased and can thus be below 0, and the spread.

    Raises:
      UsageError: with fewer than two images in a set or a subset, or features that don't fit.
    """
    real, fake = _pair(real, fake, 2, "a kernel distance")
    if subsets < 1 or subset_size < 2:
        raise UsageError(
            "a kernel distance needs a subset or more, of two images or more: "
            f"subsets={subsets}, subset_size={subset_size}"
        )
    size = min(len(real), len(fake), subset_size)
    # The stream of this old generator is fixed for good, that of newer ones is not.
    random = np.random.RandomState(seed)
    chosen = [
        [random.choice(len(features), size, replace=False) for features in (fake, real)]
        for _ in range(subsets)
    ]
    fakes, reals = (np.stack(indices) for indices in zip(*chosen, strict=True))
    found = kernel_distances(real, fake, real_indices=reals, fake_indices=fakes)
    return KernelDistance(float(found.mean()), float(found.std()))


def kernel_distances(
    real: np.ndarray, fake: np.ndarray, *, real_indices: np.ndarray, fake_indices: np.ndarray
) -> np.ndarray:
    """Squared maximum mean discrepancies of given subsets, unbiased, kernel (x.y / F + 1)^3.

    Args:
      real: [N, F] features of real images.
      fake: [M, F] features of generated images.
      real_indices: [S, n] rows of `real`, n for each of S subsets.
      fake_indices: [S, n] rows of `fake`.

    Returns:
      [S] float64.

    Raises:
      UsageError: with fewer than two images in a subset, or shapes that don't match.
    """
    real, fake = _pair(real, fake, 2, "a kernel distance")
    if real_indices.ndim != 2 or real_indices.shape != fake_indices.shape:
        raise UsageError(
            "indices of subsets are to be [S, n] for real and generated images alike: they are "
            f"{list(real_indices.shape)} and {list(fake_indices.shape)}"
        )
    size = real_indices.shape[1]
    _at_least(size, 2, "a kernel distance", "images in a subset")
    found = []
    for of_real, of_fake in zip(real_indices, fake_indices, strict=True):
        x, y = fake[of_fake].astype(np.float64), real[of_real].astype(np.float64)
        alike = sum(_kernel_sum(z, z) - _kernel_diagonal(z) for z in (x, y)) / (size - 1)
        found.append((alike - 2 * _kernel_sum(x, y) / size) / size)
    return np.array(found)


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """The kernel summed over all pairs of [N, F] and [M, F]."""
    total = 0.0
    for start, stop in _blocks(len(x), 1000):
        base = x[start:stop] @ y.T / x.shape[1] + 1
        total += float(np.sum(base * base * base))
    return total


def _kernel_diagonal(x: np.ndarray) -> float:
    """The kernel summed over the pairs of each row of [N, F] with itself."""
    return float(np.sum((np.einsum("nf,nf->n", x, x) / x.shape[1] + 1) ** 3))


# ---------------------------------------------------------------- precision and recall


@dataclass(frozen=True)
class PrecisionRecall:
    """The share of generated images that look real, and of real ones that can be generated."""

    precision: float
    recall: float


def precision_recall(
    real: np.ndarray,
    fake: np.ndarray,
    *,
    neighbours: int = 3,
    block_rows: int = 2048,
    block_columns: int = 4096,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, section 2).

    Args:
      real: [N, F] features of real images.
      fake: [M, F] features of generated images.
      neighbours: k; a set's manifold is the union of spheres around its images, each of which
        reaches to the k-th nearest other image.
      block_rows: of the distances computed at a time; it changes memory and time, no result.
      block_columns: likewise.

    Returns:
      Both shares, 0 to 1.

    Raises:
      UsageError: with `neighbours` images or fewer in a set, or features that don't fit.
    """
    blocks = block_rows, block_columns
    real, fake = _pair(real, fake, neighbours + 1, f"precision with {neighbours} neighbours")
    shares = [
        in_manifold(
            manifold, neighbour_distances(manifold, neighbours, *blocks), probes, *blocks
        ).mean()
        for manifold, probes in ((real, fake), (fake, real))
    ]
    return PrecisionRecall(*map(float, shares))


def neighbour_distances(
    features: np.ndarray, neighbours: int, block_rows: int = 2048, block_columns: int = 4096
) -> np.ndarray:
    """The distance of each image from its k-th nearest other one.

    Args:
      features: [N, F].
      neighbours: k, 1 or more.
      block_rows: of the distances computed at a time.
      block_columns: likewise.

    Returns:
      [N] float64.

    Raises:
      UsageError: if there are no k others.
    """
    features = _checked(features)
    if neighbours < 1:
        raise UsageError(f"neighbours={neighbours}: the nearest other image is the first")
    _at_least(len(features), neighbours + 1, f"a distance to neighbour {neighbours}")
    centred = _Centred(features, features.mean(0, dtype=np.float64))
    found = []
    for rows in _blocks(len(features), block_rows):
        nearest = np.empty([rows[1] - rows[0], 0])
        for columns in _blocks(len(features), block_columns):
            distances = centred.squared_distances(rows, centred, columns)
            nearest = np.concatenate([nearest, distances], 1)
            # The nearest of all is the image itself.
            if nearest.shape[1] > neighbours + 1:
                nearest = np.partition(nearest, neighbours, 1)[:, : neighbours + 1]
        found.append(nearest.max(1))
    return np.sqrt(np.maximum(np.concatenate(found), 0))


def in_manifold(
    manifold: np.ndarray,
    radii: np.ndarray,
    probes: np.ndarray,
    block_rows: int = 2048,
    block_columns: int = 4096,
) -> np.ndarray:
    """Which images are within the sphere of any image of a set, its surface included.

    Args:
      manifold: [N, F] features, the centres.
      radii: [N], see `neighbour_distances`.
      probes: [M, F] features.
      block_rows: of the distances computed at a time.
      block_columns: likewise.

    Returns:
      [M] bool.

    Raises:
      UsageError: if the shapes don't match.
    """
    manifold, probes = _checked(manifold, "centres"), _checked(probes, "probes")
    _same_dim(manifold.shape[1], probes.shape[1])
    _at_least(len(manifold), 1, "a manifold")
    if radii.shape != (len(manifold),):
        raise UsageError(f"{len(manifold)} centres have radii of shape {list(radii.shape)}")
    mean = manifold.mean(0, dtype=np.float64)
    centres, points = _Centred(manifold, mean), _Centred(probes, mean)
    # Within float64's rounding a distance is a tie, however a block was rounded.
    squares = radii**2 + _TIE * centres.squares
    inside = np.zeros(len(probes), bool)
    for rows in _blocks(len(probes), block_rows):
        start, stop = rows
        slack = _TIE * points.squares[start:stop, np.newaxis]
        for columns in _blocks(len(manifold), block_columns):
            distances = points.squared_distances(rows, centres, columns)
            inside[start:stop] |= (distances - slack <= squares[slice(*columns)]).any(1)
    return inside


class _Centred:
    """Features around a point, for distances by |x|^2 + |y|^2 - 2 x.y.

    Far from the origin these three would cancel; around the mean they are about as large as the
    distances themselves.
    """

    def __init__(self, features: np.ndarray, centre: np.ndarray) -> None:
        self._features = features
        self._centre = centre
        parts = [self.rows(*block) for block in _blocks(len(features), _ROWS)]
        squares = [np.einsum("nf,nf->n", part, part) for part in parts]
        self.squares = np.concatenate([np.empty(0), *squares])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, F] float64."""
        return self._features[start:stop] - self._centre

    def squared_distances(
        self, rows: tuple[int, int], others: _Centred, columns: tuple[int, int]
    ) -> np.ndarray:
        """[rows, columns] float64; rounding can take a zero below 0."""
        products = self.rows(*rows) @ others.rows(*columns).T
        products *= -2
        products += self.squares[slice(*rows), np.newaxis]
        products += others.squares[slice(*columns)]
        return products


# ---------------------------------------------------------------- Inception score


@dataclass(frozen=True)
class InceptionScore:
    """Inception score: its mean over splits, and their standard deviation."""

    mean: float
    std: float


def inception_score(probabilities: np.ndarray, splits: int = 10) -> InceptionScore:
    """Inception score, exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, section 4).

    Args:
      probabilities: [N, K] of K classes for each generated image, in the order of generation.
      splits: consecutive parts of about N / splits images, each of which has its own p(y).

    Returns:
      The mean, 1 to K, and the standard deviation over the splits.

    Raises:
      UsageError: with fewer images than splits, or rows that are no probabilities.
    """
    probabilities = _checked(probabilities)
    if splits < 1:
        raise UsageError(f"an Inception score needs a split or more: splits={splits}")
    n = len(probabilities)
    _at_least(n, splits, f"an Inception score of {splits} splits")
    sums = probabilities.sum(1, dtype=np.float64)
    wrong = np.flatnonzero((probabilities < 0).any(1) | (np.abs(sums - 1) > 1e-2))
    if len(wrong):
        raise UsageError(
            f"an Inception score needs probabilities: of {n} rows {len(wrong)} don't sum to 1 or "
            f"have values below 0, the first is row {wrong[0]} with the sum {sums[wrong[0]]:.6g}"
        )
    edges = [i * n // splits for i in range(splits + 1)]
    scores = np.array([_score(probabilities[i:j]) for i, j in itertools.pairwise(edges)])
    return InceptionScore(float(scores.mean()), float(scores.std()))


def _score(probabilities: np.ndarray) -> float:
    p = probabilities.astype(np.float64)
    mean = p.mean(0)
    # A class without probability adds nothing, p log p goes to 0.
    ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
    return float(np.exp(np.sum(p * np.log(ratio), 1).mean()))


# ---------------------------------------------------------------- perceptual path length


@dataclass(frozen=True)
class PathLength:
    """Perceptual path length: the mean of the distances from `low` to `high`, `kept` of them."""

    mean: float
    low: float
    high: float
    kept: int


def perceptual_path_length(distances: np.ndarray) -> PathLength:
    """Mean of perceptual distances along paths without their extremes, PPL (StyleGAN, section 4.1).

    Those below the 1st percentile and above the 99th are left out; a percentile between two
    distances is the lower one at the low end and the higher one at the high end.

    Args:
      distances: [N], each divided by the square of its step.

    Returns:
      The mean, the two percentiles, and how many distances lie within them.

    Raises:
      UsageError: without distances, or with some that are not finite.
    """
    if np.ndim(distances) != 1:
        raise UsageError(f"path lengths are to be [N]: they are {list(np.shape(distances))}")
    values = _checked(np.reshape(distances, [-1, 1]), "path lengths")[:, 0].astype(np.float64)
    _at_least(len(values), 1, "a path length")
    low = np.percentile(values, 1, method="lower")
    high = np.percentile(values, 99, method="higher")
    kept = values[(values >= low) & (values <= high)]
    return PathLength(float(kept.mean()), float(low), float(high), len(kept))


# ---------------------------------------------------------------- checks and blocks


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of consecutive blocks; the last may be smaller."""
    if size < 1:
        raise UsageError(f"a block has one row or column or more, not {size}")
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _checked(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features as an array, once they are known to be a matrix of finite numbers."""
    features = np.asarray(features)
    if features.ndim != 2 or not features.shape[1] or features.dtype.kind not in "fiub":
        raise UsageError(
            f"{name} are to be a matrix of numbers, a row for each image: "
            f"they are {features.dtype} {list(features.shape)}"
        )
    good = [
        (np.abs(features[start:stop].astype(np.float64)) <= _LARGEST).all(1)
        for start, stop in _blocks(len(features), _ROWS)
    ]
    bad = np.flatnonzero(~np.concatenate([np.empty(0, bool), *good]))
    if len(bad):
        raise UsageError(
            f"{name} are not finite in {len(bad)} of {len(features)} rows, first in row {bad[0]}"
        )
    return features


def _pair(
    real: np.ndarray, fake: np.ndarray, least: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features of two sets that fit each other, of `least` images or more each."""
    real = _checked(real, "features of the real images")
    fake = _checked(fake, "features of the generated images")
    _same_dim(real.shape[1], fake.shape[1])
    _at_least(len(real), least, metric, "real images")
    _at_least(len(fake), least, metric, "generated images")
    return real, fake


def _same_dim(a: int, b: int) -> None:
    if a != b:
        raise UsageError(f"one image has {a} features, another {b}; were they of one network?")


def _at_least(count: int, least: int, metric: str, which: str = "images") -> None:
    if count < least:
        raise UsageError(f"{metric} needs {least} {which} or more: given {count}")
