"""Other people's files: a start removes and overwrites only what this program made."""

import json
import shutil

import pytest

from tests.conftest import refused
from tests.faults.small_run import options_of, run_to_end, train
from vkd_gen.files import CannotWriteError, remove_leftovers, whole_file, whole_folder
from vkd_gen.training.options import flat_config
from vkd_gen.training.run_folder import RunFolder

THEIRS = [
    *(".checkpoint-6/notes.txt", ".checkpoint-notes/a", ".pipeline/b.bin", ".pipeline_backup", ".pipeline.yaml"),
    *("thesis.v2.tmp/chapter.tex", "data.csv.tmp", "config.json.tmp", "metrics.jsonl.tmp", "notes.txt", "run.lock"),
    *(".vkd-gen.notes", "set-aside/a", "checkpoints/a", "checkpoint-best/a", "log.txt", "lock"),
]


def fill(folder, names=THEIRS):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of mine: {name}")


def texts(folder, names=THEIRS):
    return {name: (folder / name).read_text() for name in names if (folder / name).is_file()}


def test_a_run_leaves_what_is_not_its_own(straight, tmp_path):
    fill(tmp_path / "work")
    options = options_of(tmp_path / "work", checkpoints_total_limit=1)
    status, output = run_to_end(train, options, output=tmp_path / "output")
    assert status == 0, output
    assert texts(tmp_path / "work") == {name: f"of mine: {name}" for name in THEIRS}
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (tmp_path / "work", straight)]
    assert weights[0] == weights[1]


def config_of(folder):
    return {**flat_config(options_of(folder)), "num_processes": 1}


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "results.json", "metrics.jsonl", "report.html", "samples.png"),
        *("previews/a.png", "checkpoint-500/trainer_state.json", "pipeline/model_index.json", "diagnostics.png"),
    ],
)
def test_a_folder_with_files_that_would_be_overwritten_is_refused(name, straight, work):
    fill(work, [name])
    words = r"is there already, and no run|already holds a run|no checkpoint in .* is whole"
    for point in ("latest", str(straight / "checkpoint-9")):
        with pytest.raises(ValueError, match=words):
            RunFolder(str(work)).check(config_of(work), point)
    assert texts(work, [name]) == {name: f"of mine: {name}"}


ARGUMENTS = '{"output_dir": "x", "max_train_steps": 9, "train_batch_size": 4}'  # of a script of diffusers


@pytest.mark.parametrize("text", ['{"_class_name": "UNet2DModel"}', "[1]", ARGUMENTS, "{", "\xff"])
def test_a_configuration_of_something_else_is_not_a_runs(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert not RunFolder(str(tmp_path)).is_own()
    with pytest.raises(ValueError, match=r"config.json is there already, and no run of these recipes wrote it"):
        RunFolder(str(tmp_path)).check(config_of(tmp_path), None)


def test_folders_of_runs_are_known(straight, work):
    assert RunFolder(str(straight)).is_own()
    shutil.copytree(straight / "checkpoint-9", work / "checkpoint-9")  # all that a cluster kept
    assert RunFolder(str(work)).is_own()
    RunFolder(str(work)).check(config_of(work), RunFolder(str(work)).resume_point("latest"))


def test_what_is_removed_and_set_aside_is_the_runs_own(straight, tmp_path):
    """What a killed run was writing goes; other people's checkpoints, and what lies in the way, stay."""
    run = shutil.copytree(straight, tmp_path / "run")
    fill(run, [".vkd-gen.checkpoint-3/model.safetensors", ".vkd-gen.config.json", ".vkd-gen.pipeline.old/a"])
    mine = ["checkpoint-1/trainer_state.json", "set-aside-checkpoint-12/thesis.txt"]
    fill(run, mine)
    folder = RunFolder(str(run))
    folder.start(config_of(run))
    assert not list(run.glob(".vkd-gen*"))
    folder.set_aside_after(9)
    assert (run / "set-aside-checkpoint-12.2" / "manifest.json").is_file()
    folder.remove_old_checkpoints(1)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-9"]
    assert texts(run, mine) == {name: f"of mine: {name}" for name in mine}
    folder.release()


def test_a_link_among_what_was_left_is_not_followed(tmp_path):
    fill(tmp_path / "mine", ["a"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".vkd-gen.pipeline").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path / "run")
    assert texts(tmp_path / "mine", ["a"])
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_is_replaced_stays_if_that_fails(tmp_path):
    fill(tmp_path, ["pipeline/a"])
    with (
        pytest.raises(CannotWriteError, match="could not be written: no room"),
        whole_folder(tmp_path / "pipeline"),
    ):
        raise OSError("no room")
    assert texts(tmp_path, ["pipeline/a"])
    with whole_folder(tmp_path / "pipeline") as folder, whole_file(folder / "b") as file:
        file.write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["pipeline", "b"]


# ---- cards of pipelines


def own_pipeline(checkpoint, folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(config_of(folder / "run")))
    shutil.copytree(checkpoint, folder / "run" / "pipeline")
    return folder / "run"


CARD = "---\nlicense: mit\n---\n# Mine\n"


@pytest.mark.parametrize(
    ("source", "flags", "is_edited"),
    [
        ("run", [], True),
        ("run/pipeline", [], True),
        ("run/pipeline", ["--no-update-cards"], False),
        ("downloaded/pipeline", [], False),
        ("downloaded", ["--update_foreign_cards"], True),
        ("downloaded", ["--update_foreign_cards", "--no-update-cards"], False),
    ],
)
def test_the_card_of_anothers_pipeline_is_edited_if_asked(
    source, flags, is_edited, checkpoint, folders, feature_network, run_eval, tmp_path, monkeypatch, capsys
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = own_pipeline(checkpoint, tmp_path)
    shutil.copytree(run / "pipeline", tmp_path / "downloaded" / ("pipeline" if source.endswith("pipeline") else ""))
    path = tmp_path / source / "README.md"
    path = path if (path.parent / "model_index.json").exists() else path.parent / "pipeline" / "README.md"
    path.write_text(CARD)
    common = ["--extractor", feature_network, "--num_score_samples", 12, "--kid_subset_size", 10]
    run_eval("score", source, "--reference", folders[0], *common, "--num_inference_steps", 1, *flags)
    assert (path.read_text() != CARD) is is_edited
    told = "its card stays as it is; see --update_foreign_cards" in capsys.readouterr().out
    assert told is (not is_edited and "--no-update-cards" not in flags)


def test_what_lies_among_images_that_are_packed_stays(checkpoint, run_eval, tmp_path):
    flags = [checkpoint, "--output", tmp_path / "a.npz", "--num_images", 2, "--num_inference_steps", 1]
    run_eval("generate", *flags)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"a.npz", "a.npz.protocol.json"}
    assert not (tmp_path / "a.npz.parts").exists()
    (tmp_path / "a.npz").unlink()
    fill(tmp_path / "a.npz.parts", ["mine.txt"])
    with pytest.raises(SystemExit):
        run_eval("generate", *flags)
    assert texts(tmp_path / "a.npz.parts", ["mine.txt"])


@pytest.mark.parametrize("name", ["report.html", "results.json"])
def test_scores_do_not_overwrite_files_of_others(name, checkpoint, run_eval, tmp_path, capsys):
    fill(tmp_path, [name])
    assert name in refused(capsys, run_eval, "score", checkpoint, "--reference", "digits", "--output_dir", tmp_path)
    assert texts(tmp_path, [name]) == {name: f"of mine: {name}"}


@pytest.mark.parametrize("place", [".", "pipeline"])
def test_scores_do_not_overwrite_a_runs_results(place, checkpoint, run_eval, tmp_path, capsys):
    config = {"output_dir": "run", "max_train_steps": 9, "train_batch_size": 1, "log_every_steps": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    fill(tmp_path, ["results.json", "pipeline/model_index.json"])
    assert "is a run's folder, or its pipeline" in refused(
        capsys, run_eval, "score", checkpoint, "--reference", "digits", "--output_dir", tmp_path / place, "--overwrite"
    )
    assert texts(tmp_path, ["results.json"]) == {"results.json": "of mine: results.json"}
