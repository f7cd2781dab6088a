"""Which files are data and which are held out: one answer for every source, and a line for all that is left out."""

import json
import os

import pytest

from tests.sources import grey, grey_levels, image_table, levels_of, save_greys
from tests.sources import load as load_source
from vkd_gen.data.images import ImageSpec, told_of
from vkd_gen.data.listing import SHARD, list_files
from vkd_gen.data.splits import SPLIT_WORDS, find_splits
from vkd_gen.data.streaming import stream_images
from vkd_gen.evaluation.sources import from_folder

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("datasets_cache")


def save(folder, count=6, *, start=0, end="png", side=8):
    """Images whose grey level is their number."""
    return save_greys(folder, range(start, start + count), size=(side, side), end=end)


def load(source, **options):
    return load_source(source, **{"resolution": 8, "channels": 1, **options})


def stream(source, **options):
    spec = ImageSpec(**{"resolution": 8, "channels": 1, **options})
    return stream_images(str(source), spec, head_size=20, buffer_size=4)[1:]


def paths_table(file, paths, column="image"):
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: paths}), file)
    return file


# ---- splits


def test_the_words_of_datasets_are_known():
    for split, words in datasets.data_files.SPLIT_KEYWORDS.items():
        assert {SPLIT_WORDS[word] for word in words} == {"train" if split == "train" else "test"}


# Folders; what each is for (train, test, - for left out) and its class; words of what is told
LAYOUTS = {
    "splits of classes": ("train/a Testing/a", "train a, test a", ""),
    "three splits": ("train/a validation/a test/a", "train a, test a, test a", ""),
    "names with more to them": ("train2017 val2017", "train, test", ""),
    "letters behind": ("trainA trainB testA", "train, train, test", ""),
    "one name twice": ("seg_train/seg_train/a seg_test/seg_test/a", "train a, test a", ""),
    "a folder around": ("mnist_png/training/0 mnist_png/testing/0", "train 0, test 0", ""),
    "a folder around called test": ("test/train/a test/test/a", "train a, test a", ""),
    "each class by itself": ("a/train a/test b/train", "train a, test a, train b", ""),
    "a class called train": ("bus car train", "train bus, train car, train train", "train is not taken"),
    "a class called test-tube": ("jar test-tube", "train jar, train test-tube", "test-tube is not taken"),
    "classes called train and test-tube": ("bus test-tube train", "train bus, train test-tube, train train", "1 more"),
    "classes called as splits, in splits": ("train/dev train/val test/dev", "train dev, train val, test dev", ""),
    "a class called train, and the same to test on": (
        "bus train test/bus test/train",
        "train bus, train train, test bus, test train",
        "test is held out",
    ),
    "classes and a folder to test on": ("bus car test", "train bus, train car, test", "test is held out"),
    "what is neither": ("train/a test/a extra/a .", "train a, test a, -, -", ""),
    "words that hold such words": ("valley testament strain", "train valley, train testament, train strain", ""),
    "shards with the hub's older names": (
        "train-00000-of-00001-b113bb7fb2d2b6c3 test-00000-of-00001-44110b9df98c5585",
        "train, test",
        "",
    ),
    "folders around, of which one split has no classes": ("Data/CLS/train/n01 Data/CLS/val", "train n01, test", ""),
    "each class by itself, but for one": ("a/train a/test b", "train a, test a, train b", ""),
    "shards": ("train-00000-of-00002 cifar10-test", "train, test", ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    folders, expected, words = LAYOUTS[name]
    keys = [() if folder == "." else tuple(SHARD.sub("", folder).split("/")) for folder in folders.split()]
    places, notes = find_splits(keys)
    found = [
        f"{places[key].split} {places[key].class_name or ''}".strip() if places[key].split else "-" for key in keys
    ]
    assert ", ".join(found) == expected
    assert words in " ".join(notes)
    assert bool(notes) == bool(words)


def test_what_lies_beside_splits_is_not_trained_on_and_told(tmp_path):
    for number, part in enumerate(("train", "val", "test", "query", "")):
        save(tmp_path / part, 3, start=10 * number)
    train, held_out = load(tmp_path)
    assert grey_levels(train) == [0, 1, 2]
    assert grey_levels(held_out) == [20, 21, 22, 10, 11, 12]
    assert told_of(train, held_out) == [
        "left out: 6 images beside test and train and val (040.png, 041.png, 042.png, ...)"
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ("a/train", "a/dev"),
        ("data/train-00000-of-00001-b113bb7fb2d2b6c3", "data/test-00000-of-00001-44110b9df98c5585"),
    ],
)
def test_tables_and_streams_hold_out_the_same(tmp_path, names, streaming):
    for name, numbers in zip(names, (range(12), range(50, 54)), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image_table(numbers).to_parquet(tmp_path / f"{name}.parquet")
    train, held_out = (stream if streaming else load)(tmp_path)
    assert (sorted(grey_levels(train)), sorted(grey_levels(held_out))) == (list(range(12)), [50, 51, 52, 53])


def test_an_unlabelled_folder_to_test_on_is_no_class(tmp_path):
    for part in ("train/cat", "train/dog", "test"):
        save(tmp_path / part, 3)
    with pytest.raises(
        ValueError, match=r"test/000\.png has no class: put each class' images into a folder of its own"
    ):
        load(tmp_path, with_labels=True)


@pytest.mark.parametrize("held_out", ["val/images", "test/cats"])
def test_classes_that_only_held_out_images_have_are_refused(tmp_path, held_out):
    for part in ("train/cat", "train/dog", held_out):  # val/images: Tiny ImageNet
        save(tmp_path / part, 3)
    name = held_out.split("/")[1]
    with pytest.raises(ValueError, match=rf"{held_out}/000\.png is held out and of the class '{name}', which no train"):
        load(tmp_path, with_labels=True)
    assert len(load(tmp_path)[1]) == 3


def test_a_folder_to_test_on_alone_is_taken_whole(tmp_path):
    save(tmp_path / "val" / "cat", 12)
    train, held_out = load(tmp_path)
    assert (len(train), len(held_out)) == (10, 2)
    assert "taken whole" in told_of(train)[0]


# ---- what is no data


def test_hidden_files_and_what_systems_leave_are_no_data(tmp_path):
    others = (".ipynb_checkpoints", "cat/@eaDir", "__MACOSX/cat", ".Trash-1000/files", "dog/lost+found")
    for part in ("cat", "dog", *others):
        save(tmp_path / part)
    for name in ("._000.png", "Thumbs.db", ".DS_Store", "desktop.ini", "000.png.incomplete"):
        (tmp_path / "cat" / name).write_bytes(b"\0\5\x16\7")
    for name in ("cat/000.txt", "LICENSE", "a.heic"):
        (tmp_path / name).write_text("a cat")
    train, held_out = load(tmp_path, with_labels=True)
    assert (train.num_classes, len(train), len(held_out)) == (2, 10, 2)
    (line,) = told_of(train, held_out)
    for words in ("5 hidden folders (", "5 hidden files (", "3 files of no image format (.heic, .txt, LICENSE"):
        assert words in line


def test_what_a_folder_holds_instead_is_told(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no images .*left out: 1 file of no image format \(\.tar\)"):
        load(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 6)
    folder = save(tmp_path / "data" / "cat", 6, start=10).parent
    (folder / "dog").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "cat" / "loop").symlink_to(folder)
    train, held_out = load(folder, with_labels=True)
    assert levels_of([train, held_out]) == [*range(6), *range(10, 16)]
    assert train.num_classes == 2
    assert "2 links to a folder that is read anyway" in told_of(train)[0]


LINKS = {  # what there is, the links, and what is trained on and held out
    "to a file that is data": ("cat/1 dog/2", "best/1>../cat/1", "cat/1 dog/2", ""),
    "to a file that is trained on": ("train/1 train/2", "val/1>../train/1", "train/2", "val/1"),
    "to files beside splits": ("all/1 all/2", "train/1>../all/1 val/2>../all/2", "train/1", "val/2"),
    "two snapshots of the hub's": (".blobs/1", "a/1>../.blobs/1 b/1>../.blobs/1", "a/1", ""),
    "to a hidden folder": (".store/cat/1 dog/1", "cat>.store/cat", "cat/1 dog/1", ""),
    "as Kubernetes mounts": ("..2024/cat/1", "..data>..2024 cat>..data/cat", "cat/1", ""),
    "to a folder around": ("train/1 val/2", "train/up>../.. train/up2>..", "train/1", "val/2"),
}


@pytest.mark.parametrize("name", LINKS)
def test_no_link_brings_an_image_twice(tmp_path, name):
    files, links, *expected = LINKS[name]
    root = tmp_path / "data"
    for file in files.split():
        save((root / file).parent, 1).joinpath("000.png").rename(root / f"{file}.png")
    for link in links.split():
        place, target = link.split(">")
        end = ".png" if place[-1].isdigit() and "up" not in place else ""
        (root / place).parent.mkdir(exist_ok=True)
        (root / f"{place}{end}").symlink_to(f"{target}{end}")
    listing = list_files(str(root))
    found = [listing.splits.get(split, []) for split in ("train", "test")]
    assert [" ".join(str(file.relative_to(root).with_suffix("")) for file in part) for part in found] == expected
    assert "left out" in listing.notes[0]


def test_folders_of_runs_among_images_are_no_data(tmp_path):
    save(tmp_path, 6)
    (save(tmp_path / "runs" / "a" / "previews", 3).parent / "run.lock").touch()
    train, held_out = load(tmp_path)
    assert len(train) + len(held_out) == 6
    assert told_of(train) == ["left out: 1 folder of a run (runs/a)"]


@pytest.mark.parametrize("kind", ["pipe", "nowhere"])
def test_a_table_that_is_no_file_is_told(tmp_path, kind):
    os.mkfifo(tmp_path / "x.parquet") if kind == "pipe" else (tmp_path / "x.parquet").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"cannot read .*x\.parquet: (it is no file|there is no such file)"):
        load(tmp_path)


@pytest.mark.parametrize("end", ["jfif", "ppm", "tga", "JPEG"])
def test_what_pil_decodes_is_an_image(tmp_path, end):
    assert sum(map(len, load(save(tmp_path, 6, end=end)))) == 6


@pytest.mark.parametrize("end", ["eps", "pdf", "h5", "pfm"])
def test_what_pil_would_hand_to_a_program_is_none(tmp_path, end):
    save(tmp_path, 6)
    (tmp_path / f"x.{end}").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    train, held_out = load(tmp_path)
    assert len(train) + len(held_out) == 6
    assert told_of(train) == [f"left out: 1 file of no image format (.{end})"]


def test_a_folder_to_score_is_listed_the_same_way(tmp_path):
    save(tmp_path, 6)
    save(tmp_path / "__MACOSX", 2, side=4)
    source = from_folder(str(tmp_path))
    assert source.count == 6
    assert source.notes == ["left out: 1 hidden folder (__MACOSX)"]


# ---- tables


def test_saved_tables_are_what_their_state_lists(tmp_path):
    image_table(range(12)).save_to_disk(tmp_path / "a")
    for name in ("cache-0123456789abcdef.arrow", "more.arrow"):
        os.link(next((tmp_path / "a").glob("data-*.arrow")), tmp_path / "a" / name)
    train, held_out = load(tmp_path / "a", channels=3)
    assert levels_of([train, held_out]) == list(range(12))
    assert "2 cached arrow files" in told_of(train)[0]
    (tmp_path / "a/more.arrow").unlink()
    (tmp_path / "a/state.json").rename(tmp_path / "state.json")  # as in the folders that datasets keeps itself
    assert levels_of(load(tmp_path / "a", channels=3)) == list(range(12))
    (tmp_path / "state.json").rename(tmp_path / "a/state.json")
    next((tmp_path / "a").glob("data-*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"state\.json lists data-00000-of-00001\.arrow, which is not there"):
        load(tmp_path / "a")


@pytest.mark.parametrize("stray", ["metadata.parquet", "damaged.parquet"])
def test_tables_beside_images_do_not_hide_them(tmp_path, stray):
    save(tmp_path, 12)
    if stray == "metadata.parquet":
        paths_table(tmp_path / stray, ["000.png"], column="file_name")
    else:
        (tmp_path / stray).write_text("file_name,text\n000.png,a cat\n")
    train, held_out = load(tmp_path)
    assert len(train) + len(held_out) == 12
    assert "left out: 1 table " in told_of(train)[0]


def test_images_beside_tables_of_images_and_tables_without(tmp_path):
    image_table(range(6)).to_parquet(tmp_path / "a.parquet")
    paths_table(tmp_path / "captions.parquet", ["a cat"], column="text")
    save(tmp_path, 2, start=100)
    train, held_out = load(tmp_path)
    assert levels_of([train, held_out]) == list(range(6))
    assert "1 table without images (captions.parquet), 2 images beside the tables" in told_of(train)[0]


def test_paths_are_relative_to_their_table(tmp_path, monkeypatch):
    save(tmp_path / "set" / "images", 12)
    table = paths_table(tmp_path / "set" / "table.parquet", [f"images/{number:03}.png" for number in range(12)])
    save(tmp_path / "images", 12, start=0, side=4)
    monkeypatch.chdir(tmp_path)  # where files of the same names lie
    train, held_out = load(table, image_column="image")
    assert levels_of([train, held_out]) == list(range(12))
    assert train.read(0).size == (8, 8)
    assert told_of(train) == []
    (tmp_path / "set/images/005.png").unlink()
    with pytest.raises(
        ValueError, match=r"cannot read image 5 of .*table\.parquet, .*set/images/005\.png: No such file"
    ):
        load(table, image_column="image")


@pytest.mark.parametrize("kind", ["absolute", "dots"])
def test_paths_out_of_the_folder_are_told_and_never_streamed(tmp_path, kind):
    save(tmp_path / "private", 12)
    start = str(tmp_path / "private") if kind == "absolute" else "../private"
    table = paths_table(tmp_path / "set" / "a.parquet", [f"{start}/{number:03}.png" for number in range(12)])
    train, _ = load(table, image_column="image")
    assert told_of(train) == [f"12 images lie outside {tmp_path / 'set'}, such as {tmp_path / 'private/000.png'}"]
    with pytest.raises(ValueError, match=rf"it is .*private/0..\.png, outside {tmp_path / 'set'}"):
        stream(table, image_column="image")[0].stack()
    paths_table(table, ["../nowhere.png"] * 6)  # nor is it looked for
    with pytest.raises(ValueError, match=r"nowhere\.png, outside"):
        stream(table, image_column="image")[0].stack()


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_unlike_columns_are_named(tmp_path, streaming):
    image_table(range(6)).to_parquet(tmp_path / "a.parquet")
    image_table(range(6)).add_column("height", list(range(6))).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has height, which .*a\.parquet has not .its columns are image"):
        (stream if streaming else load)(tmp_path)


def test_tables_of_unlike_types_say_why(tmp_path):
    for name, values in (("a", [1, 2]), ("b", ["x", "y"])):
        table = pyarrow.table({"image": [b"1", b"2"], "label": values})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet and 1 more: .*Failed to parse string"):
        load(tmp_path, image_column="image")


@pytest.mark.parametrize("source", ["", "a.parquet"])
def test_a_wrong_column_names_the_file_and_its_columns(tmp_path, source):
    image_table(range(6), column="img").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'image'; its columns are img"):
        load(tmp_path / source, image_column="image")


def test_tables_of_two_kinds_are_refused(tmp_path):
    image_table(range(6)).save_to_disk(tmp_path / "saved")
    image_table(range(6)).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"tables of two kinds: .*a\.parquet and .*\.arrow; name one"):
        load(tmp_path)


def test_another_programs_state_is_none_of_datasets(tmp_path):
    save(tmp_path, 6)
    (tmp_path / "state.json").write_text(json.dumps({"step": 3}))
    assert sum(map(len, load(tmp_path))) == 6


# ---- enlarging


@pytest.mark.parametrize(("resolution", "words"), [(32, None), (40, "images of 8 pixels are enlarged 5 times, to 40")])
def test_enlarged_images_are_told_of(resolution, words):
    assert told_of(*load("digits", resolution=resolution)) == ([words] if words else [])


@pytest.mark.parametrize("resolution", [513, 16384])
def test_images_are_not_enlarged_beyond_sense(resolution):
    with pytest.raises(
        ValueError, match=rf"digits: images of 8 pixels are enlarged \d+ times, to {resolution}; more than 64"
    ):
        load("digits", resolution=resolution)


@pytest.mark.parametrize("large", range(3))
def test_thumbnails_do_not_speak_for_all(tmp_path, large):
    """The largest of three evenly spaced images does."""
    train, _ = load(save(tmp_path, 12, side=1), resolution=64)
    number = train.indices[large * len(train) // 3]
    grey(0, (64, 64)).save(tmp_path / f"{number:03}.png")
    assert told_of(*load(tmp_path, resolution=64)) == []
