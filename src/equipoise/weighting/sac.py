"""Soft Actor-Critic as a function of transitions: stable-baselines3's, without an environment."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.errors import MissingExtraError

COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
"""The arrays of stable-baselines3's replay buffer."""


def require_stable_baselines3(user: str) -> None:
    """Look for the extra.

    Raises:
        MissingExtraError: it is not installed; says how to install it.
    """
    try:
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(user, "stable-baselines3", "rl") from error


@contextmanager
def lent(generator: torch.Generator) -> Generator[None]:
    """The global generators draw what `generator` says; afterwards they are as they were.

    stable-baselines3 samples its replay buffer from numpy's global generator and its actions from
    torch's. The CPU's generator is lent only: nothing here runs on another device.
    """
    seed = int(torch.randint(2**32, (), generator=generator, device="cpu"))
    theirs = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(theirs[0])
        np.random.set_state(theirs[1])
        random.setstate(theirs[2])


class Agent:
    """An actor, two critics with targets, a learned temperature, and a ring of transitions.

    States are vectors (T,), actions vectors (T,) in [-1, 1]; an episode never ends. Everything is
    float32 and on the CPU, whatever torch's defaults are.

    Args:
        n_tasks: T.
        generator: what the initial networks are drawn from.
        buffer_size: the most transitions kept; the oldest are overwritten.
        lr: learning rate of Adam for actor, critics and temperature.
        width: of the two hidden layers of each network.
        discount: gamma.
        tau: share of the critics that their targets take over in each gradient step.
        temperature: initial value of what weighs the entropy.
        target_entropy: what the temperature is learned for.

    Attributes:
        journal: while it is a list, how to take back what is done is noted in it.
    """

    def __init__(
        self,
        n_tasks: int,
        generator: torch.Generator,
        *,
        buffer_size: int,
        lr: float,
        width: int,
        discount: float,
        tau: float,
        temperature: float,
        target_entropy: float,
    ) -> None:
        from gymnasium import Env, spaces
        from stable_baselines3 import SAC
        from stable_baselines3.common.logger import Logger

        shapes: Env = Env()  # there is nothing to reset and nothing to step
        shapes.observation_space = spaces.Box(-np.inf, np.inf, (n_tasks,), np.float32)
        shapes.action_space = spaces.Box(-1.0, 1.0, (n_tasks,), np.float32)
        with lent(generator), torch.device("cpu"), _single_precision():
            self.sac = SAC(
                "MlpPolicy",
                shapes,
                learning_rate=lr,
                buffer_size=buffer_size,
                tau=tau,
                gamma=discount,
                ent_coef=f"auto_{temperature!r}",
                target_entropy=target_entropy,
                policy_kwargs={
                    "net_arch": [width, width],
                    "optimizer_kwargs": {"fused": True},  # a sixth faster on the CPU
                },
                device="cpu",
            )
        self.sac.set_logger(Logger(None, []))  # `train` wants one
        self.journal: list[Callable[[], None]] | None = None

    @property
    def buffer(self) -> Any:
        """The ring of transitions."""
        return self.sac.replay_buffer

    def store(
        self,
        before: NDArray[Any],
        action: NDArray[Any],
        reward: float,
        after: NDArray[Any],
    ) -> None:
        """Keep a transition: states (T,) before and after, the action (T,) between, its reward."""
        buffer = self.buffer
        if self.journal is not None:
            row = {name: getattr(buffer, name)[buffer.pos].copy() for name in COLUMNS}
            self.journal.append(partial(self._put_back, row, buffer.pos, buffer.full))
        buffer.add(before, after, action, np.array([reward]), np.zeros(1), [{}])

    def _put_back(self, row: dict[str, NDArray[Any]], position: int, full: bool) -> None:
        for name, value in row.items():
            getattr(self.buffer, name)[position] = value
        self.buffer.pos, self.buffer.full = position, full

    def learn(self, gradient_steps: int, batch_size: int, generator: torch.Generator) -> None:
        """So many gradient steps, each on so many transitions, drawn with replacement."""
        if self.journal is not None:
            self.journal.append(partial(self._load_networks, deepcopy(self._networks())))
        with lent(generator), torch.enable_grad(), _as_on_the_cpu():
            self.sac.train(gradient_steps, batch_size)

    def act(self, state: NDArray[Any], generator: torch.Generator) -> Tensor:
        """A sample (T,) of the policy, float64."""
        with torch.no_grad(), _as_on_the_cpu():
            states = torch.as_tensor(state, dtype=torch.float32, device="cpu")[None]
            mean, log_std, _ = self.sac.actor.get_action_dist_params(states)
        # As the actor samples, but from a generator that need not be lent in every step.
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device="cpu")
        return torch.tanh(mean + log_std.exp() * noise)[0].double()

    def take_back(self) -> None:
        """Undo what the journal has noted."""
        for undo in reversed(self.journal or []):
            undo()

    def _networks(self) -> dict[str, Any]:
        assert self.sac.log_ent_coef is not None
        return {**self.sac.get_parameters(), "log_temperature": self.sac.log_ent_coef.detach()}

    def _load_networks(self, networks: dict[str, Any]) -> None:
        parts = dict(networks)
        with torch.no_grad():
            assert self.sac.log_ent_coef is not None
            self.sac.log_ent_coef.copy_(parts.pop("log_temperature"))
        self.sac.set_parameters(parts, device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """A copy of networks, optimizers, temperature and transitions."""
        buffer = self.buffer
        filled = {n: torch.from_numpy(getattr(buffer, n)[: buffer.size()].copy()) for n in COLUMNS}
        return {
            "networks": deepcopy(self._networks()),
            "transitions": filled,
            "position": buffer.pos,
            "full": buffer.full,
            "buffer_size": buffer.buffer_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it belongs to a buffer of another size, or to another number of tasks.
            RuntimeError: it belongs to networks of another width.
        """
        buffer = self.buffer
        if state["buffer_size"] != buffer.buffer_size:
            raise ValueError(
                f"the state has a buffer_size of {state['buffer_size']}, here it is "
                f"{buffer.buffer_size}."
            )
        self._load_networks(deepcopy(state["networks"]))
        for name, filled in state["transitions"].items():
            getattr(buffer, name)[: len(filled)] = filled.cpu().numpy()
        buffer.pos, buffer.full = state["position"], state["full"]


@contextmanager
def _as_on_the_cpu() -> Generator[None]:
    """Whatever the default device and autocast say."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


@contextmanager
def _single_precision() -> Generator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
