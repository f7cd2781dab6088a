"""A step on prompts and pictures: with encodings that are kept, encoded live, and without either, in one run.

python benchmarks/text_step.py
python benchmarks/text_step.py --shape sd1-tenth --rounds 3
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

import vkd_gen as vkd
from measuring import RESULTS, write_results
from step import quartiles, timed
from vkd_gen.cli import run_command
from vkd_gen.data.draws import Draws
from vkd_gen.data.encoded import How, encode
from vkd_gen.data.images import ImageSpec
from vkd_gen.data.sources import load_images
from vkd_gen.data.views import Views
from vkd_gen.encoders import Encoders
from vkd_gen.evaluation.tables import print_columns
from vkd_gen.families import REDUCTIONS
from vkd_gen.families.unet import call
from vkd_gen.training.loop import Loop
from vkd_gen.training.matching import build_projected_student, pair_named_or_all
from vkd_gen.training.methods import MatchingOptions
from vkd_gen.training.options import TrainingOptions
from vkd_gen.training.run import Run
from vkd_gen.training.unets import training_schedule

EMOJI = Path(__file__).resolve().parents[1] / "recipes/assets/emoji-teacher"
Variant = Literal["floor", "kept", "kept, no features", "live"]
STUDENTS = {"emoji": "bk-tiny", "sd1-tenth": "bk-small"}
STEPS_PER_ROUND = 10
"""Each round has one refresh of the projectors and one log line."""


@dataclass(frozen=True, kw_only=True)
class TextStepConfig:
    """What to time, and for how long."""

    shape: Literal["emoji", "sd1-tenth"] = "emoji"
    """The emoji teacher, or Stable Diffusion 1 of a tenth of the widths on images of 128 pixels."""
    batch_size: int = 32
    """Images per step."""
    rounds: int = 3
    """Rounds of 10 steps of each variant, after one step that is not counted."""
    variants: tuple[Variant, ...] = get_args(Variant)
    """Which to time; `floor`, which the others are compared to, always is."""
    clock: Literal["wall", "cpu"] = "cpu"
    """`cpu` counts this process' own computing time: for models on the CPU of a busy machine."""
    output: str | None = None
    """File for the numbers; by default results/text-step-SHAPE-DEVICE.json beside this file."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if min(self.rounds, self.batch_size) < 1:
            raise ValueError("--rounds and --batch_size must be at least 1")


def a_tenth() -> DiffusionPipeline:
    """Stable Diffusion 1 of a tenth of the widths and random weights, with the emoji teacher's tokens."""
    torch.manual_seed(0)
    emoji = DiffusionPipeline.from_pretrained(EMOJI)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=emoji.text_encoder.config.hidden_size,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 24, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    parts = {**emoji.components, "unet": unet, "vae": vae}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


class Bench:
    """Teacher, encoders and data, which the variants share; each has its own student, all with the same weights."""

    def __init__(self, config: TextStepConfig, place: Path):
        self.batch_size, self.place = config.batch_size, place
        self.device = Run(self.options(), {}).device
        pipeline = DiffusionPipeline.from_pretrained(EMOJI) if config.shape == "emoji" else a_tenth()
        self.teacher = pipeline.unet.to(self.device).eval().requires_grad_(False)
        self.encoders = Encoders(pipeline).to(self.device)
        self.schedule = vkd.Schedule.of(training_schedule(pipeline.scheduler.config, "the teacher")).to(self.device)
        self.reduction = REDUCTIONS[STUDENTS[config.shape]]
        side = self.teacher.config.sample_size * self.encoders.factor
        self.images = load_images("emoji", ImageSpec(resolution=side, channels=3, with_captions=True))[0]
        self.views = Views([(side, side)])
        batch = next(self.draws(place / "kept").apart(self.batch_size, device=self.device))
        self.noise, self.timesteps, self.conditioning = batch["noise"], batch["timesteps"], batch["conditioning"]
        self.noisy = self.schedule.noisy(batch["sample"], self.noise, self.timesteps)

    def options(self, **changes: Any) -> TrainingOptions:
        """Options of a run without end, with one log line in each round."""
        given = {"train_batch_size": self.batch_size, "max_train_steps": 10**9, "checkpointing_steps": 10**9}
        given |= {"output_dir": str(self.place), "log_every_steps": STEPS_PER_ROUND, "lr_warmup_steps": 0}
        return TrainingOptions(**{**given, **changes})

    def draws(self, folder: Path | None) -> Draws:
        """What a run draws, of encodings in a folder or of live ones."""
        how = How(folder, False, 0.1, 64)
        samples = encode(self.images, self.views, self.encoders, how, lambda line: None)
        return Draws(samples, self.schedule.to("cpu"), seed=0, batch_size=self.batch_size)

    def student(self) -> Any:
        """A new student of the same weights as the others."""
        torch.manual_seed(1)
        return vkd.build_student(self.teacher, self.reduction).to(self.device).train()

    def floor_steps(self) -> Iterator[None]:
        """Forward and backward passes and the fastest optimizer, always on the same batch."""
        student = self.student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
        while True:
            prediction = call(student, self.noisy, self.timesteps, self.conditioning)
            with torch.no_grad():
                target = call(self.teacher, self.noisy, self.timesteps, self.conditioning)
            (F.mse_loss(prediction, self.noise) + F.mse_loss(prediction, target)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield

    def our_steps(self, variant: Variant) -> Iterator[None]:
        """Steps of recipes/train_student_unet.py with `--method vkd`, log lines and refreshes included."""
        student, name = self.student(), variant.replace(",", "").replace(" ", "-")
        features_weight = 0.0 if variant == "kept, no features" else 0.3
        # Features to the end, and few draws: their statistics do not change what a step costs.
        matching = MatchingOptions(calibration_samples=64, feature_weight=features_weight)
        pairs = pair_named_or_all(matching, student, self.teacher)
        teacher = vkd.FrozenTeacher(self.teacher, [pair.teacher for pair in pairs])
        options = self.options(output_dir=str(self.place / name))
        run = Run(options, {})
        run.folder.start({})
        draws = self.draws(None if variant == "live" else self.place / "kept")
        projected, features = build_projected_student(matching, student, teacher, pairs, draws, run)
        groups = vkd.parameter_groups(student, projected.projectors, options.adam_weight_decay)
        loop = Loop(run, projected, draws, average=student, parameter_groups=groups)
        loop.every(1, features.measure)
        for batch in loop:
            weights = features.weights(loop.step)
            losses = vkd.distillation_losses(
                loop.module, batch, schedule=self.schedule, teacher=teacher, weights=weights
            )
            loop.backward(losses)
            yield


def measure(bench: Bench, config: TextStepConfig) -> dict[str, Any]:
    """Time all variants in turn, step by step, and take the ratio to the floor within each round."""
    names = [name for name in get_args(Variant) if name in {*config.variants, "floor"}]
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    rounds: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        running = {name: bench.floor_steps() if name == "floor" else bench.our_steps(name) for name in names}
        for steps in running.values():
            timed(steps, bench.device, clock)
        for _ in range(config.rounds):
            seconds = dict.fromkeys(names, 0.0)
            for step in range(STEPS_PER_ROUND):
                for place in range(len(names)):  # each in each place
                    name = names[(place + step) % len(names)]
                    seconds[name] += timed(running[name], bench.device, clock)
            for name in names:
                rounds[name].append(seconds[name] / STEPS_PER_ROUND)
        for name in reversed(names):
            running[name].close()
    return {
        name: {
            "ratio_to_floor": quartiles([own / floor for own, floor in zip(found, rounds["floor"], strict=True)]),
            "seconds_per_step": quartiles(found),
        }
        for name, found in rounds.items()
    }


def main(config: TextStepConfig) -> None:
    """Build, time, show and write."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(config, Path(place))
        results = measure(bench, config)
    ratios = [f"{found['ratio_to_floor']['median']:.3f}" for found in results.values()]
    times = [f"{1000 * found['seconds_per_step']['median']:.1f}" for found in results.values()]
    print_columns(list(results), [("time / floor", ratios), ("ms", times)])
    write_results(
        Path(config.output or RESULTS / f"text-step-{config.shape}-{bench.device.type}.json"),
        {"variants": results},
        shape=config.shape,
        student=STUDENTS[config.shape],
        batch_size=bench.batch_size,
        clock=config.clock,
        threads=torch.get_num_threads(),
        num_rounds=config.rounds,
    )


if __name__ == "__main__":
    run_command(main, TextStepConfig, __doc__)
