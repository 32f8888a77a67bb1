"""How large the demo is: presets as data.

A preset fixes everything a run of the demo computes, but for the seed.
"""

from __future__ import annotations

import dataclasses

from dsa_jax import presets
from dsa_jax.config import ModelConfig
from train.config import BranchConfig, OptimizerConfig, TrainConfig
from train.cost import LayerShape
from train.lessons import Lesson
from train.needles import Grid
from train.stages import Stage


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage's length and rates.

    Attributes:
        steps: optimizer steps.
        rate: peak learning rate of the main model; unused in warm-up.
        indexer_rate: peak learning rate of the indexers; unused in dense stages.
        final_fraction: where the cosine ends, as a share of the peak.
    """

    steps: int
    rate: float
    indexer_rate: float
    final_fraction: float = 0.1

    def apply(self, config: TrainConfig, stage: Stage) -> TrainConfig:
        """`config` as this stage."""
        optimizer = OptimizerConfig(
            main=BranchConfig(learning_rate=self.rate),
            indexer=BranchConfig(learning_rate=self.indexer_rate, weight_decay=0.0),
            schedule="cosine",
            warmup_fraction=0.05,
            final_fraction=self.final_fraction,
        )
        return dataclasses.replace(config, stage=stage, steps=self.steps, optimizer=optimizer)

    def rates(self, stage: Stage) -> str:
        """The rates that the stage uses, for people."""
        parts = []
        if stage.lm_loss:
            parts.append(f"main {self.rate:g}")
        if stage.needs_indexer:
            parts.append(f"indexer {self.indexer_rate:g}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of the demo.

    Attributes:
        model: with its indexer; the dense stage trains it without.
        length: T, tokens a row in training and on the ladder.
        long_length: tokens a row on the second ladder.
        batch_size: rows a step.
        compute_dtype: of the matmuls.
        dense: pre-training.
        warmup: of the indexers.
        sparse: training under the indexers' selection; the dense control takes the same steps at
            the same main rate.
        scored_rows: held-out rows of `length`, and half as many of `long_length`.
        score_batch: rows a forward pass in evaluation.
        sweep: other k at evaluation.
        local: width of the window of latest keys in the recency metric.
        sink: number of first keys.
        buckets: edges of the buckets of position, up to `long_length`.
        cost_shape: of the layer that is timed.
        cost_positions: cached keys at which it is timed.
        cost_sequences: how many decode at once when it is timed.
        lessons: what the training rows are made of, in its order, planned over the dense stage;
            empty: the books themselves, shuffled.
        needles: what is asked of every model; None: rows hold no needles.
        sample_length: bytes of the row whose second half the model writes; None: `length`.
        picture_length: tokens of the row whose selection is drawn; None: `length`.
        remat: what the backward pass recomputes.
        compile_ahead: compile all programs side by side, the later stages' while the first one
            trains: for a machine with more cores than the device keeps busy.
        examiners: have the models evaluated by processes of their own, see `train.examiners`.
        quick_compiles: leave out most of the compiler's optimizations: for a run whose programs
            take longer to compile than to run.
    """

    model: ModelConfig
    length: int
    long_length: int
    batch_size: int
    compute_dtype: str
    dense: StagePlan
    warmup: StagePlan
    sparse: StagePlan
    scored_rows: int
    score_batch: int
    sweep: tuple[int, ...]
    local: int
    sink: int
    buckets: tuple[int, ...]
    cost_shape: LayerShape
    cost_positions: tuple[int, ...]
    cost_sequences: int = 4
    lessons: tuple[Lesson, ...] = ()
    needles: Grid | None = None
    sample_length: int | None = None
    picture_length: int | None = None
    remat: str = "none"
    compile_ahead: bool = False
    examiners: bool = False
    quick_compiles: bool = False

    @property
    def rows(self) -> int:
        """Rows that the stages read one after another."""
        return self.batch_size * (self.dense.steps + self.warmup.steps + self.sparse.steps)

    @property
    def held_out_lengths(self) -> tuple[int, ...]:
        """Lengths of the held-out rows that the demo reads."""
        others = (self.long_length, self.sample_length, self.picture_length)
        return tuple(sorted({self.length, *(n for n in others if n is not None)}))


# The published 0.02 suits a width of 7168; matrices of width 128 want a spread near 128^-1/2.
_INIT = 0.06
# 1/8 of the published layer's heads and indexer heads: the same 17 operations of dense attention
# for each of the indexer, and so the same shape of the curve.
_SMALL_LAYER = LayerShape(heads=16, indexer_heads=8, topk=512)


def _cpu() -> Preset:
    return Preset(
        model=presets.get("demo").replace(initializer_range=_INIT),
        length=256,
        long_length=512,
        batch_size=8,
        compute_dtype="float32",
        dense=StagePlan(2000, rate=4e-3, indexer_rate=0.0, final_fraction=0.05),
        warmup=StagePlan(200, rate=0.0, indexer_rate=5e-3),
        sparse=StagePlan(300, rate=1e-3, indexer_rate=1e-3),
        scored_rows=128,
        score_batch=16,
        sweep=(8, 32, 64),
        local=32,
        sink=4,
        buckets=(16, 64, 128, 192, 256, 320, 384, 448, 512),
        cost_shape=_SMALL_LAYER,
        cost_positions=tuple(128 * 2**n for n in range(8)),
    )


def _smoke() -> Preset:
    model = presets.get("demo").replace(
        initializer_range=_INIT,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe_intermediate_size=32,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
    )
    return Preset(
        model=model,
        length=64,
        long_length=128,
        batch_size=16,
        compute_dtype="float32",
        dense=StagePlan(150, rate=5e-3, indexer_rate=0.0),
        warmup=StagePlan(60, rate=0.0, indexer_rate=1e-2),
        sparse=StagePlan(60, rate=2e-3, indexer_rate=2e-3),
        scored_rows=32,
        score_batch=32,
        sweep=(),
        local=16,
        sink=4,
        buckets=(8, 16, 32, 64, 96, 128),
        cost_shape=LayerShape(heads=16, indexer_heads=8, topk=128),
        cost_positions=(64, 1024),
        quick_compiles=True,
    )


# What makes the model look things up. With rows of text from the first step on it never does.
_LESSONS = (
    Lesson("loop", 128, 0.0, 0.15),
    Lesson("echo", 128, 0.075, 0.25),
    Lesson("drill", 128, 0.15, 0.35),
    Lesson("text", 256, 0.225, 0.55, spacing=32),
    Lesson("text", 512, 0.26, 0.6, spacing=32),
    Lesson("text", 1024, 0.34, 1.0, weight=0.5),
    Lesson("text", 2048, 0.41, 1.0, weight=0.5),
    Lesson("text", 4096, 0.45, 1.0),
    Lesson("text", 8192, 0.5, 1.0, weight=2.0),
)


def _gpu() -> Preset:
    """For one Hopper GPU. Widths are those that the kernels serve."""
    model = presets.get("demo").replace(
        initializer_range=0.05,  # near 384^-1/2
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        first_k_dense_replace=0,  # one kind of layer: half the program to compile
        num_attention_heads=8,
        q_lora_rank=128,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=256,
        max_position_embeddings=16_384,
        rope_theta=1000.0,  # no phase at 8192 that short documents have not seen
    )
    return Preset(
        model=model,
        length=8192,
        long_length=16_384,
        batch_size=1,  # looking up is learnt in steps more than in tokens
        compute_dtype="bfloat16",
        dense=StagePlan(3200, rate=1e-3, indexer_rate=0.0, final_fraction=0.1),
        warmup=StagePlan(400, rate=0.0, indexer_rate=2e-3),
        sparse=StagePlan(300, rate=3e-4, indexer_rate=1e-3),
        scored_rows=8,
        score_batch=2,
        sweep=(64,),
        local=512,
        sink=4,
        buckets=(256, 1024, 2048, 4096, 8192, 12_288, 16_384),
        cost_shape=LayerShape(),
        cost_positions=(1024, 16_384, 131_072),
        cost_sequences=16,
        lessons=_LESSONS,
        needles=Grid((1024, 2048, 4096, 8192, 16_384), (0.1, 0.3, 0.5, 0.7, 0.9), 40, 4),
        sample_length=512,
        picture_length=1024,
        compile_ahead=True,
        examiners=True,
    )


PRESETS = {"cpu": _cpu, "smoke": _smoke, "gpu": _gpu}
