"""Training of a small Stable Diffusion on captioned pictures that fit into memory: first its VAE, then the rest.

B batch, C channels, H height, W width, T tokens, D width of the text encoder.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from vkd_gen.data.images import Images, ImageSpec
from vkd_gen.data.sources import load_images
from vkd_gen.files import hold_folder, whole_file
from vkd_gen.provenance import write_json
from vkd_gen.schedule import Schedule
from vkd_gen.text import reason
from vkd_gen.training.interruption import StopRequest
from vkd_gen.training.text_options import TextTeacherOptions

KL_WEIGHT = 1e-4
"""Of the mean KL divergence per latent, beside the squared error per pixel value in [-1, 1]."""
LOG_EVERY = 100
"""Steps between lines on the loss."""


class Pictures(NamedTuple):
    """Pictures in memory.

    Attributes:
        pixels: `[N, 3, H, W]` float32 in [-1, 1].
        captions: of each.
    """

    pixels: Tensor
    captions: list[str]

    def at(self, numbers: Sequence[int]) -> "Pictures":
        """Those of these numbers."""
        return Pictures(self.pixels[list(numbers)], [self.captions[number] for number in numbers])

    def some(self, count: int) -> "Pictures":
        """At most `count`, evenly spaced."""
        count = min(count, len(self.captions))
        return self.at([number * len(self.captions) // count for number in range(count)])


def load_pictures(dataset: str, resolution: int, *, is_split: bool = True) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures of a data set; of several captions of one the first.

    Args:
        dataset: see `load_images`.
        resolution: height and width in pixels.
        is_split: hold some out where the data set has no split of its own.

    Raises:
        ValueError: as `load_images`.
    """

    def pictures(images: Images) -> Pictures:
        pixels = images.stack() if len(images) else torch.empty(0, 3, resolution, resolution)
        return Pictures(pixels, [images.captions_of(number)[0] for number in range(len(images))])

    fraction = 1 / 6 if is_split else 0
    spec = ImageSpec(resolution=resolution, channels=3, held_out_fraction=fraction, with_captions=True)
    train, held_out = load_images(dataset, spec)
    return pictures(train), pictures(held_out)


class PartTrainer:
    """Trains parts by AdamW and keeps the moving average of their weights; killed, it goes on where it was.

    All that a step draws depends on the seed and its number: resumed or not, the weights are the same.

    Args:
        options: batch size, time between checkpoints, and seed.
        folder: of the run, for a checkpoint of each part.
        say: prints a line.
    """

    def __init__(self, options: TextTeacherOptions, folder: Path, say: Callable[[str], None]):
        self.options, self.folder, self.say = options, folder, say

    def train(
        self,
        name: str,
        module: nn.Module,
        loss_of: Callable[[Tensor, torch.Generator], Tensor],
        *,
        num_samples: int,
        steps: int,
        learning_rate: float,
        learning_rate_steps: int | None = None,
    ) -> None:
        """Train one part, and leave the average of its weights in it.

        Args:
            name: of the part and its checkpoint.
            module: that is trained.
            loss_of: numbers of a batch's samples, `[B]`, and a generator for all else that is drawn -> the loss.
            num_samples: how many samples there are.
            steps: optimizer steps.
            learning_rate: the highest; it rises for a fiftieth of its steps and falls by a cosine.
            learning_rate_steps: within which it falls to 0; by default all.
        """
        options, path = self.options, self.folder / f"{name}.pt"
        optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=1e-2, fused=True)
        falling = learning_rate_steps or steps
        schedule = get_scheduler(
            "cosine", optimizer, num_warmup_steps=min(falling // 50, 200), num_training_steps=falling
        )
        average = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
        parts = {"module": module, "optimizer": optimizer, "schedule": schedule, "average": average}
        step = self._resume(path, parts, name)
        begun = saved = time.monotonic()
        total, first, summed = 0.0, step, 0
        with StopRequest() as stop:
            while step < steps:
                generator = torch.Generator().manual_seed(options.seed * 2**32 + step)
                numbers = torch.randint(num_samples, (options.train_batch_size,), generator=generator)
                loss = loss_of(numbers, generator)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                average.step(module.parameters())
                step, total, summed = step + 1, total + loss.item(), summed + 1
                if step % LOG_EVERY == 0:
                    seconds = (time.monotonic() - begun) / (step - first)
                    left = f"{seconds:.3f} s a step, {seconds * (steps - step) / 60:.0f} min left"
                    self.say(f"{name}: step {step:,} of {steps:,}, loss {total / summed:.5f}, {left}")
                    total, summed = 0.0, 0
                asked = stop.poll()
                if asked or step == steps or time.monotonic() - saved > options.checkpointing_seconds:
                    self._save(path, parts, step)
                    saved = time.monotonic()
                if asked:
                    raise SystemExit(128 + asked)
        average.copy_to(module.parameters())

    def _resume(self, path: Path, parts: dict[str, Any], name: str) -> int:
        if not path.exists():
            return 0
        try:
            state = torch.load(path, weights_only=True)
            step = state.pop("step")
            for part, held in state.items():
                parts[part].load_state_dict(held)
        except Exception as error:  # damaged files and other networks each have errors of their own
            raise ValueError(
                f"{path} cannot be gone on from ({reason(error)}); without it the part starts anew"
            ) from error
        self.say(f"{name}: goes on from step {step:,}")
        return step

    def _save(self, path: Path, parts: dict[str, Any], step: int) -> None:
        with whole_file(path) as temporary:
            torch.save({"step": step, **{part: value.state_dict() for part, value in parts.items()}}, temporary)


def train_vae(vae: AutoencoderKL, pixels: Tensor, trainer: PartTrainer) -> None:
    """Train a VAE on pictures, `[N, 3, H, W]` in [-1, 1], by squared error and a little KL divergence."""

    def loss_of(numbers: Tensor, generator: torch.Generator) -> Tensor:
        posterior = vae.encode(pixels[numbers]).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        return F.mse_loss(decoded, pixels[numbers]) + KL_WEIGHT * 0.5 * kl.mean()

    options = trainer.options
    trainer.train(
        "vae", vae, loss_of, num_samples=len(pixels), steps=options.vae_steps, learning_rate=options.vae_learning_rate
    )


def train_decoder(vae: AutoencoderKL, pixels: Tensor, trainer: PartTrainer) -> None:
    """Train the decoder alone for longer, by absolute error, which is sharper: latents stay what they are."""
    mean, std = encode(vae, pixels)

    def loss_of(numbers: Tensor, generator: torch.Generator) -> Tensor:
        latents = mean[numbers] + std[numbers] * torch.randn(mean[numbers].shape, generator=generator)
        return F.l1_loss(vae.decode(latents).sample, pixels[numbers])

    module = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    steps, rate = trainer.options.decoder_steps, trainer.options.vae_learning_rate / 2
    trainer.train("decoder", module, loss_of, num_samples=len(pixels), steps=steps, learning_rate=rate)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pictures' latents, `[N, C, H/4, W/4]`, as the VAE gives them."""
    posteriors = [vae.encode(some).latent_dist for some in pixels.split(64)]
    return torch.cat([each.mean for each in posteriors]), torch.cat([each.std for each in posteriors])


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give the pictures' latents mean 0 and variance 1 in each channel, and decode as before.

    Stable Diffusion has one scaling factor for all channels; here mean and deviation of each go into the 1 x 1
    convolutions behind the encoder and before the decoder, and the scaling factor stays 1.
    """
    mean, std = encode(vae, pixels)
    centre = mean.mean((0, 2, 3))
    scale = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    channels = len(scale)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= scale[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - centre) / scale
    before.bias[channels:] -= 2 * scale.log()  # of the logarithm of the variance
    after.bias += after.weight[:, :, 0, 0] @ centre
    after.weight *= scale[None, :, None, None]


def train_denoiser(pipeline: StableDiffusionPipeline, pictures: Pictures, trainer: PartTrainer) -> None:
    """Train UNet and text encoder together, on latents that are encoded once; a sample of them is drawn per step.

    Args:
        pipeline: with a trained VAE.
        pictures: that are trained on.
        trainer: of the run.
    """
    options, schedule = trainer.options, Schedule.of(pipeline.scheduler)
    mean, std = encode(pipeline.vae, pictures.pixels)
    tokens = tokenize(pipeline, pictures.captions)
    null = tokenize(pipeline, [""])

    def loss_of(numbers: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(numbers), *mean.shape[1:])
        sample = mean[numbers] + std[numbers] * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        timesteps = schedule.timesteps(torch.rand(len(numbers), generator=generator))
        is_dropped = torch.rand(len(numbers), generator=generator) < options.guidance_dropout
        prompts = pipeline.text_encoder(torch.where(is_dropped[:, None], null, tokens[numbers]))[0]
        prediction = pipeline.unet(schedule.noisy(sample, noise, timesteps), timesteps, prompts).sample
        return F.mse_loss(prediction, schedule.target(sample, noise, timesteps))

    both = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).train()
    trainer.train(
        "denoiser",
        both,
        loss_of,
        num_samples=len(pictures.captions),
        steps=options.max_train_steps,
        learning_rate=options.learning_rate,
        learning_rate_steps=options.learning_rate_steps,
    )


def tokenize(pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Tokens of prompts, `[N, T]`, as the pipeline makes them."""
    tokenizer = pipeline.tokenizer
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@contextlib.contextmanager
def hold_run(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder of a run inside of this context, once what is asked for is written down there.

    Raises:
        ValueError: in one line, if it is held, or is of a run with other options.
    """
    lock, path = hold_folder(folder), folder / "options.json"
    with lock or contextlib.nullcontext():
        wanted = json.loads(json.dumps(config))
        held = json.loads(path.read_text()) if path.exists() else wanted
        for name, value in wanted.items():
            if held.get(name) != value:
                raise ValueError(
                    f"{folder} holds a run with {name} {held.get(name)}, not {value}: choose another --output_dir"
                )
        write_json(path, wanted)
        yield
