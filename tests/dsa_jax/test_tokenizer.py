"""Both tokenizers, and text that streams without cutting a character."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import BOS, write_byte_level
from tokenizers import decoders, models, pre_tokenizers

from dsa_jax import tokenizer as tok

TEXT = "naïve — 你好，世界 🙂👩‍👩‍👧 \n\ttab"


@pytest.fixture(scope="module", params=["bytes", "json"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return tok.load("bytes")
    return tok.load(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def test_bytes_known_answer():
    byte = tok.ByteTokenizer()
    assert byte.encode("aé") == [97, 0xC3, 0xA9]
    assert (byte.bos, byte.eos, byte.pad, byte.vocab_size) == (256, 257, 258, 259)
    assert byte.decode([256, 97, 0xC3, 0xA9, 257, 258]) == "aé"
    assert byte.decode([97, 0xC3]) == "a\ufffd"


def test_json_special_ids_and_markers(tmp_path):
    json_tokenizer = tok.load(write_byte_level(tmp_path))
    assert (json_tokenizer.bos, json_tokenizer.eos, json_tokenizer.pad) == (256, 257, 258)
    assert json_tokenizer.vocab_size == 260
    ids = json_tokenizer.encode(f"{BOS}<｜User｜>hi")
    assert ids[:2] == [256, 259]  # markers are one id each, and no BOS is added
    assert len(ids) == 4
    assert json_tokenizer.decode(ids) == "<｜User｜>hi"  # role markers stay, BOS is silent


def test_json_folder_and_config_names(tmp_path):
    write_byte_level(tmp_path, added=("<s>", "</s>", "<unk>"))
    with pytest.raises(ValueError, match=r"bos='<｜begin▁of▁sentence｜>' is not a token"):
        tok.load(tmp_path)
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = tok.load(tmp_path)
    assert (loaded.bos, loaded.eos, loaded.pad) == (256, 257, 257)  # pad falls back to eos
    assert loaded.decode([256, 258, 257]) == "<unk>"  # only bos, eos and pad are silent


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tok.load(tmp_path / "nothing.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\x00\xff not json")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        tok.load(tmp_path)


def test_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_stream_emits_whole_characters_only(tokenizer):
    stream = tok.StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # the bytes in the middle of a character were held back
    assert stream.flush() == ""


def test_stream_keeps_spaces_where_the_decoder_drops_the_first(tmp_path):
    """Some decoders strip the space of their first token: each piece alone would lose its own."""
    words = {"<s>": 0, "</s>": 1, "▁one": 2, "▁two": 3, "▁three": 4}
    metaspace = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<s>"))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    metaspace.save(str(tmp_path / "tokenizer.json"))
    loaded = tok.JsonTokenizer(tmp_path, bos="<s>", eos="</s>")
    stream = tok.StreamDecoder(loaded)
    assert [stream.push(i) for i in loaded.encode("one two three")] == ["one", " two", " three"]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 258), max_size=40))
def test_stream_equals_decode_on_any_ids(ids):
    byte = tok.ByteTokenizer()
    stream = tok.StreamDecoder(byte)
    text = "".join([stream.push(i) for i in ids]) + stream.flush()
    assert text == byte.decode(ids)
