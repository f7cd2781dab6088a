"""One training step: the student alone, with its teacher, as peers write it, and as this package makes it, in one run.

python benchmarks/step.py
python benchmarks/step.py --shape unet-32 --rounds 5
"""

import contextlib
import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, ModelMixin
from PIL import Image
from torch import Tensor, nn

import vkd_gen as vkd
from measuring import RESULTS, write_results
from vkd_gen.cli import run_command
from vkd_gen.data.draws import Draws
from vkd_gen.data.images import Images
from vkd_gen.data.samples import Pixels
from vkd_gen.evaluation.cost import LiveBytes
from vkd_gen.evaluation.tables import print_columns
from vkd_gen.families.classes import network_class
from vkd_gen.families.unet import call
from vkd_gen.training.loop import Loop
from vkd_gen.training.matching import build_projected_student, pair_named_or_all
from vkd_gen.training.methods import MatchingOptions
from vkd_gen.training.options import TrainingOptions
from vkd_gen.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 512
Variant = Literal["b", "c", "d", "refresh each step", "log each step", "no features"]
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "d": ({}, {}),
    "refresh each step": ({"projector_refresh_steps": 1}, {}),
    "log each step": ({}, {"log_every_steps": 1}),
    "no features": ({"feature_weight": 0.0}, {}),
}
"""The recipe's step, and the recipe's step with one thing changed: changes to MatchingOptions and TrainingOptions."""
STEPS_PER_ROUND = 10
"""Each round has one refresh of the projectors and one log line."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What to time, and for how long."""

    shape: Literal["digits", "unet-32"] = "digits"
    """Teacher, student and batch; see SHAPES."""
    batch_size: int | None = None
    """Images per step; by default the shape's."""
    rounds: int = 5
    """Rounds of 10 steps of each variant, after one that is not counted."""
    variants: tuple[Variant, ...] = get_args(Variant)
    """Which to time; `b`, which the others are compared to, always is."""
    threads: int = 1
    """CPU threads."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu` counts this process' own computing time: for models on the CPU of a busy machine."""
    output: str | None = None
    """File for the numbers; by default results/step-SHAPE-DEVICE.json beside this file."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if min(self.rounds, self.threads, 1 if self.batch_size is None else self.batch_size) < 1:
            raise ValueError("--rounds, --threads and --batch_size must be at least 1")


UNET_32 = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}
DIGITS = json.loads((ROOT / "recipes/assets/digits-teacher/unet/config.json").read_text())
SHAPES: dict[str, tuple[dict[str, Any], int]] = {"digits": (DIGITS, 128), "unet-32": (UNET_32, 16)}
"""The teacher's configuration and the batch size. The student is half as wide."""


def random_images(config: dict[str, Any]) -> Images:
    """Images of random pixels, of the size that a UNet takes."""
    size, channels = config["sample_size"], config["in_channels"]
    shape = (NUM_IMAGES, size, size) if channels == 1 else (NUM_IMAGES, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return Images(lambda index: Image.fromarray(pixels[index]), size, channels, "noise", np.arange(len(pixels)))


class Bench:
    """Teacher and data, which the variants share; each variant has its own student, all with the same weights."""

    def __init__(self, config: StepConfig, place: Path):
        teacher_config, batch_size = SHAPES[config.shape]
        self.batch_size, self.place = config.batch_size or batch_size, place
        torch.manual_seed(0)
        self.device = Run(self.options(), {}).device
        self.noise_scheduler = DDPMScheduler()
        self.schedule = vkd.Schedule.of(self.noise_scheduler).to(self.device)
        with self.device:
            self.teacher_unet = network_class(teacher_config).from_config(teacher_config)
        self.teacher_unet.eval().requires_grad_(False)
        with torch.device("cpu"):
            self.student_weights = vkd.build_student(self.teacher_unet, width=0.5).state_dict()
        self.pairs = vkd.pair_layers(self.student(), self.teacher_unet)
        self.images = random_images(dict(self.teacher_unet.config))
        self.sample = torch.stack([self.images[i % NUM_IMAGES] for i in range(self.batch_size)]).to(self.device)
        self.noise = torch.randn_like(self.sample)
        self.timesteps = torch.randint(1000, (self.batch_size,), device=self.device)
        self.noisy = self.schedule.noisy(self.sample, self.noise, self.timesteps)

    def options(self, **changes: Any) -> TrainingOptions:
        """Options of a run without end, with one log line in each round."""
        given = {"train_batch_size": self.batch_size, "max_train_steps": 10**9, "checkpointing_steps": 10**9}
        given |= {"output_dir": str(self.place), "log_every_steps": STEPS_PER_ROUND, "lr_warmup_steps": 0}
        return TrainingOptions(**{**given, **changes})

    def student(self) -> ModelMixin:
        """A new student of the same weights as the others."""
        with self.device:
            student = vkd.build_student(self.teacher_unet, width=0.5)
        student.load_state_dict(self.student_weights)
        return student.train()

    def floor_steps(self) -> Iterator[None]:
        """Variant b: forward and backward passes and the fastest optimizer, always on the same batch."""
        student = self.student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
        while True:
            prediction = call(student, self.noisy, self.timesteps)
            with torch.no_grad():
                target = call(self.teacher_unet, self.noisy, self.timesteps)
            (F.mse_loss(prediction, self.noise) + F.mse_loss(prediction, target)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield

    def peer_steps(self) -> Iterator[None]:
        """Variant c: what scripts for distilling diffusion UNets have in common.

        Hooks that fill dictionaries, free 1x1 convolutions, float32 copies for the loss, a wait for the device for each
        logged loss, noise drawn on the CPU, torch's default AdamW, a moving average parameter by parameter.
        """
        teacher_unet = copy.deepcopy(self.teacher_unet)
        student = self.student()
        captured: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}

        def record(side: str, name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                captured[side][name] = output[0] if isinstance(output, tuple) else output

            return hook

        for pair in self.pairs:
            student.get_submodule(pair.student).register_forward_hook(record("student", pair.student))
            teacher_unet.get_submodule(pair.teacher).register_forward_hook(record("teacher", pair.teacher))
        connectors = nn.ModuleList(nn.Conv2d(pair.student_channels, pair.teacher_channels, 1) for pair in self.pairs)
        connectors.to(self.device)
        parameters = [*student.parameters(), *connectors.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        average = [parameter.detach().clone() for parameter in student.parameters()]
        loader = torch.utils.data.DataLoader(self.images, batch_size=self.batch_size, shuffle=True, drop_last=True)
        while True:
            for sample in loader:
                noise = torch.randn(sample.shape).to(self.device)
                timesteps = torch.randint(1000, (len(sample),)).to(self.device)
                noisy = self.noise_scheduler.add_noise(sample.to(self.device), noise, timesteps)
                prediction = call(student, noisy, timesteps)
                with torch.no_grad():
                    teacher_prediction = call(teacher_unet, noisy, timesteps)
                losses = [F.mse_loss(prediction, noise), F.mse_loss(prediction, teacher_prediction)]
                for pair, connector in zip(self.pairs, connectors, strict=True):
                    feature = connector(captured["student"][pair.student]).float()
                    losses.append(F.mse_loss(feature, captured["teacher"][pair.teacher].float()))
                loss = losses[0] + losses[1] + 0.3 * sum(losses[2:])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                for mean, parameter in zip(average, student.parameters(), strict=True):
                    mean.sub_(0.001 * (mean - parameter.detach()))
                _ = [value.item() for value in (loss, *losses)]
                yield

    def our_steps(self, name: str, matching_changes: dict[str, Any], training: dict[str, Any]) -> Iterator[None]:
        """Variant d: steps of recipes/train_student_unet.py with `--method vkd`, log lines and refreshes included.

        The recipe's diagnostics of gradients come once in 200 steps: no round here has one.
        """
        student, teacher_unet = self.student(), self.teacher_unet
        # Few draws: their statistics do not change what a step costs.
        matching = MatchingOptions(calibration_samples=64, **matching_changes)
        pairs = pair_named_or_all(matching, student, teacher_unet)
        teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs])
        options = self.options(output_dir=str(self.place / name), **training)
        run = Run(options, {})
        run.folder.start({})
        draws = Draws(Pixels(self.images), self.schedule, seed=0, batch_size=self.batch_size)
        projected, features = build_projected_student(matching, student, teacher, pairs, draws, run)
        groups = vkd.parameter_groups(student, projected.projectors, options.adam_weight_decay)
        loop = Loop(run, projected, draws, average=student, parameter_groups=groups)
        loop.every(1, features.measure)
        for batch in loop:
            losses = vkd.distillation_losses(
                loop.module,
                batch,
                schedule=self.schedule,
                teacher=teacher,
                weights=features.weights(loop.step),
                feature_loss_kind=matching.feature_loss,
            )
            loop.backward(losses)
            yield

    def steps(self, variant: Variant) -> Iterator[None]:
        """Steps without end."""
        match variant:
            case "b":
                return self.floor_steps()
            case "c":
                return self.peer_steps()
            case _:
                return self.our_steps(variant, *OURS[variant])

    def captured_bytes(self) -> int:
        """Bytes of a batch's paired features, of student and teacher, as they are captured."""
        entries = sum(math.prod(pair.student_shape) + math.prod(pair.teacher_shape) for pair in self.pairs)
        return entries * self.batch_size * torch.float32.itemsize


def timed(steps: Iterator[None], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one step."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = clock()
    next(steps)
    synchronize()
    return clock() - start


def peak_bytes(steps: Iterator[None]) -> int:
    """The most bytes of tensors that two steps add to those which are there all the time."""
    with LiveBytes() as live:
        next(steps)
        next(steps)
    return live.peak


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def measure(bench: Bench, config: StepConfig) -> dict[str, Any]:
    """Time all variants in turn, step by step, and take the ratio to the floor within each round."""
    names = [name for name in get_args(Variant) if name in {*config.variants, "b"}]
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    running = {}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for name in names:
            running[name] = bench.steps(name)
            timed(running[name], bench.device, clock)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(config.rounds + 1):
        seconds = dict.fromkeys(names, 0.0)
        for step in range(STEPS_PER_ROUND):
            for place in range(len(names)):  # each in each place
                name = names[(place + step) % len(names)]
                seconds[name] += timed(running[name], bench.device, clock)
        for name in names if number else ():
            rounds[name].append(seconds[name] / STEPS_PER_ROUND)
    results = {}
    for name in names:
        ratios = [own / floor for own, floor in zip(rounds[name], rounds["b"], strict=True)]
        per_step = quartiles(rounds[name])
        results[name] = {
            "ratio_to_b": quartiles(ratios),
            "seconds_per_step": per_step,
            "images_per_second": bench.batch_size / per_step["median"],
            "peak_bytes_of_a_step": peak_bytes(running[name]),
        }
    for name in reversed(names):
        running[name].close()
    return results


def show(variants: dict[str, Any], captured: int) -> None:
    """A table, and the memory of a step of d beside b and the features."""
    rows = []
    for result in variants.values():
        ratio, milliseconds = result["ratio_to_b"], 1000 * result["seconds_per_step"]["median"]
        quarters = f"{ratio['low']:.3f} {ratio['high']:.3f}"
        speed, memory = result["images_per_second"], result["peak_bytes_of_a_step"] / 1e6
        rows.append([f"{ratio['median']:.3f}", quarters, f"{milliseconds:.1f}", f"{speed:.0f}", f"{memory:.1f}"])
    headings = ("time / b", "quartiles", "ms", "images/s", "MB a step adds")
    print_columns(list(variants), list(zip(headings, zip(*rows, strict=True), strict=True)))
    if "d" in variants:
        peaks = {name: result["peak_bytes_of_a_step"] for name, result in variants.items()}
        share = peaks["d"] / (peaks["b"] + captured)
        print(
            f"memory of a step of d: {share:.3f} of b's and the captured features' ({captured / 1e6:.1f} MB) together"
        )


def main(config: StepConfig) -> None:
    """Build, time, show and write."""
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(config, Path(place))
        results = measure(bench, config)
    show(results, bench.captured_bytes())
    write_results(
        Path(config.output or RESULTS / f"step-{config.shape}-{bench.device.type}.json"),
        {"variants": results},
        shape=config.shape,
        batch_size=bench.batch_size,
        layer_pairs=[f"{pair.student}:{pair.teacher}" for pair in bench.pairs],
        captured_feature_bytes=bench.captured_bytes(),
        device=torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU",
        clock=config.clock,
        threads=torch.get_num_threads(),
        num_rounds=config.rounds,
    )


if __name__ == "__main__":
    run_command(main, StepConfig, __doc__)
