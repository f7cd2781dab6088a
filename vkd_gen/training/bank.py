"""A fixed set of draws with the teacher's answers to them, kept on disk: the teacher is asked once for each.

It saves the teacher's forward pass in every step and costs variety: a student that trains on N draws meets each of them
again every N.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.utils.data import Dataset

from vkd_gen.data import TrainingDraws
from vkd_gen.diffusion import add_noise
from vkd_gen.distillation import FrozenTeacher
from vkd_gen.provenance import hash_tensors
from vkd_gen.training.cache import KeptRows, keep_rows
from vkd_gen.training.image_cache import image_facts
from vkd_gen.training.loop import on_device


class TeacherBank(Dataset):
    """The first N draws of a run, over and over: draw n is draw n mod N, with what the teacher answers to it.

    Args:
        draws: of the run.
        answers: from `open_bank`, N rows.
    """

    def __init__(self, draws: TrainingDraws, answers: KeptRows):
        self._draws, self._answers = draws, answers

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """A batch of `TrainingDraws`; `teacher_prediction` and `teacher_features` as `FrozenTeacher` returns them."""
        rows = [number % self._answers.num_rows for number in numbers]
        answers = self._answers[rows]
        prediction = answers.pop("prediction").float()
        features = {name.removeprefix("feature/"): value for name, value in answers.items()}
        return {**self._draws[rows], "teacher_prediction": prediction, "teacher_features": features}


def open_bank(
    folder: Path,
    size: int,
    draws: TrainingDraws,
    teacher: FrozenTeacher,
    noise_scheduler: SchedulerMixin,
    *,
    batch_size: int,
    device: torch.device,
) -> TeacherBank:
    """The bank of a run's first draws; what is not on disk is computed. Called by all processes, which share the work.

    The answers are kept in the teacher's precision. They are those of the live teacher up to rounding, which may depend
    on which draws go through it together.

    Args:
        folder: to keep banks in.
        size: N.
        draws: of the run.
        teacher: with the features to keep, on `device`.
        noise_scheduler: the student's.
        batch_size: draws at a time.
        device: to compute on.

    Raises:
        ValueError: in one line, if the answers cannot be kept.
    """
    dtype = next(teacher.unet.parameters()).dtype

    def answer(rows: Sequence[int]) -> dict[str, Tensor]:
        parts = []
        for first in range(0, len(rows), batch_size):
            batch = on_device(draws[rows[first : first + batch_size]], noise_scheduler, device)
            noisy_sample = add_noise(noise_scheduler, batch["sample"], batch["noise"], batch["timesteps"])
            prediction, features = teacher(noisy_sample, batch["timesteps"], batch.get("conditioning"))
            named = {"prediction": prediction.to(dtype)} | {
                f"feature/{name}": value for name, value in features.items()
            }
            parts.append({name: value.cpu() for name, value in named.items()})
        return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}

    answers = keep_rows(
        folder,
        _facts(size, draws, teacher, noise_scheduler),
        size,
        answer,
        what="answers of the teacher",
        advice="lower --bank_size, match fewer --layers or choose another --bank_dir",
    )
    return TeacherBank(draws, answers)


def _facts(size: int, draws: TrainingDraws, teacher: FrozenTeacher, noise_scheduler: SchedulerMixin) -> dict[str, Any]:
    """Everything that decides the answers, as JSON, but for the names, shapes and types that they have."""
    labels = draws.images.labels
    return {
        "teacher_weights": hash_tensors(teacher.unet.state_dict()),
        "teacher": _public(teacher.unet.config),
        "schedule": _public(noise_scheduler.config),
        "seed": draws.seed,
        "random_flip": draws.random_flip,
        "guidance_dropout": draws.guidance_dropout,
        "images": image_facts(draws.images),
        "labels": None if labels is None else hash_tensors({"labels": torch.from_numpy(labels[draws.images.indices])}),
        "first_and_last_draw": hash_tensors(draws[[0, size - 1]]),  # so that other random numbers are noticed
        "diffusers": diffusers.__version__,
    }


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers notes for itself, such as the folder it was loaded from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
