"""GET /v1/models and /v1/models/{id}: the one model that is served."""

from typing import Any

from fastapi import APIRouter, Request

from unspool_server.service import Backend, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Lists what is served."""
    return {"object": "list", "data": [_describe(service_of(request).ready_backend())]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
    """Describes one model."""
    return _describe(service_of(request).backend_of(model))


def _describe(backend: Backend) -> dict[str, Any]:
    return {"id": backend.model.name, "object": "model", "created": backend.created, "owned_by": "unspool"}
