"""The end of a run is tried at its start; once the weights are saved, nothing beside them can lose the run."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from PIL import Image

from tests.conftest import one_line, tiny_unet
from tests.recipes.conftest import SHORT_STUDENT
from vkd_gen.models import Model
from vkd_gen.pipelines import load_pipeline, stock_pipeline, usable_steps
from vkd_gen.text_pipelines import save_pipeline
from vkd_gen.training.export import try_saving

RECIPE = "train_student_unet"


@pytest.fixture
def flags(pipeline_folder):
    return [*SHORT_STUDENT, "--teacher", pipeline_folder, "--extractor", "none", "--method", "output"]


def error_of(capsys, run):
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# ---- the sampler


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["linear", "sigmoid", "laplace"])
def test_every_sampler_has_the_betas_of_training(kind, zero_snr, sampler, tmp_path):
    if kind == "laplace":
        try:
            DDPMScheduler(beta_schedule=kind)
        except NotImplementedError:
            pytest.skip("this version of diffusers does not know it")
    schedule = DDPMScheduler(beta_schedule=kind, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    stock_pipeline(tiny_unet(), schedule, sampler).save_pretrained(tmp_path)
    scheduler = DDIMPipeline.from_pretrained(tmp_path).scheduler if sampler == "ddim" else None
    scheduler = scheduler or stock_pipeline(tiny_unet(), schedule, sampler).scheduler
    assert torch.equal(scheduler.betas, schedule.betas)
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("num_timesteps", "spacing", "offset", "wanted", "steps"),
    [
        (1000, "leading", 0, 50, 50),
        (1000, "leading", 1, 50, 50),
        (20, "leading", 0, 50, 20),
        (20, "leading", 1, 50, 19),  # 20 would ask for timestep 20
        (20, "leading", 2, 10, 9),  # 10 would ask for timestep 20, too
        (20, "trailing", 1, 50, 20),
        (20, "linspace", 1, 50, 20),
        (1, "leading", 0, 25, 1),
    ],
)
def test_steps_lie_within_the_schedule(num_timesteps, spacing, offset, wanted, steps):
    schedule = DDIMScheduler(num_train_timesteps=num_timesteps, timestep_spacing=spacing, steps_offset=offset)
    assert usable_steps(schedule, wanted) == steps
    schedule.set_timesteps(steps)
    assert 0 <= schedule.timesteps.min() <= schedule.timesteps.max() < num_timesteps
    images = Model.of_unet(tiny_unet(), schedule).images([0], num_inference_steps=wanted)
    assert images.shape == (1, 1, 8, 8)


def test_an_offset_out_of_the_schedule():
    with pytest.raises(ValueError, match="steps_offset 30 leads out of a schedule of 20 timesteps"):
        usable_steps(DDIMScheduler(num_train_timesteps=20, steps_offset=30), 10)


def test_a_short_schedule_is_exported_and_previewed(flags, pipeline_folder, tmp_path, run_recipe, capsys):
    schedule = {"num_train_timesteps": 3, "beta_end": 0.5, "steps_offset": 1}
    DDPMScheduler(**schedule).save_pretrained(pipeline_folder / "scheduler")
    run = tmp_path / "run"
    run_recipe(RECIPE, *flags, "--preview_every_steps", 1, "--output_dir", run)
    exported = DDIMPipeline.from_pretrained(run / "pipeline").scheduler
    assert torch.equal(exported.alphas_cumprod, DDPMScheduler(**schedule).alphas_cumprod)
    assert len(list((run / "previews").iterdir())) == 2
    assert "2 steps" in json.loads((run / "results.json").read_text())["protocol"]["ms_per_image"]
    assert "warning" not in capsys.readouterr().err


def test_a_schedule_that_cannot_be_sampled_is_refused(flags, pipeline_folder, tmp_path, run_recipe, capsys):
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    DDPMScheduler(**schedule).save_pretrained(pipeline_folder / "scheduler")
    line = error_of(capsys, lambda: run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "run"))
    assert "DDIMScheduler gives no finite samples on this schedule, at timestep 999" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


SCHEDULER, UNET, INDEX = "scheduler/scheduler_config.json", "unet/config.json", "model_index.json"
UNFIT = {
    "no number": (SCHEDULER, {"steps_offset": "1"}, "a DDIMScheduler with .* steps_offset '1'"),
    "no such sampler": (
        INDEX, {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "KarrasVeScheduler"]},
        "its part 'scheduler' is .*'KarrasVeScheduler'.*, and must be a scheduler of diffusers"  # without transformers
        "|in its DDPMPipeline, UNet2DModel and KarrasVeScheduler do not fit together",
    ),
    "a sampler of other calls": (
        INDEX, {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"]},
        "in its DDPMPipeline, UNet2DModel and UniPCMultistepScheduler do not fit together",
    ),
    "no sample size": (UNET, {"sample_size": None}, "cannot be sampled: in its DDIMPipeline, UNet2DModel and DDIM"),
    "odd sample size": (UNET, {"sample_size": 7}, "cannot be sampled: in its DDIMPipeline, UNet2DModel and DDIM"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "entries", "words"), UNFIT.values(), ids=UNFIT)
def test_pipelines_whose_parts_do_not_fit(file, entries, words, tmp_path):
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    change(tmp_path / file, **entries)
    with pytest.raises(ValueError, match=words) as error:
        Model(load_pipeline(str(tmp_path))).images([0], num_inference_steps=2, name="x")
    assert "\n" not in str(error.value)


def test_a_pipeline_that_gives_no_class_labels(tmp_path):
    DDIMPipeline(tiny_unet(num_class_embeds=3), DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--sampler ddim gives it some"):
        load_pipeline(str(tmp_path))
    assert Model(load_pipeline(str(tmp_path), "ddim")).images([0, 1], num_inference_steps=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_ddpm_on_a_schedule_whose_teacher_learned_variances(variance):
    images = [
        Model(stock_pipeline(tiny_unet(), DDPMScheduler(variance_type=kind), "ddpm")).images([0], num_inference_steps=3)
        for kind in (variance, "fixed_small")
    ]
    assert torch.equal(*images)


# ---- names


def test_a_name_of_any_bytes_reaches_the_end(flags, tmp_path, run_recipe, capsys):
    data, run = tmp_path / os.fsdecode(b"Bilder_\xfc"), tmp_path / "run"
    data.mkdir(parents=True)
    for number in range(12):
        Image.new("L", (8, 8), number * 20).save(data / f"{number}.png")
    run_recipe(RECIPE, *flags, "--dataset", data, "--output_dir", run, "--report_to", "tensorboard")
    assert "warning" not in capsys.readouterr().err
    assert "denoising error" in (run / "pipeline/README.md").read_text(encoding="utf-8")  # of the table with the scores
    for file in ("report.html", "samples.png", "results.json"):
        assert (run / file).stat().st_size > 0


def test_a_run_that_could_not_be_read_again_is_refused(flags, tmp_path, run_recipe, capsys):
    run = tmp_path / os.fsdecode(b"L\xe4ufe") / "run"
    line = error_of(capsys, lambda: run_recipe(RECIPE, *flags, "--output_dir", run))
    assert "the end of the run was tried before its first step, and fails" in line
    assert r"L\udce4ufe" in line
    assert not list(run.glob("checkpoint-*"))


# ---- the export


def test_the_trial_leaves_nothing(tmp_path):
    unet, before = tiny_unet().train(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    folder = tmp_path / "pipeline"
    model = Model.of_unet(unet, DDPMScheduler())
    try_saving(model, folder, "---\n---\n# card", num_inference_steps=5, name="the student")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert unet.training
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("broken", ["save_pretrained", "save_card", "load_pipeline"])
def test_an_export_that_fails_is_found_before_the_first_step(broken, flags, tmp_path, run_recipe, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no room\nat all")

    owner = "diffusers.DiffusionPipeline" if broken == "save_pretrained" else "vkd_gen.training.export"
    monkeypatch.setattr(f"{owner}.{broken}", fail)
    line = error_of(capsys, lambda: run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "run"))
    assert "the end of the run was tried before its first step, and fails: no room at all" in line
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in left if name.startswith((".vkd-gen", "pipeline", "checkpoint", "metrics"))]


def test_weights_too_large_for_the_variant_are_found_before_the_first_step(tmp_path):
    """As a teacher's VAE may have some, which its student keeps."""
    unet = tiny_unet()
    model = Model.of_unet(unet, DDPMScheduler())
    with torch.no_grad():
        unet.conv_in.bias[0] = 1e5
    how = {"num_inference_steps": 5, "name": "the student"}
    try_saving(model, tmp_path / "pipeline", "---\n---\n# card", **how)
    with one_line("the end of the run was tried .* fails: the unet cannot be saved as fp16: conv_in.bias is too large"):
        try_saving(model, tmp_path / "pipeline", "---\n---\n# card", variant="fp16", **how)
    assert list(tmp_path.iterdir()) == []


def test_the_variant_that_is_asked_for_is_tried(flags, tmp_path, run_recipe, capsys, monkeypatch):
    def no_half(pipeline, folder, variant=None):
        if variant is not None:
            raise ValueError(f"no {variant}")
        save_pipeline(pipeline, folder)

    monkeypatch.setattr("vkd_gen.training.export.save_pipeline", no_half)
    more = ("--export_variant", "fp16", "--output_dir", tmp_path / "run")
    line = error_of(capsys, lambda: run_recipe(RECIPE, *flags, *more))
    assert "the end of the run was tried before its first step, and fails: no fp16" in line


LATE = {
    "vkd_gen.training.export.save_card": (1, "python eval/score.py"),  # after the trial
    "vkd_gen.evaluation.report.write_report": (0, "python eval/report.py"),
    "vkd_gen.evaluation.report.save_sample_grid": (0, "python eval/generate.py"),
    "vkd_gen.training.run.save_sample_grid": (0, "training goes on"),
    "vkd_gen.evaluation.diagnostics_figure.draw_diagnostics": (0, "the numbers are in metrics.jsonl"),
}


def test_what_stands_beside_the_weights_costs_a_line(flags, tmp_path, run_recipe, capsys, monkeypatch):
    def breaking(what, num_right):
        module, name = what.rsplit(".", 1)
        right = getattr(__import__(module, fromlist=[name]), name)
        calls = []

        def fail_later(*given, **named):
            calls.append(given)
            if len(calls) > num_right:
                raise OSError("no space left")
            return right(*given, **named)

        monkeypatch.setattr(what, fail_later)

    for what, (num_right, _) in LATE.items():
        breaking(what, num_right)
    run = tmp_path / "run"
    run_recipe(RECIPE, *flags, "--preview_every_steps", 2, "--output_dir", run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(LATE)
    for _, advice in LATE.values():
        assert any("could not be made (no space left)" in line and advice in line for line in warnings)
    DDIMPipeline.from_pretrained(run / "pipeline")
    assert "student" in json.loads((run / "results.json").read_text())["rows"]


def test_scores_that_fail_leave_the_pipeline_and_are_made_again(flags, tmp_path, run_recipe, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the samples are gone")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("vkd_gen.training.run.evaluate", fail)
        line = error_of(capsys, lambda: run_recipe(RECIPE, *flags, "--output_dir", run))
    assert f"the pipeline is saved in {run / 'pipeline'}, but it could not be scored: the samples are gone" in line
    weights = (run / "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes()
    run_recipe(RECIPE, *flags, "--output_dir", run, "--resume_from_checkpoint", "latest")
    assert (run / "results.json").exists()
    assert (run / "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_scores_on_the_way_cost_a_line(flags, pipeline_folder, tmp_path, run_recipe, capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError("12 of 12 samples of student are not finite")

    monkeypatch.setattr("vkd_gen.evaluation.scorer.Scorer.score_model", fail)
    extractor = Path(__file__).parents[2] / "recipes/assets/digits-features.safetensors"
    given = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--extractor", extractor, "--method", "output"]
    given += ["--score_every_steps", 1, "--output_dir", tmp_path / "run"]
    with contextlib.suppress(SystemExit):  # those of the end fail, too
        run_recipe(RECIPE, *given)
    assert "warning: step 1 has no scores, and training goes on: 12 of 12" in capsys.readouterr().out
    assert (tmp_path / "run/pipeline/model_index.json").exists()


# ---- the hub


@pytest.mark.parametrize(
    ("broken", "error", "given"),
    [
        ("whoami", OSError("Token is required, but no token found"), []),
        ("create_repo", ConnectionError("the hub cannot be reached"), []),
        ("create_repo", ValueError("Repo id must use alphanumeric chars"), ["--hub_model_id", "a b/c d"]),
    ],
    ids=["no token", "no network", "a bad name"],
)
def test_an_upload_is_checked_before_the_run(broken, error, given, flags, tmp_path, run_recipe, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(f"huggingface_hub.HfApi.{broken}", fail)
    given = [*flags, "--push_to_hub", *given, "--output_dir", tmp_path / "run"]
    line = error_of(capsys, lambda: run_recipe(RECIPE, *given))
    assert f"--push_to_hub cannot upload to {'a b/c d' if 'a b/c d' in given else 'run'}: {error}" in line
    assert "hf auth login" in line
    assert not (tmp_path / "run").exists()


def test_the_hub_is_not_asked_by_a_dry_run(tmp_path, run_recipe, capsys):
    run_recipe(RECIPE, "--dry_run", "--push_to_hub", "--output_dir", tmp_path / "run")
    assert "parameters" in capsys.readouterr().out
