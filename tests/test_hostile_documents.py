"""Every file that the trainer reads, changed by others: used, or refused in one short line."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trainer import config as config_lib
from trainer import submit
from trainer.core import documents
from trainer.core.errors import ConfigError, DataError, TrainerError
from trainer.core.lease import Owner
from trainer.data import journal_entry, manifest, sources
from trainer.distribution import cluster
from trainer.serving import model_card, versions
from trainer.telemetry import statsfile
from trainer.training import run_info
from trainer.vertex import watch

HOSTILE: list[Any] = [
    None, True, -1, 0, 1.5, 2**63, 2**70, 1e308, float("nan"), float("inf"), "", "../../etc/passwd",
    "x" * 5000, "\x1b[2J\nerror: \u202e\ud800\0", [], [[]], {}, {"a": {}},
]  # fmt: skip
TEXTS = [
    b"", b"\0" * 50, b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"1e999", b"NaN", b"[]",
    b"null", b'"\\ud800"', b"\xff\xfe{}", b"\x1b[2J", b'{"a": 1, "a": 1}', b"x" * 300_000,
    b"a: &a [x]\nb: [*a, *a]\n", b"- " * 1000,
]  # fmt: skip


def changed(value: Any) -> Iterator[Any]:
    """The document with each part in turn replaced by each hostile value, and without it."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 2)):
            for replacement in HOSTILE:
                other = copy.deepcopy(value)
                other[key] = replacement
                yield other
            other = copy.deepcopy(value)
            del other[key]
            yield other
            for inner in changed(value[key]):
                other = copy.copy(value)
                other[key] = inner
                yield other


def variants(document: Any) -> Iterator[bytes]:
    text = json.dumps(document).encode()
    yield from TEXTS
    for end in range(1, len(text), max(1, len(text) // 20)):
        yield text[:end]
        yield text[:end] + b"\xff" + text[end + 1 :]
        yield text[:end] + text[end + 1 :]
    for other in changed(document):
        yield json.dumps(other).encode()


def survive(read: Callable[[bytes], object], document: Any, *errors: type[Exception]) -> None:
    """Reads all variants; an error may only be one of these, in a short printable line."""
    read(json.dumps(document).encode())  # as it should be
    refused = 0
    for data in variants(document):
        try:
            read(data)
        except errors as error:
            refused += 1
            text = str(error)
            assert len(text) < 1000, data[:200]
            # What is left is escaped where it is printed.
            assert text.count("\n") <= 1, data[:200]
    assert refused or not errors


def test_manifest(tmp_path: pathlib.Path) -> None:
    shipped = manifest.load("package:data/fluent_emoji_32")
    document = manifest._content(shipped) | {"fingerprint": shipped.fingerprint}
    document["shards"] = document["shards"][:1]
    document["skipped"] = [{"name": "a.png", "reason": "b"}]
    for shard in document["shards"]:
        shard["index"] = [0]
        shard["count"] = 64
    document |= {"num_images": 64, "label_names": ["a", "b"], "label_counts": [60, 4]}
    del document["fingerprint"]
    document["fingerprint"] = manifest._fingerprint(document)
    path = tmp_path / manifest.FILE_NAME

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = manifest.load(str(tmp_path))
        assert pathlib.Path(found.path(0)).parent == tmp_path

    survive(read, document, DataError)


def test_label_file(tmp_path: pathlib.Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    source = sources.open_source(str(tmp_path))

    def read(data: bytes) -> None:
        labels = sources._labels_from_json(source, data, "dataset.json", required=True)
        assert len(labels.numbers) == 2

    survive(read, {"labels": [["a.png", 0], ["b.png", 1]]}, DataError)


def test_journal(tmp_path: pathlib.Path) -> None:
    entry = {
        "name": "a", "bytes": 100, "crc32c": 1, "offsets": [0, 50], "labels": [[-1, 1], [1, 1]],
        "skipped": [{"name": "a.png", "reason": "b"}], "kept": 2, "enlarged": 0, "stretched": 0,
    }  # fmt: skip
    path = tmp_path / "a.json"
    kept = []

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = journal_entry.read_entry(str(path), "a", 100, 2)
        kept.append(found is not None)
        if found is not None:
            counts = [0, 0]
            for label, count in found["labels"]:
                if label >= 0:
                    counts[label] += count
            assert (found["name"], len(found["offsets"])) == ("a", 2)

    survive(read, entry)
    assert kept[0]
    assert sum(kept) < len(kept) / 4


def test_lease() -> None:
    owner = dataclasses.asdict(Owner.this_process()) | {"renewed": 3}

    def read(data: bytes) -> None:
        found = Owner.parse(data)
        if found is not None:
            str(found)
            found.state_here()

    survive(read, owner)


def test_state_of_a_checkpoint() -> None:
    config = config_lib.to_dict(config_lib.Config())
    info = {
        "step": 1, "images": 16, "kimg": 0.016, "tick": 0, "tick_start": 0, "total_sec": 1.5,
        "config": {"run": {"seed": 1}, "telemetry": config["telemetry"]},
        "config_fingerprint": "a", "data_fingerprint": "b", "resolution": [32, 32], "channels": 3,
        "label_names": ["a", "b"], "label_counts": [1, 2], "versions": {"trainer": "1"},
    }  # fmt: skip

    def read(data: bytes) -> None:
        found = run_info.parse(data)
        run_info.check_network(found, "here")
        run_info.check_position(found, "here")
        config_lib.from_dict(found["config"], where="here")
        model_card.describe(
            found, dict.fromkeys(("network", "data_licence", "metrics", "how", "signatures"))
        )

    survive(read, info, documents.DocumentError, TrainerError)


def test_statistics(tmp_path: pathlib.Path) -> None:
    line = {"tick": 1, "nimg": 1000, "Timing/sec_per_kimg": {"num": 1, "mean": 2.0, "std": 0.0}}
    path = tmp_path / "stats.jsonl"

    def read(data: bytes) -> None:
        assert isinstance(statsfile._is_later(data, 0), bool)
        path.write_bytes(data.replace(b"\n", b" ") + b"\n")
        shown = watch.Ticks(str(tmp_path)).new()
        assert len(shown) == bool(data)
        assert all(len(each) < 1000 for each in shown)

    survive(read, line)


def test_metrics_of_a_run() -> None:
    line = {"results": {"fid50k_full": 9.5}, "step": 1, "kimg": 1.0}
    survive(lambda data: model_card._parsed(data), line)


def test_card_of_an_export(tmp_path: pathlib.Path) -> None:
    card = {"format": 1, "training": {"step": 1}}
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / versions.LAST).write_bytes(b"")

    def read(data: bytes) -> None:
        (tmp_path / "1" / versions.FIRST).write_bytes(data)
        versions.newest_card(str(tmp_path))

    survive(read, card)


def test_description_of_the_workers() -> None:
    description = {
        "cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]},
        "task": {"type": "worker", "index": 1},
        "environment": "cloud",
    }

    def read(data: bytes) -> None:
        found = cluster.parse("TF_CONFIG", data.decode("utf-8", "surrogateescape"))
        if found is not None:
            assert found.peer(found.index)
            assert found.jobs()

    survive(read, description, ConfigError, cluster.EvaluatorTask)


def test_config(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.yaml"
    (tmp_path / "base.yaml").write_text("run: {seed: 2}")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = config_lib.load(str(path))
        assert config_lib.from_dict(config_lib.to_dict(found)) == found

    document = {
        "base": "base.yaml",
        "run": {"seed": 1, "tpu": "a", "max_hours": 1.5, "jit": "on"},
        "data": {"path": "b", "mirror": True},
        "training": {"group_size": "auto"},
    }
    survive(read, document, TrainerError)


def test_record_of_a_job(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / submit.FOLDER
    folder.mkdir()

    def read(data: bytes) -> None:
        (folder / submit._RECORD).write_bytes(data)
        found = submit._record(str(tmp_path))
        assert found is not None
        assert isinstance(found["name"], str)
        assert isinstance(found.get("endpoint", ""), str)

    survive(read, {"name": "projects/a", "endpoint": "", "job": {}}, TrainerError)


@pytest.mark.parametrize("text", TEXTS)
def test_answer_of_a_service(text: bytes) -> None:
    with pytest.raises(documents.DocumentError):
        documents.parse_object(text)
