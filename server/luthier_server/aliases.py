"""Names of models with their versions, and aliases that move between them."""

from collections.abc import Callable, Sequence

from luthier_server.errors import FailedPrecondition, NotFound
from luthier_server.store import model_names as rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.model_names import Alias, Move, Name
from luthier_server.store.models import Version


class Aliases:
    """The names and aliases of every tenant."""

    def __init__(self, database: Database, *, clock: Callable[[], int]) -> None:
        self._database = database
        self._rows = rows.ModelNames(database)
        self._clock = clock

    async def page(self, tenant: str, *, above: str, limit: int, prefix: str) -> list[Name]:
        """Names with their versions and aliases, in order, from above `above` (empty: from the first)."""
        names = await self._rows.page(tenant, above=above, limit=limit, prefix=prefix)
        return [await self._rows.get(tenant, name) for name in names]

    async def set(self, tenant: str, name: str, alias: str, version: int) -> Alias:
        """Points an alias to a version; to point it where it points already moves nothing. Raises NotFound, which names
        the versions that there are."""

        async def work(transaction: Transaction) -> Alias:
            there = await rows.versions(transaction, tenant, name)
            if not any(each.version == version for each in there):
                raise NotFound("model version", f"{name}@{version}", _there(name, there))
            now = await rows.alias(transaction, tenant, name, alias)
            if now is None or now.version != version:
                last = now.moves[0].number if now is not None else 0
                move = Move(last + 1, version, before=last, time=self._clock(), rollback=False)
                await rows.move(transaction, tenant, name, alias, move)
            return await _known(transaction, tenant, name, alias)

        return await self._database.write(work)

    async def roll_back(self, tenant: str, name: str, alias: str) -> Alias:
        """Points an alias to where it pointed before its last move; once more goes one move further back, and so on.

        After 1, 2, 3 the first goes to 2, the second to 1, and a third is refused; where 4 is set in between, the next
        goes back from 4. Raises NotFound, and FailedPrecondition when it never pointed elsewhere, when that is more
        than 50 moves ago, and when that version was deleted.
        """

        async def work(transaction: Transaction) -> Alias:
            now = await _known(transaction, tenant, name, alias)
            there = await rows.versions(transaction, tenant, name)
            newest = now.moves[0]
            target = next((each for each in now.moves if each.number == newest.before), None)
            if target is None:
                raise _nowhere(now, "no earlier place is known", there)
            if not any(each.version == target.version for each in there):
                raise _nowhere(now, f"it pointed to version {target.version}, which was deleted", there)
            move = Move(newest.number + 1, target.version, before=target.before, time=self._clock(), rollback=True)
            await rows.move(transaction, tenant, name, alias, move)
            return await _known(transaction, tenant, name, alias)

        return await self._database.write(work)

    async def delete(self, tenant: str, name: str, alias: str) -> None:
        """Deletes an alias with its history; the versions stay. Raises NotFound."""

        async def work(transaction: Transaction) -> None:
            await _known(transaction, tenant, name, alias)
            await rows.delete_alias(transaction, tenant, name, alias)

        await self._database.write(work)


async def _known(transaction: Transaction, tenant: str, name: str, alias: str) -> Alias:
    found = await rows.alias(transaction, tenant, name, alias)
    if found is None:
        others = await rows.aliases(transaction, tenant, name)
        hint = f"{name} has aliases {', '.join(others)}" if others else "that name has no alias"
        raise NotFound("model alias", f"{name}@{alias}", hint)
    return found


def _nowhere(alias: Alias, why: str, there: Sequence[Version]) -> FailedPrecondition:
    return FailedPrecondition(
        f"'{alias.name}@{alias.alias}' points to version {alias.version}, and cannot be rolled back: {why}. Set it:"
        f" {_there(alias.name, there)}",
        subject=f"{alias.name}@{alias.alias}",
        reason="ALIAS_HAS_NO_EARLIER_PLACE",
    )


def _there(name: str, versions: Sequence[Version]) -> str:
    if not versions:
        return "that name has no version"
    return f"{name} has versions {', '.join(str(each.version) for each in versions[:20])}"
