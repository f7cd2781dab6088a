"""A small classifier of images, whose features score samples of the same kind where Inception's mean little."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vkd_gen.data.images import Images
from vkd_gen.files import whole_file
from vkd_gen.loading import check_layout, read_tensors, stored_layout
from vkd_gen.text import one_line


class FeatureNetwork(nn.Module):
    """Convolutional classifier of small images, grey (1 channel) or RGB (3), with features of 4 * width."""

    def __init__(self, width: int = 16, channels: int = 1, num_classes: int = 10):
        super().__init__()
        self.channels = channels
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, 4 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(4 * width, num_classes)
        self.facts: dict[str, str] = {}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Tensor]:
        """Features `[batch, 4 * width]` and logits `[batch, num_classes]` of images in [-1, 1]."""
        features = self.features(images)
        return features, self.head(features)


def train_feature_network(images: Images, *, num_epochs: int = 40, seed: int = 0) -> FeatureNetwork:
    """Train a feature network on labelled images, with shifts of up to one pixel as augmentation."""
    torch.manual_seed(seed)
    network = FeatureNetwork(channels=images.channels, num_classes=images.num_classes)
    pixels, labels = images.stack(), _labels(images)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    num_steps = num_epochs * -(-len(pixels) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    network.train()
    for _ in range(num_epochs):
        for chosen in torch.randperm(len(pixels)).split(128):
            shift = torch.randint(-1, 2, (2,)).tolist()
            batch = torch.roll(pixels[chosen], shift, dims=(-2, -1))
            loss = nn.functional.cross_entropy(network(batch)[1], labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Images) -> float:
    """Share of images, with labels, that the network classifies rightly."""
    return float((network(images.stack())[1].argmax(1) == _labels(images)).float().mean())


def _labels(images: Images) -> Tensor:
    return torch.tensor([images.label(number) for number in range(len(images))])


def save_feature_network(network: FeatureNetwork, path: Path, facts: Mapping[str, str]) -> None:
    """Write the weights as safetensors, with facts about their making as metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(network.state_dict(), temporary, metadata=dict(facts))


def check_network_name(name: str, file: str | Path) -> None:
    """Refuse a name that a reader of scores would take for Inception's.

    Raises:
        ValueError: in one line.
    """
    if not name or name.startswith("inception"):
        raise ValueError(f"{file} is named {name!r}, which is another network's name; rename what it is named after")


def _sizes(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    """Width, channels and number of classes; the usual ones of another network, whose names are told then."""
    channels = (*shapes.get("features.0.weight", ()), 1, 1)[1]
    return math.prod(shapes.get("features.0.bias", (16,))), channels, math.prod(shapes.get("head.bias", (10,)))


def load_feature_network(path: Path) -> FeatureNetwork:
    """Read what `save_feature_network` wrote, in eval mode; the facts are in `.facts`.

    Raises:
        ValueError: if the file is not there or not a feature network.
    """
    if not path.is_file():
        raise ValueError(f"there is no feature network {path}; recipes/train_feature_network.py makes one")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        layout = stored_layout([path])
        with torch.device("meta"):  # a width that the other weights do not have must not be allocated
            network = FeatureNetwork(*_sizes({name: shape for name, (shape, _) in layout.items()}))
        check_layout(layout, network, path)
        network.load_state_dict(read_tensors(path), assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a feature network: {one_line(error)}") from error
    network.facts = {"file": path.name, **facts}
    return network.eval()
