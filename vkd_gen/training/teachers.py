"""The teacher of a recipe, built as its user described it."""

from collections.abc import Callable

from diffusers import DDPMScheduler, UNet2DModel

from vkd_gen.evaluation.labels import data_label
from vkd_gen.loading import check_memory
from vkd_gen.models import Model
from vkd_gen.training.options import TeacherOptions
from vkd_gen.training.unets import unet_without_weights


def build_teacher(options: TeacherOptions, num_classes: int = 0) -> Model:
    """The UNet that the options describe, in its pipeline; with classes it knows one label more, for no class.

    Raises:
        ValueError: in one line, for one that this machine has no memory for.
    """
    attention = [stage in options.attention_stages for stage in range(len(options.block_out_channels))]
    entries = {
        "sample_size": options.resolution,
        "in_channels": options.channels,
        "out_channels": options.channels,
        "layers_per_block": options.layers_per_block,
        "block_out_channels": options.block_out_channels,
        "down_block_types": tuple("AttnDownBlock2D" if found else "DownBlock2D" for found in attention),
        "up_block_types": tuple("AttnUpBlock2D" if found else "UpBlock2D" for found in reversed(attention)),
        "add_attention": any(attention),
        "attention_head_dim": 32,
        "norm_num_groups": options.norm_num_groups,
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }
    check_memory(unet_without_weights(entries, "the teacher"), "the teacher")  # before any of it is taken
    scheduler = DDPMScheduler(prediction_type=options.prediction_type, beta_schedule=options.beta_schedule)
    return Model.of_unet(UNet2DModel(**entries), scheduler)


def warn_of_form(
    data: str, options: TeacherOptions, of_preset: str, preset: TeacherOptions, say: Callable[[str], None]
) -> None:
    """Say where other data than a preset's are brought to the form of the preset's images.

    Args:
        data: set to train on.
        options: of the recipe.
        of_preset: the preset's data; empty for none.
        preset: its options.
        say: prints a line.
    """
    is_of_preset = not of_preset or data_label(data) == data_label(of_preset)
    if not is_of_preset and (options.resolution, options.channels) == (preset.resolution, preset.channels):
        say(
            f"note: {data} becomes {options.resolution} x {options.resolution} pixels in "
            f"{'grey' if options.channels == 1 else 'RGB'}, as the preset is for {of_preset}; for images of your own: "
            "--preset custom, with --resolution and --channels"
        )
