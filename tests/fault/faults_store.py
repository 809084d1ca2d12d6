"""The store fails: a call, the disk, a lock, bytes on the disk; and the clock is wrong."""

import asyncio
import shutil

import grpc
import grpc.aio
from daemon import small
from fault.clients import ENDED
from fault.scenario import Result, Stage, run

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.job_pb2 import Checkpoints, Hyperparameters, JobSpec

_HOUR = 3600


def _short() -> JobSpec:
    return small(hyperparameters=Hyperparameters(max_steps=6), checkpoints=Checkpoints(every_steps=3))


async def database_calls(seed: int, count: int, real: bool) -> Result:
    """The n-th call to the database fails, for n from `seed * count` on; each n is a life with a job of its own, which
    must reach its end in that life. With seed 0 the row goes on until a life passes without reaching its n."""

    async def inject(stage: Stage) -> int:
        site, clients = stage.site, stage.clients
        done = 0
        for number in range(stage.count):
            await site.kill()
            before = site.failpoint_hits()
            await _start_failing(stage, f"database_call=raise@{seed * stage.count + number + 1}")
            job = await clients.create(_short())
            if job is not None:
                clients.watch(job.id, plain=True)
                await _ends(stage, job.id)
            done += site.failpoint_hits() - before
            if site.failpoint_hits() == before:
                stage.notes["lives that passed"] += 1
        await site.kill()
        await site.start()
        return done

    return await run("database-call", seed, count, inject, real=real, tolerant=True, busy=False)


async def database_calls_often(seed: int, count: int, real: bool) -> Result:
    """The same for many n in one life: every so manieth call fails, while `count` jobs run one after the other."""

    async def inject(stage: Stage) -> int:
        site, clients = stage.site, stage.clients
        await site.kill()
        await _start_failing(stage, f"database_call=raise@{20 + seed}+{(17, 23, 31)[seed % 3]}")
        for _ in range(stage.count):
            job = await clients.create(_short())
            if job is not None:
                clients.watch(job.id, plain=True)
                await _ends(stage, job.id)
        await site.kill()
        await site.start()
        return site.failpoint_hits()

    return await run("database-call-often", seed, count, inject, real=real, tolerant=True, busy=False)


async def _start_failing(stage: Stage, failpoints: str) -> None:
    """Starts a server; one that meets the failing call before it serves must say so, and the next one comes up."""
    site = stage.site
    site.launch(LUTHIER_FAILPOINTS=failpoints)
    if not await site.ready():
        if (code := await site.gone(1)) != 2 or "luthierd: the database" not in site.log()[-500:]:
            site.recording.complaints.append(f"life {site.life} left with {code}: {site.log()[-1500:]}")
        await site.kill()
        await site.start()


async def _ends(stage: Stage, job_id: str) -> None:
    for _ in range(200):
        job = await stage.clients.get(job_id)
        if job is not None and job.state in ENDED:
            return
        if not stage.site.alive():
            stage.site.recording.complaints.append(
                f"life {stage.site.life} ended by itself: {stage.site.log()[-1500:]}"
            )
            await stage.site.kill()
            await stage.site.start()
        # Uneven, or the failing call falls into step with the scheduler and meets its every try.
        await asyncio.sleep(stage.dice.uniform(0.02, 0.2))
    stage.site.recording.complaints.append(f"stuck: {job_id} did not end although only one call in many failed")


async def disk_full(seed: int, count: int, real: bool) -> Result:
    """No file of server, host and trainers grows past a limit for a while, as on a full disk; then there is room."""

    async def inject(stage: Stage) -> int:
        site, dice = stage.site, stage.dice
        for _ in range(stage.count):
            await stage.clients.step()
            await asyncio.sleep(dice.uniform(0, 1))
            site.limit_files(dice.choice((1, 4096, 16384, 65536)))
            await asyncio.sleep(dice.uniform(0.5, 3))
            site.limit_files(-1)
        stage.notes["commits that failed"] += site.log().count("commit failed")
        return stage.count

    return await run("disk-full", seed, count, inject, real=real)


async def locked(seed: int, count: int, real: bool) -> Result:
    """Another process holds the write lock for one to eight seconds; the server waits for five."""

    async def inject(stage: Stage) -> int:
        for _ in range(stage.count):
            await stage.clients.step()
            await stage.site.hold_write_lock(stage.dice.uniform(1, 8))
        stage.notes["commits that failed"] += stage.site.log().count("commit failed")
        return stage.count

    return await run("database-locked", seed, count, inject, real=real)


async def clock_jumps(seed: int, count: int, real: bool) -> Result:
    """The server's clock is an hour wrong, from its start or in the middle of its life, and right again in the next."""

    async def inject(stage: Stage) -> int:
        site, dice = stage.site, stage.dice
        for _ in range(stage.count):
            await site.kill()
            offset = dice.choice((_HOUR, -_HOUR))
            await site.start(LUTHIER_CLOCK_OFFSET=f"{offset}@{dice.choice((0, 1))}")
            await stage.clients.step()
            if trainers := site.trainers():
                stage.site.kill_trainer(dice.choice(trainers))
            await asyncio.sleep(dice.uniform(0.5, 2))
        await site.kill()
        await site.start()
        return stage.count

    return await run("clock", seed, count, inject, real=real)


async def corruption(seed: int, count: int, real: bool) -> Result:
    """Bytes of a closed database are flipped. The server must refuse it, or say so, or never meet them; it must not
    hang, nor leave without words. After that the sound database is put back, and all is as before."""

    async def inject(stage: Stage) -> int:
        site, clients, dice = stage.site, stage.clients, stage.dice
        for _ in range(3):
            if job := await clients.create():
                clients.watch(job.id)
        await clients.finish()
        await site.stop()
        known = {job_id: list(log.values()) for job_id, log in site.recording.deaths[-1].rows.events.items()}
        sound = site.data_dir / "sound.db"
        shutil.copyfile(site.database, sound)
        for _ in range(stage.count):
            data = bytearray(sound.read_bytes())
            for _ in range(dice.choice((1, 4, 64, 1024))):
                data[dice.randrange(len(data))] ^= dice.randrange(1, 256)
            site.database.write_bytes(data)
            words = len(site.log())
            site.launch()
            outcome = await _meet(stage, known, words)
            stage.notes[outcome] += 1
            for left in ("luthier.db-wal", "luthier.db-shm"):
                (site.data_dir / left).unlink(missing_ok=True)
        shutil.copyfile(sound, site.database)
        sound.unlink()
        await site.start()
        return stage.count

    return await run("corruption", seed, count, inject, real=real, tolerant=True, busy=False)


async def _meet(stage: Stage, known: dict[str, list[JobEvent]], words: int) -> str:
    """How a server meets a damaged database: a word for the table; what must not be is a complaint."""
    site = stage.site

    def wrong(text: str) -> str:
        site.recording.complaints.append(f"corruption, life {site.life}: {text}; it said {site.log()[words:][-1200:]}")
        return "wrong"

    if not await site.ready(30):
        if site.alive():
            await site.kill(record=False)
            return wrong("does not start and does not end")
        code = await site.gone(1)
        await site.kill(record=False)
        said = site.log()[words:]
        return "refused" if code == 2 and "damaged" in said and "Traceback" not in said else wrong(f"exit code {code}")
    try:
        outcome = await asyncio.wait_for(_read_all(stage, known), 30)
    except TimeoutError:
        outcome = wrong("a call hangs")
    if not site.alive():
        said = site.log()[words:]
        outcome = "left with words" if "damaged" in said else wrong("left without words")
        if await site.gone(1) == 0:
            outcome = wrong("left with exit code 0")
    elif "Traceback" in site.log()[words:]:
        outcome = wrong("a traceback")
    await site.kill(record=False)
    return outcome


async def _read_all(stage: Stage, known: dict[str, list[JobEvent]]) -> str:
    stub = stage.clients.fine_tuning
    outcome = "unseen"
    for job_id, log in known.items():
        try:
            await stub.GetJob(ft.GetJobRequest(job_id=job_id), timeout=10, wait_for_ready=True)
            request = ft.WatchJobRequest(job_id=job_id)
            seen: list[JobEvent] = []
            async for response in stub.WatchJob(request, timeout=10):
                seen += response.events if response is not None else ()  # None: bytes that are no message
            if seen != log:
                outcome = "served as it is"  # SQLite has no checksums: a changed payload is a payload
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DATA_LOSS:
                return "detected"
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                outcome = "detected"
            elif (
                error.code() == grpc.StatusCode.INTERNAL and "deseriali" in str(error.details())
            ) or error.code() == grpc.StatusCode.OUT_OF_RANGE:
                outcome = "served as it is"
            else:
                stage.site.recording.complaints.append(
                    f"corruption: {error.code().name} {str(error.details())[:200]}: {stage.site.log()[-1500:]}"
                )
                return "wrong"
    return outcome
