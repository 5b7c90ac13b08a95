"""float16 with a GradScaler; an overflow skips the step and lowers the scale.

Run: python examples/float16.py
"""

import torch
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


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    price = x @ torch.randn(8)
    colour = (x @ torch.randn(8, 3)).argmax(1)

    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too much at first: it backs off
    step = eq.Step(net, ["price", "colour"], optimizer, aggregator=eq.UPGrad(), scaler=scaler)

    for epoch in range(5):
        for batch in torch.randperm(len(x)).split(64):

            def losses(batch: torch.Tensor = batch) -> dict:
                with torch.autocast("cpu", torch.float16):
                    return net(x[batch], price[batch], colour[batch])

            step(losses)
        now = [loss.item() for loss in net(x, price, colour).values()]
        print(f"epoch {epoch}: price {now[0]:.3f}, colour {now[1]:.3f}", end=", ")
        print(f"scale {scaler.get_scale():.0f}")


if __name__ == "__main__":
    main()
