"""Prompts from files, tables and data sets, and what is none."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import one_line
from vkd_gen.evaluation.prompts import Prompts, given_prompts, read_prompts

TEXTS = ["a red cat", "NA", 'two "blue", hats']


@pytest.fixture
def folder(tmp_path):
    """The same three prompts in every form."""
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "plain.txt").write_text("\ufeff" + "\r\n \n".join(TEXTS) + "\n\n", encoding="utf-8")
    rows = [{"file_name": f"{number}.png", "text": text, "size": number} for number, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quoted = "".join(f'{number}.png,"{text.replace(chr(34), chr(34) * 2)}"\n' for number, text in enumerate(TEXTS))
    (tmp_path / "rows.csv").write_text("file_name,text\n" + quoted)
    several = [[text, "another"] for text in TEXTS]
    parquet.write_table(pyarrow.table({"captions": several, "id": ["x", "y", "z"]}), tmp_path / "rows.parquet")
    (tmp_path / "images").mkdir()
    for number, text in enumerate(TEXTS):
        Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(tmp_path / f"images/{number}.png")
        (tmp_path / f"images/{number}.txt").write_text(text)
    (tmp_path / "prompt").write_text("one")
    return tmp_path


@pytest.mark.parametrize("name", ["plain.txt", "rows.jsonl", "rows.csv", "rows.parquet", "images"])
def test_every_form_gives_the_same_prompts(folder, name):
    found = read_prompts(str(folder / name))
    assert list(found.texts) == TEXTS
    assert found.of([0, 2, 3, 7]) == [TEXTS[0], TEXTS[2], TEXTS[0], TEXTS[1]]  # behind the last one they begin anew
    assert found.protocol()["prompts_sha256"] == Prompts(TEXTS, "elsewhere").protocol()["prompts_sha256"]


def test_prompts_of_a_split(folder):
    """To score by, those of the test split; to train on, the others."""
    for number, split in enumerate(("train", "test", "train")):
        (folder / "images" / split).mkdir(exist_ok=True)
        for end in ("png", "txt"):
            (folder / f"images/{number}.{end}").rename(folder / f"images/{split}/{number}.{end}")
    assert list(read_prompts(str(folder / "images")).texts) == TEXTS[1:2]
    assert list(read_prompts(str(folder / "images"), to_train_on=True).texts) == TEXTS[::2]


def test_a_column_is_chosen_by_name(folder):
    assert list(read_prompts(str(folder / "rows.jsonl"), "file_name").texts) == ["0.png", "1.png", "2.png"]


def test_prompts_of_a_flag_are_texts_or_one_file(folder):
    assert given_prompts(()) is None
    assert list(given_prompts(["a cat", "a hat"]).texts) == ["a cat", "a hat"]
    assert list(given_prompts(["a cat. " * 100]).texts) == ["a cat. " * 100]  # no name of a file
    assert list(given_prompts([str(folder / "rows.csv")]).texts) == TEXTS
    with one_line("holds an empty text"):
        given_prompts(["a", " "])
    with one_line("nowhere.txt is not there"):
        given_prompts(["nowhere.txt"])


BAD = {
    "empty.txt": ("\n \n", None, "holds no prompt"),
    "empty.jsonl": ("", None, "holds no prompt"),
    "latin.txt": (b"M\xfcller", None, "not UTF-8"),
    "torn.jsonl": ('{"text": "a"}\n{"text"', None, "row 1: "),
    "list.jsonl": ("[1]\n", None, "no JSON object"),
    "blank.csv": ("text,n\n,\n,\n", None, "0 columns of text"),
    "holes.csv": ("text,n\na,1\n,2\n", "text", "1 rows hold no prompt, such as: row 1 has an empty caption"),
    "columns.csv": ("a,b\nx,y\n", None, "2 columns of text .* name one by --caption_column"),
    "column.csv": ("a,b\nx,y\n", "c", "has no column 'c'"),
    "numbers.jsonl": ('{"text": 7}\n', "text", "holds neither strings"),
    "none.parquet": ("something else", None, "cannot read prompts from"),
    "line.txt": ("a\n", "text", "--caption_column is for tables"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_prompt_is_told_in_one_line(name, tmp_path):
    content, column, words = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line(words):
        read_prompts(str(tmp_path / name), column)


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.csv", "nowhere.parquet", "nowhere", "digits"])
def test_what_is_not_there_or_has_no_captions(name, tmp_path):
    with one_line("not there|no folder or file|has no captions"):
        read_prompts(name if name == "digits" else str(tmp_path / name))
