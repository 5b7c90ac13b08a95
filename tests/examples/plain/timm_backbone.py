import timm
import torch
from torch import nn
from torch.nn import functional as F


class Dense(nn.Module):
    """Reads two stages of the backbone and writes a map of the input's size."""

    def __init__(self, channels: list[int], out: int) -> None:
        super().__init__()
        self.near, self.far = (nn.Conv2d(c, 16, 1) for c in channels)
        self.out = nn.Conv2d(16, out, 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        near, far = self.near(features[0]), self.far(features[1])
        far = F.interpolate(far, near.shape[-2:], mode="bilinear")
        return F.interpolate(self.out(torch.relu(near + far)), scale_factor=8, mode="bilinear")


def depth_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    known = target > 0
    return (output - target)[known].abs().mean()


def main() -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(64, 3, 4, 4), scale_factor=8)
    classes = images.argmax(1)
    depth = images.mean(1, keepdim=True) * (torch.rand(64, 1, 32, 32) > 0.2)  # 0: not measured

    backbone = timm.create_model("resnet10t", features_only=True, out_indices=(2, 3))
    channels = backbone.feature_info.channels()
    heads = nn.ModuleList([Dense(channels, 3), Dense(channels, 1)])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *heads.parameters()], lr=2e-3)

    for epoch in range(3):
        for batch in torch.randperm(len(images)).split(16):
            optimizer.zero_grad()
            features = backbone(images[batch])
            found = [
                F.cross_entropy(heads[0](features), classes[batch]),
                depth_loss(heads[1](features), depth[batch]),
            ]
            sum(found).backward()
            optimizer.step()
        print(f"epoch {epoch}: classes {found[0]:.3f}, depth {found[1]:.3f}")


if __name__ == "__main__":
    main()
