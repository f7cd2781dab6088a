"""Scores and costs, against other implementations and hand counts."""

from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.conftest import DrawsByNumber, make_batch, tiny_unet
from vkd_gen import FeatureNormalizer, FrozenTeacher, OrthogonalProjector, ProjectedStudent, calibrate, pair_layers
from vkd_gen.data.images import Images
from vkd_gen.data.samples import Pixels
from vkd_gen.distillation import matching_table
from vkd_gen.evaluation.compare import describe_models, evaluate
from vkd_gen.evaluation.cost import count_macs, count_parameters, milliseconds_per_image
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.feature_network import (
    FeatureNetwork,
    accuracy,
    load_feature_network,
    save_feature_network,
    train_feature_network,
)
from vkd_gen.evaluation.labels import Score
from vkd_gen.evaluation.tables import markdown_table, print_table
from vkd_gen.models import Model
from vkd_gen.normalization import width_floor
from vkd_gen.schedule import Schedule


@pytest.fixture
def images():
    """Twenty grey images of noise, 8x8."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    return Images(lambda index: Image.fromarray(pixels[index]), 8, 1, "noise", np.arange(20))


# ---- errors on held-out images


def model_of(network, **schedule):
    return Model(SimpleNamespace(unet=network, scheduler=DDPMScheduler(**schedule)))


def constant(value, **schedule):
    """A model that predicts one number everywhere."""
    model = model_of(tiny_unet((4,)), **schedule)
    model.predict = lambda noisy_sample, _timesteps, _conditioning: torch.full_like(noisy_sample, value)
    return model


def test_held_out_errors_reference(images):
    """Constant predictors, on the same draws in numpy float64."""
    draws = [DrawsByNumber(images, seed=1_000_003)[number] for number in range(30)]
    noise = np.stack([draw["noise"].numpy() for draw in draws]).astype(np.float64)
    samples = np.stack([draw["sample"].numpy() for draw in draws]).astype(np.float64)
    models = {"noise": constant(0.5), "sample": constant(0.25, prediction_type="sample")}
    errors = held_out_errors(models, Pixels(images), num_draws=30, batch_size=8)
    assert errors.keys() == {"noise", "sample"}
    assert errors["noise"] == pytest.approx({"denoising_error": np.square(noise - 0.5).mean()})
    assert errors["sample"] == pytest.approx({"denoising_error": np.square(samples - 0.25).mean()})


def test_distance_to_the_teacher_reference(images):
    """In the student's prediction type: the sample that the teacher's noise of zero implies is x / alpha."""
    teacher, student = constant(0.0), constant(0.0, prediction_type="v_prediction")
    found = held_out_errors({"student": student}, Pixels(images), teacher=teacher, num_draws=10)["student"][
        "teacher_distance"
    ]
    alpha_bar, expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), []
    for number in range(10):
        draw = {name: value.double().numpy() for name, value in DrawsByNumber(images, seed=1_000_003)[number].items()}
        timestep = int(draw["time"] * 1000)
        alpha, sigma = np.sqrt(alpha_bar[timestep]), np.sqrt(1 - alpha_bar[timestep])
        noisy = alpha * draw["sample"] + sigma * draw["noise"]
        expected.append(np.square(sigma * noisy / alpha).mean())  # v = alpha * 0 - sigma * noisy / alpha
    assert found == pytest.approx(np.mean(expected), rel=1e-3)


def test_the_teacher_has_no_distance_to_itself(images):
    teacher, student = (model_of(tiny_unet(seed=seed)) for seed in (1, 2))
    errors = held_out_errors({"teacher": teacher, "student": student}, Pixels(images), teacher=teacher, num_draws=20)
    assert errors["teacher"]["teacher_distance"] == 0
    assert errors["student"]["teacher_distance"] > 1e-3
    assert errors["teacher"].keys() == errors["student"].keys() == {"denoising_error", "teacher_distance"}


@pytest.mark.parametrize("batch_size", [7, 64])
def test_held_out_errors_do_not_depend_on_the_batch_size(images, batch_size):
    teacher, student = (model_of(tiny_unet(seed=seed)) for seed in (1, 2))
    options = {"teacher": teacher, "num_draws": 20}
    expected = held_out_errors({"student": student}, Pixels(images), **options, batch_size=20)["student"]
    found = held_out_errors({"student": student}, Pixels(images), **options, batch_size=batch_size)["student"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_held_out_errors_are_without_dropout(images):
    """Of the network as it is sampled, in whatever mode the caller left it; and it is left so."""
    unet = tiny_unet(dropout=0.5)
    expected = held_out_errors({"student": model_of(unet.eval())}, Pixels(images), num_draws=20)
    assert held_out_errors({"student": model_of(unet.train())}, Pixels(images), num_draws=20) == expected
    assert unet.training


def test_held_out_errors_with_labels_reference(images):
    """Every UNet is told each image's own class, and none is dropped."""
    labelled = replace(images, labels=np.arange(20) % 3, num_classes=3)
    unet, teacher = (tiny_unet(seed=seed, num_class_embeds=4).eval() for seed in (1, 2))
    found = held_out_errors({"student": model_of(unet)}, Pixels(labelled), teacher=model_of(teacher), num_draws=20)
    alpha_bar, expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), []
    for number in range(20):
        draw = DrawsByNumber(labelled, seed=1_000_003)[number]
        assert draw["class_labels"] in (0, 1, 2)
        timestep = int(draw["time"] * 1000)
        noisy = np.sqrt(alpha_bar[timestep]) * draw["sample"] + np.sqrt(1 - alpha_bar[timestep]) * draw["noise"]
        with torch.no_grad():
            answers = [
                net(noisy[None].float(), timestep, draw["class_labels"][None]).sample[0] for net in (unet, teacher)
            ]
        expected.append([(answers[0] - other).square().mean().item() for other in (draw["noise"], answers[1])])
    denoising, distance = np.mean(expected, axis=0)
    assert found["student"] == pytest.approx({"denoising_error": denoising, "teacher_distance": distance}, rel=1e-4)


# ---- cost


def test_count_parameters_of_a_hand_count():
    """One stage of 4 channels, 1 to 1 channel; weights and biases, norms included."""
    embedding = (4 * 16 + 16) + (16 * 16 + 16)  # 4 to 16 to 16 features
    resnet = 2 * (9 * 4 * 4 + 4) + 2 * (2 * 4) + (16 * 4 + 4)  # two 3x3 convolutions, two norms, the embedding's map
    doubled = resnet + 9 * 4 * 4 + 2 * 4 + (8 * 4 + 4)  # fed with a skip: twice the channels, and a shortcut
    ends = (9 * 1 * 4 + 4) + 2 * 4 + (9 * 4 * 1 + 1)  # conv_in, conv_norm_out, conv_out
    # encoder: one block; middle: two; decoder: two with skips
    assert count_parameters(tiny_unet((4,))) == embedding + ends + 3 * resnet + 2 * doubled


def test_count_macs_of_a_hand_count():
    """One stage of 4 channels on 8x8 images, 1 to 1 channel."""
    unet = tiny_unet((4,))
    embedding = 4 * 16 + 16 * 16  # time embedding: 4 to 16 to 16 features
    resnet = 2 * (64 * 9 * 4 * 4) + 16 * 4  # two 3x3 convolutions at 64 positions, one map of the embedding
    doubled = (64 * 9 * 8 * 4) + (64 * 9 * 4 * 4) + 16 * 4 + 64 * 8 * 4  # fed with a skip: twice the channels, shortcut
    ends = 64 * 9 * 1 * 4 * 2  # conv_in and conv_out
    # encoder: one block; middle: two; decoder: two with skips
    assert count_macs(unet) == embedding + ends + 3 * resnet + 2 * doubled


def test_milliseconds_per_image_known_value(monkeypatch):
    """By a clock that sampling moves: the fastest of three turns after the first, per image, for all steps."""
    now, calls = [0.0], []
    seconds = {"student": [0.0, 0.5, 0.25, 0.75], "teacher": [9.0, 2.0, 4.0, 3.0]}

    class Timed:
        takes_prompts = False

        def __init__(self, name):
            self.name = name

        def images(self, seeds, *, num_inference_steps, batch_size):
            calls.append((self.name, len(seeds), num_inference_steps, batch_size))
            now[0] += seconds[self.name].pop(0)

    monkeypatch.setattr("vkd_gen.evaluation.cost.time", SimpleNamespace(perf_counter=lambda: now[0]))
    models = {name: Timed(name) for name in seconds}
    times = milliseconds_per_image(models, num_images=16, num_inference_steps=50, repeats=3)
    # 5 of 50 steps are timed: 10 * 0.25 s and 10 * 2 s for 16 images
    assert times == pytest.approx({"student": 156.25, "teacher": 1250.0})
    assert calls == [("student", 16, 5, 16), ("teacher", 16, 5, 16)] * 4  # in turns


# ---- the feature network


def test_feature_network_round_trip(tmp_path):
    network = FeatureNetwork(width=4).train()
    network(torch.randn(8, 1, 8, 8))  # moves the running means
    save_feature_network(network, tmp_path / "new" / "features.safetensors", {"dataset": "digits", "accuracy": "0.9"})
    loaded = load_feature_network(tmp_path / "new" / "features.safetensors")
    assert loaded.facts == {"file": "features.safetensors", "dataset": "digits", "accuracy": "0.9"}
    assert not loaded.training
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded(pixels / 255)[0], network.eval()(pixels / 255)[0])


def test_feature_network_that_is_not_there_or_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"there is no feature network .*features\.safetensors"):
        load_feature_network(tmp_path / "features.safetensors")
    (tmp_path / "features.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a feature network"):
        load_feature_network(tmp_path / "features.safetensors")


def test_a_feature_network_learns(images):
    """Twenty images of two kinds, by their first pixel."""
    labels = (images.stack()[:, 0, 0, 0] > 0).long().numpy()
    images = replace(images, labels=labels, num_classes=10)
    network = train_feature_network(images, num_epochs=15)
    assert not network.training
    assert accuracy(network, images) > accuracy(FeatureNetwork().eval(), images)
    again = train_feature_network(images, num_epochs=15)
    assert torch.equal(again.head.weight, network.head.weight)


# ---- reports


@pytest.fixture
def models():
    unets = {"teacher": tiny_unet((8, 16), seed=2), "student": tiny_unet((4,), seed=1)}
    return {name: Model.of_unet(unet, DDPMScheduler()) for name, unet in unets.items()}


def test_evaluate(images, models):
    results, samples = evaluate(models, Pixels(images), num_inference_steps=2, num_shown=3)
    rows = results["rows"]
    assert rows["student"]["parameters"] == count_parameters(models["student"].network)
    assert rows["teacher"]["macs"] == count_macs(models["teacher"].network)
    assert rows["teacher"]["teacher_distance"] == 0 < rows["student"]["teacher_distance"]
    assert {name: tuple(shown.shape) for name, shown in samples.items()} == dict.fromkeys(models, (3, 1, 8, 8))
    assert results["protocol"]["environment"]["torch"] == version("torch")


def test_a_teacher_that_is_not_scored_is_still_compared(images, models):
    asked = []

    class Scores:
        protocol: ClassVar = {"extractor": "none"}

        def score_model(self, name, model, *, num_shown):
            asked.append(name)
            shown = SimpleNamespace(shown=torch.zeros(num_shown, 1, 8, 8), content_hash="0")
            source = dict.fromkeys(("sampler", "num_inference_steps", "num_images", "seeds"), 1)
            return [Score("fid", "x", 1.5)], shown, SimpleNamespace(protocol=source)

        def scores_of_held_out(self):
            return []

    options = {"num_inference_steps": 2, "num_shown": 3, "scorer": Scores()}
    results, samples = evaluate(models, Pixels(images), scored={"student"}, **options)
    assert asked == ["student"]
    assert results["rows"]["student"]["fid_x"] == 1.5
    assert "fid_x" not in results["rows"]["teacher"]
    assert results["rows"]["teacher"]["teacher_distance"] == 0
    assert results["sources"].keys() == {"student"}
    expected = models["teacher"].images(range(3), num_inference_steps=2)
    assert torch.equal(samples["teacher"], expected)  # it is shown all the same
    assert "| teacher |" in markdown_table(results)


def test_tables_show_every_row_in_columns_of_the_extractors_name(capsys):
    rows = {
        "student": {"parameters": 1234, "fid_digits": 1.5, "fid": 9, "kid_std_digits": 3.0},
        "real": {"fid_digits": 0.25},
    }
    results = {"rows": rows, "protocol": {"extractor": "digits", "reference": {"images": "x", "num_images": 3}}}
    table = markdown_table(results).splitlines()
    assert table[0] == "| | parameters | FID | FID (digits) |"
    assert table[2] == "| student | 1,234 | 9.00 | 1.50 |"
    assert table[3] == "| real | - | - | 0.25 |"
    assert table[-1] == "- reference: images x; number of images 3"
    rows["real"]["nearest_training_digits"] = 2.0  # for which a terminal has no room
    print_table(results)
    shown = capsys.readouterr().out
    assert "1,234" in shown
    assert "nearest" not in shown
    assert "| distance to the nearest training image (digits) |" in markdown_table(results)


def test_describe_models():
    text = describe_models(tiny_unet((16, 32)), tiny_unet((8, 16)))
    share = count_parameters(tiny_unet((8, 16))) / count_parameters(tiny_unet((16, 32)))
    assert f"{share:.1%} of the parameters" in text


def test_matching_table():
    student, teacher_unet = tiny_unet((8, 16)), tiny_unet((16, 32))
    (pair,) = pair_layers(student, teacher_unet, pairs=[("mid_block", "mid_block")])
    teacher = FrozenTeacher(teacher_unet, ["mid_block"])
    statistics = calibrate(teacher, [make_batch(8)], Schedule.of(DDPMScheduler()), num_timestep_bins=1)["mid_block"]
    whitened = FeatureNormalizer("whiten", statistics, rank=24)
    projected = ProjectedStudent(student, [pair], [OrthogonalProjector(16, 24)], [whitened])
    _, row = matching_table(projected, "mse").splitlines()
    floor, discarded = row.split()[-2:]
    assert float(floor) == pytest.approx(width_floor(whitened.target_covariance(), 16, "mse"), abs=1e-4)
    assert discarded == f"{whitened.discarded:.1%}"
    assert "16 -> 24 (whiten)" in row
