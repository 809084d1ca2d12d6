"""Derived datasets: who goes where, that every byte is the same again, and what is refused."""

import io
import json
import subprocess
import sys
import zipfile
from array import array
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from luthier.trainer.v1 import data_pb2
from luthier.v1 import dataset_pb2
from luthier_trainer.data import selection
from luthier_trainer.data.derive import derive
from luthier_trainer.data.reading import FileFormat, Format, Reading
from luthier_trainer.data.selection import smallest, smallest_groups


def rows(count: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n}", "completion": f"a {n}"} for n in range(count)]


def written(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def source(path: Path, reading: Reading | None = None) -> dict[str, Any]:
    return {"path": str(path), "reading": json_format.MessageToDict((reading or Reading()).to_proto())}


def derived(tmp_path: Path, request: dict[str, Any]) -> data_pb2.DeriveReport:
    output = tmp_path / f"output-{len(list(tmp_path.iterdir()))}"
    output.mkdir()
    report = derive(request, output)
    assert report.problem or sorted(output.iterdir()) == [Path(file.path) for file in report.files]
    for file in report.files:
        assert not [finding for finding in file.report.findings if finding.level == 1]
        assert file.size_bytes == Path(file.path).stat().st_size
    return report


def values(report: data_pb2.DeriveReport) -> list[list[dict[str, Any]]]:
    """The rows of each file, in order."""
    texts = [Path(file.path).read_text() for file in report.files]
    assert all(text.endswith("\n") for text in texts)
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def split(tmp_path: Path, path: Path, validation: float, seed: int = 1, reading: Reading | None = None) -> Any:
    request = {"operation": "split", "sources": [source(path, reading)], "validation": validation, "seed": seed}
    return values(derived(tmp_path, request))


def problem(tmp_path: Path, **request: Any) -> str:
    report = derived(tmp_path, request)
    assert not report.files
    return report.problem


@pytest.mark.parametrize(
    ("count", "validation", "expected"), [(100, 0.1, 10), (7, 0.5, 4), (10, 0.01, 1), (3, 0.99, 2)]
)
def test_a_split_has_the_fraction_rounded_and_a_row_on_each_side(
    tmp_path: Path, count: int, validation: float, expected: int
) -> None:
    path = written(tmp_path / "rows", rows(count))
    training, held_out = split(tmp_path, path, validation)
    assert len(held_out) == expected
    for part in (training, held_out):
        assert part == [value for value in rows(count) if value in part]  # the file's order
    assert len(training) + len(held_out) == count


def test_a_split_is_the_same_by_the_same_seed_and_another_by_another(tmp_path: Path) -> None:
    path = written(tmp_path / "rows", rows(100))
    assert split(tmp_path, path, 0.2, 1) == split(tmp_path, path, 0.2, 1)
    assert split(tmp_path, path, 0.2, 1) != split(tmp_path, path, 0.2, 2)


def test_rows_that_say_the_same_never_fall_on_both_sides(tmp_path: Path) -> None:
    many = [{**value, "id": n} for n, value in enumerate(rows(30) * 5)]
    training, held_out = split(tmp_path, written(tmp_path / "rows", many), 0.3)
    assert not {value["prompt"] for value in training} & {value["prompt"] for value in held_out}
    assert len(held_out) == 45
    assert [value["id"] for value in training] == sorted(value["id"] for value in training)


def test_a_large_group_of_equal_rows_does_not_spoil_the_count(tmp_path: Path) -> None:
    for seed in range(10):
        _, held_out = split(tmp_path, written(tmp_path / "rows", rows(1) * 500 + rows(501)[1:]), 0.1, seed)
        assert len(held_out) == 100


def test_rows_added_at_the_end_move_few_others(tmp_path: Path) -> None:
    _, before = split(tmp_path, written(tmp_path / "a", rows(1000)), 0.1)
    _, after = split(tmp_path, written(tmp_path / "b", rows(1010)), 0.1)
    moved = {value["prompt"] for value in before} ^ {value["prompt"] for value in after if value in rows(1000)}
    assert len(moved) <= 12


def test_a_split_of_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    one, equal = written(tmp_path / "one", rows(1)), written(tmp_path / "equal", rows(1) * 9)
    assert "needs two" in problem(tmp_path, operation="split", sources=[source(one)], validation=0.5, seed=1)
    assert "All rows" in problem(tmp_path, operation="split", sources=[source(equal)], validation=0.5, seed=1)
    for fraction in (0, 1, -1, float("nan")):
        assert "0.1" in problem(tmp_path, operation="split", sources=[source(one)], validation=fraction, seed=1)


def test_a_sample_has_exactly_as_many_rows_also_of_equal_ones(tmp_path: Path) -> None:
    path = written(tmp_path / "rows", rows(5) * 20)
    for count in (1, 7, 99, 100):
        request = {"operation": "sample", "sources": [source(path)], "rows": count, "seed": 3}
        (chosen,) = values(derived(tmp_path, request))
        assert len(chosen) == count
        assert [chosen] == values(derived(tmp_path, request))
    assert "100 rows" in problem(tmp_path, operation="sample", sources=[source(path)], rows=101, seed=3)
    assert "one row" in problem(tmp_path, operation="sample", sources=[source(path)], rows=0, seed=3)


def test_what_is_concatenated_is_in_order_under_the_names_of_the_format(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("question;answer;n\nWhere?;Here.;1\nWhen?;Now.;2\n")
    columns = Reading(FileFormat.CSV, Format.PROMPT_COMPLETION, {"prompt": "question", "completion": "answer"})
    first = written(tmp_path / "rows", rows(2))
    report = derived(tmp_path, {"operation": "concatenate", "sources": [source(first), source(other, columns)]})
    (together,) = values(report)
    asked = [(value["prompt"], value["completion"]) for value in together]
    assert asked == [("q 0", "a 0"), ("q 1", "a 1"), ("Where?", "Here."), ("When?", "Now.")]
    assert report.files[0].report.reading == dataset_pb2.DatasetReading(
        file_format=dataset_pb2.FILE_FORMAT_JSONL, format=dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION
    )


def test_datasets_of_different_formats_are_not_concatenated(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", rows(2)), written(tmp_path / "other", [{"text": "Hello."}])
    found = problem(tmp_path, operation="concatenate", sources=[source(one), source(other)])
    assert "prompt_completion" in found and "text" in found


def test_a_row_with_an_error_is_refused_and_not_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "rows", rows(3))
    path.write_text(path.read_text() + "x\n")
    for request in ({"operation": "split", "validation": 0.5}, {"operation": "sample", "rows": 1}):
        assert "Line 4" in problem(tmp_path, sources=[source(path)], seed=1, **request)


def image(number: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes([number])


def archive(path: Path, values: list[dict[str, Any]], images: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.json", json.dumps(values))
        for name, content in images.items():
            file.writestr(name, content)
    return path


def picture(name: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<image>What is {name}?"}, {"role": "assistant", "content": "A cat."}]
    return {"messages": turns, "images": [name]}


def members(report: data_pb2.DeriveReport) -> list[dict[str, bytes]]:
    found = []
    for file in report.files:
        with zipfile.ZipFile(io.BytesIO(Path(file.path).read_bytes())) as opened:
            assert opened.namelist() == ["rows.jsonl", *sorted(set(opened.namelist()) - {"rows.jsonl"})]
            found.append({name: opened.read(name) for name in opened.namelist()})
    return found


def test_each_part_of_a_split_has_the_images_of_its_rows_and_equal_bytes(tmp_path: Path) -> None:
    images = {f"images/{n}.png": image(n) for n in range(10)}
    path = archive(tmp_path / "rows.zip", [picture(name) for name in images], {**images, "unused.png": image(99)})
    request = {"operation": "split", "sources": [source(path)], "validation": 0.3, "seed": 1}
    report = derived(tmp_path, request)
    parts = members(report)
    assert [len(part) - 1 for part in parts] == [7, 3]
    found: dict[str, bytes] = {}
    for part in parts:
        lines = part.pop("rows.jsonl").decode().splitlines()
        assert {json.loads(line)["images"][0] for line in lines} == part.keys()
        found |= part
    assert found == images
    assert {file.report.reading.file_format for file in report.files} == {dataset_pb2.FILE_FORMAT_ZIP}
    again = derived(tmp_path, request)
    assert [file.sha256 for file in report.files] == [file.sha256 for file in again.files]


def test_images_of_one_name_must_be_equal_to_be_concatenated(tmp_path: Path) -> None:
    one = archive(tmp_path / "one", [picture("1.png")], {"1.png": image(1)})
    same = archive(tmp_path / "same", [{**picture("1.png"), "messages": picture("x")["messages"]}], {"1.png": image(1)})
    other = archive(tmp_path / "other", [picture("1.png")], {"1.png": image(2)})
    (together,) = members(derived(tmp_path, {"operation": "concatenate", "sources": [source(one), source(same)]}))
    assert together["1.png"] == image(1)
    assert '"1.png"' in problem(tmp_path, operation="concatenate", sources=[source(one), source(other)])


def test_images_that_rows_name_from_their_folder_or_in_two_spellings_are_in_the_sample(tmp_path: Path) -> None:
    names = ["../images/1.png", "2.png", "./2.png", "..\\images/./1.png", "deep/../2.png"]
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as packed:
        lines = [json.dumps({**picture(name), "messages": picture(str(n))["messages"]}) for n, name in enumerate(names)]
        packed.writestr("data/rows.jsonl", "\n".join(lines))
        packed.writestr("images/1.png", image(1))
        packed.writestr("data/2.png", image(2))
    (file,) = derived(tmp_path, {"operation": "sample", "sources": [source(path)], "rows": len(names), "seed": 1}).files
    assert (file.report.rows, [each.code for each in file.report.counts]) == (len(names), [])
    with zipfile.ZipFile(file.path) as made:
        images = [name for name in made.namelist() if name.endswith(".png")]
        assert [made.read(name) for name in images] == [image(1), image(2)]
        assert not [name for name in made.namelist() if ".." in name]
    again = derived(
        tmp_path, {"operation": "split", "sources": [source(Path(file.path))], "validation": 0.4, "seed": 1}
    )
    assert [each.report.rows for each in again.files] == [3, 2]


def test_an_image_that_would_take_the_place_of_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data/rows.jsonl", "\n".join(json.dumps(picture(name)) for name in ("../rows/1.png", "1.png")))
        file.writestr("rows/1.png", image(1))
        file.writestr("data/1.png", image(2))
    assert '"rows/1.png"' in problem(tmp_path, operation="concatenate", sources=[source(path)])


def test_public_samples_are_split_without_a_loss(samples: Path, tmp_path: Path) -> None:
    for name in ("glaive_toolcall_en_demo.json", "dpo_en_demo.json", "kto_en_demo.json", "alpaca_en_demo.json"):
        original = json.loads((samples / name).read_text())
        training, held_out = split(tmp_path, samples / name, 0.1)
        assert abs(len(held_out) - len(original) / 10) <= 0.5
        assert sorted(map(json.dumps, training + held_out)) == sorted(map(json.dumps, original))


def run_module(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "luthier_trainer.data.derive", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def test_the_module_answers_a_report_or_says_what_it_does_not_understand(tmp_path: Path) -> None:
    path, request, output = written(tmp_path / "rows", rows(10)), tmp_path / "request", tmp_path / "output"
    output.mkdir()
    request.write_text(json.dumps({"operation": "sample", "sources": [source(path)], "rows": 4, "seed": 1}))
    done = run_module(request, output)
    assert (done.returncode, done.stderr) == (0, b"")
    (file,) = data_pb2.DeriveReport.FromString(done.stdout).files
    assert (file.path, file.report.rows) == (str(output / "0"), 4)
    for wrong in (
        "",
        "[]",
        '{"operation": "join", "sources": [{"path": "x", "reading": {}}]}',
        '{"operation": "split"}',
    ):
        request.write_text(wrong)
        done = run_module(request, output)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"cannot understand the request")
    request.write_text(json.dumps({"operation": "sample", "sources": [source(tmp_path / "no")], "rows": 4, "seed": 1}))
    assert run_module(request, output).returncode == 2


@pytest.mark.parametrize("at_once", [1, 3, 10**9])
def test_the_smallest_are_chosen_exactly_in_any_number_of_passes(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(selection, "MAX_COUNTED_AT_ONCE", at_once)
    keys = array("Q", [5 << 48, 7, 2**64 - 1, 7, 3 << 60, 5 << 48, 0, 7])
    for count in range(1, 9):
        take = smallest(keys, count)
        chosen = [key for key in keys if take(key)]
        assert sorted(chosen) == sorted(keys)[:count]
    for count, expected in [(1, [0]), (2, [0]), (3, [0]), (4, [0, 7, 7, 7]), (6, [0, 7, 7, 7, 5 << 48, 5 << 48])]:
        fits = smallest_groups(keys, count)
        assert fits is not None
        assert sorted(key for key in keys if fits(key))[: len(expected)] == expected
    assert smallest_groups(array("Q", [9, 9, 9]), 1) is None
    pairs = smallest_groups(array("Q", [1, 1, 2, 2, 2]), 1)
    assert pairs is not None
    assert [pairs(1), pairs(2)] == [True, False]
