"""`roundhouse billing`: what is left, money in, and a month's bill down to what stands behind each line."""

from __future__ import annotations

import secrets
import sys
from typing import Annotated, Any

import typer

from services.cli.acting import api
from services.cli.client import CliError
from services.cli.output import Json, print_fields, print_json, print_table

app = typer.Typer(
    help="Balance, credit, payments and monthly statements; `usage` has the numbers.", no_args_is_help=True
)
PATH = "/api/billing"

Amount = Annotated[str, typer.Argument(metavar="USD", help='A decimal, such as "20.00".')]
Once = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Given again, nothing happens twice; one is made if it is left out."),
]
Month = Annotated[str, typer.Argument(help="YYYY-MM, in UTC.")]


@app.command()
def account(context: typer.Context, as_json: Json = False) -> None:
    """How the team pays, its balance, and what it may still spend."""
    _show_account(api(context).get(f"{PATH}/account"), as_json)


@app.command()
def terms(
    context: typer.Context,
    pays: Annotated[str, typer.Argument(help="prepaid or postpaid.")],
    credit_limit: Annotated[
        str | None, typer.Option(metavar="USD", help="What a postpaid team may owe; default: any amount.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set how a team pays (platform key, with --team)."""
    body = {"pays": pays} | ({} if credit_limit is None else {"credit_limit_usd": credit_limit})
    _show_account(api(context).put(f"{PATH}/account/terms", body), as_json)


@app.command()
def credit(
    context: typer.Context,
    amount: Amount,
    reason: Annotated[str, typer.Option(help="Shown in the statement.")],
    once: Once = None,
    as_json: Json = False,
) -> None:
    """Grant credit to a team (platform key, with --team)."""
    body = {"amount_usd": amount, "reason": reason}
    _show_account(_post_once(context, f"{PATH}/credits", body, once), as_json)


@app.command("top-up")
def top_up(context: typer.Context, amount: Amount, once: Once = None, as_json: Json = False) -> None:
    """Make a page of the payment provider's, where the team pays this much."""
    page = _post_once(context, f"{PATH}/top_ups", {"amount_usd": amount}, once)
    if as_json:
        print_json(page)
        return
    print_fields([("pay at", page["url"]), ("amount", f"{page['amount_usd']} USD")])


@app.command()
def deposits(context: typer.Context, as_json: Json = False) -> None:
    """What came in: credits, payments, and corrections of them."""
    found = list(api(context).list(f"{PATH}/deposits"))
    if as_json:
        print_json(found)
        return
    print_table(
        ("when", "kind", "USD", "what", "id"),
        (
            (each["created_at"], each["kind"], each["amount_usd"], each["words"], each["transaction_id"])
            for each in found
        ),
    )


@app.command()
def statement(
    context: typer.Context,
    month: Month,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print it as CSV.")] = False,
    as_json: Json = False,
) -> None:
    """A month's bill. What stands behind one of its lines: `roundhouse billing line`."""
    client = api(context)
    if as_csv:
        for piece in client.download(f"{PATH}/statements/{month}", format="csv"):
            sys.stdout.buffer.write(piece)
        return
    bill = client.get(f"{PATH}/statements/{month}")
    if as_json:
        print_json(bill)
        return
    print_table(
        ("what", "quantity", "unit", "USD", "line"),
        (
            (each["text"], each["quantity"], each["unit"], each["amount_usd"], each["line_id"])
            for each in bill["lines"]
        ),
    )
    print_fields(
        [
            ("charged", f"{bill['charged_usd']} USD"),
            ("received", f"{bill['received_usd']} USD"),
            ("total", f"{bill['total_usd']} USD{'' if bill['ended'] else ', so far'}"),
        ]
    )


@app.command()
def line(
    context: typer.Context,
    month: Month,
    line_id: Annotated[str, typer.Argument(metavar="LINE", help="As the statement shows it.")],
    as_json: Json = False,
) -> None:
    """What stands behind a line: requests, hours with their live intervals, or postings."""
    found = list(api(context).list(f"{PATH}/statements/{month}/lines/{line_id}"))
    if as_json:
        print_json(found)
        return
    print_table(("when", "what", "USD"), (_behind(each) for each in found))


def _post_once(context: typer.Context, path: str, body: dict[str, Any], once: str | None) -> dict[str, Any]:
    """Whoever does not get the answer is told how to ask again without doing it twice."""
    once_key = once or secrets.token_hex(16)
    try:
        return api(context).post_once(path, body, once_key)
    except CliError as error:
        raise CliError(f"{error}; to try again: --once {once_key}") from error


def _behind(row: dict[str, Any]) -> tuple[Any, ...]:
    if "request_id" in row:
        tokens = f"{row['prompt_tokens']} and {row['completion_tokens']} tokens"
        return row["accepted_at"], f"{row['request_id']}: {row['model']}, {tokens}", row["amount_usd"]
    if "intervals" in row:
        spans = ", ".join(f"{each['started_at']} to {each['proved_until']}" for each in row["intervals"])
        return row["hour"], f"place {row['place']}, {row['minutes']} minutes: {spans}", row["amount_usd"]
    return row["posted_at"], row["text"], row["amount_usd"]


def _show_account(account: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(account)
        return
    limit, spendable = account["credit_limit_usd"], account["spendable_usd"]
    print_fields(
        [
            ("team", account["team"]),
            ("pays", account["pays"] if limit is None else f"{account['pays']}, may owe {limit} USD"),
            ("balance", f"{account['balance_usd']} USD"),
            ("may spend", "any amount" if spendable is None else f"{spendable} USD"),
        ]
    )
