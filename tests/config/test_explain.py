"""What the command `config` says of the keys: all of them, and nothing that the code contradicts."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from trainer import config as config_lib
from trainer.config import explain, identity
from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.families import registry

ROOT = pathlib.Path(__file__).parents[2]
ENTRIES = explain.entries()


def trainer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def rows(key: str) -> dict[str, str]:
    """The named rows below the text of a key."""
    text = re.sub(r"\n {12}", " ", explain.explain(key))
    return dict(re.findall(r"^  (\S+) {2,}(.*)$", text, re.MULTILINE))


def test_every_key_of_every_family_is_there_once() -> None:
    for family in registry.NAMES:
        keys = [e.key for e in ENTRIES if e.family in ("", family)]
        assert sorted(keys) == sorted(config_lib.known_keys(family))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.key}-{e.family}")
def test_text_default_and_limit_are_those_of_the_code(entry: explain.Entry) -> None:
    assert entry.text
    assert entry.text.endswith(".")
    assert "  " not in entry.text
    family = entry.family or registry.DEFAULT
    path = "memory://explain/config.yaml"
    storage.write_text_atomic(path, f"model: {{family: {family}}}\n")
    given = config_lib.load(path, [f"{entry.key}={entry.default}"])
    assert given == config_lib.load(path)
    limit = config_lib.known_keys(family)[entry.key].limit
    assert entry.limit.startswith(limit.text if limit else "")
    assert bool(entry.limit) == bool(limit)


def test_all_that_is_known_of_a_key() -> None:
    text = explain.explain("training.g_lr")
    assert text.startswith("training.g_lr\n  G's learning rate before ")
    assert "(NVIDIA: `lrate`)" in text
    assert rows("training.g_lr") == {
        "values": "a number; a schedule, {cosine: [first, last], kimg: thousands of images}; "
        "or 'auto'",
        "limit": "above 0, at both ends",
        "default": "0.002",
        "'auto'": "stylegan2: 0.0025 at 64 and 256, 0.002 at 1024 pixels; r3gan: 0.0002",
        "resume": "a resumed run keeps it",
    }
    assert explain.explain("g_lr") == text
    assert "(NVIDIA: --freezed)" in explain.explain("freeze_d")


def test_rows_that_a_key_does_not_need_are_left_out() -> None:
    assert rows("data.mirror") == {
        "values": "true or false",
        "default": "false",
        "resume": "a resumed run keeps it",
    }
    assert rows("run.jit")["values"] == "'auto', 'on' or 'off'"
    assert rows("ema_rampup")["values"] == "a number or null"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.key}-{e.family}")
def test_says_whether_a_resumed_run_may_change_it(entry: explain.Entry) -> None:
    verb = "may change" if identity.may_change(entry.key) else "keeps"
    assert rows(entry.key)["resume"] == f"a resumed run {verb} it"


def test_keys_of_families_are_told_apart() -> None:
    text = explain.explain("model.z_dim")
    first, second = text.split("\n\n")
    assert first.startswith("model.z_dim (stylegan2)\n  length of the latent z (NVIDIA: 512).\n")
    assert second.startswith("model.z_dim (r3gan)\n")
    assert "\n  default   64\n" in second
    assert explain.explain("channel_base").count("'auto'   ") == 1
    assert "'stylegan2' or 'r3gan'" in explain.explain("model.family")


def test_a_line_for_each_key() -> None:
    text = explain.explain()
    lines = re.findall(r"^  (\w+) +(\S+) +\S", text, re.MULTILINE)
    assert lines == [(entry.name, entry.default) for entry in ENTRIES]
    assert max(map(len, text.splitlines())) <= 100
    of_training = explain.explain("training")
    assert of_training in text
    assert of_training.startswith("training: Optimizers and the batch.\n  batch_size ")
    assert "z_dim" not in of_training


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g_lrr", r"unknown key g_lrr; did you mean training\.g_lr\?"),
        ("training.glr", r"unknown key training\.glr; did you mean training\.g_lr\?"),
        ("trianing", r"did you mean training\?"),
        ("g_lr.training", r"sections are run, data"),
        ("qqqqqqq", r"sections are run, data"),
    ],
)
def test_unknown_key_names_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explain.explain(text)


@pytest.mark.parametrize("form", [["-m", "trainer", "config"], ["-m", "trainer.config"]])
def test_the_command(form: list[str]) -> None:
    done = trainer(*form, "g_lr")
    assert (done.returncode, done.stdout) == (0, explain.explain("training.g_lr") + "\n")
    done = trainer(*form, "g_lrr")
    message = "error: unknown key g_lrr; did you mean training.g_lr?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_needs_no_tensorflow() -> None:
    code = (
        "import sys; sys.modules['tensorflow'] = None; "
        "from trainer.config import explain; print(explain.explain()[:4])"
    )
    done = trainer("-c", code)
    assert (done.stdout, done.returncode) == ("run:\n", 0), done.stderr
