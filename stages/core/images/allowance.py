"""What reading an archive may cost, in proportion to what it is: a bomb is refused by the byte where it is one."""

from stages.core.runtime.errors import InputError
from stages.core.settings.profiles import Limits

FREE = 1 << 28  # bytes that may be unpacked of any archive, however small it is
FEW = 20_000  # entries that any archive may have
BYTES = 200  # of its size for each further one; the smallest images take more


class Allowance:
    """Entries and unpacked bytes left of those that ``limits`` allows to archives of ``size`` bytes together.

    Archives inside them count against the same allowance.
    """

    def __init__(self, name: str, size: int, limits: Limits) -> None:
        self._name, self._limits = name, limits
        self._most_bytes = FREE + round(limits.unfold * size)
        self._most_entries = limits.entries or FEW + size // BYTES
        self._entries, self._bytes = 0, 0

    def enter(self, count: int) -> None:
        """Count entries. Raises InputError beyond those allowed."""
        self._entries += count
        if self._entries > self._most_entries:
            raise InputError(
                f"{self._name}: more than {self._most_entries} entries; allowed for its size: as many "
                "(data.limits.entries)"
            )

    def unpack(self, size: int) -> None:
        """Count bytes that are, or will be, unpacked. Raises InputError beyond those allowed."""
        self._bytes += size
        if self._bytes > self._most_bytes:
            raise InputError(
                f"{self._name}: unfolds to more than {self._most_bytes >> 20} MiB; allowed: 256 MiB and "
                f"{self._limits.unfold:g} times its size (data.limits.unfold)"
            )

    def stored(self, name: str, size: int, there: int) -> None:
        """Entries that take more bytes than the file has lie over each other: one would be unpacked many times."""
        if size > there:
            raise InputError(
                f"{self._name}: {name}: its entries take {size} bytes of a file of {there}; allowed: no overlap"
            )
