"""Models: shapes, sizes, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise.lab.data import load
from equipoise.lab.models import CNN, MODELS, LeNet, ResNet18, build
from equipoise.lab.tasks import Task


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
        assert all(value.isfinite() for value in metric.compute().values())
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
        assert metric.compute()["accuracy"] > 0.4  # chance is 0.1


def test_unknown_model_names_the_known():
    with pytest.raises(EquipoiseError, match="'lenett'.*'lenet'"):
        build("lenett", load("multidigits"))
    with pytest.raises(EquipoiseError) as error:
        build("zzz", load("multidigits"))
    assert all(name in str(error.value) for name in MODELS)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_resnet18_has_the_published_number_of_parameters():
    trunk = ResNet18(3, features=None)
    assert count(trunk) == 11_176_512
    assert count(nn.Sequential(trunk, nn.Linear(512, 1000))) == 11_689_512
    assert count(nn.Sequential(trunk, nn.Linear(512, 100, bias=False))) == 11_227_712
    # One channel instead of three, and what the F-MTL authors put behind the mean.
    assert count(ResNet18(1)) == 11_176_512 - 2 * 64 * 49 + 513 * 100


def test_resnet18_is_the_network_of_table_1():
    """The shapes after the stem and after each stage, for images of 224 x 224 pixels."""
    trunk = ResNet18(3, features=None)
    shapes = []
    for layer in trunk.layers:
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        features = trunk(torch.rand(1, 3, 224, 224))
    stages = [(64, 56, 56)] * 3 + [(128, 28, 28)] * 2 + [(256, 14, 14)] * 2 + [(512, 7, 7)] * 2
    assert shapes[0] == (64, 112, 112)
    assert shapes[3:] == [*stages, (512, 1, 1), (512,)]
    assert features.shape == (1, 512) == (1, trunk.width)
    x = torch.rand(1, 64, 9, 9)
    assert torch.equal(trunk.layers[3](x), nn.functional.max_pool2d(x, 3, 2, 1))


def test_a_block_adds_what_goes_around_it():
    block = ResNet18(1, width=2).layers[4]
    nn.init.zeros_(block.residual[4].weight)
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(block(x), x.relu())
    wider = ResNet18(1, width=2).layers[6]
    nn.init.zeros_(wider.residual[4].weight)
    wider.eval()
    projected = wider.shortcut[0](x)
    assert projected.shape == (2, 4, 3, 3)
    torch.testing.assert_close(wider(x), projected.relu() / (1 + 1e-5) ** 0.5)


def test_the_small_stem_keeps_the_size():
    trunk = ResNet18(3, width=4, stem="small", features=7)
    with torch.no_grad():
        stem = nn.Sequential(*trunk.layers[:3])(torch.rand(1, 3, 32, 30))
        assert stem.shape == (1, 4, 32, 30)
        features = trunk(torch.rand(2, 3, 32, 30))
    assert isinstance(trunk.layers[0], nn.Conv2d) and trunk.layers[0].kernel_size == (3, 3)
    assert features.shape == (2, 7) and features.min() >= 0


def test_resnet18_keeps_the_variance_that_its_authors_ask_for():
    torch.manual_seed(0)
    for module in ResNet18(1, stem="small").modules():
        if isinstance(module, nn.Conv2d):
            n = module.kernel_size[0] ** 2 * module.out_channels
            weight = module.weight.detach()
            assert weight.mean().abs() < 4 * (2 / n / weight.numel()) ** 0.5
            assert weight.var().item() == pytest.approx(2 / n, rel=0.2)
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize("name", ["multidigits", "digits-attributes"])
def test_resnet18_has_a_linear_head_for_every_task(name):
    data = load(name, sizes=(20, 2, 2))
    model = build("resnet18(width=2)", data)
    assert [(head.in_features, head.out_features) for head in model.heads.values()] == [
        (100, task.outputs) for task in data.tasks
    ]
    outputs = model(data.train[list(range(8))][0])
    assert {task: out.shape for task, out in outputs.items()} == {
        task.name: (8, task.outputs) for task in data.tasks
    }


@pytest.mark.parametrize(("option", "value"), [("width", 0), ("features", -1)])
def test_resnet18_refuses_an_impossible_width(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}; give 1 or more"):
        build("resnet18", load("multidigits"), **{option: value})


def test_resnet18_refuses_inputs_that_are_no_images():
    data = replace(load("multidigits"), input_shape=(400,))
    with pytest.raises(ValueError, match="ResNet-18 takes images.*multidigits has inputs of shape"):
        build("resnet18", data)


def test_resnet18_has_the_size_of_stg_mtl_without_bias_in_the_heads():
    """SPECS F.C6: 11,176,512 + 512 n."""
    data = hundred_tasks()
    model = build("resnet18(features=none, head_bias=false)", data)
    assert count(model) == 11_227_712
    assert all(head.bias is None for head in model.heads.values())
    assert count(build("resnet18(features=none)", data)) == 11_227_712 + 100


def hundred_tasks():
    data = load("multidigits", sizes=(4, 2, 2))
    tasks = tuple(Task.binary(f"task {i}") for i in range(100))
    return replace(data, tasks=tasks, input_shape=(3, 32, 32))


def test_cnn_has_the_size_of_stg_mtl():
    """SPECS F.C6."""
    model = build("cnn", hundred_tasks())
    assert count(model) == 472_612
    assert {(head.in_features, head.out_features) for head in model.heads.values()} == {(128, 1)}


def test_cnn_is_the_network_of_table_2():
    trunk = CNN(3, 32, 32)
    shapes = []
    for layer in trunk.layers:
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    features = trunk(torch.rand(2, 3, 32, 32))
    convolutions = [(32, 28, 28)] * 3 + [(32, 14, 14)] + [(64, 14, 14)] * 6 + [(64, 7, 7)]
    assert shapes == [*convolutions, (3136,), (3136,), (128,), (128,), (128,)]
    inner = ["Conv2d", "BatchNorm2d", "ReLU"]
    behind = ["Flatten", "Dropout", "Linear", "ReLU", "Dropout"]
    assert [type(layer).__name__ for layer in trunk.layers] == [
        *inner, "MaxPool2d", *inner, *inner, "MaxPool2d", *behind
    ]  # fmt: skip
    assert {layer.p for layer in trunk.layers if isinstance(layer, nn.Dropout)} == {0.2}
    assert features.min() >= 0


@pytest.mark.parametrize(("shape", "flat"), [((1, 8, 8), 4), ((2, 20, 33), 112)])
def test_cnn_takes_images_of_other_sizes_and_widths(shape, flat):
    trunk = CNN(*shape, width=2, features=5, dropout=0.0)
    assert trunk(torch.rand(3, *shape)).shape == (3, 5)
    assert trunk.layers[13].in_features == flat
    x = torch.rand(3, *shape)
    assert torch.equal(trunk(x), trunk(x))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("width=0", "width is 0; give 1 or more"),
        ("features=0", "features is 0"),
        ("dropout=1.0", r"dropout is 1\.0; give a share in \[0, 1\)"),
    ],
)
def test_cnn_refuses_what_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(f"cnn({options})", load("multidigits", sizes=(4, 2, 2)))


def test_cnn_refuses_inputs_that_are_too_small_or_no_images():
    with pytest.raises(ValueError, match="images of 7 x 9 pixels are too small .* 8 x 8 or more"):
        CNN(3, 7, 9)
    data = replace(load("multidigits", sizes=(4, 2, 2)), input_shape=(400,))
    with pytest.raises(ValueError, match="the CNN takes images.*multidigits has inputs of shape"):
        build("cnn", data)
