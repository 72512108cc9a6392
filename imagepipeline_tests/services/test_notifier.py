"""Webhooks and mails reach real servers, but never private addresses."""

import contextlib
import email
import email.policy
import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from aiosmtpd.controller import Controller
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pytest_httpserver import HTTPServer
from werkzeug import Response

from imagepipeline.errors import NoticeRefusedError, NotificationError
from imagepipeline.models import Pause
from imagepipeline.services import notifier
from imagepipeline.services.notifier import MailNotifier, WebhookNotifier, is_public


def failure(number=1):
    return {
        "image_id": f"image{number}",
        "generation": 2,
        "reason": "corrupt",
        "error": "cut off",
        "attempts": 1,
        "failed_at": datetime(2026, 1, 2, tzinfo=UTC),
    }


@pytest.fixture
def webhook(httpserver):
    return WebhookNotifier(
        httpserver.url_for("/hook?team=1"), "a secret of ours", allows_private=True
    )


def received(httpserver):
    [(request, _)] = httpserver.log
    return request, request.get_json()


def test_one_failure_is_one_message_in_the_old_format_with_additions(httpserver, webhook):
    httpserver.expect_request("/hook", method="POST", query_string="team=1").respond_with_data("")
    webhook.send([failure()])
    _, body = received(httpserver)
    assert body == {
        "type": "image-processing-failed",
        "eventId": "image1:2",
        "imageId": "image1",
        "generation": 2,
        "reason": "corrupt",
        "error": "cut off",
        "attempts": 1,
        "failedAt": "2026-01-02T00:00:00+00:00",
    }


def test_a_message_is_signed(httpserver, webhook):
    httpserver.expect_request("/hook").respond_with_data("")
    webhook.send([failure()])
    request, _ = received(httpserver)
    signed = request.headers["X-Imagepipeline-Timestamp"].encode() + b"." + request.get_data()
    expected = hmac.new(b"a secret of ours", signed, hashlib.sha256).hexdigest()
    assert request.headers["X-Imagepipeline-Signature"] == f"sha256={expected}"


def test_several_failures_are_one_digest_with_a_stable_id(httpserver, webhook):
    httpserver.expect_request("/hook").respond_with_data("")
    for _ in range(2):
        webhook.send([failure(1), failure(2)])
    bodies = [request.get_json() for request, _ in httpserver.log]
    assert bodies[0] == bodies[1]
    assert (bodies[0]["type"], bodies[0]["count"]) == ("image-processing-failed-digest", 2)
    assert [image["imageId"] for image in bodies[0]["images"]] == ["image1", "image2"]


@pytest.mark.parametrize("status", [301, 302, 307, 400, 500])
def test_any_status_but_success_is_an_error_and_redirects_are_not_followed(
    httpserver, webhook, status
):
    httpserver.expect_request("/hook").respond_with_response(
        Response("", status, {"Location": httpserver.url_for("/elsewhere")})
    )
    with pytest.raises(NotificationError, match=str(status)):
        webhook.send([failure()])
    assert len(httpserver.log) == 1


@pytest.mark.parametrize(("status", "is_refusal"), [(400, True), (500, True), (503, False)])
def test_a_refused_message_is_told_from_an_overloaded_webhook(
    httpserver, webhook, status, is_refusal
):
    httpserver.expect_request("/hook").respond_with_data("", status)
    with pytest.raises(NotificationError) as caught:
        webhook.send([failure()])
    assert isinstance(caught.value, NoticeRefusedError) is is_refusal


def test_the_error_for_an_unreachable_webhook_hides_its_address():
    webhook = WebhookNotifier("http://127.0.0.1:9/canary", "s", allows_private=True)
    with pytest.raises(NotificationError) as caught:
        webhook.send([failure()])
    assert "canary" not in str(caught.value)
    assert "127" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https"),
        ("ftp://example.com/", "https"),
        ("https://127.0.0.1/", "private"),
        ("https://localhost/", "private"),
        ("https://[::1]/", "private"),
    ],
)
def test_by_default_only_https_to_public_addresses_is_allowed(url, why):
    with pytest.raises(NotificationError, match=why):
        WebhookNotifier(url, "s", allows_private=False).send([failure()])


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("64:ff9b::5db8:d822", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::5db8:d822", False),
        ("64:ff9b:1:a9fe:a9:fe00::", False),
        ("::ffff:93.184.216.34", False),
        ("::ffff:0:127.0.0.1", False),
        ("::127.0.0.1", False),
        ("::a9fe:a9fe", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2002:5db8:d822::1", False),
        ("fec0::1", False),
        ("fd00:ec2::254", False),
        ("100::1", False),
        ("2001:2::1", False),
        ("2001:20::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("4000::1", False),
        ("0.1.2.3", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("192.0.0.9", False),
        ("192.0.0.192", False),
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("198.18.0.1", False),
        ("198.19.255.255", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
    ],
)
def test_private_addresses_are_recognised_in_every_notation(address, expected):
    assert is_public(address) is expected


@pytest.fixture
def name_server(monkeypatch):
    """Resolves `hook.test`, each time to the next of the given lists of addresses."""
    answers = []
    look_up = socket.getaddrinfo

    def answer(host, port, *args, **kwargs):
        if host != "hook.test":
            return look_up(host, port, *args, **kwargs)
        return [
            entry for address in answers.pop(0) for entry in look_up(address, port, *args, **kwargs)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return answers


def test_a_name_with_both_a_public_and_a_private_address_is_refused(name_server):
    for addresses in (["93.184.216.34", "127.0.0.1"], ["127.0.0.1", "93.184.216.34"]):
        name_server.append(addresses)
        with pytest.raises(NotificationError, match="private"):
            WebhookNotifier("https://hook.test/", "s", allows_private=False).send([failure()])


def test_a_name_is_resolved_only_once(name_server, httpserver):
    httpserver.expect_request("/hook").respond_with_data("")
    name_server.extend([["127.0.0.1"], ["127.0.0.2"]])
    webhook = WebhookNotifier(f"http://hook.test:{httpserver.port}/hook", "s", allows_private=True)
    webhook.send([failure()])
    request, _ = received(httpserver)
    assert request.headers["Host"] == f"hook.test:{httpserver.port}"
    assert name_server == [["127.0.0.2"]]


@pytest.mark.parametrize("port", [22, 25, 80, 444, 465, 1023])
def test_ports_of_other_services_are_refused(port):
    with pytest.raises(NotificationError, match="port must be 443"):
        WebhookNotifier(f"https://93.184.216.34:{port}/", "s", allows_private=False).send(
            [failure()]
        )


@pytest.mark.parametrize(
    "url", ["https://example.com:70000/", "https://example.com:x/", "https://a..b/", "https:///"]
)
def test_a_malformed_address_raises_a_notification_error(url):
    with pytest.raises(
        NotificationError, match=r"malformed|did not answer|private|cannot be resolved"
    ) as caught:
        WebhookNotifier(url, "s", allows_private=False).send([failure()])
    assert "example" not in str(caught.value)


class Mailbox:
    def __init__(self):
        self.mails = []

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        self.mails.append(envelope)
        return "250 OK"


@pytest.fixture
def mailbox():
    mailbox = Mailbox()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        mailbox.port = free.getsockname()[1]
    controller = Controller(mailbox, hostname="127.0.0.1", port=mailbox.port)
    controller.start()
    yield mailbox
    controller.stop()


def test_a_mail_states_what_failed_and_why(mailbox):
    MailNotifier(
        f"smtp://127.0.0.1:{mailbox.port}", "us@example.org", ["a@example.org", "b@example.org"]
    ).send([failure(1), failure(2)])
    [mail] = mailbox.mails
    assert mail.rcpt_tos == ["a@example.org", "b@example.org"]
    text = mail.content.decode()
    assert "Subject: 2 images failed" in text
    assert "image1  corrupt, attempt 1: cut off" in text


def test_an_unreachable_mail_server_is_an_error():
    with pytest.raises(NotificationError, match="mail server"):
        MailNotifier("smtp://u:canary@127.0.0.1:9", "us", ["a"]).send([failure()])


def test_the_signed_body_is_json(httpserver, webhook):
    httpserver.expect_request("/hook").respond_with_data("")
    webhook.send([failure() | {"error": 'quote " and ünïcode \n'}])
    request, _ = received(httpserver)
    assert json.loads(request.get_data())["error"] == 'quote " and ünïcode \n'


@pytest.mark.parametrize("status", [307, 308])
def test_redirects_of_a_webhook_are_not_followed(httpserver, webhook, status):
    httpserver.expect_request("/hook").respond_with_response(
        Response("", status, {"Location": "/elsewhere"})
    )
    httpserver.expect_request("/elsewhere").respond_with_data("")
    with pytest.raises(NoticeRefusedError, match=str(status)):
        webhook.send([failure()])
    assert [request.path for request, _ in httpserver.log] == ["/hook"]


@pytest.fixture
def trickling():
    """A function that starts a server and returns its port, and the list of the parts it sent.

    The server sends a beginning, and then a part every 20 ms for ever.
    """
    ended = threading.Event()
    sent = []

    def start(beginning, part):
        listener = socket.create_server(("127.0.0.1", 0))

        def serve():
            connection, _ = listener.accept()
            with listener, connection, contextlib.suppress(OSError):
                if part not in MAIL_PARTS:  # a mail server sends first
                    connection.recv(65536)
                connection.sendall(beginning)
                while not ended.wait(0.02):
                    connection.sendall(part)
                    sent.append(part)

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield start, sent
    ended.set()


MAIL_PARTS = [b"220-still here\r\n", b"2"]


@pytest.mark.parametrize(
    ("beginning", "part"),
    [(b"", b"H"), (b"HTTP/1.1 200 OK\r\n", b"a"), (b"HTTP/1.1 100 C\r\n\r\n", b"H")],
)
def test_a_webhook_that_trickles_its_headers_times_out(trickling, monkeypatch, beginning, part):
    monkeypatch.setattr(notifier, "WEBHOOK_SECONDS", 0.5)
    start, _ = trickling
    threads = threading.active_count()
    with pytest.raises(NotificationError, match="TimeoutError"):
        WebhookNotifier(
            f"http://127.0.0.1:{start(beginning, part)}/", "s", allows_private=True
        ).send([failure()])
    wait_for(lambda: threading.active_count() <= threads + 1)  # only the server's is left


def test_only_the_status_of_a_webhooks_answer_is_read(trickling):
    start, sent = trickling
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 99999999999\r\n\r\n"
    WebhookNotifier(
        f"http://127.0.0.1:{start(head, b'x' * 65536)}/", "s", allows_private=True
    ).send([failure()])
    assert len(sent) < 50


@pytest.mark.parametrize("part", MAIL_PARTS)
def test_a_mail_server_that_trickles_times_out(trickling, monkeypatch, part):
    monkeypatch.setattr(notifier, "MAIL_SECONDS", 0.5)
    start, _ = trickling
    url = f"smtp://127.0.0.1:{start(b'', part)}"
    threads = threading.active_count()
    with pytest.raises(NotificationError, match="TimeoutError"):
        MailNotifier(url, "us@example.org", ["a@example.org"]).send([failure()])
    wait_for(lambda: threading.active_count() <= threads)


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


EVIL = "a\r\nBcc: all@example.org\x1b[31m\u202e\u2028\x9b\x7f\ud83d"


def test_headers_and_lines_of_a_mail_cannot_be_forged(mailbox):
    mails = MailNotifier(f"smtp://127.0.0.1:{mailbox.port}", "us@example.org", ["a@example.org"])
    mails.send([failure() | {"image_id": EVIL, "error": EVIL}])
    mails.send([failure(1), failure(2) | {"image_id": EVIL, "error": EVIL, "reason": EVIL}])
    mails.send_pause(Pause(1, EVIL, EVIL, datetime(2026, 1, 2, tzinfo=UTC), None, False))
    assert len(mailbox.mails) == 3
    for mail in mailbox.mails:
        message = email.message_from_bytes(mail.content, policy=email.policy.default)
        assert mail.rcpt_tos == ["a@example.org"]
        assert message["Bcc"] is None
        assert str(message["Subject"]).isprintable()
        lines = message.get_content().replace("\r\n", "\n").rstrip("\n").split("\n")
        assert all(line.isprintable() for line in lines)
        assert not any(line.startswith("Bcc") for line in lines)


def test_a_webhook_gets_the_exact_text_without_control_characters(httpserver, webhook):
    httpserver.expect_request("/hook").respond_with_data("")
    webhook.send([failure() | {"error": EVIL}])
    [(request, _)] = httpserver.log
    assert request.get_data().decode("ascii").isprintable()
    assert json.loads(request.get_data())["error"] == EVIL


def test_a_refused_mail_raises_its_own_error(mailbox, monkeypatch):
    monkeypatch.setattr(Mailbox, "handle_DATA", refuse)
    with pytest.raises(NoticeRefusedError, match="SMTPDataError"):
        MailNotifier(f"smtp://127.0.0.1:{mailbox.port}", "us@example.org", ["a@example.org"]).send(
            [failure()]
        )


async def refuse(self, server, session, envelope):
    return "554 no"


def make_certificate(folder, name):
    """Creates a self-signed certificate for a name; returns the paths of it and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key").write_bytes(key.private_bytes(*pem))
    return folder / "certificate", folder / "key"


@pytest.mark.parametrize(("name", "is_valid"), [("localhost", True), ("elsewhere.example", False)])
def test_the_certificate_must_match_the_name(monkeypatch, tmp_path, name, is_valid):
    certificate, key = make_certificate(tmp_path, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with HTTPServer(ssl_context=context) as server:
        server.expect_request("/hook").respond_with_data("")
        webhook = WebhookNotifier(f"https://localhost:{server.port}/hook", "s", allows_private=True)
        if is_valid:
            webhook.send([failure()])
        else:
            with pytest.raises(NotificationError, match="SSLCertVerificationError"):
                webhook.send([failure()])
        assert len(server.log) == is_valid


def test_a_webhook_that_does_not_finish_its_tls_handshake_times_out(trickling, monkeypatch):
    monkeypatch.setattr(notifier, "WEBHOOK_SECONDS", 0.5)
    start, _ = trickling
    port = start(b"\x16\x03\x03\x40\x00", b"\x00")  # a record of 16 kB, one byte at a time
    with pytest.raises(NotificationError, match="TimeoutError"):
        WebhookNotifier(f"https://127.0.0.1:{port}/", "s", allows_private=True).send([failure()])
