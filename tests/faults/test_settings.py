"""Settings that come from elsewhere: the environment, another start in the same folder, what a path holds by now."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from tests.conftest import one_line, refused, tiny_unet
from tests.faults.small_run import end_as, options_of, run_to_end, start, train
from tests.recipes.conftest import SHORT_STUDENT, images_in, read_metrics, recipe_runner
from vkd_gen.cli import run_command
from vkd_gen.data.images import data_facts
from vkd_gen.data.sources import load_images
from vkd_gen.files import hold_folder
from vkd_gen.training.accelerator import make_accelerator
from vkd_gen.training.facts import compare_facts, hash_model


@pytest.fixture
def accelerator_of(monkeypatch, tmp_path):
    """The accelerator of options in an environment."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def make(variables, **options):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        return make_accelerator(options_of(tmp_path / "run", **options))

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


# ---- accelerate's environment against the flags

STEPS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"


@pytest.mark.parametrize(("value", "flag"), [("1", 4), ("4", 2), ("0", 1), ("many", 1), ("", 1), ("1.0", 1)])
def test_another_accumulation_in_the_environment_is_refused(value, flag, accelerator_of):
    words = f"--gradient_accumulation_steps is {flag}, and {STEPS} .* is '{value}'"
    with one_line(words):
        accelerator_of({STEPS: value}, gradient_accumulation_steps=flag)


def test_the_same_accumulation_in_the_environment_is_taken(accelerator_of):
    assert accelerator_of({STEPS: "2"}, gradient_accumulation_steps=2).gradient_accumulation_steps == 2


@pytest.mark.parametrize("value", ["fp8", "half", "bf16,fp16", "FP16", ""])
def test_a_precision_of_the_environment_that_there_is_not_is_refused(value, accelerator_of):
    with pytest.raises(ValueError, match=f"{PRECISION} in the environment .* is '{value}'.*--mixed_precision"):
        accelerator_of({PRECISION: value})


@pytest.mark.parametrize(
    ("value", "flag", "precision"),
    [("bf16", None, "bf16"), ("fp16", "no", "no"), ("no", "bf16", "bf16"), ("half", "bf16", "bf16")],
)
def test_a_precision_that_is_given_goes_before_the_environment(value, flag, precision, accelerator_of):
    assert accelerator_of({PRECISION: value}, mixed_precision=flag).mixed_precision == precision


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_ways_to_train_that_these_recipes_have_not_are_refused(name, accelerator_of):
    with pytest.raises(ValueError, match=f"do not train under {name}"):
        accelerator_of({f"ACCELERATE_USE_{name}": "true"})


# ---- two starts in one folder


def train_slowly(options, marker):
    """Says when it has made a step, and goes on for a minute."""

    def wait(run, batch, losses):
        if run.step == 4:
            Path(marker).touch()
            time.sleep(60)

    train(options, before_step=wait)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_start_in_a_folder_is_refused_until_the_first_is_gone(workers, straight, tmp_path):
    """Also one that was killed, whose workers may outlive it for a while."""
    options = options_of(tmp_path / "run", dataloader_num_workers=workers)
    first = start(train_slowly, options, tmp_path / "marker", output=tmp_path / "first")
    deadline = time.monotonic() + 60
    while not (tmp_path / "marker").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    before = read_metrics(tmp_path / "run")
    status, output = run_to_end(train, options, output=tmp_path / "second")
    assert status == 2, output
    assert output.count("\n") == 1
    assert f"another process is writing to {tmp_path / 'run'}" in output
    assert read_metrics(tmp_path / "run") == before
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    end_as(straight, options, tmp_path / "third")


def hold_and_say(folder, sender):
    with hold_folder(folder):
        sender.send("held")
        time.sleep(60)


def test_a_forked_child_does_not_hold_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    holder = context.Process(target=hold_and_say, args=(tmp_path, sender))
    holder.start()
    assert receiver.recv() == "held"
    with pytest.raises(ValueError, match="another process is writing"):
        hold_folder(tmp_path)
    holder.kill()
    holder.join()
    hold_folder(tmp_path).close()
    with hold_folder(tmp_path):  # what is forked now is not in the way of the next one
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
    checked = context.Process(target=lambda: hold_folder(tmp_path).close())
    checked.start()
    checked.join()
    child.kill()
    assert checked.exitcode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert hold_folder(tmp_path) is None
    assert "without locks" in capsys.readouterr().out


def test_a_file_of_that_name_keeps_its_content(tmp_path):
    (tmp_path / "run.lock").write_text("mine")
    hold_folder(tmp_path).close()
    assert (tmp_path / "run.lock").read_text() == "mine"


# ---- what a path holds by now

FLAGS = {"teacher": "/a/teacher", "student": "", "dataset": "/a/data", "seed": 0, "teacher_revision": "1"}
BATCH = {"train_batch_size": 4, "num_processes": 1, "gradient_accumulation_steps": 1}
CONTENTS = {"teacher_sha256": "t", "dataset_sha256": "d"}
OLD = {**FLAGS, **BATCH}
NEW = {**OLD, **CONTENTS}
POINT = Path("run/checkpoint-3")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (NEW, {"dataset": "../data/", "teacher": "/b/teacher"}),
        (NEW, {"teacher_revision": "2"}),
        (OLD, CONTENTS),  # of a version that did not note them
    ],
)
def test_the_same_contents_go_on(before, now):
    compare_facts(before, {**before, **now}, POINT, print)
    flags = {name: value for name, value in {**before, **now}.items() if name in FLAGS}
    compare_facts(before, flags, POINT, print)  # before anything is loaded


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (NEW, {"teacher_sha256": "u"}, "--teacher /a/teacher does not hold what the run began with"),
        (NEW, {"teacher_sha256": "u", "teacher": "/b"}, "--teacher /b does not hold .*, then /a/teacher"),
        (NEW, {"dataset_sha256": "e"}, "--dataset /a/data does not hold"),
        (NEW, {"student": "bk-base"}, "--student was '' and is 'bk-base'"),
        (OLD, {"teacher": "/b/teacher", **CONTENTS}, "--teacher was '/a/teacher' and is '/b/teacher'"),
        (OLD, {"teacher_revision": "2"}, "--teacher_revision was '1' and is '2'"),
        # Data without contents, in place of data with.
        (NEW, {"dataset": "digits", "dataset_sha256": None}, "--dataset was '/a/data' and is 'digits'"),
    ],
)
def test_other_contents_are_another_run(before, now, words):
    now = {name: value for name, value in {**before, **now}.items() if value is not None}
    with pytest.raises(ValueError, match=f"checkpoint-3 is of another run: .*{words}"):
        compare_facts(before, now, POINT, print)


def test_the_hash_of_a_model_is_over_weights_and_configurations(tmp_path):
    unet, scheduler = tiny_unet(), DDPMScheduler()

    def of(unet, scheduler=scheduler):
        return hash_model(unet.state_dict(), unet, scheduler)

    unet.save_pretrained(tmp_path)
    same = UNet2DModel.from_pretrained(tmp_path)
    assert of(same) == of(unet)  # wherever it lies: diffusers notes the folder in the configuration
    others = [of(tiny_unet(seed=1)), of(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))]
    others.append(of(unet, DDPMScheduler(prediction_type="v_prediction")))
    same.register_to_config(norm_eps=1e-6)
    others.append(of(same))
    with torch.no_grad():
        unet.conv_out.bias[0] += 1e-6
    others.append(of(unet))
    assert len({of(tiny_unet()), *others}) == 6


def save_table(folder, seed=0, label=0):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(12)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    labels = [label, *[number % 2 for number in range(11)]]
    table = Dataset.from_dict({"image": images, "label": labels}, features=features)
    table.to_parquet(folder / "train.parquet")
    return folder


def facts_of(folder, **options):
    return data_facts(*load_images(str(folder), resolution=8, channels=1, **options))


def change_a_byte(folder):
    file = folder / "3.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(file)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda folder: shutil.move(folder, folder.with_name("elsewhere")), True),
        (lambda folder: [os.utime(file, (1, 1)) for file in folder.iterdir()], True),
        (lambda folder: (folder / "notes.txt").write_text("of mine"), True),
        (change_a_byte, False),
        (lambda folder: (folder / "5.png").rename(folder / "99.png"), False),
    ],
    ids=["moved", "touched", "a text beside", "a bit", "renamed"],
)
def test_a_folder_of_images_is_known_by_its_contents(change, is_same, tmp_path):
    folder = images_in(tmp_path / "data")
    before = facts_of(folder)["dataset_sha256"]
    change(folder)
    folder = folder if folder.exists() else folder.with_name("elsewhere")
    assert (facts_of(folder)["dataset_sha256"] == before) is is_same


@pytest.mark.parametrize(
    ("where", "changes", "is_same"),
    [("elsewhere", {}, True), ("data", {"seed": 1}, False), ("data", {"label": 1}, False)],
)
def test_a_table_is_known_by_its_contents(where, changes, is_same, tmp_path):
    before = facts_of(save_table(tmp_path / "data"), with_labels=True)["dataset_sha256"]
    after = facts_of(save_table(tmp_path / where, **changes), with_labels=True)["dataset_sha256"]
    assert (after == before) is is_same


def test_of_a_large_set_sizes_and_beginnings_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("vkd_gen.data.decoding.HASHED_BYTES", 10)
    folder = images_in(tmp_path / "data")
    before = facts_of(folder)["dataset_sha256"]
    assert facts_of(shutil.copytree(folder, tmp_path / "elsewhere"))["dataset_sha256"] == before
    change_a_byte(folder)
    assert facts_of(folder)["dataset_sha256"] != before


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(tmp_path / "base")


def save_teacher(folder, seed=0):
    tiny_unet(seed=seed).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.slow
def test_a_recipe_compares_contents(teacher, tmp_path, monkeypatch, capsys):
    run = recipe_runner(monkeypatch, tmp_path)
    flags = [*SHORT_STUDENT, "--extractor", "none", "--method", "output", "--checkpointing_steps", 1]
    flags += ["--output_dir", tmp_path / "run", "--checkpoints_total_limit", 9]
    student = save_teacher(tmp_path / "student", seed=3)
    common = ["--student", student, "--dataset", images_in(tmp_path / "data", 12), *flags]
    run("train_student_unet", "--teacher", teacher, *common)
    monkeypatch.chdir(tmp_path)
    moved = ["--student", shutil.move(student, tmp_path / "moved"), "--dataset", "data/", *flags]
    run("train_student_unet", "--teacher", "base/", *moved, "--resume_from_checkpoint", "checkpoint-1")
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "config.json").read_text())
    assert {"teacher_sha256", "student_sha256", "dataset_sha256"} <= set(config)
    for flag, change in (
        ("student", lambda: save_teacher(tmp_path / "moved", seed=4)),
        ("teacher", lambda: save_teacher(teacher, seed=5)),
    ):
        change()
        with pytest.raises(SystemExit) as exit_status:
            run("train_student_unet", "--teacher", "base/", *moved, "--resume_from_checkpoint", "checkpoint-1")
        assert exit_status.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert f"--{flag}" in error
        assert "does not hold what the run began with" in error
        save_teacher(tmp_path / "moved", seed=3)


@pytest.mark.slow
def test_a_stream_is_known_by_its_head_and_the_sizes_of_its_files(teacher, tmp_path, monkeypatch, capsys):
    run = recipe_runner(monkeypatch, tmp_path)
    data = save_table(tmp_path / "data")
    flags = [*SHORT_STUDENT, "--extractor", "none", "--method", "output", "--teacher", teacher, "--streaming"]
    flags += ["--checkpointing_steps", 1, "--output_dir", tmp_path / "run", "--resume_from_checkpoint"]
    run("train_student_unet", "--dataset", data, *flags, "latest")
    capsys.readouterr()
    run("train_student_unet", "--dataset", shutil.move(data, tmp_path / "moved"), *flags, "checkpoint-1")
    assert (
        "compared to what the run began with by its head, and the names and sizes of its files"
        in capsys.readouterr().out
    )
    save_table(tmp_path / "moved", seed=1)
    assert "does not hold what the run began with" in refused(
        capsys, run, "train_student_unet", "--dataset", tmp_path / "moved", *flags, "checkpoint-1"
    )


# ---- ~ in flags


@dataclass(frozen=True)
class Inner:
    folder: str = ""


@dataclass(frozen=True)
class Outer:
    output: str = ""
    many: tuple[str, ...] = ()
    path: Path = Path()
    maybe: str | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--output=~/run"], {"output": "HOME/run"}),
        (["--many", "~", "b", "~/c d"], {"many": ("HOME", "b", "HOME/c d")}),
        (["--path=~/x", "--maybe=~/x"], {"path": Path("HOME/x"), "maybe": "HOME/x"}),
        (["--folder=~/y"], {"inner": Inner("HOME/y")}),
        (["--output", "./~/x", "--maybe", "a~b"], {"output": "./~/x", "maybe": "a~b"}),
    ],
)
def test_home_folders_are_found_in_every_flag(flags, expected, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    found = []
    run_command(found.append, Outer, "A command.")
    assert found == [replace(Outer(), **expected)]


def test_the_home_of_nobody_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--output=~nobody-of-that-name/run"])
    assert "~nobody-of-that-name/run: there is no such home folder" in refused(
        capsys, run_command, print, Outer, "A command."
    )


# ---- more steps on resume


def test_a_run_of_a_constant_rate_can_be_made_longer(tmp_path):
    options = options_of(tmp_path / "straight", lr_scheduler="constant_with_warmup")
    for given in (options, replace(options, output_dir=str(tmp_path / "run"), max_train_steps=6)):
        assert run_to_end(train, given, output=tmp_path / "output")[0] == 0
    # The warm-up is over, and its default a share of the run.
    longer = replace(options, output_dir=str(tmp_path / "run"), checkpointing_steps=4, lr_warmup_steps=3)
    status, output = run_to_end(train, longer, output=tmp_path / "longer")
    assert status == 0, output
    assert "the run of 6 steps goes on to 12" in output
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("straight", "run")]
    assert weights[0] == weights[1]


LENGTH = {**OLD, "max_train_steps": 6, "lr_scheduler": "constant", "feature_weight": 0.0, "feature_decay_start": 0.0}


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"lr_scheduler": "cosine"}, {}, "--lr_scheduler cosine .*longer if it was started"),
        ({"lr_scheduler": "linear"}, {}, "of a run of 6 steps, and --max_train_steps is 12"),
        ({"feature_weight": 1.0}, {}, "feature loss fades"),
        ({"feature_weight": 1.0, "feature_decay_start": 1.0, "feature_weighting": "gradient_ratio"}, {}, "its ratio"),
        ({}, {"max_train_steps": 2}, "max_train_steps 2 ends before|is behind --max_train_steps 2"),
        ({"lr_scheduler": "cosine"}, {"lr_scheduler": "constant"}, "of a run of 6 steps"),
        (
            {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1},
            {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 9},  # which is not over
            "--lr_warmup_steps was 1 and is 9",
        ),
    ],
)
def test_what_cannot_be_made_longer_is_told(before, now, words):
    with one_line(words):
        compare_facts({**LENGTH, **before}, {**LENGTH, **before, "max_train_steps": 12, **now}, POINT, print)


@pytest.mark.parametrize("steps", [3, 4, 12])
def test_what_can_be_made_longer_or_shorter_is(steps, capsys):
    constant = {**LENGTH, "feature_weight": 1.0, "feature_decay_start": 1.0, "feature_weighting": "constant"}
    for before in (LENGTH, constant, {**LENGTH, "lr_warmup_steps": 0}):
        now = {**before, "max_train_steps": steps}
        now |= {"lr_warmup_steps": 1} if "lr_warmup_steps" in before else {}  # which a constant rate has not
        compare_facts(before, now, POINT, print)
        assert f"the run of 6 steps goes on to {steps}" in capsys.readouterr().out
