"""PyTorch Lightning with manual optimisation: the loop stays Lightning's.

Run: python examples/lightning_module.py
"""

import tempfile

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import equipoise as eq


class TwoTasks(pl.LightningModule):
    """Lightning counts the steps, saves and logs; Equipoise makes the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.model = eq.SharedTrunk(trunk, {"price": nn.Linear(32, 1), "colour": nn.Linear(32, 3)})
        losses = {"price": F.mse_loss, "colour": F.cross_entropy}
        self.step = eq.Step(self.model, losses, None, eq.IGBv1(steps_per_epoch=8), eq.CAGrad())

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, price, colour = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        report = self.step.backward(x, {"price": price, "colour": colour})
        optimizer.step()  # through Lightning's wrapper: max_steps and checkpoints count it
        self.lr_schedulers().step()
        self.log_dict(report.scalars())

    # Weightings and aggregators have a state of their own; it travels in Lightning's checkpoint.
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["equipoise"] = self.step.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.step.load_state_dict(checkpoint["equipoise"])


def loader() -> DataLoader:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    price, colour = x @ torch.randn(8, 1), (x @ torch.randn(8, 3)).argmax(1)
    return DataLoader(TensorDataset(x, price, colour), batch_size=64, shuffle=True)


def fit(folder: str, checkpoint: str | None = None, **settings: object) -> pl.Trainer:
    torch.manual_seed(1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep_all = pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1)
    trainer = pl.Trainer(accelerator="cpu", callbacks=[keep_all], **quiet, **settings)
    trainer.fit(TwoTasks(), loader(), ckpt_path=checkpoint)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(folder, max_epochs=2)
    price, colour = (trainer.callback_metrics[f"loss/{task}"] for task in ("price", "colour"))
    print(f"after {trainer.global_step} steps: price {price:.3f}, colour {colour:.3f}")


if __name__ == "__main__":
    main()
