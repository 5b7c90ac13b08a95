"""Measures, losses and Delta_m of dense tasks beside slow ones that walk from pixel to pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import dense as slow

from equipoise.lab.dense import Depth, Normals, Segmentation
from equipoise.lab.summary import summarise

CLASSES = tuple("abcdefg")


def scene(seed: int) -> dict[str, torch.Tensor]:
    """Give outputs and targets of some small images: some classes absent, some pixels unknown.

    The last image has nothing that is known.
    """
    g = torch.Generator().manual_seed(seed)
    n, h, w = 4, 5, 6
    label = torch.randint(-1, 4, (n, h, w), generator=g)  # no class from 4 on is there
    logits = torch.randn(n, len(CLASSES), h, w, generator=g)
    logits[:, 5 - seed % 2 :] = -50.0  # nor is it predicted
    truth = torch.rand(n, 1, h, w, generator=g) * 5 + 0.1
    truth[torch.rand(n, 1, h, w, generator=g) < 0.3] = 0
    normal = torch.randn(n, 3, h, w, generator=g)
    normal = normal / normal.norm(dim=1, keepdim=True)
    normal = normal * (torch.rand(n, 1, h, w, generator=g) > 0.3)
    near = normal + 0.3 * (seed % 3) * torch.randn(n, 3, h, w, generator=g)
    label[-1], truth[-1], normal[-1] = -1, 0, 0
    return {
        "label": label,
        "logits": logits,
        "truth": truth,
        "depth": truth + torch.randn(n, 1, h, w, generator=g),
        "normal": normal,
        "near": near * (1 + seed) + (near.norm(dim=1, keepdim=True) == 0),
    }


def measured(task, outputs: torch.Tensor, targets: torch.Tensor, batch: int) -> dict[str, float]:
    meter = task.metric()
    for k in range(0, len(outputs), batch):
        task.update(meter, outputs[k : k + batch], targets[k : k + batch])
    return {name: float(value) for name, value in meter.compute().items()}


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_nine_metrics(seed: int, batch: int) -> None:
    s = scene(seed)
    found = measured(Segmentation("s", CLASSES), s["logits"], s["label"], batch)
    expected = slow.segmentation(s["logits"].argmax(1).numpy(), s["label"].numpy(), len(CLASSES))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)

    found = measured(Depth("d"), s["depth"], s["truth"], batch)
    expected = slow.depth(s["depth"][:, 0].numpy(), s["truth"][:, 0].numpy())
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)

    found = measured(Normals("n"), s["near"], s["normal"], batch)
    expected = slow.normals(s["near"].double().numpy(), s["normal"].double().numpy())
    # The median is counted in bins of a thousandth of a degree; acos is blunt near 0.
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_batches_pooled_as_older_tables_do(seed: int) -> None:
    """Mean over batches of the mean in each; a batch that knows nothing does not count."""
    s = scene(seed)
    per_batch = [
        slow.normals(s["near"][k : k + 2].double().numpy(), s["normal"][k : k + 2].double().numpy())
        for k in (0, 2)
    ]
    found = measured(Normals("n", pooling="batches"), s["near"], s["normal"], 2)
    expected = [np.mean([b[name] for b in per_batch]) for name in per_batch[0]]
    assert list(found.values()) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    per_batch = [
        slow.depth(s["depth"][k : k + 2, 0].numpy(), s["truth"][k : k + 2, 0].numpy())
        for k in (0, 2)
    ]
    found = measured(Depth("d", pooling="batches"), s["depth"], s["truth"], 2)
    expected = [np.mean([b[name] for b in per_batch]) for name in per_batch[0]]
    assert list(found.values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_losses(seed: int) -> None:
    s = scene(seed)
    found = Segmentation("s", CLASSES).loss(s["logits"], s["label"])
    assert found.item() == pytest.approx(
        slow.cross_entropy(s["logits"].numpy(), s["label"].numpy()), rel=1e-5
    )
    found = Depth("d").loss(s["depth"], s["truth"])
    expected = slow.depth(s["depth"][:, 0].numpy(), s["truth"][:, 0].numpy())
    assert found.item() == pytest.approx(expected["abs_error"], rel=1e-5)
    found = Normals("n").loss(s["near"], s["normal"])
    expected = slow.one_minus_cosine(s["near"].numpy(), s["normal"].numpy())
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("task", [Segmentation("s", CLASSES), Depth("d"), Normals("n")])
def test_an_image_that_knows_nothing_has_no_gradient_and_no_number(task) -> None:
    s = scene(0)
    names = {"segmentation": "logits label", "depth": "depth truth", "normals": "near normal"}
    output, target = (s[name][-1:] for name in names[task.kind].split())
    output = output.clone().requires_grad_()
    loss = task.loss(output, target)
    loss.backward()
    assert loss.item() == 0 and not output.grad.any() and output.grad.isfinite().all()


@pytest.mark.parametrize("over", ["metrics", "tasks"])
@pytest.mark.parametrize("sign", ["improvement", "drop"])
def test_delta_m(sign: str, over: str) -> None:
    """Two recipes, two seeds, against the mean over the seeds of single-task training."""
    rng = np.random.default_rng(0)
    measures = {"a": {"up": True, "down": False, "also down": False}, "b": {"down": False}}

    def values() -> dict:
        return {t: {m: float(rng.uniform(0.5, 2)) for m in ms} for t, ms in measures.items()}

    tasks = [
        {
            "name": t,
            "kind": "depth",
            "measures": [
                {"name": m, "higher_is_better": up, "unit": "", "share": False}
                for m, up in ms.items()
            ],
        }
        for t, ms in measures.items()
    ]
    results = [
        {"recipe": r, "seed": s, "data": "d", "model": "m", "tasks": tasks, "epochs": 1,
         "test": values(), "train_seconds": 1.0}
        for r in ("stl", "ew") for s in (0, 1)
    ]  # fmt: skip
    single = {
        t: {m: (results[0]["test"][t][m] + results[1]["test"][t][m]) / 2 for m in ms}
        for t, ms in measures.items()
    }
    row = next(r for r in summarise(results, sign, over).rows if r.recipe == "ew")
    expected = [slow.delta_m(r["test"], single, measures, sign, over) for r in results[2:]]
    assert list(row.delta_m.values) == pytest.approx(expected, rel=1e-12)
