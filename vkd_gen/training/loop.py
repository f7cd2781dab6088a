"""The mechanics around a training step: data, accumulation, clipping, averaging, metrics, checkpoints.

A recipe keeps what is its own, the loss:

    for batch in loop:
        loop.backward(losses_of(loop.module, batch))
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm.auto import tqdm

from vkd_gen.cli import USER_ERROR
from vkd_gen.data.draws import DrawNumbers, Draws
from vkd_gen.text import reason
from vkd_gen.training.guards import Watch, check_state
from vkd_gen.training.interruption import StopRequest, outlive_sigterm
from vkd_gen.training.optimizer import average_device, average_step, make_average, make_optimizer
from vkd_gen.training.run import Run
from vkd_gen.training.run_folder import checkpoint_step, num_processes_of


class Loop:
    """The training loop of a run, on one or many processes; iterating over it gives the batches of its forward passes.

    Everything that decides the result is a function of the step: draws by their number, the learning rate, the
    refreshes of projectors. A resumed run therefore ends exactly where the uninterrupted one does.

    A step whose loss or gradient is not finite is skipped, on all processes: student, optimizer and moving average stay
    as they were. One reduction per step tells all processes so, with the losses and whether one was asked to stop.

    Args:
        run: begun.
        module: the one module that trains; its `after_step(step)`, if it has that, is called after each optimizer step.
        draws: of the run.
        average: the network inside `module` that is averaged, sampled and exported.
        parameter_groups: for the optimizer.

    Attributes:
        module: what to call in the steps, wrapped for several processes.
        step: optimizer steps that were made.
    """

    def __init__(
        self,
        run: Run,
        module: nn.Module,
        draws: Draws,
        *,
        average: nn.Module,
        parameter_groups: list[dict[str, Any]],
    ):
        self.run, self.accelerator, self.options = run, run.accelerator, run.options
        self.draws, self.network = draws, average
        options = self.options
        self.step = 0
        self._bare_module = module
        optimizer = make_optimizer(options, parameter_groups, average)
        # Not prepared: accelerate would step it once for each process, and here a step is a step.
        self.learning_rate = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        average.to(self.accelerator.device)
        self.ema = make_average(options, average.parameters(), self.accelerator.device)
        self._parameters = [parameter for group in parameter_groups for parameter in group["params"]]
        self._actions: list[tuple[int, Callable[[int], Mapping[str, float]], bool]] = []
        self._shown: dict[str, str] = {}  # in the progress line, beside the losses
        self._watch, self._stop = Watch(module), StopRequest()
        self._asked_to_stop = 0
        self._losses: dict[str, Tensor] = {}  # of this step: sums over its passes
        self._timesteps: list[Tensor] = []
        self._skipped_in_a_row = 0
        self._sums: dict[str, np.float32] = {}  # since the last log line: sums over the steps that were made
        self._num_summed: dict[str, int] = {}  # of how many steps: not all have every loss
        self._num_skipped = self._num_passes = 0
        self._checked_gradients = not run.is_fresh  # else it was done then
        states = [self.learning_rate, self] if self.ema is None else [self.learning_rate, self, self.ema]
        self.accelerator.register_for_checkpointing(*states)
        set_seed(options.seed, device_specific=True)  # from here on for what is random inside the model, as dropout
        self._resume()
        self._step_of_checkpoint = self.step

    def every(self, steps: int, action: Callable[[int], Mapping[str, float]], *, averaged: bool = False) -> None:
        """Call `action` on all processes after each so many steps; its time is not the training's.

        Args:
            steps: 0 for never.
            action: step -> figures for metrics.jsonl and the trackers, none where none are due.
            averaged: with the averaged weights in the network, and that in eval mode.
        """
        if steps:
            self._actions.append((steps, action, averaged))

    # ---- resuming

    def _resume(self) -> None:
        accelerator, run, point = self.accelerator, self.run, self.run.point
        if point is not None:
            try:
                accelerator.load_state(str(point))
            except Exception as error:  # whole, but not of this run or this package: all kinds of errors
                raise ValueError(f"{point} cannot be loaded: {reason(error, 300)}; resume from another one") from error
            accelerator.step = 0  # between two steps, however many passes they have
            self.step = checkpoint_step(point)
            if self.ema is not None:
                self.ema.to(average_device(self.options, accelerator.device))
            if self._skipped_in_a_row:
                self._watch.start()
            if num_processes_of(point) != accelerator.num_processes:
                set_seed(self.options.seed + self.step, device_specific=True)
            run.print(f"going on from {point}")
        if accelerator.is_main_process:
            run.folder.cut_metrics(self.step)
            run.folder.set_aside_after(self.step)

    def state_dict(self) -> dict[str, Any]:
        """What is between two log lines, and how far a stream was read: the same on every process."""
        return {
            "sums": {name: float(value) for name, value in self._sums.items()},
            "num_summed": self._num_summed,
            "num_skipped": self._num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "positions": self._positions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._sums = {name: np.float32(value) for name, value in state["sums"].items()}
        self._num_summed = state["num_summed"]
        self._num_skipped, self._skipped_in_a_row = state["num_skipped"], state["skipped_in_a_row"]
        positions = state["positions"].tensor_split(self.accelerator.num_processes)  # no rows for a process too many
        self.draws.positions = positions[self.accelerator.process_index]

    # ---- the loop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches for one forward pass each, until the run has made its steps.

        Yields:
            `sample` and `noise`, `[B, C, H, W]` float32 on the device, `timesteps`, `[B]` int64, and `conditioning`,
            keyword arguments of the network with a row per sample.
        """
        options, accelerator = self.options, self.accelerator
        numbers = DrawNumbers(
            first_step=self.step,
            num_steps=options.max_train_steps,
            batch_size=options.train_batch_size,
            accumulation_steps=options.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        loader = self.draws.loader(
            numbers,
            num_workers=options.dataloader_num_workers,
            worker_init_fn=outlive_sigterm,
            pin_memory=accelerator.device.type == "cuda",
        )
        self._progress = tqdm(
            total=options.max_train_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
            disable=not accelerator.is_local_main_process,
        )
        self.module.train()
        self._since = time.perf_counter()
        with self._stop:
            for batch in loader:
                with accelerator.accumulate(self.module):
                    batch = send_to_device(self.draws.received(batch), accelerator.device, non_blocking=True)
                    moved = self.draws.finish(batch)
                    self._timesteps.append(moved["timesteps"])
                    yield moved
                if accelerator.sync_gradients:
                    self._after_step()
                    if self._asked_to_stop:
                        self._stop_early()
        self._progress.close()

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Backward of `losses["total"]`; on a step's last forward pass also the optimizer step.

        Args:
            losses: scalars; all are logged as means over the steps that were made since the last log line.

        Raises:
            ValueError: where more steps in a row are skipped than may be.
        """
        self.accelerator.backward(losses["total"])
        if not self._checked_gradients:
            self._warn_of_missing_gradients()
        for name, value in losses.items():
            self._losses[name] = self._losses[name] + value.detach() if name in self._losses else value.detach()
        self._num_passes += 1
        if self.accelerator.sync_gradients:
            self._make_or_skip_step()
            self.optimizer.zero_grad()
            self._losses, self._timesteps = {}, []

    def _make_or_skip_step(self) -> None:
        accelerator, options = self.accelerator, self.options
        accelerator.unscale_gradients()
        parameters = [parameter for parameter in self._parameters if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        asked = self._stop.poll()
        is_broken = ~(norm.isfinite() & self._losses["total"].isfinite())
        flags = [torch.full_like(norm, asked == number) for number in (signal.SIGTERM, signal.SIGINT)]
        own = torch.stack([*flags, is_broken.to(norm.dtype), norm, *(self._losses[name] for name in self._losses)])
        terminated, interrupted, num_broken, *values = accelerator.reduce(own, "sum").tolist()
        self._asked_to_stop = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        if num_broken:
            if accelerator.scaler is not None:
                accelerator.scaler.update()  # lowers fp16's loss scale
            self._tell_of_skip()
            return
        if options.max_grad_norm:
            clip_grads_with_norm_(parameters, options.max_grad_norm, norm)
        self.optimizer.step()
        if self.ema is not None:
            average_step(self.ema, self.network.parameters())
        self._skipped_in_a_row = 0
        self._watch.stop()
        self._add_to_sums(*(np.float32(value) / accelerator.num_processes for value in values))

    def _add_to_sums(self, norm: np.float32, *losses: np.float32) -> None:
        """The figures of a step that was made, to the next log line and the progress line."""
        num_passes = self.options.gradient_accumulation_steps
        means = {name: value / num_passes for name, value in zip(self._losses, losses, strict=True)}
        shown = {name: f"{value:.4f}" for name, value in sorted(means.items()) if "/" not in name}
        self._progress.set_postfix({**shown, **self._shown}, refresh=False)
        for name, value in {**{f"loss/{name}": value for name, value in means.items()}, "gradient_norm": norm}.items():
            self._sums[name] = self._sums.get(name, np.float32(0)) + value
            self._num_summed[name] = self._num_summed.get(name, 0) + 1

    def _tell_of_skip(self) -> None:
        """Say what was not finite at the first skipped step in a row, and end the run at one too many.

        Raises:
            ValueError: with the diagnosis.
        """
        self._num_skipped += 1
        self._skipped_in_a_row += 1
        is_last = self._skipped_in_a_row > self.options.max_skipped_steps
        if not is_last and self._skipped_in_a_row > 1:
            return
        found = self._watch.describe(self._losses, self._timesteps)
        found = "; ".join(f"process {index}: {words}" for index, words in enumerate(gather_object([found])))
        if not is_last:
            self.run.print(f"step {self.step + 1} is skipped: {found}")
            self._watch.start()  # so that the next skipped step can tell which layer it began in
            return
        self._end_with(
            f"stopped at step {self.step + 1}: {self._skipped_in_a_row} steps in a row had a loss or a gradient that "
            f"is not finite, in the last one {found}; {self.run.folder.last_checkpoint_in_words()}"
        )

    def _warn_of_missing_gradients(self) -> None:
        """Once, after the first backward.

        A parameter that nothing reaches is a mistake in what was asked for, or in what compiled it: torch 2.13's
        compiler loses the gradients of convolutions on a CPU.
        """
        self._checked_gradients = True
        named = [
            (name, parameter) for name, parameter in self._bare_module.named_parameters() if parameter.requires_grad
        ]
        missing = [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()]
        if missing:
            self.run.print(
                f"warning: {len(missing)} of {len(named)} parameters got no gradient in the first step, such as "
                f"{', '.join(missing[:3])}"
            )

    def _after_step(self) -> None:
        options = self.options
        self.step += 1
        self.learning_rate.step()
        if hasattr(self._bare_module, "after_step"):
            self._bare_module.after_step(self.step)
        is_last = self.step == options.max_train_steps
        if self.step % options.log_every_steps == 0 or is_last:
            self._log_losses()
        for steps, action, averaged in self._actions:
            if self.step % steps == 0:
                self._act(action, averaged)
        self._progress.update()
        if self.step % options.checkpointing_steps == 0 or is_last:
            self.save_checkpoint()

    def _act(self, action: Callable[[int], Mapping[str, float]], averaged: bool) -> None:
        began = time.perf_counter()
        with self.averaged_weights() if averaged else contextlib.nullcontext():
            figures = action(self.step)
        if figures:
            self._log(figures)
            fids = {name: value for name, value in figures.items() if name.startswith("score/fid")}
            self._shown |= {name.removeprefix("score/"): f"{fids[name]:.2f}" for name in fids if "held_out" not in name}
        self._since += time.perf_counter() - began

    def _log_losses(self) -> None:
        names = sorted(self._sums)  # none where every step was skipped
        line = {name: float(np.float32(np.float64(self._sums[name]) / self._num_summed[name])) for name in names}
        if self._num_skipped:
            line["skipped_steps"] = self._num_skipped
        seconds = time.perf_counter() - self._since
        num_images = self._num_passes * self.options.train_batch_size * self.accelerator.num_processes
        line |= {"learning_rate": self.learning_rate.get_last_lr()[0], "images_per_second": num_images / seconds}
        self._log(line)
        self._shown["img/s"] = f"{line['images_per_second']:.0f}"
        self._sums, self._num_summed, self._num_skipped = {}, {}, 0
        self._num_passes, self._since = 0, time.perf_counter()

    def _log(self, line: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.run.folder.append_metrics({"step": self.step, **line})
        self.accelerator.log(dict(line), step=self.step)

    # ---- checkpoints and the end

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`; it appears under that name only once it is whole and on the disk.

        Raises:
            ValueError: if it cannot be written, as on a full disk, or what trains is broken; the checkpoints before it
                stay as they are.
        """
        if self._step_of_checkpoint == self.step:
            return
        accelerator, folder = self.accelerator, self.run.folder
        fault = check_state(self._bare_module, self._parameters)
        if fault is not None:
            self._end_with(f"stopped at step {self.step}: {fault}; {folder.last_checkpoint_in_words()}")
        self._positions = accelerator.gather(self.draws.positions.to(accelerator.device)).cpu()

        problem = folder.write_checkpoint(accelerator, self.step)
        if problem:
            words = folder.last_checkpoint_in_words()
            self._end_with(f"checkpoint-{self.step} could not be written to {folder.path}: {problem}; {words}")
        self._step_of_checkpoint = self.step
        if accelerator.is_main_process:
            options = self.options
            folder.remove_old_checkpoints(options.checkpoints_total_limit, options.checkpoints_keep_every_steps)

    def _stop_early(self) -> None:
        self.save_checkpoint()
        self._progress.close()
        name = signal.Signals(self._asked_to_stop).name
        if self.accelerator.is_main_process:
            words = self.run.folder.last_checkpoint_in_words()
            print(f"stopped by {name} after step {self.step}; {words}", file=sys.stderr, flush=True)
        self.run.end()
        sys.exit(128 + self._asked_to_stop)

    def _end_with(self, message: str) -> NoReturn:
        """End all processes, one of them with the message."""
        self._progress.close()
        if not self.accelerator.is_main_process:
            sys.exit(USER_ERROR)
        raise ValueError(message)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The averaged weights in the network, and the network in eval mode, for as long as the context lasts."""
        self.network.eval()
        if self.ema is not None:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.network.parameters())
            self.module.train()

    def finish(self) -> None:
        """Leave the averaged weights in the network, and the network in eval mode; the processes stay together."""
        self.accelerator.wait_for_everyone()
        if self.ema is not None:
            self.ema.copy_to(self.network.parameters())
        self.network.eval()
