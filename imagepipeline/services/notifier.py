"""Telling the administrators that images have failed for good: by webhook, by mail.

What to tell is decided elsewhere; a notifier sends one message or raises.
"""

import contextlib
import email.message
import hashlib
import hmac
import http.client
import ipaddress
import smtplib
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from imagepipeline.deadlines import call_within
from imagepipeline.errors import NoticeRefusedError, NotificationError
from imagepipeline.models import Pause
from imagepipeline.text import make_printable, to_json

TIMEOUT_SECONDS = 3.0
SMTP_TIMEOUT_SECONDS = 10.0
# For a whole conversation: five notices and a pause by webhook and by mail fit into the minute a tick may take.
WEBHOOK_SECONDS, MAIL_SECONDS = 5.0, 15.0
# https://www.iana.org/assignments/ipv6-address-space: of all IPv6 addresses, those that are given out.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
# What Python's `is_global` lets through, in one version or another.
# https://www.iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",  # behind a carrier's NAT, RFC 6598; clouds have their metadata there, too
        "168.63.129.16/32",  # Azure's own services, the same in each of its networks
        "192.0.0.0/24",  # of protocols, RFC 6890
        "192.88.99.0/24",  # once 6to4's relays, RFC 7526
        "198.18.0.0/15",  # measurements, RFC 2544
        "2001::/23",  # of protocols, RFC 2928; Teredo among them, which wraps an IPv4 address
        "2001:db8::/32",  # documentation, RFC 3849
        "2002::/16",  # 6to4, RFC 3056, which wraps an IPv4 address
        "3fff::/20",  # documentation, RFC 9637
    )
)
LAST_PRIVILEGED_PORT = 1023


class Notifier(Protocol):
    """A way to tell; `channel` is its name in the outbox."""

    channel: str

    def send(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Sends one message about one failure, or a digest of several.

        Args:
            failures: rows of the outbox: image_id, generation, reason, error, attempts, failed_at.

        Raises:
            NotificationError: it was not taken; it may be sent again, with the same event ID.
        """

    def send_pause(self, pause: Pause) -> None:
        """Sends one message that nothing is worked on; raises as `send`."""


def build_message(failures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON of a message. The same failures have the same `eventId`, by which a receiver knows a repetition."""
    images = [
        {
            "imageId": failure["image_id"],
            "generation": failure["generation"],
            "reason": failure["reason"],
            "error": failure["error"],
            "attempts": failure["attempts"],
            "failedAt": failure["failed_at"].isoformat(),
        }
        for failure in failures
    ]
    keys = " ".join(f"{image['imageId']}:{image['generation']}" for image in images)
    event_id = (
        keys
        if len(images) == 1
        else "digest:" + hashlib.sha256(keys.encode(errors="replace")).hexdigest()[:32]
    )
    if len(images) == 1:
        return {"type": "image-processing-failed", "eventId": event_id, **images[0]}
    return {
        "type": "image-processing-failed-digest",
        "eventId": event_id,
        "count": len(images),
        "images": images,
    }


def build_pause_message(pause: Pause) -> dict[str, Any]:
    """The JSON of the message that nothing is worked on; its `eventId` is the same when it is repeated."""
    return {
        "type": "image-processing-paused",
        "eventId": f"pause:{pause.seq}",
        "reason": pause.reason,
        "error": pause.message,
        "since": pause.since.isoformat(),
        "until": pause.until.isoformat() if pause.until else None,
    }


class WebhookNotifier:
    """A POST of JSON, signed. Redirects are not followed.

    Unless private addresses are allowed, it goes by https to a public address, at port 443 or one above 1023: the
    others belong to other services.

    `X-Imagepipeline-Signature` is `sha256=` and the HMAC-SHA256, in hex, of timestamp, dot and body under the secret;
    `X-Imagepipeline-Timestamp` is that timestamp, in Unix seconds.
    """

    channel = "webhook"

    def __init__(self, url: str, secret: str, allows_private: bool) -> None:
        self._url = urlsplit(url)
        self._secret = secret.encode()
        self._allows_private = allows_private

    def send(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Tries once, for at most 3 s to connect, 3 s between two signs of life, and 5 s in all."""
        self._post(build_message(failures))

    def send_pause(self, pause: Pause) -> None:
        """As `send`."""
        self._post(build_pause_message(pause))

    def _post(self, content: Mapping[str, Any]) -> None:
        body = to_json(content).encode()
        timestamp = str(int(time.time()))
        signature = hmac.new(
            self._secret, timestamp.encode() + b"." + body, hashlib.sha256
        ).hexdigest()
        headers = {
            "Host": self._url.netloc.rpartition("@")[2],
            "Content-Type": "application/json",
            "X-Imagepipeline-Timestamp": timestamp,
            "X-Imagepipeline-Signature": f"sha256={signature}",
        }
        path = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        connection = self._connect()
        try:
            status = call_within(
                WEBHOOK_SECONDS,
                lambda: _ask(connection, path, body, headers),
                lambda: _cut_off(connection.sock),
            )
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise NotificationError(f"the webhook did not answer: {type(error).__name__}") from None
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise NoticeRefusedError(f"the webhook answered {status}")

    def _connect(self) -> http.client.HTTPConnection:
        """To the very address that was checked: a name could mean another one when it is looked up again."""
        host, is_https = self._url.hostname or "", self._url.scheme == "https"
        if not is_https and not (self._allows_private and self._url.scheme == "http"):
            raise NotificationError("the webhook must be https")
        try:
            port = self._url.port or (443 if is_https else 80)
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except ValueError:  # of a port beyond 65535, or of a name that IDNA cannot encode
            raise NotificationError(
                "the webhook's address is malformed: correct IMAGEPIPELINE_WEBHOOK_URL"
            ) from None
        except OSError as error:
            raise NotificationError(
                f"the webhook's name means no address: {type(error).__name__}"
            ) from None
        addresses = [str(entry[4][0]) for entry in found]
        if not self._allows_private:
            # A name that has a private address beside a public one is not trusted with either.
            if not all(is_public(address) for address in addresses):
                raise NotificationError("the webhook is at a private address")
            if port <= LAST_PRIVILEGED_PORT and port != 443:
                raise NotificationError("the webhook must be at port 443, or at one above 1023")
        address = addresses[0]
        if is_https:
            return _NamedConnection(host, address, port)
        return http.client.HTTPConnection(address, port, timeout=TIMEOUT_SECONDS)


class _NamedConnection(http.client.HTTPSConnection):
    """A connection to an address whose certificate must be that of a name."""

    def __init__(self, name: str, address: str, port: int) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(address, port, timeout=TIMEOUT_SECONDS, context=self._tls)
        self._name = name

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), TIMEOUT_SECONDS)
        self.sock = self._tls.wrap_socket(
            plain, server_hostname=self._name, do_handshake_on_connect=False
        )
        self.sock.do_handshake()  # only now, so that a deadline finds the socket


def _ask(
    connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]
) -> int:
    """The status of the answer. Its body is not read, however long or packed it is; redirects are not followed."""
    connection.request("POST", path, body, headers)
    return connection.getresponse().status


def _cut_off(connection: socket.socket | None) -> None:
    """Ends a conversation that another thread is in."""
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public Internet.

    An IPv6 address that wraps an IPv4 one is public where NAT64 leads to a public one, and else is not.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if (
            ip not in GLOBAL_UNICAST
        ):  # mapped, compatible, translated and site-local addresses among them
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)


class MailNotifier:
    """A plain-text mail. `smtps://` is encrypted from the start, `smtp://` as soon as the server offers it."""

    channel = "mail"

    def __init__(self, url: str, sender: str, recipients: Sequence[str]) -> None:
        self._url = urlsplit(url)
        self._sender = sender
        self._recipients = recipients

    def send(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Tries once, for at most 10 s between two signs of life, and 15 s in all."""
        is_digest = len(failures) > 1
        subject = (
            f"{len(failures)} images failed"
            if is_digest
            else f"Image {failures[0]['image_id']} failed"
        )
        text = "\n".join(make_printable(_describe(failure)) for failure in failures)
        self._mail(subject, text, build_message(failures)["eventId"])

    def send_pause(self, pause: Pause) -> None:
        """As `send`."""
        until = (
            f"until {pause.until.isoformat(timespec='minutes')}"
            if pause.until
            else "until you resume"
        )
        text = f"Nothing has failed; images wait {until}.\n{make_printable(pause.message)}"
        self._mail(
            f"Image processing is paused: {pause.reason}",
            text,
            build_pause_message(pause)["eventId"],
        )

    def _mail(self, subject: str, text: str, event_id: str) -> None:
        message = email.message.EmailMessage()
        message["Subject"] = make_printable(subject)
        message["From"], message["To"] = self._sender, ", ".join(self._recipients)
        message["Message-ID"] = (
            f"<{hashlib.sha256(event_id.encode(errors='replace')).hexdigest()[:32]}@imagepipeline>"
        )
        message.set_content("\n".join(map(make_printable, text.split("\n"))))
        server = (smtplib.SMTP_SSL if self._url.scheme == "smtps" else smtplib.SMTP)(
            timeout=SMTP_TIMEOUT_SECONDS
        )
        try:
            call_within(
                MAIL_SECONDS, lambda: self._deliver(server, message), lambda: _cut_off(server.sock)
            )
        except (smtplib.SMTPDataError, smtplib.SMTPRecipientsRefused) as error:
            raise NoticeRefusedError(
                f"the mail server refused it: {type(error).__name__}"
            ) from None
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise NotificationError(
                f"the mail server did not take it: {type(error).__name__}"
            ) from None

    def _deliver(self, server: smtplib.SMTP, message: email.message.EmailMessage) -> None:
        host, is_encrypted = self._url.hostname or "", self._url.scheme == "smtps"
        with contextlib.closing(server):
            server.connect(host, self._url.port or (465 if is_encrypted else 25))
            if not is_encrypted and server.has_extn("starttls"):
                server.starttls()
            if self._url.username:
                server.login(unquote(self._url.username), unquote(self._url.password or ""))
            server.send_message(message)
            server.quit()


def _describe(failure: Mapping[str, Any]) -> str:
    at = failure["failed_at"].isoformat(timespec="seconds")
    return f"{at}  {failure['image_id']}  {failure['reason']}, attempt {failure['attempts']}: {failure['error']}"
