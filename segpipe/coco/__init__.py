"""COCO's JSON formats: datasets with annotations, and results, to and from the tables of a lake."""
