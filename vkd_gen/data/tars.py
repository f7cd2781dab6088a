"""Webdataset tars: archives whose members of one name are one sample, such as `000.jpg` and `000.txt`.

Nothing is unpacked, and nothing but images, text and JSON is read.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vkd_gen.data.captions import CAPTION_NAMES
from vkd_gen.data.decoding import image_suffixes
from vkd_gen.text import printable, reason

TAR = ".tar"
IMAGE, CAPTION = "image", "caption"
"""Columns of the tables that tars are read as."""
NUM_LOOKED_AT = 20
"""Samples that are looked at to find the captions."""
LONGEST_TEXT = 2**24
"""Bytes of a member with text."""


class Tar(NamedTuple):
    """An archive; size and time of change tell it from an older one."""

    path: str
    size: int
    changed: int


def tars_as_table(paths: Sequence[Path], field: str | None, *, streaming: bool) -> Any:
    """Tars as datasets' Dataset, which has a copy of them, or as IterableDataset, which has not.

    Args:
        paths: of the archives.
        field: see `caption_field`; None for no captions.
        streaming: see `open_source`.
    """
    import datasets

    captions = {CAPTION: [datasets.Value("string")]} if field else {}
    features = datasets.Features({IMAGE: datasets.Image(decode=False), **captions})
    tars = [Tar(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    make = datasets.IterableDataset if streaming else datasets.Dataset
    return make.from_generator(read_tars, features=features, gen_kwargs={"tars": tars, "field": field})


def read_tars(tars: Sequence[Tar], field: str | None) -> Iterator[dict[str, Any]]:
    """The samples of tars in their order: `image`, bytes and name, and `caption`, a list, or None.

    Args:
        tars: to read.
        field: see `caption_field`.

    Raises:
        ValueError: in one line, for an archive, or text in it, that cannot be read.
    """
    for tar in tars:
        for key, members in _samples(tar.path):
            images = sorted(end for end in members if f".{end}" in image_suffixes())
            if len(images) > 1:
                raise ValueError(
                    f"{printable(tar.path)} has several images called {printable(key)}, {' and '.join(images)}: "
                    "take one of them elsewhere"
                )
            row: dict[str, Any] = {IMAGE: {"bytes": members[images[0]], "path": None} if images else None}
            if field:
                row[CAPTION] = _caption(members, field, f"{printable(key)} in {printable(tar.path)}")
            yield row


def _samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name of each sample, and its members by the ends of their names; what follows the first dot is the end."""
    key, members = "", dict[str, bytes]()
    wanted = {end[1:] for end in image_suffixes()}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                stem, _, end = place.name.partition(".")
                if not (member.isfile() and stem and end):  # folders, links, what macOS leaves
                    continue
                name = str(place.parent / stem)
                if name != key and members:
                    yield key, members
                    members = {}
                key = name
                if (end := end.lower()) in wanted or member.size <= LONGEST_TEXT:
                    opened = archive.extractfile(member)
                    content = opened.read() if opened else b""
                    if len(content) < member.size:
                        raise ValueError(f"{member.name} is cut off")
                    members[end] = content
            archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header for the end
            if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
                raise ValueError(f"it is damaged behind byte {archive.offset:,}")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"cannot read {printable(path)}: {reason(error)}") from error
    if members:
        yield key, members


def _caption(members: dict[str, bytes], field: str, name: str) -> list[str] | None:
    """The captions of a sample: of a member, or of the key of its `.json`."""
    if field in members:
        return [_text(members[field], f"{name}, .{field}").strip()]
    found = _json(members, name).get(field)
    values = found if isinstance(found, list) else [] if found is None else [found]
    for value in values:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}, .json: {field!r} is of type {type(value).__name__}, not text")
    return values


def _json(members: dict[str, bytes], name: str) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        found = json.loads(_text(members["json"], f"{name}, .json"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read {name}: its .json is no JSON") from error
    return found if isinstance(found, dict) else {}


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {name}: it is not UTF-8") from error


def caption_field(path: Path, wanted: str | None) -> str:
    """End of a member's name, or key in `.json`, that holds the captions of tars.

    Args:
        path: of one of them, whose first samples are looked at.
        wanted: the field; by default `txt`, else a key that is called caption, text, prompt, ...

    Raises:
        ValueError: in one line, for a field that there is not, none, or several to choose from.
    """
    ends: dict[str, None] = {}
    keys: dict[str, None] = {}
    for key, members in islice(_samples(str(path)), NUM_LOOKED_AT):
        ends |= dict.fromkeys(members)
        keys |= dict.fromkeys(_json(members, f"{printable(key)} in {printable(path)}"))
    there = f"(its samples have {', '.join(map(printable, [*(f'.{end}' for end in ends), *keys]))})"
    if wanted is not None:
        if wanted in ends or wanted in keys:
            return wanted
        raise ValueError(f"{printable(path)} has no {wanted!r} for captions {there}")
    called = ["txt"] if "txt" in ends else [name for name in [*ends, *keys] if name.lower() in CAPTION_NAMES]
    if len(called) != 1:
        raise ValueError(
            f"{printable(path)} has {len(called)} fields called as captions are; name one by --caption_column {there}"
        )
    return called[0]


def is_tar(path: Path) -> bool:
    """Whether a file begins as an archive does."""
    try:
        with path.open("rb") as file:
            return tarfile.is_tarfile(io.BytesIO(file.read(tarfile.RECORDSIZE)))
    except OSError:
        return False
