import torch
from torch import nn
from torch.nn import functional as F


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
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    for epoch in range(5):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                losses = list(net(x[batch], price[batch], colour[batch]).values())
            scaler.scale(sum(losses)).backward()
            scaler.step(optimizer)
            scaler.update()
        now = [loss.item() for loss in net(x, price, colour).values()]
        print(f"epoch {epoch}: price {now[0]:.3f}, colour {now[1]:.3f}", end=", ")
        print(f"scale {scaler.get_scale():.0f}")


if __name__ == "__main__":
    main()
