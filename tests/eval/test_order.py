"""Scores order what can be ordered: real images, a teacher, its student, a damaged student, noise."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.eval.conftest import EVAL
from vkd_gen.data.sources import load_images

ROOT = EVAL.parent
FROM_WORST = {"inception_score": True, "precision": True, "fid": False, "kid": False}  # score -> larger is better


@pytest.mark.slow
def test_scores_order_real_images_teacher_student_damaged_student_and_noise(tmp_path, run_eval):
    command = ["-m", "accelerate.commands.launch", ROOT / "recipes/train_student_unet.py", "--extractor", "none"]
    command += ["--max_train_steps", 300, "--output_dir", tmp_path / "run"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    images, _ = load_images("digits", resolution=8, channels=1, held_out_fraction=0)
    order = np.random.default_rng(0).permutation(len(images))
    halves = [images.pixels(half).permute(0, 2, 3, 1).numpy() for half in (order[:898], order[898:])]
    np.savez(tmp_path / "half.npz", arr_0=halves[0])
    np.savez(tmp_path / "reference.npz", arr_0=halves[1])
    noise = np.random.default_rng(1).integers(0, 256, halves[0].shape, dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    pipeline.save_pretrained(tmp_path / "damaged")
    teacher = ROOT / "recipes/assets/digits-teacher"
    ordered = [tmp_path / "half.npz", teacher, tmp_path / "run", tmp_path / "damaged", tmp_path / "noise.npz"]
    run_eval(
        "score", *ordered, "--reference", tmp_path / "reference.npz", "--extractor",
        ROOT / "recipes/assets/digits-features.safetensors", "--num_score_samples", 898, "--num_inference_steps", 25,
        "--kid_subset_size", 500, "--no-update-cards", "--output_dir", tmp_path / "scores",
    )  # fmt: skip
    rows = json.loads((tmp_path / "scores/results.json").read_text())["rows"]
    for score, larger_is_better in FROM_WORST.items():
        values = [rows[str(source)][f"{score}_digits"] for source in ordered]
        assert values == sorted(values, reverse=larger_is_better), (score, values)
    recalls = [rows[str(source)]["recall_digits"] for source in ordered]
    assert recalls[0] > 0.8 > 0.05 > recalls[-1]  # it counts modes: a blurred model may cover as many as a sharp one
