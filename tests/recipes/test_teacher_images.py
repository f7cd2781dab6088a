"""Distilling from prompts alone: the teacher draws the images once, before the first step."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from tests.conftest import refused
from tests.faults.small_run import end_pair, run_student, run_to_end
from tests.recipes.conftest import assert_same_weights, read_metrics, without_times
from tests.text_pipelines import tiny_pipeline
from vkd_gen.evaluation.prompts import Prompts
from vkd_gen.models import Model
from vkd_gen.training.options import DataOptions
from vkd_gen.training.teacher_images import TeacherImages

STUDENT = "train_student_unet"
PROMPTS = ["a red cat", "a blue heart", "a hat"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline("sd1", folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def flags_of(teacher, prompts, run, *more):
    """A run of two steps on eight drawings."""
    short = ["--preset", "custom", "--teacher", teacher, "--dataset", prompts, "--num_teacher_images", 8]
    short += ["--output_dir", run, "--max_train_steps", 2, "--train_batch_size", 4, "--log_every_steps", 1]
    short += ["--checkpointing_steps", 1, "--lr_warmup_steps", 0, "--method", "output", "--eval_batch_size", 3]
    short += ["--num_inference_steps", 1, "--extractor", "none", "--no_inherit_weights", "--no-score_teacher"]
    short += ["--diagnostics_every_steps", 0]
    short += ["--calibration_samples", 16, "--num_timestep_bins", 2, "--dataloader_num_workers", 0]
    return [*short, *more]


def drawings(cache):
    """Folder of each set of drawings."""
    return sorted(path.parent for path in (cache / "drawings").glob("*/facts.json"))


def pixels_in(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def times_in(folder):
    return {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("0*.png"))}


def test_one_command_from_prompts_to_a_student(teacher, prompts, tmp_path, run_recipe, capfd):
    """The images are those of eval/generate.py, and are drawn once for all runs; the prompts are the captions."""
    run_recipe(STUDENT, *flags_of(teacher, prompts, tmp_path / "one"))
    told = capfd.readouterr().out
    assert "8 images of 3 prompts, drawn by the teacher, in " in told
    assert "7 images to train on, 1 held out" in told
    (folder,) = drawings(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["facts.json", "images"]
    rows = [json.loads(line) for line in (folder / "images/metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [PROMPTS[number % 3] for number in range(8)]
    model = Model(DiffusionPipeline.from_pretrained(teacher))
    conditioning = {"prompt": [row["text"] for row in rows]}
    expected = model.images(range(8), conditioning=conditioning, num_inference_steps=1).permute(0, 2, 3, 1)
    assert np.abs(pixels_in(folder / "images").astype(int) - expected.numpy()).max() <= 1  # the network's rounding
    card = (tmp_path / "one/pipeline/README.md").read_text()
    assert "| images | 8, which the teacher drew of 3 prompts: PNDMScheduler, 1 steps, guidance the pipeline's" in card
    assert "Trained on prompts.txt with" in card.replace(str(tmp_path) + "/", "")

    resumed = [*flags_of(teacher, prompts, tmp_path / "one"), "--resume_from_checkpoint", "latest"]
    assert "the teacher would draw others now" in refused(capfd, run_recipe, STUDENT, *resumed, "--guidance_scale", 3)
    prompts.write_text("another")
    assert "the teacher would draw others now" in refused(capfd, run_recipe, STUDENT, *resumed)
    assert drawings(tmp_path / "cache") == [folder]


@pytest.fixture
def model(teacher):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    return Model(DiffusionPipeline.from_pretrained(teacher))


FLAGS = {"teacher": "tiny", "num_teacher_images": 6, "num_inference_steps": 1, "guidance_scale": None}


def planned(model, folder, *, prompts=PROMPTS, source="prompts.txt", precision="no", **flags):
    return TeacherImages.of(model, Prompts(prompts, source), folder, {**FLAGS, **flags}, precision)


def draw(drawn, model, batch_size=2):
    return drawn.draw(model, CPU, batch_size=batch_size, say=lambda line: None)


def test_an_interrupted_drawing_goes_on(model, tmp_path, monkeypatch):
    """Finished images stay as they are, also those of a batch of which others are missing."""
    straight = draw(planned(model, tmp_path / "straight"), model)
    made, original = [], Model.images

    def interrupted(model, seeds, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(seeds))
        return original(model, seeds, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(planned(model, tmp_path / "other"), model)
    folder = planned(model, tmp_path / "other").folder / "images"
    assert made == [[0, 1], [2, 3]]
    (folder / "000002.png").unlink()
    (folder / ".vkd-gen.000004.png").write_bytes(b"half of it")
    before = times_in(folder)
    assert draw(planned(model, tmp_path / "other"), model) == folder
    assert {name: time for name, time in times_in(folder).items() if name in before} == before
    assert (pixels_in(folder) == pixels_in(straight)).all()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in straight.iterdir())
    assert not (folder.parent / "run.lock").exists()


def test_what_decides_the_images_decides_their_folder(model, tmp_path):
    """And nothing else: not the name of the file of prompts, nor the batch."""
    plain = planned(model, tmp_path).folder
    assert planned(model, tmp_path, source="other.txt", teacher="elsewhere").folder == plain
    others = [
        planned(model, tmp_path, prompts=[*PROMPTS, "more"]),
        planned(model, tmp_path, num_teacher_images=7),
        planned(model, tmp_path, num_inference_steps=2),
        planned(model, tmp_path, guidance_scale=3.0),
        planned(model, tmp_path, precision="bf16"),
    ]
    sampler = model.pipeline.scheduler
    model.pipeline.scheduler = type(sampler).from_config(sampler.config, beta_end=0.02)
    others.append(planned(model, tmp_path))
    model.pipeline.scheduler = sampler
    model.network.register_to_config(sample_size=8)
    others.append(planned(model, tmp_path))
    model.network.register_to_config(sample_size=16)
    model.pipeline.text_encoder.get_input_embeddings().weight.data[0] += 1
    others.append(planned(model, tmp_path))
    assert len({drawn.folder for drawn in others} | {plain}) == 1 + len(others)


@pytest.mark.slow
def test_a_run_that_finds_the_images_is_one_that_drew_them(teacher, prompts, tmp_path, run_recipe, capfd):
    run_recipe(STUDENT, *flags_of(teacher, prompts, tmp_path / "one"))
    (folder,) = drawings(tmp_path / "cache")
    before = times_in(folder / "images")
    capfd.readouterr()
    run_recipe(STUDENT, *flags_of(teacher, prompts, tmp_path / "two"))
    assert f"in {folder / 'images'}: 8 are there" in capfd.readouterr().out
    assert times_in(folder / "images") == before
    assert without_times(read_metrics(tmp_path / "one")) == without_times(read_metrics(tmp_path / "two"))
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_draw_the_same(teacher, prompts, tmp_path):
    found = {}
    for name, batch, runner in (("one", 4, end_alone), ("two", 2, end_pair)):
        flags = flags_of(teacher, prompts, tmp_path / name, "--train_batch_size", batch)
        runner(tmp_path / "output", run_student, flags, VKD_GEN_CACHE=str(tmp_path / name / "cache"))
        (folder,) = drawings(tmp_path / name / "cache")
        found[name] = {file.name: file.read_bytes() for file in (folder / "images").iterdir()}
    assert found["one"] == found["two"]
    losses = [[line["loss/total"] for line in read_metrics(tmp_path / name) if "loss/total" in line] for name in found]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def end_alone(output, function, *arguments, **environment):
    status, told = run_to_end(function, *arguments, output=output, **environment)
    assert status == 0, told


MISTAKES = {
    "no such file": (["--dataset", "nowhere.txt"], "nowhere.txt is not there"),
    "an empty file": (["--dataset", "{empty}"], "empty.txt holds no prompt"),
    "no column of prompts": (["--dataset", "{prompts}", "--caption_column", "x"], "--caption_column is for tables"),
    "a stream": (["--streaming"], "--streaming is for images that are there already"),
    "one image": (["--num_teacher_images", "1"], "--num_teacher_images must be at least 2"),
    "a teacher without prompts": (["--teacher", "{unconditional}"], "is for teachers with prompts, and the teacher"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, teacher, prompts, pipeline_folder, tmp_path, run_recipe, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    more, words = MISTAKES[name]
    places = {"empty": tmp_path / "empty.txt", "prompts": prompts, "unconditional": pipeline_folder.parent / "plain"}
    if name == "a teacher without prompts":
        pipeline_folder.rename(places["unconditional"])
    more = [word.format(**places) for word in more]
    assert words in refused(capfd, run_recipe, STUDENT, *flags_of(teacher, prompts, tmp_path / "run"), *more)
    assert not drawings(tmp_path / "cache")


def test_a_file_of_prompts_without_the_flag():
    with pytest.raises(ValueError, match="is a file of prompts, without images: --num_teacher_images 10000 lets"):
        DataOptions(dataset="prompts.txt")
