"""A frozen teacher in 8 bits: what it predicts, what it takes, and what its student starts from."""

import copy
import dataclasses
import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import one_line, tiny_condition_unet
from tests.recipes.conftest import load_recipe, recipe_runner
from vkd_gen.provenance import hash_tensors, plain_tensors
from vkd_gen.training.options import StudentOptions, complete
from vkd_gen.training.probe import _broken_weights
from vkd_gen.training.quantization import quantize, quantized_bytes

WITH_TORCHAO = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")


@WITH_TORCHAO
def test_linear_layers_alone_change_and_hardly():
    whole = tiny_condition_unet((32, 64)).eval()
    inputs = torch.randn(4, 4, 16, 16), torch.tensor([0, 300, 600, 999]), torch.randn(4, 7, 8)
    network = copy.deepcopy(whole)
    expected = quantized_bytes(network)
    quantize(network)
    with torch.no_grad():
        before, after = (unet(*inputs).sample for unet in (whole, network))
    error = (after - before).square().mean() / before.square().mean()
    assert 0 < error < 1e-3
    plain = plain_tensors(dict(network.named_parameters()))
    assert sum(value.nbytes for value in plain.values()) == pytest.approx(expected, rel=0.01)
    for (name, module), other in zip(whole.named_modules(), network.modules(), strict=True):
        for key, value in module.named_parameters(recurse=False):
            is_kept = not (isinstance(module, nn.Linear) and key == "weight")
            assert (type(getattr(other, key)) is nn.Parameter and torch.equal(value, getattr(other, key))) == is_kept, (
                name
            )
    again = copy.deepcopy(whole)
    quantize(again)
    hashes = [hash_tensors(unet.state_dict()) for unet in (whole, network, again)]
    assert hashes[1] == hashes[2] != hashes[0]
    assert _broken_weights(network) is None


@WITH_TORCHAO
def test_a_student_starts_from_the_whole_weights(tmp_path, monkeypatch, capsys):
    """A run that hardly moves it exports the same student, whatever its teacher is kept in."""
    run_recipe, rows = recipe_runner(monkeypatch, tmp_path), {}
    for name, flags in (("whole", ()), ("int8", ("--teacher_quantization", "int8"))):
        short = ("--max_train_steps", "1", "--learning_rate", "1e-12", "--inherit_samples", "16", "--extractor", "none")
        run_recipe("train_student_unet", *short, "--calibration_samples", "32", "--output_dir", tmp_path / name, *flags)
        rows[name] = json.loads((tmp_path / name / "results.json").read_text())["rows"]
    assert "the teacher's linear layers are in 8 bits" in capsys.readouterr().out
    students = [load_file(tmp_path / name / "pipeline/unet/diffusion_pytorch_model.safetensors") for name in rows]
    assert all(torch.allclose(value, students[1][key], atol=1e-8) for key, value in students[0].items())
    errors = [found["teacher"]["denoising_error"] for found in rows.values()]
    assert errors[0] != errors[1] == pytest.approx(errors[0], rel=1e-2)
    assert rows["int8"]["teacher"]["teacher_distance"] == 0  # to itself


def test_memory_of_layers_without_weights():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(100, 7, dtype=torch.bfloat16), nn.Conv2d(3, 5, 3, dtype=torch.bfloat16))
    assert quantized_bytes(network) == 700 + 7 * 5 + 7 * 2 + (5 * 3 * 9 + 5) * 2


def test_without_torchao(monkeypatch):
    recipe = load_recipe("train_student_unet")
    config = dataclasses.replace(recipe.DIGITS, start=StudentOptions(teacher_quantization="int8"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with one_line("--teacher_quantization int8 is torchao's, which is not installed: pip install torchao"):
        complete(config)
    complete(dataclasses.replace(config, training=dataclasses.replace(config.training, dry_run=True)))


def test_a_torchao_that_cannot_be_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with one_line("--teacher_quantization int8 needs a torchao for torch"):
        quantize(tiny_condition_unet((32, 64)))
