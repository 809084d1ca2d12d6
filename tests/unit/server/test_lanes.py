"""Every task has a lane, and a slot is held by one attempt at a time."""

from luthier.v1.export_task_pb2 import ExportTask
from luthier.v1.job_pb2 import FineTuneTask, JobSpec
from luthier_server.lanes import _LANE_OF_TASK, Lane, Slots, lane_of


def test_every_task_of_the_contract_has_a_lane() -> None:
    assert set(_LANE_OF_TASK) == {each.name for each in JobSpec.DESCRIPTOR.oneofs_by_name["task"].fields}
    assert lane_of(JobSpec(fine_tune=FineTuneTask())) == Lane.DEVICE
    assert lane_of(JobSpec(export=ExportTask())) == Lane.CPU


def test_a_slot_of_an_earlier_server_is_held_once_and_given_back_only_where_it_is_one_of_this_servers() -> None:
    slots = Slots(2)
    slots.hold(1)
    slots.hold(5)
    assert slots.take() == 0
    assert not slots.are_free
    slots.give_back(5)
    assert not slots.are_free
    slots.give_back(1)
    slots.give_back(1)
    assert slots.take() == 1
    assert not slots.are_free
