"""Where Redis is: every form of the URL, and every mistake in one, named without a word of it."""

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway.config.addresses import RedisUrl
from gateway.redis_address import RedisAddress

GOOD = [
    ("redis://user:pw@host:6380/3", "host:6380/3"),
    ("redis://host", "host:6379/0"),
    ("REDIS://host/", "host:6379/0"),
    ("redis://host?db=4", "host:6379/4"),
    ("redis://[fd00::7]:6380", "[fd00::7]:6380/0"),
    ("rediss://host", "host:6379/0"),
    ("rediss://host?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem", "host:6379/0"),
    ("unix:///run/redis.sock", "unix:/run/redis.sock"),
    ("unix://user:pw@/run/redis.sock?db=2", "unix:/run/redis.sock"),
    ("unix:///run/redis.sock?password=pw", "unix:/run/redis.sock"),
    ("redis+sentinel://:pw@a,b:26380/money", "service money of sentinels a:26379,b:26380"),
    ("rediss+sentinel://a/money/2?sentinel_password=pw", "service money of sentinels a:26379"),
    ("redis+cluster://user:pw@a:7001,b", "cluster a:7001,b:6379"),
    ("rediss+cluster://[::1]:7001,[::1]:7002/0", "cluster [::1]:7001,[::1]:7002"),
]

BAD = [
    ("http://host", "expected a URL such as redis://host:6379/0"),
    ("localhost:6379", "expected a URL such as redis://host:6379/0"),
    ("redis+sentinels://host/money", "expected a URL such as redis://host:6379/0"),
    ("redis://ho st", "expected a URL such as redis://host:6379/0"),
    ("redis://", "expected a host and its port"),
    ("redis:///0", "expected a host and its port"),
    ("redis://host:0", "expected a host and its port"),
    ("redis://host:65536", "expected a host and its port"),
    ("redis://host:port", "expected a host and its port"),
    ("redis://fd00::7", "expected a host and its port"),
    ("redis://:hunter2/x@host", "/ .* are written %2F"),
    ("redis://:pw@host/hunter2", "is not the number of a database"),
    ("redis://host/0/1", "is not the number of a database"),
    ("redis://host?db=one", "is not the number of a database"),
    ("redis://host/0?db=1", "the number of the database stands there twice"),
    ("redis://a,b", r"several hosts are for redis\+sentinel:// and redis\+cluster://"),
    ("redis://hunter2@host", "a user name needs a password"),
    ("redis://host?socket_timeout=1", "an option is unknown: known are db, username"),
    ("rediss://host?ssl_ca_cert=/ca.pem", "an option is unknown: did you mean 'ssl_ca_certs'"),
    ("redis://host?hunter2=1", "an option is unknown: known are db, username"),
    ("redis://host?db=1&db=1", "an option stands there twice"),
    ("redis://host?ssl_ca_certs=/ca.pem", "ssl_ca_certs is for TLS: write rediss instead of redis"),
    ("rediss://host?ssl_keyfile=/k.pem", "ssl_keyfile needs the certificate of the key"),
    ("redis+cluster://host?sentinel_password=hunter2", r"sentinel_password is for redis\+sentinel://"),
    ("unix://host/run/redis.sock", "expected a socket file"),
    ("unix://", "expected a socket file"),
    ("redis+sentinel://a,b", "the name of the service is missing"),
    ("redis+sentinel://a,b/", "the name of the service is missing"),
    ("redis+sentinel://a,/money", "expected a host and its port"),
    ("redis+sentinel://a,a:26379/money", "a host stands there twice"),
    ("redis+sentinel://a/money/two", "is not the number of a database"),
    ("redis+cluster://a,b/1", "a cluster has database 0 only"),
    ("redis+cluster://a,b?db=1", "a cluster has database 0 only"),
]


@pytest.mark.parametrize(("url", "shown"), GOOD)
def test_every_form_is_read_configured_and_shown_without_secrets(url: str, shown: str) -> None:
    address = RedisAddress.parse(url)
    assert str(address) == shown
    assert "pw" not in repr(address)
    assert TypeAdapter(RedisUrl).validate_python(url) == url


@pytest.mark.parametrize(("url", "mistake"), BAD)
def test_every_mistake_is_named_without_a_part_of_the_url(url: str, mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake) as caught:
        RedisAddress.parse(url)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValidationError):
        TypeAdapter(RedisUrl).validate_python(url)


def test_credentials_are_decoded_and_go_to_whom_they_are_for() -> None:
    url = "rediss+sentinel://ann:p%2Fw@a/my%20money/2?sentinel_username=eve&sentinel_password=q%26"
    address = RedisAddress.parse(url)
    assert (address.service, address.db) == ("my money", 2)
    server, sentinel = address.at(("x", 1)), address.sentinel_at(("y", 2))
    assert (server.login.command, server.db, server.tls) == (("ann", "p/w"), 2, address.tls)
    assert (sentinel.login.command, sentinel.db, sentinel.tls) == (("eve", "q&"), 0, address.tls)
    assert RedisAddress.parse("redis://:pw@host").login.command == ("pw",)
    assert RedisAddress.parse("redis://host").login.command == ()
