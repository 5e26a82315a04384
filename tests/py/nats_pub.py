"""nats_pub.py URL SUBJECT PAYLOAD: publishes once and waits until the server has it."""
import asyncio
import sys

import nats


async def main(url, subject, payload):
    client = await nats.connect(url, allow_reconnect=False)
    await client.publish(subject, payload.encode())
    await client.flush()
    await client.close()


asyncio.run(main(*sys.argv[1:]))
