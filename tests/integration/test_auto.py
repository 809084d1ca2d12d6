"""Numbers that rules decide, through a real luthierd."""

import uuid
from collections.abc import Callable

import grpc
import pytest
from daemon import Daemon, details, small

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.job_pb2 import AutoHyperparameter, JobSpec

Start = Callable[..., Daemon]
EVERY = (
    AutoHyperparameter.AUTO_HYPERPARAMETER_EPOCHS,
    AutoHyperparameter.AUTO_HYPERPARAMETER_BATCH_SIZE,
    AutoHyperparameter.AUTO_HYPERPARAMETER_LEARNING_RATE,
)


def test_rules_decide_what_a_job_leaves_to_them_and_its_log_says_why(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    spec = small(hyperparameters={"auto": EVERY})
    shown = daemon.fine_tuning.CreateJob(ft.CreateJobRequest(spec=spec, validate_only=True)).job.resolved_spec
    job = daemon.create(spec)
    assert list(job.spec.fine_tune.hyperparameters.auto) == list(EVERY)
    numbers = job.resolved_spec.fine_tune.hyperparameters
    assert shown.fine_tune.hyperparameters == numbers
    assert (numbers.epochs, numbers.batch_size, list(numbers.auto)) == (3, 4, [])
    assert numbers.learning_rate > 0
    first, *rest = list(daemon.watch(job.id))
    assert first.HasField("state_changed")
    told = [event.log_emitted.message for event in rest[:3]]
    assert told[0].startswith("auto: 3 epochs of ")
    assert told[1].startswith("auto: a batch of 4, ")
    assert told[2].startswith(f"auto: a learning rate of {numbers.learning_rate:g}, ")
    again = JobSpec()
    again.CopyFrom(job.resolved_spec)  # what was decided can be asked for
    assert daemon.create(again).resolved_spec.fine_tune.hyperparameters == numbers


def test_a_number_beside_its_rule_or_its_range_test_is_refused_by_name(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    numbers = {"auto": EVERY[:1], "epochs": 3, "find_learning_rate": True, "learning_rate": 1e-4}
    with pytest.raises(grpc.RpcError) as refused:
        daemon.create(small(hyperparameters=numbers), str(uuid.uuid4()))
    named = {each.field for each in details(refused.value)["BadRequest"].field_violations}
    path = "spec.fine_tune.hyperparameters"
    assert named == {f"{path}.epochs", f"{path}.learning_rate"}
