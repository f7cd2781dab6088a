"""One training step: the student alone, with its teacher, as peers write it, and as this package makes it, in one run.

python benchmarks/step.py
python benchmarks/step.py --shape unet-32 --rounds 5
"""

import contextlib
import copy
import io
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, ModelMixin
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vkd_gen as vkd
import vkd_gen.data
import vkd_gen.losses
import vkd_gen.projectors
from vkd_gen.data import Images
from vkd_gen.distillation import predict
from vkd_gen.evaluation.cost import LiveBytes
from vkd_gen.provenance import environment, write_json
from vkd_gen.students.build import unet_class
from vkd_gen.students.specs import TEACHERS
from vkd_gen.training.accelerator import make_accelerator
from vkd_gen.training.command_line import run_command
from vkd_gen.training.loop import TrainingRun, fixed_batches
from vkd_gen.training.matching import build_projected_student, pair_named_or_all, resolve_matching
from vkd_gen.training.options import MatchingOptions, TrainingOptions
from vkd_gen.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_ROUND = 10
"""As many as there are between two refreshes of the projectors: each round holds one, and one log line."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What to time, and for how long."""

    shape: Literal["digits", "unet-32", "ddpm-cifar10-32", "stable-diffusion-1"] = "digits"
    """Teacher, student and batch; see SHAPES."""
    batch_size: int | None = None
    """Images per step; by default the shape's."""
    resolution: int | None = None
    """Height and width of the samples; by default the shape's."""
    width: int | None = None
    """Channels of the teacher's first stage, the others in proportion; by default the shape's."""
    num_pairs: int | None = None
    """Layer pairs, the first ones; by default all."""
    rounds: int = 5
    """Rounds of 10 steps of each variant; the first one more is not counted."""
    seconds: float = 100.0
    """Start no further round after this time."""
    variants: tuple[str, ...] = ()
    """Which to time, such as `b d`; the floor `b` is always among them. By default all."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the student, and precision of the teacher."""
    compile: str | None = None
    """Backend of torch.compile for students and teachers, such as inductor; the gradients are compared with those
    without it first, and the run ends if they differ."""
    threads: int = 1
    """Of the CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu` counts what this process computes, whoever else does: for a step on the CPU of a busy machine."""
    output: str | None = None
    """File for the numbers; by default results/step-SHAPE-DEVICE.json beside this file, and a plot of the same name."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Models and batch of one size.

    Attributes:
        teacher: configuration of a UNet.
        reduction: from teacher to student.
        batch_size: images per step.
    """

    teacher: dict[str, Any]
    reduction: vkd.Reduction
    batch_size: int


UNET_32 = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}
SHAPES = {
    "digits": Shape(
        teacher=json.loads((ROOT / "recipes/assets/digits-teacher/unet/config.json").read_text()),
        reduction=vkd.Reduction(width=0.5),
        batch_size=128,
    ),
    "unet-32": Shape(teacher=UNET_32, reduction=vkd.Reduction(width=0.5), batch_size=16),
    "ddpm-cifar10-32": Shape(teacher=TEACHERS["ddpm-cifar10-32"], reduction=vkd.REDUCTIONS["ddpm-20m"], batch_size=128),
    "stable-diffusion-1": Shape(
        teacher=TEACHERS["stable-diffusion-1"], reduction=vkd.Reduction(width=0.5), batch_size=8
    ),
}
"""unet-32 has a teacher of about 1 M parameters; the last two are for a GPU."""


def sized(teacher: dict[str, Any], resolution: int | None, width: int | None) -> dict[str, Any]:
    """A teacher's configuration for samples of another size, and of another width."""
    channels = teacher["block_out_channels"]
    scaled = [count * (width or channels[0]) // channels[0] for count in channels]
    return {**teacher, "sample_size": resolution or teacher["sample_size"], "block_out_channels": scaled}


@dataclass(frozen=True)
class Latents:
    """Stored samples of any number of channels, as `TrainingDraws` reads `Images`."""

    samples: Tensor
    labels: None = None
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        """Sample `index`, `[C, H, W]`."""
        return self.samples[index]


def random_images(config: dict[str, Any]) -> Images | Latents:
    """512 samples of the size that a UNet takes; 8-bit pictures if they have one or three channels."""
    size, channels = config["sample_size"], config.get("in_channels", 4 if "cross_attention_dim" in config else 3)
    if channels not in (1, 3):
        return Latents(torch.randn(512, channels, size, size))
    shape = (512, size, size) if channels == 1 else (512, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return Images(lambda index: Image.fromarray(pixels[index]), size, channels, "noise", np.arange(len(pixels)))


class Bench:
    """Teacher, data and everything else that the variants share; each has a student of its own, of equal weights."""

    def __init__(self, config: StepConfig, place: Path):
        self.config, self.shape, self.place = config, SHAPES[config.shape], place
        self.batch_size = config.batch_size or self.shape.batch_size
        teacher = sized(self.shape.teacher, config.resolution, config.width)
        torch.manual_seed(0)
        self.accelerator = make_accelerator(self.options())
        self.device = self.accelerator.device
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.noise_scheduler = DDPMScheduler()
        self.schedule = vkd.Schedule.of(self.noise_scheduler).to(self.device)
        with self.device:
            self.teacher_unet = unet_class(teacher).from_config(teacher)
        self.teacher_unet = nn.Module.to(self.teacher_unet, self.dtype).eval().requires_grad_(False)
        with torch.device("cpu"):
            self.student_weights = vkd.build_student(self.teacher_unet, self.shape.reduction).state_dict()
        self.pairs = vkd.pair_layers(self.student(), self.teacher_unet)[: config.num_pairs]
        self.images = random_images(dict(self.teacher_unet.config))
        self.conditioning: dict[str, Tensor] = {}
        if "cross_attention_dim" in self.teacher_unet.config:
            width = self.teacher_unet.config.cross_attention_dim
            self.conditioning["encoder_hidden_states"] = torch.randn(self.batch_size, 77, width, device=self.device)
        samples = torch.stack([self.images[index % len(self.images)] for index in range(self.batch_size)])
        self.sample = samples.to(self.device)
        self.noise = torch.randn_like(self.sample)
        self.timesteps = torch.randint(1000, (self.batch_size,), device=self.device)
        self.noisy = self.schedule.noisy(self.sample, self.noise, self.timesteps)
        if config.compile:
            self.teacher_unet.compile(backend=config.compile)

    def options(self, **changes: Any) -> TrainingOptions:
        """Of a run that never ends, with the log line and the refresh once a round."""
        given = {"train_batch_size": self.batch_size, "max_train_steps": 10**9, "checkpointing_steps": 10**9}
        given |= {"log_every_steps": STEPS_PER_ROUND, "mixed_precision": self.config.mixed_precision}
        return TrainingOptions(**{"output_dir": str(self.place), **given, **changes})

    def student(self) -> ModelMixin:
        """A new student of the same weights as the others."""
        with self.device:
            student = vkd.build_student(self.teacher_unet, self.shape.reduction)
        student.load_state_dict(self.student_weights)
        return student.train()

    def compiled(self, student: ModelMixin) -> ModelMixin:
        """The student, compiled in place where that is asked for."""
        if self.config.compile:
            student.compile(backend=self.config.compile)
        return student

    def autocast(self) -> contextlib.AbstractContextManager:
        """Of the student's forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def teacher_prediction(self, unet: ModelMixin, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Without gradients."""
        conditioning = {name: value.to(self.dtype) for name, value in self.conditioning.items()}
        with torch.no_grad():
            return predict(unet, noisy.to(self.dtype), timesteps, conditioning).float()

    # ---- the floors

    def floor_steps(self, *, with_teacher: bool) -> Iterator[None]:
        """Forward, backward and the fastest optimizer on one batch that is there: nothing else."""
        student = self.compiled(self.student())
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
        while True:
            with self.autocast():
                prediction = predict(student, self.noisy, self.timesteps, self.conditioning).float()
            loss = F.mse_loss(prediction, self.noise)
            if with_teacher:
                loss = loss + F.mse_loss(
                    prediction, self.teacher_prediction(self.teacher_unet, self.noisy, self.timesteps)
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield

    # ---- as peers write it

    def peer_steps(self) -> Iterator[None]:
        """What scripts for distilling diffusion UNets have in common.

        Features in dictionaries that hooks fill by name and nothing empties, free 1x1 convolutions, float32 copies for
        the loss, a wait for the device per logged loss, noise and timesteps drawn on the CPU, torch's default AdamW and
        a moving average parameter by parameter.
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
        if self.config.compile:
            teacher_unet.compile(backend=self.config.compile)
        self.compiled(student)
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
                with self.autocast():
                    prediction = predict(student, noisy, timesteps, self.conditioning).float()
                    teacher_prediction = self.teacher_prediction(teacher_unet, noisy, timesteps)
                    losses = [F.mse_loss(prediction, noise), F.mse_loss(prediction, teacher_prediction)]
                    losses += [
                        F.mse_loss(
                            connector(captured["student"][pair.student]).float(),
                            captured["teacher"][pair.teacher].float(),
                        )
                        for pair, connector in zip(self.pairs, connectors, strict=True)
                    ]
                loss = losses[0] + losses[1] + 0.3 * sum(losses[2:])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                for mean, parameter in zip(average, student.parameters(), strict=True):
                    mean.sub_(0.001 * (mean - parameter.detach()))
                _ = [value.item() for value in (loss, *losses)]
                yield

    # ---- as this package makes it

    def draws(self, number: int) -> Iterator[dict[str, Any]]:
        """Batches that no step trains on, as recipes calibrate on."""
        options = {"seed": 0, "batch_size": self.batch_size, "device": self.device}
        for batch in fixed_batches(self.images, self.schedule, number, **options):
            yield {**batch, **self.conditioning_of(len(batch["sample"]))}

    def conditioning_of(self, number: int) -> dict[str, dict[str, Tensor]]:
        """What a batch of so many samples has beside them."""
        given = {name: value[:number] for name, value in self.conditioning.items()}
        return {"conditioning": given} if given else {}

    def our_steps(
        self,
        name: str,
        *,
        matching_changes: Mapping[str, Any] = MappingProxyType({}),
        change: Callable[[TrainingRun], None] = lambda run: None,
        memory_format: torch.memory_format = torch.contiguous_format,
        **options_changes: Any,
    ) -> Iterator[None]:
        """The loop of recipes/train_student_unet.py with `--method vkd`: one step, log lines and refreshes included.

        Looks at gradients are the recipe's too, once in 200 steps: no round here sees one.
        """
        student, teacher_unet = self.student(), self.teacher_unet
        if memory_format != torch.contiguous_format:
            student = student.to(memory_format=memory_format)
            teacher_unet = copy.deepcopy(teacher_unet).to(memory_format=memory_format)
        chosen = tuple(f"{pair.student}:{pair.teacher}" for pair in self.pairs)
        given = {"layer_pairs": chosen} if chosen else {"feature_weight": 0.0}
        # Few draws: only the cost counts, and nothing here is normalised by what they say.
        matching = resolve_matching(MatchingOptions(**{"calibration_samples": 64, **given, **matching_changes}))
        pairs = pair_named_or_all(matching, student, teacher_unet)
        teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs])
        options = self.options(output_dir=str(self.place / name), **options_changes)
        folder = RunFolder(options.output_dir)
        accelerator = make_accelerator(options)
        folder.start({})
        projected, balance = build_projected_student(
            matching,
            student,
            teacher,
            pairs,
            self.draws,
            self.schedule,
            num_steps=options.max_train_steps,
            calibration=folder.path / "calibration.safetensors",
            resumes=False,
            device=self.device,
        )
        run = TrainingRun(
            accelerator=accelerator,
            options=options,
            folder=folder,
            model=projected,
            unet=student,
            parameter_groups=vkd.parameter_groups(student, projected.projectors, options.adam_weight_decay),
            images=self.images,
            noise_scheduler=self.noise_scheduler,
            config={},
            diagnose=balance.look,
        )
        self.compiled(student)
        change(run)
        for batch in run.batches():
            losses = vkd.distillation_losses(
                run.model,
                {**batch, **self.conditioning_of(len(batch["sample"]))},
                schedule=self.schedule,
                teacher=teacher,
                weights=balance.weights(run.step),
                feature_loss_kind=matching.feature_loss or "mse",
            )
            run.backward(losses)
            yield

    def variants(self) -> dict[str, Callable[[], Iterator[None]]]:
        """Name -> steps without end. Those after d are d with one thing changed."""
        return {
            "a": lambda: self.floor_steps(with_teacher=False),
            "b": lambda: self.floor_steps(with_teacher=True),
            "c": self.peer_steps,
            "d": lambda: self.our_steps("d"),
            "images decoded each time": lambda: patched(self.our_steps("images"), vkd_gen.data, "KEPT_BYTES", 0),
            "default AdamW": lambda: self.our_steps("adamw", change=unfused),
            "averages one by one": lambda: self.our_steps("ema", change=averaged_one_by_one),
            "differences in losses": lambda: patched(
                self.our_steps("losses"), vkd_gen.losses, "squared_errors", squared_differences
            ),
            "refresh by SVD": lambda: patched(self.our_steps("svd"), vkd_gen.projectors, "procrustes", svd_procrustes),
            "channels last": lambda: self.our_steps("channels", memory_format=torch.channels_last),
            "refresh each step": lambda: self.our_steps("refresh", matching_changes={"projector_refresh_steps": 1}),
            "log each step": lambda: self.our_steps("log", log_every_steps=1),
            "no statistics": lambda: self.our_steps("statistics", change=without_statistics),
            "no guard": lambda: self.our_steps("guard", change=unguarded),
            "no features": lambda: self.our_steps(
                "features", matching_changes={"layer_pairs": (), "feature_weight": 0.0}
            ),
        }

    def check_gradients(self) -> float:
        """Largest distance of a parameter's gradient with the compiler from the one without, relative to its norm.

        Raises:
            ValueError: if it is above 1e-3 (2e-1 in bf16, where two orders of summation are further apart).
        """
        gradients = []
        for student in (self.student(), self.compiled(self.student())):
            with self.autocast():
                prediction = predict(student, self.noisy, self.timesteps, self.conditioning).float()
            F.mse_loss(prediction, self.noise).backward()
            gradients.append({name: value.grad for name, value in student.named_parameters()})
        plain, compiled = gradients
        largest = max(value.norm() for value in plain.values())
        errors = {
            name: float((compiled[name] - value).norm() / value.norm().clamp(min=1e-3 * largest))
            if compiled[name] is not None
            else 1.0
            for name, value in plain.items()
        }
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= (2e-1 if self.dtype == torch.bfloat16 else 1e-3):
            raise ValueError(
                f"{self.config.compile} computes another gradient of {worst}, {errors[worst]:.1g} off in relation to "
                "its norm: nothing to time here"
            )
        return errors[worst]


# ---- what d is without


def patched(steps: Iterator[None], *changes: Any) -> Iterator[None]:
    """The steps with attributes replaced while they run; object, attribute and value in turn."""
    while True:
        with contextlib.ExitStack() as stack:
            for owner, name, value in zip(changes[::3], changes[1::3], changes[2::3], strict=True):
                stack.enter_context(mock.patch.object(owner, name, value))
            next(steps)
        yield


def unfused(run: TrainingRun) -> None:
    """AdamW as torch makes it where nothing is asked for: parameter by parameter on a CPU, foreach on a GPU."""
    for group in run.optimizer.param_groups:
        group["fused"] = None


def averaged_one_by_one(run: TrainingRun) -> None:
    """The moving average as diffusers makes it where nothing is asked for."""
    run.ema.foreach = False
    run._average = lambda: run.ema.step(run.unet.parameters())


def without_statistics(run: TrainingRun) -> None:
    """Projectors that stay as they started."""
    for projector in run._bare_model.projectors:
        projector._accumulates = False
        projector.after_step = lambda _step: None


def unguarded(run: TrainingRun) -> None:
    """Clip and step whatever the numbers are, and never ask for the signals."""

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(run._parameters, run.options.max_grad_norm)
        run._stepping.step()
        run._average()

    run._make_or_skip_step = step


def squared_differences(prediction: Tensor, target: Tensor) -> Tensor:
    """Each sample's mean squared error in two operations."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def svd_procrustes(cross_covariance: Tensor) -> Tensor:
    """The textbook's solution."""
    left, _, right = torch.linalg.svd(cross_covariance.double(), full_matrices=False)
    return (left @ right).to(cross_covariance.dtype)


def timed(steps: Iterator[None], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one step."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = clock()
    next(steps)
    synchronize()
    return clock() - start


def peak_bytes(steps: Iterator[None], device: torch.device) -> int:
    """Bytes of tensors that a step adds to those which are there all the time, at most, over two steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        next(steps)
        next(steps)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        next(steps)
        next(steps)
    return live.peak


def captured_bytes(bench: Bench) -> int:
    """Of the paired features of a batch, the student's and the teacher's, as they are captured."""
    entries = sum(math.prod(pair.student_shape) + math.prod(pair.teacher_shape) for pair in bench.pairs)
    return entries * bench.batch_size * bench.dtype.itemsize


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def measure(bench: Bench, config: StepConfig) -> dict[str, Any]:
    """Time all variants in turn, step by step, and take the ratio to the floor within each round."""
    makers = bench.variants()
    unknown = set(config.variants) - set(makers)
    if unknown:
        raise ValueError(f"there is no variant {', '.join(sorted(unknown))}; choose among {', '.join(makers)}")
    names = [name for name in makers if not config.variants or name in {*config.variants, "b"}]
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    running = {}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for name in names:
            running[name] = makers[name]()
            timed(running[name], bench.device, clock)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for number in range(config.rounds + 1):
        seconds = dict.fromkeys(names, 0.0)
        for step in range(STEPS_PER_ROUND):
            for place in range(len(names)):  # each in each place
                name = names[(place + step) % len(names)]
                seconds[name] += timed(running[name], bench.device, clock)
        if number:
            for name in names:
                rounds[name].append(seconds[name] / STEPS_PER_ROUND)
        if number and time.perf_counter() - start > config.seconds:
            break
    results = {}
    for name in names:
        ratios = [own / floor for own, floor in zip(rounds[name], rounds["b"], strict=True)]
        per_step = quartiles(rounds[name])
        results[name] = {
            "ratio_to_b": quartiles(ratios),
            "seconds_per_step": per_step,
            "images_per_second": bench.batch_size / per_step["median"],
            "peak_bytes_of_a_step": peak_bytes(running[name], bench.device),
        }
    for name in reversed(names):
        running[name].close()
    return {"variants": results, "num_rounds": len(rounds["b"])}


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    """Ratios to the floor as bars, the quartiles as lines across their ends."""
    names = list(results)
    ratios = [results[name]["ratio_to_b"] for name in names]
    middle = np.array([ratio["median"] for ratio in ratios])
    spread = np.array([[ratio["median"] - ratio["low"], ratio["high"] - ratio["median"]] for ratio in ratios]).T
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.35 * len(names)))
    axes.barh(names, middle, xerr=spread, color=["#4477aa" if name in "abd" else "#bbbbbb" for name in names])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="time of a step, in steps of b", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(config: StepConfig) -> None:
    """Build, compare gradients if something is compiled, time, show and write."""
    sizes = (config.rounds, config.threads, config.batch_size, config.resolution, config.width)
    if min(1 if size is None else size for size in sizes) < 1 or (config.num_pairs or 0) < 0:
        raise ValueError(
            "--rounds, --threads, --batch_size, --resolution and --width must be at least 1, --num_pairs at least 0"
        )
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(config, Path(place))
        gradient_error = bench.check_gradients() if config.compile else None
        results = measure(bench, config)
    parameters = {
        "teacher": sum(value.numel() for value in bench.teacher_unet.parameters()),
        "student": sum(value.numel() for value in bench.student_weights.values()),
    }
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    table = Table("variant", "time / b", "quartiles", "ms", "images/s", "MB a step adds")
    for name, result in results["variants"].items():
        ratio = result["ratio_to_b"]
        table.add_row(
            name,
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} {ratio['high']:.3f}",
            f"{1000 * result['seconds_per_step']['median']:.1f}",
            f"{result['images_per_second']:.0f}",
            f"{result['peak_bytes_of_a_step'] / 1e6:.1f}",
        )
    Console(width=100).print(table)
    captured = captured_bytes(bench)
    if "d" in results["variants"]:
        peaks = {name: result["peak_bytes_of_a_step"] for name, result in results["variants"].items()}
        share = peaks["d"] / (peaks["b"] + captured)
        print(f"d adds {share:.3f} of what b and the captured features take ({captured / 1e6:.1f} MB)")
    stem = Path(__file__).parent / "results" / f"step-{config.shape}-{bench.device.type}"
    output = Path(config.output) if config.output else stem.with_name(stem.name + ".json")
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = {
        "shape": config.shape,
        "parameters": parameters,
        "batch_size": bench.batch_size,
        "layer_pairs": [f"{pair.student}:{pair.teacher}" for pair in bench.pairs],
        "mixed_precision": config.mixed_precision,
        "sample_size": bench.sample.shape[-1],
        "teacher_channels": list(bench.teacher_unet.config.block_out_channels),
        "captured_feature_bytes": captured,
        "compile": config.compile,
        "largest_gradient_error_of_the_compiler": gradient_error,
        "device": device,
        "clock": config.clock,
        "threads": torch.get_num_threads(),
        "num_rounds": results["num_rounds"],
        "steps_per_round": STEPS_PER_ROUND,
        "peak_resident_bytes_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "environment": environment(),
    }
    write_json(output, {"variants": results["variants"], "protocol": protocol})
    plot(results["variants"], f"{config.shape}, {device}, {config.mixed_precision}", output.with_suffix(".png"))
    print(f"written to {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(main, StepConfig, __doc__)
