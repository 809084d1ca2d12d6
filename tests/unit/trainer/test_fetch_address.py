"""Which hosts may be asked, and which addresses connected to."""

from collections.abc import Sequence

import pytest

from luthier_trainer.data.fetching.address import Policy, Resolver, normalised, origin
from luthier_trainer.data.fetching.request import FetchError


def answers(*addresses: str) -> Resolver:
    def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.127.255.254", "127.0.0.1", "127.8.8.8", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1",
        "2606:4700::5efe:10.0.0.1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
        "4000::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused_even_among_public_ones(address: str) -> None:
    policy = Policy(["name.example"], [], answers("93.184.215.14", address))
    with pytest.raises(FetchError) as error:
        policy.addresses("name.example", 443)
    assert error.value.reason == "ADDRESS_NOT_ALLOWED"


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"]
)
def test_a_public_address_is_connected_to(address: str) -> None:
    assert len(Policy(["name.example"], [], answers(address)).addresses("name.example", 443)) == 1


@pytest.mark.parametrize(
    ("network", "address"),
    [
        ("10.0.0.0/8", "10.1.2.3"), ("10.0.0.0/8", "::ffff:10.1.2.3"), ("10.0.0.0/8", "64:ff9b::10.1.2.3"),
        ("fd00::/8", "fd00::7"), ("127.0.0.1", "127.0.0.1"),
    ],
)  # fmt: skip
def test_a_network_that_the_operator_listed_is_open_and_no_other_one(network: str, address: str) -> None:
    assert Policy(["name.example"], [network], answers(address)).addresses("name.example", 443)
    with pytest.raises(FetchError):
        Policy(["name.example"], [network], answers(address, "192.168.0.1")).addresses("name.example", 443)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("HuggingFace.CO.", "huggingface.co"), ("127.1", "127.0.0.1"), ("0x7f.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("017700000001", "127.0.0.1"), ("0xa9fea9fe", "169.254.169.254"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("0:0:0:0:0:0:0:1", "::1"), ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)  # fmt: skip
def test_every_spelling_of_an_address_is_judged_as_the_address(host: str, expected: str) -> None:
    assert normalised(host) == expected


@pytest.mark.parametrize(
    "url",
    [
        "https://user@huggingface.co/", "https://user:pass@huggingface.co/", "https://huggingface.co@evil.example/",
        "https://huggingface%2eco/", "https://huggingface.co%00.evil.example/", "https://hugging\u3002face/", "https:///x",
        "https://ⓗuggingface.co/", "https://[fe80::1%25eth0]/", "https://[::1/", "https://a..b/", "https://huggingface.co:x/",
        "https://huggingface.co:99999/", "https://huggingface.co\\@evil.example/", "https://hugging face.co/",
        "https://huggingface.co/\r\nX: y", "https://1.2.3.4.5/", "https://256.256.256.256/", "https://-a.example/",
    ],
)  # fmt: skip
def test_a_url_that_two_readers_may_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(FetchError) as error:
        origin(url)
    assert error.value.reason == "INVALID_URL"


@pytest.mark.parametrize(
    "url", ["ftp://huggingface.co/x", "gopher://a/", "javascript:1", "//huggingface.co/x", "dict://a"]
)
def test_no_scheme_but_https_and_http_is_known(url: str) -> None:
    with pytest.raises(FetchError) as error:
        origin(url)
    assert error.value.reason == "SCHEME_NOT_ALLOWED"


HOSTS = ["huggingface.co", "*.hf.co", "files.example:8443", "http://127.0.0.1:8080", "[2606:4700::1]"]


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/a", "https://HUGGINGFACE.co:443/a", "https://cdn.hf.co/", "https://a.b.hf.co/",
        "https://files.example:8443/", "http://127.0.0.1:8080/", "http://127.1:8080/", "https://[2606:4700:0::1]/",
    ],
)  # fmt: skip
def test_a_listed_host_may_be_asked(url: str) -> None:
    Policy(HOSTS, []).admit(origin(url))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://hf.co/", "HOST_NOT_ALLOWED"), ("https://evilhf.co/", "HOST_NOT_ALLOWED"),
        ("https://hf.co.evil.example/", "HOST_NOT_ALLOWED"),
        ("https://huggingface.co.evil.example/", "HOST_NOT_ALLOWED"),
        ("https://huggingface.co:8443/", "HOST_NOT_ALLOWED"), ("https://files.example/", "HOST_NOT_ALLOWED"),
        ("http://127.0.0.1:8081/", "HOST_NOT_ALLOWED"), ("https://127.0.0.1:8080/", "HOST_NOT_ALLOWED"),
        ("http://huggingface.co/", "SCHEME_NOT_ALLOWED"), ("http://huggingface.co:443/", "SCHEME_NOT_ALLOWED"),
        ("https://169.254.169.254/", "HOST_NOT_ALLOWED"),
    ],
)  # fmt: skip
def test_a_host_that_only_looks_listed_may_not_be_asked(url: str, reason: str) -> None:
    with pytest.raises(FetchError) as error:
        Policy(HOSTS, []).admit(origin(url))
    assert error.value.reason == reason


def test_an_address_listed_by_itself_needs_no_network_but_a_name_that_leads_there_does() -> None:
    policy = Policy(["http://127.0.0.1:8080", "name.example"], [], answers("127.0.0.1"))
    assert policy.addresses("127.0.0.1", 8080)
    with pytest.raises(FetchError):
        policy.addresses("name.example", 8080)


def test_any_host_may_be_allowed_and_its_addresses_are_judged_all_the_same() -> None:
    policy = Policy(["*"], [], answers("10.0.0.1"))
    policy.admit(origin("https://anything.example/"))
    with pytest.raises(FetchError) as error:
        policy.addresses("anything.example", 443)
    assert error.value.reason == "ADDRESS_NOT_ALLOWED"


@pytest.mark.parametrize("hosts", [["https://a.example/path"], ["a b"], ["ftp://a"], ["a.*"], [""], ["user@a.example"]])
def test_a_setting_that_cannot_be_read_says_so_and_allows_nothing(hosts: list[str]) -> None:
    with pytest.raises(FetchError) as error:
        Policy(hosts, [])
    assert error.value.reason == "NOT_CONFIGURED"
