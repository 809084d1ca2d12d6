"""Base models told from their files: what is found, what is refused, and what never gets past the fence."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.trainer.v1 import report_pb2
from luthier_trainer import inspect as inspect_module
from luthier_trainer.inspect import BUILTIN, locate, matches, nearest

TINY = BUILTIN / "tiny"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def model(root: Path) -> Path:
    return Path(shutil.copytree(TINY, root / "mine"))


def safetensors(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [end - start], "data_offsets": [start, end]}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter(root: Path, base: str) -> Path:
    path = root / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_bytes(safetensors({}))
    return path


def test_the_builtin_model_is_known_with_its_modules_and_its_tied_head() -> None:
    report = locate("builtin/tiny")
    assert (report.found, report.problem, report.is_hub) == (True, "", False)
    assert report.directory == str(TINY.resolve())
    assert report.max_positions == json.loads((TINY / "config.json").read_text())["max_position_embeddings"]
    config = json.loads((TINY / "config.json").read_text())
    assert (report.hidden_size, report.model_type) == (config["hidden_size"], config["model_type"])
    assert {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.norm", "lm_head"} <= set(
        report.module_names
    )
    assert not any(name.endswith((".weight", ".bias")) for name in report.module_names)
    assert len(set(report.module_names)) == len(report.module_names)


@pytest.mark.parametrize("name", ["absent", "../builtin/tiny", "tiny/", "tiny/../tiny", "", "TINY", "tiny\n", "."])
def test_an_unknown_builtin_lists_those_there_are(name: str) -> None:
    report = locate(f"builtin/{name}")
    assert (report.found, report.directory) == (False, "")
    assert "builtin/tiny" in report.problem


def test_a_directory_below_an_allowed_root_is_found(model: Path, root: Path) -> None:
    report = locate(str(model), [root])
    assert (report.found, report.problem, report.directory) == (True, "", str(model))
    assert list(report.module_names) == list(locate("builtin/tiny").module_names)


def test_a_directory_elsewhere_is_refused_and_the_way_to_allow_it_told(model: Path, root: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.move(model, tmp_path / "elsewhere"))
    for path in (str(elsewhere), f"{root}/../elsewhere", "/etc", f"{root}x"):
        report = locate(path, [root])
        assert (report.found, report.directory, len(report.module_names)) == (False, "", 0)
        assert str(root) in report.problem
        assert "--model-root" in report.problem
    assert "--model-root" in locate(str(elsewhere)).problem


def test_a_link_out_of_the_root_is_no_way_out(model: Path, root: Path, tmp_path: Path) -> None:
    outside = Path(shutil.move(model, tmp_path / "outside"))
    (root / "link").symlink_to(outside)
    assert not locate(str(root / "link"), [root]).found
    shutil.copytree(outside, root / "files")
    weights = root / "files" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "model.safetensors")
    assert "link out of" in locate(str(root / "files"), [root]).problem
    assert locate(str(root / "files"), [root, tmp_path]).problem == ""


def test_a_root_that_is_a_link_itself_works(model: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert locate(f"{tmp_path}/alias/mine", [tmp_path / "alias"]).problem == ""


def test_whether_a_path_outside_exists_is_not_told(root: Path, tmp_path: Path) -> None:
    assert locate(str(tmp_path), [root]).problem == locate(str(tmp_path / "absent"), [root]).problem


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "a/b_c.d-e", "meta-llama/Llama-3.2-1B", "x" * 96])
def test_a_hub_id_is_taken_on_trust(name: str) -> None:
    report = locate(name)
    assert (report.found, report.is_hub, report.problem, report.directory) == (True, True, "", "")
    assert not report.module_names


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "./model",
            "~/model",
            "../x",
            "a/b/c",
            "a//b",
            "a/../b",
            "a..b",
            "a--b",
            "-a",
            "a-",
            ".a",
            "a/",
            "/",
        ),
        *("a b", "a\0b", "a\nb", "gpt2\n", "https://example.org/x", "ä/b", "x" * 97, "s3:b", "a\\b", "\udcff"),
        *("/a\0b", "/" + "x" * 5000, "/" + "x/" * 3000, "model_01ARZ3NDEKTSV4RRFFQ69G5FAV"),
    ],
)
def test_anything_else_is_a_problem_and_never_a_crash(root: Path, name: str) -> None:
    report = locate(name, [root])
    assert (report.found, report.is_hub, report.directory) == (False, False, "")
    assert report.problem
    report.SerializeToString()


@given(st.text(max_size=40) | st.text("/.~a-_", max_size=20))
def test_no_text_makes_it_crash_or_leave_the_allowed_places(name: str) -> None:
    report = locate(name, [BUILTIN])
    assert report.problem or report.is_hub or Path(report.directory).is_relative_to(BUILTIN.resolve())
    assert not (report.is_hub and set(name) & set("~\\ \n\0"))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(model: Path, root: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    report = locate(str(model), [root])
    assert (report.found, report.directory) == (True, "")
    assert "save_pretrained" in report.problem


def test_code_of_a_models_own_is_refused(model: Path, root: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModel": "modeling_mine.Mine"})
    assert "never run" in locate(str(model), [root]).problem


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' * 50_000])
def test_a_broken_configuration_is_a_problem(model: Path, root: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    assert "config.json is not" in locate(str(model), [root]).problem


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model: Path, root: Path, missing: str) -> None:
    (model / missing).unlink()
    assert f"{missing} is missing" in locate(str(model), [root]).problem


def test_a_model_without_a_tokenizer_is_refused(model: Path, root: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in locate(str(model), [root]).problem


def test_a_configuration_that_is_a_pipe_does_not_hang(model: Path, root: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert "config.json is missing" in locate(str(model), [root]).problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200 * 2**20) + b"{}",
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"abc",
        safetensors({"a.weight": 3}),
        safetensors({"a.weight": {"data_offsets": [0]}}),
        safetensors({"a.weight": {"data_offsets": [0, "x"]}}),
        safetensors({"\ud800.weight": tensor(0, 0)}),
        safetensors({"a.weight": tensor(0, 100)}, b"\0" * 99),
    ],
)
def test_a_broken_or_cut_weight_file_is_a_problem(model: Path, root: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    report = locate(str(model), [root])
    assert "model.safetensors" in report.problem
    assert not report.module_names
    report.SerializeToString()


def test_sharded_weights_are_read_from_every_shard(model: Path, root: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "one.safetensors").write_bytes(safetensors({"a.weight": tensor(0, 4), "a.bias": tensor(4, 8)}, b"\0" * 8))
    (model / "two.safetensors").write_bytes(
        safetensors({"lm_head.weight": tensor(0, 4), "__metadata__": {}}, b"\0" * 4)
    )
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "one.safetensors", "lm_head.weight": "two.safetensors"}}))
    assert list(locate(str(model), [root]).module_names) == ["a", "lm_head"]
    (model / "two.safetensors").unlink()
    assert "two.safetensors is missing" in locate(str(model), [root]).problem


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 3, None])
def test_an_index_names_files_beside_it_only(model: Path, root: Path, name: Any) -> None:
    (model / "model.safetensors").rename(root / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    assert "no safetensors file beside it" in locate(str(model), [root]).problem


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 32768}, 32768),
        ({"n_positions": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": -1}, 0),
        ({"max_position_embeddings": True}, 0),
        ({"max_position_embeddings": "x"}, 0),
        ({"max_position_embeddings": 10**30}, 0),
        ({}, 0),
    ],
)
def test_the_longest_sequence_comes_from_the_configuration(
    model: Path, root: Path, config: dict[str, Any], expected: int
) -> None:
    (model / "config.json").write_text(json.dumps(config))
    assert locate(str(model), [root]).max_positions == expected


@pytest.mark.parametrize("base", ["builtin/tiny", str(TINY)])
def test_an_adapter_is_found_with_the_base_below_it(root: Path, base: str) -> None:
    path = adapter(root, base)
    report = locate(str(path), [root])
    assert (report.found, report.problem, report.adapter_dir) == (True, "", str(path))
    assert report.directory == report.base_location == str(TINY.resolve())
    assert "lm_head" in report.module_names


def test_an_adapter_on_a_hub_model_names_it(root: Path) -> None:
    path = adapter(root, "Qwen/Qwen2.5-0.5B")
    report = locate(str(path), [root])
    assert (report.found, report.problem, report.is_hub) == (True, "", True)
    assert (report.adapter_dir, report.base_location, report.directory) == (str(path), "Qwen/Qwen2.5-0.5B", "")


@pytest.mark.parametrize("base", ["/etc", "../x", "builtin/absent", "", 3, None, "\ud800"])
def test_an_adapter_whose_base_lies_outside_is_refused(root: Path, base: Any) -> None:
    report = locate(str(adapter(root, base)), [root])
    assert (report.found, report.directory) == (True, "")
    assert report.problem
    report.SerializeToString()


def test_an_adapter_on_an_adapter_or_itself_is_refused(root: Path) -> None:
    path = adapter(root, str(root / "adapter"))
    assert "adapter itself" in locate(str(path), [root]).problem


def test_a_pickled_or_foreign_adapter_is_refused(root: Path) -> None:
    path = adapter(root, "builtin/tiny")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert "pickled" in locate(str(path), [root]).problem
    edit(path / "adapter_config.json", peft_type="PREFIX_TUNING")
    assert "no LoRA adapter" in locate(str(path), [root]).problem


def test_an_unreadable_directory_is_a_problem(model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inspect_module, "_tensors", refused)
    assert "Permission denied" in locate(str(model), [root]).problem


def test_names_match_as_peft_matches_them() -> None:
    names = ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert matches("q_proj", names)
    assert matches("self_attn.q_proj", names)
    assert matches("lm_head", names)
    assert matches("all-linear", [])
    assert not matches("proj", names)
    assert not matches("attn.q_proj", names)
    assert not matches("layers", names)


def test_the_nearest_names_are_offered() -> None:
    names = locate("builtin/tiny").module_names
    assert nearest("query_proj", names)[0] == "q_proj"
    assert nearest("embed_token", names)[0] == "embed_tokens"
    assert nearest("LM_HEAD", names)[0] == "lm_head"
    assert nearest("zzzzzz", names) == []


def test_the_module_writes_a_report_and_nothing_else(model: Path, root: Path) -> None:
    command = [sys.executable, "-m", "luthier_trainer.inspect", str(model), "--root", str(root)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert report_pb2.ModelReport.FromString(done.stdout) == locate(str(model), [root])


def test_weights_are_counted_by_the_headers_of_every_shard(model: Path, root: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(TINY).num_parameters()
    assert locate(str(model), [root]).parameters == weights
    (model / "model.safetensors").unlink()
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    for name, shard in shards.items():
        entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
        (model / shard).write_bytes(safetensors({f"{name}.weight": entry}, bytes(24)))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert locate(str(model), [root]).parameters == 12


@pytest.mark.parametrize("shape", [None, "3", [-1], [2**70], [1.5], [True, []]])
def test_a_shape_that_is_none_counts_for_nothing(model: Path, root: Path, shape: Any) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    (model / "model.safetensors").write_bytes(safetensors({"a.weight": entry}, bytes(4)))
    report = locate(str(model), [root])
    assert (report.problem, report.parameters) == ("", 0)
