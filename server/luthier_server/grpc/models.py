"""Models, a thin layer over the parts that it names."""

from dataclasses import dataclass

from luthier.v1 import models_pb2 as md
from luthier_server.aliases import Aliases
from luthier_server.cards import Cards
from luthier_server.deletions import Deletions
from luthier_server.grpc import paging
from luthier_server.grpc.convert import alias_proto, lineage_proto, model_proto, name_proto, version_proto
from luthier_server.lineage import Lineages
from luthier_server.references import References
from luthier_server.registrations import Registrations
from luthier_server.registry import Registry

TENANT = "default"


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What the service stands on."""

    registry: Registry
    references: References
    registrations: Registrations
    aliases: Aliases
    deletions: Deletions
    lineages: Lineages
    cards: Cards


class ModelService:
    """luthier.v1.Models."""

    def __init__(self, parts: ModelParts) -> None:
        self._registry = parts.registry
        self._references = parts.references
        self._registrations = parts.registrations
        self._aliases = parts.aliases
        self._deletions = parts.deletions
        self._lineages = parts.lineages
        self._cards = parts.cards

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

    async def UpdateModel(self, request: md.UpdateModelRequest) -> md.UpdateModelResponse:
        """Changes a model's tags or description."""
        model = await self._registrations.update(
            TENANT,
            request.model_id,
            set_tags=request.set_tags,
            remove_tags=request.remove_tags,
            description=request.description if request.HasField("description") else None,
        )
        return md.UpdateModelResponse(model=model_proto(model))

    async def DeleteModel(self, request: md.DeleteModelRequest) -> md.DeleteModelResponse:
        """Deletes a model that nothing depends on."""
        await self._deletions.delete(TENANT, request.model_id)
        return md.DeleteModelResponse()

    async def RegisterModel(self, request: md.RegisterModelRequest) -> md.RegisterModelResponse:
        """Makes a model or a checkpoint the next version of a name."""
        version = await self._registrations.register(TENANT, request.model_id, request.name)
        return md.RegisterModelResponse(version=version_proto(version))

    async def ListModelNames(self, request: md.ListModelNamesRequest) -> md.ListModelNamesResponse:
        """Lists names, by name."""
        limit = paging.size(request)
        above = paging.below(request, request.page_token)
        found = await self._aliases.page(TENANT, above=above, limit=limit + 1, prefix=request.prefix)
        return md.ListModelNamesResponse(
            names=[name_proto(each) for each in found[:limit]],
            next_page_token=paging.token(request, found[limit - 1].name) if len(found) > limit else "",
        )

    async def SetModelAlias(self, request: md.SetModelAliasRequest) -> md.SetModelAliasResponse:
        """Points an alias to a version."""
        alias = await self._aliases.set(TENANT, request.name, request.alias, request.version)
        return md.SetModelAliasResponse(alias=alias_proto(alias))

    async def RollbackModelAlias(self, request: md.RollbackModelAliasRequest) -> md.RollbackModelAliasResponse:
        """Points an alias to where it pointed before."""
        alias = await self._aliases.roll_back(TENANT, request.name, request.alias)
        return md.RollbackModelAliasResponse(alias=alias_proto(alias))

    async def DeleteModelAlias(self, request: md.DeleteModelAliasRequest) -> md.DeleteModelAliasResponse:
        """Deletes an alias."""
        await self._aliases.delete(TENANT, request.name, request.alias)
        return md.DeleteModelAliasResponse()

    async def GetModelCard(self, request: md.GetModelCardRequest) -> md.GetModelCardResponse:
        """Writes a model's card."""
        found = await self._references.find(TENANT, request.model_id)
        return md.GetModelCardResponse(markdown=await self._cards.write(TENANT, found))

    async def GetModelLineage(self, request: md.GetModelLineageRequest) -> md.GetModelLineageResponse:
        """Tells what a model was made of, and what was made of it."""
        model = await self._references.model(TENANT, request.model_id)
        return lineage_proto(await self._lineages.of(TENANT, model))
