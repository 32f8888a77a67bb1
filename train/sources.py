"""Files to one long, random-access stream of token ids with document ends.

Text is tokenised once, into a cache that is memory-mapped afterwards; token files are mapped as
they are. Nothing here knows of rows, batches or processes: see `train.data`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsa_jax import tokenizer as tokenizers
from train.config import DataConfig

_CHUNK = 1 << 24  # ids looked at together when a token file is checked


@dataclass(frozen=True)
class Part:
    """The tokens of one file.

    Attributes:
        tokens: `[n]` ids, memory-mapped.
        ends: `[documents]` int64, one past the last token of each document; the last is n.
    """

    tokens: np.ndarray
    ends: np.ndarray


class Corpus:
    """All files one after another: a stream of `tokens` ids in `len(ends)` documents.

    Args:
        parts: the files' tokens, in order.
        files: `{file name: "bytes:hash"}`, the manifest of what was read, to notice on resume that
            data changed.
    """

    def __init__(self, parts: Sequence[Part], files: dict[str, str]):
        self.parts = tuple(parts)
        self.files = files
        self._bases = np.cumsum([0, *(len(part.tokens) for part in parts)])
        self.tokens = int(self._bases[-1])
        self.ends = np.concatenate(
            [part.ends + base for part, base in zip(parts, self._bases[:-1], strict=True)]
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids `start <= i < stop` of the stream, as int32."""
        first = int(np.searchsorted(self._bases, start, side="right")) - 1
        pieces = []
        for part, base in zip(self.parts[first:], self._bases[first:], strict=False):
            if base >= stop:
                break
            pieces.append(part.tokens[max(start - base, 0) : stop - base])
        return np.concatenate(pieces).astype(np.int32)


def open_corpus(config: DataConfig, vocab_size: int, cache: Path) -> Corpus:
    """Opens every source of a run.

    Args:
        config: `sources`, `tokenizer` and how documents are told apart.
        vocab_size: ids must be below it.
        cache: folder for tokenised text; a file is tokenised again only if it changed.

    Raises:
        FileNotFoundError: a source that matches nothing.
        ValueError: an empty, binary or malformed file, or an id outside the vocabulary.
    """
    paths = _expand(config.sources)
    text = [path for path in paths if path.suffix not in (".npy", ".bin")]
    reader = _TextReader(config, vocab_size, cache) if text else None
    parts, files = [], {}
    for path in paths:
        if path.stat().st_size == 0:
            raise ValueError(f"data.sources: {path} is empty; remove it from the sources")
        digest = _digest(path)
        if reader is not None and path in text:
            parts.append(reader.part(path, digest))
        else:
            parts.append(_token_file(path, config, vocab_size))
        files[path.name if path.name not in files else str(path)] = (
            f"{path.stat().st_size}:{digest}"
        )
    return Corpus(parts, files)


def _expand(sources: Sequence[str]) -> list[Path]:
    if not sources:
        raise ValueError(
            "data.sources is empty: name at least one file or glob, for example "
            "--data.sources 'texts/*.txt'"
        )
    paths: list[Path] = []
    for source in sources:
        found = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not found:
            raise FileNotFoundError(
                f"data.sources: {source!r} is no file and matches none (from {os.getcwd()})"
            )
        for path in map(Path, found):
            if path.is_dir():
                raise ValueError(
                    f"data.sources: {path} is a folder; name its files, for example '{path}/*.txt'"
                )
            paths.append(path)
    return paths


def _digest(path: Path) -> str:
    """A fingerprint of a file: its size and up to 64 evenly spaced blocks of 64 KiB.

    A file of up to 4 MiB is read whole; a terabyte costs no more.
    """
    size, block, count = path.stat().st_size, 1 << 16, 64
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(count):
            offset = i * block if size <= block * count else i * (size - block) // (count - 1)
            file.seek(offset)
            sha.update(file.read(block))
    return sha.hexdigest()[:32]


# --- token files ---------------------------------------------------------------------------------


def _token_file(path: Path, config: DataConfig, vocab_size: int) -> Part:
    tokens = _open_tokens(path, config)
    ends = []
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            where = start + int(np.argmax(chunk == bad))
            raise ValueError(
                f"data.sources: {path} holds token id {bad} at {where}, outside 0 <= id < "
                f"vocab_size={vocab_size}: it was made with another tokenizer"
                + (f", or data.bin_dtype={config.bin_dtype!r} is wrong" * (path.suffix == ".bin"))
            )
        if config.document_end is not None:
            ends.append(start + 1 + np.flatnonzero(chunk == config.document_end))
    ends.append(np.array([len(tokens)]))
    return Part(tokens, np.unique(np.concatenate(ends)).astype(np.int64))


def _open_tokens(path: Path, config: DataConfig) -> np.ndarray:
    if path.suffix == ".bin":
        width = np.dtype(config.bin_dtype).itemsize
        if path.stat().st_size % width:
            raise ValueError(
                f"data.sources: {path} has {path.stat().st_size} bytes, no multiple of {width}: "
                f"it is truncated, or data.bin_dtype={config.bin_dtype!r} is wrong"
            )
        return np.memmap(path, dtype=config.bin_dtype, mode="r")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"data.sources: {path} is not a whole .npy file: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) == 0:
        raise ValueError(
            f"data.sources: {path} holds {tokens.dtype}{list(tokens.shape)}; a token file is one "
            "non-empty row of integers"
        )
    return tokens


# --- text ----------------------------------------------------------------------------------------


class _TextReader:
    """Tokenises text files into `cache/<key>/{tokens.bin,ends.npy}`."""

    def __init__(self, config: DataConfig, vocab_size: int, cache: Path):
        self.config = config
        self.cache = cache
        self.tokenizer = tokenizers.load(config.tokenizer)
        if self.tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"data.tokenizer={config.tokenizer!r} has ids up to "
                f"{self.tokenizer.vocab_size - 1}, the model's vocab_size is {vocab_size}: use the "
                f"model's tokenizer, or a model with vocab_size >= {self.tokenizer.vocab_size}"
            )
        self.dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
        name = Path(config.tokenizer)
        name = name / "tokenizer.json" if name.is_dir() else name
        self._identity = config.tokenizer if config.tokenizer == "bytes" else _digest(name)

    def part(self, path: Path, digest: str) -> Part:
        config = self.config
        how = [1, digest, path.suffix, self._identity, config.text_field, config.separator]
        how += [config.mark_start, config.mark_end]
        folder = self.cache / hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
        if not folder.exists():
            self._tokenise(path, folder)
        tokens = np.memmap(folder / "tokens.bin", dtype=self.dtype, mode="r")
        return Part(tokens, np.load(folder / "ends.npy"))

    def _tokenise(self, path: Path, folder: Path) -> None:
        """Writes beside the target and renames, so that a kill leaves no half-made cache."""
        draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
        draft.mkdir(parents=True, exist_ok=True)
        try:
            ends, total = [], 0
            with (draft / "tokens.bin").open("wb") as out:
                for text in self._documents(path):
                    ids = np.asarray(self._marked(text), dtype=self.dtype)
                    out.write(ids.tobytes())
                    total += len(ids)
                    ends.append(total)
            if not ends:
                raise ValueError(f"data.sources: {path} holds no text, only blanks")
            np.save(draft / "ends.npy", np.asarray(ends, np.int64))
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _marked(self, text: str) -> list[int]:
        start = [self.tokenizer.bos] if self.config.mark_start else []
        end = [self.tokenizer.eos] if self.config.mark_end else []
        return [*start, *self.tokenizer.encode(text), *end]

    def _documents(self, path: Path) -> Iterator[str]:
        if path.suffix == ".jsonl":
            documents = self._json_lines(path)
        else:
            text = _decode(path, path.read_bytes())
            separator = self.config.separator
            documents = iter(text.split(separator) if separator else [text])
        return (document for document in documents if document.strip())

    def _json_lines(self, path: Path) -> Iterator[str]:
        field = self.config.text_field
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(_decode(path, line, file.tell() - len(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"data.sources: {path}:{number} is no JSON: {error}") from None
                text = record.get(field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    has = sorted(record) if isinstance(record, dict) else type(record).__name__
                    raise ValueError(
                        f"data.sources: {path}:{number} has no text in field "
                        f"data.text_field={field!r}; it has {has}"
                    )
                yield text


def _decode(path: Path, data: bytes, offset: int = 0) -> str:
    hint = "token ids belong in a .npy or .bin file, text must be UTF-8"
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"data.sources: {path} is binary (byte 0 at {offset + nul}): {hint}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise ValueError(
            f"data.sources: {path} is no UTF-8 text (byte 0x{data[error.start]:02x} at {where}): "
            f"{hint}"
        ) from None
