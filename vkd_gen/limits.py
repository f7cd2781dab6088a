"""What a configuration from elsewhere may ask for, checked before anything is built by it."""

from collections.abc import Iterable, Mapping
from typing import Any

LARGEST = {
    "block_out_channels": 2**16,
    "layers_per_block": 64,
    "transformer_layers_per_block": 64,
    "num_layers": 1024,
    "num_hidden_layers": 1024,
    "sample_size": 2**14,
    "num_train_timesteps": 10**6,
}
"""Entries that no model here has larger; of the others none is above 2^24."""

MANY = {"trained_betas": 10**6}
"""Entries that hold more than 256 numbers."""


def check_sizes(config: Mapping[str, Any], source: str, kind: str = "UNet") -> None:
    """Raise a ValueError that names the entry, for a configuration whose sizes no model or schedule has.

    Args:
        config: as a JSON file holds it.
        source: what it is of, for messages.
        kind: what it describes, for messages.
    """
    for entry, value in config.items():
        numbers = list(_numbers(value))
        largest = LARGEST.get(entry.removeprefix("reverse_"), 2**24)
        if any(number > largest for number in numbers) or len(numbers) > MANY.get(entry, 256):
            raise ValueError(f"{source} is no {kind} that could be built: {entry} is {_short(value)}")
    stages, layers, depth, in_all = (
        list(_numbers(config.get(entry)))
        for entry in ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "num_layers")
    )
    if max(len(stages), 1) * max([1, *layers]) * max([1, *depth]) * max([1, *in_all]) > 4096:
        raise ValueError(f"{source} is no {kind} that could be built: too many stages, layers and transformer layers")


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield value


def _short(value: Any) -> str:
    try:
        return str(value)[:80]
    except ValueError:  # Python prints no whole numbers of more than 4,300 digits
        return "a number of thousands of digits"
