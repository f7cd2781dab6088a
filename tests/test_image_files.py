"""Image files as they are found in the wild: every mode, turned, transparent, damaged, hostile, oddly named."""

import os
import re
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.sources import encoded, grey, grey_levels, labels_of, levels_of, load, save_greys
from vkd_gen.data.images import data_facts


def only(image, folder, *, name="a.png", channels=3, resolution=6, **save):
    """What is made of one image, uint8 `[H, W, C]`."""
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **save)
    images, _ = load(folder, channels=channels, resolution=resolution, held_out_fraction=0)
    return images.pixels([0])[0].permute(1, 2, 0).numpy()


def noise(mode="RGB", size=(6, 6)):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (*size, *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)


# ---- transparency


@pytest.mark.parametrize("alpha", [0, 1, 77, 254, 255])
def test_transparency_is_laid_on_white(tmp_path, alpha):
    """Porter and Duff's "over": alpha * colour + (1 - alpha) * 255, in numpy float64."""
    image = noise("RGBA")
    image.putalpha(alpha)
    expected = np.asarray(image)[..., :3] * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    found = only(image, tmp_path / "images")
    assert np.abs(found - expected).max() <= 1
    if alpha in (0, 255):
        assert np.array_equal(found, expected)


def transparent_in_some_way(way, path):
    """Left half black, right half transparent."""
    key = {"palette": 1, "grey key": 9, "colour key": (9, 9, 9)}.get(way)
    if key is None:
        pixels = np.zeros((4, 4, 4), np.uint8)
        pixels[:, :2, 3] = 255
        Image.fromarray(pixels).convert(way).save(path)
        return
    image = Image.new({"palette": "P", "grey key": "L", "colour key": "RGB"}[way], (4, 4), 0)
    if way == "palette":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(key, (2, 0, 4, 4))
    image.save(path, transparency=key)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("way", ["RGBA", "LA", "palette", "grey key", "colour key"])
def test_ways_to_be_transparent(tmp_path, way, channels):
    transparent_in_some_way(way, tmp_path / "a.png")
    images, _ = load(tmp_path, channels=channels, held_out_fraction=0)
    assert (images[0][:, :, :2] == -1).all()
    assert (images[0][:, :, 2:] == 1).all()


# ---- ordinary images stay what they were


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "1"])
def test_opaque_images_are_what_pil_makes_of_them(tmp_path, mode, channels):
    image = noise("CMYK") if mode == "CMYK" else noise("RGB").convert(mode)
    found = only(image, tmp_path / "x", name="a.tiff" if mode == "CMYK" else "a.png", channels=channels)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(6, 6, channels)
    assert np.array_equal(found, expected)


def test_images_are_resized_by_pils_bicubic(tmp_path):
    expected = np.asarray(noise(size=(9, 9)).resize((4, 4), Image.Resampling.BICUBIC))
    assert np.array_equal(only(noise(size=(9, 9)), tmp_path / "x", resolution=4), expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits(tmp_path, mode):
    ramp = np.linspace(0, 65535, 36).reshape(6, 6)
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    found = only(Image.fromarray(ramp.astype(kind)), tmp_path / "x", name="a.tiff", channels=1)
    assert np.abs(found[..., 0] - ramp / 257).max() <= 0.51


# ---- EXIF


TURNS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
"""Orientation of EXIF 2.3, section 4.6.4 -> stored pixels to upright ones."""


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", [*TURNS, 0, 9])
def test_images_are_turned_as_their_exif_says(tmp_path, orientation):
    found = only(noise(), tmp_path / "x", exif=turned(orientation))
    assert np.array_equal(found, TURNS.get(orientation, TURNS[1])(np.asarray(noise())))


def test_a_turned_image_is_cropped_as_it_is_seen(tmp_path):
    """4 wide and 12 high as seen, stored a quarter turn to the left: the middle third of the rows stays."""
    seen = np.repeat(np.array([0, 128, 255], np.uint8), 4)[:, None].repeat(4, 1)
    image = Image.fromarray(np.rot90(seen).copy())
    assert (only(image, tmp_path / "x", channels=1, resolution=4, exif=turned(6)) == 128).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_leaves_the_image_as_it_is(tmp_path, exif):
    noise(size=(8, 8)).save(tmp_path / "plain.jpg", quality=100)
    found = only(noise(size=(8, 8)), tmp_path / "x", name="a.jpg", resolution=8, exif=exif, quality=100)
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / "plain.jpg")))


# ---- bad ones


def png_of(width, height):
    """A PNG of a few bytes that says it is as large, all of it one colour of one bit."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9) if width * height < 1e9 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff_of(number, kind):
    return encoded(Image.fromarray(np.full((4, 4), number, kind)), "TIFF")


LARGE = encoded(noise(size=(64, 64)))
# Name -> file name, content, words of the message
BAD = {
    "zero bytes": ("bad.png", b"", "the file is empty"),
    "renamed text": ("bad.jpg", b"How to read this folder: ...", "no image format that is known"),
    "PostScript, which PIL would run": (
        "bad.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
        "no image format",
    ),
    "header alone": ("bad.png", LARGE[:20], "cannot read the image"),
    "truncated PNG": ("bad.png", LARGE[:900], "truncated"),
    "truncated JPEG": ("bad.jpg", encoded(noise(size=(64, 64)), "JPEG")[:900], "truncated"),
    "flipped bits": ("bad.png", LARGE.replace(b"IDAT", b"IDAX"), "cannot read the image"),
    "bomb of 4 gigapixels": ("bad.png", png_of(65_536, 65_536), "decompression bomb"),
    "bomb that PIL would only warn of": ("bad.png", png_of(10_000, 9_000), "decompression bomb"),
    "floating point numbers": ("bad.tiff", tiff_of(0, np.float32), "floating point"),
    "32 bits": ("bad.tiff", tiff_of(70_000, np.int32), "more than 16 bits"),
    "negative numbers": ("bad.tiff", tiff_of(-1, np.int32), "more than 16 bits"),
}


@pytest.fixture
def good_folder(tmp_path):
    return save_greys(tmp_path / "images", range(0, 120, 10))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_or_skipped_and_named(good_folder, name):
    """At load by its header, or when it is read."""
    file, content, words = BAD[name]
    (good_folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the image .*{re.escape(file)}: .*repair or remove it") as error:
        [images.stack() for images in load(good_folder)]
    assert re.search(words, str(error.value))
    assert "\n" not in str(error.value)
    assert "object at 0x" not in str(error.value)
    parts = load(good_folder, on_bad_image="skip")
    assert levels_of(parts) == list(range(0, 120, 10))
    (line,) = (line for images in parts for line in images.skipped)
    assert re.search(words, line)
    assert file in line


def test_a_bomb_costs_no_memory(good_folder):
    """It is refused by its header, before pixels are made."""
    (good_folder / "bad.png").write_bytes(png_of(60_000, 60_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(good_folder, on_bad_image="skip")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; its pixels would be 450 MiB


def test_broken_links_pipes_and_folders_called_like_images(good_folder):
    os.mkfifo(good_folder / "pipe.png")  # opening it would wait for ever
    (good_folder / "folder.png").mkdir()
    (good_folder / "link.png").symlink_to(good_folder / "nowhere")
    with pytest.raises(ValueError, match=r"link\.png: No such file or directory \(2 such in all; --on_bad_image skip"):
        load(good_folder)
    parts = load(good_folder, on_bad_image="skip")
    skipped = sorted(line for images in parts for line in images.skipped)
    assert [re.search(r"(\w+)\.png: (.*)", line).groups() for line in skipped] == [
        ("link", "No such file or directory"),
        ("pipe", "it is no file"),
    ]
    assert len(data_facts(*parts)["dataset_sha256"]) == 64  # does not wait for the pipe
    assert parts[0].identity()


def test_skipping_is_the_same_in_every_run_and_told_apart(good_folder):
    """And moves no image between training and held out."""
    before = [set(grey_levels(images)) for images in load(good_folder)]
    facts = [data_facts(*load(good_folder))]
    assert facts[0] == data_facts(*load(good_folder, on_bad_image="skip"))
    for file in ("030.png", "040.png"):
        content = (good_folder / file).read_bytes()
        (good_folder / file).write_bytes(content[:40])
        parts = load(good_folder, on_bad_image="skip")
        facts.append(data_facts(*parts))
        assert facts[-1] == data_facts(*load(good_folder, on_bad_image="skip"))
        assert levels_of(parts) == sorted(set.union(*before) - {int(file[:3])})
        assert all(set(grey_levels(images)) <= all_ for images, all_ in zip(parts, before, strict=True))
        (good_folder / file).write_bytes(content)
    assert [fact["num_skipped_images"] for fact in facts] == [0, 1, 1]
    assert len({fact["image_numbers_sha256"] for fact in facts}) == 3  # as many skipped, but another one


def test_of_a_large_set_sizes_and_first_bytes_count(good_folder, monkeypatch):
    monkeypatch.setattr("vkd_gen.data.decoding.HASHED_BYTES", 100)
    monkeypatch.setattr("vkd_gen.data.decoding.FIRST_BYTES", 10)
    (good_folder / "bad.png").write_bytes(bytes(30))
    hashes = []
    for content in (bytes(30), bytes(29) + b"1", bytes(31), b"1" + bytes(29)):
        (good_folder / "bad.png").write_bytes(content)
        hashes.append(data_facts(*load(good_folder, on_bad_image="skip"))["dataset_sha256"])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_nothing_left(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image left to train on: of 2 none can be read; .*the file is empty"):
        load(tmp_path, on_bad_image="skip", held_out_fraction=0.3)


def test_labels_stay_with_their_images(tmp_path):
    for name, levels in (("ant", range(4)), ("bee", range(4, 8))):
        save_greys(tmp_path / name, levels)
    (tmp_path / "ant" / "001.png").write_bytes(b"")
    for images in load(tmp_path, on_bad_image="skip", with_labels=True):
        assert labels_of(images) == [level // 4 for level in grey_levels(images)]


# ---- sizes and names


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (3, 5000)])
def test_one_pixel_and_lines_of_pixels(tmp_path, size, monkeypatch):
    """A line of 60,000 pixels, its shorter side brought to 64, would be 64 x 3,840,000."""
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, *how: sizes.append(to) or resize(image, to, *how))
    found = only(grey(77, size), tmp_path / "x", channels=1, resolution=64)
    assert found.shape == (64, 64, 1)
    assert (found == 77).all()
    assert max(map(max, sizes)) <= 16 * 64


def test_the_middle_of_a_long_image(tmp_path):
    pixels = np.zeros((2, 2000), np.uint8)
    pixels[:, 995:1005] = 200
    assert (only(Image.fromarray(pixels), tmp_path / "x", channels=1, resolution=4) >= 195).all()


@pytest.mark.parametrize("name", ["ünïcödé 图像", "line\nbreak", "tab\t", "'quote\"", "-rf", "a%20b", "\udcff"])
def test_odd_names(tmp_path, name):
    folder = tmp_path / f"folder {name}"
    folder.mkdir()
    for number in range(3):
        grey(50).save(folder / f"{name}{number}.png")
    assert grey_levels(load(folder)[0]) == [50, 50]
    (folder / f"{name}3.png").write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty") as error:
        load(folder)
    assert str(error.value).isprintable()
    (skipped,) = (line for images in load(folder, on_bad_image="skip") for line in images.skipped)
    assert skipped.isprintable()


def test_many_frames_are_one_image(tmp_path):
    """And no file stays open after it was read."""
    found = only(grey(40), tmp_path / "x", name="a.gif", channels=1, save_all=True, append_images=[grey(200)])
    assert (found == 40).all()
    images, _ = load(tmp_path / "x", held_out_fraction=0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        images[0]
    assert len(os.listdir("/proc/self/fd")) == before


# ---- tables


@pytest.fixture
def table(datasets_cache):
    """A function that writes cells of bytes and paths as a parquet file."""
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    def write(folder, cells):
        folder.mkdir(exist_ok=True)
        cells = [cell and dict(zip(("bytes", "path"), cell, strict=True)) for cell in cells]
        schema = datasets.Features({"image": datasets.Image()}).arrow_schema
        pyarrow.parquet.write_table(pyarrow.table({"image": cells}, schema=schema), folder / "a.parquet")
        return folder

    return write


GOOD_CELLS = [(encoded(10 * number), None) for number in range(12)]
BAD_CELLS = {
    "zero bytes": ((b"", None), "the file is empty"),
    "renamed text": ((b"How to read this folder: ...", None), "no image format that is known"),
    "truncated PNG": ((LARGE[:900], None), "truncated"),
    "empty cell": (None, "the cell is empty"),
    "path to nothing": ((None, "/no/such/file.png"), "No such file or directory"),
    "address": ((None, "https://example.org/a.png"), "the address https://example.org/a.png; download it first"),
    "archive elsewhere": ((None, "zip://a.png::https://example.org/a.zip"), "it is the address zip"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_cell_is_refused_or_skipped(tmp_path, table, name):
    bad, words = BAD_CELLS[name]
    table(tmp_path, [*GOOD_CELLS[:5], bad, *GOOD_CELLS[5:]])
    with pytest.raises(ValueError, match=rf"cannot read image 5 of .*{words}.*; repair or remove it") as error:
        [images.stack() for images in load(tmp_path)]
    assert "\n" not in str(error.value)
    parts = load(tmp_path, on_bad_image="skip")
    assert levels_of(parts) == list(range(0, 120, 10))
    assert [re.search(r"image (\d+) of", line)[1] for images in parts for line in images.skipped] == ["5"]


def test_cells_are_read_as_files_are(tmp_path, table):
    content = encoded(noise("RGBA"), exif=turned(6))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(content)
    table(tmp_path / "table", [(content, None), (None, str(tmp_path / "files" / "a.png"))])
    from_file, from_table = (load(tmp_path / kind, resolution=6, held_out_fraction=0)[0] for kind in ("files", "table"))
    assert torch.equal(from_table[0], from_file[0])
    assert torch.equal(from_table[1], from_file[0])


def test_the_commit_of_a_data_set_on_the_hub(table, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table(tmp_path, GOOD_CELLS)
    loaded = datasets.load_dataset("parquet", data_files={"train": str(tmp_path / "a.parquet")})
    commit = "0123456789abcdef0123456789abcdef01234567"
    address = f"hf://datasets/some/set@{commit}/data/train-00000-of-00001.parquet"
    loaded["train"].info.download_checksums = {address: {"num_bytes": 1, "checksum": None}}
    monkeypatch.setattr(datasets, "load_dataset", lambda source, revision: loaded)
    parts = load("some/set")
    assert data_facts(*parts)["dataset_revision"] == parts[1].revision == commit
    assert "dataset_revision" not in data_facts(*load("digits", channels=1))
