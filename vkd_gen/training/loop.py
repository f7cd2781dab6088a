"""The mechanics around a training step: data, accumulation, clipping, EMA, metrics, checkpoints, previews, resume.

A recipe keeps what is its own, the loss:

    for batch in run.batches():
        run.backward(losses_of(run.model, batch))
"""

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, set_seed
from diffusers import SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vkd_gen.cli import USER_ERROR
from vkd_gen.data.draws import DrawBatches, StreamedDraws, TrainingDraws
from vkd_gen.data.images import Images
from vkd_gen.data.streaming import ImageStream, Position
from vkd_gen.files import own_name
from vkd_gen.pictures import save_sample_grid
from vkd_gen.provenance import only_warns
from vkd_gen.sampling import sample_images
from vkd_gen.schedule import Schedule
from vkd_gen.text import printable
from vkd_gen.training.accelerator import on_main_process
from vkd_gen.training.checkpoints import problem_of
from vkd_gen.training.guards import Flags, Watch, check_state
from vkd_gen.training.interruption import StopRequest, outlive_sigterm
from vkd_gen.training.options import TrainingOptions
from vkd_gen.training.run_folder import RunFolder, checkpoint_step, num_processes_of


def fixed_batches(
    images: Images,
    schedule: Schedule,
    num_draws: int,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    guidance_dropout: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Batches for calibration: draws that no training step makes, the same on every process.

    Args:
        images: training images.
        schedule: for the range of the timesteps.
        num_draws: draws in all.
        seed: of the run.
        batch_size: at a time.
        device: of the batches.
        guidance_dropout: share of labels to drop, as in training.

    Yields:
        What `TrainingRun.batches` does.
    """
    draws = TrainingDraws(images, seed=seed + 2**32, guidance_dropout=guidance_dropout)
    for first in range(0, num_draws, batch_size):
        batch = draws[range(first, min(first + batch_size, num_draws))]
        yield on_device(batch, schedule, device)


def on_device(batch: dict[str, Any], schedule: Schedule, device: torch.device) -> dict[str, Any]:
    """Draws as a batch for `distillation_losses`: times as timesteps, labels as conditioning."""
    moved: dict[str, Any] = send_to_device(batch, device, non_blocking=True)
    moved["timesteps"] = schedule.timesteps(moved.pop("time"))
    if "class_labels" in moved:
        moved["conditioning"] = {"class_labels": moved.pop("class_labels")}
    return moved


@dataclass(frozen=True)
class UnsettledStep:
    """An optimizer step of which the host does not know yet whether it was made or skipped.

    Attributes:
        number: of the step, from 1.
        flags: whether some process got SIGTERM, SIGINT, and a loss or gradient that is not finite; and behind them the
            losses that the progress line shows, summed over passes and processes: so they cost no wait of their own.
        losses: of the step, sums over its passes.
        timesteps: of its passes, `[B]` each.
        gradients: parameter -> norm of its gradient.
        gradient_norm: of all together.
    """

    number: int
    flags: Flags
    losses: Mapping[str, Tensor]
    timesteps: list[Tensor]
    gradients: Mapping[Tensor, Tensor]
    gradient_norm: Tensor


class TrainingRun:
    """One run of a recipe on one or many processes.

    Everything that decides the result is a function of the step: draws by their number, the learning rate, the
    refreshes of projectors. A resumed run therefore ends exactly where the uninterrupted one does.

    A step whose loss or gradient is not finite is skipped, on all processes: student, optimizer and moving average stay
    as they were. On a GPU the optimizer is told so there, and the host reads it a step later, when it has long arrived;
    what it reads also says whether some process was asked to stop, so that all stop at the same step. What depends on
    it (moving average, counts, messages, the end) waits for that: the step is settled. Elsewhere, for fp16, and for an
    optimizer without that way of skipping, each step is settled at once.

    Args:
        accelerator: from `make_accelerator`.
        options: of the run.
        folder: of the run.
        model: the one module that trains; `.after_step(step)` is called on it after each optimizer step if it has that.
        unet: the diffusers UNet inside `model` that is averaged, previewed and exported.
        parameter_groups: for AdamW.
        images: training images; with labels for a class-conditional UNet.
        noise_scheduler: the schedule that `unet` is trained on.
        random_flip: mirror half of the images.
        guidance_dropout: share of labels that are replaced by "no class".
        stream: to train on instead of `images`, which are its head then.
        config: everything the run was asked to do, for the trackers.
        score: the averaged UNet, in eval mode -> score -> value; called by all processes every `score_every_steps`.
        diagnose: step -> figure -> value, none where none are due; called by all processes after every step.
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
        random_flip: bool = False,
        guidance_dropout: float = 0.0,
        stream: ImageStream | None = None,
        config: Mapping[str, Any],
        score: Callable[[nn.Module], Mapping[str, float]] | None = None,
        diagnose: Callable[[int], Mapping[str, float]] | None = None,
    ):
        self._score, self._diagnose = score, diagnose
        self._shown: dict[str, str] = {}  # in the progress line, beside the losses
        self.accelerator, self.options, self.folder = accelerator, options, folder
        self.unet, self.images, self.noise_scheduler = unet, images, noise_scheduler
        self.schedule = Schedule.of(noise_scheduler).to(accelerator.device)
        self.random_flip, self.guidance_dropout, self.stream = random_flip, guidance_dropout, stream
        self._identity_of_images = self._look_at_images()
        self._positions = torch.tensor([Position()] * max(1, options.dataloader_num_workers))  # of the stream's readers
        self.step = 0
        self._bare_model = model
        optimizer = torch.optim.AdamW(parameter_groups, lr=options.learning_rate, fused=True)
        self.learning_rate = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # Only fp16 needs the wrapper's own step, and that looks for packages each time.
        self._stepping = optimizer if accelerator.scaler is None else self.optimizer
        unet.to(accelerator.device)
        self.ema = None
        if options.ema_max_decay:
            self.ema = EMAModel(
                unet.parameters(), decay=options.ema_max_decay, use_ema_warmup=True, power=0.75, foreach=True
            )
            self.ema.to(accelerator.device)
        self._averaged: list[Tensor] = list(unet.parameters())
        self._parameters = [parameter for group in parameter_groups for parameter in group["params"]]
        self._watch = Watch(model)
        self._stop = StopRequest()
        self._asked_to_stop = 0
        self._losses: dict[str, Tensor] = {}  # of this step: sums over its passes
        self._timesteps: list[Tensor] = []
        self._unsettled: UnsettledStep | None = None
        self._skipped_in_a_row = 0
        self._sums: dict[str, Tensor] = {}  # since the last log line: sums over the steps that were made
        self._num_summed: dict[str, int] = {}  # of how many steps: not all have every loss
        self._num_skipped = self._num_passes = 0
        self._checked_gradients = False
        if options.report_to is not None:
            plain = {
                name: printable(value) if isinstance(value, str) else value
                for name, value in config.items()
                if isinstance(value, int | float | str | bool)
            }
            accelerator.init_trackers("vkd-gen", config=plain, init_kwargs={"wandb": {"dir": str(folder.path)}})
        set_seed(options.seed, device_specific=True)  # from here on for what is random inside the model, as dropout
        self._resume()
        self._step_of_checkpoint = self.step
        is_fused = all(group["fused"] for group in optimizer.param_groups)  # not as an older checkpoint has it
        self._settles_late = accelerator.device.type == "cuda" and accelerator.scaler is None and is_fused

    def _resume(self) -> None:
        point = self.folder.resume_point(self.options.resume_from_checkpoint)
        choice = [None if point is None else str(point)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(choice)  # the first process has read every byte, the others sizes
        if choice[0] is not None:
            checkpoint = Path(choice[0])
            try:
                self.accelerator.load_state(str(checkpoint))
                self.accelerator.step = 0  # between two steps, however many passes they have
                self.step = checkpoint_step(checkpoint)
                self._load_own_state(checkpoint)
            except Exception as error:  # whole, but not of this run or this package: all kinds of errors
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{checkpoint} cannot be loaded: {reason}; resume from another one") from error
            self.accelerator.print(f"going on from {checkpoint}")
        if self.accelerator.is_main_process:
            self.folder.cut_metrics(self.step)
            self.folder.set_aside_after(self.step)

    def _load_own_state(self, checkpoint: Path) -> None:
        """What accelerate does not know of, and the random state where there is none for this process."""
        accelerator = self.accelerator
        state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        self.learning_rate.load_state_dict(state["learning_rate"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        if self._skipped_in_a_row:
            self._watch.start()
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(accelerator.device)
        before = num_processes_of(checkpoint)
        if before == accelerator.num_processes:
            sources = [accelerator.process_index]
        else:
            sources = list(range(before))
            set_seed(self.options.seed + self.step, device_specific=True)
        states = [torch.load(checkpoint / f"process-{index}.pt", weights_only=True) for index in sources]
        self._num_summed, self._num_skipped = states[0]["num_summed"], states[0]["num_skipped"]
        if self.stream is not None:
            self._positions = states[0]["positions"]
        self._sums = {
            name: (sum(state["sums"][name] for state in states) / len(states)).to(accelerator.device)
            for name in states[0]["sums"]
        }

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches for one forward pass each, until the run has made its steps.

        Yields:
            `sample` and `noise`, `[B, C, H, W]` float32 on the device, and `timesteps`, `[B]` int64; for images with
            labels also `conditioning`, the mapping of `class_labels` to `[B]` int64.
        """
        options, accelerator = self.options, self.accelerator
        batches = DrawBatches(
            first_step=self.step,
            num_steps=options.max_train_steps,
            batch_size=options.train_batch_size,
            accumulation_steps=options.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        draws = TrainingDraws(
            self.images if self.stream is None else self.stream.images,
            seed=options.seed,
            random_flip=self.random_flip,
            guidance_dropout=self.guidance_dropout,
        )
        loader = DataLoader(
            draws if self.stream is None else StreamedDraws(self.stream, draws, batches, self._positions.clone()),
            sampler=batches if self.stream is None else None,  # of whole batches
            batch_size=None,
            num_workers=options.dataloader_num_workers,
            worker_init_fn=outlive_sigterm,
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
        with self._stop:
            for batch in loader:
                if self.stream is not None:
                    self._positions[batch.pop("reader")] = batch.pop("position")
                with accelerator.accumulate(self.model):
                    moved = on_device(batch, self.schedule, accelerator.device)
                    self._timesteps.append(moved["timesteps"])
                    yield moved
                if accelerator.sync_gradients:
                    self._after_step()
                    if self._asked_to_stop:
                        self._stop_early()
        self._progress.close()

    def _stop_early(self) -> None:
        self.save_checkpoint()
        self._progress.close()
        name = signal.Signals(self._asked_to_stop).name
        if self.accelerator.is_main_process:
            words = self.folder.last_checkpoint_in_words()
            print(f"stopped by {name} after step {self.step}; {words}", file=sys.stderr, flush=True)
        self.end()
        sys.exit(128 + self._asked_to_stop)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Backward of `losses["total"]`; on a step's last forward pass also the optimizer step.

        Args:
            losses: scalars; all are logged as means over the steps that were made since the last log line.
        """
        self.accelerator.backward(losses["total"])
        if not self._checked_gradients:
            self._warn_of_missing_gradients()
        for name, value in losses.items():
            self._losses[name] = self._losses[name] + value.detach() if name in self._losses else value.detach()
        self._num_passes += 1
        if self.accelerator.sync_gradients:
            self._make_or_skip_step()
            self._stepping.zero_grad(set_to_none=True)
            self._losses, self._timesteps = {}, []

    def _make_or_skip_step(self) -> None:
        accelerator, options = self.accelerator, self.options
        accelerator.unscale_gradients()
        with_gradient = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in with_gradient]
        norms = torch._foreach_norm(gradients)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        asked = self._stop.poll()
        flags = [torch.full_like(norm, asked == number) for number in (signal.SIGTERM, signal.SIGINT)]
        flags.append((~(norm.isfinite() & self._losses["total"].isfinite())).to(norm.dtype))
        flags += [self._losses[name].to(norm.dtype) for name in _shown(self._losses)]
        terminated_interrupted_broken = accelerator.reduce(torch.stack(flags), "sum")
        step = UnsettledStep(
            self.step + 1,
            Flags(terminated_interrupted_broken),
            self._losses,
            self._timesteps,
            dict(zip(with_gradient, norms, strict=True)),
            norm,
        )
        if options.max_grad_norm:
            torch._foreach_mul_(gradients, (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._settle()  # the step before, while the weights are still what it left
        if self._settles_late:
            # torch's fused kernels leave weights and state as they are where this is 1; gradient scalers use it so too.
            self._stepping.found_inf = terminated_interrupted_broken[2].clamp(max=1.0)
            self._stepping.step()
        elif not step.flags.read()[2]:
            self._stepping.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # lowers fp16's loss scale
        self._unsettled = step
        if not self._settles_late or self._skipped_in_a_row:
            self._settle()

    def _settle(self) -> None:
        """Read whether the last step was made, which may wait for it, and do what depends on that; once per step.

        Raises:
            ValueError: if it was one too many that was skipped.
        """
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        terminated, interrupted, is_skipped, *losses = step.flags.read()
        self._asked_to_stop = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        if is_skipped:
            self._tell_of_skip(step)
            return
        self._skipped_in_a_row = 0
        self._watch.stop()
        if self.ema is not None:
            self._average()
        num_passes = self.options.gradient_accumulation_steps
        num_summed = num_passes * self.accelerator.num_processes
        shown = {name: f"{value / num_summed:.4f}" for name, value in zip(_shown(step.losses), losses, strict=True)}
        self._progress.set_postfix({**shown, **self._shown}, refresh=False)
        means = {f"loss/{name}": value / num_passes for name, value in step.losses.items()}
        for name, value in {**means, "gradient_norm": step.gradient_norm}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._num_summed[name] = self._num_summed.get(name, 0) + 1

    def _tell_of_skip(self, step: UnsettledStep) -> None:
        """Say what was not finite at the first skipped step in a row, and end the run at one too many.

        Raises:
            ValueError: with the diagnosis.
        """
        self._num_skipped += 1
        self._skipped_in_a_row += 1
        is_last = self._skipped_in_a_row > self.options.max_skipped_steps
        if not is_last and self._skipped_in_a_row > 1:
            return
        found = self._watch.describe(step.losses, step.timesteps, step.gradients)
        found = "; ".join(f"process {index}: {words}" for index, words in enumerate(gather_object([found])))
        if not is_last:
            self.accelerator.print(f"step {step.number} is skipped: {found}")
            self._watch.start()  # so that the next skipped step can tell which layer it began in
            return
        self._end_with(
            f"stopped at step {step.number}: {self._skipped_in_a_row} steps in a row had a loss or a gradient that "
            f"is not finite, in the last one {found}; {self.folder.last_checkpoint_in_words()}"
        )

    def _end_with(self, message: str) -> NoReturn:
        """End all processes, one of them with the message."""
        self._progress.close()
        if not self.accelerator.is_main_process:
            sys.exit(USER_ERROR)
        raise ValueError(message)

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
        if hasattr(self._bare_model, "after_step"):
            self._bare_model.after_step(self.step)
        last = self.step == options.max_train_steps
        periods = [options.preview_every_steps, options.score_every_steps]
        periods += [options.log_every_steps, options.checkpointing_steps]
        if last or any(period and self.step % period == 0 for period in periods):
            self._settle()
        if self.step % options.log_every_steps == 0 or last:
            self._log()
        self._log_diagnostics()
        self._progress.update()
        if options.preview_every_steps and self.step % options.preview_every_steps == 0:
            self.on_main_process(self._save_preview)
        if options.score_every_steps and self.step % options.score_every_steps == 0:
            self._log_scores()
        if self.step % options.checkpointing_steps == 0 or last:
            self.save_checkpoint()

    @torch.no_grad()
    def _average(self) -> None:
        """What `EMAModel.step` does, in one pass over the weights and without looking for them."""
        ema = self.ema
        ema.optimization_step += 1
        ema.cur_decay_value = ema.get_decay(ema.optimization_step)
        torch._foreach_lerp_(ema.shadow_params, self._averaged, 1 - ema.cur_decay_value)

    def _log(self) -> None:
        names = sorted(self._sums)
        means: list[float] = []
        if names:  # not every step was skipped
            sums = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float64).cpu() for name in names])
            counts = torch.tensor([self._num_summed[name] for name in names])
            own = (sums / counts).to(self.accelerator.device, torch.float32)
            means = self.accelerator.reduce(own, reduction="mean").tolist()
        seconds = time.perf_counter() - self._since
        num_images = self._num_passes * self.options.train_batch_size * self.accelerator.num_processes
        line: dict[str, float] = dict(zip(names, means, strict=True))
        if self._num_skipped:
            line["skipped_steps"] = self._num_skipped
        line |= {"learning_rate": self.learning_rate.get_last_lr()[0], "images_per_second": num_images / seconds}
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": self.step, **line})
        self.accelerator.log(line, step=self.step)
        self._shown["img/s"] = f"{line['images_per_second']:.0f}"
        self._sums, self._num_summed, self._num_skipped = {}, {}, 0
        self._num_passes, self._since = 0, time.perf_counter()

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`; it appears under that name only once it is whole and on the disk.

        Raises:
            ValueError: if it cannot be written, as on a full disk, or what trains is broken; the checkpoints before it
                stay as they are.
        """
        self._settle()
        if self._step_of_checkpoint == self.step:
            return
        accelerator, folder = self.accelerator, self.folder
        temporary = own_name(folder.path / f"checkpoint-{self.step}")
        fault = check_state(self._bare_model, self._parameters)
        if fault is not None:
            self._end_with(f"stopped at step {self.step}: {fault}; {folder.last_checkpoint_in_words()}")

        def begin() -> None:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()  # not its parents: a run's folder that was removed is not made anew

        def write() -> None:
            accelerator.save_state(str(temporary))
            sums = {name: value.cpu() for name, value in self._sums.items()}
            own = {"sums": sums, "num_summed": self._num_summed, "num_skipped": self._num_skipped}
            own |= {} if self.stream is None else {"positions": self._positions}
            torch.save(own, temporary / f"process-{accelerator.process_index}.pt")

        def finish() -> None:
            state = {
                "learning_rate": self.learning_rate.state_dict(),
                "skipped_in_a_row": self._skipped_in_a_row,
                "ema": None if self.ema is None else self.ema.state_dict(),
            }
            torch.save(state, temporary / "training.pt")
            folder.finish_checkpoint(temporary, {"step": self.step, "num_processes": accelerator.num_processes})

        for action, is_for_all in ((begin, False), (write, True), (finish, False)):
            problem = None
            if is_for_all or accelerator.is_main_process:
                problem = problem_of(action, folder.path)
            problems = [found for found in gather_object([problem]) if found]
            if problems:
                if accelerator.is_main_process:
                    shutil.rmtree(temporary, ignore_errors=True)
                words = folder.last_checkpoint_in_words()
                self._end_with(f"checkpoint-{self.step} could not be written to {folder.path}: {problems[0]}; {words}")
        self._step_of_checkpoint = self.step
        if accelerator.is_main_process:
            folder.remove_old_checkpoints(
                self.options.checkpoints_total_limit, self.options.checkpoints_keep_every_steps
            )

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
        path = self.folder.path / "previews" / f"step-{self.step:06d}.png"
        with only_warns(f"the preview {path}", "training goes on"), self.averaged_weights():
            images = sample_images(self.unet, self.noise_scheduler, range(32), batch_size=self.options.eval_batch_size)
            save_sample_grid({f"step {self.step}": images}, path)

    def _log_diagnostics(self) -> None:
        if self._diagnose is None:
            return
        began = time.perf_counter()
        figures = self._diagnose(self.step)
        if figures:
            line = {f"diagnostics/{name}": value for name, value in figures.items()}
            if self.accelerator.is_main_process:
                self.folder.append_metrics({"step": self.step, **line})
            self.accelerator.log(line, step=self.step)
            self._since += time.perf_counter() - began  # the time of looking is not the training's

    def _log_scores(self) -> None:
        if self._score is None:
            return
        began = time.perf_counter()
        try:
            with self.averaged_weights():
                scores = {f"score/{name}": value for name, value in self._score(self.unet).items()}
        except ValueError as error:  # samples that are not finite, on all processes alike
            self.accelerator.print(f"warning: step {self.step} has no scores, and training goes on: {error}")
            return
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": self.step, **scores})
        self.accelerator.log(scores, step=self.step)
        names = [name for name in scores if name.startswith("score/fid") and "held_out" not in name]
        self._shown |= {name.removeprefix("score/"): f"{scores[name]:.2f}" for name in names}
        self._since += time.perf_counter() - began  # the time of scoring is not the training's

    def finish(self) -> nn.Module:
        """Put the averaged weights into the UNet and return it, in eval mode; the processes stay together."""
        self.accelerator.wait_for_everyone()
        if self._identity_of_images != self._look_at_images():
            tqdm.write(
                f"note: files of {self.images.name} changed while the run read them; it is not known which of their "
                "contents it was trained on"
            )
        if self.ema is not None:
            self.ema.copy_to(self.unet.parameters())
        return self.unet.eval()

    def _look_at_images(self) -> str | None:
        """A hash over names, sizes and times of the images' files; the main process alone looks."""
        if self.stream is not None or self.images.identity is None or not self.accelerator.is_main_process:
            return None
        try:
            return self.images.identity()
        except OSError as error:  # gone by now, or by then
            return str(error)

    def end(self) -> None:
        """End the trackers and the processes' connection: the last call of a recipe."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.folder.release()

    def cost(self) -> str:
        """What the steps of the whole run took, without start and scores, as metrics.jsonl has it; for the card."""
        device = torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "CPU"
        passes, size = self.options.gradient_accumulation_steps, self.options.train_batch_size
        images_per_step = passes * size * self.accelerator.num_processes
        seconds, before = 0.0, 0
        for line in self.folder.read_metrics():
            if line.get("images_per_second"):
                seconds += (line["step"] - before) * images_per_step / line["images_per_second"]
                before = line["step"]
        return (
            f"{self.step} steps in {seconds / 60:.1f} minutes on {self.accelerator.num_processes} x "
            f"{device}, {self.accelerator.mixed_precision} mixed precision"
        )

    def on_main_process(self, action: Callable[[], Any]) -> None:
        """Run `action` on the main process while the others wait."""
        on_main_process(action)
        self.accelerator.wait_for_everyone()


def _shown(losses: Mapping[str, Tensor]) -> list[str]:
    """The losses of a step that the progress line has room for: none of single layers."""
    return sorted(name for name in losses if "/" not in name)
