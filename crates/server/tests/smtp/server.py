"""A real SMTP server for `channel_mail.rs`: aiosmtpd, with STARTTLS and authentication.

Prints its port, and then each message that it takes as a line of JSON. Ends when its standard input does.
"""

import argparse
import asyncio
import base64
import email
import email.policy
import json
import logging
import ssl
import sys
import warnings

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

logging.disable()
warnings.simplefilter("ignore")

arguments = argparse.ArgumentParser()
arguments.add_argument("--tls", choices=["starttls", "implicit", "none"], default="starttls")
arguments.add_argument("--cert", default="cert.pem")
arguments.add_argument("--key", default="key.pem")
arguments.add_argument("--reply", default="250 OK", help="to the message")
arguments.add_argument("--reply-rcpt", default="250 OK", help="to the recipient")
arguments.add_argument("--stall", choices=["none", "data", "quit"], default="none")
arguments = arguments.parse_args()


class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if arguments.reply_rcpt.startswith("250"):
            envelope.rcpt_tos.append(address)
        return arguments.reply_rcpt

    async def handle_DATA(self, server, session, envelope):
        if arguments.stall == "data":
            await asyncio.sleep(600)
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        told = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "user": session.auth_data.login.decode() if session.auth_data else None,
            "hello": session.host_name,
            "is_encrypted": session.ssl is not None or arguments.tls == "implicit",
            "raw": base64.b64encode(envelope.content).decode(),
            "headers": {name.lower(): str(value) for name, value in message.items()},
            "text": message.get_content(),
            "defects": [str(defect) for defect in message.defects],
        }
        print(json.dumps(told), flush=True)
        return arguments.reply


class Server(SMTP):
    async def smtp_QUIT(self, arg):
        if arguments.stall == "quit":
            await asyncio.sleep(600)
        await super().smtp_QUIT(arg)


def sign_in(server, session, envelope, mechanism, data):
    if isinstance(data, LoginPassword) and (data.login, data.password) == (b"pisync", b"s3cret/p@ss"):
        return AuthResult(success=True, auth_data=data)
    return AuthResult(success=False, handled=False)


def make():
    context = None
    if arguments.tls == "starttls":
        context = tls()
    has_tls = arguments.tls != "none"
    return Server(
        Handler(),
        hostname="mail.test",
        tls_context=context,
        require_starttls=arguments.tls == "starttls",
        auth_required=has_tls,
        auth_require_tls=arguments.tls != "implicit",
        authenticator=sign_in,
        enable_SMTPUTF8=False,
    )


def tls():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(arguments.cert, arguments.key)
    return context


async def main():
    loop = asyncio.get_running_loop()
    context = tls() if arguments.tls == "implicit" else None
    server = await loop.create_server(make, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


asyncio.run(main())
