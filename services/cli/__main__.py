"""The `roundhouse` command: one Typer application made of the groups; what goes wrong is one line and exit code 1."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import structlog
import typer

from services.cli import batch, bench, billing, budgets, chat, models, prices, resources, size, usage
from services.cli.client import CliError
from services.cli.output import print_error
from shared.settings import SettingsError

app = typer.Typer(
    name="roundhouse",
    help="Roundhouse from the shell. ROUNDHOUSE_URL and ROUNDHOUSE_API_KEY come from the environment or .local/env.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(resources.app, name="resources")
app.add_typer(models.app, name="models")
app.add_typer(batch.app, name="batch")
app.add_typer(billing.app, name="billing")
app.add_typer(budgets.app, name="budgets")
app.add_typer(prices.prices, name="prices")
app.add_typer(prices.rates, name="rates")
app.command()(chat.chat)
app.command()(usage.usage)
app.command()(size.size)
app.command()(size.options)
app.command()(bench.bench)


@app.callback()
def _for_all(
    team: Annotated[
        str | None, typer.Option(help="Act for this team (its slug); needs a platform key.")
    ] = None,
) -> None:
    """Options of all commands: `acting.api` reads them."""


def main() -> int:
    # Standard output is the answer's.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        app(prog_name="roundhouse")
    except (CliError, SettingsError) as error:
        print_error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
