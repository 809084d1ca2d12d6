"""The commands about models and exports: what they print, ask, refuse and advise."""

import json
import os
import signal
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from unit.client.command import LUTHIER, Terminal, called, job_file
from unit.client.fake_models import FILES
from unit.client.fake_server import FakeServer

from luthier.v1.job_pb2 import JobSpec
from luthier.v1.model_pb2 import LineageEdge, LineageKind, LineageNode
from luthier.v1.models_pb2 import GetModelLineageResponse
from luthier_client import Client, errors
from luthier_client.cli import again
from luthier_client.cli.diff import Side, differences, flat, hashes
from luthier_client.cli.lineage import tree
from luthier_client.cli.model_edit import resolving


def test_an_export_prints_its_phases_its_proof_and_what_is_next(endpoint: str) -> None:
    shown = called("model", "export", "bot@production", "--format", "gguf", "--type", "Q4_K_M", endpoint=endpoint)
    assert shown.returncode == 0, shown.stderr
    for words in (
        "exporting 2/2 files", "proving 8/16 rows", "publishing 1/2 files", "gguf q4_k_m of bot@production",
        "proof passed  16 rows, 512 tokens, by llama.cpp b1", "luthier export download export_", "ollama create",
    ):  # fmt: skip
        assert words in shown.stdout, words
    rows = [line.split() for line in shown.stdout.splitlines() if " yes" in line]
    # 99.999 % is not all of it, and is not shown as such.
    assert ["top1_agreement", "99.99%", "at", "least", "90%", "yes"] in rows
    assert ["perplexity_ratio", "1.0100", "at", "most", "1.1000", "yes"] in rows


def test_an_export_that_differs_fails_and_says_what_differs(endpoint: str) -> None:
    shown = called("model", "export", "unequal", "--format", "merged", endpoint=endpoint)
    assert shown.returncode == 1
    for words in ("EXPORT_NOT_EQUAL", "Take more bits.", "proof FAILED: top1_agreement", "25%", "'lute', not 'harp'"):
        assert words in shown.stdout, words
    assert "\x1b" not in shown.stdout and "luthier export download" not in shown.stdout
    as_json = called("model", "export", "unequal", "--format", "merged", "-o", "json", endpoint=endpoint)
    assert as_json.returncode == 1 and as_json.stdout == ""
    assert json.loads(as_json.stderr)["error"]["reason"] == "EXPORT_NOT_EQUAL"


def test_an_export_for_programs_is_the_export(own_server: FakeServer) -> None:
    server = own_server.endpoint
    arguments = ["model", "export", "bot", "--format", "merged", "--type", "fp16", "--to", "hf://me/bot"]
    made = json.loads(called(*arguments, "--secret", "hub", "--rows", "1", "-o", "json", endpoint=server).stdout)
    assert made["task"]["merged"]["weights"] == "WEIGHT_TYPE_F16"
    assert made["task"]["destination"] == {"uri": "hf://me/bot", "credentials_secret": "hub", "public": False}
    assert called("export", "get", "@latest", "-o", "id", endpoint=server).stdout.strip() == made["id"]
    assert called("export", "get", made["id"][:20], "-o", "id", endpoint=server).stdout.strip() == made["id"]
    assert called("export", "list", "-o", "id", endpoint=server).stdout.strip() == made["id"]
    assert "merged f16" in called("export", "list", endpoint=server).stdout
    job = called(*arguments, "--no-wait", "-o", "id", endpoint=server).stdout.strip()
    assert job.startswith("job_")
    # No command about jobs minds that there are no steps.
    for command in (["watch"], ["wait"], ["get"], ["logs"]):
        assert called("job", *command, job, endpoint=server).returncode == 0
    listed = called("job", "list", endpoint=server).stdout
    assert listed.count("merged f16 of bot") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "adapter", "--type", "f16"], "leave out --type"),
        (["--format", "merged", "--type", "q4_k_m"], "no type of merged: bf16, f16, f32, nf4"),
        (["--format", "gguf", "--type", "q4"], "q4_k_m"),
        (["--format", "merged", "--adapter-only"], "--format gguf"),
        (["--format", "gguf", "--shard-bytes", "5"], "--format merged"),
        (["--format", "gguf", "--secret", "s3"], "--to URI"),
        ([], "--format"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_sent(arguments: list[str], words: str) -> None:
    refused = called("model", "export", "bot", *arguments)
    assert refused.returncode == 2 and words in refused.stderr


def test_the_live_view_of_an_export_shows_phases_and_ends_with_the_proof(endpoint: str) -> None:
    arguments = ["model", "export", "bot", "--format", "gguf"]
    terminal = Terminal(*arguments, "--rows", "30", endpoint=endpoint)
    terminal.until("exporting")
    terminal.until("proving 8/16 rows")
    assert terminal.end() == 0
    assert "gguf f16 of bot" in terminal.screen and "top1_agreement" in terminal.screen
    narrow = Terminal(*arguments, endpoint=endpoint, columns=30)
    assert narrow.end() == 0 and "Traceback" not in narrow.screen


def test_a_refused_deletion_lists_each_dependent_with_the_command_that_resolves_it(endpoint: str) -> None:
    model = "model_01J8ZQ4Y6N0000000000000009"
    refused = called("model", "delete", model, endpoint=endpoint)
    assert refused.returncode == 1
    for line in (
        "  job_01J8ZQ4Y6N0000000000000001: goes on from it (luthier job cancel job_01J8ZQ4Y6N0000000000000001)\n",
        "  export_01J8ZQ4Y6N0000000000000002: was made of it "
        "(luthier export delete export_01J8ZQ4Y6N0000000000000002)\n",
        "  support-bot@production: points to it (luthier model alias support-bot production --delete)\n",
    ):
        assert line in refused.stderr, refused.stderr
    assert resolving("model_01J8ZQ4Y6N0000000000000003", "", model).startswith("luthier model delete model_")
    assert resolving(model, "is needed", model) == ""


def test_a_deletion_by_name_is_refused_with_the_id_that_it_would_be(own_server: FakeServer, tmp_path: Path) -> None:
    refused = called("model", "delete", "job_01J8ZQ4Y6N0000000000000001:step-3", endpoint=own_server.endpoint)
    assert refused.returncode == 2 and "delete takes an id" in refused.stderr


def test_a_deletion_asks_on_a_terminal(own_server: FakeServer, tmp_path: Path) -> None:
    file = job_file(tmp_path)
    assert called("job", "create", "--watch", "-f", file, endpoint=own_server.endpoint).returncode == 0
    terminal = Terminal("model", "delete", "@latest", endpoint=own_server.endpoint)
    terminal.until("delete model_")
    terminal.type("n\n")
    assert terminal.end() == 1 and "depends" not in terminal.screen


def test_a_tar_on_stdout_is_nothing_but_the_tar(endpoint: str, tmp_path: Path) -> None:
    env = {**os.environ, "LUTHIER_ENDPOINT": endpoint}
    command = [*LUTHIER, "model", "download", "bot@3", "--tar", "-", "-o", "json"]
    shown = subprocess.run(command, capture_output=True, env=env, timeout=60)
    assert shown.returncode == 0 and shown.stderr == b""
    with tarfile.open(fileobj=BytesIO(shown.stdout), mode="r|") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert next(iter(members)) == "manifest.json" and {name: members[name] for name in FILES} == FILES
    file = tmp_path / "bot.tar"
    assert called("model", "download", "bot@3", "--tar", str(file), endpoint=endpoint).returncode == 0
    assert file.read_bytes() == shown.stdout
    again = called("model", "download", "bot@3", "--tar", str(file), endpoint=endpoint)
    assert again.returncode == 1 and "exists already" in again.stderr
    assert called("model", "download", "bot", "--tar", "x", "--to", "y", endpoint=endpoint).returncode == 2
    terminal = Terminal("model", "download", "bot", "--tar", "-", endpoint=endpoint)
    assert terminal.end() == 2 and "stdout is a terminal" in terminal.screen


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_download_goes_on_when_the_command_is_given_again(
    own_server: FakeServer, tmp_path: Path, how: signal.Signals
) -> None:
    arguments = ["model", "download", "slow", "--to", str(tmp_path / "out")]
    terminal = Terminal(*arguments, endpoint=own_server.endpoint)
    partial = tmp_path / "out.partial" / "adapter_model.safetensors"
    while not (partial.exists() and partial.stat().st_size):
        assert not (tmp_path / "out").exists()
    os.kill(terminal.pid, how)
    assert terminal.end() == (130 if how == signal.SIGINT else -how)
    assert ("give the command again" in terminal.screen) == (how == signal.SIGINT)
    assert not (tmp_path / "out").exists()
    assert called(*arguments, endpoint=own_server.endpoint).returncode == 0
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()} == FILES
    assert own_server.calls("DownloadModel")[-1]["offset"] > 0


def test_a_lineage_is_drawn_both_ways_and_a_loop_ends() -> None:
    nodes = [
        LineageNode(id="model_2", kind=LineageKind.LINEAGE_KIND_MODEL, name="bot"),
        LineageNode(id="job_2", kind=LineageKind.LINEAGE_KIND_JOB, name="second"),
        LineageNode(id="model_1", kind=LineageKind.LINEAGE_KIND_MODEL, deleted=True),
        LineageNode(id="Qwen/x", kind=LineageKind.LINEAGE_KIND_BASE_MODEL, name="Qwen/x", licence="apache-2.0"),
        LineageNode(id="ds_1", kind=LineageKind.LINEAGE_KIND_DATASET, name="cards@3\x1b[2J"),
        LineageNode(id="export_1", kind=LineageKind.LINEAGE_KIND_EXPORT, name="gguf q4_k_m"),
    ]
    edges = [
        ("job_2", "model_2", "made"), ("model_1", "job_2", "parent"), ("ds_1", "job_2", "training"),
        ("Qwen/x", "model_1", "base"), ("Qwen/x", "job_2", "base"), ("model_2", "export_1", "export"),
        ("model_2", "model_1", "made"),
    ]  # fmt: skip
    found = GetModelLineageResponse(
        nodes=nodes, edges=[LineageEdge(from_id=one, to_id=other, relation=how) for one, other, how in edges]
    )
    lines = list(tree(found, "model_2"))
    text = "\n".join(lines).replace("├─ ", "|- ").replace("└─ ", "`- ").replace("│", "|")
    assert "\x1b" not in text
    assert lines[0] == "model_2  bot"
    assert "  `- made  job_2  second\n     |- parent  model_1  [deleted]" in text
    assert "base  Qwen/x  (apache-2.0)" in text and "export  export_1  gguf q4_k_m" in text
    assert len(lines) < 20
    assert list(tree(GetModelLineageResponse(), "model_9"))[1:] == ["made of", "  nothing", "made of it", "  nothing"]


def test_what_is_set_over_a_models_spec_takes_the_place_of_what_the_contract_refuses_beside_it() -> None:
    spec = JobSpec()
    spec.fine_tune.hyperparameters.warmup_ratio = 0.03
    spec.fine_tune.hyperparameters.batch_size = 16
    spec.fine_tune.validation_fraction = 0.0
    rest = again.without(
        spec, ["warmup_steps=5", "gradient_accumulation_steps=4", "validation_dataset=x", "nonsense=1"]
    )
    assert set(flat(rest)) == {"fine_tune.hyperparameters"}
    assert flat(spec) != flat(rest)


def test_two_runs_are_equal_whatever_their_speed_and_differ_by_field() -> None:
    def side(name: str, loss: float, **spec: object) -> Side:
        return Side(name, name, {"spec": spec, "metrics": {"eval_loss": loss}}, ())

    one, other = side("a", 0.5, rank=8), side("b", 0.25, alpha=4)
    assert differences(one, one) == []
    assert [(each["field"], each["a"], each["b"]) for each in differences(one, other)] == [
        ("alpha", None, 4), ("rank", 8, None), ("eval_loss", 0.5, 0.25)
    ]  # fmt: skip
    assert differences(one, Side("c", "c", {}, ("spec", "metrics"))) == []


def test_a_dataset_that_cannot_be_asked_for_is_not_said_to_be_gone() -> None:
    spec = JobSpec()
    spec.fine_tune.training_dataset = "ds_01J8ZQ4Y6N0000000000000001"
    with Client("127.0.0.1:1", timeout=0.3) as client, pytest.raises(errors.Unavailable):
        hashes(client, spec)


def test_a_diff_of_two_jobs_says_that_they_are_equal_or_what_differs(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    file = job_file(tmp_path)
    one, two, three = (
        called(
            "job", "create", "--watch", "-f", file, "-o", "id", "--set", f"max_steps={steps}", endpoint=server
        ).stdout
        for steps in (3, 3, 4)
    )
    equal = called("job", "diff", one.strip(), two.strip(), endpoint=server)
    assert equal.returncode == 0 and equal.stdout.startswith("equal: job_")
    differing = called("job", "diff", one.strip(), "@latest", endpoint=server)
    assert "fine_tune.hyperparameters.max_steps" in differing.stdout and three.strip() in differing.stdout
    told = json.loads(called("job", "diff", one.strip(), three.strip(), "-o", "json", endpoint=server).stdout)
    assert not told["equal"] and told["differences"][0]["a"] == 3
    export = called(
        "model", "export", "bot", "--format", "gguf", "--no-wait", "-o", "id", endpoint=server
    ).stdout.strip()
    assert "export.model" in called("job", "diff", one.strip(), export, endpoint=server).stdout


def test_a_model_of_an_older_server_has_no_spec_to_run_again(own_server: FakeServer, tmp_path: Path) -> None:
    assert called("job", "create", "--watch", "-f", job_file(tmp_path), endpoint=own_server.endpoint).returncode == 0
    refused = called("job", "create", "--from", "@latest", endpoint=own_server.endpoint)
    assert refused.returncode == 1
    assert "made by an older server, which kept no spec" in refused.stderr and "hint:" in refused.stderr
    assert called("job", "create", endpoint=own_server.endpoint).returncode == 2
    assert called("job", "create", "--from", "a", "-f", "b", endpoint=own_server.endpoint).returncode == 2


@pytest.mark.parametrize("group", ["model", "export"])
def test_every_command_has_an_example(group: str) -> None:
    from click import Context, Group

    from luthier_client.cli.main import cli

    found = cli.get_command(Context(cli), group)
    assert isinstance(found, Group)
    for name in found.list_commands(Context(found)):
        command = found.get_command(Context(found), name)
        assert command is not None and f"luthier {group} {name}" in (command.epilog or ""), name
