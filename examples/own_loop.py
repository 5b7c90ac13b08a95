"""Your own model and loop: nothing but `loss.backward()` changes.

Run: python examples/own_loop.py
"""

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

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(x)
        return self.price(features).squeeze(1), self.colour(features)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    price = x @ torch.randn(8)
    colour = (x @ torch.randn(8, 3)).argmax(1)

    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    aggregator = eq.CAGrad(c=0.4)

    for epoch in range(5):
        for batch in torch.randperm(len(x)).split(64):
            price_out, colour_out = net(x[batch])
            losses = [
                F.mse_loss(price_out, price[batch]),
                F.cross_entropy(colour_out, colour[batch]),
            ]
            optimizer.zero_grad()
            # Instead of sum(losses).backward(): the shared parameters receive the aggregated
            # direction, each head the gradient of its own loss.
            eq.backward(losses, shared=net.backbone.parameters(), aggregator=aggregator)
            optimizer.step()
        print(f"epoch {epoch}: price {losses[0].item():.3f}, colour {losses[1].item():.3f}")


if __name__ == "__main__":
    main()
