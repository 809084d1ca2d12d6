"""What models were made of, and what was made of them: bases, datasets, jobs, checkpoints, models, exports."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from luthier.v1.model_pb2 import LineageKind
from luthier_server.errors import NotFound
from luthier_server.references import References
from luthier_server.store.database import Database
from luthier_server.store.datasets import Dataset
from luthier_server.store.datasets import Datasets as DatasetRows
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.store.models import Model, Models

BASE = LineageKind.LINEAGE_KIND_BASE_MODEL
DATASET = LineageKind.LINEAGE_KIND_DATASET
JOB = LineageKind.LINEAGE_KIND_JOB
MODEL = LineageKind.LINEAGE_KIND_MODEL
EXPORT = LineageKind.LINEAGE_KIND_EXPORT
CHECKPOINT = LineageKind.LINEAGE_KIND_CHECKPOINT
_MOST_NODES = 2000


@dataclass(frozen=True, slots=True)
class Node:
    """A piece of lineage. name: for people; licence: of a base, where it is known; deleted: gone from the server."""

    id: str
    kind: LineageKind.ValueType
    name: str = ""
    licence: str = ""
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Edge:
    """That one piece went into another: `base`, `parent`, `training`, `validation`, `made`, `export` or `derived`."""

    from_id: str
    to_id: str
    relation: str


@dataclass
class Graph:
    """Pieces, each once, in the order in which they were found, and how they hang together."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[Edge, None] = field(default_factory=dict)

    def add(self, node: Node) -> bool:
        """Adds a piece; returns whether it is new."""
        if node.id in self.nodes:
            return False
        self.nodes[node.id] = node
        return True

    def join(self, from_id: str, to_id: str, relation: str) -> None:
        """Adds an edge."""
        self.edges[Edge(from_id, to_id, relation)] = None

    @property
    def full(self) -> bool:
        """Whether there are so many pieces that no more are looked for."""
        return len(self.nodes) >= _MOST_NODES


Products: TypeAlias = Callable[[str, Sequence[str]], Awaitable[Sequence[tuple[str, Node]]]]
"""Tells what else was made of models, by (tenant, their ids and the names of their checkpoints): pairs of what it was
made of and the piece."""


class Lineages:
    """Walks the lineage of the models of every tenant. exports: who is asked for the exports of models."""

    def __init__(self, database: Database, references: References, exports: Products | None = None) -> None:
        self._references = references
        self._models = Models(database)
        self._datasets = DatasetRows(database)
        self._jobs = JobRows(database)
        self._exports = exports

    async def of(self, tenant: str, model: Model) -> Graph:
        """The model, everything that it was made of, up to the bases that Luthier did not make, and everything that was
        made of it; of very many pieces about the first 2000."""
        graph = Graph()
        await self._origins(tenant, model, graph)
        made = [model.id, *await self._descendants(tenant, model, graph)]
        if self._exports is not None:
            for source, node in await self._exports(tenant, [*made, model.checkpoint] if model.checkpoint else made):
                graph.add(node)
                graph.join(source, node.id, "export")
        return graph

    async def _origins(self, tenant: str, model: Model, graph: Graph) -> None:
        walked: Model | None = model
        while walked is not None and graph.add(_model_node(walked)) and not graph.full:
            await self._job(tenant, walked, graph)
            for dataset_id, relation in (
                (walked.training_dataset, "training"),
                (walked.validation_dataset, "validation"),
            ):
                if dataset_id:
                    await self._dataset(tenant, dataset_id, graph)
                    graph.join(dataset_id, walked.id, relation)
            if not walked.parent_model:
                graph.add(Node(walked.base_model, BASE, walked.base_model, walked.base_licence))
                graph.join(walked.base_model, walked.id, "base")
                return
            graph.join(walked.parent_model, walked.id, "parent")
            parent = await self._models.get(tenant, walked.parent_model)
            if parent is None:
                graph.add(Node(walked.parent_model, MODEL, deleted=True))
            walked = parent

    async def _job(self, tenant: str, model: Model, graph: Graph) -> None:
        job = await self._jobs.get(tenant, model.job_id)
        spec = model.spec if job is None else job.spec
        graph.add(Node(model.job_id, JOB, spec.display_name if spec is not None else "", deleted=job is None))
        if not model.checkpoint:
            graph.join(model.job_id, model.id, "made")
        else:
            await self._checkpoint(tenant, model.checkpoint, graph)
            graph.join(model.checkpoint, model.id, "made")
        if spec is not None and (before := spec.fine_tune.resume_from):
            await self._checkpoint(tenant, before, graph)
            graph.join(before, model.id, "parent")

    async def _checkpoint(self, tenant: str, name: str, graph: Graph) -> None:
        job_id = name.partition(":")[0]
        job = await self._jobs.get(tenant, job_id)
        try:
            await self._references.find(tenant, name)
        except NotFound:
            graph.add(Node(name, CHECKPOINT, deleted=True))
        else:
            graph.add(Node(name, CHECKPOINT))
        graph.add(Node(job_id, JOB, job.spec.display_name if job is not None else "", deleted=job is None))
        graph.join(job_id, name, "made")

    async def _dataset(self, tenant: str, dataset_id: str, graph: Graph) -> None:
        """A dataset with those that it was made of."""
        waiting = [dataset_id]
        while waiting and not graph.full:
            wanted = waiting.pop()
            if wanted in graph.nodes:
                continue
            dataset = await self._datasets.by_id(tenant, wanted)
            graph.add(_dataset_node(wanted, dataset))
            if dataset is not None and dataset.lineage is not None:
                for parent in dataset.lineage.parents:
                    graph.join(parent, wanted, "derived")
                    waiting.append(parent)

    async def _descendants(self, tenant: str, model: Model, graph: Graph) -> list[str]:
        """Adds the models that went on from this one, over any number of generations; returns their ids."""
        found: list[str] = []
        waiting = [model]
        while waiting and not graph.full:
            parent = waiting.pop(0)
            for child in await self._models.children(tenant, parent.id):
                if graph.add(_model_node(child)):
                    waiting.append(child)
                    found.append(child.id)
                graph.join(parent.id, child.id, "parent")
        return found


def _model_node(model: Model) -> Node:
    return Node(model.id, MODEL, model.name)


def _dataset_node(dataset_id: str, dataset: Dataset | None) -> Node:
    if dataset is None:
        return Node(dataset_id, DATASET, deleted=True)
    return Node(dataset_id, DATASET, f"{dataset.name}@{dataset.version}")
