"""A tokenizer of DeepSeek's kind, small enough to make in a test."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"


def write_byte_level(folder, added=(BOS, EOS, PAD, "<｜User｜>")):
    """A `tokenizer.json` of DeepSeek's kind with one token per byte, after the added ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added[:3]))
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in added[3:]])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path
