"""From images of classes to a student of a DiT, and back into the stock pipeline."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from tests.conftest import refused, tiny_unet
from tests.recipes.conftest import RECIPES, assert_same_run, launch, read_metrics, run_until, weights_of
from tests.transformers import tiny_dit, tiny_dit_pipeline
from vkd_gen.models import Model
from vkd_gen.pipelines import load_pipeline, stock_pipeline

STUDENT = "train_student_unet"
ASSETS = RECIPES / "assets"
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of three classes, each a folder, larger than what is trained on."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(24):
        place = folder / f"class{number % 3}"
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 85, (12, 10, 3), dtype=np.uint8) + 85 * (number % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02}.png")
    return folder


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    tiny_dit_pipeline(folder, num_classes=3)
    return folder


def flags_of(teacher, pictures, run, *more):
    """A run of four steps."""
    short = ["--max_train_steps", 4, "--train_batch_size", 4, "--log_every_steps", 1, "--lr_warmup_steps", 0]
    short += ["--calibration_samples", 16, "--num_timestep_bins", 2, "--inherit_samples", 8, "--eval_batch_size", 8]
    short += ["--num_inference_steps", 2, "--extractor", "none", "--random_flip", "--num_crops", 2]
    short += ["--preset", "custom", "--dataloader_num_workers", 0]
    return [*short, "--teacher", teacher, "--dataset", pictures, "--output_dir", run, *more]


def losses_of(run):
    return [line["loss/output"] for line in read_metrics(run) if "loss/output" in line]


def test_from_pictures_to_a_stock_pipeline(tmp_path, run_recipe, teacher, pictures, capsys):
    run = tmp_path / "run"
    run_recipe(STUDENT, *flags_of(teacher, pictures, run, "--student_blocks", 2))
    shown = capsys.readouterr().out
    assert re.search(r"transformer_blocks\.0 +16x16 +50% +transformer_blocks\.1 +16x16 +50%", shown)
    assert re.search(r"layers with weights: \d+ copied from the teacher, 0 sliced, .* 0 left random", shown)
    losses = losses_of(run)
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    results = json.loads((run / "results.json").read_text())["rows"]
    assert results["teacher"]["teacher_distance"] == 0 < results["student"]["teacher_distance"]
    (block,) = re.findall(r"```python\n(.*?)```", (run / "pipeline/README.md").read_text(), flags=re.DOTALL)
    script = "import sys\nsys.modules['vkd_gen'] = None\n" + block.replace("THIS_FOLDER", str(run / "pipeline"))
    script += (
        "\nassert [image.size for image in images] == [(8, 8)] * 2\nprint(len(pipeline.transformer.transformer_blocks))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "2"
    stock = DiTTransformer2DModel.from_pretrained(run / "pipeline", subfolder="transformer")
    assert {name: value.shape for name, value in stock.state_dict().items()} == {
        name: value.shape for name, value in weights_of(run).items()
    }


def test_the_whole_teacher_learns_nothing_and_keeps_its_weights(tmp_path, run_recipe, teacher, pictures):
    """Every block kept: no distance before the first step, so that nothing but weight decay moves."""
    flags = flags_of(teacher, pictures, tmp_path / "run", "--student_blocks", 4, "--adam_weight_decay", 0)
    run_recipe(STUDENT, *flags, "--method", "output", "--denoising_weight", 0, "--max_train_steps", 1)
    assert losses_of(tmp_path / "run") == [0]
    given = DiTTransformer2DModel.from_pretrained(teacher, subfolder="transformer").state_dict()
    assert [name for name, value in weights_of(tmp_path / "run").items() if not torch.equal(value, given[name])] == []


def test_named_blocks_are_those_that_the_student_starts_from(tmp_path, run_recipe, teacher, pictures):
    still = ["--method", "output", "--max_train_steps", 1, "--learning_rate", 1e-30, "--adam_weight_decay", 0]
    run_recipe(STUDENT, *flags_of(teacher, pictures, tmp_path / "run", "--student_blocks", 0, 1, 3, *still))
    given = DiTTransformer2DModel.from_pretrained(teacher, subfolder="transformer").state_dict()
    for name, value in weights_of(tmp_path / "run").items():
        for own, origin in ((2, 3), (1, 1), (0, 0)):
            name = name.replace(f"transformer_blocks.{own}.", f"transformer_blocks.{origin}.")
        assert torch.equal(value, given[name]), name


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path, run_recipe, pictures, kind):
    """Bit for bit; the encodings are kept by the first run, and read by the second."""
    teacher = tmp_path / "teacher"
    tiny_dit_pipeline(teacher, num_classes=3, scheduler=None if kind == "diffusion" else FLOW)
    runs = {name: flags_of(teacher, pictures, tmp_path / name) for name in ("straight", "resumed")}
    more = ["--timestep_sampling", "logit_normal", "--checkpointing_steps", 1]
    run_recipe(STUDENT, *runs["straight"], *more)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert any("encodings" in str(path) for path in kept)
    run_until(2, run_recipe, STUDENT, *runs["resumed"], *more)
    torch.manual_seed(7)
    run_recipe(STUDENT, *runs["resumed"], *more, "--resume_from_checkpoint", "latest")
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert type(DiTPipeline.from_pretrained(tmp_path / "resumed/pipeline").scheduler) is type(
        DDIMScheduler() if kind == "diffusion" else FLOW
    )


def test_encoded_once_or_in_each_step_is_the_same(tmp_path, run_recipe, teacher, pictures):
    for name, flag in (("once", "--cache"), ("each", "--no-cache")):
        run_recipe(STUDENT, *flags_of(teacher, pictures, tmp_path / name, flag))
    losses = [losses_of(tmp_path / name) for name in ("once", "each")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_labels_reach_teacher_and_student_and_some_are_dropped(tmp_path, run_recipe, teacher, pictures, monkeypatch):
    seen, forward = [], DiTTransformer2DModel.forward

    def recorded(network, hidden_states, timestep=None, class_labels=None, **others):
        if network.training and hidden_states.device.type != "meta":
            seen.append(class_labels.tolist())
        return forward(network, hidden_states, timestep, class_labels, **others)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", recorded)
    flags = flags_of(teacher, pictures, tmp_path / "run", "--guidance_dropout", 0.4, "--train_batch_size", 32)
    run_recipe(STUDENT, *flags, "--method", "output")
    labels = np.array([labels for labels in seen if len(labels) == 32]).ravel()
    assert len(labels) == 4 * 32
    assert set(labels) == {0, 1, 2, 3}
    assert 0.25 < (labels == 3).mean() < 0.55


@pytest.mark.parametrize(
    "more",
    [
        ("--student_blocks", "0", "1", "3"),
        ("--student_width", "0.5"),
        ("--student_blocks", "3", "--student_width", "0.5", "--guidance_branches", "both"),
        ("--layers", "self_attention", "--gradient_checkpointing"),
        ("--method", "fitnet", "--inherit_layers", "rule"),
        ("--student_prediction_type", "v_prediction"),
        ("--student_prediction_type", "flow_prediction", "--timestep_sampling", "mode"),
    ],
    ids=" ".join,
)
def test_other_students_and_methods(tmp_path, run_recipe, teacher, pictures, more):
    run = tmp_path / "run"
    run_recipe(STUDENT, *flags_of(teacher, pictures, run, *more))
    pipeline = DiTPipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0, 2], guidance_scale=1, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


def test_a_student_of_flow_matching_of_a_teacher_of_epsilon(tmp_path, run_recipe, teacher, pictures, capsys):
    """Trained at equal noise, said what has no partner, exported with a sampler of its own, resumed bit for bit."""
    flags = {name: flags_of(teacher, pictures, tmp_path / name) for name in ("straight", "resumed")}
    more = ["--student_prediction_type", "flow_prediction", "--checkpointing_steps", 1, "--student_blocks", 4]
    run_recipe(STUDENT, *flags["straight"], *more)
    shown = capsys.readouterr().out
    # Linear betas: sigma / (alpha + sigma) is .0099 to .9937, and the student's are .001, .002, ... 1.
    assert "16 of the student's 1,000 timesteps have less or more noise than any of the teacher's" in shown
    assert "1.6% of uniform ones, move to the nearest others, 9 and 992" in shown
    assert "--timestep_weighting min_snr weighs such draws less" in shown
    assert np.isfinite(losses_of(tmp_path / "straight")).all()
    results = json.loads((tmp_path / "straight/results.json").read_text())["rows"]
    assert results["teacher"]["teacher_distance"] == 0 < results["student"]["teacher_distance"]
    scheduler = DiTPipeline.from_pretrained(tmp_path / "straight/pipeline").scheduler
    assert (scheduler.config.prediction_type, scheduler.config.use_flow_sigmas) == ("flow_prediction", True)
    run_until(2, run_recipe, STUDENT, *flags["resumed"], *more)
    run_recipe(STUDENT, *flags["resumed"], *more, "--resume_from_checkpoint", "latest")
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_the_student_of_a_student_of_flow_matching(tmp_path, run_recipe, teacher, pictures):
    """What was exported is a teacher of flow matching; and its whole student, without training, is at no distance."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_recipe(STUDENT, *flags_of(teacher, pictures, first, "--student_prediction_type", "flow_prediction"))
    flags = flags_of(first, pictures, second, "--student_blocks", 2, "--method", "output", "--denoising_weight", 0)
    run_recipe(STUDENT, *flags, "--max_train_steps", 1, "--adam_weight_decay", 0)
    assert losses_of(second) == [0]
    results = json.loads((second / "results.json").read_text())["rows"]
    assert results["student"]["teacher_distance"] == results["teacher"]["teacher_distance"] == 0


def test_classes_of_a_published_teacher_and_its_guidance(tmp_path, run_recipe, pictures):
    """A table of 1,000 classes, whose names the student's pipeline still has."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    pipeline = tiny_dit_pipeline(num_classes=1000)
    pipeline.register_to_config(id2label={"0": "tench, Tinca tinca", "1": "goldfish"})
    pipeline.save_pretrained(teacher)
    table = tmp_path / "table"
    table.mkdir()
    images = sorted(pictures.rglob("*.png"))
    write_table(table / "train.parquet", images, labels=[999 - number for number in range(len(images))])
    run_recipe(STUDENT, *flags_of(teacher, table, run, "--guidance_scale", 2))
    stock = DiTPipeline.from_pretrained(run / "pipeline")
    assert stock.get_label_ids(["goldfish", "tench"]) == [1, 0]


def write_table(path, images, labels):
    """A table of images and whole numbers for classes."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [{"bytes": image.read_bytes(), "path": None} for image in images], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def test_students_given_by_a_configuration_or_with_weights(tmp_path, run_recipe, teacher, pictures, capsys):
    """A config.json starts from the teacher's weights, a folder from its own."""
    smaller = tiny_dit(2, num_classes=3, learned_variance=False, seed=5)
    smaller.save_pretrained(tmp_path / "student")
    own = {name: value.clone() for name, value in smaller.state_dict().items()}
    still = ["--method", "output", "--max_train_steps", 1, "--learning_rate", 1e-30, "--adam_weight_decay", 0]
    for name, source in (("config", tmp_path / "student/config.json"), ("weights", tmp_path / "student")):
        run_recipe(STUDENT, *flags_of(teacher, pictures, tmp_path / name, "--student", source, *still))
        found = weights_of(tmp_path / name)
        assert found["proj_out_2.weight"].shape == (4, 16)
        is_own = all(torch.equal(value, own[key]) for key, value in found.items())
        assert is_own == (name == "weights")
    assert "0 left random" in capsys.readouterr().out


def test_a_student_is_sampled_and_scored_by_the_commands(tmp_path, run_recipe, teacher, pictures):
    run_recipe(STUDENT, *flags_of(teacher, pictures, tmp_path / "run", "--max_train_steps", 1))
    loaded = load_pipeline(str(tmp_path / "run"))
    model = Model(loaded)
    assert (model.num_classes, model.image_size, model.image_channels) == (3, 8, 3)
    assert model.images(range(4), num_inference_steps=2).shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match="guides by class 1000"):
        model.images(range(2), num_inference_steps=2, guidance_scale=3)


def test_published_teachers_have_an_early_name(tmp_path, run_recipe, teacher, pictures):
    """As facebook/DiT-XL-2-256 has it: the class, and entries that the class of today does not take."""
    for file, changed in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel", "cross_attention_dim": None}),
    ):
        content = json.loads((teacher / file).read_text())
        (teacher / file).write_text(json.dumps(content | changed))
    flags = flags_of(teacher, pictures, tmp_path / "run", "--method", "output", "--max_train_steps", 1)
    run_recipe(STUDENT, *flags, "--dry_run")
    run_recipe(STUDENT, *flags)
    index = json.loads((tmp_path / "run/pipeline/model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]


def test_a_stream_is_encoded_as_it_is_drawn(tmp_path, run_recipe, teacher, pictures, monkeypatch):
    """Labels of a stream reach the student too."""
    table = tmp_path / "table"
    table.mkdir()
    images = sorted(pictures.rglob("*.png"))
    write_table(table / "train.parquet", images, labels=[int(image.parent.name[-1]) for image in images])
    flags = flags_of(teacher, table, tmp_path / "run", "--streaming", "--stream_head", 12, "--stream_buffer", 4)
    run_recipe(STUDENT, *flags, "--num_crops", 1)
    assert np.isfinite(losses_of(tmp_path / "run")).all()


def test_half_precision(tmp_path, run_recipe, teacher, pictures):
    flags = flags_of(teacher, pictures, tmp_path / "run", "--mixed_precision", "bf16", "--encoding_precision", "bf16")
    run_recipe(STUDENT, *flags, "--export_variant", "fp16")
    assert np.isfinite(losses_of(tmp_path / "run")).all()
    half = DiTPipeline.from_pretrained(tmp_path / "run/pipeline", variant="fp16", torch_dtype=torch.float16)
    assert half.transformer.dtype == torch.float16


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, run_recipe, teacher, pictures):
    launched = launch(STUDENT, *flags_of(teacher, pictures, tmp_path / "two"), "--train_batch_size", 2)
    assert launched.returncode == 0, launched.stderr
    run_recipe(STUDENT, *flags_of(teacher, pictures, tmp_path / "one"))
    np.testing.assert_allclose(*(losses_of(tmp_path / name) for name in ("one", "two")), rtol=1e-4)


# ---- what is told before the first step


def test_a_plan_needs_no_weights(tmp_path, run_recipe, teacher, pictures, capsys):
    (teacher / "transformer/diffusion_pytorch_model.safetensors").unlink()
    run_recipe(STUDENT, *flags_of(teacher, pictures, tmp_path / "run", "--dry_run"))
    shown = capsys.readouterr().out
    assert '"num_layers": 2' in shown
    assert "the same command without --dry_run trains it" in shown
    assert not (tmp_path / "run").exists()


def test_a_plan_for_a_well_known_teacher(tmp_path, run_recipe, pictures, capsys):
    run_recipe(STUDENT, *flags_of("dit-xl-2", pictures, tmp_path / "run", "--dry_run"))
    shown = capsys.readouterr().out
    assert "teacher, as published: 749,800,000 parameters" in shown
    assert re.search(r"transformer_blocks\.13 +256x1152 +100% +transformer_blocks\.27 +256x1152 +100%", shown)


def unsupported(folder, name, part):
    folder.mkdir()
    entries = {"_class_name": name, "transformer": ["diffusers", part], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(entries))


def damaged(folder, file):
    tiny_dit_pipeline(folder, num_classes=3)
    (folder / file).unlink()


def changed(folder, file="transformer/config.json", **entries):
    tiny_dit_pipeline(folder, num_classes=3)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


BAD = {
    "another VAE's latents": (lambda at: tiny_dit_pipeline(at, latent_channels=3), (), "its VAE makes such of 3"),
    "a last block": (None, ("--student_blocks", "0", "4"), "there is no block 4"),
    "no first block": (None, ("--student_blocks", "1", "2"), "block 0 must be kept"),
    "too many blocks": (None, ("--student_blocks", "5"), "has 1 to 4 of them"),
    "a UNet's student": (None, ("--student", "bk-small"), "layers_per_block is of UNets"),
    "a UNet's layers": (None, ("--layers", "mid_and_up"), "of a transformer choose all or self_attention"),
    "another resolution": (None, ("--resolution", "16"), "knows the positions of 8 pixels alone"),
    "guidance without a null class": (
        None,
        ("--guidance_scale", "2"),
        "guides by class 1000, and this denoiser knows 3",
    ),
    "prompts": (None, ("--validation_prompts", "a cat"), "for models of prompts"),
    "captions": (None, ("--caption_column", "text"), "for models of prompts"),
    "no flow for UNets": (
        lambda at: stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(at),
        ("--student_prediction_type", "flow_prediction"),
        "is for teachers of flow matching and transformers",
    ),
    "no epsilon of flow": (
        lambda at: tiny_dit_pipeline(at, num_classes=3, scheduler=FLOW),
        ("--student_prediction_type", "epsilon"),
        "a teacher of flow matching has students of flow_prediction",
    ),
    "a sampler that DiT's pipeline cannot run": (
        lambda at: tiny_dit_pipeline(at, num_classes=3, scheduler=FlowMatchEulerDiscreteScheduler()),
        (),
        "cannot sample by FlowMatchEulerDiscreteScheduler",
    ),
    "no VAE": (lambda at: damaged(at, "vae/config.json"), (), "vae/config.json"),
    "no transformer": (lambda at: damaged(at, "transformer/config.json"), (), "transformer/config.json"),
    "no scheduler": (lambda at: damaged(at, "scheduler/scheduler_config.json"), (), "scheduler_config.json"),
    "no weights": (lambda at: damaged(at, "transformer/diffusion_pytorch_model.safetensors"), (), "holds no weights"),
    "heads that are no whole number": (lambda at: changed(at, num_attention_heads="2"), (), "no DiT that can be run"),
    "heads that are not the weights'": (lambda at: changed(at, num_attention_heads=3), (), "have another shape"),
    "an absurd depth": (lambda at: changed(at, num_layers=10**6), (), "num_layers is 1000000"),
    "no patches": (lambda at: changed(at, patch_size=3), (), "no whole number of patches of 3"),
    "another norm": (lambda at: changed(at, norm_type="ada_norm"), (), "norm_type"),
    "another norm, planned": (lambda at: changed(at, norm_type="ada_norm"), ("--dry_run",), "norm_type"),
    "no steps": (
        lambda at: changed(at, "scheduler/scheduler_config.json", num_train_timesteps="many"),
        (),
        "no schedule",
    ),
    "a transformer alone": (lambda at: tiny_dit().save_pretrained(at), (), "holds a DiTTransformer2DModel alone"),
    "a UNet as the student": (None, ("--student", str(ASSETS / "digits-teacher")), "students of another architecture"),
    "a cache of pixels": (None, ("--image_cache", "cache"), "for models of pixels"),
    "other classes": (lambda at: tiny_dit_pipeline(at, num_classes=5), (), "has 3 classes, the model knows 5"),
    "Qwen-Image": (
        lambda at: unsupported(at, "QwenImagePipeline", "QwenImageTransformer2DModel"),
        (),
        "is a QwenImagePipeline; pipelines of transformers come with a later version",
    ),
    "Z-Image": (
        lambda at: unsupported(at, "ZImagePipeline", "ZImageTransformer2DModel"),
        (),
        "ZImagePipeline",  # which early versions of diffusers do not know
    ),
    "video": (
        lambda at: unsupported(at, "WanPipeline", "WanTransformer3DModel"),
        (),
        "is a WanPipeline; pipelines of transformers come with a later version",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told_in_one_line(tmp_path, run_recipe, teacher, pictures, capsys, name):
    make, more, words = BAD[name]
    if make is not None:
        teacher = tmp_path / "other"
        make(teacher)
    error = refused(capsys, run_recipe, STUDENT, *flags_of(teacher, pictures, tmp_path / "run", *more))
    assert words in error
    assert not (tmp_path / "run/checkpoints").exists()
