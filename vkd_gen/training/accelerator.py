"""The Accelerator of a run: what flags, environment and launcher say, brought together or refused."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DynamoBackend, broadcast_object_list, gather_object, set_seed
from diffusers.utils.logging import disable_progress_bar

from vkd_gen.cli import USER_ERROR
from vkd_gen.distillation import FrozenTeacher
from vkd_gen.training.options import TrainingOptions

Result = TypeVar("Result")

NOT_HERE = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What `accelerate launch` may say to the processes that it starts, and these recipes do not train under."""


def make_accelerator(options: TrainingOptions, *, find_unused_parameters: bool = False) -> Accelerator:
    """The Accelerator that a recipe runs on, seeded.

    Args:
        options: of the run.
        find_unused_parameters: some steps leave trainable parameters without a gradient.

    Raises:
        ValueError: for a precision or a tracker that is not available here, for FSDP and DeepSpeed, for an environment
            that contradicts the flags, and for processes that do not know of each other.
    """
    _check_environment(options)
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
        source = "what accelerate reads in the environment or its config file cannot be"
        if options.report_to is not None:
            source = f"--report_to {options.report_to}"
        reason = f"{source}: {error}"
        raise ValueError(reason) from error
    check_processes(accelerator)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    if options.report_to is not None and not accelerator.log_with:
        raise ValueError(
            f"--report_to {options.report_to}: that tracker is not installed; pip install {options.report_to}"
        )
    set_seed(options.seed)  # the same on every process: they build the same models
    accelerator.wait_for_everyone()  # all have checked the run's folder before the first one writes to it
    return accelerator


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")


def _check_environment(options: TrainingOptions) -> None:
    """Refuse what accelerate would take from the environment in place of a flag, or beside what is trained here."""
    _check_connected()
    for name in NOT_HERE:
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"these recipes do not train under {name}: they check gradients, average weights and write checkpoints "
                "of whole models; launch with --multi_gpu"
            )
    name, steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", options.gradient_accumulation_steps
    if os.environ.get(name, str(steps)) != str(steps):  # accelerate reads it in place of its argument
        raise ValueError(
            f"--gradient_accumulation_steps is {steps}, and {name} in the environment is {os.environ[name]!r}: unset "
            "that, or give both the same value"
        )
    name, precisions = "ACCELERATE_MIXED_PRECISION", ("no", "fp16", "bf16")
    precision = os.environ.get(name, "no")
    # Accelerate takes FP16 for a precision of that name, and trains in float32.
    if options.mixed_precision is None and precision not in precisions:
        raise ValueError(
            f"{name} in the environment (or mixed_precision in accelerate's config file) is {precision!r}; these "
            f"recipes train in {', '.join(precisions)}: set it to one of them, or say so by --mixed_precision"
        )


def check_processes(accelerator: Accelerator) -> None:
    """Refuse one of several processes that are not connected: each would do the whole work, in the same folder.

    Raises:
        ValueError: in one line that says what to set.
    """
    if accelerator.num_processes > 1:
        return
    _check_alone()
    is_launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if is_launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # All that its launcher of one process says where it was asked for several (MULTI_CPU) without mpirun.
        accelerator.print(
            "note: accelerate's settings ask for several processes on CPUs (MULTI_CPU), and it has started one, which "
            "does all the work; for several: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node NUMBER ..."
        )


def _check_connected() -> None:
    """Refuse one of several processes where accelerate would not connect them, before they meet, and part."""
    if not torch.accelerator.is_available() and not _is_set("ACCELERATE_USE_CPU"):
        _check_alone()


def _check_alone() -> None:
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise ValueError(
                f"{name} is {os.environ[name]} in the environment, but this process is alone: without a GPU processes "
                "are connected only if ACCELERATE_USE_CPU=1 is set for `accelerate launch --multi_gpu` or torchrun; "
                f"set it, or start one process (and unset {name} if no launcher set it)"
            )
    if os.environ.get("RANK", "0") not in ("", "0"):
        raise ValueError(
            f"RANK is {os.environ['RANK']} in the environment, but this process is alone: unset it, or start all "
            "processes by one launcher, which sets WORLD_SIZE too"
        )


def make_sampling_accelerator() -> Accelerator:
    """The Accelerator of a command that samples and does not train."""
    torch.set_float32_matmul_precision("high")
    _check_connected()
    accelerator = Accelerator()
    check_processes(accelerator)
    disable_progress_bar()  # of the loading of a pipeline's few parts
    return accelerator


def on_main_process(action: Callable[[], Result]) -> Result | None:
    """Run an action on the main process, while the others wait; an error there ends them too, without a word.

    Returns:
        What the action does; None on the other processes.
    """
    error, result = None, None
    if PartialState().is_main_process:
        try:
            result = action()
        except Exception as raised:
            error = raised
    if any(gather_object([error is not None])):
        if error is None:
            sys.exit(USER_ERROR)
        raise error
    return result


def on_all_processes(action: Callable[[], Result]) -> Result:
    """What an action gives that only the main process does: the same on all of them."""
    results = [on_main_process(action)]
    if PartialState().num_processes > 1:
        broadcast_object_list(results)
    return results[0]  # type: ignore[return-value]


def compile_as_asked(accelerator: Accelerator, teacher: FrozenTeacher) -> FrozenTeacher:
    """The teacher for the training steps: compiled if `accelerate launch` was asked to compile what trains."""
    plugin = accelerator.state.dynamo_plugin
    return teacher if plugin.backend == DynamoBackend.NO else teacher.compiled(**plugin.to_kwargs())
