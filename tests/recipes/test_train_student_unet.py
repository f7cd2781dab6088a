"""The main recipe, run as users run it, a few steps on a CPU."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import CIFAR10, tiny_unet
from tests.recipes.conftest import RECIPES, SHORT_STUDENT
from vkd_gen.sampling import stock_pipeline
from vkd_gen.training.loop import TrainingRun

RECIPE = "train_student_unet"
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"
EVERY_LOOK = ["--feature_weighting", "gradient_ratio", "--diagnostics_every_steps", 1]


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(folder, other):
    first, second = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def without_times(metrics):
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in metrics]


@pytest.fixture
def student_flags(pipeline_folder):
    return [*SHORT_STUDENT, "--teacher", pipeline_folder]


@pytest.mark.parametrize("method", ["vkd", "vkd-paper", "fitnet", "output", "none"])
def test_every_method_trains_exports_and_reports(method, student_flags, tmp_path, run_recipe, capsys):
    run = tmp_path / "run"
    run_recipe(RECIPE, *student_flags, "--method", method, "--output_dir", run, "--preview_every_steps", 1)
    results = json.loads((run / "results.json").read_text())
    assert set(results["rows"]) == {"teacher", "student", "held-out images"}
    assert results["rows"]["student"]["parameters"] < results["rows"]["teacher"]["parameters"]
    assert results["rows"]["teacher"]["teacher_distance"] == 0 < results["rows"]["student"]["teacher_distance"]
    names = {name for line in read_metrics(run) for name in line}
    terms = {name.removeprefix("loss/") for name in names if name.startswith("loss/")}
    assert "total" in terms
    assert ("denoising" in terms) == (method != "vkd")
    assert ("diagnostics/gradient_ratio" in names) == (method not in ("none", "output"))
    assert ("output" in terms) == (method != "none")
    assert ("feature/mid_block" in terms) == (method not in ("none", "output"))
    for file in ("samples.png", "previews/step-000002.png", "config.json", "environment.json", "pipeline/README.md"):
        assert (run / file).stat().st_size > 0
    assert (run / "diagnostics.png").exists() == (method not in ("none", "output"))
    card = (run / "pipeline/README.md").read_text()
    assert "train_student_unet.py" in card
    assert "denoising error" in card
    assert str(run / "samples.png") in capsys.readouterr().out.replace("\n", "")


def test_the_student_samples_where_this_package_is_not_importable(student_flags, tmp_path, run_recipe):
    run_recipe(RECIPE, *student_flags, "--output_dir", tmp_path / "run")
    script = """
import sys
sys.modules["vkd_gen"] = None  # any import of it fails
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
print(len(pipeline(batch_size=2, num_inference_steps=2).images), type(pipeline).__name__)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run" / "pipeline")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split() == ["2", "DDIMPipeline"]
    names = load_file(tmp_path / "run" / WEIGHTS).keys()
    assert not [name for name in names if "projector" in name or "normalizer" in name or name.startswith("student")]


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("vkd", [3, 4]),  # between checkpoints, and in the step of one
        pytest.param("vkd", [1, 2, 5, 6], marks=pytest.mark.slow),
        pytest.param("vkd-paper", range(1, 7), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_interrupted_at_any_step_ends_as_the_straight_one(
    method, steps, tmp_path, run_recipe, monkeypatch, capfd
):
    # Dropout makes the result depend on the random state that the checkpoint must bring back.
    stock_pipeline(tiny_unet(dropout=0.1), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    flags = [*SHORT_STUDENT, "--teacher", tmp_path / "teacher", "--method", method, "--projector_refresh_steps", 2]
    flags += ["--max_train_steps", 6, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    flags += ["--gradient_accumulation_steps", 2, "--student_width", 1, "--student_layers_per_block", 1]
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "straight")

    after_step = TrainingRun._after_step
    for interrupted_at in steps:

        def interrupt(run, step=interrupted_at):
            after_step(run)
            if run.step == step:
                raise KeyboardInterrupt

        run = tmp_path / f"interrupted-{interrupted_at}"
        monkeypatch.setattr(TrainingRun, "_after_step", interrupt)
        with pytest.raises(SystemExit) as exit_status:
            run_recipe(RECIPE, *flags, "--output_dir", run)
        monkeypatch.setattr(TrainingRun, "_after_step", after_step)
        assert exit_status.value.code == 130
        assert "--resume_from_checkpoint latest" in capfd.readouterr().err
        torch.manual_seed(interrupted_at)
        run_recipe(RECIPE, *flags, "--output_dir", run)
        assert_same_weights(tmp_path / "straight", run)
        assert without_times(read_metrics(run)) == without_times(read_metrics(tmp_path / "straight"))
        assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("method", "precision"),
    [("vkd", "no"), *(pytest.param(method, "bf16", marks=pytest.mark.slow) for method in ("vkd", "vkd-paper"))],
)
def test_compiled_by_the_launcher(method, precision, tmp_path, run_recipe, monkeypatch, request):
    """Student and teacher are a graph each, whatever happens between the steps; the run, and its checkpoints, are those
    of a plain one."""
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("torch.compile cannot trace the checks of shapes and types")
    stock_pipeline(tiny_unet((8,)), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    flags = [*SHORT_STUDENT, "--teacher", tmp_path / "teacher", "--method", method, "--mixed_precision", precision]
    flags += ["--extractor", "none", "--no-score_teacher", "--max_train_steps", 4, "--projector_refresh_steps", 2]
    flags += ["--preview_every_steps", 2, "--diagnostics_every_steps", 2, "--checkpointing_steps", 2]
    flags += ["--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "latest"]
    flags += ["--feature_decay_start", 0]  # features to the end: steps without them are another graph
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "plain")

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    # What `accelerate launch --dynamo_backend eager --dynamo_use_fullgraph` says to what it starts.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "1")
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert without_times(read_metrics(tmp_path / "compiled")) == without_times(read_metrics(tmp_path / "plain"))
    assert_same_weights(tmp_path / "compiled", tmp_path / "plain")

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "compiled")
    assert_same_weights(tmp_path / "compiled", tmp_path / "plain")
    torch._dynamo.reset()


@pytest.mark.slow
def test_looking_changes_nothing(tmp_path, run_recipe):
    """With a constant weight a run with diagnostics ends bit for bit as one without, dropout and all."""
    stock_pipeline(tiny_unet(dropout=0.1), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    flags = [*SHORT_STUDENT, "--teacher", tmp_path / "teacher", "--extractor", "none", "--max_train_steps", 3]
    flags += ["--student_width", 1, "--no-inherit_weights"]
    flags += ["--feature_weighting", "constant", "--feature_decay_start", 1]
    for every in (0, 1):
        run_recipe(RECIPE, *flags, "--diagnostics_every_steps", every, "--output_dir", tmp_path / str(every))
    assert_same_weights(tmp_path / "0", tmp_path / "1")
    lines = without_times(read_metrics(tmp_path / "1"))
    looks = [line for line in lines if "diagnostics/gradient_ratio" in line]
    assert [line["step"] for line in looks] == [1, 2, 3]
    assert [line for line in lines if line not in looks] == without_times(read_metrics(tmp_path / "0"))
    assert {line["diagnostics/feature_weight"] for line in looks} == {0.3}
    assert looks[0]["diagnostics/gradient/feature"] != looks[2]["diagnostics/gradient/feature"]


def test_the_feature_weight_follows_and_a_resumed_run_goes_on_with_it(tmp_path, run_recipe, run_interrupted):
    """What is found before the first step weighs the first step's loss; then the weight moves at every look."""
    stock_pipeline(tiny_unet(dropout=0.1), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    flags = [*SHORT_STUDENT, "--teacher", tmp_path / "teacher", "--extractor", "none", "--max_train_steps", 5]
    flags += ["--projector", "least_squares", "--projector_refresh_steps", 2, "--checkpointing_steps", 3]
    flags += ["--feature_weighting", "gradient_ratio", "--feature_weight", 0.5, "--feature_decay_start", 1]
    flags += ["--diagnostics_every_steps", 2]
    flags += ["--resume_from_checkpoint", "latest"]
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "straight")
    metrics = read_metrics(tmp_path / "straight")
    looks = {line["step"]: line for line in metrics if "diagnostics/feature_weight" in line}
    assert list(looks) == [2, 4, 5]
    weights = [looks[step]["diagnostics/feature_weight"] for step in looks]
    ratios = [looks[step]["diagnostics/gradient_ratio"] for step in looks]
    assert weights[0] != 0.5
    assert weights[1] == pytest.approx(weights[0] * (0.5 / ratios[0]) ** 0.5)
    first = metrics[0]
    terms = first["loss/output"] + weights[0] * first["loss/feature"]
    assert first["loss/total"] == pytest.approx(terms, rel=1e-5)

    run_interrupted(RECIPE, *flags, "--output_dir", tmp_path / "interrupted")
    assert_same_weights(tmp_path / "straight", tmp_path / "interrupted")
    assert without_times(read_metrics(tmp_path / "interrupted")) == without_times(metrics)


def test_features_that_end_early_leave_the_run_to_the_output(student_flags, tmp_path, run_recipe, run_interrupted):
    """Lines of the log know features as long as there are any, projectors stand still behind them, resumed or not."""
    flags = [*student_flags, "--max_train_steps", 6, "--feature_decay_end", 0.5, "--log_every_steps", 1]
    flags += ["--diagnostics_every_steps", 100, "--projector_refresh_steps", 1, "--checkpointing_steps", 1]
    flags += ["--checkpoints_total_limit", 9, "--resume_from_checkpoint", "latest"]
    run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss/feature/mid_block" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "loss/output" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "diagnostics/gradient_ratio" in line] == [3]
    states = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 7)]
    solutions = [state["projectors.0.solution"] for state in states]
    assert [torch.equal(*pair) for pair in itertools.pairwise(solutions)] == [False, False, True, True, True]
    run_interrupted(RECIPE, *flags, "--output_dir", tmp_path / "interrupted")
    assert_same_weights(tmp_path / "run", tmp_path / "interrupted")


def test_few_images_and_a_teacher_that_is_not_scored(student_flags, tmp_path, run_recipe, capsys):
    run = tmp_path / "run"
    run_recipe(RECIPE, *student_flags, "--max_train_samples", 20, "--no-score_teacher", "--output_dir", run)
    assert "training on 20 of them" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["num_training_images"] == 20
    results = json.loads((run / "results.json").read_text())
    student, teacher = (
        {name for name in results["rows"][model] if name.startswith(("fid", "kid"))} for model in ("student", "teacher")
    )
    assert student
    assert not teacher
    assert results["rows"]["teacher"]["teacher_distance"] == 0
    for file in ("report.html", "samples.png", "pipeline/README.md"):
        assert (run / file).stat().st_size > 0


def test_accumulated_passes_equal_one_large_batch(student_flags, tmp_path, run_recipe):
    student_flags = [*student_flags, "--feature_decay_start", 0]  # features to the end
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
    "method",
    [
        ["vkd"],
        pytest.param(["vkd-paper"], marks=pytest.mark.slow),
        pytest.param(
            [
                "vkd",
                "--projector",
                "least_squares",
                *EVERY_LOOK,
                "--diagnostics_every_steps",
                5,
                "--feature_decay_end",
                1,
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda method: " ".join(map(str, method[:3])),
)
def test_two_processes_equal_one(method, student_flags, tmp_path):
    flags = [*student_flags, "--method", *method, "--max_train_steps", 20, "--projector_refresh_steps", 5]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for processes, batch_size in ((1, 8), (2, 4)):
        launch = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--num_processes", "1", "--cpu"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, RECIPES / f"{RECIPE}.py", *flags]
        command += ["--train_batch_size", batch_size, "--output_dir", tmp_path / str(processes)]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    assert len(one) == len(two) > 20  # with looks
    assert sum("loss/total" in line for line in one) == 20
    assert two[0]["gradient_norm"] == pytest.approx(one[0]["gradient_norm"], rel=1e-6)
    for first, second in zip(one, two, strict=True):
        for name in first:
            if name.startswith(("loss/", "diagnostics/")):
                tolerance = 1e-5 if name.startswith("loss/") else 1e-3
                assert second[name] == pytest.approx(first[name], rel=tolerance, abs=tolerance), (first["step"], name)


def test_dry_run_prints_and_touches_nothing(student_flags, tmp_path, run_recipe, capsys):
    run_recipe(RECIPE, *student_flags, "--dry_run", "--dataset", "not/loaded", "--output_dir", tmp_path / "run")
    output = " ".join(capsys.readouterr().out.split())
    for words in ("parameters", "MACs", "mid_block 8x4x4 mid_block 16x4x4 8 -> 16", '"method": "vkd"'):
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
    assert "cannot train it: a UNet2DConditionModel needs another recipe" in output


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


STUDENTS = {
    "by name": lambda tmp: ["--student", "bk-tiny"],
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
    expected = {"by name": [8], "by name, changed": [4, 8], "by flags": [16], "by file": [4, 8], "by folder": [4, 8]}
    assert student["block_out_channels"] == expected[way]
    assert (student["mid_block_type"] is None) == (way not in ("by file", "by folder"))
    exported, start = load_file(tmp_path / "run" / WEIGHTS), tiny_unet((4, 8), seed=1).state_dict()
    same = exported.keys() == start.keys() and all(
        torch.allclose(value, start[name], atol=1e-9) for name, value in exported.items()
    )
    assert same == (way == "by folder")


def test_custom_teacher_and_a_folder_of_pngs(pipeline_folder, tmp_path, run_recipe):
    images = tmp_path / "images" / "nested"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(generator.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(images / f"{number}.png")
    flags = ["--preset", "custom", *SHORT_STUDENT, "--dataset", tmp_path / "images", "--dataloader_num_workers", 1]
    for name, teacher in (("root", pipeline_folder / "unet"), ("pipeline", pipeline_folder)):
        run_recipe(RECIPE, *flags, "--teacher", teacher, "--output_dir", tmp_path / name)
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert not any(name.startswith("fid") for name in results["rows"]["student"])
    assert_same_weights(tmp_path / "root", tmp_path / "pipeline")


@pytest.mark.skipif(CIFAR10 is None, reason="VKD_GEN_CIFAR10 does not name a folder with CIFAR-10")
def test_cifar10_from_teacher_to_samples(tmp_path, run_recipe):
    flags = ["--max_train_steps", 2, "--train_batch_size", 4, "--log_every_steps", 1, "--dataloader_num_workers", 0]
    network = ["--block_out_channels", 8, 16, "--norm_num_groups", 4, "--layers_per_block", 1, "--attention_stages"]
    run_recipe("train_teacher_unet", "--preset", "cifar10", *flags, *network, "--output_dir", tmp_path / "teacher")
    student = ["--teacher", tmp_path / "teacher/pipeline", "--calibration_samples", 192]
    run_recipe(RECIPE, "--preset", "cifar10", *flags, *student, "--output_dir", tmp_path / "student")
    assert Image.open(tmp_path / "student/samples.png").mode == "RGB"
    assert len(json.loads((tmp_path / "student/results.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision", "bf16"],
        ["--gradient_checkpointing", "--layers", "mid_and_up"],
        ["--student_prediction_type", "v_prediction", "--timestep_weighting", "min_snr"],
        ["--projector", "cayley", "--projector_start", "procrustes", "--feature_decay_start", 0.0],
        ["--projector", "random", "--feature_normalization", "standardize"],
        pytest.param(
            ["--projector", "pca", "--feature_normalization", "layer_norm", "--feature_loss", "smooth_l1"],
            marks=pytest.mark.slow,
        ),
        ["--feature_normalization", "whiten", "--whitening_exponent", 0.5],
        pytest.param(["--feature_normalization", "whiten", "--whitening_rank", 3], marks=pytest.mark.slow),
        pytest.param(["--student_width", 2, "--feature_normalization", "center"], marks=pytest.mark.slow),
        ["--student_width", 1, "--projector", "identity", "--layer_pairs", "mid_block", "up_blocks.1.resnets.0"],
        ["--denoising_weight", 0, "--output_weight", 0, "--feature_weighting", "constant"],
        ["--feature_weight", 0],
        pytest.param(
            [*EVERY_LOOK, "--projector", "least_squares", "--mixed_precision", "bf16", "--gradient_checkpointing"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*EVERY_LOOK, "--feature_loss", "cka", "--timestep_weighting", "min_snr", "--feature_decay_start", 0],
            marks=pytest.mark.slow,
        ),
        pytest.param([*EVERY_LOOK, "--method", "vkd-paper", "--denoising_weight", 0], marks=pytest.mark.slow),
        pytest.param([*EVERY_LOOK, "--student_width", 2, "--projector", "least_squares"], marks=pytest.mark.slow),
        pytest.param([*EVERY_LOOK, "--method", "output"], marks=pytest.mark.slow),
        ["--ema_max_decay", 0, "--max_grad_norm", 0, "--lr_scheduler", "constant"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_options_combine(flags, student_flags, tmp_path, run_recipe):
    run_recipe(RECIPE, *student_flags, *flags, "--output_dir", tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 2
    assert all(np.isfinite(value) for value in last.values())


def test_tracker_and_upload(student_flags, tmp_path, run_recipe, monkeypatch, capsys):
    from huggingface_hub import RepoUrl

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
