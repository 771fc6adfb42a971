"""Compares every PNG below the directories with Pillow's conversion to RGBA over white.

usage: python tests/compare_transparency.py DIRECTORY ...

For one, `npm pack emoji-datasource-apple@16.0.0`, unpacked: its img/apple/64. Exit code 1 where an
image differs by more than rounding, half a grey level of 255.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from supmim_jax.data import decode


def differences(path: Path) -> tuple[float, float]:
    """Ours from Pillow's at most, and Pillow's without its alpha in the mean, in grey levels."""
    rgba = np.asarray(Image.open(path).convert("RGBA"), np.float64)
    colours, alpha = rgba[..., :3], rgba[..., 3:] / 255
    expected = colours * alpha + 255 * (1 - alpha)
    ours = decode.pixels(path.read_bytes(), 3)
    return abs(ours - expected).max(), abs(colours - expected).mean()


if __name__ == "__main__":
    files = [path for name in sys.argv[1:] for path in sorted(Path(name).rglob("*.png"))]
    if not files:
        sys.exit(__doc__)
    most, hidden = np.array([differences(path) for path in files]).T
    print(f"{len(files)} images, at most {most.max():.2f} grey levels from Pillow's.")
    print(f"Without alpha, {(hidden > 5).sum()} would be off by more than 5 in the mean.")
    sys.exit(int(most.max() > 0.5))
