"""The GGUF container: block arithmetic against the format's definition, and truncation at any byte."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxtopk.models.decoder_lm.gguf_io import GGUFFile


def _f16(raw, at):
    return float(np.frombuffer(raw[at : at + 2], np.float16)[0])


def _q8_0(raw):
    return [_f16(raw, 0) * struct.unpack("b", raw[2 + i : 3 + i])[0] for i in range(32)]


def _nibbles(raw):
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def _q4_0(raw):
    return [_f16(raw, 0) * (q - 8) for q in _nibbles(raw[2:18])]


def _q4_1(raw):
    return [_f16(raw, 0) * q + _f16(raw, 2) for q in _nibbles(raw[4:20])]


def _q4_k(raw):
    """256 numbers: eight groups of 32, each with a six-bit scale and a six-bit minimum packed into 12 bytes."""
    scale, minimum, packed = _f16(raw, 0), _f16(raw, 2), raw[4:16]
    values = []
    for group in range(8):
        if group < 4:
            s, m = packed[group] & 63, packed[group + 4] & 63
        else:
            s = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            m = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
        data = raw[16 + group // 2 * 32 : 48 + group // 2 * 32]
        quants = [byte >> 4 if group % 2 else byte & 15 for byte in data]
        values += [scale * s * q - minimum * m for q in quants]
    return values


def _q6_k(raw):
    """256 numbers: low nibbles, then two high bits, then sixteen signed scales, then the scale of scales."""
    low, high, scales, scale = raw[:128], raw[128:192], raw[192:208], _f16(raw, 208)
    values = [0.0] * 256
    for half in range(2):
        for i in range(32):
            bits = high[half * 32 + i]
            for quarter in range(4):
                byte = low[half * 64 + i + 32 * (quarter % 2)]
                nibble = byte & 15 if quarter < 2 else byte >> 4
                at = half * 128 + quarter * 32 + i
                factor = struct.unpack("b", scales[at // 16 : at // 16 + 1])[0]
                values[at] = scale * factor * ((nibble | (bits >> 2 * quarter & 3) << 4) - 32)
    return values


def _floats(dtype):
    return lambda raw: np.frombuffer(raw, dtype).astype(np.float64).tolist()


FORMATS = {
    "F32": (_floats(np.float32), 1, 4, ()),
    "F16": (_floats(np.float16), 1, 2, (0,)),
    "BF16": (_floats(ml_dtypes.bfloat16), 1, 2, ()),
    "Q8_0": (_q8_0, 32, 34, (0,)),
    "Q4_0": (_q4_0, 32, 18, (0,)),
    "Q4_1": (_q4_1, 32, 20, (0, 2)),
    "Q4_K": (_q4_k, 256, 144, (0, 2)),
    "Q6_K": (_q6_k, 256, 210, (208,)),
}


def _write(path, kind="F32", raw=None, shape=(3, 4)):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokens", ["a", "bc", "é"])
    writer.add_array("scores", [0.5, -1.5])
    writer.add_array("flags", [[1, 2], [3, 4]])
    raw = np.zeros(shape, np.float32) if raw is None else raw
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_decode_as_the_format_defines(tmp_path, kind):
    decode, block, block_bytes, halves = FORMATS[kind]
    rows, columns = 3, max(2 * block, 8)
    rng = np.random.default_rng(0)
    if kind in ("F32", "BF16"):
        dtype = np.float32 if kind == "F32" else ml_dtypes.bfloat16
        raw = rng.normal(size=(rows, columns)).astype(dtype).view(np.uint8)
    else:
        raw = rng.integers(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
        for at in halves:  # random bits there could be infinite or NaN
            scales = rng.normal(size=raw.shape[:2]).astype(np.float16)
            raw[..., at : at + 2] = scales[..., None].view(np.uint8)
        raw = raw.reshape(rows, -1)
    wanted = np.array(
        [
            [
                x
                for at in range(0, len(row), block_bytes)
                for x in decode(row[at : at + block_bytes])
            ]
            for row in map(bytes, raw)
        ]
    )
    stored = raw.view(np.float32) if kind == "F32" else raw
    stored = raw.view(np.float16) if kind == "F16" else stored
    file = GGUFFile(_write(tmp_path / "x.gguf", kind, np.ascontiguousarray(stored)))
    assert file.shapes == {"w": (rows, columns)}
    got = file.read("w", (slice(None), slice(None)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(file.read("w", (slice(1, 2), slice(1, 6))), got[1:2, 1:6])
    np.testing.assert_array_equal(
        file.read("w", (np.array([2, 0]), slice(columns - 3, columns))), got[[2, 0], -3:]
    )


def test_metadata_of_every_kind_is_read(tmp_path):
    metadata = GGUFFile(_write(tmp_path / "x.gguf")).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["tokens"] == ["a", "bc", "é"]
    assert metadata["scores"] == [0.5, -1.5]
    assert metadata["flags"] == [[1, 2], [3, 4]]


def test_truncation_at_any_byte_is_one_clear_error(tmp_path):
    path = _write(tmp_path / "x.gguf")
    whole = path.read_bytes()
    data_end = len(whole.rstrip(b"\0"))  # the writer pads the end, and the tensor is zeros
    assert GGUFFile(path).shapes
    for count in range(data_end):
        path.write_bytes(whole[:count])
        with pytest.raises(ValueError, match=r"x\.gguf: got .* wanted") as error:
            GGUFFile(path)
        assert "\n" not in str(error.value)


def test_missing_last_number_is_noticed(tmp_path):
    path = _write(tmp_path / "x.gguf", raw=np.ones((8, 4), np.float32))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"for w \(truncated\)"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "wanted little-endian 2 or 3"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "got GGUF version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + bytes(60), "truncated|wanted"),
    ],
    ids=["magic", "big-endian", "version", "count"],
)
def test_other_files_are_refused(tmp_path, start, message):
    (tmp_path / "x.gguf").write_bytes(start)
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "x.gguf")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.gguf: not found in"):
        GGUFFile(tmp_path / "x.gguf")
