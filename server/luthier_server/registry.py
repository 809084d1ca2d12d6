"""Models: what a job can start from, and what jobs made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier_server.errors import InvalidArgument, Violation
from luthier_server.references import is_model_id
from luthier_server.store.database import Database
from luthier_server.store.models import Model, Models
from luthier_server.workers import Workers


class Registry:
    """The models of every tenant, over `models/ID`."""

    def __init__(self, database: Database, models_dir: Path, workers: Workers, roots: Sequence[Path]) -> None:
        self._rows = Models(database)
        self._models_dir = models_dir
        self._workers = workers
        self._roots = tuple(roots)
        self._builtin: dict[str, ModelReport] = {}

    def directory(self, model_id: str) -> Path:
        """Where a model's files lie."""
        return self._models_dir / model_id

    async def page(
        self, tenant: str, *, below: str, limit: int, id_prefix: str, name: str, tags: Mapping[str, str]
    ) -> list[Model]:
        """Models newest first, with ids below `below` (empty: from the newest)."""
        return await self._rows.page(tenant, below=below, limit=limit, id_prefix=id_prefix, name=name, tags=tags)

    async def base(self, tenant: str, base_model: str) -> ModelReport:
        """Where a job's base model comes from. Raises InvalidArgument with what is wrong with it.

        A hub id is taken on trust here: only the trainer may reach the network.
        """
        if base_model in self._builtin:
            return self._builtin[base_model]
        if not base_model.isprintable():
            rule = Violation("spec.fine_tune.base_model", "holds characters that no name or path has")
            raise InvalidArgument(f"{rule.field}: {rule.description}", [rule], reason="MODEL_NOT_FOUND")
        name = base_model
        if base_model.startswith("model_"):
            if not is_model_id(base_model) or await self._rows.get(tenant, base_model) is None:
                raise InvalidArgument(
                    f"there is no model '{base_model}'",
                    [Violation("spec.fine_tune.base_model", f"there is no model '{base_model}': see ListModels")],
                    reason="MODEL_NOT_FOUND",
                )
            name = str(self.directory(base_model).resolve())
        report = await self._workers.inspect_model(name, [*self._roots, self._models_dir.resolve()])
        if report.problem or not report.found:
            raise InvalidArgument(
                report.problem or f"there is no model '{base_model}'",
                [Violation("spec.fine_tune.base_model", report.problem or "is not known")],
                reason="MODEL_NOT_FOUND",
            )
        if base_model.startswith("builtin/"):
            self._builtin[base_model] = report
        return report
