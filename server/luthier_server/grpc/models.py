"""Models, a thin layer over `references` and `registry`."""

from luthier.v1 import models_pb2 as md
from luthier_server.grpc import paging
from luthier_server.grpc.convert import model_proto
from luthier_server.references import References
from luthier_server.registry import Registry

TENANT = "default"


class ModelService:
    """luthier.v1.Models."""

    def __init__(self, registry: Registry, references: References) -> None:
        self._registry = registry
        self._references = references

    async def GetModel(self, request: md.GetModelRequest) -> md.GetModelResponse:
        """Returns a model."""
        return md.GetModelResponse(model=model_proto(await self._references.model(TENANT, request.model_id)))

    async def ListModels(self, request: md.ListModelsRequest) -> md.ListModelsResponse:
        """Lists models, newest first."""
        limit = paging.size(request)
        found = await self._registry.page(
            TENANT,
            below=paging.below(request, request.page_token),
            limit=limit + 1,
            id_prefix=request.id_prefix,
            name=request.name,
            tags=request.tags,
        )
        return md.ListModelsResponse(
            models=[model_proto(each) for each in found[:limit]],
            next_page_token=paging.token(request, found[limit - 1].id) if len(found) > limit else "",
        )
