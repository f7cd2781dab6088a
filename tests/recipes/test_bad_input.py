"""Users' mistakes: one line on standard error, exit status 2, no traceback, and nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.conftest import tiny_condition_unet, tiny_unet
from tests.recipes.conftest import RECIPES, SHORT, SHORT_STUDENT
from vkd_gen.calibration import load_statistics
from vkd_gen.sampling import stock_pipeline

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"
FEATURES_ALONE = ["--denoising_weight", 0, "--output_weight", 0, "--feature_weighting", "constant"]


def save_unet(folder, unet):
    unet.save_pretrained(folder)
    return folder


def images_in(folder, count=6, side=8):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def pickled_teacher(tmp):
    unet = tiny_unet()
    unet.save_pretrained(tmp / "pickled", safe_serialization=False)
    return tmp / "pickled"


def damaged_teacher(tmp):
    folder = save_unet(tmp / "damaged", tiny_unet())
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return folder


def teacher_without_signal(tmp):
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    stock_pipeline(tiny_unet(), scheduler).save_pretrained(tmp / "zero-snr")
    return tmp / "zero-snr"


def flow_teacher(tmp):
    save_unet(tmp / "flow", tiny_unet())
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp / "flow")
    return tmp / "flow"


def config_file(tmp, **changes):
    config = {**json.loads(tiny_unet().to_json_string()), **changes}
    (tmp / "config.json").write_text(json.dumps(config))
    return tmp / "config.json"


def teacher_of_absurd_size(tmp, **changes):
    """Its weights are a few kilobytes; what its config.json asks for is not."""
    folder = save_unet(tmp / "absurd", tiny_unet())
    config_file(folder, **changes)
    return folder


def other_json(tmp):
    (tmp / "other.json").write_text("[1, 2]")
    return tmp / "other.json"


def plain_teacher(tmp):
    return save_unet(tmp / "plain", tiny_unet())


def corrupt_images(tmp):
    folder = images_in(tmp / "corrupt")
    (folder / "broken.png").write_text("not an image")
    return folder


def truncated_images(tmp):
    folder = images_in(tmp / "truncated", side=64)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:300])
    return folder


def table(tmp, **columns):
    import pyarrow
    import pyarrow.parquet

    path = tmp / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def labelled(tmp, labels, name="label"):
    """A table of grey images with labels."""
    folder = images_in(tmp / "images", count=len(labels))
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.iterdir())]
    datasets = pytest.importorskip("datasets")
    kind = "string" if isinstance(labels[0], str) else "int64"
    features = datasets.Features({"image": datasets.Image(), name: datasets.Value(kind)})
    datasets.Dataset.from_dict({"image": cells, name: labels}, features=features).to_parquet(tmp / "table.parquet")
    return tmp / "table.parquet"


def classes(tmp, num_classes):
    """A teacher of classes."""
    return save_unet(tmp / "by-class", tiny_unet(num_class_embeds=num_classes + 1))


def changed(tmp, file="unet/config.json", **entries):
    """A teacher's pipeline of which one file says something else."""
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp / "changed")
    path = tmp / "changed" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return tmp / "changed"


def changed_schedule(tmp, **entries):
    return changed(tmp, "scheduler/scheduler_config.json", **entries)


def unreadable(tmp, file, text):
    """A teacher's pipeline of which one file is replaced."""
    folder = changed(tmp)
    (folder / file).write_text(text)
    return folder


def images_and(tmp, name, content):
    """Images, and a file beside them that is none."""
    folder = images_in(tmp / "and", count=12)
    (folder / name).write_bytes(content)
    return folder


def file_at(tmp):
    (tmp / "file").write_text("")
    return tmp / "file"


# What is wrong, the flags that a function of the test's folder gives, and words that the message must have.
STUDENT_MISTAKES = {
    "unknown preset": (lambda tmp: ["--preset", "digit"], "no preset 'digit'.*digits"),
    "unknown flag": (lambda tmp: ["--max_train_step", 3], "max.train.step"),
    "unknown method": (lambda tmp: ["--method", "kd"], "--method.*vkd"),
    "not a number": (lambda tmp: ["--max_train_steps", "many"], "max_train_steps.*many"),
    "flag without value": (lambda tmp: ["--seed"], "seed"),
    "negative steps": (lambda tmp: ["--max_train_steps", -5], "--max_train_steps must be at least 1, not -5"),
    "negative seed": (lambda tmp: ["--seed", -1], "--seed must be at least 0"),
    "empty batch": (lambda tmp: ["--train_batch_size", 0], "--train_batch_size must be at least 1"),
    "learning rate nan": (lambda tmp: ["--learning_rate", "nan"], "--learning_rate must be above 0"),
    "EMA decay one": (lambda tmp: ["--ema_max_decay", 1], "--ema_max_decay"),
    "unknown precision": (lambda tmp: ["--mixed_precision", "fp8"], "mixed_precision"),
    "unknown tracker": (lambda tmp: ["--report_to", "paper"], "--report_to paper"),
    "decay end above one": (lambda tmp: ["--feature_decay_end", 1.5], "--feature_decay_end must lie between 0 and 1"),
    "decay that ends before it starts": (
        lambda tmp: ["--feature_decay_start", 0.5, "--feature_decay_end", 0.4],
        "falls from --feature_decay_start 0.5 to --feature_decay_end 0.4: the end must lie behind the start",
    ),
    "features alone that end early": (
        lambda tmp: [*FEATURES_ALONE, "--feature_decay_end", 0.5],
        "nothing is left to train on behind --feature_decay_end 0.5",
    ),
    "stream that is kept": (
        lambda tmp: ["--streaming", "--image_cache", tmp],
        "--image_cache keeps all images on the disk, which --streaming is to spare",
    ),
    "decay start above one": (lambda tmp: ["--feature_decay_start", 1.5], "--feature_decay_start"),
    "unknown feature weighting": (
        lambda tmp: ["--feature_weighting", "gradient"],
        "'gradient' for argument '--feature_weighting'.*gradient_ratio",
    ),
    "unknown feature loss": (lambda tmp: ["--feature_loss", "cosine"], "'cosine' for argument '--feature_loss'.*cka"),
    "unknown projector": (lambda tmp: ["--projector", "lstsq"], "'lstsq' for argument '--projector'.*least_squares"),
    "ratio without diagnostics": (
        lambda tmp: ["--feature_weighting", "gradient_ratio", "--diagnostics_every_steps", 0],
        "gradient_ratio follows the diagnostics; set --diagnostics_every_steps above 0",
    ),
    "ratio to nothing": (
        lambda tmp: ["--feature_weighting", "gradient_ratio", "--denoising_weight", 0, "--output_weight", 0],
        "gradient_ratio needs another term to be in proportion to",
    ),
    "negative ratio": (
        lambda tmp: ["--feature_weighting", "gradient_ratio", "--feature_weight", -1],
        "feature weight must be at least 0",
    ),
    "diagnostics negative": (
        lambda tmp: ["--diagnostics_every_steps", -1],
        "--diagnostics_every_steps must be at least 0, not -1",
    ),
    "no training samples": (lambda tmp: ["--max_train_samples", 0], "--max_train_samples must be at least 1, not 0"),
    "training samples in words": (lambda tmp: ["--max_train_samples", "few"], "max_train_samples.*few"),
    "least squares without features": (
        lambda tmp: ["--method", "output", "--projector", "least_squares"],
        "weight is 0: there is no feature loss",
    ),
    "refresh zero of least squares": (
        lambda tmp: ["--projector", "least_squares", "--projector_refresh_steps", 0],
        "--projector_refresh_steps must be at least 1",
    ),
    "relations of one position": (
        lambda tmp: ["--feature_loss", "cka", "--layer_pairs", "mid_block", "up_blocks.0/8:up_blocks.0/8"],
        "layer up_blocks.0/8 has a single position, and --feature_loss cka compares",
    ),
    "relations of no positions": (
        lambda tmp: ["--feature_loss", "cka", "--layer_pairs", "time_embedding"],
        "layer time_embedding has a single position",
    ),
    "negative weight": (lambda tmp: ["--output_weight", -1], "output weight must be at least 0"),
    "no weight at all": (lambda tmp: ["--method", "none", "--denoising_weight", 0], "all weights are 0"),
    "weight without method": (lambda tmp: ["--method", "output", "--feature_weight", 1], "no feature loss"),
    "custom without teacher": (lambda tmp: ["--preset", "custom", "--teacher", ""], "needs --teacher and --dataset"),
    "missing teacher": (lambda tmp: ["--teacher", tmp / "nowhere"], "no teacher folder"),
    "teacher on no hub": (lambda tmp: ["--teacher", "nobody/nothing"], "nobody/nothing.*hub"),
    "teacher is a file": (lambda tmp: ["--teacher", file_at(tmp)], "is a file"),
    "folder without teacher": (lambda tmp: ["--teacher", images_in(tmp / "x")], "holds no UNet"),
    "pickled teacher": (lambda tmp: ["--teacher", pickled_teacher(tmp)], "pickled weights only.*safetensors"),
    "damaged teacher": (lambda tmp: ["--teacher", damaged_teacher(tmp)], "cannot load the UNet"),
    "teacher of other classes": (lambda tmp: ["--teacher", classes(tmp, 8)], "digits has 10 classes, .* knows 8"),
    "teacher without classes": (lambda tmp: ["--teacher", classes(tmp, 0)], "num_class_embeds 1; .*2 is least"),
    "classes of another kind": (
        lambda tmp: ["--teacher", save_unet(tmp / "x", tiny_unet(class_embed_type="timestep"))],
        "class_embed_type 'timestep'",
    ),
    "images without classes": (
        lambda tmp: ["--teacher", classes(tmp, 2), "--dataset", images_in(tmp / "images")],
        "png has no class: put each class' images into a folder",
    ),
    "label column missing": (
        lambda tmp: ["--teacher", classes(tmp, 2), "--dataset", labelled(tmp, [0, 1]), "--label_column", "sort"],
        "no column 'sort'.*--label_column .*image, label",
    ),
    "labels out of range": (
        lambda tmp: ["--teacher", classes(tmp, 2), "--dataset", labelled(tmp, [0, 2, 1])],
        "image 1 of .* has the label 2; labels are 0 to 1",
    ),
    "labels that are no whole numbers": (
        lambda tmp: ["--teacher", classes(tmp, 2), "--dataset", labelled(tmp, ["a", "b"])],
        "column 'label' of .* must be whole numbers, but it holds string",
    ),
    "guidance dropout": (lambda tmp: ["--guidance_dropout", 1], "--guidance_dropout must be at least 0 and below 1"),
    "text-conditional teacher": (
        lambda tmp: ["--teacher", save_unet(tmp / "x", tiny_condition_unet())],
        "UNet2DConditionModel|cannot load",
    ),
    "teacher of latents": (
        lambda tmp: ["--teacher", save_unet(tmp / "x", tiny_unet(in_channels=4))],
        "1 or 3 chan|grey images",
    ),
    "zero terminal SNR": (
        lambda tmp: ["--teacher", teacher_without_signal(tmp), "--student_prediction_type", "sample"],
        "zero terminal SNR",
    ),
    "size not divisible without features": (lambda tmp: ["--resolution", 9, "--method", "output"], "sample of size 9"),
    "flags without effect": (
        lambda tmp: ["--method", "none", "--projector", "linear"],
        "weight is 0: there is no feature loss",
    ),
    "fp16 on a CPU": (lambda tmp: ["--mixed_precision", "fp16"], "fp16 needs a GPU"),
    "one sample to score": (lambda tmp: ["--num_score_samples", 1], "--num_score_samples must be at least 10"),
    "teacher of another family": (lambda tmp: ["--teacher", flow_teacher(tmp)], "FlowMatch.*not a schedule of betas"),
    "oblong teacher": (
        lambda tmp: ["--teacher", save_unet(tmp / "x", tiny_unet(size=[8, 16]))],
        "8 x 16 pixels.*square",
    ),
    "truncated image in a worker": (
        lambda tmp: [
            "--dataset",
            truncated_images(tmp),
            "--dataloader_num_workers",
            1,
            "--method",
            "none",
            "--extractor",
            "none",
        ],
        "error: cannot read the image.*png",
    ),
    "size not divisible": (lambda tmp: ["--resolution", 9], "cannot take a sample of size 9|resolution"),
    "width zero": (lambda tmp: ["--student_width", 0], "width must be above 0"),
    "no layers": (lambda tmp: ["--student_layers_per_block", 0], "layers_per_block must be at least 1"),
    "unknown layer": (lambda tmp: ["--layer_pairs", "mid_blok"], "no layer 'mid_blok'.*'mid_block'"),
    "unlike kinds": (lambda tmp: ["--layer_pairs", "mid_block:time_embedding"], r"mid_block \(.*time_embedding \("),
    "pooled by nothing": (
        lambda tmp: ["--layer_pairs", "mid_block/x:mid_block"],
        "mid_block/x.*cannot be pooled by 'x'",
    ),
    "pooled too far": (lambda tmp: ["--layer_pairs", "mid_block/3:mid_block"], "averaged over squares of 3 x 3"),
    "no self-attention": (
        lambda tmp: ["--layers", "self_attention", "--teacher", plain_teacher(tmp)],
        "no layer of the",
    ),
    "unknown student": (lambda tmp: ["--student", "bk-bse"], "bk-bse is neither one of bk-base, .* nor a file"),
    "student on no hub": (lambda tmp: ["--student", "nobody/nothing"], "no student folder nobody/nothing.*hub"),
    "missing student": (lambda tmp: ["--student", tmp / "nowhere"], "no student folder"),
    "student is no JSON": (lambda tmp: ["--student", file_at(tmp)], "no config.json of a UNet"),
    "student is no UNet": (lambda tmp: ["--student", other_json(tmp)], "no config.json of a UNet: .*not a JSON object"),
    "folder without student": (lambda tmp: ["--student", images_in(tmp / "x")], "holds no UNet"),
    "pickled student": (lambda tmp: ["--student", pickled_teacher(tmp)], "pickled weights only.*safetensors"),
    "student of another class": (
        lambda tmp: ["--student", config_file(tmp, _class_name="Transformer2DModel")],
        "Transformer2DModel; known are UNet2DModel",
    ),
    "student of colours": (
        lambda tmp: ["--student", config_file(tmp, in_channels=3, out_channels=3)],
        "has in_channels 3 and the teacher 1",
    ),
    "text-conditional student": (
        lambda tmp: ["--student", save_unet(tmp / "x", tiny_condition_unet(in_channels=1, out_channels=1))],
        "has cross_attention_dim 8 and the teacher None",
    ),
    "student with flags": (
        lambda tmp: ["--student", config_file(tmp), "--student_drop_stages", 0],
        "is complete; leave out --student_drop_stages",
    ),
    "student of another method": (lambda tmp: ["--student", "koala-1b"], "UNet2DModel has no transformer layers"),
    "layers for each stage": (
        lambda tmp: ["--student_layers_per_block", 1, 1],
        "UNet2DModel takes one layers_per_block",
    ),
    "no such stage": (lambda tmp: ["--student_drop_stages", 7], "there is no stage 7"),
    "no stage left": (lambda tmp: ["--student_drop_stages", 0, -1], "at least one stage"),
    "no attention to drop": (lambda tmp: ["--student_drop_attention", 0], "has no attention to drop"),
    "student too wide": (lambda tmp: ["--student_width", 1e8], "no UNet that could be built: block_out_channels"),
    "student larger than memory": (lambda tmp: ["--student_width", 4000], "would take .* GB; this machine has"),
    "student too deep": (lambda tmp: ["--student_layers_per_block", 10**9], "could be built: layers_per_block is"),
    "absurd student": (
        lambda tmp: ["--student", config_file(tmp, block_out_channels=[10**9, 10**9])],
        r"could be built: block_out_channels is \[1000000000",
    ),
    "absurd teacher": (
        lambda tmp: ["--teacher", teacher_of_absurd_size(tmp, block_out_channels=[10**9, 10**9])],
        r"could be built: block_out_channels is \[1000000000",
    ),
    "absurdly deep teacher": (
        lambda tmp: ["--teacher", teacher_of_absurd_size(tmp, layers_per_block=10**9)],
        "could be built: layers_per_block is",
    ),
    "absurd number of classes": (
        lambda tmp: ["--teacher", teacher_of_absurd_size(tmp, num_class_embeds=10**12)],
        "could be built: num_class_embeds is",
    ),
    "teacher larger than its weights": (
        lambda tmp: ["--teacher", teacher_of_absurd_size(tmp, block_out_channels=[1024, 1024])],
        r"101 have another shape \(conv_in.weight is \[8, 1, 3, 3\], not \[1024, 1, 3, 3\]\)",
    ),
    "nonsense for channels": (
        lambda tmp: ["--teacher", teacher_of_absurd_size(tmp, block_out_channels="many")],
        "no UNet that diffusers can build",
    ),
    "text-conditional teacher of names": (
        lambda tmp: ["--teacher", "stable-diffusion-1"],
        "UNet2DConditionModel.*--dry_run shows",
    ),
    "paired twice": (lambda tmp: ["--layer_pairs", "mid_block", "mid_block"], "paired twice"),
    "unlike widths without projector": (lambda tmp: ["--projector", "identity"], "equal widths"),
    "whitening rank too high": (
        lambda tmp: ["--feature_normalization", "whiten", "--whitening_rank", 1000],
        "whitening rank must lie between 1",
    ),
    "whitening rank zero": (
        lambda tmp: ["--feature_normalization", "whiten", "--whitening_rank", 0],
        "whitening rank must lie between 1",
    ),
    "whitening exponent": (
        lambda tmp: ["--feature_normalization", "whiten", "--whitening_exponent", 2],
        "exponent must lie between 0 and 1",
    ),
    "too few to calibrate": (lambda tmp: ["--calibration_samples", 1], "too few samples to calibrate"),
    "missing images": (lambda tmp: ["--dataset", tmp / "nowhere"], "no folder or file"),
    "data set on no hub": (lambda tmp: ["--dataset", "nobody/nothing"], "nobody/nothing"),
    "empty folder": (lambda tmp: ["--dataset", images_in(tmp / "x", count=0)], "holds no images"),
    "one image": (lambda tmp: ["--dataset", images_in(tmp / "x", count=1)], "at least 2 are needed"),
    "no image": (lambda tmp: ["--dataset", corrupt_images(tmp)], "broken.png.*repair or remove"),
    "truncated image": (
        lambda tmp: ["--dataset", truncated_images(tmp), "--extractor", "none"],
        "cannot read the image.*png",
    ),
    "neither folder nor table": (lambda tmp: ["--dataset", file_at(tmp)], "neither a folder nor"),
    "no parquet": (lambda tmp: ["--dataset", shutil.copy(file_at(tmp), tmp / "x.parquet")], "cannot read.*parquet"),
    "table without images": (lambda tmp: ["--dataset", table(tmp, label=[1, 2])], "0 columns of images.*label"),
    "column missing": (
        lambda tmp: ["--dataset", table(tmp, label=[1, 2]), "--image_column", "picture"],
        "no column 'picture'.*label",
    ),
    "output is a file": (lambda tmp: ["--output_dir", file_at(tmp)], "is a file"),
    "output under a file": (lambda tmp: ["--output_dir", file_at(tmp) / "x"], "is a file"),
    "no feature network": (lambda tmp: ["--extractor", tmp / "nowhere.safetensors"], "feature network"),
    "unknown extractor": (lambda tmp: ["--extractor", "incepption"], "choose one of inception"),
    "scores without extractor": (lambda tmp: ["--extractor", "none", "--score_every_steps", 1], "needs an --extractor"),
    "larger KID subsets than samples": (lambda tmp: ["--kid_subset_size", 13], "a smaller --kid_subset_size"),
    "no extractor weights": (
        lambda tmp: ["--extractor", "inception", "--extractor_weights", tmp / "nowhere.pth"],
        "there are no extractor weights",
    ),
    "output that is empty": (lambda tmp: ["--output_dir", ""], "--output_dir must name a folder"),
    "output where nothing can be made": (lambda tmp: ["--output_dir", "/proc/run"], "/proc/run"),
    "output of too long a name": (lambda tmp: ["--output_dir", tmp / ("x" * 300)], "File name too long"),
    "teacher of too long a name": (lambda tmp: ["--teacher", "/" + "x" * 300], "File name too long"),
    "teacher with a line break": (lambda tmp: ["--teacher", "./a\nb"], r"no teacher folder \./a b"),
    "data set with a line break": (lambda tmp: ["--dataset", "./a\nb"], r"no folder or file \./a b"),
    "seed too large": (lambda tmp: ["--seed", 2**32], r"--seed must be below 2\^32"),
    "seed no whole number": (lambda tmp: ["--seed", "1.5"], "--seed.*1.5"),
    "batch too large": (lambda tmp: ["--train_batch_size", 10**12], "not enough memory"),
    "decay infinite": (lambda tmp: ["--adam_weight_decay", "inf"], "--adam_weight_decay must be at least 0 and finite"),
    "decay nan": (lambda tmp: ["--adam_weight_decay", "nan"], "--adam_weight_decay must be at least 0"),
    "norm infinite": (lambda tmp: ["--max_grad_norm", "inf"], "--max_grad_norm must be at least 0 and finite"),
    "width nan": (lambda tmp: ["--student_width", "nan"], "width must be above 0 and finite"),
    "weight nan": (lambda tmp: ["--feature_weight", "nan"], "feature weight must be at least 0 and finite"),
    "gamma": (lambda tmp: ["--timestep_weighting", "min_snr", "--snr_gamma", 0], "snr_gamma must be above 0"),
    "shrinkage": (
        lambda tmp: ["--feature_normalization", "whiten", "--whitening_shrinkage", "nan"],
        "shrinkage must lie between 0 and 1",
    ),
    "more bins than samples": (
        lambda tmp: ["--num_timestep_bins", 10**9],
        "too few samples to calibrate on: --num_timestep_bins 1000000000 need",
    ),
    "bins zero": (lambda tmp: ["--num_timestep_bins", 0], "--num_timestep_bins must be at least 1"),
    "refresh zero": (lambda tmp: ["--projector_refresh_steps", 0], "--projector_refresh_steps must be at least 1"),
    "pair of nothing": (lambda tmp: ["--layer_pairs", ":"], "has no layer ''"),
    "resolution absurd": (lambda tmp: ["--resolution", 10**9], "could be built: sample_size is 1000000000"),
    "a word too many": (lambda tmp: ["digits"], "error: Unrecognized options: digits"),
    "unknown choice for bad images": (lambda tmp: ["--on_bad_image", "ignore"], "invalid choice 'ignore'.*skip"),
    "empty preset": (lambda tmp: ["--preset="], "no preset ''"),
    "teacher's config empty": (
        lambda tmp: ["--teacher", unreadable(tmp, "unet/config.json", "")],
        "no config.json of a UNet",
    ),
    "teacher's config of brackets": (
        lambda tmp: ["--teacher", unreadable(tmp, "unet/config.json", "[" * 100_000)],
        r"no config.json of a UNet: .*it is no JSON \(maximum recursion depth",
    ),
    "teacher's config a list": (
        lambda tmp: ["--teacher", unreadable(tmp, "unet/config.json", "[]")],
        "no config.json of a UNet: .* not a JSON object",
    ),
    "teacher of no stages": (
        lambda tmp: ["--teacher", changed(tmp, block_out_channels=[])],
        "that diffusers can build",
    ),
    "teacher of no channels": (
        lambda tmp: ["--teacher", changed(tmp, block_out_channels=[0, 0])],
        "cannot load the UNet",
    ),
    "teacher of nested channels": (
        lambda tmp: ["--teacher", changed(tmp, block_out_channels=[[8], [16]])],
        "that diffusers can build",
    ),
    "teacher of a size in words": (
        lambda tmp: ["--teacher", changed(tmp, sample_size="8")],
        "sample_size is 8, no size",
    ),
    "teacher of a broken size": (
        lambda tmp: ["--teacher", changed(tmp, sample_size=8.5)],
        "sample_size is 8.5, no size",
    ),
    "teacher of three sides": (
        lambda tmp: ["--teacher", changed(tmp, sample_size=[8, 8, 8])],
        r"sample_size is \[8, 8, 8\], no size",
    ),
    "teacher without a size": (lambda tmp: ["--teacher", changed(tmp, sample_size=None)], "names no sample_size"),
    "teacher of numbers in words": (
        lambda tmp: ["--teacher", changed(tmp, norm_eps="small")],
        "norm_eps is 'small', no number",
    ),
    "teacher of an unknown activation": (
        lambda tmp: ["--teacher", changed(tmp, act_fn="os.system")],
        "that diffusers can build",
    ),
    "teacher of fewer than no classes": (
        lambda tmp: ["--teacher", changed(tmp, num_class_embeds=-5)],
        "that diffusers can build",
    ),
    "schedule empty": (
        lambda tmp: ["--teacher", unreadable(tmp, "scheduler/scheduler_config.json", "")],
        "scheduler_config.json: it is no JSON",
    ),
    "schedule a list": (
        lambda tmp: ["--teacher", unreadable(tmp, "scheduler/scheduler_config.json", "[]")],
        "not a JSON object",
    ),
    "schedule of no steps": (
        lambda tmp: ["--teacher", changed_schedule(tmp, num_train_timesteps=0)],
        "no schedule of noise: it has 0 betas for 0 steps",
    ),
    "schedule of absurdly many steps": (
        lambda tmp: ["--teacher", changed_schedule(tmp, num_train_timesteps=10**12)],
        "no schedule that could be built: num_train_timesteps is",
    ),
    "schedule of too much noise": (
        lambda tmp: ["--teacher", changed_schedule(tmp, beta_end=2)],
        "each from 0 to 1",
    ),
    "schedule of no number": (
        lambda tmp: ["--teacher", changed_schedule(tmp, beta_start=float("nan"))],
        "each from 0 to 1",
    ),
    "schedule of too few betas": (
        lambda tmp: ["--teacher", changed_schedule(tmp, trained_betas=[0.1, 0.2])],
        "it has 2 betas for 1000 steps",
    ),
    "schedule of another prediction": (
        lambda tmp: ["--teacher", changed_schedule(tmp, prediction_type="flow")],
        "prediction type 'flow' is not one of",
    ),
    "data set of no name": (lambda tmp: ["--dataset", ""], "needs --teacher and --dataset"),
    "image of zero bytes": (
        lambda tmp: ["--dataset", images_and(tmp, "x.png", b"")],
        "cannot read the image .*x.png: the file is empty; repair or remove it",
    ),
    "text called an image": (
        lambda tmp: ["--dataset", images_and(tmp, "two words\n.jpg", b"text")],
        r"two words.*jpg.: its content is of no image format",
    ),
    "nothing but bad images": (
        lambda tmp: ["--dataset", truncated_images(tmp), "--on_bad_image", "skip"],
        "no image left to train on: of 5 none can be read",
    ),
    "archive of images": (lambda tmp: ["--dataset", shutil.copy(file_at(tmp), tmp / "x.zip")], "neither a folder nor"),
    "no arrow": (lambda tmp: ["--dataset", shutil.copy(file_at(tmp), tmp / "x.arrow")], "cannot read .*x.arrow: "),
    "table without rows": (
        lambda tmp: ["--dataset", table(tmp, image=[])],
        "cannot read .*table.parquet: BatchSize|no images",
    ),
    "empty cells": (
        lambda tmp: ["--dataset", table(tmp, image=[None] * 12), "--image_column", "image"],
        "cannot read image .*: the cell is empty",
    ),
    "numbers in place of images": (
        lambda tmp: ["--dataset", table(tmp, image=[1, 2, 3]), "--image_column", "image"],
        "column 'image' of .* does not hold images",
    ),
    "addresses in place of images": (
        lambda tmp: ["--dataset", table(tmp, image=["https://example.org/a.png"] * 12), "--image_column", "image"],
        "it is the address https://example.org/a.png; download it first",
    ),
    "labels beyond all numbers": (
        lambda tmp: ["--teacher", classes(tmp, 2), "--dataset", labelled(tmp, [0, 2**40])],
        "go up to 1099511627776; number them from 0 on",
    ),
    "images kept in a file": (
        lambda tmp: ["--image_cache", file_at(tmp)],
        "decoded images cannot be written to .*file",
    ),
    "extractor a folder": (lambda tmp: ["--extractor", tmp], "choose one of inception"),
    "resume from above": (lambda tmp: ["--resume_from_checkpoint", "../../etc"], "no checkpoint ../../etc"),
    "resume from a file": (lambda tmp: ["--resume_from_checkpoint", file_at(tmp)], "there is no checkpoint"),
    "resume from nowhere": (lambda tmp: ["--resume_from_checkpoint", "checkpoint-9"], "no checkpoint checkpoint-9"),
}

TEACHER_MISTAKES = {
    "groups": (lambda tmp: ["--norm_num_groups", 7], "--norm_num_groups 7 must divide"),
    "resolution": (lambda tmp: ["--resolution", 9], "--resolution 9 cannot be halved"),
    "attention": (lambda tmp: ["--attention_stages", 5], "--attention_stages"),
    "channels": (lambda tmp: ["--channels", 2], "1 or 3 channels"),
    "guidance dropout": (lambda tmp: ["--guidance_dropout", -0.1], "--guidance_dropout must be at least 0"),
    "images without classes": (
        lambda tmp: ["--class_conditional", "--dataset", images_in(tmp / "images")],
        "png has no class: put each class' images into a folder",
    ),
    "table without labels": (
        lambda tmp: ["--class_conditional", "--dataset", labelled(tmp, [0, 1], "sort")],
        "0 columns of classes and none called label; name one by --label_column .*image, sort",
    ),
    "one class": (
        lambda tmp: ["--class_conditional", "--dataset", labelled(tmp, [0, 0])],
        "one class alone; at least 2",
    ),
    "no channels": (lambda tmp: ["--block_out_channels", 0], "--block_out_channels must be at least 1, not 0"),
    "fewer channels than none": (
        lambda tmp: ["--block_out_channels", -8, 8],
        "--block_out_channels must be at least 1",
    ),
    "absurd channels": (lambda tmp: ["--block_out_channels", 8 * 10**9], "could be built: block_out_channels"),
    "larger than memory": (lambda tmp: ["--block_out_channels", 32768, 65536], "would take .* GB; this machine has"),
    "no layers": (lambda tmp: ["--layers_per_block", 0], "--layers_per_block must be at least 1"),
    "too deep": (lambda tmp: ["--layers_per_block", 10**9], "could be built: layers_per_block"),
    "no groups": (lambda tmp: ["--norm_num_groups", 0], "--norm_num_groups must be at least 1"),
    "no resolution": (lambda tmp: ["--resolution", -8], "--resolution must be at least 1"),
    "too many stages": (lambda tmp: ["--block_out_channels", *[8] * 40], "cannot be halved 39 times"),
    "data set of no name": (lambda tmp: ["--dataset", ""], "needs --dataset"),
    "bad image": (lambda tmp: ["--dataset", images_and(tmp, "x.png", b"GIF89a")], "cannot read the image .*x.png"),
    "no stages": (lambda tmp: ["--block_out_channels"], "block_out_channels|block-out-channels"),
}

MISTAKES = [
    *(pytest.param(STUDENT, *mistake, id=name) for name, mistake in STUDENT_MISTAKES.items()),
    *(pytest.param(TEACHER, *mistake, id=f"teacher: {name}") for name, mistake in TEACHER_MISTAKES.items()),
]


@pytest.mark.parametrize(("recipe", "flags", "words"), MISTAKES)
def test_mistake_is_told_in_one_line(recipe, flags, words, tmp_path, pipeline_folder, run_recipe, capfd):
    output = tmp_path / "run"
    given = [str(flag) for flag in flags(tmp_path)]
    common = {STUDENT: [*SHORT_STUDENT, "--teacher", pipeline_folder], TEACHER: SHORT}[recipe]
    defaults = [*map(str, common), "--output_dir", str(output)]
    with pytest.raises(SystemExit) as exit_status:
        run_recipe(recipe, *defaults, *given)
    assert exit_status.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(errors) == 1
    assert re.search(words, errors[0]), errors[0]
    assert not (output / "pipeline").exists()


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path, pipeline_folder, run_recipe, capfd):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    run_recipe(STUDENT, *flags)
    weights = (tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        run_recipe(STUDENT, *flags)
    assert "already holds a run" in capfd.readouterr().err
    other = [*flags[:-1], tmp_path / "other", "--resume_from_checkpoint", tmp_path / "run/checkpoint-2"]
    with pytest.raises(SystemExit):
        run_recipe(STUDENT, *other, "--method", "none")
    assert "--method was 'vkd' and is 'none'" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run_recipe(STUDENT, *flags, "--resume_from_checkpoint", "latest", "--learning_rate", 0.5)
    assert "--learning_rate was 0.002 and is 0.5" in capfd.readouterr().err
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


def fail(*_, **_options):
    raise OSError("gone")


def test_a_run_that_failed_early_does_not_block_its_folder_nor_lend_its_statistics(
    tmp_path, pipeline_folder, run_recipe, monkeypatch, capfd
):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("vkd_gen.training.loop.TrainingRun.backward", fail)
        with pytest.raises(SystemExit):
            run_recipe(STUDENT, *flags, "--num_timestep_bins", 2)
    assert "error: gone" in capfd.readouterr().err
    run_recipe(STUDENT, *flags, "--num_timestep_bins", 3, "--resume_from_checkpoint", "latest")
    assert load_statistics(tmp_path / "run/calibration.safetensors")["mid_block"].mean.shape[0] == 3


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


REAL = [("student", "unknown preset"), ("student", "missing teacher")]
REAL_TOO = [
    *[("student", name) for name in ("no image", "pickled teacher", "absurd teacher", "text called an image")],
    *[("student", name) for name in ("more bins than samples", "seed no whole number", "output with a link out of it")],
    *[("teacher", name) for name in ("larger than memory", "no groups", "bad image")],
]


@pytest.mark.parametrize(
    ("recipe", "name"), [*REAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in REAL_TOO)], ids=str
)
def test_the_real_command_tells_it_in_one_line_too(recipe, name, tmp_path):
    given = {"student": STUDENT_MISTAKES, "teacher": TEACHER_MISTAKES}[recipe][name][0](tmp_path)
    script = {"student": STUDENT, "teacher": TEACHER}[recipe]
    flags = [*SHORT, "--extractor", "none", "--output_dir", str(tmp_path / "run"), *map(str, given)]
    command = [sys.executable, str(RECIPES / f"{script}.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "1"})
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert not (tmp_path / "run" / "pipeline").exists()
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == result.stderr.splitlines()


def test_pickles_in_a_teacher_folder_are_never_opened(tmp_path, run_recipe, capfd):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = save_unet(tmp_path / "teacher", tiny_unet())
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Payload(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(SystemExit):
        run_recipe(STUDENT, *SHORT_STUDENT, "--teacher", folder, "--output_dir", tmp_path / "run")
    assert "pickled" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DModel"
