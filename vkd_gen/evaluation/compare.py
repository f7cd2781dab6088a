"""A student beside its teacher, in numbers and pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vkd_gen.data import Images
from vkd_gen.distillation import FrozenTeacher
from vkd_gen.distillation import matching_table as matching_table
from vkd_gen.evaluation.cost import count_macs, count_parameters, milliseconds_per_image
from vkd_gen.evaluation.feature_network import FeatureNetwork
from vkd_gen.evaluation.scores import frechet_distance, held_out_errors
from vkd_gen.sampling import sample_images

COLUMNS = {
    "parameters": "{:,}",
    "macs": "{:,}",
    "ms_per_image": "{:.2f}",
    "frechet_distance": "{:.2f}",
    "denoising_error": "{:.4f}",
    "teacher_distance": "{:.4f}",
}


def compare_to_teacher(
    student: ModelMixin,
    noise_scheduler: SchedulerMixin,
    teacher: FrozenTeacher,
    teacher_scheduler: SchedulerMixin,
    *,
    images: Images,
    held_out: Images,
    feature_network: FeatureNetwork | None = None,
    num_score_samples: int = 1000,
    num_inference_steps: int = 50,
    batch_size: int = 64,
    num_shown: int = 32,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Cost and scores of a student and its teacher, measured in one go on the same seeds and draws.

    Args:
        student: the UNet to export.
        noise_scheduler: the student's.
        teacher: as trained with; it is brought to float32 here.
        teacher_scheduler: the teacher's.
        images: training images, the reference of the Frechet distance.
        held_out: images that neither was trained on.
        feature_network: scores the samples; None leaves the Frechet distance out.
        num_score_samples: samples that the Frechet distance is computed from.
        num_inference_steps: DDIM steps; at most those of the schedules.
        batch_size: images at a time.
        num_shown: samples to return.

    Returns:
        Results for results.json (`rows`: name -> column -> number; `protocol`), and samples by name, uint8.
    """
    nn.Module.float(teacher.unet)
    unets = {"teacher": (teacher.unet, teacher_scheduler), "student": (student, noise_scheduler)}
    device = next(student.parameters()).device
    rows: dict[str, dict[str, int | float]] = {
        name: {"parameters": count_parameters(unet), "macs": count_macs(unet)} for name, (unet, _) in unets.items()
    }
    num_timesteps = [scheduler.config.num_train_timesteps for _, scheduler in unets.values()]
    num_inference_steps = min(num_inference_steps, *num_timesteps)
    num_timed = min(32, batch_size)
    times = milliseconds_per_image(unets, num_images=num_timed, num_inference_steps=num_inference_steps)
    errors = held_out_errors(unets, teacher, held_out, batch_size=batch_size, device=device)
    for name in unets:
        rows[name] |= {"ms_per_image": times[name], **errors[name]}
    protocol: dict[str, Any] = {
        "sampler": "DDIM",
        "num_inference_steps": num_inference_steps,
        "device": str(device),
        "ms_per_image": f"batches of {num_timed}, a tenth of the steps, scaled; taken in turns, best of 3",
        "errors": "512 draws of (held-out image, noise, timestep), mean square per element",
        "weights": "moving average",
    }
    num_samples = num_score_samples if feature_network else num_shown
    samples = {
        name: sample_images(
            unet, scheduler, range(num_samples), num_inference_steps=num_inference_steps, batch_size=batch_size
        )
        for name, (unet, scheduler) in unets.items()
    }
    if feature_network:
        reference = feature_network.extract(_uint8(images.stack()))
        for name in unets:
            rows[name]["frechet_distance"] = frechet_distance(feature_network.extract(samples[name]), reference)
        if len(held_out) > 1:
            real = feature_network.extract(_uint8(held_out.stack()))
            rows["held-out images"] = {"frechet_distance": frechet_distance(real, reference)}
        protocol["frechet_distance"] = (
            f"{num_samples} samples (seeds 0 to {num_samples - 1}) against {len(images)} training images, in the "
            f"features of {feature_network.facts.get('file', 'a small network')}; not Inception's"
        )
    return {"rows": rows, "protocol": protocol}, {name: images[:num_shown] for name, images in samples.items()}


def _uint8(images: Tensor) -> Tensor:
    return images.add(1).mul(127.5).round().to(torch.uint8)


def _cells(row: dict[str, int | float], columns: Sequence[str]) -> list[str]:
    return [COLUMNS[column].format(row[column]) if column in row else "-" for column in columns]


def _columns(results: dict[str, Any]) -> list[str]:
    return [column for column in COLUMNS if any(column in row for row in results["rows"].values())]


def print_table(results: dict[str, Any]) -> None:
    """Print the rows for a person."""
    columns = _columns(results)
    table = Table("", *(column.replace("_", " ") for column in columns))
    for name, row in results["rows"].items():
        table.add_row(name, *_cells(row, columns))
    Console(width=120).print(table)


def markdown_table(results: dict[str, Any]) -> str:
    """The rows and the protocol as Markdown."""
    columns = _columns(results)
    lines = [
        "| | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(_cells(row, columns)) + " |" for name, row in results["rows"].items()]
    lines += ["", *(f"- {name.replace('_', ' ')}: {text}" for name, text in results["protocol"].items())]
    return "\n".join(lines)


def describe_models(teacher: ModelMixin, student: ModelMixin) -> str:
    """Sizes of both, in lines."""
    costs = {
        name: (count_parameters(unet), count_macs(unet)) for name, unet in (("teacher", teacher), ("student", student))
    }
    lines = [f"{name}: {parameters:,} parameters, {macs:,} MACs per step" for name, (parameters, macs) in costs.items()]
    share = [small / large for small, large in zip(costs["student"], costs["teacher"], strict=True)]
    return "\n".join([*lines, f"student / teacher: {share[0]:.1%} of the parameters, {share[1]:.1%} of the MACs"])
