"""Rows that are kept on disk: their name, their files, damage, room, processes that share the work; and images."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.faults.small_run import end_of, start_processes
from tests.sources import encoded, image_table, labels_of, load
from vkd_gen.data import cache
from vkd_gen.data.cache import cache_images, keep_rows
from vkd_gen.data.images import evenly_spaced
from vkd_gen.provenance import write_json

FACTS = {"seed": 0}


class Squares:
    """Rows of a number's square and of its last bit; counts what it is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows):
        self.asked += rows
        numbers = torch.tensor(list(rows))
        return {"square": numbers.double()[:, None] ** 2, "bit": (numbers % 2).to(torch.bfloat16)}


@pytest.fixture(autouse=True)
def _four_rows_a_file(monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 45)  # rows are of 10 bytes


def keep(folder, compute=None, *, facts=FACTS, num_rows=10):
    return keep_rows(
        folder, facts, num_rows, compute or Squares(), what="squares of numbers", advice="ask for fewer of them"
    )


def files(folder):
    return sorted(path for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(("file_bytes", "num_files"), [(45, 3), (1, 10), (1000, 1)])
def test_rows_in_any_order_and_from_several_files(tmp_path, monkeypatch, file_bytes, num_files):
    monkeypatch.setattr(cache, "FILE_BYTES", file_bytes)
    kept = keep(tmp_path)
    assert len(files(tmp_path)) == num_files
    rows = kept[[9, 0, 1, 5, 5, 4, 8]]
    assert rows["square"].tolist() == [[81], [0], [1], [25], [25], [16], [64]]
    assert rows["bit"].tolist() == [1, 0, 1, 1, 1, 0, 0]
    assert rows["bit"].dtype == torch.bfloat16
    assert load_file(files(tmp_path)[0])["square"][0] == 0  # safetensors, as others read them


def test_rows_are_copies_and_the_files_stay_as_they_are(tmp_path):
    kept, (first, *_) = keep(tmp_path), files(tmp_path)
    content = first.read_bytes()
    kept[[1]]["square"].zero_()
    assert kept[[1]]["square"].item() == 1
    assert first.read_bytes() == content


def test_what_is_there_is_not_computed_again(tmp_path):
    keep(tmp_path, facts={"seed": 1, "size": 2})
    again = Squares()
    assert keep(tmp_path, again, facts={"size": 2, "seed": 1})[range(10)]["square"].flatten().tolist() == [
        n**2 for n in range(10)
    ]
    assert again.asked == [0]  # which tells the layout


def test_an_interrupted_start_goes_on(tmp_path):
    def interrupted(rows):
        if 4 in rows:
            raise KeyboardInterrupt
        return Squares()(rows)

    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, interrupted)
    again = Squares()
    keep(tmp_path, again)
    assert again.asked == [0, *range(4, 10)]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("change", ["facts", "num_rows", "name", "type", "shape", "format"])
def test_whatever_decides_the_rows_is_in_the_name(change, tmp_path, monkeypatch):
    changed = {
        "name": lambda rows: {"cube": torch.zeros(len(rows))},
        "type": lambda rows: {name: value.float() for name, value in Squares()(rows).items()},
        "shape": lambda rows: {name: value[..., None] for name, value in Squares()(rows).items()},
    }
    keep(tmp_path)
    if change == "format":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    kept = keep(
        tmp_path,
        changed.get(change),
        facts={"more": 2, "seed": 1} if change == "facts" else {"seed": 0},
        num_rows=9 if change == "num_rows" else 10,
    )
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert kept.folder in folders
    assert json.loads((kept.folder / "facts.json").read_text())["seed"] == (change == "facts")


# ---- damage


DAMAGE = {
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-3]),
    "a flipped bit": lambda path, other: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "empty": lambda path, other: path.write_bytes(b""),
    "another file's": lambda path, other: path.write_bytes(other.read_bytes()),
    "of a strange type": lambda path, other: path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"QF16"')),
    "without a hash": lambda path, other: save_file(load_file(path), path),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_told_of_and_made_again(name, tmp_path, capsys):
    keep(tmp_path)
    other, path, _ = files(tmp_path)
    whole = path.read_bytes()
    DAMAGE[name](path, other)
    assert path.read_bytes() != whole
    capsys.readouterr()
    again = Squares()
    keep(tmp_path, again)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "is damaged" in line)
    assert f"{path} is damaged and made again: " in line
    assert again.asked == [0, 4, 5, 6, 7]
    assert path.read_bytes() == whole


def test_a_file_that_is_missing_is_made_again(tmp_path, capsys):
    keep(tmp_path)
    files(tmp_path)[2].unlink()
    again = Squares()
    keep(tmp_path, again)
    assert again.asked == [0, 8, 9]
    assert "is damaged" not in capsys.readouterr().out


# ---- room


def disk_with(monkeypatch, free):
    usage = cache.shutil.disk_usage
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(path)._replace(free=free))


def test_what_does_not_fit_is_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    disk_with(monkeypatch, 99)
    compute = Squares()
    with pytest.raises(ValueError, match=r"squares of numbers do not fit .* 0\.0 MB are free; ask for fewer of them"):
        keep(tmp_path / "new", compute)
    assert compute.asked == [0]
    assert not (tmp_path / "new").exists()
    assert "10 squares of numbers: 10 bytes each, 0.0 MB in" in capsys.readouterr().out


def test_only_what_is_missing_needs_room(tmp_path, monkeypatch):
    keep(tmp_path)
    files(tmp_path)[2].unlink()
    disk_with(monkeypatch, 20)
    keep(tmp_path)
    files(tmp_path)[2].unlink()
    disk_with(monkeypatch, 19)
    with pytest.raises(ValueError, match="do not fit"):
        keep(tmp_path)


def test_a_disk_that_is_full_all_the_same(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(ValueError, match=r"squares of numbers cannot be written to .*: No space left on device"):
        keep(tmp_path)
    assert not files(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .*: (Not a directory|File exists)"):
        keep(tmp_path / "file")


# ---- processes


def test_a_process_is_sent_no_content(tmp_path):
    kept = keep(tmp_path)
    before = len(pickle.dumps(kept))
    kept[range(10)]
    assert len(pickle.dumps(kept)) == before
    assert pickle.loads(pickle.dumps(kept))[[3]]["square"].item() == 9


def keep_as_one_of_two(folder):
    cache.FILE_BYTES = 45
    state, compute = PartialState(cpu=True), Squares()
    rows = keep(folder / "shared", compute)[range(10)]
    found = {"asked": compute.asked, "rows": rows["square"].flatten().tolist()}

    def bad(rows):
        if 8 in rows:
            raise ValueError("row 8 cannot be read")
        return Squares()(rows)

    for name, arguments in {"bad": (folder / "bad", bad), "unseen": (folder / str(state.process_index),)}.items():
        with pytest.raises(ValueError) as error:
            keep(*arguments)
        found[name] = str(error.value)
    write_json(folder / f"{state.process_index}.json", found)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    processes = start_processes(2, keep_as_one_of_two, folder, output=folder / "output")
    assert end_of(processes, within=120) == [0, 0], (folder / "output").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_share_the_work_and_see_the_same(two_processes):
    assert [found["asked"] for found in two_processes] == [[0, *range(4), 8, 9], [0, *range(4, 8)]]
    assert [found["rows"] for found in two_processes] == [[n**2 for n in range(10)]] * 2


def test_a_mistake_in_one_process_ends_both(two_processes):
    assert [found["bad"] for found in two_processes] == ["row 8 cannot be read"] * 2


def test_processes_that_see_other_folders_are_told(two_processes):
    """Each has a folder of its own, where the files of the other never come."""
    for found in two_processes:
        assert "is not there: all processes must see the same folder" in found["unseen"]


# ---- images


@pytest.fixture
def folder(tmp_path):
    """Images of noise, 7 x 9 pixels."""
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(14):
        Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [1, 7, 12])
def test_pixels_are_the_same(folder, tmp_path, channels, resolution):
    images, _ = load(folder, channels=channels, resolution=resolution)
    cached = cache_images(images, tmp_path / "cache")
    everything = range(len(images))
    assert torch.equal(cached.pixels(everything), images.pixels(everything))
    assert all(torch.equal(cached[index], images[index]) for index in everything)
    few, cached_few = evenly_spaced(images, 5), evenly_spaced(cached, 5)
    assert torch.equal(cached_few.pixels(range(5)), few.pixels(range(5)))


def test_images_are_decoded_once(folder, tmp_path):
    images, _ = load(folder)
    read = []
    counting = replace(images, read=lambda number: read.append(number) or images.read(number))
    cached = cache_images(counting, tmp_path / "cache")
    assert sorted(read) == sorted([*images.indices.tolist(), images.indices[0]])  # the first one tells the layout too
    read.clear()
    cached.pixels(range(len(images)))
    assert not read
    cache_images(counting, tmp_path / "cache")
    assert read == [images.indices[0]]


def test_labels_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 2**28)
    images, _ = load("digits", resolution=8, channels=1, with_labels=True)
    cached = cache_images(images, tmp_path)
    assert labels_of(cached) == labels_of(images)
    assert (cached.name, cached.num_classes, len(cached)) == ("digits", 10, len(images))
    assert torch.equal(cached.pixels(range(50)), images.pixels(range(50)))
    assert len(pickle.dumps(cached)) < 50_000  # the labels, but no pixels
    assert torch.equal(pickle.loads(pickle.dumps(cached))[3], images[3])


def test_whatever_decides_the_pixels_is_in_the_name(folder, tmp_path, monkeypatch):
    def num_folders(*sets):
        for images in sets:
            cache_images(images, tmp_path / "cache")
        return len(list((tmp_path / "cache").iterdir()))

    images, held_out = load(folder)
    others = [load(folder, resolution=5)[0], load(folder, channels=1)[0], evenly_spaced(images, 3), held_out]
    assert num_folders(images, *others, load(folder)[0]) == 5
    folder = folder.rename(tmp_path / "moved")
    assert num_folders(load(folder)[0]) == 5
    file = folder / "03.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert num_folders(load(folder)[0]) == 6
    file.write_bytes((folder / "04.png").read_bytes())
    assert num_folders(load(folder)[0]) == 7
    file.rename(folder / "03b.png")
    assert num_folders(load(folder)[0]) == 8
    monkeypatch.setattr(cache.PIL, "__version__", "0")
    assert num_folders(load(folder)[0]) == 9


def test_a_table_and_its_column_are_in_the_name(folder, tmp_path, datasets_cache):
    datasets = pytest.importorskip("datasets")
    path, cells = tmp_path / "a.parquet", [file.read_bytes() for file in sorted(folder.iterdir())]

    def name(column):
        images, _ = load(path, image_column=column)
        cached = cache_images(images, tmp_path / "cache")
        assert torch.equal(cached.pixels(range(5)), images.pixels(range(5)))
        return cached.read.args[0].folder.name

    names = []
    for contents in (cells, cells[::-1]):
        other = image_table([encoded(0)] * 14, column="other")
        datasets.concatenate_datasets([image_table(contents), other], axis=1).to_parquet(path)
        os.utime(path, ns=(0, len(names) * 10**9))
        names += [name("image"), name("other")]
        assert name("image") == names[-2]
    assert len(set(names)) == 4


def test_a_bad_image_is_named(folder, tmp_path):
    images, _ = load(folder)
    number = int(images.indices[2])
    file = folder / f"{number:02}.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"cannot read the image .*{number:02}\.png"):
        cache_images(images, tmp_path / "cache")
