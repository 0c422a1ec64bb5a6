"""Rows of the gateway's view of models as what is told to workers."""

from __future__ import annotations

import asyncpg

from shared.messages import ModelRef, WeightsRef

COLUMNS = """m.model_id, m.revision, m.name, m.folder, m.signature, m.base_model_id, m.base_revision, m.base_name,
           m.base_folder"""
"""Of `gateway_api.models_v1 m`."""


def model_ref(row: asyncpg.Record) -> ModelRef:
    base = None
    if row["base_model_id"] is not None:
        base = WeightsRef(
            model_id=row["base_model_id"],
            revision=row["base_revision"],
            name=row["base_name"],
            folder=row["base_folder"],
            signature=row["signature"],
        )
    return ModelRef(
        model_id=row["model_id"],
        revision=row["revision"],
        name=row["name"],
        folder=row["folder"],
        signature=row["signature"],
        base=base,
    )
