"""Exports are proven equal, and what goes wrong elsewhere is caught by the check that is for it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fidelity import export_faults as faults
from fidelity.jobs import Recorder, task
from fidelity.proofs import adapted, export_to, failed, proof_of, random_base, rows, worded
from transformers import AutoModelForCausalLM
from unit.trainer.gguf_models import byte_level, sentence_pieces

from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier.v1 import event_pb2, export_task_pb2, tokenization_pb2
from luthier.v1.export_task_pb2 import AdapterExport, ExportTask, GgufExport, MergedExport
from luthier_trainer import inspect, sft
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.proof import compare, prove
from luthier_trainer.export.proof.measure import Judged
from luthier_trainer.export.proof.reference import ask
from luthier_trainer.export.proof.thresholds import Limits
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import StopRequested, never

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib-cards"
ADAPTER = ExportTask(adapter=AdapterExport())
F32, F16, BF16, NF4 = (
    ExportTask(merged=MergedExport(weights=each))
    for each in (
        export_task_pb2.WEIGHT_TYPE_F32,
        export_task_pb2.WEIGHT_TYPE_F16,
        export_task_pb2.WEIGHT_TYPE_BF16,
        export_task_pb2.WEIGHT_TYPE_NF4,
    )
)
GGUF_F16, GGUF_BF16, Q8_0, Q5_K_M, Q4_K_M, Q2_K = (
    ExportTask(gguf=GgufExport(type=each))
    for each in (
        export_task_pb2.GGUF_TYPE_F16,
        export_task_pb2.GGUF_TYPE_BF16,
        export_task_pb2.GGUF_TYPE_Q8_0,
        export_task_pb2.GGUF_TYPE_Q5_K_M,
        export_task_pb2.GGUF_TYPE_Q4_K_M,
        export_task_pb2.GGUF_TYPE_Q2_K,
    )
)
GGUF_ADAPTER = ExportTask(gguf=GgufExport(adapter_only=True))
NUMBERS = {"TOP1_AGREEMENT", "LOGPROB_DIFFERENCE", "PERPLEXITY_RATIO", "GREEDY_TEXT"}


def _name(value: Any) -> str:
    return " ".join(str(value).split()) if isinstance(value, ExportTask) else ""


def _of_four_rows(export: ExportTask) -> ExportTask:
    few = ExportTask(proof_rows=4)
    few.MergeFrom(export)
    return few


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, DatasetSource]:
    """`builtin/tiny` after a few steps on the example, and the example's held-out rows."""
    folder = tmp_path_factory.mktemp("example")
    base = (inspect.BUILTIN / "tiny").resolve()
    sft.train(task(folder, base, EXAMPLE / "train.jsonl", max_steps=6, batch_size=4), Recorder(), NoControl())
    source = DatasetSource(path=str(EXAMPLE / "heldout.jsonl"), id="ds_1", name="cards@1")
    return Tuned(folder / "model", base, folder / "model", "model_1", "builtin/tiny"), source


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, DatasetSource]:
    """A random Llama whose head, trained whole, is not its embedding."""
    folder = tmp_path_factory.mktemp("tuned")
    base = random_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    return adapted(base, folder / "model", model, saved=("lm_head",)), rows(folder)


@pytest.mark.parametrize(
    "export",
    [ADAPTER, F32, F16, BF16, NF4, GGUF_F16, GGUF_BF16, Q8_0, Q5_K_M, Q4_K_M, Q2_K, GGUF_ADAPTER],
    ids=_name,
)
def test_every_export_of_the_example_is_proven(
    tmp_path: Path, example: tuple[Tuned, DatasetSource], export: ExportTask
) -> None:
    model, source = example
    export = _of_four_rows(export)
    proof = proof_of(model, export_to(tmp_path / "out", model, export), export, source)
    assert failed(proof) == {}
    assert (proof.rows, proof.dataset_id) == (4, "ds_1")
    assert proof.tokens > 100
    expected = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}
    assert proof.loader == expected[export.WhichOneof("format") or ""]
    assert proof.loader_version
    assert not list((tmp_path / "out").glob(".proof-*"))


@pytest.mark.parametrize("export", [BF16, GGUF_F16, Q4_K_M], ids=_name)
@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {"added": True}, {"saved": ("embed_tokens", "lm_head")}),
        ("qwen-3", {}, {"use_dora": True}),
        ("gemma", {"tie_word_embeddings": True}, {}),
    ],
    ids=["llama tied", "llama with added tokens", "qwen-3 with DoRA", "gemma"],
)
def test_random_models_of_the_families_are_proven(
    tmp_path: Path, family: str, changes: dict[str, Any], kind: dict[str, Any], export: ExportTask
) -> None:
    base = random_base(tmp_path / "base", family, **changes)
    model = adapted(base, tmp_path / "model", AutoModelForCausalLM.from_pretrained(base), **kind)
    assert failed(proof_of(model, export_to(tmp_path / "out", model, export), export, rows(tmp_path))) == {}


@pytest.mark.parametrize("rule", ["qwen2", "tekken", "sentence pieces"])
def test_no_kind_of_tokenizer_fails_on_a_text_that_llama_cpp_cannot_hold(tmp_path: Path, rule: str) -> None:
    base = worded(tmp_path / "base", sentence_pieces(True) if rule == "sentence pieces" else byte_level(rule))
    model = adapted(base, tmp_path / "model", AutoModelForCausalLM.from_pretrained(base))
    assert failed(proof_of(model, export_to(tmp_path / "out", model, GGUF_F16), GGUF_F16, rows(tmp_path))) == {}


@pytest.mark.parametrize("export", [ADAPTER, BF16, GGUF_F16], ids=_name)
def test_a_base_that_knew_no_end_of_a_turn_stops_at_it_once_tuned(tmp_path: Path, export: ExportTask) -> None:
    base = random_base(tmp_path / "base", chats=False)
    model = adapted(base, tmp_path / "model", AutoModelForCausalLM.from_pretrained(base))
    proof = proof_of(model, export_to(tmp_path / "out", model, export), export, rows(tmp_path))
    assert failed(proof) == {}
    assert {each.name: each.message for each in proof.checks}["STOP_TOKENS"] == "it stops at <|im_end|>"


@pytest.mark.parametrize(
    ("fault", "caught", "said"),
    [
        (faults.template_swapped, {"TEMPLATE"}, "the template writes '<|im_start|>user"),
        (faults.template_lost, {"TEMPLATE"}, "has no chat template"),
        (faults.system_turn_lost, {"TEMPLATE"}, "a question after a system turn: from character"),
        (faults.end_token_renamed, {"TOKENIZATION"}, "the eos_token is '<|im_end|>' (2), in the export"),
        (faults.ids_shifted, {"TOKENIZATION"}, "line 1: token 1 is 'user' (298), in the export 297"),
        (faults.merge_removed, {"TOKENIZATION"}, "token "),
        (faults.end_of_turn_lost, {"STOP_TOKENS"}, "training ends turns with <|im_end|> (2)"),
        (faults.head_dropped, NUMBERS, "likeliest token"),
        (faults.layer_swapped, NUMBERS, "likeliest token"),
        (faults.norm_off, NUMBERS - {"GREEDY_TEXT", "TOP1_AGREEMENT"}, "nats"),
        (faults.half_rotated, NUMBERS, "likeliest token"),
    ],
)
def test_a_fault_in_a_merged_model_is_caught_by_its_check(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], fault: Callable[[Path], None], caught: set[str], said: str
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, BF16)
    fault(exported)
    found = failed(proof_of(model, exported, BF16, source))
    assert caught & found.keys() and found.keys() <= (NUMBERS if caught <= NUMBERS else caught | {"GREEDY_TEXT"})
    assert said in " ".join(found.values())


@pytest.mark.parametrize("export", [F32, BF16, GGUF_F16], ids=_name)
def test_an_adapter_that_was_not_merged_is_caught(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], export: ExportTask
) -> None:
    model, source = tuned
    bare = dataclasses.replace(model, adapter=None)
    found = failed(proof_of(model, export_to(tmp_path / "out", bare, export), export, source))
    assert found.keys() >= {"TOP1_AGREEMENT", "LOGPROB_DIFFERENCE"}


@pytest.mark.parametrize("export", [ADAPTER, BF16, GGUF_ADAPTER], ids=_name)
def test_a_wrongly_scaled_adapter_is_caught(
    tmp_path: Path, example: tuple[Tuned, DatasetSource], export: ExportTask
) -> None:
    model, source = example
    other = shutil.copytree(model.directory, tmp_path / "other")
    faults.edit_json(other / "adapter_config.json", lambda config: config.update(lora_alpha=config["lora_alpha"] * 1.5))
    scaled = dataclasses.replace(model, directory=other, adapter=other)
    export = _of_four_rows(export)
    found = failed(proof_of(model, export_to(tmp_path / "out", scaled, export), export, source))
    assert "LOGPROB_DIFFERENCE" in found and found.keys() <= NUMBERS


def _unpermuted(file: Path) -> None:
    """Queries and keys in the order that transformers rotates them in."""
    reader = gguf.GGUFReader(file, "r+")
    heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}
    for tensor in reader.tensors:
        if tensor.name in heads:
            count = heads[tensor.name]
            columns = tensor.data.shape[1]
            apart = tensor.data.reshape(count, -1, 2, columns).swapaxes(1, 2)
            tensor.data[:] = np.ascontiguousarray(apart).reshape(tensor.data.shape)


def _end_lost(file: Path) -> None:
    reader = gguf.GGUFReader(file, "r+")
    for name in ("eos", "eot", "eom"):
        field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            field.parts[field.data[0]][:] = 0


@pytest.mark.parametrize(("fault", "caught"), [(_unpermuted, "TOP1_AGREEMENT"), (_end_lost, "STOP_TOKENS")])
def test_a_fault_in_a_gguf_file_is_caught_by_its_check(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], fault: Callable[[Path], None], caught: str
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, GGUF_F16)
    fault(next(exported.glob("*.gguf")))
    assert caught in failed(proof_of(model, exported, GGUF_F16, source))


@pytest.mark.parametrize(
    ("fault", "caught"), [(faults.template_swapped, "TEMPLATE"), (faults.merge_removed, "TOKENIZATION")]
)
def test_a_gguf_file_with_other_words_is_caught(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], fault: Callable[[Path], None], caught: str
) -> None:
    model, source = tuned
    other = shutil.copytree(model.directory, tmp_path / "other")
    fault(other)
    exported = export_to(tmp_path / "out", dataclasses.replace(model, directory=other), GGUF_F16)
    assert caught in failed(proof_of(model, exported, GGUF_F16, source))


def test_what_is_coarse_still_catches_a_wrong_model(tmp_path: Path, example: tuple[Tuned, DatasetSource]) -> None:
    """Of a model that knows something: what a random one does in two bits is noise."""
    model, source = example
    export = _of_four_rows(Q2_K)
    bare = dataclasses.replace(model, adapter=None)
    found = failed(proof_of(model, export_to(tmp_path / "out", bare, export), export, source))
    assert found.keys() == {"TOP1_AGREEMENT", "PERPLEXITY_RATIO"}


@pytest.mark.parametrize("export", [BF16, GGUF_F16], ids=_name)
def test_an_export_that_cannot_be_loaded_is_told_as_such(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], export: ExportTask
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, export)
    weights = next(exported.glob("*.gguf"), exported / "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(TrainingError) as caught:
        proof_of(model, exported, export, source)
    assert caught.value.reason == "EXPORT_NOT_EQUAL"
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("export", [BF16, NF4], ids=_name)
@pytest.mark.parametrize("fault", [faults.rotated_otherwise, faults.epsilon_changed, faults.window_changed])
def test_a_setting_that_changes_less_than_rounding_does_is_caught(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], fault: Callable[[Path], None], export: ExportTask
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, export)
    fault(exported)
    with pytest.raises(TrainingError, match=r"rope_parameters|rms_norm_eps|max_position") as caught:
        proof_of(model, exported, export, source)
    assert caught.value.reason == "EXPORT_NOT_EQUAL"


@pytest.mark.parametrize("export", [GGUF_F16, Q2_K], ids=_name)
@pytest.mark.parametrize(
    ("key", "value"), [("llama.rope.freq_base", 20000.0), ("llama.attention.layer_norm_rms_epsilon", 1e-4)]
)
def test_a_number_of_a_gguf_file_that_changes_less_than_rounding_does_is_caught(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], key: str, value: float, export: ExportTask
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, export)
    field = gguf.GGUFReader(next(exported.glob("*.gguf")), "r+").fields[key]
    field.parts[field.data[0]][:] = value
    with pytest.raises(TrainingError, match=key.removeprefix("llama.")) as caught:
        proof_of(model, exported, export, source)
    assert caught.value.reason == "EXPORT_NOT_EQUAL"


def test_an_export_in_few_bits_that_stops_at_a_word_is_caught(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource]
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, NF4)
    faults.end_in_the_middle(exported)
    assert "with which no answer ends" in failed(proof_of(model, exported, NF4, source))["STOP_TOKENS"]


SHARDED = ExportTask(merged=MergedExport(weights=export_task_pb2.WEIGHT_TYPE_BF16, max_shard_bytes=300_000))


@pytest.mark.parametrize(
    ("export", "file", "content"),
    [
        (SHARDED, "model-00002-of-00002.safetensors", None),
        (BF16, "config.json", "{"),
        (BF16, "tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}'),
        (ADAPTER, "generation_config.json", "{"),
    ],
    ids=["a shard is lacking", "config.json", "tokenizer.json", "generation_config.json"],
)
def test_a_file_that_is_lacking_or_broken_fails_the_proof_without_telling_where_it_lay(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], export: ExportTask, file: str, content: str | None
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, export)
    (exported / file).unlink()
    if content is not None:
        (exported / file).write_text(content)
    with pytest.raises(TrainingError) as caught:
        proof_of(model, exported, export, source)
    assert caught.value.reason == "EXPORT_NOT_EQUAL"
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(("others", "passes"), [(1, True), (2, False)])
def test_one_other_token_of_a_short_row_is_no_proof_against_quantised_weights(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource], others: int, passes: bool
) -> None:
    model, source = tuned
    reference = ask(model, source, 1, tokenization_pb2.Tokenization(), 0.0, lambda: None, never)
    (own,) = reference.standings
    assert len(own.target) < 50
    best = own.ids[:, 0].copy()
    best[:others] = own.ids[:others, -1]
    found = Judged(own.target, best, own.logprobs)
    limits = Limits(0.98, None, 1.02, 0.0, tie_by_spread=True)
    top1 = compare.numbers(reference, [found], [], frozenset(), limits)[0]
    assert (top1.name, top1.passed) == ("TOP1_AGREEMENT", passes)
    assert top1.passed == (top1.value >= top1.limit)


def _without_a_norm(weights: faults.Weights) -> None:
    del weights["model.norm.weight"]


def test_a_lacking_weight_is_no_made_up_one(tmp_path: Path, tuned: tuple[Tuned, DatasetSource]) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, BF16)
    faults.edit_weights(exported, _without_a_norm)
    with pytest.raises(TrainingError, match=r"no weights for model\.norm\.weight"):
        proof_of(model, exported, BF16, source)


def test_a_base_that_asks_for_penalties_is_asked_without(tmp_path: Path, tuned: tuple[Tuned, DatasetSource]) -> None:
    model, source = tuned
    base = shutil.copytree(model.base, tmp_path / "base")
    penalties = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(3, 4000))}
    faults.edit_json(base / "generation_config.json", lambda settings: settings.update(penalties))
    nothing = tokenization_pb2.Tokenization()
    plain, odd = (
        ask(dataclasses.replace(model, base=each), source, 2, nothing, 0.0, lambda: None, never)
        for each in (model.base, base)
    )
    assert [each.ids for each in plain.continuations] == [each.ids for each in odd.continuations]


def test_raw_text_is_proven(tmp_path: Path, tuned: tuple[Tuned, DatasetSource]) -> None:
    model, _ = tuned
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{each} " * 200}) + "\n" for each in ("one", "two 😀", "three")))
    proof = proof_of(
        model, export_to(tmp_path / "out", model, ADAPTER), ADAPTER, DatasetSource(path=str(texts), id="ds_2")
    )
    assert failed(proof) == {}
    assert proof.rows == 3
    assert next(each for each in proof.checks if each.name == "TEMPLATE").value == 1


def test_a_dataset_without_a_row_to_compare_proves_nothing(tmp_path: Path, tuned: tuple[Tuned, DatasetSource]) -> None:
    model, _ = tuned
    rows_of_tools = tmp_path / "tools.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    rows_of_tools.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n")
    with pytest.raises(TrainingError) as caught:
        proof_of(model, tmp_path, ADAPTER, DatasetSource(path=str(rows_of_tools), name="tools@1"))
    assert caught.value.reason == "PROOF_IMPOSSIBLE"


def test_a_stop_ends_a_proof_between_rows_and_progress_counts_both_models(
    tmp_path: Path, tuned: tuple[Tuned, DatasetSource]
) -> None:
    model, source = tuned
    exported = export_to(tmp_path / "out", model, BF16)
    recorder = Recorder()
    prove(model, exported, BF16, source, recorder, never)
    told = [each for each in recorder.reports if isinstance(each, event_pb2.PhaseProgressed)]
    assert [(each.completed, each.total, each.unit) for each in told] == [(n, 12, "rows") for n in range(13)]
    assert {each.phase for each in told} == {event_pb2.PHASE_PROVING}

    def stop() -> None:
        if len(recorder.reports) > 20:
            raise StopRequested

    with pytest.raises(StopRequested):
        prove(model, exported, BF16, source, recorder, stop)
    assert len(recorder.reports) == 21
