"""Images that a teacher draws of prompts, once, to train its students on."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from diffusers import ConfigMixin

from vkd_gen.choices import Precision
from vkd_gen.evaluation.image_files import make_pngs, png_name, write_captions
from vkd_gen.evaluation.options import SamplingOptions
from vkd_gen.evaluation.prompts import Prompts
from vkd_gen.evaluation.samples import from_model
from vkd_gen.evaluation.sources import ImageSource
from vkd_gen.files import LOCK, hold_folder, remove_leftovers
from vkd_gen.models import Model
from vkd_gen.provenance import write_json
from vkd_gen.training.accelerator import on_all_processes, on_main_process
from vkd_gen.training.facts import hash_model

FORMAT = 1
"""Part of every name; to be raised when the same facts come to mean other images."""


class TeacherImages(NamedTuple):
    """What a teacher is to draw, or has drawn.

    Attributes:
        source: image i is of prompt i, and of the seed i.
        facts: all that decides the images; their hash is the name of the folder.
        folder: that has them in `images/`, with the prompts in `metadata.jsonl`, and the facts in `facts.json`.
    """

    source: ImageSource
    facts: dict[str, Any]
    folder: Path

    @classmethod
    def of(
        cls, teacher: Model, prompts: Prompts, folder: Path, flags: Mapping[str, Any], precision: Precision
    ) -> "TeacherImages":
        """What a teacher would draw; nothing is drawn yet.

        Args:
            teacher: whole.
            prompts: in turn; where there are fewer than images, they begin anew.
            folder: that holds a folder for each set of drawings.
            flags: of the recipe: `teacher`, for messages, `num_teacher_images`, `num_inference_steps` and
                `guidance_scale`.
            precision: of the network, by autocast.

        Raises:
            ValueError: in one line, for a teacher that takes no prompts.
        """
        name = f"the teacher {flags['teacher']}"
        if not teacher.takes_prompts:
            raise ValueError(f"--num_teacher_images is for teachers with prompts, and {name} takes none: leave it out")
        source = from_model(
            name,
            teacher,
            SamplingOptions(mixed_precision=precision),
            count=flags["num_teacher_images"],
            num_inference_steps=flags["num_inference_steps"],
            guidance_scale=flags["guidance_scale"],
            prompts=prompts,
        )
        parts = [part for part in teacher.pipeline.components.values() if isinstance(part, ConfigMixin)]
        facts = {"format": FORMAT, **source.protocol, "configuration_sha256": hash_model({}, *parts)}
        facts = {key: value for key, value in facts.items() if key not in ("prompts", "scheduler")}
        return cls(source, facts, folder / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())

    def describe(self) -> str:
        """In words, for a model card."""
        told, prompts = self.facts, self.source.prompts
        assert prompts is not None
        guidance = "the pipeline's own" if told["guidance_scale"] == "default" else told["guidance_scale"]
        return (
            f"{self.source.count:,}, which the teacher drew of {len(prompts.texts):,} prompts: {told['sampler']}, "
            f"{told['num_inference_steps']} steps, guidance {guidance}"
        )

    def draw(self, teacher: Model, device: torch.device, *, batch_size: int, say: Callable[[str], None]) -> Path:
        """Draw what is not there yet; called by all processes, which share the work.

        Args:
            teacher: see `of`.
            device: to draw on.
            batch_size: images at a time, per process.
            say: prints a line.

        Returns:
            The folder of the images.

        Raises:
            ValueError: in one line, if another process draws into the folder, or images are not finite.
        """
        images, count, prompts = self.folder / "images", self.source.count, self.source.prompts
        assert prompts is not None
        names = [*map(png_name, range(count)), "metadata.jsonl"]  # written last
        num_there = on_all_processes(lambda: sum((images / name).exists() for name in names))
        told = f": {min(num_there, count):,} are there" if num_there else ""
        say(f"{count:,} images of {len(prompts.texts):,} prompts, drawn by the teacher, in {images}{told}")
        if num_there == len(names):
            return images
        lock = on_main_process(partial(self._open, images))
        with lock or contextlib.nullcontext():
            teacher.pipeline.to(device)
            make_pngs(self.source, images, batch_size)
            on_main_process(partial(write_captions, images, prompts.of(range(count))))
            if PartialState().is_main_process:
                (self.folder / LOCK).unlink(missing_ok=True)
        return images

    def _open(self, images: Path) -> Any:
        lock = hold_folder(self.folder)
        images.mkdir(exist_ok=True)
        remove_leftovers(images)
        write_json(self.folder / "facts.json", self.facts)
        return lock
