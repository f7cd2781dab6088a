"""Rows that are kept on disk: their name, their files, damage, room, and processes that share the work."""

import json
import os
import pickle

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from tests.faults.small_run import end_of, start_processes
from vkd_gen.data import cache
from vkd_gen.data.cache import KeptRows, keep_rows
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


def test_rows_in_any_order_and_from_several_files(tmp_path):
    kept = keep(tmp_path)
    assert len(files(tmp_path)) == 3
    rows = kept[[9, 0, 1, 5, 5, 4, 8]]
    assert rows["square"].tolist() == [[81], [0], [1], [25], [25], [16], [64]]
    assert rows["bit"].tolist() == [1, 0, 1, 1, 1, 0, 0]
    assert rows["bit"].dtype == torch.bfloat16


def test_rows_are_copies_and_the_files_stay_as_they_are(tmp_path):
    kept, (first, *_) = keep(tmp_path), files(tmp_path)
    content = first.read_bytes()
    kept[[1]]["square"].zero_()
    assert kept[[1]]["square"].item() == 1
    assert first.read_bytes() == content


def test_what_is_there_is_not_computed_again(tmp_path):
    keep(tmp_path)
    again = Squares()
    assert keep(tmp_path, again)[range(10)]["square"].flatten().tolist() == [n**2 for n in range(10)]
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


def test_the_file_is_one_that_safetensors_reads(tmp_path):
    keep(tmp_path)
    assert load_file(files(tmp_path)[1])["square"].flatten().tolist() == [16, 25, 36, 49]


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
        facts={"seed": 1} if change == "facts" else FACTS,
        num_rows=9 if change == "num_rows" else 10,
    )
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert kept.folder in folders
    assert json.loads((kept.folder / "facts.json").read_text())["seed"] == (change == "facts")


def test_the_name_does_not_depend_on_the_order_of_facts(tmp_path):
    folders = {keep(tmp_path, facts=facts).folder for facts in ({"a": 1, "b": 2}, {"b": 2, "a": 1})}
    assert len(folders) == 1


# ---- damage


def truncate(path, others):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path, others):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path, others):
    path.write_bytes(b"")


def swap(path, others):
    path.write_bytes(others[0].read_bytes())


def strange_type(path, others):
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"QF16"'))


def without_hash(path, others):
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, swap, strange_type, without_hash])
def test_a_damaged_file_is_told_of_and_made_again(damage, tmp_path, capsys):
    keep(tmp_path)
    others = files(tmp_path)
    path = others.pop(1)
    whole = path.read_bytes()
    damage(path, others)
    assert path.read_bytes() != whole
    capsys.readouterr()
    again = Squares()
    keep(tmp_path, again)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(lines) == 1
    assert f"{path} is damaged and made again: " in lines[0]
    assert again.asked == [0, 4, 5, 6, 7]
    assert path.read_bytes() == whole


def test_a_file_that_is_missing_is_made_again(tmp_path, capsys):
    keep(tmp_path)
    files(tmp_path)[2].unlink()
    again = Squares()
    keep(tmp_path, again)
    assert again.asked == [0, 8, 9]
    assert "is damaged" not in capsys.readouterr().out


def test_temporaries_of_killed_processes_are_removed_and_others_left(tmp_path):
    folder = keep(tmp_path).folder
    old, new = folder / "00000.1.tmp", folder / "00001.2.tmp"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    files(tmp_path)[0].unlink()
    keep(tmp_path)
    assert not old.exists()
    assert new.exists()


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


def test_rows_per_file_is_at_least_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 1)
    kept = keep(tmp_path, num_rows=3)
    assert isinstance(kept, KeptRows)
    assert len(files(tmp_path)) == 3
    assert kept[[2, 0]]["square"].tolist() == [[4], [0]]
