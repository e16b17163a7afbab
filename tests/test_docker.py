"""The images, with no engine to build them: their files are read, linted, and followed by hand."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TARGETS = ("gpu", "tpu")
LOCKS = [f"requirements-{target}{suffix}.txt" for target in TARGETS for suffix in ("", "-test")]
# Registries' names belong to the environment of a build, not into the project.
HOSTS = re.compile(r"https?://|--(extra-)?index-url|--find-links", re.I)
SECRETS = re.compile(r"(?i)(password|token|api_?key|credential)\S*\s*=\s*\S")


def dockerfile(target: str) -> str:
    return (ROOT / "docker" / f"Dockerfile.{target}").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages(text: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, from its FROM on."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions(text):
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def problems(text: str) -> list[str]:
    """What an image of ours must not be, one text each."""
    found = []
    all_stages = stages(text)
    last = all_stages[-1]
    words = [word for word, _ in last]
    if len(all_stages) < 2:
        found.append("one stage")
    users = [rest for word, rest in last if word == "USER"]
    if not users or users[-1] in ("0", "root"):
        found.append("runs as root")
    if ("ENTRYPOINT", '["python", "-m", "trainer.task"]') not in last:
        found.append("another entry point")
    labels = " ".join(rest for word, rest in last if word == "LABEL")
    for name in ("revision", "base.digest"):
        if f"org.opencontainers.image.{name}=" not in labels:
            found.append(f"no label {name}")
    if "ADD" in words or any(rest.startswith(". ") for word, rest in last if word == "COPY"):
        found.append("takes whatever is there")
    installs = [
        rest for word, rest in instructions(text) if word == "RUN" and "pip install" in rest
    ]
    if any("--require-hashes" not in rest and "--no-index" not in rest for rest in installs):
        found.append("installs what isn't pinned")
    first = all_stages[0]
    code = [i for i, (word, rest) in enumerate(first) if word == "COPY" and "trainer" in rest]
    install = [i for i, (word, rest) in enumerate(first) if "--require-hashes" in rest]
    if not install or any(i < install[0] for i in code):
        found.append("dependencies are installed anew when the code changes")
    if HOSTS.search(text):
        found.append("names a registry")
    if any(SECRETS.search(rest) for word, rest in instructions(text) if word in ("ENV", "ARG")):
        found.append("holds a secret")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_hadolint(target: str) -> None:
    tool = pathlib.Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [tool, "--failure-threshold=style", ROOT / "docker" / f"Dockerfile.{target}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_image(target: str) -> None:
    assert problems(dockerfile(target)) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("\nUSER 1000\nARG", "\nARG", "runs as root"),
        ("\nUSER 1000\nARG", "\nUSER root\nARG", "runs as root"),
        ("trainer.task", "trainer.probe", "another entry point"),
        ("image.revision=", "image.rev=", "no label revision"),
        ("\nCOPY docker/smoke.sh docker/", "\nCOPY . .", "takes whatever is there"),
        ("pip install --require-hashes", "pip install", "installs what isn't pinned"),
        ("\nCOPY docker/req", "\nCOPY trainer trainer\nCOPY docker/req", "are installed anew"),
        ("--require-hashes", "--require-hashes --index-url=x", "names a registry"),
        ("\nARG REVISION", "\nARG API_TOKEN=abc\nARG REVISION", "holds a secret"),
    ],
)
def test_planted_mistake(old: str, new: str, expected: str) -> None:
    text = dockerfile("gpu")
    assert old in text
    assert any(expected in found for found in problems(text.replace(old, new)))


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_is_there_and_sent_to_the_build(target: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for word, rest in instructions(dockerfile(target)):
        if word != "COPY" or "--from" in rest or rest == ". .":
            continue
        for source in shlex.split(rest)[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, k) or source.startswith(f"{k}/") for k in kept)


def test_cloud_build_is_sent_what_docker_sees() -> None:
    """Not the data, models and keys that lie in the same folder."""
    docker = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    cloud = [line for line in (ROOT / ".gcloudignore").read_text().splitlines() if line[0] != "#"]
    assert (docker[0], cloud[0]) == ("*", "/*")
    kept = {line.removeprefix("!") for line in docker if line.startswith("!")}
    assert kept == {line.removeprefix("!/") for line in cloud if line.startswith("!/")}
    assert {line.strip("*/") for line in docker if "pyc" in line} == {
        line.strip("*/") for line in cloud if "pyc" in line
    }


@pytest.mark.slow
def test_gcloud_understands_the_list(tmp_path: pathlib.Path) -> None:
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    shutil.copy(ROOT / ".gcloudignore", tmp_path)
    kept = ["README.md", "trainer/core/x.py", "configs/a.yaml", "tests/data/x.png"]
    left = [
        "key.json",
        "photos/1.png",
        "data/a.tfrecord",
        "trainer/__pycache__/x.pyc",
        "out/trainer",
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done = subprocess.run(
        ["gcloud", "meta", "list-files-for-upload", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "gcloud")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {*kept, ".gcloudignore"}


# ------------------------------------------------------------------------------------ pins


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "docker" / name).read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_everything_by_hash(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    packages = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(packages) == len(pins(name)) > 30
    assert all("--hash=sha256:" in package for package in packages)
    assert not HOSTS.search(text)
    assert "make locks" in text


@pytest.mark.parametrize("target", TARGETS)
def test_the_tests_run_with_what_the_image_has(target: str) -> None:
    image, tests = pins(f"requirements-{target}.txt"), pins(f"requirements-{target}-test.txt")
    assert {name: tests.get(name) for name in image} == image
    assert "pytest" in tests and "pytest" not in image


def test_the_tpu_pair() -> None:
    found = pins("requirements-tpu.txt")
    assert (found["tensorflow-tpu"], found["libtpu"]) == ("2.20.0", "0.0.14")


@pytest.mark.parametrize("target", TARGETS)
def test_a_lock_has_what_setup_asks_for(target: str) -> None:
    """A requirement added to setup.py without `make locks` is found here."""
    from packaging.requirements import Requirement

    code = (
        "import json, setuptools; found = {};"
        "setuptools.setup = lambda **k: found.update(k); exec(open('setup.py').read());"
        "print(json.dumps([found['install_requires'], found['extras_require']]))"
    )
    code = code.replace("exec(", "globals().update(__file__='setup.py'); exec(")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base, extras = json.loads(done.stdout)
    locked = pins(f"requirements-{target}.txt")
    for text in [*base, *extras[target], *extras["gcs"], *extras["tensorboard"]]:
        wanted = Requirement(text)
        version = locked.get(wanted.name.lower().replace("_", "-"))
        assert version and wanted.specifier.contains(version), f"{text}: run make locks"


# ------------------------------------------------------------------------------------ by hand


def follow(target: str, root: pathlib.Path) -> dict[str, str]:
    """Does in a folder what the Dockerfile does in an image; its environment at the end.

    One root stands for all stages, so what is copied between them is there already. Users, the
    tests' stage and the package registry (that of the environment) are left out.
    """
    places = {"/opt/venv": root / "venv", "/dist": root / "dist", "/lib/libtpu": root / "libtpu"}

    def here(text: str) -> str:
        for name, place in places.items():
            text = re.sub(rf"(?<![\w.]){name}\b", str(place), text)
        return text

    app = root / "app"
    app.mkdir()
    # Little of this process's own: the tests set flags that another XLA aborts on, and JAX names the
    # libtpu that it has found, on which another TensorFlow aborts.
    kept = re.compile("PATH|HOME|TMPDIR|PIP_.*|.*_proxy|(SSL|REQUESTS)_.*", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
    for stage in stages(dockerfile(target)):
        if stage[0][1].endswith("AS test"):
            continue
        for word, rest in stage:
            if word == "ENV":
                for pair in shlex.split(rest):
                    name, _, value = pair.partition("=")
                    environment[name] = here(value).replace("$PATH", environment["PATH"])
            elif word == "COPY" and "--from" not in rest:
                *sources, dest = shlex.split(rest)
                _copy(sources, app, dest)
            elif word == "RUN" and "useradd" not in rest:
                line = here(re.sub(r"--mount=\S+\s*", "", rest))
                line = line.replace("python -m venv", f"{sys.executable} -m venv")
                done = subprocess.run(
                    ["sh", "-c", line], cwd=app, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    return environment


def _copy(sources: list[str], app: pathlib.Path, dest: str) -> None:
    for source in sources:
        place = app / dest
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, dirs_exist_ok=True)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)


@pytest.mark.proof
@pytest.mark.parametrize("target", TARGETS)
def test_the_steps_make_an_installation_that_trains(target: str, tmp_path: pathlib.Path) -> None:
    """From the wheel alone: several GB are fetched for GPUs."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images' Python is 3.11")
    environment = follow(target, tmp_path)
    for folder in ("trainer", "configs"):  # only what is installed
        shutil.rmtree(tmp_path / "app" / folder)
    done = subprocess.run(
        ["sh", "docker/smoke.sh", tmp_path / "smoke"],
        cwd=tmp_path / "app",
        env=environment | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "smoke: trained, resumed and drawn" in done.stdout
    assert "resuming from" in done.stdout
    if target == "tpu":
        assert (tmp_path / "libtpu.so").resolve().is_file()
