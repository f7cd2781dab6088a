"""LoRA merged at load: what comes out is what the unmerged model computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import one_line
from tests.text_pipelines import tiny_pipeline
from vkd_gen.text_pipelines import load_text_pipeline
from vkd_gen.text_pipelines.lora import merge_lora

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"


TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}


def with_adapters(kind, *, alpha=4, seed=0):
    """A tiny pipeline with a LoRA of random weights in its denoiser and text encoders, by peft, not merged."""
    pipeline = tiny_pipeline(kind)
    torch.manual_seed(seed)
    for name in parts_of(pipeline):
        config = peft.LoraConfig(
            r=4, lora_alpha=alpha, init_lora_weights=False, target_modules=TARGETS[name.removesuffix("_2")]
        )
        peft.inject_adapter_in_model(config, getattr(pipeline, name))
    return pipeline


def parts_of(pipeline):
    return [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]


def save(pipeline, folder):
    layers = {}
    for name in parts_of(pipeline):
        state = getattr(pipeline, name).state_dict()
        layers[f"{name}_lora_layers"] = {key.replace(".default", ""): state[key] for key in state if ".lora_" in key}
    type(pipeline).save_lora_weights(folder, **layers)


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """Kind -> the folder of a pipeline, of its LoRA, and the pipeline with the LoRA unmerged."""
    place, made = tmp_path_factory.mktemp("lora"), {}
    for kind in ("sd1", "sdxl"):
        tiny_pipeline(kind, place / kind)
        pipeline = with_adapters(kind)
        save(pipeline, place / f"{kind}-lora")
        made[kind] = (str(place / kind), place / f"{kind}-lora", pipeline)
    return made


def answers(pipeline):
    """What the denoiser and the text encoders say."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (1, 16))
    unet = pipeline.unet
    inputs = {"encoder_hidden_states": torch.randn(1, 16, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type is not None:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 24), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        made = [unet(torch.randn(1, 4, 16, 16), 7, **inputs).sample]
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, name, None) is not None:
                made.append(getattr(pipeline, name)(tokens)[0])
    return made


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_merged_lora_is_the_unmerged_one(lora, kind):
    folder, file, expected = lora[kind]
    merged, plain = load_text_pipeline(folder, loras=(str(file),)), load_text_pipeline(folder)
    for one, other, without in zip(answers(merged), answers(expected), answers(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert (one - without).abs().max() > 1e-2
    assert not any("lora" in name for name in merged.unet.state_dict())
    assert merged.unet.state_dict().keys() == plain.unet.state_dict().keys()
    assert merged.text_encoder.state_dict().keys() == plain.text_encoder.state_dict().keys()
    assert not merged.unet.config.get("_lora", None)


def test_parts_alone_are_merged_alike(lora):
    folder, file, _ = lora["sdxl"]
    whole = load_text_pipeline(folder, loras=(str(file),))
    for part in ("unet", "text_encoder_2"):
        alone = load_text_pipeline(folder, loras=(str(file),), parts=(part,))
        values = getattr(whole, part).state_dict()
        assert all(torch.equal(value, values[name]) for name, value in getattr(alone, part).state_dict().items())


def test_a_scale_and_several_lora(lora):
    """Half of it, twice, is all of it."""
    folder, file, _ = lora["sd1"]
    half = f"{file / FILE}=0.5"
    once = load_text_pipeline(folder, loras=(str(file),), parts=("unet",))
    twice = load_text_pipeline(folder, loras=(half, half), parts=("unet",))
    for name, value in twice.unet.state_dict().items():
        torch.testing.assert_close(value, once.unet.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_the_names_of_kohya(lora, tmp_path):
    """As trainers beside diffusers save them: underscores, up and down, and an alpha for each layer."""
    folder, file, _ = lora["sd1"]
    named = {}
    for name, value in load_file(file / FILE).items():
        part, layer = name.split(".", 1)
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
        layer, side = layer.rsplit(".lora_", 1)
        if part == "text_encoder" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        key = f"{prefix}_{layer.replace('.', '_')}"
        is_down = side.startswith("A")
        named[f"{key}.lora_{'down' if is_down else 'up'}.weight"] = value if is_down else value / 2
        named[f"{key}.alpha"] = torch.tensor(8.0)  # twice the rank
    save_file(named, tmp_path / "kohya.safetensors")
    one, other = (load_text_pipeline(folder, loras=(str(path),)) for path in (file, tmp_path / "kohya.safetensors"))
    for part in ("unet", "text_encoder"):
        values = getattr(other, part).state_dict()
        for name, value in getattr(one, part).state_dict().items():
            torch.testing.assert_close(value, values[name], atol=1e-6, rtol=1e-5)


def test_a_factor_that_peft_notes(lora, tmp_path):
    """Saved beside the matrices, for the whole denoiser and for one of its layers."""
    folder, file, _ = lora["sd1"]
    tensors = {name: value for name, value in load_file(file / FILE).items() if name.startswith("unet.")}
    layer = next(name.removesuffix(".lora_A.weight") for name in tensors if "attn1.to_q.lora_A" in name)
    notes = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {layer.removeprefix("unet."): 2}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(notes)})
    paths = (None, file, tmp_path / "x.safetensors")
    plain, once, twice = (
        load_text_pipeline(folder, loras=(str(path),) if path else (), parts=("unet",)).unet.state_dict()
        for path in paths
    )
    for name in (key.removeprefix("unet.").replace("lora_A.", "") for key in tensors if "lora_A" in key):
        factor = 0.5 if layer.endswith(name.removesuffix(".weight")) else 2
        torch.testing.assert_close(twice[name] - plain[name], factor * (once[name] - plain[name]), atol=1e-6, rtol=1e-4)


BAD = [
    ("missing.safetensors", "there is no LoRA .*missing.safetensors"),
    ("empty", "there is no LoRA .*empty"),
    ("pickled.bin", "is no .safetensors file; pickles"),
    ("text.safetensors", "cannot be read"),
    ("foreign.safetensors", "holds no LoRA of Stable Diffusion"),
    ("adapter.safetensors", "factor of no LoRA layer; other kinds"),
    ("dora.safetensors", "it is a DoRA"),
    ("other-layers.safetensors", "is of another model"),
    ("other-widths.safetensors", "is of another model: in unet"),
    ("some-layers.safetensors", "is of another model"),
    ("second-encoder.safetensors", "is of another model: this one has no text_encoder_2"),
    ("{lora}=much", "behind the = stands a number"),
]


@pytest.fixture(scope="session")
def small():
    return tiny_pipeline("sd1")


@pytest.mark.parametrize(("name", "words"), BAD)
def test_what_cannot_be_merged(lora, small, tmp_path, name, words):
    file = lora["sd1"][1]
    right = {key: value for key, value in load_file(file / FILE).items() if key.startswith("unet.")}
    (tmp_path / "empty").mkdir()
    for text in ("pickled.bin", "text.safetensors"):
        (tmp_path / text).write_text("no tensors")
    renamed = {key.replace("transformer_blocks.0", "transformer_blocks.7"): value for key, value in right.items()}
    files = {
        "foreign": {"model.layers.0.weight": torch.zeros(2, 2)},
        "adapter": {"lora_unet_x.hada_w1_a": torch.zeros(2, 2), "lora_unet_x.alpha": torch.tensor(1.0)},
        "dora": {**right, "unet.x.dora_scale": torch.zeros(2)},
        "other-layers": renamed,
        "some-layers": right | dict(list(renamed.items())[:2]),
        "other-widths": {key: torch.cat([value, value], -1 if "lora_A" in key else 0) for key, value in right.items()},
        "second-encoder": {f"text_encoder_2.{key.removeprefix('unet.')}": value for key, value in right.items()},
    }
    for stem, tensors in files.items():
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / f"{stem}.safetensors")
    source = str(tmp_path / name) if "{" not in name else name.format(lora=file / FILE)
    with one_line(words):
        merge_lora(small, source)
