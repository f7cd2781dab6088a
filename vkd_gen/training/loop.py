"""The mechanics around a training step: data, accumulation, clipping, EMA, metrics, checkpoints, previews, resume.

A recipe keeps what is its own, the loss:

    for batch in run.batches():
        run.backward(losses_of(run.model, batch))
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers import SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from vkd_gen.data import DrawBatches, Images, TrainingDraws
from vkd_gen.diffusion import to_timesteps
from vkd_gen.pictures import save_sample_grid
from vkd_gen.sampling import sample_images
from vkd_gen.training.options import TrainingOptions
from vkd_gen.training.run_folder import RunFolder, checkpoint_step


def make_accelerator(options: TrainingOptions, *, find_unused_parameters: bool = False) -> Accelerator:
    """The Accelerator that a recipe runs on, seeded.

    Args:
        options: of the run.
        find_unused_parameters: some steps leave trainable parameters without a gradient.

    Raises:
        ValueError: for a precision or a tracker that is not available here.
    """
    uses_mps = torch.backends.mps.is_available() and not torch.cuda.is_available()
    if uses_mps:
        print("running on the CPU: Apple's GPUs have no float64, which the statistics are taken in")
    try:
        accelerator = Accelerator(
            cpu=uses_mps,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            mixed_precision=options.mixed_precision,
            log_with=options.report_to,
            project_dir=options.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
    except (ImportError, ValueError) as error:
        reason = str(error) if options.report_to is None else f"--report_to {options.report_to}: {error}"
        raise ValueError(reason) from error
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    if options.report_to is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {options.report_to}: that tracker is not installed")
    set_seed(options.seed)  # the same on every process: they build the same models
    accelerator.wait_for_everyone()  # all have checked the run's folder before the first one writes to it
    return accelerator


def run_facts(accelerator: Accelerator, images: Images) -> dict[str, Any]:
    """What decides the result beside the flags: a resumed run must find the same."""
    facts = {
        "num_training_images": len(images),
        "num_processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
    }
    return facts if images.labels is None else {**facts, "num_classes": images.num_classes}


def fixed_batches(
    images: Images,
    noise_scheduler: SchedulerMixin,
    *,
    seed: int,
    num_draws: int,
    batch_size: int,
    device: torch.device,
    guidance_dropout: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Batches for calibration: draws that no training step makes, the same on every process.

    Args:
        images: training images.
        noise_scheduler: for the range of the timesteps.
        seed: of the run.
        num_draws: draws in all.
        batch_size: at a time.
        device: of the batches.
        guidance_dropout: share of labels to drop, as in training.

    Yields:
        What `TrainingRun.batches` does.
    """
    draws = TrainingDraws(images, seed=seed + 2**32, guidance_dropout=guidance_dropout)
    for first in range(0, num_draws, batch_size):
        items = [draws[draw] for draw in range(first, min(first + batch_size, num_draws))]
        yield _on_device(default_collate(items), noise_scheduler, device)


def _on_device(batch: dict[str, Tensor], noise_scheduler: SchedulerMixin, device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    moved["timesteps"] = to_timesteps(noise_scheduler, moved.pop("time"))
    if "class_labels" in moved:
        moved["conditioning"] = {"class_labels": moved.pop("class_labels")}
    return moved


class TrainingRun:
    """One run of a recipe on one or many processes.

    Everything that decides the result is a function of the step: draws by their number, the learning rate, the
    refreshes of projectors. A resumed run therefore ends exactly where the uninterrupted one does.

    Args:
        accelerator: from `make_accelerator`.
        options: of the run.
        folder: of the run.
        model: the one module that trains; `.after_step(step)` is called on it after each optimizer step if it has that.
        unet: the diffusers UNet inside `model` that is averaged, previewed and exported.
        parameter_groups: for AdamW.
        images: training images; with labels for a class-conditional UNet.
        noise_scheduler: the schedule that `unet` is trained on.
        guidance_dropout: share of labels that are replaced by "no class".
        config: everything the run was asked to do, for the trackers.
        score: the averaged UNet, in eval mode -> score -> value; called by all processes every `score_every_steps`.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        options: TrainingOptions,
        folder: RunFolder,
        model: nn.Module,
        unet: nn.Module,
        parameter_groups: list[dict[str, Any]],
        images: Images,
        noise_scheduler: SchedulerMixin,
        guidance_dropout: float = 0.0,
        config: Mapping[str, Any],
        score: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ):
        self._score = score
        self._scores: dict[str, str] = {}
        self.accelerator, self.options, self.folder = accelerator, options, folder
        self.unet, self.images, self.noise_scheduler = unet, images, noise_scheduler
        self.guidance_dropout = guidance_dropout
        self.step = 0
        self._bare_model = model
        optimizer = torch.optim.AdamW(parameter_groups, lr=options.learning_rate)
        self.learning_rate = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        unet.to(accelerator.device)
        self.ema = None
        if options.ema_max_decay:
            self.ema = EMAModel(
                unet.parameters(), decay=options.ema_max_decay, use_ema_warmup=True, power=0.75, foreach=True
            )
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        # Not prepared: it steps once per optimizer step, however many processes there are.
        accelerator.register_for_checkpointing(self.learning_rate)
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._checked_gradients = False
        if options.report_to is not None:
            plain = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
            accelerator.init_trackers("vkd-gen", config=plain)
        self._started = time.perf_counter()
        set_seed(options.seed, device_specific=True)  # from here on for what is random inside the model, as dropout
        self._resume()
        self._first_step = self.step

    def _resume(self) -> None:
        checkpoint = self.folder.resume_point(self.options.resume_from_checkpoint)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
            if self.ema is not None:
                self.ema.to(self.accelerator.device)  # accelerate loads what is registered to the CPU
            self.step = checkpoint_step(checkpoint)
            self.accelerator.print(f"going on from {checkpoint}")
        if self.accelerator.is_main_process:
            self.folder.cut_metrics(self.step)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches for one forward pass each, until the run has made its steps.

        Yields:
            `sample` and `noise`, `[B, C, H, W]` float32 on the device, and `timesteps`, `[B]` int64; for images with
            labels also `conditioning`, the mapping of `class_labels` to `[B]` int64.
        """
        options, accelerator = self.options, self.accelerator
        draws = DrawBatches(
            first_step=self.step,
            num_steps=options.max_train_steps,
            batch_size=options.train_batch_size,
            accumulation_steps=options.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        loader = DataLoader(
            TrainingDraws(
                self.images,
                seed=options.seed,
                random_flip=options.random_flip,
                guidance_dropout=self.guidance_dropout,
            ),
            batch_sampler=draws,
            num_workers=options.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # the global one, which a resume restores, is left alone
        )
        self._progress = tqdm(
            total=options.max_train_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
            disable=not accelerator.is_local_main_process,
        )
        self.model.train()
        self._since = time.perf_counter()
        for batch in loader:
            with accelerator.accumulate(self.model):
                yield _on_device(batch, self.noise_scheduler, accelerator.device)
            if accelerator.sync_gradients:
                self._after_step()
        self._progress.close()

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Backward of `losses["total"]`; on a step's last forward pass also the optimizer step.

        Args:
            losses: scalars; all are logged as means over the passes since the last log line.
        """
        self.accelerator.backward(losses["total"])
        if not self._checked_gradients:
            self._warn_of_missing_gradients()
        for name, value in losses.items():
            self._sums[f"loss/{name}"] = self._sums.get(f"loss/{name}", 0) + value.detach()
        self._passes += 1
        if self.accelerator.sync_gradients and self.options.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
            self._sums["gradient_norm"] = self._sums.get("gradient_norm", 0) + norm.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _warn_of_missing_gradients(self) -> None:
        """Once, after the first backward.

        A parameter that nothing reaches is a mistake in what was asked for, or in what compiled it: torch 2.13's
        compiler loses the gradients of convolutions on a CPU.
        """
        self._checked_gradients = True
        named = [
            (name, parameter) for name, parameter in self._bare_model.named_parameters() if parameter.requires_grad
        ]
        missing = [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()]
        if missing:
            self.accelerator.print(
                f"warning: {len(missing)} of {len(named)} parameters got no gradient in the first step, such as "
                f"{', '.join(missing[:3])}"
            )

    def _after_step(self) -> None:
        options = self.options
        self.step += 1
        self.learning_rate.step()
        if self.ema is not None:
            self.ema.step(self.unet.parameters())
        if hasattr(self._bare_model, "after_step"):
            self._bare_model.after_step(self.step)
        last = self.step == options.max_train_steps
        if self.step % options.log_every_steps == 0 or last:
            self._log()
        self._progress.update()
        if options.preview_every_steps and self.step % options.preview_every_steps == 0:
            self.on_main_process(self._save_preview)
        if options.score_every_steps and self.step % options.score_every_steps == 0:
            self._log_scores()
        if self.step % options.checkpointing_steps == 0 or last:
            self.save_checkpoint()

    def _log(self) -> None:
        names = sorted(self._sums)
        totals = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float64).cpu() for name in names])
        totals = self.accelerator.reduce(totals.to(self.accelerator.device, torch.float32), reduction="mean")
        seconds = time.perf_counter() - self._since
        steps = self._passes / self.options.gradient_accumulation_steps
        num_images = self._passes * self.options.train_batch_size * self.accelerator.num_processes
        line = {
            name: total / (steps if name == "gradient_norm" else self._passes)
            for name, total in zip(names, totals.tolist(), strict=True)
        }
        line |= {"learning_rate": self.learning_rate.get_last_lr()[0], "images_per_second": num_images / seconds}
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": self.step, **line})
        self.accelerator.log(line, step=self.step)
        shown = {name.removeprefix("loss/"): f"{value:.4f}" for name, value in line.items() if _is_shown(name)}
        self._progress.set_postfix(
            {**shown, "img/s": f"{line['images_per_second']:.0f}", **self._scores}, refresh=False
        )
        self._sums, self._passes, self._since = {}, 0, time.perf_counter()

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`; it appears under that name only once it is whole."""
        path = self.folder.path / f"checkpoint-{self.step}"
        if path.exists():
            return
        temporary = path.with_name("." + path.name)
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(temporary, path)
            self.folder.remove_old_checkpoints(self.options.checkpoints_total_limit)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The averaged weights in the UNet, and the UNet in eval mode, for as long as the context lasts."""
        self.unet.eval()
        if self.ema is not None:
            self.ema.store(self.unet.parameters())
            self.ema.copy_to(self.unet.parameters())
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.unet.parameters())
            self.model.train()

    def _save_preview(self) -> None:
        with self.averaged_weights():
            images = sample_images(self.unet, self.noise_scheduler, range(32), batch_size=self.options.eval_batch_size)
        save_sample_grid({f"step {self.step}": images}, self.folder.path / "previews" / f"step-{self.step:06d}.png")

    def _log_scores(self) -> None:
        if self._score is None:
            return
        with self.averaged_weights():
            scores = {f"score/{name}": value for name, value in self._score(self.unet).items()}
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": self.step, **scores})
        self.accelerator.log(scores, step=self.step)
        names = [name for name in scores if name.startswith("score/fid") and "held_out" not in name]
        self._scores = {name.removeprefix("score/"): f"{scores[name]:.2f}" for name in names}
        self._since = time.perf_counter()  # the time of scoring is not the training's

    def finish(self) -> nn.Module:
        """Put the averaged weights into the UNet and return it, in eval mode; the processes stay together."""
        self.accelerator.wait_for_everyone()
        if self.ema is not None:
            self.ema.copy_to(self.unet.parameters())
        return self.unet.eval()

    def end(self) -> None:
        """End the trackers and the processes' connection: the last call of a recipe."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def cost(self) -> str:
        """What the steps made since this process started took, for the model card."""
        device = torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "CPU"
        seconds = time.perf_counter() - self._started
        return (
            f"{self.step - self._first_step} steps in {seconds / 60:.1f} minutes on {self.accelerator.num_processes} x "
            f"{device}, {self.accelerator.mixed_precision} mixed precision"
        )

    def on_main_process(self, action: Callable[[], Any]) -> None:
        """Run `action` on the main process while the others wait."""
        if self.accelerator.is_main_process:
            action()
        self.accelerator.wait_for_everyone()


def _is_shown(name: str) -> bool:
    return name.startswith("loss/") and name.count("/") == 1
