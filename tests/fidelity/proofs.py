"""Tuned models to export, and what their proofs say."""

import shutil
from pathlib import Path
from typing import Any

import torch
from fidelity.families import FAMILIES
from fidelity.jobs import Recorder, chats
from fidelity.tiny import with_lora
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier.v1.export_proof_pb2 import ExportProof
from luthier.v1.export_task_pb2 import ExportTask
from luthier_trainer import inspect
from luthier_trainer.export.perform import write_files
from luthier_trainer.export.proof import prove
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import never

ADDED = "<|tool|>"
_PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def random_base(
    folder: Path, family: str = "llama", *, added: bool = False, chats: bool = True, **changes: Any
) -> Path:
    """A random model of a family with the tokenizer and template of `builtin/tiny`; `added`: with a token more, in a
    vocabulary that was made longer for it and a little more; without `chats` it knows no end of a turn."""
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(inspect.BUILTIN / "tiny")
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", ADDED]})
    if not chats:
        tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    known = next(each for each in FAMILIES if each.name == family)
    sizes = {"vocab_size": 4104 if added else 4096, "bos_token_id": None, "max_position_embeddings": 256}
    model = known.model(torch.float32, **sizes | changes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def worded(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random Llama with this tokenizer and a plain template."""
    tokenizer.chat_template = _PLAIN
    size = max(tokenizer.get_vocab().values()) + 1
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = FAMILIES[0].model(torch.float32, vocab_size=size, max_position_embeddings=256, **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, model: PreTrainedModel, **kind: Any) -> Tuned:
    """A tuned model whose adapter is random and strong; `kind`: as for `with_lora`."""
    trained = with_lora(model, **kind)
    assert trained.peft is not None
    trained.peft.save_pretrained(str(folder), save_embedding_layers=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    return Tuned(folder, base, folder, "model_1", "tiny")


def rows(folder: Path, count: int = 6) -> DatasetSource:
    """Short chats."""
    return DatasetSource(path=str(chats(folder / "chats.jsonl", count)), id="ds_1", name="chats@1", rows=count)


def export_to(folder: Path, tuned: Tuned, export: ExportTask) -> Path:
    """Writes the export."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_files(tuned, export, folder, lambda _done, _total: None, never)
    return folder


def proof_of(tuned: Tuned, exported: Path, export: ExportTask, dataset: DatasetSource) -> ExportProof:
    """The proof of what lies in `exported`."""
    return prove(tuned, exported, export, dataset, Recorder(), never)


def failed(proof: ExportProof) -> dict[str, str]:
    """The messages of the checks that failed, by name."""
    assert proof.passed == all(each.passed for each in proof.checks)
    return {each.name: each.message for each in proof.checks if not each.passed}
