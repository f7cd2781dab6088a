"""Make images with a diffusers pipeline: unconditional, of classes, or of prompts.

python eval/generate.py runs/digits --output samples --num_images 1000
python eval/generate.py runs/half-sd --prompts prompts.txt --output samples --num_images 16
accelerate launch eval/generate.py HUB_ID --output samples.npz --num_images 50000 --mixed_precision bf16
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import tyro

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.cli import announce, check_at_least, check_output_file, repository_path, run_command
from vkd_gen.evaluation.options import SamplingOptions
from vkd_gen.evaluation.published import COCO30K
from vkd_gen.files import LOCK, hold_folder, remove_leftovers

if TYPE_CHECKING:
    from vkd_gen.evaluation.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to make."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a pipeline or of a recipe's run, or a hub id; ID@REVISION is a certain commit, tag or branch of it."""
    output: str
    """Folder for PNGs, or an .npz file. What an interrupted call left there is completed."""
    preset: str = ""
    """`coco30k`: BK-SDM's protocol, of 30,000 --prompts of MS-COCO."""
    num_images: int = 1000
    """Images to make."""
    num_inference_steps: int = 50
    """Network evaluations per image."""
    guidance_scale: float | None = None
    """Guidance of text and class-conditional pipelines; by default each pipeline's own. Class-conditional ones make
    images of the class seed modulo classes."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How the images are made."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, {"num_images": 1, "num_inference_steps": 1, "guidance_scale": 1})


PRESETS = {"coco30k": (*COCO30K, "--num_images", "30000")}
NOTE = "generate.json"
"""What a folder of images says of them, so that an interrupted call can be completed."""


def open_folder(folder: Path) -> IO[str] | None:
    """Hold the folder, so that no other call writes to it, and tidy up after one that was killed."""
    is_foreign = folder.exists() and not (folder / NOTE).exists()
    if is_foreign and any(file.name != LOCK for file in folder.iterdir()):
        raise ValueError(f"{folder} is there already and not of this command; choose another --output")
    lock = hold_folder(folder)
    remove_leftovers(folder)
    return lock


def prepare_folder(folder: Path, config: GenerateConfig, source: "ImageSource") -> None:
    """Note in the folder what its images are, or see that what lies there is of the same."""
    from accelerate import PartialState

    from vkd_gen.provenance import write_json

    wanted = {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale")}
    wanted |= {name: value for name, value in asdict(config.sampling).items() if name not in ("batch_size", "prompts")}
    wanted |= {name: source.protocol.get(name) for name in ("weights_sha256", "prompts_sha256")}
    wanted["model"] = {name: source.protocol[name] for name in ("pipeline", "sampler", "scheduler")}
    note = folder / NOTE
    if note.exists():
        try:
            before = dict(json.loads(note.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{note} is damaged, so nobody knows what lies beside it; choose another --output"
            ) from error
        changed = [f"--{key} was {before.get(key)!r} and is {value!r}" for key, value in wanted.items()
                   if before.get(key) != value]  # fmt: skip
        if changed:
            raise ValueError(f"{folder} holds other images: {'; '.join(changed)}; choose another --output")
        if len(list(folder.glob("*.png"))) > config.num_images:
            raise ValueError(f"{folder} holds more than {config.num_images} images; raise --num_images")
    PartialState().wait_for_everyone()  # all have looked before the first one writes
    if PartialState().is_main_process:
        write_json(note, wanted)
    PartialState().wait_for_everyone()


def remove(folder: Path, names: Sequence[str] = ()) -> None:
    """Remove a folder of this command, if nothing but these files is in it: whatever else lies there is somebody's."""
    with contextlib.suppress(OSError):
        for name in (*names, NOTE, LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def main(config: GenerateConfig) -> None:
    """Make the images that are not there yet."""
    output = Path(config.output)
    is_array = output.suffix == ".npz"
    if is_array and output.exists():
        raise ValueError(f"{output} is there already; choose another --output")
    folder = output.with_name(output.name + ".parts") if is_array else output
    check_output_file(output if is_array else folder / NOTE)
    announce(f"{config.num_images:,} images of {config.checkpoint}, to {output}")

    from vkd_gen.evaluation.image_files import make_pngs, pack_pngs, png_name, write_captions
    from vkd_gen.evaluation.samples import from_model
    from vkd_gen.evaluation.sources import protocol_file
    from vkd_gen.hub import hub_revision
    from vkd_gen.models import Model
    from vkd_gen.pipelines import load_pipeline
    from vkd_gen.provenance import write_json
    from vkd_gen.training.accelerator import make_sampling_accelerator, on_main_process

    accelerator = make_sampling_accelerator()
    model = Model(load_pipeline(repository_path(config.checkpoint, __file__), config.sampling.sampler))
    model.pipeline.to(accelerator.device)
    prompts = config.sampling.read_prompts()
    source = from_model(
        config.checkpoint,
        model,
        config.sampling,
        count=config.num_images,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        prompts=prompts,
    )
    lock = on_main_process(partial(open_folder, folder))
    prepare_folder(folder, config, source)
    try:
        make_pngs(source, folder, config.sampling.batch_size)
    except ValueError:  # images that are not finite
        if not any(folder.glob("*.png")):  # the next call may mend that by other weights or another precision
            remove(folder)
        raise
    if accelerator.is_main_process:
        revision = hub_revision(config.checkpoint)
        known = {} if revision is None else {"revision": revision}
        write_json(protocol_file(output), {**source.protocol, **known})
        if is_array:
            numbers = range(config.num_images)
            pack_pngs(folder, numbers, output)
            remove(folder, [png_name(number) for number in numbers])
        elif source.prompts is not None:
            write_captions(folder, source.prompts.of(range(config.num_images)))
        print(f"{config.num_images} images: {output}")
    if lock is not None:  # the folder is done, and holds nothing but images and what made them
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()


if __name__ == "__main__":
    run_command(main, GenerateConfig, __doc__, PRESETS)
