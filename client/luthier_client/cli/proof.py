"""How an export was proven, for people."""

import math
from typing import TYPE_CHECKING

import click

from luthier_client.cli import output

if TYPE_CHECKING:
    from luthier.v1.export_proof_pb2 import ExportProof, ProofCheck

_SHARES = ("TOKENIZATION", "TEMPLATE", "STOP_TOKENS", "TOP1_AGREEMENT", "GREEDY_TEXT")


def proof_line(proof: "ExportProof") -> str:
    """A proof in one line."""
    failed = [check.name.lower() for check in proof.checks if not check.passed]
    how = "passed" if proof.passed else "FAILED"
    which = f": {', '.join(failed)}" if failed else ""
    loader = f"{proof.loader} {proof.loader_version}".strip()
    return output.clean(f"proof {how}{which}  {proof.rows:,} rows, {proof.tokens:,} tokens, by {loader}")


def print_proof(proof: "ExportProof", indent: str = "") -> None:
    """Prints the checks as a table, and what differs where one did not pass."""
    click.echo(indent + output.colour(proof_line(proof), "green" if proof.passed else "red"))
    if not proof.checks:
        return
    rows = [
        [check.name.lower(), _number(check, check.value), _limit(check), "yes" if check.passed else "NO"]
        for check in proof.checks
    ]
    output.table(["CHECK", "VALUE", "LIMIT", "PASSED"], rows, indent)
    for check in proof.checks:
        if not check.passed and check.message:
            click.echo(f"{indent}{output.colour('!', 'red')} {output.one_line(check.message, 1000)}")


def _limit(check: "ProofCheck") -> str:
    # An exact comparison has its limit at everything.
    return f"{'at most' if check.is_ceiling else 'at least'} {_number(check, check.limit)}"


def _number(check: "ProofCheck", value: float) -> str:
    if check.name in _SHARES:
        # Cut, not rounded: 100 % is said of what is equal everywhere.
        return f"{math.floor(value * 1e4) / 1e2:g}%"
    return output.number(value)
