"""Imports, previews, checks and derivations over a real channel, on both stacks."""

import inspect
from typing import Any

import pytest
from unit.client.fake_server import FakeServer

from luthier.v1.tokenization_pb2 import TRAIN_ON_LAST_TURN, Tokenization
from luthier_client import AsyncClient, Client, errors
from luthier_client.dataset_requests import tokenization_of


async def test_an_import_tells_how_far_it_is_and_ends_with_the_dataset(own_server: FakeServer) -> None:
    seen: list[tuple[int, int, str]] = []
    with Client(own_server.endpoint) as client:
        made = client.import_dataset(
            "gsm8k", hub="openai/gsm8k", config="main", split="test", revision="v1", token_secret="hub",
            columns={"prompt": "question"}, on_progress=lambda at: seen.append((at.completed, at.total, at.unit)),
        )  # fmt: skip
        assert made.source == "hf://datasets/openai/gsm8k@abc?split=test"
    async with AsyncClient(own_server.endpoint) as other:
        again = await other.import_dataset("web", url="https://example.org/x", sha256="ab" * 32)
    assert again.source == "https://example.org/x"
    assert seen == [(0, 100, "bytes"), (50, 100, "bytes"), (100, 100, "bytes")]
    first, second = (call["request"] for call in own_server.calls("ImportDataset"))
    hub = {"id": "openai/gsm8k", "config": "main", "split": "test", "revision": "v1"}
    reading = {"columns": {"prompt": "question"}}
    assert first == {"name": "gsm8k", "hub": hub, "reading": reading, "token_secret": "hub"}
    assert second == {"name": "web", "url": "https://example.org/x", "reading": {}, "sha256": "ab" * 32}


async def test_an_import_that_ends_without_a_result_is_tried_again_and_a_refused_one_is_not(
    own_server: FakeServer,
) -> None:
    with Client(own_server.endpoint) as client:
        assert client.import_dataset("early", url="https://early/").rows == 3
        with pytest.raises(errors.InvalidDataset) as caught:
            client.import_dataset("wrong", url="https://wrong/")
        assert caught.value.lines == [1]
        with pytest.raises(ValueError, match="one source"):
            client.import_dataset("none")
        with pytest.raises(ValueError, match="datasets of the hub"):
            client.import_dataset("none", url="https://x/", split="test")
    async with AsyncClient(own_server.endpoint) as other:
        with pytest.raises(errors.InvalidDataset):
            await other.import_dataset("wrong", url="https://wrong/")
    assert len(own_server.calls("ImportDataset")) == 4


async def test_a_preview_asks_for_rows_and_tokenization_as_they_are_written(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        client.upload_dataset(b"{}\n", name="cards")
        shown = client.preview_dataset(
            "cards", base_model="builtin/tiny", tokenization={"train_on": "last_turn", "chat_template_name": "qwen"},
            lines=[7, 9], max_length=64,
        )  # fmt: skip
        assert [row.line for row in shown.rows] == [7, 9]
    async with AsyncClient(own_server.endpoint) as other:
        turns = await other.preview_dataset("cards", tokenization=Tokenization(train_on=TRAIN_ON_LAST_TURN), count=1)
    assert [turn.role for turn in turns.rows[0].sequences[0].turns] == ["user", "assistant"]
    first, second = (call["request"] for call in own_server.calls("PreviewDataset"))
    assert first["tokenization"] == {"train_on": "TRAIN_ON_LAST_TURN", "chat_template_name": "qwen"}
    assert (first["lines"], first["max_length"]) == (["7", "9"], 64)
    assert second == {"dataset": "cards", "tokenization": {"train_on": "TRAIN_ON_LAST_TURN"}, "count": 1}


def test_a_wrong_tokenization_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="assistant, last_turn, all_tokens"):
        tokenization_of({"train_on": "everything"})
    with pytest.raises(ValueError, match="did you mean 'train_on'"):
        tokenization_of({"trainon": "assistant"})


async def test_a_check_ends_with_both_reports(own_server: FakeServer) -> None:
    seen: list[int] = []
    with Client(own_server.endpoint) as client:
        client.upload_dataset(b"{}\n", name="checked")
        reports = client.check_dataset(
            "checked", "bad", validation_dataset="other", on_progress=lambda at: seen.append(at.completed)
        )
        assert reports.training.counts[1].code == "NO_TRAINED_TOKEN" and reports.HasField("validation")
        stored = client.dataset_report("checked")
        assert stored.token_reports[0].statistics.tokens == 20_000 and stored.report.counts[0].count == 2
    async with AsyncClient(own_server.endpoint) as other:
        assert not (await other.check_dataset("checked", "builtin/tiny")).HasField("validation")
        assert (await other.dataset_report("checked")) == stored
    assert seen == [10, 20]


async def test_derivations_make_new_datasets(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        client.upload_dataset(b"{}\n" * 10, name="cards")
        training, held_out = client.split_dataset("cards", validation=0.2, seed=1)
        assert (training.name, training.rows, held_out.name, held_out.rows) == ("cards-train", 8, "cards-validation", 2)
        assert list(held_out.lineage.parents) == [client.get_dataset("cards").id]
        assert client.sample_dataset("cards", rows=4).name == "cards-sample"
        assert client.concatenate_datasets(["cards-train", "cards-validation"], name="all").rows == 10
        with pytest.raises(ValueError, match="a list of datasets"):
            client.concatenate_datasets("cards", name="all")
    async with AsyncClient(own_server.endpoint) as other:
        named = await other.split_dataset("cards", validation=0.5, training_name="a", validation_name="b")
        assert [each.name for each in named] == ["a", "b"]
        assert (await other.sample_dataset("cards", rows=3, seed=7, name="few")).rows == 3
        assert (await other.concatenate_datasets(["a", "b"], name="whole")).rows == 10
    assert own_server.calls("DeriveDataset")[0]["request"] == {
        "split": {"dataset": "cards", "validation": 0.2, "seed": "1"}
    }


def test_the_two_clients_take_the_same_and_say_so() -> None:
    def signature(method: Any) -> list[tuple[str, Any, Any]]:
        return [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]

    for name, method in vars(Client).items():
        if not name.startswith("_") and callable(method):
            other = getattr(AsyncClient, name)
            assert signature(method) == signature(other), name
            assert method.__doc__ and other.__doc__


async def test_a_preview_of_many_megabytes_is_taken(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        client.upload_dataset(b"{}\n", name="long")
        shown = client.preview_dataset("long", base_model="builtin/tiny", count=1)
        assert len(shown.rows[0].sequences[0].tokens) == 60_000
    async with AsyncClient(own_server.endpoint) as other:
        assert shown.ByteSize() > 16 * 1024 * 1024
        assert (await other.preview_dataset("long", base_model="builtin/tiny", count=1)) == shown
