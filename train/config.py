"""What a run is: one frozen dataclass, every field of it on the command line with a reason.

Published numbers are the stages' defaults (`train.stages`): a field that is None takes the value
of its stage. What the reports leave open is a field here, and its text says why it has its value.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsa_jax import presets
from dsa_jax.config import ModelConfig
from dsa_jax.sharding import MeshConfig, Rules
from dsa_jax.transformer import REMAT_POLICIES
from train.launch import ClusterConfig
from train.stages import Group, Stage


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are packed."""

    # Files or globs. `.jsonl` (one document a line), `.npy` or `.bin` (token ids), any other
    # ending is UTF-8 text (one document a file, unless `separator` says otherwise).
    sources: tuple[str, ...] = ()
    # `bytes`, or the path of a `tokenizer.json`. Unused for token files.
    tokenizer: str = "bytes"
    # The field of a JSONL line that holds the document.
    text_field: str = "text"
    # Splits a text file into documents, for example a blank line. None: one document a file.
    separator: str | None = None
    # Token id that ends a document in `.npy` and `.bin` files. None: one document a file.
    document_end: int | None = None
    # Begin each document of text with the tokenizer's BOS.
    mark_start: bool = True
    # End each document of text with the tokenizer's EOS.
    mark_end: bool = True
    # Integer type of `.bin` files, which carry no header.
    bin_dtype: Literal["uint16", "uint32", "int32"] = "uint16"
    # Permute the packed rows of every epoch, by `seed`. The order does not depend on the number
    # of processes.
    shuffle: bool = True
    # Folder for the tokenised text. None: `tokens` in the run's folder.
    token_cache: Path | None = None
    # Threads that read and pack rows ahead of the step.
    threads: int = 2
    # Batches held ready.
    prefetch: int = 4


@dataclass(frozen=True)
class BranchConfig:
    """One optimizer branch: the main model or the indexers. Their gradients are disjoint, and so
    are their clips: under one shared clip a large KL gradient would shrink the main update."""

    # Peak rate. None: the stage's (the report gives one rate for both branches).
    learning_rate: float | None = None
    # AdamW's decay, as in DeepSeek-V3. Norms, biases and the indexer's head weights have none:
    # decay would pull a scale towards 0.
    weight_decay: float = 0.1
    # Limit of this branch's global gradient norm, as in DeepSeek-V3; the report is silent.
    clip: float = 1.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for both branches. The report does not name the optimizer: these are DeepSeek-V3's."""

    # The language model: learns from cross-entropy only.
    main: BranchConfig = field(default_factory=BranchConfig)
    # The lightning indexers: learn from the KL only.
    indexer: BranchConfig = field(default_factory=BranchConfig)
    # DeepSeek-V3's.
    beta1: float = 0.9
    # DeepSeek-V3's.
    beta2: float = 0.95
    # Adam's usual; the one place where the size of `kl_coefficient` is felt at all.
    epsilon: float = 1e-8
    # Type of the first moment. DeepSeek-V3 kept bf16 moments, which saves 2 bytes a parameter.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    # After the linear start. None: the stage's. The report says only "a learning rate", which
    # reads as constant; a short warm-up stage ends better when it decays (GLM-5 does so).
    schedule: Literal["constant", "cosine"] | None = None
    # Share of the steps for the linear start. None: the stage's.
    warmup_fraction: float | None = None
    # Where a cosine ends, as a share of the peak.
    final_fraction: float = 0.1


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved. A step holds parameters, optimizer, data position, config and key."""

    # Steps between checkpoints; the last step is always saved. Writing overlaps training.
    interval: int = 100
    # Newest checkpoints kept. An old one goes only after a newer one is whole.
    keep: int = 3
    # Seconds that a process waits for the others to write their parts before the run ends.
    timeout: int = 1200


@dataclass(frozen=True)
class LogConfig:
    """What is written while the run runs. `metrics.jsonl` is always written."""

    # Steps between metric records.
    interval: int = 1
    # Also write TensorBoard events (needs the `tensorboard` extra).
    tensorboard: bool = False
    # First step of a profile, written by process 0 into `profile` in the run's folder, for
    # TensorBoard, XProf or Perfetto. None: no profile. The first step of a run compiles.
    profile_start: int | None = None
    # Steps that the profile holds.
    profile_steps: int = 3


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    # `dense`: pre-training or a dense control. `warmup`: dense attention, only the indexer
    # learns. `sparse`: everything learns under the indexer's selection.
    stage: Stage = Stage.WARMUP
    # The run's folder: checkpoints, metrics, the final model. A run found there is resumed.
    output: Path = Path("runs/train")
    # A run's folder, one of its checkpoints, or an exported model: parameters and data position
    # are taken over, optimizer state is made new. None: random parameters.
    init_from: Path | None = None
    # The architecture.
    model: ModelConfig = field(default_factory=lambda: presets.get("tiny"))
    # Sources, tokenizer, packing.
    data: DataConfig = field(default_factory=DataConfig)
    # AdamW, one branch for the model and one for the indexers.
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Devices along each axis of the mesh.
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # Which of them split what. The defaults are for long sequences on many devices.
    rules: Rules = field(default_factory=Rules)
    # How the processes of a run on several hosts find each other.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # When to save, how many to keep.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Metrics.
    log: LogConfig = field(default_factory=LogConfig)
    # Optimizer steps. None: the stage's published number.
    steps: int | None = None
    # Sequences a step, over all devices. None: the stage's published number.
    batch_size: int | None = None
    # Tokens a sequence. None: the stage's published number.
    sequence_length: int | None = None
    # Parts that a batch is split into, one after the other; the result does not change.
    micro_batches: int = 1
    # Weight of the KL. Its gradient is alone in its branch, so under Adam this scales nothing
    # but epsilon's share and the clip; the report gives no weight. 0, in sparse training: no KL is
    # computed and the indexers stay as they are, a control.
    kl_coefficient: float = 1.0
    # Step of the routers' correction biases. None: 0.001, DeepSeek-V3's, where the router learns
    # and none in warm-up, where it is frozen. The report is silent on sparse training.
    bias_update_speed: float | None = None
    # Tokens of each sequence whose fp32 logits exist at one time.
    loss_chunk: int = 1024
    # Type of the matmuls. Parameters, norms, router, scores, softmax and KL are fp32.
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass recomputes: a key of `dsa_jax.transformer.REMAT_POLICIES`. `full`
    # keeps a layer's input only, which is what 128K tokens ask for; short ones run faster with
    # `none`. Warm-up has no backward pass through the model, so there it changes nothing.
    remat: str = "full"
    # Of the parameters, the grafted indexer and the data order.
    seed: int = 0

    @property
    def indexer_loss(self) -> Literal["dense", "sparse"] | None:
        """Which KL a step computes: the stage's, or none with `kl_coefficient=0`."""
        return self.stage.indexer_loss if self.kl_coefficient else None

    @property
    def trainable(self) -> tuple[Group, ...]:
        """The groups that learn: the stage's, without indexers that no loss reaches."""
        return tuple(g for g in self.stage.trainable if g is not Group.INDEXER or self.indexer_loss)

    def resolved(self) -> TrainConfig:
        """The same run with every None that stands for a stage default filled in.

        Raises:
            ValueError: fields that contradict each other, or the stage.
        """
        defaults = self.stage.defaults
        branch = {
            name: dataclasses.replace(
                getattr(self.optimizer, name),
                learning_rate=_or(
                    getattr(self.optimizer, name).learning_rate, defaults.learning_rate
                ),
            )
            for name in ("main", "indexer")
        }
        optimizer = dataclasses.replace(
            self.optimizer,
            **branch,
            schedule=_or(self.optimizer.schedule, defaults.schedule),
            warmup_fraction=_or(self.optimizer.warmup_fraction, defaults.warmup_fraction),
        )
        config = dataclasses.replace(
            self,
            optimizer=optimizer,
            steps=_or(self.steps, defaults.steps),
            batch_size=_or(self.batch_size, defaults.batch_size),
            sequence_length=_or(self.sequence_length, defaults.sequence_length),
            bias_update_speed=_or(self.bias_update_speed, defaults.bias_update_speed),
        )
        _check(config)
        return config


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check(config: TrainConfig) -> None:
    """The rules between fields. The architecture checks itself."""

    def require(ok: bool, field_name: str, value: object, rule: str) -> None:
        if not ok:
            raise ValueError(f"{field_name}={value!r}: {rule}")

    for name in ("steps", "batch_size", "sequence_length", "micro_batches", "loss_chunk"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "must be at least 1")
    require(
        config.batch_size % config.micro_batches == 0,  # pyright: ignore[reportOptionalOperand]
        "micro_batches",
        config.micro_batches,
        f"must divide batch_size={config.batch_size}",
    )
    longest = config.model.max_position_embeddings
    require(
        (config.sequence_length or 0) <= longest,
        "sequence_length",
        config.sequence_length,
        f"exceeds model.max_position_embeddings={longest}; shorten it or raise that",
    )
    require(
        config.model.has_indexer or not config.stage.needs_indexer,
        "stage",
        config.stage.value,
        "trains indexers, but the model has none (model.index_topk=None): give it index_n_heads, "
        "index_head_dim and index_topk",
    )
    policies = tuple(REMAT_POLICIES)
    require(config.remat in policies, "remat", config.remat, f"is not in {policies}")
    require(
        config.kl_coefficient > 0 or (config.kl_coefficient == 0 and config.stage.lm_loss),
        "kl_coefficient",
        config.kl_coefficient,
        "must be above 0, or in sparse training 0: the indexers then stay as they are",
    )
    require(
        config.stage.balances_experts or config.bias_update_speed == 0,
        "bias_update_speed",
        config.bias_update_speed,
        f"stage={config.stage.value} freezes the routers: their correction biases must not move; "
        "leave it out or pass 0",
    )
    counts = {
        f"checkpoint.{n}": getattr(config.checkpoint, n) for n in ("interval", "keep", "timeout")
    }
    counts |= {f"log.{n}": getattr(config.log, n) for n in ("interval", "profile_steps")}
    counts |= {
        f"cluster.{n}": getattr(config.cluster, n) for n in ("start_timeout", "heartbeat_timeout")
    }
    counts["log.profile_start"] = _or(config.log.profile_start, 1)
    counts["data.prefetch"] = config.data.prefetch
    for name, value in counts.items():
        require(value >= 1, name, value, "must be at least 1")
    require(config.data.threads >= 0, "data.threads", config.data.threads, "must be at least 0")
    require(0 <= config.seed < 2**32, "seed", config.seed, "must lie in [0, 2**32)")
    _check_optimizer(config.optimizer, require)


def _check_optimizer(config: OptimizerConfig, require: Callable[..., None]) -> None:
    """Numbers with which Adam would compute something else, or nothing; NaN passes none of it."""
    for name in ("main", "indexer"):
        branch: BranchConfig = getattr(config, name)
        for rate in ("learning_rate", "weight_decay"):
            value = getattr(branch, rate)
            rule = "must be finite and at least 0"
            require(0 <= value < math.inf, f"optimizer.{name}.{rate}", value, rule)
        rule = "must be above 0; inf does not limit"
        require(branch.clip > 0, f"optimizer.{name}.clip", branch.clip, rule)
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        require(0 <= value < 1, f"optimizer.{name}", value, "must be at least 0 and below 1")
    require(config.epsilon > 0, "optimizer.epsilon", config.epsilon, "must be above 0")
    for name in ("warmup_fraction", "final_fraction"):
        value = getattr(config, name)
        require(0 <= value <= 1, f"optimizer.{name}", value, "a share lies between 0 and 1")


# --- as plain data: saved in every checkpoint, compared on resume --------------------------------

RESUMABLE = (
    *("output", "init_from", "mesh", "rules", "cluster"),
    *("checkpoint", "log", "data.token_cache"),
)
"""Fields that may change between the two halves of an interrupted run: they decide where and how
fast it runs, never what it computes. (`init_from` was used up by the first half.)"""


def to_dict(config: Any) -> Any:
    """A config as JSON-ready data."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, enum.Enum):
        return config.value
    return str(config) if isinstance(config, Path) else config


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple]:
    """The fields in which two configs differ, leaving out those that a resume may change.

    Args:
        saved, current: results of `to_dict`.

    Returns:
        `{dotted field: (saved value, current value)}`.
    """
    a, b = flat_dict(saved), flat_dict(current)
    found = {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}
    return {
        k: v for k, v in found.items() if not any((k + ".").startswith(r + ".") for r in RESUMABLE)
    }


def flat_dict(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A result of `to_dict` with dotted names in place of nesting."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flat_dict(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
