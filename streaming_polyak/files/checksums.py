"""Checksums of bytes as the file formats keep them: CRC-32 (archives) and CRC-32C (TensorFlow).

Both are remainders of polynomials over GF(2), so the checksum of two ranges together follows from those of the two and
the size of the second: crc(a b) = crc(a) x^(8 size(b)) + crc(b) modulo P. Ranges can be checked where they are read
and put together afterwards. In a CRC that is kept reflected, as these are, bit 31 is the coefficient of x^0.

Source: M. Adler, zlib, `crc32_combine`; RFC 3720, section 12.1 (the polynomial of CRC-32C); TensorFlow and LevelDB,
`crc32c.h` (masking).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

_POLYNOMIAL = 0x82F6_3B78  # of CRC-32C, reflected
_ONE = 1 << 31
_32 = 0xFFFF_FFFF
_MASK = 0xA282_EAD8

Bytes = bytes | bytearray | memoryview | NDArray[Any]


def crc32(data: Bytes, value: int = 0) -> int:
    """Returns the CRC-32 of data that follow others with the CRC-32 `value`."""
    return zlib_ng.crc32(data, value)


def crc32_combine(first: int, second: int, second_size: int) -> int:
    """Returns the CRC-32 of two ranges, one behind the other, of which the second has `second_size` bytes."""
    return zlib_ng.crc32_combine(first, second, second_size)


def crc32c(data: Bytes, value: int = 0) -> int:
    """Returns the CRC-32C of data that follow others with the CRC-32C `value`.

    The package takes bytes, and of writable memory only NumPy's arrays; a view as such a one copies nothing.
    """
    crc: int = google_crc32c.extend(value, data if isinstance(data, bytes) else np.frombuffer(data, np.uint8))
    return crc


def crc32c_combine(first: int, second: int, second_size: int) -> int:
    """Returns the CRC-32C of two ranges, one behind the other, of which the second has `second_size` bytes.

    >>> hex(crc32c_combine(crc32c(b"1234"), crc32c(b"56789"), 5))
    '0xe3069283'
    """
    if second_size < 0:
        raise ValueError(f"second_size must not be negative, got {second_size}.")
    return _product(_power(second_size), first) ^ second


def mask_crc32c(crc: int) -> int:
    """Returns a CRC-32C as TensorFlow and LevelDB store it, so that a CRC over stored CRCs stays a good one."""
    return ((crc >> 15 | crc << 17) + _MASK) & _32


def unmask_crc32c(masked: int) -> int:
    """Returns the CRC-32C that `mask_crc32c` made `masked` of."""
    rotated = masked - _MASK & _32
    return (rotated >> 17 | rotated << 15) & _32


def _product(a: int, b: int) -> int:
    """Returns a(x) b(x) modulo P."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _32
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1  # times x
    return product


@lru_cache(maxsize=1024)  # ranges have few different sizes
def _power(size: int) -> int:
    """Returns x^(8 size) modulo P."""
    power = _ONE
    for k in range(size.bit_length()):
        if size >> k & 1:
            power = _product(_square(k), power)
    return power


@cache
def _square(k: int) -> int:
    """Returns x^(8 2^k) modulo P."""
    return _product(_square(k - 1), _square(k - 1)) if k else _ONE >> 8
