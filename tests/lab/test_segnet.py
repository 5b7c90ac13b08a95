"""SegNet and MTAN: shapes, numbers of parameters, and what belongs to whom."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.lab.data.base import Data, Split
from equipoise.lab.dense import Depth, Normals, Segmentation
from equipoise.lab.models import build
from equipoise.lab.models.segnet import SegNet
from equipoise.lab.tasks import Task

CLASSES = tuple("abcdefghijklm")
SCENE = (Segmentation("segmentation", CLASSES), Depth("depth"), Normals("normals"))
MODELS = ["segnet", "segnet-mtan", "segnet-mtan(attention=trunk)"]


def scenes(tasks=SCENE, shape=(3, 32, 64)) -> Data:
    empty = Split(torch.zeros(0, *shape), {})
    return Data("scenes", tasks, empty, empty, empty, shape, "")


def small(text: str, **more) -> eq.SharedTrunk:
    torch.manual_seed(0)
    return build(text, scenes(), width=2, **more)


def targets(size=(32, 64), n=2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "segmentation": torch.randint(-1, 13, (n, *size)),
        "depth": torch.rand(n, 1, *size),
        "normals": torch.randn(n, 3, *size),
    }


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def convolution(a: int, b: int, side: int = 3, norm: bool = True) -> int:
    """Weights, biases, and scale and shift of the BatchNorm behind it."""
    return side * side * a * b + b + (2 * b if norm else 0)


def heads(width: int) -> int:
    first = convolution(width, width, norm=False)
    return sum(first + convolution(width, n, 1, norm=False) for n in (13, 1, 3))


# Published: Badrinarayanan et al., table of layers, with the decoder of the tables' code.
ENCODER = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
           (256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)]  # fmt: skip
DECODER = [(512, 512), (512, 512), (512, 512), (512, 256), (256, 256), (256, 256), (256, 128),
           (128, 128), (128, 128), (128, 64), (64, 64), (64, 64), (64, 64)]  # fmt: skip
STAGES = [64, 128, 256, 512, 512]


def masks() -> int:
    total = 0
    for i, w in enumerate(STAGES):
        below = STAGES[max(i - 1, 0)]
        total += convolution(w if i == 0 else 2 * w, w, 1) + convolution(w, w, 1)
        total += convolution(w + below, below, 1) + convolution(below, below, 1)
    return total


def between() -> int:
    onward = zip(STAGES, [128, 256, 512, 512, 512], strict=True)
    back = zip(STAGES, [64, 64, 128, 256, 512], strict=True)
    return sum(convolution(a, b) for a, b in (*onward, *back))


def test_numbers_of_parameters():
    trunk = sum(convolution(a, b) for a, b in ENCODER + DECODER)
    with torch.device("meta"):
        plain, own, common = (build(name, scenes()) for name in MODELS)
    assert count(plain) == trunk + heads(64) == 25_055_185
    assert count(plain.trunk) == count(own.trunk) == trunk == 24_943_296
    assert count(own) == trunk + heads(64) + 3 * (masks() + between()) == 64_669_393
    # The published structure: MTAN's paper says 44 million.
    assert count(common) == trunk + heads(64) + 3 * masks() + between() == 44_229_073
    assert count(common.trunk) == count(common) - heads(64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 64), (40, 53)])
def test_an_answer_for_every_pixel_whatever_the_size(name, size):
    outputs = small(name)(torch.randn(2, 3, *size))
    for task in SCENE:
        assert outputs[task.name].shape == (2, task.outputs, *size)
        assert outputs[task.name].isfinite().all()


def test_the_decoder_puts_values_back_where_they_came_from():
    torch.manual_seed(0)
    features = SegNet(3, 2).features(torch.randn(1, 3, 32, 32))
    last, deepest = features["encoder"][-1], features["upsampled"][0]
    assert deepest.shape == last.shape
    kept = deepest != 0
    assert torch.equal(deepest[kept], last[kept]) and 0 < kept.sum() <= deepest.numel() / 4
    assert [x.shape[1] for x in features["decoder"]] == [16, 8, 4, 2, 2]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["cagrad", "igbv1+pcgrad", "f-mgda", "stl"])
def test_a_step_moves_every_parameter(name, recipe):
    model = small(name)
    losses = {task.name: task.loss for task in SCENE}
    step = eq.Recipe.parse(recipe).build(model, losses, 1e-3, 1)
    before = [p.detach().clone() for p in step.model.parameters()]
    step.model.train()
    report = step(torch.randn(2, 3, 32, 64), targets())
    assert report.losses.isfinite().all()
    moved = [not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True)]
    # Biases in front of a BatchNorm have a gradient by rounding only. In a trunk with attention a
    # single task has no use for that of the others.
    least = 0.3 if recipe == "stl" and "trunk" in name else 0.9
    assert sum(moved) > least * len(moved)


def test_attention_belongs_to_the_head_or_to_the_trunk():
    own, common = small("segnet-mtan"), small("segnet-mtan", attention="trunk")
    assert not [n for n, _ in own.trunk.named_parameters() if "mask" in n]
    assert all(
        any("mask" in n for n, _ in own.heads[task].named_parameters()) for task in own.tasks
    )
    outputs = common(torch.randn(1, 3, 32, 32))
    outputs["depth"].sum().backward()
    reached = {n for n, p in common.trunk.named_parameters() if p.grad is not None}
    assert any(n.startswith("attention.depth.") for n in reached)
    assert not any(n.startswith("attention.normals.") for n in reached)
    assert any(n.startswith("between.") for n in reached)


def test_single_tasks_have_an_attention_of_their_own():
    single = small("segnet-mtan").separated()
    outputs = single(torch.randn(1, 3, 32, 32))
    outputs["depth"].sum().backward()
    reached = {n for n, p in single.named_parameters() if p.grad is not None}
    assert all(n.startswith(("trunk.of.depth.", "heads.depth.")) for n in reached)


@pytest.mark.parametrize("name", ["segnet", "segnet-mtan"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (scenes((Task.binary("indoors"),)), "'indoors'.*answer for every pixel.*lenet"),
        (scenes(shape=(3, 31, 64)), "31 x 64 pixels are too small"),
        (scenes(shape=(3, 9)), "has inputs of shape"),
    ],
)
def test_what_does_not_fit_is_refused(name, data, words):
    with pytest.raises(ValueError, match=words):
        build(name, data)


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
def test_other_models_refuse_an_answer_for_every_pixel(name):
    with pytest.raises(ValueError, match="'segmentation'.*one answer for an image.*segnet"):
        build(name, scenes())


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="width is 0"):
        build("segnet", scenes(), width=0)
