"""Captions of every kind of source, and what becomes of images without."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sources import encoded, grey_levels, image_table, load, save_greys
from vkd_gen.data.captions import choose_caption_column, collect_captions, usable_captions
from vkd_gen.data.images import ImageSpec, data_facts, evenly_spaced, told_of
from vkd_gen.data.streaming import Position, stream_images

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("datasets_cache")

NUMBERS = range(10, 22)


def caption(number):
    return f"a picture of {number}, “größe”"


def captioned_table(columns=None, numbers=NUMBERS):
    """Image `number` is of that grey level and has that in its caption."""
    table = image_table(list(numbers))
    for name, cells in (columns or {"text": list(map(caption, numbers))}).items():
        table = table.add_column(name, cells)
    return table


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def row(number, text=None, folder=""):
    return {"file_name": f"{folder}{number:03}.png", "text": caption(number) if text is None else text}


def sidecars(folder, numbers=NUMBERS):
    for number in numbers:
        (folder / f"{number:03}.txt").write_text(f"{caption(number)}\n", encoding="utf-8")


def parts_of(folder, **options):
    return load(folder, channels=1, with_captions=True, **options)


def pairs(parts):
    """Grey level and captions of each image."""
    found = [(level, images.captions_of(i)) for images in parts for i, level in enumerate(grey_levels(images))]
    return dict(sorted(found))


EXPECTED = {number: (caption(number),) for number in NUMBERS}


# ---- sources


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved splits", "several"])
def test_tables(kind, tmp_path):
    expected = EXPECTED
    if kind == "parquet":
        captioned_table().to_parquet(tmp_path / "a.parquet")
    elif kind == "saved":
        captioned_table().save_to_disk(tmp_path / "a")
    elif kind == "saved splits":
        table = captioned_table()
        splits = datasets.DatasetDict(train=table.select(range(10)), test=table.select(range(10, 12)))
        splits.save_to_disk(tmp_path)
    else:
        several = [[caption(number), "", f"again {number}", None] for number in NUMBERS]
        captioned_table({"captions": several}).to_parquet(tmp_path / "a.parquet")
        expected = {number: (caption(number), f"again {number}") for number in NUMBERS}
    parts = parts_of(tmp_path)
    assert pairs(parts) == expected
    assert "captions are the column" in " ".join(told_of(*parts))


def test_types_of_text(tmp_path):
    """Whatever pyarrow calls text."""
    for name, kind in {"a": pyarrow.large_string(), "b": pyarrow.list_(pyarrow.large_string())}.items():
        cells = [caption(number) if name == "a" else [caption(number)] for number in NUMBERS]
        images = [encoded(number) for number in NUMBERS]
        table = pyarrow.table({"image": images, "words": pyarrow.array(cells, kind)})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert pairs(parts_of(tmp_path / f"{name}.parquet", image_column="image")) == EXPECTED


def test_columns_are_chosen_by_kind_then_by_name():
    assert choose_caption_column({"image": False, "Words": True}, None, "x") == "Words"
    assert choose_caption_column({"url": True, "TEXT": True}, None, "x") == "TEXT"
    assert choose_caption_column({"text": True, "prompt": True}, "prompt", "x") == "prompt"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "below", "sidecars", "both", "bom"])
def test_folders(kind, tmp_path):
    save_greys(tmp_path / "deep" if kind == "below" else tmp_path, NUMBERS)
    if kind in ("jsonl", "both"):
        jsonl(tmp_path / "metadata.jsonl", [{"file_name": "gone.png", "text": "x"}, "", *map(row, NUMBERS)])
    if kind == "below":
        jsonl(tmp_path / "metadata.jsonl", [row(number, folder="./deep/") for number in NUMBERS])
    if kind in ("csv", "bom"):
        lines = [f'0{number}.png,"{caption(number)}",7' for number in NUMBERS]
        text = "\r\n".join(["file_name,text,n", *lines])
        (tmp_path / "metadata.csv").write_bytes((b"\xef\xbb\xbf" if kind == "bom" else b"") + text.encode())
    if kind in ("sidecars", "both"):
        sidecars(tmp_path)
    if kind == "both":  # then metadata decides
        (tmp_path / "010.txt").write_text("something else")
    parts = parts_of(tmp_path, **({"caption_column": "text"} if kind in ("csv", "bom") else {}))
    assert pairs(parts) == EXPECTED
    told = " ".join(told_of(*parts))
    assert "left out" not in told  # .txt and the like are read
    assert ("1 files that are not there, such as 'gone.png'" in told) == (kind in ("jsonl", "both"))


def test_metadata_of_splits_and_several_rows(tmp_path):
    """The nearest file counts; several rows of one image are several captions."""
    for split, numbers in (("train", NUMBERS[:10]), ("test", NUMBERS[10:])):
        save_greys(tmp_path / split, numbers)
        rows = [row(number) for number in numbers] + [row(number, ["one", "two"]) for number in numbers]
        jsonl(tmp_path / split / "metadata.jsonl", rows)
    jsonl(tmp_path / "metadata.jsonl", [row(number, "far", folder="train/") for number in NUMBERS])
    assert pairs(parts_of(tmp_path)) == {number: (caption(number), "one", "two") for number in NUMBERS}


def test_captions_follow_images_through_choices(tmp_path):
    save_greys(tmp_path, NUMBERS)
    sidecars(tmp_path)
    (tmp_path / "015.png").write_bytes(b"no image")
    train, held_out = parts_of(tmp_path, on_bad_image="skip")
    expected = {number: EXPECTED[number] for number in NUMBERS if number != 15}
    assert pairs([train, held_out]) == expected
    for number, captions in pairs([evenly_spaced(train, 3)]).items():
        assert captions == expected[number]
    assert load(tmp_path, channels=1, on_bad_image="skip")[0].captions is None


# ---- captions that are missing


@pytest.mark.parametrize("on_missing", ["skip", "empty"])
@pytest.mark.parametrize("kind", ["table", "sidecars", "metadata"])
def test_missing_captions_by_choice(kind, on_missing, tmp_path):
    """Without a caption at all, and with an empty one; which images are held out does not depend on it."""
    if kind == "table":
        cells = [None if number == 12 else " " if number == 13 else caption(number) for number in NUMBERS]
        captioned_table({"text": cells}).to_parquet(tmp_path / "a.parquet")
    else:
        save_greys(tmp_path, NUMBERS)
        rest = [number for number in NUMBERS if number not in (12, 13)]
        sidecars(tmp_path, rest)
        (tmp_path / "013.txt").write_text("\n")
        if kind == "metadata":
            jsonl(tmp_path / "metadata.jsonl", [*map(row, rest), row(13, "")])
    train, held_out = parts_of(tmp_path, on_missing_caption=on_missing)
    expected = {number: ("",) if number in (12, 13) else EXPECTED[number] for number in NUMBERS}
    if on_missing == "skip":
        expected = {number: captions for number, captions in expected.items() if captions[0]}
    assert pairs([train, held_out]) == expected
    all_numbers = [set((images.indices + 10).tolist()) for images in load(tmp_path, channels=1)]
    assert set((held_out.indices + 10).tolist()) == all_numbers[1] & set(expected)
    (line,) = (line for line in told_of(train, held_out) if "usable" in line)
    assert "2 of 12 images of" in line
    assert line.endswith("left out" if on_missing == "skip" else "they get the empty prompt")


def test_a_changed_caption_changes_what_a_run_compares(tmp_path):
    save_greys(tmp_path, NUMBERS)
    sidecars(tmp_path)
    before = data_facts(*parts_of(tmp_path))
    assert before == data_facts(*parts_of(tmp_path))
    (tmp_path / "014.txt").write_text("another")
    now = data_facts(*parts_of(tmp_path))
    assert {name for name in now if now[name] != before[name]} == {"captions_sha256"}
    assert "captions_sha256" not in data_facts(*load(tmp_path, channels=1))


@given(st.lists(st.one_of(st.none(), st.text(), st.lists(st.one_of(st.none(), st.text()))), min_size=1))
def test_every_image_keeps_its_own_captions(cells):
    expected = [usable_captions(cell)[0] for cell in cells]
    if not any(expected):
        with pytest.raises(ValueError, match="captions are needed"):
            collect_captions(cells, "skip", "x")
        return
    for choice, other in (("skip", ()), ("empty", ("",))):
        captions, notes = collect_captions(cells, choice, "x")
        assert captions == [texts or other for texts in expected]
        assert len(notes) == (not all(expected))
        assert all(text.strip() for texts in expected for text in texts)


# ---- streams


def stream_of(source, **options):
    spec = ImageSpec(resolution=4, channels=1, with_captions=True, **options)
    return stream_images(str(source), spec, head_size=6, buffer_size=3)


def streamed(stream, count):
    """Grey level -> captions of the first images of a stream."""
    images = itertools.islice(stream.read_images(Position(), seed=0, reader=0, num_readers=1), count)
    return dict(sorted((*grey_levels(one), one.captions_of(0)) for _, one, _ in images))


@pytest.mark.parametrize("held_out_fraction", [0, 0.5])
def test_streams_give_captions_beside_images(held_out_fraction, tmp_path):
    captioned_table().to_parquet(tmp_path / "a.parquet")
    stream, train, held_out = stream_of(tmp_path, held_out_fraction=held_out_fraction)
    assert pairs([train, held_out]) == {number: EXPECTED[number] for number in NUMBERS[:6]}
    rest = {number: EXPECTED[number] for number in NUMBERS if number not in pairs([held_out])}
    assert streamed(stream, len(rest)) == rest
    plain = itertools.islice(stream.read(Position(), seed=0, reader=0, num_readers=1), len(rest))
    assert sorted(grey_levels(image for _, image, _ in plain)) == list(rest)


def test_missing_captions_of_a_stream_by_choice(tmp_path):
    captioned_table(cells(n20="", n21=None)).to_parquet(tmp_path / "a.parquet")
    stream, _, _ = stream_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"image 1. of shard 0 of .* has (no|an empty) caption: write captions, or choo"
    ):
        streamed(stream, 11)
    (held_out,) = (pairs([stream_of(tmp_path)[2]]),)
    rest = {number: EXPECTED[number] for number in NUMBERS[:10] if number not in held_out}
    assert streamed(stream_of(tmp_path, on_missing_caption="skip")[0], len(rest)) == rest
    empty = streamed(stream_of(tmp_path, on_missing_caption="empty")[0], len(rest) + 2)
    assert empty == {**rest, 20: ("",), 21: ("",)}


# ---- mistakes


def table(columns):
    return lambda folder: captioned_table(columns).to_parquet(folder / "a.parquet")


def cells(**changed):
    return {"text": [changed.get(f"n{number}", caption(number)) for number in NUMBERS]}


def folder_with(name, content):
    def make(folder):
        save_greys(folder, NUMBERS)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def metadata(*rows):
    def make(folder):
        save_greys(folder, NUMBERS)
        jsonl(folder / "metadata.jsonl", [*map(row, NUMBERS), *rows])

    return make


def rows_of(*changed):
    """Rows of all images but those that are given."""

    def make(folder):
        save_greys(folder, NUMBERS)
        given = {row["file_name"] for row in changed}
        others = [row(number) for number in NUMBERS if row(number)["file_name"] not in given]
        jsonl(folder / "metadata.jsonl", [*others, *changed])

    return make


def both_kinds(folder):
    metadata()(folder)
    (folder / "metadata.csv").write_text("file_name,text\n")


def broken_sidecar(content):
    def make(folder):
        save_greys(folder, NUMBERS)
        sidecars(folder)
        (folder / "013.txt").write_bytes(content)

    return make


def fewer_sidecars(folder):
    save_greys(folder, NUMBERS)
    sidecars(folder, NUMBERS[:-2])


# What there is, options beside captions, and words of the message
MISTAKES = {
    "an unknown choice": (table(None), {"on_missing_caption": "drop"}, "must be refuse, skip or empty, not 'drop'"),
    "no such column": (table(None), {"caption_column": "prompt"}, "no column 'prompt' for captions .its columns are "),
    "a column of numbers": (table({"n": [1] * 12}), {"caption_column": "n"}, "'n' of .* holds neither strings nor lis"),
    "a column of structures": (table({"text": [{"raw": "x"}] * 12}), {}, "has 0 columns of text .* are image, text"),
    "the column of images": (table(None), {"caption_column": "image"}, "column 'image' of .* holds neither"),
    "no column of text": (table({"n": [1] * 12}), {}, "0 columns of text .*--caption_column .its columns are image, n"),
    "two columns of text": (table({"url": ["x"] * 12, "alt": ["x"] * 12}), {}, "2 columns of text and 0 of them"),
    "two called so": (table({"text": ["x"] * 12, "prompt": ["x"] * 12}), {}, "2 columns of text and 2 of them called"),
    "nulls": (table(cells(n12=None, n13=None)), {}, "2 of 12 .*2 with no caption, such as image 2.*skip to leave such"),
    "empty and null": (table(cells(n12="", n13=None)), {}, "1 with an empty caption, such as image 2, 1 with no capti"),
    "lists of nothing": (table({"text": [["x"]] * 11 + [[]]}), {}, "1 of 12 .*no caption, such as image 11"),
    "none at all": (table({"text": [""] * 12}), {"on_missing_caption": "skip"}, "12 of 12 .*captions are needed to t"),
    "none to hold out": (
        lambda folder: datasets.DatasetDict(
            train=captioned_table(), test=captioned_table({"text": ["", "x"]}, range(2)).select([0])
        ).save_to_disk(folder),
        {"on_missing_caption": "empty"},
        "1 of 1 images of .* have no usable caption",
    ),
    "nothing beside the images": (
        folder_with("x", None),
        {},
        "12 of 12 .*no caption, such as .*010.png.: captions are",
    ),
    "fewer sidecars than images": (fewer_sidecars, {}, "2 of 12 .*no caption, such as .*020.png.*skip to leave such"),
    "a sidecar that is no UTF-8": (
        broken_sidecar(b"caf\xe9"),
        {},
        "cannot read the caption .*013.txt: it is not UTF-8",
    ),
    "a sidecar that is no caption": (broken_sidecar(b"x" * 2**21), {}, "013.txt: it is longer than 1,048,576 bytes"),
    "a column of sidecars": (
        fewer_sidecars,
        {"caption_column": "text"},
        "--caption_column text: .*neither metadata.js",
    ),
    "metadata of both kinds": (both_kinds, {}, "holds both metadata.jsonl and metadata.csv: take one"),
    "no JSON": (metadata("{"), {}, "metadata.jsonl: line 13 is no JSON"),
    "a JSON list": (metadata(["x"]), {}, "metadata.jsonl: line 13 is no JSON object"),
    "no file_name": (metadata({"image": "x.png", "text": "x"}), {}, "line 13 names no file in file_name"),
    "no such metadata column": (metadata(), {"caption_column": "x"}, "metadata.jsonl has no column 'x' .* are text"),
    "a number": (rows_of(row(12, 7)), {}, "1 with a caption of type int, such as .*012.png"),
    "a number in a list": (rows_of(row(12, ["x", 7])), {}, "1 with a caption of type int, such as .*012.png"),
    "half a character": (
        rows_of({**row(12), "text": "\ud83d"}),
        {},
        "1 with a caption that is no valid Unicode, such as .*012.png",
    ),
    "fewer rows than images": (rows_of(row(99)), {"held_out_fraction": 0}, None),
    "commas": (
        folder_with("metadata.csv", "file_name,text\n010.png,a, b\n"),
        {},
        "metadata.csv: line 2 has more cells",
    ),
    "another encoding": (folder_with("metadata.csv", b"file_name,text\n010.png,\xe9\n"), {}, "it is not UTF-8"),
    "an open quote": (folder_with("metadata.csv", 'file_name,text\n010.png,"a\n'), {}, "metadata.csv: unexpected end"),
    "an empty file": (folder_with("metadata.jsonl", ""), {}, "metadata.jsonl has 0 columns of text"),
    "an embedded set": (None, {}, "'digits' has no captions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    make, options, words = MISTAKES[name]
    if make:
        make(tmp_path)
    if words is None:  # more rows than images are told of
        assert "captions of 1 files that are not there" in " ".join(told_of(*parts_of(tmp_path, **options)))
        return
    with pytest.raises(ValueError, match=words) as error:
        parts_of(tmp_path if make else "digits", **options)
    assert "\n" not in str(error.value)


def test_indices_stay_whole_numbers(tmp_path):
    save_greys(tmp_path, NUMBERS)
    sidecars(tmp_path)
    assert parts_of(tmp_path)[0].indices.dtype == np.int64
