"""Bytes as zstd frames and byte planes: what every payload of the codec is made of.

A frame names its size, which is compared with what the model says before a byte is decompressed;
it is then decompressed into one buffer of that size or refused. One frame, nothing after it, and no
window over 8 MiB. Words are cut into byte planes (all lowest bytes first), which is what makes the
entropy coder see signs and magnitudes instead of noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_sdk.errors import PeerError

MAX_WINDOW_BYTES = 8 * 1024 * 1024
# What a frame adds to content that does not compress: its header, and 3 bytes each 128 KiB.
FRAME_BYTES = 32

Buffer = bytes | bytearray | memoryview
Array = NDArray[Any]
Planes = NDArray[np.uint8]

_LEVEL = 1
# Packed symbols have no repetitions worth a back reference: with a table of 64 entries and matches
# of at least 7 bytes zstd finds hardly any, and what is left is its Huffman coder.
_SYMBOLS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, window_log=17
)


def compress(body: Planes) -> bytes:
    """One frame of byte planes."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(body.data)


def compress_symbols(parts: Iterable[Planes], size_bytes: int) -> bytes:
    """One frame of packed symbols, given in parts of ``size_bytes`` together."""
    frame = zstandard.ZstdCompressor(compression_params=_SYMBOLS).compressobj(size=size_bytes)
    return b"".join([*(frame.compress(part.data) for part in parts), frame.flush()])


def frame_limit(size_bytes: int) -> int:
    """Longest frame of ``size_bytes`` of content."""
    return size_bytes + (size_bytes >> 15) + FRAME_BYTES


def decompress(
    payload: Buffer, sizes: range, where: str, error: type[PeerError], *, raw: bool
) -> Buffer:
    """The content of a frame, one of ``sizes`` long, or ``error``; allocates nothing else.

    raw: a payload of exactly the largest size is the content itself.
    """
    limit = sizes[-1] if raw else frame_limit(sizes[-1])
    if raw and len(payload) == limit:
        return payload
    if len(payload) > limit:
        raise error(
            f"{where}: payload of {len(payload)} bytes, the limit is {limit}; it is dropped"
        )
    try:
        frame = zstandard.get_frame_parameters(payload)
        if frame.content_size not in sizes or frame.window_size > MAX_WINDOW_BYTES:
            wanted = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
            raise error(
                f"{where}: the zstd frame names {frame.content_size} bytes and a window of "
                f"{frame.window_size}, the block has {wanted} and the window's limit is "
                f"{MAX_WINDOW_BYTES}; it is dropped"
            )
        # With its size named, a frame is decompressed into one buffer of that size or fails.
        decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return decoder.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as reason:
        raise error(
            f"{where}: payload of {len(payload)} bytes is not one whole zstd frame of "
            f"{sizes[-1]} bytes ({reason}); it is dropped"
        ) from reason


def cut(body: Planes, groups: Iterable[tuple[int, int]]) -> list[Planes]:
    """Views of the groups a body is made of, each of shape [bytes per word, words]."""
    views, start = [], 0
    for width, count in groups:
        views.append(body[start : start + width * count].reshape(width, count))
        start += width * count
    return views


def put(planes: Planes, at: int, words: Array) -> None:
    """Write words into their planes, from place ``at`` on."""
    width = planes.shape[0]
    planes[:, at : at + words.size] = words.view(np.uint8).reshape(words.size, width).T


def take(planes: Planes, at: int, count: int, dtype: np.dtype[Any]) -> Array:
    """``count`` words from their planes, from place ``at`` on."""
    words = np.empty(count, dtype)
    content = words.view(np.uint8)
    for place, plane in enumerate(planes):  # four times as fast as one transposed copy
        content[place :: dtype.itemsize] = plane[at : at + count]
    return words


def little(words: Array) -> Array:
    """The same words in little-endian order."""
    return words.astype(words.dtype.newbyteorder("<"), copy=False)
