"""One start of a recipe: its folder, its processes, and whether it begins or goes on, decided once."""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from vkd_gen.cli import repository_path
from vkd_gen.data.draws import Draws
from vkd_gen.distillation import FrozenTeacher
from vkd_gen.evaluation.card import card_origin, model_card
from vkd_gen.evaluation.compare import evaluate
from vkd_gen.evaluation.diagnostics_figure import save_diagnostics
from vkd_gen.evaluation.figures import save_figure
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.evaluation.prompt_grid import draw_prompt_grid
from vkd_gen.evaluation.prompts import Prompts, given_prompts, of_images, read_prompts
from vkd_gen.evaluation.report import save_results
from vkd_gen.evaluation.scorer import Scorer, make_scorer
from vkd_gen.evaluation.tables import markdown_table, print_table
from vkd_gen.hub import check_place, hub_revision
from vkd_gen.models import Model
from vkd_gen.pictures import save_sample_grid, to_uint8
from vkd_gen.provenance import only_warns, write_json
from vkd_gen.schedule import Crossing, Schedule
from vkd_gen.text import printable
from vkd_gen.training.accelerator import make_accelerator, on_all_processes, on_main_process
from vkd_gen.training.checkpoints import check_checkpoint
from vkd_gen.training.export import after_export, check_upload, finish_export, try_saving
from vkd_gen.training.facts import cost_in_words, facts_of_data, hash_model, identity_of_images, run_facts
from vkd_gen.training.images import Data, encode_data, folder_of, load_data
from vkd_gen.training.options import DataOptions, TrainingOptions
from vkd_gen.training.probe import check_finite
from vkd_gen.training.quantization import quantize_teacher
from vkd_gen.training.run_folder import RunFolder, checkpoint_step
from vkd_gen.training.teacher_images import TeacherImages

MADE = ("pipeline/model_index.json", "pipeline/*/*.safetensors", "samples.npz", "samples.png", "report.html")
"""Patterns of what a finished run has made, beside its results."""


class Run:
    """A run of a recipe, from the checks of its folder to the table of its scores; to be used as a context.

    Args:
        options: of the run.
        flags: all that was asked for, one flat dictionary: see `flat_config`.
        script: `__file__` of the recipe, whose repository holds what presets name.
        find_unused_parameters: some steps leave trainable parameters without a gradient.

    Attributes:
        point: the checkpoint that the run goes on from; None for one that begins.

    Raises:
        ValueError: in one line, if the folder, the checkpoint, the processes or the upload are not as they must be.
    """

    def __init__(
        self,
        options: TrainingOptions,
        flags: Mapping[str, Any],
        *,
        script: str = "",
        find_unused_parameters: bool = False,
    ):
        torch.set_float32_matmul_precision("high")
        self.options, self.flags, self._script = options, dict(flags), script
        self.validation_prompts = given_prompts(options.validation_prompts)
        self._guidance_scale: float | None = None
        self._prompts: Prompts | None = None  # of images that the teacher draws
        self._facts: dict[str, Any] = {}
        self.folder = RunFolder(options.output_dir)
        self.point: Path | None = None
        if not options.dry_run:  # which writes nothing, whatever the folder holds
            self.point = self.folder.resume_point(options.resume_from_checkpoint)
            self.folder.check(self.flags, self.point)
            check_checkpoint(self.point)
            check_upload(options)
            source = self.find(self.flags.get("dataset", ""))
            check_place(source)  # before a teacher is loaded
            if self.flags.get("num_teacher_images") is not None:
                self._prompts = read_prompts(source, self.flags["caption_column"], to_train_on=True)
        self.accelerator = make_accelerator(options, find_unused_parameters=find_unused_parameters)
        self.point = on_all_processes(lambda: self.point)  # the first process has read every byte, the others sizes
        self.device, self.print = self.accelerator.device, self.accelerator.print
        self.exported = self.folder.path / "pipeline"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.release()

    @property
    def is_fresh(self) -> bool:
        """Whether the run begins, from no checkpoint."""
        return self.point is None

    @property
    def dtype(self) -> torch.dtype:
        """Of a frozen network's forward passes."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)

    def find(self, path: str) -> str:
        """A path of the recipe's repository, or any other as it is."""
        return repository_path(path, self._script)

    # ---- the opening

    def load_data(
        self,
        options: DataOptions,
        form: tuple[int, int],
        num_classes: int | None = None,
        *,
        model: Model | None = None,
    ) -> Data:
        """The images of the run, which are kept in `data`; see `load_data` of images.py."""
        if self.options.dry_run:  # which writes nothing
            options = replace(options, image_cache="")
        source = self.find(options.dataset)
        kind = {} if model is None else {"with_captions": model.takes_prompts, "of_latents": model.factor > 1}
        self.data = load_data(options, source, form, num_classes, self.print, **kind)
        return self.data

    def load_data_for(self, model: Model, options: DataOptions, teacher: Model | None = None) -> Data:
        """The images of the run as a model takes them, with what it can be told of them.

        Args:
            model: that takes them.
            options: of the recipe.
            teacher: that draws them, where that is asked for.
        """
        if teacher is not None and self._prompts is not None:
            options = self._draw(teacher, self._prompts, options)
        form = model.image_size, model.image_channels
        return self.load_data(options, form, model.num_classes or None, model=model)

    def _draw(self, teacher: Model, prompts: Prompts, options: DataOptions) -> DataOptions:
        """Let the teacher draw the images; the options of a data set that is them."""
        precision = self.accelerator.mixed_precision
        drawn = TeacherImages.of(teacher, prompts, folder_of(options, "drawings"), self.flags, precision)
        self.flags["teacher_images_sha256"], self._facts["images"] = drawn.folder.name, drawn.describe()
        self.folder.check(self.flags, self.point)  # before hours of drawing
        images = drawn.draw(teacher, self.device, batch_size=self.options.batch_size_apart, say=self.print)
        return replace(options, dataset=str(images), num_teacher_images=None, caption_column=None)

    def draws(self, schedule: Schedule, *, both_branches: bool = False) -> Draws:
        """What the run draws of its data; see `Draws`."""
        return self.data.draws(
            schedule,
            seed=self.options.seed,
            batch_size=self.options.batch_size_apart,
            group_size=self.options.train_batch_size,
            both_branches=both_branches,
            sampling=self.options.timestep_sampling,
        )

    def encode_data(self, options: DataOptions, *models: Model) -> None:
        """What models of latents are trained on, encoded by the first; then all of them let go of their encoders."""
        if not models[0].takes_prompts and self.validation_prompts is not None:
            raise ValueError("--validation_prompts are for models of prompts, and the teacher takes none")
        if models[0].factor == 1:
            return
        sizes = {"seed": self.options.seed, "batch_size": self.options.batch_size_apart}
        self.data = encode_data(self.data, options, models[0], **sizes, say=self.print)
        prompts = self.validation_prompts or of_images(
            self.data.held_out if len(self.data.held_out) else self.data.train
        )
        for model in models:
            model.prompts, model.guidance_scale = prompts.texts if prompts else (), self._guidance_scale
            model.release()
        gc.collect()

    def make_scorer(self, options: ScoreOptions) -> Scorer | None:
        """What scores samples against the run's data; None for the extractor `none`."""
        self._guidance_scale = options.guidance_scale
        options = replace(options, extractor=self.find(options.extractor))
        return make_scorer(options, self.data.reference, self.data.held_out, batch_size=self.options.batch_size_apart)

    def begin(self, sources: Mapping[str, tuple[str, Model, bool]], scored_by: Mapping[str, Any]) -> bool:
        """Hold the folder, compare what it holds with what is asked for, and write that down; for all processes.

        Args:
            sources: flag -> what was given for it, the model that is, and whether its weights are from there; the run
                goes on with no others.
            scored_by: how samples will be scored.

        Returns:
            Whether there is anything to do; False for a finished run, whose table is shown.

        Raises:
            ValueError: in one line, if another process holds the folder, or it holds another run.
        """
        data, facts = self.data, {**self.flags, **run_facts(self.accelerator, self.data)}
        for flag, (source, model, has_weights) in sources.items():
            facts[f"{flag}_sha256"] = hash_model(
                model.network.state_dict() if has_weights else {}, model.network, model.noise_scheduler
            )
            if (revision := hub_revision(source)) is not None:
                facts[f"{flag}_revision"] = revision

        def hold() -> dict[str, Any]:
            self.folder.hold()
            return facts_of_data(facts, data, tell=not self.is_fresh)

        facts |= on_all_processes(hold)  # the first process has read the images, the others need not
        self.folder.check(facts, self.point)
        self._scored_by = dict(scored_by)
        if on_all_processes(self._show_if_finished):
            return False
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.start(facts)
            write_json(self.folder.path / "skipped_images.json", [*data.train.skipped, *data.held_out.skipped])
        self._identity = on_main_process(lambda: identity_of_images(data))
        if self.options.report_to is not None:
            told = {name: printable(value) if isinstance(value, str) else value for name, value in self.flags.items()}
            plain = {name: value for name, value in told.items() if isinstance(value, int | float | str | bool)}
            directory = {"wandb": {"dir": str(self.folder.path)}}
            self.accelerator.init_trackers("vkd-gen", config=plain, init_kwargs=directory)
        self.accelerator.wait_for_everyone()
        return True

    def _show_if_finished(self) -> bool:
        """Show the table of a run that is trained, exported and scored as asked for; the main process alone."""
        options, path = self.options, self.folder.path
        if self.point is None or checkpoint_step(self.point) != options.max_train_steps or options.push_to_hub:
            return False
        try:
            results = json.loads((path / "results.json").read_bytes())
            if results["scored_by"] != self._scored_by or not all(any(path.glob(pattern)) for pattern in MADE):
                return False
            markdown_table(results)  # which fails where results are damaged, before anything is said
            print(
                f"{path} is finished: {options.max_train_steps:,} steps, exported and scored. For another run choose "
                "another --output_dir"
            )
            print_table(results)
            print(f"pipeline: {self.exported}\nreport: {path / 'report.html'}", flush=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False  # not there, damaged, or of an older version: it is scored again
        return True

    def freeze(self, teacher: Model, layers: list[str], draws: Draws) -> FrozenTeacher:
        """The teacher for the steps, in the precision of the run; its predictions and features are finite."""
        nn.Module.to(teacher.network, self.device, self.dtype)  # past diffusers' warning about casting
        kind, crossing = teacher.schedule.prediction_type, Crossing.between(draws.schedule, teacher.schedule)
        frozen = FrozenTeacher(teacher.network, layers, prediction_type=kind, crossing=crossing)
        if self.flags.get("teacher_quantization"):
            few = next(draws.apart(64, device=self.device, guidance_dropout=0.0))
            self.print(quantize_teacher(frozen, draws.schedule.to(self.device), few))
        self.check_finite(frozen, draws, f"the teacher {self.flags['teacher']}")
        return frozen

    def check_finite(self, network: ModelMixin | FrozenTeacher, draws: Draws, name: str) -> None:
        """Ask a network, on the run's device, at both ends of the schedule; see `check_finite`."""
        few = next(draws.apart(4, device=self.device, guidance_dropout=0.0))
        check_finite(network, draws.schedule.to(self.device), few, name)

    def try_end(self, name: str, model: Model, facts: Mapping[str, Any]) -> None:
        """Do before the first step what the end of the run will do; see `try_saving`.

        Args:
            name: `student` or `teacher`.
            model: that is to be trained.
            facts: for its card, a row each.
        """
        if self._guidance_scale is not None and not (model.takes_prompts or model.num_classes):
            raise ValueError("--guidance_scale is for models of prompts or classes, and this one takes neither")
        model.network.to(self.device)
        dataset, self._name, self._num_inference_steps = self.flags["dataset"], name, self.flags["num_inference_steps"]
        facts = {**self._facts, **facts, "steps": self.options.max_train_steps, "seed": self.options.seed}
        title, classes = f"{data_label(dataset)} {name}", model.num_classes or None
        origin = card_origin(self.find(str(facts.get("teacher", ""))))

        def card(results: str = "", **more: Any) -> str:
            return model_card(
                title,
                {**facts, **more},
                results,
                data=dataset,
                num_classes=classes,
                stock_pipeline=type(model.pipeline).__name__ if model.factor > 1 else None,
                origin=origin,
            )

        self._card = card
        how = {"num_inference_steps": self._num_inference_steps, "variant": self.options.export_variant}
        on_main_process(lambda: try_saving(model, self.exported, card(), name=f"the {name}", **how))

    # ---- what a loop does at times

    def preview(self, model: Model, teacher: Model | None = None) -> Callable[[int], Mapping[str, float]]:
        """An action of the loop: a grid of samples in previews/; of prompts, with the teacher's from equal seeds."""
        of_teacher: dict[str, Tensor] = {}  # made once

        def save(step: int) -> None:
            path = self.folder.path / "previews" / f"step-{step:06d}.png"
            with only_warns(f"the preview {path}", "training goes on"):
                batch_size = self.options.batch_size_apart
                if not model.takes_prompts:
                    save_sample_grid({f"step {step}": model.images(range(32), batch_size=batch_size)}, path)
                    return
                if teacher is not None and not of_teacher:
                    of_teacher["teacher"] = teacher.images(range(8), batch_size=batch_size)
                rows = {**of_teacher, f"step {step}": model.images(range(8), batch_size=batch_size)}
                path.parent.mkdir(parents=True, exist_ok=True)
                save_figure(
                    draw_prompt_grid(rows, [model.prompts[seed % len(model.prompts)] for seed in range(8)]), path
                )

        def act(step: int) -> Mapping[str, float]:
            on_main_process(lambda: save(step))
            self.accelerator.wait_for_everyone()
            return {}

        return act

    def score(self, name: str, model: Model, scorer: Scorer | None) -> Callable[[int], Mapping[str, float]]:
        """An action of the loop: scores of samples; none without a scorer."""

        def act(step: int) -> Mapping[str, float]:
            if scorer is None:
                return {}
            try:
                return {f"score/{score.key}": score.value for score in scorer.score_model(name, model)[0]}
            except ValueError as error:  # samples that are not finite, on all processes alike
                self.print(f"warning: step {step} has no scores, and training goes on: {error}")
                return {}

        return act

    # ---- the end

    def finish(
        self,
        models: Mapping[str, Model],
        scorer: Scorer | None,
        *,
        scored: set[str] | None = None,
        shows_data: bool = False,
    ) -> None:
        """Export the trained model, score it, and show and write down what came of it; for all processes.

        Args:
            models: to compare, by name, with averaged weights; the trained one is named as in `try_end`.
            scorer: of samples.
            scored: names of the models whose samples are scored; by default all.
            shows_data: held-out images are shown beside the samples.
        """
        main, data, path, name = self.accelerator.is_main_process, self.data, self.folder.path, self._name
        if self._identity != on_main_process(lambda: identity_of_images(data)):
            tqdm.write(
                f"note: files of {data.train.name} changed while the run read them; it is not known which of their "
                "contents it was trained on"
            )
        cost = cost_in_words(self.options, self.accelerator, self.folder.metrics)
        # Exported before it is scored, so that nothing which fails from here on can lose it.
        on_main_process(
            lambda: models[name].save(self.exported, self._card(training=cost), self.options.export_variant)
        )
        self.accelerator.wait_for_everyone()
        with after_export(self.exported):
            results, samples = evaluate(
                models,
                data.held_out_samples,
                scorer=scorer,
                scored=scored,
                num_inference_steps=self._num_inference_steps,
                batch_size=self.options.batch_size_apart,
            )
            if main:
                samples |= {"held-out images": to_uint8(data.held_out.stack(32))} if shows_data else {}
                save_results(path, {**results, "scored_by": self._scored_by}, samples)
        self.end()
        if not main:
            return
        figure = path / "diagnostics.png"
        with only_warns(f"the figure {figure}", "the numbers are in metrics.jsonl"):
            save_diagnostics(path / "metrics.jsonl", figure)
        finish_export(self.exported, lambda: self._card(markdown_table(results), training=cost), self.options)
        print_table(results)
        print(f"{name}: {self.exported}\nsamples: {path / 'samples.png'}\nreport: {path / 'report.html'}")
        if figure.exists():
            print(f"diagnostics: {figure}")

    def end(self) -> None:
        """End the trackers and the processes' connection."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.folder.release()
