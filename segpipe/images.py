"""Encoded images to upright RGB pixels. Knows every rule of decoding; does not know where the bytes came from.

Rules, all of them deterministic:
    first frame of animations and multi-page files; EXIF orientation applied (an invalid value is recorded and ignored);
    alpha composited over white; CMYK, YCbCr, HSV and palettes converted by Pillow, LAB through its ICC profile;
    16-bit grey divided by its range (65535, or what a TIFF's BitsPerSample says); 32-bit integers by 65535 where they
    fit, else by their largest value; floats in [0, 1] times 255, others stretched from their least to their
    largest finite value;
    an image of more pixels than allowed is refused from its header, before anything is allocated;
    a truncated file is refused unless allowed, then what is missing stays as the format leaves it (grey or black).
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from segpipe.errors import ImageRejectedError
from segpipe.records import ImageHeader

UInt8Array = npt.NDArray[np.uint8]

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_TRANSPOSED = frozenset({5, 6, 7, 8})
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
_DEEP_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I", "F"})
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"})
# What broken metadata makes Pillow raise; a photograph with a broken tag is still a photograph.
_METADATA_ERRORS = (OSError, ValueError, SyntaxError, KeyError, TypeError, IndexError, struct.error, ZeroDivisionError)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An upright image.

    Attributes:
        header: as the file says.
        pixels: (H, W, 3) uint8 RGB, contiguous.
    """

    header: ImageHeader
    pixels: UInt8Array


def decode_image(data: bytes, *, max_pixels: int, allow_truncated: bool = False) -> DecodedImage:
    """Decode an image to upright RGB.

    Args:
        data: encoded bytes.
        max_pixels: refuse larger images before decoding them.
        allow_truncated: decode what there is of a file that was cut short.

    Raises:
        ImageRejectedError: if the bytes are no image, too large, or broken; carries the header where it was read.
    """
    if not data:
        raise ImageRejectedError("Empty", "the file has no bytes")
    header = None
    try:
        with _pillow_settings(allow_truncated=allow_truncated), _rejections(), _opened(data) as image:
            header = _header(image)
            if header.width * header.height > max_pixels:
                size = f"{header.width} x {header.height} = {header.width * header.height:,} px"
                raise ImageRejectedError("TooManyPixels", f"{size}, input.max_pixels allows {max_pixels:,}")
            # Pillow raises above twice its limit: frames and tiles that the header does not show are caught by it.
            Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)
            image.load()
            pixels = np.array(_to_rgb(_upright(image)))  # a copy: torch wants to own what it reads
    except ImageRejectedError as error:
        error.header = header
        raise
    return DecodedImage(replace(header, width=pixels.shape[1], height=pixels.shape[0]), pixels)


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise ImageRejectedError("UnsupportedFormat", "Pillow has no HEIC decoder; convert it to JPEG") from None
        raise ImageRejectedError("NotAnImage", "the bytes are in no image format that Pillow reads") from None


@contextmanager
def _rejections() -> Iterator[None]:
    """Turn whatever a decoder raises about bad bytes into a rejection with a stable text."""
    try:
        yield
    except (ImageRejectedError, MemoryError):
        raise  # lack of memory is the machine's fault, not the image's
    except Image.DecompressionBombError as error:
        raise ImageRejectedError("TooManyPixels", stable_text(error)) from None
    except Exception as error:  # noqa: BLE001
        # A decoder may raise anything on hostile bytes: this is the one image, and it becomes one failed row.
        message = stable_text(error)
        truncated = "truncated" in message.lower() or isinstance(error, EOFError)
        kind = "BrokenImage" if isinstance(error, OSError) else type(error).__name__
        raise ImageRejectedError("Truncated" if truncated else kind, message) from None


def stable_text(error: BaseException) -> str:
    """Return an error's text without addresses, paths and line breaks: the same on every worker and every try."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "<object>", text)
    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", ".../", text)[:300]


@contextmanager
def _pillow_settings(*, allow_truncated: bool) -> Iterator[None]:
    """Set Pillow's settings, which are global to the process, and put them back."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    # No limit while the header is read, so that the size of an image that is too large can be recorded.
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, allow_truncated
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes and broken tags; both are in the row
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _METADATA_ERRORS:
        return None
    return orientation if isinstance(orientation, int) else None


def _header(image: Image.Image) -> ImageHeader:
    orientation = _orientation(image)
    # Pillow turns TIFF files itself and gives their upright size from the start.
    turned = orientation in _TRANSPOSED and image.format != "TIFF"
    width, height = (image.height, image.width) if turned else (image.width, image.height)
    return ImageHeader(image.format or "", width, height, orientation)


def _upright(image: Image.Image) -> Image.Image:
    """Turn a loaded image as its EXIF orientation says; asked again after loading, when TIFF files have none left."""
    turn = _TURNS.get(_orientation(image) or 0)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB by the rules of this module."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_MODES:
        return Image.fromarray(_scale_to_bytes(image)).convert("RGB")
    if image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        if converted is None:
            raise ImageRejectedError("UnsupportedMode", "LAB image could not be converted to RGB")
        return converted
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_bytes(image: Image.Image) -> UInt8Array:
    """Scale a grey image of 16 or 32 bits to (H, W) uint8."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        finite = np.isfinite(values)
        low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        values = np.where(finite, values, low)
    else:
        low, high = 0.0, float(max(_declared_range(image), values.max() if image.mode == "I" else 0))
    scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _declared_range(image: Image.Image) -> int:
    """Return the largest value that a 16-bit image can hold: 4095 for a 12-bit TIFF, 65535 where nothing is said."""
    tags = getattr(image, "tag_v2", None)
    bits = tags.get(_BITS_PER_SAMPLE_TAG, (16,))[0] if tags is not None else 16
    return int((1 << bits) - 1) if 8 < bits <= 16 else 65535
