"""What training recipes let their users choose. Loads nothing heavy: flags are read before torch is loaded."""

import dataclasses
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

from vkd_gen.choices import ChannelChoice, OnBadImage, OnMissingCaption, Precision, Rescaling, TimestepSampling
from vkd_gen.cli import Rare, check_at_least
from vkd_gen.evaluation.options import choose_extractor
from vkd_gen.training.methods import METHODS, check_effects


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training loop, named as in diffusers' own examples where those have them."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, samples and the exported pipeline."""
    dry_run: bool = False
    """Show what would be trained, then stop; needs no weights."""
    seed: int = 0
    """Seed of initialisation, data order, noise and timesteps."""
    train_batch_size: int = 128
    """Images per process and forward pass."""
    eval_batch_size: Rare[int | None] = None
    """Images per forward pass in calibration, measurements, encoding, previews and scores; by default 64, in the preset
    custom no more than --train_batch_size."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    max_train_steps: int = 1000
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    lr_scheduler: Rare[Literal["constant", "constant_with_warmup", "linear", "cosine"]] = "cosine"
    """Learning rate schedule, as in diffusers."""
    lr_warmup_steps: Rare[int | None] = None
    """Steps over which the learning rate rises from zero; by default a tenth of the run, but no more than 50, or than
    1,000 in the presets cifar10 and custom."""
    adam_weight_decay: Rare[float] = 0.01
    """Weight decay of the network; projectors are never decayed."""
    optimizer: Rare[Literal["adamw", "adamw8bit", "muon"]] = "adamw"
    """torch's AdamW, the one of bitsandbytes (else torchao), whose state takes 8 bits in place of 32, or Muon for inner
    matrices and convolutions with AdamW for the rest. Muon takes AdamW's learning rates, and half of its memory; its
    work does not grow with the batch."""
    timestep_sampling: Rare[TimestepSampling] = "random"
    """How the times of draws are drawn: each by itself, uniformly; spread evenly over draws in a row; or each of one of
    SD3's densities, by diffusers' function."""
    max_grad_norm: Rare[float] = 1.0
    """Norm that gradients are clipped to; 0 for no clipping."""
    max_skipped_steps: Rare[int] = 20
    """Steps in a row that may be skipped because a loss or a gradient is not finite; one more ends the run."""
    ema_max_decay: Rare[float] = 0.9999
    """Highest decay of the exponential moving average of the weights, which is what is exported. It warms up as
    1 - (1 + step)^-0.75. 0 exports the last weights."""
    ema_device: Rare[Literal["same", "cpu"]] = "same"
    """Where the moving average is kept: `same`, on the device of the steps, or in the machine's memory."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of forward passes; by default what `accelerate launch` says."""
    gradient_checkpointing: Rare[bool] = False
    """Save memory by computing activations a second time during backward."""
    dataloader_num_workers: Rare[int] = 0
    """Processes that read images; 0 reads them in the training process."""
    log_every_steps: Rare[int] = 20
    """Steps between lines in metrics.jsonl and the trackers."""
    preview_every_steps: int = 0
    """Steps between sample grids in previews/; 0 for none."""
    validation_prompts: Rare[tuple[str, ...]] = ()
    """Of models of prompts: what previews and the report show, texts or one file (see eval/generate.py's --prompts); by
    default captions of held-out images, which scores are always taken on."""
    score_every_steps: Rare[int] = 0
    """Steps between scores of the moving average; 0 for none before the end."""
    checkpointing_steps: Rare[int] = 500
    """Steps between checkpoints; one is always made at the end."""
    checkpoints_total_limit: Rare[int] = 2
    """Checkpoints to keep; the oldest are removed."""
    checkpoints_keep_every_steps: Rare[int] = 0
    """Keep also the checkpoints at multiples of this many steps; 0 keeps none beside the newest."""
    resume_from_checkpoint: str | None = None
    """`latest` or a checkpoint folder: go on from there, to the result of a run without the interruption."""
    report_to: str | None = None
    """Experiment tracker beside metrics.jsonl, such as `tensorboard` or `wandb`."""
    export_variant: Rare[Literal["fp16"] | None] = None
    """fp16: export the weights in half precision too, which from_pretrained(FOLDER, variant="fp16") loads."""
    push_to_hub: Rare[bool] = False
    """Upload the exported pipeline to the Hugging Face hub. Its repository is made before the run."""
    hub_model_id: Rare[str | None] = None
    """Repository to upload to; by default the name of the output folder."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, MINIMA)
        if not self.output_dir or "\0" in self.output_dir:
            raise ValueError("--output_dir must name a folder")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2^32, not {self.seed}")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"--ema_max_decay must be at least 0 and below 1, not {self.ema_max_decay}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate must be above 0 and finite, not {self.learning_rate}")

    @property
    def batch_size_apart(self) -> int:
        """Images per forward pass outside of training steps."""
        return 64 if self.eval_batch_size is None else self.eval_batch_size


MINIMA = {
    "seed": 0,
    "train_batch_size": 1,
    "eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0,
    "max_grad_norm": 0,
    "max_skipped_steps": 0,
    "dataloader_num_workers": 0,
    "log_every_steps": 1,
    "preview_every_steps": 0,
    "score_every_steps": 0,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "checkpoints_keep_every_steps": 0,
}


PROMPT_FILES = (".txt", ".jsonl", ".csv")
"""Ends of files that hold prompts and no images."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images to train on."""

    dataset: str = ""
    """`digits`, `mnist`, a folder of images, parquet or arrow files, or a hub id; for --num_teacher_images prompts."""
    num_teacher_images: int | None = None
    """Of a teacher with prompts: let it draw so many images before the first step, once, and train on them. --dataset
    is of prompts then, as --prompts of eval/generate.py is; steps and guidance are those of samples."""
    image_column: Rare[str | None] = None
    """Column of the images in a table; by default the only one that holds images."""
    max_train_samples: Rare[int | None] = None
    """Train on so many of the images, evenly spaced; scores still compare to all of them."""
    on_bad_image: Rare[OnBadImage] = "refuse"
    """An image that cannot be read: `refuse` stops, at once or when it is read; `skip` decodes all images once before
    the run, leaves bad ones out and names them in skipped_images.json."""
    random_flip: bool = False
    """Mirror half of the images."""
    image_cache: Rare[str] = ""
    """Folder to keep the training images in, decoded, cropped and resized, so that it is done once and not in each pass
    through them; runs may share it. Empty for none."""
    label_column: Rare[str | None] = None
    """Of a class-conditional model: column of the classes in a table; by default the only one of classes, else
    `label`."""
    guidance_dropout: Rare[float] = 0.1
    """Of a class-conditional model: share of the images whose label is hidden, for classifier-free guidance."""
    caption_column: Rare[str | None] = None
    """Of a model of prompts: column of the captions, strings or lists of strings, in a table or in the metadata.jsonl
    or metadata.csv of a folder of images; by default the only one of text, else the one called caption, text, prompt
    or the like. A folder without such a file has .txt files of the images' names."""
    on_missing_caption: Rare[OnMissingCaption] = "refuse"
    """Of a model of prompts: an image whose caption is missing, empty or no text: `refuse` stops, `skip` leaves it out,
    `empty` takes the empty prompt for it."""
    cache: Rare[bool] = True
    """Of a model of prompts: encode all images and captions once, before the first step, and keep latents and
    embeddings on the disk, for this run and others; then the encoders leave memory. --no-cache encodes what each step
    draws."""
    cache_dir: Rare[str] = ""
    """Folder of these encodings, and of --num_teacher_images; by default vkd_gen/encodings and vkd_gen/drawings in the
    user's cache folder, or in what VKD_GEN_CACHE names. Runs may share it; what images, captions, encoders or crops
    decide otherwise lies in another folder of it."""
    num_crops: Rare[int] = 1
    """Of a model of prompts: crops of each image, one of which is drawn each time. The first is the centre."""
    aspect_buckets: Rare[bool] = False
    """Of a model of prompts: bring each image to the nearest of 11 sizes of about --resolution^2 pixels, from 1 : 2 to
    2 : 1, instead of a square; the images of a forward pass are of one size."""
    encoding_precision: Rare[Precision] = "no"
    """Precision that images and captions are encoded and kept in."""
    vae_tiling: Rare[bool] = False
    """Encode large images tile by tile, in less memory."""
    streaming: Rare[bool] = False
    """Read --dataset, parquet or arrow files or a data set of the hub, from front to back, epoch after epoch, instead
    of copying it to the disk. The run goes on only with as many processes and workers: see docs/SCALING.md."""
    stream_head: Rare[int] = 6000
    """Images that are read before the run and kept in memory, encoded: a sixth of them, or as many of the test split,
    are held out; statistics, scores and what a student starts from are taken from the others."""
    stream_buffer: Rare[int] = 4096
    """Images that each process, or each of its workers, shuffles among, encoded."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not 0 <= self.guidance_dropout < 1:
            raise ValueError(f"--guidance_dropout must be at least 0 and below 1, not {self.guidance_dropout}")
        check_at_least(self, {"max_train_samples": 1, "num_crops": 1, "stream_head": 1, "stream_buffer": 1})
        check_at_least(self, {"num_teacher_images": 2})
        if self.num_teacher_images is None and self.dataset.endswith(PROMPT_FILES) and not os.path.isdir(self.dataset):
            raise ValueError(
                f"--dataset {self.dataset} is a file of prompts, without images: --num_teacher_images 10000 lets the "
                "teacher draw as many of them, and trains on these"
            )
        for name in ("streaming", "image_column") if self.num_teacher_images is not None else ():
            if getattr(self, name):
                raise ValueError(
                    f"--{name} is for images that are there already, and --num_teacher_images for prompts: leave one "
                    "of them out"
                )
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                "--max_train_samples chooses among all images, which a stream's are not: leave it or --streaming out"
            )
        if self.streaming and self.aspect_buckets:
            raise ValueError(
                "--aspect_buckets needs to know the sizes of all images, and a stream's are not: leave one of them out"
            )
        if self.streaming and self.image_cache:
            raise ValueError(
                "--image_cache keeps all images on the disk, which --streaming is to spare: leave one of them out"
            )


def default_cifar10() -> str:
    """CIFAR-10: the folder that the environment variable VKD_GEN_CIFAR10 names, else its id on the hub."""
    return os.path.expanduser(os.environ.get("VKD_GEN_CIFAR10") or "uoft-cs/cifar10")


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """Which student, what it starts from, and how its teacher is read."""

    teacher_variant: str | None = None
    """Of a teacher with prompts: variant of its weights, such as fp16."""
    teacher_lora: tuple[str, ...] = ()
    """Of a teacher with prompts: LoRA to merge into it, safetensors files, folders or hub ids, each as it is or with
    =SCALE behind it."""
    teacher_config: str | None = None
    """Of a teacher in one .safetensors file: folder or hub id of a pipeline of the same configuration."""
    teacher_quantization: Rare[Literal["int8"] | None] = None
    """int8: once the student has started from the teacher's whole weights, keep those of the teacher's linear layers in
    8 bits, by torchao. Losses, and the teacher that previews, scores and the report show, are of these."""
    student: str = ""
    """bk-base, bk-small, bk-tiny, koala-1b, koala-700m, ssd-1b-like, ddpm-20m, a config.json, or folder or hub id of a
    UNet or transformer with weights; empty: the teacher at --student_width, or with --student_blocks."""
    student_width: float | None = None
    """Factor on the teacher's channels, of a transformer on its heads; by default 0.5, or --student's, or for a
    transformer 1."""
    student_layers_per_block: Rare[int | tuple[int, ...] | None] = None
    """Residual layers of each block of the student, one number or one for each stage; by default the teacher's."""
    student_blocks: int | tuple[int, ...] | None = None
    """Of a transformer: how many blocks it keeps, or which, by number from 0; by default half, or with --student_width
    all."""
    student_transformer_layers: Rare[int | tuple[int, ...] | None] = None
    """Transformer blocks of each attention layer, likewise."""
    student_drop_stages: Rare[tuple[int, ...]] = ()
    """Stages that the student does without; 0 has the highest resolution, -1 the lowest."""
    student_drop_mid_block: Rare[bool] = False
    """Leave out the middle block."""
    student_drop_attention: Rare[tuple[int, ...]] = ()
    """Stages of the teacher that lose their attention."""
    student_prediction_type: Rare[Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None] = None
    """What the student predicts; by default what the teacher does. flow_prediction: a student by flow matching."""
    resolution: Rare[int | None] = None
    """Height and width of the images in pixels; by default the teacher's sample size."""
    inherit_weights: Rare[bool] = True
    """Start from the teacher's weights, if the student comes without weights of its own."""
    inherit_channels: Rare[ChannelChoice] = "activation"
    """Which of the teacher's channels a narrower student starts from: those that best restore the others' effect, those
    of the largest weights, the first, or random ones."""
    inherit_rescaling: Rare[Rescaling] = "least_squares"
    """What makes up for missing channels and layers at the start: each of the student's layers fitted to what the
    teacher's computes, weights multiplied for the smaller fan-in, or nothing."""
    inherit_layers: Rare[Literal["best", "rule"]] = "best"
    """Which of the teacher's layers, or transformer blocks, a shallower student starts from: those with which it comes
    closest to the teacher, or as in BK-SDM the first of each block and the decoder's last, blocks evenly spaced."""
    inherit_samples: Rare[int] = 1024
    """Draws of (image, noise, timestep) for these, all held in memory at once with every layer's output: fewer, down to
    4, if they have more than 2^18 pixels together."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, {"inherit_samples": 1, "resolution": 1})


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """A UNet to train from random weights."""

    class_conditional: bool = False
    """Learn images of given classes: the labels come from the data, and their number decides the network's."""
    resolution: int = 8
    """Height and width of the images in pixels."""
    channels: int = 1
    """1 for grey, 3 for RGB."""
    block_out_channels: tuple[int, ...] = (32, 64)
    """Channels of each stage, from the highest resolution to the lowest."""
    attention_stages: tuple[int, ...] = ()
    """Stages, counted from 0, whose blocks have self-attention; the middle block has it if any stage does."""
    layers_per_block: Rare[int] = 2
    """Residual layers of each block."""
    norm_num_groups: Rare[int] = 8
    """Groups of the group norms; divides every stage's channels."""
    prediction_type: Rare[Literal["epsilon", "v_prediction", "sample"]] = "epsilon"
    """What the network predicts."""
    beta_schedule: Rare[Literal["linear", "squaredcos_cap_v2"]] = "linear"
    """Noise schedule, 1,000 steps."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, {"resolution": 1, "norm_num_groups": 1, "layers_per_block": 1})
        stages = range(len(self.block_out_channels))
        if self.channels not in (1, 3):
            raise ValueError(f"--channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if not stages or min(self.block_out_channels) < 1:
            raise ValueError("--block_out_channels must name at least one stage, each of at least 1 channel")
        if set(self.attention_stages) - set(stages):
            raise ValueError(f"--attention_stages must name stages 0 to {len(stages) - 1}")
        with_attention = [*self.attention_stages, *([-1] if self.attention_stages else [])]  # and the middle block
        if any(self.block_out_channels[stage] < 32 for stage in with_attention):
            raise ValueError("--attention_stages need --block_out_channels of at least 32 there and in the last stage")
        if self.resolution % 2 ** (len(stages) - 1):
            raise ValueError(
                f"--resolution {self.resolution} cannot be halved {len(stages) - 1} times, once between each two of "
                f"the {len(stages)} stages of --block_out_channels"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"--norm_num_groups {self.norm_num_groups} must divide each of --block_out_channels "
                f"{' '.join(map(str, self.block_out_channels))}"
            )


FREE_TO_CHANGE = frozenset(
    {"output_dir", "resume_from_checkpoint", "dry_run"}
    | {"dataloader_num_workers", "eval_batch_size", "log_every_steps", "preview_every_steps"}
    | {"checkpointing_steps", "checkpoints_total_limit", "checkpoints_keep_every_steps", "max_skipped_steps"}
    | {"report_to", "export_variant", "push_to_hub", "hub_model_id", "image_cache", "cache_dir"}
    | {"score_every_steps", "extractor", "extractor_weights", "num_score_samples", "num_inference_steps"}
    | {"validation_prompts", "kid_subset_size", "score_teacher", "guidance_scale", "clip_model"}
)
"""Fields that may differ between a run and its resumption: they do not touch what is trained."""


def eight_bit_library() -> str | None:
    """The installed library that has an AdamW of 8 bits; None where there is none."""
    return next((name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name)), None)


def complete(config: Any) -> Any:
    """A recipe's configuration with all filled in that other flags decide: the warm-up and the extractor.

    Args:
        config: of a recipe, with `preset`, `data`, `scores` and `training`.

    Raises:
        ValueError: in one line, for options that contradict each other.
    """
    data, training = config.data, config.training
    if getattr(config, "teacher", None) == "":
        raise ValueError(f"--preset {config.preset} needs --teacher and --dataset")
    if not data.dataset:
        raise ValueError(f"--preset {config.preset} needs --dataset")
    steps, warmup = training.max_train_steps, training.lr_warmup_steps
    if warmup is None:
        longest = 1000 if config.preset in ("cifar10", "custom") else 50
        training = replace(training, lr_warmup_steps=min(longest, steps // 10))
    elif warmup > steps and training.lr_scheduler != "constant":
        raise ValueError(
            f"--lr_warmup_steps {warmup} is more than --max_train_steps {steps}: the learning rate would never reach "
            "--learning_rate; leave it out for a tenth of the run"
        )
    if training.optimizer == "adamw8bit" and not training.dry_run and not eight_bit_library():
        raise ValueError(
            "--optimizer adamw8bit is bitsandbytes' or torchao's, and neither is installed: pip install bitsandbytes"
        )
    start = getattr(config, "start", None)
    if start and start.teacher_quantization and not training.dry_run and not importlib.util.find_spec("torchao"):
        raise ValueError(
            "--teacher_quantization int8 is torchao's, which is not installed: pip install torchao, or leave it out"
        )
    if training.eval_batch_size is None and config.preset == "custom":
        training = replace(training, eval_batch_size=min(64, training.train_batch_size))
    check_effects(getattr(config, "matching", METHODS["vkd"]))
    scores = choose_extractor(config.scores, data.dataset)
    if scores.extractor == "none" and training.score_every_steps:
        raise ValueError("--score_every_steps needs an --extractor, such as inception")
    return replace(config, scores=scores, training=training)


def flat_config(config: Any) -> dict[str, Any]:
    """A recipe's configuration as one flat dictionary of flags, as its command line shows them."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flat_config(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
