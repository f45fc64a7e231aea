"""Quantities as people read them."""

BINARY = ("B", "KiB", "MiB", "GiB")


def binary_unit(number_of_bytes: float) -> tuple[int, str]:
    """What to divide a number of bytes by to read it, and the unit that it then has.

    >>> binary_unit(1536)
    (1024, 'KiB')
    """
    power = 0
    while abs(number_of_bytes) >= 1024 and power < len(BINARY) - 1:
        number_of_bytes /= 1024
        power += 1
    return 1024**power, BINARY[power]


def size(number_of_bytes: float) -> str:
    """Bytes as people read them, in binary units.

    >>> size(1536)
    '1.5 KiB'
    """
    divisor, unit = binary_unit(number_of_bytes)
    return f"{number_of_bytes:.0f} {unit}" if unit == "B" else f"{number_of_bytes / divisor:.1f} {unit}"
