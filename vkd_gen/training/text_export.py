"""The end of the training of a small Stable Diffusion: scores, pictures, and a stock pipeline folder with its card."""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn

from vkd_gen.data.embedded import EMOJI
from vkd_gen.data.openmoji import HELD_OUT_COMBINATIONS, OPENMOJI_NOTICE
from vkd_gen.evaluation.cost import count_parameters
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.prompt_errors import errors_by_prompt, places
from vkd_gen.files import whole_folder
from vkd_gen.models import Model
from vkd_gen.pictures import save_sample_grid, to_uint8
from vkd_gen.provenance import environment
from vkd_gen.text import printable
from vkd_gen.text_pipelines import save_pipeline
from vkd_gen.training.text_training import PartTrainer, Pictures, encode, tokenize

GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 4.0, 25
"""Of the samples in the card."""


class PromptScores(NamedTuple):
    """Denoising errors of pictures, means over them, and places of the right prompt.

    Attributes:
        right: with each picture's own prompt.
        wrong: with others.
        none: with the null prompt.
        rank: mean place of the own prompt among all that were tried, by the picture's error; 1 is best.
        first: share of the pictures whose own prompt has the least error.
        num_prompts: prompts that were tried for each picture, with its own.
    """

    right: float
    wrong: float
    none: float
    rank: float
    first: float
    num_prompts: int


@torch.no_grad()
def score_prompts(
    pipeline: StableDiffusionPipeline,
    pictures: Pictures,
    pool: Sequence[str],
    *,
    num_prompts: int = 32,
    num_times: int = 4,
) -> PromptScores:
    """Right against wrong prompts on pictures' latents; see `errors_by_prompt`.

    A picture is tried with its own prompt and the `num_prompts` - 1 that follow it in the pool, and with none, in the
    middle of `num_times` equal parts of the schedule.

    Args:
        pipeline: whole.
        pictures: at most 64 of them are asked about, evenly spaced.
        pool: different prompts, with those of the pictures.
        num_prompts: at most as many as the pool holds.
        num_times: noisy versions of each picture.
    """
    for part in (pipeline.unet, pipeline.text_encoder):
        part.eval()
    prompts, null = (pipeline.text_encoder(tokenize(pipeline, words))[0] for words in (pool, [""]))
    pictures, count = pictures.some(64), min(num_prompts, len(pool))
    latents, _ = encode(pipeline.vae, pictures.pixels)
    places_in_pool = [(pool.index(caption) + torch.arange(count)) % len(pool) for caption in pictures.captions]
    tried = ({"encoder_hidden_states": torch.cat([prompts[numbers], null])} for numbers in places_in_pool)
    times = [(number + 0.5) / num_times for number in range(num_times)]
    errors = errors_by_prompt(Model(pipeline), list(latents), tried, times=times, seed=0)
    of_prompts, is_own = errors[:, :count], torch.arange(count).expand(len(errors), count) == 0
    rank = places(of_prompts, errors[:, 0], is_own)
    return PromptScores(
        errors[:, 0].mean().item(),
        errors[:, 1:count].mean().item(),
        errors[:, count].mean().item(),
        rank.mean().item(),
        (rank == 1).double().mean().item(),
        count,
    )


def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int = 0) -> Tensor:
    """A picture per prompt, `[N, 3, H, W]` uint8."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    images = pipeline(
        list(prompts),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_INFERENCE_STEPS,
        generator=generators,
        output_type="np",
    ).images
    return torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)


@torch.no_grad()
def sheet_of(pipeline: StableDiffusionPipeline, groups: Mapping[str, Pictures]) -> dict[str, Tensor]:
    """Of each group up to 32 pictures, as the VAE decodes them and as they are drawn for their captions, uint8."""
    sheet = {}
    for name, pictures in groups.items():
        some = pictures.some(32)
        decoded = pipeline.vae.decode(encode(pipeline.vae, some.pixels)[0]).sample
        sheet[f"{name}: pictures"] = to_uint8(some.pixels)
        sheet[f"{name}: by the VAE"] = to_uint8(decoded)
        sheet[f"{name}: by their captions"] = draw(pipeline, some.captions)
    return sheet


def export_text_teacher(
    pipeline: StableDiffusionPipeline, tokenizer: Path, folder: Path, card: str, sheet: Mapping[str, Tensor]
) -> None:
    """Save a pipeline in half precision, with its card and a sheet of samples; `from_pretrained` loads it in full.

    The pipeline itself is in half precision afterwards. The tokenizer's files are those that it was made from: what
    transformers 5 saves, earlier versions do not read.
    """
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        nn.Module.to(part, torch.float16)  # past diffusers' warning about casting
    with whole_folder(folder) as temporary:
        save_pipeline(pipeline, temporary)
        shutil.rmtree(temporary / "tokenizer")
        shutil.copytree(tokenizer, temporary / "tokenizer")
        path = temporary / "text_encoder" / "config.json"
        config = json.loads(path.read_text())
        # transformers 5 would load the precision that is named here, beside a UNet in diffusers' float32.
        config |= {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
        path.write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "README.md").write_text(card)
        save_sample_grid(sheet, temporary / "samples.png")


def finish_text_teacher(
    pipeline: StableDiffusionPipeline, train: Pictures, held_out: Pictures, dataset: str, trainer: PartTrainer
) -> None:
    """Score a trained pipeline, draw, export it to the folder `pipeline` of the run, and say so.

    Args:
        pipeline: is in half precision afterwards.
        train: pictures that it has seen.
        held_out: those that it has not; of `emoji` the combinations stand apart.
        dataset: their name.
        trainer: of the run.
    """
    options, folder = trainer.options, trainer.folder / "pipeline"
    numbers = range(len(held_out.captions))
    combinations = [number for number in numbers if held_out.captions[number] in HELD_OUT_COMBINATIONS]
    groups = {
        "seen": train,
        "held-out combinations": held_out.at(combinations),
        "held-out pictures": held_out.at([number for number in numbers if number not in combinations]),
    }
    groups = {name: group for name, group in groups.items() if group.captions}
    pool = sorted({*train.captions, *held_out.captions})
    scores = {name: score_prompts(pipeline, group, pool) for name, group in groups.items()}
    for name, found in scores.items():
        trainer.say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found._asdict().items()))
    sheet = sheet_of(pipeline, groups)
    parts = {"UNet": pipeline.unet, "VAE": pipeline.vae, "text encoder": pipeline.text_encoder}
    facts = {
        "pictures": f"{len(train.captions)} of {options.resolution} x {options.resolution} pixels, and "
        f"{len(held_out.captions)} held out: {', '.join(held_out.captions)}",
        "parameters": ", ".join(f"{name} {count_parameters(part):,}" for name, part in parts.items()),
        "tokens": len(pipeline.tokenizer),
        "steps": f"VAE {options.vae_steps:,}, its decoder {options.decoder_steps:,}, UNet and text encoder "
        f"{options.max_train_steps:,}, of {options.train_batch_size} pictures",
        "mean squared error of the VAE, pixels in [0, 1]": f"{vae_error(pipeline.vae, train.pixels):.5f}",
        "seed": options.seed,
    }
    notice, example = OPENMOJI_NOTICE if dataset in EMOJI else "", train.captions[0]
    card = text_teacher_card(f"{data_label(dataset)} teacher", facts, scores, notice=notice, example=example)
    export_text_teacher(pipeline, trainer.folder / "tokenizer", folder, card, sheet)
    trainer.say(f"teacher: {folder}\nsamples: {folder / 'samples.png'}")


@torch.no_grad()
def vae_error(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean squared error of the decoded means, of values in [0, 1]."""
    decoded = [vae.decode(encode(vae, some)[0]).sample for some in pixels.split(64)]
    return (torch.cat(decoded).clamp(-1, 1) - pixels).square().mean().item() / 4


def text_teacher_card(
    title: str, facts: Mapping[str, object], scores: Mapping[str, PromptScores], *, notice: str, example: str
) -> str:
    """The card of the pipeline, Markdown with the hub's metadata.

    Args:
        title: heading.
        facts: what the reader should know, a table row each.
        scores: name of the pictures -> errors by prompt.
        notice: whom the pictures are by, and under which licence; empty for the user's own.
        example: a prompt.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    lines = "\n".join(
        f"| {name} | {found.right:.4f} | {found.wrong:.4f} | {found.none:.4f} "
        f"| {found.rank:.2f} of {found.num_prompts} | {found.first:.0%} |"
        for name, found in scores.items()
    )
    command = shlex.join(["python", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- vkd-gen
- text-to-image
{"license: cc-by-sa-4.0" if notice else "license: unknown"}
---
# {title}

{notice}

| | |
|---|---|
{rows}

Mean squared error of the prediction with the right prompt, with wrong ones and with none, and the place of the right
prompt among all that were tried by it (1 is best):

| pictures | right | wrong | none | mean place of the right prompt | first |
|---|---|---|---|---|---|
{lines}

![Pictures, and what is drawn for their captions](samples.png)

Samples: guidance {GUIDANCE_SCALE:g}, {NUM_INFERENCE_STEPS} steps, seed 0. Made by

```
{printable(command)}
```

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("THIS_FOLDER")
image = pipeline("{example}", guidance_scale={GUIDANCE_SCALE:g}, num_inference_steps={NUM_INFERENCE_STEPS}).images[0]
```

Made with {versions}.
"""
