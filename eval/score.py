"""Score images by FID, Inception score, KID, precision and recall, and by how close they lie to training images.

python eval/score.py runs/digits --reference digits --extractor recipes/assets/digits-features.safetensors
accelerate launch eval/score.py runs/half google/ddpm-cifar10-32 --reference uoft-cs/cifar10 --num_score_samples 50000
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.choices import OnBadImage, Precision, Sampler
from vkd_gen.cli import announce, repository_path, run_command
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.files import hold_folder
from vkd_gen.provenance import RESULT_FILES

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from vkd_gen.evaluation.sources import ImageSource


OF_MODELS = ("model_index.json", "pipeline/model_index.json", "unet/config.json", "diffusion_pytorch_model.safetensors")
"""What a folder of images does not hold: a folder with one of these is a pipeline's, or a model's by mistake."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to score, against what. Nothing is written to disk on the way: images go from the sampler to the network."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Each a folder of a pipeline or of a recipe's run, a hub id (or ID@REVISION), a folder of images, or an .npz of
    images."""
    reference: str
    """Data set that the models were trained on: its name, a folder of images, parquet or arrow files, a hub id, an .npz
    of images, or an .npz of `mu` and `sigma` (FID alone)."""
    output_dir: str = "scores"
    """Folder for results.json, samples and the report."""
    overwrite: bool = False
    """Replace what an earlier call left in the output folder."""
    held_out_fraction: float | None = None
    """Share of the reference that training held out, where it has no test split of its own; by default the recipes'
    share for digits and mnist, 0 for all else."""
    image_column: str | None = None
    """Column of the images in a table; by default the only one that holds images."""
    on_bad_image: OnBadImage = "refuse"
    """An image of the reference that cannot be read: `refuse` stops, `skip` leaves it out."""
    sampler: Sampler | None = None
    """Sampler of UNet pipelines; by default each pipeline's own."""
    guidance_scale: float | None = None
    """Guidance of class-conditional pipelines, whose images are of the class seed modulo classes."""
    seed: int = 0
    """Seed of the first sample; image i comes from seed SEED + i."""
    mixed_precision: Precision = "no"
    """Precision of the sampled networks; the extractor works in float32."""
    batch_size: int = 64
    """Images at a time, per process."""
    update_cards: bool = True
    """Write the scores into the model cards of pipelines that runs exported, in the runs' own folders."""
    update_foreign_cards: bool = False
    """Also into those of other pipelines in local folders."""
    scores: ScoreOptions = field(default_factory=lambda: ScoreOptions(num_score_samples=10_000))
    """What images are scored by."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.sources:
            raise ValueError("name at least one pipeline, folder or .npz to score")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"a source is named twice: {' '.join(self.sources)}")
        if self.seed + self.scores.num_score_samples > 2**63:
            raise ValueError(f"--seed {self.seed} is too large; seeds are below 2^63")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"--guidance_scale must be at least 1 and finite, not {self.guidance_scale}")
        if self.seed < 0 or self.batch_size < 1:
            raise ValueError("--seed must be at least 0 and --batch_size at least 1")
        if self.held_out_fraction is not None and not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"--held_out_fraction must be at least 0 and below 1, not {self.held_out_fraction}")
        if self.scores.extractor == "none":
            raise ValueError("scores need an --extractor")


def open_source(name: str, config: ScoreConfig) -> "tuple[ImageSource, int, DiffusionPipeline | None]":
    """What a name on the command line stands for, with the side of its images."""
    from vkd_gen.evaluation.sources import from_array, from_folder, from_model
    from vkd_gen.models import Model
    from vkd_gen.sampling import load_pipeline

    path = Path(place := repository_path(name, __file__))
    if path.suffix == ".npz":
        source, pipeline = from_array(place), None
    elif path.is_dir() and not any((path / file).exists() for file in OF_MODELS):
        source, pipeline = from_folder(place), None
    else:
        model = Model(load_pipeline(place, config.sampler))
        source = from_model(
            name,
            model,
            count=config.scores.num_score_samples,
            first_seed=config.seed,
            num_inference_steps=config.scores.num_inference_steps,
            guidance_scale=config.guidance_scale,
            precision=config.mixed_precision,
        )
        return source, model.image_size[0], model.pipeline
    first = source.read(range(1))
    if first.shape[-1] != first.shape[-2]:
        raise ValueError(
            f"the images in {name} are {first.shape[-2]} x {first.shape[-1]} pixels; square ones are scored"
        )
    return source, first.shape[-1], pipeline


def open_reference(
    config: ScoreConfig, size: int
) -> "tuple[ImageSource | tuple[torch.Tensor, torch.Tensor], ImageSource | None]":
    """The images (or statistics) to compare to, and held-out images where there are some."""
    from vkd_gen.data.embedded import EMBEDDED
    from vkd_gen.data.sources import load_images
    from vkd_gen.evaluation.scorer import holds_statistics, load_statistics_file
    from vkd_gen.evaluation.sources import from_array, from_images

    path = Path(config.reference)
    if path.suffix == ".npz":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        if config.held_out_fraction:
            raise ValueError("--held_out_fraction is for data sets; an .npz reference is taken whole")
        if holds_statistics(path):
            return load_statistics_file(config.reference), None
        source = from_array(config.reference)
        side = source.read(range(1)).shape[-1]
        if side != size:
            raise ValueError(
                f"the reference {path} holds images of {side} x {side} pixels, the sources of {size} x {size}"
            )
        return source, None
    fraction = config.held_out_fraction
    if fraction is None:
        fraction = 1 / 6 if config.reference in EMBEDDED else 0
    images, held_out = load_images(
        config.reference,
        resolution=size,
        channels=3,
        held_out_fraction=fraction,
        image_column=config.image_column,
        on_bad_image=config.on_bad_image,
    )
    return from_images("reference", images), from_images("held-out images", held_out) if len(held_out) else None


def is_of_run(folder: Path) -> bool:
    """Whether a run of the recipes made this folder, or exported this pipeline."""
    from vkd_gen.training.run_folder import RunFolder

    folder = folder.resolve()
    return RunFolder(str(folder.parent if folder.name == "pipeline" else folder)).is_own()


def main(config: ScoreConfig) -> None:
    """Score every source against one reference, and write one table."""
    folder = Path(config.output_dir)
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--output_dir {folder} cannot be a folder: {parent} is a file")
    for path in (folder / name for name in RESULT_FILES):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file, and results are written there; choose another --output_dir")
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path}: this folder already holds results; choose another --output_dir, or --overwrite")
    if folder.is_dir() and is_of_run(folder):  # whose results are no earlier call's, to be replaced by --overwrite
        raise ValueError(f"{folder} is a run's folder, or its pipeline; choose another --output_dir")
    announce(f"scoring {', '.join(config.sources)} against {config.reference}, into {folder}")

    import torch
    from accelerate import Accelerator
    from diffusers.utils.logging import disable_progress_bar

    from vkd_gen.evaluation.card import update_model_card
    from vkd_gen.evaluation.compare import print_table
    from vkd_gen.evaluation.report import save_results
    from vkd_gen.evaluation.scorer import Scorer, note_foreign_features
    from vkd_gen.provenance import environment, hub_revision, only_warns
    from vkd_gen.training.accelerator import check_processes, on_main_process

    torch.set_float32_matmul_precision("high")
    accelerator = Accelerator()
    check_processes(accelerator)
    disable_progress_bar()  # of the loading of a pipeline's few parts
    options = replace(config.scores, extractor=repository_path(config.scores.extractor, __file__))
    config = replace(config, reference=repository_path(config.reference, __file__))
    opened = {name: open_source(name, config) for name in config.sources}
    sizes = {name: size for name, (_, size, _) in opened.items()}
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{name} {size} x {size}" for name, size in sizes.items())
        raise ValueError(f"images of unlike sizes cannot be compared to one reference: {described}")
    samplers = {type(pipeline.scheduler).__name__ for *_, pipeline in opened.values() if pipeline is not None}
    if len(samplers) > 1:
        accelerator.print(f"note: sampled by {' and '.join(sorted(samplers))}; --sampler makes them comparable")
    reference, held_out = open_reference(config, next(iter(sizes.values())))
    for source in (*(source for source, *_ in opened.values()), reference, held_out):
        for line in getattr(source, "notes", ()):  # statistics have none
            accelerator.print(f"{source.name}: {line}")
    scorer = Scorer(
        options,
        reference,
        held_out,
        batch_size=config.batch_size,
        num_samples=min(source.count for source, *_ in opened.values()),
    )
    note_foreign_features(scorer.extractor, config.reference)
    lock = on_main_process(partial(hold_folder, folder))
    results: dict[str, Any] = {"rows": {}, "protocol": {**scorer.protocol, "environment": environment()}, "sources": {}}
    real = scorer.scores_of_held_out()
    samples = {}
    for name, (source, _, pipeline) in opened.items():
        if pipeline is not None:
            pipeline.to(accelerator.device)
        scores, features = scorer(source)
        if pipeline is not None:
            pipeline.to("cpu")
        results["rows"].pop("held-out images", None)
        results["rows"] |= {name: scores} | ({"held-out images": real} if real else {})
        results["sources"][name] = {**source.protocol, "images_sha256": features.content_hash}
        revision = hub_revision(name)
        results["sources"][name] |= {} if revision is None else {"revision": revision}
        samples[name] = features.shown
        if accelerator.is_main_process:  # after each source, so that a later one cannot lose it
            save_results(folder, results, samples)
            if pipeline is not None and config.update_cards and Path(name).is_dir():
                if config.update_foreign_cards or is_of_run(Path(name)):
                    with only_warns(f"the model card of {name}", f"the scores are in {folder / 'results.json'}"):
                        print(f"model card: {update_model_card(Path(name), results, name, config.reference)}")
                else:
                    print(f"{name}: no run's own pipeline, its card stays as it is; see --update_foreign_cards")
    if accelerator.is_main_process:
        print_table(results)
        print(f"results: {folder / 'results.json'}\nreport: {folder / 'report.html'}")
    if lock is not None:
        lock.close()


if __name__ == "__main__":
    run_command(main, ScoreConfig, __doc__)
