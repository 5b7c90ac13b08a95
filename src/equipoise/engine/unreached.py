"""Shared parameters that no loss reaches would stay put in silence; they are looked for once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from equipoise.errors import EquipoiseError

WHY = (
    "were the features detached, or computed under torch.no_grad, inference_mode or reentrant "
    "checkpointing (give it use_reentrant=False)? Freeze what is not to be trained with "
    "requires_grad_(False)."
)


def refuse_unreached(
    given: Iterable[Tensor] | None, reached: Mapping[Tensor, int], n_tasks: int
) -> None:
    """Refuse `shared` of which nothing gets a gradient, once each task had a loss.

    Args:
        given: what the user said is shared; None: not said.
        reached: parameter -> bits of the tasks that have reached it.
        n_tasks: T.

    Raises:
        EquipoiseError: no trainable parameter of it was reached.
    """
    trainable = [p for p in given or () if p.requires_grad]
    if not trainable or any(p in reached for p in trainable):
        return
    seen = 0
    for mask in reached.values():
        seen |= mask
    if seen.bit_count() == n_tasks:
        raise EquipoiseError(f"no loss reaches any parameter of what is shared; {WHY}")
