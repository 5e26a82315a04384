"""hostile_https.py HOST PORT: too much, behind TLS, for the enrolment port. Prints "all refused" or raises."""
import socket
import ssl
import sys

HOST, PORT = sys.argv[1], int(sys.argv[2])


def exchange(request, more=b""):
    """Sends, and returns what was answered until the server closed."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((HOST, PORT), timeout=20) as plain:
        with context.wrap_socket(plain, server_hostname="octobus") as stream:
            answer = b""
            try:
                stream.sendall(request)
                for _ in range(64):
                    if not more:
                        break
                    stream.sendall(more)
                while chunk := stream.recv(65536):
                    answer += chunk
            except (ConnectionError, BrokenPipeError, ssl.SSLError):
                pass
            return answer


def refused(answer):
    status = answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/1.1 ") else b"closed"
    assert not status.startswith(b"2"), answer[:200]


refused(exchange(b"POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n", b"x" * 65536))
refused(exchange(b"POST /v1/join HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"))
refused(exchange(b"POST /v1/join HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"))
refused(exchange(b"POST /v1/join HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\n\xff\xff\xff\xff"))
refused(exchange(b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
refused(exchange(b"GET / HTTP/1.1\r\nX: " + b"y" * (2 << 20) + b"\r\n\r\n"))
print("all refused")
