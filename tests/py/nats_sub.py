"""nats_sub.py URL SUBJECT: prints "ready", then "<subject> <payload>" for every message."""
import asyncio
import sys

import nats


async def main(url, subject):
    client = await nats.connect(url, allow_reconnect=False)

    async def on_message(message):
        print(message.subject, message.data.decode(), flush=True)

    await client.subscribe(subject, cb=on_message)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
