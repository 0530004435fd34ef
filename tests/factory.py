"""Small real inputs for tests: photographs with a known number of coloured cells, tars, Parquet files."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from segpipe.config import Config, load_config

COLORS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
CELL = 16


def cells(colors: Iterable[str | None], *, columns: int = 4) -> np.ndarray:
    """Return an image with one 16 px cell for each name; None leaves a grey cell, in which `blank` finds nothing.

    Neighbouring cells differ in strength, so their instances differ in score.
    """
    names = list(colors)
    rows = max(1, -(-len(names) // columns))
    image = np.full((rows * CELL, columns * CELL, 3), 128, np.uint8)
    for index, name in enumerate(names):
        if name is not None:
            row, column = divmod(index, columns)
            strength = 1 - 0.03 * (index % 9)
            image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = np.multiply(
                COLORS[name], strength
            )
    return image


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def photo(seed: int) -> bytes:
    """Return a PNG with 0 to 11 instances, another for each seed."""
    rng = np.random.default_rng(seed)
    names = [rng.choice([*COLORS, None, None]) for _ in range(12)]
    return encode(cells(names, columns=int(rng.integers(2, 6))))


def write_photos(folder: Path, numbers: Iterable[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"photo_{number:03d}.png").write_bytes(photo(number))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def photo_members(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    return [(f"photo_{number:03d}.png", photo(number)) for number in numbers]


def write_parquet(path: Path, columns: Mapping[str, object], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def config(source: object, lake: object, **settings: object) -> Config:
    """Return a configuration of the blank model under the inline engine; keywords are `section__key`."""
    chosen = {
        "input.uri": str(source),
        "input.chunk_images": 4,
        "output.uri": str(lake),
        "model.name": "blank",
        "resources.engine": "inline",
        "resources.cpus_per_actor": 1,
    }
    chosen.update({key.replace("__", "."): value for key, value in settings.items()})
    return load_config(settings=chosen)
