"""What a node tells of itself."""

from __future__ import annotations

import psutil

from pretraining.worker_environment import interface_of


def test_the_interface_that_holds_an_address_is_found():
    addresses = {name: {entry.address for entry in entries} for name, entries in psutil.net_if_addrs().items()}
    loopback = interface_of("127.0.0.1")
    assert loopback is not None and "127.0.0.1" in addresses[loopback]
    assert interface_of("192.0.2.77") is None  # reserved for documentation
    assert interface_of("127.0.0.10") is None  # not by its beginning
