"""eval/score.py: the numbers of torch-fidelity, from memory or disk, by one process or two."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from tests.eval.conftest import save_pngs
from vkd_gen.evaluation.extractors import load_extractor
from vkd_gen.evaluation.feature_network import load_feature_network
from vkd_gen.evaluation.reference import cached_features
from vkd_gen.evaluation.sources import content_hash, from_folder

TORCH_FIDELITY = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
}


def scores_in(folder, row=0):
    results = json.loads((folder / "results.json").read_text())
    return list(results["rows"].values())[row]


def pack(folder, path):
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    np.savez(path, images if images.ndim == 4 else images[..., None])
    return path


class TinyNetwork(FeatureExtractorBase):
    """A network of torch-fidelity's own kind, small enough for a test."""

    def __init__(self, name, features_list, **_options):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.Parameter(torch.randn(12, 3 * 8 * 8, generator=generator))

    @staticmethod
    def get_provided_features_list():
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        found = (images.float() / 255).flatten(1) @ self.weights.T
        layers = {"features": found.relu(), "logits": found[:, :5]}
        return tuple(layers[name] for name in self.features_list)


def of_command_line(first, second, extractor, monkeypatch, capfd, *flags):
    """What torch-fidelity's own command prints."""
    from torch_fidelity import fidelity

    command = ["fidelity", "--input1", first, "--input2", second, "--isc", "--fid", "--kid", "--prc", "--cpu", "--json"]
    command += ["--feature-extractor", extractor, "--no-cache", "--silent", "--save-cpu-ram", *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    capfd.readouterr()
    fidelity.main()
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("network", ["tiny", pytest.param("inception", marks=pytest.mark.slow)])
def test_a_folder_of_pngs_has_the_scores_of_torch_fidelitys_command_line(
    network, tmp_path, run_eval, monkeypatch, capfd, request
):
    first = save_pngs(tmp_path / "first", 16, mode="RGB")
    second = save_pngs(tmp_path / "second", 14, mode="RGB", seed=5, brightness=20)
    if network == "tiny":
        monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "tiny-net", TinyNetwork)
        ours, theirs, suffix = ["--extractor", "tiny-net"], ("tiny-net",), "tiny_net"
    else:
        weights = request.getfixturevalue("inception_weights")
        ours, suffix = ["--extractor_weights", weights], "inception_custom"
        theirs = ("inception-v3-compat", "--feature-extractor-weights-path", weights)
    flags = ["--kid_subset_size", 10, "--output_dir", tmp_path / "scores"]
    run_eval("score", first, "--reference", second, *ours, *flags)
    expected = of_command_line(first, second, theirs[0], monkeypatch, capfd, *theirs[1:], "--kid-subset-size", "10")
    assert expected["frechet_inception_distance"] > 1e-3
    assert network != "tiny" or expected["precision"] != expected["recall"]  # else nobody sees which is which
    assert scores_in(tmp_path / "scores") == pytest.approx(
        {f"{name}_{suffix}": expected[key] for name, key in TORCH_FIDELITY.items()}, rel=1e-6
    )


def test_odd_batches_two_processes_and_arrays_in_memory_give_the_same_scores(
    tmp_path, folders, feature_network, run_eval, two_processes
):
    first, second = folders
    flags = ["--reference", second, "--extractor", feature_network, "--kid_subset_size", 20]
    run_eval("score", first, *flags, "--output_dir", tmp_path / "expected")
    expected = scores_in(tmp_path / "expected")
    assert expected["fid_stripes"] > 1e-3
    array = pack(first, tmp_path / "first.npz")
    run_eval("score", array, *flags, "--output_dir", tmp_path / "array", "--batch_size", 7)
    assert scores_in(tmp_path / "array") == pytest.approx(expected, rel=1e-6)
    two = two_processes / "scores"
    assert scores_in(two) == pytest.approx(expected, rel=1e-6)
    hashes = {next(iter(json.loads((folder / "results.json").read_text())["sources"].values()))["images_sha256"]
              for folder in (tmp_path / "expected", tmp_path / "array", two)}  # fmt: skip
    assert len(hashes) == 1


def test_scores_of_a_model_in_memory_are_those_of_its_images_on_disk(
    tmp_path, checkpoint, folders, feature_network, run_eval
):
    flags = ["--reference", folders[0], "--extractor", feature_network, "--kid_subset_size", 20]
    sampling = ["--num_inference_steps", 3, "--seed", 5]
    run_eval("generate", checkpoint, "--output", tmp_path / "pngs", "--num_images", 24, *sampling)
    run_eval("score", tmp_path / "pngs", *flags, "--output_dir", tmp_path / "disk")
    run_eval(
        "score", checkpoint, *flags, *sampling, "--num_score_samples", 24, "--output_dir", tmp_path / "memory",
        "--no-update-cards",
    )  # fmt: skip
    assert scores_in(tmp_path / "memory") == pytest.approx(scores_in(tmp_path / "disk"), rel=1e-6)
    sources = [json.loads((tmp_path / name / "results.json").read_text())["sources"] for name in ("disk", "memory")]
    disk, memory = (next(iter(source.values())) for source in sources)
    assert disk["images_sha256"] == memory["images_sha256"]
    assert disk["made_by"] == {key: value for key, value in memory.items() if key != "images_sha256"}
    assert len(memory["weights_sha256"]) == 64
    assert memory["scheduler"]["prediction_type"] == "epsilon"
    assert {key: value for key, value in memory.items() if key not in ("weights_sha256", "scheduler")} == {
        "pipeline": "DDIMPipeline",
        "sampler": "DDIMScheduler",
        "num_inference_steps": 3,
        "num_images": 24,
        "seeds": "5 to 28",
        "precision": "no",
        "images_sha256": disk["images_sha256"],
    }


def test_several_sources_make_one_table_and_the_protocol_says_what_was_done(
    tmp_path, checkpoint, folders, feature_network, run_eval, capsys
):
    first, second = folders
    flags = ["--extractor", feature_network, "--num_score_samples", 12, "--kid_subset_size", 10]
    run_eval(
        "score", first, checkpoint, "--reference", second, "--held_out_fraction", 0.4, *flags,
        "--num_inference_steps", 2, "--update_foreign_cards",
        "--output_dir", tmp_path / "scores",
    )  # fmt: skip
    results = json.loads((tmp_path / "scores/results.json").read_text())
    assert list(results["rows"]) == [str(first), str(checkpoint), "held-out images"]
    for row in (str(first), str(checkpoint)):
        assert {"fid_held_out_stripes", "nearer_to_training_stripes"} <= set(results["rows"][row])
    protocol = results["protocol"]
    assert protocol["extractor"] == "stripes"
    assert len(protocol["extractor_weights_sha256"]) == len(protocol["reference_hash"]) == 64
    assert protocol["reference"] == {"images": str(second), "num_images": 18, "resize": "shorter side to 8"}
    assert {"torch", "torch-fidelity", "commit"} <= set(protocol["environment"])
    for file in ("report.html", "samples.png", "samples.npz"):
        assert (tmp_path / "scores" / file).stat().st_size > 100
    shown = capsys.readouterr().out
    assert "FID" in shown
    assert "(stripes)" in shown
    card = ModelCard.load(checkpoint / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == set(results["rows"][str(checkpoint)])
    run_eval(
        "score", checkpoint, "--reference", second, *flags, "--num_inference_steps", 3, "--output_dir",
        tmp_path / "scores", "--overwrite", "--update_foreign_cards",
    )  # fmt: skip
    again = ModelCard.load(checkpoint / "README.md")
    assert again.text.count("## Scores") == 1
    values = {result.metric_type: result.metric_value for result in again.data.eval_results}
    assert values["fid_stripes"] == scores_in(tmp_path / "scores")["fid_stripes"]


def test_saved_statistics_give_the_fid_of_their_images_and_what_needs_no_reference(
    tmp_path, folders, feature_network, run_eval
):
    first, second = folders
    flags = ["--extractor", feature_network, "--kid_subset_size", 20, "--output_dir"]
    run_eval("score", first, "--reference", second, *flags, tmp_path / "images")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(second.glob("*.png"))])
    with torch.no_grad():
        features = load_feature_network(feature_network)(pixels[:, None].double().div(127.5).sub(1).float())[0].numpy()
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    run_eval("score", first, "--reference", tmp_path / "statistics.npz", *flags, tmp_path / "statistics")
    found = scores_in(tmp_path / "statistics")
    expected = scores_in(tmp_path / "images")
    names = ("fid_stripes", "inception_score_stripes", "inception_score_std_stripes")
    assert found == pytest.approx({name: expected[name] for name in names}, rel=1e-5)


def test_the_reference_is_computed_once(tmp_path, folders, feature_network, monkeypatch, caplog):
    """Once for the same images in the same weights; what is damaged, or cannot be kept, is computed anew."""
    asked = []

    def features_of(folder):
        extractor = load_extractor(str(feature_network))
        extract = extractor.extract
        asked.clear()
        extractor = replace(extractor, extract=lambda images: asked.append(len(images)) or extract(images))
        return cached_features(from_folder(str(folder)), extractor, 16)[0]["features"]

    first = features_of(folders[1])
    assert asked == [16, 14]
    assert torch.equal(features_of(folders[1]), first)
    assert asked == []
    assert not torch.equal(features_of(save_pngs(tmp_path / "other", 30, seed=1, brightness=41)), first)
    kept = list((tmp_path / "cache/references").iterdir())
    assert len(kept) == 2
    for file in kept:
        file.write_bytes(b"damaged")
    assert torch.equal(features_of(folders[1]), first)
    assert asked == [16, 14]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VKD_GEN_CACHE", str(tmp_path / "file"))
    assert torch.equal(features_of(folders[1]), first)
    assert "not kept" in caplog.text


def test_class_conditional_pipelines_are_asked_for_every_class(tmp_path, run_eval, feature_network, folders):
    """A DiT, diffusers' own class-conditional pipeline, with an autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4,
        sample_size=4, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    folder = tmp_path / "dit"
    DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler()).save_pretrained(folder)
    run_eval(
        "score", folder, "--reference", folders[0], "--extractor", feature_network, "--num_score_samples", 12,
        "--kid_subset_size", 10, "--num_inference_steps", 2, "--guidance_scale", 2, "--output_dir", tmp_path / "scores",
    )  # fmt: skip
    source = json.loads((tmp_path / "scores/results.json").read_text())["sources"][str(folder)]
    assert source["class_labels"] == "seed modulo 1000"
    assert source["guidance_scale"] == 2


def test_a_grey_image_among_coloured_ones_is_read_as_rgb(tmp_path):
    """As torch-fidelity reads it, and so it is the same image as in RGB."""
    hashes = []
    for mode in ("L", "RGB"):
        coloured = save_pngs(tmp_path / mode, 3, mode="RGB")
        Image.open(coloured / "000000.png").convert("L").convert(mode).save(coloured / "000000.png")
        hashes.append(content_hash(from_folder(str(coloured))))
    assert hashes[0] == hashes[1]


def test_a_source_that_fails_does_not_lose_the_ones_before(tmp_path, folders, feature_network, run_eval, capfd):
    late = save_pngs(tmp_path / "late", 24)
    damaged = late / "000020.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    flags = ["--reference", folders[1], "--extractor", feature_network, "--kid_subset_size", 20, "--output_dir"]
    with pytest.raises(SystemExit):
        run_eval("score", folders[0], late, *flags, tmp_path / "scores")
    assert "cannot read the image" in capfd.readouterr().err
    assert list(json.loads((tmp_path / "scores/results.json").read_text())["rows"]) == [str(folders[0])]
