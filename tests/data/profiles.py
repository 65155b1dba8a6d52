"""Small ICC profiles, written byte by byte, and what their colours are in sRGB by the formulas."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]

D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D65, _D50_XY = (0.3127, 0.3290), (0.3457, 0.3585)


def from_srgb(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """The light of sRGB values in [0, 1] (IEC 61966-2-1)."""
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def to_srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    light = np.clip(light, 0.0, 1.0)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def gamma(exponent: float) -> Curve:
    return lambda v: v**exponent


# name -> (x, y) of red, green, blue and white, and the curve
SPACES: dict[str, tuple[list[tuple[float, float]], tuple[float, float], Curve]] = {
    "sRGB": ([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)], _D65, from_srgb),
    "Display P3": ([(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)], _D65, from_srgb),
    "Adobe RGB (1998)": ([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], _D65, gamma(2.19921875)),
    "ProPhoto RGB": ([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], _D50_XY, gamma(1.8)),
}


def matrix_of(space: str) -> NDArray[np.float64]:
    """(3, 3): from light to XYZ under D50, white adapted as ICC profiles adapt it (Bradford)."""
    primaries, white, _ = SPACES[space]

    def xyz(x: float, y: float) -> NDArray[np.float64]:
        return np.array([x / y, 1.0, (1 - x - y) / y])

    columns = np.stack([xyz(*one) for one in primaries], axis=1)
    columns = columns * np.linalg.solve(columns, xyz(*white))
    cones = np.diag((_BRADFORD @ D50) / (_BRADFORD @ xyz(*white)))
    return np.linalg.inv(_BRADFORD) @ cones @ _BRADFORD @ columns


def in_srgb(levels: NDArray[np.uint8], space: str) -> NDArray[np.float64]:
    """(..., 3) levels of ``space`` as levels of sRGB, in floating point."""
    light = SPACES[space][2](levels / 255.0) @ matrix_of(space).T
    return 255.0 * to_srgb(light @ np.linalg.inv(matrix_of("sRGB")).T)


def rgb_profile(space: str, gain: float = 1.0) -> bytes:
    """A profile of version 2 with a matrix and curves, the light times ``gain``."""

    def curve(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.minimum(1.0, gain * SPACES[space][2](v))

    matrix = matrix_of(space)
    tags = {f"{name}XYZ": _xyz(matrix[:, i]) for i, name in enumerate("rgb")}
    tags |= {f"{name}TRC": _curve(curve) for name in "rgb"}
    return _profile("RGB ", "mntr", space, tags)


def grey_profile(curve: Curve, name: str = "Grey") -> bytes:
    return _profile("GRAY", "mntr", name, {"kTRC": _curve(curve)})


def cmyk_profile(inks: Callable[[tuple[int, int, int, int]], tuple[float, float, float]]) -> bytes:
    """A profile with a table that holds the colours (L, a, b) of every ink alone and of all overprints."""
    corners = [tuple(number >> shift & 1 for shift in (3, 2, 1, 0)) for number in range(16)]
    table = bytes(
        level
        for corner in corners
        for level in _lab_levels(inks(corner))  # type: ignore[arg-type]
    )
    identity = bytes(range(256))
    one = [struct.pack(">i", round(65536 * value)) for value in np.eye(3).ravel()]
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(one) + identity * 4 + table + identity * 3
    return _profile("CMYK", "prtr", "Inks", {"A2B0": lut, "A2B1": lut}, connection="Lab ")


def _lab_levels(lab: tuple[float, float, float]) -> list[int]:
    return [round(lab[0] * 2.55), round(lab[1]) + 128, round(lab[2]) + 128]


def lab_in_srgb(lab: tuple[float, float, float]) -> NDArray[np.float64]:
    """A colour (L, a, b) under D50 as levels of sRGB."""
    fy = (lab[0] + 16) / 116
    f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return 255.0 * to_srgb(np.linalg.inv(matrix_of("sRGB")) @ xyz)


def _profile(space: str, kind: str, name: str, tags: dict[str, bytes], connection: str = "XYZ ") -> bytes:
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + b"\0" * (1 + 8 + 3 + 67)
    tags = {"desc": described, "wtpt": _xyz(D50), "cprt": b"text\0\0\0\0none\0"} | tags
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag.encode() + struct.pack(">II", start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    kinds = (kind.encode(), space.encode(), connection.encode())
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, *kinds)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(D50) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def _fixed(values: NDArray[np.float64]) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * value)) for value in values)


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _curve(curve: Curve) -> bytes:
    table = np.rint(65535 * curve(np.linspace(0.0, 1.0, 4096))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()
