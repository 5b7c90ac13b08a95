"""How often does the latent rule lie? Accepted steps looked at afterwards in the parameters.

    python -m experiments.line_search.truth --data-root DIR [--epochs 4] [--json FILE]

LeNet on MultiMNIST in the thesis' geometry. After each accepted step the losses of the same batch
are evaluated again with the new parameters (LeNet has no BatchNorm and no dropout, so nothing else
differs). Of every form of the search, for several upper bounds of the step:

- rises: accepted steps after which some task's loss is higher than before;
- lies: accepted steps after which some task's loss is above what the rule has promised,
  L_t - eta beta slope_t;
- kept: decrease of the summed loss in the parameters over the decrease that the search saw, median
  and quartiles; 1 is the truth, below 0 a rise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from equipoise.lab import data as datasets
from equipoise.lab.config import RunConfig, environment
from equipoise.lab.data import Data
from equipoise.lab.files import write_text
from equipoise.lab.runs import Run, epoch_seed, seeded
from experiments.common import table
from experiments.line_search.run import SETS

FORMS = {
    "BLS": "bls({})+mgda",
    "literal": "fbls({})+mgda",
    "literal, head rule": "fbls(rule=head, {})+mgda",
    "literal, latent rule": "fbls(rule=latent, {})+mgda",
    "batch": "fbls(latent_scale=batch, {})+mgda",
    "matched": "fbls(latent_scale=matched, {})+mgda",
    "verified": "fbls(verify=true, {})+mgda",
}
UPPER = (1.0, 10.0)


@torch.no_grad()
def losses_of(run: Run, inputs: torch.Tensor, targets: dict) -> torch.Tensor:
    """(T,) the losses of a batch with the parameters as they are."""
    outputs = run.model(inputs)
    values = [task.loss(outputs[task.name], targets[task.name]) for task in run.data.tasks]
    return torch.stack(values).double()


def watch(recipe: str, data: Data, root: str, epochs: int) -> dict[str, float]:
    """Train, and look at every accepted step again."""
    config = RunConfig.of(recipe=recipe, data_root=root, **{**SETS["multimnist"], "epochs": epochs})
    rises, lies, kept, sizes = [], [], [], []
    steps = trials = failed = 0
    with seeded(config):
        run = Run(config, data)
        search = run.step.line_search
        assert search is not None
        run.model.train()
        for epoch in range(1, epochs + 1):
            for inputs, targets in run.batches(data.train, epoch_seed(0, epoch)):
                report = run.step(inputs, targets)
                steps += 1
                trials += report.trials
                if not report.accepted:
                    continue
                after = losses_of(run, inputs, targets)
                sizes.append(report.step_size)
                failed += report.verified is False
                assert report.slopes is not None and report.trial_losses is not None
                bound = report.losses - report.step_size * search.beta * report.slopes
                slack = 1e-6 * report.losses.abs()  # what float32 leaves of a second evaluation
                rises.append(bool((after > report.losses + slack).any()))
                lies.append(bool((after > bound + slack).any()))
                seen = float((report.losses - report.trial_losses).sum())
                if seen > 0:
                    kept.append(float((report.losses - after).sum()) / seen)
        final = run.measure(data.val)[1]
    low, middle, high = np.percentile(kept, (25, 50, 75))
    first = [next(iter(values.values())) for values in final.values()]
    return {
        "steps": steps,
        "accepted": len(rises) / steps,
        "rises": float(np.mean(rises)),
        "lies": float(np.mean(lies)),
        "kept": float(middle),
        "kept low": float(low),
        "kept high": float(high),
        "step size": float(np.median(sizes)),
        "trials": trials / steps,
        "not verified": failed / steps,
        "accuracy": float(np.mean(first)),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", required=True, help="the folder with MNIST")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    data = datasets.load(SETS["multimnist"]["data"], arguments.data_root)
    rows = []
    for upper in UPPER:
        for form, text in FORMS.items():
            recipe = text.format(f"upper={upper}")
            rows.append(
                {
                    "form": form,
                    "upper": upper,
                    **watch(recipe, data, arguments.data_root, arguments.epochs),
                }
            )
            print({k: v if isinstance(v, str) else round(v, 4) for k, v in rows[-1].items()})
    percent = ("accepted", "rises", "lies", "not verified", "accuracy")
    cells = [
        [
            row["upper"],
            row["form"],
            *(f"{100 * row[key]:.1f}" for key in percent),
            f"{row['kept']:.2f} [{row['kept low']:.2f}, {row['kept high']:.2f}]",
            f"{row['step size']:.3g}",
            f"{row['trials']:.2f}",
        ]
        for row in rows
    ]
    head = ["upper bound", "form", "accepted (%)", "rises (%)", "lies (%)", "not verified (%)",
            "accuracy (%)", "kept [quartiles]", "step size", "trials"]  # fmt: skip
    text = table(head, cells)
    print(text)
    if arguments.json:
        content = {
            "environment": environment(torch.device("cpu")),
            "rows": rows,
            "tables": {"truth": text.splitlines()},
        }
        write_text(arguments.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
