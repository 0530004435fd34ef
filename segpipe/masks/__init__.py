"""Masks as COCO run-length codes, from low-resolution grids, without ever building a full-size mask."""
