"""Webdataset tars as a source: samples in order, their captions, and what is wrong with them in one line."""

import io
import itertools
import json
import tarfile

import pytest

from tests.sources import encoded, grey_levels, levels_of, load, save_greys
from vkd_gen.data.images import ImageSpec, data_facts, told_of
from vkd_gen.data.streaming import Position, stream_images

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("datasets_cache")

NUMBERS = range(10, 22)


def caption(number):
    return f"a picture of {number}, “größe”"


def write_tar(path, members):
    """Name of a member -> its bytes, or its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def samples(numbers=NUMBERS, *, ends=("png", "txt"), **changed):
    """Members of samples; `changed`: name -> content, None for none."""
    members = {}
    for number in numbers:
        told = {"txt": caption(number), "json": json.dumps({"caption": caption(number), "url": "x"})}
        members |= {f"{number:04}.{end}": told.get(end) or encoded(number) for end in ends}
    members |= {name.replace("_", "."): content for name, content in changed.items()}
    return {name: content for name, content in members.items() if content is not None}


def parts_of(source, **options):
    return load(source, channels=1, with_captions=True, **options)


def pairs(parts):
    found = [(level, images.captions_of(i)) for images in parts for i, level in enumerate(grey_levels(images))]
    return dict(sorted(found))


EXPECTED = {number: (caption(number),) for number in NUMBERS}


@pytest.mark.parametrize("kind", ["txt", "json", "both", "named", "one file", "list", "splits", "deep"])
def test_sources(kind, tmp_path):
    ends = {"json": ("png", "json"), "both": ("json", "png", "txt"), "named": ("png", "txt", "json")}
    members = samples(ends=ends.get(kind, ("png", "txt")))
    expected = EXPECTED
    if kind == "splits":
        write_tar(tmp_path / "set-train-00000-of-00001.tar", samples(NUMBERS[:10]))
        write_tar(tmp_path / "set-test-00000-of-00001.tar", samples(NUMBERS[10:]))
    else:
        if kind == "list":
            expected = {number: (*captions, "more") for number, captions in EXPECTED.items()}
            several = {f"{n:04}.json": json.dumps({"prompts": [caption(n), "", None, "more"]}) for n in NUMBERS}
            members = dict(sorted({**samples(ends=["png"]), **several}.items()))
        if kind == "deep":  # folders, hidden files, links, other ends, dots in what is an end
            members = {f"a.b/{name}": content for name, content in members.items()}
            members = {"._0010.png": b"\0", "README": "x", **members, "zz.seg.png": b"no image", "zz.cls": "7"}
        names = list(members)
        half = next(i for i, name in enumerate(names) if "0016" in name)
        write_tar(
            tmp_path / "00000.tar", {name: members[name] for name in names[: None if kind == "one file" else half]}
        )
        if kind != "one file":
            write_tar(tmp_path / "00001.tar", {name: members[name] for name in names[half:]})
    source = tmp_path / "00000.tar" if kind == "one file" else tmp_path
    options = {"caption_column": "caption"} if kind == "named" else {}
    if kind == "deep":
        options |= {"on_missing_caption": "skip"}
    parts = parts_of(source, **options)
    assert pairs(parts) == expected
    assert levels_of(load(source, channels=1, **({"on_bad_image": "skip"} if kind == "deep" else {}))) == list(NUMBERS)
    if kind == "splits":
        assert sorted(grey_levels(parts[1])) == list(NUMBERS[10:])


def test_a_changed_tar_is_read_again(tmp_path):
    """Though its name is the same; and a run that goes on notices."""
    write_tar(tmp_path / "0.tar", samples())
    before = parts_of(tmp_path)
    again = parts_of(tmp_path)
    assert data_facts(*before) == data_facts(*again)
    assert before[0].identity() == again[0].identity()
    write_tar(tmp_path / "0.tar", samples(**{"0012_txt": "another"}))
    now = parts_of(tmp_path)
    assert pairs(now)[12] == ("another",)
    facts, old = data_facts(*now), data_facts(*before)
    assert {name for name in facts if facts[name] != old[name]} == {"captions_sha256"}
    assert before[0].identity() != now[0].identity()


def test_tars_beside_images_are_left_out(tmp_path):
    save_greys(tmp_path, NUMBERS)
    write_tar(tmp_path / "backup.tar", samples())
    parts = load(tmp_path, channels=1)
    assert levels_of(parts) == list(NUMBERS)
    assert "1 file of no image format (.tar)" in " ".join(told_of(*parts))


def test_samples_without_captions_or_images_by_choice(tmp_path):
    write_tar(tmp_path / "0.tar", samples(**{"0012_txt": None, "0013_png": None, "0014_txt": " "}))
    parts = parts_of(tmp_path, on_missing_caption="skip", on_bad_image="skip")
    assert pairs(parts) == {number: EXPECTED[number] for number in NUMBERS if number not in (12, 13, 14)}
    told = " ".join(told_of(*parts))
    assert "1 with no caption, such as image 2, 1 with an empty caption, such as image 4): left out" in told
    assert "1 images that cannot be read are left out, such as: cannot read image 3" in told


def test_tars_are_streamed_in_shards(tmp_path):
    """One for each tar; nothing of them is copied."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", samples(NUMBERS[4 * shard : 4 * shard + 4]))
    spec = ImageSpec(resolution=4, channels=1, with_captions=True)
    stream, train, held_out = stream_images(str(tmp_path), spec, head_size=3, buffer_size=2)
    assert stream.num_shards == 3
    head = pairs([train, held_out])
    assert head == {number: EXPECTED[number] for number in (10, 14, 18)}
    found = {}
    for reader in range(3):
        images = stream.read_images(Position(), seed=0, reader=reader, num_readers=3)
        own = list(itertools.takewhile(lambda entry: entry[0].epoch == 0, itertools.islice(images, 9)))
        found |= {level: one.captions_of(0) for _, one, _ in own for level in grey_levels(one)}
    assert found == {number: EXPECTED[number] for number in NUMBERS if number not in pairs([held_out])}
    assert not list((tmp_path.parent / "cache").glob("**/*.arrow"))


# ---- mistakes


def tar(**changed):
    return lambda folder: write_tar(folder / "0.tar", samples(**changed))


def cut(size):
    def make(folder):
        path = write_tar(folder / "0.tar", samples())
        path.write_bytes(path.read_bytes()[:size])

    return make


def damaged(folder):
    path = write_tar(folder / "0.tar", samples())
    content = bytearray(path.read_bytes())
    content[5120:5632] = b"x" * 512  # a header
    path.write_bytes(content)


def one_of_two(folder):
    write_tar(folder / "0.tar", samples())
    (folder / "1.tar").write_bytes(b"no archive at all" * 100)


def of_json(found):
    members = {f"{number:04}.json": json.dumps({"caption": caption(number)}) for number in NUMBERS}
    members |= {"0012.json": found if isinstance(found, str) else json.dumps(found)}
    return lambda folder: write_tar(folder / "0.tar", dict(sorted({**samples(ends=["png"]), **members}.items())))


# What there is, options, and words of the message
MISTAKES = {
    "no archive": (lambda folder: (folder / "0.tar").write_bytes(b"x"), {}, r"holds no images .*\(\.tar\)"),
    "one file that is none": (
        lambda folder: (folder / "0.tar").write_bytes(b"x"),
        {"source": "0.tar"},
        "cannot read .*0.t",
    ),
    "one of two is no archive": (one_of_two, {}, r"cannot read .*1\.tar: "),
    "cut off in an image": (cut(11_000), {}, r"cannot read .*0\.tar: unexpected end of data"),
    "damaged in the middle": (damaged, {}, r"cannot read .*0\.tar: it is damaged behind byte 5,120"),
    "an empty archive": (lambda folder: write_tar(folder / "0.tar", {}), {}, "0 fields called as captions are"),
    "no caption field": (tar(ends=["png", "cls"]), {}, r"0\.tar has 0 fields called .*its samples have \.png, \.cls"),
    "no such field": (
        tar(),
        {"caption_column": "alt"},
        r"0\.tar has no 'alt' for captions .its samples have \.png, \.txt",
    ),
    "a missing caption": (tar(**{"0012_txt": None}), {}, "1 of 12 images of .* no caption, such as image 2"),
    "a caption that is no UTF-8": (
        tar(**{"0012_txt": b"\xe9"}),
        {},
        r"cannot read 0012 in .*0\.tar, \.txt: it is not UTF",
    ),
    "two images of one name": (
        tar(numbers=range(3), **{"0002_jpg": b"x"}),
        {},
        r"0\.tar has several images called 0002, jpg and png",
    ),
    "no JSON": (of_json("{"), {}, r"cannot read 0012 in .*0\.tar: its \.json is no JSON"),
    "a caption that is no text": (of_json({"caption": 7}), {}, r"0012 in .*0\.tar, \.json: 'caption' is of type int"),
    "two fields called so": (
        of_json({"caption": "x", "text": "x"}),
        {},
        "2 fields called as captions are; name one by",
    ),
    "a sample without an image": (tar(**{"0013_png": None}), {}, "cannot read image 3 of .*: the cell is empty"),
    "an image that is none": (tar(**{"0013_png": b"no image"}), {}, "cannot read image 3 of .*of no image format"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    make, options, words = MISTAKES[name]
    make(tmp_path)
    source = tmp_path / options.get("source", "")
    options = {key: value for key, value in options.items() if key != "source"}
    with pytest.raises(ValueError, match=words) as error:
        [images.stack() for images in parts_of(source, **options)]
    assert "\n" not in str(error.value)
