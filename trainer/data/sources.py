"""Sources of images: a folder or a zip archive, local or behind any fsspec URL, with labels.

A listing is plain names and small locators, so that 200,000 images fit in little memory and a
worker process can read its share without listing anything again. Archives are hostile input.

What becomes of what is no sound image file:

  counted and named           hidden files and folders, files with other extensions, sockets, pipes
                              and devices, folders of archives and object stores that have content
  lost: an error, or skipped  links to nothing, folders that cannot be listed, links in archives
  a bad image when it is read empty and unreadable files and links to nothing, all with the name
                              of an image
  always an error             a name twice, links to a folder above, names that leave the archive
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import os
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO

from trainer.core import documents, storage
from trainer.core.errors import DataError, StorageError
from trainer.core.text import shorten
from trainer.data import images

LABEL_FILE = "dataset.json"
MAX_CLASSES = 1_000_000
_LONGEST_LABELS = 1 << 30  # bytes; those of ImageNet-21k take half of it

_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True, slots=True)
class Member:
    """The place of a file in a zip archive, and its compression."""

    offset: int
    compressed: int
    size: int
    crc: int
    deflated: bool


class Ignored:
    """Files that are passed over: of each kind how many, and the first few."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._names: dict[str, list[str]] = collections.defaultdict(list)

    @property
    def count(self) -> int:
        """Files of all kinds together."""
        return self._counts.total()

    def add(self, kind: str, name: str) -> None:
        """Counts a file."""
        self._counts[kind] += 1
        if len(self._names[kind]) < _SHOWN:
            self._names[kind].append(name)

    def lines(self) -> list[str]:
        """A line for each kind."""
        return [f"{n} {kind}: {_shown(self._names[kind], n)}" for kind, n in self._counts.items()]


_HIDDEN = "files or folders of the source are hidden"
_OTHER = "files of the source are no images by their names"
_SPECIAL = "files of the source are sockets, pipes or devices"
_FOLDERS = "names in the source end with '/', as those of folders"
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """The images of a folder or archive.

    Attributes:
      path: the folder or archive.
      names: sorted paths of the images in it, with '/' between the parts.
      sizes: bytes of each.
      members: where each lies in the archive; None for a folder.
      ignored: what is passed over.
      lost: by its name, why something that may be or hold images cannot be read.
      labels_member: the label file in the archive, if there is one.
    """

    path: str
    names: list[str]
    sizes: list[int]
    members: list[Member] | None
    ignored: Ignored
    lost: dict[str, str]
    labels_member: Member | None = None

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and, in an archive, checksums."""
        digest = hashlib.sha256()
        for number, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            crc = self.members[number].crc if self.members else 0
            digest.update(f"{name!r} {size} {crc}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_source(path: str) -> Source:
    """Lists the images below `path`.

    Raises:
      DataError: there is none, or the archive is damaged, encrypted, escapes its root, or holds a
        name twice.
    """
    path = storage.resolve(path)
    source = _open_zip(path) if storage.isfile(path) else _open_folder(path)
    if not source.names:
        kinds = [*source.ignored.lines(), *(f"{name}: {why}" for name, why in source.lost.items())]
        raise DataError(
            f"no image in {path} ({source.ignored.count + len(source.lost)} other files); looked "
            f"for {', '.join(images.EXTENSIONS)}" + "".join(f"; {kind}" for kind in kinds[:5])
        )
    return source


def _is_hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part not in {".", ".."})


def _is_image(name: str) -> bool:
    return name.lower().endswith(images.EXTENSIONS)


class _Listing:
    """The files of a source, sorted by what becomes of them."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.ignored = Ignored()
        self.lost: dict[str, str] = {}
        self._hidden: set[str] = set()

    def is_image(self, name: str) -> bool:
        """Whether a file is to be taken; counts what is not."""
        parts = name.split("/")
        hidden = next((n for n, part in enumerate(parts) if _is_hidden(part)), None)
        if hidden is not None:
            # All that lies in a hidden folder counts as one.
            shown = "/".join(parts[: hidden + 1]) + "/" * (hidden + 1 < len(parts))
            if shown not in self._hidden:
                self._hidden.add(shown)
                self.ignored.add(_HIDDEN, shown)
        elif name.endswith("/"):
            self.ignored.add(_FOLDERS, name)
        elif not _is_image(name):
            if name != LABEL_FILE:
                self.ignored.add(_OTHER, name)
        else:
            return True
        return False

    def source(self, path: str, members: dict[str, Member] | None, labels: Member | None) -> Source:
        names = sorted(self.found)
        return Source(
            path=path,
            names=names,
            sizes=[self.found[name] for name in names],
            members=[members[name] for name in names] if members is not None else None,
            ignored=self.ignored,
            lost=self.lost,
            labels_member=labels,
        )


def _open_folder(path: str) -> Source:
    listing = _Listing()
    if storage.is_remote(path):
        files = storage.walk(path, folders=True)
        for name, digest in files.items():
            # The name '' is the folder's own.
            if (name or digest.bytes) and listing.is_image(name or "/"):
                listing.found[name] = digest.bytes
        exists = bool(files) or storage.isdir(path)
    else:
        exists = storage.isdir(path)
        if exists:
            _walk(path, listing)
    if not exists:
        raise DataError(f"no folder or zip archive at {path}; check --source")
    return listing.source(path, None, None)


def _walk(root: str, listing: _Listing) -> None:
    """Lists a folder of this machine; links are followed."""
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        prefix, above = pending.pop()
        folder = os.path.join(root, prefix)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            status = os.stat(folder)
        except OSError as error:
            if not prefix:
                raise DataError(f"cannot list {folder}: {error.strerror}") from error
            listing.lost[prefix] = f"it cannot be listed ({error.strerror})"
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise DataError(f"{folder} is a link to a folder above itself; remove it")
        folders = [_list_entry(f"{prefix}{entry.name}", entry, listing) for entry in entries]
        pending += [(each, (*above, here)) for each in reversed(folders) if each]


def _list_entry(name: str, entry: os.DirEntry[str], listing: _Listing) -> str:
    """Sorts out something in a folder; the prefix of its content if it is a folder to be listed."""
    if _is_hidden(entry.name):
        inside = "/" if entry.is_dir(follow_symlinks=False) else ""
        listing.is_image(f"{name}{inside}")
        return ""
    try:
        status = entry.stat()
    except OSError as error:
        if _is_image(name):
            listing.found[name] = 0  # whoever reads it says what is wrong
        elif entry.is_symlink():
            listing.lost[name] = _link_to_nothing(entry.path) or f"a link: {error.strerror}"
        elif not isinstance(error, FileNotFoundError):  # else it has gone meanwhile
            listing.lost[name] = f"it cannot be looked at ({error.strerror})"
        return ""
    if stat.S_ISDIR(status.st_mode):
        return f"{name}/"
    if not stat.S_ISREG(status.st_mode):
        listing.ignored.add(_SPECIAL, name)
    elif listing.is_image(name):
        listing.found[name] = status.st_size
    return ""


def _link_to_nothing(path: str) -> str:
    """The fault of a link whose target cannot be reached; '' of all else."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    return f"it is a link to {os.readlink(path)}, which is not there"


def _open_zip(path: str) -> Source:
    with storage.open_read(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"{path} is neither a folder nor a readable zip: {error}") from error
    listing = _Listing()
    members: dict[str, Member] = {}
    labels = None
    for info in infos:
        if info.is_dir() and not info.file_size:
            continue
        name = _clean(path, info.filename.rstrip("/")) + "/" * info.is_dir()
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind == stat.S_IFLNK and not any(map(_is_hidden, name.split("/"))):
            listing.lost[name] = "it is a link, which is not followed in an archive"
            continue
        if kind not in {0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}:
            listing.ignored.add(_SPECIAL, name)
            continue
        if name == LABEL_FILE:
            labels = _member(path, info)
        if not listing.is_image(name):
            continue
        if name in members:
            raise DataError(f"{path} holds {name} twice; remove one")
        members[name] = _member(path, info)
        listing.found[name] = members[name].size
    return listing.source(path, members, labels)


def _clean(path: str, name: str) -> str:
    """A member's name, checked as if it were to be unpacked."""
    parts = [part for part in name.replace("\\", "/").split("/") if part != "."]
    if not parts or ":" in parts[0] or "" in parts or ".." in parts:
        raise DataError(f"{path} holds {name!r}, which points out of the archive; pack it again")
    return "/".join(parts)


def _member(path: str, info: zipfile.ZipInfo) -> Member:
    name = info.filename
    if info.flag_bits & 1:
        raise DataError(f"{name} in {path} is encrypted; unpack it first")
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise DataError(
            f"{name} in {path} is compressed by method {info.compress_type}; only stored and "
            "deflated files are read: pack it again"
        )
    return Member(
        offset=info.header_offset,
        compressed=info.compress_size,
        size=info.file_size,
        crc=info.CRC,
        deflated=info.compress_type == zipfile.ZIP_DEFLATED,
    )


class Reader:
    """Reads the images of one source; each worker process has its own.

    Args:
      path: `Source.path`.

    Attributes:
      remote: whether it is on another machine; then several threads may read at once.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.remote = storage.is_remote(path)
        self._archive: IO[bytes] | None = None

    def read(self, name: str, member: Member | None) -> bytes:
        """The bytes of a file.

        Raises:
          DataError: with the reason alone; the caller knows the name.
          StorageError: an object store does not give it: that is not the image's fault.
        """
        if self.remote:
            return self._read_remote(name, member)
        try:
            if member is None:
                with storage.open_read(storage.join(self._path, *name.split("/"))) as file:
                    return file.read(images.MAX_BYTES + 1)  # one more: `images` refuses it then
            if self._archive is None:
                self._archive = storage.open_read(self._path)
            return _read_member(self._archive, member)
        except (OSError, ValueError, StorageError) as error:
            where = self._path if member else storage.join(self._path, *name.split("/"))
            why = _link_to_nothing(where) or f"it cannot be read ({error})"
            raise DataError(why) from error

    def _read_remote(self, name: str, member: Member | None) -> bytes:
        """The same in one request, mostly."""
        if member is None:
            where = f"{self._path.rstrip('/')}/{name}"  # a part of it may be empty
            return storage.read_range(where, 0, images.MAX_BYTES + 1)
        # How long the header is, it says itself; twice as long as is usual will do.
        length = _LOCAL_HEADER.size + 2 * len(name.encode(errors="surrogateescape")) + 256
        if member.compressed <= images.MAX_BYTES:
            length += member.compressed
        data = storage.read_range(self._path, member.offset, length)
        if len(data) >= _LOCAL_HEADER.size:
            extra = sum(_LOCAL_HEADER.unpack_from(data)[1:])
            missing = _LOCAL_HEADER.size + extra + member.compressed - len(data)
            if 0 < missing <= 2 * 0xFFFF:
                data += storage.read_range(self._path, member.offset + len(data), missing)
        return _read_member(io.BytesIO(data), dataclasses.replace(member, offset=0))


def _read_member(archive: IO[bytes], member: Member) -> bytes:
    """Reads no more than the member says it has, whatever it unpacks to."""
    if member.size > images.MAX_BYTES or member.compressed > images.MAX_BYTES:
        raise DataError(f"it has {member.size} bytes; the limit is {images.MAX_BYTES}")
    archive.seek(member.offset)
    header = archive.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise DataError("its header in the archive is damaged")
    archive.seek(sum(_LOCAL_HEADER.unpack(header)[1:]), os.SEEK_CUR)
    data = archive.read(member.compressed)
    if member.deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except zlib.error as error:
            raise DataError(f"it cannot be unpacked: {error}") from error
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise DataError("its size or checksum in the archive is wrong")
    return data


@dataclass(frozen=True)
class Labels:
    """Class numbers for every image of a source, in the order of its names; -1 without labels."""

    numbers: list[int]
    names: list[str]


def read_labels(source: Source, labels: str) -> Labels:
    """The classes of a source's images.

    Args:
      source: the images.
      labels: 'none'; 'folders' (the class is the folder a file lies in); the path of a JSON in
        NVIDIA's form, {"labels": [["a/b.png", 3], ...]}; or 'auto': the source's own dataset.json
        if it has one, else none.

    Raises:
      DataError: the JSON is wrong, names a file that is absent or one twice, or misses one.
    """
    if labels == "none":
        return Labels([-1] * len(source.names), [])
    if labels == "folders":
        return _labels_from_folders(source)
    text, where = _label_text(source, labels)
    if text is None:
        return Labels([-1] * len(source.names), [])
    return _labels_from_json(source, text, where, required=labels != "auto")


def _labels_from_folders(source: Source) -> Labels:
    # A folder's name may be empty on Cloud Storage, as in gs://bucket/photos//cats/1.png.
    folders = ["/".join(filter(None, name.split("/")[:-1])) for name in source.names]
    if "" in folders:
        name = source.names[folders.index("")]
        raise DataError(f"{name} in {source.path} lies in no folder, so it has no class")
    names = sorted(set(folders))
    number = {name: index for index, name in enumerate(names)}
    return Labels([number[folder] for folder in folders], names)


def _label_text(source: Source, labels: str) -> tuple[bytes | None, str]:
    if labels != "auto":
        where = storage.resolve(labels)
        if not storage.isfile(where):
            raise DataError(
                f"no label file at {where}; --labels is auto, none, folders or a JSON's path"
            )
        return storage.read_range(where, 0, _LONGEST_LABELS + 1), where
    where = storage.join(source.path, LABEL_FILE)
    if source.members is not None:
        if source.labels_member is None:
            return None, where
        return Reader(source.path).read(LABEL_FILE, source.labels_member), where
    if not storage.isfile(where):
        return None, where
    return storage.read_range(where, 0, _LONGEST_LABELS + 1), where


def _labels_from_json(source: Source, text: bytes, where: str, *, required: bool) -> Labels:
    try:
        document = documents.parse_json(text, _LONGEST_LABELS)
    except documents.DocumentError as error:
        raise DataError(
            f"{where} is not the JSON of labels: {error}; put it right, or convert with --labels=none"
        ) from None
    entries = document.get("labels") if isinstance(document, dict) else None
    if entries is None and not required:
        return Labels([-1] * len(source.names), [])
    if not isinstance(entries, list):
        raise DataError(f'{where} has no list of labels; write {{"labels": [["a.png", 0], ...]}}')
    given: dict[str, int] = {}
    for entry in entries:
        name, number = _label_entry(entry, where)
        if name in given:
            raise DataError(f"{where} names {shorten(name)} twice")
        given[name] = number
    known = set(source.names)
    absent = [name for name in given if name not in known]
    if absent:
        raise DataError(f"{where} names {_few(absent)} absent from {source.path}")
    missing = [name for name in source.names if name not in given]
    if missing:
        raise DataError(f"{where} has no label for {_few(missing)} of {source.path}")
    numbers = [given[name] for name in source.names]
    return Labels(numbers, [str(number) for number in range(max(numbers) + 1)])


def _label_entry(entry: object, where: str) -> tuple[str, int]:
    if (
        not isinstance(entry, list)
        or len(entry) != 2
        or not isinstance(entry[0], str)
        or type(entry[1]) is not int
        or not 0 <= entry[1] < MAX_CLASSES
    ):
        shown = json.dumps(entry)[:100]
        raise DataError(f"{where}: {shown} is not a file's name and its class number, from 0 on")
    return entry[0], entry[1]


def _few(names: list[str]) -> str:
    return f"{len(names)} files ({_shown(names[:_SHOWN], len(names))})"


def _shown(names: list[str], count: int) -> str:
    """The first of `count` names, fit for a terminal."""
    return ", ".join(map(shorten, names)) + (", ..." if count > len(names) else "")
