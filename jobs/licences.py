"""List every package that segpipe needs, directly or not, with its version and licence: python jobs/licences.py.

Exit code 1 if one has a licence that is neither permissive nor a weak copyleft, or says none.
"""

import importlib.metadata
import re
import sys

from packaging.requirements import Requirement

_ALLOWED = re.compile(
    r"MIT|BSD|Apache|PSF|Python|ISC|MPL|Unlicense|HPND|0BSD|Zlib|CNRI|LGPL|NVIDIA|CC0|Public Domain|BlueOak",
    re.IGNORECASE,
)


# Packages without content of their own, that name others.
_EMPTY = frozenset({"cuda-toolkit"})


def main() -> int:
    """Walk the requirements from segpipe down; print a line for each package."""
    seen: dict[str, str] = {}
    waiting = ["segpipe"]
    while waiting:
        name = waiting.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or Python
        key = found.metadata["Name"].lower().replace("_", "-")
        if key in seen:
            continue
        seen[key] = f"{found.version}  {licence_of(found)}"
        for line in found.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": "data" if key == "ray" else ""}):
                waiting.append(requirement.name)
    for key, text in sorted(seen.items()):
        print(f"{key:<28} {text}")
    unknown = [key for key, text in seen.items() if key not in _EMPTY and not _ALLOWED.search(text.split("  ", 1)[1])]
    if unknown:
        print(f"to be looked at: {', '.join(sorted(unknown))}", file=sys.stderr)
    return 1 if unknown else 0


def licence_of(found: importlib.metadata.Distribution) -> str:
    """Return what a package says of its licence: the SPDX expression, else its classifiers, else its free text."""
    metadata = found.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [
        line.rsplit(" :: ", 1)[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")
    ]
    free = str(metadata.json.get("license", "")).strip().splitlines()
    return ", ".join(classifiers) or (free[0][:60] if free else "not stated")


if __name__ == "__main__":
    sys.exit(main())
