"""What a reference to a tuned model means: `model_...`, `name` (its newest version), `name@3`, `name@production`, or a
checkpoint `job_...:step-200`. Every call that takes one asks here.

Names are of lower-case letters and ids of upper-case ones, but an id may be of digits alone: so names that begin as an
id does are refused where they are given. Hub ids have no `@`, aliases begin with a letter, and versions with a digit.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.v1.job_pb2 import JobSpec
from luthier_server.errors import InvalidArgument, NotFound, Violation
from luthier_server.job import Job
from luthier_server.store.database import Database
from luthier_server.store.jobs import Checkpoint
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.store.model_names import ModelNames, Name
from luthier_server.store.models import Model, Models

_MODEL_ID = re.compile(r"model_[0-9A-HJKMNP-TV-Z]{26}", re.ASCII)
_CHECKPOINT = re.compile(r"(?P<job>job_[0-9A-Z]{26}):step-(?P<step>[0-9]{1,12})", re.ASCII)
_NAMED = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})(?:@(?:(?P<version>[1-9][0-9]{0,8})|(?P<alias>[a-z][a-z0-9._-]{0,62})))?",
    re.ASCII,
)
_SHOWN = 10
_FORMS = "a model is model_..., name, name@3, name@alias or a checkpoint job_...:step-200"


@dataclass(frozen=True, slots=True)
class Found:
    """A tuned model on the server's disk. name: `model_...` or `job_...:step-200`; model: None for a checkpoint, and
    checkpoint None for a model; resolved_spec: None for models of older servers."""

    name: str
    directory: Path
    job_id: str
    resolved_spec: JobSpec | None
    model: Model | None = None
    checkpoint: Checkpoint | None = None


def is_model_id(text: str) -> bool:
    """Whether this has the form of a model's id."""
    return _MODEL_ID.fullmatch(text) is not None


class References:
    """Finds the tuned models of every tenant."""

    def __init__(self, database: Database, models_dir: Path, jobs_dir: Path) -> None:
        self._models = Models(database)
        self._names = ModelNames(database)
        self._jobs = JobRows(database)
        self._models_dir = models_dir
        self._jobs_dir = jobs_dir

    def directory(self, model_id: str) -> Path:
        """Where a model's files lie."""
        return self._models_dir / model_id

    async def find(self, tenant: str, reference: str) -> Found:
        """The model or checkpoint. Raises NotFound, which says what there is."""
        if match := _CHECKPOINT.fullmatch(reference):
            return await self.checkpoint(tenant, match["job"], int(match["step"]))
        model = await self.model(tenant, reference)
        return Found(model.id, self.directory(model.id), model.job_id, model.resolved_spec, model=model)

    async def model(self, tenant: str, reference: str) -> Model:
        """The model; a checkpoint is none. Raises NotFound, which says what there is."""
        model = await self._models.get(tenant, await self._model_id(tenant, reference))
        if model is None:
            newest = await self._models.newest_ids(tenant, 3)
            there = f"the newest are {', '.join(newest)}" if newest else "there is none"
            deleted = "it was deleted; " if await self._jobs.made(tenant, reference) else ""
            raise NotFound("model", reference, deleted + there)
        return model

    async def base(self, tenant: str, base_model: str) -> str:
        """A base model as a spec may keep it: the id of the model that `name@3` or `name@production` means now, and all
        else as it is. A bare name is a hub id. Raises InvalidArgument."""
        match = _NAMED.fullmatch(base_model)
        if match is None or "@" not in base_model:
            return base_model
        try:
            return await self._model_id(tenant, base_model)
        except NotFound as error:
            violation = Violation("spec.fine_tune.base_model", error.message)
            raise InvalidArgument(error.message, [violation], reason="MODEL_NOT_FOUND") from error

    async def checkpoint(self, tenant: str, job_id: str, step: int) -> Found:
        """The newest attempt's checkpoint of that step. Raises NotFound, which names the steps that there are."""
        job = await self._jobs.get(tenant, job_id)
        if job is None:
            raise NotFound("job", job_id)
        known = await self._jobs.checkpoints(tenant, job_id)
        kept = [each for each in known if self.checkpoint_dir(each).is_dir()]
        name = f"{job_id}:step-{step}"
        for each in kept:
            if each.step == step:
                return Found(name, self.checkpoint_dir(each), job_id, job.resolved_spec, checkpoint=each)
        there = sorted({each.step for each in kept})
        raise NotFound("checkpoint", name, f"the job has steps {', '.join(map(str, there)) or 'none'}")

    async def trained_revision(self, tenant: str, job: Job) -> str:
        """The revision of a job's base: the commit that it was trained on, where a model of it tells, else what was
        asked for, which may be a branch that has moved since."""
        task = job.resolved_spec.fine_tune
        _, commit = await self._models.of_same_base(tenant, job.id, task.base_model)
        return commit or task.base_model_revision

    def checkpoint_dir(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint's files lie, as long as it is kept."""
        return self._jobs_dir / checkpoint.job_id / "checkpoints" / checkpoint.directory

    async def _model_id(self, tenant: str, reference: str) -> str:
        """The id that a reference means; one that is an id already need not exist."""
        if is_model_id(reference):
            return reference
        if _CHECKPOINT.fullmatch(reference):
            raise NotFound("model", reference, "a checkpoint becomes one when it is registered (RegisterModel)")
        match = _NAMED.fullmatch(reference)
        if match is None:
            raise NotFound("model", reference, _FORMS)
        name = await self._names.get(tenant, match["name"])
        if not name.versions:
            raise NotFound("model", reference, await self._other_names(tenant, name.name))
        if match["alias"]:
            for alias in name.aliases:
                if alias.alias == match["alias"]:
                    return alias.model_id
            raise NotFound("model", reference, _aliases_of(name))
        if not match["version"]:
            return name.versions[0].model_id
        for version in name.versions:
            if version.version == int(match["version"]):
                return version.model_id
        raise NotFound("model", reference, await self.versions_of(tenant, name, int(match["version"])))

    async def _other_names(self, tenant: str, name: str) -> str:
        if await self._names.last_version(tenant, name):
            return "all versions of that name were deleted"
        names = await self._names.page(tenant, above="", limit=1000, prefix="")
        if near := difflib.get_close_matches(name, names, n=3):
            return f"did you mean {' or '.join(near)}?"
        return f"the names are {_listed(names)}" if names else "no model has a name yet (RegisterModel gives one)"

    async def versions_of(self, tenant: str, name: Name, missing: int) -> str:
        """What to say of a version that is not there."""
        deleted = "it was deleted; " if missing <= await self._names.last_version(tenant, name.name) else ""
        return f"{deleted}{name.name} has versions {_listed([str(each.version) for each in name.versions])}"


def _aliases_of(name: Name) -> str:
    if not name.aliases:
        return f"{name.name} has no alias, and versions {_listed([str(each.version) for each in name.versions])}"
    return f"{name.name} has aliases {_listed([each.alias for each in name.aliases])}"


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
