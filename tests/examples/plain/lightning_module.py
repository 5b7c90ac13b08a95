import tempfile

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class TwoTasks(pl.LightningModule):
    """Lightning counts the steps, saves and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.price, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, price, colour = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        z = self.trunk(x)
        losses = {
            "price": F.mse_loss(self.price(z), price),
            "colour": F.cross_entropy(self.colour(z), colour),
        }
        self.manual_backward(sum(losses.values()))
        optimizer.step()
        self.lr_schedulers().step()
        self.log_dict({f"loss/{task}": loss.detach() for task, loss in losses.items()})


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
