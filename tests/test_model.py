"""A pipeline around an exchangeable denoiser: images by seed, predictions, saving."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler

from tests.conftest import tiny_unet
from vkd_gen.models import Model
from vkd_gen.pipelines import stock_pipeline


def sample(unet, seeds, scheduler=None, num_inference_steps=4, class_labels=None, **options):
    model = Model.of_unet(unet, scheduler or DDPMScheduler())
    conditioning = None if class_labels is None else {"class_labels": class_labels}
    return model.images(seeds, conditioning=conditioning, num_inference_steps=num_inference_steps, **options)


def largest_difference(images, others):
    return (images.int() - others.int()).abs().max().item()


def reference_ddim(unet, seed, num_inference_steps, prediction_type):
    """DDIM without noise (Song et al., 2021, eq. 12, sigma = 0), samples clipped to [-1, 1], in numpy float64."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    stride = 1000 // num_inference_steps
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double().numpy()
    for timestep in reversed(range(0, 1000, stride)):
        with torch.no_grad():
            prediction = unet(torch.from_numpy(image).float(), timestep).sample.double().numpy()
        alpha, sigma = np.sqrt(alpha_bar[timestep]), np.sqrt(1 - alpha_bar[timestep])
        match prediction_type:
            case "epsilon":
                noise, clean = prediction, (image - sigma * prediction) / alpha
            case "v_prediction":
                noise, clean = alpha * prediction + sigma * image, alpha * image - sigma * prediction
        clean = clean.clip(-1, 1)
        previous = alpha_bar[timestep - stride] if timestep >= stride else 1.0
        image = np.sqrt(previous) * clean + np.sqrt(1 - previous) * noise
    return np.round((image[0] / 2 + 0.5).clip(0, 1) * 255)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samples_reference(prediction_type):
    unet = tiny_unet().eval()
    images = sample(unet, [3, 11], DDPMScheduler(prediction_type=prediction_type), num_inference_steps=5)
    for image, seed in zip(images, (3, 11), strict=True):
        expected = reference_ddim(unet, seed, 5, prediction_type)
        assert np.abs(image.numpy() - expected).max() <= 1  # one grey level
        assert expected.std() > 10  # an image, neither black nor white


@pytest.mark.parametrize(
    ("classes", "options"),
    [(None, {}), (4, {"class_labels": [2, 0, 1, 3, 0]}), (4, {"class_labels": [2, 0, 1, 3, 0], "guidance_scale": 2.5})],
)
@pytest.mark.parametrize("batch_size", [2, 100])
def test_an_image_depends_on_its_seed_and_label_alone(batch_size, classes, options):
    unet, seeds = tiny_unet(num_class_embeds=classes), [5, 0, 5, 2, 0]
    images = sample(unet, seeds, batch_size=batch_size, **options)
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == torch.uint8
    for number, seed in enumerate(seeds):
        alone = {**options, "class_labels": options["class_labels"][number : number + 1]} if classes else options
        assert largest_difference(images[number], sample(unet, [seed], **alone)[0]) <= 1
    assert largest_difference(images[1], images[4]) <= 1  # seed and label agree
    assert (largest_difference(images[0], images[2]) > 5) == bool(classes)  # labels differ


def test_seeds_give_unlike_images_and_the_same_ones_again():
    unet = tiny_unet()
    images = sample(unet, range(4))
    assert torch.equal(images, sample(unet, range(4)))
    for i in range(4):
        for j in range(i):
            assert largest_difference(images[i], images[j]) > 20


def test_global_randomness_is_neither_used_nor_changed():
    unet = tiny_unet()
    torch.manual_seed(1)
    first, state = sample(unet, [0]), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, sample(unet, [0]))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_in_eval_mode_and_restores_the_mode(training):
    unet = tiny_unet(dropout=0.5).train(training)
    first, second = sample(unet, [0]), sample(unet, [0])
    assert torch.equal(first, second)  # no dropout
    assert all(module.training is training for module in unet.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in unet.parameters())


def test_stock_pipeline_takes_the_schedule_over_and_survives_saving(tmp_path):
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_end=0.01, rescale_betas_zero_snr=True)
    unet = tiny_unet()
    pipeline = stock_pipeline(unet, scheduler)
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(loaded.unet, [1], loaded.scheduler), sample(unet, [1], scheduler))


def test_classes_in_turn_by_default():
    unet = tiny_unet(num_class_embeds=4)  # three classes, and none
    seeds = [0, 1, 2, 3, 4, 8]
    assert torch.equal(sample(unet, seeds), sample(unet, seeds, class_labels=[0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (None, {"class_labels": [0, 1]}, "unconditional"),
        (None, {"guidance_scale": 2.0}, "unconditional"),
        (4, {"class_labels": [0]}, "2 seeds need as many class labels, not 1"),
        (4, {"class_labels": [0, 4]}, "there is no class 4"),
    ],
)
def test_labels_that_do_not_fit(classes, options, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_unet(num_class_embeds=classes), [0, 1], **options)


@pytest.mark.parametrize(
    ("seeds", "options"), [([], {}), ([0], {"num_inference_steps": 0}), ([0], {"batch_size": 0}), (range(0), {})]
)
def test_counts_below_one(seeds, options):
    with pytest.raises(ValueError, match="at least one seed"):
        sample(tiny_unet(), seeds, **options)


# ---- another denoiser


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("prediction_type", [None, "v_prediction"])
def test_a_pipeline_around_another_network_is_the_one_of_that_network(classes, prediction_type, tmp_path):
    schedule = {"beta_schedule": "sigmoid", "clip_sample_range": 2.0}
    teacher = Model.of_unet(tiny_unet(num_class_embeds=classes), DDPMScheduler(**schedule))
    unet = tiny_unet((4, 8), num_class_embeds=classes, seed=1)
    student = teacher.around(unet, prediction_type)
    expected = Model.of_unet(unet, DDPMScheduler(**schedule, prediction_type=prediction_type or "epsilon"))
    assert student.network is unet
    assert student.schedule.prediction_type == expected.schedule.prediction_type == (prediction_type or "epsilon")
    assert teacher.schedule.prediction_type == "epsilon"
    for name, model in (("found", student), ("expected", expected)):
        model.save(tmp_path / name, "---\n---\n# card\n")
    files = [path.relative_to(tmp_path / "found") for path in (tmp_path / "found").rglob("*") if path.is_file()]
    assert len(files) == 5  # index, card, scheduler, configuration, weights
    for file in files:
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert torch.equal(student.images([3], num_inference_steps=2), expected.images([3], num_inference_steps=2))


def test_a_prediction_is_float32_whatever_the_network():
    model = Model.of_unet(tiny_unet(num_class_embeds=4).bfloat16(), DDPMScheduler())
    labels, timesteps = torch.tensor([0, 2]), torch.tensor([0, 999])
    noisy = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        found = model.predict(noisy, timesteps, {"class_labels": labels})
        expected = model.network(noisy.bfloat16(), timesteps, class_labels=labels).sample
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
