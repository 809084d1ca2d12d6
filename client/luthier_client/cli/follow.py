"""Following a job to its end: live on a terminal, as lines or JSON elsewhere."""

import contextlib
import sys
import threading
from collections.abc import Iterator

import click

from luthier.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_QUEUED, JOB_STATE_SUCCEEDED
from luthier_client import LuthierError, Unavailable, WatchOptions
from luthier_client.cli import card, output
from luthier_client.cli.lazy import Settings
from luthier_client.cli.lines import LineWriter
from luthier_client.cli.picture import JobPicture
from luthier_client.handle import JobHandle

_AWAY = {"UNREACHABLE": "the server does not answer", "CONNECTION_LOST": "the connection broke"}
SUCCEEDED, FAILED, CANCELLED, DETACHED = 0, 1, 3, 130
_FIRST_POLL, _POLL = 0.3, 2.0


def follow(chosen: Settings, job: JobHandle, *, hints: bool = True) -> int:
    """Watches a job from its first event and returns the exit code. Ctrl-C leaves the watch and cancels nothing."""
    picture = JobPicture(job.proto)
    try:
        if chosen.output == "json":
            _json(job, picture)
        elif chosen.output == "id":
            _silent(job, picture)
        elif sys.stdout.isatty():
            _live(job, picture)
        else:
            _plain(job, picture)
    except KeyboardInterrupt:
        click.echo(f"\nleft the watch; the job goes on: luthier job watch {job.id}", err=True)
        return DETACHED
    if chosen.output == "id":
        click.echo(job.id)
    if chosen.output == "table":
        card.closing_card(picture)
        if hints:
            card.next_commands(picture)
    return exit_code(picture.state)


def exit_code(state: int) -> int:
    """0 succeeded, 3 cancelled, 1 otherwise."""
    if state == JOB_STATE_SUCCEEDED:
        return SUCCEEDED
    return CANCELLED if state == JOB_STATE_CANCELLED else FAILED


def _json(job: JobHandle, picture: JobPicture) -> None:
    with contextlib.closing(job.watch()) as events:
        for event in events:
            picture.add(event)
            click.echo(output.json_line(event))
            sys.stdout.flush()


def _silent(job: JobHandle, picture: JobPicture) -> None:
    with contextlib.closing(job.watch()) as events:
        for event in events:
            picture.add(event)


def _plain(job: JobHandle, picture: JobPicture) -> None:
    def away(attempt: int, error: LuthierError) -> None:
        if attempt == 2:
            click.echo(f"reconnecting: {output.clean(_AWAY.get(error.reason, error.message))}", err=True)

    click.echo(f"watching {job.id}")
    writer = LineWriter(picture, click.echo)
    with contextlib.closing(job.watch(options=WatchOptions(on_reconnect=away))) as events:
        for event in events:
            picture.add(event)
            writer.add(event)
            if event.state_changed.reason and picture.state == JOB_STATE_QUEUED and picture.attempt:
                _tell_next_try(job, event.sequence)
    writer.flush()


def _tell_next_try(job: JobHandle, sequence: int) -> None:
    """Prints when a lost attempt is tried again, if that is what the job still waits for."""
    try:
        seen = job.refresh()
    except LuthierError:
        return
    if seen.last_sequence == sequence and seen.retry_time.seconds:
        click.echo(f"{' ' * 8}  tries again at {output.clock(seen.retry_time.seconds)}")


def _live(job: JobHandle, picture: JobPicture) -> None:
    from luthier_client.cli.live import live

    def away(attempt: int, error: LuthierError) -> None:
        picture.notice = f"reconnecting (try {attempt}): {_AWAY.get(error.reason, error.message)}"

    options = WatchOptions(on_reconnect=away)
    with live(picture), _polling(job, picture), contextlib.closing(job.watch(options=options)) as events:
        for event in events:
            picture.add(event)


@contextlib.contextmanager
def _polling(job: JobHandle, picture: JobPicture) -> Iterator[None]:
    """Asks for what no event tells: the place in the queue, the next try, whether a server that was away is back."""
    done = threading.Event()

    def poll() -> None:
        pause = _FIRST_POLL
        while not done.wait(pause):
            pause = _POLL
            if picture.state_name != "queued" and not picture.notice:
                continue
            try:
                seen = job.refresh()
            except Unavailable:
                continue
            except LuthierError:
                return
            picture.notice = ""
            if seen.state == picture.state:
                picture.queue_position = seen.queue_position
                picture.retry_at = float(seen.retry_time.seconds)

    thread = threading.Thread(target=poll, name="luthier-queue-position", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=1)
