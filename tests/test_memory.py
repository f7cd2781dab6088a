"""What a run takes of memory, against what torch's allocator gives out in a real step."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from torch.profiler import ProfilerActivity, profile

import vkd_gen as vkd
from tests.conftest import tiny_condition_unet, tiny_unet
from tests.recipes.conftest import recipe_runner
from vkd_gen.families import TEACHERS, copy_without_weights
from vkd_gen.pairing import pair_layers
from vkd_gen.schedule import Schedule
from vkd_gen.training.memory import Rehearsal, encoder_bytes, memory_table
from vkd_gen.training.methods import METHODS
from vkd_gen.training.options import TrainingOptions

CPU = torch.device("cpu")
OPTIONS = TrainingOptions(output_dir="run", train_batch_size=8)


def rehearse(student, teacher, method="bk", dtype=torch.float32, **changes):
    matching = dataclasses.replace(METHODS[method], **changes)
    pairs = pair_layers(student, teacher, layers=matching.layers) if matching.feature_weight else []
    return Rehearsal(student, teacher, pairs, matching, teacher_dtype=dtype, precision=dtype, device=CPU), matching


def real_peak(rehearsal, student, teacher, rows, *, checkpointing, dtype):
    """The most that the allocator had given out in one step, beside what was there before it."""
    pairs = rehearsal.projected.layer_pairs
    projected = vkd.ProjectedStudent(
        student,
        pairs,
        [
            vkd.IdentityProjector(pair.student_channels, pair.teacher_channels)
            for pair in rehearsal.projected.layer_pairs
        ],
        [vkd.FeatureNormalizer("none", channels=pair.teacher_channels) for pair in rehearsal.projected.layer_pairs],
    ).train()
    (student.enable_gradient_checkpointing if checkpointing else student.disable_gradient_checkpointing)()
    frozen = vkd.FrozenTeacher(teacher.to(dtype), [pair.teacher for pair in projected.layer_pairs])
    shape = rows, 4, 16, 16
    batch = {
        "sample": torch.randn(shape),
        "noise": torch.randn(shape),
        "timesteps": torch.zeros(rows, dtype=torch.long),
    }
    batch["conditioning"] = {"encoder_hidden_states": torch.randn(rows, 77, 8)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            losses = vkd.distillation_losses(projected, batch, schedule=Schedule.of(DDPMScheduler()), teacher=frozen)
        losses["total"].backward()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize(("checkpointing", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_step_takes_what_torch_gives_out(checkpointing, dtype):
    """Within a tenth; rounding to blocks, and what kernels use for themselves, is not counted."""
    unets = [tiny_condition_unet((32, 64), size=16, seed=seed) for seed in (1, 2)]
    rehearsal, _ = rehearse(*unets, dtype=dtype)
    found = rehearsal.step(16, checkpointing=checkpointing)
    expected = real_peak(rehearsal, *unets, 16, checkpointing=checkpointing, dtype=dtype)
    assert found.peak(16) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("method", "dtype"), [("vkd", torch.bfloat16), ("vkd-paper", torch.float32)])
def test_other_batches_are_foretold(method, dtype):
    unets = [tiny_unet((16, 32), seed=seed) for seed in (1, 2)]
    rehearsal, _ = rehearse(*unets, method, dtype=dtype)
    small, large = (rehearsal.step(rows, checkpointing=False) for rows in (8, 40))
    assert small.peak(40) == pytest.approx(large.peak(40), rel=0.05)
    rows = small.rows_within(large.peak(40))
    assert 37 <= rows <= 43
    assert small.peak(rows) <= large.peak(40) * 1.001
    assert small.rows_within(1000) == 0


def test_standing_memory_by_hand():
    student, teacher = tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2)
    rehearsal, _ = rehearse(student, teacher, "none", dtype=torch.bfloat16)
    count, others = (sum(value.numel() for value in unet.parameters()) for unet in (student, teacher))
    expected = {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count}
    found = vars(rehearsal.memory(OPTIONS, 1))
    assert found == {**expected, "averages": 4 * count, "teacher": 2 * others, "encoders": 0}
    eight = dataclasses.replace(OPTIONS, optimizer="adamw8bit", ema_max_decay=0.0)
    assert rehearsal.memory(eight, 1).optimizer == 2 * count
    assert rehearsal.memory(eight, 1).averages == 0
    assert rehearsal.memory(eight, 2).gradients == 8 * count


def test_nothing_of_a_rehearsal_is_computed_and_the_models_stay_as_they_are():
    teacher = tiny_unet((16, 32))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    rehearsal, _ = rehearse(copy_without_weights(tiny_unet((8, 16))), teacher, "vkd")
    rehearsal.step(2, checkpointing=False)
    assert all(value.is_meta or type(value).__name__ == "FakeTensor" for value in rehearsal.projected.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("method", ["vkd", "none"])
def test_every_method_has_its_table(method):
    student, teacher = tiny_unet((8, 16), seed=1), tiny_unet((8, 16), seed=2)
    rehearsal, matching = rehearse(student, teacher, method)
    options = {"num_processes": 2, "available": 10**9, "where": "here", "encoders": 3 * 10**9}
    text = memory_table(rehearsal, OPTIONS, matching, **options)
    assert "largest batch in 1.00 GB here" in text
    assert "VAE and text encoders, until all is encoded" in text
    assert ("measurements" in text) == bool(matching.feature_weight)
    nothing = memory_table(rehearsal, OPTIONS, matching, **{**options, "available": 10**5})
    assert nothing.splitlines()[-2].split()[-2:] == ["none", "none"]


def test_encoders_that_stay_are_in_the_sum():
    """By as much as they take, and the largest batch is smaller."""
    student, teacher = tiny_unet((8, 16), seed=1), tiny_unet((8, 16), seed=2)
    rehearsal, matching = rehearse(student, teacher, "output")
    options = {"num_processes": 1, "available": 2 * 10**9, "where": "here", "encoders": 10**9}
    leave, stay = (memory_table(rehearsal, OPTIONS, matching, **options, encoders_stay=stay) for stay in (False, True))
    assert "VAE and text encoders, until" in leave
    assert "VAE and text encoders  " in stay
    assert "until all is encoded" not in stay

    def cells(text, name):
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        return [float(cell.replace(",", "")) for cell in line.split()[-2:]]

    sums = [cells(text, "together") for text in (leave, stay)]
    assert [after - before for before, after in zip(*sums, strict=True)] == pytest.approx([1, 1], abs=0.02)
    batches = [cells(text, "largest batch") for text in (leave, stay)]
    assert all(after < before for before, after in zip(*batches, strict=True))


@pytest.mark.parametrize(("flags", "stays"), [([], False), (["--no-cache"], True), (["--streaming"], True)])
def test_the_command_knows_whether_encoders_stay(flags, stays, tmp_path, monkeypatch):
    found = {}

    def table(*_, **arguments):
        found.update(arguments)
        return ""

    monkeypatch.setattr("vkd_gen.training.memory.memory_table", table)
    run_recipe = recipe_runner(monkeypatch, tmp_path, whole=True)
    plan = ["--preset", "custom", "--teacher", "stable-diffusion-1", "--student", "bk-tiny", "--dataset", "x"]
    run_recipe("train_student_unet", *plan, "--method", "output", "--output_dir", tmp_path / "run", "--dry_run", *flags)
    assert (found["encoders"], found["encoders_stay"]) == (4 * 206_714_343, stays)


def test_encoders_of_known_names_and_of_folders(tmp_path):
    from tests.text_pipelines import tiny_pipeline

    assert encoder_bytes("stable-diffusion-1") == 4 * 206_714_343
    assert all(encoder_bytes(name) for name in TEACHERS if "stable" in name)
    pipeline = tiny_pipeline("sdxl", tmp_path / "xl")
    parts = pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2
    expected = sum(value.nbytes for part in parts for value in part.parameters())
    assert encoder_bytes(str(tmp_path / "xl")) == pytest.approx(expected, rel=1e-3)
    assert encoder_bytes("someone/something") == 0
