"""Which image and which category of a run are which of a COCO dataset: by name, never guessed from digits in it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from segpipe.coco.annotations import Annotations, GroupBy, category_names
from segpipe.errors import InputError


@dataclass
class ImageMatcher:
    """Finds the COCO id of a run's images by file name.

    An image is the one whose `file_name` equals its image_id or key; else the only one with the same last part.
    """

    annotations: Annotations
    _by_name: dict[str, int] = field(default_factory=dict, init=False)
    _by_last_part: dict[str, int] = field(default_factory=dict, init=False)
    _taken: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Index the dataset's file names."""
        names = {index: str(image["file_name"]) for index, image in self.annotations.images.items()}
        self._by_name = {name: index for index, name in names.items()}
        counts = Counter(map(_last_part, names.values()))
        self._by_last_part = {_last_part(name): index for index, name in names.items() if counts[_last_part(name)] == 1}

    def find(self, image_id: str, key: str) -> int | None:
        """Return the COCO id of an image of the run; None if the dataset has no such image.

        Raises:
            InputError: if another image of the run was found to be the same one.
        """
        for name in (image_id, key):
            found = self._by_name.get(name)
            if found is not None:
                break
        else:
            found = self._by_last_part.get(_last_part(key))
        if found is None:
            return None
        if self._taken.setdefault(found, image_id) != image_id:
            raise InputError(
                f"{self.annotations.uri}: its image {self.annotations.images[found]['file_name']} is two images of the "
                f"run, {self._taken[found]} and {image_id}; give annotations whose file names tell them apart"
            )
        return found

    @property
    def num_found(self) -> int:
        """Return how many images of the dataset were found in the run."""
        return len(self._taken)

    def missing(self) -> list[str]:
        """Return the file names that were not found."""
        return [str(image["file_name"]) for index, image in self.annotations.images.items() if index not in self._taken]


def match_categories(
    categories: Mapping[int, str], annotations: Annotations, *, by: GroupBy = "category"
) -> dict[int, int]:
    """Return the dataset's id of each of a run's categories that it has by name.

    Args:
        categories: of the run, id to name.
        annotations: the dataset.
        by: what the run's names are in the dataset: categories, or supercategories; the ids of the latter are the
            run's own.

    Raises:
        InputError: if not one name is the same.
    """
    if by == "supercategory":
        known = set(category_names(annotations, by=by))
        found = {index: index for index, name in categories.items() if name in known}
    else:
        counts = Counter(str(category["name"]) for category in annotations.categories.values())
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise InputError(f"{annotations.uri}: has more than one category called {twice[0]}; give each its own name")
        ids = {str(category["name"]): index for index, category in annotations.categories.items()}
        found = {index: ids[name] for index, name in categories.items() if name in ids}
    if not found:
        raise InputError(_nothing_in_common(categories.values(), annotations, by))
    return found


def _nothing_in_common(names: Iterable[str], annotations: Annotations, by: GroupBy) -> str:
    names = list(names)
    known = category_names(annotations, by=by)
    text = (
        f"{annotations.uri}: none of its categories ({', '.join(known[:6])}, ...) is one of the run's "
        f"({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
    )
    if by == "category" and set(names) & set(category_names(annotations, by="supercategory")):
        return f"{text}; the run has supercategories: add --by-supercategory"
    return f"{text}; annotate with the names that the model uses, or import results with the annotations' own"


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]
