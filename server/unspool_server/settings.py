"""What an operator may set about the server. Knows no route, reads no environment."""

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

MIB = 1 << 20
MAX_PORT = 65535

AT_LEAST_ONE = (
    "max_output_tokens",
    "max_prompt_tokens",
    "max_prompts",
    "max_body_bytes",
    "max_connections",
    "body_timeout",
    "shutdown_timeout",
)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Address, limits and keys. Raises ValueError when a value cannot be, or would leave the server open to all."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    served_model_name: str | None = field(
        default=None, metadata={"help": "name of the model in the API; by default its directory's"}
    )
    max_output_tokens: int = field(
        default=8192, metadata={"help": "most tokens an answer may ask for, and what a chat that sets no limit gets"}
    )
    max_prompt_tokens: int = field(default=131072, metadata={"help": "most tokens of one prompt"})
    max_prompts: int = field(default=128, metadata={"help": "most prompts of one request"})
    max_body_bytes: int = field(default=8 * MIB, metadata={"help": "largest request body"})
    max_connections: int = field(
        default=1024, metadata={"help": "most connections at a time; a request on a further one is answered by 503"}
    )
    body_timeout: int = field(default=60, metadata={"help": "seconds that a request's body may take to arrive"})
    shutdown_timeout: int = field(
        default=30, metadata={"help": "seconds that answers in flight may take after SIGTERM"}
    )
    log_level: Literal["error", "warning", "info", "debug"] = field(
        default="info", metadata={"help": "info also logs each request's address and status"}
    )
    allow_unauthenticated: bool = field(
        default=False, metadata={"help": "listen beyond this machine although no key is set"}
    )
    api_keys: tuple[str, ...] = field(default=(), repr=False, metadata={"flag": False})

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT:
            raise ValueError(f"port={self.port} must be between 0 and {MAX_PORT}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.served_model_name == "":
            raise ValueError("served_model_name must not be empty")
        if not (self.api_keys or self.on_loopback or self.allow_unauthenticated):
            raise ValueError(
                f"refusing to listen on {self.host} without a key: set UNSPOOL_API_KEY or --api-key-file, "
                "or pass --allow-unauthenticated"
            )

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
