"""Train a small Stable Diffusion on captioned pictures: the teacher of the preset emoji, or one of your own.

python recipes/train_teacher_text.py --preset emoji --output_dir runs/emoji-teacher
python recipes/train_teacher_text.py --preset custom --dataset PICTURES --output_dir runs/my-teacher
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

# What takes seconds to load, torch and all that needs it, is imported in `main`: flags are read before.
from vkd_gen.cli import announce, run_recipe
from vkd_gen.training.text_options import TextTeacherOptions


@dataclass(frozen=True, kw_only=True)
class TextTeacherConfig:
    """Train a small Stable Diffusion from random weights; killed, the same command goes on."""

    preset: str = "emoji"
    """What the other flags start from: emoji or custom."""
    dataset: str = "emoji"
    """Pictures with captions: `emoji`, `emoji-all`, a folder, a table or a hub id. All are held in memory."""
    vae_dataset: str = ""
    """Pictures for VAE and tokenizer; by default those of --dataset."""
    output_dir: str = "runs/emoji-teacher"
    """Folder of the run; the pipeline comes into its folder `pipeline`."""
    teacher: TextTeacherOptions = field(default_factory=TextTeacherOptions)


EMOJI = TextTeacherConfig(vae_dataset="emoji-all")
CUSTOM = replace(EMOJI, preset="custom", dataset="", vae_dataset="", output_dir="runs/custom-teacher")
PRESETS = {config.preset: config for config in (EMOJI, CUSTOM)}


def main(config: TextTeacherConfig) -> None:
    """Train, score and export one teacher."""
    options, folder = config.teacher, Path(config.output_dir)
    announce(f"a text-to-image teacher of {config.dataset}, into {folder}")

    import torch

    from vkd_gen.training.small_diffusion import build_text_teacher, save_tokenizer
    from vkd_gen.training.text_export import finish_text_teacher
    from vkd_gen.training.text_training import (
        PartTrainer,
        hold_run,
        load_pictures,
        train_decoder,
        train_denoiser,
        train_vae,
        whiten_latents,
    )

    train, held_out = load_pictures(config.dataset, options.resolution)
    general = train
    if config.vae_dataset:
        general, _ = load_pictures(config.vae_dataset, options.resolution, is_split=False)
    say = partial(print, flush=True)
    say(f"{len(train.captions):,} pictures, {len(held_out.captions):,} held out; VAE on {len(general.captions):,}")
    with hold_run(folder, {**asdict(config), "output_dir": ""}):
        save_tokenizer(general.captions, options, folder / "tokenizer")
        pipeline = build_text_teacher(options, folder / "tokenizer")
        trainer = PartTrainer(options, folder, say)
        train_vae(pipeline.vae, general.pixels, trainer)
        whiten_latents(pipeline.vae, train.pixels)
        repeated = [train.pixels] * max(1, len(general.captions) // len(train.captions))
        train_decoder(pipeline.vae, torch.cat([general.pixels, *repeated]), trainer)
        train_denoiser(pipeline, train, trainer)
        finish_text_teacher(pipeline, train, held_out, config.dataset, trainer)


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="emoji")
