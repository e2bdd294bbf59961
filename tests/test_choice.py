"""Which port and which address an RDMA lane uses, from facts alone."""

from __future__ import annotations

import pytest

from aiordma.errors import LaneRefused
from aiordma.lanes.choice import Gid, Port, choose

V1 = Gid(0, "RoCE v1", "fe80:0000:0000:0000:0000:0000:0000:0001")
LOCAL = Gid(1, "RoCE v2", "fe80:0000:0000:0000:0000:0000:0000:0001")
GLOBAL = Gid(2, "RoCE v2", "2001:0db8:0000:0000:0000:0000:0000:0001")
IPV4 = Gid(3, "RoCE v2", "0000:0000:0000:0000:0000:ffff:0a00:0001")


def port(device: str, *gids: Gid, state: str = "ACTIVE", is_ethernet: bool = True) -> Port:
    return Port(device, 1, state, is_ethernet, lid=5, mtu_bytes=4096, gids=gids)


def test_an_ipv4_address_is_best_then_a_global_one():
    assert choose([port("a", V1, LOCAL, GLOBAL, IPV4)]).gid == IPV4
    assert choose([port("a", V1, LOCAL, GLOBAL)]).gid == GLOBAL
    assert choose([port("a", V1, LOCAL)]).gid == LOCAL


def test_the_port_that_has_our_address_is_best_else_the_first_active():
    other = Gid(3, "RoCE v2", "0000:0000:0000:0000:0000:ffff:0a00:0002")
    ports = [port("down", IPV4, state="DOWN"), port("a", IPV4), port("b", other)]
    assert choose(ports, near="10.0.0.2").port.device == "b"
    assert choose(ports, near="127.0.0.1").port.device == "a"
    # As a listener on "::" has it, and a link-local address its interface.
    assert choose(ports, near="::ffff:10.0.0.2").port.device == "b"
    assert choose(ports, near="fe80::1%eth0").port.device == "a"
    assert choose(ports, device="b").port.device == choose(ports, device="b/1").port.device == "b"


def test_the_port_that_has_our_ipv6_address_is_best():
    other = Gid(2, "RoCE v2", "2001:0db8:0000:0000:0000:0000:0000:0002")
    choice = choose([port("a", IPV4, GLOBAL), port("b", IPV4, other)], near="2001:db8::2")
    assert (choice.port.device, choice.gid) == ("b", IPV4)  # as the peer does
    assert choose([port("a", GLOBAL), port("b", other)], near="2001:db8::2").gid == other


def test_infiniband_goes_by_its_first_address():
    gids = (Gid(0, "InfiniBand", LOCAL.text), Gid(1, "InfiniBand", GLOBAL.text))
    assert choose([port("ib", *gids, is_ethernet=False)]).gid.number == 0


@pytest.mark.parametrize(
    ("ports", "wanted", "text"),
    [
        ([], {}, "no RDMA device .*rdma link add"),
        ([port("a", IPV4)], {"device": "z"}, "no RDMA device 'z' here: there are a/1"),
        ([port("a", IPV4, state="DOWN")], {}, r"no RDMA port is active \(a/1 is DOWN\): bring"),
        ([port("a", V1)], {}, "a/1 has no RoCE v2 address: give its network interface an IP"),
        (
            [port("a", V1, IPV4)],
            {"gid_index": 0},
            "gid_index=0 of a/1 is RoCE v1 fe80:.*: it must be",
        ),
        ([port("a", V1, IPV4)], {"gid_index": 9}, "gid_index=9 of a/1 is empty: it must be"),
    ],
)
def test_what_cannot_be_says_why_and_what_to_do(ports, wanted, text):
    with pytest.raises(LaneRefused, match=text):
        choose(ports, **wanted)
