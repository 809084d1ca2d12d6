"""The command `luthier`, run as people run it: exit codes, formats, errors, terminals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from unit.client.command import LUTHIER, Terminal, job_file, run
from unit.client.fake_server import FakeServer


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('modules:', *sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in printed.rpartition("modules: ")[2].split()}


def test_help_loads_neither_grpc_nor_rich_nor_yaml() -> None:
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["job", "list", "--help"],
        ["model", "--help"],
        ["export", "get", "--help"],
    ):
        loaded = loaded_by(f"from luthier_client.cli.main import cli\ncli({arguments!r}, standalone_mode=False)")
        assert "click" in loaded
        assert not loaded & {"grpc", "google", "rich", "yaml", "luthier", "asyncio"}


def test_the_client_loads_no_torch_and_no_numpy() -> None:
    code = "import luthier_client.client, luthier_client.spec, luthier_client.cli.follow, luthier_client.cli.live"
    loaded = loaded_by(code)
    assert "grpc" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "luthier_server", "luthier_trainer", "aiosqlite"}


@pytest.mark.parametrize(
    ("labels", "code"), [({}, 0), ({"outcome": "failed"}, 1), ({"pace": "0.2", "steps": "999"}, 3)]
)
def test_the_exit_code_of_a_watch_tells_how_the_job_went(
    endpoint: str, tmp_path: Path, labels: dict[str, str], code: int
) -> None:
    file = job_file(tmp_path, **labels)
    created = run("job", "create", "-f", file, "-o", "id", endpoint=endpoint)
    assert created.returncode == 0
    job_id = created.stdout.strip()
    if code == 3:
        assert run("job", "cancel", job_id, endpoint=endpoint).returncode == 0
    watched = run("job", "watch", job_id, endpoint=endpoint)
    assert watched.returncode == code, watched.stderr
    assert {0: "succeeded", 1: "failed", 3: "cancelled"}[code] in watched.stdout
    assert run("job", "wait", job_id, endpoint=endpoint).returncode == code
    assert "\x1b" not in watched.stdout + watched.stderr


def test_a_failed_job_shows_reason_message_hint_and_log(endpoint: str, tmp_path: Path) -> None:
    shown = run("job", "create", "-f", job_file(tmp_path, outcome="failed"), "--watch", endpoint=endpoint)
    for words in ("LOSS_NOT_FINITE", "The loss became infinite.", "hint: Lower the learning rate.", "loss inf"):
        assert words in shown.stdout


def test_json_prints_each_event_on_a_line_that_is_the_proto(endpoint: str, tmp_path: Path) -> None:
    from google.protobuf import json_format

    from luthier.v1.event_pb2 import JobEvent

    shown = run("-o", "json", "job", "create", "--watch", "-f", job_file(tmp_path), endpoint=endpoint)
    events = [json_format.Parse(line, JobEvent()) for line in shown.stdout.splitlines()]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].state_changed.model_id.startswith("model_")
    assert json.loads(shown.stdout.splitlines()[-1])["state_changed"]["state"] == "JOB_STATE_SUCCEEDED"


def test_many_quick_steps_print_few_lines_but_always_the_last(endpoint: str, tmp_path: Path) -> None:
    shown = run("job", "create", "--watch", "-f", job_file(tmp_path, steps="400"), endpoint=endpoint).stdout
    steps = re.findall(r"step (\d+)/400", shown)
    assert len(steps) < 40 and steps[-1] == "400"


def test_nothing_a_model_or_server_wrote_reaches_the_terminal_as_a_command(endpoint: str, tmp_path: Path) -> None:
    made = run(
        "job", "create", "-f", job_file(tmp_path), "-o", "id", "--set", "display_name=\x1b[2Jgone", endpoint=endpoint
    )
    job_id = made.stdout.strip()
    for arguments in (["job", "watch", job_id], ["job", "logs", job_id], ["job", "get", job_id], ["job", "list"]):
        shown = run(*arguments, endpoint=endpoint)
        assert shown.returncode == 0
        assert "\x1b" not in shown.stdout and "\x07" not in shown.stdout


def test_usage_errors_exit_with_2_and_name_the_place(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("fine_tune:\n  base_modle: x\n")
    wrong = run("job", "create", "-f", str(file), endpoint=endpoint)
    assert wrong.returncode == 2
    assert f"{file}:2: unknown key 'base_modle' in fine_tune; did you mean 'base_model'?" in wrong.stderr
    assert run("job", "create", "-f", job_file(tmp_path), "--set", "rank=x", endpoint=endpoint).returncode == 2
    assert run("job", "nonsense", endpoint=endpoint).returncode == 2
    assert run("job", "list", endpoint="http://x").returncode == 2


def test_errors_of_the_server_exit_with_1_and_list_every_violation(endpoint: str, tmp_path: Path) -> None:
    arguments = ["job", "create", "-f", job_file(tmp_path), "--set", "base_model=bad"]
    refused = run(*arguments, endpoint=endpoint)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("error: 2 violations\n")
    assert "  spec.fine_tune.base_model: no such model\n" in refused.stderr
    as_json = json.loads(run("-o", "json", *arguments, endpoint=endpoint).stderr)["error"]
    assert (as_json["reason"], as_json["code"], len(as_json["violations"])) == ("SPEC_INVALID", "INVALID_ARGUMENT", 2)


def test_without_a_server_the_error_says_how_to_start_one() -> None:
    alone = run("job", "list")
    assert alone.returncode == 1
    assert "start one with `luthierd`" in alone.stderr and "Traceback" not in alone.stderr
    assert run("version").stdout == "client  0.1.0\n"


def test_a_refused_upload_prints_the_lines(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text("".join("{}\n" if number % 2 else "oops\n" for number in range(1, 101)))
    refused = run("dataset", "upload", str(file), endpoint=endpoint)
    assert refused.returncode == 1
    assert "  line 2: is not a JSON object\n" in refused.stderr
    assert "and 25 more (lines 52, 54," in refused.stderr


def test_ids_may_be_latest_or_any_unique_beginning(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    assert run("job", "get", "@latest", endpoint=server).stderr == "error: there is no job yet\n"
    file = job_file(tmp_path)
    first, second = (run("job", "create", "-f", file, "-o", "id", endpoint=server).stdout.strip() for _ in range(2))
    assert run("job", "get", "@latest", "-o", "id", endpoint=server).stdout.strip() == second
    for text in (first, first[:16], first.removeprefix("job_")[:12]):
        assert run("job", "get", text, "-o", "id", endpoint=server).stdout.strip() == first
    ambiguous = run("job", "get", "job_01", endpoint=server)
    assert ambiguous.returncode == 1
    assert first in ambiguous.stderr and second in ambiguous.stderr
    assert run("job", "get", "job_99", endpoint=server).returncode == 1
    model = run("model", "get", "@latest", "-o", "id", endpoint=server).stdout.strip()
    assert model == second.replace("job_", "model_")


def test_train_goes_from_a_file_to_a_model_and_says_what_is_next(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    data = tmp_path / "cards.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    trained = run("train", str(data), "--epochs", "2", "--rank", "4", endpoint=server)
    assert trained.returncode == 0, trained.stderr
    assert "uploaded cards@1  5 rows" in trained.stderr
    model = run("model", "list", "-o", "id", endpoint=server).stdout.strip()
    assert f"luthier model download {model} --to {model}" in trained.stdout
    assert "PeftModel.from_pretrained" in trained.stdout
    spec = json.loads(run("job", "get", "@latest", "-o", "json", endpoint=server).stdout)["spec"]
    assert spec["fine_tune"]["lora"]["rank"] == 4
    assert spec["fine_tune"]["hyperparameters"]["epochs"] == 2
    detached = run("train", "cards", "--detach", "-o", "id", endpoint=server)
    assert detached.stdout.startswith("job_")
    assert run("train", "nowhere.jsonl", endpoint=server).stderr == "error: nowhere.jsonl: No such file\n"
    assert run("train", str(data), "--rank", "many", endpoint=server).returncode == 2
    target = tmp_path / "out"
    assert run("model", "download", "@latest", "--to", str(target), endpoint=server).returncode == 0
    assert (target / "adapter_config.json").is_file()
    assert run("model", "download", "@latest", "--to", str(target), endpoint=server).returncode == 1


def test_validate_only_prints_a_job_file_and_creates_nothing(own_server: FakeServer, tmp_path: Path) -> None:
    from luthier_client.spec import load_spec, parse_spec

    file = job_file(tmp_path)
    shown = run("job", "create", "-f", file, "--validate-only", endpoint=own_server.endpoint)
    assert parse_spec(shown.stdout) == load_spec(file)
    assert run("job", "list", "-o", "id", endpoint=own_server.endpoint).stdout == ""


def test_a_pipe_that_is_closed_early_is_silent(endpoint: str, tmp_path: Path) -> None:
    command = f"{' '.join(LUTHIER)} job create --watch -o json -f {job_file(tmp_path, steps='3000')} | head -n 1"
    env = {**os.environ, "LUTHIER_ENDPOINT": endpoint}
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60)
    assert shown.stdout.count("\n") == 1
    assert shown.stderr == ""


def test_the_live_view_shows_steps_and_ends_with_the_card(endpoint: str, tmp_path: Path) -> None:
    file = job_file(tmp_path, steps="40", pace="0.05", queued="1")
    terminal = Terminal("job", "create", "--watch", "-f", file, endpoint=endpoint)
    terminal.until("queued, position 2")
    terminal.until("ETA")
    assert re.search(r"step \d+/40", terminal.screen)
    assert "▁" in terminal.screen
    terminal.until("✓")
    assert terminal.end() == 0
    for words in ("succeeded", "eval loss", "luthier model download", "before", "after"):
        assert words in terminal.screen
    assert "\x1b[31mstring" not in terminal.screen and "\x1b]0;owned" not in terminal.screen


def test_ctrl_c_leaves_the_watch_and_cancels_nothing(own_server: FakeServer, tmp_path: Path) -> None:
    file = job_file(tmp_path, steps="2000", pace="0.05")
    terminal = Terminal("job", "create", "--watch", "-f", file, endpoint=own_server.endpoint)
    terminal.until("ETA")
    os.kill(terminal.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "the job goes on" in terminal.screen and "luthier job watch job_" in terminal.screen
    assert "Traceback" not in terminal.screen
    states = run("job", "list", "--state", "running", "-o", "id", endpoint=own_server.endpoint)
    assert states.stdout.startswith("job_")


def test_the_live_view_says_that_it_reconnects_and_goes_on(own_server: FakeServer, tmp_path: Path) -> None:
    file = job_file(tmp_path, steps="60", pace="0.05")
    terminal = Terminal("job", "create", "--watch", "-f", file, endpoint=own_server.endpoint)
    terminal.until("ETA")
    own_server.kill()
    terminal.until("reconnecting")
    own_server.start()
    terminal.until("✓", timeout=30)
    assert terminal.end() == 0


def test_no_color_is_honoured_and_a_narrow_terminal_is_not_overrun(endpoint: str, tmp_path: Path) -> None:
    file = job_file(tmp_path, steps="30", pace="0.03")
    terminal = Terminal("job", "create", "--watch", "-f", file, endpoint=endpoint, columns=38, NO_COLOR="1")
    assert terminal.end() == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.screen)
    live = terminal.screen.split("✓")[0]
    for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", live).splitlines():
        assert len(line.rsplit("\r", 1)[-1]) <= 38, line


def test_the_last_step_is_written_also_when_a_phase_follows_at_once() -> None:
    from luthier.v1.event_pb2 import PHASE_EVALUATING, JobEvent, PhaseProgressed, StepCompleted
    from luthier.v1.job_pb2 import Job
    from luthier_client.cli.lines import LineWriter
    from luthier_client.cli.picture import JobPicture

    written: list[str] = []
    writer = LineWriter(JobPicture(Job()), written.append, now=lambda: 0.0)
    for number in range(1, 10):
        writer.add(JobEvent(step_completed=StepCompleted(step=number, total_steps=9)))
    for done in range(5):
        writer.add(
            JobEvent(phase_progressed=PhaseProgressed(phase=PHASE_EVALUATING, completed=done, total=4, unit="rows"))
        )
    writer.flush()
    assert [line.split("  ")[1] for line in written] == ["step 1/9", "step 9/9", "evaluating", "evaluating 4/4 rows"]


def test_a_mistake_is_not_told_twice(capsys: pytest.CaptureFixture[str]) -> None:
    from luthier_client.cli import output
    from luthier_client.cli.lazy import Settings
    from luthier_client.errors import FailedPrecondition, InvalidDataset, InvalidSpec

    chosen = Settings(endpoint=None, output="table")
    pdf = "The file is a PDF. Make rows of it."
    output.error(chosen, InvalidDataset(pdf, violations=[("file", f"{pdf} [FILE_FORMAT_MISMATCH]")]))
    assert capsys.readouterr().err == f"error: {pdf}\n"
    output.error(chosen, InvalidDataset(pdf, violations=[("file", "It is empty. [EMPTY_FILE]")]))
    assert capsys.readouterr().err == f"error: {pdf}\n  file: It is empty. [EMPTY_FILE]\n"
    rows = [("line 1", "is no JSON"), ("line 2", "too")]
    output.error(chosen, InvalidDataset("line 1: is no JSON (and 1 more)", violations=rows))
    assert capsys.readouterr().err == "error: 2 errors\n  line 1: is no JSON\n  line 2: too\n"
    output.error(chosen, InvalidSpec("a.b: is wrong", violations=[("a.b", "is wrong")]))
    assert capsys.readouterr().err == "error: a.b: is wrong\n"
    output.error(chosen, InvalidSpec("a.b: is wrong (and 1 more)", violations=[("a.b", "is wrong"), ("c", "too")]))
    assert capsys.readouterr().err == "error: 2 mistakes\n  a.b: is wrong\n  c: too\n"
    output.error(chosen, InvalidSpec("is wrong", violations=[("a.b", "is wrong")]))
    assert capsys.readouterr().err == "error: a.b: is wrong\n"
    output.error(chosen, FailedPrecondition("job_1 has ended", violations=[("job_1", "job_1 has ended")]))
    assert capsys.readouterr().err == "error: job_1 has ended\n"
