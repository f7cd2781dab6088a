"""The teacher's answers to a fixed set of draws: the live teacher's, and another bank for whatever changes them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.conftest import tiny_unet
from vkd_gen import FrozenTeacher, distillation_losses, pair_layers
from vkd_gen.data import Images, TrainingDraws
from vkd_gen.diffusion import add_noise
from vkd_gen.distillation import LossWeights, ProjectedStudent
from vkd_gen.normalization import FeatureNormalizer
from vkd_gen.projectors import OrthogonalProjector
from vkd_gen.training import bank as bank_module
from vkd_gen.training.bank import open_bank
from vkd_gen.training.loop import on_device

CPU = torch.device("cpu")
LAYERS = ("down_blocks.0", "mid_block", "up_blocks.1", "mid_block/2")


def random_images(count=6, seed=0, labels=None):
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 8, 8), dtype=np.uint8)
    return Images(
        lambda index: Image.fromarray(pixels[index]),
        8,
        1,
        "noise",
        np.arange(count),
        labels=labels,
        num_classes=0 if labels is None else 3,
    )


def make_bank(folder, *, size=10, images=None, unet=None, layers=LAYERS, scheduler=None, batch_size=4, **draws):
    """A bank, the draws that it is made of, and the teacher."""
    teacher = FrozenTeacher(tiny_unet((16, 32), seed=2) if unet is None else unet, layers)
    draws = TrainingDraws(random_images() if images is None else images, **{"seed": 0, "random_flip": True, **draws})
    bank = open_bank(folder, size, draws, teacher, scheduler or DDPMScheduler(), batch_size=batch_size, device=CPU)
    return bank, draws, teacher


def answers_one_by_one(draws, teacher, numbers):
    """The slow way: the live teacher, a draw at a time."""
    found = []
    for number in numbers:
        batch = on_device(draws[[number]], DDPMScheduler(), CPU)
        noisy_sample = add_noise(DDPMScheduler(), batch["sample"], batch["noise"], batch["timesteps"])
        found.append(teacher(noisy_sample, batch["timesteps"], batch.get("conditioning")))
    features = {name: torch.cat([features[name] for _, features in found]) for name in found[0][1]}
    return torch.cat([prediction for prediction, _ in found]), features


def assert_answers(batch, prediction, features, **tolerance):
    torch.testing.assert_close(batch["teacher_prediction"], prediction, **tolerance)
    assert batch["teacher_features"].keys() == features.keys()
    for name, feature in features.items():
        torch.testing.assert_close(batch["teacher_features"][name], feature, **tolerance)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_the_live_teachers(tmp_path, batch_size):
    bank, draws, teacher = make_bank(tmp_path, batch_size=batch_size)
    numbers = [3, 9, 0, 1, 1, 7]
    prediction, features = answers_one_by_one(draws, teacher, numbers)
    assert_answers(bank[numbers], prediction, features, rtol=1e-5, atol=1e-5)


def test_equal_batches_give_equal_bits(tmp_path):
    """On a CPU; a batch that is put together in another way may round in another way."""
    bank, draws, teacher = make_bank(tmp_path, size=8, batch_size=4)
    batch = on_device(draws[range(4, 8)], DDPMScheduler(), CPU)
    noisy_sample = add_noise(DDPMScheduler(), batch["sample"], batch["noise"], batch["timesteps"])
    assert_answers(bank[range(4, 8)], *teacher(noisy_sample, batch["timesteps"]), rtol=0, atol=0)


def test_draw_n_is_draw_n_modulo_the_size(tmp_path):
    bank, draws, _ = make_bank(tmp_path, size=5)
    found = bank[[12, 4, 5, 10**12]]
    expected = draws[[2, 4, 0, 0]]
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    again = bank[[2, 4, 0, 0]]
    assert torch.equal(found["teacher_prediction"], again["teacher_prediction"])


def test_labels_decide_the_answers(tmp_path):
    images = random_images(labels=np.array([0, 1, 2, 0, 1, 2]))
    given = {"unet": tiny_unet((16, 32), num_class_embeds=4), "guidance_dropout": 0.5}
    bank, draws, teacher = make_bank(tmp_path, images=images, **given)
    others, *_ = make_bank(tmp_path, images=replace(images, labels=np.array([0, 1, 2, 0, 1, 1])), **given)
    assert others._answers.folder != bank._answers.folder
    numbers = range(10)
    assert_answers(bank[numbers], *answers_one_by_one(draws, teacher, numbers), rtol=1e-5, atol=1e-5)
    assert bank[numbers]["class_labels"].tolist() == draws[numbers]["class_labels"].tolist()


def test_answers_are_kept_in_the_teachers_precision(tmp_path, capsys):
    unet = torch.nn.Module.to(tiny_unet((16, 32), seed=2), torch.bfloat16)
    bank, draws, teacher = make_bank(tmp_path, unet=unet, batch_size=1)
    batch = bank[[0, 6]]
    assert batch["teacher_prediction"].dtype == torch.float32
    assert {value.dtype for value in batch["teacher_features"].values()} == {torch.bfloat16}
    assert_answers(batch, *answers_one_by_one(draws, teacher, [0, 6]), rtol=0, atol=0)
    numbers = 8 * 8 + 16 * 4 * 4 + 32 * 4 * 4 + 16 * 8 * 8 + 32 * 2 * 2  # the prediction and four features
    assert f"10 answers of the teacher: {2 * numbers:,} bytes each" in capsys.readouterr().out


def test_without_layers_predictions_alone_are_kept(tmp_path):
    bank, *_ = make_bank(tmp_path, layers=())
    assert bank[[0]]["teacher_features"] == {}


# ---- losses


@pytest.fixture
def models():
    student, teacher_unet = tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2)
    pairs = pair_layers(student, teacher_unet)
    projectors = [OrthogonalProjector(pair.student_channels, pair.teacher_channels) for pair in pairs]
    normalizers = [FeatureNormalizer("none", channels=pair.teacher_channels) for pair in pairs]
    return ProjectedStudent(student, pairs, projectors, normalizers), teacher_unet, [pair.teacher for pair in pairs]


def losses_and_gradients(projected, batch, teacher, weights):
    projected.zero_grad()
    losses = distillation_losses(projected, batch, noise_scheduler=DDPMScheduler(), teacher=teacher, weights=weights)
    losses["total"].backward()
    gradients = {name: value.grad.clone() for name, value in projected.named_parameters() if value.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, gradients


@pytest.mark.parametrize("feature", [0.0, 0.3])
def test_losses_and_gradients_are_the_live_teachers(models, tmp_path, feature):
    """Bit for bit on a CPU, where the batches are those of the bank; and the teacher is not asked."""
    projected, teacher_unet, layers = models
    bank, draws, teacher = make_bank(tmp_path, size=8, unet=teacher_unet, layers=layers)
    weights = LossWeights(denoising=0.5, output=1.0, feature=feature)
    live = on_device(draws[range(4)], DDPMScheduler(), CPU)
    kept = on_device(bank[range(8, 12)], DDPMScheduler(), CPU)
    expected = losses_and_gradients(projected, live, teacher, weights)
    teacher_unet.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was asked"))
    found = losses_and_gradients(projected, kept, teacher, weights)
    for values, expected_values in zip(found, expected, strict=True):
        assert values.keys() == expected_values.keys()
        assert all(torch.equal(value, expected_values[name]) for name, value in values.items())


def test_a_batch_without_the_features_that_are_asked_for(models, tmp_path):
    projected, teacher_unet, _ = models
    bank, _, teacher = make_bank(tmp_path, unet=teacher_unet, layers=())
    with pytest.raises(ValueError, match="the teacher does not capture down_blocks"):
        losses_and_gradients(projected, on_device(bank[[0, 1]], DDPMScheduler(), CPU), teacher, LossWeights())


# ---- another bank for whatever changes the answers


def other_weights():
    unet = tiny_unet((16, 32), seed=2)
    with torch.no_grad():
        unet.conv_in.bias[0] += 1e-6
    return unet


CHANGES = {
    "size": lambda: {"size": 9},
    "seed": lambda: {"seed": 1},
    "flip": lambda: {"random_flip": False},
    "guidance dropout": lambda: {"guidance_dropout": 0.2},
    "images": lambda: {"images": random_images(seed=1)},
    "number of images": lambda: {"images": random_images(count=5)},
    "resolution": lambda: {"images": replace(random_images(), resolution=16)},
    "weights": lambda: {"unet": other_weights()},
    "precision": lambda: {"unet": torch.nn.Module.to(tiny_unet((16, 32), seed=2), torch.bfloat16)},
    "configuration": lambda: {"unet": tiny_unet((16, 32), seed=2, norm_eps=1e-6)},
    "layers": lambda: {"layers": LAYERS[:2]},
    "schedule": lambda: {"scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_bank_for_another(name, tmp_path):
    first, *_ = make_bank(tmp_path)
    second, draws, teacher = make_bank(tmp_path, **CHANGES[name]())
    assert second._answers.folder != first._answers.folder
    if name != "schedule":
        numbers = [0, 5]
        assert_answers(second[numbers], *answers_one_by_one(draws, teacher, numbers), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["random numbers", "diffusers"])
def test_another_bank_for_other_code(part, tmp_path, monkeypatch):
    first, *_ = make_bank(tmp_path)
    if part == "diffusers":
        monkeypatch.setattr(bank_module.diffusers, "__version__", "0")
    else:
        generator_of = TrainingDraws._generator_of
        monkeypatch.setattr(TrainingDraws, "_generator_of", lambda draws, *key: generator_of(draws, key[0] + 1, key[1]))
    assert make_bank(tmp_path)[0]._answers.folder != first._answers.folder


def test_the_same_bank_for_the_same(tmp_path):
    """Wherever the teacher was loaded from, and however many draws go through it at a time."""
    unet = tiny_unet((16, 32), seed=2)
    unet.save_pretrained(tmp_path / "saved")
    first, *_ = make_bank(tmp_path / "bank")
    second, *_ = make_bank(
        tmp_path / "bank", unet=type(unet).from_pretrained(tmp_path / "saved"), batch_size=3, layers=LAYERS
    )
    assert second._answers.folder == first._answers.folder
