"""The file format: what is written is read, and no header is believed."""

import json
import struct

import numpy as np
import pytest
from checkpoints import DTYPES, read_file, write_file
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convert.safetensors import ConvertError, SafetensorsFile, SafetensorsWriter, shard

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5, dtype=np.uint8).view(DTYPES["F8_E4M3"])


def put(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def item(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_others_write_is_read(tmp_path):
    write_file(tmp_path / "f", {"b": B, "a": A, "none": np.empty((0, 3), np.float32)})
    file = SafetensorsFile(tmp_path / "f")
    np.testing.assert_array_equal(file.read("a"), A)
    np.testing.assert_array_equal(file.read("a", slice(1, 3)), A[1:3])
    assert file.read("b").tobytes() == B.tobytes()
    assert file.read("none").shape == (0, 3)
    assert not file.read("a").flags.writeable


def test_what_is_written_others_read(tmp_path):
    tensors = {"b": (B.dtype, B.shape), "a": (A.dtype, A.shape)}
    writer = SafetensorsWriter(tmp_path / "f", tensors)
    writer.write("a", 2, A[2:])
    writer.write("b", 0, B)
    assert not writer.complete
    writer.write("a", 0, A[:2])
    assert writer.complete
    writer.close()
    found = read_file(tmp_path / "f")
    np.testing.assert_array_equal(found["a"], A)
    assert found["b"].tobytes() == B.tobytes()
    info = SafetensorsFile(tmp_path / "f").tensors["a"]
    assert info.start % 8 == 0  # wide types first, or torch could not map them


def test_shards_hold_at_most_so_many_bytes():
    tensors = {str(i): (np.dtype(np.float32), (n,)) for i, n in enumerate((3, 2, 9, 1, 1))}
    assert [list(s) for s in shard(tensors, 20)] == [["0", "1"], ["2"], ["3", "4"]]


HEADERS = {
    "not an object": ([], b"", r"is a JSON list"),
    "not JSON": (b"{]", b"", r"not JSON"),
    "not text": (b"\xff\xfe{}", b"", r"not JSON"),
    "too deep": (b"[" * 100_000, b"", r"not JSON|JSON list"),
    "duplicate": (
        b'{"x":' + json.dumps(item()).encode() + b',"x":' + json.dumps(item()).encode() + b"}",
        bytes(8),
        r"duplicate tensor x",
    ),
    "lacks a key": ({"x": {"dtype": "F32"}}, b"", r"tensor x lacks"),
    "unknown dtype": ({"x": item("F4")}, bytes(8), r"tensor x has dtype 'F4'"),
    "shape of text": ({"x": item(shape=["2"])}, bytes(8), r"tensor x has shape"),
    "negative shape": ({"x": item(shape=[-2])}, bytes(8), r"tensor x has shape"),
    "negative offset": ({"x": item(offsets=[-8, 0])}, bytes(8), r"tensor x has data_offsets"),
    "true as a number": ({"x": item(shape=[True, 2])}, bytes(8), r"tensor x has shape"),
    "shape and offsets disagree": ({"x": item(shape=[3])}, bytes(8), r"12 bytes, but .* span 8"),
    "huge shape": ({"x": item(shape=[2**62, 2**62])}, bytes(8), r"tensor x is F32"),
    "beyond the file": ({"x": item(shape=[4], offsets=[0, 16])}, bytes(8), r"x ends .* cut short"),
    "overlap": ({"x": item(), "y": item(offsets=[4, 12])}, bytes(12), r"y starts at byte"),
    "hole": ({"x": item(offsets=[4, 12])}, bytes(12), r"x starts at byte"),
    "bytes left over": ({"x": item()}, bytes(9), r"1 bytes after the last tensor"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_lying_header_is_refused(kind, tmp_path):
    header, data, message = HEADERS[kind]
    with pytest.raises(ConvertError, match=message) as caught:
        SafetensorsFile(put(tmp_path / "f.safetensors", header, data))
    assert "f.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [3, 1000, 2**40, 2**64 - 1])
def test_a_lying_length_allocates_nothing(length, tmp_path):
    path = put(tmp_path / "f", b"{}", length=length)
    with pytest.raises(ConvertError, match="says its header has"):
        SafetensorsFile(path)


@pytest.mark.parametrize("size", range(8))
def test_a_stump(size, tmp_path):
    (tmp_path / "f").write_bytes(bytes(size))
    with pytest.raises(ConvertError, match=f"has {size} bytes"):
        SafetensorsFile(tmp_path / "f")


def check_any_bytes(path, raw):
    """Either an error that says so, or tensors that lie within the file and do not overlap."""
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except ConvertError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    end = None
    for name, info in file.tensors.items():
        assert 8 <= info.start <= info.end <= len(raw)
        assert end is None or info.start == end
        end = info.end
        assert file.read(name).nbytes == info.end - info.start


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
SIZES = st.lists(st.integers(-1, 5) | st.integers(0, 2**64), max_size=4)
ITEMS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F8_E4M3", "BF16", "X"]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": SIZES | JSON,
    }
)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
@example(raw=struct.pack("<Q", 2) + b"{}")
def test_fuzz_bytes(raw, tmp_path_factory):
    check_any_bytes(tmp_path_factory.getbasetemp() / "fuzz", raw)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3), ITEMS | JSON, max_size=3), size=st.integers(0, 40)
)
def test_fuzz_headers(header, size, tmp_path_factory):
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + bytes(size)
    check_any_bytes(tmp_path_factory.getbasetemp() / "fuzz", raw)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_fuzz_a_good_file(data, tmp_path_factory):
    """One byte changed, or the end cut off."""
    path = tmp_path_factory.getbasetemp() / "fuzz"
    write_file(path, {"a": A, "b": B})
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check_any_bytes(path, bytes(raw))
