"""Writers for image files that Pillow can read but not write: 16-bit colours, signed values, any TIFF of one strip."""

import struct
import zlib

import numpy as np


def write_tiff(path, values, kind=1, photometric=None, big=False, deflate=False):
    """Write `values` (H, W) or (H, W, C) unchanged; `kind`: 1 unsigned, 2 signed, 3 float."""
    order = ">" if big else "<"
    values = np.ascontiguousarray(values)
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    strip = zlib.compress(data) if deflate else data
    height, width, channels = (*values.shape, 1)[:3]
    bits, more = 8 * values.dtype.itemsize, b""
    short, long = 3, 4
    tags = {
        256: (short, [width]),
        257: (short, [height]),
        258: (short, [bits] * channels),
        259: (short, [8 if deflate else 1]),
        262: (short, [photometric if photometric is not None else 2 if channels > 1 else 1]),
        273: (long, [0]),
        277: (short, [channels]),
        278: (short, [height]),
        279: (long, [len(strip)]),
        339: (short, [kind] * channels),
    }
    behind = 8 + 2 + 12 * len(tags) + 4
    tags[273] = (long, [behind + 12 * (channels > 1)])
    entries = b""
    for tag, (code, numbers) in sorted(tags.items()):
        value = struct.pack(f"{order}{len(numbers)}{'HI'[code - 3]}", *numbers)
        if len(value) > 4:
            more, value = more + value, struct.pack(f"{order}I", behind + len(more))
        entries += struct.pack(f"{order}HHI", tag, code, len(numbers)) + value.ljust(4, b"\0")
    head = (b"MM" if big else b"II") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(head + entries + b"\0" * 4 + more + strip)


def write_png(path, values, transparent=None):
    """Write uint16 (H, W), or (H, W, C) with 2 (grey, alpha), 3 or 4 channels."""
    height, width, channels = (*values.shape, 1)[:3]
    lines = np.ascontiguousarray(values).astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines)))]
    if transparent is not None:
        chunks.insert(1, (b"tRNS", struct.pack(">H", transparent)))
    chunks.append((b"IEND", b""))
    parts = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_pnm(path, values, white=65535):
    """Write uint16 (H, W) as binary PGM, or (H, W, 3) as PPM."""
    height, width = values.shape[:2]
    head = f"P{5 if values.ndim == 2 else 6} {width} {height} {white}\n"
    path.write_bytes(head.encode() + np.ascontiguousarray(values).astype(">u2").tobytes())
