"""Hyperparameters that the server decides: what a job file means by `learning_rate: auto`."""

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from luthier.v1.job_pb2 import AutoHyperparameter, Hyperparameters
from luthier_client import enums

AUTO = "auto"
_NAMES = frozenset(enums.choices(AutoHyperparameter.DESCRIPTOR))


def may_be_auto(field: FieldDescriptor) -> bool:
    """Whether a rule of the server can decide a field."""
    owner = field.containing_type
    return owner is not None and owner.full_name == Hyperparameters.DESCRIPTOR.full_name and field.name in _NAMES


def leave_to_rule(numbers: Hyperparameters, name: str) -> None:
    """Lets the server's rule decide a hyperparameter, in place of a number."""
    value = AutoHyperparameter.ValueType(enums.number(AutoHyperparameter.DESCRIPTOR, name))
    _clear(numbers, name)
    if value not in numbers.auto:
        numbers.auto.append(value)


def make_way(numbers: Hyperparameters, name: str) -> None:
    """Takes away what a field that is set on top of others stands in for: a rule, a range test, or a number."""
    if name == "find_learning_rate":
        name = "learning_rate"
        numbers.ClearField("learning_rate")
    if name not in _NAMES:
        return
    decided = enums.number(AutoHyperparameter.DESCRIPTOR, name)
    kept = [each for each in numbers.auto if each != decided]
    del numbers.auto[:]
    numbers.auto.extend(kept)
    if name == "learning_rate":
        numbers.ClearField("find_learning_rate")


def _clear(numbers: Hyperparameters, name: str) -> None:
    message: Any = numbers
    message.ClearField(name)
    if name == "batch_size":
        numbers.ClearField("per_device_train_batch_size")
        numbers.ClearField("gradient_accumulation_steps")
    elif name == "learning_rate":
        numbers.ClearField("find_learning_rate")
