"""The record format, held against TensorFlow's own reader and messages."""

from __future__ import annotations

import io

import google_crc32c
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from trainer.core import tfrecord
from trainer.data import images, records


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=200),
        st.binary(max_size=300) | st.integers(-(2**63), 2**63 - 1),
        max_size=8,
    )
)
def test_examples_are_what_protocol_buffers_read(features):
    example = tf.train.Example.FromString(records.encode_example(features))
    found = {
        key: (value.bytes_list.value or value.int64_list.value)[0]
        for key, value in example.features.feature.items()
    }
    assert found == features


def test_a_record_has_the_documented_features():
    image = images.EncodedImage(b"bytes", "jpeg", 4, 6, 3, True, False, False)
    payload = records.encode_record(image, -1, "a/b.jpg")
    parsed = tf.io.parse_single_example(
        payload,
        {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            "image/format": tf.io.FixedLenFeature([], tf.string),
            "image/height": tf.io.FixedLenFeature([], tf.int64),
            "image/width": tf.io.FixedLenFeature([], tf.int64),
            "image/class/label": tf.io.FixedLenFeature([], tf.int64),
            "image/source": tf.io.FixedLenFeature([], tf.string),
        },
    )
    assert {key: value.numpy() for key, value in parsed.items()} == {
        "image/encoded": b"bytes",
        "image/format": b"jpeg",
        "image/height": 4,
        "image/width": 6,
        "image/class/label": -1,
        "image/source": b"a/b.jpg",
    }


def test_tensorflow_reads_what_the_writer_wrote(tmp_path):
    payloads = [b"", b"x", bytes(1000), b"last"]
    path = tmp_path / "shard"
    with path.open("wb") as file:
        writer = records.ShardWriter(file)
        for payload in payloads:
            writer.write(payload)
    assert [p.numpy() for p in tf.data.TFRecordDataset(str(path))] == payloads
    content = path.read_bytes()
    assert writer.bytes == len(content)
    assert writer.crc32c == google_crc32c.value(content)
    for number, offset in enumerate(writer.offsets):
        assert list(tfrecord.read_records(io.BytesIO(content), offset)) == payloads[number:]
