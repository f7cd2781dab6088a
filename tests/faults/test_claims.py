"""What eval/README.md and model cards say of scores holds, and keeps what it holds for."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from vkd_gen.evaluation.card import update_model_card
from vkd_gen.evaluation.sources import from_folder

PAGE = (Path(__file__).parents[2] / "eval" / "README.md").read_text()


def write(folder, fid, *, images, steps, data="digits"):
    """Put a score into a card, as eval/score.py does."""
    (folder / "model_index.json").touch()
    protocol = {"num_images": images, "num_inference_steps": steps, "sampler": "DDIMScheduler"}
    results = {
        "rows": {"run": {"fid": fid, "kid": fid / 100}},
        "protocol": {"extractor": "x"},
        "sources": {"run": protocol},
    }
    return update_model_card(folder, results, "run", data)


def scores(folder, data="digits"):
    """Of a card: value, images and steps of the FID."""
    found = ModelCard.load(folder / "README.md").data.eval_results
    (fid,) = [result for result in found if (result.metric_type, result.dataset_type) == ("fid", data)]
    return fid.metric_value, fid.metric_args["num_images"], fid.metric_args["num_inference_steps"]


@pytest.mark.parametrize(
    ("images", "steps", "is_kept"),
    [(40, 1000, True), (10_000, 10, True), (10_000, 50, False), (50_000, 2, False)],
)
def test_a_quick_look_does_not_replace_the_score_of_more_images(tmp_path, images, steps, is_kept):
    write(tmp_path, 3.0, images=10_000, steps=50)
    before = (tmp_path / "README.md").read_bytes()
    told = write(tmp_path, 90.0, images=images, steps=steps)
    if is_kept:
        assert (tmp_path / "README.md").read_bytes() == before
        assert f"keeps its scores of 10,000 images in 50 steps; these are of {images:,} images in {steps} steps" in told
    assert scores(tmp_path) == ((3.0, 10_000, 50) if is_kept else (90.0, images, steps))


def test_scores_against_other_data_stay_beside(tmp_path):
    write(tmp_path, 3.0, images=10_000, steps=50)
    write(tmp_path, 90.0, images=40, steps=2, data="path/to/mnist")
    assert scores(tmp_path) == (3.0, 10_000, 50)
    assert scores(tmp_path, "mnist") == (90.0, 40, 2)


def test_other_peoples_words_and_results_stay(tmp_path):
    theirs = EvalResult("image-generation", "cats", "cats", "beauty", 7.0)
    data = ModelCardData(license="mit", model_name="mine", eval_results=[theirs])
    ModelCard(f"---\n{data.to_yaml()}\n---\n# Mine\n\nSome words.\n").save(tmp_path / "README.md")
    write(tmp_path, 3.0, images=40, steps=2, data=str(tmp_path / "digits"))
    card = ModelCard.load(tmp_path / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"beauty": 7.0, "fid": 3.0, "kid": 0.03}
    assert (card.data.license, card.data.model_name) == ("mit", "mine")
    assert "Some words." in card.text
    assert str(tmp_path) not in card.data.to_yaml()


def test_a_score_of_an_older_card_that_does_not_say_is_replaced(tmp_path):
    write(tmp_path, 3.0, images=10_000, steps=50)
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(re.sub(r" +args:\n(?: +\w+: .*\n)+?(?=\S| *- )", "", text))
    assert "num_images: 10000" not in (tmp_path / "README.md").read_text().split("---")[1]
    write(tmp_path, 5.0, images=40, steps=2)
    assert scores(tmp_path) == (5.0, 40, 2)


def test_the_page_says_which_of_torch_fidelitys_scores_are_equal():
    """The numbers themselves: test_a_folder_of_pngs_has_the_scores_of_torch_fidelitys_command_line."""
    text = " ".join(PAGE.split())
    (sentence,) = re.findall(r"A folder of opaque PNGs gets .*? laid on white\.", text)
    assert "`--feature-extractor inception-v3-compat`" in sentence
    assert "precision and recall are of VGG16" in sentence


def test_transparent_pngs_are_laid_on_white_here_and_cut_there(tmp_path):
    datasets = pytest.importorskip("torch_fidelity.datasets")
    pixels = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    there = datasets.ImagesPathDataset([str(tmp_path / "a.png")])[0]
    assert (there == 0).all()
    assert (from_folder(str(tmp_path)).read([0]) == 255).all()
