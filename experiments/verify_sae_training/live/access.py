"""Who may ask the live page's server: the browser that was given the token, from the page itself, and nobody else.

Bound to 127.0.0.1, a server is still reached by every page that the same browser has open, and by names that someone
points at 127.0.0.1. So each request must name this host, come from this page, and bring the token: in the URL that the
script prints, then in a cookie that no script can read and no other site's request carries.
"""
import hmac

from tornado.httputil import HTTPServerRequest

NOT_FRAMED = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Server": "live",
    "Content-Security-Policy": f"default-src 'none'; {NOT_FRAMED}",
}


def refusal(request: HTTPServerRequest, port: int, token: str) -> str | None:
    """Why the request is refused; None: it is let in."""
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    if request.host not in hosts:
        return "another host is asked for; open the URL that 10_explore.py printed"
    if "Origin" in request.headers and request.headers["Origin"] != f"http://{request.host}":
        return "the request comes from another page"
    given = [request.cookies[cookie_name(port)].value] if cookie_name(port) in request.cookies else []
    is_opening = request.method == "GET" and request.path == "/"
    if is_opening:  # a link to the page may stand anywhere; whoever follows it must hold the token
        given += [value.decode("latin-1") for value in request.arguments.get("token", [])]
    elif request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return "the request comes from another page"
    if not any(hmac.compare_digest(value.encode("utf-8", "replace"), token.encode()) for value in given):
        return "the token is missing or wrong; open the URL that 10_explore.py printed"
    if request.method == "POST" and request.headers.get("Content-Type", "").partition(";")[0] != "application/json":
        return "Content-Type must be application/json"
    return None


def cookie_name(port: int) -> str:
    """Cookies are one for all ports of a host, so the port is in the name."""
    return f"explore_{port}"

