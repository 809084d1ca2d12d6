"""Datasets of the hub, through the libraries that know it, from a stub of its API."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stub import Hub, Repository, hub
from unit.trainer.fetches import Outcome, fetch, send, web

from luthier_trainer.data.fetching.hub_card import is_outside

CALLS = [
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {"x": 1}}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "b", "arguments": {"y": "é"}}}]}]},
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in CALLS)
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def card(text: str) -> bytes:
    return f"---\n{text}\n---\n# A dataset\n".encode()


def fetch_from(
    stub: Hub,
    folder: Path,
    name: str,
    *,
    config: str = "",
    split: str = "",
    revision: str = "",
    token: str = "",
    hosts: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    max_bytes: int = 1 << 30,
) -> Outcome:
    request = {
        "hub": {"id": name, "config": config, "split": split, "revision": revision},
        "hosts": list(hosts),
        "max_bytes": max_bytes,
    }
    variables = {"HF_ENDPOINT": stub.url, "HOME": str(folder), **(environment or {})}
    ended = fetch(folder, request, token, variables)
    assert ended.code == 0
    assert sorted(each.name for each in folder.iterdir()) == ["fetched", "request.json"], "nothing else stays"
    return ended


def fetched(folder: Path, repository: Repository, **options: str) -> Outcome:
    with hub(someone__data=repository) as stub:
        return fetch_from(stub, folder, "someone/data", **options)  # type: ignore[arg-type]


def rows(outcome: Outcome) -> list[dict[str, object]]:
    assert outcome.source
    if outcome.content.startswith(b"PAR1"):
        found: list[dict[str, object]] = pq.read_table(io.BytesIO(outcome.content)).to_pylist()
        return found
    return [json.loads(line) for line in outcome.content.splitlines()]


def test_a_file_of_json_lines_comes_byte_by_byte_so_that_tool_calls_keep_their_own_arguments(tmp_path: Path) -> None:
    repository = Repository({"README.md": b"# data\n", "train.jsonl": LINES, "test.jsonl": b'{"text": "x"}\n'})
    outcome = fetched(tmp_path, repository)
    assert outcome.content == LINES
    assert outcome.source == f"hf://datasets/someone/data@{repository.commit}?config=default&split=train"
    assert outcome.reports[0].progress.unit == "bytes"


def test_several_json_files_become_one_however_they_are_written(tmp_path: Path) -> None:
    one, two = (json.dumps(row).encode() for row in CALLS)
    files = {
        "data/train-1.jsonl": b"\xef\xbb\xbf" + one,
        "data/train-2.json": b"[\n" + one + b",\n" + two + b"]",
        "data/train-3.jsonl.gz": gzip.compress(LINES, mtime=0),
        "data/train-4.jsonl.bz2": bz2.compress(two + b"\n"),
        "data/train-5.jsonl.xz": lzma.compress(one),
    }
    first, second = CALLS
    expected = [first, first, second, first, second, second, first]
    assert rows(fetched(tmp_path, Repository(files))) == expected


def test_parquet_shards_become_one_file_and_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", None], "turns": [[{"role": "user", "content": "x"}], []]})
    files = {f"data/train-0000{n}-of-00003.parquet": parquet(table) for n in range(3)}
    outcome = fetched(tmp_path, Repository(files))
    assert rows(outcome) == table.to_pylist() * 3
    again = tmp_path / "again"
    again.mkdir()
    assert fetched(again, Repository(files)).content == outcome.content


def test_shards_with_other_columns_lose_nothing_in_silence(tmp_path: Path) -> None:
    files = {
        "train-0.parquet": parquet(pa.table({"a": [1]})),
        "train-1.parquet": parquet(pa.table({"a": [2], "b": [3]})),
    }
    assert "'b'" in fetched(tmp_path, Repository(files)).failed.message


def test_a_card_that_picks_columns_of_parquet_files_is_followed(tmp_path: Path) -> None:
    configs = "configs:\n- config_name: default\n  data_files: train.parquet\n  columns: [text]"
    files = {"README.md": card(configs), "train.parquet": parquet(pa.table({"text": ["x"], "secret": ["y"]}))}
    assert rows(fetched(tmp_path, Repository(files))) == [{"text": "x"}]


def test_csv_files_become_one_with_one_header_and_every_text_as_it_was(tmp_path: Path) -> None:
    files = {"train-0.csv": b"prompt,score\na,007\nb,NA", "train-1.csv": b"prompt,score\r\nc,high\r\n"}
    assert fetched(tmp_path, Repository(files)).content == b"prompt,score\na,007\nb,NA\nc,high\r\n"
    files["train-1.csv"] = b"prompt,points\nc,1\n"
    assert fetched(tmp_path, Repository(files)).failed.reason == "NOT_SUPPORTED"


def test_csv_files_that_the_card_tells_how_to_read_are_read_so(tmp_path: Path) -> None:
    configs = "configs:\n- config_name: default\n  data_files: train.csv\n  header: null\n  names: [prompt, completion]"
    files = {"README.md": card(configs), "train.csv": b"a,b\nc,d\n"}
    assert rows(fetched(tmp_path, Repository(files))) == [
        {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"},
    ]  # fmt: skip


def test_what_a_card_says_about_columns_changes_no_byte(tmp_path: Path) -> None:
    info = (
        "dataset_info:\n  features:\n  - name: other\n    dtype: int64\n  splits:\n  - name: train\n    num_examples: 9"
    )
    assert fetched(tmp_path, Repository({"README.md": card(info), "train.jsonl": LINES})).content == LINES


def test_a_column_of_json_comes_as_what_it_means_and_not_as_text(tmp_path: Path) -> None:
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    made = datasets.Dataset.from_list([{"messages": row["messages"]} for row in CALLS], features=features)
    file = io.BytesIO()
    made.to_parquet(file)
    assert rows(fetched(tmp_path, Repository({"train.parquet": file.getvalue()}))) == CALLS


def images(*values: Mapping[str, object] | None) -> bytes:
    """A Parquet file with a column of images, as the libraries write it."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": list(values), "text": ["what is it?"] * len(values)}
    return parquet(pa.table(columns, schema=features.arrow_schema))


def test_images_come_as_their_bytes(tmp_path: Path) -> None:
    file = images({"bytes": PNG, "path": "a.png"}, None)
    found = rows(fetched(tmp_path, Repository({"train.parquet": file})))
    assert [each["image"] for each in found] == [{"bytes": PNG, "path": "a.png"}, None]


def test_images_beside_their_metadata_come_as_their_bytes(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="datasets needs Pillow to list images")
    files = {
        "train/metadata.jsonl": b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n',
        "train/a.png": PNG,
        "train/b.png": PNG + b"2",
    }
    found = rows(fetched(tmp_path, Repository(files)))
    assert [(each["image"], each["text"]) for each in found] == [
        ({"bytes": PNG, "path": "a.png"}, "one"), ({"bytes": PNG + b"2", "path": "b.png"}, "two"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "http://127.0.0.1:9/x", "hf://datasets/other/private/a.png", "zip://a::/etc/passwd", "x.png"],
)
def test_a_row_that_names_a_file_in_place_of_an_image_reads_nothing(tmp_path: Path, path: str) -> None:
    outcome = fetched(tmp_path, Repository({"train.parquet": images({"bytes": None, "path": path})}))
    assert outcome.failed.reason == "NOT_SUPPORTED"
    assert b"root:" not in outcome.content


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "file:///etc/passwd", "../../etc/passwd", "a/../../b.json", "a/..", "zip://x::/etc/passwd.zip",
        "hf://datasets/other/private/a.json", "https://inside.example/a.json", "~/secret.json", "local:///etc/a.json",
        "memory://a.json", "github://a:b@/c.json", "a::b", "C:/x", "c:x", "a\\..\\b", "a\n://b",
    ],
)  # fmt: skip
def test_no_path_of_a_card_leads_out_of_its_repository(path: str) -> None:
    assert is_outside(path)


@pytest.mark.parametrize("path", ["train.jsonl", "data/*.parquet", "**/[0-9]*", "a..b/c...d.json", ".hidden/x", "data"])
def test_a_path_of_the_repository_is_none_that_leads_out(path: str) -> None:
    assert not is_outside(path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../../../etc/passwd", "zip://x::/etc/passwd.zip"])
def test_a_card_that_names_files_elsewhere_reads_nothing(tmp_path: Path, path: str) -> None:
    configs = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [{json.dumps(path)}]"
    outcome = fetched(tmp_path, Repository({"README.md": card(configs), "train.jsonl": LINES}))
    assert outcome.failed.reason == "NOT_SUPPORTED"
    assert not outcome.content


def test_a_card_that_leads_to_another_server_connects_to_nothing(tmp_path: Path) -> None:
    with web() as inside:
        configs = f"configs:\n- config_name: default\n  data_files: {inside.url}/secret.jsonl"
        standalone = configs.encode()
        for files in ({"README.md": card(configs)}, {".huggingface.yaml": standalone}):
            outcome = fetched(tmp_path, Repository({**files, "train.jsonl": LINES}))
            assert outcome.failed.reason == "NOT_SUPPORTED"
        assert not inside.requests


def test_a_dataset_with_code_of_its_own_is_refused_and_never_run(tmp_path: Path) -> None:
    code = b"open('/tmp/luthier-was-here', 'w')\nraise SystemExit\n"
    outcome = fetched(tmp_path, Repository({"data.py": code, "train.jsonl": LINES}))
    assert outcome.failed.reason == "NOT_SUPPORTED"
    assert "never runs" in outcome.failed.message
    assert not Path("/tmp/luthier-was-here").exists()


@pytest.mark.parametrize("name", ["train.pkl", "train.tar"])
def test_files_that_are_not_plain_data_are_refused(tmp_path: Path, name: str) -> None:
    assert fetched(tmp_path, Repository({name: b"cos\nsystem\n"})).failed.reason == "NOT_SUPPORTED"


@pytest.mark.parametrize("path", ["&a [*a]", "[" * 100 + "]" * 100, "{a: 1}"])
def test_a_card_that_is_made_to_confuse_comes_to_an_end(tmp_path: Path, path: str) -> None:
    laughs = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    configs = f"l0: &l0 [x]\n{laughs}configs:\n- config_name: default\n  data_files: {path}\n- {{data_files: *l29}}"
    outcome = fetched(tmp_path, Repository({"README.md": card(configs), "train.jsonl": LINES}))
    assert outcome.failed.reason in ("NOT_SUPPORTED", "UNREADABLE")


CONFIGS = card("configs:\n- config_name: main\n  data_files: a.jsonl\n- config_name: socratic\n  data_files: b.jsonl")


def test_a_dataset_of_several_configurations_says_which_there_are(tmp_path: Path) -> None:
    repository = Repository({"README.md": CONFIGS, "a.jsonl": LINES, "b.jsonl": b'{"text": "b"}\n'})
    failed = fetched(tmp_path, repository).failed
    assert (failed.reason, "main, socratic" in failed.message) == ("CONFIG_NEEDED", True)
    failed = fetched(tmp_path, repository, config="other").failed
    assert (failed.reason, "main, socratic" in failed.message) == ("NOT_FOUND", True)
    outcome = fetched(tmp_path, repository, config="socratic")
    assert outcome.content == b'{"text": "b"}\n'
    assert "config=socratic&split=train" in outcome.source


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    repository = Repository({"train.jsonl": LINES, "test.jsonl": LINES})
    failed = fetched(tmp_path, repository, split="validation").failed
    assert (failed.reason, "test, train" in failed.message) == ("NOT_FOUND", True)
    failed = fetched(tmp_path, repository, revision="v9").failed
    assert (failed.reason, "v9" in failed.message) == ("NOT_FOUND", True)
    with hub() as stub:
        assert fetch_from(stub, tmp_path, "no/thing").failed.reason == "NOT_FOUND"
        assert fetch_from(stub, tmp_path, "a--b/..").failed.reason == "NOT_FOUND"


def test_a_private_dataset_needs_the_token_which_nobody_else_gets_to_see(tmp_path: Path) -> None:
    table = parquet(pa.table({"text": ["a"]}))
    with web() as cdn, hub(me__private=Repository({"train.parquet": table}, token="hf_secret", cdn=cdn.url)) as stub:
        cdn.answers["/train.parquet"] = _ranged(table)
        assert fetch_from(stub, tmp_path, "me/private", hosts=(cdn.url,)).failed.reason == "NOT_FOUND"
        environment = {"HF_TOKEN": "hf_of_the_operator"}
        assert fetch_from(stub, tmp_path, "me/private", environment=environment).failed.reason == "NOT_FOUND"
        assert not any("operator" in str(headers) for _, headers in stub.requests)
        outcome = fetch_from(stub, tmp_path, "me/private", token="hf_secret", hosts=(cdn.url,))
        assert rows(outcome) == [{"text": "a"}]
        assert cdn.requests
        assert not any("Authorization" in headers or "authorization" in headers for _, headers in cdn.requests)
        assert "hf_secret" not in outcome.stderr


def test_a_file_that_the_hub_keeps_on_a_host_that_is_not_allowed_is_refused(tmp_path: Path) -> None:
    with web() as cdn:
        cdn.default = send(b"secret")
        for files in ({"train.jsonl": LINES}, {"train.parquet": parquet(pa.table({"text": ["a"]}))}):
            with hub(a__b=Repository(files, cdn=cdn.url)) as stub:
                failed = fetch_from(stub, tmp_path, "a/b").failed
            assert failed.reason in ("HOST_NOT_ALLOWED", "ADDRESS_NOT_ALLOWED"), failed
        assert not cdn.requests


def test_a_gated_dataset_says_where_to_ask(tmp_path: Path) -> None:
    with hub(them__gated=Repository({"README.md": b"# x\n", "train.jsonl": LINES}, "hf_member", gated=True)) as stub:
        failed = fetch_from(stub, tmp_path, "them/gated").failed
        assert failed.reason == "NOT_PERMITTED"
        assert "them/gated" in failed.hint
        assert fetch_from(stub, tmp_path, "them/gated", token="hf_member").content == LINES


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_a_dataset_over_the_limit_is_refused(tmp_path: Path, name: str) -> None:
    noise = [f"{n:x}" * 3 for n in range(0, 10**9, 10**5)]
    data = {
        "train.jsonl": "".join(json.dumps({"text": each}) + "\n" for each in noise).encode(),
        "train.parquet": parquet(pa.table({"text": noise})),
    }[name]
    with hub(a__b=Repository({name: data})) as stub:
        outcome = fetch_from(stub, tmp_path, "a/b", max_bytes=20_000)
    assert outcome.failed.reason == "TOO_LARGE"
    assert len(outcome.content) <= 20_000


def test_the_hub_itself_must_be_allowed(tmp_path: Path) -> None:
    request = {"hub": {"id": "openai/gsm8k"}, "hosts": ["files.example"]}
    assert fetch(tmp_path, request, environment={"HF_ENDPOINT": ""}).failed.reason == "HOST_NOT_ALLOWED"


def test_files_that_cannot_be_read_are_an_error_that_a_person_can_act_on(tmp_path: Path) -> None:
    assert fetched(tmp_path, Repository({"train.parquet": b"PAR1 but not really"})).failed.reason == "UNREADABLE"
    assert fetched(tmp_path, Repository({"README.md": b"# only words"})).failed.reason == "NOT_SUPPORTED"


def _ranged(data: bytes):  # type: ignore[no-untyped-def]
    def answer(handler):  # type: ignore[no-untyped-def]
        wanted = handler.headers.get("Range") or handler.headers.get("range")
        if not wanted:
            send(data)(handler)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        send(data[start : end + 1], 206, {"Content-Range": f"bytes {start}-{end}/{len(data)}"})(handler)

    return answer
