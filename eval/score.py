"""Score images: FID, Inception score, KID, precision, recall, CLIP score, and how close they lie to training images.

python eval/score.py runs/digits --reference digits --extractor recipes/assets/digits-features.safetensors
accelerate launch eval/score.py runs/half google/ddpm-cifar10-32 --reference uoft-cs/cifar10 --num_score_samples 50000
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.choices import OnBadImage
from vkd_gen.cli import announce, check_output_file, repository_path, run_command
from vkd_gen.evaluation.options import SamplingOptions, ScoreOptions
from vkd_gen.evaluation.published import COCO30K, COCO30K_CLIP, COCO30K_ROWS, COCO30K_SOURCE
from vkd_gen.files import hold_folder
from vkd_gen.provenance import RESULT_FILES

if TYPE_CHECKING:
    from vkd_gen.evaluation.prompts import Prompts
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
    preset: str = ""
    """`coco30k`: BK-SDM's protocol, for 30,000 --prompts of MS-COCO and a --reference of its images of 256 pixels, or
    their saved statistics; the published scores stand in the table."""
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
    update_cards: bool = True
    """Write the scores into the model cards of pipelines that runs exported, in the runs' own folders."""
    update_foreign_cards: bool = False
    """Also into those of other pipelines in local folders."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How pipelines make images."""
    scores: ScoreOptions = field(default_factory=lambda: ScoreOptions(num_score_samples=10_000))
    """What images are scored by."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.sources:
            raise ValueError("name at least one pipeline, folder or .npz to score")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"a source is named twice: {' '.join(self.sources)}")
        if self.scores.extractor == "none":
            raise ValueError("scores need an --extractor")


PRESETS = {"coco30k": (*COCO30K, "--num_score_samples", "30000", "--clip_model", COCO30K_CLIP)}


def check_output(config: ScoreConfig, folder: Path) -> None:
    """Refuse an output folder that cannot be one, or holds what this call may not replace."""
    for path in (folder / name for name in RESULT_FILES):
        check_output_file(path)
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path}: this folder already holds results; choose another --output_dir, or --overwrite")
    if folder.is_dir() and is_of_run(folder):  # whose results are no earlier call's, to be replaced by --overwrite
        raise ValueError(f"{folder} is a run's folder, or its pipeline; choose another --output_dir")


def is_of_run(folder: Path) -> bool:
    """Whether a run of the recipes made this folder, or exported this pipeline."""
    from vkd_gen.training.run_folder import RunFolder

    folder = folder.resolve()
    return RunFolder(str(folder.parent if folder.name == "pipeline" else folder)).is_own()


def open_source(name: str, config: ScoreConfig, prompts: "Prompts | None") -> "tuple[ImageSource, Model | None]":
    """The images that a name on the command line stands for, and the model that makes them, if one does."""
    from vkd_gen.evaluation.samples import from_model
    from vkd_gen.evaluation.sources import open_images
    from vkd_gen.models import Model
    from vkd_gen.pipelines import load_pipeline

    place = repository_path(name, __file__)
    if (images := open_images(place)) is not None:
        return replace(images, prompts=prompts), None
    model = Model(load_pipeline(place, config.sampling.sampler))
    of_scores = {
        "num_inference_steps": config.scores.num_inference_steps,
        "guidance_scale": config.scores.guidance_scale,
    }
    count = config.scores.num_score_samples
    return from_model(name, model, config.sampling, count=count, prompts=prompts, **of_scores), model


def main(config: ScoreConfig) -> None:
    """Score every source against one reference, and write one table."""
    folder = Path(config.output_dir)
    check_output(config, folder)
    announce(f"scoring {', '.join(config.sources)} against {config.reference}, into {folder}")

    from vkd_gen.evaluation.card import update_model_card
    from vkd_gen.evaluation.labels import row_of
    from vkd_gen.evaluation.reference import open_reference
    from vkd_gen.evaluation.report import save_results
    from vkd_gen.evaluation.scorer import Scorer, note_foreign_features
    from vkd_gen.evaluation.sources import check_comparable
    from vkd_gen.evaluation.tables import print_table
    from vkd_gen.hub import hub_revision
    from vkd_gen.provenance import environment, only_warns
    from vkd_gen.training.accelerator import make_sampling_accelerator, on_main_process

    accelerator = make_sampling_accelerator()
    options = replace(config.scores, extractor=repository_path(config.scores.extractor, __file__))
    config = replace(config, reference=repository_path(config.reference, __file__))
    prompts = config.sampling.read_prompts()
    opened = {name: open_source(name, config, prompts) for name in config.sources}
    sources = {name: source for name, (source, _) in opened.items()}
    of_data = {name: getattr(config, name) for name in ("held_out_fraction", "image_column", "on_bad_image")}
    reference, held_out = open_reference(config.reference, check_comparable(sources), **of_data)
    for source in (*sources.values(), reference, held_out):
        for line in getattr(source, "notes", ()):  # statistics have none
            accelerator.print(f"{source.name}: {line}")
    if options.clip_model and prompts is None:
        raise ValueError("--clip_model scores images by their prompts: name these by --prompts")
    least = min(source.count for source in sources.values())
    scorer = Scorer(options, reference, held_out, batch_size=config.sampling.batch_size, num_samples=least)
    note_foreign_features(scorer.extractor, config.reference)
    lock = on_main_process(partial(hold_folder, folder))
    results: dict[str, Any] = {"rows": {}, "protocol": {**scorer.protocol, "environment": environment()}, "sources": {}}
    real, samples = row_of(scorer.scores_of_held_out()), {}
    below = ({"held-out images": real} if real else {}) | (COCO30K_ROWS if config.preset == "coco30k" else {})
    if config.preset == "coco30k":
        results["protocol"]["published"] = COCO30K_SOURCE
    for name, (source, model) in opened.items():
        if model is not None:
            model.pipeline.to(accelerator.device)
        scores, features = scorer(source)
        if model is not None:
            model.pipeline.to("cpu")
        measured = {key: row for key, row in results["rows"].items() if key not in below}
        results["rows"] = {**measured, name: row_of(scores), **below}
        revision = {} if (found := hub_revision(name)) is None else {"revision": found}
        results["sources"][name] = {**source.protocol, "images_sha256": features.content_hash, **revision}
        samples[name] = features.shown
        if prompts is not None:
            results["prompts"] = prompts.of(range(min(map(len, samples.values()))))
        if accelerator.is_main_process:  # after each source, so that a later one cannot lose it
            save_results(folder, results, samples)
            if model is not None and config.update_cards and Path(name).is_dir():
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
    run_command(main, ScoreConfig, __doc__, PRESETS)
