"""Settings in sections of a YAML file: strict types, no unknown keys, one readable line for each mistake.

Knows how settings are declared, read and described; which there are stands in `config.py` and `finetuning/settings.py`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from segpipe.errors import ConfigError

Auto = Literal["auto"]
Root = TypeVar("Root", bound=BaseModel)


def setting(default: Any, description: str, *, changes_rows: bool = False, **bounds: Any) -> Any:
    """Declare one setting: default, what it means, and whether another value gives other rows."""
    return Field(default, description=description, json_schema_extra={"changes_rows": changes_rows}, **bounds)


class Section(BaseModel):
    """A section of the configuration: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def load_sections(kind: type[Root], file: str | Path | None, settings: Mapping[str, object] | None) -> Root:
    """Read a YAML file of sections, lay single settings over it, and check everything; see `load_config`."""
    tree = _read_yaml(Path(file), kind) if file is not None else {}
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        if not name:
            raise ConfigError(f"{key}: a setting is written section.key, for example model.score_threshold=0.5")
        branch = tree.setdefault(section, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"{section}: must be a section with keys, got {branch!r}")
        branch[name] = value
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = {_explain(problem, kind): None for problem in error.errors()}  # a union reports each member's view
        raise ConfigError("\n".join(problems)) from None


def parse_assignment(text: str) -> tuple[str, object]:
    """Split `section.key=value` and read the value as YAML, so that `0.5`, `true` and `[person]` get their types.

    Raises:
        ConfigError: if there is no `=`, or the value is no YAML.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: write it as section.key=value, for example model.score_threshold=0.5")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is no YAML ({_first_line(error)})") from None


def describe_sections(kind: type[BaseModel], *, title: str, examples: Mapping[str, object]) -> str:
    """Return a whole configuration as YAML with defaults and descriptions.

    Args:
        kind: of the configuration.
        title: first line of the file, a comment.
        examples: dotted key to value, for keys without a default.
    """
    lines = [f"# {title}", ""]
    for section_name, section in kind.model_fields.items():
        section_type = section.annotation
        if not (isinstance(section_type, type) and issubclass(section_type, Section)):
            raise TypeError(f"section {section_name} is no Section")
        lines.append(f"# {(section_type.__doc__ or '').strip()}")
        lines.append(f"{section_name}:")
        for name, field in section_type.model_fields.items():
            value = examples.get(f"{section_name}.{name}", field.default)
            lines.append(f"  # {field.description}")
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {name}: {text}")
        lines.append("")
    return "\n".join(lines)


def _read_yaml(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: no valid YAML ({_first_line(error)})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold the sections {', '.join(kind.model_fields)}, got {tree!r}")
    return tree


def _explain(problem: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """Turn one pydantic problem into one line: key, value, what is allowed."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location[:2])
    section = kind.model_fields.get(location[0])
    fields = getattr(section.annotation, "model_fields", {}) if section else {}
    if problem["type"] == "extra_forbidden":
        known = list(fields) if section else list(kind.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"{'.'.join(location)}: unknown {'key' if section else 'section'}.{hint} Known: {', '.join(known)}."
    field = fields.get(location[1]) if len(location) > 1 else None
    allowed = f" Allowed: {field.description}." if field is not None and field.description else ""
    if problem["type"] == "missing":
        option = {"input": "--input", "output": "--output"}.get(location[0], "--set")
        return f"{key}: is missing; give it in the file or with {option}.{allowed}"
    hint = f" Write it as a list: [{problem['input']}]." if problem["type"] == "list_type" else ""
    return f"{key}: {problem['input']!r} is not allowed.{hint}{allowed}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
