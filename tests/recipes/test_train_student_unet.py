"""The main recipe, run as users run it, a few steps on a CPU."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import RepoUrl
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import CIFAR10, tiny_unet
from tests.faults.small_run import end_of, run_student, start_processes
from tests.recipes.conftest import (
    SHORT_STUDENT,
    assert_same_run,
    assert_same_weights,
    images_in,
    launch,
    read_metrics,
    recipe_runner,
    weights_of,
    without_times,
)
from vkd_gen.pipelines import stock_pipeline

RECIPE = "train_student_unet"
EVERY = "--feature_weighting gradient_ratio --diagnostics_every_steps 1"
NO_SCORES = ["--extractor", "none", "--no-score_teacher"]


@pytest.fixture
def student_flags(pipeline_folder):
    """Of a short run whose scores are not the matter."""
    return [*SHORT_STUDENT, *NO_SCORES, "--teacher", pipeline_folder]


@pytest.fixture(scope="module")
def dropout_teacher(tmp_path_factory):
    """Dropout makes the result depend on the random state that a checkpoint must bring back."""
    folder = tmp_path_factory.mktemp("dropout") / "teacher"
    stock_pipeline(tiny_unet(dropout=0.1), DDPMScheduler()).save_pretrained(folder)
    return folder


def slow(*cases):
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


# ---- what a run leaves


def terms_of(run):
    return {name for line in read_metrics(run) for name in line}


def test_a_run_leaves_all_that_it_promises(pipeline_folder, tmp_path, monkeypatch, capsys):
    """The one run here with scores of both models, figures, costs and previews; its student needs diffusers alone."""
    run = tmp_path / "run"
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", run, "--preview_every_steps", 2]
    recipe_runner(monkeypatch, tmp_path, whole=True)(RECIPE, *flags)
    results = json.loads((run / "results.json").read_text())
    assert set(results["rows"]) == {"teacher", "student", "held-out images"}
    rows = [results["rows"][name] for name in ("student", "teacher")]
    for name in ("parameters", "macs", "ms_per_image"):
        assert rows[0][name] > 0
    assert rows[0]["parameters"] < rows[1]["parameters"]
    assert rows[0]["macs"] < rows[1]["macs"]
    assert rows[1]["teacher_distance"] == 0 < rows[0]["teacher_distance"]
    assert all(any(name.startswith("fid") for name in row) for row in rows)
    for file in ("samples.png", "previews/step-000002.png", "config.json", "environment.json", "report.html"):
        assert (run / file).stat().st_size > 0
    assert min(Image.open(run / "diagnostics.png").size) > 300
    card = (run / "pipeline/README.md").read_text()
    assert "train_student_unet.py" in card
    assert "denoising error" in card
    shown = capsys.readouterr().out.replace("\n", "")
    assert str(run / "samples.png") in shown

    for name in [name for name in sys.modules if name.split(".")[0] == "vkd_gen"]:
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert type(pipeline).__name__ == "DDIMPipeline"
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2
    names = weights_of(run).keys()
    assert not [name for name in names if "projector" in name or "normalizer" in name or name.startswith("student")]


@pytest.mark.parametrize("method", ["vkd", "vkd-paper", "fitnet", "bk", "output", "none"])
def test_every_method_has_its_losses(method, student_flags, tmp_path, run_recipe):
    run = tmp_path / "run"
    equal_widths = ["--student_width", 1] if method == "bk" else []
    run_recipe(RECIPE, *student_flags, "--method", method, *equal_widths, "--output_dir", run)
    names = terms_of(run)
    has_features = method not in ("none", "output")
    assert "loss/total" in names
    assert ("loss/denoising" in names) == (method != "vkd")
    assert ("loss/output" in names) == (method != "none")
    assert ("loss/feature/up_blocks.0" in names) == has_features
    assert ("loss/feature/mid_block" in names) == (has_features and method != "bk")
    assert ("diagnostics/gradient_ratio" in names) == has_features
    assert (run / "diagnostics.png").exists() == has_features


def test_few_images_and_a_teacher_that_is_not_scored(pipeline_folder, tmp_path, run_recipe, capsys):
    run = tmp_path / "run"
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--max_train_samples", 20, "--no-score_teacher"]
    run_recipe(RECIPE, *flags, "--output_dir", run)
    assert "training on 20 of them" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["num_training_images"] == 20
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert {name for name in rows["student"] if name.startswith(("fid", "kid"))}
    assert not {name for name in rows["teacher"] if name.startswith(("fid", "kid"))}
    assert rows["teacher"]["teacher_distance"] == 0
    for file in ("report.html", "samples.png", "pipeline/README.md"):
        assert (run / file).stat().st_size > 0


# ---- stopped and gone on with


def every_kind(teacher):
    """Flags of six steps with passes that are accumulated, refreshed projectors, a weight that follows, and an end of
    the features after the fourth."""
    flags = [*SHORT_STUDENT, *NO_SCORES, "--teacher", teacher, "--max_train_steps", 6, "--checkpointing_steps", 1]
    flags += ["--checkpoints_total_limit", 9, "--resume_from_checkpoint", "latest"]
    flags += ["--gradient_accumulation_steps", 2, "--student_width", 1, "--student_layers_per_block", 1]
    flags += ["--projector_refresh_steps", 1, "--diagnostics_every_steps", 2]
    return [*flags, "--feature_decay_start", 0, "--feature_decay_end", 0.66]


@pytest.fixture(scope="module")
def straight(dropout_teacher, tmp_path_factory):
    """A run of all that a checkpoint has to bring back, which nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        recipe_runner(patch, folder)(RECIPE, *every_kind(dropout_teacher), "--output_dir", folder / "run")
    return folder / "run"


def test_an_average_in_the_machines_memory_is_the_same_also_when_interrupted(
    straight, dropout_teacher, tmp_path, run_recipe, run_interrupted
):
    flags = [*every_kind(dropout_teacher), "--ema_device", "cpu"]
    run_interrupted(RECIPE, *flags, "--output_dir", tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_features_that_end_early_leave_the_run_to_the_output(straight):
    """Lines of the log know features as long as there are any; after that projectors stand still."""
    lines = read_metrics(straight)
    assert [line["step"] for line in lines if "loss/feature/mid_block" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "loss/output" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "diagnostics/gradient_ratio" in line] == [2, 4]
    states = [load_file(straight / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 7)]
    solutions = [state["projectors.0.solution"] for state in states]
    assert [torch.equal(*pair) for pair in itertools.pairwise(solutions)] == [False, False, False, True, True]


@pytest.mark.parametrize("step", [3, *slow(1, 2, 4, 5, 6)])
def test_a_run_interrupted_at_any_step_ends_as_the_straight_one(
    step, dropout_teacher, straight, tmp_path, run_interrupted, capfd
):
    flags = [*every_kind(dropout_teacher), "--output_dir", tmp_path / "run"]
    run_interrupted(RECIPE, *flags, "--checkpointing_steps", 2, step=step)
    assert "--resume_from_checkpoint latest" in capfd.readouterr().err
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.slow
def test_the_published_method_interrupted(dropout_teacher, tmp_path, run_recipe, run_interrupted):
    flags = [*every_kind(dropout_teacher), "--method", "vkd-paper", "--checkpointing_steps", 2]
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "straight")
    for step in (1, 4, 6):
        run_interrupted(RECIPE, *flags, "--output_dir", tmp_path / str(step), step=step)
        assert_same_run(tmp_path / "straight", tmp_path / str(step))


def test_the_feature_weight_follows(dropout_teacher, tmp_path, run_recipe):
    """What is found before the first step weighs the first step's loss; then the weight moves at every look."""
    flags = [*SHORT_STUDENT, *NO_SCORES, "--teacher", dropout_teacher, "--max_train_steps", 5]
    flags += ["--projector_refresh_steps", 2, "--diagnostics_every_steps", 2]
    flags += [
        "--feature_weighting",
        "gradient_ratio",
        "--feature_weight",
        0.5,
        "--feature_decay_start",
        1,
        "--feature_decay_end",
        1,
    ]
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    found = {line["step"]: line for line in metrics if "diagnostics/feature_weight" in line}
    assert list(found) == [2, 4, 5]
    weights = [line["diagnostics/feature_weight"] for line in found.values()]
    ratios = [line["diagnostics/gradient_ratio"] for line in found.values()]
    assert weights[0] != 0.5
    assert weights[1] == pytest.approx(weights[0] * (0.5 / ratios[0]) ** 0.5)
    terms = metrics[0]["loss/output"] + weights[0] * metrics[0]["loss/feature"]
    assert metrics[0]["loss/total"] == pytest.approx(terms, rel=1e-5)


@pytest.mark.slow
def test_looking_changes_nothing(dropout_teacher, tmp_path, run_recipe):
    """With a constant weight a run with diagnostics ends bit for bit as one without, dropout and all."""
    flags = [*SHORT_STUDENT, *NO_SCORES, "--teacher", dropout_teacher, "--max_train_steps", 3, "--student_width", 1]
    flags += [
        "--no-inherit_weights",
        "--feature_weighting",
        "constant",
        "--feature_decay_start",
        1,
        "--feature_decay_end",
        1,
    ]
    for every in (0, 1):
        run_recipe(RECIPE, *flags, "--diagnostics_every_steps", every, "--output_dir", tmp_path / str(every))
    assert_same_weights(tmp_path / "0", tmp_path / "1")
    lines = without_times(read_metrics(tmp_path / "1"))
    found = [line for line in lines if "diagnostics/gradient_ratio" in line]
    assert [line["step"] for line in found] == [1, 2, 3]
    assert [line for line in lines if line not in found] == without_times(read_metrics(tmp_path / "0"))
    assert {line["diagnostics/feature_weight"] for line in found} == {0.3}
    assert found[0]["diagnostics/gradient/feature"] != found[2]["diagnostics/gradient/feature"]


# ---- the same run in other ways


@pytest.mark.parametrize("case", [("vkd", "no"), *slow(("vkd", "bf16"), ("vkd-paper", "bf16"))])
def test_compiled_by_the_launcher(case, tmp_path, run_recipe, monkeypatch, request):
    """Student and teacher are a graph each, whatever happens between the steps; the run, and its checkpoints, are those
    of a plain one."""
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("torch.compile cannot trace the checks of shapes and types")
    stock_pipeline(tiny_unet((8,)), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    flags = [*SHORT_STUDENT, *NO_SCORES, "--teacher", tmp_path / "teacher", "--method", case[0]]
    flags += ["--mixed_precision", case[1], "--max_train_steps", 4, "--projector_refresh_steps", 2]
    flags += ["--preview_every_steps", 4, "--diagnostics_every_steps", 2, "--checkpointing_steps", 2]
    flags += ["--gradient_accumulation_steps", 2]
    flags += ["--feature_decay_end", 1]  # features to the end: steps without them are another graph
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "plain")

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    # What `accelerate launch --dynamo_backend eager --dynamo_use_fullgraph` says to what it starts.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "1")
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "compiled")
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert_same_run(tmp_path / "compiled", tmp_path / "plain")
    plain, compiled = (load_file(tmp_path / name / "checkpoint-2/model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()


def test_accumulated_passes_equal_one_large_batch(student_flags, tmp_path, run_recipe):
    student_flags = [*student_flags, "--feature_decay_end", 1]  # features to the end
    run_recipe(RECIPE, *student_flags, "--train_batch_size", 8, "--output_dir", tmp_path / "large")
    flags = [*student_flags, "--train_batch_size", 4, "--gradient_accumulation_steps", 2]
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "accumulated")
    both = [
        [line for line in read_metrics(tmp_path / name) if "loss/total" in line] for name in ("large", "accumulated")
    ]
    for large, small in zip(*both, strict=True):
        for name in ("loss/total", "loss/feature/mid_block", "gradient_norm"):
            assert small[name] == pytest.approx(large[name], rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        "--method vkd --guidance_dropout 0.5",
        *slow("--method vkd-paper", f"{EVERY} --feature_decay_end 1"),
    ],
)
def test_two_processes_equal_one(words, tmp_path, run_recipe):
    """The same images, noise, times and labels in each step, whoever computes them; with diagnostics."""
    stock_pipeline(tiny_unet(num_class_embeds=11), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    flags = [*SHORT_STUDENT, *NO_SCORES, "--teacher", tmp_path / "teacher", "--max_train_steps", 6]
    flags += ["--projector_refresh_steps", 2, "--diagnostics_every_steps", 2, *words.split()]
    run_recipe(RECIPE, *flags, "--train_batch_size", 8, "--output_dir", tmp_path / "1")
    flags += ["--train_batch_size", 4, "--output_dir", tmp_path / "2"]
    processes = start_processes(2, run_student, flags, output=tmp_path / "output")
    assert end_of(processes, within=120) == [0, 0], (tmp_path / "output").read_text()
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    assert sum("loss/total" in line for line in one) == 6
    assert any("diagnostics/gradient_ratio" in line for line in one)
    assert two[0]["gradient_norm"] == pytest.approx(one[0]["gradient_norm"], rel=1e-6)
    for first, second in zip(one, two, strict=True):
        for name in first:
            if name.startswith(("loss/", "diagnostics/")):
                tolerance = 1e-5 if name.startswith("loss/") else 1e-3
                assert second[name] == pytest.approx(first[name], rel=tolerance, abs=tolerance), (first["step"], name)


@pytest.mark.slow
def test_two_processes_of_the_launcher(student_flags, tmp_path):
    done = launch(RECIPE, *student_flags, "--output_dir", tmp_path / "run", ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss/total" in line] == [1, 2]


# ---- dry runs


def test_dry_run_prints_and_touches_nothing(student_flags, tmp_path, run_recipe, capsys):
    run_recipe(RECIPE, *student_flags, "--dry_run", "--dataset", "not/loaded", "--output_dir", tmp_path / "run")
    output = " ".join(capsys.readouterr().out.split())
    for words in ("parameters", "MACs", "mid_block 8x4x4 mid_block 16x4x4 8 -> 16", "without --dry_run trains it"):
        assert words in output
    assert not (tmp_path / "run").exists()


def dry_run(run_recipe, capsys, *flags):
    run_recipe(RECIPE, "--dry_run", "--preset", "custom", "--dataset", "not/loaded", *flags)
    return capsys.readouterr().out


def test_dry_run_of_a_model_too_large_for_the_machine(run_recipe, capsys):
    output = dry_run(run_recipe, capsys, "--teacher", "stable-diffusion-xl", "--student", "koala-700m")
    assert "teacher: 2,567,463,684 parameters" in output
    assert "student: 782,822,724 parameters" in output
    assert "student, as published: 782,000,000 parameters" in output
    assert "transformer_layers_per_block" in output.splitlines()[2]
    assert "up_blocks.2    320x128x128  up_blocks.2    320x128x128  320 -> 320" in output
    assert "with the whole pipeline of such a teacher" in output


@pytest.mark.parametrize("where", ["file", "folder", "pipeline"])
def test_dry_run_needs_no_weights(where, pipeline_folder, run_recipe, capsys):
    unet = pipeline_folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    teacher = {"file": unet / "config.json", "folder": unet, "pipeline": pipeline_folder}[where]
    flags = ["--student_width", 1, "--student_drop_stages", -1, "--layers", "mid_and_up"]
    output = dry_run(run_recipe, capsys, "--teacher", teacher, *flags)
    output = " ".join(output.split())
    assert (
        'but for {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}'
    ) in output
    # The student's only stage works at 8x8, as the teacher's last; its middle too, while the teacher's is 4x4.
    assert "mid_block/2 8x4x4 mid_block 16x4x4 8 -> 16 up_blocks.0 8x8x8 up_blocks.1 8x8x8 8 -> 8" in output


def test_dry_run_with_self_attention_and_whitening(run_recipe, capsys):
    flags = ["--student", "bk-tiny", "--student_width", 0.5, "--layers", "self_attention"]
    output = dry_run(run_recipe, capsys, "--teacher", "stable-diffusion-2", *flags, "--feature_normalization", "whiten")
    line = next(line for line in output.splitlines() if line.startswith("down_blocks.0"))
    # 320 channels in heads of 64: half of it, rounded up, is 192.
    assert line.split() == [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "4096x192",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1", "4096x320", "192", "->", "192",
    ]  # fmt: skip


# ---- students, data, options


STUDENTS = {
    "by name, changed": lambda tmp: ["--student", "bk-small", "--student_width", 0.5],
    "by flags": lambda tmp: ["--student_drop_stages", 0, "--student_drop_mid_block", "--student_width", 1],
    "by file": lambda tmp: ["--student", tmp / "student" / "config.json"],
    "by folder": lambda tmp: ["--student", tmp / "student"],
}


@pytest.mark.parametrize("way", STUDENTS)
def test_a_student_by(way, student_flags, tmp_path, run_recipe):
    tiny_unet((4, 8), seed=1).save_pretrained(tmp_path / "student")
    flags = [*student_flags, *STUDENTS[way](tmp_path), "--output_dir", tmp_path / "run", "--learning_rate", 1e-12]
    run_recipe(RECIPE, *flags, "--ema_max_decay", 0, "--adam_weight_decay", 0)
    student = json.loads((tmp_path / "run/pipeline/unet/config.json").read_text())
    # Made from 8 and 16 channels; half of 8 is 4, in heads and groups of 4.
    expected = {"by name, changed": [4, 8], "by flags": [16], "by file": [4, 8], "by folder": [4, 8]}
    assert student["block_out_channels"] == expected[way]
    assert (student["mid_block_type"] is None) == (way not in ("by file", "by folder"))
    exported, start = weights_of(tmp_path / "run"), tiny_unet((4, 8), seed=1).state_dict()
    same = exported.keys() == start.keys() and all(
        torch.allclose(value, start[name], atol=1e-9) for name, value in exported.items()
    )
    assert same == (way == "by folder")


def test_custom_teacher_and_a_folder_of_pngs(pipeline_folder, tmp_path, run_recipe):
    images = images_in(tmp_path / "images" / "nested", count=12, side=11)
    flags = ["--preset", "custom", *SHORT_STUDENT, "--dataset", images.parent, "--dataloader_num_workers", 1]
    run_recipe(RECIPE, *flags, "--teacher", pipeline_folder / "unet", "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not any(name.startswith("fid") for name in results["rows"]["student"])


@pytest.mark.slow
@pytest.mark.skipif(CIFAR10 is None, reason="VKD_GEN_CIFAR10 does not name a folder with CIFAR-10")
def test_cifar10_from_teacher_to_samples(tmp_path, run_recipe):
    flags = ["--max_train_steps", 2, "--train_batch_size", 4, "--log_every_steps", 1, "--dataloader_num_workers", 0]
    network = ["--block_out_channels", 8, 16, "--norm_num_groups", 4, "--layers_per_block", 1, "--attention_stages"]
    run_recipe("train_teacher_unet", "--preset", "cifar10", *flags, *network, "--output_dir", tmp_path / "teacher")
    student = ["--teacher", tmp_path / "teacher/pipeline", "--calibration_samples", 192]
    run_recipe(RECIPE, "--preset", "cifar10", *flags, *student, "--output_dir", tmp_path / "student")
    assert Image.open(tmp_path / "student/samples.png").mode == "RGB"
    assert len(json.loads((tmp_path / "student/results.json").read_text())["rows"]) == 2


ALONE = "--output_weight 0 --feature_weighting constant --feature_decay_end 1"


@pytest.mark.parametrize(
    "flags",
    [
        "--mixed_precision bf16 --ema_max_decay 0 --max_grad_norm 0 --lr_scheduler constant",
        "--gradient_checkpointing --layers mid_and_up --student_prediction_type v_prediction",
        "--projector cayley --projector_start procrustes --feature_normalization whiten",
        "--projector random --feature_normalization standardize --timestep_weighting min_snr",
        f"{ALONE} --student_width 1 --projector identity --layer_pairs mid_block up_blocks.1.resnets.0",
        "--feature_weight 0 --eval_batch_size 3",
        *slow(
            "--projector random --feature_normalization layer_norm --feature_loss smooth_l1",
            "--feature_normalization whiten --whitening_rank 3 --whitening_exponent 0.5",
            "--student_width 2 --feature_normalization center",
            f"{EVERY} --mixed_precision bf16 --gradient_checkpointing",
            f"{EVERY} --feature_loss cka --timestep_weighting min_snr --feature_decay_end 1",
            f"{EVERY} --method vkd-paper --denoising_weight 0",
            f"{EVERY} --student_width 2",
            f"{EVERY} --method output",
        ),
    ],
)
def test_options_combine(flags, student_flags, tmp_path, run_recipe):
    run_recipe(RECIPE, *student_flags, *flags.split(), "--output_dir", tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 2
    assert all(np.isfinite(value) for value in last.values())


def test_tracker_and_upload(student_flags, tmp_path, run_recipe, monkeypatch, capsys):
    uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **_: RepoUrl(f"https://huggingface.co/me/{name}")
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **given: uploads.append(given))
    flags = ["--report_to", "tensorboard", "--push_to_hub", "--output_dir", tmp_path / "run"]
    run_recipe(RECIPE, *student_flags, *flags)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert uploads[0]["repo_id"] == "me/run"
    assert uploads[0]["folder_path"] == tmp_path / "run" / "pipeline"
    assert "huggingface.co/me/run" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("recipe", ["train_student_unet", "train_teacher_unet"])
def test_a_dry_run_does_not_mind_a_run_that_is_there(recipe, tmp_path, run_recipe, capsys):
    (tmp_path / "pipeline").mkdir()
    run_recipe(recipe, "--dry_run", "--output_dir", tmp_path)
    assert "parameters" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
