"""The command `luthier` on a real luthierd: names, lineage, exports, models made again, downloads that break."""

import json
import shutil
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from daemon import ROWS, Daemon, puppet, small, until
from unit.client.command import called

from luthier.v1.job_pb2 import Hyperparameters
from luthier_client import Client, errors, exports
from luthier_client.cli import ids
from luthier_client.spec import apply_settings

Start = Callable[..., Daemon]
BUILTIN = Path(__file__).parents[2] / "trainer" / "luthier_trainer" / "builtin" / "tiny"
QUICK = puppet(steps=2, step_seconds=0.01)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("models"), QUICK).start()
    daemon.upload()
    yield daemon
    daemon.close()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client


def tuned(daemon: Daemon, **task: Any) -> str:
    """A finished model's id."""
    return daemon.wait(daemon.create(small(**task)).id).model_id


def told(daemon: Daemon, *arguments: str) -> Any:
    """What a command prints as JSON."""
    done = called(*arguments, "-o", "json", endpoint=daemon.address)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_name_is_registered_aliased_moved_rolled_back_and_found_everywhere(daemon: Daemon, client: Client) -> None:
    first, second = tuned(daemon, model_name="support-bot"), tuned(daemon)
    assert called("model", "register", second, "support-bot", endpoint=daemon.address).stdout.startswith(
        "support-bot@2  "
    )
    assert client.register_model(second, "support-bot").version == 2
    assert told(daemon, "model", "alias", "support-bot", "production", "1")["model_id"] == first
    moved = called("model", "alias", "support-bot", "production", "2", endpoint=daemon.address).stdout
    assert f"support-bot@2  {second}" in moved and "before: @1" in moved
    assert told(daemon, "model", "rollback", "support-bot", "production")["version"] == 1
    for text, expected in (("support-bot", second), ("support-bot@1", first), ("support-bot@production", first)):
        assert called("model", "get", text, "-o", "id", endpoint=daemon.address).stdout.strip() == expected
    assert [each["id"] for each in told(daemon, "model", "list", "--name", "support-bot")] == [second, first]
    (name,) = [each for each in told(daemon, "model", "names") if each["name"] == "support-bot"]
    assert [each["version"] for each in name["versions"]] == [2, 1]
    shown = called("model", "names", endpoint=daemon.address).stdout
    assert "production=@1" in shown and "@2" in shown
    # Ids are upper-case and names are not; digits alone may be either.
    client.register_model(second, "2026")
    assert ids.model(client, "2026") == "2026" and client.get_model("2026").id == second
    assert ids.model(client, first.removeprefix("model_")[:18]) in (first, second)
    assert ids.model(client, first[:24]) == first and ids.model(client, "support-bot@1") == "support-bot@1"
    assert told(daemon, "model", "alias", "support-bot", "production", "--delete")["deleted"]
    assert called("model", "get", "support-bot@production", endpoint=daemon.address).returncode == 1
    missing = called("model", "alias", "support-bot", "production", "7", endpoint=daemon.address)
    assert missing.returncode == 1 and "versions 2, 1" in missing.stderr
    assert called("model", "alias", "support-bot", "production", endpoint=daemon.address).returncode == 2


def test_tags_and_descriptions_are_set_and_taken_away(daemon: Daemon, client: Client) -> None:
    model = tuned(daemon)
    shown = called("model", "tag", model, "team=search", "stage=trial", endpoint=daemon.address)
    assert "stage=trial, team=search" in shown.stdout
    assert told(daemon, "model", "tag", model, "stage-")["tags"] == {"team": "search"}
    assert [each.id for each in client.list_models(tags={"team": "search"})] == [model]
    assert told(daemon, "model", "list", "--tag", "team=search", "--tag", "stage=trial") == []
    assert told(daemon, "model", "describe", model, "Answers questions.")["description"] == "Answers questions."
    assert "Answers questions." in client.model_card(model)
    assert client.get_model(model).tags == {"team": "search"}
    for wrong in ("x", "=x", "-"):
        assert called("model", "tag", model, wrong, endpoint=daemon.address).returncode == 2
    assert called("model", "tag", model, "a=1", "a-", endpoint=daemon.address).returncode == 2


def test_a_lineage_leads_to_the_base_the_data_and_what_was_made_of_it(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    parent = tuned(daemon, model_name="lineage")
    for file in BUILTIN.iterdir():  # what a puppet's model lacks to be gone on from
        if file.is_file():
            shutil.copy(file, daemon.data_dir / "models" / parent)
    child = tuned(daemon, base_model="lineage@1")
    shown = called("model", "lineage", "lineage", endpoint=daemon.address).stdout
    assert "builtin/tiny" in shown and "rows@1" in shown and child in shown.partition("made of it")[2]
    nodes = {each["id"] for each in told(daemon, "model", "lineage", child)["nodes"]}
    assert {parent, child, "builtin/tiny"} <= nodes
    assert called("model", "lineage", "lineage@1", "-o", "id", endpoint=daemon.address).stdout.split()[0] == parent
    card = tmp_path / "README.md"
    assert called("model", "card", "lineage", "--to", str(card), endpoint=daemon.address).returncode == 0
    assert card.read_text() == client.model_card(parent)
    assert called("model", "card", "lineage", "--to", str(card), endpoint=daemon.address).returncode == 1
    refused = called("model", "delete", parent, endpoint=daemon.address)
    assert refused.returncode == 1 and f"luthier model delete {child}" in refused.stderr
    by_name = called("model", "delete", "lineage@1", endpoint=daemon.address)
    assert by_name.returncode == 2 and f"luthier model delete {parent}" in by_name.stderr
    for model in (child, parent):
        assert called("model", "delete", model, endpoint=daemon.address).returncode == 0
    with pytest.raises(errors.NotFound):
        client.get_model(parent)


def test_an_export_is_made_shown_downloaded_and_deleted(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    model = tuned(daemon, model_name="exported")
    shown = called("model", "export", "exported", "--format", "gguf", "--type", "q8_0", endpoint=daemon.address)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "proof passed" in shown.stdout
    (export,) = told(daemon, "export", "list", "--model", "exported@1")
    assert export["model_id"] == model and f"luthier export download {export['id']}" in shown.stdout
    got = called("export", "get", export["id"][:20], endpoint=daemon.address).stdout
    assert "gguf q8_0" in got and "proof passed" in got
    folder, tar = tmp_path / "files", tmp_path / "files.tar"
    assert called("export", "download", "@latest", "--to", str(folder), endpoint=daemon.address).returncode == 0
    assert called("model", "download", export["id"], "--tar", str(tar), endpoint=daemon.address).returncode == 0
    assert from_tar(tar) == below(folder)
    assert {each.path for each in client.get_export(export["id"]).files} == set(below(folder))
    refused = called("model", "delete", model, endpoint=daemon.address)
    assert refused.returncode == 1 and f"(luthier export delete {export['id']})" in refused.stderr
    assert called("export", "delete", "@latest", endpoint=daemon.address).returncode == 0
    assert called("export", "get", export["id"], endpoint=daemon.address).returncode == 1
    assert list(client.list_exports(model=model)) == []
    planned = client.export_model(model, exports.merged("f16"), validate_only=True)
    assert planned.proto.resolved_spec.export.proof_rows == 16
    with pytest.raises(errors.InvalidSpec):
        client.export_model(model, exports.adapter(), destination="file:///etc")


def test_a_model_is_made_again_from_itself_and_the_two_are_equal(daemon: Daemon, tmp_path: Path) -> None:
    daemon.upload(ROWS[: ROWS.index(b"\n", 200) + 1], name="again-validation")
    numbers = Hyperparameters(warmup_ratio=0.1, epochs=2)
    model = tuned(daemon, suffix="bot", hyperparameters=numbers, validation_dataset="again-validation")
    made = called("job", "create", "--from", model, "--watch", endpoint=daemon.address)
    assert made.returncode == 0, made.stderr
    assert "takes over: base model builtin/tiny, trained on ds_" in made.stderr and "changed:" not in made.stderr
    job = told(daemon, "job", "get", "@latest")
    equal = called("job", "diff", model, job["id"], endpoint=daemon.address)
    assert equal.stdout.startswith(f"equal: {model} and {job['id']}"), equal.stdout
    other = called(
        *("job", "create", "--from", model, "--watch", "--epochs", "1", "--set", "warmup_steps=1"),
        *("--set", "lora.rank=4", "--model-name", "again"),
        endpoint=daemon.address,
    )
    assert other.returncode == 0, other.stderr
    assert "changed: hyperparameters.epochs 2.0 " in other.stderr and "changed: lora.rank 16 " in other.stderr
    differences = told(daemon, "job", "diff", model, "again")["differences"]
    assert {"fine_tune.lora.rank", "fine_tune.hyperparameters.epochs"} <= {each["field"] for each in differences}
    planned = called("job", "create", "--from", "again@1", "--validate-only", endpoint=daemon.address)
    assert planned.returncode == 0 and "model_name: again" in planned.stdout


def test_what_the_server_made_of_a_spec_is_a_spec_that_it_takes_and_makes_the_same_of(client: Client) -> None:
    for changes in (
        [],
        ["find_learning_rate=true"],
        ["epochs=auto", "batch_size=auto", "learning_rate=auto"],
        ["full=", "max_steps=7", "warmup_steps=2"],
        ["per_device_train_batch_size=2", "gradient_accumulation_steps=4"],
        ["validation_fraction=0.1", "every_epochs=2", "early_stopping.patience=2", "keep_best=true"],
        ["validation_dataset=rows", "evaluation.every_steps=5", "train_on=last_turn"],
        ["use_dora=true", "lr_scheduler=warmup_stable_decay"],
    ):
        spec = small()
        apply_settings(spec, changes)
        resolved = client.create_job(spec, validate_only=True).proto.resolved_spec
        assert client.create_job(resolved, validate_only=True).proto.resolved_spec == resolved, changes


def test_a_model_whose_job_was_deleted_is_still_made_again_and_compared(daemon: Daemon) -> None:
    model = tuned(daemon)
    with Client(daemon.address) as client:
        client.get_job(client.get_model(model).job_id).delete()
    assert called("job", "create", "--from", model, "--validate-only", endpoint=daemon.address).returncode == 0
    told_of = called("job", "diff", model, model, endpoint=daemon.address)
    assert told_of.stdout.startswith("equal: ") and "plan" in told_of.stderr


def test_jobs_whose_logs_and_models_are_gone_are_compared_by_what_is_left(daemons: Start) -> None:
    daemon = daemons(*QUICK)
    daemon.upload()
    one, two = tuned(daemon), tuned(daemon, suffix="x")
    with Client(daemon.address) as client:
        jobs = [client.get_model(each).job_id for each in (one, two)]
    daemon.stop()
    daemon.environment = {"LUTHIER_CLOCK_OFFSET": str(31 * 24 * 3600)}
    daemon.start()

    def compacted() -> bool:
        try:
            return not [client.get_job(job).logs() for job in jobs]
        except errors.OutOfRange:
            return True

    with Client(daemon.address) as client:
        until(compacted, what="the end of the logs' retention")
        client.delete_model(two)
    told_of = called("job", "diff", *jobs, endpoint=daemon.address)
    assert told_of.returncode == 0 and "fine_tune.suffix" in told_of.stdout and "plan, metrics" in told_of.stderr


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def from_tar(file: Path) -> dict[str, bytes]:
    """What is in a tar of ours, which says itself what it holds."""
    with tarfile.open(file, "r:") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    first = next(iter(members))
    # An export has a manifest.json of its own.
    assert first == ("luthier-manifest.json" if "manifest.json" in [*members][1:] else "manifest.json")
    listed = json.loads(members.pop(first))["files"]
    assert [(each["path"], each["size_bytes"]) for each in listed] == [(name, len(members[name])) for name in members]
    return members


def large(daemon: Daemon, model: str) -> dict[str, bytes]:
    """Gives a model files that take a while to send; returns all of its files."""
    folder = daemon.data_dir / "models" / model
    for number in range(2):
        (folder / f"weights-{number}.bin").write_bytes(bytes([number]) * 3_000_000 + b"end" * 200_000)
    (folder / "empty.txt").touch()
    return below(folder)


class Proxy:
    """A TCP proxy that breaks each of its first connections after so many bytes of the server."""

    def __init__(self, target: str, breaks: list[int]) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._breaks = breaks
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                limit = self._breaks[self.connections] if self.connections < len(self._breaks) else 10**12
                self.connections += 1
                far = socket.create_connection(self._target)
                threading.Thread(target=self._pump, args=(near, far, 10**12), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, limit), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int) -> None:
        with suppress(OSError), source, sink:
            while left > 0 and (data := source.recv(min(left, 65536))):
                sink.sendall(data)
                left -= len(data)
            for each in (source, sink):
                each.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["--to", "--tar"])
def test_a_download_whose_connection_is_cut_goes_on_and_ends_byte_equal(
    daemon: Daemon, tmp_path: Path, kind: str
) -> None:
    model = tuned(daemon)
    files = large(daemon, model)
    proxy = Proxy(daemon.address, [500_000, 2_500_000, 1_000, 2_500_000])
    target = tmp_path / "out"
    done = called("model", "download", model, kind, str(target), endpoint=proxy.endpoint)
    proxy.close()
    assert done.returncode == 0, done.stderr
    assert proxy.connections == 5
    assert (below(target) if kind == "--to" else from_tar(target)) == files
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_download_goes_on_in_the_next_call_and_over_a_server_that_is_started_again(
    daemons: Start, tmp_path: Path
) -> None:
    port = socket.create_server(("127.0.0.1", 0))
    listen = f"127.0.0.1:{port.getsockname()[1]}"
    port.close()
    daemon = daemons(*QUICK, "--listen", listen)
    daemon.upload()
    model = tuned(daemon)
    files = large(daemon, model)
    total = sum(map(len, files.values()))

    def give_up(done: int, _: int) -> None:
        if done > total / 4:
            raise KeyboardInterrupt

    seen: list[int] = []

    def restart(done: int, _: int) -> None:
        seen.append(done)
        if done > total / 2 and len(restarted) == 0:
            restarted.append(done)
            daemon.kill()
            daemon.start()

    restarted: list[int] = []
    with Client(listen) as client:
        with pytest.raises(KeyboardInterrupt):
            client.download_model(model, tmp_path / "out", on_progress=give_up)
        assert not (tmp_path / "out").exists()
        client.download_model(model, tmp_path / "out", on_progress=restart)
    assert total / 4 < seen[0] < total / 2 < restarted[0] < total and seen == sorted(seen)
    assert below(tmp_path / "out") == files


def test_a_model_that_changed_under_its_name_is_downloaded_from_the_beginning(daemon: Daemon, tmp_path: Path) -> None:
    first, second = tuned(daemon, model_name="moving"), tuned(daemon, model_name="moving")
    large(daemon, first)

    def give_up(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with Client(daemon.address) as client:
        client.set_model_alias("moving", "production", 1)
        with pytest.raises(KeyboardInterrupt):
            client.download_model("moving@production", tmp_path / "out", on_progress=give_up)
        assert (tmp_path / "out.partial").exists()
        client.set_model_alias("moving", "production", 2)
        client.download_model("moving@production", tmp_path / "out")
    assert below(tmp_path / "out") == below(daemon.data_dir / "models" / second)
