"""Folders, archives and labels, hostile ones among them."""

from __future__ import annotations

import json
import os
import struct
import zipfile

import fsspec
import pytest

from trainer.core.errors import DataError
from trainer.data import images, sources


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for name in ["b/2.png", "a/1.JPG", "a/deep/3.webp", "a/.hidden.png", ".git/x.png", "notes.txt"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def archive(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members:
            file.writestr(name, content)
    return str(path)


def test_a_folder_is_listed_in_order_without_what_is_hidden_or_no_image(folder):
    source = sources.open_source(str(folder))
    assert source.names == ["a/1.JPG", "a/deep/3.webp", "b/2.png"]
    assert source.ignored.count == 3
    assert source.ignored.lines() == [
        "2 files or folders of the source are hidden: .git/, a/.hidden.png",
        "1 files of the source are no images by their names: notes.txt",
    ]
    assert sources.Reader(source.path).read("b/2.png", None) == b"b/2.png"


def test_a_remote_folder_is_listed_the_same(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/photos/", recursive=True)
    try:
        source = sources.open_source("memory://photos")
        assert source.names == ["a/1.JPG", "a/deep/3.webp", "b/2.png"]
        assert source.sizes == sources.open_source(str(folder)).sizes
        assert source.ignored.lines() == sources.open_source(str(folder)).ignored.lines()
        assert sources.Reader(source.path).read("b/2.png", None) == b"b/2.png"
    finally:
        memory.rm("/photos", recursive=True)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_reads_like_a_folder(tmp_path, method):
    members = [("b.png", b"x" * 5000), ("./a/c.jpg", b"short"), ("__MACOSX/d.png", b""), ("e", b"")]
    source = sources.open_source(archive(tmp_path / "s.zip", members, compression=method))
    assert source.names == ["a/c.jpg", "b.png"] and source.ignored.count == 2
    assert source.members is not None
    reader = sources.Reader(source.path)
    assert [
        reader.read(name, member) for name, member in zip(source.names, source.members, strict=True)
    ] == [b"short", b"x" * 5000]


def test_the_fingerprint_knows_names_sizes_and_checksums(tmp_path):
    prints = {
        sources.open_source(archive(tmp_path / f"{n}.zip", members)).fingerprint()
        for n, members in enumerate(
            [[("a.png", b"1")], [("b.png", b"1")], [("a.png", b"2")], [("a.png", b"12")]]
        )
    }
    assert len(prints) == 4


def test_an_absent_or_empty_source(tmp_path):
    with pytest.raises(DataError, match="no folder or zip archive"):
        sources.open_source(str(tmp_path / "absent"))
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=r"no image in .*\(1 other files\)"):
        sources.open_source(str(tmp_path))
    with pytest.raises(DataError, match="neither a folder nor a readable zip"):
        sources.open_source(str(tmp_path / "readme.txt"))


def test_a_link_to_a_folder_above_is_an_error_not_a_loop(folder):
    os.symlink(folder, folder / "a" / "again")
    with pytest.raises(DataError, match="link to a folder above"):
        sources.open_source(str(folder))


def test_links_to_nothing_are_errors_or_named(folder, tmp_path):
    """To an image, to a folder, to itself."""
    for name in ("a/4.png", "class1", "b/loop.png", "loop", ".old"):
        target = name.rpartition("/")[2] if "loop" in name else tmp_path / "gone" / name
        os.symlink(target, folder / name)
    source = sources.open_source(str(folder))
    assert source.names == ["a/1.JPG", "a/4.png", "a/deep/3.webp", "b/2.png", "b/loop.png"]
    assert source.lost == {
        "class1": f"it is a link to {tmp_path}/gone/class1, which is not there",
        "loop": "it is a link to loop, which is not there",
    }
    for name in ("a/4.png", "b/loop.png"):
        with pytest.raises(DataError, match="it is a link to .*, which is not there"):
            sources.Reader(source.path).read(name, None)
    assert source.ignored.count == 4


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = sources.open_source(str(folder))
    assert source.names == ["a/1.JPG", "b/2.png"]
    assert source.lost == {"a/deep/": "it cannot be listed (Permission denied)"}


def test_pipes_and_sockets_are_counted_and_not_opened(folder):
    os.mkfifo(folder / "a" / "pipe.png")
    os.symlink("pipe.png", folder / "a" / "link.png")
    os.symlink("/dev/null", folder / "device.png")
    source = sources.open_source(str(folder))
    assert len(source.names) == 3
    special = (
        "3 files of the source are sockets, pipes or devices: device.png, a/link.png, a/pipe.png"
    )
    assert special in source.ignored.lines()


def test_what_an_archive_holds_besides_images_is_counted(tmp_path):
    def entry(name: str, mode: int) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        return info

    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", b"1")
        file.writestr(entry("class1", 0o120777), "../elsewhere")
        file.writestr(entry("pipe.png", 0o010644), b"")
        file.writestr("folder/", b"")
        file.writestr("odd.png/", b"content")
        file.writestr("readme\x1b[2J.txt", b"")
    source = sources.open_source(str(path))
    assert source.names == ["a.png"]
    assert source.lost == {"class1": "it is a link, which is not followed in an archive"}
    assert source.ignored.lines() == [
        "1 files of the source are sockets, pipes or devices: pipe.png",
        "1 names in the source end with '/', as those of folders: odd.png/",
        "1 files of the source are no images by their names: readme\\x1b[2J.txt",
    ]


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "x/../../a.png", "C:/a.png", "..\\a.png", "a//b.png"]
)
def test_a_name_that_leaves_the_archive_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="points out of the archive"):
        sources.open_source(archive(tmp_path / "s.zip", [(name, b"")]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["a.png", "./a.png"])
def test_duplicate_names_are_refused(tmp_path, twin):
    with pytest.raises(DataError, match=r"holds a\.png twice"):
        sources.open_source(archive(tmp_path / "s.zip", [("a.png", b"1"), (twin, b"2")]))


def test_an_encrypted_member_is_refused(tmp_path):
    path = tmp_path / "s.zip"
    archive(path, [("a.png", b"1")])
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png in .* is encrypted"):
        sources.open_source(str(path))


def test_an_unknown_compression_is_refused(tmp_path):
    path = archive(tmp_path / "s.zip", [("a.png", b"1")], compression=zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match="compressed by method 14"):
        sources.open_source(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10_000)
    members = [("honest.png", bytes(20_000)), ("liar.png", bytes(20_000))]
    path = tmp_path / "s.zip"
    archive(path, members, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", 5_000)  # says it is small
    path.write_bytes(content)
    source = sources.open_source(str(path))
    assert source.members is not None
    reader = sources.Reader(source.path)
    with pytest.raises(DataError, match="20000 bytes; the limit is 10000"):
        reader.read("honest.png", source.members[0])
    with pytest.raises(DataError, match="size or checksum"):
        reader.read("liar.png", source.members[1])


@pytest.mark.parametrize("place", [0, 40])
def test_a_damaged_member_is_an_error(tmp_path, place):
    path = tmp_path / "s.zip"
    archive(path, [("a.png", bytes(range(100)))])
    source = sources.open_source(str(path))
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    assert source.members is not None
    with pytest.raises(DataError, match="damaged|checksum"):
        sources.Reader(source.path).read("a.png", source.members[0])


def test_labels_from_folders(folder):
    labels = sources.read_labels(sources.open_source(str(folder)), "folders")
    assert labels == sources.Labels([0, 1, 2], ["a", "a/deep", "b"])
    (folder / "top.png").touch()
    with pytest.raises(DataError, match=r"top\.png .* lies in no folder"):
        sources.read_labels(sources.open_source(str(folder)), "folders")


NAMES = ["a/1.JPG", "a/deep/3.webp", "b/2.png"]


def test_labels_from_json_in_the_source_or_elsewhere(folder, tmp_path):
    document = json.dumps({"labels": [[NAMES[2], 3], [NAMES[0], 0], [NAMES[1], 3]]})
    (tmp_path / "elsewhere.json").write_text(document)
    source = sources.open_source(str(folder))
    expected = sources.Labels([0, 3, 3], ["0", "1", "2", "3"])
    assert sources.read_labels(source, str(tmp_path / "elsewhere.json")) == expected
    assert sources.read_labels(source, "auto").names == []
    (folder / "dataset.json").write_text(document)
    assert sources.read_labels(source, "auto") == expected
    assert sources.read_labels(source, "none") == sources.Labels([-1] * 3, [])


def test_labels_inside_an_archive(tmp_path):
    members = [("a.png", b""), ("dataset.json", b'{"labels": [["a.png", 1]]}')]
    source = sources.open_source(archive(tmp_path / "s.zip", members))
    assert sources.read_labels(source, "auto") == sources.Labels([1], ["0", "1"])


def test_null_labels_are_none(folder):
    (folder / "dataset.json").write_text('{"labels": null}')
    source = sources.open_source(str(folder))
    assert sources.read_labels(source, "auto").names == []
    with pytest.raises(DataError, match="no list of labels"):
        sources.read_labels(source, str(folder / "dataset.json"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[n, 0] for n in [*NAMES, "x.png", "y.png"]], r"names 2 files \(x.png, y.png\) absent"),
        ([[n, 0] for n in NAMES[:2]], r"no label for 1 files \(b/2.png\)"),
        ([[n, 0] for n in [*NAMES, NAMES[0]]], "names a/1.JPG twice"),
        ([[n, 1.5] for n in NAMES], "class number"),
        ([[n, True] for n in NAMES], "class number"),
        ([[n, -1] for n in NAMES], "class number"),
        ([[n, 10**9] for n in NAMES], "class number"),
        ([[n, [0.0, 1.0]] for n in NAMES], "class number"),
        ([NAMES], "class number"),
        ({"a": 1}, "no list of labels"),
    ],
)
def test_wrong_label_files_are_refused(folder, labels, message):
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": labels}))
    with pytest.raises(DataError, match=message):
        sources.read_labels(sources.open_source(str(folder)), "auto")


def test_a_label_file_that_is_absent_or_no_json(folder):
    source = sources.open_source(str(folder))
    with pytest.raises(DataError, match="no label file at"):
        sources.read_labels(source, "folder")
    with pytest.raises(DataError, match="is not JSON"):
        sources.read_labels(source, str(folder / "notes.txt"))
