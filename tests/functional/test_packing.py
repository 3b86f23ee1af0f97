"""The bytes of a packed module, read by a plain reader of their own."""

import struct

import pytest
import reference
import torch

from peft_heads.functional.packing import PackedWeight, pack, pack_module, read_mask, unpack, unpack_module
from peft_heads.functional.quantization import BITS, decide


every_width = pytest.mark.parametrize("bits", BITS)
MASK = torch.tensor([True, False, True])


@every_width
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 48])
def test_codes_as_bytes(bits, numel):
    codes = torch.randint(2**bits, (numel,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference.packed(codes.tolist(), bits)
    assert torch.equal(unpack(packed, bits, (numel,)), codes)


def test_codes_keep_their_shape_and_their_number_is_checked():
    codes = torch.randint(4, (3, 5), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 2), 2, (3, 5)), codes)
    with pytest.raises(ValueError, match=r"16 codes of 2 bits, shape \(4, 4\), are 4 bytes .uint8.; got 3 of torch"):
        unpack(torch.zeros(3, dtype=torch.uint8), 2, (4, 4))


def matrix(bits, shape=(6, 5), rows=None, seed=0):
    weight = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return PackedWeight.from_decision(decide(weight, bits, rows), bits)


def active_rows(shape, mask):
    return None if mask is None else mask.repeat_interleave(shape[0] // len(mask))


def read(data, with_rows):
    """Read by the module's docstring, with only `struct`: (bits, mask, [(shape, mean, std, codes)])."""
    data = bytes(data.tolist())
    version, bits, heads = struct.unpack_from("<BBH", data)
    assert version == 1
    at = 4 + -(-heads // 8)
    mask = [bool(data[4 + i // 8] >> (i % 8) & 1) for i in range(heads)]
    matrices = []
    for last in (False, True):
        rows, columns, mean, std = struct.unpack_from("<IIff", data, at)
        at += 16
        kept = rows // heads * sum(mask) if last and heads and with_rows else rows
        size = -(-kept * columns * bits // 8)
        codes = [data[at + i * bits // 8] >> (i * bits % 8) & (2**bits - 1) for i in range(kept * columns)]
        matrices.append(((rows, columns), mean, std, codes))
        at += size
    assert at == len(data)
    return bits, mask, matrices


@every_width
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_bytes(bits, mask):
    rows = None if mask is None else mask.repeat_interleave(2)
    down, up = matrix(bits, (4, 7)), matrix(bits, (6, 5), rows, seed=1)
    found_bits, found_mask, (first, second) = read(pack_module([down, up], mask), True)
    assert (found_bits, found_mask) == (bits, [] if mask is None else mask.tolist())
    for (shape, mean, std, codes), packed in ((first, down), (second, up)):
        kept = packed.codes if packed.rows is None else packed.codes[packed.rows]
        assert codes == kept.flatten().tolist()
        assert shape == tuple(packed.codes.shape)
        assert (mean, std) == (packed.mean.item(), packed.std.item())
    book = reference.code_book(bits)
    values = torch.tensor([book[code] * first[2] + first[1] for code in first[3]]).view(4, 7)
    torch.testing.assert_close(down.values(), values, rtol=1e-6, atol=1e-6)


@every_width
@pytest.mark.parametrize("mask", [None, MASK, torch.zeros(3, dtype=torch.bool)], ids=["no mask", "mask", "all off"])
def test_round_trip(bits, mask):
    packed = [matrix(bits), matrix(bits, (6, 3), None if mask is None else mask.repeat_interleave(2), seed=1)]
    unpacked, found = unpack_module(pack_module(packed, mask), 2, active_rows)
    assert (found is None) if mask is None else torch.equal(found, mask)
    alone = read_mask(pack_module(packed, mask))
    assert (alone is None) if mask is None else torch.equal(alone, mask)
    for one, other in zip(unpacked, packed, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@every_width
def test_latents_are_those_that_the_codes_are_behind(bits):
    packed = matrix(bits)
    assert packed.is_behind(packed.latents, None)
    assert packed.is_behind(packed.latents.bfloat16(), None)
    assert not packed.is_behind(packed.latents, torch.arange(6) > 0)
    changed = packed.latents.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    assert not packed.is_behind(changed, None)
    if bits < 8:
        assert torch.equal(decide(packed.latents, bits).codes, packed.codes)


def damaged(change):
    data = pack_module([matrix(2), matrix(2, (6, 3), MASK.repeat_interleave(2))], MASK)
    return change(data.clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:3], r"4 bytes were to follow at byte 0, but only 3 are left"),
        (lambda data: data[:-1], r"bytes were to follow at byte .*, but only 2 are left"),
        (lambda data: torch.cat([data, data[:2]]), r"2 bytes more than 2 matrices take; the last is \(6, 3\)"),
        (
            lambda data: data.index_fill_(0, torch.tensor([0]), 7),
            "format 7 and 2 bits; this peft_heads reads format 1",
        ),
        (lambda data: data.index_fill_(0, torch.tensor([1]), 3), "format 1 and 3 bits"),
        (lambda data: data.index_fill_(0, torch.arange(5, 9), 255), "bytes were to follow"),  # 4,294,967,295 rows
        (lambda data: data.index_fill_(0, torch.arange(13, 17), 255), "has mean nan and deviation"),
        (lambda data: data.float(), "flat uint8 tensor; got torch.float32"),
        (lambda data: data.view(1, -1), r"flat uint8 tensor; got torch.uint8 of shape \(1, "),
    ],
)
def test_damaged_bytes(change, message):
    with pytest.raises(ValueError, match=message):
        unpack_module(damaged(change), 2, active_rows)
