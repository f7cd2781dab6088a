"""A small classifier of handwritten digits, whose features score samples of digits where Inception's mean little."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vkd_gen.data import Images
from vkd_gen.hub import check_layout, read_tensors, stored_layout


class FeatureNetwork(nn.Module):
    """Convolutional classifier of grey images into ten digits.

    Args:
        width: channels of the first convolution; features have 4 * width.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
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
        self.head = nn.Linear(4 * width, 10)
        self.facts: dict[str, str] = {}

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> tuple[Tensor, Tensor]:
        """Features `[batch, 4 * width]` and logits `[batch, 10]` of images in [-1, 1]."""
        features = self.features(images)
        return features, self.head(features)

    @torch.no_grad()
    def extract(self, images: UInt8[Tensor, "images 1 height width"]) -> Float[Tensor, "images features"]:
        """Features of uint8 images, in eval mode, on the CPU."""
        self.eval()
        device = next(self.parameters()).device
        batches = [self(part.to(device).float() / 127.5 - 1)[0].cpu() for part in images.split(500)]
        return torch.cat(batches)


def train_feature_network(images: Images, labels: Tensor, *, num_epochs: int = 40, seed: int = 0) -> FeatureNetwork:
    """Train a feature network, with shifts of up to one pixel as augmentation.

    Args:
        images: grey digits.
        labels: 0 to 9, `[images]`.
        num_epochs: passes through the images.
        seed: of weights, order and shifts.
    """
    torch.manual_seed(seed)
    network, pixels = FeatureNetwork(), images.stack()
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
def accuracy(network: FeatureNetwork, images: Images, labels: Tensor) -> float:
    """Share of images that the network classifies rightly."""
    return float((network(images.stack())[1].argmax(1) == labels).float().mean())


def save_feature_network(network: FeatureNetwork, path: Path, facts: Mapping[str, str]) -> None:
    """Write the weights as safetensors, with facts about their making as metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path, metadata=dict(facts))


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
        shape, _ = layout.get("features.0.bias", ((16,), True))  # of another network whose names are told below
        with torch.device("meta"):  # a width that the other weights do not have must not be allocated
            network = FeatureNetwork(width=math.prod(shape))
        check_layout(layout, network, path)
        network.load_state_dict(read_tensors(path), assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a feature network: {str(error).splitlines()[0]}") from error
    network.facts = {"file": path.name, **facts}
    return network.eval()
