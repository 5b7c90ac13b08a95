import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel


class TwoTasks(nn.Module):
    """A small BERT, made from a configuration, with adapters and two heads."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
        bert = BertModel(BertConfig(**sizes, **depth), add_pooling_layer=False)
        self.bert = get_peft_model(bert, LoraConfig(r=4, target_modules=["query", "value"]))
        self.topic, self.score = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor, topic: torch.Tensor, score: torch.Tensor) -> dict:
        z = self.bert(input_ids=ids).last_hidden_state.mean(1)
        return {
            "topic": F.cross_entropy(self.topic(z), topic),
            "score": F.mse_loss(self.score(z).squeeze(1), score),
        }


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (128, 8))
    topic, score = (ids < 8).sum(1).clamp(max=3), ids.float().mean(1) / 32

    model = TwoTasks()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

    for epoch in range(3):
        for batch in torch.randperm(len(ids)).split(16):
            optimizer.zero_grad()
            losses = list(model(ids[batch], topic[batch], score[batch]).values())
            sum(losses).backward()
            optimizer.step()
        print(f"epoch {epoch}: topic {losses[0]:.3f}, score {losses[1]:.4f}")


if __name__ == "__main__":
    main()
