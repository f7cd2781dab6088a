"""Damaged checkpoints, full disks, folders that vanish, and configurations that differ."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FORMATS, one_line, write_payload
from tests.faults.small_run import STEPS, end_as, end_of, error_of, options_of, run_to_end, start_processes, train
from tests.recipes.conftest import read_metrics, reseal, without_times
from vkd_gen.training.checkpoints import check_checkpoint, find_fault, read_manifest, seal
from vkd_gen.training.options import flat_config
from vkd_gen.training.run_folder import RunFolder

PICKLES = [*(f"custom_checkpoint_{number}.pkl" for number in range(3)), "optimizer.bin", "random_states_0.pkl"]
FILES = ["model.safetensors", *PICKLES, "config.json", "manifest.json"]


def flip(path, share):
    """One bit at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 2))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped at the start": lambda path: flip(path, 0),
    "flipped in the middle": lambda path: flip(path, 0.5),
    "flipped at the end": lambda path: flip(path, 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another's": lambda path: shutil.copy(path.parents[1] / "checkpoint-9" / path.name, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def checkpoint(straight, tmp_path):
    """The last checkpoint of a copy of the undisturbed run."""
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run" / f"checkpoint-{STEPS}"


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (damage, file) if file == "model.safetensors" or damage == "flipped in the middle" else slow(damage, file)
        for damage in DAMAGES
        for file in FILES
    ],
)
def test_every_damage_is_found(damage, file, checkpoint, capsys):
    before = (checkpoint / file).read_bytes()
    DAMAGES[damage](checkpoint / file)
    if (checkpoint / file).is_file() and (checkpoint / file).read_bytes() == before:
        pytest.skip("that file is the same in both checkpoints")
    folder = RunFolder(checkpoint.parent)
    assert folder.resume_point("latest").name == "checkpoint-9"
    assert folder.resume_point("latest").name == "checkpoint-9"
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert f"checkpoint-{STEPS} is damaged and left out" in told
    assert file in told
    with pytest.raises(ValueError, match=f"checkpoint-{STEPS} is damaged: .*{file}"):
        folder.resume_point(f"checkpoint-{STEPS}")


def test_a_whole_checkpoint_has_no_fault_and_holds_all_there_is(straight):
    checkpoint = straight / f"checkpoint-{STEPS}"
    assert find_fault(checkpoint) is None
    assert sorted([*read_manifest(checkpoint)["files"], "manifest.json"]) == sorted(FILES)
    assert read_manifest(checkpoint)["num_processes"] == 1
    states = [torch.load(checkpoint / name, weights_only=True) for name in PICKLES[:3]]
    assert states[0]["last_epoch"] == STEPS
    assert len(states[2]["shadow_params"]) > 10
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads((straight / "config.json").read_text())


def test_large_files_are_left_to_the_first_process(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "large").write_bytes(bytes(100))
    seal(folder, {"step": 1})
    flip(folder / "large", 0.5)
    assert find_fault(folder, hash_up_to=99) is None
    assert find_fault(folder) == "large is not as it was written"


def test_none_whole_is_no_reason_to_start_anew(checkpoint):
    folder = RunFolder(checkpoint.parent)
    for each in folder.checkpoints():
        (each / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*remove them"):
        folder.resume_point("latest")


def test_a_run_goes_on_from_before_the_damage(checkpoint, straight, tmp_path):
    run = checkpoint.parent
    (run / "weights.safetensors").unlink()
    flip(checkpoint / "optimizer.bin", 0.5)
    output = end_as(straight, options_of(run), tmp_path / "output")
    assert "optimizer.bin is not as it was written" in output
    assert "going on from" in output
    assert find_fault(checkpoint) is None
    assert (run / f"set-aside-checkpoint-{STEPS}").is_dir()


def test_these_are_all_pickles_of_a_checkpoint(checkpoint):
    found = {path.name for path in checkpoint.iterdir() if path.suffix not in (".safetensors", ".json")}
    assert found == set(PICKLES)
    check_checkpoint(checkpoint)
    check_checkpoint(None)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "zip") for name in PICKLES), *((PICKLES[0], kind) for kind in FORMATS[1:])]
)
def test_a_pickle_in_a_checkpoint_is_not_executed(checkpoint, executed, name, kind):
    """The recipes look before they load anything: see tests/recipes/test_bad_input.py."""
    write_payload(checkpoint / name, executed, kind)
    with one_line(rf"the checkpoint's file .*{name} is not loaded: "):
        check_checkpoint(checkpoint)


def test_a_truncated_file_and_shards_of_a_checkpoint(checkpoint, executed):
    (checkpoint / "custom_checkpoint_1.pkl").write_bytes((checkpoint / "custom_checkpoint_1.pkl").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"custom_checkpoint_1.pkl is not loaded"):
        check_checkpoint(checkpoint)
    (checkpoint / "optimizer_0").mkdir()
    write_payload(checkpoint / "optimizer_0" / ".metadata", executed, "pickle")
    with pytest.raises(ValueError, match=r"the checkpoint holds a folder, .*optimizer_0; shards"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"num_processes": "1"}', "num_processes is '1'"),
        ('{"train_batch_size": null}', "train_batch_size is 'None'"),
        ('{"train_batch_size": true}', "train_batch_size is 'True'"),
        ('{"gradient_accumulation_steps": [1]}', r"gradient_accumulation_steps is '\[1\]'"),
        ('{"gradient_accumulation_steps": 0}', "gradient_accumulation_steps is '0'"),
    ],
)
def test_a_configuration_that_is_none_is_told_in_one_line(text, words, checkpoint):
    (checkpoint / "config.json").write_text(text)
    reseal(checkpoint)
    now = {**flat_config(options_of(checkpoint.parent)), "num_processes": 1}
    with one_line(f"config.json is damaged: .*{words}"):
        RunFolder(checkpoint.parent).check(now, RunFolder(checkpoint.parent).resume_point("latest"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": "0", "learning_rate": [1]}, r"--seed was '0' and is 0; --learning_rate was \[1\] and is 0.01"),
        ({"lr_scheduler": {"a": None}}, "--lr_scheduler was {'a': None} and is 'cosine'"),
        ({"seed": 7, "learning_rate": 0.5}, "--seed was 7 and is 0; --learning_rate was 0.5 and is 0.01"),
        ({"train_batch_size": 2}, r"2 images per step \(1 x 2 images in 1 forward pass\), now there are 4"),
        ({"gradient_accumulation_steps": 2}, r"8 images per step \(1 x 4 images in 2 forward passes\), now there are"),
    ],
)
def test_other_flags_or_of_another_type_are_another_run(values, words, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))
    reseal(checkpoint)
    now = {**flat_config(options_of(checkpoint.parent)), "num_processes": 1}
    with pytest.raises(ValueError, match=words):
        RunFolder(checkpoint.parent).check(now, RunFolder(checkpoint.parent).resume_point("latest"))


@pytest.mark.parametrize(
    "facts",
    [
        *({"step": step} for step in ("12", None, True)),
        *({"num_processes": count} for count in ("one", [1])),
        *({"files": files} for files in (None, [], {"a": 5}, {"a": {"size": "5"}})),
        *({"files": {path: {"size": 1}}} for path in ("../x", "/x")),
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_a_fault(facts, tmp_path):
    content = {"step": STEPS, "num_processes": 1, "files": {}, **facts}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))
    assert find_fault(tmp_path) == "manifest.json is of no checkpoint"


def narrow(path):
    save_file({name: value.flatten()[:1].clone() for name, value in load_file(path).items()}, path)


OTHERS = {
    "custom_checkpoint_1.pkl": lambda path: torch.save({}, path),
    "model.safetensors": narrow,
    "optimizer.bin": lambda path: torch.save([1], path),
}


@pytest.mark.parametrize("file", [file if file == "custom_checkpoint_1.pkl" else slow(file) for file in OTHERS])
def test_what_is_whole_but_something_else_is_told_in_one_line(file, checkpoint, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    (checkpoint.parent / "weights.safetensors").unlink()
    OTHERS[file](checkpoint / file)
    reseal(checkpoint)
    with pytest.raises(
        ValueError, match=r"checkpoint-12 cannot be loaded: |cannot read statistics of features"
    ) as error:
        train(options_of(checkpoint.parent))
    assert "\n" not in str(error.value)
    assert not (checkpoint.parent / "weights.safetensors").exists()


# ---- which checkpoints are kept


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [(1, 0, [12]), (2, 0, [10, 12]), (1, 4, [4, 8, 12]), (2, 6, [6, 10, 12]), (9, 0, [2, 4, 6, 8, 10, 12])],
)
def test_checkpoints_are_kept(keep, every, kept, tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for step in range(2, 13, 2):
        (tmp_path / f".vkd-gen.checkpoint-{step}").mkdir()
        folder.finish_checkpoint(tmp_path / f".vkd-gen.checkpoint-{step}", {"step": step})
        folder.remove_old_checkpoints(keep, every)
    assert [path.name for path in folder.checkpoints()] == [f"checkpoint-{step}" for step in kept]
    assert not list(tmp_path.glob(".*"))


# ---- a disk that is full


def train_on_a_disk_that_fills(options, number):
    """From the n-th file operation in a checkpoint on, nothing can be written there: ENOSPC."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event not in ("open", "os.mkdir", "os.rename") or "/.vkd-gen.checkpoint-6" not in str(arguments[0]):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax")):
            return
        seen += 1
        if seen >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    sys.addaudithook(hook)
    train(options)


def check_failed_write(status, output, run, straight, tmp_path):
    """One line, status 2, the checkpoint before it whole, no temporary; with room the run ends as it should."""
    assert status == 2, output
    error = error_of(output)
    assert "checkpoint-3 is kept, and --resume_from_checkpoint latest goes on from it" in error
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-3"]
    assert not list(run.glob(".*"))
    assert find_fault(run / "checkpoint-3") is None
    end_as(straight, options_of(run), tmp_path / "again")
    return error


@pytest.mark.parametrize("number", [6, *map(slow, (1, 2, 3, 4, 5))])
def test_no_space_left_at_any_operation(number, straight, tmp_path):
    options = options_of(tmp_path / "run")
    status, output = run_to_end(train_on_a_disk_that_fills, options, number, output=tmp_path / "output")
    error = check_failed_write(status, output, tmp_path / "run", straight, tmp_path)
    assert "checkpoint-6 could not be written" in error
    assert "No space left on device" in error


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of so many kilobytes; skips where that is not allowed."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk-{kilobytes}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kilobytes", [560, *map(slow, (440, 500, 620))])
def test_a_disk_that_is_really_full(kilobytes, straight, mount, tmp_path):
    disk = mount(kilobytes)
    status, output = run_to_end(train, options_of(disk / "run"), output=tmp_path / "output")
    assert "No space left on device" in output
    shutil.copytree(disk / "run", tmp_path / "run")
    check_failed_write(status, output, tmp_path / "run", straight, tmp_path)


def make_read_only(disk):
    """As the kernel does with a disk that has failed."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def test_a_run_on_a_disk_that_is_read_only_does_not_start(straight, mount, tmp_path):
    disk = mount(2000)
    shutil.copytree(straight, disk / "other")
    make_read_only(disk)
    for resume in (None, str(disk / "other" / "checkpoint-9")):
        (tmp_path / "output").unlink(missing_ok=True)
        options = options_of(disk / "run", resume_from_checkpoint=resume)
        status, output = run_to_end(train, options, output=tmp_path / "output")
        assert status == 2, output
        assert "Read-only file system" in error_of(output)
        assert str(disk / "run") in error_of(output)


def train_without(options, name):
    """The folder `name` is removed after four steps."""

    def remove(loop, batch, losses):
        if loop.step == 4:
            shutil.rmtree(Path(options.output_dir) / name)

    train(options, before_step=remove)


@pytest.mark.slow
def test_a_checkpoint_that_is_deleted_meanwhile_is_not_missed(straight, tmp_path):
    end_as(straight, options_of(tmp_path / "run"), tmp_path / "output", train_without, "checkpoint-3")


def test_a_run_whose_folder_is_deleted_ends(tmp_path):
    status, output = run_to_end(train_without, options_of(tmp_path / "run"), ".", output=tmp_path / "output")
    assert status == 2, output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


# ---- resuming as something else


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of one process that ended, whose second half is to be made again."""
    folder = tmp_path_factory.mktemp("half")
    status, output = run_to_end(train, options_of(folder / "run", checkpoints_total_limit=9), output=folder / "output")
    assert status == 0, output
    for step in (9, 12):
        shutil.rmtree(folder / "run" / f"checkpoint-{step}")
    (folder / "run" / "weights.safetensors").unlink()
    return folder / "run"


def test_what_may_change_is_told(half, straight, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    changes = {"checkpoints_total_limit": 1, "checkpointing_steps": 4, "checkpoints_keep_every_steps": 6}
    output = end_as(straight, options_of(tmp_path / "run", **changes), tmp_path / "output")
    told = next(line for line in output.splitlines() if "without effect on what is trained" in line)
    for words in ("--checkpoints_total_limit was 9 and is 1", "--checkpointing_steps was 3 and is 4"):
        assert words in told
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()] == ["checkpoint-6", "checkpoint-12"]


@pytest.mark.parametrize(("processes", "size", "passes"), [(2, 2, 1), slow(1, 2, 2)])
def test_another_split_of_the_same_batch_goes_on(processes, size, passes, half, straight, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    changes = {"train_batch_size": size, "gradient_accumulation_steps": passes}
    started = start_processes(
        processes, train_without_dropout, options_of(tmp_path / "run", **changes), output=tmp_path / "output"
    )
    statuses = end_of(started, within=120)
    output = (tmp_path / "output").read_text()
    assert statuses == [0] * processes, output
    assert "not equal bit for bit are the order of sums, random numbers inside the model (dropout)" in output
    same, other = (without_times(read_metrics(run)) for run in (straight, tmp_path / "run"))
    assert [line["step"] for line in other] == [line["step"] for line in same]
    assert other[0] == same[0]  # made before
    for name in ("loss/denoising", "loss/feature", "gradient_norm"):  # dropout differs, the images do not
        assert other[-1][name] == pytest.approx(same[-1][name], rel=0.2)


def train_without_dropout(options):
    train(options, dropout=0.0)
