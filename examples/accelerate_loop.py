"""Accelerate with gradient accumulation, clipping, a schedule and checkpoints.

Run: python examples/accelerate_loop.py
"""

import tempfile
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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


def data() -> TensorDataset:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    return TensorDataset(x, x @ torch.randn(8), (x @ torch.randn(8, 3)).argmax(1))


def train(folder: str, epochs: int = 2, checkpoint: str | None = None) -> nn.Module:
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)
    loader = DataLoader(data(), batch_size=16)
    net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    step = eq.Step(net, ["price", "colour"], None, eq.IGBv1(steps_per_epoch=4), eq.CAGrad())
    accelerator.register_for_checkpointing(step)
    if checkpoint:
        accelerator.load_state(checkpoint)

    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(net):
                # The last micro-batch before an update makes the gradients of all of them.
                take = step.backward if accelerator.sync_gradients else step.collect
                take(partial(net, *batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    accelerator.save_state(folder)
    return net


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        net = train(folder)
    price, colour = net(*data().tensors).values()
    print(f"after training: price {price:.3f}, colour {colour:.3f}")


if __name__ == "__main__":
    main()
