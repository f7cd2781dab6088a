"""What every training recipe lets its user choose."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training loop, named as in diffusers' own examples where those have them."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, samples and the exported pipeline."""
    seed: int = 0
    """Seed of initialisation, data order, noise and timesteps; 0 or above."""
    train_batch_size: int = 128
    """Images per process and forward pass."""
    eval_batch_size: int = 64
    """Images per forward pass in calibration, previews and scores."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    max_train_steps: int = 1000
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Learning rate schedule, as in diffusers."""
    lr_warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    adam_weight_decay: float = 0.01
    """Weight decay of the network; projectors are never decayed."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to; 0 for no clipping."""
    max_skipped_steps: int = 20
    """Steps in a row that may be skipped because a loss or a gradient is not finite; one more ends the run."""
    ema_max_decay: float = 0.9999
    """Highest decay of the exponential moving average of the weights, which is what is exported. It warms up as
    1 - (1 + step)^-0.75. 0 exports the last weights."""
    random_flip: bool = False
    """Mirror half of the images."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks' forward passes; by default what `accelerate launch` says. Noising, statistics and
    losses stay in float32."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations a second time during backward."""
    dataloader_num_workers: int = 0
    """Processes that read images; 0 reads them in the training process."""
    image_cache: str = ""
    """Folder to keep the training images in, decoded, cropped and resized, so that it is done once and not in each pass
    through them; runs may share it. Empty for none."""
    log_every_steps: int = 20
    """Steps between lines in metrics.jsonl and the trackers."""
    preview_every_steps: int = 0
    """Steps between sample grids in previews/; 0 for none."""
    score_every_steps: int = 0
    """Steps between scores of the moving average; 0 for none before the end."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; one is always made at the end."""
    checkpoints_total_limit: int = 2
    """Checkpoints to keep; the oldest are removed."""
    checkpoints_keep_every_steps: int = 0
    """Keep also the checkpoints at multiples of this many steps; 0 keeps none beside the newest."""
    resume_from_checkpoint: str | None = None
    """`latest`, the newest whole checkpoint, or a checkpoint folder: go on from there, to the same result as without
    the interruption. With `latest` and no checkpoint the run starts anew. SIGTERM and SIGINT (Ctrl-C) finish the step,
    save a checkpoint and exit with status 143 and 130; a second one exits at once."""
    report_to: str | None = None
    """Experiment tracker, such as `tensorboard` or `wandb`; metrics.jsonl is always written."""
    push_to_hub: bool = False
    """Upload the exported pipeline to the Hugging Face hub."""
    hub_model_id: str | None = None
    """Repository to upload to; by default the name of the output folder."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name, least in MINIMA.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ValueError(f"--{name} must be at least {least}{' and finite' * (value > least)}, not {value}")
        if not self.output_dir or "\0" in self.output_dir:
            raise ValueError("--output_dir must name a folder")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2^32, not {self.seed}")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"--ema_max_decay must be at least 0 and below 1, not {self.ema_max_decay}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate must be above 0 and finite, not {self.learning_rate}")


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

FREE_TO_CHANGE = frozenset(
    {"output_dir", "resume_from_checkpoint", "dry_run"}
    | {"dataloader_num_workers", "eval_batch_size", "log_every_steps", "preview_every_steps"}
    | {"checkpointing_steps", "checkpoints_total_limit", "checkpoints_keep_every_steps", "max_skipped_steps"}
    | {"report_to", "push_to_hub", "hub_model_id", "image_cache"}
    | {"score_every_steps", "extractor", "extractor_weights", "num_score_samples", "num_inference_steps"}
    | {"kid_subset_size", "score_teacher"}
)
"""Fields that may differ between a run and its resumption: they do not touch what is trained."""


def flat_config(config: Any) -> dict[str, Any]:
    """A recipe's configuration as one flat dictionary of flags, as its command line shows them."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flat_config(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


SharedOptions = Annotated[TrainingOptions, tyro.conf.OmitArgPrefixes]
"""The type of a recipe's field `training`: its flags carry no prefix."""
