"""CLIP score: by hand, in any batch, and models that are none."""

import json

import pytest
import torch

from tests.clip_models import save_clip
from tests.conftest import one_line
from vkd_gen.evaluation.clip import load_clip
from vkd_gen.evaluation.scorer import Scorer
from vkd_gen.evaluation.sources import ImageSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 48, 48), dtype=torch.uint8)


PROMPTS = ["red cat", "blue", "a red hat, a blue cat", "hat", "cat", "b " * 60]


def test_the_score_is_a_hundred_times_the_cosine_but_not_below_zero(folder, images):
    clip = load_clip(str(folder))
    assert clip.name == "tiny-clip"
    inputs = clip.processor(text=PROMPTS, images=list(images), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        network = clip.network
        seen = network.visual_projection(network.vision_model(inputs["pixel_values"])[1])
        read = network.text_projection(network.text_model(inputs["input_ids"], inputs["attention_mask"])[1])
    cosines = torch.nn.functional.cosine_similarity(seen.double(), read.double())
    assert (cosines < 0).any()
    torch.testing.assert_close(clip(images, PROMPTS).double(), 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
    for number in range(6):  # however long the others' prompts are
        alone = clip(images[number : number + 1], [PROMPTS[number]])
        torch.testing.assert_close(alone, clip(images, PROMPTS)[number : number + 1], rtol=1e-4, atol=1e-4)


def test_grey_images_are_those_of_three_equal_channels(folder, images):
    clip = load_clip(str(folder))
    grey = images[:, :1]
    assert torch.equal(clip(grey, PROMPTS), clip(grey.repeat(1, 3, 1, 1), PROMPTS))


def test_it_is_on_the_device_while_it_scores_alone(folder, images, monkeypatch):
    """The device is recorded, not had; also where scoring fails."""
    scorer = object.__new__(Scorer)
    scorer.clip, scorer.extractor, scorer.batch_size = load_clip(str(folder)), None, 4
    network, seen = type(scorer.clip.network), []
    monkeypatch.setattr(network, "to", lambda self, device: seen.append(f"to {device}"))
    monkeypatch.setattr(network, "cpu", lambda self: seen.append("back"))

    def extract(source, extractor, **more):
        seen.append("scores")
        raise ValueError("not finite")

    monkeypatch.setattr("vkd_gen.evaluation.scorer.extract_features", extract)
    with pytest.raises(ValueError, match="not finite"):
        scorer(ImageSource("x", 48, 6, lambda numbers: images[list(numbers)], {}))
    assert seen == ["to cpu", "scores", "back"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.safetensors", "its weights are missing"),
        ("config.json", "config.json is not there"),
        ("processor_config.json", "processor_config.json is not there"),
    ],
)
def test_a_model_that_lacks_a_file(folder, tmp_path, file, words):
    for path in folder.iterdir():
        if path.name not in (file, "preprocessor_config.json" if file.startswith("processor") else ""):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with one_line(words + r".*--clip_model \"\" for no CLIP score"):
        load_clip(str(tmp_path))


def test_another_model_and_one_that_cannot_be_had(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with one_line("config.json is of 'bert', not of a whole CLIP"):
        load_clip(str(tmp_path))
    with one_line("cannot load the --clip_model openai/clip-vit-large-patch14 .*hub"):
        load_clip("openai/clip-vit-large-patch14")
