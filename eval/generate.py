"""Make images with a diffusers pipeline: unconditional, or class-conditional.

python eval/generate.py runs/digits --output samples --num_images 1000
accelerate launch eval/generate.py HUB_ID --output samples.npz --num_images 50000 --mixed_precision bf16
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import tyro
from PIL import Image

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.choices import Precision, Sampler
from vkd_gen.cli import announce, check_output_file, repository_path, run_command
from vkd_gen.files import LOCK, hold_folder, remove_leftovers, whole_file

if TYPE_CHECKING:
    from vkd_gen.evaluation.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to make. Image i comes from seed SEED + i, whatever the batch size and the number of processes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a pipeline or of a recipe's run, or a hub id; ID@REVISION is a certain commit, tag or branch of it."""
    output: str
    """Folder for PNGs, or an .npz file. What an interrupted call left there is completed."""
    num_images: int = 1000
    """Images to make."""
    seed: int = 0
    """Seed of the first image."""
    sampler: Sampler | None = None
    """Sampler of a UNet pipeline; by default the pipeline's own."""
    num_inference_steps: int = 50
    """Network evaluations per image."""
    guidance_scale: float | None = None
    """Guidance of a class-conditional pipeline, whose images are of the class seed modulo classes."""
    mixed_precision: Precision = "no"
    """Precision of the networks."""
    batch_size: int = 64
    """Images at a time, per process."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.seed + self.num_images > 2**63:
            raise ValueError(f"--seed {self.seed} is too large; seeds are below 2^63")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"--guidance_scale must be at least 1 and finite, not {self.guidance_scale}")
        least = {"num_images": 1, "seed": 0, "num_inference_steps": 1, "batch_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} must be at least {value}, not {getattr(self, name)}")


FREE_TO_CHANGE = ("output", "batch_size", "num_images")


def open_folder(folder: Path) -> IO[str] | None:
    """Hold the folder, so that no other call writes to it, and tidy up after one that was killed."""
    is_foreign = folder.exists() and not (folder / "generate.json").exists()
    if is_foreign and (not folder.is_dir() or any(file.name != LOCK for file in folder.iterdir())):
        raise ValueError(f"{folder} is there already and not of this command; choose another --output")
    lock = hold_folder(folder)
    remove_leftovers(folder)
    return lock


def prepare_folder(folder: Path, config: GenerateConfig, source: "ImageSource") -> None:
    """Make the folder, or see that what lies there is of the same images."""
    from accelerate import PartialState

    from vkd_gen.provenance import write_json

    wanted = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    wanted["weights_sha256"] = source.protocol["weights_sha256"]
    wanted["model"] = {name: source.protocol[name] for name in ("pipeline", "sampler", "scheduler")}
    note = folder / "generate.json"
    if note.exists():
        try:
            before = dict(json.loads(note.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{note} is damaged, so nobody knows what lies beside it; choose another --output"
            ) from error
        # Where the pipeline lies does not matter, but where an older version noted no more than that.
        skipped = "checkpoint" if "model" in before else "model"
        changed = [f"--{name} was {before.get(name)!r} and is {value!r}" for name, value in wanted.items()
                   if before.get(name) != value and name != skipped]  # fmt: skip
        if changed:
            raise ValueError(f"{folder} holds other images: {'; '.join(changed)}; choose another --output")
        if len(list(folder.glob("*.png"))) > config.num_images:
            raise ValueError(f"{folder} holds more than {config.num_images} images; raise --num_images")
    PartialState().wait_for_everyone()  # all have looked before the first one writes
    if PartialState().is_main_process:
        write_json(note, wanted)
    PartialState().wait_for_everyone()


def make_pngs(source: "ImageSource", folder: Path, batch_size: int) -> None:
    """Write image i as a PNG of its number, unless it is there."""
    from accelerate import PartialState

    from vkd_gen.evaluation.sources import blocks_of_process, progress_bar

    state = PartialState()
    bar = progress_bar(source.count, "images")
    for block in blocks_of_process(source.count, batch_size, state.process_index, state.num_processes):
        files = [folder / f"{number:06d}.png" for number in block]
        if not all(file.exists() for file in files):
            for file, image in zip(files, source.read(block), strict=True):
                pixels = image.permute(1, 2, 0).numpy()
                with whole_file(file) as temporary:
                    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(temporary)
        bar.update(min(len(block) * state.num_processes, source.count - bar.n))
    bar.close()
    state.wait_for_everyone()


def pack(folder: Path, count: int, path: Path) -> None:
    """Put PNGs into one array `arr_0`, uint8, `[images, H, W, C]`, as evaluators of other projects read it."""
    pixels = [np.asarray(Image.open(folder / f"{number:06d}.png")) for number in range(count)]
    stacked = np.stack(pixels)
    with whole_file(path) as temporary:
        np.savez(temporary, arr_0=stacked if stacked.ndim == 4 else stacked[..., None])
    for file in (*(folder / f"{number:06d}.png" for number in range(count)), folder / "generate.json", folder / LOCK):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # whatever else lies there is somebody's
        folder.rmdir()


def main(config: GenerateConfig) -> None:
    """Make the images that are not there yet."""
    output = Path(config.output)
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--output {output} cannot be written: {parent} is a file")
    is_array = output.suffix == ".npz"
    if is_array and output.exists():
        raise ValueError(f"{output} is there already; choose another --output")
    folder = output.with_name(output.name + ".parts") if is_array else output
    if is_array:
        check_output_file(output)
    announce(f"{config.num_images:,} images of {config.checkpoint}, to {output}")

    from vkd_gen.evaluation.sources import from_model, protocol_file
    from vkd_gen.models import Model
    from vkd_gen.provenance import hub_revision, write_json
    from vkd_gen.sampling import load_pipeline
    from vkd_gen.training.accelerator import make_sampling_accelerator, on_main_process

    accelerator = make_sampling_accelerator()
    pipeline = load_pipeline(repository_path(config.checkpoint, __file__), config.sampler).to(accelerator.device)
    source = from_model(
        config.checkpoint,
        Model(pipeline),
        count=config.num_images,
        first_seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        precision=config.mixed_precision,
    )
    lock = on_main_process(partial(open_folder, folder))
    prepare_folder(folder, config, source)
    try:
        make_pngs(source, folder, config.batch_size)
    except ValueError:  # images that are not finite
        if not any(folder.glob("*.png")):  # the next call may mend that by other weights or another precision
            with contextlib.suppress(OSError):
                for file in (folder / "generate.json", folder / LOCK):
                    file.unlink(missing_ok=True)
                folder.rmdir()
        raise
    if accelerator.is_main_process:
        revision = hub_revision(config.checkpoint)
        known = {} if revision is None else {"revision": revision}
        write_json(protocol_file(output), {**source.protocol, **known})
        if is_array:
            pack(folder, config.num_images, output)
        print(f"{config.num_images} images: {output}")
    if lock is not None:  # the folder is done, and holds nothing but images and what made them
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()


if __name__ == "__main__":
    run_command(main, GenerateConfig, __doc__)
