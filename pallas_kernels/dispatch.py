"""Which implementation of an op serves a call.

`implementation` is `"mosaic"` (a Hopper kernel), `"xla"` (the reference, any backend) or None (the
fastest that supports the call). An explicit choice that cannot serve the call raises
`UnsupportedError`; None falls back to `"xla"`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import jax

Implementation = Literal["mosaic", "xla"] | None


class UnsupportedError(NotImplementedError):
    """An implementation was named that cannot serve the call; the message says what it needs."""


_prefer_kernels: ContextVar[bool | None] = ContextVar("prefer_kernels", default=None)
_choices: ContextVar[dict[str, str] | None] = ContextVar("choices", default=None)


def hopper_is_default() -> bool:
    """Whether the default backend is a GPU of compute capability 9.0."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return str(capability).startswith("9.")


@contextlib.contextmanager
def kernels(preferred: bool) -> Iterator[None]:
    """What None means inside: kernels wherever they serve a call, or the reference everywhere.

    For comparing the two through code that leaves the choice to the op, and for compiling a whole
    program for Hopper on another machine. It is read while an op is traced: a jitted function goes
    on with what it was traced with.

    Args:
        preferred: True chooses kernels whatever the backend; False never does.
    """
    token = _prefer_kernels.set(preferred)
    try:
        yield
    finally:
        _prefer_kernels.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """Collects which implementation serves each op that is traced inside, by the op's name.

    An op that is served by kernels in one call and by the reference in another shows the latter:
    `"xla"`, and in brackets why no kernel serves it, where that was the reason.
    """
    found: dict[str, str] = {}
    token = _choices.set(found)
    try:
        yield found
    finally:
        _choices.reset(token)


def choose(op: str, implementation: Implementation, unsupported: str | None) -> str:
    """Picks `"mosaic"` or `"xla"`.

    Args:
        op: the op's name, for the message.
        implementation: what the caller asked for.
        unsupported: None if the Mosaic kernel serves this call, else why it does not: which
            argument, its value, and what the kernel needs.

    Raises:
        UnsupportedError: `"mosaic"` was asked for and cannot serve the call.
        ValueError: an implementation of another name.
    """
    if implementation not in (None, "mosaic", "xla"):
        raise ValueError(
            f"{op}: implementation={implementation!r} is not one of 'mosaic', 'xla' or None"
        )
    if implementation == "mosaic" and unsupported is not None:
        raise UnsupportedError(
            f"{op}: implementation='mosaic' cannot serve this call: {unsupported}. "
            "Pass implementation='xla', or None to fall back by itself."
        )
    chosen = implementation or _fastest(unsupported)
    _record(op, chosen, unsupported)
    return chosen


def _fastest(unsupported: str | None) -> str:
    preferred = _prefer_kernels.get()
    wanted = hopper_is_default() if preferred is None else preferred
    return "mosaic" if wanted and unsupported is None else "xla"


def _record(op: str, chosen: str, unsupported: str | None) -> None:
    found = _choices.get()
    if found is None or found.get(op, "").startswith("xla"):
        return
    found[op] = chosen if chosen == "mosaic" or not unsupported else f"xla ({unsupported})"
