"""Loops of others end where a loop written by hand ends, are counted, and resume bit for bit."""

from __future__ import annotations

import runpy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq

FOLDER = Path(__file__).resolve().parents[2] / "examples"

# Warnings of the frameworks are theirs; ours stay errors.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::equipoise")


def example(name: str, package: str) -> dict[str, Any]:
    """The names of an example that is not run."""
    pytest.importorskip(package)
    return runpy.run_path(str(FOLDER / name), run_name="example")


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


# ---------------------------------------------------------------------------------- Trainer


@pytest.fixture
def trainer() -> dict[str, Any]:
    """The example; its BERT without dropout, whose masks would depend on the micro-batches."""
    found = example("transformers_trainer.py", "transformers")
    whole = found["TwoTasks"].__init__.__globals__
    whole["BertConfig"] = partial(
        whole["BertConfig"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return found


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_trainer_ends_where_a_loop_by_hand_ends(
    half: bool, trainer: dict[str, Any], tmp_path: Path
) -> None:
    found = trainer["train"](
        str(tmp_path), num_train_epochs=2, bf16=half, train_sampling_strategy="sequential"
    )
    assert found.state.global_step == 8

    torch.manual_seed(1)
    net, data = trainer["TwoTasks"](), trainer["sentences"]()
    step = eq.Step(net, ["topic", "score"], None, eq.SI(), eq.CAGrad(), shared=net.bert)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    schedule = cosine(optimizer, 8)

    def losses(start: int, size: int) -> dict[str, Tensor]:
        some = data[start : start + size]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = net(**{key: torch.stack([one[key] for one in some]) for key in some[0]})
        return {task: loss.float() for task, loss in found.items()}

    for number in range(8):
        start = number * 16 % 64
        optimizer.zero_grad()
        if half:  # rounded as the micro-batches are
            step.collect(partial(losses, start, 8))
            step.backward(partial(losses, start + 8, 8))
        else:
            step.backward(partial(losses, start, 16))
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    # AdamW divides by tiny second moments: what was round-off is larger after eight steps.
    torch.testing.assert_close(vector(found.model), vector(net), rtol=1e-3, atol=2e-4)
    assert (vector(net) - vector(trainer["TwoTasks"]())).abs().max() > 0.02


def test_a_trainer_resumes_bit_for_bit_with_all_state_of_the_step(tmp_path: Path) -> None:
    found = example("transformers_trainer.py", "transformers")

    def train(folder: str, checkpoint: str | None = None) -> tuple[nn.Module, eq.Step]:
        torch.manual_seed(1)
        net = found["TwoTasks"]()  # with dropout
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        step = eq.Step(net, ["topic", "score"], None, eq.IGBv1(2), eq.CAGrad())
        optimizer.register_state_dict_post_hook(lambda _, s: s | {"equipoise": step.state_dict()})
        optimizer.register_load_state_dict_pre_hook(
            lambda _, s: step.load_state_dict(s.pop("equipoise"))
        )
        arguments = found["TrainingArguments"](
            str(tmp_path / folder), num_train_epochs=2, per_device_train_batch_size=16,
            gradient_accumulation_steps=2, lr_scheduler_type="cosine", use_cpu=True,
            report_to="none", disable_tqdm=True, save_steps=3, bf16=True,
        )  # fmt: skip
        kind = found["TwoTaskTrainer"]
        made = kind(
            net, arguments, train_dataset=found["sentences"](), optimizers=(optimizer, None)
        )
        made.step = step
        made.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        return net, step

    whole, step = train("whole")
    resumed, again = train("resumed", "whole/checkpoint-3")
    assert torch.equal(vector(whole), vector(resumed))
    for one, other in zip(state_of(step), state_of(again), strict=True):
        assert torch.equal(one, other)


def state_of(step: eq.Step) -> list[Tensor]:
    """The tensors of its stages."""
    state = step.state_dict()
    return [
        value
        for stage in ("weighting", "aggregator")
        for value in state[stage].values()
        if isinstance(value, Tensor)
    ]


# ------------------------------------------------------------------------------- Accelerate


def test_accelerate_ends_where_a_loop_by_hand_ends(tmp_path: Path) -> None:
    found = example("accelerate_loop.py", "accelerate")
    net = found["train"](str(tmp_path))

    torch.manual_seed(1)
    mine, data = found["Net"](), found["data"]().tensors
    step = eq.Step(mine, ["price", "colour"], None, eq.IGBv1(steps_per_epoch=4), eq.CAGrad())
    optimizer = torch.optim.Adam(mine.parameters(), lr=0.01)
    schedule = cosine(optimizer, 32)
    for number in range(8):
        start = number * 64 % 256
        optimizer.zero_grad()
        step.backward(partial(mine, *(part[start : start + 64] for part in data)))
        nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(vector(net), vector(mine), rtol=1e-4, atol=1e-5)
    assert (vector(net) - vector(found["Net"]())).abs().max() > 0.05


def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    train = example("accelerate_loop.py", "accelerate")["train"]
    folders = [str(tmp_path / name) for name in ("whole", "half", "resumed")]
    whole = train(folders[0], 2)
    train(folders[1], 1)
    assert torch.equal(vector(train(folders[2], 1, folders[1])), vector(whole))


# -------------------------------------------------------------------------------- Lightning


def test_lightning_counts_saves_schedules_and_resumes(tmp_path: Path) -> None:
    fit = example("lightning_module.py", "pytorch_lightning")["fit"]
    whole = fit(str(tmp_path / "whole"), max_epochs=3)
    assert whole.global_step == 24
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.ckpt"))
    assert names == ["step=16.ckpt", "step=24.ckpt", "step=8.ckpt"]
    (group,) = whole.optimizers[0].param_groups
    assert group["lr"] < 0.002  # of 0.01
    assert {"loss/price", "weight/colour", "coefficient/price"} <= set(whole.callback_metrics)

    resumed = fit(str(tmp_path / "resumed"), str(tmp_path / "whole" / "step=16.ckpt"), max_epochs=3)
    assert torch.equal(vector(whole.lightning_module), vector(resumed.lightning_module))
    assert whole.callback_metrics == resumed.callback_metrics
    before, after = whole.lightning_module.step, resumed.lightning_module.step
    assert all(torch.equal(*pair) for pair in zip(state_of(before), state_of(after), strict=True))


def test_lightning_ends_after_max_steps(tmp_path: Path) -> None:
    fit = example("lightning_module.py", "pytorch_lightning")["fit"]
    assert fit(str(tmp_path), max_steps=11).global_step == 11


def test_a_step_with_the_wrapped_optimizer_is_counted(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    found = example("lightning_module.py", "pytorch_lightning")

    class Whole(found["TwoTasks"]):  # type: ignore[misc]
        made = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def on_fit_start(self) -> None:
            losses = {"price": nn.functional.mse_loss, "colour": nn.functional.cross_entropy}
            self.whole = eq.Step(self.model, losses, self.optimizers(), eq.SI(), eq.MGDA())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.made += 1
            self.whole(batch[0], {"price": batch[1], "colour": batch[2]})

    module = Whole()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=5, max_epochs=3, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, found["loader"]())
    assert (module.made, trainer.global_step) == (5, 5)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=0-step=5.ckpt"]


# ----------------------------------------------------------- a scaler of others, optimizers


def losses_of(net: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.float16):
        return {"near": (net(x) - target).square().mean(), "far": (net(x) + target).abs().mean()}


def test_whoever_owns_the_scaler_gets_the_same_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 16, 4, generator=generator) for _ in range(6)]
    ends, scales, skipped = [], [], []
    for owner in ("step", "loop", "accelerate"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)  # overflows at first
        step = eq.Step(
            net, ["near", "far"], optimizer if owner == "step" else None, eq.SI(), eq.MGDA(),
            scaler=scaler,
        )  # fmt: skip
        if owner == "accelerate":
            made = pytest.importorskip("accelerate")
            made.Accelerator(cpu=True)
            optimizer = made.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
        overflows = 0
        for x, target in batches:
            if owner == "step":
                report = step(partial(losses_of, net, x, target))
                continue
            optimizer.zero_grad()
            report = step.backward(partial(losses_of, net, x, target))
            if owner == "accelerate":
                optimizer.step()
                overflows += optimizer.step_was_skipped
                continue
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert 0 < report.skipped < 6
        assert owner != "accelerate" or overflows == report.skipped
        skipped.append(report.skipped)
        ends.append(vector(net))
        scales.append(scaler.get_scale())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-6, atol=1e-7)
    assert scales[0] == scales[1] == scales[2] < 2.0**22
    assert skipped[0] == skipped[1] == skipped[2]


def test_adapters_are_shared_and_what_is_frozen_stays() -> None:
    found = example("peft_lora.py", "peft")
    torch.manual_seed(0)
    net = found["TwoTasks"]()
    trained = [p for p in net.parameters() if p.requires_grad]
    step = eq.Step(
        net, ["topic", "score"], torch.optim.SGD(trained, lr=0.5), aggregator=eq.UPGrad()
    )
    ids = torch.randint(0, 32, (16, 8))
    state = [{name: p.clone() for name, p in net.named_parameters()}]
    for _ in range(2):  # LoRA's B is zero at first, so that A has no gradient in the first step
        report = step(partial(net, ids, ids[:, 0] % 4, ids.float().mean(1)))
        state.append({name: p.clone() for name, p in net.named_parameters()})
    assert report.gram is not None
    moved = [
        {name for name in after if not torch.equal(before[name], after[name])}
        for before, after in pairwise(state)
    ]
    assert moved[1] == {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in moved[0] if "bert" in name} == {"lora_B"}
