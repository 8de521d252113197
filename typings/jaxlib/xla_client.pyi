"""What the type checker must know of jaxlib's compiled part, which has no types of its own: that `jax.Device` is a class."""

from typing import Any

class Device:
    id: int
    process_index: int
    platform: str
    device_kind: str
    def memory_stats(self) -> dict[str, int] | None: ...

def __getattr__(name: str) -> Any: ...
