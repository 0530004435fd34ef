"""Decoding: any mode to upright RGB by stated rules, and every bad file a rejection with a stable text."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from segpipe.errors import ImageRejectedError
from segpipe.images import decode_image, stable_text
from tests.factory import encode

MAX_PIXELS = 200_000_000


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decode(data: bytes, **options) -> np.ndarray:
    return decode_image(data, max_pixels=MAX_PIXELS, **options).pixels


@pytest.fixture
def scene() -> np.ndarray:
    """Return 20 x 30 px whose corners tell every turn and flip apart."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)


def test_rgb_pixels_come_out_as_they_went_in(scene):
    decoded = decode_image(encode(scene), max_pixels=MAX_PIXELS)
    assert (decoded.pixels == scene).all()
    assert decoded.pixels.flags.writeable
    assert (decoded.header.format, decoded.header.width, decoded.header.height) == ("PNG", 30, 20)
    assert decoded.header.exif_orientation is None


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(scene, orientation, kind):
    """2 to 8 turn the image; 0 and 9 are invalid, recorded and ignored. Pillow turns TIFF by itself, once."""
    image = Image.fromarray(scene)
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(image, kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as plain:
        plain.load()
        expected = np.asarray(ImageOps.exif_transpose(plain))
    decoded = decode_image(data, max_pixels=MAX_PIXELS)
    assert (decoded.pixels == expected).all()
    assert decoded.header.exif_orientation == orientation
    assert (decoded.header.height, decoded.header.width) == decoded.pixels.shape[:2]
    assert decoded.pixels.shape[:2] == ((30, 20) if orientation in (5, 6, 7, 8) else (20, 30))


def test_the_same_photograph_in_every_orientation_decodes_to_the_same_picture(exif_orientation):
    """Landscape_0 to _8 and Portrait_0 to _8 show the same thing upright; JPEG rounding is all that differs."""
    for name in ("Landscape", "Portrait"):
        pictures = [decode((exif_orientation / f"{name}_{index}.jpg").read_bytes()) for index in range(1, 9)]
        assert {picture.shape for picture in pictures} == {pictures[0].shape}
        for picture in pictures[1:]:
            assert np.abs(picture.astype(int) - pictures[0]).mean() < 12


def test_alpha_is_composited_over_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3], rgba[1, :, 3] = [0, 128, 255], 255
    pixels = decode(saved(Image.fromarray(rgba), "PNG"))
    assert pixels[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    grey_alpha = np.dstack([np.full((1, 1), 10, np.uint8), np.zeros((1, 1), np.uint8)])
    assert decode(saved(Image.fromarray(grey_alpha), "PNG")).tolist() == [[[255, 255, 255]]]


def test_a_palette_with_transparency_is_composited_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode(saved(image, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert decode(saved(image, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_one_bit_and_cmyk_become_rgb():
    assert decode(saved(Image.new("L", (1, 1), 77), "PNG")).tolist() == [[[77, 77, 77]]]
    assert decode(saved(Image.new("1", (1, 1), 1), "PNG")).tolist() == [[[255, 255, 255]]]
    assert decode(saved(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).tolist() == [[[255, 0, 0]]]
    assert decode(saved(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"))[0, 0].min() > 230


def test_16_bit_grey_is_scaled_by_its_range_not_by_its_content():
    dark = np.array([[0, 257, 6553]], np.uint16)
    assert decode(saved(Image.fromarray(dark), "PNG"))[..., 0].tolist() == [[0, 1, 25]]
    full = np.array([[0, 32768, 65535]], np.uint16)
    assert decode(saved(Image.fromarray(full), "TIFF"))[..., 0].tolist() == [[0, 128, 255]]


def test_32_bit_images_are_scaled_by_what_they_hold():
    integers = np.array([[0, 1000, 65535]], np.int32)
    assert decode(saved(Image.fromarray(integers), "TIFF"))[..., 0].tolist() == [[0, 4, 255]]
    large = np.array([[0, 1 << 19, 1 << 20]], np.int32)
    assert decode(saved(Image.fromarray(large), "TIFF"))[..., 0].tolist() == [[0, 128, 255]]
    unit = np.array([[0, 0.5, 0.8]], np.float32)
    assert decode(saved(Image.fromarray(unit), "TIFF"))[..., 0].tolist() == [[0, 128, 204]]
    wide = np.array([[-10, 0, 10, np.nan]], np.float32)
    assert decode(saved(Image.fromarray(wide), "TIFF"))[..., 0].tolist() == [[0, 128, 255, 0]]
    nothing = np.full((1, 2), np.nan, np.float32)
    assert decode(saved(Image.fromarray(nothing), "TIFF"))[..., 0].tolist() == [[0, 0]]


def test_animations_and_multi_page_files_give_their_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data)[0, 0].tolist() == [255, 0, 0], kind


def test_too_many_pixels_are_refused_from_the_header(odd_images):
    """A 44-byte GIF claims 4.4 gigapixels; nothing of that size is ever allocated, and its size is recorded."""
    with pytest.raises(ImageRejectedError, match="65535 x 66601 = 4,364,696,535 px, input.max_pixels allows") as caught:
        decode((odd_images / "decompression_bomb.gif").read_bytes())
    assert caught.value.error_type == "TooManyPixels"
    assert caught.value.header.height == 66601


def test_max_pixels_is_exact(scene):
    data = encode(scene)
    assert decode_image(data, max_pixels=600).pixels.shape == (20, 30, 3)
    with pytest.raises(ImageRejectedError, match="30 x 20 = 600 px, input.max_pixels allows 599"):
        decode_image(data, max_pixels=599)


def test_a_frame_larger_than_its_header_says_is_refused(odd_images):
    """decompression_bomb_extents.gif shows a small screen and a frame beyond it: Pillow's own limit still holds."""
    data = (odd_images / "decompression_bomb_extents.gif").read_bytes()
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(data, max_pixels=1000)
    assert caught.value.error_type == "TooManyPixels"


def test_a_truncated_file_is_refused_unless_allowed(scene):
    noisy = Image.fromarray(np.random.default_rng(1).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    data = saved(noisy, "JPEG", quality=95)[:20_000]
    with pytest.raises(ImageRejectedError, match="truncated") as caught:
        decode(data)
    assert caught.value.error_type == "Truncated"
    assert (caught.value.header.format, caught.value.header.width) == ("JPEG", 200)
    pixels = decode(data, allow_truncated=True)
    assert pixels.shape == (200, 200, 3)
    assert (pixels[:20] != pixels[-1]).any()


@pytest.mark.parametrize(
    ("data", "error_type"),
    [
        (b"", "Empty"),
        (b"not an image at all", "NotAnImage"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "UnsupportedFormat"),
        (b"\x89PNG\r\n\x1a\n", "NotAnImage"),
    ],
)
def test_bytes_that_are_no_image_are_rejected(data, error_type):
    with pytest.raises(ImageRejectedError) as caught:
        decode(data)
    assert caught.value.error_type == error_type
    assert "0x" not in str(caught.value)


def test_pillows_global_settings_are_put_back(scene):
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    decode(encode(scene), allow_truncated=True)
    with pytest.raises(ImageRejectedError):
        decode(b"nothing")
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_lack_of_memory_is_not_the_images_fault(scene, monkeypatch):
    def no_memory(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", no_memory)
    with pytest.raises(MemoryError):
        decode(encode(scene))


def test_error_texts_hold_no_address_and_no_path():
    error = OSError("cannot identify <_io.BytesIO object at 0x7f1d2bb8cb80> in /tmp/ray/session_1/worker-3/a.jpg\nbye")
    assert stable_text(error) == "cannot identify <object> in .../a.jpg bye"
    assert stable_text(EOFError()) == "EOFError"


def test_every_odd_file_decodes_or_is_rejected(odd_images):
    """250 awkward files: nothing but a rejection ever comes out, and most decode."""
    rejected = {}
    files = sorted(odd_images.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            try:
                decoded = decode_image(file.read_bytes(), max_pixels=MAX_PIXELS)
            except ImageRejectedError as error:
                rejected[file.name] = error.error_type
                assert str(error)
                assert "0x" not in str(error)
            else:
                assert decoded.pixels.dtype == np.uint8
                assert decoded.pixels.shape == (decoded.header.height, decoded.header.width, 3)
    assert len(files) > 200
    assert len(rejected) < 30
    assert rejected["truncated_jpeg.jpg"] == "Truncated"
    assert rejected["decompression_bomb.gif"] == "TooManyPixels"
