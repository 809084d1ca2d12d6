"""Job files: YAML (or JSON) to JobSpec, and `--set` on top.

Everything is driven by the descriptors of the contract: field names in snake_case (or proto JSON's camelCase), enums by
their short names, numbers by the field's own type, so `1e-4` is a number although YAML 1.1 reads it as a string, and
`auto` where the server's rules can decide a number. All mistakes of a file are reported at once, each with its line and
the nearest name.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from luthier.v1.job_pb2 import Hyperparameters, JobSpec
from luthier_client import auto, enums
from luthier_client.errors import SpecFileError

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def load_spec(path: str | os.PathLike[str]) -> JobSpec:
    """Reads a job file. Raises OSError, and SpecFileError with every mistake."""
    return parse_spec(Path(path).read_text(encoding="utf-8-sig"), str(path))


def parse_spec(text: str, name: str = "spec") -> JobSpec:
    """Reads the text of a job file; `name` stands before line numbers. Raises SpecFileError with every mistake."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise SpecFileError(f"{place}: {problem}", reason="SPEC_SYNTAX", violations=[(place, problem)]) from error
    spec = JobSpec()
    reading = _Reading(name)
    if root is not None:
        reading.message(root, spec, "")
    if reading.mistakes:
        place, description = reading.mistakes[0]
        more = f" (and {len(reading.mistakes) - 1} more)" if len(reading.mistakes) > 1 else ""
        raise SpecFileError(f"{place}: {description}{more}", reason="SPEC_INVALID", violations=reading.mistakes)
    return spec


def spec_fields(message: Any) -> dict[str, Any]:
    """The fields that are set, as a job file writes them: enums by their short names, numbers as numbers."""
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        if is_map(field):
            fields[field.name] = dict(value)
        elif field.is_repeated:
            enum = field.enum_type
            fields[field.name] = [each if enum is None else enums.short(enum, each) for each in value]
        elif field.message_type is not None:
            fields[field.name] = spec_fields(value)
        elif field.enum_type is not None:
            fields[field.name] = enums.short(field.enum_type, value)
        else:
            fields[field.name] = value
    return fields


def apply_settings(spec: JobSpec, settings: Iterable[str]) -> None:
    """Sets fields from `KEY=VALUE` texts, in order.

    KEY is a path such as `fine_tune.hyperparameters.learning_rate`, or any end of it that fits one field only
    (`learning_rate`, `lora.rank`, `labels.team`). A list is written `[a, b]`; several settings of one list add up. A
    message without fields is written `full=`. Raises SpecFileError.
    """
    lists: set[str] = set()
    for setting in settings:
        key, separator, value = setting.partition("=")
        place = f"--set {setting}"
        try:
            if not separator or not key.strip():
                raise ValueError("expected KEY=VALUE")
            path = find_path(key.strip())
            _assign(spec, path, value.strip(), lists)
        except ValueError as error:
            raise SpecFileError(
                f"{place}: {error}", reason="SETTING_INVALID", violations=[(place, str(error))]
            ) from error


def find_path(key: str) -> str:
    """The full path of a field from any end of it. Raises ValueError when none or several fit."""
    asked = key.replace("-", "_").split(".")
    ends: list[str] = []
    for path, field in field_paths(JobSpec.DESCRIPTOR):
        parts = path.split(".")
        # The key of a map is the caller's own word, so it is left out of the comparison.
        compared = asked[:-1] if is_map(field) else asked
        if compared and parts[-len(compared) :] == compared:
            found = f"{path}.{key.split('.')[-1]}" if is_map(field) else path
            if compared == parts:
                return found
            ends.append(found)
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ValueError(f"{key!r} can be {' or '.join(ends)}: write more of it")
    raise ValueError(f"there is no field {key!r}{_did_you_mean(key)}")


class _Reading:
    """One walk through a YAML tree; collects the mistakes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.mistakes: list[tuple[str, str]] = []

    def message(self, node: yaml.Node, message: Any, path: str) -> None:
        message.SetInParent()
        if _is_null(node):
            return
        if not isinstance(node, yaml.MappingNode):
            self._mistake(node, f"{path or 'a job'} is a mapping of fields, not {_kind(node)}")
            return
        descriptor: Descriptor = message.DESCRIPTOR
        by_name = {name: field for field in descriptor.fields for name in (field.name, field.json_name)}
        seen: dict[str, str] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            field = by_name.get(key)
            if field is None:
                self._mistake(key_node, f"unknown key {key!r} in {path or 'the job'}{_did_you_mean(key, descriptor)}")
                continue
            group = _exclusive(field)
            if group in seen:
                other = seen[group]
                what = (
                    f"{key!r} stands here twice" if other == field.name else f"{key!r} and {other!r} exclude each other"
                )
                self._mistake(key_node, what)
                continue
            seen[group] = field.name
            self._field(value, message, field, f"{path}.{field.name}" if path else field.name)

    def _field(self, node: yaml.Node, message: Any, field: FieldDescriptor, path: str) -> None:
        if is_map(field):
            self._map(node, message, field, path)
        elif field.is_repeated:
            # One value is a list of one: `target_modules: all-linear`.
            for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                self._scalar(item, field, path, getattr(message, field.name).append)
        elif field.message_type is not None:
            self.message(node, getattr(message, field.name), path)
        elif auto.may_be_auto(field) and node.value == auto.AUTO:
            auto.leave_to_rule(message, field.name)
        else:
            self._scalar(node, field, path, lambda value: setattr(message, field.name, value))

    def _map(self, node: yaml.Node, message: Any, field: FieldDescriptor, path: str) -> None:
        if _is_null(node):
            return
        if not isinstance(node, yaml.MappingNode):
            self._mistake(node, f"{path} is a mapping, not {_kind(node)}")
            return
        target = getattr(message, field.name)
        value_field = _value_field(field)
        for key, value in node.value:
            self._scalar(
                value, value_field, f"{path}.{key.value}", lambda each, key=key: target.update({key.value: each})
            )

    def _scalar(self, node: yaml.Node, field: FieldDescriptor, path: str, store: Any) -> None:
        if not isinstance(node, yaml.ScalarNode):
            self._mistake(node, f"{path} is {_expected(field)}, not {_kind(node)}")
        elif _is_null(node) and not node.style:
            self._mistake(node, f"{path} has no value: {_expected(field)} is expected")
        else:
            try:
                store(_value(field, node.value))
            except ValueError as error:
                self._mistake(node, f"{path}: {error}")

    def _mistake(self, node: yaml.Node, description: str) -> None:
        self.mistakes.append((f"{self._name}:{node.start_mark.line + 1}", description))


def _assign(spec: JobSpec, path: str, text: str, lists: set[str]) -> None:
    message: Any = spec
    parts = path.split(".")
    for index, part in enumerate(parts):
        field = message.DESCRIPTOR.fields_by_name[part]
        if is_map(field):
            getattr(message, part)[parts[index + 1]] = _value(_value_field(field), text)
            return
        if index < len(parts) - 1:
            message = getattr(message, part)
            message.SetInParent()
        elif field.is_repeated:
            if path not in lists:
                message.ClearField(part)
                lists.add(path)
            getattr(message, part).extend(_value(field, item) for item in _items(text))
        elif field.message_type is not None:
            if text not in ("", "{}"):
                raise ValueError(f"{path} has fields of its own: set one of those, or write {part}= to choose it")
            getattr(message, part).SetInParent()
        elif auto.may_be_auto(field) and text == auto.AUTO:
            auto.leave_to_rule(message, part)
        else:
            value = _value(field, text)
            if isinstance(message, Hyperparameters):
                auto.make_way(message, part)
            setattr(message, part, value)


def _items(text: str) -> list[str]:
    if not text.startswith("["):
        return [text]
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no list") from error
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raise ValueError(f"{text!r} is no list of values")
    return [item.value for item in node.value]


def _value(field: FieldDescriptor, text: str) -> Any:
    """The text as the field's own type. Raises ValueError."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return text
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return enums.number(field.enum_type, text)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if text.lower() not in _BOOLS:
            raise ValueError(f"{text!r} is not true or false")
        return _BOOLS[text.lower()]
    try:
        if kind in _FLOATS:
            return float(text)
        value = int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {_expected(field)}") from None
    low, high = _INTEGERS[kind]
    if not low <= value <= high:
        raise ValueError(f"{text} is too large or too small")
    return value


def _expected(field: FieldDescriptor) -> str:
    if field.cpp_type in _INTEGERS:
        return "a whole number"
    if field.cpp_type in _FLOATS:
        return "a number"
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return "one of " + ", ".join(enums.choices(field.enum_type))
    return "true or false" if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else "a text"


def field_paths(
    descriptor: Descriptor, prefix: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """Every field below a message as (dotted path, descriptor), messages included; stops at a message inside itself."""
    for field in descriptor.fields:
        path = prefix + field.name
        yield path, field
        inner = field.message_type
        if inner is not None and not is_map(field) and not field.is_repeated and inner.full_name not in above:
            yield from field_paths(inner, path + ".", above | {inner.full_name})


def _did_you_mean(key: str, here: Descriptor | None = None) -> str:
    """`; did you mean ...?`: the nearest field of this message, else one of the same name elsewhere in the job."""
    if here is not None:
        near = difflib.get_close_matches(key, [field.name for field in here.fields], n=1)
        if near and near[0] != key:
            return f"; did you mean {near[0]!r}?"
    leaf = key.split(".")[-1]
    everywhere = [path for path, _ in field_paths(JobSpec.DESCRIPTOR)]
    same = [path for path in everywhere if path.split(".")[-1] == leaf]
    if not same:
        near = difflib.get_close_matches(leaf, [path.split(".")[-1] for path in everywhere], n=1)
        same = [path for path in everywhere if near and path.split(".")[-1] == near[0]]
    return f"; did you mean {' or '.join(same)}?" if same else ""


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field is a map, which is a repeated message of its own kind."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _value_field(field: FieldDescriptor) -> FieldDescriptor:
    """The value of a map's entries."""
    entry: Any = field.message_type
    value: FieldDescriptor = entry.fields_by_name["value"]
    return value


def _exclusive(field: FieldDescriptor) -> str:
    """The name of what may be given only once: the field, or the oneof that it shares with others."""
    # A proto3 `optional` field is alone in a oneof that protoc makes for it.
    oneof = field.containing_oneof
    return field.name if oneof is None or len(oneof.fields) == 1 else f"oneof {oneof.name}"


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)
