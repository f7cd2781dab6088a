"""A look at teacher and student before a run: are their predictions finite at both ends of the schedule?"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from vkd_gen.distillation import FrozenTeacher
from vkd_gen.families import family_of
from vkd_gen.provenance import plain_tensors
from vkd_gen.schedule import Schedule


def check_time_embedding(unet: ModelMixin, schedule: Schedule, name: str) -> None:
    """Refuse a UNet with a learned table of timesteps that is shorter than the schedule; on a GPU it would crash.

    Args:
        unet: may be on the meta device.
        schedule: of its training.
        name: of the UNet, for messages.

    Raises:
        ValueError: in one line.
    """
    table = getattr(unet, "time_proj", None)
    if isinstance(table, nn.Embedding) and table.num_embeddings < len(schedule):
        raise ValueError(
            f"{name} knows timesteps 0 to {table.num_embeddings - 1} (a learned table, num_train_timesteps in its "
            f"config.json), and the schedule goes to {len(schedule) - 1}: they do not belong together"
        )


@torch.no_grad()
def check_finite(unet: ModelMixin | FrozenTeacher, schedule: Schedule, batch: Mapping[str, Any], name: str) -> None:
    """Ask a UNet once at the first and the last timestep of the schedule, which training and samplers ask it for.

    Its weights are looked at too: a broken row of a table, of a timestep or a class, need not show in a few draws.

    Args:
        unet: on the device of the batch, in the precision that it is run with.
        schedule: of its training, on the device of the batch.
        batch: a few draws, from `Draws.apart`.
        name: of the UNet, for messages.

    Raises:
        ValueError: in one line that names the timestep, if a prediction or a feature is not finite there.
    """
    network = unet.unet if isinstance(unet, FrozenTeacher) else unet
    check_time_embedding(network, schedule, name)
    conditioning = batch.get("conditioning")
    was_training = network.training
    network.eval()
    for timestep in (0, len(schedule) - 1):
        timesteps = torch.full_like(batch["timesteps"], timestep)
        noisy_sample = schedule.noisy(batch["sample"], batch["noise"], timesteps)
        if isinstance(unet, FrozenTeacher):
            prediction, features = unet(noisy_sample, timesteps, conditioning)
        else:
            prediction, features = family_of(unet).call(unet, noisy_sample, schedule.told(timesteps), conditioning), {}
        for part, value in {"prediction": prediction, **features}.items():
            if not value.isfinite().all():
                raise ValueError(_describe(network, name, timestep, part))
    network.train(was_training)
    if weights := _broken_weights(network):
        raise ValueError(f"{name} is not finite: {weights}")


def _broken_weights(network: nn.Module) -> str | None:
    weights = [key for key, value in plain_tensors(network.state_dict()).items() if not value.isfinite().all()]
    return f"{len(weights)} of its weights hold NaN or infinity, such as {weights[0]}" if weights else None


def _describe(network: ModelMixin, name: str, timestep: int, part: str) -> str:
    if weights := _broken_weights(network):
        cause = weights
    elif network.dtype == torch.float16:
        cause = "it overflows in float16; try --mixed_precision bf16 or no"
    elif timestep == 0 and network.config.get("time_embedding_type") == "fourier":
        cause = "its Fourier embedding takes the logarithm of the timestep, and this schedule begins with 0"
    else:
        cause = "its weights are finite; they do not fit this schedule, or overflow"
    what = "its prediction" if part == "prediction" else f"its feature {part}"
    return f"{name} is not finite at timestep {timestep} ({what}): {cause}"
