"""The commands, end to end on a small model, and their errors as one line."""

import dataclasses
import io
import re

import jax.numpy as jnp
import pytest
from small_models import filled
from small_tokenizers import write_byte_level

from dsa_jax import chat, checkpoint, presets
from dsa_jax.__main__ import Chat, Generate, main
from dsa_jax.generate import generate
from dsa_jax.sharding import AXES
from dsa_jax.tokenizer import ByteTokenizer, load

MARKERS = (chat.BOS, chat.EOS, "<｜▁pad▁｜>", chat.USER, chat.ASSISTANT, chat.THINK, chat.END_THINK)
LIMIT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    checkpoint.save(filled(presets.get("tiny").replace(vocab_size=270)), path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def markers(tmp_path_factory):
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"), MARKERS)


def run(*arguments):
    return main([str(a) for a in arguments])


def test_generate_prints_prompt_and_continuation(folder, model, capsys):
    options = ("--temperature", 0, "--max-new-tokens", LIMIT, "--dtype", "float32")
    assert run("generate", folder, "--prompt", "Let there be", *options) == 0
    byte = ByteTokenizer()
    prompt = [byte.bos, *byte.encode("Let there be")]
    tokens = generate(model, [prompt], max_new_tokens=LIMIT, eos=byte.eos, vocab_size=259).tokens
    captured = capsys.readouterr()
    assert captured.out == "Let there be" + byte.decode(tokens[0]) + "\n"
    assert f"{LIMIT} tokens in" in captured.err
    assert f"1 of 1 cut off after {LIMIT}" in captured.err


def test_generate_reads_standard_input(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    options = ("--temperature", 0, "--max-new-tokens", LIMIT, "--dtype", "float32")
    assert run("generate", folder, *options) == 0
    assert capsys.readouterr().out.startswith("from a pipe")


def test_chat_keeps_the_history(folder, model, markers, monkeypatch, capsys):
    """What the second answer is must depend on the first exchange, exactly as rendered."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand?\n/reset\nhi\n/exit\nnever\n"))
    options = ("--tokenizer", markers, "--temperature", 0, "--max-new-tokens", LIMIT)
    assert run("chat", folder, *options, "--system", "Be brief.", "--dtype", "float32") == 0
    tokenizer = load(markers)

    def answer(messages):
        prompt = tokenizer.encode(chat.render(messages))
        made = generate(
            model,
            [prompt],
            max_new_tokens=LIMIT,
            eos=tokenizer.eos,
            vocab_size=tokenizer.vocab_size,
        )
        return tokenizer.decode(made.tokens[0])

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    first = answer(messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    second = answer(messages)
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"
    assert first != second


def test_a_conversation_that_outgrows_the_context_goes_on(folder, markers, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 600 + "\nhi\n"))
    options = ("--tokenizer", markers, "--max-new-tokens", LIMIT, "--dtype", "float32")
    assert run("chat", folder, *options) == 0
    captured = capsys.readouterr()
    assert "The conversation has 604 tokens, but the model's context only 512" in " ".join(
        captured.err.split()
    )
    assert captured.out.count("\n") >= 1  # the short question was answered


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("generate", "{tmp}/nothing", "--prompt", "x"), "no checkpoint at {tmp}/nothing"),
        (("generate", "{tmp}", "--prompt", "x"), "{tmp} is not a checkpoint of dsa_jax"),
        (("generate", "{model}", "--prompt", "x", "--top-p", "2"), "top_p=2.0 must be above 0"),
        (("generate", "{model}", "--prompt", "x", "--mesh.fsdp", "99"), "needs 99 devices"),
        (("generate", "{model}", "--tokenizer", "{tmp}/t.json"), "{tmp}/t.json does not exist"),
        (("chat", "{model}"), "is not a token of this tokenizer"),
    ],
)
def test_errors_are_one_line(arguments, complaint, folder, tmp_path, capsys):
    names = {"tmp": tmp_path, "model": folder}
    assert run(*(a.format(**names) for a in arguments)) == 1
    out, err = capsys.readouterr()
    assert not out  # not the prompt either
    assert "Traceback" not in err
    assert complaint.format(**names) in " ".join(err.split())
    assert err.count("error:") == 1


def test_a_tokenizer_must_be_named_or_fit(tmp_path, markers, capsys):
    checkpoint.save(filled(presets.get("tiny")), tmp_path / "small")  # 96 ids: bytes do not fit
    assert run("generate", tmp_path / "small", "--prompt", "x") == 1
    assert "has no tokenizer.json; name one" in " ".join(capsys.readouterr().err.split())
    assert run("generate", tmp_path / "small", "--prompt", "x", "--tokenizer", markers) == 1
    assert "263 ids, but the model only 96" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", [Generate, Chat])
def test_help_explains_every_field(command, capsys):
    with pytest.raises(SystemExit):
        main([command.__name__.lower(), "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    names = [f.name for f in dataclasses.fields(command) if f.name not in ("model", "mesh")]
    names += [f"mesh.{axis}" for axis in AXES]
    for name in names:
        option = "--" + name.replace("_", "-")
        found = re.search(rf"{re.escape(option)}[ ,].*?\(default", text)
        assert found, option
        # Beyond its own name, type and choices: a sentence.
        assert re.search(r"[a-z]+ [a-z]+ [a-z]+", found[0]), found[0]
