"""`python -m dsa_jax generate | chat`: text from a saved model, on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from dsa_jax import chat, checkpoint
from dsa_jax import tokenizer as tokenizers
from dsa_jax.generate import Generation, generate
from dsa_jax.sharding import MeshConfig, make_mesh
from dsa_jax.transformer import Transformer

# Bytes are taken for granted only where the model can hardly have another tokenizer.
_BYTE_VOCABULARY = range(tokenizers.ByteTokenizer.vocab_size, 513)
# What a model says must not steer the terminal: control characters, line ends and tabs aside.
_CONTROL = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


@dataclass(frozen=True)
class Common:
    """What both commands need."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model (`dsa_jax.save`, or `model` in a training run's folder)."""
    tokenizer: str | None = None
    """`bytes`, a `tokenizer.json`, or a folder with one. None: the one in the model's folder, or
    bytes if the model's vocabulary has 259 to 512 entries."""
    max_new_tokens: int = 256
    """Tokens after which a text is cut off."""
    temperature: float = 0.7
    """0 always takes the likeliest token; 1 draws from the model's own distribution."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws: the same seed gives the same text."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the computation and of the cache."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices that the parameters are spread over."""


@dataclass(frozen=True)
class Generate(Common):
    """Continues a text."""

    prompt: tuple[str, ...] = ()
    """One or more beginnings, continued side by side. None given: standard input is the one."""
    bos: bool = True
    """Begin with the tokenizer's BOS, as documents do in training."""


@dataclass(frozen=True)
class Chat(Common):
    """Talks, in the chat format of DeepSeek-V3.1 and V3.2-Exp."""

    max_new_tokens: int = 4096
    """Tokens after which a reply is cut off."""
    system: str = ""
    """System prompt: instructions that stand before the conversation."""
    thinking: bool = False
    """Let the model reason before it answers."""


type Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    command = tyro.cli(Command, prog="python -m dsa_jax", description=__doc__, args=arguments)
    notes = Console(stderr=True, highlight=False)
    try:
        session = Session(command, notes)
        if isinstance(command, Chat):
            session.chat(command)
        else:
            session.generate(command)
    except (OSError, ValueError, FloatingPointError) as error:
        _complain(notes, error)
        return 1
    except KeyboardInterrupt:
        notes.print("interrupted")
        return 130
    return 0


class Session:
    """A loaded model with its tokenizer.

    Text goes to standard output and everything else to `notes`, so that output can be piped.
    """

    def __init__(self, command: Common, notes: Console):
        self._command = command
        self._notes = notes
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        config = checkpoint.load_config(command.model)
        self.tokenizer = _tokenizer(command, config.vocab_size)
        single = all(size == 1 for size in command.mesh.sizes)
        mesh = None if single else make_mesh(command.mesh)
        with notes.status(f"Loading {command.model}"):
            dtype = jnp.dtype(command.dtype)
            self.model: Transformer = checkpoint.load(command.model, mesh, dtype=dtype)

    def generate(self, command: Generate) -> None:
        """Continues the prompts; a single one is printed as it grows."""
        if not command.prompt and sys.stdin.isatty():
            self._notes.print("Reading the prompt; end it with Ctrl-D", style="dim")
        prompts = command.prompt or (sys.stdin.read(),)
        start = [self.tokenizer.bos] if command.bos else []
        ids = [start + self.tokenizer.encode(prompt) for prompt in prompts]
        if len(ids) == 1:
            self._stream(ids[0], command.max_new_tokens, opening=prompts[0])
            return
        made, note = self._run(ids, command.max_new_tokens, None)
        for prompt, tokens in zip(prompts, made.tokens, strict=True):
            self._out.rule(style="dim")
            self._write(prompt + self.tokenizer.decode(tokens) + "\n")
        self._notes.print(note, style="dim")

    def chat(self, command: Chat) -> None:
        """Reads messages and answers until the end of input."""
        if len(self.tokenizer.encode(chat.USER)) != 1:
            raise ValueError(
                f"chat: {chat.USER} is not a token of this tokenizer, so the model cannot have "
                "learned to chat with it; use `generate`, or name its tokenizer with --tokenizer"
            )
        self._notes.print(
            "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops a reply", style="dim"
        )
        opening = [{"role": "system", "content": command.system}] if command.system else []
        messages = list(opening)
        while (text := self._ask()) is not None:
            if text == "/reset":
                messages = list(opening)
            elif text:
                messages = self._reply([*messages, {"role": "user", "content": text}], command)

    def _ask(self) -> str | None:
        """A line from the user; None at the end."""
        try:
            text = self._notes.input("[bold cyan]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            self._notes.print()
            return None
        return None if text == "/exit" else text

    def _reply(self, messages: list[dict[str, Any]], command: Chat) -> list[dict[str, Any]]:
        """The conversation with the model's answer, or without the question if there is no room."""
        prompt = self.tokenizer.encode(chat.render(messages, thinking=command.thinking))
        context = self.model.config.max_position_embeddings
        if len(prompt) >= context:
            self._notes.print(
                f"The conversation has {len(prompt)} tokens, but the model's context only "
                f"{context}: ask something shorter, or /reset"
            )
            return messages[:-1]
        reply = self._stream(prompt, min(command.max_new_tokens, context - len(prompt)))
        return [*messages, {"role": "assistant", "content": reply}]

    def _stream(self, prompt: list[int], limit: int, opening: str = "") -> str:
        """Prints a continuation while it is made, behind `opening`; Ctrl-C keeps what is there."""
        decoder = tokenizers.StreamDecoder(self.tokenizer)
        pieces: list[str] = []

        def show(piece: str) -> None:
            if not pieces:  # now nothing is refused any more
                self._write(opening)
            pieces.append(piece)
            self._write(piece)

        try:
            _, note = self._run([prompt], limit, lambda _, token: show(decoder.push(token)))
        except KeyboardInterrupt:
            note = "stopped"
        show(decoder.flush())
        self._write("\n")
        self._notes.print(note, style="dim")
        return "".join(pieces)

    def _run(
        self, prompts: list[list[int]], limit: int, on_token: Callable[[int, int], None] | None
    ) -> tuple[Generation, str]:
        """The continuations, and a line about them."""
        command = self._command
        begin = time.perf_counter()
        made = generate(
            self.model,
            prompts,
            max_new_tokens=limit,
            temperature=command.temperature,
            top_p=command.top_p,
            seed=command.seed,
            eos=self.tokenizer.eos,
            vocab_size=self.tokenizer.vocab_size,
            on_token=on_token,
        )
        seconds = time.perf_counter() - begin
        count = sum(len(tokens) for tokens in made.tokens)
        cut = sum(not ended for ended in made.ended)
        note = f"{count} tokens in {seconds:.1f} s, compilation included"
        if cut:
            note += f"; {cut} of {len(prompts)} cut off after {limit}"
        return made, note

    def _write(self, text: str) -> None:
        text = text.translate(_CONTROL) if self._out.is_terminal else text
        self._out.out(text, end="", highlight=False)
        self._out.file.flush()


def _tokenizer(command: Common, vocabulary: int) -> tokenizers.Tokenizer:
    name = command.tokenizer
    if name is None and (command.model / "tokenizer.json").is_file():
        name = str(command.model)
    if name is None and vocabulary in _BYTE_VOCABULARY:
        name = "bytes"
    if name is None:
        raise ValueError(
            f"{command.model} has no tokenizer.json; name one with --tokenizer "
            "(a tokenizer.json, a folder with one, or bytes)"
        )
    found = tokenizers.load(name)
    if found.vocab_size > vocabulary:
        raise ValueError(
            f"--tokenizer {name} has {found.vocab_size} ids, but the model only {vocabulary}; "
            "name the tokenizer that the model was trained with"
        )
    return found


def _complain(notes: Console, error: Exception) -> None:
    notes.print("error:", style="bold red", end=" ")
    notes.print(str(error), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
