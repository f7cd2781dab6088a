"""Text-to-image pipelines: what is loaded is what was saved, and what is refused."""

import json
import shutil

import pytest
import torch
from torch import nn

from tests.conftest import one_line
from tests.text_pipelines import tiny_pipeline
from vkd_gen.models import Model
from vkd_gen.pipelines import load_pipeline
from vkd_gen.text_pipelines import load_text_pipeline

pytest.importorskip("transformers")
KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Kind -> a pipeline, and the folder that it is saved in; to be left as they are."""
    place = tmp_path_factory.mktemp("text")
    return {kind: (tiny_pipeline(kind, place / kind), place / kind) for kind in KINDS}


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of Stable Diffusion 1's folder, to be damaged."""
    return shutil.copytree(saved["sd1"][1], tmp_path / "pipeline")


def models(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def assert_same(pipeline, other, names=None):
    expected = models(other)
    assert models(pipeline).keys() == (names or expected.keys())
    for name, model in models(pipeline).items():
        values = expected[name].state_dict()
        assert model.state_dict().keys() == values.keys()
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items()), name
        assert not model.training
        assert {(value.dtype, value.device.type) for value in model.parameters()} == {(torch.float32, "cpu")}


def images(pipeline, prompts=("red cat", "blue")):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipeline(list(prompts), num_inference_steps=3, generator=generators, output_type="np").images


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder(saved, kind):
    pipeline, folder = saved[kind]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = load_text_pipeline(str(folder))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(loaded, pipeline)
    assert type(loaded) is type(pipeline)
    assert (images(loaded) == images(pipeline)).all()


def test_the_folder_of_a_run(saved, tmp_path):
    shutil.copytree(saved["sd2"][1], tmp_path / "pipeline")
    assert_same(load_text_pipeline(str(tmp_path)), saved["sd2"][0])


def test_some_parts_alone(saved):
    pipeline = load_text_pipeline(str(saved["sdxl"][1]), parts=("unet", "scheduler"))
    assert_same(pipeline, saved["sdxl"][0], {"unet"})
    assert pipeline.vae_scale_factor == 2
    assert pipeline.tokenizer is None
    with pytest.raises(ValueError, match="has no part 'transformer'; its parts are vae, text_encoder"):
        load_text_pipeline(str(saved["sdxl"][1]), parts=("transformer",))


def test_another_precision(saved):
    pipeline = load_text_pipeline(str(saved["sd1"][1]), dtype=torch.bfloat16)
    for model in models(pipeline).values():
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant(kind, tmp_path):
    half = tiny_pipeline(kind).to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    assert_same(load_text_pipeline(str(tmp_path), variant="fp16"), half.to(torch.float32))
    with pytest.raises(ValueError, match=r"model.fp16.safetensors.*--teacher_variant"):
        load_text_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="has no variant 'bf16'; it has fp16"):
        load_text_pipeline(str(tmp_path), variant="bf16")


def test_a_part_without_the_variant_is_loaded_as_it_is(saved, tmp_path):
    pipeline, folder = saved["sd1"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    half = tiny_pipeline("sd1", seed=1).unet.half()
    half.save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = load_text_pipeline(str(tmp_path), variant="fp16")
    assert torch.equal(loaded.unet.conv_in.weight, half.conv_in.weight.float())
    assert torch.equal(loaded.vae.quant_conv.weight, pipeline.vae.quant_conv.weight)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(saved, tmp_path, variant):
    pipeline, folder = saved["sdxl"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, model in models(pipeline).items():
        model.save_pretrained(tmp_path / name, max_shard_size="40KB", variant=variant, safe_serialization=True)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    assert_same(load_text_pipeline(str(tmp_path), variant=variant), pipeline)


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# ---- for sampling


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver", "pndm", "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_on_the_pipelines_own_schedule(saved, kind, sampler):
    own = saved[kind][0].scheduler.config
    if (kind, sampler) == ("sd2", "pndm"):
        with pytest.raises(ValueError, match="pndm cannot sample a schedule of zero terminal SNR"):
            load_pipeline(str(saved[kind][1]), sampler)
        return
    pipeline = load_pipeline(str(saved[kind][1]), sampler)
    config = pipeline.scheduler.config
    assert sampler.replace("-", "") in type(pipeline.scheduler).__name__.lower()
    for entry in ("beta_start", "beta_schedule", "prediction_type", "timestep_spacing", "rescale_betas_zero_snr"):
        assert config.get(entry) == own.get(entry) or entry not in own
    assert not config.get("clip_sample")
    made = Model(pipeline).images([0], conditioning={"prompt": ["red cat"]}, num_inference_steps=5)
    assert made.shape == (1, 3, 32, 32)


def test_a_pipeline_of_another_kind(saved, tmp_path):
    shutil.copytree(saved["sd1"][1], tmp_path, dirs_exist_ok=True)
    change(tmp_path / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    with one_line("StableDiffusionInpaintPipeline, which needs more.*of text to image StableDiffusionPipeline and"):
        load_pipeline(str(tmp_path))
