"""What an exported network says of itself."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.serving.test_rendering import make_network
from trainer import config as config_lib
from trainer.serving import model_card, saved_model
from trainer.serving.rendering import Renderer
from trainer.serving.signatures import Served
from trainer.telemetry import images as grids


def line(step: int, **results: float) -> str:
    return json.dumps({"results": results, "step": step, "kimg": step / 100})


def test_metrics_are_those_of_the_checkpoint(tmp_path: pathlib.Path) -> None:
    """The last of each until its step: never of a later network."""
    (tmp_path / "metric-fid50k_full.jsonl").write_text(
        "\n".join([line(300, fid50k_full=9.5), line(100, fid50k_full=20), line(900, fid50k_full=5)])
    )
    (tmp_path / "metric-kid.jsonl").write_text(line(700, kid=0.1))
    (tmp_path / "stats.jsonl").write_text(line(100, other=1))
    assert model_card.metrics(str(tmp_path), 600) == [
        {"results": {"fid50k_full": 9.5}, "step": 300, "kimg": 3.0}
    ]
    assert len(model_card.metrics(str(tmp_path), 900)) == 2
    assert model_card.metrics(str(tmp_path), 50) == []


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: pathlib.Path) -> None:
    lines = ["", "{", "[]", '{"results": 3, "step": 1, "kimg": 1}', '{"results": {"a": 1}}']
    lines += ['{"results": {"a": 1}, "step": "x", "kimg": 1}', line(5, fid=7), '{"results": {"f']
    (tmp_path / "metric-fid.jsonl").write_text("\n".join(lines))
    assert model_card.metrics(str(tmp_path), 9) == [
        {"results": {"fid": 7}, "step": 5, "kimg": 0.05}
    ]
    assert model_card.metrics(str(tmp_path / "none"), 9) == []
    assert model_card.metrics("", 9) == []


def make(counts: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    info = {
        "step": 12,
        "kimg": 0.192,
        "images": 192,
        "config": config_lib.to_dict(config_lib.from_dict({"data": {"path": "gs://b/cats"}})),
        "config_fingerprint": "c0ffee",
        "data_fingerprint": "facade",
        "label_names": ["cat", "dog"] if counts else [],
        "label_counts": list(counts),
    }
    network = {"resolution": [16, 32], "channels": 3, "z_dim": 8, "c_dim": len(counts)}
    network |= {"family": "some", "truncates": True}
    check = {"max_difference": 1, "mean_difference": 0.01, "load_seconds": 2.5}
    export = {
        "network": network | {"parameters": 123456},
        "signatures": {
            "serving_default": {
                "inputs": {"z": {"dtype": "float32", "shape": [None, None]}},
                "outputs": {"images": {"dtype": "uint8", "shape": [None, 16, 32, 3]}},
            },
            "png": {
                "inputs": {"z": {"dtype": "float32", "shape": [None, None]}},
                "outputs": {"image_bytes": {"dtype": "string", "shape": [None]}},
            },
        },
        "metrics": [{"results": {"fid50k_full": 9.53}, "step": 10, "kimg": 0.16}],
        "data_licence": "",
        "how": {
            "time": "2026-01-02",
            "trainer": "0.1",
            "tensorflow": "2.21",
            "precision": "float32",
            "jit": "off",
            "check": check,
        },
    }
    return model_card.describe(info, export | changes)


def run_snippet(text: str, path: str) -> dict[str, Any]:
    """What the card's Python leaves; it must call `serving_default` with every input it has."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    values: dict[str, Any] = {}
    exec(code.replace('load(".")', f'load("{path}")'), values)
    given = re.findall(r"^    (\w+)=", code, re.MULTILINE)
    inputs = values["model"].signatures["serving_default"].structured_input_signature[1]
    assert sorted(given) == sorted(inputs)
    (shape,) = re.findall(r'\["images"\]\.numpy\(\)  # uint8 \[2, (.*)\]', code)
    assert ", ".join(map(str, values["images"].shape[1:])) == shape
    return values


@pytest.mark.parametrize("classes", [0, 4])
def test_the_call_in_the_card_can_be_copied(classes: int, tmp_path: pathlib.Path) -> None:
    """The call names all inputs, and renders what `generate` renders of the same seeds by default."""
    network, params = make_network(c_dim=classes)
    arrays = {name: value.numpy() for name, value in params.items()}
    served = Served(network, arrays)
    saved_model._save(served, str(tmp_path))
    facts = saved_model._facts("some", network, arrays)
    card = make((1,) * classes, network=facts, signatures=saved_model._specs(served))
    card["data"]["label_names"] = []
    values = run_snippet(model_card.text(card), str(tmp_path))
    label = {"label": tf.constant([0], tf.int64)} if classes else {}
    seeds, psi = tf.constant([1, 2], tf.int64), tf.constant([0.7])
    wanted = served.generate(seed=seeds, truncation_psi=psi, **label)["images"].numpy()
    assert values["images"].dtype == np.uint8
    assert np.abs(values["images"].astype(int) - wanted).max() <= 1
    renderer = Renderer(network, params).truncated(0.7)
    (image,) = renderer.images([1], [0 if classes else -1])
    assert np.abs(grids.to_uint8(values["image"].numpy())[0].astype(int) - image).max() <= 1


def test_people_are_told_the_facts() -> None:
    text = model_card.text(make((5, 3), data_licence="CC BY 4.0"))
    for fact in (
        "32x16x3",
        "0.192 thousand images (step 12)",
        "123,456 parameters",
        "2 classes (cat, dog)",
        "gs://b/cats",
        "`facade`",
        "licence: CC BY 4.0",
        "| fid50k_full | 9.53 | 0.16 |",
        "at most 1 and on average 0.01 of 255",
        "| `z` | float32 | [N, z_dim or 0] |",
        "| -> `image_bytes` | string | [N] |",
        "c0ffee",
        "channel_max: 512",
    ):
        assert fact in text, fact


def test_people_are_told_what_is_not_known() -> None:
    text = model_card.text(make(metrics=[]))
    assert "licence: not given" in text
    assert "None is known." in text
    assert "no classes" in text
    assert "label" not in text.partition("## Signatures")[0]


HOSTILE = "x`y|z</td><script>alert(1)</script> [a](javascript:b)\n# Free\u202e\x1b[2J"


def test_what_others_wrote_is_text_in_the_card(tmp_path: pathlib.Path) -> None:
    card = make((5, 3), data_licence=HOSTILE)
    card["data"] |= {"path": HOSTILE, "fingerprint": HOSTILE, "label_names": [HOSTILE, "dog"]}
    card["training"]["config_fingerprint"] = HOSTILE
    card["training"]["config"]["data"]["path"] = "```\n" + HOSTILE
    card["metrics"] = [{"results": {HOSTILE: 1.0}, "step": 1, "kimg": 1.0}]
    text, plain = model_card.text(card), model_card.text(make((5, 3)))
    assert not set("\x1b\u202e") & set(text)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    fence = next(line for line in text.splitlines() if line.endswith("yaml")).removesuffix("yaml")
    assert text.count(f"\n{fence}\n") == 1  # nothing closes the config's block but its end
    # Outside of code nothing is HTML; in a table no cell ends early.
    outside = re.sub(r"(`+)[^\n]*?[^`\n]\1(?!`)", "", text.partition(f"{fence}yaml")[0])
    assert "<script" not in outside
    cells = next(line for line in text.splitlines() if line.endswith("| 1 | 1 |"))
    assert len(re.findall(r"(?<!\\)\|", cells)) == 4

    model_card.write(str(tmp_path), card, name="model_card.json")
    document = (tmp_path / "model_card.json").read_text()
    assert "<" not in document
    assert document.isascii()
    assert json.loads(document)["data"]["licence"] == HOSTILE


@pytest.mark.parametrize("licence", ["", "CC0"])
def test_programs_are_told_the_same(licence: str) -> None:
    card = json.loads(json.dumps(make((5, 3), data_licence=licence)))
    assert card["format"] == 1
    assert card["training"]["kimg"] == 0.192
    assert config_lib.from_dict(card["training"]["config"], where="here").data.path == "gs://b/cats"
    assert card["data"]["fingerprint"] == "facade"
    assert card["data"]["licence"] == (licence or None)
    assert card["metrics"][0]["results"] == {"fid50k_full": 9.53}


def test_files_are_listed_with_what_they_are(tmp_path: pathlib.Path) -> None:
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"123456789")
    (tmp_path / "variables" / "variables.index").write_bytes(b"")
    model_card.write(str(tmp_path), make(), name="model_card.json")
    files = json.loads((tmp_path / "model_card.json").read_text())["files"]
    assert set(files) == {"MODEL_CARD.md", "saved_model.pb", "variables/variables.index"}
    assert files["saved_model.pb"] == {"bytes": 9, "crc32c": 0xE3069283}
    assert files["MODEL_CARD.md"]["bytes"] == (tmp_path / "MODEL_CARD.md").stat().st_size
