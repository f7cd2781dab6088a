"""Users' mistakes: one line on standard error, exit status 2, no traceback, and nothing lost."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from diffusers import DDPMScheduler

from tests.conftest import refused, tiny_condition_unet, tiny_unet, write_payload
from tests.recipes.conftest import RECIPES, SHORT, SHORT_STUDENT, images_in, load_recipe, recipe_runner, reseal
from vkd_gen.pipelines import stock_pipeline

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"


def unet_in(folder, unet, **options):
    unet.save_pretrained(folder, **options)
    return folder


def damaged_teacher(tmp):
    weights = unet_in(tmp / "damaged", tiny_unet()) / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return weights.parent


def teacher_without_signal(tmp):
    stock_pipeline(tiny_unet(), DDPMScheduler(rescale_betas_zero_snr=True)).save_pretrained(tmp / "zero-snr")
    return tmp / "zero-snr"


def config(tmp, **changes):
    (tmp / "config.json").write_text(json.dumps({**json.loads(tiny_unet().to_json_string()), **changes}))
    return tmp / "config.json"


def absurd_teacher(tmp):
    """Its weights are a few kilobytes; what its config.json asks for is not."""
    folder = unet_in(tmp / "absurd", tiny_unet())
    config(folder, block_out_channels=[10**9, 10**9])
    return folder


def truncated_images(tmp):
    folder = images_in(tmp / "truncated", side=64)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:300])
    return folder


def labelled(tmp, labels, name="label"):
    """A table of grey images with labels."""
    folder = images_in(tmp / "images", count=len(labels))
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.iterdir())]
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), name: datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": cells, name: labels}, features=features).to_parquet(tmp / "table.parquet")
    return tmp / "table.parquet"


def file_at(tmp, name="file"):
    (tmp / name).write_text("")
    return tmp / name


FILES = {
    "tmp": lambda tmp: tmp,
    "file": file_at,
    "pickled": lambda tmp: unet_in(tmp / "pickled", tiny_unet(), safe_serialization=False),
    "damaged": damaged_teacher,
    "zero_snr": teacher_without_signal,
    "two_classes": lambda tmp: unet_in(tmp / "by-class", tiny_unet(num_class_embeds=3)),
    "text_unet": lambda tmp: unet_in(tmp / "x", tiny_condition_unet()),
    "latent_unet": lambda tmp: unet_in(tmp / "x", tiny_unet(in_channels=4)),
    "absurd": absurd_teacher,
    "config": config,
    "colours": lambda tmp: config(tmp, in_channels=3, out_channels=3),
    "plain": lambda tmp: unet_in(tmp / "plain", tiny_unet()),
    "images": lambda tmp: images_in(tmp / "images"),
    "no_images": lambda tmp: images_in(tmp / "none", count=0),
    "text_among": lambda tmp: images_in(tmp / "among", broken=b"not an image"),
    "gif_among": lambda tmp: images_in(tmp / "among", count=12, broken=b"GIF89a"),
    "truncated": truncated_images,
    "arrow": lambda tmp: file_at(tmp, "x.arrow"),
    "labels": lambda tmp: labelled(tmp, [0, 1]),
    "odd_labels": lambda tmp: labelled(tmp, [0, 2, 1]),
    "huge_labels": lambda tmp: labelled(tmp, [0, 2**40]),
    "one_class": lambda tmp: labelled(tmp, [0, 0]),
    "sorts": lambda tmp: labelled(tmp, [0, 1], "sort"),
    "long": lambda tmp: tmp / ("x" * 300),
}
"""What stands in braces among the flags below: a path, and what makes it in the test's folder."""

RATIO = "--feature_weighting gradient_ratio"
FEATURES_ALONE = "--denoising_weight 0 --output_weight 0 --feature_weighting constant"
WHITEN = "--feature_normalization whiten"

# Flags of the student recipe, and words that the message must have.
OF_FLAGS = [
    ("--preset digit", "no preset 'digit'.*digits"),
    ("--preset=", "no preset ''"),
    ("--preset custom --teacher ''", "needs --teacher and --dataset"),
    ("--dataset ''", "needs --dataset"),
    ("--max_train_step 3", "max.train.step"),
    ("--max_train_steps many", "max_train_steps.*many"),
    ("digits", "error: Unrecognized options: digits"),
    ("--method kd", "no method 'kd'.*vkd"),
    ("--projector lstsq", "'lstsq' for argument '--projector'.*solved"),
    ("--mixed_precision fp8", "mixed_precision"),
    ("--mixed_precision fp16", "fp16 needs a GPU"),
    ("--report_to paper", "--report_to paper"),
    ("--seed", "seed"),
    ("--seed 1.5", "--seed.*1.5"),
    ("--max_train_steps -5", "--max_train_steps must be at least 1, not -5"),
    ("--max_train_samples 0", "--max_train_samples must be at least 1, not 0"),
    ("--train_batch_size 1000000000000", "not enough memory"),
    (
        f"{RATIO} --diagnostics_every_steps 0",
        "gradient_ratio needs .* measurements to follow: set .*--diagnostics_every_steps, above 0",
    ),
    ("--output_weight 0 --feature_decay_end 1", "gradient_ratio needs another term to be in proportion to"),
    (f"{RATIO} --feature_weight -1", "--feature_weight must be at least 0"),
    ("--feature_weight nan", "--feature_weight must be at least 0, not nan"),
    ("--output_weight -1", "--output_weight must be at least 0"),
    ("--method none --denoising_weight 0", "all weights are 0"),
    ("--method none --projector linear", "weight is 0: there is no feature loss"),
    ("--feature_decay_start 0.5 --feature_decay_end 0.4", "--feature_decay_start 0.5 to --feature_decay_end 0.4"),
    (f"{FEATURES_ALONE} --feature_decay_end 0.5", "nothing is left to train on .* --feature_decay_end 0.5"),
    ("--streaming --image_cache {tmp}", "--image_cache keeps all images on the disk"),
    ("--num_timestep_bins 1000000000", "too few samples to calibrate on: --num_timestep_bins 1000000000 need"),
    ("--calibration_samples 1", "too few samples to calibrate"),
    ("--timestep_weighting min_snr --snr_gamma 0", "snr_gamma must be above 0"),
    ("--snr_gamma -1", "--snr_gamma must be above 0"),
    ("--optimizer adamw8bit", "adamw8bit is bitsandbytes' or torchao's, and neither is installed: pip install"),
    ("--optimizer sgd", "'sgd' for argument '--optimizer'.*adamw8bit"),
    ("--ema_device gpu", "'gpu' for argument '--ema_device'.*cpu"),
    ("--guidance_branches one", "'one' for argument '--guidance_branches'.*both"),
    ("--whitening_rank 0", "--whitening_rank must be at least 1"),
    ("--whitening_exponent nan", "--whitening_exponent must be at least 0"),
    (f"{WHITEN} --whitening_rank 1000", "whitening rank must lie between 1"),
    ("--num_score_samples 1", "--num_score_samples must be at least 10"),
    ("--kid_subset_size 13", "a smaller --kid_subset_size"),
    ("--extractor none --score_every_steps 1", "needs an --extractor"),
    ("--extractor none --clip_model x", "--clip_model scores beside an --extractor"),
    ("--guidance_scale 0.5", "--guidance_scale must be at least 1"),
    ("--validation_prompts nowhere.txt", "nowhere.txt is not there"),
    ("--validation_prompts red blue", "are for models of prompts, and the teacher takes none"),
    ("--extractor incepption", "choose one of inception"),
    ("--extractor {tmp}/nowhere.safetensors", "feature network"),
    ("--extractor inception --extractor_weights {tmp}/nowhere.pth", "there are no extractor weights"),
]
OF_MODELS = [
    ("--teacher {tmp}/nowhere", "no teacher folder"),
    ("--teacher nobody/nothing", "nobody/nothing.*hub"),
    ("--teacher {file}", "is no .safetensors file"),
    ("--teacher {images}", "holds no UNet"),
    ("--teacher {pickled}", "pickled weights only.*safetensors"),
    ("--teacher {damaged}", "cannot load the UNet"),
    ("--teacher {absurd}", r"could be built: block_out_channels is \[1000000000"),
    ("--teacher {text_unet}", "UNet2DConditionModel|cannot load"),
    ("--teacher {latent_unet}", "1 or 3 chan|grey images"),
    ("--teacher {two_classes}", "digits has 10 classes, .* knows 2"),
    ("--teacher stable-diffusion-1", "UNet2DConditionModel alone; its pipeline"),
    ("--teacher {zero_snr} --student_prediction_type sample", "zero terminal SNR"),
    ("--teacher /{long}", "File name too long"),
    ("--teacher './a\nb'", r"no teacher folder \./a b"),
    ("--resolution 9", "cannot take a sample of size 9|resolution"),
    ("--resolution 1000000000", "could be built: sample_size is 1000000000"),
    ("--student bk-bse", "bk-bse is neither one of bk-base, .* nor a file"),
    ("--student koala-1b", "UNet2DModel has no transformer layers"),
    ("--student {file}", "no config.json of a UNet"),
    ("--student {colours}", "has in_channels 3 and the teacher 1"),
    ("--student {config} --student_drop_stages 0", "is complete; leave out --student_drop_stages"),
    ("--student_width nan", "width must be above 0 and finite"),
    ("--student_width 1e8", "no UNet that could be built: block_out_channels"),
    ("--student_width 4000", "would take .* GB; this machine has"),
    ("--student_layers_per_block 1000000000", "could be built: layers_per_block is"),
    ("--layer_pairs mid_blok", "no layer 'mid_blok'.*'mid_block'"),
    ("--layer_pairs :", "has no layer ''"),
    ("--layers self_attention --teacher {plain}", "no layer of the"),
    ("--projector identity", "equal widths"),
    ("--guidance_branches both", "--guidance_branches both asks .* the teacher .* takes neither; leave it out"),
    ("--method bk", "equal widths without a projector .*down_blocks.0 has .* channels for .*--student bk-base"),
    ("--feature_loss cka --layer_pairs mid_block up_blocks.0/8:up_blocks.0/8", "up_blocks.0/8 has a single position"),
]
OF_DATA_AND_FOLDERS = [
    ("--dataset {tmp}/nowhere", "no folder or file"),
    ("--dataset nobody/nothing", "nobody/nothing"),
    ("--dataset './a\nb'", r"no folder or file \./a b"),
    ("--dataset {no_images}", "holds no images"),
    ("--dataset {arrow}", "cannot read .*x.arrow: "),
    ("--dataset {text_among}", "broken.png.*repair or remove"),
    ("--dataset {truncated} --on_bad_image skip", "no image left to train on: of 5 none can be read"),
    ("--dataset {truncated} --dataloader_num_workers 1 --method none --extractor none", "cannot read the image.*png"),
    ("--dataset {images} --teacher {two_classes}", "png has no class: put each class' images into a folder"),
    ("--dataset {labels} --teacher {two_classes} --label_column sort", "no column 'sort'.*--label_column .*image"),
    ("--dataset {odd_labels} --teacher {two_classes}", "image 1 of .* has the label 2; labels are 0 to 1"),
    ("--dataset {huge_labels} --teacher {two_classes}", "go up to 1099511627776; number them from 0 on"),
    ("--image_cache {file}", "decoded images cannot be written to .*file"),
    ("--output_dir ''", "--output_dir must name a folder"),
    ("--output_dir {file}", "is a file"),
    ("--output_dir /proc/run", "/proc/run"),
    ("--output_dir {long}", "File name too long"),
    ("--resume_from_checkpoint ../../etc", "no checkpoint ../../etc"),
    ("--resume_from_checkpoint {file}", "there is no checkpoint"),
    ("--resume_from_checkpoint checkpoint-9", "no checkpoint checkpoint-9"),
]
OF_A_TEACHERS_FLAGS = [
    ("--norm_num_groups 7", "--norm_num_groups 7 must divide"),
    ("--resolution 9", "--resolution 9 cannot be halved"),
    (f"--block_out_channels {'8 ' * 40}", "cannot be halved 39 times"),
    ("--attention_stages 5", "--attention_stages"),
    ("--attention_stages 1 --block_out_channels 8 16", "--attention_stages need --block_out_channels of at least 32"),
    ("--channels 2", "--channels must be 1 .grey. or 3"),
    ("--guidance_dropout -0.1", "--guidance_dropout must be at least 0"),
    ("--block_out_channels", "block_out_channels|block-out-channels"),
    ("--block_out_channels 0", "--block_out_channels must .* at least 1"),
    ("--block_out_channels 8000000000", "could be built: block_out_channels"),
    ("--block_out_channels 32768 65536", "would take .* GB; this machine has"),
    ("--layers_per_block 0", "--layers_per_block must be at least 1"),
    ("--resolution -8", "--resolution must be at least 1"),
    ("--dataset ''", "needs --dataset"),
    ("--dataset {gif_among}", "cannot read the image .*broken.png"),
    ("--class_conditional --dataset {images}", "png has no class: put each class' images into a folder"),
    ("--class_conditional --dataset {sorts}", "0 columns of classes and none called label; .*--label_column .*sort"),
    ("--class_conditional --dataset {one_class}", "one class alone; at least 2"),
]


def words_of(flags, tmp):
    """The command line's words; what stands in braces is made."""
    made = {name: make(tmp) for name, make in FILES.items() if f"{{{name}}}" in flags}
    return [word.format(**made) for word in shlex.split(flags)]


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        *((STUDENT, *case) for case in (*OF_FLAGS, *OF_MODELS, *OF_DATA_AND_FOLDERS)),
        *((TEACHER, *case) for case in OF_A_TEACHERS_FLAGS),
    ],
)
def test_mistake_is_told_in_one_line(recipe, flags, words, tmp_path, pipeline_folder, run_recipe, capfd):
    common = {STUDENT: [*SHORT_STUDENT, "--teacher", pipeline_folder], TEACHER: SHORT}[recipe]
    flags = [*common, "--output_dir", tmp_path / "run", *words_of(flags, tmp_path)]
    error = refused(capfd, run_recipe, recipe, *flags)
    assert re.search(words, error), error
    assert not (tmp_path / "run" / "pipeline").exists()


def test_a_size_that_no_feature_is_asked_for(tmp_path, pipeline_folder, monkeypatch, capfd):
    """What a model costs is the first to run it."""
    flags = ["--teacher", pipeline_folder, "--resolution", 9, "--method", "output", "--output_dir", tmp_path / "run"]
    run_recipe = recipe_runner(monkeypatch, tmp_path, whole=True)
    assert "cannot take a sample of size 9" in refused(capfd, run_recipe, STUDENT, *SHORT_STUDENT, *flags)


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [
        ("training", "seed", [-1, 2**32]),
        ("training", "train_batch_size", [0]),
        ("training", "learning_rate", [0.0, float("nan")]),
        ("training", "ema_max_decay", [-0.1, 1.0]),
        ("training", "adam_weight_decay", [-1.0, float("inf"), float("nan")]),
        ("training", "max_grad_norm", [-1.0, float("inf")]),
        ("training", "checkpointing_steps", [0]),
        ("matching", "feature_decay_start", [-0.1, 1.5]),
        ("matching", "feature_decay_end", [1.5]),
        ("matching", "diagnostics_every_steps", [-1]),
        ("matching", "projector_refresh_steps", [0]),
        ("matching", "num_timestep_bins", [0]),
        ("data", "guidance_dropout", [-0.1, 1.0]),
        ("data", "stream_head", [0]),
        ("start", "inherit_samples", [0]),
    ],
)
def test_values_out_of_range_are_refused_as_flags_are_read(part, field, values):
    options = getattr(load_recipe(STUDENT).PRESETS["digits"], part)
    for value in values:
        with pytest.raises(ValueError, match=f"--{field} must"):
            replace(options, **{field: value})


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path, pipeline_folder, executed, run_recipe, capfd):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    run_recipe(STUDENT, *flags)
    weights = (tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert "already holds a run" in refused(capfd, run_recipe, STUDENT, *flags)
    other = [*flags[:-1], tmp_path / "other", "--resume_from_checkpoint", tmp_path / "run/checkpoint-2"]
    assert "--method was 'vkd' and is 'none'" in refused(capfd, run_recipe, STUDENT, *other, "--method", "none")
    assert "--learning_rate was 0.002 and is 0.5" in refused(
        capfd, run_recipe, STUDENT, *flags, "--resume_from_checkpoint", "latest", "--learning_rate", 0.5
    )
    (tmp_path / "run/results.json").unlink()  # else it is finished, and nothing is loaded
    write_payload(tmp_path / "run/checkpoint-2/custom_checkpoint_1.pkl", executed)
    reseal(tmp_path / "run/checkpoint-2")
    assert "custom_checkpoint_1.pkl is not loaded: it holds more than numbers, and could run code" in refused(
        capfd, run_recipe, STUDENT, *flags, "--resume_from_checkpoint", "latest"
    )
    assert (tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_bad_images_are_skipped_by_choice_and_a_resumed_run_skips_the_same(tmp_path, run_recipe, capfd):
    folder, run = images_in(tmp_path / "images", count=24), tmp_path / "run"
    (folder / "notes.png").write_text("not an image")
    flags = [*SHORT, "--dataset", folder, "--on_bad_image", "skip", "--extractor", "none", "--output_dir", run]
    run_recipe(TEACHER, *flags)
    out = capfd.readouterr().out
    assert "1 images that cannot be read are left out, such as: cannot read the image" in out
    config = json.loads((run / "config.json").read_text())
    assert (config["num_skipped_images"], config["num_training_images"]) == (1, 20)
    (line,) = json.loads((run / "skipped_images.json").read_text())
    assert line.endswith("notes.png: its content is of no image format that is known")
    resumed = [*flags, "--resume_from_checkpoint", "latest"]
    run_recipe(TEACHER, *resumed)  # the same images are skipped: the same run
    (folder / "notes.png").unlink()
    shutil.copy(folder / "3.png", folder / "notes.png")
    (folder / "5.png").write_text("")  # as many, but not the same
    with pytest.raises(SystemExit):
        run_recipe(TEACHER, *resumed)
    error = capfd.readouterr().err
    assert f"is of another run: --dataset {folder} does not hold what the run began with" in error
    assert "sha256" not in error


def test_a_missing_folder_is_told_before_a_teacher_is_loaded(tmp_path, run_recipe, capfd):
    flags = ["--teacher", tmp_path / "no-teacher", "--dataset", tmp_path / "no-images", "--output_dir", tmp_path / "r"]
    assert f"there is no folder or file {tmp_path}/no-images" in refused(capfd, run_recipe, STUDENT, *flags)


def fail(*_, **_options):
    raise OSError("gone")


def test_a_run_that_failed_early_does_not_block_its_folder(tmp_path, pipeline_folder, run_recipe, monkeypatch, capfd):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("vkd_gen.training.loop.Loop.backward", fail)
        with pytest.raises(SystemExit):
            run_recipe(STUDENT, *flags, "--num_timestep_bins", 2)
    assert "error: gone" in capfd.readouterr().err
    run_recipe(STUDENT, *flags, "--num_timestep_bins", 3, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


def test_a_student_is_exported_before_anything_can_fail_to_score_it(
    tmp_path, pipeline_folder, run_recipe, monkeypatch, capfd
):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("vkd_gen.evaluation.scorer.sample_scores", fail)
        with pytest.raises(SystemExit):
            run_recipe(STUDENT, *flags)
    assert (tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors").exists()
    run_recipe(STUDENT, *flags, "--resume_from_checkpoint", "latest", "--num_score_samples", 80)
    assert (tmp_path / "run/results.json").exists()
    assert capfd.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (STUDENT, "--preset digit"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (STUDENT, "--teacher {tmp}/nowhere"),
                (STUDENT, "--teacher {pickled}"),
                (STUDENT, "--dataset {text_among}"),
                (TEACHER, "--block_out_channels 32768 65536"),
                (TEACHER, "--dataset {gif_among}"),
            )
        ),
    ],
)
def test_the_real_command_tells_it_in_one_line_too(recipe, flags, tmp_path):
    given = [*SHORT, "--extractor", "none", "--output_dir", str(tmp_path / "run"), *words_of(flags, tmp_path)]
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *given]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "1"})
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "pipeline").exists()
