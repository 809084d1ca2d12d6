"""What the clients do with models that a real server cannot be made to show: broken streams, lost answers."""

import threading
from pathlib import Path
from typing import Any

import pytest
from unit.client.fake_models import FILES
from unit.client.fake_server import FakeServer

from luthier.v1.export_task_pb2 import ExportTask
from luthier_client import AsyncClient, Client, errors, exports
from luthier_client.connection import Tries


def content(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def places(server: FakeServer) -> list[tuple[str, int]]:
    return [(call["path"], call["offset"]) for call in server.calls("DownloadModel")]


async def test_a_download_whose_stream_breaks_goes_on_by_itself_at_the_byte(
    own_server: FakeServer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    with Client(own_server.endpoint) as client:
        client.download_model("flaky", tmp_path / "one", on_progress=lambda *each: seen.append(each))
    assert content(tmp_path / "one") == FILES
    assert seen == sorted(seen) and seen[-1] == (sum(map(len, FILES.values())),) * 2
    asked = places(own_server)
    assert len(asked) > 3 and asked[0] == ("", 0) and len(set(asked)) == len(asked)
    assert all(path == "adapter_model.safetensors" and offset for path, offset in asked[1:])
    async with AsyncClient(own_server.endpoint) as other:
        await other.download_model("flaky", tmp_path / "two")
        await other.download_model_tar("flaky", tmp_path / "two.tar")
    assert content(tmp_path / "two") == FILES
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fake", "one", "two", "two.tar"]


async def test_a_download_whose_server_is_killed_and_started_again_goes_on(
    own_server: FakeServer, tmp_path: Path
) -> None:
    half = threading.Event()

    def kill() -> None:
        half.wait(20)
        own_server.kill()
        own_server.start()

    killer = threading.Thread(target=kill)
    killer.start()
    with Client(own_server.endpoint) as client:
        client.download_model(
            "slow", tmp_path / "one", on_progress=lambda done, total: half.set() if done > total / 3 else None
        )
    killer.join()
    assert content(tmp_path / "one") == FILES
    assert len(places(own_server)) == 2 and places(own_server)[1][1] > 0


def test_a_download_that_was_given_up_is_gone_on_from_by_the_next_call(own_server: FakeServer, tmp_path: Path) -> None:
    class GivenUp(Exception):
        pass

    def give_up(done: int, total: int) -> None:
        if done > total / 2:
            raise GivenUp

    with Client(own_server.endpoint) as client:
        for kind in (client.download_model, client.download_model_tar):
            download: Any = kind
            with pytest.raises(GivenUp):
                download("x", tmp_path / kind.__name__, on_progress=give_up)
            assert (tmp_path / f"{kind.__name__}.partial").exists()
            download("x", tmp_path / kind.__name__)
            assert places(own_server)[-1] == ("adapter_model.safetensors", 6 * 65536)
            assert not (tmp_path / f"{kind.__name__}.partial").exists()
    assert content(tmp_path / "download_model") == FILES


async def test_a_rollback_whose_answer_is_lost_is_not_sent_again(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        with pytest.raises(errors.Unavailable):
            client.rollback_model_alias("support-bot", "lost")
        assert client.rollback_model_alias("support-bot", "production").version == 1
    async with AsyncClient(own_server.endpoint) as other:
        with pytest.raises(errors.Unavailable):
            await other.rollback_model_alias("support-bot", "lost")
    assert len(own_server.calls("RollbackModelAlias")) == 3


def test_what_never_reached_a_server_may_be_sent_again_whatever_it_is() -> None:
    tries = Tries(None)
    assert tries.pause_after(errors.Unavailable("nobody", reason="UNREACHABLE"), repeatable=False) > 0
    with pytest.raises(errors.Unavailable):
        tries.pause_after(errors.Unavailable("broke", reason="CONNECTION_LOST"), repeatable=False)


def test_the_builders_say_what_the_contract_means() -> None:
    assert exports.describe(ExportTask(adapter=exports.adapter())) == "adapter"
    assert exports.describe(ExportTask(merged=exports.merged())) == "merged bf16"
    assert exports.describe(ExportTask(merged=exports.merged("fp16"))) == "merged f16"
    assert exports.describe(ExportTask(gguf=exports.gguf("Q4_K_M"))) == "gguf q4_k_m"
    assert exports.describe(ExportTask(gguf=exports.gguf(adapter_only=True))) == "gguf f16 adapter"
    with pytest.raises(ValueError, match="q4_k_m"):
        exports.gguf("q4")
    with pytest.raises(TypeError, match="adapter"):
        exports.task("m", "gguf")  # type: ignore[arg-type]
    made = exports.task("m", exports.merged("f32", max_shard_bytes=10**9), proof_rows=4, to="file:///out")
    assert (made.merged.max_shard_bytes, made.proof_rows, made.destination.uri) == (10**9, 4, "file:///out")


async def test_an_export_is_a_job_that_is_waited_for(own_server: FakeServer) -> None:
    to = exports.destination("s3://bucket/bot", secret="s3", public=False)
    with Client(own_server.endpoint) as client:
        job = client.export_model("model_x", exports.gguf("q8_0"), destination=to)
        export = client.get_export(job.wait(check=True).export_id)
        assert export.task.gguf == exports.gguf("q8_0") and export.task.destination == to
        assert [each.id for each in client.list_exports()] == [export.id]
        with pytest.raises(errors.JobFailed) as caught:
            client.export_model("unequal", exports.adapter()).wait(check=True)
        assert caught.value.reason == "EXPORT_NOT_EQUAL" and caught.value.hint == "Take more bits."
        with pytest.raises(errors.NotFound):
            client.get_export("export_none")
        with pytest.raises(ValueError, match="nothing to change"):
            client.update_model("model_x")
        with pytest.raises(errors.FailedPrecondition) as refused:
            client.delete_model("model_x")
        assert len(refused.value.violations) == 3
    async with AsyncClient(own_server.endpoint) as other:
        handle = await other.export_model("model_x", exports.merged("f32"), validate_only=True)
        assert handle.proto.spec.export.merged == exports.merged("f32")
        assert [each.id async for each in other.list_exports()] == [export.id]
    ids = [call["request"]["requestId"] for call in own_server.calls("ExportModel")]
    assert len(set(ids)) == 3 and all(ids)


async def test_a_checkpoint_may_take_longer_to_become_a_model_than_other_calls_may(own_server: FakeServer) -> None:
    with Client(own_server.endpoint, timeout=0.4) as client:
        assert client.register_model("job_1:step-2", "bot").version == 1
    async with AsyncClient(own_server.endpoint, timeout=0.4) as other:
        assert (await other.register_model("job_1:step-2", "bot")).version == 1
