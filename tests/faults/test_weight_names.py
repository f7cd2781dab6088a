"""Weights are those of the model that loads them, by name, shape and kind of number; else the line says what is not."""

import json
import os
import time

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from tests.conftest import one_line, refused, tiny_unet
from vkd_gen.evaluation.extractors import load_extractor
from vkd_gen.evaluation.feature_network import FeatureNetwork, load_feature_network, save_feature_network
from vkd_gen.evaluation.sources import from_array
from vkd_gen.pipelines import load_pipeline
from vkd_gen.training.checkpoints import MANIFEST, check_checkpoint, read_manifest
from vkd_gen.training.unets import load_teacher, load_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def rename(file, change):
    """Give tensors other names; None leaves one out."""
    renamed = {change(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in renamed.items() if name is not None}, file)


def retype(file, dtype, names=""):
    save_file({name: value.to(dtype) if names in name else value for name, value in load_file(file).items()}, file)


def named(change, words):
    return lambda file: rename(file, change), words


def changed(change, words):
    """All tensors of a file as a function changes them."""
    return lambda file: save_file(change(load_file(file)), file), words


SWAPPED = {"conv_in.weight": "conv_out.weight", "conv_out.weight": "conv_in.weight"}
NAMES = {
    "a layer is missing": named(
        lambda name: None if name.startswith("conv_out") else name,
        r"2 of \d+ are missing \(conv_out.weight, conv_out.bias\)",
    ),
    "a layer has another name": named(
        lambda name: name.replace("conv_out.", "out_conv."),
        r"2 of \d+ are missing \(conv_out.*2 are of no use to it \(out_conv",
    ),
    "one tensor more": changed(
        lambda tensors: {**tensors, "ema.decay": torch.ones(1)}, r"1 are of no use to it \(ema.decay\)"
    ),
    "as many numbers, transposed": changed(
        lambda tensors: {**tensors, "conv_in.weight": tensors["conv_in.weight"].flatten()},
        r"1 have another shape \(conv_in.weight is \[72\], not \[8, 1, 3, 3\]\)",
    ),
    "another number of channels": changed(
        lambda tensors: {**tensors, "conv_out.weight": torch.zeros(9, 8, 3, 3)},
        r"1 have another shape \(conv_out.weight is \[9, 8, 3, 3\]",
    ),
    "two tensors changed places": named(lambda name: SWAPPED.get(name, name), "2 have another shape"),
    "DataParallel": named(lambda name: "module." + name, r"`module.`, which DataParallel.*unwrap"),
    "both wrappers": named(
        lambda name: "module._orig_mod." + name, r"`module.`, which .* and `_orig_mod.`, which torch.compile"
    ),
    "one block compiled": named(
        lambda name: name.replace("mid_block.", "mid_block._orig_mod."),
        r"`_orig_mod.`, which torch.compile puts there",
    ),
    "inside of another module": named(lambda name: "student.unet." + name, r"their names begin with `student.unet.`"),
    "quantised": (lambda file: retype(file, torch.int8, "conv_in.weight"), r"quantised .*\(conv_in.weight\)"),
    "no tensors": changed(lambda tensors: {}, r"are missing"),
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_the_models(pipeline_folder, name):
    damage, words = NAMES[name]
    damage(pipeline_folder / "unet" / WEIGHTS)
    for load in (load_teacher, load_unet, load_pipeline):
        with one_line(words):
            load(str(pipeline_folder))


def test_weights_of_a_deeper_model(pipeline_folder):
    """Its configuration says fewer layers than it was saved with: what is left would be another model."""
    tiny_unet(layers_per_block=2).save_pretrained(pipeline_folder / "unet")
    file = pipeline_folder / "unet/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_per_block": 1}))
    for load in (load_teacher, load_pipeline):
        with pytest.raises(ValueError, match=r"are of no use to it \(down_blocks.0.resnets.1"):
            load(str(pipeline_folder))


def test_one_file_of_several_is_of_another_model(tmp_path):
    tiny_unet().save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    rename(files[1], lambda name: "other." + name)
    with pytest.raises(ValueError, match=r"their names begin with `other.`.* are missing \("):
        load_unet(str(tmp_path))


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", 3])
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    tiny_unet().save_pretrained(tmp_path / "unet")
    save_file(load_file(tmp_path / "unet" / WEIGHTS), tmp_path / "other.safetensors")
    (tmp_path / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(ValueError, match="names no files of this folder"):
        load_unet(str(tmp_path))


@pytest.mark.parametrize(
    ("dtype", "names"),
    [(torch.float16, ""), (torch.bfloat16, "conv_out"), (torch.float64, "conv_out"), (torch.float64, "")],
)
def test_weights_in_another_precision_are_read_in_float32(pipeline_folder, dtype, names):
    retype(pipeline_folder / "unet" / WEIGHTS, dtype, names)
    for unet in (load_teacher(str(pipeline_folder)).unet, load_pipeline(str(pipeline_folder)).unet):
        assert {value.dtype for value in unet.state_dict().values()} == {torch.float32}
        for name, value in tiny_unet().state_dict().items():
            assert torch.equal(unet.state_dict()[name], value.to(dtype).float() if names in name else value)


def test_the_plain_file_is_read_beside_a_variant(pipeline_folder):
    unet = tiny_unet(seed=1)
    unet.half().save_pretrained(pipeline_folder / "unet", variant="fp16")
    assert torch.equal(load_pipeline(str(pipeline_folder)).unet.conv_in.weight, tiny_unet().conv_in.weight)
    (pipeline_folder / "unet" / WEIGHTS).unlink()
    words = r"diffusion_pytorch_model.fp16.safetensors is read under that name alone: .*load it once with variant="
    with pytest.raises(ValueError, match=words):
        load_teacher(str(pipeline_folder))


def save_dit(folder):
    """A latent pipeline with a decoder whose attention has its early names, as published ones have."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=4)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_early(name):
        for new, old in early.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    rename(folder / "vae" / WEIGHTS, rename_early)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": "one"}}))
    return vae


def test_every_network_of_a_pipeline_is_compared(tmp_path):
    vae = save_dit(tmp_path)
    pipeline = load_pipeline(str(tmp_path))
    assert pipeline.labels == {"one": 0}
    for name, value in vae.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], value)
    rename(tmp_path / "vae" / WEIGHTS, lambda name: name.replace("decoder.", "decode."))
    with pytest.raises(ValueError, match=r"the weights in .*vae are not those of the AutoencoderKL .* are missing"):
        load_pipeline(str(tmp_path))


FEATURES = {
    "a layer is missing": (lambda name: None if name == "head.bias" else name, r"1 of \d+ are missing \(head.bias\)"),
    "DataParallel": (lambda name: "module." + name, "`module.`, which DataParallel"),
    "another network": (lambda name: "x." + name.replace(".", "_"), "are of no use to it"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_network(tmp_path, name):
    change, words = FEATURES[name]
    file = tmp_path / "features.safetensors"
    save_feature_network(FeatureNetwork(width=4), file, {})
    rename(file, change)
    with one_line(f"is not a feature network: .*{words}"):
        load_feature_network(file)


def test_extractor_weights_of_another_kind(tmp_path):
    file = tmp_path / "weights.pth"
    for prefix in ("module.", "_orig_mod."):
        torch.save({f"{prefix}fc.weight": torch.zeros(2)}, file)
        with pytest.raises(ValueError, match=f"extractor weights .* carry `{prefix}`, which"):
            load_extractor("inception", str(file))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="are not a plain state dict of tensors: "):
        load_extractor("inception", str(file))


def test_a_model_that_is_scored_by_mistake(tmp_path, run_eval, capsys):
    """It is no folder of images either."""
    tiny_unet().save_pretrained(tmp_path / "model" / "unet")
    flags = ("--reference", "digits", "--output_dir", tmp_path / "scores", "--extractor", "inception")
    assert "holds no pipeline: neither model_index.json" in refused(
        capsys, run_eval, "score", tmp_path / "model", *flags
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("unet/" + WEIGHTS, os.mkfifo),
        ("unet/config.json", os.mkfifo),
        ("scheduler/scheduler_config.json", os.mkfifo),
        ("unet/" + WEIGHTS, os.mkdir),
        ("unet/config.json", lambda path: path.symlink_to("/dev/zero")),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(pipeline_folder, name, make):
    (pipeline_folder / name).unlink()
    make(pipeline_folder / name)
    for load in (load_teacher, load_pipeline):
        with one_line(rf"{name.split('/')[1]} is no regular file"):
            load(str(pipeline_folder))


@pytest.mark.parametrize("load", [from_array, load_feature_network, read_manifest, check_checkpoint])
def test_a_pipe_in_place_of_any_other_file(tmp_path, load):
    names = {read_manifest: MANIFEST, check_checkpoint: "optimizer.bin", from_array: "x.npz"}
    path = tmp_path / names.get(load, "x.safetensors")
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"is no regular file|is missing|there is no"):
        load(tmp_path if load in (read_manifest, check_checkpoint) else path)


@pytest.mark.parametrize("load", [load_teacher, load_unet, load_pipeline])
@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_without_a_network_is_told_at_once(load, offline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)

    def unreachable(*_, **options):
        assert options["timeout"] <= 10
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    start = time.monotonic()
    words = "HF_HUB_OFFLINE is set" if offline else r"cannot be reached \(ConnectionError\): check the network"
    with pytest.raises(ValueError, match=words) as error:
        load("google/ddpm-celebahq-256")
    assert time.monotonic() - start < 5
    assert "config.json" not in str(error.value)


def test_what_is_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: 1 / 0)
    commit = "0123456789abcdef0123456789abcdef01234567"
    tiny_unet().save_pretrained(tmp_path / "models--some--model/snapshots" / commit)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text(commit)
    assert torch.equal(load_unet("some/model").conv_in.weight, tiny_unet().conv_in.weight)
    (tmp_path / "models--some--model/snapshots" / commit / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_unet("some/model")
