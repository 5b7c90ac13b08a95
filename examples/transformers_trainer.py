"""A transformers Trainer: accumulation, clipping, schedule, bfloat16 and resume stay the Trainer's.

Run: python examples/transformers_trainer.py
"""

import tempfile

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import equipoise as eq


class TwoTasks(nn.Module):
    """A small BERT, made from a configuration, with two heads; it gives its losses by task."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
        self.bert = BertModel(BertConfig(**sizes, **depth), add_pooling_layer=False)
        self.topic, self.score = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, input_ids: torch.Tensor, topic: torch.Tensor, score: torch.Tensor) -> dict:
        z = self.bert(input_ids).last_hidden_state.mean(1)
        return {
            "topic": F.cross_entropy(self.topic(z), topic),
            "score": F.mse_loss(self.score(z).squeeze(1), score),
        }


class TwoTaskTrainer(Trainer):
    """The Trainer says which micro-batch is the last one before an update."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        if self.accelerator.sync_gradients:
            return self.step.backward(lambda: model(**inputs)).losses.sum().to(self.args.device)
        return 0 * self.step.collect(lambda: model(**inputs)).sum().to(self.args.device)


def sentences() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (64, 8))
    return [{"input_ids": i, "topic": i[0] % 4, "score": i.float().mean() / 32} for i in ids]


def train(folder: str, checkpoint: str | None = None, **settings: object) -> Trainer:
    torch.manual_seed(1)
    model = TwoTasks()
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 4}
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    usual = {"lr_scheduler_type": "cosine", "learning_rate": 1e-2, "max_grad_norm": 1.0}
    arguments = TrainingArguments(folder, **quiet, **batches, **usual, **settings)
    trainer = TwoTaskTrainer(model, arguments, train_dataset=sentences())
    # The Trainer makes the update. SI and CAGrad keep no state, so its checkpoints hold everything.
    trainer.step = eq.Step(model, ["topic", "score"], None, eq.SI(), eq.CAGrad(), shared=model.bert)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder, num_train_epochs=2, bf16=True)
    loss = trainer.state.log_history[-1]["train_loss"]
    print(f"after {trainer.state.global_step} steps: loss {loss:.3f}")


if __name__ == "__main__":
    main()
