"""Streams of images: who reads what, in which order, and how to go on."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tests.sources import encoded, grey_levels, labels_of, load, save_greys, write_shards
from vkd_gen.data.images import ImageSpec
from vkd_gen.data.streaming import Position, stream_images

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("datasets_cache")

SIZES = (5, 1, 7, 4, 3)  # 20 images in 5 shards


@pytest.fixture
def numbered(tmp_path):
    """Image i of 20 is of grey level i, in 5 shards of unlike sizes."""
    return write_shards(tmp_path / "numbered", range(20), SIZES)


def open_stream(source, *, head_size=6, buffer_size=4, **options):
    spec = ImageSpec(**{"resolution": 4, "channels": 1, "held_out_fraction": 0, **options})
    return stream_images(str(source), spec, head_size=head_size, buffer_size=buffer_size)


def first_epoch(stream, *, reader=0, num_readers=1, position=Position(), seed=0):
    """Grey levels of what a reader gives until the epoch after the position's begins."""
    images = stream.read(position, seed=seed, reader=reader, num_readers=num_readers)
    own = itertools.takewhile(lambda given: given[0].epoch == position.epoch, images)
    return grey_levels(image for _, image, _ in own)


# ---- who reads what


@pytest.mark.parametrize(("kind", "num_readers"), [("parquet", 2), ("parquet", 6), ("arrow", 3)])
def test_every_image_once_per_epoch_over_all_readers(kind, num_readers, tmp_path):
    """Also where the number of shards does not divide, or there are fewer shards than readers."""
    stream, _, _ = open_stream(write_shards(tmp_path / "numbered", range(20), SIZES, kind=kind))
    assert stream.num_shards == 5
    for epoch in range(2):
        shares = [
            first_epoch(stream, reader=reader, num_readers=num_readers, position=Position(epoch))
            for reader in range(num_readers)
        ]
        assert sorted(itertools.chain(*shares)) == list(range(20))
        assert all(shares)


def test_readers_share_whole_shards_first(numbered):
    """Of 5 shards 2 readers have 2 each, and take turns at the rows of the fifth."""
    stream, _, _ = open_stream(numbered, buffer_size=1)
    shards = {
        number: shard for shard, group in enumerate(np.split(np.arange(20), np.cumsum(SIZES)[:-1])) for number in group
    }
    order = np.random.default_rng([0, 0]).permutation(5).tolist()
    for reader in range(2):
        expected = [number for place in (reader, 2 + reader) for number in range(20) if shards[number] == order[place]]
        expected += [number for number in range(20) if shards[number] == order[4]][reader::2]
        assert first_epoch(stream, reader=reader, num_readers=2) == expected


@pytest.mark.parametrize("buffer_size", [1, 3, 19, 100])
def test_the_order_against_a_slow_reference(numbered, buffer_size):
    """Shards in the epoch's order, cut into buffers, each of them permuted."""
    stream, _, _ = open_stream(numbered, buffer_size=buffer_size)
    for epoch in range(2):
        starts = [0, *np.cumsum(SIZES).tolist()]
        rows = []  # place, row and number of every image
        for place, shard in enumerate(np.random.default_rng([7, epoch]).permutation(5).tolist()):
            rows += [(place, row, starts[shard] + row) for row in range(SIZES[shard])]
        expected = []
        for first in range(0, 20, buffer_size):
            buffer = rows[first : first + buffer_size]
            key = [7, epoch, 1, *buffer[0][:2]]
            expected += [buffer[index][2] for index in np.random.default_rng(key).permutation(len(buffer))]
        assert first_epoch(stream, position=Position(epoch), seed=7) == expected


def test_the_same_seed_the_same_order_and_every_epoch_its_own(numbered):
    stream, _, _ = open_stream(numbered)
    orders = [first_epoch(stream, position=Position(epoch), seed=seed) for seed in (0, 1) for epoch in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == first_epoch(open_stream(numbered)[0], position=Position(1))


def test_no_more_than_a_buffer_is_held(tmp_path, monkeypatch):
    source = write_shards(tmp_path / "a", range(20), [20])
    stream, _, _ = open_stream(source, buffer_size=6)
    taken = []
    rows = type(stream)._rows

    def counted(*arguments, **options):
        for row in rows(*arguments, **options):
            taken.append(row)
            yield row

    monkeypatch.setattr(type(stream), "_rows", counted)
    images = stream.read(Position(), seed=0, reader=0, num_readers=1)
    for number, _ in enumerate(itertools.islice(images, 20), start=1):
        assert len(taken) - number <= 6


def test_nothing_is_copied_to_the_disk(numbered, datasets_cache):
    stream, _, _ = open_stream(numbered)
    first_epoch(stream)
    assert not [path for path in datasets_cache.rglob("*") if path.suffix == ".arrow"]


# ---- going on


@pytest.mark.parametrize(("buffer_size", "reader", "num_readers"), [(1, 0, 1), (100, 0, 1), (4, 1, 2)])
def test_going_on_from_any_position_gives_what_would_have_come(numbered, buffer_size, reader, num_readers):
    stream, _, _ = open_stream(numbered, buffer_size=buffer_size)
    options = {"seed": 3, "reader": reader, "num_readers": num_readers}
    straight = list(itertools.islice(stream.read(Position(), **options), 32))
    levels = grey_levels(image for _, image, _ in straight)
    for number in (1, 4, 7, 8, 20, 22):  # within, before and behind buffers and epochs
        rest = list(itertools.islice(stream.read(straight[number - 1][0], **options), 10))
        assert grey_levels(image for _, image, _ in rest) == levels[number : number + 10]
        assert [found for found, _, _ in rest] == [found for found, _, _ in straight[number : number + 10]]


# ---- the head


def test_the_head_is_of_several_shards_and_what_is_held_out_never_comes(numbered):
    stream, train, held_out = open_stream(numbered, head_size=10, held_out_fraction=0.4)
    assert (len(train), len(held_out)) == (5, 4)  # one shard has one row alone
    head = {*grey_levels(train), *grey_levels(held_out)}
    assert len(head) == 9
    starts = [0, *np.cumsum(SIZES).tolist()]
    assert all(start in head for start in starts[:-1])  # two of the front of each shard
    for num_readers in (1, 2):
        shares = [first_epoch(stream, reader=reader, num_readers=num_readers) for reader in range(num_readers)]
        assert sorted(itertools.chain(*shares)) == sorted({*range(20)} - {*grey_levels(held_out)})


def test_a_head_of_all_is_what_load_images_finds(numbered):
    _, train, held_out = open_stream(numbered, head_size=1000, held_out_fraction=1 / 6)
    whole, _ = load(numbered, channels=1, held_out_fraction=0)
    assert (len(train), len(held_out)) == (17, 3)
    assert sorted([*grey_levels(train), *grey_levels(held_out)]) == grey_levels(whole)


def test_a_test_split_is_held_out(numbered):
    write_shards(numbered, range(100, 104), [2, 2], split="test")
    stream, train, held_out = open_stream(numbered, head_size=3, held_out_fraction=1 / 6)
    assert len(train) == 3
    assert set(grey_levels(held_out)) <= {100, 101, 102, 103}
    assert len(held_out) == 3
    assert sorted(first_epoch(stream)) == list(range(20))


# ---- images and classes


def test_images_are_decoded_as_load_images_does(tmp_path):
    """Long, transparent, of 16 bits, turned by its EXIF, and grey."""
    generator, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    shapes = {(5, 90, 3): np.uint8, (6, 6, 4): np.uint8, (6, 6): np.uint16, (8, 6, 3): np.uint8, (7, 7): np.uint8}
    pictures = [
        Image.fromarray(generator.integers(0, np.iinfo(kind).max, shape, dtype=kind)) for shape, kind in shapes.items()
    ]
    cells = [encoded(picture, **({"exif": exif} if picture.height == 8 else {})) for picture in pictures]
    source = write_shards(tmp_path / "a", cells, [2, 3])
    stream, _, _ = open_stream(source, channels=3)
    whole, _ = load(source, held_out_fraction=0)
    images = stream.read(Position(), seed=0, reader=0, num_readers=1)
    found = sorted((image for _, image, _ in itertools.islice(images, 5)), key=lambda image: image.sum())
    expected = sorted((whole[number] for number in range(5)), key=lambda image: image.sum())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [b"no image", None])
def test_a_bad_image_is_refused_or_skipped(tmp_path, bad, caplog):
    cells = [*range(8), bad, 9]
    source = write_shards(tmp_path / "a", cells, [5, 5])
    stream, _, _ = open_stream(source, head_size=2)
    with pytest.raises(ValueError, match=r"cannot read image 3 of shard 1 of .*repair or remove it") as error:
        first_epoch(stream)
    assert "\n" not in str(error.value)
    stream, _, _ = open_stream(source, head_size=2, on_bad_image="skip")
    assert sorted(first_epoch(stream)) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert [record.message.count("image 3 of shard 1") for record in caplog.records] == [1]
    caplog.clear()
    images = list(itertools.islice(stream.read(Position(), seed=0, reader=0, num_readers=1), 30))
    assert len(caplog.records) == 1  # of three epochs
    levels = grey_levels(image for _, image, _ in images)
    for number in (1, 5, 8, 9, 12):
        rest = itertools.islice(stream.read(images[number - 1][0], seed=0, reader=0, num_readers=1), 10)
        assert grey_levels(image for _, image, _ in rest) == levels[number : number + 10]
    _, train, _ = open_stream(source, head_size=10, on_bad_image="skip")
    assert len(train.skipped) == 1


def test_a_damaged_shard_is_named(tmp_path):
    source = write_shards(tmp_path / "a", range(40), [20, 20])
    file = source / "train-001.parquet"
    content = file.read_bytes()
    schema = 8 + int.from_bytes(content[-8:-4], "little")  # the end of the file, which is read when it is opened
    file.write_bytes(content[:200] + bytes(len(content) - 200 - schema) + content[-schema:])
    with pytest.raises(ValueError, match=r"cannot read shard 1 of .*a: ") as error:
        first_epoch(open_stream(source)[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_classes_come_with_their_images(tmp_path, kind):
    """Those of a table that names them, or as many as the model knows."""
    numbers = [number % 3 for number in range(12)]
    feature = datasets.ClassLabel(names=list("abc")) if kind == "names" else datasets.Value("int32")
    source = write_shards(tmp_path / "a", range(12), [6, 6], labels=(feature, numbers))
    stream, train, _ = open_stream(source, with_labels=True, num_classes=None if kind == "names" else 3)
    assert (stream.images.num_classes, train.num_classes) == (3, 3)
    assert labels_of(train) == [level % 3 for level in grey_levels(train)]
    images = itertools.islice(stream.read(Position(), seed=0, reader=0, num_readers=1), 12)
    assert all(grey_levels([image])[0] % 3 == label for _, image, label in images)


def test_a_label_out_of_range_behind_the_head(tmp_path):
    labels = (datasets.Value("int64"), [0, 1, 0, 1, 5, 1])
    source = write_shards(tmp_path / "a", range(6), [6], labels=labels)
    stream, _, _ = open_stream(source, head_size=3, with_labels=True, num_classes=2)
    with pytest.raises(ValueError, match=r"image 4 of shard 0 of .* has the label 5; labels are 0 to 1"):
        first_epoch(stream)


# ---- what cannot be streamed


def test_sources_that_cannot_be_streamed(tmp_path):
    for source in ("digits", save_greys(tmp_path, [1])):
        with pytest.raises(ValueError, match="cannot be streamed; leave out --streaming"):
            open_stream(source)


def test_an_empty_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the source holds no images to train on"):
        open_stream(write_shards(tmp_path / "a", [], [0]))


def test_classes_that_a_stream_cannot_count(tmp_path):
    source = write_shards(tmp_path / "a", range(4), [4], labels=(datasets.Value("int64"), [0, 1, 0, 1]))
    with pytest.raises(ValueError, match="does not say how many classes it has"):
        open_stream(source, with_labels=True)


def test_columns_are_named_as_without_a_stream(numbered):
    with pytest.raises(ValueError, match="has no column 'photo'; its columns are image"):
        open_stream(numbered, image_column="photo")
    with pytest.raises(ValueError, match="name one by --label_column"):
        open_stream(numbered, with_labels=True, num_classes=3)


@pytest.mark.parametrize("on_bad_image", ["refuse", "skip"])
def test_a_reader_without_images(tmp_path, on_bad_image):
    source = write_shards(tmp_path / "a", [1, 2], [2])
    stream, _, _ = open_stream(source, on_bad_image=on_bad_image)
    assert first_epoch(stream, reader=1, num_readers=3) == [2]
    with pytest.raises(ValueError, match="no image that can be read for reader 3 of 3: lower --num_processes"):
        first_epoch(stream, reader=2, num_readers=3)


def test_a_set_of_the_hub_at_its_commit(numbered, monkeypatch):
    """Which datasets notes in the addresses of the files, also where nothing is downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = sorted(map(str, numbered.iterdir()))
    builder = datasets.load_dataset_builder("parquet", data_files={"train": files})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source, revision: builder)
    tables = builder.as_streaming_dataset()
    monkeypatch.setattr(builder, "as_streaming_dataset", lambda: tables)
    builder.config.data_files = {"train": [f"hf://datasets/some/set@{commit}/a-{i}.parquet" for i in range(5)]}
    for source in ("some/set", f"some/set@{commit}"):
        stream, train, _ = open_stream(source, head_size=20)
        assert train.revision == commit
        assert sorted(first_epoch(stream)) == list(range(20))
    with pytest.raises(ValueError, match="could not be had at that revision"):
        open_stream(f"some/set@{commit[::-1]}")
