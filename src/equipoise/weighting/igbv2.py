"""IGBv2: improvable gap balancing by weights that are learned by reinforcement."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from equipoise.errors import NonFiniteError
from equipoise.generators import GeneratorState
from equipoise.replay import copy_of_buffers, put_back
from equipoise.weighting.base import EpochMean, check_steps_per_epoch, softmax_over
from equipoise.weighting.positive import SOLVED
from equipoise.weighting.sac import Agent, require_stable_baselines3
from equipoise.weighting.si import SI

LARGEST = torch.finfo(torch.float32).max


class IGBv2(GeneratorState, SI):
    """Improvable gap balancing, version 2 (Dai et al., arXiv 2307.15429, section 3.2.2, eq. 4).

    The objective is the sum of lambda_i ln L_i; Soft Actor-Critic chooses lambda. Its state is the
    vector of the batch's losses, its action T logits u in the box [-bound, bound]^T, and
    lambda = T softmax(u). The reward of batch t+1 for the weights of batch t is

        lr_0 / lr  min_i (L_i(t) - L_i(t+1)) / L_base,i

    with L_base the mean loss over the second epoch: of the task that gained least, in units of
    what it had reached early, undoing the decay of the learning rate. An episode never ends.

    In each batch: a transition is stored (from the third epoch on), then the agent may learn, then
    weights are chosen. It learns in every 50th batch from epoch 4 on, with floor(50 k / 2) gradient
    steps on floor(256 k / 2) transitions each, where k = 1 + filled share of the buffer. Until
    epoch 6 the weights are random, as in RLW (u standard normal, clipped to the box); from then on
    they are sampled from the policy. Epochs count from 1.

    SAC is that of stable-baselines3 (extra `rl`): with the logits as the action, the policy and the
    density by which it is learned belong to each other. The published code takes the softmax as
    the action and corrects the density as if it were a tanh, which is the density of neither; a
    softmax of T logits has T-1 degrees of freedom, and its density differs.

    Args:
        steps_per_epoch: batches in one epoch.
        n_tasks: number of tasks T.
        generator: a CPU generator for all draws; None: a private one, seeded from torch's global
            generator at construction. The global generators are never moved.
        cap: upper bound of lambda_i / L_i; None: no bound, as published.
        reduction: over tasks in the reward, "min", or "mean" as in the paper's ablation.
        lr_ratio: whether the reward has the factor lr_0 / lr; a Step then says what lr is.
        learn_epoch: the first epoch in which the agent learns, at least 3.
        use_epoch: the first epoch in which its policy is used, at least 3.
        update_every: batches from one learning to the next.
        gradient_steps: nominal number of gradient steps, at a full buffer.
        batch_size: nominal number of transitions in each, at a full buffer.
        buffer_size: the most transitions kept.
        discount: gamma, below 1.
        tau: share of the critics that their targets take over in a gradient step.
        sac_lr: learning rate of the agent; the paper takes 1e-4 with MGDA, PCGrad and Nash-MTL.
        width: of the two hidden layers of each network.
        temperature: initial value of the learned weight of the entropy.
        target_entropy: the entropy that is learned for; None: -T.
        bound: half the side of the box of logits; weights differ by at most exp(2 bound). At 1.6
            an untrained policy, tanh of a normal number, draws logits with a standard deviation of
            about 1, as the published one, which has no box. Smaller ones are calmer, and better
            for as long as the agent has learned little.

    Raises:
        MissingExtraError: stable-baselines3 is not installed.
        ValueError: a parameter out of its range, or at the call the number of losses differs.
        TaskError: at the call, a loss is negative or not finite.

    Passes: one trunk forward and one backward a step. The agent's own work is 25 to 50 gradient
    steps on small networks in every 50th step. State: the networks, their optimizers, up to
    3 T + 2 numbers for each of `buffer_size` transitions, generator and counters.

    An absent task keeps its last loss in the agent's state (1 before there was any); lambda is the
    softmax over the present ones, times their number. The reward is over the tasks that were
    present in both batches and have a base above 1e-12; if there is none, or the learning rate is
    0, the transition is not stored. lr_0 is the first learning rate above 0.
    """

    steps: Tensor
    last_losses: Tensor
    last_present: Tensor
    last_logits: Tensor
    first_lr: Tensor

    def __init__(
        self,
        steps_per_epoch: int,
        n_tasks: int,
        generator: torch.Generator | None = None,
        cap: float | None = None,
        reduction: Literal["min", "mean"] = "min",
        lr_ratio: bool = True,
        learn_epoch: int = 4,
        use_epoch: int = 6,
        update_every: int = 50,
        gradient_steps: int = 50,
        batch_size: int = 256,
        buffer_size: int = 10_000,
        discount: float = 0.99,
        tau: float = 0.005,
        sac_lr: float = 3e-4,
        width: int = 128,
        temperature: float = 0.2,
        target_entropy: float | None = None,
        bound: float = 1.6,
    ) -> None:
        require_stable_baselines3(type(self).__name__)
        super().__init__(generator)
        self._set_cap(cap)
        self.steps_per_epoch = check_steps_per_epoch(steps_per_epoch)
        if reduction not in ("min", "mean"):
            raise ValueError(f"reduction is {reduction!r}; known are 'min' and 'mean'.")
        for name, value, least in (
            ("n_tasks", n_tasks, 1),
            ("learn_epoch", learn_epoch, 3),  # the base is known when the second has ended
            ("use_epoch", use_epoch, 3),
            ("update_every", update_every, 1),
            ("gradient_steps", gradient_steps, 2),  # half of it at the beginning
            ("batch_size", batch_size, 2),
            ("buffer_size", buffer_size, 1),
            ("width", width, 1),
        ):
            if int(value) != value or value < least:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}.")
        for name, value, most in (
            ("tau", tau, 1.0),
            ("sac_lr", sac_lr, math.inf),
            ("temperature", temperature, math.inf),
            ("bound", bound, 40.0),  # weights beyond exp(80) are of no use
        ):
            if not 0 < value <= most:
                most_said = "" if most == math.inf else f" and at most {most:g}"
                raise ValueError(f"{name} is {value}; it must be positive{most_said}.")
        if not 0 <= discount < 1:
            raise ValueError(f"discount is {discount}; it must lie in [0, 1).")
        self.n_tasks = n_tasks
        self.reduction = reduction
        self.lr_ratio = self.needs_lr = lr_ratio
        self.learn_epoch, self.use_epoch, self.update_every = learn_epoch, use_epoch, update_every
        self.gradient_steps, self.batch_size, self.buffer_size = (
            gradient_steps,
            batch_size,
            buffer_size,
        )
        self.discount, self.tau, self.sac_lr, self.width = discount, tau, sac_lr, width
        self.temperature, self.target_entropy, self.bound = temperature, target_entropy, bound
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("last_losses", torch.ones(n_tasks, dtype=torch.float64, device="cpu"))
        self.register_buffer("last_present", torch.zeros(n_tasks, dtype=torch.bool, device="cpu"))
        self.register_buffer("last_logits", torch.zeros(n_tasks, dtype=torch.float64, device="cpu"))
        self.register_buffer(
            "first_lr", torch.full((), torch.nan, dtype=torch.float64, device="cpu")
        )
        self.base = EpochMean()
        self._agent: Agent | None = None  # made when it is first needed

    # ------------------------------------------------------------------ the schedule

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Store, learn, choose."""
        self._check(losses)
        here, values = present.to(self.last_present.device), losses.to(self.last_losses)
        batch = int(self.steps)
        epoch = batch // self.steps_per_epoch + 1
        self.steps += 1
        if epoch == 2:
            self.base.add(values, here)
        state = torch.where(here, values, self.last_losses)
        if epoch > 2:
            self._store(state, here)
        if epoch >= self.learn_epoch and batch % self.update_every == 0:
            self._learn()
        if epoch >= self.use_epoch:
            logits = self.bound * self._ready().act(state.cpu().numpy(), self.generator)
        else:
            draws = torch.randn(
                state.shape, generator=self.generator, dtype=torch.float64, device="cpu"
            )
            logits = draws.clamp(-self.bound, self.bound)
        self.last_losses, self.last_present = state, here.clone()
        self.last_logits = logits.to(state)
        return softmax_over(self.last_logits, here).to(losses.device)

    def _check(self, losses: Tensor) -> None:
        if len(losses) != self.n_tasks:
            raise ValueError(f"IGBv2 was built for n_tasks={self.n_tasks} but got {len(losses)}.")
        for i, loss in enumerate(losses.tolist()):
            # Once in the buffer, in single precision, it would spoil the agent for good.
            if not abs(loss) <= LARGEST:
                raise NonFiniteError(i, f"loss is {loss}. Leave this batch out.")

    def _store(self, state: Tensor, present: Tensor) -> None:
        """The transition from the batch before to this one."""
        reward = self.reward(state, present)
        if reward is not None:
            before, after = self.last_losses.cpu().numpy(), state.cpu().numpy()
            action = (self.last_logits / self.bound).cpu().numpy()
            self._ready().store(before, action, reward, after)

    def reward(self, losses: Tensor, present: Tensor) -> float | None:
        """Of the weights of the batch before, if `losses` (T,) came of them; eq. 4.

        Returns:
            None where nothing tells: no task to compare, no base, a learning rate of 0.
        """
        base = self.base.value()
        counted = self.last_present & present & (base > SOLVED)
        if not bool(counted.any()) or self._ratio is None:
            return None
        gains = ((self.last_losses - losses) / base)[counted]
        return self._ratio * float(gains.min() if self.reduction == "min" else gains.mean())

    def _learn(self) -> None:
        """As often, and on as much, as the share of the buffer that is filled says."""
        agent = self._ready()
        size = agent.buffer.size()
        if size:
            # Whole numbers: in floats 50 * 1.16 / 2 falls below 29.
            filled, whole = self.buffer_size + size, 2 * self.buffer_size
            steps = int(self.gradient_steps * filled // whole)
            batch = int(self.batch_size * filled // whole)
            agent.learn(steps, batch, self.generator)

    def begin(self, lr: float) -> None:
        """Of this learning rate, or of none, is the ratio in the reward."""
        self._lr = lr
        if lr > 0 and bool(self.first_lr.isnan()):
            self.first_lr = torch.full_like(self.first_lr, lr)

    _lr: float | None = None

    @property
    def _ratio(self) -> float | None:
        if not self.lr_ratio or self._lr is None:
            return 1.0
        return float(self.first_lr) / self._lr if self._lr > 0 else None

    # ------------------------------------------------------------------ the agent and its state

    def _ready(self) -> Agent:
        if self._agent is None:
            assert self.n_tasks is not None
            entropy = self.target_entropy
            self._agent = Agent(
                self.n_tasks,
                self.generator,
                buffer_size=self.buffer_size,
                lr=self.sac_lr,
                width=self.width,
                discount=self.discount,
                tau=self.tau,
                temperature=self.temperature,
                target_entropy=-float(self.n_tasks) if entropy is None else entropy,
            )
        return self._agent

    @contextmanager
    def unchanged_on_error(self) -> Generator[None]:
        """Whatever the body raises, this weighting is then as before; see `replay`.

        The agent is not copied for it, since networks change in few steps, and in each step one
        row of the buffer: it notes how to take back what it does.
        """
        buffers, draws, agent = copy_of_buffers(self), self.generator.get_state(), self._agent
        if agent is not None:
            agent.journal = []
        try:
            yield
        except BaseException:
            if agent is not None:
                agent.take_back()
            self._agent = agent
            put_back(buffers)
            self.generator.set_state(draws)
            raise
        finally:
            if agent is not None:
                agent.journal = None

    def get_extra_state(self) -> dict[str, Any]:
        """The generator and the agent, for `state_dict`."""
        agent = None if self._agent is None else self._agent.state_dict()
        return {**super().get_extra_state(), "agent": agent}

    def set_extra_state(self, state: Any) -> None:
        """Restore them from `state_dict`."""
        if state["agent"] is None:
            self._agent = None
        else:
            self._ready().load_state_dict(state["agent"])
        super().set_extra_state(state)
