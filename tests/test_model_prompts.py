"""Images of text pipelines: an image depends on its seed and prompt alone, and what does not fit is refused."""

import pytest
import torch

from tests.conftest import one_line, tiny_unet
from tests.text_pipelines import tiny_pipeline
from vkd_gen.models import Model
from vkd_gen.pipelines import stock_pipeline


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request):
    return Model(tiny_pipeline(request.param))


def draw(model, seeds, prompts, **options):
    return model.images(seeds, conditioning={"prompt": prompts}, num_inference_steps=3, **options)


@pytest.mark.parametrize("guidance_scale", [None, 1.0, 7.5])
def test_an_image_depends_on_its_seed_and_prompt_alone(model, guidance_scale):
    seeds, prompts = [5, 0, 5, 2, 0], ["red cat", "a blue hat", "blue", "red, red", "a blue hat"]
    options = {"guidance_scale": guidance_scale}
    images = draw(model, seeds, prompts, batch_size=3, **options)
    assert images.shape == (5, 3, 32, 32)
    assert model.image_size == 32
    assert images.float().std() > 5
    for number in range(4):
        alone = draw(model, seeds[number : number + 1], prompts[number : number + 1], **options)[0]
        assert (images[number].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(images[0], images[2])  # the prompts differ


def test_negative_prompts_and_sizes_reach_the_pipeline(model):
    images = draw(model, [1, 2], ["red", "blue"])
    conditioning = {"prompt": ["red", "blue"], "negative_prompt": ["cat", "hat"]}
    assert not torch.equal(images, model.images([1, 2], conditioning=conditioning, num_inference_steps=3))
    assert draw(model, [1], ["red"], size=48).shape == (1, 3, 48, 48)


def test_what_is_not_finite_is_found_with_guidance(model):
    bias = model.network.conv_out.bias
    with torch.no_grad():
        kept, bias[0] = bias[0].clone(), float("nan")
    try:
        with one_line(r"2 of 2 samples of the model are not finite, from evaluation 1 .* conv_out.bias"):
            draw(model, [1, 2], ["red", "blue"], guidance_scale=5.0)
    finally:
        with torch.no_grad():
            bias[0] = kept


def test_a_decoder_that_gets_one_image_after_the_other(model):
    images = draw(model, [1, 2], ["red", "blue"])
    model.pipeline.vae.enable_slicing()
    assert (images.int() - draw(model, [1, 2], ["red", "blue"]).int()).abs().max() <= 1
    model.pipeline.vae.disable_slicing()


@pytest.mark.parametrize(
    ("conditioning", "options", "words"),
    [
        ({}, {}, "makes images of prompts: give a text for each image"),
        ({"prompt": [7]}, {}, "give a text for each image"),
        ({"prompt": ["red", "blue"]}, {}, "1 seeds need as many prompt, not 2"),
        ({"prompt": ["red"], "negative_prompts": ["x"]}, {}, "takes no negative_prompts"),
        ({"prompt": ["red"]}, {"guidance_scale": float("nan")}, "guidance_scale must be at least 1 and finite"),
        ({"prompt": ["red"]}, {"guidance_scale": 0.5}, "guidance_scale must be at least 1 and finite"),
        ({"prompt": ["red"]}, {"size": 33}, "must be a multiple of 2 pixels, not 33"),
    ],
)
def test_what_does_not_fit(model, conditioning, options, words):
    with one_line(words):
        model.images([1], conditioning=conditioning, num_inference_steps=1, **options)


def test_other_pipelines_take_neither_prompts_nor_sizes():
    model = Model(stock_pipeline(tiny_unet(), Model(tiny_pipeline("sd1")).noise_scheduler))
    assert not model.takes_prompts
    with one_line("takes no prompt"):
        model.images([1], conditioning={"prompt": ["red"]})
    with one_line("of 8 pixels, and of no other size"):
        model.images([1], size=16)
