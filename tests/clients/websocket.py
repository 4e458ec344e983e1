"""A websocket echo server (`serve`: prints its port) and a client of it (`ask URL`: prints the echoes)."""

import asyncio
import sys

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def server():
    async with serve(echo, "127.0.0.1", 0) as running:
        print(running.sockets[0].getsockname()[1], flush=True)
        await running.serve_forever()


async def client(url):
    async with connect(url) as socket:
        for message in ["hello", "x" * 100_000, b"\x00\xff"]:
            await socket.send(message)
            assert await socket.recv() == message, "another message came back"
        await (await socket.ping())
    print("echoed")


asyncio.run(server() if sys.argv[1] == "serve" else client(sys.argv[2]))
