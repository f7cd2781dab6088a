"""Teachers with prompts: what their flags mean, their schedules, and what students start from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import one_line, tiny_condition_unet
from tests.text_pipelines import tiny_pipeline
from vkd_gen.families import build_student, inherit_weights, step0_error
from vkd_gen.schedule import Schedule
from vkd_gen.training.methods import MatchingOptions
from vkd_gen.training.options import DataOptions, StudentOptions, TrainingOptions
from vkd_gen.training.students import load_teacher_model, make_student, resolve_student
from vkd_gen.training.text_teachers import text_source
from vkd_gen.training.unets import load_teacher, load_unet, training_schedule

pytest.importorskip("transformers")
KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("teachers")
    for kind in KINDS:
        tiny_pipeline(kind, place / kind)
    return place


SCHEDULES = [("sd1", "epsilon", 0.0683), ("sd2", "v_prediction", 0), ("sdxl", "epsilon", 0.0683)]


class Lines:
    """In place of a run: keeps what it is told."""

    def __init__(self):
        self.lines = []

    find = staticmethod(lambda path: path)

    def print(self, line):
        self.lines.append(str(line))


def teacher_of(folder, run=None, dry_run=False, **options):
    config = SimpleNamespace(
        preset="custom",
        teacher=str(folder),
        start=StudentOptions(**options),
        training=TrainingOptions(output_dir="x", dry_run=dry_run, lr_warmup_steps=1),
        data=DataOptions(dataset="digits"),
        matching=MatchingOptions(),
    )
    return load_teacher_model(config, SimpleNamespace(teacher="", data=config.data), run or Lines())


@pytest.mark.parametrize(("kind", "prediction", "last"), SCHEDULES)
def test_a_teacher_has_its_pipeline_and_the_schedule_it_was_trained_on(folders, kind, prediction, last):
    run = Lines()
    model = teacher_of(folders / kind, run)
    assert model.takes_prompts
    assert (model.image_size, model.network.config.sample_size) == (32, 16)
    assert (model.schedule.prediction_type, len(model.schedule)) == (prediction, 1000)
    assert float(model.schedule.alpha[-1]) == pytest.approx(last, abs=1e-4)
    assert type(model.noise_scheduler).__name__ == "DDPMScheduler"
    assert "scaled_linear" in run.lines[-1]
    encoder = model.pipeline.text_encoder.state_dict()
    model.release()
    assert model.pipeline.vae is None
    with model.whole():
        assert all(
            torch.equal(value, encoder[name]) for name, value in model.pipeline.text_encoder.state_dict().items()
        )


def test_the_resolution_is_in_pixels(folders):
    model = teacher_of(folders / "sdxl", resolution=48)
    assert (model.image_size, model.network.config.sample_size, model.pipeline.default_sample_size) == (48, 24, 24)
    with one_line("--resolution 33 is no multiple of 2.*take 32 or 34"):
        teacher_of(folders / "sd1", dry_run=True, resolution=33)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_has_no_weights(folders, kind):
    model = teacher_of(folders / kind, dry_run=True)
    assert model.takes_prompts
    assert model.image_size == 32
    assert {value.device.type for value in model.network.parameters()} == {"meta"}


@pytest.mark.parametrize("flag", [{"teacher_variant": "fp16"}, {"teacher_lora": ("x",)}, {"teacher_config": "x"}])
def test_flags_of_teachers_with_prompts_alone(pipeline_folder, flag):
    with one_line(f"--{next(iter(flag))} is for pipelines with prompts"):
        text_source(str(pipeline_folder), StudentOptions(**flag))


def test_a_unet_without_its_pipeline(tmp_path):
    tiny_condition_unet().save_pretrained(tmp_path)
    with one_line("UNet2DConditionModel alone; its pipeline, which encodes images and prompts, is needed"):
        load_teacher(str(tmp_path))
    assert torch.equal(load_unet(str(tmp_path)).conv_in.weight, tiny_condition_unet().conv_in.weight)


# ---- schedules


def test_zero_terminal_noise_of_every_kind():
    """Against the definition: v = alpha noise - sigma sample, and a sample that is noise alone at the end."""
    schedule = Schedule.of(training_schedule(tiny_pipeline("sd2").scheduler.config, "it"))
    sample, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    last = torch.tensor([999, 999])
    assert torch.equal(schedule.noisy(sample, noise, last), noise)
    torch.testing.assert_close(schedule.target(sample, noise, last), -sample)
    assert torch.equal(schedule.signal_to_noise_ratio(last), torch.zeros(2))
    assert schedule.weights(last, "min_snr").tolist() == [0, 0]
    as_sample = replace(schedule, prediction_type="sample")
    torch.testing.assert_close(as_sample.convert(-sample, noise, last, "v_prediction"), sample)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedule.check_convertible("epsilon")


# ---- students


def batches(teacher, count=1, size=4, seed=0):
    """What the teacher reads: latents, noise, and prompts and sizes of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    config = teacher.config

    def normal(*shape):
        return torch.randn(size, *shape, generator=generator)

    for _ in range(count):
        conditioning = {"encoder_hidden_states": normal(16, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            times = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(size, 1)
            conditioning["added_cond_kwargs"] = {"text_embeds": normal(24), "time_ids": times}
        timesteps = torch.randint(0, 1000, (size,), generator=generator)
        yield {
            "sample": normal(4, 16, 16),
            "noise": normal(4, 16, 16),
            "timesteps": timesteps,
            "conditioning": conditioning,
        }


STUDENTS = [
    ("sd1", {"student": "bk-tiny"}),
    pytest.param("sd2", {"student_width": 0.5}, marks=pytest.mark.slow),
    ("sdxl", {"student": "koala-700m"}),
    pytest.param("sdxl", {"student_transformer_layers": 1, "student_width": 0.5}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "options"), STUDENTS, ids=str)
def test_students_start_from_the_teacher_with_its_prompts(folders, kind, options):
    pipeline = tiny_pipeline(kind)
    teacher = pipeline.unet
    schedule = Schedule.of(training_schedule(pipeline.scheduler.config, "it"))
    student = build_student(
        {**resolve_student(StudentOptions(**options), teacher), "_class_name": type(teacher).__name__}
    )
    held_out = list(batches(teacher, seed=1))
    at_random = step0_error(student, teacher, held_out, schedule)
    inherited = inherit_weights(student, teacher, batches=batches(teacher), schedule=schedule)
    names = {name.split(".")[-1] for name in {**inherited.copied, **inherited.sliced}}
    assert {"to_q", "to_k", "to_v", "linear_1", "proj_in"} <= names
    assert "attn2" in " ".join(inherited.fitted)
    assert step0_error(student, teacher, held_out, schedule) < 0.8 * at_random


def test_an_equal_student_is_its_teacher(folders):
    pipeline = tiny_pipeline("sdxl")
    student = build_student(pipeline.unet)
    inherit_weights(student, pipeline.unet, channels="magnitude", rescaling="none")
    values = pipeline.unet.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("as_pipeline", [True, False])
def test_a_student_with_weights_of_its_own(folders, tmp_path, as_pipeline):
    pipeline = tiny_pipeline("sd1", seed=3)
    student = build_student(pipeline.unet, layers_per_block=1)
    pipeline.register_modules(unet=student)
    (pipeline if as_pipeline else student).save_pretrained(tmp_path)
    made, has_weights = make_student(StudentOptions(student=str(tmp_path)), teacher_of(folders / "sd1"), Lines())
    assert has_weights
    assert torch.equal(made.network.conv_in.weight, student.conv_in.weight)
    with one_line("has addition_embed_type None and the teacher text_time|cross_attention_dim"):
        make_student(StudentOptions(student=str(tmp_path)), teacher_of(folders / "sdxl"), Lines())
