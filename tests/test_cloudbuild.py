"""`cloudbuild.yaml`: valid by Cloud Build's schema, and free of the mistakes that it lets through."""

from __future__ import annotations

import copy
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / "cloudbuild.yaml"

# What Cloud Build itself substitutes.
BUILT_IN = {
    "PROJECT_ID",
    "PROJECT_NUMBER",
    "LOCATION",
    "BUILD_ID",
    "TRIGGER_NAME",
    "REPO_NAME",
    "BRANCH_NAME",
    "TAG_NAME",
    "REVISION_ID",
    "COMMIT_SHA",
    "SHORT_SHA",
}
# Those that only a trigger sets: names and tags may not hang on them.
BY_TRIGGER = {"REPO_NAME", "BRANCH_NAME", "TAG_NAME", "REVISION_ID", "COMMIT_SHA", "SHORT_SHA"}
ORDER = ["build-tests", "tests", "build", "smoke", "push"]


def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return found


def texts(value: Any) -> list[str]:
    """All strings in a document."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def used(value: Any) -> set[str]:
    """Substitutions named in a document; `$$` is a dollar of the shell's."""
    names = set()
    for text in texts(value):
        plain = text.replace("$$", "")
        names |= set(re.findall(r"\$\{?([A-Z_][A-Z0-9_]*)", plain))
    return names


def problems(build: dict[str, Any]) -> list[str]:
    """What is wrong with a build, one text each."""
    given = build.get("substitutions", {})
    found = [f"unknown substitution {n}" for n in sorted(used(build) - BUILT_IN - set(given))]
    found += [f"substitution {n} is never used" for n in sorted(set(given) - used(build))]
    found += [f"substitution {n} must begin with _" for n in given if not n.startswith("_")]
    for text in build.get("images", []):
        names = set(re.findall(r"[A-Z_]+", text.rpartition(":")[2]))
        if names & BY_TRIGGER or text.endswith(":latest"):
            found.append(f"the tag of {text} isn't there for every build, or moves")
    if not build.get("images"):
        found.append("no image is recorded")
    steps = [step.get("id", "") for step in build.get("steps", [])]
    places = [steps.index(name) for name in ORDER if name in steps]
    if [name for name in ORDER if name not in steps]:
        found.append("a step is missing")
    elif places != sorted(places):
        found.append("steps are in another order")
    if any("waitFor" in step or step.get("allowFailure") for step in build.get("steps", [])):
        found.append("a step runs before, or in spite of, those above it")
    for step in build.get("steps", []):
        if step.get("id") != "push" and "docker push" in " ".join(texts(step)):
            found.append("pushes early")
    if int(build.get("timeout", "600s").rstrip("s")) < 3600:
        found.append("the time is too short")
    options = build.get("options", {})
    if "HIGHCPU" not in options.get("machineType", ""):
        found.append("the default machine")
    if options.get("requestedVerifyOption") != "VERIFIED":
        found.append("no provenance")
    if "_IMAGE" in given and not options.get("dynamicSubstitutions"):
        found.append("substitutions in substitutions are off")
    if int(options.get("diskSizeGb", 100)) < 200:
        found.append("the disk is too small")
    return found


def schema_check(path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    tool = pathlib.Path(sys.executable).parent / "check-jsonschema"
    command = [tool, "--builtin-schema", "vendor.cloudbuild", path]
    return subprocess.run(command, capture_output=True, text=True)


def test_schema() -> None:
    done = schema_check(FILE)
    assert done.returncode == 0, done.stdout


def test_the_schema_is_checked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "wrong.yaml").write_text(FILE.read_text().replace("steps:", "stepps:"))
    assert schema_check(tmp_path / "wrong.yaml").returncode != 0


def test_build() -> None:
    assert problems(document()) == []


def test_the_image_is_named_by_its_target() -> None:
    given = document()["substitutions"]
    assert given["_TARGET"] in ("gpu", "tpu")
    assert "${_REGION}-docker.pkg.dev/${PROJECT_ID}/${_REPO}/" in given["_IMAGE"]
    for target in ("gpu", "tpu"):
        assert (ROOT / "docker" / f"Dockerfile.{target}").is_file()


def test_the_digest_is_printed_for_submit() -> None:
    (push,) = [step for step in document()["steps"] if step["id"] == "push"]
    assert "RepoDigests" in push["args"][-1] and "--image=" in push["args"][-1]


def test_shell_variables_are_escaped() -> None:
    """An unescaped one would be a substitution that doesn't exist."""
    for step in document()["steps"]:
        for text in texts(step):
            assert not re.search(r"(?<!\$)\$(\(|[a-z])", text), text


@pytest.mark.parametrize("step", [s["id"] for s in document()["steps"] if s.get("entrypoint")])
def test_scripts_are_shell(step: str) -> None:
    (script,) = [s["args"][-1] for s in document()["steps"] if s["id"] == step]
    plain = script.replace("$$", "$").replace("${", "$X{").replace("$X{", "${")
    done = subprocess.run(["bash", "-n", "-c", plain], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def _without(build: dict[str, Any], *path: str) -> None:
    for name in path[:-1]:
        build = build[name]
    del build[path[-1]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: b["steps"][2]["args"].append("$_TAGET"), "unknown substitution _TAGET"),
        (lambda b: b["steps"][2]["args"].append("${REVISON}"), "unknown substitution REVISON"),
        (lambda b: b["substitutions"].update(_OLD="x"), "_OLD is never used"),
        (lambda b: b["substitutions"].update(OLD="x"), "OLD must begin with _"),
        (lambda b: _without(b, "images"), "no image is recorded"),
        (lambda b: b.update(images=["a:${SHORT_SHA}"]), "isn't there for every build"),
        (lambda b: b.update(images=["a:latest"]), "or moves"),
        (lambda b: b["steps"].pop(2), "a step is missing"),
        (lambda b: b["steps"].insert(1, b["steps"].pop()), "in another order"),
        (lambda b: b["steps"][5].update(waitFor=["-"]), "runs before"),
        (lambda b: b["steps"][2].update(allowFailure=True), "in spite of"),
        (lambda b: b["steps"][1].update(args=["-c", "docker push x"]), "pushes early"),
        (lambda b: b.update(timeout="600s"), "too short"),
        (lambda b: _without(b, "timeout"), "too short"),
        (lambda b: _without(b, "options", "machineType"), "the default machine"),
        (lambda b: _without(b, "options", "requestedVerifyOption"), "no provenance"),
        (lambda b: _without(b, "options", "dynamicSubstitutions"), "are off"),
        (lambda b: _without(b, "options", "diskSizeGb"), "too small"),
    ],
)
def test_planted_mistake(change: Any, expected: str) -> None:
    build = copy.deepcopy(document())
    change(build)
    assert any(expected in text for text in problems(build)), problems(build)
