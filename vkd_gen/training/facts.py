"""What a run is: written down at its start, and compared when it is resumed, by contents and not by paths."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ConfigMixin
from torch import Tensor

from vkd_gen.data.images import data_facts
from vkd_gen.data.listing import list_files
from vkd_gen.provenance import hash_tensors, read_metrics
from vkd_gen.training.images import Data
from vkd_gen.training.options import FREE_TO_CHANGE, TrainingOptions

BATCH = ("train_batch_size", "num_processes", "gradient_accumulation_steps")
"""What may change as long as its product does not."""
CONTENTS = {"teacher": "teacher_sha256", "student": "student_sha256", "dataset": "dataset_sha256"}
"""Flags that name something, and the facts that hold what it is: where both runs know the fact, the name is free."""
OF_DATA = ("num_training_images", "num_skipped_images", "num_classes", "image_numbers_sha256")
"""Facts that follow from what the data are."""
CONSTANT = ("constant", "constant_with_warmup")
"""Schedules of the learning rate that do not depend on the number of steps."""


def run_facts(accelerator: Accelerator, data: Data) -> dict[str, Any]:
    """What decides the result beside the flags: a resumed run must find the same."""
    facts: dict[str, Any] = {} if data.stream is None else {"num_shards": data.stream.num_shards}
    facts |= {
        "num_training_images": len(data.train),
        "num_processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
    }
    return facts if data.train.labels is None else {**facts, "num_classes": data.train.num_classes}


def hash_model(weights: Mapping[str, Tensor], *parts: ConfigMixin) -> str:
    """SHA-256 of a model: of its weights, its configuration and, say, its noise scheduler's.

    Of a configuration counts what differs from the class' defaults: a later diffusers adds entries.
    """
    digest = hashlib.sha256(hash_tensors(weights).encode())
    for part in parts:
        defaults = {name: entry.default for name, entry in inspect.signature(type(part).__init__).parameters.items()}
        own = {name: value for name, value in part.config.items() if not name.startswith("_")}
        told = {name: value for name, value in own.items() if _plain(value) != _plain(defaults.get(name))}
        digest.update(f"{type(part).__name__} {sorted((name, _plain(value)) for name, value in told.items())}".encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def facts_of_data(facts: Mapping[str, Any], data: Data, *, tell: bool) -> dict[str, Any]:
    """`data_facts`, and what is compared of data that is not read whole; says so where that is asked for."""
    train = data.train
    found, how = data_facts(train, data.held_out), None
    if train.revision is not None:
        how = f"its commit on the hub, {train.revision}"
    elif data.stream is not None and "dataset_sha256" in found:
        listing = list_files(facts["dataset"], facts.get("image_column"))
        files = [file for chosen in listing.splits.values() for file in chosen]
        told = [f"{file.relative_to(listing.root)} {file.stat().st_size}" for file in files]
        found["dataset_sha256"] = hashlib.sha256("\n".join([found["dataset_sha256"], *told]).encode()).hexdigest()
        how = "its head, and the names and sizes of its files"
    elif "dataset_sha256" not in found:
        how = "its name, as it has no files to compare"
    if how and tell:
        print(f"{train.name} is compared to what the run began with by {how}")
    return found


def identity_of_images(data: Data) -> str | None:
    """A hash over names, sizes and times of the training images' files, where they have some."""
    if data.stream is not None or data.train.identity is None:
        return None
    try:
        return data.train.identity()
    except OSError as error:  # gone by now, or by then
        return str(error)


def cost_in_words(options: TrainingOptions, accelerator: Accelerator, metrics: Path) -> str:
    """What the steps of the whole run took, without start and scores, as metrics.jsonl has it; for the card."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    images_per_step = options.gradient_accumulation_steps * options.train_batch_size * accelerator.num_processes
    seconds, before = 0.0, 0
    for line in read_metrics(metrics):
        if line.get("images_per_second"):
            seconds += (line["step"] - before) * images_per_step / line["images_per_second"]
            before = line["step"]
    return (
        f"{options.max_train_steps} steps in {seconds / 60:.1f} minutes on {accelerator.num_processes} x {device}, "
        f"{accelerator.mixed_precision} mixed precision"
    )


def compare_facts(before: dict[str, Any], now: dict[str, Any], point: Path, tell: Callable[[str], None]) -> None:
    """Compare what a checkpoint is of with what is asked for now.

    Args:
        before: flags and facts of the checkpoint; an older version's lack some.
        now: flags, and later also the facts that turned up.
        point: the checkpoint, for messages.
        tell: gets a line for what may change, once the facts are known.

    Raises:
        ValueError: in one line, if it is another run.
    """
    changed = {name: value for name, value in now.items() if name in before and before[name] != value}
    knows_facts = all(name in before and name in now for name in BATCH)
    by_content = [
        flag for flag, fact in CONTENTS.items() if fact in before and (fact in now or not knows_facts)
    ]  # the flags come first, the facts once everything is loaded
    other_contents = []
    for flag in by_content:
        changed.pop(f"{flag}_revision", None)
        if changed.pop(CONTENTS[flag], None) is not None:
            where = "" if before[flag] == now[flag] else f", then {before[flag]}"
            other_contents.append(f"--{flag} {now[flag]} does not hold what the run began with{where}")
    if before.get("streaming"):
        fixed = [f"--{name} {before[name]}" for name in (*BATCH, "dataloader_num_workers") if name in changed]
        if fixed:
            raise ValueError(
                f"{point} is of a stream, whose readers go on only as they began: go on with {' and '.join(fixed)}"
            )
    if "teacher_images_sha256" in changed:
        raise ValueError(
            f"{point} is of a run on other images: the teacher would draw others now, since its weights or sampler, "
            "the prompts, --num_inference_steps, --guidance_scale, --resolution or the precision were others"
        )
    if before.get("aspect_buckets") and "train_batch_size" in changed:
        raise ValueError(
            f"{point} is of aspect buckets, whose images are drawn a forward pass at a time: go on with "
            f"--train_batch_size {before['train_batch_size']}"
        )
    if knows_facts and _images_per_step(before) != _images_per_step(now):
        raise ValueError(
            f"{point} was made with {_images_per_step(before)} images per step ({_batch_in_words(before)}), now "
            f"there are {_images_per_step(now)} ({_batch_in_words(now)}); that is another run"
        )
    if "max_train_steps" in changed:
        _check_length(before, now, point)
    free = {*FREE_TO_CHANGE, *BATCH, *by_content, "max_train_steps"}
    warmups = [facts.get("lr_warmup_steps") or 0 for facts in (before, now)]
    if before.get("lr_scheduler") in CONSTANT and max(warmups) <= _step_of(point):
        free.add("lr_warmup_steps")  # which is over, and whose default is a share of the run
    if any(words.startswith("--dataset ") for words in other_contents):
        free.update(OF_DATA)  # which follow from that
    forbidden = [name for name in changed if name not in free]
    if forbidden or other_contents:
        words = [f"--{name} was {before[name]!r} and is {changed[name]!r}" for name in forbidden]
        raise ValueError(f"{point} is of another run: {'; '.join([*words, *other_contents])}")
    if knows_facts:  # not of the flags alone, which come first
        _tell_changes(before, now, changed, point, tell)


def _tell_changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    changed: Mapping[str, Any],
    point: Path,
    tell: Callable[[str], None],
) -> None:
    """Say what may change, and what of it does."""
    if any(name in changed for name in BATCH):
        tell(
            f"{point} was made by {_batch_in_words(before)}, this run goes on by {_batch_in_words(now)}: each step "
            "has the same images, noise and timesteps; not equal bit for bit are the order of sums, random numbers "
            "inside the model (dropout), and whatever one forward pass computes of its own batch (batch_whiten)"
        )
    if "max_train_steps" in changed:
        tell(f"the run of {before['max_train_steps']} steps goes on to {now['max_train_steps']}")
    ignored = {"output_dir", "resume_from_checkpoint", "max_train_steps", *BATCH}
    words = [
        f"--{name} was {before[name]!r} and is {value!r}" for name, value in changed.items() if name not in ignored
    ]
    if words:
        tell(f"changed since {point}, without effect on what is trained: {'; '.join(words)}")


def _check_length(before: Mapping[str, Any], now: Mapping[str, Any], point: Path) -> None:
    """Another number of steps is the same run only where nothing in a step depends on how many there will be."""
    if now["max_train_steps"] < _step_of(point):
        raise ValueError(
            f"{point} is behind --max_train_steps {now['max_train_steps']}: that many steps are made already"
        )
    reasons = []
    if before.get("lr_scheduler") not in CONSTANT:
        reasons.append(f"--lr_scheduler {before.get('lr_scheduler')} leads the rate to its end over those")
    fades = before.get("feature_decay_start", 1.0) != 1.0 or before.get("feature_weighting") == "gradient_ratio"
    if before.get("feature_weight") and fades:
        reasons.append("the feature loss fades, or follows its ratio, over those")
    if reasons:
        raise ValueError(
            f"{point} is of a run of {before['max_train_steps']} steps, and --max_train_steps is "
            f"{now['max_train_steps']}: {' and '.join(reasons)}, so that is another run. A run can be longer if it "
            "was started with --lr_scheduler constant or constant_with_warmup (of a student also with "
            "--feature_decay_start 1 --feature_decay_end 1 --feature_weighting constant); else start a new one, of a "
            "student from what was exported: --student OUTPUT_DIR/pipeline"
        )


def _step_of(point: Path) -> int:
    return int(point.name.removeprefix("checkpoint-"))


def _images_per_step(config: Mapping[str, Any]) -> int:
    return config["train_batch_size"] * config["num_processes"] * config["gradient_accumulation_steps"]


def _batch_in_words(config: Mapping[str, Any]) -> str:
    size, processes, passes = (config[name] for name in BATCH)
    return f"{processes} x {size} images in {passes} forward pass{'es' if passes > 1 else ''}"
