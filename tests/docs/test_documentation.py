"""What the documentation says in tables and examples is what the code does."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from luthier.v1 import datasets_pb2, fine_tuning_pb2, models_pb2
from luthier.v1.job_pb2 import EarlyStopping, FineTuneTask, JobSpec, JobState
from luthier_client.spec import parse_spec
from luthier_server import settings
from luthier_server.job import TERMINAL, TRANSITIONS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
BY_OTHERS = {"benchmarks.md"}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def table(text: str, head: str) -> dict[str, list[str]]:
    """The rows of the table with that first column's heading, each by the text of its first cell."""
    _, found, after = text.partition(f"| {head} |")
    assert found, f"there is no table headed {head}"
    lines = after.split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def code(text: str) -> set[str]:
    """All that stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for each in PAGES:
        yield from ((each.name, body) for kind, body in _BLOCK.findall(each.read_text()) if kind == language)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_inside_the_repository_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{path.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert {each.name for each in (ROOT / "docs").glob("*.md")} - BY_OTHERS == linked - BY_OTHERS


def test_every_setting_is_written_down_with_its_flag_variable_and_default() -> None:
    rows = table(page("operations.md"), "flag")
    shown = {name: field for name, field in settings._FIELDS.items() if name != "puppet"}
    assert set(rows) == {f"`--{name.replace('_', '-')}`" for name in shown}
    for name, field in shown.items():
        variable, default, _ = rows[f"`--{name.replace('_', '-')}`"]
        assert variable == f"`LUTHIER_{name.upper()}`"
        if field.default is None:
            assert default == "none"
        elif isinstance(field.default, tuple):
            assert default == (", ".join(f"`{each}`" for each in field.default) or "none")
        elif name not in ("data_dir", "trainer_python", "model_root", "import_root", "export_root"):
            expected = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert default == f"`{expected}`"


def test_the_settings_file_in_the_documentation_is_one(tmp_path: Path) -> None:
    (example,) = [body for name, body in blocks("toml") if name == "operations.md"]
    (tmp_path / "luthier.toml").write_text(example.replace("/srv/models", str(tmp_path)))
    assert settings.read(["--config", str(tmp_path / "luthier.toml")], {}).slots == 1


def test_the_table_of_states_is_the_codes_own() -> None:
    def name(state: JobState.ValueType) -> str:
        return JobState.Name(state).removeprefix("JOB_STATE_")

    rows = table(page("lifecycle.md"), "from")
    expected = {
        name(state): {name(each) for each in after}
        for state, after in TRANSITIONS.items()
        if state and state not in TERMINAL
    }
    assert {before: set(cells[0].split(", ")) for before, cells in rows.items()} == expected


def test_every_method_is_written_down() -> None:
    text = page("api.md")
    for file in (fine_tuning_pb2, datasets_pb2, models_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            rows = table(text, f"`{service.full_name}`")
            assert {each.strip("`") for each in rows} == {method.name for method in service.methods}


def constants(folder: Path, *, calls: set[str]) -> set[str]:
    """Names in capitals that calls of these names, or assignments to `reason`, have among their arguments."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            values: list[ast.expr] = []
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                values = [each.value for each in node.keywords if each.arg == "reason"]
                values += node.args[:2] if called in calls else []
            elif isinstance(node, ast.Assign) and any(getattr(each, "id", "") == "reason" for each in node.targets):
                values = [node.value]
            found |= {
                each.value
                for each in values
                if isinstance(each, ast.Constant) and isinstance(each.value, str) and each.value.isupper()
            }
    return found


def test_every_reason_of_the_server_is_written_down() -> None:
    found = constants(ROOT / "server" / "luthier_server", calls={"move", "Ending"})
    assert {"QUEUE_FULL", "WORKER_LOST", "SUBMITTED", "SLOW_CONSUMER"} <= found
    assert found - code(page("api.md")) - code(page("lifecycle.md")) - {"FIRST", "NOT_FOUND"} == set()


def test_every_reason_of_the_trainer_is_written_down() -> None:
    found = constants(ROOT / "trainer" / "luthier_trainer", calls={"TrainingError"}) - {"PUPPET_FAILED"}
    assert {"LOSS_NOT_FINITE", "OUT_OF_MEMORY"} <= found
    assert found - code(page("lifecycle.md")) == set()


def test_every_code_of_a_dataset_finding_is_written_down() -> None:
    found = constants(ROOT / "trainer" / "luthier_trainer" / "data", calls={"Problem", "Refusal"})
    assert {"NOT_JSON", "EMPTY_ASSISTANT"} <= found
    assert found - code(page("datasets.md")) == set()


def fields(message: Descriptor | None) -> set[str]:
    assert message is not None
    return {field.name for field in message.fields}


@pytest.mark.parametrize("part", ["lora", "full", "hyperparameters", "evaluation", "checkpoints", "tokenization"])
def test_every_field_of_a_spec_is_written_down(part: str) -> None:
    rows = table(page("fine-tuning.md"), f"field of `{part}`")
    assert {name for cell in rows for name in code(cell)} == fields(
        FineTuneTask.DESCRIPTOR.fields_by_name[part].message_type
    )


def test_every_field_of_early_stopping_is_written_down() -> None:
    rows = table(page("fine-tuning.md"), "field of `early_stopping`")
    assert {name for cell in rows for name in code(cell)} == fields(EarlyStopping.DESCRIPTOR)


def test_every_field_of_a_task_and_a_job_is_written_down() -> None:
    text = page("fine-tuning.md")
    task = {name for cell in table(text, "field of `fine_tune`") for name in code(cell)}
    assert task == fields(FineTuneTask.DESCRIPTOR)
    job = {name for cell in table(text, "field of the job") for name in code(cell)}
    # Refused when set, and the task itself.
    assert job == fields(JobSpec.DESCRIPTOR) - {"priority", "resources", "fine_tune", "export"}


@pytest.mark.parametrize(("name", "text"), [each for each in blocks("yaml") if "fine_tune:" in each[1]])
def test_every_job_in_the_documentation_is_one(name: str, text: str) -> None:
    assert parse_spec(text, name).fine_tune.base_model


@pytest.mark.parametrize(("name", "text"), list(blocks("python")))
def test_every_program_in_the_documentation_imports_what_there_is(name: str, text: str) -> None:
    tree = ast.parse(text, name)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module and node.module.startswith("luthier"):
            module = __import__(node.module, fromlist=[each.name for each in node.names])
            assert all(hasattr(module, each.name) for each in node.names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_page_names_a_place_of_the_machine_it_was_written_on(path: Path) -> None:
    assert not re.search(r"/(root|work)/|/tmp/", path.read_text())
