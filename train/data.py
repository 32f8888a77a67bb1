"""Packed rows in a fixed order, whatever the number of processes.

The corpus is one stream of documents. A row is a fixed window of it, with the pieces of documents
it holds numbered in `segment_ids` and counted from 0 in `positions`; the target of a token is the
next token of *its document*, also where that lies in the next row. So every token but a
document's first is a target exactly once an epoch, and nothing is dropped or padded except the end
of the epoch's last row.

Row r of the run is a pure function of (corpus, row length, seed, r): a process reads just its rows
of each batch, a resumed run needs no more than the number of rows done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from train.config import DataConfig
from train.sources import Corpus

Batch = dict[str, Any]
"""`tokens`, `targets` (-1: none), `segment_ids` (0: padding), `positions`; each i32 `[B, T]`."""

NO_TARGET = -1


@dataclass(frozen=True)
class DataPosition:
    """How far the data was read.

    Attributes:
        row: rows consumed since the first step of the first stage.
        row_length: tokens a row.
        files: sizes and hashes of the files they came from, as in `Corpus.files`.
    """

    row: int
    row_length: int
    files: Mapping[str, str]

    def rows_at(self, length: int) -> int:
        """The same position in rows of another length.

        A later stage with longer rows goes on at the same share of the corpus. The shuffle acts on
        rows, so within the current epoch that means the same amount of text, not the same text.
        """
        return -(-self.row * self.row_length // length)

    def check(self, corpus: Corpus) -> None:
        """Refuses to go on in another corpus.

        Raises:
            ValueError: names the files that changed, came or went.
        """
        names = sorted({*self.files, *corpus.files})
        changed = [n for n in names if self.files.get(n) != corpus.files.get(n)]
        if changed:
            told = [f"{n} ({_change(self.files.get(n), corpus.files.get(n))})" for n in changed[:8]]
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            raise ValueError(
                f"data.sources: {', '.join(told)}{more} changed since the checkpoint, so its data "
                "position means nothing: restore the files, or start a new run from an exported "
                "model with init_from"
            )


def _change(before: str | None, now: str | None) -> str:
    """Two entries of a manifest in words."""
    if before is None or now is None:
        return "new" if before is None else "gone"
    old, new = before.split(":")[0], now.split(":")[0]
    return "same size, other content" if old == new else f"{old} bytes before, {new} now"


class Rows:
    """Random access to the packed rows of one epoch, in file order.

    Args:
        corpus: the stream.
        length: T, tokens a row.
    """

    def __init__(self, corpus: Corpus, length: int):
        self.corpus = corpus
        self.length = length

    def __len__(self) -> int:
        return -(-self.corpus.tokens // self.length)

    def __getitem__(self, index: int) -> Batch:
        """One row: `tokens`, `targets`, `segment_ids`, `positions`, each i32 `[T]`."""
        start = int(index) * self.length
        stop = min(start + self.length, self.corpus.tokens)
        ids = self.corpus.read(start, min(stop + 1, self.corpus.tokens))
        place = np.arange(start, stop)
        document = np.searchsorted(self.corpus.ends, place, side="right")
        opens = np.diff(document, prepend=document[0] - 1) > 0
        first = np.maximum.accumulate(np.where(opens, place, 0))
        targets = np.full(len(place), NO_TARGET, np.int32)
        inside = place + 1 < self.corpus.ends[document]
        targets[inside] = ids[1:][inside[: len(ids) - 1]]
        empty = (0, self.length - len(place))
        return {
            "tokens": np.pad(ids[: len(place)], empty),
            "targets": np.pad(targets, empty, constant_values=NO_TARGET),
            "segment_ids": np.pad(np.cumsum(opens).astype(np.int32), empty),
            "positions": np.pad((place - first).astype(np.int32), empty),
        }


def batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    length: int,
    batch_size: int,
    seed: int,
    first_row: int = 0,
    part: slice = slice(None),
) -> Iterator[Batch]:
    """Endless batches from `first_row` on; epochs follow each other, each in its own order.

    Args:
        corpus: the stream.
        config: `shuffle`, `threads`, `prefetch`.
        length: T, tokens a row.
        batch_size: B, rows a step over all processes.
        seed: of the order.
        first_row: rows already consumed.
        part: which rows of a batch this process reads; all, if left out.

    Yields:
        NumPy arrays `[rows of this process, T]`.
    """
    import grain  # here, because a step can be made and timed without reading anything

    rows = grain.MapDataset.source(Rows(corpus, length))
    if config.shuffle:
        rows = rows.shuffle(seed=seed % 2**32)
    endless = rows.repeat()
    mine = range(batch_size)[part]

    def batch(number: int) -> Batch:
        base = first_row + number * batch_size
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(endless[base + i] for i in mine))

    steps = grain.MapDataset.range(2**40).map(batch)
    options = grain.ReadOptions(
        num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, 1)
    )
    return iter(steps.to_iter_dataset(options))


def process_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> slice:
    """The rows of a global batch `shape` that this process's devices hold under `sharding`.

    Raises:
        ValueError: they are not one run of rows.
    """
    held = sorted(
        {
            index[0].indices(shape[0])[:2]
            for index in sharding.addressable_devices_indices_map(shape).values()
            if index is not None
        }
    )
    start, stop = held[0][0], max(end for _, end in held)
    covered = {row for low, high in held for row in range(low, high)}
    if len(covered) != stop - start:
        raise ValueError(
            f"mesh: this process holds the batch rows {held}, which are not adjacent; order the "
            "devices so that each process holds one run of rows"
        )
    return slice(start, stop)


def place(batch: Batch, sharding: jax.sharding.Sharding, batch_size: int) -> Batch:
    """Puts this process's rows on its devices, as global arrays `[B, T]`."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, rows.shape[1]))
        for name, rows in batch.items()
    }
