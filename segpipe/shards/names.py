"""What file names say about content."""

# Formats that Pillow decodes; HEIC is listed so that it ends as a failed row with a hint, not unseen.
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp",
    ".avif", ".avifs", ".heic", ".heif", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".ppm", ".pgm",
    ".pbm", ".pnm", ".pfm", ".mpo", ".psd", ".dds", ".tga", ".ico", ".pcx", ".sgi", ".rgb", ".rgba", ".bw",
    ".qoi",
})  # fmt: skip
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MANIFEST_SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")


def is_image_name(name: str) -> bool:
    """Tell whether a file or member name is an image's; hidden files (`.x`, macOS's `._x`) are not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and "." in base and f".{base.rsplit('.', 1)[-1].lower()}" in IMAGE_SUFFIXES


def is_tar_name(name: str) -> bool:
    """Tell whether a file name is a tar archive's."""
    return name.lower().endswith(TAR_SUFFIXES)


def is_parquet_name(name: str) -> bool:
    """Tell whether a file name is a Parquet file's."""
    return name.lower().endswith((".parquet", ".parq"))


def is_manifest_name(name: str) -> bool:
    """Tell whether a file name may be a manifest's."""
    return name.lower().endswith(MANIFEST_SUFFIXES)
