"""Models: shapes, sizes, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.data import load
from equipoise.lab.models import MODELS, LeNet, build


@pytest.mark.parametrize(
    ("shape", "flat"),
    [((1, 20, 20), 80), ((1, 36, 36), 720), ((3, 16, 16), 20), ((1, 28, 36), 480)],
)
def test_lenet_gives_fifty_features_of_any_image(shape, flat):
    lenet = LeNet(*shape)
    features = lenet(torch.rand(2, *shape))
    assert features.shape == (2, 50)
    assert features.min() >= 0
    parameters = sum(p.numel() for p in lenet.parameters())
    assert parameters == (25 * shape[0] + 1) * 10 + 251 * 20 + (flat + 1) * 50


@pytest.mark.parametrize("shape", [(1, 15, 16), (1, 20, 15), (1, 8, 8)])
def test_lenet_refuses_images_that_are_too_small(shape):
    with pytest.raises(ValueError, match=f"{shape[1]} x {shape[2]} .* 16 x 16 or more"):
        LeNet(*shape)


def test_lenet_refuses_inputs_that_are_no_images():
    data = replace(load("multidigits"), input_shape=(400,))
    with pytest.raises(ValueError, match="multidigits has inputs of shape"):
        build("lenet", data)


@pytest.mark.parametrize("name", ["multidigits", "digits-attributes"])
def test_every_task_has_a_head_whose_output_fits_its_loss_and_metric(name):
    data = load(name)
    torch.manual_seed(0)
    model = build("lenet", data)
    assert model.tasks == tuple(task.name for task in data.tasks)
    inputs, targets = data.train[list(range(8))]
    outputs = model(inputs)
    for task in data.tasks:
        assert outputs[task.name].shape == (8, task.outputs)
        task.loss(outputs[task.name], targets[task.name]).backward(retain_graph=True)
        metric = task.metric()
        task.update(metric, outputs[task.name].detach(), targets[task.name])
        assert metric.compute().isfinite()
    assert all(p.grad is not None for p in model.parameters())


def test_lenet_learns_the_digits():
    data = load("multidigits", sizes=(1024, 1, 200))
    torch.manual_seed(0)
    model = build("lenet", data)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(1024).split(64):
            inputs, targets = data.train[batch]
            outputs = model(inputs)
            losses = [task.loss(outputs[task.name], targets[task.name]) for task in data.tasks]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    with torch.no_grad():
        outputs = model(data.test.inputs)
    for task in data.tasks:
        metric = task.metric()
        task.update(metric, outputs[task.name], data.test.targets[task.name])
        assert metric.compute() > 0.4  # chance is 0.1


def test_unknown_model_names_the_known():
    with pytest.raises(EquipoiseError, match="'lenett'.*'lenet'"):
        build("lenett", load("multidigits"))
    with pytest.raises(EquipoiseError) as error:
        build("zzz", load("multidigits"))
    assert all(name in str(error.value) for name in MODELS)
