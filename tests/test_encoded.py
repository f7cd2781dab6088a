"""Latents and embeddings: kept and live alike, and as the pipeline itself computes them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from tests.text_pipelines import tiny_pipeline
from tests.transformers import tiny_dit_pipeline
from vkd_gen.data.draws import Draws
from vkd_gen.data.encoded import How, encode
from vkd_gen.data.images import Images
from vkd_gen.data.views import Views, aspect_buckets, bucketed_views
from vkd_gen.encoders import Encoders
from vkd_gen.schedule import Schedule

CAPTIONS = [("red cat",), ("blue heart", "a heart"), ("",), ("cat",), ("heart", "red", "blue"), ("red cat",)]


def images(size=(40, 52), captions=CAPTIONS):
    """Noise, wider than high."""
    PartialState()
    pixels = np.random.default_rng(0).integers(0, 255, (len(captions), *size, 3), dtype=np.uint8)
    return Images(
        lambda number: Image.fromarray(pixels[number]),
        32,
        3,
        "noise",
        np.arange(len(captions)),
        captions=captions,
        identity=lambda: f"noise {size}",
    )


def samples(kind, folder, *, num_crops=1, random_flip=True, dropout=0.3, pipeline=None, of=None, precision="no"):
    """Encoded images; live where there is no folder."""
    encoders = Encoders(pipeline or tiny_pipeline(kind), precision=precision)
    how = How(folder, random_flip, dropout, batch_size=4)
    return encode(of or images(), Views([(32, 32)], num_crops=num_crops), encoders, how, lambda line: None)


def batches(encoded, count=24):
    """The first draws, finished."""
    draws = Draws(encoded, Schedule.of(tiny_pipeline("sd1").scheduler), seed=3, batch_size=8)
    return list(draws.first(count))


def flat(batch):
    """All tensors of a batch by name."""
    found = {}
    for name, value in batch.items():
        found |= flat(value) if isinstance(value, dict) else {name: value}
    return found


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("num_crops", [1, 3])
def test_kept_and_live_encodings_are_the_same(tmp_path, kind, num_crops):
    """With flips, crops, dropped prompts and several captions, to 1e-6."""
    kept = batches(samples(kind, tmp_path, num_crops=num_crops))
    live = batches(samples(kind, None, num_crops=num_crops))
    for one, other in zip(kept, live, strict=True):
        one, other = flat(one), flat(other)
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_live_encoders_outlive_the_pipelines_parts(precision):
    """A model of prompts lets go of them; what a denoiser is told is float32, whatever encoded it."""
    pipeline = tiny_pipeline("sdxl")
    encoded = samples("sdxl", None, pipeline=pipeline, precision=precision)
    pipeline.register_modules(vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    for batch in batches(encoded, 8):
        assert {value.dtype for name, value in flat(batch).items() if name != "timesteps"} == {torch.float32}


def of_classes(count=12, num_classes=3):
    """Images with a label each, and no captions, and the VAE that encodes them."""
    pictures = images(captions=[("",)] * count)
    labels = np.arange(count) % num_classes
    return replace(pictures, captions=None, labels=labels, num_classes=num_classes), tiny_dit_pipeline(num_classes=3)


@pytest.mark.parametrize("num_crops", [1, 3])
def test_images_of_classes_are_encoded_alike_and_told_their_class(tmp_path, num_crops):
    """Kept and live; the label is the image's, or where it is dropped the number of classes."""
    pictures, pipeline = of_classes()
    options = {"pipeline": pipeline, "of": pictures, "num_crops": num_crops}
    kept, live = (samples("", folder, **options) for folder in (tmp_path, None))
    for one, other in zip(batches(kept), batches(live), strict=True):
        assert one["conditioning"].keys() == {"class_labels"}
        assert torch.equal(one["conditioning"]["class_labels"], other["conditioning"]["class_labels"])
        torch.testing.assert_close(one["sample"], other["sample"], rtol=1e-5, atol=1e-6)
        assert one["sample"].shape[1:] == (4, 16, 16)
    generator = np.random.default_rng(0)
    told = [kept.tell(kept.read(4), generator)["class_labels"].item() for _ in range(300)]
    assert set(told) == {1, 3}
    assert 0.2 < np.mean(np.array(told) == 3) < 0.4
    assert kept.nothing({"class_labels": torch.tensor([0, 2])})["class_labels"].tolist() == [3, 3]
    assert not list(tmp_path.rglob("*prompts*"))


def test_a_latent_of_a_class_is_what_the_pipeline_decodes(tmp_path):
    """Scaled as DiTPipeline scales it back: the mean of the draws, decoded, is the mean of the VAE."""
    pictures, pipeline = of_classes(2)
    encoded = samples("", tmp_path, random_flip=False, pipeline=pipeline, of=pictures)
    pixels, _ = pictures.view(1, Views([(32, 32)]), 0, False)
    generator = np.random.default_rng(0)
    drawn = torch.stack([encoded.draw(encoded.read(1), generator)["latent"] for _ in range(400)])
    with torch.no_grad():
        found = pipeline.vae.encode(pixels[None]).latent_dist
    unscaled = drawn / pipeline.vae.config.scaling_factor
    assert ((unscaled.mean(0) - found.mean[0]).abs() < 5 * found.std[0] / 20).all()
    assert (unscaled.std(0) / found.std[0]).mean() == pytest.approx(1, abs=0.02)


def test_what_is_drawn_varies(tmp_path):
    """Crops, flips and captions are drawn anew each time, and a share of the prompts is dropped."""
    encoded = samples("sdxl", tmp_path, num_crops=4)
    generator = np.random.default_rng(0)
    lefts = {encoded.draw(encoded.read(0), generator)["time_ids"][3].item() for _ in range(60)}
    assert len(lefts) > 4  # four crops, each as it is and mirrored; some share their left
    told = [encoded.tell(encoded.read(4), generator) for _ in range(200)]
    distinct = {tuple(entry["prompt"]["text_embeds"].tolist()) for entry in told}
    assert len(distinct) == 3
    assert 0.2 < np.mean([entry["is_dropped"].item() for entry in told]) < 0.4


def test_a_latent_is_a_sample_of_the_distribution(tmp_path):
    pipeline = tiny_pipeline("sd1")
    encoded = samples("sd1", tmp_path, random_flip=False, pipeline=pipeline)
    generator = np.random.default_rng(0)
    drawn = torch.stack([encoded.draw(encoded.read(1), generator)["latent"] for _ in range(400)])
    pixels, _ = images().view(1, Views([(32, 32)]), 0, False)
    with torch.no_grad():
        found = pipeline.vae.encode(pixels[None]).latent_dist
    factor = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(drawn.mean(0), found.mean[0] * factor, atol=5 * factor / 20, rtol=0)
    assert (drawn.std(0) / (found.std[0] * factor)).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(tmp_path, kind):
    """The pipeline's own call, caught at its UNet, for the same prompt, size and crop."""
    pipeline = tiny_pipeline(kind)
    encoded = samples(kind, tmp_path, random_flip=False, dropout=0.0, pipeline=pipeline)
    batch = encoded_batch(encoded, 3)
    caught = []

    def look(_module, _inputs, keywords):
        caught.append(keywords)

    hook = pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    sizes = {}
    if kind == "sdxl":
        _, view = images().view(3, Views([(32, 32)]), 0, False)
        assert (view.original_height, view.original_width, view.top, view.left) == (40, 52, 0, 5)
        sizes = {"original_size": (40, 52), "crops_coords_top_left": (0, 5), "target_size": (32, 32)}
    pipeline(CAPTIONS[3][0], num_inference_steps=1, guidance_scale=2.0, output_type="latent", **sizes)
    hook.remove()
    told = flat({name: caught[0][name] for name in batch["conditioning"]})
    nothing = flat(encoded.nothing(batch["conditioning"]))
    for name, value in flat(batch["conditioning"]).items():
        torch.testing.assert_close(value[0], told[name][1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(nothing[name][0], told[name][0], atol=1e-6, rtol=1e-6)


def encoded_batch(encoded, index):
    """One image, finished."""
    draws = Draws(encoded, Schedule.of(tiny_pipeline("sd1").scheduler), seed=0)
    return draws.finish(draws.around([0], [encoded.read(index)]))


def test_an_interrupted_cache_goes_on(tmp_path, monkeypatch):
    """Files that are whole stay; what is missing or damaged is made again."""
    monkeypatch.setattr("vkd_gen.data.cache.FILE_BYTES", 3 * 2 * 4 * 16 * 16 * 4)
    expected = batches(samples("sd1", tmp_path / "straight"))
    found = Encoders.latents
    calls = []

    def interrupted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return found(self, pixels)

    monkeypatch.setattr(Encoders, "latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        samples("sd1", tmp_path / "cut")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.safetensors")}
    assert kept
    monkeypatch.setattr(Encoders, "latents", found)
    for one, other in zip(batches(samples("sd1", tmp_path / "cut")), expected, strict=True):
        torch.testing.assert_close(flat(one), flat(other), rtol=1e-5, atol=1e-6)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def changed_vae():
    pipeline = tiny_pipeline("sd1")
    pipeline.vae.decoder.conv_out.bias.data += 1e-3
    return {"pipeline": pipeline}


def changed_tokenizer():
    pipeline = tiny_pipeline("sd1")
    pipeline.tokenizer.model_max_length = 12
    return {"pipeline": pipeline}


def changed_text_encoder():
    pipeline = tiny_pipeline("sd1")
    next(pipeline.text_encoder.parameters()).data += 1e-3
    return {"pipeline": pipeline}


@pytest.mark.parametrize(
    ("change", "of"),
    [
        (changed_vae, "latents"),
        (changed_tokenizer, "prompts"),
        (changed_text_encoder, "prompts"),
        (lambda: {"of": images(captions=[("a green one",), *CAPTIONS[1:]])}, "prompts"),
        (lambda: {"of": images(size=(40, 50))}, "latents"),
        (lambda: {"of": replace(images(), indices=np.arange(5))}, "latents"),
        (lambda: {"num_crops": 2}, "latents"),
        (lambda: {"random_flip": False}, "latents"),
        (lambda: {"precision": "bf16"}, "latents prompts"),
    ],
)
def test_a_change_never_meets_an_old_cache(tmp_path, change, of):
    samples("sd1", tmp_path)
    before = folders(tmp_path)
    samples("sd1", tmp_path)
    assert folders(tmp_path) == before
    samples("sd1", tmp_path, **change())
    added = {kind for folder, kind in folders(tmp_path).items() if folder not in before}
    assert added == set(of.split())


def folders(root):
    """Folder of a cache -> what it holds."""
    return {path.parent.name: json.loads(path.read_bytes())["of"] for path in root.glob("*/facts.json")}


def test_half_precision_that_overflows_is_told(tmp_path):
    pipeline = tiny_pipeline("sd1")
    pipeline.vae.encoder.conv_in.weight.data *= 1e8
    with pytest.raises(ValueError, match=r"latents that are not finite.*--encoding_precision no"):
        samples("sd1", tmp_path, pipeline=pipeline, precision="fp16")


def test_buckets_are_kept_as_live(tmp_path):
    """Batches of one size each, with crops and flips; sizes and crops are told as the pipeline tells them."""
    pixels = [
        np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        for number, size in enumerate([(40, 60), (60, 40), (44, 44), (41, 60), (90, 50), (40, 61)])
    ]
    mixed = replace(images(), read=lambda number: Image.fromarray(pixels[number]))
    views = bucketed_views(mixed.sizes(), aspect_buckets(32, 8), num_crops=3)
    pipeline = tiny_pipeline("sdxl")
    found = []
    for folder in (tmp_path, None):
        how = How(folder, random_flip=True, guidance_dropout=0.3, batch_size=4)
        encoded = encode(mixed, views, Encoders(pipeline), how, lambda line: None)
        draws = Draws(encoded, Schedule.of(pipeline.scheduler), seed=3, batch_size=4, group_size=4)
        found.append(list(draws.first(64)))
    for kept, live in zip(*map(list, found), strict=True):
        kept, live = flat(kept), flat(live)
        for name, value in kept.items():
            torch.testing.assert_close(value, live[name], rtol=1e-5, atol=1e-6)
        height, width = kept["sample"].shape[2:]
        assert kept["time_ids"][:, 4:].tolist() == [[2 * height, 2 * width]] * 4
    shapes = {batch["sample"].shape[2:] for batch in found[0]}
    assert len(shapes) == len(views.sizes) > 2
