"""Models from folders: weights matched by name, in memory, and no code of theirs is run.

Every loader of this package goes through here. Only JSON and safetensors are read; a model is built by diffusers' own
class, never by one that a file names and Python would have to import.
"""

import inspect
import json
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import safe_open
from torch import Tensor, nn

from vkd_gen.hub import WEIGHTS
from vkd_gen.limits import check_sizes

WRAPPERS = {
    "module": "DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""What wrappers put into the names of the weights that they hold."""

EARLY_NAMES = {diffusers.DiTTransformer2DModel: "Transformer2DModel"}
"""Names that classes of models had when well-known weights were saved."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: in one line: not there, no regular file (a pipe or device would never end), no JSON object.
    """
    check_file(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: it is no JSON ({str(error)[:80]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it is not a JSON object")
    return content


def check_file(path: Path) -> None:
    """Refuse what cannot be read as a file.

    Raises:
        ValueError: for what is not there, and for a folder, pipe, socket or device.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no regular file' if path.exists() else 'not there'}")


def weight_files(folder: Path, variant: str | None = None, name: str = WEIGHTS) -> list[Path]:
    """The safetensors that a model in a folder is read from: one file, or those that an index names.

    Args:
        folder: of the model.
        variant: such as `fp16`, whose files have it in their names.
        name: of the weights, before the suffix.

    Raises:
        ValueError: in one line, for pickles alone, no weights at all, and an index that leads out of the folder.
    """
    dotted = f".{variant}" if variant else ""
    index, single = folder / f"{name}.safetensors.index{dotted}.json", folder / f"{name}{dotted}.safetensors"
    if index.exists():
        entries = read_json(index).get("weight_map")
        names = list(dict.fromkeys(entries.values())) if isinstance(entries, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index} names no files of this folder")
        files = [folder / name for name in names]
    elif single.exists():
        files = [single]
    else:
        raise ValueError(f"{folder} holds {_instead(folder, single.name)}")
    for file in files:
        check_file(file)
    return files


def _instead(folder: Path, name: str) -> str:
    """What a folder without the weights of this name holds, and what to do about it."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    others = [name for name in found if name.endswith(".safetensors")]
    if pickles and not others:
        return (
            f"pickled weights only: {pickles[0]} is pickled and can run code when loaded; if you trust it, convert it "
            "once to safetensors: CLASS.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER), "
            "with the class that its config.json names"
        )
    beside = (
        f"; {others[0]} is read under that name alone: train_student_unet.py takes a text pipeline's variant by "
        "--teacher_variant; else load it once with variant=... and save it anew by save_pretrained(NEW_FOLDER)"
        if others
        else ""
    )
    return f"no weights: {name} is not there{beside}"


Layout = dict[str, tuple[tuple[int, ...], bool]]
"""Name of a tensor -> its shape, and whether it holds floating-point numbers."""


def stored_layout(files: Iterable[Path]) -> Layout:
    """What safetensors hold, from their headers alone."""
    layout: Layout = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                layout[name] = (tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
    return layout


def check_layout(stored: Layout, model: nn.Module, source: str | Path) -> None:
    """Refuse weights that are not a model's, by name, shape and kind of number.

    Args:
        stored: from `stored_layout`.
        model: that they are for; may be on the meta device.
        source: where they lie, for the message.

    Raises:
        ValueError: in one line, with some of the names that are missing, not used or of another shape, and the reason
            where the names tell it.
    """
    needed = {name: (tuple(value.shape), value.is_floating_point()) for name, value in model.state_dict().items()}
    missing = [name for name in needed if name not in stored]
    unused = [name for name in stored if name not in needed]
    shapes, kinds = (
        [name for name in needed if name in stored and stored[name][entry] != needed[name][entry]] for entry in (0, 1)
    )
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(needed)} are missing ({_some(missing)})")
    if unused:
        faults.append(f"{len(unused)} are of no use to it ({_some(unused)})")
    if shapes:
        name = shapes[0]
        example = f"{name} is {list(stored[name][0])}, not {list(needed[name][0])}"
        faults.append(f"{len(shapes)} have another shape ({example})")
    if kinds:
        faults.append(f"{len(kinds)} are quantised or of another kind of number ({_some(kinds)})")
    if faults:
        reason = explain_names(stored, needed)
        raise ValueError(
            f"the weights in {source} are not those of the {type(model).__name__} that its configuration asks for: "
            + (f"{reason}; " if reason else "")
            + ", ".join(faults)
        )


def explain_names(stored: Iterable[str], needed: Iterable[str] = ()) -> str:
    """Why names of weights are not the model's own, in words: a wrapper's or another prefix; empty if none shows."""
    stored, needed = list(stored), set(needed)
    found = [part for part in WRAPPERS if any(part in name.split(".") for name in stored)]
    if found:
        parts = " and ".join(f"`{part}.`, which {WRAPPERS[part]} puts there" for part in found)
        return (
            f"their names carry {parts}: save the bare model instead, as in "
            "accelerator.unwrap_model(model).save_pretrained(FOLDER), or take it out of the names"
        )
    for name in stored:
        prefix, rest = name.split(".", 1) if "." in name else ("", "")
        while rest and rest not in needed:
            part, _, rest = rest.partition(".")
            prefix += "." + part
        if rest:
            return f"their names begin with `{prefix}.`: save the model without what is around it"
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def load_model(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """Load a model of diffusers with its weights, in float32 and eval mode, in memory.

    Args:
        kind: its class.
        folder: of its config.json and safetensors.

    Raises:
        ValueError: in one line: another class, sizes that no model has, weights that are not this model's.
    """
    check_model(kind, folder)
    return _read_model(kind, folder)


def check_model(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """What `load_model` would load, on the meta device, once its configuration and the headers of its weights fit."""
    model = model_without_weights(kind, folder)
    files = weight_files(folder)
    layout = stored_layout(files)
    if files[0].name == f"{WEIGHTS}.safetensors":
        model._fix_state_dict_keys_on_load(layout)  # early names of attention layers, which diffusers reads there
    check_layout(layout, model, folder)
    check_memory(model, str(folder))
    return model


def _read_model(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    # Under memory saving, tensors of unlike shapes end as errors far from their cause.
    model, info = kind.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"the weights in {folder} have changed since their names were read")
    model.float()
    with torch.no_grad():
        # safetensors maps weights from the file: what is written over it later would be trained with.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def model_without_weights(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """The model that a folder's config.json describes, on the meta device.

    Raises:
        ValueError: in one line: no config.json of this class, or sizes that no model has.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name", kind.__name__) not in (kind.__name__, EARLY_NAMES.get(kind)):
        raise ValueError(f"{path} is of {str(config['_class_name'])[:80]!r}, not of {kind.__name__}")
    check_sizes(config, str(path), "model")
    with torch.device("meta"):
        return kind.from_config(config)


def read_tensors(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory: what is written over the file later does not reach them.

    Args:
        path: of the file.
        prefixes: of the names that are wanted.

    Raises:
        ValueError: for what is no regular file.
    """
    check_file(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """Give a model on the meta device its weights, in float32 and eval mode, once names and shapes fit.

    Args:
        model: on the meta device.
        tensors: its weights by name, which become its own.
        source: where they are from, for the message.

    Raises:
        ValueError: in one line, for weights that are not this model's, and see `check_memory`.
    """
    layout = {name: (tuple(value.shape), value.is_floating_point()) for name, value in tensors.items()}
    check_layout(layout, model, source)
    check_memory(model, str(source))
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return model.eval().requires_grad_(True)


def check_memory(model: nn.Module, source: str) -> None:
    """Refuse a model whose weights, in float32, are larger than this machine's memory."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the weights of {source} would take {needed / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB"
        )


def pipeline_class(index: Mapping[str, Any], own: Sequence[type[DiffusionPipeline]] = ()) -> type[DiffusionPipeline]:
    """The class of a model_index.json that asks for no code but diffusers', transformers' and `own` classes'.

    Raises:
        ValueError: in one line, naming the entry.
    """
    name = index.get("_class_name")
    kind = {entry.__name__: entry for entry in own}.get(name) if isinstance(name, str) else None
    kind = kind or (getattr(diffusers, name, None) if isinstance(name, str) else None)
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise ValueError(f"its class {name!r} is not one of diffusers' pipelines; code of its own is not run")
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list):
            continue
        library = value[0] if value else None
        if library not in (None, "diffusers", "transformers") and not (
            isinstance(library, str) and hasattr(diffusers.pipelines, library)
        ):
            raise ValueError(f"its part {part!r} is of {library!r}, not of diffusers or transformers; that is not run")
        if Path(part).name != part:
            raise ValueError(f"its part {part!r} lies outside of its folder")
    return kind


def load_parts(kind: type[DiffusionPipeline], folder: Path) -> dict[str, Any]:
    """What a pipeline of models and schedulers of diffusers is made of, each part checked before the first is loaded.

    The pipeline's own loader imports Python files that lie in the folder, where its index names them, and so do nested
    pipelines; here each part is loaded by its own class.

    Args:
        kind: the pipeline's class.
        folder: of its model_index.json.

    Returns:
        The arguments of `kind`.

    Raises:
        ValueError: in one line, naming the part that is not what `kind` takes.
    """
    index = read_json(folder / "model_index.json")
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    checked: dict[str, tuple[Any, Path]] = {}
    for parameter in parameters:
        if parameter.default is not parameter.empty:  # a plain value, such as DiT's names of classes
            continue
        wanted = _models_of(parameter.annotation)
        part = _part_class(parameter.name, index.get(parameter.name), wanted)
        # Early pipelines have their parts in one folder.
        place = folder / parameter.name if (folder / parameter.name).is_dir() else folder
        if wanted:
            model = check_model(part, place)
            if not isinstance(model, wanted):
                raise ValueError(f"its part {parameter.name!r} is a {type(model).__name__}, not a {_names(wanted)}")
        else:
            check_sizes(read_json(place / "scheduler_config.json"), str(place / "scheduler_config.json"), "schedule")
        checked[parameter.name] = (part, place)
    arguments = {
        name: _read_model(part, place)
        if issubclass(part, ModelMixin)
        else check_betas(part.from_config(read_json(place / "scheduler_config.json")), place)
        for name, (part, place) in checked.items()
    }
    plain = {entry.name: index[entry.name] for entry in parameters if entry.name not in checked and entry.name in index}
    return {**arguments, **plain}


def check_betas(scheduler: SchedulerMixin, source: str | Path) -> SchedulerMixin:
    """The scheduler, once its betas, where it has some, are known to be a schedule of noise.

    Raises:
        ValueError: in one line, for others than one from 0 to 1 for each timestep.
    """
    steps, betas = scheduler.config.get("num_train_timesteps"), getattr(scheduler, "betas", None)
    if "beta_schedule" not in scheduler.config or not isinstance(betas, Tensor):
        return scheduler
    if not isinstance(steps, int) or steps < 1 or len(betas) != steps or not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(
            f"{source} holds no schedule of noise: it has {len(betas)} betas for {steps} steps, which must be as many, "
            "1 or more, and each from 0 to 1"
        )
    return scheduler


def _models_of(annotation: Any) -> tuple[type, ...]:
    """The classes of models that a pipeline takes for a part; none for a scheduler, which any other can stand for."""
    kinds = typing.get_args(annotation) or (annotation,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelMixin))


def _part_class(name: str, entry: Any, wanted: tuple[type, ...]) -> Any:
    """The class of a part: a model of diffusers where models are wanted, else a scheduler."""
    is_pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    kind = getattr(diffusers, entry[1], None) if is_pair and entry[0] == "diffusers" else None
    kind = next((other for other in wanted if EARLY_NAMES.get(other) == getattr(kind, "__name__", "")), kind)
    base = ModelMixin if wanted else SchedulerMixin
    if not isinstance(kind, type) or not issubclass(kind, base):
        what = f"a whole pipeline, {entry[1]}" if _is_pipeline(kind) else f"{str(entry)[:80]}"
        raise ValueError(
            f"its part {name!r} is {what}, and must be {'a ' + _names(wanted) if wanted else 'a scheduler'} of "
            "diffusers; nothing else is loaded"
        )
    return kind


def _is_pipeline(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, DiffusionPipeline)


def _names(kinds: Iterable[type]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)
