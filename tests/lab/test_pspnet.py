"""ResNet-50 with a PSPNet decoder for each task: sizes, shapes, and weights from a file."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from equipoise.lab.data import load
from equipoise.lab.dense import Depth, Segmentation
from equipoise.lab.models import DilatedResNet50, build
from equipoise.lab.models.pspnet import PyramidHead, WeightsError

QUICK = "resnet50-pspnet(width=2)"


@pytest.fixture
def scenes():
    data = load("multidigits", sizes=(4, 2, 2))
    tasks = (Segmentation("classes", ("a", "b", "c")), Depth("depth"))
    return replace(data, tasks=tasks, input_shape=(3, 32, 48))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_trunk_has_the_published_number_of_parameters():
    assert count(DilatedResNet50(3)) == 25_557_032 - 2049 * 1000


def test_the_trunk_keeps_an_eighth_of_the_resolution():
    trunk = DilatedResNet50(3, width=2)
    shapes = []
    for i in range(4):
        trunk.get_submodule(f"layer{i + 1}").register_forward_hook(
            lambda _, __, out: shapes.append(tuple(out.shape[1:]))
        )
    assert trunk(torch.rand(1, 3, 32, 50)).shape == (1, 64, 4, 7) == (1, trunk.width, 4, 7)
    assert shapes == [(8, 8, 13), (16, 4, 7), (32, 4, 7), (64, 4, 7)]
    dilations = {
        name: module.dilation[0] for name, module in trunk.named_modules() if name.endswith("conv2")
    }
    assert [dilations[f"layer{i}.{j}.conv2"] for i in (2, 3, 4) for j in (0, 1)] == [
        1,
        1,
        1,
        2,
        2,
        4,
    ]


def test_a_block_adds_what_goes_around_it():
    block = DilatedResNet50(3, width=2).layer1[1]
    nn.init.zeros_(block.bn3.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_colours_are_brought_to_what_published_weights_expect():
    trunk = DilatedResNet50(3, width=1)
    seen = []
    trunk.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    colour = torch.tensor([0.485, 0.456, 0.406]) + torch.tensor([0.229, 0.0, -0.225])
    trunk(colour[None, :, None, None].expand(2, 3, 16, 16))
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, 0.0, -1.0]))
    grey = DilatedResNet50(1, width=1)
    grey.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.rand(2, 1, 16, 16)
    grey(x)
    assert torch.equal(seen[1], x)


def test_every_task_has_an_answer_for_every_pixel(scenes):
    model = build(QUICK, scenes)
    for number in (1, 3):  # also the last batch of an epoch may have one image
        outputs = model(torch.rand(number, 3, 32, 48))
        assert {task: out.shape for task, out in outputs.items()} == {
            "classes": (number, 3, 32, 48),
            "depth": (number, 1, 32, 48),
        }
    sum(out.square().mean() for out in outputs.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_pyramid_sees_the_mean_of_the_whole_image():
    """With the other levels and the features themselves switched off, all pixels answer alike."""
    head = PyramidHead(8, 2, (8, 8)).eval()
    with torch.no_grad():
        head.answer[0].weight[:, :8] = 0
        head.answer[0].weight[:, 10:] = 0
    answer = head(torch.rand(1, 8, 8, 8))[0, :, 1:7, 1:7]  # away from the padding
    assert answer.flatten(1).std(1).max() < 1e-6
    with torch.no_grad():
        head.answer[0].weight[:, 12:14] = 1
        head.pyramid[2][1].weight.abs_()  # or chance might close every ReLU on the way
    answer = head(torch.rand(1, 8, 8, 8))[0, :, 1:7, 1:7]
    assert answer.flatten(1).std(1).max() > 1e-4


def published(width=2):
    """A state dict in the form of torchvision's resnet50."""
    torch.manual_seed(1)
    state = DilatedResNet50(3, width).state_dict()
    return {**state, "fc.weight": torch.zeros(10, 32 * width), "fc.bias": torch.zeros(10)}


@pytest.mark.parametrize("old", [False, True])
def test_weights_come_from_a_file(scenes, tmp_path, old):
    state = published()
    if old:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet50.pth", _use_new_zipfile_serialization=not old)
    model = build(f"resnet50-pspnet(width=2, weights={tmp_path / 'resnet50.pth'})", scenes)
    mine = model.trunk.state_dict()
    for name, value in published().items():
        assert name.startswith("fc.") or torch.equal(mine[name], value)


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


FAULTS = {
    "missing": (without("layer3.0.bn1.weight"), r"has no 'layer3\.0\.bn1\.weight'"),
    "extra": (
        lambda s: {**s, "layer5.x": torch.zeros(1)},
        r"has 'layer5\.x', which ResNet-50 does",
    ),
    "other width": (lambda s: published(4), r"'conv1\.weight' of shape \(4, 3, 7, 7\) instead of"),
    "nested": (lambda s: {"state_dict": s}, "something else than tensors by name"),
    "list": (lambda s: [1, 2], "something else than tensors by name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused(scenes, tmp_path, fault):
    change, sentence = FAULTS[fault]
    path = tmp_path / "resnet50.pth"
    torch.save(change(published()), path)
    trunk = DilatedResNet50(3, 2)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    with pytest.raises(WeightsError, match=sentence) as caught:
        trunk.load_published(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in trunk.state_dict().items())


def test_files_that_are_no_weights_are_refused(scenes, tmp_path):
    path = tmp_path / "resnet50.pth"
    with pytest.raises(WeightsError, match="cannot be read .No such file"):
        build("resnet50-pspnet(width=2)", scenes, weights=str(path))
    torch.save(published(), path)
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="is no file of weights, or is damaged"):
            build("resnet50-pspnet(width=2)", scenes, weights=str(path))


def test_what_it_cannot_do_is_refused(scenes):
    with pytest.raises(ValueError, match="width is 0; give 1 or more"):
        build("resnet50-pspnet(width=0)", scenes)
    with pytest.raises(ValueError, match="PSPNet takes images"):
        build(QUICK, replace(scenes, input_shape=(400,)))
    with pytest.raises(ValueError, match="'left': PSPNet gives an answer for every pixel"):
        build(QUICK, load("multidigits", sizes=(4, 2, 2)))
