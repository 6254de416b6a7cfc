"""The names a user may rely on: adding or losing one is a decision, made here."""

from __future__ import annotations

from types import ModuleType

import edge_sdk

EXPORTED = [
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


def test_the_exports_are_the_pinned_ones() -> None:
    assert sorted(edge_sdk.__all__) == EXPORTED


def test_every_export_exists_and_none_is_a_module() -> None:
    for name in EXPORTED:
        assert not isinstance(getattr(edge_sdk, name), ModuleType), name


def test_nothing_else_is_visible() -> None:
    visible = {
        name
        for name, value in vars(edge_sdk).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert visible - set(EXPORTED) == set()


def test_every_export_is_documented() -> None:
    for name in EXPORTED:
        if name != "__version__":
            assert getattr(edge_sdk, name).__doc__, name
