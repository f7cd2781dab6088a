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
    from vkd_gen.evaluation.sources import ImageSource
    from vkd_gen.models import Model


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


def check_output(config: ScoreConfig, folder: Path) -> None:
    """Refuse an output folder that cannot be one, or holds what this call may not replace."""
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


def is_of_run(folder: Path) -> bool:
    """Whether a run of the recipes made this folder, or exported this pipeline."""
    from vkd_gen.training.run_folder import RunFolder

    folder = folder.resolve()
    return RunFolder(str(folder.parent if folder.name == "pipeline" else folder)).is_own()


def open_source(name: str, config: ScoreConfig) -> "tuple[ImageSource, Model | None]":
    """The images that a name on the command line stands for, and the model that makes them, if one does."""
    from vkd_gen.evaluation.sources import from_model, open_images
    from vkd_gen.models import Model
    from vkd_gen.sampling import load_pipeline

    place = repository_path(name, __file__)
    images = open_images(place)
    if images is not None:
        return images, None
    model = Model(load_pipeline(place, config.sampler))
    options = {"guidance_scale": config.guidance_scale, "precision": config.mixed_precision}
    count, steps = config.scores.num_score_samples, config.scores.num_inference_steps
    return from_model(name, model, count=count, first_seed=config.seed, num_inference_steps=steps, **options), model


def update_card(name: str, results: dict[str, Any], config: ScoreConfig) -> None:
    """Write the scores into the model card of a local pipeline, if it is a run's own or that is asked for."""
    from vkd_gen.evaluation.card import update_model_card
    from vkd_gen.provenance import only_warns

    if not config.update_foreign_cards and not is_of_run(Path(name)):
        print(f"{name}: no run's own pipeline, its card stays as it is; see --update_foreign_cards")
        return
    with only_warns(f"the model card of {name}", f"the scores are in {Path(config.output_dir) / 'results.json'}"):
        print(f"model card: {update_model_card(Path(name), results, name, config.reference)}")


def main(config: ScoreConfig) -> None:
    """Score every source against one reference, and write one table."""
    folder = Path(config.output_dir)
    check_output(config, folder)
    announce(f"scoring {', '.join(config.sources)} against {config.reference}, into {folder}")

    from vkd_gen.evaluation.labels import row_of
    from vkd_gen.evaluation.reference import open_reference
    from vkd_gen.evaluation.report import save_results
    from vkd_gen.evaluation.scorer import Scorer, note_foreign_features
    from vkd_gen.evaluation.tables import print_table
    from vkd_gen.provenance import environment, hub_revision
    from vkd_gen.training.accelerator import make_sampling_accelerator, on_main_process

    accelerator = make_sampling_accelerator()
    options = replace(config.scores, extractor=repository_path(config.scores.extractor, __file__))
    config = replace(config, reference=repository_path(config.reference, __file__))
    opened = {name: open_source(name, config) for name in config.sources}
    sizes = {name: source.size for name, (source, _) in opened.items()}
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{name} {size} x {size}" for name, size in sizes.items())
        raise ValueError(f"images of unlike sizes cannot be compared to one reference: {described}")
    samplers = {type(model.pipeline.scheduler).__name__ for _, model in opened.values() if model is not None}
    if len(samplers) > 1:
        accelerator.print(f"note: sampled by {' and '.join(sorted(samplers))}; --sampler makes them comparable")
    of_data = {name: getattr(config, name) for name in ("held_out_fraction", "image_column", "on_bad_image")}
    reference, held_out = open_reference(config.reference, next(iter(sizes.values())), **of_data)
    for source in (*(source for source, _ in opened.values()), reference, held_out):
        for line in getattr(source, "notes", ()):  # statistics have none
            accelerator.print(f"{source.name}: {line}")
    least = min(source.count for source, _ in opened.values())
    scorer = Scorer(options, reference, held_out, batch_size=config.batch_size, num_samples=least)
    note_foreign_features(scorer.extractor, config.reference)
    lock = on_main_process(partial(hold_folder, folder))
    results: dict[str, Any] = {"rows": {}, "protocol": {**scorer.protocol, "environment": environment()}, "sources": {}}
    real, samples = row_of(scorer.scores_of_held_out()), {}
    for name, (source, model) in opened.items():
        if model is not None:
            model.pipeline.to(accelerator.device)
        scores, features = scorer(source)
        if model is not None:
            model.pipeline.to("cpu")
        results["rows"].pop("held-out images", None)
        results["rows"] |= {name: row_of(scores)} | ({"held-out images": real} if real else {})
        revision = {} if (found := hub_revision(name)) is None else {"revision": found}
        results["sources"][name] = {**source.protocol, "images_sha256": features.content_hash, **revision}
        samples[name] = features.shown
        if accelerator.is_main_process:  # after each source, so that a later one cannot lose it
            save_results(folder, results, samples)
            if model is not None and config.update_cards and Path(name).is_dir():
                update_card(name, results, config)
    if accelerator.is_main_process:
        print_table(results)
        print(f"results: {folder / 'results.json'}\nreport: {folder / 'report.html'}")
    if lock is not None:
        lock.close()


if __name__ == "__main__":
    run_command(main, ScoreConfig, __doc__)
