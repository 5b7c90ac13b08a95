"""The same step inside PyTorch Lightning, with manual optimisation.

Run: python examples/lightning_module.py
"""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import equipoise as eq


class TwoTasks(pl.LightningModule):
    """Lightning owns the loop, Equipoise the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.model = eq.SharedTrunk(trunk, {"price": nn.Linear(32, 1), "colour": nn.Linear(32, 3)})
        self.losses = {"price": F.mse_loss, "colour": F.cross_entropy}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=0.01)

    def on_fit_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.step = eq.Step(self.model, self.losses, optimizer, eq.SI(), eq.MGDA())
        if resumed := getattr(self, "resumed", None):
            self.step.load_state_dict(resumed)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, price, colour = batch
        report = self.step(x, {"price": price, "colour": colour})
        for task, loss in zip(report.tasks, report.losses, strict=True):
            self.log(f"loss/{task}", loss.float(), prog_bar=True)

    # Weightings and aggregators have a state of their own; it travels in Lightning's checkpoint.
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["equipoise"] = self.step.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.resumed = checkpoint["equipoise"]


def main() -> None:
    pl.seed_everything(0, verbose=False)
    x = torch.randn(512, 8)
    price, colour = x @ torch.randn(8, 1), (x @ torch.randn(8, 3)).argmax(1)
    loader = DataLoader(TensorDataset(x, price, colour), batch_size=64, shuffle=True)

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TwoTasks(), loader)
    losses = {name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()}
    print(f"after {trainer.current_epoch} epochs: {losses}")


if __name__ == "__main__":
    main()
