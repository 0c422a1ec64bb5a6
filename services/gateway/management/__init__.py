"""The management API under `/api`: teams, keys, models, options, prices, resources, credit, budgets, usage."""

from __future__ import annotations

from services.gateway.management.acting import ManagementDeps
from services.gateway.management.advice import Advice
from services.gateway.management.billing_usage import BillingUsage
from services.gateway.management.budgets import Budgets
from services.gateway.management.credit import Credit
from services.gateway.management.deposits import Deposits
from services.gateway.management.keys import Keys
from services.gateway.management.metrics import Metrics
from services.gateway.management.models import Models
from services.gateway.management.options import Options
from services.gateway.management.prices import Prices
from services.gateway.management.queue_credentials import QueueCredentials
from services.gateway.management.quotas import Quotas
from services.gateway.management.resource_models import ResourceModels
from services.gateway.management.resources import Resources
from services.gateway.management.revisions import Revisions
from services.gateway.management.statements import Statements
from services.gateway.management.teams import Teams
from services.gateway.management.uploads import Uploads
from services.gateway.management.usage import Usage
from services.gateway.routes import RouteSpec

__all__ = ["ManagementDeps", "routes"]


def routes(deps: ManagementDeps) -> list[RouteSpec]:
    """Return all routes of the management API."""
    parts = (
        Teams(deps),
        Keys(deps),
        Uploads(deps),
        Models(deps),
        Revisions(deps),
        Options(deps),
        Prices(deps),
        Resources(deps),
        ResourceModels(deps),
        Quotas(deps),
        Metrics(deps),
        Credit(deps),
        Deposits(deps),
        Budgets(deps),
        Usage(deps),
        BillingUsage(deps),
        Statements(deps),
        Advice(deps),
        QueueCredentials(deps),
    )
    return [spec for part in parts for spec in part.routes()]
