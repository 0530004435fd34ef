"""The tables as the contract has them: names, order, types and nulls, written out once more by hand."""

import pyarrow as pa

from segpipe.tables import CATEGORIES_SCHEMA, IMAGES_SCHEMA, INSTANCES_SCHEMA

IMAGES = """
image_id string, shard string, key string, ordinal int64?, sha256 string, byte_size int64, format string?, width int32?,
height int32?, exif_orientation int32?, status string, num_candidates int32, num_instances int32, instances_capped bool,
error_stage string?, error_type string?, error_message string?
"""
INSTANCES = """
image_id string, instance_id int32, category_id int32, category string, score float, mask_score float?, bbox_x float,
bbox_y float, bbox_w float, bbox_h float, area int64?, height int32, width int32, rle_counts string?
"""
CATEGORIES = "category_id int32, category string, contiguous_id int32?, is_thing bool"


def written_out(schema: pa.Schema) -> list[str]:
    return [f"{field.name} {field.type}{'?' if field.nullable else ''}" for field in schema]


def test_the_schemas_are_those_of_the_contract():
    for text, schema in ((IMAGES, IMAGES_SCHEMA), (INSTANCES, INSTANCES_SCHEMA), (CATEGORIES, CATEGORIES_SCHEMA)):
        assert written_out(schema) == [column.strip() for column in text.split(",")]
