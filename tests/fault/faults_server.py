"""The server is killed: while it starts, while it works, and at every failpoint."""

import asyncio

from fault.scenario import Result, Stage, run
from fault.site import FAILPOINT_EXIT

POINTS = (
    "before_commit",
    "after_commit_before_publish",
    "between_page_and_live",
    "after_terminal_before_status",
    "after_insert_attempt_before_start",
    "after_start_before_follow",
    "before_spool_ingest",
    "after_lock_before_settle",
    "before_serving",
)
ACTIONS = ("exit", "sleep:0.4", "raise")


async def kills(seed: int, count: int, real: bool) -> Result:
    """SIGKILL: every second one up to two seconds after a start, the others up to five after an observed step."""

    async def inject(stage: Stage) -> int:
        site, dice = stage.site, stage.dice
        for number in range(stage.count):
            if number % 2:
                await asyncio.sleep(dice.uniform(0, 2))
            else:
                await site.ready()
                await stage.clients.step(60 if real else 10)
                await asyncio.sleep(dice.uniform(0, 5))
            await site.kill()
            site.launch()
        await site.ready()
        return stage.count

    return await run("server-kill", seed, count, inject, real=real)


async def failpoints(seed: int, count: int, real: bool) -> Result:
    """The server leaves, waits or fails at a named point. `count` lives, each with the next point and action."""

    async def inject(stage: Stage) -> int:
        site, dice = stage.site, stage.dice
        plan = [(point, action) for action in ACTIONS for point in POINTS]
        for number in range(stage.count):
            point, action = plan[(seed * stage.count + number) % len(plan)]
            await site.kill()
            before = site.failpoint_hits()
            at = 1 if point in ("before_serving", "after_terminal_before_status") else dice.randrange(1, 6)
            site.launch(LUTHIER_FAILPOINTS=f"{point}={action}@{at}+{dice.randrange(2, 9)}")
            code = await site.gone(8 if action == "exit" else dice.uniform(1.5, 3))
            if code is not None and code != FAILPOINT_EXIT and point != "before_serving":
                stage.notes["ended by itself"] += 1
            stage.notes[f"{point} {action.partition(':')[0]}"] += bool(site.failpoint_hits() > before)
        await site.kill()
        await site.start()
        return site.failpoint_hits()

    return await run("failpoint", seed, count, inject, real=real, tolerant=True)


async def known_bad(seed: int, count: int, real: bool) -> Result:
    """The build that publishes before it commits, and dies between the two: the oracle must object."""

    async def inject(stage: Stage) -> int:
        site = stage.site
        for _ in range(stage.count):
            await site.kill()
            point = f"before_commit=exit@{stage.dice.randrange(10, 40)}"
            site.launch(LUTHIER_KNOWN_BAD="publish-before-commit", LUTHIER_FAILPOINTS=point)
            await site.gone(10)
        await site.kill()
        await site.start()
        return stage.count

    return await run("known-bad", seed, count, inject, real=real)
