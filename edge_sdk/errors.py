"""Every error a caller can meet, by what the caller can do about it.

EdgeError
|-- ConfigError         you can fix it: printed, exit 2
|   |-- ProfileError        a device profile has a missing, unknown or impossible value
|   |-- TaskError           the task file or the model it builds cannot be used
|   |-- StateError          a state directory belongs to another job, is damaged or read-only
|   |-- BrokerSetupError    the broker we were to start cannot be started
|   `-- NothingFits         not even the cheapest block fits the device's budgets
|-- LinkError           the network: retried with backoff, exit 3
|   |-- BrokerUnreachable   nobody answers at the broker's address, or not in MQTT
|   `-- BrokerRefused       the broker answered and said no
|-- PeerError           what arrived is wrong: counted, answered, dropped, exit 4
|   |-- MalformedMessage    bytes that are no message of this protocol
|   |-- WrongUpdate         a well-formed update that does not match its offer
|   |-- DamagedBlock        a stored or received block does not have its hash
|   `-- Refused             the server will not work with this device
`-- ProtocolMisuse      our own bug: crashes loudly
"""

from __future__ import annotations

MIB = 1024 * 1024


class EdgeError(Exception):
    """Root of all errors this project raises on purpose."""


class ConfigError(EdgeError):
    """Something the user can fix; commands print it and exit with 2."""


class ProfileError(ConfigError):
    """A device profile has a missing, unknown or impossible value."""


class TaskError(ConfigError):
    """The task file, or the model it builds, cannot be used."""


class StateError(ConfigError):
    """A state directory belongs to another job, is damaged, full or read-only."""


class BrokerSetupError(ConfigError):
    """The broker that was to be started here cannot be started."""


class NothingFits(ConfigError):
    """Not even the cheapest plan fits; the device sits this round out."""


class LinkError(EdgeError):
    """The network failed; retried with backoff, commands exit with 3."""


class BrokerUnreachable(LinkError):
    """Nobody answers at the broker's address, or what answers is no MQTT broker."""


class BrokerRefused(LinkError):
    """The broker answered and refused the connection."""


class PeerError(EdgeError):
    """What arrived is wrong: it is counted, answered and dropped; commands exit with 4."""


class MalformedMessage(PeerError):
    """The bytes are not a message of this protocol."""


class WrongUpdate(PeerError):
    """The update is well formed but does not match the offer it answers."""


class DamagedBlock(PeerError):
    """A stored or received block does not have the hash it is named by."""


class Refused(PeerError):
    """The server will not work with this device."""


class ProtocolMisuse(EdgeError):
    """Our own code broke a rule of the protocol; never caught, never shown as the user's fault."""
