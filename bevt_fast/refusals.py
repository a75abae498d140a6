"""What pydantic finds wrong with a configuration, in our words: the key, what was expected, the nearest valid key."""

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def sentences(section: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence for each fault of `error`, which validating values as `section` raised; none is said twice."""
    faults = error.errors()
    meant = [fault for fault in faults if not _is_of_another_branch(fault, faults)]
    return list(dict.fromkeys(_sentence(section, fault) for fault in meant))


def _sentence(section: type[BaseModel], fault: Any) -> str:
    """One pydantic fault in our words: 'Config has no key 'clip'; did you mean 'clips'?'."""
    # union branches appear in the location as class names; keys of the file never start with a capital or hold a
    # bracket
    path = [str(step) for step in fault["loc"] if not (isinstance(step, str) and (step[:1].isupper() or "[" in step))]
    owner = _section_at(section, path[:-1])
    prefix = "".join(f"{step}: " for step in path[:-1])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], owner.model_fields, n=1, cutoff=0.5) if owner else []
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(owner.model_fields)}" if owner else ""
        return f"{prefix}{owner.__name__ if owner else 'this section'} has no key {path[-1]!r}{hint}"
    if fault["type"] == "missing" and owner is None:
        return f"{prefix}too few values, got {fault['input']!r}"
    if fault["type"] == "missing":
        return f"{prefix}{owner.__name__ if owner else 'this section'} needs the key {path[-1]!r}"
    where = "".join(f"{step}: " for step in path)
    if fault["type"] == "literal_error":
        return f"{where}expected one of {fault['ctx']['expected']}, got {fault['input']!r}".replace(" or ", ", ")
    if fault["type"] == "value_error":
        return f"{where}{fault['ctx']['error']}"
    return f"{where}{fault['msg'][:1].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _is_of_another_branch(fault: Any, faults: list[Any]) -> bool:
    """Whether a fault belongs to a branch of a union that was not meant: a name where a section stands, or the other
    way round.
    """
    others = [other for other in faults if other is not fault and other["loc"][:-1] == fault["loc"][:-1]]
    if fault["type"] == "literal_error":
        return isinstance(fault["input"], dict)
    return fault["type"] == "model_type" and any(other["type"] == "literal_error" for other in others)


def _section_at(section: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The section type at `path` below `section`, to name it and its keys."""
    for step in path:
        field = section.model_fields.get(step)
        if field is None:
            return None
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return None
        section = sections[0]
    return section
