"""Notifies administrators of final failures and pauses, and apps of events.

Other modules decide what to send; a notifier sends one message or raises.
"""

import contextlib
import email.message
import hashlib
import hmac
import http.client
import ipaddress
import json
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
# Deadlines for a whole exchange. They limit the time that one tick of the sensor can take.
WEBHOOK_SECONDS, MAIL_SECONDS = 5.0, 15.0
# The only allocated IPv6 addresses: https://www.iana.org/assignments/ipv6-address-space
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
# Networks that are not public, although `is_global` says so in some versions of Python.
# https://www.iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598; some clouds serve metadata there
        "168.63.129.16/32",  # Azure's platform services, in every virtual network
        "192.0.0.0/24",  # protocol assignments, RFC 6890
        "192.88.99.0/24",  # formerly 6to4 relays, RFC 7526
        "198.18.0.0/15",  # benchmarking, RFC 2544
        "2001::/23",  # protocol assignments, RFC 2928, such as Teredo, which wraps an IPv4 address
        "2001:db8::/32",  # documentation, RFC 3849
        "2002::/16",  # 6to4, RFC 3056, which wraps an IPv4 address
        "3fff::/20",  # documentation, RFC 9637
    )
)
LAST_PRIVILEGED_PORT = 1023
# It may take the same message later: request timeout, too early, too many requests, bad gateway,
# unavailable, gateway timeout. Any other status may be about this message.
OVERLOADED = (408, 425, 429, 502, 503, 504)


class Notifier(Protocol):
    """A channel to the administrators; `channel` is its name in the outbox."""

    channel: str

    def send(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Sends one message about one failure, or a digest of several.

        Args:
            failures: Rows of the outbox: image_id, generation, reason, error, attempts, failed_at.

        Raises:
            NotificationError: The message was not accepted. It may be sent again, with the same
                event ID.
        """

    def send_pause(self, pause: Pause) -> None:
        """Sends one message about a pause of paid work; raises like `send`."""


def build_message(failures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the JSON of a message about failures.

    The same failures always have the same `eventId`, so that receivers can recognise repetitions.
    """
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
    """Returns the JSON of a message about a pause; repetitions have the same `eventId`."""
    return {
        "type": "image-processing-paused",
        "eventId": f"pause:{pause.seq}",
        "reason": pause.reason,
        "error": pause.message,
        "since": pause.since.isoformat(),
        "until": pause.until.isoformat() if pause.until else None,
    }


class Webhook:
    """An address that is sent signed JSON by POST, without following redirects.

    Unless private addresses are allowed, it must use https and have a public address and port 443
    or one above 1023, because lower ports belong to other services.

    `X-Imagepipeline-Timestamp` is the time in Unix seconds. `X-Imagepipeline-Signature` is
    `sha256=` followed by the hexadecimal HMAC-SHA256, keyed with the secret, of timestamp, dot and
    body.
    """

    def __init__(self, url: str, secret: str, allows_private: bool) -> None:
        self._url = urlsplit(url)
        self._secret = secret.encode()
        self._allows_private = allows_private

    def post(self, content: Mapping[str, Any]) -> None:
        """Tries once; times out after 3 s without a connection or data, and after 5 s in total.

        Raises:
            NoticeRefusedError: it answers, but not with 2xx.
            NotificationError: it does not answer, or is overloaded.
        """
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
            kind = NotificationError if status in OVERLOADED else NoticeRefusedError
            raise kind(f"the webhook answered {status}")

    def _connect(self) -> http.client.HTTPConnection:
        """Connects to the address that was checked, as a second lookup could return another one."""
        host, is_https = self._url.hostname or "", self._url.scheme == "https"
        if not is_https and not (self._allows_private and self._url.scheme == "http"):
            raise NotificationError("the webhook must use https")
        try:
            port = self._url.port or (443 if is_https else 80)
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except ValueError:  # a port above 65535, or a name that IDNA cannot encode
            raise NotificationError(
                "the webhook's address is malformed: correct its setting"
            ) from None
        except OSError as error:
            raise NotificationError(
                f"the webhook's host name cannot be resolved: {type(error).__name__}"
            ) from None
        addresses = [str(entry[4][0]) for entry in found]
        if not self._allows_private:
            # A host that has both private and public addresses is not trusted at all.
            if not all(is_public(address) for address in addresses):
                raise NotificationError("the webhook has a private address")
            if port <= LAST_PRIVILEGED_PORT and port != 443:
                raise NotificationError("the webhook's port must be 443 or above 1023")
        address = addresses[0]
        if is_https:
            return _NamedConnection(host, address, port)
        return http.client.HTTPConnection(address, port, timeout=TIMEOUT_SECONDS)


class WebhookNotifier:
    """Sends notices to the administrators' webhook."""

    channel = "webhook"

    def __init__(self, url: str, secret: str, allows_private: bool) -> None:
        self._webhook = Webhook(url, secret, allows_private)

    def send(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """See `Webhook.post`."""
        self._webhook.post(build_message(failures))

    def send_pause(self, pause: Pause) -> None:
        """See `Webhook.post`."""
        self._webhook.post(build_pause_message(pause))


class EventWebhook:
    """Sends events to the app's webhook."""

    def __init__(self, url: str, secret: str, allows_private: bool) -> None:
        self._webhook = Webhook(url, secret, allows_private)

    def send(self, payloads: Sequence[str]) -> None:
        """Sends the JSON of some events in one message; see `Webhook.post`."""
        events = [json.loads(payload) for payload in payloads]
        self._webhook.post({"type": "image-processing-events", "events": events})


class _NamedConnection(http.client.HTTPSConnection):
    """An HTTPS connection to an address, whose certificate must be valid for a given host name."""

    def __init__(self, name: str, address: str, port: int) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(address, port, timeout=TIMEOUT_SECONDS, context=self._tls)
        self._name = name

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), TIMEOUT_SECONDS)
        self.sock = self._tls.wrap_socket(
            plain, server_hostname=self._name, do_handshake_on_connect=False
        )
        self.sock.do_handshake()  # after `sock` is set, so that a deadline can shut it down


def _ask(
    connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]
) -> int:
    """Returns the status of the response.

    Does not read its body, which may be long or compressed, and does not follow redirects.
    """
    connection.request("POST", path, body, headers)
    return connection.getresponse().status


def _cut_off(connection: socket.socket | None) -> None:
    """Shuts down a connection that another thread is using."""
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Returns whether an IP address is on the public Internet.

    Of the IPv6 addresses that wrap an IPv4 address, only NAT64 ones can be public, and only if the
    IPv4 address is.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        # This excludes IPv4-mapped, IPv4-compatible, translated and site-local addresses, too.
        if ip not in GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)


class MailNotifier:
    """Sends plain-text mails.

    `smtps://` is encrypted from the start, `smtp://` by STARTTLS if the server offers it.
    """

    channel = "mail"

    def __init__(self, url: str, sender: str, recipients: Sequence[str]) -> None:
        self._url = urlsplit(url)
        self._sender = sender
        self._recipients = recipients

    def send(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Tries once; times out after 10 s without data, and after 15 s in total."""
        is_digest = len(failures) > 1
        subject = (
            f"{len(failures)} images failed"
            if is_digest
            else f"Image {failures[0]['image_id']} failed"
        )
        text = "\n".join(make_printable(_describe(failure)) for failure in failures)
        self._mail(subject, text, build_message(failures)["eventId"])

    def send_pause(self, pause: Pause) -> None:
        """See `send`."""
        until = (
            f"until {pause.until.isoformat(timespec='minutes')}"
            if pause.until
            else "until you run `imagepipeline resume`"
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
                f"the mail server refused the message: {type(error).__name__}"
            ) from None
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise NotificationError(
                f"the mail server did not accept the message: {type(error).__name__}"
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
    return (
        f"{at}  {failure['image_id']}  {failure['reason']}, attempt {failure['attempts']}: "
        f"{failure['error']}"
    )
