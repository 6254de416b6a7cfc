"""Federated training for fleets of weak, unequal machines.

``Task`` describes what is learned; ``Training`` how; ``DeviceProfile`` what a device may spend.
Importing this package loads neither torch nor numpy nor onnxruntime.
"""

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
