"""Text-to-image pipelines: what is loaded is what was saved, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from tests.conftest import one_line, write_payload
from tests.text_pipelines import tiny_pipeline
from vkd_gen.evaluation.card import card_origin, model_card
from vkd_gen.models import Model
from vkd_gen.pipelines import load_pipeline
from vkd_gen.text_pipelines import load_text_pipeline, save_pipeline
from vkd_gen.text_pipelines.parts import TOKENIZER_FILES, load_tokenizer

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


# ---- saved again


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_is_saved_is_stock_and_for_every_version_of_transformers(saved, tmp_path, kind):
    pipeline = load_text_pipeline(str(saved[kind][1]))
    Model(pipeline).save(tmp_path / "out", model_card("x", {}, "", data="d", stock_pipeline=type(pipeline).__name__))
    stock = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(stock) is type(pipeline)
    stock.set_progress_bar_config(disable=True)
    assert (images(stock) == images(pipeline)).all()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index.get("safety_checker", [None, None]) == [None, None]
    assert str(saved[kind][1]) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    for name in ("text_encoder", "text_encoder_2"):
        if name in index:
            names = load_file(tmp_path / "out" / name / "model.safetensors")
            assert all(key.startswith(("text_model.", "text_projection.")) for key in names)
            place = tmp_path / "out" / name.replace("text_encoder", "tokenizer")
            (place / "tokenizer.json").unlink(missing_ok=True)  # as transformers 4 has it
            assert load_tokenizer(place, 16)("red cat").input_ids == pipeline.tokenizer("red cat").input_ids
    assert (images(load_text_pipeline(str(tmp_path / "out"))) == images(pipeline)).all()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert f"{type(pipeline).__name__}.from_pretrained" in card


def test_an_export_in_half_precision_too(saved, tmp_path):
    pipeline = load_text_pipeline(str(saved["sd1"][1]))
    Model(pipeline).save(tmp_path / "out", "card", "fp16")
    assert_same(load_text_pipeline(str(tmp_path / "out")), saved["sd1"][0])
    half = DiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", torch_dtype=torch.float16)
    assert {value.dtype for model in models(half).values() for value in model.parameters()} == {torch.float16}
    assert torch.equal(half.unet.conv_in.weight, pipeline.unet.conv_in.weight.half())
    assert pipeline.unet.dtype == torch.float32
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0] = 1e6
    with one_line("the unet cannot be saved as fp16: conv_in.weight is too large"):
        save_pipeline(pipeline, tmp_path / "large", "fp16")


def test_a_students_card_has_the_teachers_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n# x\n")
    origin = card_origin(str(tmp_path))
    assert origin == {"license": "other", "license_name": "own"}
    card = model_card("x", {}, "", data="d", stock_pipeline="StableDiffusionPipeline", origin=origin)
    assert "license: other\nlicense_name: own" in card
    assert card_origin(str(tmp_path / "nothing")) == card_origin("") == {}


# ---- what is refused


def without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def without_words(folder):
    for name in TOKENIZER_FILES[:3]:  # which of them are there depends on the version of transformers
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def damaged_words(folder):
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / "tokenizer" / name).exists():
            (folder / "tokenizer" / name).write_text('{"a": []}')


def changed(file, **entries):
    return lambda folder: change(folder / file, **entries)


def pickled(part, name, old):
    def damage(folder):
        (folder / part / old).unlink()
        (folder / part / name).write_bytes(b"pickle")

    return damage


UNET, VAE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"
INDEX, UNETS, VAES, TEXT = "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"
REFUSED = [
    (without_words, "the tokenizer .* is without its vocab.json: take vocab.json and merges.txt"),
    (without(f"unet/{UNET}"), "unet holds no weights"),
    (without(UNETS), "unet/config.json is not there"),
    (without("scheduler/scheduler_config.json"), "scheduler_config.json is not there"),
    (pickled("vae", "diffusion_pytorch_model.bin", VAE), "vae holds pickled weights only"),
    (pickled("text_encoder", "pytorch_model.bin", "model.safetensors"), "text_encoder holds pickled weights only"),
    (changed(INDEX, _class_name="StableDiffusionInpaintPipeline"), "is a StableDiffusionInpaintPipeline; text-"),
    (changed(INDEX, _class_name="StableDiffusion3Pipeline", transformer=["diffusers", "SD3Transformer2DModel"]),
     "pipelines of transformers come with a later version"),
    (changed(INDEX, _class_name="StableDiffusionControlNetPipeline", controlnet=["diffusers", "ControlNetModel"]),
     "name the pipeline without its ControlNet"),
    (changed(INDEX, _class_name="MyPipeline"), "code of its own is not run"),
    (changed(INDEX, unet=["os", "system"]), "its part 'unet' is of 'os'"),
    (changed(INDEX, text_encoder=["transformers", "T5EncoderModel"]), "its text_encoder is a T5EncoderModel"),
    (changed(INDEX, vae=["diffusers", "AutoencoderTiny"]), "its vae is a AutoencoderTiny, and must be a AutoencoderKL"),
    (changed(INDEX, text_encoder=[None, None]), "has no text_encoder, which .* needs; a refiner"),
    (changed(INDEX, scheduler=["diffusers", "UNet2DModel"]), "must be one of diffusers'"),
    (changed(UNETS, in_channels=9), "has an inpainting UNet, of 9 channels"),
    (changed(UNETS, in_channels=8), "a UNet that edits images"),
    (changed(UNETS, out_channels=8), "maps latents of 4 to 8 channels, and its VAE has 4"),
    (changed(VAES, latent_channels=16), "maps latents of 4 to 4 channels, and its VAE has 16"),
    (changed(UNETS, cross_attention_dim=48), r"of width 48 .*, and its text encoders make such of 32"),
    (changed(TEXT, hidden_size=64), "its text encoders make such of 64"),
    (changed(UNETS, time_cond_proj_dim=256), "is a consistency model"),
    (changed(UNETS, num_class_embeds=10), "its UNet has num_class_embeds 10"),
    (changed(UNETS, block_out_channels=[10**9] * 4), "that could be built: block_out_channels is"),
    (changed(TEXT, num_hidden_layers=10**6), "no text encoder that could be built: num_hidden_layers is"),
    (changed(TEXT, hidden_act="os.system"), "no text encoder that transformers can build"),
    (changed(TEXT, num_hidden_layers=2), "are of no use to it"),
    (changed(TEXT, quantization_config={"load_in_8bit": True}), "is of a quantised text encoder"),
    (changed(TEXT, vocab_size=8), r"token_embedding.weight is \[93, 32\], not \[8, 32\]"),
    (changed(UNETS, block_out_channels=[32, 32, 64, 96]), "have another shape"),
    (changed("scheduler/scheduler_config.json", beta_end=2), "no schedule of noise"),
    (lambda folder: (folder / INDEX).write_text("{"), "it is no JSON"),
    (damaged_words, "the tokenizer .* cannot be loaded"),
    (lambda folder: (folder / "unet" / UNET).write_bytes(b"x" * 64), "cannot load the pipeline"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_is_refused_in_one_line(folder, damage, words):
    damage(folder)
    with one_line(words):
        load_text_pipeline(str(folder))


def test_the_second_encoder_of_another_width(saved, tmp_path):
    shutil.copytree(saved["sdxl"][1], tmp_path, dirs_exist_ok=True)
    change(tmp_path / "text_encoder_2/config.json", projection_dim=32)
    with one_line("reads 72 numbers of prompt and sizes, and its text_encoder_2 makes 80"):
        load_text_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere", {}, "there is no pipeline folder or file nowhere"),
        ("some/model", {}, "the hub did not give it"),
        ("{folder}/unet", {}, "holds no pipeline"),
        ("{folder}", {"config": "x"}, "--teacher_config is for checkpoints in one file"),
        ("{folder}", {"variant": "fp16"}, "has no variant 'fp16'; its weights have none"),
        ("{folder}/unet/config.json", {}, "is no .safetensors file"),
        ("{folder}/unet/" + UNET, {}, "holds no original checkpoint of Stable Diffusion"),
        ("{folder}/unet/" + UNET, {"variant": "fp16"}, "is one file, which has no variant fp16"),
    ],
)
def test_what_is_not_there(saved, source, options, words):
    with one_line(words):
        load_text_pipeline(source.format(folder=saved["sd1"][1]), **options)


def test_nothing_is_run_or_unpickled(folder, executed):
    """A pickle in place of each file of weights, and code beside them."""
    for part, name in (("unet", UNET), ("vae", VAE), ("text_encoder", "model.safetensors")):
        kept = (folder / part / name).read_bytes()
        write_payload(folder / part / name, executed)
        with pytest.raises(ValueError, match="cannot load the pipeline"):
            load_text_pipeline(str(folder))
        (folder / part / name).write_bytes(kept)
    (folder / "pipeline.py").write_text(f"open({str(executed)!r}, 'w')")
    change(folder / TEXT, auto_map={"AutoModel": "pipeline.Model"}, _attn_implementation="some/kernel")
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    load_text_pipeline(str(folder))
