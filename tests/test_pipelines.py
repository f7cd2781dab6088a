"""Class-conditional sampling with guidance."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from tests.conftest import tiny_condition_unet, tiny_unet
from vkd_gen.pipelines import ClassConditionalDDIMPipeline, num_classes_of

NO_CLASS = 3


@pytest.fixture
def unet():
    """Knows three classes, 0 to 2, and none, 3."""
    return tiny_unet(num_class_embeds=NO_CLASS + 1).eval()


def pipeline_of(unet, prediction_type="epsilon"):
    pipeline = ClassConditionalDDIMPipeline(unet, DDPMScheduler(prediction_type=prediction_type))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipeline, labels, seeds, **options):
    options = {"num_inference_steps": 4, "output_type": "pt"} | options
    return pipeline(labels, generator=generators(*seeds), **options).images


def reference(unet, seed, label, guidance_scale, prediction_type, num_inference_steps=5):
    """DDIM without noise (Song et al., 2021, eq. 12), guided as Ho and Salimans, 2022, eq. 6; numpy float64.

    Their weight w counts from zero: (1 + w) conditional - w none.
    """
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    stride, weight = 1000 // num_inference_steps, guidance_scale - 1
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double().numpy()
    for timestep in reversed(range(0, 1000, stride)):
        with torch.no_grad():
            conditional, none = (
                unet(torch.from_numpy(image).float(), timestep, class_labels=torch.tensor([number]))
                .sample.double()
                .numpy()
                for number in (label, NO_CLASS)
            )
        prediction = (1 + weight) * conditional - weight * none
        alpha, sigma = np.sqrt(alpha_bar[timestep]), np.sqrt(1 - alpha_bar[timestep])
        is_epsilon = prediction_type == "epsilon"
        clean = (image - sigma * prediction) / alpha if is_epsilon else alpha * image - sigma * prediction
        clean = clean.clip(-1, 1)
        noise = (image - alpha * clean) / sigma  # what is left of the image without the clipped sample
        previous = alpha_bar[timestep - stride] if timestep >= stride else 1.0
        image = np.sqrt(previous) * clean + np.sqrt(1 - previous) * noise
    return (image[0] / 2 + 0.5).clip(0, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5, 3.0])
def test_images_reference(unet, guidance_scale, prediction_type):
    labels, seeds = [0, 2, NO_CLASS], [3, 11, 4]
    pipeline = pipeline_of(unet, prediction_type)
    images = sample(pipeline, labels, seeds, guidance_scale=guidance_scale, num_inference_steps=5)
    for image, label, seed in zip(images, labels, seeds, strict=True):
        expected = reference(unet, seed, label, guidance_scale, prediction_type)
        np.testing.assert_allclose(image, expected, atol=2e-3)
        assert expected.std() > 0.05  # an image, neither black nor white


def test_guidance_towards_no_class_changes_nothing(unet):
    """None + w (none - none) is none, whatever the weight."""
    plain, guided = (sample(pipeline_of(unet), [NO_CLASS], [5], guidance_scale=scale) for scale in (1.0, 3.0))
    torch.testing.assert_close(plain, guided, atol=1e-4, rtol=0)


def test_without_guidance_the_network_is_asked_for_the_labels_alone(unet):
    asked = []
    unet.register_forward_pre_hook(lambda _, inputs, options: asked.append(options["class_labels"]), with_kwargs=True)
    sample(pipeline_of(unet), [2, 0], [1, 2], num_inference_steps=1)
    sample(pipeline_of(unet), [2, 0], [1, 2], num_inference_steps=1, guidance_scale=2.0)
    assert [labels.tolist() for labels in asked] == [[2, 0], [2, 0, NO_CLASS, NO_CLASS]]


def test_saved_and_loaded(unet, tmp_path):
    pipeline = pipeline_of(unet, "v_prediction")
    pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalDDIMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    options = {"guidance_scale": 2.0}
    assert torch.equal(sample(loaded, [0, 1], [3, 4], **options), sample(pipeline, [0, 1], [3, 4], **options))
    stock = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert type(stock) is UNet2DModel
    assert stock.config.num_class_embeds == NO_CLASS + 1
    for name, value in unet.state_dict().items():
        assert torch.equal(stock.state_dict()[name], value)


def test_kinds_of_output(unet):
    pipeline = pipeline_of(unet)
    tensor, array = sample(pipeline, [0, 1], [3, 4]), sample(pipeline, [0, 1], [3, 4], output_type="np")
    assert tensor.shape == (2, 1, 8, 8)
    assert 0 <= tensor.min() < tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1))
    pictures = sample(pipeline, [0, 1], [3, 4], output_type="pil")
    for picture, pixels in zip(pictures, array, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), (pixels[..., 0] * 255).round())
    alone = pipeline([0, 1], 1.0, generators(3, 4), 4, "pt", False)  # in the order of DiTPipeline
    assert isinstance(alone, tuple)
    assert torch.equal(alone[0], tensor)


def test_half_precision(unet):
    exact = sample(pipeline_of(unet), [0, 1], [3, 4], guidance_scale=2.0, output_type="np")
    half = sample(pipeline_of(unet.to(torch.bfloat16)), [0, 1], [3, 4], guidance_scale=2.0, output_type="np")
    assert half.dtype == np.float32
    assert np.abs(half - exact).mean() < 0.05


def test_sizes_that_are_not_square():
    unet = tiny_unet(num_class_embeds=3, size=[8, 16])
    assert sample(pipeline_of(unet), [0], [3]).shape == (1, 1, 8, 16)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 4], {}, "there is no class 4; labels are 0 to 2, and 3 for no class"),
        ([-1], {}, "there is no class -1"),
        ([], {}, "at least one whole number"),
        ([0.5], {}, "at least one whole number"),
        (2, {}, "at least one whole number"),
        ([0], {"guidance_scale": 0.5}, "guidance_scale must be at least 1 and finite, not 0.5"),
        ([0], {"guidance_scale": float("nan")}, "guidance_scale must be at least 1"),
        ([0], {"guidance_scale": float("inf")}, "guidance_scale must be at least 1"),
        ([0, 1], {"generator": generators(0)}, "2 labels need one generator or as many, not 1"),
    ],
)
def test_what_cannot_be_sampled(unet, labels, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(unet)(labels, num_inference_steps=1, **options)


def test_a_unet_without_classes():
    with pytest.raises(ValueError, match="takes no class labels"):
        pipeline_of(tiny_unet())


def test_number_of_classes():
    assert num_classes_of(tiny_unet(num_class_embeds=11)) == 10
    assert num_classes_of(tiny_unet()) is None
    assert isinstance(tiny_condition_unet(), UNet2DConditionModel)
    assert num_classes_of(tiny_condition_unet()) is None
