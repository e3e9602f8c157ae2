"""Packed codes: golden bytes, round trips of asymmetric matrices, and refusal of impossible bytes."""

import pytest
import torch

from ternlm.errors import CheckpointError
from ternlm.ops.packing import pack_2bit, pack_trits, unpack_2bit, unpack_trits


def random_codes(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)


def test_x02_the_golden_block_of_two_bit_codes() -> None:
    codes = (torch.arange(256) % 3 - 1).to(torch.int8)[None]
    assert pack_2bit(codes)[0, :8].tolist() == [36, 73, 146, 36, 73, 146, 36, 73]
    assert pack_2bit(codes).shape == (1, 64)


def test_x02_each_column_of_a_block_has_its_own_two_bits() -> None:
    for column in (0, 1, 63, 64, 130, 255, 256, 300, 511):
        codes = torch.full((1, 512), -1, dtype=torch.int8)
        codes[0, column] = 1
        packed = pack_2bit(codes)
        block, place = divmod(column, 256)
        expected = torch.zeros(1, 128, dtype=torch.uint8)
        expected[0, 64 * block + place % 64] = 2 << (2 * (place // 64))
        assert torch.equal(packed, expected)


def test_x02_the_tail_of_a_two_bit_row_is_padded_with_zeros() -> None:
    packed = pack_2bit(torch.ones(1, 3, dtype=torch.int8))
    assert packed.shape == (1, 64)
    assert packed[0, :4].tolist() == [0b01010110, 0b01010110, 0b01010110, 0b01010101]


def test_x02_all_243_groups_of_trits() -> None:
    digits = torch.cartesian_prod(*[torch.arange(3)] * 5)
    packed = pack_trits((digits - 1).to(torch.int8))
    assert packed.flatten().tolist() == list(range(243))
    assert torch.equal(unpack_trits(torch.arange(243, dtype=torch.uint8)[:, None], 5), (digits - 1).to(torch.int8))


def test_x02_the_first_trit_is_the_most_significant_and_the_tail_is_zeros() -> None:
    assert pack_trits(torch.tensor([[1, -1, -1, -1, -1]], dtype=torch.int8)).item() == 162
    assert pack_trits(torch.tensor([[-1, -1]], dtype=torch.int8)).item() == 9 + 3 + 1


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("columns", [1, 5, 7, 64, 255, 256, 257, 768])
def test_x02_both_layouts_come_back_unchanged(rows: int, columns: int) -> None:
    codes = random_codes(rows, columns)
    packed, trits = pack_2bit(codes), pack_trits(codes)
    assert packed.dtype == trits.dtype == torch.uint8
    assert packed.shape == (rows, 64 * -(-columns // 256)) and trits.shape == (rows, -(-columns // 5))
    for unpacked in (unpack_2bit(packed, columns), unpack_trits(trits, columns)):
        assert unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes)


def test_packing_leaves_the_codes_alone() -> None:
    codes = random_codes(3, 256)
    before = codes.clone()
    pack_2bit(codes), pack_trits(codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_two_bit_three_is_refused(place: int) -> None:
    packed = pack_2bit(random_codes(2, 256))
    packed[1, 17] |= 3 << (2 * place)
    with pytest.raises(CheckpointError, match="2-bit value 3"):
        unpack_2bit(packed, 256)


@pytest.mark.parametrize("byte", [243, 255])
def test_a_byte_above_242_is_refused(byte: int) -> None:
    with pytest.raises(CheckpointError, match="above 242"):
        unpack_trits(torch.tensor([[0, byte]], dtype=torch.uint8), 10)
