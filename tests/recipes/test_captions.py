"""Captions, crops and aspect buckets in a run."""

import contextlib
import re

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from tests.recipes.conftest import assert_same_run, run_until
from tests.text_pipelines import tiny_pipeline
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.prompt_errors import prompt_errors
from vkd_gen.models import Model
from vkd_gen.training.images import encode_data, load_data
from vkd_gen.training.options import DataOptions

STUDENT = "train_student_unet"
SIZES = [(40, 60), (60, 40), (44, 44), (41, 60), (90, 50), (40, 61)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline("sd1", folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Pictures of several sizes, each with a caption beside it."""
    place = tmp_path / "pictures"
    place.mkdir()
    generator = np.random.default_rng(0)
    for number in range(18):
        pixels = generator.integers(0, 255, (*SIZES[number % 6], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")
        (place / f"{number:02}.txt").write_text(["red cat", "blue heart", "cat"][number % 3])
    return place


def flags(teacher, folder, run):
    return [
        *("--preset", "custom", "--teacher", teacher, "--dataset", folder, "--output_dir", run, "--extractor", "none"),
        *("--train_batch_size", 4, "--max_train_steps", 4, "--checkpointing_steps", 2, "--log_every_steps", 1),
        *("--mixed_precision", "no", "--no-score_teacher", "--eval_batch_size", 4, "--calibration_samples", 64),
        *("--inherit_samples", 4, "--method", "output", "--dataloader_num_workers", 0),
        *("--num_inference_steps", 2, "--lr_warmup_steps", 0, "--num_timestep_bins", 2, "--diagnostics_every_steps", 0),
    ]


@contextlib.contextmanager
def refused(capfd, words):
    """A run ends in one line with these words."""
    with pytest.raises(SystemExit) as exit_status:
        yield
    assert exit_status.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error"))
    assert re.search(words, line)


@pytest.mark.slow
def test_a_run_with_aspect_buckets_is_resumed_bit_for_bit(teacher, folder, run_recipe, tmp_path, capfd):
    own = ["--aspect_buckets", "--num_crops", 2, "--random_flip"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    again = ["--resume_from_checkpoint", "latest"]
    run_recipe(STUDENT, *flags(teacher, folder, straight), *own)
    told = capfd.readouterr().out
    assert "aspect buckets, height x width: " in told
    assert "18 captions" not in told
    run_until(3, run_recipe, STUDENT, *flags(teacher, folder, resumed), *own)
    with refused(capfd, "go on with --train_batch_size 4"):
        run_recipe(
            STUDENT,
            *flags(teacher, folder, resumed),
            *own,
            *again,
            "--train_batch_size",
            2,
            "--gradient_accumulation_steps",
            2,
        )
    (folder / "03.txt").write_text("another")
    with refused(capfd, "captions_sha256"):
        run_recipe(STUDENT, *flags(teacher, folder, resumed), *own, *again)
    (folder / "03.txt").write_text("red cat")
    run_recipe(STUDENT, *flags(teacher, folder, resumed), *own, *again)
    assert_same_run(straight, resumed)


def test_held_out_images_are_seen_as_training_images_are(teacher, folder, tmp_path):
    """In the nearest of the sizes that are trained on; errors do not depend on how many go together."""
    model = Model(DiffusionPipeline.from_pretrained(teacher))
    options = DataOptions(dataset=str(folder), aspect_buckets=True, cache_dir=str(tmp_path / "cache"))
    data = load_data(options, str(folder), (32, 3), None, print, with_captions=True)
    data = encode_data(data, options, model, seed=0, batch_size=4, say=print)
    sizes = data.samples.views.sizes
    assert len(sizes) > 2
    held_out, views = data.held_out_samples, data.held_out_samples.views
    assert len(set(views.buckets)) > 1
    for index, (height, width) in enumerate(data.held_out.sizes()):
        seen = views.sizes[views.bucket(index)]
        assert seen in sizes
        assert abs(seen[0] / seen[1] - height / width) == min(abs(size[0] / size[1] - height / width) for size in sizes)
        assert held_out.shape(held_out.read(index)) == (4, seen[0] // 2, seen[1] // 2)
    one, other = (held_out_errors({"it": model}, held_out, num_draws=9, batch_size=size)["it"] for size in (1, 4))
    assert one == pytest.approx(other, rel=1e-4)
    assert prompt_errors({"it": model}, held_out, num_draws=4, num_ranked=2)["it"]["wrong_prompt_error"] > 0


MISTAKES = {
    "a missing caption": ([], "1 of 18 images of .* have no usable caption"),
    "a cache of pixels": (["--image_cache", "x"], "--image_cache is for models of pixels"),
    "no such column": (["--caption_column", "x"], "--caption_column x: .* holds neither metadata.jsonl"),
    "buckets of a stream": (["--aspect_buckets", "--streaming"], "a stream's are not: leave one of them out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, teacher, folder, run_recipe, tmp_path, capfd):
    more, words = MISTAKES[name]
    if not more:
        (folder / "07.txt").unlink()
    with refused(capfd, words):
        run_recipe(STUDENT, *flags(teacher, folder, tmp_path / "run"), *more)


@pytest.mark.parametrize("flag", [["--aspect_buckets"], ["--num_crops", 2], ["--caption_column", "text"]])
def test_flags_of_prompts_for_a_model_without(flag, run_recipe, tmp_path, capfd):
    with refused(capfd, f"{flag[0]} is for models of prompts"):
        run_recipe(STUDENT, "--preset", "digits", "--output_dir", tmp_path / "run", *flag)
