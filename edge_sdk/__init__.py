"""Federated training for fleets of weak, unequal machines.

``Task`` describes what is learned; ``Training`` how; ``DeviceProfile`` what a device may spend.
Importing this package loads nothing else: each name is fetched from its module on first use, so
that neither torch nor numpy nor onnxruntime is loaded because somebody wanted a profile.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from edge_sdk.errors import ConfigError, EdgeError, LinkError, PeerError, ProtocolMisuse
    from edge_sdk.profile import DeviceProfile, load_profile, shipped_profiles
    from edge_sdk.task import Task, load_task
    from edge_sdk.wire import Training

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DeviceProfile",
    "EdgeError",
    "LinkError",
    "PeerError",
    "ProtocolMisuse",
    "Task",
    "Training",
    "__version__",
    "load_profile",
    "load_task",
    "shipped_profiles",
]

_HOMES = {
    **dict.fromkeys(
        ("ConfigError", "EdgeError", "LinkError", "PeerError", "ProtocolMisuse"), "errors"
    ),
    **dict.fromkeys(("DeviceProfile", "load_profile", "shipped_profiles"), "profile"),
    **dict.fromkeys(("Task", "load_task"), "task"),
    "Training": "wire",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
