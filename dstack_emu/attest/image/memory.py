"""How QEMU's q35 lays out the memory of a machine, in bytes."""

from typing import Final

# From HIGH_MEMORY bytes on, LOW_MEMORY of them stay below 4 GiB and the rest is moved above.
LOW_MEMORY: Final = 0x8000_0000
HIGH_MEMORY: Final = 0xB000_0000
FOUR_GIB: Final = 0x1_0000_0000
ACPI_DATA_SIZE: Final = 0x28000
"""What is kept free for ACPI data at the end of low memory when the initrd is placed."""
PAGE: Final = 0x1000
ADDRESS_LIMIT: Final = 1 << 52
"""No x86 physical address reaches it, so sums of addresses below it stay within 64 bits."""
