"""Decoded images that are kept on disk: the same pixels, and another file for whatever changes them."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vkd_gen.data import cache as cache_module
from vkd_gen.data.cache import cache_images
from vkd_gen.data.draws import TrainingDraws
from vkd_gen.data.images import evenly_spaced
from vkd_gen.data.sources import load_images


def write_images(folder, count=14, size=(9, 7), seed=0):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A parquet file with two columns of images."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def write(seed=0):
        folder = write_images(tmp_path / f"cells-{seed}", seed=seed)
        cells = [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.glob("*.png"))]
        columns = {"image": cells, "other": cells[::-1]}
        features = datasets.Features({name: datasets.Image() for name in columns})
        path = tmp_path / "table.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        return path

    return write


def load(source, *, resolution=4, channels=3, **options):
    return load_images(str(source), resolution=resolution, channels=channels, **options)


def count_reads(images):
    """The images, and the numbers of those that are read."""
    numbers = []

    def read(number):
        numbers.append(number)
        return images.read(number)

    return replace(images, read=read), numbers


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [1, 4, 7, 12])
def test_pixels_are_the_same(folder, tmp_path, channels, resolution):
    images, _ = load(folder, channels=channels, resolution=resolution)
    cached = cache_images(images, tmp_path / "cache")
    everything = range(len(images))
    assert torch.equal(cached.pixels(everything), images.pixels(everything))
    assert all(torch.equal(cached[index], images[index]) for index in everything)
    few, cached_few = evenly_spaced(images, 5), evenly_spaced(cached, 5)
    assert torch.equal(cached_few.pixels(range(5)), few.pixels(range(5)))


@pytest.mark.parametrize("kept_bytes", [0, 2**28])
def test_draws_are_the_same_bit_for_bit(folder, tmp_path, kept_bytes, monkeypatch):
    monkeypatch.setattr("vkd_gen.data.draws.KEPT_BYTES", kept_bytes)
    images, _ = load(folder)
    cached = cache_images(images, tmp_path / "cache")
    draws, cached_draws = (TrainingDraws(found, seed=3, random_flip=True) for found in (images, cached))
    for numbers in ([0, 1, 2], [40, 7, 7, 13]):
        found, expected = cached_draws[numbers], draws[numbers]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_are_decoded_once(folder, tmp_path):
    images, read = count_reads(load(folder)[0])
    cached = cache_images(images, tmp_path / "cache")
    assert sorted(read) == sorted([*images.indices.tolist(), images.indices[0]])  # the first one tells the layout too
    read.clear()
    cached.pixels(range(len(images)))
    assert not read
    cache_images(images, tmp_path / "cache")
    assert read == [images.indices[0]]


def test_labels_and_names_stay(tmp_path):
    images, _ = load("digits", resolution=8, channels=1, with_labels=True)
    cached = cache_images(images, tmp_path / "cache")
    assert [cached.label(index) for index in range(20)] == [images.label(index) for index in range(20)]
    assert (cached.name, cached.num_classes, len(cached)) == ("digits", 10, len(images))
    assert torch.equal(cached.pixels(range(50)), images.pixels(range(50)))


def test_a_process_is_sent_no_pixels(folder, tmp_path):
    cached = cache_images(load(folder)[0], tmp_path / "cache")
    expected = cached[3]
    assert torch.equal(pickle.loads(pickle.dumps(cached))[3], expected)
    assert len(pickle.dumps(cached)) < 5000


# ---- another file for whatever changes the pixels


def folders_of(*sets, cache):
    for images in sets:
        cache_images(images, cache)
    return len([path for path in cache.iterdir() if path.is_dir()])


def test_resolution_channels_and_numbers_are_in_the_name(folder, tmp_path):
    images, held_out = load(folder)
    others = [load(folder, resolution=5)[0], load(folder, channels=1)[0], evenly_spaced(images, 3), held_out]
    assert folders_of(images, *others, cache=tmp_path / "cache") == 5


@pytest.mark.parametrize("change", ["time", "content", "name"])
def test_files_are_in_the_name(folder, tmp_path, change):
    before = load(folder)[0]
    assert folders_of(before, load(folder)[0], cache=tmp_path / "cache") == 1
    file = folder / "03.png"
    match change:
        case "time":
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        case "content":
            Image.new("RGB", (9, 7)).save(file)
        case "name":
            file.rename(folder / "03b.png")
    assert folders_of(load(folder)[0], cache=tmp_path / "cache") == 2


def test_a_folder_may_move(folder, tmp_path):
    assert folders_of(load(folder)[0], cache=tmp_path / "cache") == 1
    folder = folder.rename(tmp_path / "moved")
    assert folders_of(load(folder)[0], cache=tmp_path / "cache") == 1


def test_a_table_and_its_column_are_in_the_name(table, tmp_path):
    cache, path = tmp_path / "cache", table()
    images = load(path, image_column="image")[0]
    cached = cache_images(images, cache)
    assert torch.equal(cached.pixels(range(5)), images.pixels(range(5)))
    assert folders_of(load(path, image_column="image")[0], cache=cache) == 1
    assert folders_of(load(path, image_column="other")[0], cache=cache) == 2
    table(seed=1)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    assert folders_of(load(path, image_column="image")[0], cache=cache) == 3


def test_the_decoders_version_is_in_the_name(folder, tmp_path, monkeypatch):
    images, _ = load(folder)
    cache_images(images, tmp_path / "cache")
    monkeypatch.setattr(cache_module.PIL, "__version__", "0")
    assert folders_of(images, cache=tmp_path / "cache") == 2


def test_a_bad_image_is_named(folder, tmp_path):
    images, _ = load(folder)
    number = int(images.indices[2])
    file = folder / f"{number:02}.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"cannot read the image .*{number:02}\.png"):
        cache_images(images, tmp_path / "cache")
