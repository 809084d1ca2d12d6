"""Pretrain `builtin/tiny`, the small model that Luthier carries with it, with Luthier.

The corpus is text about Python: the standard library as a CPython installation has it (docstrings, signatures, longer
comments, `pydoc_data.topics`), Debian's packages of documentation that `pretraining/packages.py` names, and
conversations in plain prose about documented and about invented objects. About one object and one page in fifty are
held out.

It writes tokenizer, template and random weights, starts a luthierd on this machine, and trains them in a job of full
fine-tuning on raw text. What that job makes is the model. When the script is started again it goes on where it was;
with another number of steps, from the newest checkpoint.

The corpus is a function of the CPython patch version and the packages' versions, the weights of these, the seed and
the machine's arithmetic. Needs the packages of this repository, and apt-get and dpkg.

    python pretrain_tiny.py --work DIR --out DIR              # the whole thing
    python pretrain_tiny.py --work DIR --out DIR --steps 0    # tokenizer, template and untrained weights
    python pretrain_tiny.py --work DIR --measure MODEL        # a model on the held-out texts
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sysconfig
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretraining import corpus, packages, training, untrained
from pretraining.measure import measure
from pretraining.packages import PYTHON, Package

SEED = 20
HELDOUT_CHATS = 100
"""Conversations that the job's own evaluations use; the measures at the end use all of them."""


def say(line: str) -> None:
    print(line, flush=True)


def heldout_texts(library: corpus.Library, found: corpus.Pages) -> dict[str, list[str]]:
    """What is measured at the end, by kind."""
    return {
        "documents": library.heldout_documents,
        "conversations": library.heldout_chats,
        "python_pages": [page.text for page in found.heldout if page.package == PYTHON],
        "other_pages": [page.text for page in found.heldout if page.package != PYTHON],
    }


def write_rows(path: Path, texts: list[str]) -> None:
    """Texts as rows, each closed by END_OF_TEXT. The file appears whole."""
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text + untrained.END_OF_TEXT}) + "\n" for text in texts)
    part.rename(path)


def prepare(options: argparse.Namespace) -> None:
    """Writes to the work folder what the job needs: `start`, `train.jsonl`, `heldout.jsonl`, and what is measured and
    told at the end: `heldout.json`, `corpus.json`, `licences.txt`."""
    warnings.simplefilter("ignore", SyntaxWarning)  # the library's own sources have invalid escapes
    work: Path = options.work
    library = corpus.read_library(options.library, SEED, options.retellings, options.inventions)
    tokenizer = untrained.train_tokenizer([*library.documents, *library.chats, *library.sources])
    untrained.write_model(untrained.new_model(SEED), tokenizer, work / "start")
    if options.steps == 0:
        return
    fetched = packages.fetch(work / "packages")
    found = corpus.read_pages(fetched)
    rows = corpus.training_rows(library, found, say)
    texts = [
        text if source == "conversations" else untrained.without_special_tokens(text)
        for source, texts in rows.items()
        for text in texts
    ]
    random.Random(SEED).shuffle(texts)
    write_rows(work / "train.jsonl", texts)
    tested = heldout_texts(library, found)
    (work / "heldout.json").write_text(json.dumps(tested))
    write_rows(work / "heldout.jsonl", [*tested["documents"], *tested["conversations"][:HELDOUT_CHATS]])
    sources = [describe(name, texts, fetched, tokenizer) for name, texts in rows.items()]
    for source in sources:
        say(f"{source['name']}: {source['rows']:,} rows, {source['tokens']:,} tokens, {source['licence']}")
    record = {"python": platform.python_version(), "rows": len(texts), "sources": sources}
    notices = [f"{each.name} {each.version}\n\n{each.copyright_file.read_text('utf-8')}" for each in fetched]
    (work / "licences.txt").write_text(f"\n{'=' * 100}\n\n".join(notices), encoding="utf-8")
    (work / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")


def describe(name: str, texts: list[str], fetched: list[Package], tokenizer: Any) -> dict[str, Any]:
    """A source of the corpus, with all that one needs to find it again."""
    told: dict[str, Any] = {"name": name}
    package = next((each for each in fetched if each.name == name), None)
    if package is None:
        told |= {"origin": f"CPython {platform.python_version()}, standard library", "licence": "PSF-2.0"}
    else:
        told |= {
            "origin": f"Debian package {name} {package.version}",
            "licence": packages.PACKAGES[name],
            "copyright": "licences.txt",
            "sha256": package.sha256,
        }
    return told | {
        "rows": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(len(each.ids) for each in tokenizer.encode_batch(texts)),
    }


def train(options: argparse.Namespace) -> None:
    """The job, from the work folder to the model in `options.out`."""
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    from luthier_client import Client

    work: Path = options.work
    recipe = training.Recipe(
        steps=options.steps,
        rows=options.rows,
        rate=options.rate,
        warmup=options.warmup,
        decay=options.decay,
        length=untrained.POSITIONS,
        seed=SEED,
    )
    started = time.monotonic()
    with training.luthierd(work) as address, Client(address) as client:
        job = training.train(client, work, recipe, say)
        curve = training.read_curve(client)
        made = work / f"made-{job.id}"
        if not made.exists():
            client.download_model(job.refresh().model_id, made)
    say(f"trained for {time.monotonic() - started:.0f} s; {curve.tokens:,} tokens")
    out: Path = options.out
    tokenizer = Tokenizer.from_file(str(work / "start" / "tokenizer.json"))
    untrained.write_model(LlamaForCausalLM.from_pretrained(made), tokenizer, out)
    record = {
        "python": platform.python_version(),
        "recipe": asdict(recipe),
        "plan": curve.plan,
        "tokens": curve.tokens,
        "heldout": measured(work, out),
        "evaluations": curve.evaluations,
        "curve": curve.losses,
    }
    (out / "curve.json").write_text(json.dumps(record) + "\n")
    for name in ("corpus.json", "licences.txt"):
        (out / name).write_bytes((work / name).read_bytes())


def measured(work: Path, model: Path) -> dict[str, dict[str, float]]:
    """The model on everything that is held out."""
    told = {}
    for name, texts in json.loads((work / "heldout.json").read_text()).items():
        found = measure(model, texts)
        say(
            f"{name}: {found.texts} texts, {found.tokens:,} tokens, loss {found.loss:.4f},"
            f" perplexity {found.perplexity:.1f}, {found.bits_per_byte:.3f} bits a byte"
        )
        told[name] = {**asdict(found), "loss": round(found.loss, 4), "bits_per_byte": round(found.bits_per_byte, 4)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain builtin/tiny.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus, luthierd and checkpoints")
    parser.add_argument("--out", type=Path, help="the model directory to write")
    parser.add_argument("--measure", type=Path, metavar="MODEL", help="only measure this model")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--rows", type=int, default=16, help="rows a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.35, help="share of all steps in which the rate falls")
    parser.add_argument("--retellings", type=int, default=1, help="conversations about each object")
    parser.add_argument("--inventions", type=int, default=30000, help="conversations about invented objects")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.measure is None and options.out is None:
        parser.error("--out or --measure is needed")
    if options.steps == 0 or not (options.work / "corpus.json").exists():
        prepare(options)
    if options.measure is not None:
        measured(options.work, options.measure)
    elif options.steps == 0:
        (options.work / "start").rename(options.out)
    else:
        train(options)


if __name__ == "__main__":
    main()
