"""A figure of samples beneath their prompts, a line for each model."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from vkd_gen.text import figure_text

LONGEST_LABEL = 90
"""Letters of a prompt that are shown; what is left out has an ellipsis."""


def draw_prompt_grid(
    rows: Mapping[str, UInt8[Tensor, "images channels height width"]],
    prompts: Sequence[str],
    *,
    columns: int = 8,
    most: int = 16,
) -> Any:
    """A matplotlib figure: bands of prompts, in each a line of samples for every model, from equal seeds.

    Args:
        rows: name -> samples, number i of prompt i.
        prompts: of the samples.
        columns: prompts side by side.
        most: prompts to show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(most, len(prompts), *(len(images) for images in rows.values()))
    columns = min(columns, count)
    num_bands, names = -(-count // columns), list(rows)
    figure = Figure(
        figsize=(1.25 * columns + 0.6, num_bands * (1.25 * len(names) + 0.6)), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_bands * len(names), columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        line, column = divmod(place, columns)
        band, row = divmod(line, len(names))
        axis.set(xticks=[], yticks=[])
        if column == 0:
            axis.set_ylabel(figure_text(textwrap.shorten(names[row], 24, placeholder="…")), fontsize=7)
        number = band * columns + column
        if number >= count:
            axis.set_axis_off()
            continue
        image = rows[names[row]][number].expand(3, -1, -1).permute(1, 2, 0).contiguous()
        axis.imshow(image.numpy(), interpolation="nearest" if len(image) < 128 else "antialiased")
        if row == 0:
            words = textwrap.shorten(prompts[number], LONGEST_LABEL, placeholder=" …") or "(empty)"
            axis.set_title("\n".join(map(figure_text, textwrap.wrap(words, 20))), fontsize=6)
    return figure
