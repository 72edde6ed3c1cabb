"""One file per evaluation protocol, discovered by name: there is no list to edit.

A protocol's module ends in `PROTOCOL: Final = EvaluationProtocol(...)`. A user's own package offers one
through an entry point `name = "package.module"` in the group `ddray.protocols`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ddray.system.registry import Registry

if TYPE_CHECKING:
    from ddray.evaluation.protocol import EvaluationProtocol

_PROTOCOLS: Final = Registry("protocol", __name__, "PROTOCOL", "ddray.protocols")


def protocol_names() -> list[str]:
    """Return the names of all protocols, ours and those of installed packages; nothing is imported."""
    return _PROTOCOLS.names()


def get_protocol(name: str) -> EvaluationProtocol:
    """Return a protocol by name.

    Raises:
        InputError: there is no such protocol (with the nearest name), or its module has no PROTOCOL.
    """
    protocol: EvaluationProtocol = _PROTOCOLS.get(name)
    return protocol


def target_protocols() -> str:
    """Return the names of the protocols that train on the target's images, for a message."""
    return " or ".join(name for name in protocol_names() if get_protocol(name).trains_on_target)
