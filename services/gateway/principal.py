"""Who asks, and what their models run on, by the name that the gateway's modules know it by."""

from shared.inference.principal import BaseView, ModelView, Principal, ResourceView, Route

__all__ = ["BaseView", "ModelView", "Principal", "ResourceView", "Route"]
