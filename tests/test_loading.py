"""Files from strangers: nothing in them is run, nothing absurd is allocated, nothing is written elsewhere."""

import json
import os
import pickle
import shutil
import tracemalloc

import accelerate.checkpointing
import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import FORMATS, Payload, one_line, tiny_unet, write_payload
from vkd_gen.cli import tensors_alone
from vkd_gen.data.sources import load_images
from vkd_gen.evaluation.extractors import load_extractor
from vkd_gen.evaluation.feature_network import FeatureNetwork, load_feature_network, save_feature_network
from vkd_gen.evaluation.reference import load_statistics_file
from vkd_gen.evaluation.sources import from_array
from vkd_gen.hub import hub_revision
from vkd_gen.limits import MANY, check_sizes
from vkd_gen.pipelines import load_pipeline, stock_pipeline
from vkd_gen.training.unets import load_teacher, load_unet, read_unet_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_payload_works(tmp_path, kind):
    """Else what follows would show nothing."""
    file = write_payload(tmp_path / "x.bin", tmp_path / "ran", kind)
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


# ---- models


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin"])
def test_a_pickle_in_place_of_weights(pipeline_folder, executed, kind, name):
    (pipeline_folder / "unet" / WEIGHTS).unlink()
    write_payload(pipeline_folder / "unet" / name, executed, kind)
    for load in (load_teacher, load_unet, load_pipeline):
        with pytest.raises(ValueError, match=r"cannot load the (UNet|pipeline)|pickled weights only"):
            load(str(pipeline_folder))


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("text", ["[]", "null", "{", '"x"', "[" * 100_000, ""])
def test_a_model_index_that_is_none(pipeline_folder, text):
    (pipeline_folder / "model_index.json").write_text(text)
    with one_line("cannot load the pipeline"):
        load_pipeline(str(pipeline_folder))


# ---- sizes


ABSURD = [
    ("unet/config.json", {"block_out_channels": [10**9] * 2}),
    ("unet/config.json", {"block_out_channels": [2**16] * 300}),
    ("unet/config.json", {"layers_per_block": 10**9}),
    ("unet/config.json", {"num_class_embeds": 10**15}),
    ("unet/config.json", {"norm_num_groups": 1e300}),
    ("unet/config.json", {"sample_size": 10**6}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 1001}),
]


@pytest.mark.parametrize(("file", "entries"), ABSURD, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("load", [load_pipeline, load_teacher])
def test_absurd_sizes_are_refused_before_memory_is_touched(pipeline_folder, load, file, entries, monkeypatch):
    monkeypatch.setitem(MANY, "trained_betas", 1000)
    change(pipeline_folder / file, **entries)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"is no (UNet|model|schedule) that could be built: \w+ is") as error:
        load(str(pipeline_folder))
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("load", [load_pipeline, load_teacher])
def test_configurations_that_do_not_fit(pipeline_folder, load):
    """64 GB as the configuration has it, 50 kB on disk; and a schedule of nonsense."""
    change(pipeline_folder / "unet/config.json", block_out_channels=[16384, 16384])
    with pytest.raises(ValueError, match=r"asks for|short of what its config.json asks for|would take"):
        load(str(pipeline_folder))
    change(pipeline_folder / "unet/config.json", block_out_channels=[8, 16])
    change(pipeline_folder / "scheduler/scheduler_config.json", beta_schedule="steep", num_train_timesteps="many")
    with pytest.raises(ValueError, match=r"cannot load the pipeline|no schedule that diffusers can build"):
        load(str(pipeline_folder))


def test_a_number_of_many_digits_is_told_shortly():
    with pytest.raises(ValueError, match="x is a number of thousands of digits"):
        check_sizes({"x": 10**5000}, "it")


@pytest.mark.parametrize("config", [{"x": [2**24] * 256}, {"trained_betas": [0.1] * 1000}, {"x": -1}, {"x": "9" * 99}])
def test_sizes_that_are_not_absurd(config):
    check_sizes(config, "it")


def test_a_feature_network_is_loaded_whole_or_not_at_all(tmp_path):
    network = FeatureNetwork(width=4).eval()
    save_feature_network(network, tmp_path / "good.safetensors", {})
    loaded, images = load_feature_network(tmp_path / "good.safetensors"), torch.randn(3, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(loaded(images), network(images), strict=True))
    assert not any(value.is_meta for value in loaded.state_dict().values())
    weights = load_file(tmp_path / "good.safetensors")
    save_file({**weights, "features.0.bias": torch.zeros(300_000)}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="is not a feature network"):
        load_feature_network(tmp_path / "wide.safetensors")  # 6 TB, if it were built


# ---- extractors and arrays


@pytest.mark.parametrize(
    ("name", "kind"), [*(("inception", kind) for kind in FORMATS), ("vgg16", "zip"), ("clip-vit-b-32", "zip")]
)
def test_extractor_weights(tmp_path, executed, name, kind):
    file = write_payload(tmp_path / "weights.pth", executed, kind)
    words = "downloads the weights of clip" if name.startswith("clip") else "not a plain state dict of tensors"
    with one_line(words):
        load_extractor(name, str(file))


def test_extractor_weights_that_change_after_they_were_checked(tmp_path, executed, monkeypatch):
    """torch-fidelity opens the file again, and would unpickle anything."""
    file = write_payload(tmp_path / "weights.pth", executed)
    loads, load = [], torch.load

    def first_is_harmless(*arguments, **options):
        loads.append(options)
        return {} if len(loads) == 1 else load(*arguments, **options)

    monkeypatch.setattr(torch, "load", first_is_harmless)
    with pytest.raises(ValueError, match="cannot load the weights of the extractor"):
        load_extractor("inception", str(file))
    assert [options["weights_only"] for options in loads] == [True, False]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("kind", FORMATS)
def test_a_pickle_that_is_called_safetensors(tmp_path, executed, kind):
    file = write_payload(tmp_path / "x.safetensors", executed, kind)
    with pytest.raises(ValueError, match="is not a feature network"):
        load_feature_network(file)


@pytest.mark.parametrize("load", [from_array, load_statistics_file])
def test_arrays_of_objects(tmp_path, executed, load):
    objects = np.array([Payload(executed)], dtype=object)
    np.savez(tmp_path / "arrays.npz", arr_0=objects, mu=objects, sigma=objects)
    np.save(tmp_path / "array.npy", objects)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Payload(executed)))
    for file in tmp_path.glob("*.npz"):
        with pytest.raises(ValueError, match="cannot read"):
            load(str(file))


# ---- what accelerate and torch-fidelity load


def test_accelerate_unpickles_what_is_registered(tmp_path, executed):
    """Why commands force torch to load tensors alone, beside the check: as of accelerate 1.15 this would run code."""
    PartialState()
    write_payload(tmp_path / "custom_checkpoint_0.pkl", executed, "nested")

    class Registered:
        def load_state_dict(self, state):
            raise AssertionError(f"loaded {state}")

    with tensors_alone(), pytest.raises(pickle.UnpicklingError):
        accelerate.checkpointing.load_custom_state(Registered(), str(tmp_path), 0)


def test_tensors_alone_whatever_the_environment_says(tmp_path, executed, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = write_payload(tmp_path / "x.pt", executed)
    with tensors_alone():
        for options in ({}, {"weights_only": False}):
            with pytest.raises(pickle.UnpicklingError):
                torch.load(file, **options)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# ---- the hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache with one pipeline, `some/model`, as huggingface_hub lays it out."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


@pytest.fixture
def older(hub_cache):
    """An earlier commit of `some/model`, of other widths, which has a tag and a branch of a pull request."""
    stock_pipeline(tiny_unet((16, 24)), DDPMScheduler(num_train_timesteps=500)).save_pretrained(
        hub_cache / "snapshots" / OLDER
    )
    (hub_cache / "refs" / "refs" / "pr").mkdir(parents=True)
    for name in ("v1.0", "refs/pr/1"):
        (hub_cache / "refs" / name).write_text(OLDER)


@pytest.mark.parametrize(
    ("source", "commit"),
    [
        ("some/model", COMMIT),
        (f"some/model@{COMMIT}", COMMIT),
        ("some/model@main", COMMIT),
        (f"some/model@{OLDER}", OLDER),
        ("some/model@v1.0", OLDER),
        ("some/model@refs/pr/1", OLDER),
    ],
)
def test_a_revision_is_what_is_loaded_and_noted(older, source, commit):
    channels, steps = ((16, 24), 500) if commit == OLDER else ((8, 16), 1000)
    teacher = load_teacher(source)
    assert tuple(teacher.unet.config.block_out_channels) == channels
    assert teacher.noise_scheduler.config.num_train_timesteps == steps
    assert tuple(load_unet(source).config.block_out_channels) == channels
    assert tuple(read_unet_config(source)["block_out_channels"]) == channels
    assert tuple(load_pipeline(source).unet.config.block_out_channels) == channels
    assert hub_revision(source) == commit


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("v2.0", r"the hub did not give it|cannot load the pipeline"),
        (OLDER[::-1], r"the hub did not give it|cannot load the pipeline"),
        *((revision, "names no revision") for revision in ("", "../../other", "v1 0")),
    ],
)
def test_a_revision_that_is_not_there(older, revision, words):
    for load in (load_teacher, load_unet, load_pipeline):
        with one_line(words):
            load(f"some/model@{revision}")


def test_a_folder_with_an_at_sign_is_a_folder(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock_pipeline(tiny_unet((16, 24)), DDPMScheduler()).save_pretrained("some/model@main")
    assert tuple(load_teacher("some/model@main").unet.config.block_out_channels) == (16, 24)
    assert hub_revision("some/model@main") is None
    with pytest.raises(ValueError, match="there is no student folder runs@home/a/b"):
        load_unet("runs@home/a/b")


@pytest.fixture
def data_cache(tmp_path, monkeypatch):
    """The cache of data sets with `some/data` at COMMIT, as datasets lays it out, and no hub."""
    import huggingface_hub

    datasets = pytest.importorskip("datasets")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    pictures = [Image.new("L", (8, 8), level) for level in range(6)]
    table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "table.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files=str(tmp_path / "table.parquet"))
    builder.download_and_prepare()
    place = tmp_path / "datasets" / "some___data" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, place)
    (place / "parquet-train.arrow").rename(place / "data-train.arrow")
    address = f"hf://datasets/some/data@{COMMIT}/table.parquet"
    change(place / "dataset_info.json", dataset_name="data", config_name="default",
           download_checksums={address: {"num_bytes": 1, "checksum": None}})  # fmt: skip
    refs = tmp_path / "hub" / "datasets--some--data" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    (refs / "v1.0").write_text(OLDER)


def test_a_revision_of_a_data_set(data_cache):
    for source in ("some/data", f"some/data@{COMMIT}", "some/data@main"):
        images, _ = load_images(source, resolution=8, channels=1)
        assert images.revision == COMMIT
        assert len(images) == 5


@pytest.mark.parametrize(
    ("revision", "words"), [(OLDER, OLDER), ("v1.0", OLDER), ("v2.0", "not known here"), ("", "names no revision")]
)
def test_another_revision_of_a_data_set_is_not_taken_for_it(data_cache, revision, words):
    """Without the hub, datasets itself takes whichever it has."""
    with one_line(words):
        load_images(f"some/data@{revision}", resolution=8, channels=1)


def test_models_of_the_hub_are_checked_as_folders_are(hub_cache):
    snapshot = hub_cache / "snapshots" / COMMIT
    assert load_pipeline("some/model").unet.config.block_out_channels == [8, 16]
    assert load_teacher("some/model").unet.config.block_out_channels == [8, 16]
    change(snapshot / "unet/config.json", block_out_channels=[16384, 16384])
    with pytest.raises(ValueError, match=r"asks for: .* have another shape \(conv_in.weight is"):
        load_pipeline("some/model")
    change(snapshot / "unet/config.json", layers_per_block=10**9)
    for load in (load_pipeline, load_teacher):
        with pytest.raises(ValueError, match="that could be built: layers_per_block is"):
            load("some/model")


def test_the_commit_of_a_model_on_the_hub(hub_cache, tmp_path, monkeypatch):
    assert hub_revision("some/model") == COMMIT
    assert hub_revision("some/other") is None
    (hub_cache / "refs" / "main").write_text("../../x")
    assert hub_revision("some/model") is None
    for source in ("digits", "../some/model", "/some/model", "some/model/deep", "some/..", "some/model\n", ""):
        assert hub_revision(source) is None
    (hub_cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/model").mkdir(parents=True)  # a folder here is what is loaded then
    assert hub_revision("some/model") is None
