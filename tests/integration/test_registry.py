"""Names, versions, aliases, tags, lineage and cards of models, on a real server whose trainers compute nothing."""

import concurrent.futures
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import Daemon, details, kinds, puppet, reason, small

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.job_pb2 import Checkpoints, Job, JobState
from luthier.v1.model_pb2 import LineageKind, Model, ModelAlias, ModelVersion

Start = Callable[..., Daemon]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("registry"), puppet(steps=4, step_seconds=0.0)).start()
    daemon.upload()
    yield daemon
    daemon.close()


def made(daemon: Daemon, **task: Any) -> Job:
    job = daemon.wait(daemon.create(small(**task)).id)
    assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
    return job


def model(daemon: Daemon, reference: str) -> Model:
    return daemon.models.GetModel(md.GetModelRequest(model_id=reference)).model


def register(daemon: Daemon, reference: str, name: str) -> ModelVersion:
    return daemon.models.RegisterModel(md.RegisterModelRequest(model_id=reference, name=name)).version


def point(daemon: Daemon, name: str, version: int, alias: str = "production") -> ModelAlias:
    request = md.SetModelAliasRequest(name=name, alias=alias, version=version)
    return daemon.models.SetModelAlias(request).alias


def roll_back(daemon: Daemon, name: str, alias: str = "production") -> ModelAlias:
    return daemon.models.RollbackModelAlias(md.RollbackModelAliasRequest(name=name, alias=alias)).alias


def delete(daemon: Daemon, model_id: str) -> None:
    daemon.models.DeleteModel(md.DeleteModelRequest(model_id=model_id))


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value


def said(error: grpc.RpcError) -> str:
    return str(getattr(error, "details", lambda: "")())


def test_a_finished_job_is_the_next_version_of_the_name_it_asked_for_and_keeps_its_spec(daemon: Daemon) -> None:
    first, second = (made(daemon, model_name="helper", suffix="x") for _ in range(2))
    moved = [e.state_changed for e in daemon.watch(second.id) if e.HasField("state_changed")][-1]
    assert (kinds(daemon.watch(second.id))[-1], moved.message) == ("SUCCEEDED", "the model is helper@2")
    found = model(daemon, "helper")
    assert [(each.name, each.version, each.model_id) for each in found.versions] == [("helper", 2, second.model_id)]
    assert found.spec == second.spec
    assert found.resolved_spec == second.resolved_spec
    assert found.resolved_spec.fine_tune.hyperparameters.learning_rate > 0
    assert model(daemon, "helper@1").id == first.model_id
    listed = daemon.models.ListModels(md.ListModelsRequest(name="helper")).models
    assert [each.id for each in listed] == [second.model_id, first.model_id]
    assert not listed[0].HasField("spec")
    assert listed[0].versions[0].version == 2
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=first.id))
    assert model(daemon, "helper@1").spec == first.spec


def test_registrations_of_one_name_at_once_give_each_model_a_version_of_its_own_and_each_but_one(
    daemon: Daemon,
) -> None:
    models = [made(daemon).model_id for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda each: register(daemon, each, "crowd"), models * 2))
    assert sorted(each.version for each in versions[:4]) == [1, 2, 3, 4]
    assert [each.version for each in versions[4:]] == [each.version for each in versions[:4]]
    assert [each.model_id for each in versions] == models * 2


def test_an_alias_moves_and_rolls_back_one_place_further_each_time(daemon: Daemon) -> None:
    for _ in range(3):
        made(daemon, model_name="mover")
    for version in (1, 2, 3):
        assert point(daemon, "mover", version).version == version
    assert len(point(daemon, "mover", 3).history) == 3  # where it points already: no move
    assert roll_back(daemon, "mover").version == 2
    alias = roll_back(daemon, "mover")
    assert [(each.version, each.rollback) for each in alias.history] == [
        (1, True),
        (2, True),
        (3, False),
        (2, False),
        (1, False),
    ]
    assert model(daemon, "mover@production").id == alias.model_id == model(daemon, "mover@1").id
    assert model(daemon, "mover@1").aliases == ["mover@production"]
    nowhere = refusal(lambda: roll_back(daemon, "mover"))
    assert (nowhere.code(), reason(nowhere)) == (grpc.StatusCode.FAILED_PRECONDITION, "ALIAS_HAS_NO_EARLIER_PLACE")
    point(daemon, "mover", 3)
    assert roll_back(daemon, "mover").version == 1
    for move in range(60):
        point(daemon, "mover", 2 + move % 2)
    assert len(point(daemon, "mover", 1).history) == 50
    daemon.models.DeleteModelAlias(md.DeleteModelAliasRequest(name="mover", alias="production"))
    gone = refusal(lambda: model(daemon, "mover@production"))
    assert "mover has no alias, and versions 3, 2, 1" in said(gone)
    assert reason(refusal(lambda: roll_back(daemon, "mover"))) == "MODEL_ALIAS_NOT_FOUND"
    assert reason(refusal(lambda: point(daemon, "mover", 9))) == "MODEL_VERSION_NOT_FOUND"


def test_a_version_that_was_deleted_is_never_given_again_and_says_so(daemon: Daemon) -> None:
    jobs = [made(daemon, model_name="mortal") for _ in range(2)]
    for version in (1, 2):
        point(daemon, "mortal", version)
    delete(daemon, jobs[0].model_id)
    missing = refusal(lambda: model(daemon, "mortal@1"))
    assert missing.code() == grpc.StatusCode.NOT_FOUND
    assert said(missing).endswith("it was deleted; mortal has versions 2")
    assert "which was deleted" in said(refusal(lambda: roll_back(daemon, "mortal")))
    daemon.models.DeleteModelAlias(md.DeleteModelAliasRequest(name="mortal", alias="production"))
    delete(daemon, jobs[1].model_id)
    assert "all versions of that name were deleted" in said(refusal(lambda: model(daemon, "mortal")))
    assert not daemon.models.ListModelNames(md.ListModelNamesRequest(prefix="mortal")).names
    assert register(daemon, made(daemon).model_id, "mortal").version == 3
    assert not (daemon.data_dir / "models" / jobs[0].model_id).exists()


def test_what_is_not_there_is_told_with_what_there_is(daemon: Daemon) -> None:
    made(daemon, model_name="answers")
    for reference, hint in (
        ("answer", "did you mean answers?"),
        ("answers@production", "answers has no alias, and versions 1"),
        ("answers@7", "answers has versions 1"),
        ("model_01ARZ3NDEKTSV4RRFFQ69G5FAV", "the newest are model_"),
        ("../../etc/passwd", "a model is model_..., name, name@3"),
        ("job_01ARZ3NDEKTSV4RRFFQ69G5FAV:step-1", "there is no job"),
    ):
        error = refusal(lambda reference=reference: model(daemon, reference))  # type: ignore[misc]
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert hint in said(error) or reference.startswith("job_")
    for call in (
        lambda: daemon.models.GetModelCard(md.GetModelCardRequest(model_id="answers@7")),
        lambda: daemon.models.GetModelLineage(md.GetModelLineageRequest(model_id="answers@7")),
        lambda: list(daemon.models.DownloadModel(md.DownloadModelRequest(model_id="answers@7"))),
    ):
        assert "answers has versions 1" in said(refusal(call))


@pytest.mark.parametrize(
    "name", ["", "model_1", "job_7:step-1", "export_x", "../up", "a/b", "Upper", "a..b", "end.", "a@1", "x" * 64]
)
def test_a_name_that_looks_like_an_id_or_a_path_is_refused(daemon: Daemon, name: str) -> None:
    there = daemon.models.ListModels(md.ListModelsRequest(page_size=1)).models
    model_id = there[0].id if there else "model_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    assert refusal(lambda: register(daemon, model_id, name)).code() == grpc.StatusCode.INVALID_ARGUMENT
    if name:
        refused = refusal(lambda: daemon.create(small(model_name=name)))
        assert [each.field for each in details(refused)["BadRequest"].field_violations] == ["spec.fine_tune.model_name"]


def test_a_checkpoint_becomes_a_model_once_without_what_only_a_trainer_needs(daemon: Daemon) -> None:
    job = made(daemon, checkpoints=Checkpoints(every_steps=2, keep=5), suffix="half")
    name = f"{job.id}:step-2"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda each: register(daemon, name, each), ["early", "early", "soon", "soon"]))
    assert len({each.model_id for each in versions}) == 1
    found = model(daemon, "early@1")
    assert (found.checkpoint, found.step, found.job_id) == (name, 2, job.id)
    assert found.name == "tiny-half-step-2"
    assert [each.name for each in found.versions] == ["early", "soon"]
    directory = daemon.data_dir / "models" / found.id
    assert [each.name for each in directory.iterdir()] == ["luthier.json"]
    assert json.loads((directory / "luthier.json").read_text())["checkpoint"] == name
    folders = {each.name for each in (daemon.data_dir / "models").iterdir()}
    assert folders == {each.id for each in daemon.models.ListModels(md.ListModelsRequest(page_size=1000)).models}
    state = daemon.data_dir / "jobs" / job.id / "checkpoints" / "000004-a1" / "state.json"
    state.write_text("{")
    damaged = refusal(lambda: register(daemon, f"{job.id}:step-4", "late"))
    assert reason(damaged) == "CHECKPOINT_DAMAGED"
    assert "job has steps 2, 4" in said(refusal(lambda: register(daemon, f"{job.id}:step-3", "late")))
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=job.id))
    assert list(daemon.models.DownloadModel(md.DownloadModelRequest(model_id="early")))


def test_a_name_with_a_version_or_alias_is_a_base_model_and_a_bare_one_is_not(daemon: Daemon) -> None:
    parent = made(daemon, model_name="root")
    point(daemon, "root", 1)
    # A puppet's model has no weights, which the look at the base says of the very directory that was meant.
    for reference in ("root@1", "root@production"):
        refused = refusal(lambda reference=reference: daemon.create(small(base_model=reference)))  # type: ignore[misc]
        assert reason(refused) == "MODEL_NOT_FOUND"
        assert "config.json is missing" in said(refused), said(refused)
    missing = refusal(lambda: daemon.create(small(base_model="root@staging")))
    assert (missing.code(), reason(missing)) == (grpc.StatusCode.INVALID_ARGUMENT, "MODEL_NOT_FOUND")
    assert "root has aliases production" in said(missing)
    hub = daemon.create(small(base_model="root"))
    assert daemon.get(hub.id).resolved_spec.fine_tune.base_model == "root"
    daemon.wait(hub.id)
    assert model(daemon, parent.model_id).parent_model == ""


def test_tags_and_a_description_are_set_removed_listed_by_and_bounded(daemon: Daemon) -> None:
    job = made(daemon)

    def update(**fields: Any) -> Model:
        return daemon.models.UpdateModel(md.UpdateModelRequest(model_id=job.model_id, **fields)).model

    tagged = update(set_tags={"team": "search", "tier": "gold"}, description="answers questions")
    assert (dict(tagged.tags), tagged.description) == ({"team": "search", "tier": "gold"}, "answers questions")
    assert dict(update(set_tags={"tier": "iron"}, remove_tags=["team", "never"]).tags) == {"tier": "iron"}
    assert update(description="").description == ""

    def listed(**tags: str) -> list[str]:
        return [each.id for each in daemon.models.ListModels(md.ListModelsRequest(tags=tags)).models]

    update(set_tags={"place": "here"})
    assert listed(tier="iron", place="here") == [job.model_id]
    assert listed(tier="iron", place="there") == []
    assert refusal(lambda: update(set_tags={"a": "1"}, remove_tags=["a"])).code() == grpc.StatusCode.INVALID_ARGUMENT
    update(set_tags={f"k{n}": "" for n in range(30)})
    many = refusal(lambda: update(set_tags={"one": "more"}))
    assert "makes 33 tags" in said(many)
    assert "one" not in model(daemon, job.model_id).tags


def test_pages_of_names_are_in_order_and_bound_to_their_arguments(daemon: Daemon) -> None:
    job = made(daemon)
    for name in ("pg-c", "pg-a", "pg-b"):
        register(daemon, job.model_id, name)
    point(daemon, "pg-a", 1, "live")
    first = daemon.models.ListModelNames(md.ListModelNamesRequest(page_size=2, prefix="pg-"))
    assert [each.name for each in first.names] == ["pg-a", "pg-b"]
    assert first.names[0].aliases[0].alias == "live"
    assert first.names[0].aliases[0].history[0].version == 1
    token = first.next_page_token
    second = daemon.models.ListModelNames(md.ListModelNamesRequest(page_size=2, prefix="pg-", page_token=token))
    assert ([each.name for each in second.names], second.next_page_token) == (["pg-c"], "")
    other = md.ListModelNamesRequest(prefix="p", page_token=token)
    assert refusal(lambda: daemon.models.ListModelNames(other)).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_restart_keeps_everything_and_sweeps_what_no_model_is(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=2, step_seconds=0.0))
    daemon.upload()
    job = made(daemon, model_name="kept")
    point(daemon, "kept", 1)
    daemon.models.UpdateModel(md.UpdateModelRequest(model_id="kept", set_tags={"a": "b"}, description="d"))
    before = model(daemon, "kept@production")
    daemon.kill()
    folder = daemon.data_dir / "models"
    for left in (".gone-model_", ".new-model_", ".tmp-model_", "model_"):
        (folder / f"{left}01ARZ3NDEKTSV4RRFFQ69G5FAV").mkdir()
    (folder / "somebody-elses").mkdir()
    daemon.start()
    assert model(daemon, "kept@production") == before
    assert {each.name for each in folder.iterdir()} == {job.model_id, "somebody-elses"}


def with_weights(daemon: Daemon, job: Job) -> str:
    """Gives the model of a puppet the files of a whole one, so that jobs can go on from it; returns its id."""
    tiny = Path(__file__).parents[2] / "trainer" / "luthier_trainer" / "builtin" / "tiny"
    shutil.copytree(tiny, daemon.data_dir / "models" / job.model_id, dirs_exist_ok=True)
    return job.model_id


def test_a_model_is_not_deleted_while_anything_depends_on_it_and_each_thing_is_named(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=4, step_seconds=0.0))
    daemon.upload()
    parent = with_weights(daemon, made(daemon, model_name="needed"))
    point(daemon, "needed", 1)
    point(daemon, "needed", 1, "staging")
    child = made(daemon, base_model="needed@production")
    assert model(daemon, child.model_id).parent_model == parent
    daemon.close()
    daemon = daemons(*puppet(steps=1000, step_seconds=0.05))
    waiting = [daemon.create(small(base_model=parent)) for _ in range(2)]
    paused = waiting[1]
    daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=paused.id))
    refused = refusal(lambda: delete(daemon, parent))
    assert (refused.code(), reason(refused)) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE")
    found = [(each.type, each.subject) for each in details(refused)["PreconditionFailure"].violations]
    assert found == [
        ("ALIAS", "needed@production"),
        ("ALIAS", "needed@staging"),
        ("MODEL", child.model_id),
        *(("JOB", each.id) for each in waiting),
    ]
    assert (daemon.data_dir / "models" / parent).is_dir()
    for job in waiting:
        daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    for job in waiting:
        daemon.wait(job.id)
    for alias in ("production", "staging"):
        daemon.models.DeleteModelAlias(md.DeleteModelAliasRequest(name="needed", alias=alias))
    for by_name in ("needed", "needed@1", f"{child.id}:step-1", "../models"):
        assert refusal(lambda name=by_name: delete(daemon, name)).code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[misc]
    delete(daemon, child.model_id)
    delete(daemon, parent)
    assert reason(refusal(lambda: delete(daemon, parent))) == "MODEL_NOT_FOUND"
    assert "it was deleted; there is none" in said(refusal(lambda: model(daemon, parent)))
    assert not list((daemon.data_dir / "models").iterdir())
    assert reason(refusal(lambda: daemon.create(small(base_model=parent)))) == "MODEL_NOT_FOUND"


def test_lineage_goes_up_to_the_base_and_down_to_every_descendant(daemon: Daemon) -> None:
    rows = daemon.upload(b"".join(b'{"prompt": "p%d", "completion": "c"}\n' % n for n in range(20)), "lineage")
    split = daemon.datasets.DeriveDataset(
        ds.DeriveDatasetRequest(split=ds.SplitDataset(dataset=rows.id, validation=0.5))
    ).datasets
    root = made(daemon, model_name="line", training_dataset=split[0].id, validation_dataset=split[1].id)
    middle = made(daemon, base_model=with_weights(daemon, root), checkpoints=Checkpoints(every_steps=2))
    early = register(daemon, f"{middle.id}:step-2", "early-line").model_id
    leaf = made(daemon, base_model=with_weights(daemon, middle))
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=root.id))
    found = daemon.models.GetModelLineage(md.GetModelLineageRequest(model_id=middle.model_id))
    nodes = {each.id: each for each in found.nodes}
    edges = {(each.from_id, each.to_id, each.relation) for each in found.edges}
    assert edges == {
        ("builtin/tiny", root.model_id, "base"),
        (root.id, root.model_id, "made"),
        (split[0].id, root.model_id, "training"),
        (split[1].id, root.model_id, "validation"),
        (rows.id, split[0].id, "derived"),
        (rows.id, split[1].id, "derived"),
        (root.model_id, middle.model_id, "parent"),
        (middle.id, middle.model_id, "made"),
        (middle.resolved_spec.fine_tune.training_dataset, middle.model_id, "training"),
        (middle.model_id, leaf.model_id, "parent"),
    }
    assert {each for edge in edges for each in edge[:2]} == set(nodes)
    assert nodes["builtin/tiny"].kind == LineageKind.LINEAGE_KIND_BASE_MODEL
    assert (nodes[rows.id].name, nodes[rows.id].kind) == ("lineage@1", LineageKind.LINEAGE_KIND_DATASET)
    assert {each.id for each in found.nodes if each.deleted} == {root.id}
    from_checkpoint = daemon.models.GetModelLineage(md.GetModelLineageRequest(model_id=early))
    kinds_of = {each.id: each.kind for each in from_checkpoint.nodes}
    assert kinds_of[f"{middle.id}:step-2"] == LineageKind.LINEAGE_KIND_CHECKPOINT
    made_of = {(each.from_id, each.to_id) for each in from_checkpoint.edges if each.relation == "made"}
    assert {(middle.id, f"{middle.id}:step-2"), (f"{middle.id}:step-2", early)} <= made_of
    whole = daemon.models.GetModelLineage(md.GetModelLineageRequest(model_id="line"))
    assert {middle.model_id, early, leaf.model_id} <= {each.id for each in whole.nodes}
    card = daemon.models.GetModelCard(md.GetModelCardRequest(model_id=leaf.model_id)).markdown
    for fact in ("builtin/tiny", root.model_id, middle.model_id, "rows@1"):
        assert fact in card
    assert "step-2" in daemon.models.GetModelCard(md.GetModelCardRequest(model_id=f"{middle.id}:step-2")).markdown


def test_another_tenants_models_names_and_aliases_are_not_there(daemon: Daemon) -> None:
    job = made(daemon, model_name="theirs")
    point(daemon, "theirs", 1)
    daemon.models.UpdateModel(md.UpdateModelRequest(model_id="theirs", set_tags={"whose": "theirs"}))
    with sqlite3.connect(daemon.data_dir / "luthier.db") as database:
        database.execute("PRAGMA foreign_keys=OFF")
        database.execute("UPDATE models SET tenant = 'other' WHERE id = ?", (job.model_id,))
        for table in ("model_names", "model_versions", "model_aliases", "model_alias_moves"):
            database.execute(f"UPDATE {table} SET tenant = 'other' WHERE name = 'theirs'")
        database.execute("UPDATE model_tags SET tenant = 'other' WHERE model_id = ?", (job.model_id,))
    for call in (
        lambda: model(daemon, job.model_id),
        lambda: model(daemon, "theirs"),
        lambda: model(daemon, "theirs@production"),
        lambda: delete(daemon, job.model_id),
        lambda: point(daemon, "theirs", 1),
        lambda: roll_back(daemon, "theirs"),
        lambda: register(daemon, job.model_id, "mine"),
    ):
        assert refusal(call).code() == grpc.StatusCode.NOT_FOUND
    assert not daemon.models.ListModels(md.ListModelsRequest(tags={"whose": "theirs"})).models
    assert not daemon.models.ListModelNames(md.ListModelNamesRequest(prefix="theirs")).names
    assert register(daemon, made(daemon).model_id, "theirs").version == 1
