"""The three stages of training, and everything that follows from which one it is.

DeepSeek-V3.2-Exp is made from a dense checkpoint in two stages of continued pre-training: a dense
warm-up that teaches only the indexer, then sparse training of everything. A run names its `Stage`;
attention mode, losses, trainable parameters, optimizer branches and the published hyper-parameters
all derive from it, so that no two flags can contradict each other.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


class Group(enum.Enum):
    """Which of the three learning rules a parameter follows."""

    MAIN = "main"
    """Everything that the language-model loss trains."""
    INDEXER = "indexer"
    """The lightning indexers: trained by the KL loss alone."""
    BALANCE = "balance"
    """The routers' correction biases: moved by the sign of the load error, never by a gradient."""


@dataclass(frozen=True)
class StageDefaults:
    """Hyper-parameters that a stage falls back on where the config says None.

    Attributes:
        learning_rate: peak rate of both branches.
        steps: optimizer steps.
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        schedule: shape of the learning rate after its linear start.
        warmup_fraction: share of the steps that the linear start takes.
        bias_update_speed: step of the routers' correction biases.
    """

    learning_rate: float
    steps: int
    batch_size: int
    sequence_length: int
    schedule: Literal["constant", "cosine"]
    warmup_fraction: float
    bias_update_speed: float


@dataclass(frozen=True)
class _Rules:
    attention: Literal["dense", "sparse"]
    indexer_loss: Literal["dense", "sparse"] | None
    lm_loss: bool
    trainable: tuple[Group, ...]
    defaults: StageDefaults


class Stage(enum.Enum):
    """Dense pre-training (or a dense control), indexer warm-up, or sparse training."""

    DENSE = "dense"
    WARMUP = "warmup"
    SPARSE = "sparse"

    @property
    def attention(self) -> Literal["dense", "sparse"]:
        """How the main model attends; warm-up's forward is the dense forward, bit for bit."""
        return _RULES[self].attention

    @property
    def indexer_loss(self) -> Literal["dense", "sparse"] | None:
        """Which KL trains the indexer: over all visible keys, over the selected ones, or none."""
        return _RULES[self].indexer_loss

    @property
    def lm_loss(self) -> bool:
        """Whether next-token cross-entropy is computed (warm-up does no head work at all)."""
        return _RULES[self].lm_loss

    @property
    def trainable(self) -> tuple[Group, ...]:
        """The groups that gradients reach and that own optimizer state."""
        return _RULES[self].trainable

    @property
    def balances_experts(self) -> bool:
        """Whether the routers' correction biases move: only where the router itself learns."""
        return Group.MAIN in self.trainable

    @property
    def needs_indexer(self) -> bool:
        """Whether the model must have indexers."""
        return Group.INDEXER in self.trainable

    @property
    def defaults(self) -> StageDefaults:
        """What the config's None fields become."""
        return _RULES[self].defaults


_RULES = {
    # DeepSeek-V3's pre-training: 14.8 T tokens of 4K sequences at a peak of 2.2e-4.
    Stage.DENSE: _Rules(
        attention="dense",
        indexer_loss=None,
        lm_loss=True,
        trainable=(Group.MAIN,),
        defaults=StageDefaults(
            learning_rate=2.2e-4,
            steps=235_000,
            batch_size=15_360,
            sequence_length=4_096,
            schedule="cosine",
            warmup_fraction=0.01,
            bias_update_speed=1e-3,
        ),
    ),
    # The report's dense warm-up: 1000 steps of 16 sequences of 128K tokens, 2.1 B in all.
    Stage.WARMUP: _Rules(
        attention="dense",
        indexer_loss="dense",
        lm_loss=False,
        trainable=(Group.INDEXER,),
        defaults=StageDefaults(
            learning_rate=1e-3,
            steps=1_000,
            batch_size=16,
            sequence_length=131_072,
            schedule="cosine",
            warmup_fraction=0.03,
            bias_update_speed=0.0,
        ),
    ),
    # The report's sparse training: 15000 steps of 480 sequences of 128K tokens, 943.7 B in all.
    Stage.SPARSE: _Rules(
        attention="sparse",
        indexer_loss="sparse",
        lm_loss=True,
        trainable=(Group.MAIN, Group.INDEXER),
        defaults=StageDefaults(
            learning_rate=7.3e-6,
            steps=15_000,
            batch_size=480,
            sequence_length=131_072,
            schedule="constant",
            warmup_fraction=0.01,
            bias_update_speed=1e-3,
        ),
    ),
}


def group_of(path: str) -> Group:
    """The group of one parameter, by the attribute names on its path.

    Args:
        path: attribute names joined by `/`, as `stacks/0/blocks/0/self_attn/indexer/wq_b/weight`.
    """
    names = path.split("/")
    if any("correction_bias" in name for name in names):
        return Group.BALANCE
    return Group.INDEXER if "indexer" in names else Group.MAIN


def split[T](params: Mapping[str, T], groups: Sequence[Group]) -> tuple[dict[str, T], dict[str, T]]:
    """Splits parameters into those of `groups` and the rest; `{**a, **b}` joins them again.

    Differentiating the first half alone is what keeps warm-up small: the frozen 99.87 % of the
    model gets neither a gradient nor optimizer state.
    """
    chosen = {path: leaf for path, leaf in params.items() if group_of(path) in groups}
    return chosen, {path: leaf for path, leaf in params.items() if path not in chosen}
