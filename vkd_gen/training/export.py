"""The end of a run: a stock diffusers pipeline folder with a model card, and its upload."""

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from huggingface_hub import HfApi

from vkd_gen.files import CannotWriteError, own_name
from vkd_gen.models import Model, save_card
from vkd_gen.pipelines import load_pipeline, usable_steps
from vkd_gen.provenance import only_warns
from vkd_gen.text import reason
from vkd_gen.text_pipelines import save_pipeline
from vkd_gen.training.options import TrainingOptions


def try_saving(
    model: Model, folder: Path, card: str, *, num_inference_steps: int, name: str, variant: str | None = None
) -> None:
    """Do before the first step what the end of a run will do, so that it cannot fail there; nothing of it stays.

    The sampler goes through all of its timesteps, the network through two; pipeline and card are written, beside
    `folder`, and read again. The global random state stays as it is.

    Raises:
        ValueError: in one line, for whatever would fail.
    """
    temporary = own_name(folder)
    try:
        for steps in {usable_steps(model.noise_scheduler, wanted) for wanted in (num_inference_steps, 50)}:
            _try_sampler(copy.deepcopy(model.pipeline.scheduler), steps)
        model.images(range(2), num_inference_steps=2, name=f"{name} at its start")
        # A loaded network is first filled with random weights.
        with torch.random.fork_rng(devices=[]), model.whole():
            save_pipeline(model.pipeline, temporary, variant)
            save_card(temporary, card)
            load_pipeline(str(temporary))
    except Exception as error:  # diffusers, the system and the hub's library raise all kinds of errors
        words = f"the end of the run was tried before its first step, and fails: {reason(error, 300)}"
        raise ValueError(words) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _try_sampler(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Go through a sampler's timesteps with noise for predictions: is every step there, and finite?"""
    scheduler.set_timesteps(num_inference_steps)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, 4, 4, generator=generator)
    for timestep in scheduler.timesteps:
        prediction = torch.randn(sample.shape, generator=generator)
        sample = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(prediction, timestep, sample).prev_sample
        if not sample.isfinite().all():
            raise ValueError(
                f"{type(scheduler).__name__} gives no finite samples on this schedule, at timestep {int(timestep)} of "
                f"{num_inference_steps} steps: {scheduler.config.prediction_type} says nothing there; choose another "
                "teacher"
            )


@contextlib.contextmanager
def after_export(folder: Path) -> Iterator[None]:
    """For the scores of an exported pipeline: their errors say that the weights are saved, and how to go on.

    Raises:
        ValueError: for whatever is raised inside, but for a disk that takes no more.
    """
    try:
        yield
    except CannotWriteError:
        raise
    except Exception as error:
        raise ValueError(
            f"the pipeline is saved in {folder}, but it could not be scored: {reason(error, 300)}; the same command "
            "with --resume_from_checkpoint latest makes the scores again"
        ) from error


def finish_export(folder: Path, card: Callable[[], str], options: TrainingOptions) -> None:
    """Give an exported and scored pipeline its card with the scores, and upload it if that is asked for.

    Raises:
        ValueError: if the hub cannot be reached or refuses.
    """
    with only_warns(f"the model card of {folder}", f"python eval/score.py {folder} writes scores into it"):
        save_card(folder, card())
    if options.push_to_hub:
        print(f"uploaded: {upload(folder, options.hub_model_id)}", flush=True)


def check_upload(options: TrainingOptions) -> None:
    """Find out before a run whether it may upload its pipeline: token, name and network. Makes the repository.

    Raises:
        ValueError: in one line, if not.
    """
    if not options.push_to_hub or os.environ.get("RANK", "0") != "0":  # asked once, before there is an Accelerator
        return
    repository = options.hub_model_id or Path(options.output_dir).resolve().name
    try:
        HfApi().whoami()
        HfApi().create_repo(repository, exist_ok=True)
    except Exception as error:  # network, authentication and naming errors each have a class of their own
        raise ValueError(
            f"--push_to_hub cannot upload to {repository}: {reason(error)}; log in by `hf auth login`, choose another "
            "--hub_model_id, or leave --push_to_hub out"
        ) from error


def upload(folder: Path, repository: str | None) -> str:
    """Upload an exported pipeline to the Hugging Face hub, by default under the name of the run's folder.

    Returns:
        The repository's address.

    Raises:
        ValueError: if the hub cannot be reached or refuses.
    """
    try:
        url = HfApi().create_repo(repository or folder.parent.resolve().name, exist_ok=True)
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload from vkd-gen")
    except Exception as error:  # network, authentication and naming errors each have a class of their own
        raise ValueError(
            f"the pipeline is in {folder}, but uploading it failed: {reason(error)}; "
            f"`hf upload REPOSITORY {folder}` tries again"
        ) from error
    return str(url)
