"""The header and the tensors of a ``.gguf`` are what the package ``gguf`` reads."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from recursify.checkpoint.gguf import file as file_module
from recursify.checkpoint.gguf.file import GgufFile
from recursify.checkpoint.gguf.header import GgufHeader
from recursify.errors import CheckpointError

SHAPES = {"matrix": (7, 64), "wide": (3, 512), "vector": (32,), "experts": (2, 5, 32)}


@pytest.fixture
def written(tmp_path):
    """A file with a key of every type, and tensors of one to three dimensions."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for kind in ("uint8", "uint16", "uint32", "uint64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 200)
    for kind in ("int8", "int16", "int32", "int64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", -100)
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "naïve ▁text")
    writer.add_array("test.strings", ["", "a", "▁b"])
    writer.add_array("test.integers", [1, -2, 3])
    writer.add_array("test.floats", [0.5, 0.1])
    writer.add_array("test.flags", [True, False])
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0):
            values = generator.standard_normal(shape).astype(np.float32)
            writer.add_tensor(f"{name}.{kind.name}", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_values_are_those_of_the_package(written):
    """Every key, with its type."""
    header, reader = GgufHeader(written), gguf.GGUFReader(written)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert len(expected) > 15
    values = {key: header.value(key) for key in header.keys}
    assert values == expected
    assert {key: type(value) for key, value in values.items()} == {key: type(value) for key, value in expected.items()}


def test_tensors_are_those_of_the_package(written, monkeypatch):
    """Every shape and quantization, also where a tensor is dequantized a few rows at a time."""
    monkeypatch.setattr(file_module, "ELEMENTS_AT_ONCE", 128)
    file, reader = GgufFile(written), gguf.GGUFReader(written)
    assert len(reader.tensors) == len(file.shapes) == 3 * len(SHAPES)
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = file.read(tensor.name)
        assert file.shapes[tensor.name] == SHAPES[tensor.name.partition(".")[0]]
        assert values.shape == file.shapes[tensor.name]
        np.testing.assert_array_equal(values.numpy(), expected.reshape(values.shape))


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        (b"GGUF", b"GGML", "does not begin with GGUF"),
        (b"GGUF\x03\x00", b"GGUF\x01\x00", "it has version 1"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03", "byte order is big-endian"),
        (b"test.int16", b"test.int32", "it has the key 'test.int32' twice"),
        (b"vector.F16", b"vector.F32", "it has the tensor 'vector.F32' twice"),
        (b"general.architecture", b"general.architectura", "KeyError: 'general.architecture'"),
        (b"test.uint32\x04", b"test.uint32\x63", "a value of the unknown type 99"),
        (b"test.string\x08\x00\x00\x00\x0e", b"test.string\x08\x00\x00\x00\x00", "cannot be read as a GGUF"),
        (b"test.strings\x09\x00\x00\x00\x08", b"test.strings\x09\x00\x00\x00\x0c", "cannot be read as a GGUF"),
    ],
)
def test_damaged_header(written, before, after, match):
    """Named, with the reason and what to do."""
    content = written.read_bytes()
    assert content.count(before) == 1
    written.write_bytes(content.replace(before, after))
    with pytest.raises(CheckpointError, match=rf"{match}.*fetch it again"):
        GgufFile(written)


def test_alignment(tmp_path):
    """Tensors begin at multiples of ``general.alignment``; one that is no positive integer is refused."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GgufFile(tmp_path / "model.gguf").read("b").tolist() == [0, 1, 2, 3, 4]
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"\x00\x01\x00\x00", b"\x00\x00\x00\x00", 1))
    with pytest.raises(CheckpointError, match=r"general\.alignment 0"):
        GgufFile(tmp_path / "model.gguf")
