"""`luthier dataset`: what each command asks of the server, prints, and exits with."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from unit.client.command import Terminal, job_file, run
from unit.client.fake_server import FakeServer

from luthier_client.cli import reading, reports, tokenization

PLAIN = {"PYTHONIOENCODING": "utf-8"}
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


@pytest.fixture
def cards(endpoint: str, tmp_path: Path) -> str:
    """The name of a dataset with token reports."""
    file = tmp_path / "checked.jsonl"
    file.write_text('{"a": 1}\n' * 12)
    assert run("dataset", "upload", str(file), endpoint=endpoint).returncode == 0
    return "checked"


def uncoloured(screen: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).replace("\r", "")


def test_an_upload_says_how_the_file_is_read(own_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    file.write_text("{}\n")
    arguments = ["dataset", "upload", str(file), "--column", "prompt=question", "--column", "completion=a=b"]
    shown = run(*arguments, "--format", "prompt_completion", "--file-format", "csv", endpoint=own_server.endpoint)
    assert "questions@1  1 rows" in shown.stdout and shown.returncode == 0
    assert "1 note: luthier dataset doctor ds_01" in shown.stderr
    said = own_server.calls("UploadDataset")[0]["request"]["reading"]
    assert said["columns"] == {"prompt": "question", "completion": "a=b"}
    assert (said["format"], said["file_format"]) == ("DATASET_FORMAT_PROMPT_COMPLETION", "FILE_FORMAT_CSV")
    for wrong in (["--column", "prompt"], ["--column", "a=b", "--column", "a=c"], ["--format", "chats"]):
        assert run("dataset", "upload", str(file), *wrong, endpoint=own_server.endpoint).returncode == 2


def test_a_server_that_says_nothing_for_seconds_is_seen_to_work_on_a_terminal_alone(
    endpoint: str, tmp_path: Path
) -> None:
    file = tmp_path / "pondering.jsonl"
    file.write_text('{"a": 1}\n' * 10)
    checking = "checking on the server"
    upload = Terminal("dataset", "upload", str(file), endpoint=endpoint)
    imported = Terminal("dataset", "import", "https://example.org/", "--name", "pondering-too", endpoint=endpoint)
    shown = [(upload, checking, upload.end()), (imported, checking, imported.end())]
    split = Terminal("dataset", "split", "pondering", "--validation", "0.1", endpoint=endpoint)
    piped = run("dataset", "sample", "pondering", "--rows", "1", endpoint=endpoint)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout.startswith("ds_01") and "\x1b" not in piped.stdout
    for terminal, words, code in [*shown, (split, "splitting on the server", split.end())]:
        assert code == 0, terminal.screen
        assert re.search(words + r" +0:00:02[^$]*0:00:03", uncoloured(terminal.screen)), terminal.screen
        assert "ds_01" in terminal.screen.splitlines()[-1]


def test_a_folder_and_images_can_be_uploaded(own_server: FakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "a.png").write_bytes(b"a")
    first = run("dataset", "upload", str(folder), "-o", "json", endpoint=own_server.endpoint)
    second = run(
        "dataset", "upload", str(folder / "rows.jsonl"), "--images", str(folder), "-o", "json",
        endpoint=own_server.endpoint,
    )  # fmt: skip
    assert json.loads(first.stdout)["sha256"] == json.loads(second.stdout)["sha256"]
    (folder / "more.jsonl").write_text("{}\n")
    refused = run("dataset", "upload", str(folder), endpoint=own_server.endpoint)
    assert refused.returncode == 2 and "exactly one file of rows" in refused.stderr


def test_validate_prints_findings_grouped_and_exits_with_1_for_errors(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text("{}\n" + "oops\n" * 30)
    shown = run("dataset", "validate", str(file), "--findings", "5", endpoint=endpoint, **PLAIN)
    assert shown.returncode == 1
    lines = shown.stdout.splitlines()
    assert lines[0] == "30 errors"
    assert lines[1:4] == ["  lines 2, 3, 4, ... (30)  NOT_JSON  is not a JSON object", "    fix: mend it", "1 note"]
    assert lines[-1] == "✗ 30 errors, 1 note"
    assert "  read as  jsonl\n  rows     31\n" in shown.stdout and "\x1b" not in shown.stdout
    as_json = run("dataset", "validate", str(file), "-o", "json", endpoint=endpoint)
    assert as_json.returncode == 1 and len(json.loads(as_json.stdout)["findings"]) == 31
    file.write_text('{"a": 1}\n')
    clean = run("dataset", "validate", str(file), endpoint=endpoint, **PLAIN)
    assert (clean.returncode, clean.stdout.splitlines()[-1]) == (0, "✓ nothing was found")
    assert run("dataset", "get", "broken", endpoint=endpoint).returncode == 1


def test_findings_that_differ_in_their_line_alone_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    from luthier.v1.dataset_report_pb2 import FINDING_LEVEL_ERROR, FINDING_LEVEL_WARNING, Finding, FindingCount

    def finding(
        line: int, message: str, fix: str = "", *, level: Any = FINDING_LEVEL_ERROR, code: str = "A"
    ) -> Finding:
        return Finding(level=level, code=code, line=line, message=message, fix=fix)

    findings = [
        *(finding(line, f"Line {line} has no prompt.", "name it") for line in range(2, 9)),
        finding(9, "Line 9 has no completion.", "name it"),
        *(finding(line, f"Line {line} repeats line 1.", level=FINDING_LEVEL_WARNING, code="B") for line in (1500, 17)),
        finding(18, "Line 18 repeats line 2.", level=FINDING_LEVEL_WARNING, code="B"),
        finding(0, "The file is odd.", level=FINDING_LEVEL_WARNING, code="C"),
    ]
    counts = [
        FindingCount(level=FINDING_LEVEL_ERROR, code="A", count=2000),
        FindingCount(level=FINDING_LEVEL_WARNING, code="B", count=3),
        FindingCount(level=FINDING_LEVEL_WARNING, code="C", count=1),
    ]
    reports.print_findings(findings, counts, 20)
    assert capsys.readouterr().out.splitlines() == [
        "2,000 errors",
        "  lines 2, 3, 4, ... (7)  A  This line has no prompt.",
        "  line 9  A  Line 9 has no completion.",
        "    fix: name it",
        "  and 1,992 more A",
        "4 warnings",
        "  lines 1500, 17  B  This line repeats line 1.",
        "  line 18  B  Line 18 repeats line 2.",
        "  file  C  The file is odd.",
    ]
    reports.print_findings(findings, counts, 1)
    assert capsys.readouterr().out.splitlines() == [
        "2,000 errors",
        "  lines 2, 3, 4, ... (7)  A  This line has no prompt.",
        "    fix: name it",
        "  and 1,993 more A",
        "4 warnings",
        "  lines 1500, 17  B  This line repeats line 1.",
        "  and 1 more B",
        "  and 1 more C",
    ]


def test_a_template_that_was_given_is_not_called_the_models_own() -> None:
    from luthier.v1.dataset_report_pb2 import TokenReport
    from luthier.v1.tokenization_pb2 import Tokenization

    def shown(**fields: Any) -> str:
        report = TokenReport(template_sha256="ab" * 32, tokenization=Tokenization(**fields))
        return reports._template(report)

    assert shown() == "the model's own  (abababababab)"
    assert shown(chat_template="given") == "the given one  (abababababab)"
    assert shown(chat_template_name="qwen") == "qwen  (abababababab)"


def test_a_refused_upload_says_how_to_see_all(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "refused.jsonl"
    file.write_text("oops\n" * 60)
    assert (
        "`luthier dataset validate FILE --findings 1000` shows"
        in run("dataset", "upload", str(file), endpoint=endpoint).stderr
    )


@pytest.mark.parametrize(
    ("source", "more", "request_"),
    [
        ("hf:openai/gsm8k", [], {"name": "gsm8k", "hub": {"id": "openai/gsm8k"}}),
        (
            "hf://datasets/openai/gsm8k@v1",
            ["--split", "test", "--config", "main", "--token-secret", "hub"],
            {"name": "gsm8k-test", "hub": {"id": "openai/gsm8k", "revision": "v1", "split": "test", "config": "main"},
             "token_secret": "hub"},
        ),
        (
            "https://example.org/a/My%20Cards.jsonl.gz?x=1",
            ["--sha256", "ab" * 32],
            {"name": "my-20cards", "url": "https://example.org/a/My%20Cards.jsonl.gz?x=1", "sha256": "ab" * 32},
        ),
        ("s3://bucket/key.parquet", ["--name", "cards"], {"name": "cards", "url": "s3://bucket/key.parquet"}),
    ],
)  # fmt: skip
def test_an_import_names_its_source_as_people_write_it(
    own_server: FakeServer, source: str, more: list[str], request_: dict[str, object]
) -> None:
    shown = run("dataset", "import", source, *more, endpoint=own_server.endpoint)
    assert shown.returncode == 0, shown.stderr
    assert f"{request_['name']}@1  3 rows" in shown.stdout
    (call,) = own_server.calls("ImportDataset")
    assert call["request"] == {**request_, "reading": {}}


def test_options_of_the_hub_do_not_go_with_an_address(endpoint: str) -> None:
    assert run("dataset", "import", "https://x/", "--split", "test", endpoint=endpoint).returncode == 2
    refused = run("dataset", "import", "https://wrong/", "--name", "wrong", endpoint=endpoint)
    assert refused.returncode == 1 and "line 1: is not a JSON object" in refused.stderr


def test_the_doctor_shows_the_report_and_what_the_rows_are_as_tokens(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    file = tmp_path / "cards.jsonl"
    file.write_text('{"a": 1}\n')
    run("dataset", "upload", str(file), endpoint=server)
    alone = run("dataset", "doctor", "cards", endpoint=server, **PLAIN)
    assert alone.returncode == 0
    assert "2 warnings\n  line 7  DUPLICATE_ROW  as [2Jgone line 3\n  and 1 more DUPLICATE_ROW\n" in alone.stdout
    assert "    ≤  64  10  " + "█" * 40 in alone.stdout
    assert alone.stdout.endswith("✓ 2 warnings\n")
    checked = run(
        "dataset", "doctor", "cards", "--base-model", "bad", "--validation", "cards", "--train-on", "last_turn",
        "--chat-template", "qwen", "--overlong", "drop", "--response-template", "A:", "--max-length", "64",
        endpoint=server, **PLAIN,
    )  # fmt: skip
    assert checked.returncode == 1
    for words in (
        "tokens for bad", "validation tokens for bad", "the model's own  (abababababab)",
        "assistant, known by generation blocks", "20,000, 25.0% trained (5,000)", "user 9,000, assistant 5,000",
        "2,048 tokens, the limit is 1,024", "12 rows cut, 340 tokens lost", "188, about 3m 20s",
        "2,048   12  ▌  over the limit", "1 error\n  line 3  NO_TRAINED_TOKEN", "✗ 2 errors, 26 warnings",
    ):  # fmt: skip
        assert words in checked.stdout, words
    assert "\x1b" not in checked.stdout and "\x07" not in checked.stdout
    (call,) = own_server.calls("CheckDataset")
    assert call["request"]["tokenization"] == {
        "train_on": "TRAIN_ON_LAST_TURN", "chat_template_name": "qwen", "overlong": "OVERLONG_DROP",
        "response_template": "A:",
    }  # fmt: skip
    assert run("dataset", "doctor", "cards", "--train-on", "assistant", endpoint=server).returncode == 2
    as_json = run("dataset", "doctor", "cards", "--base-model", "builtin/tiny", "-o", "json", endpoint=server)
    body = json.loads(as_json.stdout)
    assert as_json.returncode == 0
    assert (body["dataset"]["name"], body["token_reports"][0]["base_model"]) == ("cards", "builtin/tiny")


def test_a_template_may_come_from_a_file(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    file, template = tmp_path / "cards.jsonl", tmp_path / "mine.jinja"
    file.write_text("{}\n")
    template.write_text("{{ messages }}")
    run("dataset", "upload", str(file), endpoint=server)
    for given in (f"@{template}", str(template), "{{ messages }}"):
        run("dataset", "preview", "cards", "--base-model", "b", "--chat-template", given, endpoint=server)
    said = [call["request"]["tokenization"] for call in own_server.calls("PreviewDataset")]
    assert said == [{"chat_template": "{{ messages }}"}] * 3
    missing = run("dataset", "preview", "cards", "--chat-template", "nowhere.jinja", endpoint=server)
    assert missing.returncode == 1 and "nowhere.jinja: No such file" in missing.stderr


def test_a_preview_without_colour_marks_what_is_trained_and_what_is_lost(endpoint: str, cards: str) -> None:
    arguments = ["dataset", "preview", cards, "--base-model", "builtin/tiny", "--line", "17"]
    shown = run(*arguments, endpoint=endpoint, **PLAIN)
    assert shown.stdout.splitlines() == [
        "legend: context  ⟦trained⟧  ⟪lost: beyond the limit⟫",
        "",
        "line 17  trained 2 of 6 tokens, 1 lost",
        "  <user> Hi [2Jgone ",
        "  ⟦Hello",
        "  ⟧⟪you⟫",
        "  line 17  ROW_TOO_LONG  is cut",
        "    fix: raise the limit",
        "",
        "trained tokens are known by generation blocks, template abababababab",
    ]
    plain = run(*arguments, endpoint=endpoint, **ASCII)
    assert plain.returncode == 0 and "  [[Hello\n  ]]<<you>>\n" in plain.stdout


def test_a_preview_without_a_base_model_shows_the_turns(endpoint: str, cards: str) -> None:
    shown = run("dataset", "preview", cards, "-n", "1", endpoint=endpoint, **PLAIN).stdout
    assert shown.splitlines()[2:] == [
        "line 1",
        "  user",
        "    Hi [2Jgone ",
        "  assistant",
        "    ⟦Hello",
        "    you⟧",
    ]


def test_options_about_tokens_are_refused_by_name_where_no_base_model_says_whose(endpoint: str, cards: str) -> None:
    for command in ("preview", "doctor"):
        one = run("dataset", command, cards, "--chat-template", "qwen", endpoint=endpoint)
        assert one.returncode == 2 and "--chat-template needs --base-model" in one.stderr
        two = run("dataset", command, cards, "--train-on", "assistant", "--max-length", "64", endpoint=endpoint)
        assert two.returncode == 2 and "--train-on and --max-length need --base-model" in two.stderr


def test_a_row_in_error_is_shown_without_a_mark(capsys: pytest.CaptureFixture[str]) -> None:
    from luthier.v1.dataset_report_pb2 import FINDING_LEVEL_ERROR, FINDING_LEVEL_WARNING
    from luthier.v1.datasets_pb2 import PreviewDatasetResponse
    from luthier_client.cli.preview import print_preview

    def printed(level: Any) -> str:
        response = PreviewDatasetResponse()
        row = response.rows.add(line=3)
        row.sequences.add().turns.add(role="assistant", content="Hello", trained=True)
        row.sequences.add(name="text", text="World")
        row.findings.add(level=level, code="TEMPLATE_REFUSES", line=3, message="no")
        print_preview(response)
        return capsys.readouterr().out.partition("\n")[2]

    assert "    ⟦Hello⟧\n" in printed(FINDING_LEVEL_WARNING) and "  ⟦World⟧\n" in printed(FINDING_LEVEL_WARNING)
    wrong = printed(FINDING_LEVEL_ERROR)
    assert "    Hello\n" in wrong and "  World\n" in wrong and "⟦" not in wrong


def test_an_interrupted_upload_says_how_to_go_on(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "pondering-long.jsonl"
    file.write_text('{"a": 2}\n')
    terminal = Terminal("dataset", "upload", str(file), endpoint=endpoint)
    terminal.until("checking on the server")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.screen.rstrip().endswith("give the command again, and the upload goes on where it was")


def test_a_preview_is_json_when_asked(endpoint: str, cards: str) -> None:
    arguments = ["dataset", "preview", cards, "--base-model", "builtin/tiny", "-o", "json"]
    tokens = json.loads(run(*arguments, endpoint=endpoint).stdout)["rows"][0]["sequences"][0]["tokens"]
    assert [token["trained"] for token in tokens] == [False, False, False, True, True, True]


def test_a_preview_in_colour_tells_trained_context_and_lost_apart_token_by_token(endpoint: str, cards: str) -> None:
    arguments = ["dataset", "preview", cards, "--base-model", "builtin/tiny", "-n", "1"]
    terminal = Terminal(*arguments, endpoint=endpoint)
    assert terminal.end() == 0
    screen = terminal.screen
    trained, context = r"\x1b\[38;5;231m\x1b\[48;5;(\d+)m", r"\x1b\[38;5;(\d+)m"
    hel, lo = (re.search(trained + text, screen) for text in ("Hel", "lo↵"))
    assert hel and lo and hel[1] != lo[1]
    user, hi = (re.search(context + text, screen) for text in ("<user>", " Hi"))
    assert user and hi and user[1] != hi[1]
    assert re.search(context + r"\x1b\[9myou", screen)
    assert "\x1b[2J" not in screen and "\x07" not in screen
    assert "⟦" not in screen and "trained 2 of 6 tokens, 1 lost" in uncoloured(screen)
    plain = Terminal(*arguments, endpoint=endpoint, NO_COLOR="1")
    assert plain.end() == 0
    assert "⟦Hello" in plain.screen and "\x1b[" not in plain.screen


def test_new_datasets_are_made_of_others(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    file = tmp_path / "cards.jsonl"
    file.write_text('{"a": 1}\n' * 10)
    run("dataset", "upload", str(file), endpoint=server)
    split = run("dataset", "split", "cards", "--validation", "0.1", "--seed", "1", endpoint=server)
    assert [line.split("  ")[1:3] for line in split.stdout.splitlines()] == [
        ["cards-train@1", "9 rows"], ["cards-validation@1", "1 rows"],
    ]  # fmt: skip
    sample = run("dataset", "sample", "cards", "--rows", "4", "--name", "few", "-o", "id", endpoint=server)
    assert sample.stdout.startswith("ds_")
    whole = run("dataset", "concatenate", "cards", sample.stdout[:12], "--name", "all", "-o", "json", endpoint=server)
    assert json.loads(whole.stdout)[0]["rows"] == "14"
    got = run("dataset", "get", "all", endpoint=server).stdout
    assert re.search(r"made by +concatenate of ds_\w+, ds_\w+ \(seed=1\)", got)
    for wrong in (["split", "cards", "--validation", "1"], ["split", "cards"], ["concatenate", "cards", "--name", "x"]):
        assert run("dataset", *wrong, endpoint=server).returncode == 2


def test_get_shows_reading_source_findings_and_token_reports(endpoint: str, cards: str) -> None:
    run("dataset", "import", "hf:openai/gsm8k", "--name", "from-hub", "--format", "text", endpoint=endpoint)
    shown = run("dataset", "get", "from-hub", endpoint=endpoint).stdout
    assert re.search(r"source +hf://datasets/openai/gsm8k@abc\?split=train", shown)
    assert re.search(r"read as +text", shown) and re.search(r"findings +2 warnings", shown)
    checked = run("dataset", "get", cards, endpoint=endpoint).stdout
    assert re.search(
        r"tokens 1 +builtin/tiny: 1,000 rows, 20,000 tokens, 25.0% trained, longest 2,048, "
        r"12 rows cut, 340 tokens lost, 12 warnings\n",
        checked,
    )


def test_a_short_id_of_a_dataset_is_found_by_the_server(endpoint: str, cards: str) -> None:
    whole = run("dataset", "get", cards, "-o", "id", endpoint=endpoint).stdout.strip()
    assert run("dataset", "get", whole[:14], "-o", "id", endpoint=endpoint).stdout.strip() == whole
    assert run("dataset", "get", "ds_99", endpoint=endpoint).returncode == 1


def test_jobs_take_the_options_of_tokenization(own_server: FakeServer, tmp_path: Path) -> None:
    server, file = own_server.endpoint, job_file(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    shown = run(
        "job", "create", "-f", file, "--set", "tokenization.chat_template_name=qwen", "--set", "overlong=split",
        "--chat-template", str(template), "--train-on", "last-turn", "--validate-only", "-o", "json", endpoint=server,
    )  # fmt: skip
    assert json.loads(shown.stdout)["fine_tune"]["tokenization"] == {
        "chat_template": "{{ messages }}", "train_on": "last_turn", "overlong": "split",
    }  # fmt: skip
    data = tmp_path / "cards.jsonl"
    data.write_text("{}\n")
    options = [
        "--overlong",
        "error",
        "--response-template",
        "A:",
        "--chat-template",
        "gemma",
        "--train-on",
        "assistant",
    ]
    trained = run("train", str(data), *options, "--train-on", "assistant", "--detach", "-o", "json", endpoint=server)
    assert json.loads(trained.stdout)["spec"]["fine_tune"]["tokenization"] == {
        "chat_template_name": "gemma", "chat_template": "", "train_on": "TRAIN_ON_ASSISTANT",
        "response_template": "A:", "overlong": "OVERLONG_ERROR",
    }  # fmt: skip


def test_a_watch_tells_the_check_of_the_datasets_in_a_line(endpoint: str, tmp_path: Path) -> None:
    shown = run("job", "create", "--watch", "-f", job_file(tmp_path, checked="1"), endpoint=endpoint).stdout
    (line,) = [line for line in shown.splitlines() if "  checked  " in line]
    assert line.split("  checked  ")[1] == (
        "1,000 rows, 20,000 tokens, 25.0% trained, longest 2,048, 12 rows cut, 340 tokens lost, 12 warnings: "
        "line 17: is too long [2Jgone"
    )
    assert "validating" in shown and "\x1b" not in shown
    terminal = Terminal(
        "job", "create", "--watch", "-f", job_file(tmp_path, checked="1", steps="30", pace="0.05"), endpoint=endpoint
    )
    terminal.until("validating")
    terminal.until("! line 17: is too long")
    assert terminal.end() == 0
    assert "20,000 tokens, 25.0% trained" in terminal.screen and "\x1b[2Jgone" not in terminal.screen


def test_a_mistyped_template_is_refused_with_the_nearest_name(endpoint: str, cards: str) -> None:
    arguments = ["dataset", "preview", cards, "--base-model", "builtin/tiny", "--chat-template"]
    refused = run(*arguments, "qwn", endpoint=endpoint)
    assert refused.returncode == 2 and refused.stdout == ""
    words = " ".join(refused.stderr.split())
    assert "--chat-template" in words and 'no template "qwn": did you mean "qwen"?' in words
    assert "chatml, llama-3, gemma, mistral, qwen" in " ".join(run(*arguments, "x", endpoint=endpoint).stderr.split())


def test_a_hash_that_is_none_is_refused_in_words(own_server: FakeServer) -> None:
    refused = run("dataset", "import", "https://x/", "--name", "x", "--sha256", "00", endpoint=own_server.endpoint)
    assert refused.returncode == 2 and "64 hexadecimal digits" in " ".join(refused.stderr.split())
    assert not own_server.calls("ImportDataset")
    large = run("dataset", "import", "https://x/", "--name", "x", "--sha256", "AB" * 32, endpoint=own_server.endpoint)
    assert large.returncode == 0
    assert own_server.calls("ImportDataset")[0]["request"]["sha256"] == "ab" * 32


def test_the_choices_of_the_options_are_the_contracts() -> None:
    from luthier.v1 import dataset_pb2, tokenization_pb2
    from luthier_client import enums

    for words, enum in (
        (tokenization.TRAIN_ON, tokenization_pb2.TrainOn), (tokenization.OVERLONG, tokenization_pb2.Overlong),
        (reading.FORMATS, dataset_pb2.DatasetFormat), (reading.FILE_FORMATS, dataset_pb2.FileFormat),
    ):  # fmt: skip
        assert [word.replace("-", "_") for word in words] == enums.choices(enum.DESCRIPTOR)
    field = tokenization_pb2.Tokenization.DESCRIPTOR.fields_by_name["chat_template_name"]
    (rules,) = (value for option, value in field.GetOptions().ListFields() if option.full_name == "buf.validate.field")
    assert ["", *tokenization.TEMPLATES] == list(getattr(rules.string, "in"))


@pytest.mark.parametrize(
    "command", ["upload", "import", "validate", "doctor", "preview", "split", "sample", "concatenate", "list", "get"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown = run("dataset", command, "--help")
    assert shown.returncode == 0 and f"luthier dataset {command}" in shown.stdout
