"""Fused and schedule-free optimizers: the step takes any optimizer.

Run: python examples/optimizers.py
"""

from collections.abc import Callable
from functools import partial

import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.nn import functional as F

import equipoise as eq


class Net(nn.Module):
    """An ordinary network that gives its losses by task."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.price, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor, price: torch.Tensor, colour: torch.Tensor) -> dict:
        features = self.backbone(x)
        return {
            "price": F.mse_loss(self.price(features).squeeze(1), price),
            "colour": F.cross_entropy(self.colour(features), colour),
        }


def train(optimizer_of: Callable) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    price = x @ torch.randn(8)
    colour = (x @ torch.randn(8, 3)).argmax(1)

    net = Net()
    optimizer = optimizer_of(net.parameters(), lr=0.02)
    step = eq.Step(net, ["price", "colour"], optimizer, eq.SI(), eq.CAGrad())

    if isinstance(optimizer, AdamWScheduleFree):
        optimizer.train()  # the parameters to train with ...
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(64):
            step(partial(net, x[batch], price[batch], colour[batch]))
    if isinstance(optimizer, AdamWScheduleFree):
        optimizer.eval()  # ... and those to judge and save
    return [round(loss.item(), 3) for loss in net(x, price, colour).values()]


def main() -> None:
    for optimizer_of in (partial(torch.optim.Adam, fused=True), AdamWScheduleFree):
        price, colour = train(optimizer_of)
        print(f"after 5 epochs: price {price}, colour {colour}")


if __name__ == "__main__":
    main()
