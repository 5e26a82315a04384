"""nats_echo_subjects.py URL: reads subjects from stdin, one a line, publishes to each and prints what came back.

The subscription is `>`: what is printed is what the server made of the subject.
"""
import asyncio
import sys

import nats


async def main(url):
    subjects = [line.rstrip("\n") for line in sys.stdin if line != "\n"]
    client = await nats.connect(url, allow_reconnect=False)
    got = asyncio.Queue()

    async def on_message(message):
        await got.put(message.subject)

    await client.subscribe(">", cb=on_message)
    await client.flush()
    for subject in subjects:
        await client.publish(subject, b"x")
        await client.flush()
        print(await asyncio.wait_for(got.get(), 10), flush=True)
    await client.close()


asyncio.run(main(*sys.argv[1:]))
