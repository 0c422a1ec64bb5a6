"""How teams stand with the platform: their terms, and the credit that the platform grants them.

Every function runs inside the caller's database transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.billing import ledger, store
from services.billing.ledger import Charge
from services.billing.spendable import WITHOUT_TERMS, Terms, spendable_nanousd, terms_refusal
from shared.database import Connection
from shared.messages import CommandResult, GrantCredit, SetTeamTerms

MAX_CREDIT_NANOUSD = 10**15
"""A million USD for one grant."""
MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Standing:
    """A team's terms and balance."""

    terms: Terms
    balance_nanousd: int

    @property
    def spendable_nanousd(self) -> int | None:
        return spendable_nanousd(self.terms, self.balance_nanousd)

    def body(self) -> dict[str, Any]:
        """As an answer to a command tells it."""
        return {
            "pays": self.terms.pays,
            "credit_limit_nanousd": self.terms.credit_limit_nanousd,
            "balance_nanousd": self.balance_nanousd,
            "spendable_nanousd": self.spendable_nanousd,
        }


def credit_refusal(command: GrantCredit) -> tuple[str, str] | None:
    """Why this credit cannot be granted, as (code, message); None if it can. Pure."""
    if not 1 <= command.amount_nanousd <= MAX_CREDIT_NANOUSD:
        return "invalid_value", f"amount_nanousd must be between 1 and {MAX_CREDIT_NANOUSD}"
    if not command.reason.strip() or len(command.reason) > MAX_REASON_CHARS:
        return "invalid_value", f"reason must be a text of 1 to {MAX_REASON_CHARS} characters"
    return None


async def load_standing(connection: Connection, team_id: str) -> Standing:
    """The team's newest terms and its balance as the ledger keeps it."""
    terms = await connection.fetchrow(
        "SELECT pays, credit_limit_nanousd FROM billing.team_terms WHERE team_id = $1 ORDER BY terms_id DESC LIMIT 1",
        team_id,
    )
    balance = await connection.fetchval(
        "SELECT balance_nanousd FROM billing.balances WHERE account_id = $1", ledger.team_account(team_id)
    )
    return Standing(
        WITHOUT_TERMS if terms is None else Terms(terms["pays"], terms["credit_limit_nanousd"]), balance or 0
    )


async def grant_credit(connection: Connection, command: GrantCredit) -> CommandResult:
    """Post a credit, once for each command id: the ledger itself remembers it longer than answers are kept."""
    refusal = credit_refusal(command)
    if refusal is not None:
        return store.refused(command, refusal)
    unique_key = f"credit:{command.command_id}"
    transaction_id = await ledger.find(connection, unique_key)
    if transaction_id is None:
        credit = Charge(
            unique_key=unique_key,
            kind="credit",
            team_id=command.team_id,
            other_account=ledger.CREDITS_GRANTED,
            amount_nanousd=-command.amount_nanousd,
            words=f"credit granted by {command.actor}: {command.reason}",
        )
        (transaction_id,) = await ledger.post(connection, [credit])
    standing = await load_standing(connection, command.team_id)
    return CommandResult(
        command_id=command.command_id, ok=True, body={"transaction_id": transaction_id, **standing.body()}
    )


async def set_team_terms(connection: Connection, command: SetTeamTerms) -> CommandResult:
    """Keep the terms as the newest of the team; the same as before are not kept again."""
    terms = Terms(command.pays, command.credit_limit_nanousd)
    refusal = terms_refusal(terms)
    if refusal is not None:
        return store.refused(command, refusal)
    await store.lock_name(connection, f"billing terms {command.team_id}")
    if (await load_standing(connection, command.team_id)).terms != terms:
        await connection.execute(
            "INSERT INTO billing.team_terms (team_id, pays, credit_limit_nanousd, actor) VALUES ($1, $2, $3, $4)",
            command.team_id,
            terms.pays,
            terms.credit_limit_nanousd,
            command.actor,
        )
    standing = await load_standing(connection, command.team_id)
    return CommandResult(command_id=command.command_id, ok=True, body=standing.body())
