"""The TD HOB: the hand-off block list that the firmware measures, for a machine of any memory size."""

import struct
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Final, Self

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.image.memory import ADDRESS_LIMIT, FOUR_GIB, HIGH_MEMORY, LOW_MEMORY, PAGE
from dstack_emu.attest.varint import encode_varint, read_varint

MAX_NUMBERS: Final = 3 + 2 * 1024
"""The maximum number of numbers in a witness: three, and two for each range. A firmware has about five ranges."""


@dataclass(frozen=True, slots=True)
class TdHobWitness:
    """The firmware's TD_HOB and TEMP_MEM ranges, from which the TD HOB of any memory size follows.

    hob_page is where the HOB list lies; ranges are (first page, pages), pages being 4 KiB. Encoded as
    unsigned LEB128 numbers: base, hob_page - base, count, then first page - base and pages of each range,
    base being the lowest page.
    """

    hob_page: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def hob_address(self) -> int:
        return self.hob_page * PAGE

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a witness to its last byte. Raises FormatError, with upstream's texts where it has one."""
        numbers = _read_numbers(data)
        if len(numbers) < 3 or len(numbers) < 3 + 2 * numbers[2]:
            raise FormatError("truncated TD HOB witness varuint")
        if len(numbers) > 3 + 2 * numbers[2]:
            raise FormatError("TD HOB witness has trailing bytes")
        base, hob = numbers[:2]
        ranges = tuple((base + start, pages) for start, pages in zip(numbers[3::2], numbers[4::2], strict=True))
        if (base + hob) * PAGE >= ADDRESS_LIMIT:
            raise FormatError("TD HOB base address overflow")
        if any((start + pages) * PAGE > ADDRESS_LIMIT for start, pages in ranges):
            raise FormatError("TD HOB range overflow")
        return cls(base + hob, ranges)

    def encode(self) -> bytes:
        """Encode, ranges ascending; raises FormatError where no reader could use them."""
        ranges = sorted(self.ranges)
        if not ranges or self.hob_page < ranges[0][0] or any(pages == 0 for _, pages in ranges):
            raise FormatError("a TD HOB witness needs ranges, none empty, the first not above the HOB")
        if any(start + pages > following for (start, pages), (following, _) in pairwise(ranges)):
            raise FormatError("TD HOB witness ranges must not overlap")
        base = ranges[0][0]
        numbers = [base, self.hob_page - base, len(ranges)]
        for start, pages in ranges:
            numbers += (start - base, pages)
        return b"".join(map(encode_varint, numbers))

    def td_hob(self, memory_size: int) -> bytes:
        """Build the hand-off block list that the firmware measures, for a machine of memory_size bytes.

        One PHIT, one resource descriptor for each segment of [0, memory_size): ranges are system memory (type
        0), gaps unaccepted memory (type 7). The last segment is always of type 7, and QEMU moves its part
        beyond 2 GiB to 4 GiB and up on a machine of 2.75 GiB or more.
        """
        *segments, (_, start, end) = self._segments(memory_size)
        if memory_size < HIGH_MEMORY:
            segments.append((7, start, end))
        else:
            if start < LOW_MEMORY:
                segments.append((7, start, LOW_MEMORY))
            if end > LOW_MEMORY:
                segments.append((7, FOUR_GIB, end + FOUR_GIB - LOW_MEMORY))
        resources = b"".join(
            struct.pack("<HHI16xIIQQ", 3, 48, 0, kind, 7, start, end - start) for kind, start, end in segments
        )
        end_of_list = self.hob_address + 56 + len(resources) + 8
        return struct.pack("<HHIII5Q", 1, 56, 0, 9, 0, 0, 0, 0, 0, end_of_list) + resources

    def _segments(self, memory_size: int) -> list[tuple[int, int, int]]:
        """Cut memory into (resource type, start, end), ascending, adjacent ranges kept apart."""
        segments = []
        covered = 0
        for first, pages in sorted(self.ranges, key=itemgetter(0)):
            start, end = first * PAGE, (first + pages) * PAGE
            if pages == 0:
                continue
            if covered < min(start, memory_size):
                segments.append((7, covered, min(start, memory_size)))
            segments.append((0, start, end))
            covered = max(covered, end)
        if covered < memory_size or not segments:
            segments.append((7, covered, memory_size))
        return segments


def _read_numbers(data: bytes) -> list[int]:
    numbers, at = list[int](), 0
    while at < len(data):
        if len(numbers) == MAX_NUMBERS:
            raise FormatError(f"TD HOB witness: at most {MAX_NUMBERS} numbers expected, got more")
        try:
            number, at = read_varint(data, at, len(data))
        except EOFError as error:
            raise FormatError("truncated TD HOB witness varuint") from error
        except OverflowError as error:
            raise FormatError("TD HOB witness varuint is too large") from error
        numbers.append(number)
    return numbers
