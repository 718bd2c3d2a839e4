"""GET /health/live and /health/ready: whether to restart the process, and whether to send it work."""

from typing import Any

from fastapi import APIRouter, Request

from unspool_server.errors import unavailable
from unspool_server.service import service_of

router = APIRouter()


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def report_live(request: Request) -> dict[str, Any]:
    """503 once the engine has stopped: only a restart helps."""
    if service_of(request).failed:
        raise unavailable("the engine has stopped; the server must be restarted", "engine_dead")
    return {"status": "live"}


@router.head("/health", include_in_schema=False)
@router.head("/health/ready", include_in_schema=False)
@router.get("/health")
@router.get("/health/ready")
async def report_ready(request: Request) -> dict[str, Any]:
    """503 while the model loads, and once the engine has stopped."""
    service_of(request).ready_backend()
    return {"status": "ready"}
