import torch
from torch import nn
from torch.nn import functional as F


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

    for epoch in range(5):
        for batch in torch.randperm(len(x)).split(64):
            losses = list(net(x[batch], price[batch], colour[batch]).values())
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        print(f"epoch {epoch}: price {losses[0]:.3f}, colour {losses[1]:.3f}")


if __name__ == "__main__":
    main()
