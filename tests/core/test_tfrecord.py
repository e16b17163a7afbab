"""TFRecord frames, held against TensorFlow's own."""

from __future__ import annotations

import io

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from trainer.core import tfrecord
from trainer.core.errors import DataError


def test_the_reader_reads_what_tensorflow_wrote(tmp_path):
    path = str(tmp_path / "shard")
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(b"one")
        writer.write(b"two")
    with open(path, "rb") as file:
        assert list(tfrecord.read_records(file)) == [b"one", b"two"]


@given(st.data())
def test_any_changed_byte_is_noticed(draw):
    payloads = [b"first", b"second record"]
    content = bytearray(b"".join(tfrecord.frame(payload) for payload in payloads))
    place = draw.draw(st.integers(0, len(content) - 1))
    content[place] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        list(tfrecord.read_records(io.BytesIO(content)))


@given(st.integers(1, 55))
def test_any_cut_inside_a_record_is_noticed(cut):
    content = tfrecord.frame(b"first") + tfrecord.frame(b"second record")
    assert len(content) == 50
    with_cut = content[: max(0, len(content) - cut)]
    if len(with_cut) in {0, len(tfrecord.frame(b"first"))}:
        assert len(list(tfrecord.read_records(io.BytesIO(with_cut)))) < 2
    else:
        with pytest.raises(DataError, match="ends in the middle"):
            list(tfrecord.read_records(io.BytesIO(with_cut)))


def scanned(content: bytes) -> tuple[list[bytes | str], list[int]]:
    """What is found, and where it starts."""
    found = tfrecord.scan_records(content)
    return [each for _, each in found], [start for start, _ in found]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.data())
def test_behind_a_damaged_payload_the_records_are_found(payloads, draw):
    frames = [bytearray(tfrecord.frame(payload)) for payload in payloads]
    bad = draw.draw(st.integers(0, len(frames) - 1))
    place = draw.draw(st.integers(0, len(frames[bad]) - 1))
    frames[bad][place] ^= draw.draw(st.integers(1, 255))
    found, starts = scanned(b"".join(frames))
    assert starts == [sum(map(len, frames[:n])) for n in range(len(found))]
    if place < 12:
        assert found == [*payloads[:bad], "its length is damaged"]
    else:
        assert found == [*payloads[:bad], "its checksum is wrong", *payloads[bad + 1 :]]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.integers(1, 15))
def test_a_run_that_is_cut_says_so(payloads, cut):
    content = b"".join(tfrecord.frame(payload) for payload in payloads)
    found, _ = scanned(content[:-cut])
    assert found == [*payloads[:-1], "the file ends in the middle of it"]
    assert scanned(content)[0] == payloads
