"""Your own model and loop, with an answer to each of the four questions of a step.

Run: python examples/own_loop.py
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq


class Net(nn.Module):
    """An ordinary network; no base class, no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.price = nn.Linear(32, 1)
        self.colour = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor, price: torch.Tensor, colour: torch.Tensor) -> dict:
        features = self.backbone(x)
        return {
            "price": F.mse_loss(self.price(features).squeeze(1), price),
            "colour": F.cross_entropy(self.colour(features), colour),
        }


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    price = x @ torch.randn(8)
    colour = (x @ torch.randn(8, 3)).argmax(1)

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stages = eq.IGBv1(steps_per_epoch=8), eq.CAGrad(), eq.TaskSharpness(0.05), eq.Backtracking()
    step = eq.Step(net, ["price", "colour"], optimizer, *stages)

    for epoch in range(5):
        for batch in torch.randperm(len(x)).split(64):
            # TaskSharpness and Backtracking look at a batch several times: they call this again.
            report = step(partial(net, x[batch], price[batch], colour[batch]))
        losses = report.losses.tolist()
        print(f"epoch {epoch}: price {losses[0]:.3f}, colour {losses[1]:.3f}")


if __name__ == "__main__":
    main()
