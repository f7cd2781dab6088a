"""What is trained on, what is held out and which classes there are, as the names of folders and tables say it."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from vkd_gen.text import printable

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "test"),
}
"""Words that name a split, datasets' (`datasets.data_files.SPLIT_KEYWORDS`) and two more. What is there to validate on
is never trained on either."""
PLAIN_WORDS = {
    *("set", "data", "split", "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "sample"),
    *("samples", "file", "files", "folder", "part", "shard", "of", "batch", "full", "all", "mini", "tiny", "small"),
    *("large", "raw", "public", "private", "labeled", "labelled", "unlabeled", "png", "jpg", "jpeg"),
}
"""Words that say nothing beside one that names a split: test_images, but not test-tube. Numbers and letters do as
little: train2017, testA, train-00000-of-00002."""

Key = tuple[str, ...]
"""Names of the folders that lead to a file; of a table its own name too, without its end."""


class Place(NamedTuple):
    """What the files of one folder are for.

    Attributes:
        split: `train` or `test`; empty for what is left out.
        before: names before the one that names the split; empty where none does.
        inside: names behind it.
        beside: the splits beside what is left out.
        doubts: names that can be read in two ways, and how each was understood.
        class_name: the class; None where there is none.
    """

    split: str
    before: Key = ()
    inside: Key = ()
    beside: str = ""
    doubts: tuple[tuple[str, str], ...] = ()
    class_name: str | None = None


def find_splits(keys: Iterable[Key]) -> tuple[dict[Key, Place], list[str]]:
    """Tell training images, held-out ones and classes from the names of folders.

    A name can name a split if it holds a word for one (`SPLIT_WORDS`) and

    - nothing else of meaning: Testing, val2017, test_images; or
    - the same as one of the other kind beside it: seg_train and seg_test; or
    - lies beside such names alone.

    Where there are splits of both kinds, what lies beside them is neither, and inside them names are classes. Names for
    training alone are splits if nothing lies beside them: train beside bus and car is a class. Names for testing alone
    are held out from what lies beside them.

    Args:
        keys: of all files.

    Returns:
        Key -> its place; and how names were understood that can be read in two ways, a line each.
    """
    places = _descend(list(dict.fromkeys(keys)), 0)
    is_each = len({place.before for place in places.values() if place.split}) > 1  # cats/train, cats/test, dogs/train
    doubts: dict[str, dict[str, None]] = defaultdict(dict)
    for key, place in places.items():
        names = (place.before if is_each else ()) or place.inside
        places[key] = place._replace(class_name=next(iter(names), None))
        for name, reason in place.doubts:
            doubts[reason][name] = None
    notes = []
    for reason, (first, *others) in doubts.items():
        more = f" (and {len(others):,} more)" if others else ""
        notes.append(f"{printable(first)}{more} {reason}")
    return places, notes


def _descend(keys: list[Key], depth: int) -> dict[Key, Place]:
    """The places of keys that share their first `depth` names."""
    below: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        if len(key) > depth:
            below[key[depth]].append(key)
    files = [key for key in keys if len(key) == depth]
    splits = _named_splits(below)
    tests = [name for name, split in splits.items() if split == "test"]
    inside_tests = {key[depth + 1] for name in tests for key in below[name] if len(key) > depth + 1}
    if inside_tests & (below.keys() - splits.keys()):  # bus, car, train and test, which holds the same classes
        splits = dict.fromkeys(tests, "test")
    is_alone = len(splits) == len(below) and not files
    if not tests and not is_alone:
        splits = {}
    is_both = len(set(splits.values())) == 2
    other = Place("", beside=" and ".join(sorted(splits)))
    places = {key: other if is_both else Place("train", inside=key) for key in files}
    for name, inside in below.items():
        path = "/".join(inside[0][: depth + 1])
        if name in splits:
            doubts = () if is_both or is_alone else ((path, IS_HELD_OUT),)
            deeper = _descend(inside, depth + 1) if is_alone and not is_both else {}
            is_around = any(place.before for place in deeper.values())  # a folder that holds all splits
            places |= deeper if is_around else _split_places(splits[name], inside, depth, doubts)
        elif is_both:
            places |= dict.fromkeys(inside, other)
        else:
            doubts = ((path, IS_NO_SPLIT),) if _split_of(name)[0] else ()
            deeper = _descend(inside, depth + 1)
            places |= {key: place._replace(doubts=doubts + place.doubts) for key, place in deeper.items()}
    return places


IS_HELD_OUT = "is held out, as its name says; give it another name if it is there to train on"
IS_NO_SPLIT = "is not taken for a split, beside other names"


def _split_places(split: str, keys: list[Key], depth: int, doubts: tuple[tuple[str, str], ...]) -> dict[Key, Place]:
    """The places of keys whose name at `depth` names their split."""
    last = depth  # archives may hold one folder of their own name: seg_train/seg_train
    while {key[last + 1 : last + 2] for key in keys} == {keys[0][depth : depth + 1]}:
        last += 1
    return {key: Place(split, key[:depth], key[last + 1 :], doubts=doubts) for key in keys}


def _named_splits(names: Iterable[str]) -> dict[str, str]:
    """Those of the names side by side that can name a split, and which: see `find_splits`."""
    found = {name: _split_of(name) for name in names}
    hints = {name: (split, rest) for name, (split, rest) in found.items() if split}
    named = {
        name: split
        for name, (split, rest) in hints.items()
        if not rest or any(other != split and rest == its_rest for other, its_rest in hints.values())
    }
    if named and len(hints) == len(found):
        return {name: split for name, (split, _) in hints.items()}
    return named


def _split_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The split that a name holds a word for, empty for none or several, and its other words that mean something.

    >>> _split_of("seg_Testing2"), _split_of("testA"), _split_of("held-out"), _split_of("valley")
    (('test', ('seg',)), ('test', ()), ('test', ()), ('', ('valley',)))
    """
    name = re.sub(r"(held|hold)[-_. ]?out", r" \1out ", name, flags=re.IGNORECASE)
    # Words begin at capitals too, as in TestImages and trainA.
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+", name)]
    words = [word.removesuffix("set") or word for word in words]
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    rest = tuple(word for word in words if len(word) > 1 and word not in PLAIN_WORDS and word not in SPLIT_WORDS)
    return (splits.pop() if len(splits) == 1 else "", rest)
