"""A SavedModel draws what generate draws, and needs nothing of ours."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from absl import flags as absl_flags

import trainer
from tests.gcs.fixture import Gcs
from tests.serving.test_model_card import run_snippet
from trainer import config as config_lib
from trainer import export as command
from trainer.config import CheckpointConfig
from trainer.core import storage
from trainer.core.errors import CheckpointError, DivergedError, UsageError
from trainer.families.protocol import DataShape
from trainer.layers.ops import Backend
from trainer.serving import saved_model
from trainer.serving.saved_model import ExportError
from trainer.serving.signatures import Served
from trainer.training import build, checkpoint
from trainer.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
MODEL = {
    "z_dim": 8,
    "w_dim": 12,
    "mapping_layers": 1,
    "d_mapping_layers": 1,
    "channel_base": 64,
    "channel_max": 8,
}


def make_run(
    workdir: str,
    *,
    resolution: tuple[int, int] = (8, 16),
    channels: int = 3,
    classes: int = 0,
    precision: str = "float32",
    scale: float = 1.0,
) -> str:
    """A run with one checkpoint of a small generator, whose noise and average w can be seen."""
    document = {
        "run": {"precision": precision},
        "model": MODEL,
        "data": {"use_labels": bool(classes), "path": "gs://bucket/cats"},
    }
    data = DataShape(resolution, channels, (5,) * classes)
    config = config_lib.resolve(config_lib.from_dict(document), resolution=data.resolution)
    variables = {}
    for name, value in build.networks(config, data)[0].init(seed=1).items():
        if name.endswith("noise_strength"):
            value = np.full([], 0.3)
        if name.endswith("w_avg"):
            value = np.linspace(-1, 1, value.size, dtype=np.float32)
        variables[f"G_ema/{name}"] = tf.Variable(value * scale, dtype=tf.float32)
    checkpoints = Checkpoints(workdir, CheckpointConfig(), variables)
    info = {
        "step": 12,
        "kimg": 0.192,
        "images": 192,
        "config": config_lib.to_dict(config),
        "config_fingerprint": config_lib.fingerprint(config),
        "data_fingerprint": "facade",
        "resolution": list(data.resolution),
        "channels": channels,
        "label_names": [f"class{n}" for n in range(classes)],
        "label_counts": list(data.label_counts),
        "versions": {},
    }
    checkpoints.save(12, info)
    checkpoints.wait()
    return workdir


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, in this process."""
    values = absl_flags.FlagValues()
    command.define_flags(values)
    values(["export", *arguments])
    monkeypatch.setattr(command, "FLAGS", values)
    command.main(["export"])


def generated(source: str, truncation_psi: float = 1.0) -> np.ndarray:
    """What generate draws of seeds 3 and 7, of the first class if there are any: [2, H, W, C]."""
    trained = trainer.load(source)
    return trained.sample([3, 7], 0 if trained.labels else None, truncation_psi)


# What the check in another process says, where that is another test's concern.
GOOD = {"max_difference": 0, "mean_difference": 0.0, "load_seconds": 1.0}

# Loads a SavedModel where there is no `trainer`, and draws seeds 3 and 7 of generate in two ways:
# as Python does, and as servers do, by the names of a signature's tensors in a session.
STRANGER = """
import json, sys
sys.modules["trainer"] = None
import numpy as np
import tensorflow as tf

path, target = sys.argv[1:]
z = np.stack([np.random.RandomState(seed).randn(8) for seed in (3, 7)]).astype(np.float32)
model = tf.saved_model.load(path)
labelled = "label" in model.signatures["png"].structured_input_signature[1]
label = {"label": tf.constant([0], tf.int64)} if labelled else {}
python = model.generate(z=tf.constant(z), truncation_psi=tf.constant([0.7]), **label)["images"]
png = model.signatures["png"](
    seed=tf.constant([0], tf.int64), z=tf.constant(z[:1]), truncation_psi=tf.constant([0.7]),
    noise_mode=tf.constant(["const"]), **label)["image_bytes"]
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    graph = tf.compat.v1.saved_model.load(session, ["serve"], path)
    signature = graph.signature_def["serving_default"]
    feeds = {"z": z, "truncation_psi": [0.7]} | ({"label": [0]} if labelled else {})
    missing = set(signature.inputs) - set(feeds) - set(signature.defaults)
    served = session.run(signature.outputs["images"].name,
                         {signature.inputs[name].name: value for name, value in feeds.items()})
ws = model.mapping(tf.constant(z), **({"c": tf.one_hot([0], 3)} if labelled else {}))["ws"]
with tf.GradientTape() as tape:  # for whoever looks for the ws of an image
    tape.watch(ws)
    loss = tf.reduce_sum(model.synthesis(ws)["images"] ** 2)
one = model.generate(seed=tf.constant([1], tf.int64), **label)["images"].shape[0]
five = model.generate(seed=tf.range(5, dtype=tf.int64), **label)["images"].shape[0]
signatures = {
    name: {**{k: str(v.shape) for k, v in s.structured_input_signature[1].items()},
           **{k: str(v.shape) for k, v in s.structured_outputs.items()}}
    for name, s in model.signatures.items()}
ours = [m for m in sys.modules if m.split(".")[0] in ("trainer", "tests") and sys.modules[m]]
np.savez(target, python=python, served=served, png=tf.io.decode_png(png[0]),
         gradient=tape.gradient(loss, ws), batches=[one, five], missing=sorted(missing), ours=ours,
         signatures=json.dumps(signatures))
"""


def drawn_by_a_stranger(path: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    target = folder / "drawn.npz"
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, path, str(target)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "gradient" not in done.stderr
    with np.load(target) as arrays:
        return dict(arrays)


def assert_same_pixels(drawn: np.ndarray, wanted: np.ndarray) -> None:
    assert drawn.shape == wanted.shape
    assert np.abs(drawn.astype(int) - wanted).max() <= 1


# ------------------------------------------------------------------------------ what is exported


def test_an_unconditional_network(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dest = make_run(str(tmp_path / "run")), str(tmp_path / "model")
    result = {"results": {"fid50k_full": 9.5}, "step": 12, "kimg": 0.192}
    (tmp_path / "run" / "metric-fid50k_full.jsonl").write_text(json.dumps(result))
    run(f"--run={source}", f"--dest={dest}", "--data_licence=CC0", monkeypatch=monkeypatch)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"checked: loads in [\d.]+ s, pixels at most [01] and on average .*", said[0]
    )
    assert said[1] == f"wrote {dest}/1"
    drawn = drawn_by_a_stranger(f"{dest}/1", tmp_path)
    wanted = generated(source, truncation_psi=0.7)
    for name in ("python", "served"):
        assert_same_pixels(drawn[name], wanted)
    assert_same_pixels(drawn["png"], wanted[0])
    assert drawn["batches"].tolist() == [1, 5]
    assert np.abs(drawn["gradient"]).max(axis=(0, 2)).min() > 0  # of every layer's w
    assert drawn["missing"].size == drawn["ours"].size == 0
    row = "(None,)"
    inputs = {"seed": row, "z": "(None, None)", "truncation_psi": row, "noise_mode": row}
    assert json.loads(str(drawn["signatures"])) == {
        "serving_default": {**inputs, "images": "(None, 8, 16, 3)"},
        "png": {**inputs, "image_bytes": row},
        "mapping": {"z": "(None, 8)", "truncation_psi": row, "ws": "(None, 4, 12)"},
        "synthesis": {"ws": "(None, 4, 12)", "images": "(None, 8, 16, 3)"},
    }
    card = json.loads((tmp_path / "model" / "1" / "model_card.json").read_text())
    assert card["training"]["kimg"] == 0.192
    assert card["data"] == {
        "path": "gs://bucket/cats",
        "fingerprint": "facade",
        "label_names": [],
        "label_counts": [],
        "licence": "CC0",
    }
    assert card["metrics"] == [result]
    assert card["export"]["check"]["max_difference"] <= 1
    assert_files_are_those_of_the_card(f"{dest}/1")
    assert_snippet_of_the_card_runs(tmp_path / "model" / "1")


def assert_files_are_those_of_the_card(path: str) -> None:
    listed = json.loads(storage.read_text(storage.join(path, "model_card.json")))["files"]
    assert set(storage.walk(path)) == {*listed, "model_card.json"}
    assert {"saved_model.pb", "MODEL_CARD.md", "variables/variables.index"} < set(listed)
    for name, wanted in listed.items():
        found = storage.digest(storage.join(path, name))
        assert (found.bytes, found.crc32c) == (wanted["bytes"], wanted["crc32c"]), name


def assert_snippet_of_the_card_runs(path: pathlib.Path) -> None:
    card = (path / "MODEL_CARD.md").read_text()
    values = run_snippet(card, str(path))
    (request,) = re.findall(r"-d '(\{.*?\})'\n", card)
    inputs = json.loads(request)["inputs"]
    specs = values["model"].signatures["png"].structured_input_signature[1]
    tensors = {name: tf.constant(inputs[name], spec.dtype) for name, spec in specs.items()}
    assert set(inputs) == set(specs)
    assert len(values["model"].signatures["png"](**tensors)["image_bytes"]) == 2


@pytest.mark.slow
def test_a_conditional_network_in_bfloat16(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained so, too: with its clamp."""
    source = make_run(str(tmp_path / "run"), channels=4, classes=3, precision="bfloat16")
    dest = str(tmp_path / "model")
    run(f"--run={source}", f"--dest={dest}", "--precision=bfloat16", monkeypatch=monkeypatch)
    drawn = drawn_by_a_stranger(f"{dest}/1", tmp_path)
    wanted = generated(source, truncation_psi=0.7)
    difference = np.abs(drawn["python"].astype(int) - wanted)
    assert 0 < difference.mean() < 2  # it is rounded, and not much
    assert_same_pixels(drawn["served"], drawn["python"])
    assert json.loads(str(drawn["signatures"]))["mapping"]["c"] == "(None, 3)"
    card = json.loads((tmp_path / "model" / "1" / "model_card.json").read_text())
    assert card["export"]["precision"] == "bfloat16"
    assert 0 < card["export"]["check"]["mean_difference"] < 2
    assert_snippet_of_the_card_runs(tmp_path / "model" / "1")


def test_a_checkpoint_on_gs(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """From gs:// to gs://, whence TensorFlow loads it."""
    monkeypatch.setattr(saved_model, "_check", lambda *_: GOOD)
    source = make_run(f"{gcs.url}/run", precision="float16")
    path = f"{source}/checkpoints/step-000000012"
    dest = f"{gcs.url}/models/cats"
    run(f"--checkpoint={path}", f"--dest={dest}", monkeypatch=monkeypatch)
    assert storage.listdir(dest) == ["1"]
    assert_files_are_those_of_the_card(f"{dest}/1")
    z = [np.random.RandomState(seed).randn(8) for seed in (3, 7)]
    model = tf.saved_model.load(f"{dest}/1")
    drawn = model.generate(z=tf.constant(z, tf.float32))["images"].numpy()
    assert_same_pixels(drawn, generated(source))


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_compiled(platform: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the platform's backend; that the pixels are the same is for the command to check."""
    source = make_run(str(tmp_path / "run"), channels=1)
    run(f"--run={source}", f"--dest={tmp_path}", f"--jit={platform}", monkeypatch=monkeypatch)
    card = json.loads((tmp_path / "1" / "model_card.json").read_text())
    assert card["export"]["check"]["max_difference"] <= 1
    assert b"_XlaMustCompile" in (tmp_path / "1" / "saved_model.pb").read_bytes()
    config, data = saved_model._origin(checkpoint.find(source).info)
    wanted = Backend.XLA_CPU if platform == "cpu" else Backend.GENERIC
    assert saved_model._network(config, data, "float32", platform).backend is wanted


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_the_clamp_is_that_of_training(trained: str) -> None:
    """A network that was trained in float32 has none, and bfloat16 needs none."""
    document = {"run": {"precision": trained}, "model": {**MODEL, "conv_clamp": 64.0}}
    config = config_lib.from_dict(document)
    data = DataShape((16, 32), 3, ())
    for precision in ("float32", "bfloat16"):
        network = saved_model._network(config, data, precision, "off")
        assert network.conv_clamp == (64.0 if trained == "bfloat16" else None)
        assert {b.dtype for b in network.blocks[1:]} == {
            tf.bfloat16 if precision == "bfloat16" else None
        }


def test_the_loop_can_export(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values it has and what it says of them, and no word of a path."""
    monkeypatch.setattr(saved_model, "_check", lambda *_: GOOD)
    found = checkpoint.find(make_run(str(tmp_path / "run")))
    params, info = checkpoint.read_parameters(found, "G_ema"), found.info
    (tmp_path / "run" / "export" / "4").mkdir(parents=True)
    (tmp_path / "run" / "export" / "4" / "saved_model.pb").write_bytes(b"the last one")
    exported = saved_model.publish(params, info, str(tmp_path / "run" / "export"))
    assert (exported.number, exported.path) == (5, str(tmp_path / "run" / "export" / "5"))
    assert exported.card["training"]["step"] == 12


# ------------------------------------------------------------------------------ what is refused


def test_a_model_that_draws_something_else_is_not_published(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = Served._mapping

    def wrong(self: Served, z: tf.Tensor, c: tf.Tensor, psi: tf.Tensor) -> tf.Tensor:
        return mapping(self, z, c, psi * 0.9)

    monkeypatch.setattr(Served, "_mapping", wrong)
    source = make_run(str(tmp_path / "run"))
    with pytest.raises(
        ExportError, match=r"not published: its pixels differ by up to \d+"
    ) as caught:
        run(f"--run={source}", f"--dest={tmp_path}/model", monkeypatch=monkeypatch)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "model").iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_not_published(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(served: Served, folder: str) -> None:
        storage.write_text_atomic(f"{folder}/saved_model.pb", "no graph")

    monkeypatch.setattr(saved_model, "_save", broken)
    source = make_run(str(tmp_path / "run"))
    with pytest.raises(ExportError, match=r"could not load it .*exit code 1: ") as caught:
        run(f"--run={source}", f"--dest={tmp_path}/model", monkeypatch=monkeypatch)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "model").iterdir()) == []


def test_a_network_that_has_diverged_is_not_exported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_run(str(tmp_path / "run"), scale=float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        run(f"--run={source}", f"--dest={tmp_path}/model", monkeypatch=monkeypatch)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("mean", "precision", "says"),
    [
        (9.0, "bfloat16", "needs --precision=float32"),
        (1.0, "bfloat16", ""),
        (1.0, "float32", "up to 90"),
    ],
)
def test_how_much_may_be_rounded(
    monkeypatch: pytest.MonkeyPatch, mean: float, precision: str, says: str
) -> None:
    check = {"max_difference": 90, "mean_difference": mean, "load_seconds": 1}
    done = subprocess.CompletedProcess([], 0, stdout=f"log\n{json.dumps(check)}\n".encode())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    pixels = np.zeros([2, 4, 4, 3], np.uint8)
    if says:
        with pytest.raises(ExportError, match=says):
            saved_model._check("there", {}, pixels, precision)
    else:
        assert saved_model._check("there", {}, pixels, precision) == check


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["--run=runs/x"], UsageError, "--dest"),
        (["--dest=x"], UsageError, "--run and --checkpoint"),
        (["--dest=x", "--run=a", "--checkpoint=b"], UsageError, "one of --run and --checkpoint"),
        (["--dest=x", "--run=no/such/run"], CheckpointError, "no/such/run"),
        (["--dest=x", "--checkpoint=a/checkpoints/step-000000001"], CheckpointError, "step-0000"),
    ],
)
def test_wrong_calls(
    arguments: list[str],
    kind: type[Exception],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=says) as caught:
        run(*arguments, monkeypatch=monkeypatch)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--precision=float16", "--jit=tpu", "--dets=x"])
def test_wrong_flags(flag: str) -> None:
    values = absl_flags.FlagValues()
    command.define_flags(values)
    with pytest.raises(absl_flags.Error, match=flag.partition("=")[0].lstrip("-")):
        values(["export", flag])


def test_a_dest_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    """The whole command: one line, and the exit code of storage."""
    source = make_run(str(tmp_path / "run"))
    (tmp_path / "model").write_text("a file")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.export", f"--run={source}", f"--dest={tmp_path}/model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert done.returncode == 4, done.stderr
    assert f"{tmp_path}/model" in line


def test_examples_in_the_help_are_real_calls() -> None:
    calls = re.findall(r"python -m trainer export (.*)", command.__doc__ or "")
    assert len(calls) == 3
    for call in calls:
        values = absl_flags.FlagValues()
        command.define_flags(values)
        assert values(["export", *call.split()]) == ["export"]


# ------------------------------------------------------------------------------ killed


def complete(dest: str) -> list[int]:
    """The versions that a loader takes, each looked at."""
    files = storage.walk(dest)
    numbers = sorted(
        int(n.partition("/")[0]) for n in files if re.fullmatch(r"\d+/saved_model\.pb", n)
    )
    for number in numbers:
        assert_files_are_those_of_the_card(storage.join(dest, str(number)))
    return numbers


@pytest.mark.parametrize(
    ("where", "kills"),
    [
        pytest.param("gcs", 2, marks=pytest.mark.slow),
        pytest.param("local", 20, marks=pytest.mark.proof),
        pytest.param("gcs", 8, marks=pytest.mark.proof),
    ],
)
def test_killed_at_any_moment(where: str, kills: int, tmp_path: pathlib.Path, request: Any) -> None:
    """The real command; `test_versions` kills it between any two uses of the store."""
    environment, dest = dict(os.environ), str(tmp_path / "model")
    if where == "gcs":
        gcs: Gcs = request.getfixturevalue("gcs")
        environment, dest = gcs.environment(), f"{gcs.url}/model"
    source = make_run(str(tmp_path / "run"))

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.export", f"--run={source}", f"--dest={dest}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    began = time.monotonic()
    assert start().wait() == 0
    whole = time.monotonic() - began
    rng = random.Random(5)
    for n in range(kills):
        process = start()
        time.sleep(whole * (n + rng.random()) / kills)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        complete(dest)
    assert start().wait() == 0
    numbers = complete(dest)
    assert {name.partition("/")[0] for name in storage.walk(dest)} == set(map(str, numbers))
    model = tf.saved_model.load(storage.join(dest, str(numbers[-1])))
    assert model.generate()["images"].shape == (1, 8, 16, 3)


@pytest.mark.proof
def test_config_f_at_1024_loads_in_seconds(tmp_path: pathlib.Path) -> None:
    """A fresh process, TensorFlow's own start included; under 15 s on a machine that is idle."""
    config = config_lib.from_dict({})
    data = DataShape((1024, 1024), 3, ())
    network = saved_model._network(config, data, "float32", "off")
    served = Served(network, network.init(seed=1))
    saved_model._save(served, str(tmp_path / "model"))
    code = "import sys, tensorflow as tf; tf.saved_model.load(sys.argv[1])"
    times = []
    for _ in range(2):
        began = time.monotonic()
        command_line = [sys.executable, "-I", "-c", code, str(tmp_path / "model")]
        subprocess.run(command_line, check=True, capture_output=True)
        times.append(time.monotonic() - began)
    assert min(times) < 15
