"""Lightning counts the steps of a Step that has the optimizer which Lightning wraps."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import equipoise as eq


@pytest.mark.filterwarnings("ignore")  # its own
def test_lightning_counts_the_steps(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Two(pl.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.model = eq.SharedTrunk(nn.Linear(8, 16), {"a": nn.Linear(16, 1)})
            self.made = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters())

        def on_fit_start(self) -> None:
            self.step = eq.Step(self.model, {"a": F.mse_loss}, self.optimizers())

        def training_step(self, batch: tuple, batch_idx: int) -> None:
            self.made += 1
            self.step(batch[0], {"a": batch[1]})

    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    trainer = pl.Trainer(
        max_epochs=4, max_steps=5, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Two()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    assert module.made == trainer.global_step == 5
    assert list(tmp_path.rglob("*step=5.ckpt"))
