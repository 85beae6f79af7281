"""Photographs that come with libraries, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

# Files inside the wheels of scikit-image and scikit-learn, so that nothing is downloaded, with who is to be thanked.
PHOTOGRAPHS = {
    ("skimage.data", "astronaut.png"): "Eileen Collins by NASA (public domain)",
    ("skimage.data", "chelsea.png"): "Chelsea by Stéfan van der Walt (CC0)",
    ("skimage.data", "coffee.png"): "coffee by Rachel Michetti (CC0)",
    ("skimage.data", "rocket.jpg"): "Falcon 9 by SpaceX (public domain)",
    ("sklearn.datasets", "images/china.jpg"): "Summer Palace by danielbuechele (CC BY 2.0)",
    ("sklearn.datasets", "images/flower.jpg"): "dahlia by vultilion (CC BY 2.0)",
}


def photographs(size: tuple[int, int], files: Sequence[str], batch: int | None) -> tuple[np.ndarray, list[str]]:
    """Photographs cut to `size` around their middle, repeated up to `batch`; and their credits."""
    from PIL import Image, ImageOps

    def cut(stream: Any) -> np.ndarray:
        with Image.open(stream) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS))

    if files:
        pictures, credits = [cut(file) for file in files], [Path(file).name for file in files]
    else:
        pictures = [cut(BytesIO((resources.files(room) / name).read_bytes())) for room, name in PHOTOGRAPHS]
        credits = list(PHOTOGRAPHS.values())
    return np.stack(list(islice(cycle(pictures), batch or len(pictures)))), credits[:batch]


def jpegs() -> list[bytes]:
    """The photographs that scikit-image and scikit-learn ship, as JPEG files."""
    from PIL import Image

    files = []
    for room, name in PHOTOGRAPHS:
        data = (resources.files(room) / name).read_bytes()
        if not name.endswith(".jpg"):
            stored = BytesIO()
            Image.open(BytesIO(data)).convert("RGB").save(stored, "JPEG", quality=90)
            data = stored.getvalue()
        files.append(data)
    return files
